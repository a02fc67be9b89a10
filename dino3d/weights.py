"""Weights from files, ours and others': reading them safely, finding the network that is meant, fitting it to a model.

A file may hold several networks, such as a student and its teacher. A network's path is the keys of the dicts around
its tensors and the prefix of their names: `teacher.backbone`, `state_dict.student_backbone`.
"""

import argparse
import json
import math
import os
import pathlib
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dino3d.command_line import format_values, truncate_list
from dino3d.files import ZIP_START, open_verified
from resnet3d import architecture_of
from vision_transformer import ARCHITECTURES, resize_pos_embed

# Words for the network whose weights are an average of the other's over time, and for that other one
ROLES = {"teacher": {"teacher", "momentum", "ema", "target"}, "student": {"student", "online"}}
# What DDP, torch.compile, FSDP and activation checkpointing put into names
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
CHUNKED_BLOCK = re.compile(r"(?:(?<=\.)|^)blocks\.\d+\.(?=\d+\.)")  # dinov2 writes blocks.<chunk>.<block>.
# In names beside the model's: parts of another ViT's trunk, on which its other weights rely; and what is no such part
TRUNK = {"token", "tokens", "pos", "position", "rope", "embed", "embedding", "embeddings", "bias", "ln", "pre"}
TRUNK |= {"prompt", "prompts"}
NO_TRUNK = {"mask", "masked", "decoder", "predictor", "head", "logit", "logits"}
# What a download leaves instead of a file: how it begins, what it is
NO_CHECKPOINT = {
    b"version h": "it is a pointer of Git LFS: get the file itself (git lfs pull)",
    b"<": "it is a web page: download the file itself",
}
SAFETENSORS_CONFIG = "dino3d_config"  # name in the metadata, whose values are text
DEEPEST = 8  # dicts around a network's tensors
MOST_ENTRIES = 200_000  # of all dicts in a file

# ------------------------------------------------------------------------------------------------------------- reading


def _harmless() -> list[Any]:
    """What besides tensors a checkpoint may hold."""
    allowed = [
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        np._core.multiarray.scalar,
        np._core.multiarray._reconstruct,
        *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
    ]
    # NumPy moved its internals to _core in version 2: older files name them by the older module
    allowed += [
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
        (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    ]
    # Pure paths never touch the disk and exist on every system. Python 3.13 names them by pathlib._local
    for system, kind in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath)):
        for name in (f"{system}Path", f"Pure{system}Path"):
            allowed += [(kind, f"pathlib.{name}"), (kind, f"pathlib._local.{name}")]
    return allowed


def load_config(path: Path | str) -> dict[str, Any] | None:
    """The "config" of a checkpoint, whose tensors are not read; None where there is none, or it can't be read so."""
    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("config")
    except Exception:  # as many kinds as there are damages, which whoever reads all of it tells
        return None
    return config if isinstance(config, dict) else None


def load_file(path: Path | str) -> Any:
    """What torch.save wrote, or `read_safetensors` gives, with nothing in it ever executed.

    Tensors, numbers, text, lists and dicts, and by name argparse.Namespace, NumPy scalars and pathlib's paths, which
    become pure ones. Raises FileNotFoundError, ValueError; the latter also where the file carries a checksum that it
    does not match.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: " + ("is a folder, expected a file" if os.path.isdir(path) else "no such file")
        )
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        for other, reason in NO_CHECKPOINT.items():
            if start.startswith(other) or not start:
                raise ValueError(reason if start else "it is empty")
        # A safetensors file is the length of a JSON header, in 8 bytes, that header, and tensors
        by_name = str(path).lower().endswith(".safetensors") and not start.startswith((ZIP_START, b"\x80"))
        if start[8:] == b"{" or by_name:
            return read_safetensors(path)
        with open_verified(path) as file, torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a strange file, besides raising
            return torch.load(file, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"{path}: can't be read: {package} is not installed (pip install {package})") from error
    except Exception as error:  # zip, pickle and torch raise many kinds for a file that is cut off or something else
        raise ValueError(f"{path}: can't be read as a checkpoint ({refusal(error)})") from error


def read_safetensors(path: Path | str) -> dict[str, Any]:
    """{name: tensor} of a .safetensors file and, where export.py wrote its JSON into the metadata, the "config"."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(path, device="cpu")
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(SAFETENSORS_CONFIG)
    if text is None:
        return tensors
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or "config" in tensors:
        raise ValueError(f"its metadata '{SAFETENSORS_CONFIG}' is not what export.py writes")
    return {**tensors, "config": config}


