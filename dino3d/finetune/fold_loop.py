"""Fold by fold: train, validate and test, from where a run stopped.

A script brings its own training loop; `run_fold` calls it for every epoch, keeps the best one by the script's score,
and tests that. Everything that decides what a step does is a function of --seed, the epoch and the step.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import utils
from dino3d.command_line import Preempted, UserError
from dino3d.evaluation.statistics import format_metric
from dino3d.features.encoder import is_finished
from dino3d.files import append_json, truncate_log
from dino3d.finetune.crops import CropBatch, TrainingBatches, collate_crops
from dino3d.finetune.fold_folders import PARTS, load_best, start_folder
from dino3d.finetune.runtime import Runtime
from dino3d.training import batch_norm
from dino3d.training.checkpoint import (
    Checkpoints,
    Saving,
    StopRequested,
    load_on_all,
    load_parts,
    load_progress,
    save_checkpoint,
)
from dino3d.training.events import EventWriter
from dino3d.training.layer_decay import layer_groups, set_learning_rate
from dino3d.training.loading import next_batch, start_reading_process
from dino3d.training.nonfinite import BuffersOfStep, NonFiniteSteps, abort_run, describe_sample, step_if_finite


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How every fold is trained; the names are those of the flags. saving: when checkpoints are written"""

    epochs: int
    val_freq: int
    optimizer: str
    lr: float
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float
    seed: int
    max_skipped_steps: int
    saving: Saving = Saving()

    @classmethod
    def from_flags(cls, values: dict, **changed: Any) -> "TrainConfig":
        """From {flag: value}. changed: fields that are not those of the flags"""
        saving = Saving(values["save_every_steps"], values["save_every_minutes"], values["keep_last"])
        named = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        return cls(**named | {"saving": saving} | changed)

    def learning_rate(self, epoch_length: int, seen: int) -> float:
        """Of the head after `seen` cases: linear warm-up, then half a cosine. epoch_length: cases"""
        return utils.cosine_schedule(
            seen, self.lr, self.min_lr, self.epochs * epoch_length, self.warmup_epochs * epoch_length
        )


class Fold(NamedTuple):
    """One fold: its number, its folder, and the case numbers of training, validation and test."""

    number: int
    folder: Path
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Score(NamedTuple):
    """The metric of a validation that decides which epoch is best; where it is equal, the lower loss does.

    name: of the metric; title: as it is printed
    """

    name: str
    title: str
    higher_is_better: bool = True

    def rank(self, metrics: dict) -> tuple[float, float]:
        """Greater for a better epoch. metrics: {name: value or None, "loss": value}"""
        value = metrics[self.name]
        signed = 0 if value is None else value if self.higher_is_better else -value
        return signed, -metrics["loss"]


class Validation(NamedTuple):
    """What a validation found. metrics: {name: value or None}, the score's and "loss" among them; more: what else to
    remember of this epoch, should it be the best."""

    metrics: dict[str, float | None]
    more: dict[str, Any] = {}


