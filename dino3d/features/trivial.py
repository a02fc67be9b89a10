"""Figures that anyone can compute of a region without a network, beside which features must be judged.

Regions are (X, Y, Z) int16 HU arrays around something in their middle, spacing (3,) mm per voxel.
"""

from collections.abc import Sequence

import numpy as np

CENTRE = 3.5  # mm around the middle
HISTOGRAM_SIDE = 36.0  # mm
HISTOGRAM = np.linspace(-1000, 400, 17)  # HU, borders of 16 bins; what is beyond falls into the outer ones
SHELLS = np.arange(7) * 2.0  # mm around the middle, borders of six shells


def centre_hu(hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """(1,) mean HU within 3.5 mm of the middle, or of what is nearest to it."""
    distance = distance_from_middle(hu.shape, spacing)
    return np.array([hu[distance <= max(CENTRE, distance.min() + 1e-6)].mean()])


def hu_histogram(hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """(16,) shares of the voxels in the middle 36 mm that have -1000 to 400 HU, in equal bins."""
    shape = np.array(hu.shape)
    size = np.clip(np.rint(HISTOGRAM_SIDE / np.array(spacing)).astype(int), 1, shape)
    start = (shape - size) // 2
    part = hu[tuple(slice(a, a + n) for a, n in zip(start, size))]
    return np.histogram(np.clip(part, HISTOGRAM[0], HISTOGRAM[-1]), HISTOGRAM)[0] / part.size


def hu_mean_and_deviation(hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """(2,) mean and standard deviation of all voxels in HU."""
    return np.array([hu.mean(), hu.std()])


def radial_profile(hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """(12,) mean HU, then the standard deviation, in six shells of 2 mm around the middle, innermost first.

    A shell without a voxel, as coarse ones and small regions leave, has the figures of the nearest one with some.
    """
    shell = np.digitize(distance_from_middle(hu.shape, spacing), SHELLS) - 1
    filled = np.unique(shell[shell < len(SHELLS) - 1])
    if not len(filled):
        return np.concatenate([np.full(6, hu.mean()), np.full(6, hu.std())])
    nearest = [filled[np.abs(filled - k).argmin()] for k in range(len(SHELLS) - 1)]
    parts = {k: hu[shell == k] for k in filled}
    return np.array([parts[k].mean() for k in nearest] + [parts[k].std() for k in nearest])


def mask_volume(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """(1,) mm³ of what is not 0 in a mask."""
    return np.array([np.count_nonzero(mask) * np.prod(spacing)])


def distance_from_middle(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """(X, Y, Z) mm of the voxels' centres from the middle of the region."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)]
    return np.sqrt(sum(np.meshgrid(*(axis**2 for axis in axes), indexing="ij", sparse=True)))


TRIVIAL = {"centre": centre_hu, "histogram": hu_histogram, "mean": hu_mean_and_deviation, "radial": radial_profile}


def trivial_figures(hu: np.ndarray, spacing: Sequence[float], size: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{name: (F,) float32} of a region: TRIVIAL's, the size where it is known (`mask_volume`), and all of them."""
    found = {name: figure(hu, spacing) for name, figure in TRIVIAL.items()}
    if size is not None:
        found["size"] = size
    found["all"] = np.concatenate(list(found.values()))
    return {name: values.astype(np.float32) for name, values in found.items()}
