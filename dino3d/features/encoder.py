"""The pre-trained encoder: what to build it with, from a checkpoint and flags."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dino3d.command_line import UserError, format_values, truncate_list
from dino3d.features.pooling import POOLS, pool_of
from dino3d.files import read_json, read_log
from dino3d.weights import architecture_in, config_of, crc32_of_tensors, find_network, fit_network, load_file
from vision_transformer import ARCHITECTURES, Encoder, build_encoder, has_setting

# Where neither a flag nor the checkpoint's config says; patch_size: of an architecture that has one
ENCODER = {
    "arch": "vit_small",
    "patch_size": [12, 12, 6],
    "input_size": [96, 96, 48],
    "clip_range": [-1000.0, 1000.0],
    "spacing": None,
}


class PretrainedEncoder(NamedTuple):
    """A pre-trained encoder: what to build it with, its weights (None: from scratch), and what to tell of them.

    patch_size: None for an architecture without patches
    crc32: of the weights in their file; "" without
    crop_spacing: (3,) mm of the crops that a fine-tuned one was trained on, where its file says so and they had one
    """

    arch: str
    patch_size: list[int] | None
    input_size: list[int]
    clip_range: list[float]
    spacing: list[float] | None
    state: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()
    crc32: str = ""
    crop_spacing: list[float] | None = None

    def build(self, drop_path_rate: float | None = None) -> Encoder:
        """A new one with these weights, or random ones. Raises UserError for a drop_path_rate that it has not."""
        if drop_path_rate and not has_setting(self.arch, "drop_path_rate"):
            raise UserError(lacks_setting("drop_path_rate", drop_path_rate, self.arch), everywhere=True)
        encoder = build_encoder(self.arch, self.input_size, self.patch_size, drop_path_rate or None)
        if self.state is not None:
            encoder.load_state_dict(self.state)
        return encoder

    def outline(self) -> Encoder:
        """One without values, for its sizes."""
        with torch.device("meta"):
            return build_encoder(self.arch, self.input_size, self.patch_size)

    @property
    def working_spacing(self) -> list[float] | None:
        """(3,) mm of what it is to see: of the crops that it was fine-tuned on, else of its pre-training."""
        return self.crop_spacing or self.spacing

    def settings(self) -> dict[str, Any]:
        """{name: value} of all but the weights."""
        return {name: getattr(self, name) for name in ENCODER}


CHECKPOINT, BEST = "checkpoint.pth", "best.pth"  # newest state of a run, best epoch of a fold
SPLITS, FOLD_METRICS = "splits.json", "metrics.json"  # a run's first file; a fold's last one
LOG = "log.txt"  # of a fold: a line for each of its epochs


class TrainedFolds(NamedTuple):
    """files: best.pth of a run's finished folds, in order; left_out: why the other folds are not among them, or ""."""

    files: list[Path]
    left_out: str


def is_finished(folder: Path) -> bool:
    """Whether a fold is trained and tested: its metrics are the last thing that is written."""
    return (folder / FOLD_METRICS).is_file()


def epochs_of(folder: Path) -> int:
    """Epochs that a fold has been trained for, by its log; 0 where that does not tell."""
    with contextlib.suppress(OSError):
        return max((one["epoch"] for one in read_log(folder / LOG) if isinstance(one.get("epoch"), int)), default=0)
    return 0


