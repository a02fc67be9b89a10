"""Crops as training and evaluation see them.

Everything random is a function of --seed, the epoch and the case, so that neither the number of loader workers nor the
number of processes nor an interruption changes what a case is trained on.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from augmentations import (
    Lattice,
    PatchSource,
    Policy,
    ViewBatch,
    ViewParameters,
    collate_views,
    keyed_rng,
    render_views,
    warp,
)
from dino3d.command_line import UserError, format_values
from dino3d.data.conventions import DataError, format_size
from dino3d.data.requirements import (
    Header,
    crop_faults,
    header_of,
    hu_warnings,
    is_same_spacing,
    most_common,
    no_image,
    note_lines,
    size_fault,
    spacing_warnings,
    voxel_problems,
    whole_ct,
)
from dino3d.data.volume import Volume
from utils import Processes

LOOKED_AT = 256  # crops of a data set whose voxels are looked at before training starts
READ_AHEAD = 2  # batches
ROUNDING = 1e-3  # relative difference of two spacings that rounding in headers explains


def read_headers(paths: Sequence[str], processes: Processes) -> list[Header]:
    """[Header] of volumes, the same on every rank. Raises UserError, on all ranks, for one that can't be read."""
    headers = try_on_all(header_of, paths, processes)
    for header in headers:
        if isinstance(header, DataError):
            raise UserError(str(header), everywhere=True)
    return headers


