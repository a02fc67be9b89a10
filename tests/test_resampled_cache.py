"""resampled_cache.py: copies on disk against the cases resampled in memory, what is made again, patches and where they
lie."""

import functools
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from augmentations import Policy
from dino3d.command_line import UserError
from dino3d.data import images
from dino3d.data.layouts import find_pairs
from dino3d.features import sliding_window
from dino3d.finetune import resampled_cache
from dino3d.finetune.crops import TrainingBatches, WindowAugmentation, collate_crops, read_headers
from dino3d.finetune.resampled_cache import CachedPatches, ResampledCache
from dino3d.training.loading import next_batch
from utils import Processes

SPACING = (2.0, 1.5, 3.0)


@pytest.fixture
def pairs(tmp_path):
    """Three cases of different sizes, spacings and orientations; the second has no labelled voxel, the third two
    classes."""
    rng = np.random.default_rng(0)
    for number, (shape, axes) in enumerate(
        [((30, 28, 20), [2, 1.5, 3]), ((24, 30, 22), [-1.8, 2, 2.5]), ((26, 25, 24), [2, -2, 2])]
    ):
        voxels = rng.integers(-1000, 400, shape).astype(np.int16)
        label = np.zeros(shape, np.uint8)
        if number != 1:
            label[10:16, 8:15, 6:12] = 1
        if number == 2:
            label[18:22, 18:22, 15:20] = 2
        for kind, array in (("images", voxels), ("labels", label)):
            path = tmp_path / "data" / kind / f"case{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([*axes, 1.0])), path)
    found, problems = find_pairs(tmp_path / "data")
    assert not problems
    return found


def copies_of(pairs, folder, most_bytes=1e9, spacing=SPACING):
    heads = read_headers([pair.image for pair in pairs], Processes())
    return ResampledCache(Path(folder), pairs, heads, spacing, most_bytes)


def expected(pair):
    image, label = (
        sliding_window.to_network_grid(one, SPACING, is_label)
        for one, is_label in zip(sliding_window.read_case(pair), (False, True))
    )
    return images.voxels_of(image).copy(), images.voxels_of(label).copy(), images.affine_of(image)


@pytest.mark.parametrize("most_bytes", [1e9, 0])
def test_copies_are_the_cases_on_the_working_grid(pairs, tmp_path, most_bytes):
    cache = copies_of(pairs, tmp_path / "cache", most_bytes)
    found = cache.make(Processes(), 0)
    assert [one.classes for one in found] == [[0, 1], [0], [0, 1, 2]]
    assert [one.stored for one in found] == [most_bytes > 0] * 3
    assert bool(list(cache.folder.iterdir())) == (most_bytes > 0)
    rng = np.random.default_rng(1)
    for case, pair in enumerate(pairs):
        voxels, label, affine = expected(pair)
        assert found[case].shape == list(voxels.shape)
        image, its_label = cache.read(case)
        np.testing.assert_array_equal(images.voxels_of(image), voxels)
        np.testing.assert_array_equal(its_label, label)
        np.testing.assert_allclose(images.affine_of(image), affine, atol=1e-5)
        around = [(20, 20)] * 3
        padded = np.pad(voxels, around, constant_values=-1024), np.pad(label, around)
        reader = cache.reader(case)
        for _ in range(10):
            start, size = rng.integers(-15, 20, 3), rng.integers(3, 20, 3)
            for part, whole in zip(reader.read(start, size), padded):
                np.testing.assert_array_equal(
                    part, whole[tuple(slice(a + 20, a + 20 + n) for a, n in zip(start, size))]
                )


def test_places_are_labelled_voxels_of_every_class(monkeypatch):
    mask = np.zeros((9, 8, 7), np.uint8)
    mask[1:3, 2:6, 3:5], mask[6, 6, 6] = 1, 3
    places = resampled_cache.sample_foreground(mask)
    assert sorted(map(tuple, places.tolist())) == sorted(
        (*index, mask[tuple(index)]) for index in np.argwhere(mask).tolist()
    )
    monkeypatch.setattr(resampled_cache, "FOREGROUND", 5)
    places = resampled_cache.sample_foreground(mask)
    assert len(places) == 6 and (mask[tuple(places[:, :3].T)] == places[:, 3]).all()
    np.testing.assert_array_equal(places, resampled_cache.sample_foreground(mask))
    assert resampled_cache.sample_foreground(mask * 0).shape == (0, 4)


