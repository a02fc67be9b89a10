"""Images cut, and resampled to another spacing or around a point."""

import itertools
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from dino3d.data.conventions import AIR, DataError, format_size, swap_lps_ras
from dino3d.data.images import UPRIGHT, axes_of, voxels_of

MAY_BE_RAS = "; with the signs of the first two changed it is inside: is it in RAS?"


def crop_at(
    image: sitk.Image,
    point: Sequence[float] | np.ndarray,
    size: Sequence[int] | np.ndarray,
    spacing: Sequence[float] | np.ndarray | None,
    source: str,
) -> sitk.Image:
    """The part of an image around a point, resampled linearly; what lies outside is air.

    point: (3,) LPS mm, which becomes the centre of the crop (without resampling: the nearest that whole voxels allow)
    size: (3,) voxels; spacing: (3,) mm along the image's axes, or None to take its voxels as they are
    source: what to call the point in an error
    A spacing much larger than the image's is averaged over, as pre-training does. Raises DataError for a point outside.
    """
    index = index_inside(image, point, source)
    own = np.array(image.GetSpacing())
    if spacing is None:
        start = np.rint(index - (np.array(size) - 1) / 2)
        return _sample(image, start, own, size)
    factors = averaging_factors(own, spacing)
    fine = np.array(spacing) / factors
    start = index - (np.array(size) * factors - 1) / 2 * fine / own
    return _mean(_sample(image, start, fine, np.array(size) * factors, linear=True), factors)


def index_inside(image: sitk.Image, point: Sequence[float] | np.ndarray, source: str) -> np.ndarray:
    """(3,) continuous voxel index of a point, LPS mm, in an image. source: what to call the point in an error

    Raises DataError for a point outside.
    """
    index, mirrored = (
        np.array(image.TransformPhysicalPointToContinuousIndex([float(p) for p in one]))
        for one in (point, swap_lps_ras(point))
    )
    require_inside(index, image.GetSize(), point, source, mirrored)
    return index


def require_inside(
    index: np.ndarray, size: Sequence[int], point: Sequence[float] | np.ndarray, source: str, mirrored: np.ndarray
) -> None:
    """Raise DataError for a point, (3,) LPS mm, whose continuous voxel index is outside an image of `size` voxels.

    mirrored: that of the point with its first two signs changed, which tells points in RAS
    """

    def is_inside(one: np.ndarray) -> bool:
        return bool(((one >= -0.5) & (one <= np.array(size) - 0.5)).all())

    if not is_inside(index):
        hint = MAY_BE_RAS if is_inside(mirrored) else ""
        raise DataError(
            source,
            f"outside the scan: {format_size(point)} mm (LPS) is voxel {format_size(np.round(index, 1) + 0.0)} of "
            f"{format_size(size)} (RAS){hint}",
        )


def resample(
    image: sitk.Image, spacing: Sequence[float] | np.ndarray, is_label: bool = False, upright: bool = False
) -> sitk.Image:
    """An image at another spacing (3,) mm over the same extent: linear and averaged as needed, or nearest for labels.

    upright: an image whose axes are not the world's is turned to right, anterior and superior. Its extent is then the
    box around its corners; what it does not fill is air, or 0 in a mask.
    """
    tilted = upright and not is_upright(image)
    if tilted:
        axes = UPRIGHT
        first, extent, own = _box_along(image, axes)
    else:
        axes, own = axes_of(image), np.array(image.GetSpacing())
        extent = np.array(image.GetSize()) * own
    size = np.maximum(np.rint(extent / spacing), 1).astype(int)
    factors = np.ones(3, int) if is_label else averaging_factors(own, spacing)
    fine = np.array(spacing) / factors
    if tilted:
        start = image.TransformPhysicalPointToContinuousIndex((axes @ (first + fine / 2)).tolist())
    else:
        start = (fine / own - 1) / 2  # the outer faces of the first voxels coincide
    if is_label:
        return _sample(image, start, fine, size, extend=not tilted, axes=axes)
    return _mean(_sample(image, start, fine, size * factors, linear=True, extend=not tilted, axes=axes), factors)


