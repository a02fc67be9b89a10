"""Image files of other programs, read as CT in RAS: NIfTI, MetaImage, NRRD and HDF5.

An image is a SimpleITK.Image of int16 Hounsfield units whose indices grow towards the patient's right, anterior and
superior side, as nearly as its axes allow.
"""

import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from dino3d.data.volume import AIR, LPS, DataError, Volume, is_hdf5, to_int16

UPRIGHT = np.diag([-1.0, -1.0, 1.0])  # ITK's directions, which are LPS, of an image along the world's RAS axes
sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of it is told as a reason


class LeftOut(DataError):
    """A file or series that is sound, but not what is wanted: a scout, another modality, a series with a gap."""


# --------------------------------------------------------------------------------------------------- reading to RAS HU


def read_image(path: str) -> sitk.Image:
    """The image in a volume file, clamped from below to air. Raises DataError."""
    return to_hu(read_raw(path), path)


def read_raw(path: str) -> sitk.Image:
    """The 3D image in a volume file as SimpleITK reads it, in the file's own orientation and type. Raises DataError."""
    if not os.path.isfile(path):
        raise DataError(path, "can't be read: no such file")
    if os.path.getsize(path) == 0:
        raise DataError(path, "can't be read: the file is empty")
    if is_hdf5(path):  # in chunks and filters that ITK does not know
        try:
            with Volume(path) as volume:
                voxels = volume.read_values()
                # ITK takes neither float16 nor another byte order
                native = np.float32 if voxels.dtype == np.float16 else voxels.dtype.newbyteorder("=")
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
        raise DataError(path, f"not a volume: {image.GetDimension()}D, {format_size(image.GetSize())}")
    if image.GetNumberOfComponentsPerPixel() > 1 or "complex" in image.GetPixelIDTypeAsString():
        raise DataError(path, f"not a volume of HU: voxels of type {image.GetPixelIDTypeAsString()}")
    return image


def _read_nifti(reader: sitk.ImageFileReader, path: str) -> sitk.Image:
    """ITK's geometry and nibabel's voxels: ITK takes NaN for 0 and, where a file is cut off, whatever its memory held.

    Where the header says of neither form of its affine that it counts, nibabel's, by which volume.py reads the file
    too.
    """
    import nibabel

    def read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        raise DataError(path, f"not a volume: {voxels.ndim}D, {format_size(voxels.shape)}")
    if voxels.dtype.kind not in "iuf":
        raise DataError(path, f"not a volume of HU: voxels of type {voxels.dtype}")
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if not told:
        return _call(lambda: make_image(voxels, affine), path)

    def placed() -> sitk.Image:
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
        image.SetSpacing(reader.GetSpacing()[:3])
        image.SetOrigin(reader.GetOrigin()[:3])
        image.SetDirection(np.reshape(reader.GetDirection(), [reader.GetDimension()] * 2)[:3, :3].ravel().tolist())
        return image

    return _call(placed, path)


def require_sound_header(path: Path | str) -> None:
    """Raise DataError for a MetaImage header without a plain number of axes or a plain name of the voxels' file, or
    without the size of compressed voxels that follow it.

    ITK reads some of the others and refuses most, but by some it ends the process.
    """
    with open(path, "rb") as file:
        header = file.read(1 << 16)
    for name, sound in (("NDims", rb"[1-9]"), ("ElementDataFile", rb"[^%\0]+")):
        # Up to the end of a line with ElementDataFile, behind which voxels may follow
        found = re.findall(
            rb"^[ \t]*%b[ \t]*[=:]?[ \t]*(.*?)[ \t\r]*$" % name.encode(),
            re.match(rb".*?(?:^[ \t]*ElementDataFile.*?$|\Z)", header, re.S | re.M)[0],
            re.M,
        )
        wrong = [value for value in found if not re.fullmatch(sound, value)]
        if wrong or not found:
            value = repr(wrong[0].decode(errors="replace"))[:60] if wrong else "missing"
            raise DataError(path, f"can't be read: {name} in its header is {value}")
    head = header.partition(b"ElementDataFile")[0]
    local = re.search(rb"^[ \t]*ElementDataFile[ \t]*[=:]?[ \t]*LOCAL", header, re.M | re.I)
    compressed = re.search(rb"^[ \t]*CompressedData[ \t]*[=:]?[ \t]*[Tt1]", head, re.M)
    if local and compressed and not re.search(rb"^[ \t]*CompressedDataSize[ \t]*[=:]?[ \t]*[1-9]", head, re.M):
        # ITK then says nothing and gives voxels that are not the file's
        raise DataError(
            path,
            "can't be read: its voxels are compressed and CompressedDataSize in its header is missing; "
            "write it again with the program that made it, or without compression",
        )


