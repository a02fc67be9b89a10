"""Extract features: an encoder's embedding of every scan, crop or point, as a table.

    python extract_features.py --weights FILE --input DIR --output features.csv
    python extract_features.py --weights OUT --input points.csv --scans DIR --output features.npz
    torchrun --nproc_per_node=4 extract_features.py --weights FILE --input DIR --output FOLDER

--weights is a checkpoint or the output folder of a run. The same command resumes where it stopped.
"""

import dino3d.openmp  # noqa: F401  before torch is loaded

# isort: split

import argparse
import collections
import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import utils
from dino3d import command_line
from dino3d.command_line import Preempted, UserError, format_values, number
from dino3d.data import images
from dino3d.data.conventions import VOLUME_SUFFIXES, DataError
from dino3d.data.geometry import other_grid
from dino3d.data.parallel import progress
from dino3d.data.requirements import hu_problem, hu_warnings, note_lines, require_ct
from dino3d.data.scans import state_of
from dino3d.data.volume import Volume
from dino3d.features.cases import Subject, find_subjects
from dino3d.features.embedding import Embedder, region_to_embed
from dino3d.features.encoder import PretrainedEncoder, load_encoder
from dino3d.features.journal import FeatureJournal
from dino3d.features.map_pictures import are_done, save_maps
from dino3d.features.maps import has_attention, scan_maps, voxel_at
from dino3d.features.neighbours import NEIGHBOUR_COLUMNS, PLACE_COLUMNS, nearest, neighbour_picture, spread
from dino3d.features.pooling import (
    ORIENTATIONS,
    POOLS,
    embedding_width,
    orientation_problem,
    pool_problem,
    reads_centre,
)
from dino3d.features.tables import SUFFIXES, FeatureTable, file_names, write_features
from dino3d.features.trivial import mask_volume, trivial_figures
from dino3d.features.windows import REGIONS, CtScan, Region, read_ct
from dino3d.files import write_table
from dino3d.finetune.crops import read_ahead
from dino3d.finetune.inference import reason_of
from dino3d.training.checkpoint import StopRequested, StopSignal
from dino3d.training.pictures import save_picture

MAIN = "features"  # name of the table of --weights among those of one run
SCANS_AT_ONCE = 2  # that are read
QUERIES = 6  # rows whose neighbours are shown
# Of what a row holds; to be counted up when that changes: a table that was begun before is then begun anew
FEATURE_RULES = 1
MOST_POINTS = 16  # of a scan, each with a map
TOKENS_AT_ONCE, VOXELS_AT_ONCE = 8192, 1 << 21  # in a batch of windows of --maps, of a ViT and of other encoders


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="extract_features.py",
        usage="extract_features.py --weights FILE --input DIR|FILE|LIST.txt|TABLE.csv --output FILE|FOLDER [flags]",
        description="An encoder's embedding of every scan, crop or point, as a table. Start the same command again to "
        "resume.",
    )
    group = parser.add_argument_group("weights, input and output")
    group.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="checkpoint with the encoder: checkpoint.pth of main_dino.py, best.pth of a fine-tuned fold, other code's "
        ".pth or .safetensors file; or the --output_dir of a run, or a fold in it",
    )
    command_line.checkpoint_key_flag(group)
    group.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="folder with scans or crops at any depth (labels and masks are passed over); one scan; list.txt with a "
        "path per line; table.csv with a column path (and patient, name), or with points: seriesuid, coordX, coordY, "
        "coordZ in LPS mm",
    )
    group.add_argument(
        "--scans", default=None, metavar="DIR", help="folder with the scans of a table of points; default: the table's"
    )
    group.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="table to write: FILE.csv, FILE.npz, FILE.h5, or a folder for one .h5 per row with the data set y_hat",
    )

    group = parser.add_argument_group("embedding (geometry and intensities are the checkpoint's)")
    group.add_argument(
        "--pool",
        default="cls",
        choices=POOLS,
        help="cls: class token; mean: mean of the patch tokens; centre: of those around the middle of the window "
        "alone, for points and crops around something; cls+mean, cls+centre: both, one after the other. A ResNet has "
        "no class token: cls is the mean of its last feature map, as mean is",
    )
    group.add_argument(
        "--tta",
        default=1,
        type=int,
        choices=ORIENTATIONS,
        metavar="N",
        help="test-time augmentation: the mean embedding of each window as it is (1), in all 8 ways to mirror its "
        "axes, or turned as well, in all 48 ways that a cube can be, which costs as many times as much",
    )
    group.add_argument(
        "--layers",
        default=1,
        type=number(int, 1),
        help="last blocks whose tokens, or means of feature maps, are concatenated, as in DINO's linear evaluation (4 "
        "there); cls+mean and cls+centre take the patch tokens of the last one alone",
    )
    group.add_argument(
        "--region",
        default="auto",
        choices=REGIONS,
        help="centre: one window in the middle of each volume; whole: windows over all of it, whose embeddings are "
        "averaged; auto: centre for crops, which are what lies in the layout of labelled crops or is no larger than "
        "1.5 input sizes along each axis. A point has one window around it",
    )

    add_comparison_flags(parser)
    add_picture_flags(parser)

    group = parser.add_argument_group("run")
    group.add_argument(
        "--precision",
        default="fp32",
        choices=("bf16", "fp16", "fp32"),
        help="mixed precision of the matrix products: bf16, fp16 or fp32 (off); the last digits differ between them",
    )
    command_line.num_workers_flag(group)
    command_line.help_flags(group)
    return parser


