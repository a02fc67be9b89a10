"""What is done of a long piece of work, case by case, so that the same command resumes it.

Each process appends to a file of its own in a folder for the work; the first line of each is the recipe, all that the
rows depend on besides their files.
"""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dino3d.command_line import UserError
from dino3d.files import append_json, atomic_write, read_json_lines
from utils import Processes


class Journal:
    """What has become of cases in this and earlier runs of a command: of each a line with its name ("case"), the state
    of its files, which changes when these do, its rows, and the reason why there are none or "".

    folder: of the work; files: name of a process's file in it, with {} for the rank; recipe: {name: value}
    is_done: whether rows of a case of this name and state, which an earlier run has made, still hold
    refusal: gives the error for a folder that holds rows of another recipe, of the names of what differs
    done: names of the cases that are there. Raises UserError, on all ranks, as `refusal` says.
    """

    def __init__(
        self,
        folder: Path,
        files: str,
        recipe: Mapping[str, Any],
        is_done: Callable[[str, str], bool],
        refusal: Callable[[str], str],
        processes: Processes,
    ) -> None:
        self.recipe, self._all = json.loads(json.dumps(recipe)), lambda: sorted(folder.glob(files.format("*")))
        self._own = folder / files.format(processes.rank)
        self.done = processes.run_on_main(lambda: self._start(is_done, refusal))

    def _start(self, is_done: Callable[[str, str], bool], refusal: Callable[[str], str]) -> set[str]:
        """Bring what earlier runs have done into one file."""
        kept, journals = {}, self._all()
        for path in journals:
            lines = read_json_lines(path)
            found = lines[0].get("recipe") if lines else self.recipe
            if found != self.recipe:
                found = found if isinstance(found, dict) else {}
                different = [name for name in self.recipe | found if found.get(name) != self.recipe.get(name)]
                raise UserError(refusal(" and ".join(different or ["recipe"])))
            kept |= {line["case"]: line for line in lines[1:] if _is_case(line)}
        kept = {case: one for case, one in kept.items() if not one["reason"] and is_done(case, one["state"])}
        try:  # the others go when the one is whole: a run that is killed here loses nothing
            with atomic_write(self._own) as part:
                for line in ({"recipe": self.recipe}, *kept.values()):
                    append_json(part, line)
            for path in journals:
                if path != self._own:
                    path.unlink()
        except OSError as error:
            raise self._unwritten(error) from error
        return set(kept)

    def add(self, case: str, state: str, rows: Any, reason: str = "") -> None:
        """Keep what has become of a case. Raises UserError where the disk takes nothing."""
        line = {"case": case, "state": state, "rows": rows, "reason": reason}
        try:
            for one in (line,) if self._own.exists() else ({"recipe": self.recipe}, line):
                append_json(self._own, one)
        except OSError as error:
            raise self._unwritten(error) from error

    def read(self) -> dict[str, dict[str, Any]]:
        """{case: its line} of all ranks."""
        lines = [line for path in self._all() for line in read_json_lines(path)[1:]]
        return {line["case"]: line for line in lines if _is_case(line)}

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"{self._own}: can't be written ({error.strerror or error})")


class FeatureJournal(Journal):
    """The Journal of rows {table: (F,) float32}. states: {case: of its files}; refusal: see `Journal`"""

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        states: Mapping[str, str],
        refusal: Callable[[str], str],
        processes: Processes,
    ) -> None:
        self._states = states
        super().__init__(
            folder, "journal.{}.jsonl", recipe, lambda case, state: states.get(case) == state, refusal, processes
        )

    def add_features(self, case: str, rows: Mapping[str, np.ndarray], reason: str = "") -> None:
        """`add` them, to the last bit."""
        texts = {name: base64.b64encode(row.astype("<f4").tobytes()).decode() for name, row in rows.items()}
        self.add(case, self._states[case], texts, reason)

    def features(self) -> dict[str, tuple[dict[str, np.ndarray], str]]:
        """{case: (rows, reason)} of all ranks."""
        return {
            case: (
                {name: np.frombuffer(base64.b64decode(text), "<f4") for name, text in line["rows"].items()},
                line["reason"],
            )
            for case, line in self.read().items()
        }


def _is_case(line: dict[str, Any]) -> bool:
    return line.keys() >= {"case", "state", "rows", "reason"}
