"""One CT on disk: an HDF5 or NIfTI file, read and written in RAS.

Volumes are (X, Y, Z) arrays of int16 Hounsfield units in RAS: indices grow towards the patient's right, anterior and
superior side. Affines are 4 x 4, from voxel indices to RAS millimetres. Files may lie in any orientation: what is
read from them is flipped and its axes swapped (never interpolated) to the nearest RAS axes.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import h5py
import hdf5plugin
import numpy as np

from dino3d.data.read_watchdog import reading
from dino3d.files import atomic_write

AIR = -1024  # HU; what lies outside a volume, and the floor for padding values of -2000 to -3024
SUFFIXES = (".hdf5", ".h5", ".nii", ".nii.gz")  # what Volume reads
VOLUME_SUFFIXES = (*SUFFIXES, ".mhd", ".mha", ".nrrd", ".nhdr")  # what dino3d/data/images.py reads
CHUNK = 32  # voxels per side of a chunk: a random crop then touches few bytes besides its own
FILTERS = {
    "blosc": lambda: hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=hdf5plugin.Blosc.BITSHUFFLE),
    "gzip": lambda: {"compression": "gzip", "compression_opts": 4},
    "none": dict,
}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world has x and y the other way round


class DataError(Exception):
    """A file that can't be used: which, what was found in it and what was expected."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


class Volume:
    """A volume on disk in RAS, of which parts can be read; a context manager that closes the file.

    shape: (3,) voxels; spacing: (3,) mm; affine: (4, 4). Raises DataError where the file is no 3D image.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._closing = contextlib.ExitStack()
        try:
            opener = _open_hdf5 if is_hdf5(path) else _open_nifti
            with reading(path):
                shape, affine, self._take = opener(path, self._closing)
            self._orient(shape, affine)
        except DataError:
            self.close()
            raise
        except Exception as error:  # the libraries raise many kinds for a broken file
            self.close()
            raise DataError(path, f"can't be read ({_first_line(error)})") from error

    def _orient(self, shape: tuple[int, ...], affine: np.ndarray) -> None:
        from nibabel.orientations import inv_ornt_aff, io_orientation

        if len(shape) != 3:
            raise DataError(self.path, f"is a {len(shape)}D image of shape {tuple(shape)}, expected a 3D volume")
        if min(shape) < 1:
            raise DataError(self.path, f"is empty: shape {tuple(shape)}")
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise DataError(self.path, "has spacings and directions that span no volume")
        orientation = io_orientation(affine)  # (3, 2): the RAS axis of each axis of the file, and its sign
        self._axes = np.argsort(orientation[:, 0])  # (3,): the file's axis for each RAS axis
        self._signs = orientation[self._axes, 1]
        self.shape = tuple(int(shape[axis]) for axis in self._axes)
        self.affine = affine @ inv_ornt_aff(orientation, shape)
        self.spacing = tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def read(
        self, start: Sequence[int] | np.ndarray = (0, 0, 0), size: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """(x, y, z) int16 HU from `start` on; what lies outside the volume is air. Default: all of it."""
        return padded(self._read_inside, self.shape, start, self.shape if size is None else size)

    def read_values(self) -> np.ndarray:
        """(X, Y, Z) numbers as they are stored, of whatever type. Raises DataError where they are none."""
        voxels = self._take_oriented(np.zeros(3, int), np.array(self.shape))
        if voxels.dtype.kind not in "iuf":
            raise DataError(self.path, f"has voxels of type {voxels.dtype}, expected numbers")
        return voxels

    def read_labels(self) -> np.ndarray:
        """(X, Y, Z) uint8 classes of a mask. Raises DataError for values that are no whole numbers from 0 to 255."""
        voxels = self.read_values()
        found = np.unique(voxels)
        if not ((found >= 0) & (found <= 255) & (found == np.floor(found))).all():
            wrong = [f"{value:g}" for value in found if not (0 <= value <= 255 and value == np.floor(value))][:3]
            raise DataError(
                self.path, f"has label values such as {', '.join(wrong)}, expected whole numbers from 0 to 255"
            )
        return voxels.astype(np.uint8)

    def _read_inside(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        voxels = to_int16(self._take_oriented(low, high), self.path)
        # In place unless the array is a file's or flipped
        in_place = type(voxels) is np.ndarray and voxels.flags.writeable and min(voxels.strides) > 0
        return np.maximum(voxels, AIR, out=voxels if in_place else None)

    def _take_oriented(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        slices = [None] * 3
        for axis, sign, n, a, b in zip(self._axes, self._signs, self.shape, low, high):
            slices[axis] = slice(int(a), int(b)) if sign > 0 else slice(int(n - b), int(n - a))
        try:
            with reading(self.path):
                voxels = self._take(tuple(slices))
        except Exception as error:
            raise DataError(self.path, f"can't be read ({_first_line(error)})") from error
        flips = tuple(slice(None, None, int(sign)) for sign in self._signs)
        return voxels.transpose(self._axes)[flips]

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


def stem(path: str | Path) -> str:
    """Name of a volume's file without folders and suffix: scan for a/scan.nii.gz."""
    name = os.path.basename(path)
    longest_first = sorted(VOLUME_SUFFIXES, key=len, reverse=True)
    return next((name[: -len(suffix)] for suffix in longest_first if name.lower().endswith(suffix)), name)


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


