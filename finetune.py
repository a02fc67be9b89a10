"""What the two downstream scripts share: flags, the pre-trained encoder, folds by patient, crops as training and
evaluation see them, layer-wise learning rates, the bootstrap, and a run that goes on fold by fold.

Cases are numbered by their place in the sorted list of the data set; a case's name is its path below --data_dir without
suffix. Everything random is a function of --seed, the epoch and the case, so that neither the number of loader workers
nor the number of processes nor an interruption changes what a case is trained on.
"""
import argparse
import collections
import contextlib
import csv
import json
import math
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

import checkpoint
import utils
from augmentations import Lattice, ViewParameters, collate_views, keyed_rng, render_views, scale_intensity, warp
from checkpoint import Checkpoints, Interruption, Saving, load_checkpoint, save_checkpoint
from data import SUFFIXES, DataError, Volume, watched
from monitor import forget_after
from skipping import SkippedSteps, describe, end_run, take_step
from utils import Preempted, UserError, append_json, boolean, number, spaced
from vision_transformer import ARCHITECTURES

# Where neither a flag nor the checkpoint's config says
ENCODER = {"arch": "vit_small", "patch_size": [12, 12, 6], "input_size": [96, 96, 48], "clip_range": [-1000.0, 1000.0],
           "spacing": None}
NUM_TEST = 37              # cases of the paper's test set
SAME_SPACING = 0.05        # relative difference up to which two spacings are taken for the same
BOOTSTRAP_ROUNDS = 1000
READ_AHEAD = 2             # batches


class Device(NamedTuple):
    """How this process computes, until it is interrupted.

    batch_size: per process; workers: reading processes; dtype: of the matrix products
    read_timeout: seconds that a worker may take to read a file; 0: any time
    """
    processes: utils.Processes
    dtype: torch.dtype
    batch_size: int
    workers: int
    interruption: Interruption = Interruption()
    read_timeout: float = 0.0

    def batches_of(self, loader):
        """An iterator over a DataLoader's batches that ends the process where a file can't be read in time."""
        return watched(loader, self.read_timeout, utils.end_process)

    def autocast(self):
        return torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32)


# ------------------------------------------------------------------------------------------------------------- flags


