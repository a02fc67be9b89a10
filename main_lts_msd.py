"""Lung tumour segmentation: fine-tune a pre-trained encoder on CTs with masks, evaluate it, predict masks of new CTs.

Four GPUs, a laptop, new CTs:
    torchrun --nproc_per_node=4 main_lts_msd.py --pretrained_weights /path/to/pretrained/model.pth \
        --data_dir /path/to/lts_msd/data --output_dir /path/to/output
    python main_lts_msd.py --pretrained_weights model.pth --data_dir DIR --output_dir OUT --batch_size_per_gpu 2
    python main_lts_msd.py --predict DIR --weights OUT --output_dir PREDICTIONS

The same --output_dir resumes where it stopped. It holds a folder per fold (checkpoint.pth, the newest state; best.pth,
the best on validation; log.txt; masks and overlays of the test cases), splits.json, metrics.json, cases.csv,
report.html, config.json, TensorBoard's files; and cache, which is only needed during training.
"""

import dino3d.openmp  # noqa: F401  before torch is loaded

# isort: split

import argparse
import collections
import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from augmentations import AUGMENTATION_FLAGS, MultiCropAugmentation, paper_policy
from dino3d import command_line
from dino3d.command_line import UserError, format_values, number
from dino3d.data.conventions import DataError, stem
from dino3d.data.images import read_image, voxels_of
from dino3d.data.layouts import Pair, find_task, pairs_of
from dino3d.data.lists import is_table, pairs_of_list
from dino3d.data.requirements import Header, case_lines, class_faults, odd_headers, require_ct, too_bright
from dino3d.data.volume import Volume
from dino3d.evaluation.statistics import format_metric, with_interval
from dino3d.features import sliding_window
from dino3d.features.encoder import PretrainedEncoder, load_encoder
from dino3d.files import write_json, write_table
from dino3d.finetune import flags, mask_metrics, mask_pictures
from dino3d.finetune.crops import CropBatch, WindowAugmentation, read_headers, schedule_notices
from dino3d.finetune.flags import FIXED_FLAGS
from dino3d.finetune.fold_folders import collect_folds, file_name, load_folds, refuse_pretraining_run, start_run
from dino3d.finetune.fold_loop import Fold, FoldState, Score, TrainConfig, Validation, run_fold
from dino3d.finetune.heads import DECODERS, Segmenter, build_segmenter, choose_decoder, segmenter_of
from dino3d.finetune.inference import NewCases, failed_cases, find_folds, find_new_cases, map_over_ranks
from dino3d.finetune.mask_inference import (
    MASKS,
    InferenceSettings,
    inference_settings,
    mask_and_levels,
    mask_of,
    predict_log_probabilities,
)
from dino3d.finetune.mask_metrics import (
    COLUMNS,
    LESION_COUNTS,
    LESION_METRICS,
    MASK_METRICS,
    mean_metrics,
    pool_cases,
    table_value,
)
from dino3d.finetune.prediction import Predictions, weights_recipe
from dino3d.finetune.resampled_cache import CachedPatches, CaseInfo, ResampledCache
from dino3d.finetune.run_report import report_segmentation
from dino3d.finetune.runtime import Runtime, start_runtime
from dino3d.finetune.same_data import contents_of
from dino3d.finetune.splits import Split, fraction_text, make_splits, of_patients
from dino3d.training.checkpoint import StopRequested
from dino3d.training.pictures import save_picture

