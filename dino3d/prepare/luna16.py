"""prepare_data.py luna16: crops around the points of LUNA16's tables, or of one's own, into the classification
layout."""

import collections
import os
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import images, resampling
from dino3d.data.conventions import DataError, stem
from dino3d.data.layouts import UNLABELLED, is_label_path
from dino3d.data.requirements import require_ct, too_bright
from dino3d.data.scans import File, Scan, find_scans
from dino3d.data.volume import Volume
from dino3d.files import read_rows
from dino3d.prepare.conversion import (
    FAILED,
    LEFT_OUT,
    Job,
    Output,
    convert_all,
    fingerprint,
    note_of,
    open_output,
    report_outcome,
)
from dino3d.prepare.inputs import IMAGE_COLUMNS, companions, image_statistics, safe_name

LUNA16_COLUMNS = ["source", "output", "patient", "label", "x", "y", "z", "diameter_mm", *IMAGE_COLUMNS]
NEGATIVES_PER_SCAN = 20  # of LUNA16's 850 candidates
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


class CropTask(NamedTuple):
    """A scan and the Points to crop around, with their outputs' paths; or why there are none (status, reason).

    source: relative to the input, as `Volume` opens it
    """

    source: str
    files: list[File]
    patient: str
    points: list[Point]
    outputs: list[str]
    status: str = ""
    reason: str = ""


def luna16(
    input: Path,
    output: Path,
    workers: int,
    size: Sequence[int],
    spacing: Sequence[float],
    negatives_per_scan: int | None,
    seed: int,
    table: Path | None,
    label_column: str,
    patients: Path | None,
) -> None:
    """Crops around the points of LUNA16's tables, or of one's own, into the classification layout."""
    if negatives_per_scan is None and table is None:
        negatives_per_scan = NEGATIVES_PER_SCAN
    recipe = {
        "command": "luna16",
        "size": size,
        "spacing": spacing,
        "negatives_per_scan": negatives_per_scan,
        "seed": seed,
        "label_column": label_column,
    }
    with open_output(output, recipe) as records:
        points = read_points(table, label_column, label_column != "class") if table else read_candidates(input)
        found = scans_of_series(input, output, set(points), workers)
        scans = {series: [scan.name for scan in of_series] for series, of_series in found.items()}
        patient_of_series = (
            read_patients(patients)
            if patients
            else {series: patient_of_scan(of_series[0], series) for series, of_series in found.items()}
        )
        subset_of_patient, tasks = {}, []
        for series in sorted({*points, *scans}):
            of_series, patient = scans.get(series, []), patient_of_series.get(series, "")
            chosen = draw_points(points.get(series, []), negatives_per_scan, seed, series)
            against = reason_unusable(points.get(series, []), chosen, of_series, patient, patients)
            if against:
                tasks.append(CropTask(of_series[0] if of_series else series, [], patient, [], [], *against))
                continue
            # All scans of a patient go where the first of them lies: folds by subset must not share patients
            subset = subset_of_patient.setdefault(patient, subset_of(of_series[0]) or "subset0")
            outputs = [
                f"{subset}/{UNLABELLED if point.label is None else f'label{point.label}'}/"
                f"{safe_name(patient, 'unknown')}/{point.table}_{point.line:06d}.nii.gz"
                for point in chosen
            ]
            files = [*found[series][0].files, *companions(input, of_series[0])]
            tasks.append(CropTask(of_series[0], files, patient, chosen, outputs))
        jobs = [
            Job(
                tuple(f"{task.source}{point_id(point)}" for point in task.points) or (task.source,),
                fingerprint(task),
                (str(input), size, spacing if any(spacing) else None, task),
            )
            for task in tasks
        ]
        outcome = convert_all(convert_crops, jobs, records, LUNA16_COLUMNS, workers, "scan")
    report_outcome(outcome)


def reason_unusable(
    points: Sequence[Point], chosen: Sequence[Point], scans: Sequence[str], patient: str, patients: Path | None
) -> tuple[str, str] | None:
    """(status, reason) where a series can't be cropped from; None where it can."""
    if not scans:
        return LEFT_OUT, f"no scan of this series below --input: {len(points)} points"
    if len(scans) > 1:
        return FAILED, f"two scans of one series: {scans[0]} and {scans[1]}"
    if not points:
        return LEFT_OUT, "no points: the table names none in this scan"
    if not chosen:
        return LEFT_OUT, f"no points: all {len(points)} are of label 0, of which --negatives_per_scan takes none"
    if not patient:
        return FAILED, f"no patient: {patients} does not name this series"
    return None


