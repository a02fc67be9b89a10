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

import dino3d.openmp  # noqa: F401  before torch is loaded

# isort: split

import argparse
import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import utils
from augmentations import MultiCropAugmentation
from dino3d import command_line, weights
from dino3d.block_masks import BlockMasks, PatchMasks
from dino3d.command_line import UserError
from dino3d.data.conventions import HDF5_SUFFIXES, is_kind
from dino3d.data.foreground import ForegroundDraws, unindexed_lines
from dino3d.data.patch_ring import START_METHOD, PatchRing, pin_memory
from dino3d.data.pretraining import Batch, BatchStream, PretrainingPatches, collate
from dino3d.data.read_watchdog import in_time, with_read_timeout
from dino3d.data.requirements import odd_headers
from dino3d.data.sources import data_changes, find_data
from dino3d.data.volume_cache import VolumeCache, is_quick
from dino3d.features.encoder import domain_changes, find_weights
from dino3d.features.probe import Probe
from dino3d.files import truncate_log, write_config
from dino3d.pretraining_flags import (
    CENTER_MOMENTUM,
    PROBE_EVERY,
    add_pretraining_flags,
    check_pretraining_flags,
    idle_flags,
    learning_changes,
    long_warmups,
    rising_rate,
)
from dino3d.training import batch_norm, checkpoint
from dino3d.training.collapse import TeacherOutputs
from dino3d.training.grouped import lerp_all, scale_each
from dino3d.training.layer_decay import layer_groups
from dino3d.training.loading import cache_bytes, next_batch, reading_processes, start_reading_process
from dino3d.training.monitor import Monitor, air_share, summary
from dino3d.training.nonfinite import BuffersOfStep, NonFiniteSteps, abort_run, describe_sample, step_if_finite
from dino3d.training.objectives import Centering, MaskedMultiCrop, PatchLoss, koleo_loss
from dino3d.training.view_flags import describe_views, idle_strengths, multi_crop
from utils import cosine_schedule, linear_schedule
from vision_transformer import DINOHead, MultiCropWrapper, VisionTransformer, build_encoder

MOST_SAMPLES = 2**27  # of an epoch, whose order is drawn in memory
# Student's logits that the loss works on at once, 64 and 2 MB in single precision: on a CPU operators start for free
LOGITS_TOGETHER = {"cuda": 2**24, "cpu": 2**19}
LONGEST_LOOK = 60.0  # seconds, at the data before training
STUDENT_TEMP = 0.1  # Caron et al. 2021, section 3.1; the teacher's is a flag


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="main_dino.py",
        usage="main_dino.py --data_dir DIR --output_dir DIR [flags]",
        description="DINO pre-training of a 3D ViT on CT volumes. Start the same command again to resume a run.",
    )
    add_pretraining_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_pretraining_flags(parser, args)
    processes, output_dir = utils.distributed_init(), Path(args.output_dir)
    with utils.own_output_dir(output_dir, processes):
        pretrain(args, output_dir, processes)