SHOWN_CASES = 8  # test cases in TensorBoard during training
OVERLAYS, PROBABILITIES = "overlays", "probabilities"  # folders of a prediction
AS_TRAINED = " (with --predict: as in training)"
SCORE = Score("dice", "dice")  # by which the best epoch is chosen
# Of --data_dir
LAYOUT = "images/<name>.nii.gz and labels/<name>.nii.gz, or imagesTr and labelsTr of the Decathlon or nnU-Net"
# What must not change while a run is resumed fold by fold
FIXED = (*FIXED_FLAGS, "freeze_encoder", "decoder", "patches_per_case", "foreground_share", *MASKS, "tolerance")


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="main_lts_msd.py",
        usage="main_lts_msd.py --data_dir DIR --output_dir DIR --pretrained_weights FILE [flags]\n"
        "       main_lts_msd.py --predict DIR --weights OUT --output_dir DIR [flags]",
        description="Lung tumour segmentation, fold by fold. Start the same command again to resume a run.",
    )
    flags.data_flags(
        parser,
        LAYOUT,
        columns="path and mask, and patient if it has it",
        predict="folder with CTs at any depth, one file, or a table (.csv) with the columns path and maybe patient; "
        "nothing is trained, a mask of each goes to --output_dir",
    )
    group = parser.add_argument_group("segmentation")
    group.add_argument(
        "--decoder",
        default=None,
        choices=tuple(DECODERS),
        help="unetr: convolutions from a ViT's tokens up to the image's resolution; unet: from the feature maps of a "
        "ResNet's stages; linear: linear probe, one layer on the last map, to judge frozen features (--freeze_encoder "
        "true); default: unetr or unet, as the encoder is",
    )
    group.add_argument(
        "--patches_per_case",
        default=16,
        type=number(int, 1),
        help="windows that an epoch of training takes from each case; raise it for few cases",
    )
    group.add_argument(
        "--foreground_share",
        default=0.5,
        type=number(float, 0, 1),
        help="share of the training windows that have a labelled voxel, of a class drawn at random, in "
        "their middle half; the others lie anywhere",
    )
    group.add_argument(
        "--overlap",
        default=None,
        type=number(float, 0, below=1),
        help="share of a window's side that it has in common with the next one in evaluation; 0.5 is "
        f"smoother and three times slower; default: {MASKS['overlap']}{AS_TRAINED}",
    )
    group.add_argument(
        "--tolerance",
        default=2.0,
        type=number(float, 0),
        metavar="MM",
        help="mm within which surfaces agree, for the normalised surface Dice",
    )
    command_line.boolean_flag(
        group,
        "--largest_component",
        None,
        f"keep only the largest component of each class in final masks; default: false{AS_TRAINED}",
    )
    group.add_argument(
        "--min_volume",
        default=None,
        type=number(float, 0),
        metavar="ML",
        help=f"millilitres below which a component is dropped from final masks; default: 0{AS_TRAINED}",
    )
    command_line.boolean_flag(
        group,
        "--skip_air",
        True,
        f"windows of evaluation and prediction without a voxel above {sliding_window.TISSUE_ABOVE} HU are not run: "
        "what the network gives for nothing but air stands for them; false: every window is run",
    )
    command_line.boolean_flag(
        group,
        "--save_probabilities",
        False,
        "with --predict: write each CT's probability map of each foreground class too, as NIfTI on the CT's own voxels",
    )
    group.add_argument(
        "--cache_dir",
        default=None,
        metavar="DIR",
        help="where training keeps the cases at its spacing, about 1.3 bytes per voxel; a local disk is "
        "fastest; default: cache in --output_dir",
    )
    group.add_argument(
        "--cache_gb",
        default=200.0,
        type=number(float, 0),
        metavar="GB",
        help="most gigabytes that the cache may take; what is beyond is resampled anew for each window, in seconds",
    )
    flags.add_finetune_flags(
        parser,
        batch_size=8,
        folds=("patients",),
        spacing="mm per voxel that cases are resampled to; default: the checkpoint's or, where it has "
        "none, the median of all cases but the test set",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    idle = flags.idle_finetune_flags(parser, args)
    flags.check_finetune_flags(parser, vars(args), LAYOUT)
    with start_runtime(vars(args)) as (runtime, args.precision, notices):
        run(args, runtime, notices + idle)


def run(args: argparse.Namespace, runtime: Runtime, notices: list[str]) -> None:
    """Train fold by fold from where the checkpoints in the output folder are, or predict."""
    output_dir, processes = Path(args.output_dir), runtime.processes
    given = {name: getattr(args, name) for name in MASKS if getattr(args, name) is not None}
    if args.predict:
        for line in notices:
            processes.print(line)
        predict(args.predict, args.weights, output_dir, given, args.skip_air, args.save_probabilities, runtime)
        return
    vars(args).update(MASKS | given)

    # ---------------------------------------------------------------------------------------------------------- data
    source = args.data_list or args.data_dir
    pairs, patients, form, lines, digest = processes.run_on_main(
        lambda: find_cases(args.data_dir, args.data_list, output_dir)
    )
    notices += lines
    names = [pair.name for pair in pairs]
    splits, data = processes.run_on_main(
        lambda: make_splits(
            output_dir / "splits.json",
            "patients",
            args.k_fold,
            args.num_test,
            args.seed,
            patients,
            [0] * len(names),
            [""] * len(names),
            ("spacing", "classes"),
            digest,
            args.label_fraction,
            contents_of({f"{pair.name} (image)": pair.image for pair in pairs})
            | contents_of({f"{pair.name} (mask)": pair.label for pair in pairs}, whole=True),
        )
    )
    sides = [Split(*(of_patients(side, patients) for side in split)) for split in splits]

    # --------------------------------------------------------------------------------------------------------- model
    encoder = load_encoder(args.pretrained_weights, args.checkpoint_key, vars(args))
    notices += encoder.notices
    args.decoder = args.decoder or choose_decoder(encoder)
    heads = read_headers([pair.image for pair in pairs], processes)
    if encoder.spacing is None:  # of all that is not tested: nothing of the test set enters
        others = [head for i, head in enumerate(heads) if i not in sides[0].test]
        encoder = encoder._replace(spacing=data.get("spacing") or median_spacing(others))
    vars(args).update(flags.encoder_settings(encoder, args.drop_path_rate))

    # ------------------------------------------------------------------------------------------------ resampled cache
    cache = ResampledCache(
        Path(args.cache_dir or output_dir / "cache"), pairs, heads, args.spacing, args.cache_gb * 1e9
    )
    found = cache.make(processes, runtime.workers)
    processes.run_on_main(lambda: check_labels(found, names, sides, source))
    data |= {"spacing": args.spacing, "classes": 1 + max(max(one.classes) for one in found)}
    cases = Cases(names, pairs, patients, cache, data["classes"])
    label_heads = read_headers([pair.label for pair in pairs], processes)
    notices.append(f"{len(pairs)} cases {'of' if args.data_list else 'below'} {source}: {form}")
    notices += case_lines(pairs, [one.classes for one in found], [one.hu for one in found], [*heads, *label_heads])
    notices += warnings_about(encoder, args, found, names)
    config = vars(args) | {"classes": cases.classes, "weights_crc32": encoder.crc32}

    # -------------------------------------------------------------------------------------------------- optimisation
    policy = paper_policy(name for flag, name in AUGMENTATION_FLAGS.items() if getattr(args, flag))
    augmentation = WindowAugmentation(policy, args.input_size, args.shift_range, args.spacing)
    reach = MultiCropAugmentation(policy, args.input_size, args.input_size, 0, args.spacing, min_iou=1.0).patch_size
    patches = CachedPatches(
        cache,
        args.patches_per_case,
        args.foreground_share,
        augmentation,
        tuple(n + 2 * s for n, s in zip(reach, args.shift_range)),
        args.seed,
    )
    train_config = TrainConfig.from_flags(vars(args))
    settings = inference_settings(vars(args), args.batch_size_per_gpu, args.skip_air)

    # ------------------------------------------------------------------------------------------------------ training
    start_run(output_dir, config, FIXED, splits, data, processes, len(names))
    longest = max(len(side.train) for side in sides) * args.patches_per_case
    global_batch = args.batch_size_per_gpu * processes.world_size
    notices += schedule_notices(longest, train_config.epochs, args.warmup_epochs, global_batch)
    for line in [*notices, run_summary(config, processes, cases, splits)]:
        processes.print(line)
    steps_left = args.max_steps or math.inf
    with runtime.stop_signal:
        for number, side in enumerate(sides):
            torch.manual_seed(args.seed)  # every fold starts from the same weights
            model = build_segmenter(encoder, args.drop_path_rate, args.decoder, cases.classes, args.freeze_encoder)
            steps_left = run_fold(
                Fold(number, output_dir / str(number), *side),
                model,
                train_config,
                config,
                runtime,
                steps_left,
                dataset=patches,
                score=SCORE,
                epoch_order=functools.partial(patch_order, side.train, args.patches_per_case, args.seed),
                train_one_epoch=functools.partial(
                    train_one_epoch, augmentation=augmentation, clip_range=args.clip_range
                ),
                validate=functools.partial(validate, cases=cases, settings=settings),
                test=functools.partial(test_fold, cases=cases, settings=settings),
                show=functools.partial(show_test_cases, cases=cases, settings=settings),
            )
            if steps_left is None:
                return
    if processes.is_main:
        print(summarise(output_dir, cases, len(splits)))


# ---------------------------------------------------------------------------------------------------------- training


def train_one_epoch(
    state: FoldState, batches: Iterator[CropBatch], augmentation: WindowAugmentation, clip_range: Sequence[float]
) -> None:
    """Steps on augmented patches, with soft Dice and cross-entropy.

    state: fold_loop.FoldState; batches: gives CropBatches with masks on the CPU; augmentation: WindowAugmentation
    """
    for batch in batches:
        # (B,), 0 for a patch that only fills a rank's share
        weights = batch.counted.to(state.device, torch.get_default_dtype(), non_blocking=True)
        batch = batch.to(state.device)
        volumes = augmentation.render(batch.crops, batch.group, clip_range)  # (B, 1, x, y, z)
        labels = augmentation.render_masks(batch.masks, batch.group)  # (B, x, y, z)
        with state.runtime.autocast():
            logits = state.network(volumes)  # (B, classes, x, y, z)
        state.step(dice_and_cross_entropy(logits, labels), weights)


def patch_order(train: np.ndarray, per_case: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) the patches of an epoch in the order of training; patch // per_case is the case."""
    patches = (train[:, None] * per_case + np.arange(per_case)).ravel()
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, 1))).permutation(patches)


