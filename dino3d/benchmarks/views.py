"""Ten views of a sample: against MONAI's transforms, and local views of 27 tokens against those of 8."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from augmentations import MultiCropAugmentation
from dino3d.benchmarks import baselines
from dino3d.benchmarks.scans import (
    BATCH,
    CLIP_RANGE,
    GLOBAL,
    LOCAL,
    LOCAL_NUMBER,
    POLICY,
    SCAN_SIZE,
    VIEWS,
    base_patches,
    cut,
    scan,
)
from dino3d.benchmarks.step import our_step
from dino3d.benchmarks.turns import (
    comparison,
    ratio_within_turns,
    report_row,
    sources,
    synchronise,
    take_turns,
    until_done,
)
from dino3d.command_line import UserError
from dino3d.data.conventions import format_size
from dino3d.data.pretraining import Sample, collate
from vision_transformer import has_setting


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
            "views": VIEWS,
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
        tasks[f"step, {name}"] = (until_done(take, device), batch_size)
    times = take_turns(tasks, repeats)
    notes = {name: f"local views {format_size(crops.local_size)}" for name, crops in kinds.items()}
    rows, costs = {}, {}
    for name, seconds in times.items():
        what, kind = name.split(", ", 1)
        costs[name] = ratio_within_turns(seconds, times[f"{what}, 8 tokens"])
        note = f"{notes[kind]}; {costs[name][0]:.2f} times 8 tokens ({costs[name][1]:.2f} to {costs[name][2]:.2f})"
        rows[name] = report_row(seconds, note)
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


def our_views(patches: Sequence[np.ndarray], crops: MultiCropAugmentation, first: int, device: str) -> float:
    """Draw, collate and render the views of a batch; returns the seconds until the batch is ready for the device."""
    start = time.perf_counter()
    batch = collate([Sample(patch, crops.draw(0, 0, first + i), []) for i, patch in enumerate(patches)])
    ready = time.perf_counter()
    batch = batch.to(device)
    crops.render(batch.patches, batch.groups, CLIP_RANGE)
    synchronise(device)
    return ready - start
