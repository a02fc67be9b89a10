"""A trained model for other programs: ONNX, torch.export (.pt2) or safetensors, and a JSON of how to feed it.

    python export.py --weights OUT/checkpoint.pth --output encoder.onnx        the encoder, of any checkpoint
    python export.py --weights LNC --output exported                           the classifier, mean of all folds
    python export.py --weights LTS/0 --output segmenter.onnx                   the segmenter of fold 0
    python export.py --weights LNC --model encoder --output exported --format onnx torch safetensors

The graph takes Hounsfield units: clipping and scaling are inside, so that nobody can get them wrong. Its batch is free,
its volume has the size that the model was trained on. What was written is run beside the model itself, and refused
where the two differ.
"""

import dino3d.openmp  # noqa: F401  before torch is loaded

# isort: split

import argparse
import contextlib
import hashlib
import io
import json
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import utils
from augmentations import scale_intensity
from dino3d import command_line
from dino3d.command_line import UserError, format_values, git_revision, number
from dino3d.data.conventions import AIR, DataError
from dino3d.data.layouts import find_unlabelled, none_found
from dino3d.evaluation.calibration import NEVER, Calibration
from dino3d.features.encoder import ENCODER, find_weights, load_encoder
from dino3d.features.pooling import pool_of
from dino3d.files import versions, write_json
from dino3d.finetune.crops import centre_window, read_crop
from dino3d.finetune.fold_folders import fold_files, load_folds
from dino3d.finetune.heads import classifier_of, segmenter_of
from dino3d.prepare.phantoms import chest_phantom
from dino3d.weights import SAFETENSORS_CONFIG, config_of, crc32_of_tensors, load_file

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
WRONG_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".json", ".engine", ".tflite", ".h5")
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": (), "safetensors": ("safetensors",)}
# {model: (name in the config of its runs alone, what builds it)}
TRAINED = {"classifier": ("protocol", classifier_of), "segmenter": ("decoder", segmenter_of)}
MODELS = ("encoder", *TRAINED)
OPSET = 20
TOLERANCE = 1e-3  # of the largest value of an output; single precision leaves 2e-5, more where windows are flat
FROM = "weights_from"  # name of the origins in the JSON and the metadata
MEASURED = 7  # crops, in batches of 1, 3 and 3
LARGEST_PROTOBUF = 1_800_000_000  # bytes of weights; ONNX keeps more than 2 GB beside the graph, in FILE.data


def get_args_parser() -> command_line.ArgumentParser:
    parser = command_line.ArgumentParser(
        prog="export.py",
        usage="export.py --weights FILE|DIR --output FILE|DIR [flags]",
        description="Write an encoder, a classifier or a segmenter for other programs, and measure that it gives there "
        "what it gives here.",
    )
    group = parser.add_argument_group("required")
    group.add_argument(
        "--weights",
        required=True,
        metavar="FILE|DIR",
        help="checkpoint, or --output_dir of a run: of main_dino.py (its encoder) or of a fine-tuning (the mean of its "
        "folds); DIR/0 is fold 0 alone",
    )
    group.add_argument(
        "--output",
        required=True,
        metavar="FILE|DIR",
        help="file that ends in .onnx, .pt2 or .safetensors, or a folder; a .json of the same name goes beside it",
    )
    group = parser.add_argument_group("options")
    group.add_argument(
        "--model",
        default=None,
        choices=MODELS,
        help="what to export; default: what was trained. encoder takes that of a fine-tuned model, of its first fold",
    )
    group.add_argument(
        "--format",
        default=None,
        nargs="+",
        choices=tuple(FORMATS),
        help="onnx, torch (torch.export, .pt2), safetensors (weights alone), several where --output is a folder; "
        "default: by the suffix of --output, onnx for a folder",
    )
    group.add_argument(
        "--crops",
        default=None,
        metavar="DIR",
        help="folder with crops or CTs in HU on which the difference to torch is measured; default: generated chests",
    )
    group.add_argument(
        "--opset",
        default=OPSET,
        type=number(int, 18, 23),
        help="version of ONNX's operators; older runtimes need lower",
    )
    command_line.checkpoint_key_flag(group)
    command_line.help_flags(group)
    return parser


