"""prepare_data.py luna16 --table with tables of FMCIB's form (image_path, three parts of a split), and both evaluations
that its lists lead to."""

import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from raw_inputs import contents, outcomes, run, write_image, write_table
from test_main_lnc_luna16 import run_main, smaller_model

from dino3d.command_line import UserError
from dino3d.data.lists import crops_of_list
from dino3d.files import read_json, read_table
from dino3d.finetune.splits import subset_splits
from dino3d.prepare.point_tables import BY_PATIENT, PUBLISHED, SPLIT_PARTS, split_parts

__all__ = ["run", "smaller_model"]  # fixtures
HEADER = ["Unnamed: 0", "malignancy", "coordX", "coordY", "coordZ", "image_path"]
FOLDER = "/mnt/elsewhere/LUNA16/"
INDEX = {0: (10, 12, 7), 1: (21, 18, 9)}  # voxel of a scan's nodule of each label


def write_scan(path, prone=False):
    """A CT of 3 mm voxels with a soft ball around each voxel of INDEX, larger for label 1; returns LPS mm of both."""
    voxels = np.full((16, 30, 32), -850, np.int16)  # z, y, x
    z, y, x = np.indices(voxels.shape)
    for label, (i, j, k) in INDEX.items():
        voxels[(x - i) ** 2 + (y - j) ** 2 + (z - k) ** 2 <= 2 + 4 * label] = 40 + label
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([3.0, 3.0, 3.0])
    image.SetOrigin([40.0, 55.0, -300.0] if prone else [-50.0, -40.0, -300.0])
    image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1] if prone else [1, 0, 0, 0, 1, 0, 0, 0, 1])
    write_image(path, image)
    return {label: image.TransformContinuousIndexToPhysicalPoint(index) for label, index in INDEX.items()}


@pytest.fixture
def study(tmp_path):
    """12 scans and the tables of a split by nodule: (folder, {part: rows}, {part: path}); two test scans and a
    validation scan stand in training, one test scan in validation."""
    nodules = {f"1.2.{i}": write_scan(tmp_path / f"in/subset{i % 4}/1.2.{i}.mhd", prone=i == 1) for i in range(12)}
    split = {
        "train": [(i, i % 2) for i in range(6)] + [(6, 0), (8, 1), (9, 0)],
        "val": [(6, 1), (7, 0), (10, 1)],
        "test": [(8, 0), (9, 1), (10, 0), (11, 1)],
    }
    rows = {
        part: [(7 * i, label, *nodules[f"1.2.{i}"][label], f"{FOLDER}1.2.{i}.mhd") for i, label in those]
        for part, those in split.items()
    }
    return tmp_path / "in", rows, write_tables(tmp_path, rows)


def write_tables(folder, rows):
    return {part: write_table(folder / f"task2_{part}.csv", HEADER, those) for part, those in rows.items()}


def prepare(run, study, output, *more, tables=None):
    flags = ["--label_column", "malignancy", "--size", 12, 12, 8, "--spacing", 3, 3, 3, "--workers", 1]
    given = tables or study[2].values()
    return run("luna16", "--input", study[0], "--output", output, "--table", *given, *flags, *more)


def sides_of(path):
    """{part: {(series, label)}} of a list of crops."""
    sides = {part: set() for part in SPLIT_PARTS}
    for row in read_table(path):
        _, label, patient, name = row["path"].split("/")
        assert label == f"label{row['label']}" and row["patient"] in (patient, f"{patient}@{row['subset']}")
        sides[row["subset"]].add((patient, int(row["label"])))
    return sides


