"""What is measured of classified cases: AUC, average precision, F1, Brier score, calibration error; their tables."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dino3d.evaluation import weighted_metrics as wm
from dino3d.evaluation.statistics import bootstrap_interval, interval_notes

CASE_METRICS = ("auc", "average_precision", "accuracy", "sensitivity", "specificity")


def evaluate_cases(
    labels: np.ndarray, probabilities: np.ndarray, patients: Sequence[str], threshold: float
) -> dict[str, float | list[float] | None]:
    """{name: value} of CASE_METRICS, and the 95 % interval of the AUC by bootstrap over patients.

    labels: (N,); probabilities: (N, classes). With more than two classes they are means over the classes, each against
    the rest, and the most probable class stands for the threshold. None where a class is missing.
    """
    scores, once = _case_scores(labels, probabilities, decide(probabilities, threshold)), np.ones(len(labels))
    return {name: score(once) for name, score in scores.items()} | {
        "auc_interval": bootstrap_interval(scores["auc"], patients)
    }


def _case_scores(
    labels: np.ndarray, probabilities: np.ndarray, predicted: np.ndarray
) -> dict[str, Callable[[np.ndarray], float | None]]:
    """{name: function of (N,) weights} of CASE_METRICS."""
    k = probabilities.shape[1]
    return {
        "auc": lambda weights: area_under_roc(labels, probabilities, weights),
        "average_precision": lambda weights: average_precision(labels, probabilities, weights),
        "accuracy": lambda weights: _defined(wm.weighted_accuracy(labels, predicted, weights)),
        "sensitivity": lambda weights: _defined(wm.weighted_sensitivity(labels, predicted, weights, k)),
        "specificity": lambda weights: _defined(wm.weighted_specificity(labels, predicted, weights, k)),
    }


def decide(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """(N,) predicted classes: the most probable one or, with two, label 1 from the threshold on."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(int)
    return probabilities.argmax(1)


def area_under_roc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Area under the ROC curve. labels: (N,); probabilities: (N, classes); weights: (N,) of the cases."""
    return _defined(wm.weighted_auc(labels, probabilities, _weights_of(labels, weights)))


def average_precision(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Area under the precision-recall curve, as scikit-learn's average_precision_score."""
    return _defined(wm.weighted_average_precision(labels, probabilities, _weights_of(labels, weights)))


def balanced_accuracy(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float = 0.5, weights: np.ndarray | None = None
) -> float | None:
    """Mean over the classes of the share of its cases decided right, as scikit-learn's balanced_accuracy_score.

    labels: (N,); probabilities: (N, classes); threshold: of label 1's with two classes, see `decide`; weights: (N,) of
    the cases. None where one of the classes has no case (scikit-learn leaves that class out).
    """
    decided = decide(probabilities, threshold)
    return _defined(
        wm.weighted_balanced_accuracy(labels, decided, _weights_of(labels, weights), probabilities.shape[1])
    )


def f1_score_of(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float = 0.5, weights: np.ndarray | None = None
) -> float | None:
    """F1 = 2 TP / (2 TP + FP + FN) of label 1; with more than two classes the mean of all classes' (macro).

    As scikit-learn's f1_score; parameters as of `balanced_accuracy`. None where a class that counts has no case.
    """
    decided = decide(probabilities, threshold)
    return _defined(wm.weighted_f1(labels, decided, _weights_of(labels, weights), probabilities.shape[1]))


