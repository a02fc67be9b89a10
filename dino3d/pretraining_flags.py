"""The flags of main_dino.py, a function for each group."""

import argparse
from collections.abc import Mapping
from typing import Any

from dino3d import command_line
from dino3d.command_line import XYZ, format_values, number
from dino3d.data.foreground import FOREGROUND_SHARE, FOREGROUNDS
from dino3d.data.sources import changed_flags, source_fault
from dino3d.training import checkpoint
from dino3d.training.objectives import TISSUE_HU
from dino3d.training.view_flags import LOCAL_SCALE, add_view_flags, check_view_flags
from vision_transformer import ARCHITECTURES, has_setting

PROBE_EVERY = 10  # epochs
# Flags that don't change what a run learns from its data, and those of which a resumed run tells otherwise
NOT_OF_LEARNING = (
    *("data_dir", "data_weights", "data_list", "patches_per_volume", "foreground", "foreground_share"),
    *("output_dir", "pretrained_weights", "checkpoint_key", "samples_per_epoch", "precision", "use_fp16"),
    *("grad_checkpointing", "compile", "num_workers", "dist_url", "local_rank", "read_timeout"),
    *("max_steps", "save_every_steps", "save_every_minutes", "keep_last", "saveckp_freq", "log_every"),
    *("probe_dir", "probe_every", "max_skipped_steps", "max_bad_files", "strict_data"),
)
CENTER_MOMENTUM = 0.9
WARMUP_TEACHER_TEMP = 0.04


def add_pretraining_flags(parser: command_line.ArgumentParser) -> None:
    """All of them, group after group."""
    add_data_flags(parser)
    add_model_flags(parser)
    add_dino_flags(parser)
    add_objective_flags(parser)
    add_optimisation_flags(parser)
    add_view_flags(parser)
    add_probe_flags(parser)
    add_run_flags(parser)
    command_line.older_flags(parser)


def add_data_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("data and output")
    group.add_argument(
        "--data_dir",
        "--data_path",
        default=None,
        nargs="+",
        metavar="DIR",
        help="folder with the CT volumes (.hdf5, .h5, .nii, .nii.gz) at any depth, or several folders; required, "
        "unless there is a --data_list",
    )
    group.add_argument(
        "--output_dir",
        default="output",
        metavar="DIR",
        help="folder for all results; a run whose checkpoint is there is resumed",
    )
    group.add_argument(
        "--pretrained_weights",
        default="",
        metavar="FILE",
        help="checkpoint (.pth or .safetensors, ours or others'), or the folder of a pre-training or fine-tuned run, "
        "whose weights a new run starts from; its position embedding is interpolated to another --input_size. A run of "
        "your own is resumed by its --output_dir instead; without it: random weights",
    )
    command_line.checkpoint_key_flag(group)
    group.add_argument(
        "--data_weights",
        default=None,
        nargs="+",
        type=number(int, 1),
        metavar="N",
        help="one for each folder of --data_dir: how many times --patches_per_volume each of its volumes gives samples "
        "in an epoch; raise that of a folder with few or small volumes; default: 1 for each",
    )
    group.add_argument(
        "--data_list",
        default=None,
        metavar="FILE",
        help="text file with one volume's path per line, or table (.csv) with the column path, relative to --data_dir "
        "or else to the list's own folder, instead of searching the folder",
    )
    group.add_argument(
        "--patches_per_volume",
        default=1,
        type=number(int, 1),
        help="samples of each volume per epoch, up to 8 of them soon after each other, in a batch of as many volumes "
        "as there are; raise it for slow storage or few volumes, and lower --epochs as much",
    )
    group.add_argument(
        "--foreground",
        default="none",
        choices=("none", *FOREGROUNDS),
        help="where patches are drawn: none: anywhere in a volume; body: a share of them centred in the body, not the "
        "air around it; lung: in the lungs, for lung tasks and scans of more than the chest. prepare_data.py index "
        "stores where that is",
    )
    group.add_argument(
        "--foreground_share",
        default=None,
        type=number(float, above=0, high=1),
        metavar="SHARE",
        help="share of the patches that --foreground centres, the others are drawn anywhere; default: "
        f"{FOREGROUND_SHARE}",
    )


