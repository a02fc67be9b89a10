"""Lung nodule classification: fine-tune a pre-trained encoder on labelled crops, evaluate it, predict new ones.

Four GPUs, a laptop, new crops, points in new CTs:
    torchrun --nproc_per_node=4 main_lnc_luna16.py --pretrained_weights /path/to/pretrained/model.pth \
        --data_dir /path/to/lnc_luna16/data --output_dir /path/to/output
    python main_lnc_luna16.py --protocol linear --pretrained_weights model.pth --data_dir DIR --output_dir OUT
    python main_lnc_luna16.py --predict DIR --weights OUT --output_dir PREDICTIONS
    python main_lnc_luna16.py --predict SCANS --points points.csv --weights OUT --output_dir PREDICTIONS

The same --output_dir resumes where it stopped. It holds a folder per fold (checkpoint.pth, the newest state; best.pth,
the best on validation; log.txt), splits.json, metrics.json, predictions.csv, report.html, its pictures, config.json and
TensorBoard's files.
"""

import dino3d.openmp  # noqa: F401  before torch is loaded

# isort: split

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from augmentations import AUGMENTATION_FLAGS, paper_policy
from dino3d import command_line
from dino3d.command_line import UserError, format_values, number
from dino3d.data.conventions import DataError
from dino3d.data.layouts import case_names, find_crops
from dino3d.data.lists import LABEL, crops_of_list
from dino3d.data.requirements import alike_patients
from dino3d.evaluation.calibration import (
    PROBABILITY_METRICS,
    Calibration,
    fit_calibration,
    prior_offset,
    probability_intervals,
    probability_metrics,
)
from dino3d.evaluation.classification_metrics import (
    CASE_METRICS,
    area_under_roc,
    choose_threshold,
    decide,
    evaluate_cases,
    pool_predictions,
    read_probabilities,
    table_header,
    table_probabilities,
    tested_header,
)
from dino3d.evaluation.statistics import format_metric, interval_notes, with_interval
from dino3d.features.encoder import PretrainedEncoder, load_encoder
from dino3d.features.pooling import POOLS, pool_problem
from dino3d.files import write_json, write_table
from dino3d.finetune import flags
from dino3d.finetune.classification_pictures import draw_curves, draw_errors
from dino3d.finetune.crops import (
    CropBatch,
    EvaluationCrops,
    TrainingCrops,
    WindowAugmentation,
    check_crops,
    new_crop_lines,
    schedule_notices,
    spacing_warning,
)
from dino3d.finetune.flags import FIXED_FLAGS
from dino3d.finetune.fold_folders import collect_folds, load_folds, refuse_pretraining_run, start_run
from dino3d.finetune.fold_loop import Fold, FoldState, Score, TrainConfig, Validation, run_fold
from dino3d.finetune.heads import Classifier, NearestNeighbours, build_classifier, classifier_of
from dino3d.finetune.inference import failed_cases, find_folds, find_new_cases, infer_windows
from dino3d.finetune.prediction import Predictions, predict_windows, weights_recipe
from dino3d.finetune.run_report import report_classification
from dino3d.finetune.runtime import Runtime, start_runtime
from dino3d.finetune.same_data import contents_of
from dino3d.finetune.splits import Split, fraction_text, make_splits, of_patients

