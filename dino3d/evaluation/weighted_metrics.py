"""Metrics of predictions under many weightings of the cases at once, for the bootstrap: weights are (..., N).

Each function gives (...,) values, NaN where the weighted cases leave it undefined. labels: (N,) 0, 1, ...;
probabilities: (N, classes); decided: (N,) classes. With two classes label 1 counts; with more the mean of all classes,
each against the rest, but where it is said. No torch.
"""

from collections.abc import Callable

import numpy as np


def weighted_auc(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, folds: np.ndarray | None = None
) -> np.ndarray:
    """Area under the ROC curve: the share of the pairs of a positive and a negative case that are in order.

    folds: (N,) where the probabilities of each fold are of a model of its own: pairs of cases of one fold alone count,
    as those of two models are on no common scale (pooled, features of pure noise fall below 0.5).
    """
    folds = np.zeros(len(labels), int) if folds is None else folds
    return _mean_of_classes(labels, probabilities, lambda positive, p: _pairs_in_order(positive, p, folds, weights))


def weighted_average_precision(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve, as scikit-learn's average_precision_score."""

    def average_precision_of(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
        order, starts = _tied(-scores)
        hits = _summed(weights * positive, order, starts)  # (..., groups of equal scores), highest first
        cases = _summed(weights, order, starts).cumsum(-1)
        return _ratio((hits * _ratio(hits.cumsum(-1), cases, 0.0)).sum(-1), hits.sum(-1))

    return _mean_of_classes(labels, probabilities, average_precision_of)


def weighted_accuracy(labels: np.ndarray, decided: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the cases that are decided right."""
    return _ratio(weights @ (decided == labels), weights.sum(-1))


def weighted_balanced_accuracy(
    labels: np.ndarray, decided: np.ndarray, weights: np.ndarray, classes: int
) -> np.ndarray:
    """Mean over all classes of the share of its cases decided right."""
    return np.mean([_share(decided == k, labels == k, weights) for k in range(classes)], 0)


def weighted_f1(labels: np.ndarray, decided: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN)."""
    values = []
    for k in _counted(classes):
        cases, found = weights @ (labels == k), weights @ (decided == k)
        hits = weights @ ((labels == k) & (decided == k))
        values.append(_ratio(2 * hits, np.where(cases > 0, cases + found, 0)))
    return np.mean(values, 0)


def weighted_sensitivity(labels: np.ndarray, decided: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """Share of a class's cases that are decided right."""
    return np.mean([_share(decided == k, labels == k, weights) for k in _counted(classes)], 0)


def weighted_specificity(labels: np.ndarray, decided: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """Share of the other classes' cases that are not taken for a class's."""
    return np.mean([_share(decided != k, labels != k, weights) for k in _counted(classes)], 0)


def weighted_brier(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """As `brier_score` of classification_metrics."""
    errors = (probabilities - (labels[:, None] == np.arange(probabilities.shape[1]))) ** 2
    return _ratio(weights @ (errors[:, 1] if errors.shape[1] == 2 else errors.sum(1)), weights.sum(-1))


def weighted_calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, bins: int = 10
) -> np.ndarray:
    """As `calibration_error` of classification_metrics."""
    scores, true, place = reliability_of(labels, probabilities, bins)
    gaps = (scores - true)[:, None] * (place[:, None] == np.arange(bins))  # (N, bins)
    return _ratio(np.abs(weights @ gaps).sum(-1), weights.sum(-1))


def reliability_of(
    labels: np.ndarray, probabilities: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) each: the probability that is judged, whether it came true, and its bin, as `reliability_bins` says."""
    if probabilities.shape[1] == 2:
        scores, true = probabilities[:, 1], labels == 1
    else:
        scores, true = probabilities.max(1), probabilities.argmax(1) == labels
    return scores, true, np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], scores)


# ---------------------------------------------------------------------------------------------------------- regression


def weighted_r2(values: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 - squared error / squared deviation from the mean, as scikit-learn's r2_score. values, predicted: (N,)"""
    total, mean = weights.sum(-1), _ratio(weights @ values, weights.sum(-1))
    spread = weights @ values**2 - total * mean**2
    spread = np.where(spread > 1e-12 * np.maximum(weights @ values**2, 1e-300), spread, 0)
    return 1 - _ratio(weights @ (values - predicted) ** 2, spread)


def weighted_mae(values: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean absolute error, in the unit of the values."""
    return _ratio(weights @ np.abs(values - predicted), weights.sum(-1))


def weighted_spearman(
    values: np.ndarray, predicted: np.ndarray, weights: np.ndarray, folds: np.ndarray | None = None
) -> np.ndarray:
    """Spearman's rank correlation: within each fold, then their mean by the number of cases; 0 of equal predictions.

    Within folds as in `weighted_auc`. A fold in which all values are equal does not count.
    """
    folds = np.zeros(len(values), int) if folds is None else folds
    sums = counts = 0.0
    for fold in np.unique(folds):
        held = weights[..., folds == fold]
        a, b = (_mid_ranks(x[folds == fold], held) for x in (values, predicted))
        count = held.sum(-1)
        a, b = (rank - _ratio((held * rank).sum(-1), count)[..., None] for rank in (a, b))
        spreads = (held * a * a).sum(-1), (held * b * b).sum(-1)
        defined = spreads[0] > 1e-9
        r = _ratio((held * a * b).sum(-1), np.sqrt(spreads[0] * spreads[1]), 0.0)
        sums, counts = sums + np.where(defined, count * r, 0), counts + np.where(defined, count, 0)
    return _ratio(sums, counts)


def _mid_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(..., N) mean rank of each value when each stands there as often as its weight says."""
    order, starts = _tied(values)
    group = np.empty(len(values), int)
    group[order] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(values)]))
    counts = _summed(weights, order, starts)
    return (counts.cumsum(-1) - counts / 2)[..., group]


# --------------------------------------------------------------------------------------------------------------- parts


def _counted(classes: int) -> list[int]:
    return [1] if classes == 2 else list(range(classes))


def _share(true: np.ndarray, among: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _ratio(weights @ (true & among), weights @ among)


def _mean_of_classes(
    labels: np.ndarray, probabilities: np.ndarray, score: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    return np.mean([score(labels == k, probabilities[:, k]) for k in _counted(probabilities.shape[1])], 0)


def _ratio(above: np.ndarray, below: np.ndarray, undefined: float = np.nan) -> np.ndarray:
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.divide(above, below, out=np.full(above.shape, undefined), where=below > 0)


def _tied(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts): ascending order, and where in it each group of equal scores begins."""
    order = np.argsort(scores, kind="stable")
    return order, np.flatnonzero(np.append(True, np.diff(scores[order]) > 0))


def _summed(weights: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(weights[..., order], starts, axis=-1)


def _pairs_in_order(positive: np.ndarray, scores: np.ndarray, folds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    ordered = pairs = 0.0
    for fold in np.unique(folds):
        held = folds == fold
        order, starts = _tied(scores[held])
        positives = _summed(weights[..., held] * positive[held], order, starts)
        negatives = _summed(weights[..., held] * ~positive[held], order, starts)
        ordered = ordered + (positives * (negatives.cumsum(-1) - negatives / 2)).sum(-1)
        pairs = pairs + positives.sum(-1) * negatives.sum(-1)
    return _ratio(ordered, pairs)
