"""How a process of a fine-tuning run computes: processes, precision, batches, workers, and what ranks bring together."""
from typing import NamedTuple

import numpy as np
import torch

import utils
from dino3d import command_line
from dino3d.data.read_watchdog import watched
from dino3d.training.checkpoint import Interruption
from dino3d.training.loading import cores_per_process


class Device(NamedTuple):
    """How this process computes, until it is interrupted.

    batch_size: per process; workers: reading processes; dtype: of the matrix products
    read_timeout: seconds that a worker may take to read a file; 0: any time
    """
    processes: utils.Processes
    dtype: torch.dtype
    batch_size: int
    workers: int
    interruption: Interruption = Interruption()
    read_timeout: float = 0.0

    def batches_of(self, loader):
        """An iterator over a DataLoader's batches that ends the process where a file can't be read in time."""
        return watched(loader, self.read_timeout, command_line.end_process)

    def autocast(self):
        return torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32)


def set_up(output_dir, precision, use_fp16, num_workers, batch_size, read_timeout, **ignored):
    """(Device, name of its precision, notices), after joining the other processes and making the output folder.

    precision, num_workers: None for what suits the machine; ignored: flags that have no effect any more
    """
    processes = utils.distributed_init()
    processes.from_main(lambda: command_line.make_output_dir(output_dir))
    precision, notices = utils.choose_precision(precision, use_fp16, processes.device)
    notices += command_line.ignored_flags(**ignored)
    workers = min(16, cores_per_process(processes)) if num_workers is None else num_workers
    interruption = Interruption(processes, output_dir / "preempted")
    device = Device(processes, utils.PRECISIONS[precision], batch_size, workers, interruption, read_timeout)
    return device, precision, notices


def collect(device, cases, mine):
    """(N, ...) one row per case, in the order of `cases`, of the rows that the ranks have for their shares.

    cases: (N,) case numbers, each once; mine: {case: row} of this rank, which leaves the rest out when it is interrupted.
    Raises Preempted, on all ranks, where one did so; RuntimeError unless every case has exactly one row.
    """
    rows, interrupted = {}, False
    for part, asked in device.processes.gather((mine, bool(device.interruption.asked))):
        if rows.keys() & part.keys():
            raise RuntimeError("two processes evaluated the same case")
        rows.update(part)
        interrupted = interrupted or asked
    if interrupted and len(rows) < len(cases):
        device.interruption.end()
    if rows.keys() != set(cases):
        raise RuntimeError(f"{len(rows)} cases were evaluated instead of {len(cases)}")
    return np.stack([rows[case] for case in cases])
