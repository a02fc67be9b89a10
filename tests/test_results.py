"""results/: what its scripts run is understood by the product, each half by the encoder that never saw it."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import roc_auc_score

import evaluate_features
import extract_features
import main_dino
import main_lnc_luna16
import main_lts_msd
import prepare_data
import study
from dino3d.command_line import UserError, exit_status
from dino3d.files import read_table, write_table
from dino3d.flag_files import read_flags
from dino3d.study.arms import choose_arms, read_arms
from dino3d.study.definition import split_flags
from results import curves, gpu, join_tables, make_data, make_masks, repeated, together

# In place of Python: notes its arguments, and says what kind of data there is
STUB = """#!/bin/sh
case "$1" in -c) echo collection ;; *) printf '%s\\0' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS" ;; esac
"""
# What a table is of: arguments of the scripts, whatever a shell has exported by these names
SETTINGS = ("ARMS", "ENSEMBLES", "FROZEN", "FINE_TUNING", "FINE_TUNING_RATE", "PRETRAINING_EPOCHS", "BY_HAND")


def calls_of(script, folder, monkeypatch, words=(), **more):
    """What a script of results/ gives Python: a list of words for each call."""
    stub, calls = folder / "python", folder / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = os.environ | {"CALLS": str(calls), "PYTHON": str(stub), "WORK": str(folder / "w"), "OUT": "o"}
    environment |= {"DATA": "d"} | dict.fromkeys(SETTINGS, "of the user's shell")
    environment.pop("SEEDS", None)
    subprocess.run([ROOT / "results" / script, *words], env=environment | more, check=True, cwd=folder)
    monkeypatch.chdir(ROOT)
    return [line.rstrip("\0").split("\0") for line in calls.read_text().splitlines()]


def check_half(half, call, name, seeds, work):
    """A study of one half, all of whose flags the scripts know. Returns its flags, and those of fine-tuning."""
    script, *flags = call
    parser = study.get_args_parser()
    args = parser.parse_args(flags)
    study.check_flags(parser, args)
    assert script == "study.py" and " ".join(map(str, args.seeds)) == seeds
    pretrain = split_flags("pretrain", args.pretrain_flags)
    found = main_dino.get_args_parser().parse_args([*pretrain, "--output_dir", "x"])
    # pre-trained without the patients that are recorded
    assert found.data_list == f"{work}/data/pool_without_half{half}.csv"
    assert args.patients == f"{work}/data/half{half}.txt" and args.part == f"half{half}"
    assert str(args.records) == f"o/runs/{name}"
    arms = choose_arms(args.arms, read_arms(args.arms_file))
    assert [arm.name for arm in arms] == args.arms
    for arm in arms:
        if arm.weights:  # neither half is judged by the encoder that saw it
            assert (f"half{half}" in arm.weights) and (f"half{1 - half}" not in arm.weights)
    tuning = split_flags("classification", args.classification_flags)
    return args, main_lnc_luna16.get_args_parser().parse_args([*tuning, "--data_dir", "x"])


def leave_encoders(work):
    """Where classification.sh leaves them."""
    for half in (0, 1):
        for seed in range(5):
            place = work / f"classification/half{half}/arms/nodules/seed{seed}/pretrain/checkpoint.pth"
            place.parent.mkdir(parents=True)
            place.touch()


def features_flags(words):
    return extract_features.get_args_parser().parse_args([*words, "--weights", "w", "--input", "i", "--output", "o"])


def check_tables(call, name):
    parser = study.get_args_parser()
    args = parser.parse_args(call[1:])
    study.check_flags(parser, args)
    assert str(args.output_dir) == f"o/{name}" and str(args.from_records) == f"o/runs/{name}"
    return args


@pytest.mark.skipif(os.name == "nt", reason="sh")
@pytest.mark.parametrize(
    "name, seeds, pools",
    [("classification", "0 1 2 3 4", ("cls+centre", "cls+centre")), ("class_token", "0 1 2 3 4", ("cls", "cls+mean"))],
)
def test_scripts_give_the_product_flags_that_it_knows(tmp_path, monkeypatch, name, seeds, pools):
    made, *halves, tables = calls_of(f"{name}.sh", tmp_path, monkeypatch)
    assert made == ["results/make_data.py", "--data", "d", "--output", f"{tmp_path}/w/data"]
    for half, call in enumerate(halves):
        args, tuning = check_half(half, call, name, seeds, tmp_path / "w")
        assert args.probe and tuning.epochs == 40
        probe = split_flags("probe", args.probe_flags)
        assert (tuning.pool, features_flags(probe).pool) == pools
    assert len(halves) == 2
    args = check_tables(tables, name)
    assert "trivial-radial" in args.arms
    kept = ROOT / "results" / name / "results.csv"  # the table that is kept is the script's, ensembles too
    if kept.is_file():
        told = {row["arm"] for row in read_table(kept)}
        assert {arm for arm in told if arm.endswith("-ensemble")} == {f"{arm}-ensemble" for arm in args.ensembles or ()}


@pytest.mark.skipif(os.name == "nt", reason="sh")
@pytest.mark.parametrize(
    "arms, rivals, probed",
    [
        ("nodules random", ["random", "trivial-radial"], "random"),
        ("nodules scratch", ["scratch", "trivial-radial"], "nodules"),
        ("scratch", ["scratch", "trivial-radial"], None),
    ],
)
def test_some_of_the_arms(tmp_path, monkeypatch, arms, rivals, probed):
    """ARMS as the script's head has it: compared with those that there are, trivial figures from an arm that is run."""
    (tmp_path / "w w").mkdir()
    work = {"WORK": str(tmp_path / "w w"), "SEEDS": "3 4"}
    _, *halves, tables = calls_of("classification.sh", tmp_path, monkeypatch, [f"ARMS={arms}"], **work)
    for half, call in enumerate(halves):
        args, _ = check_half(half, call, "classification", "3 4", tmp_path / "w w")
        place = f"{tmp_path}/w w/classification/half{half}/arms/{probed}/seed3/probe/features.trivial-*.csv"
        assert args.features == ([place] if probed else None)
    args = check_tables(tables, "classification")
    assert args.against == rivals and set(args.against) <= set(args.arms) and args.ensembles is None