def trained_folds(folder: Path, flag: str) -> TrainedFolds:
    """The TrainedFolds of a run's folds 0, 1, ..., of which its splits.json tells how many there are to be.

    One of fewer epochs than another, which a start with more --epochs has not come to, is not finished. A folder of
    nothing but best.pth files, as one copies them to another machine, does not tell what is finished: all are taken.
    Raises UserError, with the flag that names the folder, where folds were begun and none is finished.
    """
    found = [one for one in folder.glob(f"*/{BEST}") if one.parent.name.isdecimal() and one.is_file()]
    files = dict(sorted((int(one.parent.name), one) for one in found))
    finished = {fold: file for fold, file in files.items() if is_finished(file.parent)}
    if not finished and not (folder / SPLITS).is_file():
        return TrainedFolds(list(files.values()), "")
    planned = 0
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # a damaged one doesn't tell
        planned = len(read_json(folder / SPLITS)["splits"])
    epochs = {fold: epochs_of(file.parent) for fold, file in files.items()}
    longest = max(epochs, key=epochs.get, default=None)
    shorter = {fold for fold in finished if 0 < epochs[fold] < epochs[longest]}
    finished = {fold: file for fold, file in finished.items() if fold not in shorter}
    others = {}  # {why: folds}
    for fold in sorted({*range(planned), *files} - {*finished}):
        here = folder / str(fold)
        if fold in shorter:
            reason = f"of {epochs[fold]} epochs, where fold {longest} has {epochs[longest]}"
        else:
            reason = "not begun" if not here.is_dir() else "without " + BEST if is_finished(here) else "not finished"
        others.setdefault(reason, []).append(fold)
    left_out = "; ".join(
        f"fold{'s' * (len(folds) > 1)} {truncate_list(list(map(str, folds)), 8)} {reason}"
        for reason, folds in others.items()
    )
    if not finished:
        now = f", or give a fold's best epoch so far, such as {next(iter(files.values()))}" if files else ""
        raise UserError(
            f"{flag} {folder}: no fold is finished ({left_out}): start its training command again, which resumes{now}",
            everywhere=True,
        )
    return TrainedFolds(list(finished.values()), left_out)