def add_comparison_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("to compare with")
    group.add_argument(
        "--random",
        default=0,
        type=number(int, 0),
        help="random encoders of the same architecture and geometry, of seeds 0, 1, ..., written to NAME.random0, ...",
    )
    command_line.boolean_flag(
        group,
        "--trivial",
        False,
        "write figures that need no network to NAME.trivial-<which>: HU at the centre, histogram, mean and deviation, "
        "radial profile, size with --masks, and all of them",
    )
    group.add_argument(
        "--masks",
        default=None,
        metavar="DIR",
        help="folder with a mask for each scan or crop, at the same place below it and of the same name, whose size "
        "--trivial gives in mm3",
    )


def add_picture_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--maps",
        default=None,
        metavar="DIR",
        help="folder for maps of each scan, as NIfTI on its own voxels and as pictures beside the CT: attention of the "
        "class token, principal components of the patches as colours, similarity to points; from overlapping windows "
        "over all of the scan. Of a ResNet those of its last feature map, without attention",
    )
    group.add_argument(
        "--point",
        default=[],
        action="append",
        nargs=3,
        type=number(float),
        metavar=("X", "Y", "Z"),
        help="LPS mm, as in tables of points: a map of the similarity to what lies there, in every scan; may be given "
        "several times. Points of an --input table are taken too",
    )
    group.add_argument(
        "--point_ras",
        default=[],
        action="append",
        nargs=3,
        type=number(float),
        metavar=("R", "A", "S"),
        help="the same in RAS mm, as 3D Slicer shows a point and nibabel counts: --point with the first two signs "
        "changed",
    )
    group.add_argument(
        "--overlap",
        default=0.75,
        type=number(float, 0, below=1),
        help="share of a window's side that it has in common with the next one in --maps: 0.5 is eight times faster "
        "and leaves a faint lattice where tissue is even",
    )
    group.add_argument(
        "--neighbours",
        default=0,
        type=number(int, 0),
        metavar="K",
        help="the K rows most like some of the rows (cosine similarity), of other patients, as pictures and a table in "
        "NAME.neighbours",
    )
    group.add_argument(
        "--queries",
        default=None,
        nargs="+",
        metavar="NAME",
        help="rows whose neighbours to show, by their names; default: 6, evenly spread over the table",
    )
    command_line.boolean_flag(group, "--same_patient", False, "rows of the query's own patient are --neighbours too")


