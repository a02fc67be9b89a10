"""How fast the parts are, each against a baseline in the same run: what the README's speed table was made with.

    python benchmark.py augment                  ten views of a sample on one core, against MONAI's transforms
    python benchmark.py augment --device cuda    the same views on the GPU, the baseline still on one core
    python benchmark.py read                     a random patch of a scan, against gzip ITK files, NIfTI and others
    python benchmark.py peers --install DIR      views and reads against the best that a user could pick instead
    python benchmark.py convert                  a DICOM series into the layout, against SimpleITK
    python benchmark.py data                     from the disk to a batch of views
    python benchmark.py loader --against FOLDER  a loader's worker, against that of another checkout
    python benchmark.py step                     a whole training step on ready views, time and memory
    python benchmark.py train                    main_dino.py from the disk, against a plain loader and step
    python benchmark.py infer                    a volume through a segmentation network, window by window
    python benchmark.py growth --output FILE     how a step's cost grows, as a picture
    python benchmark.py scale                    what many volumes and ranks cost besides the steps, simulated
    python benchmark.py gpu                      all that a GPU has to show, its tests first, in ten minutes

Seconds are wall-clock, of peers and scale those of the CPU. What it is compared with stands in
dino3d/benchmarks/baselines.py. Baseline and ours take turns, so that a machine that slows down slows both; reported are
medians over the repeats, with the lowest and highest. With --json the last line on standard output is one JSON object.

A further benchmark is a function that returns `comparison(...)`, and a sub-command with its flags.
"""

import dino3d.openmp  # noqa: F401  before torch is loaded

# isort: split

import functools
import json
import multiprocessing
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

# NumPy's linear algebra reads these when it is first imported; torch is told in main, by --threads
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import augmentations
import main_dino
import utils
from augmentations import PAPER, MultiCropAugmentation, paper_policy
from dino3d import command_line, transformer_block
from dino3d.benchmarks import baselines
from dino3d.benchmarks.conversion import convert
from dino3d.benchmarks.loader import data, loader
from dino3d.benchmarks.peer_comparison import peers
from dino3d.benchmarks.reading import read
from dino3d.benchmarks.scans import (
    BATCH,
    CLIP_RANGE,
    GLOBAL,
    LOCAL,
    LOCAL_NUMBER,
    POLICY,
    SCAN_SIZE,
    base_patches,
    cut,
    scan,
)
from dino3d.benchmarks.turns import (
    comparison,
    device_label,
    milliseconds,
    print_report,
    sources,
    synchronise,
    take_turns,
)
from dino3d.block_masks import BlockMasks, collate_masks
from dino3d.command_line import UserError, number
from dino3d.data.conventions import format_size
from dino3d.data.hdf5 import write_volume
from dino3d.data.pretraining import BatchStream, Sample, collate, epoch_order
from dino3d.data.sources import find_data
from dino3d.files import TEXT, read_log, versions
from dino3d.malloc import keep_freed_memory
from dino3d.mixed_precision import multiplies_bf16
from dino3d.training import checkpoint, grouped
from dino3d.training.loading import cores_per_process
from dino3d.training.monitor import peak_memory
from dino3d.training.nonfinite import NonFiniteSteps
from dino3d.training.operators import count_operators
from utils import PRECISIONS
from vision_transformer import ARCHITECTURES, MultiCropWrapper, has_setting

