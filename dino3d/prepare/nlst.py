"""prepare_data.py nlst: every CT series and volume below a folder into the pre-training layout."""

import collections
import functools
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.data import images, resampling
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, LeftOut, stem
from dino3d.data.dicom import Slice, read_header, sharpness
from dino3d.data.dicom_series import assemble, stored_series
from dino3d.data.foreground import GROUP, find_foreground
from dino3d.data.hdf5 import write_volume
from dino3d.data.requirements import require_ct, too_bright
from dino3d.data.scans import Scan, find_scans
from dino3d.data.volume import Volume
from dino3d.prepare.conversion import (
    FAILED,
    LEFT_OUT,
    STAYS,
    Job,
    Output,
    convert_all,
    fingerprint,
    note_of,
    open_output,
    report_outcome,
    require_as_many,
    voxels_in,
    with_file,
)
from dino3d.prepare.index import store_index
from dino3d.prepare.inputs import IMAGE_COLUMNS, companions, cut_short, image_statistics, safe_name

if TYPE_CHECKING:
    import SimpleITK as sitk

NLST_COLUMNS = ["source", "output", "patient", "study_date", "slice_thickness", "kernel", *IMAGE_COLUMNS]


class ScanTask(NamedTuple):
    """Scans to be converted, or of which the first that can be used is (one_of_them), with the outputs' paths.

    before: shapes of the files that earlier runs made of series, "" where there is none
    notes: what is known to be odd of each, "" where nothing is
    """

    input: str
    scans: list[Scan]
    outputs: list[str]
    before: list[str]
    notes: list[str]
    one_of_them: bool
    min_slices: int
    crop_to_body: float | None
    compression: str


def nlst(input: Path, output: Path, workers: int, one_per_study: bool, **options: Any) -> None:
    """Every CT series and volume below a folder into the pre-training layout."""
    with open_output(output, {"command": "nlst", "one_per_study": one_per_study, **options}) as records:
        try:
            found = find_scans(input, [output], workers)
        except DataError as error:
            raise UserError(str(error)) from error
        passed_over = f"; passed over: {found.passed_over()}" if found.others or found.problems else ""
        print(f"{len(found.scans)} DICOM series and volumes below {input}{passed_over}", flush=True)
        scans = sorted(found.scans + found.problems, key=lambda scan: scan.name)
        if not scans:
            raise UserError(f"--input {input}: holds no DICOM files and no {', '.join(VOLUME_SUFFIXES)}{passed_over}")
        places, groups = place_scans(scans), collections.defaultdict(list)
        shapes = {scan.name: records.shape_of(places[scan.name], scan.name) if scan.header else "" for scan in scans}
        for scan in sorted(scans, key=lambda scan: series_preference(scan, shapes[scan.name])):
            study = one_per_study and scan.header and scan.header.study  # which badly anonymised patients may share
            groups[(patient_of(scan.header), study) if study else scan.name].append(scan)
        tasks, short = [], cut_short(input, scans)
        for group in groups.values():
            outputs = [places[scan.name] for scan in group]
            before = [shapes[scan.name] for scan in group]
            notes = [short.get(scan.header.series, "") if scan.header else "" for scan in group]
            tasks.append(ScanTask(str(input), group, outputs, before, notes, len(group) > 1, **options))
        jobs = [
            Job(
                tuple(scan.name for scan in task.scans),
                fingerprint(watched(input, task.scans), task.outputs, *filter(None, task.notes)),
                task,
                any(task.before),
            )
            for task in tasks
        ]
        outcome = convert_all(convert_scans, jobs, records, NLST_COLUMNS, workers, "scan")
    report_outcome(outcome)


def watched(input: Path, scans: Sequence[Scan]) -> list[tuple[Any, ...]]:
    """What scans depend on: their files with sizes and times, and whether they are to be taken."""
    return [
        (
            scan.name,
            [*scan.files, *(companions(input, scan.name) if not scan.header else [])],
            scan.problem and scan.problem.reason,
        )
        for scan in scans
    ]


def series_preference(scan: Scan, before: str) -> tuple[float, int, int, str]:
    """Sort key of --one_per_study: thinnest slices, softest kernel, most slices, then by name.

    before: shape of the file that an earlier run made of it, which may have slices that are lost now
    """
    header = scan.header
    if not header:
        return np.inf, 0, 0, scan.name
    lost = voxels_in(before) // max(1, math.prod(header.size)) if before else 0
    return header.thickness or np.inf, sharpness(header.kernel), -max(len(scan.files), lost), scan.name