def check_flags(parser: command_line.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the data (exit code 2)."""
    if args.masks and not args.trivial:
        parser.error("--masks DIR goes with --trivial, which gives their size")
    if not args.maps and (args.point or args.point_ras):
        parser.error("--point and --point_ras go with --maps DIR, where the maps of similarity are written")
    if not args.neighbours and (args.queries or args.same_patient):
        parser.error("--queries and --same_patient go with --neighbours K")
    if reads_centre(args.pool) and args.region == "whole":
        parser.error(f"--pool {args.pool}: reads the middle of a window, which --region whole has many of")
    suffix = Path(args.output).suffix
    if Path(args.output).name in SUFFIXES:
        parser.error(f"--output {args.output}: has a suffix alone, expected a name before it")
    if suffix and suffix not in SUFFIXES and not args.output.endswith("/") and not Path(args.output).is_dir():
        parser.error(
            f"--output {args.output}: {suffix} is not written, expected {', '.join(SUFFIXES)}; a new folder of such a "
            "name ends in /"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    run(args, utils.distributed_init())


def run(args: argparse.Namespace, processes: utils.Processes) -> None:
    """Extract what is not there yet, and write the tables."""
    # ---------------------------------------------------------------------------------------------------------- data
    output = Path(args.output)
    work = work_folder(output)
    processes.run_on_main(lambda: check_output(output, work, list(table_widths(1, args))))
    subjects, lines = processes.run_on_main(lambda: find_subjects(args.input, args.scans))
    if args.masks and not os.path.isdir(args.masks):
        raise UserError(f"--masks {args.masks}: no such folder", everywhere=True)
    check_queries(args.queries or [], [one.name for one in subjects], range(len(subjects)))

    # --------------------------------------------------------------------------------------------------------- model
    encoder = load_encoder(args.weights, args.checkpoint_key, flag="--weights")
    precision, _ = utils.choose_precision(args.precision, None, processes)
    settings = {
        "weights": encoder.crc32,
        **encoder.settings(),
        "spacing": encoder.working_spacing,
        "precision": precision,
    }
    map_jobs = processes.run_on_main(lambda: find_map_jobs(subjects, settings | {"overlap": args.overlap}, args))
    models = [encoder.build(), *(random_encoder(encoder, seed) for seed in range(args.random))]
    if args.layers > len(models[0].blocks):
        raise UserError(
            f"--layers {args.layers}: {encoder.arch} has {len(models[0].blocks)} blocks; give at most that", True
        )
    if problem := pool_problem(models[0], args.pool):
        raise UserError(f"--pool {args.pool}: {encoder.arch}: {problem}; take cls", everywhere=True)
    if problem := orientation_problem(encoder.input_size, encoder.working_spacing, args.tta):
        raise UserError(
            f"--tta {args.tta}: {problem}; this encoder's are {format_values(encoder.input_size)} voxels"
            + (f" of {format_values(encoder.working_spacing)} mm" if encoder.working_spacing else "")
            + ": take 8",
            everywhere=True,
        )
    for line in [*encoder.notices, *lines, *spacing_lines(encoder), run_summary(args, encoder, processes, subjects)]:
        processes.print(line)

    # ---------------------------------------------------------------------------------------------------- extraction
    flags = ("pool", "layers", "region", "random", "trivial", "masks")
    recipe = settings | {name: getattr(args, name) for name in flags} | {"device": processes.device.type}
    recipe |= {"tta": args.tta} if args.tta > 1 else {}  # older versions had none
    recipe |= {"rules": FEATURE_RULES} if FEATURE_RULES > 1 else {}
    with utils.own_output_dir(work, processes, "--output"), StopSignal(processes, work / "preempted") as stop_signal:
        keys = keys_of(subjects)
        states = processes.run_on_main(lambda: states_of(subjects, args.masks))
        journal = FeatureJournal(
            work,
            recipe,
            dict(zip(keys, states)),
            lambda other: (
                f"--output {args.output}: was begun with another {other}; choose another output, or remove {work} and "
                "it to begin anew"
            ),
            processes,
        )
        if journal.done:
            processes.print(f"resumed: {len(journal.done)} of {len(subjects)} rows were done before")
        autocast = functools.partial(
            torch.autocast, processes.device.type, utils.PRECISIONS[precision], enabled=precision != "fp32"
        )
        with Embedder(
            models,
            encoder.clip_range,
            args.pool,
            args.layers,
            processes.device,
            autocast,
            threads=torch.get_num_threads(),
            tta=args.tta,
        ) as embedder:
            extract(subjects, keys, journal, embedder, encoder, args, processes, stop_signal)
        if any(processes.all_gather(bool(stop_signal.received))):
            stop_signal.end()

        # ---------------------------------------------------------------------------------------------------- tables
        widths = table_widths(embedding_width(models[0], args.pool, args.layers), args)
        failed = processes.run_on_main(lambda: write_tables(output, subjects, keys, journal, widths))
        processes.print(f"features  {output}")

        # -------------------------------------------------------------------------------------------------- pictures
        if args.neighbours:
            pictures = processes.run_on_main(lambda: draw_neighbours(output, subjects, keys, journal, encoder, args))
            processes.print(f"pictures  {pictures}")
        without_maps = draw_maps(map_jobs, encoder, args.overlap, autocast, processes, stop_signal)
        if args.maps:
            processes.print(f"maps      {args.maps}")
    if failed:
        name, reason = failed[0]
        raise UserError(
            f"{len(failed)} of {len(subjects)} rows have no features, such as {name}: {reason}; the reasons are in "
            f"{output if output.suffix in SUFFIXES else output / 'failed.csv'}",
            everywhere=True,
        )
    if without_maps:
        name, reason = without_maps[0]
        raise UserError(
            f"{len(without_maps)} of {len(map_jobs)} scans have no maps, such as {name}: {reason}", everywhere=True
        )


# -------------------------------------------------------------------------------------------------------------- model


def random_encoder(encoder: PretrainedEncoder, seed: int) -> torch.nn.Module:
    """An encoder of the same architecture and geometry with random weights, the same ones for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return encoder._replace(state=None).build()


def spacing_lines(encoder: PretrainedEncoder) -> list[str]:
    """What to say of the spacing that scans are brought to."""
    if encoder.working_spacing is None:
        return ["note: the checkpoint does not say the spacing that it was trained at: voxels are taken as they are"]
    if None in (encoder.spacing, encoder.crop_spacing) or np.allclose(encoder.spacing, encoder.crop_spacing, rtol=0.05):
        return []
    return [
        f"note: pre-trained at {format_values(encoder.spacing)} mm, fine-tuned on crops of "
        f"{format_values(encoder.crop_spacing)} mm: the latter is taken"
    ]


# --------------------------------------------------------------------------------------------------------- extraction


def extract(
    subjects: Sequence[Subject],
    keys: Sequence[str],
    journal: FeatureJournal,
    embedder: Embedder,
    encoder: PretrainedEncoder,
    args: argparse.Namespace,
    processes: utils.Processes,
    stop_signal: StopSignal,
) -> None:
    """Add this rank's rows to the journal, until a signal comes, and tell what all ranks have read."""
    groups = collections.defaultdict(list)  # rows of one scan, which is read once
    for key, subject in zip(keys, subjects):
        if key not in journal.done:
            groups[subject.path].append((key, subject))
    mine = list(groups.items())[processes.rank :: processes.world_size]
    counts, notes, odd_hu = collections.Counter(), {}, {}
    with progress(sum(len(rows) for _, rows in mine), "row", processes.is_main) as bar:
        workers = command_line.available_cores() if args.num_workers is None else args.num_workers
        scans = read_ahead(scan_or_error, [path for path, _ in mine], 1, min(workers, SCANS_AT_ONCE))
        each = ((path, scan, *row) for (path, rows), (scan,) in zip(mine, scans) for row in rows)
        for path, scan, key, subject in each:
            if stop_signal.received:
                break
            try:
                found, told = features_of(subject, scan, embedder, encoder, args, stop_signal)
            except StopRequested:
                break
            except (UserError, Preempted):  # concern all rows
                raise
            except Exception as error:
                reason = reason_of(error)
                journal.add_features(key, {}, reason)
                print(f"{subject.name}: no features: {reason}", flush=True)
            else:
                journal.add_features(key, found)
                counts.update(told)
                if path not in notes:  # of a scan's many points the first
                    notes[path], odd_hu[path] = scan.notes, hu_problem(scan.hu)
            bar.update()
    gathered = processes.all_gather((counts, notes, odd_hu))
    totals = sum((of_rank for of_rank, _, _ in gathered), collections.Counter())
    notes, odd_hu = (dict(pair for one in gathered for pair in one[k].items()) for k in (1, 2))
    for line in [*region_lines(totals, args.pool), *hu_lines(odd_hu), *note_lines([*notes], [*notes.values()])]:
        processes.print(line)


def scan_or_error(path: str) -> CtScan | Exception:
    """The CtScan of a path, or why there is none."""
    try:
        return read_ct(path) if path else DataError("", "no scan")
    except Exception as error:
        return error


def features_of(
    subject: Subject,
    scan: CtScan | Exception,
    embedder: Embedder,
    encoder: PretrainedEncoder,
    args: argparse.Namespace,
    stop_signal: StopSignal,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """({table: (F,) float32} of a row, counts for `region_lines`). Raises DataError, StopRequested."""
    if subject.problem:
        raise DataError(subject.path, subject.problem)
    if isinstance(scan, Exception):
        raise scan
    region = region_of_subject(subject, scan, encoder, args)
    rows = embedder(region.windows(), stop_signal.check)  # (encoders, F)
    if not np.isfinite(rows).all():
        raise DataError(subject.path, "its features are not finite (NaN): see --precision")
    found = dict(zip([MAIN, *(f"random{k}" for k in range(args.random))], rows))
    if args.trivial:
        found |= {f"trivial-{name}": values for name, values in trivial_of(subject, scan, region, args.masks).items()}
    counts = {region.how: 1, f"{region.how} windows": len(region.starts), f"{region.how} count": region.count}
    extent = np.array(scan.hu.shape) * scan.spacing / region.spacing  # in voxels of the window
    counts["smaller"] = int(region.how != "point" and (extent < np.array(region.size) - 0.5).any())
    return found, counts


def region_of_subject(subject: Subject, scan: CtScan, encoder: PretrainedEncoder, args: argparse.Namespace) -> Region:
    """What a row's features are of. Raises DataError."""
    how = "centre" if args.region == "auto" and subject.is_crop else args.region
    return region_to_embed(scan, encoder, args.pool, args.tta, how, subject.point, subject.path)


def trivial_of(subject: Subject, scan: CtScan, region: Region, masks: str | None) -> dict[str, np.ndarray]:
    """{name: (F,) float32} trivial figures, the mean over the windows. Raises DataError where the mask is unusable."""
    size = mask_volume(read_mask(subject, scan, masks), scan.spacing) if masks else None
    found = [trivial_figures(hu, region.spacing, size) for hu in region.windows()]
    return {name: np.mean([one[name] for one in found], 0, np.float64).astype(np.float32) for name in found[0]}


def mask_path(subject: Subject, masks: str) -> Path | None:
    """The mask of a scan's name."""
    places = [Path(masks) / f"{subject.name}{suffix}" for suffix in VOLUME_SUFFIXES]
    return next((path for path in places if path.is_file()), None)


def read_mask(subject: Subject, scan: CtScan, masks: str) -> np.ndarray:
    """(X, Y, Z) uint8 of the mask of a scan's name. Raises DataError."""
    path = mask_path(subject, masks)
    if path is None:
        raise DataError(masks, f"no mask: {masks} has no {subject.name} with any of {', '.join(VOLUME_SUFFIXES)}")
    with Volume(path) as volume:
        if reason := other_grid(volume.shape, volume.affine, scan.hu.shape, scan.affine):
            raise DataError(path, f"mask {path} {reason}")
        return volume.read_labels()


# ----------------------------------------------------------------------------------------------------------- pictures


class MapJob(NamedTuple):
    """A scan to draw maps of. points: (3,) LPS mm each; recipe: what its files depend on; done: whether they are there

    problem: why it can't be read, or ""
    """

    name: str
    path: str
    folder: Path
    points: list[tuple[float, ...]]
    recipe: dict[str, Any]
    done: bool
    problem: str


def find_map_jobs(subjects: Sequence[Subject], settings: dict[str, Any], args: argparse.Namespace) -> list[MapJob]:
    """The scans of --maps, each once. Raises UserError, also where a folder holds maps of other settings."""
    if not args.maps:
        return []
    for flag, folder in (("--input", args.input), ("--scans", args.scans)):
        inside = folder and Path(os.path.realpath(args.maps)).is_relative_to(os.path.realpath(folder))
        if inside and os.path.isdir(folder):  # the next run would find them
            raise UserError(f"--maps {args.maps}: lies in {flag} {folder}, where maps would be taken for scans")
    whole = Path(os.path.abspath(args.maps))
    there = next(path for path in (whole, *whole.parents) if path.exists())  # told before hours of work
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is a file, expected a folder"
        raise UserError(f"--maps {args.maps}: {there} {why}; choose another folder")
    of_scan = {}
    for one in subjects:
        of_scan.setdefault(one.path or one.name, []).append(one)
    given = [*map(tuple, args.point), *((-r, -a, s) for r, a, s in args.point_ras)]
    jobs = []
    folders = file_names([rows[0].name for rows in of_scan.values()])
    for rows, folder in zip(of_scan.values(), folders):
        points = [*given, *dict.fromkeys(one.point for one in rows if one.point is not None)]
        if len(points) > MOST_POINTS:
            raise UserError(
                f"--maps: {rows[0].name} has {len(points)} points, each of them a map of its own, expected at most "
                f"{MOST_POINTS}: give a table with fewer, or the scans themselves as --input"
            )
        name, path, where = rows[0].name, rows[0].path, Path(args.maps) / folder
        recipe = {"settings": settings, "file": state_of(path) if path else "", "points": points}
        recipe = json.loads(json.dumps(recipe))  # as it is read again
        problem = "" if path else rows[0].problem
        jobs.append(MapJob(name, path, where, points, recipe, are_done(where, recipe), problem))
    return jobs


def draw_maps(
    jobs: Sequence[MapJob],
    encoder: PretrainedEncoder,
    overlap: float,
    autocast: Callable[[], contextlib.AbstractContextManager],
    processes: utils.Processes,
    stop_signal: StopSignal,
) -> list[tuple[str, str]]:
    """Write the maps that are not there yet; returns (name, reason) of scans without. Raises Preempted, UserError."""
    if not jobs:
        return []
    todo = [job for job in jobs if not job.done]
    done = len(jobs) - len(todo)
    processes.print(f"maps of {len(jobs)} scans" + f"; {done} of them were done before" * bool(done))
    model = encoder.build().to(processes.device).eval()
    if not has_attention(model):
        processes.print(f"note: {encoder.arch} has no class token: its maps have no attention")
    if encoder.patch_size:
        batch_size = TOKENS_AT_ONCE // math.prod(n // p for n, p in zip(encoder.input_size, encoder.patch_size))
    else:
        batch_size = VOXELS_AT_ONCE // math.prod(encoder.input_size)
    failures = {}
    with contextlib.suppress(StopRequested):  # the scan at hand is not done
        for job in todo[processes.rank :: processes.world_size]:
            stop_signal.check()
            started = time.monotonic()
            try:
                if job.problem:
                    raise DataError(job.path, job.problem)
                scan = read_ct(job.path)
                require_ct(scan.hu, job.path)
                image = images.make_image(scan.hu, scan.affine)
                for number, point in enumerate(job.points, 1):  # before minutes of work
                    voxel_at(image, point, f"point {number}")
                maps = scan_maps(
                    model,
                    image,
                    encoder.working_spacing,
                    encoder.clip_range,
                    overlap,
                    max(1, batch_size),
                    processes.device,
                    autocast,
                    stop_signal.check,
                    shows_progress=processes.is_main,
                )
                lines = save_maps(
                    job.folder, job.path, image, maps, job.points, encoder.clip_range, job.name, job.recipe
                )
            except (UserError, Preempted):  # concern all scans
                raise
            except Exception as error:
                told = str(error) if isinstance(error, DataError) else reason_of(error)
                failures[job.name] = job.problem or told
                print(f"{job.name}: no maps: {failures[job.name]}", flush=True)
            else:
                print(f"{job.name}: maps in {time.monotonic() - started:.0f} s", *lines, sep="; ", flush=True)
    if any(processes.all_gather(bool(stop_signal.received))):
        stop_signal.end()
    return [pair for part in processes.all_gather(failures) for pair in part.items()]


def draw_neighbours(
    output: Path,
    subjects: Sequence[Subject],
    keys: Sequence[str],
    journal: FeatureJournal,
    encoder: PretrainedEncoder,
    args: argparse.Namespace,
) -> Path:
    """Write the folder NAME.neighbours: a picture for each query, and neighbours.csv. Raises UserError."""
    found = journal.features()
    width = next((len(values[MAIN]) for values, _ in found.values() if MAIN in values), 0)
    features = np.stack([found[key][0].get(MAIN, np.full(width, np.nan, np.float32)) for key in keys])
    there = [at for at in range(len(subjects)) if np.isfinite(features[at]).all() and width]
    if args.queries:
        queries = check_queries(args.queries, [one.name for one in subjects], there)
    else:
        queries = spread(there, QUERIES)
    folder = output.with_name(f"{output.stem if output.suffix in SUFFIXES else output.name}.neighbours")
    rows, patients = [], [one.patient for one in subjects]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for at, file_name in zip(queries, file_names([subjects[at].name for at in queries])):
            neighbours = nearest(features, patients, at, args.neighbours, args.same_patient)
            if not neighbours:
                others = "no other row" if args.same_patient else "no row of another patient (see --same_patient)"
                print(f"note: {subjects[at].name} has no neighbours: {others} has features", flush=True)
            rows += [
                [subjects[at].name, patients[at], rank, subjects[one.row].name, patients[one.row], one.similarity]
                + [x for row in (at, one.row) for x in subjects[row].point or ()]
                for rank, one in enumerate(neighbours, 1)
            ]
            shown = [(at, f"query: {label_of(subjects[at])}")]
            shown += [
                (one.row, f"{rank}. similarity {one.similarity:.3f}: {label_of(subjects[one.row])}")
                for rank, one in enumerate(neighbours, 1)
            ]
            seen = [seen_volume(subjects[row], encoder, args) for row, _ in shown]
            picture = neighbour_picture(*zip(*seen), [label for _, label in shown])
            save_picture(folder / f"{file_name}.png", picture)
        header = [*NEIGHBOUR_COLUMNS, *(PLACE_COLUMNS if any(one.point for one in subjects) else ())]
        write_table(folder / "neighbours.csv", header, rows)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror or error})") from error
    return folder


