"""A volume through a segmentation network, window by window."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dino3d.benchmarks import baselines
from dino3d.benchmarks.scans import CLIP_RANGE, GLOBAL, scan
from dino3d.benchmarks.turns import comparison, sources, take_turns
from dino3d.command_line import UserError
from utils import PRECISIONS
from vision_transformer import ARCHITECTURES


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
