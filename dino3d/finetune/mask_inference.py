"""Whole CTs to masks with the models of trained folds; from your own code: an array and its affine to a mask."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

import utils
from dino3d.command_line import UserError
from dino3d.data.conventions import Stored
from dino3d.data.images import make_image, voxels_of
from dino3d.data.parallel import progress
from dino3d.data.requirements import require_ct
from dino3d.data.volume import Volume
from dino3d.features import sliding_window
from dino3d.features.sliding_window import Windows, grid_of
from dino3d.finetune import mask_metrics
from dino3d.finetune.cpu_inference import faster
from dino3d.finetune.fold_folders import fold_files, load_folds
from dino3d.finetune.heads import Segmenter, segmenter_of
from dino3d.finetune.runtime import Runtime

MASKS = {"overlap": 0.25, "largest_component": False, "min_volume": 0.0}  # how final masks are made, where no flag says


class InferenceSettings(NamedTuple):
    """How whole cases are segmented. tolerance: mm; final: function of a mask and its spacing that cleans it.
    skip_air: see `sliding_window.segment`"""

    windows: Windows
    clip_range: Sequence[float]
    tolerance: float
    final: Callable[[np.ndarray, Sequence[float]], np.ndarray]
    skip_air: bool = True


def inference_settings(config: dict[str, Any], batch_size: int, skip_air: bool = True) -> InferenceSettings:
    """The InferenceSettings of a run's config. batch_size: windows at a time on a GPU"""
    final = functools.partial(
        mask_metrics.clean, largest_component=config["largest_component"], min_volume=config["min_volume"]
    )
    return InferenceSettings(
        Windows(tuple(config["input_size"]), config["overlap"], batch_size),
        config["clip_range"],
        config["tolerance"],
        final,
        skip_air,
    )


def predict_log_probabilities(
    networks: Sequence[Segmenter],
    image: sitk.Image,
    settings: InferenceSettings,
    runtime: Runtime,
    shows_progress: bool = False,
) -> Tensor:
    """(classes, X, Y, Z) log-probabilities of an image on the working grid. Raises StopRequested."""
    device, windows = runtime.processes.device, settings.windows
    if device.type == "cpu":  # several at once only take more memory, and time where the caches are too small for them
        windows, networks = windows._replace(batch_size=1), list(map(faster, networks))
    batches = len(networks) * sliding_window.count_batches(image.GetSize(), windows)
    with progress(batches, "window", shows_progress and runtime.processes.is_main) as bar:

        def before_windows() -> None:
            runtime.stop_signal.check()
            bar.update()

        return sliding_window.segment(
            networks,
            image,
            windows,
            settings.clip_range,
            device,
            runtime.autocast,
            before_windows=before_windows,
            skip_air=settings.skip_air,
        )


def mask_of(
    networks: Sequence[Segmenter],
    image: sitk.Image,
    spacing: Sequence[float],
    settings: InferenceSettings,
    runtime: Runtime,
) -> sitk.Image:
    """A SimpleITK.Image of uint8 classes on the voxels of an image in RAS; spacing: (3,) mm that the networks know."""
    return mask_and_levels(networks, image, spacing, settings, runtime)[0]


def mask_and_levels(
    networks: Sequence[Segmenter],
    image: sitk.Image,
    spacing: Sequence[float],
    settings: InferenceSettings,
    runtime: Runtime,
    with_levels: bool = False,
) -> tuple[sitk.Image, np.ndarray | None]:
    """(`mask_of` an image, `sliding_window.to_scan_levels` of it, before small components were dropped)."""
    own, working = grid_of(image), sliding_window.to_network_grid(image, spacing)
    maps = predict_log_probabilities(networks, working, settings, runtime, shows_progress=True)
    found = sliding_window.to_scan_grid(maps, grid_of(working), own)
    levels = sliding_window.to_scan_levels(maps, grid_of(working), own) if with_levels else None
    voxels = voxels_of(found)
    cleaned = settings.final(voxels, own.spacing)
    return (found if cleaned is voxels else own.image(cleaned)), levels


def segment_volume(
    weights: Path | str,
    volume: np.ndarray,
    affine: np.ndarray,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> np.ndarray:
    """(X, Y, Z) uint8 mask of a CT in an array, as `main_lts_msd.py --predict` writes for a file of it.

    weights: --output_dir of a trained run (the mean of its folds), a fold in it, or a best.pth
    volume: (X, Y, Z) Hounsfield units; affine: (4, 4) from voxel indices to RAS mm, in any orientation, as nibabel's
    device: a GPU if there is one; precision: one of `utils.PRECISIONS`, by default what --predict would take there
    Raises UserError for the weights or precision, DataError for what is no CT in HU.
    """
    if precision not in (None, *utils.PRECISIONS):
        raise UserError(f"precision {precision}: expected bf16, fp16 or fp32")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    networks, config, _ = load_folds(fold_files(weights), segmenter_of, "decoder")
    processes = utils.Processes(device=device)
    dtype = utils.PRECISIONS[utils.choose_precision(precision, None, processes)[0]]
    runtime = Runtime(processes, dtype, batch_size=1, workers=0)
    volume = np.asarray(volume)
    stored = Stored(volume.shape, np.asarray(affine, float), lambda slices: volume[slices])
    with Volume("array", stored) as scan:
        image = make_image(scan.read(), scan.affine)
        require_ct(voxels_of(image), "array")
        networks = [network.to(device).eval() for network in networks]
        mask = mask_of(networks, image, config["spacing"], inference_settings(config, 1), runtime)
        return np.ascontiguousarray(scan.in_file_order(voxels_of(mask)))
