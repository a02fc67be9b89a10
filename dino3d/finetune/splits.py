"""Folds by patient: a fixed test set and k folds, or rotating subsets. Imports no torch.

Cases are numbered by their place in the sorted list of the data set; a case's name is its path below --data_dir without
suffix.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.evaluation.protocols import count_by_patient, divide
from dino3d.files import read_json, write_json

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
) -> tuple[list[Split], dict[str, Any]]:
    """(splits, data) of a run: from its splits.json or, for a new one, made; data: {name: value} that they depend on.

    patients, labels, subsets: of each case; known: names that a splits.json has in its data besides
    digest: what changes when the --data_list does, None for a --data_dir
    Raises UserError, also where splits.json is of other flags or patients.
    """
    described = {
        "folds": folds,
        "k_fold": k_fold,
        "num_test": num_test,
        "seed": seed,
        "cases": np.bincount(labels).tolist(),
        "patients": len(set(patients)),
        "data_list": digest,
    }
    saved = load_splits(path, described, known)
    if saved is None:
        splits = (
            subset_splits(patients, subsets)
            if folds == "subsets"
            else patient_splits(patients, labels, num_test, k_fold, seed)
        )
        return splits, described
    if any({patient for side in split for patient in side} != set(patients) for split in saved[0]):
        raise UserError(f"{path}: names other patients than the data; choose another --output_dir")
    return saved


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