def dice_and_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) soft Dice loss (Milletari et al. 2016), mean of the foreground classes, plus cross-entropy, mean of the
    voxels.

    logits: (B, classes, X, Y, Z); labels: (B, X, Y, Z) int64. Each patch on its own, so that a step's loss is the same
    however many processes share its patches.
    """
    from monai.losses import DiceLoss

    dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, reduction="none")
    overlap = dice(logits, labels[:, None]).flatten(1).mean(1)  # (B,)
    return overlap + F.cross_entropy(logits, labels, reduction="none").flatten(1).mean(1)


# -------------------------------------------------------------------------------------------------------------- data


class Cases(NamedTuple):
    """The data set, sorted by name. pairs: layouts.Pair of each; patients: whose each is; cache: ResampledCache;
    classes: with the background."""

    names: list[str]
    pairs: list[Pair]
    patients: list[str]
    cache: ResampledCache
    classes: int


def find_cases(
    folder: str | None, data_list: str | None, output_dir: Path
) -> tuple[list[Pair], list[str], str, list[str], str | None]:
    """([layouts.Pair] below a folder or of a table, sorted by name, whose each is, the form in which they lie there,
    lines on what is odd, what changes when the table does). Raises UserError, also where the output is of another
    script's run."""
    refuse_pretraining_run(output_dir)
    try:
        if data_list:
            pairs, patients, lines, digest = pairs_of_list(data_list)
            return pairs, patients, f"of {len(set(patients))} patients", lines, digest
        task = find_task(folder)
    except (DataError, UserError) as error:
        raise UserError(f"{'--data_list' if data_list else '--data_dir'} {error}") from error
    pairs, problems = pairs_of(task, folder)
    if problems:
        raise UserError(f"--data_dir {problems[0]}")
    return pairs, [pair.name for pair in pairs], task.form, [], None


