"""What an encoder sees of a CT: windows of its input size, at its spacing.

Voxels are int16 HU, (X, Y, Z) in RAS. The same scan has the same windows to the last bit from every file format: what
headers say of it is rounded before any grid is built, and grids lie along the scan's own axes, so that neither its
place in the world nor a tilt adds digits to where a voxel is read.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dino3d.data import images, resampling
from dino3d.data.conventions import LPS, DataError, Stored, swap_lps_ras
from dino3d.data.requirements import no_image, require_ct
from dino3d.data.volume import Volume, padded

if TYPE_CHECKING:
    import SimpleITK as sitk

SAME = 1e-3  # relative difference of two spacings, up to which voxels are taken as they are
CROP = 1.5  # input sizes, up to which along each axis a volume is a crop
AIR_HU, AIR_SHARE = -900, 0.01  # a window with at most this share of voxels above is air
REGIONS = ("auto", "centre", "whole")


class CtScan(NamedTuple):
    """A CT as it is seen here.

    frame: SimpleITK.Image of int16 HU as if its axes were the world's and its first voxel the origin: fewer digits to
        differ. Made once: a scan may have thousands of points
    affine: (4, 4) to RAS mm, rounded; notes: lines on its file
    """

    frame: "sitk.Image"
    affine: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def hu(self) -> np.ndarray:
        """(X, Y, Z) int16, read-only."""
        return images.voxels_of(self.frame)

    @property
    def spacing(self) -> np.ndarray:
        """(3,) mm."""
        return rounded_spacing(self.affine)


class Region(NamedTuple):
    """What of a scan becomes one vector.

    image: SimpleITK.Image of int16 HU at the working spacing
    starts: (N, 3) first voxels of the windows in it, those of nothing but air left out; size: (3,) voxels of each
    count: of the windows with those of air; how: "centre", "point" or "whole"
    """

    image: "sitk.Image"
    starts: np.ndarray
    size: tuple[int, ...]
    count: int
    how: str

    @property
    def spacing(self) -> tuple[float, ...]:
        """(3,) mm."""
        return self.image.GetSpacing()

    def windows(self) -> Iterator[np.ndarray]:
        """(x, y, z) int16 HU of each window, in memory of its own."""
        voxels = images.voxels_of(self.image)
        for start in self.starts:
            yield np.array(voxels[tuple(slice(a, a + n) for a, n in zip(start, self.size))], order="C")


def read_ct(path: Path | str, stored: Stored | None = None) -> CtScan:
    """The CtScan in a file or DICOM series, or in what is open already, of any orientation.

    Raises DataError for what is no image.
    """
    with Volume(path, stored) as volume:
        hu, notes = volume.read(), volume.notes
        if fault := no_image(hu):
            raise DataError(path, fault)
        affine = rounded_affine(volume.affine)
        return CtScan(images.make_image(hu, np.diag([*rounded_spacing(affine), 1.0])), affine, tuple(notes))


def rounded_spacing(affine: np.ndarray) -> np.ndarray:
    """(3,) mm, rounded, of an affine (4, 4)."""
    return rounded(np.linalg.norm(affine[:3, :3], axis=0), 4)


def rounded(values: np.ndarray, digits: int) -> np.ndarray:
    """Values rounded to so many digits, the same ones whichever way their last bits fell.

    The border between two steps lies a quarter of one above the lower: on the half way are the numbers that scanners
    have, such as 0.78125 mm, a field of 400 mm in 512 pixels, and there a last bit would choose.
    """
    return np.floor(np.asarray(values) * 10**digits + 0.75) / 10**digits + 0.0  # + 0: no -0


def rounded_affine(affine: np.ndarray) -> np.ndarray:
    """An affine (4, 4) with its spacings and origin rounded to 1e-4 mm and the cosines of its axes to 1e-6."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    result = np.eye(4)
    result[:3, :3] = rounded(affine[:3, :3] / spacing, 6) * rounded(spacing, 4)
    result[:3, 3] = rounded(affine[:3, 3], 4)
    return result


def region_of(
    scan: CtScan,
    size: Sequence[int],
    spacing: Sequence[float] | None,
    region: str = "auto",
    point: Sequence[float] | None = None,
    source: str = "the volume",
) -> Region:
    """The Region that a scan's vector is of: one window around a point, (3,) LPS mm; else "centre", one in its middle,
    or "whole", windows over all of it; "auto" is the centre of what `is_crop_sized`.

    size: (3,) voxels of a window; spacing: (3,) mm, None: the scan's own; source: what to call it in an error
    Raises DataError for a scan that is no CT in HU (a crop may hold soft tissue alone) or nothing but air, and for a
    point outside.
    """
    if point is None and (region == "centre" or region == "auto" and is_crop_sized(scan, size, spacing)):
        return centre_region(scan, size, spacing)
    require_ct(scan.hu, source)
    if point is not None:
        return point_region(scan, point, size, spacing, source)
    return whole_region(scan, size, spacing, source)


