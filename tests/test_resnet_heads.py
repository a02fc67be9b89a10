"""Classifiers and segmenters on a ResNet: decoders against MONAI's blocks and scipy, batch norm, any window's size."""

import functools

import numpy as np
import pytest
import torch
from monai.networks.blocks import UnetrUpBlock

from dino3d.command_line import UserError
from dino3d.features.encoder import PretrainedEncoder
from dino3d.features.pooling import embed, embedding_width
from dino3d.finetune.heads import (
    DECODERS,
    Classifier,
    LinearDecoder,
    LinearHead,
    Segmenter,
    UnetDecoder,
    build_segmenter,
    choose_decoder,
)
from dino3d.training.batch_norm import warm_up
from dino3d.training.layer_decay import layer_groups
from dino3d.training.nonfinite import BuffersOfStep
from resnet3d import BasicBlock, Bottleneck, ResNet
from vision_transformer import VisionTransformer

SIZE = (40, 33, 17)  # no multiple of any stride
SMALL = functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), width=8)
OF_STAGES = ("unet", "linear")


def encoder_of(size=SIZE, seed=0, build=SMALL):
    """With running statistics as after some training."""
    torch.manual_seed(seed)
    model = build(img_size=size)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("var"):
                buffer.uniform_(0.5, 2)
    return model


def segmenter(name, size=SIZE, classes=2, freeze_encoder=False, build=SMALL):
    encoder = encoder_of(size, build=build)
    settings = {"feature_size": 2} if name == "unet" else {}
    return Segmenter(encoder, DECODERS[name](encoder, classes, **settings), freeze_encoder)


def volumes_of(size=SIZE, count=2):
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------------------------------------------- the decoders


def test_unet_is_a_chain_of_monais_up_blocks():
    """Where the maps' sizes are multiples and skips have as many channels as their stage, a stage is MONAI's block."""
    model = segmenter("unet", (64, 32, 32), classes=3).double().eval()
    volumes, maps = volumes_of((64, 32, 32)).double(), []
    maps = model.features(volumes)
    assert [one.shape[1] for one in maps] == [8, 16, 32, 64]
    assert model.decoder.strides == [(16, 16, 8), (8, 8, 4), (4, 4, 2), (2, 2, 1), (1, 1, 1)]
    x, skips = maps[-1], [*reversed(maps[:-1]), None, volumes]
    for stage, skip in zip(model.decoder.stages, skips):
        channels, factor = stage.upsample.out_channels, stage.upsample.stride
        if skip is not None and skip.shape[1] == channels:
            theirs = UnetrUpBlock(3, x.shape[1], channels, 3, factor, "instance", res_block=True).double()
            weights = dict(zip(theirs.state_dict(), stage.state_dict().values(), strict=True))
            theirs.load_state_dict(weights)
            x = theirs(x, skip)
        else:  # without a skip, or with the volume's one channel
            x = stage.upsample(x)
            x = stage.convolutions(x if skip is None else torch.cat((x, skip), 1))
    torch.testing.assert_close(model(volumes), model.decoder.head(x))


@pytest.mark.parametrize("name", OF_STAGES)
@pytest.mark.parametrize("build", [SMALL, functools.partial(ResNet, Bottleneck, (1, 2, 1, 1), width=4)])
@pytest.mark.parametrize("size", [SIZE, (32, 32, 32), (17, 16, 9), (1, 50, 3)])
def test_logits_have_the_volumes_size(name, build, size):
    model = segmenter(name, build=build, classes=3).eval()
    with torch.no_grad():
        logits = model(volumes_of(size))
    assert logits.shape == (2, 3, *size) and logits.isfinite().all()


