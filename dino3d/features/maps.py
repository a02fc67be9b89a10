"""What a pre-trained encoder sees in a volume, patch by patch: the class token's attention, the principal components of
the patches' features as colours, and their similarity to those at a point.

Maps have one value per patch. Those of a whole scan lie on a Grid of patches over its network grid, and are put
together from windows that overlap. `sliding_window.interpolate` brings them to the scan's own voxels.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from augmentations import scale_intensity
from dino3d.data import images, resampling
from dino3d.data.conventions import AIR
from dino3d.data.parallel import progress
from dino3d.features.sliding_window import Grid, Windows, count_batches, grid_of, stitch, to_network_grid
from vision_transformer import Encoder

AIR_BELOW = -950.0  # HU: patches whose mean is lower hold next to nothing but air
SHOWN = (1.0, 99.0)  # percentiles of a principal component that become 0 and 1


class ScanMaps(NamedTuple):
    """What an encoder sees of a scan, patch by patch.

    features: (D, x, y, z) float32, of a ViT after the final norm
    attention: (heads, x, y, z) float32, 1 where a patch gets as much as if all of its window got the same; None where
        the encoder has no attention
    tissue: (x, y, z) bool, False for patches of air, where the maps are 0
    grid: Grid of the patches
    """

    features: np.ndarray
    attention: np.ndarray | None
    tissue: np.ndarray
    grid: Grid


class Components(NamedTuple):
    """Principal components of features. mean: (D,); vectors: (D, K) unit vectors in columns, by falling variance

    share: (K,) of the variance that each explains; low, high: (K,) values along them that become 0 and 1
    """

    mean: np.ndarray
    vectors: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray


def has_attention(encoder: Encoder) -> bool:
    """Whether an encoder's class token attends to patches, as that of a vision transformer."""
    return hasattr(encoder, "features_and_attention")


@torch.no_grad()
def attention_maps(encoder: Encoder, volumes: Tensor) -> Tensor:
    """(B, heads, x, y, z) how much of the class token's attention in the last block each patch gets.

    volumes: (B, 1, X, Y, Z) in [0, 1], multiples of the patch. Over all patches and the class token itself a head's sum
    is 1. Raises ValueError for an encoder without attention.
    """
    if not has_attention(encoder):
        raise ValueError(f"a {type(encoder).__name__} has no attention: only vision transformers have a class token")
    return encoder.features_and_attention(volumes)[1]