def add_flags(parser, batch_size, folds, spacing, predict):
    """The flags of both downstream scripts. batch_size: default per process; folds: choices of --folds; spacing, predict:
    help of these."""
    group = parser.add_argument_group("model (default: as in the config of --pretrained_weights)")
    group.add_argument("--pretrained_weights", default="", metavar="FILE",
                       help="checkpoint of main_dino.py or of older DINO code; without it: from scratch")
    group.add_argument("--checkpoint_key", default="teacher", help="which state dict of --pretrained_weights to take")
    group.add_argument("--arch", default=None, type=utils.architecture(ARCHITECTURES),
                       help=f"one of {', '.join(ARCHITECTURES)}; without weights {ENCODER['arch']}")
    group.add_argument("--patch_size", default=None, nargs=3, type=number(int, 1), metavar=("X", "Y", "Z"),
                       help=f"voxels per token; without weights {spaced(ENCODER['patch_size'])}")
    group.add_argument("--input_size", default=None, nargs=3, type=number(int, 1), metavar=("X", "Y", "Z"),
                       help=f"voxels that the encoder sees, from a crop's centre; without weights "
                            f"{spaced(ENCODER['input_size'])}")
    group.add_argument("--clip_range", default=None, nargs=2, type=number(float), metavar=("LOW", "HIGH"),
                       help=f"HU that become 0 and 1; without weights {spaced(ENCODER['clip_range'])}")
    group.add_argument("--spacing", default=None, nargs=3, type=number(float, above=0), metavar=("X", "Y", "Z"),
                       help=spacing)
    group.add_argument("--drop_path_rate", default=0.1, type=number(float, 0, below=1),
                       help="stochastic depth of the encoder's last block in training")
    utils.boolean_flag(group, "--freeze_encoder", False, "leave the encoder as it is and train the head alone")

    group = parser.add_argument_group("folds (by patient)")
    if len(folds) > 1:
        group.add_argument("--folds", default="patients", choices=folds,
                           help="patients: a fixed test set and --k_fold folds of the rest; subsets: each subset* folder "
                                "is tested once, the next one validates")
    group.add_argument("--k_fold", default=5, type=number(int, 2),
                       help="folds of what is no test set; each validates once")
    group.add_argument("--num_test", default=None, type=number(int, 1),
                       help=f"cases of the fixed test set, as near as whole patients allow; default: {NUM_TEST}, or a "
                            "fifth of the cases where that is less than a tenth or more than a third of them")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", default=100, type=number(int, 1), help="passes over the training cases")
    group.add_argument("--batch_size_per_gpu", default=batch_size, type=number(int, 1),
                       help="cases per process and step; lower it when memory runs out")
    group.add_argument("--lr", default=0.001, type=number(float, 0),
                       help="peak learning rate of the head, not scaled with the batch; the encoder's layers have "
                            "less, see --layer_decay. For --optimizer sgd take 0.01 and more")
    group.add_argument("--layer_decay", default=0.75, type=number(float, above=0, high=1),
                       help="learning rate of each layer relative to the one above it; 1: all layers alike")
    group.add_argument("--warmup_epochs", default=5, type=number(float, 0), help="epochs of linear warm-up")
    group.add_argument("--min_lr", default=1e-6, type=number(float, 0), help="learning rate at the end")
    group.add_argument("--weight_decay", default=0.05, type=number(float, 0), help="weight decay")
    group.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd"), help="sgd as in the paper")
    group.add_argument("--max_skipped_steps", default=20, type=number(int, 1),
                       help="steps in a row whose loss or gradient is not finite, and which change nothing, that end the run")
    group.add_argument("--precision", default=None, choices=tuple(utils.PRECISIONS),
                       help="of the matrix products; default: bf16 on GPUs that have it, else fp16; fp32 on CPUs")
    group.add_argument("--val_freq", default=1, type=number(int, 1), help="epochs between validations")

    group = parser.add_argument_group("augmentations (of training data alone; each with probability 0.5)")
    group.add_argument("--shift_range", default=[0, 0, 0], nargs=3, type=number(int, 0), metavar=("X", "Y", "Z"),
                       help="voxels by which the window's centre moves at most, always drawn")
    utils.augmentation_flags(group)

    group = parser.add_argument_group("data and run")
    group.add_argument("--data_dir", "--data_path", default=None, metavar="DIR", help="folder with the labelled data")
    group.add_argument("--output_dir", default="output", metavar="DIR", help="where all results go; goes on from there")
    group.add_argument("--num_workers", default=None, type=number(int, 0),
                       help="reading processes per process; default: the cores that each process can have, at most 16")
    utils.read_timeout_flag(group)
    group.add_argument("--max_steps", default=None, type=number(int, 1),
                       help="stop after this many steps of this call, with a checkpoint; the same command goes on")
    group.add_argument("--seed", default=0, type=number(int, 0), help="of folds, weights, order and augmentations")
    checkpoint.add_flags(group, besides="each fold's end")

    group = parser.add_argument_group("prediction")
    group.add_argument("--predict", default=None, metavar="DIR", help=predict)
    group.add_argument("--weights", default=None, metavar="OUT",
                       help="--output_dir of a trained run: its folds are averaged; OUT/0: one fold alone")

    group = parser.add_argument_group("older flags, accepted")
    group.add_argument("--use_fp16", default=None, nargs="?", const=True, type=boolean, help="now --precision")
    group.add_argument("--dist_url", default=None, help="ignored: the launcher tells")
    group.add_argument("--local_rank", "--local-rank", default=None, help="ignored: the launcher tells")


def check_flags(parser, given, layout):
    """Refuse what is wrong whatever the data (exit code 2). given: {name: value or None}; layout: of --data_dir."""
    pretrained = bool(given["pretrained_weights"])
    if (given["predict"] is None) != (given["weights"] is None):
        parser.error("--predict DIR and --weights OUT go together: the new data, and the run whose models judge them")
    if given["predict"] is None and given["data_dir"] is None:
        parser.error(f"--data_dir is missing: the folder with {layout}")
    if given["clip_range"] and given["clip_range"][0] >= given["clip_range"][1]:
        parser.error(f"--clip_range {spaced(given['clip_range'])}: the first value must be below the second")
    size, patch = (given[name] or (None if pretrained else ENCODER[name]) for name in ("input_size", "patch_size"))
    if size and patch and any(n % p for n, p in zip(size, patch)):
        parser.error(f"--input_size {spaced(size)} is not a multiple of --patch_size {spaced(patch)} along each axis")