def subset_of(scan: str) -> str:
    """Name of the subset folder that a path leads through, "" without any."""
    return safe_name(next((part for part in scan.split(os.sep)[:-1] if part.startswith("subset")), ""), "")


def point_id(point: Point) -> str:
    """What the manifest appends to a scan's path for one of its points."""
    return f"#{point.table}:{point.line}"


def draw_points(points: Sequence[Point], negatives: int | None, seed: int, series: str) -> list[Point]:
    """All points but those of label 0, of which `negatives` are drawn (None: all), in the order of the table."""
    zeros = [point for point in points if point.label == 0 and not point.problem]
    if negatives is not None and len(zeros) > negatives:
        rng = np.random.default_rng([seed, zlib.crc32(series.encode(errors="surrogateescape"))])
        zeros = [zeros[i] for i in rng.choice(len(zeros), negatives, replace=False)]
    return sorted(
        [point for point in points if point.label != 0 or point.problem] + zeros,
        key=lambda point: (point.table, point.line),
    )


def scans_of_series(folder: Path, output: Path, wanted: Collection[str], workers: int) -> dict[str, list[Scan]]:
    """{series: Scans} of the volumes that are named by their series, and of the DICOM series.

    wanted: series of the tables; the converter's own files of one name have a hash behind it
    Where there are subset folders, only what lies in them; masks, which bear the same names, nowhere.
    """
    everything = find_scans(folder, [output], workers)
    unlisted = [scan.problem for scan in everything.problems if "can't be listed" in scan.problem.reason]
    if unlisted:
        raise UserError(str(unlisted[0]))
    found = collections.defaultdict(list)
    for scan in everything.scans:
        if is_label_path(scan.name):
            continue
        series = scan.header.series if scan.header else stem(scan.name)
        hashed = re.fullmatch(r"(.+)-[0-9a-f]{8}", series)
        found[hashed[1] if hashed and series not in wanted and hashed[1] in wanted else series].append(scan)
    in_subsets = {series: [scan for scan in scans if subset_of(scan.name)] for series, scans in found.items()}
    in_subsets = {series: scans for series, scans in in_subsets.items() if scans}
    return in_subsets or dict(found)


def patient_of_scan(scan: Scan, series: str) -> str:
    """Whose a scan is: as its DICOM header says or the folder in which the converter put it, else the series itself."""
    if scan.header:
        return scan.header.patient or series
    converted = re.fullmatch(r"(?:.*/)?([^/]+)/t\d+/[^/]+", scan.name.replace(os.sep, "/"))
    return converted[1] if converted else series


def read_points(path: Path | str, label_column: str, needs_label: bool = True) -> dict[str, list[Point]]:
    """{series: [Points]} of a table with columns seriesuid, coordX, coordY, coordZ (LPS mm) and the label.

    needs_label: refuse a table without that column; otherwise its points have no label
    """
    points, name = collections.defaultdict(list), safe_name(stem(Path(path).stem), "table")
    label = [label_column]
    rows = read_numbers(path, ["seriesuid"], [*AXES, *(label if needs_label else ())], () if needs_label else label)
    for line, row in rows:
        position, value, problem = (), None, ""
        try:
            position = tuple(float(row[axis]) for axis in AXES)
            if not np.isfinite(position).all():
                raise ValueError
        except ValueError:
            problem = f"not a point: {row['coordX']}, {row['coordY']}, {row['coordZ']}"
        try:
            if text := row.get(label_column, ""):
                if not 0 <= (number := float(text)) < MAX_LABELS or not number.is_integer():
                    raise ValueError
                value = int(number)
        except ValueError:
            problem = (
                f"not a label: {label_column} is '{row[label_column][:50]}', expected a whole number from 0 to "
                f"{MAX_LABELS - 1}"
            )
        points[row["seriesuid"]].append(Point(name, line, position, value, problem=problem))
    without = sum(point.label is None and not point.problem for of_series in points.values() for point in of_series)
    if without:
        column = "" if any(label_column in row for _, row in rows) else f" (it has no column {label_column})"
        print(f"note: {without} points of {path} have no label{column}: their crops go to subset*/{UNLABELLED}")
    return dict(points)


