"""The flags that both fine-tuning scripts share."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

import augmentations
from dino3d import command_line
from dino3d.command_line import XYZ, UserError, format_values, number
from dino3d.data.lists import LABEL
from dino3d.features.encoder import ENCODER, PretrainedEncoder, lacks_setting
from dino3d.finetune.splits import NUM_TEST
from dino3d.training import checkpoint
from vision_transformer import ARCHITECTURES, has_setting

DROP_PATH_RATE = 0.1  # where no flag says
# What must not change while a run is resumed fold by fold, besides the flags of a script's own
FIXED_FLAGS = (
    *ENCODER,
    "pretrained_weights",
    "checkpoint_key",
    "drop_path_rate",
    "k_fold",
    "num_test",
    "label_fraction",
    "lr",
    "layer_decay",
    "warmup_epochs",
    "min_lr",
    "weight_decay",
    "optimizer",
    "shift_range",
    *augmentations.AUGMENTATION_FLAGS,
    "seed",
)

# What --predict goes by, besides what its run was trained with
OF_PREDICTION = (
    "predict",
    "points",
    "weights",
    "output_dir",
    "overlap",
    "largest_component",
    "min_volume",
    "skip_air",
    "save_probabilities",
    "batch_size_per_gpu",
    "precision",
    "num_workers",
    "read_timeout",
    "use_fp16",
    "dist_url",
    "local_rank",
)
OF_ENCODER_TRAINING = ("drop_path_rate", "layer_decay")
OF_TRAINING = (
    *OF_ENCODER_TRAINING,
    "epochs",
    "lr",
    "min_lr",
    "warmup_epochs",
    "weight_decay",
    "optimizer",
    "val_freq",
    "max_steps",
    "max_skipped_steps",
    "shift_range",
    *augmentations.AUGMENTATION_FLAGS,
)


def data_flags(
    parser: command_line.ArgumentParser, layout: str, columns: str, predict: str, labels: bool = False
) -> None:
    """The first group of both downstream scripts: data, output, weights.

    layout: of --data_dir; columns: of --data_list; predict: help of --predict; labels: whether crops are labelled, by
    --label_column, and --points are predicted
    """
    group = parser.add_argument_group("data, output and weights")
    group.add_argument(
        "--data_dir",
        "--data_path",
        default=None,
        metavar="DIR",
        help=f"folder with the labelled data, {layout}; for training this or a --data_list",
    )
    group.add_argument(
        "--output_dir",
        default="output",
        metavar="DIR",
        help="folder for all results; a run whose checkpoints are there is resumed",
    )
    group.add_argument(
        "--pretrained_weights",
        default="",
        type=lambda path: os.path.abspath(path) if path else "",
        metavar="FILE",
        help="checkpoint.pth of main_dino.py or its folder; best.pth of a fold of either fine-tuning, that fold or "
        "run as a folder; or other code's .pth or .safetensors file: its encoder is fine-tuned; without: from scratch",
    )
    command_line.checkpoint_key_flag(group)
    group.add_argument(
        "--data_list",
        default=None,
        metavar="CSV",
        help=f"table of the labelled data instead of --data_dir, with the columns {columns}; relative paths belong to "
        "the table's folder",
    )
    if labels:
        group.add_argument(
            "--label_column",
            default=None,
            metavar="NAME",
            help="column of --data_list with the labels, whole numbers from 0 on, or words that become classes in "
            f"sorted order; default: {LABEL}",
        )
    group.add_argument("--predict", default=None, metavar="WHAT", help=predict)
    if labels:
        group.add_argument(
            "--points",
            default=None,
            metavar="CSV",
            help="points in the CTs of --predict, a table with the columns seriesuid, coordX, coordY, coordZ (LPS mm): "
            "a crop around each is cut as training's were, and predicted",
        )
    group.add_argument(
        "--weights",
        default=None,
        metavar="OUT",
        help="--output_dir of a trained run, for --predict: the mean of its folds' models; OUT/0, or a best.pth file: "
        "one fold alone",
    )


def add_finetune_flags(
    parser: command_line.ArgumentParser, batch_size: int, folds: Sequence[str], spacing: str
) -> None:
    """The flags of both downstream scripts after `data_flags` and their own.

    batch_size: default per process; folds: choices of --folds; spacing: help of --spacing
    """
    add_network_flags(parser, folds, spacing)
    add_schedule_flags(parser, batch_size)
    group = parser.add_argument_group("augmentations (of training data alone; each with probability 0.5)")
    group.add_argument(
        "--shift_range",
        default=[0, 0, 0],
        nargs=3,
        type=number(int, 0),
        metavar=XYZ,
        help="most voxels by which the window's centre is moved, always drawn",
    )
    augmentations.add_augmentation_flags(group)

    group = parser.add_argument_group("run")
    command_line.num_workers_flag(group)
    checkpoint.add_saving_flags(group, besides="each fold's end")
    group.add_argument(
        "--max_steps",
        default=None,
        type=number(int, 1),
        help="stop after this many steps of this call, with a checkpoint to resume from; default: run to the end",
    )
    group.add_argument(
        "--seed",
        default=0,
        type=number(int, 0),
        help="seed of folds, weights, order and augmentations; the same seed gives the same run",
    )
    command_line.read_timeout_flag(group)
    command_line.help_flags(group)

    command_line.older_flags(parser)


def add_network_flags(parser: command_line.ArgumentParser, folds: Sequence[str], spacing: str) -> None:
    group = parser.add_argument_group("model (default: as in the config of --pretrained_weights)")
    group.add_argument(
        "--arch",
        default=None,
        type=command_line.architecture(ARCHITECTURES),
        help=f"one of {', '.join(ARCHITECTURES)}; without weights {ENCODER['arch']}",
    )
    group.add_argument(
        "--patch_size",
        default=None,
        nargs=3,
        type=number(int, 1),
        metavar=XYZ,
        help=f"voxels per token of a ViT; without weights {format_values(ENCODER['patch_size'])}; ResNets have none",
    )
    group.add_argument(
        "--input_size",
        default=None,
        nargs=3,
        type=number(int, 1),
        metavar=XYZ,
        help="voxels that the encoder sees at a time; another size than the weights were trained on interpolates a "
        "ViT's position embedding, and must be a multiple of its --patch_size; without weights "
        f"{format_values(ENCODER['input_size'])}",
    )
    group.add_argument(
        "--clip_range",
        default=None,
        nargs=2,
        type=number(float),
        metavar=("LOW", "HIGH"),
        help=f"window: Hounsfield units that become 0 and 1; without weights {format_values(ENCODER['clip_range'])}",
    )
    group.add_argument("--spacing", default=None, nargs=3, type=number(float, above=0), metavar=XYZ, help=spacing)
    group.add_argument(
        "--drop_path_rate",
        default=None,
        type=number(float, 0, below=1),
        help="stochastic depth: probability that a ViT's last block is skipped in training, less for those before it; "
        f"0 for small data and short runs; default: {DROP_PATH_RATE}; ResNets have none",
    )
    command_line.boolean_flag(group, "--freeze_encoder", False, "leave the encoder as it is and train the head alone")

    group = parser.add_argument_group("folds (by patient)")
    if len(folds) > 1:
        group.add_argument(
            "--folds",
            default="patients",
            choices=folds,
            help="patients: a fixed test set and --k_fold folds of the rest; subsets: each subset* folder "
            "is tested once, the next one validates",
        )
    group.add_argument(
        "--k_fold", default=5, type=number(int, 2), help="folds of what is not in the test set; each validates once"
    )
    group.add_argument(
        "--num_test",
        default=None,
        type=number(int, 1),
        help=f"cases of the fixed test set, as near as whole patients allow; default: {NUM_TEST}, or a "
        "fifth of the cases where that is less than a tenth or more than a third of them",
    )
    group.add_argument(
        "--label_fraction",
        default=1.0,
        type=number(float, above=0, high=1),
        metavar="F",
        help="share of each fold's training patients that is used, to see what fewer labels do; validation and test "
        "sides stay as they are. The patients of a smaller share are among those of a larger one. An epoch is then "
        "shorter: for equal steps raise --epochs by 1 / F",
    )


def add_schedule_flags(parser: command_line.ArgumentParser, batch_size: int) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--epochs",
        default=100,
        type=number(int, 1),
        help="passes over the training cases, in each fold; with --label_fraction over what is left of them",
    )
    group.add_argument(
        "--batch_size_per_gpu",
        default=batch_size,
        type=number(int, 1),
        help="samples per process and step; lower it when memory runs out",
    )
    group.add_argument(
        "--lr",
        default=0.001,
        type=number(float, 0),
        help="peak learning rate of the head, not scaled with the batch; the encoder's layers have "
        "less, see --layer_decay. For --optimizer sgd take 0.01 and more",
    )
    group.add_argument(
        "--layer_decay",
        default=0.75,
        type=number(float, above=0, high=1),
        help="learning rate of each layer relative to the one above it; 1: all layers alike",
    )
    group.add_argument(
        "--warmup_epochs",
        default=5,
        type=number(float, 0),
        help="epochs over which the learning rate rises linearly to --lr; fewer for short runs",
    )
    group.add_argument("--min_lr", default=1e-6, type=number(float, 0), help="learning rate at the end of its cosine")
    group.add_argument(
        "--weight_decay",
        default=0.05,
        type=number(float, 0),
        help="weight decay of all but biases and norms; raise it against overfitting",
    )
    group.add_argument(
        "--optimizer", default="adamw", choices=("adamw", "sgd"), help="adamw or sgd; sgd as in the paper"
    )
    command_line.precision_flag(group)
    group.add_argument(
        "--val_freq", default=1, type=number(int, 1), help="epochs between validations; raise it where they take long"
    )
    command_line.max_skipped_steps_flag(group)


def check_finetune_flags(parser: command_line.ArgumentParser, given: Mapping[str, Any], layout: str) -> None:
    """Refuse what is wrong whatever the data (exit code 2). given: {name: value or None}; layout: of --data_dir."""
    pretrained = bool(given["pretrained_weights"])
    if (given["predict"] is None) != (given["weights"] is None):
        parser.error("--predict DIR and --weights OUT go together: the new data, and the run whose models judge them")
    if given.get("points") and given["predict"] is None:
        parser.error("--points CSV needs --predict DIR, the folder with the CTs that the points lie in, and --weights")
    if given["data_dir"] is not None and given["data_list"] is not None:
        parser.error("--data_dir and --data_list are two ways to name the data: give one of them")
    if given["predict"] is not None and given["data_list"] is not None:
        parser.error("--data_list is for training: --predict takes a table of new files itself, --predict LIST.csv")
    if given.get("label_column") is not None and given["data_list"] is None:
        parser.error("--label_column NAME is a column of --data_list, which is missing")
    if given["predict"] is None and given["data_dir"] is None and given["data_list"] is None:
        parser.error(f"--data_dir is missing: the folder with {layout}; or give a --data_list")
    if given["clip_range"] and given["clip_range"][0] >= given["clip_range"][1]:
        parser.error(f"--clip_range {format_values(given['clip_range'])}: the first value must be below the second")
    arch = given["arch"] or (None if pretrained else ENCODER["arch"])
    for name in ("patch_size", "drop_path_rate") if arch else ():
        if given[name] is not None and not has_setting(arch, name):
            parser.error(lacks_setting(name, given[name], arch))
    if arch and not has_setting(arch, "patch_size"):
        return
    size, patch = (given[name] or (None if pretrained else ENCODER[name]) for name in ("input_size", "patch_size"))
    if size and patch and any(n % p for n, p in zip(size, patch)):
        parser.error(
            f"--input_size {format_values(size)} is not a multiple of --patch_size {format_values(patch)} along "
            "each axis"
        )


def idle_finetune_flags(parser: command_line.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """Notices of flags that are given, other than their defaults, and change nothing. args: as they were typed"""
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    knn, linear = (given.get("protocol") == protocol for protocol in ("knn", "linear"))
    if args.predict is not None:
        cases = [(given.keys() - OF_PREDICTION, "with --predict, which goes by the run of --weights")]
    else:
        cases = [
            (("save_probabilities",), "without --predict"),
            (OF_TRAINING if knn else (), "with --protocol knn, which trains nothing"),
            (() if knn else ("knn_k",), "without --protocol knn"),
            (OF_ENCODER_TRAINING if linear or args.freeze_encoder and not knn else (), "on an encoder that is frozen"),
            (() if args.pretrained_weights else ("checkpoint_key",), "without --pretrained_weights"),
            (("k_fold", "num_test") if "folds" in given else (), "with --folds subsets, each of which is a fold"),
        ]
    notices = []
    for idle, why in cases:
        if named := [f"--{name} {format_values(value)}" for name, value in given.items() if name in idle]:
            notices.append(f"no effect {why}: {', '.join(named)}")
    return notices


def encoder_settings(encoder: PretrainedEncoder, drop_path_rate: float | None) -> dict[str, Any]:
    """{name: value} that a run's encoder is built with. drop_path_rate: the flag. Raises UserError where there is none
    to set."""
    if has_setting(encoder.arch, "drop_path_rate"):
        drop_path_rate = DROP_PATH_RATE if drop_path_rate is None else drop_path_rate
    elif drop_path_rate is not None:
        raise UserError(lacks_setting("drop_path_rate", drop_path_rate, encoder.arch), everywhere=True)
    return encoder.settings() | {"drop_path_rate": drop_path_rate}
