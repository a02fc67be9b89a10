"""Segmentation from tables, and what --predict leaves of a new CT: patients, overlays, probability maps."""

import json

import pytest
from raw_inputs import write_table
from test_main_lts_msd import assert_one_error, cases, predict, run_main, smaller_model

from dino3d.files import read_json, read_table

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
    assert_one_error(predict(table.with_name("none.csv"), weights, tmp_path / "x"), "none.csv: no such folder")
