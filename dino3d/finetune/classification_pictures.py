"""What is drawn of classified cases: ROC, precision-recall and reliability curves, the confusion matrix, and the most
confident errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from augmentations import scale_intensity
from dino3d.evaluation.classification_metrics import (
    PooledPredictions,
    area_under_roc,
    average_precision,
    read_probabilities,
)
from dino3d.features.encoder import PretrainedEncoder
from dino3d.files import atomic_write
from dino3d.finetune.crops import centre_window, read_crop, spacing_of
from dino3d.training.pictures import EVEN, montage, plane, save_picture

SHOWN_ERRORS = 10  # in errors.png


def draw_curves(path: Path | str, tables: Sequence[list[dict[str, str]]], classes: int) -> None:
    """PNG with the ROC and precision-recall curves of each fold; with more than two classes one per class and fold."""
    from matplotlib.figure import Figure
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    roc, precision = figure.subplots(1, 2)
    for fold, table in enumerate(tables):
        labels, probabilities = np.array([int(row["label"]) for row in table]), read_probabilities(table, classes)
        for k in [1] if classes == 2 else range(classes):
            is_class = labels == k
            if not 0 < is_class.sum() < len(labels):
                continue
            name = f"fold {fold}" + (f", label{k}" if classes > 2 else "")
            pair = np.stack([1 - probabilities[:, k], probabilities[:, k]], 1)
            x, y, _ = roc_curve(is_class, probabilities[:, k])
            roc.plot(x, y, label=f"{name}: AUC {area_under_roc(is_class.astype(int), pair):.3f}")
            y, x, _ = precision_recall_curve(is_class, probabilities[:, k])
            precision.step(x, y, where="post", label=f"{name}: {average_precision(is_class.astype(int), pair):.3f}")
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC", aspect="equal")
    precision.set(xlabel="sensitivity (recall)", ylabel="precision", title="precision-recall (with average precision)")
    for axes in (roc, precision):
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)


def draw_reliability(path: Path | str, reliability: dict[str, dict[str, list[float]]], classes: int) -> None:
    """PNG of reliability curves before and after calibration: how often what was predicted came true, by probability.

    reliability: of metrics.json. Bars are each bin's 95 % interval by chance (Wilson 1927), numbers are its cases.
    """
    from matplotlib.figure import Figure

    what = "label1" if classes == 2 else "the most probable class"
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("uncalibrated", "before calibration"), ("calibrated", "after calibration"))
    ):
        counts, predicted, observed = (np.array(reliability[name][key]) for key in ("counts", "predicted", "observed"))
        low, high = wilson_interval(observed, counts)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        axes.errorbar(predicted, observed, [observed - low, high - observed], marker="o", markersize=5, capsize=3)
        for x, y, count in zip(predicted, observed, counts):
            axes.annotate(f"{count:g}", (x, y), (6, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel=f"mean probability of {what}", ylabel=f"share with {what}" if classes == 2 else "share right")
        axes.set(title=title, xlim=(-0.03, 1.06), ylim=(-0.03, 1.06), aspect="equal")
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)


def wilson_interval(shares: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % intervals of shares of so many cases (Wilson 1927). shares, counts: (N,)"""
    z = 1.959964
    middle = (shares + z**2 / (2 * counts)) / (1 + z**2 / counts)
    half = z / (1 + z**2 / counts) * np.sqrt(shares * (1 - shares) / counts + z**2 / (4 * counts**2))
    return np.minimum(middle - half, shares), np.maximum(middle + half, shares)


def draw_confusion(path: Path | str, confusion: Sequence[Sequence[int]]) -> None:
    """PNG of a confusion matrix: cases of each label (rows) by decision (columns), shades by share of the row."""
    from matplotlib.figure import Figure

    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names, side = [f"label{k}" for k in range(len(counts))], max(3.6, 1.2 + 0.9 * len(counts))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(counts):
        colour = "white" if shares[i, j] > 0.6 else "black"
        axes.text(j, i, f"{count}\n{shares[i, j]:.0%}", ha="center", va="center", color=colour)
    axes.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(names)), yticklabels=names)
    axes.set(xlabel="decision", ylabel="label", title="cases, and share of the label")
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)


def draw_errors(path: Path | str, together: PooledPredictions, cases: Any, encoder: PretrainedEncoder) -> int:
    """PNG of the most confident errors, a row each: axial, coronal and sagittal planes. Returns how many there are.

    Beside each probability stands its threshold, the mean of those of the folds that tested the case.
    """
    wrong = sorted(np.flatnonzero(together.wrong), key=lambda i: -together.confidence[i])
    rows, labels = [], []
    for i in wrong[:SHOWN_ERRORS]:
        file = cases.paths[together.numbers[i]]
        crop, spacing = read_crop(file, encoder.input_size), spacing_of(file)
        window = torch.from_numpy(centre_window(crop, np.array(encoder.input_size)))
        window = scale_intensity(window, *encoder.clip_range).numpy()
        rows.append(
            [plane(window, 2, spacing, 0.5 + step / 12) for step in (-3, -2, -1, 0, 1, 2, 3)]
            + [plane(window, 1, spacing), plane(window, 0, spacing)]
        )
        p = together.probabilities[i]
        said = (
            f"p(label1) = {p[1]:.3f}, threshold {together.thresholds[i]:.3f}"
            if cases.classes == 2
            else f"most probable label{p.argmax()}, {p.max():.3f}"
        )
        labels.append(f"label{together.labels[i]}, {said}: {cases.names[together.numbers[i]]}")
    first = "farthest from the threshold" if cases.classes == 2 else "most confident"
    shown = f"{len(rows)} of {len(wrong)} errors, {first} first"
    title = f"{shown}; axial from below to above, coronal, sagittal (anterior on the left); {EVEN}"
    if not rows:
        rows, labels, title = [[np.zeros((8, 64))]], ["no errors"], ""
    save_picture(path, montage(rows, labels, title))
    return len(wrong)
