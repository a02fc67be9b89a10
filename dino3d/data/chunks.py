"""Our own HDF5 files read without HDF5: by where each chunk lies, which stands in the hidden file beside a volume's.

The HDF5 library takes as long to open a file and to find its chunks as it takes to read them, and reads ahead what no
patch needs. A file that is not ours, has no index or another filter is left to it (dino3d/data/hdf5.py).
"""

import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.data.conventions import AIR, DataError, Stored, one_line
from dino3d.data.sidecar import DAMAGED, identity_of, index_path, indexed_chunks

INDEX_FORMAT = 1  # of an index; files with another are left to HDF5
# Of a chunk: where its bytes stand, their `sum_of`, how many they are, HDF5's filter mask, the lowest voxel
ENTRY = np.dtype([("offset", "<u8"), ("sum", "<u8"), ("size", "<u4"), ("mask", "<u2"), ("lowest", "<i2")])
VOXEL = np.dtype("<i2")
DEFLATE, BLOSC = 1, 32001  # the numbers of HDF5's filters
BLOSC_HEADER = struct.Struct("<4B3I")  # version, of the codec, flags, bytes of a voxel; bytes, of a block, compressed
LONGEST_RUN = 4 << 20  # bytes of neighbouring chunks that are read at once
MOST_HEAD = 1 << 24  # bytes before the first chunk, which hold all of a file besides voxels; ours have 16 KiB
CHUNK_BYTES = 1 << 24  # of the largest chunk; ours have 64 KiB
NO_INDEX = "it has no index of its chunks"
OTHER_FILE = "the index of its chunks is that of another file, as it has changed since"


