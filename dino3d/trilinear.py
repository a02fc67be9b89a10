"""Views of a patch on CPUs, by plain operations on long rows: torch's grid_sample goes voxel by voxel there.

Axes: (X, Y, Z); positions are voxel indices in that order, and those outside repeat the border.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dino3d.bspline import Lattice

WHOLE = 1e-4  # voxels: positions this close to whole ones are those, but for the rounding of control points
POSITIONS_AT_ONCE = 2**17  # what is done with them one after another stays in the cache


def sample_views(patch: Tensor, control: Tensor, lattice: Lattice) -> Tensor:
    """(N, x, y, z) views by linear interpolation, of the control points' type: cut out where their voxels are the
    patch's, axis by axis where they are not turned.

    patch: (X, Y, Z) of any type; control: (N, gx, gy, gz, 3)
    """
    views = control.new_empty(len(control), *lattice.size)
    # Batches lie in memory as files do, x fastest: what is neighbours there is done one after the other
    order = sorted(range(3), key=patch.stride, reverse=True)
    axes = [0, *(axis + 1 for axis in order)]
    patch, control, out = patch.permute(order), control.permute(*axes, 4)[..., order], views.permute(axes)
    weights = [lattice.weights(axis) for axis in order]
    straight = are_straight(control)
    for view in straight.nonzero()[:, 0].tolist():
        along = [of_axis @ line for of_axis, line in zip(weights, lines_of(control[view].double().numpy()))]
        out[view] = sample_axes(patch, along, views.dtype)
    _sample_anywhere(patch.contiguous(), control, weights, (~straight).nonzero()[:, 0], out)
    return views


def lines_of(control: Tensor | np.ndarray) -> list[Tensor | np.ndarray]:
    """Three (..., g) lines, of x along the first axis, y along the second and z along the third; control: (..., 3)."""
    return [control[..., :, 0, 0, 0], control[..., 0, :, 0, 1], control[..., 0, 0, :, 2]]


def are_straight(control: Tensor) -> Tensor:
    """(N,) bool: views whose axes are the patch's, neither turned nor bent. control: (N, gx, gy, gz, 3)"""
    x, y, z = lines_of(control)
    lines = x[:, :, None, None], y[:, None, :, None], z[:, None, None, :]
    same = [(control[..., axis] == line).flatten(1).all(1) for axis, line in enumerate(lines)]
    return torch.stack(same).all(0)


def sample_axes(patch: Tensor, along: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """(x, y, z) of a patch (X, Y, Z) at the positions that three (n,) arrays name along its axes."""
    mirrored, between = [], []
    for axis, (at, size) in enumerate(zip(along, patch.shape)):
        at = at.clip(0, size - 1)
        nearest = np.rint(at).astype(int)
        low, high = int(nearest.min()), int(nearest.max())
        if high - low == len(at) - 1 and np.abs(at - nearest).max() < WHOLE:  # every voxel from low to high
            mirrored += [axis] * bool(nearest[0] > nearest[-1])
        else:
            low, high = int(at.min()), min(int(at.max()) + 1, size - 1)
            between.append((axis, at - low))
        patch = patch.narrow(axis, low, high - low + 1)
    patch = patch.to(dtype)
    for axis, at in between[::-1]:  # the longest rows first
        low = np.floor(at).astype(int).clip(0, max(patch.shape[axis] - 2, 0))
        share = torch.from_numpy(at - low).to(dtype).view([-1 if one == axis else 1 for one in range(3)])
        low, high = torch.from_numpy(low), torch.from_numpy((low + 1).clip(max=patch.shape[axis] - 1))
        patch = patch.index_select(axis, low).lerp_(patch.index_select(axis, high), share)
    return patch.flip(mirrored) if mirrored else patch


def _sample_anywhere(
    patch: Tensor, control: Tensor, weights: Sequence[np.ndarray], chosen: Tensor, views: Tensor
) -> None:
    """Write the `chosen` of the views, several small ones or slabs of a large one at a time. weights: of each axis"""
    x, y, z = views.shape[1:]
    wx, wy, wz = (torch.from_numpy(of_axis).to(control.dtype) for of_axis in weights)
    number = max(1, POSITIONS_AT_ONCE // (x * y * z))
    rows = max(1, POSITIONS_AT_ONCE // (number * y * z))
    for some in chosen.split(number):
        moved = control[some].permute(4, 0, 1, 2, 3)  # (3, n, gx, gy, gz)
        for row in range(0, x, rows):
            at = torch.einsum("xi,anijk->anxjk", wx[row : row + rows], moved)
            views[some, row : row + rows] = trilinear(patch, (wy @ at) @ wz.T)  # at (3, n, rows, y, z)


def trilinear(patch: Tensor, at: Tensor) -> Tensor:
    """(...) values of a contiguous patch (X, Y, Z) at positions `at`, (3, ...), which is written to; of its type."""
    flat, shape, whole = patch.reshape(-1), patch.shape, torch.int32 if patch.numel() < 2**31 else torch.int64
    steps = [step if size > 1 else 0 for size, step in zip(shape, (shape[1] * shape[2], shape[2], 1))]
    corners = []
    for one, size in zip(at, shape):
        corners.append(one.clamp_(0, size - 1).floor().clamp_(max=max(size - 2, 0)))
        one.sub_(corners[-1])
    # Floats tell all rows apart, but not all voxels of a large patch
    row = corners[0].mul_(shape[1]).add_(corners[1]).to(whole)
    index = row.mul_(shape[2]).add_(corners[2].to(whole)).reshape(-1)
    share_x, share_y, share_z = (one.reshape(-1) for one in at)

    def along_z(offset: int) -> Tensor:
        low, high = (flat[first:].index_select(0, index).to(at.dtype) for first in (offset, offset + steps[2]))
        return low.lerp_(high, share_z)

    def along_y(offset: int) -> Tensor:
        return along_z(offset).lerp_(along_z(offset + steps[1]), share_y)

    return along_y(0).lerp_(along_y(steps[0]), share_x).reshape(at.shape[1:])