def set_up(output_dir, precision, use_fp16, num_workers, batch_size, read_timeout, **ignored):
    """(Device, name of its precision, notices), after joining the other processes and making the output folder.

    precision, num_workers: None for what suits the machine; ignored: flags that have no effect any more
    """
    processes = utils.distributed_init()
    processes.from_main(lambda: utils.make_output_dir(output_dir))
    precision, notices = utils.choose_precision(precision, use_fp16, processes.device)
    notices += utils.ignored_flags(**ignored)
    workers = min(16, utils.cores_per_process(processes)) if num_workers is None else num_workers
    interruption = Interruption(processes, output_dir / "preempted")
    device = Device(processes, utils.PRECISIONS[precision], batch_size, workers, interruption, read_timeout)
    return device, precision, notices


# ----------------------------------------------------------------------------------------------------------- encoder


class Encoder(NamedTuple):
    """A pre-trained encoder: what to build it with, and its weights (None: from scratch)."""
    arch: str
    patch_size: list
    input_size: list
    clip_range: list
    spacing: list | None
    state: dict | None = None

    def build(self, drop_path_rate=0.0):
        """A new VisionTransformer with these weights, or random ones."""
        encoder = ARCHITECTURES[self.arch](img_size=self.input_size, patch_size=self.patch_size,
                                           drop_path_rate=drop_path_rate)
        if self.state is not None:
            encoder.load_state_dict(self.state)
        return encoder

    def settings(self):
        """{name: value} of all but the weights."""
        return {name: getattr(self, name) for name in ENCODER}


def load_encoder(path, checkpoint_key="teacher", given=None):
    """The Encoder of a checkpoint; without `path` one with random weights.

    given: {name: value or None} for the names of ENCODER, from flags; None: as the checkpoint's config says.
    Raises UserError for a file that is missing, broken or of another architecture, and for flags that contradict it.
    """
    config, given = {}, given or dict.fromkeys(ENCODER)
    if path:
        try:
            checkpoint = utils.load_file(path)
            state = utils.find_state_dict(checkpoint, path, checkpoint_key)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"--pretrained_weights {error}", everywhere=True) from error
        config = described(checkpoint, path)
    chosen = {}
    for name, default in ENCODER.items():
        trained = config.get(name)
        trained = list(trained) if isinstance(trained, tuple) else trained
        if None not in (trained, given[name]) and trained != given[name]:
            raise UserError(f"--{name} {_plain(given[name])} contradicts --pretrained_weights {path}, which has "
                            f"{_plain(trained)}: leave --{name} out", everywhere=True)
        chosen[name] = next((value for value in (given[name], trained) if value is not None), default)
    if any(n % p for n, p in zip(chosen["input_size"], chosen["patch_size"])):
        source = f"--pretrained_weights {path}: " if path else ""
        raise UserError(f"{source}an input of {spaced(chosen['input_size'])} voxels is not a multiple of the patch size "
                        f"{spaced(chosen['patch_size'])} along each axis: give other --input_size or --patch_size",
                        everywhere=True)
    encoder = Encoder(**chosen)
    if not path:
        return encoder
    model = encoder.build()
    try:
        utils.fit_state_dict(model, state, path)
    except ValueError as error:
        raise UserError(f"--pretrained_weights {error}; is --arch {encoder.arch} right?", everywhere=True) from error
    return encoder._replace(state=model.state_dict())


def described(checkpoint, path):
    """What the config in a checkpoint says, or older code's args. Raises UserError for what no encoder can have."""
    config = next((checkpoint[name] for name in ("config", "args") if checkpoint.get(name) is not None), {})
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    if not isinstance(config, dict):
        raise UserError(f"--pretrained_weights {path}: its config is a {type(config).__name__}, expected a dict",
                        everywhere=True)

    def numbers(value, count, low, high, kinds=(int, float)):
        return isinstance(value, (list, tuple)) and len(value) == count and all(
            type(number) in kinds and low <= number <= high for number in value)
    sound = {"arch": lambda value: isinstance(value, str) and value in ARCHITECTURES,
             "patch_size": lambda value: numbers(value, 3, 1, 4096, (int,)),
             "input_size": lambda value: numbers(value, 3, 1, 4096, (int,)),
             "clip_range": lambda value: numbers(value, 2, -1e6, 1e6) and value[0] < value[1],
             "spacing": lambda value: numbers(value, 3, 1e-6, 1e6)}
    for name, fits in sound.items():
        if config.get(name) is not None and not fits(config[name]):
            found = " ".join(repr(config[name]).split())[:100]
            raise UserError(f"--pretrained_weights {path}: its config has {name} {found}, which no encoder here can have",
                            everywhere=True)
    return config


