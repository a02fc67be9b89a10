"""Metrics of classified cases against scikit-learn and formulas written out, and where classes are missing."""

import numpy as np
import pytest
from sklearn import metrics
from sklearn.calibration import calibration_curve

from dino3d.evaluation.classification_metrics import (
    balanced_accuracy,
    brier_score,
    calibration_error,
    decide,
    f1_score_of,
    reliability_bins,
)


def drawn(classes, count=80, seed=0):
    """(labels, probabilities, weights): with ties, probabilities of 0 and 1 and on borders of bins among them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    scores = rng.normal(size=(count, classes)) + 1.5 * (labels[:, None] == np.arange(classes))
    p = np.exp(3 * scores)
    p = np.floor(p / p.sum(1, keepdims=True) * 100) / 100
    p[:, 0] += 1 - p.sum(1)
    if classes == 2:
        p[:4] = [[0, 1], [1, 0], [0.7, 0.3], [0.5, 0.5]]
    return labels, p, rng.integers(0, 3, count)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_scikit_learn(classes, weighted):
    labels, p, weights = drawn(classes)
    weights = weights if weighted else None
    predicted = decide(p, 0.4)
    how = {"sample_weight": weights}
    assert balanced_accuracy(labels, p, 0.4, weights) == pytest.approx(
        metrics.balanced_accuracy_score(labels, predicted, **how), abs=1e-12
    )
    average = "binary" if classes == 2 else "macro"
    assert f1_score_of(labels, p, 0.4, weights) == pytest.approx(
        metrics.f1_score(labels, predicted, average=average, **how), abs=1e-12
    )
    # scikit-learn's needs the classes of the columns where there are more than two
    expected = metrics.brier_score_loss(labels, p[:, 1] if classes == 2 else p, labels=list(range(classes)), **how)
    assert brier_score(labels, p, weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_reliability_curve_against_scikit_learn(classes):
    labels, p, weights = drawn(classes, seed=1)
    true, scores = (labels, p[:, 1]) if classes == 2 else (p.argmax(1) == labels, p.max(1))
    counts, predicted, observed = reliability_bins(labels, p, 7)
    expected_observed, expected_predicted = calibration_curve(true, scores, n_bins=7)
    assert np.allclose(observed, expected_observed) and np.allclose(predicted, expected_predicted)
    assert counts.sum() == len(labels) and (counts > 0).all()
    repeated = reliability_bins(labels.repeat(weights), p.repeat(weights, 0), 7)
    for one, other in zip(reliability_bins(labels, p, 7, weights), repeated):
        assert np.allclose(one, other)


@pytest.mark.parametrize("classes", [2, 3])
def test_calibration_error_written_out(classes):
    labels, p, _ = drawn(classes, seed=2)
    true, scores = (labels == 1, p[:, 1]) if classes == 2 else (p.argmax(1) == labels, p.max(1))
    error = 0.0
    for k in range(10):
        low, high = (-1 if k == 0 else np.linspace(0, 1, 11)[k]), np.linspace(0, 1, 11)[k + 1]
        held = [i for i in range(len(labels)) if low < scores[i] <= high]
        error += abs(sum(scores[i] - true[i] for i in held)) / len(labels)
    assert calibration_error(labels, p) == pytest.approx(error, abs=1e-12)


def test_calibration_error_of_known_cases():
    labels = np.array([0, 0, 0, 1])
    quarter = np.tile([0.75, 0.25], (4, 1))
    assert calibration_error(labels, quarter) == 0 and brier_score(labels, quarter) == pytest.approx(3 / 16)
    sure = np.tile([0.0, 1.0], (4, 1))
    assert calibration_error(labels, sure) == 0.75 == brier_score(labels, sure)
    assert calibration_error(labels, quarter, weights=np.array([1, 1, 1, 0])) == 0.25


def test_calibrated_probabilities_of_few_cases_have_an_error_above_zero():
    """As the docstring says: the mean over 200 sets of 50 cases, whose labels are drawn with the probabilities."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(200, 50))
    labels = (rng.uniform(size=scores.shape) < scores).astype(int)
    errors = [calibration_error(y, np.stack([1 - p, p], 1)) for y, p in zip(labels, scores)]
    assert 0.08 < np.mean(errors) < 0.2
    many = calibration_error(labels.ravel(), np.stack([1 - scores.ravel(), scores.ravel()], 1))
    assert many < 0.02


@pytest.mark.parametrize("classes", [2, 3])
def test_a_class_without_cases(classes):
    p = np.full((4, classes), 1 / classes)
    labels = np.zeros(4, int)
    assert balanced_accuracy(labels, p) is None and f1_score_of(labels, p) is None
    one_each = np.arange(classes)
    assert balanced_accuracy(one_each, p[:classes], weights=np.arange(classes)) is None
    assert brier_score(labels, p) == pytest.approx(0.25 if classes == 2 else 4 / 9 + 2 / 9)
    assert calibration_error(labels, p) == pytest.approx(0.5 if classes == 2 else 2 / 3)
