"""Views and reads beside the best that a user could pick instead."""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from augmentations import PAPER, MultiCropAugmentation, collate_views, paper_policy
from dino3d.benchmarks import baselines
from dino3d.benchmarks import peers as others
from dino3d.benchmarks.reading import read_volume, require_voxels, write_prepared
from dino3d.benchmarks.scans import BATCH, CLIP_RANGE, GLOBAL, LOCAL, LOCAL_NUMBER, SCAN_SIZE, base_patches, scan
from dino3d.benchmarks.turns import ratio_within_turns, report_row, take_turns
from dino3d.command_line import UserError


def peers(device: str, repeats: int, install: str | None) -> dict[str, Any]:
    """Ten views of a sample and a random patch, against the best that a user could pick instead: CPU seconds."""
    if install is not None:
        try:
            others.install(Path(install))
        except (OSError, RuntimeError) as error:
            raise UserError(f"--install {install}: {error}") from error
    volume, affine, origin = scan(SCAN_SIZE)
    rows, parameters = {}, {"data": origin, "repeats": repeats, "clip_range": CLIP_RANGE}
    for number_on, names in (("three", list(PAPER)[:3]), ("six", list(PAPER))):
        crops = MultiCropAugmentation(paper_policy(names), GLOBAL, LOCAL, LOCAL_NUMBER)
        patches = base_patches(volume, crops, BATCH[device])
        parameters[f"patch_{number_on}"] = crops.patch_size
        rows |= peers_at(f"ten views, {number_on}", peer_views(patches, crops, number_on == "six"), repeats)
    parameters["patch_read"] = crops.patch_size
    with tempfile.TemporaryDirectory() as folder:
        rows |= peers_at("a patch", peer_reads(folder, volume, affine, crops.patch_size), repeats)
    return {"unit": "CPU seconds per sample, or per patch", "rows": rows, "parameters": parameters}


def peers_at(
    what: str, tasks: dict[str, tuple[Callable[[int], Any], float] | str], repeats: int
) -> dict[str, dict[str, Any]]:
    """Rows of `tasks` in turns: {name: what `take_turns` takes, or why it can't run}; the first is ours."""
    known = {name: task for name, task in tasks.items() if not isinstance(task, str)}
    times = take_turns(known, repeats, time.process_time)  # some start threads of their own
    ours, rows = next(iter(times.values())), {}
    for name, task in tasks.items():
        seconds = times.get(name)
        if seconds is None:
            rows[f"{what}: {name}"] = {"seconds": None, "spread": None, "note": task}
            continue
        ratio, *spread = ratio_within_turns(seconds, ours)
        note = "" if seconds is ours else f"{ratio:.2f} times ours ({spread[0]:.2f} to {spread[1]:.2f})"
        rows[f"{what}: {name}"] = {**report_row(seconds, note), "ratio": ratio, "ratio_spread": spread}
    return rows


def peer_views(
    patches: Sequence[np.ndarray], crops: MultiCropAugmentation, all_six: bool
) -> dict[str, tuple[Callable[[int], Any], float] | str]:
    """Tasks of `peers_at`: ten views of samples from int16 patches, by us and by others."""
    made = {
        "MONAI, one resampling to the view": ("monai", lambda size: others.monai_view(size, all_six, all_six, 0)),
        "batchgeneratorsv2": ("batchgeneratorsv2", lambda size: others.batchgenerators_view(size, all_six, all_six)),
        "TorchIO, cropped first": ("torchio", lambda size: others.torchio_view(size, all_six, all_six)),
    }
    if not all_six:
        made["MONAI, lazy"] = ("monai", lambda size: others.monai_lazy_view(size, 0))

    def ours(turn: int) -> None:
        for i, patch in enumerate(patches):
            groups = collate_views([crops.draw(0, 0, turn * len(patches) + i)])
            crops.render(torch.from_numpy(patch)[None], groups, CLIP_RANGE)

    tasks = {"ours": (ours, len(patches))}
    for name, (package, make) in made.items():
        if reason := others.missing(package):
            tasks[name] = reason
            continue
        cropped = package != "batchgeneratorsv2"  # which crops as it samples
        tasks[name] = (functools.partial(peer_turn, patches, make(GLOBAL), make(LOCAL), cropped), len(patches))
    return tasks


def peer_turn(
    patches: Sequence[np.ndarray], global_view: Callable, local_view: Callable, cropped: bool, turn: int
) -> None:
    """The views of a batch by another library. cropped: cut from a box around each view"""
    rng = np.random.RandomState(turn)
    for patch in patches:
        whole = others.scaled(patch, *CLIP_RANGE)
        for size, view, number_of in ((GLOBAL, global_view, 2), (LOCAL, local_view, LOCAL_NUMBER)):
            for _ in range(number_of):
                view(others.box_around(whole, size, rng) if cropped else whole)


def peer_reads(
    folder: str, volume: np.ndarray, affine: np.ndarray, size: Sequence[int], reads: int = 4
) -> dict[str, tuple[Callable[[int], Any], float] | str]:
    """Tasks of `peers_at`: random patches of a scan, the file opened for each, warm cache."""
    ways = {
        "ours": (None, lambda path: write_prepared(path, volume, affine), read_volume),
        "blosc2 b2nd": ("blosc2", lambda path: others.write_b2nd(path, volume), others.read_b2nd),
        "zarr 3": ("zarr", lambda path: others.write_zarr(path, volume), others.read_zarr),
        "npy, uncompressed": (None, lambda path: others.write_npy(path, volume), others.read_npy),
        "ITK HDF5, gzip": (None, lambda path: baselines.write_itk(path, volume, affine), baselines.read_itk),
    }
    endings = ["ours.hdf5", "scan.b2nd", "scan.zarr", "scan.npy", "itk.hdf5"]
    generator, tasks = np.random.RandomState(0), {}
    starts = generator.randint(0, np.array(volume.shape) - size + 1, (reads, 3))

    def reading(take: Callable, path: str, turn: int) -> None:
        for start in starts:
            take(path, start, size)

    for (name, (package, write, take)), ending in zip(ways.items(), endings):
        if package and (reason := others.missing(package)):
            tasks[name] = reason
            continue
        path = os.path.join(folder, ending)
        write(path)
        require_voxels(take(path, starts[0], size), volume, starts[0], size, name)
        tasks[name] = (functools.partial(reading, take, path), reads)
    return tasks
