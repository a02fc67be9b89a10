"""Fold by fold: train, validate and test, from where a run stopped; layer-wise learning rates."""
import contextlib
import math
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import utils
from dino3d.command_line import Preempted, UserError
from dino3d.files import append_json, forget_after
from dino3d.finetune.crops import TrainingBatches, collate_crops
from dino3d.finetune.fold_folders import is_finished, start_folder
from dino3d.finetune.runtime import Device
from dino3d.finetune.statistics import told
from dino3d.training.checkpoint import Checkpoints, Saving, ignore_signals, load_on_all, save_checkpoint
from dino3d.training.loading import next_batch
from dino3d.training.nonfinite import SkippedSteps, describe, end_run, take_step


class Recipe(NamedTuple):
    """How every fold is trained. rates: gives the head's learning rate from cases per epoch and cases seen; saving: when
    it is saved."""
    epochs: int
    val_freq: int
    optimizer: str
    rates: callable
    weight_decay: float
    layer_decay: float
    seed: int
    max_skipped_steps: int
    saving: Saving = Saving()


class Fold(NamedTuple):
    """One fold: its number, its folder, the case numbers of its three sides, and its model.

    cases: the script's data set; model: with the encoder as `model.encoder`; say: prints, on the main process alone
    """
    number: int
    folder: Path
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    cases: NamedTuple
    model: nn.Module
    device: Device
    say: callable


class Task(NamedTuple):
    """What a script brings to a fold: functions, whose fold is already theirs.

    order: (n,) samples of an epoch in their order, given the epoch
    dataset: gives samples of keys (epoch, sample, counted), for `collate_crops`, and their files by `path_of`
    losses: (B,) loss and (B,) weight of each sample, given the network and a CropBatch on the CPU
    fit: called once before a new fold's training
    validate: what is known of the best epoch, as `keep_best` gives it, from what was known, a Done and the config
    test: evaluates the best epoch and writes the fold's tables and metrics.json
    show: puts pictures into TensorBoard, given its writer and the step, after a validation, on the main process alone
    """
    order: callable
    dataset: Dataset
    losses: callable
    fit: callable
    validate: callable
    test: callable
    show: callable = lambda writer, step: None


class Run(NamedTuple):
    """What a step needs. network: the model as it is called; epoch_length, global_batch: in samples; checkpoints: on the
    main process alone."""
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch_length: int
    global_batch: int
    skipped: SkippedSteps
    checkpoints: Checkpoints = utils.Silent()


@dataclass
class Done:
    """How far a fold is: epochs finished, samples of the current one, and steps and samples in all.

    trained: the record of the epoch just finished, as long as it is not validated
    """
    epoch: int = 0
    position: int = 0
    step: int = 0
    cases: int = 0
    trained: dict | None = None

    def count_step(self, cases, epoch_length):
        self.position, self.step, self.cases = self.position + cases, self.step + 1, self.cases + cases
        if self.position >= epoch_length:
            self.epoch, self.position = self.epoch + 1, 0


def run_fold(fold, recipe, task, config, most_steps):
    """Train, validate and test one fold, from where it stopped.

    Returns the steps taken, at most `most_steps`, and whether the fold is finished.
    """
    processes, model = fold.device.processes, fold.model
    path = fold.folder / "checkpoint.pth"
    state = load_on_all(path, processes)
    if state and state["epoch"] >= recipe.epochs and is_finished(fold.folder):
        fold.say(f"fold {fold.number}: done before")
        return 0, True
    if most_steps <= 0:
        return 0, False
    processes.from_main(lambda: start_folder(fold.folder))
    if state is None:
        task.fit()
    groups = layer_groups(model, "encoder.", len(model.encoder.blocks), recipe.layer_decay, recipe.weight_decay)
    optimizer = utils.make_optimizer(recipe.optimizer, groups) if groups else None
    scaler = torch.amp.GradScaler(processes.device.type, enabled=fold.device.dtype == torch.float16)
    done, best = Done(), None
    if state:
        model.load_state_dict(state["model"])
        if groups:
            optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        done, best = Done(**{name: state[name] for name in Done.__dataclass_fields__ if name in state}), state["best"]
        fold.say(f"fold {fold.number}: going on after step {done.step}, epoch {done.epoch}")
    network = model
    if processes.world_size > 1 and groups:
        devices = None if processes.device.type == "cpu" else [processes.device]
        warnings.filterwarnings("ignore", "Grad strides do not match")  # the class token's: one small copy more
        network = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    run = Run(network, optimizer, scaler, len(task.order(0)), fold.device.batch_size * processes.world_size,
              SkippedSteps(recipe.max_skipped_steps, processes.device),
              Checkpoints(path, recipe.saving) if processes.is_main else utils.Silent())
    before = done.step
    with contextlib.closing(run.checkpoints):
        best = train_fold(fold, recipe, task, run, done, best, config, most_steps)
        if best is None and done.epoch >= recipe.epochs:
            best = task.validate(None, done, config)
        save(fold, run, done, best, config)
        run.checkpoints.wait()
    if done.epoch < recipe.epochs:
        return done.step - before, False
    task.test()
    return done.step - before, True


