"""What many volumes and ranks cost besides the steps: two ranks are run, what the others do is reckoned."""

import functools
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import utils
from dino3d.benchmarks.step import our_state
from dino3d.benchmarks.turns import report_row
from dino3d.data.pretraining import BatchStream, epoch_order
from dino3d.data.sources import find_data
from dino3d.training import checkpoint
from dino3d.training.monitor import peak_memory


def scale(
    device: str, repeats: int, volumes: int, ranks: int, patches_per_volume: int, arch: str, out_dim: int
) -> dict[str, Any]:
    """What many volumes and ranks cost besides the steps: list, order, an epoch's turn, checkpoint and resume."""
    rows = {}

    def measure(name: str, task: Callable[[], Any], everywhere: bool) -> Any:
        """Time a task of rank 0, or of each rank; what it allocates in Python and NumPy is counted in a turn more."""
        times = []
        for _ in range(repeats):
            began = time.process_time()
            task()
            times.append(time.process_time() - began)
        tracemalloc.start()
        result = task()
        megabytes = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        rows[name] = scale_row(times, megabytes, ranks if everywhere else 1)
        return result

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for number in range(volumes):
            if number % 8 == 0:
                (folder / "data" / f"patient{number // 8:06}").mkdir(parents=True)
            (folder / "data" / f"patient{number // 8:06}" / f"t{number % 8}.hdf5").touch()
        index, order = folder / "data_list.txt", (volumes, patches_per_volume)

        def find() -> list[str]:
            index.unlink(missing_ok=True)
            return find_data(str(folder / "data"), None, None, index).paths

        measure("list, first start", find, False)
        from_index = functools.partial(find_data, str(folder / "data"), None, None, index)
        measure("list, from data_list.txt", from_index, False)
        between = {"list": (send_list, index)}
        measure("order of an epoch", lambda: epoch_order(*order, 0, 0), True)
        batch = max(1, min(64, volumes * patches_per_volume // ranks))

        def turn() -> None:
            """The last batch of an epoch, and the first of the next; the first order is part of it."""
            stream = iter(BatchStream(*order, batch, 0, ranks, 0, 0, last, 2))
            next(stream), next(stream)

        last = (volumes * patches_per_volume // (batch * ranks) - 1) * batch * ranks
        measure("two orders and an epoch's turn", turn, True)
        state = our_state(arch, out_dim, 1, device, "fp32")
        for parameter in state.student.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        state.optimizer.step()  # which makes its moments
        parts = {name: part.state_dict() for name, part in state.parts().items()} | {"config": {}}
        path = folder / "checkpoint.pth"
        measure("checkpoint, copied (training waits)", functools.partial(checkpoint.to_cpu, parts), False)
        save = functools.partial(checkpoint.save_checkpoint, path, parts)
        measure("checkpoint, written beside training", save, False)
        size = path.stat().st_size / 1e6
        rows["checkpoint, copied (training waits)"] |= {"note": f"{size:.0f} MB; rank 0 alone", "megabytes": size}
        between["resume"] = checkpoint.load_on_all, path
        for what, (task, file) in between.items():
            costs = [on_two_ranks(task, str(file)) for _ in range(repeats)]
            for rank, name in enumerate((f"{what}, rank 0 reads and sends", f"{what}, received")):
                seconds, megabytes = zip(*(both[rank] for both in costs))
                rows[name] = scale_row(seconds, statistics.median(megabytes), ranks - 1 if rank else 1)
    return {
        "unit": "CPU seconds of a rank",
        "rows": rows,
        "parameters": {
            "repeats": repeats,
            "volumes": volumes,
            "ranks": ranks,
            "patches_per_volume": patches_per_volume,
            "arch": arch,
            "out_dim": out_dim,
            "checkpoint_megabytes": round(size),
        },
    }


def scale_row(seconds: Sequence[float], megabytes: float, ranks: int) -> dict[str, Any]:
    """A row of `scale`. ranks: how many do the same, one by one where they share a core"""
    total = ranks * statistics.median(seconds)
    all_of_them = f"{ranks} ranks side by side: {total:.1f} s and {ranks * megabytes:.0f} MB in all (reckoned)"
    note = f"{megabytes:.0f} MB; " + (all_of_them if ranks > 1 else "rank 0 alone")
    return {**report_row(seconds, note), "seconds_of_all": total, "megabytes": megabytes}


def send_list(path: str, processes: utils.Processes) -> list[str]:
    """The lines of a file that rank 0 reads, on every rank."""
    return processes.run_on_main(lambda: Path(path).read_text(encoding="utf-8").splitlines())


def on_two_ranks(task: Callable[[str, utils.Processes], Any], path: str) -> list[tuple[float, float]]:
    """[(CPU seconds, MB more at the peak)] of two ranks that get what rank 0 reads from a file. task: importable"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return pool.starmap(run_as_rank, [(task, path, rank, port) for rank in range(2)], chunksize=1)


def run_as_rank(task: Callable[[str, utils.Processes], Any], path: str, rank: int, port: str) -> tuple[float, float]:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_PORT=port, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    processes = utils.distributed_init()
    before, began = peak_memory(processes.device), time.process_time()
    received = task(path, processes)
    seconds, more = time.process_time() - began, peak_memory(processes.device) - before
    del received
    utils.leave_group()
    return seconds, more / 1e6
