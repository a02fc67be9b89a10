"""Grids that lie in every way, what is written on them, and what that is in RAS."""

import itertools

import nibabel
import numpy as np
from scipy.spatial.transform import Rotation

from dino3d.data.conventions import AIR

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SIGNED_PERMUTATIONS = [
    np.eye(3)[list(axes)] * signs
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
OBLIQUE = Rotation.from_euler("xyz", [11, -17, 23], degrees=True).as_matrix()
SPACING, ORIGIN = (0.9, 0.7, 2.5), (-31.25, 47.5, -803.1)
AXES = {  # LPS: columns are the unit vectors along a row, along a column and from slice to slice
    "axial": np.eye(3),
    "prone": np.diag([-1.0, -1, 1]),
    "feet first": np.diag([-1.0, 1, -1]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "sagittal": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
    "oblique": OBLIQUE,
    "oblique coronal, from the feet": OBLIQUE @ np.array([[-1.0, 0, 0], [0, 0, 1], [0, 1, 0]]),
}
MIRRORED = {"left-handed": np.diag([-1.0, 1, 1]), "oblique, permuted and flipped": OBLIQUE @ SIGNED_PERMUTATIONS[13]}


def noise(shape=(8, 5, 6), low=0, high=4096, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape)


def affine_to_ras(axes, spacing=SPACING, origin=ORIGIN):
    """(4, 4) from voxel indices to RAS mm, of unit vectors in LPS (columns)."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.array(axes) * spacing, origin
    return LPS @ affine


def canonical(voxels, affine):
    """(voxels, affine) in RAS by nibabel."""
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, affine))
    return np.asarray(image.dataobj), image.affine


def as_hu(values):
    """What becomes of a file's values: rounded, at least air, int16."""
    return np.clip(np.rint(values), AIR, 32767).astype(np.int16)
