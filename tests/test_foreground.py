"""Where body and lung lie: the rules against shapes that are known, what is stored of them, and patches drawn there."""

import os
import shutil
import zipfile

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from test_data import crops
from test_main_dino import checkpoint, run_main, same
from torch.utils.data import DataLoader

import prepare_data
import utils
from dino3d.command_line import UserError
from dino3d.data import foreground
from dino3d.data.foreground import (
    GROUP,
    ForegroundDraws,
    box_means,
    find_foreground,
    occupancy_of,
    read_occupancy,
    unindexed_lines,
)
from dino3d.data.hdf5 import write_volume
from dino3d.data.pretraining import Batch, BatchStream, PretrainingPatches, collate, place_patch
from dino3d.data.sidecar import identity_of, index_path, write_sidecar
from dino3d.data.volume import Volume
from dino3d.prepare.index import index, store_index
from dino3d.training.collapse import TeacherOutputs
from dino3d.training.monitor import Monitor


def chest(spacing=(2.0, 2.0, 2.0), size=(300, 240, 240), table=True, lungs=True, noise=15, seed=0):
    """(CT (X, Y, Z) int16, {kind: bool mask}): two ellipsoids of lung in a cylinder of tissue, on a table of foam."""
    shape = [round(n / s) for n, s in zip(size, spacing)]
    x, y, z = np.meshgrid(
        *((np.arange(n) + 0.5) * s - length / 2 for n, s, length in zip(shape, spacing, size)), indexing="ij"
    )
    hu = np.full(shape, -1000.0)
    body = (x / 130) ** 2 + ((y - 10) / 85) ** 2 < 1
    hu[body] = 40
    lung = np.zeros(shape, bool)
    if lungs:
        for side in (-1, 1):
            lung |= ((x - side * 58) / 42) ** 2 + ((y - 10) / 60) ** 2 + (z / 100) ** 2 < 1
    hu[lung] = -850
    hu[lung & (np.abs(y - 10) < 3) & (np.abs(z) < 3)] = 40  # a vessel through both
    if table:
        plate = (np.abs(y + 95) < 12) & (np.abs(x) < 140)
        hu[plate] = -700
        hu[plate & ((np.abs(y + 95) > 10) | (np.abs(x) > 137))] = 100
    hu += np.random.default_rng(seed).normal(0, noise, shape)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), {"body": body, "lung": lung}


def overlap(occupancy, kind, mask):
    """Dice of the blocks, each over all of its voxels, with a mask of voxels."""
    blocks = occupancy.mask(kind)
    for axis, side in enumerate(occupancy.block):
        blocks = blocks.repeat(side, axis)
    blocks = blocks[tuple(slice(n) for n in mask.shape)]
    return 2 * (blocks & mask).sum() / (blocks.sum() + mask.sum())