def refusal(error: Exception) -> str:
    """Why a file was not read, in a few words: torch's own advise to read it unsafely, in bold."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    stands_in_the_way = re.search(r"GLOBAL ([^\s`]+)", text) or (
        re.search(r"(?:got|function) <[a-z -]+ '?([\w.]+)", text)
        if "add_safe_globals" in text or "unrecognized function" in text
        else None
    )
    save_alone = 'save the weights alone: torch.save({"teacher": model.state_dict()}, FILE)'
    if stands_in_the_way:
        return f"it holds a `{printable(stands_in_the_way[1], 100)}`, which could run code when read; {save_alone}"
    if "TorchScript" in text:
        return f"it is a TorchScript archive, which holds code; {save_alone}"
    reason = (text.rpartition("WeightsUnpickler error: ")[2].splitlines() or [""])[0]
    unsafe = ("weights_only", "safe_globals", "trusted")
    sentences = [one for one in reason.split(". ") if not any(word in one for word in unsafe)]
    known = isinstance(error, (OSError, ValueError, RuntimeError)) or type(error).__module__.startswith("safetensors")
    if not known or not any(sentences) or "enforce fail" in text:
        return "it is not what torch.save or safetensors writes, or it is damaged"
    return printable(". ".join(sentences), 200)


def printed_list(names: Iterable[Any]) -> str:
    """Names from a file in a message."""
    return truncate_list([printable(str(name), 60) for name in names]) or "nothing"


def printable(text: str, most: int) -> str:
    """Text from a file as it may stand in a message: in one line, not too long, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:most]


# ------------------------------------------------------------------------------------------------ finding the network


class Network(NamedTuple):
    """A network in a file. path: where it stands; key, prefix: its two parts, of dicts and of names

    tensors: {name without prefix: tensor} of all that stands there; doubled: names that two of the file's became
    """

    key: str
    prefix: str
    tensors: dict[str, Tensor]
    doubled: list[str]

    @property
    def path(self) -> str:
        return ".".join(filter(None, (self.key, self.prefix.rstrip("."))))

    @property
    def origin(self) -> str:
        """In words."""
        parts = [f"{what} '{printable(name, 100)}'" for what, name in zip(("key", "prefix"), self[:2]) if name]
        return ", ".join(parts) or "all of it, names without a prefix"