def is_upright(image: sitk.Image) -> bool:
    """Whether an image's axes are the world's right, anterior and superior, to 1e-3."""
    return np.allclose(axes_of(image), UPRIGHT, rtol=0, atol=1e-3)


def _box_along(image: sitk.Image, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(3,) low corner and (3,) extent in mm of the box along `axes` around an image, and (3,) its voxels' distance
    along them.

    That is the longest step that passes no voxel over, however flat the voxels are and however they lie.
    """
    faces = itertools.product(*((-0.5, n - 0.5) for n in image.GetSize()))
    corners = np.array([image.TransformContinuousIndexToPhysicalPoint(face) for face in faces]) @ axes  # (8, 3)
    voxels_per_mm = axes_of(image).T @ axes / np.array(image.GetSpacing())[:, None]  # (3 of the image, 3 of the box)
    return corners.min(0), np.ptp(corners, axis=0), 1 / np.linalg.norm(voxels_per_mm, axis=0)


def averaging_factors(own: np.ndarray, spacing: Sequence[float] | np.ndarray) -> np.ndarray:
    """(3,) whole number of samples along each axis that one voxel of `spacing` is the mean of."""
    stretch = np.array(spacing) / own
    return np.where(stretch > 1.5, np.rint(stretch), 1).astype(int)


def _sample(
    image: sitk.Image,
    start: Sequence[float] | np.ndarray,
    spacing: np.ndarray,
    size: Sequence[int] | np.ndarray,
    linear: bool = False,
    extend: bool = False,
    axes: np.ndarray | None = None,
) -> sitk.Image:
    """An image on a grid along its axes or others, `start` in its continuous voxel indices; linearly, in float, or
    nearest.

    Outside is air, or 0 in a mask; with `extend` the nearest voxel, for a last voxel that reaches a little beyond.
    """
    axes = axes_of(image) if axes is None else axes
    outside = AIR if image.GetPixelID() == sitk.sitkInt16 else 0
    origin = image.TransformContinuousIndexToPhysicalPoint([float(s) for s in start])
    how, kind = (sitk.sitkLinear, sitk.sitkFloat32) if linear else (sitk.sitkNearestNeighbor, image.GetPixelID())
    return sitk.Resample(
        image,
        [int(n) for n in size],
        sitk.Transform(),
        how,
        origin,
        [float(s) for s in spacing],
        axes.ravel().tolist(),
        outside,
        kind,
        extend,
    )


def _mean(image: sitk.Image, factors: np.ndarray) -> sitk.Image:
    """Means over blocks of voxels of a float image, rounded (ITK itself would cut off decimals)."""
    means = image if (factors == 1).all() else sitk.BinShrink(image, [int(f) for f in factors])
    return sitk.Cast(sitk.Round(means), sitk.sitkInt16)


def body_box(image: sitk.Image, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """(3,) first voxel and (3,) size of the largest thing denser than -300 HU and the lungs in it, with `margin` mm."""
    coarse = sitk.Shrink(image, [min(4, n) for n in image.GetSize()])
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(coarse > -300))
    return mask_box(parts == 1, image, margin)


def mask_box(mask: sitk.Image, image: sitk.Image, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """(3,) first voxel and (3,) size in `image` of the non-zero part of a mask of the same extent, with `margin` mm or
    more.

    Without any such part: all of the image.
    """
    found = [np.flatnonzero(voxels_of(mask).any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    shape = np.array(image.GetSize())
    if not len(found[0]):
        return np.zeros(3, int), shape
    scale = shape / np.array(mask.GetSize())
    extra = margin / np.array(image.GetSpacing()) + scale - 1  # what begins between two voxels of a coarser mask is in
    low = np.maximum(np.floor([f[0] for f in found] * scale - extra), 0).astype(int)
    high = np.minimum(np.ceil((np.array([f[-1] for f in found]) + 1) * scale + extra), shape).astype(int)
    return low, high - low


def crop_to_box(image: sitk.Image, box: tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]) -> sitk.Image:
    """The part of an image in a box of first voxel and size; its position in the world stays."""
    first, size = box
    return sitk.RegionOfInterest(image, [int(n) for n in size], [int(n) for n in first])
