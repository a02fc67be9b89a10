"""What a comparison of tables of features is told by: lines on the console, CSV, JSON, and a page with figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino3d.evaluation.classification_metrics import reliability_bins
from dino3d.evaluation.comparison import (
    CURVE_PROTOCOL,
    MAIN_METRIC,
    METRICS,
    Difference,
    Measured,
    Plan,
    as_record,
    bootstrap_of,
    verdict,
)
from dino3d.evaluation.report import Report
from dino3d.evaluation.statistics import with_interval
from dino3d.files import write_json, write_table

METRIC_NAMES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "brier_score": "Brier score",
    "calibration_error": "calibration error",
    "spearman": "Spearman's correlation",
    "r2": "R²",
    "mae": "mean absolute error",
}
TABLES = {  # of the page, as wide as it
    "classification": (
        ("auc", "average_precision", "brier_score"),
        ("accuracy", "balanced_accuracy", "f1"),
        ("sensitivity", "specificity", "calibration_error"),
    ),
    "regression": (METRICS["regression"],),
}
RESULT_FILES = ("metrics.csv", "differences.csv", "curves.csv", "predictions.csv", "results.json", "report.html")
MAX_BARS = 180  # differences in one figure: ten tables, two protocols
MAX_CURVES = 10  # lines in one figure that can be told apart


def figure_of(values: np.ndarray, draws: int) -> str:
    """A figure with its interval as text."""
    found = as_record(values, draws)
    return with_interval(found["value"], found["interval"])


def difference_of(one: Difference) -> str:
    if one.interval is None:
        return "undefined"
    return f"{one.value:+.3f} ({one.interval[0]:+.3f} to {one.interval[1]:+.3f})"


def write_results(
    folder: Path,
    measured: Sequence[Measured],
    entries: Sequence[Measured],
    found: Sequence[Difference],
    plan: Plan,
    names: Sequence[str],
    facts: dict[str, Any],
) -> None:
    """metrics.csv, differences.csv, curves.csv, predictions.csv and results.json. Raises OSError."""
    groups, main = [one for one in entries if one.members], MAIN_METRIC[plan.target.task]
    pairs = sum(pair.metric == main for pair in found)
    write_table(
        folder / "metrics.csv",
        ["table", "protocol", "metric", "value", "low", "high"],
        [
            [one.name, protocol, metric, *_cells(values, plan.draws)]
            for one in [*measured, *groups]
            for protocol, metrics in one.metrics.items()
            for metric, values in metrics.items()
        ],
    )
    write_table(
        folder / "differences.csv",
        ["protocol", "metric", "table", "minus", "difference", "low", "high", "p", "p_holm", "shown"],
        [
            [
                *(pair.protocol, pair.metric, pair.one, pair.other, _cell(pair.value), *(pair.interval or ("", ""))),
                *(_cell(pair.p), _cell(pair.p_holm), int(pair.shown)),
            ]
            for pair in found
        ],
    )
    write_table(
        folder / "curves.csv",
        ["table", "protocol", "metric", "kind", "size", "value", "low", "high"],
        [
            [one.name, CURVE_PROTOCOL[plan.target.task], main, kind, size, *_cells(values, plan.draws)]
            for one in [*measured, *groups]
            for (kind, size), values in one.curves.items()
        ],
    )
    classes = plan.target.classes
    said = [f"probability_{name}" for name in classes] if classes else ["predicted"]
    write_table(
        folder / "predictions.csv",
        ["table", "protocol", "name", "patient", "label", *said],
        [
            [one.name, protocol, names[i], plan.patients[i], classes[y] if classes else float(y), *map(float, p)]
            for one in measured
            for protocol, tested in one.predictions.items()
            for i, (y, p) in enumerate(zip(plan.target.y, np.mean([repeat.values for repeat in tested], 0)))
        ],
    )
    write_json(
        folder / "results.json",
        {
            **facts,
            "tables": {
                one.name: {
                    "members": list(one.members),
                    "metrics": {
                        protocol: {metric: as_record(values, plan.draws) for metric, values in metrics.items()}
                        for protocol, metrics in one.metrics.items()
                    },
                    "calibration_error_by_chance": one.by_chance,
                    "curves": [
                        {"kind": kind, "size": size, **as_record(values, plan.draws)}
                        for (kind, size), values in one.curves.items()
                    ],
                }
                for one in [*measured, *groups]
            },
            "differences": [
                {
                    **pair._asdict(),
                    "value": None if np.isnan(pair.value) else pair.value,
                    **({"verdict": verdict(pair, pairs)} if pair.metric == main else {}),
                }
                for pair in found
            ],
        },
    )


def _cells(values: np.ndarray, draws: int) -> list[Any]:
    record = as_record(values, draws)
    return [_cell(record["value"]), *(record["interval"] or ("", ""))]


def _cell(value: float | None) -> float | str:
    return "" if value is None or np.isnan(value) else float(value)


# ------------------------------------------------------------------------------------------------------------ the page


def write_page(
    path: Path,
    measured: Sequence[Measured],
    entries: Sequence[Measured],
    found: Sequence[Difference],
    plan: Plan,
    said: Sequence[str],
    how: Sequence[str],
) -> None:
    """report.html. said: what the console said before the results; how: the protocol in words. Raises OSError."""
    task, draws = plan.target.task, plan.draws
    main, protocols = MAIN_METRIC[task], list(measured[0].metrics)
    rows = [*measured, *(one for one in entries if one.members)]
    report = Report("Frozen features compared")
    report.text(*said)
    report.heading("Which differences are shown")
    pairs = [pair for pair in found if pair.metric == main]
    report.text(
        f"Differences of the {METRIC_NAMES[main]}, the same patients drawn for both tables. A difference counts as "
        "shown only if its 95 % interval leaves out 0 and its p-value stays below 0.05 after Holm's adjustment for "
        f"all {len(pairs)} comparisons."
        if pairs
        else "One table alone: nothing to compare it with."
    )
    if pairs:
        header = ["", "protocol", "table", "minus", "difference (95 % interval)", "p", "p after Holm"]
        report.table(
            header,
            [
                [
                    *("shown" if pair.shown else "not shown", pair.protocol, pair.one, pair.other),
                    *(difference_of(pair), _short(pair.p), _short(pair.p_holm)),
                ]
                for pair in pairs
            ],
        )
        drawn = pairs if len(pairs) <= MAX_BARS else [pair for pair in pairs if pair.one == pairs[0].one]
        caption = "Differences with their 95 % intervals; filled where shown"
        if len(drawn) < len(pairs):
            caption += f"; those of {pairs[0].one} alone, the table above has all {len(pairs)}"
        report.figure(_forest_of_differences(drawn), caption)
    report.heading("Figures")
    for protocol in protocols:
        report.text(f"{protocol}: mean over the repeats (95 % interval)")
        for metrics in TABLES[task]:
            header = ["table", *(METRIC_NAMES[metric] for metric in metrics)]
            lines = [
                [one.name, *(figure_of(one.metrics[protocol][metric], draws) for metric in metrics)] for one in rows
            ]
            if "calibration_error" in metrics:
                header.append("by chance")
                lines = [[*line, f"{one.by_chance[protocol]:.3f}"] for line, one in zip(lines, rows)]
            report.table(header, lines)
    if plan.target.classes:
        report.text(
            "By chance: the calibration error that right probabilities would show on so many cases; only what "
            "exceeds it is an error of the probabilities."
        )
    report.figure(_forest(rows, plan), f"{METRIC_NAMES[main]} of each table with its 95 % interval")
    for kind, what in (("shots", "training cases of each class"), ("share", "share of the training patients")):
        sizes = [size for at, size in rows[0].curves if at == kind]
        if len(sizes) > 1:
            report.heading("Few-shot curve" if kind == "shots" else "Label-fraction curve")
            name = CURVE_PROTOCOL[task]
            report.figure(
                _curves(entries, kind, sizes, what, plan),
                f"{METRIC_NAMES[main]} of {name} regression by {what}, with 95 % intervals{_cut(entries)}",
            )
            report.table(
                [what, *(f"{size:g}" for size in sizes)],
                [[one.name, *(figure_of(one.curves[kind, size], draws) for size in sizes)] for one in rows],
            )
    if plan.target.classes:
        shown = [one for one in entries if one.predictions][:MAX_CURVES]
        report.heading("ROC and reliability")
        if len(plan.target.classes) == 2 and shown:
            report.figure(
                _roc_figure(shown, plan),
                "ROC curves, all folds pooled, mean over the repeats at each false positive rate: their areas differ a "
                "little from the AUC above, which counts pairs within folds",
            )
        if shown:
            report.figure(
                _reliability_figure(shown, plan),
                "Reliability: predicted probability and how often it came true, all repeats together, in ten bins; "
                "right probabilities lie on the diagonal but for chance; the area of a dot is the share of its cases",
            )
    report.heading("How it was done")
    report.text(*how)
    report.save(path)


def _short(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _cut(entries: Sequence[Measured]) -> str:
    return f"; the first {MAX_CURVES} of {len(entries)} tables" if len(entries) > MAX_CURVES else ""


def _in_figure(name: str) -> str:
    """A name as matplotlib shows it as it stands: what is between two $ would be a formula, and legends leave out what
    begins with an underscore."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _figure(columns: int, height: float) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _forest(rows: Sequence[Measured], plan: Plan) -> Any:
    main = MAIN_METRIC[plan.target.task]
    figure, axes = _figure(len(rows[0].metrics), 1.2 + 0.3 * len(rows))
    for ax, protocol in zip(axes, rows[0].metrics):
        _bars(
            ax,
            [one.name for one in rows] if ax is axes[0] else [""] * len(rows),
            [one.metrics[protocol][main][0] for one in rows],
            [bootstrap_of(one.metrics[protocol][main], plan.draws).interval() for one in rows],
            [True] * len(rows),
        )
        ax.axvline(0.5 if plan.target.classes else 0, color="0.6", linewidth=1, linestyle=":")
        ax.set(title=protocol, xlabel=METRIC_NAMES[main])
    return figure


