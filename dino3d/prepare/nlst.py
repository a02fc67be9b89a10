"""prepare_data.py nlst: every CT series and volume below a folder into the pre-training layout."""

import collections
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import dicom, images, resampling
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, LeftOut, stem
from dino3d.data.hdf5 import write_volume
from dino3d.data.layouts import walk_files
from dino3d.data.parallel import in_processes, progress
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
from dino3d.prepare.inputs import IMAGE_COLUMNS, File, companions, file_at, image_statistics, safe_name

if TYPE_CHECKING:
    import SimpleITK as sitk

HEADERS_PER_TASK = 500  # files that a worker looks into at a time
NLST_COLUMNS = ["source", "output", "patient", "study_date", "slice_thickness", "kernel", *IMAGE_COLUMNS]


class Scan(NamedTuple):
    """A series or a volume file: what the manifest calls it, its Files, a DICOM header or None, and what is wrong with
    it."""

    source: str
    files: list[File]
    header: dicom.Slice | None = None
    problem: str = ""


class ScanTask(NamedTuple):
    """Scans to be converted, or of which the first that can be used is (one_of_them), with the outputs' paths."""

    input: str
    scans: list[Scan]
    outputs: list[str]
    one_of_them: bool
    min_slices: int
    crop_to_body: float | None
    compression: str


def nlst(input: Path, output: Path, workers: int, one_per_study: bool, **options: Any) -> None:
    """Every CT series and volume below a folder into the pre-training layout."""
    with open_output(output, {"command": "nlst", "one_per_study": one_per_study, **options}) as records:
        scans, others = find_scans(input, output, workers)
        print(f"{len(scans)} DICOM series and volumes below {input}, {others} other files", flush=True)
        if not scans:
            raise UserError(f"--input {input}: holds no DICOM files and no {', '.join(VOLUME_SUFFIXES)}")
        places, groups = place_scans(scans), collections.defaultdict(list)
        for scan in sorted(scans, key=series_preference):
            study = one_per_study and scan.header and scan.header.study  # which badly anonymised patients may share
            groups[(patient_of(scan.header), study) if study else scan.source].append(scan)
        tasks = [
            ScanTask(str(input), group, [places[scan.source] for scan in group], len(group) > 1, **options)
            for group in groups.values()
        ]
        jobs = [
            Job(tuple(scan.source for scan in task.scans), fingerprint(task.scans, task.outputs), task)
            for task in tasks
        ]
        outcome = convert_all(convert_scans, jobs, records, NLST_COLUMNS, workers, "scan")
    report_outcome(outcome)


def find_scans(folder: Path, output: Path, workers: int) -> tuple[list[Scan], int]:
    """(Scans below a folder, number of other files), looking into every file that may be DICOM."""
    problems, names = [], []

    def fail(error: OSError) -> None:
        where = os.path.relpath(error.filename, folder)
        problems.append(Scan(where, [], problem=f"can't be listed: {error.strerror}"))

    for here, files in walk_files(folder, fail):
        if Path(output).resolve() not in (Path(here).resolve(), *Path(here).resolve().parents):
            names += [os.path.normpath(os.path.join(os.path.relpath(here, folder), name)) for name in files]
    tasks = [(str(folder), names[at : at + HEADERS_PER_TASK]) for at in range(0, len(names), HEADERS_PER_TASK)]
    series, scans, others = collections.defaultdict(list), problems, 0
    with progress(len(names), "header") as bar:
        for (_, chunk), result in in_processes(scan_headers, tasks, workers):
            if result is None:
                raise UserError(f"a process died while it read the headers of {chunk[0]} to {chunk[-1]}")
            for uid, header, files in result.series:
                series[uid].append((header, files))
            scans, others = scans + result.scans, others + result.others
            bar.update(len(chunk))
    for uid, parts in series.items():
        files = sorted(file for _, files in parts for file in files)
        header = min((header for header, _ in parts), key=lambda header: header.path)
        scans.append(Scan(f"{os.path.dirname(header.path) or '.'}#{uid}", files, header))
    return sorted(scans, key=lambda scan: scan.source), others


class ScannedHeaders(NamedTuple):
    """series: [(UID, header of the first file, Files)]; scans: volumes and what can't be read; others: how many."""

    series: list[tuple[str, dicom.Slice, list[File]]]
    scans: list[Scan]
    others: int


