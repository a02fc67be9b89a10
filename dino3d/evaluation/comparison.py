"""Tables of features under the same frozen protocols, folds and drawn patients: figures and paired differences."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from dino3d.evaluation import weighted_metrics as wm
from dino3d.evaluation.classification_metrics import decide
from dino3d.evaluation.labelled_cases import Target
from dino3d.evaluation.protocols import (
    PATHS,
    NestedSplit,
    OutOfFold,
    few_shot_splits,
    fraction_splits,
    nested_splits,
    one_hot,
    out_of_fold,
    strata_of_values,
)
from dino3d.evaluation.statistics import NORMAL, Bootstrap, bootstrap_weights, holm

METRICS = {
    "classification": (
        "auc",
        "average_precision",
        "accuracy",
        "balanced_accuracy",
        "f1",
        "sensitivity",
        "specificity",
        "brier_score",
        "calibration_error",
    ),
    "regression": ("spearman", "r2", "mae"),
}
MAIN_METRIC = {"classification": "auc", "regression": "spearman"}  # what verdicts are about
CURVE_PROTOCOL = {"classification": "logistic", "regression": "ridge"}
LEVEL = 0.05  # of p-values, after Holm
SHOTS = (1, 5, 10, 50)  # training cases of each class
SHARES = (0.1, 0.25, 0.5)  # of the training patients
WEIGHTS_AT_ONCE = 4_000_000  # numbers of a matrix of weights, 32 MB


class Plan(NamedTuple):
    """What all tables are put through. whole: splits of each repeat; curves: {("shots" or "share", size): splits};
    weights: (1 + draws + P, N) of the bootstrap, see `bootstrap_weights`; draws: of them; notices: what is left out"""

    target: Target
    patients: list[str]
    whole: list[list[NestedSplit]]
    curves: dict[tuple[str, float], list[list[NestedSplit]]]
    weights: np.ndarray
    draws: int
    notices: list[str]


class Measured(NamedTuple):
    """What a table, or a group of tables, comes to.

    metrics: {protocol: {metric: (1 + draws + P,) values}}, means over the repeats
    curves: {("shots" or "share", size): values of the main metric}
    predictions: {protocol: [OutOfFold of each repeat]}; a group has none
    by_chance: {protocol: calibration error that right probabilities would show on so many cases}
    """

    name: str
    metrics: dict[str, dict[str, np.ndarray]]
    curves: dict[tuple[str, float], np.ndarray]
    predictions: dict[str, list[OutOfFold]]
    by_chance: dict[str, float]
    members: tuple[str, ...] = ()


class Difference(NamedTuple):
    """One minus other. shown: whether the interval leaves out 0 and the p-value stands after Holm's adjustment"""

    protocol: str
    metric: str
    one: str
    other: str
    value: float
    interval: list[float] | None
    p: float | None
    p_holm: float | None
    shown: bool


def make_plan(
    target: Target, patients: Sequence[str], folds: int, repeats: int, draws: int, seed: int, curves: bool = True
) -> Plan:
    """The Plan, the same for every table."""
    strata = target.y if target.task == "classification" else strata_of_values(target.y)
    how, found, notices = (list(patients), strata, folds, repeats, seed), {}, []
    too_few = "a class would have no training case" if target.classes else "too few patients"
    if curves:
        for shots in SHOTS if target.task == "classification" else ():
            splits = few_shot_splits(*how, shots)
            if splits is None:
                notices.append(
                    f"no few-shot figure of {shots} per class: a class has fewer training cases in some fold"
                )
            else:
                found["shots", shots] = splits
        for share in SHARES:
            splits = fraction_splits(*how, share)
            if splits is None:
                notices.append(f"no figure of {100 * share:g} % of the labels: {too_few}")
            else:
                found["share", share] = splits
    weights = np.concatenate(bootstrap_weights(patients, draws, seed))
    return Plan(target, list(patients), nested_splits(*how), found, weights, draws, notices)


def measure(name: str, features: np.ndarray, plan: Plan) -> Measured:
    """Measured of a table. features: (N, F) in the order of the plan's cases"""
    target, paths = plan.target, PATHS[plan.target.task]
    y = one_hot(target.y, len(target.classes)) if target.classes else target.y[:, None]
    metrics, predictions, by_chance = {}, {}, {}
    for protocol, path in paths.items():
        predictions[protocol] = [out_of_fold(path, features, y, splits) for splits in plan.whole]
        metrics[protocol] = _means(predictions[protocol], plan, _all_metrics)
        if target.classes:
            by_chance[protocol] = _calibration_by_chance(predictions[protocol][0].values)
    curves = {}
    for size, repeats in plan.curves.items():
        tested = [out_of_fold(paths[CURVE_PROTOCOL[target.task]], features, y, splits) for splits in repeats]
        curves[size] = _means(tested, plan, _main_metric)["main"]
    curves["share", 1.0] = metrics[CURVE_PROTOCOL[target.task]][MAIN_METRIC[target.task]]
    return Measured(name, metrics, curves, predictions, by_chance)