def test_a_rerun_makes_only_what_changed(pairs, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        resampled_cache,
        "make_entry",
        lambda copy, make=resampled_cache.make_entry: (made.append(copy.pair.name), make(copy))[1],
    )
    first = copies_of(pairs, tmp_path / "cache").make(Processes(), 0)
    assert made == ["case0", "case1", "case2"]
    assert copies_of(pairs, tmp_path / "cache").make(Processes(), 0) == first and len(made) == 3
    os.utime(pairs[1].label, (1, 1))
    copies_of(pairs, tmp_path / "cache").make(Processes(), 0)
    assert made[3:] == ["case1"]
    next((tmp_path / "cache").rglob("case2*.label.hdf5")).unlink()
    next((tmp_path / "cache").rglob("case0*.json")).write_text("{")
    copies_of(pairs, tmp_path / "cache").make(Processes(), 0)
    assert made[4:] == ["case0", "case2"]
    copies_of(pairs, tmp_path / "cache", spacing=(3.0, 3.0, 3.0)).make(Processes(), 0)
    assert made[6:] == ["case0", "case1", "case2"] and len(list((tmp_path / "cache").iterdir())) == 2


def test_runs_of_other_masks_of_the_same_cts_share_a_folder(pairs, tmp_path):
    """One that makes its copies while another trains leaves the other's masks alone."""
    first = copies_of(pairs[:1], tmp_path / "cache")
    first.make(Processes(), 0)
    before = first.read(0)[1]
    mask = nibabel.load(pairs[0].label)
    nibabel.save(nibabel.Nifti1Image(1 - mask.get_fdata().astype(np.uint8), mask.affine), tmp_path / "case0.nii.gz")
    other = copies_of([pairs[0]._replace(label=str(tmp_path / "case0.nii.gz"))], tmp_path / "cache")
    other.make(Processes(), 0)
    np.testing.assert_array_equal(first.read(0)[1], before)
    assert (other.read(0)[1] != before).any() and copies_of(pairs[:1], tmp_path / "cache")._found(0)


def test_worker_processes_make_the_same_files(pairs, tmp_path):
    contents = []
    for workers in (0, 2):
        copies_of(pairs, tmp_path / f"{workers}").make(Processes(), workers)
        files = [path for path in sorted((tmp_path / f"{workers}").rglob("*.*")) if path.is_file()]
        contents.append({path.name: path.read_bytes() for path in files})
    assert contents[0] == contents[1] and len(contents[0]) == 12


def test_what_can_not_be_used_or_written(pairs, tmp_path, monkeypatch):
    Path(pairs[2].label).write_bytes(Path(pairs[2].label).read_bytes()[:-30])
    with pytest.raises(UserError, match="case2.nii.gz.*can't be read") as error:
        copies_of(pairs, tmp_path / "cache").make(Processes(), 0)
    assert error.value.everywhere
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken.*--cache_dir"):
        copies_of(pairs, tmp_path / "taken").make(Processes(), 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resampled_cache, "write_volume", full)
    with pytest.raises(UserError, match="No space left on device.*make room or choose another --cache_dir"):
        copies_of(pairs[:2], tmp_path / "full").make(Processes(), 0)
    assert not list((tmp_path / "full").rglob("*.json"))


def test_ranks_share_the_work(pairs, tmp_path):
    """Each rank makes its cases; what all found is put together."""

    class Rank(Processes):
        def all_gather(self, mine):
            shared.append(mine)
            return shared

        def run_on_main(self, function):
            return function()

    shared = []
    with pytest.raises(KeyError):  # rank 0 alone has not seen rank 1's case
        copies_of(pairs, tmp_path).make(Rank(rank=0, world_size=2), 0)
    found = copies_of(pairs, tmp_path).make(Rank(rank=1, world_size=2), 0)
    assert [sorted(part) for part in shared] == [[0, 2], [1]] and [one.classes for one in found] == [
        [0, 1],
        [0],
        [0, 1, 2],
    ]


# ------------------------------------------------------------------------------------------------------------- patches


def patches_of(pairs, folder, policy=Policy(), share=0.5, seed=0, most_bytes=1e9, size=(12, 12, 6)):
    cache = copies_of(pairs, folder, most_bytes)
    cache.make(Processes(), 0)
    return CachedPatches(cache, 4, share, WindowAugmentation(policy, (12, 12, 6), (0, 0, 0), SPACING), size, seed)