def _plain(value):
    return value if isinstance(value, str) else spaced(value)


# ------------------------------------------------------------------------------------------------------------- crops


def case_names(paths, folder):
    """Names of cases: their paths relative to `folder` without suffix. Raises UserError where two would share one."""
    names = {}
    for path in paths:
        name = os.path.relpath(path, folder)
        name = next(name[:-len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)).replace(os.sep, "/")
        if name in names:
            raise UserError(f"{path}: has the same name as {names[name]}, expected one file of each name")
        names[name] = path
    return list(names)


def read_headers(paths, processes):
    """[Header] of volumes, the same on every rank. Raises UserError, on all ranks, for one that can't be read."""
    def look(path):
        try:
            with Volume(path) as volume:
                return Header(volume.shape, volume.spacing)
        except DataError as error:
            return str(error)
    with ThreadPoolExecutor(8) as pool:  # mostly waiting, for network drives
        mine = list(pool.map(look, paths[processes.rank::processes.world_size]))
    heads = [None] * len(paths)
    for rank, part in enumerate(processes.gather(mine)):
        heads[rank::processes.world_size] = part
    for head in heads:
        if isinstance(head, str):
            raise UserError(head, everywhere=True)
    return heads


class Header(NamedTuple):
    """shape: (3,) voxels; spacing: (3,) mm; both along the axes of RAS."""
    shape: tuple
    spacing: tuple


def check_crops(paths, processes):
    """(size, spacing) that all crops share: voxels and mm (of the first crop). Looks into every file's header.

    Raises UserError, on all ranks, for one that can't be read or is of another size than the first.
    """
    heads = read_headers(paths, processes)
    for path, head in zip(paths, heads):
        if head.shape != heads[0].shape:
            raise UserError(size_problem(path, head.shape, paths[0], heads[0].shape), everywhere=True)
    return list(heads[0].shape), [round(s, 4) for s in heads[0].spacing]


def size_problem(path, size, first_path, first_size):
    return f"{path}: has {spaced(size)} voxels, but {first_path} has {spaced(first_size)}: expected crops of one size"


def spacing_of(path):
    """(3,) mm. Raises UserError."""
    try:
        with Volume(path) as volume:
            return volume.spacing
    except DataError as error:
        raise UserError(str(error)) from error


def spacing_warning(ours, theirs, whose, against):
    """[] or [one line] where two spacings (mm) differ."""
    if theirs is None or np.allclose(ours, theirs, rtol=SAME_SPACING, atol=0):
        return []
    ours, theirs = (spaced(np.round(spacing, 3)) for spacing in (ours, theirs))
    return [f"warning: {whose} a spacing of {ours} mm, {against} {theirs} mm: the encoder sees things at another size"]