def check_flags(parser: command_line.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is wrong by itself (exit code 2), and settle the formats."""
    suffix = Path(args.output).suffix.lower()
    known = [name for name, one in FORMATS.items() if one == suffix]
    if suffix in WRONG_SUFFIXES:
        parser.error(f"--output {args.output}: a file must end in {', '.join(FORMATS.values())}; a folder may not")
    if known and args.format not in (None, known):
        parser.error(f"--output {args.output} is one file of --format {known[0]}; give a folder for several formats")
    args.format = known or list(dict.fromkeys(args.format or ["onnx"]))
    args.is_file = bool(known)


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    missing = [name for one in args.format for name in PACKAGES[one] if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {format_values(args.format)}: {', '.join(missing)} not installed: pip install "
            f"{' '.join(missing)} (requirements-test.txt has versions that work)"
        )
    with torch.no_grad():
        run(args)


def run(args: argparse.Namespace) -> None:
    source = load_source(args.weights, args.model, args.checkpoint_key)
    output = Path(args.output)
    folder, name = (output.parent, output.stem) if args.is_file else (output, source.model)
    suffixes = [output.suffix if args.is_file else FORMATS[one] for one in args.format]
    refuse_existing(folder, [name + suffix for suffix in (*suffixes, ".json")])
    for line in source.notices:
        print(line)
    crops, origin = read_crops(args.crops, source.size) if args.crops else generated_crops(source.size)
    expected = reference(source, crops)
    about = describe(source) | {"measured_on": origin}
    program = traced(source, crops) if {"onnx", "torch"} & set(args.format) else None
    with new_files(folder, args.output) as part:
        differences = {}
        for kind, suffix in zip(args.format, suffixes):
            path, began = part / (name + suffix), time.monotonic()
            if kind == "safetensors":
                write_safetensors(path, source)
                told = "weights are the same to the last bit"
            else:
                if kind == "onnx":
                    write_onnx(path, program, source, args.opset, about)
                    found = run_onnx(path, crops)
                else:
                    write_torch(path, program, about)
                    found = run_torch(path, crops)
                differences[kind] = compare(found, expected, source.outputs, folder / path.name)
                told = f"largest difference to torch on {origin}: " + ", ".join(
                    f"{out} {one['largest']:.1e} of {one['up_to']:.3g}" for out, one in differences[kind].items()
                )
            megabytes = sum(file.stat().st_size for file in part.glob(path.name + "*")) / 1e6
            print(f"{folder / path.name}: {megabytes:.1f} MB, {time.monotonic() - began:.0f} s; {told}", flush=True)
        files = sorted(part.iterdir())
        about |= {"difference_to_torch": differences, "files": {file.name: file_entry(file) for file in files}}
        write_json(part / f"{name}.json", about)
        refuse_existing(folder, [file.name for file in part.iterdir()])
        for file in [*files, part / f"{name}.json"]:  # the JSON says that the others are whole
            os.replace(file, folder / file.name)
    print(f"{folder / name}.json: how to feed it; an example stands in docs/export.md")


def refuse_existing(folder: Path, names: Sequence[str]) -> None:
    """UserError where one of these files is there."""
    there = next((name for name in names if os.path.lexists(folder / name)), None)
    if there:
        raise UserError(f"--output: {folder / there} is there already; remove it, or choose another name or folder")


@contextlib.contextmanager
def new_files(folder: Path, output: str) -> Iterator[Path]:
    """Gives a temporary folder on the disk of `folder`, which is made where it is missing; a block that fails leaves
    nothing. Raises UserError where nothing can be written."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    part, done = None, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".export.", dir=folder))
        yield part
        done = True
    except OSError as error:
        reason = "a file stands where its folder should" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"--output {output}: can't be written ({reason or error})") from error
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)
        for one in [] if done else missing:
            with contextlib.suppress(OSError):  # made by us, and empty
                one.rmdir()


# ----------------------------------------------------------------------------------------------------- what to export


class Source(NamedTuple):
    """What is exported.

    model: one of MODELS; networks: of its folds, one of an encoder; in evaluation mode
    config: of the run that trained it; best: what is known of each fold's best epoch; folds: their names
    origins: of each network, which one of which file it is, and how long it was trained
    graph: takes HU (B, 1, X, Y, Z), gives `outputs`, {name: (shape, what it is)}
    """

    model: str
    networks: list[nn.Module]
    config: dict[str, Any]
    best: list[dict[str, Any]]
    folds: list[str]
    graph: nn.Module
    outputs: dict[str, tuple[list[Any], str]]
    notices: list[str]
    origins: list[dict[str, Any]]

    @property
    def size(self) -> list[int]:
        """(3,) voxels."""
        return list(self.config["input_size"])