def _forest_of_differences(pairs: Sequence[Difference]) -> Any:
    protocols = list(dict.fromkeys(pair.protocol for pair in pairs))
    figure, axes = _figure(len(protocols), 1.2 + 0.3 * len(pairs) / len(protocols))
    for ax, protocol in zip(axes, protocols):
        chosen = [pair for pair in pairs if pair.protocol == protocol]
        _bars(
            ax,
            [f"{pair.one} − {pair.other}" if ax is axes[0] else "" for pair in chosen],
            [pair.value for pair in chosen],
            [pair.interval for pair in chosen],
            [pair.shown for pair in chosen],
        )
        ax.axvline(0, color="0.6", linewidth=1, linestyle=":")
        ax.set(title=protocol, xlabel="difference")
    return figure


def _bars(
    ax: Any, names: Sequence[str], values: Sequence[float], intervals: Sequence[Any], filled: Sequence[bool]
) -> None:
    for at, (value, interval, full) in enumerate(zip(values, intervals, filled)):
        if interval:
            ax.plot(interval, [at, at], color="C0", linewidth=2, alpha=0.6)
        ax.plot(value, at, "o", color="C0", fillstyle="full" if full else "none")
    ax.set_yticks(
        range(len(names)), [_in_figure(name if len(name) < 50 else "…" + name[-49:]) for name in names], fontsize=8
    )
    ax.set_ylim(len(names) - 0.4, -0.6)