SCORE = Score("auc", "AUC")  # by which the best epoch is chosen
LAYOUT = "subset*/label0|label1/<patient>/<name>.nii.gz"  # of --data_dir
# What must not change while a run is resumed fold by fold
FIXED = (*FIXED_FLAGS, "protocol", "pool", "knn_k", "negatives", "eval_negatives", "folds")


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="main_lnc_luna16.py",
        usage="main_lnc_luna16.py --data_dir DIR --output_dir DIR --pretrained_weights FILE [flags]\n"
        "       main_lnc_luna16.py --predict DIR [--points CSV] --weights OUT --output_dir DIR",
        description="Lung nodule classification, fold by fold. Start the same command again to resume a run.",
    )
    flags.data_flags(
        parser,
        LAYOUT,
        columns="path and label (--label_column), and patient and subset if it has them",
        predict="folder with unlabelled crops at any depth, one file, or a table (.csv) with the column path and maybe "
        "patient; with --points: whole CTs; nothing is trained, predictions.csv goes to --output_dir",
        labels=True,
    )
    group = parser.add_argument_group("classification")
    group.add_argument(
        "--protocol",
        default="finetune",
        choices=("finetune", "linear", "knn"),
        help="finetune: encoder and head are trained; linear: linear probe, the head alone is trained "
        "on the frozen encoder's features; knn: nothing is trained, cases are compared with the training cases",
    )
    group.add_argument(
        "--pool",
        default="cls",
        choices=POOLS,
        help="what the head reads: cls: the class token; mean: the mean of the patch tokens; centre: of those around "
        "the middle of the crop alone, where the candidate is; cls+mean, cls+centre: both, one after the other. A "
        "ResNet has no class token: cls is the mean of its last feature map, as mean is. --predict reads what its run "
        "did",
    )
    group.add_argument(
        "--negatives",
        default=1.0,
        type=number(float, 0),
        help="cases of label0 per case of the other labels that an epoch of training draws anew, "
        "without replacement; 0: all",
    )
    group.add_argument(
        "--eval_negatives",
        default=0.0,
        type=number(float, 0),
        help="cases of label0 per case of the other labels in validation and test, drawn once; 0: all, "
        "which is what to report",
    )
    group.add_argument(
        "--knn_k",
        default=None,
        type=number(int, 1),
        help="neighbours that vote with --protocol knn; default: the square root of the training cases, at most 20",
    )
    flags.add_finetune_flags(
        parser,
        batch_size=128,
        folds=("patients", "subsets"),
        spacing="mm per voxel that the crops should have, for a warning where they differ; rotations then "
        "act in mm; default: the checkpoint's, if it has one",
    )
    return parser


