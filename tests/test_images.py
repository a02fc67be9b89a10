"""images.py and the converters' geometry: volume files against nibabel, crops and resampled images against functions
of the place in the world, broken files, labels and crops."""

import gzip
import itertools
import os
import re
import shutil
import time
import warnings

import h5py
import nibabel
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
from grids import (
    AXES,
    LPS,
    MIRRORED,
    OBLIQUE,
    ORIGIN,
    SIGNED_PERMUTATIONS,
    SPACING,
    affine_to_ras,
    as_hu,
    canonical,
    noise,
)
from raw_inputs import manifest, run, write_dicom  # noqa: F401
from scipy.spatial.transform import Rotation

from dino3d.data import images, resampling
from dino3d.data.conventions import AIR, VOLUME_SUFFIXES, DataError, LeftOut, stem
from dino3d.data.geometry import other_grid
from dino3d.data.hdf5 import write_volume
from dino3d.data.images import read_image
from dino3d.data.layouts import Crop, Pair, find_crops, find_pairs, read_pair
from dino3d.data.pretraining import block_mean
from dino3d.data.requirements import require_ct
from dino3d.data.resampling import crop_at
from dino3d.data.volume import Volume, to_classes
from dino3d.prepare.phantoms import chest_phantom


def contents(image):
    """(voxels (X, Y, Z), affine) of a SimpleITK.Image, by ITK's own description of where its voxels lie."""
    affine = np.eye(4)
    origin = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    for axis in range(3):
        affine[:3, axis] = image.TransformIndexToPhysicalPoint([int(a == axis) for a in range(3)]) - origin
    affine[:3, 3] = origin
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), LPS @ affine


def itk_image(voxels, axes=np.eye(3), spacing=SPACING, origin=ORIGIN):
    """A SimpleITK.Image of an (x, y, z) array."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0)), isVector=False)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(np.ravel(axes))
    return image


def ras_image(image):
    """An image with its axes swapped and flipped to RAS: as a CT if it is of int16, else as a mask."""
    image = sitk.DICOMOrient(image, "RAS")
    if image.GetPixelID() == sitk.sitkInt16:
        return sitk.Threshold(image, AIR, 32767, AIR)
    return sitk.Cast(image, sitk.sitkUInt8)


def read_values(path):
    """(X, Y, Z) numbers of a file in RAS, of whatever type."""
    with Volume(path) as volume:
        return volume.read_values()


def assert_is(image, voxels, affine, atol=1e-6):
    """The image lies in RAS, and is this one."""
    found, where = contents(image)
    assert image.GetPixelID() == sitk.sitkInt16
    np.testing.assert_array_equal(found, voxels)
    np.testing.assert_allclose(where, affine, rtol=0, atol=atol)
    np.testing.assert_array_equal(images.voxels_of(image), found)
    np.testing.assert_allclose(images.affine_of(image), where, rtol=0, atol=1e-9)


def places(shape, affine):
    """(X, Y, Z, 3) RAS mm of voxels."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]


GRADIENT, OFFSET = (
    np.array([23.0, -17.0, 11.0]),
    50.0,
)  # HU per RAS mm: a tenth of a voxel away is more than rounding hides


def linear_image(axes, shape=(31, 27, 19), spacing=SPACING, origin=(4.5, -7.25, 12.0)):
    """An image in RAS whose HU are a linear function of the place in the world."""
    affine = affine_to_ras(axes, spacing, origin)
    middle = affine @ [*(np.array(shape) - 1) / 2, 1]
    hu = (places(shape, affine) - middle[:3]) @ GRADIENT + OFFSET
    return ras_image(itk_image(np.rint(hu).astype(np.int16), axes, spacing, origin)), middle[:3]


def assert_linear(image, middle, source):
    """Where an image lies well within its source, its HU are that function to the rounding."""
    voxels, affine = contents(image)
    where = places(voxels.shape, affine)
    index = (where - images.affine_of(source)[:3, 3]) @ np.linalg.inv(images.affine_of(source)[:3, :3]).T
    reach = np.array(image.GetSpacing()) / source.GetSpacing() / 2 + 1e-6
    inside = ((index >= reach) & (index <= np.array(source.GetSize()) - 1 - reach)).all(-1)
    assert inside.sum() > 50
    np.testing.assert_allclose(voxels[inside], ((where - middle) @ GRADIENT + OFFSET)[inside], rtol=0, atol=1.51)


# -------------------------------------------------------------------------------------------------------- volume files


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_volume_files_of_all_48_orientations_and_oblique_ones(suffix, tmp_path):
    assert len({axes.tobytes() for axes in SIGNED_PERMUTATIONS}) == 48
    path = str(tmp_path / f"ct{suffix}")
    for number, axes in enumerate(
        [*SIGNED_PERMUTATIONS, OBLIQUE, *(OBLIQUE @ SIGNED_PERMUTATIONS[k] for k in (5, 22, 43))]
    ):
        stored = noise((4, 3, 5), -3000, 3000, seed=number).astype(np.int16)
        sitk.WriteImage(itk_image(stored, axes), path, useCompression=number % 2 == 0)
        voxels, affine = canonical(as_hu(stored), affine_to_ras(axes))
        assert_is(read_image(path), voxels, affine, 1e-4 if "nii" in suffix else 1e-6)
        if suffix == ".nii":
            assert_is(read_image(path), *canonical(as_hu(stored), nibabel.load(path).affine), 1e-5)


def test_headers_written_by_hand(tmp_path):
    """What the formats' descriptions say of origin and directions, not what ITK writes."""
    stored = noise((4, 3, 5), -900, 3000).astype("<i2")
    (tmp_path / "ct.raw").write_bytes(stored.tobytes(order="F"))
    header = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "CompressedData = False",
        "Offset = 10 -20 30",
        "TransformMatrix = 0 1 0 0 0 -1 1 0 0",
        "ElementSpacing = 0.5 0.7 2",
        "DimSize = 4 3 5",
        "ElementType = MET_SHORT",
        "ElementDataFile = ct.raw",
    ]  # a row of the matrix is an axis of the file, in LPS
    (tmp_path / "ct.mhd").write_text("\n".join(header) + "\n")
    axes = np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]]).T
    assert_is(
        read_image(str(tmp_path / "ct.mhd")), *canonical(stored, affine_to_ras(axes, (0.5, 0.7, 2), (10, -20, 30)))
    )

    for space, to_ras in (("right-anterior-superior", np.eye(4)), ("left-posterior-superior", LPS), ("RAS", np.eye(4))):
        lines = [
            "NRRD0004",
            "type: short",
            "dimension: 3",
            f"space: {space}",
            "sizes: 4 3 5",
            "endian: little",
            "encoding: raw",
            "space directions: (0,0.5,0) (0,0,-0.7) (2,0,0)",
            "space origin: (10,-20,30)",
            "",
            "",
        ]
        (tmp_path / "ct.nrrd").write_bytes("\n".join(lines).encode() + stored.tobytes(order="F"))
        affine = to_ras @ np.array([[0, 0, 2, 10], [0.5, 0, 0, -20], [0, -0.7, 0, 30], [0, 0, 0, 1]])
        assert_is(read_image(str(tmp_path / "ct.nrrd")), *canonical(stored, affine))


def test_a_key_of_nrrd_is_no_field(tmp_path):
    """`key:=value` is whatever its writer liked, as ITK has it, and `field: value` counts."""
    path, stored = tmp_path / "ct.nrrd", noise()
    image = itk_image(stored)
    for key, value in (("units", "cm"), ("space units", '"m" "m" "m"'), ("data file", "other.raw"), ("encoding", "gz")):
        image.SetMetaData(key, value)
    sitk.WriteImage(image, path)
    assert b"\nunits:=cm\n" in path.read_bytes() and b"\ndata file:=other.raw\n" in path.read_bytes()
    with Volume(path) as volume:
        np.testing.assert_allclose(nibabel.affines.voxel_sizes(volume.affine), sitk.ReadImage(path).GetSpacing())
        np.testing.assert_array_equal(np.sort(volume.read(), axis=None), np.sort(stored, axis=None))
    head, voxels = path.read_bytes().split(b"\n\n", 1)
    path.write_bytes(head.replace(b"units:=cm", b'space units: "cm" "cm" "cm"') + b"\n\n" + voxels)
    with Volume(path) as volume:
        np.testing.assert_allclose(nibabel.affines.voxel_sizes(volume.affine), 10 * np.array(image.GetSpacing()))


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_other_voxel_types_are_rounded_and_clamped(dtype, suffix, tmp_path):
    values = np.array([-1e6, -32769, -3024, -2000, -1025, -1024.4, -0.6, 0.4, 99.6, 200, 32766.4, 32768, 65535, 1e6])
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    stored = values.clip(float(limits.min), float(limits.max)).astype(dtype).reshape(7, 2, 1)
    path = str(tmp_path / f"ct{suffix}")
    sitk.WriteImage(itk_image(stored), path)
    image = read_image(path)
    assert image.GetPixelID() == sitk.sitkInt16
    np.testing.assert_array_equal(contents(image)[0], as_hu(stored.astype(np.float64))[::-1, ::-1])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">i2", "<f2"])
