"""What is measured of the teacher's outputs, against formulas written out, and when a collapse is told."""

import math

import numpy as np
import pytest
import torch

import main_dino
import utils
from dino3d.files import append_json, read_log
from dino3d.training.collapse import (
    CollapseWatch,
    TeacherFigures,
    TeacherOutputs,
    TeacherStatistics,
    collapse_warning,
    effective_rank,
)
from dino3d.training.monitor import Monitor, summary


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (300, 8)])
def test_effective_rank_is_that_of_singular_values(shape):
    generator = np.random.default_rng(0)
    features = generator.normal(size=shape) * 0.5 ** np.arange(shape[1]) + 30
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 1e-300]
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(torch.from_numpy(features)).item() == pytest.approx(expected, rel=1e-6)
    assert effective_rank(torch.from_numpy(features).float()).item() == pytest.approx(expected, rel=1e-3)


def test_effective_rank_of_few_directions():
    assert effective_rank(torch.eye(8)[:, :4].repeat(4, 1) * 3).item() == pytest.approx(4, rel=0.2)
    assert effective_rank(torch.randn(64, 1) @ torch.randn(1, 16)).item() == pytest.approx(1, rel=1e-3)
    assert effective_rank(torch.ones(64, 16)).item() == pytest.approx(1)


def test_figures_of_an_entry_are_over_its_steps_but_skipped_ones():
    torch.manual_seed(0)
    statistics = TeacherStatistics(6, utils.Processes())
    probabilities, features = torch.randn(3, 8, 6).mul(3).softmax(-1), torch.randn(3, 8, 5)
    for step in range(3):
        outputs = TeacherOutputs(probabilities[step].argmax(-1), probabilities[step].mean(0), features[step])
        statistics.add(outputs, torch.tensor(True))
        broken = TeacherOutputs(torch.zeros(8, dtype=torch.int64), torch.full((6,), torch.nan), features[0] * torch.nan)
        statistics.add(broken, torch.tensor(False))
    figures = statistics.gather()
    whole = probabilities.view(-1, 6).double()
    mean = whole.mean(0)
    assert figures.views == 24 and figures.wins.tolist() == whole.argmax(-1).bincount(minlength=6).tolist()
    assert figures.marginal_entropy == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-6)
    assert figures.effective_rank == pytest.approx(effective_rank(features.view(-1, 5)).item(), rel=1e-6)
    entropy = -(whole * whole.log()).sum(-1).mean().item()
    # The mutual information of a view and the prototype that is drawn for it: mean divergence from the marginal
    expected = (whole * (whole / mean).log()).sum(-1).mean().item()
    assert figures.marginal_entropy - entropy == pytest.approx(expected, rel=1e-6)
    statistics.reset()
    statistics.add(broken, torch.tensor(False))
    figures = statistics.gather()
    assert figures.views == 0 and not figures.wins.any() and np.isnan(figures.effective_rank)


def test_the_rank_rests_on_the_last_embeddings_of_an_entry():
    statistics = TeacherStatistics(2, utils.Processes())
    steps = [torch.randn(100, 4) * scale for scale in (1e6, 1, 1, 1)]
    for features in steps:
        statistics.add(
            TeacherOutputs(torch.zeros(100, dtype=torch.int64), torch.ones(2) / 2, features), torch.tensor(True)
        )
    expected = effective_rank(torch.cat(steps)[-256:])
    assert statistics.gather().effective_rank == pytest.approx(expected.item())


# ------------------------------------------------------------------------------------------------------------- warnings


