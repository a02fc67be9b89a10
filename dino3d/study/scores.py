"""What the finished jobs of a study say of each case, as one figure per weighting of the patients."""

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data.conventions import DataError
from dino3d.data.lists import pairs_of_list
from dino3d.evaluation.classification_metrics import read_probabilities
from dino3d.evaluation.feature_tables import LoadedTable, read_features
from dino3d.evaluation.labelled_cases import Labels, SharedCases, Target, encode_labels, join, read_labels
from dino3d.evaluation.protocols import PATHS, NestedSplit, fraction_splits, nested_splits, one_hot, out_of_fold
from dino3d.evaluation.statistics import bootstrap_weights
from dino3d.evaluation.weighted_metrics import weighted_auc
from dino3d.files import read_json, read_table
from dino3d.study.definition import Study
from dino3d.study.jobs import RESULTS, StudyJob

# What a task is judged by, and figures of masks beside it
LABEL_SHARES = {"probe": 1.0, "probe_50": 0.5, "probe_25": 0.25, "probe_10": 0.1}  # of the training patients' labels
METRIC = {"classification": "AUC", "segmentation": "Dice", "surface": "surface Dice"} | dict.fromkeys(
    LABEL_SHARES, "AUC"
)
MASK_COLUMNS = {"segmentation": "dice", "surface": "surface_dice"}  # of cases.csv
FIGURES = {"classification": ("classification",), "segmentation": tuple(MASK_COLUMNS), "probe": tuple(LABEL_SHARES)}
FEW_LABELS = tuple(name for name, share in LABEL_SHARES.items() if share < 1)  # figures that are made where asked for
PROBE = "logistic"  # of dino3d.evaluation.protocols
LOGISTIC_FOLDS, LOGISTIC_REPEATS = 5, 3  # few repeats: the seeds are repeats too
FEW_LABELS_REPEATS = 10  # whose labels they are counts for more
WEIGHTS_IN_MEMORY = 4_000_000  # numbers at once, 32 MB


class CaseScores(NamedTuple):
    """Cases as one model, or several on parts of them, judged them. patients: whose each is; labels: (N,) classes, or
    None of masks; values: (N, classes) probabilities, or (N,) Dice or surface Dice, NaN where undefined; folds: (N,)
    which models judged a case"""

    patients: list[str]
    labels: np.ndarray | None
    values: np.ndarray
    folds: np.ndarray

    def score(self, weights: np.ndarray) -> np.ndarray:
        """(...,) AUC of pairs of cases that the same models judged, or mean Dice, under (..., N) weights."""
        if self.labels is not None:
            return weighted_auc(self.labels, self.values, weights, self.folds)
        defined = ~np.isnan(self.values)
        total = weights[..., defined].sum(-1)
        return np.where(total > 0, weights[..., defined] @ self.values[defined], np.nan) / np.where(total > 0, total, 1)


class TaskScores(NamedTuple):
    """What a task came to. values: {arm: {seed: (1 + draws + P,) figures}}: of all patients, of drawn ones, without
    each; cases, patients: how many; notices: what was odd; seedless: arms that have one figure for all seeds, with the
    jackknife's pseudo-value of each seed of an ensemble, and with nothing for a table of features"""

    task: str
    values: dict[str, dict[int, np.ndarray]]
    cases: int
    patients: int
    draws: int
    notices: list[str]
    seedless: Mapping[str, Mapping[int, float]] = MappingProxyType({})


def score_task(study: Study, task: str, jobs: Sequence[StudyJob], draws: int) -> TaskScores | None:
    """TaskScores of the jobs of a figure of METRIC that are done; None where none is. Raises UserError for results that
    do not belong together."""
    done = [job for job in jobs if task in FIGURES.get(job.stage, ()) and job.is_done()]
    if task == "surface":
        done = [job for job in done if has_surface(job.folder)]
    if not done:
        return None
    notices: list[str] = []
    return score_cases(task, read_cases(study, task, done, notices), draws, notices)


def read_cases(
    study: Study, task: str, done: Sequence[StudyJob], notices: list[str]
) -> dict[tuple[str, int], list[CaseScores]]:
    """{(arm, seed): a CaseScores for each repeat} of the jobs of a figure of METRIC. Raises UserError."""
    if task in LABEL_SHARES:
        tables = [read_features(str(job.folder / RESULTS["probe"]), job.name) for job in done]
        found = probe_tables(study.data["probe"], tables, notices, LABEL_SHARES[task])
        return {(job.arm, job.seed): one for job, one in zip(done, found)}
    if task == "classification":
        return {(job.arm, job.seed): [classified_cases(job.folder)] for job in done}
    owners, column = patients_of_masks(study.data["segmentation"]), MASK_COLUMNS[task]
    return {(job.arm, job.seed): [segmented_cases(job.folder, owners, column)] for job in done}


def has_surface(folder: Path) -> bool:
    """Whether a run of main_lts_msd.py tells surface Dice."""
    return MASK_COLUMNS["surface"] in next(iter(read_table(folder / "cases.csv")), {})