def add_model_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--arch",
        default="vit_small",
        type=command_line.architecture(ARCHITECTURES),
        help="one of " + ", ".join(ARCHITECTURES) + "; vit_micro and vit_tiny for CPUs, vit_small as in the paper, "
        "resnet50 as in the paper's comparison",
    )
    group.add_argument(
        "--patch_size",
        default=[12, 12, 6],
        nargs=3,
        type=number(int, 1),
        metavar=XYZ,
        help="voxels per token; smaller patches mean more tokens, finer maps and a higher cost; not for ResNets",
    )
    group.add_argument(
        "--drop_path_rate",
        default=0.1,
        type=number(float, 0, below=1),
        help="stochastic depth: probability that the student's last block is skipped, less for those "
        "before it; 0 for small data and short runs; not for ResNets",
    )
    command_line.boolean_flag(
        group,
        "--grad_checkpointing",
        False,
        "activation (gradient) checkpointing: keep less of each block for the backward pass and compute it again "
        "there; the same result with far less memory, about a third slower; for vit_large, vit_huge and small GPUs",
    )


def add_dino_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("DINO")
    group.add_argument(
        "--out_dim",
        default=65536,
        type=number(int, 2),
        help="prototypes, the outputs of the head; fewer (1024) for small data",
    )
    group.add_argument(
        "--head_hidden_dim",
        default=2048,
        type=number(int, 1),
        help="width of the head's hidden layers; fewer (512) for a small backbone",
    )
    group.add_argument(
        "--head_bottleneck_dim",
        default=256,
        type=number(int, 1),
        help="width of the head before the prototypes, in which these are directions",
    )
    command_line.boolean_flag(
        group,
        "--norm_last_layer",
        True,
        "keep the prototypes at unit length; false trains slightly better, less stably",
    )
    group.add_argument(
        "--momentum_teacher",
        default=0.996,
        type=number(float, 0, 1),
        help="momentum of the teacher's exponential moving average (EMA) at the start, rising to 1 "
        "over the run; 0.9995 for small batches",
    )
    group.add_argument(
        "--warmup_teacher_temp",
        default=WARMUP_TEACHER_TEMP,
        type=number(float, above=0),
        help="teacher's temperature at the start of a warm-up of --warmup_teacher_temp_epochs, without which it has no "
        "effect; lower it if the loss does not fall",
    )
    group.add_argument(
        "--teacher_temp",
        default=0.04,
        type=number(float, above=0),
        help="teacher's temperature after its warm-up; above 0.07 the teacher may become uniform",
    )
    group.add_argument(
        "--warmup_teacher_temp_epochs",
        default=0,
        type=number(float, 0),
        help="epochs over which the teacher's temperature goes from --warmup_teacher_temp to --teacher_temp",
    )
    group.add_argument(
        "--center_momentum",
        default=CENTER_MOMENTUM,
        type=number(float, 0, 1),
        help="momentum of the running mean of the teacher's outputs, the centre; lower it for a centre "
        "that follows faster",
    )
    group.add_argument(
        "--centering",
        default="mean",
        choices=("mean", "sinkhorn"),
        help="what keeps the teacher's outputs spread over the prototypes: mean: their running mean, the centre, is "
        "taken off; sinkhorn: each batch is shared out evenly (Sinkhorn-Knopp, 3 iterations, as in SwAV and DINOv2), "
        "where a teacher with a centre falls to few prototypes. The batch is --batch_size_per_gpu x processes: with "
        "--accumulate_steps each small batch is shared out by itself",
    )
    group.add_argument(
        "--freeze_last_layer",
        default=1,
        type=number(int, 0),
        help="epochs at the start in which the prototypes stay as they are; more if the loss does not fall",
    )
    command_line.boolean_flag(
        group, "--use_bn_in_head", False, "batch normalisation in the head, over the batch of all processes"
    )


