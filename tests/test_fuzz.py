"""Malformed inputs of every kind through every reader: a normal result or a refusal in one line, and nothing else.

    FUZZ=2000 python -m pytest -s tests/test_fuzz.py    the long form; 220 inputs without it
    python tests/test_fuzz.py FOLDER 17 1026            some inputs again, by their seeds; those with problems stay

A seed gives the kind of file and what is done to it. Inputs are read in another process with bounded memory, so that a
crash or a hang is noticed, and known by its seed; a file that is not read as it should be stays where it was.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import random
import re
import resource
import selectors
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import h5py  # noqa: E402
import nibabel  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import SimpleITK as sitk  # noqa: E402
import torch  # noqa: E402

import utils  # noqa: E402
from dino3d.command_line import UserError  # noqa: E402
from dino3d.data import dicom, images, itk  # noqa: E402
from dino3d.data.conventions import DataError  # noqa: E402
from dino3d.data.hdf5 import write_volume  # noqa: E402
from dino3d.data.layouts import (  # noqa: E402
    find_task,  # noqa: E402
    list_volumes,
    read_data_list,
)
from dino3d.data.scans import find_scans  # noqa: E402
from dino3d.data.volume import Volume  # noqa: E402
from dino3d.features.encoder import ENCODER, PretrainedEncoder, load_encoder  # noqa: E402
from dino3d.files import truncate_log  # noqa: E402
from dino3d.finetune.splits import make_splits  # noqa: E402
from dino3d.prepare import (
    conversion,  # noqa: E402
    luna16,  # noqa: E402
)
from dino3d.training import checkpoint  # noqa: E402

INPUTS = int(os.environ.get("FUZZ", 220))
# Seeds by which faults of ours were found that are mended. Another fuzzer would make other inputs of them. None
# that ends the process of a library by itself is kept
FOUND = [
    14,
    87,
    119,
    134,
    198,
    255,
    303,
    597,
    615,
    645,
    735,
    998,
    1026,
    1118,
    1265,
    1456,
    2037,
    2253,
    2443,
    3351,
    3653,
    4142,
    4622,
    4647,
]
SECONDS = 30  # that one input may take on a busy machine
MEMORY = 1 << 30  # bytes of addresses that reading may take beyond those of the imports
NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    100,
    127,
    128,
    255,
    256,
    32767,
    -32768,
    65535,
    2**31 - 1,
    -(2**31),
    2**32,
    2**63 - 1,
    1e30,
    -1e30,
    1e-30,
    0.5,
    float("nan"),
    float("inf"),
    -float("inf"),
]
VALUES = [
    None,
    True,
    -1,
    0,
    3.5,
    10**30,
    float("nan"),
    "",
    "x",
    "x" * 5000,
    "\0",
    "../../x",
    "\n",
    "ü\ud800",
    [],
    [[]],
    [None],
    {},
    {"a": None},
    [1, "a"],
    {"image": 5},
]
RNG = np.random.default_rng(0)
SHAPE = (9, 8, 7)
VOXELS = RNG.integers(-1000, 400, SHAPE).astype(np.int16)
LABELS = (VOXELS > 0).astype(np.uint8)
AFFINE = np.array([[0, -1.2, 0, 5], [0.8, 0, 0, -3], [0, 0, 2.5, 100], [0, 0, 0, 1.0]])
SPLITS = {
    "data": {
        "folds": "patients",
        "k_fold": 2,
        "num_test": None,
        "seed": 0,
        "cases": [2, 2],
        "patients": 4,
        "window": 3,
        "files": {"a": "9 bytes, 0a1b2c3d"},
    },
    "splits": [
        {"train": ["a"], "validation": ["b"], "test": ["c", "d"]},
        {"train": ["b"], "validation": ["a"], "test": ["c", "d"]},
    ],
}
INDEX = {
    "name": "Lung",
    "labels": {"0": "background", "1": "cancer"},
    "training": [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in range(3)],
}
POINTS = [
    ["seriesuid", "coordX", "coordY", "coordZ", "class"],
    ["1.2", "-1.5", "2", "3e1", "0"],
    ["1.2", "7", "8", "9", "1"],
    ["1.3", "-10.25", "20", "30", "0"],
]
NODULES = [
    ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"],
    ["1.2", "7", "8", "9", "4.5"],
    ["1.4", "1", "2", "3", "6"],
]
MANIFEST = [
    ["source", "output", "status", "stamp", "bytes", "reason"],
    ["a", "a.nii.gz", "written", "0" * 16, "12", ""],
    ["b", "", "left out", "1" * 16, "", "too few slices"],
]
CONFIG = {
    "arch": "vit_tiny",
    "patch_size": [8, 8, 8],
    "input_size": [16, 16, 16],
    "clip_range": [-1000.0, 1000.0],
    "spacing": None,
    "epochs": 3,
}


# ----------------------------------------------------------------------------------------------------- the sound files


@cache
def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))


@cache
def small_state():
    encoder = PretrainedEncoder(**{name: CONFIG[name] for name in ENCODER}).build()
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": np.float64(0.1), "params": [0]}]}
    return {
        "teacher": {"backbone." + name: value for name, value in encoder.state_dict().items()}
        | {"0.weight": torch.ones(3, 4)},
        "student": small_model().state_dict(),
        "optimizer": optimizer,
        "epoch": 3,
        "config": dict(CONFIG),
    }


def image(voxels=VOXELS):
    return images.make_image(voxels, AFFINE)


def text_of_table(rows):
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()


def sound(kind, folder):
    """Write one sound file (with what belongs to it) into the folder; its path, which is the one to be damaged."""
    path = folder / KINDS[kind][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("hdf5", "hdf5 gzip"):
        write_volume(path, VOXELS, AFFINE, "gzip" if "gzip" in kind else "blosc")
    elif kind in ("nifti", "nifti gz"):
        nibabel.save(nibabel.Nifti1Image(VOXELS, AFFINE), path)
    elif kind in ("nifti label", "hdf5 label"):
        sitk.WriteImage(image(LABELS), str(path), useCompression=True)
    elif kind in ("hdf5 itk", "mha", "mhd", "nrrd"):
        sitk.WriteImage(image(), str(path))
    elif kind in ("mha gz", "nrrd gz", "mhd gz"):
        sitk.WriteImage(image(), str(path), useCompression=True)
    elif kind == "dicom":
        from raw_inputs import write_series

        write_series(path.parent, n=4)
    elif kind in ("pth", "pth legacy"):
        torch.save(small_state(), path, _use_new_zipfile_serialization=kind == "pth")
    elif kind in ("splits", "index"):
        path.write_text(json.dumps(SPLITS if kind == "splits" else INDEX))
    elif kind == "list":
        path.write_text(f"# volumes below {folder}\na/t0/x.hdf5\nb/t0/y.hdf5\n")
    elif kind == "log":
        path.write_text('{"epoch": 1, "step": 2, "kl": 0.5}\n{"epoch": 2, "step": 4, "kl": 0.25}\n')
    else:
        path.write_bytes(
            text_of_table(
                {
                    "candidates": POINTS,
                    "annotations": NODULES,
                    "manifest": MANIFEST,
                    "patients": [["seriesuid", "patient"], ["1.2", "p"], ["1.3", "q"]],
                }[kind]
            )
        )
        if kind == "annotations":
            (folder / "candidates.csv").write_bytes(text_of_table(POINTS))
    return path


# -------------------------------------------------------------------------------------------------------------- damage


def damaged(rng, content):
    """Bytes with one to three changes: flips, numbers put in their place, blocks cut out or in, a cut-off end."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        size = len(content)
        at = rng.randrange(min(size, rng.choice([64, 512, 4096, 1 << 30]))) if size else 0
        how = rng.choice(["flip", "flip", "flip", "number", "number", "insert", "delete", "truncate"])
        if how == "flip":
            for i in range(at, min(at + rng.choice([1, 1, 2, 8, 64]), size)):
                content[i] ^= rng.choice([1, 2, 128, 255, rng.randrange(1, 256)])
        elif how == "number":
            code = rng.choice("<h >h <i >i <q >q <f <d".split())
            content[at : at + struct.calcsize(code)] = packed(code, rng.choice(NUMBERS))
        elif how == "insert":
            block = rng.choice([b"\0", b"\xff", b"9", b" ", b"\n", rng.randbytes(7), bytes(content[:at][-40:]) or b"x"])
            content[at:at] = block * rng.choice([1, 1, 3, 100])
        elif how == "delete":
            del content[at : at + rng.choice([1, 2, 16, 300])]
        else:
            del content[at:]
    return bytes(content)


