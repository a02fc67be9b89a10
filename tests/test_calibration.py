"""Calibration: the temperature against scipy's minimum of scikit-learn's log loss, the frequencies of classes against
Bayes' rule, and what must stay as it was."""

import numpy as np
import pytest
import scipy.optimize
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, confusion_matrix, f1_score, log_loss

from dino3d.evaluation.calibration import (
    FEWEST_OF_CLASS,
    HIGHEST,
    Calibration,
    fit_calibration,
    prior_offset,
    probability_intervals,
    probability_metrics,
)
from dino3d.evaluation.classification_metrics import area_under_roc, choose_threshold, decide


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def draw(classes, cases, scale, seed):
    """Labels and a model's probabilities whose logits are `scale` times those that the labels were drawn by."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (cases, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)  # drawn by softmax(logits)
    return labels, softmax(scale * logits)


@pytest.mark.parametrize("classes, offset", [(2, []), (2, [-1.2, 0.5]), (3, [])])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_has_the_least_log_loss(classes, offset, scale):
    labels, p = draw(classes, 120, scale, seed=classes)

    def loss(log_temperature):
        return log_loss(labels, softmax(np.log(p) / np.exp(log_temperature) + np.array(offset or 0.0)))

    found = fit_calibration(labels, p, offset)
    best = scipy.optimize.minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
    assert found.temperature == pytest.approx(np.exp(best.x), rel=1e-4) and not found.calibration_note
    calibrated = found.apply(p)
    assert log_loss(labels, calibrated) == pytest.approx(best.fun, abs=1e-9)
    np.testing.assert_allclose(calibrated, softmax(np.log(p) / found.temperature + np.array(offset or 0.0)), atol=1e-12)


def test_many_cases_give_the_temperature_that_they_were_drawn_with():
    labels, p = draw(2, 20000, 3.0, seed=0)
    assert fit_calibration(labels, p).temperature == pytest.approx(3, rel=0.05)


def test_where_none_can_be_fitted_it_stays_1_with_a_note():
    labels = np.repeat([0, 1], 10)
    told_apart = np.stack([1 - labels, labels], 1) * 0.4 + 0.3
    found = fit_calibration(labels, told_apart)
    assert found.temperature == 1 and "without an error" in found.calibration_note
    one_class = fit_calibration(labels * 0, told_apart)
    assert one_class.temperature == 1 and "0 validation cases of label1" in one_class.calibration_note
    few = np.array([0] * 10 + [1] * (FEWEST_OF_CLASS - 1))
    assert "4 validation cases of label1" in fit_calibration(few, draw(2, len(few), 1, 0)[1]).calibration_note
    same = fit_calibration(labels, np.full((20, 2), 0.5))
    assert same.temperature == 1 and "equally probable" in same.calibration_note
    wrong_way = fit_calibration(labels, told_apart[:, ::-1])
    assert wrong_way.temperature == HIGHEST and "nearly the same probability" in wrong_way.calibration_note


def test_the_highest_temperature_is_no_word_on_the_order():
    """All nodules above all others, but all on one side of 0.5: no temperature moves them to theirs."""
    labels = np.repeat([0, 1], [30, 10])
    p = np.where(labels, 0.6, 0.55)
    p = np.stack([1 - p, p], 1)
    found = fit_calibration(labels, p)
    assert area_under_roc(labels, p) == 1 and found.temperature == HIGHEST
    losses = [log_loss(labels, Calibration(t).apply(p)) for t in (1, 2, 10, HIGHEST)]
    assert losses == sorted(losses, reverse=True) and "whether or not their order is right" in found.calibration_note


def test_nearly_told_apart_leaves_no_ties():
    """A single case that is wrong, barely, asks for a temperature near 0: the others stay distinct all the same."""
    margins = np.concatenate([np.linspace(-9, -3, 30), [0.001], np.linspace(3, 9, 30)])
    labels = np.array([0] * 31 + [1] * 30)
    p = softmax(np.stack([-margins / 2, margins / 2], 1))
    found = fit_calibration(labels, p)
    calibrated = found.apply(p)[:, 1]
    assert found.temperature < 1 and len(set(calibrated)) == len(labels) and (np.diff(calibrated) > 0).all()


@pytest.mark.parametrize("temperature, offset", [(0.4, []), (2.5, []), (2.5, [-0.7, 0.9]), (1.0, [0.3, -1.1])])
def test_two_classes_keep_their_order_and_their_decisions(temperature, offset):
    labels, p = draw(2, 200, 2.0, seed=1)
    calibration = Calibration(temperature, offset)
    after = calibration.apply(p)
    assert (np.argsort(p[:, 1]) == np.argsort(after[:, 1])).all() and not np.allclose(p, after)
    assert area_under_roc(labels, after) == area_under_roc(labels, p)  # to the last digit
    for threshold in (choose_threshold(labels, p), 0.0, 0.5):
        moved = calibration.apply_to_threshold(threshold)
        assert (decide(after, moved) == decide(p, threshold)).all()


def test_more_classes_keep_their_decisions():
    _, p = draw(4, 200, 2.0, seed=1)
    assert (Calibration(3.0).apply(p).argmax(1) == p.argmax(1)).all()
    assert prior_offset([5, 6, 7], [1, 1, 1]) == []


def test_no_calibration_changes_no_bit():
    _, p = draw(2, 50, 2.0, seed=1)
    assert (Calibration().apply(p) == p).all()
    older = Calibration.from_best({"threshold": 0.3, "auc": 0.5})
    assert older.temperature == 1 and (older.apply(p) == p).all() and "older version" in older.calibration_note
    saved = Calibration(2.0, [0.1, 0.2], "why")
    assert Calibration.from_best({"threshold": 0.3} | saved._asdict()) == saved


def test_no_vote_is_not_never():
    """k-NN gives 0 and 1: they stay ends of the order, and a temperature softens them."""
    p = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    after = Calibration(6.0).apply(p)[:, 1]
    assert 0 < after[0] < after[1] < after[2] < 1
    labels = np.repeat([0, 1], 10)
    votes = np.eye(2)[labels]
    votes[3] = [0, 1]  # one is wrong, and sure
    found = fit_calibration(labels, votes)
    assert found.temperature > 5 and log_loss(labels, found.apply(votes)) < 0.25


def test_what_is_not_a_number_stays_none():
    """So that a network that has diverged is told as one: by the loss in validation, by the check of an export."""
    p = np.array([[0.3, 0.7], [np.nan, np.nan]])
    assert np.isnan(Calibration(2.0, [0.1, 0.2]).apply(p)).tolist() == [[False, False], [True, True]]
    fit_calibration(np.repeat([0, 1], 10), np.full((20, 2), np.nan))


def test_the_frequencies_of_classes_follow_bayes():
    """Odds of a model that knows classes as 1 to 1, for cases as 9 to 1: nine times less."""
    p = np.array([[0.5, 0.5], [0.2, 0.8], [0.99, 0.01]])
    offset = prior_offset([90, 10], [1, 1])
    after = Calibration(1.0, offset).apply(p)
    np.testing.assert_allclose(after[:, 1] / after[:, 0], p[:, 1] / p[:, 0] / 9, rtol=1e-12)
    np.testing.assert_allclose(prior_offset([30, 10], [3, 1]), 0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_figures_before_and_after_are_scikit_learns(classes):
    labels, p = draw(classes, 400, 3.0, seed=4)
    after = Calibration(3.0).apply(p)
    found = probability_metrics(labels, p, after, 0.4)
    decided = (after[:, 1] >= 0.4).astype(int) if classes == 2 else after.argmax(1)
    one_hot = np.eye(classes)[labels]

    def brier(q):
        return brier_score_loss(labels, q[:, 1]) if classes == 2 else ((q - one_hot) ** 2).sum(1).mean()

    assert found["brier_uncalibrated"] == pytest.approx(brier(p), abs=1e-12)
    assert found["brier"] == pytest.approx(brier(after), abs=1e-12) and found["brier"] < found["brier_uncalibrated"]
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, decided))
    average = {"average": "binary" if classes == 2 else "macro"}
    assert found["f1"] == pytest.approx(f1_score(labels, decided, **average))
    assert found["confusion_matrix"] == confusion_matrix(labels, decided).tolist()
    for name, kind in (("calibration_error_uncalibrated", "uncalibrated"), ("calibration_error", "calibrated")):
        counts, predicted, observed = (
            np.array(found["reliability"][kind][key]) for key in ("counts", "predicted", "observed")
        )
        assert counts.sum() == 400
        assert found[name] == pytest.approx((counts * abs(predicted - observed)).sum() / 400)
    intervals = probability_intervals(labels, p, after, 0.4, [f"p{i // 2}" for i in range(400)])
    assert intervals["brier_change"] == pytest.approx(found["brier"] - found["brier_uncalibrated"])
    low, high = intervals["brier_change_interval"]
    assert low < intervals["brier_change"] < high < 0  # three times too sure: it helps
    assert intervals["brier_interval"][0] < found["brier"] < intervals["brier_interval"][1]
