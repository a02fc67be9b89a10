"""evaluate_features.py: tables of every form and from elsewhere, what is refused, and what the results say."""

import csv
import itertools
import json

import h5py
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, KFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from test_report import Parsed

import evaluate_features
from dino3d.command_line import UserError
from dino3d.data.points import AXES
from dino3d.evaluation import comparison, feature_report
from dino3d.evaluation.feature_tables import read_features
from dino3d.evaluation.labelled_cases import encode_labels, join, read_labels
from dino3d.features.tables import FeatureTable, write_features

QUICK = ["--folds", "3", "--repeats", "2", "--draws", "200"]


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def write_cases(path, features, names=None, columns=None):
    names = names or [f"c{i:02d}" for i in range(len(features))]
    columns = columns or [f"feature_{k}" for k in range(features.shape[1])]
    return write_csv(path, ["name", *columns], [[name, *row] for name, row in zip(names, features)])


def write_labels(path, labels, **columns):
    rows = [[f"c{i:02d}", label, *(values[i] for values in columns.values())] for i, label in enumerate(labels)]
    return write_csv(path, ["name", "label", *columns], rows)


def evaluate(tmp_path, *flags, features=None, labels="labels.csv"):
    out = tmp_path / "out"
    features = features or ["a.csv", "b.csv"]
    paths = [str(tmp_path / one) for one in features]
    given = ["--features", *paths, "--labels", str(tmp_path / labels), "--output_dir", str(out)]
    evaluate_features.main([*given, *QUICK, *flags])
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def noise(tmp_path):
    """30 patients of one case, two tables of pure noise."""
    rng = np.random.default_rng(0)
    for name in "ab":
        write_cases(tmp_path / f"{name}.csv", rng.normal(size=(30, 4)))
    write_labels(tmp_path / "labels.csv", np.arange(30) % 2)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- results


def test_noise_holds_chance_perfect_features_are_one_and_the_same_twice_differ_by_nothing(tmp_path, capsys):
    rng = np.random.default_rng(1)
    labels = np.arange(40) % 2
    noise = rng.normal(size=(40, 5))
    write_cases(tmp_path / "noise.csv", noise)
    write_cases(tmp_path / "again.csv", noise[::-1], names=[f"c{i:02d}" for i in range(40)][::-1])
    write_cases(tmp_path / "perfect.csv", labels[:, None] * 10 + 0.1 * rng.normal(size=(40, 2)))
    write_labels(tmp_path / "labels.csv", labels)
    found = evaluate(tmp_path, features=["noise.csv", "again.csv", "perfect.csv"])
    for protocol in ("knn", "logistic"):
        auc = {name: one["metrics"][protocol]["auc"] for name, one in found["tables"].items()}
        assert auc["perfect"] == {"value": 1, "interval": [1, 1]}
        assert auc["noise"]["interval"][0] < 0.5 < auc["noise"]["interval"][1]
        assert auc["noise"] == auc["again"]
    for pair in found["differences"]:
        if {pair["one"], pair["other"]} == {"noise", "again"}:
            assert pair["value"] == 0 and pair["interval"] == [0, 0] and pair["p"] == 1 and not pair["shown"]
    main = [pair for pair in found["differences"] if pair["metric"] == "auc" and pair["other"] == "perfect"]
    assert len(main) == 4 and all(pair["shown"] and pair["verdict"] == "shown: perfect is higher" for pair in main)
    out = capsys.readouterr().out
    before, after = out.split("AUC, knn", 1)
    assert (
        "40 patients, 20 with label 1 and 20 without: the 95 % interval of an AUC of 0.8 is about 0.8 ± 0.14" in before
    )
    assert "noise minus again: not shown: the interval holds 0" in after


def test_labels_in_other_order_are_noise(tmp_path):
    """A permutation of the labels takes what perfect features tell."""
    labels = np.arange(40) % 2
    write_cases(tmp_path / "a.csv", labels[:, None] + 0.1 * np.random.default_rng(0).normal(size=(40, 3)))
    write_labels(tmp_path / "labels.csv", np.random.default_rng(1).permutation(labels))
    auc = evaluate(tmp_path, "--curves", "off", features=["a.csv"])["tables"]["a"]["metrics"]["logistic"]["auc"]
    assert auc["interval"][0] < 0.5 < auc["interval"][1]


def test_results_stand_alike_in_every_file(noise):
    found = evaluate(noise)
    out = noise / "out"
    tables = {path.stem: list(csv.DictReader(open(path, newline=""))) for path in out.glob("*.csv")}
    assert sorted(tables) == ["curves", "differences", "metrics", "predictions"]
    assert len(tables["metrics"]) == 2 * 2 * 9 and len(tables["differences"]) == 2 * 9
    for row in tables["metrics"]:
        record = found["tables"][row["table"]]["metrics"][row["protocol"]][row["metric"]]
        assert [float(row[key]) for key in ("value", "low", "high")] == [record["value"], *record["interval"]]
        assert record["interval"][0] <= record["value"] <= record["interval"][1], row
    assert {(row["kind"], row["size"]) for row in tables["curves"]} == {
        *(("shots", size) for size in ("1", "5", "10")),
        *(("share", size) for size in ("0.1", "0.25", "0.5", "1.0")),
    }
    assert len(tables["predictions"]) == 2 * 2 * 30
    for row in tables["predictions"]:
        assert float(row["probability_0"]) + float(row["probability_1"]) == pytest.approx(1)
    parsed = Parsed((out / "report.html").read_text(encoding="utf-8"))
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("img") == 6 and "script" not in tags and "link" not in tags
    shown = " ".join(parsed.texts)
    assert "not shown" in parsed.texts and "Hanley and McNeil 1982" in shown and "Few-shot curve" in shown


