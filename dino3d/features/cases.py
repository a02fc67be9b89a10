"""What to extract features of: the scans and crops of a folder, a file, a list or a table, and points in scans."""

import collections
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dino3d.command_line import UserError, available_cores
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, is_kind, stem
from dino3d.data.dicom_series import folder_and_uid, patient_of_series
from dino3d.data.layouts import find_unlabelled_scans, none_found, read_data_list
from dino3d.data.lists import PATIENT, alone_lines
from dino3d.data.points import AXES, patient_of_scan, read_points, scans_of_series, why_no_scan
from dino3d.data.scans import Scan
from dino3d.features.map_pictures import is_map
from dino3d.features.tables import is_features
from dino3d.files import read_rows

# Where patients and crops are known by their folders: <patient> is the last one
CROP_LAYOUT = re.compile(r"(?:.*/)?subset[^/]*/(?:(?:label)?\d+|unlabelled)/([^/]+)/[^/]+")


class Subject(NamedTuple):
    """A row of a table of features.

    name: of the scan, the crop, or a point's series; patient: whose it is; path: as `Volume` opens it, "" without any
    point: (3,) LPS mm, or None; is_crop: whether its folder says so; problem: why it can't be taken, or ""
    """

    name: str
    patient: str
    path: str
    point: tuple[float, ...] | None = None
    is_crop: bool = False
    problem: str = ""


def find_subjects(source: str, scans: str | None = None) -> tuple[list[Subject], list[str]]:
    """(Subjects, lines on what was passed over) of --input: a folder, a scan's file or DICOM series, a list of them
    (.txt, one per line), a table (.csv) of them or of points. Files of features and maps in a folder are no scans.

    scans: folder with the scans of a table of points; None: the table's own
    Raises UserError where there is nothing to take, and where two of a table share a name.
    """
    if is_kind(source, (".csv",)):
        return _of_table(source, scans)
    if scans:
        raise UserError(f"--scans {scans}: goes with a table of points, --input points.csv, not with {source}")
    if os.path.isdir(source):
        return _of_folder(source)
    if is_kind(source, (".txt",)):
        try:
            return _of_paths([(path, "", "") for path in read_data_list(source)], source), []
        except DataError as error:
            raise UserError(f"--input {error}") from error
    if not os.path.exists(source) and folder_and_uid(source)[1] is None:
        raise UserError(f"--input {source}: no such file or folder")
    if os.path.isfile(source) and not is_kind(source, VOLUME_SUFFIXES):
        raise UserError(
            f"--input {source}: is of no kind that is read here; expected a folder, a scan "
            f"({', '.join(VOLUME_SUFFIXES)}), a list of scans (.txt) or a table (.csv)"
        )
    return _of_paths([(source, "", "")], source), []


def _of_folder(folder: str) -> tuple[list[Subject], list[str]]:
    try:
        found, passed_over = find_unlabelled_scans(folder)
    except DataError as error:
        raise UserError(f"--input {error}") from error
    found = [scan for scan in found if not _is_written(os.path.join(folder, scan.name))]
    if not found:
        raise UserError(f"--input {folder}: {none_found(passed_over)}")
    paths = [os.path.join(folder, scan.name) for scan in found]
    names = names_of(paths, folder)
    subjects = [
        Subject(name, owner_of(path, scan) or name, path, is_crop=bool(CROP_LAYOUT.fullmatch(_slashes(path))))
        for name, path, scan in zip(names, paths, found)
    ]
    return subjects, [f"passed over below {folder}: {passed_over}"] if passed_over else []


def _of_paths(rows: Sequence[tuple[str, str, str]], source: str) -> list[Subject]:
    """rows: (path, patient or "", name or "")"""
    if not rows:
        raise UserError(f"--input {source}: names no scan")
    paths = [os.path.abspath(path) for path, _, _ in rows]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [name or own for (_, _, name), own in zip(rows, names_of(paths, common))]
    counts = collections.Counter(names)
    if len(counts) < len(names):
        twice = counts.most_common(1)[0][0]
        raise UserError(f"--input {source}: has {twice} twice; expected one scan of each name")
    return [
        Subject(name, patient or owner_of(path) or name, path, is_crop=bool(CROP_LAYOUT.fullmatch(_slashes(path))))
        for name, path, (_, patient, _) in zip(names, paths, rows)
    ]