def check_queries(queries: Sequence[str], names: Sequence[str], there: Sequence[int]) -> list[int]:
    """Numbers of the rows of these names. there: rows that can be. Raises UserError for a name without any."""
    found = []
    for query in queries:
        rows = [at for at in there if names[at] == query]
        if not rows:
            hint = ": it has no features" if query in names else command_line.did_you_mean(query, names)
            raise UserError(f"--queries {query}: no row with features of this name{hint}", everywhere=True)
        found += rows
    return found


def label_of(subject: Subject) -> str:
    """What to write above a row's planes."""
    place = "" if subject.point is None else f" at {format_values(subject.point)} mm (LPS)"
    return subject.name + place + f", patient {subject.patient}" * (subject.patient != subject.name)


def seen_volume(
    subject: Subject, encoder: PretrainedEncoder, args: argparse.Namespace
) -> tuple[np.ndarray, Sequence[float]]:
    """((X, Y, Z) grey values in [0, 1], (3,) mm) of what a row's features are of."""
    region = region_of_subject(subject, read_ct(subject.path), encoder, args)
    hu = images.voxels_of(region.image) if region.how == "whole" else next(region.windows())
    low, high = encoder.clip_range
    return np.clip((hu.astype(np.float32) - low) / (high - low), 0, 1), region.spacing