@dataclass(kw_only=True)
class FoldProgress:
    """How far a fold is: epochs finished, samples of the current one, and steps and samples in all.

    trained: the record of the epoch just finished, as long as it is not validated
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    cases: int = 0
    trained: dict | None = None

    def count_step(self, cases: int, epoch_length: int) -> None:
        self.position, self.step, self.cases = self.position + cases, self.step + 1, self.cases + cases
        if self.position >= epoch_length:
            self.epoch, self.position = self.epoch + 1, 0


@dataclass(kw_only=True)
class FoldState:
    """One fold as it is trained.

    run_config: of the run, as it stands in its checkpoints
    network: the model as it is called, inside DDP where there are several processes
    optimizer: None where nothing is trained; epoch_length: samples
    best: what is known of the best epoch: its metrics, "epoch", "last" (the metrics of the last one), and more
    checkpoints: on the main process alone
    """

    fold: Fold
    config: TrainConfig
    run_config: dict
    runtime: Runtime
    dataset: Dataset
    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler
    nonfinite: NonFiniteSteps
    epoch_length: int
    progress: FoldProgress = field(default_factory=FoldProgress)
    best: dict | None = None
    checkpoints: Checkpoints | utils.Silent = field(default_factory=utils.Silent)
    _batch: CropBatch | None = None  # of the step at hand
    _buffers: BuffersOfStep | None = None  # before it
    _sums: Tensor | None = None  # weighted losses, weights and skipped steps of this epoch, on the device
    _waited: float = 0.0  # seconds of this epoch without data

    @property
    def device(self) -> torch.device:
        return self.runtime.processes.device

    @property
    def global_batch(self) -> int:
        return self.runtime.batch_size * self.runtime.processes.world_size

    def parts(self) -> dict:
        """{name in a checkpoint: what is saved and restored there by its state dict}."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def epoch_batches(self, batches: Iterator[CropBatch], steps: int) -> Iterator[CropBatch]:
        """The batches of the next `steps` steps of an epoch, on the CPU. Call `step` for each before the next."""
        for index in range(steps):
            began = time.perf_counter()
            self._batch = next_batch(batches)
            self._waited += time.perf_counter() - began
            utils.seed_step(self.config.seed, self.progress.step, self.runtime.processes.rank)
            rate = self.config.learning_rate(self.epoch_length, self.progress.cases)
            set_learning_rate(self.optimizer, rate)
            if not self.run_config.get("pretrained_weights"):
                batch_norm.warm_up(self.model, self.progress.step)
            self._buffers = BuffersOfStep(self.model)
            yield self._batch
            if index < steps - 1:
                save_if_due(self)

    def step(self, losses: Tensor, weights: Tensor) -> None:
        """Take a step on the weighted mean of losses over the global batch, unless it is not finite.

        losses: (B,); weights: (B,) of each sample, 0 for one that only fills a rank's share
        """
        processes = self.runtime.processes
        finite, sums = weighted_step(self.network, self.optimizer, self.scaler, losses, weights, processes)
        self._buffers.undo_unless(finite)
        self._sums += sums
        self.progress.count_step(min(self.global_batch, self.epoch_length - self.progress.position), self.epoch_length)
        self.nonfinite.count(finite)
        if self.nonfinite.too_many(self.progress.step):
            batch = self._batch
            samples = [
                describe_sample(self.dataset.path_of(sample), loss, crop=crop)
                for sample, loss, crop in zip(batch.cases.tolist(), losses.tolist(), batch.crops)
            ]
            abort_run(self.fold.folder, processes, self.progress.step, self.nonfinite.max_in_a_row, samples)


def run_fold(
    fold: Fold,
    model: nn.Module,
    train_config: TrainConfig,
    run_config: dict,
    runtime: Runtime,
    max_steps: float,
    *,
    dataset: Dataset,
    epoch_order: Callable[[int], np.ndarray],
    score: Score,
    train_one_epoch: Callable[[FoldState, Iterator[CropBatch]], None],
    validate: Callable[[FoldState], Validation],
    test: Callable[[FoldState], None],
    fit: Callable[[FoldState], None] = lambda state: None,
    show: Callable[[FoldState, Any], None] = lambda state, writer: None,
) -> float | None:
    """Train, validate and test one fold, from where it stopped.

    Args:
        model: the encoder is `model.encoder`.
        max_steps: that may be taken.
        dataset: gives samples of keys (epoch, sample, counted), for `collate_crops`, and their files by `path_of`.
        epoch_order: (n,) samples of an epoch in their order, given the epoch; as many in each.
        train_one_epoch: calls `FoldState.step` for each of the batches.
        test: evaluates the model, which has the best epoch's weights, and writes the fold's tables and metrics.json.
        fit: called once before a new fold's training.
        show: puts pictures into TensorBoard after a validation, on the main process alone.

    Returns how many steps the next folds may take, or None where they did not suffice and the run is to end here.
    """
    processes, path = runtime.processes, fold.folder / "checkpoint.pth"
    saved = load_on_all(path, processes, parts=PARTS)
    if saved and saved["epoch"] >= train_config.epochs and is_finished(fold.folder):
        processes.print(f"fold {fold.number}: done before")
        return max_steps
    if max_steps <= 0:
        print_stopped(fold, run_config, processes)
        return None
    processes.run_on_main(lambda: start_folder(fold.folder))
    model = model.to(processes.device)
    epoch_length = len(epoch_order(0))
    if train_config.epochs:
        runtime.check_batch_norm(model, epoch_length)
    groups = layer_groups(model, "encoder.", model.encoder, train_config.layer_decay, train_config.weight_decay)
    state = FoldState(
        fold=fold,
        config=train_config,
        run_config=run_config,
        runtime=runtime,
        dataset=dataset,
        model=model,
        network=model,
        optimizer=utils.make_optimizer(train_config.optimizer, groups) if groups else None,
        scaler=torch.amp.GradScaler(processes.device.type, enabled=runtime.dtype == torch.float16),
        nonfinite=NonFiniteSteps(train_config.max_skipped_steps, processes.device),
        epoch_length=epoch_length,
    )
    if saved:
        restore_fold(state, saved, path)
    else:
        fit(state)
    if processes.world_size > 1 and groups:
        model = state.model = batch_norm.sync_batch_norms(model, processes.device)
        devices = None if processes.device.type == "cpu" else [processes.device]
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.11 has no other name for it
        warnings.filterwarnings("ignore", "Grad strides do not match")  # the class token's: one small copy more
        state.network = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    if processes.is_main:
        state.checkpoints = Checkpoints(path, train_config.saving)
    before = state.progress.step
    with contextlib.closing(state.checkpoints):
        train_fold(state, epoch_order, score, train_one_epoch, validate, show, max_steps)
        if state.best is None and state.progress.epoch >= train_config.epochs:  # nothing is trained, or not any more
            keep_best(state, score, validate(state))
        save_fold(state)
        state.checkpoints.wait()
    if state.progress.epoch < train_config.epochs:
        print_stopped(fold, run_config, processes)
        return None
    state.best = load_best(fold.folder, model, processes)
    test(state)
    return max_steps - (state.progress.step - before)


