"""What all of the data path agrees on: axes, units, air, names of files, and errors.

Volumes are (X, Y, Z) arrays of int16 Hounsfield units in RAS: indices grow towards the patient's right, anterior and
superior side. Affines are 4 x 4, from voxel indices to RAS millimetres.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

AIR = -1024  # HU; what lies outside a volume, and the floor for padding values of -2000 to -3024
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's and DICOM's world has x and y the other way round
HDF5_SUFFIXES = (".hdf5", ".h5")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".mhd", ".mha", ".nrrd", ".nhdr")  # MetaImage and NRRD
VOLUME_SUFFIXES = (*HDF5_SUFFIXES, *NIFTI_SUFFIXES, *ITK_SUFFIXES)  # a file is a volume


class DataError(Exception):
    """A file that can't be used: which, what was found in it and what was expected."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # to other processes
        return type(self), (self.path, self.reason)


class LeftOut(DataError):
    """A file or series that is sound, but not what is wanted: a scout, another modality, a series with a gap."""


class Stored(NamedTuple):
    """What a file holds, in its own order of the axes.

    shape: (3,) voxels; affine: (4, 4) to RAS mm; take: gives the array of three slices, HU of whatever type
    notes: lines on what can be read in two ways, and which was taken; converted: whether `write_volume` wrote it
    fill: where a file can be read so, writes the HU in three slices, not below AIR, into an (x, y, z) int16 array
    slow: why a file that `write_volume` wrote is read through the HDF5 library all the same
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    take: Callable[[tuple[slice, ...]], np.ndarray]
    notes: tuple[str, ...] = ()
    converted: bool = False
    fill: Callable[[tuple[slice, ...], np.ndarray], None] | None = None
    slow: str = ""


def swap_lps_ras(point: Sequence[float]) -> tuple[float, ...]:
    """(3,) mm of a point in LPS as RAS has them, or the other way round."""
    x, y, z = point
    return -x, -y, z


def is_kind(path: Path | str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is of a kind, by its suffix in any case."""
    return os.fspath(path).lower().endswith(suffixes)


def stem(path: str | Path) -> str:
    """Name of a volume's file without folders and suffix: scan for a/scan.nii.gz."""
    name = os.path.basename(path)
    longest_first = sorted(VOLUME_SUFFIXES, key=len, reverse=True)
    return next((name[: -len(suffix)] for suffix in longest_first if name.lower().endswith(suffix)), name)


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


def format_size(values: Iterable[float]) -> str:
    """Numbers as text: 3 x 4 x 5."""
    return " x ".join(f"{value:g}" for value in values)


def one_line(error: Exception | str, path: Path | str) -> str:
    """What a library says of a file, in one line without memory addresses, source files and the way to the file."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # libraries put paths and much else around it
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "ERROR:" in line]
    text = told[-1].split("ERROR:")[-1] if told else " ".join(lines) or type(error).__name__
    text = re.sub(r"\(0x[0-9a-f]+\)", "", text).replace(str(Path(path).parent) + os.sep, "")
    return text.strip(" :")[:200]