def check_flags(parser: command_line.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the data (exit code 2), and settle what one flag means for another."""
    flags.check_finetune_flags(parser, vars(args), LAYOUT)
    if args.freeze_encoder and args.protocol == "finetune":
        args.protocol = "linear"
    args.freeze_encoder = args.protocol != "finetune"


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    idle = flags.idle_finetune_flags(parser, args)
    check_flags(parser, args)
    with start_runtime(vars(args)) as (runtime, args.precision, notices):
        run(args, runtime, notices + idle)


def run(args: argparse.Namespace, runtime: Runtime, notices: list[str]) -> None:
    """Train fold by fold from where the checkpoints in the output folder are, or predict."""
    output_dir, processes = Path(args.output_dir), runtime.processes
    if args.predict:
        for line in notices:
            processes.print(line)
        predict(args.predict, args.points, args.weights, output_dir, runtime)
        return

    # ---------------------------------------------------------------------------------------------------------- data
    cases, lines = processes.run_on_main(
        lambda: find_cases(args.data_dir, args.data_list, args.label_column or LABEL, output_dir)
    )
    notices += lines
    # Splits are by patients. data: what splits.json keeps with them, size and spacing of the crops once they are known
    splits, data = processes.run_on_main(
        lambda: make_splits(
            output_dir / "splits.json",
            args.folds,
            args.k_fold,
            args.num_test,
            args.seed,
            cases.patients,
            cases.labels.tolist(),
            cases.subsets,
            ("crop_size", "crop_spacing"),
            cases.digest,
            args.label_fraction,
            contents_of(dict(zip(cases.names, cases.paths))),
        )
    )
    case_splits = [case_numbers(split, cases, args.eval_negatives, args.seed) for split in splits]
    if "crop_size" not in data:
        check_training_sides(case_splits, cases)
        found, lines = check_crops(cases.paths, processes)
        data |= found
        notices += lines
    cases = cases._replace(crop_size=data["crop_size"])

    # --------------------------------------------------------------------------------------------------------- model
    encoder = load_encoder(args.pretrained_weights, args.checkpoint_key, vars(args))
    if problem := pool_problem(encoder.outline(), args.pool):
        raise UserError(f"--pool {args.pool}: {encoder.arch}: {problem}; take cls", everywhere=True)
    notices += encoder.notices
    vars(args).update(flags.encoder_settings(encoder, args.drop_path_rate))
    notices += warnings_about(encoder, args.protocol, data)
    config = (
        vars(args)
        | {"classes": cases.classes, "label_names": cases.label_names, "weights_crc32": encoder.crc32}
        | {name: data.get(name) for name in ("crop_size", "crop_spacing", "crop_spacings_differ")}
    )

    # -------------------------------------------------------------------------------------------------- optimisation
    policy = paper_policy(name for flag, name in AUGMENTATION_FLAGS.items() if getattr(args, flag))
    spacing = data["crop_spacing"] if args.spacing else None  # augments in mm, as pre-training with --spacing did
    augmentation = WindowAugmentation(policy, args.input_size, args.shift_range, spacing)
    dataset = TrainingCrops(cases.paths, cases.crop_size, augmentation, args.seed)
    train_config = TrainConfig.from_flags(vars(args), epochs=0 if args.protocol == "knn" else args.epochs)

    # ------------------------------------------------------------------------------------------------------ training
    start_run(output_dir, config, FIXED, splits, data, processes, len(cases.names))
    orders = [
        functools.partial(case_order, split.train, cases.labels, args.negatives, args.seed) for split in case_splits
    ]
    longest = max(len(order(0)) for order in orders)
    global_batch = args.batch_size_per_gpu * processes.world_size
    notices += schedule_notices(longest, train_config.epochs, args.warmup_epochs, global_batch)
    for line in [*notices, run_summary(config, processes, cases, splits, case_splits)]:
        processes.print(line)
    steps_left = args.max_steps or math.inf
    with runtime.stop_signal:
        for number, (split, order) in enumerate(zip(case_splits, orders)):
            torch.manual_seed(args.seed)  # every fold starts from the same weights
            drawn = draw_negatives(split.train, cases.labels, args.negatives, args.seed, 0)  # the first epoch's cases
            model = build_classifier(
                args.protocol, encoder, args.pool, args.drop_path_rate, cases.classes, len(drawn), args.knn_k
            )
            steps_left = run_fold(
                Fold(number, output_dir / str(number), *split),
                model,
                train_config,
                config,
                runtime,
                steps_left,
                dataset=dataset,
                epoch_order=order,
                score=SCORE,
                train_one_epoch=functools.partial(
                    train_one_epoch,
                    labels=cases.labels,
                    augmentation=augmentation,
                    clip_range=args.clip_range,
                    class_weights=class_weights(drawn, cases),
                ),
                validate=functools.partial(
                    validate,
                    cases=cases,
                    clip_range=args.clip_range,
                    logit_offset=logit_offset(split, drawn, cases, args.protocol, args.eval_negatives, args.seed),
                ),
                test=functools.partial(test_fold, cases=cases, clip_range=args.clip_range),
                fit=functools.partial(fit_head, cases=cases, clip_range=args.clip_range, drawn=drawn),
            )
            if steps_left is None:
                return
    if processes.is_main:
        print(summarise(output_dir, cases, len(splits), args.protocol, encoder))


# ---------------------------------------------------------------------------------------------------------- training


def train_one_epoch(
    state: FoldState,
    batches: Iterator[CropBatch],
    labels: np.ndarray,
    augmentation: WindowAugmentation,
    clip_range: Sequence[float],
    class_weights: Tensor,
) -> None:
    """Steps on augmented crops, with the cross-entropy of each weighted by its class.

    state: fold_loop.FoldState; batches: gives CropBatches on the CPU
    labels: (N,) of all cases; augmentation: WindowAugmentation; class_weights: (classes,)
    """
    labels = torch.from_numpy(labels)
    for batch in batches:
        targets = labels[batch.cases]  # (B,)
        weights = class_weights[targets] * batch.counted  # (B,), 0 for a case that only fills a rank's share
        targets, weights = (part.to(state.device, non_blocking=True) for part in (targets, weights))
        batch = batch.to(state.device)
        volumes = augmentation.render(batch.crops, batch.group, clip_range)  # (B, 1, x, y, z)
        with state.runtime.autocast():
            logits = state.network(volumes)  # (B, classes)
        losses = F.cross_entropy(logits, targets, reduction="none")  # (B,)
        state.step(losses, weights)


# -------------------------------------------------------------------------------------------------------------- data


class Cases(NamedTuple):
    """The data set, sorted by path. labels: (N,) int64; classes: how many there are; crop_size: (3,) voxels of all.

    label_names: of the classes, where a --data_list has words; digest: what changes when that list does
    """

    names: list[str]
    paths: list[str]
    labels: np.ndarray
    patients: list[str]
    subsets: list[str]
    classes: int
    crop_size: list[int] | None = None
    label_names: list[str] | None = None
    digest: str | None = None


def find_cases(
    folder: str | None, data_list: str | None, label_column: str, output_dir: Path
) -> tuple[Cases, list[str]]:
    """(the Cases below a folder or of a table, lines on what is odd). Raises UserError, also where the output folder is
    of another script's run."""
    refuse_pretraining_run(output_dir)
    flag = "--data_list" if data_list else "--data_dir"
    try:
        if data_list:
            crops, names, problems, lines, label_names, digest = crops_of_list(data_list, label_column)
        else:
            (crops, problems), names, label_names, digest = find_crops(folder), [], None, None
            lines = alike_patients([crop.patient for crop in crops], folder)
    except (DataError, UserError) as error:
        raise UserError(f"{flag} {error}") from error
    if problems:
        raise UserError(f"{flag} {problems[0]}")
    names = names or case_names([crop.path for crop in crops], folder)
    labels = np.array([crop.label for crop in crops])
    cases = Cases(
        names,
        [crop.path for crop in crops],
        labels,
        [crop.patient for crop in crops],
        [crop.subset for crop in crops],
        int(labels.max()) + 1,
        label_names=label_names,
        digest=digest,
    )
    return cases, lines


def check_training_sides(case_splits: Sequence[Split], cases: Cases) -> None:
    """UserError where a fold has a class that it can't learn."""
    for fold, split in enumerate(case_splits):
        missing = sorted(set(range(cases.classes)) - set(cases.labels[split.train].tolist()))
        if missing:
            raise UserError(
                f"fold {fold} has no patient with label{missing[0]} to train on: too few patients have "
                "such cases; lower --k_fold or --num_test, or add patients",
                everywhere=True,
            )


def case_numbers(split: Split, cases: Cases, eval_negatives: float, seed: int) -> Split:
    """Split with case numbers instead of patients; validation and test without the negatives that are not drawn."""
    train, *others = (of_patients(side, cases.patients) for side in split)
    return Split(train, *(draw_negatives(side, cases.labels, eval_negatives, seed, 0) for side in others))


def draw_negatives(chosen: np.ndarray, labels: np.ndarray, ratio: float, seed: int, epoch: int) -> np.ndarray:
    """(n,) sorted: all of the `chosen` cases that are not label 0, and for each of them `ratio` of those that are.

    Drawn without replacement, anew for each epoch. ratio 0: all.
    """
    positive = labels[chosen] != 0
    if not ratio or not positive.any():
        return chosen
    negatives = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(chosen[~positive])
    return np.sort(np.concatenate([chosen[positive], negatives[: max(1, round(ratio * positive.sum()))]]))


def case_order(train: np.ndarray, labels: np.ndarray, negatives: float, seed: int, epoch: int) -> np.ndarray:
    """(n,) the cases of an epoch in the order of training."""
    drawn = draw_negatives(train, labels, negatives, seed, epoch)
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, 1))).permutation(drawn)