@pytest.mark.skipif(os.name == "nt", reason="sh")
def test_what_knows_no_pool_is_run_once(tmp_path, monkeypatch):
    """Not copied while a plan is made, nor over what the other half has, nor what was pre-trained without the first."""
    made = tmp_path / "w/classification"
    for arm, seed in (("scratch", 0), ("scratch", 1), ("random", 0), ("nodules", 0)):
        (made / f"half0/arms/{arm}/seed{seed}").mkdir(parents=True)
        (made / f"half0/arms/{arm}/seed{seed}/of").write_text("half0")
    (made / "half1/arms/scratch/seed1").mkdir(parents=True)
    (made / "half1/arms/scratch/seed1/of").write_text("half1")
    calls_of("classification.sh", tmp_path, monkeypatch, words=["--plan"])
    assert sorted(path.parent.name for path in made.glob("half1/arms/*/*/of")) == ["seed1"]
    calls_of("classification.sh", tmp_path, monkeypatch)
    found = {
        path.parent.relative_to(made / "half1/arms").as_posix(): path.read_text()
        for path in made.glob("half1/*/*/*/of")
    }
    assert found == {"scratch/seed0": "half0", "scratch/seed1": "half1", "random/seed0": "half0"}


@pytest.mark.skipif(os.name == "nt", reason="sh")
def test_encoders_that_a_clone_lacks_are_made_before_fewer_labels(tmp_path, monkeypatch):
    calls = [call for call in calls_of("label_fractions.sh", tmp_path, monkeypatch) if call[0] == "study.py"]
    work = tmp_path / "w"
    for half, call in enumerate(calls[:2]):
        args = study.get_args_parser().parse_args(call[1:])
        assert args.arms == ["nodules"] and args.seeds == [0, 1, 2, 3, 4]
        assert args.records == work / "encoders/runs/classification" and args.features
        # where the arm `trained` looks for them
        arms = read_arms(str(work / f"arms_of_half{half}.txt"))
        place = args.output_dir / "arms/nodules/seed2/pretrain/checkpoint.pth"
        assert arms["trained"].weights_of(2) == str(place)
    assert len(calls) == 3 + (2 + 4) * 3
    script = [ROOT / "results/label_fractions.sh", "--plan"]
    done = subprocess.run(script, env=os.environ | {"WORK": str(work)}, capture_output=True, cwd=tmp_path, text=True)
    assert done.returncode == 1 and "run results/classification.sh first" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sh")
def test_what_scripts_lack(tmp_path):
    for script, code, said in (
        ("outside_test.sh", 2, "expected two folders"),
        ("publish.sh", 1, "checkpoint.pth: is m"),
        ("classification.sh SEEDS=0", 2, "SEEDS=0: is no setting"),
        ("augmentations.sh ARMS=none", 2, "ARMS=none: is no setting"),
        ("segmentation.sh SEEDS=0", 2, "SEEDS=0 stands before the script"),  # hours before study.py would refuse it
        ("publish.sh --plan", 2, "takes no arguments, found --plan"),
    ):
        work = os.environ | {"WORK": str(tmp_path), "PYTHON": "false"}
        done = subprocess.run(
            [ROOT / "results" / script.split()[0], *script.split()[1:]],
            env=work,
            capture_output=True,
            cwd=tmp_path,
            text=True,
        )
        assert (done.returncode, done.stderr.count("\n")) == (code, 1) and said in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sh")
def test_fewer_labels_take_as_many_steps(tmp_path, monkeypatch):
    leave_encoders(tmp_path / "w")
    calls = [call for call in calls_of("label_fractions.sh", tmp_path, monkeypatch) if call[0] == "study.py"]
    studies = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    for name, turned, of_study in zip(("frozen", "frozen_turned"), (1, 48), studies):
        for call in of_study[:2]:
            args = study.get_args_parser().parse_args(call[1:])
            assert args.arms == ["trained", "random"] and args.few_labels and not args.classification
            probe = split_flags("probe", args.probe_flags)
            flags = features_flags(probe)
            assert (flags.pool, flags.tta, flags.trivial) == ("cls+centre", turned, True)
        args = check_tables(of_study[2], name)
        assert args.against == ["random", "trivial-radial"] and args.arms == ["trained", *args.against]
    for name, of_study in zip(("labels_50", "labels_25", "labels_10", "long"), studies[2:]):
        for half, call in enumerate(of_study[:2]):
            args, tuning = check_half(half, call, name, "0 1 2", tmp_path / "w")
            assert args.arms == ["trained", "scratch"] and not args.probe
            share = 1 if name == "long" else int(name.rpartition("_")[2]) / 100
            assert (
                tuning.pool == "cls+centre"
                and tuning.label_fraction == share
                and tuning.epochs == (120 if name == "long" else round(40 / share))
            )
        assert check_tables(of_study[2], name).arms == ["trained", "scratch"]


