"""What scanners and archives deliver, read as CT in RAS: DICOM series, NIfTI, MetaImage, NRRD and HDF5.

SimpleITK reads the voxels. pydicom reads the headers by which slices are told apart and checked: 4 kB of a file, where
SimpleITK reads all of it, more than twice. An image is a SimpleITK.Image of int16 Hounsfield units whose indices grow
towards the patient's right, anterior and superior side, as nearly as its axes allow.
"""
import collections
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from data import AIR, LPS, DataError, Volume, to_int16

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mhd", ".mha", ".nrrd", ".nhdr", ".hdf5", ".h5")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"  # SOP classes
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DICOMDIR = "1.2.840.10008.1.3.10"

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of it is told as a reason


class LeftOut(DataError):
    """A file or series that is sound, but not what is wanted: a scout, another modality, a series with a gap."""


# ------------------------------------------------------------------------------------------------------------- DICOM


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
    samples: int        # values per pixel
    frames: int
    size: tuple         # (columns, rows)
    spacing: tuple      # (between rows, between columns)
    orientation: tuple  # (6,) unit vectors along a row and along a column
    position: tuple     # (3,) centre of the first pixel
    rescale: tuple      # (slope, intercept)
    thickness: float
    kernel: str


def stem(path):
    """Name of a volume's file without folders and suffix."""
    name = os.path.basename(path)
    suffix = next((suffix for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True)
                   if name.lower().endswith(suffix)), "")
    return name[:len(name) - len(suffix)]


def is_dicom(path):
    """Whether a file is DICOM by its mark, or by its suffix, since old files lack the mark."""
    if path.lower().endswith(DICOM_SUFFIXES):
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_header(path):
    """The Slice that a DICOM file is; None for a DICOMDIR. Raises DataError."""
    import pydicom
    tags = ["SOPClassUID", "PatientID", "StudyInstanceUID", "StudyDate", "SeriesInstanceUID", "Modality", "ImageType",
            "SamplesPerPixel", "NumberOfFrames", "Columns", "Rows", "PixelSpacing", "ImageOrientationPatient",
            "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "SliceThickness", "ConvolutionKernel"]
    try:
        if os.path.getsize(path) == 0:
            raise DataError(path, "can't be read: the file is empty")
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)
        if header.get("SOPClassUID") is None:
            media = header.file_meta.get("MediaStorageSOPClassUID") if hasattr(header, "file_meta") else None
            if media == DICOMDIR:
                return None
            raise DataError(path, "can't be read: no DICOM file, or its header is cut off")

        def text(tag):
            value = header.get(tag)
            several = isinstance(value, (list, tuple, pydicom.multival.MultiValue))
            return "\\".join(map(str, value)) if several else str("" if value is None else value).strip()

        def numbers(tag, count, default=()):
            value = header.get(tag)
            if value is None or value == "":
                return default
            values = tuple(float(v) for v in (value if count > 1 else [value]))
            return values if len(values) == count and np.isfinite(values).all() else default
        if text("SOPClassUID") == DICOMDIR:
            return None
        return Slice(
            path, text("PatientID"), text("StudyInstanceUID"), text("StudyDate"), text("SeriesInstanceUID"),
            text("SOPClassUID"), text("Modality"), text("ImageType"), int(header.get("SamplesPerPixel") or 1),
            int(header.get("NumberOfFrames") or 1), (int(header.get("Columns") or 0), int(header.get("Rows") or 0)),
            numbers("PixelSpacing", 2), numbers("ImageOrientationPatient", 6), numbers("ImagePositionPatient", 3),
            numbers("RescaleSlope", 1, (1.0,)) + numbers("RescaleIntercept", 1, (0.0,)),
            numbers("SliceThickness", 1, (0.0,))[0], text("ConvolutionKernel"))
    except DataError:
        raise
    except Exception as error:  # pydicom raises many kinds for a broken file
        raise DataError(path, f"can't be read: {_one_line(error, path)}") from error


