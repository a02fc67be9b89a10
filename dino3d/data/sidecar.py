"""The hidden file beside a volume's, `.NAME.index.npz`: what is looked up of the volume without reading it.

It holds where body and lung lie (dino3d/data/foreground.py) and where the chunks of an HDF5 file are
(dino3d/data/chunks.py), and by which bytes the volume's file is known again.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dino3d.files import atomic_write

SPOT = 4096  # bytes at a file's start, middle and end, by which it is known again
# What NumPy, h5py and zipfile raise for a file that is not there, cut off or something else, whose sizes may be any
DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    EOFError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def index_path(path: Path | str) -> Path:
    """The hidden file beside a volume's."""
    folder, name = os.path.split(os.fspath(path))
    return Path(folder, f".{name}.index.npz")


def identity_of(file: BinaryIO, head: int = SPOT) -> list[int]:
    """[size of an open file, checksum of its first `head` bytes and of SPOT bytes in its middle and at its end, head]:
    what a copy has too and what replaces it not."""
    size, code = os.fstat(file.fileno()).st_size, 0
    for at, count in ((0, head), (size // 2, SPOT), (max(size - SPOT, 0), SPOT)):
        file.seek(at)
        code = zlib.crc32(file.read(count), code)
    return [size, code, head]


def write_sidecar(
    path: Path | str,
    identity: list[int],
    arrays: Mapping[str, np.ndarray],
    members: Mapping[str, bytes],
    folder: Path | None = None,
) -> None:
    """Write the file beside a volume's, whole or not at all. Raises OSError.

    identity: of the volume's file; arrays: compressed; members: stored as they are, so that they are read quickly;
    folder: where it lies until it is whole, see `atomic_write`
    """
    with atomic_write(index_path(path), folder, sync=True) as part:
        np.savez_compressed(part, of_file=np.array(identity[:2], np.int64), **arrays)
        with zipfile.ZipFile(part, "a") as file:
            for name, content in members.items():
                file.writestr(zipfile.ZipInfo(name), content)  # without today's date: the same volume, the same bytes


def read_arrays(path: Path | str, identity: list[int]) -> dict[str, np.ndarray]:
    """{name: array} in the file beside a volume's; {} where it is of another one. Raises DAMAGED."""
    with open(index_path(path), "rb") as stream, np.load(stream) as file:  # NumPy by itself leaves a damaged one open
        same = file["of_file"].tolist() == identity[:2]
        return {name: file[name] for name in file.files if name not in MEMBERS} if same else {}


MEMBERS = ("chunks.json", "chunks.bin")  # see dino3d/data/chunks.py


def indexed_chunks(path: Path | str) -> tuple[bytes, bytes] | None:
    """The MEMBERS of the file beside a volume's; None where it has none. Raises DAMAGED, also where a checksum of the
    zip is wrong."""
    with open(index_path(path), "rb") as stream, zipfile.ZipFile(io.BytesIO(stream.read())) as file:
        if not set(MEMBERS) <= set(file.namelist()):
            return None
        if any(file.getinfo(name).compress_type != zipfile.ZIP_STORED for name in MEMBERS):  # may unpack to any size
            raise zipfile.BadZipFile("compressed where it should not be")
        return tuple(map(file.read, MEMBERS))
