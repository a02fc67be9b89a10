"""sliding_window.py: functions of the place in the world on grids that lie in every way, windows against a loop in
float64, masks against nibabel, SimpleITK and scipy, and real lesions there and back."""

import itertools
import os

import nibabel
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
import torch
from grids import LPS, OBLIQUE, SIGNED_PERMUTATIONS, affine_to_ras, canonical, noise
from test_images import ALL_AXES, contents, itk_image, places, ras_image, with_

from dino3d.data import images, resampling
from dino3d.data.conventions import AIR, DataError, format_size
from dino3d.data.hdf5 import write_volume
from dino3d.data.layouts import Pair, find_pairs
from dino3d.data.volume import Volume
from dino3d.features import sliding_window
from dino3d.features.sliding_window import (
    Grid,
    Windows,
    grid_of,
    mean_of,
    read_case,
    segment,
    to_network_grid,
    to_scan_grid,
)

CLIP = (-1000.0, 1000.0)


def dice(found, expected):
    return 2 * (found & expected).sum() / (found.sum() + expected.sum())


def as_scan(label):
    """An image whose HU tell the class, for `tell_classes` to read."""
    return sitk.Cast(label, sitk.sitkInt16) * 300 - 1000


def tell_classes(windows, classes=3):
    found = (windows[:, 0] * 2000 / 300).round().long()  # air is class 0
    return 10 * torch.nn.functional.one_hot(found, classes).movedim(-1, 1).float()


def there_and_back(label, spacing, own, windows=Windows((24, 20, 12), 0.5, 4)):
    """(X, Y, Z) classes that a label in RAS comes back as, on the Grid `own`, from a network that makes no error."""
    working = to_network_grid(label, spacing, is_label=True)
    classes = set(np.unique(contents(label)[0]))
    assert working.GetPixelID() == sitk.sitkUInt8 and set(np.unique(contents(working)[0])) <= classes
    found = segment([tell_classes], as_scan(working), windows, CLIP, "cpu")
    return contents(to_scan_grid(found, grid_of(working), own))[0]


# ------------------------------------------------------------------------------------------------------- there and back


def test_labels_come_back_as_they_were_in_all_48_orientations():
    for number, axes in enumerate(SIGNED_PERMUTATIONS):
        stored = noise((7, 5, 6), high=3, seed=number).astype(np.uint8)
        file = itk_image(stored, axes)
        label = ras_image(file)
        found = there_and_back(label, label.GetSpacing(), grid_of(file), Windows((4, 6, 3), 0.5, 3))
        np.testing.assert_array_equal(found, stored)


def lesion(shape=(60, 56, 40), spacing=(0.8, 0.8, 2.0)):
    """A generated (label, case): two balls that overlap."""
    affine = affine_to_ras(np.eye(3), spacing)
    where = places(shape, affine) - (affine @ [*(np.array(shape) / 2), 1])[:3]
    inside = (np.linalg.norm(where, axis=-1) < 9) | (np.linalg.norm(where - [7, 5, -6], axis=-1) < 6)
    return ras_image(itk_image(inside.astype(np.uint8), np.eye(3), spacing))


def assert_comes_back(label, spacing, name):
    first, size = resampling.mask_box(label > 0, label, 0)
    near, far = np.maximum(first - 40, 0), np.minimum(first + size + 40, label.GetSize())
    part = resampling.crop_to_box(label, (near, far - near))
    own = images.voxels_of(part)
    volume = (own > 0).sum() * np.prod(label.GetSpacing()) / 1000
    at_own = there_and_back(part, part.GetSpacing(), grid_of(part), Windows((64, 64, 32), 0.25, 2))
    np.testing.assert_array_equal(at_own, own)
    found = dice(there_and_back(part, spacing, grid_of(part), Windows((64, 64, 32), 0.25, 2)) > 0, own > 0)
    print(f"{name}: {volume:.1f} ml, spacing {format_size(label.GetSpacing())}, Dice {found:.4f}")
    assert found >= 0.90 or volume < 1


def test_a_generated_lesion_comes_back():
    assert_comes_back(lesion(), (1.1, 1.1, 1.5), "generated")


