"""Classifiers against formulas and scikit-learn; segmenters against MONAI's UNETR and formulas."""

import math

import numpy as np
import pytest
import torch
from test_vision_transformer import load_into_monai, randomise

from dino3d.finetune.heads import (
    DECODERS,
    Classifier,
    LinearDecoder,
    LinearHead,
    NearestNeighbours,
    Segmenter,
    Standardise,
    UnetrDecoder,
    upsampling_factors,
)
from vision_transformer import VisionTransformer


def small_encoder(drop_path_rate=0.0):
    return VisionTransformer(
        (24, 24, 12), (12, 12, 6), embed_dim=24, depth=3, num_heads=3, drop_path_rate=drop_path_rate
    )


def test_logits_are_the_heads_of_the_features():
    torch.manual_seed(0)
    model = Classifier(small_encoder(), LinearHead(24, 3)).double().eval()
    volumes = torch.rand(5, 1, 24, 24, 12, dtype=torch.float64)
    features = model.encoder(volumes)
    model.head.standardise.fit(features.detach())
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    expected = standard @ model.head.linear.weight.T + model.head.linear.bias
    torch.testing.assert_close(model(volumes), expected)
    assert torch.equal(model.features(volumes), features)


def test_every_parameter_gets_a_gradient():
    model = Classifier(small_encoder(), LinearHead(24, 2))
    torch.nn.functional.cross_entropy(model(torch.rand(2, 1, 24, 24, 12)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_frozen_encoder_stays_as_it_is():
    torch.manual_seed(0)
    model = Classifier(small_encoder(0.5), LinearHead(24, 2), freeze_encoder=True).train()
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    volumes = torch.rand(8, 1, 24, 24, 12)
    assert torch.equal(model(volumes), model(volumes))  # no stochastic depth
    assert model.head.training and not model.encoder.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(volumes), torch.arange(8) % 2).backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert all(p.grad is None for p in model.encoder.parameters()) and model.head.linear.weight.grad.any()


def test_standardise_is_numpys():
    rng = np.random.default_rng(0)
    known, new = rng.normal(3, 5, (40, 6)), rng.normal(3, 5, (4, 6))
    known[:, 2] = 7.0  # a feature that never varies
    layer = Standardise(6).double()
    torch.testing.assert_close(layer(torch.from_numpy(new)), torch.from_numpy(new))  # nothing known yet
    layer.fit(torch.from_numpy(known))
    expected = (new - known.mean(0)) / np.maximum(known.std(0), 1e-6)
    torch.testing.assert_close(layer(torch.from_numpy(new)), torch.from_numpy(expected))


@pytest.mark.parametrize("k, classes", [(1, 2), (7, 2), (20, 3), (500, 3)])
def test_nearest_neighbours_are_scikit_learns(k, classes):
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    known, labels, new = rng.normal(size=(50, 8)), np.arange(50) % classes, rng.normal(size=(9, 8))
    head = NearestNeighbours(8, classes, 50, k).double()
    head.fit(torch.from_numpy(known), torch.from_numpy(labels))
    theirs = KNeighborsClassifier(min(k, 50), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    mean, deviation = known.mean(0), known.std(0)
    theirs.fit((known - mean) / deviation, labels)
    ours = head(torch.from_numpy(new)).exp()
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba((new - mean) / deviation), atol=1e-9)
    torch.testing.assert_close(head(torch.from_numpy(new)).softmax(-1), ours)  # log probabilities are logits


def test_mixed_precision_makes_no_ties():
    torch.manual_seed(0)
    model = Classifier(small_encoder(), LinearHead(24, 2)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(64, 1, 24, 24, 12))
    assert logits.dtype == torch.float32 and len(logits[:, 0].unique()) == 64


# -------------------------------------------------------------------------------------------------------- segmentation


FACTORS = {
    (12, 12, 6): [(3, 3, 3), (2, 2, 2), (2, 2, 1)],
    (16, 16, 16): [(2, 2, 2)] * 4,
    (8, 8, 4): [(2, 2, 2), (2, 2, 2), (2, 2, 1)],
    (7, 14, 2): [(7, 7, 2), (1, 2, 1)],
    (5, 5, 5): [(5, 5, 5)],
    (1, 1, 1): [(1, 1, 1)],
}


OF_TOKENS = ("unetr", "linear")  # decoders of a ViT


def segmenter(
    name,
    patch_size=(12, 12, 6),
    grid=(2, 2, 2),
    classes=2,
    depth=4,
    freeze_encoder=False,
    drop_path_rate=0.0,
    **settings,
):
    """Trained on volumes of `grid` patches; channels few enough for a CPU."""
    size = [g * p for g, p in zip(grid, patch_size)]
    encoder = VisionTransformer(size, patch_size, embed_dim=24, depth=depth, num_heads=3, drop_path_rate=drop_path_rate)
    if name == "unetr":
        settings = {"feature_size": 4, **settings}
    return Segmenter(encoder, DECODERS[name](encoder, classes, **settings), freeze_encoder)


def volumes_of(model, count=2, grid=None, seed=0):
    size = [g * p for g, p in zip(grid or model.encoder.grid_size, model.encoder.patch_size)]
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, *size, generator=generator, dtype=model.encoder.norm.weight.dtype)