def test_the_same_command_gives_the_same_figures(noise):
    first, second = evaluate(noise), evaluate(noise)
    assert first["tables"] == second["tables"] and first["differences"] == second["differences"]
    other = evaluate(noise, "--seed", "1")
    assert other["tables"] != first["tables"]


def test_a_group_is_the_mean_of_its_tables(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 2
    for name in ("mine", "mine.random0", "mine.random1", "mine.random2"):
        write_cases(tmp_path / f"{name}.csv", rng.normal(size=(30, 3)) + 2 * labels[:, None] * (name == "mine"))
    write_labels(tmp_path / "labels.csv", labels)
    found = evaluate(tmp_path, "--curves", "off", "--group", str(tmp_path / "mine.random*.csv"), features=["mine.csv"])
    group = found["tables"]["mean of 3: mine.random*.csv"]
    assert group["members"] == ["mine.random0", "mine.random1", "mine.random2"]
    for protocol in ("knn", "logistic"):
        values = [found["tables"][one]["metrics"][protocol]["auc"]["value"] for one in group["members"]]
        assert group["metrics"][protocol]["auc"]["value"] == pytest.approx(np.mean(values))
        (pair,) = (p for p in found["differences"] if (p["protocol"], p["metric"]) == (protocol, "auc"))
        mine = found["tables"]["mine"]["metrics"][protocol]["auc"]["value"]
        assert pair["value"] == pytest.approx(mine - np.mean(values)) and pair["shown"]


def test_groups_of_one_pattern_in_two_folders(tmp_path):
    """Each has its own name, figures and difference, as two tables of one name have."""
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 2
    patterns = [str(tmp_path / folder / "random*.csv") for folder in "ab"]
    for folder, name in itertools.product("ab", ("random0", "random1")):
        (tmp_path / folder).mkdir(exist_ok=True)
        features = rng.normal(size=(30, 3)) + 2 * labels[:, None] * (folder == "a")
        write_cases(tmp_path / folder / f"{name}.csv", features)
    write_labels(tmp_path / "labels.csv", labels)
    write_cases(tmp_path / "mine.csv", rng.normal(size=(30, 3)))
    found = evaluate(tmp_path, "--curves", "off", "--group", *patterns, features=["mine.csv"])
    names = [f"mean of 2: {pattern}" for pattern in patterns]
    groups = {name: one for name, one in found["tables"].items() if one.get("members")}
    assert list(groups) == names
    auc = [groups[name]["metrics"]["logistic"]["auc"]["value"] for name in names]
    (pair,) = (
        p
        for p in found["differences"]
        if [p["one"], p["other"], p["protocol"], p["metric"]] == [*names, "logistic", "auc"]
    )
    assert pair["value"] == pytest.approx(auc[0] - auc[1]) and pair["value"] > 0.2
    write_cases(tmp_path / "mean of 2: [ab]*.csv.csv", rng.normal(size=(30, 3)))
    for name in "ab":
        write_cases(tmp_path / f"{name}.csv", rng.normal(size=(30, 3)))
    with pytest.raises(UserError, match=r"two would be called mean of 2: \[ab\]\*.csv in the results: rename"):
        evaluate(tmp_path, "--group", str(tmp_path / "[ab]*.csv"), features=["mean of 2: [ab]*.csv.csv"])


def test_more_than_two_classes_and_values(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(45) % 3
    write_cases(tmp_path / "a.csv", rng.normal(size=(45, 4)) + 3 * np.eye(3, 4)[labels])
    write_labels(tmp_path / "labels.csv", [("benign", "malignant", "unsure")[k] for k in labels])
    found = evaluate(tmp_path, "--curves", "off", features=["a.csv"])
    assert found["classes"] == ["benign", "malignant", "unsure"]
    assert found["tables"]["a"]["metrics"]["logistic"]["auc"]["value"] > 0.9
    assert found["tables"]["a"]["metrics"]["logistic"]["accuracy"]["value"] > 0.7
    write_labels(tmp_path / "values.csv", 0.5 + labels + 0.1 * rng.normal(size=45))
    found = evaluate(tmp_path, features=["a.csv"], labels="values.csv")
    metrics = found["tables"]["a"]["metrics"]["ridge"]
    assert found["task"] == "regression" and sorted(metrics) == ["mae", "r2", "spearman"]
    assert metrics["r2"]["value"] > 0.5 and metrics["spearman"]["value"] > 0.7 and metrics["mae"]["value"] < 0.6
    write_labels(tmp_path / "whole.csv", labels + 1)
    with pytest.raises(UserError, match="may be classes or values: give --task classification or --task regression"):
        evaluate(tmp_path, features=["a.csv"], labels="whole.csv")
    found = evaluate(tmp_path, "--curves", "off", "--task", "regression", features=["a.csv"], labels="whole.csv")
    assert found["task"] == "regression"


def test_intervals_hold_the_repeats_and_are_those_of_patients():
    """Two equal cases of each patient: intervals as of one, not narrower."""
    rng = np.random.default_rng(0)
    labels, features = np.arange(60) % 2, rng.normal(size=(60, 3))
    features[:, 0] += labels
    widths = []
    for cases in (1, 2):
        patients = [f"{i:02d}" for i in range(60) for _ in range(cases)]
        target = encode_labels([str(k) for k in labels.repeat(cases)], "auto", None)
        plan = comparison.make_plan(target, patients, 5, 2, 1000, 0, curves=False)
        measured = comparison.measure("a", features.repeat(cases, 0), plan)
        low, high = comparison.bootstrap_of(measured.metrics["logistic"]["auc"], 1000).interval()
        widths.append(high - low)
    assert 0.85 < widths[1] / widths[0] < 1.2


def test_roc_curves_have_scikit_learns_area():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    target = encode_labels([str(k) for k in labels], "auto", None)
    plan = comparison.make_plan(target, [str(i) for i in range(40)], 5, 2, 1, 0, curves=False)
    measured = comparison.measure("a", rng.normal(size=(40, 3)) + labels[:, None], plan)
    for ax, repeats in zip(feature_report._roc_figure([measured], plan).axes, measured.predictions.values()):
        x, y = ax.lines[0].get_data()
        expected = np.mean([roc_auc_score(labels, repeat.values[:, 1]) for repeat in repeats])
        assert np.trapezoid(y, x) == pytest.approx(expected, abs=0.003)  # in steps of 0.005


def test_a_difference_is_shown_only_if_it_stands_after_holm():
    rng = np.random.default_rng(0)
    target = encode_labels([str(i % 2) for i in range(40)], "auto", None)
    plan = comparison.make_plan(target, [str(i) for i in range(40)], 3, 1, 1000, 0, curves=False)
    tables = [comparison.measure(str(k), rng.normal(size=(40, 2)), plan) for k in range(6)]
    pairs = [pair for pair in comparison.differences(tables, plan) if pair.metric == "auc"]
    assert len(pairs) == 30
    for pair in pairs:
        outside = not pair.interval[0] <= 0 <= pair.interval[1]
        assert pair.shown == (outside and pair.p_holm < 0.05) and pair.p_holm >= pair.p
    alone = [pair for pair in pairs if not pair.interval[0] <= 0 <= pair.interval[1] and not pair.shown]
    assert alone and "after Holm's adjustment for 30 comparisons" in comparison.verdict(alone[0], 30)


# ----------------------------------------------------------------------------------------------------- forms of tables


@pytest.mark.parametrize("form", [".csv", ".npz", ".h5", ""])
@pytest.mark.parametrize("points", [False, True])
def test_every_form_that_extraction_writes(tmp_path, form, points):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 3)).astype(np.float32)
    features[2] = np.nan
    names = ["s1", "s1", "bad", "s2", "s3", "s4"] if points else ["a", "b", "bad", "sub/d", "e", "f"]
    coords = np.round(rng.normal(size=(6, 3)) * 100, 3) if points else None
    table = FeatureTable(names, [f"p{i // 2}" for i in range(6)], ["", "", "no lung", "", "", ""], features, coords)
    path = tmp_path / f"table{form}"
    write_features(path, table)
    found = read_features(str(path), "table")
    order = [found.keys.index(key) for key in sorted(found.keys)]
    kept = [0, 1, 3, 4, 5]
    expected = sorted((names[i], *np.round(coords[i] * 100).tolist()) if points else (names[i],) for i in kept)
    assert [found.keys[i] for i in order] == expected
    wanted = {features[i].tobytes() for i in kept}
    assert {row.astype(np.float32).tobytes() for row in found.features} == wanted and len(found.features) == 5
    assert sorted(found.patients) == ["p0", "p0", "p1", "p2", "p2"]
    if not (points and not form):
        assert list(found.reasons.values()) == ["no lung"]

    header = ["seriesuid", *AXES] if points else ["name"]
    rows = [[names[i], *([] if coords is None else coords[i]), i % 2] for i in range(6)]
    labels = read_labels(write_csv(tmp_path / "labels.csv", [*header, "label"], rows), "label")
    cases = join([found], labels)
    assert sorted(cases.numbers) == kept and [table.patients[i] for i in cases.numbers] == cases.patients
    for number, row in zip(cases.numbers, cases.rows[0]):
        assert (found.features[row].astype(np.float32) == features[number]).all()