def test_real_lesions_come_back(shared_data):
    task = shared_data / "msd" / "Task06_Lung"
    pairs = [
        Pair(path.name, str(path), str(task / "labelsTr" / path.name))
        for path in sorted((task / "imagesTr").glob("*.nii.gz"))
    ]
    spacing = np.median([nibabel.load(pair.image).header.get_zooms() for pair in pairs], axis=0)
    assert len(pairs) == 4
    for pair in pairs:
        image, label = read_case(pair)
        assert grid_of(image) == grid_of(label) and image.GetPixelID() == sitk.sitkInt16
        assert_comes_back(label, spacing, pair.name)


# ---------------------------------------------------------------------------------------------------------------- grids


GRIDS = {  # name: (axes in LPS, shape, spacing)
    **{name: (axes, (34, 38, 30), (1.5, 1.3, 1.7)) for name, axes in ALL_AXES.items()},
    "flat": (np.eye(3), (60, 56, 14), (0.8, 0.9, 4.0)),
    "flat and oblique": (OBLIQUE, (60, 56, 14), (0.8, 0.9, 4.0)),
    "flat, oblique and permuted": (OBLIQUE @ SIGNED_PERMUTATIONS[29], (60, 56, 14), (0.8, 0.9, 4.0)),
}
MIDDLE = np.array([12.0, -30.0, 140.0])  # RAS mm


def lying(name):
    """(affine to RAS mm, axes, shape, spacing, LPS origin) of a grid around MIDDLE."""
    axes, shape, spacing = GRIDS[name]
    origin = LPS[:3, :3] @ MIDDLE - np.array(axes) * spacing @ ((np.array(shape) - 1) / 2)
    return affine_to_ras(axes, spacing, origin), axes, shape, spacing, origin


def waves(where):
    """HU at places (..., 3), smooth and nowhere symmetric."""
    x, y, z = np.moveaxis(where - MIDDLE, -1, 0)
    return 400 * np.sin(x / 9 + 0.3) * np.cos(y / 11 - 0.5) + 300 * np.sin(z / 10 + x / 25) + 5 * y


def logits_at(where):
    """(3, ...) of two balls, classes 1 and 2, at places (..., 3)."""
    offset = where - MIDDLE
    first, second = np.linalg.norm(offset - [4, -3, 2], axis=-1), np.linalg.norm(offset + [9, 2, 5], axis=-1)
    return np.stack([np.zeros_like(first), 10 - first, 7 - second])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.4, 1.4, 2.0)], ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_the_working_grid_shows_every_place_upright(name, spacing):
    affine, axes, shape, own, origin = lying(name)
    file = itk_image(np.rint(waves(places(shape, affine))).astype(np.int16), axes, own, origin)
    working = to_network_grid(ras_image(file), spacing)
    voxels, found = contents(working)
    np.testing.assert_allclose(found[:3, :3], np.diag(spacing), atol=1e-6)
    where = places(voxels.shape, found)
    index = places(voxels.shape, np.linalg.inv(affine) @ found)
    inside = ((index > 1.5) & (index < np.array(shape) - 2.5)).all(-1)
    outside = ((index < -2.5) | (index > np.array(shape) + 1.5)).any(-1)
    assert inside.sum() > 5000 and (voxels[outside] == AIR).all()
    difference = np.abs(voxels - waves(where))[inside]
    assert difference.mean() < 6 and difference.max() < 40  # of 400 over a quarter wave, 14 mm


