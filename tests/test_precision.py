"""Which precision a run computes in, and whether figures in bf16 are those in single precision."""

import numpy as np
import pytest
import torch
from test_heads import segmenter, volumes_of
from test_main_dino import run_main, smaller_model  # noqa: F401

import utils
from dino3d import mixed_precision
from dino3d.command_line import UserError
from dino3d.files import read_json, read_log
from dino3d.finetune.heads import Segmenter, UnetDecoder
from main_lts_msd import dice_and_cross_entropy
from resnet3d import BasicBlock, ResNet
from vision_transformer import VisionTransformer


@pytest.fixture(params=[True, False], ids=["bf16 CPU", "older CPU"])
def native(request, monkeypatch):
    monkeypatch.setattr(utils, "multiplies_bf16", lambda: request.param)
    return request.param


def chosen(*args):
    return utils.choose_precision(*args[:2], utils.Processes(), *args[2:])


def checkpoint(folder, config, name="checkpoint.pth"):
    torch.save({"config": config, "student": {"w": torch.rand(3)}}, folder / name)
    return folder / "checkpoint.pth"


def test_the_processors_flags_decide(native, tmp_path):
    default = "bf16" if native else "fp32"
    precision, (notice,) = chosen(None, None)
    assert precision == default and notice.startswith(f"--precision {default}: the CPUs ")
    assert chosen(None, None, tmp_path / "checkpoint.pth") == (precision, [notice])  # no such file: a new run
    assert [chosen(one, None) for one in ("bf16", "fp32")] == [("bf16", []), ("fp32", [])]
    assert chosen(None, False)[0] == "fp32" and chosen(None, True)[0] == default
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        chosen("fp16", None)


def test_all_ranks_must_multiply_in_it(monkeypatch):
    monkeypatch.setattr(utils.Processes, "all_gather", lambda self, value: [value, False, True])
    monkeypatch.setattr(utils, "multiplies_bf16", lambda: True)
    assert chosen(None, None) == (
        "fp32",
        ["--precision fp32: the CPUs of 1 of 3 processes have no instructions for bf16"],
    )


def test_flags_are_read_where_torch_does_not_tell_them(monkeypatch):
    """As /proc/cpuinfo has them, which is what torch's own answer is held to."""
    told = mixed_precision.multiplies_bf16(), mixed_precision.multiplies_bf16_by_row()
    for read in (mixed_precision.cpu_flags, mixed_precision.multiplies_bf16_by_row):
        monkeypatch.setattr(mixed_precision, read.__name__, read.__wrapped__)  # nothing that was found before
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert (mixed_precision.multiplies_bf16(), mixed_precision.multiplies_bf16_by_row()) == told
    monkeypatch.setattr(mixed_precision, "cpu_flags", lambda: {"avx512_bf16", "amx_bf16", "amx_tile"})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512_BF16")
    assert mixed_precision.multiplies_bf16() and not mixed_precision.multiplies_bf16_by_row()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not mixed_precision.multiplies_bf16()


@pytest.mark.parametrize("before", ["bf16", "fp32"])
def test_a_resumed_run_keeps_its_precision(native, before, tmp_path):
    path = checkpoint(tmp_path, {"precision": before})
    assert chosen(None, None, path) == (before, [f"--precision {before}: in which the run was trained before"])
    assert chosen(before, None, path) == (before, [])
    other = {"bf16": "fp32", "fp32": "bf16"}[before]
    told = [f"--precision {other}: the run was trained in {before} before"]
    assert chosen(other, None, path) == (other, told)


def test_older_runs_damaged_ones_and_those_of_gpus(native, tmp_path):
    default = "bf16" if native else "fp32"
    assert chosen(None, None, checkpoint(tmp_path, {"arch": "vit_tiny"}))[0] == "fp32"  # noted none: it was this
    path = checkpoint(tmp_path, {"precision": "fp16"})
    precision, (notice,) = chosen(None, None, path)
    assert precision == default and "needs a GPU" in notice
    checkpoint(tmp_path, {"precision": "fp32"}, "checkpoint.1.pth")
    path.write_bytes(path.read_bytes()[:100])
    assert chosen(None, None, path)[0] == "fp32"  # of the one that such a run goes on from
    (tmp_path / "checkpoint.1.pth").unlink()
    assert chosen(None, None, path)[0] == default  # whoever loads it tells


def test_pretraining_keeps_it_and_says_so(volumes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(utils, "multiplies_bf16", lambda: True)
    flags = ["--data_dir", volumes, "--output_dir", tmp_path, "--batch_size_per_gpu", 4, "--epochs", 2]
    assert run_main(capsys, *flags, "--max_steps", 2)[0] == 0  # in fp32, which those tests name
    code, out, _ = run_main(capsys, *flags, "--precision", "bf16", "--max_steps", 3)
    assert code == 0 and "--precision bf16: the run was trained in fp32 before" in out and "threads, bf16;" in out
    config = read_json(tmp_path / "config.json")
    assert config["arguments"]["precision"] == "bf16" and "GOMP_SPINCOUNT" in config["openmp"]


# -------------------------------------------------------------------------------------------------- figures agree


def test_losses_of_pretraining_agree(volumes, tmp_path, capsys):
    """To 1 %, over two epochs."""
    flags = ["--data_dir", volumes, "--batch_size_per_gpu", 4, "--epochs", 2]
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert run_main(capsys, *flags, "--output_dir", out, "--precision", precision)[0] == 0
        losses[precision] = [record["loss"] for record in read_log(out / "log.txt")]
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.01)


