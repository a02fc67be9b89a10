"""Resized crops against MONAI, SciPy and views that are not resized: what they show, how large, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import torch
from monai.transforms import Resize
from test_augmentations import CLIP, PAPER, close, few_views, index_grid, middle, noise  # noqa: F401

from augmentations import MultiCropAugmentation, Policy, average_blocks, averaging_blocks, collate_views
from dino3d.data.hdf5 import write_volume
from dino3d.data.pretraining import PretrainingPatches, collate
from dino3d.pretraining_flags import check_pretraining_flags
from dino3d.training.view_flags import describe_views, multi_crop
from main_dino import get_args_parser

SIZE, LOCAL = (24, 20, 16), (9, 9, 9)


def resized(policy=Policy(), number=3, spacing=None, global_scale=None, local_scale=None, size=SIZE, local=LOCAL):
    return MultiCropAugmentation(
        policy, size, local, number, spacing, global_scale=global_scale, local_scale=local_scale
    )


def drawn_windows(crops, samples=400):
    """[(sides (n, 3), first edges (n, 3))] of global and local windows in voxels, edges from the patch's middle."""
    found = []
    for number, lattice in zip((2, crops.local_number), crops.lattices):
        controls = np.concatenate([crops.draw(5, 0, i)[number != 2].control for i in range(samples)]).astype(float)
        zoom = np.stack([(c[2, 2, 2] - c[1, 1, 1]) / lattice.spacing for c in controls])
        first = controls[:, 1, 1, 1] - middle(crops.patch_size)
        found.append((zoom * lattice.size, first - zoom / 2))
    return found


def views_of(crops, volumes, samples=None):
    groups = collate_views([crops.draw(5, 0, i, volumes.shape[1:]) for i in samples or range(len(volumes))])
    return crops.render(volumes, groups, CLIP), groups


# ----------------------------------------------------------------------------------------------- nothing has changed


@pytest.mark.parametrize("policy", [PAPER, Policy(rotation=30)], ids=["paper", "rotation"])
def test_a_range_of_one_side_gives_the_views_that_are_not_resized(policy, few_views):
    """To the last bit, by either way of asking for local views of a quarter."""
    plain = MultiCropAugmentation(policy, (24, 24, 12), (6, 6, 3), 3)
    same = MultiCropAugmentation(policy, (24, 24, 12), (6, 6, 3), 3, global_scale=(1.0, 1.0), local_scale=(0.25, 0.25))
    assert same.core == plain.core and same.patch_size == plain.patch_size
    volumes = (noise(2, *plain.patch_size) * 2000 - 1000).to(torch.int16)
    for ours, theirs in zip(views_of(same, volumes)[0], views_of(plain, volumes)[0]):
        assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------------- what views show