# ------------------------------------------------------------------------------------------------------------- output


def check_output(output: Path, work: Path, tables: Sequence[str]) -> None:
    """UserError where the output is something else than its name says, or was not written by this script.

    tables: names of those that are written, see `table_path`
    """
    if output.suffix in SUFFIXES and output.is_dir():
        raise UserError(f"--output {output}: is a folder, expected a file by its suffix; choose another name")
    if output.suffix not in SUFFIXES and output.exists() and not output.is_dir():
        raise UserError(
            f"--output {output}: is a file; expected one with the suffix {', '.join(SUFFIXES)}, or a folder"
        )
    others = [path for path in output.iterdir() if path != work] if output.is_dir() else [output]
    if not work.is_dir() and any(path.exists() for path in others):
        raise UserError(
            f"--output {output}: is there already and not of this script (no {work}): remove it, or choose another name"
        )
    beside = [path for name in tables if name != MAIN and (path := table_path(output, name)).exists()]
    if not work.is_dir() and beside:
        raise UserError(
            f"--output {output}: {beside[0]} is there already, which this command would write; remove it, or choose "
            "another name"
        )


def work_folder(output: Path) -> Path:
    """Where the rows that are done are kept, hidden beside a table or in a folder of them."""
    return output.parent / f".{output.name}.work" if output.suffix in SUFFIXES else output / ".work"


