"""Frozen protocols: what k-NN, logistic regression and ridge regression make of features, in nested folds by patient.

Features are (N, F), targets (N, K): one column per class with a 1 for the label's, or one column of values. A path
takes training features, training targets and features to predict, and gives the (S, M, K) predictions of all S settings
of its grid, the most regularised one first; which one counts is chosen in folds of the training cases. No torch.

The paths are written out, as scikit-learn fits each setting anew: a grid of 80 cases with 256 features takes it 40 ms
(logistic), 35 ms (k-NN) and 25 ms (ridge), here 11, 0.3 and 5 on one core, and each fold of each repeat asks for six.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dino3d.evaluation.classification_metrics import choose_threshold

NEIGHBOURS = (50, 20, 10, 5, 3, 1)
TEMPERATURE_OF_VOTES = 0.07  # of k-NN: a neighbour votes with exp(cosine / 0.07) (Caron et al. 2021)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of logistic regression, as scikit-learn's
PENALTIES = (1e5, 1e4, 1e3, 1e2, 1e1, 1.0, 0.1)  # alpha of ridge regression, as scikit-learn's
FEWEST_PER_CLASS = 5  # training patients; with fewer nothing can be chosen inside, and the middle of the grid is taken
INNER_FOLDS = 5

Path = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class NestedSplit(NamedTuple):
    """Numbers of the training and the tested cases, and the inner fold of each training case (None: nothing is
    chosen)."""

    train: np.ndarray
    inner: np.ndarray | None
    test: np.ndarray


# --------------------------------------------------------------------------------------------------------------- folds


def divide(counts: np.ndarray, shares: Sequence[float] | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(P,) side of each patient: as near to the shares of every class as whole patients allow; no side is left empty.

    counts: (P, C) cases of each patient and class; shares: (S,) of each side, summing to 1; P >= S
    rng: numpy Generator. Greedy, as scikit-learn's StratifiedGroupKFold, whose folds are all of one size: the patients
    with the largest part of a class come first, and each goes where it leaves the smallest squared error.
    """
    counts, shares = np.asarray(counts, float), np.asarray(shares, float)
    parts = counts / np.maximum(counts.sum(0), 1)  # (P, C) of each class
    order = rng.permutation(len(counts))
    order = order[np.argsort(-parts[order].max(1), kind="stable")]
    parts = np.column_stack([parts, 0.01 * counts.sum(1) / counts.sum()])  # where classes don't tell, by size
    missing = shares[:, None] * parts.sum(0)  # (S, C + 1)
    sides = np.empty(len(counts), int)
    for patient in order:
        worse = ((missing - parts[patient]) ** 2 - missing**2).sum(1)
        sides[patient] = worse.round(12).argmin()  # equal but for rounding: the first
        missing[sides[patient]] -= parts[patient]
    for side in range(len(shares)):
        if not (sides == side).any():
            largest = np.bincount(sides, minlength=len(shares)).argmax()
            givers = np.flatnonzero(sides == largest)
            sides[givers[counts[givers].sum(1).argmin()]] = side
    return sides


def count_by_patient(patients: Sequence[str], labels: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """(names, counts): the P patients, sorted, and the (P, C) cases that each has of each class."""
    names = sorted(set(patients))
    row = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), max(labels) + 1), int)
    np.add.at(counts, ([row[patient] for patient in patients], labels), 1)
    return names, counts


