"""Batches in memory that is used again: those of a plain loader, whatever the workers, and never overwritten in use."""

import os
import signal

import numpy as np
import pytest
import torch
from test_data import ALL, assert_same_groups, crops, load, volumes  # noqa: F401  a fixture
from torch.utils.data import DataLoader

from augmentations import PAPER, MultiCropAugmentation, paper_policy, sampling_grid
from dino3d.data import patch_ring
from dino3d.data.patch_ring import START_METHOD, PatchRing, pin_memory
from dino3d.data.pretraining import BatchStream, PretrainingPatches, collate
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
            for sample, box in enumerate(one.boxes):
                np.testing.assert_array_equal(one.seen(sample), other.patches[sample][box])


# Views of all kinds: not turned, turned and scaled, bent, resized, of averaged blocks, in a spacing of their own
KINDS = {
    "plain": ([], {}),
    "affine": (["rotation", "scale", "flip"], {}),
    "bent": ([*PAPER], {}),
    "resized": ([*PAPER], {"global_scale": (0.5, 2.2), "local_scale": (0.3, 2.2)}),
    "windows": (["rotation", "elastic", "window"], {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_views_see_nothing_outside_their_box(kind, volumes, monkeypatch):  # noqa: F811
    """All bits of views are those of patches that were read whole, whatever is in memory around what was read."""
    monkeypatch.setattr(MultiCropAugmentation._patch_size, "__defaults__", (100, 5))
    names, options = KINDS[kind]
    multi_crop = MultiCropAugmentation(paper_policy(names), (12, 10, 9), (6, 5, 4), 3, **options)
    dataset = PretrainingPatches(volumes, multi_crop, 3, 3)
    keys = [(1, sample) for sample in range(24)]
    slots = np.empty((24, *multi_crop.patch_size[::-1]), np.int16).transpose(0, 3, 2, 1)  # x fastest, as in a batch
    plain, seen = dataset.__getitems__(keys), []
    for value in (-32768, 32767):
        slots[...] = value
        samples = dataset.__getitems__(keys, slots, whole=False)
        batch = collate(samples, torch.from_numpy(slots))
        seen.append(multi_crop.render(batch.patches, batch.groups, (-1000, 1000)))
    batch = collate(plain)
    for group, *others in zip(multi_crop.render(batch.patches, batch.groups, (-1000, 1000)), *seen):
        for other in others:
            np.testing.assert_array_equal(group, other)
    read = [np.prod([part.stop - part.start for part in sample.box]) for sample in samples]
    assert np.mean(read) < 0.97 * np.prod(multi_crop.patch_size)  # or nothing was tested
    for sample, whole in zip(samples, plain):
        np.testing.assert_array_equal(sample.patch[sample.box], whole.patch[sample.box])


@pytest.mark.parametrize("kind", ["affine", "bent"])
def test_a_box_is_little_larger_than_what_is_seen(kind, volumes):  # noqa: F811
    """As the positions of all voxels say, in double precision."""
    multi_crop = MultiCropAugmentation(paper_policy(KINDS[kind][0]), (48, 48, 24), (12, 12, 6), 4)
    excess = []
    for sample in range(40):
        views = multi_crop.draw(5, 0, sample)
        grids = [
            sampling_grid(torch.from_numpy(group.control).double(), lattice).reshape(-1, 3)
            for group, lattice in zip(views, multi_crop.lattices)
        ]
        grid = torch.cat(grids).numpy().clip(0, np.array(multi_crop.patch_size) - 1)
        box = multi_crop.seen_box(views, multi_crop.patch_size)
        low, high = np.array([(part.start, part.stop - 1) for part in box]).T
        assert (low <= grid.min(0)).all() and (grid.max(0) <= high).all()
        excess.append((high - low) / np.ptp(grid, 0))
    assert np.mean(excess) < (1.05 if kind == "affine" else 1.1)


def test_the_first_batches_are_whole(volumes):  # noqa: F811
    ring = PatchRing(PretrainingPatches(volumes, crops(ALL), 3, 3), 4, 1, 0, 0)
    ring.memory[...] = 7000
    batches = ring.batches(map(ring.__getitem__, ring.parts_of(BatchStream(12, 3, 4, 0, 1, 3, 0, 0, 1), whole=2)))
    for number, (batch, expected) in enumerate(zip(batches, load(volumes, 0, crops(ALL)), strict=True)):
        assert (batch.boxes == (None,) * 4) == (number < 2)
        assert np.array_equal(batch.patches, expected.patches) == (number < 2)


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
        for sample, box in enumerate(batch.boxes):
            np.testing.assert_array_equal(batch.seen(sample), expected.patches[sample][box])
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
        for sample, box in enumerate(batch.boxes):
            np.testing.assert_array_equal(copied.seen(sample).cpu(), expected.patches[sample][box])


def test_memory_that_can_not_be_pinned_is_used_as_it_is(monkeypatch):
    """The error of one call is not left to the next operation on the GPU."""
    calls = []

    def refuse(*_):
        calls.append("register")
        return 801

    def fail(*_, **__):
        calls.append("operation")
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: type("Library", (), {"cudaHostRegister": staticmethod(refuse)}))
    monkeypatch.setattr(torch, "ones", fail)
    assert not pin_memory(torch.empty(3, dtype=torch.int16)) and calls == ["register", "operation"]
