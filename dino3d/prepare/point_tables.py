"""Tables of points for prepare_data.py luna16 --table: one's own, and the published training, validation and test
tables of a task.

FMCIB (Pai et al. 2024, Nature Machine Intelligence) publishes the malignancy of LUNA16's nodules as task2_train.csv,
task2_val.csv and task2_test.csv. They name a scan by image_path, a path whose file is <seriesuid>.mhd, and have
coordX, coordY, coordZ in LPS mm like LUNA16's own tables. The split is by nodule: scans stand in several of them.
"""

import collections
import contextlib
import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino3d.command_line import UserError, truncate_list
from dino3d.data.conventions import stem
from dino3d.data.points import AXES, MAX_LABELS, Point, read_numbers, read_points
from dino3d.files import delimiter_of, write_table
from dino3d.prepare.inputs import safe_name

SERIES, IMAGE_PATH = "seriesuid", "image_path"
# Part of a split: words for it in a table's file name. `subset_splits` orders subsets by length, then name: of these
# three, fold 0 of --folds subsets tests on the first, validates on the second and trains on the third
SPLIT_PARTS = {"test": ("test", "testing"), "valid": ("valid", "val", "validation"), "training": ("training", "train")}
PUBLISHED, BY_PATIENT = "published_split.csv", "by_patient.csv"


class Placed(NamedTuple):
    """A point that has a crop: the part of the split, whose it is, its label, the crop's path below the output."""

    part: str
    patient: str
    label: int
    output: str


def read_point_tables(tables: Sequence[Path], label_column: str) -> tuple[dict[str, list[Point]], dict[str, str]]:
    """({series: [Points]}, {Point.table: part of the split}) of one table, or of the three parts of a published split.

    One table with seriesuid is read as `read_points` does; of others each point must have a label, and each place one.
    A single table has no parts. Prints what a split's parts have in common. Raises UserError.
    """
    names = [safe_name(stem(table.stem), "table") for table in tables]
    parts = split_parts(tables) if len(tables) > 1 else []
    points, strict = collections.defaultdict(list), bool(parts)
    for table, name in zip(tables, names):
        header = columns_in(table)
        by_path = _has(header, IMAGE_PATH) and not _has(header, SERIES)
        strict = strict or by_path
        if strict and not _has(header, label_column):
            raise UserError(
                f"{table}: has no column {label_column}, only {truncate_list(header or ['nothing'], 8)}; "
                "--label_column names the labels'"
            )
        found = (
            read_image_paths(table, label_column)
            if by_path
            else read_points(table, label_column, bool(parts) or label_column != "class")
        )
        if parts:
            require_labels(found, table, label_column)
        for series, those in found.items():
            points[series] += [point._replace(table=name) for point in those]
    points = unique_places(points, strict, keeps_repeats=not strict)
    parts = dict(zip(names, parts))
    for line in describe_split(points, parts) if parts else ():
        print(line)
    return points, parts