def median_spacing(heads: Sequence[Header]) -> list[float]:
    """(3,) mm: the median along each axis."""
    return np.median([head.spacing for head in heads], axis=0).round(4).tolist()


def check_labels(found: Sequence[CaseInfo], names: Sequence[str], sides: Sequence[Split], folder: str) -> None:
    """UserError where the labels can't be learnt from. found, names: resampled_cache.CaseInfo and name of each case."""
    faults = class_faults([one.classes for one in found], names, folder)
    if faults:
        raise UserError(f"{'--data_list' if is_table(folder) else '--data_dir'} {faults[0]}")
    seen = {value for one in found for value in one.classes}
    for fold, side in enumerate(sides):
        missing = seen - {value for i in side.train for value in found[i].classes}
        if missing:
            raise UserError(
                f"fold {fold} has no case with class {min(missing)} to train on: too few cases have it; lower "
                "--k_fold or --num_test, raise --label_fraction, or add cases"
            )


# -------------------------------------------------------------------------------------------------------- evaluation


def validate(state: FoldState, cases: Cases, settings: InferenceSettings) -> Validation:
    """fold_loop.Validation: the mean Dice of the validation cases, on the working grid, and their loss."""
    network = state.model.eval()

    def one(case: int) -> np.ndarray:
        image, label = cases.cache.read(case)
        return metrics_on_grid(
            predict_log_probabilities([network], image, settings, state.runtime), label, cases.classes
        )

    dice, loss = map_over_ranks(one, state.fold.validation, state.runtime).mean(0)
    return Validation({"dice": float(dice), "loss": float(loss)})