AXES = ("coordX", "coordY", "coordZ")


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


def read_candidates(folder: Path) -> dict[str, list[Point]]:
    """{series: [Points]} of LUNA16: its candidates, with the diameter of the nodule that one lies in, and those nodules
    of annotations.csv in which none lies, as positives too."""

    def find(*names: str) -> Path | None:
        places = [path for name in names for path in (folder / name, *sorted(folder.glob(f"*/{name}")))]
        return next((path for path in places if path.is_file()), None)

    candidates, annotations = find("candidates_V2.csv", "candidates.csv"), find("annotations.csv")
    if candidates is None:
        raise UserError(
            f"--input {folder}: has neither candidates_V2.csv nor candidates.csv; put LUNA16's table there, or "
            "give a --table of your own"
        )
    points = read_points(candidates, "class")
    if annotations is None:
        print(
            f"note: no annotations.csv in {folder}: nodules that no candidate lies in are not added, diameters "
            "not known"
        )
        return points
    nodules = collections.defaultdict(list)
    for line, row in read_numbers(annotations, ["seriesuid"], [*AXES, "diameter_mm"]):
        try:
            numbers = [float(row[name]) for name in (*AXES, "diameter_mm")]
            if not np.isfinite(numbers).all():
                raise ValueError
        except ValueError:
            raise UserError(
                f"{annotations}: line {line} has no numbers in coordX, coordY, coordZ and diameter_mm"
            ) from None
        nodules[row["seriesuid"]].append(Point("annotations", line, tuple(numbers[:3]), 1, f"{numbers[3]:g}"))
    for series, found in nodules.items():
        positives = [i for i, point in enumerate(points.get(series, [])) if point.label == 1 and not point.problem]
        for nodule in found:
            inside = [
                i
                for i in positives
                if np.linalg.norm(np.subtract(points[series][i].position, nodule.position))
                <= float(nodule.diameter) / 2
            ]
            for i in inside:
                points[series][i] = points[series][i]._replace(diameter=nodule.diameter)
            if not inside:
                points.setdefault(series, []).append(nodule)
    return points


def read_patients(path: Path | str) -> dict[str, str]:
    """{series: patient} of a table with these columns. Raises UserError where it names two patients of one series."""
    patients = {}
    for line, row in read_rows(path, ["seriesuid", "patient"]):
        if patients.setdefault(row["seriesuid"], row["patient"]) != row["patient"]:
            raise UserError(
                f"{path}: line {line} names patient {row['patient']} for series {row['seriesuid']}, an earlier "
                f"one {patients[row['seriesuid']]}; correct it"
            )
    return patients


def convert_crops(task: tuple[str, Sequence[int], Sequence[float] | None, CropTask]) -> Iterator[Output]:
    """Outputs of a CropTask: a crop for each point, or the reason why not."""
    folder, size, spacing, task = task
    if task.status:
        yield Output(
            {"source": task.source, "patient": task.patient, "status": task.status, "reason": task.reason}, None
        )
        return
    with Volume(os.path.join(folder, task.source)) as volume:
        voxels, notes = volume.read(), list(volume.notes)
        require_ct(voxels, task.source)
        image = images.make_image(voxels, volume.affine)
    note = note_of([*notes, *filter(None, [too_bright(voxels)])])
    for point, output in zip(task.points, task.outputs):
        row = {
            "source": task.source + point_id(point),
            "patient": task.patient,
            "diameter_mm": point.diameter,
            "label": "" if point.label is None else point.label,
            **dict(zip("xyz", point.position)),
        }
        try:
            if point.problem:
                raise DataError(row["source"], point.problem)
            crop = resampling.crop_at(image, point.position, size, spacing, row["source"])
        except DataError as error:
            yield Output({**row, "status": FAILED, "reason": error.reason}, None)
            continue
        yield Output(
            {**row, "output": output, **image_statistics(crop), "reason": note},
            lambda path, crop=crop: images.save_image(path, crop),
        )