def score_cases(
    task: str,
    tested: Mapping[tuple[str, int | None], list[CaseScores]],
    draws: int,
    notices: list[str],
    without: Mapping[tuple[str, int], list[CaseScores]] = MappingProxyType({}),
) -> TaskScores:
    """TaskScores of cases, which are those of an arm's repeats with a seed.

    A table of features has the seed None, and stands beside all seeds; so has an ensemble, which stands beside its own.
    without: ensembles without a seed, by their arm and that seed. Raises UserError for arms that were tested on
    different cases.
    """
    seeds = sorted({seed for _, seed in tested if seed is not None}) or [0]
    members = {arm: sorted(seed for other, seed in without if other == arm) for arm, seed in tested if seed is None}
    beside = {(arm, seed): [seed] if seed is not None else members[arm] or seeds for arm, seed in tested}
    require_same_cases({(key[0], seed): tested[key] for key, of_key in beside.items() for seed in of_key}, task)
    names = sorted({patient for runs in tested.values() for patient in runs[0].patients})
    cases = max(len(runs[0].patients) for runs in tested.values())
    weights = np.concatenate(bootstrap_weights(names, draws, seed=0))  # the same patients drawn for every run
    values: dict[str, dict[int, np.ndarray]] = {}
    for key, of_key in beside.items():
        values.setdefault(key[0], {}).update(dict.fromkeys(of_key, under_weights(tested[key], names, weights, draws)))
    seedless = {
        arm: {
            seed: len(of_arm) * values[arm][seed][0] - (len(of_arm) - 1) * score_of_all(without[arm, seed])
            for seed in of_arm
        }
        for arm, of_arm in members.items()
    }
    return TaskScores(task, values, cases, len(names), draws, notices, seedless)


def score_of_all(runs: Sequence[CaseScores]) -> float:
    """The mean of a run's repeats, of all its cases."""
    return float(np.mean([one.score(np.ones(len(one.patients))) for one in runs]))


