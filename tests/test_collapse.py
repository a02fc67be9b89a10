"""What is measured of the teacher's outputs, against formulas written out, and when a collapse is told."""

import numpy as np
import pytest
import torch

import utils
from dino3d.training.collapse import TeacherOutputs, TeacherStatistics, effective_rank


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
