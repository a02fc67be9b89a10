"""Cubic B-splines that carry a view's geometry: a small lattice of positions, expanded at the view's own voxels.

Axes: (X, Y, Z); positions are voxel indices in that order.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

SPANS = 4  # spline spans along a global view that is bent: longer ones bend it further, without folds


class Lattice:
    """The control points of the splines that carry views of `size` voxels: one every `spacing` voxels, per axis."""

    def __init__(self, size: Sequence[int], spacing: ArrayLike) -> None:
        self.size = tuple(size)
        self.spacing = np.asarray(spacing, float)
        self.shape = tuple(int((n - 1) // h) + 4 for n, h in zip(self.size, self.spacing))
        axes = [(np.arange(g) - 1) * h for g, h in zip(self.shape, self.spacing)]
        self.points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)  # (gx, gy, gz, 3) in the view's voxels
        self._expansions, self._weights, self._hulls = {}, {}, None

    @classmethod
    def for_views(cls, size: Sequence[int], policy: Any, reference: Sequence[int] | None = None) -> "Lattice":
        """SPANS per axis of `reference` (default: size) where a policy bends space; one where maps are affine."""
        reference = np.asarray(reference if policy.has_elastic and reference is not None else size, float)
        return cls(size, reference / (SPANS if policy.has_elastic else 1))

    def control(
        self,
        matrix: ArrayLike,
        centre: ArrayLike,
        displacements: np.ndarray,
        view_spacing: float | np.ndarray = 1.0,
        patch_spacing: float | np.ndarray = 1.0,
    ) -> np.ndarray:
        """(..., gx, gy, gz, 3) patch positions of the control points of one view or, with leading axes, of many.

        matrix: (..., 3, 3), acts about the view's centre, in voxels or, with spacings in mm, in millimetres
        centre: (..., 3) patch position of the view's centre, in the patch's voxels
        displacements: (..., gx, gy, gz, 3), see `elastic_moves`
        view_spacing, patch_spacing: one number or (..., 3)
        """
        centre, view_spacing, patch_spacing = (
            np.atleast_1d(values)[..., None, None, None, :] for values in (centre, view_spacing, patch_spacing)
        )
        matrix = np.swapaxes(matrix, -1, -2)[..., None, None, :, :]
        offsets = self.points + displacements * self.spacing - (np.asarray(self.size) - 1) / 2
        return centre + (offsets * view_spacing) @ matrix / patch_spacing

    def weights(self, axis: int, at: ArrayLike | None = None) -> np.ndarray:
        """(n, g) weight of each control point at the positions `at` (default: every voxel) along an axis."""
        if at is None:
            if axis not in self._weights:
                self._weights[axis] = self.weights(axis, np.arange(self.size[axis]))
            return self._weights[axis]
        t = np.abs(np.asarray(at)[:, None] / self.spacing[axis] - (np.arange(self.shape[axis]) - 1))
        return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0))

    def hull(self, axis: int) -> np.ndarray:
        """(n, g) weights of the control points in points whose convex hull holds a view along an axis: the control
        points of the Bezier curves that a spline consists of, the last of which is cut where the view ends."""
        to_bezier = np.array([[1, 4, 1, 0], [0, 4, 2, 0], [0, 2, 4, 0], [0, 1, 4, 1]]) / 6
        points = np.zeros((4 * (self.shape[axis] - 3), self.shape[axis]))
        for span in range(self.shape[axis] - 3):
            end = min(1.0, (self.size[axis] - 1) / self.spacing[axis] - span)
            cut = [[math.comb(i, j) * (1 - end) ** max(i - j, 0) * end**j for j in range(4)] for i in range(4)]
            points[4 * span : 4 * span + 4, span : span + 4] = cut @ to_bezier  # de Casteljau
        return points

    def reach(self, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest), (3,) each: between which all positions of views lie. control: (N, gx, gy, gz, 3)"""
        if self._hulls is None:
            self._hulls = [self.hull(axis) for axis in range(3)]
        points = np.moveaxis(control, -1, 0)  # (3, N, gx, gy, gz)
        for axis, hull in enumerate(self._hulls, 2):
            points = np.moveaxis(np.tensordot(points, hull, ([axis], [1])), -1, axis)
        points = points.reshape(3, -1)
        return points.min(1), points.max(1)

    def expansion(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """The weights of the three axes as tensors: (x, gx), (y, gy) and (gz 3, z 3), made once per type and device.

        The last keeps the three components of a position side by side, the layout that grid_sample reads.
        """
        if (dtype, device) not in self._expansions:
            wx, wy, wz = (self.weights(axis) for axis in range(3))
            self._expansions[dtype, device] = [
                torch.tensor(w, dtype=dtype, device=device) for w in (wx, wy, np.kron(wz.T, np.eye(3)))
            ]
        return self._expansions[dtype, device]


def sampling_grid(control: Tensor, lattice: Lattice) -> Tensor:
    """Expand control points to one patch position for every voxel of the view.

    control: (N, gx, gy, gz, 3) tensor; returns (N, x, y, z, 3).
    """
    rows, wz = sampling_rows(control, lattice), lattice.expansion(control.dtype, control.device)[2]
    return (rows.flatten(0, 2).flatten(1) @ wz).reshape(len(control), *lattice.size, 3)


def sampling_rows(control: Tensor, lattice: Lattice) -> Tensor:
    """The same along x and y alone: (N, x, y, gz, 3)."""
    views, gx, gy, gz, _ = control.shape
    x, y, _ = lattice.size
    wx, wy, _ = lattice.expansion(control.dtype, control.device)
    grid = wx @ control.reshape(views, gx, gy * gz * 3)  # (N, x, gy gz 3)
    grid = wy @ grid.reshape(views * x, gy, gz * 3)  # (N x, y, gz 3)
    return grid.reshape(views, x, y, gz, 3)


def warp(patch: Tensor, control: Tensor, lattice: Lattice, mode: str = "bilinear") -> Tensor:
    """Views of `patch`, each seen through its own control points; positions outside repeat the border.

    patch: (B, C, X, Y, Z); control: (B, gx, gy, gz, 3) in voxels; returns (B, C, x, y, z).
    """
    # grid_sample expects -1 .. 1 between the centres of the first and the last voxel, and the fastest axis first. Axis
    # by axis, as a tensor of the patch's shape would be a copy to the GPU, which the host waits for
    x, y, z = (at * (2 / max(n - 1, 1)) - 1 for at, n in zip(control.unbind(-1), patch.shape[2:]))
    grid = sampling_grid(torch.stack([z, y, x], -1), lattice)
    return F.grid_sample(patch, grid, mode=mode, padding_mode="border", align_corners=True)


def draw_angles(rng: np.random.RandomState, degrees: float) -> np.ndarray:
    """(3,) radians about x, y and z."""
    return np.radians(rng.uniform(-degrees, degrees, 3))


def draw_factors(rng: np.random.RandomState, amount: float) -> np.ndarray:
    """(3,) factors, one along each axis."""
    return rng.uniform(1 - amount, 1 + amount, 3)


def rotation_matrix(angles: np.ndarray) -> np.ndarray:
    """(..., 3, 3) rotations about x, then the turned y, then the turned z; angles: (..., 3) radians."""
    cosines, sines = np.cos(angles), np.sin(angles)
    turns = []
    for axis, (one, other) in enumerate(((1, 2), (2, 0), (0, 1))):
        turn = np.zeros((*np.shape(angles), 3))
        turn[..., axis, axis] = 1
        turn[..., one, one] = turn[..., other, other] = cosines[..., axis]
        turn[..., one, other], turn[..., other, one] = -sines[..., axis], sines[..., axis]
        turns.append(turn)
    return turns[0] @ turns[1] @ turns[2]


def scale_matrix(factors: np.ndarray) -> np.ndarray:
    """(..., 3, 3) that scale the axes by (..., 3) factors."""
    return np.where(np.eye(3, dtype=bool), np.asarray(factors)[..., None], 0.0)


def draw_axis(rng: np.random.RandomState, _: int) -> int:
    """The axis to mirror."""
    return rng.randint(3)


def mirror_matrix(axis: ArrayLike) -> np.ndarray:
    """(..., 3, 3) that mirror one axis each; axis: (...)."""
    return scale_matrix(np.where(np.arange(3) == np.asarray(axis)[..., None], -1.0, 1.0))


def draw_elastic(rng: np.random.RandomState, limit: float) -> tuple[float, int]:
    """(largest displacement, seed of the displacements' own generator: how many there are depends on the lattice)."""
    return rng.uniform(0, limit), rng.randint(2**31)


def elastic_moves(drawn: tuple[float, int], lattice: tuple[int, ...]) -> np.ndarray:
    """(gx, gy, gz, 3) displacement of each control point in control point spacings. lattice: (gx, gy, gz).

    A cubic B-spline map is one-to-one, its Jacobian positive everywhere, if no control point moves by 1 / 2.479
    of the spacing or more along any axis (Choi and Lee, Graphical Models 2000, for three dimensions).
    """
    largest, seed = drawn
    return largest * np.random.RandomState(np.random.PCG64(seed)).uniform(-1, 1, (*lattice, 3))


def enclosing_patch(controls: np.ndarray, lattice: Lattice, core: Sequence[int], points: int) -> tuple[int, ...]:
    """(3,) the smallest patch around a core, its axes cut at one common quantile, such that fewer than 5 % of views see
    more than 1 % outside it.

    controls: (views, gx, gy, gz, 3) positions in the core; points: along each axis at which a view is looked at
    """
    # Voxels, closer to each other towards the ends, where views spill first, and the share that each stands for
    at = [np.unique(np.rint((1 - np.cos(np.linspace(0, np.pi, points))) / 2 * (n - 1))) for n in lattice.size]
    share = [np.diff(np.concatenate([[-0.5], (a[1:] + a[:-1]) / 2, [n - 0.5]])) / n for a, n in zip(at, lattice.size)]
    share = np.einsum("x,y,z->xyz", *share).ravel()
    wx, wy, wz = (lattice.weights(axis, at[axis]) for axis in range(3))
    reach = np.einsum("xi,yj,zk,nijkc->nxyzc", wx, wy, wz, controls, optimize=True)
    reach = np.abs(reach.reshape(len(controls), -1, 3) - (np.array(core) - 1) / 2)  # (views, points, 3) from centre
    reach = reach.round(6)  # a view that ends with the core does not spill
    furthest = np.quantile(reach, 0.995, axis=1)  # (views, 3)
    low, high = 0.5, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        half = np.quantile(furthest, middle, axis=0)
        spills = (reach > half).any(2) @ share > 0.01  # the ends stand for neighbours too: too many, if anything
        low, high = (low, middle) if spills.mean() < 0.05 else (middle, high)
    half = np.quantile(furthest, high, axis=0)
    # An even difference from the core keeps it in the middle, whole voxels from either side
    return tuple(int(c + 2 * max(0, math.ceil((2 * h + 1 - c) / 2))) for h, c in zip(half, core))
