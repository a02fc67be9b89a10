"""Pre-trained against not, by the share of labels, by epochs and rate of fine-tuning, by epochs of pre-training: tables
and figures of the tables of label_fractions.sh, epochs.sh, rates.sh, pretraining.sh and classification.sh.

    python results/curves.py --results results

Writes results.csv, results.md and a picture to a folder of each below that folder, in which what was not run says so.
"""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags  # noqa: E402
from dino3d.files import TEXT, atomic_write, read_json, read_table, write_table  # noqa: E402


class Source(NamedTuple):
    """Where the figures of a point of a curve stand: folder of the table, task, arm that is pre-trained."""

    folder: str
    task: str
    trained: str


class Curve(NamedTuple):
    """A way to use the encoder. title: in words; without: arm that is not pre-trained; sources: of each point"""

    title: str
    without: str
    sources: dict[float, Source]


class Curves(NamedTuple):
    """What belongs in one table and one picture. name: of its folder; label: of the axis; unit: of the points"""

    name: str
    label: str
    unit: str
    curves: tuple[Curve, ...]

    @property
    def points(self) -> list[float]:
        return sorted({point for curve in self.curves for point in curve.sources})


def frozen_sources(folder: str) -> dict[int, Source]:
    tasks = {10: "probe_10", 25: "probe_25", 50: "probe_50", 100: "probe"}
    return {percent: Source(folder, task, "trained") for percent, task in tasks.items()}


def tuned_sources(folder: str, points: Sequence[float]) -> dict[float, Source]:
    return {point: Source(folder.format(point), "classification", "trained") for point in points}


MAIN = Source("classification", "classification", "nodules")
ALL_CURVES = (
    Curves(
        "label_fractions",
        "training patients with labels",
        " %",
        (
            Curve("frozen", "random", frozen_sources("frozen")),
            Curve("frozen, mean over 48 orientations", "random", frozen_sources("frozen_turned")),
            Curve("fine-tuned", "scratch", tuned_sources("labels_{}", (10, 25, 50)) | {100: MAIN}),
        ),
    ),
    Curves(
        "epochs",
        "epochs of fine-tuning",
        "",
        (Curve("fine-tuned", "scratch", tuned_sources("epochs_{}", (5, 10, 20)) | {40: MAIN}),),
    ),
    Curves(
        "rates",
        "learning rate of fine-tuning",
        "",
        (Curve("fine-tuned", "scratch", {0.0005: MAIN} | tuned_sources("rate_{}", (0.00025, 0.001, 0.002))),),
    ),
    Curves(
        "pretraining",
        "epochs of pre-training",
        "",
        (
            Curve(
                "frozen",
                "random",
                {
                    18: Source("pretraining_epochs", "probe", "nodules_18_epochs"),
                    54: Source("classification", "probe", "nodules"),
                    162: Source("pretraining_epochs", "probe", "nodules_162_epochs"),
                },
            ),
        ),
    ),
)
BY_HAND = "trivial-radial"
POINT_COLUMNS = ("how", "point", "arm", "auc", "low", "high", "seeds", "patients", "minus", "minus_low", "minus_high")


class PointRow(NamedTuple):
    """A line of results.csv. auc: (value, low, high) or None, not run; minus: the same of the difference from the arm
    that is not pre-trained, or None"""

    how: str
    point: float
    arm: str
    auc: tuple[float, float, float] | None
    seeds: str = ""
    patients: str = ""
    minus: tuple[float, float, float] | None = None

    def cells(self) -> list:
        blank = ("", "", "")
        auc, minus = self.auc or blank, self.minus or blank
        return [self.how, self.point, self.arm, *auc, self.seeds, self.patients, *minus]


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="curves.py",
        usage="curves.py --results DIR",
        description="Pre-trained against not, by the share of labels and by epochs: tables and figures.",
    )
    group = parser.add_argument_group("tables")
    group.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder with the tables of results/")
    help_flags(group)
    return parser


def require_one_pool(curve: Curve, results: Path) -> None:
    """Raise UserError where the tables of a curve were made by reading other tokens."""
    places: dict[str, Path] = {}
    for source in curve.sources.values():
        path = results / source.folder / "results.json"
        if path.is_file():
            try:
                flags = read_json(path)["study"]["flags"].get(source.task.partition("_")[0], "")
                pool = (re.findall(r"--pool[ =](\S+)", flags) or [""])[-1]
            except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
                raise unreadable(path.parent, error) from error
            places.setdefault(pool, path)
    if len(places) > 1:
        one, other = sorted(places)[:2]
        raise UserError(
            f"{places[other]}: was made by --pool {other}, {places[one]} by {one or 'none'}: run the older one again"
        )


def with_bounds(row: dict[str, str], column: str) -> tuple[float, float, float]:
    """A figure and the bounds of its interval."""
    return tuple(float(row[name] or "nan") for name in (column, "low", "high"))