def under_weights(runs: Sequence[CaseScores], names: Sequence[str], weights: np.ndarray, draws: int) -> np.ndarray:
    """(1 + draws + P,) figures of a run's repeats: the mean of all; a repeat in each draw, so that what another split
    into folds changes is part of the interval; the first one without each patient.

    weights: (1 + draws + P, patients)
    """
    place = {name: i for i, name in enumerate(names)}
    total = np.zeros(len(weights))
    for number, one in enumerate(runs):
        drawn = np.arange(1 + number, 1 + draws, len(runs))
        left_out = np.arange(1 + draws, len(weights)) if number == 0 else []
        rows = np.concatenate([[0], drawn, left_out]).astype(int)
        mine = [place[patient] for patient in one.patients]
        parts = np.array_split(rows, -(-len(rows) * len(mine) // WEIGHTS_IN_MEMORY))
        found = np.concatenate([one.score(weights[part][:, mine].astype(float)) for part in parts])
        total[0] += found[0] / len(runs)
        total[rows[1:]] = found[1:]
    return total


def require_same_cases(tested: dict[tuple[str, int], list[CaseScores]], task: str) -> None:
    """Raise UserError where arms of one seed were tested on different cases: data that changed meanwhile."""
    first: dict[int, tuple[str, list]] = {}
    for (arm, seed), runs in tested.items():
        cases = sorted(zip(runs[0].patients, runs[0].labels.tolist() if runs[0].labels is not None else runs[0].folds))
        other, known = first.setdefault(seed, (arm, cases))
        if known != cases:
            raise UserError(
                f"{task}, seed {seed}: arms {other} ({len(known)} cases) and {arm} ({len(cases)} cases) were tested on "
                "different cases, so they can't be compared; did the data change meanwhile? Remove the task's folders "
                "of the older arms, and start again"
            )


def classified_cases(folder: Path) -> CaseScores:
    """CaseScores of a run of main_lnc_luna16.py: each case once, with the mean of its folds' probabilities."""
    classes, rows = int(read_result(folder)["classes"]), {}
    table = read_table(folder / "predictions.csv")
    for row, probabilities in zip(table, read_probabilities(table, classes)):
        rows.setdefault(row["case"], []).append((row["patient"], int(row["label"]), row["fold"], probabilities))
    names = sorted(rows)
    return CaseScores(
        [rows[name][0][0] for name in names],
        np.array([rows[name][0][1] for name in names]),
        np.stack([np.mean([probabilities for *_, probabilities in rows[name]], 0) for name in names]),
        number_texts([" ".join(sorted(fold for _, _, fold, _ in rows[name])) for name in names]),
    )


def segmented_cases(folder: Path, owners: dict[str, str], column: str) -> CaseScores:
    """CaseScores of a run of main_lts_msd.py: each case once, with the mean of its folds and classes. owners: {case:
    patient} where they differ; column: of cases.csv"""
    found = collections.defaultdict(list)
    for row in read_table(folder / "cases.csv"):
        found[row["case"]].append(float(row[column] or "nan"))  # undefined where neither mask has the class
    read_result(folder)
    names = sorted(found)
    defined = [[dice for dice in found[name] if not np.isnan(dice)] for name in names]
    means = np.array([np.mean(dice) if dice else np.nan for dice in defined])
    return CaseScores([owners.get(name, name) for name in names], None, means, np.zeros(len(names), int))


def probe_tables(
    data: str, tables: Sequence[LoadedTable], notices: list[str], share: float = 1.0
) -> list[list[CaseScores]]:
    """A CaseScores for each repeat, of each table: logistic regression on frozen features, in nested folds by patient,
    which are the same for all tables. share: of the training patients whose labels are used. Raises UserError."""
    cases, target = probe_cases(data, tables)
    folds = probe_folds(data, cases.patients, target)
    if folds < LOGISTIC_FOLDS:
        notices.append(f"probe: {folds} folds, as a label has no more patients")
    splits = probe_splits(cases.patients, target, folds, share)
    if splits is None:
        raise UserError(f"--few_labels: with {100 * share:.0f} % of --probe {data} a label has no case: leave it out")
    y, path = one_hot(target.y, len(target.classes)), PATHS["classification"][PROBE]
    found = []
    for table, rows in zip(tables, cases.rows):
        repeats = [out_of_fold(path, table.features[rows], y, one) for one in splits]
        found.append([CaseScores(cases.patients, target.y, one.values, one.folds) for one in repeats])
    return found


def probe_cases(data: str, tables: Sequence[LoadedTable]) -> tuple[SharedCases, Target]:
    """The labelled cases that have features in all tables. Raises UserError."""
    labels = labels_of_probe(data)
    cases = join(tables, labels)
    with named_probe(data):
        return cases, encode_labels([labels.values[i] for i in cases.numbers], "classification", None)


def labels_of_probe(data: str) -> Labels:
    with named_probe(data):
        return read_labels(data, "label")


@contextlib.contextmanager
def named_probe(data: str) -> Iterator[None]:
    """A UserError that speaks of evaluate_features.py's flag speaks of --probe."""
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix(f"--labels {data}: ").removeprefix("--labels: ")
        raise UserError(f"--probe {data}: {text}") from error


def probe_folds(data: str, patients: Sequence[str], target: Target) -> int:
    """Raises UserError where a label has cases of one patient."""
    per_class = [len({p for p, y in zip(patients, target.y) if y == k}) for k in range(len(target.classes))]
    if min(per_class) < 2:
        lone = target.classes[int(np.argmin(per_class))]
        raise UserError(f"--probe {data}: label {lone} has cases of one patient, expected two or more")
    return min(LOGISTIC_FOLDS, *per_class)


def probe_splits(patients: Sequence[str], target: Target, folds: int, share: float) -> list[list[NestedSplit]] | None:
    """Of each repeat; None where this share of the training patients leaves a label without a case."""
    if share == 1:
        return nested_splits(patients, target.y, folds, LOGISTIC_REPEATS, seed=0)
    return fraction_splits(patients, target.y, folds, FEW_LABELS_REPEATS, 0, share)


def few_labels_of(data: str) -> tuple[tuple[str, ...], list[str]]:
    """(those of FEW_LABELS that --probe has patients enough for, lines on the others), by its labels alone. Raises
    UserError."""
    labels = labels_of_probe(data)
    table = LoadedTable("", "", labels.keys, None, {}, np.zeros((len(labels.keys), 1), np.float32), [""], [])
    cases, target = probe_cases(data, [table])
    folds = probe_folds(data, cases.patients, target)
    made = {name: probe_splits(cases.patients, target, folds, LABEL_SHARES[name]) for name in FEW_LABELS}
    lines = [
        f"--few_labels: {name} is left out: {100 * LABEL_SHARES[name]:.0f} % of the training patients of --probe "
        f"{data} are too few to hold every label"
        for name, splits in made.items()
        if splits is None
    ]
    return tuple(name for name, splits in made.items() if splits is not None), lines


def patients_of_masks(data: str) -> dict[str, str]:
    """{case: patient} of a table of masks; of a folder each case is a patient of its own."""
    if not data.lower().endswith((".csv", ".tsv")):
        return {}
    try:
        pairs, patients, *_ = pairs_of_list(data)
    except DataError as error:
        raise UserError(f"--segmentation {error}") from error
    return {pair.name: patient for pair, patient in zip(pairs, patients)}


def read_result(folder: Path) -> dict:
    """A run's metrics.json. Raises UserError."""
    path = folder / "metrics.json"
    try:
        return dict(read_json(path))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: can't be read ({error}); remove its folder, and start again") from error


def number_texts(texts: Sequence[str]) -> np.ndarray:
    """(N,) a number for each different text."""
    return np.unique(texts, return_inverse=True)[1]
