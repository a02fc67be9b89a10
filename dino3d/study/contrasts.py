"""Arms compared: means over seeds, intervals over patients and seeds, paired differences, the paper's claims."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from dino3d.evaluation.comparison import LEVEL
from dino3d.evaluation.statistics import FEWEST_PATIENTS, Bootstrap, holm
from dino3d.study.scores import TaskScores

IS_SHOWN, NOT_SHOWN, OPPOSITE = "shown", "not shown", "opposite"
FEWEST_SEEDS = 2  # of one, the interval is of patients alone
LITTLE = 0.01  # of AUC: what "adds little" may add at most


class Effect(NamedTuple):
    """A mean of arms minus a mean of others, over the seeds that all of them have. weights: {arm: weight};
    interval: None with too few patients; p: against `null`"""

    task: str
    weights: dict[str, float]
    value: float | None
    interval: list[float] | None
    p: float | None
    p_holm: float | None
    seeds: list[int]
    null: float = 0.0

    @property
    def verdict(self) -> str:
        """Of "above null": shown only if the interval leaves it out and the p-value stands after Holm's adjustment, and
        seeds tell of other seeds."""
        if self.interval is None or self.p_holm is None or self.p_holm >= LEVEL or len(self.seeds) < FEWEST_SEEDS:
            return NOT_SHOWN
        return IS_SHOWN if self.interval[0] > self.null else OPPOSITE if self.interval[1] < self.null else NOT_SHOWN


class Claim(NamedTuple):
    """What the paper found. arms: {arm: weight}; above: whether it is said to lie above `null`, or below"""

    text: str
    task: str
    arms: dict[str, float]
    above: bool = True
    null: float = 0.0


def share_of(*arms: str, sign: float = 1.0) -> dict[str, float]:
    return {arm: sign / len(arms) for arm in arms}


CLAIMS = (
    Claim(
        "scaling and rotation matter most for classification: their mean lies above that of the other four",
        "classification",
        share_of("rotation", "scale") | share_of("flip", "elastic", "gaussian", "histogram", sign=-1),
    ),
    Claim(
        f"intensity augmentation adds little to classification, or hurts: less than {LITTLE:g} above none",
        "classification",
        share_of("gaussian", "histogram") | {"none": -1.0},
        above=False,
        null=LITTLE,
    ),
    Claim(
        "histogram shift helps segmentation most: it lies above the mean of the other five",
        "segmentation",
        {"histogram": 1.0} | share_of("rotation", "scale", "flip", "elastic", "gaussian", sign=-1),
    ),
    Claim("pre-trained beats from scratch in classification", "classification", {"paper": 1.0, "scratch": -1.0}),
    Claim("pre-trained beats from scratch in segmentation", "segmentation", {"paper": 1.0, "scratch": -1.0}),
)


class Judged(NamedTuple):
    """A claim beside what the study found. effect: None where it lacks arms; why: of the verdict"""

    claim: Claim
    effect: Effect | None
    verdict: str
    why: str


class Comparison(NamedTuple):
    """All that a study shows. means: Effects of one arm each; pairs: of every two; claims: the paper's"""

    means: list[Effect]
    pairs: list[Effect]
    claims: list[Judged]