PATCH_SIZE = (12, 12, 6)
VALUES = {
    "lr": 0.0005,
    "weight_decay": 0.04,
    "momentum_teacher": 0.996,
    "teacher_temp": 0.04,
}  # of every step's schedules
CLOSE = {"fp32": 1e-4, "bf16": 0.05}  # relative difference that two ways to take a step may have in their first loss
# Whose cost a step's benchmark tells, with the weights that DINOv2 gives them
OBJECTIVES = {
    "--centering sinkhorn": {"centering": "sinkhorn"},
    "--koleo 0.1": {"koleo": 0.1},
    "--ibot 1": {"ibot": 1.0},
}
AUGMENTED = [f"--use_{name}" for name in PAPER]
WAYS_TO_ATTEND = [
    getattr(SDPBackend, name) for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
]
GPU_TRAINING = {"vit_small": 64, "vit_base": 64, "vit_large": 32}  # samples per step


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="benchmark.py",
        usage="benchmark.py what [flags]",
        description="Times a part of this repository against a baseline. The flags of each: benchmark.py what --help",
    )
    commands = parser.add_subparsers(title="what to time", prog=parser.prog, dest="what", metavar="what", required=True)
    command_line.help_flags(parser.add_argument_group("help"))

    def command(
        benchmark: Callable[..., dict[str, Any]], repeats: int, devices: list[str], threads: list[int] | None = None
    ) -> tuple[command_line.ArgumentParser, Any]:
        name, text = benchmark.__name__, benchmark.__doc__.splitlines()[0]
        sub = commands.add_parser(name, usage=f"{parser.prog} {name} [flags]", help=text, description=text)
        sub.set_defaults(benchmark=benchmark)
        timed, group = sub.add_argument_group("what is timed"), sub.add_argument_group("options")
        group.add_argument(
            "--device",
            default="cpu",
            choices=devices,
            help=f"where ours runs: {' or '.join(devices)}; views of the baseline are made on the CPU",
        )
        group.add_argument(
            "--threads", default=1, type=number(int, 1), choices=threads, help="CPU threads, of the baseline as of ours"
        )
        group.add_argument("--repeats", default=repeats, type=number(int, 1), help="turns that each side takes")
        group.add_argument("--json", action="store_true", help="end with one line of JSON")
        command_line.help_flags(group)
        return sub, timed

    xyz = command_line.XYZ
    sub, group = command(augment, 10, ["cpu", "cuda"])
    group.add_argument(
        "--samples",
        default=1,
        type=number(int, 1),
        help="samples of the baseline per repeat, besides two batches of ours; more even out what is drawn",
    )
    sub, group = command(views, 5, ["cpu", "cuda"])
    model_flags(sub, group, 2, 64)
    for flag, default, text in (
        ("--input_size", GLOBAL, "voxels of a global view"),
        ("--patch_size", PATCH_SIZE, "voxels of a token; local views have 2 x 2 x 2 or 3 x 3 x 3 of them"),
    ):
        group.add_argument(flag, default=default, nargs=3, type=number(int, 1), metavar=xyz, help=text)
    sub, group = command(read, 7, ["cpu"], [1])
    group.add_argument(
        "--reads", default=4, type=number(int, 1), help="patches per repeat, each from a file opened for it"
    )
    group.add_argument(
        "--size",
        default=SCAN_SIZE,
        nargs=3,
        type=number(int, max(baselines.PATCH)),
        metavar=xyz,
        help="voxels of the scan that patches are read from; the default is a usual chest CT's",
    )
    sub, group = command(peers, 7, ["cpu"], [1])
    group.add_argument(
        "--install",
        metavar="DIR",
        help="folder for the packages that are compared with, installed there if they are missing (about 300 MB from "
        "the network); without it rows of missing packages say so",
    )
    sub, group = command(convert, 5, ["cpu"], [1])
    group.add_argument(
        "--size",
        default=SCAN_SIZE,
        nargs=3,
        type=number(int, 16),
        metavar=xyz,
        help="voxels of the scan, one DICOM file per z; the default is a usual chest CT's",
    )
    sub, group = command(data, 7, ["cpu", "cuda"])
    group.add_argument("--samples", default=1, type=number(int, 1), help="samples of the baseline per repeat")
    sub, group = command(loader, 3, ["cpu"], [1])
    group.add_argument(
        "--against",
        default=str(Path(__file__).resolve().parent),
        metavar="FOLDER",
        help="checkout whose main_dino.py is compared with this one's; default: this one, on files without an index",
    )
    group.add_argument(
        "--augmentations", default=3, type=int, choices=(3, 6), help="how many of the paper's augmentations are on"
    )
    group.add_argument("--batch_size", default=64, type=number(int, 1), help="samples of a batch")
    group.add_argument("--batches", default=6, type=number(int, 3), help="per repeat; the first two are not counted")
    group.add_argument("--volumes", default=8, type=number(int, 1), help="files of 50 MB, with eight names each")
    group.add_argument("--folder", default=None, metavar="DIR", help="where they are written; default: the system's")
    model_flags(*command(step, 5, ["cpu", "cuda"]), 2, 64)
    sub, group = command(train, 1, ["cpu", "cuda"])
    model_flags(sub, group, 2, 64)
    group.add_argument(
        "--steps",
        default=None,
        type=number(int, 1),
        help="steps of each epoch; one per repeat and two more, of which the first is not counted; "
        "default: 6 on a CPU, 150 on a GPU",
    )
    group.add_argument(
        "--workers",
        default=None,
        type=number(int, 0),
        help="data loading workers of ours; the baseline has as many as there are cores; default: main_dino.py's",
    )
    sub, group = command(infer, 3, ["cpu", "cuda"])
    network_flags(sub, group, 1, 8)
    group.add_argument(
        "--size",
        default=[192, 192, 96],
        nargs=3,
        type=number(int, 1),
        metavar=xyz,
        help="voxels of the volume, on the network's own grid",
    )
    sub, group = command(growth, 3, ["cpu", "cuda"])
    model_flags(sub, group, 1, 32)
    group.add_argument("--output", default="growth.png", metavar="FILE", help="picture to write")
    sub, group = command(scale, 3, ["cpu"])
    group.add_argument("--volumes", default=130_000, type=number(int, 64), help="volumes, for which empty files stand")
    group.add_argument("--ranks", default=64, type=number(int, 2), help="ranks, two of which are processes here")
    group.add_argument("--patches_per_volume", default=8, type=number(int, 1), help="as of main_dino.py")
    group.add_argument(
        "--arch", default="vit_small", type=command_line.architecture(ARCHITECTURES), help="whose checkpoint is meant"
    )
    group.add_argument("--out_dim", default=65536, type=number(int, 2), help="prototypes of the head")
    sub, group = command(gpu, 10, ["cuda"])
    sub.set_defaults(device="cuda")
    group.add_argument(
        "--minutes", default=10.0, type=number(float, 0.1), help="what is not reached in them is left out, and said so"
    )
    return parser