def test_three_tables_are_a_split_and_what_it_shares_is_told(study, tmp_path, run):
    result = prepare(run, study, tmp_path / "out")
    assert result.code == 0 and not result.errors
    for line in (
        "test: 4 points in 4 scans (2 of label 0, 2 of label 1)",
        "valid: 3 points in 3 scans (1 of label 0, 2 of label 1)",
        "training: 9 points in 9 scans (5 of label 0, 4 of label 1)",
        "warning: 2 of 4 test scans also stand in training, with 2 of 4 test points",
        "warning: 1 of 4 test scans also stand in valid, with 1 of 4 test points",
        "warning: 1 of 3 valid scans also stand in training, with 1 of 3 valid points",
        f"{PUBLISHED}: test 4 of 4, valid 3 of 3, training 9 of 9 points",
        f"{BY_PATIENT}: test 4 of 4, valid 2 of 3, training 6 of 9 points",
    ):
        assert line in result.out
    published, apart = (sides_of(tmp_path / "out" / name) for name in (PUBLISHED, BY_PATIENT))
    names = dict(zip(("train", "val", "test"), ("training", "valid", "test")))
    for part, those in study[1].items():
        assert published[names[part]] == {(row[5].removeprefix(FOLDER).removesuffix(".mhd"), row[1]) for row in those}
    assert apart["test"] == published["test"]
    patients = {part: {patient for patient, _ in those} for part, those in apart.items()}
    assert not (
        patients["test"] & (patients["valid"] | patients["training"]) or patients["valid"] & patients["training"]
    )
    assert apart["valid"] == {("1.2.6", 1), ("1.2.7", 0)} and patients["training"] == {f"1.2.{i}" for i in range(6)}
    before = contents(tmp_path / "out")
    reverse = [study[2][part] for part in ("test", "train", "val")]
    assert prepare(run, study, tmp_path / "out", tables=reverse).code == 0  # resumed, in another order
    assert contents(tmp_path / "out") == before


def test_crops_are_centred_on_the_nodules_of_scans_of_either_direction(study, tmp_path, run):
    """Places are LPS mm: the middle voxel of a crop, 6 6 4 of 12 12 8 voxels, is inside the ball of the label."""
    assert prepare(run, study, tmp_path / "out").code == 0
    rows = read_table(tmp_path / "out" / PUBLISHED)
    for row in rows:
        voxels = np.asarray(nibabel.load(tmp_path / "out" / row["path"]).dataobj)
        inside = voxels[5:7, 5:7, 3:5]
        assert inside.max() > -200 and voxels[0].max() <= -600, row
    assert len(rows) == 16


def test_fold_0_of_both_lists_is_the_split(study, tmp_path, run, capsys):
    """By main_lnc_luna16.py: the published sides, and the same test side without its patients in training."""
    assert prepare(run, study, tmp_path / "out").code == 0
    flags = ["--folds", "subsets", "--protocol", "knn", "--input_size", 12, 12, 6, "--output_dir"]
    trained = {}
    for name in (PUBLISHED, BY_PATIENT):
        code, _, errors = run_main(capsys, "--data_list", tmp_path / "out" / name, *flags, tmp_path / name[:-4])
        assert code == 0, errors
        split = read_json(tmp_path / name[:-4] / "splits.json")["splits"][0]
        crops = crops_of_list(tmp_path / "out" / name).crops
        for side, part in (("test", "test"), ("validation", "valid"), ("train", "training")):
            assert set(split[side]) == {crop.patient for crop in crops if crop.subset == part}
        trained[name] = {patient.partition("@")[0] for patient in split["train"]}
        tested = [row["case"] for row in read_table(tmp_path / name[:-4] / "0" / "predictions.csv")]
        assert sorted(case.split("/")[-1] for case in tested) == [f"task2_test_{line:06d}" for line in range(2, 6)]
        json.loads((tmp_path / name[:-4] / "0" / "metrics.json").read_text())
    assert trained[PUBLISHED] - trained[BY_PATIENT] == {"1.2.6", "1.2.8", "1.2.9"}


def test_subsets_rotate_so_that_fold_0_tests_on_test():
    patients = ["a", "b", "c"]
    assert list(subset_splits(patients, ["training", "valid", "test"])[0]) == [["a"], ["b"], ["c"]]


def test_patients_of_several_scans_are_kept_apart(study, tmp_path, run):
    """1.2.0 (training) and 1.2.11 (test) are one person, of whom the tables know nothing."""
    names = [(f"1.2.{i}", "Ann" if i in (0, 11) else f"p{i}") for i in range(12)]
    who = write_table(tmp_path / "who.csv", ["seriesuid", "patient"], names)
    assert prepare(run, study, tmp_path / "out", "--patients", who).code == 0
    sides = sides_of(tmp_path / "out" / BY_PATIENT)
    assert ("Ann", 1) in sides["test"] and {patient for patient, _ in sides["training"]} == {
        f"p{i}" for i in range(1, 6)
    }