def read_crop(path, size, expected=None):
    """(x, y, z) int16 HU around the crop's centre: at least `size` voxels, padded with air, and all that lies beyond.

    expected: (first path, its size), which the crop must share. Raises DataError.
    """
    with Volume(path) as volume:
        if expected and volume.shape != tuple(expected[1]):
            raise DataError(path, size_problem(path, volume.shape, *expected).partition(": ")[2])
        shape = np.array(volume.shape)
        whole = np.maximum(shape, size)
        return volume.read((shape - whole) // 2, whole)


def centre_window(crop, size):
    """The middle `size` voxels of a crop that is at least as large."""
    start = (np.array(crop.shape) - size) // 2
    return crop[tuple(slice(a, a + n) for a, n in zip(start, size))]


class WindowAugmentation:
    """One augmented window of a crop around its centre, drawn per case and rendered per batch.

    policy: augmentations.Policy; size: (3,) voxels of the window; shift_range: (3,) voxels
    spacing: (3,) mm per voxel, for rotations in mm; None: in voxels, as in the paper
    """

    def __init__(self, policy, size, shift_range, spacing=None):
        self.policy, self.size, self.shift_range = policy, np.array(size), np.array(shift_range)
        self.spacing = 1.0 if spacing is None else np.array(spacing)
        self.lattice = Lattice.for_views(size, policy)

    def draw(self, seed, epoch, case, crop_shape):
        """[ViewParameters] of one window, NumPy arrays with one row, as `augmentations.collate_views` takes them."""
        rng = keyed_rng(seed, epoch, case, 0)
        # Whole voxels: a window that is neither turned nor scaled is not blurred by interpolation
        centre = (np.array(crop_shape) - self.size) // 2 + (self.size - 1) / 2
        centre = centre + rng.randint(-self.shift_range, self.shift_range + 1)
        matrix, moves = self.policy.draw_affine(rng), self.policy.draw_elastic(rng, self.lattice.shape)
        control = self.lattice.control(matrix, centre, moves, self.spacing, self.spacing)
        parts = control, self.policy.draw_sigma(rng), self.policy.draw_histogram(rng)
        return [ViewParameters(*(part[None].astype(np.float32) for part in parts))]

    def render(self, crops, group, clip_range):
        """(B, 1, x, y, z) windows with grey values in [0, 1]. crops: (B, X, Y, Z) int16; group: of `collate_views`."""
        with torch.autocast(crops.device.type, enabled=False):  # positions need more than bf16's three digits
            return render_views(scale_intensity(crops, *clip_range)[:, None], self.lattice, *group)

    def render_masks(self, masks, group):
        """(B, x, y, z) int64 classes: the same geometry by nearest neighbour. masks: (B, X, Y, Z) uint8."""
        control = group[0].control
        return warp(masks[:, None].to(control.dtype), control, self.lattice, mode="nearest")[:, 0].long()


class CropBatch(NamedTuple):
    """crops: (B, X, Y, Z) int16; cases, counted: (B,); group: see `collate_views`; masks: (B, X, Y, Z) uint8 classes, for
    tasks that have them; fatal: why nothing came."""
    crops: torch.Tensor
    cases: torch.Tensor
    counted: torch.Tensor
    group: tuple | None
    masks: torch.Tensor | None = None
    fatal: str = ""

    def to(self, device):
        """The crops, their masks and how to augment them on a device; the rest stays where it is."""
        parameters, *indices = self.group
        group = (ViewParameters(*(part.to(device, non_blocking=True) for part in parameters)),
                 *(part.to(device, non_blocking=True) for part in indices))
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return self._replace(crops=self.crops.to(device, non_blocking=True), group=group, masks=masks)


class TrainingCrops(Dataset):
    """Whole crops and how to augment them, for keys (epoch, case, counted). paths: of all cases; size: of all crops."""

    def __init__(self, paths, size, augmentation, seed):
        self.paths, self.expected, self.augmentation, self.seed = paths, (paths[0], size), augmentation, seed

    def path_of(self, case):
        return self.paths[case]

    def __getitem__(self, key):
        epoch, case, counted = key
        try:
            crop = read_crop(self.paths[case], self.augmentation.size, self.expected)
        except DataError as error:  # an exception would reach the main process as a traceback's text
            return str(error)
        return crop, case, counted, self.augmentation.draw(self.seed, epoch, case, crop.shape)


class EvaluationCrops(Dataset):
    """The exact centre window of a crop, nothing random, by case number. size: (3,); expected: see `read_crop`."""

    def __init__(self, paths, size, expected=None):
        self.paths, self.size, self.expected = paths, np.array(size), expected

    def __getitem__(self, case):
        try:
            return centre_window(read_crop(self.paths[case], self.size, self.expected), self.size), case, True, None
        except DataError as error:
            return str(error)


def collate_crops(samples):
    """A CropBatch of samples (crop, case, counted, drawn views or None[, mask]), or of the text of what went wrong."""
    broken = [sample for sample in samples if isinstance(sample, str)]
    if broken:
        return CropBatch(torch.empty(0), torch.empty(0), torch.empty(0), None, fatal=broken[0])
    crops, cases, counted, drawn, *masks = zip(*samples)
    group = collate_views(drawn)[0] if drawn[0] else None
    masks = torch.from_numpy(np.stack(masks[0])) if masks else None
    return CropBatch(torch.from_numpy(np.stack(crops)), torch.tensor(cases), torch.tensor(counted), group, masks)


def read_ahead(dataset, cases, batch_size, workers):
    """CropBatches of the cases in their order, read by threads, at most READ_AHEAD batches before they are asked for.

    Threads, and not a DataLoader's processes: those would be forked anew for every validation, while threads of the
    collectives before it may still be at work, and in Python 3.11 such a fork can hang.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = collections.deque()
        for at in range(0, len(cases), batch_size):
            waiting.append([pool.submit(dataset.__getitem__, case) for case in cases[at:at + batch_size]])
            if len(waiting) > READ_AHEAD:
                yield collate_crops([sample.result() for sample in waiting.popleft()])
        for samples in waiting:
            yield collate_crops([sample.result() for sample in samples])


class TrainingBatches(Sampler):
    """Batches of keys (epoch, case, counted) from a position in a fold to its end, without a pause between epochs.

    The epoch's order is cut into global batches and each of those into the ranks' shares, so that the cases of a step
    do not depend on the number of ranks. The last batch of an epoch may be smaller, and the shares of a batch may
    differ by one; a rank that is left without a case takes one that does not count, as every rank has to take the step.

    order_of: gives the cases of an epoch in their order, equal on every rank; batch_size: of one rank
    epoch, position: where to start, in epochs and in cases of that epoch; epochs: where to end
    """

    def __init__(self, order_of, batch_size, rank, world_size, epoch, position, epochs):
        self.order_of, self.rank, self.world_size = order_of, rank, world_size
        self.global_batch, self.start, self.epochs = batch_size * world_size, (epoch, position), epochs

    def __iter__(self):
        first, position = self.start
        for epoch in range(first, self.epochs):
            order = self.order_of(epoch)
            for at in range(position, len(order), self.global_batch):
                batch = order[at:at + self.global_batch]
                mine = np.array_split(batch, self.world_size)[self.rank]
                yield [(epoch, int(case), True) for case in mine] or [(epoch, int(batch[0]), False)]
            position = 0


def collect(device, cases, mine):
    """(N, ...) one row per case, in the order of `cases`, of the rows that the ranks have for their shares.

    cases: (N,) case numbers, each once; mine: {case: row} of this rank, which leaves the rest out when it is interrupted.
    Raises Preempted, on all ranks, where one did so; RuntimeError unless every case has exactly one row.
    """
    rows, interrupted = {}, False
    for part, asked in device.processes.gather((mine, bool(device.interruption.asked))):
        if rows.keys() & part.keys():
            raise RuntimeError("two processes evaluated the same case")
        rows.update(part)
        interrupted = interrupted or asked
    if interrupted and len(rows) < len(cases):
        device.interruption.end()
    if rows.keys() != set(cases):
        raise RuntimeError(f"{len(rows)} cases were evaluated instead of {len(cases)}")
    return np.stack([rows[case] for case in cases])


# ------------------------------------------------------------------------------------------------------------- folds


class Split(NamedTuple):
    """Patients of one fold's three sides."""
    train: list
    validation: list
    test: list


def default_num_test(cases):
    """37 cases, or a fifth where that is less than a tenth or more than a third of them."""
    return NUM_TEST if cases / 10 <= NUM_TEST <= cases / 3 else max(1, round(cases / 5))


def divide(counts, shares, rng):
    """(P,) side of each patient: as near to the shares of every class as whole patients allow; no side is left empty.

    counts: (P, C) cases of each patient and class; shares: (S,) of each side, summing to 1; P >= S
    rng: numpy Generator. Greedy, as scikit-learn's StratifiedGroupKFold, whose folds are all of one size: the patients
    with the largest part of a class come first, and each goes where it leaves the smallest squared error.
    """
    counts, shares = np.asarray(counts, float), np.asarray(shares, float)
    parts = counts / np.maximum(counts.sum(0), 1)  # (P, C) of each class
    order = rng.permutation(len(counts))
    order = order[np.argsort(-parts[order].max(1), kind="stable")]
    parts = np.column_stack([parts, 0.01 * counts.sum(1) / counts.sum()])  # where classes don't tell, by size
    missing = shares[:, None] * parts.sum(0)  # (S, C + 1)
    sides = np.empty(len(counts), int)
    for patient in order:
        worse = ((missing - parts[patient]) ** 2 - missing ** 2).sum(1)
        sides[patient] = worse.round(12).argmin()  # equal but for rounding: the first
        missing[sides[patient]] -= parts[patient]
    for side in range(len(shares)):
        if not (sides == side).any():
            largest = np.bincount(sides, minlength=len(shares)).argmax()
            givers = np.flatnonzero(sides == largest)
            sides[givers[counts[givers].sum(1).argmin()]] = side
    return sides


def patient_splits(patients, labels, num_test, k_fold, seed):
    """[Split] of k folds: one fixed test set, and each fold validates on its part of the other patients.

    patients, labels: of each case; num_test: cases, None: `default_num_test`. Raises UserError.
    """
    names, counts = count_by_patient(patients, labels)
    if len(names) < k_fold + 1:
        raise UserError(f"{len(names)} patients are too few for a test set and --k_fold {k_fold}, expected at least "
                        f"{k_fold + 1}: lower --k_fold (2 or more) or add patients", everywhere=True)
    wanted = default_num_test(len(labels)) if num_test is None else num_test
    if wanted >= len(labels):
        raise UserError(f"--num_test {wanted}: there are only {len(labels)} cases; lower it", everywhere=True)
    rng = np.random.default_rng(np.random.SeedSequence((seed, len(names))))
    share = wanted / len(labels)
    tested = divide(counts, (share, 1 - share), rng) == 0
    rest = np.flatnonzero(~tested)
    if len(rest) < k_fold:
        raise UserError(f"{len(rest)} patients besides the {tested.sum()} of the test set are too few for --k_fold "
                        f"{k_fold}: lower --k_fold or --num_test", everywhere=True)
    folds = divide(counts[rest], np.full(k_fold, 1 / k_fold), rng)
    return [Split([names[i] for i in rest[folds != fold]], [names[i] for i in rest[folds == fold]],
                  [names[i] for i in np.flatnonzero(tested)]) for fold in range(k_fold)]


def subset_splits(patients, subsets):
    """[Split] in which each subset is tested once, the next one validates and the rest trains. Raises UserError."""
    members = {}
    for patient, subset in zip(patients, subsets):
        members.setdefault(subset, set()).add(patient)
    names = sorted(members, key=lambda name: (len(name), name))  # subset10 after subset9
    if len(names) < 3:
        raise UserError("--folds subsets needs at least 3 subsets (test, validation, training), found "
                        f"{', '.join(names)}; take --folds patients", everywhere=True)
    splits = []
    for test, name in enumerate(names):
        validation = names[(test + 1) % len(names)]
        train = set().union(*(members[other] for other in names if other not in (name, validation)))
        splits.append(Split(sorted(train), sorted(members[validation]), sorted(members[name])))
    return splits


def count_by_patient(patients, labels):
    """(names, counts): the P patients, sorted, and the (P, C) cases that each has of each class."""
    names = sorted(set(patients))
    row = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), max(labels) + 1), int)
    np.add.at(counts, ([row[patient] for patient in patients], labels), 1)
    return names, counts