def metrics_on_grid(log_probabilities: Tensor, label: np.ndarray, classes: int) -> np.ndarray:
    """(2,) Dice, mean of the foreground classes, and cross-entropy, to which all classes count alike.

    log_probabilities: (classes, X, Y, Z); label: (X, Y, Z) uint8. Dice is 1 where a class is in neither.
    """
    label = torch.from_numpy(label.astype(np.int64))
    predicted, dice, losses = log_probabilities.argmax(0), [], []
    for k in range(classes):
        here = label == k
        both = here.sum() + (predicted == k).sum()
        dice.append(float(2 * (here & (predicted == k)).sum() / both) if both else 1.0)
        if here.any():
            losses.append(-float(log_probabilities[k][here].double().mean()))
    return np.array([np.mean(dice[1:]), np.mean(losses)])


def test_fold(state: FoldState, cases: Cases, settings: InferenceSettings) -> None:
    """Segment the test cases; write masks, overlays, cases.csv and metrics.json."""
    fold, best = state.fold, state.best
    for name in ("masks", "overlays"):
        (fold.folder / name).mkdir(exist_ok=True)
    one = functools.partial(test_case, state.model.eval(), fold.folder, cases, settings, state.runtime)
    failures = {}
    figures = map_over_ranks(one, fold.test, state.runtime, failures)  # (N, classes - 1, figures)
    if not state.runtime.processes.is_main:
        return
    tested = [case for case in fold.test if case not in failures]
    rows = [
        [cases.names[case], fold.number, k + 1, *map(table_value, COLUMNS[3:], row)]
        for case, of_classes in zip(tested, figures)
        for k, row in enumerate(of_classes)
    ]
    write_table(fold.folder / "cases.csv", COLUMNS, rows)
    write_json(
        fold.folder / "metrics.json",
        {
            "fold": fold.number,
            "cases": len(tested),
            "best_epoch": best["epoch"],
            "validation_dice": best["dice"],
            "validation_loss": best["loss"],
            "tolerance_mm": settings.tolerance,
            **mean_metrics(rows),
            "notes": failed_cases(cases.names, failures),
        },
    )


def test_case(
    network: Segmenter, folder: Path, cases: Cases, settings: InferenceSettings, runtime: Runtime, case: int
) -> np.ndarray:
    """(classes - 1, figures) of a case on its own grid, NaN for what is undefined; saves its mask and overlay."""
    pair, name = cases.pairs[case], file_name(cases.names[case])
    image, label = sliding_window.read_case(pair)
    predicted = mask_of([network], image, cases.cache.spacing, settings, runtime)
    with Volume(pair.image) as volume:
        volume.save_mask(folder / "masks" / f"{name}.nii.gz", voxels_of(predicted))
    arrays, spacing = [voxels_of(one) for one in (image, predicted, label)], image.GetSpacing()
    figures = mask_metrics.evaluate_masks(*arrays[1:], spacing, cases.classes, settings.tolerance)
    title = f"{pair.name}: Dice " + ", ".join(f"{row['dice']:.3f}" for row in figures)
    save_picture(
        folder / "overlays" / f"{name}.png", mask_pictures.overlay(*arrays, spacing, settings.clip_range, title)
    )
    return np.array([[np.nan if row[figure] is None else row[figure] for figure in COLUMNS[3:]] for row in figures])


def show_test_cases(state: FoldState, writer: Any, cases: Cases, settings: InferenceSettings) -> None:
    """Put the window around the lesion of the first test cases into TensorBoard: how their outlines grow."""
    network = state.model.eval()
    for case in state.fold.test[:SHOWN_CASES]:
        try:
            image, label = cases.cache.read_window(case, settings.windows.size)
        except DataError as error:
            raise UserError(str(error)) from error
        log_probabilities = predict_log_probabilities([network], image, settings, state.runtime)
        picture = mask_pictures.overlay(
            voxels_of(image),
            log_probabilities.argmax(0).numpy().astype(np.uint8),
            label,
            image.GetSpacing(),
            settings.clip_range,
            cases.names[case],
        )
        writer.add_image(f"test/{cases.names[case]}", picture, state.progress.step, dataformats="HWC")