def find_network(model: nn.Module, checkpoint: Any, path: Path | str, checkpoint_key: str) -> Network:
    """The Network in what `load_file` gave that has the model's names and that the key means.

    checkpoint_key: a Network's path, consecutive parts of it, words in it, or its role: teacher, momentum and ema are
    one, student is the other. A file's only network need not say its role. Raises ValueError.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, expected a checkpoint's dict")
    wanted = model.state_dict()
    groups = named_tensors(checkpoint, path)
    depth = 1 + max(name.count(".") for name in wanted)
    counts = Counter()  # (keys, prefix): how many of the wanted names stand there
    for keys, (tensors, _) in groups.items():
        for name in tensors:
            parts = name.split(".")
            for k in range(max(0, len(parts) - depth), len(parts)):
                if modern_name(".".join(parts[k:]), wanted) in wanted:
                    counts[keys, "".join(part + "." for part in parts[:k])] += 1
    most = max(counts.values(), default=0)
    networks = {
        (keys, prefix): Network(".".join(keys), prefix, {}, [])
        for (keys, prefix), count in counts.items()
        if count == most or 2 * count >= max(most, len(wanted) / 2)
    }
    lengths = {len(prefix) for _, prefix in networks}
    for keys, (tensors, doubled) in groups.items():
        for name, tensor in tensors.items():
            for network in filter(None, (networks.get((keys, name[:n])) for n in lengths if n <= len(name))):
                network.tensors[modern_name(name[len(network.prefix) :], wanted)] = tensor
                network.doubled.extend([name] * (name in doubled))
    if 2 * most < len(wanted):
        require_kind(wanted, [name for tensors, _ in groups.values() for name in tensors], path)
        problem = tensor_misfit(wanted, next(iter(networks.values())).tensors if networks else {})
        names = [".".join((*keys, name)) for keys, (tensors, _) in groups.items() for name in tensors]
        only = f"no tensors, only {printed_list(checkpoint)}" if checkpoint else "nothing"
        held = f"tensors such as {printed_list(names)}" if names else only
        raise ValueError(f"{path}: does not fit the model: {problem}; it has {held}")
    endings = tuple({name.rpartition(".")[2] for name in wanted})
    names = [".".join((*keys, name)) for keys, (tensors, _) in groups.items() for name in tensors]
    # No buffer of an optimizer, say; but what stands in a list, as some keep an average's tensors, has no other name
    names = [name for name in names if name.endswith(endings) or name.rpartition(".")[2].isdecimal()]
    return choose_network(list(networks.values()), names, path, checkpoint_key)


def named_tensors(
    checkpoint: dict[Any, Any], path: Path | str
) -> dict[tuple[str, ...], tuple[dict[str, Tensor], set[str]]]:
    """{keys of the dicts around: ({name: tensor}, names that two tensors have)}, without what wrappers put into names.

    NumPy's arrays become tensors; what stands in a list has its position for a name. Raises ValueError for a file of
    more entries than any checkpoint has.
    """
    found, todo, entries = {}, [((), checkpoint)], 0
    for keys, part in todo:
        entries += len(part)
        if entries > MOST_ENTRIES:
            raise ValueError(f"{path}: has more than {MOST_ENTRIES} entries, which is no checkpoint's")
        tensors, doubled = {}, set()
        for name, value in part.items():
            name = str(name) if isinstance(name, int) else name
            if isinstance(value, (list, tuple)):
                value = {i: one for i, one in enumerate(value) if isinstance(one, (torch.Tensor, np.ndarray, dict))}
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                value = torch.from_numpy(np.ascontiguousarray(value))
            if isinstance(name, str) and isinstance(value, torch.Tensor) and not value.is_nested:
                plain = CHUNKED_BLOCK.sub("blocks.", ".".join(p for p in name.split(".") if p not in WRAPPERS))
                if plain in tensors:
                    doubled.add(plain)
                tensors[plain] = value
            elif isinstance(name, str) and isinstance(value, dict) and len(keys) < DEEPEST:
                todo.append(((*keys, name), value))
        if tensors:
            found[keys] = tensors, doubled
    return found


def words(text: str) -> set[str]:
    """The words of a name, in small letters: `modelEMA`, `EMAModel` and `ema_model` have the same."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def choose_network(networks: list[Network], names: list[str], path: Path | str, checkpoint_key: str) -> Network:
    """The one of a file's networks that the key means. Raises ValueError, naming them, where it means none or several.

    names: of all of the file's tensors that could be weights of a network, with the keys of the dicts and lists around
    """

    def role(text: str) -> str | None:
        return next((role for role, known in ROLES.items() if known & words(text)), None)

    wanted, roles = role(checkpoint_key), {network.path: role(network.path) for network in networks}
    if "teacher" in roles.values():  # what stands beside a teacher without a word is its student
        roles = {name: found or "student" for name, found in roles.items()}
    fits = (
        lambda name: name == checkpoint_key,
        lambda name: f".{checkpoint_key}." in f".{name}.",
        lambda name: words(checkpoint_key) and words(checkpoint_key) <= words(name),
        lambda name: wanted and roles[name] == wanted,
    )
    named = ([network for network in networks if fit(network.path)] for fit in fits)
    meant = next((some for some in named if some), [])
    if not meant and len(networks) == 1:
        # Nothing to choose, if it has no role, and nothing else has the one that was asked for
        only = networks[0]
        asked = wanted and not any(role(name) == wanted for name in names) or not wanted and not only.key
        meant = networks if roles[only.path] is None and asked else []
    if len(meant) == 1:
        return meant[0]
    shown = sorted((network.path for network in meant or networks), key=lambda name: roles[name] != "teacher")
    shown = [printable(name, 100) or "''" for name in shown]
    raise ValueError(
        f"{path}: "
        + (f"'{checkpoint_key}' means {len(meant)} networks in it, " if meant else f"has no '{checkpoint_key}', only ")
        + f"{truncate_list(shown)}; name one, such as --checkpoint_key {shown[0]}"
    )


