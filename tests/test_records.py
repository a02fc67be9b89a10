"""study.py --records and --from_records: a file for each finished run, and tables from them alone; two halves of the
patients, each from a study of its own, against scikit-learn."""

import contextlib
import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from run_study import write_stubs
from sklearn.metrics import roc_auc_score
from test_study import flags_of, table

import study
from dino3d.command_line import UserError
from dino3d.study import jobs, pool, records
from dino3d.study.definition import load_study
from dino3d.study.jobs import settings
from dino3d.study.records import RECORD_FORMAT, digest, rounded_scores
from dino3d.study.same_code import SAME_CODE

PATIENTS = [f"p{i}" for i in range(20)]
HALVES = {"half0": PATIENTS[::2], "half1": PATIENTS[1::2]}


def names_file(path, names):
    path.write_text("\n".join(names) + "\n")
    return path


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """Small scripts in place of those that train."""
    with pytest.MonkeyPatch.context() as patch:
        folder = write_stubs(tmp_path_factory.mktemp("stubs") / "scripts")
        patch.setattr(jobs, "ROOT", folder)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, stubs):
    """A folder with labels, and records of two studies, each of half of the patients, and of two tables of features."""
    made = tmp_path_factory.mktemp("made")
    (made / "data").mkdir()
    rng = np.random.default_rng(1)
    cases = [(f"c{i}", f"p{i // 2}", i % 2) for i in range(40)]
    tables = {"labels": [("name", "path", "label", "patient"), *((n, f"{n}.nii.gz", y, p) for n, p, y in cases)]}
    for name, strength in (("weak", 0.3), ("strong", 3.0)):
        rows = [(n, p, strength * y + rng.normal()) for n, p, y in cases]
        tables[name] = [("name", "patient", "feature_0"), *rows]
    for name, rows in tables.items():
        with open(made / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    for number, (part, names) in enumerate(HALVES.items()):
        names_file(made / f"{part}.txt", names)
        features = ["--features", made / "weak.csv", made / "strong.csv"]
        study.main(study_flags(made, made / part, made / "records", part, number, *features))
    return made


def study_flags(made, folder, records, part, strength, *more):
    return flags_of(
        folder,
        made / "data",
        *("--records", records, "--part", part, "--patients", made / f"{part}.txt", "--note", "stubs"),
        *(f"--pretrain_flags=--strength {strength}", "--probe", made / "labels.csv", *more),
        arms=("none", "scratch", "random"),
    )


@pytest.fixture
def halves(made, tmp_path):
    """The records alone, to be changed."""
    return shutil.copytree(made / "records", tmp_path / "records")


def tables_of(records, out, *more):
    study.main(["--from_records", str(records), "--output_dir", str(out), "--draws", "400", *map(str, more)])
    return out


def test_two_halves_together(made, halves, tmp_path, capsys):
    out = tables_of(halves, tmp_path / "out")
    said = capsys.readouterr().out
    assert "frozen probe: AUC of 40 cases each, 20 patients in all" in said and "The paper's claims" not in said
    # Each half's models judge their own patients alone: pairs of cases of one half and one fold, by scikit-learn
    for seed in (0, 1):
        parts = []
        for part, names in HALVES.items():
            path = made / part / f"arms/none/seed{seed}/classification/predictions.csv"
            rows = [row for row in table(path) if row["patient"] in names]
            for fold in {row["fold"] for row in rows}:
                mine = [row for row in rows if row["fold"] == fold]
                labels = np.array([int(row["label"]) for row in mine])
                pairs = (labels == 0).sum() * (labels == 1).sum()
                parts.append((pairs, roc_auc_score(labels, [float(row["probability"]) for row in mine])))
        expected = np.average([auc for _, auc in parts], weights=[pairs for pairs, _ in parts])
        found = next(
            row
            for row in table(out / "seeds.csv")
            if (row["task"], row["arm"], row["seed"]) == ("classification", "none", str(seed))
        )
        assert float(found["value"]) == pytest.approx(expected, abs=1e-9)
    probe = {row["arm"]: float(row["value"]) for row in table(out / "results.csv") if row["task"] == "probe"}
    assert set(probe) == {"none", "random", "weak", "strong"} and probe["strong"] > probe["weak"]
    runs = table(out / "runs.csv")
    assert len(runs) == 2 * (3 * 2 + 2 * 2 + 2) and {row["note"] for row in runs} == {"stubs"}
    assert {row["patients"] for row in runs} == {"10"}
    markdown = (out / "results.md").read_text()
    for row in table(out / "results.csv"):
        assert f"| {row['arm']} | {float(row['value']):.3f} (" in markdown
    assert "not run" not in markdown  # tables of features are not fine-tuned, from scratch is not probed
    assert all((out / name).is_file() for name in ("report.html", "study.png", "differences.csv", "results.json"))


def test_an_ensemble_is_the_mean_of_its_seeds_predictions(halves, tmp_path, capsys):
    out = tables_of(halves, tmp_path / "out", "--ensembles", "none")
    found = {row["task"]: float(row["value"]) for row in table(out / "results.csv") if row["arm"] == "none-ensemble"}
    assert set(found) == {"classification", "probe"}
    parts = []
    for part in HALVES:
        both = [json.loads((halves / f"classification-none-seed{seed}-{part}.json").read_text()) for seed in (0, 1)]
        assert both[0]["patients"] == both[1]["patients"]
        probability = np.mean([one["repeats"][0]["values"] for one in both], 0)[:, 1]
        labels, folds = np.array(both[0]["labels"]), np.array(both[0]["repeats"][0]["folds"])
        for fold in set(folds):
            mine = folds == fold
            pairs = (labels[mine] == 0).sum() * (labels[mine] == 1).sum()
            parts.append((pairs, roc_auc_score(labels[mine], probability[mine])))
    expected = np.average([auc for _, auc in parts], weights=[pairs for pairs, _ in parts])
    assert found["classification"] == pytest.approx(expected, abs=1e-9)
    # from records of one seed, or of seeds that were tested in other folds, there is none, and it is told
    path = halves / "probe-none-seed1-half0.json"
    record = json.loads(path.read_text())
    for repeat in record["repeats"]:
        repeat["folds"] = repeat["folds"][::-1]
    path.write_text(json.dumps(record))
    for part in HALVES:
        (halves / f"classification-none-seed1-{part}.json").unlink()
    out = tables_of(halves, tmp_path / "again", "--ensembles", "none")
    assert "ensemble" not in (out / "results.csv").read_text()
    said = capsys.readouterr().out
    assert "classification: no ensemble of none: it needs two seeds, 1 was run" in said
    assert "probe: no ensemble of none: its seeds were tested in other folds" in said


def test_ensembles_that_are_compared_are_of_the_same_seeds(halves, tmp_path, capsys):
    """Of more seeds an ensemble predicts better, whatever the arm."""
    for path in [*halves.glob("classification-none-seed*.json")]:
        record = json.loads(path.read_text())
        (halves / path.name.replace("seed1", "seed2").replace("seed0", "seed3")).write_text(
            json.dumps(record | {"seed": {0: 3, 1: 2}[record["seed"]]})
        )
    out = tables_of(halves, tmp_path / "out", "--ensembles", "none", "scratch")
    said = capsys.readouterr().out
    assert "classification: ensembles are of seeds 0, 1 alone, which all of none, scratch have" in said
    seeds = {row["arm"]: row["seeds"] for row in table(out / "results.csv") if row["task"] == "classification"}
    assert seeds == {"none": "4", "scratch": "2", "random": "2", "none-ensemble": "2", "scratch-ensemble": "2"}
    alone = tables_of(halves, tmp_path / "alone", "--ensembles", "none")
    seeds = {row["arm"]: row["seeds"] for row in table(alone / "results.csv") if row["task"] == "classification"}
    assert seeds["none-ensemble"] == "4"


def test_a_record_keeps_the_order_of_what_a_sure_model_says():
    """Its AUC is that of what was predicted, by scikit-learn: near 0 and 1 more places are kept."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    for scale in (1, 10, 20, 25):
        probability = 1 / (1 + np.exp(-scale * rng.normal(labels, 1)))
        kept = np.array(rounded_scores(probability))
        assert roc_auc_score(labels, kept) == pytest.approx(roc_auc_score(labels, probability), abs=1e-12)
        assert np.abs(kept - probability).max() <= 5e-8
    assert rounded_scores(np.array([0.123456789, 0, 1, np.nan])) == [0.1234568, 0, 1, None]


def test_records_hold_no_paths_and_each_patient_once(made, halves):
    seen = {}
    for path in halves.glob("*.json"):
        text = path.read_text()
        record = json.loads(text)
        assert str(made) not in text and record["format"] == RECORD_FORMAT
        assert set(record["patients"]) == set(HALVES[record["part"]])
        seen.setdefault((record["task"], record["arm"], record["seed"]), set()).update(record["patients"])
        if record["seed"] is not None:
            assert record["device"] and record["code"] == jobs.code_digest()
            assert set(record["seconds"]) == {"pretrain", record["task"]}
    assert all(patients == set(PATIENTS) for patients in seen.values())


def test_what_is_recorded_is_not_run_again(made, halves, tmp_path, stubs, capsys):
    """In another folder, as of a fresh clone; with other flags, of other data, or with another code it is."""

    def again(folder, *more, strength=0):
        study.main(study_flags(made, tmp_path / folder, halves, "half0", strength, *more))
        return capsys.readouterr().out

    before = {path.name: path.read_bytes() for path in halves.glob("*.json")}
    capsys.readouterr()
    said = again("b")
    assert "6 of 6 units are in the records" in said and not (tmp_path / "b/arms").exists()
    assert {path.name: path.read_bytes() for path in halves.glob("*.json")} == before
    (halves / "probe-none-seed1-half0.json").unlink()
    said = again("b")
    assert "5 of 6 units are in the records" in said and not (tmp_path / "b/arms/random").exists()
    record = json.loads((halves / "probe-none-seed1-half0.json").read_text())
    first = json.loads(before["probe-none-seed1-half0.json"])
    assert record["repeats"] == first["repeats"] and record["patients"] == first["patients"]
    assert "are in the records" not in again("c", "--plan", strength=7)
    assert "are in the records" not in again("n", "--plan", "--note", "other data")
    (stubs / "utils.py").write_text("changed = True\n")
    assert "are in the records" not in again("d", "--plan")
    (stubs / "utils.py").unlink()


def test_what_several_versions_of_the_code_have_made_counts_for_none(made, tmp_path, monkeypatch, capsys):
    """A task after a pre-training of older code, a job that is resumed by newer code, or during which it changes."""
    code, changed = ["older"], "the code changed since it began, so that its record counts for no version; remove "
    monkeypatch.setattr(pool, "code_digest", lambda: code.pop(0) if len(code) > 1 else code[0])
    monkeypatch.setattr(records, "code_digest", lambda: "newer")

    def run(folder, *codes):
        code[:] = codes
        kept = tmp_path / f"records_{folder}"
        more = ["--records", kept, "--job", 0]  # which measures nothing first
        study.main(flags_of(tmp_path / folder, made / "data", *more, arms=("none",), seeds=(0,)))
        return capsys.readouterr().out, json.loads((kept / "classification-none-seed0.json").read_text())["code"], kept

    said, found, kept = run("resumed", "older")
    assert found == "older" and "changed since" not in said
    unit = tmp_path / "resumed/arms/none/seed0"
    (unit / "classification.done.json").unlink()
    said, found, _ = run("resumed", "newer")
    assert found == "older+newer" and "changed since" not in said  # each stage is of one
    tables_of(kept, tmp_path / "out")
    assert "classification: its runs were made by 2 versions of the code" in capsys.readouterr().out
    (kept / SAME_CODE).write_text("code,same_as\nnewer,older\n")
    tables_of(kept, tmp_path / "out")
    assert "versions of the code" not in capsys.readouterr().out
    for one in (kept, tmp_path / "records_alone"):
        flags = flags_of(tmp_path / "b", made / "data", "--records", one, "--plan", arms=("none",), seeds=(0,))
        study.main(flags)
        assert ("1 of 1 units are in the records" in capsys.readouterr().out) == (one != kept)
        if one == kept:
            assert run("alone", "newer")[1] == "newer"
    (unit / "pretrain/checkpoint.pth").unlink()  # what is run again may go on with what stands there
    said, found, _ = run("resumed", "third")
    assert found == "older+third+newer" and f"none seed 0 pretrain: {changed}" in said
    assert f"remove {unit} to run it again" in said
    # from before the start of one to after its end, each of two jobs
    said, found, _ = run("during", "older", "older", "older", "newer")
    assert found == "older+newer" and said.count("the code changed since it began") == 1
    assert f"none seed 0 classification: {changed}" in said
    assert not list(tmp_path.glob("*/arms/*/*/*.begun.json"))


def test_a_record_of_fewer_patients_stands_for_no_more(made, tmp_path, capsys):
    """A wider list of patients, or none, runs again; whom no case is of makes no difference, and is told."""
    kept = tmp_path / "records"

    def run(names, *more, folder="s"):
        more = ["--records", kept, *more]
        more += ["--patients", names_file(tmp_path / "names.txt", names)] if names else []
        study.main(flags_of(tmp_path / folder, made / "data", *more, arms=("none",), seeds=(0,)))
        return capsys.readouterr().out

    def record(name="classification-none-seed0"):
        return json.loads((kept / f"{name}.json").read_text())

    def is_held(names):
        return "1 of 1 units are in the records" in run(names, "--plan", folder="other")

    said = run([*PATIENTS[:8], "patient", "P9"])
    assert "note: --patients: 2 of its 10 names have no case, such as P9, patient: correct them" in said
    assert set(record()["patients"]) == {*PATIENTS[:8]} and record()["left_out"] == sorted(PATIENTS[8:])
    assert is_held(PATIENTS[:8]) and is_held([*PATIENTS[:8], "nobody"])
    assert not is_held(PATIENTS[:16]) and not is_held(None) and not is_held(PATIENTS[:4])
    assert "note: --patients" not in run(PATIENTS[:16]) and set(record()["patients"]) == {*PATIENTS[:16]}
    assert "of 1 names have no case" not in run(None) and record()["left_out"] == [] and is_held(None)
    assert is_held(PATIENTS) and not is_held(PATIENTS[:16])
    said = run(["nobody", *PATIENTS], folder="other")  # all is recorded
    assert "1 of 1 units are in the records" in said and "1 of its 21 names have no case, such as nobody" in said
    # of older records, which do not say whom they lack, those of the very names; for all patients it is told
    run(PATIENTS[:8])
    older = {name: value for name, value in record().items() if name != "left_out"}
    (kept / "classification-none-seed0.json").write_text(json.dumps(older))
    assert is_held(PATIENTS[:8]) and not is_held(PATIENTS[:16]) and not is_held(PATIENTS[:4])
    assert "note: 1 older records do not say if --patients left some out: taken for all" in run(None, folder="other")
    assert record() == older


def test_tables_of_features_of_fewer_patients_are_not_kept(made, halves, tmp_path):
    """Where their files are not there any more, and a run beside them is made again."""
    (halves / "probe-none-seed1-half0.json").unlink()
    path = halves / "probe-weak-half0.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"left_out": ["another", *content["left_out"]]}))
    names = names_file(tmp_path / "names.txt", ["another", *HALVES["half0"]])
    flags = study_flags(made, tmp_path / "b", halves, "half0", 0, "--features", str(tmp_path / "gone.*.csv"))
    flags[flags.index("--patients") + 1] = str(names)
    with pytest.raises(UserError, match="no file has such a name"):
        study.main(flags)


def test_few_labels_of_a_finished_study(made, halves, tmp_path, capsys):
    """Logistic regression of one figure orders cases as it does, however few patients it was trained on."""
    shutil.copytree(made / "half0", tmp_path / "half0")
    flags = study_flags(made, tmp_path / "half0", halves, "half0", 0, "--few_labels")
    flags += ["--features", str(made / "strong.csv")]
    capsys.readouterr()
    study.main([*flags, "--table"])
    said = capsys.readouterr().out
    assert "begins" not in said and "frozen probe, 25 % of the labels: AUC of 40 cases" in said
    values = {row["name"]: float(row["feature_0"]) for row in table(made / "strong.csv")}
    names = sorted(row["name"] for row in table(made / "labels.csv"))
    patients = {row["name"]: row["patient"] for row in table(made / "labels.csv")}
    for share in ("50", "25", "10"):
        record = json.loads((halves / f"probe_{share}-strong-half0.json").read_text())
        assert len(record["repeats"]) == 10 and {*record["patients"]} == {*HALVES["half0"]}
        mine = [name for name in names if patients[name] in HALVES["half0"]]
        assert [patients[name] for name in mine] == record["patients"]
        drawn = set()
        for repeat in record["repeats"]:
            for fold in set(repeat["folds"]):
                cases = [i for i, one in enumerate(repeat["folds"]) if one == fold]
                by_figure = sorted(cases, key=lambda i: values[mine[i]])
                by_probe = sorted(cases, key=lambda i: repeat["values"][i][1])
                assert by_figure == by_probe
            drawn.add(json.dumps(repeat["values"]))
        assert len(drawn) == 10  # other patients each time
    # what is recorded without them is not taken for it
    study.main([*study_flags(made, tmp_path / "b", halves, "half0", 0, "--few_labels"), "--plan"])
    assert "6 of 6 units are in the records" in capsys.readouterr().out
    (halves / "probe_25-none-seed1-half0.json").unlink()
    study.main([*study_flags(made, tmp_path / "c", halves, "half0", 0, "--few_labels"), "--plan"])
    assert "5 of 6 units are in the records" in capsys.readouterr().out
    study.main([*study_flags(made, tmp_path / "d", halves, "half0", 0), "--plan"])
    assert "6 of 6 units are in the records" in capsys.readouterr().out


def test_few_labels_as_far_as_patients_go(made, tmp_path, capsys):
    """Told before anything runs, from the labels alone; and probes of other features than their shares are told."""
    rows = (made / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(rows[:17]) + "\n")  # 8 patients
    flags = study_flags(made, tmp_path / "s", tmp_path / "records", "half0", 0, "--few_labels")
    flags[flags.index("--probe") + 1] = tmp_path / "labels.csv"
    flags = list(map(str, flags))
    study.main([*flags, "--plan"])
    said = capsys.readouterr().out
    assert f"probe_10 is left out: 10 % of the training patients of --probe {tmp_path}/labels.csv are too few" in said
    study.main(flags)
    assert {path.name.partition("-")[0] for path in (tmp_path / "records").glob("*.json")} == {
        *("classification", "probe", "probe_50", "probe_25")
    }
    capsys.readouterr()
    study.main([*flags, "--plan"])
    assert "6 of 6 units are in the records" in capsys.readouterr().out
    path = tmp_path / "records/probe_25-none-seed1-half0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": "other"}))
    tables_of(tmp_path / "records", tmp_path / "out")
    assert "probe: what none has with few labels and with all is of other flags or code" in capsys.readouterr().out
    (tmp_path / "labels.csv").write_text("\n".join([rows[0], *rows[1:17:2]]) + "\n")
    with pytest.raises(UserError, match=r"--probe .*labels.csv: all 8 cases have label 0"):
        study.main([*flags, "--plan"])


def test_weights_of_others_are_part_of_the_recipe(made, tmp_path, stubs, capsys):
    weights = tmp_path / "theirs.pth"
    (tmp_path / "arms.txt").write_text("theirs: theirs.pth\n")

    def plan(folder, level, *more):
        weights.write_text(json.dumps({"level": level, "seed": 0}))
        arms = ["--arms_file", tmp_path / "arms.txt", "--records", tmp_path / "records", *more]
        study.main(flags_of(tmp_path / folder, made / "data", *arms, arms=("theirs",), seeds=(0,)))
        return capsys.readouterr().out

    plan("a", 1.0)
    assert "1 of 1 units are in the records" in plan("b", 1.0, "--plan")
    assert "in the records" not in plan("c", 2.0, "--plan")


@pytest.mark.parametrize("flags", ["--pretrained_weights start.pth", "--pretrained_weights=start.pth"])
def test_weights_that_pre_training_begins_from_are_part_of_the_recipe(
    made, tmp_path, stubs, capsys, monkeypatch, flags
):
    """Other weights are another recipe, and may not take the place of those that a study began with; without any the
    recipe is what it always was."""
    weights = tmp_path / "start.pth"
    monkeypatch.chdir(tmp_path)  # where the studies begin, whose relative paths are of there
    (tmp_path / "arms.txt").write_text(f"cont: {flags}\nempty: --pretrained_weights=\nplain: --strength 1\n")

    def begin(folder, content, *more):
        weights.write_text(content)
        arms = ["--arms_file", tmp_path / "arms.txt", "--records", tmp_path / "records", *more]
        chosen = ("cont", "empty", "plain", "random")
        study.main(flags_of(tmp_path / folder, made / "data", *arms, arms=chosen, seeds=(0,)))
        return capsys.readouterr().out

    begin("a", "one")
    found = {path.name.split("-")[1]: path.read_text() for path in (tmp_path / "records").glob("*.json")}
    recipe = {arm: json.loads(text)["recipe"] for arm, text in found.items()}
    random = read_units(tmp_path / "a", "random")
    assert recipe["random"] == digest({one.stage: settings(one.flags) for one in random})
    assert not [text for text in found.values() if "start.pth" in text]
    assert "4 of 4 units are in the records" in begin("b", "one", "--plan")
    assert "3 of 4 units are in the records" in begin("c", "two", "--plan")
    monkeypatch.chdir(tmp_path.parent)
    for again in ("a", "c"):
        weights.write_text("other" if again == "c" else "two")
        with pytest.raises(UserError, match="start.pth: has changed since the study in .* began"):
            study.main(["--output_dir", str(tmp_path / again), "--seeds", "1"])
    weights.unlink()
    with pytest.raises(UserError, match="start.pth: can't be read .No such file"):
        study.main(["--output_dir", str(tmp_path / "a"), "--table"])
    weights.mkdir()
    (weights / "checkpoint.pth").write_text("two")  # of a run's folder, what the scripts take
    with pytest.raises(UserError, match="start.pth: has changed since the study in .* began"):
        study.main(["--output_dir", str(tmp_path / "a"), "--table"])
    (weights / "checkpoint.pth").write_text("one")
    study.main(["--output_dir", str(tmp_path / "a"), "--table"])


def read_units(folder, arm):
    """The jobs of an arm of a study of one seed."""
    (unit,) = [unit for unit in jobs.all_units(load_study(folder)) if unit[0].arm == arm]
    return unit


def test_a_half_that_was_not_run(halves, tmp_path, capsys):
    for path in halves.glob("*-none-seed1-half1.json"):
        path.unlink()
    out = tables_of(halves, tmp_path / "out", "--arms", "random", "none", "elastic", "--against", "random")
    said = capsys.readouterr().out
    assert "none seed 1 is left out, as its part half1 was not run" in said
    assert {row["seed"] for row in table(out / "seeds.csv") if row["arm"] == "none"} == {"0"}
    assert [row["arm"] for row in table(out / "results.csv") if row["task"] == "probe"] == ["random", "none"]
    assert "| elastic | not run |" in (out / "results.md").read_text()
    assert "elastic: no run" not in said
    tables_of(halves, tmp_path / "out", "--arms", "random", "elastic", "--against", "elastic", "--ensembles", "elastic")
    said = capsys.readouterr().out
    assert all(f"note: {flag} elastic: no run of it is recorded" in said for flag in ("--against", "--ensembles"))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda path, record: path.write_text("{"), "is no record of a study"),
        (lambda path, record: path.write_text("[" * 9000), "is no record of a study"),
        (lambda path, record: path.write_text(json.dumps(record | {"format": 2})), "its format is 2, expected 1"),
        (lambda path, record: path.write_text(json.dumps(record | {"task": "x"})), "of task 'x'"),
        (lambda path, record: path.write_text(json.dumps(record | {"patients": []})), "not one for each case"),
        (lambda path, record: (path.parent / "copy.json").write_text(json.dumps(record)), "is of the same run as"),
        (
            lambda path, record: path.write_text(json.dumps(record | {"patients": ["p0", "p1"] * 10})),
            "a patient stands in two parts",
        ),
        *(
            (lambda path, record, name=name, value=value: path.write_text(json.dumps(record | {name: value})), said)
            for name, value, said in (
                ("labels", [0], "its labels are not one for each case"),
                ("labels", [0.5] * 20, "its labels are not whole numbers"),
                ("labels", [0, 2] * 10, "its probabilities are not one for each class"),
                ("seed", "0", "its seed is '0'"),
                ("seed", [0], "its seed is .0."),
                ("part", None, "is no record of a study"),
                ("part", "half 0", "its part is 'half 0'"),
                ("flags", None, "is no record of a study"),
                ("flags", {"pretrain": 1}, "are no text"),
                ("seconds", {"pretrain": "1"}, "its seconds are no numbers"),
                ("git_revision", None, "are no text"),
                ("patients", [1] * 20, "are no text"),
                ("left_out", [1], "are no text"),
                ("left_out", None, "is no record of a study"),
            )
        ),
        *(
            (
                lambda path, record, name=name, value=value: path.write_text(
                    json.dumps(record | {"repeats": [one | {name: value(one[name])} for one in record["repeats"]]})
                ),
                said,
            )
            for name, value, said in (
                ("values", lambda had: [[float("nan")] * 2, *had[1:]], "its scores are not from 0 to 1"),
                ("values", lambda had: [[None, None], *had[1:]], "its scores are not from 0 to 1"),
                ("values", lambda had: [["0", "1"], *had[1:]], "its scores are not from 0 to 1"),
                ("values", lambda had: [[0, 7], *had[1:]], "its scores are not from 0 to 1"),
                ("values", lambda had: [had[0][:1], *had[1:]], "its probabilities are not one for each class"),
                ("values", lambda had: [one[1] for one in had], "is no record of a study"),
                ("values", lambda had: [[*one, 0] for one in had], "of 3 repeats and of 2 and 3 classes"),
                ("folds", lambda had: [0.5, *had[1:]], "its folds are not whole numbers"),
            )
        ),
        (
            lambda path, record: path.write_text(json.dumps(record | {"repeats": record["repeats"][:1]})),
            "of 1 and 3 repeats and of 2 classes",
        ),
    ],
)
def test_records_that_are_wrong(halves, tmp_path, change, said):
    path = halves / "probe-none-seed0-half0.json"
    change(path, json.loads(path.read_text()))
    with pytest.raises(UserError) as error:
        tables_of(halves, tmp_path / "out")
    assert re.search(said, str(error.value)) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_runs_that_were_not_made_alike_are_told(halves, tmp_path, capsys):
    """Flags of one arm's seeds, of a task's arms, and the code; those that a study gives its arms are no such thing."""
    told = "sets of flags|versions of the code"
    for path in halves.glob("*-half1.json"):  # of other flags in place of other data
        path.write_text(path.read_text().replace("--strength 1", "--strength 0"))
    tables_of(halves, tmp_path / "out")
    assert not re.search(told, capsys.readouterr().out)
    path = halves / "classification-none-seed1-half0.json"
    record = json.loads(path.read_text())
    flags = {name: f"{text} --epochs 9" for name, text in record["flags"].items()}
    path.write_text(json.dumps(record | {"flags": flags, "code": "another"}))
    tables_of(halves, tmp_path / "out")
    said = capsys.readouterr().out
    assert "classification: none was pre-trained with 2 sets of flags" in said
    assert "classification: its runs were made with 2 sets of flags, so that not only arms differ: --epochs 9" in said
    assert "classification: its runs were made by 2 versions of the code" in said and "probe: its" not in said


def test_tables_beside_records_are_no_records(halves, tmp_path):
    before = sorted(halves.iterdir())
    with pytest.raises(UserError, match="is the folder of --from_records"):
        tables_of(halves, halves / "../records")
    assert sorted(halves.iterdir()) == before


def test_an_ensemble_stands_once_and_hides_no_arm(halves, tmp_path):
    out = tables_of(halves, tmp_path / "out", "--ensembles", "none", "none")
    assert [row["arm"] for row in table(out / "results.csv")].count("none-ensemble") == 2  # of two tasks
    for path in halves.glob("*-random-*.json"):
        path.write_text(path.read_text().replace('"random"', '"none-ensemble"'))
    with pytest.raises(UserError, match="--ensembles none: none-ensemble is an arm of the records"):
        tables_of(halves, tmp_path / "again", "--ensembles", "none")


def test_records_of_other_patients_are_kept(made, halves, tmp_path):
    """A half whose --part was forgotten, or given for the other."""
    before = {path.name: path.read_bytes() for path in halves.glob("*.json")}
    names_file(tmp_path / "others.txt", HALVES["half1"])
    for mode in ([], ["--table"]):
        flags = study_flags(made, made / "half0", halves, "half0", 0, *mode)
        flags[flags.index("--patients") + 1] = str(tmp_path / "others.txt")
        with pytest.raises(UserError, match="holds none of the patients that --patients names; give the --part"):
            study.main(flags)
    assert {path.name: path.read_bytes() for path in halves.glob("*.json")} == before


def test_a_place_where_records_can_not_be_is_told_before_anything_runs(made, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="--records .*file.*: can't be written to"):
            study.main(study_flags(made, tmp_path / "s", tmp_path / place, "half0", 0))
    assert not (tmp_path / "s").exists()


def test_tables_of_features_that_are_recorded_need_no_files(made, halves, tmp_path):
    """Where the run that left them is in the records, and another one runs beside it; but not where none are."""
    (halves / "probe-none-seed1-half0.json").unlink()
    features = ["--features", str(tmp_path / "b/arms/random/seed0/probe/features.*.csv")]
    study.main(study_flags(made, tmp_path / "b", halves, "half0", 0, *features))
    assert (halves / "probe-none-seed1-half0.json").exists() and (halves / "probe-weak-half0.json").exists()
    with pytest.raises(UserError, match="no file has such a name"):
        study.main(study_flags(made, tmp_path / "b", tmp_path / "other", "half0", 0, *features))


def test_a_full_disk_is_named(made, halves, tmp_path, monkeypatch):
    """That of the tables, by a limit on the size of files, and that of the records."""
    resource = pytest.importorskip("resource")
    command = [ROOT / "study.py", "--from_records", halves, "--output_dir", tmp_path / "out", "--draws", "400"]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert done.returncode == 1
    assert (
        done.stderr == f"error: --output_dir {tmp_path}/out: can't be written to (File too large); make room for it\n"
    )

    @contextlib.contextmanager
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    monkeypatch.setattr(records, "atomic_write", full)
    with pytest.raises(UserError, match="--records .*/records: can't be written to .No space left"):
        study.main([*study_flags(made, made / "half0", halves, "half0", 0), "--table"])


def test_no_records(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no records"):
        tables_of(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="--from_records .*none: can't be read .No such file or directory"):
        tables_of(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--part", "half0"], "--part: is for --records DIR"),
        (["--records", "r", "--part", "../x"], "--part ../x: expected letters"),
        (["--ensembles", "none"], "--ensembles: is for --from_records DIR"),
        (["--classification", ".", "--few_labels"], "--few_labels: is for --probe DIR, which is missing"),
        (["--from_records", "r", "--few_labels"], "--few_labels: --from_records makes tables of what was run"),
        (["--from_records", "r", "--list"], "--list and --from_records exclude each other"),
        (["--from_records", "r", "--data_dir", "x"], "--data_dir: --from_records makes tables of what was run"),
        (["--from_records", "r", "--parallel", "2"], "--parallel: --from_records makes tables of what was run"),
        (["--from_records", "r", "--threads", "2"], "--threads: --from_records makes tables of what was run"),
    ],
)
def test_flags_that_are_wrong_by_themselves(tmp_path, flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(["--output_dir", str(tmp_path / "s"), *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "patients, features, said",
    [
        (["other"], [], "names none of the 20 patients of classification"),
        ([], [], "names no patient"),
        (PATIENTS, ["missing.csv"], "missing.csv: can.t be read"),
    ],
)
def test_what_records_lack(made, tmp_path, patients, features, said):
    more = ["--records", tmp_path / "r", "--patients", names_file(tmp_path / "p.txt", patients)]
    more += ["--features", *features] if features else []
    with pytest.raises(UserError, match=said):
        study.main(["--output_dir", str(made / "half0"), "--table", "--draws", "400", *map(str, more)])


def test_another_run_whose_names_make_the_same_file(made, halves):
    path = halves / "classification-none-seed0-half0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arm": "other"}))
    with pytest.raises(UserError, match="is the record of another run"):
        study.main(study_flags(made, made / "half0", halves, "half0", 0, "--table"))


def test_compared_with_what_is_not_there(made, halves, tmp_path):
    with pytest.raises(UserError, match="--against rando: is none of none, random, scratch, .*did you mean random"):
        tables_of(halves, tmp_path / "out", "--against", "rando")
    with pytest.raises(UserError, match="--ensembles rando: is none of none, random, scratch"):
        tables_of(halves, tmp_path / "out", "--ensembles", "rando")
    with pytest.raises(UserError, match="--against paper: is none of none, scratch, random"):
        study.main(["--output_dir", str(made / "half0"), "--table", "--against", "paper"])