def test_hdf5_is_read_as_it_is_stored(dtype, tmp_path):
    stored = (noise((4, 3, 5), -9, 9) / (1 if "i" in dtype else 4)).astype(dtype)
    sitk.WriteImage(itk_image(stored.astype(np.float32)), tmp_path / "mask.hdf5")
    with h5py.File(tmp_path / "mask.hdf5", "r+") as file:
        del file["ITKImage/0/VoxelData"]
        file["ITKImage/0/VoxelData"] = stored.T
    os.rename(tmp_path / "mask.hdf5", tmp_path / "mask.HDF5")
    np.testing.assert_array_equal(read_values(tmp_path / "mask.HDF5"), stored[::-1, ::-1])


@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_scaling_and_byte_order(suffix, endian, tmp_path):
    stored = noise((4, 3, 5), -900, 900).astype(f"{endian}i2")
    header = nibabel.Nifti1Header(endianness=endian)
    header.set_data_shape(stored.shape)
    header.set_data_dtype(stored.dtype)
    header.set_sform(np.eye(4), code=1)
    path = tmp_path / f"ct{suffix}"
    for slope, inter in ((1, 0), (np.nan, np.nan), (2, -7), (0.37, 11.25)):
        header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = slope, inter, 352, b"n+1"
        content = header.binaryblock + bytes(4) + stored.tobytes(order="F")
        path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
        expected = as_hu(stored * np.float64(np.float32(np.nan_to_num(slope, nan=1))) + np.nan_to_num(inter))
        assert_is(read_image(str(path)), expected, np.eye(4))
        labels = read_values(path)
        np.testing.assert_allclose(
            labels, stored * np.float32(np.nan_to_num(slope, nan=1)) + np.nan_to_num(inter), rtol=1e-5
        )


def test_nifti_offset_without_a_slope_is_told(tmp_path):
    """The standard and nibabel apply neither, SimpleITK the offset: its HU are others, without a word."""
    path, stored = tmp_path / "ct.nii", noise((4, 3, 5), -900, 900).astype(np.int16)
    for inter, told in ((0, False), (-1024, True)):
        nifti_with(path, stored, scl_slope=0, scl_inter=inter)
        assert_is(read_image(str(path)), stored, np.eye(4))
        with Volume(path) as volume:
            assert volume.notes[-1:] == (
                (f"its scl_inter {inter} stands beside a scl_slope of 0 and was not applied",) * told
            )
        by_itk = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T
        assert np.unique(by_itk - stored).tolist() == [inter]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_one_frame_is_a_volume_and_several_are_none(suffix, tmp_path):
    path = str(tmp_path / f"ct{suffix}")
    stored = noise((5, 3, 4), -900, 900).astype(np.int16)  # (z, y, x)

    def write(array):
        if "nii" in suffix:
            nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array.T), LPS), path)
        else:
            sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), path)

    write(stored[None])
    assert_is(read_image(path), *canonical(stored.T, LPS))
    write(stored[None, None])
    assert_is(read_image(path), *canonical(stored.T, LPS))
    write(np.stack([stored, stored]))
    with pytest.raises(DataError, match="is a 4D image of .*4.*3.*5.*2.*expected a 3D volume"):
        read_image(path)
    write(stored[0])
    with pytest.raises(DataError, match="is a 2D image of 4 x 3 voxels"):
        read_image(path)


def test_nifti_in_two_gzip_parts(tmp_path):
    path = tmp_path / "ct.nii.gz"
    stored = noise((40, 30, 20), -900, 900).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / "ct.nii")
    content = (tmp_path / "ct.nii").read_bytes()
    path.write_bytes(gzip.compress(content[:9000]) + gzip.compress(content[9000:]))
    assert_is(read_image(str(path)), stored, np.eye(4))
    second = bytearray(gzip.compress(content[9000:], 0))  # not compressed: only its checksum tells of damage
    second[2000] ^= 8
    for damaged in (gzip.compress(content[9000:])[:-500], second):
        path.write_bytes(gzip.compress(content[:9000]) + damaged)
        with pytest.raises(DataError, match="can't be read"):
            read_image(str(path))


def smooth(shape=(40, 40, 30)):
    """A volume that compresses."""
    field = np.random.default_rng(0).normal(size=shape)
    return np.rint(3000 * scipy.ndimage.gaussian_filter(field, 2)).astype(np.int16)


def refusal(path):
    """The reason for which a file is refused: one line, the same wherever the folder lies."""
    reasons = []
    for folder in (path.parent, path.parent / "elsewhere" / "deeper"):
        if folder != path.parent:
            folder.mkdir(parents=True, exist_ok=True)
            for file in [file for file in path.parent.iterdir() if file.is_file()]:
                shutil.copy(file, folder)
        there = str(folder / path.name)
        with pytest.raises(DataError) as error:
            read_image(there)
        assert error.value.path == there and not isinstance(error.value, LeftOut)
        reasons.append(error.value.reason)
    assert reasons[0] == reasons[1] and "\n" not in reasons[0] and len(reasons[0]) < 250
    assert str(path.parent) not in reasons[0] and not re.search("0x[0-9a-f]{4}", reasons[0])
    shutil.rmtree(path.parent / "elsewhere")
    return reasons[0]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_files_that_are_cut_off_are_refused(suffix, compressed, tmp_path):
    """ITK reads many of them, and fills what is missing with what its memory held."""
    path = tmp_path / f"ct{suffix}"
    image = itk_image(smooth())
    sitk.WriteImage(image, str(path), compressed)
    (data,) = [file for file in tmp_path.iterdir() if file != path] or [path]
    whole = data.read_bytes()
    for length in sorted({0, 1, 10, 100, 352, 400, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 12}):
        data.write_bytes(whole[:length])
        assert "can't be read" in refusal(path)
    if data != path:
        data.unlink()
        assert "can't be read" in refusal(path)
    if suffix == ".mhd":
        path.write_text(re.sub("CompressedDataSize.*\n", "", path.read_text()))  # by which MetaIO notices
        data.write_bytes(whole[: len(whole) // 2])
        assert "can't be read" in refusal(path)
        data.write_bytes(whole)
        assert_is(read_image(str(path)), *canonical(smooth().clip(AIR), affine_to_ras(np.eye(3))))


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("suffix", [".nii.gz", ".mhd", ".mha", ".nrrd", ".nhdr"])
def test_damage_inside_compressed_voxels_is_noticed(suffix, tmp_path):
    path = tmp_path / f"ct{suffix}"
    sitk.WriteImage(itk_image(smooth()), str(path), True)
    (data,) = [file for file in tmp_path.iterdir() if file != path] or [path]
    whole = data.read_bytes()
    for at, new in ((len(whole) // 2, bytes(40)), (len(whole) // 3, b"\xff"), (len(whole) - 3000, b"damage")):
        data.write_bytes(whole[:at] + new + whole[at + len(new) :])
        assert "can't be read" in refusal(path)


def nifti_with(path, voxels=noise((4, 3, 5)).astype(np.int16), affine=np.eye(4), **fields):
    """A NIfTI file with fields of its header set as they are."""
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    content = path.read_bytes()
    header = nibabel.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + content[348:])


def with_(voxels, value):
    voxels = voxels.astype(np.float32)
    voxels[1, 1, 1] = value
    return voxels


def write_rgb(path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 4, 3, 3), np.uint8), isVector=True), path)


def write_complex(path):
    sitk.WriteImage(sitk.GetImageFromArray(noise().astype(np.complex64)), path)


def write_sheared(path):
    sitk.WriteImage(itk_image(noise(), SHEARED[:3, :3]), path)


def write_not_gzipped(path):
    nifti_with(path.with_suffix(""))
    path.with_suffix("").rename(path)


def write_nan_origin(path):
    sitk.WriteImage(itk_image(noise().astype(np.int16)), path)
    path.write_bytes(re.sub(rb"space origin: \([^,]*", b"space origin: (nan", path.read_bytes()))


def write_without(name):
    """A function that writes a MetaImage or NRRD file without the lines of its header that begin so."""

    def write(path):
        sitk.WriteImage(itk_image(noise().astype(np.int16)), path)
        path.write_bytes(re.sub(rb"(?m)^%b.*\n" % name, b"", path.read_bytes()))

    return write