# (entropy over ln(out_dim), KL divergence, winning prototypes, effective rank) of each 10th step of measured runs, see
# docs/LOG.md
RUNS = {
    "centre of momentum 0.9": [
        *[(0.76, 0.72, 26, 20.7), (0.75, 0.56, 25, 20.8), (0.65, 0.58, 10, 17.5), (0.57, 0.61, 4, 14.5)],
        *[
            (0.58, 0.52, 4, 12.4),
            (0.59, 0.5, 3, 10.2),
            (0.62, 0.39, 3, 8.8),
            (0.69, 0.37, 2, 7.9),
            (0.74, 0.34, 3, 7.1),
        ],
        *[(0.78, 0.31, 3, 6.4), (0.80, 0.30, 3, 6.1), (0.83, 0.31, 3, 6.2), (0.83, 0.32, 5, 5.4)],
        *[(0.84, 0.31, 6, 5.4)],
    ],
    "centre of momentum 0.999": [
        *[(0.68, 0.89, 21, 20.7), (0.53, 0.94, 14, 21.0), (0.26, 1.06, 8, 17.8), (0.07, 0.87, 3, 14.8)],
        *[(0.02, 0.63, 2, 12.6), (0.01, 0.43, 2, 10.2), (0.01, 0.37, 2, 8.7), (0.01, 0.36, 2, 7.7), (0.02, 0.36, 2, 7)],
    ],
    "Sinkhorn-Knopp": [
        *[(0.81, 0.91, 178, 20.4), (0.81, 0.87, 175, 21.0), (0.8, 0.86, 176, 19.9), (0.78, 0.95, 184, 19.4)],
        *[(0.78, 0.9, 181, 16.4), (0.78, 0.89, 177, 14.7), (0.77, 0.87, 166, 13.3), (0.76, 0.9, 177, 12.4)] * 3,
    ],
    "Sinkhorn-Knopp at ten times the rate": [
        *[(0.81, 0.94, 179, 21.1), (0.79, 0.96, 181, 20.7), (0.81, 0.84, 157, 16.0), (0.82, 0.79, 137, 12.1)],
        *[(0.84, 0.74, 130, 9.9), (0.84, 0.68, 116, 8.0), (0.85, 0.61, 108, 6.7), (0.85, 0.59, 92, 6.0)],
    ],
    "the demo": [
        *[(0.87, 0.53, 43, 22.2), (0.91, 0.37, 41, 20.7), (0.93, 0.29, 44, 23.7), (0.95, 0.18, 31, 20.6)],
        *[(0.96, 0.16, 31, 17.3), (0.97, 0.11, 21, 14.1), (0.97, 0.10, 14, 12.4), (0.96, 0.11, 20, 9.7)],
        *[(0.97, 0.11, 18, 12.3), (0.96, 0.11, 16, 10.5), (0.97, 0.09, 17, 9.1), (0.96, 0.10, 20, 9.4)],
    ],
}


def told(run, out_dim=1024, watch=None, views=256):
    """[(entry, warning)] of a run."""
    watch, found = watch or CollapseWatch(out_dim), []
    for entry, (share, kl, winners, rank) in enumerate(run, 1):
        values = {"teacher_entropy": share * math.log(out_dim), "kl": kl}
        warning = watch.look(values, winners, TeacherFigures(torch.zeros(0), 720, 0.0, rank, views))
        found += [(entry, warning)] * bool(warning)
    return found


def test_runs_that_fell_are_told_once_and_early():
    ((entry, warning),) = told(RUNS["centre of momentum 0.9"])
    assert entry == 8 and "few dimensions (effective rank 7.9, 20.8 at first, 2 prototypes winning)" in warning
    assert "--centering sinkhorn" in warning and "--probe_dir" in warning
    ((entry, warning),) = told(RUNS["centre of momentum 0.999"])
    assert entry == 6 and "nearly the same to every view" in warning and "--center_momentum of 0.9" in warning


def test_runs_that_did_not_are_not():
    assert not told(RUNS["the demo"])
    assert not told(RUNS["Sinkhorn-Knopp"], 256, CollapseWatch(256, sinkhorn=True))


def test_with_sinkhorn_the_rank_tells_whatever_number_of_prototypes_wins():
    ((entry, warning),) = told(RUNS["Sinkhorn-Knopp at ten times the rate"], 256, CollapseWatch(256, sinkhorn=True))
    assert entry == 7 and "few dimensions (effective rank 6.7" in warning and "Lower --lr;" in warning


def test_a_resumed_run_is_compared_with_its_beginning():
    fallen = RUNS["centre of momentum 0.9"][-3:] * 2
    assert not told(fallen)  # nothing says that it was ever higher, as in a log of an older version
    assert not told(fallen, watch=CollapseWatch(1024, [{"epoch": 1, "kl": 0.3}, {"effective_rank": None}]))
    records = [{"effective_rank_first_steps": 20.8, "effective_rank": 14.0}, {"effective_rank": 6.0}]
    ((entry, warning),) = told(fallen, watch=CollapseWatch(1024, records))
    assert entry == 3 and "20.8 at first" in warning


def test_the_few_views_of_an_epochs_last_steps_are_not_judged():
    watch = CollapseWatch(1024)
    assert not told([(0.8, 0.3, 6, 18.0)], watch=watch)
    assert not told([(0.8, 0.3, 6, 7.0)] * 5, watch=watch, views=100)
    assert told([(0.8, 0.3, 6, 7.0)] * 5, watch=watch)