def folds_by_patient(patients: Sequence[str], strata: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) fold of each case: no patient in two, each stratum spread evenly. At most as many folds as patients."""
    names, counts = count_by_patient(patients, strata)
    folds = min(folds, len(names))
    sides = dict(zip(names, divide(counts, np.full(folds, 1 / folds), rng)))
    return np.array([sides[patient] for patient in patients])


def strata_of_values(values: np.ndarray, most: int = 4) -> np.ndarray:
    """(N,) quarters of values to be predicted, so that each fold gets low and high ones. values: (N,)"""
    return np.searchsorted(np.quantile(values, np.arange(1, most) / most), values)


def nested_splits(
    patients: Sequence[str], strata: np.ndarray, folds: int, repeats: int, seed: int
) -> list[list[NestedSplit]]:
    """The splits of each repeat, one per fold: every case is tested once in a repeat.

    patients: of each case; strata: (N,) classes, or `strata_of_values`. The same for every table of features.
    """
    return [_splits_of(patients, strata, folds, (seed, repeat), None) for repeat in range(repeats)]


def few_shot_splits(
    patients: Sequence[str], strata: np.ndarray, folds: int, repeats: int, seed: int, shots: int
) -> list[list[NestedSplit]] | None:
    """As `nested_splits`, trained on `shots` cases of each class, of different patients as far as they go.

    The first of one order, so 5 hold the case of 1. None where a class has too few cases in some training set.
    """

    def draw(train: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        chosen = []
        for stratum in np.unique(strata):
            cases = rng.permutation(train[strata[train] == stratum])
            turn, seen = [], {}
            for case in cases:
                turn.append(seen.get(patients[case], 0))
                seen[patients[case]] = turn[-1] + 1
            if len(cases) < shots:
                return None
            chosen.append(cases[np.argsort(turn, kind="stable")][:shots])
        return np.sort(np.concatenate(chosen))

    splits = [_splits_of(patients, strata, folds, (seed, repeat), draw) for repeat in range(repeats)]
    return None if any(split is None for repeat in splits for split in repeat) else splits


def fraction_splits(
    patients: Sequence[str], strata: np.ndarray, folds: int, repeats: int, seed: int, share: float
) -> list[list[NestedSplit]] | None:
    """As `nested_splits`, trained on this share of the training patients: one of 1 / share equal parts.

    None where a class would be left without a case.
    """

    def draw(train: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        names, counts = count_by_patient([patients[i] for i in train], strata[train])
        parts = round(1 / share)
        if len(names) < parts:
            return None
        kept = {name for name, side in zip(names, divide(counts, np.full(parts, 1 / parts), rng)) if side == 0}
        chosen = np.array([i for i in train if patients[i] in kept])
        return chosen if len(np.unique(strata[chosen])) == len(np.unique(strata)) else None

    splits = [_splits_of(patients, strata, folds, (seed, repeat), draw) for repeat in range(repeats)]
    return None if any(split is None for repeat in splits for split in repeat) else splits


def _splits_of(
    patients: Sequence[str],
    strata: np.ndarray,
    folds: int,
    seeds: tuple[int, int],
    draw: Callable[[np.ndarray, np.random.Generator], np.ndarray | None] | None,
) -> list[NestedSplit | None]:
    """The splits of one repeat. draw: gives the part of the training cases that is used, or None"""
    outer = folds_by_patient(patients, strata, folds, np.random.default_rng(np.random.SeedSequence((*seeds, 0))))
    splits = []
    for fold in range(outer.max() + 1):
        rng = np.random.default_rng(np.random.SeedSequence((*seeds, 1, fold)))
        train, test = np.flatnonzero(outer != fold), np.flatnonzero(outer == fold)
        train = train if draw is None else draw(train, rng)
        if train is None:
            splits.append(None)
            continue
        members = [patients[i] for i in train]
        fewest = min(len({patients[i] for i in train[strata[train] == one]}) for one in np.unique(strata))
        inner = folds_by_patient(members, strata[train], INNER_FOLDS, rng) if fewest >= FEWEST_PER_CLASS else None
        splits.append(NestedSplit(train, inner, test))
    return splits


# ----------------------------------------------------------------------------------------------------------- protocols


class OutOfFold(NamedTuple):
    """What a repeat says of each case, by what was trained without its fold.

    values: (N, K) probabilities or values; thresholds: (N,) of label 1's probability; folds: (N,) that tested the case
    """

    values: np.ndarray
    thresholds: np.ndarray
    folds: np.ndarray


def out_of_fold(path: Path, features: np.ndarray, targets: np.ndarray, splits: Sequence[NestedSplit]) -> OutOfFold:
    """Train and test on the splits of a repeat.

    The setting of the grid is that of the smallest squared error (of probabilities: the Brier score) over the inner
    folds, the most regularised one of equal ones. With two classes their predictions give the threshold, too
    (`choose_threshold`). Without inner folds: the middle of the grid, and 0.5.
    """
    count = len(features)
    found = OutOfFold(np.full(targets.shape, np.nan), np.full(count, 0.5), np.full(count, -1))
    for fold, (train, inner, test) in enumerate(splits):
        x, y = features[train], targets[train]
        predictions = path(x, y, features[test])  # (S, M, K)
        chosen = len(predictions) // 2
        if inner is not None:
            held_out = np.empty((len(predictions), *y.shape))
            for one in range(inner.max() + 1):
                held = inner == one
                held_out[:, held] = path(x[~held], y[~held], x[held])
            chosen = ((held_out - y) ** 2).sum((1, 2)).round(12).argmin()  # equal but for rounding: the first
            if y.shape[1] == 2:
                found.thresholds[test] = choose_threshold(y.argmax(1), held_out[chosen])
        found.values[test], found.folds[test] = predictions[chosen], fold
    return found


def knn_path(train: np.ndarray, targets: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """(S, M, K) means over the nearest neighbours by cosine of standardised features, for each number in NEIGHBOURS.

    A neighbour's weight is exp(cosine / 0.07), as in DINO's k-NN evaluation. A number above that of the training cases
    takes them all.
    """
    train, tested = _standardised(train, tested)
    train, tested = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, tested))
    cosines = tested @ train.T  # (M, n)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : max(NEIGHBOURS)]
    votes = np.take_along_axis(cosines, nearest, 1)
    votes = np.exp((votes - votes[:, :1]) / TEMPERATURE_OF_VOTES)  # (M, k), the first one's is 1
    sums = (votes[:, :, None] * targets[nearest]).cumsum(1)  # (M, k, K)
    last = np.minimum(NEIGHBOURS, nearest.shape[1]) - 1
    return (sums / votes.cumsum(1)[:, :, None])[:, last].transpose(1, 0, 2)


def logistic_path(train: np.ndarray, targets: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """(S, M, K) probabilities by logistic regression on standardised features, for each C in STRENGTHS.

    As scikit-learn's LogisticRegression; with more than two classes each against the rest, and divided by their sum,
    as its OneVsRestClassifier.
    """
    train, tested = _rotated(*_standardised(train, tested))
    if targets.shape[1] == 2:
        ones = _sigmoid(_fit_logistic(train, targets[:, 1]), tested)
        return np.stack([1 - ones, ones], 2)
    each = np.stack([_sigmoid(_fit_logistic(train, y), tested) for y in targets.T], 2)
    return each / np.maximum(each.sum(2, keepdims=True), 1e-300)


def ridge_path(train: np.ndarray, targets: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """(S, M, K) values by ridge regression on standardised features, for each alpha in PENALTIES, as scikit-learn's
    Ridge."""
    train, tested = _standardised(train, tested)
    mean = targets.mean(0)
    u, s, vt = np.linalg.svd(train, full_matrices=False)
    shrunk = s / (s**2 + np.array(PENALTIES)[:, None])  # (S, r)
    return mean + (tested @ vt.T) @ (shrunk[:, :, None] * (u.T @ (targets - mean)))


PATHS: dict[str, dict[str, Path]] = {
    "classification": {"knn": knn_path, "logistic": logistic_path},
    "regression": {"knn": knn_path, "ridge": ridge_path},
}


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """(N, classes) targets of (N,) labels 0, 1, ..."""
    return (labels[:, None] == np.arange(classes)).astype(float)


def _standardised(train: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the training cases' mean taken off and divided by their deviation; what does not vary there is 0."""
    train, tested = train.astype(np.float64), tested.astype(np.float64)
    mean, deviation = train.mean(0), train.std(0)
    scale = np.where(never_varies(train), np.inf, deviation)
    return (train - mean) / scale, (tested - mean) / scale


