"""dino3d/data: volumes against SimpleITK and nibabel, partial reads, broken files, and the order and content of
batches."""

import contextlib
import errno
import functools
import gc
import gzip
import itertools
import os
import re
import time
from collections import Counter
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
import torch
from torch.utils.data import DataLoader

from augmentations import MultiCropAugmentation, Policy
from dino3d.data import layouts, read_watchdog, volume_cache
from dino3d.data import volume as volume_module
from dino3d.data.conventions import AIR, VOLUME_SUFFIXES, DataError
from dino3d.data.hdf5 import CHUNK, FILTERS, write_volume
from dino3d.data.layouts import find_volumes, list_volumes, read_data_list
from dino3d.data.pretraining import (
    PATCHES_PER_READ,
    RUNS_AT_ONCE,
    BatchStream,
    PretrainingPatches,
    block_mean,
    collate,
    epoch_order,
    place_patch,
)
from dino3d.data.read_watchdog import with_read_timeout
from dino3d.data.volume import Volume

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
PERMUTED = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
SIGNED_PERMUTATIONS = [
    np.eye(3)[list(axes)] * signs
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def rotation(degrees_x, degrees_z):
    (cx, cz), (sx, sz) = np.cos(np.radians([degrees_x, degrees_z])), np.sin(np.radians([degrees_x, degrees_z]))
    return np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]) @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])


DIRECTIONS = {  # LPS, columns are the axes of the file
    "axial": np.eye(3),
    "upside down": np.diag([1.0, 1, -1]),
    "prone": np.diag([-1.0, -1, 1]),
    "left-handed": np.diag([-1.0, 1, 1]),
    "permuted": PERMUTED,
    "permuted and flipped": PERMUTED @ np.diag([1.0, -1, -1]),
    "oblique": rotation(11, -17),
    "oblique, permuted and flipped": rotation(-14, 9) @ PERMUTED @ np.diag([-1.0, 1, -1]),
}


def noise(shape, low=-1024, high=3000, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)


def itk_image(directions, shape=(9, 13, 6), spacing=(0.7, 0.9, 2.5), origin=(-31.25, 47.5, -803.1), voxels=None):
    """A SimpleITK image whose axes are the columns of `directions`; voxels: (x, y, z)."""
    image = sitk.GetImageFromArray((noise(shape) if voxels is None else voxels).transpose(2, 1, 0))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(directions.ravel())
    return image


def itk_affine(image):
    """(4, 4) from voxel indices to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


def in_ras(image):
    """(voxels (x, y, z), affine) in RAS, by ITK's own reorientation."""
    image = sitk.DICOMOrient(image, "RAS")
    affine = itk_affine(image)
    assert (np.abs(affine[:3, :3]).argmax(0) == [0, 1, 2]).all() and (np.diag(affine) > 0).all()  # its RAS is nibabel's
    return sitk.GetArrayFromImage(image).T, affine


def padded_part(volume, start, size):
    """The part of a whole volume by slicing a copy with a wide border of air."""
    wide = np.pad(volume, 100, constant_values=AIR)
    return wide[tuple(slice(100 + a, 100 + a + n) for a, n in zip(start, size))]