def make_splits(path, folds, k_fold, num_test, seed, patients, labels, subsets, known):
    """(splits, data) of a run: from its splits.json or, for a new one, made; data: {name: value} that they depend on.

    patients, labels, subsets: of each case; known: names that a splits.json has in its data besides
    Raises UserError, also where splits.json is of other flags or patients.
    """
    described = {"folds": folds, "k_fold": k_fold, "num_test": num_test, "seed": seed,
                 "cases": np.bincount(labels).tolist(), "patients": len(set(patients))}
    saved = load_splits(path, described, known)
    if saved is None:
        splits = (subset_splits(patients, subsets) if folds == "subsets" else
                  patient_splits(patients, labels, num_test, k_fold, seed))
        return splits, described
    if any({patient for side in split for patient in side} != set(patients) for split in saved[0]):
        raise UserError(f"{path}: names other patients than --data_dir holds; choose another --output_dir")
    return saved


def of_patients(chosen, patients):
    """(n,) numbers of the cases whose patient is among the chosen. patients: of each case."""
    chosen = set(chosen)
    return np.array([i for i, patient in enumerate(patients) if patient in chosen], int)


def load_splits(path, described, known):
    """(splits, data) of a splits.json, or None where there is no file.

    described: {name: value} of what they depend on; raises UserError where the file says otherwise, or lacks a `known` name.
    """
    if not os.path.exists(path):
        return None
    try:
        saved = json.loads(Path(path).read_text())
        splits, data = [Split(*(split[side] for side in Split._fields)) for split in saved["splits"]], dict(saved["data"])
        if not splits or not all(isinstance(side, list) and all(isinstance(patient, str) for patient in side)
                                 for split in splits for side in split):
            raise ValueError("its splits are no lists of patients")
        missing = [name for name in known if name not in data]
        if missing:
            raise KeyError(missing[0])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: can't be read ({error}); move it away to start anew") from error
    for name, value in described.items():
        if data.get(name) != value:
            found = " ".join(str(data.get(name)).split())[:100]
            raise UserError(f"{path}: is of a run with {name} {found}, now it is {value}; go on with the same data and flags "
                            "or choose another --output_dir")
    return splits, data


