"""Tables of features: a row for each scan, crop or point, as CSV, NumPy's npz, HDF5, or one HDF5 file for each row.

name, patient, reason: (N,) text; features: (N, F) float32, NaN where `reason` says why there are none; coord: (N, 3)
LPS mm where the rows are points. A CSV has empty cells there, and else the shortest text of each float32.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from dino3d.data.conventions import is_kind
from dino3d.data.hdf5 import fill_hdf5
from dino3d.data.points import AXES
from dino3d.files import TEXT, atomic_write, read_json, write_json, write_table

SUFFIXES = (".csv", ".npz", ".h5")
NAME_BYTES = 200  # of a file's name
FOLDER_INDEX = ".written.json"  # names of the files in a folder of rows


class FeatureTable(NamedTuple):
    """See the module. names, patients, reasons: of the N rows"""

    names: list[str]
    patients: list[str]
    reasons: list[str]
    features: np.ndarray
    coords: np.ndarray | None = None


def write_features(path: Path, table: FeatureTable) -> None:
    """Write a table in the form of its suffix, whole or not at all; without one of them a folder. Raises OSError."""
    if path.suffix == ".csv":
        _write_csv(path, table)
    elif path.suffix == ".npz":
        with atomic_write(path) as part, open(part, "wb") as file:
            np.savez(file, **_arrays(table))
    elif path.suffix == ".h5":
        with fill_hdf5(path, track_order=True) as file:
            for name, values in _arrays(table).items():
                if values.dtype.kind == "U":
                    file.create_dataset(name, data=[_bytes(text) for text in values], dtype=h5py.string_dtype())
                else:
                    file[name] = values
    else:
        _write_folder(path, table)


def _arrays(table: FeatureTable) -> dict[str, np.ndarray]:
    texts = {"name": table.names, "patient": table.patients, "reason": table.reasons}
    arrays = {name: np.array(values, dtype=str) for name, values in texts.items()}
    coords = {} if table.coords is None else {"coord": table.coords}
    return {**arrays, **coords, "features": table.features}


def _bytes(text: str) -> bytes:
    """Text as HDF5 holds it: names of files may be any bytes, which h5py would refuse."""
    return str(text).encode(**TEXT)


def _write_csv(path: Path, table: FeatureTable) -> None:
    width = table.features.shape[1]
    header, place = _header(table)

    def rows() -> Iterator[list]:
        for at, reason in enumerate(table.reasons):
            # str of a NumPy float32 is the shortest text that gives it again
            values = [""] * width if reason else [str(value) for value in table.features[at]]
            yield [table.names[at], table.patients[at], *place(at), reason, *values]

    write_table(path, [*header, *(f"feature_{k}" for k in range(width))], rows())


def _header(table: FeatureTable) -> tuple[list[str], Callable[[int], list[str]]]:
    """(columns before the features, what gives a row's texts in those of its point)."""
    if table.coords is None:
        return ["name", "patient", "reason"], lambda at: []
    return ["name", "patient", *AXES, "reason"], lambda at: [_number(value) for value in table.coords[at]]


def _number(value: float) -> str:
    return "" if np.isnan(value) else repr(float(value))


def _write_folder(folder: Path, table: FeatureTable) -> None:
    """<name>.h5 of each row with y_hat (F,), and failed.csv of those without features. Files that an earlier call has
    written of rows that are no more are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    written, current = folder / FOLDER_INDEX, [f"{name}.h5" for name in file_names(table.names)]
    for gone in set(read_json(written) if written.is_file() else ()) - set(current):
        (folder / gone).unlink(missing_ok=True)
    write_json(written, current)
    for at, (name, file_name) in enumerate(zip(table.names, current)):
        if table.reasons[at]:
            (folder / file_name).unlink(missing_ok=True)
            continue
        with fill_hdf5(folder / file_name) as file:
            file["y_hat"] = table.features[at]
            for key, text in (("name", name), ("patient", table.patients[at])):
                file.attrs.create(key, _bytes(text), dtype=h5py.string_dtype())
            if table.coords is not None:
                file.attrs["coord"] = table.coords[at]
    failed = [at for at, reason in enumerate(table.reasons) if reason]
    if failed:
        header, place = _header(table)
        rows = [[table.names[at], table.patients[at], *place(at), table.reasons[at]] for at in failed]
        write_table(folder / "failed.csv", header, rows)
    else:
        (folder / "failed.csv").unlink(missing_ok=True)


def is_features(path: Path | str) -> bool:
    """Whether a file is HDF5 as `write_features` writes it, and no scan."""
    if not is_kind(path, (".h5",)):
        return False
    try:
        with h5py.File(path, "r", locking=False) as file:
            return "y_hat" in file or {"name", "patient", "features"} <= file.keys()
    except OSError:  # it is told when its turn comes
        return False


def file_names(names: list[str]) -> list[str]:
    """What to call each row's file, without a suffix: its name without separators; what would stand twice is numbered.

    No longer than any file system takes: 255 bytes with what is put before and behind it.
    """
    counts, found = {}, {}  # as a set that keeps its order
    for name in names:
        plain = re.sub(r"[^\w.+=#@-]", "_", name).lstrip(".").encode()[:NAME_BYTES].decode(errors="ignore") or "scan"
        own = plain
        while own in found:  # also where another one is called plain_2
            counts[plain] = counts.get(plain, 1) + 1
            own = f"{plain}_{counts[plain]}"
        found[own] = None
    return list(found)
