"""Whole CTs through a network: to the grid that it works on, in windows over it, and back to the scan's own.

A scan of any size, orientation and spacing is brought to a working grid: upright, so that its axes are the world's
right, anterior and superior whatever those of the file are, at the spacing that the network knows. The network sees it
window by window. Log-probabilities, and not the classes, are then interpolated back to the voxels of the file, since
borders between classes would become steps otherwise.

Images are as in dino3d/data/images.py. Volumes of log-probabilities are (classes, X, Y, Z) float32 on the CPU, finite.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import Tensor

from augmentations import scale_intensity
from dino3d.data import images, resampling
from dino3d.data.conventions import AIR
from dino3d.data.layouts import Pair, read_pair

LEVELS = 65535  # steps of a probability that is stored as a whole number
BLOCK = 64  # voxels per side of what is interpolated at once
TISSUE_ABOVE = -900  # HU: where no voxel of a window is above it there is nothing to segment; lungs have vessels
MARGIN = 1.25  # of a device's memory: what stitching takes besides the volumes that are counted


class Grid(NamedTuple):
    """Where an image's voxels lie, in ITK's terms.

    size: (3,) voxels; spacing: (3,) mm; origin: (3,) mm LPS of the first voxel's centre
    direction: (9,) rows of a matrix, whose columns are the unit vectors of the axes in LPS
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) from voxel indices to LPS mm."""
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(self.direction, (3, 3)) * self.spacing
        affine[:3, 3] = self.origin
        return affine

    def part(self, low: Sequence[int] | np.ndarray, high: Sequence[int] | np.ndarray) -> "Grid":
        """The Grid of the voxels from `low` on and before `high`."""
        origin = (self.affine @ [*low, 1])[:3]
        return self._replace(size=tuple(int(n) for n in np.subtract(high, low)), origin=tuple(origin.tolist()))

    def image(self, voxels: np.ndarray) -> sitk.Image:
        """A SimpleITK.Image of an (X, Y, Z) array that lies here."""
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image


def grid_of(image: sitk.Image) -> Grid:
    """The Grid of a SimpleITK.Image."""
    return Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


# ----------------------------------------------------------------------------------------------- reading, to the grid


def read_case(pair: Pair) -> tuple[sitk.Image, sitk.Image]:
    """(image int16 HU, label uint8), SimpleITK.Images in RAS on one grid, of a layouts.Pair.

    Raises DataError where one can't be used, both don't lie on the same grid.
    """
    image, label, affine = read_pair(pair)
    return images.make_image(image, affine), images.make_image(label, affine)


def to_network_grid(
    image: sitk.Image, spacing: Sequence[float], is_label: bool = False, upright: bool = True
) -> sitk.Image:
    """An image in RAS on the working grid: upright, with voxels of `spacing` (3,) mm over all of its extent.

    Linear and averaged where the grid is coarser, nearest for labels; air or 0 where a tilted image does not reach.
    Itself where it stands upright and has this spacing, to 1e-3. upright: False: along the image's own axes
    """
    lies = not upright or resampling.is_upright(image)
    if lies and np.allclose(image.GetSpacing(), spacing, rtol=1e-3, atol=0):
        return image
    return resampling.resample(image, spacing, is_label, upright)


# --------------------------------------------------------------------------------------------------------- in windows


class Windows(NamedTuple):
    """What a network sees of a volume at once.

    size: (3,) voxels; overlap: share of a window's side that it has in common with the next one, at least 0 and below 1
    batch_size: windows per forward pass
    """

    size: tuple[int, ...]
    overlap: float = 0.5
    batch_size: int = 1


def count_batches(size: Sequence[int], windows: Windows) -> int:
    """Batches of windows in which a network sees a volume of `size` (3,) voxels."""
    steps = np.maximum((np.array(windows.size) * (1 - windows.overlap)).astype(int), 1)
    beyond = np.maximum(np.array(size) - windows.size, 0)
    return math.ceil(math.prod((np.ceil(beyond / steps) + 1).astype(int).tolist()) / windows.batch_size)


def segment(
    networks: Iterable[Callable[[Tensor], Tensor]],
    image: sitk.Image,
    windows: Windows,
    clip_range: Sequence[float],
    device: torch.device | str,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    stitch_on_cpu: bool | None = None,
    before_windows: Callable[[], None] = lambda: None,
    skip_air: bool = False,
) -> Tensor:
    """(classes, X, Y, Z) log-probabilities of an image on its working grid.

    networks: several, such as those of all folds, are averaged; each gives logits (B, classes, x, y, z) of windows
        (B, 1, x, y, z) with HU scaled to [0, 1], is on `device` and in evaluation mode
    windows: Windows, whose logits are weighted by a Gaussian around their middle; a smaller image is padded with air
    clip_range: (low, high) HU that become 0 and 1; autocast: gives the context that the networks run in
    stitch_on_cpu: whether the windows are put together there; None: if the device's memory is too small for that
    before_windows: called before each batch of windows; what it raises ends the work
    skip_air: whether windows without a voxel above TISSUE_ABOVE are not seen; what a network gives for one of nothing
        but air stands for it. Classes can differ by that in voxels of such windows alone
    """
    voxels = torch.from_numpy(np.array(images.voxels_of(image), order="C"))[None, None]  # (1, 1, X, Y, Z)
    device = torch.device(device)
    return mean_of(
        _log_probabilities(
            network, voxels, windows, clip_range, device, autocast, stitch_on_cpu, before_windows, skip_air
        )
        for network in networks
    )


def _log_probabilities(
    network: Callable[[Tensor], Tensor],
    voxels: Tensor,
    windows: Windows,
    clip_range: Sequence[float],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager],
    stitch_on_cpu: bool | None,
    before_windows: Callable[[], None],
    skip_air: bool,
) -> Tensor:
    """(classes, X, Y, Z) log-probabilities of one network. voxels: (1, 1, X, Y, Z) HU."""

    @functools.cache
    def logits_of_air() -> Tensor:
        return network_on(torch.full((1, 1, *windows.size), float(AIR), device=device))

    def logits_of(hu: Tensor) -> Tensor:
        before_windows()
        if not skip_air:
            return network_on(hu)
        seen = hu.flatten(1).amax(1) > TISSUE_ABOVE  # (B,)
        if seen.all():
            return network_on(hu)
        logits = logits_of_air().repeat(len(hu), 1, 1, 1, 1)
        if seen.any():
            logits[seen] = network_on(hu[seen])
        return logits

    def network_on(hu: Tensor) -> Tensor:
        with autocast():
            # float: bf16 would lose digits once the windows are weighted and summed
            return network(scale_intensity(hu, *clip_range)).float()

    # HU, scaled window by window: what surrounds a small image is then air whatever the clip range is
    logits = stitch(logits_of, voxels, windows, device, stitch_on_cpu)  # (classes, X, Y, Z)
    total = logits[0].clone()  # log_softmax would need all of the logits a second time
    for one in logits[1:]:
        torch.logaddexp(total, one, out=total)
    return logits.sub_(total).cpu()


@torch.no_grad()
def stitch(
    outputs_of: Callable[[Tensor], Tensor],
    volume: Tensor,
    windows: Windows,
    device: torch.device,
    stitch_on_cpu: bool | None = None,
) -> Tensor:
    """(K, X, Y, Z) what `outputs_of` gives for a volume, window by window, weighted by a Gaussian around the middle of
    each.

    outputs_of: gives (B, K, x, y, z) float32 of windows (B, C, x, y, z) on `device`
    volume: (1, C, X, Y, Z) HU; one that is smaller than a window is padded with air
    stitch_on_cpu: whether the windows are put together there; None: if the device's memory is too small for that
    """
    if stitch_on_cpu is None:
        stitch_on_cpu = device.type == "cuda" and not _fits(outputs_of, volume, windows, device)
    place = torch.device("cpu") if stitch_on_cpu else device
    sides = volume.shape[2:]
    beyond = [max(n - side, 0) for n, side in zip(windows.size, sides)]
    if any(beyond):
        pad = [n for missing in reversed(beyond) for n in (missing // 2, missing - missing // 2)]
        volume = F.pad(volume, pad, value=AIR)
    volume = volume.to(place)
    weights = gaussian(windows.size).to(place)
    sums, count = None, torch.zeros(volume.shape[2:], device=place)
    corners = list(itertools.product(*map(_starts, volume.shape[2:], windows.size, itertools.repeat(windows.overlap))))
    for first in range(0, len(corners), windows.batch_size):
        lows = corners[first : first + windows.batch_size]
        boxes = [tuple(map(slice, low, np.add(low, windows.size))) for low in lows]
        batch = torch.cat([volume[(..., *box)] for box in boxes]).to(device, torch.float32)
        outputs = outputs_of(batch).to(place)
        sums = torch.zeros((outputs.shape[1], *count.shape), device=place) if sums is None else sums
        for box, output in zip(boxes, outputs):
            sums[(slice(None), *box)].addcmul_(output, weights)
            count[box].add_(weights)
    sums.div_(count)
    return sums[(slice(None), *(slice(n // 2, n // 2 + side) for n, side in zip(beyond, sides)))]


def gaussian(size: Sequence[int]) -> Tensor:
    """(x, y, z) how much each voxel of a window counts: 1 in its middle, an eighth of its side being one standard
    deviation, and 0.001 at least (Isensee et al. 2021, supplementary note 2)."""
    weights = torch.ones((), dtype=torch.float64)
    for n in size:
        offset = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (offset / (n / 8)) ** 2)
    return weights.clamp_min(1e-3).float()


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """First voxels along an axis of the windows over `side` voxels; the last one ends with them."""
    step = max(int(window * (1 - overlap)), 1)
    return [*range(0, side - window, step), side - window]


def _fits(outputs_of: Callable[[Tensor], Tensor], volume: Tensor, windows: Windows, device: torch.device) -> bool:
    """Whether a GPU's memory holds the volumes of stitching, besides what the network needs for a batch of windows."""
    batch = torch.full((windows.batch_size, volume.shape[1], *windows.size), float(AIR), device=device)
    outputs = outputs_of(batch).shape[1]  # its memory is now reserved, and no longer counted as free
    sides = np.maximum(volume.shape[2:], windows.size)
    volumes = outputs + volume.shape[1] + 3  # outputs, input; count map, and two while logits are normalized
    return MARGIN * 4 * volumes * math.prod(int(n) for n in sides) < torch.cuda.mem_get_info(device)[0]