# ------------------------------------------------------------------------------------------------------- prediction


def predict(
    source: str,
    weights: str,
    output_dir: Path,
    given: dict[str, Any],
    skip_air: bool,
    save_probabilities: bool,
    runtime: Runtime,
) -> None:
    """Write a mask for each volume that --predict names: the mean over the folds of a run. Raises UserError if some
    failed.

    given: {name: value} of those in MASKS that differ from the run's
    """
    processes = runtime.processes
    new, files = processes.run_on_main(lambda: find_new_scans(source, weights, output_dir))
    names, paths = new.names, new.paths
    networks, config, _ = load_folds(files, segmenter_of, "decoder")
    networks = [network.to(processes.device).eval() for network in networks]
    settings = inference_settings(config | given, runtime.batch_size, skip_air)
    outputs = [outputs_of(output_dir, name, config["classes"], save_probabilities) for name in names]
    require_own_names(outputs, names)
    predictions = Predictions(
        output_dir / "volumes.csv",
        ("case", *new.columns, "class", "volume_ml", "lesions"),
        [without_suffix(name) for name in names],
        paths,
        [of_scan.files for of_scan in outputs],
        weights_recipe(files)
        | {name: (config | given)[name] for name in MASKS}
        | {"precision": runtime.precision, "skip_air": skip_air},
        runtime,
        new.known(),
    )
    processes.print(
        f"{len(names)} volumes, mean of {len(files)} fold{'s' * (len(files) > 1)}, "
        f"{format_values(config['spacing'])} mm, {runtime.precision}{predictions.done_before()}"
    )
    for line in processes.run_on_main(lambda: odd_headers([paths[at] for at in predictions.todo])):
        processes.print(line)
    with runtime.stop_signal:
        with contextlib.suppress(StopRequested):  # the case at hand is not done
            for at in predictions.share():
                runtime.stop_signal.check()
                rows = predictions.attempt(
                    at, lambda at=at: predict_case(paths[at], outputs[at], networks, config, settings, runtime)
                )
                if rows:
                    print(f"{names[at]}: " + told_volumes(rows), flush=True)
        predictions.finish(
            lambda table: f"masks     {output_dir}\noverlays  {output_dir / OVERLAYS}\nvolumes   {predictions.table}"
        )


class ScanOutputs(NamedTuple):
    """What a scan's prediction writes: its mask, its picture, and a probability map of each foreground class, if
    asked."""

    mask: Path
    overlay: Path
    probabilities: list[Path]

    @property
    def files(self) -> list[Path]:
        return [self.mask, self.overlay, *self.probabilities]


def outputs_of(output_dir: Path, name: str, classes: int, save_probabilities: bool) -> ScanOutputs:
    """The ScanOutputs of a volume of this name."""
    base = without_suffix(name)
    suffixes = [""] if classes == 2 else [f"_class{k}" for k in range(1, classes)]
    maps = [output_dir / PROBABILITIES / f"{base}{suffix}.nii.gz" for suffix in suffixes]
    return ScanOutputs(
        output_dir / mask_name(name), output_dir / OVERLAYS / f"{base}.png", maps if save_probabilities else []
    )


def require_own_names(outputs: Sequence[ScanOutputs], names: Sequence[str]) -> None:
    """UserError where two files of a prediction would have one name."""
    seen = {}
    for name, of_scan in zip(names, outputs):
        for file in of_scan.files:
            if (first := seen.setdefault(file, name)) != name:
                raise UserError(f"--predict: {file} would be of {first} and of {name}; rename one", everywhere=True)


