"""The 3D ResNets: against MONAI's with the same weights, with views of any size."""

import pytest
import torch
from monai.networks.nets import resnet as monai_resnet

import resnet3d
from dino3d.weights import load_pretrained_weights
from vision_transformer import ARCHITECTURES, build_encoder, has_setting

SMALL = {name: getattr(resnet3d, name) for name in ("resnet18", "resnet50")}


def monai_of(name, **kwargs):
    settings = {"spatial_dims": 3, "n_input_channels": 1, "feed_forward": False, "conv1_t_stride": (2, 2, 1)}
    return getattr(monai_resnet, name)(**settings | {"shortcut_type": "B", "bias_downsample": False} | kwargs)


def spread(model):
    """Other statistics and gains than those of the start, which would hide what is left out."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("running_var") or name.endswith("weight") and tensor.ndim == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_equals_monai(name):
    """Embedding, in training and in evaluation, running statistics and gradients; at a size that halves unevenly."""
    torch.manual_seed(0)
    ours, theirs = spread(getattr(resnet3d, name)()), monai_of(name)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 1, 17, 20, 9)
    for training in (False, True, False):
        a, b = ours.train(training)(x), theirs.train(training)(x)
        assert a.shape == (2, ours.embed_dim) and (a - b).abs().max() <= 1e-5 * b.abs().max()
        if training:
            a.square().mean().backward()
            b.square().mean().backward()
    gradients = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6 * b.grad.abs().max()) for (_, a), b in gradients)
    statistics = theirs.state_dict()
    assert all(torch.allclose(tensor, statistics[key], rtol=1e-5) for key, tensor in ours.state_dict().items())


def test_maps_of_stages_equal_monai():
    ours, theirs = spread(resnet3d.resnet50()).eval(), monai_of("resnet50").eval()
    theirs.load_state_dict(ours.state_dict())
    x, wanted = torch.rand(1, 1, 40, 24, 20), []
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        layer.register_forward_hook(lambda module, inputs, output: wanted.append(output))
    with torch.no_grad():
        theirs(x)
        found = ours.get_intermediate_layers(x, [stage.block for stage in ours.stages])
    for stage, a, b in zip(ours.stages, found, wanted, strict=True):
        sizes = [-(-n // step) for n, step in zip(x.shape[2:], stage.stride)]
        assert a.shape == (1, stage.channels, *sizes) and (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert ours.stages[-1].stride == ours.patch_size == (32, 32, 16)


@pytest.mark.parametrize("size", [(24, 24, 12), (1, 1, 1), (7, 3, 2), (31, 64, 5)])
def test_any_size(size):
    model = SMALL["resnet18"]().eval()
    with torch.no_grad():
        assert model(torch.rand(2, 1, *size)).isfinite().all()


@pytest.mark.parametrize("n", [0, 9, (), (1, 0), (0, 8), (-1,)])
def test_no_such_block(n):
    with pytest.raises(ValueError, match="8 blocks"):
        SMALL["resnet18"]().get_intermediate_layers(torch.rand(2, 1, 8, 8, 8), n)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8, 8), (1, 8, 8, 8)])
def test_other_volumes_are_refused(shape):
    with pytest.raises(ValueError, match="expected a volume of shape"):
        SMALL["resnet18"]()(torch.rand(shape))


@pytest.mark.parametrize("name", SMALL)
def test_layer_of_follows_the_forward_pass(name):
    """A parameter's layer is the first block whose map it changes, plus one."""
    model = SMALL[name]()
    depth, x = len(model.blocks), torch.rand(2, 1, 16, 16, 16)
    maps = model.get_intermediate_layers(x, range(depth))
    seen = set()
    for i, one in enumerate(maps):
        gradients = torch.autograd.grad(one.sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
        used = {key for (key, _), gradient in zip(model.named_parameters(), gradients) if gradient is not None}
        assert {model.layer_of(key) for key in used - seen} == {i + 1} | ({0} if i == 0 else set())
        seen |= used
    assert seen == {key for key, _ in model.named_parameters()}


def test_checkpointing_changes_nothing_else():
    """The same embedding, gradients and, though a block is computed twice, running statistics."""
    torch.manual_seed(0)
    plain, saving = SMALL["resnet18"](), SMALL["resnet18"](grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.rand(2, 1, 24, 24, 12)
    for model in (plain, saving):
        model(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), saving.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers()))


def test_gradients_in_bf16_are_those_of_its_rounding():
    """Also of maps that the kernel reaches across, where a library took what lay in memory for gradients."""
    torch.manual_seed(0)
    ours = resnet3d.convolution(32, 32, 3)
    for size in ((2, 2, 3), (2, 3, 3), (3, 3, 3), (1, 2, 3)):
        x, found = torch.rand(4, 32, *size), {}
        for dtype in (torch.float32, torch.bfloat16):
            left = [torch.full((n,), 3e38) for n in range(10_000, 200_000, 10_000)]  # memory that is used again
            del left
            ours.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                y = ours(x.to(dtype))
            assert y.dtype == dtype
            y.float().square().sum().backward()
            found[dtype] = ours.weight.grad.clone()
        exact = found[torch.float32]
        assert (found[torch.bfloat16] - exact).abs().max() <= 0.02 * exact.abs().max()