def place_scans(scans: Sequence[Scan]) -> dict[str, str]:
    """{source: relative path of its output}, `<patient>/t<k>/<series>.hdf5`.

    DICOM: k counts the dates of a patient's studies; studies without a date follow, each with its own k, in the order
    of their paths. Volume files: t<k> is a folder of that name on their path, or t0; the patient is what stands before
    it or, without it, the folder that holds no other volume, or the file's own name.
    """
    studies = collections.defaultdict(dict)  # patient -> {study or its date: sort key}
    for scan in (scan for scan in scans if scan.header):
        key = scan.header.date or scan.header.study
        order = (not scan.header.date, scan.header.date, scan.name)
        studies[patient_of(scan.header)][key] = min(order, studies[patient_of(scan.header)].get(key, order))
    visits = {patient: sorted(keys, key=keys.get) for patient, keys in studies.items()}
    beside = collections.Counter(os.path.dirname(scan.name) for scan in scans if not scan.header and not scan.problem)

    places = {}
    for scan in scans:
        if scan.header:
            patient = patient_of(scan.header)
            visit = f"t{visits[patient].index(scan.header.date or scan.header.study)}"
            parts = [safe_name(patient, "unknown"), visit, safe_name(scan.header.series, "series")]
        else:
            *folders, name = scan.name.split(os.sep)
            at = next((i for i, folder in enumerate(folders) if re.fullmatch(r"t\d+", folder, re.I)), None)
            name = stem(name)
            if at is not None:
                patient, visit, name = folders[:at] or [name], folders[at].lower(), "_".join([*folders[at + 1 :], name])
            else:
                patient, visit = (
                    (folders if folders and beside[os.path.dirname(scan.name)] == 1 else [*folders, name]),
                    "t0",
                )
            parts = [safe_name("_".join(patient), "unknown"), visit, safe_name(name, "scan")]
        places[scan.name] = "/".join(parts) + ".hdf5"
    taken = collections.Counter(places.values())
    return {
        source: place if taken[place] == 1 else f"{place[:-5]}-{zlib.crc32(os.fsencode(source)):08x}.hdf5"
        for source, place in places.items()
    }


def patient_of(header: Slice) -> str:
    """Who a DICOM file is of, as far as its header tells: the patient, else the study, else the series."""
    return header.patient or header.study or header.series


def convert_scans(task: ScanTask) -> Iterator[Output]:
    """Outputs of a ScanTask; one for each scan, with a file or with the reason why not."""
    kept = None
    for scan, output, before, note in zip(task.scans, task.outputs, task.before, task.notes):
        row = {"source": scan.name}
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
            image, notes = read_scan(task, scan)
            require_as_many(image.GetSize(), before, scan.name)
        except DataError as error:
            status, reason = LEFT_OUT if isinstance(error, LeftOut) else FAILED, with_file(error.reason, before)
            if reason.endswith(STAYS) and task.one_of_them:
                kept = scan.name
            yield Output({**row, "status": status, "reason": reason}, None)
            continue
        kept = scan.name if task.one_of_them else None
        folder = output.split("/")[0]
        if scan.header and folder != scan.header.patient:
            notes = [*notes, f"the patient's name is no folder's: {scan.header.patient!r} stands as {folder}"]
        if notes := [*notes, *filter(None, [note])]:
            row["reason"] = note_of(notes)
        voxels, affine = images.voxels_of(image), images.affine_of(image)
        yield Output(
            {**row, "output": output, **image_statistics(image)},
            functools.partial(write_with_occupancy, voxels=voxels, affine=affine, compression=task.compression),
            store_index,
        )


def write_with_occupancy(path: Path, voxels: np.ndarray, affine: np.ndarray, compression: str) -> None:
    """`write_volume`, with the blocks of body and lung that --foreground of pre-training draws from."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    write_volume(path, voxels, affine, compression, {GROUP: find_foreground(voxels, spacing).arrays()})


def read_scan(task: ScanTask, scan: Scan) -> tuple["sitk.Image", list[str]]:
    """(the image of a Scan, lines on what is odd about it), or a DataError that says why there is none."""
    if scan.problem:
        raise scan.problem
    stored = None
    if scan.header:
        slices = [read_header(os.path.join(task.input, file.path)) for file in scan.files]
        stored = stored_series(assemble([one for one in slices if one], task.min_slices, scan.name), scan.name)
    with Volume(os.path.join(task.input, scan.name), stored) as volume:
        if volume.shape[2] < task.min_slices and not scan.header:
            raise LeftOut(
                scan.name, f"too few slices: {volume.shape[2]}, expected at least {task.min_slices} (--min_slices)"
            )
        image, notes = images.make_image(volume.read(), volume.affine), list(volume.notes)
    require_ct(images.voxels_of(image), scan.name)
    notes += filter(None, [too_bright(images.voxels_of(image))])
    if task.crop_to_body is not None:
        image = resampling.crop_to_box(image, resampling.body_box(image, task.crop_to_body))
    return image, notes
