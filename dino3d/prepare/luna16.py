"""prepare_data.py luna16: crops around the points of LUNA16's tables, or of one's own, into the classification
layout."""

import collections
import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import images
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, LeftOut, format_size, is_kind
from dino3d.data.layouts import UNLABELLED
from dino3d.data.lists import like_patient
from dino3d.data.points import (
    AXES,
    Point,
    crop_around,
    open_ct,
    patient_of_scan,
    read_numbers,
    read_points,
    scans_of_series,
    why_no_scan,
)
from dino3d.data.requirements import alike_patients
from dino3d.data.scans import File, Scan
from dino3d.files import read_rows
from dino3d.prepare.conversion import (
    FAILED,
    LEFT_OUT,
    WRITTEN,
    Job,
    Output,
    Records,
    convert_all,
    fingerprint,
    note_of,
    open_output,
    report_outcome,
    require_as_many,
    with_file,
)
from dino3d.prepare.inputs import IMAGE_COLUMNS, companions, cut_short, image_statistics, safe_name
from dino3d.prepare.point_tables import (
    SERIES,
    Placed,
    columns_in,
    place_of_point,
    read_point_tables,
    unique_places,
    write_split,
)

LUNA16_COLUMNS = ["source", "output", "patient", "label", "x", "y", "z", "diameter_mm", "scan_shape", *IMAGE_COLUMNS]
NEGATIVES_PER_SCAN = 20  # of LUNA16's 850 candidates
OF_LUNA16 = ("candidates_V2", "candidates", "annotations")  # its tables, of the first two of which one is read
NO_POINTS = "no points"  # how a reason begins
NOT_IN_TABLE = "no point: its table has it no more, or in another line, or it is not drawn any more"


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
    table: Sequence[Path] | None,
    label_column: str,
    patients: Path | None,
) -> None:
    """Crops around the points of LUNA16's tables, or of one's own, into the classification layout.

    table: one, or the three parts of a published split, whose lists are then written too; see `point_tables`
    """
    if negatives_per_scan is None and table is None:
        negatives_per_scan = NEGATIVES_PER_SCAN
    recipe = {
        "command": "luna16",
        "size": size,
        "spacing": spacing,
        "negatives_per_scan": negatives_per_scan,
        "seed": seed,
        "label_column": label_column,
        **({"split": "published"} if table and len(table) > 1 else {}),  # older outputs have none
    }
    with open_output(output, recipe) as records:
        if table:
            points, parts = read_point_tables(table, label_column)
        else:
            points, parts = unique_places(read_candidates(input)), {}
        found, refused = scans_of_series(input, [output], set(points), workers)
        cut_short(input, itertools.chain.from_iterable(found.values()))
        if patients:
            patient_of_series = read_patients(patients)
        else:
            patient_of_series = {series: patient_of_scan(of_series[0], series) for series, of_series in found.items()}
            patient_of_series |= patients_of_tables(table or ())
        for line in alike_patients(
            [patient_of_series[series] for series in found if series in patient_of_series], input
        ):
            print(line)
        subset_of_patient, tasks = {}, []
        for series in sorted({*points, *found}):
            of_series, patient = found.get(series, []), patient_of_series.get(series, "")
            chosen = draw_points(points.get(series, []), negatives_per_scan, seed, series)
            no_scan = why_no_scan(of_series, refused.get(series, ""), "--input")
            against = reason_unusable(points.get(series, []), chosen, of_series, no_scan, patient, patients)
            if against:
                tasks.append(CropTask(of_series[0].name if of_series else series, [], patient, [], [], *against))
                continue
            scan = of_series[0]
            # All scans of a patient go where the first of them lies: folds by subset must not share patients
            subset = subset_of_patient.setdefault(patient, subset_of(scan.name) or "subset0")
            outputs = [
                f"{subset}/{UNLABELLED if point.label is None else f'label{point.label}'}/"
                f"{safe_name(patient, 'unknown')}/{point.table}_{point.line:06d}.nii.gz"
                for point in chosen
            ]
            files = [*scan.files, *companions(input, scan.name)]
            tasks.append(CropTask(scan.name, files, patient, chosen, outputs))
        # A table that is given has all of its points in the scans that can be cropped from
        given = {point.table for of_series in points.values() for point in of_series}
        given |= set() if table else {*OF_LUNA16}
        there = {task.source for task in tasks if task.points or task.reason.startswith(NO_POINTS)}

        def gone(row: dict[str, str]) -> str:
            scan, _, point = row["source"].rpartition("#")
            return NOT_IN_TABLE if scan in there and point.rpartition(":")[0] in given else ""

        require_one_label(tasks, records, gone)
        before = {  # of DICOM series, of which slices may be lost
            row["source"].rpartition("#")[0]: shape
            for row in records.standing.values()
            if (shape := records.shape_of(row["source"], column="scan_shape"))
        }
        jobs = []
        for task in tasks:
            shape = before.get(task.source, "") if task.points and not is_kind(task.source, VOLUME_SUFFIXES) else ""
            sources = tuple(f"{task.source}{point_id(point)}" for point in task.points) or (task.source,)
            convertible = (str(input), size, spacing if any(spacing) else None, shape, task)
            jobs.append(Job(sources, fingerprint(task), convertible, bool(shape)))
        outcome = convert_all(convert_crops, jobs, records, LUNA16_COLUMNS, workers, "scan", gone)
        if parts:
            written = {row["output"] for row in outcome.rows if row["status"] == WRITTEN}
            placed = [
                Placed(parts[point.table], task.patient, point.label, name)
                for task in tasks
                for point, name in zip(task.points, task.outputs)
                if name in written
            ]
            if placed:
                write_split(output, placed, points, parts, patient_of_series)
    report_outcome(outcome)