def boxes_of(mask, side):
    """Share of a mask in each block, written out in float64."""
    shape = [-(-n // s) for n, s in zip(mask.shape, side)]
    return np.array(
        [
            [[mask[tuple(slice(k * s, k * s + s) for k, s in zip((a, b, c), side))].mean() for c in range(shape[2])]
             for b in range(shape[1])]
            for a in range(shape[0])
        ]
    )  # fmt: skip


def test_means_over_boxes_are_those_of_a_loop():
    values = np.random.default_rng(0).integers(-1024, 3000, (13, 8, 7)).astype(np.int16)
    for box in ((1, 1, 1), (4, 3, 2), (13, 8, 7), (20, 1, 5)):
        for array in (values, np.asfortranarray(values), values[::-1, :, ::-1], values > 0):
            np.testing.assert_allclose(box_means(array, box), boxes_of(array, box), atol=1e-3)


@pytest.mark.parametrize("spacing", [(2, 2, 2), (1, 1, 5), (0.9, 1.3, 3), (3, 3, 8), (4, 4, 4)])
@pytest.mark.parametrize("turned", [False, True])
def test_body_and_lung_are_found_and_the_table_is_not(spacing, turned):
    """Blocks of 8 mm of these shapes reach a Dice of 0.94 at best: those whose larger part is lung."""
    voxels, masks = chest(spacing)
    if turned:
        voxels, masks = voxels[::-1, ::-1], {kind: mask[::-1, ::-1] for kind, mask in masks.items()}
    found = find_foreground(voxels, spacing)
    assert all(abs(side * s - 8) <= 4 for side, s in zip(found.block, spacing))
    best = boxes_of(masks["lung"], found.block) >= 0.5
    assert 2 * (best & found.mask("lung")).sum() / (best.sum() + found.mask("lung").sum()) > 0.93
    assert overlap(found, "lung", masks["lung"]) > 0.88 and overlap(found, "body", masks["body"]) > 0.93
    assert (found.mask("body") | ~found.mask("lung")).all()


def parts_of_a_chest():
    voxels, masks = chest()
    low = np.array([110, 60, 60])  # inside the right lung
    inside = tuple(slice(a - 12, a + 13) for a in low)
    head, _ = chest(lungs=False)
    z = np.arange(head.shape[2])
    head[60:90, 60:70, (z > 40) & (z < 60)] = -990  # a pharynx of 48 ml
    dark = np.random.default_rng(0).normal(-1000, 10, (60, 60, 30)).astype(np.int16)
    return {
        "a cut patient": (voxels[40:, :80], {"lung": (0.85, masks["lung"][40:, :80]), "body": None}),
        "a crop inside a lung": (voxels[inside], {"lung": (0.95, np.ones((25,) * 3, bool)), "body": None}),
        "slices of the middle": (voxels[:, :, 50:70], {"lung": (0.85, masks["lung"][:, :, 50:70]), "body": None}),
        "no lungs": (head, {"lung": (None, None), "body": (0.9, masks["body"])}),
        "air": (dark, {"lung": (None, None), "body": (None, None)}),
        "padding of a circle": (
            np.pad(voxels, ((30, 30), (30, 30), (0, 0)), constant_values=-1024),
            {"lung": (0.85, np.pad(masks["lung"], ((30, 30), (30, 30), (0, 0)))), "body": None},
        ),
        "water": (np.zeros((40, 40, 40), np.int16), {"lung": (None, None), "body": (1, np.ones((40, 40, 40), bool))}),
        "one voxel": (np.zeros((1, 1, 1), np.int16), {"lung": (None, None), "body": (1, np.ones((1, 1, 1), bool))}),
    }


@pytest.mark.parametrize("what", parts_of_a_chest())
def test_what_is_no_whole_chest(what):
    voxels, expected = parts_of_a_chest()[what]
    found = find_foreground(voxels, (2, 2, 2))
    for kind, known in expected.items():
        if known is not None:
            least, mask = known
            assert found.mask(kind).any() == (least is not None), kind
            assert least is None or overlap(found, kind, mask) >= least, kind


def test_lungs_of_real_ct_agree_with_another_rule(shared_data):
    """Dark parts of 2D slices that do not touch the border, closed: an older way (see ../shared/evidence/pool.py)."""
    import importlib.util

    path = shared_data.parent / "evidence" / "pool.py"
    if not path.exists():
        pytest.skip("needs ../shared/evidence")
    spec = importlib.util.spec_from_file_location("pool", path)
    pool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pool)
    scan = shared_data / "ct" / "totalsegmentator_example.nii.gz"
    lungs = pool.lungs(pool.at_1mm(scan)).transpose(2, 1, 0)[::-1, ::-1]  # (X, Y, Z) in RAS at 1 mm
    with Volume(scan) as volume:
        found = find_foreground(volume.read(), volume.spacing)
        places = [
            np.minimum(((np.arange(n) + 0.5) / s).astype(int), m - 1) // side
            for n, s, m, side in zip(lungs.shape, volume.spacing, volume.shape, found.block)
        ]
    blocks = found.mask("lung")[np.ix_(*places)]
    assert 2 * (blocks & lungs).sum() / (blocks.sum() + lungs.sum()) > 0.9  # 0.928


# ------------------------------------------------------------------------------------------------------------- stored


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder with three HDF5 volumes and one NIfTI; the second has no lungs."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(3):
        voxels, _ = chest((5, 5, 5), lungs=number != 1, seed=number)
        write_volume(folder / f"p{number}" / "t0" / "a.hdf5", voxels, np.diag([5.0, 5, 5, 1]))
    nibabel.save(nibabel.Nifti1Image(voxels[::-1], np.diag([-5.0, 5, 5, 1])), folder / "b.nii.gz")
    return folder


@pytest.fixture
def copied(scans, tmp_path):
    return shutil.copytree(scans, tmp_path / "scans")


@pytest.fixture
def in_process(monkeypatch):
    """No processes of their own, which take seconds to start."""
    for module in ("conversion", "check", "index"):
        monkeypatch.setattr(
            f"dino3d.prepare.{module}.in_processes",
            lambda function, items, workers: ((item, function(item)) for item in items),
        )


def same_occupancy(one, other):
    return one[:2] == other[:2] and all(np.array_equal(one.bits[kind], other.bits[kind]) for kind in one.bits)


def test_index_stores_it_beside_the_files_and_changes_none(copied, capsys):
    files = sorted(path for path in copied.rglob("*") if path.is_file())
    before = {path: (path.read_bytes(), os.stat(path).st_mtime_ns) for path in files}
    index(copied, workers=1)
    out = capsys.readouterr().out
    assert f"occupancy of 4 volumes in {copied}, 0 of them from before" in out
    assert f"no lung was found in 1 of them: {copied}/p1/t0/a.hdf5" in out
    assert all((path.read_bytes(), os.stat(path).st_mtime_ns) == held for path, held in before.items())
    left = sorted(path for path in copied.rglob("*") if path.is_file() and path not in before)
    assert left == sorted(map(index_path, files)) and all(path.stat().st_size < 4000 for path in left)
    for path in files:
        with Volume(path) as volume:
            assert same_occupancy(read_occupancy(volume), find_foreground(volume.read(), volume.spacing))
    assert unindexed_lines([str(path) for path in files], "lung") == []
    index(copied, workers=1)
    assert "4 of them from before" in capsys.readouterr().out
    moved = copied.rename(copied.with_name("moved"))
    shutil.copy(moved / "p0/t0/a.hdf5", moved / "p0/t0/copy.hdf5")  # another time, without its hidden file
    shutil.copy(index_path(moved / "p0/t0/a.hdf5"), index_path(moved / "p0/t0/copy.hdf5"))
    with Volume(moved / "p0/t0/copy.hdf5") as volume:
        assert read_occupancy(volume) is not None


def test_what_is_stored_of_another_file_or_damaged_is_found_anew(copied, monkeypatch, in_process):
    path = copied / "p0/t0/a.hdf5"
    index(copied, workers=1)
    good = index_path(path).read_bytes()

    def stored():
        with Volume(path, indexed=False) as volume:  # in a damaged one, the index of the chunks is an error
            return read_occupancy(volume)

    def write_occupancy(path, occupancy):
        with open(path, "rb") as file:
            write_sidecar(path, identity_of(file), occupancy.arrays(), {})

    assert stored() is not None
    for content in (b"", good[:100], good[:-30], b"x" * 500, b"PK\x03\x04" + bytes(60)):
        index_path(path).write_bytes(content)
        assert stored() is None
    with Volume(path, indexed=False) as volume:
        right = find_foreground(volume.read(), volume.spacing)
    for spoilt in (
        right._replace(shape=(1, 1, 1)),
        right._replace(block=(0, 1, 1)),
        right._replace(bits={**right.bits, "lung": right.bits["lung"][:-1]}),
        right._replace(bits={"body": right.bits["body"]}),
        right._replace(block=("x", "y", "z")),
        right._replace(block=(np.inf, 1, 1)),
    ):
        write_occupancy(path, spoilt)
        assert stored() is None
    with zipfile.ZipFile(index_path(path), "w") as file, file.open("of_file.npy", "w") as part:
        np.lib.format.write_array_header_1_0(part, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    assert stored() is None  # says that it is larger than any memory
    with monkeypatch.context() as patch:
        patch.setattr(foreground, "RULES", 0)
        write_occupancy(path, right)
    assert stored() is None  # by other rules
    index(copied, workers=1)
    assert same_occupancy(stored(), right)
    write_volume(path, *chest((5, 5, 5), seed=9)[:1], np.diag([5.0, 5, 5, 1]))
    assert stored() is None  # of the file that was there before


def test_a_write_that_is_cut_off_leaves_all_as_it_was(copied, monkeypatch, capsys, in_process):
    path = copied / "p0/t0/a.hdf5"
    content = path.read_bytes()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store_index(path)
    assert path.read_bytes() == content and not index_path(path).exists()
    left = path.with_name(f".part.12345.{index_path(path).name}")  # of a process that had no time to remove it
    left.write_bytes(b"half")
    index(copied, workers=1)
    assert not left.exists() and index_path(path).exists() and "4 volumes" in capsys.readouterr().out


def test_index_names_what_it_cannot_do(copied, tmp_path, capsys, in_process):
    (copied / "p0/t0/a.hdf5").write_bytes(b"no file")
    with pytest.raises(UserError, match=r"1 of 4 volumes have none, such as .*p0/t0/a.hdf5: can't be read"):
        index(copied, workers=1)
    assert "occupancy of 3 volumes" in capsys.readouterr().out
    for folder, says in ((tmp_path / "none", "no such folder"), (copied / "b.nii.gz", "is no folder")):
        with pytest.raises(UserError, match=says):
            index(folder, workers=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no volume found"):
        index(tmp_path / "empty", workers=1)


def test_conversion_stores_it_in_the_file_and_itk_passes_over_it(scans, tmp_path, monkeypatch, capsys, in_process):
    flags = ["--input", str(scans), "--output", str(tmp_path / "out"), "--compression", "gzip", "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "nlst", *flags])
    prepare_data.main()
    for path in (tmp_path / "out").rglob("*.hdf5"):
        with Volume(path) as volume:
            found, voxels = find_foreground(volume.read(), volume.spacing), volume.read()
            assert same_occupancy(read_occupancy(volume), found)
            image = sitk.ReadImage(path)
            np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, voxels)
            assert all(key.startswith("ITK_original") for key in image.GetMetaDataKeys())
        with h5py.File(path) as file:
            assert sorted(file[GROUP]) == ["block", "body", "lung", "rules", "shape"]
        with Volume(path) as volume:
            assert not volume.slow  # the index of its chunks stands beside it
        index_path(path).unlink()
        with Volume(path) as volume:
            assert same_occupancy(read_occupancy(volume), found)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "check", str(tmp_path / "out"), "--workers", "1"])
    prepare_data.main()
    assert "occupancy" not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "check", str(scans), "--workers", "1"])
    prepare_data.main()
    assert "note: 4 of 4 volumes have no stored occupancy, such as" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- drawn from