def class_weights(drawn: np.ndarray, cases: Cases) -> Tensor:
    """(classes,) inverse frequency among an epoch's cases, 1 on average over them."""
    counts = np.bincount(cases.labels[drawn], minlength=cases.classes)
    return torch.as_tensor(len(drawn) / (cases.classes * counts), dtype=torch.get_default_dtype())


def logit_offset(
    split: Split, drawn: np.ndarray, cases: Cases, protocol: str, eval_negatives: float, seed: int
) -> list[float]:
    """What calibration adds to the logits of two classes: from the frequencies that training gave them, equal by the
    loss's weights or those of the cases that k-NN remembers, to those of cases as evaluation takes them."""
    train = draw_negatives(split.train, cases.labels, eval_negatives, seed, 0)
    counts = np.bincount(cases.labels[[*train, *split.validation]], minlength=cases.classes)
    remembered = np.bincount(cases.labels[drawn], minlength=cases.classes)
    return prior_offset(counts, remembered if protocol == "knn" else np.ones(cases.classes))


# ------------------------------------------------------------------------------------------------------------- model


def fit_head(state: FoldState, cases: Cases, clip_range: Sequence[float], drawn: np.ndarray) -> None:
    """Give a frozen encoder's head the training cases' features, not augmented: to standardise, to compare with."""
    if not state.model.freeze_encoder:
        return
    model = state.model.eval()
    dataset = EvaluationCrops(cases.paths, model.encoder.img_size, (cases.paths[0], cases.crop_size))
    features = torch.from_numpy(infer_windows(model.features, dataset, drawn, clip_range, state.runtime))
    features = features.to(state.device, torch.get_default_dtype())
    if isinstance(model.head, NearestNeighbours):
        model.head.fit(features, torch.from_numpy(cases.labels[drawn]))
    else:
        model.head.standardise.fit(features)