def sort_slices(slices, min_slices, source):
    """The CT slices of a series in order along their normal, after a look at whether they form a volume.

    slices: Slices of one series, in any order; source: what to call it. Localizers and captures among them are passed
    over. Raises LeftOut where no even stack of at least `min_slices` CT slices remains.
    """
    kinds = [_not_ct(one) for one in slices]
    kept = [one for one, kind in zip(slices, kinds) if kind is None]
    if not kept:
        raise LeftOut(source, collections.Counter(kinds).most_common(1)[0][0])
    for what, values in {"sizes": {one.size for one in kept},
                         "pixel spacings": {tuple(np.round(one.spacing, 4)) for one in kept},
                         "orientations": {tuple(np.round(one.orientation, 3) + 0.0) for one in kept}}.items():
        if len(values) > 1:
            some = " and ".join(" x ".join(f"{v:g}" for v in value) for value in sorted(values)[:2])
            raise LeftOut(source, f"mixed slices: {len(values)} {what}, such as {some}")
    if len(kept) < min_slices:
        raise LeftOut(source, f"too few slices: {len(kept)}, expected at least {min_slices} (--min_slices)")
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
        raise LeftOut(source, f"doubled slices: {len(doubled)}, such as {os.path.basename(first.path)} and "
                              f"{os.path.basename(second.path)} at {heights[doubled[0]]:g} mm")
    uneven = np.flatnonzero(np.abs(gaps - usual) > max(0.05 * usual, 0.02))
    if len(uneven):
        widest = int(uneven[np.argmax(gaps[uneven])])
        what = "missing slices" if gaps[widest] > 1.5 * usual else "uneven spacing"
        raise LeftOut(source, f"{what}: {gaps[widest]:.4g} mm between {os.path.basename(kept[widest].path)} and "
                              f"{os.path.basename(kept[widest + 1].path)}, {usual:.4g} mm between most")
    sideways = positions - positions[0] - np.outer(heights - heights[0], normal)
    shift = float(np.linalg.norm(sideways, axis=1).max())
    if shift > 0.5 * min(kept[0].spacing):
        raise LeftOut(source, f"tilted gantry: the slices are shifted sideways by up to {shift:.3g} mm against each other")
    return kept


def _not_ct(one):
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


def sharpness(kernel):
    """How sharp a reconstruction kernel's name says it is: about 10 for the softest, 80 for the sharpest.

    Siemens and newer Canon kernels carry it in their number (B30f, Br59d), older Toshiba ones in a scale of their own
    (FC01 to FC18 body, FC50 to FC59 lung, FC80 and more bone); the rest go by name. 50 where a name says nothing.
    """
    named = {"SOFT": 20, "STANDARD": 30, "STND": 30, "CHST": 35, "DETAIL": 50, "LUNG": 60, "BONE": 70, "EDGE": 80,
             "BONEPLUS": 75, "A": 20, "B": 30, "C": 40, "D": 50, "L": 60, "YA": 40, "YB": 50, "YC": 60}
    name = kernel.upper().split("\\")[0].strip()
    if name in named:
        return named[name]
    number = re.search(r"\d+", name)
    if number is None:
        return 50
    if name.startswith("FC"):
        return next(value for low, value in ((80, 80), (50, 60), (30, 70), (0, 30)) if int(number[0]) >= low)
    return min(int(number[0]), 99)


# -------------------------------------------------------------------------------------------------- reading to RAS HU


def read_series(slices):
    """The image that sorted Slices form: rescaled to HU and clamped from below to air. Raises DataError."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([one.path for one in slices])
    reader.SetImageIO("GDCMImageIO")
    rescales = {one.rescale for one in slices}
    if len(rescales) > 1 or not all(value.is_integer() for pair in rescales for value in pair):
        reader.SetOutputPixelType(sitk.sitkFloat32)  # the first slice alone would decide otherwise
    return to_hu(_execute(reader, slices[0].path), slices[0].path)


def read_image(path):
    """The image in a volume file, clamped from below to air. Raises DataError."""
    return to_hu(read_raw(path), path)


def read_raw(path):
    """The 3D image in a volume file as SimpleITK reads it, in the file's own orientation and type. Raises DataError."""
    if path.endswith((".hdf5", ".h5")):  # in chunks and filters that ITK does not know
        with Volume(path) as volume:
            return make_image(volume.read(), volume.affine)
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise DataError(path, "can't be read: the file is empty")
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    image = _execute(reader, path)
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[..., 0]
    if image.GetDimension() != 3:
        raise DataError(path, f"not a volume: {image.GetDimension()}D, {by(image.GetSize())}")
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise DataError(path, f"not a volume of HU: {image.GetNumberOfComponentsPerPixel()} values per voxel")
    return image


