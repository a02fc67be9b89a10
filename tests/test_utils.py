"""Weights, schedules and the small things that the scripts share."""

import argparse
import math
import zipfile

import numpy as np
import pytest
import torch

import utils
from dino3d import command_line
from dino3d.training import loading
from dino3d.training.checkpoint import keep_copy, load_checkpoint, save_checkpoint
from dino3d.training.loading import reading_processes
from vision_transformer import DINOHead, MultiCropWrapper, vit_small, vit_tiny

# ------------------------------------------------------------------------------------------------ older checkpoints


@pytest.fixture(scope="module")
def older_checkpoint(tmp_path_factory):
    """A file as earlier implementations wrote it: wrapper prefixes, weight_g and weight_v, Namespace, NumPy scalars."""
    torch.manual_seed(0)
    state = {}
    for name, tensor in MultiCropWrapper(vit_small(), DINOHead(384, 512)).state_dict().items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        state[name.replace("parametrizations.weight.original1", "weight_v")] = torch.randn_like(tensor)
    path = tmp_path_factory.mktemp("older") / "checkpoint.pth"
    torch.save(
        {
            "student": {f"module.{name}": tensor for name, tensor in state.items()},
            "teacher": {name: tensor + 1 for name, tensor in state.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.0005), "weight_decay": np.float32(0.04)}]},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", lr=np.float64(0.1), sizes=np.arange(3)),
            "dino_loss": {"center": torch.zeros(1, 512)},
        },
        path,
    )
    return path, state


@pytest.mark.parametrize("key, shift", [("student", 0), ("teacher", 1)])
def test_older_checkpoint_loads_with_every_tensor_in_place(older_checkpoint, key, shift):
    path, state = older_checkpoint
    backbone = vit_small()
    assert utils.load_pretrained_weights(backbone, path, key) is None  # a notebook would print the whole file
    loaded = backbone.state_dict()
    assert len(loaded) == sum(name.startswith("backbone.") for name in state) == 150  # 12 x 12 and 6 more
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state["backbone." + name] + shift), name
    whole = MultiCropWrapper(vit_small(), DINOHead(384, 512))
    utils.load_pretrained_weights(whole, path, key)
    for name, tensor in whole.head.state_dict().items():
        older = name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        )
        assert torch.equal(tensor, state["head." + older] + shift), name


