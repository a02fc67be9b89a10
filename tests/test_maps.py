"""Maps of an encoder: attention against get_last_selfattention, components against scikit-learn, one window and many
against loops, and that they lie on the scan, the right way round, without seams."""

import itertools
import json

import nibabel
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
import torch
from grids import AXES, MIRRORED, affine_to_ras
from PIL import Image
from sklearn.decomposition import PCA
from test_images import itk_image

from augmentations import scale_intensity
from dino3d.command_line import UserError
from dino3d.data import images
from dino3d.data.conventions import AIR, DataError
from dino3d.data.hdf5 import write_volume
from dino3d.features import map_pictures
from dino3d.features.map_pictures import are_done, save_maps
from dino3d.features.maps import (
    Components,
    attention_maps,
    component_maps,
    patch_grid,
    principal_components,
    scan_maps,
    similarity,
    voxel_at,
)
from dino3d.features.sliding_window import Grid, interpolate
from vision_transformer import VisionTransformer

CLIP = (-1000.0, 400.0)
PATCH, SIZE = (4, 3, 2), (16, 9, 8)


def encoder_of(size=SIZE, patch=PATCH, seed=0):
    """A small vision transformer whose weights are large enough for its attention to be uneven."""
    torch.manual_seed(seed)
    model = VisionTransformer(size, patch, embed_dim=24, depth=2, num_heads=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def volume_of(shape, seed=0):
    return np.random.default_rng(seed).integers(-900, 400, shape).astype(np.int16)


def image_of(hu, spacing=(1.0, 1.0, 1.0)):
    """An upright image in RAS."""
    return images.make_image(hu, np.diag([*spacing, 1.0]))


def scaled(hu):
    return scale_intensity(torch.from_numpy(hu.astype(np.float32)), *CLIP)[None, None]


# ----------------------------------------------------------------------------------------------------------- attention


def test_attention_is_the_class_tokens_row_on_the_patch_grid():
    encoder = encoder_of()
    volumes = torch.rand(2, 1, *SIZE)
    found = attention_maps(encoder, volumes)
    whole = encoder.get_last_selfattention(volumes)  # (B, heads, 1 + N, 1 + N)
    assert found.shape == (2, 3, 4, 3, 4) and not found.requires_grad
    for x, y, z in itertools.product(range(4), range(3), range(4)):
        torch.testing.assert_close(found[:, :, x, y, z], whole[:, :, 0, 1 + (x * 3 + y) * 4 + z])
    assert found.std() > 0.001  # uneven: a wrong order would be seen
    features, _ = encoder.features_and_attention(volumes)
    torch.testing.assert_close(features, encoder.get_intermediate_layers(volumes)[0])


class Convolutional(torch.nn.Module):
    """An encoder without a class token."""

    embed_dim, img_size, patch_size = 5, SIZE, PATCH
    first_position = tuple((n - 1) / 2 for n in PATCH)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv3d(1, 5, PATCH, PATCH)

    def get_intermediate_layers(self, x, n, norm=True):
        return [self.layer(x)]


def test_an_encoder_without_attention_has_features_alone():
    with pytest.raises(ValueError, match="a Convolutional has no attention"):
        attention_maps(Convolutional(), torch.rand(1, 1, *SIZE))
    maps = scan_maps(Convolutional(), image_of(volume_of((20, 12, 8))), None, CLIP)
    assert maps.attention is None and maps.features.shape == (5, 5, 4, 4)


def test_one_window_is_what_the_encoder_gives():
    encoder, hu = encoder_of(), volume_of(SIZE)
    maps = scan_maps(encoder, image_of(hu), (1, 1, 1), CLIP)
    with torch.no_grad():
        np.testing.assert_allclose(maps.features, encoder.get_intermediate_layers(scaled(hu))[0][0], atol=1e-4)
    even = 4 * 3 * 4
    np.testing.assert_allclose(maps.attention, attention_maps(encoder, scaled(hu))[0] * even, atol=1e-4)
    total = maps.attention.sum((1, 2, 3)) / even
    assert (total < 1).all() and (total > 0.8).all()  # what is left, the class token gives itself


def test_windows_are_the_loop_written_out():
    """Gaussian weights with a deviation of an eighth of the window, windows at every other patch and at the end."""
    encoder, hu = encoder_of(), volume_of((28, 15, 14))
    maps = scan_maps(encoder, image_of(hu), None, CLIP, overlap=0.5, batch_size=4)
    counts, window = np.array([7, 5, 7]), np.array([4, 3, 4])
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in window]
    weight = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    weight = np.maximum(weight, 1e-3)  # MONAI's least
    total, norm = np.zeros((24 + 3, *counts)), np.zeros(counts)
    starts = [sorted({*range(0, n - w, max(w // 2, 1)), n - w}) for n, w in zip(counts, window)]
    for start in itertools.product(*starts):
        low = np.array(start) * PATCH
        part = scaled(hu[tuple(slice(a, a + n) for a, n in zip(low, SIZE))])
        with torch.no_grad():
            features = encoder.get_intermediate_layers(part)[0][0]
        both = np.concatenate([features, attention_maps(encoder, part)[0] * 48])
        at = tuple(slice(a, a + n) for a, n in zip(start, window))
        total[(slice(None), *at)] += both * weight
        norm[at] += weight
    np.testing.assert_allclose(maps.features, (total / norm)[:24], atol=2e-3)
    np.testing.assert_allclose(maps.attention, (total / norm)[24:], atol=2e-3)


def test_a_crop_smaller_than_a_window_is_padded_with_air():
    encoder, hu = encoder_of(), volume_of((8, 9, 5))
    maps = scan_maps(encoder, image_of(hu), None, CLIP)
    padded = np.full(SIZE, AIR, np.int16)
    padded[4:12, :, :5] = hu  # 2 of 4 patches along x in the middle; 3 of 4 along z, the last filled up with air
    with torch.no_grad():
        expected = encoder.get_intermediate_layers(scaled(padded))[0][0]
    assert maps.features.shape[1:] == (2, 3, 3) == maps.tissue.shape
    np.testing.assert_allclose(maps.features, expected[:, 1:3, :, :3], atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- seams


def test_nothing_changes_when_the_scan_is_moved_by_a_patch():
    """With windows at each patch, what is far from the border does not depend on where the border is."""
    encoder, hu = encoder_of((8, 6, 4), (2, 2, 2)), volume_of((26, 20, 14))
    whole = scan_maps(encoder, image_of(hu), None, CLIP, overlap=0.75, batch_size=64)
    moved = scan_maps(encoder, image_of(hu[2:, 2:, 2:]), None, CLIP, overlap=0.75, batch_size=64)
    inner = (slice(None), slice(3, -3), slice(2, -2), slice(1, -1))
    for one, other in zip(whole[:2], moved[:2]):
        np.testing.assert_allclose(one[:, 1:, 1:, 1:][inner], other[inner], atol=1e-3)
    assert np.abs(np.diff(whole.features, axis=1)).mean() > 0.02


def test_windows_join_without_seams():
    """Where windows begin and end, neighbouring patches differ no more than elsewhere; put side by side they do."""
    encoder, hu = encoder_of((16, 16, 16), (4, 4, 4)), volume_of((80, 48, 48))
    with torch.no_grad():  # a patch's place in its window matters, the more the farther apart
        encoder.pos_embed[0, 1:] = torch.arange(4).repeat_interleave(16)[:, None] * torch.randn(24) * 0.5
    hu = scipy.ndimage.gaussian_filter(hu.astype(float), 4)
    hu = hu / hu.std() * 200  # smooth, lung and soft tissue
    hu = np.clip(hu - hu.mean() - 200, -900, 400)
    image = image_of(hu.astype(np.int16))

    def at_borders(overlap):
        """Jump at every fourth border of patches, where windows of 4 side by side meet, over that at the others."""
        features = scan_maps(encoder, image, None, CLIP, overlap, 64).features
        jumps = np.linalg.norm(np.diff(features, axis=1), axis=0).mean((1, 2))  # (19,)
        jumps = jumps[2:-2]  # the outermost patches lie at the border of all their windows
        return jumps[1::4].mean() / np.delete(jumps, range(1, 15, 4)).mean()

    assert at_borders(0) > 1.5
    assert 0.9 < at_borders(0.5) < 1.1 and 0.9 < at_borders(0.75) < 1.1


def test_windows_of_air_are_passed_over_and_change_nothing_elsewhere():
    encoder, hu = encoder_of(), np.full((40, 15, 14), -1000, np.int16)
    hu[:9] = volume_of((9, 15, 14))
    seen, forward = [], encoder.features_and_attention
    encoder.features_and_attention = lambda x: seen.append(len(x)) or forward(x)
    maps = scan_maps(encoder, image_of(hu), None, CLIP, 0.5, 4)
    passed_over, seen[:] = sum(seen), []
    cut = scan_maps(encoder, image_of(hu[:28]), None, CLIP, 0.5, 4)  # the windows with tissue begin before voxel 12
    assert passed_over < 2 * 3 * 10 and maps.tissue[:3].all() and not maps.tissue[3:].any()
    np.testing.assert_allclose(maps.features[:, :3], cut.features[:, :3], atol=1e-4)
    np.testing.assert_allclose(maps.attention[:, :3], cut.attention[:, :3], atol=1e-4)
    assert not maps.features[:, 3:].any() and not maps.attention[:, 3:].any()


def test_a_constant_scan_is_even():
    """With windows at each patch, wherever all of these lie inside."""
    encoder = encoder_of((8, 6, 4), (2, 2, 2))
    maps = scan_maps(encoder, image_of(np.full((26, 20, 14), 40, np.int16)), None, CLIP, 0.75, 64)
    inner = maps.features[:, 3:-3, 2:-2, 1:-1]
    np.testing.assert_allclose(inner, np.broadcast_to(inner[:, :1, :1, :1], inner.shape), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- components


def test_components_are_scikit_learns():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(40000, 9)) @ rng.normal(size=(9, 9)) + 5).astype(np.float32)
    found = principal_components(features)
    reference = PCA(3, svd_solver="full").fit(features.astype(np.float64))
    np.testing.assert_allclose(found.share, reference.explained_variance_ratio_, rtol=1e-9)
    for ours, theirs in zip(found.vectors.T, reference.components_):
        assert ours[np.abs(ours).argmax()] > 0
        np.testing.assert_allclose(ours, theirs * np.sign(ours @ theirs), atol=1e-8)
    along = reference.transform(features) * np.sign(np.sum(found.vectors.T * reference.components_, 1))
    np.testing.assert_allclose([found.low, found.high], np.percentile(along, (1, 99), axis=0), rtol=1e-4)
    maps = component_maps(features.T.reshape(9, 40, 50, 20), found)
    expected = ((along - found.low) / (found.high - found.low)).T.reshape(3, 40, 50, 20)
    np.testing.assert_allclose(maps, expected, atol=1e-4)


def test_components_keep_sign_and_order_when_patches_come_in_another_order():
    features = np.random.default_rng(1).normal(size=(500, 6)) * [5, 4, 3, 2, 1, 1]
    one, other = principal_components(features), principal_components(features[::-1])
    np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-9)
    assert isinstance(one, Components) and (np.diff(one.share) < 0).all()
    with pytest.raises(ValueError, match="components of 1 patches"):
        principal_components(features[:1])


# ---------------------------------------------------------------------------------------------------------- similarity


def test_similarity_is_the_cosine_and_1_at_the_point():
    maps = scan_maps(encoder_of(), image_of(volume_of((28, 15, 14)), (1, 2, 3)), (1, 2, 3), CLIP)
    for patch in ((0, 0, 0), (3, 1, 5), (6, 4, 6)):
        point = (maps.grid.affine @ [*patch, 1])[:3]
        found = similarity(maps, point)
        assert found[patch] == pytest.approx(1, abs=1e-6) and found.min() < 0.95
        flat = torch.from_numpy(maps.features.reshape(24, -1))
        expected = torch.cosine_similarity(flat, torch.from_numpy(maps.features[(slice(None), *patch)])[:, None], dim=0)
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)
    voxels = maps.grid.affine[:3, :3] @ (np.array([3, 1, 5]) + [0.49, -0.49, 0.49]) + maps.grid.affine[:3, 3]
    np.testing.assert_array_equal(similarity(maps, voxels), similarity(maps, (maps.grid.affine @ [3, 1, 5, 1])[:3]))


def test_points_outside_are_told_from_those_in_ras():
    image = images.make_image(
        volume_of((20, 20, 20)), np.array([[1.0, 0, 0, 30], [0, 1, 0, 40], [0, 0, 1, -9], [0] * 4])
    )
    assert voxel_at(image, (-32, -45, -2), "point 1") == (2, 5, 7)  # LPS
    with pytest.raises(DataError, match="point 1: outside the scan.*changed it is inside: is it in RAS"):
        voxel_at(image, (32, 45, -2), "point 1")
    with pytest.raises(DataError, match="outside the scan") as error:
        voxel_at(image, (-32, -45, 11), "point 2")
    assert "RAS?" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- where maps lie


def test_the_grid_of_patches_lies_on_their_middles():
    grid = Grid((8, 6, 4), (1.0, 2.0, 3.0), (10.0, 20.0, 30.0), tuple(AXES["oblique"].ravel()))
    patches = patch_grid(grid, (4, 3, 2), (1.5, 1, 0.5), (2, 2, 2))
    for patch in itertools.product(range(2), repeat=3):
        voxels = list(itertools.product(*(range(p * n, p * n + n) for p, n in zip(patch, (4, 3, 2)))))
        middle = np.mean([grid.affine @ [*voxel, 1] for voxel in voxels], 0)
        np.testing.assert_allclose(patches.affine @ [*patch, 1], middle, atol=1e-9)


def test_interpolation_is_linear_and_stays_so_at_the_border():
    working = Grid((5, 4, 3), (4.0, 3.0, 2.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1))
    own = Grid((17, 12, 9), (1.0, 1.0, 1.0), (0.0, -1.0, -2.0), working.direction)
    x, y, z = np.indices(working.size)
    found = interpolate((x + 10 * y - 5 * z).astype(np.float32), working, own)
    i, j, k = np.indices(own.size).astype(float)
    x, y, z = np.clip(i / 4, 0, 4), np.clip((j - 1) / 3, 0, 3), np.clip((k - 2) / 2, 0, 2)
    np.testing.assert_allclose(found, x + 10 * y - 5 * z, atol=1e-4)


class Marker(torch.nn.Module):
    """An encoder whose features tell the mean of a patch, and whose attention is to bright ones."""

    embed_dim, img_size, patch_size, first_position = 2, (6, 6, 6), (2, 2, 2), (0.5, 0.5, 0.5)

    def features_and_attention(self, x):
        mean = torch.nn.functional.avg_pool3d(x, 2)  # (B, 1, 3, 3, 3)
        return torch.cat((mean - 0.85, torch.full_like(mean, 0.1)), 1), mean.repeat(1, 2, 1, 1, 1) / 27


ORIENTED = AXES | MIRRORED


def scan_file(path, axes, spacing=(2.0, 1.5, 1.0)):
    """A file of tissue with a bright block at its corner of high indices, written as its suffix says."""
    stored = np.full((18, 16, 20), 0, np.int16)
    stored[-6:, -5:, -7:] = 390
    if path.name.endswith(".hdf5"):
        write_volume(path, stored, affine_to_ras(axes, spacing))
    else:
        sitk.WriteImage(itk_image(stored, axes, spacing), path)
    return stored


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
@pytest.mark.parametrize("name", ORIENTED)
def test_maps_lie_on_the_scan_in_itk_and_nibabel(name, suffix, tmp_path):
    path = tmp_path / f"scan{suffix}"
    stored = scan_file(path, ORIENTED[name])
    image = images.read_image(path)
    maps = scan_maps(Marker(), image, (1.0, 1.0, 1.0), CLIP)
    corner = sitk.ReadImage(path).TransformIndexToPhysicalPoint((16, 14, 17))
    (told,) = save_maps(tmp_path / "out", path, image, maps, [corner], CLIP, "scan", {})
    assert "is voxel 16 14 17 of the file, 390 HU" in told
    scan = sitk.ReadImage(path)
    for file in ("pca.nii.gz", "attention.nii.gz", "attention_head2.nii.gz", "similarity1.nii.gz"):
        itk, nifti = sitk.ReadImage(tmp_path / "out" / file), nibabel.load(tmp_path / "out" / file)
        assert itk.GetSize() == scan.GetSize() and itk.GetNumberOfComponentsPerPixel() == (3 if "pca" in file else 1)
        for about in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(itk, about)(), getattr(scan, about)(), atol=2e-4)
        expected = affine_to_ras(ORIENTED[name], (2.0, 1.5, 1.0), scan.GetOrigin())
        np.testing.assert_allclose(nifti.affine, expected, atol=2e-4)
        values = sitk.GetArrayFromImage(itk).astype(float)
        values = (values.sum(-1) if "pca" in file else values).T  # (X, Y, Z) of the file
        bright = stored > 0
        inside, outside = values[14:, 13:, 15:].mean(), values[:10, :9, :11].mean()
        assert abs(inside - outside) > 0.1 and values.shape == bright.shape
        if "pca" not in file:
            np.testing.assert_allclose(nifti.get_fdata(), values, atol=1e-6)
            assert inside > outside
    similar = nibabel.load(tmp_path / "out" / "similarity1.nii.gz").get_fdata()
    assert similar[16, 14, 17] > 0.9 and similar[2, 2, 2] < 0
    colours = np.asarray(nibabel.load(tmp_path / "out" / "pca.nii.gz").dataobj)
    assert colours.dtype.names == ("R", "G", "B") and colours.shape == stored.shape


def test_pictures_are_turned_as_radiologists_see_them(tmp_path):
    """A block at the patient's right, anterior and superior corner is at the upper left of axial and coronal planes."""
    hu = np.full((30, 24, 36), 0, np.int16)
    hu[14:, 11:, 17:] = 390
    path = tmp_path / "scan.hdf5"
    write_volume(path, hu, np.diag([1.0, 1, 1, 1]))
    image = images.read_image(path)
    maps = scan_maps(Marker(), image, None, CLIP)
    point = (-22.0, -18.0, 27.0)  # LPS of the RAS voxel (22, 18, 27)
    save_maps(tmp_path / "out", path, image, maps, [point], CLIP, "scan", {})
    for file, columns in (("maps.png", 3), ("heads.png", 3), ("similarity1.png", 2)):
        picture = np.asarray(Image.open(tmp_path / "out" / file)).astype(int).sum(2)
        top, height = 50, 0
        for a, b in ((30, 24), (30, 36), (24, 36)):  # axial, coronal, sagittal: columns, rows in mm
            top += height + 20
            width, height = round(a * 300 / 36), round(b * 300 / 36)
            for column in {0, columns - 1}:  # the CT and the last map
                tile = picture[top + 2 :, column * 254 + 2 :][:height, :width] if column else None
                tile = picture[top + 2 : top + 2 + height, 2 : 2 + width] if column == 0 else tile
                quarter = tile[: height // 3, : width // 3].mean(), tile[-height // 3 :, -width // 3 :].mean()
                assert quarter[0] > quarter[1] + 30, (file, a, b, column)
            height += 4


# ---------------------------------------------------------------------------------------------------- errors, resuming


def made(tmp_path, recipe, hu=None, points=()):
    path = tmp_path / "scan.hdf5"
    write_volume(path, np.zeros((12, 12, 12), np.int16) if hu is None else hu, np.diag([1.0, 1, 1, 1]))
    image = images.read_image(path)
    maps = scan_maps(Marker(), image, None, CLIP)
    save_maps(tmp_path / "out", path, image, maps, points, CLIP, "scan", recipe)
    return tmp_path / "out"


def test_a_done_scan_is_known_by_its_recipe_and_files(tmp_path):
    recipe = {"settings": {"weights": "1"}, "points": []}
    out = made(tmp_path, recipe, volume_of((12, 12, 12)))
    assert are_done(out, recipe) and not are_done(tmp_path, recipe)
    assert not are_done(out, recipe | {"points": [[1, 2, 3]]})
    with pytest.raises(UserError, match="holds maps of other weights or settings"):
        are_done(out, {"settings": {"weights": "2"}})
    assert sorted(json.loads((out / "maps.json").read_text())["files"] + ["maps.json"]) == sorted(
        path.name for path in out.iterdir()
    )
    (out / "heads.png").unlink()
    assert not are_done(out, recipe)
    for text in ("[", "[]", '{"recipe": 1}', '{"recipe": {}, "files": [1]}', '{"recipe": {}, "files": null}'):
        (out / "maps.json").write_text(text)
        assert not are_done(out, recipe)


def test_files_of_points_that_are_gone_go_too(tmp_path):
    made(tmp_path, {}, volume_of((12, 12, 12)), [(-1, -1, 1), (-2, -2, 2)])
    assert (tmp_path / "out" / "similarity2.png").is_file()
    made(tmp_path, {}, volume_of((12, 12, 12)), [(-1, -1, 1)])
    assert sorted(path.name for path in (tmp_path / "out").glob("sim*")) == ["similarity1.nii.gz", "similarity1.png"]


def test_without_attention_the_other_maps_are_written(tmp_path):
    path = tmp_path / "scan.hdf5"
    write_volume(path, volume_of((20, 12, 8)), np.diag([1.0, 1, 1, 1]))
    image = images.read_image(path)
    maps = scan_maps(Convolutional(), image, None, CLIP)
    save_maps(tmp_path / "out", path, image, maps, [(-3, -3, 3)], CLIP, "scan", {})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("pca.nii.gz", "maps.png", "similarity1.nii.gz", "similarity1.png", "maps.json")
    }
    maps.features[0, 1, 1, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        save_maps(tmp_path / "other", path, image, maps, [], CLIP, "scan", {})
    assert not (tmp_path / "other").exists()


def test_an_even_scan_is_drawn(tmp_path):
    assert (made(tmp_path, {}) / "maps.png").is_file()


def test_air_alone_and_folders_that_cannot_be_written_are_told(tmp_path):
    with pytest.raises(DataError, match="scan.hdf5: holds nothing but air"):
        made(tmp_path, {}, np.full((12, 12, 12), -1000, np.int16))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out: can't be written"):
        made(tmp_path, {})


def test_files_that_a_full_disk_cuts_off_are_not_taken_for_done(tmp_path, monkeypatch):
    made(tmp_path, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(map_pictures, "save_picture", full)
    recipe = {"settings": {}}
    with pytest.raises(UserError, match="No space left"):
        made(tmp_path, recipe)
    assert not are_done(tmp_path / "out", recipe)


@pytest.mark.parametrize("point, reason", [((9, 9, 99), "outside the scan"), ((-10, -10, 10), "lies in air")])
def test_a_point_without_a_patch_leaves_no_files(point, reason, tmp_path):
    path, hu = tmp_path / "scan.hdf5", volume_of((12, 12, 12))
    hu[8:, 8:, 8:] = -1000
    write_volume(path, hu, np.diag([1.0, 1, 1, 1]))
    image = images.read_image(path)
    maps = scan_maps(Marker(), image, None, CLIP)
    with pytest.raises(DataError, match=f"point 2: {reason}"):
        save_maps(tmp_path / "out", path, image, maps, [(-1, -1, 1), point], CLIP, "", {})
    assert not (tmp_path / "out").exists()