def never_varies(features: np.ndarray) -> np.ndarray:
    """(F,) whether a feature is the same in all cases to six digits: a float32 that is always the same may vary in its
    last one. features: (N, F)"""
    return features.std(0) <= 1e-6 * np.abs(features.mean(0))


def _rotated(train: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the axes that the training cases span, at most as many as cases: penalised fits are the same there."""
    if train.shape[1] <= len(train):
        return train, tested
    squares, u = np.linalg.eigh(train @ train.T)
    kept = squares > 1e-12 * max(squares[-1], 1e-300)
    s, u = np.sqrt(squares[kept]), u[:, kept]
    return u * s, tested @ (train.T @ (u / s))


def _fit_logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(S, F + 1) coefficients and the intercept, which is not penalised, for each C in STRENGTHS.

    Minimises C sum(loss) + |w|^2 / 2 by Newton's method, each C starting where the last one ended.
    x: (n, F); y: (n,) of 0 and 1. Of one class alone the intercept is infinite.
    """
    if len(np.unique(y)) == 1:
        return np.tile(np.append(np.zeros(x.shape[1]), np.inf if y[0] else -np.inf), (len(STRENGTHS), 1))
    x, sign = np.column_stack([x, np.ones(len(x))]), 2 * y - 1
    penalty = np.append(np.ones(x.shape[1] - 1), 0)
    w, found = np.zeros(x.shape[1]), []

    def loss(w: np.ndarray) -> float:
        return strength * np.logaddexp(0, -sign * (x @ w)).sum() + penalty @ w**2 / 2

    for strength in STRENGTHS:
        value = loss(w)
        for _ in range(100):
            p = _sigmoid(w[None], x[:, :-1])[0]
            gradient = strength * (x.T @ (p - y)) + penalty * w
            if np.abs(gradient).max() < 1e-7 * max(1, strength * len(y)):
                break
            curvature = strength * (x.T * (p * (1 - p))) @ x
            curvature[np.diag_indices(len(w))] += penalty + 1e-12
            step, value_before = np.linalg.solve(curvature, gradient), value
            while (value := loss(w - step)) > value_before and np.abs(step).max() > 1e-12:
                step = step / 2  # Newton's step may go too far where the classes are nearly apart
            w = w - step
        found.append(w)
    return np.array(found)


def _sigmoid(coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(S, M) probabilities of (S, F + 1) coefficients."""
    return (1 + np.tanh((coefficients[:, :-1] @ x.T + coefficients[:, -1:]) / 2)) / 2