SHEARED = np.eye(4) + 0.2 * np.eye(4, k=1)
RGB = np.zeros((4, 3, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
REFUSED = {  # name: (file, how it is made, reason)
    "missing": ("ct.mha", lambda path: None, "can't be read: no such file"),
    "missing hdf5": ("ct.hdf5", lambda path: None, "can't be read: no such file"),
    "empty": ("ct.nrrd", lambda path: path.write_bytes(b""), "can't be read: the file is empty"),
    "empty nifti": ("ct.nii.gz", lambda path: path.write_bytes(b""), "can't be read: the file is empty"),
    "text nifti": ("ct.nii", lambda path: path.write_text("<html>404</html>\n" * 99), "can't be read"),
    "text nifti.gz": ("ct.nii.gz", lambda path: path.write_text("<html>404</html>\n" * 99), "can't be read"),
    "text mha": ("ct.mha", lambda path: path.write_text("<html>404</html>\n" * 99), "can't be read"),
    "text nrrd": ("ct.nrrd", lambda path: path.write_text("<html>404</html>\n" * 99), "can't be read"),
    "text hdf5": ("ct.hdf5", lambda path: path.write_text("<html>404</html>\n" * 99), "can't be read"),
    "not gzipped": ("ct.nii.gz", write_not_gzipped, "not a gzip"),
    "nan nifti": ("ct.nii", lambda path: nifti_with(path, with_(noise((4, 3, 5)), np.nan)), "NaN or infinite"),
    "nan nifti.gz": (
        "ct.nii.gz",
        lambda path: nibabel.save(nibabel.Nifti1Image(with_(noise(), np.nan), LPS), path),
        "NaN",
    ),
    "nan mha": ("ct.mha", lambda path: sitk.WriteImage(itk_image(with_(noise(), np.nan)), path), "NaN or infinite"),
    "inf nrrd": ("ct.nrrd", lambda path: sitk.WriteImage(itk_image(with_(noise(), np.inf)), path), "NaN or infinite"),
    "nan hdf5": ("ct.hdf5", lambda path: sitk.WriteImage(itk_image(with_(noise(), np.nan)), path), "NaN or infinite"),
    "RGB nifti": ("ct.nii", lambda path: nifti_with(path, RGB), "has voxels of type"),
    "RGB nrrd": ("ct.nrrd", write_rgb, "has voxels of type vector of 8-bit"),
    "RGB mha": ("ct.mha", write_rgb, "has voxels of type"),
    "RGB hdf5": ("ct.hdf5", write_rgb, "expected a 3D volume"),
    "complex nifti": (
        "ct.nii",
        lambda path: nifti_with(path, noise().astype(np.complex64)),
        "has voxels of type complex64",
    ),
    "complex mha": ("ct.mha", write_complex, "has voxels of type"),
    "complex nrrd": ("ct.nrrd", write_complex, "has voxels of type complex"),
    "sheared mha": ("ct.mha", write_sheared, "not at right angles"),
    "sheared hdf5": ("ct.hdf5", write_sheared, "not at right angles"),
    "nan origin in nrrd": ("ct.nrrd", write_nan_origin, "can't be read"),
    "sheared": ("ct.nii", lambda path: nifti_with(path, affine=SHEARED), "not at right angles"),
    "nan affine": ("ct.nii", lambda path: nifti_with(path, srow_x=[np.nan, 0, 0, 0]), "no geometry"),
    "nan origin": ("ct.nii", lambda path: nifti_with(path, srow_x=[1, 0, 0, np.nan]), "no geometry"),
    "singular affine": ("ct.nii", lambda path: nifti_with(path, srow_x=[0, 1, 0, 0]), "can't be read|no geometry"),
    "no voxels": ("ct.nii", lambda path: nifti_with(path, dim=[3, 0, 3, 5, 1, 1, 1, 1]), "is empty"),
    "too large": ("ct.nii", lambda path: nifti_with(path, dim=[3, 9000, 9000, 9000, 1, 1, 1, 1]), "can't be read"),
    "no pixdim, no forms": (
        "ct.nii",
        lambda path: nifti_with(path, pixdim=[1, 2, 2, 0, 0, 0, 0, 0], qform_code=0, sform_code=0),
        "pixdim 2 x 2 x 0 in its header: the size of its voxels is not known",
    ),
    "no pixdim, qform": (
        "ct.nii",
        lambda path: nifti_with(path, pixdim=[1, 0, 2, 2, 0, 0, 0, 0], qform_code=1, sform_code=0),
        "pixdim 0 x 2 x 2",
    ),
    "unit of time for space": ("ct.nii", lambda path: nifti_with(path, xyzt_units=4), "in the unit 4 of xyzt_units"),
    "no spacing in mha": ("ct.mha", write_without(b"ElementSpacing"), "has no ElementSpacing in its header"),
    "no spacing in nrrd": ("ct.nrrd", write_without(b"space"), "has no spacings or space directions in its header"),
    "a folder": ("ct.nii", lambda path: path.mkdir(), "can't be read"),
}


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name, make, reason", REFUSED.values(), ids=REFUSED)
def test_unusable_volumes_are_named_with_the_reason(name, make, reason, tmp_path):
    path = tmp_path / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what makes the file
        make(path)
    if path.is_dir():
        with pytest.raises(DataError, match=reason):
            read_image(str(path))
    else:
        assert re.search(reason, refusal(path))


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("ct.nrrd", (b"space: left-posterior-superior", b"space: 3D-left-handed"), "(space 3d-left-handed)"),
        ("ct.nrrd", (rb"space: .*\n", b""), "(no space)"),
        ("ct.mha", (rb"TransformMatrix.*\n", b""), "no TransformMatrix"),
        ("ct.nrrd", (b"space: left-posterior-superior", b"space: LPS"), ""),
        ("ct.nrrd", (b"space: .*", b"space: left-posterior-superior"), ""),
        ("ct.mha", (b"TransformMatrix", b"Rotation"), ""),
    ],
)
def test_headers_that_do_not_say_which_way_the_axes_go_are_told(name, change, told, tmp_path):
    path = tmp_path / name
    sitk.WriteImage(itk_image(noise().astype(np.int16)), path)
    content = re.sub(*change, path.read_bytes(), count=1)
    if told == "(no space)":  # it needs one with its directions
        content = re.sub(rb"space directions: .*\nkinds.*\n", b"spacings: 1 1 2\n", content)
        content = re.sub(rb"space origin: .*\n", b"", content)
    path.write_bytes(content)
    with Volume(path) as volume:
        assert len(volume.notes) == bool(told) and all(told in note for note in volume.notes)


@pytest.mark.parametrize("suffix", [".mha", ".hdf5"])
def test_directions_that_are_no_unit_vectors_are_told(suffix, tmp_path):
    path = tmp_path / f"ct{suffix}"
    sitk.WriteImage(itk_image(noise().astype(np.int16)), path)
    if suffix == ".hdf5":
        with h5py.File(path, "r+") as file:
            file["ITKImage/0/Directions"][...] *= 0.5
    else:
        path.write_bytes(re.sub(rb"TransformMatrix = .*", b"TransformMatrix = .5 0 0 0 .5 0 0 0 .5", path.read_bytes()))
    with Volume(path) as volume:
        assert volume.notes == ("its directions are 0.5 x 0.5 x 0.5 long, not 1: its spacings were multiplied by that",)
        np.testing.assert_allclose(volume.spacing, np.array(SPACING) / 2)
        image = sitk.ReadImage(path)
        step = np.subtract(image.TransformIndexToPhysicalPoint((1, 0, 0)), image.GetOrigin())
        np.testing.assert_allclose(np.linalg.norm(step), volume.spacing[0])


def test_a_form_whose_code_is_none_is_told(tmp_path, capfd):
    """nibabel takes such a code for 0, and says so without the file's name."""
    nifti_with(tmp_path / "ct.nii", sform_code=9, qform_code=1)
    with Volume(tmp_path / "ct.nii") as volume:
        assert volume.notes == ("its sform_code is 9, which is none: 0 was taken",)
    assert capfd.readouterr().err == ""


def test_files_are_closed_and_standard_error_is_back(tmp_path, capfd):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    sitk.WriteImage(itk_image(smooth()), str(tmp_path / "ct.mha"))
    (tmp_path / "bad.mha").write_bytes((tmp_path / "ct.mha").read_bytes()[:500])
    for _ in range(5):
        read_image(str(tmp_path / "ct.mha"))
        with pytest.raises(DataError):
            read_image(str(tmp_path / "bad.mha"))
    assert before is None or len(os.listdir("/proc/self/fd")) == before
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


def test_images_that_are_no_ct_of_a_thorax():
    for voxels, kind, reason in (
        (np.full((4, 3, 5), -1000), DataError, r"constant: .* \(-1000\)"),
        (np.full((4, 3, 5), 0), DataError, "constant"),
        (noise((4, 3, 5), 0, 2), LeftOut, "a mask, not a CT: 2 whole values from 0 to 1"),
        (noise((4, 3, 5), -190, 900), LeftOut, "nothing as dark as air or lung"),
    ):
        with pytest.raises(kind, match=reason) as error:
            require_ct(voxels.astype(np.int16), "scan")
        assert error.value.path == "scan" and type(error.value) is kind
    require_ct(noise((4, 3, 5), -900, 900).astype(np.int16), "scan")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_masks_keep_their_classes(dtype, tmp_path):
    stored = noise((4, 3, 5), 0, 4)
    for axes in (np.eye(3), *MIRRORED.values()):
        sitk.WriteImage(itk_image(stored.astype(dtype), axes), tmp_path / "mask.nrrd")
        with Volume(tmp_path / "mask.nrrd") as volume:
            found, where = volume.read_labels([0, 1, 2, 3]), volume.affine
        voxels, affine = canonical(stored.astype(np.uint8), affine_to_ras(axes))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, voxels)
        np.testing.assert_allclose(where, affine, atol=1e-9)