def test_a_linear_decoder_interpolates_between_the_voxels_that_positions_lie_at():
    """Position i of the last map at voxel 32 i (of z 16 i); beyond the last one it stays."""
    from scipy.ndimage import map_coordinates

    model = segmenter("linear", (70, 64, 40), classes=3).double().eval().requires_grad_(False)
    volumes = volumes_of((70, 64, 40), 1).double()
    (map_,) = model.encoder.get_intermediate_layers(volumes)
    positions = model.decoder.head(map_)[0].numpy()
    assert positions.shape == (3, 3, 2, 3)
    points = np.meshgrid(*(np.arange(n) / s for n, s in zip((70, 64, 40), (32, 32, 16))), indexing="ij")
    expected = np.stack([map_coordinates(one, points, order=1, mode="nearest") for one in positions])
    np.testing.assert_allclose(model(volumes)[0].numpy(), expected, atol=1e-12)


def test_what_a_map_says_lies_where_the_decoder_takes_it_to_lie():
    """The gradient of a position of each map is centred on voxel i * stride of the volume."""
    encoder = encoder_of((65, 65, 33)).double().eval()
    volume = volumes_of((65, 65, 33), 1).double().requires_grad_()
    for stage, map_ in zip(encoder.stages, encoder.get_intermediate_layers(volume, [s.block for s in encoder.stages])):
        middle = [n // 2 for n in map_.shape[2:]]
        (gradient,) = torch.autograd.grad(map_[(0, slice(None), *middle)].square().sum(), volume, retain_graph=True)
        size = gradient[0, 0].abs()
        for axis, (at, stride, n) in enumerate(zip(middle, stage.stride, size.shape)):
            weights = size.sum([other for other in range(3) if other != axis])
            centre = (weights * torch.arange(n)).sum() / weights.sum()
            assert abs(centre - at * stride) < 0.2 * stride, (stage, axis, centre)
    assert encoder.first_position == (0, 0, 0)


def test_unet_learns_one_volume_of_an_odd_size():
    """A box that the grey values say nothing about."""
    size = (36, 21, 11)
    encoder = encoder_of(size)
    model = Segmenter(encoder, UnetDecoder(encoder, 2, feature_size=8)).train()
    volumes, box = volumes_of(size, 1), torch.zeros(1, *size, dtype=torch.long)
    box[:, 7:25, 12:21, 3:10] = 1  # up to the border
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(volumes), box)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model(volumes).argmax(1)
    assert 2 * (found * box).sum() > 0.95 * (found.sum() + box.sum())  # Dice


def test_each_encoder_has_its_decoder():
    vit = PretrainedEncoder("vit_micro", [6, 6, 3], [12, 12, 6], [-1000, 1000], None)
    resnet = PretrainedEncoder("resnet18", None, [64, 64, 32], [-1000, 1000], None)
    assert (choose_decoder(vit), choose_decoder(resnet)) == ("unetr", "unet")
    with pytest.raises(UserError, match="--decoder unetr with --arch resnet18: it reads .* take unet"):
        build_segmenter(resnet, None, "unetr", 2, False)
    with pytest.raises(UserError, match="--decoder unet with --arch vit_micro: it reads .* take unetr"):
        build_segmenter(vit, 0.0, "unet", 2, False)
    with pytest.raises(UserError, match=r"input of \(16, 12, 8\) voxels is too small .* more than \(16, 16, 8\)"):
        build_segmenter(resnet._replace(input_size=[16, 12, 8]), None, "unet", 2, False)
    with pytest.raises(UserError, match="--drop_path_rate 0.1: resnet18 has none"):
        resnet.build(0.1)


# ---------------------------------------------------------------------------------------------------------- batch norm