def keys_of(subjects: Sequence[Subject]) -> list[str]:
    """What the journal calls the rows: their names and points, numbered where both stand twice."""
    used, keys = collections.Counter(), []
    for one in subjects:
        key = one.name if one.point is None else f"{one.name} {format_point(one.point)}"
        used[key] += 1
        keys.append(key if used[key] == 1 else f"{key} #{used[key]}")
    return keys


def format_point(point: Sequence[float]) -> str:
    return " ".join(repr(float(value)) for value in point)


def states_of(subjects: Sequence[Subject], masks: str | None) -> list[str]:
    """Of each row what changes when its files do."""
    states = {path: state_of(path) if path else "" for path in {one.path for one in subjects}}
    of_masks = [state_of(path) if masks and (path := mask_path(one, masks)) else "" for one in subjects]
    return [states[one.path] + one.problem + of_mask for one, of_mask in zip(subjects, of_masks)]


def table_widths(width: int, args: argparse.Namespace) -> dict[str, int]:
    """{name: F} of the tables that are written. width: of an embedding"""
    widths = {MAIN: width, **{f"random{k}": width for k in range(args.random)}}
    if args.trivial:
        figures = trivial_figures(np.zeros((1, 1, 1), np.int16), (1, 1, 1), np.zeros(1) if args.masks else None)
        widths |= {f"trivial-{name}": len(values) for name, values in figures.items()}
    return widths