def packed(code, value):
    """A number in the bytes of a struct code, as nearly as it can hold it."""
    if code[-1] in "fd":
        return struct.pack(code, max(min(float(value), 3e38), -3e38) if np.isfinite(value) else float(value))
    bits = 8 * struct.calcsize(code)
    value = 0 if not np.isfinite(value) else int(value)
    return struct.pack(code, (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1))


NIFTI_FIELDS = {
    "<i": [0],
    "<h": [*range(40, 56, 2), 70, 72, 252, 254],
    "<f": [*range(76, 108, 4), 108, 112, 116, *range(256, 328, 4)],
}


def damage_nifti(rng, content):
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        code = rng.choice(["<h", "<h", "<h", "<f", "<f", "<i"])
        at = rng.choice(NIFTI_FIELDS[code])
        content[at : at + struct.calcsize(code)] = packed(
            code, rng.choice([*NUMBERS, 4, 8, 16, 64, 128, 512, 768, 1536, 2048])
        )
    return bytes(content)


def damage_hdf5(rng, path):
    with h5py.File(path, "a") as file:
        group = file["ITKImage/0"]
        name = rng.choice(["VoxelData", "VoxelData", "Spacing", "Origin", "Directions"])
        old = group[name][()]
        del group[name]
        how = rng.choice(["gone", "group", "type", "shape", "value", "huge", "link"])
        if how == "group":
            group.create_group(name)
        elif how == "type":
            kind = rng.choice(["S5", "f2", "f8", "u8", "c16", "?", "O", "V6", "text", "empty", "compound", "reference"])
            if kind == "text":
                group[name] = "text"
            elif kind == "empty":
                group[name] = h5py.Empty("f8")
            elif kind == "O":
                group.create_dataset(name, shape=old.shape, dtype=h5py.string_dtype())
            elif kind == "reference":
                group.create_dataset(name, shape=old.shape, dtype=h5py.ref_dtype)
            elif kind == "compound":
                group.create_dataset(name, shape=old.shape, dtype=[("a", "i2"), ("b", "f4")])
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    group[name] = np.zeros(old.shape, kind) if kind[0] in "SV" else old.astype(kind)
        elif how == "shape":
            shape = [rng.choice([0, 1, 2, 3, 4, 7]) for _ in range(rng.choice([0, 1, 2, 3, 3, 4, 5]))]
            group[name] = np.resize(old, shape)
        elif how == "value":
            wrong = old.astype(rng.choice(["f4", "f8"]))
            for _ in range(rng.choice([1, 1, 3, 9])):
                wrong.flat[rng.randrange(wrong.size)] = rng.choice(NUMBERS)
            group[name] = wrong
        elif how == "huge":  # of which nothing is stored
            side = rng.choice([10**3, 10**5, 2**31, 2**40])
            group.create_dataset(name, shape=(side,) * old.ndim, dtype=old.dtype, chunks=(8,) * old.ndim)
        elif how == "link":
            group[name] = rng.choice(
                [
                    h5py.SoftLink(f"/ITKImage/0/{name}"),
                    h5py.SoftLink("/"),
                    h5py.ExternalLink("/dev/null", "/x"),
                    h5py.ExternalLink(str(path), "/ITKImage"),
                ]
            )


