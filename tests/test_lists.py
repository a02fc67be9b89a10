"""Tables of files as input: what they hold, what is wrong with them, and the scripts that train on and predict them."""

import collections
import shutil

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from raw_inputs import run, write_series, write_table
from test_main_lnc_luna16 import run_main, smaller_model, write_cases
from test_main_lts_msd import phantom, save

from dino3d.command_line import UserError
from dino3d.data.conventions import DataError
from dino3d.data.layouts import find_crops, read_data_list
from dino3d.data.lists import crops_of_list, pairs_of_list, read_list
from dino3d.data.volume import Volume
from dino3d.files import read_json, read_table

__all__ = ["run", "smaller_model"]  # fixtures
EXACT = ["--precision", "fp32"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """15 labelled crops of 11 patients in the layout of subsets."""
    return write_cases(tmp_path_factory.mktemp("crops"))


def rows_of(crops, label=lambda label: label):
    """Rows path, label, patient, subset of the crops below a folder, relative to it."""
    return [(c.path[len(str(crops)) + 1 :], label(c.label), c.patient, c.subset) for c in find_crops(crops)[0]]


COLUMNS = ["path", "label", "patient", "subset"]


def spoilt(rows, line, column, value):
    rows = [list(row) for row in rows]
    rows[line - 2][column] = value
    return rows


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_table_holds_what_the_folder_holds(crops, tmp_path, separator, absolute):
    rows = rows_of(crops)
    if absolute:
        rows = [(crops / path, *rest) for path, *rest in rows]
    table = write_table((tmp_path if absolute else crops) / "list.csv", COLUMNS, rows[::-1], separator)
    found = crops_of_list(table)
    assert found.crops == find_crops(crops)[0] and not found.problems and not found.lines and found.label_names is None
    assert found.names == [row[0].removesuffix(".nii.gz") for row in rows_of(crops)]
    table.unlink()


def test_words_become_classes_in_sorted_order(crops):
    table = write_table(
        crops / "words.csv", COLUMNS[:1] + ["finding"], [row[:2] for row in rows_of(crops, "ab".__getitem__)]
    )
    found = crops_of_list(table, "finding")
    assert [crop.label for crop in found.crops] == [row[1] for row in rows_of(crops)]
    assert found.label_names == ["a", "b"] and "a = 0, b = 1" in found.lines[1]
    write_table(table, COLUMNS[:1] + ["finding"], [row[:2] for row in rows_of(crops, "ac".__getitem__)])
    renamed = crops_of_list(table, "finding")
    assert renamed.crops == found.crops and renamed.digest != found.digest  # else a run would have both names
    assert "no column patient: each of 15 files" in found.lines[0] and len({crop.patient for crop in found.crops}) == 15
    write_table(table, ["path", "finding", "subject"], [(*row[:2], "p") for row in rows_of(crops, "ab".__getitem__)])
    assert crops_of_list(table, "finding").lines[0].endswith("does subject tell whose they are, call it patient")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: spoilt(rows, 3, 0, "none.nii.gz"), "line 3 names .*none.nii.gz: no such file"),
        (lambda rows: spoilt(rows, 4, 0, rows[0][0]), "lines 2 and 4 name one file"),
        (lambda rows: spoilt(rows, 4, 0, "./" + rows[0][0]), "lines 2 and 4 name one file"),
        (lambda rows: spoilt(rows, 5, 2, " "), "line 5 has nothing in the column patient"),
        (lambda rows: spoilt(rows, 2, 1, "malignant"), "line 2 has 'malignant' in the column label, others"),
        (lambda rows: spoilt(rows, 2, 1, "0.5"), "line 2 has 0.5 in the column label"),
        (lambda rows: spoilt(rows, 2, 1, "-1"), "line 2 has -1 in the column label"),
        (lambda rows: spoilt(rows, 2, 1, "inf"), "line 2 has 'inf' in the column label"),
        (
            lambda rows: [(row[0], "N/A", *row[2:]) for row in rows],
            "none of its 15 files has a label in the column label",
        ),
        (
            lambda rows: [(row[0], "Bb"[line % 2] + "enign", *row[2:]) for line, row in enumerate(rows)],
            "column label: labels Benign, benign differ in upper and lower case alone: write those of one class alike",
        ),
        (lambda rows: spoilt(rows, 2, 1, "1e9"), "values up to 1000000000 in the column label"),
        (lambda rows: spoilt(rows, 2, 0, "list.csv"), "line 2 names .*list.csv: expected .hdf5"),
        (lambda rows: [], "names no file"),
    ],
)
def test_what_is_wrong_with_a_table(crops, spoil, said):
    with pytest.raises(DataError, match="list.csv: .*" + said):
        crops_of_list(write_table(crops / "list.csv", COLUMNS, spoil(rows_of(crops))))


