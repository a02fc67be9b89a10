"""The table of the augmentations, their flags, and which of them are on and how strong.

The table AUGMENTATIONS has a row for each augmentation; flags, policies, pictures and MONAI transforms follow from it.
The six and their ranges are those of "Evaluating Task-Specific Augmentations in Self-Supervised
Pre-Training for 3D Medical Image Analysis" (SPIE Medical Imaging 2024, doi 10.1117/12.3000850).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, NamedTuple

import numpy as np

from dino3d.bspline import (
    draw_angles,
    draw_axis,
    draw_elastic,
    draw_factors,
    elastic_moves,
    mirror_matrix,
    rotation_matrix,
    scale_matrix,
)
from dino3d.command_line import boolean_flag
from dino3d.intensity import draw_curve, draw_sigma, draw_window, gaussian_smooth, histogram_shift, show_window

MAX_BENT = 0.4  # elastic control points move by less than 1 / 2.479 of their spacing: no fold (see elastic_moves)


class StrengthFlag(NamedTuple):
    """A flag that sets an augmentation's strength: the strength times `factor` is what one types."""

    name: str
    help: str
    factor: int = 1


@dataclass(frozen=True)
class Augmentation:
    """One augmentation: all that flags, policies, views, pictures and MONAI transforms know of it.

    strength: what its flag switches on; 0 of its type is off
    limits: (low, high) of strengths that make sense; 0 is always allowed and switches it off
    unit: what the strength is
    on: whether --use_<name> is on by default; help: of that flag
    kind: "affine", "deformation", "intensity" or "window": what it acts on
    draw: (rng, strength) -> values, all that is random about it in one view; called whether it is on or not
    apply: affine:      (N, ...) values of N views -> (N, 3, 3) matrices from offsets in a view to those in the patch
           deformation: values, (gx, gy, gz) -> (gx, gy, gz, 3) displacements in control point spacings
           intensity:   (N, C, X, Y, Z) views, (N, ...) float32 tensor of their values -> views, on any device
           window:      the same with views in HU, which it brings to [0, 1] instead of the clip range
    monai: name of its class in dino3d/monai_transforms.py; argument: what the strength is called there (None: fixed)
    strength_flag: of main_dino.py
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
    strength_flag: StrengthFlag | None = None

    @property
    def is_spatial(self) -> bool:
        return self.kind in ("affine", "deformation")


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
        strength_flag=StrengthFlag("rotation_degrees", "largest angle about each axis, in degrees"),
    ),
    "scale": Augmentation(
        strength=0.25,
        limits=(0, 0.99),
        unit="relative, along each axis; 0.25 draws from [0.75, 1.25], more than 1 shows more of the patch",
        on=True,
        help="scale by up to 25 % along each axis",
        kind="affine",
        draw=draw_factors,
        apply=scale_matrix,
        monai="RandScale",
        argument="amount",
        strength_flag=StrengthFlag("scale_percent", "largest change of size along each axis, in per cent", 100),
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
        strength_flag=StrengthFlag(
            "elastic_amount", "furthest that a control point moves along an axis, in control point spacings"
        ),
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
        strength_flag=StrengthFlag("gaussian_sigma", "largest standard deviation along each axis, in a view's voxels"),
    ),
    "histogram": Augmentation(
        strength=10,
        limits=(3, 1000),
        unit="control points of the grey-value curve",
        on=False,
        help="shift grey values by a curve with 10 control points",
        kind="intensity",
        draw=draw_curve,
        apply=histogram_shift,
        monai="RandHistogramShift",
        argument="points",
        strength_flag=StrengthFlag("histogram_points", "control points of the grey-value curve"),
    ),
    "window": Augmentation(
        strength=1,
        limits=(0, 1),
        unit="1 draws one of the windows of dino3d/intensity.py's WINDOWS",
        on=False,
        help="show a view in the lung, mediastinum or wide window (-1350 to 150, -160 to 240, -1000 to 1000 HU), drawn "
        "at random, instead of --clip_range",
        kind="window",
        draw=draw_window,
        apply=show_window,
        monai="RandWindow",
        argument=None,
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
    def has_windows(self) -> bool:
        return any(AUGMENTATIONS[name].kind == "window" for name in self.on)

    @property
    def sequence(self) -> list[str]:
        """Names for `draw_points` where many views come from one generator, so that a new row's draws would shift the
        next view's: the paper's six in any case, later rows only where they are on."""
        return [name for name in AUGMENTATIONS if name in PAPER or name in self.on]

    @property
    def up_to_last(self) -> list[str]:
        """Names for `draw_values` where a view has a generator of its own, of which nobody misses what comes later."""
        names = list(AUGMENTATIONS)
        return names[: 1 + max((names.index(name) for name in self.on), default=-1)]

    def draw(
        self, rng: np.random.RandomState, lattice: tuple[int, ...], names: Iterable[str] = AUGMENTATIONS
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """(matrix, displacements, intensity) of one view, see `draw_values` and `compose`."""
        matrices, displacements, intensity = self.compose([self.draw_values(rng, names)], lattice)
        return matrices[0], displacements[0], intensity[0]

    def draw_values(self, rng: np.random.RandomState, names: Iterable[str] = AUGMENTATIONS) -> dict[str, Any]:
        """{name: values} of the augmentations that act on one view. names: whose draws are made, in the table's
        order."""
        drawn = {}
        for name in names:
            row, strength = AUGMENTATIONS[name], getattr(self, name)
            # Drawn whether it is on or not: switching one off leaves the others as they were
            acts, values = rng.rand() < self.prob, row.draw(rng, strength)
            if acts and strength:
                drawn[name] = values
        return drawn

    def compose(
        self, views: Sequence[dict[str, Any]], lattice: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """(matrices, displacements, intensities) of N views: `Lattice.control` takes the first two.

        views: N times what `draw_values` gave; lattice: (gx, gy, gz) control points
        matrices: (N, 3, 3) from offsets in the view to offsets in the patch: rotation times scale times flip. The order
                  and the signs are MONAI's `Affine(rotate_params, scale_params)`: intrinsic rotations about x, y, z.
        displacements: (N, gx, gy, gz, 3) displacements in control point spacings
        intensities: N times {name: values} of those that act on this view
        """
        matrices = np.tile(np.eye(3), (len(views), 1, 1))
        displacements, intensities = np.zeros((len(views), *lattice, 3)), [{} for _ in views]
        for name, row in AUGMENTATIONS.items():
            acts = [view for view, drawn in enumerate(views) if name in drawn]
            if acts and row.kind == "affine":
                matrices[acts] = matrices[acts] @ row.apply(np.array([views[view][name] for view in acts]))
            elif row.kind == "deformation":
                for view in acts:
                    displacements[view] += row.apply(views[view][name], lattice)
            else:
                for view in acts:
                    intensities[view][name] = views[view][name]
        return matrices, displacements, intensities


def paper_policy(names: Iterable[str]) -> Policy:
    """The Policy that has the augmentations of these names on, as strong as in AUGMENTATIONS."""
    return Policy(**{name: AUGMENTATIONS[name].strength for name in names})
