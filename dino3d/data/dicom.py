"""DICOM: what the headers of slices say, how they form a series, and its voxels.

SimpleITK reads the voxels. pydicom reads the headers by which slices are told apart and checked: 4 kB of a file, where
SimpleITK reads all of it, more than twice.
"""

import collections
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from dino3d.data.conventions import AIR, DataError, LeftOut, format_size, one_line, to_int16
from dino3d.data.itk import quietly

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"  # SOP classes
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DICOMDIR = "1.2.840.10008.1.3.10"


class Slice(NamedTuple):
    """What the header of a DICOM file says; empty strings and None where it says nothing. Lengths in mm, LPS."""

    path: str
    patient: str
    study: str
    date: str
    series: str
    sop_class: str
    modality: str
    image_type: str
    samples: int  # values per pixel
    frames: int
    size: tuple[int, int]  # (columns, rows)
    spacing: tuple[float, ...]  # (between rows, between columns)
    orientation: tuple[float, ...]  # (6,) unit vectors along a row and along a column
    position: tuple[float, ...]  # (3,) centre of the first pixel
    rescale: tuple[float, ...]  # (slope, intercept)
    thickness: float
    kernel: str


def is_dicom(path: str) -> bool:
    """Whether a file is DICOM by its mark, or by its suffix, since old files lack the mark."""
    if path.lower().endswith(DICOM_SUFFIXES):
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path: str) -> Slice | None:
    """The Slice that a DICOM file is; None for a DICOMDIR. Raises DataError."""
    import pydicom

    tags = [
        "SOPClassUID",
        "PatientID",
        "StudyInstanceUID",
        "StudyDate",
        "SeriesInstanceUID",
        "Modality",
        "ImageType",
        "SamplesPerPixel",
        "NumberOfFrames",
        "Columns",
        "Rows",
        "PixelSpacing",
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "RescaleSlope",
        "RescaleIntercept",
        "SliceThickness",
        "ConvolutionKernel",
    ]
    try:
        if os.path.getsize(path) == 0:
            raise DataError(path, "can't be read: the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # many archives break DICOM's rules for values
            return _slice_of(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True), path)
    except DataError:
        raise
    except Exception as error:  # pydicom raises many kinds for a broken file
        raise DataError(path, f"can't be read: {one_line(error, path)}") from error


def _slice_of(header: Any, path: str) -> Slice | None:
    if header.get("SOPClassUID") is None:
        media = header.file_meta.get("MediaStorageSOPClassUID") if hasattr(header, "file_meta") else None
        if media == DICOMDIR:
            return None
        raise DataError(path, "can't be read: no DICOM file, or its header is cut off")

    def text(tag: str) -> str:
        value = header.get(tag)
        several = not isinstance(value, (str, bytes)) and hasattr(value, "__iter__")
        return "\\".join(map(str, value)) if several else str("" if value is None else value).strip()

    def numbers(value: str, count: int) -> tuple[float, ...]:  # () for anything else than so many numbers
        try:
            values = tuple(map(float, value.split("\\")))
        except ValueError:
            return ()
        return values if len(values) == count and np.isfinite(values).all() else ()

    kind, columns, rows = text("SOPClassUID"), header.get("Columns"), header.get("Rows")
    if kind == DICOMDIR:
        return None
    if kind == CT_IMAGE and not (columns and rows):
        raise DataError(path, "can't be read: its header is cut off, or lacks the image's size")
    slope, intercept = text("RescaleSlope") or "1", text("RescaleIntercept") or "0"
    rescale = numbers(slope, 1) + numbers(intercept, 1)
    if len(rescale) < 2:
        raise DataError(path, f"can't be read: its rescale slope is {slope!r:.40}, its intercept {intercept!r:.40}")
    return Slice(
        path,
        text("PatientID"),
        text("StudyInstanceUID"),
        text("StudyDate"),
        text("SeriesInstanceUID"),
        kind,
        text("Modality"),
        text("ImageType"),
        int(header.get("SamplesPerPixel") or 1),
        int(header.get("NumberOfFrames") or 1),
        (int(columns or 0), int(rows or 0)),
        numbers(text("PixelSpacing"), 2),
        numbers(text("ImageOrientationPatient"), 6),
        numbers(text("ImagePositionPatient"), 3),
        rescale,
        (numbers(text("SliceThickness"), 1) or (0.0,))[0],
        text("ConvolutionKernel"),
    )


