"""After a change of code that must change no figure: whether some runs, made anew, give the scores of the kept records.

    OUT=evidence/again WORK=evidence/again SEEDS=0 results/classification.sh
    python results/same_code.py --kept results/runs/classification --repeated evidence/again/runs/classification

Where they do, to the last digit, a line in same_code.csv beside the kept records says so, and `make results-all` takes
those for finished still. At least one run of every task that is kept must be made anew, pre-training too.
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
from dino3d.study.same_code import SCORE_ROUNDING, add_same_code, codes_like, score_difference  # noqa: E402


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="same_code.py",
        usage="same_code.py --kept DIR --repeated DIR",
        description="Whether a changed code gives the scores of the records that are kept.",
    )
    group = parser.add_argument_group("records")
    group.add_argument(
        "--kept", type=Path, required=True, metavar="DIR", help="folder of records, as results/runs/NAME"
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


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    kept, repeated = (
        {(one["task"], one["arm"], one["seed"], one["part"]): one for one in read_records(folder, flag)}
        for flag, folder in (("--kept", args.kept), ("--repeated", args.repeated))
    )
    codes = {one["code"] for one in repeated.values()}
    if len(codes) != 1:
        raise UserError(f"--repeated {args.repeated}: was made by {len(codes)} versions of the code, expected one")
    code, known = codes.pop(), codes_like(args.kept, next(iter(repeated.values()))["code"])
    # Tables of features have no run of their own; a run that is kept for this code already shows nothing new
    pairs = {
        key: (kept[key], one)
        for key, one in repeated.items()
        if key in kept and one["seed"] is not None and kept[key]["code"] not in known
    }
    if not pairs:
        raise UserError(f"--repeated {args.repeated}: has no run of another version of the code in {args.kept}")
    for (task, arm, seed, part), (old, new) in pairs.items():
        run = f"{task} {arm} seed {seed} {part}".strip()
        if (old["recipe"], old["note"]) != (new["recipe"], new["note"]):
            raise UserError(f"{run}: was made anew with other flags or data, which say nothing of the code")
        if (largest := score_difference(old, new)) > SCORE_ROUNDING:
            raise UserError(f"{run}: its scores differ by {largest:.3g} from the kept ones: the code is not the same")
        print(f"{run}: the same scores")
    others = {old["code"] for old, _ in pairs.values()}
    for other in sorted(others):
        mine = [new for old, new in pairs.values() if old["code"] == other]
        tasks = {one["task"] for one in kept.values() if one["code"] == other and one["seed"] is not None}
        missing = sorted(tasks - {one["task"] for one in mine})
        trained = any(is_pretrained(one) for one in kept.values() if one["code"] == other)
        missing += [PRETRAIN] if trained and not any(map(is_pretrained, mine)) else []
        if missing:
            raise UserError(
                f"--repeated {args.repeated}: has no run of {', '.join(missing)} as version {other} made it"
            )
        add_same_code(args.kept, code, other, mine)
        print(f"code {code} gives what {other} gave: {len(mine)} runs, written to {args.kept}")


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