class ChunkIndex(NamedTuple):
    """of_file: (size, checksum, bytes before the first chunk), see `sidecar.identity_of`; shape, chunk: (3,) voxels
    (z, y, x); filters: numbers of HDF5's, at most one; affine: (4, 4) of the file's voxels to RAS mm; notes: see
    Stored; table: (chunks,) ENTRY, x fastest"""

    of_file: tuple[int, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    filters: tuple[int, ...]
    affine: np.ndarray
    notes: tuple[str, ...]
    table: np.ndarray

    def members(self) -> dict[str, bytes]:
        """What is stored of it, by name."""
        about = {"format": INDEX_FORMAT, "type": VOXEL.str, **self._asdict(), "affine": self.affine.tolist()}
        del about["table"]
        return {"chunks.json": json.dumps(about).encode(), "chunks.bin": self.table.tobytes()}


def sum_of(stored: memoryview) -> int:
    """By which a chunk's bytes are known, as our files have no checksum: their sum in words of 64 bits, which any bit
    changes, at a fifth of the cost of a CRC-32."""
    words = len(stored) // 8
    total = np.add.reduce(np.frombuffer(stored, "<u8", words), dtype=np.uint64)
    return (int(total) + int.from_bytes(stored[8 * words :], "little")) % 2**64


def is_readable(chunk: Sequence[int], dtype: np.dtype, filters: Sequence[int]) -> bool:
    """Whether voxels that HDF5 stores so can be read here."""
    return (
        dtype == VOXEL
        and sys.byteorder == "little"
        and hasattr(os, "preadv")  # Windows has none
        and tuple(filters) in ((), (DEFLATE,), (BLOSC,))
        and VOXEL.itemsize * math.prod(chunk) <= CHUNK_BYTES
        and not (BLOSC in filters and blosc_decompress() is None)
    )


def open_indexed(path: Path | str, closing: contextlib.ExitStack) -> Stored | str:
    """The Stored of a file whose chunks are indexed, or why it can't be read so.

    closing: closes the file. Raises DataError for a damaged index, OSError.
    """
    try:
        found = indexed_chunks(path)
    except FileNotFoundError:
        return NO_INDEX
    except DAMAGED as error:
        raise damaged_index(path, one_line(error, path)) from error
    if found is None:
        return NO_INDEX
    index = parse_index(path, *found)
    file = closing.enter_context(open(path, "rb"))
    if index and index.of_file != tuple(identity_of(file, index.of_file[2])):
        return OTHER_FILE
    if index is None or not is_readable(index.chunk, VOXEL, index.filters):
        return (
            "the index of its chunks is of another version, or hdf5plugin's Blosc library can't be used on this system"
        )
    with contextlib.suppress(AttributeError, OSError):  # a hint, which not every system and storage takes
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    reader = ChunkReader(path, file.fileno(), index)
    return Stored(index.shape[::-1], index.affine, reader.take, index.notes, True, reader.fill)


def damaged_index(path: Path | str, what: str) -> DataError:
    return DataError(
        path,
        f"its index {index_path(path).name} is damaged ({what}): run prepare_data.py index on its folder, or remove "
        "that hidden file",
    )


def parse_index(path: Path | str, about: bytes, table: bytes) -> ChunkIndex | None:
    """The ChunkIndex in a stored one; None for another INDEX_FORMAT. Raises DataError where it can't be one."""
    try:
        found = json.loads(about)
        if found["format"] != INDEX_FORMAT:
            return None
        names = ("of_file", "shape", "chunk", "filters")
        of_file, shape, chunk, filters = (tuple(_whole(n) for n in found[name]) for name in names)
        affine = np.array(found["affine"], float)
        notes = tuple(str(note) for note in found["notes"])
        sound = (
            found["type"] == VOXEL.str
            and len(of_file) == 3
            and 0 < of_file[2] <= MOST_HEAD
            and len(shape) == len(chunk) == 3
            and all(1 <= c <= n < 2**31 for c, n in zip(chunk, shape))
            and affine.shape == (4, 4)
            and len(table) == ENTRY.itemsize * math.prod(-(-n // c) for n, c in zip(shape, chunk))
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise damaged_index(path, one_line(error, path)) from error
    if not sound:
        raise damaged_index(path, f"{len(table)} bytes for voxels {found['shape']} in chunks {found['chunk']}")
    return ChunkIndex(of_file, shape, chunk, filters, affine, notes, np.frombuffer(table, ENTRY))


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise TypeError(f"{number!r} is no whole number")
    return number


@functools.cache
def blosc_decompress() -> Callable[[int, int, int, int], int] | None:
    """blosc_decompress_ctx(source address, target address, bytes of the target, threads) -> bytes, from the library
    that HDF5's filter is made with; None where hdf5plugin brings none that can be called."""
    try:
        import hdf5plugin

        library = next(iter(sorted(Path(hdf5plugin.PLUGIN_PATH).glob("*h5blosc.*"))))
        function = ctypes.CDLL(str(library)).blosc_decompress_ctx
    except (ImportError, AttributeError, OSError, StopIteration):
        return None
    function.argtypes, function.restype = (
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        ctypes.c_int,
    )
    return function


class Scratch(threading.local):
    """Memory of a thread that is used again and again: new pages cost more than what is written to them."""

    def __init__(self) -> None:
        self.stored, self.voxels = np.empty(0, np.uint8), np.empty(0, np.uint8)

    def require(self, stored: int, voxels: int) -> None:
        """At least these bytes each."""
        if len(self.stored) < stored:
            self.stored = np.empty(stored, np.uint8)
            self.stored_address = self.stored.ctypes.data
        if len(self.voxels) < voxels:
            self.voxels = np.empty(voxels, np.uint8)
            self.voxels_address = self.voxels.ctypes.data


_scratch = Scratch()


class ChunkReader:
    """Boxes of voxels of an open file."""

    def __init__(self, path: Path | str, descriptor: int, index: ChunkIndex) -> None:
        self.path, self.descriptor, self.index, self.size = path, descriptor, index, index.of_file[0]  # bytes
        self.grid = tuple(-(-n // c) for n, c in zip(index.shape, index.chunk))
        self.table = index.table.reshape(self.grid)
        self.chunk_bytes = VOXEL.itemsize * math.prod(index.chunk)
        self.longest = self.chunk_bytes + self.chunk_bytes // 500 + 64  # bytes of one that a filter made longer

    def take(self, slices: tuple[slice, ...]) -> np.ndarray:
        """The (x, y, z) voxels in three slices, as they are stored."""
        out = np.empty([part.stop - part.start for part in slices[::-1]], VOXEL)
        self._read(slices[::-1], out, np.iinfo(VOXEL).min)
        return out.T

    def fill(self, slices: tuple[slice, ...], out: np.ndarray) -> None:
        """Write the voxels in three slices, not below AIR, into (x, y, z) int16 `out`."""
        self._read(slices[::-1], out.T, AIR)

    def _read(self, slices: tuple[slice, ...], out: np.ndarray, lowest: int) -> None:
        """Write a box of voxels, not below `lowest`. slices, out: (z, y, x)"""
        low, high = [part.start for part in slices], [part.stop for part in slices]
        if not all(0 <= a < b <= n for a, b, n in zip(low, high, self.index.shape)):
            raise ValueError(f"no box of voxels {self.index.shape}: {low} to {high}")
        sides = self.index.chunk
        first = [a // side for a, side in zip(low, sides)]
        last = [-(-b // side) for b, side in zip(high, sides)]
        # [(from in the box, from in the chunk)] of each chunk along each axis
        spans = [
            [
                (slice(max(a, k * n) - a, min(b, k * n + n) - a), slice(max(a - k * n, 0), min(b - k * n, n)))
                for k in range(i, j)
            ]
            for a, b, i, j, n in zip(low, high, first, last, sides)
        ]
        places = itertools.product(*spans)
        for entry, voxels in self.decode(self.table[tuple(map(slice, first, last))].ravel()):
            (z, from_z), (y, from_y), (x, from_x) = next(places)
            part = voxels.reshape(sides)[from_z, from_y, from_x]
            out[z, y, x] = np.maximum(part, lowest) if entry[4] < lowest else part

    def decode(self, table: np.ndarray, new: bool = False) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(entry, its voxels in one row) of each chunk of a table; the next one overwrites them. Raises DataError.

        new: the sums are not known yet, and stand in the entries that this gives
        """
        _scratch.require(LONGEST_RUN + self.longest, self.chunk_bytes)
        for run in self._runs(table):
            stored = self._stored(run)
            for offset, known, size, mask, lowest in run:
                at = offset - run[0][0]
                total = sum_of(stored[at : at + size])
                if total != known and not new:
                    raise self._damaged("its bytes are not those that were written")
                yield (offset, total, size, mask, lowest), self._decoded(stored, at, size, mask)

    def _runs(self, table: np.ndarray) -> list[list[tuple[int, ...]]]:
        """The entries of chunks, those together that follow one another in the file. Raises DataError where they can't
        be in it."""
        ends = table["offset"] + table["size"]
        wrong = (
            (table["size"] > self.longest) | (table["size"] == 0) | (ends > self.size) | (table["offset"] > self.size)
        )
        if (wrong | (table["mask"] > len(self.index.filters))).any():
            raise damaged_index(self.path, f"a chunk that can't be one of a file of {self.size} bytes")
        apart = np.flatnonzero(table["offset"][1:] != ends[:-1]) + 1
        entries, bounds, runs = table.tolist(), [0, *apart.tolist(), len(table)], []
        longest = max(1, LONGEST_RUN // self.longest)
        for begin, end in itertools.pairwise(bounds):
            runs += [entries[at : min(at + longest, end)] for at in range(begin, end, longest)]
        return runs

    def _stored(self, run: list[tuple[int, ...]]) -> memoryview:
        """The bytes of neighbouring chunks as they stand in the file."""
        begin, end = run[0][0], run[-1][0] + run[-1][2]
        stored, done = memoryview(_scratch.stored)[: end - begin], 0
        while done < len(stored):
            count = os.preadv(self.descriptor, [stored[done:]], begin + done)
            if not count:
                raise DataError(self.path, f"can't be read: it ends at byte {begin + done}, within its voxels")
            done += count
        return stored

    def _decoded(self, stored: memoryview, at: int, size: int, mask: int) -> np.ndarray:
        """The voxels of a chunk, which stands `at` these bytes. The next call overwrites them."""
        raw = stored[at : at + size]
        if not self.index.filters or mask == 1:  # HDF5 leaves a filter out where it would not make a chunk smaller
            if size != self.chunk_bytes:
                raise self._damaged(f"{size} bytes, expected {self.chunk_bytes}")
            return np.frombuffer(raw, VOXEL)
        if BLOSC in self.index.filters:
            if size < BLOSC_HEADER.size or BLOSC_HEADER.unpack_from(raw)[4::2] != (self.chunk_bytes, size):
                raise self._damaged("another size in its header than it has")
            source, target = _scratch.stored_address + at, _scratch.voxels_address
            count = blosc_decompress()(source, target, self.chunk_bytes, 1)
            if count != self.chunk_bytes:
                raise self._damaged(f"Blosc gives {count} bytes, expected {self.chunk_bytes}")
            return np.frombuffer(_scratch.voxels, VOXEL, self.chunk_bytes // VOXEL.itemsize)
        inflate = zlib.decompressobj()
        try:
            voxels = inflate.decompress(raw, self.chunk_bytes)
        except zlib.error as error:
            raise self._damaged(str(error)) from error
        if len(voxels) != self.chunk_bytes:
            raise self._damaged(f"{len(voxels)} bytes, expected {self.chunk_bytes}")
        return np.frombuffer(voxels, VOXEL)

    def _damaged(self, what: str) -> DataError:
        return DataError(
            self.path,
            f"can't be read: a chunk of its voxels is damaged ({what}): copy or convert the file again or, where "
            f"something has changed it since, remove {index_path(self.path).name} and run prepare_data.py index",
        )