def test_unetr_of_a_16_patch_is_monais():
    """Same weights, same logits.

    MONAI's ViT has no class token in its UNETR: it is given one, and its features are left out. MONAI counts blocks
    from 0, so that its 3, 6 and 9 are each a block later than the paper's.
    """
    pytest.importorskip("einops", reason="MONAI's ViT needs einops, which MONAI doesn't install")
    from monai.networks.nets import UNETR

    torch.manual_seed(0)
    ours = segmenter("unetr", (16, 16, 16), (2, 3, 1), classes=3, depth=12).double().eval()
    randomise(ours.encoder)
    assert ours.decoder.layers == (2, 5, 8, 11)
    ours.decoder.layers = (3, 6, 9, 11)
    theirs = UNETR(1, 3, (32, 48, 16), feature_size=4, hidden_size=24, mlp_dim=96, num_heads=3, qkv_bias=True).double()
    theirs.vit.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 24, dtype=torch.float64))
    load_into_monai(theirs.vit, ours.encoder)
    to_map = theirs.proj_feat
    theirs.proj_feat = lambda tokens: to_map(tokens[:, 1:])

    decoder = ours.decoder
    parts = [
        theirs.encoder4,
        theirs.encoder3,
        theirs.encoder2,
        theirs.encoder1,
        theirs.decoder5,
        theirs.decoder4,
        theirs.decoder3,
        theirs.decoder2,
        theirs.out,
    ]
    for part, source in zip(parts, [*decoder.skips, *decoder.stages, decoder.head], strict=True):
        # By position: the names differ where MONAI keeps a skip's first step apart
        part.load_state_dict(dict(zip(part.state_dict(), source.state_dict().values(), strict=True)))
    count = sum(parameter.numel() for parameter in decoder.parameters())
    assert count == sum(p.numel() for name, p in theirs.named_parameters() if not name.startswith("vit."))

    volumes = volumes_of(ours)
    torch.testing.assert_close(ours(volumes), theirs.eval()(volumes))


@pytest.mark.parametrize("patch_size, expected", FACTORS.items())
def test_upsampling_factors(patch_size, expected):
    assert upsampling_factors(patch_size) == expected
    assert tuple(math.prod(axis) for axis in zip(*expected)) == patch_size


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("patch_size", FACTORS)
def test_logits_have_the_volumes_size(name, patch_size):
    model = segmenter(name, patch_size, (2, 1, 3), classes=3)
    for grid in ((2, 1, 3), (1, 2, 4)):  # the second as at prediction, of another size than in training
        volumes = volumes_of(model, grid=grid)
        logits = model(volumes)
        assert logits.shape == (2, 3, *volumes.shape[2:]) and logits.isfinite().all()


@pytest.mark.parametrize(
    "depth, patch_size, layers",
    [
        (12, (16, 16, 16), (2, 5, 8, 11)),
        (12, (12, 12, 6), (3, 7, 11)),
        (24, (16, 16, 16), (5, 11, 17, 23)),
        (12, (5, 5, 5), (11,)),
        (5, (16, 16, 16), (0, 1, 2, 4)),
        (4, (16, 16, 8), (0, 1, 2, 3)),
    ],
)
def test_blocks_that_unetr_reads(depth, patch_size, layers):
    encoder = VisionTransformer(patch_size, patch_size, embed_dim=6, depth=depth, num_heads=3)
    assert UnetrDecoder(encoder, 2, feature_size=2).layers == layers
    assert LinearDecoder(encoder, 2).layers == (depth - 1,)


