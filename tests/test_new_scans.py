"""Segmentation from tables, and what --predict leaves of a new CT: patients, overlays, probability maps."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
from raw_inputs import write_table
from test_main_lts_msd import assert_one_error, cases, phantom, predict, run_main, save, smaller_model

import main_lts_msd
from dino3d.command_line import UserError
from dino3d.data.conventions import DataError
from dino3d.data.images import voxels_of
from dino3d.features.sliding_window import LEVELS, Grid, to_scan_grid, to_scan_levels
from dino3d.files import read_json, read_table
from dino3d.finetune.mask_inference import segment_volume

__all__ = ["cases", "smaller_model"]  # fixtures
QUICK = ["--epochs", 1, "--patches_per_case", 2, "--lr", 0.01]


def rows_of(cases):
    return [(f"images/{path.name}", f"labels/{path.name}") for path in sorted((cases / "images").iterdir())]


@pytest.fixture(scope="module")
def listed(cases, smaller_model, tmp_path_factory):
    """(folder of a run on a table, its standard output); two cases of one patient, three others of another."""
    folder = tmp_path_factory.mktemp("listed")
    patients = ["a", "a", "b", "c", "d", "d", "d"]
    rows = [(cases / image, cases / mask, patient) for (image, mask), patient in zip(rows_of(cases), patients)]
    table = write_table(folder / "list.csv", ["path", "mask", "patient"], rows[::-1])
    code, said, errors = run_main("--data_list", table, "--output_dir", folder / "out", *QUICK)
    assert code == 0 and not errors, errors
    return folder / "out", said


def test_folds_of_a_table_are_by_patient(listed, cases):
    out, said = listed
    assert "7 cases of " in said and "list.csv: of 4 patients" in said
    splits = read_json(out / "splits.json")
    assert splits["data"]["patients"] == 4 and "7 files" in splits["data"]["data_list"]
    for split in splits["splits"]:
        assert sorted(sum(split.values(), [])) == ["a", "b", "c", "d"]
    tested = {row["case"] for row in read_table(out / "cases.csv")}
    of_patients = {
        "a": {"lung_000", "lung_001"},
        "b": {"lung_002"},
        "c": {"lung_003"},
        "d": {f"lung_{i:03}" for i in (4, 5, 6)},
    }
    assert tested == set.union(*(of_patients[patient] for patient in splits["splits"][0]["test"]))
    assert json.loads((out / "metrics.json").read_text())["all_folds"]["notes"][0].startswith("no 95 % interval: ")


def test_a_changed_table_is_noticed(listed, cases):
    out, _ = listed
    table = out.parent / "list.csv"
    text = table.read_text()
    table.write_text(text.replace(",c\n", ",e\n"))
    flags = ["--data_list", table, "--output_dir", out, *QUICK]
    assert_one_error(run_main(*flags), "is of a run with data_list 7 files")
    table.write_text(text)
    assert run_main(*flags)[0] == 0


def test_one_patient_alone_is_too_few(cases, tmp_path):
    rows = [(cases / image, cases / mask, "a") for image, mask in rows_of(cases)]
    table = write_table(tmp_path / "list.csv", ["path", "mask", "patient"], rows)
    assert_one_error(run_main("--data_list", table, "--output_dir", tmp_path / "out"), "1 patients are too few")


def test_what_is_wrong_is_told_before_training(cases, tmp_path):
    rows = [(cases / mask, cases / image) for image, mask in rows_of(cases)]
    table = write_table(tmp_path / "list.csv", ["path", "mask"], rows)
    found = run_main("--data_list", table, "--output_dir", tmp_path / "out", *QUICK)
    assert_one_error(
        found, ("images/lung_000.nii.gz: has label values", "labels/lung_000.nii.gz is a mask: are the two swapped?")
    )


def test_new_scans_of_a_table_and_a_file(listed, cases, tmp_path):
    weights, names = listed[0], [image for image, _ in rows_of(cases)[:2]]
    table = write_table(
        tmp_path / "new.csv", ["path", "patient"], [(cases / names[1], "Jane"), (cases / names[0], "Joe")]
    )
    code, _, errors = predict(table, weights, tmp_path / "table")
    assert code == 0 and not errors
    rows = read_table(tmp_path / "table" / "volumes.csv")
    assert [(row["case"], row["patient"]) for row in rows] == [("lung_001", "Jane"), ("lung_000", "Joe")]
    code, _, errors = predict(cases / names[0], weights / "0" / "best.pth", tmp_path / "file")
    assert code == 0 and not errors and read_table(tmp_path / "file" / "volumes.csv")[0]["case"] == "lung_000"
    missing = predict(table.with_name("none.csv"), weights, tmp_path / "x")
    assert_one_error(missing, "none.csv: can't be read (No such file")


# ------------------------------------------------------------------------------------------- what is left of a new CT


@pytest.fixture(scope="module")
def new(listed, cases, tmp_path_factory):
    """(folder of new CTs in several forms and orientations, folder of what was predicted of them)."""
    folder = tmp_path_factory.mktemp("new")
    for i, axes in enumerate(("LPS", "RAS", "IRP")):
        save(folder / "scans" / f"scan{i}.nii.gz", *phantom(20 + i)[::2], axes)
    voxels, _, affine = phantom(23, spacing=(2.0, 2.0, 3.0))
    turned = affine @ rotation(9, 2)
    nibabel.save(nibabel.Nifti1Image(voxels, turned), folder / "scans" / "turned.nii")
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing((1.5, 2.5, 3.5))
    sitk.WriteImage(image, str(folder / "scans" / "itk.nrrd"))
    code, said, errors = predict(folder / "scans", listed[0], folder / "out", "--save_probabilities", "true")
    assert code == 0 and not errors, errors
    assert f"overlays  {folder / 'out' / 'overlays'}" in said
    return folder / "scans", folder / "out"


def rotation(degrees, axis):
    """(4, 4) matrix that turns around an axis."""
    matrix, (a, b) = np.eye(4), [i for i in range(3) if i != axis]
    matrix[a, a] = matrix[b, b] = np.cos(np.radians(degrees))
    matrix[a, b], matrix[b, a] = -np.sin(np.radians(degrees)), np.sin(np.radians(degrees))
    return matrix


def test_probability_maps_lie_on_their_scans_and_agree_with_the_masks(new):
    """Opened by nibabel and by ITK, at the scan's place; above one half exactly where the mask is."""
    scans, out = new
    spread = 0
    for path in sorted(scans.iterdir()):
        name = path.name.split(".")[0]
        mask = next(file for file in out.iterdir() if file.name.startswith(name))
        found = nibabel.load(out / "probabilities" / f"{name}.nii.gz")
        values, inside = np.asarray(found.dataobj), np.asarray(nibabel.load(mask).dataobj) > 0
        assert 0 <= values.min() and values.max() <= 1 and inside.any()
        np.testing.assert_array_equal(values > 0.5, inside)
        spread += len(np.unique(values))
        image = sitk.ReadImage(str(out / "probabilities" / f"{name}.nii.gz"))
        np.testing.assert_allclose(sitk.GetArrayFromImage(image).transpose(2, 1, 0), values, atol=1e-6)
        scan = sitk.ReadImage(str(path))
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(image, get)(), getattr(scan, get)(), atol=1e-4)
        if path.suffix != ".nrrd":
            header, own = found.header, nibabel.load(path).header
            for field in ("dim", "pixdim", "sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"):
                np.testing.assert_array_equal(header[field], own[field])
    assert spread > 1000