# -------------------------------------------------------------------------------------------------------- evaluation


def classify(model: Classifier, volumes: Tensor) -> Tensor:
    """(B, classes) probabilities in double precision: in single precision confident cases would be ties."""
    return model(volumes).double().softmax(-1)


def probabilities_of(
    model: Classifier,
    numbers: np.ndarray,
    cases: Cases,
    clip_range: Sequence[float],
    runtime: Runtime,
    failures: dict[int, str] | None = None,
) -> np.ndarray:
    """(N, classes) probabilities of the cases with these numbers. failures: see `inference.map_over_ranks`"""
    dataset = EvaluationCrops(cases.paths, model.encoder.img_size, (cases.paths[0], cases.crop_size))
    return infer_windows(functools.partial(classify, model.eval()), dataset, numbers, clip_range, runtime, failures)


def validate(
    state: FoldState, cases: Cases, clip_range: Sequence[float], logit_offset: Sequence[float] = ()
) -> Validation:
    """fold_loop.Validation of the fold's validation cases; threshold and temperature are chosen on them too, the
    threshold on the calibrated scale."""
    probabilities = probabilities_of(state.model, state.fold.validation, cases, clip_range, state.runtime)
    labels = cases.labels[state.fold.validation]
    of_label = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)  # (N,)
    loss = float(np.mean([-np.log(of_label[labels == k]).mean() for k in np.unique(labels)]))  # all classes count alike
    calibration = fit_calibration(labels, probabilities, logit_offset)
    threshold = calibration.apply_to_threshold(choose_threshold(labels, probabilities))
    return Validation(
        {"auc": area_under_roc(labels, probabilities), "loss": loss}, {"threshold": threshold, **calibration._asdict()}
    )


def test_fold(state: FoldState, cases: Cases, clip_range: Sequence[float]) -> None:
    """Evaluate the test cases and write the fold's predictions.csv and metrics.json."""
    fold, best = state.fold, state.best
    failures, calibration = {}, Calibration.from_best(best)
    uncalibrated = probabilities_of(state.model, fold.test, cases, clip_range, state.runtime, failures)
    if not state.runtime.processes.is_main:
        return
    tested = np.array([case for case in fold.test if case not in failures])
    labels, patients = cases.labels[tested], [cases.patients[i] for i in tested]
    probabilities = calibration.apply(uncalibrated)
    record = {
        "fold": fold.number,
        "cases": len(labels),
        "patients": len(set(patients)),
        "best_epoch": best["epoch"],
        "validation_auc": best["auc"],
        "validation_loss": best["loss"],
        "threshold": best["threshold"],
        **evaluate_cases(labels, probabilities, patients, best["threshold"]),
        "temperature": calibration.temperature,
        "logit_offset": list(calibration.logit_offset),
        **probability_metrics(labels, uncalibrated, probabilities, best["threshold"]),
        "notes": [*failed_cases(cases.names, failures), *interval_notes(patients)],
    }
    if best["auc"] is None:
        record["notes"].append(
            "validation cases are of one class: best epoch by loss, threshold 0.5 before calibration"
        )
    if calibration.calibration_note:
        record["notes"].append(calibration.calibration_note)
    if record["auc"] is None:
        record["notes"].append("test cases lack a class: AUC, average precision and balanced accuracy are undefined")
    rows = [
        [
            cases.names[i],
            cases.patients[i],
            fold.number,
            int(cases.labels[i]),
            *table_probabilities(row),
            *table_probabilities(before),
        ]
        for i, row, before in zip(tested, probabilities, uncalibrated)
    ]
    write_table(fold.folder / "predictions.csv", tested_header(cases.classes), rows)
    write_json(fold.folder / "metrics.json", record)