def print_stopped(fold: Fold, run_config: dict, processes: utils.Processes) -> None:
    processes.print(
        f"stopped in fold {fold.number} after {run_config['max_steps']} steps; the same command without "
        "--max_steps resumes"
    )


def train_fold(
    state: FoldState,
    epoch_order: Callable[[int], np.ndarray],
    score: Score,
    train_one_epoch: Callable[[FoldState, Iterator[CropBatch]], None],
    validate: Callable[[FoldState], Validation],
    show: Callable[[FoldState, Any], None],
    max_steps: float,
) -> None:
    """Train to the last epoch or for `max_steps`; see `run_fold`."""
    fold, config, runtime, progress = state.fold, state.config, state.runtime, state.progress
    processes, last_step = runtime.processes, progress.step + max_steps
    if progress.epoch >= config.epochs and not progress.trained:
        return
    sampler = TrainingBatches(
        epoch_order,
        runtime.batch_size,
        processes.rank,
        processes.world_size,
        progress.epoch,
        progress.position,
        config.epochs,
    )
    batches = runtime.batches_of(
        DataLoader(
            state.dataset,
            batch_sampler=sampler,
            collate_fn=collate_crops,
            num_workers=runtime.workers,
            worker_init_fn=start_reading_process,
            pin_memory=processes.device.type == "cuda",
        )
    )
    writer = utils.Silent()
    if processes.is_main:
        truncate_log(fold.folder / "log.txt", progress.step)
        writer = EventWriter(fold.folder.parent / "tensorboard" / fold.folder.name, progress.step)
    while progress.trained or progress.epoch < config.epochs and progress.step < last_step:
        began = time.perf_counter()
        state._sums, state._waited = torch.zeros(3, dtype=torch.float64, device=state.device), 0.0
        if not progress.trained:
            left = math.ceil((state.epoch_length - progress.position) / state.global_batch)  # the last: what remains
            steps = int(min(left, last_step - progress.step))
            state.model.train()
            train_one_epoch(state, state.epoch_batches(batches, steps))
            finish_epoch(state)
        if progress.trained:
            record = dict(progress.trained)
            if progress.epoch % config.val_freq == 0 or progress.epoch == config.epochs:
                try:
                    keep_best(state, score, validate(state))
                except Preempted:  # it will be done again
                    save_fold(state)
                    processes.run_on_main(state.checkpoints.wait)
                    raise
                record |= {f"validation_{name}": value for name, value in state.best["last"].items()}
                if processes.is_main:
                    with contextlib.suppress(StopRequested):  # heeded below, by all
                        show(state, writer)
            record |= {"seconds": round(time.perf_counter() - began, 2), "waiting_for_data": round(state._waited, 2)}
            report_epoch(state, score, record, writer)
            progress.trained = None
        if progress.epoch < config.epochs and progress.step < last_step:
            save_if_due(state)
    writer.close()