def _require_whole(path: Path | str, size: int) -> None:
    """Raise an error where the compressed voxels in a file are damaged or fewer than `size` bytes.

    ITK passes over both, and what is missing is what its memory held before, such as another patient's voxels.
    """
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    header = re.match(rb"(?!\x1f\x8b).*?(^ElementDataFile *=.*?\n|\n\r?\n|\Z)|", start, re.S | re.M)[
        0
    ]  # none in a .nii.gz
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


def _call(read: Callable[[], Any], path: Path | str) -> Any:
    """What `read` returns, without what C libraries print of a broken file besides raising. Raises DataError."""
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


def to_hu(image: sitk.Image, path: Path | str) -> sitk.Image:
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


def require_right_angles(image: sitk.Image, path: Path | str) -> None:
    """Raise DataError for an image whose axes are not at right angles to each other."""
    axes = _axes_of(image)
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3):
        raise DataError(path, "no geometry: its axes are not at right angles")


def _axes_of(image: sitk.Image) -> np.ndarray:
    """(3, 3) unit vectors of an image's axes in LPS, in columns."""
    return np.reshape(image.GetDirection(), (3, 3))


def to_classes(image: sitk.Image, path: Path | str, classes: Sequence[int] | None = None) -> sitk.Image:
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


def to_ras(image: sitk.Image) -> sitk.Image:
    """An image with its axes swapped and flipped, never interpolated, to the nearest RAS axes."""
    # SimpleITK names the directions that indices increase to, as nibabel does: LPS is its identity
    return sitk.DICOMOrient(image, "RAS")


def make_image(volume: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """A SimpleITK.Image of an (X, Y, Z) array and its affine (4, 4) to RAS mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.T))
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def voxels_of(image: sitk.Image) -> np.ndarray:
    """(X, Y, Z) view of an image's voxels, read-only; it keeps the image alive."""
    return np.asarray(_Voxels(image)).transpose(2, 1, 0)


class _Voxels:
    """What NumPy makes an array of, and keeps as its base: ITK's own view reads freed memory when its image is gone."""

    def __init__(self, image: sitk.Image):
        self.image, self.__array_interface__ = image, sitk.GetArrayViewFromImage(image).__array_interface__


def affine_of(image: sitk.Image) -> np.ndarray:
    """(4, 4) affine of an image, from voxel indices to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


def require_ct(image: sitk.Image, source: str) -> None:
    """Raise DataError for an image of one value, LeftOut for one without air or lung: a mask, an MR, unscaled
    values."""
    extremes = sitk.MinimumMaximumImageFilter()
    extremes.Execute(image)
    low, high = extremes.GetMinimum(), extremes.GetMaximum()
    if low == high:
        raise DataError(source, f"constant: the same value in all voxels ({low:g})")
    if low > -200:
        raise LeftOut(source, f"not a thorax CT in HU: values from {low:g} to {high:g}, nothing as dark as lung or air")


def save_nifti(path: Path | str, image: sitk.Image) -> None:
    """Write an image as compressed NIfTI in scanner coordinates; the same image gives the same bytes. Raises
    OSError."""
    import nibabel

    affine = affine_of(image)
    nifti = nibabel.Nifti1Image(np.asfortranarray(voxels_of(image)), affine)
    nifti.set_qform(affine, 1)
    nifti.set_sform(affine, 1)
    nifti.header.set_xyzt_units("mm")
    nibabel.save(nifti, path)


def format_size(values: Iterable[float]) -> str:
    """Numbers as text: 3 x 4 x 5."""
    return " x ".join(f"{value:g}" for value in values)


def _one_line(error: Exception | str, path: Path | str) -> str:
    """What a library says of a file, in one line without memory addresses, source files and the way to the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "ERROR:" in line]
    text = told[-1].split("ERROR:")[-1] if told else " ".join(lines) or type(error).__name__
    text = re.sub(r"\(0x[0-9a-f]+\)", "", text).replace(str(Path(path).parent) + os.sep, "")
    return text.strip(" :")[:200]
