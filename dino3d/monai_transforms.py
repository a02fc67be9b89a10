"""The augmentations as MONAI transforms, for pipelines of one's own: one class per row of augmentations.AUGMENTATIONS.

    from monai.transforms import Compose
    from dino3d.monai_transforms import RandGaussianSmooth, RandRotation
    augment = Compose([RandRotation(30), RandGaussianSmooth(2)]).set_random_state(seed=0)
    view = augment(volume)  # (C, X, Y, Z), tensor or array, any range of values

Each is augmentations.py on a batch of one volume, drawn by the same `Policy`. They stand apart because
`import monai.transforms` takes seconds and 150 MB, which pre-training can do without.
"""

from collections.abc import Sequence
from inspect import Parameter, Signature
from typing import Any

import numpy as np
import torch
from monai.transforms import RandomizableTransform
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch import Tensor

from augmentations import AUGMENTATIONS, Augmentation, Lattice, Policy, keyed_rng, warp


class RandAugmentation(RandomizableTransform):
    """What all share: a policy with the augmentation on, drawing with probability `prob` from `self.R`."""

    def __init__(self, prob: float, **strength: float) -> None:
        super().__init__(prob)
        self.policy = Policy(**strength, prob=self.prob)
        self.drawn = None

    def randomize(self, key: tuple[int, int, int, int] | None = None) -> None:
        """Draw the parameters. key: (seed, epoch, sample, view) to reseed `self.R` from; None: go on drawing."""
        if key is not None:
            self.R = keyed_rng(*key)
        self.drawn = self.draw()

    def __call__(self, img: Any, randomize: bool = True) -> Any:
        """img: (C, X, Y, Z) tensor or array, returned in its own kind and as floats. randomize=False: as drawn last."""
        volume = convert_to_tensor(img, track_meta=False)
        if volume.ndim != 4:
            raise ValueError(f"{type(self).__name__} takes one volume (C, X, Y, Z), got shape {tuple(volume.shape)}")
        if randomize:
            self.randomize()
        if self.drawn is None:
            raise RuntimeError(f"{type(self).__name__}: nothing drawn yet, call randomize() before randomize=False")
        volume = volume.to(torch.promote_types(volume.dtype, torch.float32))
        return convert_to_dst_type(self.apply(volume[None])[0], dst=img, dtype=volume.dtype)[0]


class RandSpatial(RandAugmentation):
    """Rotation, scale, flip and elastic deformation, alone or as one resampling: strengths as in AUGMENTATIONS."""

    def __init__(self, prob: float = 0.5, **strengths: float) -> None:
        super().__init__(prob, **strengths)
        self.names = [name for name in self.policy.sequence if AUGMENTATIONS[name].kind != "intensity"]
        if not strengths.keys() <= set(self.names):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.names)}, got {', '.join(strengths)}")

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        return self.policy.draw(self.R, self._lattice((48, 48, 48)).shape, self.names)[:2]

    def apply(self, volumes: Tensor, mode: str = "bilinear") -> Tensor:
        """volumes: (1, C, X, Y, Z); mode: "bilinear", or "nearest" for labels."""
        matrix, displacements = self.drawn
        lattice = self._lattice(volumes.shape[2:])
        centre = [(n - 1) / 2 for n in volumes.shape[2:]]
        gx, gy, gz = lattice.shape  # fewer than were drawn where a volume has very few voxels along an axis
        control = torch.as_tensor(lattice.control(matrix, centre, displacements[:gx, :gy, :gz]), dtype=volumes.dtype)
        return warp(volumes, control[None].to(volumes.device), lattice, mode)

    def _lattice(self, size: Sequence[int]) -> Lattice:
        return Lattice.for_views(size, self.policy)


class RandIntensity(RandAugmentation):
    """Augmentations of grey values; what is drawn is {name: values}, without those that do not act."""

    def __init__(self, prob: float = 0.5, **strengths: float) -> None:
        super().__init__(prob, **strengths)
        self.names = list(strengths)

    def draw(self) -> dict[str, Any]:
        return self.policy.draw(self.R, (0, 0, 0), self.names)[2]

    def apply(self, volumes: Tensor) -> Tensor:
        for name, values in self.drawn.items():
            volumes = AUGMENTATIONS[name].apply(volumes, torch.as_tensor(values, device=volumes.device)[None])
        return volumes


def transform_class(name: str, row: Augmentation) -> type:
    """The MONAI transform of one row: row.monai(<row.argument>=row.strength, prob=0.5)."""
    base = RandIntensity if row.kind == "intensity" else RandSpatial
    defaults = {"self": Parameter.empty} | ({row.argument: row.strength} if row.argument else {}) | {"prob": 0.5}
    signature = Signature(
        [Parameter(key, Parameter.POSITIONAL_OR_KEYWORD, default=default) for key, default in defaults.items()]
    )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        base.__init__(self, given.arguments["prob"], **{name: given.arguments.get(row.argument, row.strength)})

    __init__.__signature__ = signature
    return type(
        row.monai,
        (base,),
        {
            "__init__": __init__,
            "__module__": __name__,
            "__doc__": f"{row.help}; {row.argument or 'strength'}: {row.unit}",
        },
    )


globals().update({row.monai: transform_class(name, row) for name, row in AUGMENTATIONS.items()})
