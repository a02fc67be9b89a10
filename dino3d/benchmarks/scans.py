"""What the benchmarks work on: a scan, random patches of it, and the sizes of the views that are made of them."""

from collections.abc import Iterable, Sequence

import numpy as np

from augmentations import PAPER, MultiCropAugmentation, paper_policy
from dino3d.data.conventions import format_size
from dino3d.data.pretraining import place_patch
from dino3d.data.volume import Volume
from dino3d.study.jobs import ROOT

SCAN_SIZE = (479, 400, 198)  # voxels of a usual chest CT
SCAN = ROOT.parent / "shared/data/ct/cptac_c3n_00247.nii.gz"
GLOBAL, LOCAL, LOCAL_NUMBER = (96, 96, 48), (24, 24, 12), 8  # voxels; two views are global
VIEWS = f"2 of {format_size(GLOBAL)} and {LOCAL_NUMBER} of {format_size(LOCAL)}"
POLICY = paper_policy(PAPER)
CLIP_RANGE = (-1000, 1000)  # HU
BATCH = {"cpu": 4, "cuda": 64}  # samples per call


def scan(size: Sequence[int]) -> tuple[np.ndarray, np.ndarray, str]:
    """((X, Y, Z) int16 HU in RAS, (4, 4) affine, where it is from): a real CT where it is at hand, or a phantom.

    A CT that is smaller than `size` goes on as its mirror image, which keeps its noise and so what it compresses to.
    """
    if not SCAN.is_file():
        from dino3d.prepare.phantoms import chest_phantom

        origin = f"chest phantom of {format_size(size)} voxels (no {SCAN.name} here)"
        return *chest_phantom(0, size, (0.7, 0.7, 1.5)), origin
    with Volume(SCAN) as file:
        volume, affine = file.read(), file.affine
    origin = (
        f"real CT {SCAN.name} of {format_size(volume.shape)} voxels, "
        f"mirrored or cut at its far ends to {format_size(size)}"
    )
    volume = np.pad(volume, [(0, max(0, n - old)) for n, old in zip(size, volume.shape)], "symmetric")
    return np.ascontiguousarray(cut(volume, (0, 0, 0), size)), affine, origin


def cut(volume: np.ndarray, start: Iterable[int], size: Iterable[int]) -> np.ndarray:
    return volume[tuple(slice(a, a + n) for a, n in zip(start, size))]


def base_patches(volume: np.ndarray, crops: MultiCropAugmentation, number: int) -> list[np.ndarray]:
    """Random base patches of a volume, as pre-training reads them."""
    rng, patches = np.random.RandomState(0), []
    for _ in range(number):
        start = place_patch(rng, np.array(volume.shape), np.array(crops.core), np.array(crops.patch_size))
        # A file's slowest axis is z: what is read from one lies in memory in that order
        patches.append(np.asfortranarray(cut(volume, start, crops.patch_size)))
    return patches
