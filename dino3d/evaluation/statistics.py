"""Figures over several cases and folds: intervals and p-values by bootstrap, means and deviations."""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

NORMAL = NormalDist()
BOOTSTRAP_ROUNDS = 1000
FEWEST_PATIENTS = 5  # that an interval is given for: of fewer, a bootstrap draws the same few values again and again


def bootstrap_interval(
    metric: Callable[[np.ndarray], float | None], patients: Sequence[str], seed: int = 0
) -> list[float] | None:
    """[low, high], the 95 % interval (BCa) of a metric when patients are drawn with replacement.

    metric: gives a number, or None where it is undefined, of (N,) weights of the cases: how often each was drawn
    patients: of each case. Draws in which the metric is undefined are left out; None where all are, and of fewer than
    FEWEST_PATIENTS patients, as `interval_notes` says.
    """
    if len(set(patients)) < FEWEST_PATIENTS:
        return None
    estimate, *others = (
        np.array([np.nan if (value := metric(row.astype(float))) is None else value for row in weights], float)
        for weights in bootstrap_weights(patients, BOOTSTRAP_ROUNDS, seed)
    )
    return Bootstrap(estimate[0], *others).interval()


def bootstrap_weights(patients: Sequence[str], rounds: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the cases, int16: (1, N) once each; (rounds, N) patients drawn with replacement; (P, N) without one
    patient each.

    patients: of each case. The same draws for the same patients and seed, whatever is measured.
    """
    names, index = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(names), size=(rounds, len(names)))
    times = np.apply_along_axis(np.bincount, 1, drawn, minlength=len(names))
    left_out = 1 - np.eye(len(names), dtype=np.int16)
    return np.ones((1, len(index)), np.int16), times.astype(np.int16)[:, index], left_out[:, index]


class Bootstrap:
    """The bootstrap distribution of a figure: its bias-corrected and accelerated (BCa) interval (Efron 1987).

    Against the plain percentile interval it covers the truth as often as it says also near the end of a scale (an AUC
    of 0.9), where that one lies too low.
    estimate: the figure; draws: (rounds,) of drawn patients; left_out: (P,) with one patient left out; NaN: undefined
    """

    def __init__(self, estimate: float, draws: np.ndarray, left_out: np.ndarray) -> None:
        self.estimate, self.draws = float(estimate), np.sort(draws[~np.isnan(draws)])
        left_out = left_out[~np.isnan(left_out)]
        influence = left_out.mean() - left_out if len(left_out) else np.zeros(1)
        spread = (influence**2).sum()
        tiny = 1e-24 * max(self.estimate**2, 1e-24)  # rounding, where leaving one out changes nothing
        self._acceleration = (influence**3).sum() / (6 * spread**1.5) if spread > tiny else 0.0
        self._bias = self._normal_below(self.estimate)

    def interval(self, level: float = 0.95) -> list[float] | None:
        """[low, high]; None where the figure is undefined, or is in all draws."""
        if np.isnan(self.estimate) or not len(self.draws):
            return None
        places = []
        for z in (-NORMAL.inv_cdf((1 + level) / 2), NORMAL.inv_cdf((1 + level) / 2)):
            shifted = self._bias + z
            places.append(NORMAL.cdf(self._bias + shifted / max(1 - self._acceleration * shifted, 1e-9)))
        return np.quantile(self.draws, places).tolist()

    def p_value(self, null: float = 0.0) -> float | None:
        """Two-sided: 1 - the level of the widest interval that leaves `null` out, at least 1 / rounds.

        1 where all draws equal it, None where there is no interval.
        """
        if np.isnan(self.estimate) or not len(self.draws):
            return None
        if self.draws[0] == self.draws[-1] == null:
            return 1.0
        away = self._normal_below(null) - self._bias
        z = away / max(1 + self._acceleration * away, 1e-9) - self._bias
        return min(1.0, max(2 * NORMAL.cdf(-abs(z)), 1 / len(self.draws)))

    def _normal_below(self, value: float) -> float:
        """Normal quantile of the share of draws below a value, equal ones counted half; never infinite."""
        if not len(self.draws):
            return 0.0
        close = 1e-12 * max(1.0, abs(value))  # equal but for rounding
        below = np.searchsorted(self.draws, [value - close, value + close]).mean() / len(self.draws)
        return NORMAL.inv_cdf(min(max(below, 0.5 / len(self.draws)), 1 - 0.5 / len(self.draws)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number, so that all that are below 0.05 stand together (Holm 1979); None stays."""
    given = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, highest = list(p_values), 0.0
    for rank, (p, i) in enumerate(given):
        highest = max(highest, min(1.0, p * (len(given) - rank)))
        adjusted[i] = highest
    return adjusted


def interval_notes(patients: Sequence[str], one: str = "patient") -> list[str]:
    """Why there is no interval, where it is for too few patients. one: what a patient is called"""
    count = len(set(patients))
    if count >= FEWEST_PATIENTS:
        return []
    return [f"no 95 % interval: {count} {one}{'s' * (count != 1)}, and it takes {FEWEST_PATIENTS} to give one"]


def mean_and_deviation(
    records: Sequence[dict[str, Any]], names: Sequence[str]
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """{name: mean}, {name: standard deviation (n - 1)} over the records that have a value; None where too few have."""
    means, deviations = {}, {}
    for name in names:
        values = [record[name] for record in records if record[name] is not None]
        means[name] = float(np.mean(values)) if values else None
        deviations[name] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return means, deviations


def format_metric(value: float | None, digits: int = 3) -> str:
    """A metric as text; None is undefined."""
    return "undefined" if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """A metric as text, with its interval if there is one."""
    return format_metric(value) + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