def _execute(reader, path):
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise DataError(path, f"can't be read: {_one_line(error, path)}") from error


def to_hu(image, path):
    """A SimpleITK image brought to RAS and int16, values below air clamped. Raises DataError for NaN, not for any value."""
    image = to_ras(image)
    if image.GetPixelID() != sitk.sitkInt16:
        converted = sitk.GetImageFromArray(to_int16(sitk.GetArrayViewFromImage(image), path))
        converted.CopyInformation(image)
        image = converted
    return sitk.Threshold(image, AIR, 32767, AIR)


def to_classes(image, path, classes=None):
    """A SimpleITK image of a mask brought to RAS and uint8. Raises DataError for values that are no classes, or others
    than `classes` if those are given."""
    image = to_ras(image)
    found = np.unique(sitk.GetArrayViewFromImage(image))
    allowed = range(256) if classes is None else classes
    wrong = [f"{value:g}" for value in found if value not in allowed][:3]
    if wrong:
        expected = "whole numbers from 0 to 255" if classes is None else "only " + ", ".join(map(str, classes))
        raise DataError(path, f"unexpected label values: {', '.join(wrong)}; expected {expected}")
    return sitk.Cast(image, sitk.sitkUInt8)


def to_ras(image):
    # SimpleITK names the directions that indices increase to, as nibabel does: LPS is its identity
    return sitk.DICOMOrient(image, "RAS")


def make_image(volume, affine):
    """A SimpleITK.Image of an (X, Y, Z) array and its affine (4, 4) to RAS mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.T))
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def voxels_of(image):
    """(X, Y, Z) view of an image's voxels; valid while the image lives."""
    return sitk.GetArrayViewFromImage(image).transpose(2, 1, 0)