def test_numpy_scalars_under_their_older_name_load(older_checkpoint, tmp_path):
    """NumPy 1 wrote numpy.core.multiarray.scalar where NumPy 2 writes numpy._core.multiarray.scalar."""
    renamed = 0
    with zipfile.ZipFile(older_checkpoint[0]) as source, zipfile.ZipFile(tmp_path / "numpy1.pth", "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                renamed = content.count(b"numpy._core.multiarray")
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(entry.filename, content)
    assert renamed > 0
    assert utils.load_file(tmp_path / "numpy1.pth")["args"].lr == 0.1


def test_another_architecture_is_refused_by_tensor(older_checkpoint):
    model = vit_tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cls_token \(1, 1, 384\) instead of \(1, 1, 192\).* more"):
        utils.load_pretrained_weights(model, older_checkpoint[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_missing_tensors_are_named(tmp_path):
    state = vit_tiny().state_dict()
    del state["blocks.3.attn.qkv.weight"]
    torch.save({"teacher": {"encoder.module." + name: tensor for name, tensor in state.items()}}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="without blocks.3.attn.qkv.weight"):
        utils.load_pretrained_weights(vit_tiny(), tmp_path / "part.pth")


def test_plain_state_dicts_and_compiled_names_load(tmp_path):
    model = vit_tiny()
    torch.save({"_orig_mod." + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "plain.pth")
    other = vit_tiny()
    utils.load_pretrained_weights(other, tmp_path / "plain.pth")
    assert torch.equal(other.pos_embed, model.pos_embed)


def test_wrong_key_missing_and_broken_files(tmp_path, older_checkpoint):
    path = older_checkpoint[0]
    with pytest.raises(ValueError, match="has no 'best', only teacher.backbone, student.backbone"):
        utils.load_pretrained_weights(vit_small(), path, "best")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        utils.load_pretrained_weights(vit_small(), tmp_path / "nowhere.pth")
    for content in (b"", b"not a checkpoint", path.read_bytes()[:100000]):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(ValueError, match="broken.pth: can't be read as a checkpoint"):
            utils.load_pretrained_weights(vit_small(), tmp_path / "broken.pth")


def test_nothing_in_a_file_is_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    torch.save({"teacher": Malicious()}, tmp_path / "malicious.pth")
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        utils.load_pretrained_weights(vit_tiny(), tmp_path / "malicious.pth")
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------------- checkpoints and logs


def test_checkpoint_round_trip_and_copies(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"config": {"arch": "a", "size": [1, 2]}, "step": 1})
    keep_copy(path, tmp_path / "kept.pth")
    save_checkpoint(path, {"config": {"arch": "a"}, "step": 2})
    assert load_checkpoint(path)["step"] == 2 and load_checkpoint(tmp_path / "kept.pth")["step"] == 1
    assert load_checkpoint(tmp_path / "none.pth") is None
    with pytest.raises(command_line.UserError, match="--arch a, not b"):
        load_checkpoint(path, {"arch": "b"})
    torch.save({"teacher": {}}, path)
    with pytest.raises(command_line.UserError, match="no checkpoint of this script"):
        load_checkpoint(path)


# ---------------------------------------------------------------------------------------------------- optimisation


def test_cosine_schedule_is_its_closed_form():
    for at in range(0, 1001, 50):
        expected = 0.01 * at / 100 if at < 100 else 0.001 + 0.009 * (1 + math.cos(math.pi * (at - 100) / 900)) / 2
        assert utils.cosine_schedule(at, 0.01, 0.001, 1000, 100) == pytest.approx(expected)


@pytest.mark.parametrize("total, warmup", [(10, 0), (10, 10), (10, 1000), (1, 5), (0, 0)])
def test_cosine_schedule_is_defined_everywhere(total, warmup):
    values = [utils.cosine_schedule(at, 1.0, 0.1, total, warmup) for at in range(2 * max(total, warmup) + 2)]
    assert all(0 <= value <= 1 for value in values) and values[-1] == pytest.approx(0.1)
    assert all(b - a == pytest.approx(1 / warmup) for a, b in zip(values[:warmup], values[1:warmup]))


def test_linear_schedule():
    assert [utils.linear_schedule(at, 0.04, 0.07, 3) for at in range(5)] == pytest.approx(
        [0.04, 0.05, 0.06, 0.07, 0.07]
    )
    assert utils.linear_schedule(0, 0.04, 0.07, 0) == 0.07


def test_lars_takes_the_papers_step():
    weight, bias = torch.nn.Parameter(torch.randn(3, 4).double()), torch.nn.Parameter(torch.randn(3).double())
    start = weight.detach().clone(), bias.detach().clone()
    optimizer = utils.LARS([{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}], lr=0.5)
    momentum = [torch.zeros_like(p) for p in start]
    for _ in range(3):
        weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        step = weight.grad + 0.1 * start[0]
        momentum[0] = 0.9 * momentum[0] + 0.001 * start[0].norm() / step.norm() * step
        momentum[1] = 0.9 * momentum[1] + bias.grad
        start = start[0] - 0.5 * momentum[0], start[1] - 0.5 * momentum[1]
        optimizer.step()
    torch.testing.assert_close(weight.detach(), start[0])
    torch.testing.assert_close(bias.detach(), start[1])


# --------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "text, value", [("true", True), ("ON", True), ("1", True), ("false", False), ("0", False), ("off", False)]
)
def test_booleans(text, value):
    assert command_line.boolean(text) is value


@pytest.mark.parametrize(
    "kind, low, text",
    [(int, 1, "0"), (int, 1, "1.5"), (float, 0, "inf"), (float, 0, "nan"), (float, 0, "-1"), (float, 0, "x")],
)
def test_numbers_out_of_range(kind, low, text):
    with pytest.raises(argparse.ArgumentTypeError):
        command_line.number(kind, low)(text)


def test_seeds_of_steps_differ_by_rank_and_step():
    draws = set()
    for key in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)):
        utils.seed_step(*key)
        draws.add(torch.rand(1).item())
    utils.seed_step(0, 1, 0)
    assert len(draws) == 4 and torch.rand(1).item() in draws


def test_gpu_of_a_process():
    assert utils.choose_gpu(3, 4, 4, False) == 3
    assert utils.choose_gpu(3, 4, 1, True) == 0  # srun --gpus-per-task=1
    assert utils.choose_gpu(3, 4, 8, True) == 3
    with pytest.raises(command_line.UserError, match="1 GPU.s. for 4 processes"):
        utils.choose_gpu(3, 4, 1, False)


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(28, "No space left on device", "log.txt"), "No space left on device: 'log.txt'"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --batch_size_per_gpu"),
        (command_line.UserError("plain"), "error: plain"),
    ],
)
def test_failures_end_in_one_line(capsys, error, says):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_script(main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and says in lines[0]


# ------------------------------------------------------------------------------------------------------ shared memory


@pytest.mark.parametrize(
    "wanted, free_batches, expected, says",
    [
        (None, 100, (4, 2), None),
        (None, 10, (4, 2), None),
        (None, 6, (4, 1), None),
        (
            None,
            3.9,
            (3, 1),
            "room for 3 batches of 10 MiB per process, fewer than the 8 of 4 reading processes: 3 instead",
        ),
        (None, 0.5, (0, None), "0 instead"),
        (6, 100, (6, 2), None),
        (6, 4, (6, 1), "lower --num_workers"),
        (0, 0, (0, None), None),
    ],
)
def test_reading_processes_fit_into_shared_memory(monkeypatch, wanted, free_batches, expected, says):
    """Of four cores, and two processes that share it."""
    processes = utils.Processes(local_world_size=2)
    monkeypatch.setattr(loading, "cores_per_process", lambda _: 4)
    monkeypatch.setattr(loading.os.path, "isdir", lambda path: path == "/dev/shm")
    usage = type("Usage", (), {"free": 2 * free_batches * 10 * 2**20 / 0.8 + 1})
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: usage)
    workers, ready, notices = reading_processes(wanted, processes, 10 * 2**20)
    assert (workers, ready) == expected
    assert len(notices) == bool(says) and (not says or says in notices[0])
    loader = torch.utils.data.DataLoader([1], num_workers=workers, prefetch_factor=ready)  # takes both
    assert loader.num_workers == workers