def reason_unusable(
    points: Sequence[Point],
    chosen: Sequence[Point],
    scans: Sequence[Scan],
    no_scan: str,
    patient: str,
    patients: Path | None,
) -> tuple[str, str] | None:
    """(status, reason) where a series can't be cropped from; None where it can. no_scan: of `points.why_no_scan`"""
    if no_scan:
        return (FAILED, no_scan) if scans else (LEFT_OUT, f"{no_scan}: {len(points)} points")
    if not points:
        return LEFT_OUT, f"{NO_POINTS}: the table names none in this scan"
    if not chosen:
        return LEFT_OUT, f"{NO_POINTS}: all {len(points)} are of label 0, of which --negatives_per_scan takes none"
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


def read_candidates(folder: Path) -> dict[str, list[Point]]:
    """{series: [Points]} of LUNA16: its candidates, with the diameter of the nodule that one lies in, and those nodules
    of annotations.csv in which none lies, as positives too."""

    candidates, annotations = (
        find_table(folder, *(f"{name}.csv" for name in names)) for names in (OF_LUNA16[:2], OF_LUNA16[2:])
    )
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
    for series, found in read_nodules(annotations).items():
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


def find_table(folder: Path, *names: str) -> Path | None:
    """The first table of these names in a folder or right below it, None where there is none."""
    places = [path for name in names for path in (folder / name, *sorted(folder.glob(f"*/{name}")))]
    return next((path for path in places if path.is_file()), None)


def read_nodules(annotations: Path | str) -> dict[str, list[Point]]:
    """{series: [Points]} of LUNA16's annotations.csv, with their diameters. Raises UserError."""
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
    return dict(nodules)


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


def patients_of_tables(tables: Sequence[Path]) -> dict[str, str]:
    """{series: patient} of one's own tables of points, where they have a column patient. Raises UserError."""
    patients = {}
    for table in tables:
        header = [name.lower() for name in columns_in(table)]
        if "patient" not in header:
            if like := like_patient(columns_in(table)):
                print(
                    f"warning: {table}: has no column patient, and {like} is not read: if it tells whose the scans "
                    "are, call it patient, so that folds do not share patients"
                )
            continue
        if SERIES not in header:
            raise UserError(f"{table}: has a column patient and none called {SERIES}: name the patients by --patients")
        named = {series: patient for series, patient in read_patients(table).items() if patient}
        for series, patient in named.items():
            if patients.setdefault(series, patient) != patient:
                raise UserError(
                    f"{table}: has patient {patient} for series {series}, another table {patients[series]}; correct it"
                )
    return patients


def require_one_label(tasks: Sequence[CropTask], records: Records, gone: Callable[[dict[str, str]], str]) -> None:
    """Raise UserError where a crop of an earlier run that stays, of a table that is not among these, has the place of a
    point of theirs and another label: one image would be trained on with both."""
    now = {f"{task.source}{point_id(point)}" for task in tasks for point in task.points}
    points = {
        (task.source, *place_of_point(point.position)): point
        for task in tasks
        for point in task.points
        if not point.problem
    }
    for row in itertools.chain.from_iterable(records.earlier.values()):
        if (
            row["status"] != WRITTEN
            or row["source"] in now
            or gone(row)
            or not (records.output / row["output"]).is_file()
        ):
            continue
        try:
            point = points.get((row["source"].rpartition("#")[0], *place_of_point(float(row[axis]) for axis in "xyz")))
        except (KeyError, ValueError):  # a manifest that something else has changed
            continue
        if point and row.get("label") != ("" if point.label is None else str(point.label)):
            raise UserError(
                f"{records.output / row['output']}: is of the place that {point.table} has in line {point.line}, with "
                f"label {row.get('label') or 'none'} there and {'none' if point.label is None else point.label} here: "
                "give another --output, or the table of before with its labels corrected"
            )


def convert_crops(task: tuple[str, Sequence[int], Sequence[float] | None, str, CropTask]) -> Iterator[Output]:
    """Outputs of a CropTask: a crop for each point, or the reason why not."""
    folder, size, spacing, before, task = task
    if task.status:
        yield Output(
            {"source": task.source, "patient": task.patient, "status": task.status, "reason": task.reason}, None
        )
        return
    try:
        image, notes = open_ct(os.path.join(folder, task.source))
        require_as_many(image.GetSize(), before, task.source)
    except LeftOut as error:
        raise LeftOut(error.path, with_file(error.reason, before)) from error
    for point, output in zip(task.points, task.outputs):
        row = {
            "source": task.source + point_id(point),
            "patient": task.patient,
            "diameter_mm": point.diameter,
            "label": "" if point.label is None else point.label,
            **dict(zip("xyz", point.position)),
            "scan_shape": format_size(image.GetSize()),
        }
        try:
            crop = crop_around(image, point, size, spacing, row["source"])
        except DataError as error:
            yield Output({**row, "status": FAILED, "reason": error.reason}, None)
            continue
        yield Output(
            {**row, "output": output, **image_statistics(crop), "reason": note_of(notes)},
            lambda path, crop=crop: images.save_image(path, crop),
        )