def affine_of(image):
    """(4, 4) affine of an image, from voxel indices to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


def require_ct(image, source):
    """Raise DataError for an image of one value, LeftOut for one without air or lung: a mask, an MR, unscaled values."""
    extremes = sitk.MinimumMaximumImageFilter()
    extremes.Execute(image)
    low, high = extremes.GetMinimum(), extremes.GetMaximum()
    if low == high:
        raise DataError(source, f"constant: the same value in all voxels ({low:g})")
    if low > -200:
        raise LeftOut(source, f"not a thorax CT in HU: values from {low:g} to {high:g}, nothing as dark as lung or air")


# --------------------------------------------------------------------------------------------------- cutting, resampling


def crop_at(image, point, size, spacing, source):
    """The part of an image around a point, resampled linearly; what lies outside is air.

    point: (3,) LPS mm, which becomes the centre of the crop (without resampling: the nearest that whole voxels allow)
    size: (3,) voxels; spacing: (3,) mm along the image's axes, or None to take its voxels as they are
    source: what to call the point in an error
    A spacing much larger than the image's is averaged over, as pre-training does. Raises DataError for a point outside.
    """
    index = np.array(image.TransformPhysicalPointToContinuousIndex([float(p) for p in point]))
    if not ((index >= -0.5) & (index <= np.array(image.GetSize()) - 0.5)).all():
        raise DataError(source, f"outside the scan: {by(point)} mm (LPS) is voxel {by(np.round(index, 1))} of "
                                f"{by(image.GetSize())} (RAS)")
    own = np.array(image.GetSpacing())
    if spacing is None:
        start = np.rint(index - (np.array(size) - 1) / 2)
        return _sample(image, start, own, size, sitk.sitkNearestNeighbor)
    factors = averaged(own, spacing)
    fine = np.array(spacing) / factors
    start = index - (np.array(size) * factors - 1) / 2 * fine / own
    return _shrink(_sample(image, start, fine, np.array(size) * factors, sitk.sitkLinear), factors)


def resample(image, spacing, is_label=False):
    """An image at another spacing (3,) mm over the same extent: linear and averaged as needed, or nearest for labels."""
    own = np.array(image.GetSpacing())
    size = np.maximum(np.rint(np.array(image.GetSize()) * own / spacing), 1).astype(int)
    factors = np.ones(3, int) if is_label else averaged(own, spacing)
    fine = np.array(spacing) / factors
    start = (fine / own - 1) / 2  # the outer faces of the first voxels coincide
    nearest = sitk.sitkNearestNeighbor if is_label else sitk.sitkLinear
    return _shrink(_sample(image, start, fine, size * factors, nearest), factors)


def averaged(own, spacing):
    """(3,) whole number of samples along each axis that one voxel of `spacing` is the mean of."""
    stretch = np.array(spacing) / own
    return np.where(stretch > 1.5, np.rint(stretch), 1).astype(int)


def _sample(image, start, spacing, size, interpolator):
    """An image on a grid along the axes of another, `start` in its continuous voxel indices; outside is air, or 0."""
    outside = AIR if image.GetPixelID() == sitk.sitkInt16 else 0
    origin = image.TransformContinuousIndexToPhysicalPoint([float(s) for s in start])
    return sitk.Resample(image, [int(n) for n in size], sitk.Transform(), interpolator, origin,
                         [float(s) for s in spacing], image.GetDirection(), outside, image.GetPixelID())


def _shrink(image, factors):
    return image if (factors == 1).all() else sitk.BinShrink(image, [int(f) for f in factors])


def body_box(image, margin):
    """(3,) first voxel and (3,) size of the largest thing denser than -300 HU and the lungs in it, with `margin` mm."""
    coarse = sitk.Shrink(image, [min(4, n) for n in image.GetSize()])
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(coarse > -300))
    return box_of(parts == 1, image, margin)


def box_of(mask, image, margin):
    """(3,) first voxel and (3,) size in `image` of the non-zero part of a mask of the same extent, with `margin` mm.

    Without any such part: all of the image.
    """
    found = [np.flatnonzero(voxels_of(mask).any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    shape = np.array(image.GetSize())
    if not len(found[0]):
        return np.zeros(3, int), shape
    scale = shape / np.array(mask.GetSize())
    extra = margin / np.array(image.GetSpacing())
    low = np.maximum(np.floor([f[0] for f in found] * scale - extra), 0).astype(int)
    high = np.minimum(np.ceil((np.array([f[-1] for f in found]) + 1) * scale + extra), shape).astype(int)
    return low, high - low


def cut(image, box):
    """The part of an image in a box of first voxel and size; its position in the world stays."""
    first, size = box
    return sitk.RegionOfInterest(image, [int(n) for n in size], [int(n) for n in first])


def save_nifti(path, image):
    """Write an image as compressed NIfTI in scanner coordinates; the same image gives the same bytes. Raises OSError."""
    import nibabel
    affine = affine_of(image)
    nifti = nibabel.Nifti1Image(np.asfortranarray(voxels_of(image)), affine)
    nifti.set_qform(affine, 1)
    nifti.set_sform(affine, 1)
    nifti.header.set_xyzt_units("mm")
    nibabel.save(nifti, path)


def by(values):
    """Numbers as text: 3 x 4 x 5."""
    return " x ".join(f"{value:g}" for value in values)


def _one_line(error, path):
    """What a library says of a file, in one line without memory addresses, source files and the way to the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "ERROR:" in line]
    text = told[-1].split("ERROR:")[-1] if told else (lines or [type(error).__name__])[-1]
    text = re.sub(r"\(0x[0-9a-f]+\)", "", text).replace(str(Path(path).parent) + os.sep, "")
    return text.strip(" :")[:200]
