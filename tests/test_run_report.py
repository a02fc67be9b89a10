"""Calibrated runs of main_lnc_luna16.py from its command line, and the reports of both fine-tunings, read without a
browser: nothing is fetched or run, every picture opens, and the tables say what metrics.json says."""

import contextlib
import io
import json

import nibabel
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, confusion_matrix, log_loss
from test_main_lnc_luna16 import SMALL, TINY, check_metrics, metrics, run_main, write_cases
from test_report import check_report

import main_lnc_luna16
from dino3d.evaluation import statistics
from dino3d.evaluation.calibration import Calibration
from dino3d.files import read_table
from dino3d.finetune.classification_pictures import wilson_interval
from dino3d.finetune.run_report import cell_text, draw_learning_curves
from vision_transformer import ARCHITECTURES


@pytest.fixture(autouse=True)
def smaller_model(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", SMALL)
    monkeypatch.setattr(statistics, "BOOTSTRAP_ROUNDS", 50)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """48 patients with a crop each, a ball whose size tells the label apart, but not always."""
    folder, shape = tmp_path_factory.mktemp("calibrated"), (24, 24, 12)
    x, y, z = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    for patient in range(48):
        rng, label = np.random.default_rng(patient), int(patient % 3 == 0)
        voxels = np.where(np.sqrt(x**2 + y**2 + (2 * z) ** 2) < rng.normal(4 + 3 * label, 2), 50, -850)
        path = folder / "crops" / f"subset{patient % 3}" / f"label{label}" / f"p{patient:02}" / "crop.nii.gz"
        path.parent.mkdir(parents=True)
        voxels = (voxels + rng.normal(0, 60, shape)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.7, 0.7, 1.4, 1.0])), path)
    return folder


@pytest.fixture(scope="module")
def run(trained):
    """Folder, console lines and flags of a trained run."""
    out, printed = trained / "out", io.StringIO()
    flags = ["--data_dir", trained / "crops", "--output_dir", out, "--epochs", 3, "--num_test", 12, "--val_freq", 3]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(ARCHITECTURES, "vit_tiny", SMALL)
        patch.setattr(statistics, "BOOTSTRAP_ROUNDS", 50)
        main_lnc_luna16.main([*TINY, *map(str, flags)])
    return out, printed.getvalue(), flags


def columns(rows):
    return (np.array([float(row[name]) for row in rows]) for name in ("label", "probability", "uncalibrated"))


def test_the_probabilities_are_the_calibrated_ones(run):
    """predictions.csv by the formula from what stands beside them, and the figures from predictions.csv."""
    out, printed, _ = run
    said = check_metrics(out)
    fitted = 0
    for record in said["folds"]:
        rows = [row for row in read_table(out / "predictions.csv") if int(row["fold"]) == record["fold"]]
        label, p, before = columns(rows)
        offset = record["logit_offset"][1] - record["logit_offset"][0]
        logit = np.log(before / (1 - before)) / record["temperature"] + offset
        np.testing.assert_allclose(p, 1 / (1 + np.exp(-logit)), atol=1e-9)
        assert (np.argsort(p) == np.argsort(before)).all()
        assert record["brier"] == pytest.approx(brier_score_loss(label, p))
        assert record["brier_uncalibrated"] == pytest.approx(brier_score_loss(label, before))
        assert record["confusion_matrix"] == confusion_matrix(label, p >= record["threshold"]).tolist()
        best = torch.load(out / str(record["fold"]) / "best.pth", weights_only=True)["best"]
        assert best["temperature"] == record["temperature"] and best["threshold"] == record["threshold"]
        fitted += record["temperature"] != 1
    assert fitted == 2  # otherwise the draw has to be another
    together = said["all_folds"]
    assert together["brier_change"] == pytest.approx(together["brier"] - together["brier_uncalibrated"])
    (rejected, false), (missed, hit) = together["confusion_matrix"]
    assert together["sensitivity"] == pytest.approx(hit / (hit + missed))
    assert together["specificity"] == pytest.approx(rejected / (rejected + false))
    assert together["accuracy"] == pytest.approx((hit + rejected) / together["cases"])
    assert "temperature" in printed and max(map(len, printed.splitlines())) < 200


