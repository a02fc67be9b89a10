"""What scanners and archives deliver, read as CT in RAS: DICOM series, NIfTI, MetaImage, NRRD and HDF5.

SimpleITK reads the voxels. pydicom reads the headers by which slices are told apart and checked: 4 kB of a file, where
SimpleITK reads all of it, more than twice. An image is a SimpleITK.Image of int16 Hounsfield units whose indices grow
towards the patient's right, anterior and superior side, as nearly as its axes allow.
"""
import collections
import itertools
import os
import re
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from data import AIR, LPS, DataError, Volume, is_hdf5, to_int16

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mhd", ".mha", ".nrrd", ".nhdr", ".hdf5", ".h5")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"  # SOP classes
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DICOMDIR = "1.2.840.10008.1.3.10"
UPRIGHT = np.diag([-1.0, -1.0, 1.0])  # ITK's directions, which are LPS, of an image along the world's RAS axes

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # many archives break DICOM's rules for values
            return _slice_of(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True), path)
    except DataError:
        raise
    except Exception as error:  # pydicom raises many kinds for a broken file
        raise DataError(path, f"can't be read: {_one_line(error, path)}") from error


def _slice_of(header, path):
    if header.get("SOPClassUID") is None:
        media = header.file_meta.get("MediaStorageSOPClassUID") if hasattr(header, "file_meta") else None
        if media == DICOMDIR:
            return None
        raise DataError(path, "can't be read: no DICOM file, or its header is cut off")

    def text(tag):
        value = header.get(tag)
        several = not isinstance(value, (str, bytes)) and hasattr(value, "__iter__")
        return "\\".join(map(str, value)) if several else str("" if value is None else value).strip()

    def numbers(value, count):  # () for anything else than so many numbers
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
        path, text("PatientID"), text("StudyInstanceUID"), text("StudyDate"), text("SeriesInstanceUID"), kind,
        text("Modality"), text("ImageType"), int(header.get("SamplesPerPixel") or 1), int(header.get("NumberOfFrames") or 1),
        (int(columns or 0), int(rows or 0)), numbers(text("PixelSpacing"), 2), numbers(text("ImageOrientationPatient"), 6),
        numbers(text("ImagePositionPatient"), 3), rescale, (numbers(text("SliceThickness"), 1) or (0.0,))[0],
        text("ConvolutionKernel"))


def sort_slices(slices, min_slices, source):
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
            raise LeftOut(source, f"mixed slices: {what}s such as {by(values[0])} and {by(values[-1])}")
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
        raise LeftOut(source, f"doubled slices: {len(doubled)}, such as {os.path.basename(first.path)} and "
                              f"{os.path.basename(second.path)} at {heights[doubled[0]]:g} mm")
    uneven = np.flatnonzero(np.abs(gaps - usual) > 0.05 * usual + 0.1)  # some scanners write tenths of a millimetre
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
    return to_hu(_call(reader.Execute, slices[0].path), slices[0].path)


def read_image(path):
    """The image in a volume file, clamped from below to air. Raises DataError."""
    return to_hu(read_raw(path), path)


def read_raw(path):
    """The 3D image in a volume file as SimpleITK reads it, in the file's own orientation and type. Raises DataError."""
    if not os.path.isfile(path):
        raise DataError(path, "can't be read: no such file")
    if os.path.getsize(path) == 0:
        raise DataError(path, "can't be read: the file is empty")
    if is_hdf5(path):  # in chunks and filters that ITK does not know
        try:
            with Volume(path) as volume:
                voxels = volume.read_values()
                native = np.float32 if voxels.dtype == np.float16 else voxels.dtype.newbyteorder("=")  # all that ITK takes
                return _call(lambda: make_image(voxels.astype(native), volume.affine), path)
        except DataError as error:
            raise DataError(path, _one_line(error.reason, path)) from error
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    nifti = path.lower().endswith((".nii", ".nii.gz"))
    if path.lower().endswith((".mha", ".mhd")):
        require_sound_header(path)
    image = _read_nifti(reader, path) if nifti else _call(reader.Execute, path)
    _call(lambda: _require_whole(path, 0 if nifti else sitk.GetArrayViewFromImage(image).nbytes), path)
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = image[..., 0]
    if image.GetDimension() != 3:
        raise DataError(path, f"not a volume: {image.GetDimension()}D, {by(image.GetSize())}")
    if image.GetNumberOfComponentsPerPixel() > 1 or "complex" in image.GetPixelIDTypeAsString():
        raise DataError(path, f"not a volume of HU: voxels of type {image.GetPixelIDTypeAsString()}")
    return image


