"""Pre-trained against from scratch by the share of labels: one table and one figure of the tables of label_fractions.sh
and classification.sh.

    python results/label_fractions.py --results results

Writes label_fractions/results.csv, results.md and label_fractions.png below that folder. A share that was not run says
so.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags  # noqa: E402
from dino3d.files import TEXT, atomic_write, read_table, write_table  # noqa: E402

# percent of the training patients: folder of the table, its pre-trained arm
TABLE_OF_PERCENT = {10: ("labels_10", "trained"), 25: ("labels_25", "trained"), 50: ("labels_50", "trained")}
TABLE_OF_PERCENT |= {100: ("classification", "nodules")}
BY_HAND = "trivial-radial"
SHARE_COLUMNS = [
    "percent",
    "arm",
    "auc",
    "low",
    "high",
    "seeds",
    "patients",
    "minus_scratch",
    "minus_low",
    "minus_high",
]


def with_bounds(row: dict[str, str], column: str) -> tuple[float, float, float]:
    """A figure and the bounds of its interval."""
    return tuple(float(row[name] or "nan") for name in (column, "low", "high"))


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="label_fractions.py",
        usage="label_fractions.py --results DIR",
        description="Pre-trained against from scratch by the share of labels: a table and a figure.",
    )
    group = parser.add_argument_group("tables")
    group.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder with the tables of results/")
    help_flags(group)
    return parser


def rows_of_share(percent: int, folder: Path, trained: str) -> list[list]:
    """Rows of SHARE_COLUMNS: pre-trained and from scratch; without figures where the table is not there."""
    if not (folder / "results.csv").is_file():
        return [[percent, arm, *[""] * 8] for arm in ("pre-trained", "scratch")]
    try:
        return table_rows(percent, folder, trained)
    except (OSError, KeyError, ValueError) as error:
        why = getattr(error, "strerror", None) or repr(error)
        raise UserError(f"{folder}: can't be read as tables of study.py --from_records ({why})") from error


def table_rows(percent: int, folder: Path, trained: str) -> list[list]:
    """Rows of a share that was run. Raises UserError, OSError, KeyError, ValueError."""
    found = {row["arm"]: row for row in read_table(folder / "results.csv") if row["task"] == "classification"}
    pairs = {
        (row["arm"], row["minus"]): with_bounds(row, "difference")
        for row in read_table(folder / "differences.csv")
        if row["task"] == "classification"
    }
    rows = []
    for arm, name in (("pre-trained", trained), ("scratch", "scratch")):
        if name not in found:  # not run, or not all parts of it
            rows.append([percent, arm, *[""] * 8])
            continue
        row, minus = found[name], [""] * 3
        if arm != "scratch" and (name, "scratch") in pairs:
            minus = pairs[name, "scratch"]
        elif arm != "scratch" and ("scratch", name) in pairs:
            value, low, high = pairs["scratch", name]
            minus = -value, -high, -low
        rows.append([percent, arm, *with_bounds(row, "value"), row["seeds"], row["patients"], *minus])
    return rows


def draw_shares(rows: Sequence[Sequence], by_hand: float | None, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure((5.2, 3.4), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    for arm, shift, colour in (("pre-trained", 0.985, "tab:blue"), ("scratch", 1.015, "tab:orange")):
        mine = [row for row in rows if row[1] == arm and row[2] != ""]
        if mine:
            x, y = [row[0] * shift for row in mine], [row[2] for row in mine]
            below, above = [row[2] - row[3] for row in mine], [row[4] - row[2] for row in mine]
            axes.errorbar(x, y, [below, above], fmt="o-", capsize=3, color=colour, label=f"fine-tuned, {arm}")
    if by_hand is not None:
        axes.axhline(by_hand, color="0.4", linestyle=":", label="radial profile by hand, all labels")
    axes.axhline(0.5, color="0.8", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(list(TABLE_OF_PERCENT), [f"{percent} %" for percent in TABLE_OF_PERCENT])
    axes.minorticks_off()
    axes.set(xlabel="training patients whose labels are used", ylabel="AUC, 95 % interval")
    axes.legend(loc="lower right", fontsize=8)
    with atomic_write(path) as part:
        drawing.savefig(part, dpi=150, format="png")


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    rows = [
        row
        for percent, (name, arm) in TABLE_OF_PERCENT.items()
        for row in rows_of_share(percent, args.results / name, arm)
    ]
    if not any(row[2] != "" for row in rows):
        raise UserError(
            f"--results {args.results}: holds none of {', '.join(name for name, _ in TABLE_OF_PERCENT.values())}"
        )
    main_table = args.results / TABLE_OF_PERCENT[100][0] / "results.csv"
    main_rows = read_table(main_table) if main_table.is_file() else []
    by_hand = next((float(row["value"]) for row in main_rows if row["arm"] == BY_HAND), None)
    folder = args.results / "label_fractions"
    folder.mkdir(exist_ok=True)
    write_table(folder / "results.csv", SHARE_COLUMNS, rows)
    lines = [
        "| labels | pre-trained | scratch | pre-trained minus scratch | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for trained, scratch in zip(rows[::2], rows[1::2]):
        cells = [
            "not run" if row[2] == "" else f"{row[2]:.3f} ({row[3]:.3f} to {row[4]:.3f})" for row in (trained, scratch)
        ]
        minus = "" if trained[7] == "" else f"{trained[7]:+.3f} ({trained[8]:+.3f} to {trained[9]:+.3f})"
        lines.append(f"| {trained[0]} % | {cells[0]} | {cells[1]} | {minus} | {trained[5] or scratch[5]} |")
    with atomic_write(folder / "results.md") as part:
        part.write_text("\n".join(lines) + "\n", **TEXT)
    draw_shares(rows, by_hand, folder / "label_fractions.png")
    print(*lines, f"figure       {folder / 'label_fractions.png'}", sep="\n")


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