def modern_name(name: str, wanted: Mapping[str, Any]) -> str:
    """A name of weight normalisation before torch's parametrizations (weight_g, weight_v) as the model has it."""
    new = name.replace("weight_g", "parametrizations.weight.original0").replace(
        "weight_v", "parametrizations.weight.original1"
    )
    return new if new in wanted else name


# ------------------------------------------------------------------------------------------------ fitting it to a model


def load_pretrained_weights(model: nn.Module, path: Path | str, checkpoint_key: str = "teacher") -> None:
    """Load a network of a file into `model`, whatever wrapper prefixes (module., backbone., ...) its names carry.

    path: what `load_file` reads; checkpoint_key: see `find_network`. Every tensor of the model must be there with its
    shape; tensors of the file beyond the model's modules (a projection head) are left alone. A position embedding of
    another grid is interpolated where the file's config says its input size, with a warning. Raises FileNotFoundError,
    and ValueError naming the tensors that don't fit.
    """
    checkpoint = load_file(path)
    for notice in fit_network(model, find_network(model, checkpoint, path, checkpoint_key), checkpoint, path):
        warnings.warn(notice, stacklevel=2)


def fit_network(model: nn.Module, network: Network, checkpoint: dict[str, Any], path: Path | str) -> list[str]:
    """Load a Network of a checkpoint into the model, in the model's own precision; returns notices. Raises ValueError,
    with the model as it was, naming what does not fit."""
    wanted, found = model.state_dict(), dict(network.tensors)
    if network.doubled:
        raise ValueError(f"{path}: has two tensors each that could be {truncate_list(network.doubled)}")
    notices = fit_pos_embed(model, found, checkpoint, path)
    for name, module in model.named_modules():
        if hasattr(module, "adapt_weights"):
            notices += [f"{path}: {one}" for one in module.adapt_weights(found, name + "." if name else "")]
    modules = {name.partition(".")[0] for name in wanted if "." in name}
    beyond = [
        name
        for name in found
        if name not in wanted and (name.partition(".")[0] in modules or is_of_trunk(name.partition(".")[0]))
    ]
    problem = tensor_misfit(wanted, found) or (f"with the unknown {printed_list(beyond)}" if beyond else "")
    if not problem:
        other = [
            f"{name} of {str(found[name].dtype).removeprefix('torch.')}"
            for name in wanted
            if wanted[name].is_floating_point() != found[name].is_floating_point()
        ]
        problem = f"with {truncate_list(other)}" if other else ""
    if not problem:
        try:
            state = {name: torch.empty_like(tensor).copy_(found[name]) for name, tensor in wanted.items()}
            broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
            problem = f"with values that are not finite (NaN) in {truncate_list(broken)}" if broken else ""
        except RuntimeError as error:  # sparse, or without storage: there are many kinds of tensors that don't copy
            problem = refusal(error)
    if problem:
        require_kind(wanted, found, path)
        raise ValueError(f"{path}: does not fit the model: {problem}")
    model.load_state_dict(state)
    return notices


def require_kind(wanted: Iterable[str], found: Iterable[str], path: Path | str) -> None:
    """ValueError where names of parameters tell that a file's network is another kind of encoder than the model."""
    names = (kind_of_encoder(list(wanted)), kind_of_encoder(list(found)))
    if None not in names and names[0] != names[1]:
        raise ValueError(f"{path}: does not fit the model: it has the weights of {names[1]}, the model is {names[0]}")


def kind_of_encoder(names: Collection[str]) -> str | None:
    """What names of parameters tell of an encoder: an architecture, "a vision transformer", or None."""
    transformer = any(name.endswith("patch_embed.proj.weight") for name in names)
    return "a vision transformer" if transformer else architecture_of(names)


def architecture_in(checkpoint: Any, path: Path | str) -> str | None:
    """The architecture that the names in a checkpoint tell, if they do: a ResNet's, not a ViT's. Raises ValueError."""
    groups = named_tensors(checkpoint, path) if isinstance(checkpoint, dict) else {}
    found = kind_of_encoder([name for tensors, _ in groups.values() for name in tensors])
    return found if found in ARCHITECTURES else None


