"""How a process of a fine-tuning run computes: processes, precision, batches, reading workers, signals, time limits."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

import utils
from dino3d import command_line
from dino3d.command_line import UserError, format_values
from dino3d.data.read_watchdog import with_read_timeout
from dino3d.finetune.fold_folders import fold_checkpoints
from dino3d.training.checkpoint import StopSignal
from dino3d.training.loading import cores_per_process


class Runtime(NamedTuple):
    """How this process computes, until it is interrupted.

    batch_size: per process; workers: reading processes; dtype: of the matrix products
    read_timeout: seconds that a worker may take to read a file; 0: any time
    """

    processes: utils.Processes
    dtype: torch.dtype
    batch_size: int
    workers: int
    stop_signal: StopSignal = StopSignal()
    read_timeout: float = 0.0

    def batches_of(self, loader: DataLoader) -> Iterator[Any]:
        """An iterator over a DataLoader's batches that ends the process where a file can't be read in time."""
        return with_read_timeout(loader, self.read_timeout, command_line.end_process)

    def check_batch_norm(self, model: nn.Module, epoch_length: int) -> None:
        """UserError where a step is too small to be normalised over: a single sample whose last map is one position.

        model: a `heads.OnEncoder`; epoch_length: samples
        """
        encoder, batch = model.encoder, self.batch_size * self.processes.world_size
        if model.freeze_encoder or not any(isinstance(one, nn.BatchNorm3d) for one in encoder.modules()):
            return
        positions = math.prod(math.ceil(n / p) for n, p in zip(encoder.img_size, encoder.patch_size))
        if positions == max(epoch_length % batch or batch, self.processes.world_size) == 1:
            raise UserError(
                f"--batch_size_per_gpu {batch}: the last step of {epoch_length} samples has a single one, over which "
                "batch normalisation can't train where the last map is one position, as of windows up to "
                f"{format_values(encoder.patch_size)} voxels; choose another batch size or a larger --input_size",
                everywhere=True,
            )

    @property
    def precision(self) -> str:
        return next(name for name, dtype in utils.PRECISIONS.items() if dtype == self.dtype)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32)


@contextlib.contextmanager
def start_runtime(values: Mapping[str, Any]) -> Iterator[tuple[Runtime, str, list[str]]]:
    """(Runtime, name of its precision, notices), after joining the other processes; the output folder is this run's
    while the block runs.

    values: {flag: value}, of `flags.data_flags` and `flags.add_finetune_flags`
    """
    output_dir, workers = Path(values["output_dir"]), values["num_workers"]
    processes = utils.distributed_init()
    with utils.own_output_dir(output_dir, processes):
        first = None if values["predict"] else processes.run_on_main(lambda: next(fold_checkpoints(output_dir), None))
        precision, notices = utils.choose_precision(values["precision"], values["use_fp16"], processes, first)
        notices += command_line.ignored_flags(dist_url=values["dist_url"], local_rank=values["local_rank"])
        workers = min(16, cores_per_process(processes)) if workers is None else workers
        stop_signal = StopSignal(processes, output_dir / "preempted")
        runtime = Runtime(
            processes,
            utils.PRECISIONS[precision],
            values["batch_size_per_gpu"],
            workers,
            stop_signal,
            values["read_timeout"],
        )
        yield runtime, precision, notices
