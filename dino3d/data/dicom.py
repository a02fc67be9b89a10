"""DICOM files: which files are DICOM, what the header of a slice says, and what is no slice of a CT."""

import os
import re
import warnings
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import numpy as np

from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, is_kind, one_line

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
OTHER_SUFFIXES = (  # files that are known to be something else, and are not looked into
    *(".txt", ".md", ".log", ".html", ".htm", ".pdf", ".doc", ".docx", ".xml", ".json", ".yaml", ".yml", ".ini"),
    *(".csv", ".tsv", ".xls", ".xlsx", ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".mp4"),
    *(".py", ".ipynb", ".sh", ".bat", ".exe", ".dll", ".npy", ".npz", ".pt", ".pth", ".pkl", ".raw", ".zraw", ".vtk"),
    *(".stl", ".bval", ".bvec", ".safetensors"),
)
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"  # SOP classes
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DICOMDIR = "1.2.840.10008.1.3.10"
FIRST_BYTES = 2048  # of a file without preamble, in which its SOP class is to be found
TAGS = {  # those that are read of a header
    "ImageType": 0x00080008,
    "SOPClassUID": 0x00080016,
    "SOPInstanceUID": 0x00080018,
    "StudyDate": 0x00080020,
    "AcquisitionDate": 0x00080022,
    "AcquisitionDateTime": 0x0008002A,
    "AcquisitionTime": 0x00080032,
    "ContentTime": 0x00080033,
    "Modality": 0x00080060,
    "PatientName": 0x00100010,
    "PatientID": 0x00100020,
    "SliceThickness": 0x00180050,
    "TriggerTime": 0x00181060,
    "ConvolutionKernel": 0x00181210,
    "StudyInstanceUID": 0x0020000D,
    "SeriesInstanceUID": 0x0020000E,
    "AcquisitionNumber": 0x00200012,
    "InstanceNumber": 0x00200013,
    "ImagePositionPatient": 0x00200032,
    "ImageOrientationPatient": 0x00200037,
    "FrameOfReferenceUID": 0x00200052,
    "TemporalPositionIdentifier": 0x00200100,
    "NominalPercentageOfCardiacPhase": 0x00209241,
    "SamplesPerPixel": 0x00280002,
    "PhotometricInterpretation": 0x00280004,
    "NumberOfFrames": 0x00280008,
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "PixelSpacing": 0x00280030,
    "BitsAllocated": 0x00280100,
    "BitsStored": 0x00280101,
    "HighBit": 0x00280102,
    "PixelRepresentation": 0x00280103,
    "PixelPaddingValue": 0x00280120,
    "PixelPaddingRangeLimit": 0x00280121,
    "RescaleIntercept": 0x00281052,
    "RescaleSlope": 0x00281053,
    "RescaleType": 0x00281054,
}
# Units of rescaled values other than HU (DICOM PS3.3, C.11.1.1.2): optical and electron density, mg/ml, ...
NOT_HU = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")
PROJECTION = re.compile(r"(?<![A-Z0-9])(MIP|MINIP|PROJECTION IMAGE)(?![A-Z0-9])")  # in an image type
OVERLAY_BITS = range(0x60000102, 0x60200102, 0x20000)  # OverlayBitPosition of each of 16 overlays


class Pixels(NamedTuple):
    """How the pixels of a slice are stored, None where its header does not say.

    syntax: transfer syntax; offset: of the element with the pixels in the file; explicit: whether it says its VR
    padding: stored values from and to which there is no image, as bit patterns; overlays: bits that are no image
    """

    syntax: str
    offset: int
    explicit: bool
    little_endian: bool
    allocated: int | None  # bits
    stored: int | None
    high: int | None  # position of the highest bit
    signed: int | None
    padding: tuple[int, ...]
    overlays: tuple[int, ...]


class Slice(NamedTuple):
    """What the header of a DICOM file says; empty strings and tuples where it says nothing. Lengths in mm, LPS."""

    path: str
    patient: str
    person: str  # the patient's name, by which two patients of one number are told apart
    study: str
    date: str
    series: str
    sop_class: str
    sop: str  # SOP instance
    modality: str
    image_type: str
    photometric: str
    samples: int  # values per pixel
    frames: int
    size: tuple[int, int]  # (columns, rows)
    spacing: tuple[float, ...]  # (between rows, between columns)
    orientation: tuple[float, ...]  # (6,) unit vectors along a row and along a column
    decimals: int  # that the orientation is given to
    position: tuple[float, ...]  # (3,) centre of the first pixel
    rescale: tuple[str, str]  # (slope, intercept) as they are written
    unit: str  # of rescaled values, "" and US: not said
    thickness: float
    kernel: str
    number: str
    acquisition: tuple[str, ...]  # by which times and acquisitions in one series are told apart, see `dicom_series`
    content_time: str
    pixels: Pixels


