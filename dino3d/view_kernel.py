"""Views on a GPU in one Triton kernel, from stored patches to [0, 1]: neither positions nor patches in single precision
stand in memory. The plain way is `augmentations.render_views`. To import this needs Triton.

Axes: (X, Y, Z); positions are voxel indices in that order, and those outside repeat the border.
"""

# ruff: noqa: ANN001  Triton takes annotations of a kernel's arguments for types of its own

import triton
import triton.language as tl
from torch import Tensor

SIDES = (8, 8, 8)  # of the box of a view that a program makes: what it reads lies close together however it is turned


def write_views(
    views: Tensor, patches: Tensor, which: Tensor, rows: Tensor, weights: Tensor, ranges: Tensor, clips: bool
) -> None:
    """Write some of the views (V B, x, y, z), contiguous, in single precision; the first view of all patches comes
    first.

    patches: (B, X, Y, Z) HU of any type and layout; which: (n,) int64, the views to write
    rows: (n, x, y, gz, 3) positions along the control points of z, see `bspline.sampling_rows`; weights: (gz, z) theirs
    ranges: (V B, 2) HU that become 0 and 1 in each view; clips: whether voxels are clipped to them before they are
        interpolated
    """
    boxes = [-(-size // side) for size, side in zip(views.shape[1:], SIDES)]
    _make_views[boxes[0] * boxes[1] * boxes[2], len(which)](
        views,
        patches,
        which,
        rows.contiguous(),
        weights,
        ranges.contiguous(),
        *patches.shape,
        *patches.stride(),
        *weights.stride(),
        *views.shape[1:],
        len(weights),
        clips,
        *SIDES,
    )


@triton.jit
def _make_views(
    views,
    patches,
    which,
    rows,
    weights,
    ranges,
    number,
    patch_x,
    patch_y,
    patch_z,
    step_patch,
    step_x,
    step_y,
    step_z,
    step_point,
    step_weight,
    size_x,
    size_y,
    size_z,
    points: tl.constexpr,
    clips: tl.constexpr,
    side_x: tl.constexpr,
    side_y: tl.constexpr,
    side_z: tl.constexpr,
):
    """One box of one view: the arguments of `write_views`, then shapes and strides."""
    box, entry = tl.program_id(0), tl.program_id(1).to(tl.int64)
    view = tl.load(which + entry)
    boxes_y, boxes_z = (size_y + side_y - 1) // side_y, (size_z + side_z - 1) // side_z
    lane = tl.arange(0, side_x * side_y * side_z)
    x = box // (boxes_y * boxes_z) * side_x + lane // (side_y * side_z)
    y = box // boxes_z % boxes_y * side_y + lane // side_z % side_y
    z = box % boxes_z * side_z + lane % side_z
    inside = (x < size_x) & (y < size_y) & (z < size_z)

    row = rows + ((entry * size_x + x) * size_y + y) * points * 3
    at_x = tl.full((side_x * side_y * side_z,), 0.0, tl.float32)
    at_y, at_z = at_x, at_x
    for point in tl.static_range(points):
        weight = tl.load(weights + point * step_point + z * step_weight, mask=inside, other=0.0)
        at_x += weight * tl.load(row + 3 * point, mask=inside, other=0.0)
        at_y += weight * tl.load(row + 3 * point + 1, mask=inside, other=0.0)
        at_z += weight * tl.load(row + 3 * point + 2, mask=inside, other=0.0)

    x0, next_x, share_x = _neighbours(at_x, patch_x)
    y0, next_y, share_y = _neighbours(at_y, patch_y)
    z0, next_z, share_z = _neighbours(at_z, patch_z)
    first = patches + view % number * step_patch + x0 * step_x + y0 * step_y + z0 * step_z
    next_x, next_y, next_z = next_x * step_x, next_y * step_y, next_z * step_z
    low, high = tl.load(ranges + 2 * view), tl.load(ranges + 2 * view + 1)
    near_near = _line(first, next_z, share_z, low, high, inside, clips)
    near_far = _line(first + next_y, next_z, share_z, low, high, inside, clips)
    far_near = _line(first + next_x, next_z, share_z, low, high, inside, clips)
    far_far = _line(first + next_x + next_y, next_z, share_z, low, high, inside, clips)
    near, far = near_near + share_y * (near_far - near_near), far_near + share_y * (far_far - far_near)
    grey = (near + share_x * (far - near) - low) / (high - low)
    out = views + ((view * size_x + x) * size_y + y) * size_z + z
    tl.store(out, tl.minimum(tl.maximum(grey, 0.0), 1.0), mask=inside)


@triton.jit
def _neighbours(at, size):
    """First of the two voxels that a position lies between, 1 or at the border 0 to the second, and its share."""
    at = tl.minimum(tl.maximum(at, 0.0), size - 1.0)
    low = at.to(tl.int32)
    return low, tl.where(low + 1 < size, 1, 0), at - low.to(tl.float32)


@triton.jit
def _line(voxel, step, share, low, high, inside, clips: tl.constexpr):
    """Between a voxel and the next one along z."""
    near, far = _clipped(voxel, low, high, inside, clips), _clipped(voxel + step, low, high, inside, clips)
    return near + share * (far - near)


@triton.jit
def _clipped(voxel, low, high, inside, clips: tl.constexpr):
    grey = tl.load(voxel, mask=inside, other=0).to(tl.float32)
    if clips:
        grey = tl.minimum(tl.maximum(grey, low), high)
    return grey