def test_voxels_are_drawn_evenly_in_the_blocks_and_as_often_as_asked(scans):
    with Volume(scans / "p0/t0/a.hdf5") as volume:
        draws, rng = ForegroundDraws("lung", 0.75), np.random.RandomState(0)
        drawn = [draws.draw(volume, rng) for _ in range(4000)]
        blocks, block = find_foreground(volume.read(), volume.spacing).mask("lung"), occupancy_of(volume).block
        assert draws.missing(volume) == ""
    places = np.array([voxel for voxel in drawn if voxel is not None])
    assert abs(len(places) / 4000 - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5
    counts = np.zeros(blocks.shape)
    np.add.at(counts, tuple((places // block).T), 1)
    assert (counts[~blocks] == 0).all()
    expected = len(places) / blocks.sum()
    assert abs(counts[blocks] - expected).max() < 6 * expected**0.5 + 1
    assert (places < volume.shape).all() and len({tuple(place % block) for place in places}) == np.prod(block)


def test_without_lung_the_body_and_without_a_body_anywhere(scans, tmp_path):
    with Volume(scans / "p1/t0/a.hdf5") as volume:
        draws = ForegroundDraws("lung", 1)
        place = draws.draw(volume, np.random.RandomState(0))
        assert draws.missing(volume) == "no lung was found in it: patches are drawn in the body"
        assert find_foreground(volume.read(), volume.spacing).mask("body")[tuple(place // draws._of(volume)[0])]
    write_volume(tmp_path / "air.hdf5", np.full((30, 30, 30), -1000, np.int16), np.eye(4))
    with Volume(tmp_path / "air.hdf5") as volume:
        for kind in ("lung", "body"):
            draws = ForegroundDraws(kind, 1)
            assert draws.draw(volume, np.random.RandomState(0)) is None
            assert draws.missing(volume) == f"no {kind} was found in it: patches are drawn anywhere"


@pytest.mark.parametrize("core, size", [((10, 10, 10), (14, 14, 14)), ((20, 11, 8), (26, 15, 11))])
def test_a_patch_lies_around_its_centre_as_far_as_there_is_room(core, size):
    shape, core, size = np.array([40, 41, 15]), np.array(core), np.array(size)
    rng = np.random.RandomState(0)
    anywhere = np.array([place_patch(rng, shape, core, size) for _ in range(2000)])
    for _ in range(300):
        centre = rng.randint(shape)
        start = place_patch(rng, shape, core, size, centre)
        assert (start >= anywhere.min(0)).all() and (start <= anywhere.max(0)).all()
        wished = centre - core // 2 - (size - core) // 2
        np.testing.assert_array_equal(start, np.clip(wished, anywhere.min(0), anywhere.max(0)))


def batches(paths, workers, rank=0, world=1, **options):
    dataset = PretrainingPatches(paths, crops(), 3, 6, **options)
    stream = BatchStream(len(paths), 6, 6 // world, rank, world, 3, 0, 0, 2)
    return list(DataLoader(dataset, batch_sampler=stream, collate_fn=collate, num_workers=workers))


def test_draws_are_the_same_for_any_workers_ranks_and_stored_or_not(scans, copied, in_process):
    def of(folder):
        return [str(folder / name) for name in ("p0/t0/a.hdf5", "p1/t0/a.hdf5", "p2/t0/a.hdf5", "b.nii.gz")]

    index(copied, workers=1)
    alone = batches(of(scans), 0, foreground=ForegroundDraws("lung", 0.7))
    others = (
        batches(of(scans), 2, foreground=ForegroundDraws("lung", 0.7)),
        batches(of(copied), 0, foreground=ForegroundDraws("lung", 0.7)),
    )
    for other in others:
        for one, two in zip(alone, other, strict=True):
            np.testing.assert_array_equal(one.patches, two.patches)
    halves = [batches(of(scans), 0, rank, 2, foreground=ForegroundDraws("lung", 0.7)) for rank in range(2)]
    for one, *shares in zip(alone, *halves, strict=True):
        np.testing.assert_array_equal(one.patches, np.concatenate([share.patches for share in shares]))
    told = {path: reason for batch in alone for path, reason in batch.missing}
    assert list(told) == of(scans)[1:2] and "in the body" in told[of(scans)[1]]
    anywhere = batches(of(scans), 0)
    assert not any(batch.missing for batch in anywhere)
    dark = [np.mean([(batch.patches < -700).float().mean() for batch in some]) for some in (alone, anywhere)]
    assert dark[0] != dark[1]


def test_a_run_draws_where_it_is_told_and_says_so_once(scans, tmp_path, capsys):
    flags = ["--data_dir", scans, "--batch_size_per_gpu", 4, "--patches_per_volume", 4, "--max_steps", 3]
    runs = {}
    for name, more in {
        "none": [],
        "share": ["--foreground", "lung", "--foreground_share", 1],
        "lung": ["--foreground", "lung"],
    }.items():
        code, out, errors = run_main(capsys, *flags, "--output_dir", tmp_path / name, *more)
        assert code == 0, errors
        runs[name] = checkpoint(tmp_path / name), out + "\n".join(errors)
    assert not same(runs["lung"][0]["student"], runs["none"][0]["student"])[0]
    assert not same(runs["lung"][0]["student"], runs["share"][0]["student"])[0]
    assert "occupancy" not in runs["none"][1]
    told = runs["share"][1]
    assert "4 of 4 volumes have no stored occupancy" in told
    assert told.count("p1/t0/a.hdf5: no lung was found in it: patches are drawn in the body") == 1
    code, out, _ = run_main(capsys, *flags, "--output_dir", tmp_path / "none", "--foreground", "body")
    assert code == 0 and "resuming with patches drawn elsewhere: --foreground body instead of none" in out


def test_what_only_another_rank_met_is_told_at_the_epochs_end(tmp_path, capsys):
    class Two(utils.Processes):
        def all_gather(self, value):
            return [value, ("b.hdf5", "no lung was found in it")]

    sizes = {"total_steps": 9, "done_steps": 0, "global_batch": 2, "volumes": 2, "max_bad": 0}
    monitor = Monitor(tmp_path, Two(), 8, log_every=9, **sizes)
    for epoch in (1, 2):
        monitor.start_epoch(epoch)
        monitor.record(Batch(torch.empty(0), [], [], ""))
        outputs = TeacherOutputs(torch.zeros(2, dtype=torch.long), torch.ones(8) / 8, torch.rand(2, 4))
        monitor.step(torch.tensor(True), {"kl": torch.ones(()), "teacher_entropy": torch.ones(())}, outputs, 0.0)
        monitor.flush(epoch, {}, torch.tensor(0.0))
        monitor.log_epoch(epoch, epoch, {})
    monitor.close()
    assert capsys.readouterr().err.count("--foreground: b.hdf5: no lung was found in it") == 1


def test_the_places_are_those_of_the_anatomy_however_a_file_lies(tmp_path):
    image = nibabel.Nifti1Image(chest((5.0, 5.0, 6.0))[0], np.diag([5.0, 5.0, 6.0, 1.0]))
    drawn = []
    for code in ("RAS", "LPS", "SAR", "IPL", "ARS"):
        nibabel.save(image.as_reoriented(nibabel.orientations.axcodes2ornt(code)), tmp_path / f"{code}.nii")
        with Volume(tmp_path / f"{code}.nii") as volume:
            draws, rng = ForegroundDraws("lung", 1.0), np.random.RandomState(0)
            points = np.array([draws.draw(volume, rng) for _ in range(100)])
            drawn.append(points @ volume.affine[:3, :3].T + volume.affine[:3, 3])
    for points in drawn:
        np.testing.assert_allclose(points, drawn[0], rtol=0, atol=1e-4)


def test_a_share_without_a_foreground_is_refused(capsys):
    code, _, errors = run_main(capsys, "--data_dir", "x", "--foreground_share", 0.5)
    assert code == 2 and "--foreground_share needs --foreground" in errors[0]
    for value in ("0", "1.1", "x"):
        code, _, errors = run_main(capsys, "--data_dir", "x", "--foreground", "lung", "--foreground_share", value)
        assert code == 2 and "--foreground_share" in errors[0]
    code, _, errors = run_main(capsys, "--data_dir", "x", "--foreground", "lungs")
    assert code == 2 and "did you mean lung" in errors[0]