def open_files():
    """How many files this process holds open; None where the system doesn't say."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None


@pytest.fixture
def nothing_left_open():
    before = open_files()
    yield
    if open_files() != before:
        gc.collect()  # what pytest keeps of an expected error may hold a memory map
    assert before is None or open_files() <= before  # fewer where files of another test were closed meanwhile


@functools.cache
def crops(policy=Policy(), global_size=(16, 16, 8), local_size=(8, 8, 4), local_number=3, spacing=None):
    return MultiCropAugmentation(policy, global_size, local_size, local_number, spacing)


ALL = Policy(rotation=30, scale=0.25, flip=1, elastic=0.4, gaussian=2, histogram=10)


# ------------------------------------------------------------------------------------------- read as SimpleITK reads


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_itk_file_reads_as_itk_reorients_it(directions, compressed, tmp_path, nothing_left_open):
    image = itk_image(directions)
    sitk.WriteImage(image, tmp_path / "ct.hdf5", useCompression=compressed)
    voxels, affine = in_ras(image)
    with Volume(tmp_path / "ct.hdf5") as volume:
        assert volume.shape == voxels.shape
        np.testing.assert_allclose(volume.affine, affine, rtol=0, atol=1e-6)
        np.testing.assert_allclose(volume.spacing, np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-9)
        read = volume.read()
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read, voxels)


def test_voxels_keep_their_place_in_the_patient(tmp_path):
    """No reorientation on the expected side: ITK says where each voxel of the file lies."""
    for number, directions in enumerate(DIRECTIONS.values()):
        image = itk_image(directions)
        sitk.WriteImage(image, tmp_path / f"{number}.hdf5")
        with Volume(tmp_path / f"{number}.hdf5") as volume:
            ras, to_index = volume.read(), np.linalg.inv(volume.affine)
        for index in np.random.default_rng(number).integers(0, image.GetSize(), (50, 3)).tolist():
            x, y, z = image.TransformIndexToPhysicalPoint(index)
            at = (to_index @ [-x, -y, z, 1])[:3]
            np.testing.assert_allclose(at, np.rint(at), atol=1e-6)
            assert ras[tuple(np.rint(at).astype(int))] == image.GetPixel(*index)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_nifti_reads_as_nibabel_reorients_it(directions, suffix, tmp_path, nothing_left_open):
    path, affine = tmp_path / f"ct{suffix}", itk_affine(itk_image(directions))
    nibabel.save(nibabel.Nifti1Image(noise((9, 13, 6)), affine), path)
    expected = nibabel.as_closest_canonical(nibabel.load(path))
    with Volume(path) as volume:
        np.testing.assert_allclose(volume.affine, expected.affine, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(volume.read(), expected.get_fdata())
        np.testing.assert_array_equal(volume.read(), in_ras(sitk.ReadImage(path))[0])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "dtype, slope, inter",
    [
        ("u1", 4.0, -1024.0),
        ("<i2", 1.0, -1024.0),
        ("<i2", 0.37, 11.5),
        ("<i2", np.nan, np.nan),
        (">i2", 1.0, 0.0),
        (">i2", 2.5, -7.0),
        ("<i4", 2.0, 0.0),
        ("<f4", 1.0, 0.0),
        ("<f8", 0.5, 0.25),
    ],
)
def test_nifti_scaling_is_applied_and_rounded(dtype, slope, inter, suffix, tmp_path):
    stored = np.random.default_rng(0).uniform(0, 255, (7, 5, 6)).astype(dtype)
    header = nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_shape(stored.shape)
    header.set_data_dtype(dtype)
    header.set_sform(LPS, code=1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = slope, inter, 352, b"n+1"
    content = header.binaryblock + bytes(4) + stored.tobytes(order="F")  # by hand: nibabel chooses its own scaling
    (tmp_path / f"ct{suffix}").write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    expected = np.rint(stored.astype(np.float64) * np.float32(np.nan_to_num(slope, nan=1)) + np.nan_to_num(inter))
    with Volume(tmp_path / f"ct{suffix}") as volume:
        read = volume.read()
        assert type(read) is np.ndarray and read.dtype == np.int16 and read.dtype.isnative
        np.testing.assert_array_equal(read, expected[::-1, ::-1])
        np.testing.assert_array_equal(volume.read((1, 2, 3), (3, 3, 3)), expected[::-1, ::-1][1:4, 2:5, 3:6])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64])
def test_other_voxel_types_are_rounded_and_clipped(dtype, tmp_path):
    values = np.array([-1e6, -32769, -3024, -1025, -1024.4, -0.6, 0.4, 99.6, 200, 32766.4, 32768, 65535, 1e6])
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    stored = values.clip(float(limits.min), float(limits.max)).astype(dtype)
    sitk.WriteImage(itk_image(np.eye(3), voxels=stored.reshape(13, 1, 1)), tmp_path / "ct.hdf5")
    with h5py.File(tmp_path / "ct.hdf5") as file:
        assert file["ITKImage/0/VoxelData"].dtype == dtype
    with Volume(tmp_path / "ct.hdf5") as volume:
        read = volume.read()[::-1, 0, 0]
    assert read.dtype == np.int16
    expected = [min(max(round(float(value)), AIR), 32767) for value in stored]
    assert read.tolist() == expected


# ------------------------------------------------------------------------------------------ written as SimpleITK writes


@pytest.mark.parametrize("compression", ["gzip", "none"])
@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_simpleitk_opens_what_is_written(directions, compression, tmp_path, nothing_left_open):
    image = itk_image(directions, shape=(35, 13, 6))
    path = tmp_path / "new" / "folders" / "ct.hdf5"
    write_volume(path, sitk.GetArrayFromImage(image).T, itk_affine(image), compression)
    read = sitk.ReadImage(path)
    assert read.GetPixelID() == sitk.sitkInt16
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(image))
    for what in ("Size", "Spacing", "Origin", "Direction"):
        np.testing.assert_allclose(getattr(read, f"Get{what}")(), getattr(image, f"Get{what}")(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("compression", FILTERS)
def test_layout_is_that_of_itk(compression, tmp_path):
    image = itk_image(DIRECTIONS["oblique"], shape=(35, 40, 6))
    sitk.WriteImage(image, tmp_path / "itk.hdf5")
    write_volume(tmp_path / "ours.hdf5", sitk.GetArrayFromImage(image).T, itk_affine(image), compression)

    def is_string(item):
        kind = h5py.check_string_dtype(item.dtype)
        return kind and kind.length  # whether they are marked as ASCII or UTF-8 is the same to ITK

    def layout(path):
        found = {}
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item: found.update(
                    {name: (item.dtype, item.shape, is_string(item)) if isinstance(item, h5py.Dataset) else ()}
                )
            )
            fixed = {
                name: file[f"ITKImage/0/{name}"][()]
                for name in ("Dimension", "Directions", "Origin", "Spacing", "VoxelType")
            }
        return found, fixed

    (found, fixed), (expected, expected_fixed) = layout(tmp_path / "ours.hdf5"), layout(tmp_path / "itk.hdf5")
    assert found == expected
    for name, value in expected_fixed.items():
        if name == "VoxelType":
            assert list(fixed[name]) == list(value) == [b"SHORT"]
        else:
            np.testing.assert_allclose(fixed[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("compression", FILTERS)
def test_files_are_chunked_and_read_back(compression, tmp_path):
    voxels, affine = noise((70, 33, 40)), itk_affine(itk_image(DIRECTIONS["axial"]))
    write_volume(tmp_path / "ct.hdf5", voxels, affine, compression)
    with h5py.File(tmp_path / "ct.hdf5") as file:
        dataset = file["ITKImage/0/VoxelData"]
        assert dataset.chunks == (CHUNK, CHUNK, CHUNK) == (32, 32, 32)
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    assert filters == {"blosc": [32001], "gzip": [h5py.h5z.FILTER_DEFLATE], "none": []}[compression]
    with Volume(tmp_path / "ct.hdf5") as volume:
        np.testing.assert_array_equal(volume.read(), voxels[::-1, ::-1])
        np.testing.assert_allclose(volume.affine[:3, :3], np.diag([0.7, 0.9, 2.5]), atol=1e-9)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "owner, name", [(h5py, "File"), (h5py.Group, "create_dataset"), (Path, "write_bytes"), (os, "replace")]
)
@pytest.mark.parametrize("exists", [True, False])
def test_failing_write_leaves_what_was_there(owner, name, exists, tmp_path, monkeypatch, nothing_left_open):
    path = tmp_path / "ct.hdf5"
    if exists:
        write_volume(path, noise((5, 6, 7)), np.eye(4))
        before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_space)
        with pytest.raises(OSError, match="No space left"):
            write_volume(path, noise((5, 6, 7), seed=1), np.eye(4))
    assert os.listdir(tmp_path) == (["ct.hdf5"] if exists else [])
    if exists:
        assert path.read_bytes() == before


def test_full_disk_leaves_what_was_there(tmp_path, nothing_left_open):
    """The system itself refuses, after a part was written: no file may grow beyond 8 KiB."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "ct.hdf5"
    write_volume(path, noise((5, 6, 7)), np.eye(4))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_volume(path, noise((40, 40, 40)), np.eye(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["ct.hdf5"] and path.read_bytes() == before


def test_reader_sees_the_old_or_the_new_file(tmp_path, monkeypatch):
    path, seen, replace = tmp_path / "ct.hdf5", [], os.replace
    write_volume(path, noise((5, 6, 7)), np.eye(4))

    def look_and_replace(part, target):
        with Volume(path) as volume:
            seen.append(volume.read())
        assert find_volumes(tmp_path) == ["ct.hdf5"]  # the part is not taken for a volume
        replace(part, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    write_volume(path, noise((5, 6, 7), seed=1), np.eye(4))
    np.testing.assert_array_equal(seen, [noise((5, 6, 7))])
    with Volume(path) as volume:
        np.testing.assert_array_equal(volume.read(), noise((5, 6, 7), seed=1))


SHEARED = np.eye(4) + 0.05 * np.eye(4, k=1)


@pytest.mark.parametrize(
    "volume, affine, reason",
    [
        (np.zeros((3, 4, 5), np.float32), np.eye(4), "float32"),
        (np.zeros((3, 4, 5), np.uint16), np.eye(4), "uint16"),
        (np.zeros((3, 4), np.int16), np.eye(4), "2D"),
        (np.zeros((3, 4, 5, 1), np.int16), np.eye(4), "4D"),
        (np.zeros((3, 0, 5), np.int16), np.eye(4), re.escape("(3, 0, 5)")),
        (np.zeros((3, 4, 5), np.int16), SHEARED, "orthogonal"),
        (np.zeros((3, 4, 5), np.int16), np.diag([1.0, 0, 1, 1]), "without length"),
        (np.zeros((3, 4, 5), np.int16), np.diag([1.0, np.nan, 1, 1]), "nan"),
        (np.zeros((3, 4, 5), np.int16), np.full((4, 4), 1.0), "orthogonal"),
    ],
)
def test_unsuitable_arrays_and_affines_are_refused(volume, affine, reason, tmp_path):
    with pytest.raises(ValueError, match=reason) as error:
        write_volume(tmp_path / "ct.hdf5", volume, affine)
    assert str(tmp_path / "ct.hdf5") in str(error.value)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ partial reads


@pytest.mark.parametrize("suffix", [".hdf5", ".nii", ".nii.gz"])
def test_parts_equal_slices_of_the_whole_in_all_48_orientations(suffix, tmp_path):
    rng = np.random.default_rng(0)
    assert len({matrix.tobytes() for matrix in SIGNED_PERMUTATIONS}) == 48
    path = tmp_path / f"ct{suffix}"
    for directions in SIGNED_PERMUTATIONS:
        image = itk_image(directions, shape=(11, 9, 7))
        whole, affine = in_ras(image)
        if suffix == ".hdf5":
            sitk.WriteImage(image, path)
        else:
            nibabel.save(nibabel.Nifti1Image(sitk.GetArrayFromImage(image).T, itk_affine(image)), path)
        with Volume(path) as volume:
            np.testing.assert_allclose(volume.affine, affine, atol=1e-4 if "nii" in suffix else 1e-9)
            taken, take = [], volume._take
            volume._take = lambda slices: taken.append(take(slices)) or taken[-1]
            boxes = [(rng.integers(-8, 14, 3), rng.integers(1, 14, 3)) for _ in range(6)]
            low = np.array([rng.integers(0, n - 1) for n in whole.shape])
            boxes += [
                (low, np.array([rng.integers(1, n - a + 1) for n, a in zip(whole.shape, low)])),  # inside
                (np.array([-3, -3, -3]), np.array(whole.shape) + 6),  # around
                (np.array([-9, 2, 2]), np.array([9, 2, 2])),  # beside
                (np.array([2, 2, whole.shape[2]]), np.array([3, 4, 5])),
            ]
            for start, size in boxes:
                taken.clear()
                part = volume.read(start, size)
                assert part.dtype == np.int16
                np.testing.assert_array_equal(part, padded_part(whole, start, size))
                inside = np.minimum(start + size, whole.shape) - np.maximum(start, 0)
                assert sum(voxels.size for voxels in taken) == (inside.prod() if (inside > 0).all() else 0)


def test_h5py_is_asked_for_the_box_only(tmp_path, monkeypatch):
    image = itk_image(DIRECTIONS["permuted and flipped"], shape=(40, 36, 50))
    sitk.WriteImage(image, tmp_path / "ct.hdf5")
    asked, getitem = [], h5py.Dataset.__getitem__

    def counting(dataset, key, **options):
        result = getitem(dataset, key, **options)
        asked.append((dataset.name.rsplit("/")[-1], np.size(result)))
        return result

    with Volume(tmp_path / "ct.hdf5") as volume:
        monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
        volume.read((3, 30, -2), (5, 11, 7))
    assert asked == [("VoxelData", 5 * min(11, volume.shape[1] - 30) * 5)]


def test_padding_values_become_air(tmp_path):
    voxels = noise((6, 7, 8), low=-3100, high=-900)
    voxels[0, 0, 0] = -3024
    write_volume(tmp_path / "ct.hdf5", voxels, np.eye(4))
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), np.eye(4)), tmp_path / "ct.nii")
    expected = np.where(voxels < -1024, -1024, voxels)
    for name in ("ct.hdf5", "ct.nii"):
        with Volume(tmp_path / name) as volume:
            np.testing.assert_array_equal(volume.read(), expected)
            np.testing.assert_array_equal(volume.read((0, 0, 0), (2, 2, 2)), expected[:2, :2, :2])


