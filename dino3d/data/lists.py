"""Tables of files: which volumes, whose they are, and their labels or masks; what --data_list and --predict take.

A table has the column path and, for training, a label or mask; relative paths belong to the table's own folder.
"""

import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dino3d.command_line import truncate_list
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, is_kind, stem
from dino3d.data.dicom_series import folder_and_uid, patient_of_series
from dino3d.data.layouts import LIST_SUFFIXES, Crop, Pair, crops_faults
from dino3d.data.requirements import alike_patients
from dino3d.files import read_rows

LABEL, MASK, PATIENT, SUBSET = "label", "mask", "patient", "subset"  # columns besides path
LIKE_PATIENT = re.compile(r"(patient|subject|participant|person)[ _]?(id|no|nr|uid|number|name|key)?|pid|mrn", re.I)
MISSING = ("", "nan", "na", "n/a", "none", "null", "?")  # in letters of any case, of a case that has no label
MAX_CLASSES = 100  # more classes than anyone has: the column is something else


class Row(NamedTuple):
    """A line of a table: its number, the file, what to call it, and the other columns that were asked for."""

    line: int
    path: str
    name: str
    cells: dict[str, str]


class LabelledCrops(NamedTuple):
    """What a table holds for classification: crops sorted by name, their names, what keeps them from being trained on,
    lines on what is odd, the classes' names where labels are words, and what changes when the table does."""

    crops: list[Crop]
    names: list[str]
    problems: list[DataError]
    lines: list[str]
    label_names: list[str] | None
    digest: str


class MaskedImages(NamedTuple):
    """What a table holds for segmentation: pairs sorted by name, whose they are, the rest as in LabelledCrops."""

    pairs: list[Pair]
    patients: list[str]
    lines: list[str]
    digest: str


def is_table(path: Path | str) -> bool:
    """Whether a path is that of a table, by its suffix."""
    return is_kind(path, LIST_SUFFIXES)


def columns_of(path: Path | str, columns: Sequence[str]) -> set[str]:
    """Those of the columns that a table has. Raises DataError, UserError."""
    rows = _read(path, (), ("path", *columns))
    return set(rows[0][1]) if rows else set()


