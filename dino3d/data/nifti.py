"""NIfTI files: their geometry as nibabel reads it, their voxels, and masks that lie on a scan in every viewer.

A header can say where the voxels lie in up to three ways: the sform, the qform, and pixdim alone. nibabel's order
counts: the sform if its code is above 0, else the qform if its is, else pixdim.
"""

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dino3d.data.conventions import DataError, Stored, format_size, is_kind
from dino3d.data.geometry import corners_apart, is_apart

XYZT_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # mm per unit of the lower bits of xyzt_units; 0: not known
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])  # colours: RGB24 of NIfTI


def open_nifti(path: Path | str) -> Stored:
    """The Stored of a NIfTI-1 or NIfTI-2 file in millimetres, without trailing axes of one voxel. Raises DataError."""
    import nibabel

    nibabel.imageglobals.logger.setLevel(logging.CRITICAL)  # it names no file; what matters is told as a note
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):  # Nifti2Pair is one too
        raise DataError(path, f"is a {type(image).__name__}, expected NIfTI")
    shape = tuple(int(n) for n in image.shape)
    extra = max(len(shape) - 3, 0)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise DataError(path, f"is a {len(shape)}D image of {format_size(shape)} voxels, expected a 3D volume")
    if image.header.get_data_dtype().kind not in "iuf":
        raise DataError(path, f"has voxels of type {image.header.get_data_dtype()}, expected numbers")
    if (unit := int(image.header["xyzt_units"]) % 8) not in XYZT_UNITS:
        raise DataError(path, f"has lengths in the unit {unit} of xyzt_units, expected 1 (m), 2 (mm) or 3 (um)")
    with nibabel.openers.ImageOpener(path) as file:
        stored = type(image.header).from_fileobj(file, check=False)  # nibabel puts other values in place of wrong ones
    if image.header["sform_code"] <= 0 and not stored["pixdim"][1:4].all():
        told = format_size(stored["pixdim"][1:4])
        raise DataError(path, f"has pixdim {told} in its header: the size of its voxels is not known")
    codes = [(name, int(stored[name])) for name in ("sform_code", "qform_code") if stored[name] != image.header[name]]
    affine, notes = geometry_of(image, shape[:3])
    notes = (*(f"its {name} is {code}, which is none: 0 was taken" for name, code in codes), *notes)
    if stored["scl_slope"] == 0 and np.isfinite(stored["scl_inter"]) and stored["scl_inter"]:
        notes += (f"its scl_inter {stored['scl_inter']:g} stands beside a scl_slope of 0 and was not applied",)

    def take(slices: tuple[slice, ...]) -> np.ndarray:
        whole = all(part.indices(n)[:2] == (0, n) for part, n in zip(slices, shape))
        if whole and is_kind(path, (".gz",)):  # to its end, where the checksum is
            held = type(image).from_bytes(b"".join(inflated(path)))
            return np.asanyarray(held.dataobj).reshape(shape[:3])
        return np.asanyarray(image.dataobj[(*slices, *[0] * extra)])

    return Stored(shape[:3], affine, take, notes)


def geometry_of(image: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """((4, 4) affine to RAS mm, notes) of a nibabel image: where its header can be read in two ways, a note says so."""
    header, notes = image.header, []
    scale = np.diag([*[XYZT_UNITS[int(header["xyzt_units"]) % 8]] * 3, 1.0])
    affine = scale @ image.affine
    by_sform, by_qform = int(header["sform_code"]), int(header["qform_code"])
    if not (by_sform or by_qform):
        notes.append(
            "its header declares no orientation (sform_code and qform_code 0): its axes were taken to go to the "
            "patient's left, anterior and superior side"
        )
    other, name = None, ""
    if by_sform and by_qform:
        name = "qform"
        try:
            other = scale @ header.get_qform()
        except Exception:  # nibabel raises several kinds for numbers that are no rotation
            notes.append("its qform is none: the sform was taken")
    elif by_sform:
        name, other = "pixdim", affine.copy()
        with np.errstate(invalid="ignore", divide="ignore"):  # an axis without length is refused later
            other[:3, :3] *= scale[0, 0] * header["pixdim"][1:4] / np.linalg.norm(affine[:3, :3], axis=0)
    if other is not None and np.isfinite(affine).all() and is_apart(shape, affine, other):
        apart = corners_apart(shape, affine, other)
        notes.append(f"its {name} and sform put its corners up to {apart:.3g} mm apart: the sform was taken")
    return affine, tuple(notes)


def inflated(path: Path | str, start: int = 0) -> Iterator[bytes]:
    """What a gzip or zlib stream of a file holds from byte `start` on, checked against its checksum.

    Raises EOFError where it is cut off, zlib.error where it is damaged.
    """
    stream = zlib.decompressobj(47)  # 47: zlib or gzip
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := stream.unused_data or file.read(1 << 20):
            if stream.eof:
                if not chunk.startswith(b"\x1f\x8b"):  # no further part of a gzip file
                    return
                stream = zlib.decompressobj(47)
            yield stream.decompress(chunk)
    if not stream.eof:
        raise EOFError("its compressed voxels are cut off")


def save_nifti(path: Path | str, voxels: np.ndarray, affine: np.ndarray, slope: float = 1.0) -> None:
    """Write an (X, Y, Z) array as NIfTI in scanner coordinates; the same array gives the same bytes.

    affine: (4, 4) to RAS mm; slope: what a reader multiplies the voxels by. Raises OSError.
    """
    import nibabel

    nifti = nibabel.Nifti1Image(np.asfortranarray(voxels), affine)
    nifti.set_qform(affine, 1)
    nifti.set_sform(affine, 1)
    nifti.header.set_xyzt_units("mm")
    if slope != 1:
        nifti.header.set_slope_inter(slope, 0)
    nibabel.save(nifti, path)


def save_nifti_like(path: Path | str, voxels: np.ndarray, like: Path | str, slope: float = 1.0) -> None:
    """Write an (X, Y, Z) array with the header of the NIfTI file `like`, in whose order of the axes it is.

    Both forms of its geometry, their codes and its unit stand as they were; slope: what a reader multiplies the voxels
    by. Raises OSError.
    """
    import nibabel

    try:
        scan = nibabel.load(like)
    except Exception as error:  # nibabel raises many kinds
        raise OSError(f"{like}: can't be read any more ({error})") from error
    if scan.shape[:3] != voxels.shape:
        raise OSError(f"{like}: has changed since it was read: shape {scan.shape}, expected {voxels.shape}")
    header = scan.header.copy()
    header.extensions.clear()  # may name the patient
    header.set_data_dtype(voxels.dtype)
    header["cal_min"] = header["cal_max"] = 0  # a window for HU would hide other values
    nifti = type(scan)(np.asfortranarray(voxels), scan.affine, header)
    if slope != 1:
        nifti.header.set_slope_inter(slope, 0)
    nibabel.save(nifti, path)