def add_objective_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("objectives besides DINO's (weight 0: off)")
    group.add_argument(
        "--koleo",
        default=0.0,
        type=number(float, 0),
        metavar="WEIGHT",
        help="weight of KoLeo, which pushes each sample's embedding away from its nearest neighbour in the batch of "
        "one process, for each global view; for features that crowd together; 0.1 as in DINOv2; 0: off",
    )
    group.add_argument(
        "--ibot",
        default=0.0,
        type=number(float, 0),
        metavar="WEIGHT",
        help="weight of iBOT: blocks of 10 to 50 %% of the patches of every second global view are hidden from the "
        "student, whose outputs there, by a head of their own, are to be the teacher's; for maps and segmentation; "
        "ViTs alone; 1 as in iBOT and DINOv2; 0: off",
    )
    command_line.boolean_flag(
        group,
        "--ibot_tissue",
        False,
        "with --ibot: patches that are air on average (below -900 HU, which --clip_range must hold) stay in view; for "
        "scans with much air around the patient; not with --use_window",
    )


def check_objective_flags(parser: command_line.ArgumentParser, args: argparse.Namespace) -> None:
    if args.patch_size is None:
        for name in ("ibot", "patch_embed_lr"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} {getattr(args, name):g}: {args.arch} has no patches; take a ViT")
    elif args.ibot and list(args.input_size) == list(args.patch_size):
        parser.error("--ibot: a view of one patch leaves nothing in view; raise --input_size or lower --patch_size")
    if args.ibot_tissue and not args.ibot:
        parser.error("--ibot_tissue needs --ibot: without it nothing is hidden")
    if args.ibot_tissue and args.use_window:
        parser.error(
            "--ibot_tissue with --use_window: air is told by its grey value, which differs from window to window (the "
            "mediastinal one shows lung as air); leave one of them out"
        )
    if args.ibot_tissue and not args.clip_range[0] < TISSUE_HU < args.clip_range[1]:
        parser.error(
            f"--ibot_tissue with --clip_range {format_values(args.clip_range)}: air, below {TISSUE_HU:g} HU, can't "
            f"be told from tissue; expected a range that begins below {TISSUE_HU:g}, or leave --ibot_tissue out"
        )
    if args.koleo and args.batch_size_per_gpu < 2:
        parser.error("--koleo needs a --batch_size_per_gpu of at least 2: a sample's neighbour is one of its batch")


def add_optimisation_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", default=100, type=number(int, 1), help="passes over the volumes")
    group.add_argument(
        "--batch_size_per_gpu",
        default=64,
        type=number(int, 1),
        help="samples (base patches) per process at a time; lower it when memory runs out",
    )
    group.add_argument(
        "--accumulate_steps",
        default=1,
        type=number(int, 1),
        help="gradient accumulation: batches per process that make one step; raise it as much as "
        "--batch_size_per_gpu is lowered, and training stays the same",
    )
    group.add_argument(
        "--lr",
        default=0.0005,
        type=number(float, 0),
        help="peak learning rate for a global batch of 256; scaled linearly with --batch_size_per_gpu x "
        "processes x --accumulate_steps, unless --lr_unscaled is given",
    )
    group.add_argument("--lr_unscaled", action="store_true", help="take --lr as it stands, whatever the global batch")
    group.add_argument(
        "--warmup_epochs",
        default=10,
        type=number(float, 0),
        help="epochs over which the learning rate rises linearly to --lr; fewer for short runs",
    )
    group.add_argument("--min_lr", default=1e-6, type=number(float, 0), help="learning rate at the end of its cosine")
    group.add_argument(
        "--weight_decay", default=0.04, type=number(float, 0), help="weight decay at the start of its cosine"
    )
    group.add_argument(
        "--weight_decay_end", default=0.4, type=number(float, 0), help="weight decay at the end of its cosine"
    )
    command_line.precision_flag(group)
    command_line.boolean_flag(
        group,
        "--compile",
        False,
        "fuse the transformer blocks' operations (torch.compile), at the cost of a minute at the start; needs a C++ "
        "compiler, on GPUs Triton, and continues without where it does not work",
    )
    group.add_argument(
        "--clip_grad",
        default=3.0,
        type=number(float, 0),
        help="gradient clipping: largest norm of each parameter tensor's gradient; 0: none",
    )
    group.add_argument(
        "--optimizer", default="adamw", choices=("adamw", "sgd", "lars"), help="adamw, sgd or lars; adamw for ViTs"
    )
    group.add_argument(
        "--layer_decay",
        default=1.0,
        type=number(float, above=0, high=1),
        help="learning rate of each layer of the encoder relative to the one above; below 1 (0.9) to go on from "
        "--pretrained_weights without losing what their lower layers know",
    )
    group.add_argument(
        "--patch_embed_lr",
        default=1.0,
        type=number(float, 0),
        metavar="FACTOR",
        help="learning rate of the patch embedding relative to what it is without this flag; 0.2 in DINOv2, 0 to keep "
        "it as --pretrained_weights has it; ViTs alone",
    )
    command_line.max_skipped_steps_flag(group)


