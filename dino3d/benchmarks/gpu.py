"""All that a GPU has to show, its tests first, each part in a process of its own."""

import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import augmentations
from augmentations import MultiCropAugmentation, paper_policy
from dino3d.benchmarks.scans import CLIP_RANGE, GLOBAL, LOCAL, LOCAL_NUMBER, POLICY, SCAN_SIZE, base_patches, scan
from dino3d.benchmarks.step import flops_per_sample, matrix_rate, our_step
from dino3d.benchmarks.training import AUGMENTED, our_training, write_copies
from dino3d.benchmarks.turns import seconds_until_done, synchronise
from dino3d.data.pretraining import Sample, collate
from dino3d.files import TEXT
from dino3d.study.jobs import ROOT
from dino3d.training import grouped

WAYS_TO_ATTEND = [
    getattr(SDPBackend, name) for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
]
GPU_TRAINING = {"vit_small": 64, "vit_base": 64, "vit_large": 32}  # samples per step


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
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=seconds)
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


def milliseconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Median of so many calls, after two to warm up."""
    return 1e3 * statistics.median(seconds_until_done(call, 2 + repeats, device)[2:])