def mean_of(log_probabilities: Iterable[Tensor]) -> Tensor:
    """Logarithm of the arithmetic mean of probabilities.

    log_probabilities: tensors of one shape, of which two are in memory at a time; the first is overwritten
    """
    total, count = None, 0
    for one in log_probabilities:
        total = one if total is None else torch.logaddexp(total, one, out=total)
        count += 1
    return total.sub_(math.log(count))


# ----------------------------------------------------------------------------------------------- to the scan's voxels


def to_scan_grid(log_probabilities: Tensor | np.ndarray, working: Grid, own: Grid) -> sitk.Image:
    """A SimpleITK.Image of uint8 classes on the scan's own Grid.

    log_probabilities: (classes, X, Y, Z) on the Grid `working`; linearly interpolated, then the most probable class.
    The same voxels, merely flipped or permuted, are taken as they are. Background where `working` ends more than a
    voxel before: half of one is what rounding to whole voxels may leave out.
    """
    maps = np.asarray(log_probabilities)
    to_index = np.linalg.solve(working.affine, own.affine)  # (4, 4) from own to working voxel indices
    same = _flips_and_axes(to_index, working.size, own.size)
    if same:
        axes, flips = same
        return own.image(_most_probable(maps).transpose(axes)[flips])
    mask = np.zeros(own.size, np.uint8)
    for low, high in _blocks(own.size):
        mask[tuple(map(slice, low, high))] = _block_of(maps, working, own.part(low, high), to_index, low)
    return own.image(mask)


