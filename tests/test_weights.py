"""Weights as other code leaves them: the network that is asked for, to the last bit, or a refusal that names it."""

import argparse
import collections
import gzip
import io
import json
import pathlib
import pickle
import random
import re
import struct
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

import main_dino
import utils
from dino3d import command_line
from dino3d.command_line import UserError
from dino3d.features.encoder import ENCODER, load_encoder
from dino3d.weights import SAFETENSORS_CONFIG, load_file
from vision_transformer import ARCHITECTURES, DINOHead, MultiCropWrapper, VisionTransformer

SIZE, PATCH = (24, 24, 12), (12, 12, 6)
GIVEN = dict.fromkeys(ENCODER)


def tiny(img_size=SIZE, patch_size=PATCH, **more):
    return VisionTransformer(
        **dict(img_size=img_size, patch_size=patch_size, embed_dim=12, depth=2, num_heads=3) | more
    )


torch.manual_seed(0)
TEACHER = {name: torch.randn_like(tensor) for name, tensor in tiny().state_dict().items()}
STUDENT = {name: tensor + 1 for name, tensor in TEACHER.items()}


def put(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(state, *pairs):
    for old, new in pairs:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def timm(state):
    return state | {"head.weight": torch.zeros(5, 12), "head.bias": torch.zeros(5)}


BLOCKS = [(f"blocks.{i}.", f"blocks.{i}._orig_mod.") for i in range(2)]
CHUNKS = [(f"blocks.{i}.", f"blocks.{i}.{i}.") for i in range(2)]
BOTH = {  # what a file with two networks holds, the keys that mean its teacher, those that mean its student
    "ours": (
        {"student": put("module.backbone.", STUDENT), "teacher": put("backbone.", TEACHER), "epoch": 3},
        ["teacher", "ema", "momentum", "teacher.backbone"],
        ["student", "student.backbone"],
    ),
    "dinov2": (
        {"model": put("student.backbone.", STUDENT) | put("teacher.backbone.", TEACHER), "iteration": 9},
        ["teacher", "model.teacher", "model.teacher.backbone"],
        ["student", "model.student"],
    ),
    "lightly": (
        {"state_dict": put("student_backbone.vit.", STUDENT) | put("teacher_backbone.vit.", TEACHER), "epoch": 3},
        ["teacher", "teacher_backbone", "state_dict.teacher_backbone", "momentum"],
        ["student", "student_backbone"],
    ),
    "solo-learn": (
        {"state_dict": put("backbone.", STUDENT) | put("momentum_backbone.", TEACHER)},
        ["teacher", "momentum", "momentum_backbone"],
        ["student", "backbone"],
    ),
    "timm": (
        {"arch": "vit", "state_dict": timm(STUDENT), "state_dict_ema": timm(TEACHER)},
        ["teacher", "ema", "state_dict_ema"],
        ["student", "state_dict"],
    ),
    "plain": (put("student.", STUDENT) | put("teacher.", TEACHER), ["teacher", "ema"], ["student"]),
    "plain, one without prefix": (STUDENT | put("ema.module.", TEACHER), ["teacher", "ema"], ["student", ""]),
    "nested": ({"nets": {"online": {"net": STUDENT}, "target": {"net": TEACHER}}}, ["teacher", "target"], ["student"]),
    "camel case, the word first": ({"net": STUDENT, "EMAModel": put("net.", TEACHER)}, ["teacher", "ema"], ["student"]),
    "I-JEPA": (
        {"encoder": put("module.", STUDENT), "target_encoder": put("module.", TEACHER), "predictor": {}, "epoch": 1},
        ["teacher", "target_encoder"],
        ["student", "encoder"],
    ),
    "arrays of NumPy": (
        {"model": STUDENT, "ema": {name: tensor.numpy() for name, tensor in TEACHER.items()}},
        ["teacher", "ema"],
        ["student", "model"],
    ),
    "in lists": ({"student": [STUDENT], "teacher": [TEACHER]}, ["teacher", "teacher.0"], ["student"]),
    "at another depth": (
        {"model": STUDENT, "callbacks": {"a": {"b": {"c": {"EMA": {"weights": TEACHER}}}}}},
        ["teacher"],
        ["student"],
    ),
    "camel case": ({"state_dict": put("model.", STUDENT) | put("modelEMA.", TEACHER)}, ["teacher", "ema"], ["student"]),
}
ONE = {  # what a file with one network holds, the key
    "bare": (TEACHER, "teacher"),
    "bare, another key": (TEACHER, "weights"),
    "DDP": ({"teacher": put("module.", TEACHER)}, "teacher"),
    "torch.compile of the whole": ({"teacher": put("_orig_mod.backbone.", TEACHER)}, "teacher"),
    "DDP around torch.compile": ({"teacher": put("module._orig_mod.backbone.", TEACHER)}, "teacher"),
    "torch.compile of the backbone": ({"teacher": put("backbone._orig_mod.", TEACHER)}, "teacher"),
    "torch.compile block by block": ({"teacher": renamed(TEACHER, *BLOCKS)}, "teacher"),
    "activation checkpointing": (renamed(TEACHER, ("attn.", "_checkpoint_wrapped_module.attn.")), "teacher"),
    "dinov2's chunked blocks": ({"teacher": renamed(put("backbone.", TEACHER), *CHUNKS)}, "teacher"),
    "dinov2's mask token": ({"teacher": TEACHER | {"mask_token": torch.zeros(1, 12)}}, "teacher"),
    "Lightning": ({"state_dict": put("model.", TEACHER), "pytorch-lightning_version": "2.5.0", "epoch": 1}, "teacher"),
    "Lightning, its key": ({"state_dict": put("model.", TEACHER), "hyper_parameters": {"lr": 0.1}}, "state_dict"),
    "timm": (timm(TEACHER), "teacher"),
    "fine-tuned here": ({"model": put("encoder.", TEACHER) | {"head.weight": torch.zeros(2, 12)}}, "teacher"),
    "an OrderedDict": ({"state_dict": collections.OrderedDict(TEACHER)}, "teacher"),
    "with an optimizer": (
        {"model": TEACHER, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": []}},
        "teacher",
    ),
    "parameters": ({"teacher": {name: nn.Parameter(tensor) for name, tensor in TEACHER.items()}}, "teacher"),
    "a Path in args": (
        {
            "teacher": put("backbone.", TEACHER),
            "args": argparse.Namespace(output_dir=pathlib.Path("a/b"), arch="vit_tiny"),
        },
        "teacher",
    ),
    "MAE and iBOT": (
        TEACHER | {"masked_embed": torch.zeros(1, 12), "decoder_pos_embed": torch.zeros(1, 9, 8)},
        "teacher",
    ),
    "a schedule of many numbers": ({"model": TEACHER, "losses": [0.5] * 200_001}, "teacher"),
    "double precision": ({"teacher": {name: tensor.double() for name, tensor in TEACHER.items()}}, "teacher"),
}


def load(path, key="teacher", model=None):
    """State dict of a model after loading."""
    model = model or tiny()
    with pytest.warns(UserWarning, match="does not say its input size: .* 2 x 2 x 2 patches"):
        utils.load_pretrained_weights(model, path, key)
    return model.state_dict()


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", BOTH)
def test_of_two_networks_the_one_that_the_key_names(name, tmp_path):
    content, teachers, students = BOTH[name]
    for form in (content, dict(reversed(content.items()))):  # whatever stands first
        torch.save(form, tmp_path / "file.pth")
        for key in teachers:
            assert same(load(tmp_path / "file.pth", key), TEACHER), key
        for key in students:
            assert same(load(tmp_path / "file.pth", key), STUDENT), key


@pytest.mark.parametrize("name", ONE)
def test_the_only_network(name, tmp_path):
    content, key = ONE[name]
    torch.save(content, tmp_path / "file.pth")
    found = load(tmp_path / "file.pth", key)
    assert same(found, TEACHER) and all(tensor.dtype == torch.float32 for tensor in found.values())
    torch.save(content, tmp_path / "older.pth", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "older.pth", key), TEACHER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_single(dtype, tmp_path):
    torch.save({"teacher": {name: tensor.to(dtype) for name, tensor in TEACHER.items()}}, tmp_path / "half.pth")
    assert same(load(tmp_path / "half.pth"), {name: tensor.to(dtype).float() for name, tensor in TEACHER.items()})


# ---------------------------------------------------------------------------------------------------------- safetensors


def safetensors_bytes(state):
    """A file of that format, written out: 8 bytes with the length of a JSON header, the header, the tensors."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = tensor.contiguous().numpy().tobytes()
        header[name] = {
            "dtype": {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(blob), len(blob) + len(raw)],
        }
        blob += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + blob


@pytest.mark.parametrize("name", ["model.safetensors", "MODEL.SAFETENSORS", "model.pth"])
def test_safetensors_are_told_by_their_content(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(safetensors_bytes(put("student.", STUDENT) | put("teacher.", TEACHER)))
    assert same(load(path), TEACHER) and same(load(path, "student"), STUDENT)
    path.write_bytes(safetensors_bytes({name: tensor.half() for name, tensor in TEACHER.items()}))
    assert same(load(path), {name: tensor.half().float() for name, tensor in TEACHER.items()})


def test_a_file_of_torch_save_named_safetensors_loads(tmp_path):
    torch.save(TEACHER, tmp_path / "model.safetensors")
    assert same(load(tmp_path / "model.safetensors"), TEACHER)


def test_damaged_safetensors_load_or_are_refused_in_one_line(tmp_path):
    path, whole, outcomes = tmp_path / "model.safetensors", safetensors_bytes(TEACHER), set()
    length = 8 + int.from_bytes(whole[:8], "little")
    for seed in range(150):
        rng, content = random.Random(seed), bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(whole) if seed % 5 == 0 else length)
            content[at : at + rng.choice([0, 1, 1, 4])] = rng.choice([rng.randbytes(1), b"9", b'"', b"", b"\0" * 5])
        path.write_bytes(content)
        try:
            load_any(path)
            outcomes.add("loaded")
        except ValueError as error:
            assert "model.safetensors: " in str(error) and str(error).isprintable() and len(str(error)) < 700, seed
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def load_any(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils.load_pretrained_weights(tiny(), path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "3", "[" * 100_000, '{"arch": "resnet"}', '{"spacing": [NaN, 1, 1]}', '{"clip_range": 1e999}'],
)
def test_safetensors_with_a_config_that_is_none(text, tmp_path):
    import safetensors.torch

    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(dict(TEACHER), path, {SAFETENSORS_CONFIG: text, "config": "of another program"})
    with pytest.raises(UserError, match="model.safetensors: ") as error:
        load_encoder(str(path))
    assert str(error.value).isprintable() and len(str(error.value)) < 400
    safetensors.torch.save_file(dict(TEACHER), path, {"format": "pt", "config": "of another program"})
    assert load_file(path).keys() == TEACHER.keys()


def test_broken_safetensors_are_refused(tmp_path, monkeypatch):
    path, whole = tmp_path / "model.safetensors", safetensors_bytes(TEACHER)
    for content in (whole[:-1], whole[:100], b"", b"text", struct.pack("<Q", 1 << 60) + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors: can't be read as a checkpoint"):
            utils.load_file(path)
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="safetensors is not installed"):
        utils.load_file(path)


# ------------------------------------------------------------------------------------------------------------ refusals


def twice(state, first, second):
    return put(first, state) | put(second, STUDENT)


HUGGING_FACE = renamed(
    TEACHER, ("blocks.", "encoder.layer."), ("attn.qkv", "attention.qkv"), ("mlp.fc1", "intermediate")
)
REFUSED = {  # what the file holds, the key, what the message says
    "two in one key": (BOTH["dinov2"][0], "model", r"'model' means 2 networks in it, model.teacher.backbone, model"),
    "two without roles": ({"a": TEACHER, "b": STUDENT}, "teacher", "has no 'teacher', only a, b; name one, .*_key a$"),
    "teacher and ema": ({"teacher": TEACHER, "ema": STUDENT}, "momentum", "means 2 networks in it, teacher, ema; name"),
    "only a student": ({"student": STUDENT}, "teacher", "has no 'teacher', only student; name one"),
    "only a teacher": ({"teacher": TEACHER}, "student", "has no 'student', only teacher; name one"),
    "half a teacher beside a whole network": (
        {"model": STUDENT, "teacher": dict(list(TEACHER.items())[:8])},
        "teacher",
        "has no 'teacher', only model",
    ),
    "an unknown key": ({"state_dict": TEACHER}, "weights", "has no 'weights', only state_dict; name one"),
    "two behind one wrapper": ({"teacher": twice(TEACHER, "module.", "")}, "teacher", "two tensors each .* cls_token"),
    "Hugging Face": (
        put("vit.", HUGGING_FACE),
        "teacher",
        "does not fit the model: without blocks.0.* 20 more; it has tensors such as vit.cls_token",
    ),
    "two-dimensional timm": (
        timm(TEACHER | {"patch_embed.proj.weight": torch.zeros(12, 3, 16, 16)}),
        "teacher",
        r"patch_embed.proj.weight \(12, 3, 16, 16\) instead of \(12, 1, 12, 12, 6\)",
    ),
    "layer scale": (
        TEACHER | {f"blocks.{i}.ls1.gamma": torch.ones(12) for i in range(2)},
        "teacher",
        "does not fit the model: with the unknown blocks.0.ls1.gamma, blocks.1.ls1.gamma",
    ),
    "more blocks": (tiny(depth=3).state_dict(), "teacher", "with the unknown blocks.2.norm1.weight"),
    "register tokens": (TEACHER | {"register_tokens": torch.ones(1, 4, 12)}, "teacher", "unknown register_tokens"),
    "a norm before the blocks": (TEACHER | {"norm_pre.weight": torch.ones(12)}, "teacher", "unknown norm_pre.weight"),
    "rotary positions": (TEACHER | {"rope_embed.periods": torch.ones(4)}, "teacher", "unknown rope_embed.periods"),
    "a bias by position": (TEACHER | {"rel_pos_bias.table": torch.ones(9, 3)}, "teacher", "unknown rel_pos_bias.table"),
    "a norm at the input": (TEACHER | {"ln_in.weight": torch.ones(12)}, "teacher", "unknown ln_in.weight"),
    "positions in time": (TEACHER | {"temporal_embedding": torch.ones(12)}, "teacher", "unknown temporal_embedding"),
    "a bias of attention": (TEACHER | {"attn_bias": torch.ones(3, 9, 9)}, "teacher", "unknown attn_bias"),
    "dinov3's tokens": (TEACHER | {"storage_tokens": torch.ones(1, 4, 12)}, "teacher", "unknown storage_tokens"),
    "an average as a list beside the network": (
        {"state_dict": STUDENT, "ema": {"decay": 0.99, "shadow_params": list(TEACHER.values())}},
        "teacher",
        "has no 'teacher', only state_dict",
    ),
    "without storage": (
        TEACHER | {"norm.bias": torch.ones(12, device="meta")},
        "teacher",
        "does not fit the model: Cannot copy out of meta",
    ),
    "complex": (TEACHER | {"norm.bias": torch.ones(12) * 1j}, "teacher", "norm.bias of complex64"),
    "nested": (
        TEACHER | {"norm.bias": torch.nested.nested_tensor([torch.ones(6)] * 2, layout=torch.strided)},
        "teacher",
        "without norm.bias",
    ),
    "an empty dict": ({}, "teacher", "it has nothing"),
    "whole numbers": (
        TEACHER | {"norm.weight": torch.ones(12, dtype=torch.int8)},
        "teacher",
        "does not fit the model: with norm.weight of int8",
    ),
    "not finite": (TEACHER | {"norm.bias": torch.full((12,), torch.inf)}, "teacher", "not finite .* in norm.bias"),
    "sparse": (TEACHER | {"norm.bias": torch.ones(12).to_sparse()}, "teacher", "does not fit the model"),
    "no weights": ({"epoch": 3}, "teacher", "it has no tensors, only epoch"),
    "a tensor": (torch.ones(2), "teacher", "holds a Tensor, expected a checkpoint's dict"),
    "no dict": ([TEACHER], "teacher", "holds a list, expected a checkpoint's dict"),
    "a name with control characters": (
        {"\x1b[31mred\nline": TEACHER, "b": STUDENT},
        "teacher",
        r"has no 'teacher', only \?\[31mred line, b; name",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_is_there(name, tmp_path):
    content, key, says = REFUSED[name]
    torch.save(content, tmp_path / "file.pth")
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=says) as caught:
        utils.load_pretrained_weights(model, tmp_path / "file.pth", key)
    assert str(caught.value).isprintable()
    with pytest.raises(UserError, match="--pretrained_weights .*file.pth"):
        load_encoder(str(tmp_path / "file.pth"), key, GIVEN | {"patch_size": list(PATCH), "input_size": list(SIZE)})
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("name", [name for name in BOTH if name != "plain, one without prefix"])
def test_the_key_that_a_refusal_suggests_works(name, tmp_path):
    torch.save(BOTH[name][0], tmp_path / "file.pth")
    with pytest.raises(ValueError, match="--checkpoint_key") as caught:
        utils.load_pretrained_weights(tiny(), tmp_path / "file.pth", "nothing")
    assert same(load(tmp_path / "file.pth", str(caught.value).split("--checkpoint_key ")[1]), TEACHER)


class Config:
    """What a checkpoint of another project may hold."""


def test_the_type_that_stands_in_the_way_is_named(tmp_path):
    where = f"{Config.__module__}.Config"
    protocol4 = pickle.dumps({"teacher": [1.0]}, 4)
    for name, content, says in (
        ("object", {"teacher": TEACHER, "args": Config()}, f"it holds a `{where}`"),
        ("module", {"model": nn.Linear(2, 2)}, "it holds a `torch.nn.modules.linear.Linear`"),
        ("function", {"teacher": TEACHER, "hook": json.dumps}, "it holds a `json.dumps`"),
        ("plain pickle", protocol4, "can't be read as a checkpoint"),
        ("text", b"not a checkpoint", "can't be read as a checkpoint"),
    ):
        path = tmp_path / "file.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=says.replace(".", r"\.")) as caught:
            utils.load_file(path)
        message = str(caught.value)
        assert message.isprintable() and len(message) < 400, name
        assert not any(word in message for word in ("weights_only", "safe_globals", "trust")), name
        assert ("torch.save({" in message) == ("holds" in message), name
    archive = io.BytesIO()
    np.savez(archive, a=np.ones(3))
    tape = io.BytesIO()
    tarfile.open(fileobj=tape, mode="w").close()
    for content, says in (
        (b"", "it is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it is a pointer of Git LFS"),
        (archive.getvalue(), "it is not what torch.save or safetensors writes"),
        (tape.getvalue(), "it is not what torch.save or safetensors writes"),
        (gzip.compress(b"abc"), "it is not what torch.save or safetensors writes"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is not what torch.save or safetensors writes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"file.pth: can't be read as a checkpoint ({says}")):
            utils.load_file(path)
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(ValueError, match="TorchScript archive.*torch.save"):
        utils.load_file(tmp_path / "script.pt")
    with pytest.raises(FileNotFoundError, match="is a folder, expected a file"):
        utils.load_file(tmp_path)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("kind", ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"])
def test_paths_of_any_system_load(kind, module, tmp_path):
    """By their names alone: a WindowsPath can't be made here, and Python 3.13 has another module."""
    pure = getattr(pathlib, kind if kind.startswith("Pure") else "Pure" + kind)
    torch.save({"args": argparse.Namespace(output_dir=pure("a") / "b")}, tmp_path / "pure.pth")
    with zipfile.ZipFile(tmp_path / "pure.pth") as source, zipfile.ZipFile(tmp_path / "file.pth", "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert f"cpathlib\n{pure.__name__}\n".encode() in content
                content = content.replace(f"cpathlib\n{pure.__name__}\n".encode(), f"c{module}\n{kind}\n".encode())
            target.writestr(entry.filename, content)
    found = utils.load_file(tmp_path / "file.pth")["args"].output_dir
    assert found == pure("a") / "b" and type(found) is pure


def test_a_file_that_refers_to_itself_ends_in_time(tmp_path):
    loop = {"a": {}, "b": {}}
    loop["a"].update({str(i): loop for i in range(40)})
    loop["b"].update({str(i): loop["a"] for i in range(40)})
    torch.save(loop, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="file.pth: (does not fit|has more than)"):
        utils.load_pretrained_weights(tiny(), tmp_path / "file.pth")


# --------------------------------------------------------------------------------------------------- position embedding


def interpolated(pos_embed, old, new):
    """By scipy, in float64: linear along each axis between the patches' centres, which lie at (i + 1/2) / n."""
    patches = pos_embed[0, 1:].double().numpy().reshape(*old, -1)
    at = np.meshgrid(*((np.arange(n) + 0.5) * o / n - 0.5 for o, n in zip(old, new)), indexing="ij")
    moved = [ndimage.map_coordinates(patches[..., c], at, order=1, mode="nearest") for c in range(patches.shape[-1])]
    return torch.cat((pos_embed[0, :1].double(), torch.from_numpy(np.stack(moved, -1).reshape(-1, len(moved)))))[None]


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """A function that writes a checkpoint of a small encoder of an input size, {"config", "teacher", "student"}."""

    def small(img_size, patch_size, **more):
        return tiny(img_size, patch_size)

    monkeypatch.setitem(ARCHITECTURES, "vit_tiny", small)

    def write(size, name="model.pth", **config):
        torch.manual_seed(1)
        model = MultiCropWrapper(tiny(size), DINOHead(12, 16))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        settings = {"arch": "vit_tiny", "patch_size": list(PATCH), "input_size": list(size)} | config
        torch.save({"student": put("module.", state), "teacher": state, "config": settings}, tmp_path / name)
        return str(tmp_path / name), state

    return write


def test_equal_sizes_load_to_the_last_bit(pretrained):
    path, state = pretrained(SIZE)
    for given in (GIVEN, GIVEN | {"input_size": list(SIZE)}):
        encoder = load_encoder(path, "teacher", given)
        assert same(put("backbone.", encoder.build().state_dict()), {k: v for k, v in state.items() if "backbone" in k})
        assert encoder.notices == (f"weights of {path}: key 'teacher', prefix 'backbone.'",)


@pytest.mark.parametrize(
    "old, new",
    [
        ((48, 24, 12), (24, 48, 12)),  # as many tokens
        ((24, 24, 12), (48, 36, 18)),
        ((72, 48, 12), (24, 24, 12)),
        ((12, 12, 6), (24, 36, 6)),
    ],
)
def test_another_input_size_interpolates_the_position_embedding(pretrained, old, new):
    path, state = pretrained(old)
    grids = [tuple(n // p for n, p in zip(size, PATCH)) for size in (old, new)]
    encoder = load_encoder(path, "student", GIVEN | {"input_size": list(new)})
    assert encoder.input_size == list(new)
    (first, said) = encoder.notices
    assert first.endswith("key 'student', prefix 'backbone.'")
    words = [" x ".join(map(str, sizes)) for sizes in (old, new, *grids)]
    assert said == (
        f"{path} was trained on {words[0]} voxels, this is {words[1]}: its position embedding is interpolated "
        f"(trilinear) from {words[2]} patches to {words[3]}"
    )
    found = encoder.build().state_dict()
    wanted = interpolated(state["backbone.pos_embed"], *grids)
    torch.testing.assert_close(found["pos_embed"].double(), wanted, atol=1e-5, rtol=0)
    assert torch.equal(found["pos_embed"][:, 0], state["backbone.pos_embed"][:, 0])  # the class token's
    others = {name: state["backbone." + name] for name in found if name != "pos_embed"}
    assert all(torch.equal(found[name], others[name]) for name in others)
    # the same as what the model of the old size does with such an input
    trained, volume = tiny(old), torch.randn(1, 1, *new)
    trained.load_state_dict({name: state["backbone." + name] for name in found})
    torch.testing.assert_close(encoder.build().eval()(volume), trained.eval()(volume))


def test_pretraining_starts_from_another_input_size(pretrained):
    """Backbone interpolated, head as it was."""
    path, state = pretrained((48, 24, 12))
    model = MultiCropWrapper(tiny((24, 48, 12)), DINOHead(12, 16, norm_last_layer=False))
    first, said = main_dino.load_initial_weights(model, path, "teacher")
    assert first == f"starting from {path}: key 'teacher', prefix 'backbone.'" and "interpolated" in said
    found = model.state_dict()
    pos_embed = found.pop("backbone.pos_embed")
    torch.testing.assert_close(
        pos_embed.double(), interpolated(state["backbone.pos_embed"], (4, 2, 2), (2, 4, 2)), atol=1e-5, rtol=0
    )
    assert same(found, {name: state[name] for name in found})


def test_pretraining_never_mixes_two_networks(tmp_path):
    """The backbone of one and the head of another would fit together."""
    torch.manual_seed(2)
    head = {name: torch.randn_like(tensor) for name, tensor in DINOHead(12, 16).state_dict().items()}
    other = {name: tensor + 1 for name, tensor in head.items()}
    files = {
        "solo-learn": put("backbone.", STUDENT) | put("head.", other) | put("momentum_backbone.", TEACHER),
        "lightly": put("teacher_backbone.", TEACHER) | put("student_head.", other) | put("student_backbone.", STUDENT),
    }
    for name, content in files.items():
        for more, says in (({}, "the head is new"), (put(name_of_head(content), head), "starting from /")):
            torch.save({"state_dict": content | more}, tmp_path / "file.pth")
            model = MultiCropWrapper(tiny(), DINOHead(12, 16, norm_last_layer=False))
            before = {key: tensor.clone() for key, tensor in model.head.state_dict().items()}
            notices = main_dino.load_initial_weights(model, str(tmp_path / "file.pth"), "teacher")
            assert says in notices[0], (name, notices)
            assert same(model.backbone.state_dict(), TEACHER)
            assert same(model.head.state_dict(), head if more else before)


def name_of_head(content):
    return "momentum_head." if "momentum_backbone.norm.bias" in content else "teacher_head."


@pytest.mark.parametrize("args", [{}, {"args": argparse.Namespace(arch="vit_tiny")}, {"config": {"input_size": "96"}}])
def test_without_a_known_grid_only_as_many_tokens_load(tmp_path, args):
    torch.save({"teacher": TEACHER} | args, tmp_path / "file.pth")
    assert same(load(tmp_path / "file.pth"), TEACHER)  # and says which grid it takes
    with pytest.raises(ValueError, match=r"pos_embed \(1, 9, 12\) instead of \(1, 17, 12\); .* --input_size"):
        utils.load_pretrained_weights(tiny((48, 24, 12)), tmp_path / "file.pth")


def test_older_args_tell_the_grid_too(tmp_path):
    torch.save({"teacher": TEACHER, "args": argparse.Namespace(input_size=SIZE)}, tmp_path / "file.pth")
    model = tiny((12, 48, 12))
    with pytest.warns(UserWarning, match="interpolated .trilinear. from 2 x 2 x 2 patches to 1 x 4 x 2"):
        utils.load_pretrained_weights(model, tmp_path / "file.pth")
    wanted = interpolated(TEACHER["pos_embed"], (2, 2, 2), (1, 4, 2))
    torch.testing.assert_close(model.state_dict()["pos_embed"].double(), wanted, atol=1e-5, rtol=0)


def test_other_patches_are_told_by_their_projection(pretrained):
    path, _ = pretrained(SIZE)
    with pytest.raises(UserError, match=r"patch_embed.proj.weight .*12, 12, 6\) instead of .*6, 12, 12\)"):
        main_dino.load_initial_weights(MultiCropWrapper(tiny(SIZE, (6, 12, 12)), DINOHead(12, 16)), path, "teacher")


def test_a_config_that_its_own_tensors_contradict(pretrained):
    path, _ = pretrained(SIZE, input_size=[48, 48, 12])
    with pytest.raises(UserError, match=r"pos_embed \(1, 9, 12\), where its config says an input of 48 48 12 voxels"):
        load_encoder(path, "teacher", GIVEN)


# ------------------------------------------------------------------------------------------------------------- scripts


def test_the_flag_is_explained_alike_in_all_scripts():
    parser = argparse.ArgumentParser()
    command_line.checkpoint_key_flag(parser)
    text = parser.format_help()
    assert all(word in text for word in ("teacher", "student", "ema", "momentum"))