def test_the_temperature_is_validations_best(run, monkeypatch, capsys):
    """Validation cases that are predicted as new crops: no other temperature has a lower log loss on them."""
    out, _, flags = run
    crops = flags[1]
    split = json.loads((out / "splits.json").read_text())["splits"][0]
    record = metrics(out)["folds"][0]
    code, _, err = run_main(
        capsys,
        *("--predict", crops, "--weights", out / "0", "--output_dir", out.parent / "new", "--precision", "fp32"),
        tiny=[],
    )
    assert code == 0, err
    rows = [
        row
        for row in read_table(out.parent / "new" / "predictions.csv")
        if row["case"].split("/")[-2] in split["validation"]
    ]
    assert len(rows) >= 12
    label = np.array(["label1" in row["case"] for row in rows])
    p = np.array([float(row["probability"]) for row in rows])
    offset = record["logit_offset"][1] - record["logit_offset"][0]
    logit = (np.log(p / (1 - p)) - offset) * record["temperature"]  # before calibration

    def loss(log_temperature):
        return log_loss(label, 1 / (1 + np.exp(-logit / np.exp(log_temperature) - offset)))

    best = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
    assert record["temperature"] == pytest.approx(np.exp(best.x), rel=1e-3)
    tested = {row["case"]: row for row in read_table(out / "0" / "predictions.csv")}
    new = {row["case"]: row for row in read_table(out.parent / "new" / "predictions.csv")}
    for case, row in tested.items():  # the same crop, the same probability
        assert float(new[case]["probability"]) == pytest.approx(float(row["probability"]), abs=1e-6)
        assert int(new[case]["predicted"]) == (float(row["probability"]) >= record["threshold"])


def test_older_folds_predict_as_before(run, tmp_path, capsys):
    """A best.pth that knows of no temperature: its own probabilities and threshold."""
    out, _, flags = run
    state = torch.load(out / "1" / "best.pth", weights_only=True)
    for name in Calibration._fields:
        del state["best"][name]
    state["best"]["threshold"] = 0.5
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "best.pth")
    code, said, err = run_main(
        capsys,
        "--predict",
        flags[1],
        "--weights",
        tmp_path / "old",
        "--output_dir",
        tmp_path / "new",
        tiny=["--precision", "fp32"],
    )
    assert code == 0 and "threshold 0.500" in said, err
    new = {row["case"]: float(row["probability"]) for row in read_table(tmp_path / "new" / "predictions.csv")}
    for row in read_table(out / "1" / "predictions.csv"):
        assert new[row["case"]] == pytest.approx(float(row["uncalibrated"]), abs=1e-6)


def test_the_report_of_a_classification(run, capsys):
    """It stands by itself, and a finished run that is started again writes the same once more."""
    out, _, flags = run
    parsed, pictures = check_report(out)
    assert len(pictures) == 5  # ROC and precision-recall, reliability, confusion, learning curves, errors
    for text in ("Errors", "vit_tiny, finetune", str(flags[1]), "none: trained from scratch"):
        assert text in parsed.texts
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    code, printed, err = run_main(capsys, *flags)
    assert code == 0 and "fold 1: done before" in printed, err
    assert (out / "report.html").read_bytes() == before


