"""Lung nodule classification: fine-tune a pre-trained encoder on labelled crops, evaluate it, predict new ones.

Four GPUs, a laptop, new crops:
    torchrun --nproc_per_node=4 main_lnc_luna16.py --pretrained_weights /path/to/pretrained/model.pth \
        --data_dir /path/to/lnc_luna16/data --output_dir /path/to/output
    python main_lnc_luna16.py --protocol linear --pretrained_weights model.pth --data_dir DIR --output_dir OUT
    python main_lnc_luna16.py --predict DIR --weights OUT --output_dir PREDICTIONS

The same --output_dir goes on where it stopped. What stands there: a folder per fold (checkpoint.pth, the newest state;
best.pth, the best on validation; log.txt), splits.json, metrics.json, predictions.csv, curves.png, errors.png,
config.json, TensorBoard.
"""
import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import utils
from augmentations import PAPER, paper_policy, scale_intensity
from dino3d import command_line
from dino3d.command_line import UserError, number, spaced
from dino3d.data.layouts import find_crops, find_volumes
from dino3d.data.volume import SUFFIXES, DataError
from dino3d.files import read_json, read_table, write_config, write_json, write_table
from dino3d.finetune import flags
from dino3d.finetune.classification_metrics import (
    FIGURES,
    area_under_roc,
    choose_threshold,
    columns,
    decide,
    figures,
    over_folds,
    shown,
)
from dino3d.finetune.classification_pictures import draw_curves, draw_errors
from dino3d.finetune.crops import (
    EvaluationCrops,
    TrainingCrops,
    WindowAugmentation,
    check_crops,
    read_ahead,
    spacing_of,
    spacing_warning,
)
from dino3d.finetune.encoder import ENCODER, load_encoder
from dino3d.finetune.fold_folders import check_same_run, fold_folders, load_best, load_fold
from dino3d.finetune.fold_loop import Fold, Recipe, Task, check_diverged, keep_best, learning_rate, one_step_notice, run_fold
from dino3d.finetune.heads import Classifier, LinearHead, NearestNeighbours
from dino3d.finetune.runtime import collect, set_up
from dino3d.finetune.splits import Split, case_names, make_splits, of_patients, save_splits
from dino3d.finetune.statistics import mean_and_deviation, told
from dino3d.training.checkpoint import Saving
from dino3d.training.loading import next_batch

# What must not change while a run goes on fold by fold
FIXED = (*ENCODER, "protocol", "pretrained_weights", "checkpoint_key", "drop_path_rate", "knn_k", "negatives",
         "eval_negatives", "folds", "k_fold", "num_test", "lr", "layer_decay", "warmup_epochs", "min_lr",
         "weight_decay", "optimizer", "shift_range", *(f"use_{name}" for name in PAPER), "seed")


def get_args_parser():
    parser = command_line.ArgumentParser(prog="main_lnc_luna16.py", description="Lung nodule classification, fold by fold.")
    group = parser.add_argument_group("classification")
    group.add_argument("--protocol", default="finetune", choices=("finetune", "linear", "knn"),
                       help="finetune: encoder and head are trained; linear: the head alone, on the frozen encoder's "
                            "features; knn: nothing, cases are compared with the training cases")
    group.add_argument("--negatives", default=1.0, type=number(float, 0),
                       help="cases of label0 per case of the other labels that an epoch of training draws anew, "
                            "without replacement; 0: all")
    group.add_argument("--eval_negatives", default=0.0, type=number(float, 0),
                       help="the same for validation and test, drawn once; 0: all, which is what to report")
    group.add_argument("--knn_k", default=None, type=number(int, 1),
                       help="neighbours that vote; default: the square root of the training cases, at most 20")
    flags.add_flags(parser, batch_size=128, folds=("patients", "subsets"),
                       spacing="mm per voxel that the crops should have, for a warning where they differ; rotations then act "
                               "in mm",
                       predict="folder with unlabelled crops at any depth; nothing is trained, predictions.csv goes to "
                               "--output_dir")
    return parser