def trained(model, volumes, loss_of, precision, steps=60):
    """[loss of each step] of a model in training, from a fixed seed."""
    torch.manual_seed(1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model.train()(volumes)
        loss = loss_of(logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_dice_and_losses_of_a_segmenter_agree():
    """Final Dice to 0.02, mean loss of the last ten steps to 0.03."""
    found = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = segmenter("unetr")
        volumes = volumes_of(model)
        box = torch.zeros(2, *volumes.shape[2:], dtype=torch.int64)
        box[:, 5:17, 6:18, 3:9] = 1
        volumes = volumes + 0.5 * box[:, None]
        losses = trained(model, volumes, lambda logits, box=box: dice_and_cross_entropy(logits, box).mean(), precision)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            mask = model.eval()(volumes).argmax(1)
        found[precision] = (2 * (mask * box).sum() / (mask.sum() + box.sum())).item(), np.mean(losses[-10:])
    assert found["fp32"][0] > 0.9
    np.testing.assert_allclose(found["bf16"][0], found["fp32"][0], atol=0.02)
    np.testing.assert_allclose(found["bf16"][1], found["fp32"][1], atol=0.03)


def test_auc_and_loss_of_frozen_features_agree():
    """Logistic regression on an encoder's features, judged on cases that it has not seen: AUC and loss to 0.02."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score

    labels = np.arange(160) % 2
    volumes = torch.rand(160, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    volumes[:, :, 4:8, 4:8, 4:8] += 0.8 * torch.from_numpy(labels)[:, None, None, None, None]
    torch.manual_seed(0)
    encoder = VisionTransformer((12, 12, 12), (4, 4, 4), embed_dim=24, depth=2, num_heads=3)
    for parameter in encoder.parameters():  # no initial one, whose class token hardly looks at the volume
        torch.nn.init.normal_(parameter, std=0.3)
    found = {}
    for precision in ("fp32", "bf16"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            features = encoder.eval()(volumes).double().numpy()
        scale = features[:80].std(0)
        probe = LogisticRegression(C=0.1, max_iter=1000).fit(features[:80] / scale, labels[:80])
        scores = probe.predict_proba(features[80:] / scale)[:, 1]
        found[precision] = roc_auc_score(labels[80:], scores), log_loss(labels[80:], scores)
    assert 0.7 < found["fp32"][0] < 0.99
    assert found["bf16"][0] == pytest.approx(found["fp32"][0], abs=0.02)
    assert found["bf16"][1] == pytest.approx(found["fp32"][1], abs=0.02)


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["unetr", "unet"])
def test_gradients_of_a_decoders_convolutions_in_bf16_are_those_in_fp32(name, grid):
    """Layer by layer, each with the map and the gradient that it gets, small and odd ones: oneDNN's own bf16 gradient
    of a convolution of some of them is what lies in memory."""
    torch.manual_seed(0)
    if name == "unet":
        encoder = ResNet(BasicBlock, (1, 1, 1, 1), img_size=(32, 32, 16), width=16)
        model, size = Segmenter(encoder, UnetDecoder(encoder, 2)), [16 * g + 16 for g in grid]
    else:
        model = segmenter(name, grid=(2, 2, 2), feature_size=16)
        size = [g * p for g, p in zip(grid, model.encoder.patch_size)]
    layers = [one for one in model.decoder.modules() if isinstance(one, torch.nn.Conv3d | torch.nn.ConvTranspose3d)]
    met = []

    def note(layer, maps, y):
        y.register_hook(lambda gradient: met.append((layer, maps[0], gradient)))

    for one in layers:
        one.register_forward_hook(note)
    model.train()(torch.rand(2, 1, *size)).square().mean().backward()
    assert len(met) == len(layers) > 10
    for layer, x, g in met:
        layer._forward_hooks.clear()
        found = []
        for bf16 in (False, True, True):
            for n in range(10_000, 400_000, 50_000):  # what such a gradient then holds
                torch.full((n,), 3e38)
            x, g = (one.detach().bfloat16().float() for one in (x, g))  # what bf16 can hold: nothing else differs
            layer.zero_grad()
            x.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = layer(x)
            y.float().backward(g)
            found.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
        for other in found[1:]:
            for exact, rounded in zip(found[0], other):
                assert (rounded - exact).norm() <= 0.02 * exact.norm() + 1e-12, (layer, x.shape)
