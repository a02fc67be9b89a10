"""Grey values of patches and views, on any device: from Hounsfield units, averaged, smoothed, shifted.

Batches are (N, C, X, Y, Z), or (B, C, X, Y, Z) for patches.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# HU that become 0 and 1: as radiologists look at the lung (centre -600, width 1500) and at soft tissue (40, 400), and
# the paper's clip range
WINDOWS = {"lung": (-1350, 150), "mediastinum": (-160, 240), "wide": (-1000, 1000)}
VALUES_AT_ONCE = 2**16  # on CPUs, so that they stay in the cache


def scale_intensity(volume: Tensor, low: float, high: float) -> Tensor:
    """Hounsfield units to [0, 1]: low (HU) and below become 0, high and above 1. Any shape; the default float type."""
    return (volume.to(torch.get_default_dtype()) - low).div_(high - low).clamp_(0, 1)


def averaging_blocks(steps: np.ndarray) -> tuple[int, ...]:
    """(3,) voxels to average along each axis before sampling every so many: below one and a half none, which linear
    interpolation does not alias by much."""
    return tuple(np.where(steps > 1.5, np.rint(steps), 1).astype(int).tolist())


def average_blocks(patches: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Mean over blocks of voxels. patches: (B, C, X, Y, Z) floats; returns (B, C, ceil(X / kx) + 2, ...).

    One block is added at either end, where the border repeats, so that what lies beyond a patch is what it would be
    without averaging. Position p of the patch is (p + 0.5) / k + 0.5 of the result.
    """
    sides = [(k, k + -n % k) for n, k in zip(patches.shape[2:], blocks)]
    padded = F.pad(patches, [side for pair in sides[::-1] for side in pair], mode="replicate")
    return F.avg_pool3d(padded, blocks)


def draw_window(rng: np.random.RandomState, _: int) -> np.ndarray:
    """(2,) HU that become 0 and 1, of one of WINDOWS."""
    return np.array(list(WINDOWS.values())[rng.randint(len(WINDOWS))], float)


def show_window(views: Tensor, ranges: Tensor) -> Tensor:
    """[0, 1] of views in HU. views: (N, C, X, Y, Z); ranges: (N, 2) HU that become 0 and 1 in each."""
    low, high = ranges.to(views.dtype)[..., None, None, None, None].unbind(1)  # (N, 1, 1, 1, 1)
    return ((views - low) / (high - low)).clamp(0, 1)


def draw_sigma(rng: np.random.RandomState, limit: float) -> np.ndarray:
    """(3,) standard deviations in voxels."""
    return rng.uniform(0, limit, 3)


def gaussian_smooth(views: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian smoothing, integrated over each voxel, with the border repeated outwards.

    views: (N, C, X, Y, Z); sigma: (N, 3) standard deviations in voxels, 0: no smoothing along that axis.
    Along each axis it is a product with the matrix of weights from every voxel to every other.
    """
    for axis, n in enumerate(views.shape[2:]):
        edges = torch.arange(1, n, dtype=views.dtype, device=views.device) - 0.5
        at = torch.arange(n, dtype=views.dtype, device=views.device)
        width = sigma[:, axis].to(views.dtype).clamp_min(1e-3)[:, None, None] * math.sqrt(2)
        below = 0.5 * (1 + torch.erf((edges - at[:, None]) / width))  # (N, n, n - 1): share of i's weight below edge j
        weights = F.pad(F.pad(below, (0, 1), value=1.0), (1, 0)).diff(dim=2)  # (N, n, n): from voxel j to voxel i
        shape = views.shape
        if axis == 2:
            views = (views.reshape(shape[0], -1, n) @ weights.mT).reshape(shape)
        else:
            columns = views.reshape(shape[0], math.prod(shape[1 : 2 + axis]), n, -1)  # (N, before, n, after the axis)
            views = (weights[:, None] @ columns).reshape(shape)
    return views


def draw_curve(rng: np.random.RandomState, points: int) -> np.ndarray:
    """(points,) non-decreasing curve from 0 to 1, drawn as MONAI's `RandHistogramShift` draws it."""
    curve = np.linspace(0, 1, max(points, 2)).tolist()
    for i, share in enumerate(rng.random_sample(len(curve) - 2), 1):  # what rng.uniform does, without its cost
        curve[i] = curve[i - 1] + (curve[i + 1] - curve[i - 1]) * share
    return np.array(curve)


def histogram_shift(views: Tensor, curve: Tensor) -> Tensor:
    """Map each view's grey values through a piecewise linear curve with equally spaced knots.

    views: (N, C, X, Y, Z); curve: (N, points) in [0, 1], relative to each view's own range; points: at least 2.
    """
    shape, knots = views.shape, curve.shape[1]
    views, curve = views.flatten(1), curve.to(views.dtype)
    low, high = views.aminmax(dim=1, keepdim=True)
    tiny = knots * torch.finfo(views.dtype).tiny  # knots times: a view of one value would give 0 * inf
    steepness = (knots - 1) / (high - low).clamp_min(tiny)
    curve = torch.addcmul(low, curve, high - low)  # (N, points) grey values at the knots
    if views.device.type != "cpu":
        return _through_curves(views, low, steepness, curve).reshape(shape)
    shifted = torch.empty_like(views)
    for view in range(len(views)):  # on CPUs in parts that stay in the cache
        one = slice(view, view + 1)
        for part, out in zip(views[one].split(VALUES_AT_ONCE, 1), shifted[one].split(VALUES_AT_ONCE, 1)):
            out.copy_(_through_curves(part, low[one], steepness[one], curve[one]))
    return shifted.reshape(shape)


def _through_curves(values: Tensor, low: Tensor, steepness: Tensor, curve: Tensor) -> Tensor:
    """(N, n) values of each of N curves, (N, points), whose knots lie 1 / steepness from each other, from low on.

    values: (N, n); low, steepness: (N, 1)
    """
    knots = curve.shape[1]
    t = (values - low).mul_(steepness)
    knot = t.floor().clamp_(0, max(knots - 2, 0))
    first = torch.arange(0, curve.numel(), knots, dtype=torch.int32, device=curve.device)[:, None]
    index = knot.nan_to_num().to(torch.int32).add_(first).flatten()
    curve, share = curve.flatten(), t.sub_(knot).flatten()
    return curve.index_select(0, index).lerp_(curve[1:].index_select(0, index), share).view_as(t)
