"""Prediction of new files: each one's failure is its own row, what is done stays done, a signal ends it in order."""

import os
import shutil
import signal

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from raw_inputs import write_dicom
from test_main_lts_msd import Thresholding, assert_one_error, predict, save

import main_lts_msd
from dino3d.data.hdf5 import write_volume
from dino3d.features import journal, sliding_window
from dino3d.features.sliding_window import Windows, count_batches
from dino3d.files import read_table
from dino3d.finetune import prediction

CONFIG = {
    "input_size": [24, 24, 12],
    "clip_range": [-1000.0, 1000.0],
    "spacing": [2.0, 2.0, 3.0],
    "classes": 2,
    "overlap": 0.25,
    "largest_component": False,
    "min_volume": 0.0,
    "tolerance": 2.0,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder that stands for a trained run, whose network takes what is denser than 0 HU."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pth").touch()
    monkeypatch.setattr(main_lts_msd, "load_folds", lambda *_: ([Thresholding()], CONFIG, [{}]))
    return tmp_path / "run"


def scan(seed, shape=(20, 18, 12)):
    """HU of air with one dense block, somewhere."""
    rng = np.random.default_rng(seed)
    voxels = np.full(shape, -900, np.int16) + rng.integers(-40, 40, shape).astype(np.int16)
    at = rng.integers(3, 9, 3)
    voxels[tuple(slice(a, a + 5) for a in np.minimum(at, np.array(shape) - 6))] = 900
    return voxels


AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def write_twenty(folder):
    """Reason of each of the five that can't be predicted, by name."""
    folder.mkdir(parents=True)
    for i in range(15):
        path = folder / f"p{i:02}" / f"scan{['.nii.gz', '.nii', '.nrrd', '.mha', '.hdf5'][i % 5]}"
        path.parent.mkdir()
        if i % 5 < 2:
            save(path, scan(i), AFFINE, ("RAS", "LPS", "SAL")[i % 3])
        elif i % 5 == 4:
            write_volume(path, scan(i), AFFINE)
        else:
            image = sitk.GetImageFromArray(np.ascontiguousarray(scan(i).T))
            image.SetSpacing((2.0, 2.0, 3.0))
            sitk.WriteImage(image, str(path))
    save(folder / "bad" / "cut.nii.gz", scan(20), AFFINE)
    whole = (folder / "bad" / "cut.nii.gz").read_bytes()
    (folder / "bad" / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "bad" / "empty.mha").touch()
    save(folder / "bad" / "window.nii.gz", (scan(21).astype(int) + 1000).clip(0, 255).astype(np.uint8), AFFINE)
    nibabel.save(nibabel.Nifti1Image(np.stack([scan(22)] * 2, -1), AFFINE), folder / "bad" / "time.nii.gz")
    shear = AFFINE + 0.3 * np.eye(4, k=1) * [0, 1, 0, 0]
    nibabel.save(nibabel.Nifti1Image(scan(23), shear), folder / "bad" / "sheared.nii")
    return {
        "bad/cut": "can't be read",
        "bad/empty": "the file is empty",
        "bad/window": "not in HU: grey values",
        "bad/time": "4D",
        "bad/sheared": "not at right angles",
    }


def test_fifteen_of_twenty_have_a_mask(run, tmp_path):
    reasons = write_twenty(tmp_path / "new")
    found = predict(tmp_path / "new", run, tmp_path / "out")
    assert_one_error(found, ("5 of 20 files have no prediction", "volumes.csv"))
    rows = {row["case"]: row for row in read_table(tmp_path / "out" / "volumes.csv")}
    assert len(rows) == 20
    assert {case: row["reason"] for case, row in rows.items() if row["reason"]}.keys() == reasons.keys()
    for case, reason in reasons.items():
        assert reason in rows[case]["reason"] and rows[case]["class"] == rows[case]["volume_ml"] == ""
        assert f"{case}: no prediction" in found[1]
    masks = sorted((tmp_path / "out").rglob("*.nii*"))
    assert len(masks) == 15
    for i, path in enumerate(masks):
        mask = nibabel.as_closest_canonical(nibabel.load(path))
        expected = scan(i) if i % 5 not in (2, 3) else scan(i)[::-1, ::-1]  # ITK's axes go to the left and to the back
        np.testing.assert_array_equal(np.asarray(mask.dataobj), expected > 0)
        assert float(rows[f"p{i:02}/scan"]["volume_ml"]) == pytest.approx(125 * 12 / 1000)