def test_one_table_with_image_paths(study, tmp_path, run):
    """Alone it is as a table with seriesuid: the layout, and no lists. Paths of Windows and bare names do too."""
    own = [
        (*row[:5], ["C:\\LUNA16\\", "", "a/b/"][i % 3] + f"1.2.{i}.mhd") for i, row in enumerate(study[1]["train"][:6])
    ]
    table = write_table(tmp_path / "task2_train.csv", HEADER, own, ";")
    assert prepare(run, study, tmp_path / "out", tables=[table]).code == 0
    series = [(row[5].replace("\\", "/").split("/")[-1].removesuffix(".mhd"), *row[1:5]) for row in own]
    write_table(table, ["seriesuid", "malignancy", "coordX", "coordY", "coordZ"], series)
    assert prepare(run, study, tmp_path / "other", tables=[table]).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 6 and not (tmp_path / "out" / PUBLISHED).exists()


def test_scans_that_are_absent_and_points_outside_are_told(study, tmp_path, run):
    (study[0] / "subset3" / "1.2.11.mhd").unlink()
    row = study[1]["val"][1]
    write_tables(tmp_path, {"val": [study[1]["val"][0], (*row[:4], 900.0, row[5]), study[1]["val"][2]]})
    result = prepare(run, study, tmp_path / "out")
    assert result.code == 1 and result.errors[0].startswith(
        "error: 1 inputs failed, such as subset3/1.2.7.mhd#task2_val:3"
    )
    found = outcomes(tmp_path / "out")
    assert found["1.2.11"] == ("left out", "no scan of this series below --input: 1 points")
    assert found["subset3/1.2.7.mhd#task2_val:3"][1].startswith("outside the scan: ")
    assert f"{PUBLISHED}: test 3 of 4, valid 2 of 3, training 9 of 9 points" in result.out
    assert "warning: 2 of the split's 16 points have no crop" in result.out
    assert sides_of(tmp_path / "out" / PUBLISHED)["test"] == {("1.2.8", 0), ("1.2.9", 1), ("1.2.10", 0)}


def test_repeated_rows_are_taken_once_and_nodules_of_two_parts_are_told(study, tmp_path, run):
    first = study[1]["train"][0]
    tables = {"train": [*study[1]["train"], (99, *first[1:])], "test": [*study[1]["test"], (98, *first[1:])]}
    write_tables(tmp_path, tables)
    result = prepare(run, study, tmp_path / "out")
    assert result.code == 0
    assert "note: 1 points repeat an earlier one of their table and are left out: task2_train line 11" in result.out
    assert "warning: 1 points stand in two parts of the split" in result.out and "task2_test line 6" in result.out
    assert ("1.2.0", 0) in sides_of(tmp_path / "out" / PUBLISHED)["training"]
    assert ("1.2.0", 0) not in sides_of(tmp_path / "out" / BY_PATIENT)["training"]
    assert ("1.2.0", 0) in sides_of(tmp_path / "out" / BY_PATIENT)["test"]


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_nodule_with_two_labels_is_refused(part, study, tmp_path, run):
    x = study[1]["train"][0][2] + 0.001  # of another rounding
    write_tables(tmp_path, {part: [*study[1][part], (99, 1, x, *study[1]["train"][0][3:])]})
    result = prepare(run, study, tmp_path / "out")
    assert result.code == 1 and len(result.errors) == 1
    assert "scan 1.2.0 has two labels in one place" in result.errors[0] and "task2_train line 2" in result.errors[0]
    assert not list((tmp_path / "out").rglob("*.csv"))


def test_a_table_of_ones_own_with_two_labels_in_one_place_is_told(study, tmp_path, run):
    rows = [("1.2.2", 0, 0, -280, label) for label in (0, 1, 1)]
    table = write_table(tmp_path / "own.csv", ["seriesuid", "coordX", "coordY", "coordZ", "malignancy"], rows)
    result = prepare(run, study, tmp_path / "out", tables=[table])
    assert result.code == 0 and len(list((tmp_path / "out").rglob("*.nii.gz"))) == 3
    assert "warning: 2 points have another label than an earlier one: scan 1.2.2" in result.out


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (1, "", "line 3: malignancy is '', expected a whole number from 0"),
        (1, "3.5", "line 3: malignancy is '3.5'"),
        (1, "benign", "line 3: malignancy is 'benign'"),
        (1, "-1", "line 3: malignancy is '-1'"),
        (2, "nan", "line 3 has no numbers in coordX, coordY, coordZ"),
        (4, "", "line 3 has no numbers in coordX, coordY, coordZ"),
        (5, "/mnt/x/", "line 3 has no file in image_path"),
        (5, "", "line 3 has no file in image_path"),
    ],
)
def test_rows_that_tell_no_nodule_are_refused(column, value, said, study, tmp_path, run):
    rows = [list(row) for row in study[1]["val"]]
    rows[1][column] = value
    path = write_tables(tmp_path, {"val": rows})["val"]
    result = prepare(run, study, tmp_path / "out")
    assert result.code == 1 and len(result.errors) == 1 and result.errors[0].startswith(f"error: {path}: {said}")