def _read_nifti(reader, path):
    """ITK's geometry and nibabel's voxels: ITK takes NaN for 0 and, where a file is cut off, whatever its memory held.

    Where the header says of neither form of its affine that it counts, nibabel's, by which data.py reads the file too.
    """
    import nibabel

    def read():
        reader.ReadImageInformation()
        nifti = nibabel.load(path)
        told = nifti.header["qform_code"] or nifti.header["sform_code"]
        return nifti.affine, np.asanyarray(nifti.dataobj), told
    affine, voxels, told = _call(read, path)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:  # ITK makes something up
        raise DataError(path, "no geometry: its spacings and directions span no volume")
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3:
        raise DataError(path, f"not a volume: {voxels.ndim}D, {by(voxels.shape)}")
    if voxels.dtype.kind not in "iuf":
        raise DataError(path, f"not a volume of HU: voxels of type {voxels.dtype}")
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if not told:
        return _call(lambda: make_image(voxels, affine), path)

    def placed():
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
        image.SetSpacing(reader.GetSpacing()[:3])
        image.SetOrigin(reader.GetOrigin()[:3])
        image.SetDirection(np.reshape(reader.GetDirection(), [reader.GetDimension()] * 2)[:3, :3].ravel().tolist())
        return image
    return _call(placed, path)


def require_sound_header(path):
    """Raise DataError for a MetaImage header without a plain number of axes or a plain name of the voxels' file.

    ITK reads some of the others and refuses most, but by some it ends the process.
    """
    with open(path, "rb") as file:
        header = file.read(1 << 16)
    for name, sound in (("NDims", rb"[1-9]"), ("ElementDataFile", rb"[^%\0]+")):
        # Up to the end of a line with ElementDataFile, behind which voxels may follow
        found = re.findall(rb"^[ \t]*%b[ \t]*[=:]?[ \t]*(.*?)[ \t\r]*$" % name.encode(), re.match(
            rb".*?(?:^[ \t]*ElementDataFile.*?$|\Z)", header, re.S | re.M)[0], re.M)
        wrong = [value for value in found if not re.fullmatch(sound, value)]
        if wrong or not found:
            value = repr(wrong[0].decode(errors="replace"))[:60] if wrong else "missing"
            raise DataError(path, f"can't be read: {name} in its header is {value}")


def _require_whole(path, size):
    """Raise an error where the compressed voxels in a file are damaged or fewer than `size` bytes.

    ITK passes over both, and what is missing is what its memory held before, such as another patient's voxels.
    """
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    header = re.match(rb"(?!\x1f\x8b).*?(^ElementDataFile *=.*?\n|\n\r?\n|\Z)|", start, re.S | re.M)[0]  # none in a .nii.gz
    if header and not re.search(rb"^CompressedData *= *True|^encoding: *gz", header, re.M | re.I):
        return
    apart = re.search(rb"^(?:ElementDataFile *=|data ?file:) *(?!LOCAL\s)(\S.*?)\s*$", header, re.M | re.I)
    stream, found = zlib.decompressobj(47), 0  # 47: zlib or gzip
    with open(os.path.join(os.path.dirname(path), os.fsdecode(apart[1])) if apart else path, "rb") as file:
        file.seek(0 if apart else len(header))
        while chunk := stream.unused_data or file.read(1 << 20):
            if stream.eof:
                if not chunk.startswith(b"\x1f\x8b"):  # no further part of a gzip file
                    break
                stream = zlib.decompressobj(47)
            found += len(stream.decompress(chunk))
    if found < size:
        raise EOFError(f"its voxels end after {found} of {size} bytes")


def _call(read, path):
    """What `read` returns, without what C libraries print of a broken file beside raising. Raises DataError."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        return read()
    except Exception as error:  # ITK and nibabel raise many kinds
        raise DataError(path, f"can't be read: {_one_line(error, path)}") from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def to_hu(image, path):
    """A SimpleITK image brought to RAS and int16, values below air clamped.

    Raises DataError for NaN and for axes that are not at right angles, not for any value.
    """
    require_right_angles(image, path)
    image = to_ras(image)
    if image.GetPixelID() != sitk.sitkInt16:
        converted = sitk.GetImageFromArray(to_int16(sitk.GetArrayViewFromImage(image), path))
        converted.CopyInformation(image)
        image = converted
    return sitk.Threshold(image, AIR, 32767, AIR)


def require_right_angles(image, path):
    """Raise DataError for an image whose axes are not at right angles to each other."""
    axes = _axes_of(image)
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3):
        raise DataError(path, "no geometry: its axes are not at right angles")


def _axes_of(image):
    """(3, 3) unit vectors of an image's axes in LPS, in columns."""
    return np.reshape(image.GetDirection(), (3, 3))


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
        return _sample(image, start, own, size)
    factors = averaged(own, spacing)
    fine = np.array(spacing) / factors
    start = index - (np.array(size) * factors - 1) / 2 * fine / own
    return _mean(_sample(image, start, fine, np.array(size) * factors, linear=True), factors)