def test_is_constant(tmp_path):
    def constant(voxels):
        write_volume(tmp_path / "ct.hdf5", voxels, np.eye(4))
        with Volume(tmp_path / "ct.hdf5") as volume:
            return volume.is_constant()

    assert constant(np.full((5, 6, 70), 17, np.int16))
    assert constant(np.where(noise((5, 6, 7)) > 0, -1024, -3024).astype(np.int16))  # padding and air
    for last in ((0, 0, 0), (4, 5, 69), (2, 3, 31), (2, 3, 32), (0, 5, 33)):
        voxels = np.full((5, 6, 70), 17, np.int16)
        voxels[last] = 18
        assert not constant(voxels)


# ------------------------------------------------------------------------------------------------------- broken files


def itk_bytes(path, **changes):
    """An ITK file with some of its datasets replaced, or left out where None is given."""
    sitk.WriteImage(itk_image(np.eye(3)), path)
    with h5py.File(path, "r+") as file:
        for name, value in changes.items():
            del file[f"ITKImage/0/{name}"]
            if value is not None:
                file[f"ITKImage/0/{name}"] = value
    return path.read_bytes()


def nifti_bytes(path, voxels=None, **fields):
    """A NIfTI file with fields of its header set as they are."""
    nibabel.save(nibabel.Nifti1Image(noise((9, 13, 6)) if voxels is None else voxels, np.eye(4)), path)
    for name, value in fields.items():
        header = nibabel.Nifti1Header(path.read_bytes()[:348], check=False)
        header[name] = value
        path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    return path.read_bytes()


def write_itk(voxels, **options):
    return lambda path: sitk.WriteImage(sitk.GetImageFromArray(voxels, **options), path)


def empty_hdf5(path):
    with h5py.File(path, "w") as file:
        file["something"] = [1, 2, 3]