@pytest.mark.parametrize("name", GRIDS)
def test_masks_on_every_grid_lie_where_the_classes_are(name, tmp_path):
    affine, axes, shape, own, origin = lying(name)
    file = itk_image(np.rint(waves(places(shape, affine))).astype(np.int16), axes, own, origin)
    expected = logits_at(places(shape, affine)).argmax(0)
    for suffix in (".nii.gz", ".mha", ".nrrd"):
        path = str(tmp_path / f"scan{suffix}")
        sitk.WriteImage(file, path)
        image = images.read_image(path)
        working = to_network_grid(image, (1.1, 1.1, 1.3))
        maps = logits_at(places(working.GetSize(), images.affine_of(working))).astype(np.float32)
        mask = to_scan_grid(torch.from_numpy(maps).log_softmax(0), grid_of(working), grid_of(image))
        with Volume(path) as volume:
            assert volume.file_shape == shape
            volume.save_mask(tmp_path / "mask.nii.gz", images.voxels_of(mask))
        saved, itk = nibabel.load(tmp_path / "mask.nii.gz"), sitk.ReadImage(tmp_path / "mask.nii.gz")
        np.testing.assert_allclose(saved.affine, affine, rtol=0, atol=1e-4)
        for number in (1, 2):
            assert dice(np.asarray(saved.dataobj) == number, expected == number) > 0.98
        as_saved, as_found = canonical(np.asarray(saved.dataobj), saved.affine), contents(mask)
        np.testing.assert_array_equal(as_saved[0], as_found[0])
        np.testing.assert_allclose(as_saved[1], as_found[1], rtol=0, atol=1e-4)
        assert itk.GetSize() == file.GetSize() and itk.GetPixelID() == sitk.sitkUInt8
        for corner in itertools.product(*((0, n - 1) for n in shape)):
            np.testing.assert_allclose(
                itk.TransformIndexToPhysicalPoint(corner), file.TransformIndexToPhysicalPoint(corner), atol=1e-3
            )
    assert sorted(os.listdir(tmp_path)) == ["mask.nii.gz", "scan.mha", "scan.nii.gz", "scan.nrrd"]


def test_an_image_on_the_working_grid_is_left_as_it_is():
    tilt = np.diag([-1.0, -1, 1]) + 5e-4 * np.array([[0, -1, 0], [1, 0, 0], [0, 0, 0]])
    for axes in (np.diag([-1.0, -1, 1]), tilt):
        for spacing in ((0.9, 0.7, 2.5), (0.9004, 0.6998, 2.501)):
            image = itk_image(noise(low=-1000, high=3000).astype(np.int16), axes)
            before = grid_of(image), images.voxels_of(image).copy()
            found = to_network_grid(image, spacing)
            assert grid_of(found) == before[0]
            np.testing.assert_array_equal(images.voxels_of(found), before[1])
    assert to_network_grid(image, (0.902, 0.7, 2.5)).GetSpacing() == (0.902, 0.7, 2.5)
    turned = to_network_grid(ras_image(itk_image(noise().astype(np.int16), OBLIQUE)), (0.9, 0.7, 2.5))
    np.testing.assert_allclose(images.affine_of(turned)[:3, :3], np.diag((0.9, 0.7, 2.5)), atol=1e-9)


@pytest.mark.parametrize("name", ["axial", "oblique", "flat, oblique and permuted", "sagittal"])
@pytest.mark.parametrize("classes", [2, 4])
def test_classes_are_those_of_the_interpolated_maps(name, classes, monkeypatch):
    monkeypatch.setattr(sliding_window, "BLOCK", 13)
    affine, axes, shape, own, origin = lying(name)
    image = ras_image(itk_image(np.zeros(shape, np.uint8), axes, own, origin))
    working = to_network_grid(image, (1.9, 2.1, 2.3), is_label=True)
    maps = np.random.default_rng(0).normal(size=(classes, *working.GetSize())).astype(np.float32)
    maps[0, :, :12] += 20  # a part where all blocks are of one class
    found = contents(to_scan_grid(maps, grid_of(working), Grid(shape, own, tuple(origin), tuple(np.ravel(axes)))))[0]
    index = places(shape, np.linalg.inv(images.affine_of(working)) @ affine)
    at = np.stack(
        [
            scipy.ndimage.map_coordinates(one.astype(float), np.moveaxis(index, -1, 0), order=1, mode="nearest")
            for one in maps
        ]
    )
    first, second = np.sort(at, axis=0)[[-1, -2]]
    clear = first - second > 1e-4
    assert clear.mean() > 0.99 and len(np.unique(found)) == classes
    np.testing.assert_array_equal(found[clear], at.argmax(0)[clear])


