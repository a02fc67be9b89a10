"""report.html of a fine-tuning run, and the pictures in it: all from what the run has left in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino3d.command_line import format_values
from dino3d.evaluation.report import Report
from dino3d.evaluation.statistics import format_metric
from dino3d.files import atomic_write, read_json, read_log, read_table
from dino3d.finetune.classification_pictures import draw_confusion, draw_reliability
from dino3d.finetune.fold_folders import file_name
from dino3d.finetune.mask_metrics import MASK_METRICS
from dino3d.finetune.splits import Split, training_patients

PICTURED = 3  # worst cases of a segmentation whose overlays are shown, and the best one


def report_classification(output_dir: Path) -> None:
    """Draw reliability.png, confusion.png and learning_curves.png of a run of main_lnc_luna16.py; write report.html.

    The run's other files must be there: config.json, splits.json, metrics.json, curves.png, errors.png, the folds'.
    """
    found = read_json(output_dir / "metrics.json")
    together, classes = found["all_folds"], found["classes"]
    draw_reliability(output_dir / "reliability.png", together["reliability"], classes)
    draw_confusion(output_dir / "confusion.png", together["confusion_matrix"])
    report = start_report(output_dir, f"Classification of {found['cases']} cases", found)

    report.heading("Results")
    figures = {
        "AUC": "auc",
        "average precision": "average_precision",
        "accuracy": "accuracy",
        "balanced accuracy": "balanced_accuracy",
        "F1": "f1",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "Brier score before calibration": "brier_uncalibrated",
        "Brier score": "brier",
        "calibration error before calibration": "calibration_error_uncalibrated",
        "calibration error": "calibration_error",
        "change of the Brier score by calibration": "brier_change",
        "change of the calibration error": "calibration_error_change",
        "temperature": "temperature",
        "threshold": "threshold",
    }
    results_table(report, found, figures)
    report.text(
        "In brackets the 95 % interval by bootstrap over patients. All folds: each tested case once, with the mean of "
        "its folds' probabilities. The Brier score is the mean squared error of the probabilities, the calibration "
        "error the mean distance of predicted and observed shares; both are better the lower they are, and a change "
        "below 0 is an improvement.",
        "Calibration is a temperature, by which logits are divided, fitted on each fold's validation cases; with two "
        "classes, which training weighs alike, their frequencies are taken in as well. It changes no decision of a "
        "fold and, with two classes, neither the order of its cases nor its AUC.",
    )
    report.heading("Curves")
    report.image(output_dir / "curves.png", "ROC and precision-recall curves of the folds")
    report.image(
        output_dir / "reliability.png",
        "Reliability curve of all folds: points on the dotted line are probabilities that come true; above it more "
        "cases do than was said. Numbers: cases in a point; bars: what chance alone allows",
    )
    report.image(output_dir / "confusion.png", "Confusion matrix of all folds")
    show_learning_curves(report, output_dir, found["folds"], "auc", "AUC")
    report.heading("Errors")
    report.image(
        output_dir / "errors.png", "The errors farthest from their threshold, or with more classes most confident"
    )
    finish_report(report, output_dir, found)


def report_segmentation(output_dir: Path) -> None:
    """Draw learning_curves.png of a run of main_lts_msd.py, and write report.html.

    The run's other files must be there: config.json, splits.json, metrics.json, cases.csv, the folds' and overlays.
    """
    found, rows = read_json(output_dir / "metrics.json"), read_table(output_dir / "cases.csv")
    report = start_report(output_dir, f"Segmentation of {found['cases']} cases", found)
    report.heading("Results")
    figures = {
        "Dice": "dice",
        "surface Dice": "surface_dice",
        "95 % Hausdorff distance, mm": "hausdorff95_mm",
        "undefined Hausdorff distances": "undefined_hausdorff95",
        "lesions found": "lesions_found",
        "lesions missed": "lesions_missed",
        "lesions predicted": "lesions_predicted",
        "of those, false positives": "false_positives",
        "lesion-wise sensitivity": "lesion_sensitivity",
        "lesion-wise precision": "lesion_precision",
        "lesion-wise F1": "lesion_f1",
        "false positives per CT": "false_positives_per_ct",
    }
    results_table(report, found, figures)
    report.text(
        "In brackets the 95 % interval by bootstrap over patients, or cases where none are known. All folds: each "
        "tested case once, with the mean of its folds. A lesion is a connected component of a mask, however small; it "
        "is found, and a predicted one is true, where any voxel of the other mask lies in it."
    )
    show_learning_curves(report, output_dir, found["folds"], "dice", "Dice")
    report.heading("Cases, worst first")
    rows.sort(key=lambda row: float(row["dice"]))
    report.table(list(rows[0]), [[cell_text(*cell) for cell in row.items()] for row in rows])
    pictured = {(row["fold"], row["case"]): row["dice"] for row in [*rows[:PICTURED], rows[-1]]}
    for (fold, case), dice in pictured.items():
        overlay = output_dir / fold / "overlays" / f"{file_name(case)}.png"
        if overlay.is_file():
            report.image(
                overlay, f"{case}, fold {fold}, Dice {float(dice):.3f}: label green, prediction red, both yellow"
            )
    finish_report(report, output_dir, found)


def cell_text(column: str, text: str) -> str:
    """A cell of cases.csv: measures with three digits, and names, counts and what is undefined as they stand."""
    measured = text and column in (*MASK_METRICS, "volume_ml", "predicted_ml")
    return f"{float(text):.3f}" if measured else text


def start_report(output_dir: Path, title: str, found: dict[str, Any]) -> Report:
    """A Report that says what was run. found: metrics.json"""
    config, folds = read_json(output_dir / "config.json"), read_json(output_dir / "splits.json")
    splits = [Split(**split) for split in folds["splits"]]
    arguments = config["arguments"]
    report = Report(title)
    report.heading("What was run")
    patients = f" of {found['patients']} patients" if "patients" in found else ""
    report.table(
        ["what", "value"],
        [
            [
                "network",
                ", ".join(str(arguments[name]) for name in ("arch", "protocol", "decoder") if name in arguments),
            ],
            ["pre-trained weights", arguments["pretrained_weights"] or "none: trained from scratch"],
            ["CRC-32 of the weights", arguments["weights_crc32"] or "none"],
            ["data", arguments["data_dir"] or arguments.get("data_list") or ""],
            ["cases", f"{found['cases']}{patients}, {found['classes']} classes"],
            ["device", f"{config['world_size']} x {config['device']}, {arguments['precision']}"],
            ["git revision", config["git_revision"] or "unknown"],
        ],
    )
    report.heading("Folds")
    training = [
        f"{used} of {whole}" if folds["data"].get("label_fraction") else used
        for used, whole in training_patients(splits, folds["data"]["patients"])
    ]
    report.table(
        ["fold", *(f"{side} patients" for side in Split._fields), "best epoch", "tested cases"],
        [
            [k, train, len(split.validation), len(split.test), record["best_epoch"], record["cases"]]
            for k, (train, split, record) in enumerate(zip(training, splits, found["folds"]))
        ],
    )
    return report


def results_table(report: Report, found: dict[str, Any], figures: dict[str, str]) -> None:
    """A row for each figure: all folds together, mean and standard deviation, every fold. figures: {title: name}"""

    def cell(values: dict[str, Any], name: str) -> str:
        if name not in values:
            return ""
        value, interval = values[name], values.get(f"{name}_interval")
        ends = f" ({format_metric(interval[0])} to {format_metric(interval[1])})" if interval else ""
        return (str(value) if isinstance(value, int) else format_metric(value)) + ends

    def mean(name: str) -> str:
        deviation = found["sd"].get(name)
        return cell(found["mean"], name) + (f" ± {deviation:.3f}" if deviation is not None else "")

    report.table(
        ["", "all folds", "mean ± SD", *(f"fold {record['fold']}" for record in found["folds"])],
        [
            [title, cell(found["all_folds"], name), mean(name), *(cell(record, name) for record in found["folds"])]
            for title, name in figures.items()
        ],
    )


def show_learning_curves(
    report: Report, output_dir: Path, records: Sequence[dict[str, Any]], score: str, title: str
) -> None:
    """Draw learning_curves.png into the folder and the report, unless nothing was trained."""
    logs = [read_log(output_dir / str(record["fold"]) / "log.txt") for record in records]
    report.heading("Learning curves")
    if not any(logs):
        report.text("Nothing was trained.")
        return
    path = output_dir / "learning_curves.png"
    draw_learning_curves(path, logs, [record["best_epoch"] for record in records], score, title)
    report.image(path, f"Loss and {title} by epoch, a colour per fold; dots: the best epoch, whose model was tested")


def draw_learning_curves(
    path: Path, logs: Sequence[Sequence[dict[str, Any]]], best_epochs: Sequence[int], score: str, title: str
) -> None:
    """PNG of losses and validation score by epoch. logs: records of each fold's log.txt; score: its name there"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = [
        ("loss", "training loss"),
        ("validation_loss", "validation loss"),
        (f"validation_{score}", f"validation {title}"),
    ]
    for axes, (name, heading) in zip(figure.subplots(1, len(panels)), panels):
        for fold, (log, best) in enumerate(zip(logs, best_epochs)):
            points = {record["epoch"]: record[name] for record in log if None not in map(record.get, ("epoch", name))}
            axes.plot(list(points), list(points.values()), color=f"C{fold}", linewidth=1.2, label=f"fold {fold}")
            if best in points:
                axes.plot(best, points[best], "o", color=f"C{fold}")
        axes.set(title=heading, xlabel="epoch")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)


def finish_report(report: Report, output_dir: Path, found: dict[str, Any]) -> None:
    """Notes, versions and arguments, and the file."""
    named = [(f"fold {record['fold']}", record) for record in found["folds"]] + [("all folds", found["all_folds"])]
    notes = [f"{name}: {note}" for name, record in named for note in record.get("notes", ())]
    report.heading("Notes")
    report.text(*notes or ["None."])
    config = read_json(output_dir / "config.json")
    report.heading("Versions")
    report.table(["package", "version"], list(config["versions"].items()))
    report.heading("Arguments")
    report.table(
        ["name", "value"],
        [[name, "" if value is None else format_values(value)] for name, value in config["arguments"].items()],
    )
    report.save(output_dir / "report.html")