def network_flags(sub: command_line.ArgumentParser, group: Any, batch_cpu: int, batch_cuda: int) -> None:
    sub.set_defaults(batch={"cpu": batch_cpu, "cuda": batch_cuda})
    group.add_argument(
        "--arch",
        default="vit_small",
        type=command_line.architecture(ARCHITECTURES),
        help="one of " + ", ".join(ARCHITECTURES),
    )
    group.add_argument(
        "--batch_size",
        default=None,
        type=number(int, 1),
        help=f"samples (infer: windows) at a time; default: {batch_cpu} on a CPU, {batch_cuda} on a GPU",
    )
    group.add_argument(
        "--precision",
        default=None,
        choices=("bf16", "fp32"),
        help="mixed precision of the matrix products, of the baseline as of ours: bf16 or fp32 (off); "
        "default: bf16 on GPUs and CPUs that multiply in it, fp32 on other CPUs",
    )


def model_flags(sub: command_line.ArgumentParser, group: Any, batch_cpu: int, batch_cuda: int) -> None:
    network_flags(sub, group, batch_cpu, batch_cuda)
    group.add_argument("--out_dim", default=65536, type=number(int, 2), help="prototypes of the head")
    group.add_argument("--compile", action="store_true", help="ours with main_dino.py's --compile")