def is_dicom(path: str) -> bool:
    """Whether a file is DICOM by its mark, by its suffix, or by its first element, since old files lack the mark.

    Files with the suffix of something else are not looked into.
    """
    if is_kind(path, (*VOLUME_SUFFIXES, *ARCHIVE_SUFFIXES, *OTHER_SUFFIXES)):
        return False
    if is_kind(path, DICOM_SUFFIXES):
        return True
    with open(path, "rb") as file:
        start = file.read(FIRST_BYTES)
    if start[128:132] == b"DICM":
        return True
    if len(start) < 8:
        return False
    group, element = start[:2], start[2:4]
    explicit = re.match(rb"(UL|CS|UI|SH|LO|DA|TM|DT)", start[4:6]) is not None
    first = group in (b"\x08\x00", b"\x02\x00") and element[1] == 0 or group == b"\x00\x08" and element[0] == 0
    short = int.from_bytes(start[4:8], "little") <= 256  # of an element without a VR
    return first and (explicit or short) and b"1.2.840.10008." in start


def read_header(path: str) -> Slice | None:
    """The Slice that a DICOM file is; None for a DICOMDIR. Raises DataError."""
    import pydicom

    try:
        if os.path.getsize(path) == 0:
            raise DataError(path, "can't be read: the file is empty")
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # many archives break DICOM's rules for values
            tags = [*TAGS.values(), *OVERLAY_BITS]
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
            return _slice_of(header, path, file.tell())
    except DataError:
        raise
    except Exception as error:  # pydicom raises many kinds for a broken file
        raise DataError(path, f"can't be read: {one_line(error, path)}") from error