def _read(path: Path | str, columns: Sequence[str], optional: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table. Raises DataError for one that can't be read or holds none, UserError for missing columns."""
    try:
        rows = list(read_rows(path, columns or ("path",), optional))
    except OSError as error:
        raise DataError(path, f"can't be read ({error.strerror or error})") from error
    if not rows:
        raise DataError(path, "names no file: expected a line for each below path, ...")
    return rows


def read_list(
    path: Path | str, columns: Sequence[str] = (), optional: Sequence[str] = (), empty: Sequence[str] = ()
) -> list[Row]:
    """The Rows of a table of volumes, in its order; each file is called by its path below the folder that all of them
    share, without suffix.

    columns: that it must have besides path; optional: that are read where it has them; empty: those whose cells may be
    Raises DataError, UserError for missing columns, other empty cells, files that are not there or of no kind that is
    read here, and one that stands there twice.
    """
    rows = _read(path, ("path", *columns), optional)
    for line, row in rows:
        for name, text in row.items():
            if not text and name not in empty:
                raise DataError(path, f"line {line} has nothing in the column {name}")
    files = [_file_at(path, line, row["path"]) for line, row in rows]
    names, seen = names_of_files(files), {}
    for (line, _), file, name in zip(rows, files, names):
        for key in (os.path.realpath(file), name):
            if (first := seen.setdefault(key, line)) != line:
                raise DataError(
                    path, f"lines {first} and {line} name one file, or two of one name ({name}): expected each once"
                )
    return [Row(line, file, name, row) for (line, row), file, name in zip(rows, files, names)]


def _file_at(table: Path | str, line: int, text: str) -> str:
    """Path of a volume that a line names. Raises DataError where none is there."""
    file = os.path.join(os.path.dirname(os.path.abspath(table)), text)
    if os.path.isdir(file) or folder_and_uid(file)[1] is not None:
        return os.path.normpath(file)
    if not os.path.exists(file):
        raise DataError(table, f"line {line} names {file}: no such file; relative paths belong to the table's folder")
    if not is_kind(file, VOLUME_SUFFIXES):
        raise DataError(
            table, f"line {line} names {file}: expected {', '.join(VOLUME_SUFFIXES)}, or the folder of a DICOM series"
        )
    return os.path.normpath(file)


def names_of_files(files: Sequence[str]) -> list[str]:
    """What to call files: their paths below the folder that all of them lie in, without suffix."""
    shared = os.path.commonpath([os.path.dirname(file) for file in files])
    inside = [os.path.relpath(file, shared) for file in files]
    return [
        os.path.join(os.path.dirname(name), stem(name) if is_kind(name, VOLUME_SUFFIXES) else os.path.basename(name))
        for name in inside
    ]


def _patients(path: Path | str, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """(whose each row's file is, lines on that): the table's column, else DICOM's PatientID, else the file itself."""
    if PATIENT in rows[0].cells:
        patients = [row.cells[PATIENT] for row in rows]
        return patients, alike_patients(patients, path)
    named = [patient_of_series(row.path) for row in rows]
    return [name or row.name for row, name in zip(rows, named)], alone_lines(path, named.count(""), "files")


def alone_lines(path: Path | str, alone: int, what: str) -> list[str]:
    """What to say of a table without the column patient, of which so many files (`what`) are of nobody who is known."""
    if not alone:
        return []
    like = like_patient(next(read_rows(path))[1])
    remedy = f"does {like} tell whose they are, call it {PATIENT}" if like else "add the column"
    return [
        f"warning: {path} has no column {PATIENT}: each of {alone} {what} counts as a patient of its own, so that "
        f"{what} of one person may be trained on and tested; {remedy}"
    ]


def like_patient(header: Iterable[str]) -> str | None:
    """The first of these columns that by its name tells patients, None where none does."""
    return next((column for column in header if LIKE_PATIENT.fullmatch((column or "").strip())), None)


def _rows_digest(rows: Sequence[tuple[str, ...]]) -> str:
    """What changes when the rows do, and says how many there are."""
    return f"{len(rows)} files, {zlib.crc32(repr(sorted(rows)).encode(errors='surrogateescape')):08x}"


# ------------------------------------------------------------------------------------------------------ labelled crops


def crops_of_list(path: Path | str, label_column: str = LABEL) -> LabelledCrops:
    """The LabelledCrops of a table with the columns path and `label_column`, and patient and subset if it has them;
    files without a label are left out.

    Raises DataError, UserError.
    """
    found = sorted(read_list(path, [label_column], [PATIENT, SUBSET], [label_column]), key=lambda row: row.name)
    rows = [row for row in found if not is_missing(row.cells[label_column])]
    if not rows:
        raise DataError(path, f"none of its {len(found)} files has a label in the column {label_column}")
    patients, lines = _patients(path, rows)
    if len(rows) < len(found):
        lines.append(f"{path}: files that have no label and are left out: {len(found) - len(rows)}")
    classes, label_names = classes_of([(row.line, row.cells[label_column]) for row in rows], path, label_column)
    if label_names:
        numbered = ", ".join(f"{name} = {k}" for k, name in enumerate(label_names))
        lines.append(f"labels of {path} in sorted order: {numbered}")
    subsets = [row.cells.get(SUBSET, "") for row in rows]
    crops = [Crop(row.path, *rest) for row, *rest in zip(rows, classes, patients, subsets)]
    names = [row.name for row in rows]
    told = [label_names[k] for k in classes] if label_names else map(str, classes)
    digest = _rows_digest(list(zip(names, told, patients, subsets)))
    return LabelledCrops(crops, names, crops_faults(crops, path, f"{label_column} "), lines, label_names, digest)


def is_missing(label: str) -> bool:
    """Whether the cell of a label says that there is none."""
    return label.lower() in MISSING


def alike_but_for_case(labels: Sequence[str]) -> str:
    """What is wrong with names of classes that differ in upper and lower case alone; "" where none do."""
    lower = [label.lower() for label in labels]
    alike = [label for label in labels if lower.count(label.lower()) > 1]
    told = f"labels {truncate_list(alike)} differ in upper and lower case alone: write those of one class alike"
    return told if alike else ""


def classes_of(labels: Sequence[tuple[int, str]], path: Path | str, column: str) -> tuple[list[int], list[str] | None]:
    """(class of each label, names of the classes where labels are words, in sorted order). labels: (line, text)

    Raises DataError for numbers that are no classes, words among numbers, words of one spelling, and too many classes.
    """
    numbers = [(line, text, _number_in(text)) for line, text in labels]
    words = [(line, text) for line, text, number in numbers if number is None]
    expected = "expected whole numbers from 0 on, or words"
    if words and len(words) < len(labels):
        line, text = words[0]
        raise DataError(path, f"line {line} has '{text[:50]}' in the column {column}, others have numbers: {expected}")
    for line, text, number in numbers:
        if number is not None and (number < 0 or not number.is_integer()):
            raise DataError(path, f"line {line} has {text[:50]} in the column {column}: {expected}")
    values = sorted({text for _, text in labels}) if words else sorted({int(number) for *_, number in numbers})
    if len(values) > MAX_CLASSES or not words and values[-1] >= MAX_CLASSES:
        raise DataError(path, f"has {len(values)} values up to {values[-1]} in the column {column}: {expected}")
    if words:
        if told := alike_but_for_case(values):
            raise DataError(path, f"column {column}: {told}")
        return [values.index(text) for _, text in labels], values
    return [int(number) for *_, number in numbers], None


def _number_in(text: str) -> float | None:
    """The number that a cell is, None for a word; nan and inf are words."""
    number = re.fullmatch(r"[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d{1,2})?", text, re.I)
    return float(text.replace(",", ".")) if number else None


# -------------------------------------------------------------------------------------------------- images and masks


def pairs_of_list(path: Path | str) -> MaskedImages:
    """The MaskedImages of a table with the columns path and mask, and with patient if it has it.

    Raises DataError, UserError, also where an image is its own mask, or a mask is that of two images.
    """
    rows = sorted(read_list(path, [MASK], [PATIENT]), key=lambda row: row.name)
    patients, lines = _patients(path, rows)
    images, masks, names = {os.path.realpath(row.path): row.line for row in rows}, {}, {}
    pairs = []
    for row in rows:
        mask = _file_at(path, row.line, row.cells[MASK])
        real = os.path.realpath(mask)
        if real in images:
            raise DataError(path, f"line {row.line} has {mask} as a mask, line {images[real]} as an image")
        if (other := masks.setdefault(real, row)) is not row:
            raise DataError(path, f"lines {other.line} and {row.line} have the same mask, {mask}: expected one each")
        if (other := names.setdefault(row.name.replace("/", "_"), row)) is not row:
            raise DataError(path, f"lines {other.line} and {row.line}: results of both would be called {row.name}")
        pairs.append(Pair(row.name, row.path, mask))
    labels = names_of_files([pair.label for pair in pairs])
    digest = _rows_digest([(pair.name, label, patient) for pair, label, patient in zip(pairs, labels, patients)])
    return MaskedImages(pairs, patients, lines, digest)