def test_settings_that_it_has_not():
    assert not has_setting("resnet50", "patch_size") and has_setting("vit_tiny", "patch_size")
    assert all(has_setting(arch, "in_chans") for arch in ARCHITECTURES)
    assert build_encoder("resnet18", (16, 16, 8)).img_size == (16, 16, 8)
    with pytest.raises(TypeError):
        build_encoder("resnet18", (16, 16, 8), patch_size=(4, 4, 4))


# -------------------------------------------------------------------------------------------------- weights of others


@pytest.fixture(scope="module")
def volumes():
    return torch.rand(2, 1, 20, 24, 17, generator=torch.Generator().manual_seed(1))


def load(model, state, folder, key="teacher"):
    torch.save(state, folder / "weights.pth")
    load_pretrained_weights(model, folder / "weights.pth", key)
    return model.eval()


def test_monai_weights_of_its_defaults_load(volumes, tmp_path):
    """With a bias in the shortcuts, a classifier beside, DataParallel's prefix: the same embedding in evaluation, and
    in training, where the bias is taken off again."""
    theirs = spread(monai_of("resnet50", bias_downsample=True)).double().eval()
    state = {f"module.{name}": one for name, one in theirs.state_dict().items()}
    state["module.fc.bias"], volumes = torch.ones(2), volumes.double()
    ours = load(SMALL["resnet50"]().double(), {"state_dict": state}, tmp_path)
    with torch.no_grad():
        for training in (False, True, False):
            a, b = ours.train(training)(volumes), theirs.train(training)(volumes)
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_shortcuts_without_weights_load(volumes, tmp_path):
    """MedicalNet's resnet18: option A, and no num_batches_tracked."""
    theirs = spread(monai_of("resnet18", shortcut_type="A")).eval()
    state = {f"module.{name}": one for name, one in theirs.state_dict().items() if "num_batches" not in name}
    assert not any("downsample" in name for name in state)
    with pytest.warns(UserWarning, match="shortcuts have no weights"):
        ours = load(SMALL["resnet18"](), {"state_dict": state}, tmp_path)
    with torch.no_grad():
        assert (ours(volumes) - theirs(volumes)).abs().max() <= 1e-5 * theirs(volumes).abs().max()


def test_a_first_convolution_of_other_channels(volumes, tmp_path):
    theirs = spread(monai_of("resnet18", n_input_channels=3)).eval()
    with pytest.warns(UserWarning, match="3 channels are summed"):
        ours = load(SMALL["resnet18"](), theirs.state_dict(), tmp_path)
    with torch.no_grad():
        wanted = theirs(volumes.expand(-1, 3, -1, -1, -1))
        assert (ours(volumes) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with pytest.raises(ValueError, match=r"conv1.weight \(64, 3, 7, 7, 7\) instead of \(64, 2, 7, 7, 7\)"):
        load(resnet3d.resnet18(in_chans=2), theirs.state_dict(), tmp_path)


def test_our_own_checkpoints_load(volumes, tmp_path):
    teacher, student = spread(SMALL["resnet18"]()), SMALL["resnet18"]()
    state = {
        part: {f"{prefix}backbone.{name}": tensor for name, tensor in network.state_dict().items()}
        for part, prefix, network in (("teacher", "", teacher), ("student", "module.", student))
    }
    for key, network in (("teacher", teacher), ("student", student)):
        ours = load(SMALL["resnet18"](), state, tmp_path, key)
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), network.state_dict().values()))


@pytest.mark.parametrize(
    "file, model, says",
    [
        ("vit_micro", "resnet18", "it has the weights of a vision transformer, the model is resnet18"),
        ("resnet18", "vit_micro", "it has the weights of resnet18, the model is a vision transformer"),
        ("resnet18", "resnet34", "it has the weights of resnet18, the model is resnet34"),
        ("resnet34", "resnet18", "it has the weights of resnet34, the model is resnet18"),
        ("resnet18", "resnet50", "it has the weights of resnet18, the model is resnet50"),
    ],
)
def test_another_architecture_is_named(file, model, says, tmp_path):
    sizes = {"img_size": (24, 24, 12)}
    with pytest.raises(ValueError, match=says) as raised:
        load(ARCHITECTURES[model](**sizes), {"teacher": ARCHITECTURES[file](**sizes).state_dict()}, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("model", ["vit_micro", "resnet18"])
def test_a_resnet_of_another_depth_is_named(model, tmp_path):
    """As MedicalNet's resnet10 is one."""
    other = resnet3d.ResNet(resnet3d.BasicBlock, (1, 1, 1, 1), img_size=(24, 24, 12)).state_dict()
    with pytest.raises(ValueError, match=r"it has the weights of a ResNet of 1 \+ 1 \+ 1 \+ 1 blocks, the model is"):
        load(ARCHITECTURES[model](img_size=(24, 24, 12)), {"state_dict": other}, tmp_path, "state_dict")
