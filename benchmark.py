"""How fast the parts are, each against a baseline in the same run: what the README's speed table was made with.

    python benchmark.py augment                  ten views of a sample on one core, against MONAI's transforms
    python benchmark.py augment --device cuda    the same views on the GPU, the baseline still on one core
    python benchmark.py read                     a random patch of a scan, against gzip ITK files, NIfTI and others
    python benchmark.py peers --install DIR      views and reads against the best that a user could pick instead
    python benchmark.py convert                  a DICOM series into the layout, against SimpleITK
    python benchmark.py data                     from the disk to a batch of views
    python benchmark.py loader --against FOLDER  a loader's worker, against that of another checkout
    python benchmark.py step                     a whole training step on ready views, time and memory
    python benchmark.py train                    main_dino.py from the disk, against a plain loader and step
    python benchmark.py infer                    a volume through a segmentation network, window by window
    python benchmark.py growth --output FILE     how a step's cost grows, as a picture
    python benchmark.py scale                    what many volumes and ranks cost besides the steps, simulated
    python benchmark.py gpu                      all that a GPU has to show, its tests first, in ten minutes

Seconds are wall-clock, of peers and scale those of the CPU. What is timed stands in dino3d/benchmarks/, and there in
baselines.py what it is compared with. Baseline and ours take turns, so that a machine that slows down slows both;
reported are medians over the repeats, with the lowest and highest. With --json the last line on standard output is one
JSON object.

A further benchmark is a function there that returns `comparison(...)`, and a sub-command here with its flags.
"""

import dino3d.openmp  # noqa: F401  before torch is loaded

# isort: split

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# NumPy's linear algebra reads these when it is first imported; torch is told in main, by --threads
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch

import utils
from dino3d import command_line
from dino3d.benchmarks import baselines
from dino3d.benchmarks.conversion import convert
from dino3d.benchmarks.gpu import gpu
from dino3d.benchmarks.inference import infer
from dino3d.benchmarks.loader import data, loader
from dino3d.benchmarks.peer_comparison import peers
from dino3d.benchmarks.reading import read
from dino3d.benchmarks.scale import scale
from dino3d.benchmarks.scans import GLOBAL, SCAN_SIZE
from dino3d.benchmarks.step import PATCH_SIZE, step
from dino3d.benchmarks.training import growth, train
from dino3d.benchmarks.turns import device_label, print_report
from dino3d.benchmarks.views import augment, views
from dino3d.command_line import UserError, number
from dino3d.files import versions
from dino3d.mixed_precision import multiplies_bf16
from vision_transformer import ARCHITECTURES


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="benchmark.py",
        usage="benchmark.py what [flags]",
        description="Times a part of this repository against a baseline. The flags of each: benchmark.py what --help",
    )
    commands = parser.add_subparsers(title="what to time", prog=parser.prog, dest="what", metavar="what", required=True)
    command_line.help_flags(parser.add_argument_group("help"))

    def command(
        benchmark: Callable[..., dict[str, Any]], repeats: int, devices: list[str], threads: list[int] | None = None
    ) -> tuple[command_line.ArgumentParser, Any]:
        name, text = benchmark.__name__, benchmark.__doc__.splitlines()[0]
        sub = commands.add_parser(name, usage=f"{parser.prog} {name} [flags]", help=text, description=text)
        sub.set_defaults(benchmark=benchmark)
        timed, group = sub.add_argument_group("what is timed"), sub.add_argument_group("options")
        group.add_argument(
            "--device",
            default="cpu",
            choices=devices,
            help=f"where ours runs: {' or '.join(devices)}; views of the baseline are made on the CPU",
        )
        group.add_argument(
            "--threads", default=1, type=number(int, 1), choices=threads, help="CPU threads, of the baseline as of ours"
        )
        group.add_argument("--repeats", default=repeats, type=number(int, 1), help="turns that each side takes")
        group.add_argument("--json", action="store_true", help="end with one line of JSON")
        command_line.help_flags(group)
        return sub, timed

    xyz = command_line.XYZ
    sub, group = command(augment, 10, ["cpu", "cuda"])
    group.add_argument(
        "--samples",
        default=1,
        type=number(int, 1),
        help="samples of the baseline per repeat, besides two batches of ours; more even out what is drawn",
    )
    sub, group = command(views, 5, ["cpu", "cuda"])
    model_flags(sub, group, 2, 64)
    for flag, default, text in (
        ("--input_size", GLOBAL, "voxels of a global view"),
        ("--patch_size", PATCH_SIZE, "voxels of a token; local views have 2 x 2 x 2 or 3 x 3 x 3 of them"),
    ):
        group.add_argument(flag, default=default, nargs=3, type=number(int, 1), metavar=xyz, help=text)
    sub, group = command(read, 7, ["cpu"], [1])
    group.add_argument(
        "--reads", default=4, type=number(int, 1), help="patches per repeat, each from a file opened for it"
    )
    group.add_argument(
        "--size",
        default=SCAN_SIZE,
        nargs=3,
        type=number(int, max(baselines.PATCH)),
        metavar=xyz,
        help="voxels of the scan that patches are read from; the default is a usual chest CT's",
    )
    sub, group = command(peers, 7, ["cpu"], [1])
    group.add_argument(
        "--install",
        metavar="DIR",
        help="folder for the packages that are compared with, installed there if they are missing (about 300 MB from "
        "the network); without it rows of missing packages say so",
    )
    sub, group = command(convert, 5, ["cpu"], [1])
    group.add_argument(
        "--size",
        default=SCAN_SIZE,
        nargs=3,
        type=number(int, 16),
        metavar=xyz,
        help="voxels of the scan, one DICOM file per z; the default is a usual chest CT's",
    )
    sub, group = command(data, 7, ["cpu", "cuda"])
    group.add_argument("--samples", default=1, type=number(int, 1), help="samples of the baseline per repeat")
    sub, group = command(loader, 3, ["cpu"], [1])
    group.add_argument(
        "--against",
        default=str(Path(__file__).resolve().parent),
        metavar="FOLDER",
        help="checkout whose main_dino.py is compared with this one's; default: this one, on files without an index",
    )
    group.add_argument(
        "--augmentations", default=3, type=int, choices=(3, 6), help="how many of the paper's augmentations are on"
    )
    group.add_argument("--batch_size", default=64, type=number(int, 1), help="samples of a batch")
    group.add_argument("--batches", default=6, type=number(int, 3), help="per repeat; the first two are not counted")
    group.add_argument("--volumes", default=8, type=number(int, 1), help="files of 50 MB, with eight names each")
    group.add_argument("--folder", default=None, metavar="DIR", help="where they are written; default: the system's")
    model_flags(*command(step, 5, ["cpu", "cuda"]), 2, 64)
    sub, group = command(train, 1, ["cpu", "cuda"])
    model_flags(sub, group, 2, 64)
    group.add_argument(
        "--steps",
        default=None,
        type=number(int, 1),
        help="steps of each epoch; one per repeat and two more, of which the first is not counted; "
        "default: 6 on a CPU, 150 on a GPU",
    )
    group.add_argument(
        "--workers",
        default=None,
        type=number(int, 0),
        help="data loading workers of ours; the baseline has as many as there are cores; default: main_dino.py's",
    )
    sub, group = command(infer, 3, ["cpu", "cuda"])
    network_flags(sub, group, 1, 8)
    group.add_argument(
        "--size",
        default=[192, 192, 96],
        nargs=3,
        type=number(int, 1),
        metavar=xyz,
        help="voxels of the volume, on the network's own grid",
    )
    sub, group = command(growth, 3, ["cpu", "cuda"])
    model_flags(sub, group, 1, 32)
    group.add_argument("--output", default="growth.png", metavar="FILE", help="picture to write")
    sub, group = command(scale, 3, ["cpu"])
    group.add_argument("--volumes", default=130_000, type=number(int, 64), help="volumes, for which empty files stand")
    group.add_argument("--ranks", default=64, type=number(int, 2), help="ranks, two of which are processes here")
    group.add_argument("--patches_per_volume", default=8, type=number(int, 1), help="as of main_dino.py")
    group.add_argument(
        "--arch", default="vit_small", type=command_line.architecture(ARCHITECTURES), help="whose checkpoint is meant"
    )
    group.add_argument("--out_dim", default=65536, type=number(int, 2), help="prototypes of the head")
    sub, group = command(gpu, 10, ["cuda"])
    sub.set_defaults(device="cuda")
    group.add_argument(
        "--minutes", default=10.0, type=number(float, 0.1), help="what is not reached in them is left out, and said so"
    )
    return parser