def resample(image, spacing, is_label=False, upright=False):
    """An image at another spacing (3,) mm over the same extent: linear and averaged as needed, or nearest for labels.

    upright: an image whose axes are not the world's is turned to right, anterior and superior. Its extent is then the
    box around its corners; what it does not fill is air, or 0 in a mask.
    """
    tilted = upright and not is_upright(image)
    if tilted:
        axes = UPRIGHT
        first, extent, own = _box_along(image, axes)
    else:
        axes, own = _axes_of(image), np.array(image.GetSpacing())
        extent = np.array(image.GetSize()) * own
    size = np.maximum(np.rint(extent / spacing), 1).astype(int)
    factors = np.ones(3, int) if is_label else averaged(own, spacing)
    fine = np.array(spacing) / factors
    if tilted:
        start = image.TransformPhysicalPointToContinuousIndex((axes @ (first + fine / 2)).tolist())
    else:
        start = (fine / own - 1) / 2  # the outer faces of the first voxels coincide
    if is_label:
        return _sample(image, start, fine, size, extend=not tilted, axes=axes)
    return _mean(_sample(image, start, fine, size * factors, linear=True, extend=not tilted, axes=axes), factors)


def is_upright(image):
    """Whether an image's axes are the world's right, anterior and superior, to 1e-3."""
    return np.allclose(_axes_of(image), UPRIGHT, rtol=0, atol=1e-3)


def _box_along(image, axes):
    """(3,) low corner and (3,) extent in mm of the box along `axes` around an image, and (3,) its voxels' distance along them.

    That is the longest step that passes no voxel over, however flat the voxels are and however they lie.
    """
    faces = itertools.product(*((-0.5, n - 0.5) for n in image.GetSize()))
    corners = np.array([image.TransformContinuousIndexToPhysicalPoint(face) for face in faces]) @ axes  # (8, 3)
    voxels_per_mm = _axes_of(image).T @ axes / np.array(image.GetSpacing())[:, None]  # (3 of the image, 3 of the box)
    return corners.min(0), np.ptp(corners, axis=0), 1 / np.linalg.norm(voxels_per_mm, axis=0)


def averaged(own, spacing):
    """(3,) whole number of samples along each axis that one voxel of `spacing` is the mean of."""
    stretch = np.array(spacing) / own
    return np.where(stretch > 1.5, np.rint(stretch), 1).astype(int)


def _sample(image, start, spacing, size, linear=False, extend=False, axes=None):
    """An image on a grid along its axes or others, `start` in its continuous voxel indices; linearly, in float, or nearest.

    Outside is air, or 0 in a mask; with `extend` the nearest voxel, for a last voxel that reaches a little beyond.
    """
    axes = _axes_of(image) if axes is None else axes
    outside = AIR if image.GetPixelID() == sitk.sitkInt16 else 0
    origin = image.TransformContinuousIndexToPhysicalPoint([float(s) for s in start])
    how, kind = (sitk.sitkLinear, sitk.sitkFloat32) if linear else (sitk.sitkNearestNeighbor, image.GetPixelID())
    return sitk.Resample(image, [int(n) for n in size], sitk.Transform(), how, origin, [float(s) for s in spacing],
                         axes.ravel().tolist(), outside, kind, extend)


def _mean(image, factors):
    """Means over blocks of voxels of a float image, rounded (ITK itself would cut off decimals)."""
    means = image if (factors == 1).all() else sitk.BinShrink(image, [int(f) for f in factors])
    return sitk.Cast(sitk.Round(means), sitk.sitkInt16)


def body_box(image, margin):
    """(3,) first voxel and (3,) size of the largest thing denser than -300 HU and the lungs in it, with `margin` mm."""
    coarse = sitk.Shrink(image, [min(4, n) for n in image.GetSize()])
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(coarse > -300))
    return box_of(parts == 1, image, margin)


def box_of(mask, image, margin):
    """(3,) first voxel and (3,) size in `image` of the non-zero part of a mask of the same extent, with `margin` mm or more.

    Without any such part: all of the image.
    """
    found = [np.flatnonzero(voxels_of(mask).any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    shape = np.array(image.GetSize())
    if not len(found[0]):
        return np.zeros(3, int), shape
    scale = shape / np.array(mask.GetSize())
    extra = margin / np.array(image.GetSpacing()) + scale - 1  # what begins between two voxels of a coarser mask is in
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
    text = told[-1].split("ERROR:")[-1] if told else " ".join(lines) or type(error).__name__
    text = re.sub(r"\(0x[0-9a-f]+\)", "", text).replace(str(Path(path).parent) + os.sep, "")
    return text.strip(" :")[:200]
