"""Batch norms over all processes of a run: two gloo ranks equal one with the whole batch."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_main_dino import checkpoint, command, run_main, same, smaller_model  # noqa: F401

import main_dino
from dino3d.files import read_log

SMALL, FLOAT64 = ROOT / "tests" / "run_small.py", {"FLOAT64": "1"}
SIZES = (2, 4)  # of the two ranks' batches
RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from dino3d.training.batch_norm import sync_batch_norms
dist.init_process_group("gloo")
for number, whole in enumerate(torch.load({data!r})):
    network = torch.nn.Sequential(torch.nn.BatchNorm3d(3)).to(whole["x"].dtype)
    network = sync_batch_norms(network, torch.device("cpu"))
    network.load_state_dict(whole["state"])
    part = slice(2 * dist.get_rank(), 2 + 4 * dist.get_rank())
    x = whole["x"][part].clone().requires_grad_()
    y = network(x)
    (y.tanh() * whole["weights"][part]).sum().backward()
    gradients = [x.grad, network[0].weight.grad, network[0].bias.grad]
    evaluated = network.eval()(x.detach())
    found = {{"y": y.detach(), "gradients": gradients, "state": network.state_dict(), "evaluated": evaluated}}
    torch.save(found, {data!r} + f"{{number}}.{{dist.get_rank()}}")
dist.barrier()  # without it the first to end takes its threads from the other, which aborts on a busy machine
dist.destroy_process_group()
"""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def test_equals_torch_on_the_whole_batch(tmp_path):
    """Outputs, gradients and running statistics of batches of different sizes, whose mean is far from 0."""
    generator, cases = torch.Generator().manual_seed(0), []
    for dtype in TOLERANCES:
        x = (7 + 2 * torch.randn(sum(SIZES), 3, 4, 2, 5, generator=generator)).to(dtype)
        weights = torch.randn(x.shape, generator=generator).to(dtype)
        network = torch.nn.Sequential(torch.nn.BatchNorm3d(3)).to(dtype)
        torch.nn.init.normal_(network[0].weight, 1, 0.3, generator)
        cases.append({"x": x, "weights": weights, "state": network.state_dict()})
    torch.save(cases, tmp_path / "data")
    (tmp_path / "ranks.py").write_text(RANKS.format(root=str(ROOT), data=str(tmp_path / "data")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, tmp_path / "ranks.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for number, case in enumerate(cases):
        ranks = [torch.load(tmp_path / f"data{number}.{rank}") for rank in range(2)]
        x, tolerance = case["x"].double().requires_grad_(), TOLERANCES[case["x"].dtype]
        network = torch.nn.Sequential(torch.nn.BatchNorm3d(3)).double()
        network.load_state_dict(case["state"])
        y = network(x)
        (y.tanh() * case["weights"].double()).sum().backward()

        def close(ours, wanted, tolerance=tolerance):
            return (ours.double() - wanted).abs().max() <= tolerance * wanted.abs().max()

        assert close(torch.cat([rank["y"] for rank in ranks]), y.detach())
        assert close(torch.cat([rank["gradients"][0] for rank in ranks]), x.grad)
        for i, parameter in enumerate(network.parameters(), 1):  # of each rank its own part, for DDP to average
            assert close(ranks[0]["gradients"][i].double() + ranks[1]["gradients"][i].double(), parameter.grad)
        for rank in ranks:
            assert all(close(rank["state"][name], tensor) for name, tensor in network.state_dict().items())
        assert close(torch.cat([rank["evaluated"] for rank in ranks]), network.eval()(x.detach()))


@pytest.fixture(scope="module")
def flags(volumes):
    head = ("--use_bn_in_head", "true", "--grad_checkpointing")
    return ["--arch", "resnet18", "--data_dir", volumes, "--epochs", 3, "--lr", 0.05, "--log_every", 1, *head]


def test_two_ranks_train_as_one(flags, tmp_path):
    """A ResNet and a head with batch norms, two gloo ranks with b and one process with 2 b: weights and running
    statistics to 1e-9 in float64, the same figures in log.txt."""
    for processes, batch in ((2, 2), (0, 4)):
        sizes = ["--batch_size_per_gpu", batch, "--output_dir", tmp_path / str(processes)]
        done = command(*flags, *sizes, processes=processes, script=SMALL, environment=FLOAT64)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint(tmp_path / name) for name in ("0", "2"))
    for part in ("student", "teacher", "dino_loss"):
        close, worst = same(one[part], two[part], 1e-9)
        assert close, f"{part}: {worst}"
    assert not same(one["student"], one["teacher"], 1e-4)[0]
    for mine, theirs in zip(*(read_log(tmp_path / name / "log.txt") for name in ("0", "2"))):
        assert all(mine[metric] == pytest.approx(theirs[metric], abs=1e-9) for metric in ("loss", "kl"))
    assert one["config"]["patch_size"] is None and one["config"]["drop_path_rate"] is None


def test_a_run_resumes_to_the_last_bit(flags, tmp_path, capsys):
    """In the middle of an epoch, with the statistics; that accumulated batches are normalised by themselves is told."""
    more = ["--batch_size_per_gpu", 2, "--accumulate_steps", 2]
    code, out, _ = run_main(capsys, *flags, *more, "--output_dir", tmp_path / "straight")
    assert code == 0 and "--accumulate_steps 2 does not widen what batch normalisation sees" in out
    for stop in (["--max_steps", 3], []):
        assert run_main(capsys, *flags, *more, *stop, "--output_dir", tmp_path / "broken")[0] == 0
    one, two = (checkpoint(tmp_path / name) for name in ("straight", "broken"))
    for part in ("student", "teacher", "dino_loss"):
        assert same(one[part], two[part])[0]


def test_a_single_value_is_refused(volumes, tmp_path, capsys):
    """One sample's only local view, whose last map is one position; with none or two of them a run begins."""
    flags = ["--arch", "resnet18", "--data_dir", volumes, "--batch_size_per_gpu", 1, "--max_steps", 1]
    for number in (1, 0, 2):
        more = ["--local_crops_number", number, "--output_dir", tmp_path / str(number)]
        code, _, errors = run_main(capsys, *flags, *more)
        if number == 1:
            assert code == 1 and len(errors) == 1 and "batch normalisation needs several" in errors[0]
        else:
            assert code == 0


def test_the_teachers_statistics_are_those_of_its_global_views(flags, tmp_path, capsys, monkeypatch):
    """In training it normalises by its batch; what evaluation uses are running means of the same, of global views."""
    means = []

    def noting(state, *args, train_step=main_dino.train_step):
        hook = state.teacher.backbone.conv1.register_forward_hook(
            lambda *call: means.append(call[-1].mean((0, 2, 3, 4)))
        )
        step = train_step(state, *args)
        hook.remove()
        assert state.teacher.training
        return step

    monkeypatch.setattr(main_dino, "train_step", noting)
    assert run_main(capsys, *flags, "--batch_size_per_gpu", 4, "--output_dir", tmp_path)[0] == 0
    expected = torch.zeros_like(means[0])
    for mean in means:
        expected = 0.9 * expected + 0.1 * mean
    teacher = checkpoint(tmp_path)["teacher"]
    torch.testing.assert_close(teacher["backbone.bn1.running_mean"], expected)
    assert teacher["backbone.bn1.num_batches_tracked"] == len(means)