RGB = [("R", "u1"), ("G", "u1"), ("B", "u1")]
BROKEN = {  # name: (suffix, how the file is made, what the message says)
    "missing hdf5": (".hdf5", lambda path: None, "no such file"),
    "missing nifti": (".nii.gz", lambda path: None, "no such file"),
    "zero bytes hdf5": (".hdf5", lambda path: path.write_bytes(b""), "the file is empty"),
    "zero bytes nifti": (".nii", lambda path: path.write_bytes(b""), "the file is empty"),
    "zero bytes nifti gz": (".nii.gz", lambda path: path.write_bytes(b""), "the file is empty"),
    "text hdf5": (".hdf5", lambda path: path.write_text("<html>404</html>\n" * 200), "signature not found"),
    "text nifti": (".nii", lambda path: path.write_text("<html>404</html>\n" * 200), "file type"),
    "a folder": (".hdf5", lambda path: path.mkdir(), "a folder with 0 DICOM series"),
    "other hdf5": (".h5", empty_hdf5, "no ITKImage/0/VoxelData: not an ITK"),
    "no directions": (".hdf5", lambda path: itk_bytes(path, Directions=None), "no ITKImage/0/Directions"),
    "no spacing": (".hdf5", lambda path: itk_bytes(path, Spacing=None), "no ITKImage/0/Spacing"),
    "scalar spacing": (".hdf5", lambda path: itk_bytes(path, Spacing=1.0), "spacings"),
    "2D hdf5": (".hdf5", write_itk(noise((4, 5))), r"\(4, 5\).* expected a 3D"),
    "vector hdf5": (".hdf5", write_itk(noise((3, 4, 5, 2)), isVector=True), r"\(3, 4, 5, 2\).* one value per voxel"),
    "complex hdf5": (".hdf5", write_itk(np.zeros((3, 4, 5), np.complex64)), r"\(3, 4, 5, 2\).* one value per voxel"),
    "4D hdf5": (".hdf5", write_itk(noise((2, 3, 4, 5)), isVector=False), r"4 spacings.* expected a 3D"),
    "complex nifti": (".nii", lambda path: nifti_bytes(path, np.ones((3, 4, 5), np.complex64)), "complex64"),
    "colour nifti": (".nii", lambda path: nifti_bytes(path, np.zeros((3, 4, 5), RGB)), "expected numbers"),
    "2D nifti": (".nii", lambda path: nifti_bytes(path, noise((4, 5))), "2D image of 4 x 5 voxels"),
    "4D nifti": (".nii", lambda path: nifti_bytes(path, noise((4, 5, 6, 2))), "4D image of 4 x 5 x 6 x 2 voxels"),
    "empty axis hdf5": (".hdf5", lambda path: itk_bytes(path, VoxelData=np.zeros((3, 0, 5), np.int16)), "empty.*3"),
    "empty axis nifti": (".nii", lambda path: nifti_bytes(path, np.zeros((3, 0, 5), np.int16)), "empty.*3"),
    "nan spacing": (".hdf5", lambda path: itk_bytes(path, Spacing=[1, np.nan, 1]), "span no volume"),
    "zero spacing": (".hdf5", lambda path: itk_bytes(path, Spacing=[1.0, 0, 1]), "span no volume"),
    "infinite origin": (".hdf5", lambda path: itk_bytes(path, Origin=[1, np.inf, 1]), "span no volume"),
    "zero directions": (".hdf5", lambda path: itk_bytes(path, Directions=np.zeros((3, 3))), "span no volume"),
    "twice one axis": (".hdf5", lambda path: itk_bytes(path, Directions=np.eye(3)[[0, 0, 2]]), "span no volume"),
    "nan affine": (".nii", lambda path: nifti_bytes(path, srow_x=[np.nan, 0, 0, 0]), "span no volume"),
    "singular affine": (".nii", lambda path: nifti_bytes(path, srow_x=[0, 1, 0, 0]), "span no volume"),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("suffix, make, reason", BROKEN.values(), ids=BROKEN)
def test_unusable_file_is_named_with_the_reason(suffix, make, reason, tmp_path, nothing_left_open):
    path = tmp_path / f"some ct{suffix}"
    make(path)
    before = open_files()
    with pytest.raises(DataError, match=reason) as error:
        Volume(path)
    assert open_files() == before  # even while the error, and with it the half-made Volume, is still held
    assert error.value.path == str(path) and str(error.value) == f"{path}: {error.value.reason}"
    assert "\n" not in str(error.value)
    if "expected a 3D" in str(error.value):
        assert "is a 3D" not in str(error.value)


UNREADABLE = {  # these open, and fail once voxels are read
    "nan": (".hdf5", lambda path: itk_bytes(path, VoxelData=np.full((3, 4, 5), np.nan, np.float32)), "NaN or infinite"),
    "one nan": (".hdf5", lambda path: itk_bytes(path, VoxelData=np.where(np.eye(5) > 0, np.nan, 1)[:3, None]), "NaN"),
    "infinity": (".nii.gz", lambda path: nifti_bytes(path, np.full((3, 4, 5), np.inf, np.float32)), "NaN or infinite"),
    "text voxels": (".hdf5", lambda path: itk_bytes(path, VoxelData=np.full((3, 4, 5), b"a")), "expected numbers"),
}


@pytest.mark.parametrize("suffix, make, reason", UNREADABLE.values(), ids=UNREADABLE)
def test_unusable_voxels_are_named_with_the_reason(suffix, make, reason, tmp_path, nothing_left_open):
    path = tmp_path / f"some ct{suffix}"
    make(path)
    with Volume(path) as volume, pytest.raises(DataError, match=reason) as error:
        volume.read()
    assert error.value.path == str(path)


def read_all(path):
    with Volume(path) as volume:
        return volume.read()


@pytest.mark.parametrize("compression", [None, *FILTERS])
def test_truncated_hdf5_is_refused_wherever_it_was_cut(compression, tmp_path, nothing_left_open):
    path, cut = tmp_path / "ct.hdf5", tmp_path / "cut.hdf5"
    if compression:
        write_volume(path, noise((70, 40, 33)), np.eye(4), compression)
    else:
        sitk.WriteImage(itk_image(np.eye(3), shape=(30, 40, 12)), path)
    whole = path.read_bytes()
    for length in (1, 8, 20, 96, 800, 2048, 5000, len(whole) // 2, len(whole) - 2048, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match="can't be read") as error:
            read_all(cut)
        assert error.value.path == str(cut)


def test_lost_chunks_are_noticed_when_they_are_read(tmp_path, nothing_left_open):
    """Copies broken in the middle: the file opens, one of its chunks holds other bytes or lies beyond its end."""
    path = tmp_path / "ct.hdf5"
    whole = noise((64, 64, 96))
    write_volume(path, whole, LPS, "gzip")
    with h5py.File(path) as file:
        chunks = [file["ITKImage/0/VoxelData"].id.get_chunk_info(i) for i in range(12)]
    lost = max(chunks, key=lambda chunk: chunk.byte_offset)
    raw = bytearray(path.read_bytes())
    raw[lost.byte_offset : lost.byte_offset + lost.size] = bytes(lost.size)
    path.write_bytes(raw)
    z, y, x = lost.chunk_offset
    with Volume(path) as volume:
        with pytest.raises(DataError, match="can't be read") as error:
            volume.read()
        assert error.value.path == str(path)
        ras = whole[::-1, ::-1]  # LPS in the file: both axes turn
        for other in chunks:
            start = np.array([64 - 32 - other.chunk_offset[2], 64 - 32 - other.chunk_offset[1], other.chunk_offset[0]])
            if other.chunk_offset == (z, y, x):
                with pytest.raises(DataError):
                    volume.read(start, (32, 32, 32))
            else:
                np.testing.assert_array_equal(volume.read(start, (32, 32, 32)), padded_part(ras, start, (32, 32, 32)))

    raw = raw[: lost.byte_offset]  # and with an end of file that agrees, as HDF5 otherwise refuses to open it
    assert raw[8] == 0  # superblock version 0: the address of the end is at byte 40
    raw[40:48] = len(raw).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(DataError, match="can't be read"):
        read_all(path)


def test_truncated_and_corrupt_nifti_is_refused(tmp_path, nothing_left_open):
    path = tmp_path / "ct.nii.gz"
    whole = nifti_bytes(path, noise((30, 40, 12)))
    for length in (5, 20, 100, 300, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="can't be read") as error:
            read_all(path)
        assert error.value.path == str(path)
    for corrupt in (whole[1:], whole[: len(whole) // 2] + whole[len(whole) // 2 + 500 :], bytes(len(whole))):
        path.write_bytes(corrupt)
        with pytest.raises(DataError) as error:
            read_all(path)
        assert error.value.path == str(path)

    plain = tmp_path / "ct.nii"
    whole = nifti_bytes(plain, noise((30, 40, 12)))
    for length in (5, 100, 348, 352, 3000, len(whole) - 1):
        plain.write_bytes(whole[:length])
        with pytest.raises(DataError, match="can't be read"):
            read_all(plain)


def test_files_are_closed_after_use(tmp_path, nothing_left_open):
    write_volume(tmp_path / "ct.hdf5", noise((20, 20, 20)), np.eye(4))
    nifti_bytes(tmp_path / "ct.nii")
    nifti_bytes(tmp_path / "ct.nii.gz")
    for name in ("ct.hdf5", "ct.nii", "ct.nii.gz") * 5:
        with Volume(tmp_path / name) as volume:
            volume.read((1, 1, 1), (3, 3, 3))
            volume.is_constant()
        volume.close()  # twice does no harm
    with pytest.raises(DataError):
        with Volume(tmp_path / "ct.hdf5") as volume:
            raise DataError(volume.path, "stop")


# --------------------------------------------------------------------------------------------------- finding volumes


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_volumes_are_found_sorted_and_hidden_ones_are_not(tmp_path):
    volumes = ["2/t0/b.hdf5", "10/t0/a.hdf5", "1/t2/a.hdf5", "1/t0/z.h5", "1/t0/a.nii", "1/t0/a.nii.gz", "top.hdf5"]
    touch(
        tmp_path,
        *volumes,
        "1/t0/._a.nii",
        "1/t0/.a.hdf5",
        ".trash/t0/a.hdf5",
        "1/.cache/a.hdf5",
        "1/t0/a.txt",
        "1/t0/a.gz",
        "1/t0/a.hdf5.123.part",
        "1/t0/hdf5",
        "readme.nii.txt",
    )
    (tmp_path / "1" / "folder.hdf5").mkdir()
    assert find_volumes(tmp_path) == find_volumes(str(tmp_path)) == sorted(volumes)
    assert all(name.endswith(VOLUME_SUFFIXES) for name in volumes)


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{i}/t{j}/{k}.hdf5" for i in range(3) for j in range(3) for k in range(3)))
    expected, walk = find_volumes(tmp_path), os.walk

    def shuffled(*arguments, **options):
        for here, folders, files in walk(*arguments, **options):
            folders[:], files[:] = folders[::-1], files[::-1]
            yield here, folders, files

    monkeypatch.setattr(os, "walk", shuffled)
    assert find_volumes(tmp_path) == expected and len(expected) == 27


def test_linked_folders_are_followed_once_and_loops_end(tmp_path):
    touch(tmp_path, "elsewhere/p3/c.hdf5", "data/p1/a.hdf5", "data/p2/b.hdf5")
    for name, target in (
        ("p3", "elsewhere/p3"),
        ("p3 again", "elsewhere/p3"),
        ("p1/loop", "data"),
        ("p2/loop", "data/p2"),
        ("nowhere", "nowhere"),
        ("itself", "data/itself"),
    ):
        (tmp_path / "data" / name).symlink_to(tmp_path / target, target_is_directory=True)
    assert find_volumes(tmp_path / "data") == ["p1/a.hdf5", "p2/b.hdf5", "p3/c.hdf5"]
    (tmp_path / "linked data").symlink_to(tmp_path / "data", target_is_directory=True)
    assert find_volumes(tmp_path / "linked data") == ["p1/a.hdf5", "p2/b.hdf5", "p3/c.hdf5"]


def test_linked_files_are_volumes_of_their_own(tmp_path):
    touch(tmp_path, "store/a.hdf5", "data/p1/b.hdf5")
    (tmp_path / "data/p1/a.hdf5").symlink_to(tmp_path / "store/a.hdf5")
    assert find_volumes(tmp_path / "data") == ["p1/a.hdf5", "p1/b.hdf5"]


def test_missing_folder_and_file_for_a_folder_are_named(tmp_path):
    touch(tmp_path, "a.hdf5")
    for name, reason in (("missing", "no such folder"), ("a.hdf5", "is a file, expected a folder")):
        with pytest.raises(DataError, match=reason) as error:
            find_volumes(tmp_path / name)
        assert error.value.path == str(tmp_path / name)
        with pytest.raises(DataError, match=reason):
            list_volumes(tmp_path / name, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_index_is_written_once_and_used_from_then_on(tmp_path, monkeypatch):
    touch(tmp_path, "data/p2/b.hdf5", "data/p 1/a b.hdf5", "other/c.hdf5", "empty/x.txt")
    folder, index = tmp_path / "data", tmp_path / "volumes.txt"
    expected = [os.path.join(folder, "p 1/a b.hdf5"), os.path.join(folder, "p2/b.hdf5")]
    assert list_volumes(folder, index) == (expected, "")
    assert read_data_list(index, folder) == expected
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "find_unlabelled", lambda folder: pytest.fail("looked again"))
        assert list_volumes(folder, index) == list_volumes(str(folder), str(index)) == (expected, "")
        patch.chdir(tmp_path)
        assert list_volumes("data", index) == (["data/p 1/a b.hdf5", "data/p2/b.hdf5"], "")
    touch(folder, "p0/new.hdf5")
    assert list_volumes(folder, index) == (expected, "")
    index.unlink()
    assert list_volumes(folder, index)[0] == [
        os.path.join(folder, "p 1/a b.hdf5"),
        os.path.join(folder, "p0/new.hdf5"),
        os.path.join(folder, "p2/b.hdf5"),
    ]
    assert list_volumes(tmp_path / "other", index)[0] == [os.path.join(tmp_path, "other/c.hdf5")]  # of another folder
    assert len(list_volumes(folder, index)[0]) == 3
    index.unlink()
    assert (
        list_volumes(tmp_path / "empty", index) == ([], "1 .txt files") and not index.exists()
    )  # what is copied later is found
    assert sorted(os.listdir(tmp_path)) == ["data", "empty", "other"]


def test_data_list(tmp_path):
    text = "# a comment\n\n p1/a.hdf5 \r\n/abs/b.nii.gz\n   \n#p3/c.hdf5\np 4/d e.h5"
    (tmp_path / "list.txt").write_text(text, newline="")
    names = ["p1/a.hdf5", "/abs/b.nii.gz", "p 4/d e.h5"]
    assert read_data_list(tmp_path / "list.txt") == [os.path.join(tmp_path, name) for name in names]
    names = ["/data/p1/a.hdf5", "/abs/b.nii.gz", "/data/p 4/d e.h5"]
    assert read_data_list(str(tmp_path / "list.txt"), "/data") == names
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    assert read_data_list(tmp_path / "empty.txt") == []


def test_names_that_look_like_comments_survive_the_list(tmp_path):
    write_volume(tmp_path / "ct" / "#recycle" / "a.hdf5", np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    first, _ = list_volumes(tmp_path / "ct", tmp_path / "list.txt")
    again, _ = list_volumes(tmp_path / "ct", tmp_path / "list.txt")
    assert len(first) == 1 and list(map(os.path.normpath, again)) == list(map(os.path.normpath, first))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    listing = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="closed: can't be listed: Permission denied"):
        find_volumes(tmp_path)


def test_unreadable_list_is_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "folder.txt").mkdir()
    for name in ("missing.txt", "binary.txt", "folder.txt"):
        with pytest.raises(DataError, match="list of files") as error:
            read_data_list(tmp_path / name)
        assert error.value.path == str(tmp_path / name)


# -------------------------------------------------------------------------------------------------- placing a patch


def test_patch_is_placed_anywhere_for_volumes_of_any_size():
    rng, draws = np.random.RandomState(0), np.random.default_rng(0)
    for _ in range(4000):
        shape, core = draws.integers(1, 301, 3), draws.integers(1, 150, 3)
        size = core + draws.integers(0, 60, 3)
        start = place_patch(rng, shape, core, size)
        assert start.shape == (3,) and start.dtype.kind == "i"
        core_start, room, margin = start + (size - core) // 2, shape - core, size - core
        for axis in range(3):
            if room[axis] >= 0:
                assert 0 <= core_start[axis] <= room[axis]
            else:  # the middle of the volume is the middle of the core, to half a voxel
                assert abs(core_start[axis] + (core[axis] - shape[axis]) / 2) <= 0.5
            if room[axis] >= 2 * margin[axis] + 4:
                assert 0 <= start[axis] <= shape[axis] - size[axis]


def test_all_positions_that_may_be_drawn_are():
    """Along one axis: the whole patch inside, unless less than half of the room for its core would be left to it."""
    rng = np.random.RandomState(0)
    for shape, core, size in (
        (40, 10, 10),
        (40, 10, 14),
        (40, 10, 15),
        (20, 10, 16),
        (17, 10, 21),
        (11, 10, 20),
        (10, 10, 12),
        (7, 10, 12),
        (1, 10, 11),
        (8, 5, 30),
    ):
        drawn = {
            int(place_patch(rng, np.full(3, shape), np.full(3, core), np.full(3, size))[axis])
            for _ in range(400)
            for axis in range(3)
        }
        assert drawn == set(range(min(drawn), max(drawn) + 1))
        if shape - size + 1 >= (shape - core + 1) / 2:
            assert drawn == set(range(shape - size + 1))
        elif shape >= core:
            assert len(drawn) >= (shape - core + 1) / 2
            assert 0 <= min(drawn) + (size - core) // 2 and max(drawn) + (size - core) // 2 <= shape - core
        else:
            assert len(drawn) == 1
        middle = (min(drawn) + max(drawn) + size - 1) / 2
        assert abs(middle - (shape - 1) / 2) <= 0.5  # no side is preferred


def test_real_crops_fit_volumes_of_every_size(tmp_path):
    """Volumes of 1 to 300 voxels along an axis: the patch has its size and shows some of the volume."""
    patches = crops()
    for n in (1, 2, 5, *range(8, 40, 3), 300):
        write_volume(tmp_path / "ct.hdf5", noise((n, 9, 31)), np.eye(4), "none")
        dataset = PretrainingPatches([str(tmp_path / "ct.hdf5")], patches, seed=0)
        for epoch in range(3):
            (sample,) = dataset.__getitems__([(epoch, 0)])
            assert sample.patch.shape == patches.patch_size and sample.patch.dtype == np.int16
    rng = np.random.RandomState(0)
    for n in range(1, 301):
        start = place_patch(rng, np.array([n, 301 - n, 150]), np.array(patches.core), np.array(patches.patch_size))
        assert (start + patches.patch_size > 0).all() and (start < [n, 301 - n, 150]).all()


# ------------------------------------------------------------------------------------------------------------ spacing


def test_block_mean():
    patch = noise((8, 9, 10))
    assert block_mean(patch, (1, 1, 1)) is patch
    for factors in ((2, 3, 5), (4, 1, 1), (1, 9, 2), (8, 9, 10)):
        a, b, c = factors
        expected = np.array(
            [
                [
                    [np.rint(patch[x : x + a, y : y + b, z : z + c].astype(np.float64).mean()) for z in range(0, 10, c)]
                    for y in range(0, 9, b)
                ]
                for x in range(0, 8, a)
            ]
        )
        averaged = block_mean(patch, np.array(factors))
        assert averaged.dtype == np.int16 and averaged.shape == expected.shape
        np.testing.assert_allclose(averaged, expected, atol=1 if np.prod(factors) > 30 else 0)
    smooth = scipy.ndimage.uniform_filter(patch.astype(np.float64), 3, origin=-1)[:6:3, ::3, :9:3]
    np.testing.assert_allclose(block_mean(patch[:6, :, :9], (3, 3, 3)), smooth, atol=0.5 + 1e-3)
    assert block_mean(np.full((64, 64, 64), 32767, np.int16), (64, 64, 64)).item() == 32767
    assert block_mean(np.full((4, 4, 4), -1024, np.int16), (4, 4, 4)).item() == -1024


SLOPES = np.array([7.0, -5.0, 3.0])  # HU per mm


def ramp(path, shape, spacing, axis):
    """A volume whose values grow along one axis of RAS; returns the value at the middle of its first voxel."""
    values = np.arange(shape[axis]) * spacing[axis] * SLOPES[axis]
    values -= values.mean().round()
    write_volume(path, np.broadcast_to(along(axis, np.rint(values)), shape).astype(np.int16), np.diag([*spacing, 1.0]))
    return values[0]


def along(axis, values):
    return np.reshape(values, [-1 if a == axis else 1 for a in range(3)])


@pytest.mark.parametrize(
    "spacing, volume_spacing, factors",
    [
        ((2.0, 2.0, 4.0), (0.5, 0.5, 1.0), (4, 4, 4)),  # much finer: averaged first
        ((2.0, 2.0, 4.0), (0.8, 1.6, 4.0), (2, 1, 1)),  # 2.5, 1.25 and 1 voxels of the volume for one of the view
        ((2.0, 2.0, 4.0), (3.0, 1.25, 7.0), (1, 2, 1)),  # coarser
    ],
)
def test_views_show_millimetres(spacing, volume_spacing, factors, tmp_path, monkeypatch):
    """Three ramps, one along each axis, with the same draws: together they tell where in the patient a view lies."""
    views_spacing, finer = np.array(spacing), np.array(volume_spacing)
    patches = crops(spacing=spacing)
    shape = tuple(int(n) for n in np.ceil(1.8 * np.array(patches.patch_size) * views_spacing / finer))
    reads, read = [], Volume.read
    monkeypatch.setattr(Volume, "read", lambda self, *box: reads.append(box) or read(self, *box))
    at = []  # per axis: the position in mm of each voxel of each view, from the middle of the volume's first voxel
    for axis in range(3):
        path = tmp_path / f"{axis}.hdf5"
        first = ramp(path, shape, volume_spacing, axis)
        (sample,) = PretrainingPatches([str(path)], patches, seed=5).__getitems__([(2, 0)])
        start, size = reads[-1]
        assert (size % factors == 0).all() and sample.patch.shape == tuple(size // factors)
        assert (size * finer >= np.array(patches.patch_size) * views_spacing - 1e-6).all()  # as much as is needed
        assert (size * finer < (np.array(patches.patch_size) + 1) * views_spacing + np.array(factors) * finer).all()
        batch = collate([sample])
        views = [view for group in patches.render(batch.patches, batch.groups, (-2000, 2000)) for view in group[:, 0]]
        at.append([(view.double().numpy() * 4000 - 2000 - first) / SLOPES[axis] for view in views])
    assert all((first == other).all() for first, other in itertools.pairwise(np.array([read[0] for read in reads])))
    middle = (start + (size - 1) / 2) * finer
    for positions in zip(*at):  # of one view
        n = np.array(positions[0].shape)
        for axis, position in enumerate(positions):
            offsets = (np.arange(n[axis]) - (n[axis] - 1) / 2) * spacing[axis]
            centre = position.mean()
            rounding = 0.75 / abs(SLOPES[axis])  # of HU, in the file and after averaging
            expected = np.broadcast_to(along(axis, centre + offsets), n)
            np.testing.assert_allclose(position, expected, atol=2 * rounding)
            furthest = (patches.core[axis] - n[axis]) / 2 * spacing[axis]
            assert abs(centre - middle[axis]) <= furthest + 2 * rounding
            steps = (centre - middle[axis]) / spacing[axis] - (patches.core[axis] - n[axis]) / 2
            assert abs(steps - round(steps)) * spacing[axis] <= 2 * rounding  # whole voxels of the view


def test_averaging_removes_noise_that_subsampling_keeps(tmp_path):
    write_volume(tmp_path / "ct.hdf5", noise((120, 120, 90), -500, 500), np.diag([0.5, 0.5, 1.0, 1.0]), "none")
    dataset = PretrainingPatches([str(tmp_path / "ct.hdf5")], crops(spacing=(2.0, 2.0, 4.0)), seed=0)
    (sample,) = dataset.__getitems__([(0, 0)])
    assert sample.patch.std() < 1.2 * (1000 / 12**0.5) / 4**1.5


def test_views_do_not_depend_on_who_shares_the_batch(tmp_path):
    """Volumes of different spacings have patches of different sizes, which a batch must hold without a trace."""
    turned = Policy(rotation=30, scale=0.25, flip=1, prob=1)  # so that some views look beyond their patch
    patches, paths = crops(turned, spacing=(2.0, 2.0, 4.0)), []
    for number, spacing in enumerate([(0.7, 0.7, 1.0), (2.0, 2.0, 4.0), (0.9, 1.1, 2.5)]):
        shape = np.ceil(1.3 * np.array(patches.patch_size) * (2.0, 2.0, 4.0) / spacing).astype(int)
        smooth = scipy.ndimage.gaussian_filter(noise(shape, -1024, 1024, seed=number).astype(float), 3) * 10
        paths.append(str(tmp_path / f"{number}.hdf5"))
        write_volume(paths[-1], smooth.clip(-1000, 3000).astype(np.int16), np.diag([*spacing, 1.0]), "none")
    dataset = PretrainingPatches(paths, patches, seed=0, patches_per_volume=10)
    samples = dataset.__getitems__([(0, i) for i in range(30)])
    assert len({sample.patch.shape for sample in samples}) == 3

    def views(samples):
        batch = collate(samples)
        groups = patches.render(batch.patches, batch.groups, (-1000, 1000))
        return [group.reshape(-1, len(samples), *group.shape[1:]) for group in groups]  # (V, B, 1, x, y, z)

    together, alone = views(samples), [views([sample]) for sample in samples]
    for group, in_batch in enumerate(together):
        for number in range(30):
            np.testing.assert_allclose(in_batch[:, number], alone[number][group][:, 0], atol=1e-4)


# -------------------------------------------------------------------------------------------------- order and batches


@pytest.mark.parametrize(
    "volumes, per_volume",
    [(1, 1), (7, 1), (50, 3), (9, PATCHES_PER_READ), (11, PATCHES_PER_READ + 3), (5, 24), (1, 9), (3, [1, 30, 2])],
)
def test_epoch_holds_every_sample_once(volumes, per_volume):
    orders, samples = {}, int(np.broadcast_to(per_volume, volumes).sum())
    for seed, epoch in itertools.product(range(2), range(3)):
        order = epoch_order(volumes, per_volume, seed, epoch)
        assert sorted(order.tolist()) == list(range(samples))
        np.random.seed(epoch)
        np.testing.assert_array_equal(order, epoch_order(volumes, per_volume, seed, epoch))
        orders[seed, epoch] = tuple(order.tolist())
    if volumes > 8:
        assert len(set(orders.values())) == len(orders)


@pytest.mark.parametrize("volumes", [1, 2, 30, 2 * RUNS_AT_ONCE + 3])
def test_one_patch_per_volume_has_the_order_that_it_always_had(volumes):
    for epoch in range(3):
        drawn = np.random.default_rng(np.random.SeedSequence((5, epoch))).permutation(np.arange(volumes))
        np.testing.assert_array_equal(epoch_order(volumes, 1, 5, epoch), drawn)


def volumes_of(order, per_volume, volumes):
    return np.repeat(np.arange(volumes), np.broadcast_to(per_volume, volumes))[order]


@pytest.mark.parametrize(
    "volumes, per_volume, batch, least",
    [(100, 8, 36, 36), (1000, 16, 64, 63.9), (600, 8, 256, 240), (20, 32, 36, 20), (20, 32, 16, 14), (3, 40, 24, 3)],
)
def test_a_batch_holds_as_many_volumes_as_there_are(volumes, per_volume, batch, least):
    """Mean over an epoch; batches that lie over the border of two rounds may hold a volume twice."""
    order = volumes_of(epoch_order(volumes, per_volume, 0, 1), per_volume, volumes)
    whole = order[: len(order) // batch * batch].reshape(-1, batch)
    assert np.mean([len(set(one)) for one in whole]) >= least


def test_patches_of_a_run_are_near_each_other():
    """Slow storage has a file ready for 8 patches at a time: these lie within as many batches as RUNS_AT_ONCE fill."""
    order = epoch_order(2000, 2 * PATCHES_PER_READ, 0, 0)
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    runs = np.sort(place.reshape(-1, PATCHES_PER_READ))
    assert np.ptp(runs, 1).max() < 2 * RUNS_AT_ONCE * PATCHES_PER_READ
    halves = place.reshape(2000, 2, -1).mean(2)  # the two runs of a volume: one in each half of the epoch
    assert ((halves < len(order) / 2).sum(1) == 1).mean() > 0.95


def test_weighted_volumes_are_spread_over_the_epoch():
    """20 volumes with 24 samples among 480 with one: every batch of 50 holds about as many of either."""
    counts = [24] * 20 + [1] * 480
    often = volumes_of(epoch_order(500, counts, 0, 0), counts, 500) < 20
    shares = often[:950].reshape(-1, 50).sum(1)
    assert abs(shares - 25).max() <= 12, shares  # a draw without order would have a deviation of 3.5


def test_volumes_are_shuffled_evenly():
    """3000 epochs of 6 volumes: each is at each place of a round about 500 times, 6 standard deviations allowed."""
    counts = np.zeros((2, 6, 6))
    for epoch in range(3000):
        first = volumes_of(epoch_order(6, PATCHES_PER_READ + 1, 0, epoch), PATCHES_PER_READ + 1, 6)
        counts[0, range(6), first[:6]] += 1
        counts[1, range(6), volumes_of(epoch_order(6, 2, 0, epoch), 2, 6)[6:]] += 1
    assert np.abs(counts[1] - 500).max() < 6 * (3000 * 1 / 6 * 5 / 6) ** 0.5
    assert np.abs(counts[0] - 500).max() < 6 * (3000 * 1 / 6 * 5 / 6) ** 0.5


@pytest.mark.parametrize(
    "batch, world, volumes, per_volume", [(3, 1, 10, 2), (2, 3, 17, 1), (4, 2, 5, 11), (5, 4, 3, 1)]
)
def test_ranks_share_each_epoch(batch, world, volumes, per_volume):
    streams = [list(BatchStream(volumes, per_volume, batch, rank, world, 0, 0, 0, 3)) for rank in range(world)]
    steps = volumes * per_volume // (batch * world)
    assert [len(stream) for stream in streams] == [3 * steps] * world
    for epoch in range(3):
        keys = [key for stream in streams for step in stream[epoch * steps : (epoch + 1) * steps] for key in step]
        assert len(set(keys)) == len(keys) == steps * batch * world  # none twice; only an incomplete batch is missing
        assert {at for at, _ in keys} <= {epoch} and {sample for _, sample in keys} <= set(range(volumes * per_volume))
        order = epoch_order(volumes, per_volume, 0, epoch).tolist()
        for step in range(steps):
            shared = [sample for stream in streams for _, sample in stream[epoch * steps + step]]
            assert shared == order[step * batch * world : (step + 1) * batch * world]


def test_two_ranks_see_what_one_sees_with_twice_the_batch():
    one = list(BatchStream(13, 5, 6, 0, 1, 7, 0, 0, 2))
    first, second = (list(BatchStream(13, 5, 3, rank, 2, 7, 0, 0, 2)) for rank in range(2))
    assert one == [a + b for a, b in zip(first, second, strict=True)] and len(one) == 20


def test_stream_goes_on_where_a_run_stopped():
    full = {rank: list(BatchStream(13, 5, 3, rank, 2, 7, 0, 0, 4)) for rank in range(2)}
    steps = 65 // 6
    for rank, epoch, step in itertools.product(range(2), range(4), range(steps + 1)):
        rest = list(BatchStream(13, 5, 3, rank, 2, 7, epoch, step * 6, 4))
        assert rest == full[rank][epoch * steps + step :]
    other = list(BatchStream(13, 5, 4, 0, 1, 7, 1, 18, 2))  # another batch size, from the middle of an epoch
    assert [sample for step in other for _, sample in step] == epoch_order(13, 5, 7, 1)[18 : 18 + 44].tolist()
    assert list(BatchStream(13, 5, 3, 0, 2, 7, 4, 0, 4)) == list(BatchStream(2, 1, 3, 0, 1, 7, 0, 0, 4)) == []


# ------------------------------------------------------------------------------------------------- pre-training patches

COUNTING = np.arange(30 * 31 * 29).reshape(30, 31, 29)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """12 files, whose voxels' values modulo 12 tell the file and the rest tells the place."""
    folder = tmp_path_factory.mktemp("volumes")
    for number in range(12):
        write_volume(folder / f"{number:02}.hdf5", (COUNTING // 12 * 12 + number).astype(np.int16), np.eye(4))
    return [str(folder / f"{number:02}.hdf5") for number in range(12)]


def assert_same_groups(groups, others, exactly=True):
    assert len(groups) == len(others) == 2
    for group, other in zip(groups, others):
        assert list(group.intensity) == list(other.intensity)
        for part, same in zip(parts_of(group), parts_of(other), strict=True):
            assert part.dtype == same.dtype
            np.testing.assert_array_equal(part, same)


def parts_of(group):
    """All tensors of a ViewBatch."""
    return [group.control, *(part for pair in group.intensity.values() for part in pair)]


def file_of(patch):
    """The number of the one file that a patch of `volumes` was taken from."""
    (number,) = np.unique(patch[patch >= 0] % 12)
    return number


def load(paths, workers, policy_crops, epochs=1, batch=4, rank=0, world=1, per_volume=3, **options):
    dataset = PretrainingPatches(paths, policy_crops, 3, per_volume, **options)
    stream = BatchStream(len(paths), per_volume, batch, rank, world, 3, 0, 0, epochs)
    return list(DataLoader(dataset, batch_sampler=stream, collate_fn=collate, num_workers=workers))


def test_batches_do_not_depend_on_workers(volumes):
    alone = load(volumes, 0, crops(ALL), epochs=2)
    keys = [key for step in BatchStream(12, 3, 4, 0, 1, 3, 0, 0, 2) for key in step]
    files = [file_of(patch) for batch in alone for patch in batch.patches.numpy()]
    assert files == [sample // 3 for _, sample in keys]  # in order, each from its own file
    assert len(alone) == 18 and alone[0].patches.shape == (4, *crops(ALL).patch_size)
    assert len(alone[0].groups[0].control) == 2 * 4 and len(alone[0].groups[1].control) == 3 * 4
    for workers in (1, 2):
        others = load(volumes, workers, crops(ALL), epochs=2)
        assert len(others) == len(alone)
        for batch, other in zip(alone, others):
            np.testing.assert_array_equal(batch.patches, other.patches)
            assert_same_groups(batch.groups, other.groups)
            assert (other.bad, other.fatal) == ([], "")


def test_patches_are_parts_of_their_volumes_and_vary(volumes):
    dataset = PretrainingPatches(volumes, crops(), 3, 3)
    seen = {}
    for key in itertools.product(range(2), range(36)):
        (sample,) = dataset.__getitems__([key])
        with Volume(volumes[key[1] // 3]) as volume:
            whole = volume.read()
        middle = np.array(sample.patch.shape) // 2
        where = np.argwhere(whole == sample.patch[tuple(middle)]) - middle  # 12 voxels share a value
        (found,) = [start for start in where if (padded_part(whole, start, sample.patch.shape) == sample.patch).all()]
        seen[key] = tuple(found)
    assert len(set(seen.values())) > 60


def test_views_differ_between_epochs_and_samples(volumes):
    dataset = PretrainingPatches(volumes, crops(ALL), 3, 3)
    samples = dataset.__getitems__(list(itertools.product(range(3), range(36))))
    assert len({view.tobytes() for sample in samples for view in sample.views[0].control}) > 2 * 100
    assert len({view.tobytes() for sample in samples for view in sample.views[1].control}) > 3 * 100  # 1 in 16 is plain
    other = PretrainingPatches(volumes, crops(ALL), 4, 3).__getitems__([(0, 0)])[0]
    assert not np.array_equal(other.views[0].control, samples[0].views[0].control)


def test_batches_of_two_ranks_are_the_batch_of_one(volumes):
    one = load(volumes, 0, crops(ALL), batch=6)
    first, second = (load(volumes, 0, crops(ALL), batch=3, rank=rank, world=2) for rank in range(2))
    assert len(one) == len(first) == len(second) == 6
    for whole, *halves in zip(one, first, second):
        np.testing.assert_array_equal(whole.patches, np.concatenate([half.patches for half in halves]))
        for group, shares in zip(whole.groups, zip(*(half.groups for half in halves))):
            for part, *parts in zip(*(values_of(one, like=group) for one in (group, *shares)), strict=True):
                parts = [p.reshape(-1, 3, *p.shape[1:]) for p in parts]  # (V, B, ...)
                np.testing.assert_array_equal(part, np.concatenate(parts, 1).reshape(part.shape))


def values_of(group, like):
    """Control points of all views, then the values of each intensity augmentation of `like`, NaN where it acts not."""
    parts = [group.control.numpy()]
    for name, (_, width) in like.intensity.items():
        parts.append(np.full((len(group.control), *width.shape[1:]), np.nan, np.float32))
        if name in group.intensity:
            indices, values = group.intensity[name]
            parts[-1][indices] = values
    return parts


def test_neighbouring_samples_share_one_opening(volumes, monkeypatch, nothing_left_open):
    opened = count_openings(monkeypatch)
    dataset = PretrainingPatches(volumes, crops(), 0, patches_per_volume=4)
    dataset.__getitems__([(0, sample) for sample in (0, 1, 2, 3, 8, 9, 4)])
    assert list(opened.items()) == [(volumes[0], 1), (volumes[2], 1), (volumes[1], 1)]
    assert opened.now == []


def count_openings(monkeypatch):
    """How often PretrainingPatches opens each file. `now`: what is open, one at a time; closed, not only forgotten."""
    opened = Counter()
    opened.now = []

    class Counting(Volume):
        def __init__(self, path):
            assert opened.now == []
            opened[path] += 1
            opened.now.append(path)
            super().__init__(path)

        def close(self):
            if self.path in opened.now:
                opened.now.remove(self.path)
            super().close()

    monkeypatch.setattr(volume_cache, "Volume", Counting)
    return opened


BREAK = {
    "zero bytes": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
    "missing": (lambda path: path.unlink(), "no such file"),
    "NaN": (lambda path: itk_bytes(path, VoxelData=np.full((30, 30, 30), np.nan, np.float32)), "NaN"),
    "constant": (lambda path: write_volume(path, np.full((30, 30, 30), 7, np.int16), np.eye(4)), "same value in all"),
    "all padding": (lambda path: write_volume(path, np.full((30, 30, 30), -2000, np.int16), np.eye(4)), "same value"),
}


def with_broken(volumes, folder, broken, how):
    """Copies of the volumes, some of them broken."""
    paths = []
    for number, path in enumerate(volumes):
        paths.append(folder / Path(path).name)
        paths[-1].write_bytes(Path(path).read_bytes())
        if number in broken:
            BREAK[how][0](paths[-1])
    return [str(path) for path in paths]


@pytest.mark.parametrize("how", BREAK)
def test_another_sample_takes_an_unreadable_ones_place(how, volumes, tmp_path, monkeypatch, nothing_left_open):
    paths = with_broken(volumes, tmp_path, {4}, how)
    opened = count_openings(monkeypatch)
    good = load(volumes, 0, crops(ALL), epochs=2)
    assert opened.pop(volumes[4]) > 1
    mixed = load(paths, 0, crops(ALL), epochs=2)
    again = load(paths, 2, crops(ALL), epochs=2)
    assert opened[paths[4]] == 2 and opened.now == []  # once in each epoch
    keys = list(BatchStream(12, 3, 4, 0, 1, 3, 0, 0, 2))
    replaced = 0
    for step, batch, whole, same in zip(keys, mixed, good, again, strict=True):
        np.testing.assert_array_equal(batch.patches, same.patches)
        assert batch.bad == same.bad and batch.fatal == ""
        assert_same_groups(batch.groups, whole.groups)  # the views stay the key's
        for (_, sample), patch, expected in zip(step, batch.patches.numpy(), whole.patches.numpy()):
            if sample // 3 == 4:
                replaced += 1
                assert file_of(patch) == 5  # the next in the list
            else:
                np.testing.assert_array_equal(patch, expected)
        if any(sample // 3 == 4 for _, sample in step):
            ((path, reason),) = batch.bad  # once, however many of its samples are in the batch
            assert path == paths[4] and re.search(BREAK[how][1], reason)
        else:
            assert batch.bad == []
    assert replaced == 2 * 3


def test_several_unreadable_files_in_a_row_and_at_the_end_of_the_list(volumes, tmp_path, monkeypatch):
    paths = with_broken(volumes, tmp_path, {0, 1, 10, 11}, "truncated")
    opened = count_openings(monkeypatch)
    dataset = PretrainingPatches(paths, crops(), 3)
    samples = dataset.__getitems__([(0, number) for number in (10, 5, 11, 0, 1)])
    assert [file_of(sample.patch) for sample in samples] == [2, 5, 2, 2, 2]
    assert [[paths.index(path) for path, _ in sample.bad] for sample in samples] == [
        [10, 11, 0, 1],
        [],
        [11, 0, 1],
        [0, 1],
        [1],
    ]
    assert [opened[paths[number]] for number in (0, 1, 10, 11)] == [1, 1, 1, 1]
    assert len(collate(samples).bad) == 4
    dataset.__getitems__([(0, number) for number in range(12)])
    assert [opened[paths[number]] for number in (0, 1, 10, 11)] == [1, 1, 1, 1]  # known by now


def test_a_file_is_tried_again_in_the_next_epoch(volumes, tmp_path):
    paths = with_broken(volumes, tmp_path, {4}, "truncated")
    dataset = PretrainingPatches(paths, crops(), 3)

    def sample(epoch):
        (one,) = dataset.__getitems__([(epoch, 4)])
        return file_of(one.patch), [path for path, _ in one.bad]

    assert sample(0) == (5, [paths[4]])
    Path(paths[4]).write_bytes(Path(volumes[4]).read_bytes())
    assert sample(0) == (5, [paths[4]])  # no file is tried twice in an epoch
    assert sample(1) == (4, [])
    Path(paths[4]).unlink()
    assert sample(1) == sample(2) == (5, [paths[4]])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_gives_up_where_too_many_files_are_bad(workers, volumes, tmp_path):
    paths = with_broken(volumes, tmp_path, {2, 5, 6, 9}, "truncated")
    assert not any(batch.fatal for batch in load(paths, workers, crops(), max_bad=4))
    batch = next(batch for batch in load(paths, workers, crops(), max_bad=3) if batch.fatal)
    assert re.fullmatch(r"4 of 12 files: can't be used, such as .*hdf5: can't be read .*truncated.*", batch.fatal)
    assert sorted(path for path, _ in batch.bad) == [paths[number] for number in (2, 5, 6, 9)]


# ------------------------------------------------------------------------------------------------- storage that hangs


class Release:
    """What to call for a hang: keeps the message, and lets the reader of a pipe go on."""

    def __init__(self, pipe):
        self.pipe, self.messages, self.workers = pipe, [], []

    def __call__(self, message):
        self.messages.append(message)
        with contextlib.suppress(OSError):  # the reader has not opened it yet: this is called again
            os.close(os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK))


def test_a_read_that_hangs_is_named(volumes, tmp_path):
    """A pipe that nobody writes to is opened without end, as a file on a drive that is gone."""
    paths, started = with_broken(volumes, tmp_path, set(), "missing"), torch.zeros(2).share_memory_()
    os.unlink(paths[7])
    os.mkfifo(paths[7])
    release = Release(paths[7])
    loader = DataLoader(
        PretrainingPatches(paths, crops(), 3),
        batch_sampler=[[(0, k), (0, k + 1)] for k in range(0, 12, 2)],
        collate_fn=collate,
        num_workers=2,
        worker_init_fn=functools.partial(count_start, started),
    )
    batches = list(with_read_timeout(loader, 1.0, release))
    assert len(batches) == 6 and started.tolist() == [1, 1]
    assert set(release.messages) == {release.messages[0]}
    assert release.messages[0].startswith(f"{paths[7]}: loader worker 1 has been reading it for 1 s: the storage hangs")
    assert [path for batch in batches for path, _ in batch.bad] == [paths[7]]


def count_start(started, worker):
    started[worker] += 1


def test_slow_reading_is_no_hang(volumes, monkeypatch):
    """Every file takes long, none too long; nor does a worker that waits for work."""
    real = volume_module.open_hdf5
    monkeypatch.setattr(volume_module, "open_hdf5", lambda *args: (time.sleep(0.4), real(*args))[1])
    loader = DataLoader(
        PretrainingPatches(volumes, crops(), 3),
        batch_sampler=[[(0, k)] for k in range(6)],
        collate_fn=collate,
        num_workers=1,
    )
    messages = []
    batches = with_read_timeout(loader, 1.0, messages.append)
    assert len([next(batches) for _ in range(5)]) == 5
    time.sleep(1.5)
    assert len(list(batches)) == 1 and messages == []


@pytest.mark.parametrize("workers, seconds", [(0, 1.0), (1, 0.0)])
def test_watching_can_be_switched_off(workers, seconds, volumes, monkeypatch):
    monkeypatch.setattr(read_watchdog, "ReadWatchdog", None)
    loader = DataLoader(
        PretrainingPatches(volumes, crops(), 3), batch_sampler=[[(0, 0)]], collate_fn=collate, num_workers=workers
    )
    assert len(list(with_read_timeout(loader, seconds, None))) == 1


def test_two_samples_of_one_volume_around_a_bad_one(volumes, tmp_path):
    """The neighbour's file stays open while a bad one is tried: nothing of it leaks into the next sample."""
    paths = with_broken(volumes, tmp_path, {1}, "NaN")
    keys = [(0, sample) for sample in (0, 3, 1, 4, 6, 7)]  # of volumes 0 1 0 1 2 2
    samples = PretrainingPatches(paths, crops(), 3, 3).__getitems__(keys)
    assert [file_of(sample.patch) for sample in samples] == [0, 2, 0, 2, 2, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_ends_with_the_file_and_the_reason(workers, volumes, tmp_path, nothing_left_open):
    paths = with_broken(volumes, tmp_path, {4}, "truncated")
    batches = load(paths, workers, crops(), epochs=1, batch=4, strict=True)
    keys = list(BatchStream(12, 3, 4, 0, 1, 3, 0, 0, 1))
    for step, batch in zip(keys, batches, strict=True):
        if any(sample // 3 == 4 for _, sample in step):
            assert batch.fatal.startswith(f"{paths[4]}: can't be read") and "truncated" in batch.fatal
        else:
            assert batch.fatal == "" and len(batch.patches) == 4
    assert sum(bool(batch.fatal) for batch in batches) >= 1


@pytest.mark.parametrize("how", ["truncated", "constant"])
def test_nothing_readable_ends_after_one_try_of_each(how, volumes, tmp_path, monkeypatch, nothing_left_open):
    paths = with_broken(volumes, tmp_path, set(range(12)), how)
    opened = count_openings(monkeypatch)
    batch = load(paths, 0, crops(), batch=36)[0]
    assert opened == dict.fromkeys(paths, 1) and opened.now == []
    assert batch.fatal.startswith("12 files: not one can be used") and re.search(BREAK[how][1], batch.fatal)
    assert any(path in batch.fatal for path in paths)
    assert load(paths, 1, crops(), batch=36)[0].fatal == batch.fatal  # a worker's message arrives as it is
    single = PretrainingPatches(paths[:1], crops(), 3)
    assert len(collate(single.__getitems__([(0, 0)])).fatal) > 0


def test_air_in_a_good_volume_is_no_error(tmp_path):
    voxels = np.full((60, 60, 40), AIR, np.int16)
    voxels[:20, :20, :10] = noise((20, 20, 10))
    write_volume(tmp_path / "ct.hdf5", voxels, np.eye(4))
    samples = PretrainingPatches([str(tmp_path / "ct.hdf5")], crops(), 0, 60).__getitems__([(0, i) for i in range(60)])
    assert all(sample.bad == [] for sample in samples)
    air = [(sample.patch == AIR).all() for sample in samples]
    assert 5 < sum(air) < 60


def test_no_file_stays_open_over_many_samples(volumes, tmp_path):
    paths = with_broken(volumes, tmp_path, {2, 7}, "NaN")
    dataset = PretrainingPatches(paths, crops(), 0, 10)
    before = open_files()
    for step in BatchStream(12, 10, 5, 0, 1, 0, 0, 0, 2):
        dataset.__getitems__(step)
        assert open_files() == before
    assert 2 * (120 // 5) * 5 >= 200


# ------------------------------------------------------------------------------------------------------------- real CT


def test_real_ct_is_written_and_read_back(shared_data, tmp_path):
    source = shared_data / "ct" / "totalsegmentator_example.nii.gz"
    image = nibabel.load(source)
    voxels = np.asarray(image.dataobj)
    expected = nibabel.as_closest_canonical(image)
    for compression in ("blosc", "gzip"):
        path = tmp_path / f"{compression}.hdf5"
        write_volume(path, voxels, image.affine, compression)
        with Volume(path) as volume:
            np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)
            np.testing.assert_array_equal(volume.read(), np.asarray(expected.dataobj))
            with Volume(source) as nifti:
                start, size = (-5, 40, 100), (60, 50, 99)
                np.testing.assert_array_equal(volume.read(start, size), nifti.read(start, size))
            assert not volume.is_constant()
        assert path.stat().st_size < voxels.nbytes
    ours, theirs = sitk.ReadImage(tmp_path / "gzip.hdf5"), sitk.ReadImage(source)
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(ours), sitk.GetArrayViewFromImage(theirs))
    for what in ("Spacing", "Origin", "Direction"):
        np.testing.assert_allclose(getattr(ours, f"Get{what}")(), getattr(theirs, f"Get{what}")(), atol=1e-4)