def check_flags(parser, args):
    """Refuse what is wrong whatever the data (exit code 2), and settle what one flag means for another."""
    flags.check_flags(parser, vars(args), "subset*/label0|label1/<patient>/<name>.nii.gz")
    if args.freeze_encoder and args.protocol == "finetune":
        args.protocol = "linear"
    args.freeze_encoder = args.protocol != "finetune"


def main(argv=None):
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    output_dir = Path(args.output_dir)
    device, args.precision, notices = set_up(
        output_dir, args.precision, args.use_fp16, args.num_workers, args.batch_size_per_gpu, args.read_timeout,
        dist_url=args.dist_url, local_rank=args.local_rank)
    processes = device.processes
    say = print if processes.is_main else lambda *_: None
    if args.predict:
        predict(args.predict, args.weights, output_dir, device, say)
        return

    # ---------------------------------------------------------------------------------------------------------- data
    cases = processes.from_main(lambda: find_cases(args.data_dir, output_dir))
    splits, data = processes.from_main(lambda: make_splits(
        output_dir / "splits.json", args.folds, args.k_fold, args.num_test, args.seed, cases.patients,
        cases.labels.tolist(), cases.subsets, ("crop_size", "crop_spacing")))
    sides = [case_numbers(split, cases, args.eval_negatives, args.seed) for split in splits]
    if "crop_size" not in data:
        check_training_sides(sides, cases)
        data["crop_size"], data["crop_spacing"] = check_crops(cases.paths, processes)
    cases = cases._replace(crop_size=data["crop_size"])

    # --------------------------------------------------------------------------------------------------------- model
    args.pretrained_weights = os.path.abspath(args.pretrained_weights) if args.pretrained_weights else ""
    encoder = load_encoder(args.pretrained_weights, args.checkpoint_key,
                                    {name: getattr(args, name) for name in ENCODER})
    vars(args).update(encoder.settings())
    notices += warnings_about(encoder, args.protocol, data)
    config = vars(args) | {"classes": cases.classes} | {name: data[name] for name in ("crop_size", "crop_spacing")}

    # -------------------------------------------------------------------------------------------------- optimisation
    policy = paper_policy(name for name in PAPER if getattr(args, f"use_{name}"))
    in_mm = data["crop_spacing"] if args.spacing else None  # views were turned and scaled in mm in pre-training too
    augmentation = WindowAugmentation(policy, args.input_size, args.shift_range, in_mm)
    epochs = 0 if args.protocol == "knn" else args.epochs
    rates = functools.partial(learning_rate, args.lr, args.min_lr, epochs, args.warmup_epochs)
    recipe = Recipe(epochs, args.val_freq, args.optimizer, rates, args.weight_decay, args.layer_decay, args.seed,
                             args.max_skipped_steps,
                             Saving(args.save_every_steps, args.save_every_minutes, args.keep_last))

    # ------------------------------------------------------------------------------------------------------ training
    processes.from_main(lambda: check_same_run(output_dir, config, FIXED))
    if processes.is_main:
        write_config(output_dir / "config.json", config, processes, utils.device_name(processes.device), cases=len(cases.names))
        save_splits(output_dir / "splits.json", splits, data)
    longest = max(len(epoch_order(side.train, cases.labels, args.negatives, args.seed, 0)) for side in sides)
    notices += one_step_notice(longest, epochs, args.batch_size_per_gpu * processes.world_size)
    for line in [*notices, announcement(config, processes, cases, sides)]:
        say(line)
    left = args.max_steps or math.inf
    with device.interruption:
        for index, (train, validation, test) in enumerate(sides):
            torch.manual_seed(args.seed)  # every fold starts from the same weights
            known = len(epoch_order(train, cases.labels, args.negatives, args.seed, 0))
            model = build_classifier(args.protocol, encoder, args.drop_path_rate, cases.classes, known, args.knn_k)
            fold = Fold(index, output_dir / str(index), train, validation, test, cases, model.to(processes.device), device,
                        say)
            task = nodule_task(fold, args.protocol, augmentation, args.clip_range, args.negatives, args.seed)
            steps, finished = run_fold(fold, recipe, task, config, left)
            left -= steps
            if not finished:
                say(f"stopped in fold {index} after {args.max_steps} steps; the same command without --max_steps goes on")
                return
    if processes.is_main:
        say(summarise(output_dir, cases, len(splits), args.protocol, encoder))


