"""Which tokens make the vector of a window, and the mean over orientations."""

import itertools

import numpy as np
import pytest
import torch

from dino3d.features.embedding import Embedder
from dino3d.features.pooling import POOLS, centre_of, embed, embedding_width, orientation_problem, orientations
from dino3d.finetune.heads import Classifier, LinearHead
from resnet3d import resnet18
from vision_transformer import VisionTransformer

SIZE, PATCH = (16, 8, 6), (4, 4, 2)  # 4 x 2 x 3 patches


def small(seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(SIZE, PATCH, embed_dim=12, depth=3, num_heads=2).eval()


def test_embeddings_are_what_the_blocks_give():
    model, x = small(), torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        tokens, after = model._embed(x)[0], []
        for block in model.blocks:
            tokens = block(tokens)
            after.append(model.norm(tokens))
        cls, mean = [one[:, 0] for one in after], [one[:, 1:].mean(1) for one in after]
        maps = [one[:, 1:].unflatten(1, (4, 2, 3)) for one in after]
        centre = [one[:, 1:3, :, 1:2].mean((1, 2, 3)) for one in maps]  # two of four, both of two, one of three
        for pool, layers, expected in (
            ("cls", 1, cls[-1:]),
            ("cls", 3, cls),
            ("mean", 2, mean[1:]),
            ("centre", 1, centre[2:]),
            ("centre", 3, centre),
            ("cls+mean", 1, [cls[2], mean[2]]),
            ("cls+mean", 2, [cls[1], cls[2], mean[2]]),
            ("cls+centre", 2, [cls[1], cls[2], centre[2]]),
        ):
            found = embed(model, x, pool, layers)
            assert found.shape == (2, embedding_width(model, pool, layers))
            torch.testing.assert_close(found, torch.cat(expected, 1))
    with pytest.raises(ValueError, match="pool is max"):
        embed(model, x, "max")
    with pytest.raises(ValueError, match="n is 4; the model has 3 blocks"):
        embed(model, x, "mean", 4)


@pytest.mark.parametrize("size", [(32, 32, 32), (23, 40, 25), (7, 64, 33), (8, 8, 8)])
def test_the_centre_is_where_the_middle_voxel_leads(size):
    """Against the receptive fields' middles, written out: of a ViT patch by patch, of a ResNet every so many voxels."""
    resnet = resnet18(size).eval()
    vit_size = [-(-n // p) * p for n, p in zip(size, PATCH)]
    vit = VisionTransformer(vit_size, PATCH, embed_dim=12, depth=1, num_heads=2)
    for model, of, first in ((resnet, size, (0, 0, 0)), (vit, vit_size, [(p - 1) / 2 for p in PATCH])):
        with torch.no_grad():
            grid = model.get_intermediate_layers(torch.zeros(1, 1, *of), 1, True)[0].shape[2:]
        found = centre_of(model.first_position, model.patch_size, of, grid)
        for axis in range(3):
            places = np.array([first[axis] + k * model.patch_size[axis] for k in range(grid[axis])])
            off = np.abs(places - np.arange(of[axis]).mean())
            assert [*range(grid[axis])][found[axis]] == np.flatnonzero(off == off.min()).tolist()


def test_a_resnet_has_the_centre_of_its_map_beside_its_mean():
    model, x = resnet18((64, 64, 64)).eval(), torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        (map_,) = model.get_intermediate_layers(x, 1, True)  # (1, 512, 2, 2, 4): strides of 32, 32 and 16
        found = embed(model, x, "cls+centre")
    assert found.shape == (1, embedding_width(model, "cls+centre")) == (1, 1024)
    torch.testing.assert_close(found, torch.cat([map_.mean((2, 3, 4)), map_[:, :, 1, 1, 2]], 1))


def test_orientations_are_those_of_a_cube():
    x = torch.rand(2, 1, 3, 3, 3)
    for count, expected in ((1, 1), (8, 8), (48, 48)):
        found = orientations(x, count)
        assert len({one.numpy().tobytes() for one in found}) == expected and torch.equal(found[0], x)
    voxels = x[0, 0].numpy()
    corners = {  # where each signed permutation of the axes brings the voxels, one by one
        np.stack([voxels[tuple(1 + (sign * np.subtract(at, 1))[list(order)])] for at in np.ndindex(3, 3, 3)]).tobytes()
        for order in itertools.permutations(range(3))
        for sign in map(np.array, itertools.product((1, -1), repeat=3))
    }
    assert corners == {one[0, 0].contiguous().numpy().tobytes() for one in orientations(x, 48)}
    assert all(torch.equal(one, two) for one, two in zip(orientations(x, 8), orientations(x, 48)))  # as they are first


@pytest.mark.parametrize("pool", POOLS)
def test_the_mean_over_orientations_does_not_hang_on_the_scans_own(pool):
    torch.manual_seed(0)
    model = VisionTransformer((8, 8, 8), (4, 4, 4), embed_dim=12, depth=2, num_heads=2).eval()
    hu = np.random.default_rng(0).integers(-1000, 400, (8, 8, 8)).astype(np.int16)
    turned = {8: hu[::-1, :, ::-1], 48: hu.transpose(2, 0, 1)[:, ::-1]}
    for count, other in turned.items():
        with Embedder([model], (-1000, 400), pool, tta=count) as embedder:
            first, second = embedder([hu]), embedder([np.ascontiguousarray(other)])
        np.testing.assert_allclose(first, second, atol=2e-6)
        with Embedder([model], (-1000, 400), pool) as plain:
            every = [plain([one[0, 0].numpy()]) for one in orientations(torch.from_numpy(hu)[None, None], count)]
        np.testing.assert_allclose(first, np.mean(every, 0), atol=1e-6)
        assert np.abs(first - every[0]).max() > 1e-3


def test_only_cubes_are_turned():
    assert not orientation_problem((8, 8, 8), None, 48) and not orientation_problem((8, 8, 8), (2, 2, 2), 48)
    assert "cubes" in orientation_problem((8, 8, 4), None, 48) and "cubes" in orientation_problem(
        (8, 8, 8), (1, 1, 2), 48
    )
    assert not orientation_problem((8, 8, 4), (1, 1, 2), 8)


@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_reads_the_tokens_that_it_is_told(pool):
    model, volumes = small(), torch.rand(2, 1, *SIZE)
    classifier = Classifier(model, LinearHead(embedding_width(model, pool), 2), pool=pool)
    assert torch.equal(classifier.features(volumes), embed(model, volumes, pool))
    torch.nn.functional.cross_entropy(classifier(volumes), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