def scan_headers(task: tuple[str, list[str]]) -> ScannedHeaders:
    """What the files (relative paths) below a folder are: a ScannedHeaders."""
    root, names = task
    headers, scans, others = collections.defaultdict(list), [], 0
    for name in names:
        path = os.path.join(root, name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for without end
                others += 1
            elif name.lower().endswith(VOLUME_SUFFIXES):
                scans.append(Scan(name, [file_at(root, name), *companions(root, name)]))
            elif dicom.is_dicom(path) and (header := dicom.read_header(path)):
                uid = header.series or f"no UID in {os.path.dirname(name)}"
                headers[uid].append((header._replace(path=name), file_at(root, name)))
            else:
                others += 1
        except OSError as error:
            scans.append(Scan(name, [file_at(root, name)], problem=f"can't be read: {error.strerror}"))
        except DataError as error:
            scans.append(Scan(name, [file_at(root, name)], problem=error.reason))
    series = [(uid, min(found)[0], [file for _, file in found]) for uid, found in headers.items()]
    return ScannedHeaders(series, scans, others)


def series_preference(scan: Scan) -> tuple[float, int, int, str]:
    """Sort key of --one_per_study: thinnest slices, softest kernel, most slices, then by name."""
    header = scan.header
    return (
        (header.thickness or np.inf, dicom.sharpness(header.kernel), -len(scan.files), scan.source)
        if header
        else (np.inf, 0, 0, scan.source)
    )


def place_scans(scans: Sequence[Scan]) -> dict[str, str]:
    """{source: relative path of its output}, `<patient>/t<k>/<series>.hdf5`.

    DICOM: k counts the dates of a patient's studies; studies without a date follow, each with its own k, in the order
    of their paths. Volume files: t<k> is a folder of that name on their path, or t0; the patient is what stands before
    it or, without it, the folder that holds no other volume, or the file's own name.
    """
    studies = collections.defaultdict(dict)  # patient -> {study or its date: sort key}
    for scan in (scan for scan in scans if scan.header):
        key = scan.header.date or scan.header.study
        order = (not scan.header.date, scan.header.date, scan.source)
        studies[patient_of(scan.header)][key] = min(order, studies[patient_of(scan.header)].get(key, order))
    visits = {patient: sorted(keys, key=keys.get) for patient, keys in studies.items()}
    beside = collections.Counter(os.path.dirname(scan.source) for scan in scans if not scan.header and not scan.problem)

    places = {}
    for scan in scans:
        if scan.header:
            patient = patient_of(scan.header)
            visit = f"t{visits[patient].index(scan.header.date or scan.header.study)}"
            parts = [safe_name(patient, "unknown"), visit, safe_name(scan.header.series, "series")]
        else:
            *folders, name = scan.source.split(os.sep)
            at = next((i for i, folder in enumerate(folders) if re.fullmatch(r"t\d+", folder, re.I)), None)
            name = stem(name)
            if at is not None:
                patient, visit, name = folders[:at] or [name], folders[at].lower(), "_".join([*folders[at + 1 :], name])
            else:
                patient, visit = (
                    (folders if folders and beside[os.path.dirname(scan.source)] == 1 else [*folders, name]),
                    "t0",
                )
            parts = [safe_name("_".join(patient), "unknown"), visit, safe_name(name, "scan")]
        places[scan.source] = "/".join(parts) + ".hdf5"
    taken = collections.Counter(places.values())
    return {
        source: place if taken[place] == 1 else f"{place[:-5]}-{zlib.crc32(os.fsencode(source)):08x}.hdf5"
        for source, place in places.items()
    }


def patient_of(header: dicom.Slice) -> str:
    """Who a DICOM file is of, as far as its header tells: the patient, else the study, else the series."""
    return header.patient or header.study or header.series


def convert_scans(task: ScanTask) -> Iterator[Output]:
    """Outputs of a ScanTask; one for each scan, with a file or with the reason why not."""
    kept = None
    for scan, output in zip(task.scans, task.outputs):
        row = {"source": scan.source}
        if scan.header:
            row |= {
                "patient": scan.header.patient,
                "study_date": scan.header.date,
                "kernel": scan.header.kernel,
                "slice_thickness": f"{scan.header.thickness:g}",
            }
        if kept:
            yield Output({**row, "reason": f"another series of the study is preferred: {kept}"}, None)
            continue
        try:
            image = read_scan(task, scan)
        except DataError as error:
            status = LEFT_OUT if isinstance(error, LeftOut) else FAILED
            yield Output({**row, "status": status, "reason": error.reason}, None)
            continue
        kept = scan.source if task.one_of_them else None
        folder = output.split("/")[0]
        if scan.header and folder != scan.header.patient:
            row["reason"] = f"the patient's name is no folder's: {scan.header.patient!r} stands as {folder}"
        voxels, affine = images.voxels_of(image), images.affine_of(image)
        yield Output(
            {**row, "output": output, **image_statistics(image)},
            lambda path, voxels=voxels, affine=affine: write_volume(path, voxels, affine, task.compression),
        )


def read_scan(task: ScanTask, scan: Scan) -> "sitk.Image":
    """The image of a Scan, or a DataError that says why there is none."""
    if scan.problem:
        raise DataError(scan.source, scan.problem)
    paths = [os.path.join(task.input, file.path) for file in scan.files]
    if scan.header:
        slices = dicom.sort_slices([dicom.read_header(path) for path in paths], task.min_slices, scan.source)
        image = dicom.read_series(slices)
    else:
        image = images.read_image(paths[0])
        if image.GetSize()[2] < task.min_slices:
            raise LeftOut(
                scan.source, f"too few slices: {image.GetSize()[2]}, expected at least {task.min_slices} (--min_slices)"
            )
    images.require_ct(image, scan.source)
    if task.crop_to_body is not None:
        image = resampling.crop_to_box(image, resampling.body_box(image, task.crop_to_body))
    return image