def test_tables_from_elsewhere(tmp_path):
    """Semicolons, other names of columns, arrays with names in the plural."""
    (tmp_path / "a.csv").write_text("file;f1;f2\nx;1;2\ny;3;5\n")
    found = read_features(str(tmp_path / "a.csv"), "a", name_column="file")
    assert found.columns == ["f1", "f2"] and found.features.tolist() == [[1, 2], [3, 5]] and found.patients is None
    (tmp_path / "A.csv").write_text("Name,Patient,f1,f2\nx,p,1,2\ny,q,3,5\n")
    found = read_features(str(tmp_path / "A.csv"), "A")
    assert found.columns == ["f1", "f2"] and found.patients == ["p", "q"]
    (tmp_path / "b.csv").write_text("name,label,age,e0,e1\nx,0,50,1,2\ny,1,60,3,5\n")
    found = read_features(str(tmp_path / "b.csv"), "b", feature_columns=["e*"])
    assert found.columns == ["e0", "e1"]
    np.savez(tmp_path / "c.npz", names=np.array(["x", "y"]), features=np.eye(2))
    assert read_features(str(tmp_path / "c.npz"), "c").keys == [("x",), ("y",)]
    (tmp_path / "d").mkdir()
    for name in "xy":
        with h5py.File(tmp_path / "d" / f"{name}.h5", "w") as file:
            file["y_hat"] = np.ones((1, 3)) * ord(name)
    assert read_features(str(tmp_path / "d"), "d").keys == [("x",), ("y",)]


