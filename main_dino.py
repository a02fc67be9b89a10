"""DINO pre-training of a 3D Vision Transformer on unlabelled CT (Caron et al. 2021, arXiv 2104.14294).

One machine with four GPUs, a laptop, two machines, Slurm:
    torchrun --nproc_per_node=4 main_dino.py --arch vit_small --data_dir /path/to/nlst/data --output_dir /path/to/output
    python main_dino.py --arch vit_tiny --data_dir /path/to/data --output_dir /path/to/output --batch_size_per_gpu 8
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 main_dino.py ...
    srun --ntasks-per-node=8 --gpus-per-task=1 --kill-on-bad-exit=1 python main_dino.py ...

The same --output_dir resumes where it stopped; SIGTERM and SIGUSR1 (exit code 75) and Ctrl-C (130) make a run save and
end. The folder holds checkpoint.pth (the newest whole state), checkpoint.1.pth (the one before), numbered copies,
config.json, log.txt (one JSON object per epoch), data_list.txt, views.png, augmentations.png and TensorBoard's files;
with --probe_dir also best_probe.pth, the teacher whose features were best, and probe.json, what it was compared with.
"""

import argparse
import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import augmentations
import utils
from augmentations import AUGMENTATION_FLAGS, MultiCropAugmentation, paper_policy
from dino3d import command_line, weights
from dino3d.command_line import UserError, format_values, number
from dino3d.data.conventions import HDF5_SUFFIXES, is_kind
from dino3d.data.pretraining import Batch, BatchStream, PretrainingPatches, collate
from dino3d.data.read_watchdog import with_read_timeout
from dino3d.data.requirements import odd_headers
from dino3d.data.sources import data_changes, find_data, source_fault
from dino3d.features.encoder import find_weights
from dino3d.features.probe import PROBE_EVERY, Probe
from dino3d.files import truncate_log, write_config
from dino3d.training import checkpoint
from dino3d.training.loading import next_batch, reading_processes, start_reading_process
from dino3d.training.monitor import Monitor, air_share, summary
from dino3d.training.nonfinite import NonFiniteSteps, abort_run, describe_sample, step_if_finite
from dino3d.training.objectives import sinkhorn_offsets
from utils import cosine_schedule, linear_schedule
from vision_transformer import ARCHITECTURES, DINOHead, MultiCropWrapper, build_encoder, has_setting