# ---------------------------------------------------------------------------------------------------------- training


def nodule_task(fold, protocol, augmentation, clip_range, negatives, seed):
    """The finetune.Task of a fold's cases."""
    drawn = draw_negatives(fold.train, fold.cases.labels, negatives, seed, 0)
    return Task(
        functools.partial(epoch_order, fold.train, fold.cases.labels, negatives, seed),
        TrainingCrops(fold.cases.paths, fold.cases.crop_size, augmentation, seed),
        functools.partial(case_losses, fold, augmentation, clip_range, class_weights(drawn, fold.cases)),
        functools.partial(fit_head, fold, clip_range, drawn) if protocol != "finetune" else lambda: None,
        functools.partial(validate, fold, clip_range), functools.partial(test_fold, fold, clip_range))


def case_losses(fold, augmentation, clip_range, weights, network, batch):
    """(B,) cross-entropy of each case, (B,) its weight: its class's, 0 for a case that doesn't count.

    weights: (classes,); network: gives logits of (B, 1, X, Y, Z); batch: CropBatch on the CPU
    """
    device = fold.device.processes.device
    labels = torch.from_numpy(fold.cases.labels)[batch.cases]
    weights = (weights[labels] * batch.counted).to(device, non_blocking=True)
    batch, labels = batch.to(device), labels.to(device, non_blocking=True)
    volumes = augmentation.render(batch.crops, batch.group, clip_range)  # (B, 1, x, y, z)
    with fold.device.autocast():
        logits = network(volumes)  # (B, classes)
    return F.cross_entropy(logits, labels, reduction="none"), weights


# -------------------------------------------------------------------------------------------------------------- data


class Cases(NamedTuple):
    """The data set, sorted by path. labels: (N,) int64; classes: how many there are; crop_size: (3,) voxels of all."""
    names: list
    paths: list
    labels: np.ndarray
    patients: list
    subsets: list
    classes: int
    crop_size: list | None = None


def find_cases(folder, output_dir):
    """The Cases below a folder. Raises UserError, also where the output folder is of another script's run."""
    if (output_dir / "checkpoint.pth").exists():
        raise UserError(f"--output_dir {output_dir}: holds a pre-training run; choose another folder")
    try:
        crops, problems = find_crops(folder)
    except DataError as error:
        raise UserError(f"--data_dir {error}") from error
    if problems:
        raise UserError(f"--data_dir {problems[0]}")
    names = case_names([crop.path for crop in crops], folder)
    labels = np.array([crop.label for crop in crops])
    return Cases(names, [crop.path for crop in crops], labels, [crop.patient for crop in crops],
                 [crop.subset for crop in crops], int(labels.max()) + 1)


def check_training_sides(sides, cases):
    """UserError where a fold has a class that it can't learn."""
    for fold, side in enumerate(sides):
        missing = sorted(set(range(cases.classes)) - set(cases.labels[side.train].tolist()))
        if missing:
            raise UserError(f"fold {fold} has no patient with label{missing[0]} to train on: too few patients have "
                            "such cases; lower --k_fold or --num_test, or add patients", everywhere=True)


def case_numbers(split, cases, eval_negatives, seed):
    """Split with case numbers instead of patients; validation and test without the negatives that are not drawn."""
    train, *others = (of_patients(side, cases.patients) for side in split)
    return Split(train, *(draw_negatives(side, cases.labels, eval_negatives, seed, 0) for side in others))


def draw_negatives(chosen, labels, ratio, seed, epoch):
    """(n,) sorted: all of the `chosen` cases that are not label 0, and for each of them `ratio` of those that are.

    Drawn without replacement, anew for each epoch. ratio 0: all.
    """
    positive = labels[chosen] != 0
    if not ratio or not positive.any():
        return chosen
    negatives = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(chosen[~positive])
    return np.sort(np.concatenate([chosen[positive], negatives[:max(1, round(ratio * positive.sum()))]]))


