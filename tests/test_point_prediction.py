"""New scans and a table of points to probabilities: what conversion cuts and training sees, in one command."""

import shutil

import numpy as np
import pytest
import torch
from raw_inputs import run, scan, write_image, write_luna16, write_series, write_table
from test_main_lnc_luna16 import run_main, smaller_model

from dino3d.files import read_table
from dino3d.finetune import point_prediction

__all__ = ["run", "smaller_model"]  # fixtures
HERE = ["--precision", "fp32", "--batch_size_per_gpu", "6", "--num_workers", "0"]
HEADER = ["seriesuid", "coordX", "coordY", "coordZ"]
SERIES = {f"1.2.{k}": f"subset{k % 3}" for k in range(1, 7)}


def train(source, folder, run, capsys, *flags, spacing=(6, 6, 10), size=(28, 26, 10)):
    """Crops of a LUNA16 folder and a run on them."""
    done = run("luna16", "--input", source, "--output", folder / "crops", "--size", *size, "--spacing", *spacing)
    assert done.code == 0, done.errors
    code, _, errors = run_main(
        capsys, "--data_dir", folder / "crops", "--output_dir", folder / "out", "--epochs", 1, *flags
    )
    assert code == 0, errors
    return folder / "out"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LUNA16 folder, its crops and a run on them."""
    folder = tmp_path_factory.mktemp("made")
    write_luna16(folder / "luna16", SERIES, positives=2, negatives=2, annotated=False)
    return folder


@pytest.fixture
def trained(made, run, capsys):
    return made / "out" if (made / "out").exists() else train(made / "luna16", made, run, capsys)


def predict(capsys, source, points, weights, out, *flags):
    code, said, errors = run_main(
        capsys, "--predict", source, "--points", points, "--weights", weights, "--output_dir", out, *flags, tiny=HERE
    )
    return code, said, errors, read_table(out / "predictions.csv") if (out / "predictions.csv").exists() else None


def assert_as_the_crops(tmp_path, weights, rows, capsys):
    """Each point has the probability of its crop, which `--predict` gives for the crop's file."""
    where = ["--predict", weights.parent / "crops", "--weights", weights, "--output_dir", tmp_path / "of_crops"]
    code, _, errors = run_main(capsys, *where, tiny=HERE)
    assert code == 0, errors
    of_crops = {row["case"]: row for row in read_table(tmp_path / "of_crops" / "predictions.csv")}
    places = {}
    for row in read_table(weights.parent / "crops" / "manifest.csv"):
        place = row["patient"], *(float(row[axis]) for axis in "xyz")
        places[place] = row["output"].removesuffix(".nii.gz")
    assert len(rows) == len(places) == len(of_crops)
    for row in rows:
        crop = of_crops[places[row["case"], float(row["coordX"]), float(row["coordY"]), float(row["coordZ"])]]
        assert float(row["probability"]) == pytest.approx(float(crop["probability"]), abs=1e-6)
        assert (row["predicted"], row["reason"]) == (crop["predicted"], "")
    assert len({row["probability"] for row in rows}) > len(rows) / 2  # not the same for all


def test_a_point_has_the_probability_of_its_training_crop(trained, tmp_path, capsys, monkeypatch):
    """candidates_V2.csv as it is; each scan is opened once."""
    opened, open_ct = [], point_prediction.open_ct
    monkeypatch.setattr(point_prediction, "open_ct", lambda path: opened.append(path) or open_ct(path))
    source = trained.parent / "luna16"
    table = source / "candidates_V2.csv"
    code, said, errors, rows = predict(capsys, source, table, trained, tmp_path / "new")
    assert code == 0 and not errors
    assert f"note: the column class of {table} plays no part" in said
    assert (
        "24 points in 6 scans; crops of 28 26 10 voxels of 6 6 10 mm" in said and "24 points, mean of 2 folds" in said
    )
    assert len(opened) == len(set(opened)) == 6
    assert list(rows[0]) == ["case", *HEADER[1:], "probability", "predicted", "reason"]
    named = [(row["seriesuid"], float(row["coordX"])) for row in read_table(table)]
    assert [(row["case"], float(row["coordX"])) for row in rows] == named
    assert_as_the_crops(tmp_path, trained, rows, capsys)


def test_crops_of_each_scans_own_voxels(tmp_path, run, capsys):
    """Training's crops then have several spacings, and so have the crops of points."""
    write_luna16(tmp_path / "luna16", SERIES, positives=2, negatives=2, annotated=False)
    wide = scan(1, shape=(36, 30, 18), spacing=(9.0, 9.0, 15.0))
    write_image(tmp_path / "luna16" / "subset2" / "1.2.2.mhd", wide)
    weights = train(tmp_path / "luna16", tmp_path, run, capsys, spacing=(0, 0, 0), size=(22, 20, 10))
    _, said, _, rows = predict(
        capsys, tmp_path / "luna16", tmp_path / "luna16" / "candidates_V2.csv", weights, tmp_path / "new"
    )
    assert "of each scan's own voxels, as training's had several spacings" in said
    assert_as_the_crops(tmp_path, weights, rows, capsys)


def test_crops_smaller_than_the_input_are_padded_as_in_training(tmp_path, run, capsys):
    write_luna16(tmp_path / "luna16", SERIES, positives=2, negatives=2, annotated=False)
    weights = train(tmp_path / "luna16", tmp_path, run, capsys, size=(21, 26, 8))
    *_, rows = predict(
        capsys, tmp_path / "luna16", tmp_path / "luna16" / "candidates_V2.csv", weights, tmp_path / "new"
    )
    assert_as_the_crops(tmp_path, weights, rows, capsys)