def test_ours_and_others_in_one_command(noise):
    """--name_column and --feature_columns are for the table that has such columns."""
    rng = np.random.default_rng(5)
    rows = [[f"c{i:02d}", i % 7, *rng.normal(size=2)] for i in range(30)]
    write_csv(noise / "other.csv", ["file", "age", "emb0", "emb1"], rows)
    flags = ["--curves", "off", "--name_column", "file", "--feature_columns", "emb*"]
    found = evaluate(noise, *flags, features=["a.csv", "other.csv"])
    assert list(found["tables"]) == ["a", "other"]
    with pytest.raises(UserError, match="other.csv: has no column agee of --feature_columns: did you mean age?"):
        evaluate(noise, *flags, "agee", features=["a.csv", "other.csv"])
    with pytest.raises(UserError, match="--feature_columns names file too"):
        evaluate(noise, *flags, "file", features=["a.csv", "other.csv"])


def test_a_further_column_of_ours_is_said_and_not_taken(tmp_path):
    (tmp_path / "a.csv").write_text("name,feature_0,feature_1,label\nx,1,2,0\ny,3,5,1\n")
    found = read_features(str(tmp_path / "a.csv"), "a")
    assert found.columns == ["feature_0", "feature_1"]
    assert found.notices == [f"{tmp_path / 'a.csv'}: no features: column label"]


def test_only_shared_cases_count_and_what_is_left_out_is_said(noise, capsys):
    rows = list(csv.reader(open(noise / "b.csv")))
    write_csv(noise / "b.csv", rows[0], [*rows[1:25], ["stray", 1, 2, 3, 4]])
    labels = list(csv.reader(open(noise / "labels.csv")))
    labels[1][1] = ""
    write_csv(noise / "labels.csv", labels[0], labels[1:])
    found = evaluate(noise, "--curves", "off")
    assert found["cases"] == 23
    out = capsys.readouterr().out
    assert "b.csv: 2 of 25 cases have no label" in out and "has no features of 6 of 29 labelled cases" in out
    assert "cases that have no label and are left out: 1" in out
    assert "23 cases have a label and features in every table" in out
    assert "each case is taken for a patient of its own" in out


def test_labels_of_crop_folders(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"subset{i % 2}/label{i % 2}/p{i // 2}/crop{i}" for i in range(24)]
    for name in names:
        path = tmp_path / "crops" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    write_cases(tmp_path / "a.csv", rng.normal(size=(24, 3)), names)
    write_cases(tmp_path / "b.csv", rng.normal(size=(24, 3)), [name.rpartition("/")[2] for name in names])
    found = evaluate(tmp_path, "--curves", "off", labels="crops")
    assert found["cases"] == 24 and found["patients"] == 12 and found["classes"] == ["0", "1"]