def is_crop_sized(scan: CtScan, size: Sequence[int], spacing: Sequence[float] | None) -> bool:
    """Whether a scan is no larger than 1.5 input sizes along each axis. size: (3,) voxels; spacing: (3,) mm or None"""
    scale = 1.0 if spacing is None else scan.spacing / spacing
    return bool((np.array(scan.hu.shape) * scale <= CROP * np.array(size)).all())


def centre_region(scan: CtScan, size: Sequence[int], spacing: Sequence[float] | None) -> Region:
    """The Region of one window around the middle of a scan; air beyond it.

    At the working spacing already, and without one, it is the window of whole voxels that the classifier sees.
    """
    if spacing is not None and not _is_same(scan.spacing, spacing):
        return _window_at(scan, (np.array(scan.hu.shape) - 1) / 2, size, spacing, "centre")
    window = images.make_image(_middle(scan.hu, size), np.diag([*scan.spacing, 1.0]))
    return Region(window, np.zeros((1, 3), int), tuple(size), 1, "centre")


def point_region(
    scan: CtScan, point: Sequence[float], size: Sequence[int], spacing: Sequence[float] | None, source: str
) -> Region:
    """The Region of one window around a point, (3,) LPS mm, to 0.01 of a voxel. source: what to call it in an error

    Raises DataError for a point outside the scan.
    """
    index, mirrored = (np.linalg.solve(LPS @ scan.affine, [*one, 1.0])[:3] for one in (point, swap_lps_ras(point)))
    resampling.require_inside(index, scan.hu.shape, point, source, mirrored)
    index = np.clip(rounded(index, 2), -0.49, np.array(scan.hu.shape) - 0.51)  # rounding leads out of no scan
    return _window_at(scan, index, size, spacing, "point")


def whole_region(scan: CtScan, size: Sequence[int], spacing: Sequence[float] | None, source: str) -> Region:
    """The Region of evenly spread windows over all of a scan, as few as cover it; a smaller one has air around it.

    Raises DataError for a scan of nothing but air.
    """
    image = scan.frame
    if spacing is not None and not _is_same(scan.spacing, spacing):
        image = resampling.resample(image, spacing)
    if any(n < m for n, m in zip(image.GetSize(), size)):
        whole = _middle(images.voxels_of(image), np.maximum(image.GetSize(), size))
        image = images.make_image(whole, np.diag([*image.GetSpacing(), 1.0]))
    voxels, starts = images.voxels_of(image), window_starts(image.GetSize(), size)
    seen = [not is_air(voxels[tuple(slice(a, a + n) for a, n in zip(start, size))]) for start in starts]
    if not any(seen):
        raise DataError(source, f"is nothing but air: no window has more than {AIR_SHARE:.0%} above {AIR_HU} HU")
    return Region(image, starts[seen], tuple(size), len(starts), "whole")


def window_starts(shape: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """(N, 3) first voxels of windows of `size` that cover a volume of at least that size, as few as can and evenly."""
    axes = [np.rint(np.linspace(0, n - m, -(-n // m))).astype(int) for n, m in zip(shape, size)]
    return np.array(list(itertools.product(*axes)))


def is_air(hu: np.ndarray) -> bool:
    """Whether a window holds nothing but air: at most 1 % of its voxels are above -900 HU, as noise leaves them."""
    return bool(np.count_nonzero(hu > AIR_HU) <= AIR_SHARE * hu.size)


def _is_same(spacing: np.ndarray, other: Sequence[float]) -> bool:
    return np.allclose(spacing, other, rtol=SAME, atol=0)


def _window_at(
    scan: CtScan, index: np.ndarray, size: Sequence[int], spacing: Sequence[float] | None, how: str
) -> Region:
    """The Region of one window around a continuous voxel index."""
    point = scan.frame.TransformContinuousIndexToPhysicalPoint(index.tolist())
    crop = resampling.crop_at(scan.frame, point, size, spacing, how)
    window = images.make_image(images.voxels_of(crop), np.diag([*crop.GetSpacing(), 1.0]))
    return Region(window, np.zeros((1, 3), int), tuple(size), 1, how)


def _middle(hu: np.ndarray, size: Sequence[int] | np.ndarray) -> np.ndarray:
    """The middle (x, y, z) voxels of a volume, air where they reach beyond it."""

    def inside(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return hu[tuple(slice(a, b) for a, b in zip(low, high))]

    return padded(inside, hu.shape, (np.array(hu.shape) - size) // 2, size)
