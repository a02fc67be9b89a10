"""results/: what its scripts run is understood by the product, each half by the encoder that never saw it."""

import json
import os
import shlex
import subprocess

import pytest
from conftest import ROOT

import main_dino
import main_lnc_luna16
import study
from dino3d.flag_files import read_flags
from dino3d.study.arms import choose_arms, read_arms
from dino3d.study.definition import split_flags

# In place of Python: notes its arguments, and says what kind of data there is
STUB = """#!/bin/sh
case "$1" in -c) echo collection ;; *) printf '%s\\0' "$@" >> "$CALLS"; printf '\\n' >> "$CALLS" ;; esac
"""


@pytest.mark.skipif(os.name == "nt", reason="sh")
@pytest.mark.parametrize("name, seeds", [("classification", "0 1 2 3 4"), ("augmentations", "0 1 2")])
def test_scripts_give_the_product_flags_that_it_knows(tmp_path, monkeypatch, name, seeds):
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    monkeypatch.setenv("CALLS", str(calls))
    environment = os.environ | {"PYTHON": str(stub), "WORK": "w", "OUT": "o", "DATA": "d"}
    environment.pop("SEEDS", None)
    subprocess.run([ROOT / "results" / f"{name}.sh"], env=environment, check=True, cwd=tmp_path)
    made, *halves, tables = [line.rstrip("\0").split("\0") for line in calls.read_text().splitlines()]
    assert made == ["results/make_data.py", "--data", "d", "--output", "w/data"]
    monkeypatch.chdir(ROOT)
    parser = study.get_args_parser()
    for half, (script, *flags) in enumerate(halves):
        args = parser.parse_args(flags)
        study.check_flags(parser, args)
        assert script == "study.py" and " ".join(map(str, args.seeds)) == seeds
        pretrain = split_flags("pretrain", args.pretrain_flags)
        found = main_dino.get_args_parser().parse_args([*pretrain, "--output_dir", "x"])
        # pre-trained without the patients that are recorded
        assert found.data_list == f"w/data/pool_without_half{half}.csv"
        assert args.patients == f"w/data/half{half}.txt" and args.part == f"half{half}"
        main_lnc_luna16.get_args_parser().parse_args(split_flags("classification", args.classification_flags))
        assert str(args.records) == f"o/runs/{name}"
        assert [arm.name for arm in choose_arms(args.arms, read_arms(args.arms_file))] == args.arms
    assert len(halves) == 2
    args = parser.parse_args(tables[1:])
    study.check_flags(parser, args)
    assert str(args.output_dir) == f"o/{name}" and str(args.from_records) == f"o/runs/{name}"


def test_records_that_are_kept_hold_together():
    """Every record in results/runs is of a recipe of its folder, and the tables beside were made from all of them."""
    for folder in sorted((ROOT / "results" / "runs").glob("*/")):
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        runs = (ROOT / "results" / folder.name / "runs.csv").read_text(encoding="utf-8").splitlines()
        assert len(runs) == 1 + len(records)
        assert all("/" not in shlex.join(one["patients"]) for one in records)


def test_the_arms_are_the_recipes():
    arms = read_arms(str(ROOT / "results" / "arms.txt"))
    for name, arm in arms.items():
        flags = tuple(map(str, read_flags(str(ROOT / "recipes" / f"{name}.txt"))))
        assert arm.flags == (*flags, "--epochs", "54")