@pytest.mark.skipif(os.name == "nt", reason="sh")
def test_fewer_epochs_of_the_same_schedule(tmp_path, monkeypatch):
    leave_encoders(tmp_path / "w")
    calls = [call for call in calls_of("epochs.sh", tmp_path, monkeypatch) if call[0] == "study.py"]
    assert len(calls) == 9
    for epochs, *of_study in zip((5, 10, 20), calls[::3], calls[1::3], calls[2::3]):
        for half, call in enumerate(of_study[:2]):
            args, tuning = check_half(half, call, f"epochs_{epochs}", "0 1 2 3 4", tmp_path / "w")
            assert args.arms == ["trained", "scratch"] and not args.probe
            assert (tuning.epochs, tuning.warmup_epochs / epochs, tuning.pool) == (epochs, 5 / 40, "cls+centre")
        assert check_tables(of_study[2], f"epochs_{epochs}").against == ["scratch"]


@pytest.mark.skipif(os.name == "nt", reason="sh")
@pytest.mark.parametrize(
    "name, table, epochs",
    [
        ("augmentations", "augmentations", dict.fromkeys(("none", "elastic", "paper", "all"), 18)),
        ("pretraining", "pretraining_epochs", {"nodules_18_epochs": 18, "nodules_162_epochs": 162}),
    ],
)
def test_what_pre_training_is_asked_frozen(tmp_path, monkeypatch, name, table, epochs):
    _, *halves, tables = [call for call in calls_of(f"{name}.sh", tmp_path, monkeypatch) if "curves" not in call[0]]
    for half, call in enumerate(halves):
        args = study.get_args_parser().parse_args(call[1:])
        assert args.classification is None and args.probe and args.seeds == [0, 1, 2] and args.part == f"half{half}"
        assert features_flags(split_flags("probe", args.probe_flags)).pool == "cls+centre"
        pretraining = split_flags("pretrain", args.pretrain_flags)
        arms = {arm.name: arm for arm in choose_arms(args.arms, read_arms(args.arms_file))}
        assert arms.keys() >= epochs.keys() | {"random"}
        for arm, expected in epochs.items():
            flags = [*pretraining, *arms[arm].flags, "--data_dir", "x", "--output_dir", "y"]
            assert main_dino.get_args_parser().parse_args(flags).epochs == expected
    assert len(halves) == 2 and "trivial-radial" in check_tables(tables, table).arms


@pytest.mark.skipif(os.name == "nt", reason="sh")
def test_other_rates_are_tried_with_both_arms(tmp_path, monkeypatch):
    leave_encoders(tmp_path / "w")
    calls = [call for call in calls_of("rates.sh", tmp_path, monkeypatch) if call[0] == "study.py"]
    assert len(calls) == 9
    for rate, *of_study in zip((0.00025, 0.001, 0.002), calls[::3], calls[1::3], calls[2::3]):
        for half, call in enumerate(of_study[:2]):
            args, tuning = check_half(half, call, f"rate_{rate}", "0 1 2", tmp_path / "w")
            assert args.arms == ["trained", "scratch"] and not args.probe
            assert (tuning.lr, tuning.epochs, tuning.pool) == (rate, 40, "cls+centre")
        assert check_tables(of_study[2], f"rate_{rate}").against == ["scratch"]


def write_tables(folder, arms, values, minus, task="classification"):
    """What study.py writes of a task: results.csv, differences.csv and seeds.csv."""
    folder.mkdir(parents=True)
    rows = [[task, arm, "AUC", value, value - 0.1, value + 0.1, 2, 93] for arm, value in zip(arms, values)]
    write_table(folder / "results.csv", ["task", "arm", "metric", "value", "low", "high", "seeds", "patients"], rows)
    pair = [task, *minus, values[0] - values[1] if minus[0] == arms[0] else values[1] - values[0]]
    write_table(
        folder / "differences.csv",
        ["task", "arm", "minus", "difference", "low", "high"],
        [[*pair, pair[-1] - 0.02, pair[-1] + 0.05]],
    )
    seeds = [
        [task, arm, seed, value + step] for arm, value in zip(arms, values) for seed, step in ((0, -0.01), (1, 0.01))
    ]
    write_table(folder / "seeds.csv", ["task", "arm", "seed", "value"], seeds)