def test_every_new_ct_has_a_picture_and_its_lesions_are_counted(new):
    from PIL import Image

    scans, out = new
    for path in scans.iterdir():
        name = path.name.split(".")[0]
        pixels = np.asarray(Image.open(out / "overlays" / f"{name}.png"))
        assert ((pixels == (255, 0, 0)).all(-1)).sum() > 20  # the outline
        row = next(row for row in read_table(out / "volumes.csv") if row["case"] == name)
        mask = nibabel.load(next(file for file in out.iterdir() if file.name.startswith(name)))
        assert int(row["lesions"]) == scipy.ndimage.label(np.asarray(mask.dataobj), np.ones((3, 3, 3)))[1] > 0


def test_what_is_missing_is_made_by_the_same_command(new, listed, tmp_path, monkeypatch):
    """An earlier prediction without maps gets them; what is there is not made again."""
    scans, out = new
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "probabilities" / "scan1.nii.gz").unlink()
    done, predict_case = [], main_lts_msd.predict_case
    monkeypatch.setattr(main_lts_msd, "predict_case", lambda *given: done.append(given[0]) or predict_case(*given))
    assert predict(scans, listed[0], tmp_path / "out", "--save_probabilities", "true")[0] == 0
    assert done == [str(scans / "scan1.nii.gz")]
    assert (tmp_path / "out" / "probabilities" / "scan1.nii.gz").is_file()