@pytest.mark.parametrize("most_bytes", [1e9, 0])
def test_patches_are_parts_of_their_case(pairs, tmp_path, most_bytes):
    patches = patches_of(pairs, tmp_path, most_bytes=most_bytes)
    for patch in range(12):
        crop, number, counted, views, mask = patches[0, patch, True]
        assert (crop.shape, mask.shape, number, counted) == ((12, 12, 6), (12, 12, 6), patch, True)
        voxels, label, _ = expected(pairs[patch // 4])
        voxels, label = np.pad(voxels, 12, constant_values=-1024), np.pad(label, 12)
        windows = np.lib.stride_tricks.sliding_window_view(voxels, crop.shape)
        at = np.argwhere((windows == crop).all((3, 4, 5)))
        assert len(at) == 1
        np.testing.assert_array_equal(mask, label[tuple(slice(a, a + n) for a, n in zip(at[0], mask.shape))])


def test_patches_depend_on_seed_epoch_and_patch_alone(pairs, tmp_path):
    rotation = Policy(rotation=30, prob=1.0)
    first, again = patches_of(pairs, tmp_path, rotation), patches_of(pairs, tmp_path, rotation, most_bytes=0)
    keys = [(0, 0, True), (0, 1, True), (1, 0, True), (3, 11, True)]
    drawn = {key: first[key] for key in keys}
    for key in reversed(keys):
        other = again[key]
        np.testing.assert_array_equal(other[0], drawn[key][0])
        np.testing.assert_array_equal(other[4], drawn[key][4])
        np.testing.assert_array_equal(other[3][0].control, drawn[key][3][0].control)
    starts = [crop.tobytes() for crop, *_ in [*drawn.values(), patches_of(pairs, tmp_path, rotation, seed=1)[keys[0]]]]
    assert len(set(starts)) == 5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_patches_have_a_labelled_voxel_in_their_middle_half(pairs, tmp_path, share):
    patches = patches_of(pairs, tmp_path, share=share)
    classes, hits, total = [0, 0, 0], 0, 400
    for epoch in range(total // 4):
        for patch in range(8, 12):  # of the case with two classes, small enough to be missed by chance
            mask = patches[epoch, patch, True][4][3:9, 3:9, 1:5]
            hits += mask.any()
            for k in np.unique(mask):
                classes[k] += 1
    chance = {0.0: (0.34, 0.5), 0.5: (0.63, 0.79), 1.0: (1.0, 1.0)}[share]  # 0.42 of the places, 0.71, by 4,000 draws
    assert chance[0] * total <= hits <= chance[1] * total
    if share == 1:  # classes alike, though one has three times as many voxels
        assert 0.35 < classes[2] / (classes[1] + classes[2]) < 0.65


def test_windows_of_a_case_without_label_lie_inside_it(pairs, tmp_path):
    patches, shape = patches_of(pairs, tmp_path), expected(pairs[1])[0].shape
    seen = np.stack([patches._centre(np.random.RandomState(i), patches._reader(1)) for i in range(300)])
    size = np.array((12, 12, 6))
    assert (seen >= size / 2).all() and (seen <= np.array(shape) - size / 2).all()
    assert (np.ptp(seen, axis=0) > 0.9 * (np.array(shape) - size)).all()


def test_one_loader_worker_or_several(pairs, tmp_path):
    from torch.utils.data import DataLoader

    patches = patches_of(pairs, tmp_path, Policy(rotation=30, elastic=0.3, histogram=10))
    order = functools.partial(np.arange, 12)
    batches = []
    for workers in (0, 2):
        stream = TrainingBatches(lambda epoch: order(), 5, 0, 1, 0, 0, 1)
        loader = DataLoader(patches, batch_sampler=stream, collate_fn=collate_crops, num_workers=workers)
        batches.append([next_batch(iter([batch])) for batch in loader])
    for one, other in zip(*batches):
        assert (one.crops == other.crops).all() and (one.masks == other.masks).all()
        assert (one.group.control == other.group.control).all()
    assert [len(batch.crops) for batch in batches[0]] == [5, 5, 2]


def test_a_copy_that_breaks_is_named(pairs, tmp_path):
    patches = patches_of(pairs, tmp_path)
    next(tmp_path.rglob("case1*.image.hdf5")).write_bytes(b"")
    assert "case1" in patches[0, 5, True] and "can't be read" in patches[0, 5, True]
    next(tmp_path.rglob("case0*.foreground.npy")).write_bytes(b"")
    assert "case0" in patches[0, 1, True] and "remove it" in patches[0, 1, True]
    with pytest.raises(UserError, match="case1"):
        next_batch(iter([collate_crops([patches[0, 9, True], patches[0, 5, True]])]))


def test_the_window_around_the_lesion(pairs, tmp_path):
    cache = copies_of(pairs, tmp_path)
    cache.make(Processes(), 0)
    for case, pair in enumerate(pairs):
        image, mask = cache.read_window(case, (10, 10, 8))
        voxels, label, _ = expected(pair)
        assert image.GetSize() == mask.shape == (10, 10, 8) and image.GetSpacing() == SPACING
        assert mask.any() == label.any()
    assert json.loads(next(tmp_path.rglob("case0*.json")).read_text())["classes"] == [0, 1]