def test_table_and_figure_of_label_fractions(tmp_path, capsys):
    write_tables(tmp_path / "classification", ("nodules", "scratch"), (0.9, 0.8), ("nodules", "scratch"))
    write_tables(tmp_path / "labels_10", ("trained", "scratch"), (0.7, 0.5), ("scratch", "trained"))
    arms = ("trained", "random", "trivial-radial")
    write_tables(tmp_path / "frozen", arms, (0.6, 0.5, 0.4), ("trained", "random"), "probe_25")
    assert exit_status(lambda: curves.main(["--results", str(tmp_path)]))[0] == 0
    found = {
        (row["how"], row["point"], row["arm"]): [row[name] for name in ("auc", "minus", "minus_low", "minus_high")]
        for row in read_table(tmp_path / "label_fractions/results.csv")
    }
    assert len(found) == 3 * 4 * 2 + 1  # by hand where it was run
    numbers = lambda *key: [float(text) for text in found[key]]  # noqa: E731
    assert numbers("fine-tuned", "10", "pre-trained") == pytest.approx([0.7, 0.2, 0.15, 0.22])  # turned round
    assert numbers("fine-tuned", "100", "pre-trained") == pytest.approx([0.9, 0.1, 0.08, 0.15])
    assert numbers("frozen", "25", "pre-trained") == pytest.approx([0.6, 0.1, 0.08, 0.15])
    assert found["fine-tuned", "10", "scratch"] == ["0.5", "", "", ""]
    assert found["fine-tuned", "25", "pre-trained"] == [""] * 4 and found["frozen", "50", "random"] == [""] * 4
    assert found["frozen", "25", "trivial-radial"] == ["0.4", "", "", ""]
    said = capsys.readouterr().out
    ten = "0.700 (0.600 to 0.800) | 0.500 (0.400 to 0.600) | +0.200 (+0.150 to +0.220)"
    assert f"| fine-tuned | 10 % | {ten} |  | 2 |" in said
    assert (
        "| frozen | 25 % | 0.600 (0.500 to 0.700) | 0.500 (0.400 to 0.600) | +0.100 (+0.080 to +0.150) | 0.400" in said
    )
    assert "| fine-tuned | 25 % | not run | not run |  |  |" in said
    assert (tmp_path / "label_fractions/label_fractions.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="holds none of frozen, frozen_turned, labels_10, .*, classification, epochs_5"):
        curves.main(["--results", str(tmp_path / "label_fractions")])
    # the main table stands for all labels, and for all epochs
    assert "| fine-tuned | 40 | 0.900 (0.800 to 1.000) | 0.800" in said and "| fine-tuned | 5 | not run |" in said
    assert (tmp_path / "epochs/epochs.png").read_bytes().startswith(b"\x89PNG")
    path = tmp_path / "labels_10" / "results.csv"
    path.write_text(path.read_text().replace("AUC,0.7,0.6,0.7999999999999999", "AUC,0.7,,"))  # as of four patients
    curves.main(["--results", str(tmp_path)])
    assert "| fine-tuned | 10 % | 0.700 | 0.500 (0.400 to 0.600) |" in capsys.readouterr().out
    for text in ("{", "{}", "[]"):
        (tmp_path / "labels_10" / "results.json").write_text(text)
        with pytest.raises(UserError, match="labels_10: can't be read as tables of study.py"):
            curves.main(["--results", str(tmp_path)])
    (tmp_path / "labels_10" / "results.json").unlink()
    path = tmp_path / "labels_10" / "differences.csv"
    for text in (
        "task,arm,minus\nclassification,trained,scratch\n",
        "task,arm,minus,difference,low,high\nclassification,trained,scratch,x,0,0\n",
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="labels_10: can't be read as tables of study.py"):
            curves.main(["--results", str(tmp_path)])


def test_curves_are_of_one_reading(tmp_path):
    for name, flags in (("labels_25", "--pool cls+centre --epochs 160"), ("classification", "--epochs 40")):
        arms = ("trained", "scratch") if name == "labels_25" else ("nodules", "scratch")
        write_tables(tmp_path / name, arms, (0.7, 0.5), arms)
        (tmp_path / name / "results.json").write_text(json.dumps({"study": {"flags": {"classification": flags}}}))
    with pytest.raises(
        UserError, match="labels_25/results.json: was made by --pool cls.centre, .*classification.* by none"
    ):
        curves.main(["--results", str(tmp_path)])


def test_tables_of_other_data_are_not_compared(tmp_path, capsys):
    for name, value, note in (("kept", 0.9, "collection"), ("repeated", 0.5, "LUNA16")):
        write_tables(tmp_path / name, ("nodules", "scratch"), (value, 0.8), ("nodules", "scratch"))
        write_table(tmp_path / name / "runs.csv", ["arm", "note"], [["nodules", note]])
    repeated.main(["--kept", str(tmp_path / "kept"), "--repeated", str(tmp_path / "repeated")])
    assert "the kept table is of collection, this one of LUNA16: not compared" in capsys.readouterr().out
    write_table(tmp_path / "repeated" / "runs.csv", ["arm"], [["nodules"]])  # says nothing of the data
    with pytest.raises(UserError, match="runs.csv: has no column note"):
        repeated.main(["--kept", str(tmp_path / "kept"), "--repeated", str(tmp_path / "repeated")])


@pytest.mark.skipif(os.name == "nt", reason="sh")
@pytest.mark.parametrize("kind, arms", [("collection", ["published", "random"]), ("LUNA16", ["random"])])
def test_published_weights_are_not_tested_on_their_own_patients(tmp_path, monkeypatch, kind, arms):
    """LUNA16's scans are of LIDC-IDRI's patients, of whom the published encoders have seen some."""
    monkeypatch.setattr(sys.modules[__name__], "STUB", STUB.replace("collection", kind))
    _, *halves, tables = calls_of("classification.sh", tmp_path, monkeypatch, ["ARMS=published random"])
    for call in halves:
        assert study.get_args_parser().parse_args(call[1:]).arms == arms
    assert study.get_args_parser().parse_args(tables[1:]).arms[: len(arms)] == arms


def test_a_share_of_which_one_arm_was_run(tmp_path, capsys):
    write_tables(tmp_path / "labels_25", ("trained", "scratch"), (0.7, 0.5), ("trained", "scratch"))
    path = tmp_path / "labels_25/results.csv"
    path.write_text("".join(line for line in path.open() if "scratch" not in line))
    (tmp_path / "labels_25/differences.csv").write_text("task,arm,minus,difference,low,high\n")
    curves.main(["--results", str(tmp_path)])
    assert "| fine-tuned | 25 % | 0.700 (0.600 to 0.800) | not run |  |  | 2 |" in capsys.readouterr().out


def test_a_table_that_was_repeated_in_part_is_told(tmp_path, capsys):
    """What `make results` makes of the kept main table is all of it but its ensembles, which take two seeds."""
    asked = re.search(r'^results:.*?ARMS="([^"]+)"', (ROOT / "Makefile").read_text(), re.M | re.S)[1].split()
    by_hand = [f"trivial-{name}" for name in ("radial", "all", "mean", "histogram", "centre")]
    kept = ROOT / "results" / "classification"
    values = {(row["task"], row["arm"]): row["value"] for row in read_table(kept / "seeds.csv") if row["seed"] == "0"}
    made = [("classification", arm) for arm in asked]
    made += [("probe", arm) for arm in (*asked, *by_hand) if arm != "scratch"]
    rows = [[*one, 0, values[one[0], repeated.KEPT_AS.get(one[1], one[1])]] for one in made]

    def compare(some):
        write_table(tmp_path / "seeds.csv", ["task", "arm", "seed", "value"], some)
        repeated.main(["--kept", str(kept), "--repeated", str(tmp_path)])

    compare(rows)
    assert f"all {len(made)} within 3 spreads" in capsys.readouterr().out
    with pytest.raises(UserError, match="lacks classification scratch, probe trivial-all, which .*: repeat them too"):
        compare([row for row in rows if row[:2] not in (["classification", "scratch"], ["probe", "trivial-all"])])
    said = capsys.readouterr().out
    assert "probe trivial-all: is kept and was not repeated" in said and "within 3 spreads" not in said


def test_repeated_tables_are_compared_by_the_spread_of_seeds(tmp_path, capsys):
    write_tables(tmp_path / "kept", ("nodules", "scratch"), (0.9, 0.8), ("nodules", "scratch"))
    write_tables(tmp_path / "near", ("published", "scratch"), (0.91, 0.8), ("published", "scratch"))
    write_tables(tmp_path / "far", ("nodules", "scratch"), (0.9, 0.85), ("nodules", "scratch"))
    write_tables(tmp_path / "other", ("elastic", "none"), (0.9, 0.85), ("elastic", "none"))

    def compare(name):
        repeated.main(["--kept", str(tmp_path / "kept"), "--repeated", str(tmp_path / name)])

    compare("near")
    said = capsys.readouterr().out
    # the standard deviation of two seeds that are 0.02 apart is 0.02 / sqrt(2)
    assert (
        "published: 0.9100; kept 0.9000 (0.8900 to 0.9100), seed 0 kept 0.8900, seed 1 kept 0.9100, 0.7 spreads" in said
    )
    assert "all 2 within 3 spreads" in said
    with pytest.raises(UserError, match="classification scratch: further than 3 spreads"):
        compare("far")
    with pytest.raises(UserError, match="has no arm of"):
        compare("other")
    with pytest.raises(UserError, match="seeds.csv: can't be read|seeds.csv"):
        compare("missing")
    text = (tmp_path / "near" / "seeds.csv").read_text()
    for odd in ("nan", "1.92"):
        (tmp_path / "near" / "seeds.csv").write_text(text.replace("0.92", odd))
        with pytest.raises(UserError, match=f"seeds.csv: can't be read .*has the value {odd}"):
            compare("near")


@pytest.mark.skipif(os.name == "nt", reason="sh")
def test_segmentation_is_of_encoders_of_the_cubes_alone_at_equal_steps(tmp_path, monkeypatch):
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    monkeypatch.setenv("CALLS", str(calls))
    environment = os.environ | {
        "PYTHON": str(stub),
        "WORK": str(tmp_path / "w w"),
        "OUT": str(tmp_path / "o"),
        "DATA": "d",
    }
    script = [ROOT / "results" / "segmentation.sh", "--parallel", "1"]
    subprocess.run(script, env=environment | {"SEEDS": "0 2"}, check=True, cwd=tmp_path)
    lines = [line.rstrip("\0").split("\0") for line in calls.read_text().splitlines()]
    monkeypatch.chdir(ROOT)
    pool = str(tmp_path / "w w" / "data" / "pool_cubes.csv")
    weights = tmp_path / "w w" / "segmentation" / "weights"
    trained = [main_dino.get_args_parser().parse_args(flags) for name, *flags in lines if name == "main_dino.py"]
    assert [(one.seed, one.data_list, one.output_dir) for one in trained] == [
        (seed, pool, str(weights / f"seed{seed}")) for seed in (0, 2)
    ]
    assert read_arms(str(weights / "arms.txt"))["nodules"].weights_of(2) == str(weights / "seed2" / "checkpoint.pth")
    masks = next(flags for name, *flags in lines if name == "results/make_masks.py")
    assert make_masks.get_args_parser().parse_args(masks).pool == tmp_path / "w w" / "data" / "pool_cubes.csv"
    (lesions,) = [flags for name, *flags in lines if name == "prepare_data.py"]
    prepare_data.get_args_parser().parse_args(lesions)
    parser, seen, steps = study.get_args_parser(), {}, set()
    for args in [parser.parse_args(flags) for name, *flags in lines if name == "study.py"]:
        study.check_flags(parser, args)
        if args.from_records:
            assert seen[args.from_records] == args.arms and args.output_dir.name == args.from_records.name
            continue
        assert args.seeds == [0, 2] and args.parallel == 1
        seen[args.records] = [arm.name for arm in choose_arms(args.arms, read_arms(args.arms_file))]
        flags = main_lts_msd.get_args_parser().parse_args(split_flags("segmentation", args.segmentation_flags))
        steps.add((flags.epochs, flags.patches_per_case * args.training_cases, flags.batch_size_per_gpu))
        assert flags.val_freq > flags.epochs and flags.layer_decay == 1
        assert flags.freeze_encoder == ("frozen" in args.records.name) == (args.arms[1] == "random")
        untrained = main_dino.get_args_parser().parse_args(
            [*split_flags("pretrain", args.pretrain_flags), "--seed", "0", "--output_dir", trained[0].output_dir]
        )
        assert vars(untrained) == vars(trained[0])
    assert len(steps) == 1 and len(seen) == 10
    name, *flags = lines[-1]
    assert (
        name == "results/join_tables.py"
        and join_tables.get_args_parser().parse_args(flags).output.name == "segmentation"
    )
    done = subprocess.run([script[0], "--plan"], env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 2 and b"--plan" in done.stderr


def test_records_that_are_kept_hold_together():
    """The tables were made from all records beside them, as they are now; none names a path."""
    for folder in sorted((ROOT / "results" / "runs").glob("*/")):
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        told = ("task", "arm", "seed", "part", "code", "recipe", "note")
        runs = [[row[name] for name in told] for row in read_table(ROOT / "results" / folder.name / "runs.csv")]
        kept = [["" if one[name] is None else str(one[name]) for name in told] for one in records]
        assert sorted(runs) == sorted(kept), folder.name
        assert all("/" not in shlex.join(one["patients"]) for one in records)


def test_the_arms_are_the_recipes():
    arms = read_arms(str(ROOT / "results" / "arms.txt"))
    for name, arm in arms.items():
        recipe, _, epochs = (
            name.removesuffix("_epochs").rpartition("_") if name.endswith("_epochs") else (name, "", "54")
        )
        flags = tuple(map(str, read_flags(str(ROOT / "recipes" / f"{recipe}.txt"))))
        assert arm.flags == (*flags, "--epochs", epochs)


WEIGHTS = sorted((ROOT / "results" / "weights").glob("*.safetensors"))


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_published_weights_are_what_their_card_says(path):
    import torch
    from safetensors.torch import load_file

    import utils
    from vision_transformer import vit_micro

    assert path.stat().st_size <= 4_000_000
    fed = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert fed["architecture"]["arch"] == "vit_micro" and fed["input"]["clip_range_hu"] == [-1000, 400]
    # by the loader that users call, and by name: all of them, nothing left over
    encoder = vit_micro(img_size=(24, 24, 24), patch_size=(6, 6, 6)).eval()
    utils.load_pretrained_weights(encoder, str(path), checkpoint_key="teacher")
    stored = load_file(path)
    assert stored.keys() == encoder.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in encoder.state_dict().items())
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in card and "Licence" in card


def test_published_weights_are_of_different_pools():
    assert len({path.read_bytes() for path in WEIGHTS}) == len(WEIGHTS)


def test_the_readme_says_what_the_tables_say():
    """Every figure with an interval in the README's results stands in a table of results/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0]
    tables = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*/results.md"))
    figures = re.findall(r"[+-]?\d\.\d{3} \([+-]?\d\.\d{3} to [+-]?\d\.\d{3}\)", readme)
    assert len(figures) > 5 and not [one for one in figures if one not in tables]


class Scripts:
    """In place of the scripts that results/gpu.py runs: notes calls, whose flags the real parsers take, and leaves what
    they would. stop_at: how many calls until one fails"""

    def __init__(self, output):
        self.output, self.calls, self.stop_at, self.epoch_seconds = output, [], None, 1.6

    def __call__(self, script, *flags):
        words = [str(flag) for flag in flags]
        self.calls.append((script, words))
        if len(self.calls) == self.stop_at:
            raise UserError(f"{script} ended with exit code 1")
        getattr(self, Path(script).stem)(words)

    def make_data(self, words):
        make_data.get_args_parser().parse_args(words)
        for half in (0, 1):
            (self.output / f"data/pairs/subset0/label0/p{half}").mkdir(parents=True, exist_ok=True)
            (self.output / f"data/half{half}.txt").write_text(f"p{half}\n")

    def main_dino(self, words):
        args = main_dino.get_args_parser().parse_args(words)
        assert args.data_list == str(self.output / "data/pool_without_half0.csv")
        folder, rate = Path(args.output_dir), 17 * args.batch_size_per_gpu / self.epoch_seconds
        folder.mkdir(exist_ok=True)
        log = [
            {"epoch": i, "step": 17 * i, "seconds": self.epoch_seconds, "volumes_per_second": rate}
            for i in range(1, args.epochs + 1)
        ]
        (folder / "log.txt").write_text("".join(json.dumps(one) + "\n" for one in log))
        for epoch in range(args.saveckp_freq or 999, args.epochs + 1, args.saveckp_freq or 999):
            (folder / f"checkpoint{epoch:04}.pth").touch()

    def extract_features(self, words):
        args = extract_features.get_args_parser().parse_args(words)
        assert args.pool == "cls+centre" and [path.name for path in Path(args.input).glob("*/*/*")] == ["p0"]
        table = Path(args.output)
        table.parent.mkdir(exist_ok=True)
        more = ["trivial-radial", *(f"random{i}" for i in range(args.random))] if args.random else []
        for name in [table.name, *(f"{table.stem}.{one}.csv" for one in more)]:
            assert not table.with_name(name).exists()
            table.with_name(name).touch()

    def evaluate_features(self, words):
        args = evaluate_features.get_args_parser().parse_args(words)
        tables = [Path(name).stem for name in args.features]
        members = [path.stem for one in args.group for path in sorted(Path(one).parent.glob(Path(one).name))]
        names = [*tables, *members, *(f"mean of 5: {Path(one).name}" for one in args.group)]
        rows = [[name, "logistic", "auc", 0.5 + i / 100, 0.4, 0.9] for i, name in enumerate(names)]
        (self.output / "evaluation").mkdir(exist_ok=True)
        header = ["table", "protocol", "metric", "value", "low", "high"]
        write_table(self.output / "evaluation/metrics.csv", header, rows)
        self.told = {row[0]: f"{row[3]:.3f} (0.400 to 0.900) |" for row in rows}


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    stand_in = Scripts(tmp_path)
    monkeypatch.setattr(gpu, "call_script", stand_in)
    monkeypatch.setattr(gpu, "require_gpu", lambda: None)
    return stand_in


def pretrained(scripts):
    """{folder: flags} of what main_dino.py was called with."""
    calls = [words for script, words in scripts.calls if script == "main_dino.py"]
    parsed = [main_dino.get_args_parser().parse_args(words) for words in calls]
    return {Path(args.output_dir).name: args for args in parsed}


def test_a_gpu_runs_the_small_recipe_and_vit_small_for_what_is_left(scripts, tmp_path, capsys):
    gpu.main(["--output", str(tmp_path), "--minutes", "15"])
    runs = pretrained(scripts)
    assert [(one.arch, one.batch_size_per_gpu, one.patches_per_volume) for one in runs.values()] == [
        ("vit_micro", 128, 20),
        ("vit_small", 64, 1),
        ("vit_small", 64, 1),
    ]
    fine = runs["fine"]
    assert [n * mm for n, mm in zip(fine.input_size, fine.spacing)] == [24, 24, 24]
    # of four fifths of the time, without the small recipe, what is measured, and starting
    assert fine.epochs == int((12 * 60 - 54 * 1.6 - 8 * 1.6 - gpu.START_SECONDS) / 1.6)
    said, told = capsys.readouterr().out, scripts.told
    assert f"| vit_micro, the main table's recipe | {54 * 17 * 128:,} | " in said
    end = fine.epochs * 17 * 64
    assert f"| vit_small, 96x96x48 voxels: 5 random encoders | 0 | {told[f'mean of 5: fine_{end}.random*.csv']}" in said
    assert f"| vit_small, 96x96x48 voxels | {end:,} | {told[f'fine_{end}']}" in said
    assert f"| vit_micro, the main table's recipe | 60,264 | {told['published_0000']}" in said
    assert said.count("| vit_small, 96x96x48 voxels | ") == gpu.CURVE_POINTS
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_that_stops_anywhere_resumes(scripts, tmp_path, capsys):
    for stop_at in range(1, 40):
        scripts.stop_at = len(scripts.calls) + stop_at
        try:
            gpu.main(["--output", str(tmp_path), "--minutes", "6"])
            break
        except UserError as error:
            assert "exit code 1" in str(error)
    assert stop_at > 5 and pretrained(scripts)["fine"].epochs == int((4.8 * 60 - 62 * 1.6 - gpu.START_SECONDS) / 1.6)
    shutil.rmtree(tmp_path / "fine")
    scripts.calls.clear()
    gpu.main(["--output", str(tmp_path), "--evaluate"])  # elsewhere, from the features alone
    assert [script for script, _ in scripts.calls] == ["evaluate_features.py"]
    assert "vit_small, 96x96x48 voxels: 5 random" in capsys.readouterr().out


def test_vit_small_is_left_out_where_no_schedule_fits(scripts, tmp_path, capsys):
    scripts.epoch_seconds = 10
    gpu.main(["--output", str(tmp_path), "--minutes", "15"])
    assert pretrained(scripts).keys() == {"small", "measured"}
    said = capsys.readouterr().out
    assert "vit_small: fewer than 12 epochs fit" in said and "| vit_small, 96x96x48 voxels | not run | |" in said
    with pytest.raises(UserError, match="has no features yet"):
        gpu.main(["--output", str(tmp_path / "other"), "--evaluate"])


def test_without_a_gpu_nothing_is_pre_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU is visible, .* --evaluate"):
        gpu.main(["--output", str(tmp_path)])


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_script_that_a_gpu_runs_ends_before_its_caller(tmp_path, monkeypatch):
    """SIGTERM goes on to it, which saves first; the caller waits, and says that the same command resumes."""
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3)\n    pathlib.Path('saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\ntime.sleep(1)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "CHECKOUT", tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="exit code 75: what it did is kept"):
        gpu.call_script("slow.py")
    assert (tmp_path / "saved").exists() and signal.getsignal(signal.SIGTERM) is before


def written_records(folder, values):
    """Records of two patients' halves, of two cases each. values: {(name, task, arm, seed): {case: probability}}"""
    for (name, task, arm, seed), of_cases in values.items():
        for half in (0, 1):
            patients = [f"p{2 * half}", f"p{2 * half}", f"p{2 * half + 1}", f"p{2 * half + 1}"]
            scores = [[1 - of_cases[p, n % 2], of_cases[p, n % 2]] for n, p in enumerate(patients)]
            content = {
                **{"format": 1, "task": task, "arm": arm, "seed": seed, "part": f"half{half}", "note": "collection"},
                **{"flags": {}, "recipe": "r", "code": "c", "seconds": {}, "git_revision": "g", "device": "d"},
                **{"versions": {}, "patients": patients, "labels": [0, 1, 0, 1]},
                "repeats": [{"folds": [0, 0, 1, 1], "values": scores}],
            }
            place = folder / "runs" / name / f"{task}-{arm}-seed{seed}-half{half}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(content))


def test_profile_and_encoders_together_are_the_mean_of_their_probabilities(tmp_path, capsys):
    """Against scikit-learn's AUC of means taken by hand."""
    rng, values = np.random.default_rng(0), {}
    cases = [(f"p{patient}", label) for patient in range(4) for label in (0, 1)]
    runs = [("classification", "probe", "trivial-radial", None)]
    for seed in (0, 1):
        runs += [("classification", "classification", arm, seed) for arm in ("nodules", "scratch")]
        runs += [("frozen_turned", "probe", arm, seed) for arm in ("trained", "random")]
    for run in runs:
        values[run] = {(patient, label): round(float(rng.uniform(0, 0.7) + 0.3 * label), 3) for patient, label in cases}
    written_records(tmp_path, values)
    together.main(["--results", str(tmp_path)])
    rows = read_table(tmp_path / "together/results.csv")
    assert len(rows) == 12
    labels = [label for _, label in cases]

    def auc(*of_runs):
        return roc_auc_score(labels, np.mean([[values[run][case] for case in cases] for run in of_runs], 0))

    profile = runs[0]
    for title, name, task, arms in (
        ("fine-tuned", "classification", "classification", ("nodules", "scratch")),
        ("frozen, mean over 48 orientations", "frozen_turned", "probe", ("trained", "random")),
    ):
        ones, means = ([], [])
        for arm in arms:
            seeds = [(name, task, arm, seed) for seed in (0, 1)]
            ones.append(np.mean([auc(profile, one) for one in seeds]))
            means.append(auc(profile, profile, *seeds))
        for of_row, (with_it, without) in ((f"{title}, one of 2", ones), (f"{title}, the mean of 2", means)):
            found = [
                (float(row["auc"]), row["minus"], float(row["difference"])) for row in rows if row["beside"] == of_row
            ]
            alone = auc(profile)
            expected = [(with_it, "profile", with_it - alone), (without, "profile", without - alone)]
            for got, wanted in zip(found, [*expected, (with_it, "without", with_it - without)], strict=True):
                assert got[1] == wanted[1] and got[::2] == pytest.approx(wanted[::2])
    # other cases, and cases that can't be told apart, are no match
    place = tmp_path / "runs/classification/classification-scratch-seed1-half1.json"
    place.write_text(place.read_text().replace("p3", "p9"))
    with pytest.raises(UserError, match="classification: scratch was tested on other cases than trivial-radial"):
        together.main(["--results", str(tmp_path)])
    place.write_text(place.read_text().replace("p9", "p2"))
    with pytest.raises(UserError, match="classification: two cases of a patient have one label"):
        together.main(["--results", str(tmp_path)])


def test_together_s_table_is_of_the_kept_records(tmp_path):
    for name in ("classification", "frozen_turned"):
        shutil.copytree(ROOT / "results/runs" / name, tmp_path / "runs" / name)
    together.main(["--results", str(tmp_path)])
    kept = (ROOT / "results/together/results.md").read_text(encoding="utf-8")
    assert (tmp_path / "together/results.md").read_text(encoding="utf-8") == kept
    for path in (tmp_path / "runs/frozen_turned").glob("probe-trained-seed[1-9]*"):
        path.unlink()
    with pytest.raises(UserError, match="frozen_turned: trained and random have 1 whole seeds in common, expected two"):
        together.main(["--results", str(tmp_path)])


def test_together_says_what_was_not_run(tmp_path):
    with pytest.raises(UserError, match="--results .*classification: can't be read"):
        together.main(["--results", str(tmp_path)])
    written_records(
        tmp_path, {("classification", "probe", "random", 0): {(f"p{n}", k): 0.5 for n in range(4) for k in (0, 1)}}
    )
    with pytest.raises(UserError, match="holds no whole run of trivial-radial"):
        together.main(["--results", str(tmp_path)])
