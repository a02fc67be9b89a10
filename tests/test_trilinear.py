"""Views on CPUs against torch's grid_sample, whose way is the one on GPUs."""

import gc
import weakref

import numpy as np
import pytest
import torch

from augmentations import (
    MultiCropAugmentation,
    PatchSource,
    Policy,
    collate_views,
    in_blocks,
    sample,
    sample_on_cpu,
    scale_intensity,
)
from dino3d import trilinear
from dino3d.bspline import Lattice, mirror_matrix, rotation_matrix, warp
from dino3d.trilinear import are_straight, sample_views

SIZE, SHAPE = (9, 8, 7), (17, 15, 13)


def patch_of(shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1000, 1000, shape)).to(dtype)


def maps():
    """{what: (matrix, centre, amount of bending, whether it is straight)}"""
    middle = (np.array(SHAPE) - 1) / 2
    turned = rotation_matrix(np.radians([10, -20, 30]))
    return {
        "cut out": (np.eye(3), middle + [1, -2, 0], 0, True),
        "cut out at the patch's end": (np.eye(3), (np.array(SIZE) - 1) / 2, 0, True),
        "mirrored": (mirror_matrix(0) @ mirror_matrix(2), middle, 0, True),
        "between voxels": (np.eye(3), middle + [0.5, 0.25, 0], 0, True),
        "scaled": (np.diag([1.1, 0.8, 1.0]), middle, 0, True),
        "scaled and mirrored": (np.diag([-1.1, 0.8, -0.9]), middle, 0, True),
        "beyond the border": (np.eye(3), middle + [-9, 0, 8], 0, True),
        "scaled beyond the border": (3 * np.eye(3), middle, 0, True),
        "quarter turn": (rotation_matrix(np.radians([0, 0, 90])), middle, 0, False),
        "turned": (turned, middle, 0, False),
        "turned beyond the border": (2 * turned, middle + 4, 0, False),
        "bent": (np.eye(3), middle, 0.4, False),
    }


def controls(lattice, dtype=torch.float64):
    moves = np.random.RandomState(1).uniform(-1, 1, (*lattice.shape, 3))
    found = [lattice.control(matrix, centre, bent * moves) for matrix, centre, bent, _ in maps().values()]
    return torch.from_numpy(np.stack(found)).to(dtype)


@pytest.mark.parametrize("layout", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("chunk", [2**17, 150, 1])
@pytest.mark.parametrize("shape", [SHAPE, (1, 15, 13), (17, 1, 1), (1, 1, 1), (2, 2, 2)])
def test_views_are_those_of_grid_sample(shape, chunk, layout, monkeypatch):
    """All at once, in slabs, row by row; also of patches that are one voxel thick, or lie in memory otherwise."""
    monkeypatch.setattr(trilinear, "POSITIONS_AT_ONCE", chunk)
    patch, lattice = patch_of(shape), Lattice(SIZE, np.array(SIZE) / 4)
    control = controls(lattice)
    expected = warp(patch[None, None].expand(len(control), 1, *shape), control, lattice)[:, 0]
    stored = patch.permute(layout).contiguous().permute(np.argsort(layout).tolist())
    found = sample_views(stored, control, lattice)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert are_straight(control).tolist() == [straight for *_, straight in maps().values()]


def test_what_is_cut_out_is_cut_out_to_the_bit():
    """Whatever single precision makes of the positions; HU come as they are."""
    patch, lattice = patch_of(SHAPE, dtype=torch.int16), Lattice(SIZE, SIZE)
    start = (np.array(SHAPE) - SIZE) // 2
    whole = patch[tuple(slice(s, s + n) for s, n in zip(start, SIZE))].float()
    for matrix, axes in ((np.eye(3), []), (mirror_matrix(1), [1])):
        control = lattice.control(matrix, start + (np.array(SIZE) - 1) / 2, np.zeros((*lattice.shape, 3)))
        assert torch.equal(sample_views(patch, torch.from_numpy(control).float()[None], lattice)[0], whole.flip(axes))


def test_single_precision_is_as_good_as_grid_samples():
    patch, lattice = patch_of((90, 100, 110), dtype=torch.float32), Lattice((48, 40, 32), (12, 10, 8))
    moves = np.random.RandomState(2).uniform(-0.4, 0.4, (*lattice.shape, 3))
    control = torch.from_numpy(lattice.control(rotation_matrix(np.full(3, 0.3)), (45, 50, 55), moves))[None]
    exact = warp(patch.double()[None, None], control, lattice)[0, 0]
    error = sample_views(patch, control.float(), lattice)[0] - exact
    theirs = warp(patch[None, None], control.float(), lattice)[0, 0] - exact
    assert 0 < error.abs().max() < 1.5 * theirs.abs().max() and theirs.abs().max() < 0.1  # of 2000


@pytest.mark.parametrize("scale", [None, (0.5, 2.0)])
def test_both_ways_give_the_same_batch(scale):
    """With resized crops, which are sampled from averaged patches, views of a batch stand in the same order."""
    policy = Policy(rotation=15, scale=0.2, flip=1, elastic=0.3)
    crops = MultiCropAugmentation(policy, (12, 12, 8), (6, 6, 4), 3, global_scale=scale, local_scale=scale)
    patches = patch_of((3, *crops.patch_size), dtype=torch.int16)
    groups = collate_views([crops.draw(0, 0, number) for number in range(3)])
    source = PatchSource(patches, (-900.0, 800.0), policy)
    for lattice, group in zip(crops.lattices, groups):
        assert scale or group.blocks is None
        torch.testing.assert_close(
            sample_on_cpu(source, lattice, group), sample(source, lattice, group), rtol=0, atol=0.05
        )


@pytest.mark.parametrize("clip_range", [(-1000, 400), (-1000.5, 399.25), (-40000, 40000), (-160.0, 240.0)])
def test_patches_are_clipped_before_they_are_sampled(clip_range):
    patches = patch_of((2, 6, 5, 4), dtype=torch.int16) * 30
    source = PatchSource(patches, clip_range, Policy())
    low, high = clip_range
    for clipped in (source.all(), source.averaged(patches)):
        expected = scale_intensity(patches[:, None], low, high)
        torch.testing.assert_close((clipped.float() - low) / (high - low), expected, rtol=0, atol=1e-6)


def test_patches_are_given_back_with_the_batch():
    """Without the garbage collector, which may come many batches later: they are the largest tensors of a step."""
    source = PatchSource(patch_of((2, 6, 5, 4), dtype=torch.int16), (-1000, 400), Policy())
    made = weakref.ref(source.all())
    assert source.all() is made()
    gc.disable()
    try:
        del source
        assert made() is None
    finally:
        gc.enable()


def test_positions_in_blocks():
    """The middle of a block of 2 x 1 x 3 voxels, with one block more before it, is a whole position."""
    at = torch.tensor([[0.5, 4.0, 1.0], [2.5, 0.0, 4.0]])
    assert torch.equal(in_blocks(at, (2, 1, 3)), torch.tensor([[1.0, 5.0, 1.0], [2.0, 1.0, 2.0]]))
    assert torch.equal(in_blocks(at, (1, 1, 1)), at)