def test_what_can_not_be_predicted_is_a_row_with_its_reason(trained, tmp_path, capsys):
    """A point outside, none, in no scan, in two, in a broken one; the others are predicted, and kept by resuming."""
    new = tmp_path / "new"
    write_image(new / "a.nrrd", scan())
    write_series(new / "dicom", series="1.9.9")
    for name in ("two.mha", "more/two.nrrd", "cut.mha"):
        write_image(new / name, scan(1))
    (new / "cut.mha").write_bytes((new / "cut.mha").read_bytes()[:-500])
    rows = [
        ("a", 0, 0, 0),
        ("two", 0, 0, 0),
        ("1.9.9", 0, 0, 15),
        ("a", 4000, 0, 0),
        ("none", 0, 0, 0),
        ("cut", 1, 2, 3),
        ("a", 10, "far", 0),
        ("a", -20, 10, 5),
    ]
    table = write_table(tmp_path / "points.csv", HEADER, rows, ";")
    code, said, errors, found = predict(capsys, new, table, trained, tmp_path / "out2")
    assert (
        code == 1 and len(errors) == 1 and "5 of 8 points have no prediction, such as a: outside the scan" in errors[0]
    )
    reasons = [
        "",
        "two scans of one series",
        "",
        "outside the scan",
        "no scan of this series",
        "can't be read",
        "not a point",
        "",
    ]
    assert [row["case"] for row in found] == [row[0] for row in rows]
    for row, reason, (_, x, *_) in zip(found, reasons, rows):
        assert (reason in row["reason"]) if reason else row["reason"] == ""
        assert (row["probability"] == "") == (row["predicted"] == "") == bool(reason)
        assert row["coordX"] == "" if "not a point" in reason else float(row["coordX"]) == x
    (new / "more" / "two.nrrd").unlink()
    shutil.copy(new / "two.mha", new / "cut.mha")
    code, said, errors, again = predict(capsys, new, table, trained, tmp_path / "out2")
    assert "2 scans were done before" in said and "3 of 8 points" in errors[0]
    assert [row for row, reason in zip(again, reasons) if not reason] == [row for row in found if not row["reason"]]
    write_table(tmp_path / "points.csv", HEADER, rows[:1])
    code, _, errors, _ = predict(capsys, new, table, trained, tmp_path / "out2")
    assert code == 1 and "holds predictions with another points; choose another" in errors[0]


def test_points_in_ras_are_told(trained, tmp_path, capsys):
    image = scan()
    image.SetOrigin((500, 400, 0))
    write_image(tmp_path / "new" / "a.nrrd", image)
    middle = np.array(image.TransformContinuousIndexToPhysicalPoint([10, 8, 5])) * (-1, -1, 1)
    table = write_table(tmp_path / "points.csv", HEADER, [("a", *middle)])
    code, said, _, _ = predict(capsys, tmp_path / "new", table, trained, tmp_path / "out2")
    assert code == 1 and "warning: a: 1 of 1 points lie outside" in said and "are they RAS" in said


def test_a_single_file_can_be_given(trained, tmp_path, capsys):
    path = write_image(tmp_path / "new" / "a.nrrd", scan())
    table = write_table(tmp_path / "points.csv", HEADER, [("a", 0, 0, 0), ("b", 0, 0, 0)])
    *_, rows = predict(capsys, path, table, trained / "1", tmp_path / "out2")
    assert [row["reason"] for row in rows] == ["", f"no scan of this series below {path}"]


def test_the_same_from_every_format(trained, tmp_path, capsys):
    for suffix in ("nrrd", "mha", "nii.gz"):
        write_image(tmp_path / suffix / f"a.{suffix}", scan())
    table = write_table(tmp_path / "points.csv", HEADER, [("a", 3.25, -7.5, 11)])
    rows = [
        predict(capsys, tmp_path / suffix, table, trained, tmp_path / f"of {suffix}")[3]
        for suffix in ("nrrd", "mha", "nii.gz")
    ]
    assert rows[0] == rows[1]
    assert float(rows[2][0]["probability"]) == pytest.approx(float(rows[0][0]["probability"]), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seriesuid,coordX,coordY\na,1,2\n", "has no column coordZ"),
        ("seriesuid,coordX,coordY,coordZ\n", "holds no points"),
        (None, "can't be read"),
    ],
)
def test_a_bad_table_is_one_line(text, said, trained, tmp_path, capsys):
    if text is not None:
        (tmp_path / "points.csv").write_text(text)
    code, _, errors, _ = predict(capsys, trained.parent / "luna16", tmp_path / "points.csv", trained, tmp_path / "out2")
    assert code == 1 and len(errors) == 1 and said in errors[0] and "points.csv" in errors[0]


def test_points_want_scans(tmp_path, capsys):
    code, _, errors = run_main(capsys, "--data_dir", tmp_path, "--points", tmp_path / "points.csv")
    assert code == 2 and "--points CSV needs --predict DIR" in errors[0]


def test_the_window_is_the_middle_of_the_crop():
    """Against slicing the image where its voxels are taken as they are."""
    image = scan()
    voxels = point_prediction.voxels_of(image)
    point = point_prediction.Point("t", 2, image.TransformIndexToPhysicalPoint((20, 15, 9)), None)
    crops = point_prediction.PointCrops((9, 7, 5), None, (5, 9, 3), (-1000, 1000))
    window = point_prediction.window_at(image, point, crops)
    expected = np.full((5, 9, 3), -1024, np.int16)
    expected[:, 1:8] = voxels[18:23, 12:19, 8:11]
    np.testing.assert_array_equal(window, expected)
    assert torch.from_numpy(window).dtype == torch.int16
