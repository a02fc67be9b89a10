"""Where voxels lie: what an affine must be, how far two of them are apart, and the way to RAS."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dino3d.data.conventions import DataError, format_size

SPACINGS = (0.05, 50.0)  # mm; below and above it no CT is, but a header in other units
SHEAR = 1e-3  # cosine of the angle between two axes: up to it they are taken to be at right angles
EXACT = 1e-5  # cosine up to which they are so: 0.005 mm in half a metre
UNIT = 0.01  # by which a direction may miss the length 1
APART = 0.1  # of a voxel, up to which two places are one


def require_geometry(path: Path | str, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """The (4, 4) affine of a volume, its axes brought to right angles where they miss them by no more than SHEAR.

    shape: of the voxels. Raises DataError for what is no 3D volume or has no such axes.
    """
    if len(shape) != 3:
        raise DataError(path, f"is a {len(shape)}D image of {format_size(shape)} voxels, expected a 3D volume")
    if np.shape(affine) != (4, 4):
        raise DataError(path, f"has an affine of {format_size(np.shape(affine)) or 'one number'}, expected 4 x 4")
    if min(shape) < 1:
        raise DataError(path, f"is empty: {format_size(shape)} voxels")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (spacing > 0).all():
        raise DataError(path, "has no geometry: its spacings and directions span no volume")
    axes = affine[:3, :3] / spacing  # columns: unit vectors
    cosines = np.abs(axes.T @ axes - np.eye(3)).max()
    if abs(np.linalg.det(axes)) < 1e-6:
        raise DataError(path, "has no geometry: its spacings and directions span no volume")
    if not ((spacing >= SPACINGS[0]) & (spacing <= SPACINGS[1])).all():
        raise DataError(
            path,
            f"has a spacing of {' x '.join(f'{s:.4g}' for s in spacing)} mm, expected {SPACINGS[0]:g} to "
            f"{SPACINGS[1]:g}: is its header's unit right?",
        )
    if cosines > SHEAR:
        raise DataError(
            path, f"has axes that are not at right angles (sheared: the cosine between two is {cosines:.2g})"
        )
    if cosines <= EXACT:
        return affine
    u, _, vt = np.linalg.svd(axes)
    straight, middle = affine.copy(), (np.array(shape) - 1) / 2
    straight[:3, :3] = (u @ vt) * spacing  # the nearest axes at right angles, the volume's middle stays where it is
    straight[:3, 3] = affine[:3, :3] @ middle + affine[:3, 3] - straight[:3, :3] @ middle
    return straight


def length_notes(directions: np.ndarray) -> tuple[str, ...]:
    """() or (a line that directions, (3, 3) with vectors in columns, have other lengths than 1), which scale spacings.

    ITK multiplies them, others take the spacings as they stand.
    """
    lengths = np.linalg.norm(directions, axis=0)
    if (np.abs(lengths - 1) <= UNIT).all():
        return ()
    return (f"its directions are {format_size(lengths.round(4))} long, not 1: its spacings were multiplied by that",)


def orientation_of(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((3,) the file's axis for each RAS axis, (3,) its sign) of the nearest RAS axes."""
    from nibabel.orientations import io_orientation

    orientation = io_orientation(affine)  # (3, 2): the RAS axis of each axis of the file, and its sign
    axes = np.argsort(orientation[:, 0])
    return axes, orientation[axes, 1].astype(int)


def ras_affine(shape: Sequence[int], affine: np.ndarray, axes: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """(4, 4) affine of the same voxels once their axes are swapped and flipped. axes, signs: of `orientation_of`"""
    turn = np.zeros((4, 4))  # from RAS indices to the file's
    turn[3, 3] = 1
    for ras, (axis, sign) in enumerate(zip(axes, signs)):
        turn[axis, ras] = sign
        turn[axis, 3] = 0 if sign > 0 else shape[axis] - 1
    return affine @ turn


def corners_apart(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """mm that two affines put the corners of a volume of this shape apart, at most."""
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*([0, n - 1] for n in shape))]).T  # (4, 8)
    return float(np.linalg.norm(((affine - other) @ corners)[:3], axis=0).max())


def is_apart(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> bool:
    """Whether two affines put a corner of a volume more than APART of a voxel's shortest side of `affine` apart."""
    return not corners_apart(shape, affine, other) <= APART * np.linalg.norm(affine[:3, :3], axis=0).min()


def other_grid(
    shape: Sequence[int], affine: np.ndarray, image_shape: Sequence[int], image_affine: np.ndarray
) -> str | None:
    """Why a label does not lie on its image's grid; None if it does, to a tenth of a voxel at every corner."""
    if tuple(shape) != tuple(image_shape):
        return f"has another shape than its image: {format_size(shape)}, not {format_size(image_shape)}"
    if is_apart(shape, image_affine, affine):
        apart = corners_apart(shape, affine, image_affine)
        return f"lies elsewhere than its image: up to {apart:.3g} mm apart at the corners"
    return None