@pytest.mark.parametrize("kind", ["classifier", *OF_STAGES])
@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_a_frozen_encoder_keeps_its_running_statistics(kind, freeze_encoder):
    """To the last bit; one that is trained moves them, and every parameter gets a gradient, for which DDP waits."""
    if kind == "classifier":
        model = Classifier(encoder_of(), LinearHead(64, 2), freeze_encoder).train()
    else:
        model = segmenter(kind, freeze_encoder=freeze_encoder).train()
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    first = model(volumes_of())
    assert torch.equal(first, model(volumes_of()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    first.square().mean().backward()
    optimizer.step()
    same = {name for name, tensor in model.encoder.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == (set(before) if freeze_encoder else set())
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {name for name, one in model.named_parameters() if one.grad is not None}
    assert any(name.startswith("encoder.") for name in trained) is not freeze_encoder


def test_a_step_that_is_skipped_leaves_no_statistics():
    """One value that is not finite would stay in a running mean for good."""
    model = Classifier(encoder_of(), LinearHead(64, 2)).train()
    volumes, before = volumes_of(), {name: one.clone() for name, one in model.named_buffers()}
    volumes[0, 0, 3, 3, 3] = torch.nan
    buffers = BuffersOfStep(model)
    model(volumes)
    assert not model.encoder.bn1.running_mean.isfinite().any()
    buffers.undo_unless(torch.tensor(False))
    assert all(torch.equal(one, before[name]) for name, one in model.named_buffers())
    buffers = BuffersOfStep(model)
    model(volumes_of())
    mean = model.encoder.bn1.running_mean
    moved = mean.clone()
    buffers.undo_unless(torch.tensor(True))
    assert torch.equal(mean, moved) and not torch.equal(mean, before["encoder.bn1.running_mean"])


def test_statistics_from_scratch_are_the_mean_of_the_first_batches():
    norm, batches = torch.nn.BatchNorm3d(3), torch.rand(14, 4, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    for step, batch in enumerate(batches):
        warm_up(norm, step)
        norm(batch)
        if step == 9:
            torch.testing.assert_close(norm.running_mean, batches[:10].mean((0, 1, 3, 4, 5)))
            torch.testing.assert_close(norm.running_var, batches[:10].transpose(1, 2).flatten(2).var(2).mean(0))
    mean = batches[:10].mean((0, 1, 3, 4, 5))
    for batch in batches[10:]:
        mean = 0.9 * mean + 0.1 * batch.mean((0, 2, 3, 4))
    torch.testing.assert_close(norm.running_mean, mean)


def test_learning_rates_fall_block_by_block():
    model = Classifier(encoder_of(), LinearHead(64, 2))
    groups = layer_groups(model, "encoder.", model.encoder, 0.5, 0.1)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    found = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert found["head.linear.weight"] == 1 and found["encoder.layer4.0.conv1.weight"] == 0.5
    assert found["encoder.layer1.0.bn2.bias"] == 0.5**4 and found["encoder.conv1.weight"] == 0.5**5
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    norms = {name for name, p in model.named_parameters() if not decay[id(p)]}
    assert norms == {name for name, p in model.named_parameters() if p.ndim == 1}  # batch norms and biases


# ------------------------------------------------------------------------------------------------------------ features


def test_embeddings_are_means_of_maps():
    encoder, volumes = encoder_of().eval(), volumes_of()
    with torch.no_grad():
        maps = encoder.get_intermediate_layers(volumes, 3)
        means = torch.cat([one.mean((2, 3, 4)) for one in maps], 1)
        for pool in ("cls", "mean"):
            torch.testing.assert_close(embed(encoder, volumes, pool, 3), means)
            torch.testing.assert_close(embed(encoder, volumes, pool), means[:, -64:])
            assert embedding_width(encoder, pool, 3) == means.shape[1] == 16 + 32 + 64
        with pytest.raises(ValueError, match="no class token"):
            embed(encoder, volumes, "cls+mean")
        pairs = encoder.embeddings_and_maps(volumes, (0, 3))
        assert torch.equal(pairs[1][0], encoder(volumes)) and pairs[0][1].shape[1] == 8


def test_of_a_vit_embeddings_and_maps_are_its_tokens():
    torch.manual_seed(0)
    encoder = VisionTransformer((12, 18, 6), (6, 6, 3), embed_dim=12, depth=3, num_heads=3)
    volumes = volumes_of((12, 18, 6))
    for (token, map_), tokens in zip(encoder.embeddings_and_maps(volumes, 2), encoder.intermediate_tokens(volumes, 2)):
        assert torch.equal(token, tokens[:, 0])
        assert torch.equal(map_, tokens[:, 1:].transpose(1, 2).reshape(2, 12, 2, 3, 2))
    assert LinearDecoder(encoder, 2).stride is None