# What ITK reads or answers with an error. There are other values by which it ends the process
HARMLESS = {b"NDims": [b"0", b"x", b"03"], b"ElementDataFile": [b"LIST", b"x", b"a%%.raw"]}


def damage_lines(rng, content, separators=(b"=", b":")):
    """Another value in some lines of the text header of a MetaImage or NRRD file."""
    end = (
        content.find(b"\n\n") if content.startswith(b"NRRD") else content.find(b"\n", content.find(b"ElementDataFile"))
    )
    end = len(content) if end < 0 else end
    lines = content[:end].split(b"\n")
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(lines))
        key, separator, value = next((lines[i].partition(s) for s in separators if s in lines[i]), (lines[i], b"", b""))
        words = value.split() or [b""]
        words[rng.randrange(len(words))] = rng.choice(
            [
                *(str(number).encode() for number in NUMBERS),
                b"",
                b"x",
                b"MET_DOUBLE",
                b"MET_OTHER",
                b"double",
                b"block",
                b"bzip2",
                b"LIST",
                b"LOCAL",
                b"(1,2",
                b"(nan,0,0)",
                b"None",
                b"/dev/null",
                b"9" * 400,
                b"True",
                b"2 3 4 5 6 7 8 9",
            ]
        )
        lines[i] = rng.choice([key + separator + b" " + b" ".join(words), key, b"", lines[i] + b"\n" + lines[i]])
        if key.strip() in HARMLESS:
            lines[i] = key + separator + b" " + rng.choice(HARMLESS[key.strip()])
    return b"\n".join(lines) + content[end:]


