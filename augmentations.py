"""Multi-crop 3D augmentations for CT: drawn per sample in the loader's workers, applied per batch on any device.

Axes: volumes and crops are (X, Y, Z) in RAS, batches (B, C, X, Y, Z); positions are voxel indices in that order.

Rotation, scale, flip, elastic deformation and crop are one map from a view's voxels to the base patch. The map is
stored as the control points of a cubic B-spline: such a spline reproduces affine maps exactly, so a small lattice of
positions says everything about a view's geometry, and the device expands it at the view's own voxels only and
interpolates once. Gaussian smoothing and histogram shift follow on the view, with parameters of its own.

The table AUGMENTATIONS has a row for each augmentation; flags, policies, pictures and MONAI transforms follow from it.
The six and their ranges are those of "Evaluating Task-Specific Augmentations in Self-Supervised
Pre-Training for 3D Medical Image Analysis" (SPIE Medical Imaging 2024, doi 10.1117/12.3000850).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from dino3d.bspline import (  # noqa: F401  some are part of this module's interface
    SPANS,
    Lattice,
    elastic_moves,
    enclosing_patch,
    mirror_matrix,
    rotation_matrix,
    sampling_grid,
    warp,
)
from dino3d.command_line import boolean_flag

PATCH_VIEW = -1  # the key's view number for what belongs to the whole sample: where its base patch lies
MIN_IOU = 0.25  # of two global windows of a sample, before rotation and scale (the paper's rule)
MAX_BENT = 0.4  # elastic control points move by less than 1 / 2.479 of their spacing: no fold (see elastic_moves)


def keyed_rng(seed: int, epoch: int, sample: int, view: int) -> np.random.RandomState:
    """The random generator of one view (or, with view = PATCH_VIEW, of one sample) in one epoch.

    Equal keys give equal draws whatever process, worker or rank asks. All four are integers, view >= -1.
    """
    # view + 1, and not view: SeedSequence takes a missing word for 0, so (s, e, i) and (s, e, i, 0) are one seed
    return np.random.RandomState(np.random.PCG64(np.random.SeedSequence((seed, epoch, sample, view + 1))))


# ------------------------------------------------------------------------------- the augmentations: drawn and applied


def draw_angles(rng: np.random.RandomState, degrees: float) -> np.ndarray:
    """(3,) radians about x, y and z."""
    return np.radians(rng.uniform(-degrees, degrees, 3))


def draw_factors(rng: np.random.RandomState, amount: float) -> np.ndarray:
    """(3,) factors, one along each axis."""
    return rng.uniform(1 - amount, 1 + amount, 3)


def draw_axis(rng: np.random.RandomState, _: int) -> int:
    """The axis to mirror."""
    return rng.randint(3)


def draw_elastic(rng: np.random.RandomState, limit: float) -> tuple[float, int]:
    """(largest displacement, seed of the displacements' own generator: how many there are depends on the lattice)."""
    return rng.uniform(0, limit), rng.randint(2**31)


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
    curve = np.linspace(0, 1, max(points, 2))
    for i in range(1, len(curve) - 1):
        curve[i] = rng.uniform(curve[i - 1], curve[i + 1])
    return curve


def histogram_shift(views: Tensor, curve: Tensor) -> Tensor:
    """Map each view's grey values through a piecewise linear curve with equally spaced knots.

    views: (N, C, X, Y, Z); curve: (N, points) in [0, 1], relative to each view's own range.
    """
    views_shape, knots = views.shape, curve.shape[1]
    views, curve = views.flatten(1), curve.to(views.dtype)
    low, high = views.aminmax(dim=1, keepdim=True)
    tiny = knots * torch.finfo(views.dtype).tiny  # knots times: a view of one value would give 0 * inf
    t = (views - low) * ((knots - 1) / (high - low).clamp_min(tiny))
    # The knots are equally spaced: the curve is a sum of ramps, one from each knot on, without search or gather
    slopes = curve.diff(dim=1)
    bends = torch.cat([slopes[:, :1], slopes.diff(dim=1)], 1) * (high - low)
    shifted = torch.addcmul(low + curve[:, :1] * (high - low), t, bends[:, :1])
    for k in range(1, knots - 1):
        shifted.addcmul_((t - k).clamp_min_(0), bends[:, k : k + 1])
    return shifted.reshape(views_shape)


# ---------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Augmentation:
    """One augmentation: all that flags, policies, views, pictures and MONAI transforms know of it.

    strength: what its flag switches on; 0 of its type is off
    limits: (low, high) of strengths that make sense; 0 is always allowed and switches it off
    unit: what the strength is
    on: whether --use_<name> is on by default; help: of that flag
    kind: "affine", "deformation" or "intensity": what it acts on
    draw: (rng, strength) -> values, all that is random about it in one view; called whether it is on or not
    apply: affine:      values -> (3, 3) matrix from offsets in the view to offsets in the patch
           deformation: values, (gx, gy, gz) -> (gx, gy, gz, 3) displacements in control point spacings
           intensity:   (N, C, X, Y, Z) views, (N, ...) float32 tensor of their values -> views, on any device
    monai: name of its class in dino3d/monai_transforms.py; argument: what the strength is called there (None: fixed)
    """

    strength: float
    limits: tuple[float, float]
    unit: str
    on: bool
    help: str
    kind: str
    draw: Callable[[np.random.RandomState, Any], Any]
    apply: Callable[..., Any]
    monai: str
    argument: str | None


# A view's draws are made in this order. Affine maps are multiplied and intensities applied in it too. A new row goes to
# the end: its draws then come after the others', and runs begun before it keep theirs.
AUGMENTATIONS = {
    "rotation": Augmentation(
        strength=30.0,
        limits=(0, 180),
        unit="degrees, about each axis, drawn from [-rotation, rotation]",
        on=True,
        help="turn by up to 30 degrees about each axis",
        kind="affine",
        draw=draw_angles,
        apply=rotation_matrix,
        monai="RandRotation",
        argument="degrees",
    ),
    "scale": Augmentation(
        strength=0.25,
        limits=(0, 0.99),
        unit="relative, along each axis; 0.25 draws from [0.75, 1.25], more than 1 shows more of the patch",
        on=True,
        help="scale by up to 25 % along each axis",
        kind="affine",
        draw=draw_factors,
        apply=np.diag,
        monai="RandScale",
        argument="amount",
    ),
    "flip": Augmentation(
        strength=1,
        limits=(0, 1),
        unit="1 mirrors one axis, drawn at random",
        on=True,
        help="mirror one axis, drawn at random",
        kind="affine",
        draw=draw_axis,
        apply=mirror_matrix,
        monai="RandFlip",
        argument=None,
    ),
    "elastic": Augmentation(
        strength=MAX_BENT,
        limits=(0, MAX_BENT),
        unit="furthest that a control point moves along an axis, in control point spacings",
        on=False,
        help="bend space, without folds",
        kind="deformation",
        draw=draw_elastic,
        apply=elastic_moves,
        monai="RandElastic",
        argument="amount",
    ),
    "gaussian": Augmentation(
        strength=2.0,
        limits=(0, math.inf),
        unit="voxels, largest standard deviation along each axis",
        on=False,
        help="smooth with a sigma of up to 2 voxels along each axis",
        kind="intensity",
        draw=draw_sigma,
        apply=gaussian_smooth,
        monai="RandGaussianSmooth",
        argument="sigma",
    ),
    "histogram": Augmentation(
        strength=10,
        limits=(3, math.inf),
        unit="control points of the grey-value curve",
        on=False,
        help="shift grey values by a curve with 10 control points",
        kind="intensity",
        draw=draw_curve,
        apply=histogram_shift,
        monai="RandHistogramShift",
        argument="points",
    ),
}
# The paper's six and their strengths; rows after them are not the paper's
PAPER = {name: row.strength for name, row in itertools.islice(AUGMENTATIONS.items(), 6)}
AUGMENTATION_FLAGS = {f"use_{name}": name for name in AUGMENTATIONS}  # as argparse stores them


def add_augmentation_flags(group: Any) -> None:
    """--use_rotation and the others, to an argparse group."""
    for flag, name in AUGMENTATION_FLAGS.items():
        row = AUGMENTATIONS[name]
        boolean_flag(group, f"--{flag}", row.on, row.help.replace("%", "%%"))


FIELDS = [(name, type(row.strength), type(row.strength)(0)) for name, row in AUGMENTATIONS.items()]  # default: off


@dataclass(frozen=True)
class Policy(make_dataclass("Strengths", [*FIELDS, ("prob", float, 0.5)], frozen=True)):
    """Which augmentations are on and how strong: a strength for each row of AUGMENTATIONS, where 0 switches it off.

    prob: probability of each augmentation, for each view on its own
    """

    def __post_init__(self) -> None:
        for name, row in AUGMENTATIONS.items():
            value, (low, high) = getattr(self, name), row.limits
            if not (value == 0 or low <= value <= high):
                raise ValueError(f"{name} = {value}: must be 0 (off) or lie between {low} and {high} ({row.unit})")
        if not 0 <= self.prob <= 1:
            raise ValueError(f"prob = {self.prob}: must lie between 0 and 1")

    @property
    def on(self) -> list[str]:
        """Names of the augmentations that are on."""
        return [name for name in AUGMENTATIONS if getattr(self, name)]

    @property
    def has_elastic(self) -> bool:
        return any(AUGMENTATIONS[name].kind == "deformation" for name in self.on)

    @property
    def sequence(self) -> list[str]:
        """Names for `draw_points` where many views come from one generator, so that a new row's draws would shift the
        next view's: the paper's six in any case, later rows only where they are on."""
        return [name for name in AUGMENTATIONS if name in PAPER or name in self.on]

    def draw(
        self, rng: np.random.RandomState, lattice: tuple[int, ...], names: Iterable[str] = AUGMENTATIONS
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """(matrix, displacements, intensity) of one view: `Lattice.control` takes the first two.

        lattice: (gx, gy, gz) control points; names: whose draws are made, in the table's order
        matrix: (3, 3) from offsets in the view to offsets in the patch: rotation times scale times flip. The order and
                the signs are MONAI's `Affine(rotate_params, scale_params)`: intrinsic rotations about x, y, z.
        displacements: (gx, gy, gz, 3) displacements in control point spacings
        intensity: {name: values} of those that act on this view
        """
        matrix, displacements, intensity = np.eye(3), np.zeros((*lattice, 3)), {}
        for name in names:
            row, strength = AUGMENTATIONS[name], getattr(self, name)
            # Drawn whether it is on or not: switching one off leaves the others as they were
            acts, values = rng.rand() < self.prob, row.draw(rng, strength)
            if not (acts and strength):
                continue
            if row.kind == "affine":
                matrix = matrix @ row.apply(values)
            elif row.kind == "deformation":
                displacements = displacements + row.apply(values, lattice)
            else:
                intensity[name] = values
        return matrix, displacements, intensity


def paper_policy(names: Iterable[str]) -> Policy:
    """The Policy that has the augmentations of these names on, as strong as in AUGMENTATIONS."""
    return Policy(**{name: AUGMENTATIONS[name].strength for name in names})


# ------------------------------------------------------------------------------------------------------- multi-crop


class ViewParameters(NamedTuple):
    """All that is random about the N views of one size of a sample.

    control: (N, gx, gy, gz, 3) float32, the base-patch position in voxels at each control point of the view's spline
    intensity: N times {name: values}, the intensity augmentations that act on the view
    """

    control: np.ndarray
    intensity: list[dict[str, Any]]


class ViewBatch(NamedTuple):
    """All that is random about the N = V B views of one size of a batch: the first view of all samples comes first.

    control: (N, gx, gy, gz, 3) float32
    intensity: {name: (indices (n,), values (n, ...) float32)} of the views that each acts on, in the table's order.
               They are found on the CPU, so that the device works on those alone without the host waiting for it.
    """

    control: Tensor
    intensity: dict[str, tuple[Tensor, Tensor]]

    def to(self, device: torch.device | str) -> "ViewBatch":
        move = functools.partial(torch.Tensor.to, device=device, non_blocking=True)
        return ViewBatch(move(self.control), {name: tuple(map(move, pair)) for name, pair in self.intensity.items()})


class MultiCropAugmentation:
    """Global and local views of one base patch: where they lie, how large the patch must be, what is random.

    policy: Policy
    global_size, local_size: (3,) voxels of a view; local_number: how many local views (two views are global)
    spacing: (3,) mm per voxel of a view; None: a view's voxels are the volume's, whatever they measure
    min_iou: of two global windows before rotation and scale; 1: they lie in the middle of the patch

    core: (3,) the box that holds all unrotated windows, in which two global ones overlap by an IoU of min_iou
    patch_size: (3,) the core and a margin, so that fewer than 5 % of global views see more than 1 % outside it;
                both in voxels of a view
    """

    def __init__(
        self,
        policy: Policy,
        global_size: Sequence[int],
        local_size: Sequence[int],
        local_number: int,
        spacing: ArrayLike | None = None,
        min_iou: float = MIN_IOU,
    ) -> None:
        self.policy, self.local_number, self.spacing = policy, local_number, spacing
        self.global_size, self.local_size = tuple(global_size), tuple(local_size)
        # Two windows of size n shifted by f n along every axis: IoU = (1 - f)^3 / (2 - (1 - f)^3)
        max_shift = 1 - (2 * min_iou / (1 + min_iou)) ** (1 / 3)
        self.core = tuple(n + int(max_shift * n) for n in self.global_size)
        self.lattices = [
            Lattice.for_views(size, policy, self.global_size) for size in (self.global_size, self.local_size)
        ]
        self.patch_size = self._patch_size()

    def draw(
        self,
        seed: int,
        epoch: int,
        sample: int,
        patch_shape: Sequence[int] | None = None,
        patch_spacing: ArrayLike | None = None,
    ) -> list[ViewParameters | None]:
        """[global, local] ViewParameters of one sample; None where there are no local views.

        patch_shape: (3,) voxels of the patch that was read; default: patch_size
        patch_spacing: (3,) mm per voxel of it, needed where `spacing` is given
        """
        rngs = (keyed_rng(seed, epoch, sample, view) for view in itertools.count())
        shape, groups = self.patch_size if patch_shape is None else patch_shape, []
        for lattice, number in zip(self.lattices, (2, self.local_number)):
            if not number:
                groups.append(None)
                continue
            views = [self._draw_view(next(rngs), lattice, shape, patch_spacing) for _ in range(number)]
            control, intensity = zip(*views)
            groups.append(ViewParameters(np.stack(control).astype(np.float32), list(intensity)))
        return groups

    def _draw_view(
        self,
        rng: np.random.RandomState,
        lattice: Lattice,
        patch_shape: Sequence[int],
        patch_spacing: ArrayLike | None,
        names: Iterable[str] = AUGMENTATIONS,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """(control (gx, gy, gz, 3), intensity {name: values}) of one view. names: see `Policy.draw`."""
        size, core, patch_size = np.array(lattice.size), np.array(self.core), np.array(self.patch_size)
        # Whole voxels, so that a view that is neither turned nor scaled is not blurred by interpolation either
        start = (patch_size - core) // 2 + rng.randint(0, core - size + 1)
        shift = start + (size - 1) / 2 - (patch_size - 1) / 2  # of the view's centre from the patch's
        matrix, displacements, intensity = self.policy.draw(rng, lattice.shape, names)
        mm = (1.0, 1.0) if self.spacing is None else (np.array(self.spacing), np.array(patch_spacing))  # view, patch
        centre = (np.array(patch_shape) - 1) / 2 + shift * mm[0] / mm[1]
        return lattice.control(matrix, centre, displacements, *mm), intensity

    def _patch_size(self, views: int = 1200, points: int = 9) -> tuple[int, ...]:
        """The `enclosing_patch` of views that are drawn for it."""
        self.patch_size = self.core  # the draws below measure from its centre
        lattice, rng, names = self.lattices[0], np.random.RandomState(0), self.policy.sequence
        controls = np.stack([self._draw_view(rng, lattice, self.core, self.spacing, names)[0] for _ in range(views)])
        return enclosing_patch(controls, lattice, self.core, points)

    def render(
        self, patches: Tensor, groups: Sequence[ViewBatch | None], clip_range: tuple[float, float]
    ) -> list[Tensor]:
        """The views of a batch: [global (2 B, 1, x, y, z), local (L B, 1, x, y, z)], first view of all samples first.

        L: local_number
        patches: (B, X, Y, Z) int16 HU on any device
        groups: as `collate_views` returns them, on the same device
        clip_range: HU that become 0 and 1
        """
        with torch.autocast(patches.device.type, enabled=False):  # positions need more than bf16's three digits
            patches = scale_intensity(patches, *clip_range)[:, None]  # (B, 1, X, Y, Z)
            return [render_views(patches, lattice, group) for lattice, group in zip(self.lattices, groups) if group]


def scale_intensity(volume: Tensor, low: float, high: float) -> Tensor:
    """Hounsfield units to [0, 1]: low (HU) and below become 0, high and above 1. Any shape; the default float type."""
    return (volume.to(torch.get_default_dtype()) - low).div_(high - low).clamp_(0, 1)


def render_views(patches: Tensor, lattice: Lattice, group: ViewBatch) -> Tensor:
    """(V B, 1, x, y, z) views: geometry, then intensities. patches: (B, 1, X, Y, Z); group: ViewBatch of V B views."""
    views = torch.cat(
        [warp(patches, control.to(patches.dtype), lattice) for control in group.control.split(len(patches))]
    )  # (V B, 1, x, y, z)
    for name, (indices, values) in group.intensity.items():
        views.index_copy_(0, indices, AUGMENTATIONS[name].apply(views[indices], values))
    return views


def collate_views(samples: Sequence[Sequence[ViewParameters | None]]) -> list[ViewBatch | None]:
    """[ViewBatch or None, ...], one per group, of what `MultiCropAugmentation.draw` gave for each sample."""
    groups = []
    for group in zip(*samples):
        if group[0] is None:
            groups.append(None)
            continue
        control = torch.from_numpy(np.concatenate(np.stack([part.control for part in group], 1)))  # (V B, gx, ...)
        intensity, views = {}, list(itertools.chain(*zip(*(part.intensity for part in group))))  # in control's order
        for name in AUGMENTATIONS:
            indices = [i for i, view in enumerate(views) if name in view]
            if indices:
                values = np.stack([views[i][name] for i in indices]).astype(np.float32)
                intensity[name] = torch.tensor(indices), torch.from_numpy(values)
        groups.append(ViewBatch(control, intensity))
    return groups