def save_splits(path, splits, described):
    """Write splits.json: what the folds depend on, and the patients of each side."""
    write_json(path, {"data": described, "splits": [split._asdict() for split in splits]})


# ------------------------------------------------------------------------------------------------------ optimisation


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


# ---------------------------------------------------------------------------------------------------------- figures


def bootstrap_interval(metric, patients, seed=0):
    """[low, high], the 95 % percentile interval of a metric when patients are drawn with replacement.

    metric: gives a number, or None where it is undefined, of (N,) weights of the cases: how often each was drawn
    patients: of each case. Draws in which the metric is undefined are left out; None where all are.
    """
    names, index = np.unique(patients, return_inverse=True)
    rng, values = np.random.default_rng(seed), []
    for _ in range(BOOTSTRAP_ROUNDS):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        value = metric(times[index])
        if value is not None:
            values.append(value)
    return np.percentile(values, [2.5, 97.5]).tolist() if values else None


def mean_and_deviation(records, names):
    """{name: mean}, {name: standard deviation (n - 1)} over the records that have a value; None where too few have."""
    means, deviations = {}, {}
    for name in names:
        values = [record[name] for record in records if record[name] is not None]
        means[name] = float(np.mean(values)) if values else None
        deviations[name] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return means, deviations


def told(value, digits=3):
    return "undefined" if value is None else f"{value:.{digits}f}"