def scan_maps(
    encoder: Encoder,
    image: sitk.Image,
    spacing: Sequence[float] | None,
    clip_range: Sequence[float],
    overlap: float = 0.75,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    before_windows: Callable[[], None] = lambda: None,
    shows_progress: bool = False,
) -> ScanMaps:
    """The ScanMaps of a scan or crop of any size, seen in windows of the encoder's own size.

    encoder: on `device`, in evaluation mode; image: int16 HU in RAS, see dino3d/data/images.py
    spacing: (3,) mm per voxel that the encoder was trained on; None: the image's own
    clip_range: (low, high) HU that become 0 and 1
    overlap: share of a window's side that it has in common with the next one, at least 0 and below 1: its patches are
        weighted by a Gaussian around its middle. Windows of air alone are passed over
    before_windows: called before each batch of windows; what it raises ends the work
    """
    # Along the scan's own axes, as pre-training read them
    working = to_network_grid(image, image.GetSpacing() if spacing is None else spacing, upright=False)
    patch = np.array(encoder.patch_size)
    in_patches = _by_patches(images.voxels_of(working), patch)  # (1, px * py * pz, x, y, z)
    windows = Windows(tuple((-(-np.array(encoder.img_size) // patch)).tolist()), overlap, batch_size)  # rounded up
    heads = 0

    def outputs_of(hu: Tensor) -> Tensor:
        nonlocal heads
        before_windows()
        bar.update()
        seen = (hu.mean(1) >= AIR_BELOW).flatten(1).any(1)  # (B,): windows of air alone count nowhere
        seen[0] = True  # what it gives says what there is to give
        x = hu[seen].unflatten(1, tuple(patch.tolist())).permute(0, 4, 1, 5, 2, 6, 3)  # (B', x, px, y, py, z, pz)
        x = scale_intensity(x.flatten(5).flatten(3, 4).flatten(1, 2), *clip_range)[:, None]  # (B', 1, X, Y, Z)
        with autocast():
            if has_attention(encoder):
                features, attention = encoder.features_and_attention(x)
                heads = attention.shape[1]
                # Times the patches of a window: windows of another size then have the same scale
                given = torch.cat((features.float(), attention.float() * attention[0, 0].numel()), 1)
            else:
                given = encoder.get_intermediate_layers(x, 1)[0].float()  # (B', D, x, y, z)
        outputs = given.new_zeros(len(hu), *given.shape[1:])
        outputs[seen] = given
        return outputs

    batches = count_batches(in_patches.shape[2:], windows)
    with progress(batches, "window", shows_progress) as bar:
        found = stitch(outputs_of, in_patches, windows, torch.device(device)).cpu().numpy()  # (D + heads, x, y, z)
    # What a position stands for lies around it, and its patch may begin there
    before = np.ceil((patch - 1) / 2 - encoder.first_position).astype(int)
    around = np.pad(images.voxels_of(working), [(n, 0) for n in before], mode="edge") if before.any() else None
    around = in_patches if around is None else _by_patches(around, patch)[:, :, *map(slice, found.shape[1:])]
    tissue = (around[0].mean(0) >= AIR_BELOW).numpy()
    found *= tissue
    return ScanMaps(
        found[: len(found) - heads],
        found[len(found) - heads :] if heads else None,
        tissue,
        patch_grid(grid_of(working), patch, encoder.first_position, tissue.shape),
    )


def _by_patches(voxels: np.ndarray, patch: np.ndarray) -> Tensor:
    """(1, px * py * pz, x, y, z) float32 of (X, Y, Z) HU: patches as positions, so that windows begin and end with
    them. The last ones are filled up with air."""
    counts = -(-np.array(voxels.shape) // patch)  # rounded up
    filled = np.full(counts * patch, AIR, np.float32)
    filled[tuple(map(slice, voxels.shape))] = voxels
    x = torch.from_numpy(filled)
    for axis in (2, 1, 0):
        x = x.unflatten(axis, (-1, int(patch[axis])))  # in the end (x, px, y, py, z, pz)
    return x.permute(1, 3, 5, 0, 2, 4).flatten(0, 2)[None]


def patch_grid(grid: Grid, patch: Sequence[int] | np.ndarray, first: Sequence[float], counts: Sequence[int]) -> Grid:
    """The Grid of the patches of `patch` (3,) voxels over a Grid, `counts` (3,) along its axes; `first` (3,): the voxel
    that the first one's middle lies at."""
    middle = grid.affine @ [*first, 1]
    spacing = tuple((np.array(grid.spacing) * patch).tolist())
    return grid._replace(size=tuple(int(n) for n in counts), spacing=spacing, origin=tuple(middle[:3].tolist()))


# ------------------------------------------------------------------------------------------------- principal components


def principal_components(features: np.ndarray, count: int = 3) -> Components:
    """The first Components of features (N, D), computed in float64.

    Eigenvectors have no sign of their own: the entry of each that is largest in size is made positive.
    Raises ValueError for fewer than 2 features.
    """
    if len(features) < 2:
        raise ValueError(f"principal components of {len(features)} patches: at least 2 are needed")
    mean = features.mean(0, dtype=np.float64)
    covariance = np.zeros((features.shape[1],) * 2)
    for first in range(0, len(features), 1 << 14):  # a copy in float64 of all of them might not fit
        part = features[first : first + (1 << 14)] - mean
        covariance += part.T @ part
    variances, vectors = np.linalg.eigh(covariance / (len(features) - 1))  # ascending
    vectors = vectors[:, ::-1][:, :count]
    vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    share = variances[::-1][:count] / max(variances.sum(), np.finfo(float).tiny)
    low, high = np.percentile((features - mean) @ vectors, SHOWN, axis=0)
    return Components(mean, vectors, share, low, high)


def component_maps(features: np.ndarray, components: Components) -> np.ndarray:
    """(K, x, y, z) float32 of features (D, x, y, z) along principal components, 0 at their `low` and 1 at their
    `high`."""
    flat = features.reshape(len(features), -1)
    offset = components.mean @ components.vectors  # (K,)
    found = components.vectors.T.astype(np.float32) @ flat - offset[:, None].astype(np.float32)
    width = np.maximum(components.high - components.low, 1e-12)
    found = (found - components.low[:, None]) / width[:, None]
    return found.astype(np.float32).reshape(-1, *features.shape[1:])


# ----------------------------------------------------------------------------------------------------------- similarity


def voxel_at(image: sitk.Image, point: Sequence[float], source: str) -> tuple[int, ...]:
    """(3,) the voxel of an image that a point in LPS mm lies in. Raises DataError for one outside.

    source: what to call the point in an error
    """
    index = np.rint(resampling.index_inside(image, point, source))
    return tuple(np.clip(index, 0, np.array(image.GetSize()) - 1).astype(int).tolist())


def patch_at(maps: ScanMaps, point: Sequence[float]) -> tuple[int, ...]:
    """(3,) the patch that a point in LPS mm lies in; of a point beyond them the nearest one."""
    index = np.linalg.solve(maps.grid.affine, [*point, 1])[:3]
    return tuple(np.clip(np.rint(index), 0, np.array(maps.grid.size) - 1).astype(int).tolist())


def similarity(maps: ScanMaps, point: Sequence[float]) -> np.ndarray:
    """(x, y, z) float32 cosine similarity of each patch's features to those of the patch that a point in LPS mm lies
    in, from -1 to 1; 0 in air."""
    patch = patch_at(maps, point)
    flat = maps.features.reshape(len(maps.features), -1)
    lengths = np.linalg.norm(flat, axis=0).reshape(maps.grid.size)
    chosen = maps.features[(slice(None), *patch)]
    found = (chosen @ flat).reshape(maps.grid.size) / np.maximum(lengths * lengths[patch], 1e-12)
    return np.clip(found, -1, 1).astype(np.float32)