def brier_score(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean squared error of the probabilities, 0 (best) to 1; with more than two classes 0 to 2.

    With two classes (p_1 - y)^2 of label 1 alone; with more the sum over all classes of (p_k - y_k)^2 (Brier 1950), as
    scikit-learn's brier_score_loss. A class without cases changes nothing. labels: (N,); probabilities: (N, classes)
    """
    return float(wm.weighted_brier(labels, probabilities, _weights_of(labels, weights)))


class ReliabilityBins(NamedTuple):
    """The bins of a reliability curve that hold cases, each (bins,).

    counts: cases, or their weight; predicted: mean probability; observed: share of the cases for which it came true
    """

    counts: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray


def reliability_bins(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 10, weights: np.ndarray | None = None
) -> ReliabilityBins:
    """The reliability curve in bins of equal width over [0, 1], lowest first; empty ones are left out.

    With two classes of label 1's probability and how often label 1 is right; with more, of the most probable class
    (on a tie the first) and how often it is. A probability at the border of two bins counts in the lower one, so equal
    ones share a bin, as in scikit-learn's calibration_curve(strategy="uniform").
    labels: (N,); probabilities: (N, classes); weights: (N,) of the cases
    """
    scores, true, place = wm.reliability_of(labels, probabilities, bins)
    weights = _weights_of(labels, weights)
    counts, predicted, observed = (np.bincount(place, weights * what, bins) for what in (1, scores, true))
    full = counts > 0
    return ReliabilityBins(counts[full], predicted[full] / counts[full], observed[full] / counts[full])


def calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 10, weights: np.ndarray | None = None
) -> float:
    """Expected calibration error: mean over the cases of |predicted - observed| of their bin in `reliability_bins`.

    Between 0 and 1. Of few cases it is above 0 even where the probabilities are right, for bins of few cases are off by
    chance: compare it at equal numbers of cases only.
    """
    return float(wm.weighted_calibration_error(labels, probabilities, _weights_of(labels, weights), bins))


def _defined(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def _weights_of(labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return np.ones(len(labels)) if weights is None else np.asarray(weights, float)


def choose_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Where sensitivity + specificity is largest (Youden 1950), midway to the next case below; with one class 0.5."""
    if probabilities.shape[1] > 2 or len(np.unique(labels)) < 2:
        return 0.5
    scores = np.unique(probabilities[:, 1])
    steps = np.concatenate([[0.0], (scores[1:] + scores[:-1]) / 2])
    youden = [(probabilities[labels == 1, 1] >= t).mean() + (probabilities[labels == 0, 1] < t).mean() for t in steps]
    return float(steps[int(np.round(youden, 12).argmax())])


def table_header(
    classes: int, known: Sequence[str] = ("case", "patient", "fold", "label"), name: str = "probability"
) -> list[str]:
    """Header of a predictions.csv: what is known of a case, then its probabilities."""
    return [*known, *([name] if classes == 2 else [f"{name}_{k}" for k in range(classes)])]


def tested_header(classes: int) -> list[str]:
    """Header of the predictions.csv of tested cases, whose probabilities stand there before calibration too."""
    return [*table_header(classes), *table_header(classes, (), "uncalibrated")]


def table_probabilities(row: np.ndarray) -> list[float]:
    """(classes,) probabilities as they stand in a table: with two classes, label 1's."""
    return [float(p) for p in (row[1:] if len(row) == 2 else row)]


def read_probabilities(table: list[dict[str, str]], classes: int, name: str = "probability") -> np.ndarray:
    """(N, classes) of the rows of a predictions.csv. name: probability or uncalibrated; older tables lack the latter,
    which was the same."""
    columns = table_header(classes, (), name)
    if not all(column in row for row in table for column in columns):
        columns = table_header(classes, ())
    values = np.array([[float(row[column]) for column in columns] for row in table])
    return np.concatenate([1 - values, values], 1) if classes == 2 else values


class PooledPredictions(NamedTuple):
    """Each tested case once, its probabilities averaged over the folds that tested it.

    numbers, patients: of the cases; labels, predicted: (N,); probabilities, uncalibrated: (N, classes)
    thresholds: (N,) of label 1's probability, means over the folds too; with more classes there is none, NaN
    confidence: (N,) distance of the probability from the threshold; with more classes, of the largest from the label's
    """

    numbers: list[int]
    patients: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    uncalibrated: np.ndarray
    predicted: np.ndarray
    thresholds: np.ndarray
    confidence: np.ndarray
    metrics: dict[str, Any]

    @property
    def wrong(self) -> np.ndarray:
        return self.predicted != self.labels


def pool_predictions(
    tables: Sequence[list[dict[str, str]]], records: Sequence[dict[str, Any]], cases: Any
) -> PooledPredictions:
    """PooledPredictions of the folds' tables: means over the models that tested a case, one where subsets rotate.

    records: the folds' metrics.json; cases: main_lnc_luna16.Cases
    """
    place, k = {name: i for i, name in enumerate(cases.names)}, cases.classes
    rows = {}
    for table, record in zip(tables, records):
        pairs = read_probabilities(table, k), read_probabilities(table, k, "uncalibrated")
        for row, p, before in zip(table, *pairs):
            rows.setdefault(place[row["case"]], []).append([*p, *before, p[1] - record["threshold"]])
    numbers = sorted(rows)
    labels, means = cases.labels[numbers], np.stack([np.mean(rows[i], axis=0) for i in numbers])
    probabilities, uncalibrated, above = means[:, :k], means[:, k:-1], means[:, -1]  # the last: mean over the threshold
    if k == 2:
        predicted, thresholds, confidence = (above >= 0).astype(int), probabilities[:, 1] - above, np.abs(above)
    else:
        thresholds = np.full(len(labels), np.nan)
        predicted = probabilities.argmax(1)
        confidence = probabilities.max(1) - np.take_along_axis(probabilities, labels[:, None], 1)[:, 0]
    patients = [cases.patients[i] for i in numbers]
    scores, once = _case_scores(labels, probabilities, predicted), np.ones(len(labels))
    return PooledPredictions(
        numbers,
        patients,
        labels,
        probabilities,
        uncalibrated,
        predicted,
        thresholds,
        confidence,
        {name: score(once) for name, score in scores.items()}
        | {f"{name}_interval": bootstrap_interval(score, patients) for name, score in scores.items()}
        | {"notes": interval_notes(patients)},
    )
