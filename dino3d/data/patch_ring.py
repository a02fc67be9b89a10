"""Memory that is allocated once and that the patches of all batches take turns in, written to by a loader's workers.

New memory for every batch costs a worker more than what is written to it, fills /dev/shm, and would be copied by the
process that trains before a GPU can copy from it.
"""

import contextlib
import itertools
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from dino3d.data.pretraining import Batch, Failure, PretrainingPatches, Sample, collate

START_METHOD = "fork" if sys.platform == "linux" else None  # of a loader's workers; None: what the system has
PART = 8  # samples that a worker reads at a time: many workers then share few batches


class RingPart(NamedTuple):
    """What a worker reads at a time. keys: (epoch, sample) of each; slot: of the ring; first: where in the batch they
    begin; whole: or only what their views see"""

    keys: list[tuple[int, int]]
    slot: int
    first: int
    whole: bool


class PatchRing(Dataset):
    """The patches of a few batches, one after the other, in memory that is used again and again.

    The order of the keys says which slot is next, and goes to the workers with them. A worker writes each patch to its
    place there and gives all else of its Sample. Of a patch it reads the box that the views look at, and leaves what
    lies around it as it was.

    dataset: what samples are of, with patches of one size
    batch_size: of one rank; in_use: batches that are looked at together
    workers, ready: of the loader, and parts that each has in hand or waiting
    """

    def __init__(self, dataset: PretrainingPatches, batch_size: int, in_use: int, workers: int, ready: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.parts = -(-batch_size // PART)  # of a batch
        # While the last part of a batch is asked for, the workers are at those that come `workers * ready` later
        slots = in_use + -(-workers * ready // self.parts)
        x, y, z = dataset.multi_crop.patch_size
        self.memory = shared_memory((slots, batch_size, z, y, x), workers > 0)
        self.slots = self.memory.permute(0, 1, 4, 3, 2)  # (slots, B, X, Y, Z): x is the fastest axis, as in files

    def parts_of(self, batches: Iterable[list[tuple[int, int]]], whole: int = 0) -> Iterator[RingPart]:
        """What the workers are asked for, one after the other. batches: the keys of each; whole: batches, the first
        ones, whose patches are read whole"""
        for number, keys in enumerate(batches):
            for first in range(0, len(keys), PART):
                yield RingPart(keys[first : first + PART], number % len(self.slots), first, number < whole)

    def __getitem__(self, part: RingPart) -> list[Sample] | list[Failure]:
        slots = self.slots[part.slot, part.first : part.first + len(part.keys)].numpy()
        samples = self.dataset.__getitems__(part.keys, slots, part.whole)
        return samples if isinstance(samples[0], Failure) else [sample._replace(patch=None) for sample in samples]

    def batches(
        self, parts: Iterator[list[Sample] | list[Failure]], wait: Callable[[], None] = lambda: None
    ) -> Iterator[Batch]:
        """The Batches of a loader's parts. Once another one is asked for, the `in_use` newest stay as they are.

        wait: called before, returns when no batch that was given is still being copied
        """
        for slot in itertools.cycle(self.slots):
            wait()
            parts_of_batch = list(itertools.islice(parts, self.parts))
            if len(parts_of_batch) < self.parts:
                return
            failed = [part for part in parts_of_batch if isinstance(part[0], Failure)]
            yield collate(failed[0] if failed else list(itertools.chain(*parts_of_batch)), slot)


def shared_memory(shape: tuple[int, ...], shared: bool) -> torch.Tensor:
    """int16 memory of a shape. shared: with processes that are started from now on by START_METHOD."""
    if not shared:
        return torch.empty(shape, dtype=torch.int16)
    if START_METHOD == "fork":  # without a name, so that it needs no room in /dev/shm
        count = math.prod(shape)
        return torch.frombuffer(mmap.mmap(-1, 2 * count), dtype=torch.int16, count=count).view(shape)
    return torch.empty(shape, dtype=torch.int16).share_memory_()


def pin_memory(tensor: torch.Tensor) -> bool:
    """Let CUDA copy from a tensor's memory in the background; whether that works here."""
    try:
        if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0:
            return True
    except (RuntimeError, AssertionError):
        return False
    with contextlib.suppress(RuntimeError):  # CUDA tells of an error once more, at the next operation
        torch.ones(1, device="cuda")
    return False