def sort_slices(slices: Sequence[Slice], min_slices: int, source: str) -> list[Slice]:
    """The CT slices of a series in order along their normal, after a look at whether they form a volume.

    slices: Slices of one series, in any order; source: what to call it. Localizers and captures among them are passed
    over. Raises LeftOut where no even stack of at least `min_slices` CT slices remains.
    """
    kinds = [_not_ct(one) for one in slices]
    kept = [one for one, kind in zip(slices, kinds) if kind is None]
    if not kept:
        raise LeftOut(source, collections.Counter(kinds).most_common(1)[0][0])
    for what, tolerance in (("size", 0), ("spacing", 1e-4), ("orientation", 1e-3)):
        values = sorted({getattr(one, what) for one in kept})
        if (np.ptp(values, axis=0) > tolerance).any():
            raise LeftOut(
                source, f"mixed slices: {what}s such as {format_size(values[0])} and {format_size(values[-1])}"
            )
    if len(kept) < max(min_slices, 2):
        raise LeftOut(source, f"too few slices: {len(kept)}, expected at least {max(min_slices, 2)} (--min_slices)")
    orientation = np.array(kept[0].orientation)
    normal = np.cross(orientation[:3], orientation[3:])
    positions = np.array([one.position for one in kept])  # (N, 3)
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    kept, positions, heights = [kept[i] for i in order], positions[order], heights[order]
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    doubled = np.flatnonzero(gaps < max(0.1 * usual, 0.01))
    if len(doubled):
        first, second = kept[doubled[0]], kept[doubled[0] + 1]
        raise LeftOut(
            source,
            f"doubled slices: {len(doubled)}, such as {os.path.basename(first.path)} and "
            f"{os.path.basename(second.path)} at {heights[doubled[0]]:g} mm",
        )
    uneven = np.flatnonzero(np.abs(gaps - usual) > 0.05 * usual + 0.1)  # some scanners write tenths of a millimetre
    if len(uneven):
        widest = int(uneven[np.argmax(gaps[uneven])])
        what = "missing slices" if gaps[widest] > 1.5 * usual else "uneven spacing"
        raise LeftOut(
            source,
            f"{what}: {gaps[widest]:.4g} mm between {os.path.basename(kept[widest].path)} and "
            f"{os.path.basename(kept[widest + 1].path)}, {usual:.4g} mm between most",
        )
    sideways = positions - positions[0] - np.outer(heights - heights[0], normal)
    shift = float(np.linalg.norm(sideways, axis=1).max())
    if shift > 0.5 * min(kept[0].spacing):
        raise LeftOut(
            source, f"tilted gantry: the slices are shifted sideways by up to {shift:.3g} mm against each other"
        )
    return kept


def _not_ct(one: Slice) -> str | None:
    """Why a DICOM file is no slice of a CT volume; None if it is one."""
    kinds = one.image_type.upper()
    if one.sop_class.startswith(SECONDARY_CAPTURE):
        return "not a CT image: a secondary capture"
    if one.modality != "CT":
        return f"not a CT image: modality {one.modality or 'unknown'}"
    if "LOCALIZER" in kinds:
        return "not a CT image: a scout (localizer)"
    if "SCREEN SAVE" in kinds or "SCREENSAVE" in kinds:
        return "not a CT image: a screen capture"
    if one.samples > 1:
        return f"not a CT image: colour, {one.samples} values per pixel"
    if one.sop_class == ENHANCED_CT or one.frames > 1:
        return f"not a CT image of one slice: a multi-frame file of {one.frames}; convert it to NIfTI first"
    if one.sop_class != CT_IMAGE:
        return f"not a CT image: SOP class {one.sop_class}"
    if not (one.spacing and one.orientation and one.position) or min(one.spacing) <= 0 or min(one.size) < 1:
        return "no geometry: without pixel spacing, orientation or position"
    return None


def sharpness(kernel: str) -> int:
    """How sharp a reconstruction kernel's name says it is: about 10 for the softest, 80 for the sharpest.

    Siemens and newer Canon kernels carry it in their number (B30f, Br59d), older Toshiba ones in a scale of their own
    (FC01 to FC18 body, FC50 to FC59 lung, FC80 and more bone); the rest go by name. 50 where a name says nothing.
    """
    named = {
        "SOFT": 20,
        "STANDARD": 30,
        "STND": 30,
        "CHST": 35,
        "DETAIL": 50,
        "LUNG": 60,
        "BONE": 70,
        "EDGE": 80,
        "BONEPLUS": 75,
        "A": 20,
        "B": 30,
        "C": 40,
        "D": 50,
        "L": 60,
        "YA": 40,
        "YB": 50,
        "YC": 60,
    }
    name = kernel.upper().split("\\")[0].strip()
    if name in named:
        return named[name]
    number = re.search(r"\d+", name)
    if number is None:
        return 50
    if name.startswith("FC"):
        return next(value for low, value in ((80, 80), (50, 60), (30, 70), (0, 30)) if int(number[0]) >= low)
    return min(int(number[0]), 99)


def read_series(slices: Sequence[Slice]) -> sitk.Image:
    """The image that sorted Slices form: rescaled to HU and clamped from below to air. Raises DataError."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([one.path for one in slices])
    reader.SetImageIO("GDCMImageIO")
    rescales = {one.rescale for one in slices}
    if len(rescales) > 1 or not all(value.is_integer() for pair in rescales for value in pair):
        reader.SetOutputPixelType(sitk.sitkFloat32)  # the first slice alone would decide otherwise
    image = sitk.DICOMOrient(quietly(reader.Execute, slices[0].path), "RAS")
    if image.GetPixelID() != sitk.sitkInt16:
        converted = sitk.GetImageFromArray(to_int16(sitk.GetArrayViewFromImage(image), slices[0].path))
        converted.CopyInformation(image)
        image = converted
    return sitk.Threshold(image, AIR, 32767, AIR)