@pytest.mark.parametrize("name", ["axial", "sagittal", "oblique"])
def test_beyond_the_working_grid_is_background(name, monkeypatch):
    monkeypatch.setattr(sliding_window, "BLOCK", 16)
    affine, axes, shape, own, origin = lying(name)
    image = ras_image(itk_image(np.zeros(shape, np.uint8), axes, own, origin))
    working = resampling.crop_to_box(to_network_grid(image, (1.9, 2.1, 2.3), is_label=True), ((4, 5, 3), (9, 8, 7)))
    maps = np.stack([np.zeros((9, 8, 7)), np.ones((9, 8, 7))]).astype(np.float32)
    grid = Grid(shape, own, tuple(origin), tuple(np.ravel(axes)))
    index = places(shape, np.linalg.inv(images.affine_of(working)) @ affine)
    near = ((index > -1.5) & (index < [9.5, 8.5, 7.5])).all(-1)
    np.testing.assert_array_equal(contents(to_scan_grid(maps, grid_of(working), grid))[0], near)
    away = grid._replace(origin=tuple(np.array(origin) + 500))
    assert not contents(to_scan_grid(maps, grid_of(working), away))[0].any()


def test_maps_of_a_grid_flipped_or_permuted_are_not_interpolated():
    rng = np.random.default_rng(0)
    maps = (rng.normal(size=(3, 6, 7, 5)) * 10 ** rng.uniform(-12, 12, (6, 7, 5))).astype(
        np.float32
    )  # rounding would show
    maps[1, :3] = maps[0, :3]  # of equal ones the first
    working = itk_image(np.zeros(maps.shape[1:], np.uint8), OBLIQUE)
    for flip in itertools.product((False, True), repeat=3):
        for order in itertools.permutations(range(3)):
            own = sitk.PermuteAxes(sitk.Flip(working, flip), order)
            expected = maps.argmax(0)[tuple(slice(None, None, -1 if one else 1) for one in flip)].transpose(order)
            found = to_scan_grid(maps, grid_of(working), grid_of(own))
            assert grid_of(found) == grid_of(own)
            np.testing.assert_array_equal(images.voxels_of(found), expected)


def test_a_grid_beside_the_working_grid_is_not_taken_for_it():
    maps = np.random.default_rng(0).normal(size=(3, 6, 7, 5)).astype(np.float32)
    working = Grid((6, 7, 5), (0.9, 0.7, 2.5), (3.0, 4.0, 5.0), tuple(np.ravel(OBLIQUE)))
    for axis in range(3):
        own = working.part(
            np.eye(3, dtype=int)[axis], np.add(working.size, np.eye(3, dtype=int)[axis])
        )  # a voxel further
        found = np.moveaxis(contents(to_scan_grid(maps, working, own))[0], axis, 0)
        expected = np.moveaxis(maps.argmax(0), axis, 0)
        np.testing.assert_array_equal(found, [*expected[1:], expected[-1]])


# -------------------------------------------------------------------------------------------------------------- windows


def per_voxel(windows):
    """(B, 3, ...) logits that depend on a voxel's value alone."""
    return torch.cat([windows, 3 - 5 * windows, 0.5 + windows / 2], 1)


def by_position(windows):
    """(B, 2, ...) logits that also depend on the place in the window."""
    x, y, z = (
        torch.linspace(-1, 1, n).reshape([-1 if i == axis else 1 for i in range(3)])
        for axis, n in enumerate(windows.shape[2:])
    )
    ramp = x + 2 * y**2 - 0.5 * z * x
    return torch.cat([3 * windows + ramp, windows**2 - ramp], 1)


def scan(shape, seed=0):
    return images.make_image(noise(shape, -1024, 1200, seed).astype(np.int16), np.diag([1.0, 1, 2, 1]))


def scaled(image, low, high):
    hu = torch.from_numpy(images.voxels_of(image).astype(np.float64))
    return ((hu - low) / (high - low)).clip(0, 1)