@pytest.mark.parametrize("side, local_side", [(0.5, 0.2), (0.75, 0.5), (1.5, 1.0)])
def test_views_are_monais_crop_and_resize(side, local_side, few_views):
    """At a range's end: MONAI's trilinear Resize of the window, looked at where its own border does not matter."""
    size, local = (24, 16, 16), (12, 8, 8)
    crops = resized(global_scale=(side, side), local_scale=(local_side, local_side), size=size, local=local)
    volumes = (noise(2, *crops.patch_size, dtype=torch.float32) * 2000 - 1000).to(torch.int16)
    seen, groups = views_of(crops, volumes)
    checked = 0
    for views, group, lattice, f in zip(seen, groups, crops.lattices, (side, local_side)):
        window, zoom = np.array(size) * f, np.array(size) * f / lattice.size
        blocks = np.rint(zoom).astype(int) if zoom[0] > 1.5 else np.ones(3, int)
        for i, control in enumerate(group.control.double().numpy()):
            first = control[1, 1, 1] - zoom / 2 + 0.5  # first edge, from the patch's
            if np.abs(first - first.round()).max() > 1e-4 or np.abs(window - window.round()).max() > 1e-4:
                continue  # MONAI cuts whole voxels
            first = first.round().astype(int)
            if (first % blocks).any():
                continue  # blocks are counted from the patch's corner
            box = tuple(slice(a, a + int(n)) for a, n in zip(first, window.round()))
            crop = (volumes[i % 2][box].double() + 1000) / 2000
            if (blocks > 1).any():
                crop = torch.nn.functional.avg_pool3d(crop[None], tuple(blocks.tolist()))[0]
            expected = Resize(lattice.size, mode="trilinear", align_corners=False)(crop[None].numpy())
            inner = tuple(slice(m // 4, m - m // 4) for m in lattice.size)
            close(views[i, 0][inner].double(), torch.as_tensor(np.asarray(expected[0]))[inner], 2e-4)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize(
    "policy", [replace(PAPER, gaussian=0, histogram=0, prob=1.0), Policy()], ids=["turned", "plain"]
)
@pytest.mark.parametrize("scales", [((0.4, 0.4), (0.1, 0.1)), ((1.3, 1.3), (1.0, 1.0)), ((0.5, 1.0), (0.2, 0.5))])
def test_positions_are_those_of_the_spline_and_values_scipys(policy, scales, few_views):
    """Each view against scipy's linear interpolation of the patch, averaged over the blocks that the view names."""
    crops = resized(policy, global_scale=scales[0], local_scale=scales[1])
    volumes = (noise(2, *crops.patch_size) * 2000 - 1000).to(torch.int16)
    seen, groups = views_of(crops, volumes)
    drawn = [crops.draw(5, 0, i) for i in range(2)]
    used = set()
    for number, (views, group, lattice) in enumerate(zip(seen, groups, crops.lattices)):
        for i, control in enumerate(group.control.double().numpy()):
            blocks = np.array(drawn[i % 2][number].blocks[i // 2])
            used.add(tuple(blocks))
            at = control
            for axis in range(3):
                at = np.moveaxis(np.tensordot(lattice.weights(axis), at, (1, axis)), 0, axis)
            volume = volumes[i % 2].numpy().astype(float)
            volume = np.pad(volume, [(3 * k, 3 * k + -n % k) for n, k in zip(volume.shape, blocks)], mode="edge")
            shape = np.array(volume.shape) // blocks
            x, y, z = shape
            volume = volume.reshape(x, blocks[0], y, blocks[1], z, blocks[2]).mean((1, 3, 5))
            at = ((at + 0.5) / blocks - 0.5 + 3).reshape(-1, 3).T
            expected = scipy.ndimage.map_coordinates((volume + 1000) / 2000, at, order=1, mode="nearest")
            close(views[i, 0].double(), torch.from_numpy(expected.reshape(lattice.size)), 2e-4)
    assert used == ({(1, 1, 1), (3, 2, 2)} if scales[0][1] > 1 else {(1, 1, 1)})


def test_a_much_finer_source_is_averaged_and_not_sampled_between():
    """Stripes of two voxels, which a view of every second voxel would show, at their mean: they are finer than it."""
    stripes = torch.zeros(1, 48, 48, 48, dtype=torch.int16)
    stripes[:, ::2] = 1000
    crops = resized(size=(24, 24, 24), global_scale=(2.0, 2.0), number=0)
    views, _ = views_of(crops, torch.nn.functional.pad(stripes, (20, 20) * 3))
    inner = views[0][:, 0, 6:-6, 6:-6, 6:-6]
    close(inner, torch.full_like(inner, 0.75), 1e-5)


def test_averaging_repeats_the_border_on_either_side():
    volume = noise(2, 1, 7, 6, 5)
    out = average_blocks(volume, (2, 3, 1))
    assert out.shape == (2, 1, 6, 4, 7)
    close(out[:, :, 0, 1], volume[:, :, 0, 0:3].mean(2)[..., [0, 0, 1, 2, 3, 4, 4]], 1e-12)
    close(out[:, :, 1, 1, 1], volume[:, :, 0:2, 0:3, 0].mean((2, 3)), 1e-12)
    assert averaging_blocks(np.array([0.2, 1.5, 1.6])) == (1, 1, 2)


def test_what_a_view_shows_does_not_depend_on_who_shares_its_batch(few_views):
    """Patches of other sizes are padded by repeating their border, before the averaging."""
    crops = resized(replace(PAPER, prob=1.0), spacing=(1, 1, 1), global_scale=(0.8, 1.6), local_scale=(0.2, 1.0))
    shape = tuple(n + 3 for n in crops.patch_size)
    volume = (noise(1, *shape) * 2000 - 1000).to(torch.int16)
    groups = collate_views([crops.draw(5, 0, 0, shape, (0.6, 0.6, 0.6))])
    alone = crops.render(volume, groups, CLIP)
    wider = torch.nn.functional.pad(volume[None].float(), (0, 5, 0, 4, 0, 1), mode="replicate")[0].to(torch.int16)
    assert groups[0].blocks and groups[1].blocks
    for ours, theirs in zip(crops.render(wider, groups, CLIP), alone):
        close(ours, theirs, 1e-4)


def test_a_batch_is_its_samples_one_by_one(few_views):
    crops = resized(PAPER, global_scale=(0.7, 2.0), local_scale=(0.2, 1.0), number=4)
    volumes = (noise(3, *crops.patch_size) * 2000 - 1000).to(torch.int16)
    together, groups = views_of(crops, volumes)
    assert len(groups[0].blocks) > 1
    for sample in range(3):
        alone, _ = views_of(crops, volumes[sample : sample + 1], [sample])
        for ours, theirs in zip(together, alone):
            close(ours[sample::3], theirs, 1e-5)


# ------------------------------------------------------------------------------------------------- how large, where


def test_sides_are_uniform_and_windows_overlap(few_views):
    crops = resized(global_scale=(0.5, 1.0), local_scale=(0.2, 0.6))
    (sides, first), (local_sides, local_first) = drawn_windows(crops)
    for found, low, high in ((sides, 0.5, 1.0), (local_sides, 0.2, 0.6)):
        share = found / SIZE
        np.testing.assert_allclose(share, share[:, :1].repeat(3, 1), rtol=1e-4)  # one side for the three axes
        quantiles = (np.quantile(share[:, 0], [0, 0.25, 0.5, 0.75, 1]) - low) / (high - low)
        np.testing.assert_allclose(quantiles, [0, 0.25, 0.5, 0.75, 1], atol=0.06)
    for found, sizes in ((first, sides), (local_first, local_sides)):  # inside the core
        half = np.array(crops.core) / 2
        assert (found >= -half - 1e-3).all() and (found + sizes <= half + 1e-3).all()
    low = np.maximum(first[0::2], first[1::2])
    high = np.minimum(first[0::2] + sides[0::2], first[1::2] + sides[1::2])
    shared = np.prod(np.maximum(high - low, 0), 1) / np.minimum(np.prod(sides[0::2], 1), np.prod(sides[1::2], 1))
    assert 0.4 <= shared.min() < 0.6 and shared.max() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("low, high", [(0.3, 0.7), (0.5, 1.0), (1.0, 1.5)])
def test_the_base_patch_follows_the_largest_window(low, high):
    plain = MultiCropAugmentation(PAPER, SIZE, LOCAL, 2)
    crops = resized(PAPER, global_scale=(low, high))
    assert (np.array(crops.core) <= np.ceil(np.array(plain.core) * high)).all()
    spilling = []
    for i in range(300):
        for control in crops.draw(9, 0, i)[0].control.astype(float):
            at = control
            for axis in range(3):
                at = np.moveaxis(np.tensordot(crops.lattices[0].weights(axis), at, (1, axis)), 0, axis)
            outside = (at < -1e-3) | (at > np.array(crops.patch_size) - 1 + 1e-3)
            spilling.append(outside.any(-1).mean() > 0.01)
    assert np.mean(spilling) < 0.06


@pytest.mark.parametrize("local_side, blocks", [(0.5, (2, 2, 1)), (0.25, (1, 1, 1))])
def test_views_of_a_file_are_resized_in_millimetres(local_side, blocks, tmp_path, few_views):
    """Three ramps in mm, from files: a view's voxels are its side's share of --spacing apart. The files' finer voxels
    are averaged no further than the finest view allows."""
    spacing, size, local = np.array([2.0, 2.0, 3.0]), (16, 16, 8), (8, 8, 4)
    own = np.array([0.8, 0.9, 2.5])
    shape = (110, 100, 40)
    at = index_grid(shape) * own
    crops = resized(
        spacing=tuple(spacing), global_scale=(0.8, 0.8), local_scale=(local_side, local_side), size=size, local=local
    )
    for axis in range(3):
        write_volume(tmp_path / f"{axis}.hdf5", (at[..., axis] * 10).astype(np.int16), np.diag([*own, 1]))
        dataset = PretrainingPatches([str(tmp_path / f"{axis}.hdf5")], crops, seed=0)
        batch = collate(dataset.__getitems__([(0, 0)]))
        np.testing.assert_allclose(batch.spacings[0], own * blocks)
        for views, side, n in zip(crops.render(batch.patches, batch.groups, (-1000, 2000)), (0.8, local_side), (2, 3)):
            mm = (views[:, 0].double().numpy() * 3000 - 1000) / 10  # (n, x, y, z)
            steps = np.diff(mm, axis=axis + 1)
            expected = side * spacing[axis] * size[axis] / views.shape[axis + 2]
            assert len(mm) == n and np.median(steps) == pytest.approx(expected, rel=0.03)
            others = [other for other in range(3) if other != axis]
            assert all(np.abs(np.diff(mm, axis=other + 1)).max() < 0.2 for other in others)


# ----------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--local_crops_scale 0.25 0.5", "a range of sides needs --local_crops_size"),
        ("--local_crops_scale 0.25 0.5 0.75", "a range of sides needs --local_crops_size"),
        ("--local_crops_size 36 36 18", "needs --local_crops_scale LOW HIGH"),
        ("--local_crops_size 36 36 18 --local_crops_scale 0.5", "needs --local_crops_scale LOW HIGH"),
        ("--local_crops_size 36 36 18 --local_crops_scale 0.2 0.3 0.5", "needs --local_crops_scale LOW HIGH"),
        ("--local_crops_size 36 36 18 --local_crops_scale 0.5 0.2", "the first value must not be above"),
        ("--local_crops_size 36 36 20 --local_crops_scale 0.2 0.5", "--local_crops_size: a view of 36 36 20 voxels"),
        ("--local_crops_size 36 36 18 --local_crops_scale 0 0.5", "--local_crops_scale"),
        ("--local_crops_size 36 36 18 --local_crops_scale 0.5 1.5", "--local_crops_scale"),
        ("--local_crops_size 36 36 18 --local_crops_scale 0.01 0.5", "0.0267 to 1.33 voxels"),
        ("--local_crops_size 36 36 18 --local_crops_scale 0.2 0.5 --local_crops_number 0", "makes no local views"),
        ("--local_crops_size 36 36 18 --local_crops_scale 0.2 0.9 --global_crops_scale 0.4 0.8", "0.8 of --input_size"),
        ("--local_crops_scale 0.5 --global_crops_scale 0.2 0.4", "0.4 of --input_size"),
        ("--global_crops_scale 0.5", "--global_crops_scale"),
        ("--global_crops_scale 1 0.5", "--global_crops_scale 1 0.5: the first value must not be above"),
        ("--global_crops_scale 0.05 1", "--global_crops_scale"),
        ("--global_crops_scale 0.5 3", "--global_crops_scale"),
        ("--global_crops_scale nan 1", "--global_crops_scale"),
    ],
)
def test_flags_that_are_refused(flags, says, capsys):
    parser = get_args_parser()
    with pytest.raises(SystemExit) as ended:
        check_pretraining_flags(parser, parser.parse_args(["--data_dir", "x", *flags.split()]))
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and says in error and len(error.splitlines()) == 1, error


def test_one_number_means_what_it_did():
    parser = get_args_parser()
    for flags, size in (([], [24, 24, 12]), (["--local_crops_scale", "0.5"], [48, 48, 24])):
        args = parser.parse_args(["--data_dir", "x", *flags])
        check_pretraining_flags(parser, args)
        assert args.local_size == size and isinstance(args.local_crops_scale, float)
        crops = multi_crop(args)
        assert crops.local_size == tuple(size) and crops.local_scale is None is crops.global_scale


def test_what_a_run_says_of_its_views():
    parser = get_args_parser()
    flags = "--data_dir x --global_crops_scale 0.5 1 --local_crops_size 36 36 36 --local_crops_scale 0.2 0.4"
    args = parser.parse_args(flags.split())
    check_pretraining_flags(parser, args)
    assert (
        ", 2 global views 96 96 48 (resized from 0.5 to 1 of 96 96 48), 8 local views 36 36 36 (resized from 0.2 to "
        "0.4 of 96 96 48); local views' voxels are 2 2 1 times as long as if all axes were resized alike; "
        "rotation, scale, flip on"
    ) in describe_views(multi_crop(args))
