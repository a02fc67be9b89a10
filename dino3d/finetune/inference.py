"""Cases through a trained model: shared by the ranks, each case once, its row on every rank."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from augmentations import scale_intensity
from dino3d.command_line import UserError
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError
from dino3d.data.layouts import find_volumes
from dino3d.finetune.crops import read_ahead
from dino3d.finetune.fold_folders import fold_folders
from dino3d.finetune.runtime import Runtime
from dino3d.training.checkpoint import StopRequested
from dino3d.training.loading import next_batch


def map_over_ranks(
    work: Callable[[int], np.ndarray], cases: Sequence[int] | np.ndarray, runtime: Runtime
) -> np.ndarray:
    """(N, ...) what `work` gives for each case, in the order of `cases`, on every rank; each case on one of them.

    cases: (N,) numbers, each once. Raises UserError for a case that can't be used; Preempted, on all ranks.
    """
    processes, rows = runtime.processes, {}
    try:
        for case in cases[processes.rank :: processes.world_size]:
            if runtime.stop_signal.received:
                break
            rows[int(case)] = work(int(case))
    except StopRequested:
        pass  # the case at hand is not done
    except DataError as error:
        raise UserError(str(error)) from error
    return gather_rows(runtime, [int(case) for case in cases], rows)


def infer_windows(
    forward: Callable[[Tensor], Tensor],
    dataset: Dataset,
    cases: Sequence[int] | np.ndarray,
    clip_range: Sequence[float],
    runtime: Runtime,
) -> np.ndarray:
    """(N, ...) float64 what `forward` makes of each case's centre window, in the order of `cases`, on every rank.

    forward: gives (B, ...) of volumes (B, 1, X, Y, Z); dataset: EvaluationCrops; cases: (N,) numbers, each once
    """
    processes = runtime.processes
    mine = [int(case) for case in cases[processes.rank :: processes.world_size]]  # no rank repeats a case to fill up
    batches, rows = read_ahead(dataset, mine, runtime.batch_size, runtime.workers), {}
    while len(rows) < len(mine) and not runtime.stop_signal.received:
        batch = next_batch(batches)
        volumes = scale_intensity(batch.crops.to(processes.device), *clip_range)[:, None]  # (B, 1, X, Y, Z)
        with torch.no_grad(), runtime.autocast():
            rows.update(zip(batch.cases.tolist(), forward(volumes).double().cpu().numpy()))
    return gather_rows(runtime, [int(case) for case in cases], rows)


def gather_rows(runtime: Runtime, cases: Sequence[int], mine: dict[int, np.ndarray]) -> np.ndarray:
    """(N, ...) one row per case, in the order of `cases`, of the rows that the ranks have for their shares.

    cases: (N,) case numbers, each once; mine: {case: row} of this rank; it is incomplete where the rank was interrupted
    Raises Preempted, on all ranks, where one did so; RuntimeError unless every case has exactly one row.
    """
    rows, interrupted = {}, False
    for part, received in runtime.processes.all_gather((mine, bool(runtime.stop_signal.received))):
        if rows.keys() & part.keys():
            raise RuntimeError("two processes evaluated the same case")
        rows.update(part)
        interrupted = interrupted or received
    if interrupted and len(rows) < len(cases):
        runtime.stop_signal.end()
    if rows.keys() != set(cases):
        raise RuntimeError(f"{len(rows)} cases were evaluated instead of {len(cases)}")
    return np.stack([rows[case] for case in cases])


def find_new_cases(folder: str, weights: str, output_dir: Path) -> tuple[list[str], list[Path]]:
    """(volumes below the folder, relative to it; fold folders) of a prediction. Raises UserError."""
    if (output_dir / "splits.json").exists():
        raise UserError(f"--output_dir {output_dir}: holds a trained run, whose results would be lost; choose another")
    folders = fold_folders(weights, "best.pth")
    try:
        names = find_volumes(folder)
    except DataError as error:
        raise UserError(f"--predict {error}") from error
    if not names:
        raise UserError(f"--predict {folder}: no volume found below it (looked for {', '.join(VOLUME_SUFFIXES)})")
    return names, folders