def pretrain(args: argparse.Namespace, output_dir: Path, processes: utils.Processes) -> None:
    """Train from where the checkpoint in the output folder is, or from the start."""
    processes.run_on_main(lambda: checkpoint.refuse_missing(output_dir / "checkpoint.pth"))  # before it is written to
    args.precision, notices = utils.choose_precision(
        args.precision, args.use_fp16, processes, output_dir / "checkpoint.pth"
    )
    notices += command_line.ignored_flags(dist_url=args.dist_url, local_rank=args.local_rank) + idle_strengths(args)
    notices += long_warmups(args) + idle_flags(args)

    # ---------------------------------------------------------------------------------------------------------- data
    paths, weights = processes.run_on_main(
        lambda: find_data(args.data_dir, args.data_weights, args.data_list, output_dir / "data_list.txt")
    )
    notices += processes.run_on_main(lambda: look_at_data(paths, args.foreground, args.read_timeout))
    dataset = make_dataset(args, paths, weights)
    samples_per_epoch = args.samples_per_epoch = sum(dataset.patches_per_volume)
    global_batch = args.batch_size_per_gpu * processes.world_size * args.accumulate_steps
    steps_per_epoch = samples_per_epoch // global_batch
    require_a_step(args, paths, steps_per_epoch, global_batch, processes)

    # --------------------------------------------------------------------------------------------------------- model
    student, teacher = build_models(args, told := [])
    student, teacher = student.to(processes.device), teacher.to(processes.device).requires_grad_(False)
    probe = make_probe(args, output_dir, processes, teacher.backbone)
    if args.compile:
        notices += compile_blocks((student, teacher), processes.device)
    notices += batch_norm.check_batch(student, dataset.multi_crop, global_batch, args.accumulate_steps)
    network, teacher = wrap_ddp(student, teacher, args.accumulate_steps, processes)

    # -------------------------------------------------------------------------------------------------- optimisation
    optimizer = utils.make_optimizer(args.optimizer, optimizer_groups(student, args.layer_decay, args.patch_embed_lr))
    scaler = torch.amp.GradScaler(processes.device.type, enabled=args.precision == "fp16")
    schedules = Schedules.of_run(args, steps_per_epoch, global_batch)
    notices += rising_rate(args, schedules.lr)

    # ------------------------------------------------------------------------------------------------------ training
    state = TrainState(
        network=network,
        student=student,
        teacher=teacher,
        **build_losses(args, processes.device, notices),
        optimizer=optimizer,
        scaler=scaler,
        schedules=schedules,
        crops=dataset.multi_crop,
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
    if args.pretrained_weights and progress.step:
        told = ["--pretrained_weights has no effect: the run is resumed from its checkpoint"]
    for notice in notices + told:
        processes.print(notice)
    if progress.epoch >= args.epochs or progress.step >= last_step:
        processes.print(
            f"nothing to do, {progress.epoch} of {args.epochs} epochs are done ({progress.step} steps)\n"
            f"{summary(output_dir)}"
        )
        return
    attention = attention_backends(student.backbone, dataset.multi_crop, state.dtype)
    if processes.is_main:
        device = utils.device_name(processes.device)
        write_config(output_dir / "config.json", vars(args), processes, device, volumes=len(paths), attention=attention)
        truncate_log(output_dir / "log.txt", progress.step)
    processes.print(run_summary(args, processes, paths, dataset.multi_crop, steps_per_epoch, global_batch, progress))
    for tokens, way in attention.items():
        processes.print(f"attention of {tokens} tokens: {way}")

    monitor = Monitor(
        output_dir,
        processes,
        args.out_dim,
        args.log_every,
        last_step,
        progress.step,
        global_batch,
        len(paths),
        dataset.max_bad,
        sinkhorn=args.centering == "sinkhorn",
    )
    saving = checkpoint.Saving(args.save_every_steps, args.save_every_minutes, args.keep_last)
    checkpoints = checkpoint.Checkpoints(output_dir / "checkpoint.pth", saving) if processes.is_main else utils.Silent()
    stop_signal = checkpoint.StopSignal(processes, output_dir / "preempted")

    def after_step(epoch_ends: bool = False, saves: bool = False) -> None:
        """Save where it is time or `saves`, and end the run where a signal has asked for it."""
        ending = progress.step < last_step and stop_signal.should_stop()
        if saves or ending or checkpoints.due(progress.step, epoch_ends):
            save(state, checkpoints, output_dir, vars(args), progress, args.saveckp_freq)
        if ending:
            stop_signal.end(checkpoints.wait)

    with contextlib.closing(monitor), contextlib.closing(checkpoints), stop_signal:
        batches = make_batches(dataset, args, progress, processes, state.wait_for_copies)
        probe.begin(progress.step)
        while progress.step < last_step:
            steps = min((samples_per_epoch - progress.position) // global_batch, last_step - progress.step)
            frozen = progress.epoch < args.freeze_last_layer
            train_one_epoch(state, batches, steps, progress, frozen, monitor, after_step)
            progress.end_epoch(samples_per_epoch, global_batch)
            probed = probe.measure(teacher, progress.epoch, progress.step) if progress.position == 0 else None
            monitor.log_epoch(progress.epoch, progress.step, schedules.at(progress), probed)
            ends = progress.step >= last_step
            after_step(True, saves=ends or probed is not None or keeps_copy(progress, args.saveckp_freq))
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
    koleo: float = 0.0
    ibot: PatchLoss | None = None
    accumulate_steps: int = 1
    copy_stream: torch.cuda.Stream | None = None
    copied: torch.cuda.Event | None = None  # of the batch that was rendered last

    def wait_for_copies(self) -> None:
        """Return when no batch is being copied to the GPU any more: its memory may then be written to."""
        if self.copied:
            self.copied.synchronize()

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler]:
        """{name: part} that a checkpoint holds: save and restore go by this alone. A part that is None is off."""
        parts = {
            "student": self.student,
            "teacher": self.teacher,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "dino_loss": self.dino_loss,
            "ibot": self.ibot,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def render(self, batch: Batch) -> list[Tensor]:
        """[global (2 B, 1, x, y, z), local (L B, 1, x, y, z)] views of a pretraining.Batch, on the device.

        On a GPU in the stream `copy_stream`: the host is ahead of the GPU, so that a batch is copied and its views are
        made while the GPU still works on the step before.
        """
        with torch.cuda.stream(self.copy_stream):
            batch = batch.to(self.processes.device)
            if self.copy_stream:
                self.copied = self.copy_stream.record_event()
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
        micro_batches = [next_batch(batches, monitor.record) for _ in range(state.accumulate_steps)]
        waited = time.perf_counter() - began
        if index == 0:
            show_pictures(state, micro_batches[0], progress, monitor)

        utils.seed_step(state.seed, progress.step, state.processes.rank)
        scheduled = state.schedules.at(progress)
        masks = [batch.masks and batch.masks.to(state.processes.device) for batch in micro_batches]
        step = train_step(state, map(state.render, micro_batches), scheduled, frozen, masks)
        progress.count_step(state.global_batch)

        monitor.step(step.finite, step.metrics, step.teacher, waited)
        state.nonfinite.count(step.finite)
        if progress.step % monitor.log_every == 0 or index == steps - 1:
            monitor.flush(progress.step, scheduled, state.dino_loss.center.norm())
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
    teacher: its outputs, by which a collapse is told
    """

    finite: Tensor
    metrics: dict[str, Tensor]
    teacher: TeacherOutputs


def train_step(
    state: TrainState,
    micro_batches: Iterable[list[Tensor]],
    scheduled: dict[str, float],
    frozen: bool,
    masks: Iterable[PatchMasks | None] = itertools.repeat(None),
) -> Step:
    """One step of DINO (Caron et al. 2021, algorithm 1), on the mean loss of the micro-batches.

    micro_batches: gives state.accumulate_steps times the views of B samples, [global (2 B, 1, x, y, z),
        local (L B, 1, x, y, z)], the first view of all samples first
    scheduled: what the schedules say
    masks: of each micro-batch, where iBOT is on
    """
    buffers = BuffersOfStep(state.student, state.teacher)
    state.optimizer.zero_grad(set_to_none=True)
    terms, air, centers, patch_sums, winners, means = [], [], [], [], [], []
    for micro, (views, masked) in enumerate(zip(micro_batches, masks), 1):
        last = micro == state.accumulate_steps
        with no_sync(state.network, enabled=not last):
            with torch.autocast(state.processes.device.type, state.dtype, enabled=state.dtype != torch.float32):
                masked = state.ibot and state.ibot.hide(masked, views[0])
                tokens, hidden = ([masked.tokens], [masked.hidden]) if masked else ([], [])
                with torch.no_grad():
                    # (2 B, out_dim), (2 B, D), with iBOT (M, out_dim)
                    teacher_logits, features, *teacher_patches = state.teacher(views[:1], True, *tokens)
                centers.append(state.dino_loss.batch_center(teacher_logits))
                if masked:
                    patch_sums.append(state.ibot.batch_sum(*teacher_patches, masked))
                if last:  # the ranks' means are needed at the step's end: they are formed while the student works
                    mean_center = state.processes.mean_async(torch.cat(centers).mean(0, keepdim=True))
                    mean_patches = masked and state.processes.mean_async(torch.cat(patch_sums).mean(0, keepdim=True))
                # ((2 + L) B, out_dim), ((2 + L) B, D), with iBOT (M, out_dim)
                student_logits, embeddings, *student_patches = state.network(views, True, *tokens, *hidden)
            teacher_temp = scheduled["teacher_temp"]
            losses, teacher = state.dino_loss(student_logits, teacher_logits, teacher_temp, state.processes)
            if state.koleo:  # of each global view by itself: two views of a sample are to stay close
                losses["koleo"] = sum(map(koleo_loss, embeddings[: len(teacher_logits)].chunk(2)))
                losses["loss"] = losses["loss"] + state.koleo * losses["koleo"]
            if masked:
                losses |= state.ibot(*student_patches, *teacher_patches, masked, teacher_temp, state.processes)
                losses["loss"] = losses["loss"] + state.ibot.weight * losses["ibot"]
            state.scaler.scale(losses["loss"] / state.accumulate_steps).backward()
        terms.append(torch.stack([term.detach() for term in losses.values()]))
        air.append(air_share(views))
        winners.append(teacher.argmax(-1))
        means.append(teacher.mean(0))

    for index, group in enumerate(state.optimizer.param_groups):
        group["lr"] = scheduled["lr"] * group.get("scale", 1)
        if group.get("decays", index == 0):
            group["weight_decay"] = scheduled["weight_decay"]
    state.scaler.unscale_(state.optimizer)
    if frozen:
        for name, parameter in state.student.named_parameters():
            if ".last_layer." in name:  # of both heads
                parameter.grad = None
    norm = clip_gradients(state.student, state.clip_grad)
    # NaN on one rank is NaN on all after DDP's all-reduce. In fp16, steps are also skipped while the scaler is still
    # looking for a loss scale
    finite = norm.isfinite()
    step_if_finite(state.optimizer, finite)
    state.scaler.update()
    update_teacher(state.student, state.teacher, scheduled["momentum_teacher"], finite)
    state.dino_loss.update_center(mean_center(), finite)
    if mean_patches:
        state.ibot.update_from_sum(mean_patches(), finite)
    buffers.undo_unless(finite)
    metrics = dict(zip(losses, torch.stack(terms).mean(0)))  # over the micro-batches
    metrics |= {"grad_norm": norm, "air_views": torch.stack(air).mean()}
    return Step(finite, metrics, TeacherOutputs(torch.cat(winners), torch.stack(means).mean(0), features))


def no_sync(network: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Context in which DDP leaves gradients on their rank: they are averaged once, with the step's last micro-batch."""
    return network.no_sync() if enabled and isinstance(network, DistributedDataParallel) else contextlib.nullcontext()


class DINOLoss(Centering):
    """Cross-entropy between the teacher's view of a sample and the student's other views of it (eq. 1 to 4).

    Made of prototypes, the centre's momentum and the way to spread the teacher's outputs: see `Centering`.
    """

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
        and the teacher's mean entropy, in nats; and (2 B, K) the teacher's probabilities.
        """
        batch, out_dim = len(teacher_logits) // 2, teacher_logits.shape[1]
        dtype = torch.promote_types(student_logits.dtype, torch.float32)  # bf16 and fp16 are too coarse for a softmax
        log_teacher = self.log_teacher(teacher_logits.to(dtype), teacher_temp, processes)  # (2 B, K)
        teacher = log_teacher.exp()
        views = student_logits.view(-1, batch, out_dim)  # (V, B, K)
        pairs = 2 * (len(views) - 1)
        loss = CrossEntropy.apply(views, *teacher.view(2, batch, out_dim)).mean() / pairs
        entropy = -(teacher * log_teacher).sum(-1).mean()
        return {"loss": loss, "kl": loss.detach() - entropy, "teacher_entropy": entropy}, teacher

    def batch_center(self, teacher_logits: Tensor) -> Tensor:
        """(1, K) mean of a micro-batch's teacher logits."""
        return teacher_logits.to(self.center.dtype).mean(0, keepdim=True)


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
    """`reference_cross_entropy` with its gradient by hand, n softmax(s) - q, with s the student's logits over their
    temperature; n and q: how many teacher outputs a view is compared with, and their sum.

    Global views and local ones in a few operators each. All views' logits exist once, in the precision in which the
    head gave them, and nothing else is kept for the backward pass: the softmax is formed again.
    """

    @staticmethod
    def forward(ctx: Any, views: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """views: (V, B, K), the two global ones first; first, second: (B, K) teacher's probabilities of those."""
        ctx.save_for_backward(views, first, second)
        loss = torch.zeros_like(first[:, 0])
        for some, _, target in CrossEntropy.compared(views, first, second):
            log_student = some.to(first.dtype).div(STUDENT_TEMP).log_softmax(-1)
            loss -= log_student.mul_(target).sum((0, 2))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        views, first, second = ctx.saved_tensors
        gradients, weights, start = torch.empty_like(views), gradient[:, None] / STUDENT_TEMP, 0  # weights: (B, 1)
        for some, n, target in CrossEntropy.compared(views, first, second):
            student = some.to(first.dtype).div(STUDENT_TEMP).softmax(-1)
            gradients[start : start + len(some)] = student.mul_(n).sub_(target).mul_(weights)
            start += len(some)
        return gradients, None, None

    @staticmethod
    def compared(views: Tensor, first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(views, n, q): a global view is compared with the other global one, a local one with both; of these at most
        LOGITS_TOGETHER at once."""
        yield views[:2], 1, torch.stack([second, first])  # (2, B, K)
        if len(views) > 2:
            both = first + second  # (B, K)
            together = max(1, LOGITS_TOGETHER.get(views.device.type, 2**24) // both.numel())
            for some in views[2:].split(together):
                yield some, 2, both


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float, finite: Tensor) -> None:
    """Exponential moving average (algorithm 1): teacher = momentum * teacher + (1 - momentum) * student.

    finite: () bool, False: the step was skipped and the teacher stays as it is
    """
    teacher_weights, student_weights = list(teacher.parameters()), list(student.parameters())
    weight = finite.to(student_weights[0].dtype) * (1 - momentum)  # 0 leaves the teacher as it is
    lerp_all(teacher_weights, student_weights, weight)


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale each parameter's gradient down to a norm of at most `largest` (0: leave them as they are).

    Per tensor, as DINO does it, and not over all of them together. Returns () the norm of all before clipping.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if largest:
        scale_each(gradients, (largest / (norms + 1e-6)).clamp_max(1))
    return torch.linalg.vector_norm(norms)


@dataclass
class Schedules:
    """Everything that changes along a run, as functions of the share of it that is done: an epoch counts as long as it
    is now, whatever the data, the batch or the processes were before the run was resumed.

    epoch: samples of one that fill batches; total, warmup, temp_warmup: samples
    """

    epoch: int
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

    @classmethod
    def of_run(cls, args: argparse.Namespace, steps_per_epoch: int, global_batch: int) -> "Schedules":
        epoch = steps_per_epoch * global_batch  # samples
        return cls(
            epoch=epoch,
            total=args.epochs * epoch,
            lr=args.lr if args.lr_unscaled else args.lr * global_batch / 256,
            min_lr=args.min_lr,
            warmup=args.warmup_epochs * epoch,
            weight_decay=args.weight_decay,
            weight_decay_end=args.weight_decay_end,
            momentum_teacher=args.momentum_teacher,
            teacher_temp=args.teacher_temp,
            warmup_teacher_temp=args.warmup_teacher_temp,
            temp_warmup=args.warmup_teacher_temp_epochs * epoch,
        )

    def at(self, progress: Progress) -> dict[str, float]:
        """{name: value} for the step that begins there."""
        samples = progress.epoch * self.epoch + progress.position
        return {
            "lr": cosine_schedule(samples, self.lr, self.min_lr, self.total, self.warmup),
            "weight_decay": cosine_schedule(samples, self.weight_decay, self.weight_decay_end, self.total),
            "momentum_teacher": cosine_schedule(samples, self.momentum_teacher, 1.0, self.total),
            "teacher_temp": linear_schedule(samples, self.warmup_teacher_temp, self.teacher_temp, self.temp_warmup),
        }


def show_pictures(state: TrainState, batch: Batch, progress: Progress, monitor: Monitor) -> None:
    """Pictures of an epoch's first batch, and of the augmentations when the run is new."""
    spacings = batch.spacings if state.crops.spacing is None else [state.crops.spacing] * len(batch.paths)
    monitor.show_views(
        state.render(batch), batch.paths, spacings, progress.step, local_stretch=state.crops.local_stretch
    )
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
                    patch=batch.seen(i),
                    views=torch.cat([of_sample(view).flatten() for view in views]),
                )
            )
    return samples


# ------------------------------------------------------------------------------------------------- parts of the run


def require_a_step(
    args: argparse.Namespace, paths: Sequence[str], steps: int, global_batch: int, processes: utils.Processes
) -> None:
    """Raise UserError where an epoch has no whole batch."""
    if not steps:
        raise UserError(
            f"{len(paths)} volumes with --patches_per_volume {args.patches_per_volume} make less than one "
            f"batch of {global_batch} ({args.batch_size_per_gpu} x {processes.world_size} processes x "
            f"{args.accumulate_steps} accumulated): lower --batch_size_per_gpu or --accumulate_steps, or raise "
            "--patches_per_volume",
            everywhere=True,
        )


def look_at_data(paths: Sequence[str], foreground: str, read_timeout: float) -> list[str]:
    """What there is to say of some of the volumes before training. Storage that hangs is left to the loader's workers,
    which are watched."""
    seconds = min(read_timeout or LONGEST_LOOK, LONGEST_LOOK)
    found = in_time(lambda: odd_headers(paths) + unindexed_lines(paths, foreground), seconds)
    if found is None:
        return [f"note: a look at some of the volumes was given up after {seconds:g} s: the storage is slow or hangs"]
    return found


def make_dataset(args: argparse.Namespace, paths: Sequence[str], weights: Sequence[int]) -> PretrainingPatches:
    crops = multi_crop(args)
    max_bad = math.ceil(round(args.max_bad_files * len(paths), 6))  # rounded first: 0.1 * 30 is 3.0000000000000004
    patches_per_volume = [args.patches_per_volume * weight for weight in weights]
    if sum(patches_per_volume) > MOST_SAMPLES:
        raise UserError(
            f"--patches_per_volume and --data_weights make more than {MOST_SAMPLES} samples an epoch of {len(paths)} "
            "volumes, whose order is drawn in memory: lower them",
            everywhere=True,
        )
    masks = BlockMasks(tuple(n // p for n, p in zip(args.input_size, args.patch_size))) if args.ibot else None
    foreground = None if args.foreground == "none" else ForegroundDraws(args.foreground, args.foreground_share)
    return PretrainingPatches(paths, crops, args.seed, patches_per_volume, args.strict_data, max_bad, masks, foreground)


def make_batches(
    dataset: PretrainingPatches,
    args: argparse.Namespace,
    progress: Progress,
    processes: utils.Processes,
    wait: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
    """This rank's batches from `progress` to the last epoch. wait: see `PatchRing.batches`"""
    stream = BatchStream(
        len(dataset.paths),
        dataset.patches_per_volume,
        args.batch_size_per_gpu,
        processes.rank,
        processes.world_size,
        args.seed,
        progress.epoch,
        progress.position,
        args.epochs,
        args.accumulate_steps,
    )
    one_size = dataset.multi_crop.spacing is None  # else patches have as many voxels as their volume's spacing makes
    batch_bytes = 0 if one_size else 2 * args.batch_size_per_gpu * math.prod(dataset.multi_crop.patch_size)
    workers, ready, notices = reading_processes(args.num_workers, processes, batch_bytes)
    for notice in notices:
        processes.print(notice)
    dataset.cache = VolumeCache(cache_bytes(workers, processes))
    import nibabel  # noqa: F401  here, as each of the reading processes would import it for itself

    load = functools.partial(
        DataLoader,
        num_workers=workers,
        prefetch_factor=ready,
        worker_init_fn=start_reading_process,
        multiprocessing_context=START_METHOD if workers else None,
    )
    on_gpu = processes.device.type == "cuda"
    if not one_size:
        loader = load(dataset, batch_sampler=stream, collate_fn=collate, pin_memory=on_gpu)
        return with_read_timeout(loader, args.read_timeout, command_line.end_process)
    ring = PatchRing(dataset, args.batch_size_per_gpu, args.accumulate_steps, workers, ready or 0)
    # Those of a run's first step are shown; of the whole step, so that all runs that are to be equal read the same
    parts = ring.parts_of(stream, whole=args.accumulate_steps if progress.step == 0 else 0)
    loader = load(ring, batch_size=None, sampler=parts, collate_fn=list)
    batches = ring.batches(with_read_timeout(loader, args.read_timeout, command_line.end_process), wait)
    # Only now that the workers are started: not all memory that CUDA knows is theirs too
    return map(Batch.pin_views, batches) if on_gpu and pin_memory(ring.memory) else batches


def make_probe(
    args: argparse.Namespace, output_dir: Path, processes: utils.Processes, backbone: nn.Module
) -> Probe | utils.Silent:
    """The probe of the teacher's features, which measures them before training first."""
    if args.probe_dir is None:
        return utils.Silent()
    every = args.probe_every or PROBE_EVERY
    return Probe(args.probe_dir, every, args.epochs, output_dir, processes, backbone, vars(args))


def build_models(args: argparse.Namespace, notices: list[str]) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """New student and teacher, backbone and DINO head each, with equal weights. notices: gets what there is to say."""
    torch.manual_seed(args.seed)
    build = functools.partial(
        build_model,
        args.arch,
        args.input_size,
        args.patch_size,
        args.out_dim,
        args.use_bn_in_head,
        ibot=args.ibot > 0,
        hidden_dim=args.head_hidden_dim,
        bottleneck_dim=args.head_bottleneck_dim,
    )
    student = build(
        drop_path_rate=args.drop_path_rate,
        norm_last_layer=args.norm_last_layer,
        grad_checkpointing=args.grad_checkpointing,
    )
    with torch.device("meta"):  # random weights would be overwritten at once, and take as long as the student's
        teacher = build(drop_path_rate=None, norm_last_layer=True)  # follows the student without gradients
    teacher = teacher.to_empty(device="cpu")
    if args.pretrained_weights:
        domain = {"clip_range": args.clip_range, "spacing": args.spacing}
        notices += load_initial_weights(student, args.pretrained_weights, args.checkpoint_key, domain)
    teacher.load_state_dict(student.state_dict())
    return student, teacher


def build_model(
    arch: str,
    input_size: Sequence[int],
    patch_size: Sequence[int] | None,
    out_dim: int,
    use_bn_in_head: bool,
    drop_path_rate: float | None,
    norm_last_layer: bool,
    grad_checkpointing: bool = False,
    ibot: bool = False,
    **head: int,
) -> MultiCropWrapper:
    """A new student or teacher: backbone and DINO head. head: what else DINOHead takes.

    ibot: with a second head, for patches, which has no batch norm: how many it sees is left to chance
    """
    backbone = build_encoder(arch, input_size, patch_size, drop_path_rate, grad_checkpointing)
    dino_head = DINOHead(backbone.embed_dim, out_dim, use_bn_in_head, norm_last_layer, **head)
    if not ibot:
        return MultiCropWrapper(backbone, dino_head)
    return MaskedMultiCrop(backbone, dino_head, DINOHead(backbone.embed_dim, out_dim, False, norm_last_layer, **head))


def build_losses(args: argparse.Namespace, device: torch.device, notices: list[str]) -> dict[str, Any]:
    """What a TrainState has of losses: DINO's, KoLeo's weight, iBOT's or None. notices: gets what there is to say."""
    if args.centering == "sinkhorn" and args.center_momentum != CENTER_MOMENTUM:
        notices.append("--center_momentum has no effect on training with --centering sinkhorn, which has no centre")
    targets = (args.out_dim, args.center_momentum, args.centering)
    tissue = args.patch_size if args.ibot_tissue else None
    ibot = PatchLoss(args.ibot, *targets, STUDENT_TEMP, tissue, args.clip_range).to(device) if args.ibot else None
    return {"dino_loss": DINOLoss(*targets).to(device), "koleo": args.koleo, "ibot": ibot}


def optimizer_groups(model: MultiCropWrapper, layer_decay: float, patch_embed_lr: float) -> list[dict[str, Any]]:
    """Groups of a student's parameters: two, or with rates by layer more, which have "scale", of the learning rate, and
    "decays", whether weight decay is for them."""
    if layer_decay == patch_embed_lr == 1:
        return utils.parameter_groups(model)
    groups = layer_groups(model, "backbone.", model.backbone, layer_decay, 1.0, patch_embed_lr)
    return [group | {"decays": group["weight_decay"] > 0} for group in groups]


def load_initial_weights(
    model: MultiCropWrapper, path: str, checkpoint_key: str, domain: Mapping[str, Any] | None = None
) -> list[str]:
    """Load the backbone, and what stands beside it in the file if it fits (heads, iBOT's mask token); returns notices.

    path: see `encoder.find_weights`; domain: see `encoder.domain_changes`
    """
    path, found = find_weights(path)
    try:
        checkpoint = weights.load_file(path)
        network = weights.find_network(model.backbone, checkpoint, path, checkpoint_key)
        notices = weights.fit_network(model.backbone, network, checkpoint, path)
        notices += domain_changes(checkpoint, path, domain or {})
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--pretrained_weights {error}", everywhere=True) from error
    lacking = []
    for name, part in model.named_children():
        expected = name.join(network.path.rsplit("backbone", 1))
        if part is model.backbone:
            continue
        try:
            head = weights.find_network(part, checkpoint, path, expected)
            if head.path != expected:
                raise ValueError("another network's")
            weights.fit_network(part, head, checkpoint, path)
            notices += keep_unit_length(part, name.replace("_", " "), path)
        except ValueError:
            lacking.append(name.replace("_", " "))
    groups = weights.named_tensors(checkpoint, path).items()
    beside = next(tensors for keys, (tensors, _) in groups if ".".join(keys) == network.key)
    for name, parameter in model.named_parameters(recurse=False):  # iBOT's mask token
        tensor = beside.get(name.join(network.prefix.rstrip(".").rsplit("backbone", 1)))
        if tensor is None or tensor.shape != parameter.shape or not tensor.isfinite().all():
            lacking.append(name.replace("_", " "))
        else:
            with torch.no_grad():
                parameter.copy_(tensor)
    if not lacking:
        return [*found, f"starting from {path}: {network.origin}", *notices]
    new = "; ".join(f"the {name} is new, the file has none of this shape" for name in lacking)
    return [*found, f"starting from the backbone of {path}: {network.origin}; {new}", *notices]


def keep_unit_length(head: DINOHead, name: str, path: str) -> list[str]:
    """Bring the prototypes of a head that was loaded to the unit length at which --norm_last_layer keeps them; returns
    notices. Other lengths, of a run without it, would stay as they are to the end."""
    lengths = head.last_layer.parametrizations.weight.original0  # (out_dim, 1)
    if lengths.requires_grad or (lengths == 1).all():
        return []
    low, high = lengths.aminmax()
    told = f"prototypes of the {name} in {path} had a length of {low:.3g} to {high:.3g}, by --norm_last_layer of 1 now"
    with torch.no_grad():
        lengths.fill_(1)
    return [told]


def wrap_ddp(
    student: MultiCropWrapper, teacher: MultiCropWrapper, accumulate_steps: int, processes: utils.Processes
) -> tuple[nn.Module, MultiCropWrapper]:
    """The student inside DDP, where there are several processes, and the teacher; batch norms see all their batches."""
    if processes.world_size == 1:
        return student, teacher
    student, teacher = (batch_norm.sync_batch_norms(network, processes.device) for network in (student, teacher))
    devices = None if processes.device.type == "cpu" else [processes.device]
    # A static graph spares DDP the search for what each step uses; it does not work with no_sync (pytorch issue 143580)
    return DistributedDataParallel(
        student, device_ids=devices, gradient_as_bucket_view=True, static_graph=accumulate_steps == 1
    ), teacher


def compile_blocks(
    models: Iterable[MultiCropWrapper], device: torch.device, backend: str | Callable = "inductor"
) -> list[str]:
    """Let torch.compile fuse what happens between the matrix products of each block, in place; returns notices.

    Block by block, since blocks of one width share their code: it is compiled once per shape, which takes a minute and
    not many.
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
        # Where blocks differ in their widths each has its own code; torch's limit is 8 for all of them together
        limit = 4 * len(model.backbone.blocks)  # of two shapes, with gradients and without
        torch.compiler.config.recompile_limit = max(limit, torch.compiler.config.recompile_limit)
        for block in model.backbone.blocks:
            block.compile(dynamic=False, backend=backend)  # two shapes, those of global and of local views
    return []


# --------------------------------------------------------------------------------------------- saving and resuming


def keeps_copy(progress: Progress, every: int) -> bool:
    """Whether a numbered copy of the checkpoint is kept here: at the end of each `every`th epoch (0: never)."""
    return every > 0 and progress.position == 0 and progress.epoch % every == 0


def save(
    state: TrainState,
    checkpoints: checkpoint.Checkpoints | utils.Silent,
    output_dir: Path,
    config: dict[str, Any],
    progress: Progress,
    every: int,
) -> None:
    """Save the whole state, and keep a numbered copy each `every` epochs (0: never)."""
    states = {name: part.state_dict() for name, part in state.parts().items()}
    checkpoints.save(
        {**states, **asdict(progress), "config": config},
        output_dir / f"checkpoint{progress.epoch:04}.pth" if keeps_copy(progress, every) else None,
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
        "head_hidden_dim",
        "head_bottleneck_dim",
        "use_bn_in_head",
        "norm_last_layer",
        "optimizer",
        "layer_decay",
        "patch_embed_lr",
    )
    path, parts = output_dir / "checkpoint.pth", state.parts()
    saved = checkpoint.load_on_all(
        path, state.processes, must_match={name: config[name] for name in fixed}, parts=(*parts, *asdict(Progress()))
    )
    if saved is None:
        return Progress()
    if "ibot" in saved and state.ibot is None:
        raise UserError(
            f"{path}: is of a run with --ibot, whose patch head and mask token it holds; resume with --ibot or choose "
            "another --output_dir",
            everywhere=True,
        )
    checkpoint.load_parts(parts, saved, path)
    progress = checkpoint.load_progress(Progress, saved, path)
    for line in data_changes(saved["config"], config, progress.position) + learning_changes(saved["config"], config):
        state.processes.print(line)
    return progress


def attention_backends(backbone: nn.Module, crops: MultiCropAugmentation, dtype: torch.dtype) -> dict[int, str]:
    """{tokens of a view: what computes their attention}: its choice differs by GPU, precision and length, and its speed
    by far. {} for a backbone without attention."""
    if not isinstance(backbone, VisionTransformer):
        return {}
    sizes = [crops.global_size, crops.local_size][: 1 + bool(crops.local_number)]
    lengths = [1 + math.prod(n // p for n, p in zip(size, backbone.patch_size)) for size in sizes]
    return {tokens: backbone.blocks[0].attn.backend(tokens, dtype) for tokens in lengths}


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
        describe_views(crops),
    ]
    raw = [path for path in dict.fromkeys(paths) if not is_kind(path, HDF5_SUFFIXES) and not is_quick(path)]
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