def test_unetr_refuses_an_encoder_of_too_few_blocks():
    with pytest.raises(ValueError, match=r"depth is 3; a patch of \(16, 16, 16\) voxels makes 4 stages"):
        UnetrDecoder(VisionTransformer((16, 16, 16), (16, 16, 16), embed_dim=6, depth=3, num_heads=3), 2)


def test_unetrs_channels_double_with_every_stage_below():
    decoder = UnetrDecoder(VisionTransformer((12, 12, 6), (12, 12, 6), embed_dim=6, num_heads=3), 2)
    assert [stage.transp_conv.conv.out_channels for stage in decoder.stages] == [64, 32, 16]
    strides = [stage.transp_conv.conv.stride for stage in decoder.stages]
    assert strides == FACTORS[12, 12, 6] == [stage.transp_conv.conv.kernel_size for stage in decoder.stages]


@pytest.mark.parametrize("grid", [(2, 3, 2), (3, 1, 4)])
def test_linear_decoder_is_the_written_out_formula(grid):
    """Against scipy's linear interpolation, at the voxels' centres in units of patches, of W token + b."""
    from scipy.ndimage import map_coordinates

    model = segmenter("linear", (4, 3, 2), (2, 3, 2), classes=3).double().eval().requires_grad_(False)
    randomise(model)
    volumes = volumes_of(model, count=1, grid=grid)
    tokens = model.encoder.forward_tokens(volumes)[0, 1:].numpy()
    weight, bias = model.decoder.head.weight.flatten(1).numpy(), model.decoder.head.bias.numpy()
    patches = (tokens @ weight.T + bias).reshape(*grid, 3)
    points = np.meshgrid(*[(np.arange(g * p) + 0.5) / p - 0.5 for g, p in zip(grid, (4, 3, 2))], indexing="ij")
    expected = np.stack([map_coordinates(patches[..., c], points, order=1, mode="nearest") for c in range(3)])
    np.testing.assert_allclose(model(volumes)[0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.parametrize("patch_size", [(12, 12, 6), (5, 5, 5)])
def test_every_trained_parameter_of_a_segmenter_gets_a_gradient(name, freeze_encoder, patch_size):
    """DDP waits for all of them."""
    model = segmenter(name, patch_size, freeze_encoder=freeze_encoder, drop_path_rate=0.1).train()
    volumes = volumes_of(model)
    target = (volumes[:, 0] > 0.5).long()
    torch.nn.functional.cross_entropy(model(volumes), target).backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, _ in model.named_parameters() if not freeze_encoder or key.startswith("decoder.")}


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_segmenters_frozen_encoder_stays_as_it_is(name):
    torch.manual_seed(0)
    model = segmenter(name, freeze_encoder=True, drop_path_rate=0.5).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    volumes = volumes_of(model, count=4)
    assert torch.equal(model(volumes), model(volumes))  # no stochastic depth
    assert not any(map_.requires_grad for map_ in model.features(volumes))
    assert model.decoder.training and not model.encoder.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(volumes), (volumes[:, 0] > 0.5).long()).backward()
    optimizer.step()
    unchanged = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])}
    assert unchanged == {key for key in before if key.startswith("encoder.")}


def test_unetr_learns_one_volume():
    """A box that the grey values say nothing about, and that cuts through patches."""
    torch.manual_seed(0)
    model = segmenter("unetr", feature_size=8).train()  # with 4 some seeds never get off the ground
    volumes = volumes_of(model, count=1)
    box = torch.zeros(1, *volumes.shape[2:], dtype=torch.long)
    box[:, 4:15, 8:20, 3:8] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(volumes), box)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.eval()(volumes).argmax(1)
    assert 2 * (found * box).sum() > 0.95 * (found.sum() + box.sum())  # Dice


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_segmenters_logits_are_not_rounded_to_half_precision(name):
    torch.manual_seed(0)
    model = segmenter(name).train()
    volumes = volumes_of(model)
    expected = model(volumes)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(volumes)
    assert logits.dtype == torch.float32 and len(logits.unique()) > 0.9 * len(expected.unique())
    assert torch.nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.99
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", OF_TOKENS)
def test_segmenters_work_in_float64(name):
    model = segmenter(name)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        exact = segmenter(name)
    finally:
        torch.set_default_dtype(default)
    exact.load_state_dict(model.state_dict())
    volumes = volumes_of(model)
    logits = exact(volumes.double())
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), model(volumes), atol=1e-4, rtol=1e-4)
