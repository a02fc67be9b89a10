"""Many files through worker processes."""

import collections
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def in_processes(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) of every item as they are done, from so many processes; None where a process died of it.

    When a process dies, nothing tells of which item: those that were being worked on are tried again one by one.
    """
    items = iter(items)
    waiting = collections.deque(itertools.islice(items, 2 * workers))
    while waiting:
        with _pool(min(workers, len(waiting))) as pool:
            running = {}
            try:
                while waiting or running:
                    while waiting:
                        running[_submit(pool, function, waiting[0])] = waiting[0]
                        waiting.popleft()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        result = future.result()
                        yield running.pop(future), result
                        waiting.extend(itertools.islice(items, 1))
            except BrokenProcessPool:
                pass
            finally:
                pool.shutdown(cancel_futures=True)
        for item in running.values():
            with _pool(1) as alone:
                try:
                    result = _submit(alone, function, item).result()
                except BrokenProcessPool:
                    result = None
                yield item, result
        waiting.extend(itertools.islice(items, 2 * workers))


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Any], Any], item: Any) -> Future:
    """pool.submit, which may start a process: one that Ctrl-C never reaches, not even while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        return pool.submit(function, item)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; until then it waits for us
    try:
        return pool.submit(function, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_of = []  # of this process, where it is a worker: the process that started it


def is_expendable() -> bool:
    """Whether this process is a worker of `in_processes`, whose death is told as its item's failure."""
    return bool(_worker_of)


def _start_worker() -> None:
    """One thread per worker, and none outlives the process that started it, however that one ends."""
    _worker_of.append(parent_process())
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends these

    def follow() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def progress(total: int, unit: str, shown: bool = True) -> "tqdm":
    """A progress bar with rate and remaining time on standard error, seldom renewed where that is a log file."""
    from tqdm import tqdm

    pause = 1 if sys.stderr.isatty() else 30  # seconds; what ends before shows no bar
    return tqdm(
        total=total, unit=unit, delay=pause, mininterval=pause, dynamic_ncols=True, smoothing=0.05, disable=not shown
    )
