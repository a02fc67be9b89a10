"""Segmentation on CPUs: the quick convolutions against MONAI's modules, and windows of air that are not run."""

import numpy as np
import pytest
import torch
from test_heads import segmenter, volumes_of
from test_sliding_window import CLIP

from dino3d.data import images
from dino3d.data.conventions import AIR
from dino3d.features.sliding_window import TISSUE_ABOVE, Windows, segment
from dino3d.finetune import cpu_inference
from dino3d.finetune.cpu_inference import faster
from dino3d.finetune.heads import Segmenter, UnetDecoder
from resnet3d import BasicBlock, ResNet


def network(name, patch_size=(12, 12, 6), dtype=torch.float32):
    torch.manual_seed(0)
    if name == "unet":
        encoder = ResNet(BasicBlock, (1, 1, 1, 1), img_size=(32, 32, 16), width=8)
        model = Segmenter(encoder, UnetDecoder(encoder, 3, feature_size=4))
    else:
        model = segmenter(name, patch_size, (3, 2, 2), classes=3)
    return model.to(dtype).eval()


def volumes_for(model, name, count):
    if name != "unet":
        return volumes_of(model, count)
    return torch.rand(count, 1, 33, 24, 17, dtype=next(model.parameters()).dtype)


CASES = [("unetr", (12, 12, 6)), ("unetr", (8, 8, 8)), ("unetr", (6, 4, 1)), ("linear", (12, 12, 6)), ("unet", None)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("name", "patch_size"), CASES)
def test_logits_are_those_of_the_plain_modules(name, patch_size, count):
    """In float64 to 1e-9, so that nothing but rounding differs; in single precision and bf16 to what these round."""
    exact = network(name, patch_size, torch.float64)
    volumes = volumes_for(exact, name, count)
    with torch.no_grad():
        expected = exact(volumes)
        torch.testing.assert_close(faster(exact)(volumes), expected, rtol=0, atol=1e-9)
        single = network(name, patch_size)
        single.load_state_dict(exact.state_dict())
        scale = expected.abs().max().item()
        torch.testing.assert_close(faster(single)(volumes.float()).double(), expected, rtol=0, atol=1e-3 * scale)
        with torch.autocast("cpu", torch.bfloat16):
            plain, quick = single(volumes.float()), faster(single)(volumes.float())
        assert quick.dtype == torch.float32
        assert (quick - expected).norm() <= 1.5 * (plain - expected).norm() + 1e-3 * expected.norm()


def test_a_network_is_left_as_it_is_and_its_weights_are_shared():
    model = network("unetr")
    kinds = [type(module) for module in model.modules()]
    quick, volumes = faster(model), volumes_of(model, 1)
    before = quick(volumes)
    assert [type(module) for module in model.modules()] == kinds and not before.requires_grad
    assert not any(kind.__module__ == cpu_inference.__name__ for kind in kinds)
    with torch.no_grad():
        model.decoder.head.conv.conv.weight.mul_(2)
    assert not torch.equal(quick(volumes), before)
    model(volumes).sum().backward()
    assert model.decoder.head.conv.conv.weight.grad is not None


def test_windows_of_air_are_not_run():
    """Nothing differs outside of them, and nothing at all where they hold one value; whatever the batch."""
    generator = np.random.default_rng(0)
    voxels = np.full((40, 31, 23), AIR, np.int16)
    voxels[:20] = generator.integers(-1020, TISSUE_ABOVE + 1, (20, 31, 23))  # noise of air, up to the limit
    voxels[12:22, 8:20, 5:15] = generator.integers(-1000, 400, (10, 12, 10))
    image = images.make_image(voxels, np.diag([1.0, 1, 2, 1]))
    layer = torch.nn.Conv3d(1, 2, 3, padding=1)
    seen = []

    def model(windows):
        seen.append(len(windows))
        return layer(windows)

    def found(batch_size, skip_air):
        seen.clear()
        windows = Windows((8, 8, 6), 0.25, batch_size)
        return segment([model], image, windows, CLIP, "cpu", skip_air=skip_air), sum(seen)

    plain, windows_of_all = found(1, False)
    assert windows_of_all == 7 * 5 * 6  # 6 voxels apart, 4 along z
    starts = [[*range(0, n - w, s), n - w] for n, w, s in zip(voxels.shape, (8, 8, 6), (6, 6, 4))]
    changed, tissue = np.zeros(voxels.shape, bool), 0
    for x in starts[0]:
        for y in starts[1]:
            for z in starts[2]:
                box = slice(x, x + 8), slice(y, y + 8), slice(z, z + 6)
                skipped = voxels[box].max() <= TISSUE_ABOVE
                tissue += not skipped
                changed[box] |= skipped and len(np.unique(voxels[box])) > 1
    for batch_size in (1, 3):
        skipping, run = found(batch_size, True)
        assert run == tissue + 1 < windows_of_all / 2  # and one of nothing but air
        np.testing.assert_allclose(skipping.numpy()[:, ~changed], plain.numpy()[:, ~changed], rtol=0, atol=1e-6)
        assert (skipping != plain).any()