@pytest.mark.parametrize("missing", ["malignancy", "coordY", "image_path"])
def test_a_missing_column_is_named(missing, study, tmp_path, run):
    path, at = study[2]["test"], HEADER.index(missing)
    rows = [[cell for i, cell in enumerate(row) if i != at] for row in study[1]["test"]]
    write_table(path, [name for name in HEADER if name != missing], rows)
    result = prepare(run, study, tmp_path / "out")
    wanted = "seriesuid" if missing == "image_path" else missing
    assert result.code == 1 and result.errors[0].startswith(f"error: {path}: has no column {wanted}, only Unnamed: 0")


def test_the_labels_column_has_to_be_named(study, tmp_path, run):
    result = run("luna16", "--input", study[0], "--output", tmp_path / "out", "--table", *study[2].values())
    assert result.code == 1 and "has no column class, only Unnamed: 0, malignancy" in result.errors[0]
    assert "--label_column" in result.errors[0]


def test_an_empty_table_is_refused(study, tmp_path, run):
    write_tables(tmp_path, {"val": []})
    result = prepare(run, study, tmp_path / "out")
    assert result.code == 1 and "task2_val.csv: holds no points" in result.errors[0]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("a_train.csv b_val.csv c_test.csv", ["training", "valid", "test"]),
        ("Testing.csv TRAIN.csv validation2.csv", ["test", "training", "valid"]),
        ("a_train.csv a_test.csv", None),
        ("a_train.csv b_train.csv c_test.csv", None),
        ("trainval.csv b_val.csv c_test.csv", None),
        ("a_train_val.csv b_val.csv c_test.csv", None),
        ("a.csv b.csv c.csv", None),
    ],
)
def test_parts_are_told_by_the_names_of_the_tables(names, found, tmp_path):
    tables = [tmp_path / "test" / name for name in names.split()]  # a folder's name tells nothing
    if found:
        assert split_parts(tables) == found
    else:
        with pytest.raises(UserError, match="several are the parts of one split"):
            split_parts(tables)


def test_another_table_in_the_folder_of_a_split_is_refused(study, tmp_path, run):
    """The lists would be of other crops than the folder."""
    assert prepare(run, study, tmp_path / "out").code == 0
    result = prepare(run, study, tmp_path / "out", tables=[study[2]["train"]])
    assert result.code == 1 and "was made with split published, this run has None" in result.errors[0]


def test_tables_may_be_given_one_by_one(study, tmp_path, run):
    each = [word for path in study[2].values() for word in ("--table", path)][1:]
    assert prepare(run, study, tmp_path / "out", tables=each).code == 0
    assert (tmp_path / "out" / PUBLISHED).is_file()


def test_a_split_is_taken_whole(study, tmp_path, run):
    result = prepare(run, study, tmp_path / "out", "--negatives_per_scan", 1)
    assert result.code == 2 and "--negatives_per_scan: a published split" in result.errors[-1]
    assert not (tmp_path / "out").exists()


def test_a_split_of_ones_own_names_scans_by_seriesuid(study, tmp_path, run):
    assert prepare(run, study, tmp_path / "out").code == 0
    own = ["seriesuid", "coordX", "coordY", "coordZ", "malignancy"]
    for part, rows in study[1].items():
        series = [(row[5].removeprefix(FOLDER).removesuffix(".mhd"), *row[2:5], row[1]) for row in rows]
        write_table(study[2][part], own, series)
    assert prepare(run, study, tmp_path / "other").code == 0
    assert contents(tmp_path / "other") == contents(tmp_path / "out")
    for spoilt, said in (
        ((*series[1][:4], ""), "has nothing in malignancy"),
        ((*series[1][:3], "x", 1), "not a point"),
    ):
        write_table(study[2]["test"], own, [series[0], spoilt])
        result = prepare(run, study, tmp_path / "third")
        assert result.code == 1 and f"{study[2]['test']}: line 3 (1.2.9): {said}" in result.errors[0]