def predict_case(
    path: str,
    outputs: ScanOutputs,
    networks: Sequence[Segmenter],
    config: dict[str, Any],
    settings: InferenceSettings,
    runtime: Runtime,
) -> list[tuple[int, float, int]]:
    """(class, millilitres, lesions) of each foreground class in a volume, whose mask, picture and maps are then
    written. Raises DataError, UserError."""
    image = read_image(path)
    require_ct(voxels_of(image), path)
    if told := too_bright(voxels_of(image)):
        print(f"warning: {path}: {told}", flush=True)
    mask, levels = mask_and_levels(
        networks, image, config["spacing"], settings, runtime, with_levels=bool(outputs.probabilities)
    )
    predicted = voxels_of(mask)
    foreground = predicted[mask_metrics.bounding_box(predicted)]
    counts = np.bincount(foreground.ravel(), minlength=config["classes"])[1:]
    rows = []
    for k, n in enumerate(counts, 1):
        lesions = int(mask_metrics.components(foreground == k).max(initial=0))
        rows.append((k, float(n * np.prod(image.GetSpacing()) / 1000), lesions))
    title = f"{outputs.overlay.stem}: " + told_volumes(rows)
    arrays = voxels_of(image), predicted, None
    picture = mask_pictures.overlay(*arrays, image.GetSpacing(), settings.clip_range, title)
    try:
        for file in outputs.files:
            file.parent.mkdir(parents=True, exist_ok=True)
        with Volume(path) as volume:
            for file, of_class in zip(outputs.probabilities, levels if outputs.probabilities else ()):
                volume.save_map(file, of_class, slope=1 / sliding_window.LEVELS)
            save_picture(outputs.overlay, picture)
            volume.save_mask(outputs.mask, predicted)
    except OSError as error:
        raise UserError(f"{outputs.mask}: can't be written ({error.strerror or error})") from error
    return rows


def told_volumes(rows: Sequence[tuple[int, float, int]]) -> str:
    """What was found of each class. rows: of `predict_case`"""
    return ", ".join(f"{ml:.3g} ml in {n} lesion{'s' * (n != 1)}" for _, ml, n in rows)


def without_suffix(name: str) -> str:
    """What to call a volume: its name without suffix, and no hidden one for a DICOM series right in the folder."""
    return os.path.join(os.path.dirname(name), stem(name)).removeprefix(".#")


def mask_name(name: str) -> str:
    """Where a volume's mask goes below --output_dir: the same name, as NIfTI."""
    return name if name.lower().endswith((".nii", ".nii.gz")) else without_suffix(name) + ".nii.gz"


def find_new_scans(source: str, weights: str, output_dir: Path) -> tuple[NewCases, list[Path]]:
    """(NewCases, files of the folds) of a prediction. Raises UserError where a mask would replace a scan or be taken
    for one."""
    if os.path.isdir(source) and Path(os.path.realpath(output_dir)).is_relative_to(os.path.realpath(source)):
        raise UserError(
            f"--output_dir {output_dir}: lies in the --predict folder, where masks would replace CTs or be taken "
            "for them; choose another"
        )
    files = find_folds(weights, output_dir)
    new = find_new_cases(source)
    names = new.names
    called = collections.Counter(map(without_suffix, names))  # in the table, where the rows of one name are one file's
    known = {os.path.realpath(path) for path in new.paths}
    lost = next((name for name in names if os.path.realpath(output_dir / mask_name(name)) in known), None)
    if lost:
        raise UserError(
            f"--output_dir {output_dir}: the mask of {lost} would replace a CT of --predict; choose another"
        )
    twice = next((name for name in names if called[without_suffix(name)] > 1), None)
    if twice:
        raise UserError(f"--predict {source}: two volumes are called {without_suffix(twice)}; rename one")
    return new, files


# ----------------------------------------------------------------------------------------------------- what is shown


def warnings_about(
    encoder: PretrainedEncoder, args: argparse.Namespace, found: Sequence[CaseInfo], names: Sequence[str]
) -> list[str]:
    """Lines about what works but may not be meant. found: resampled_cache.CaseInfo of each case."""
    lines = []
    if encoder.state is None:
        lines.append(
            "training from scratch: no --pretrained_weights"
            if not args.freeze_encoder
            else "warning: no --pretrained_weights: --freeze_encoder judges the features of a random encoder"
        )
    small = [name for name, one in zip(names, found) if any(n < m for n, m in zip(one.shape, args.input_size))]
    if small:
        lines.append(
            f"note: cases smaller than the window of {format_values(args.input_size)} voxels: {len(small)}, such as "
            f"{small[0]}; air is put around them"
        )
    beyond = sum(not one.stored for one in found)
    if beyond:
        lines.append(
            f"warning: cases beyond --cache_gb {args.cache_gb:g}: {beyond}; resampling them for every window is slow"
        )
    return lines