def test_a_run_that_an_older_version_tested_is_reported(run, capsys):
    """Without the new columns and figures: before and after are the same, and a note says why."""
    out, _, flags = run
    new = {"temperature", "logit_offset", "reliability", "confusion_matrix", "brier", "brier_uncalibrated"}
    new |= {"balanced_accuracy", "f1", "calibration_error", "calibration_error_uncalibrated"}
    kept = {path: path.read_bytes() for path in (out / "0" / "metrics.json", out / "0" / "predictions.csv")}
    record = json.loads((out / "0" / "metrics.json").read_text())
    (out / "0" / "metrics.json").write_text(json.dumps({name: record[name] for name in record if name not in new}))
    lines = (out / "0" / "predictions.csv").read_text().splitlines()
    (out / "0" / "predictions.csv").write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in lines))
    code, printed, err = run_main(capsys, *flags)
    assert code == 0 and "note: fold 0: tested by an older version: not calibrated" in printed, err
    said = metrics(out)["folds"][0]
    assert said["brier"] == said["brier_uncalibrated"] and said["temperature"] == 1 and said["auc"] == record["auc"]
    check_report(out)
    for path, content in kept.items():
        path.write_bytes(content)


def test_knn_is_calibrated_too(trained, tmp_path, capsys):
    flags = ["--data_dir", trained / "crops", "--output_dir", tmp_path, "--num_test", 12, "--protocol", "knn"]
    assert run_main(capsys, *flags)[0] == 0
    for record in check_metrics(tmp_path)["folds"]:
        label, p, before = columns(read_table(tmp_path / str(record["fold"]) / "predictions.csv"))
        assert ((p > 0) & (p < 1)).all() == (record["temperature"] != 1 or any(record["logit_offset"]))
        assert record["brier"] == pytest.approx(brier_score_loss(label, p))
    parsed, pictures = check_report(tmp_path)
    assert "Nothing was trained." in parsed.texts and len(pictures) == 4


def test_three_classes_are_reported(tmp_path, capsys):
    write_cases(tmp_path / "crops", patients=12, classes=3, shape=(24, 24, 12))
    flags = ["--data_dir", tmp_path / "crops", "--output_dir", tmp_path / "out", "--epochs", 1, "--num_test", 4]
    code, _, err = run_main(capsys, *flags)
    assert code == 0, err
    row = read_table(tmp_path / "out" / "predictions.csv")[0]
    for kind in ("probability", "uncalibrated"):
        assert sum(float(row[f"{kind}_{k}"]) for k in range(3)) == pytest.approx(1)
    assert np.shape(metrics(tmp_path / "out")["all_folds"]["confusion_matrix"]) == (3, 3)
    check_report(tmp_path / "out")


def test_learning_curves_show_what_the_log_says(tmp_path, monkeypatch):
    """Each fold's line, epochs that were not validated left out, a dot at the best epoch."""
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), savefig(figure, *a, **k)))
    log = [{"epoch": e, "step": e, "loss": 1 / e} for e in (1, 2, 3, 4)]
    log[1] |= {"validation_loss": 0.7, "validation_auc": 0.8}
    log[3] |= {"validation_loss": 0.6, "validation_auc": None}
    draw_learning_curves(tmp_path / "a.png", [log, log[:2]], [2, 2], "auc", "AUC")
    loss, validation, score = drawn[0].axes
    assert [line.get_xydata().tolist() for line in loss.lines[::2]] == [
        [[1, 1], [2, 0.5], [3, 1 / 3], [4, 0.25]],
        [[1, 1], [2, 0.5]],
    ]
    assert validation.lines[0].get_xydata().tolist() == [[2, 0.7], [4, 0.6]]
    assert score.lines[0].get_xydata().tolist() == [[2, 0.8]] == score.lines[1].get_xydata().tolist()


def test_names_that_look_like_numbers_stand_as_they_are():
    for name in ("10_002", "1e5", "nan", "0.5"):
        assert cell_text("case", name) == name
    assert (cell_text("dice", "0.5"), cell_text("hausdorff95_mm", ""), cell_text("fold", "1")) == ("0.500", "", "1")


def test_wilson_interval_is_the_solution_of_its_equation():
    """The shares from which the observed one is 1.96 standard errors away."""
    shares, counts = np.array([0.0, 0.3, 0.5, 1.0]), np.array([5, 20, 7, 12])
    for ends in wilson_interval(shares, counts):
        np.testing.assert_allclose((shares - ends) ** 2, 1.959964**2 * ends * (1 - ends) / counts, atol=1e-12)
