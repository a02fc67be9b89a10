"""Labels of cases, what they are (classes or values), and the cases that labels and all tables of features share."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dino3d.command_line import UserError, did_you_mean, truncate_list
from dino3d.data.conventions import DataError, stem
from dino3d.data.layouts import find_crops
from dino3d.data.lists import alike_but_for_case, is_missing, like_patient
from dino3d.data.points import AXES
from dino3d.data.requirements import alike_patients
from dino3d.evaluation.feature_tables import (
    LARGEST,
    LoadedTable,
    case_keys,
    find_column,
    first_of_each,
    format_key,
    known_patients,
    parse_number,
    parse_numbers,
    read_cells,
)

CASE_COLUMNS = ("name", "seriesuid", "case")  # of a table of labels, the first one that it has


class Labels(NamedTuple):
    """What is known of cases. keys: as in LoadedTable; values: as they stand in the table; patients: None where not
    told; other_names: {further name of a case: its number}; without: cases that have no label; maybe_patient: a column
    that by its name tells patients"""

    path: str
    keys: list[tuple]
    values: list[str]
    patients: list[str] | None
    other_names: dict[str, int]
    without: int
    maybe_patient: str | None = None


class Target(NamedTuple):
    """What is to be predicted. task: classification or regression; y: (N,) classes 0, 1, ... or values; classes: their
    names, none of values; said: in words"""

    task: str
    y: np.ndarray
    classes: list[str]
    said: str


class SharedCases(NamedTuple):
    """The cases that labels and all tables have, sorted. rows: of each table, (N,); numbers: (N,) of the labels"""

    names: list[str]
    numbers: np.ndarray
    patients: list[str]
    rows: list[np.ndarray]
    notices: list[str]


# --------------------------------------------------------------------------------------------------------------- labels


def read_labels(path: str, label_column: str) -> Labels:
    """Labels of a CSV (name, label and, where it has them, patient, coordX, coordY, coordZ), or of crops in label
    folders. Raises UserError."""
    if os.path.isdir(path):
        return _labels_of_folders(path)
    try:
        header, lines = read_cells(path)
    except OSError as error:
        raise UserError(f"--labels {path}: can't be read ({error.strerror or error})") from error
    place = {column: i for i, column in enumerate(header)}
    names_at = [column for one in CASE_COLUMNS if (column := find_column(header, one))]
    label_at, patient_at, *axes = (find_column(header, one) for one in (label_column, "patient", *AXES))
    if not names_at or label_at is None:
        missing = "name" if not names_at else label_column
        hint = did_you_mean(missing, header) or f", only {truncate_list(header)}"
        flag = "" if not names_at else " (--label_column names the labels')"
        raise UserError(f"--labels {path}: has no column {missing}{hint}{flag}")
    kept = [(number, cells) for number, cells in lines if not is_missing(cells[place[label_at]].strip())]
    without = len(lines) - len(kept)
    columns = [place[one] for one in (names_at[0], label_at, patient_at, *axes) if one is not None]
    kept = [kept[i] for i in first_of_each([tuple(cells[one].strip() for one in columns) for _, cells in kept])]
    if not kept:
        raise UserError(f"--labels {path}: none of its {len(lines)} cases has a label in column {label_column}")
    names = [cells[place[names_at[0]]].strip() for _, cells in kept]
    coordinates = [
        parse_numbers(path, number, axes, [cells[place[column]] for column in axes])
        for number, cells in (kept if None not in axes else [])
    ]
    if not np.isfinite(coordinates).all():
        raise UserError(f"--labels {path}: a place is not finite, expected mm in {', '.join(AXES)}")
    patients = [cells[place[patient_at]].strip() for _, cells in kept] if patient_at else None
    if patients is not None and not all(patients):
        raise UserError(f"--labels {path}: the patient of {names[patients.index('')]} is empty")
    values = [cells[place[label_at]].strip() for _, cells in kept]
    maybe = like_patient(column for column in header if column not in names_at)
    return Labels(path, case_keys(path, names, coordinates), values, patients, {}, without, maybe)


def _labels_of_folders(path: str) -> Labels:
    """Of crops as `subset*/label<k>/<patient>/<name>.nii.gz`."""
    try:
        crops, problems = find_crops(path)
    except DataError as error:
        raise UserError(f"--labels {error}") from error
    if not crops:
        raise UserError(f"--labels {problems[0]}")
    inside = [os.path.relpath(crop.path, path) for crop in crops]
    names = [os.path.join(os.path.dirname(one), stem(one)).replace(os.sep, "/") for one in inside]
    others = {}
    for i, name in enumerate(names):  # without the folders, where that tells them apart
        others.setdefault(name.rpartition("/")[2], []).append(i)
        others.setdefault("/".join(name.split("/")[2:]), []).append(i)
    alone = {name: numbers[0] for name, numbers in others.items() if len(numbers) == 1}
    return Labels(
        path,
        case_keys(path, names, []),
        [str(crop.label) for crop in crops],
        [crop.patient for crop in crops],
        alone,
        0,
    )


def encode_labels(values: Sequence[str], task: str, positive: str | None) -> Target:
    """What labels are, by their values alone or as --task says. Raises UserError where both readings are possible.

    Two different labels, or text, are classes; fractions are values; more than two different whole numbers may be
    either.
    """
    numbers = [_finite_number(value) for value in values]
    numeric = None not in numbers
    distinct = [f"{number:g}" for number in sorted(set(numbers))] if numeric else sorted(set(values))  # 1.0 is 1
    if task == "auto":
        if len(distinct) <= 2 or not numeric:
            task = "classification"
        elif any(not number.is_integer() for number in set(numbers)):
            task = "regression"
        else:
            raise UserError(
                f"--labels: {len(distinct)} different whole numbers ({truncate_list(distinct)}) may be classes or "
                "values: give --task classification or --task regression"
            )
    if task == "regression":
        if not numeric:
            text = values[numbers.index(None)]
            raise UserError(f"--labels: '{text[:40]}' is no finite number: --task regression predicts numbers")
        if positive is not None:
            raise UserError(f"--positive {positive}: is for two classes, the task is regression")
        y = np.array(numbers)
        if max(map(abs, numbers)) > LARGEST:
            raise UserError(f"--labels: {max(numbers, key=abs):g} is too large, expected numbers below {LARGEST:g}")
        if len(set(numbers)) < 3:
            raise UserError(
                f"--labels: the cases have {len(set(numbers))} different values: too few for --task regression"
            )
        return Target(task, y, [], f"regression: values from {y.min():g} to {y.max():g}")
    if len(set(numbers)) > len(distinct):
        raise UserError("--labels: some values differ by less than a millionth: such are no classes")
    values = [f"{number:g}" for number in numbers] if numeric else values
    if told := alike_but_for_case(distinct):
        raise UserError(f"--labels: {told}")
    if len(distinct) < 2:
        raise UserError(f"--labels: all {len(values)} cases have label {distinct[0]}: two classes are the least")
    if positive is not None:
        wanted = f"{_finite_number(positive):g}" if numeric and _finite_number(positive) is not None else positive
        if len(distinct) > 2 or wanted not in distinct:
            raise UserError(f"--positive {positive}: expected one of two labels, found {truncate_list(distinct)}")
        distinct.sort(key=wanted.__eq__)
    y = np.array([distinct.index(value) for value in values])
    counts = ", ".join(f"{name}: {count}" for name, count in zip(distinct, np.bincount(y)))
    if len(distinct) == 2:
        said = f"classification: label {distinct[1]} (positive) against {distinct[0]}; cases {counts}"
    else:
        said = f"classification of {len(distinct)} classes, each against the rest, and their mean; cases {counts}"
    return Target(task, y, distinct, said)


def _finite_number(text: str) -> float | None:
    try:
        value = parse_number(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------------------- joining


def join(tables: Sequence[LoadedTable], labels: Labels) -> SharedCases:
    """The cases that have a label and features in every table: differences of tables are then those of the same cases.

    Patients are those of the labels, else of the first table that knows any, else each case is one of its own; the
    notices say which, and how many cases were left out for what. Raises UserError.
    """
    found = [_rows_of(table, labels) for table in tables]
    shared = sorted(set.intersection(*map(set, found)), key=lambda number: labels.keys[number])
    notices = []
    for table, rows in zip(tables, found):
        lost = len(table.keys) - len(rows)
        reasons = len(table.reasons)
        if reasons:
            key, reason = next(iter(table.reasons.items()))
            notices.append(f"{table.path}: cases without features: {reasons}, such as {format_key(key)}: {reason}")
        if lost:
            notices.append(f"{table.path}: {lost} of {len(table.keys)} cases have no label in {labels.path}")
        if len(rows) < len(labels.keys):
            absent = [format_key(key) for number, key in enumerate(labels.keys) if number not in rows]
            notices.append(
                f"{table.path}: has no features of {len(absent)} of {len(labels.keys)} labelled cases: "
                f"{truncate_list(absent)}"
            )
    if labels.without:
        notices.append(f"{labels.path}: cases that have no label and are left out: {labels.without}")
    if not shared:
        raise UserError(
            f"--features: no case has a label and features in all {len(tables)} tables; " + "; ".join(notices)
        )
    if len(shared) < max(map(len, found)):
        notices.append(
            f"{len(shared)} cases have a label and features in every table; the others are left out of all, so that "
            "tables are compared by the same cases"
        )
    rows = [np.array([row[number] for number in shared]) for row in found]
    patients, said = _patients_of(tables, labels, shared, rows)
    names = [format_key(labels.keys[number]) for number in shared]
    return SharedCases(names, np.array(shared), patients, rows, [*notices, *said])


def _rows_of(table: LoadedTable, labels: Labels) -> dict[int, int]:
    """{number of a label: row of the table}. Raises UserError where none fits, or several do."""
    by_place = len(table.keys[0]) > 1 and len(labels.keys[0]) > 1
    numbers = {}
    for number, key in enumerate(labels.keys):
        key = key if by_place else key[:1]
        if key in numbers:
            raise UserError(
                f"--labels {labels.path}: {key[0]} stands several times, and {table.path} has no coordX, coordY, "
                "coordZ to tell its points apart"
            )
        numbers[key] = number
    rows = {}
    for row, key in enumerate(table.keys):
        key = key if by_place else key[:1]
        number = numbers.get(key, labels.other_names.get(key[0]))
        if number in rows:
            raise UserError(
                f"{table.path}: {format_key(table.keys[rows[number]])} and {format_key(table.keys[row])} both belong "
                f"to the label of {format_key(labels.keys[number])} in {labels.path}: expected one each"
            )
        if number is not None:
            rows[number] = row
    if not rows:
        raise UserError(
            f"{table.path}: none of its {len(table.keys)} names is in {labels.path}: found {format_key(table.keys[0])}"
            f", expected names such as {format_key(labels.keys[0])}"
        )
    return rows


def _patients_of(
    tables: Sequence[LoadedTable], labels: Labels, shared: Sequence[int], rows: Sequence[np.ndarray]
) -> tuple[list[str], list[str]]:
    """(patients of the shared cases, notices)."""
    told, notices = {}, []  # {table: (patients, of how many cases it knows none)}
    for table, places in zip(tables, rows):
        if table.patients is not None:
            alone = int((~known_patients(table)[places]).sum())
            told[table.path] = [table.patients[place] for place in places], alone
    knowing = {path: one for path, one in told.items() if one[1] < len(shared)}
    if labels.patients is not None:
        source, chosen, alone = labels.path, [labels.patients[number] for number in shared], 0
    else:
        names = [format_key(labels.keys[number]) for number in shared]
        source, (chosen, alone) = next(iter((knowing or told).items()), ("", (names, len(shared))))
    if alone:
        notices.append(_alone_notice(labels, source, chosen, alone))
    if alone == len(shared):
        return chosen, notices
    for path, (patients, _) in knowing.items():
        if _grouping(patients) != _grouping(chosen):
            if labels.patients is None:
                raise UserError(
                    f"{path}: groups the cases to other patients than {source}: give the right ones as column "
                    "patient of --labels"
                )
            return chosen, [f"{path}: groups the cases to other patients than {source}, whose are taken"]
    notices += [line.removeprefix("warning: ") for line in alike_patients(chosen, source)]
    return chosen, notices


def _alone_notice(labels: Labels, source: str, chosen: Sequence[str], alone: int) -> str:
    """What to say where nothing tells whose `alone` of the cases are.

    source: the table whose patients are chosen, "" where none has any
    Raises UserError where a column of the labels may tell it by its name.
    """
    if labels.maybe_patient:
        without = f", and {source} knows {alone} of {len(chosen)} cases by their own names alone" if source else ""
        raise UserError(
            f"{labels.path}: has no column patient, but {labels.maybe_patient}{without}: does it tell whose the cases "
            "are, call it patient, so that no patient is in two folds; else leave it out"
        )
    leak = "where patients have several, intervals are then too narrow and folds leak"
    if alone < len(chosen):
        return (
            f"{source}: the patient of {alone} of {len(chosen)} cases is but their own name: each such name is taken "
            f"for a patient of its own; {leak}"
        )
    what = "case" if len(set(chosen)) == len(chosen) else "scan"  # the points of one stay together
    return f"neither {labels.path} nor the tables tell patients: each {what} is taken for a patient of its own; {leak}"


def _grouping(patients: Sequence[str]) -> list[int]:
    """Number of the first case of each case's patient: equal where patients are but called otherwise."""
    first = {}
    return [first.setdefault(patient, i) for i, patient in enumerate(patients)]
