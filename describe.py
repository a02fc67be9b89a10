"""What a checkpoint is: how far it was trained, on what, how to feed it, whom it has seen. Nothing is written.

    python describe.py --weights /path/to/output
    python describe.py --weights checkpoint.pth --cases /path/to/lnc_luna16/data

What the file itself does not hold is looked up in the folder of its run: config.json, log.txt, the list of volumes,
splits.json. A copy that lies elsewhere is told without them.
"""

import dino3d.openmp  # noqa: F401  before torch is loaded

# isort: split

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import utils
from dino3d import command_line
from dino3d.command_line import UserError, format_values, truncate_list
from dino3d.data.conventions import is_kind, stem
from dino3d.features.cases import find_subjects
from dino3d.features.encoder import (
    ENCODER,
    FOLD_METRICS,
    LOG,
    SPLITS,
    PretrainedEncoder,
    encoder_config,
    find_weights,
    load_encoder,
)
from dino3d.features.pooling import pool_of
from dino3d.files import CHECKSUM, CHECKSUM_BYTES, read_json, read_log, read_rows
from dino3d.training.collapse import ENOUGH_VIEWS, collapse_warning
from dino3d.weights import load_config, load_file, named_tensors
from vision_transformer import ARCHITECTURES

RUN_CONFIG, VOLUME_LISTS = "config.json", "data_list*.txt"  # of a run
SCRIPT_BY = {"protocol": "main_lnc_luna16.py", "decoder": "main_lts_msd.py", "momentum_teacher": "main_dino.py"}
FOLD_SIDES = ("train", "validation", "test")
SHOWN_FIGURES = ("kl", "teacher_entropy_share", "effective_rank", "mutual_information")
SHOWN_FIGURES += ("winning_prototypes", "lr", "skipped_steps", "bad_files")
SHOWN_SCORES = ("auc", "accuracy", "brier", "dice", "surface_dice", "loss")
LOGISTIC_AUC = "probe_logistic_auc"
SHOWN_PROBES = 10
MOST_SHOWN = 8  # names in a line
TIME_FOLDER = re.compile(r"t\d+")  # folders of a patient's scans in the layout of pre-training


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="describe.py",
        usage="describe.py --weights FILE|DIR [--cases PATH]",
        description="What a checkpoint is, how far it was trained, on what, how to feed it, whom it has seen.",
    )
    group = parser.add_argument_group("flags")
    group.add_argument(
        "--weights",
        required=True,
        metavar="FILE|DIR",
        help="checkpoint (.pth or .safetensors, ours or others'), or the --output_dir of a run, or a fold in it",
    )
    group.add_argument(
        "--cases",
        default=None,
        metavar="PATH",
        help="folder, list or table of what you want to test on, as extract_features.py reads it: tells which of these "
        "patients the weights have seen, by their names",
    )
    command_line.help_flags(group)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    path, lines = find_weights(args.weights, "--weights")
    file = Path(path)
    try:
        checkpoint = load_file(file)
        groups = named_tensors(checkpoint, path) if isinstance(checkpoint, dict) else {}
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--weights {error}") from error
    config = encoder_config(checkpoint, path, "--weights")
    script = next((name for key, name in SCRIPT_BY.items() if key in config), None)
    networks, problems = load_networks(path)
    seen = seen_names(file, config)
    show(
        [
            *(("file", line) for line in lines),
            *about_file(file, checkpoint, script),
            *(about_networks(networks, config) if networks else about_tensors(groups)),
            *problems,
            *about_training(file, checkpoint, config, script),
            *(about_code(file, config, script) if script else []),
            *about_seen(seen),
            *(about_cases(args.cases, seen) if args.cases else []),
            *about_flags(config),
        ]
    )
    if not networks:
        raise UserError(f"--weights {path}: no network in it loads, for what stands above")


def show(facts: Sequence[tuple[str, str]]) -> None:
    """Lines of a heading and a text; a heading stands once."""
    width, before = max(len(name) for name, _ in facts), ""
    for name, text in facts:
        print(f"{'' if name == before else name:{width}}  {text}")
        before = name


# ------------------------------------------------------------------------------------------------ what the file holds