def own_table(folder, name, more=("patient", ["PAT0", "PAT0", "PAT1"]), flipped=False, moved=0.0):
    """A table of one's own: two points in each of three scans."""
    rows = [
        (f"9.{scan}", more[1][scan], place[0] + moved, *place[1:], label ^ flipped)
        for scan in range(3)
        for label, place in write_scan(folder / f"in/9.{scan}.mhd").items()
    ]
    return write_table(folder / name, ["seriesuid", more[0], "coordX", "coordY", "coordZ", "class"], rows)


def crop_own(run, folder, output, *tables):
    flags = ["--size", 12, 12, 8, "--spacing", 3, 3, 3, "--workers", 1]
    return run("luna16", "--input", folder / "in", "--output", output, "--table", *tables, *flags)


def patients_in(output):
    return {path.parent.name for path in output.glob("subset*/label*/*/*.nii.gz")}


def test_the_tables_own_patients_are_taken(tmp_path, run):
    result = crop_own(run, tmp_path, tmp_path / "out", own_table(tmp_path, "own.csv"))
    assert result.code == 0 and "warning" not in result.out
    assert patients_in(tmp_path / "out") == {"PAT0", "PAT1"}
    # where a cell is empty the scan is its own patient, and --patients has the last word
    table = own_table(tmp_path, "some.csv", ("Patient", ["PAT0", "PAT0", ""]))
    assert crop_own(run, tmp_path, tmp_path / "some", table).code == 0
    assert patients_in(tmp_path / "some") == {"PAT0", "9.2"}
    given = write_table(tmp_path / "patients.csv", ["seriesuid", "patient"], [(f"9.{n}", "one") for n in range(3)])
    assert crop_own(run, tmp_path, tmp_path / "given", table, "--patients", given).code == 0
    assert patients_in(tmp_path / "given") == {"one"}
    # a column that may tell patients and is not called so is told
    table = own_table(tmp_path, "like.csv", ("patient_id", ["PAT0", "PAT0", "PAT1"]))
    result = crop_own(run, tmp_path, tmp_path / "like", table)
    assert result.code == 0 and "has no column patient, and patient_id is not read" in result.out
    assert patients_in(tmp_path / "like") == {"9.0", "9.1", "9.2"}
    table = own_table(tmp_path, "alike.csv", ("patient", ["PAT0", "Pat0", "PAT1"]))
    result = crop_own(run, tmp_path, tmp_path / "alike", table)
    assert result.code == 0 and "1 patients differ from another one in upper and lower case alone" in result.out


def test_a_place_has_one_label_in_an_output(tmp_path, run):
    """Also where the table was corrected under another name; what stands stays."""
    assert crop_own(run, tmp_path, tmp_path / "out", own_table(tmp_path, "v1.csv")).code == 0
    before = contents(tmp_path / "out")
    result = crop_own(run, tmp_path, tmp_path / "out", own_table(tmp_path, "v2.csv", flipped=True))
    assert result.code == 1 and len(result.errors) == 1
    assert "is of the place that v2 has in line 2, with label 0 there and 1 here" in result.errors[0]
    assert {name: data for name, data in contents(tmp_path / "out").items() if ".prepare" not in name} == before
    # other places are added, and the crops of before are told
    result = crop_own(run, tmp_path, tmp_path / "out", own_table(tmp_path, "v3.csv", moved=6.0))
    assert (
        result.code == 0 and "6 files from earlier runs stay, of inputs or tables that are not given now" in result.out
    )
    # the same table corrected: its crops move
    result = crop_own(run, tmp_path, tmp_path / "moved", own_table(tmp_path, "v1.csv"))
    result = crop_own(run, tmp_path, tmp_path / "moved", own_table(tmp_path, "v1.csv", flipped=True))
    assert result.code == 0 and len(list((tmp_path / "moved").glob("subset*/label*/*/*.nii.gz"))) == 6
