"""Folds by patient: a fixed test set and k folds, or rotating subsets. Imports no torch.

Cases are numbered by their place in the sorted list of the data set; a case's name is its path below --data_dir without
suffix.
"""

import collections
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.evaluation.protocols import count_by_patient, divide
from dino3d.files import read_json, write_json
from dino3d.finetune.same_data import require_same_data

NUM_TEST = 37  # cases of the paper's test set


class Split(NamedTuple):
    """Patients of one fold's three sides."""

    train: list[str] | np.ndarray
    validation: list[str] | np.ndarray
    test: list[str] | np.ndarray


def default_num_test(cases: int) -> int:
    """37 cases, or a fifth where that is less than a tenth or more than a third of them."""
    return NUM_TEST if cases / 10 <= NUM_TEST <= cases / 3 else max(1, round(cases / 5))


def patient_splits(
    patients: Sequence[str], labels: Sequence[int], num_test: int | None, k_fold: int, seed: int
) -> list[Split]:
    """[Split] of k folds: one fixed test set, and each fold validates on its part of the other patients.

    patients, labels: of each case; num_test: cases, None: `default_num_test`. Raises UserError.
    """
    names, counts = count_by_patient(patients, labels)
    if len(names) < k_fold + 1:
        raise UserError(
            f"{len(names)} patients are too few for a test set and --k_fold {k_fold}, expected at least "
            f"{k_fold + 1}: lower --k_fold (2 or more) or add patients",
            everywhere=True,
        )
    wanted = default_num_test(len(labels)) if num_test is None else num_test
    if wanted >= len(labels):
        raise UserError(f"--num_test {wanted}: there are only {len(labels)} cases; lower it", everywhere=True)
    rng = np.random.default_rng(np.random.SeedSequence((seed, len(names))))
    share = wanted / len(labels)
    tested = divide(counts, (share, 1 - share), rng) == 0
    rest = np.flatnonzero(~tested)
    if len(rest) < k_fold:
        raise UserError(
            f"{len(rest)} patients besides the {tested.sum()} of the test set are too few for --k_fold "
            f"{k_fold}: lower --k_fold or --num_test",
            everywhere=True,
        )
    folds = divide(counts[rest], np.full(k_fold, 1 / k_fold), rng)
    return [
        Split(
            [names[i] for i in rest[folds != fold]],
            [names[i] for i in rest[folds == fold]],
            [names[i] for i in np.flatnonzero(tested)],
        )
        for fold in range(k_fold)
    ]


def subset_splits(patients: Sequence[str], subsets: Sequence[str]) -> list[Split]:
    """[Split] in which each subset is tested once, the next one validates and the rest trains. Raises UserError."""
    members = {}
    for patient, subset in zip(patients, subsets):
        members.setdefault(subset, set()).add(patient)
    names = sorted(members, key=lambda name: (len(name), name))  # subset10 after subset9
    if names == [""]:
        raise UserError("--folds subsets: the --data_list has no column subset; take --folds patients", everywhere=True)
    if len(names) < 3:
        raise UserError(
            "--folds subsets needs at least 3 subsets (test, validation, training), found "
            f"{', '.join(names)}; take --folds patients",
            everywhere=True,
        )
    splits = []
    for test, name in enumerate(names):
        validation = names[(test + 1) % len(names)]
        train = set().union(*(members[other] for other in names if other not in (name, validation)))
        splits.append(Split(sorted(train), sorted(members[validation]), sorted(members[name])))
    return splits


def labelled_share(
    splits: Sequence[Split], fraction: float, seed: int, patients: Sequence[str], labels: Sequence[int]
) -> list[Split]:
    """Splits with this share of each fold's training patients, and the other sides as they are.

    patients, labels: of each case. Each kind of patient, by the labels that he has, keeps its share; the patients of a
    smaller fraction are among those of a larger one. Raises UserError where a label is left to nobody.
    """
    labels_of, shared = collections.defaultdict(set), []
    for patient, label in zip(patients, labels):
        labels_of[patient].add(int(label))
    for fold, split in enumerate(splits):
        everybody = sorted(split.train)
        kinds = [frozenset(labels_of[patient]) for patient in everybody]
        order, least = stratified_order(kinds, np.random.default_rng(np.random.SeedSequence((seed, fold))))
        count = max(1, round(fraction * len(everybody)))
        if count < least:
            left = set().union(*(kinds[i] for i in order[:count]))
            missing = ", ".join(f"label{label}" for label in sorted(set().union(*kinds) - left))
            raise UserError(
                f"--label_fraction {fraction:g} leaves {count} of {len(everybody)} training patients in fold {fold}, "
                f"none of them with {missing}; take {math.ceil(100 * least / len(everybody)) / 100:g} or more",
                everywhere=True,
            )
        shared.append(split._replace(train=[everybody[i] for i in sorted(order[:count])]))
    return shared