def try_on_all(look: Callable[[str], Any], paths: Sequence[str], processes: Processes) -> list[Any]:
    """[what `look` gives for each path, or the DataError that it raises], the same on every rank; ranks share them."""

    def attempt(path: str) -> Any:
        try:
            return look(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor(8) as pool:  # mostly waiting, for network drives
        mine = list(pool.map(attempt, paths[processes.rank :: processes.world_size]))
    found = [None] * len(paths)
    for rank, part in enumerate(processes.all_gather(mine)):
        found[rank :: processes.world_size] = part
    return found


def check_crops(paths: Sequence[str], processes: Processes) -> tuple[dict[str, Any], list[str]]:
    """({"crop_size": (3,) voxels of all crops, "crop_spacing": (3,) mm of most, "crop_spacings_differ": whether others
    have another}, lines on what is odd). Reads every header, and voxels of some crops.

    Raises UserError, on all ranks, for one that can't be read and for what `crop_faults` finds.
    """
    headers = read_headers(paths, processes)
    seen = look_at_some(paths, processes)
    faults = [fault for fault in seen.values() if isinstance(fault, DataError)]
    if not faults:
        faults, lines = crop_faults(paths, headers, seen)
    if faults:
        raise UserError(str(faults[0]), everywhere=True)
    spacings = [header.spacing for header in headers]
    most = most_common(spacings)
    found = {
        "crop_size": list(headers[0].shape),
        "crop_spacing": [round(s, 4) for s in most],
        "crop_spacings_differ": not np.allclose(spacings, most, rtol=ROUNDING, atol=0),
    }
    return found, lines


def look_at_some(paths: Sequence[str], processes: Processes) -> dict[str, tuple[str, str] | DataError]:
    """{path: `voxel_problems`, or why it can't be read} of about LOOKED_AT volumes."""

    def look(path: str) -> tuple[str, str]:
        with Volume(path) as volume:
            return voxel_problems(volume.read())

    few = paths[:: max(1, len(paths) // LOOKED_AT)]
    return dict(zip(few, try_on_all(look, few, processes)))


def new_crop_lines(
    paths: Sequence[str], expected: Sequence[float] | None, seen: Sequence[int], processes: Processes
) -> list[str]:
    """Lines on what is odd about crops to predict, as far as they can be read.

    expected: (3,) mm of training's crops; seen: (3,) voxels that the model saw of them
    """
    found = [(path, head) for path, head in zip(paths, try_on_all(header_of, paths, processes)) if type(head) is Header]
    if not found:
        return []
    names, headers = zip(*found)
    # Those that are no image at all have a row with the reason
    hu = {path: one[1] for path, one in look_at_some(names, processes).items() if type(one) is tuple and not one[0]}
    lines = hu_warnings([*hu], [*hu.values()], share=0.5) + note_lines(names, [header.notes for header in headers])
    smaller = [(name, one.shape) for name, one in zip(names, headers) if any(n < m for n, m in zip(one.shape, seen))]
    if smaller:
        name, shape = smaller[0]
        lines.append(
            f"warning: {len(smaller)} of {len(names)} files have less than the {format_size(seen)} voxels that the "
            f"model saw of training's crops, such as {name}: {format_size(shape)}: air is put around them"
        )
    if expected is None:
        return lines
    return spacing_warnings(names, [header.spacing for header in headers], expected, "training's crops") + lines


def spacing_of(path: str) -> tuple[float, ...]:
    """(3,) mm per voxel of a volume. Raises UserError."""
    try:
        with Volume(path) as volume:
            return volume.spacing
    except DataError as error:
        raise UserError(str(error)) from error


def spacing_warning(found: Sequence[float], expected: Sequence[float] | None, whose: str, against: str) -> list[str]:
    """[] or [one line] where two spacings, (3,) mm, differ. whose, against: what the line calls them, with a verb"""
    if expected is None or is_same_spacing(found, expected):
        return []
    found, expected = (format_values(np.round(spacing, 3)) for spacing in (found, expected))
    return [
        f"warning: {whose} a spacing of {found} mm, {against} {expected} mm: the encoder sees things at another size"
    ]


def read_crop(
    path: str,
    size: Sequence[int] | np.ndarray,
    expected: tuple[str, Sequence[int]] | None = None,
    trained: tuple[Sequence[int], Sequence[float] | None] | None = None,
) -> np.ndarray:
    """(x, y, z) int16 HU around the crop's centre: at least `size` voxels, padded with air, and all that lies beyond.

    expected: (first path, its size), which the crop must share
    trained: (size, mm) of training's crops, beside which a new one must not be a whole CT
    Raises DataError, also for a mask.
    """
    with Volume(path) as volume:
        if expected and volume.shape != tuple(expected[1]):
            raise DataError(path, size_fault(volume.shape, *expected))
        if trained and (fault := whole_ct(volume.shape, volume.spacing, *trained)):
            raise DataError(path, fault)
        shape = np.array(volume.shape)
        whole = np.maximum(shape, size)
        crop = volume.read((shape - whole) // 2, whole)
    inside = crop[tuple(slice(a, a + n) for a, n in zip((whole - shape) // 2, shape))]  # without the air around
    if fault := no_image(inside):
        raise DataError(path, fault)
    return crop


def centre_window(crop: np.ndarray, size: Sequence[int] | np.ndarray) -> np.ndarray:
    """The middle `size` voxels of a crop that is at least as large."""
    start = (np.array(crop.shape) - size) // 2
    return crop[tuple(slice(a, a + n) for a, n in zip(start, size))]


class WindowAugmentation:
    """One augmented window of a crop around its centre, drawn per case and rendered per batch.

    policy: augmentations.Policy; size: (3,) voxels of the window; shift_range: (3,) voxels
    spacing: (3,) mm per voxel, for rotations in mm; None: in voxels, as in the paper
    """

    def __init__(
        self, policy: Policy, size: Sequence[int], shift_range: Sequence[int], spacing: Sequence[float] | None = None
    ):
        self.policy, self.size, self.shift_range = policy, np.array(size), np.array(shift_range)
        self.spacing = 1.0 if spacing is None else np.array(spacing)
        self.lattice = Lattice.for_views(size, policy)

    def draw(self, seed: int, epoch: int, case: int, crop_shape: Sequence[int]) -> list[ViewParameters]:
        """[ViewParameters] of one window, as `augmentations.collate_views` takes them."""
        rng = keyed_rng(seed, epoch, case, 0)
        # Whole voxels: a window that is neither turned nor scaled is not blurred by interpolation
        centre = (np.array(crop_shape) - self.size) // 2 + (self.size - 1) / 2
        centre = centre + rng.randint(-self.shift_range, self.shift_range + 1)
        matrix, displacements, intensity = self.policy.draw(rng, self.lattice.shape)
        control = self.lattice.control(matrix, centre, displacements, self.spacing, self.spacing)
        return [ViewParameters(control[None].astype(np.float32), [intensity])]

    def render(self, crops: torch.Tensor, group: ViewBatch, clip_range: Sequence[float]) -> torch.Tensor:
        """(B, 1, x, y, z) windows with grey values in [0, 1]. crops: (B, X, Y, Z) int16; group: of `collate_views`."""
        with torch.autocast(crops.device.type, enabled=False):  # positions need more than bf16's three digits
            return render_views(PatchSource(crops, clip_range, self.policy), self.lattice, group)

    def render_masks(self, masks: torch.Tensor, group: ViewBatch) -> torch.Tensor:
        """(B, x, y, z) int64 classes: the same geometry by nearest neighbour. masks: (B, X, Y, Z) uint8."""
        control = group.control
        return warp(masks[:, None].to(control.dtype), control, self.lattice, mode="nearest")[:, 0].long()


class CropBatch(NamedTuple):
    """crops: (B, X, Y, Z) int16 HU; cases: (B,) their numbers; counted: (B,) bool, False for a case that only fills a
    rank's share; group: see `collate_views`; masks: (B, X, Y, Z) uint8 classes, for tasks that have them; fatal: why
    nothing came."""

    crops: torch.Tensor
    cases: torch.Tensor
    counted: torch.Tensor
    group: ViewBatch | None
    masks: torch.Tensor | None = None
    fatal: str = ""

    def to(self, device: torch.device) -> "CropBatch":
        """The crops, their masks and how to augment them on a device; the rest stays where it is."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return self._replace(crops=self.crops.to(device, non_blocking=True), group=self.group.to(device), masks=masks)


class TrainingCrops(Dataset):
    """Whole crops and how to augment them, for keys (epoch, case, counted). paths: of all cases; size: of all crops."""

    def __init__(self, paths: Sequence[str], size: Sequence[int], augmentation: WindowAugmentation, seed: int):
        self.paths, self.expected, self.augmentation, self.seed = paths, (paths[0], size), augmentation, seed

    def path_of(self, case: int) -> str:
        return self.paths[case]

    def __getitem__(self, key: tuple[int, int, bool]) -> tuple[np.ndarray, int, bool, list[ViewParameters]] | str:
        epoch, case, counted = key
        try:
            crop = read_crop(self.paths[case], self.augmentation.size, self.expected)
        except DataError as error:  # an exception would reach the main process as a traceback's text
            return str(error)
        return crop, case, counted, self.augmentation.draw(self.seed, epoch, case, crop.shape)


class EvaluationCrops(Dataset):
    """The exact centre window of a crop, nothing random, by case number. size: (3,); the rest: see `read_crop`."""

    def __init__(
        self,
        paths: Sequence[str],
        size: Sequence[int],
        expected: tuple[str, Sequence[int]] | None = None,
        trained: tuple[Sequence[int], Sequence[float] | None] | None = None,
    ):
        self.paths, self.size, self.expected, self.trained = paths, np.array(size), expected, trained

    def __getitem__(self, case: int) -> tuple[np.ndarray, int, bool, None] | str:
        try:
            crop = read_crop(self.paths[case], self.size, self.expected, self.trained)
            return centre_window(crop, self.size), case, True, None
        except DataError as error:
            return str(error)


def collate_crops(samples: Sequence[tuple[Any, ...] | str]) -> CropBatch:
    """A CropBatch of samples (crop, case, counted, drawn views or None[, mask]), or of the text of what went wrong."""
    broken = [sample for sample in samples if isinstance(sample, str)]
    if broken:
        return CropBatch(torch.empty(0), torch.empty(0), torch.empty(0), None, fatal=broken[0])
    crops, cases, counted, drawn, *masks = zip(*samples)
    group = collate_views(drawn)[0] if drawn[0] else None
    masks = torch.from_numpy(np.stack(masks[0])) if masks else None
    return CropBatch(torch.from_numpy(np.stack(crops)), torch.tensor(cases), torch.tensor(counted), group, masks)


def read_ahead(read: Callable[[Any], Any], cases: Sequence[Any], batch_size: int, workers: int) -> Iterator[list[Any]]:
    """What `read` gives for each case, in batches in the order of cases; read by threads, at most READ_AHEAD batches
    before they are asked for.

    Threads, and not a DataLoader's processes: those would be forked anew for every validation, while threads of the
    collectives before it may still be at work, and in Python 3.11 such a fork can hang.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = collections.deque()
        for at in range(0, len(cases), batch_size):
            waiting.append([pool.submit(read, case) for case in cases[at : at + batch_size]])
            if len(waiting) > READ_AHEAD:
                yield [sample.result() for sample in waiting.popleft()]
        for samples in waiting:
            yield [sample.result() for sample in samples]


class TrainingBatches(Sampler):
    """Batch sampler of keys (epoch, case, counted) from a position in a fold to its end, with no pause between epochs.

    The epoch's order is cut into global batches and each of those into the ranks' shares, so that the cases of a step
    do not depend on the number of ranks. The last batch of an epoch may be smaller, and the shares of a batch may
    differ by one; a rank that is left without a case takes one that does not count, as every rank has to take the step.

    order_of: gives the cases of an epoch in their order, equal on every rank; batch_size: of one rank
    epoch, position: where to start, in epochs and in cases of that epoch; epochs: where to end
    """

    def __init__(
        self,
        order_of: Callable[[int], np.ndarray],
        batch_size: int,
        rank: int,
        world_size: int,
        epoch: int,
        position: int,
        epochs: int,
    ):
        self.order_of, self.rank, self.world_size = order_of, rank, world_size
        self.global_batch, self.start, self.epochs = batch_size * world_size, (epoch, position), epochs

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        first, position = self.start
        for epoch in range(first, self.epochs):
            order = self.order_of(epoch)
            for at in range(position, len(order), self.global_batch):
                batch = order[at : at + self.global_batch]
                mine = np.array_split(batch, self.world_size)[self.rank]
                yield [(epoch, int(case), True) for case in mine] or [(epoch, int(batch[0]), False)]
            position = 0


def schedule_notices(longest: int, epochs: int, warmup_epochs: float, global_batch: int) -> list[str]:
    """Lines where an epoch, of `longest` samples at most, is a single step, of which few epochs make few, and where the
    learning rate does not come to its peak."""
    lines = []
    if epochs and longest <= global_batch:
        lines.append(
            f"an epoch of {longest} samples is one step: {epochs} epochs are {epochs} steps; for more of them lower "
            "--batch_size_per_gpu"
        )
    if epochs and warmup_epochs >= epochs:
        lines.append(
            f"--warmup_epochs {warmup_epochs:g} of --epochs {epochs}: the learning rate rises to the end and never "
            "falls: lower --warmup_epochs"
        )
    return lines