def columns_in(path: Path) -> list[str]:
    """Names of a table's columns, as they stand there; none of what is no table, which its reader refuses."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file, contextlib.suppress(csv.Error):
        line = file.readline()
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter_of(line, AXES)), [])]
    return []


def _has(header: Sequence[str], name: str) -> bool:
    return name.lower() in [column.lower() for column in header]


def split_parts(tables: Sequence[Path]) -> list[str]:
    """Which part of the split each table is, by the words of its file's name. Raises UserError unless there is one of
    each."""
    words = [re.findall("[a-z]+", table.name.lower()) for table in tables]
    named = [[part for part, known in SPLIT_PARTS.items() if set(known) & set(those)] for those in words]
    if sorted(named) != sorted([part] for part in SPLIT_PARTS):
        said = ", ".join(f"{table.name} ({' and '.join(found) or 'none'})" for table, found in zip(tables, named))
        raise UserError(
            f"--table: several are the parts of one split, a table each with train, val and test in its name "
            f"(task2_train.csv, task2_val.csv, task2_test.csv), found {said}"
        )
    return [part for (part,) in named]


def read_image_paths(path: Path, label_column: str) -> dict[str, list[Point]]:
    """{series: [Points]} of a table that names scans by the column image_path; see the top of this file.

    Raises UserError for a row without scan, point (LPS mm) or label, and for a table without rows.
    """
    points = collections.defaultdict(list)
    for line, row in read_numbers(path, [IMAGE_PATH], [*AXES, label_column]):
        series = stem(re.split(r"[/\\]", row[IMAGE_PATH])[-1])
        if not series:
            raise UserError(f"{path}: line {line} has no file in {IMAGE_PATH}, expected .../<seriesuid>.mhd")
        try:
            position = tuple(float(row[axis]) for axis in AXES)
            if not np.isfinite(position).all():
                raise ValueError
        except ValueError:
            raise UserError(f"{path}: line {line} has no numbers in {', '.join(AXES)}") from None
        try:
            label = float(row[label_column])
            if not (0 <= label < MAX_LABELS and label.is_integer()):
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}: line {line}: {label_column} is '{row[label_column][:50]}', expected a whole number from 0 "
                f"to {MAX_LABELS - 1}"
            ) from None
        points[series].append(Point("", line, position, int(label)))
    if not points:
        raise UserError(f"{path}: holds no points, expected a row for each below its header")
    return dict(points)


def require_labels(points: Mapping[str, Iterable[Point]], table: Path, label_column: str) -> None:
    """Raise UserError for a point that is none or has no label: a published split is taken whole."""
    for series, those in points.items():
        for point in those:
            if point.problem or point.label is None:
                why = point.problem or f"has nothing in {label_column}, expected a whole number from 0 on"
                raise UserError(f"{table}: line {point.line} ({series}): {why}")


def place_of_point(position: Iterable[float]) -> tuple[float, ...]:
    """A position in mm as it tells points apart: to 0.01 mm."""
    return tuple(round(x, 2) + 0.0 for x in position)


def unique_places(
    points: Mapping[str, Sequence[Point]], strict: bool = False, keeps_repeats: bool = False
) -> dict[str, list[Point]]:
    """Points without those that an earlier row of the same table has in the same place (to 0.01 mm), which is told.

    strict: raise UserError where one place has two labels, in one table or in two; else that alone is told
    keeps_repeats: tell of them, and keep them
    """
    kept, again, shared, unlike = {}, [], [], []
    for series, those in points.items():
        kept[series], seen = [], collections.defaultdict(list)
        for point in those:
            same = [] if point.problem or point.label is None else seen[place_of_point(point.position)]
            at = f"{point.table} line {point.line}"
            if other := next((one for one in same if one.label != point.label), None):
                unlike.append(
                    f"scan {series} has two labels in one place, of one nodule: {other.label} in {other.table} line "
                    f"{other.line}, {point.label} in {at}"
                )
            twice = any((one.table, one.label) == (point.table, point.label) for one in same)
            again += [at] * twice
            shared += [at] * (bool(same) and not twice)
            same.append(point)
            kept[series] += [point] * (not twice)
    if unlike and strict:
        raise UserError(f"--table: {unlike[0]}; {len(unlike)} such points, correct their labels")
    if unlike:
        print(f"warning: {len(unlike)} points have another label than an earlier one: {unlike[0]}")
    if again:
        done = "taken twice" if keeps_repeats else "left out"
        print(f"note: {len(again)} points repeat an earlier one of their table and are {done}: {truncate_list(again)}")
    if shared:
        print(
            f"warning: {len(shared)} points stand in two parts of the split, so that one nodule is trained on and "
            f"tested: {truncate_list(shared)}"
        )
    return dict(points) if keeps_repeats else kept


# --------------------------------------------------------------------------------------------------- a published split


def describe_split(points: Mapping[str, Sequence[Point]], parts: Mapping[str, str]) -> list[str]:
    """Lines on the parts of a split: points, labels, scans, and how many scans stand in an earlier part too."""
    scans, labels = (
        {part: collections.Counter() for part in SPLIT_PARTS},
        {part: collections.Counter() for part in SPLIT_PARTS},
    )
    for series, those in points.items():
        for point in those:
            scans[parts[point.table]][series] += 1
            labels[parts[point.table]][point.label] += 1
    lines = []
    for part in SPLIT_PARTS:
        kinds = ", ".join(f"{labels[part][label]} of label {label}" for label in sorted(labels[part]))
        lines.append(f"{part}: {labels[part].total()} points in {len(scans[part])} scans ({kinds})")
    for part, other in (("test", "training"), ("test", "valid"), ("valid", "training")):
        if both := scans[part].keys() & scans[other].keys():
            lines.append(
                f"warning: {len(both)} of {len(scans[part])} {part} scans also stand in {other}, with "
                f"{sum(scans[part][series] for series in both)} of {labels[part].total()} {part} points: this split "
                "is not by patient"
            )
    return lines


def write_split(
    output: Path,
    placed: Sequence[Placed],
    points: Mapping[str, Sequence[Point]],
    parts: Mapping[str, str],
    patient_of_series: Mapping[str, str],
) -> None:
    """Write the two lists of crops for main_lnc_luna16.py --data_list, and print what they hold.

    published_split.csv has all crops in the parts of the tables; a patient of two parts is called a patient of each,
    since training refuses one on two sides. by_patient.csv has the same test part, without what valid and training
    have of its patients, and training without those of valid.
    """
    total, first = collections.Counter(), {}
    for series, those in points.items():
        patient = patient_of_series.get(series) or series
        for part in (parts[point.table] for point in those):
            total[part] += 1
            first[patient] = min(first.get(patient, part), part, key=list(SPLIT_PARTS).index)
    apart = [one for one in placed if first[one.patient] == one.part]
    lists = {PUBLISHED: [one._replace(patient=f"{one.patient}@{one.part}") for one in placed], BY_PATIENT: apart}
    for name, rows in lists.items():
        cells = sorted((one.output, one.label, one.patient, one.part) for one in rows)
        write_table(output / name, ["path", "label", "patient", "subset"], cells)
        count = collections.Counter(one.part for one in rows)
        said = ", ".join(f"{part} {count[part]} of {total[part]}" for part in SPLIT_PARTS)
        print(f"{output / name}: {said} points")
    if missing := total.total() - len(placed):
        print(
            f"warning: {missing} of the split's {total.total()} points have no crop, {output / 'manifest.csv'} tells "
            "why: figures on the others are not those of the whole split"
        )
