"""What is done of a long piece of work, row by row, so that the same command resumes it.

Each process appends to a file of its own, `journal.<rank>.jsonl` in a folder for the work; the first line of each is
the recipe, all that the rows depend on besides their files.
"""

import base64
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino3d.command_line import UserError
from dino3d.files import append_json, read_json_lines
from utils import Processes

JOURNAL_FILES = "journal.{}.jsonl"


class Journal:
    """The rows of this and of earlier runs of a command. Rows are {name: (F,) float32} or the reason why there is none.

    folder: of the work; recipe: {name: value}; keys: of all rows, which name them; states: of each row's files, which
        change when these do
    flag: what to call the output in an error, such as --output FILE
    done: keys of the rows that are there and whose files are as they were. Raises UserError, on all ranks, where the
    folder holds rows of another recipe.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        keys: Sequence[str],
        states: Sequence[str],
        flag: str,
        processes: Processes,
    ) -> None:
        self.folder, self.keys, self.flag = folder, list(keys), flag
        self.recipe, self._states = json.loads(json.dumps(recipe)), dict(zip(keys, states))
        self._own = folder / JOURNAL_FILES.format(processes.rank)
        self.done = processes.run_on_main(self._start)

    def _start(self) -> set[str]:
        """Bring what earlier runs have done into one file."""
        kept = {}
        for path in sorted(self.folder.glob(JOURNAL_FILES.format("*"))):
            lines = read_json_lines(path)
            found = lines[0].get("recipe") if lines else self.recipe
            if found != self.recipe:
                found = found if isinstance(found, dict) else {}
                different = [name for name, value in self.recipe.items() if found.get(name) != value] or ["recipe"]
                raise UserError(
                    f"{self.flag}: was begun with another {' and '.join(different)}; choose another output, or remove "
                    f"{self.folder} and it to begin anew"
                )
            kept |= {line["key"]: line for line in lines[1:] if _is_row(line)}
        kept = {
            key: kept[key]
            for key in self.keys
            if key in kept and not kept[key]["reason"] and kept[key]["state"] == self._states[key]
        }
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "new.jsonl").unlink()
        self._append(self.folder / "new.jsonl", {"recipe": self.recipe}, *kept.values())
        (self.folder / "new.jsonl").replace(self.folder / JOURNAL_FILES.format(0))
        for path in self.folder.glob(JOURNAL_FILES.format("*")):
            if path.name != JOURNAL_FILES.format(0):
                path.unlink()
        return set(kept)

    def add(self, key: str, rows: Mapping[str, np.ndarray], reason: str = "") -> None:
        """Keep what has become of a row. Raises UserError where the disk takes nothing."""
        values = {name: base64.b64encode(row.astype("<f4").tobytes()).decode() for name, row in rows.items()}
        line = {"key": key, "state": self._states[key], "reason": reason, "rows": values}
        self._append(self._own, *([] if self._own.exists() else [{"recipe": self.recipe}]), line)

    def read(self) -> dict[str, tuple[dict[str, np.ndarray], str]]:
        """{key: (rows, reason)} of all ranks."""
        lines = [
            line for path in sorted(self.folder.glob(JOURNAL_FILES.format("*"))) for line in read_json_lines(path)[1:]
        ]
        return {
            line["key"]: (
                {name: np.frombuffer(base64.b64decode(text), "<f4") for name, text in line["rows"].items()},
                line["reason"],
            )
            for line in lines
            if _is_row(line) and self._states.get(line["key"]) == line["state"]
        }

    def _append(self, path: Path, *lines: dict[str, Any]) -> None:
        try:
            for line in lines:
                append_json(path, line)
        except OSError as error:
            raise UserError(f"{path}: can't be written ({error.strerror or error})") from error


def _is_row(line: Any) -> bool:
    return isinstance(line, dict) and line.keys() >= {"key", "state", "reason", "rows"}