def epoch_order(train, labels, negatives, seed, epoch):
    """(n,) the cases of an epoch in the order of training."""
    drawn = draw_negatives(train, labels, negatives, seed, epoch)
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, 1))).permutation(drawn)


def class_weights(drawn, cases):
    """(classes,) inverse frequency among an epoch's cases, 1 on average over them."""
    counts = np.bincount(cases.labels[drawn], minlength=cases.classes)
    return torch.as_tensor(len(drawn) / (cases.classes * counts), dtype=torch.get_default_dtype())


# ------------------------------------------------------------------------------------------------------------- model


def build_classifier(protocol, encoder, drop_path_rate, classes, known, knn_k):
    """The Classifier of a protocol. encoder: finetune.Encoder; known: training cases that a k-NN head remembers."""
    model = encoder.build(drop_path_rate if protocol == "finetune" else 0.0)
    if protocol == "knn":
        k = knn_k or min(20, max(1, round(math.sqrt(known))))
        return Classifier(model, NearestNeighbours(model.embed_dim, classes, known, k), freeze_encoder=True)
    return Classifier(model, LinearHead(model.embed_dim, classes), freeze_encoder=protocol == "linear")


def fit_head(fold, clip_range, drawn):
    """Give a frozen encoder's head the training cases' features, not augmented: to standardise, to compare with."""
    model = fold.model.eval()
    dataset = EvaluationCrops(fold.cases.paths, model.encoder.img_size, (fold.cases.paths[0], fold.cases.crop_size))
    features = torch.from_numpy(infer(model.features, dataset, drawn, clip_range, fold.device))
    features = features.to(fold.device.processes.device, torch.get_default_dtype())
    if isinstance(model.head, NearestNeighbours):
        model.head.fit(features, torch.from_numpy(fold.cases.labels[drawn]))
    else:
        model.head.standardise.fit(features)


def classifier_of(encoder, config, state):
    """The Classifier that a fold's state dict belongs to."""
    known = len(state.get("head.known", ()))
    return build_classifier(config["protocol"], encoder, 0.0, config["classes"], known, config["knn_k"])


# -------------------------------------------------------------------------------------------------------- evaluation


def infer(forward, dataset, cases, clip_range, device):
    """(N, ...) float64 what `forward` makes of each case's centre window, in the order of `cases`, on every rank.

    forward: gives (B, ...) of volumes (B, 1, X, Y, Z); dataset: EvaluationCrops; cases: (N,) numbers, each once
    """
    processes = device.processes
    mine = [int(case) for case in cases[processes.rank::processes.world_size]]  # no rank repeats a case to fill up
    batches, rows = read_ahead(dataset, mine, device.batch_size, device.workers), {}
    while len(rows) < len(mine) and not device.interruption.asked:
        batch = next_batch(batches)
        volumes = scale_intensity(batch.crops.to(processes.device), *clip_range)[:, None]  # (B, 1, X, Y, Z)
        with torch.no_grad(), device.autocast():
            rows.update(zip(batch.cases.tolist(), forward(volumes).double().cpu().numpy()))
    return collect(device, [int(case) for case in cases], rows)


def classify(model, volumes):
    """(B, classes) probabilities in double precision: in single precision confident cases would be ties."""
    return model(volumes).double().softmax(-1)


def probabilities_of(fold, cases, clip_range):
    """(N, classes) of a fold's cases, with the model as it is."""
    model = fold.model.eval()
    dataset = EvaluationCrops(fold.cases.paths, model.encoder.img_size, (fold.cases.paths[0], fold.cases.crop_size))
    return infer(functools.partial(classify, model), dataset, cases, clip_range, fold.device)


