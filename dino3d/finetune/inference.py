"""Cases through a trained model: shared by the ranks, each case once, its row on every rank."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from augmentations import scale_intensity
from dino3d.command_line import Preempted, UserError
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError, is_kind
from dino3d.data.layouts import find_unlabelled, none_found
from dino3d.data.lists import PATIENT, is_table, read_list
from dino3d.finetune.crops import collate_crops, read_ahead
from dino3d.finetune.fold_folders import fold_files
from dino3d.finetune.runtime import Runtime
from dino3d.training.checkpoint import StopRequested


class Known(NamedTuple):
    """What is known of a row of a table before the prediction: its place there, and the cells behind the case."""

    place: int
    cells: tuple[Any, ...] = ()


def map_over_ranks(
    work: Callable[[int], np.ndarray],
    cases: Sequence[int] | np.ndarray,
    runtime: Runtime,
    failures: dict[int, str] | None = None,
) -> np.ndarray:
    """(N, ...) what `work` gives for each case, in the order of `cases`, on every rank; each case on one of them.

    cases: (N,) numbers, each once
    failures: takes, on every rank, the reason of each case that `work` fails with, which has no row then; without it
        such a case raises UserError
    Raises Preempted, on all ranks.
    """
    processes, rows = runtime.processes, {}
    try:
        for case in cases[processes.rank :: processes.world_size]:
            if runtime.stop_signal.received:
                break
            try:
                rows[int(case)] = work(int(case))
            except (UserError, Preempted):  # concern all cases
                raise
            except Exception as error:
                if failures is None:
                    raise
                failures[int(case)] = reason_of(error)
    except StopRequested:
        pass  # the case at hand is not done
    except DataError as error:
        raise UserError(str(error)) from error
    return gather_rows(runtime, [int(case) for case in cases], rows, failures)


def infer_windows(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    cases: Sequence[int] | np.ndarray,
    clip_range: Sequence[float],
    runtime: Runtime,
    failures: dict[int, str] | None = None,
) -> np.ndarray:
    """(N, ...) float64 what `forward` makes of each case's centre window, in the order of `cases`, on every rank.

    forward: gives (B, ...) of volumes (B, 1, X, Y, Z); dataset: EvaluationCrops; cases: (N,) numbers, each once
    failures: takes the reason of each case that can't be read, see `map_over_ranks`
    """
    processes = runtime.processes
    mine = [int(case) for case in cases[processes.rank :: processes.world_size]]  # no rank repeats a case to fill up
    batches, rows = read_ahead(dataset.__getitem__, mine, runtime.batch_size, runtime.workers), {}
    for first in range(0, len(mine), runtime.batch_size):
        if runtime.stop_signal.received:
            break
        read = dict(zip(mine[first:], next(batches)))  # {case: sample, or why it can't be read}
        bad = {case: sample for case, sample in read.items() if isinstance(sample, str)}
        if bad and failures is None:
            raise UserError(next(iter(bad.values())))
        good = [sample for case, sample in read.items() if case not in bad]
        if bad:
            failures.update(bad)
        if good:
            batch = collate_crops(good)
            volumes = scale_intensity(batch.crops.to(processes.device), *clip_range)[:, None]  # (B, 1, X, Y, Z)
            with torch.no_grad(), runtime.autocast():
                rows.update(zip(batch.cases.tolist(), forward(volumes).double().cpu().numpy()))
    return gather_rows(runtime, [int(case) for case in cases], rows, failures)


def gather_rows(
    runtime: Runtime, cases: Sequence[int], mine: dict[int, np.ndarray], failures: dict[int, str] | None = None
) -> np.ndarray:
    """(N, ...) one row per case, in the order of `cases`, of the rows that the ranks have for their shares.

    cases: (N,) case numbers, each once; mine: {case: row} of this rank; it is incomplete where the rank was interrupted
    failures: {case: why it has no row} of this rank, which becomes that of all; those cases are left out
    Raises Preempted, on all ranks, where one did so; RuntimeError unless every other case has exactly one row;
    UserError where none has.
    """
    rows, interrupted, without = {}, False, {}
    for part, failed, received in runtime.processes.all_gather((mine, failures, bool(runtime.stop_signal.received))):
        if rows.keys() & part.keys():
            raise RuntimeError("two processes evaluated the same case")
        rows.update(part)
        without.update(failed or {})
        interrupted = interrupted or received
    if interrupted and len(rows) + len(without) < len(cases):
        runtime.stop_signal.end()
    if rows.keys() | without.keys() != set(cases):
        raise RuntimeError(f"{len(rows)} cases were evaluated instead of {len(cases)}")
    if failures is not None:
        failures.update(without)
    if not rows:
        raise UserError(
            f"not one of {len(cases)} cases could be evaluated, {next(iter(without.values()))}", everywhere=True
        )
    return np.stack([rows[case] for case in cases if case in rows])


def reason_of(error: Exception) -> str:
    """In one line, why a file could not be used."""
    if isinstance(error, DataError):
        return error.reason
    text = " ".join(str(error).split())[:200]
    short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text
    if short and torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next one may be smaller
    return f"out of memory ({text})" if short else f"unexpected: {type(error).__name__}: {text}"


def failed_cases(names: Sequence[str], failures: dict[int, str]) -> list[str]:
    """A line for each case without figures, sorted by number."""
    return [f"{names[case]} has no figures: {reason}" for case, reason in sorted(failures.items())]


def find_folds(weights: str, output_dir: Path) -> list[Path]:
    """The best.pth files of the folds whose models predict. Raises UserError, also where the output is of a run."""
    if (output_dir / "splits.json").exists():
        raise UserError(f"--output_dir {output_dir}: holds a trained run, whose results would be lost; choose another")
    return fold_files(weights)


class NewCases(NamedTuple):
    """What --predict names. folder: that all of them lie in; names: volumes, relative to it; patients: of a table"""

    folder: str
    names: list[str]
    patients: list[str] | None = None

    @property
    def paths(self) -> list[str]:
        return [os.path.join(self.folder, name) for name in self.names]

    @property
    def columns(self) -> list[str]:
        """Those of the predictions' table that are known before."""
        return [] if self.patients is None else [PATIENT]

    def known(self) -> list[list[Known]]:
        """What is known of each case's rows."""
        cells = [()] * len(self.names) if self.patients is None else [(patient,) for patient in self.patients]
        return [[Known(at, of_case)] for at, of_case in enumerate(cells)]


def find_new_cases(source: str) -> NewCases:
    """The NewCases that --predict names: volumes below a folder, one file, or those of a table. Raises UserError."""
    passed_over = ""
    try:
        if is_table(source) and not os.path.isdir(source):
            rows = read_list(source, (), [PATIENT])
            folder = os.path.commonpath([os.path.dirname(row.path) for row in rows])
            patients = [row.cells[PATIENT] for row in rows] if PATIENT in rows[0].cells else None
            new = NewCases(folder, [os.path.relpath(row.path, folder) for row in rows], patients)
        elif os.path.isdir(source) or not os.path.exists(source):
            names, passed_over = find_unlabelled(source)
            new = NewCases(source, names)
        elif is_kind(source, VOLUME_SUFFIXES):
            new = NewCases(os.path.dirname(source) or ".", [os.path.basename(source)])
        else:
            raise DataError(
                source, f"is a file; expected a folder, a table (.csv), or a volume ({', '.join(VOLUME_SUFFIXES)})"
            )
    except (DataError, UserError) as error:
        raise UserError(f"--predict {error}") from error
    if not new.names:
        raise UserError(f"--predict {source}: {none_found(passed_over)}")
    if passed_over:
        print(f"passed over below {source}: {passed_over}", flush=True)
    return new
