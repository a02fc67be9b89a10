"""Calibrated probabilities: a temperature fitted on validation, and the frequencies of two classes that training weighs
alike; how good the probabilities are, before and after."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dino3d.evaluation.classification_metrics import (
    balanced_accuracy,
    brier_score,
    calibration_error,
    decide,
    f1_score_of,
    reliability_bins,
)
from dino3d.evaluation.statistics import bootstrap_interval

FEWEST_OF_CLASS = 5  # validation cases of each class that a temperature is fitted to
HIGHEST = 100.0  # temperature
STEEPEST = 30.0  # logit that no validation case goes beyond: from 36 on, probabilities near 1 would be ties
NEVER = 1e-13  # stands for a probability of 0, which k-NN gives: below the least share of a vote, exp(-2 / 0.07)
PROBABILITY_METRICS = (
    "balanced_accuracy",
    "f1",
    "brier_uncalibrated",
    "brier",
    "calibration_error_uncalibrated",
    "calibration_error",
)


class Calibration(NamedTuple):
    """softmax(log p / temperature + logit_offset) of a model's probabilities p; as it stands here, p itself.

    logit_offset: (classes,); empty: none; calibration_note: why no temperature was fitted, or the highest was
    """

    temperature: float = 1.0
    logit_offset: Sequence[float] = ()
    calibration_note: str = ""

    @classmethod
    def from_best(cls, best: dict[str, Any]) -> "Calibration":
        """Of what is known of a fold's best epoch, where its fields stand; older versions fitted none."""
        if "temperature" not in best:
            return cls(calibration_note="trained by an older version, which fitted no temperature")
        return cls(**{name: best[name] for name in cls._fields if name in best})

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """(N, classes) calibrated, of a model's probabilities (N, classes)."""
        offset = np.array(self.logit_offset or 0.0)
        if self.temperature == 1 and not offset.any():
            return probabilities
        return _softmax(_log(probabilities) / self.temperature + offset)

    def apply_to_threshold(self, threshold: float) -> float:
        """Where a threshold of label 1's probability, of two, comes to lie: the decisions are the same."""
        return float(self.apply(np.array([[1 - threshold, threshold]]))[0, 1]) if threshold > 0 else 0.0


def prior_offset(counts: Sequence[float], trained: Sequence[float]) -> list[float]:
    """(classes,) what is added to the logits where classes are as frequent as counted and not as in training (Saerens
    et al. 2002); nothing with more than two, where the most probable class is the decision.

    counts: (classes,) of the cases that are judged; trained: (classes,) frequencies, or weights, that training gave
    """
    if len(counts) != 2:
        return []
    counts, trained = np.array(counts, float), np.array(trained, float)
    return np.log(counts / counts.sum() * trained.sum() / trained).tolist()


def fit_calibration(labels: np.ndarray, probabilities: np.ndarray, logit_offset: Sequence[float] = ()) -> Calibration:
    """The temperature with the least log loss on validation cases (Guo et al. 2017, arXiv 1706.04599), given an offset.

    labels: (N,); probabilities: (N, classes). It stays 1, with a note, where a class has fewer than FEWEST_OF_CLASS
    cases, or where every case's most probable class is right, so that the least would be at 0. HIGHEST has a note too.
    """
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    if counts.min() < FEWEST_OF_CLASS:
        n, k = int(counts.min()), int(counts.argmin())
        return Calibration(
            1.0,
            logit_offset,
            f"temperature 1: {n} validation case{'s' * (n != 1)} of label{k}, and it takes {FEWEST_OF_CLASS} of each "
            "class to fit one",
        )
    logs = _log(probabilities)  # (N, classes)
    if (logs.argmax(1) == labels).all():
        return Calibration(
            1.0, logit_offset, "temperature 1: validation is told apart without an error, so that none is best"
        )
    spread = float((logs.max(1) - logs.min(1)).max())
    if not spread:
        return Calibration(1.0, logit_offset, "temperature 1: all classes of validation cases are equally probable")
    rows, offset = np.arange(len(labels)), np.array(logit_offset or 0.0)

    def slope(inverse: float) -> float:  # of the log loss, which is convex in 1 / temperature
        return float(((_softmax(logs * inverse + offset) * logs).sum(1) - logs[rows, labels]).mean())

    low, high = 1 / HIGHEST, STEEPEST / spread  # logarithms of doubles are at most 745 apart: low is below high
    if slope(low) >= 0:
        note = f"temperature {HIGHEST:g}, the highest: on validation the log loss is least where all cases get nearly "
        return Calibration(HIGHEST, logit_offset, note + "the same probability, whether or not their order is right")
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return Calibration(1 / high, logit_offset)