def validate(fold, clip_range, best, done, config):
    """`finetune.keep_best` by AUC on validation; the threshold is chosen there too."""
    probabilities = probabilities_of(fold, fold.validation, clip_range)
    labels = fold.cases.labels[fold.validation]
    chosen = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    loss = float(np.mean([-np.log(chosen[labels == k]).mean() for k in np.unique(labels)]))  # all classes count alike
    check_diverged(fold, loss)
    last = {"auc": area_under_roc(labels, probabilities), "loss": loss}
    return keep_best(fold, best, last, done, config, {"threshold": choose_threshold(labels, probabilities)})


def test_fold(fold, clip_range):
    """Evaluate the best epoch on the test cases and write the fold's predictions.csv and metrics.json."""
    best = load_best(fold)
    probabilities = probabilities_of(fold, fold.test, clip_range)
    if not fold.device.processes.is_main:
        return
    labels, patients = fold.cases.labels[fold.test], [fold.cases.patients[i] for i in fold.test]
    record = {"fold": fold.number, "cases": len(labels), "patients": len(set(patients)), "best_epoch": best["epoch"],
              "validation_auc": best["auc"], "validation_loss": best["loss"], "threshold": best["threshold"],
              **figures(labels, probabilities, patients, best["threshold"]), "notes": []}
    if best["auc"] is None:
        record["notes"].append("validation cases are of one class: best epoch by loss, threshold 0.5")
    if record["auc"] is None:
        record["notes"].append("test cases lack a class: AUC and average precision are undefined")
    rows = [[fold.cases.names[i], fold.cases.patients[i], fold.number, int(fold.cases.labels[i]), *shown(row)]
            for i, row in zip(fold.test, probabilities)]
    write_table(fold.folder / "predictions.csv", columns(fold.cases.classes), rows)
    write_json(fold.folder / "metrics.json", record)


# ------------------------------------------------------------------------------------------------------- prediction


def predict(folder, weights, output_dir, device, say):
    """Write predictions.csv for all crops below `folder`: the mean over the folds of a run."""
    processes = device.processes
    paths, names, folders = processes.from_main(lambda: find_new(folder, weights, output_dir))
    spacing = processes.from_main(lambda: spacing_of(paths[0]))
    total, thresholds = 0.0, []
    for where in folders:
        model, config, best = load_fold(where / "best.pth", classifier_of, "main_lnc_luna16.py", "protocol")
        model = model.to(processes.device).eval()
        dataset = EvaluationCrops(paths, config["input_size"])
        forward, everything = functools.partial(classify, model), np.arange(len(paths))
        total = total + infer(forward, dataset, everything, config["clip_range"], device)
        thresholds.append(best["threshold"])
    probabilities = total / len(folders)
    predicted = decide(probabilities, np.mean(thresholds))
    for line in spacing_warning(spacing, config["crop_spacing"], "the new crops have", "those of training"):
        say(line)
    if processes.is_main:
        rows = [[name, *shown(row), int(label)] for name, row, label in zip(names, probabilities, predicted)]
        write_table(output_dir / "predictions.csv", [*columns(config["classes"], ["case"]), "predicted"], rows)
    say(f"{len(paths)} crops, mean of {len(folders)} fold{'s' * (len(folders) > 1)}; "
        + ", ".join(f"label{k}: {n}" for k, n in enumerate(np.bincount(predicted, minlength=config["classes"])))
        + (f" (threshold {np.mean(thresholds):.3f})" if config["classes"] == 2 else "")
        + f"\npredictions  {output_dir / 'predictions.csv'}")


def find_new(folder, weights, output_dir):
    """(paths, names, fold folders) of a prediction. Raises UserError."""
    if (output_dir / "splits.json").exists():
        raise UserError(f"--output_dir {output_dir}: holds a trained run, whose predictions.csv would be lost; choose "
                        "another")
    folders = fold_folders(weights, "best.pth")
    try:
        names = find_volumes(folder)
    except DataError as error:
        raise UserError(f"--predict {error}") from error
    if not names:
        raise UserError(f"--predict {folder}: no crop found below it (looked for {', '.join(SUFFIXES)})")
    paths = [os.path.join(folder, name) for name in names]
    return paths, case_names(paths, folder), folders


