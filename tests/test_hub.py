"""hubconf.py as torch.hub loads it: in a process of its own, from another folder, with modules of the same names."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from vision_transformer import ARCHITECTURES

SIZE, PATCH = (24, 24, 12), (12, 12, 6)
REPORT = """
x = torch.full((2, 1, 24, 24, 12), 0.25)
with torch.no_grad():
    out = model(x)
print(json.dumps({"sum": out.double().sum().item(), "shape": list(out.shape), "training": model.training,
    "clip_range": model.clip_range, "spacing": model.spacing,
    "loaded": [name for name in ("monai", "utils", "SimpleITK", "h5py") if name in sys.modules]}))
"""


def run(code, cwd):
    """What a new process says that runs `code` from another folder."""
    code = f"import json, sys, torch\nREPO = {str(ROOT)!r}\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def checkpoint(tmp_path):
    model = ARCHITECTURES["vit_micro"](SIZE, PATCH)
    config = {
        "arch": "vit_micro",
        "patch_size": list(PATCH),
        "input_size": list(SIZE),
        "clip_range": [-1350.0, 150.0],
        "spacing": [1.0, 1.0, 2.0],
    }
    state = {"backbone." + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"teacher": state, "config": config}, tmp_path / "checkpoint.pth")
    return model.eval()


@pytest.mark.parametrize("entry", ["encoder", "vit_micro"])
def test_a_checkpoint_by_torch_hub(checkpoint, tmp_path, entry):
    load = f'model = torch.hub.load(REPO, "{entry}", source="local", weights="checkpoint.pth")'
    found = json.loads(run(load + REPORT, tmp_path).stdout)
    with torch.no_grad():
        expected = checkpoint(torch.full((2, 1, *SIZE), 0.25))
    assert found.pop("sum") == pytest.approx(expected.double().sum().item(), abs=1e-4)
    assert found == {
        "shape": [2, 128],
        "training": False,
        "clip_range": [-1350.0, 150.0],
        "spacing": [1.0, 1.0, 2.0],
        "loaded": [],
    }


def test_modules_of_the_same_names(checkpoint, tmp_path):
    """Those of the user's own folder, loaded before or after, stay his."""
    for name in ("vision_transformer", "utils", "augmentations", "resnet3d"):
        (tmp_path / f"{name}.py").write_text(f"mine = {name!r}\n")
    load = 'model = torch.hub.load(REPO, "encoder", source="local", weights="checkpoint.pth")\n'
    before = "import vision_transformer, utils, augmentations, resnet3d\n"
    after = "\nimport vision_transformer, utils, resnet3d\n"
    after += "assert vision_transformer.mine and utils.mine and resnet3d.mine\n"
    for code in (before + load + after, load + after):
        assert json.loads(run(code + REPORT, tmp_path).stdout)["shape"] == [2, 128]


def test_every_architecture_is_an_entry_point():
    """As torch.hub.list finds them, which fetches from GitHub alone."""
    import hubconf

    entries = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert entries == sorted(["encoder", *ARCHITECTURES])
    assert hubconf.vit_huge.__doc__ == "vit_huge, see `encoder`."
    assert sys.modules["vision_transformer"].ARCHITECTURES is ARCHITECTURES