STUDENT_TEMP = 0.1  # Caron et al. 2021, section 3.1; the teacher's is a flag
CENTER_MOMENTUM = 0.9


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="main_dino.py",
        usage="main_dino.py --data_dir DIR --output_dir DIR [flags]",
        description="DINO pre-training of a 3D ViT on CT volumes. Start the same command again to resume a run.",
    )
    flag, xyz = command_line.boolean_flag, ("X", "Y", "Z")

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
        metavar=xyz,
        help="voxels per token; smaller patches mean more tokens, finer maps and a higher cost; not for ResNets",
    )
    group.add_argument(
        "--drop_path_rate",
        default=0.1,
        type=number(float, 0, below=1),
        help="stochastic depth: probability that the student's last block is skipped, less for those "
        "before it; 0 for small data and short runs; not for ResNets",
    )
    flag(
        group,
        "--grad_checkpointing",
        False,
        "activation (gradient) checkpointing: keep less of each block for the backward pass and compute it again "
        "there; the same result with far less memory, about a third slower; for vit_large, vit_huge and small GPUs",
    )

    group = parser.add_argument_group("DINO")
    group.add_argument(
        "--out_dim",
        default=65536,
        type=number(int, 2),
        help="prototypes, the outputs of the head; fewer (1024) for small data",
    )
    flag(
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
        default=0.04,
        type=number(float, above=0),
        help="teacher's temperature at the start; lower it if the loss does not fall",
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
    flag(group, "--use_bn_in_head", False, "batch normalisation in the head; several processes need GPUs for it")

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
        "processes x --accumulate_steps",
    )
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
    flag(
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
    command_line.max_skipped_steps_flag(group)

    group = parser.add_argument_group("crops and augmentations (each with probability 0.5, for each view on its own)")
    group.add_argument(
        "--input_size",
        default=[96, 96, 48],
        nargs=3,
        type=number(int, 1),
        metavar=xyz,
        help="voxels of a global view, a multiple of --patch_size (ResNets: any); smaller for CPUs",
    )
    group.add_argument(
        "--local_crops_number", default=8, type=number(int, 0), help="local views per sample; fewer are faster"
    )
    group.add_argument(
        "--local_crops_scale",
        default=0.25,
        type=number(float, above=0, high=1),
        help="side of a local view relative to a global one; its voxels must be a multiple of --patch_size "
        "(ResNets: any)",
    )
    group.add_argument(
        "--spacing",
        default=None,
        nargs=3,
        type=number(float, above=0),
        metavar=xyz,
        help="mm per voxel that views are resampled to, for data of mixed spacings; angles and scales "
        "then act in mm; default: the volumes' own voxels, as in the paper",
    )
    group.add_argument(
        "--clip_range",
        default=[-1000.0, 1000.0],
        nargs=2,
        type=number(float),
        metavar=("LOW", "HIGH"),
        help="window: Hounsfield units that become 0 and 1",
    )
    augmentations.add_augmentation_flags(group)

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

    group = parser.add_argument_group("run")
    command_line.num_workers_flag(group)
    checkpoint.add_saving_flags(group, besides="each epoch's end")
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
    flag(
        group, "--strict_data", False, "end the run at the first unreadable file instead of taking another in its place"
    )
    command_line.read_timeout_flag(group)
    command_line.help_flags(group)

    command_line.older_flags(parser)
    return parser


def check_flags(parser: command_line.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the data (exit code 2), and add args.local_size, (3,) voxels of a local view."""
    args.local_size = [max(1, round(n * args.local_crops_scale)) for n in args.input_size]
    for name in ("patch_size", "drop_path_rate"):
        if has_setting(args.arch, name):
            continue
        if parser.is_given(args, name):
            parser.error(f"--{name} {format_values(getattr(args, name))}: {args.arch} has none; leave it out")
        setattr(args, name, None)
    for flag, size in (("--input_size", args.input_size), ("--local_crops_scale", args.local_size)):
        if args.patch_size is None:  # a network that takes any size
            break
        if any(n % p for n, p in zip(size, args.patch_size)) and (size is args.input_size or args.local_crops_number):
            parser.error(
                f"{flag}: a view of {format_values(size)} voxels is not a multiple of --patch_size "
                f"{format_values(args.patch_size)} along each axis"
            )
    if args.clip_range[0] >= args.clip_range[1]:
        parser.error(f"--clip_range {format_values(args.clip_range)}: the first value must be below the second")
    if fault := source_fault(args.data_dir or [], args.data_weights, args.data_list):
        parser.error(fault)
    if args.data_dir and len(args.data_dir) == 1:
        (args.data_dir,) = args.data_dir  # as config.json and checkpoints have it
    if args.probe_every and args.probe_dir is None:
        parser.error("--probe_every needs --probe_dir: the folder with the labelled crops to probe the features on")


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    processes, output_dir = utils.distributed_init(), Path(args.output_dir)
    with utils.own_output_dir(output_dir, processes):
        pretrain(args, output_dir, processes)


def pretrain(args: argparse.Namespace, output_dir: Path, processes: utils.Processes) -> None:
    """Train from where the checkpoint in the output folder is, or from the start."""
    args.precision, notices = utils.choose_precision(args.precision, args.use_fp16, processes.device)
    notices += command_line.ignored_flags(dist_url=args.dist_url, local_rank=args.local_rank)

    # ---------------------------------------------------------------------------------------------------------- data
    paths, weights = processes.run_on_main(
        lambda: find_data(args.data_dir, args.data_weights, args.data_list, output_dir / "data_list.txt")
    )
    notices += processes.run_on_main(lambda: odd_headers(paths))
    policy = paper_policy(name for flag, name in AUGMENTATION_FLAGS.items() if getattr(args, flag))
    crops = MultiCropAugmentation(policy, args.input_size, args.local_size, args.local_crops_number, args.spacing)
    max_bad = math.ceil(round(args.max_bad_files * len(paths), 6))  # rounded first: 0.1 * 30 is 3.0000000000000004
    patches_per_volume = [args.patches_per_volume * weight for weight in weights]
    dataset = PretrainingPatches(paths, crops, args.seed, patches_per_volume, args.strict_data, max_bad)
    samples_per_epoch = args.samples_per_epoch = sum(patches_per_volume)
    global_batch = args.batch_size_per_gpu * processes.world_size * args.accumulate_steps
    steps_per_epoch = samples_per_epoch // global_batch
    if not steps_per_epoch:
        raise UserError(
            f"{len(paths)} volumes with --patches_per_volume {args.patches_per_volume} make less than one "
            f"batch of {global_batch} ({args.batch_size_per_gpu} x {processes.world_size} processes x "
            f"{args.accumulate_steps} accumulated): lower --batch_size_per_gpu or --accumulate_steps, or raise "
            "--patches_per_volume",
            everywhere=True,
        )

    # --------------------------------------------------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    build = functools.partial(
        build_model, args.arch, args.input_size, args.patch_size, args.out_dim, args.use_bn_in_head
    )
    student = build(args.drop_path_rate, args.norm_last_layer, args.grad_checkpointing)
    teacher = build(drop_path_rate=None, norm_last_layer=True)  # follows the student without gradients
    if args.pretrained_weights:
        notices += load_initial_weights(student, args.pretrained_weights, args.checkpoint_key)
    teacher.load_state_dict(student.state_dict())  # both start from the same weights
    student, teacher = student.to(processes.device), teacher.to(processes.device).requires_grad_(False)
    probe = utils.Silent()
    if args.probe_dir is not None:
        every = args.probe_every or PROBE_EVERY
        probe = Probe(args.probe_dir, every, args.epochs, output_dir, processes, teacher.backbone, vars(args))
    if args.compile:
        notices += compile_blocks((student, teacher), processes.device)
    network, teacher = wrap_ddp(student, teacher, args.use_bn_in_head, args.accumulate_steps, processes)
    dino_loss = DINOLoss(args.out_dim, args.center_momentum, args.centering).to(processes.device)
    if args.centering == "sinkhorn" and args.center_momentum != CENTER_MOMENTUM:
        notices.append("--center_momentum has no effect on training with --centering sinkhorn, which has no centre")

    # -------------------------------------------------------------------------------------------------- optimisation
    optimizer = utils.make_optimizer(args.optimizer, utils.parameter_groups(student))
    scaler = torch.amp.GradScaler(processes.device.type, enabled=args.precision == "fp16")
    epoch_length = steps_per_epoch * global_batch  # samples; schedules are functions of samples seen
    schedules = Schedules(
        total=args.epochs * epoch_length,
        lr=args.lr * global_batch / 256,
        min_lr=args.min_lr,
        warmup=args.warmup_epochs * epoch_length,
        weight_decay=args.weight_decay,
        weight_decay_end=args.weight_decay_end,
        momentum_teacher=args.momentum_teacher,
        teacher_temp=args.teacher_temp,
        warmup_teacher_temp=args.warmup_teacher_temp,
        temp_warmup=args.warmup_teacher_temp_epochs * epoch_length,
    )

    # ------------------------------------------------------------------------------------------------------ training
    state = TrainState(
        network=network,
        student=student,
        teacher=teacher,
        dino_loss=dino_loss,
        optimizer=optimizer,
        scaler=scaler,
        schedules=schedules,
        crops=crops,
        clip_range=tuple(args.clip_range),
        dtype=utils.PRECISIONS[args.precision],
        clip_grad=args.clip_grad,
        global_batch=global_batch,
        seed=args.seed,
        processes=processes,
        accumulate_steps=args.accumulate_steps,
        nonfinite=NonFiniteSteps(args.max_skipped_steps, processes.device),
        copy_stream=torch.cuda.Stream() if processes.device.type == "cuda" else None,
    )
    progress = restore(state, output_dir, vars(args))
    progress.end_epoch(samples_per_epoch, global_batch)  # resumed with a larger batch: the rest may fill none
    last_step = progress.step + steps_left(samples_per_epoch, global_batch, args.epochs, progress)
    last_step = min(last_step, args.max_steps or last_step)
    for notice in notices:
        processes.print(notice)
    if progress.epoch >= args.epochs or progress.step >= last_step:
        processes.print(
            f"nothing to do, {progress.epoch} of {args.epochs} epochs are done ({progress.step} steps)\n"
            f"{summary(output_dir)}"
        )
        return
    if processes.is_main:
        write_config(
            output_dir / "config.json", vars(args), processes, utils.device_name(processes.device), volumes=len(paths)
        )
        truncate_log(output_dir / "log.txt", progress.step)
    processes.print(run_summary(args, processes, paths, crops, steps_per_epoch, global_batch, progress))

    stream = BatchStream(
        len(paths),
        patches_per_volume,
        args.batch_size_per_gpu,
        processes.rank,
        processes.world_size,
        args.seed,
        progress.epoch,
        progress.position,
        args.epochs,
        args.accumulate_steps,
    )
    workers, prefetch, loader_notices = reading_processes(
        args.num_workers, processes, batch_bytes=2 * args.batch_size_per_gpu * math.prod(crops.patch_size)
    )
    for notice in loader_notices:
        processes.print(notice)
    loader = DataLoader(
        dataset,
        batch_sampler=stream,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=prefetch,
        worker_init_fn=start_reading_process,
        pin_memory=processes.device.type == "cuda",
    )
    monitor = Monitor(
        output_dir, processes, args.out_dim, args.log_every, last_step, progress.step, global_batch, len(paths), max_bad
    )
    saving = checkpoint.Saving(args.save_every_steps, args.save_every_minutes, args.keep_last)
    checkpoints = checkpoint.Checkpoints(output_dir / "checkpoint.pth", saving) if processes.is_main else utils.Silent()
    stop_signal = checkpoint.StopSignal(processes, output_dir / "preempted")

    def after_step(epoch_ends: bool = False) -> None:
        """Save where it is time, and end the run where a signal has asked for it."""
        ending = progress.step < last_step and stop_signal.should_stop()
        if epoch_ends or ending or checkpoints.due(progress.step):
            save(state, checkpoints, output_dir, vars(args), progress, args.saveckp_freq)
        if ending:
            stop_signal.end(checkpoints.wait)

    with contextlib.closing(monitor), contextlib.closing(checkpoints), stop_signal:
        batches = with_read_timeout(loader, args.read_timeout, command_line.end_process)
        probe.begin(progress.step)
        while progress.step < last_step:
            steps = min((samples_per_epoch - progress.position) // global_batch, last_step - progress.step)
            frozen = progress.epoch < args.freeze_last_layer
            train_one_epoch(state, batches, steps, progress, frozen, monitor, after_step)
            progress.end_epoch(samples_per_epoch, global_batch)
            probed = probe.measure(teacher, progress.epoch, progress.step) if progress.position == 0 else None
            monitor.log_epoch(progress.epoch, progress.step, schedules.at(progress.samples), probed)
            after_step(epoch_ends=True)
        checkpoints.wait()
    processes.print(f"{progress.epoch} of {args.epochs} epochs are done\n{summary(output_dir)}")


# ---------------------------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    """How far a run is: epochs finished, samples of the current one, and steps and samples in all."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    samples: int = 0

    def count_step(self, samples: int) -> None:
        self.position, self.step, self.samples = self.position + samples, self.step + 1, self.samples + samples

    def end_epoch(self, samples_per_epoch: int, global_batch: int) -> None:
        """Go to the next epoch if what is left of this one fills no batch."""
        if self.position + global_batch > samples_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0


@dataclass(kw_only=True)
class TrainState:
    """What a step needs. network: the student as it is called, inside DDP where there are several processes."""

    network: nn.Module
    student: MultiCropWrapper
    teacher: MultiCropWrapper
    dino_loss: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: "Schedules"
    crops: MultiCropAugmentation
    clip_range: tuple[float, float]
    dtype: torch.dtype
    clip_grad: float
    global_batch: int
    seed: int
    processes: utils.Processes
    nonfinite: NonFiniteSteps
    accumulate_steps: int = 1
    copy_stream: torch.cuda.Stream | None = None

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler]:
        """{name: part} that a checkpoint holds: save and restore go by this alone. A part that is None is off."""
        parts = {
            "student": self.student,
            "teacher": self.teacher,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "dino_loss": self.dino_loss,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def render(self, batch: Batch) -> list[Tensor]:
        """[global (2 B, 1, x, y, z), local (L B, 1, x, y, z)] views of a pretraining.Batch, on the device.

        On a GPU in the stream `copy_stream`: the host is ahead of the GPU, so that a batch is copied and its views are
        made while the GPU still works on the step before.
        """
        with torch.cuda.stream(self.copy_stream):
            batch = batch.to(self.processes.device)
            views = self.crops.render(batch.patches, batch.groups, self.clip_range)
        if self.copy_stream:
            current = torch.cuda.current_stream()
            current.wait_stream(self.copy_stream)
            for view in views:
                view.record_stream(current)  # its memory is used for other views only after this stream is done with it
        return views


def steps_left(samples_per_epoch: int, global_batch: int, epochs: int, progress: Progress) -> int:
    """Whole batches from `progress` to the end of the last epoch; what fills no batch at an epoch's end is dropped."""
    whole = (epochs - progress.epoch - 1) * (samples_per_epoch // global_batch)
    return max(0, whole + (samples_per_epoch - progress.position) // global_batch)


def train_one_epoch(
    state: TrainState,
    batches: Iterator[Batch],
    steps: int,
    progress: Progress,
    frozen: bool,
    monitor: Monitor,
    after_step: Callable[[], None],
) -> None:
    """Take `steps` steps on what the iterator `batches` gives; `progress` counts them.

    frozen: prototypes stay as they are; after_step: called after every step but the last
    """
    monitor.start_epoch(progress.epoch + 1)
    for index in range(steps):
        began = time.perf_counter()
        micro_batches = [next_batch(batches, monitor.bad_files.record) for _ in range(state.accumulate_steps)]
        waited = time.perf_counter() - began
        if index == 0:
            show_pictures(state, micro_batches[0], progress, monitor)

        utils.seed_step(state.seed, progress.step, state.processes.rank)
        scheduled = state.schedules.at(progress.samples)
        step = train_step(state, map(state.render, micro_batches), scheduled, frozen)
        progress.count_step(state.global_batch)

        monitor.step(step.finite, step.metrics, step.winners, waited)
        state.nonfinite.count(step.finite)
        if progress.step % monitor.log_every == 0 or index == steps - 1:
            monitor.flush(progress.step, scheduled, state.dino_loss.center.norm(), step.features)
        if state.nonfinite.too_many(progress.step):
            abort_run(
                monitor.output_dir,
                state.processes,
                progress.step,
                state.nonfinite.max_in_a_row,
                diagnose_batch(state, micro_batches, scheduled["teacher_temp"]),
            )
        if index < steps - 1:
            after_step()


class Step(NamedTuple):
    """What a step returns, all of it on the device.

    finite: () bool, False if the loss or a gradient was not finite: then nothing has changed
    metrics: {name: ()} whatever the monitor is to average and show, in the order of log.txt
    winners: (2 B per micro-batch,) largest prototype of each teacher output
    features: (2 B, D) teacher's embeddings of the last micro-batch
    """

    finite: Tensor
    metrics: dict[str, Tensor]
    winners: Tensor
    features: Tensor


def train_step(
    state: TrainState, micro_batches: Iterable[list[Tensor]], scheduled: dict[str, float], frozen: bool
) -> Step:
    """One step of DINO (Caron et al. 2021, algorithm 1), on the mean loss of the micro-batches.

    micro_batches: gives state.accumulate_steps times the views of B samples, [global (2 B, 1, x, y, z),
        local (L B, 1, x, y, z)], the first view of all samples first
    scheduled: what the schedules say
    """
    batch_norms = [*state.student.buffers(), *state.teacher.buffers()]  # statistics, put back if the step is skipped
    buffers_before = [buffer.clone() for buffer in batch_norms]
    state.optimizer.zero_grad(set_to_none=True)
    terms, air, centers, winners = [], [], [], []
    for micro, views in enumerate(micro_batches, 1):
        last = micro == state.accumulate_steps
        with no_sync(state.network, enabled=not last):
            with torch.autocast(state.processes.device.type, state.dtype, enabled=state.dtype != torch.float32):
                with torch.no_grad():
                    # (2 B, out_dim), (2 B, D)
                    teacher_logits, features = state.teacher(views[:1], return_embeddings=True)
                centers.append(state.dino_loss.batch_center(teacher_logits))
                if last:  # the ranks' mean is needed at the step's end: it is formed while the student works
                    mean_center = state.processes.mean_async(torch.cat(centers).mean(0, keepdim=True))
                student_logits = state.network(views)  # ((2 + L) B, out_dim)
            losses, winning = state.dino_loss(
                student_logits, teacher_logits, scheduled["teacher_temp"], state.processes
            )
            state.scaler.scale(losses["loss"] / state.accumulate_steps).backward()
        terms.append(torch.stack([term.detach() for term in losses.values()]))
        air.append(air_share(views))
        winners.append(winning)

    for group in state.optimizer.param_groups:
        group["lr"] = scheduled["lr"]
    state.optimizer.param_groups[0]["weight_decay"] = scheduled["weight_decay"]  # the other group has none
    state.scaler.unscale_(state.optimizer)
    if frozen:
        for parameter in state.student.head.last_layer.parameters():
            parameter.grad = None
    norm = clip_gradients(state.student, state.clip_grad)
    # NaN on one rank is NaN on all after DDP's all-reduce. In fp16, steps are also skipped while the scaler is still
    # looking for a loss scale
    finite = norm.isfinite()
    step_if_finite(state.optimizer, finite)
    state.scaler.update()
    update_teacher(state.student, state.teacher, scheduled["momentum_teacher"], finite)
    state.dino_loss.update_center(mean_center(), finite)
    for buffer, old in zip(batch_norms, buffers_before):
        buffer.copy_(torch.where(finite, buffer, old))
    metrics = dict(zip(losses, torch.stack(terms).mean(0)))  # over the micro-batches
    metrics |= {"grad_norm": norm, "air_views": torch.stack(air).mean()}
    return Step(finite, metrics, torch.cat(winners), features)


def no_sync(network: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Context in which DDP leaves gradients on their rank: they are averaged once, with the step's last micro-batch."""
    return network.no_sync() if enabled and isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's view of a sample and the student's other views of it (eq. 1 to 4).

    out_dim: prototypes; center_momentum: of the running mean of the teacher's logits
    centering: "mean": that mean is taken off the teacher's logits; "sinkhorn": the batch's `sinkhorn_offsets` are added
        to them instead, and the mean is only kept up, to be shown and for a run that goes back to it
    """

    def __init__(self, out_dim: int, center_momentum: float, centering: str = "mean") -> None:
        super().__init__()
        self.center_momentum, self.centering = center_momentum, centering
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        teacher_temp: float,
        processes: utils.Processes = checkpoint.ALONE,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """student_logits: (V B, K) of all V views; teacher_logits: (2 B, K) of the global ones, which come first;
        processes: whose samples Sinkhorn-Knopp takes together.

        Returns {name: ()}: "loss", which is to be minimised, and what the monitor shows of it, the mean KL divergence
        and the teacher's mean entropy, in nats; and the largest prototype of each teacher output (2 B,).
        """
        batch, out_dim = len(teacher_logits) // 2, teacher_logits.shape[1]
        dtype = torch.promote_types(student_logits.dtype, torch.float32)  # bf16 and fp16 are too coarse for a softmax
        log_teacher = self.log_teacher(teacher_logits.to(dtype), teacher_temp, processes)  # (2 B, K)
        teacher = log_teacher.exp()
        views = student_logits.view(-1, batch, out_dim)  # (V, B, K)
        pairs = 2 * (len(views) - 1)
        loss = CrossEntropy.apply(views, *teacher.view(2, batch, out_dim)).mean() / pairs
        entropy = -(teacher * log_teacher).sum(-1).mean()
        return {"loss": loss, "kl": loss.detach() - entropy, "teacher_entropy": entropy}, teacher.argmax(-1)

    def log_teacher(self, logits: Tensor, temp: float, processes: utils.Processes) -> Tensor:
        """(2 B, K) logarithms of the teacher's probabilities, the targets."""
        if self.centering == "mean":
            return ((logits - self.center) / temp).log_softmax(-1)
        scores = logits / temp
        return (scores + sinkhorn_offsets(scores, processes)).log_softmax(-1)

    def batch_center(self, teacher_logits: Tensor) -> Tensor:
        """(1, K) mean of a micro-batch's teacher logits."""
        return teacher_logits.to(self.center.dtype).mean(0, keepdim=True)

    @torch.no_grad()
    def update_center(self, mean: Tensor, finite: Tensor) -> None:
        """Running mean of the teacher's logits (eq. 4). mean: (1, K) over batch and ranks; finite: () bool, False: the
        step was skipped and the centre stays as it is."""
        self.center.lerp_(torch.where(finite, mean, self.center), 1 - self.center_momentum)


def reference_cross_entropy(views: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(B,) the loss as equation 1 has it, summed over the pairs of a sample's views, to compare CrossEntropy with.

    views: (V, B, K) the student's logits; first, second: (B, K) the teacher's probabilities
    """
    loss = torch.zeros_like(first[:, 0])
    for t, teacher in enumerate((first, second)):
        for v, view in enumerate(views):
            if v != t:  # no view is compared with itself
                loss = loss - (teacher * (view / STUDENT_TEMP).log_softmax(-1)).sum(-1)
    return loss


class CrossEntropy(torch.autograd.Function):
    """`reference_cross_entropy` with its gradient by hand: - sum_k q_k log p_k = n logsumexp(s) - q s, with s the
    student's logits over their temperature; n and q: how many teacher outputs a view is compared with, and their sum.

    One view at a time, also in the gradient, (n softmax(s) - q) / temperature: all views' logits exist once, in the
    precision in which the head gave them, and besides them the backward pass needs only the (V, B) normalisers.
    """

    @staticmethod
    def forward(ctx: Any, views: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """views: (V, B, K), the two global ones first; first, second: (B, K) teacher's probabilities of those."""
        loss, normalisers = torch.zeros_like(first[:, 0]), []
        for view, n, target in CrossEntropy.compared(views, first, second):
            scaled = view.to(first.dtype).div(STUDENT_TEMP)
            normalisers.append(scaled.logsumexp(-1))
            loss += n * normalisers[-1] - scaled.mul_(target).sum(-1)
        ctx.save_for_backward(views, first, second, torch.stack(normalisers))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        views, first, second, normalisers = ctx.saved_tensors
        gradients = torch.empty_like(views)
        compared = CrossEntropy.compared(views, first, second)
        for (view, n, target), normaliser, out in zip(compared, normalisers, gradients):
            softmax = view.to(first.dtype).div(STUDENT_TEMP).sub_(normaliser[:, None]).exp_()
            out.copy_(softmax.mul_(n).sub_(target).mul_(gradient[:, None] / STUDENT_TEMP))
        return gradients, None, None

    @staticmethod
    def compared(views: Tensor, first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(view, n, q) of each: a global view is compared with the other global one, a local one with both."""
        return zip(views, [1, 1] + [2] * (len(views) - 2), [second, first] + [first + second] * (len(views) - 2))


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float, finite: Tensor) -> None:
    """Exponential moving average (algorithm 1): teacher = momentum * teacher + (1 - momentum) * student.

    finite: () bool, False: the step was skipped and the teacher stays as it is
    """
    teacher_weights, student_weights = list(teacher.parameters()), list(student.parameters())
    weight = finite.to(student_weights[0].dtype) * (1 - momentum)  # 0 leaves the teacher as it is
    torch._foreach_lerp_(teacher_weights, student_weights, [weight] * len(teacher_weights))


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale each parameter's gradient down to a norm of at most `largest` (0: leave them as they are).

    Per tensor, as DINO does it, and not over all of them together. Returns () the norm of all before clipping.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if largest:
        torch._foreach_mul_(gradients, list((largest / (norms + 1e-6)).clamp_max(1)))
    return torch.linalg.vector_norm(norms)


@dataclass
class Schedules:
    """Everything that changes along a run, as functions of the samples seen. total, warmup, temp_warmup: samples."""

    total: float
    lr: float
    min_lr: float
    warmup: float
    weight_decay: float
    weight_decay_end: float
    momentum_teacher: float
    teacher_temp: float
    warmup_teacher_temp: float
    temp_warmup: float

    def at(self, samples: int) -> dict[str, float]:
        """{name: value} for the step that begins after so many samples."""
        return {
            "lr": cosine_schedule(samples, self.lr, self.min_lr, self.total, self.warmup),
            "weight_decay": cosine_schedule(samples, self.weight_decay, self.weight_decay_end, self.total),
            "momentum_teacher": cosine_schedule(samples, self.momentum_teacher, 1.0, self.total),
            "teacher_temp": linear_schedule(samples, self.warmup_teacher_temp, self.teacher_temp, self.temp_warmup),
        }


def show_pictures(state: TrainState, batch: Batch, progress: Progress, monitor: Monitor) -> None:
    """Pictures of an epoch's first batch, and of the augmentations when the run is new."""
    spacings = batch.spacings if state.crops.spacing is None else [state.crops.spacing] * len(batch.paths)
    monitor.show_views(state.render(batch), batch.paths, spacings, progress.step)
    if progress.step == 0:
        monitor.show_augmentations(batch, state.crops, state.clip_range, progress.step)


@torch.no_grad()
def diagnose_batch(state: TrainState, micro_batches: Sequence[Batch], teacher_temp: float) -> list[dict[str, Any]]:
    """What `nonfinite.describe_sample` says of each sample of a step: its loss by itself, its patch and its views."""
    samples = []
    for batch in micro_batches:
        views = state.render(batch)
        with torch.autocast(state.processes.device.type, state.dtype, enabled=state.dtype != torch.float32):
            teacher_logits, student_logits = state.teacher(views[:1]), state.student(views)  # (2 B, K), (V B, K)
        for i, path in enumerate(batch.paths):

            def of_sample(tensor: Tensor) -> Tensor:
                return tensor.unflatten(0, (-1, len(batch.paths)))[:, i]

            losses, _ = state.dino_loss(of_sample(student_logits), of_sample(teacher_logits), teacher_temp)
            samples.append(
                describe_sample(
                    path,
                    losses["loss"],
                    patch=batch.patches[i],
                    views=torch.cat([of_sample(view).flatten() for view in views]),
                )
            )
    return samples


# ------------------------------------------------------------------------------------------------- parts of the run


def build_model(
    arch: str,
    input_size: Sequence[int],
    patch_size: Sequence[int] | None,
    out_dim: int,
    use_bn_in_head: bool,
    drop_path_rate: float | None,
    norm_last_layer: bool,
    grad_checkpointing: bool = False,
) -> MultiCropWrapper:
    """A new student or teacher: backbone and DINO head."""
    backbone = build_encoder(arch, input_size, patch_size, drop_path_rate, grad_checkpointing)
    return MultiCropWrapper(backbone, DINOHead(backbone.embed_dim, out_dim, use_bn_in_head, norm_last_layer))


def load_initial_weights(model: MultiCropWrapper, path: str, checkpoint_key: str) -> list[str]:
    """Load the backbone, and the head beside it if the file has one that fits; returns notices. path: see
    `encoder.find_weights`"""
    path, found = find_weights(path)
    try:
        checkpoint = weights.load_file(path)
        network = weights.find_network(model.backbone, checkpoint, path, checkpoint_key)
        notices = weights.fit_network(model.backbone, network, checkpoint, path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--pretrained_weights {error}", everywhere=True) from error
    beside = "head".join(network.path.rsplit("backbone", 1))
    try:
        head = weights.find_network(model.head, checkpoint, path, beside)
        if head.path != beside:
            raise ValueError("another network's")
        weights.fit_network(model.head, head, checkpoint, path)
        return [*found, f"starting from {path}: {network.origin}", *notices]
    except ValueError:
        new = "the head is new, the file has none of this shape"
        return [*found, f"starting from the backbone of {path}: {network.origin}; {new}", *notices]


def wrap_ddp(
    student: MultiCropWrapper,
    teacher: MultiCropWrapper,
    use_bn_in_head: bool,
    accumulate_steps: int,
    processes: utils.Processes,
) -> tuple[nn.Module, MultiCropWrapper]:
    """The student inside DDP, where there are several processes, and the teacher."""
    if processes.world_size == 1:
        return student, teacher
    if use_bn_in_head:
        if processes.device.type == "cpu":
            raise UserError("--use_bn_in_head true with several processes needs GPUs", everywhere=True)
        student.head, teacher.head = map(nn.SyncBatchNorm.convert_sync_batchnorm, (student.head, teacher.head))
    devices = None if processes.device.type == "cpu" else [processes.device]
    # A static graph spares DDP the search for what each step uses; it does not work with no_sync (pytorch issue 143580)
    return DistributedDataParallel(
        student, device_ids=devices, gradient_as_bucket_view=True, static_graph=accumulate_steps == 1
    ), teacher


def compile_blocks(
    models: Iterable[MultiCropWrapper], device: torch.device, backend: str | Callable = "inductor"
) -> list[str]:
    """Let torch.compile fuse what happens between the matrix products of each block, in place; returns notices.

    Block by block, since all blocks share their code: it is compiled once per shape, which takes a minute and not many.
    backend: see torch.compile
    """
    trial = nn.Sequential(nn.Linear(8, 8), nn.GELU()).to(device)
    try:
        torch.compile(trial, backend=backend)(torch.rand(2, 8, device=device)).sum().backward()
    except Exception as error:  # no compiler, no Triton, a GPU that it doesn't know: there are many ways
        lines = [line for line in str(error).splitlines() if line.strip()]
        return [
            f"--compile: torch.compile does not work here, continuing without ({lines[0][:200] if lines else error!r})"
        ]
    for model in models:
        for block in model.backbone.blocks:
            block.compile(dynamic=False, backend=backend)  # two shapes, those of global and of local views
    return []


# --------------------------------------------------------------------------------------------- saving and resuming


def save(
    state: TrainState,
    checkpoints: checkpoint.Checkpoints | utils.Silent,
    output_dir: Path,
    config: dict[str, Any],
    progress: Progress,
    every: int,
) -> None:
    """Save the whole state, and keep a numbered copy each `every` epochs (0: never)."""
    numbered = every and progress.position == 0 and progress.epoch % every == 0
    states = {name: part.state_dict() for name, part in state.parts().items()}
    checkpoints.save(
        {**states, **asdict(progress), "config": config},
        output_dir / f"checkpoint{progress.epoch:04}.pth" if numbered else None,
    )


def restore(state: TrainState, output_dir: Path, config: dict[str, Any]) -> Progress:
    """Resume from the checkpoint in the output folder, if there is one; returns how far it is."""
    fixed = (
        "arch",
        "patch_size",
        "input_size",
        "spacing",
        "clip_range",
        "out_dim",
        "use_bn_in_head",
        "norm_last_layer",
        "optimizer",
    )
    path, parts = output_dir / "checkpoint.pth", state.parts()
    saved = checkpoint.load_on_all(
        path, state.processes, must_match={name: config[name] for name in fixed}, parts=(*parts, *asdict(Progress()))
    )
    if saved is None:
        return Progress()
    checkpoint.load_parts(parts, saved, path)
    progress = checkpoint.load_progress(Progress, saved, path)
    for line in data_changes(saved["config"], config, progress.position):
        state.processes.print(line)
    return progress


def run_summary(
    args: argparse.Namespace,
    processes: utils.Processes,
    paths: list[str],
    crops: MultiCropAugmentation,
    steps_per_epoch: int,
    global_batch: int,
    progress: Progress,
) -> str:
    """What is about to run, in a few lines."""
    lines = [
        f"{args.arch} on {processes.world_size} x {utils.device_name(processes.device)}, {args.precision}; "
        f"{len(paths)} volumes, {steps_per_epoch} steps of {global_batch} samples per epoch",
        f"base patch {format_values(crops.patch_size)}, 2 global views {format_values(crops.global_size)}, "
        f"{crops.local_number} local views {format_values(crops.local_size)}; " + ", ".join(crops.policy.on) + " on",
    ]
    raw = [path for path in paths if not is_kind(path, HDF5_SUFFIXES)]
    if raw:
        lines.append(
            f"{len(raw)} of the volumes are not converted, such as {raw[0]}: each is read whole for every patch, about "
            "80 times slower than a converted file; prepare_data.py nlst converts them (see docs/data.md)"
        )
    if progress.step:
        lines.append(f"resuming after step {progress.step}, epoch {progress.epoch}")
    return "\n".join(lines)


if __name__ == "__main__":
    utils.run_script(main)
