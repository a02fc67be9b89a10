"""What a quarter of an hour of a GPU adds to the evidence: the small recipe at 20 times the samples, then vit_small.

    python results/gpu.py --data ../shared/data --output evidence/gpu --minutes 15
    python results/gpu.py --output evidence/gpu --evaluate

Both are pre-trained without the patients of half0, on windows of 24 mm, and judged on these patients by frozen features
on the way. vit_small sees 96 x 96 x 48 voxels and takes what time is left: epochs of it are measured, and as many are
run as fit. Start it again to resume. --evaluate needs no GPU: from the features that there are it writes `table.md`,
`curve.png` and `evaluation/report.html`, with random encoders and the radial profile beside.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags, number  # noqa: E402
from dino3d.files import TEXT, atomic_write, read_json, read_log, read_table, write_json  # noqa: E402
from results.curves import figure  # noqa: E402

CHECKOUT = Path(__file__).resolve().parent.parent
CURVE_POINTS = 6  # of each run, that the curve is drawn through, the last one its end
FEWEST_EPOCHS = 12  # of vit_small: fewer are no schedule
MEASURED_EPOCHS = 8  # of which the later half counts, when the loader has no head start any more
START_SECONDS = 90  # of data, imports and features, reckoned
RANDOM_ENCODERS = 5  # encoders beside each run


class Run(NamedTuple):
    """A pre-training, with flags beside those of recipes/nodules.txt."""

    name: str
    title: str
    batch: int
    flags: str

    @property
    def words(self) -> list[str]:
        return ["@recipes/nodules.txt", *self.flags.split(), "--batch_size_per_gpu", str(self.batch)]


LONG_MICRO = Run(
    "small", "vit_micro, the main table's recipe", 128, "--epochs 54 --lr 0.003"
)  # the recipe has 0.006 for 256
FINE_SMALL = Run(  # a token is 3 mm instead of 6, and a view the same 24 mm; 0.002 for a batch of 256
    "fine",
    "vit_small, 96x96x48 voxels",
    64,
    "--arch vit_small --patch_size 12 12 6 --input_size 96 96 48 --spacing 0.25 0.25 0.5 --drop_path_rate 0.1 "
    "--lr 0.0005 --momentum_teacher 0.996",
)
KEPT_ENCODER, KEPT_SAMPLES = "published_0000", 60_264  # the main table's encoder of seed 0: the curve's first point


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpu.py",
        usage="gpu.py --output DIR [flags]",
        description="Longer and larger pre-training than the evidence's, on a GPU, judged on patients unseen.",
    )
    group = parser.add_argument_group("what is run")
    group.add_argument(
        "--data", type=Path, default=CHECKOUT / "../shared/data", metavar="DIR", help="as make_data.py has it"
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="where all goes; resumes")
    group.add_argument(
        "--minutes",
        type=number(float, 1),
        default=15.0,
        metavar="F",
        help="in all; vit_small is given what the small recipe leaves of four fifths of them",
    )
    group.add_argument(
        "--times",
        type=number(int, 1),
        default=20,
        metavar="N",
        help="samples of the small recipe, times those of the main table",
    )
    group.add_argument("--evaluate", action="store_true", help="pre-train nothing, and judge what features there are")
    help_flags(group)
    return parser


def call_script(script: str, *flags: object) -> None:
    """SIGTERM goes on to it, Ctrl-C reaches it from the terminal. Raises UserError where it fails, whose reason it has
    printed itself."""
    child = subprocess.Popen(
        [sys.executable, str(CHECKOUT / script), *map(str, flags)],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    answers = {signal.SIGTERM: lambda *_: child.terminate(), signal.SIGINT: lambda *_: None}
    heeded = {one: signal.signal(one, answer) for one, answer in answers.items()}
    try:
        code = child.wait()
    finally:
        for one, before in heeded.items():
            signal.signal(one, before)
    if code:
        raise UserError(f"{script} ended with exit code {code}: what it did is kept, start the same command again")


def pretrain(output: Path, run: Run, name: str, *more: object) -> None:
    """Without half0's patients."""
    lists = output / "data/pool_without_half0.csv"
    call_script("main_dino.py", *run.words, *more, "--data_list", lists, "--output_dir", output / name)


def epochs_seconds(folder: Path) -> float:
    """What a run's epochs took."""
    return sum(record["seconds"] for record in read_log(folder / "log.txt"))