@pytest.mark.parametrize("number", [1, 3, 7, 255])
def test_labels_that_a_float_or_a_slope_has_rounded_are_whole(number, tmp_path):
    """A slope of 1 / 255 and the like stand in the header as a float32."""
    slope = np.float32(number / 255)
    stored = noise((4, 3, 5), 0, 2).astype(np.uint8) * 255
    path = tmp_path / "mask.nii"
    nifti_with(path, stored, scl_slope=slope, scl_inter=0)
    with Volume(path) as volume:
        np.testing.assert_array_equal(volume.read_labels([0, number]), number * (stored > 0))


@pytest.mark.parametrize(
    "values, classes, reason",
    [
        ([0, 1, 0.5], None, "label values such as 0.5, expected whole numbers from 0 to 255"),
        ([-1, 0], None, "such as -1, expected"),
        ([0, 300], None, "such as 300, expected"),
        ([0, np.nan], None, "such as nan, expected"),
        ([0, 1, 2], [0, 1], "such as 2, expected only 0, 1"),
        ([5, 6, 7, 8, 9], [0], "such as 5, 6, 7, expected"),
        ([0, 1.001], None, "such as 1.001"),
        ([0, 254.99], None, "such as 254.99"),
        ([0, 1e-3], None, "such as 0.001"),
    ],
)
def test_masks_with_other_values_are_refused(values, classes, reason):
    with pytest.raises(DataError, match=reason):
        to_classes(np.resize(np.array(values, np.float32), (4, 3, 5)), "mask", classes)


# --------------------------------------------------------------------------------------------------------------- crops


ALL_AXES = AXES | MIRRORED


@pytest.mark.parametrize("axes", ALL_AXES.values(), ids=ALL_AXES)
def test_crops_of_whole_voxels_are_slices_of_the_scan(axes):
    stored = noise((21, 20, 19), -1000, 3000).astype(np.int16)
    raw = itk_image(stored, axes)
    scan, affine = canonical(stored, affine_to_ras(axes))
    image, rng = ras_image(raw), np.random.default_rng(0)
    wide = np.pad(scan, 40, constant_values=AIR)
    for _ in range(40):
        point = raw.TransformContinuousIndexToPhysicalPoint(rng.uniform(-0.49, np.array(stored.shape) - 0.51).tolist())
        size = rng.integers(1, 30, 3)
        crop = crop_at(image, point, size, None, "point")
        voxels, where = contents(crop)
        start = np.linalg.solve(affine, where[:, 3])[:3]
        np.testing.assert_allclose(start, np.rint(start), atol=1e-6)
        np.testing.assert_allclose(where[:3, :3], affine[:3, :3], atol=1e-9)
        part = tuple(slice(40 + a, 40 + a + n) for a, n in zip(np.rint(start).astype(int), size))
        assert crop.GetPixelID() == sitk.sitkInt16
        np.testing.assert_array_equal(voxels, wide[part])
        centre = (where @ [*(size - 1) / 2, 1])[:3]
        off = np.linalg.solve(affine[:3, :3], centre - LPS[:3, :3] @ point)
        assert np.abs(off).max() <= 0.5 + 1e-6  # of a voxel


CROP_SPACINGS = [(0.7, 0.7, 1.4), (0.5, 0.45, 0.6), (2.7, 2.1, 2.5), (1.0, 1.4, 5.0), (0.9, 0.7, 2.5)]


@pytest.mark.parametrize("spacing", CROP_SPACINGS, ids=str)
@pytest.mark.parametrize("axes", ALL_AXES.values(), ids=ALL_AXES)
def test_resampled_crops_show_the_place_that_they_lie_at(axes, spacing):
    image, middle = linear_image(axes)
    for shift in (np.zeros(3), np.array([1.3, -2.1, 0.9])):
        for size in ((12, 10, 6), (7, 9, 5)):
            crop = crop_at(image, LPS[:3, :3] @ (middle + shift), size, spacing, "point")
            _, where = contents(crop)
            assert crop.GetSize() == size and crop.GetPixelID() == sitk.sitkInt16
            np.testing.assert_allclose(crop.GetSpacing(), spacing, rtol=1e-9)
            np.testing.assert_allclose((where @ [*(np.array(size) - 1) / 2, 1])[:3], middle + shift, atol=1e-6)
            np.testing.assert_allclose(crop.GetDirection(), image.GetDirection(), atol=1e-9)
            assert_linear(crop, middle, image)


def test_crops_in_a_corner_have_air_outside():
    image = ras_image(itk_image(noise((21, 20, 19), 0, 100).astype(np.int16)))
    for corner in itertools.product((0, 20), (0, 19), (0, 18)):
        point = image.TransformIndexToPhysicalPoint(corner)
        own = np.array(image.GetSpacing())
        for spacing in (None, own, 0.5 * own, 2 * own):
            voxels, affine = contents(crop_at(image, point, (10, 10, 10), spacing, "point"))
            index = places(voxels.shape, np.linalg.inv(images.affine_of(image)) @ affine)
            outside = ((index < -1.1) | (index > np.array(image.GetSize()) + 0.1)).any(-1)
            inside = ((index > 0.6) & (index < np.array(image.GetSize()) - 1.6)).all(-1)
            assert inside.any() and outside.sum() > 300
            assert (voxels[outside] == AIR).all() and (voxels[inside] >= 0).all() and (voxels >= AIR).all()


def test_larger_voxels_are_means():
    image = ras_image(itk_image(noise((24, 24, 24), -1000, 3000).astype(np.int16)))
    voxels = contents(image)[0]
    own = np.array(image.GetSpacing())
    for factors, at in (((2, 2, 2), 4), ((3, 3, 2), 3), ((1, 4, 1), 4)):
        size = np.array([6, 5, 4])
        index = at + (size * factors - 1) / 2  # so that blocks begin at voxel `at`
        point = image.TransformContinuousIndexToPhysicalPoint(index.tolist())
        crop = contents(crop_at(image, point, size, own * factors, "point"))[0]
        part = voxels[tuple(slice(at, at + n) for n in size * factors)]
        mean = part.reshape(np.stack([size, factors], 1).ravel()).mean((1, 3, 5))
        np.testing.assert_allclose(crop, mean, rtol=0, atol=0.5 + 1e-6)
        np.testing.assert_allclose(crop, block_mean(part, factors), rtol=0, atol=1)  # as pre-training averages


def test_points_outside_are_refused():
    for axes in ALL_AXES.values():
        image = ras_image(itk_image(noise((21, 20, 19), 0, 100).astype(np.int16), axes))
        for axis, far in itertools.product(range(3), (-0.51, "end")):
            index = [5.0, 5.0, 5.0]
            index[axis] = image.GetSize()[axis] - 0.49 if far == "end" else far
            with pytest.raises(DataError, match="outside the scan: .* mm .LPS. is voxel .* of .* .RAS.") as error:
                crop_at(image, image.TransformContinuousIndexToPhysicalPoint(index), (8, 8, 8), None, "table:7")
            assert error.value.path == "table:7"
            index[axis] += 0.02 if far != "end" else -0.02
            crop_at(image, image.TransformContinuousIndexToPhysicalPoint(index), (8, 8, 8), None, "table:7")


# ------------------------------------------------------------------------------------------------- resampling, boxes


@pytest.mark.parametrize(
    "spacing", [(0.5, 0.5, 1.0), (1.0, 1.0, 2.0), (1.8, 1.4, 5.0), (2.0, 3.0, 4.0), SPACING], ids=str
)
@pytest.mark.parametrize("axes", ALL_AXES.values(), ids=ALL_AXES)
def test_resampling_keeps_the_extent_and_every_place(axes, spacing):
    image, middle = linear_image(axes)
    found = resampling.resample(image, spacing)
    np.testing.assert_allclose(found.GetSpacing(), spacing, rtol=1e-9)
    np.testing.assert_allclose(found.GetDirection(), image.GetDirection(), atol=1e-9)
    np.testing.assert_allclose(
        found.TransformContinuousIndexToPhysicalPoint([-0.5] * 3),
        image.TransformContinuousIndexToPhysicalPoint([-0.5] * 3),
        atol=1e-6,
    )
    far = found.TransformContinuousIndexToPhysicalPoint([n - 0.5 for n in found.GetSize()])
    beyond = np.array(image.TransformPhysicalPointToContinuousIndex(far)) - np.array(image.GetSize()) + 0.5
    assert (np.abs(beyond) * image.GetSpacing() <= np.array(spacing) / 2 + 1e-6).all()
    assert_linear(found, middle, image)