# ------------------------------------------------------------------------------------------------------- prediction


def predict(source: str, points: str | None, weights: str, output_dir: Path, runtime: Runtime) -> None:
    """Write predictions.csv: the mean over the folds of a run, for all crops below a folder, or for the points of a
    table in the CTs there. Raises UserError if some failed."""
    processes = runtime.processes
    files = processes.run_on_main(lambda: find_folds(weights, output_dir))
    models, config, best = load_folds(files, classifier_of, "protocol")
    models = [model.to(processes.device).eval() for model in models]
    calibrations = list(map(Calibration.from_best, best))
    threshold = float(np.mean([of_fold["threshold"] for of_fold in best]))

    def rows_of(volumes: Tensor) -> list[list[Any]]:  # (B, 1, X, Y, Z)
        of_folds = [one.apply(classify(model, volumes).cpu().numpy()) for model, one in zip(models, calibrations)]
        probabilities = np.mean(of_folds, axis=0)
        predicted = decide(probabilities, threshold)
        return [[*table_probabilities(row), int(label)] for row, label in zip(probabilities, predicted)]

    def start(
        columns: Sequence[str], names: list[str], paths: list[str], recipe: dict[str, Any], **more: Any
    ) -> Predictions:
        header = [*table_header(config["classes"], ["case", *columns]), "predicted"]
        recipe = weights_recipe(files) | {"precision": runtime.precision} | recipe
        table = output_dir / "predictions.csv"
        return Predictions(table, header, names, paths, [()] * len(paths), recipe, runtime, **more)

    if points:
        predictions, run = new_points(source, points, output_dir, start, rows_of, config, runtime)
    else:
        predictions, run = new_crops(source, start, rows_of, config, runtime)
    with runtime.stop_signal:
        run()
        predictions.finish(
            lambda table: (
                predicted_summary(
                    table, "points" if points else "crops", len(files), config, threshold, runtime.precision
                )
                + f"\npredictions  {predictions.table}"
            )
        )


def new_crops(
    source: str,
    start: Callable[..., Predictions],
    rows_of: Callable[[Tensor], list[list[Any]]],
    config: dict[str, Any],
    runtime: Runtime,
) -> tuple[Predictions, Callable[[], None]]:
    """(Predictions of the crops that --predict names, what makes them).

    start: gives the Predictions of (columns, names, paths, recipe), of all that is theirs alone
    rows_of: see `prediction.predict_windows`
    """
    new = runtime.processes.run_on_main(lambda: find_new_cases(source))
    paths = new.paths
    names = runtime.processes.run_on_main(lambda: case_names(paths, new.folder))
    predictions = start(new.columns, names, paths, {}, known=new.known())
    seen = np.minimum(config["crop_size"], config["input_size"])
    for line in new_crop_lines(paths, config["crop_spacing"], seen, runtime.processes):
        runtime.processes.print(line)
    dataset = EvaluationCrops(paths, config["input_size"], trained=(config["crop_size"], config["crop_spacing"]))
    return predictions, lambda: predict_windows(rows_of, dataset, predictions, config["clip_range"], runtime)


def new_points(
    source: str,
    points: str,
    output_dir: Path,
    start: Callable[..., Predictions],
    rows_of: Callable[[Tensor], list[list[Any]]],
    config: dict[str, Any],
    runtime: Runtime,
) -> tuple[Predictions, Callable[[], None]]:
    """(Predictions of a table's points in the CTs below a folder, what makes them); crops are cut as training's.

    start, rows_of: see `new_crops`
    """
    from dino3d.finetune import point_prediction  # loads ITK, which crops don't need

    scans, lines = runtime.processes.run_on_main(lambda: point_prediction.find_points(points, source, output_dir))
    spacing = None if config.get("crop_spacings_differ") else config["crop_spacing"]
    crops = point_prediction.PointCrops(config["crop_size"], spacing, config["input_size"], config["clip_range"])
    predictions = start(
        point_prediction.AXES,
        [scan.series for scan in scans],
        [scan.path for scan in scans],
        point_prediction.points_recipe(scans),
        known=point_prediction.known_points(scans),
        unit="points",
    )
    cut = f"{format_values(spacing)} mm" if spacing else "each scan's own voxels, as training's had several spacings"
    lines.append(
        f"{sum(len(scan.points) for scan in scans)} points in {len(scans)} scans{predictions.done_before('scans')}; "
        f"crops of {format_values(config['crop_size'])} voxels of {cut}"
    )
    for line in lines:
        runtime.processes.print(line)
    return predictions, lambda: point_prediction.predict_points(rows_of, scans, crops, predictions, runtime)


