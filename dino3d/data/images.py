"""ITK images of volumes in RAS, as resampling and measuring take them.

An image is a SimpleITK.Image of int16 Hounsfield units whose indices grow towards the patient's right, anterior and
superior side, as nearly as its axes allow.
"""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from dino3d.data.conventions import LPS
from dino3d.data.nifti import save_nifti
from dino3d.data.volume import Volume

UPRIGHT = np.diag([-1.0, -1.0, 1.0])  # ITK's directions, which are LPS, of an image along the world's RAS axes


def read_image(path: Path | str) -> sitk.Image:
    """The image in a volume file, clamped from below to air. Raises DataError."""
    with Volume(path) as volume:
        return make_image(volume.read(), volume.affine)


def axes_of(image: sitk.Image) -> np.ndarray:
    """(3, 3) unit vectors of an image's axes in LPS, in columns."""
    return np.reshape(image.GetDirection(), (3, 3))


def make_image(volume: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """A SimpleITK.Image of an (X, Y, Z) array and its affine (4, 4) to RAS mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.T))
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def voxels_of(image: sitk.Image) -> np.ndarray:
    """(X, Y, Z) view of an image's voxels, read-only; it keeps the image alive."""
    return np.asarray(_Voxels(image)).transpose(2, 1, 0)


class _Voxels:
    """What NumPy makes an array of, and keeps as its base: ITK's own view reads freed memory when its image is gone."""

    def __init__(self, image: sitk.Image):
        self.image, self.__array_interface__ = image, sitk.GetArrayViewFromImage(image).__array_interface__


def affine_of(image: sitk.Image) -> np.ndarray:
    """(4, 4) affine of an image, from voxel indices to RAS mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


def save_image(path: Path | str, image: sitk.Image) -> None:
    """Write an image as compressed NIfTI in scanner coordinates. Raises OSError."""
    save_nifti(path, voxels_of(image), affine_of(image))