def load_source(weights: str, model: str | None, checkpoint_key: str) -> Source:
    """The Source of a checkpoint or a run's folder. Raises UserError."""
    files = weight_files(weights)
    trained = what_it_is(files[0])
    model = model or trained
    if model == "encoder":
        return encoder_source(files, checkpoint_key)
    if model != trained:
        article = "an" if trained == "encoder" else "a"
        raise UserError(f"--model {model}: --weights {files[0]} holds {article} {trained}, and no {model}")
    known_by, build = TRAINED[model]
    networks, config, best = load_folds(files, build, known_by)
    networks = [network.eval() for network in networks]
    folds = [file.parent.name if len(files) > 1 else "" for file in files]
    classes = config["classes"]
    if model == "classifier":
        graph = ClassifierGraph(networks, config["clip_range"], list(map(Calibration.from_best, best)))
        outputs = {"probabilities": (["batch", classes], "of each class; the mean over the folds")}
    else:
        graph = SegmenterGraph(networks, config["clip_range"])
        outputs = {
            "logits": (
                ["batch", len(networks), classes, *config["input_size"]],
                "(batch, fold, class, X, Y, Z); class 0 is background. Put the windows together (see windows), then "
                "softmax over the classes, then the mean over the folds",
            )
        }
    notice = f"{model} of {weights}: mean of {len(files)} folds" if len(files) > 1 else f"{model} of {files[0]}"
    origins = [{"file": f"{file.parent.name}/{file.name}", "epoch": one.get("epoch")} for file, one in zip(files, best)]
    return Source(model, networks, config, best, folds, graph.eval(), outputs, [notice], origins)