def is_of_trunk(name: str) -> bool:
    """Whether a module or parameter that the model lacks is what another ViT's blocks rely on, by its name."""
    return bool(words(name) & TRUNK) and not words(name) & NO_TRUNK


def fit_pos_embed(
    model: nn.Module, found: dict[str, Tensor], checkpoint: dict[str, Any], path: Path | str
) -> list[str]:
    """Bring the position embeddings among `found`, in place, to the model's grids; returns notices. Raises ValueError.

    Numbers of tokens don't tell grids apart: (4, 2, 1) holds as many as (2, 4, 1).
    """
    notices = []
    for name in [name for name in model.state_dict() if name.rpartition(".")[2] == "pos_embed" and name in found]:
        owner, old = model.get_submodule(name.rpartition(".")[0]), found[name]
        projection = found.get(name.removesuffix("pos_embed") + "patch_embed.proj.weight")
        if not hasattr(owner, "grid_size") or tuple(getattr(projection, "shape", ())[2:]) not in ((), owner.patch_size):
            continue  # another ViT, or other patches: a misfit that is told
        grid, patch, size = owner.grid_size, owner.patch_size, trained_input_size(checkpoint)
        shown, new = (" x ".join(map(str, one)) for one in (grid, owner.img_size))
        if old.ndim != 3 or old.shape[2] != owner.embed_dim or not old.is_floating_point():
            continue  # a misfit of another kind, which is told
        if size is None:
            if old.shape[1] != owner.pos_embed.shape[1]:
                raise ValueError(
                    f"{path}: does not fit the model: with {name} {tuple(old.shape)} instead of "
                    f"{tuple(owner.pos_embed.shape)}; it is only interpolated where the file's config says the "
                    "input_size that it was trained on: give that as --input_size"
                )
            notices.append(
                f"{path} does not say its input size: its position embedding is taken as one of {shown} patches"
            )
            continue
        trained = tuple(n // p for n, p in zip(size, patch))
        if 1 + math.prod(trained) != old.shape[1] or any(n % p for n, p in zip(size, patch)):
            raise ValueError(
                f"{path}: does not fit the model: with {name} {tuple(old.shape)}, where its config says an input of "
                f"{format_values(size)} voxels, with patches of {format_values(patch)}"
            )
        if trained != grid:
            found[name] = resize_pos_embed(old.to(owner.pos_embed.dtype), trained, grid)
            notices.append(
                f"{path} was trained on {' x '.join(map(str, size))} voxels, this is {new}: its position embedding is "
                f"interpolated (trilinear) from {' x '.join(map(str, trained))} patches to {shown}"
            )
    return notices


def trained_input_size(checkpoint: dict[str, Any]) -> tuple[int, ...] | None:
    """(3,) voxels that a checkpoint's config, or older code's args, says that it was trained on."""
    config = config_of(checkpoint)
    size = config.get("input_size") if isinstance(config, dict) else None
    sound = isinstance(size, (list, tuple)) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)
    return tuple(size) if sound else None


def crc32_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of tensors as they stand in a file, names and bytes: tells other weights under the same path."""
    value = 0
    for name in sorted(tensors):
        content = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content, zlib.crc32(name.encode(errors="surrogateescape"), value))
    return f"{value:08x}"


def config_of(checkpoint: Any) -> Any:
    """The config in a checkpoint, or older code's args: a dict, unless the file is a strange one."""
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    config = next((checkpoint[name] for name in ("config", "args") if checkpoint.get(name) is not None), {})
    return vars(config) if isinstance(config, argparse.Namespace) else config


def tensor_misfit(wanted: Mapping[str, Tensor], found: Mapping[str, Any], others: bool = False) -> str:
    """Why the tensors `found` can't take the place of those `wanted`, {name: tensor}, in a few words, or "".

    others: whether tensors beyond those wanted are a reason too
    """

    def shape(value: Any) -> tuple[int, ...] | str:
        return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__

    missing = [name for name in wanted if name not in found]
    shapes = [
        f"{name} {shape(found[name])} instead of {shape(wanted[name])}"
        for name in wanted
        if name in found and shape(found[name]) != shape(wanted[name])
    ]
    beyond = [str(name) for name in found if others and name not in wanted]
    return "; ".join(
        word + truncate_list(names)
        for word, names in (("without ", missing), ("with ", shapes), ("with the unknown ", beyond))
        if names
    )