@pytest.mark.parametrize("words", [False, True])
def test_files_without_a_label_are_left_out(crops, words):
    """By the words that evaluate_features.py has for it too, which are no classes."""
    rows = rows_of(crops, "ab".__getitem__ if words else str)
    whole = crops_of_list(write_table(crops / "list.csv", COLUMNS, rows))
    for line, text in enumerate(("", "NA", "nan", "None", "?"), 2):
        rows = spoilt(rows, line, 1, text)
    found = crops_of_list(write_table(crops / "list.csv", COLUMNS, rows))
    assert found.crops == whole.crops[5:] and found.names == whole.names[5:]
    assert found.label_names == whole.label_names and found.digest.startswith("10 files, ")
    assert f"{crops / 'list.csv'}: files that have no label and are left out: 5" in found.lines


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: [(row[0], 1, *row[2:]) for row in rows], "one class only (label 1)"),
        (lambda rows: spoilt(rows, 2, 1, 3), "has the classes 0, 1, 3: expected 0 to 2 without a gap"),
        (lambda rows: spoilt(rows, 2, 3, "subset9"), "has patient p00 in subset0 and subset9"),
    ],
)
def test_what_keeps_a_table_from_being_trained_on(crops, spoil, said):
    problems = crops_of_list(write_table(crops / "list.csv", COLUMNS, spoil(rows_of(crops)))).problems
    assert len(problems) == 1 and said in str(problems[0])


def test_check_says_what_it_takes_a_table_without_labels_for(crops, run):
    said = run("check", write_table(crops / "plain.csv", ["path", "grade"], [row[:2] for row in rows_of(crops)]))
    assert said.code == 0 and "has no column label or mask: checked for pre-training and --predict alone" in said.out


def test_missing_columns_and_tables(crops, tmp_path):
    with pytest.raises(UserError, match="has no column label, only path"):
        crops_of_list(write_table(crops / "list.csv", ["path"], [row[:1] for row in rows_of(crops)]))
    with pytest.raises(UserError, match="has no column path, only file, label"):
        crops_of_list(write_table(crops / "list.csv", ["file", "label"], [row[:2] for row in rows_of(crops)]))
    with pytest.raises(DataError, match="can't be read"):
        crops_of_list(tmp_path / "none.csv")


def test_dicom_series_belong_to_the_patient_in_their_header(tmp_path):
    write_series(tmp_path / "a" / "dicom", series="1.2.3", patient="Jane")
    write_series(tmp_path / "b", series="1.2.4", patient="Joe")
    write_series(tmp_path / "b", series="1.2.5", patient="Ann", prefix="x")
    table = write_table(tmp_path / "list.csv", ["path", "label"], [("a/dicom", 0), ("b#1.2.4", 1), ("b#1.2.5", 0)])
    found = crops_of_list(table)
    assert [(crop.patient, crop.label) for crop in found.crops] == [("Jane", 0), ("Joe", 1), ("Ann", 0)]
    assert found.names == ["a/dicom", "b#1.2.4", "b#1.2.5"]


def test_series_in_one_folder_belong_to_the_patient_in_their_own_header(tmp_path):
    """Where one UID begins with another, two patients share one, or it is missing: whose slices `Volume` reads."""
    series = [("", "Eve"), ("9.9.10", "Ann"), ("9.9.1", "Joe"), ("9.9.5", "Jane"), ("9.9.5", "Jim"), ("9.9.7", "")]
    for k, (uid, patient) in enumerate(series):
        write_series(tmp_path / "all", series=uid, patient=patient, n=10 + k, prefix=f"{k}_")
    slices = collections.Counter(pydicom.dcmread(file).PatientID for file in (tmp_path / "all").iterdir())
    uids = ["no-SeriesInstanceUID", "9.9.10", "9.9.1", "9.9.5", "9.9.5#2", "9.9.7"]
    table = write_table(tmp_path / "list.csv", ["path", "label"], [(f"all#{uid}", k % 2) for k, uid in enumerate(uids)])
    found = crops_of_list(table)
    assert len({crop.patient for crop in found.crops}) == 6
    for crop in found.crops:
        with Volume(crop.path) as volume:
            assert volume.shape[2] == slices["" if crop.patient == "all#9.9.7" else crop.patient]
    assert "no column patient: each of 1 files" in found.lines[0]


