"""Predictions of new files: each one's rows are on disk as soon as they are known, and one file's failure is its own.

A rank appends what it has done to a journal of its own, `.predicted.<rank>.jsonl` in the output folder; the table is
made of all journals. The same command goes on with the files that have no rows yet, have failed or have changed.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from augmentations import scale_intensity
from dino3d.command_line import Preempted, UserError
from dino3d.data.scans import state_of
from dino3d.features.journal import Journal
from dino3d.files import file_state, read_table, write_table
from dino3d.finetune.crops import EvaluationCrops, collate_crops, read_ahead
from dino3d.finetune.inference import Known, reason_of
from dino3d.finetune.runtime import Runtime

JOURNALS = ".predicted.{}.jsonl"
TABLE_EVERY = 2.0  # seconds between two versions of the table, which is written whole
SLOW_TABLE = 5.0  # seconds, above which they are ten times as long as writing it takes


class Predictions:
    """The rows of a prediction: those on disk and those that this rank adds.

    table: path of the CSV; columns: of it, "case" first; a last one, "reason", says why a file has no prediction
    names, paths: of the files, in the table's order; outputs: of each the files that must stand beside its rows
    recipe: {name: value} of all that the rows depend on besides the files
    known: of each file the Known rows that it leads to, such as one for each point in it
    unit: what to call what a row stands for
    Raises UserError, on all ranks, where the folder holds predictions of another recipe.
    """

    def __init__(
        self,
        table: Path,
        columns: Sequence[str],
        names: Sequence[str],
        paths: Sequence[str],
        outputs: Sequence[Sequence[Path]],
        recipe: dict[str, Any],
        runtime: Runtime,
        known: Sequence[Sequence[Known]],
        unit: str = "files",
    ):
        self.table, self.columns, self.names, self.paths = table, [*columns, "reason"], names, paths
        self.outputs, self.runtime, self.unit = outputs, runtime, unit
        self.known = dict(zip(names, known))
        self._written, self._pause, files = 0.0, TABLE_EVERY, dict(zip(names, zip(paths, outputs)))

        def is_done(name: str, state: str) -> bool:
            path, beside = files.get(name, (None, ()))
            return path is not None and state == state_of(path) and all(output.is_file() for output in beside)

        def refusal(other: str) -> str:
            return (
                f"--output_dir {table.parent}: holds predictions with another {other}; choose another folder, or "
                "remove it"
            )

        self.journal = Journal(table.parent, JOURNALS, recipe, is_done, refusal, runtime.processes)
        self.todo = [at for at, name in enumerate(names) if name not in self.journal.done]

    def done_before(self, what: str = "of them") -> str:
        """What to say of files that an earlier run has done. what: they are"""
        return f"; {len(self.journal.done)} {what} were done before" if self.journal.done else ""

    def share(self) -> list[int]:
        """Numbers of the files that this rank is to predict."""
        return self.todo[self.runtime.processes.rank :: self.runtime.processes.world_size]

    def add(self, at: int, rows: Sequence[Sequence[Any]], reason: str = "") -> None:
        """Keep what has become of a file. rows: of the table, behind what is known of them and without a reason; one
        that has none is the reason itself, a text"""
        self.journal.add(self.names[at], state_of(self.paths[at]), rows, reason)
        if self.runtime.processes.is_main and time.monotonic() - self._written > self._pause:
            self.write()

    def attempt(self, at: int, predict: Callable[[], Sequence[Sequence[Any]]]) -> Sequence[Sequence[Any]]:
        """Add, and return, the rows that `predict` gives, or add the reason why it gives none.

        Raises UserError, Preempted.
        """
        try:
            rows, reason = predict(), ""
        except (UserError, Preempted):  # concern all files
            raise
        except Exception as error:
            rows, reason = [], reason_of(error)
        self.fail(at, reason) if reason else self.add(at, rows)
        return rows

    def fail(self, at: int, reason: str) -> None:
        """Keep, and print, why a file has no prediction."""
        self.add(at, [], reason)
        print(f"{self.names[at]}: no prediction: {reason}", flush=True)

    def write(self) -> list[tuple[str, str]]:
        """Write the table of all ranks' rows so far; returns (case, reason) of the rows without a prediction."""
        lines, rows, failed = self.journal.read(), [], []
        for name in (name for name in self.names if name in lines):
            known = self.known[name]
            made = lines[name]["rows"] if not lines[name]["reason"] else [lines[name]["reason"]] * len(known)
            for (place, cells), row in zip(known if len(known) > 1 else itertools.repeat(known[0]), made):
                reason = row if isinstance(row, str) else ""
                failed += [(name, reason)] * bool(reason)
                empty = [""] * (len(self.columns) - 2 - len(cells))
                rows.append((place, [name, *cells, *(empty if reason else row), reason]))
        started = time.monotonic()
        write_table(self.table, self.columns, [row for _, row in sorted(rows, key=lambda pair: pair[0])])
        self._written = time.monotonic()
        took = self._written - started  # seconds, for a table of a million rows
        self._pause = 10 * took if 10 * took > SLOW_TABLE else TABLE_EVERY
        return failed

    def finish(self, summary: Callable[[list[dict[str, str]]], str]) -> None:
        """Write the table when all ranks are done, and print a summary of its rows.

        Raises Preempted where a signal came, UserError where files failed, on all ranks.
        """
        processes, stop_signal = self.runtime.processes, self.runtime.stop_signal
        interrupted = any(processes.all_gather(bool(stop_signal.received)))
        failed = processes.run_on_main(self.write)
        if interrupted:
            stop_signal.end()
        if processes.is_main:
            print(summary(read_table(self.table)), flush=True)
        if failed:
            (name, reason), rows = failed[0], sum(map(len, self.known.values()))
            raise UserError(
                f"{len(failed)} of {rows} {self.unit} have no prediction, such as {name}: {reason}; the reasons are in "
                f"{self.table}",
                everywhere=True,
            )


