"""What the README tells people to type is right: every command is parsed by the real parser, every snippet runs."""
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
# Commands stand in blocks without a language, between backticks where they name a script, and in the speed table
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines() if line.strip()]
LINES += [text for text in re.findall(r"`([^`\n]+)`", README) if re.match(r"(python|torchrun|make|srun) \S+", text)]


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_command_is_understood(line):
    words = shlex.split(line.replace("...", ""))
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
        return
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        assert words[0] == "tensorboard", f"no script in: {line}"
        return
    flags = words[words.index(script) + 1:]
    parser = importlib.import_module(Path(script).stem).get_args_parser()  # tests/ is on the path too
    if "--help" in flags:
        assert parser.format_help()
    else:
        parser.parse_args(flags)


def test_there_are_commands():
    assert len(LINES) > 8 and any("main_dino.py" in line for line in LINES)


def test_file_table_is_complete():
    named = set(re.findall(r"^\| `([\w/]+(?:\.py)?)/?` \|", README.split("## The files")[1], re.M))
    modules = [path.relative_to(ROOT) for path in ROOT.glob("dino3d/**/*.py") if path.name != "__init__.py"]
    assert {*(path.name for path in ROOT.glob("*.py")), *map(str, modules)} <= named


def snippet(word):
    return next(block for language, block in BLOCKS if language == "python" and word in block)


def test_encoder_snippet(tmp_path):
    from vision_transformer import vit_small
    state = {"backbone." + name: tensor for name, tensor in vit_small().state_dict().items()}
    torch.save({"teacher": state, "config": {}}, tmp_path / "checkpoint.pth")
    names = {}
    exec(snippet("get_last_selfattention").replace("/path/to/output", str(tmp_path)), names)
    assert torch.equal(names["encoder"].cls_token, state["backbone.cls_token"])
    assert names["embedding"].shape == (1, 384) and names["attention"].shape == (1, 6, 513, 513)
    assert [tuple(feature.shape) for feature in names["maps"]] == [(1, 384, 8, 8, 8)] * 4


def test_features_snippet(tmp_path):
    from test_main_lnc_luna16 import write_cases

    from vision_transformer import ARCHITECTURES
    write_cases(tmp_path / "data", 4)
    config = {"arch": "vit_tiny", "patch_size": [12, 12, 6], "input_size": [24, 24, 12], "clip_range": [-1350.0, 150.0]}
    model = ARCHITECTURES["vit_tiny"]((24, 24, 12), (12, 12, 6))
    torch.save({"teacher": model.state_dict(), "config": config}, tmp_path / "checkpoint.pth")
    code = snippet("LogisticRegression").replace("/path/to/output", str(tmp_path))
    names = {}
    exec(code.replace("/path/to/lnc_luna16/data", str(tmp_path / "data")), names)
    assert names["features"].shape == (6, 192) and not names["problems"] and names["windows"].dtype == np.int16
    assert names["classifier"].predict(names["features"].numpy()).shape == (6,)


def test_conversion_snippet(tmp_path):
    import nibabel

    from dino3d.data.volume import Volume
    voxels = np.random.default_rng(0).integers(-1000, 1000, (20, 18, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1, 2, 1])), tmp_path / "scan.nii.gz")
    code = snippet("write_volume").replace("scan.nii.gz", str(tmp_path / "scan.nii.gz")).replace('"data/', f'"{tmp_path}/')
    exec(code, {})
    with Volume(tmp_path / "patient1" / "t0" / "scan.hdf5") as volume:
        assert (volume.read() == voxels[::-1, ::-1]).all()


def test_monai_snippet():
    names = {}
    exec(snippet("RandElastic"), names)
    assert names["augment"](torch.rand(1, 12, 12, 6)).shape == (1, 12, 12, 6)
