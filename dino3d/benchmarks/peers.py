"""The best that others have for what this repository does, for benchmark.py to compare with: each as somebody would
write it who knows that library well. Nothing here is used in training.

Packages that are missing are installed by `benchmark.py peers --install`, in a folder of their own.
"""

import importlib
import math
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino3d.files import TEXT

PEERS = {  # name to import: what pip installs
    "batchgeneratorsv2": "batchgeneratorsv2==0.3.6",
    "torchio": "torchio==1.2.1",
    "blosc2": "blosc2==4.14.1",
    "zarr": "zarr==3.1.6",
}
ROOM = 1.4  # sides of the box that a view is cut from first, relative to the view: room to turn and scale it
B2ND = {"chunks": (128, 128, 128), "blocks": (32, 32, 32)}  # voxels


def install(folder: Path) -> None:
    """Install PEERS into a folder and make them importable. What is importable already, torch above all, is taken
    from there. Raises RuntimeError."""
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    python = Path(sysconfig.get_path("scripts", "venv", paths), Path(sys.executable).name)
    if not site.is_dir():
        venv.create(folder, with_pip=True, symlinks=True)
        ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "ours.pth").write_text("\n".join(ours) + "\n", **TEXT)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS.values()]
    done = subprocess.run(command, capture_output=True, **TEXT)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    sys.path.append(str(site))
    importlib.invalidate_caches()


def missing(name: str) -> str:
    """Why a package can't be imported, in one line, or ""."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"missing: {error} (--install)"
    return ""


# ------------------------------------------------------------------------------------------------------------- views


def scaled(patch: np.ndarray, low: float, high: float) -> Tensor:
    """(1, X, Y, Z) float32 in [0, 1] of a patch in HU."""
    return torch.from_numpy(patch).float()[None].clamp_(low, high).sub_(low).div_(high - low)


def box_around(patch: Tensor, size: Sequence[int], rng: np.random.RandomState) -> Tensor:
    """A random box of (1, X, Y, Z), ROOM times as large as a view of `size` where the patch has room for it."""
    sides = [min(math.ceil(n * ROOM), available) for n, available in zip(size, patch.shape[1:])]
    start = [rng.randint(available - n + 1) for n, available in zip(sides, patch.shape[1:])]
    return patch[(slice(None), *(slice(a, a + n) for a, n in zip(start, sides)))]


def monai_view(size: Sequence[int], bent: bool, grey: bool, seed: int) -> Callable[[Tensor], Any]:
    """MONAI with one resampling for rotation, scale and deformation, straight to the view's size."""
    from monai import transforms as monai

    shared = {
        "spatial_size": tuple(size),
        "rotate_range": [math.radians(30)] * 3,
        "scale_range": (0.25, 0.25, 0.25),
        "padding_mode": "border",
    }
    # Of views that are neither turned nor scaled, a quarter, and not bent, half, the middle is cut out
    affine, cut = monai.RandAffine(prob=1, **shared), monai.CenterSpatialCrop(tuple(size))
    chain = [monai.OneOf([affine, cut], weights=[0.75, 0.25])]
    if bent:
        elastic = monai.Rand3DElastic(sigma_range=(1, 7), magnitude_range=(0, 150), prob=1, **shared)
        chain = [monai.OneOf([elastic, affine, cut], weights=[0.5, 0.375, 0.125])]
    chain.append(monai.RandAxisFlip(prob=0.5))
    if grey:
        chain.append(monai.RandGaussianSmooth((0.01, 2), (0.01, 2), (0.01, 2), prob=0.5))
        chain.append(monai.RandHistogramShift(num_control_points=10, prob=0.5))
    return monai.Compose(chain).set_random_state(seed)