def write_json(path, content):
    """Write JSON under a temporary name until it is whole; NaN is refused."""
    part = Path(path).with_name(Path(path).name + ".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(part, path)


def read_json(path):
    return json.loads(Path(path).read_text())


def write_table(path, header, rows):
    """Write a CSV under a temporary name until it is whole; floats keep all digits."""
    part = Path(path).with_name(Path(path).name + ".part")
    with open(part, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(part, path)


def read_table(path):
    """[{column: text}] of a CSV."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------ fold by fold


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
    state = checkpoint.load_on_all(path, processes)
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
                        worker_init_fn=checkpoint.ignore_signals, pin_memory=processes.device.type == "cuda")
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
        batch = utils.next_batch(batches)
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


def load_best(fold):
    """Give the model its best epoch's weights; returns what `keep_best` knew of it. Raises UserError."""
    def there():  # rank 0 may just have written it
        if not (fold.folder / "best.pth").is_file():
            raise UserError(f"{fold.folder / 'best.pth'}: is missing; remove its folder to train this fold again")
    fold.device.processes.from_main(there)
    state = load_checkpoint(fold.folder / "best.pth")
    fold.model.load_state_dict(state["model"])
    return state["best"]


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


def check_same_run(output_dir, config, fixed):
    """UserError where the first fold's checkpoint is of a run in which one of the `fixed` names had another value.

    For the main process alone.
    """
    checkpoint.load_newest(output_dir / "0" / "checkpoint.pth", {name: config[name] for name in fixed})


def fold_folders(path, name):
    """Folders with a fold's file `name`: `path` itself, or its sub-folders 0, 1, ... in order. Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"--weights {path}: no such folder; expected the --output_dir of a trained run or a fold in it")
    if (path / name).is_file():
        return [path]
    found = sorted((folder for folder in path.iterdir() if folder.name.isdigit() and (folder / name).is_file()),
                   key=lambda folder: int(folder.name))
    if not found:
        raise UserError(f"--weights {path}: holds no trained fold (looked for {name} there and in 0, 1, ...)")
    return found


def load_fold(path, build, script, known_by):
    """(model, its config, what was known of its best epoch) of a fold's best.pth. Raises UserError.

    build: gives the model of (Encoder, config, state dict); known_by: name in the config of `script`'s runs alone
    """
    state = load_checkpoint(path)
    config = state["config"]
    if known_by not in config:
        raise UserError(f"--weights {path}: is no checkpoint of {script}", everywhere=True)
    model = build(Encoder(**{name: config[name] for name in ENCODER}), config, state["model"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"--weights {path}: does not fit {config['arch']} ({reason})", everywhere=True) from error
    return model, config, state["best"]


def start_folder(folder):
    """Make a fold's folder; its results will be new."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)


def is_finished(folder):
    """Whether a fold is trained and tested: its metrics are the last thing that is written."""
    return (folder / "metrics.json").is_file()
