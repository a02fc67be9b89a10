"""The six augmentations as MONAI transforms, for pipelines of one's own.

    from monai.transforms import Compose
    from monai_transforms import RandGaussianSmooth, RandRotation
    augment = Compose([RandRotation(30), RandGaussianSmooth(2)]).set_random_state(seed=0)
    view = augment(volume)  # (C, X, Y, Z), tensor or array, any range of values

Each is augmentations.py on a batch of one volume, drawn by the same `Policy`. They stand apart because
`import monai.transforms` takes seconds and 150 MB, which pre-training can do without.
"""
import torch
from monai.transforms import RandomizableTransform
from monai.utils import convert_to_dst_type, convert_to_tensor

from augmentations import MAX_BENT, Lattice, Policy, gaussian_smooth, histogram_shift, keyed_rng, warp


class RandAugmentation(RandomizableTransform):
    """What the six share: a policy with one augmentation on, drawing with probability `prob` from `self.R`."""

    def __init__(self, prob, **strength):
        super().__init__(prob)
        self.policy = Policy(**strength, prob=self.prob)
        self.drawn = None

    def randomize(self, key=None):
        """Draw the parameters. key: (seed, epoch, sample, view) to reseed `self.R` from; None: go on drawing from it."""
        if key is not None:
            self.R = keyed_rng(*key)
        self.drawn = self.draw()

    def __call__(self, img, randomize=True):
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
    """Rotation, scale, flip and elastic deformation, alone or as one resampling; see `Policy` for the strengths."""

    def __init__(self, prob=0.5, rotation=0.0, scale=0.0, flip=0, elastic=0.0):
        super().__init__(prob, rotation=rotation, scale=scale, flip=flip, elastic=elastic)

    def draw(self):
        return self.policy.draw_affine(self.R), self.policy.draw_elastic(self.R, self._lattice((48, 48, 48)).shape)

    def apply(self, volumes, mode="bilinear"):
        """volumes: (1, C, X, Y, Z); mode: "bilinear", or "nearest" for labels."""
        matrix, moves = self.drawn
        lattice = self._lattice(volumes.shape[2:])
        centre = [(n - 1) / 2 for n in volumes.shape[2:]]
        gx, gy, gz = lattice.shape  # fewer than were drawn where a volume has very few voxels along an axis
        control = torch.as_tensor(lattice.control(matrix, centre, moves[:gx, :gy, :gz]), dtype=volumes.dtype)
        return warp(volumes, control[None].to(volumes.device), lattice, mode)

    def _lattice(self, size):
        return Lattice.for_views(size, self.policy)


class RandRotation(RandSpatial):
    """Turn by up to `degrees` about each axis, through the volume's centre."""

    def __init__(self, degrees=30.0, prob=0.5):
        super().__init__(prob, rotation=degrees)


class RandScale(RandSpatial):
    """Scale by up to `amount` along each axis, about the volume's centre."""

    def __init__(self, amount=0.25, prob=0.5):
        super().__init__(prob, scale=amount)


class RandFlip(RandSpatial):
    """Mirror one axis, drawn at random."""

    def __init__(self, prob=0.5):
        super().__init__(prob, flip=1)


class RandElastic(RandSpatial):
    """Bend space without folding it; `amount` as in `Policy.elastic`."""

    def __init__(self, amount=MAX_BENT, prob=0.5):
        super().__init__(prob, elastic=amount)


class RandGaussianSmooth(RandAugmentation):
    """Smooth with up to `sigma` voxels along each axis."""

    def __init__(self, sigma=2.0, prob=0.5):
        super().__init__(prob, gaussian=sigma)

    def draw(self):
        return self.policy.draw_sigma(self.R)

    def apply(self, volumes):
        return gaussian_smooth(volumes, torch.as_tensor(self.drawn, device=volumes.device)[None])


class RandHistogramShift(RandAugmentation):
    """Send the grey values through a random non-decreasing curve with `points` control points."""

    def __init__(self, points=10, prob=0.5):
        super().__init__(prob, histogram=points)

    def draw(self):
        return self.policy.draw_histogram(self.R)

    def apply(self, volumes):
        return histogram_shift(volumes, torch.as_tensor(self.drawn, device=volumes.device)[None])