def find_weights(path: str, flag: str = "--pretrained_weights") -> tuple[str, tuple[str, ...]]:
    """(file, lines on which it is) of weights: a file; the output folder of a pre-training run, whose newest state is
    taken; of a fold of a fine-tuned run, its best epoch; or of such a run, its first fold.

    flag: that the path is of. Raises UserError where nothing is there, or what could mean two.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not folder.exists():
            raise UserError(
                f"{flag} {path}: no such file; expected a checkpoint, or the output folder of a run", everywhere=True
            )
        return path, ()
    if (folder / BEST).is_file():
        return str(folder / BEST), ()
    folds, left_out = trained_folds(folder, flag)
    newest = (folder / CHECKPOINT).is_file()
    if folds and newest:
        raise UserError(
            f"{flag} {path}: holds both a pre-training run ({CHECKPOINT}) and a fine-tuned one "
            f"({folds[0].relative_to(folder)}): give the file itself",
            everywhere=True,
        )
    if newest:
        return str(folder / CHECKPOINT), ()
    if folds:
        others = f", the first of {len(folds)} folds; another one: {folds[1].parent}" if len(folds) > 1 else ""
        told = f"; left out: {left_out}" if left_out else ""
        return str(folds[0]), (f"{flag} {path}: taken is {folds[0]}{others}{told}",)
    raise UserError(
        f"{flag} {path}: holds no checkpoint; expected {CHECKPOINT} of a pre-training run, {BEST} of a fold, or folds "
        f"0, 1, ... with {BEST}",
        everywhere=True,
    )


def load_encoder(
    path: str, checkpoint_key: str = "teacher", given: dict[str, Any] | None = None, flag: str = "--pretrained_weights"
) -> PretrainedEncoder:
    """The PretrainedEncoder of a checkpoint; without `path` one with random weights.

    path: see `find_weights`; checkpoint_key: see `weights.find_network`; flag: that the path is of
    given: {name: value or None} for the names of ENCODER, from flags; None: as the checkpoint's config says. With
    another input_size the position embedding is interpolated.
    Raises UserError for a file that is missing, broken or of another architecture, and for other flags that contradict
    it.
    """
    config, given, notices, has_flags = {}, given or dict.fromkeys(ENCODER), (), given is not None
    if path:
        path, notices = find_weights(path, flag)
        try:
            checkpoint = load_file(path)
            named = architecture_in(checkpoint, path)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{flag} {error}", everywhere=True) from error
        config = encoder_config(checkpoint, path, flag)
        if named and not config.get("arch"):
            config = config | {"arch": named}
            notices += (f"{path} does not say its architecture: by its tensors' names it is a {named}",)
    chosen = {}
    for name, default in ENCODER.items():
        trained = config.get(name)
        trained = list(trained) if isinstance(trained, tuple) else trained
        if None not in (trained, given[name]) and trained != given[name] and name != "input_size":
            raise UserError(
                f"--{name} {format_values(given[name])} contradicts {flag} {path}, which has "
                f"{format_values(trained)}: leave --{name} out",
                everywhere=True,
            )
        chosen[name] = next((value for value in (given[name], trained) if value is not None), default)
    if not has_setting(chosen["arch"], "patch_size"):
        if given["patch_size"] is not None:
            raise UserError(lacks_setting("patch_size", given["patch_size"], chosen["arch"]), everywhere=True)
        chosen["patch_size"] = None
    elif any(n % p for n, p in zip(chosen["input_size"], chosen["patch_size"])):
        source = f"{flag} {path}: " if path else ""
        raise UserError(
            f"{source}an input of {format_values(chosen['input_size'])} voxels is not a multiple of the patch size "
            f"{format_values(chosen['patch_size'])} along each axis: give other --input_size or --patch_size",
            everywhere=True,
        )
    encoder = PretrainedEncoder(**chosen)
    if not path:
        return encoder
    model = encoder.build()
    try:
        network = find_network(model, checkpoint, path, checkpoint_key)
        fitted = fit_network(model, network, checkpoint, path)
    except ValueError as error:
        hint = f"; is --arch {encoder.arch} right?" if has_flags else ""
        if not has_flags and not config.get("arch"):
            hint = f"; it does not say its architecture, and {encoder.arch} was taken: see docs/features.md"
        raise UserError(f"{flag} {error}{hint if 'does not fit' in str(error) else ''}", everywhere=True) from error
    notices = (*notices, f"weights of {path}: {network.origin}", *fitted)
    if not has_flags and not config.get("clip_range"):
        notices += (f"{path} does not say its clip range: HU {format_values(encoder.clip_range)} become 0 and 1",)
    crc32 = crc32_of_tensors({name: network.tensors[name] for name in model.state_dict() if name in network.tensors})
    if not has_flags and (pool := pool_of(config)) != "cls":
        notices += (f"{path} was fine-tuned with --pool {pool}: what that reads was trained, not the class token",)
    crop_spacing = None if config.get("crop_spacings_differ") else config.get("crop_spacing")
    return encoder._replace(state=model.state_dict(), notices=notices, crc32=crc32, crop_spacing=crop_spacing)


def domain_changes(checkpoint: dict[str, Any], path: str, domain: Mapping[str, Any]) -> list[str]:
    """Lines on what a checkpoint's config says that its network was trained on and a run that starts from it is not.

    domain: {name of the config: the run's value}
    """

    def typed(value: Any) -> str:
        return "none" if value is None else format_values(value)

    try:
        config = encoder_config(checkpoint, path)
    except UserError:  # a config of something else, which says nothing of these
        return []
    return [
        f"{path} was trained with --{name} {typed(config[name])}, this run has {typed(value)}: a change of what its "
        "weights see; give the same, unless that is meant"
        for name, value in domain.items()
        if name in config and (config[name] and list(config[name])) != (value and list(value))
    ]


def lacks_setting(name: str, value: Any, arch: str) -> str:
    """What to say of a flag for something that an architecture has not."""
    return f"--{name} {format_values(value)}: {arch} has none; leave it out"


def encoder_config(checkpoint: dict[str, Any], path: str, flag: str = "--pretrained_weights") -> dict[str, Any]:
    """What the config in a checkpoint says, or older code's args. Raises UserError for what no encoder can have."""
    config = config_of(checkpoint)
    if not isinstance(config, dict):
        raise UserError(f"{flag} {path}: its config is a {type(config).__name__}, expected a dict", everywhere=True)

    def numbers(value: Any, count: int, low: float, high: float, kinds: tuple[type, ...] = (int, float)) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) == count
            and all(type(number) in kinds and low <= number <= high for number in value)
        )

    sound = {
        "arch": lambda value: isinstance(value, str) and value in ARCHITECTURES,
        "patch_size": lambda value: numbers(value, 3, 1, 4096, (int,)),
        "input_size": lambda value: numbers(value, 3, 1, 4096, (int,)),
        "clip_range": lambda value: numbers(value, 2, -1e6, 1e6) and value[0] < value[1],
        "spacing": lambda value: numbers(value, 3, 1e-6, 1e6),
        "pool": lambda value: value in POOLS,
        "crop_spacing": lambda value: numbers(value, 3, 1e-6, 1e6),
    }
    for name, fits in sound.items():
        if config.get(name) is not None and not fits(config[name]):
            found = " ".join(repr(config[name]).split())[:100]
            raise UserError(
                f"{flag} {path}: its config has {name} {found}, which no encoder here can have", everywhere=True
            )
    return config
