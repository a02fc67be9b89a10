"""One table of several studies that have each an arm and one beside it: the README's segmentation table.

    python results/join_tables.py results/lungs_frozen_1 results/lungs_tuned_1 --output results/segmentation

Each folder is one of `study.py --from_records`, whose results.json is read; what was not run says so. Writes OUTPUT.md
and OUTPUT.csv.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags  # noqa: E402
from dino3d.files import TEXT, atomic_write, read_json, write_table  # noqa: E402

JOINED = (
    *("study", "figure", "cases", "seeds", "arm", "value", "low", "high"),
    *("minus", "difference", "difference_low", "difference_high", "verdict"),
)


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="join_tables.py",
        usage="join_tables.py DIR ... --output NAME",
        description="One table of several studies' tables, made from records.",
    )
    group = parser.add_argument_group("data")
    group.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of study.py --from_records")
    group.add_argument("--output", type=Path, required=True, metavar="NAME", help="NAME.md and NAME.csv are written")
    help_flags(group)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    names = [folder.resolve().name for folder in args.folders]
    if again := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UserError(f"{again[0]}: two folders are called so, and their rows would be one; rename one")
    table, page = (args.output.with_name(args.output.name + suffix) for suffix in (".csv", ".md"))
    rows = [row for folder in args.folders for row in rows_of(folder)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_table(table, JOINED, [["" if one is None else one for one in row] for row in rows])
    with atomic_write(page) as part:
        part.write_text("\n".join(markdown_of(rows)) + "\n", **TEXT)
    print(f"{page}: {len(rows)} rows of {len(args.folders)} studies")


def rows_of(folder: Path) -> list[list[Any]]:
    """A row of JOINED for each figure and arm; an arm's difference is from the other arm. Raises UserError."""
    try:
        found = read_json(folder / "results.json")
        rows = []
        for figure, task in found["tasks"].items():
            for arm in found["study"]["arms"]:
                (mean,) = [m for m in found["means"] if m["task"] == figure and set(m["weights"]) == {arm}] or [{}]
                pairs = [d for d in found["differences"] if d["task"] == figure and d["weights"].get(arm) == 1.0]
                pair = pairs[0] if pairs else {}
                rival = next((name for name, weight in pair.get("weights", {}).items() if weight < 0), "")
                rows.append(
                    [
                        folder.resolve().name,
                        task["metric"],
                        task["cases"],
                        len(mean.get("seeds", ())),
                        arm,
                        mean.get("value"),
                    ]
                    + [*(mean.get("interval") or (None, None)), rival, pair.get("value")]
                    + [*(pair.get("interval") or (None, None)), pair.get("verdict", "")]
                )
        return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = getattr(error, "strerror", None) or repr(error)
        raise UserError(f"{folder}: can't be read as a folder of study.py --from_records ({why})") from error


def markdown_of(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The table in Markdown: a line for each study and arm, figures beside each other."""
    lines = {}
    figures = list(dict.fromkeys(row[1] for row in rows))
    for study, figure, cases, seeds, arm, *numbers in rows:
        value, low, high, rival, difference, less, more, verdict = numbers
        first = [study.replace("_", " "), arm, str(cases), str(seeds)]
        line = lines.setdefault((study, arm), [*first, *[""] * (2 * len(figures))])
        star = " *" * (verdict == "shown")
        place = len(first) + 2 * figures.index(figure)
        line[place] = "not run" if value is None else f"{value:.3f}{between(low, high)}"
        line[place + 1] = "" if difference is None else f"{difference:+.3f}{between(less, more, '+')} to {rival}{star}"
    header = ["study", "arm", "cases", "seeds", *(word for one in figures for word in (one, "difference"))]
    table = [header, ["---"] * len(header), *lines.values()]
    return [
        *(f"| {' | '.join(row)} |" for row in table),
        "",
        "95 % intervals over cases and seeds; none below five cases. \\* shown, after Holm's adjustment in its study.",
    ]


def between(low: float | None, high: float | None, sign: str = "") -> str:
    """An interval in brackets, if there is one."""
    return "" if low is None or high is None else f" ({low:{sign}.3f} to {high:{sign}.3f})"


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