def damage_dicom(rng, path):
    """Elements of the header removed, repeated, out of order, or with other values; their lengths stay true."""
    import pydicom

    content = path.read_bytes()
    start = 128 + 4 + 12 + int.from_bytes(content[140:144], "little")  # behind the file meta information
    elements, at = [], start
    while at < len(content):  # explicit VR, little endian
        long = content[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        length = int.from_bytes(content[at + 8 : at + 12] if long else content[at + 6 : at + 8], "little")
        end = at + (12 if long else 8) + length
        elements.append(content[at:end])
        at = end
    for _ in range(rng.randint(1, 4)):
        i, j = rng.randrange(len(elements)), rng.randrange(len(elements))
        how = rng.choice(["gone", "again", "again with another value", "moved", "swapped", "value"])
        if how == "gone" and len(elements) > 1:
            del elements[i]
        elif how == "again":
            elements.insert(j, elements[i])
        elif how == "moved":
            elements.insert(j, elements.pop(i))
        elif how == "swapped":
            elements[i], elements[j] = elements[j], elements[i]
        elif len(elements[i]) < 1000:
            text = rng.choice(["", "x", "\\", "9" * 70, "ü", "1\\2\\3\\4", *map(str, NUMBERS)]).encode()
            value = rng.choice([text + b" " * (len(text) % 2), *(bytes([n, n]) for n in (0, 1, 8, 15, 255)), b"\0" * 4])
            changed = elements[i][:6] + len(value).to_bytes(2, "little") + value
            elements[i:i] = [changed]
            if how == "value":
                del elements[i + 1]
    path.write_bytes(content[:start] + b"".join(elements))
    if rng.random() < 0.2:
        with contextlib.suppress(Exception):  # what pydicom itself would not write
            one = pydicom.dcmread(path)
            del one.file_meta, one.preamble
            pydicom.dcmwrite(path, one, implicit_vr=True, little_endian=True, force_encoding=True)


def damage_tree(rng, tree, values):
    """One node of lists and dicts replaced, renamed or removed."""
    at = tree
    while True:
        places = list(at) if isinstance(at, dict) else list(range(len(at)))
        place = rng.choice(places)
        if isinstance(at[place], (dict, list)) and at[place] and rng.random() < 0.8:
            at = at[place]
            continue
        how = rng.choice(["value", "value", "value", "gone", "renamed"])
        if how == "value":
            at[place] = rng.choice(values)
        elif isinstance(at, dict) and how == "renamed":
            at[rng.choice(["x", "", "0", 5])] = at.pop(place)
        else:
            del at[place]
        return tree


def damage_json(rng, content):
    tree = json.loads(content)
    return json.dumps(rng.choice(VALUES) if rng.random() < 0.1 else damage_tree(rng, tree, VALUES)).encode()


def damage_table(rng, content):
    rows = [row.split(",") for row in content.decode().splitlines()]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = rng.choice(
            [*map(str, NUMBERS), "", "x", '"', '"a', "x" * 200_000, "\0", "\r", ",,", ";", "ü", "1e999", "../x"]
        )
    return "\n".join(map(",".join, rows)).encode()


def damage_weights(rng, path, legacy):
    state = torch.load(path, weights_only=False)
    wrong = [
        *(value for value in VALUES if not isinstance(value, str) or "\ud800" not in value),
        torch.ones(2),
        torch.ones(0),
        torch.full((3, 4), float("nan")),
        np.float64(3),
        torch.ones(3, 4).to_sparse(),
        torch.ones(3, 4, dtype=torch.int8),
    ]
    torch.save(
        rng.choice(wrong) if rng.random() < 0.1 else damage_tree(rng, state, wrong),
        path,
        _use_new_zipfile_serialization=not legacy,
    )


def damage_pickle(rng, content):
    """The same zip file with its data.pkl damaged, which checksums don't tell."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(result, "w") as after:
        for name in before.namelist():
            inside = before.read(name)
            after.writestr(name, damaged(rng, inside) if name.endswith("data.pkl") else inside)
    return result.getvalue()


def damage(kind, rng, path):
    """Damage the file of this kind; says how."""
    how = "fields" if rng.random() < 0.5 else "bytes"
    family = KINDS[kind][1]
    if how == "bytes":
        if family == "pth" and kind == "pth" and rng.random() < 0.6:
            path.write_bytes(damage_pickle(rng, path.read_bytes()))
        elif kind == "nifti gz" and rng.random() < 0.5:
            path.write_bytes(gzip.compress(damaged(rng, gzip.decompress(path.read_bytes())), 1))
        else:
            path.write_bytes(damaged(rng, path.read_bytes()))
    elif family == "hdf5":
        damage_hdf5(rng, path)
    elif family == "dicom":
        damage_dicom(rng, path)
    elif family == "pth":
        damage_weights(rng, path, kind == "pth legacy")
    elif family == "nifti" and path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(damage_nifti(rng, gzip.decompress(path.read_bytes())), 1))
    else:
        change = {
            "nifti": damage_nifti,
            "header": damage_lines,
            "json": damage_json,
            "table": damage_table,
            "text": damage_table,
        }[family]
        path.write_bytes(change(rng, path.read_bytes()))
    return how


# ------------------------------------------------------------------------------------------------------------- readers


def whole(path):
    with Volume(path) as volume:
        return volume.read(), volume.affine, volume.is_constant()


def part(path):
    with Volume(path) as volume:
        return volume.read((-1, 2, 1), (4, 3, 9))


def labels(path):
    with Volume(path) as volume:
        return volume.read_labels()


def series(path):
    found = find_scans(path.parent)
    voxels = []
    for one in (*found.scans, *found.problems):
        if one.problem:
            raise one.problem
        with Volume(path.parent / one.name) as volume:
            voxels.append(volume.read())
    return voxels


def weights(path):
    return utils.load_pretrained_weights(small_model(), path, "student")


def saved(path):
    return checkpoint.load_checkpoint(path, {"arch": "vit_tiny", "patch_size": [8, 8, 8]})


def splits(path):
    return make_splits(path, "patients", 2, None, 0, list("abcd"), [0, 1, 0, 1], None, ["window"])


def listed(path):
    return read_data_list(path), list_volumes(path.parent, path)


def ct(path):
    return images.read_image(str(path))


def mask(path):
    with Volume(path) as volume:
        return volume.read_labels([0, 1])


SCAN, MASK, RAW = (
    [(reader, DataError) for reader in readers] for readers in ((whole, part, ct), (labels, mask), (ct,))
)
WEIGHTS = [
    (utils.load_file, (ValueError, FileNotFoundError)),
    (weights, (ValueError, FileNotFoundError)),
    (saved, UserError),
    (lambda path: load_encoder(path), UserError),
]
KINDS = {  # file, family, [(reader, what it may raise)]
    "hdf5": ("scan.hdf5", "hdf5", SCAN),
    "hdf5 gzip": ("scan.hdf5", "hdf5", SCAN),
    "hdf5 itk": ("scan.hdf5", "hdf5", SCAN),
    "hdf5 label": ("mask.h5", "hdf5", MASK),
    "nifti": ("scan.nii", "nifti", SCAN),
    "nifti gz": ("scan.nii.gz", "nifti", SCAN),
    "nifti label": ("mask.nii.gz", "nifti", MASK),
    "mha": ("scan.mha", "header", RAW),
    "mha gz": ("scan.mha", "header", RAW),
    "mhd": ("scan.mhd", "header", RAW),
    "mhd gz": ("scan.mhd", "header", RAW),
    "nrrd": ("scan.nrrd", "header", RAW),
    "nrrd gz": ("scan.nrrd", "header", RAW),
    "dicom": ("01.dcm", "dicom", [(lambda path: dicom.read_header(str(path)), DataError), (series, DataError)]),
    "pth": ("weights.pth", "pth", WEIGHTS),
    "pth legacy": ("weights.pth", "pth", WEIGHTS),
    "candidates": (
        "candidates.csv",
        "table",
        [
            (lambda path: luna16.read_points(path, "class"), UserError),
            (lambda path: luna16.read_candidates(path.parent), UserError),
        ],
    ),
    "annotations": ("annotations.csv", "table", [(lambda path: luna16.read_candidates(path.parent), UserError)]),
    "patients": ("patients.csv", "table", [(luna16.read_patients, UserError)]),
    "manifest": ("manifest.csv", "table", [(lambda path: conversion.Records(path.parent).earlier, UserError)]),
    "index": ("dataset.json", "json", [(lambda path: find_task(path.parent), DataError)]),
    "splits": ("splits.json", "json", [(splits, UserError)]),
    "list": ("data_list.txt", "text", [(listed, DataError)]),
    "log": ("log.txt", "text", [(lambda path: truncate_log(path, 3), ())]),
}


def read_damaged(seed, folder):
    """(kind, how, outcomes, problems) of the input that a seed stands for."""
    rng = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    path = sound(kind, folder)
    how, outcomes, problems = damage(kind, rng, path), [], []
    for reader, expected in KINDS[kind][2]:
        try:
            reader(path)
            outcomes.append("read")
        except expected as error:
            outcomes.append("refused")
            named = path.name in str(error) or path.parent.name in str(error)
            if len(str(error).splitlines()) != 1 or not named or len(str(error)) > 700:
                problems.append(f"message: {str(error)!r:.900}")
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(one.filename).name}:{one.lineno}" for one in at if "site-packages" not in one.filename]
            problems.append(f"{type(error).__name__}: {str(error)!r:.300} at {' '.join(ours[-3:])}")
    return kind, how, outcomes, problems


def child(folder, seeds):
    """Read the inputs of some seeds; a line of JSON before and after each. Files of those with problems stay."""
    import shutil

    import hdf5plugin  # noqa: F401
    import pydicom  # noqa: F401

    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what readers print is no line of ours
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for kind in KINDS:  # what is imported and allocated once
        with tempfile.TemporaryDirectory() as temporary:
            path = sound(kind, Path(temporary) / "s")
            for reader, _ in KINDS[kind][2]:
                reader(path)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for seed in seeds:
        here = Path(folder) / f"seed{seed}"
        print(json.dumps({"seed": seed}), file=lines)
        kind, how, outcomes, problems = read_damaged(seed, here)
        print(
            json.dumps(
                {
                    "seed": seed,
                    "kind": kind,
                    "how": how,
                    "outcomes": outcomes,
                    "problems": problems,
                    "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                }
            ),
            file=lines,
        )
        if not problems:
            shutil.rmtree(here)


def fuzz(seeds, folder):
    """[result] of all seeds; one without "kind" where the process crashed or hung on it, with what it said in
    "problems"."""
    results, left = [], list(seeds)
    while left:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, __file__, str(folder), *map(str, left)],
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            started, why = None, ""
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    if not selector.select(SECONDS if started is not None else 300):
                        why = f"took more than {SECONDS} s"
                        process.kill()
                        break
                    line = process.stdout.readline()
                    if not line:
                        break
                    record = json.loads(line)
                    started = record["seed"]
                    if "kind" in record:
                        results.append(record)
            process.stdout.close()
            code = process.wait()
            errors.seek(0)
            text = errors.read().decode(errors="replace")[-600:]
        if started is None:
            raise RuntimeError(f"the reading process does not start: {text}")
        if not results or results[-1]["seed"] != started:
            results.append({"seed": started, "problems": [why or f"ended with {code}: {text}"], "outcomes": []})
        elif code:
            raise RuntimeError(f"the reading process ended with {code} after seed {started}: {text}")
        left = left[left.index(started) + 1 :]
    return results


def test_malformed_inputs_are_read_or_refused_in_one_line(tmp_path):
    seeds = [*range(INPUTS), *(seed for seed in FOUND if seed >= INPUTS)]
    began, results = time.monotonic(), fuzz(seeds, tmp_path)
    outcomes = Counter(outcome for result in results for outcome in result["outcomes"])
    print(
        f"\n{len(results)} malformed files, {outcomes.total()} readings: {outcomes['refused']} refused, "
        f"{outcomes['read']} "
        f"read; at most {max(result.get('rss', 0) for result in results)} MB, {time.monotonic() - began:.0f} s"
    )
    wrong = [
        f"seed {result['seed']} ({result.get('kind')}, {result.get('how')}): {problem}"
        for result in results
        for problem in result["problems"]
    ]
    assert not wrong, f"files are in {tmp_path}\n" + "\n".join(wrong)
    assert [result["seed"] for result in results] == seeds and {result["kind"] for result in results} == set(KINDS)
    assert outcomes["refused"] > INPUTS / 2 and outcomes["read"] > INPUTS / 20  # damage that does some


# ------------------------------------------------------------------------------------------------- MetaImage's headers

# By some headers ITK ends the process, so itk.read_itk_header lets it see one of few kinds. None of those is
# kept here: ITK reads all headers below or answers with an error, and the strictness towards them is what keeps the
# others out.
HEADER = """ObjectType = Image
NDims = 3
BinaryData = True
CompressedData = False
ElementSpacing = 1 1 1
DimSize = 9 8 7
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""
NO_SIZE = {"DimSize = 9 8 7\n": ""}  # ITK gives up before it looks for voxels
UNSOUND = {  # name: ({part of HEADER: what stands there}, what is wrong)
    "no axes": ({"= 3": "= 0"}, "NDims in its header is '0'"),
    "too many axes": ({"= 3": "= 10"}, "NDims in its header is '10'"),
    "a word": ({"= 3": "= x"}, "NDims in its header is 'x'"),
    "a fraction": ({"= 3": "= 3.5"}, "NDims in its header is '3.5'"),
    "a sign": ({"= 3": "= +3"}, "NDims in its header is '+3'"),
    "two digits": ({"= 3": "= 03"}, "NDims in its header is '03'"),
    "two numbers": ({"= 3": "= 3 4"}, "NDims in its header is '3 4'"),
    "no number": ({"= 3": "="}, "NDims in its header is ''"),
    "no NDims": ({"NDims = 3\n": ""}, "NDims in its header is missing"),
    "NDims too far on": ({"NDims": "Comment = x\n" * 6000 + "NDims"}, "NDims in its header is missing"),
    "the first of two": ({"NDims = 3": "NDims = 03\nNDims = 3"}, "NDims in its header is '03'"),
    "the last of two": ({"NDims = 3": "NDims = 3\nNDims = 03"}, "NDims in its header is '03'"),
    "indented": ({"NDims = 3": "NDims = 3\n \tNDims = 03"}, "NDims in its header is '03'"),
    "colon": ({"NDims = 3": "NDims = 3\nNDims : 03"}, "NDims in its header is '03'"),
    "neither": ({"NDims = 3": "NDims = 3\nNDims 03"}, "NDims in its header is '03'"),
    "no blanks": ({"NDims = 3": "NDims = 3\nNDims=03"}, "NDims in its header is '03'"),
    "a percent sign": ({"LOCAL": "a%%.raw"}, "ElementDataFile in its header is 'a%%.raw'"),
    "a zero byte": ({"LOCAL": "a.raw\0"}, r"ElementDataFile in its header is 'a.raw\x00'"),
    "no file": ({"= LOCAL": "=", **NO_SIZE}, "ElementDataFile in its header is ''"),
    "blanks": ({"= LOCAL": "= \t", **NO_SIZE}, "ElementDataFile in its header is ''"),
    "name only": ({" = LOCAL": "", **NO_SIZE}, "ElementDataFile in its header is ''"),
    "no ElementDataFile": ({"ElementDataFile = LOCAL\n": ""}, "ElementDataFile in its header is missing"),
}


def header_with(changes):
    header = HEADER
    for old, new in changes.items():
        assert header.count(old) == 1
        header = header.replace(old, new)
    return header.encode()


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".MHA", ".MHD"])
@pytest.mark.parametrize("changes, wrong", UNSOUND.values(), ids=UNSOUND)
def test_unsound_metaimage_headers_are_refused_before_itk(changes, wrong, suffix, tmp_path, monkeypatch):
    for name in ("Execute", "ReadImageInformation"):
        monkeypatch.setattr(sitk.ImageFileReader, name, lambda self: pytest.fail("ITK saw it"))
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(header_with(changes) + VOXELS.tobytes(order="F"))
    for read in (itk.read_itk_header, Volume):
        with pytest.raises(DataError) as error:
            read(str(path))
        assert error.value.reason == f"can't be read: {wrong}"