def test_resampling_to_the_own_spacing_changes_nothing():
    for axes in ALL_AXES.values():
        image = ras_image(itk_image(noise((9, 8, 7), -1000, 3000).astype(np.int16), axes))
        assert_is(resampling.resample(image, image.GetSpacing()), *contents(image))
        label = ras_image(itk_image(noise((9, 8, 7), 0, 5).astype(np.uint8), axes))
        found = resampling.resample(label, label.GetSpacing(), is_label=True)
        np.testing.assert_array_equal(contents(found)[0], contents(label)[0])


def test_no_air_comes_in_at_the_far_end():
    """A last voxel reaches up to half of it beyond the image."""
    for n, own, spacing in itertools.product((3, 7, 10, 11), (0.7, 1.0), (0.3, 0.5, 1.0, 1.2, 1.4, 1.5, 2.0, 3.0)):
        image = images.make_image(np.full((n, 4, 5), 100, np.int16), np.diag([own, 1.0, 2.0, 1.0]))
        assert (contents(resampling.resample(image, (spacing, 1.0, 2.0)))[0] == 100).all(), (n, own, spacing)
        label = images.make_image(np.full((n, 4, 5), 3, np.uint8), np.diag([own, 1.0, 2.0, 1.0]))
        assert (contents(resampling.resample(label, (spacing, 1.0, 2.0), is_label=True))[0] == 3).all(), (
            n,
            own,
            spacing,
        )


@pytest.mark.parametrize("spacing", [(0.53, 0.47, 1.1), (1.17, 1.1, 2.9), (2.3, 1.9, 6.1)], ids=str)
def test_labels_are_taken_from_the_nearest_voxel(spacing):
    for axes in ALL_AXES.values():
        label = ras_image(itk_image(5 * noise((21, 20, 19), 0, 5), axes))
        found, where = contents(resampling.resample(label, spacing, is_label=True))
        source, affine = contents(label)
        index = np.rint(places(found.shape, np.linalg.inv(affine) @ where)).astype(int)
        index = np.clip(index, 0, np.array(source.shape) - 1)
        assert found.dtype == np.uint8 and set(np.unique(found)) <= {0, 5, 10, 15, 20}
        assert (found == source[tuple(index.transpose(3, 0, 1, 2))]).mean() > 0.999  # a tie may go either way
        image = ras_image(itk_image(noise((21, 20, 19)).astype(np.int16), axes))
        resampled = resampling.resample(image, spacing)
        assert resampled.GetSize() == found.shape
        np.testing.assert_allclose(images.affine_of(resampled), where, atol=1e-9)  # image and label stay on one grid


UPRIGHT_SPACINGS = [(0.5, 0.6, 1.0), (1.0, 1.0, 2.0), (2.0, 3.0, 4.0), SPACING]


@pytest.mark.parametrize("spacing", UPRIGHT_SPACINGS, ids=str)
@pytest.mark.parametrize("axes", ALL_AXES.values(), ids=ALL_AXES)
def test_upright_images_show_every_place(axes, spacing):
    image, middle = linear_image(axes, (36, 31, 23))
    found = resampling.resample(image, spacing, upright=True)
    voxels, affine = contents(found)
    np.testing.assert_allclose(affine[:3, :3], np.diag(spacing), atol=1e-6)
    own = images.affine_of(image)
    shape = np.array(image.GetSize())
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in shape)))) @ own[:3, :3].T + own[:3, 3]
    low, high = (affine @ [-0.5, -0.5, -0.5, 1])[:3], (affine @ [*np.array(voxels.shape) - 0.5, 1])[:3]
    np.testing.assert_allclose(low, corners.min(0), atol=1e-6)
    assert (np.abs(high - corners.max(0)) <= np.array(spacing) / 2 + 1e-6).all()
    where = places(voxels.shape, affine)
    index = places(voxels.shape, np.linalg.inv(own) @ affine)
    reach = np.linalg.inv(own)[:3, :3] @ np.array([*itertools.product(*((-s / 2, s / 2) for s in spacing))]).T
    reach = reach.max(1) + 1e-6  # (3,) own voxels from the centre to the corner of a new one
    inside = ((index >= reach) & (index <= shape - 1 - reach)).all(-1)
    outside = ((index < -0.5 - reach) | (index > shape - 0.5 + reach)).any(-1)
    assert inside.sum() > 50 and (voxels[outside] == AIR).all()
    np.testing.assert_allclose(voxels[inside], ((where - middle) @ GRADIENT + OFFSET)[inside], rtol=0, atol=1.51)

    label = ras_image(itk_image(noise((36, 31, 23), 1, 5), axes, SPACING, (4.5, -7.25, 12.0)))
    classes, on = contents(resampling.resample(label, spacing, is_label=True, upright=True))
    np.testing.assert_allclose(on, affine, atol=1e-9)  # image and label stay on one grid
    assert classes.shape == voxels.shape and (classes[outside] == 0).all() and classes[inside].min() > 0
    nearest = np.clip(np.rint(index), 0, shape - 1).astype(int)
    expected = contents(label)[0][tuple(np.moveaxis(nearest, -1, 0))]
    clear = inside & (np.abs(index % 1 - 0.5) > 1e-4).all(-1)  # a tie may go either way
    assert clear.any() and (classes == expected)[clear].all()


def test_upright_images_are_resampled_as_ever():
    for axes in [*SIGNED_PERMUTATIONS, np.diag([-1.0, -1, 1]) + 8e-4 * np.array([[0, -1, 0], [1, 0, 0], [0, 0, 0]])]:
        for kind, high in ((np.int16, 3000), (np.uint8, 5)):
            image = ras_image(itk_image(noise((9, 8, 7), 0, high).astype(kind), axes))
            for spacing in UPRIGHT_SPACINGS:
                for is_label in (False, True)[kind == np.uint8 :]:
                    one, other = (resampling.resample(image, spacing, is_label, upright) for upright in (False, True))
                    np.testing.assert_array_equal(contents(one)[0], contents(other)[0])
                    np.testing.assert_array_equal(contents(one)[1], contents(other)[1])


def test_turned_images_are_averaged_over_all_that_a_voxel_holds():
    """Noise is left as it is by steps between far points, whatever way the voxels lie."""
    turned = Rotation.from_euler("x", 40, degrees=True).as_matrix()
    for spacing, own in (((2.1, 2.1, 2.1), (0.7, 0.7, 0.7)), ((0.7, 5.0, 5.0), (0.7, 0.7, 5.0))):
        image = ras_image(itk_image(noise((40, 60, 40), -500, 500).astype(np.int16), turned, own))
        voxels, affine = contents(resampling.resample(image, spacing, upright=True))
        index = places(voxels.shape, np.linalg.inv(images.affine_of(image)) @ affine)
        inside = ((index > 4) & (index < np.array(image.GetSize()) - 5)).all(-1)
        assert inside.sum() > 200 and voxels[inside].std() < 90  # 289 before, 140 or more at points between voxels


def test_boxes_around_labels():
    mask = np.zeros((31, 27, 19), np.uint8)
    mask[10:14, 3, 5:17] = 2
    for axes in ALL_AXES.values():
        label = ras_image(itk_image(mask, axes))
        image = ras_image(itk_image(noise(mask.shape).astype(np.int16), axes))
        inside = np.argwhere(contents(label)[0])
        for margin in (0, 1.7, 4.0, 1000):
            first, size = resampling.mask_box(label != 0, image, margin)
            extra = np.ceil(margin / np.array(image.GetSpacing()) - 1e-9)
            low = np.maximum(inside.min(0) - extra, 0)
            high = np.minimum(inside.max(0) + 1 + extra, image.GetSize())
            np.testing.assert_array_equal(first, low)
            np.testing.assert_array_equal(first + size, high)
            part = resampling.crop_to_box(image, (first, size))
            voxels, affine = contents(part)
            np.testing.assert_array_equal(
                voxels, contents(image)[0][tuple(slice(a, a + n) for a, n in zip(first, size))]
            )
            np.testing.assert_allclose(affine[:3, 3], (images.affine_of(image) @ [*first, 1])[:3], atol=1e-9)
            np.testing.assert_allclose(affine[:3, :3], images.affine_of(image)[:3, :3], atol=1e-9)
        first, size = resampling.mask_box(label > 7, image, 3)
        assert (first == 0).all() and (size == image.GetSize()).all()