def long_warmups(args: argparse.Namespace) -> list[str]:
    """Notices of warm-ups that last to the end of the run, as defaults do in a short one."""
    notices, epochs = [], args.epochs
    if args.warmup_epochs >= epochs:
        notices.append(
            f"--warmup_epochs {args.warmup_epochs:g} of --epochs {epochs}: the learning rate rises to the end and "
            f"reaches {100 * epochs / args.warmup_epochs:.3g} % of its peak: lower --warmup_epochs"
        )
    if args.freeze_last_layer >= epochs:
        notices.append(
            f"--freeze_last_layer {args.freeze_last_layer} of --epochs {epochs}: the prototypes are never trained: "
            "lower --freeze_last_layer"
        )
    start, length = args.warmup_teacher_temp, args.warmup_teacher_temp_epochs
    if length >= epochs and start != args.teacher_temp:
        reached = start + (args.teacher_temp - start) * epochs / length
        notices.append(
            f"--warmup_teacher_temp_epochs {length:g} of --epochs {epochs}: the teacher's temperature changes to the "
            f"end and reaches {reached:.3g} of --teacher_temp {args.teacher_temp:g}: lower "
            "--warmup_teacher_temp_epochs"
        )
    return notices


def learning_changes(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """[] or [one line]: flags by which a resumed run learns otherwise than its checkpoint did.

    saved, config: arguments of both, of which an older version may lack some
    """
    changes = changed_flags([name for name in saved if name not in NOT_OF_LEARNING], saved, config)
    return [f"resuming with other flags: {', '.join(changes)}"] if changes else []


def rising_rate(args: argparse.Namespace, peak: float) -> list[str]:
    """A notice where --min_lr is above the peak learning rate of a run's global batch, so that the cosine rises."""
    if peak >= args.min_lr:
        return []
    return [
        f"--lr {args.lr:g} makes a peak of {peak:.3g} for this global batch, below --min_lr {args.min_lr:g}: the "
        "learning rate rises to that over the run: lower --min_lr or raise --lr"
    ]


def idle_flags(args: argparse.Namespace) -> list[str]:
    """Notices of flags that are given and change nothing."""
    notices, start, end = [], args.warmup_teacher_temp, args.teacher_temp
    warms_up = end > start or start not in (end, WARMUP_TEACHER_TEMP)  # a lower --teacher_temp alone wants no warm-up
    if warms_up and not args.warmup_teacher_temp_epochs:
        notices.append(
            f"--warmup_teacher_temp {start:g} has no effect with --warmup_teacher_temp_epochs 0: the teacher's "
            f"temperature is {end:g} from the first step on, by --teacher_temp"
        )
    if start == end and args.warmup_teacher_temp_epochs:
        notices.append(
            f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs:g} has no effect: --warmup_teacher_temp "
            f"and --teacher_temp are both {end:g}"
        )
    if args.checkpoint_key != command_line.CHECKPOINT_KEY and not args.pretrained_weights:
        notices.append(f"--checkpoint_key {args.checkpoint_key} has no effect without --pretrained_weights")
    if args.local_crops_scale != LOCAL_SCALE and not args.local_crops_number:
        notices.append(f"--local_crops_scale {args.local_crops_scale:g} has no effect with --local_crops_number 0")
    return notices


