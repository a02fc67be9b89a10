"""Volumes that stay in memory."""

import nibabel
import numpy as np
import pytest
from test_data import crops, noise

from dino3d.data import volume_cache
from dino3d.data.conventions import DataError
from dino3d.data.hdf5 import write_volume
from dino3d.data.pretraining import PretrainingPatches
from dino3d.data.volume import Volume
from dino3d.data.volume_cache import VolumeCache
from dino3d.training import loading
from utils import Processes

SHAPE = (40, 38, 36)
BYTES = 2 * 40 * 38 * 36


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three NIfTI files in different orientations, and two of HDF5."""
    folder = tmp_path_factory.mktemp("volumes")
    for number, signs in enumerate(((1, 1, 1), (-1, -1, 1), (-1, 1, -1))):
        image = nibabel.Nifti1Image(noise(SHAPE, -2000, 1000, seed=number), np.diag([*signs, 1]) * 1.3)
        nibabel.save(image, folder / f"{number}.nii.gz")
    for number in (3, 4):
        write_volume(folder / f"{number}.hdf5", noise(SHAPE, seed=number), np.diag([-1.0, 0.7, 2, 1]))
    return [str(path) for path in sorted(folder.iterdir())]


def count_readings(monkeypatch):
    opened = []

    class Counting(Volume):
        def __init__(self, path, stored=None):
            if stored is None:
                opened.append(path)
            super().__init__(path, stored)

    monkeypatch.setattr(volume_cache, "Volume", Counting)
    return opened


def test_a_kept_volume_is_the_one_on_disk(paths):
    cache = VolumeCache(10 * BYTES)
    for _ in range(2):
        for path in paths:
            with cache.get(path) as kept, Volume(path) as volume:
                assert kept.path == path and kept.shape == volume.shape and kept.spacing == volume.spacing
                assert kept.converted == volume.converted and kept.notes == volume.notes
                np.testing.assert_array_equal(kept.affine, volume.affine)
                for box in (((0, 0, 0), None), ((-5, 3, 30), (20, 50, 9)), ((3, 4, 5), (9, 9, 9))):
                    np.testing.assert_array_equal(kept.read(*box), volume.read(*box))
                kept.read((1, 1, 1), (4, 4, 4))[:] = 7  # what is read is the reader's own
                kept.read()[:] = 7
    assert cache.room == 5 * BYTES


def test_samples_are_the_same_with_and_without(paths, monkeypatch):
    opened = count_readings(monkeypatch)
    keys = [(epoch, sample) for epoch in range(3) for sample in range(10)]
    plain = PretrainingPatches(paths, crops(), 3, 2).__getitems__(keys)
    assert len(opened) == 5
    opened.clear()
    kept = PretrainingPatches(paths, crops(), 3, 2, cache=VolumeCache(3 * BYTES))
    for _ in range(3):  # batches: without room each opens its files anew
        for one, two in zip(plain, kept.__getitems__(keys), strict=True):
            np.testing.assert_array_equal(one.patch, two.patch)
            assert one.path == two.path and one.spacing == two.spacing
    assert len(opened) == 3 + 2 * 3 and kept.cache.room == 0


def test_only_what_fits_and_is_worth_it_is_kept(paths, monkeypatch):
    monkeypatch.setattr(volume_cache, "SMALL", BYTES - 1)
    cache = VolumeCache(2 * BYTES + 1)
    for path in paths[::-1]:
        cache.get(path).close()
    assert cache.room == 1 and list(cache._kept) == [paths[2], paths[1]]  # converted ones are read patch by patch
    assert VolumeCache().room == 0


def test_a_damaged_volume_is_read_as_ever(tmp_path):
    """A damaged chunk is met by the patches that touch it alone."""
    path = tmp_path / "a.hdf5"
    write_volume(path, noise((64, 64, 64)), np.eye(4), "gzip")
    content = bytearray(path.read_bytes())
    at = len(content) - 2000
    content[at : at + 100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(DataError), Volume(path) as volume:
        volume.read()
    cache = VolumeCache(10**9)
    with cache.get(str(path)) as volume, Volume(path) as other:
        np.testing.assert_array_equal(volume.read(size=(9, 9, 9)), other.read(size=(9, 9, 9)))
    assert cache.room == 10**9


def test_processes_share_a_quarter_of_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "CGROUP", tmp_path)
    machine = loading.available_memory()
    assert machine > 2**24
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert loading.available_memory() > 2**24
    (tmp_path / "memory.max").write_text("81000\n")
    assert loading.available_memory() == 80000
    assert loading.cache_bytes(0, Processes()) == 20000 and loading.cache_bytes(4, Processes()) == 5000
    (tmp_path / "memory.current").write_text("90000\n")
    assert loading.cache_bytes(4, Processes()) == 0
