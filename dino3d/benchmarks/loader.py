"""From the disk to a batch: all of it against the plain way, and a loader's worker against that of another checkout."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from inspect import getsource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from augmentations import PAPER, MultiCropAugmentation
from dino3d.benchmarks import baselines
from dino3d.benchmarks.reading import write_prepared
from dino3d.benchmarks.scans import BATCH, CLIP_RANGE, GLOBAL, LOCAL, LOCAL_NUMBER, POLICY, SCAN_SIZE, VIEWS, scan
from dino3d.benchmarks.turns import comparison, sources, synchronise, take_turns
from dino3d.command_line import UserError
from dino3d.data.hdf5 import write_volume
from dino3d.data.pretraining import PretrainingPatches, collate
from dino3d.data.sidecar import index_path
from dino3d.study.jobs import ROOT


def data(device: str, repeats: int, samples: int) -> dict[str, Any]:
    """From the disk to a batch of ten views, all six augmentations on: one core reads, draws and (on a CPU) renders."""
    crops = MultiCropAugmentation(POLICY, GLOBAL, LOCAL, LOCAL_NUMBER)
    volume, affine, origin = scan(SCAN_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        theirs, mine = os.path.join(folder, "itk.hdf5"), os.path.join(folder, "blosc.hdf5")
        baselines.write_itk(theirs, volume, affine)
        write_volume(mine, volume, affine)
        plainly = iter(DataLoader(baselines.Patches([theirs] * (repeats + 1) * samples, GLOBAL, LOCAL), samples))
        dataset, size = PretrainingPatches([mine], crops, seed=0, patches_per_volume=1 << 30), BATCH[device]
        keys = [[(0, turn * size + i) for i in range(size)] for turn in range(repeats + 1)]
        preparing = []  # seconds of ours that fall to the loader's workers

        def ours(turn: int) -> None:
            start = time.perf_counter()
            # A volume opened for each sample
            opened = [sample for key in keys[turn] for sample in dataset.__getitems__([key])]
            batch = collate(opened)
            preparing.append((time.perf_counter() - start) / size)
            batch = batch.to(torch.device(device))
            crops.render(batch.patches, batch.groups, CLIP_RANGE)
            synchronise(device)

        times = take_turns({"baseline": (lambda turn: next(plainly), samples), "ours": (ours, size)}, repeats)
    times["of which read, draw and collate"] = preparing[1:]
    return comparison(
        25,
        "seconds per sample of ten views, from the disk",
        times,
        {
            "baseline": "gzip ITK files, MONAI's transforms one after the other in a DataLoader; CPU",
            "ours": f"main_dino.py's way: Blosc files, parameters drawn beside, views rendered per batch; {device}",
            "of which read, draw and collate": (
                "the loader's part, on the CPU wherever views are rendered; its workers share it"
            ),
        },
        sources(baselines.Patches, baselines.read_itk, baselines.monai_transforms, baselines.monai_views),
        {
            "data": origin,
            "views": VIEWS,
            "policy": vars(POLICY),
            "baseline_patch": baselines.PATCH,
            "our_patch": crops.patch_size,
            "batch_size": size,
            "repeats": repeats,
            "baseline_samples_per_repeat": samples,
        },
    )


def loader(
    device: str,
    repeats: int,
    against: str,
    augmentations: int,
    batch_size: int,
    batches: int,
    volumes: int,
    folder: str | None,
) -> dict[str, Any]:
    """CPU time of a data loading worker of main_dino.py, its memory, and the bytes that it reads from a cold disk."""
    ours = str(ROOT)
    if not Path(against or ours, "main_dino.py").is_file():
        raise UserError(f"--against {against}: holds no main_dino.py, expected a checkout of this repository")
    volume, affine, origin = scan(SCAN_SIZE)
    found = {"baseline": [], "ours": []}
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        folders = {name: os.path.join(parent, name) for name in found}
        for number in range(volumes):
            path = os.path.join(parent, "scan.hdf5")
            write_prepared(path, np.roll(volume, number, 0), affine)
            for again in range(8):  # a batch of many volumes opens as many files, as in a large data set
                for name in found:
                    new = os.path.join(folders[name], f"{number}.{again}.hdf5")
                    os.makedirs(folders[name], exist_ok=True)
                    os.link(path, new)
                    if name == "ours":
                        shutil.copy(index_path(path), index_path(new))
            os.unlink(path)
        os.sync()  # what is not on the disk yet is not dropped from memory
        for turn in range(repeats):
            for name, checkout in (("baseline", against), ("ours", ours)):
                job = {
                    "data": folders[name],
                    "augmentations": [f"--use_{name}" for name in [*PAPER][3:]] if augmentations == 6 else [],
                    "batch_size": batch_size,
                    "batches": batches,
                    "seed": turn,
                }
                begin = f"import sys\nfrom typing import Any\nsys.path.insert(0, {checkout!r})\n"
                code = f"{begin}{getsource(loader_turn)}\nloader_turn({job!r})"
                done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"the loader of {checkout} failed: {done.stderr.strip().splitlines()[-1:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    result = comparison(
        3.0,
        "seconds per sample of the CPU, of one loader worker",
        {name: [turn["seconds"] for turn in turns] for name, turns in found.items()},
        {
            "baseline": f"main_dino.py of {against}" + " on files without an index" * (against == ours),
            "ours": "main_dino.py's loader: chunks by their index, into memory that is used again",
        },
        "see the checkout",
        {
            "data": origin,
            "augmentations": augmentations,
            "batch_size": batch_size,
            "batches": batches - 2,
            "volumes": volumes,
            "repeats": repeats,
        },
    )
    names = ("main_seconds", "cold_bytes", "private_bytes", "shared_bytes", "shm_bytes")
    result["measured"] = {
        name: {side: statistics.median(turn[name] for turn in turns) for side, turns in found.items()} for name in names
    }
    return result


def loader_turn(job: dict[str, Any]) -> None:
    """Print what one worker of a checkout's main_dino.py costs, as JSON; runs in a process of its own."""
    import glob
    import json
    import multiprocessing
    import os
    import shutil
    import time
    from importlib.util import find_spec

    import torch

    import main_dino
    import utils
    from dino3d.data.read_watchdog import with_read_timeout

    torch.set_num_threads(1)
    if find_spec("dino3d.malloc"):  # as its scripts do when they start
        from dino3d.malloc import keep_freed_memory

        keep_freed_memory()
    paths = sorted(glob.glob(os.path.join(job["data"], "*.hdf5")))

    def start(batch_size: int, patches_per_volume: int) -> tuple[Any, int]:
        """(batches, process id of their worker)"""
        flags = ["--data_dir", job["data"], "--output_dir", "unused", "--num_workers", "1", "--arch", "vit_micro"]
        flags += ["--batch_size_per_gpu", str(batch_size), "--patches_per_volume", str(patches_per_volume)]
        flags += ["--seed", str(job["seed"]), "--epochs", "1", *job["augmentations"]]
        parser = main_dino.get_args_parser()
        args = parser.parse_args(flags)
        main_dino.check_pretraining_flags(parser, args)
        dataset = main_dino.make_dataset(args, paths, [1] * len(paths))
        progress, processes = main_dino.Progress(), utils.Processes()
        if hasattr(main_dino, "make_batches"):
            batches = main_dino.make_batches(dataset, args, progress, processes)
        else:
            batches = with_read_timeout(main_dino.make_loader(dataset, args, progress, processes), 0, None)
        return batches, multiprocessing.active_children()[0].pid

    def lines_of(path: str, name: str) -> list[int]:
        with open(path, encoding="utf-8") as lines:
            return [int(line.split()[1]) for line in lines if line.startswith(name)]

    def cpu_seconds(pid: int) -> float:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            times = file.read().rsplit(")", 1)[1].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def private_bytes(pid: int) -> int:
        """Of memory that is not shared with others by design, what only this process has."""
        total, counts = 0, False
        with open(f"/proc/{pid}/smaps", encoding="utf-8") as lines:
            for line in lines:
                words = line.split()
                if not words[0].endswith(":"):
                    counts = words[1].endswith("p")
                elif counts and words[0] == "Private_Dirty:":
                    total += 1024 * int(words[1])
        return total

    for path in [*paths, *glob.glob(os.path.join(job["data"], ".*.npz"))]:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold_paths = paths[::8]  # one name of each file
    paths, all_paths = cold_paths, paths
    batches, worker = start(len(paths), 1)
    before = lines_of(f"/proc/{worker}/io", "read_bytes")[0]
    next(batches)
    cold = (lines_of(f"/proc/{worker}/io", "read_bytes")[0] - before) / len(paths)
    assert not list(batches)  # and the worker has ended
    for path in paths:  # from here on all comes from memory, whatever a patch has read ahead
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass

    paths, held, shared = all_paths, shutil.disk_usage("/dev/shm").used, lines_of("/proc/meminfo", "Shmem:")[0]
    most_shm = most_shared = 0
    kept = []
    batches, worker = start(job["batch_size"], 1 << 10)
    for turn in range(job["batches"]):
        if turn == 2:
            began, main_began = cpu_seconds(worker), time.process_time()
        kept[:] = [next(batches)]  # as in training, where the one before is let go of when the next one is there
        most_shm = max(most_shm, shutil.disk_usage("/dev/shm").used - held)
        most_shared = max(most_shared, 1024 * (lines_of("/proc/meminfo", "Shmem:")[0] - shared))
    samples = job["batch_size"] * (job["batches"] - 2)
    print(
        json.dumps(
            {
                "seconds": (cpu_seconds(worker) - began) / samples,
                "main_seconds": (time.process_time() - main_began) / samples,
                "cold_bytes": cold,
                "private_bytes": private_bytes(worker),
                "shared_bytes": most_shared,
                "shm_bytes": most_shm,
            }
        ),
        flush=True,
    )
    os.kill(worker, 9)
    os._exit(0)  # without waiting for what the worker is at
