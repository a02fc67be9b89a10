"""One vector for each window: which of an encoder's tokens it is made of."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vision_transformer import Encoder

POOLS = ("cls", "mean", "centre", "cls+mean", "cls+centre")
ORIENTATIONS = (1, 8, 48)


def embed(encoder: Encoder, volumes: Tensor, pool: str = "cls", layers: int = 1) -> Tensor:
    """(B, F) embeddings of volumes (B, 1, X, Y, Z) with values in [0, 1], of a ViT each after the final norm.

    pool: cls: the class tokens of the last `layers` blocks; mean: the means of their patch tokens; centre: the means of
        their patch tokens around the middle of the volume, see `centre_of`; cls+mean, cls+centre: those class tokens
        and the mean, or the centre, of the last block's patch tokens (Caron 2021, linear evaluation, has cls+mean).
        Without class tokens cls is what mean is, and cls+mean would be the same twice
    Blocks come shallowest first. Raises ValueError for another pool, and for more layers than the encoder has blocks.
    """
    if problem := pool_problem(encoder, pool):
        raise ValueError(f"pool is {pool}; {problem}")
    if pool == "cls" and layers == 1:
        return encoder(volumes)  # (B, D); spares the last block what nothing would read
    if pool in ("mean", "centre"):
        maps = encoder.get_intermediate_layers(volumes, layers, True)
        blocks = range(len(encoder.blocks) - layers, len(encoder.blocks))
        return torch.cat([pool_map(encoder, k, one, volumes.shape[2:], pool) for k, one in zip(blocks, maps)], 1)
    found = encoder.embeddings_and_maps(volumes, layers)  # of each ((B, D), (B, D, x, y, z))
    parts = [embedding for embedding, _ in found]
    if of_map := pool.partition("+")[2]:
        parts.append(pool_map(encoder, len(encoder.blocks) - 1, found[-1][1], volumes.shape[2:], of_map))
    return torch.cat(parts, 1)


def pool_map(encoder: Encoder, block: int, map_: Tensor, size: Sequence[int], pool: str) -> Tensor:
    """(B, D) mean or centre of a block's feature map (B, D, x, y, z) of volumes of (X, Y, Z) voxels."""
    if pool == "centre":
        _, stride = map_form(encoder, block)
        map_ = map_[(..., *centre_of(encoder.first_position, stride, size, map_.shape[2:]))]
    return map_.flatten(2).mean(2)


def map_form(encoder: Encoder, block: int) -> tuple[int, Sequence[int]]:
    """(channels, (3,) voxels between two positions) of a block's feature map."""
    stages = [(stage.channels, stage.stride) for stage in encoder.stages if block <= stage.block]
    return stages[0] if stages else (encoder.embed_dim, encoder.patch_size)


def centre_of(
    first_position: Sequence[float], stride: Sequence[int], size: Sequence[int], grid: Sequence[int]
) -> tuple[slice, ...]:
    """The positions of a map nearest to the middle of a volume: along each axis one, or the two that are equally near.

    first_position: (3,) voxel at the middle of the first one; stride: (3,) voxels from one to the next; size: (X, Y, Z)
        voxels of the volume; grid: (x, y, z) positions of the map
    """
    places = []
    for first, step, voxels, count in zip(first_position, stride, size, grid):
        off = [abs(first + i * step - (voxels - 1) / 2) for i in range(count)]
        nearest = [i for i, one in enumerate(off) if one == min(off)]  # halves, which floats hold exactly
        places.append(slice(nearest[0], nearest[-1] + 1))
    return tuple(places)


def pool_of(config: Mapping[str, Any]) -> str:
    """What the head of a fine-tuned classifier reads: older runs, whose config does not say, the class token."""
    return config.get("pool") or "cls"


def reads_centre(pool: str) -> bool:
    return pool.endswith("centre")


def pool_problem(encoder: Encoder, pool: str) -> str:
    """Why an encoder has no such `embed`, or ""."""
    if pool not in POOLS:
        return f"expected one of {', '.join(POOLS)}"
    if pool == "cls+mean" and not encoder.has_class_token:
        return "the encoder has no class token, its embedding is the mean of its last map: both would be the same"
    return ""


def embedding_width(encoder: Encoder, pool: str, layers: int = 1) -> int:
    """F of `embed`."""
    depth = len(encoder.blocks)
    widths = [map_form(encoder, block)[0] for block in range(depth - layers, depth)]
    return sum(widths) + ("+" in pool) * encoder.embed_dim


def orientations(volumes: Tensor, count: int) -> list[Tensor]:
    """Volumes (B, C, X, Y, Z) as they are (count 1), in all 8 ways to mirror their axes, or turned too, in all 48 ways
    that a cube can be, of which X = Y = Z is required. Raises ValueError for another count."""
    if count not in ORIENTATIONS:
        raise ValueError(f"tta is {count}; expected one of {', '.join(map(str, ORIENTATIONS))}")
    if count == 1:
        return [volumes]
    axes = itertools.permutations((2, 3, 4)) if count == 48 else [(2, 3, 4)]
    mirrored = [[a for a in (2, 3, 4) if n >> (a - 2) & 1] for n in range(8)]
    return [volumes.permute(0, 1, *order).flip(flipped) for order in axes for flipped in mirrored]


def orientation_problem(size: Sequence[int], spacing: Sequence[float] | None, count: int) -> str:
    """Why windows of (3,) voxels of (3,) mm have no so many `orientations`, or ""."""
    if count == 48 and (len({*size}) > 1 or spacing is not None and len({*spacing}) > 1):
        return "turns windows, which must be cubes for that, in voxels and mm"
    return ""
