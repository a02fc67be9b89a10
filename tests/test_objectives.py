"""Objectives besides DINO's own: each against its formula in float64, on one rank and on two, and what a run saves."""

import pytest
import torch
from conftest import ROOT
from test_main_dino import checkpoint, command, run_main, same, smaller_model  # noqa: F401
from test_steps import VALUES, make_run, state_of

import main_dino
import utils
from dino3d.files import read_log
from dino3d.training.objectives import sinkhorn_offsets

SMALL = ROOT / "tests" / "run_small.py"
FLOAT64 = {"FLOAT64": "1"}


def written_out_sinkhorn(logits, temp, iterations=3):
    """Assignment (B, K) of logits (B, K), step by step as DINOv2 has it, on a matrix of prototypes by samples."""
    q = (logits.double() / temp).exp().T
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= samples
    return (q * samples).T


# ---------------------------------------------------------------------------------------------------- Sinkhorn-Knopp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temp", [0.02, 0.07])
def test_sinkhorn_is_the_papers_formula(temp, dtype):
    torch.manual_seed(0)
    batch, views, out_dim = 6, 4, 16
    teacher = torch.nn.functional.normalize(torch.randn(2 * batch, out_dim)).to(dtype)  # cosines
    student = torch.randn(views * batch, out_dim).to(dtype)
    loss = main_dino.DINOLoss(out_dim, 0.9, "sinkhorn")
    loss.center.normal_()  # not looked at
    losses, probabilities = loss(student, teacher, temp)
    q = written_out_sinkhorn(teacher, temp).view(2, batch, out_dim)
    p = (student.double() / 0.1).softmax(-1).view(views, batch, out_dim)
    terms = [-(q[t] * p[v].log()).sum(-1).mean() for t in range(2) for v in range(views) if v != t]
    entropy = -(q * q.log()).sum(-1).mean()
    expected = {"loss": sum(terms) / len(terms), "kl": sum(terms) / len(terms) - entropy, "teacher_entropy": entropy}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=2e-5, atol=2e-5)
    winners = probabilities.argmax(-1)
    assert (winners == q.reshape(-1, out_dim).argmax(-1)).all()
    assert len(winners.unique()) > 1


def test_sinkhorn_where_exponents_leave_single_precision():
    """A prototype that no sample is near, and a temperature at which DINOv2's own form gives 0 / 0 in float32."""
    torch.manual_seed(0)
    logits = torch.nn.functional.normalize(torch.randn(8, 12))
    logits[:, 3] = -1
    exponents = (logits / 0.008).exp()
    assert exponents.isinf().any() and not exponents[:, 3].any()
    scores = logits / 0.008
    ours = (scores + sinkhorn_offsets(scores, utils.Processes())).softmax(-1)
    torch.testing.assert_close(ours.double(), written_out_sinkhorn(logits, 0.008), rtol=1e-4, atol=1e-6)


def test_sinkhorn_shares_the_batch_out():
    """Outputs that all prefer one prototype: with many iterations each prototype gets its share."""
    torch.manual_seed(0)
    logits = 0.1 * torch.randn(64, 8, dtype=torch.float64)
    logits[:, 2] += 1
    plain = (logits / 0.04).softmax(-1)
    scores = logits / 0.04
    shares = (scores + sinkhorn_offsets(scores, utils.Processes(), iterations=500)).softmax(-1).mean(0)
    assert plain.mean(0)[2] > 0.99
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 8), rtol=1e-6, atol=0)


def test_a_sample_is_diagnosed_by_itself(monkeypatch):
    """What is told of one sample of a batch does not hang on the others, nor on another rank's."""
    run = make_run()
    run.dino_loss = main_dino.DINOLoss(16, 0.9, "sinkhorn")
    run.processes = utils.Processes(rank=0, world_size=2)  # a collective would fail: there is no group
    views = [torch.rand(8, 1, 24, 24, 12)]
    views[0][1, 0, 2, 2, 2] = torch.nan
    monkeypatch.setattr(run, "render", lambda _: views, raising=False)
    batch = main_dino.Batch(torch.zeros(4, 30, 30, 15), [], [], "", tuple("abcd"))
    told = main_dino.diagnose_batch(run, [batch], 0.04)
    assert [sample["loss"] is None for sample in told] == [False, True, False, False]


