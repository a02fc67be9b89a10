"""Storage that hangs: a file that a loader's worker has been reading for too long ends the run, naming the file.

What a run looks up beforehand is not waited for.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_reading = contextlib.nullcontext  # in a loader worker: notes the file that is being read, see ReadWatchdog


def reading(path: Path | str) -> contextlib.AbstractContextManager:
    """Context in which a file is opened or read: a loader worker that is watched notes it."""
    return _reading(path)


def in_time(find: Callable[[], list[str]], seconds: float) -> list[str] | None:
    """Lines that a copy of this process finds; None where it has not after so many seconds, or ended without.

    Nothing waits for the copy: the system may hold it in a read, which not even SIGKILL ends.
    """
    if not hasattr(os, "fork"):
        return find()
    results, to_results = multiprocessing.Pipe(duplex=False)
    copy = os.fork()
    if not copy:
        try:
            to_results.send_bytes(json.dumps(find()).encode())
        finally:
            os._exit(0)
    to_results.close()
    found = None
    with results, contextlib.suppress(EOFError):
        if results.poll(seconds):
            found = json.loads(results.recv_bytes())
    os.kill(copy, signal.SIGKILL)
    os.waitpid(copy, os.WNOHANG if found is None else 0)
    return found


class ReadWatchdog:
    """Notices a file that is being read for too long: loader workers note what they are at, and a thread looks on.

    workers: of the loader; a process that reads itself can't be watched: HDF5 lets no thread run meanwhile
    seconds: that an opening or a read may take
    end: called from that thread with what to tell. It has to end the process without waiting for the workers: not even
    SIGKILL reaches one that the system holds in a read.
    at_start: a worker_init_fn besides
    """

    LONGEST = 1000  # bytes that are kept of a path, the last ones

    def __init__(
        self, workers: int, seconds: float, end: Callable[[str], None], at_start: Callable[[int], None] | None = None
    ) -> None:
        self.seconds, self.end, self.at_start = seconds, end, at_start
        # Shared with the workers, as long as they are this process's children
        self.counts = multiprocessing.RawArray("q", workers)  # odd: in a read
        self.paths = multiprocessing.RawArray("c", workers * self.LONGEST)

    def start_worker(self, worker: int) -> None:
        """Let this process note, as that worker, all that it reads."""
        global _reading

        @contextlib.contextmanager
        def noting(path: Path | str) -> Iterator[None]:
            name = os.fsencode(path)[-self.LONGEST :]
            self.paths[worker * self.LONGEST : (worker + 1) * self.LONGEST] = name.ljust(self.LONGEST, b"\0")
            self.counts[worker] += 1
            try:
                yield
            finally:
                self.counts[worker] += 1

        _reading = noting
        if self.at_start:
            self.at_start(worker)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        done = threading.Event()
        threading.Thread(target=self._look_on, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _look_on(self, done: threading.Event) -> None:
        """Looks are counted and no clock is read: a job that was suspended for a day has not waited for its files."""
        pause = min(self.seconds / 10, 5)
        before, same = list(self.counts), [0] * len(self.counts)
        while not done.wait(pause):
            now = list(self.counts)
            same = [times + 1 if new == old and new % 2 else 0 for times, new, old in zip(same, now, before)]
            worker, before = same.index(max(same)), now
            if same[worker] * pause >= self.seconds:
                name = self.paths[worker * self.LONGEST : (worker + 1) * self.LONGEST]
                path = os.fsdecode(name.rstrip(b"\0"))
                self.end(
                    f"{path}: loader worker {worker} has been reading it for {self.seconds:g} s: the storage "
                    "hangs. See "
                    "to it and start again, which resumes, or raise --read_timeout (0: wait without end)"
                )


def with_read_timeout(loader: "DataLoader", seconds: float, end: Callable[[str], None]) -> Iterator[Any]:
    """An iterator over a DataLoader's batches, which calls end(message) where one file is read for `seconds` (0:
    never)."""
    if not loader.num_workers or not seconds:
        return iter(loader)
    watch = ReadWatchdog(loader.num_workers, seconds, end, loader.worker_init_fn)
    loader.worker_init_fn = watch.start_worker
    batches = iter(loader)  # here, so that the workers start at once

    def give() -> Iterator[Any]:
        with watch.running():
            yield from batches

    return give()
