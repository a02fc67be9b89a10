"""The random patches that pre-training reads, and their order."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from augmentations import (
    PATCH_VIEW,
    MultiCropAugmentation,
    ViewBatch,
    ViewParameters,
    averaging_blocks,
    collate_views,
    keyed_rng,
)
from dino3d.block_masks import BlockMasks, PatchMasks, collate_masks
from dino3d.data.conventions import DataError
from dino3d.data.foreground import ForegroundDraws
from dino3d.data.requirements import pretraining_fault
from dino3d.data.volume import Volume
from dino3d.data.volume_cache import VolumeCache

PATCHES_PER_READ = 8  # patches of one volume that are near each other in an epoch: slow storage then has its file ready
RUNS_AT_ONCE = 256  # runs whose patches take turns, so that a batch holds as many different ones as possible


class Sample(NamedTuple):
    """patch: (x, y, z) int16, from the file `path`; views: what `MultiCropAugmentation.draw` gave; bad: DataErrors met
    on the way, as (path, reason); spacing: (3,) mm per voxel of the patch; masks: what `BlockMasks.draw` gave; missing:
    see `ForegroundDraws.missing`; box: three slices of the patch that were read, None: all of it."""

    patch: np.ndarray
    views: list[ViewParameters | None]
    bad: list[tuple[str, str]]
    path: str = ""
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    masks: np.ndarray | None = None
    missing: str = ""
    box: tuple[slice, ...] | None = None


class Failure(NamedTuple):
    """Why there are no samples, in one line, and all (path, reason) that a worker has met in the epoch."""

    reason: str
    bad: list[tuple[str, str]]


class Batch(NamedTuple):
    """patches: (B, X, Y, Z) int16; groups: see `collate_views`; bad: (path, reason) pairs; fatal: why nothing came;
    paths, spacings: the file of each patch, and its (3,) mm per voxel; masks: of the global views, with iBOT;
    missing: (path, why it was drawn elsewhere) pairs; boxes: see `seen`."""

    patches: torch.Tensor
    groups: list[ViewBatch | None]
    bad: list[tuple[str, str]]
    fatal: str
    paths: tuple[str, ...] = ()
    spacings: tuple[tuple[float, ...], ...] = ()
    masks: PatchMasks | None = None
    missing: tuple[tuple[str, str], ...] = ()
    boxes: tuple[tuple[slice, ...] | None, ...] = ()

    def seen(self, sample: int) -> torch.Tensor:
        """(x, y, z) the part of a patch that was read, which holds all that views see; the rest may be anything."""
        box = self.boxes[sample] if self.boxes else None
        return self.patches[sample] if box is None else self.patches[sample][box]

    def to(self, device: torch.device | str) -> "Batch":
        """The same with its tensors on a device."""
        return self._replace(
            patches=self.patches.to(device, non_blocking=True),
            groups=[group and group.to(device) for group in self.groups],
        )

    def pin_views(self) -> "Batch":
        """The same with what says where its views lie in memory that CUDA copies from in the background."""
        return self._replace(groups=[group and group.map(torch.Tensor.pin_memory) for group in self.groups])


class PretrainingPatches(Dataset):
    """A random base patch of each volume and the parameters of its views, for keys (epoch, sample).

    paths: the volumes; multi_crop: augmentations.MultiCropAugmentation; seed: of all draws
    patches_per_volume: samples of each volume, one number or one for each: those of the first volume come first
    strict: an unreadable file ends the run; otherwise the next readable one in the list takes its place
    max_bad: unreadable files of an epoch that one worker puts up with; None: any number
    block_masks: which patches of the global views are hidden from the student; None: none
    foreground: where patches are drawn; None: anywhere; cache: VolumeCache of each worker
    """

    def __init__(
        self,
        paths: Sequence[str],
        multi_crop: MultiCropAugmentation,
        seed: int,
        patches_per_volume: int | Sequence[int] = 1,
        strict: bool = False,
        max_bad: int | None = None,
        block_masks: BlockMasks | None = None,
        foreground: ForegroundDraws | None = None,
        cache: VolumeCache | None = None,
    ) -> None:
        self.paths, self.multi_crop, self.seed, self.block_masks = paths, multi_crop, seed, block_masks
        self.foreground, self.cache = foreground, cache or VolumeCache()
        self.strict = strict
        self.patches_per_volume = np.broadcast_to(patches_per_volume, len(paths)).tolist()
        self._ends = np.cumsum(self.patches_per_volume)  # (volumes,) sample behind each one's
        self.max_bad = len(paths) if max_bad is None else max_bad
        self._epoch, self._bad = None, {}  # {path: reason} that this worker has met in the epoch: not tried again
        self._looked_at = set()  # files of others that this worker knows to be CTs in HU

    def __getitems__(
        self, keys: Sequence[tuple[int, int]], slots: np.ndarray | None = None, whole: bool = True
    ) -> list[Sample] | list[Failure]:
        """The samples of a batch, or [Failure]; those of one volume share one opening of its file.

        slots: (keys, X, Y, Z) int16 memory that patches, all of this size, are written to; default: new memory
        whole: False: what no view sees of them is not written
        """
        volumes = np.searchsorted(self._ends, [sample for _, sample in keys], side="right").tolist()
        met = {volume: place for place, volume in reversed(list(enumerate(volumes)))}  # where each volume comes first
        samples, opened = [None] * len(keys), None
        try:
            for place in sorted(range(len(keys)), key=lambda place: met[volumes[place]]):
                (epoch, sample), bad = keys[place], []
                if epoch != self._epoch:  # what failed may have been the network's fault, which passes
                    self._epoch, self._bad = epoch, {}
                for attempt in range(len(self.paths)):
                    path = self.paths[(volumes[place] + attempt) % len(self.paths)]
                    try:
                        if path in self._bad:
                            raise DataError(path, self._bad[path])
                        if opened is None or opened.path != path:
                            if opened is not None:
                                opened.close()
                            opened = None
                            opened = self.cache.get(path)
                            self._require_ct(opened)
                        slot = None if slots is None else slots[place]
                        drawn = self._draw(opened, epoch, sample, slot, whole)
                        masks = self.block_masks and self.block_masks.draw(self.seed, epoch, sample)
                        missing = self.foreground.missing(opened) if self.foreground else ""
                        samples[place] = drawn._replace(bad=bad, masks=masks, missing=missing)
                        break
                    except DataError as error:
                        self._bad[path] = error.reason
                        bad.append((error.path, error.reason))
                        if self.strict:
                            raise
                        if len(self._bad) > self.max_bad:
                            raise DataError(
                                f"{len(self._bad)} of {len(self.paths)} files",
                                f"can't be used, such as {path}: {error.reason}",
                            ) from error
                else:
                    raise DataError(
                        f"{len(self.paths)} files", f"not one can be used, such as {bad[0][0]}: {bad[0][1]}"
                    )
        except DataError as error:  # an exception would reach the main process as a traceback's text
            return [Failure(str(error), list(self._bad.items()))]
        finally:
            if opened is not None:
                opened.close()
        return samples

    def _require_ct(self, volume: Volume) -> None:
        """Raise DataError where a file that no conversion has looked at is no CT in HU, which a patch may not tell."""
        if volume.converted or volume.path in self._looked_at:
            return
        if problem := pretraining_fault(volume.read(), volume.converted):
            raise DataError(volume.path, problem)
        self._looked_at.add(volume.path)

    def _draw(self, volume: Volume, epoch: int, sample: int, slot: np.ndarray | None, whole: bool) -> Sample:
        """Where the views have a spacing of their own, a much finer volume is averaged over blocks of voxels first, as
        far as its finest views allow."""
        crops, rng = self.multi_crop, keyed_rng(self.seed, epoch, sample, PATCH_VIEW)
        spacing = np.array(volume.spacing)
        stretch = np.ones(3) if crops.spacing is None else np.array(crops.spacing) / spacing  # file's voxels per view's
        factors = np.array(averaging_blocks(stretch * crops.finest))  # (3,) sides of the blocks
        # Spacings in files are rounded: - 1e-3 keeps a view's voxels on the file's where both are meant to be equal
        size = np.ceil(np.array(crops.patch_size) * stretch / factors - 1e-3).astype(int) * factors
        core = np.ceil(np.array(crops.core) * stretch - 1e-3).astype(int)
        centre = self.foreground.draw(volume, rng) if self.foreground else None
        start = place_patch(rng, np.array(volume.shape), core, size, centre)
        spacing = spacing * factors
        views = crops.draw(self.seed, epoch, sample, tuple((size // factors).tolist()), spacing)
        box = None if slot is None or whole else crops.seen_box(views, size)
        if slot is None:
            patch = read = volume.read(start, size)
        else:
            patch, read = slot, slot if box is None else slot[box]
            start = start if box is None else start + [part.start for part in box]
            volume.read_into(read, start)
        low, high = np.clip(-start, 0, read.shape), np.clip(volume.shape - start, 0, read.shape)
        inside = read[tuple(map(slice, low, high))]  # air around it would hide a constant volume from some draws
        if is_flat(inside[::8, ::8, ::8]) and is_flat(inside) and volume.is_constant():  # the first tells in most cases
            raise DataError(volume.path, f"has the same value in all voxels ({volume.read(size=(1, 1, 1)).item()})")
        return Sample(block_mean(patch, factors), views, [], volume.path, tuple(spacing.tolist()), box=box)


def place_patch(
    rng: np.random.RandomState, shape: np.ndarray, core: np.ndarray, size: np.ndarray, centre: np.ndarray | None = None
) -> np.ndarray:
    """(3,) first voxel of a patch of `size` whose middle `core` lies anywhere in a volume of `shape`, all (3,) voxels,
    or around the voxel `centre` as far as the volume has room for it.

    The margin around the core stays inside too, so that turned views don't look beyond the volume, unless that left
    less than half of the room to choose from. A volume smaller than the core sits in its middle.
    """
    room = shape - core
    margin = (size - core) // 2  # before the core; behind it there may be one voxel more
    low = np.where(room > 0, np.minimum(margin, room // 4), room // 2)
    high = np.where(room > 0, room - np.minimum(size - core - margin, room // 4), room // 2)
    if centre is None:
        return rng.randint(low, high + 1) - margin
    return np.clip(centre - core // 2, low, high) - margin


def block_mean(patch: np.ndarray, factors: Sequence[int] | np.ndarray) -> np.ndarray:
    """Mean over blocks of factors[0] x factors[1] x factors[2] voxels, which must divide the patch; int16, rounded."""
    if (np.asarray(factors) == 1).all():
        return patch
    x, y, z = np.array(patch.shape) // factors
    blocks = patch.reshape(x, factors[0], y, factors[1], z, factors[2])
    return np.rint(blocks.mean((1, 3, 5), dtype=np.float32)).astype(np.int16)


def is_flat(voxels: np.ndarray) -> bool | np.bool_:
    """Whether all voxels are equal, or there is none."""
    return not voxels.size or voxels.min() == voxels.max()


def collate(samples: list[Sample] | list[Failure], patches: torch.Tensor | None = None) -> Batch:
    """A Batch of Samples. patches: (B, X, Y, Z) theirs, if they lie in one tensor already; default: see
    `stack_patches`."""
    if isinstance(samples[0], Failure):
        return Batch(torch.empty(0), [], samples[0].bad, samples[0].reason)
    patches = stack_patches([sample.patch for sample in samples]) if patches is None else patches
    bad = list(dict.fromkeys(pair for sample in samples for pair in sample.bad))
    return Batch(
        patches,
        collate_views([sample.views for sample in samples]),
        bad,
        "",
        tuple(sample.path for sample in samples),
        tuple(sample.spacing for sample in samples),
        None if samples[0].masks is None else collate_masks([sample.masks for sample in samples]),
        tuple((sample.path, sample.missing) for sample in samples if sample.missing),
        tuple(sample.box for sample in samples),
    )


def stack_patches(patches: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, X, Y, Z) int16 of (x, y, z) patches, of different sizes padded at their far ends by repeating the border.

    That is what views see beyond a patch anyway, so they don't depend on which samples share a batch. In memory x is
    the fastest axis, as in files; a loader's worker writes straight into memory that it shares with the main process.
    """
    size = np.max([patch.shape for patch in patches], axis=0).tolist()
    stacked = torch.empty((len(patches), *size[::-1]), dtype=torch.int16).permute(0, 3, 2, 1)  # (B, X, Y, Z)
    if get_worker_info():
        stacked.share_memory_()
    for slot, patch in zip(stacked.numpy(), patches):
        x, y, z = patch.shape
        slot[:x, :y, :z] = patch
        slot[x:] = slot[x - 1 : x]
        slot[:, y:] = slot[:, y - 1 : y]
        slot[:, :, z:] = slot[:, :, z - 1 : z]
    return stacked


