"""Pre-trained against not by the share of labels: one table and one figure of the tables of label_fractions.sh and
classification.sh.

    python results/label_fractions.py --results results

Writes label_fractions/results.csv, results.md and label_fractions.png below that folder. What was not run says so.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags  # noqa: E402
from dino3d.files import TEXT, atomic_write, read_table, write_table  # noqa: E402


class Source(NamedTuple):
    """Where a share's figures stand: folder of the table, task, arm that is pre-trained."""

    folder: str
    task: str
    trained: str


class Curve(NamedTuple):
    """A way to use the encoder. title: in words; without: arm that is not pre-trained; sources: of each percentage of
    the training patients"""

    title: str
    without: str
    sources: dict[int, Source]


def frozen_sources(folder: str) -> dict[int, Source]:
    tasks = {10: "probe_10", 25: "probe_25", 50: "probe_50", 100: "probe"}
    return {percent: Source(folder, task, "trained") for percent, task in tasks.items()}


PERCENTS = (10, 25, 50, 100)
CURVES = (
    Curve("frozen", "random", frozen_sources("frozen")),
    Curve("frozen, mean over 48 orientations", "random", frozen_sources("frozen_turned")),
    Curve(
        "fine-tuned",
        "scratch",
        {percent: Source(f"labels_{percent}", "classification", "trained") for percent in PERCENTS[:-1]}
        | {100: Source("classification", "classification", "nodules")},
    ),
)
BY_HAND = "trivial-radial"
SHARE_COLUMNS = ("how", "percent", "arm", "auc", "low", "high", "seeds", "patients", "minus", "minus_low", "minus_high")


class ShareRow(NamedTuple):
    """A line of results.csv. auc: (value, low, high) or None, not run; minus: the same of the difference from the arm
    that is not pre-trained, or None"""

    how: str
    percent: int
    arm: str
    auc: tuple[float, float, float] | None
    seeds: str = ""
    patients: str = ""
    minus: tuple[float, float, float] | None = None

    def cells(self) -> list:
        blank = ("", "", "")
        auc, minus = self.auc or blank, self.minus or blank
        return [self.how, self.percent, self.arm, *auc, self.seeds, self.patients, *minus]


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="label_fractions.py",
        usage="label_fractions.py --results DIR",
        description="Pre-trained against not by the share of labels: a table and a figure.",
    )
    group = parser.add_argument_group("tables")
    group.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder with the tables of results/")
    help_flags(group)
    return parser


def with_bounds(row: dict[str, str], column: str) -> tuple[float, float, float]:
    """A figure and the bounds of its interval."""
    return tuple(float(row[name] or "nan") for name in (column, "low", "high"))


def rows_of_share(curve: Curve, percent: int, results: Path) -> list[ShareRow]:
    """Pre-trained, without, and by hand where there is such a row. Raises UserError."""
    source = curve.sources[percent]
    folder, names = results / source.folder, {"pre-trained": source.trained, curve.without: curve.without}
    if not (folder / "results.csv").is_file():
        return [ShareRow(curve.title, percent, arm, None) for arm in names]
    try:
        return rows_of_table(curve, percent, folder, names | {BY_HAND: BY_HAND})
    except (OSError, KeyError, ValueError) as error:
        why = getattr(error, "strerror", None) or repr(error)
        raise UserError(f"{folder}: can't be read as tables of study.py --from_records ({why})") from error


def rows_of_table(curve: Curve, percent: int, folder: Path, names: dict[str, str]) -> list[ShareRow]:
    """Rows of a share that was run. names: {in words: arm}. Raises OSError, KeyError, ValueError."""
    task = curve.sources[percent].task
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
            rows.append(
                ShareRow(curve.title, percent, words, with_bounds(one, "value"), one["seeds"], one["patients"], minus)
            )
        elif words != BY_HAND:
            rows.append(ShareRow(curve.title, percent, words, None))
    return rows


def share_lines(rows: Sequence[ShareRow]) -> list[str]:
    lines = [
        "| | labels | pre-trained | without | difference | by hand | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve in CURVES:
        for percent in PERCENTS:
            mine = {row.arm: row for row in rows if (row.how, row.percent) == (curve.title, percent)}
            trained, hand = mine["pre-trained"], mine.get(BY_HAND)
            cells = ["not run" if row.auc is None else figure(row.auc) for row in (trained, mine[curve.without])]
            cells += [figure(trained.minus, "+") if trained.minus else "", figure(hand.auc) if hand else ""]
            lines.append(f"| {curve.title} | {percent} % | {' | '.join(cells)} | {trained.seeds} |")
    return [*lines, "", "Without: a random encoder where it is frozen, else from scratch. By hand: the radial profile."]


def figure(values: Sequence[float], sign: str = "") -> str:
    value, low, high = (f"{one:{sign}.3f}" for one in values)
    return f"{value} ({low} to {high})"


def draw_shares(rows: Sequence[ShareRow], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure((10.5, 3.4), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, curve in zip(drawing.subplots(1, len(CURVES), sharey=True), CURVES):
        styles = [("pre-trained", "o-", "tab:blue"), (curve.without, "o-", "tab:orange"), (BY_HAND, "s:", "0.5")]
        for (arm, marker, colour), shift in zip(styles, (0.97, 1.0, 1.03)):
            mine = [row for row in rows if (row.how, row.arm) == (curve.title, arm) and row.auc]
            if mine:
                middle, low, high = zip(*(row.auc for row in mine))
                off = [[m - bound for m, bound in zip(middle, low)], [bound - m for m, bound in zip(middle, high)]]
                label = "radial profile by hand" if arm == BY_HAND else arm
                x = [row.percent * shift for row in mine]
                axes.errorbar(x, middle, off, fmt=marker, capsize=3, color=colour, label=label)
        axes.axhline(0.5, color="0.8", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlim(8, 125)
        axes.set_xticks(PERCENTS, [f"{percent} %" for percent in PERCENTS])
        axes.minorticks_off()
        axes.set(title=curve.title, xlabel="training patients with labels")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", fontsize=8)
    drawing.axes[0].set_ylabel("AUC, 95 % interval")
    with atomic_write(path) as part:
        drawing.savefig(part, dpi=150, format="png")


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    rows = [row for curve in CURVES for percent in PERCENTS for row in rows_of_share(curve, percent, args.results)]
    if all(row.auc is None for row in rows):
        folders = dict.fromkeys(source.folder for curve in CURVES for source in curve.sources.values())
        raise UserError(f"--results {args.results}: holds none of {', '.join(folders)}")
    folder = args.results / "label_fractions"
    folder.mkdir(exist_ok=True)
    write_table(folder / "results.csv", SHARE_COLUMNS, [row.cells() for row in rows])
    lines = share_lines(rows)
    with atomic_write(folder / "results.md") as part:
        part.write_text("\n".join(lines) + "\n", **TEXT)
    draw_shares(rows, folder / "label_fractions.png")
    print(*lines, f"figure       {folder / 'label_fractions.png'}", sep="\n")


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
