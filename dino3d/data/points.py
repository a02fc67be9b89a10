"""Tables of points in CTs, the scans that they name, and the crops around them.

A table has the columns seriesuid, coordX, coordY and coordZ, in LPS mm as DICOM and LUNA16 have them. The converter,
the extraction of features and the prediction of points read such a table, find its scans and cut its crops here.
"""

import collections
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import images, resampling
from dino3d.data.conventions import DataError, stem
from dino3d.data.layouts import UNLABELLED, is_label_path
from dino3d.data.requirements import require_ct, too_bright
from dino3d.data.scans import Scan, find_scans
from dino3d.data.volume import Volume
from dino3d.files import read_rows

if TYPE_CHECKING:
    import SimpleITK as sitk

AXES = ("coordX", "coordY", "coordZ")
MAX_LABELS = 1000  # more classes than anyone has; what is beyond is no label


class Point(NamedTuple):
    """A row of a table: its line there, LPS mm, its label, a nodule's diameter in mm or "", and what is wrong with
    it."""

    table: str
    line: int
    position: tuple[float, ...]
    label: int | None
    diameter: str = ""
    problem: str = ""


def read_points(path: Path | str, label_column: str | None = None, needs_label: bool = False) -> dict[str, list[Point]]:
    """{series: [Points]} of a table with columns seriesuid, coordX, coordY, coordZ (LPS mm), in the table's order.

    label_column: of their labels, None: they have none; needs_label: refuse a table without that column
    Raises UserError for a table without these columns or without rows.
    """
    points, name, column = collections.defaultdict(list), stem(Path(path).stem), label_column or ""
    label = [column] if column else []
    rows = read_numbers(path, ["seriesuid"], [*AXES, *(label if needs_label else ())], () if needs_label else label)
    if not rows:
        raise UserError(f"{path}: holds no points, expected a row for each below {', '.join(('seriesuid', *AXES))}")
    for line, row in rows:
        position, value, problem = (), None, ""
        try:
            position = tuple(float(row[axis]) for axis in AXES)
            if not np.isfinite(position).all():
                raise ValueError
        except ValueError:
            problem = f"not a point: {row['coordX']}, {row['coordY']}, {row['coordZ']}"
        try:
            if text := row.get(column, ""):
                if not 0 <= (number := float(text)) < MAX_LABELS or not number.is_integer():
                    raise ValueError
                value = int(number)
        except ValueError:
            problem = (
                f"not a label: {column} is '{row[column][:50]}', expected a whole number from 0 to {MAX_LABELS - 1}"
            )
        points[row["seriesuid"]].append(Point(name, line, position, value, problem=problem))
    without = sum(point.label is None and not point.problem for of_series in points.values() for point in of_series)
    if without and column:
        told = "" if any(column in row for _, row in rows) else f" (it has no column {column})"
        print(f"note: {without} points of {path} have no label{told}: their crops go to subset*/{UNLABELLED}")
    return dict(points)