def is_hdf5(path: Path | str) -> bool:
    """Whether a file is HDF5, by its suffix."""
    return str(path).lower().endswith((".hdf5", ".h5"))


def _open_hdf5(
    path: Path | str, closing: contextlib.ExitStack
) -> tuple[tuple[int, ...], np.ndarray, Callable[..., np.ndarray]]:
    """(shape, affine, take) in the file's own axis order (x, y, z); take(three slices) gives an array."""
    file = closing.enter_context(h5py.File(path, "r", locking=False))  # read-only: no lock, which NFS may refuse
    names = ("VoxelData", "Spacing", "Origin", "Directions")
    image = file.get("ITKImage/0")
    missing = [name for name in names if image is None or name not in image]
    if missing:
        raise DataError(path, f"has no ITKImage/0/{missing[0]}: not an ITK HDF5 image")
    voxels, spacing, origin, directions = (image[name] for name in names)
    if voxels.ndim != 3 or spacing.shape != (3,) or origin.shape != (3,) or directions.shape != (3, 3):
        raise DataError(
            path,
            f"has {spacing.size} spacings and voxels of shape {voxels.shape} (z, y, x), expected a 3D "
            "volume with one value per voxel",
        )
    affine = np.eye(4)
    affine[:3, :3] = directions[()].T * spacing[()]  # the rows of Directions are the axis vectors
    affine[:3, 3] = origin[()]
    return voxels.shape[::-1], LPS @ affine, lambda slices: voxels[slices[::-1]].T


def _open_nifti(
    path: Path | str, closing: contextlib.ExitStack
) -> tuple[tuple[int, ...], np.ndarray, Callable[..., np.ndarray]]:
    import nibabel

    image = nibabel.load(path)
    return image.shape, image.affine, lambda slices: np.asanyarray(image.dataobj[slices])


def to_int16(voxels: np.ndarray, path: Path | str) -> np.ndarray:
    """An array of numbers, rounded and clamped to int16; itself if it is. Raises DataError for NaN or other types."""
    if voxels.dtype == np.int16:
        return voxels
    if voxels.dtype.kind not in "iuf":
        raise DataError(path, f"has voxels of type {voxels.dtype}, expected numbers")
    if voxels.dtype.kind == "f":
        if not np.isfinite(voxels).all():
            raise DataError(path, "has voxels that are NaN or infinite")
        voxels = np.rint(voxels)
    return np.clip(voxels, -32768, 32767).astype(np.int16)


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # libraries put paths and much else around it
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def write_volume(path: Path | str, volume: np.ndarray, affine: np.ndarray, compression: str = "blosc") -> None:
    """Write an ITK HDF5 file in chunks made for random crops, under a temporary name until it is whole.

    volume: (X, Y, Z) int16 HU; affine: (4, 4) to RAS mm, whose axes must be orthogonal (ITK stores no shear).
    compression: "blosc" (LZ4 with bitshuffle: fastest, opens wherever hdf5plugin is installed), or "gzip" or "none"
    for files that ITK itself must open. Raises ValueError for a volume or affine of another kind, OSError.
    """
    volume, affine = np.asarray(volume), np.asarray(affine, float)
    if volume.dtype != np.int16 or volume.ndim != 3 or not volume.size:
        raise ValueError(f"{path}: can't write a {volume.ndim}D {volume.dtype} array {volume.shape}, expected 3D int16")
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (spacing > 0).all():
        raise ValueError(f"{path}: the affine {affine.tolist()} has an axis without length")
    directions = (lps[:3, :3] / spacing).T
    if not np.allclose(directions @ directions.T, np.eye(3), atol=1e-3):
        raise ValueError(f"{path}: the axes of the affine are not orthogonal, which ITK images can't store")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.ascontiguousarray(volume.T)  # (z, y, x)
    # In memory first: on a full disk plain writing raises OSError, which the HDF5 library can't be trusted to do
    with h5py.File(path, "w", driver="core", backing_store=False) as file:
        file["ITKVersion"], file["HDFVersion"] = ["5.4"], [f"HDF5 library version: {h5py.version.hdf5_version}"]
        image = file.create_group("ITKImage/0")
        image["Dimension"] = np.array(volume.shape, np.uint64)
        image["Directions"], image["Origin"], image["Spacing"] = directions, lps[:3, 3], spacing
        image["VoxelType"] = ["SHORT"]
        image.create_group("MetaData")
        image.create_dataset(
            "VoxelData", data=voxels, chunks=tuple(min(CHUNK, n) for n in voxels.shape), **FILTERS[compression]()
        )
        file.flush()
        with atomic_write(path) as part:
            part.write_bytes(file.id.get_file_image())