def epoch_order(volumes: int, patches_per_volume: int | Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """(samples,) numbers of all samples in the order of an epoch, the same on every rank.

    patches_per_volume: samples of each volume, one number or one for each: those of the first volume come first
    A volume's samples are cut into runs of up to PATCHES_PER_READ, which are spread evenly over the epoch. RUNS_AT_ONCE
    or more runs take turns, one sample each, so that neighbours in the order are of different volumes as far as there
    are any, while those of one run are near enough for storage that is slow at the first opening of a file.
    """
    counts = np.broadcast_to(patches_per_volume, volumes)
    volume, turn = _turns(-(-counts // PATCHES_PER_READ))  # (R,) whose each run is, and which of its volume's
    first = (np.cumsum(counts) - counts)[volume] + turn * PATCHES_PER_READ  # (R,) sample
    length = np.minimum(counts[volume] - turn * PATCHES_PER_READ, PATCHES_PER_READ)  # (R,) samples
    drawn = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(len(volume))
    drawn = drawn[_evenly(turn[drawn], -(-counts // PATCHES_PER_READ)[volume[drawn]], np.arange(len(drawn)))]
    order = []
    for group in np.array_split(drawn, max(1, len(drawn) // RUNS_AT_ONCE)):
        run, turn = _turns(length[group])  # (samples,) which run of the group, which of its samples
        order.append((first[group][run] + turn)[_evenly(turn, length[group][run], run)])
    return np.concatenate(order)


def _turns(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((n,) which one, (n,) which of its turns) of those that have `counts` turns each, one after the other."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _evenly(turn: np.ndarray, turns: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """(n,) order in which whoever has `turns` turns has one in each of as many equal parts of the time, by rank in it.

    turn, turns: (n,) which of how many; rank: (n,) whole numbers from 0 on
    """
    return np.argsort((turn + rank / (rank.max() + 1)) / turns, kind="stable")


class BatchStream(Sampler):
    """Batch sampler of keys (epoch, sample) from a position in the run to its end, without a pause between epochs.

    The epoch's order is cut into global batches and each of those into the ranks' shares, so that the samples of a
    step do not depend on the number of ranks, nor on the batches that each share is cut into. What is left at an
    epoch's end and fills no global batch is dropped.

    volumes, patches_per_volume, seed: see `epoch_order`
    batch_size: of one rank; rank, world_size
    epoch, position: where to start, in epochs and in samples of that epoch; epochs: where to end
    accumulate_steps: batches of one rank that make its share of a global batch
    """

    def __init__(
        self,
        volumes: int,
        patches_per_volume: int | Sequence[int],
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        epoch: int,
        position: int,
        epochs: int,
        accumulate_steps: int = 1,
    ) -> None:
        self.order_of = lambda epoch: epoch_order(volumes, patches_per_volume, seed, epoch)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start, self.epochs, self.accumulate_steps = (epoch, position), epochs, accumulate_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, position = self.start
        for epoch in range(first, self.epochs):
            order = self.order_of(epoch)
            share = self.batch_size * self.accumulate_steps
            step = share * self.world_size
            for at in range(position, len(order) - step + 1, step):
                mine = order[at + self.rank * share :][:share]  # this rank's samples of the step
                for batch in mine.reshape(self.accumulate_steps, self.batch_size):
                    yield [(epoch, int(sample)) for sample in batch]
            position = 0