def mean_of_group(name: str, members: Sequence[Measured]) -> Measured:
    """A group of tables as one: the mean of their figures, in every draw of patients."""
    metrics = {
        protocol: {metric: np.mean([one.metrics[protocol][metric] for one in members], 0) for metric in values}
        for protocol, values in members[0].metrics.items()
    }
    curves = {size: np.mean([one.curves[size] for one in members], 0) for size in members[0].curves}
    by_chance = {key: float(np.mean([one.by_chance[key] for one in members])) for key in members[0].by_chance}
    return Measured(name, metrics, curves, {}, by_chance, tuple(one.name for one in members))


def _means(
    tested: Sequence[OutOfFold], plan: Plan, score: Callable[[Target, OutOfFold, np.ndarray], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """{metric: (1 + draws + P,) values}: means over the repeats but for the draws, each of which takes one repeat.

    So the intervals hold what another split into folds changes, too. Means in each draw would leave it out, and they
    would be too narrow: features of pure noise had an AUC of 0.5 in 87 % of them instead of 95. But the estimate is a
    mean and a draw is not: with ten repeats intervals are too wide and hold the truth in 98 to 99 %.
    """
    count, ones = len(tested), np.arange(1 + plan.draws, len(plan.weights))  # with one patient left out
    found: dict[str, np.ndarray] = {}
    for number, one in enumerate(tested):
        draws = np.arange(1 + number, 1 + plan.draws, count)
        rows = np.concatenate([[0], draws, ones[: None if number == 0 else 0]])  # one repeat tells the skew
        parts = np.array_split(rows, -(-len(rows) * plan.weights.shape[1] // WEIGHTS_AT_ONCE))
        scores = [score(plan.target, one, plan.weights[part].astype(float)) for part in parts]
        for metric in scores[0]:
            values = np.concatenate([part[metric] for part in scores])
            total = found.setdefault(metric, np.zeros(len(plan.weights)))
            total[draws] = values[1 : 1 + len(draws)]
            total[0] += values[0] / count
            if number == 0:
                total[ones] = values[1 + len(draws) :]
    if "calibration_error" in found:
        found["calibration_error"] = _centred(found["calibration_error"], plan.draws)
    return found


def _centred(values: np.ndarray, draws: int) -> np.ndarray:
    """Values whose draws are moved by their mean distance from the estimate: a calibration error is larger the fewer
    different cases it is of, and drawn patients are fewer different ones."""
    moved = values.copy()
    moved[1 : 1 + draws] = np.maximum(moved[1 : 1 + draws] - (np.nanmean(values[1 : 1 + draws]) - values[0]), 0)
    return moved


def _all_metrics(target: Target, tested: OutOfFold, weights: np.ndarray) -> dict[str, np.ndarray]:
    y, p = target.y, tested.values
    if not target.classes:
        return {
            "spearman": wm.weighted_spearman(y, p[:, 0], weights, tested.folds),
            "r2": wm.weighted_r2(y, p[:, 0], weights),
            "mae": wm.weighted_mae(y, p[:, 0], weights),
        }
    decided, classes = decide(p, tested.thresholds), p.shape[1]
    return {
        "auc": wm.weighted_auc(y, p, weights, tested.folds),
        "average_precision": wm.weighted_average_precision(y, p, weights),
        "accuracy": wm.weighted_accuracy(y, decided, weights),
        "balanced_accuracy": wm.weighted_balanced_accuracy(y, decided, weights, classes),
        "f1": wm.weighted_f1(y, decided, weights, classes),
        "sensitivity": wm.weighted_sensitivity(y, decided, weights, classes),
        "specificity": wm.weighted_specificity(y, decided, weights, classes),
        "brier_score": wm.weighted_brier(y, p, weights),
        "calibration_error": wm.weighted_calibration_error(y, p, weights),
    }


def _main_metric(target: Target, tested: OutOfFold, weights: np.ndarray) -> dict[str, np.ndarray]:
    if target.classes:
        return {"main": wm.weighted_auc(target.y, tested.values, weights, tested.folds)}
    return {"main": wm.weighted_spearman(target.y, tested.values[:, 0], weights, tested.folds)}


def _calibration_by_chance(probabilities: np.ndarray, rounds: int = 200) -> float:
    """Mean calibration error of labels that are drawn with the probabilities themselves."""
    rng, one = np.random.default_rng(0), np.ones(len(probabilities))
    edges = probabilities.cumsum(1)[:, :-1]  # (N, classes - 1)
    drawn = (rng.uniform(size=(rounds, len(probabilities), 1)) > edges).sum(2)
    return float(np.mean([wm.weighted_calibration_error(labels, probabilities, one) for labels in drawn]))


# --------------------------------------------------------------------------------------------------------- comparisons


def bootstrap_of(values: np.ndarray, draws: int) -> Bootstrap:
    """The Bootstrap of (1 + draws + P,) values."""
    return Bootstrap(values[0], values[1 : 1 + draws], values[1 + draws :])


def differences(measured: Sequence[Measured], plan: Plan) -> list[Difference]:
    """Every pair of tables and groups, in each protocol and metric; Holm's adjustment is over all pairs and protocols
    of a metric."""
    found = []
    for metric in METRICS[plan.target.task]:
        pairs = [(protocol, one, other) for protocol in measured[0].metrics for one, other in combinations(measured, 2)]
        tested = [
            bootstrap_of(one.metrics[protocol][metric] - other.metrics[protocol][metric], plan.draws)
            for protocol, one, other in pairs
        ]
        p_values = [one.p_value() for one in tested]
        for (protocol, one, other), result, p, adjusted in zip(pairs, tested, p_values, holm(p_values)):
            interval = result.interval()
            shown = interval is not None and not interval[0] <= 0 <= interval[1] and adjusted < LEVEL
            found.append(
                Difference(protocol, metric, one.name, other.name, result.estimate, interval, p, adjusted, shown)
            )
    return found


def verdict(one: Difference, pairs: int) -> str:
    """What may be said of a difference, in words."""
    if one.interval is None:
        return "not shown: undefined"
    if one.interval[0] <= 0 <= one.interval[1]:
        return "not shown: the interval holds 0"
    if not one.shown:
        return f"not shown: the interval leaves out 0, but not after Holm's adjustment for {pairs} comparisons"
    return f"shown: {one.one if one.value > 0 else one.other} is higher"


def too_few_draws(compared: int, plan: Plan) -> list[str]:
    """A notice where the smallest p-value, 1 / draws, is too large after Holm's adjustment for any difference of so
    many tables and groups to be shown."""
    pairs = math.comb(compared, 2) * len(PATHS[plan.target.task])
    if pairs < LEVEL * plan.draws:
        return []
    return [
        f"{pairs} comparisons of {compared} tables and groups: with --draws {plan.draws} none can be shown, however "
        f"large; give fewer tables, a --group, or --draws {math.floor(pairs / LEVEL) + 1} or more"
    ]


def expected_width(target: Target, patients: Sequence[str]) -> str:
    """How wide intervals of so many patients are, in words, before anything is measured.

    Of an AUC of 0.8 by Hanley and McNeil 1982, of a rank correlation of 0.5 by Fisher's transformation; patients count,
    not cases.
    """
    count = len(set(patients))
    z = NORMAL.inv_cdf(0.975)
    if not target.classes:
        half = math.tanh(math.atanh(0.5) + z / math.sqrt(max(count - 3, 1))) - 0.5
        low = 0.5 - math.tanh(math.atanh(0.5) - z / math.sqrt(max(count - 3, 1)))
        return (
            f"{count} patients: the 95 % interval of a correlation of 0.5 reaches about {low:.2f} down and "
            f"{half:.2f} up (Fisher's transformation)"
        )
    members = [{patient for patient, y in zip(patients, target.y) if y == k} for k in range(len(target.classes))]
    rarest = min(range(len(members)), key=lambda k: len(members[k])) if len(members) > 2 else 1
    positive = len(members[rarest])
    negative = len(set().union(*(members[k] for k in range(len(members)) if k != rarest)))
    auc, q1, q2 = 0.8, 0.8 / 1.2, 2 * 0.64 / 1.8
    error = math.sqrt(
        (auc * (1 - auc) + (positive - 1) * (q1 - auc**2) + (negative - 1) * (q2 - auc**2)) / (positive * negative)
    )
    of = f"label {target.classes[rarest]}"
    paired = z * error * math.sqrt(2 * (1 - 0.5))
    return (
        f"{count} patients, {positive} with {of} and {negative} without: the 95 % interval of an AUC of 0.8 is about "
        f"0.8 ± {z * error:.2f} (Hanley and McNeil 1982), that of a difference of two tables whose AUCs correlate "
        f"by 0.5 about ± {paired:.2f}"
    )


def as_record(values: np.ndarray, draws: int) -> dict[str, Any]:
    """{"value", "interval"} for JSON; None where undefined."""
    found = bootstrap_of(values, draws)
    return {"value": None if np.isnan(found.estimate) else found.estimate, "interval": found.interval()}
