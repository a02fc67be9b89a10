"""Whether a repeated table agrees with the one that is kept: each arm's figure beside the seeds of the kept one.

    python results/repeated.py --kept results/classification --repeated evidence/repeated/classification

Other processors round otherwise, so that the same seed gives nearly, not exactly, the same figure. The spread of seeds
is their standard deviation, of all arms of a task together; a figure further than MOST_SPREADS of them from the mean
of the kept seeds ends with exit code 1. So does an arm that is kept and was not repeated, but for ensembles, which take
two seeds.
"""

import collections
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags, truncate_list  # noqa: E402
from dino3d.files import read_rows, read_table  # noqa: E402
from dino3d.study.ensembles import ensemble_name  # noqa: E402

MOST_SPREADS = 3
KEPT_AS = {"published": "nodules"}  # arms that are called otherwise in the kept table


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="repeated.py",
        usage="repeated.py --kept DIR --repeated DIR",
        description="Whether a repeated table of the evidence agrees with the one that is kept.",
    )
    group = parser.add_argument_group("tables")
    group.add_argument("--kept", type=Path, required=True, metavar="DIR", help="folder with seeds.csv that is kept")
    group.add_argument("--repeated", type=Path, required=True, metavar="DIR", help="folder with the repeated seeds.csv")
    help_flags(group)
    return parser


def read_seeds(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """{(task, arm): {seed: figure}} of a table's seeds.csv. Raises UserError."""
    found = collections.defaultdict(dict)
    try:
        for row in read_table(folder / "seeds.csv"):
            found[row["task"], row["arm"]][row["seed"]] = value = float(row["value"])
            if not 0 <= value <= 1:  # AUC and Dice
                raise ValueError(f"{row['arm']} seed {row['seed']} has the value {row['value']}")
    except (OSError, KeyError, ValueError) as error:
        why = getattr(error, "strerror", None) or repr(error)
        raise UserError(f"{folder / 'seeds.csv'}: can't be read ({why}), expected that of study.py") from error
    return found


def data_of(folder: Path) -> set[str]:
    """Which data the runs of a table are of, as its runs.csv notes; none where it is not there. Raises UserError."""
    path = folder / "runs.csv"
    return {row["note"] for _, row in read_rows(path, ["note"])} if path.is_file() else set()


def spread_of_seeds(kept: dict[tuple[str, str], dict[str, float]], task: str) -> float | None:
    """Standard deviation over seeds, of all arms of a task together; None where no arm has two that differ."""
    # tables of features and ensembles have one figure for all seeds
    arms = [list(seeds.values()) for (one, _), seeds in kept.items() if one == task and len(set(seeds.values())) > 1]
    squares = sum(np.var(values) * len(values) for values in arms)
    return float(np.sqrt(squares / sum(len(values) - 1 for values in arms))) if arms else None


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    kept, repeated = read_seeds(args.kept), read_seeds(args.repeated)
    notes = data_of(args.kept), data_of(args.repeated)
    if all(notes) and notes[0] != notes[1]:
        of_kept, of_repeated = (", ".join(sorted(found)) for found in notes)
        print(f"the kept table is of {of_kept}, this one of {of_repeated}: not compared")
        return
    ensembles = {(task, ensemble_name(arm)) for task, arm in kept}
    missing = kept.keys() - ensembles - {(task, KEPT_AS.get(arm, arm)) for task, arm in repeated}
    odd, compared = [], 0
    for (task, arm), seeds in sorted(repeated.items()):
        others = kept.get((task, KEPT_AS.get(arm, arm)))
        spread = spread_of_seeds(kept, task)
        if others is None or spread is None:
            print(f"{task} {arm}: nothing is kept to compare it with")
            continue
        value, mean = np.mean(list(seeds.values())), np.mean(list(others.values()))
        same = [f"seed {seed} kept {others[seed]:.4f}" for seed in seeds if seed in others]
        print(
            f"{task} {arm}: {value:.4f}; kept {mean:.4f} ({min(others.values()):.4f} to {max(others.values()):.4f}), "
            f"{', '.join([*same, f'{abs(value - mean) / spread:.1f} spreads away'])}"
        )
        compared += 1
        odd += [f"{task} {arm}"] if abs(value - mean) > MOST_SPREADS * spread else []
    for task, arm in sorted(missing):
        print(f"{task} {arm}: is kept and was not repeated")
    if odd:
        raise UserError(
            f"{args.repeated}: {', '.join(odd)}: further than {MOST_SPREADS} spreads of seeds from what is kept"
        )
    if not compared:
        raise UserError(f"{args.repeated}: has no arm of {args.kept}")
    if missing:
        names = truncate_list([f"{task} {arm}" for task, arm in sorted(missing)])
        raise UserError(f"{args.repeated}: lacks {names}, which {args.kept} has: repeat them too")
    print(f"all {compared} within {MOST_SPREADS} spreads of seeds")


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