def test_positive_label():
    target = encode_labels(["malignant", "benign", "benign"], "auto", None)
    assert target.classes == ["benign", "malignant"] and target.y.tolist() == [1, 0, 0]
    target = encode_labels(["malignant", "benign", "benign"], "auto", "benign")
    assert target.classes == ["malignant", "benign"] and target.y.tolist() == [0, 1, 1]
    assert encode_labels(["1.0", "0", "1"], "auto", None).y.tolist() == [1, 0, 1]
    with pytest.raises(UserError, match="--positive maybe: expected one of two labels"):
        encode_labels(["malignant", "benign"], "auto", "maybe")


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no cases"),
        ("name,feature_0\n", "holds no cases, only a header"),
        ("case_name,feature_0\nx,1\n", "has no column name"),
        ("name,feature_0\nx,1\nx,2\n", "x stands 2 times"),
        ("name,feature_0\nx,1\n,2\n", "case 2 has no name"),
        ("name,feature_0,feature_1\nx,1,2\ny,1\n", "line 3 has 2 cells, the header 3"),
        ("name,feature_0,feature_0\nx,1,2\n", "has 2 columns feature_0"),
        ("name,feature_0,feature_2\nx,1,2\n", "are not feature_0 to feature_1"),
        ("name,feature_0\nx,nan\ny,1\n", "feature_0 of x is nan"),
        ("name,feature_0\nx,inf\ny,1\n", "feature_0 of x is inf"),
        ("name,feature_0\nx,1e200\ny,1\n", "feature_0 of x is 1e\\+200"),
        ("name,feature_0\nx\0,1\nx\0,2\n", "x.x00 stands 2 times"),
        ("name,coordX,coordY,coordZ,feature_0\nx,1,nan,2,1\ny,1,2,3,2\n", "the place of x is not finite"),
        ("name;feature_0\nx;1,5\n", "column feature_0 holds '1,5' in line 2, expected a number with a decimal point"),
        ("name,feature_0\nx,three\n", "column feature_0 holds 'three' in line 2"),
        ("name,feature_0\nx,1_0\n", "column feature_0 holds '1_0' in line 2"),
        ("name,feature_0\nx,10000.000\ny,10000.001\n", "all 2 cases have the same features, to six digits"),
        ("n\0a\0m\0e\0,\0f\0", "is UTF-16 or no text"),
        ("name,feature_0\nx,\ny,1\n", "column feature_0 is empty in line 2"),
        ("name,reason,feature_0\nx,no lung,\n", "no case with features .all 1 have a reason, such as: no lung"),
        ("name,feature_0\nx,1\ny,1\n", "all 2 cases have the same features"),
        ("name,patient,feature_0\nx,p,1\ny,,2\n", "the patient of y is empty"),
        ("name,label,f0\nx,0,1\n", "column label may be a label, an index or a place"),
        ("name,malignancy,f0\nx,0,1\n", "column malignancy may be"),
        (",name,f0\n0,x,1\n1,y,2\n", "column .without a name. may be"),
        ("name,x,y,z,f0\nx,0,1,2,3\n", "column x, y, z may be"),
        ("name,number,f0\nx,7,1\ny,8,2\nz,9,1\n", "column number counts the rows"),
        ("name,sex,f0\nx,F,1\n", "column sex holds 'F'"),
        ("name\nx\n", "has no column of features"),
    ],
)
def test_bad_tables_of_features(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_features(str(tmp_path / "a.csv"), "a")
    assert str(tmp_path / "a.csv") in str(error.value) and "\n" not in str(error.value)


def test_bad_arrays(tmp_path):
    names, features = np.array(["x", "y"]), np.eye(2)
    for arrays, message in [
        ({"features": features}, "holds no array name"),
        ({"name": names}, "holds no array features"),
        ({"name": names.astype(object), "features": features}, "holds Python objects, which may run code"),
        ({"name": names, "features": features[0]}, "of shape \\(2,\\), expected numbers of shape"),
        ({"name": names, "features": features.astype(str)}, "its features are <U"),
        ({"name": names, "names": names[::-1], "features": features}, "holds name and names, expected one"),
        ({"name": names[:1], "features": features}, "its name has shape \\(1,\\)"),
        ({"name": names, "features": features, "coord": features}, "its coord has shape"),
    ]:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=message):
            read_features(str(tmp_path / "a.npz"), "a")
    for name in ("a.npz", "a.h5", "a.txt", "missing.csv"):
        (tmp_path / name).write_bytes(b"damaged") if name != "missing.csv" else None
        with pytest.raises(UserError, match="can't be read|no such"):
            read_features(str(tmp_path / name), "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="holds no .h5 files"):
        read_features(str(tmp_path / "folder"), "a")
    for name, width in (("x", 3), ("y", 4)):
        with h5py.File(tmp_path / "folder" / f"{name}.h5", "w") as file:
            file["y_hat"] = np.ones(width)
    with pytest.raises(UserError, match="y.h5 has 4 features, x.h5 3"):
        read_features(str(tmp_path / "folder"), "a")


@pytest.mark.parametrize(
    "labels, message",
    [
        ("name,label\nother,1\n", "none of its 30 names is in .*: found c00, expected names such as other"),
        ("name,class\nc00,1\n", "has no column label"),
        ("case_id,label\nc00,1\n", "has no column name"),
        ("name,label\nc00,\nc01,nan\n", "none of its 2 cases has a label"),
        ("name,label\nc00,1\nc00,0\n", "c00 stands 2 times"),
        ("name,label,patient\nc00,1,\n", "the patient of c00 is empty"),
        ("name,label,Patient ID\nc00,1,p\n", "has no column patient, but Patient ID: does it tell whose"),
        ("name,coordX,coordY,coordZ,label\nc00,1,2,inf,1\n", "a place is not finite"),
    ],
)
def test_bad_labels(noise, labels, message):
    (noise / "bad.csv").write_text(labels)
    with pytest.raises(UserError, match=message):
        evaluate(noise, labels="bad.csv")
    assert not (noise / "out").exists()


def test_labels_that_can_not_be_judged(noise):
    write_labels(noise / "one.csv", [1] * 30)
    with pytest.raises(UserError, match="all 30 cases have label 1: two classes are the least"):
        evaluate(noise, labels="one.csv")
    write_labels(noise / "rare.csv", [1] * 29 + [0])
    with pytest.raises(UserError, match="label 0 has cases of 1 patient, and --folds 3 takes as many"):
        evaluate(noise, labels="rare.csv")
    write_labels(noise / "owned.csv", np.arange(30) % 2, patient=["p", "q"] * 15)
    with pytest.raises(UserError, match="2 patients are too few"):
        evaluate(noise, labels="owned.csv")
    write_labels(noise / "infinite.csv", ["inf", *np.arange(29)])
    with pytest.raises(UserError, match="'inf' is no finite number"):
        evaluate(noise, "--task", "regression", labels="infinite.csv")
    write_labels(noise / "large.csv", [k * 1e300 + 0.5 for k in range(30)])
    with pytest.raises(UserError, match="2.9e.301 is too large"):
        evaluate(noise, labels="large.csv")
    with pytest.raises(UserError, match="2 different values: too few for --task regression"):
        evaluate(noise, "--task", "regression")


def test_labels_and_patients_that_differ_in_case_alone(noise, capsys):
    with pytest.raises(UserError, match="labels Benign, benign differ in upper and lower case alone"):
        encode_labels(["malignant", "benign", "Benign"], "auto", None)
    with pytest.raises(UserError, match="'1_0' is no finite number"):
        encode_labels(["1_0", "2", "3"], "regression", None)
    write_labels(noise / "labels.csv", np.arange(30) % 2, patient=["pP"[i % 2] + str(i // 2) for i in range(30)])
    assert evaluate(noise, "--curves", "off")["patients"] == 30
    assert (
        "15 patients differ from another one in upper and lower case alone, such as P0 and p0, and are"
        in capsys.readouterr().out
    )


def test_names_that_mean_something_to_matplotlib(noise):
    """Formulas between $, and a leading underscore: all stand in the report and in the legends as they are."""
    names = ["$x_$.csv", "_hidden.csv"]
    for name, old in zip(names, "ab"):
        (noise / f"{old}.csv").rename(noise / name)
    write_labels(noise / "labels.csv", np.where(np.arange(30) % 2, "$y_$", "<i>n</i>"))
    found = evaluate(noise, features=names)
    assert list(found["tables"]) == ["$x_$", "_hidden"]
    figure = feature_report._figure(1, 2)[0]
    for name in found["tables"]:
        figure.axes[0].plot([0, 1], label=feature_report._in_figure(name))
    shown = figure.axes[0].legend().get_texts()
    assert [text.get_text() for text in shown] == [r"\$x_\$", " _hidden"]
    figure.canvas.draw()


def test_results_replace_no_table_that_is_read(noise):
    (noise / "out").mkdir()
    (noise / "b.csv").rename(noise / "out" / "predictions.csv")
    before = (noise / "out" / "predictions.csv").read_bytes()
    with pytest.raises(UserError, match="predictions.csv is read here and would be replaced"):
        evaluate(noise, features=["a.csv", "out/predictions.csv"])
    (noise / "labels.csv").rename(noise / "out" / "metrics.csv")
    with pytest.raises(UserError, match="metrics.csv is read here and would be replaced"):
        evaluate(noise, features=["a.csv"], labels="out/metrics.csv")
    assert (noise / "out" / "predictions.csv").read_bytes() == before and len(list((noise / "out").iterdir())) == 2
    (noise / "out" / "metrics.csv").rename(noise / "labels.csv")
    (noise / "out" / "report.html").mkdir()
    with pytest.raises(UserError, match="report.html is a folder"):
        evaluate(noise, features=["a.csv"])


def test_a_column_that_sorts_the_cases_by_their_label(tmp_path):
    """Volume in other units, say, where the label is a threshold of it, or the volume itself; not where chance may."""
    rng = np.random.default_rng(0)
    volume = rng.lognormal(size=30)
    for labels, flags in (((volume > 1).astype(int), []), (volume, ["--task", "regression"])):
        write_labels(tmp_path / "labels.csv", labels)
        for sign in (-1, 1):
            write_cases(
                tmp_path / "a.csv", np.column_stack([rng.normal(size=30), sign * volume**3 + 7]), columns=["f", "ml"]
            )
            with pytest.raises(UserError, match="column ml tells the label of every case"):
                evaluate(tmp_path, *flags, features=["a.csv"])
    write_labels(tmp_path / "labels.csv", np.arange(30) < 4)  # 4 of 30: so easily met by chance that it may stand
    write_cases(
        tmp_path / "a.csv",
        np.column_stack([rng.normal(size=30), rng.normal(size=30) + 9 * (np.arange(30) < 4)]),
        columns=["f", "g"],
    )
    assert evaluate(tmp_path, "--curves", "off", features=["a.csv"])["cases"] == 30


def test_the_console_compares_the_first_table_and_files_all(noise, capsys):
    rng = np.random.default_rng(1)
    for name in "cdef":
        write_cases(noise / f"{name}.csv", rng.normal(size=(30, 2)))
    found = evaluate(
        noise, "--curves", "off", "--group", str(noise / "[ef].csv"), features=[f"{n}.csv" for n in "bacd"]
    )
    lines = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines() if " minus " in line]
    others = ["a", "c", "d", "mean of 2: [ef].csv"]
    assert [line.split(": ")[0] for line in lines] == [f"b minus {name}".split(": ")[0] for name in others] * 2
    pairs = [pair for pair in found["differences"] if pair["metric"] == "auc"]
    assert len(pairs) == 20 and {pair["one"] for pair in pairs} == {"b", "a", "c", "d"}
    assert sum(row["metric"] == "auc" for row in csv.DictReader(open(noise / "out" / "differences.csv"))) == 20


def test_too_few_draws_for_so_many_tables(noise, capsys):
    """Perfect features against noise: the notice names as many draws as it takes, and not one more."""
    for name in "cde":
        write_cases(noise / f"{name}.csv", np.random.default_rng(ord(name)).normal(size=(30, 2)))
    write_cases(noise / "a.csv", np.arange(30)[:, None] % 2 + np.random.default_rng(0).normal(0, 0.01, (30, 2)))
    tables = [f"{name}.csv" for name in "abcde"]  # 20 comparisons
    for draws in (400, 401):
        found = evaluate(noise, "--curves", "off", "--draws", str(draws), features=tables)
        said = f"20 comparisons of 5 tables and groups: with --draws {draws} none can be shown"
        assert (said in capsys.readouterr().out) == (draws == 400) == any(said in line for line in found["said"])
        assert any(pair["shown"] for pair in found["differences"] if pair["metric"] == "auc") == (draws == 401)
    evaluate(noise, "--curves", "off", "--group", str(noise / "[cde].csv"), features=["a.csv", "b.csv"])
    assert "none can be shown" not in capsys.readouterr().out  # 6 comparisons, 200 draws


def test_rows_in_another_order_are_the_same_cases(noise):
    rows = list(csv.reader(open(noise / "a.csv")))
    write_csv(noise / "b.csv", rows[0], [rows[1:][i] for i in np.random.default_rng(0).permutation(30)])
    found = evaluate(noise)
    assert found["tables"]["a"] == found["tables"]["b"]
    assert all(pair["value"] == 0 for pair in found["differences"])


def test_more_differences_than_fit_into_a_figure(noise, monkeypatch):
    """Seventy tables make a figure of 90,000 pixels, minutes of drawing; the table of the report holds all of them."""
    monkeypatch.setattr(feature_report, "MAX_BARS", 4)
    write_cases(noise / "c.csv", np.random.default_rng(1).normal(size=(30, 2)))
    evaluate(noise, "--curves", "off", features=["a.csv", "b.csv", "c.csv"])
    page = (noise / "out" / "report.html").read_text()
    assert "those of a alone, the table above has all 6" in page and page.count("<td>b</td><td>c</td>") == 2
    evaluate(noise, "--curves", "off")
    assert "those of a alone" not in (noise / "out" / "report.html").read_text()


def test_a_column_that_is_the_label_under_another_name(tmp_path):
    labels = np.arange(30) % 2
    features = np.column_stack([np.random.default_rng(0).normal(size=30), labels])
    write_cases(tmp_path / "a.csv", features, columns=["f", "grade"])
    write_labels(tmp_path / "labels.csv", labels)
    with pytest.raises(UserError, match="column grade tells the label of every case"):
        evaluate(tmp_path, features=["a.csv"])
    assert evaluate(tmp_path, "--curves", "off", "--feature_columns", "f", "grade", features=["a.csv"])["cases"] == 30


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--positive", "1", "--task", "regression"], "--positive 1: is for two classes, not for --task regression"),
        (["--folds", "1"], "--folds"),
        (["--draws", "10"], "--draws"),
        (["--task", "regress"], "did you mean regression"),
    ],
)
def test_flags_that_are_wrong_by_themselves(tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit) as ending:
        evaluate(tmp_path, *flags)
    assert ending.value.code == 2 and message in capsys.readouterr().err


def test_flags_that_nothing_is_there_for(noise):
    np.savez(noise / "a.npz", name=np.array(["c00"]), features=np.eye(1))
    with pytest.raises(UserError, match="--feature_columns: is for CSVs, and --features names none"):
        evaluate(noise, "--feature_columns", "f*", features=["a.npz"])
    (noise / "crops").mkdir()
    with pytest.raises(UserError, match="--label_column grade: is for a CSV, and --labels .* is a folder"):
        evaluate(noise, "--label_column", "grade", labels="crops")


def test_tables_that_are_given_twice_or_not_there(noise):
    with pytest.raises(UserError, match="is the same table as"):
        evaluate(noise, features=["a.csv", "../" + noise.name + "/a.csv"])
    with pytest.raises(UserError, match="no file has such a name"):
        evaluate(noise, features=["z*.csv"])
    with pytest.raises(UserError, match="means one table, and a group takes two"):
        evaluate(noise, "--group", str(noise / "b.csv"), features=["a.csv"])
    (noise / "run").mkdir()
    (noise / "run" / "a.csv").write_bytes((noise / "b.csv").read_bytes())
    found = evaluate(noise, "--curves", "off", features=["a.csv", "run/a.csv"])
    assert list(found["tables"]) == [str(noise / "a.csv"), str(noise / "run" / "a.csv")]


def test_tables_that_group_cases_to_other_patients(noise):
    for name, size in (("a", 2), ("b", 3)):
        rows = list(csv.reader(open(noise / f"{name}.csv")))
        rows = [["patient", *rows[0]], *([f"p{i // size}", *row] for i, row in enumerate(rows[1:]))]
        write_csv(noise / f"{name}.csv", rows[0], rows[1:])
    with pytest.raises(UserError, match="groups the cases to other patients than"):
        evaluate(noise)
    write_labels(noise / "labels.csv", np.arange(30) % 2, patient=[f"q{i // 2}" for i in range(30)])
    assert evaluate(noise, "--curves", "off")["patients"] == 15


@pytest.fixture
def repeated(tmp_path):
    """(features, labels, patients, names) of 30 patients with 4 scans each, which are alike; labels are random."""
    rng = np.random.default_rng(3)
    patients = np.repeat([f"p{i:02d}" for i in range(30)], 4)
    features = np.repeat(rng.normal(size=(30, 6)), 4, axis=0) + 0.05 * rng.normal(size=(120, 6))
    labels, names = np.repeat(rng.permutation(30) % 2, 4), [f"s{i:03d}" for i in rng.permutation(120)]
    for column in ("patient", "patient_id"):
        rows = zip(names, labels, patients)
        write_csv(tmp_path / f"{column}.csv", ["name", "label", column], rows)
    write_csv(tmp_path / "neither.csv", ["name", "label"], zip(names, labels))
    return features, labels, patients, names


def write_patients(path, features, names, patients):
    write_features(path, FeatureTable(names, list(patients), [""] * len(names), features.astype(np.float32)))
    return read_features(str(path), path.stem)


@pytest.mark.parametrize("form", ["t.csv", "t.npz", "t.h5", "folder"])
def test_patients_that_are_the_names_again_are_none(tmp_path, repeated, form):
    """As extract_features.py writes them where nothing tells whose a scan is."""
    features, _, patients, names = repeated
    tables = [write_patients(tmp_path / form, features, names, names)]
    cases = join(tables, read_labels(str(tmp_path / "neither.csv"), "label"))
    assert cases.patients == cases.names
    assert len(cases.notices) == 1 and "each case is taken for a patient of its own" in cases.notices[0]
    with pytest.raises(UserError, match="but patient_id, and .* knows 120 of 120 cases by their own names alone"):
        join(tables, read_labels(str(tmp_path / "patient_id.csv"), "label"))
    cases = join(tables, read_labels(str(tmp_path / "patient.csv"), "label"))
    assert dict(zip(cases.names, cases.patients)) == dict(zip(names, patients)) and not cases.notices


def test_scans_of_one_patient_are_no_evidence(tmp_path, repeated, capsys):
    """Each of its own, the nearest is the patient's other scan; by patient it is chance. So in scikit-learn's folds."""
    features, labels, patients, names = repeated
    write_patients(tmp_path / "a.csv", features, names, names)
    auc = {}
    for column, folds in (("neither", KFold(5, shuffle=True, random_state=0)), ("patient", GroupKFold(5))):
        found = evaluate(tmp_path, "--curves", "off", features=["a.csv"], labels=f"{column}.csv")
        ours = found["tables"]["a"]["metrics"]["knn"]["auc"]["value"]
        nearest, groups = KNeighborsClassifier(3, metric="cosine"), patients if column == "patient" else None
        told = cross_val_predict(nearest, features, labels, groups=groups, cv=folds, method="predict_proba")[:, 1]
        auc[column] = ours, roc_auc_score(labels, told)
        assert found["patients"] == {"neither": 120, "patient": 30}[column]
        assert ("for a patient of its own" in capsys.readouterr().out) == (column == "neither")
    assert min(auc["neither"]) > 0.95 and max(auc["patient"]) < 0.65, auc


def test_tables_that_know_some_patients(tmp_path, repeated):
    features, _, patients, names = repeated
    some = [*patients[:80], *names[80:]]
    tables = [write_patients(tmp_path / "some.csv", features, names, some)]
    neither, maybe = (read_labels(str(tmp_path / f"{one}.csv"), "label") for one in ("neither", "patient_id"))
    cases = join(tables, neither)
    assert dict(zip(cases.names, cases.patients)) == dict(zip(names, some))
    assert len(cases.notices) == 1 and "the patient of 40 of 120 cases is but their own name" in cases.notices[0]
    with pytest.raises(UserError, match="but patient_id, and .*some.csv knows 40 of 120 cases by their own names"):
        join(tables, maybe)
    none = write_patients(tmp_path / "none.csv", features, names, names)
    full = write_patients(tmp_path / "full.csv", features, names, patients)
    for labels in (neither, maybe):  # the first table that knows any is taken
        cases = join([none, full], labels)
        assert dict(zip(cases.names, cases.patients)) == dict(zip(names, patients)) and not cases.notices
    with pytest.raises(UserError, match="full.csv: groups the cases to other patients than .*some.csv"):
        join([*tables, full], neither)


def test_a_patient_who_is_called_as_one_of_the_scans_is_known(tmp_path):
    table = write_patients(tmp_path / "a.csv", np.eye(4), ["A", "A2", "B", "B2"], ["A", "A", "B", "B"])
    write_csv(tmp_path / "l.csv", ["name", "label", "mrn"], [[name, 1, 7] for name in ("A", "A2", "B", "B2")])
    cases = join([table], read_labels(str(tmp_path / "l.csv"), "label"))
    assert cases.patients == ["A", "A", "B", "B"] and not cases.notices


def test_points_of_a_scan_stay_together_where_no_patient_is_known(tmp_path):
    points = np.arange(12).reshape(4, 3)
    series = ["1.2", "1.2", "1.3", "1.3"]
    write_features(tmp_path / "a.npz", FeatureTable(series, series, [""] * 4, np.eye(4, dtype=np.float32), points))
    rows = [[name, *point, 1] for name, point in zip(series, points)]
    write_csv(tmp_path / "l.csv", ["seriesuid", *AXES, "label"], rows)
    labels = read_labels(str(tmp_path / "l.csv"), "label")
    cases = join([read_features(str(tmp_path / "a.npz"), "a")], labels)
    assert cases.patients == series and "each scan is taken for a patient of its own" in cases.notices[0]


def test_a_folder_that_can_not_be_written_to(noise):
    (noise / "out").write_text("a file")
    with pytest.raises(UserError, match="--output_dir .*out: can't be written to"):
        evaluate(noise)


def test_points_that_stand_several_times_count_once(noise, capsys):
    """As in LUNA16's tables, where two readers marked one place; with other figures or labels they are refused."""
    for name in ("a.csv", "labels.csv"):
        lines = (noise / name).read_text().splitlines()
        (noise / f"more_{name}").write_text("\n".join([*lines, lines[3], lines[3], lines[7]]) + "\n")
    once = evaluate(noise, features=["a.csv"])
    capsys.readouterr()
    more = evaluate(noise, features=["more_a.csv"], labels="more_labels.csv")
    assert "3 rows repeat others to the last digit: each counts once" in capsys.readouterr().out
    assert [*once["tables"].values()] == [*more["tables"].values()]