def test_pretraining_takes_the_column_path(crops, tmp_path):
    table = write_table(tmp_path / "list.csv", ["patient", "path"], [("p", "a b.nii.gz"), ("q", "/x/c.nii.gz")], ";")
    assert read_data_list(table) == [str(tmp_path / "a b.nii.gz"), "/x/c.nii.gz"]
    assert read_data_list(table, "/data") == ["/data/a b.nii.gz", "/x/c.nii.gz"]
    (tmp_path / "a,path.nii.gz").touch()
    (tmp_path / "bare.csv").write_text("a,path.nii.gz\nb.nii.gz\n")
    assert read_data_list(tmp_path / "bare.csv") == [str(tmp_path / "a,path.nii.gz"), str(tmp_path / "b.nii.gz")]
    with pytest.raises(UserError, match="has no column path"):
        read_data_list(write_table(tmp_path / "list.csv", ["file"], [("a.nii.gz",)]))


# ------------------------------------------------------------------------------------------------------ classification


def test_classification_trains_on_a_table_as_on_the_folder(crops, tmp_path, capsys, run):
    flags = ["--protocol", "knn", "--num_test", 4]
    table = write_table(crops / "list.csv", COLUMNS, rows_of(crops)[::-1], ";")
    said = run("check", table)
    assert said.code == 0 and "classification layout: 15 crops of 11 patients" in said.out
    for out, source in (("folder", ["--data_dir", crops]), ("list", ["--data_list", table])):
        code, _, errors = run_main(capsys, *source, "--output_dir", tmp_path / out, *flags)
        assert code == 0, errors
    for name in ("predictions.csv", "metrics.json"):
        assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "list" / name).read_bytes()
    splits = [read_json(tmp_path / out / "splits.json") for out in ("folder", "list")]
    assert splits[0]["splits"] == splits[1]["splits"] and "15 files" in splits[1]["data"]["data_list"]
    resume = ["--data_list", table, "--output_dir", tmp_path / "list", *flags]
    assert run_main(capsys, *resume)[0] == 0
    swapped = rows_of(crops)
    swapped[0], swapped[1] = (swapped[1][0], *swapped[0][1:]), (swapped[0][0], *swapped[1][1:])
    write_table(table, COLUMNS, swapped)
    code, _, errors = run_main(capsys, *resume)
    assert code == 1 and "is of a run with data_list 15 files" in errors[0]
    code, _, errors = run_main(capsys, "--data_dir", crops, "--output_dir", tmp_path / "list", *flags)
    assert code == 1 and "is of a run with data_list 15 files" in errors[0]


def test_words_are_remembered_and_subsets_rotate(crops, tmp_path, capsys, run):
    rows = rows_of(crops, ["benign", "malignant"].__getitem__)
    table = write_table(crops / "list.csv", ["path", "finding", "patient"], [row[:3] for row in rows])
    said = run("check", table, "--label_column", "finding")
    assert said.code == 0 and "benign = 0, malignant = 1" in said.out
    source = ["--data_list", table, "--label_column", "finding", "--protocol", "knn"]
    code, said, errors = run_main(capsys, *source, "--output_dir", tmp_path / "out")
    assert code == 0 and not errors and "benign = 0, malignant = 1" in said
    assert torch.load(tmp_path / "out" / "0" / "best.pth")["config"]["label_names"] == ["benign", "malignant"]
    code, _, errors = run_main(capsys, *source, "--output_dir", tmp_path / "subsets", "--folds", "subsets")
    assert code == 1 and "has no column subset" in errors[0]
    new = write_table(crops / "new.csv", ["path", "patient"], [rows[3][::2], rows[0][::2]])
    code, said, errors = run_main(
        capsys, "--predict", new, "--weights", tmp_path / "out", "--output_dir", tmp_path / "new", tiny=EXACT
    )
    assert code == 0 and not errors
    assert "label0 (benign): " in said and "label1 (malignant): " in said
    found = read_table(tmp_path / "new" / "predictions.csv")
    assert [row["patient"] for row in found] == [rows[3][2], rows[0][2]]
    one = crops / rows[0][0]
    code, _, errors = run_main(
        capsys, "--predict", one, "--weights", tmp_path / "out", "--output_dir", tmp_path / "one", tiny=EXACT
    )
    alone = read_table(tmp_path / "one" / "predictions.csv")
    assert code == 0 and len(alone) == 1 and alone[0]["case"] == one.name.removesuffix(".nii.gz")
    assert float(alone[0]["probability"]) == pytest.approx(float(found[1]["probability"]), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data_dir", "DIR", "--data_list", "a.csv"], "two ways to name the data"),
        (["--data_dir", "DIR", "--label_column", "x"], "--data_list, which is missing"),
        (["--predict", "DIR", "--weights", "OUT", "--data_list", "a.csv"], "--predict LIST.csv"),
    ],
)
def test_flags_that_contradict_each_other(flags, said, capsys):
    code, _, errors = run_main(capsys, *flags)
    assert code == 2 and len(errors) == 1 and said in errors[0]