def run_summary(config: dict[str, Any], processes: utils.Processes, cases: Cases, splits: Sequence[Split]) -> str:
    """What is about to run, in a few lines. splits: of patients"""
    fixed = len(of_patients(splits[0].test, cases.patients))
    few = fraction_text(splits, len(set(cases.patients)), config["label_fraction"])
    device = f"{processes.world_size} x {utils.device_name(processes.device)}"
    frozen = ", frozen encoder" if config["freeze_encoder"] else ""
    return (
        f"{config['arch']} with {config['decoder']} decoder{frozen} on {device}, {config['precision']}; "
        f"{len(cases.names)} cases, {cases.classes} classes with the background\n"
        f"{len(splits)} folds, test set of {fixed} cases{few}; windows of "
        f"{format_values(config['input_size'])} voxels "
        f"of {format_values(config['spacing'])} mm"
    )


def summarise(output_dir: Path, cases: Cases, folds: int) -> str:
    """Write metrics.json and cases.csv of all folds; returns the table and where things are."""
    records, tables, means, deviations = collect_folds(
        output_dir,
        folds,
        "cases.csv",
        COLUMNS,
        (*MASK_METRICS, *LESION_METRICS),
        lambda record, _: dict.fromkeys((*LESION_COUNTS, *LESION_METRICS)) | record,  # older versions counted none
    )
    rows = [[row.get(name, "") for name in COLUMNS] for table in tables for row in table]
    together = pool_cases(rows, dict(zip(cases.names, cases.patients)))
    who = "cases" if cases.patients == cases.names else "patients"
    write_json(
        output_dir / "metrics.json",
        {
            "classes": cases.classes,
            "cases": len(cases.names),
            "spacing": list(cases.cache.spacing),
            "folds": records,
            "mean": means,
            "sd": deviations,
            "all_folds": together,
        },
    )
    report_segmentation(output_dir)
    row = "{:<9}  {:>5}  {:<24}  {:<15}  {}".format
    lines = [row("fold", "cases", "Dice", "surface Dice", "95 % Hausdorff, mm")]
    for record in records:
        undefined = record["undefined_hausdorff95"]
        lines.append(
            row(record["fold"], record["cases"], *(format_metric(record[name]) for name in MASK_METRICS))
            + (f" ({undefined} undefined)" if undefined else "")
        )
    lines.append(
        row(
            "mean ± SD",
            "",
            *(
                format_metric(means[name]) + (f" ± {deviations[name]:.3f}" if deviations[name] is not None else "")
                for name in MASK_METRICS
            ),
        )
    )
    lines.append(
        row("all folds", together["cases"], with_interval(together["dice"], together["dice_interval"]), "", "").rstrip()
    )
    lines.append(
        "all folds: each test case once, with the mean of its folds' Dice"
        + (f"; in brackets the 95 % interval over {who}" if together["dice_interval"] else "")
    )
    lines += lesion_lines(records, together)
    lines += [f"note: fold {record['fold']}: {note}" for record in records for note in record.get("notes", ())]
    lines += [f"note: all folds: {note}" for note in together["notes"]]
    lines += [
        f"metrics      {output_dir / 'metrics.json'}",
        f"cases        {output_dir / 'cases.csv'}",
        f"report       {output_dir / 'report.html'}",
        f"overlays     {output_dir / '0' / 'overlays'} (label green, prediction red)",
        f"masks        {output_dir / '0' / 'masks'}",
        f"TensorBoard  tensorboard --logdir {output_dir}",
        f"new CTs      python main_lts_msd.py --predict DIR --weights {output_dir} --output_dir PREDICTIONS",
    ]
    return "\n".join(lines)


def lesion_lines(records: Sequence[dict[str, Any]], together: dict[str, Any]) -> list[str]:
    """Table of the lesions found and missed and of false positives."""
    row = "{:<9}  {:<13}  {:<24}  {:<9}  {:<5}  {}".format
    lines = ["", row("fold", "lesions found", "sensitivity", "precision", "F1", "FP per CT")]
    for name, values in (*((record["fold"], record) for record in records), ("all folds", together)):
        hits, missed = (values[count] for count in ("lesions_found", "lesions_missed"))
        found = "not counted" if hits is None else f"{hits:g} of {hits + missed:g}"
        figures = [format_metric(values[metric]) for metric in LESION_METRICS]
        figures[0] = with_interval(values["lesion_sensitivity"], values.get("lesion_sensitivity_interval"))
        lines.append(row(name, found, *figures))
    return [*lines, "a lesion is found, a predicted one true, where any voxel overlaps; FP: false positives"]


if __name__ == "__main__":
    utils.run_script(main)
