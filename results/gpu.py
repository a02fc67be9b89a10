"""What a quarter of an hour of a GPU adds to the evidence: the small recipe at 20 times the samples, then vit_small.

    python results/gpu.py --data ../shared/data --output evidence/gpu --minutes 15

Both are pre-trained without the patients of half0, on windows of 24 mm, and judged on these patients by frozen features
on the way: `curve.png`, `table.md` and `evaluation/report.html`, random encoders and the radial profile beside.
vit_small sees 96 x 96 x 48 voxels and takes what time is left: an epoch of it is measured, and as many are run as fit.
Start it again to resume; the evaluation, minutes of a core, needs no GPU, and a copy of the folder is enough for it.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags, number  # noqa: E402
from dino3d.files import TEXT, atomic_write, read_json, read_log, read_table, write_json  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = 6  # of each run, that the curve is drawn through
FEWEST_EPOCHS = 12  # of vit_small, at least: fewer are no schedule
# Beside recipes/nodules.txt, whose rate is 0.006 for a batch of 256
SMALL = "--epochs 54 --batch_size_per_gpu 128 --lr 0.003"
# A token is 3 mm instead of 6, and a view the same 24 mm
FINE = (
    "--arch vit_small --patch_size 12 12 6 --input_size 96 96 48 --spacing 0.25 0.25 0.5 --drop_path_rate 0.1 "
    "--batch_size_per_gpu 64 --lr 0.0005 --momentum_teacher 0.996"
)


class Run(NamedTuple):
    """A pre-training. name: of its folder; flags: after the recipe's"""

    name: str
    flags: list[str]


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpu.py",
        usage="gpu.py --output DIR [flags]",
        description="Longer and larger pre-training than the evidence's, on a GPU, judged on patients unseen.",
    )
    group = parser.add_argument_group("what is run")
    group.add_argument(
        "--data", type=Path, default=ROOT / "../shared/data", metavar="DIR", help="as make_data.py has it"
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="where all goes; resumes")
    group.add_argument(
        "--minutes",
        type=number(float, 1),
        default=15.0,
        metavar="F",
        help="in all; vit_small is given what the small recipe leaves of them, less a fifth for tables",
    )
    group.add_argument(
        "--times",
        type=number(int, 1),
        default=20,
        metavar="N",
        help="samples of the small recipe, times those of the main table",
    )
    help_flags(group)
    return parser


def run_script(script: str, *flags: object) -> None:
    """Raises UserError where it fails, whose reason it has printed itself."""
    words = [sys.executable, str(ROOT / script), *map(str, flags)]
    if code := subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
        raise UserError(f"{script} ended with exit code {code}: what it did is kept, start the same command again")


def pretrain(output: Path, run: Run) -> None:
    """From the recipe without half0's patients, with CHECKPOINTS copies on the way."""
    lists = output / "data/pool_without_half0.csv"
    run_script(
        "main_dino.py", "@recipes/nodules.txt", *run.flags, "--data_list", lists, "--output_dir", output / run.name
    )


def fine_epochs(output: Path, left: float) -> int:
    """How many epochs of vit_small fit into so many seconds, after one that warms up and one that is measured; what a
    former call has found stands. Raises UserError where they would be no schedule."""
    path = output / "fine_epochs.json"
    if not path.is_file():
        epochs, seconds = 0, None
        if left > 60:
            began, measured = (
                time.monotonic(),
                Run("measured", [*FINE.split(), "--epochs", "2", "--warmup_epochs", "1"]),
            )
            pretrain(output, measured)
            seconds = read_log(output / measured.name / "log.txt")[-1]["seconds"]
            left -= 1.5 * (time.monotonic() - began)  # what it took, and starting once more
            epochs = max(int(left / seconds), 0)
        write_json(path, {"epochs": epochs, "seconds_of_an_epoch": seconds, "seconds_left": left})
    found = read_json(path)
    print(
        f"vit_small: {found['seconds_left']:.0f} s left, {found['seconds_of_an_epoch']} s an epoch: {found['epochs']} "
        "epochs",
        flush=True,
    )
    if found["epochs"] < FEWEST_EPOCHS:
        raise UserError(
            f"{path}: {found['epochs']} epochs, expected {FEWEST_EPOCHS} or more; remove it for more --minutes"
        )
    return found["epochs"]


def unseen_pairs(output: Path) -> Path:
    """A folder of the pairs of half0's patients alone, in the classification layout."""
    folder, part = output / "pairs_of_half0", output / "pairs_of_half0.part"
    if not folder.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        for name in (output / "data/half0.txt").read_text(**TEXT).split():
            for patient in sorted((output / "data/pairs").glob(f"subset*/label*/{name}")):
                shutil.copytree(patient, part / patient.relative_to(output / "data/pairs"))
        part.rename(folder)
    return folder


