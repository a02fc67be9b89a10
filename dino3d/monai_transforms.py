"""The augmentations as MONAI transforms, for pipelines of one's own: one class per row of augmentations.AUGMENTATIONS.

    from monai.transforms import Compose
    from dino3d.monai_transforms import RandGaussianSmooth, RandRotation
    augment = Compose([RandRotation(30), RandGaussianSmooth(2)]).set_random_state(seed=0)
    view = augment(volume)  # (C, X, Y, Z), tensor or array, any range of values

Each is augmentations.py on a batch of one volume, drawn by the same `Policy`. The affine of a MetaTensor follows, as
with MONAI's own: what lies at a place in mm still lies there, but for what an elastic deformation moves.

Each has a dictionary version, whose name ends in d: one draw for all keys, and labels by nearest neighbour.

    augment = Compose([RandRotationd(["image", "label"], ["bilinear", "nearest"], 30), RandGaussianSmoothd("image", 2)])

None can be inverted: Compose.inverse passes over them, as over MONAI's Rand3DElastic. They stand apart because
`import monai.transforms` takes seconds and 150 MB, which pre-training can do without.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple_rep
from torch import Tensor

from augmentations import AUGMENTATIONS, Augmentation, Lattice, Policy, keyed_rng, warp
from dino3d.intensity import WINDOWS, show_window

MODES = ("bilinear", "nearest")  # of interpolation


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
        volume = self.volume_of(img)
        if randomize:
            self.randomize()
        if self.drawn is None:
            raise RuntimeError(f"{type(self).__name__}: nothing drawn yet, call randomize() before randomize=False")
        volume = volume.to(torch.promote_types(volume.dtype, torch.float32))
        return self.in_kind_of(img, self.apply(volume[None])[0], volume.dtype)

    def volume_of(self, img: Any) -> Tensor:
        """(C, X, Y, Z) of a tensor or array. Raises ValueError for another rank, or the channel last."""
        volume = convert_to_tensor(img, track_meta=False)
        if volume.ndim != 4:
            raise ValueError(f"{type(self).__name__} takes one volume (C, X, Y, Z), got shape {tuple(volume.shape)}")
        if volume.shape[-1] == 1 < volume.shape[0]:  # would be turned as a stack of slices
            raise ValueError(
                f"{type(self).__name__} takes one volume (C, X, Y, Z), got shape {tuple(volume.shape)}, whose channel "
                "seems to be last; MONAI's EnsureChannelFirst brings it to the front"
            )
        return volume

    def in_kind_of(self, img: Any, volume: Tensor, dtype: Any) -> Any:
        """A volume as the kind of array that `img` is, with its affine where it has one, which follows."""
        made = convert_to_dst_type(volume, dst=img, dtype=dtype)[0]
        if isinstance(made, MetaTensor):
            made.affine = img.affine.double() @ torch.as_tensor(
                self.voxel_map(volume.shape[1:]), device=img.affine.device
            )
        return made

    def voxel_map(self, size: Sequence[int]) -> np.ndarray:
        """(4, 4) from voxels of what comes out to those of what went in, without elastic deformations."""
        return np.eye(4)


class RandSpatial(RandAugmentation):
    """Rotation, scale, flip and elastic deformation, alone or as one resampling: strengths as in AUGMENTATIONS."""

    def __init__(self, prob: float = 0.5, **strengths: float) -> None:
        super().__init__(prob, **strengths)
        self.names = [name for name in self.policy.sequence if AUGMENTATIONS[name].is_spatial]
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

    def nearest(self, labels: Any) -> Any:
        """Labels (C, X, Y, Z) as drawn last, by nearest neighbour: the same values in the same type."""
        volume = self.volume_of(labels)
        exact = torch.float64 if volume.dtype in (torch.int32, torch.int64) else torch.float32  # holds every value
        moved = self.apply(volume.to(torch.promote_types(volume.dtype, exact))[None], "nearest")[0]
        return self.in_kind_of(labels, moved, labels.dtype)

    def voxel_map(self, size: Sequence[int]) -> np.ndarray:
        centre, found = (np.array(size) - 1) / 2, np.eye(4)
        found[:3, :3] = self.drawn[0]
        found[:3, 3] = centre - self.drawn[0] @ centre
        return found

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


class RandWindowing(RandIntensity):
    """HU to [0, 1]: of the window that is drawn, and of clip_range where none is."""

    def __init__(self, clip_range: Sequence[float], prob: float, **strengths: float) -> None:
        super().__init__(prob, **strengths)
        self.clip_range = tuple(clip_range)

    def apply(self, volumes: Tensor) -> Tensor:
        (window,) = self.drawn.values() or (self.clip_range,)
        return show_window(volumes, torch.tensor([list(window)], dtype=torch.float64, device=volumes.device))


class RandAugmentationd(MapTransform, RandomizableTransform):
    """The dictionary version of a RandAugmentation: all keys are transformed as one draw says.

    modes: of each key "bilinear", or "nearest" for labels, which keep their values and their type; None: grey values
    Raises KeyError for a key that is missing, unless allow_missing_keys; ValueError for keys of different sizes.
    """

    def __init__(
        self,
        augmentation: RandAugmentation,
        keys: KeysCollection,
        modes: str | Sequence[str] | None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, augmentation.prob)
        self.augmentation, self.modes = augmentation, ensure_tuple_rep(modes, len(self.keys))
        if not set(self.modes) <= {None, *MODES}:
            raise ValueError(f"{type(self).__name__}: mode is {modes}, expected {' or '.join(MODES)} for each key")

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> "RandAugmentationd":
        self.augmentation.set_random_state(seed, state)
        return self

    def randomize(self, key: tuple[int, int, int, int] | None = None) -> None:
        """Draw for all keys of the dictionary: see `RandAugmentation.randomize`."""
        self.augmentation.randomize(key)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> dict[Hashable, Any]:
        """data: {key: (C, X, Y, Z) tensor or array}, of which a copy is returned. randomize=False: as drawn last."""
        data = dict(data)
        sizes = {key: tuple(self.augmentation.volume_of(data[key]).shape[1:]) for key in self.key_iterator(data)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{type(self).__name__}: keys of one size are transformed together, got {sizes}")
        if randomize and sizes:
            self.randomize()
        for key, mode in self.key_iterator(data, self.modes):
            if mode == "nearest":
                data[key] = self.augmentation.nearest(data[key])
            else:
                data[key] = self.augmentation(data[key], randomize=False)
        return data


class RandSpatiald(RandAugmentationd):
    """RandSpatial for dictionaries. mode: "bilinear", or "nearest" for labels, for all keys or for each."""

    def __init__(
        self,
        keys: KeysCollection,
        mode: str | Sequence[str],
        prob: float = 0.5,
        allow_missing_keys: bool = False,
        **strengths: float,
    ) -> None:
        super().__init__(RandSpatial(prob, **strengths), keys, mode, allow_missing_keys)


def transform_class(name: str, row: Augmentation) -> type:
    """The MONAI transform of one row: row.monai(<row.argument>=row.strength, prob=0.5)."""
    base = RandSpatial if row.is_spatial else RandWindowing if row.kind == "window" else RandIntensity

    def make(self: Any, prob: float, **given: Any) -> None:
        strength = given.pop(row.argument, row.strength)
        base.__init__(self, prob=prob, **given, **{name: strength})

    return _new_class(row.monai, base, _arguments(row) | {"prob": 0.5}, make, row)


def dictionary_class(row: Augmentation) -> type:
    """The dictionary version: row.monai + "d"(keys, mode, <row.argument>=row.strength, prob=0.5,
    allow_missing_keys=False), without a mode where it acts on grey values."""
    modes = {"mode": Parameter.empty} if row.is_spatial else {}
    arguments = {"keys": Parameter.empty} | modes | _arguments(row) | {"prob": 0.5, "allow_missing_keys": False}

    def make(self: Any, keys: KeysCollection, allow_missing_keys: bool, mode: Any = None, **given: Any) -> None:
        RandAugmentationd.__init__(self, globals()[row.monai](**given), keys, mode, allow_missing_keys)

    return _new_class(f"{row.monai}d", RandAugmentationd, arguments, make, row)


def _arguments(row: Augmentation) -> dict[str, Any]:
    """{name: default} of what is a row's own."""
    if row.kind == "window":
        return {"clip_range": WINDOWS["wide"]}
    return {row.argument: row.strength} if row.argument else {}


def _new_class(title: str, base: type, arguments: dict[str, Any], make: Callable[..., None], row: Augmentation) -> type:
    """A subclass that takes these arguments, {name: default}, and hands all of them to `make` by name."""
    signature = Signature(
        [Parameter(key, Parameter.POSITIONAL_OR_KEYWORD, default=default) for key, default in arguments.items()]
    )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        make(self, **given.arguments)

    parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values()]
    __init__.__signature__ = Signature(parameters)
    return type(
        title,
        (base,),
        {
            "__init__": __init__,
            "__module__": __name__,
            "__doc__": f"{row.help}; {row.argument or 'strength'}: {row.unit}",
        },
    )


globals().update({row.monai: transform_class(name, row) for name, row in AUGMENTATIONS.items()})
globals().update({f"{row.monai}d": dictionary_class(row) for row in AUGMENTATIONS.values()})