def test_warnings_follow_the_measured_limits():
    top = math.log(1024)
    assert collapse_warning(0.8 * top, 0.4, 12, 1024, 640) is None
    assert "uniform" in collapse_warning(0.98 * top, 0.02, 12, 1024, 640)
    assert collapse_warning(0.98 * top, 0.2, 12, 1024, 640) is None
    assert "collapsed" in collapse_warning(0.05 * top, 0.2, 12, 1024, 640)
    assert "collapsed" in collapse_warning(0.8 * top, 0.2, 2, 1024, 640)
    assert collapse_warning(0.8 * top, 0.2, 2, 1024, 4) is None  # four views can't fill many prototypes
    assert "few dimensions" in collapse_warning(0.8 * top, 0.2, 8, 1024, 640, 4.9, 10.0)
    assert "Lower --teacher_temp;" in collapse_warning(0.98 * top, 0.08, 7, 1024, 640, 4.9, 10.0)
    assert collapse_warning(0.8 * top, 0.2, 9, 1024, 640, 4.9, 10.0) is None
    assert collapse_warning(0.8 * top, 0.2, 8, 1024, 640, 5.1, 10.0) is None


def test_sinkhorn_tells_views_that_look_alike_from_others():
    """It weighs prototypes and not views: views of one answer have no mutual information with prototypes."""
    torch.manual_seed(0)
    loss, one = main_dino.DINOLoss(16, 0.9, "sinkhorn"), torch.nn.functional.normalize(torch.randn(64, 16))
    found = []
    for logits in (one, one[:1] + 1e-4 * torch.randn(64, 16)):
        log_teacher = loss.log_teacher(logits, 0.04, utils.Processes())
        mean = log_teacher.exp().mean(0)
        assert torch.special.entr(mean).sum().item() == pytest.approx(math.log(16), abs=0.05)  # after 3 iterations
        found.append((torch.special.entr(mean).sum() + (log_teacher.exp() * log_teacher).sum(-1).mean()).item())
    assert found[0] > 1 and abs(found[1]) < 1e-3


def test_logs_of_older_versions_are_read(tmp_path):
    """A run that an older version began, whose first epochs have neither figure, is resumed and summed up."""
    old = {"epoch": 1, "step": 4, "kl": 0.4, "kl_first_steps": 0.5, "teacher_entropy_share": 0.8}
    old |= {"winning_prototypes": 9, "seconds": 1.0, "skipped_steps": 0}
    append_json(tmp_path / "log.txt", old)
    assert "9 prototypes win" in summary(tmp_path) and "effective rank" not in summary(tmp_path)
    append_json(tmp_path / "log.txt", old | {"epoch": 2, "step": 8, "effective_rank": 3.5, "mutual_information": 0.25})
    assert "effective rank of the features 3.5 over the last epoch" in summary(tmp_path)
    assert "mutual information of view and prototype 0.25 nats" in summary(tmp_path)
    (tmp_path / "log.txt").unlink()
    new = {"effective_rank_first_steps": 9.0, "effective_rank": 3.5, "mutual_information": 0}
    append_json(tmp_path / "log.txt", old | new)
    assert "effective rank of the features 9.0 in the first steps, 3.5 over the last epoch" in summary(tmp_path)


def test_a_warning_reaches_the_console_and_a_resumed_run(tmp_path, capsys):
    """Through the monitor: of entries whose embeddings lie along one direction, after others that did not."""

    def run(epoch, entries, rank):
        sizes = {"total_steps": 9, "done_steps": 0, "global_batch": 64, "volumes": 1, "max_bad": 0}
        monitor = Monitor(tmp_path, utils.Processes(), 64, log_every=1, **sizes)
        monitor.start_epoch(epoch)
        for step in range(entries):
            features = torch.randn(128, rank) @ torch.randn(rank, 32)
            outputs = TeacherOutputs(torch.arange(128) % 5, torch.ones(64) / 64, features)
            metrics = {"kl": torch.tensor(0.3), "teacher_entropy": torch.tensor(3.0)}
            monitor.step(torch.tensor(True), metrics, outputs, 0.0)
            monitor.flush(step, {}, torch.tensor(0.0))
        monitor.log_epoch(epoch, epoch * entries, {})
        monitor.close()
        return capsys.readouterr().err

    torch.manual_seed(0)
    assert "warning" not in run(1, 4, 16)
    assert run(2, 5, 2).count("warning: the teacher's features have fallen into few dimensions") == 1
    first, second = read_log(tmp_path / "log.txt")
    assert 8 < first["effective_rank_first_steps"] < 16 and 1.5 < second["effective_rank"] < 2.1
    assert second["mutual_information"] == pytest.approx(math.log(64) - 3, abs=1e-5)
