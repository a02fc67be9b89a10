"""prepare_data.py luna16: crops around the points of LUNA16's tables, or of one's own, into the classification
layout."""

import collections
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import images, resampling
from dino3d.data.conventions import DataError, stem
from dino3d.data.scans import File
from dino3d.files import read_rows, walk_files
from dino3d.prepare.conversion import (
    FAILED,
    LEFT_OUT,
    Job,
    Output,
    convert_all,
    fingerprint,
    open_output,
    report_outcome,
)
from dino3d.prepare.inputs import IMAGE_COLUMNS, companions, file_at, image_statistics, safe_name

LUNA16_COLUMNS = ["source", "output", "patient", "label", "x", "y", "z", "diameter_mm", *IMAGE_COLUMNS]
NEGATIVES_PER_SCAN = 20  # of LUNA16's 850 candidates
MAX_LABELS = 1000  # more classes than anyone has; what is beyond is no label
VOLUME_OF_SERIES = (".mhd", ".mha", ".nii", ".nii.gz", ".nrrd")


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
    """A scan and the Points to crop around, with their outputs' paths; or why there are none (status, reason)."""

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
        points = read_points(table, label_column) if table else read_candidates(input)
        scans = scans_of_series(input, output)
        patient_of_series = read_patients(patients) if patients else {series: series for series in scans}
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
                f"{subset}/label{point.label}/{safe_name(patient, 'unknown')}/{point.table}_{point.line:06d}.nii.gz"
                for point in chosen
            ]
            files = [file_at(input, of_series[0]), *companions(input, of_series[0])]
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


def scans_of_series(folder: Path, output: Path) -> dict[str, list[str]]:
    """{series: [paths relative to the folder]} of the volumes that are named by their series.

    Where there are subset folders, only what lies in them: LUNA16's lung masks bear the same names.
    """
    found = collections.defaultdict(list)

    def fail(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename}: can't be listed ({error.strerror})") from error

    for here, names in walk_files(folder, fail):
        if Path(output).resolve() in (Path(here).resolve(), *Path(here).resolve().parents):
            continue
        for name in names:
            if name.lower().endswith(VOLUME_OF_SERIES):
                found[stem(name)].append(os.path.normpath(os.path.relpath(os.path.join(here, name), folder)))
    in_subsets = {series: [path for path in paths if subset_of(path)] for series, paths in found.items()}
    in_subsets = {series: paths for series, paths in in_subsets.items() if paths}
    return in_subsets or dict(found)


def read_points(path: Path | str, label_column: str) -> dict[str, list[Point]]:
    """{series: [Points]} of a table with columns seriesuid, coordX, coordY, coordZ (LPS mm) and the label."""
    points, name = collections.defaultdict(list), safe_name(stem(Path(path).stem), "table")
    for line, row in read_rows(path, ["seriesuid", "coordX", "coordY", "coordZ", label_column]):
        position, label, problem = (), None, ""
        try:
            position = tuple(float(row[name]) for name in ("coordX", "coordY", "coordZ"))
            if not np.isfinite(position).all():
                raise ValueError
        except ValueError:
            problem = f"not a point: {row['coordX']}, {row['coordY']}, {row['coordZ']}"
        try:
            if not 0 <= (value := float(row[label_column])) < MAX_LABELS or not value.is_integer():
                raise ValueError
            label = int(value)
        except ValueError:
            problem = (
                f"not a label: {label_column} is '{row[label_column][:50]}', expected a whole number from 0 to "
                f"{MAX_LABELS - 1}"
            )
        points[row["seriesuid"]].append(Point(name, line, position, label, problem=problem))
    return dict(points)


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
    for line, row in read_rows(annotations, ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]):
        try:
            numbers = [float(row[name]) for name in ("coordX", "coordY", "coordZ", "diameter_mm")]
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
    image = images.read_image(os.path.join(folder, task.source))
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
            {**row, "output": output, **image_statistics(crop)}, lambda path, crop=crop: images.save_image(path, crop)
        )