SHAPES = [(17, 23, 13), (12, 12, 12), (5, 23, 13), (5, 7, 13), (5, 7, 4), (1, 1, 1), (12, 24, 36)]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_of_a_network_that_sees_voxels_alone(shape, overlap):
    image = scan(shape)
    expected = per_voxel(scaled(image, *CLIP)[None, None]).log_softmax(1)[0]
    for batch_size, on_cpu in ((1, None), (3, True), (64, False)):
        found = segment(
            [per_voxel], image, Windows((12, 10, 8), overlap, batch_size), CLIP, "cpu", stitch_on_cpu=on_cpu
        )
        assert found.dtype == torch.float32 and found.device.type == "cpu" and found.shape == (3, *shape)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)


def stitched(image, size, overlap, clip_range):
    """by_position in float64: windows one by one, Gaussian weights as MONAI describes them."""
    volume = scaled(image, *clip_range).numpy()
    shape = volume.shape
    missing = np.maximum(np.array(size) - shape, 0)
    air = np.clip((AIR - clip_range[0]) / (clip_range[1] - clip_range[0]), 0, 1)
    volume = np.pad(volume, [(m // 2, m - m // 2) for m in missing], constant_values=air)
    offsets = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size), indexing="ij"))
    weights = np.exp(-0.5 * ((offsets / (0.125 * np.reshape(size, (3, 1, 1, 1)))) ** 2).sum(0))
    weights = np.maximum(weights, 1e-3)
    total, count = np.zeros((2, *volume.shape)), np.zeros(volume.shape)
    starts = []
    for n, side in zip(volume.shape, size):
        step = side if n == side else max(int(side * (1 - overlap)), 1)
        starts.append([*range(0, n - side, step), n - side])
    for corner in itertools.product(*starts):
        box = tuple(slice(a, a + side) for a, side in zip(corner, size))
        total[(slice(None), *box)] += by_position(torch.from_numpy(volume[box])[None, None])[0].numpy() * weights
        count[box] += weights
    logits = (total / count)[(slice(None), *(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape)))]
    return logits - np.logaddexp(*logits)


