"""Bring data sets, as they are downloaded, into the layouts that the training scripts read; one sub-command each.

    python prepare_data.py nlst   --input NLST --output data/nlst            DICOM series, NIfTI, MetaImage, NRRD
    python prepare_data.py luna16 --input LUNA16 --output data/luna16        crops around the points of a table
    python prepare_data.py msd    --input Task06_Lung --output data/msd      images and label masks
    python prepare_data.py check  data/luna16                                what the training scripts would say of it
    python prepare_data.py index  data/nlst                                  where body, lung and chunks lie
    python prepare_data.py demo   --output demo/data                         small data in all three layouts
    python prepare_data.py phantoms --output phantoms                        synthetic chests to try a study on

Everything is brought to RAS and int16 Hounsfield units. A run that was stopped in any way resumes where it was when it
is started again. What became of every input stands in manifest.csv.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dino3d.command_line import XYZ, ArgumentParser, UserError, available_cores, exit_status, help_flags, number
from dino3d.data.conventions import DataError, format_size
from dino3d.data.hdf5 import FILTERS
from dino3d.finetune.splits import patient_splits
from dino3d.prepare.check import check
from dino3d.prepare.demo import demo
from dino3d.prepare.index import index
from dino3d.prepare.luna16 import luna16
from dino3d.prepare.msd import msd
from dino3d.prepare.nlst import nlst
from dino3d.prepare.phantom_study import make_phantoms


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="prepare_data.py",
        usage="prepare_data.py command --input DIR --output DIR [flags]",
        description="Bring data sets into the layouts that the training scripts read. Start the same command again to "
        "resume, or to take in what changed. The flags of a command: prepare_data.py command --help",
    )
    commands = parser.add_subparsers(
        title="commands", prog=parser.prog, dest="command", metavar="command", required=True
    )
    help_flags(parser.add_argument_group("help"))
    for add in (add_nlst, add_luna16, add_msd, add_check, add_index, add_demo, add_phantoms):
        add(commands)
    return parser


def add_command(commands: Any, name: str, run: Callable[..., None], summary: str, usage: str) -> tuple[Any, Any]:
    """A sub-command; returns its groups of required and other flags."""
    sub = commands.add_parser(name, help=summary, usage=f"prepare_data.py {name} {usage}", description=summary)
    sub.set_defaults(run=run)
    return sub.add_argument_group("required"), sub.add_argument_group("options")


def add_conversion(commands: Any, name: str, convert: Callable[..., None], summary: str, source: str) -> Any:
    """A sub-command that converts an input to an output; returns its group of other flags."""
    required, options = add_command(commands, name, convert, summary, "--input DIR --output DIR [flags]")
    required.add_argument(
        "--input", type=Path, required=True, metavar="DIR", help=source + "; nothing in it is changed"
    )
    required.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write to; start again with the same one to resume or to take in what changed",
    )
    return options


def add_worker_flags(options: Any) -> None:
    options.add_argument(
        "--workers",
        type=number(int, 1),
        default=available_cores(),
        help="processes, each with one volume in memory (0.3 to 1 GB); fewer when memory runs "
        "out; the result is the same for any number",
    )
    help_flags(options)


def add_nlst(commands: Any) -> None:
    options = add_conversion(
        commands,
        "nlst",
        nlst,
        "CT scans into <patient>/t<k>/<series>.hdf5, for pre-training",
        "folder with DICOM series, NIfTI, MetaImage, NRRD or HDF5 volumes at any depth",
    )
    options.add_argument(
        "--one_per_study",
        action="store_true",
        help="keep one DICOM series of each study: that of the thinnest slices, then of the softest "
        "kernel, then of the most slices; the next one where it can't be used",
    )
    options.add_argument(
        "--crop_to_body",
        type=number(float, 0),
        metavar="MM",
        help="cut away the air and table around the body, leaving this margin in mm; for scans of "
        "which much is air (not given: whole scans)",
    )
    options.add_argument(
        "--min_slices", type=number(int, 1), default=16, help="series with fewer slices, such as scouts, are left out"
    )
    options.add_argument(
        "--compression",
        choices=sorted(FILTERS),
        default="blosc",
        help="blosc: fastest to read here; gzip: for files that ITK opens too; none: largest",
    )
    add_worker_flags(options)


def add_luna16(commands: Any) -> None:
    options = add_conversion(
        commands,
        "luna16",
        luna16,
        "crops around nodules and others into subset*/label<k>/<patient>/<name>.nii.gz",
        "folder with subset*/<seriesuid>.mhd (other volumes named by series do too, and DICOM series) and the tables",
    )
    options.add_argument(
        "--size",
        type=number(int, 1),
        nargs=3,
        default=[96, 96, 48],
        metavar=XYZ,
        help="voxels of a crop; larger than the ViT's input gives augmentations real tissue to turn into view",
    )
    options.add_argument(
        "--spacing",
        type=number(float, 0),
        nargs=3,
        default=[0.7, 0.7, 1.4],
        metavar=XYZ,
        help="mm per voxel of a crop; 0 0 0 keeps each scan's own voxels",
    )
    options.add_argument(
        "--negatives_per_scan",
        type=number(int, 0),
        help="candidates of label 0 drawn from each scan (default: 20 of candidates*.csv, all of a "
        "--table); all others are taken",
    )
    options.add_argument("--seed", type=number(int, 0), default=0, help="seed of the draw of --negatives_per_scan")
    options.add_argument(
        "--table",
        type=Path,
        nargs="+",
        action="extend",
        metavar="CSV",
        help="points of your own instead of candidates*.csv and annotations.csv: columns seriesuid (or image_path, "
        "a path that ends in <seriesuid>.mhd, as FMCIB's tables have), coordX, coordY, coordZ (LPS mm, as LUNA16) and "
        "the label; points without a label are cropped into subset*/unlabelled, for --predict. Three tables with "
        "train, val and test in their names are a published split: published_split.csv and by_patient.csv in --output "
        "are then its lists of crops for --data_list of main_lnc_luna16.py",
    )
    options.add_argument(
        "--label_column",
        default="class",
        metavar="NAME",
        help="column of --table with the label, a whole number from 0 on",
    )
    options.add_argument(
        "--patients",
        type=Path,
        metavar="CSV",
        help="table with columns seriesuid and patient, where patients have several scans (default: "
        "the series stands for the patient)",
    )
    add_worker_flags(options)


def add_msd(commands: Any) -> None:
    options = add_conversion(
        commands,
        "msd",
        msd,
        "images and label masks into images/ and labels/, for segmentation",
        "a task of the Medical Segmentation Decathlon or of nnU-Net: imagesTr, labelsTr and mostly a dataset.json",
    )
    options.add_argument(
        "--spacing",
        type=number(float, above=0),
        nargs=3,
        metavar=XYZ,
        help="resample to these mm per voxel, labels to the nearest (not given: as it is)",
    )
    options.add_argument(
        "--crop",
        choices=["none", "body", "label"],
        default="none",
        help="none: whole images; body: cut away the air around it; label: keep the labelled part, "
        "which a scan without label can't be brought to",
    )
    options.add_argument(
        "--margin", type=number(float, 0), default=20, metavar="MM", help="mm that --crop leaves on all sides"
    )
    add_worker_flags(options)


def add_check(commands: Any) -> None:
    required, options = add_command(
        commands,
        "check",
        functools.partial(check, make_folds=patient_splits),
        "read a folder and tell what the training scripts would say and refuse",
        "FOLDER [flags]",
    )
    required.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="a folder in one of the three layouts, a task of the Decathlon or nnU-Net, or a table of files (.csv) as "
        "--data_list of the training scripts takes",
    )
    options.add_argument(
        "--label_column",
        metavar="NAME",
        help="column of a table with the labels of crops; default: label, in a table without a column mask",
    )
    add_worker_flags(options)


def add_index(commands: Any) -> None:
    required, options = add_command(
        commands,
        "index",
        index,
        "store where body and lung lie in the volumes below a folder, for --foreground of main_dino.py, and where the "
        "chunks of HDF5 files are, which are then read faster",
        "FOLDER [flags]",
    )
    required.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="folder with volumes (.hdf5, .nii.gz, ...) at any depth, which are not changed: what is stored stands in "
        "a hidden file beside each; files of prepare_data.py nlst have it in them",
    )
    add_worker_flags(options)


def add_demo(commands: Any) -> None:
    required, options = add_command(
        commands,
        "demo",
        demo,
        "two public lung CTs and synthetic phantoms, in all three layouts",
        "--output DIR [flags]",
    )
    required.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    options.add_argument(
        "--phantom",
        action="store_true",
        help="synthetic chest phantoms only, and fetch nothing; without it, only where the fetch fails",
    )
    help_flags(options)


def add_phantoms(commands: Any) -> None:
    required, options = add_command(
        commands,
        "phantoms",
        make_phantoms,
        "synthetic chests, for pre-training (pretrain/) and to tell nodules from vessels (luna16/)",
        "--output DIR [flags]",
    )
    required.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    options.add_argument("--count", type=number(int, 4), default=20, help="patients, in four subsets")
    help_flags(options)


def main() -> None:
    parser = get_args_parser()
    args = vars(parser.parse_args())
    command, run = args.pop("command"), args.pop("run")
    if "input" in args:
        source, target = (Path(os.path.realpath(args[name])) for name in ("input", "output"))
        if target in (source, *source.parents):
            what = "is the --input itself" if target == source else f"holds the --input {args['input']}"
            parser.error(f"--output {args['output']} {what}: give another folder")
        if not args["input"].is_dir():
            raise UserError(
                f"--input {args['input']}: " + ("is no folder" if args["input"].exists() else "no such folder")
            )
    if command == "luna16":
        if any(args["spacing"]) and not all(args["spacing"]):
            parser.error(f"--spacing {format_size(args['spacing'])}: expected three lengths above 0, or 0 0 0")
        if args["label_column"] != "class" and args["table"] is None:
            parser.error("--label_column is for a --table of your own")
        if args["negatives_per_scan"] is not None and len(args["table"] or ()) > 1:
            parser.error("--negatives_per_scan: a published split, which several --table are, is taken whole")
    try:
        run(**args)
    except DataError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
