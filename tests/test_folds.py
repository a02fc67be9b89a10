"""study.py --training_cases: each patient tested once by models of others; Dice and surface Dice recorded."""

import collections
import csv
import importlib
import json
import shutil

import pytest
from test_main_lts_msd import phantom, write_case
from test_study import REAL, flags_of, table

import study
from dino3d.command_line import UserError
from dino3d.study import definition, jobs
from dino3d.study.folds import leave_one_out, place_folds

NAMES = [f"case{i}" for i in range(5)]


@pytest.fixture
def masks(tmp_path):
    """Five names of cases, with nothing in them."""
    for kind in ("images", "labels"):
        (tmp_path / "masks" / kind).mkdir(parents=True)
        for name in NAMES:
            (tmp_path / "masks" / kind / f"{name}.nii.gz").touch()
    return tmp_path / "masks"


def study_flags(masks, folder, training, *more):
    given = flags_of(folder, masks, *more, tasks=("segmentation",), arms=("paper", "scratch"))
    return [*given, "--training_cases", str(training)]


def test_every_patient_is_tested_once_and_trains_as_often_as_any_other():
    for training in (1, 2, 3):
        folds = leave_one_out([*NAMES, "case0"], training)
        assert sorted(name for fold in folds for name in fold["test"]) == NAMES
        trained = collections.Counter(name for fold in folds for name in fold["train"])
        assert set(trained.values()) == {training} and sorted(trained) == NAMES
        for fold in folds:
            sides = [*fold["train"], *fold["validation"], *fold["test"]]
            assert len(fold["train"]) == training and len(sides) == len(set(sides)) == training + 2
    for less, more in zip(leave_one_out(NAMES, 1), leave_one_out(NAMES, 3)):
        assert set(less["train"]) < set(more["train"]) and less["test"] == more["test"]
    with pytest.raises(UserError, match=r"--training_cases 4: of 5 patients .* expected at most 3"):
        leave_one_out(NAMES, 4)


def test_a_study_of_them(tmp_path, stubs, masks, capsys):
    """Planned, run, recorded; resumed from its folder and from its records; refused with another number."""
    records = tmp_path / "records"
    flags = study_flags(masks, tmp_path / "s", 2, "--records", str(records))
    study.main([*flags, "--plan"])
    costs = json.loads((tmp_path / "s" / "measured.json").read_text())
    assert "4 x segmentation" in capsys.readouterr().out and costs["segmentation"][0] > 0
    assert not (tmp_path / "s" / "arms").exists()
    study.main(flags)
    unit = tmp_path / "s" / "arms" / "paper" / "seed1" / "segmentation"
    saved = json.loads((unit / "splits.json").read_text())
    assert saved["splits"] == leave_one_out(NAMES, 2)
    assert saved["data"]["label_fraction"] == pytest.approx(2 / 3, abs=1e-4) and saved["data"]["seed"] == 1
    # A record of each figure, of the same run, and both in the tables
    for figure, column in (("segmentation", "dice"), ("surface", "surface_dice")):
        record = json.loads((records / f"{figure}-paper-seed1.json").read_text())
        cases = {row["case"]: float(row[column]) for row in table(unit / "cases.csv")}
        assert record["patients"] == NAMES and set(record["seconds"]) == {"pretrain", "segmentation"}
        assert record["repeats"][0]["values"] == pytest.approx([cases[name] for name in NAMES], abs=1e-6)
        found = {(row["arm"], row["seed"]): row for row in table(tmp_path / "s" / "seeds.csv") if row["task"] == figure}
        assert float(found["paper", "1"]["value"]) == pytest.approx(sum(cases.values()) / len(cases))
        assert found["paper", "1"]["metric"] == {"dice": "Dice", "surface_dice": "surface Dice"}[column]
    capsys.readouterr()
    study.main(["--from_records", str(records), "--output_dir", str(tmp_path / "t"), "--draws", "400"])
    assert "segmentation: surface Dice of 5 cases each" in capsys.readouterr().out
    both = [
        {(r["task"], r["arm"], r["seed"]): float(r["value"]) for r in table(tmp_path / f / "seeds.csv")} for f in "ts"
    ]
    assert both[0] == pytest.approx(both[1], abs=1e-7) and len(both[0]) == 8
    study.main([str(word) for word in ("--output_dir", tmp_path / "s", "--draws", "400")])
    with pytest.raises(UserError, match="is a study with --training_cases 2, now it is 1"):
        study.main(study_flags(masks, tmp_path / "s", 1))
    capsys.readouterr()
    study.main([*study_flags(masks, tmp_path / "again", 2, "--records", str(records))])
    assert "4 of 4 units are in the records" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "again")
    study.main([*study_flags(masks, tmp_path / "again", 3, "--records", str(records), "--plan")])
    assert "are in the records" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, said",
    [
        (("--segmentation_flags=--k_fold 3",), "--k_fold and --training_cases exclude each other"),
        (("--segmentation_flags=--label_fraction=0.5",), "--label_fraction and --training_cases exclude each other"),
        (("--training_cases", "4"), "of 5 patients"),
    ],
)
def test_what_can_not_be(tmp_path, stubs, masks, more, said):
    with pytest.raises(UserError, match=said):
        study.main([*study_flags(masks, tmp_path / "s", 2), *more])