def read_numbers(
    path: Path | str, columns: Sequence[str], numbers: Sequence[str], optional: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """[(line, {column: text})] of a table; decimal commas in the columns of numbers are points then, and are told.

    optional: more columns of numbers, if it has them. Raises UserError where commas and points stand in the numbers.
    """
    rows = list(read_rows(path, [*columns, *numbers], optional))
    cells = [
        (line, row[name])
        for line, row in rows
        for name in (*numbers, *optional)
        if name in row and re.fullmatch(r"[+-]?[\d.,]+(e[+-]?\d+)?", row[name], re.I)
    ]
    commas = [cell for cell in cells if "," in cell[1]]
    points = [cell for cell in cells if "." in cell[1]]
    if not commas:
        return rows
    if points:
        (line, comma), (other, point) = commas[0], points[0]
        raise UserError(
            f"{path}: has {comma} in line {line} and {point} in line {other}: which of them is the decimal sign? Write "
            "all numbers in one way"
        )
    print(f"note: {path}: its numbers have decimal commas, such as {commas[0][1]} in line {commas[0][0]}")
    named = {*numbers, *optional}
    return [
        (line, {key: text.replace(",", ".") if key in named else text for key, text in row.items()})
        for line, row in rows
    ]


def scans_of_series(
    folder: Path | str, skip: Sequence[Path | str], wanted: Collection[str], workers: int
) -> tuple[dict[str, list[Scan]], dict[str, str]]:
    """({series: Scans} of the volumes that are named by their series and of the DICOM series, {series: why its scan is
    not to be taken} of the others).

    skip: folders that are not looked into
    wanted: series of the tables; the converter's own files of one name have a hash behind it
    workers: processes that read headers, 0: this one
    Where there are subset folders, only what lies in them; masks, which bear the same names, nowhere. Raises UserError
    for a folder that can't be listed.
    """

    def series_of(scan: Scan) -> str:
        series = scan.header.series if scan.header else stem(scan.name)
        hashed = re.fullmatch(r"(.+)-[0-9a-f]{8}", series)
        return hashed[1] if hashed and series not in wanted and hashed[1] in wanted else series

    if not os.path.isdir(folder):
        raise UserError(
            f"{folder}: is " + ("a file, expected a folder" if os.path.exists(folder) else "no such folder")
        )
    everything = find_scans(folder, skip, workers)
    unlisted = [scan.problem for scan in everything.problems if "can't be listed" in scan.problem.reason]
    if unlisted:
        raise UserError(str(unlisted[0]))
    found = collections.defaultdict(list)
    for scan in everything.scans:
        if not is_label_path(scan.name):
            found[series_of(scan)].append(scan)
    in_subsets = {series: [scan for scan in scans if _in_subset(scan.name)] for series, scans in found.items()}
    in_subsets = {series: scans for series, scans in in_subsets.items() if scans}
    refused = {series_of(scan): scan.problem.reason for scan in everything.problems}
    return in_subsets or dict(found), refused


def _in_subset(scan: str) -> bool:
    """Whether a path leads through a subset folder."""
    return any(part.startswith("subset") for part in scan.split(os.sep)[:-1])


def why_no_scan(scans: Sequence[Scan], refused: str, folder: Path | str) -> str:
    """Why a series has no scan to cut crops from, "" where it has one. scans, refused: of `scans_of_series`"""
    if len(scans) > 1:
        return f"two scans of one series: {scans[0].name} and {scans[1].name}"
    if not scans:
        return f"its scan can't be taken: {refused}" if refused else f"no scan of this series below {folder}"
    return ""


def patient_of_scan(scan: Scan, series: str) -> str:
    """Whose a scan is: as its DICOM header says or the folder in which the converter put it, else the series itself."""
    if scan.header:
        return scan.header.patient or series
    converted = re.fullmatch(r"(?:.*/)?([^/]+)/t\d+/[^/]+", scan.name.replace(os.sep, "/"))
    return converted[1] if converted else series


def open_ct(path: Path | str) -> tuple["sitk.Image", list[str]]:
    """(the image of a CT in RAS, lines on what can be read in two ways or is too bright) to cut crops from.

    Raises DataError, LeftOut for what is no CT in HU.
    """
    with Volume(path) as volume:
        voxels, notes = volume.read(), list(volume.notes)
        require_ct(voxels, path)
        return images.make_image(voxels, volume.affine), [*notes, *filter(None, [too_bright(voxels)])]


def crop_around(
    image: "sitk.Image", point: Point, size: Sequence[int], spacing: Sequence[float] | None, source: str
) -> "sitk.Image":
    """The crop around a Point that training sees, in memory as in a file; see `resampling.crop_at`.

    size: (3,) voxels; spacing: (3,) mm, None: the image's own; source: what to call the point in an error
    Raises DataError for a point that is none or lies outside.
    """
    if point.problem:
        raise DataError(source, point.problem)
    return resampling.crop_at(image, point.position, size, spacing, source)