def weighted_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    losses: Tensor,
    weights: Tensor,
    processes: utils.Processes,
) -> tuple[Tensor, Tensor]:
    """One step on the weighted mean of losses over the global batch; losses, weights: (B,).

    Returns () bool, False if the loss or a gradient was not finite: then nothing has changed; and (3,) this rank's sums
    of weighted losses and of weights, 0 for a step that was skipped, and whether it was.
    """
    loss = (weights * losses).sum()
    total = processes.sum(weights.sum())  # of all ranks
    optimizer.zero_grad(set_to_none=True)
    # DDP takes the mean of the ranks' gradients, and their sum is what belongs to the sum of their losses
    scaler.scale(loss * (processes.world_size / total)).backward()
    scaler.unscale_(optimizer)
    gradients = (p.grad for p in network.parameters() if p.grad is not None)
    finite = torch.nn.utils.get_total_norm(gradients).isfinite()
    step_if_finite(optimizer, finite)
    scaler.update()
    sums = torch.where(finite, torch.stack([loss.detach(), weights.sum()]), 0)
    return finite, torch.cat([sums, (~finite)[None]]).double()


def finish_epoch(state: FoldState) -> None:
    """Add up the ranks' sums; where an epoch has ended, `progress.trained` says what came of it."""
    processes, progress = state.runtime.processes, state.progress
    loss, weight, skipped = processes.sum(state._sums).tolist()
    skipped = round(skipped / processes.world_size)
    ended = progress.position == 0
    if skipped:
        processes.print(
            f"fold {state.fold.number}: {skipped} steps of epoch {progress.epoch + (not ended)} were skipped and "
            "changed nothing: their loss or gradient was not finite"
        )
    if ended:
        progress.trained = {
            "epoch": progress.epoch,
            "step": progress.step,
            "loss": loss / weight if weight else None,
            "skipped_steps": skipped,
            "lr": state.config.learning_rate(state.epoch_length, progress.cases),
        }


def keep_best(state: FoldState, score: Score, validation: Validation) -> None:
    """Update `state.best`, and save best.pth if this epoch is the best so far.

    Raises UserError, on all ranks, for a validation loss that is not finite.
    """
    metrics, best = validation.metrics, state.best
    if not math.isfinite(metrics["loss"]):
        raise UserError(
            f"fold {state.fold.number}: training has diverged (the loss on validation is {metrics['loss']}); "
            "what was saved before is unharmed. Lower --lr or take --precision fp32",
            everywhere=True,
        )
    if best and score.rank(best) >= score.rank(metrics):
        state.best = best | {"last": metrics}
        return
    state.best = metrics | {"epoch": state.progress.epoch, "last": metrics} | validation.more
    if state.runtime.processes.is_main:
        save_checkpoint(
            state.fold.folder / "best.pth",
            {"model": state.model.state_dict(), "best": state.best, "config": state.run_config},
        )


def report_epoch(state: FoldState, score: Score, record: dict, writer: Any) -> None:
    """One epoch, on the console, in log.txt and in TensorBoard."""
    if not state.runtime.processes.is_main:
        return
    best = state.best
    append_json(state.fold.folder / "log.txt", record)
    for name, value in record.items():
        if name not in ("epoch", "step") and value is not None:
            writer.add_scalar(name, value, record["step"])
    writer.flush()
    line = (
        f"fold {state.fold.number} epoch {record['epoch']}/{state.config.epochs}: loss "
        f"{format_metric(record['loss'], 4)}"
    )
    if "validation_loss" in record:
        line += (
            f", validation {score.title} {format_metric(record['validation_' + score.name])}, loss "
            f"{record['validation_loss']:.4f} (best: {format_metric(best[score.name])} in epoch {best['epoch']})"
        )
    print(f"{line}, {record['seconds']:.1f} s")


# ------------------------------------------------------------------------------------------------- saving and resuming


def save_fold(state: FoldState) -> None:
    """Save the fold's whole state."""
    parts = {name: part.state_dict() for name, part in state.parts().items()}
    state.checkpoints.save(
        {"optimizer": {}} | parts | asdict(state.progress) | {"best": state.best, "config": state.run_config}
    )


def save_if_due(state: FoldState) -> None:
    """Save where it is time, and end the run where a signal has asked for it."""
    ending = state.runtime.stop_signal.should_stop()
    if ending or state.checkpoints.due(state.progress.step):
        save_fold(state)
    if ending:
        state.runtime.stop_signal.end(state.checkpoints.wait)


def restore_fold(state: FoldState, saved: dict, path: Path) -> None:
    """Resume from what `save_fold` wrote. Raises UserError, on all ranks, for what does not fit."""
    load_parts(state.parts(), saved, path)
    state.progress = load_progress(FoldProgress, saved, path)
    state.best = saved["best"]
    state.runtime.processes.print(
        f"fold {state.fold.number}: resuming after step {state.progress.step}, epoch {state.progress.epoch}"
    )