def _slice_of(header: Any, path: str, offset: int) -> Slice | None:
    raw = {int(tag): element for tag, element in header.items()}

    def text(name: str) -> str:  # the values as they are written; several are separated by \
        element = raw.get(TAGS[name])
        if element is None or not element.value:
            return ""
        if not isinstance(element.value, bytes):
            return str(element.value)
        if element.VR in ("US", "SS", "UL", "SL"):
            return str(int.from_bytes(element.value, "little" if element.is_little_endian else "big"))
        if not element.value.isascii():  # in one of many character sets
            value = header.get(TAGS[name]).value
            several = not isinstance(value, (str, bytes)) and hasattr(value, "__iter__")
            return ("\\".join(map(str, value)) if several else str(value)).strip(" \0")
        return element.value.decode("ascii").strip(" \0")

    def number(tag: int) -> int | None:  # of binary elements, whatever their VR is said to be
        element = raw.get(tag)
        value = element.value if element is not None else None
        if not value or not isinstance(value, bytes):
            return None
        if element.VR in (None, "US", "SS", "UL", "SL", "OW", "OB", "UN") and len(value) in (2, 4):
            return int.from_bytes(value, "little" if element.is_little_endian else "big")
        return int(value) if re.fullmatch(rb" *\d{1,9}[ \0]*", value) else None

    kind, columns, rows = text("SOPClassUID"), number(TAGS["Columns"]), number(TAGS["Rows"])
    if not kind:
        media = header.file_meta.get("MediaStorageSOPClassUID") if hasattr(header, "file_meta") else None
        if media == DICOMDIR:
            return None
        raise DataError(path, "can't be read: no DICOM file, or its header is cut off")
    if kind == DICOMDIR:
        return None
    if kind == CT_IMAGE and not (columns and rows):
        raise DataError(path, "can't be read: its header is cut off, or lacks the image's size")
    orientation, first = text("ImageOrientationPatient"), next(iter(raw.values()))
    padding = [number(TAGS[name]) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    times = ("AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime")
    pixels = Pixels(
        str(getattr(header, "file_meta", {}).get("TransferSyntaxUID", "")),
        offset,
        not getattr(first, "is_implicit_VR", False),
        bool(getattr(first, "is_little_endian", True)),
        *(number(TAGS[name]) for name in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")),
        tuple(value for value in padding if value is not None) if padding[0] is not None else (),
        tuple(bit for bit in map(number, OVERLAY_BITS) if bit),
    )
    return Slice(
        path,
        text("PatientID"),
        text("PatientName"),
        text("StudyInstanceUID"),
        text("StudyDate"),
        text("SeriesInstanceUID"),
        kind,
        text("SOPInstanceUID"),
        text("Modality"),
        text("ImageType"),
        text("PhotometricInterpretation"),
        number(TAGS["SamplesPerPixel"]) or 1,
        int(next(iter(_numbers(text("NumberOfFrames"), 1)), 1)),
        (columns or 0, rows or 0),
        _numbers(text("PixelSpacing"), 2),
        _numbers(orientation, 6),
        _decimals(orientation),
        _numbers(text("ImagePositionPatient"), 3),
        (text("RescaleSlope"), text("RescaleIntercept")),
        text("RescaleType"),
        next(iter(_numbers(text("SliceThickness"), 1)), 0.0),
        text("ConvolutionKernel"),
        text("InstanceNumber"),
        (
            text("AcquisitionNumber"),
            text("TemporalPositionIdentifier"),
            f"{text('NominalPercentageOfCardiacPhase')} {text('TriggerTime')}".strip(),
            text("FrameOfReferenceUID"),
            " ".join(map(text, times)).strip(),
        ),
        text("ContentTime"),
        pixels,
    )


def _numbers(text: str, count: int) -> tuple[float, ...]:
    """The numbers in a value; () for anything else than so many finite ones."""
    try:
        values = tuple(float(one.strip(" \0")) for one in text.split("\\"))
    except ValueError:
        return ()
    return values if len(values) == count and np.isfinite(values).all() else ()


def _decimals(text: str) -> int:
    """The most decimals that a number in a value has."""
    try:
        exponents = [Decimal(one.strip(" \0")).as_tuple().exponent for one in text.split("\\")]
        return max(-exponent for exponent in exponents if isinstance(exponent, int))
    except (InvalidOperation, ValueError):
        return 0


def rescale_values(one: Slice) -> tuple[float, float]:
    """(slope, intercept) from stored values to HU, 1 and 0 where the header has none. Raises DataError."""
    slope, intercept = (_numbers(text or default, 1) for text, default in zip(one.rescale, ("1", "0")))
    if not slope or not intercept or slope[0] == 0:
        raise DataError(
            one.path,
            f"can't be read: the rescale slope of {os.path.basename(one.path)} is {one.rescale[0]!r:.40}, its "
            f"intercept {one.rescale[1]!r:.40}",
        )
    return slope[0], intercept[0]


def why_no_ct(one: Slice) -> str | None:
    """Why a DICOM file is no slice of a CT volume, whatever its geometry is; None if it is one."""
    kinds = one.image_type.upper()
    if one.sop_class.startswith(SECONDARY_CAPTURE):
        return "not a CT image: a secondary capture"
    if one.modality != "CT":
        return f"not a CT image: modality {one.modality or 'unknown'}"
    if "LOCALIZER" in kinds:
        return "not a CT image: a scout (localizer)"
    if "SCREEN SAVE" in kinds or "SCREENSAVE" in kinds:
        return "not a CT image: a screen capture"
    if found := PROJECTION.search(kinds):
        return f"not a CT image: a projection of slices ({found[0]})"
    if one.unit.upper() in NOT_HU:
        return f"not a CT image in HU: its rescale type is {one.unit}"
    if one.samples > 1:
        return f"not a CT image: colour, {one.samples} values per pixel"
    if one.photometric and not one.photometric.upper().startswith("MONOCHROME"):
        return f"not a CT image: colour, {one.photometric:.20}"
    if one.sop_class == ENHANCED_CT or one.frames > 1:
        return (
            f"not a CT image of one slice: a multi-frame file of {one.frames}; convert it to NIfTI first, with "
            "software that rescales each frame: air has -1000 HU then"
        )
    if one.sop_class != CT_IMAGE:
        return f"not a CT image: SOP class {one.sop_class:.70}"
    return None


def is_beside(kind: str) -> bool:
    """Whether a reason of `why_no_ct` is one that stands in many series beside their slices: a scout or a capture."""
    return "scout" in kind or "capture" in kind


def missing_geometry(one: Slice) -> str | None:
    """What the header of a slice lacks, or has broken, of where it lies; None if it has all."""
    wrong = [
        name
        for name, value in (
            ("pixel spacing", one.spacing and min(one.spacing) > 0 and min(one.size) > 0),
            ("orientation", one.orientation),
            ("position", one.position),
        )
        if not value
    ]
    return " and ".join(wrong) or None


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