def encoder_source(files: Sequence[Path], checkpoint_key: str) -> Source:
    """The Source of a checkpoint's encoder; of several folds the first one's."""
    encoder = load_encoder(str(files[0]), checkpoint_key, flag="--weights")
    network = encoder.build().eval()
    shape = ["batch", network.embed_dim, *(-(-n // p) for n, p in zip(encoder.input_size, network.patch_size))]
    if network.has_class_token:
        what = "the other tokens; [:, :, i, j, k] is the patch that starts at voxel (i, j, k) * patch_size"
        outputs = {"embedding": (shape[:2], "class token after the final norm"), "patch_tokens": (shape, what)}
    else:
        what = f"[:, :, i, j, k] is what lies around voxel (i, j, k) * ({', '.join(map(str, network.patch_size))})"
        outputs = {"embedding": (shape[:2], "mean of feature_map"), "feature_map": (shape, what)}
    notices = list(encoder.notices)
    if len(files) > 1:
        notices.append(f"encoder of fold {files[0].parent.name} alone, the first of {len(files)}")
    graph = EncoderGraph(network, encoder.clip_range).eval()
    state = load_file(files[0])
    trained = config_of(state)
    config = encoder.settings() | {"crop_spacing": encoder.crop_spacing, "pool": trained.get("pool")}
    taken = next(line for line in notices if line.startswith("weights of")).rpartition(": ")[2]
    origin = {"file": files[0].name, "network": taken, "pool": config["pool"]}
    origin |= {name: (state.get("best") or state).get(name) for name in ("epoch", "step", "samples")}
    if len(trained.get(FROM) or ()) == 1:  # an export of an export
        origin |= trained[FROM][0]
    origin = {name: value for name, value in origin.items() if isinstance(value, (str, int))}
    return Source("encoder", [network], config, [{}], [""], graph, outputs, notices, [origin])


def weight_files(weights: str) -> list[Path]:
    """The best epochs of a fine-tuned run's folds, or what `find_weights` takes. Raises UserError."""
    file, _ = find_weights(weights, "--weights")
    in_folds = Path(weights).is_dir() and Path(file).parent != Path(weights)
    return fold_files(weights) if in_folds else [Path(file)]


def what_it_is(file: Path) -> str:
    """One of MODELS, by a checkpoint's config. Raises UserError."""
    try:
        state = load_file(file)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--weights {error}") from error
    config = config_of(state)
    if isinstance(config, dict) and isinstance(state, dict) and "model" in state and "best" in state:
        return next((name for name, (known_by, _) in TRAINED.items() if known_by in config), "encoder")
    return "encoder"


# -------------------------------------------------------------------------------------------------------- the graphs


def grey_values(hu: Tensor, clip_range: Sequence[float]) -> Tensor:
    """(B, 1, X, Y, Z) HU of any file -> [0, 1]. What lies below air is padding, which reading a file raises to it."""
    return scale_intensity(hu.clamp_min(AIR), *clip_range)


class EncoderGraph(nn.Module):
    """HU (B, 1, X, Y, Z) -> embedding (B, D), feature map (B, D, x, y, z)."""

    def __init__(self, encoder: nn.Module, clip_range: Sequence[float]) -> None:
        super().__init__()
        self.encoder, self.clip_range = encoder, clip_range

    def forward(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.embeddings_and_maps(grey_values(hu, self.clip_range), 1)[0]


class ClassifierGraph(nn.Module):
    """HU (B, 1, X, Y, Z) -> probabilities (B, classes), the mean over the folds, each calibrated by its own."""

    def __init__(
        self, classifiers: Sequence[nn.Module], clip_range: Sequence[float], calibrations: Sequence[Calibration]
    ) -> None:
        super().__init__()
        self.classifiers, self.clip_range = nn.ModuleList(classifiers), clip_range
        self.temperatures = [one.temperature for one in calibrations]
        self.offsets = [torch.tensor(one.logit_offset or [0.0]) for one in calibrations]  # (classes,) or (1,)

    def forward(self, hu: Tensor) -> Tensor:
        volumes, probabilities = grey_values(hu, self.clip_range), []
        for classifier, temperature, offset in zip(self.classifiers, self.temperatures, self.offsets):
            logits = classifier(volumes)  # (B, classes)
            logits = torch.where(logits == -torch.inf, math.log(NEVER), logits)  # of k-NN
            probabilities.append((logits / temperature + offset).softmax(-1))
        return torch.stack(probabilities).mean(0)


class SegmenterGraph(nn.Module):
    """HU of windows (B, 1, X, Y, Z) -> logits (B, folds, classes, X, Y, Z).

    Logits of each fold, and not the mean of probabilities: windows overlap, and prediction weights logits there.
    """

    def __init__(self, segmenters: Sequence[nn.Module], clip_range: Sequence[float]) -> None:
        super().__init__()
        self.segmenters, self.clip_range = nn.ModuleList(segmenters), clip_range

    def forward(self, hu: Tensor) -> Tensor:
        volumes = grey_values(hu, self.clip_range)
        return torch.stack([segmenter(volumes) for segmenter in self.segmenters], dim=1)


# ------------------------------------------------------------------------------------------------------------- crops


def generated_crops(size: Sequence[int]) -> tuple[np.ndarray, str]:
    """((MEASURED, 1, X, Y, Z) float32 HU, what they are): parts of a synthetic chest, noise beyond every clip range."""
    rng = np.random.default_rng(0)
    chest = chest_phantom(0, [2 * n for n in size])[0]
    crops = [
        chest[tuple(slice(a, a + n) for a, n in zip(rng.integers(0, np.array(size) + 1), size))]
        for _ in range(MEASURED - 1)
    ]
    crops.append(rng.uniform(-3000, 4000, size))
    return np.stack(crops)[:, None].astype(np.float32), f"{MEASURED} generated crops"


def read_crops(folder: str, size: Sequence[int]) -> tuple[np.ndarray, str]:
    """((N, 1, X, Y, Z) float32 HU, what they are): the middles of at most MEASURED volumes below a folder."""
    try:
        names, passed_over = find_unlabelled(folder)
        if not names:
            raise UserError(f"--crops {folder}: {none_found(passed_over)}")
        chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(MEASURED, len(names))).round().astype(int)]
        crops = [centre_window(read_crop(os.path.join(folder, name), size), size) for name in chosen]
    except DataError as error:
        raise UserError(f"--crops {error}") from error
    return np.stack(crops)[:, None].astype(np.float32), f"{len(crops)} of {len(names)} volumes below --crops"


def in_batches(crops: np.ndarray) -> Iterator[np.ndarray]:
    """One crop, then three at a time: a batch that a graph had fixed would fail."""
    yield crops[:1]
    for at in range(1, len(crops), 3):
        yield crops[at : at + 3]


def joined(batches: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(*batches)]


def reference(source: Source, crops: np.ndarray) -> list[np.ndarray]:
    """The outputs as this repository computes them, batch by batch: of the networks themselves, not of the graph."""

    def outputs_of(hu: Tensor) -> list[Tensor]:
        volumes = scale_intensity(hu, *source.config["clip_range"])  # (B, 1, X, Y, Z) in [0, 1]
        if source.model == "encoder":
            return [source.networks[0](volumes), source.networks[0].get_intermediate_layers(volumes)[0]]
        logits = [network(volumes) for network in source.networks]
        if source.model == "segmenter":
            return [torch.stack(logits, dim=1)]
        folds = zip((one.double().softmax(-1).numpy() for one in logits), map(Calibration.from_best, source.best))
        return [torch.from_numpy(np.mean([calibration.apply(one) for one, calibration in folds], axis=0))]

    read = np.maximum(crops, AIR)  # as files are read
    found = joined([[one.numpy() for one in outputs_of(torch.from_numpy(batch))] for batch in in_batches(read)])
    if not all(np.isfinite(one).all() for one in found):
        raise UserError(f"the {source.model} gives values that are not finite (NaN): its training has failed")
    return found


# ----------------------------------------------------------------------------------------------------------- formats


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Exporters warn of what they skip and of their own use of older interfaces: nothing that a user could change."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def traced(source: Source, crops: np.ndarray) -> torch.export.ExportedProgram:
    """The graph with a free batch."""
    batch = torch.from_numpy(crops[:1]).repeat(2, 1, 1, 1, 1)  # of 1 it would be taken for a constant
    with without_warnings():
        return torch.export.export(source.graph, (batch,), dynamic_shapes={"hu": {0: torch.export.Dim("batch", min=1)}})


def write_onnx(
    path: Path, program: torch.export.ExportedProgram, source: Source, opset: int, about: dict[str, Any]
) -> None:
    """An ONNX file; weights beyond LARGEST_PROTOBUF lie in a second file beside it."""
    with without_warnings():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["hu"],
            output_names=list(source.outputs),
            opset_version=opset,
            verbose=False,
        )
        for value in (*onnx_program.model.graph.inputs, *onnx_program.model.graph.outputs):
            value.shape[0] = "batch"  # and not the tracer's name
        onnx_program.model.metadata_props["preprocessing"] = json.dumps(about, allow_nan=False)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in source.graph.state_dict().values())
        onnx_program.save(path, external_data=weights > LARGEST_PROTOBUF)


