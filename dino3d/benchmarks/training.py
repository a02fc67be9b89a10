"""main_dino.py from the disk: against a plain loader and step, and how its cost grows."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import utils
from augmentations import PAPER
from dino3d.benchmarks import baselines
from dino3d.benchmarks.scans import GLOBAL, LOCAL, SCAN_SIZE, scan
from dino3d.benchmarks.step import flops_per_sample, matrix_rate, new_model, our_step, plain_trainer
from dino3d.benchmarks.turns import comparison, device_label, report_row, sources, take_turns, until_done
from dino3d.command_line import UserError
from dino3d.data.hdf5 import write_volume
from dino3d.files import TEXT, read_log
from dino3d.study.jobs import ROOT
from dino3d.training.loading import cores_per_process

AUGMENTED = [f"--use_{name}" for name in PAPER]


def train(
    device: str,
    repeats: int,
    arch: str,
    out_dim: int,
    batch_size: int,
    precision: str,
    compile: bool,
    steps: int | None,
    workers: int | None,
) -> dict[str, Any]:
    """main_dino.py from the disk, all six augmentations on, against plain loader workers and a plain step."""
    steps = steps or {"cpu": 6, "cuda": 150}[device]
    cores, rate = cores_per_process(utils.Processes()), matrix_rate(device, precision)
    volume, affine, origin = scan(SCAN_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        flags = training_flags(arch, batch_size, out_dim, 2 + repeats, precision)
        flags += ["--compile"] * compile + (["--num_workers", workers] if workers is not None else [])
        write_copies(folder, volume, affine, steps * batch_size)
        records = our_training(folder, flags, device)
        baselines.write_itk(os.path.join(folder, "itk.h5"), volume, affine)
        times = {
            "baseline": plain_training(
                os.path.join(folder, "itk.h5"), arch, out_dim, device, precision, cores, repeats
            ),
            "ours": [1 / record["volumes_per_second"] for record in records],
        }
    flops = flops_per_sample(arch, out_dim)
    waiting, memory = (max(record[name] for record in records) for name in ("waiting_for_data", "peak_memory_gib"))
    result = comparison(
        25,
        "seconds per sample",
        times,
        {
            "baseline": (
                f"{cores} loader workers with MONAI's transforms, MONAI's network, the step written out; {precision}"
            ),
            "ours": f"{waiting:.1%} of the time waiting for data, {memory:.1f} GiB; {precision}"
            + ", compiled" * compile,
        },
        sources(
            plain_training,
            baselines.Patches,
            baselines.monai_transforms,
            baselines.monai_views,
            baselines.plain_step,
            baselines.Model,
            baselines.monai_encoder,
            baselines.ViT,
        ),
        {
            "data": origin,
            "arch": arch,
            "out_dim": out_dim,
            "batch_size": batch_size,
            "steps_per_epoch": steps,
            "repeats": len(records),
            "cores": cores,
            "flags": " ".join(map(str, flags)),
            "gflop_per_sample": flops / 1e9,
        },
    )
    result |= {
        "samples_per_second": 1 / result["ours"],
        "waiting_for_data": waiting,
        "peak_memory_gib": memory,
        "teraflops": flops / result["ours"] / 1e12,
        "matrix_product_teraflops": rate / 1e12,
    }
    return result


def growth(
    device: str, repeats: int, arch: str, out_dim: int, batch_size: int, precision: str, compile: bool, output: str
) -> dict[str, Any]:
    """How a step's time grows with batch, local views and input size, and a run's rate with processes."""
    if not Path(output).resolve().parent.is_dir():  # and not after minutes
        raise UserError(f"--output {output}: its folder does not exist; make it or choose another")
    settings = {"arch": arch, "out_dim": out_dim, "device": device, "precision": precision, "compiled": compile}
    panels = {
        "samples per batch": [(n * batch_size, {"batch_size": n * batch_size}) for n in (1, 2, 4, 8)],
        "local views": [(n, {"batch_size": batch_size, "local_number": n}) for n in (0, 4, 8, 16)],
        "input size (x of x, x, x / 2)": [
            (n, {"batch_size": batch_size, "size": (n, n, n // 2)}) for n in (48, 96, 144)
        ],
    }
    rows = {}
    # A process that has never held as much is slower: its memory is new
    our_step(**settings, batch_size=8 * batch_size)()
    for panel, cases in panels.items():
        for at, changes in cases:
            take = our_step(**settings | changes)
            times = take_turns({"": (until_done(take, device), changes["batch_size"])}, repeats)
            rows[f"{panel}: {at}"] = report_row(times[""])
    panels["processes"] = [(n, None) for n in ((1, 2) if device == "cpu" else (1,))]
    with tempfile.TemporaryDirectory() as folder:
        volume, affine, origin = scan(SCAN_SIZE)
        for processes, _ in panels["processes"]:
            write_copies(folder, volume, affine, 6 * batch_size * processes)
            flags = training_flags(arch, batch_size, out_dim, 1 + repeats, precision)
            flags += ["--num_workers", 1 if device == "cpu" else 16]
            times = [1 / record["volumes_per_second"] for record in our_training(folder, flags, device, processes)]
            rows[f"processes: {processes}"] = report_row(times, "main_dino.py from the disk")
    student = new_model(arch, out_dim)
    gradients = 4 * sum(p.numel() for p in student.parameters() if p.requires_grad)
    draw_growth(output, panels, rows, f"{arch}, out_dim {out_dim}, {precision}, {device_label(device)}")
    return {
        "unit": "seconds per sample",
        "rows": rows,
        "parameters": {
            "data": "random views; processes: " + origin,
            "repeats": repeats,
            "batch_size": batch_size,
            **settings,
            "gradient_megabytes": gradients / 1e6,
            "picture": output,
        },
    }


def training_flags(arch: str, batch_size: int, out_dim: int, epochs: int, precision: str) -> list[Any]:
    flags = ["--arch", arch, "--batch_size_per_gpu", batch_size, "--out_dim", out_dim]
    return [*flags, "--epochs", epochs, "--precision", precision, *AUGMENTED]


def write_copies(folder: str, volume: np.ndarray, affine: np.ndarray, samples: int, copies: int = 16) -> None:
    """Write list.txt with as many volumes as an epoch takes: a few files, each opened again for every one of its
    samples."""
    first = os.path.join(folder, "0.hdf5")
    write_volume(first, volume, affine)
    for i in range(1, copies):
        shutil.copyfile(first, os.path.join(folder, f"{i}.hdf5"))
    Path(folder, "list.txt").write_text("".join(f"{i % copies}.hdf5\n" for i in range(samples)), **TEXT)


def our_training(
    folder: str, flags: Sequence[Any], device: str, processes: int = 1, seconds: float | None = None
) -> list[dict[str, Any]]:
    """The records in the log.txt of a run of main_dino.py, but that of the first epoch, in which all starts and warms
    up. Raises subprocess.TimeoutExpired after `seconds`."""
    launch = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    output = os.path.join(folder, f"run{processes}")
    words = [
        *launch,
        ROOT / "main_dino.py",
        *flags,
        "--data_dir",
        folder,
        "--data_list",
        os.path.join(folder, "list.txt"),
        "--output_dir",
        output,
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if device == "cuda" else ""
    ended = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": visible},
    )
    if ended.returncode:
        raise UserError(f"main_dino.py ended with {ended.returncode}: {ended.stderr.strip().splitlines()[-1]}")
    return read_log(os.path.join(output, "log.txt"))[1:]


def plain_training(
    path: str, arch: str, out_dim: int, device: str, precision: str, workers: int, repeats: int
) -> list[float]:
    """[seconds per sample] of a loop over a DataLoader whose workers augment, in batches of two: more would take
    minutes."""
    batch_size, batches = 2, workers * (repeats + 2)
    loader = DataLoader(
        baselines.Patches([path] * batch_size * batches, GLOBAL, LOCAL), batch_size, num_workers=workers
    )
    take, began = plain_trainer(arch, out_dim, device, precision), []
    for index, views in enumerate(loader):
        if index % workers == 0:
            began.append(time.perf_counter())
        take([torch.cat(views[:2]).to(device), torch.cat(views[2:]).to(device)])
    began.append(time.perf_counter())
    return [(after - before) / workers / batch_size for before, after in zip(began[1:-1], began[2:])]


def draw_growth(
    path: Path | str, panels: dict[str, list[tuple[int, Any]]], rows: dict[str, dict[str, Any]], title: str
) -> None:
    """One panel each: samples per second, measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
    for axis, (panel, cases) in zip(figure.subplots(1, len(panels)), panels.items()):
        at = [place for place, _ in cases]
        found = [rows[f"{panel}: {place}"] for place in at]
        axis.errorbar(
            at,
            [1 / row["seconds"] for row in found],
            fmt="o-",
            capsize=3,
            yerr=[
                [1 / row["seconds"] - 1 / row["spread"][1] for row in found],
                [1 / row["spread"][0] - 1 / row["seconds"] for row in found],
            ],
        )
        axis.set(xlabel=panel, ylabel="samples per second", xticks=at, ylim=(0, None))
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