def predicted_summary(
    table: Sequence[dict[str, str]], unit: str, folds: int, config: dict[str, Any], threshold: float, precision: str
) -> str:
    """How many crops or points were predicted to be of which class. table: rows of predictions.csv"""
    classes = config["classes"]
    names = [f"label{k}" for k in range(classes)]
    if words := config.get("label_names"):  # of a --data_list; the table has the numbers
        names = [f"{name} ({word})" for name, word in zip(names, words)]
    predicted = np.array([int(row["predicted"]) for row in table if row["predicted"]], int)
    counts = ", ".join(f"{name}: {n}" for name, n in zip(names, np.bincount(predicted, minlength=classes)))
    told = f" (threshold {threshold:.3f})" if classes == 2 else ""
    return f"{len(predicted)} {unit}, mean of {folds} fold{'s' * (folds > 1)}, {precision}; {counts}{told}"


# ----------------------------------------------------------------------------------------------------- what is shown


def warnings_about(encoder: PretrainedEncoder, protocol: str, data: dict[str, Any]) -> list[str]:
    """Lines about what works but may not be meant."""
    lines = []
    if encoder.state is None:
        lines.append(
            "training from scratch: no --pretrained_weights"
            if protocol == "finetune"
            else f"warning: no --pretrained_weights: --protocol {protocol} judges the features of a random encoder"
        )
    lines += spacing_warning(data["crop_spacing"], encoder.spacing, "the crops have", "the encoder knows")
    if any(n < m for n, m in zip(data["crop_size"], encoder.input_size)):
        lines.append(
            f"warning: the crops have {format_values(data['crop_size'])} voxels, less than the input's "
            f"{format_values(encoder.input_size)}: air is put around them"
        )
    return lines


def run_summary(
    config: dict[str, Any],
    processes: utils.Processes,
    cases: Cases,
    splits: Sequence[Split],
    case_splits: Sequence[Split],
) -> str:
    """What is about to run, in a few lines. splits: of patients; case_splits: of case numbers"""
    counts = ", ".join(f"{n} of label{k}" for k, n in enumerate(np.bincount(cases.labels)))
    fixed = len(case_splits[0].test)
    test = "each subset tested once" if config["folds"] == "subsets" else f"test set of {fixed} cases"
    few = fraction_text(splits, len(set(cases.patients)), config["label_fraction"])
    device = f"{processes.world_size} x {utils.device_name(processes.device)}"
    return (
        f"{config['arch']} ({config['protocol']}, {config['pool']}) on {device}, {config['precision']}; "
        f"{len(cases.names)} cases ({counts}) of {len(set(cases.patients))} patients\n"
        f"{len(case_splits)} folds, {test}{few}; crops {format_values(config['crop_size'])}, input "
        f"{format_values(config['input_size'])}"
    )


def complete_record(record: dict[str, Any], table: list[dict[str, str]], classes: int) -> dict[str, Any]:
    """A fold's metrics.json with what older versions left out, which calibrated nothing. table: its predictions.csv"""
    if "temperature" in record:
        return record
    labels, probabilities = np.array([int(row["label"]) for row in table]), read_probabilities(table, classes)
    found = probability_metrics(labels, probabilities, probabilities, record["threshold"])
    notes = [*record["notes"], "tested by an older version: not calibrated"]
    return record | {"temperature": 1.0, "logit_offset": [], **found, "notes": notes}


