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
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import utils
from dino3d import command_line
from dino3d.command_line import UserError, format_values, truncate_list
from dino3d.data.conventions import DataError, is_kind, stem
from dino3d.data.layouts import read_data_list
from dino3d.data.lists import PATIENT, is_table
from dino3d.data.scans import Scan
from dino3d.features.cases import CROP_LAYOUT, find_subjects, owner_of
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
from dino3d.features.probe import BEST_PROBE
from dino3d.files import CHECKSUM, CHECKSUM_BYTES, read_json, read_log, read_rows
from dino3d.prepare.inputs import safe_name
from dino3d.training.collapse import ENOUGH_VIEWS, collapse_warning
from dino3d.weights import load_config, load_file, named_tensors
from vision_transformer import ARCHITECTURES

RUN_CONFIG, VOLUME_LISTS = "config.json", "data_list*.txt"  # of a run
SCRIPT_BY = {"protocol": "main_lnc_luna16.py", "decoder": "main_lts_msd.py", "momentum_teacher": "main_dino.py"}
FOLD_SIDES = {"train": "train", "validation": "validation, which chose its epoch", "test": "test, not trained on"}
GRAPHS = (".onnx", ".pt2")  # exports that are no checkpoints
SHOWN_FIGURES = ("kl", "teacher_entropy_share", "effective_rank", "mutual_information")
SHOWN_FIGURES += ("winning_prototypes", "lr", "skipped_steps", "bad_files")
SHOWN_SCORES = ("auc", "accuracy", "brier", "dice", "surface_dice", "loss")
LOGISTIC_AUC = "probe_logistic_auc"
SHOWN_PROBES = 10
MOST_SHOWN = 8  # names in a line
NAMED_KEY = re.compile(r"such as --checkpoint_key (\S+)")  # in an error, of a network that is there
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
    if is_kind(file, GRAPHS):
        raise UserError(f"--weights {path}: is a graph; {file.with_suffix('.json')} says what it is; give .safetensors")
    try:
        checkpoint = load_file(file)
        if not isinstance(checkpoint, dict):
            raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, expected a checkpoint's dict")
        groups = named_tensors(checkpoint, path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--weights {error}") from error
    config = encoder_config(checkpoint, path, "--weights")
    script = next((name for key, name in SCRIPT_BY.items() if key in config), None)
    networks, problems = load_networks(path)
    seen = seen_names(file, config)
    show(
        [
            *(("file", line) for line in lines),
            *about_file(file, checkpoint, config, script),
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


def about_file(
    file: Path, checkpoint: Mapping[str, Any], config: Mapping[str, Any], script: str | None
) -> list[tuple[str, str]]:
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
    elif wanted or config.get("weights_from"):
        what = f"an export by revision {exported.get('git_revision')}" if wanted else "an export"
        if origins := exported.get("weights_from") or config.get("weights_from"):  # older ones do not say it
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
    """({--checkpoint_key: encoder}, why others are not loaded): teacher and student, one where both are the same; where
    the file has neither, the first that it names."""
    found, problems, keys = {}, [], ["teacher", "student"]
    for key in keys:
        try:
            found[key] = load_encoder(path, key, flag="--weights")
        except UserError as error:
            problems.append((key, f"is not loaded: {str(error).removeprefix(f'--weights {path}: ')}"))
            named = NAMED_KEY.search(str(error))
            if named and key == "student" and not found and named[1] not in keys:
                keys.append(named[1])
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
    flags = "".join(f', checkpoint_key="{key}"' for key in networks if not {"network", "teacher"} & networks.keys())
    load = f'torch.hub.load(CHECKOUT, "encoder", source="local", weights=FILE{flags}), an encoder in evaluation mode'
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
    done = f"{checkpoint.get('epoch')} of {config.get('epochs')} epochs" + (f", {step} steps" if step else "")
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
    start, whole = config.get("pretrained_weights"), "optimizer" in checkpoint
    epochs = f"of {config.get('epochs')} epochs"
    done = f"{checkpoint.get('epoch')} {epochs}; the best" if whole else f"best {epochs}"
    fold = f"fold {file.parent.name}: " * file.absolute().parent.name.isdecimal()
    unknown = "none, its training has not ended" if (file.parent / LOG).is_file() else "not known"
    return [
        ("trained", f"{fold}{done}: {best.get('epoch', 'none yet')}"),
        ("trained", f"from {start}, CRC-32 {config.get('weights_crc32')}" if start else "from random weights"),
        ("figures", f"validation{', of the best' * whole}: {validation or 'none'}"),
        ("figures", f"test{', of best.pth' * whole}: {test}" if test else f"test: {unknown}"),
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
    stored = json.loads(json.dumps({name: config[name] for name in arguments if name in config}, default=str))
    other = [name for name in stored if stored[name] != arguments[name]]
    if other:
        facts.append(("code", f"{path} is of another start than this file: other {truncate_list(other, MOST_SHOWN)}"))
    return facts


def about_flags(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that the file says of how it was made."""
    given = {name: value for name, value in config.items() if value not in (None, "") and name != "weights_from"}
    text = " ".join(f"--{name} {format_values(value)}" for name, value in given.items())
    return [("flags", text)] if given else []


# ----------------------------------------------------------------------------------------------------- whom it has seen


NOT_KNOWN = "not known"


class Seen(NamedTuple):
    """Who was seen by weights in one way.

    what: in which; who: to be printed; known: names by which one may be known again
    """

    what: str
    who: str = NOT_KNOWN
    known: frozenset[str] = frozenset()


def seen_names(file: Path, config: Mapping[str, Any], before: Sequence[Path] = ()) -> list[Seen]:
    """Whom weights have seen, and whom those that they began from. before: files whose own beginning these are"""
    folder, seen = file.resolve().parent, []
    if "momentum_teacher" in config:
        given = config.get("data_list")
        lists = [*sorted(folder.glob(VOLUME_LISTS)), *([Path(given)] if isinstance(given, str) else [])]
        seen += [names_in(one, f"pre-training by {one.name}") for one in lists] or [Seen("pre-training")]
        if file.name == BEST_PROBE:
            seen.append(
                names_below(config.get("probe_dir") or "", f"probe, which chose its epoch, {config.get('probe_dir')}")
            )
    elif folder.name.isdecimal() and (folder.parent / SPLITS).is_file():
        try:
            of_fold = read_beside(folder.parent / SPLITS)["splits"][int(folder.name)]
            for side, what in FOLD_SIDES.items():
                patients = of_fold[side]
                known = frozenset().union(*(names for _, names in names_on(patients)), patients)
                seen.append(Seen(f"fold {folder.name}, {what}", told("patient", len(patients), patients), known))
        except (LookupError, TypeError) as error:
            raise UserError(f"{folder.parent / SPLITS}: does not say who is in fold {folder.name}") from error
    else:
        seen.append(Seen("training"))
    start = config.get("pretrained_weights")
    if not start or not isinstance(start, str):
        return seen
    before = [*before, folder, file.resolve()]
    if Path(start).resolve() in before:
        return seen
    if not Path(start).exists():
        return [*seen, Seen(f"{start}, which it began from")]
    path = Path(find_weights(start, "--pretrained_weights")[0])
    wanted, other = config.get("weights_crc32"), ""
    if wanted and wanted != load_encoder(str(path), config.get("checkpoint_key") or "teacher").crc32:
        other = ", whose weights are others by now"
    return seen + [
        one._replace(what=f"{path}{other}: {one.what}") for one in seen_names(path, load_config(path) or {}, before)
    ]


def names_in(table: Path, what: str) -> Seen:
    """Who is in a list of volumes, by their paths and a column of patients."""
    try:
        paths, patients = read_data_list(table, os.sep), []
        with contextlib.suppress(UserError):  # it has no such column
            patients = [row[PATIENT] for _, row in read_rows(table, ["path", PATIENT])] if is_table(table) else []
    except (DataError, UserError):
        return Seen(what)
    named = names_on([path.replace("#", os.sep) for path in paths])  # of DICOM: a folder and a series in it
    owners, of_files = {owner for owner, _ in named}, [names for _, names in named]
    of_all = set.intersection(*of_files) if len(owners) > 1 else set()  # ct of Pat1/ct.nii.gz, Pat2/ct.nii.gz: nobody's
    known = frozenset().union(*of_files, patients) - of_all
    return Seen(what, told("volume", len(paths), {*patients} or owners), known)


def names_on(paths: Sequence[str]) -> list[tuple[str, set[str]]]:
    """(whose it is, all that may name him or her) of each file: folders beyond those that all lie in, and its own name
    without suffix; of a crop in our layout its patient alone."""
    parts = [folders_and_name(path) for path in paths]
    shared, found = len(os.path.commonprefix([folders for *folders, _ in parts])), []
    for path, own in zip(paths, parts):
        owner = owner_of(path, Scan(path, [])) or own[shared]
        found.append((owner, {owner} if CROP_LAYOUT.fullmatch(path) else {owner, *own[shared:]}))
    return found


def folders_and_name(path: str) -> list[str]:
    """Folders, without the layout's t<k>, and the file's name without suffix."""
    return [*(name for name in Path(path).parts[:-1] if not TIME_FOLDER.fullmatch(name)), stem(path)]


def names_below(folder: str, what: str) -> Seen:
    """Whose the crops below a folder are."""
    try:
        patients = {one.patient for one in find_subjects(folder)[0]}
    except UserError:
        return Seen(what)
    return Seen(what, told("patient", len(patients), patients), frozenset(patients))


def told(kind: str, count: int, names: Iterable[str]) -> str:
    return f"{count} {kind}{'s' * (count != 1)}: {truncate_list(sorted(names), MOST_SHOWN)}"


def about_seen(seen: Sequence[Seen]) -> list[tuple[str, str]]:
    return [("seen", f"{one.what}: {one.who}") for one in seen]


def about_cases(source: str, seen: Sequence[Seen]) -> list[tuple[str, str]]:
    """Which of the cases that are to be tested have been seen, by their patients' names or, of scans, all on their
    paths."""
    try:
        subjects, _ = find_subjects(source)
    except UserError as error:
        raise UserError(str(error).replace("--input", "--cases", 1)) from error
    names = []  # of each case; a patient's as it is, and as the converter writes it
    for one in subjects:
        of_scan = () if one.is_crop else (*folders_and_name(one.name), *Path(one.path).parent.parts[-1:])
        names.append({name.casefold() for name in (one.patient, safe_name(one.patient, ""), *of_scan)})
    facts = []
    for one in seen:
        known = {name.casefold(): name for name in one.known - {""}}
        common = [known.keys() & of_case for of_case in names]
        if by := sorted({known[name] for of_case in common for name in of_case}):
            found = f"{sum(map(bool, common))} of {len(names)} cases, by {truncate_list(by, MOST_SHOWN)}"
        else:
            found = NOT_KNOWN if one.who == NOT_KNOWN else f"none of {len(names)} cases"
        facts.append(("cases", f"{one.what}: {found}"))
    return [
        *facts,
        ("cases", "names alone are compared, of a pool those on its paths: a person of two names is not noticed"),
    ]


if __name__ == "__main__":
    utils.run_script(main)
