"""One CT on disk, of any kind that is read here, in RAS.

Volumes are (X, Y, Z) arrays of int16 Hounsfield units in RAS: indices grow towards the patient's right, anterior and
superior side. Affines are 4 x 4, from voxel indices to RAS millimetres. Files may lie in any orientation: what is
read from them is flipped and its axes swapped (never interpolated) to the nearest RAS axes. This is the one reader:
conversion, training, check and prediction see the same voxels in the same places.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from dino3d.data.chunks import open_indexed
from dino3d.data.conventions import (
    AIR,
    HDF5_SUFFIXES,
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    VOLUME_SUFFIXES,
    DataError,
    Stored,
    is_kind,
    one_line,
    to_int16,
)
from dino3d.data.dicom_series import open_series
from dino3d.data.geometry import orientation_of, ras_affine, require_geometry
from dino3d.data.hdf5 import CHUNK, open_hdf5, write_volume
from dino3d.data.itk import open_itk
from dino3d.data.nifti import open_nifti, save_nifti, save_nifti_like
from dino3d.data.read_watchdog import reading
from dino3d.files import atomic_write

__all__ = ["DataError", "Volume", "padded", "to_classes", "write_volume"]  # what others import from here


class Volume:
    """A volume on disk in RAS, of which parts can be read; a context manager that closes the file.

    path: HDF5, NIfTI, MetaImage or NRRD; a folder with one DICOM series, or <folder>#<SeriesInstanceUID>
    stored: what the path stands for, if it is open already
    indexed: whether the index of an HDF5 file's chunks is used where there is one
    shape: (3,) voxels; spacing: (3,) mm; affine: (4, 4); notes: lines on what can be read in two ways
    converted: whether it is a file of `write_volume`, as conversions leave them
    slow: why such a file is read through the HDF5 library instead of by the index of its chunks, "" where it is not
    file_shape, file_affine: of the voxels in the file's own order of the axes
    Raises DataError where the file is no 3D image.
    """

    def __init__(self, path: Path | str, stored: Stored | None = None, indexed: bool = True) -> None:
        self.path = path
        self._closing = contextlib.ExitStack()
        try:
            with reading(path):
                stored = stored or _open(path, self._closing, indexed)
            self._take, self._fill, self.notes, self.converted = (
                stored.take,
                stored.fill,
                stored.notes,
                stored.converted,
            )
            self.slow = stored.slow
            self.file_shape = tuple(int(n) for n in stored.shape)
            self.file_affine = require_geometry(path, self.file_shape, stored.affine)
        except DataError:
            self.close()
            raise
        except Exception as error:  # the libraries raise many kinds for a broken file
            self.close()
            raise DataError(path, f"can't be read ({one_line(error, path)})") from error
        self._axes, self._signs = orientation_of(self.file_affine)
        self.shape = tuple(self.file_shape[axis] for axis in self._axes)
        self.affine = ras_affine(self.file_shape, self.file_affine, self._axes, self._signs)
        self.spacing = tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def read(
        self, start: Sequence[int] | np.ndarray = (0, 0, 0), size: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """(x, y, z) int16 HU from `start` on; what lies outside the volume is air. Default: all of it."""
        size = self.shape if size is None else size
        if self._fill is None:
            return padded(self._read_inside, self.shape, start, size)
        box = np.empty([size[axis] for axis in np.argsort(self._axes)], np.int16, order="F").transpose(self._axes)
        self.read_into(box, start)
        return box

    def read_into(self, out: np.ndarray, start: Sequence[int] | np.ndarray) -> None:
        """Write (x, y, z) int16 HU from `start` on into `out`; what lies outside the volume is air."""
        if self._fill is None:
            out[...] = self.read(start, out.shape)
            return
        start = np.asarray(start)
        low, high = np.clip(start, 0, self.shape), np.clip(start + out.shape, 0, self.shape)
        inside = tuple(slice(max(0, a), max(0, b)) for a, b in zip(low - start, high - start))
        empty = (high <= low).any()
        if empty or out[inside].shape != out.shape:
            out[...] = AIR
        if not empty:
            with self._reading():
                self._fill(self._slices(low, high), self.in_file_order(out[inside]))

    def read_values(self) -> np.ndarray:
        """(X, Y, Z) numbers as they are stored, of whatever type. Raises DataError where they are none."""
        voxels = self._take_oriented(np.zeros(3, int), np.array(self.shape))
        if voxels.dtype.kind not in "iuf":
            raise DataError(self.path, f"has voxels of type {voxels.dtype}, expected numbers")
        return voxels

    def read_labels(self, classes: Sequence[int] | None = None) -> np.ndarray:
        """(X, Y, Z) uint8 classes of a mask; see `to_classes`. Raises DataError."""
        return to_classes(self.read_values(), self.path, classes)

    def _read_inside(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        voxels = to_int16(self._take_oriented(low, high), self.path)
        # In place unless the array is a file's or flipped
        in_place = type(voxels) is np.ndarray and voxels.flags.writeable and min(voxels.strides) > 0
        return np.maximum(voxels, AIR, out=voxels if in_place else None)

    def _take_oriented(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        with self._reading():
            voxels = self._take(self._slices(low, high))
        flips = tuple(slice(None, None, int(sign)) for sign in self._signs)
        return voxels.transpose(self._axes)[flips]

    def _slices(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, ...]:
        """What lies between (3,) voxels low and high, in the file's own order of the axes."""
        slices = [None] * 3
        for axis, sign, n, a, b in zip(self._axes, self._signs, self.shape, low, high):
            slices[axis] = slice(int(a), int(b)) if sign > 0 else slice(int(n - b), int(n - a))
        return tuple(slices)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with reading(self.path):
                yield
        except DataError:
            raise
        except Exception as error:
            raise DataError(self.path, f"can't be read ({one_line(error, self.path)})") from error

    def in_file_order(self, voxels: np.ndarray) -> np.ndarray:
        """An (X, Y, Z) array on this volume's voxels in the file's own order of the axes."""
        flips = tuple(slice(None, None, int(sign)) for sign in self._signs)
        return voxels[flips].transpose(np.argsort(self._axes))

    def save_mask(self, path: Path | str, mask: np.ndarray) -> None:
        """Write (X, Y, Z) uint8 classes on this volume's voxels, see `save_map`."""
        self.save_map(path, mask)

    def save_map(self, path: Path | str, values: np.ndarray, slope: float = 1.0) -> None:
        """Write an (X, Y, Z) array on this volume's voxels as NIfTI that lies on its scan in every viewer.

        path: ends in .nii.gz or .nii. The file's own order of the axes is kept and, where it is NIfTI, its header.
        values: whole numbers, which readers multiply by `slope`, or colours of the type `nifti.RGB`. Raises OSError.
        """
        voxels = self.in_file_order(values)
        with atomic_write(path) as part:
            if is_kind(self.path, NIFTI_SUFFIXES):
                save_nifti_like(part, voxels, self.path, slope)
            else:
                save_nifti(part, voxels, self.file_affine, slope)

    def is_constant(self) -> bool:
        """True if all voxels are equal: such a file holds no image. Reads until it sees a second value."""
        first = self.read(size=(1, 1, 1)).item()
        return all(
            (self.read((0, 0, z), (*self.shape[:2], min(CHUNK, self.shape[2] - z))) == first).all()
            for z in range(0, self.shape[2], CHUNK)
        )

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path | str, closing: contextlib.ExitStack, indexed: bool) -> Stored:
    """What a file holds, by its suffix, or a DICOM series."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if "#" in os.fspath(path):
            return open_series(path, closing)
        raise DataError(path, "can't be read: no such file") from None
    if stat.S_ISDIR(status.st_mode):
        return open_series(path, closing)
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise DataError(path, "can't be read: the file is empty")
    if is_kind(path, HDF5_SUFFIXES):
        found = open_indexed(path, closing) if indexed else ""
        if isinstance(found, Stored):
            return found
        stored = open_hdf5(path, closing)
        return stored._replace(slow=found if stored.converted else "")
    if is_kind(path, NIFTI_SUFFIXES):
        return open_nifti(path)
    if is_kind(path, ITK_SUFFIXES):
        return open_itk(path)
    raise DataError(path, f"is of no kind that is read here: expected {', '.join(VOLUME_SUFFIXES)}")


def to_classes(voxels: np.ndarray, path: Path | str, classes: Sequence[int] | None = None) -> np.ndarray:
    """uint8 classes of a mask's numbers, which may miss whole ones by the precision of a float32.

    Raises DataError for other values than whole numbers from 0 to 255, or than `classes` if those are given.
    """
    found = np.unique(voxels)
    finite = np.isfinite(found)
    whole = np.rint(np.where(finite, found, -1))
    allowed = np.arange(256) if classes is None else np.array(sorted(classes))
    # A float32 of a class such as 255 is exact to 2e-5; a rescale slope of a file adds as much again
    wrong = found[~(np.isin(whole, allowed) & (np.abs(np.where(finite, found, -2) - whole) <= 1e-4))]
    if len(wrong):
        expected = "whole numbers from 0 to 255" if classes is None else "only " + ", ".join(map(str, allowed))
        told = ", ".join(np.format_float_positional(value, trim="-") for value in wrong[:3])
        raise DataError(path, f"has label values such as {told}, expected {expected}")
    return (np.rint(voxels) if voxels.dtype.kind == "f" else voxels).astype(np.uint8)


def padded(
    read_inside: Callable[[np.ndarray, np.ndarray], np.ndarray],
    shape: Sequence[int],
    start: Sequence[int] | np.ndarray,
    size: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """(x, y, z) int16 box of a volume from `start` on, air where it reaches beyond.

    read_inside: gives what lies between (3,) voxels low and high of a volume of this shape
    """
    start, size = np.asarray(start), np.asarray(size)
    low, high = np.clip(start, 0, shape), np.clip(start + size, 0, shape)
    if (high <= low).any():
        return np.full(size, AIR, np.int16)
    inside = read_inside(low, high)
    if (inside.shape == size).all():
        return inside
    box = np.full(size, AIR, np.int16)
    box[tuple(slice(a, b) for a, b in zip(low - start, high - start))] = inside
    return box