def network_flags(sub: command_line.ArgumentParser, group: Any, batch_cpu: int, batch_cuda: int) -> None:
    sub.set_defaults(batch={"cpu": batch_cpu, "cuda": batch_cuda})
    group.add_argument(
        "--arch",
        default="vit_small",
        type=command_line.architecture(ARCHITECTURES),
        help="one of " + ", ".join(ARCHITECTURES),
    )
    group.add_argument(
        "--batch_size",
        default=None,
        type=number(int, 1),
        help=f"samples (infer: windows) at a time; default: {batch_cpu} on a CPU, {batch_cuda} on a GPU",
    )
    group.add_argument(
        "--precision",
        default=None,
        choices=("bf16", "fp32"),
        help="mixed precision of the matrix products, of the baseline as of ours: bf16 or fp32 (off); "
        "default: bf16 on GPUs and CPUs that multiply in it, fp32 on other CPUs",
    )


def model_flags(sub: command_line.ArgumentParser, group: Any, batch_cpu: int, batch_cuda: int) -> None:
    network_flags(sub, group, batch_cpu, batch_cuda)
    group.add_argument("--out_dim", default=65536, type=number(int, 2), help="prototypes of the head")
    group.add_argument("--compile", action="store_true", help="ours with main_dino.py's --compile")


def main() -> None:
    args = vars(get_args_parser().parse_args())
    what, benchmark, as_json, threads = (args.pop(name) for name in ("what", "benchmark", "json", "threads"))
    if args["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    torch.set_num_threads(threads)
    if "batch" in args:
        default = args.pop("batch")[args["device"]]
        args["batch_size"] = args["batch_size"] or default
        args["precision"] = args["precision"] or ("bf16" if args["device"] == "cuda" or multiplies_bf16() else "fp32")
    result = {
        "what": what,
        **benchmark(**args),
        "threads": threads,
        "device": args["device"],
        "device_name": device_label(args["device"]),
        "versions": {**versions(), "SimpleITK": version("SimpleITK")},
    }
    print_report(result)
    if as_json:
        print(json.dumps(result))


if __name__ == "__main__":
    utils.run_script(main)
