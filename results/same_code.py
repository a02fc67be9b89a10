"""After a change of code that must change no figure: whether some runs, made anew, give the scores of the kept records.

    OUT=evidence/again WORK=evidence/again SEEDS=0 results/classification.sh
    python results/same_code.py --kept results/runs/* --repeated evidence/again/runs/classification

Where they do, to the last of seven digits, a line in same_code.csv beside the kept records says so, and
`make results-all` takes those for finished still. Of every stage that is kept one run at least must be made anew, of
pre-training too.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags  # noqa: E402
from dino3d.study.definition import PRETRAIN  # noqa: E402
from dino3d.study.jobs import UNTRAINED  # noqa: E402
from dino3d.study.records import read_records  # noqa: E402
from dino3d.study.same_code import SCORE_ROUNDING, add_same_code, score_difference  # noqa: E402
from dino3d.study.scores import FIGURES  # noqa: E402


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="same_code.py",
        usage="same_code.py --kept DIR [DIR ...] --repeated DIR",
        description="Whether a changed code gives the scores of the records that are kept.",
    )
    group = parser.add_argument_group("records")
    group.add_argument(
        "--kept",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of records, as results/runs/NAME; a stage that was made anew for one counts for all",
    )
    group.add_argument(
        "--repeated", type=Path, required=True, metavar="DIR", help="records of some of its runs, made anew"
    )
    help_flags(group)
    return parser


def is_pretrained(record: dict[str, Any]) -> bool:
    """Whether a run began with a pre-training of its own, and not with given or untrained weights."""
    flags = record["flags"].get(PRETRAIN, "")
    return bool(flags) and not flags.endswith(shlex.join(UNTRAINED))


def stages_of(record: dict[str, Any]) -> set[str]:
    """The stages whose code a record's scores come from."""
    task = next(stage for stage, figures in FIGURES.items() if record["task"] in figures)
    return {task, *([PRETRAIN] if is_pretrained(record) else [])}


def same_runs(kept: Sequence[dict[str, Any]], repeated: Sequence[dict[str, Any]]) -> list[tuple[dict, dict]]:
    """(kept, made anew by another version of the code) of each run that both have, with the same scores. Raises
    UserError for other scores, and for a run that is kept with other flags alone."""
    of_run, pairs = {}, []
    for one in kept:
        of_run.setdefault((one["task"], one["arm"], one["seed"], one["part"]), []).append(one)
    for new in repeated:
        run = new["task"], new["arm"], new["seed"], new["part"]
        if new["seed"] is None or run not in of_run:  # tables of features have no run of their own
            continue
        name = "{} {} seed {} {}".format(*run).strip()
        same = [old for old in of_run[run] if (old["recipe"], old["note"]) == (new["recipe"], new["note"])]
        if not same:
            raise UserError(f"{name}: was made anew with other flags or data, which say nothing of the code")
        for old in [one for one in same if one["code"] != new["code"]]:
            if (largest := score_difference(old, new)) > SCORE_ROUNDING:
                raise UserError(
                    f"{name}: its scores differ by {largest:.3g} from the kept ones: the code is not the same"
                )
            print(f"{name}: the same scores")
            pairs.append((old, new))
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    kept = {folder: read_records(folder, "--kept") for folder in args.kept}
    repeated = read_records(args.repeated, "--repeated")
    codes = {one["code"] for one in repeated}
    if len(codes) != 1:
        raise UserError(f"--repeated {args.repeated}: was made by {len(codes)} versions of the code, expected one")
    code = codes.pop()
    pairs = same_runs([one for records in kept.values() for one in records], repeated)
    if not pairs:
        raise UserError(f"--repeated {args.repeated}: has no run of another version of the code in --kept")
    lacking = []
    for other in sorted({old["code"] for old, _ in pairs}):
        mine = [new for old, new in pairs if old["code"] == other]
        shown = set.union(*map(stages_of, mine))
        for folder, records in kept.items():
            theirs = [one for one in records if one["code"] == other and one["seed"] is not None]
            needed = [stages_of(one) for one in theirs if code not in one["like"]]  # what is written there stays
            if missing := sorted(set().union(*needed) - shown):
                lacking.append(
                    f"{folder}: version {other} has made {', '.join(missing)}, of which nothing was made anew"
                )
            elif needed:
                add_same_code(folder, code, other, mine)
                print(f"code {code} gives what {other} gave: {len(mine)} runs, written to {folder}")
    if lacking:
        raise UserError(lacking[0] + (f" ({len(lacking)} such)" if len(lacking) > 1 else ""))


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