def stratified_order(kinds: Sequence[frozenset[int]], rng: np.random.Generator) -> tuple[list[int], int]:
    """(numbers of patients in an order of which every beginning is stratified, how many of them have all labels).

    kinds: the labels of each patient
    """
    seen, place, size = collections.Counter(), {}, collections.Counter(kinds)
    for i in rng.permutation(len(kinds)).tolist():
        place[i] = (seen[kinds[i]] + 0.5) / size[kinds[i]]  # of his kind, from 0 to 1
        seen[kinds[i]] += 1
    order = sorted(place, key=place.get)  # stable: equal places stay in random order
    first, found = [], set()
    carriers = collections.Counter(label for kind in kinds for label in kind)
    for label in sorted(carriers, key=lambda label: (carriers[label], label)):  # the rarest first
        if label not in found:
            first.append(next(i for i in order if label in kinds[i]))
            found |= kinds[first[-1]]
    return [*first, *(i for i in order if i not in first)], len(first)


def training_patients(splits: Sequence[Split], patients: int) -> list[tuple[int, int]]:
    """[(patients that a fold trains on, those that it would train on without --label_fraction)]. patients: in all"""
    return [(len(split.train), patients - len(split.validation) - len(split.test)) for split in splits]


def fraction_text(splits: Sequence[Split], patients: int, fraction: float) -> str:
    """What a run's summary says of --label_fraction; "" where it is 1. patients: in all"""
    if fraction == 1:
        return ""
    used, whole = (
        f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{min(counts)}"
        for counts in zip(*training_patients(splits, patients))
    )
    return f"; {used} of {whole} training patients (--label_fraction {fraction:g})"


def make_splits(
    path: Path,
    folds: str,
    k_fold: int,
    num_test: int | None,
    seed: int,
    patients: Sequence[str],
    labels: Sequence[int],
    subsets: Sequence[str],
    known: Sequence[str],
    digest: str | None = None,
    label_fraction: float = 1,
    contents: dict[str, str] | None = None,
) -> tuple[list[Split], dict[str, Any]]:
    """(splits, data) of a run: from its splits.json or, for a new one, made; data: {name: value} that they depend on.

    patients, labels, subsets: of each case; known: names that a splits.json has in its data besides
    digest: what changes when the --data_list does, None for a --data_dir
    label_fraction: see `labelled_share`
    contents: of the files, see `same_data.contents_of`; a splits.json of an older version has none, and takes these
    Raises UserError, also where splits.json is of other flags, patients or files.
    """
    described = {
        "folds": folds,
        "k_fold": k_fold,
        "num_test": num_test,
        "seed": seed,
        "cases": np.bincount(labels).tolist(),
        "patients": len(set(patients)),
        "data_list": digest,
        "label_fraction": None if label_fraction == 1 else label_fraction,  # older files have none
    }
    files = {} if contents is None else {"files": contents}
    saved = load_splits(path, described, known)
    if saved is None:
        splits = (
            subset_splits(patients, subsets)
            if folds == "subsets"
            else patient_splits(patients, labels, num_test, k_fold, seed)
        )
        if label_fraction < 1:
            splits = labelled_share(splits, label_fraction, seed, patients, labels)
        return splits, described | files
    splits, data = saved
    named = [{patient for side in split for patient in side} for split in splits]
    if any(some - set(patients) or label_fraction == 1 and some != set(patients) for some in named):
        raise UserError(f"{path}: names other patients than the data; choose another --output_dir")
    if files and "files" in data:
        files = {"files": require_same_data(path, data["files"], contents)}
    return splits, data | files


def of_patients(chosen: Iterable[str], patients: Sequence[str]) -> np.ndarray:
    """(n,) numbers of the cases whose patient is among the chosen. patients: of each case."""
    chosen = set(chosen)
    return np.array([i for i, patient in enumerate(patients) if patient in chosen], int)


def load_splits(
    path: Path, described: dict[str, Any], known: Sequence[str]
) -> tuple[list[Split], dict[str, Any]] | None:
    """(splits, data) of a splits.json, or None where there is no file.

    described: {name: value} of what they depend on; raises UserError where the file says otherwise, or lacks a `known`
    name.
    """
    if not os.path.exists(path):
        return None
    try:
        saved = read_json(path)
        splits, data = (
            [Split(*(split[side] for side in Split._fields)) for split in saved["splits"]],
            dict(saved["data"]),
        )
        if not splits or not all(
            isinstance(side, list) and all(isinstance(patient, str) for patient in side)
            for split in splits
            for side in split
        ):
            raise ValueError("its splits are no lists of patients")
        if not isinstance(data.get("files", {}), dict):
            raise ValueError("its files are no names with their contents")
        missing = [name for name in known if name not in data]
        if missing:
            raise KeyError(missing[0])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: can't be read ({error}); move it away to start anew") from error
    for name, value in described.items():
        if data.get(name) != value:
            found = " ".join(str(data.get(name)).split())[:100]
            raise UserError(
                f"{path}: is of a run with {name} {found}, now it is {value}; resume with the same data and flags "
                "or choose another --output_dir"
            )
    return splits, data


def save_splits(path: Path, splits: Sequence[Split], described: dict[str, Any]) -> None:
    """Write splits.json: what the folds depend on, and the patients of each side."""
    write_json(path, {"data": described, "splits": [split._asdict() for split in splits]})