def extract(output: Path, run: Run, pairs: Path) -> dict[str, int]:
    """Features of a run's copies and its end. Returns {table: steps of pre-training}."""
    folder, tables = output / run.name, {}
    steps = {record["epoch"]: record["step"] for record in read_log(folder / "log.txt")}
    end = max(steps)
    copies = {int(path.stem.removeprefix("checkpoint")): path for path in folder.glob("checkpoint[0-9]*.pth")}
    for epochs, path in sorted((copies | {end: folder / "checkpoint.pth"}).items()):
        name = f"{run.name}_{epochs:04d}"
        tables[name] = steps[epochs]
        beside = ("--random", 5, "--trivial") if epochs == end else ()
        run_script(
            "extract_features.py",
            *("--weights", path, "--input", pairs, "--output", output / f"features/{name}.csv"),
            *("--pool", "cls+centre", *beside),
        )
    return tables


def tell(output: Path, batches: dict[str, int], found: dict[str, dict[str, int]]) -> None:
    """Write table.md and curve.png. batches: {run: samples of a step}; found: {run: {table: steps}}"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    auc = {
        row["table"]: [float(row[name]) for name in ("value", "low", "high")]
        for row in read_table(output / "evaluation/metrics.csv")
        if (row["protocol"], row["metric"]) == ("logistic", "auc")
    }
    named = lambda words: next(values for table, values in auc.items() if words in table)  # noqa: E731
    lines = ["| | samples | AUC (95 % interval) |", "| --- | --- | --- |"]
    drawing = Figure((5.2, 3.6), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    for (run, tables), colour in zip(found.items(), ("tab:blue", "tab:orange")):
        beside = named(f"{list(tables)[-1]}.random")
        points = [(steps * batches[run], *auc[table]) for table, steps in tables.items()]
        lines += [f"| {run} | {seen:,} | {mean:.3f} ({low:.3f} to {high:.3f}) |" for seen, mean, low, high in points]
        lines.append(f"| {run}, five random encoders | 0 | {beside[0]:.3f} ({beside[1]:.3f} to {beside[2]:.3f}) |")
        seen, mean, low, high = zip(*points)
        off = [[m - bound for m, bound in zip(mean, low)], [bound - m for m, bound in zip(mean, high)]]
        axes.errorbar(seen, mean, off, fmt="o-", capsize=3, color=colour, label=run)
        axes.axhline(beside[0], color=colour, linestyle="--", label=f"{run}, random encoders")
    hand = named("trivial-radial")
    lines.append(f"| radial profile by hand | | {hand[0]:.3f} ({hand[1]:.3f} to {hand[2]:.3f}) |")
    axes.axhline(hand[0], color="0.5", linestyle=":", label="radial profile by hand")
    axes.set(xlabel="samples of pre-training", ylabel="AUC, 95 % interval", xlim=(0, None))
    axes.legend(loc="lower right", fontsize=8)
    with atomic_write(output / "curve.png") as part:
        drawing.savefig(part, dpi=150, format="png")
    with atomic_write(output / "table.md") as part:
        part.write_text("\n".join(lines) + "\n", **TEXT)
    print(*lines, f"figure       {output / 'curve.png'}", sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    began, output = time.monotonic(), args.output
    run_script("results/make_data.py", "--data", args.data, "--output", output / "data")
    copies = ["--saveckp_freq", str(54 // CHECKPOINTS)]
    runs = [Run("small", [*SMALL.split(), "--patches_per_volume", str(args.times), *copies])]
    pretrain(output, runs[0])
    try:
        epochs = fine_epochs(output, 48 * args.minutes - (time.monotonic() - began))
    except UserError as error:
        print(f"vit_small is left out: {error}", flush=True)
    else:
        copies = ["--saveckp_freq", str(-(-epochs // CHECKPOINTS))]
        warmup = ["--warmup_epochs", str(max(1, epochs // 10))]
        runs.append(Run("fine", [*FINE.split(), "--epochs", str(epochs), *warmup, *copies]))
        pretrain(output, runs[1])
    pairs = unseen_pairs(output)
    found = {run.name: extract(output, run, pairs) for run in runs}
    tables = [output / f"features/{name}.csv" for mine in found.values() for name in mine]
    hand = output / f"features/{list(found['small'])[-1]}.trivial-radial.csv"
    groups = [output / f"features/{list(mine)[-1]}.random*.csv" for mine in found.values()]
    run_script(
        "evaluate_features.py",
        *("--features", *tables, hand, "--group", *groups, "--labels", pairs),
        *("--curves", "off", "--output_dir", output / "evaluation"),
    )
    tell(output, {"small": 128, "fine": 64}, found)


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