def test_random_weights_and_refusals(checkpoint, tmp_path):
    code = """
import warnings
load = lambda entry, **more: torch.hub.load(REPO, entry, source="local", **more)
model = load("vit_tiny", img_size=(24, 24, 24), patch_size=(6, 6, 6), drop_path_rate=0.1)
print(model(torch.rand(1, 1, 24, 24, 24)).shape, model.grid_size, model.drop_path_rate)
model = load("resnet18", img_size=(24, 24, 24))
print(model(torch.rand(1, 1, 24, 24, 24)).shape, model.training, model.clip_range)
for entry, more in (
    ("vit_small", {"weights": "checkpoint.pth"}),
    ("encoder", {"weights": "nothing.pth"}),
    ("resnet18", {"weights": "checkpoint.pth"}),
    ("resnet18", {"drop_path_rate": 0.1}),
    ("resnet18", {"patch_size": (6, 6, 6)}),
):
    try:
        load(entry, **more)
    except Exception as error:
        print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    load("encoder", weights="checkpoint.pth", img_size=(48, 24, 12))
print([str(one.message)[-72:] for one in caught])
"""
    lines = run(code, tmp_path).stdout.splitlines()
    assert lines[0] == "torch.Size([1, 192]) (4, 4, 4) 0.1"
    assert lines[1] == "torch.Size([1, 512]) False [-1000.0, 1000.0]"
    assert lines[2].startswith("--arch vit_small contradicts weights checkpoint.pth, which has vit_micro")
    assert lines[3].startswith("weights nothing.pth: no such file")
    assert lines[4].startswith("--arch resnet18 contradicts weights checkpoint.pth, which has vit_micro")
    assert lines[5] == "--drop_path_rate 0.1: resnet18 has none; leave it out"
    assert lines[6] == "--patch_size 6 6 6: resnet18 has none; leave it out"
    assert "interpolated (trilinear) from 2 x 2 x 2 patches to 4 x 2 x 2" in lines[7]


def test_hu_that_nobody_scaled_are_told(checkpoint, tmp_path):
    """Once, and in the words that mend it; neither grey values nor random weights, nor what is compiled or exported."""
    code = """
import copy, warnings
load = lambda **more: torch.hub.load(REPO, "encoder", source="local", **more)
def told(model, volume):
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(volume)
    return [str(one.message) for one in caught]
hu = torch.linspace(-1000, 400, 24 * 24 * 12).reshape(1, 1, 24, 24, 12)
model = load(weights="checkpoint.pth")
assert not told(model, hu[:0])
print(json.dumps([told(copy.deepcopy(model), hu), told(model, hu), told(model, hu)]))
grey = eval(told(load(weights="checkpoint.pth"), hu)[0].rpartition("by ")[2])
noise = 0.2 * torch.randn(grey.shape)
print(json.dumps([told(load(weights="checkpoint.pth"), one) for one in (grey, grey + noise)]))
print(json.dumps(told(load(arch="vit_micro", img_size=(24, 24, 12), patch_size=(12, 12, 6)), hu)))
exported = torch.export.export(load(weights="checkpoint.pth"), (grey,)).module()
print(bool(torch.allclose(exported(grey), model(grey), atol=1e-5)), float(grey.min()), float(grey.max()))
"""
    lines = run(code, tmp_path).stdout.splitlines()
    of_copy, first, again = json.loads(lines[0])
    assert len(first) == 1 and first[0].startswith("values from -1000 to 400, ") and of_copy == first and not again
    assert json.loads(lines[1]) == [[], []] and json.loads(lines[2]) == []
    assert lines[3] == "True 0.23333333432674408 1.0"


def test_values_that_nobody_can_look_at(checkpoint, tmp_path):
    """Those of meta tensors, vmap and fake ones raise where one asks for them; the next call is looked at."""
    code = """
import warnings
from torch._subclasses.fake_tensor import FakeTensorMode
load = lambda: torch.hub.load(REPO, "encoder", source="local", weights="checkpoint.pth")
hu = torch.full((1, 1, 24, 24, 12), -700.0)
model = load()
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    weights = dict(model.named_parameters())
    one = lambda volume: torch.func.functional_call(model, weights, (volume[None],))[0]
    print(torch.func.vmap(one)(hu).shape)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        print(model(fake.from_tensor(hu)).shape)
    print(load().to("meta")(hu.to("meta")).shape)
    before = len([one for one in caught if "scale HU" in str(one.message)])
    model(x=hu)
print(before, len([one for one in caught if "scale HU" in str(one.message)]))
"""
    assert run(code, tmp_path).stdout.splitlines() == [*["torch.Size([1, 128])"] * 3, "0 1"]