def error_by_seeds(scores: TaskScores, weights: Mapping[str, float], seeds: Sequence[int]) -> tuple[float, float]:
    """(standard error of weighted arms' mean over seeds, its degrees of freedom).

    Two or three seeds tell little of how much they matter: the bootstrap alone, which takes their spread for known,
    leaves out the truth far too often. So all arms that have the seeds share one spread, as in a two-way layout of arms
    and seeds: of a difference the mean square of what is left of arms and seeds, of a mean that of the seeds too
    (Satterthwaite 1946, doi 10.2307/3002019). Where the arms themselves spread more than that, theirs counts.

    What has one figure for all seeds has no part in that spread. A table of features has no error by seeds; that of an
    ensemble is the jackknife's, which leaves out one of its seeds at a time (Tukey 1958).
    """
    runs = {arm: weight for arm, weight in weights.items() if arm not in scores.seedless}
    ensembles = {arm: weight for arm, weight in weights.items() if scores.seedless.get(arm)}

    def of_seed(arm: str, seed: int) -> float:
        return scores.seedless[arm][seed] if arm in scores.seedless else scores.values[arm][seed][0]

    def by_seed(arms: Mapping[str, float]) -> np.ndarray:
        return np.array([sum(weight * of_seed(arm, seed) for arm, weight in arms.items()) for seed in seeds])

    if not runs and not ensembles or np.isnan(own := by_seed(runs | ensembles)).any():
        return 0.0, 1.0
    left, parts = len(seeds) - 1, []  # (variance, its degrees of freedom)
    if runs:
        of_arms = [arm for arm in scores.values if arm not in scores.seedless and set(seeds) <= set(scores.values[arm])]
        table = np.array([by_seed({arm: 1.0}) for arm in of_arms])  # (arms, seeds)
        table = table[~np.isnan(table).any(1)]
        if (varies := np.ptp(table, 1) > 0).any():  # all seeds of an arm may have the same weights
            table = table[varies]
        arms_left, squares = len(table) - 1, sum(weight**2 for weight in runs.values())
        residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        degrees = max(1, arms_left * left)
        parts = [(squares * (residual**2).sum() / degrees, degrees)]
        if abs(sum(runs.values())) > 1e-9:  # else what a seed does to all arms alike falls out
            parts = [(squares * table.mean(0).var(ddof=1), left), (parts[0][0] * arms_left / len(table), degrees)]
    if ensembles:
        parts.append((by_seed(ensembles).var(ddof=1), left))
    total, of_parts = sum(part for part, _ in parts), sum(part**2 / degrees for part, degrees in parts)
    variance = max(total, own.var(ddof=1))
    return float(np.sqrt(variance / len(seeds))), float(total**2 / of_parts) if of_parts else float(left)


def with_seeds(found: Bootstrap, error: float, freedom: float, level: float = 0.95) -> list[float] | None:
    """[low, high] over patients and seeds: distances of both intervals from the figure, added in squares (MOVER: Zou
    and Donner 2008, doi 10.1002/sim.3095). error, freedom: see `error_by_seeds`"""
    interval = found.interval(level)
    if interval is None:
        return None
    by_seeds, middle = error * float(stdtrit(freedom, (1 + level) / 2)), found.estimate
    below, above = (
        math.hypot(max(0.0, by_patients), by_seeds) for by_patients in (middle - interval[0], interval[1] - middle)
    )
    return [middle - below, middle + above]


def p_with_seeds(found: Bootstrap, error: float, freedom: float, null: float) -> float | None:
    """Two-sided: 1 - the level of the widest interval of `with_seeds` that leaves `null` out, at least 1 / draws."""
    p = found.p_value(null)
    if p is None or error == 0:
        return p
    low, high = 1 / len(found.draws), 1.0
    for _ in range(30):
        p = math.sqrt(low * high)
        interval = with_seeds(found, error, freedom, 1 - p)
        low, high = (p, high) if interval[0] <= null <= interval[1] else (low, p)
    return high


def smallest_p(patients: int) -> float:
    """Two-sided p of a sign test where all patients agree: draws of few patients agree more easily than they do."""
    return 2.0 ** (1 - patients)


def effect_of(scores: TaskScores, weights: Mapping[str, float], null: float = 0.0) -> Effect:
    """The Effect of weighted arms; None for what no seed of all of them tells. p_holm: not yet adjusted, None."""
    seeds = sorted(set.intersection(*(set(scores.values.get(arm, {})) for arm in weights)))
    if not seeds:
        return Effect(scores.task, dict(weights), None, None, None, None, [], null)
    values = np.mean([sum(weight * scores.values[arm][seed] for arm, weight in weights.items()) for seed in seeds], 0)
    if scores.patients < FEWEST_PATIENTS:
        interval = p = None
    else:
        found = Bootstrap(values[0], values[1 : 1 + scores.draws], values[1 + scores.draws :])
        by_seeds = error_by_seeds(scores, weights, seeds) if len(seeds) > 1 else (0.0, 1.0)
        interval, p = with_seeds(found, *by_seeds), p_with_seeds(found, *by_seeds, null)
        if interval:  # AUC and Dice lie between 0 and 1
            lowest, highest = (sum(pick(weight, 0) for weight in weights.values()) for pick in (min, max))
            interval = [max(lowest, interval[0]), min(highest, interval[1])]
            p = max(p, smallest_p(scores.patients))
    value = None if np.isnan(values[0]) else float(values[0])
    return Effect(scores.task, dict(weights), value, interval, p, None, seeds, null)