def train_fold(fold, recipe, task, run, done, best, config, most_steps):
    """Train to the last epoch or for `most_steps`; returns what `validate` said of the best epoch."""
    processes, interruption = fold.device.processes, fold.device.interruption
    if done.epoch >= recipe.epochs and not done.trained:
        return best
    stream = TrainingBatches(task.order, fold.device.batch_size, processes.rank, processes.world_size, done.epoch,
                             done.position, recipe.epochs)
    loader = DataLoader(task.dataset, batch_sampler=stream, collate_fn=collate_crops, num_workers=fold.device.workers,
                        worker_init_fn=ignore_signals, pin_memory=processes.device.type == "cuda")
    batches = fold.device.batches_of(loader)
    writer = utils.Silent()
    if processes.is_main:
        from torch.utils.tensorboard import SummaryWriter
        forget_after(fold.folder / "log.txt", done.step)
        writer = SummaryWriter(fold.folder.parent / "tensorboard" / fold.folder.name, purge_step=done.step)
    last_step = done.step + most_steps

    def after_step():
        """Save where it is time, and end the run where a signal has asked for it."""
        ending = interruption.agreed()
        if ending or run.checkpoints.due(done.step):
            save(fold, run, done, best, config)
        if ending:
            interruption.end(run.checkpoints.wait)

    while done.trained or done.epoch < recipe.epochs and done.step < last_step:
        began, epoch, waited = time.perf_counter(), done.epoch, 0.0
        if not done.trained:
            left = -(-(run.epoch_length - done.position) // run.global_batch)  # steps, the last one with what remains
            steps = int(min(left, last_step - done.step))
            loss, skipped, waited = train_one_epoch(fold, recipe, task, run, batches, steps, done, after_step)
            if skipped:
                fold.say(f"fold {fold.number}: {skipped} steps of epoch {epoch + 1} were skipped and changed nothing: their "
                         "loss or gradient was not finite")
            if done.epoch > epoch:
                rate = recipe.rates(run.epoch_length, done.cases)
                done.trained = {"epoch": done.epoch, "step": done.step, "loss": loss, "skipped_steps": skipped, "lr": rate}
        if done.trained:
            record = dict(done.trained)
            if done.epoch % recipe.val_freq == 0 or done.epoch == recipe.epochs:
                try:
                    best = task.validate(best, done, config)
                except Preempted:  # it will be done again
                    save(fold, run, done, best, config)
                    processes.from_main(run.checkpoints.wait)
                    raise
                record |= {f"validation_{name}": value for name, value in best["last"].items()}
                if processes.is_main:
                    task.show(writer, done.step)
            record |= {"seconds": round(time.perf_counter() - began, 2), "waiting_for_data": round(waited, 2)}
            report(fold, recipe, record, best, writer)
            writer.flush()
            done.trained = None
        if done.epoch < recipe.epochs and done.step < last_step:
            after_step()
    writer.close()
    return best


def train_one_epoch(fold, recipe, task, run, batches, steps, done, after_step):
    """Take `steps` steps on what the iterator `batches` gives; `done` counts them. after_step: called after all but the last.

    Returns the mean loss of those that were taken (None if none was), how many were skipped, and seconds without data.
    """
    processes = fold.device.processes
    fold.model.train()
    sums, waited = torch.zeros(3, dtype=torch.float64, device=processes.device), 0.0
    for index in range(steps):
        began = time.perf_counter()
        batch = next_batch(batches)
        waited += time.perf_counter() - began
        utils.seed_step(recipe.seed, done.step, processes.rank)
        set_learning_rate(run.optimizer, recipe.rates(run.epoch_length, done.cases))
        losses, weights = task.losses(run.network, batch)
        taken, sum_of_step = train_step(run, processes, losses, weights)
        sums += sum_of_step
        done.count_step(min(run.global_batch, run.epoch_length - done.position), run.epoch_length)
        run.skipped.count(taken)
        if run.skipped.too_many(done.step):
            samples = [describe(task.dataset.path_of(sample), loss, crop=crop)
                       for sample, loss, crop in zip(batch.cases.tolist(), losses.tolist(), batch.crops)]
            end_run(fold.folder, processes, done.step, run.skipped.most, samples)
        if index < steps - 1:
            after_step()
    loss, weight, skipped = processes.sum(sums).tolist()
    return loss / weight if weight else None, round(skipped / processes.world_size), waited


def train_step(run, processes, losses, weights):
    """One step on the weighted mean of losses over the global batch.

    losses: (B,); weights: (B,) of each sample, 0 for one that doesn't count
    Returns taken (), False if the loss or a gradient was not finite: then nothing has changed; and (3,) this rank's sums
    of weighted losses and of weights, 0 for a step that was skipped, and whether it was.
    """
    loss = (weights * losses).sum()
    total = processes.sum(weights.sum())  # of all ranks
    run.optimizer.zero_grad(set_to_none=True)
    # DDP takes the mean of the ranks' gradients, and their sum is what belongs to the sum of their losses
    run.scaler.scale(loss * (processes.world_size / total)).backward()
    run.scaler.unscale_(run.optimizer)
    taken = torch.nn.utils.get_total_norm(p.grad for p in run.network.parameters() if p.grad is not None).isfinite()
    take_step(run.optimizer, taken)
    run.scaler.update()
    sums = torch.where(taken, torch.stack([loss.detach(), weights.sum()]), 0)
    return taken, torch.cat([sums, (~taken)[None]]).double()


def check_diverged(fold, loss):
    """UserError, on all ranks, where the loss on validation is not finite."""
    if not math.isfinite(loss):
        raise UserError(f"fold {fold.number}: training has diverged (the loss on validation is {loss}); what was saved before "
                        "is unharmed. Lower --lr or take --precision fp32", everywhere=True)


def keep_best(fold, best, last, done, config, more):
    """What is known of the best epoch: {its score, "loss", "epoch", "last", more}; saves best.pth if it is this one.

    last: {score's name: value or None, "loss": value} of now. Best is the highest score, then the lowest loss.
    more: what else to remember of the best epoch
    """
    score = next(iter(last))

    def rank(values):
        return values[score] or 0, -values["loss"]
    if best and rank(best) >= rank(last):
        return best | {"last": last}
    best = last | {"epoch": done.epoch, "last": last} | more
    if fold.device.processes.is_main:
        save_checkpoint(fold.folder / "best.pth", {"model": fold.model.state_dict(), "best": best, "config": config})
    return best


def report(fold, recipe, record, best, writer):
    """One epoch, on the console, in log.txt and in TensorBoard."""
    if not fold.device.processes.is_main:
        return
    append_json(fold.folder / "log.txt", record)
    for name, value in record.items():
        if name not in ("epoch", "step") and value is not None:
            writer.add_scalar(name, value, record["step"])
    line = f"fold {fold.number} epoch {record['epoch']}/{recipe.epochs}: loss {told(record['loss'], 4)}"
    if "validation_loss" in record:
        score = next(iter(best["last"]))
        line += (f", validation {'AUC' if score == 'auc' else score} {told(record['validation_' + score])}, loss "
                 f"{record['validation_loss']:.4f} (best: {told(best[score])} in epoch {best['epoch']})")
    fold.say(f"{line}, {record['seconds']:.1f} s")


def one_step_notice(longest, epochs, global_batch):
    """[] or [one line] where an epoch, of `longest` samples at most, is a single step, of which few epochs make few."""
    if longest > global_batch or not epochs:
        return []
    return [f"an epoch of {longest} samples is one step: {epochs} epochs are {epochs} steps; for more of them lower "
            "--batch_size_per_gpu"]


def save(fold, run, done, best, config):
    """Save a fold's whole state."""
    run.checkpoints.save({
        "model": fold.model.state_dict(), "optimizer": run.optimizer.state_dict() if run.optimizer else {},
        "scaler": run.scaler.state_dict(), **asdict(done), "best": best, "config": config})


# -------------------------------------------------------------------------------------------------------- optimisation


def layer_groups(model, encoder_prefix, depth, layer_decay, weight_decay):
    """Optimizer groups with layer-wise learning rates (Clark et al. 2020, Bao et al. 2022): `scale` is that of --lr.

    Names below `encoder_prefix` are a VisionTransformer's of `depth` blocks: what embeds patches and positions is layer
    0, block i is layer i + 1; the last norm and the head are at the top, with scale 1. Frozen parameters are left out.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = depth + 1
        if name.startswith(encoder_prefix + "blocks."):
            layer = int(name[len(encoder_prefix):].split(".")[1]) + 1
        elif name.startswith(tuple(encoder_prefix + part for part in ("patch_embed", "pos_embed", "cls_token"))):
            layer = 0
        decays = utils.decays(name, parameter)
        group = groups.setdefault((layer, decays), {
            "params": [], "scale": layer_decay ** (depth + 1 - layer), "weight_decay": weight_decay if decays else 0.0})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(lr, min_lr, epochs, warmup_epochs, epoch_length, seen):
    """Of the head, after `seen` cases: linear warm-up, then half a cosine. epoch_length: cases."""
    return utils.cosine_schedule(seen, lr, min_lr, epochs * epoch_length, warmup_epochs * epoch_length)


def set_learning_rate(optimizer, lr):
    """lr: of the head; the layers below have `scale` of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
