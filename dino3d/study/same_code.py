"""Versions of the code that have been shown to give the same scores, so that what one has run counts for the other.

A hash can't tell a faster loader from another loss. So `same_code.csv` beside the records of a table says which
versions gave the same scores to the last digit where both were run: results/same_code.py compares them and adds a line.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino3d.command_line import UserError
from dino3d.files import read_table, write_table

SAME_CODE = "same_code.csv"
SAME_CODE_COLUMNS = ("code", "same_as", "records", "tasks", "device")
SCORE_ROUNDING = 1.5e-7  # of scores: the last of the seven digits that records keep may fall either way

SEVERAL = "+"  # between the versions that have made one result, which counts for none of them
UNKNOWN = "unknown"


def join_codes(codes: Iterable[str]) -> str:
    """The version of the code that made a result, or all of them, where its stages or attempts were of several."""
    return SEVERAL.join(dict.fromkeys(one for code in codes for one in codes_in(code)))


def codes_in(code: str) -> list[str]:
    """The versions of the code in what `join_codes` gave."""
    return (code or UNKNOWN).split(SEVERAL)


def codes_like(folder: Path, code: str) -> set[str]:
    """A version of the code, and all that a folder of records calls the same. Raises UserError."""
    path, found = folder / SAME_CODE, {code}
    if not path.exists():
        return found
    try:
        pairs = [{row["code"], row["same_as"]} for row in read_table(path)]
        if any(None in pair or "" in pair for pair in pairs):
            raise ValueError("a row lacks one of them")
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: can't be read ({getattr(error, 'strerror', None) or repr(error)}), expected the columns code and "
            "same_as"
        ) from error
    for _ in pairs:  # through others, however they stand in the file
        found = found.union(*(pair for pair in pairs if pair & found))
    return found


def add_same_code(folder: Path, code: str, same_as: str, records: Sequence[dict[str, Any]]) -> None:
    """Another line. records: of `code`, which were compared. Raises OSError, UserError for what several versions have
    made, which shows nothing of any."""
    for one in (code, same_as):
        if len(codes_in(one)) > 1:
            raise UserError(
                f"{folder}: records of {one} were made by several versions of the code, so that their scores show "
                "nothing of one: run them again by one, or remove them"
            )
    path = folder / SAME_CODE
    rows = [[row.get(name, "") for name in SAME_CODE_COLUMNS] for row in read_table(path)] if path.exists() else []
    tasks, devices = (" ".join(sorted({one[name] for one in records})) for name in ("task", "device"))
    write_table(path, SAME_CODE_COLUMNS, [*rows, [code, same_as, len(records), tasks, devices]])


def score_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of two records' scores; infinite where they are not of the same cases in the same folds."""
    if any(one[name] != other[name] for name in ("patients", "labels")) or len(one["repeats"]) != len(other["repeats"]):
        return np.inf
    largest = 0.0
    for first, second in zip(one["repeats"], other["repeats"]):
        if first["folds"] != second["folds"]:
            return np.inf
        values = [np.array(each["values"], float) for each in (first, second)]  # None becomes NaN
        if values[0].shape != values[1].shape or (np.isnan(values[0]) != np.isnan(values[1])).any():
            return np.inf
        largest = max(largest, float(np.nanmax(np.abs(values[0] - values[1]), initial=0)))
    return largest