@pytest.mark.parametrize("clip_range", [CLIP, (-1400.0, 600.0)], ids=str)  # air is 0, and not
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_are_weighted_by_a_gaussian(shape, overlap, clip_range):
    image = scan(shape)
    expected = stitched(image, (12, 10, 8), overlap, clip_range)
    for batch_size in (1, 5):
        found = segment([by_position], image, Windows((12, 10, 8), overlap, batch_size), clip_range, "cpu")
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_networks_run_in_the_given_context_without_gradients():
    seen = []
    layer = torch.nn.Conv3d(1, 2, 1)
    torch.nn.init.normal_(layer.weight)

    def network(windows):
        seen.append((torch.is_grad_enabled(), tuple(windows.shape), windows.dtype))
        return layer(windows)

    image = scan((15, 11, 9))
    found = segment(
        [network], image, Windows((8, 8, 8), 0.5, 2), CLIP, "cpu", lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert {(grad, shape[1:], dtype) for grad, shape, dtype in seen} == {(False, (1, 8, 8, 8), torch.float32)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = layer(scaled(image, *CLIP)[None, None].float())
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, logits.float().log_softmax(1)[0], rtol=0, atol=1e-5)  # no digit lost since


def test_several_networks_are_averaged_in_probability():
    image, windows = scan((13, 11, 9)), Windows((8, 8, 8))
    networks = [per_voxel, lambda x: -20 * per_voxel(x), lambda x: 90 * per_voxel(x).flip(1)]
    each = [segment([network], image, windows, CLIP, "cpu").double() for network in networks]
    found = segment(networks, image, windows, CLIP, "cpu")
    expected = torch.stack([one.exp() for one in each]).mean(0)
    torch.testing.assert_close(found.double().exp(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.exp().sum(0), torch.ones(13, 11, 9), rtol=0, atol=1e-5)


def test_the_mean_of_probabilities_near_0_keeps_its_digits():
    one, other = torch.tensor([-200.0, -0.5, 0.0]), torch.tensor([-210.0, -300.0, 0.0])
    found = mean_of(map(torch.clone, (one, other, other)))
    expected = np.logaddexp.reduce([one.double(), other.double(), other.double()]) - np.log(3)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mean_of([one.clone()]), one, rtol=0, atol=0)


def test_what_does_not_fit_a_gpu_is_stitched_on_the_cpu(monkeypatch):
    """The rule: logits of 3 classes, count map, input and what normalizing takes."""
    voxels = torch.zeros(1, 1, 40, 5, 30)
    volume = 4 * 40 * 12 * 30  # bytes; the window is wider than the image along y
    for volumes, fits in ((4, False), (6.9, False), (10, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=volumes * volume: (int(free), 0))
        assert sliding_window._fits(per_voxel, voxels, Windows((16, 12, 16)), torch.device("cpu")) == fits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_stitching_on_the_gpu_equals_the_cpu(monkeypatch):
    image, windows = scan((50, 40, 30)), Windows((16, 16, 16), 0.5, 4)
    found = [segment([per_voxel], image, windows, CLIP, "cuda", stitch_on_cpu=choice) for choice in (True, False, None)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 0))
    for one in (*found, segment([per_voxel], image, windows, CLIP, "cuda")):
        torch.testing.assert_close(one, segment([per_voxel], image, windows, CLIP, "cpu"), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- saved masks


@pytest.mark.parametrize("qform, sform", [(1, 1), (1, 0), (0, 2), (2, 4), (0, 0)])
@pytest.mark.parametrize("suffix, endian", [(".nii", ">"), (".nii.gz", "<"), (".NII.GZ", "<")])
def test_a_nifti_scans_header_is_kept(suffix, endian, qform, sform, tmp_path):
    header = nibabel.Nifti1Header(endianness=endian)
    header.set_data_dtype(np.int16)
    header.set_slope_inter(0.5, -1000)
    header.set_xyzt_units("mm", "sec")
    header["cal_max"], header["cal_min"], header["descrip"] = 400, -1000, b"thorax"
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"name of the patient"))
    affine = affine_to_ras(OBLIQUE @ SIGNED_PERMUTATIONS[13])
    scan = nibabel.Nifti1Image(noise(high=300).astype(np.int16), affine, header)
    scan.set_qform(affine, qform)
    scan.set_sform(affine + 1e-3 * np.eye(4, k=1) * [0, 0, 0, sform > 2], sform)
    path = tmp_path / f"scan{suffix}"
    nibabel.save(scan, path)

    stored = noise(high=3).astype(np.uint8)
    with Volume(path) as volume:
        volume.save_mask(tmp_path / "mask.nii.gz", canonical(stored, nibabel.load(path).affine)[0])
    scan, mask = nibabel.load(path), nibabel.load(tmp_path / "mask.nii.gz")
    for field in (
        "qform_code",
        "sform_code",
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "qoffset_x",
        "qoffset_y",
        "qoffset_z",
        "srow_x",
        "srow_y",
        "srow_z",
        "pixdim",
        "xyzt_units",
        "dim",
        "descrip",
    ):
        np.testing.assert_array_equal(mask.header[field], scan.header[field], err_msg=field)
    np.testing.assert_array_equal(mask.affine, scan.affine)
    assert mask.get_data_dtype() == np.uint8 and mask.header["cal_max"] == 0 and not mask.header.extensions
    np.testing.assert_array_equal(mask.get_fdata(), stored)
    itk, same = sitk.ReadImage(tmp_path / "mask.nii.gz"), sitk.ReadImage(path)
    assert (itk.GetSize(), itk.GetOrigin(), itk.GetDirection(), itk.GetSpacing()) == (
        same.GetSize(),
        same.GetOrigin(),
        same.GetDirection(),
        same.GetSpacing(),
    )


def test_masks_of_hdf5_scans_lie_on_them_in_the_files_own_order(tmp_path):
    affine, stored = affine_to_ras(SIGNED_PERMUTATIONS[21]), noise(low=-900, high=900).astype(np.int16)
    write_volume(tmp_path / "scan.hdf5", stored, affine)
    with Volume(tmp_path / "scan.hdf5") as volume:
        volume.save_mask(tmp_path / "mask.nii", (volume.read() > 0).astype(np.uint8))
    saved = nibabel.load(tmp_path / "mask.nii")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), stored > 0)
    np.testing.assert_allclose(saved.affine, affine, atol=1e-4)


