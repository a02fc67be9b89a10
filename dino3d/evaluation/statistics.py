"""Figures over several cases and folds: intervals by bootstrap, means and deviations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BOOTSTRAP_ROUNDS = 1000
FEWEST_PATIENTS = 5  # that an interval is given for: of fewer, a bootstrap draws the same few values again and again


def bootstrap_interval(
    metric: Callable[[np.ndarray], float | None], patients: Sequence[str], seed: int = 0
) -> list[float] | None:
    """[low, high], the 95 % percentile interval of a metric when patients are drawn with replacement.

    metric: gives a number, or None where it is undefined, of (N,) weights of the cases: how often each was drawn
    patients: of each case. Draws in which the metric is undefined are left out; None where all are, and of fewer than
    FEWEST_PATIENTS patients, as `interval_notes` says.
    """
    names, index = np.unique(patients, return_inverse=True)
    if len(names) < FEWEST_PATIENTS:
        return None
    rng, values = np.random.default_rng(seed), []
    for _ in range(BOOTSTRAP_ROUNDS):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        value = metric(times[index])
        if value is not None:
            values.append(value)
    return np.percentile(values, [2.5, 97.5]).tolist() if values else None


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
