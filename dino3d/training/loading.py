"""The DataLoader's reading processes: how many, and the next of their batches."""

import contextlib
import errno
import gc
import multiprocessing.queues
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dino3d.command_line import UserError, available_cores
from dino3d.files import TEXT
from dino3d.malloc import give_back_freed_memory
from dino3d.training.checkpoint import ignore_signals
from utils import EXIT_FILES, Processes, is_worker_death, worker_death

CGROUP = Path("/sys/fs/cgroup")  # of a container
READY_BATCHES = 2  # that each of a loader's workers has in hand or waiting


def cores_per_process(processes: Processes) -> int:
    """CPU cores that this process may use, its share of what the machine grants."""
    return max(1, available_cores() // processes.local_world_size)


def reading_processes(wanted: int | None, processes: Processes, batch_bytes: int) -> tuple[int, int | None, list[str]]:
    """(workers, batches that each has ready, notices) of a DataLoader, so that its batches fit into shared memory.

    wanted: workers, None: as many as there are cores for this process, at most 16
    batch_bytes: of one batch in /dev/shm; 0: they are elsewhere
    Batches wait in /dev/shm, of which containers often have little; a batch that finds no room there is a bus error.
    """
    workers = min(16, cores_per_process(processes)) if wanted is None else wanted
    if not workers or not batch_bytes or not os.path.isdir("/dev/shm"):  # other systems keep them in ordinary memory
        return workers, READY_BATCHES if workers else None, []
    room = 0.8 * shutil.disk_usage("/dev/shm").free / processes.local_world_size
    fits = int(room // batch_bytes)  # batches
    if fits >= workers * READY_BATCHES:
        return workers, READY_BATCHES, []
    shortage = (
        f"/dev/shm has room for {fits} batches of {batch_bytes / 2**20:.0f} MiB per process, fewer than the "
        f"{workers * READY_BATCHES} of {workers} reading processes: "
    )
    if fits >= workers:
        return workers, 1, []
    if wanted is not None:
        return workers, 1, [shortage + "if a reading process dies of a bus error, lower --num_workers or enlarge it"]
    return (
        fits,
        1 if fits else None,
        [shortage + f"{fits} instead; enlarge it (Docker: --shm-size=16g) if data is waited for"],
    )


def cache_bytes(workers: int, processes: Processes) -> int:
    """Bytes of volumes that each reading process may keep in memory: together a quarter of what is free now."""
    return available_memory() // 4 // (max(workers, 1) * processes.local_world_size)


def available_memory() -> int:
    """Bytes that this machine, or the container that this process is in, has left; 0 where nothing tells."""
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(**TEXT).splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, "max" for none
        limit, used = ((CGROUP / name).read_text(**TEXT) for name in ("memory.max", "memory.current"))
        free.append(max(0, int(limit) - int(used)))
    return min(free, default=0)


def start_reading_process(_: int) -> None:
    """worker_init_fn of a DataLoader: signals are for the main process, memory that it has freed is not held here too,
    and a batch that can't be handed over ends the reading process, where torch would lose it and wait without end."""
    ignore_signals()
    give_back_freed_memory()
    gc.freeze()  # a collection writes to each object that it looks at, and to its page
    told = multiprocessing.queues.Queue._on_queue_feeder_error  # a hook, as the standard library uses it too

    def end(error: Exception, batch: Any) -> None:
        if getattr(error, "errno", None) == errno.EMFILE or "Too many open files" in str(error):
            os._exit(EXIT_FILES)
        told(error, batch)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


def next_batch(batches: Iterator[Any], record: Callable[[Any], None] = lambda batch: None) -> Any:
    """The next of a loader's batches; UserError for one whose `fatal` says why nothing came, or if a worker died.

    record: called with the batch before its `fatal` is looked at
    """
    try:
        batch = next(batches)
    except RuntimeError as error:
        if not is_worker_death(error):
            raise
        raise UserError(worker_death(error)) from error
    record(batch)
    if batch.fatal:
        raise UserError(batch.fatal)
    return batch
