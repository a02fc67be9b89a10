"""Bootstrap intervals and p-values against SciPy, and Holm's adjustment against its definition."""

import numpy as np
import pytest
from scipy import stats

from dino3d.evaluation.statistics import Bootstrap, bootstrap_interval, bootstrap_weights, holm
from dino3d.evaluation.weighted_metrics import weighted_auc


def bootstrap_of(metric, patients, rounds=4000):
    return Bootstrap(
        *(values if i else values[0] for i, values in enumerate(map(metric, bootstrap_weights(patients, rounds, 0))))
    )


def test_against_scipys_bca():
    values = np.random.default_rng(0).exponential(size=40)
    found = bootstrap_of(lambda w: w @ values / w.sum(-1), range(40)).interval()
    expected = stats.bootstrap((values,), np.mean, n_resamples=20000, method="BCa", rng=1).confidence_interval
    assert found == pytest.approx(expected, abs=0.02)
    plain = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert expected.high > plain.high + 0.02  # so that the other one would be told


def test_cases_of_one_patient_are_drawn_together():
    rng = np.random.default_rng(0)
    labels, scores = np.arange(60) % 2, rng.normal(size=60)
    one, drawn, left_out = bootstrap_weights(np.repeat(np.arange(60), 3), 50, 0)
    assert (one == 1).all() and drawn.shape == (50, 180) and left_out.shape == (60, 180)
    assert (drawn[:, 0::3] == drawn[:, 1::3]).all() and (drawn.sum(1) == 180).all() and (left_out.sum(1) == 177).all()
    p = np.stack([-scores, scores], 1)
    single = bootstrap_of(lambda w: weighted_auc(labels, p, w), range(60)).interval()
    triple = bootstrap_of(
        lambda w: weighted_auc(labels.repeat(3), p.repeat(3, 0), w), np.repeat(np.arange(60), 3)
    ).interval()
    assert triple == pytest.approx(single)


@pytest.mark.parametrize("seed", range(12))
def test_p_value_and_interval_agree(seed):
    values = np.random.default_rng(seed).exponential(size=30) - 0.7
    found = bootstrap_of(lambda w: w @ values / w.sum(-1), range(30))
    for level in (0.8, 0.9, 0.95, 0.99):
        low, high = found.interval(level)
        assert (found.p_value() < 1 - level) == (low > 0 or high < 0)
    assert found.p_value() == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.12)


def test_differences_of_the_same_are_zero():
    found = Bootstrap(0.0, np.zeros(100), np.zeros(20))
    assert found.interval() == [0, 0] and found.p_value() == 1
    always = Bootstrap(1.0, np.ones(100), np.ones(20))
    assert always.interval() == [1, 1] and always.p_value() == pytest.approx(0.01)
    assert Bootstrap(np.nan, np.zeros(9), np.zeros(5)).interval() is None
    assert Bootstrap(0.5, np.full(9, np.nan), np.zeros(5)).p_value() is None


def test_draws_in_which_a_metric_is_undefined_are_left_out():
    labels = np.array([1, 0, 0, 0, 0, 0])
    p = np.stack([np.zeros(6), np.array([0.5, 0.2, 0.6, 0.1, 0.3, 0.4])], 1)

    def metric(weights):
        value = weighted_auc(labels, p, weights)
        return None if np.isnan(value) else float(value)

    low, high = bootstrap_interval(metric, range(6))
    assert 0 <= low < 0.8 <= high <= 1


def test_holm():
    found = holm([0.01, 0.04, None, 0.03, 0.005])
    assert found == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06), pytest.approx(0.02)]
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []
