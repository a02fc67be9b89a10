"""Tables of features, ours and others': read from CSV, npz, HDF5 or a folder, checked, and joined with labels."""

import collections
import csv
import fnmatch
import glob
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError, did_you_mean, truncate_list
from dino3d.data.points import AXES
from dino3d.evaluation.protocols import never_varies
from dino3d.files import TEXT, delimiter_of

TABLE_SUFFIXES = (".csv", ".tsv", ".npz", ".h5", ".hdf5")
OUR_FEATURE = re.compile(r"feature_(\d+)")
# Columns whose name says that they are no feature, unless --feature_columns names them
SUSPECT = re.compile(
    r"|unnamed.*|index|idx|row|nr|no|id|.*_id|.*uid|x|y|z|coord.*|pos_?[xyz]|(centre|center)_?[xyz]?|fold|split|subset"
    r"|label.*|.*_label|class(es)?|target.*|outcome|diagnosis|malignan.*|y_?true|ground_?truth|gt|score|prob.*|pred.*",
    re.I,
)
LARGEST = 1e30  # of a feature's size: squares and sums of what is larger leave the numbers that a computer has


class LoadedTable(NamedTuple):
    """Features of N cases.

    keys: what each case is joined by, its name, or its name and place; patients: (N,) or None where it has no column
    reasons: {key: why it has no features} of further cases; columns: (F,) names of the features
    """

    name: str
    path: str
    keys: list[tuple]
    patients: list[str] | None
    reasons: dict[tuple, str]
    features: np.ndarray
    columns: list[str]
    notices: list[str]


# -------------------------------------------------------------------------------------------------------------- finding


def expand_patterns(patterns: Sequence[str], flag: str) -> list[str]:
    """The files that names and shell patterns mean, in their order. Raises UserError where one means none."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) or not glob.has_magic(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise UserError(f"{flag} {pattern}: no file has such a name")
        paths += [path for path in found if path not in paths]
    return paths


def table_names(paths: Sequence[str]) -> list[str]:
    """What tables are called: their file's name without its suffix, or their path where two would be called alike."""
    real = {}
    for path in paths:
        other = real.setdefault(os.path.realpath(path), path)
        if other != path:
            raise UserError(f"--features {path}: is the same table as {other}; give each once")
    stems = [os.path.basename(os.path.normpath(path)) for path in paths]
    stems = [os.path.splitext(stem)[0] if stem.lower().endswith(TABLE_SUFFIXES) else stem for stem in stems]
    return own_names(stems, paths)


def group_names(patterns: Sequence[str], counts: Sequence[int]) -> list[str]:
    """What the means of groups are called: their pattern without folders, or with them where two would be called alike.

    counts: of tables in each
    """
    names = own_names([os.path.basename(pattern) for pattern in patterns], patterns)
    return [f"mean of {count}: {name}" for count, name in zip(counts, names)]