# -------------------------------------------------------------------------------------------------------- segmentation


@pytest.fixture
def masked(tmp_path):
    """Rows path, mask, patient of four images whose masks have other names, in other folders."""
    rows = []
    for i in range(4):
        voxels, mask, affine = phantom(i, (24, 22, 16))
        save(tmp_path / "ct" / f"scan{i}" / "image.nii.gz", voxels, affine)
        save(tmp_path / "truth" / f"tumour{i}.nii.gz", mask, affine)
        rows.append((f"ct/scan{i}/image.nii.gz", f"truth/tumour{i}.nii.gz", f"p{i // 2}"))
    return rows


def test_pairs_of_a_table(masked, tmp_path, run):
    table = write_table(tmp_path / "list.csv", ["path", "mask", "patient"], masked[::-1])
    found = pairs_of_list(table)
    assert [pair.name for pair in found.pairs] == [f"scan{i}/image" for i in range(4)]
    assert [pair.label for pair in found.pairs] == [str(tmp_path / row[1]) for row in masked]
    assert found.patients == ["p0", "p0", "p1", "p1"]
    said = run("check", table)
    assert said.code == 0 and f"segmentation layout: 4 cases in {table}: of 2 patients" in said.out
    other = write_table(tmp_path / "without.csv", ["path", "mask"], [row[:2] for row in masked])
    assert "each of 4 files" in pairs_of_list(other).lines[0] and pairs_of_list(other).digest != found.digest


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: spoilt(rows, 3, 1, "none.nii.gz"), "line 3 names .*none.nii.gz: no such file"),
        (lambda rows: spoilt(rows, 3, 1, rows[0][1]), "lines 2 and 3 have the same mask"),
        (lambda rows: spoilt(rows, 3, 1, rows[1][0]), "line 3 has .* as a mask, line 3 as an image"),
        (lambda rows: spoilt(rows, 3, 1, ""), "line 3 has nothing in the column mask"),
    ],
)
def test_what_is_wrong_with_a_table_of_masks(masked, spoil, said, tmp_path):
    with pytest.raises(DataError, match=said):
        pairs_of_list(write_table(tmp_path / "list.csv", ["path", "mask", "patient"], spoil(masked)))


def test_results_that_would_share_a_name(masked, tmp_path):
    shutil.copy(tmp_path / masked[0][0], tmp_path / "ct" / "scan1_image.nii.gz")
    shutil.copy(tmp_path / masked[0][1], tmp_path / "truth" / "other.nii.gz")
    table = write_table(
        tmp_path / "list.csv",
        ["path", "mask"],
        [*(r[:2] for r in masked), ("ct/scan1_image.nii.gz", "truth/other.nii.gz")],
    )
    with pytest.raises(DataError, match="results of both would be called"):
        pairs_of_list(table)


def test_check_refuses_swapped_columns_and_other_grids(masked, tmp_path, run):
    """Before it trains, as training would."""
    table = write_table(tmp_path / "list.csv", ["path", "mask"], [(mask, path) for path, mask, _ in masked])
    said = run("check", table)
    assert said.code == 1 and "4 things would be refused" in said.errors[0] and "label values" in said.errors[0]
    image = nibabel.load(tmp_path / masked[0][1])
    moved = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine + np.eye(4, k=3) * 5)
    nibabel.save(moved, tmp_path / masked[0][1])
    write_table(table, ["path", "mask", "patient"], masked)
    said = run("check", table)
    assert said.code == 1 and "tumour0.nii.gz: lies elsewhere than its image" in said.errors[0]


def test_a_folder_with_several_series_is_told(tmp_path, run):
    write_series(tmp_path / "b", series="1.2.4")
    write_series(tmp_path / "b", series="1.2.5", prefix="x")
    table = write_table(tmp_path / "list.csv", ["path"], [("b",)])
    assert [row.name for row in read_list(table)] == ["b"]
    said = run("check", table)
    assert said.code == 1 and "a folder with 2 DICOM series of CT" in said.errors[0]