# ----------------------------------------------------------------------------------------------------- what is shown


def warnings_about(encoder, protocol, data):
    """Lines about what works but may not be meant."""
    lines = []
    if encoder.state is None:
        lines.append("training from scratch: no --pretrained_weights" if protocol == "finetune" else
                     f"warning: no --pretrained_weights: --protocol {protocol} judges the features of a random encoder")
    lines += spacing_warning(data["crop_spacing"], encoder.spacing, "the crops have", "the encoder knows")
    if any(n < m for n, m in zip(data["crop_size"], encoder.input_size)):
        lines.append(f"warning: the crops have {spaced(data['crop_size'])} voxels, less than the input's "
                     f"{spaced(encoder.input_size)}: air is put around them")
    return lines


def announcement(config, processes, cases, sides):
    """What is about to run, in a few lines."""
    counts = ", ".join(f"{n} of label{k}" for k, n in enumerate(np.bincount(cases.labels)))
    test = "each subset tested once" if config["folds"] == "subsets" else f"test set of {len(sides[0].test)} cases"
    device = f"{processes.world_size} x {utils.device_name(processes.device)}"
    return (f"{config['arch']} ({config['protocol']}) on {device}, {config['precision']}; "
            f"{len(cases.names)} cases ({counts}) of {len(set(cases.patients))} patients\n"
            f"{len(sides)} folds, {test}; crops {spaced(config['crop_size'])}, input {spaced(config['input_size'])}")


def with_interval(record):
    interval = record["auc_interval"]
    return told(record["auc"]) + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def summarise(output_dir, cases, folds, protocol, encoder):
    """Write metrics.json, predictions.csv and the pictures of all folds; returns the table and where things are."""
    records = [read_json(output_dir / str(fold) / "metrics.json") for fold in range(folds)]
    tables = [read_table(output_dir / str(fold) / "predictions.csv") for fold in range(folds)]
    rows = [list(row.values()) for table in tables for row in table]
    write_table(output_dir / "predictions.csv", columns(cases.classes), rows)
    together = over_folds(tables, records, cases)
    means, deviations = mean_and_deviation(records, FIGURES)
    write_json(output_dir / "metrics.json", {
        "protocol": protocol, "classes": cases.classes, "cases": len(cases.names), "patients": len(set(cases.patients)),
        "folds": records, "mean": means, "sd": deviations, "all_folds": {
            "cases": len(together.labels), **together.figures}})
    draw_curves(output_dir / "curves.png", tables, cases.classes)
    wrong = draw_errors(output_dir / "errors.png", together, cases, encoder)
    row = "{:<9}  {:>5}  {:<24}  {:<17}  {:<8}  {:<11}  {}".format
    lines = [row("fold", "cases", "AUC (95 % interval)", *(name.replace("_", " ") for name in FIGURES[1:]))]
    for record in records:
        values = [told(record[name]) for name in FIGURES[1:]]
        lines.append(row(record["fold"], record["cases"], with_interval(record), *values))
    values = [told(means[name]) + (f" ± {deviations[name]:.3f}" if deviations[name] is not None else "")
              for name in FIGURES]
    lines.append(row("mean ± SD", "", *values))
    values = [told(together.figures[name]) for name in ("average_precision", "accuracy")]
    lines.append(row("all folds", len(together.labels), with_interval(together.figures), *values, "", "").rstrip())
    lines.append(f"all folds: each tested case once, with its mean probability; {wrong} are wrong")
    lines += [f"note: fold {record['fold']}: {note}" for record in records for note in record["notes"]]
    lines += [f"metrics      {output_dir / 'metrics.json'}", f"predictions  {output_dir / 'predictions.csv'}",
              f"curves       {output_dir / 'curves.png'}", f"errors       {output_dir / 'errors.png'}",
              f"TensorBoard  tensorboard --logdir {output_dir}",
              f"new crops    python main_lnc_luna16.py --predict DIR --weights {output_dir} --output_dir PREDICTIONS"]
    return "\n".join(lines)


if __name__ == "__main__":
    utils.run_script(main)