def test_the_same_command_goes_on(run, tmp_path, monkeypatch):
    """What is done is not done again; what failed is, and what changed."""
    write_twenty(tmp_path / "new")
    done, predict_case = [], main_lts_msd.predict_case

    def counted(path, *more):
        done.append(os.path.relpath(path, tmp_path / "new"))
        return predict_case(path, *more)

    monkeypatch.setattr(main_lts_msd, "predict_case", counted)
    predict(tmp_path / "new", run, tmp_path / "out")
    assert len(done) == 20
    first = (tmp_path / "out" / "volumes.csv").read_bytes()
    done.clear()
    assert "15 of them were done before" in predict(tmp_path / "new", run, tmp_path / "out")[1]
    assert len(done) == 5 and all(name.startswith("bad") for name in done)
    assert (tmp_path / "out" / "volumes.csv").read_bytes() == first
    shutil.rmtree(tmp_path / "new" / "bad")
    save(tmp_path / "new" / "p00" / "scan.nii.gz", scan(50), AFFINE)
    (tmp_path / "out" / "p03" / "scan.nii.gz").unlink()
    journal = tmp_path / "out" / ".predicted.0.jsonl"
    lines = journal.read_text().splitlines()
    assert "p14" in lines[15]
    journal.write_text("\n".join(lines[:15]) + "\n" + lines[15][:20])  # cut off, as by a full disk
    done.clear()
    assert predict(tmp_path / "new", run, tmp_path / "out")[0] == 0
    assert sorted(done) == ["p00/scan.nii.gz", "p03/scan.mha", "p14/scan.hdf5"]
    assert len(read_table(tmp_path / "out" / "volumes.csv")) == 15
    again = predict(tmp_path / "new", run, tmp_path / "out")
    assert again[0] == 0 and "15 of them were done before" in again[1] and len(done) == 3


def test_a_start_that_fails_loses_no_results(run, tmp_path, monkeypatch):
    """Journals of two processes are brought into one: where the disk is full then, both are still there."""
    for name in ("a", "b"):
        save(tmp_path / "new" / f"{name}.nii.gz", scan(1), AFFINE)
    assert predict(tmp_path / "new", run, tmp_path / "out")[0] == 0
    first = tmp_path / "out" / prediction.JOURNALS.format(0)
    recipe, a, b = first.read_text().splitlines(keepends=True)
    second = tmp_path / "out" / prediction.JOURNALS.format(1)
    first.write_text(recipe + a)
    second.write_text(recipe + b)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "append_json", full)
        assert_one_error(predict(tmp_path / "new", run, tmp_path / "out"), ("can't be written", "No space left"))
    assert (first.read_text(), second.read_text()) == (recipe + a, recipe + b)
    assert "2 of them were done before" in predict(tmp_path / "new", run, tmp_path / "out")[1]
    assert first.read_text() == recipe + a + b and not second.exists()


def test_what_a_header_or_a_folder_stands_for_is_seen_to_change(run, tmp_path):
    """A DICOM series' slices, and the voxels beside a MetaImage header: no row and no mask of what was there before."""
    new, out = tmp_path / "new", tmp_path / "out"

    def write(dense):
        voxels = np.full((16, 12, 10), -900, np.int16)
        voxels[2 : 2 + dense, 3:6, 4:6] = 900
        write_dicom(new, voxels + 1024, spacing=(2.0, 2.0, 3.0))
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
        image.SetSpacing((2.0, 2.0, 3.0))
        sitk.WriteImage(image, str(new / "whole" / "scan.mhd"))
        (new / "slices").mkdir(exist_ok=True)
        header = (new / "whole" / "scan.mhd").read_text().replace("scan.raw", "LIST")
        (new / "slices" / "scan.mhd").write_text(header + "".join(f"{k}.raw\n" for k in range(10)))
        for k in range(10):
            (new / "slices" / f"{k}.raw").write_bytes(voxels[..., k].T.astype("<i2").tobytes())

    (new / "whole").mkdir(parents=True)
    for dense in (3, 5):
        write(dense)
        assert predict(new, run, out)[0] == 0
        rows = {row["case"]: float(row["volume_ml"]) for row in read_table(out / "volumes.csv")}
        assert rows == dict.fromkeys(("1.2.3.4", "slices/scan", "whole/scan"), pytest.approx(dense * 6 * 12 / 1000))
        masks = sorted(str(path.relative_to(out)) for path in out.rglob("*.nii.gz"))
        assert masks == ["1.2.3.4.nii.gz", "slices/scan.nii.gz", "whole/scan.nii.gz"]  # none is hidden
    assert "3 of them were done before" in predict(new, run, out)[1]