def table_path(output: Path, name: str) -> Path:
    """NAME.csv for the features, NAME.random0.csv for a table of that name."""
    if name == MAIN:
        return output
    if output.suffix in SUFFIXES:
        return output.with_name(f"{output.stem}.{name}{output.suffix}")
    return output.with_name(f"{output.name}.{name}")


def write_tables(
    output: Path, subjects: Sequence[Subject], keys: Sequence[str], journal: FeatureJournal, widths: dict[str, int]
) -> list[tuple[str, str]]:
    """Write the tables of all rows; returns (name, reason) of those without features. Raises UserError."""
    found = journal.features()
    rows = [found[key] for key in keys]
    reasons = [reason for _, reason in rows]
    points = [(np.nan,) * 3 if one.point is None else one.point for one in subjects]
    coords = np.array(points, float) if any(one.point is not None for one in subjects) else None
    for name, width in widths.items():
        empty = np.full(width, np.nan, np.float32)
        table = FeatureTable(
            [one.name for one in subjects],
            [one.patient for one in subjects],
            reasons,
            np.stack([values.get(name, empty) for values, _ in rows]),
            coords,
        )
        try:
            write_features(table_path(output, name), table)
        except OSError as error:
            raise UserError(
                f"{table_path(output, name)}: can't be written ({error.strerror or error}); what is done is kept: "
                "start the same command again"
            ) from error
    return [(one.name, reason) for one, reason in zip(subjects, reasons) if reason]