def test_is_for_segmentation(tmp_path, stubs, masks, capsys):
    flags = flags_of(tmp_path / "s", masks, "--training_cases", "2")
    with pytest.raises(UserError, match="--training_cases: is for --segmentation DIR, which is missing"):
        study.main(flags)
    with pytest.raises(SystemExit):
        study.main(["--output_dir", str(tmp_path), "--from_records", str(tmp_path), "--training_cases", "2"])
    assert "--training_cases: --from_records makes tables of what was run" in capsys.readouterr().err


@pytest.mark.parametrize("as_table", [False, True])
def test_the_script_trains_and_tests_by_them(tmp_path, volumes, as_table):
    """A unit by the real scripts, called in this process, of a folder and of a table with two cases of one patient."""
    for i in range(4):
        write_case(tmp_path / "masks", f"case{i}", *phantom(i, shape=(16, 14, 12)))
    data, owner = tmp_path / "masks", {f"case{i}": f"case{i}" for i in range(4)}
    if as_table:
        data, owner["case3"] = tmp_path / "cases.csv", "case2"
        with open(data, "w", newline="") as file:
            rows = [(f"masks/images/{n}.nii.gz", f"masks/labels/{n}.nii.gz", who) for n, who in owner.items()]
            csv.writer(file).writerows([("path", "mask", "patient"), *rows])
    folder = tmp_path / "s"
    given = ["--output_dir", folder, "--data_dir", volumes, "--segmentation", data, "--training_cases", "1"]
    given += ["--arms", "random", "--seeds", "3", "--draws", "200", f"--pretrain_flags={REAL}"]
    short = "--epochs 1 --warmup_epochs 0 --batch_size_per_gpu 1 --patches_per_case 1 --decoder linear --overlap 0"
    given = [str(word) for word in (*given, f"--segmentation_flags={short} --spacing 3 3 3")]
    one, _ = definition.define(folder, study.given_by(study.get_args_parser().parse_args(given)), [])
    (unit,) = jobs.all_units(one)
    for job in unit:
        job.folder.mkdir(parents=True)
        if job.training_cases:
            place_folds(job.folder, job.training_cases, job.flags)
        importlib.import_module(jobs.script_of(job.stage).stem).main([*job.flags, "--num_workers", "0"])
        job.marker.write_text(json.dumps({"flags": job.flags}))
    out, patients = unit[-1].folder, sorted(set(owner.values()))
    splits = json.loads((out / "splits.json").read_text())["splits"]
    assert splits == leave_one_out(patients, 1)
    rows = table(out / "cases.csv")
    tested = {row["case"].removeprefix("masks/images/"): splits[int(row["fold"])]["test"] for row in rows}
    assert tested == {name: [who] for name, who in owner.items()}
    study.main([*given, "--table"])
    found = {row["task"]: float(row["value"]) for row in table(folder / "results.csv")}
    assert found["segmentation"] == pytest.approx(sum(float(row["dice"]) for row in rows) / 4)
    assert found["surface"] == pytest.approx(sum(float(row["surface_dice"]) for row in rows) / 4)