def test_a_map_never_takes_the_place_of_a_mask(new, listed, tmp_path):
    shutil.copytree(new[0], tmp_path / "scans")
    (tmp_path / "scans" / "probabilities").mkdir()
    shutil.copy(new[0] / "scan0.nii.gz", tmp_path / "scans" / "probabilities" / "scan0.nii.gz")
    found = predict(tmp_path / "scans", listed[0], tmp_path / "out", "--save_probabilities", "true")
    assert_one_error(found, "probabilities/scan0.nii.gz would be of ")


@pytest.mark.parametrize("classes", [2, 3])
def test_levels_are_the_probabilities_of_interpolated_logarithms(classes):
    """Against scipy, on a grid of another spacing that reaches beyond."""
    rng = np.random.default_rng(0)
    logs = np.log(rng.dirichlet(np.ones(classes), (9, 8, 7))).transpose(3, 0, 1, 2).astype(np.float32)
    working = Grid((9, 8, 7), (2.0, 2.0, 3.0), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel()))
    own = Grid((12, 11, 9), (1.5, 1.5, 2.5), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel()))
    index = np.stack(
        np.meshgrid(*(np.arange(n) * a / b for n, a, b in zip(own.size, own.spacing, working.spacing)), indexing="ij")
    )
    expected = np.stack([scipy.ndimage.map_coordinates(one, index, order=1, mode="nearest") for one in logs])
    expected = np.exp(expected) / np.exp(expected).sum(0)
    levels = to_scan_levels(logs, working, own)
    assert levels.dtype == np.uint16 and levels.shape == (classes - 1, *own.size)
    assert np.abs(levels / LEVELS - expected[1:]).max() < 1e-4
    mask = voxels_of(to_scan_grid(logs, working, own))
    if classes == 2:
        np.testing.assert_array_equal(levels[0] > LEVELS / 2, mask)


# ------------------------------------------------------------------------------------------------------------ from code


@pytest.mark.parametrize("name", ["scan0", "scan2", "turned"])
def test_an_array_gets_the_mask_that_its_file_gets(new, listed, name):
    scans, out = new
    path = next(path for path in scans.iterdir() if path.name.startswith(name))
    image = nibabel.load(path)
    mask = segment_volume(listed[0], np.asarray(image.dataobj), image.affine, precision="fp32")  # as in PREDICT
    assert mask.dtype == np.uint8 and mask.shape == image.shape
    np.testing.assert_array_equal(mask, np.asarray(nibabel.load(out / path.name).dataobj))


def test_an_array_that_is_no_ct_is_refused(listed):
    for voxels, said in (
        (np.zeros((9, 9, 9), np.int16), "constant"),
        (np.zeros((9, 9)), "2D"),
        (np.full((9, 9, 9), np.nan), "NaN"),
    ):
        with pytest.raises(DataError, match=said):
            segment_volume(listed[0], voxels.tolist(), np.eye(4))
    with pytest.raises(UserError, match="precision fp64: expected bf16, fp16 or fp32"):
        segment_volume(listed[0], np.zeros((9, 9, 9)), np.eye(4), precision="fp64")
    with pytest.raises(DataError, match="an affine of 3 x 4, expected 4 x 4"):
        segment_volume(listed[0], np.zeros((9, 9, 9)), np.eye(4)[:3])