def _curves(entries: Sequence[Measured], kind: str, sizes: Sequence[float], what: str, plan: Plan) -> Any:
    figure, (ax,) = _figure(1, 4.5)
    shown = entries[:MAX_CURVES]
    for number, one in enumerate(shown):
        values = [one.curves[kind, size] for size in sizes]
        bands = [bootstrap_of(at, plan.draws).interval() or (np.nan, np.nan) for at in values]
        places = np.array(sizes) * 1.02 ** (number - len(shown) / 2)  # side by side, or bars hide each other
        middle = np.array([at[0] for at in values])
        low, high = np.array(bands).T
        ax.errorbar(
            places,
            middle,
            [middle - low, high - middle],
            marker="o",
            capsize=2,
            linewidth=1,
            label=_in_figure(one.name),
        )
    ax.axhline(0.5 if plan.target.classes else 0, color="0.6", linewidth=1, linestyle=":")
    ax.set(xscale="log", xlabel=what, ylabel=METRIC_NAMES[MAIN_METRIC[plan.target.task]])
    ax.set_xticks(sizes, [f"{100 * size:g} %" if kind == "share" else f"{size:g}" for size in sizes])
    ax.minorticks_off()
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    return figure


def _roc_figure(shown: Sequence[Measured], plan: Plan) -> Any:
    from sklearn.metrics import roc_curve

    figure, axes = _figure(len(shown[0].predictions), 5)
    grid = np.linspace(0, 1, 201)
    for ax, protocol in zip(axes, shown[0].predictions):
        for one in shown:
            curves = [roc_curve(plan.target.y == 1, repeat.values[:, 1]) for repeat in one.predictions[protocol]]
            rates = [np.interp(grid, false_positives, hits) for false_positives, hits, _ in curves]
            ax.plot(grid, np.mean(rates, 0), label=_in_figure(one.name), linewidth=1.2)
        ax.plot([0, 1], [0, 1], ":", color="0.6", linewidth=1)
        ax.set(title=protocol, xlabel="false positive rate", ylabel="sensitivity", aspect="equal")
    axes[0].legend(fontsize=8)
    return figure


def _reliability_figure(shown: Sequence[Measured], plan: Plan) -> Any:
    figure, axes = _figure(len(shown[0].predictions), 5)
    for ax, protocol in zip(axes, shown[0].predictions):
        for one in shown:
            repeats = one.predictions[protocol]
            bins = reliability_bins(
                np.tile(plan.target.y, len(repeats)), np.concatenate([repeat.values for repeat in repeats])
            )
            (line,) = ax.plot(bins.predicted, bins.observed, linewidth=1, label=_in_figure(one.name))
            ax.scatter(bins.predicted, bins.observed, 150 * bins.counts / bins.counts.sum(), color=line.get_color())
        ax.plot([0, 1], [0, 1], ":", color="0.6", linewidth=1)
        what = (
            f"label {_in_figure(plan.target.classes[1])}"
            if len(plan.target.classes) == 2
            else "the most probable class"
        )
        ax.set(title=protocol, xlabel=f"predicted probability of {what}", ylabel="share that came true")
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes[0].legend(fontsize=8)
    return figure