def fine_epochs(output: Path, minutes: float) -> int:
    """How many epochs of vit_small fit into the minutes that are left; 0: too few. What a former call found stands."""
    path, measured = output / "fine_epochs.json", output / "measured"
    if not path.is_file():
        left, epochs, rate = 48 * minutes - START_SECONDS - epochs_seconds(output / LONG_MICRO.name), 0, None
        if left > 60:
            pretrain(
                output, FINE_SMALL, "measured", "--epochs", MEASURED_EPOCHS, "--warmup_epochs", 1, "--saveckp_freq", 0
            )
            records = read_log(measured / "log.txt")
            rates = [record["volumes_per_second"] for record in records[MEASURED_EPOCHS // 2 :]]
            rate = sum(rates) / len(rates)
            seconds = FINE_SMALL.batch * records[0]["step"] / rate
            epochs = max(0, int((left - epochs_seconds(measured)) / seconds))
        write_json(path, {"epochs": epochs if epochs >= FEWEST_EPOCHS else 0, "samples_per_second": rate, "left": left})
    return read_json(path)["epochs"]


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


def extract(output: Path, name: str, weights: Path, *more: object) -> None:
    """Features of the pairs, once."""
    table = output / "features" / f"{name}.csv"
    done = table.with_suffix(".done")
    if not done.is_file():
        begun = [*table.parent.glob(f"{name}.*"), *table.parent.glob(f".{name}.*")]
        for one in begun:  # maybe on another device, which is refused
            shutil.rmtree(one) if one.is_dir() else one.unlink()
        flags = ("--weights", weights, "--input", unseen_pairs(output), "--output", table, "--pool", "cls+centre")
        call_script("extract_features.py", *flags, *more)
        done.touch()


def extract_run(output: Path, run: Run) -> None:
    """Features of a run's copies and its end, called by the samples that it has seen."""
    folder = output / run.name
    steps = {record["epoch"]: record["step"] for record in read_log(folder / "log.txt")}
    end = max(steps)
    copies = {int(path.stem.removeprefix("checkpoint")): path for path in folder.glob("checkpoint[0-9]*.pth")}
    for epoch, path in sorted((copies | {end: folder / "checkpoint.pth"}).items()):
        name = f"{run.name}_{steps[epoch] * run.batch}"
        extract(output, name, path, *(("--random", RANDOM_ENCODERS, "--trivial") if epoch == end else ()))


def evaluate(output: Path) -> None:
    """Judge all features that there are, and write the table and the figure. Raises UserError where there are none."""
    done = [path.with_suffix(".csv") for path in sorted((output / "features").glob("*.done"))]
    if not done:
        raise UserError(f"--output {output}: has no features yet; run it without --evaluate, on a GPU")
    beside = sorted(output.glob("features/*.random0.csv"))
    groups = [str(path).replace(".random0.csv", ".random*.csv") for path in beside]
    hand = sorted(output.glob("features/*.trivial-radial.csv"))[:1]
    call_script(
        "evaluate_features.py",
        *("--features", *done, *hand, *(("--group", *groups) if groups else ())),
        *("--labels", unseen_pairs(output), "--curves", "off", "--output_dir", output / "evaluation"),
    )
    tell(output)


def tell(output: Path) -> None:
    """Write table.md and curve.png from the evaluation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    auc = {
        row["table"]: tuple(float(row[name]) for name in ("value", "low", "high"))
        for row in read_table(output / "evaluation/metrics.csv")
        if (row["protocol"], row["metric"]) == ("logistic", "auc")
    }
    lines = ["| | samples | AUC (95 % interval) |", "| --- | --- | --- |"]
    drawing = Figure((5.6, 3.8), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    for run, colour in ((LONG_MICRO, "tab:blue"), (FINE_SMALL, "tab:orange")):
        points = [
            (int(name.partition("_")[2]), *figures)
            for name, figures in auc.items()
            if name.startswith(f"{run.name}_") and "." not in name
        ]
        if run is LONG_MICRO and KEPT_ENCODER in auc:
            points.append((KEPT_SAMPLES, *auc[KEPT_ENCODER]))
        if not points:
            lines.append(f"| {run.title} | not run | |")
            continue
        points.sort()
        lines += [f"| {run.title} | {seen:,} | {figure(figures)} |" for seen, *figures in points]
        seen, mean, low, high = zip(*points)
        off = [[m - bound for m, bound in zip(mean, low)], [bound - m for m, bound in zip(mean, high)]]
        axes.errorbar(seen, mean, off, fmt="o-", capsize=3, color=colour, label=run.title)
        for name, figures in auc.items():
            if name.startswith(f"mean of {RANDOM_ENCODERS}: {run.name}_"):
                lines.append(f"| {run.title}: {RANDOM_ENCODERS} random encoders | 0 | {figure(figures)} |")
                axes.axhline(figures[0], color=colour, linestyle="--", label="random encoders of the same")
    for name, figures in auc.items():
        if name.endswith(".trivial-radial"):
            lines.append(f"| radial profile by hand | | {figure(figures)} |")
            axes.axhline(figures[0], color="0.5", linestyle=":", label="radial profile by hand")
    axes.set(xlabel="samples of pre-training", ylabel="AUC, 95 % interval", xlim=(0, None))
    axes.legend(loc="lower right", fontsize=8)
    with atomic_write(output / "curve.png") as part:
        drawing.savefig(part, dpi=150, format="png")
    lines += ["", "Frozen, 47 patients of half0, one seed of each run: intervals are over patients alone."]
    with atomic_write(output / "table.md") as part:
        part.write_text("\n".join(lines) + "\n", **TEXT)
    print(*lines, f"figure       {output / 'curve.png'}", sep="\n")


def require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("no GPU is visible, without which this takes days; --evaluate judges what a GPU has left")


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    output = args.output.resolve()
    if not args.evaluate:
        require_gpu()
        call_script("results/make_data.py", "--data", args.data.resolve(), "--output", output / "data")
        extract(output, KEPT_ENCODER, CHECKOUT / "results/weights/nodules_without_half0.safetensors")
        pretrain(
            output,
            LONG_MICRO,
            LONG_MICRO.name,
            "--patches_per_volume",
            args.times,
            "--saveckp_freq",
            54 // CURVE_POINTS,
        )
        extract_run(output, LONG_MICRO)
        epochs = fine_epochs(output, args.minutes)
        print(
            f"vit_small: {epochs or f'fewer than {FEWEST_EPOCHS}'} epochs fit into the minutes that are left",
            flush=True,
        )
        if epochs:
            warmup = max(1, epochs // 10)
            copies = -(-epochs // CURVE_POINTS)
            pretrain(
                output,
                FINE_SMALL,
                FINE_SMALL.name,
                "--epochs",
                epochs,
                "--warmup_epochs",
                warmup,
                "--saveckp_freq",
                copies,
            )
            extract_run(output, FINE_SMALL)
    evaluate(output)


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