def test_a_mask_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    nibabel.save(nibabel.Nifti1Image(noise().astype(np.int16), LPS), tmp_path / "scan.nii.gz")
    (tmp_path / "mask.nii.gz").write_bytes(b"before")
    sitk.WriteImage(itk_image(noise().astype(np.int16)), tmp_path / "scan.mha")
    scans = {name: Volume(tmp_path / name) for name in ("scan.nii.gz", "scan.mha")}
    mask, save = noise(high=2).astype(np.uint8), nibabel.save

    def no_space(image, path):
        assert os.path.dirname(path) == str(tmp_path) and os.path.basename(path).startswith(".")
        save(image, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel, "save", no_space)
    for scan in scans.values():
        with pytest.raises(OSError, match="No space"):
            scan.save_mask(tmp_path / "mask.nii.gz", mask)
    monkeypatch.undo()
    with pytest.raises(OSError):
        scans["scan.nii.gz"].save_mask(tmp_path / "none" / "mask.nii.gz", mask)
    nibabel.save(nibabel.Nifti1Image(noise((8, 5, 7)).astype(np.int16), LPS), tmp_path / "scan.nii.gz")
    with pytest.raises(OSError, match="changed since"):
        scans["scan.nii.gz"].save_mask(tmp_path / "mask.nii.gz", mask)
    (tmp_path / "scan.nii.gz").write_bytes(b"other")
    with pytest.raises(OSError, match="can't be read any more"):
        scans["scan.nii.gz"].save_mask(tmp_path / "mask.nii.gz", mask)
    assert sorted(os.listdir(tmp_path)) == ["mask.nii.gz", "scan.mha", "scan.nii.gz"]
    assert (tmp_path / "mask.nii.gz").read_bytes() == b"before"


# ------------------------------------------------------------------------------------------------------------ bad input


SHEARED = LPS @ (np.eye(4) + 0.05 * np.eye(4, k=1) * [1, 1, 0, 1])
GOOD = noise(low=-900, high=900).astype(np.int16), LPS
BAD_CASES = {  # name: (image, its affine, label, its affine, whose fault, reason)
    "4D": (noise((4, 3, 5, 2)).astype(np.int16), LPS, noise((4, 3, 5), high=2), LPS, "image", "is a 4D image"),
    "NaN": (with_(GOOD[0], np.nan), LPS, noise(high=2), LPS, "image", "NaN or infinite"),
    "label of another shape": (
        *GOOD,
        noise((8, 5, 7), high=2),
        LPS,
        "label",
        "another shape than its image: 8 x 5 x 7",
    ),
    "label elsewhere": (*GOOD, noise(high=2), LPS @ np.diag([1, 1, 1.2, 1]), "label", "lies elsewhere than its image"),
    "label of no classes": (*GOOD, with_(noise(high=2), 0.5), LPS, "label", "label values such as 0.5"),
    "sheared": (GOOD[0], SHEARED, noise(high=2), SHEARED, "image", "axes that are not at right angles"),
}


@pytest.mark.parametrize("image, affine, label, label_affine, whose, reason", BAD_CASES.values(), ids=BAD_CASES)
def test_unusable_cases_are_named_with_the_reason(image, affine, label, label_affine, whose, reason, tmp_path):
    for kind, voxels, where in (("images", image, affine), ("labels", label.astype(np.float32), label_affine)):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(voxels, where), tmp_path / kind / "a.nii.gz")
    (pair,), _ = find_pairs(tmp_path)
    with pytest.raises(DataError, match=reason) as error:
        read_case(pair)
    assert error.value.path == getattr(pair, whose) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "voxels, affine, reason",
    [
        (noise((4, 3, 5, 2)).astype(np.int16), LPS, "is a 4D image"),
        (with_(GOOD[0], np.nan), LPS, "NaN or infinite"),
        (GOOD[0], SHEARED, "not at right angles"),
    ],
    ids=["4D", "NaN", "sheared"],
)
def test_unusable_scans_are_named_with_the_reason(voxels, affine, reason, tmp_path):
    path = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    with pytest.raises(DataError, match=reason) as error:
        images.read_image(path)
    assert error.value.path == str(path) and "\n" not in str(error.value)