def summarise(output_dir: Path, cases: Cases, folds: int, protocol: str, encoder: PretrainedEncoder) -> str:
    """Write metrics.json, predictions.csv and the pictures of all folds; returns the table and where things are."""
    records, tables, means, deviations = collect_folds(
        output_dir,
        folds,
        "predictions.csv",
        tested_header(cases.classes),
        (*CASE_METRICS, *PROBABILITY_METRICS),
        functools.partial(complete_record, classes=cases.classes),
    )
    pooled = pool_predictions(tables, records, cases)
    tested = pooled.labels, pooled.uncalibrated, pooled.probabilities, pooled.thresholds
    all_folds = {
        "cases": len(pooled.labels),
        **pooled.metrics,
        **probability_metrics(*tested),
        **probability_intervals(*tested, pooled.patients),
    }
    write_json(
        output_dir / "metrics.json",
        {
            "protocol": protocol,
            "classes": cases.classes,
            "cases": len(cases.names),
            "patients": len(set(cases.patients)),
            "folds": records,
            "mean": means,
            "sd": deviations,
            "all_folds": all_folds,
        },
    )
    draw_curves(output_dir / "curves.png", tables, cases.classes)
    wrong = draw_errors(output_dir / "errors.png", pooled, cases, encoder)
    report_classification(output_dir)
    row = "{:<9}  {:>5}  {:<24}  {:<17}  {:<8}  {:<11}  {}".format
    lines = [row("fold", "cases", "AUC (95 % interval)", *(name.replace("_", " ") for name in CASE_METRICS[1:]))]
    for record in records:
        values = [format_metric(record[name]) for name in CASE_METRICS[1:]]
        lines.append(
            row(record["fold"], record["cases"], with_interval(record["auc"], record["auc_interval"]), *values)
        )
    values = [
        format_metric(means[name]) + (f" ± {deviations[name]:.3f}" if deviations[name] is not None else "")
        for name in CASE_METRICS
    ]
    lines.append(row("mean ± SD", "", *values))
    values = [format_metric(pooled.metrics[name]) for name in ("average_precision", "accuracy")]
    auc = with_interval(pooled.metrics["auc"], pooled.metrics["auc_interval"])
    lines.append(row("all folds", len(pooled.labels), auc, *values, "", "").rstrip())
    lines.append(f"all folds: each tested case once, with its mean probability; {wrong} are wrong")
    lines += probability_lines(records, means, all_folds)
    lines += [f"note: fold {record['fold']}: {note}" for record in records for note in record["notes"]]
    lines += [f"note: all folds: {note}" for note in pooled.metrics["notes"]]
    lines += [
        f"metrics      {output_dir / 'metrics.json'}",
        f"predictions  {output_dir / 'predictions.csv'}",
        f"curves       {output_dir / 'curves.png'}",
        f"errors       {output_dir / 'errors.png'}",
        f"report       {output_dir / 'report.html'}",
        f"TensorBoard  tensorboard --logdir {output_dir}",
        f"new crops    python main_lnc_luna16.py --predict DIR --weights {output_dir} --output_dir PREDICTIONS",
    ]
    return "\n".join(lines)


def probability_lines(
    records: Sequence[dict[str, Any]], means: dict[str, float | None], all_folds: dict[str, Any]
) -> list[str]:
    """Table of the probabilities before and after calibration, and of the decisions."""

    def before_after(values: dict[str, Any], name: str) -> str:
        return f"{format_metric(values[name + '_uncalibrated'])} -> {format_metric(values[name])}"

    row = "{:<9}  {:>11}  {:<14}  {:<17}  {:<13}  {}".format
    lines = ["", row("fold", "temperature", "Brier score", "calibration error", "balanced acc.", "F1")]
    for name, values in (*((record["fold"], record) for record in records), ("mean", means), ("all folds", all_folds)):
        temperature = f"{values['temperature']:.3f}" if "temperature" in values else ""
        pairs = [before_after(values, score) for score in ("brier", "calibration_error")]
        lines.append(
            row(name, temperature, *pairs, *(format_metric(values[score]) for score in ("balanced_accuracy", "f1")))
        )
    change, interval = all_folds["brier_change"], all_folds["brier_change_interval"]
    told = f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}" if interval else ""
    return [*lines, f"calibration changed the Brier score of all folds by {change:+.3f}{told} (below 0: better)"]


if __name__ == "__main__":
    utils.run_script(main)