def own_names(short: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The short name of each path, or the whole path where two would be called alike."""
    return [name if short.count(name) == 1 else os.path.normpath(path) for name, path in zip(short, paths)]


# -------------------------------------------------------------------------------------------------------------- reading


def read_features(path: str, name: str, name_column: str = "name", feature_columns: Sequence[str] = ()) -> LoadedTable:
    """A LoadedTable of any form. name: what it is called; feature_columns: shell patterns of columns of a CSV.

    Raises UserError: what is missing, not finite, given twice or can't be told from features.
    """
    suffix = os.path.splitext(path)[1].lower()
    try:
        if os.path.isdir(path):
            found = _read_folder(path)
        elif suffix in (".csv", ".tsv"):
            found = _read_csv(path, name_column, feature_columns)
        elif suffix in (".npz", ".h5", ".hdf5"):
            found = _read_arrays(path, suffix)
        else:
            raise UserError(
                f"{path}: can't be read as features: expected {', '.join(TABLE_SUFFIXES)} or a folder of .h5"
            )
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from error
    return _checked(path, name, *found)


def _read_csv(path: str, wanted_name: str, feature_columns: Sequence[str]) -> tuple:
    header, lines = read_cells(path)
    name_column = find_column(header, wanted_name) or find_column(header, "name")  # of a table of ours among others
    if name_column is None:
        hint = f": name the column that tells the cases with --name_column; found {truncate_list(header)}"
        raise UserError(f"{path}: has no column {wanted_name}{did_you_mean(wanted_name, header) or hint}")
    place = {column: i for i, column in enumerate(header)}
    patient_column, reason_column, *axes = (find_column(header, one) for one in ("patient", "reason", *AXES))
    known = [one for one in (name_column, patient_column, reason_column, *axes) if one is not None]
    columns, notices = _feature_columns(path, header, known, feature_columns)
    names, patients, reasons, coordinates, rows = [], [], [], [], []
    placed = None not in axes
    for number, cells in lines:
        names.append(cells[place[name_column]].strip())
        patients.append(cells[place[patient_column]].strip() if patient_column else None)
        reasons.append(cells[place[reason_column]].strip() if reason_column else "")
        if placed:
            where = [cells[place[one]] for one in axes]
            nowhere = reasons[-1] and not any(map(str.strip, where))
            coordinates.append(np.full(3, np.nan) if nowhere else parse_numbers(path, number, axes, where))
        values = [cells[place[column]] for column in columns]
        rows.append(np.full(len(columns), np.nan) if reasons[-1] else parse_numbers(path, number, columns, values))
    if columns and not OUR_FEATURE.fullmatch(columns[0]) and not feature_columns:
        _refuse_counters(path, columns, np.array(rows))
    features = np.array(rows).reshape(len(rows), len(columns))
    return names, patients if patient_column else None, reasons, coordinates, features, columns, notices


def find_column(header: Sequence[str], wanted: str) -> str | None:
    """The column of this name, in letters of any case where none is exactly so; None of none, or of several."""
    alike = [column for column in header if column == wanted] or [
        column for column in header if column.lower() == wanted.lower()
    ]
    return alike[0] if len(alike) == 1 else None


def read_cells(path: str) -> tuple[list[str], Iterable[tuple[int, list[str]]]]:
    """(header, [(line, cells)]) of a CSV separated by commas, semicolons or tabs. Raises UserError, OSError."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors=TEXT["errors"]) as file:
            first = file.readline()
            if "\0" in first:
                raise UserError(f"{path}: is UTF-16 or no text: save it as CSV in UTF-8")
            delimiter = delimiter_of(first, ())
            file.seek(0)
            table = csv.reader(file, delimiter=delimiter)
            header = [column.strip() for column in next(table, [])]
            lines = [(table.line_num, cells) for cells in table if any(cell.strip() for cell in cells)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as a table ({error})") from error
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: has {header.count(twice)} columns {twice or 'without a name'}, expected one")
    for number, cells in lines:
        if len(cells) != len(header):
            raise UserError(
                f"{path}: line {number} has {len(cells)} cells, the header {len(header)}: expected as many; are "
                f"numbers written with the '{delimiter}' that separates the cells, or was the file cut off?"
            )
    if not lines:
        raise UserError(f"{path}: holds no cases, only {'a header' if header else 'nothing'}")
    return header, lines


def _feature_columns(
    path: str, header: list[str], known: Sequence[str], chosen: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(columns of features, notices): those chosen, or feature_0, feature_1, ..., or all that are not known."""
    ours = [column for column in header if OUR_FEATURE.fullmatch(column)]
    matched = [pattern for pattern in chosen if fnmatch.filter(header, pattern)]
    if matched or chosen and not ours:
        missing = next((pattern for pattern in chosen if pattern not in matched), None)
        if missing is not None:
            raise UserError(f"{path}: has no column {missing} of --feature_columns{did_you_mean(missing, header)}")
        found = [column for column in header if any(fnmatch.fnmatchcase(column, one) for one in chosen)]
        named = [column for column in found if column in known]
        if named:
            raise UserError(f"{path}: --feature_columns names {truncate_list(named)} too, which are no features")
        return found, []
    others = [column for column in header if column not in (*ours, *known)]
    if ours:
        if ours != [f"feature_{i}" for i in range(len(ours))]:
            raise UserError(f"{path}: its {len(ours)} columns of features are not feature_0 to feature_{len(ours) - 1}")
        return ours, [f"{path}: no features: column {truncate_list(others)}"] if others else []
    if not others:
        raise UserError(f"{path}: has no column of features besides {truncate_list(header)}")
    suspect = [column for column in others if SUSPECT.fullmatch(column)]
    if suspect:
        raise UserError(
            f"{path}: column {truncate_list([column or '(without a name)' for column in suspect])} may be a label, an "
            "index or a place, by its name: name the columns of features with --feature_columns, in quotes, such as "
            f"'{others[-1]}' or 'feat*'"
        )
    return others, [f"{path}: features are {len(others)} columns: {truncate_list(others)}"]


def parse_number(cell: str) -> float:
    """A cell as a number. Raises ValueError, also for 1_0, which is 10 to Python alone."""
    if "_" in cell:
        raise ValueError(cell)
    return float(cell)


def parse_numbers(path: str, line: int, columns: Sequence[str], cells: Sequence[str]) -> np.ndarray:
    """The cells of a line as numbers. Raises UserError for the first that is none."""
    try:
        return np.array(list(map(parse_number, cells)))
    except ValueError:
        for column, cell in zip(columns, cells):
            try:
                parse_number(cell)
            except ValueError:
                found = f"holds {plain_text(cell.strip()[:40])!r}" if cell.strip() else "is empty"
                raise UserError(
                    f"{path}: column {column} {found} in line {line}, expected a number with a decimal point "
                    "(columns that are no features: --feature_columns names those that are; cases without features: "
                    "tell why in a column reason)"
                ) from None
        raise


def _refuse_counters(path: str, columns: Sequence[str], values: np.ndarray) -> None:
    for i, column in enumerate(columns):
        if len(values) > 2 and (values[:, i] - values[0, i] == np.arange(len(values))).all():
            raise UserError(
                f"{path}: column {column} counts the rows: is it an index? Name the columns of features with "
                "--feature_columns"
            )


def _read_arrays(path: str, suffix: str) -> tuple:
    """Of an npz or HDF5: `features` (N, F), `name` (N,), if it has them `patient`, `reason` (N,), `coord` (N, 3)."""
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files if key in ARRAYS}
                held = list(file.files)
        else:
            import h5py

            with h5py.File(path, "r") as file:
                held = [key for key in file if isinstance(file[key], h5py.Dataset)]
                arrays = {key: file[key][()] for key in held if key in ARRAYS}
    except Exception as error:
        if "Object arrays" in str(error):
            raise UserError(
                f"{path}: holds Python objects, which may run code: save names as np.array(names, dtype=str)"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{path}: can't be read as {suffix[1:]} ({' '.join(str(error).split())[:200]})") from error
    twice = next((key for key in arrays if key + "s" in arrays), None)
    if twice is not None:
        raise UserError(f"{path}: holds {twice} and {twice}s, expected one of them")
    arrays = {key.rstrip("s") if key != "features" else key: np.asarray(array) for key, array in arrays.items()}
    for key in ("name", "features"):
        if key not in arrays:
            raise UserError(f"{path}: holds no array {key}, only {truncate_list(held) or 'nothing'}")
    features = arrays["features"]
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise UserError(
            f"{path}: its features are {features.dtype} of shape {features.shape}, expected numbers of shape "
            "(cases, features)"
        )
    for key, array in arrays.items():
        shape = (len(features), 3) if key == "coord" else (len(features),)
        if key != "features" and array.shape != shape:
            raise UserError(f"{path}: its {key} has shape {array.shape}, expected {shape} as its features have")
    texts = {key: _texts(arrays[key]) for key in ("name", "patient", "reason") if key in arrays}
    return (
        texts["name"],
        texts.get("patient"),
        texts.get("reason", [""] * len(features)),
        list(arrays.get("coord", [])),
        features.astype(float),
        [f"feature_{i}" for i in range(features.shape[1])],
        [],
    )


ARRAYS = ("name", "names", "patient", "patients", "reason", "reasons", "coord", "coords", "features")


def _texts(array: np.ndarray) -> list[str]:
    return [(one.decode(**TEXT) if isinstance(one, bytes) else str(one)).strip() for one in array.tolist()]


def _read_folder(path: str) -> tuple:
    """Of one .h5 per scan with the data set y_hat (F,) and, where they are, the attributes name, patient and coord.

    failed.csv beside them tells the cases without features.
    """
    import h5py

    names, patients, reasons, rows, coordinates = [], [], [], [], []
    files = sorted(name for name in os.listdir(path) if name.lower().endswith((".h5", ".hdf5")))
    if not files:
        raise UserError(f"{path}: holds no .h5 files, expected one per scan with the data set y_hat")
    for one in files:
        where = os.path.join(path, one)
        try:
            with h5py.File(where, "r") as file:
                if "y_hat" not in file:
                    raise UserError(f"{where}: has no data set y_hat, only {truncate_list(list(file)) or 'nothing'}")
                values = np.asarray(file["y_hat"][()], float)
                attributes = {key: str(file.attrs[key]).strip() for key in ("name", "patient") if key in file.attrs}
                coordinates += [np.asarray(file.attrs["coord"], float)] if "coord" in file.attrs else []
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{where}: can't be read as HDF5 ({' '.join(str(error).split())[:200]})") from error
        values = values[0] if values.ndim == 2 and len(values) == 1 else values
        if values.ndim != 1:
            raise UserError(f"{where}: its y_hat has shape {values.shape}, expected (features,)")
        names.append(attributes.get("name", os.path.splitext(one)[0]))
        patients.append(attributes.get("patient"))
        rows.append(values)
    if len({len(row) for row in rows}) > 1:
        odd = next(i for i, row in enumerate(rows) if len(row) != len(rows[0]))
        raise UserError(
            f"{path}: {files[odd]} has {len(rows[odd])} features, {files[0]} {len(rows[0])}: expected as many"
        )
    if coordinates and np.shape(coordinates) != (len(rows), 3):
        raise UserError(f"{path}: {len(rows) - len(coordinates)} of its files have no attribute coord (3,), others do")
    failed, width = os.path.join(path, "failed.csv"), len(rows[0])
    if os.path.isfile(failed) and not coordinates:  # where there are points, several are called alike
        header, lines = read_cells(failed)
        if {"name", "reason"} <= set(header):
            for _, cells in lines:
                names.append(cells[header.index("name")])
                patients.append(cells[header.index("patient")] if "patient" in header else "")
                reasons.append(cells[header.index("reason")] or "failed")
    reasons = [""] * len(rows) + reasons
    features = np.concatenate([rows, np.full((len(reasons) - len(rows), width), np.nan)])
    known = None if all(one is None for one in patients) else [one or "" for one in patients]
    return names, known, reasons, coordinates, features, [f"feature_{i}" for i in range(width)], []


def _checked(
    path: str,
    name: str,
    names: list[str],
    patients: list[str] | None,
    reasons: list[str],
    coordinates: list[np.ndarray],
    features: np.ndarray,
    columns: list[str],
    notices: list[str],
) -> LoadedTable:
    """The table without the cases that have a reason, if nothing is wrong with it."""
    places = [np.asarray(one, float).tobytes() for one in coordinates] or names
    once = first_of_each([*zip(names, patients or names, reasons, places, map(np.ndarray.tobytes, features))])
    if len(once) < len(names):
        notices = [*notices, f"{path}: {len(names) - len(once)} rows repeat others to the last digit: each counts once"]
        names, reasons, features = [names[i] for i in once], [reasons[i] for i in once], features[once]
        patients = patients and [patients[i] for i in once]
        coordinates = [coordinates[i] for i in once if len(coordinates)]
    keys = case_keys(path, names, coordinates)
    kept = [i for i, reason in enumerate(reasons) if not reason]
    if not kept or not columns:
        why = f"all {len(keys)} have a reason, such as: {reasons[0]}" if keys and not kept else "it is empty"
        raise UserError(f"{path}: holds no case with features ({why})")
    nowhere = [i for i in kept if len(coordinates) and not np.isfinite(coordinates[i]).all()]
    if nowhere:
        raise UserError(f"{path}: the place of {plain_text(names[nowhere[0]])} is not finite, expected mm")
    found = features[kept]
    bad = np.argwhere(~np.isfinite(found) | (np.abs(found) > LARGEST))
    if len(bad):
        case, column = bad[0]
        raise UserError(
            f"{path}: {columns[column]} of {plain_text(names[kept[case]])} is {found[case, column]}, expected a "
            f"finite number below {LARGEST:g}; {len(set(bad[:, 0]))} of {len(found)} cases have such"
        )
    flat = never_varies(found)
    if flat.all() and len(found) > 1:
        raise UserError(
            f"{path}: all {len(found)} cases have the same features, to six digits: nothing can be told by them; are "
            "they large numbers that differ by little, subtract their mean"
        )
    if flat.any():
        notices = [
            *notices,
            f"{path}: {flat.sum()} of {len(columns)} features are the same for all cases (to six digits), and tell "
            "nothing",
        ]
    if len(columns) == 1:
        notices = [*notices, f"{path}: of one feature the cosine of k-NN tells its sign alone: read the other protocol"]
    chosen = None if patients is None else [patients[i] for i in kept]
    if chosen is not None and not all(chosen):
        raise UserError(
            f"{path}: the patient of {plain_text(names[kept[chosen.index('')]])} is empty; expected one for each case"
        )
    left_out = {keys[i]: reason for i, reason in enumerate(reasons) if reason}
    return LoadedTable(name, path, [keys[i] for i in kept], chosen, left_out, found, columns, notices)


def known_patients(table: LoadedTable) -> np.ndarray:
    """(N,) whether a table with patients knows each case's.

    One that is but the case's own name again, as `extract_features.py` writes it where nothing tells whose a scan is,
    is none, unless cases of other names have it too.
    """
    names = collections.defaultdict(set)
    for key, patient in zip(table.keys, table.patients):
        names[patient].add(key[0])
    return np.array([names[patient] != {key[0]} for key, patient in zip(table.keys, table.patients)])


def first_of_each(rows: Sequence[Hashable]) -> list[int]:
    """Numbers of the rows but those that repeat an earlier one, as two readers mark one point."""
    return sorted({row: at for at, row in reversed([*enumerate(rows)])}.values())


def case_keys(path: str, names: Sequence[str], coordinates: Sequence[Any]) -> list[tuple]:
    """What cases are joined by: (name,) or, where there are places, (name, x, y, z) in hundredths of a mm.

    Raises UserError for an empty name and for two cases of one key.
    """
    places = np.round(np.array(coordinates, float).reshape(-1, 3) * 100).tolist()
    keys = [(name, *place) for name, place in zip(names, places)] if places else [(name,) for name in names]
    if "" in names:
        raise UserError(f"{path}: case {list(names).index('') + 1} has no name")
    counts = collections.Counter(keys)
    if len(counts) < len(keys):
        twice = max(keys, key=counts.get)
        raise UserError(f"{path}: {format_key(twice)} stands {counts[twice]} times, expected each case once")
    return keys


def format_key(key: tuple) -> str:
    return plain_text(key[0]) + (" at " + " ".join(f"{x / 100:.2f}" for x in key[1:]) if len(key) > 1 else "")


def plain_text(text: str) -> str:
    """Text for a message of one line: what a console can't show as plain ASCII."""
    return text if text.isprintable() else ascii(text)[1:-1]