def main() -> None:
    args = vars(get_args_parser().parse_args())
    what, benchmark, as_json, threads = (args.pop(name) for name in ("what", "benchmark", "json", "threads"))
    if args["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    torch.set_num_threads(threads)
    if "batch" in args:
        default = args.pop("batch")[args["device"]]
        args["batch_size"] = args["batch_size"] or default
        args["precision"] = args["precision"] or ("bf16" if args["device"] == "cuda" or multiplies_bf16() else "fp32")
    result = {
        "what": what,
        **benchmark(**args),
        "threads": threads,
        "device": args["device"],
        "device_name": device_label(args["device"]),
        "versions": {**versions(), "SimpleITK": version("SimpleITK")},
    }
    print_report(result)
    if as_json:
        print(json.dumps(result))


# ----------------------------------------------------------------------------------------------------------- augment


def augment(device: str, repeats: int, samples: int) -> dict[str, Any]:
    """Ten views of a sample, all six augmentations on: ours from int16 HU to views, against MONAI's one by one."""
    crops = MultiCropAugmentation(POLICY, GLOBAL, LOCAL, LOCAL_NUMBER)
    volume, _, origin = scan(SCAN_SIZE)
    patches = base_patches(volume, crops, BATCH[device])
    centred = (np.array(crops.patch_size) - baselines.PATCH) // 2
    inner = [np.ascontiguousarray(cut(patch, centred, baselines.PATCH)) for patch in patches]
    transforms = baselines.monai_transforms(GLOBAL, LOCAL, seed=0)
    batches = 2 * samples  # of ours per repeat: with fewer its time is too short to measure well
    preparing = []  # seconds of ours that fall to the loader's workers

    def plain(turn: int) -> None:
        for i in range(turn * samples, (turn + 1) * samples):
            baselines.monai_views(inner[i % len(inner)], *transforms)

    def ours(turn: int) -> None:
        preparing.append(
            sum(our_views(patches, crops, (turn * batches + i) * len(patches), device) for i in range(batches))
            / (batches * len(patches))
        )

    times = take_turns({"baseline": (plain, samples), "ours": (ours, batches * len(patches))}, repeats)
    times["of which draw and collate"] = preparing[1:]  # without the warm-up
    return comparison(
        20,
        "seconds per sample of ten views",
        times,
        {
            "baseline": f"MONAI's transforms one after the other, {format_size(baselines.PATCH)} voxels per view, "
            "then the crop; CPU",
            "ours": f"one resampling per view, at its own voxels, of {format_size(crops.patch_size)} voxels; {device}",
            "of which draw and collate": "the loader's part, on the CPU wherever views are rendered",
        },
        sources(baselines.monai_transforms, baselines.monai_views),
        {
            "data": origin,
            "views": f"2 of {format_size(GLOBAL)} and {LOCAL_NUMBER} of {format_size(LOCAL)}",
            "policy": vars(POLICY),
            "baseline_patch": baselines.PATCH,
            "our_patch": crops.patch_size,
            "clip_range": CLIP_RANGE,
            "batch_size": BATCH[device],
            "repeats": repeats,
            "baseline_samples_per_repeat": samples,
            "our_samples_per_repeat": batches * len(patches),
        },
    )


def our_views(patches: Sequence[np.ndarray], crops: MultiCropAugmentation, first: int, device: str) -> float:
    """Draw, collate and render the views of a batch; returns the seconds until the batch is ready for the device."""
    start = time.perf_counter()
    batch = collate([Sample(patch, crops.draw(0, 0, first + i), []) for i, patch in enumerate(patches)])
    ready = time.perf_counter()
    batch = batch.to(device)
    crops.render(batch.patches, batch.groups, CLIP_RANGE)
    synchronise(device)
    return ready - start


# ------------------------------------------------------------------------------------------------------------- views


def views(
    device: str,
    repeats: int,
    arch: str,
    out_dim: int,
    batch_size: int,
    precision: str,
    compile: bool,
    input_size: Sequence[int],
    patch_size: Sequence[int],
) -> dict[str, Any]:
    """Resized local views of 27 tokens against local views of 8: ten views of a sample, and a training step on them."""
    if not has_setting(arch, "patch_size"):
        raise UserError(f"--arch {arch}: has no tokens, of which the views compared here have 8 and 27; take a ViT")
    volume, _, origin = scan(SCAN_SIZE)
    whole = [2 * n / m for n, m in zip(patch_size, input_size)]  # sides of the local views of 8 tokens
    scale = (min(whole), min(1.0, 2 * max(whole)))
    kinds = {
        "8 tokens": MultiCropAugmentation(POLICY, input_size, [2 * n for n in patch_size], LOCAL_NUMBER),
        "27 tokens": MultiCropAugmentation(
            POLICY, input_size, [3 * n for n in patch_size], LOCAL_NUMBER, local_scale=scale
        ),
        "27 tokens, resized global views": MultiCropAugmentation(
            POLICY, input_size, [3 * n for n in patch_size], LOCAL_NUMBER, global_scale=(0.5, 1), local_scale=scale
        ),
    }
    tasks = {}
    for name, crops in kinds.items():
        patches = base_patches(volume, crops, BATCH[device])

        def render(turn: int, patches: list[np.ndarray] = patches, crops: MultiCropAugmentation = crops) -> None:
            our_views(patches, crops, turn * len(patches), device)

        tasks[f"ten views, {name}"] = (render, len(patches))
    for name in ("8 tokens", "27 tokens"):
        sizes = {"size": input_size, "patch_size": patch_size, "local": kinds[name].local_size}
        take = our_step(arch, out_dim, batch_size, device, precision, compile, **sizes)
        tasks[f"step, {name}"] = (lambda turn, take=take: (take(), synchronise(device)), batch_size)
    times = take_turns(tasks, repeats)
    notes = {name: f"local views {format_size(crops.local_size)}" for name, crops in kinds.items()}
    rows = {
        name: {
            "seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "note": notes[name.split(", ", 1)[1]],
        }
        for name, seconds in times.items()
    }
    costs = {}
    for name, seconds in times.items():
        ratios = [one / base for one, base in zip(seconds, times[name.split(", ")[0] + ", 8 tokens"])]
        costs[name] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows[name]["note"] += f"; {costs[name][0]:.2f} times 8 tokens ({costs[name][1]:.2f} to {costs[name][2]:.2f})"
    return {
        "unit": "seconds per sample",
        "rows": rows,
        "costs": costs,
        "parameters": {
            "data": origin,
            "repeats": repeats,
            "arch": arch,
            "out_dim": out_dim,
            "batch_size": batch_size,
            "precision": precision,
            "input_size": input_size,
            "patch_size": patch_size,
            "local_crops_scale": scale,
            "base_patches": {name: crops.patch_size for name, crops in kinds.items()},
        },
    }


# -------------------------------------------------------------------------------------------------------------- step


def step(
    device: str, repeats: int, arch: str, out_dim: int, batch_size: int, precision: str, compile: bool
) -> dict[str, Any]:
    """A whole training step on ready views: teacher, student, loss, backward pass, clipping, AdamW, teacher's
    average; and what each further objective adds to it."""
    settings = {"arch": arch, "out_dim": out_dim, "batch_size": batch_size, "device": device, "precision": precision}
    sides = {"baseline": baseline_step(**settings), "ours": our_step(**settings, compiled=compile)}
    first, ours = (float(take()) for take in sides.values())
    if not abs(ours - first) <= CLOSE[precision] * abs(first):
        raise UserError(f"the first losses differ: {first} of the baseline, {ours} of ours")
    for flags, objective in OBJECTIVES.items():
        possible = {"koleo": batch_size > 1, "ibot": has_setting(arch, "patch_size"), "centering": True}
        if all(possible[name] for name in objective):
            sides[flags] = our_step(**settings, compiled=compile, objective=objective)
    times = take_turns(
        {name: (lambda turn, take=take: (take(), synchronise(device)), batch_size) for name, take in sides.items()},
        repeats,
    )
    del sides
    memory = {
        "baseline": step_memory("baseline", settings),
        "ours": step_memory("ours", settings | {"compiled": compile}),
    }
    flops = flops_per_sample(arch, out_dim)
    result = comparison(
        1,
        "seconds per sample",
        times,
        {
            "baseline": f"{memory['baseline']:5.2f} GiB: MONAI's network, eager, the step written out; {precision}",
            "ours": f"{memory['ours']:5.2f} GiB: main_dino.train_step" + ", compiled" * compile + f"; {precision}",
        },
        sources(baselines.plain_step, baselines.Model, baselines.monai_encoder, baselines.ViT),
        {
            "data": "random views",
            "views": f"2 of {format_size(GLOBAL)} and {LOCAL_NUMBER} of {format_size(LOCAL)}",
            "repeats": repeats,
            **settings,
            "peak_memory_gib": memory,
            "gflop_per_sample": flops / 1e9,
        },
    )
    result["teraflops"] = flops / result["ours"] / 1e12
    result["operators"] = step_operators(arch, out_dim, precision)
    result["objectives"] = {}
    for flags in filter(times.get, OBJECTIVES):
        ratios = [seconds / plain for seconds, plain in zip(times[flags], times["ours"])]
        result["objectives"][flags] = {"ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
    return result


def random_views(
    batch_size: int,
    device: str | torch.device,
    size: Sequence[int] = GLOBAL,
    local_number: int = LOCAL_NUMBER,
    local: Sequence[int] | None = None,
) -> list[Tensor]:
    """[global (2 B, 1, x, y, z), local (L B, 1, x, y, z)] of grey values in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    local = local or [n // 4 for n in size]
    shapes = [(2 * batch_size, 1, *size), (local_number * batch_size, 1, *local)][: 1 + bool(local_number)]
    return [torch.rand(shape, generator=generator).to(device) for shape in shapes]


def new_model(
    arch: str,
    out_dim: int,
    size: Sequence[int] = GLOBAL,
    patch_size: Sequence[int] = PATCH_SIZE,
    ibot: bool = False,
    drop_path_rate: float | None = None,
) -> MultiCropWrapper:
    """A student or teacher as main_dino.py makes it, where the architecture has patches with those of `patch_size`."""
    patch_size = patch_size if has_setting(arch, "patch_size") else None
    return main_dino.build_model(arch, size, patch_size, out_dim, False, drop_path_rate, True, ibot=ibot)


def our_state(
    arch: str,
    out_dim: int,
    batch_size: int,
    device: str,
    precision: str,
    compiled: bool = False,
    size: Sequence[int] = GLOBAL,
    objective: Mapping[str, Any] = MappingProxyType({}),
    patch_size: Sequence[int] = PATCH_SIZE,
    drop_path_rate: float | None = None,
) -> main_dino.TrainState:
    """What main_dino.py's steps need, as its defaults have it but for stochastic depth. objective: of OBJECTIVES"""
    torch.manual_seed(0)
    weight, targets = objective.get("ibot", 0.0), (out_dim, 0.9, objective.get("centering", "mean"))
    student = new_model(arch, out_dim, size, patch_size, weight > 0, drop_path_rate)
    teacher = new_model(arch, out_dim, size, patch_size, weight > 0)
    teacher.load_state_dict(student.state_dict())
    device = torch.device(device)
    student, teacher = student.to(device), teacher.to(device).requires_grad_(False)
    for notice in main_dino.compile_blocks((student, teacher), device) if compiled else ():
        raise UserError(notice)
    return main_dino.TrainState(
        network=student,
        student=student,
        teacher=teacher,
        dino_loss=main_dino.DINOLoss(*targets).to(device),
        koleo=objective.get("koleo", 0.0),
        ibot=main_dino.PatchLoss(weight, *targets, main_dino.STUDENT_TEMP).to(device) if weight else None,
        optimizer=utils.make_optimizer("adamw", utils.parameter_groups(student)),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        schedules=None,
        crops=None,
        clip_range=None,
        dtype=PRECISIONS[precision],
        clip_grad=3.0,
        global_batch=batch_size,
        seed=0,
        processes=utils.Processes(device=device),
        nonfinite=NonFiniteSteps(20, device),
    )


def our_step(
    arch: str,
    out_dim: int,
    batch_size: int,
    device: str,
    precision: str,
    compiled: bool = False,
    size: Sequence[int] = GLOBAL,
    local_number: int = LOCAL_NUMBER,
    objective: Mapping[str, Any] = MappingProxyType({}),
    patch_size: Sequence[int] = PATCH_SIZE,
    local: Sequence[int] | None = None,
) -> Callable[[], Tensor]:
    """A function that takes a step of main_dino.py on random views and returns its loss, on the device.

    objective: of OBJECTIVES
    """
    run = our_state(arch, out_dim, batch_size, device, precision, compiled, size, objective, patch_size)
    views = random_views(batch_size, device, size, local_number, local)
    draw = BlockMasks(tuple(n // p for n, p in zip(size, patch_size))).draw
    masks = [collate_masks([draw(0, 0, i) for i in range(batch_size)]).to(device) if run.ibot else None]
    return lambda: main_dino.train_step(run, [views], VALUES, frozen=False, masks=masks).metrics["loss"]


def step_operators(arch: str, out_dim: int, precision: str) -> dict[str, dict[str, int]]:
    """What `count_operators` finds in a step with main_dino.py's defaults, stochastic depth among them, on one sample.

    Counted on the CPU, with attention as the one operator that it is on a GPU.
    """
    rate = 0.1 if has_setting(arch, "drop_path_rate") else None
    run, views = our_state(arch, out_dim, 1, "cpu", precision, drop_path_rate=rate), random_views(1, "cpu")
    parts = {
        run.teacher: "teacher forward",
        run.student: "student forward",
        run.dino_loss: "loss",
        "backward": "backward",
        "clip_gradients": "clipping",
        "step_if_finite": "optimizer",
        "update_teacher": "teacher's average",
    }
    with mock.patch.object(transformer_block, "attends_by_products", lambda qkv: False):
        return count_operators(
            lambda: main_dino.train_step(run, [views], VALUES, frozen=False), main_dino.train_step.__name__, parts
        )


def baseline_step(arch: str, out_dim: int, batch_size: int, device: str, precision: str) -> Callable[[], float]:
    """The same of baselines.plain_step, from the same weights."""
    take, views = plain_trainer(arch, out_dim, device, precision), random_views(batch_size, device)
    return lambda: take(views)


def plain_trainer(arch: str, out_dim: int, device: str, precision: str) -> Callable[[list[Tensor]], float]:
    """A function that takes a plain step on views and returns its loss."""
    torch.manual_seed(0)
    ours = new_model(arch, out_dim)
    student, teacher = (baselines.Model(ours).to(device) for _ in range(2))
    optimizer, center = torch.optim.AdamW(utils.parameter_groups(student)), torch.zeros(1, out_dim, device=device)

    def take(views: list[Tensor]) -> float:
        nonlocal center
        loss, center = baselines.plain_step(
            student, teacher, optimizer, center, views, VALUES, dtype=PRECISIONS[precision]
        )
        return loss

    return take


def step_memory(side: str, settings: dict[str, Any]) -> float:
    """GiB that two steps need at most, models and views included: of the GPU, or of a process of its own."""
    if settings["device"] == "cuda":
        torch.cuda.empty_cache()
        return measured_memory(side, settings)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured_memory, (side, settings, torch.get_num_threads()))


def measured_memory(side: str, settings: dict[str, Any], threads: int | None = None) -> float:
    if threads:
        torch.set_num_threads(threads)
        import monai.networks.nets  # noqa: F401  what is imported is not what is measured
    if side == "ours":
        keep_freed_memory()  # as in a script
    device = torch.device(settings["device"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_memory(device)
    take = {"baseline": baseline_step, "ours": our_step}[side](**settings)
    take(), take()
    return (peak_memory(device) - before) / 2**30


def flops_per_sample(arch: str, out_dim: int, size: Sequence[int] = GLOBAL, local_number: int = LOCAL_NUMBER) -> int:
    """Floating point operations of a step's matrix products per sample, counted by torch without computing anything."""
    with torch.device("meta"):
        student, teacher = (new_model(arch, out_dim, size) for _ in range(2))
        loss = main_dino.DINOLoss(out_dim, 0.9)
        views = [torch.empty(2, 1, *size), torch.empty(local_number, 1, *(n // 4 for n in size))][
            : 1 + bool(local_number)
        ]
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher_logits = teacher(views[:1])
        losses, _ = loss(student(views), teacher_logits, 0.04)
        losses["loss"].backward()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------- train


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
        flags = [
            "--arch",
            arch,
            "--batch_size_per_gpu",
            batch_size,
            "--out_dim",
            out_dim,
            "--epochs",
            2 + repeats,
            "--precision",
            precision,
            *AUGMENTED,
            *["--compile"] * compile,
            *(["--num_workers", workers] if workers is not None else []),
        ]
        write_copies(folder, volume, affine, steps * batch_size)
        records = our_training(folder, flags, device)
        baselines.write_itk(os.path.join(folder, "itk.h5"), volume, affine)
        times = {
            "baseline": plain_training(
                os.path.join(folder, "itk.h5"), arch, out_dim, device, precision, cores, repeats
            ),
            "ours": [1 / record["volumes_per_second"] for record in records],
        }
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
            "gflop_per_sample": flops_per_sample(arch, out_dim) / 1e9,
        },
    )
    result |= {
        "samples_per_second": 1 / result["ours"],
        "waiting_for_data": waiting,
        "peak_memory_gib": memory,
        "teraflops": flops_per_sample(arch, out_dim) / result["ours"] / 1e12,
        "matrix_product_teraflops": rate / 1e12,
    }
    return result


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
        Path(__file__).with_name("main_dino.py"),
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


def matrix_rate(device: str, precision: str) -> float:
    """Floating point operations per second of a large square matrix product: the best of ten."""
    n, dtype = {"cpu": 2048, "cuda": 8192}[device], PRECISIONS[precision]
    a, b, seconds = torch.rand(n, n, device=device, dtype=dtype), torch.rand(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


# ------------------------------------------------------------------------------------------------------------- infer


def infer(device: str, repeats: int, arch: str, batch_size: int, precision: str, size: Sequence[int]) -> dict[str, Any]:
    """A volume through ViT and UNETR decoder, window by window, against MONAI's ViT and the plain modules."""
    from dino3d.features.sliding_window import Grid, Windows, segment
    from dino3d.finetune.cpu_inference import faster
    from dino3d.finetune.heads import Segmenter, UnetrDecoder

    torch.manual_seed(0)
    encoder = ARCHITECTURES[arch](img_size=GLOBAL)
    if encoder.stages:
        raise UserError(f"--arch {arch}: the UNETR decoder that is timed here is for transformers; take a ViT")
    decoder = UnetrDecoder(encoder, 2)
    networks = {"baseline": Segmenter(baselines.ViT(encoder), decoder), "ours": Segmenter(encoder, decoder)}
    networks = {name: network.to(device).eval() for name, network in networks.items()}
    networks["ours"] = faster(networks["ours"])
    volume, _, origin = scan(size)
    image = Grid(tuple(size), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel())).image(volume)
    windows = Windows(GLOBAL, 0.25, batch_size)
    autocast = functools.partial(torch.autocast, device, PRECISIONS[precision], enabled=precision != "fp32")
    found = {}

    def through(name: str) -> Callable[[int], None]:
        def run(turn: int) -> None:
            found[name] = segment([networks[name]], image, windows, CLIP_RANGE, device, autocast)

        return run

    times = take_turns({name: (through(name), volume.size / 1e6) for name in networks}, repeats)
    worst = (found["baseline"] - found["ours"]).abs().max().item()
    if not worst <= {"fp32": 1e-3, "bf16": 0.5}[precision]:
        raise UserError(f"the log-probabilities differ by up to {worst}")
    return comparison(
        1,
        "seconds per million voxels",
        times,
        {
            "baseline": f"MONAI's ViT as encoder; {precision}",
            "ours": f"main_lts_msd.py's way with --skip_air false; {precision}",
        },
        sources(baselines.ViT),
        {
            "data": origin,
            "arch": arch,
            "size": size,
            "window": GLOBAL,
            "overlap": windows.overlap,
            "batch_size": batch_size,
            "repeats": repeats,
            "largest_difference": worst,
        },
    )


# ------------------------------------------------------------------------------------------------------------ growth


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
    our_step(
        **settings, batch_size=8 * batch_size
    )()  # a process that has never held as much is slower: its memory is new
    for panel, cases in panels.items():
        for at, changes in cases:
            take = our_step(**settings | changes)
            times = take_turns(
                {"": (lambda turn, take=take: (take(), synchronise(device)), changes["batch_size"])}, repeats
            )[""]
            rows[f"{panel}: {at}"] = {
                "seconds": statistics.median(times),
                "spread": [min(times), max(times)],
                "note": "",
            }
    panels["processes"] = [(n, None) for n in ((1, 2) if device == "cpu" else (1,))]
    with tempfile.TemporaryDirectory() as folder:
        volume, affine, origin = scan(SCAN_SIZE)
        for processes, _ in panels["processes"]:
            write_copies(folder, volume, affine, 6 * batch_size * processes)
            flags = [
                "--arch",
                arch,
                "--batch_size_per_gpu",
                batch_size,
                "--out_dim",
                out_dim,
                "--epochs",
                1 + repeats,
                "--precision",
                precision,
                *AUGMENTED,
                "--num_workers",
                1 if device == "cpu" else 16,
            ]
            times = [1 / record["volumes_per_second"] for record in our_training(folder, flags, device, processes)]
            rows[f"processes: {processes}"] = {
                "seconds": statistics.median(times),
                "spread": [min(times), max(times)],
                "note": "main_dino.py from the disk",
            }
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
    return {
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "note": f"{megabytes:.0f} MB; " + (all_of_them if ranks > 1 else "rank 0 alone"),
        "seconds_of_all": total,
        "megabytes": megabytes,
    }


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


# --------------------------------------------------------------------------------------------------------------- gpu


def gpu(device: str, repeats: int, minutes: float) -> dict[str, Any]:
    """All that a GPU has to show, in one go: tests marked gpu, pre-training of three sizes, views, steps, attention.

    Each part is a process of its own: a fault of one leaves the others as they are."""
    ends, rows = time.monotonic() + 60 * minutes, {}

    def measure(name: str, limit: float, task: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        seconds = min(limit, ends - time.monotonic())
        try:
            found = task(*arguments, seconds) if seconds > 1 else {"note": "left out: no time for it"}
        except (subprocess.TimeoutExpired, multiprocessing.TimeoutError):
            found = {"note": f"not done after {seconds:.0f} s"}
        except Exception as error:  # whatever it is, the others are to be measured
            found = {"note": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        rows[name] = {"seconds": None, **found}
        print(f"{name}: {found['note']}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        samples, (volume, affine, origin) = 64 * max(GPU_TRAINING.values()), scan(SCAN_SIZE)
        write_copies(folder, volume, affine, samples)
        measure("tests marked gpu", 240, gpu_tests)
        measure("a large matrix product", 60, in_child, gpu_products, device)
        for arch, batch_size in GPU_TRAINING.items():
            measure(f"{arch} from the disk", 180, gpu_training, folder, arch, batch_size, device)
    batch_size = GPU_TRAINING["vit_small"]
    measure("ten views", 60, in_child, gpu_views, batch_size, repeats, device)
    for compiled, in_groups in ((False, False), (False, True), (True, False)):
        name = "a step of vit_small" + ", --compile" * compiled + ", IN_GROUPS" * in_groups
        measure(name, 90, in_child, gpu_step, "vit_small", 65536, batch_size, compiled, in_groups, repeats, device)
    measure("attention", 60, in_child, gpu_attention, 2 * batch_size, 6, (513, 512), repeats, device)
    parameters = {"repeats": repeats, "minutes": minutes, "data": origin, "batch_size": GPU_TRAINING, "out_dim": 65536}
    return {"unit": "in each row's own", "rows": rows, "parameters": parameters}


def in_child(task: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a task gives, in a process of its own. The last argument is the time that it has, in seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(task, arguments[:-1]).get(arguments[-1])


def gpu_tests(seconds: float) -> dict[str, Any]:
    """Tests that passed and failed; of those that take too long, what is known by then."""
    words = [sys.executable, "-u", "-m", "pytest", "-v", "-m", "gpu", "tests"]
    try:
        ended = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, timeout=seconds)
        output, state = ended.stdout or ended.stderr, f"exit code {ended.returncode}"
    except subprocess.TimeoutExpired as error:
        output, state = error.stdout or b"", f"not done after {seconds:.0f} s"
    text = output.decode(errors="replace")
    found = {one: re.findall(rf"^(tests.*) {one}\b", text, re.M) for one in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    counts = [f"{len(names)} {outcome.lower()}" for outcome, names in found.items() if names]
    failed, note = found["FAILED"] + found["ERROR"], ", ".join([*(counts or text.splitlines()[-1:]), state])
    return {"note": "; ".join([note, *failed]), "failed": failed, "passed": found["PASSED"]}


def gpu_products(device: str) -> dict[str, Any]:
    rate = matrix_rate(device, "bf16") / 1e12
    return {"note": f"{rate:.0f} TFLOP/s in bf16", "teraflops": rate}


def gpu_training(folder: str, arch: str, batch_size: int, device: str, seconds: float) -> dict[str, Any]:
    """main_dino.py with --compile and all six augmentations, its second epoch."""
    shutil.rmtree(os.path.join(folder, "run1"), ignore_errors=True)  # of another architecture
    flags = ["--arch", arch, "--batch_size_per_gpu", batch_size, "--epochs", 2, *AUGMENTED]
    flags += ["--compile"] * (device == "cuda")
    (record,) = our_training(folder, flags, device, seconds=seconds)
    rate, waiting, memory = (record[name] for name in ("volumes_per_second", "waiting_for_data", "peak_memory_gib"))
    teraflops = flops_per_sample(arch, 65536) * rate / 1e12
    attention = json.loads(Path(folder, "run1", "config.json").read_text(**TEXT))["attention"]
    return {
        "note": f"{rate:.0f} samples/s, {waiting:.1%} waiting for data, {teraflops:.0f} TFLOP/s, {memory:.1f} GiB, "
        + ", ".join(f"attention of {tokens} tokens {way}" for tokens, way in attention.items()),
        "samples_per_second": rate,
        "waiting_for_data": waiting,
        "teraflops": teraflops,
        "peak_memory_gib": memory,
        "attention": attention,
    }


def gpu_views(batch_size: int, repeats: int, device: str) -> dict[str, Any]:
    """Milliseconds to render a batch that is on the device already, the plain way and in one kernel."""
    volume, _, _ = scan(SCAN_SIZE)
    times, differences = {}, []
    for in_one in (False, True):  # the kernel last: a fault of it ends the process
        for count, policy in ((3, paper_policy(["rotation", "scale", "flip"])), (6, POLICY)):
            crops = MultiCropAugmentation(policy, GLOBAL, LOCAL, LOCAL_NUMBER)
            patches = base_patches(volume, crops, batch_size)
            drawn = [Sample(patch, crops.draw(0, 0, i), []) for i, patch in enumerate(patches)]
            batch = collate(drawn).to(device)

            def render(crops: MultiCropAugmentation = crops, batch: Any = batch) -> list[Tensor]:
                return crops.render(batch.patches, batch.groups, CLIP_RANGE)

            plain = render()
            with mock.patch.object(augmentations, "VIEWS_IN_ONE_KERNEL", in_one):
                way = "in one kernel" if augmentations.in_one_kernel(torch.device(device)) else "plain"
                times[f"{count} augmentations, {way}"] = milliseconds(render, repeats, device)
                differences += [float((a - b).abs().max()) for a, b in zip(render(), plain)]
    note = ", ".join(f"{name} {time:.2f} ms" for name, time in times.items())
    return {
        "note": f"{note} a batch of {batch_size}; views differ by at most {max(differences):.1g}",
        "milliseconds": times,
        "difference": max(differences),
    }


def gpu_step(
    arch: str, out_dim: int, batch_size: int, compiled: bool, in_groups: bool, repeats: int, device: str
) -> dict[str, Any]:
    """Milliseconds of a step on ready views, its launches, and the kernels that take longest."""
    with mock.patch.object(grouped, "IN_GROUPS", in_groups):
        take = our_step(arch, out_dim, batch_size, device, "bf16", compiled)
        step = milliseconds(take, repeats, device)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][
            : 1 + (device == "cuda")
        ]
        with torch.profiler.profile(activities=activities) as profiler:
            take()
            synchronise(device)
    events = profiler.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted(((event.self_device_time_total / 1e3, event.key) for event in kernels), reverse=True)
    longest = [f"{time:.2f} ms {name[:60]}" for time, name in kernels[:8]]
    busy = sum(time for time, _ in kernels)
    return {
        "note": "; ".join([f"{step:.1f} ms, kernels {busy:.1f} ms, {launches} launches", *longest]),
        "milliseconds": step,
        "kernel_milliseconds": busy,
        "launches": launches,
        "kernels": kernels[:40],
    }


def gpu_attention(batch_size: int, heads: int, lengths: Sequence[int], repeats: int, device: str) -> dict[str, Any]:
    """Milliseconds of attention, forward and backward in bf16, for numbers of tokens and each of PyTorch's ways."""
    times = {}
    for tokens in lengths:
        shape = (batch_size, heads, tokens, 64)
        q, k, v = (torch.rand(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        for way in WAYS_TO_ATTEND:
            name = f"{tokens} tokens {way.name.removesuffix('_ATTENTION').lower()}"
            try:
                with sdpa_kernel(way):
                    times[name] = milliseconds(
                        lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v)),
                        repeats,
                        device,
                    )
            except RuntimeError:  # not for this device, or not enough memory
                times[name] = None
    told = (f"{name} {'not here' if time is None else f'{time:.2f} ms'}" for name, time in times.items())
    return {"note": ", ".join(told), "milliseconds": times}


if __name__ == "__main__":
    utils.run_script(main)