def run_onnx(path: Path, crops: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return joined([session.run(None, {"hu": batch}) for batch in in_batches(crops)])


def write_torch(path: Path, program: torch.export.ExportedProgram, about: dict[str, Any]) -> None:
    """What torch.export.load reads. By way of memory: where a disk is full, torch would abort the process."""
    content = io.BytesIO()
    with without_warnings():
        torch.export.save(program, content, extra_files={"preprocessing.json": json.dumps(about)})
    path.write_bytes(content.getbuffer())


def run_torch(path: Path, crops: np.ndarray) -> list[np.ndarray]:
    with without_warnings():
        module = torch.export.load(path).module()
    found = [module(torch.from_numpy(batch)) for batch in in_batches(crops)]
    return joined([[one.numpy() for one in (out if isinstance(out, tuple) else (out,))] for out in found])


def write_safetensors(path: Path, source: Source) -> None:
    """The networks' weights, those of several folds as `<fold>.<name>`, and in the metadata what `load_encoder`
    reads."""
    import safetensors.torch

    tensors = {
        ".".join(filter(None, (fold, name))): tensor.contiguous()
        for fold, network in zip(source.folds, source.networks)
        for name, tensor in network.state_dict().items()
    }
    known = {name: source.config.get(name) for name in (*ENCODER, "crop_spacing", "pool")}
    config = {name: value for name, value in known.items() if value is not None} | {FROM: source.origins}
    metadata = {"format": "pt", SAFETENSORS_CONFIG: json.dumps(config, allow_nan=False)}
    path.write_bytes(safetensors.torch.save(tensors, metadata))  # save_file lets nobody else read the file
    found = load_file(path)
    if any(not torch.equal(found[name], tensor) for name, tensor in tensors.items()) or found["config"] != config:
        raise UserError(f"{path.name}: was read back with other weights than were written: is the disk sound?")


def compare(
    found: Sequence[np.ndarray], expected: Sequence[np.ndarray], names: Sequence[str], path: Path
) -> dict[str, dict[str, float]]:
    """{output: {"largest": difference, "up_to": largest value of the output}}. Raises UserError beyond TOLERANCE."""
    differences = {}
    for name, one, other in zip(names, found, expected):
        largest, up_to = float(np.abs(one - other).max()), float(np.abs(other).max())
        differences[name] = {"largest": largest, "up_to": up_to}
        if not largest <= TOLERANCE * up_to:  # NaN too
            raise UserError(
                f"{path}: is not written: its {name} differs from torch by {largest:.2g}, where values reach "
                f"{up_to:.3g} and {TOLERANCE * up_to:.2g} is allowed; another --opset or other versions of the "
                "packages in requirements-test.txt may do"
            )
    return differences


# -------------------------------------------------------------------------------------------------------- the JSON


def describe(source: Source) -> dict[str, Any]:
    """How to feed the files and what comes out."""
    config, (low, high) = source.config, source.config["clip_range"]
    about = {
        "model": source.model,
        "architecture": {
            "arch": config["arch"],
            "input_size": source.size,
            "patch_size": config["patch_size"] and list(config["patch_size"]),
            "embed_dim": getattr(source.networks[0], "encoder", source.networks[0]).embed_dim,
            **({"protocol": config["protocol"], "pool": pool_of(config)} if "protocol" in config else {}),
            **({"decoder": config["decoder"]} if "decoder" in config else {}),
        },
        FROM: source.origins,
        "weights_crc32": [crc32_of_tensors(network.state_dict()) for network in source.networks],
        "input": {
            "name": "hu",
            "dtype": "float32",
            "shape": ["batch", 1, *source.size],
            "axes": "(B, C, X, Y, Z) in RAS: x grows to the patient's right, y to the front, z to the head",
            "unit": "Hounsfield units",
            "spacing_mm": config.get("crop_spacing") or config["spacing"],
            "clip_range_hu": [low, high],
            "formula": f"(clip(maximum(hu, {AIR}), {low:g}, {high:g}) - ({low:g})) / {high - low:g}",
            "formula_is_in_the_graph": True,
            "outside_of_the_scan_hu": AIR,
        },
        "outputs": [{"name": name, "shape": shape, "what": what} for name, (shape, what) in source.outputs.items()],
    }
    if source.model == "classifier":
        about["classes"] = config["classes"]
        about["label_names"] = config.get("label_names")  # of a --data_list with words
        about["threshold"] = float(np.mean([best["threshold"] for best in source.best]))
        calibrations = list(map(Calibration.from_best, source.best))
        about["temperatures"] = [one.temperature for one in calibrations]
        about["logit_offsets"] = [list(one.logit_offset) for one in calibrations]
        about["decision"] = (
            "1 where probabilities[:, 1] >= threshold, else 0" if config["classes"] == 2 else "argmax of probabilities"
        )
        about["crop_size"] = config["crop_size"]
    if source.model == "segmenter":
        about["classes"] = config["classes"]
        about["windows"] = {
            "size": source.size,
            "overlap": config["overlap"],
            "step": [max(int(n * (1 - config["overlap"])), 1) for n in source.size],
            "weights": "of a window's logits in the mean: Gaussian around its middle, sigma 0.125 * size",
        }
        about["mask"] = {name: config[name] for name in ("largest_component", "min_volume")}
    about["versions"] = versions() | {name: version(name) for name in PACKAGES["onnx"] if find_spec(name)}
    about["git_revision"] = git_revision()
    return about


def file_entry(file: Path) -> dict[str, Any]:
    with open(file, "rb") as content:
        return {"sha256": hashlib.file_digest(content, "sha256").hexdigest(), "bytes": file.stat().st_size}


if __name__ == "__main__":
    utils.run_script(main)