@pytest.mark.parametrize(
    "shape, spacing",
    [((96, 80, 40), (3.3, 3.2, 7.0)), ((97, 83, 41), (3.3, 3.2, 7.0)), ((98, 81, 54), (3.2, 3.1, 5.3))],
)
def test_the_box_around_the_body_holds_all_of_it(shape, spacing):
    for seed, (before, behind) in enumerate(
        [((5, 20, 3), (17, 11, 6)), ((0, 7, 0), (30, 2, 11)), ((23, 0, 9), (0, 21, 0))]
    ):
        scan, affine = chest_phantom(seed, shape, spacing)
        wide = np.pad(scan, list(zip(before, behind)), constant_values=-1000)
        if before[1] > 15:
            wide[20:60, 1:3] = 200  # something small and dense apart from the body stays out
        image = images.make_image(wide, affine)
        labelled, _ = scipy.ndimage.label(wide > -300)
        body = labelled == np.bincount(labelled[labelled > 0]).argmax()
        inside = np.argwhere(scipy.ndimage.binary_opening(body))  # noise at its skin may be cut
        for margin in (0.0, 10.0):
            first, size = resampling.body_box(image, margin)
            extra = margin / np.array(spacing)
            assert (first <= np.maximum(inside.min(0) - extra, 0) + 0.5).all()
            assert (first + size >= np.minimum(inside.max(0) + 1 + extra, wide.shape) - 0.5).all()
            assert (first >= inside.min(0) - extra - 8).all() and (first + size <= inside.max(0) + 1 + extra + 8).all()
    air = images.make_image(np.full((30, 20, 10), -1000, np.int16), np.eye(4))
    first, size = resampling.body_box(air, 5.0)
    assert (first == 0).all() and tuple(size) == (30, 20, 10)
    tiny = images.make_image(np.full((3, 2, 1), 40, np.int16), np.eye(4))
    assert tuple(resampling.body_box(tiny, 0.0)[1]) == (3, 2, 1)


# ---------------------------------------------------------------------------------------------------- written as NIfTI


def test_nifti_has_the_same_bytes_a_second_later_under_another_name(tmp_path):
    image = ras_image(itk_image(smooth(), OBLIQUE))
    images.save_image(tmp_path / "a.nii.gz", image)
    time.sleep(1.1)  # gzip keeps whole seconds
    images.save_image(str(tmp_path / "part.123.nii.gz"), image)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "part.123.nii.gz").read_bytes()


