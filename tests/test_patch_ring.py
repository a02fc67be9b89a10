"""Batches in memory that is used again: those of a plain loader, whatever the workers, and never overwritten in use."""

import os
import signal

import numpy as np
import pytest
import torch
from test_data import ALL, assert_same_groups, crops, load, volumes  # noqa: F401  a fixture
from torch.utils.data import DataLoader

from dino3d.data import patch_ring
from dino3d.data.patch_ring import START_METHOD, PatchRing, pin_memory
from dino3d.data.pretraining import BatchStream, PretrainingPatches
from dino3d.training.loading import next_batch, start_reading_process


def ring_batches(paths, workers, ready=2, batch=4, in_use=1, epochs=1, wait=lambda: None, **options):
    dataset = PretrainingPatches(paths, crops(ALL), 3, 3, **options)
    stream = BatchStream(len(paths), 3, batch, 0, 1, 3, 0, 0, epochs)
    ring = PatchRing(dataset, batch, in_use, workers, ready if workers else 0)
    loader = DataLoader(
        ring,
        batch_size=None,
        sampler=ring.parts_of(stream),
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=ready if workers else None,
        worker_init_fn=start_reading_process if workers else None,
        multiprocessing_context=START_METHOD if workers else None,
    )
    return ring, ring.batches(iter(loader), wait)


@pytest.mark.parametrize("workers, ready, part", [(0, None, 2), (1, 1, 3), (2, 2, 2), (2, 5, 1), (3, 1, 8)])
def test_batches_are_those_of_a_plain_loader(workers, ready, part, volumes, monkeypatch):  # noqa: F811
    """In order, bit for bit, also once others of those in use have been asked for."""
    monkeypatch.setattr(patch_ring, "PART", part)
    plain, in_use = load(volumes, 0, crops(ALL), epochs=2), 3
    _, batches = ring_batches(volumes, workers, ready, in_use=in_use, epochs=2)
    kept = []
    for batch, expected in zip(batches, plain, strict=True):
        kept = [*kept, (batch, expected)][-in_use:]
        assert_same_groups(batch.groups, expected.groups)
        assert batch[2:6] == expected[2:6] and batch.missing == expected.missing
        for one, other in kept:
            np.testing.assert_array_equal(one.patches, other.patches)


@pytest.mark.parametrize("workers, batch, slots", [(0, 12, 1), (1, 12, 2), (2, 12, 3), (16, 64, 5), (4, 64, 2)])
def test_memory_is_allocated_once_and_little(workers, batch, slots, volumes):  # noqa: F811
    """Without a ring two whole batches of each worker wait, beside the one in use."""
    dataset = PretrainingPatches(volumes, crops(ALL), 3, 3)
    ring = PatchRing(dataset, batch, 1, workers, 2 if workers else 0)
    assert ring.slots.shape == (slots, batch, *dataset.multi_crop.patch_size)
    if workers == 2:
        ring, batches = ring_batches(volumes, workers, batch=batch)
        assert {one.patches.data_ptr() for one in batches} == {slot.data_ptr() for slot in ring.slots}


def test_nothing_is_asked_for_before_copies_are_done(volumes):  # noqa: F811
    """On a GPU a batch is copied in the background: what is in flight is waited for before its slot can be next."""
    seen = []
    ring, batches = ring_batches(volumes, 0, wait=lambda: seen.append(len(seen)))
    for number, _ in enumerate(batches):
        assert seen == list(range(number + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_and_told(workers, volumes, tmp_path):  # noqa: F811
    (tmp_path / "bad.hdf5").write_bytes(b"no file")
    paths = [*volumes[:2], str(tmp_path / "bad.hdf5"), *volumes[3:5]]
    _, batches = ring_batches(paths, workers)
    plain = load(paths, 0, crops(ALL))
    for batch, expected in zip(batches, plain, strict=True):
        np.testing.assert_array_equal(batch.patches, expected.patches)
        assert batch.paths == expected.paths and {path for path, _ in batch.bad} <= {str(tmp_path / "bad.hdf5")}
    _, batches = ring_batches(paths, workers, strict=True)
    with pytest.raises(Exception, match="bad.hdf5: can't be read"):
        while True:
            next_batch(batches)


def test_a_killed_worker_is_told(volumes, monkeypatch):  # noqa: F811
    def killed(self, part):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(PatchRing, "__getitem__", killed)
    _, batches = ring_batches(volumes, 2)
    with pytest.raises(Exception, match="reading process"):
        next_batch(batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_copies_from_it_in_the_background(volumes):  # noqa: F811
    stream = torch.cuda.Stream()
    ring, batches = ring_batches(volumes, 2, wait=stream.synchronize)
    assert pin_memory(ring.memory) and ring.slots[0].is_pinned()
    for batch, expected in zip(batches, load(volumes, 0, crops(ALL)), strict=True):
        with torch.cuda.stream(stream):
            copied = batch.pin_views().to("cuda")
        stream.synchronize()
        np.testing.assert_array_equal(copied.patches.cpu(), expected.patches)


def test_memory_that_can_not_be_pinned_is_used_as_it_is(monkeypatch):
    """The error of one call is not left to the next operation on the GPU."""
    asked = []
    library = type("Library", (), {"cudaHostRegister": staticmethod(lambda *_: asked.append(_) or 801)})
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    memory = torch.empty(3, dtype=torch.int16)
    assert not pin_memory(memory) and asked == [(memory.data_ptr(), 6, 0)]