def to_scan_levels(log_probabilities: Tensor | np.ndarray, working: Grid, own: Grid) -> np.ndarray:
    """(classes - 1, X, Y, Z) uint16 on the scan's own Grid: LEVELS times the probability of each foreground class.

    log_probabilities: as `to_scan_grid` takes them, and to the same end: with two classes its mask is where the level
    is above half of LEVELS.
    """
    maps = np.asarray(log_probabilities)
    to_index = np.linalg.solve(working.affine, own.affine)
    same = _flips_and_axes(to_index, working.size, own.size)
    levels = np.zeros((len(maps) - 1, *own.size), np.uint16)
    for low, high in _blocks(own.size):
        block, here = own.part(low, high), tuple(map(slice, low, high))
        if same:
            axes, flips = same
            values = np.stack([one.transpose(axes)[flips][here] for one in maps])
            beyond = None
        else:
            part, place, beyond = _around(maps, working, block, to_index, low)
            values = np.stack([interpolate(one, place, block) for one in part])  # (classes, x, y, z)
        found = np.exp(values - values.max(0))
        found = np.rint(found[1:] / found.sum(0) * LEVELS)
        if len(maps) == 2:  # what rounds to the middle goes where the mask has it
            found[0] = np.where(values[1] > values[0], np.maximum(found[0], LEVELS // 2 + 1), found[0])
            found[0] = np.where(values[1] > values[0], found[0], np.minimum(found[0], LEVELS // 2))
        if beyond is not None:
            found[:, beyond] = 0
        levels[(slice(None), *here)] = found
    return levels


def _blocks(size: Sequence[int]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(first voxel, the one behind the last) of the blocks that a volume of `size` (3,) voxels is cut into."""
    for low in itertools.product(*(range(0, n, BLOCK) for n in size)):
        yield low, np.minimum(np.add(low, BLOCK), size)


def _flips_and_axes(
    to_index: np.ndarray, working: Sequence[int], own: Sequence[int]
) -> tuple[np.ndarray, tuple[slice, ...]] | None:
    """(axes, slices) that make an array of shape `working` one of shape `own` with voxels at the same places, or None.

    to_index: (4, 4) from own to working voxel indices
    """
    axes = np.abs(to_index[:3, :3]).argmax(0)  # (3,) the working axis that each own axis goes along
    signs = np.sign(to_index[axes, range(3)]).astype(int)
    if sorted(axes) != [0, 1, 2] or tuple(np.take(working, axes)) != tuple(own):
        return None
    exact = np.zeros((4, 4))
    exact[axes, range(3)], exact[3, 3] = signs, 1
    exact[axes, 3] = np.where(signs < 0, np.array(own) - 1, 0)
    if np.abs((to_index - exact) @ _corners((0, 0, 0), own)).max() > 0.01:  # of a voxel
        return None
    return axes, tuple(slice(None, None, sign) for sign in signs)


def _corners(low: Sequence[int], high: Sequence[int] | np.ndarray) -> np.ndarray:
    """(4, 8) homogeneous indices of the voxels at the corners of a box from `low` on and before `high`."""
    return np.array([(*corner, 1.0) for corner in itertools.product(*zip(low, np.subtract(high, 1)))]).T


def _most_probable(maps: Iterable[np.ndarray]) -> np.ndarray:
    """uint8 number of the map with the highest value at each voxel, the first of several; two maps are kept at a
    time."""
    maps = iter(maps)
    best = np.array(next(maps))
    classes = np.zeros(best.shape, np.uint8)
    for number, one in enumerate(maps, 1):
        better = one > best
        classes[better] = number
        np.copyto(best, one, where=better)
    return classes


def _block_of(maps: np.ndarray, working: Grid, block: Grid, to_index: np.ndarray, low: Sequence[int]) -> np.ndarray:
    """(x, y, z) uint8 classes of a part of the own grid. block: its Grid, from the own voxel `low` on."""
    part, place, beyond = _around(maps, working, block, to_index, low)
    found = _most_probable(part)
    if (found == found[0, 0, 0]).all():  # and what is interpolated between is of this class too
        classes = np.full(block.size, found[0, 0, 0], np.uint8)
    else:
        classes = _most_probable(interpolate(one, place, block) for one in part)
    if beyond is not None:
        classes[beyond] = 0
    return classes


def _around(
    maps: np.ndarray, working: Grid, block: Grid, to_index: np.ndarray, low: Sequence[int]
) -> tuple[np.ndarray, Grid, np.ndarray | None]:
    """((classes, x, y, z) the part of the maps around a block of the own grid, its Grid, (x, y, z) bool voxels of the
    block beyond the maps, or None)."""
    reached = (to_index @ _corners(low, np.add(low, block.size)))[:3]  # (3, 8) working voxels of its corners
    limit = np.array(working.size)[:, None]
    first = np.clip(np.floor(reached.min(1)) - 1, 0, limit[:, 0] - 1).astype(int)
    last = np.clip(np.ceil(reached.max(1)) + 1, 0, limit[:, 0] - 1).astype(int)
    beyond = None
    if ((reached < -1.5) | (reached > limit + 0.5)).any():
        index = np.indices(block.size, np.float32).reshape(3, -1) + np.reshape(low, (3, 1))
        index = to_index[:3, :3] @ index + to_index[:3, 3:]  # (3, voxels)
        beyond = ((index < -1.5) | (index > limit + 0.5)).any(0).reshape(block.size)
    return maps[(slice(None), *map(slice, first, last + 1))], working.part(first, last + 1), beyond


def interpolate(values: np.ndarray, working: Grid, own: Grid) -> np.ndarray:
    """(X, Y, Z) float32 at the voxels of the Grid `own` of values (x, y, z) on the Grid `working`: linear between its
    voxels, beyond the outermost ones as they are."""
    # One voxel more on each side: where an image ends, ITK is linear to half a voxel from the last centre only
    image = working.part((-1, -1, -1), np.add(working.size, 1)).image(np.pad(values, 1, mode="edge"))
    found = sitk.Resample(
        image,
        own.size,
        sitk.Transform(),
        sitk.sitkLinear,
        own.origin,
        own.spacing,
        own.direction,
        0.0,
        sitk.sitkFloat32,
        True,
    )
    return sitk.GetArrayFromImage(found).transpose(2, 1, 0)