def add_probe_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("probe (what the teacher's features are worth on labelled crops, as it trains)")
    group.add_argument(
        "--probe_dir",
        default=None,
        metavar="DIR",
        help="folder with labelled crops, subset*/label0|label1/<patient>/<name>.nii.gz, as main_lnc_luna16.py takes "
        "them: kNN and logistic regression on the teacher's features, folds by patient, beside the same of the encoder "
        "before training and of trivial figures; training itself stays the same to the last bit. Default: no probe",
    )
    group.add_argument(
        "--probe_every",
        default=None,
        type=number(int, 1),
        metavar="EPOCHS",
        help=f"epochs between probes, one after the last epoch besides; raise it where they take a large share of the "
        f"time, which each says; default: {PROBE_EVERY} with --probe_dir",
    )


def add_run_flags(parser: command_line.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    command_line.num_workers_flag(group)
    checkpoint.add_saving_flags(
        group,
        besides="the ends of epochs",
        by_minutes=". An epoch's end is saved where a tenth of these minutes went by since the last "
        "checkpoint (0: each), after a probe, for --saveckp_freq, and as the run's end",
    )
    group.add_argument(
        "--saveckp_freq",
        default=20,
        type=number(int, 0),
        help="epochs between numbered copies of the checkpoint, which stay; 0: none",
    )
    group.add_argument(
        "--max_steps",
        default=None,
        type=number(int, 1),
        help="stop after this many steps in all, with a checkpoint to resume from; schedules still "
        "follow --epochs; default: run to the last epoch",
    )
    group.add_argument("--log_every", default=10, type=number(int, 1), help="steps between entries in TensorBoard")
    group.add_argument(
        "--seed",
        default=0,
        type=number(int, 0),
        help="seed of weights, order, crops and augmentations; the same seed gives the same run",
    )
    group.add_argument(
        "--max_bad_files",
        default=0.1,
        type=number(float, 0, 1),
        metavar="SHARE",
        help="share of the volumes that may be unreadable in an epoch, rounded up to whole files, "
        "before the run ends; others take their place, see bad_files.csv. Raise it for data known to be damaged",
    )
    command_line.boolean_flag(
        group, "--strict_data", False, "end the run at the first unreadable file instead of taking another in its place"
    )
    command_line.read_timeout_flag(group)
    command_line.help_flags(group)


def check_pretraining_flags(parser: command_line.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the data (exit code 2), and add args.local_size, (3,) voxels of a local view."""
    check_view_flags(parser, args)
    for name in ("patch_size", "drop_path_rate"):
        if has_setting(args.arch, name):
            continue
        if parser.is_given(args, name):
            parser.error(f"--{name} {format_values(getattr(args, name))}: {args.arch} has none; leave it out")
        setattr(args, name, None)
    local = "--local_crops_size" if args.local_crops_size else "--local_crops_scale"
    for flag, size in (("--input_size", args.input_size), (local, args.local_size)):
        if args.patch_size is None:  # a network that takes any size
            break
        if any(n % p for n, p in zip(size, args.patch_size)) and (size is args.input_size or args.local_crops_number):
            parser.error(
                f"{flag}: a view of {format_values(size)} voxels is not a multiple of --patch_size "
                f"{format_values(args.patch_size)} along each axis"
            )
    check_objective_flags(parser, args)
    if fault := source_fault(args.data_dir or [], args.data_weights, args.data_list):
        parser.error(fault)
    if args.foreground_share is not None and args.foreground == "none":
        parser.error("--foreground_share needs --foreground body or lung: where to draw that share of the patches")
    if args.data_dir and len(args.data_dir) == 1:
        (args.data_dir,) = args.data_dir  # as config.json and checkpoints have it
    if args.probe_every and args.probe_dir is None:
        parser.error("--probe_every needs --probe_dir: the folder with the labelled crops to probe the features on")