@pytest.mark.parametrize("axes", ALL_AXES.values(), ids=ALL_AXES)
def test_nifti_is_read_back_by_others(axes, tmp_path):
    path = tmp_path / "ct.nii.gz"
    for image in (
        ras_image(itk_image(noise(low=-1024, high=32768).astype(np.int16), axes)),
        ras_image(itk_image(noise(high=256).astype(np.uint8), axes)),
    ):
        images.save_image(path, image)
        voxels, affine = contents(image)
        read = nibabel.load(path)
        assert read.get_data_dtype() == voxels.dtype
        np.testing.assert_array_equal(np.asanyarray(read.dataobj), voxels)
        np.testing.assert_allclose(read.affine, affine, rtol=0, atol=1e-4)
        np.testing.assert_allclose(read.get_qform(), read.get_sform(), rtol=0, atol=1e-4)
        assert read.header["qform_code"] == read.header["sform_code"] == 1 and read.header.get_xyzt_units()[0] == "mm"
        assert np.isnan(read.header["scl_slope"]) or read.header["scl_slope"] == 1
        itk = sitk.ReadImage(path)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).transpose(2, 1, 0), voxels)
        np.testing.assert_allclose(contents(itk)[1], affine, rtol=0, atol=1e-4)
        with Volume(path) as volume:
            np.testing.assert_array_equal(volume.read_labels() if voxels.dtype == np.uint8 else volume.read(), voxels)
            np.testing.assert_allclose(volume.affine, affine, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ the converters


def scan_of(axes, seed, shape=(30, 26, 22)):
    """(stored HU with padding, affine): a scan as the archives hold it, and where."""
    stored = noise(shape, -1000, 1500, seed).astype(np.int16)
    stored[:2], stored[:, -1] = -2000, -3024
    return stored, affine_to_ras(axes, (2.0, 1.5, 2.5), (10.0 * seed, -40.0, 300.0))


def write_scan(path, stored, affine):
    """Write an (x, y, z) array at an affine to RAS in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    sitk.WriteImage(itk_image(stored, lps[:3, :3] / spacing, spacing.tolist(), lps[:3, 3].tolist()), str(path), True)


FORMATS = (".nii.gz", ".mha", ".mhd", ".nrrd", ".hdf5", ".nii", ".nhdr")


def test_every_geometry_is_converted_for_pretraining(run, tmp_path):  # noqa: F811
    expected = {}
    for number, (name, axes) in enumerate(AXES.items()):
        stored, affine = scan_of(axes, number)
        folder = tmp_path / "input" / "dicom" / f"{number}"
        order = np.random.default_rng(number).permutation(stored.shape[2])
        write_dicom(
            folder,
            stored + np.int16(1024),
            axes,
            (2.0, 1.5, 2.5),
            (10.0 * number, -40.0, 300.0),
            signed=True,
            names=[f"{k:03d}" for k in order],
            PatientID=f"dicom{number}",
            StudyInstanceUID=f"1.2.{number}",
            SeriesInstanceUID=f"1.2.{number}.1",
        )
        expected[f"dicom{number}"] = canonical(stored, affine)
    for number, (name, axes) in enumerate(ALL_AXES.items()):
        stored, affine = scan_of(axes, number)
        write_scan(tmp_path / "input" / f"file{number}" / f"scan{FORMATS[number % len(FORMATS)]}", stored, affine)
        expected[f"file{number}"] = canonical(stored, affine)
    result = run(
        "nlst", "--input", tmp_path / "input", "--output", tmp_path / "out", "--compression", "gzip", "--min_slices", 4
    )
    assert result.code == 0, result.errors
    rows = manifest(tmp_path / "out")
    assert len(rows) == len(expected)
    for row in rows.values():
        voxels, affine = expected.pop(row["output"].split("/")[0])
        itk = sitk.ReadImage(tmp_path / "out" / row["output"])
        found, where = contents(sitk.DICOMOrient(itk, "RAS"))
        np.testing.assert_array_equal(found, as_hu(voxels))
        np.testing.assert_allclose(where, affine, rtol=0, atol=1e-4)
        with Volume(tmp_path / "out" / row["output"]) as volume:
            np.testing.assert_array_equal(volume.read(), as_hu(voxels))
            np.testing.assert_allclose(volume.affine, affine, rtol=0, atol=1e-4)
        assert row["shape"] == " x ".join(map(str, voxels.shape)) and (row["hu_min"], row["status"]) == (
            "-1024",
            "written",
        )
    assert not expected


def bright(voxels, affine):
    """RAS mm of the middle of what is brighter than air."""
    weights = np.maximum(voxels.astype(float) + 900, 0)
    return (affine @ [*scipy.ndimage.center_of_mass(weights), 1])[:3]


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.7, 0.7, 1.4), (5.0, 4.0, 6.0), (0, 0, 0)], ids=str)
def test_nodules_lie_at_the_middle_of_their_crops(spacing, run, tmp_path):  # noqa: F811
    """A ball of tissue in air around each point of the table, wherever the axes of the scan point to."""
    points, table = {}, ["seriesuid,coordX,coordY,coordZ,class"]
    for number, axes in enumerate(ALL_AXES.values()):
        shape, own = (50, 44, 38), (1.7, 1.9, 2.3)
        affine = affine_to_ras(axes, own, (10.0 * number, -40.0, 300.0))
        index = np.random.default_rng(number).uniform(16, np.array(shape) - 16)
        point = (affine @ [*index, 1])[:3]
        distance = np.linalg.norm(places(shape, affine) - point, axis=-1)
        scan = np.clip(-1000 + 1000 * (9.5 - distance), -1000, 0).astype(np.int16)
        suffix = (".mhd", ".nii.gz", ".mha", ".nrrd")[number % 4]
        write_scan(tmp_path / "input" / "subset0" / f"1.2.{number}{suffix}", scan, affine)
        points[f"1.2.{number}"] = LPS[:3, :3] @ point
        table += [",".join([f"1.2.{number}", *(f"{value:.6f}" for value in LPS[:3, :3] @ point), str(number % 2)])]
    (tmp_path / "input" / "candidates_V2.csv").write_text("\n".join(table) + "\n")
    result = run(
        "luna16",
        "--input",
        tmp_path / "input",
        "--output",
        tmp_path / "out",
        "--size",
        20,
        21,
        22,
        "--spacing",
        *spacing,
    )
    assert result.code == 0, result.errors
    rows = manifest(tmp_path / "out")
    assert len(rows) == len(points)
    for row in rows.values():
        assert row["status"] == "written", row
        point = LPS[:3, :3] @ points[row["patient"]]  # RAS
        crop = nibabel.load(tmp_path / "out" / row["output"])
        voxels, affine = np.asarray(crop.dataobj), crop.affine
        assert voxels.shape == (20, 21, 22)
        step = np.linalg.norm(affine[:3, :3], axis=0)
        np.testing.assert_allclose(np.sort(step), np.sort(spacing if any(spacing) else (1.7, 1.9, 2.3)), atol=1e-4)
        centre = (affine @ [9.5, 10, 10.5, 1])[:3]
        off = np.linalg.solve(affine[:3, :3], np.stack([centre, bright(voxels, affine)], 1) - point[:, None])
        assert np.abs(off[:, 0]).max() <= (0.501 if not any(spacing) else 1e-3)  # the grid's middle
        if (step * (20, 21, 22) > 20).all() and step.max() < 3:
            assert np.abs(off[:, 1]).max() <= 0.1  # and the ball's, in voxels
        elif (step * (20, 21, 22) > 20).all():
            assert np.abs(off[:, 1]).max() <= 0.5


def test_images_and_labels_stay_on_each_other(run, tmp_path):  # noqa: F811
    expected = {}
    for number, axes in enumerate(ALL_AXES.values()):
        stored, affine = scan_of(axes, number)
        label = (noise(stored.shape, 0, 20, number) == 0).astype(np.uint8) * noise(stored.shape, 1, 3, 99).astype(
            np.uint8
        )
        write_scan(tmp_path / "task" / "imagesTr" / f"case{number}.nii.gz", stored, affine)
        write_scan(tmp_path / "task" / "labelsTr" / f"case{number}.nii.gz", label, affine)
        expected[f"case{number}"] = canonical(as_hu(stored), affine), canonical(label, affine)
    result = run("msd", "--input", tmp_path / "task", "--output", tmp_path / "out")
    assert result.code == 0, result.errors
    pairs, problems = find_pairs(tmp_path / "out")
    assert not problems and [pair.name for pair in pairs] == sorted(expected)
    for pair in pairs:
        (voxels, affine), (classes, _) = expected[pair.name]
        image, label, where = read_pair(pair)
        np.testing.assert_array_equal(image, voxels)
        np.testing.assert_array_equal(label, classes)
        np.testing.assert_allclose(where, affine, rtol=0, atol=1e-4)
        for path, array in ((pair.image, voxels), (pair.label, classes)):
            found = nibabel.load(path)
            np.testing.assert_array_equal(np.asarray(found.dataobj), array)  # RAS in the file
            np.testing.assert_allclose(found.affine, affine, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ("--spacing", 1.0, 1.0, 1.0),
        ("--crop", "label", "--margin", 6),
        ("--crop", "body", "--margin", 4),
        ("--spacing", 3.0, 2.5, 4.0, "--crop", "label"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_resampled_and_cut_cases_keep_the_lesion_in_its_place(flags, run, tmp_path):  # noqa: F811
    lesions = {}
    for number, axes in enumerate(ALL_AXES.values()):
        shape, own = (44, 40, 36), (1.7, 1.9, 2.3)
        affine = affine_to_ras(axes, own, (10.0 * number, -40.0, 300.0))
        point = (affine @ [*np.random.default_rng(number).uniform(14, np.array(shape) - 14), 1])[:3]
        distance = np.linalg.norm(places(shape, affine) - point, axis=-1)
        scan = np.clip(-1000 + 1000 * (11 - distance), -1000, 0).astype(np.int16)
        write_scan(tmp_path / "task" / "imagesTr" / f"case{number}.nii.gz", scan, affine)
        write_scan(
            tmp_path / "task" / "labelsTr" / f"case{number}.nii.gz", 2 * (distance < 10).astype(np.uint8), affine
        )
        lesions[f"case{number}"] = point
    result = run("msd", "--input", tmp_path / "task", "--output", tmp_path / "out", *flags)
    assert result.code == 0, result.errors
    for pair in find_pairs(tmp_path / "out")[0]:
        image, label, affine = read_pair(pair)
        inside = (affine @ [*scipy.ndimage.center_of_mass(label), 1])[:3]
        quarter = 0.25 * max(np.linalg.norm(affine[:3, :3], axis=0).max(), max(own))  # of a voxel
        np.testing.assert_allclose(inside, lesions[pair.name], atol=quarter)
        np.testing.assert_allclose(bright(image, affine), lesions[pair.name], atol=quarter)
        assert set(np.unique(label)) == {0, 2}
        volume = (label > 0).sum() * abs(np.linalg.det(affine[:3, :3]))
        np.testing.assert_allclose(volume, 4 / 3 * np.pi * 10**3, rtol=0.15)
        assert image[label > 0].min() > -1000 or "--spacing" in flags
        lesions.pop(pair.name)
    assert not lesions


# ------------------------------------------------------------------------------------------------------------- real CT


def test_real_nodules_lie_in_their_crops(shared_data):
    lines = (shared_data / "luna16" / "annotations.csv").read_text().split()[1:]
    read = {}
    for line in lines:
        series, *numbers = line.split(",")
        *point, diameter = map(float, numbers)
        if series not in read:
            (path,) = (shared_data / "luna16").glob(f"subset*/{series}.mhd")
            read[series] = read_image(str(path)), sitk.ReadImage(path)
            voxels, affine = contents(read[series][1])
            assert_is(read[series][0], *canonical(as_hu(voxels), affine))
        image, itk = read[series]
        crop = crop_at(image, point, (48, 48, 24), (0.7, 0.7, 1.4), line)
        voxels, affine = contents(crop)
        np.testing.assert_allclose((affine @ [23.5, 23.5, 11.5, 1])[:3], LPS[:3, :3] @ point, atol=1e-6)
        distance = np.linalg.norm(places(voxels.shape, affine) - LPS[:3, :3] @ point, axis=-1)
        assert voxels[distance < diameter / 4].mean() > -300  # dense where the table says, and as ITK has it there
        at = itk.TransformPhysicalPointToIndex(point)
        native = crop_at(image, point, (1, 1, 1), None, line)
        assert contents(native)[0].item() == max(itk.GetPixel(at), AIR)


def test_real_masks_lie_on_dense_tissue(shared_data, run, tmp_path):  # noqa: F811
    task = shared_data / "msd" / "Task06_Lung"
    (tmp_path / "task").mkdir()
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / "task" / kind).mkdir()
        shutil.copy(task / kind / "lung_001.nii.gz", tmp_path / "task" / kind)
    result = run("msd", "--input", tmp_path / "task", "--output", tmp_path / "out")
    assert result.code == 0, result.errors
    (pair,), problems = find_pairs(tmp_path / "out")
    image, label, affine = read_pair(pair)
    for path, array in (("imagesTr", image), ("labelsTr", label)):
        voxels, where = canonical(
            np.asarray(nibabel.load(task / path / "lung_001.nii.gz").dataobj),
            nibabel.load(task / path / "lung_001.nii.gz").affine,
        )
        np.testing.assert_array_equal(array, as_hu(voxels))
        np.testing.assert_allclose(affine, where, rtol=0, atol=1e-3)
    assert not problems and image[label > 0].mean() > image[label == 0].mean() + 100


# ---------------------------------------------------------------------------------------------------- labels and crops


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def told(problems, folder):
    """{path relative to the folder: reason} of DataErrors."""
    assert all(type(problem) is DataError for problem in problems)
    found = {os.path.relpath(problem.path, folder): problem.reason for problem in problems}
    assert len(found) == len(problems)
    return found


GOOD_CROPS = [
    "subset0/label0/p1/a.nii.gz",
    "subset0/label0/p1/b.nii.gz",
    "subset0/label1/p2/a.nii.gz",
    "subset1/label0/p3/a.nii",
    "subset1/label1/p4/a.hdf5",
    "subset10/1/p5/a.h5",
    "subset10/0/p6/a.nii.gz",
]


def test_crops_are_found_with_label_patient_and_subset(tmp_path):
    touch(
        tmp_path,
        *GOOD_CROPS,
        "manifest.csv",
        "other/label7/p/a.nii.gz",
        ".hidden/subset0/label1/p/a.nii.gz",
        "subset0/notes.txt",
        "subset0/.DS_Store",
        "subset0/.cache/x.nii.gz",
        "subset1/label0/p3/._a.nii",
        "subset.txt",
        "subset0/label1/p2/notes.txt",
    )
    crops, problems = find_crops(tmp_path)
    assert problems == []
    assert crops == [
        Crop(str(tmp_path / name), int(name.split("/")[1][-1]), name.split("/")[2], name.split("/")[0])
        for name in sorted(GOOD_CROPS)
    ]


def test_everything_that_is_wrong_with_crops_is_named(tmp_path):
    touch(
        tmp_path,
        *GOOD_CROPS,
        "subset0/nodules/p9/a.nii.gz",
        "subset0/label1/alone.nii.gz",
        "subset1/label1/p4/deeper/a.nii.gz",
        "subset1/alone.nii.gz",
        "subset0/label-1/p/a.nii.gz",
    )
    (tmp_path / "subset1" / "label2").mkdir()
    crops, problems = find_crops(tmp_path)
    assert [crop.path for crop in crops] == [str(tmp_path / name) for name in sorted(GOOD_CROPS)]
    assert told(problems, tmp_path) == {
        "subset0/nodules": "is no label folder: expected label0, label1, ... or 0, 1, ...",
        "subset0/label-1": "is no label folder: expected label0, label1, ... or 0, 1, ...",
        "subset1/label2": "holds no crop: expected <patient>/<name>.nii.gz below it, or remove it",
        "subset0/label1/alone.nii.gz": "expected as subset*/label<k>/<patient>/<name>.nii.gz",
        "subset1/label1/p4/deeper/a.nii.gz": "expected as subset*/label<k>/<patient>/<name>.nii.gz",
        "subset1/alone.nii.gz": "expected as subset*/label<k>/<patient>/<name>.nii.gz",
    }


@pytest.mark.parametrize(
    "names, reason",
    [
        ([], "holds no crops"),
        (["subset0/notes.txt"], "holds no crops"),
        (["p1/t0/a.hdf5"], "holds no crops"),
        (
            ["subset0/label0/p1/a.nii.gz", "subset1/label0/p2/a.nii.gz"],
            r"one class only \(label0\), expected at least two",
        ),
        (
            ["subset0/label0/p1/a.nii.gz", "subset1/label2/p2/a.nii.gz"],
            "has the classes 0, 2: expected 0 to 1 without a gap",
        ),
        (
            ["subset0/label1/p1/a.nii.gz", "subset1/label2/p2/a.nii.gz"],
            "has the classes 1, 2: expected 0 to 1 without a gap",
        ),
        (
            ["subset0/label0/p1/a.nii.gz", "subset1/label1/p1/a.nii.gz", "subset1/label1/p2/a.nii.gz"],
            "has patient p1 in subset0 and subset1: expected every patient in one subset",
        ),
    ],
)
def test_crops_that_cannot_be_trained_on_together(names, reason, tmp_path):
    touch(tmp_path, *names)
    _, problems = find_crops(tmp_path)
    assert len(problems) == 1 and problems[0].path == str(tmp_path)
    assert re.search(reason, problems[0].reason)


def test_a_missing_folder_of_crops_or_pairs_is_named(tmp_path):
    touch(tmp_path, "file", "half/images/a.nii.gz")
    for find, folder, wrong in (
        (find_crops, "gone", "gone"),
        (find_crops, "file", "file"),
        (find_pairs, "gone", "gone"),
        (find_pairs, "half", "half/labels"),
    ):
        with pytest.raises(DataError, match="no such folder|is a file, expected a folder") as error:
            find(tmp_path / folder)
        assert error.value.path == str(tmp_path / wrong)


def test_pairs_are_found_by_name_whatever_the_suffix(tmp_path):
    touch(
        tmp_path,
        "images/b.nii.gz",
        "labels/b.NII",
        "images/a.hdf5",
        "labels/a.nii.gz",
        "images/c.d.nii.gz",
        "labels/c.d.nii.gz",
        "images/._a.nii.gz",
        "images/notes.txt",
        "manifest.csv",
    )
    pairs, problems = find_pairs(tmp_path)
    assert problems == []
    assert pairs == [
        Pair("a", str(tmp_path / "images/a.hdf5"), str(tmp_path / "labels/a.nii.gz")),
        Pair("b", str(tmp_path / "images/b.nii.gz"), str(tmp_path / "labels/b.NII")),
        Pair("c.d", str(tmp_path / "images/c.d.nii.gz"), str(tmp_path / "labels/c.d.nii.gz")),
    ]
    assert [stem(name) for name in ("x/a.nii.gz", "a.NII", "a.b.hdf5", "a.h5", "a")] == ["a", "a", "a.b", "a", "a"]


def test_everything_that_is_wrong_with_pairs_is_named(tmp_path):
    touch(
        tmp_path,
        "images/a.nii.gz",
        "labels/a.nii.gz",
        "images/b.nii.gz",
        "labels/c.nii.gz",
        "images/a.nii",
        "labels/deeper/a.nii.gz",
    )
    pairs, problems = find_pairs(tmp_path)
    found = told(problems, tmp_path)
    assert found == {
        "images/a.nii.gz": f"has the same name as {tmp_path / 'images/a.nii'}: expected one file of each name",
        "labels/deeper/a.nii.gz": (
            f"has the same name as {tmp_path / 'labels/a.nii.gz'}: expected one file of each name"
        ),
        "images/b.nii.gz": "has no label of the same name",
        "labels/c.nii.gz": "has no image of the same name",
    }
    assert [pair.name for pair in pairs] == ["a"]
    touch(tmp_path, "empty/images/x.txt", "empty/labels/x.txt")
    pairs, (problem,) = find_pairs(tmp_path / "empty")
    assert pairs == [] and "holds no cases" in problem.reason


def test_grids_are_the_same_to_a_tenth_of_a_voxel():
    affine, shape = affine_to_ras(OBLIQUE), (40, 30, 20)

    def off(by=np.zeros(3), turn=0.0, scale=1.0):
        other = affine.copy()
        other[:3, :3] = Rotation.from_euler("z", turn, degrees=True).as_matrix() @ affine[:3, :3] * scale
        other[:3, 3] += by
        return other_grid(shape, other, shape, affine)

    assert off() is None and off([0.06, 0, 0]) is None and off(turn=0.05) is None and off(scale=1 + 1e-4) is None
    noisy = affine.astype(np.float32) + np.float32(1e-5)
    assert other_grid(shape, noisy, shape, affine) is None
    for reason in (off([0.08, 0, 0]), off([0, 0, -2.5]), off(turn=1.0), off(scale=1.01), off([np.nan, 0, 0])):
        assert re.fullmatch(r"lies elsewhere than its image: up to [\d.naN]+ mm apart at the corners", reason)
    assert "up to 2.5 mm" in off([0, 0, -2.5])
    flipped = affine @ np.diag([-1, 1, 1, 1])
    assert "elsewhere" in other_grid(shape, flipped, shape, affine)
    assert other_grid((40, 30, 21), affine, shape, affine) == (
        "has another shape than its image: 40 x 30 x 21, not 40 x 30 x 20"
    )


def save(path, voxels, affine=LPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return str(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_labels_of_any_number_type_are_read(dtype, tmp_path):
    stored = noise(high=256).astype(dtype)
    with Volume(save(tmp_path / "label.nii.gz", stored)) as volume:
        labels = volume.read_labels()
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, stored[::-1, ::-1])


@pytest.mark.parametrize(
    "value, said", [(0.5, "0.5"), (-1, "-1"), (300, "300"), (np.nan, "nan"), (np.inf, "inf"), (255.5, "255.5")]
)
def test_labels_that_are_no_classes_are_refused(value, said, tmp_path):
    path = save(tmp_path / "label.nii.gz", with_(noise(high=3), value))
    with (
        Volume(path) as volume,
        pytest.raises(DataError, match=f"has label values such as {said}, expected whole") as error,
    ):
        volume.read_labels()
    assert error.value.path == path


def test_a_pair_is_read_in_ras(tmp_path):
    image, label = noise(low=-3000, high=3000).astype(np.int16), noise(high=3).astype(np.uint8)
    for axes in ALL_AXES.values():
        affine = affine_to_ras(axes)
        pair = Pair("a", save(tmp_path / "image.nii.gz", image, affine), save(tmp_path / "label.nii.gz", label, affine))
        voxels, classes, where = read_pair(pair)
        np.testing.assert_array_equal(voxels, as_hu(canonical(image, affine)[0]))
        np.testing.assert_array_equal(classes, canonical(label, affine)[0])
        np.testing.assert_allclose(where, canonical(image, affine)[1], rtol=0, atol=1e-4)
        assert (voxels.dtype, classes.dtype) == (np.int16, np.uint8)
        other = affine_to_ras(axes) @ np.array([[-1, 0, 0, 7], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        save(tmp_path / "label.nii.gz", label[::-1], other)  # the same voxels, stored from the other side
        np.testing.assert_array_equal(read_pair(pair)[1], classes)
        write_volume(tmp_path / "image.hdf5", voxels, where)
        np.testing.assert_array_equal(read_pair(Pair("a", tmp_path / "image.hdf5", pair.label))[0], voxels)


@pytest.mark.parametrize(
    "label, affine, reason",
    [
        (noise((8, 5, 7)), LPS, "has another shape than its image: 8 x 5 x 7, not 8 x 5 x 6"),
        (noise(), LPS @ np.diag([1, 1, 1.1, 1]), "lies elsewhere than its image: up to 0.5 mm"),
        (with_(noise(high=3), 0.5), LPS, "has label values such as 0.5"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(label, affine, reason, tmp_path):
    pair = Pair(
        "a",
        save(tmp_path / "image.nii.gz", noise().astype(np.int16)),
        save(tmp_path / "label.nii.gz", label.astype(np.float32) % 256, affine),
    )
    with pytest.raises(DataError, match=reason) as error:
        read_pair(pair)
    assert error.value.path == pair.label


def test_voxels_outlive_the_name_of_their_image():
    """An image that nothing but its voxels refers to, while memory of its size is asked for again and again."""

    def image(value):
        return images.make_image(np.full((64, 64, 64), value, np.int16), np.eye(4))

    voxels = images.voxels_of(image(7))
    others = [images.voxels_of(image(value)).copy() for value in range(20)]
    assert (voxels == 7).all() and not voxels.flags.writeable and len(others) == 20