PACKED = {"CompressedData = False": "CompressedData = True\nCompressedDataSize = SIZE"}
SOUND = {  # name: {part of HEADER: what stands there}; voxels are behind it, or in the file that it names
    "plain": {},
    "in a file": {"LOCAL": "a.raw"},
    "compressed": PACKED,
    "compressed in a file": PACKED | {"LOCAL": "a.zraw"},
    "a name with blanks": {"LOCAL": "my scan.raw"},
    "a name of other letters": {"LOCAL": "Müller.raw"},
    "colons": {"NDims =": "NDims :", "ElementDataFile =": "ElementDataFile :"},
    "no blanks": {"NDims = 3": "NDims=3", "ElementDataFile = ": "ElementDataFile="},
    "blanks": {"NDims = 3": " \tNDims\t =\t 3 \t", "ElementDataFile = ": " \tElementDataFile\t =\t "},
    "line breaks of Windows": {"3\n": "3\r\n", "7\n": "7\r\n", "LOCAL\n": "a.raw\r\n"},
    "one frame": {"NDims = 3": "NDims = 4", "9 8 7": "9 8 7 1", "1 1 1": "1 1 1 1"},
    "twice": {"NDims = 3": "NDims = 3\nNDims = 3"},
    "comments": {"NDims": "Comment = 100% of ElementDataFile, NDims = x\n" * 9 + "NDims"},
    "voxels like lines": {},
    "voxels like lines, indented": {"ElementDataFile": " \tElementDataFile"},
}


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
@pytest.mark.parametrize("name", SOUND)
def test_sound_metaimage_headers_are_read_as_itk_reads_them(name, suffix, tmp_path):
    path, header = tmp_path / f"scan{suffix}", header_with(SOUND[name])
    voxels = bytearray(VOXELS.tobytes(order="F"))
    if "like lines" in name:
        lines = b"\nNDims = x\nElementDataFile = a%%.raw\nNDims =\n"
        voxels[100 : 100 + len(lines)] = lines
    content = zlib.compress(voxels) if b"SIZE" in header else bytes(voxels)
    header = header.replace(b"SIZE", str(len(content)).encode())
    place = next((new.strip() for old, new in SOUND[name].items() if old.startswith("LOCAL")), None)
    path.write_bytes(header if place else header + content)
    if place:
        (tmp_path / place).write_bytes(content)
    stored, expected = itk.open_itk(path), sitk.ReadImage(str(path))
    expected = expected[..., 0] if expected.GetDimension() == 4 else expected
    found = stored.take((slice(None),) * 3)
    assert found.dtype == np.int16 and stored.shape == expected.GetSize()
    np.testing.assert_array_equal(stored.affine, images.affine_of(expected))
    np.testing.assert_array_equal(found, images.voxels_of(expected))
    np.testing.assert_array_equal(found, np.frombuffer(voxels, "<i2").reshape(SHAPE, order="F"))


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
def test_what_itk_writes_is_accepted(dtype, compressed, suffix, tmp_path):
    path, voxels = str(tmp_path / f"scan{suffix}"), (VOXELS % 128).astype(dtype)
    sitk.WriteImage(image(voxels), path, useCompression=compressed)
    np.testing.assert_array_equal(itk.open_itk(path).take((slice(None),) * 3), voxels)


@pytest.mark.parametrize("axes", range(1, 10))
def test_any_usual_number_of_axes_is_left_to_itk(axes, tmp_path):
    path = tmp_path / "scan.mha"
    path.write_bytes(header_with({"= 3": f"= {axes}"}))
    itk.read_itk_header(path)


if __name__ == "__main__":
    child(sys.argv[1], list(map(int, sys.argv[2:])))


def test_compressed_voxels_without_their_size_are_refused(tmp_path):
    """Behind a header ITK needs their size; in a file of their own it does not."""
    voxels = np.random.default_rng(0).integers(-1000, 400, (12, 14, 16)).astype(np.int16)
    for name, refused in (("scan.mha", True), ("scan.mhd", False)):
        path = tmp_path / name
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path), True)
        assert (itk.open_itk(path).take((slice(None),) * 3) == voxels.T).all()
        header = path.read_bytes()
        path.write_bytes(re.sub(rb"(?m)^CompressedDataSize *=.*\n", b"", header, count=1))
        assert len(path.read_bytes()) < len(header)
        if refused:
            with pytest.raises(DataError, match="CompressedDataSize"):
                itk.open_itk(path)
        else:
            assert (itk.open_itk(path).take((slice(None),) * 3) == voxels.T).all()