# ----------------------------------------------------------------------------------------------------- what is shown


def run_summary(
    args: argparse.Namespace, encoder: PretrainedEncoder, processes: utils.Processes, subjects: Sequence[Subject]
) -> str:
    """What is about to run, in a line."""
    points = sum(one.point is not None for one in subjects)
    device = f"{processes.world_size} x {utils.device_name(processes.device)}"
    spacing = f" of {format_values(encoder.working_spacing)} mm" if encoder.working_spacing else ""
    turned = f"mean over {args.tta} orientations, " if args.tta > 1 else ""
    return (
        f"{len(subjects)} {'points' if points else 'scans or crops'} of {len({one.patient for one in subjects})} "
        f"patients; {encoder.arch}, {args.pool} of the last {args.layers} block{'s' * (args.layers > 1)}, {turned}"
        f"windows of {format_values(encoder.input_size)} voxels{spacing}, HU {format_values(encoder.clip_range)}; "
        f"{args.precision} on {device}"
    )


def hu_lines(problems: dict[str, str]) -> list[str]:
    """[] or [one line]: files read all the same that are no CT in HU, as crops may be that hold soft tissue alone.

    problems: {path: `hu_problem`}
    """
    sure = {path: text if text.startswith("not in HU") else "" for path, text in problems.items()}
    return hu_warnings([*sure], [*sure.values()]) or hu_warnings([*problems], [*problems.values()], share=0.5)


def region_lines(counts: collections.Counter[str], pool: str) -> list[str]:
    """How many rows were read as what, in words."""
    lines = []
    if counts["point"]:
        lines.append(f"{counts['point']} points: one window around each")
    if counts["centre"]:
        other = "" if reads_centre(pool) else " (--region whole: all of it)"
        lines.append(f"{counts['centre']} read as crops: one window in the middle of each{other}")
    if counts["whole"]:
        lines.append(
            f"{counts['whole']} read as whole scans: the mean over {counts['whole windows']} of "
            f"{counts['whole count']} windows, without those of nothing but air (--region centre: one in the middle)"
        )
    if counts["smaller"]:
        lines.append(f"warning: {counts['smaller']} of them are smaller than a window: air is put around them")
    return lines


if __name__ == "__main__":
    utils.run_script(main)