def monai_lazy_view(size: Sequence[int], seed: int) -> Callable[[Tensor], Any]:
    """MONAI's transforms one after the other, resampled once at the end ("lazy"): of those that act on positions."""
    from monai import transforms as monai

    turn = [math.radians(30)] * 3
    return monai.Compose(
        [
            monai.RandRotate(*turn, prob=0.5, padding_mode="border"),
            monai.RandAffine(scale_range=(0.25, 0.25, 0.25), prob=0.5, padding_mode="border"),
            monai.RandAxisFlip(prob=0.5),
            monai.CenterSpatialCrop(tuple(size)),
        ],
        lazy=True,
    ).set_random_state(seed)


def batchgenerators_view(size: Sequence[int], bent: bool, grey: bool) -> Callable[[Tensor], Tensor]:
    """batchgeneratorsv2 (nnU-Net's), gamma in the place of histogram shift, which it does not have."""
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    angle = math.radians(30)
    spatial = SpatialTransform(
        patch_size=tuple(size),
        patch_center_dist_from_border=[n // 2 for n in size],
        random_crop=True,
        p_elastic_deform=0.5 if bent else 0,
        p_rotation=0.5,
        rotation=(-angle, angle),
        p_scaling=0.5,
        scaling=(0.75, 1.25),
        padding_mode_image="border",
    )
    chain = [spatial, RandomTransform(MirrorTransform((0, 1, 2)), 0.5)]
    if grey:
        chain.append(RandomTransform(GaussianBlurTransform((0.01, 2)), 0.5))
        chain.append(RandomTransform(GammaTransform((0.7, 1.5), 0, True, 1, 1), 0.5))
    compose = ComposeTransforms(chain)
    return lambda patch: compose(image=patch)["image"]


def torchio_view(size: Sequence[int], bent: bool, grey: bool) -> Callable[[Tensor], Tensor]:
    """TorchIO on a box that was cut out first; gamma in the place of histogram shift, which it does not have."""
    import torchio

    chain = [torchio.RandomAffine(scales=(0.75, 1.25), degrees=30, default_pad_value="minimum", p=0.75)]
    if bent:
        chain.append(torchio.RandomElasticDeformation(p=0.5))
    chain += [torchio.CropOrPad(tuple(size)), torchio.RandomFlip(axes=(0, 1, 2), flip_probability=0.25)]
    if grey:
        chain += [torchio.RandomBlur((0.01, 2), p=0.5), torchio.RandomGamma(p=0.5)]
    return torchio.Compose(chain)


# ------------------------------------------------------------------------------------------------------------- files


def write_b2nd(path: str, volume: np.ndarray) -> None:
    """Blosc2's own files, LZ4 after a bit shuffle."""
    import blosc2

    settings = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "filters_meta": [0]}
    blosc2.asarray(np.ascontiguousarray(volume), urlpath=path, mode="w", cparams=settings, **B2ND)


def read_b2nd(path: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    from blosc2 import open as open_b2nd

    return open_b2nd(path, mode="r", mmap_mode="r")[tuple(slice(int(a), int(a + n)) for a, n in zip(start, size))]


def write_zarr(path: str, volume: np.ndarray) -> None:
    """Zarr 3 with chunks like ours, in one file per shard of 128 x 128 x 128."""
    import zarr
    from zarr.codecs import BloscCodec

    codec = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
    array = zarr.create_array(
        path, shape=volume.shape, dtype=volume.dtype, chunks=(32,) * 3, shards=(128,) * 3, compressors=[codec]
    )
    array[:] = volume


def read_zarr(path: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    import zarr

    return zarr.open_array(path, mode="r")[tuple(slice(int(a), int(a + n)) for a, n in zip(start, size))]


def write_npy(path: str, volume: np.ndarray) -> None:
    """What MONAI's PersistentDataset and friends come to at best: a whole volume as an array, mapped into memory."""
    np.save(path, volume)


def read_npy(path: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    part = np.load(path, mmap_mode="r")[tuple(slice(int(a), int(a + n)) for a, n in zip(start, size))]
    return np.array(part)