def compare_arms(scores: Sequence[TaskScores], arms: Sequence[str]) -> Comparison:
    """Every arm, every pair of arms and every claim; Holm's adjustment is over all pairs of all tasks and the claims
    that are no pair."""
    means, pairs = [], []
    for one in scores:
        present = [arm for arm in arms if arm in one.values]
        means += [effect_of(one, {arm: 1.0}) for arm in present]
        pairs += [effect_of(one, {a: 1.0, b: -1.0}) for a, b in combinations(present, 2)]
    of_task = {one.task: one for one in scores}
    contrasts = []
    for claim in CLAIMS:
        known = of_task[claim.task].values if claim.task in of_task else {}
        whole = set(claim.arms) <= set(known) and not is_pair(claim)
        contrasts.append(effect_of(of_task[claim.task], claim.arms, claim.null) if whole else None)
    tested = [*pairs, *(one for one in contrasts if one)]
    adjusted = iter([one._replace(p_holm=p) for one, p in zip(tested, holm([one.p for one in tested]))])
    pairs = [next(adjusted) for _ in pairs]
    contrasts = [next(adjusted) if one else None for one in contrasts]
    claims = [judge_claim(claim, one or as_pair(claim, pairs)) for claim, one in zip(CLAIMS, contrasts)]
    return Comparison(means, pairs, claims)


def is_pair(claim: Claim) -> bool:
    return claim.null == 0 and sorted(claim.arms.values()) == [-1.0, 1.0]


def as_pair(claim: Claim, pairs: Sequence[Effect]) -> Effect | None:
    """The Effect among the pairs that a claim is about."""
    if not is_pair(claim):
        return None
    above, below = sorted(claim.arms, key=claim.arms.get, reverse=True)
    found = difference_between(pairs, claim.task, above, below)
    return found if found and found.seeds else None


def difference_between(pairs: Sequence[Effect], task: str, one: str, other: str) -> Effect | None:
    """one minus other among the pairs, whichever of them stands first there."""
    for pair in pairs:
        if pair.task == task and set(pair.weights) == {one, other}:
            return pair if pair.weights[one] > 0 else turned(pair)
    return None


def turned(pair: Effect) -> Effect:
    """The same difference from the other side."""
    return pair._replace(
        weights={arm: -weight for arm, weight in reversed(pair.weights.items())},
        value=None if pair.value is None else -pair.value,
        interval=pair.interval and [-pair.interval[1], -pair.interval[0]],
    )


def judge_claim(claim: Claim, effect: Effect | None) -> Judged:
    """A claim beside what was found of it."""
    if effect is None or not effect.seeds:
        return Judged(claim, None, NOT_SHOWN, f"not run: it takes {claim.task} of arms {', '.join(claim.arms)}")
    if effect.interval is None:
        return Judged(claim, effect, NOT_SHOWN, "no interval: too few patients")
    found = effect.verdict
    if not claim.above:
        found = {IS_SHOWN: OPPOSITE, OPPOSITE: IS_SHOWN, NOT_SHOWN: NOT_SHOWN}[found]
    return Judged(claim, effect, found, reason(effect))


def reason(effect: Effect) -> str:
    """Why a difference is shown or not."""
    if effect.value is None or not effect.seeds:
        return "undefined"
    if effect.interval is None:
        return "no interval: too few patients"
    if len(effect.seeds) < FEWEST_SEEDS:
        return "one seed says nothing of other seeds"
    beyond = f"{effect.null:g}"
    if effect.interval[0] <= effect.null <= effect.interval[1]:
        return f"the interval holds {beyond}"
    if effect.p_holm is None or effect.p_holm >= LEVEL:
        return f"the interval leaves out {beyond}, but not after Holm's adjustment"
    return f"the interval leaves out {beyond}, after Holm's adjustment too"