def probability_metrics(
    labels: np.ndarray, uncalibrated: np.ndarray, probabilities: np.ndarray, threshold: float | np.ndarray
) -> dict[str, Any]:
    """{name: value} of PROBABILITY_METRICS, the confusion matrix (rows: labels, columns: decisions), and the bins of
    the reliability curves.

    labels: (N,); uncalibrated, probabilities: (N, classes); threshold: of label 1's with two classes, or (N,) of each
    """
    classes, pairs = probabilities.shape[1], {"uncalibrated": uncalibrated, "calibrated": probabilities}
    decided = decide(probabilities, threshold)
    confusion = np.bincount(labels * classes + decided, minlength=classes**2).reshape(classes, classes)
    bins = {name: reliability_bins(labels, p)._asdict() for name, p in pairs.items()}
    return {
        **{name: score() for name, score in _scores(labels, uncalibrated, probabilities, threshold).items()},
        "confusion_matrix": confusion.tolist(),
        "reliability": {name: {key: array.tolist() for key, array in of.items()} for name, of in bins.items()},
    }


def probability_intervals(
    labels: np.ndarray,
    uncalibrated: np.ndarray,
    probabilities: np.ndarray,
    threshold: float | np.ndarray,
    patients: Sequence[str],
) -> dict[str, Any]:
    """{name_interval: 95 % interval over patients} of PROBABILITY_METRICS, and what calibration changed: brier_change,
    calibration_error_change, below 0 where it helped, with their intervals. Parameters as of `probability_metrics`."""
    scores = _scores(labels, uncalibrated, probabilities, threshold)
    found = {f"{name}_interval": bootstrap_interval(score, patients) for name, score in scores.items()}
    for name in ("brier", "calibration_error"):
        before, after = scores[f"{name}_uncalibrated"], scores[name]

        def change(weights: np.ndarray | None = None, before: Any = before, after: Any = after) -> float:
            return after(weights) - before(weights)

        found |= {f"{name}_change": change(), f"{name}_change_interval": bootstrap_interval(change, patients)}
    return found


def _scores(
    labels: np.ndarray, uncalibrated: np.ndarray, probabilities: np.ndarray, threshold: float | np.ndarray
) -> dict[str, Any]:
    """{name: function of (N,) weights or None} of PROBABILITY_METRICS."""
    return {
        "balanced_accuracy": lambda weights=None: balanced_accuracy(labels, probabilities, threshold, weights),
        "f1": lambda weights=None: f1_score_of(labels, probabilities, threshold, weights),
        "brier_uncalibrated": lambda weights=None: brier_score(labels, uncalibrated, weights),
        "brier": lambda weights=None: brier_score(labels, probabilities, weights),
        "calibration_error_uncalibrated": lambda weights=None: calibration_error(labels, uncalibrated, weights=weights),
        "calibration_error": lambda weights=None: calibration_error(labels, probabilities, weights=weights),
    }


def _log(probabilities: np.ndarray) -> np.ndarray:
    """(N, classes) logarithms."""
    return np.log(np.where(probabilities == 0, NEVER, probabilities))  # NaN stays NaN


def _softmax(logits: np.ndarray) -> np.ndarray:
    """(N, classes) probabilities."""
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)