def about_file(file: Path, checkpoint: Mapping[str, Any], script: str | None) -> list[tuple[str, str]]:
    """What it is, and whether it is whole: `load_file` has read it, and refuses what is cut off or damaged."""
    size, written = file.stat().st_size, time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
    with open(file, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        content.seek(max(0, size - CHECKSUM_BYTES))
        whole = "whole: it matches its checksum" if content.read().startswith(CHECKSUM) else ""
    beside = file.with_suffix(".json")  # of an export
    exported = read_beside(beside)
    wanted = None
    with contextlib.suppress(LookupError, TypeError):  # there is none, or it is another program's
        wanted = exported["files"][file.name]["sha256"]
    if wanted not in (None, sha256):
        raise UserError(f"--weights {file}: its SHA-256 is {sha256}, {beside} says {wanted}: damaged, or another file")
    if wanted:
        whole = f"whole: {beside} has its SHA-256"
    if "probe" in checkpoint:
        what = "the teacher of a run's best probe"
    elif script:
        best = "the best epoch of a fold" if "best" in checkpoint else "weights of a run"
        what = "the whole state of a run" if "optimizer" in checkpoint else best
    elif wanted:
        what = f"an export by revision {exported.get('git_revision')}"
        if origins := exported.get("weights_from"):  # older ones do not say it
            what += " of " + "; ".join(", ".join(f"{name} {value}" for name, value in one.items()) for one in origins)
    else:
        what = "weights alone: the file does not say what trained them"
    return [
        ("file", f"{file}: {size / 1e6:.1f} MB, written {written}"),
        ("file", whole or "read to its end; it has no checksum to compare with"),
        ("file", f"SHA-256 {sha256}"),
        ("what", what + f", of {script}" * bool(script)),
    ]


def load_networks(path: str) -> tuple[dict[str, PretrainedEncoder], list[tuple[str, str]]]:
    """({role: encoder}, why others are not loaded): what each --checkpoint_key gives, one where both give the same."""
    found, problems = {}, []
    for key in ("teacher", "student"):
        try:
            found[key] = load_encoder(path, key, flag="--weights")
        except UserError as error:
            problems.append((key, f"is not loaded: {str(error).removeprefix(f'--weights {path}: ')}"))
    if len(found) == 2 and found["teacher"].crc32 == found["student"].crc32:
        found = {"network": found["teacher"]}
    return found, problems


def about_networks(networks: Mapping[str, PretrainedEncoder], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What loads, and how it is fed."""
    facts, encoder = [], next(iter(networks.values()))
    for role, one in networks.items():
        origin = next(line for line in one.notices if line.startswith("weights of")).rpartition(": ")[2]
        taken = "; taken where no --checkpoint_key is given" * (role == "teacher" and len(networks) > 1)
        facts.append((role, f"{origin}; CRC-32 {one.crc32}{taken}"))
    model, spacing = encoder.outline(), encoder.working_spacing
    parameters = sum(tensor.numel() for tensor in model.parameters())
    patches = f", patches of {format_values(encoder.patch_size)}" if encoder.patch_size else ""
    facts += [
        ("encoder", f"{encoder.arch}, {parameters:,} parameters, {model.embed_dim} features{patches}"),
        ("input", f"(B, 1, X, Y, Z) in RAS, {format_values(encoder.input_size)} voxels"),
        ("input", f"{format_values(spacing)} mm per voxel" if spacing else "at any spacing: each scan's own"),
        ("input", f"HU {format_values(encoder.clip_range)} become 0 and 1; what lies beyond is clipped"),
    ]
    if spacing != encoder.spacing and encoder.spacing:
        facts.append(("input", f"pre-trained at {format_values(encoder.spacing)} mm, fine-tuned on crops as above"))
    unsaid = [name for name in ENCODER if name not in config and getattr(encoder, name) is not None]
    if unsaid or "spacing" not in config:
        names = ", ".join(dict.fromkeys([*unsaid, *["spacing"] * ("spacing" not in config)]))
        facts.append(("input", f"taken for granted, as the file does not say it: {names} (see docs/features.md)"))
    if (pool := pool_of(config)) != "cls":
        facts.append(("encoder", f"its head reads --pool {pool}"))
    load = 'torch.hub.load(CHECKOUT, "encoder", source="local", weights=FILE), an encoder in evaluation mode'
    return [*sorted(facts, key=lambda fact: fact[0] == "input"), ("load", load)]


def about_tensors(groups: Mapping[tuple[str, ...], tuple[Mapping[str, Tensor], Any]]) -> list[tuple[str, str]]:
    """What the names and shapes of tensors tell of a vision transformer that the file's config does not fit."""
    facts = []
    for keys, (tensors, _) in groups.items():
        for name, tensor in tensors.items():
            prefix = name.removesuffix("patch_embed.proj.weight")
            if prefix == name or tensor.ndim != 5:
                continue
            blocks = {
                other.removeprefix(prefix).split(".")[1] for other in tensors if other.startswith(prefix + "blocks.")
            }
            alike = [
                arch
                for arch, build in ARCHITECTURES.items()
                if getattr(build, "keywords", {}).get("embed_dim") == len(tensor)
                and build.keywords["depth"] == len(blocks)
            ]
            shape = format_values(tensor.shape[2:])
            where = ".".join((*keys, prefix)).rstrip(".") or "all of it"
            told = f"{len(tensor)} features, {len(blocks)} blocks, patches of {shape}"
            told += f": a {' or '.join(alike)}, which the config does not say" if alike else ": no architecture of ours"
            facts.append(("tensors", f"{where}: {told}"))
    return facts


# ----------------------------------------------------------------------------------------------- what its folder holds


def read_beside(path: Path) -> dict[str, Any]:
    """The JSON in a run's folder, {} where it is not there. Raises UserError where it can't be read."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read ({error})") from error
    return found if isinstance(found, dict) else {}


def about_training(
    file: Path, checkpoint: Mapping[str, Any], config: Mapping[str, Any], script: str | None
) -> list[tuple[str, str]]:
    """How far it had come, and what is known of how good it is."""
    if script is None:
        return []
    return (about_fold if "best" in checkpoint else about_pretraining)(file, checkpoint, config)


def about_pretraining(file: Path, checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a checkpoint and, up to its step, the log beside it say; that of an older version may lack figures."""
    step, samples = checkpoint.get("step"), checkpoint.get("samples")
    done = f"{checkpoint.get('epoch')} of {config.get('epochs')} epochs, {step} steps"
    done += f", {samples:,} samples" if samples else ""
    facts, log = [("trained", done)], file.parent / LOG
    records = [one for one in read_log(log) if one["step"] <= (step or 0)] if log.is_file() else []
    if not records:
        return [*facts, ("figures", f"not known: {log} is not there, or of later steps")]
    last = records[-1]
    first_rank = max(one.get("effective_rank_first_steps", 0.0) for one in records)
    shown = ", ".join(f"{name} {last[name]:.4g}" for name in SHOWN_FIGURES if isinstance(last.get(name), (int, float)))
    facts.append(("figures", f"epoch {last['epoch']}: {shown}; effective_rank at first {first_rank:.4g}"))
    if {"teacher_entropy", "kl", "winning_prototypes", "effective_rank"} <= last.keys():
        warning = collapse_warning(
            last["teacher_entropy"],
            last["kl"],
            last["winning_prototypes"],
            config["out_dim"],
            ENOUGH_VIEWS,
            last["effective_rank"],
            first_rank,
            config.get("centering") == "sinkhorn",
        )
        facts.append(("figures", warning or "no sign of collapse; what the features are worth, only labels tell"))
    probed = [one for one in records if isinstance(one.get(LOGISTIC_AUC), float)]
    if probed:
        curve = [f"{one[LOGISTIC_AUC]:.3f} after epoch {one['epoch']}" for one in probed[-SHOWN_PROBES:]]
        start = probed[-1].get("probe_start_logistic_auc")
        before = f"{start:.3f} before training, " if isinstance(start, float) else ""
        facts.append(("probe", f"AUC by logistic regression {before}{', '.join(curve)}"))
        facts.append(("probe", f"on the crops below {config.get('probe_dir')}, which chose best_probe.pth"))
    return facts


def about_fold(file: Path, checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Validation and test of a fold, and the weights that it began from."""
    best, tested = checkpoint["best"] or {}, read_beside(file.parent / FOLD_METRICS)
    validation = ", ".join(f"{name} {best[name]:.4g}" for name in SHOWN_SCORES if isinstance(best.get(name), float))
    test = ", ".join(f"{name} {tested[name]:.4g}" for name in SHOWN_SCORES if isinstance(tested.get(name), float))
    start = config.get("pretrained_weights")
    return [
        ("trained", f"fold {file.parent.name}: best epoch {best.get('epoch')} of {config.get('epochs')}"),
        ("trained", f"from {start}, CRC-32 {config.get('weights_crc32')}" if start else "from random weights"),
        ("figures", f"validation: {validation or 'none'}"),
        ("figures", f"test: {test}" if test else "test: none, its training has not ended"),
    ]


def about_code(file: Path, config: Mapping[str, Any], script: str) -> list[tuple[str, str]]:
    """The code and the machine, by the run's config.json, which each start writes anew."""
    path = (file.parent if script == "main_dino.py" else file.absolute().parent.parent) / RUN_CONFIG
    beside = read_beside(path)
    if not beside:
        return [("code", f"not known: no {path}")]
    versions, arguments = beside.get("versions", {}), beside.get("arguments", {})
    named = ", ".join(f"{name} {versions.get(name)}" for name in ("dino3d", "torch", "numpy"))
    facts = [
        ("code", f"revision {beside.get('git_revision')}; {named}; {beside.get('world_size')} x {beside.get('device')}")
    ]
    other = [name for name in arguments if name in config and arguments[name] != json.loads(json.dumps(config[name]))]
    if other:
        facts.append(("code", f"{path} is of another start than this file: other {truncate_list(other, MOST_SHOWN)}"))
    return facts


def about_flags(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that the file says of how it was made."""
    given = {name: value for name, value in config.items() if value not in (None, "") and name != "weights_from"}
    text = " ".join(f"--{name} {format_values(value)}" for name, value in given.items())
    return [("flags", text)] if given else []


# ----------------------------------------------------------------------------------------------------- whom it has seen


SeenNames = list[tuple[str, set[str]]]  # (what for, names of patients and files; none: not known)


def seen_names(file: Path, config: Mapping[str, Any]) -> SeenNames:
    """Whom weights have seen, and whom those that they began from."""
    folder, start = file.absolute().parent, config.get("pretrained_weights")
    if folder.name.isdecimal() and (folder.parent / SPLITS).is_file():
        try:
            of_fold = read_beside(folder.parent / SPLITS)["splits"][int(folder.name)]
            seen = [(f"fold {folder.name}, {side}", set(of_fold[side])) for side in FOLD_SIDES]
        except (LookupError, TypeError) as error:
            raise UserError(f"{folder.parent / SPLITS}: does not say who is in fold {folder.name}") from error
    else:
        lists = [Path(config["data_list"])] if config.get("data_list") else sorted(folder.glob(VOLUME_LISTS))
        seen = [("pre-training", set().union(*(names_in(one) for one in lists if one.is_file())))]
    if not start or Path(start).absolute() in (folder, file.absolute()):
        return seen
    if not Path(start).exists():
        return [*seen, (f"{start}, which it began from", set())]
    start = Path(find_weights(start, "--pretrained_weights")[0])
    return seen + [(f"{start}: {one}", names) for one, names in seen_names(start, load_config(start) or {})]


def names_in(table: Path) -> set[str]:
    """Names of the patients and files in a list of volumes: a file's, and that of its folder, or of the one above t<k>,
    as the layout of pre-training has it."""
    if is_kind(table, (".csv", ".tsv")):
        rows = [(row["path"], row.get("patient")) for _, row in read_rows(table, ["path"], ["patient"])]
    else:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        rows = [(line.strip(), "") for line in lines if line.strip() and not line.startswith("#")]
    found = set()
    for path, patient in rows:
        folders = [name for name in Path(path).parts[:-1] if not TIME_FOLDER.fullmatch(name)]
        found |= {stem(path), patient or "", folders[-1] if folders else ""}
    return found - {""}


def about_seen(seen: SeenNames) -> list[tuple[str, str]]:
    return [
        ("seen", f"{one}: " + (f"{len(names)}: {truncate_list(sorted(names), MOST_SHOWN)}" if names else "not known"))
        for one, names in seen
    ]


def about_cases(source: str, seen: SeenNames) -> list[tuple[str, str]]:
    """Which of the cases that are to be tested have been seen, by their patients' names or, of scans, their own."""
    try:
        subjects, _ = find_subjects(source)
    except UserError as error:
        raise UserError(str(error).replace("--input", "--cases", 1)) from error
    names = {one.patient.rpartition("/")[2] for one in subjects}
    names |= {one.name.rpartition("/")[2] for one in subjects if not one.is_crop}
    names = {name.casefold() for name in names}
    facts = []
    for one, known in seen:
        common = sorted(name for name in known if name.casefold() in names)
        found = f"{len(common)} names: {truncate_list(common, MOST_SHOWN)}" if common else "none of them"
        facts.append(("cases", f"{one}: {found if known else 'not known'}"))
    return [*facts, ("cases", "names alone are compared: a person under another name is not noticed")]


if __name__ == "__main__":
    utils.run_script(main)