def predict_windows(
    rows_of: Callable[[Tensor], list[list[Any]]],
    dataset: EvaluationCrops,
    predictions: Predictions,
    clip_range: Sequence[float],
    runtime: Runtime,
) -> None:
    """Add the rows of each file's centre window, until a signal comes.

    rows_of: gives the table's row of each of (B, 1, X, Y, Z) volumes
    """
    mine, device = predictions.share(), runtime.processes.device

    def rows_of_samples(samples: list[tuple[Any, ...]]) -> list[list[Any]]:
        volumes = scale_intensity(collate_crops(samples).crops.to(device), *clip_range)[:, None]  # (B, 1, X, Y, Z)
        with torch.no_grad(), runtime.autocast():
            return rows_of(volumes)

    samples = read_ahead(dataset.__getitem__, mine, runtime.batch_size, runtime.workers)
    for first in range(0, len(mine), runtime.batch_size):
        if runtime.stop_signal.received:
            return
        numbers, read = mine[first : first + runtime.batch_size], next(samples)
        good = {at: sample for at, sample in zip(numbers, read) if not isinstance(sample, str)}
        for at in numbers:
            if at not in good:
                predictions.fail(at, read[numbers.index(at)].partition(f"{predictions.paths[at]}: ")[2])
        try:
            rows = rows_of_samples(list(good.values())) if good else []
        except Exception:  # one of them may be at fault: each on its own
            for at, sample in good.items():
                predictions.attempt(at, lambda sample=sample: rows_of_samples([sample]))
            continue
        for at, row in zip(good, rows):
            predictions.add(at, [row])


def weights_recipe(files: Sequence[Path]) -> dict[str, Any]:
    """What a prediction depends on of these files of trained folds."""
    return {"weights": [[str(file.parent.resolve()), *file_state(file)] for file in files]}