def _of_table(table: str, folder: str | None) -> tuple[list[Subject], list[str]]:
    if not os.path.isfile(table):
        raise UserError(f"--input {table}: is a folder" if os.path.isdir(table) else f"--input {table}: no such file")
    header = header_of_table(table)
    if "path" in header:
        if folder:
            raise UserError(f"--scans {folder}: goes with a table of points; {table} has a column path")
        here = os.path.dirname(table)
        rows = read_rows(table, ["path"], ["patient", "name"])
        rows = [
            (os.path.join(here, row["path"]), row.get("patient", ""), row.get("name", ""))
            for _, row in rows
            if row["path"]
        ]
        subjects = _of_paths(rows, table)
        return subjects, _alone_lines(table, header, subjects)
    if "seriesuid" not in header:
        raise UserError(
            f"--input {table}: has neither a column path nor seriesuid, {', '.join(AXES)}, only {', '.join(header)}"
        )
    folder = folder or os.path.dirname(table) or "."
    points = read_points(table)
    patients = _patients_of_table(table)
    found, refused = scans_of_series(folder, [], set(points), available_cores())
    numbered = []
    for series, of_series in points.items():
        scans = [scan for scan in found.get(series, []) if not _is_written(os.path.join(folder, scan.name))]
        problem = why_no_scan(scans, refused.get(series, ""), folder)
        path = "" if problem else os.path.join(folder, scans[0].name)
        patient = patients.get(series) or (path and owner_of(path, scans[0])) or series
        numbered += [
            (
                point.line,
                Subject(
                    series, patient, path, None if point.problem else point.position, problem=problem or point.problem
                ),
            )
            for point in of_series
        ]
    subjects = [subject for _, subject in sorted(numbered, key=lambda pair: pair[0])]
    return subjects, _alone_lines(table, header, subjects)


def _alone_lines(table: str, header: Sequence[str], subjects: Sequence[Subject]) -> list[str]:
    """A line where the table has no column patient, and nothing else tells whose some of its scans are."""
    alone = {one.name for one in subjects if one.patient == one.name}
    return [] if PATIENT in header else alone_lines(table, len(alone), "scans")


def _patients_of_table(table: str) -> dict[str, str]:
    """{series: patient} of a table of points, where it says so. Raises UserError for a series of two."""
    patients = {}
    for line, row in read_rows(table, ["seriesuid"], ["patient"]):
        patient = row.get("patient")
        if patient and patients.setdefault(row["seriesuid"], patient) != patient:
            raise UserError(
                f"--input {table}: line {line} has patient {patient} for {row['seriesuid']}, another line "
                f"{patients[row['seriesuid']]}: a scan is of one"
            )
    return patients


def header_of_table(path: str) -> list[str]:
    """Names of a table's columns in small letters. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [name.strip().strip('"').lower() for name in re.split("[,;\t]", file.readline())]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {path}: can't be read as a table ({error})") from error


def names_of(paths: Sequence[str], folder: str) -> list[str]:
    """Names of scans: their paths relative to `folder` without suffix, which stays where several would share one."""
    inside = [os.path.relpath(path, folder) for path in paths]
    plain = [os.path.join(os.path.dirname(one), stem(one)) for one in inside]
    counts, files = collections.Counter(plain), set(inside)
    # A series in the folder itself has its UID alone; a.nii.nii is not called a.nii beside that
    alone = [counts[a] == 1 and (a == b or a not in files) for a, b in zip(plain, inside)]
    return [_slashes(a if one else b).removeprefix(".#") for a, b, one in zip(plain, inside, alone)]


def _is_written(path: str) -> bool:
    """Whether a file is one of features or maps that an earlier call has written."""
    return is_features(path) or is_map(path)


def owner_of(path: str, scan: Scan | None = None) -> str:
    """Whose a scan is: as the layout of crops says, the DICOM header or the layout of pre-training, "" where none does.

    scan: what a search has found at the path, with its header; None: it is looked for there
    """
    if crop := CROP_LAYOUT.fullmatch(_slashes(path)):
        return crop[1]
    return patient_of_scan(scan, "") if scan else patient_of_series(path) or patient_of_scan(Scan(path, []), "")


def _slashes(path: str | Path) -> str:
    return str(path).replace(os.sep, "/")
