"""The seeds of an arm judged together: each case by the mean of what they say of it."""

from collections.abc import Sequence

import numpy as np

from dino3d.study.scores import CaseScores


def ensemble_name(arm: str) -> str:
    return f"{arm}-ensemble"


def mean_of_seeds(runs: Sequence[list[CaseScores]]) -> list[CaseScores]:
    """An ensemble: each case with the mean of what all runs say of it."""
    return [one[0]._replace(values=np.mean([run.values for run in one], 0)) for one in zip(*runs, strict=True)]


def in_same_folds(runs: Sequence[list[CaseScores]]) -> bool:
    """Whether runs were tested on the same cases by models that were trained on the same ones."""
    return all(
        one.patients == first.patients and np.array_equal(one.folds, first.folds)
        for first, *others in zip(*runs, strict=True)
        for one in others
    )


def add_ensembles(
    whole: dict[tuple[str, int | None], list[CaseScores]], arms: Sequence[str], task: str, notices: list[str]
) -> dict[tuple[str, int], list[CaseScores]]:
    """Add to the runs of a task, {(arm, seed): a CaseScores for each repeat}, the ensembles of arms, all of the same
    seeds: more of them predict better. Returns the ensembles without one seed, {(ensemble, seed): ...}."""
    seeds_of = {arm: {seed for name, seed in whole if name == arm and seed is not None} for arm in arms}
    for arm in [arm for arm, seeds in seeds_of.items() if len(seeds) < 2]:
        few = len(seeds_of.pop(arm))
        notices.append(f"{task}: no ensemble of {arm}: it needs two seeds, {few} {'was' if few == 1 else 'were'} run")
    seeds = sorted(set.intersection(*seeds_of.values())) if seeds_of else []
    if any(len(of_arm) > len(seeds) for of_arm in seeds_of.values()):
        some = f"of seeds {', '.join(map(str, seeds))} alone" if len(seeds) > 1 else "left out"
        shared = "which" if len(seeds) > 1 else "as no two seeds"
        notices.append(f"{task}: ensembles are {some}, {shared} all of {', '.join(seeds_of)} have")
    without = {}
    for arm in seeds_of if len(seeds) > 1 else ():
        runs = {seed: whole[arm, seed] for seed in seeds}
        if not in_same_folds([*runs.values()]):
            notices.append(f"{task}: no ensemble of {arm}: its seeds were tested in other folds, or on other cases")
            continue
        name = ensemble_name(arm)
        whole[name, None] = mean_of_seeds([*runs.values()])
        without |= {(name, seed): mean_of_seeds([runs[one] for one in seeds if one != seed]) for seed in seeds}
    return without