def rows_of_point(curve: Curve, point: float, results: Path) -> list[PointRow]:
    """Pre-trained, without, and by hand where there is such a row. Raises UserError."""
    source = curve.sources[point]
    folder, names = results / source.folder, {"pre-trained": source.trained, curve.without: curve.without}
    if not (folder / "results.csv").is_file():
        return [PointRow(curve.title, point, arm, None) for arm in names]
    try:
        return rows_of_table(curve, point, folder, names | {BY_HAND: BY_HAND})
    except (OSError, KeyError, ValueError) as error:
        raise unreadable(folder, error) from error


def unreadable(folder: Path, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or repr(error)
    return UserError(f"{folder}: can't be read as tables of study.py --from_records ({why})")


def rows_of_table(curve: Curve, point: float, folder: Path, names: dict[str, str]) -> list[PointRow]:
    """Rows of a point that was run. names: {in words: arm}. Raises OSError, KeyError, ValueError."""
    task = curve.sources[point].task
    found = {row["arm"]: row for row in read_table(folder / "results.csv") if row["task"] == task}
    differences = {}
    for row in read_table(folder / "differences.csv"):
        if row["task"] == task:
            value, low, high = with_bounds(row, "difference")
            differences[row["arm"], row["minus"]] = value, low, high
            differences[row["minus"], row["arm"]] = -value, -high, -low
    rows = []
    for words, arm in names.items():
        if arm in found:
            minus = differences.get((arm, curve.without)) if words == "pre-trained" else None
            one = found[arm]
            auc = with_bounds(one, "value")
            rows.append(PointRow(curve.title, point, words, auc, one["seeds"], one["patients"], minus))
        elif words != BY_HAND:
            rows.append(PointRow(curve.title, point, words, None))
    return rows


def table_lines(these: Curves, rows: Sequence[PointRow]) -> list[str]:
    lines = [
        f"| | {these.label} | pre-trained | without | difference | by hand | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve in these.curves:
        for point in sorted(curve.sources):
            mine = {row.arm: row for row in rows if (row.how, row.point) == (curve.title, point)}
            trained, hand = mine["pre-trained"], mine.get(BY_HAND)
            cells = ["not run" if row.auc is None else figure(row.auc) for row in (trained, mine[curve.without])]
            cells += [figure(trained.minus, "+") if trained.minus else "", figure(hand.auc) if hand else ""]
            lines.append(f"| {curve.title} | {point}{these.unit} | {' | '.join(cells)} | {trained.seeds} |")
    return [*lines, "", "Without: a random encoder where it is frozen, else from scratch. By hand: the radial profile."]


def figure(values: Sequence[float], sign: str = "") -> str:
    """A value with its interval, of which few patients have none."""
    value, low, high = (f"{one:{sign}.3f}" for one in values)
    return value if math.isnan(values[1]) else f"{value} ({low} to {high})"


def draw_point_rows(these: Curves, rows: Sequence[PointRow], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure((1.2 + 3.1 * len(these.curves), 3.4), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, curve in zip(drawing.subplots(1, len(these.curves), sharey=True, squeeze=False)[0], these.curves):
        styles = [("pre-trained", "o-", "tab:blue"), (curve.without, "o-", "tab:orange"), (BY_HAND, "s:", "0.5")]
        for (arm, marker, colour), shift in zip(styles, (0.97, 1.0, 1.03)):
            mine = [row for row in rows if (row.how, row.arm) == (curve.title, arm) and row.auc]
            if mine:
                middle, low, high = zip(*(row.auc for row in mine))
                off = [[m - bound for m, bound in zip(middle, low)], [bound - m for m, bound in zip(middle, high)]]
                label = "radial profile by hand" if arm == BY_HAND else arm
                x = [row.point * shift for row in mine]
                axes.errorbar(x, middle, off, fmt=marker, capsize=3, color=colour, label=label)
        axes.axhline(0.5, color="0.8", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlim(0.8 * these.points[0], 1.25 * these.points[-1])
        axes.set_xticks(these.points, [f"{point}{these.unit}" for point in these.points])
        axes.minorticks_off()
        axes.set(title=curve.title, xlabel=these.label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", fontsize=8)
    drawing.axes[0].set_ylabel("AUC, 95 % interval")
    with atomic_write(path) as part:
        drawing.savefig(part, dpi=150, format="png")


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    drawn = False
    for these in ALL_CURVES:
        for curve in these.curves:
            require_one_pool(curve, args.results)
        rows = [
            row
            for curve in these.curves
            for point in sorted(curve.sources)
            for row in rows_of_point(curve, point, args.results)
        ]
        if all(row.auc is None for row in rows):
            continue
        folder, drawn = args.results / these.name, True
        folder.mkdir(exist_ok=True)
        write_table(folder / "results.csv", POINT_COLUMNS, [row.cells() for row in rows])
        lines = table_lines(these, rows)
        with atomic_write(folder / "results.md") as part:
            part.write_text("\n".join(lines) + "\n", **TEXT)
        draw_point_rows(these, rows, folder / f"{these.name}.png")
        print(*lines, f"figure       {folder / these.name}.png", "", sep="\n")
    if not drawn:
        sources = [source for these in ALL_CURVES for curve in these.curves for source in curve.sources.values()]
        folders = ", ".join(dict.fromkeys(source.folder for source in sources))
        raise UserError(f"--results {args.results}: holds none of {folders}")


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