def test_what_is_odd_about_a_scan_is_told(run, tmp_path):
    """A header that can be read in two ways, and padding that stands as metal."""
    image = nibabel.Nifti1Image(scan(0), None)
    image.header.set_sform(AFFINE, 1)
    image.header.set_qform(np.diag([2.0, 2.0, 6.0, 1.0]), 1)
    (tmp_path / "new").mkdir()
    nibabel.save(image, tmp_path / "new" / "forms.nii")
    bright = scan(1)
    bright[:4] = 32000
    save(tmp_path / "new" / "padded.nii", bright, AFFINE)
    code, out, _ = predict(tmp_path / "new", run, tmp_path / "out")
    assert code == 0
    assert (
        f"note: 1 of 2 files can be read in two ways, such as {tmp_path}/new/forms.nii: its qform and sform put" in out
    )
    assert f"warning: {tmp_path}/new/padded.nii: 20% of its voxels are above 20,000 HU" in out


def test_two_files_of_one_name_are_refused(run, tmp_path):
    """Both have a mask of their own, but the table has one row of each name."""
    for name in ("scan.nii", "scan.nii.gz"):
        save(tmp_path / "new" / name, scan(0), AFFINE)
    assert_one_error(predict(tmp_path / "new", run, tmp_path / "out"), "two volumes are called scan; rename one")


def test_rows_are_there_before_the_end_and_a_signal_ends_it(run, tmp_path, monkeypatch):
    write_twenty(tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "bad")
    seen, predict_case = [], main_lts_msd.predict_case
    monkeypatch.setattr(prediction, "TABLE_EVERY", 0.0)

    def counted(path, *more):
        if seen:
            assert len(read_table(tmp_path / "out" / "volumes.csv")) == len(seen)
        seen.append(path)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)  # is heeded before the next window: this case is not done
        return predict_case(path, *more)

    monkeypatch.setattr(main_lts_msd, "predict_case", counted)
    code, _, errors = predict(tmp_path / "new", run, tmp_path / "out")
    assert code == 130 and len(errors) == 1 and "the same command resumes" in errors[0], errors
    assert (tmp_path / "out" / "preempted").exists() and len(read_table(tmp_path / "out" / "volumes.csv")) == 5
    monkeypatch.setattr(main_lts_msd, "predict_case", predict_case)
    code, out, errors = predict(tmp_path / "new", run, tmp_path / "out")
    assert code == 0 and "5 of them were done before" in out and not (tmp_path / "out" / "preempted").exists()
    assert len(read_table(tmp_path / "out" / "volumes.csv")) == 15


@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
        (ValueError("odd\nthing"), "unexpected: ValueError: odd thing"),
    ],
)
def test_whatever_goes_wrong_with_one_file_is_its_own_row(error, told, run, tmp_path, monkeypatch):
    write_twenty(tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "bad")
    read_image = main_lts_msd.read_image

    def fails(path):
        if "p07" in path:
            raise error
        return read_image(path)

    monkeypatch.setattr(main_lts_msd, "read_image", fails)
    found = predict(tmp_path / "new", run, tmp_path / "out")
    assert_one_error(found, ("1 of 15 files", told))
    rows = read_table(tmp_path / "out" / "volumes.csv")
    assert [row["case"] for row in rows if row["reason"]] == ["p07/scan"] and len(rows) == 15


def test_predictions_of_other_weights_are_not_mixed(run, tmp_path):
    write_twenty(tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "bad")
    assert predict(tmp_path / "new", run, tmp_path / "out")[0] == 0
    before = (tmp_path / "out" / "volumes.csv").read_bytes()
    assert_one_error(predict(tmp_path / "new", run, tmp_path / "out", "--overlap", 0.5), ("another overlap",))
    (run / "best.pth").write_bytes(b"trained anew")
    assert_one_error(predict(tmp_path / "new", run, tmp_path / "out"), ("another weights",))
    assert (tmp_path / "out" / "volumes.csv").read_bytes() == before


@pytest.mark.parametrize("size", [(5, 6, 7), (24, 24, 12), (25, 24, 12), (60, 41, 33), (100, 24, 50)])
@pytest.mark.parametrize("overlap, batch_size", [(0.0, 1), (0.25, 3), (0.5, 4), (0.9, 7)])
def test_batches_of_windows_are_counted(size, overlap, batch_size):
    calls = []
    image = sitk.GetImageFromArray(np.zeros(size[::-1], np.int16))
    windows = Windows((24, 24, 12), overlap, batch_size)
    sliding_window.segment(
        [Thresholding()], image, windows, (-1000, 1000), "cpu", before_windows=lambda: calls.append(1)
    )
    assert len(calls) == count_batches(size, windows)
