"""Our HDF5 files read by the index of their chunks: the voxels of HDF5, or an error."""

import json
import os
import shutil
import zipfile

import h5py
import hdf5plugin
import numpy as np
import pytest
import SimpleITK as sitk
from test_data import noise, nothing_left_open  # noqa: F401  a fixture

from dino3d.command_line import UserError
from dino3d.data import chunks, foreground
from dino3d.data.conventions import AIR, DataError
from dino3d.data.foreground import unindexed_lines
from dino3d.data.hdf5 import FILTERS, index_chunks, write_volume
from dino3d.data.sidecar import index_path, write_sidecar
from dino3d.data.volume import Volume
from dino3d.prepare.index import index, index_file, store_index

SHAPE = (70, 40, 33)


def smooth(shape, seed=0):
    """(X, Y, Z) int16 that Blosc makes smaller, with padding below air."""
    voxels = np.cumsum(noise(shape, -9, 10, seed), axis=0).astype(np.int16)
    voxels[: len(voxels) // 5] = -3024
    return voxels


def ours(path, voxels=None, affine=np.diag([0.7, 0.8, 2, 1]), compression="blosc"):
    write_volume(path, smooth(SHAPE) if voxels is None else voxels, affine, compression)
    store_index(path)
    return path


@pytest.mark.parametrize("kind", ["smooth", "noise", "flat"])
@pytest.mark.parametrize("compression", FILTERS)
def test_the_voxels_are_those_of_hdf5(compression, kind, tmp_path, nothing_left_open):
    """noise: a filter that makes a chunk no smaller is left out, which its mask says."""
    path, rng = tmp_path / "ct.hdf5", np.random.RandomState(0)
    make = {
        "smooth": smooth,
        "noise": lambda shape: noise(shape, -32768, 32768),
        "flat": lambda shape: smooth(shape) * 0,
    }
    for shape in (SHAPE, (5, 64, 33)):
        ours(path, make[kind](shape), compression=compression)
        with Volume(path) as volume, Volume(path, indexed=False) as plain:
            assert volume.slow == "" and plain._fill is None and volume._fill is not None
            assert volume.shape == plain.shape and volume.converted and plain.converted
            np.testing.assert_array_equal(volume.affine, plain.affine)
            np.testing.assert_array_equal(volume.read_values(), plain.read_values())
            np.testing.assert_array_equal(volume.read(), plain.read())
            assert volume.read().dtype == np.int16
            for _ in range(25):
                start, size = rng.randint(-20, shape), rng.randint(1, 60, 3)
                expected, out = plain.read(start, size), np.full(size, 7, np.int16)
                np.testing.assert_array_equal(volume.read(start, size), expected)
                for one in (volume, plain):
                    one.read_into(out, start)
                    np.testing.assert_array_equal(out, expected)
            assert volume.is_constant() == plain.is_constant() == (kind == "flat")


def test_any_orientation(tmp_path):
    """Files whose axes are swapped and turned, as h5py reads them."""
    path, rng = tmp_path / "ct.hdf5", np.random.RandomState(1)
    for axes in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
        for signs in ((1, 1, 1), (-1, 1, -1), (-1, -1, -1)):
            affine = np.eye(4)
            affine[:3, :3] = np.diag([0.7, 1, 3])[list(axes)] * signs
            ours(path, affine=affine)
            with Volume(path) as volume, Volume(path, indexed=False) as plain:
                start, size = rng.randint(-5, 20, 3), rng.randint(5, 30, 3)
                np.testing.assert_array_equal(volume.read(), plain.read())
                np.testing.assert_array_equal(volume.read(start, size), plain.read(start, size))
                assert volume.read(start, size).min() >= AIR


def test_what_is_not_ours_is_left_to_hdf5(tmp_path, monkeypatch):
    path = tmp_path / "ct.hdf5"
    sitk.WriteImage(sitk.GetImageFromArray(smooth(SHAPE).T), path)
    assert index_chunks(path) is None and index_file(str(path))[1:3] == (False, False)
    with Volume(path) as volume:
        assert not volume.slow and not volume.converted
    for options in (
        {"compression": "lzf"},
        {"compression": "gzip", "shuffle": True},
        {**hdf5plugin.Blosc2()},
        {"fletcher32": True},
        {"dtype": "f4"},
    ):
        write_volume(path, smooth((40, 40, 40)), np.eye(4))
        with h5py.File(path, "r+") as file:
            voxels = file["ITKImage/0/VoxelData"][()]
            del file["ITKImage/0/VoxelData"]
            file["ITKImage/0"].create_dataset("VoxelData", data=voxels, chunks=(32, 32, 32), **options)
        assert index_chunks(path) is None
        np.testing.assert_array_equal(_read(path), np.maximum(smooth((40, 40, 40)), AIR))
    with h5py.File(path, "r+") as file:  # chunks that nobody wrote
        del file["ITKImage/0/VoxelData"]
        file["ITKImage/0"].create_dataset("VoxelData", (40, 40, 40), "i2", chunks=(32, 32, 32))
    assert index_chunks(path) is None and not _read(path).any()

    index_path(path).unlink()
    ours(path)
    for owner, name in ((os, "preadv"), (chunks, "blosc_decompress")):  # not on Windows; not in every hdf5plugin
        with monkeypatch.context() as without:
            without.delattr(owner, name) if owner is os else without.setattr(owner, name, lambda: None)
            with Volume(path) as volume:
                assert "Blosc library" in volume.slow
                np.testing.assert_array_equal(volume.read(), np.maximum(smooth(SHAPE), AIR))


def _read(path):
    with Volume(path) as volume:
        return volume.read()


def test_the_index_of_another_file_is_passed_over(tmp_path, monkeypatch):
    path = ours(tmp_path / "ct.hdf5")
    write_volume(path, smooth(SHAPE, seed=3), np.eye(4))
    with Volume(path) as volume:
        assert "changed since" in volume.slow
    np.testing.assert_array_equal(_read(path), np.maximum(smooth(SHAPE, seed=3), AIR))
    monkeypatch.setattr(foreground, "SMALL", 0)
    index_path(tmp_path / "b.hdf5").unlink(missing_ok=True)
    write_volume(tmp_path / "b.hdf5", smooth(SHAPE), np.eye(4))
    (line,) = unindexed_lines([str(path), str(tmp_path / "b.hdf5")], "none")
    assert "2 of 2 volumes are read through the HDF5 library" in line and "index of another file" not in line
    assert f"such as {path} (the index of its chunks is that of another file" in line
    index(tmp_path, workers=1)
    assert unindexed_lines([str(path), str(tmp_path / "b.hdf5")], "none") == []
    np.testing.assert_array_equal(_read(path), np.maximum(smooth(SHAPE, seed=3), AIR))


@pytest.mark.parametrize("compression", FILTERS)
def test_bits_that_flip_in_the_index_or_the_file(compression, tmp_path, nothing_left_open):
    """An error in one line, a word that the file has changed, or the right voxels."""
    path = ours(tmp_path / "ct.hdf5", compression=compression)
    right, rng = _read(path), np.random.RandomState(0)
    beside, content = index_path(path).read_bytes(), path.read_bytes()
    table = index_chunks(path).table
    first = int(table["offset"].min())
    met = dict.fromkeys(("error", "told", "right"), 0)

    def look():
        try:
            with Volume(path) as volume:
                found = volume.read()
        except DataError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            met["error"] += 1
            return
        if "changed since" in volume.slow:  # at one of the places by which a file is known again
            met["told"] += 1
        else:
            np.testing.assert_array_equal(found, right)
            met["right"] += 1

    for at in rng.randint(0, 8 * len(beside), 300):
        raw = bytearray(beside)
        raw[at // 8] ^= 1 << at % 8
        index_path(path).write_bytes(raw)
        look()
    assert met["error"] > 100
    for length in (*range(0, len(beside), len(beside) // 40), len(beside) - 1):
        index_path(path).write_bytes(beside[:length])
        look()
    index_path(path).write_bytes(beside)
    met.update(error=0, told=0)
    for at in rng.randint(8 * first, 8 * len(content), 150):  # chunks, and what HDF5 keeps between them
        raw = bytearray(content)
        raw[at // 8] ^= 1 << at % 8
        path.write_bytes(raw)
        look()
    assert met["error"] > 75 > met["told"]


def crafted(path, about=None, **fields):
    """Write an index beside a file as somebody might make it on purpose, with all checksums of the zip right."""
    index = index_chunks(path)
    table = index.table.copy()
    for name, value in fields.items():
        table[name][2] = value
    members = index._replace(table=table).members()
    members["chunks.json"] = json.dumps({**json.loads(members["chunks.json"]), **(about or {})}).encode()
    write_sidecar(path, list(index.of_file), {}, members)


@pytest.mark.parametrize("compression", FILTERS)
def test_every_field_is_checked_before_it_is_used(compression, tmp_path, nothing_left_open):
    path = ours(tmp_path / "ct.hdf5", compression=compression)
    other = int(index_chunks(path).table["offset"][0])
    for fields in (
        {"offset": 2**64 - 1},
        {"offset": 2**63},
        {"offset": os.path.getsize(path) - 10},
        {"offset": other},
        {"offset": 0},
        {"size": 0},
        {"size": 1},
        {"size": 17},
        {"size": 2**32 - 1},
        {"size": 70000},
        {"mask": 1 if compression != "none" else 2},
        {"mask": 65535},
        {"sum": 5},
    ):
        crafted(path, **fields)
        with pytest.raises(DataError, match="damaged") as error:
            _read(path)
        assert error.value.path == str(path) and "\n" not in str(error.value)
    for about in (
        {"shape": [70, 40]},
        {"shape": [33, 40, 97]},
        {"shape": [33, 40, 2**40]},
        {"shape": [33, 40, -70]},
        {"shape": "abc"},
        {"shape": None},
        {"shape": [33.0, 40, 70]},
        {"chunk": [0, 32, 32]},
        {"chunk": [33, 32, 32]},
        {"chunk": [64, 64, 64]},
        {"affine": [[1, 2], [3, 4]]},
        {"affine": "x"},
        {"type": "<f4"},
        {"filters": ["a"]},
        {"of_file": 3},
        {"of_file": [1, 2]},
        {"of_file": [1, 2, 2**40]},
        {"of_file": [1, 2, -5]},
        {"notes": 3},
    ):
        crafted(path, about)
        with pytest.raises(
            DataError, match=r"its index \.ct\.hdf5\.index\.npz is damaged .* run prepare_data.py index"
        ):
            Volume(path)
    crafted(path, {"affine": np.full((4, 4), np.nan).tolist()})
    with pytest.raises(DataError, match="span no volume"):
        Volume(path)
    for about in ({"format": 2}, {"filters": [1, 1]}, {"filters": [7]}):  # of a later version: HDF5 goes on
        crafted(path, about)
        with Volume(path) as volume:
            assert "another version" in volume.slow
    with zipfile.ZipFile(index_path(path), "w", zipfile.ZIP_DEFLATED) as file:  # which may unpack to any size
        for name, content in index_chunks(path).members().items():
            file.writestr(name, content)
    with pytest.raises(DataError, match="compressed where it should not be"):
        Volume(path)
    assert index_file(str(path)).chunks
    np.testing.assert_array_equal(_read(path), np.maximum(smooth(SHAPE), AIR))


def test_a_file_that_is_cut_off_while_it_is_open(tmp_path):
    path = ours(tmp_path / "ct.hdf5")
    with Volume(path) as volume:
        os.truncate(path, os.path.getsize(path) // 2)
        with pytest.raises(DataError, match="can't be read: it ends at byte"):
            volume.read()


def test_index_adds_to_what_stands_there_and_resumes(tmp_path, monkeypatch, capsys):
    """A hidden file of an earlier version gets the index of the chunks; one that stands there is not written again."""
    path = ours(tmp_path / "a.hdf5")
    with zipfile.ZipFile(index_path(path)) as file:
        kept = {name: file.read(name) for name in file.namelist() if name not in ("chunks.json", "chunks.bin")}
    with zipfile.ZipFile(index_path(path), "w") as file:
        for name, content in kept.items():
            file.writestr(name, content)
    content = path.read_bytes(), os.stat(path).st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("dino3d.prepare.index.find_foreground", None)  # is not found again
        store_index(path)
    index_path(path).unlink()
    with zipfile.ZipFile(index_path(path), "w") as file:
        for name, part in kept.items():
            file.writestr(name, part)
    index(tmp_path, workers=1)
    out = capsys.readouterr().out
    assert "occupancy of 1 volumes" in out and "chunks of 1 of them" in out
    assert (path.read_bytes(), os.stat(path).st_mtime_ns) == content
    with zipfile.ZipFile(index_path(path)) as file:
        assert {name: file.read(name) for name in kept} == kept
    before = os.stat(index_path(path)).st_mtime_ns, os.stat(index_path(path)).st_ino
    index(tmp_path, workers=1)
    assert (os.stat(index_path(path)).st_mtime_ns, os.stat(index_path(path)).st_ino) == before
    assert "1 of them from before" in capsys.readouterr().out


def test_a_file_that_changes_while_it_is_indexed(tmp_path, monkeypatch):
    path = tmp_path / "a.hdf5"
    write_volume(path, smooth(SHAPE), np.eye(4))

    def meanwhile(path):
        found = index_chunks(path)
        with open(path, "ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr("dino3d.prepare.index.index_chunks", meanwhile)
    monkeypatch.setattr(  # no processes of their own, which would know nothing of it
        "dino3d.prepare.index.in_processes", lambda function, items, workers: ((one, function(one)) for one in items)
    )
    with pytest.raises(UserError, match="was changed while it was read"):
        index(tmp_path, workers=1)
    assert not index_path(path).exists()


def test_a_copy_has_the_same_index(tmp_path):
    path = ours(tmp_path / "a.hdf5")
    (tmp_path / "copy").mkdir()
    for name in (path, index_path(path)):
        shutil.copy(name, tmp_path / "copy")
    with Volume(tmp_path / "copy" / "a.hdf5") as volume:
        assert not volume.slow