@pytest.fixture(scope="module")
def flags(volumes):
    return [
        *("--data_dir", volumes, "--epochs", 3, "--lr", 0.05, "--log_every", 1, "--centering", "sinkhorn"),
        *("--warmup_teacher_temp", 0.02, "--teacher_temp", 0.03, "--warmup_teacher_temp_epochs", 2),
    ]


def test_two_ranks_share_one_batch_out(flags, tmp_path):
    """Two gloo ranks with b and one process with 2 b: weights to 1e-9 in float64, the same figures in log.txt."""
    for processes, batch in ((2, 2), (0, 4)):
        sizes = ["--batch_size_per_gpu", batch, "--drop_path_rate", 0, "--output_dir", tmp_path / str(processes)]
        done = command(*flags, *sizes, processes=processes, script=SMALL, environment=FLOAT64)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint(tmp_path / name) for name in ("0", "2"))
    for part in ("student", "teacher", "dino_loss"):
        close, worst = same(one[part], two[part], 1e-9)
        assert close, f"{part}: {worst}"
    assert not same(one["student"], one["teacher"], 1e-4)[0]
    for mine, theirs in zip(*(read_log(tmp_path / name / "log.txt") for name in ("0", "2"))):
        for metric in ("loss", "kl", "teacher_entropy", "mutual_information", "effective_rank"):
            assert mine[metric] == pytest.approx(theirs[metric], abs=1e-9 if metric != "effective_rank" else 1e-6)
        assert mine["winning_prototypes"] == theirs["winning_prototypes"]


def test_a_run_with_sinkhorn_resumes(flags, tmp_path, capsys):
    """In the middle of an epoch, to the last bit; one begun with the centre takes to it, and goes back."""
    more = ["--batch_size_per_gpu", 2, "--accumulate_steps", 2, "--drop_path_rate", 0.3]
    assert run_main(capsys, *flags, *more, "--output_dir", tmp_path / "straight")[0] == 0
    for stop in (["--max_steps", 3], []):
        assert run_main(capsys, *flags, *more, *stop, "--output_dir", tmp_path / "broken")[0] == 0
    one, two = (checkpoint(tmp_path / name) for name in ("straight", "broken"))
    for part in ("student", "teacher", "dino_loss"):
        assert same(one[part], two[part])[0]
    for stop, centering in ((2, "mean"), (4, "sinkhorn"), (6, "mean")):
        switch = ["--centering", centering, "--max_steps", stop, "--output_dir", tmp_path / "switched"]
        code, out, errors = run_main(capsys, *flags, *more, *switch)
        assert code == 0 and not errors, errors
    assert checkpoint(tmp_path / "switched")["step"] == 6
    assert not same(checkpoint(tmp_path / "switched")["student"], one["student"])[0]


def test_a_step_of_nan_with_sinkhorn_changes_nothing():
    run, views = make_run(), [torch.rand(8, 1, 24, 24, 12)]
    run.dino_loss = main_dino.DINOLoss(16, 0.9, "sinkhorn")
    assert main_dino.train_step(run, [views], VALUES, False).finite
    before, broken = state_of(run), [views[0].clone()]
    broken[0][3, 0, 1, 1, 1] = torch.nan
    assert not main_dino.train_step(run, [broken], VALUES, False).finite and same(before, state_of(run))[0]
    assert main_dino.train_step(run, [views], VALUES, False).finite and not same(before, state_of(run))[0]


def test_a_centre_that_is_not_used_is_told(flags, tmp_path, capsys):
    for momentum, told in ((0.99, True), (0.9, False)):
        more = ["--center_momentum", momentum, "--max_steps", 1, "--batch_size_per_gpu", 4]
        code, out, _ = run_main(capsys, *flags, *more, "--output_dir", tmp_path / str(momentum))
        assert code == 0 and ("--center_momentum has no effect" in out) == told
