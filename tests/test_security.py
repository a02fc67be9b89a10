"""Nothing that is read is ever executed: no module can unpickle, and a hostile checkpoint is refused wherever one is
read."""

import ast
import contextlib
import io
import os
import pickle
import zipfile

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_main_lnc_luna16 import write_cases

import main_dino
import main_lnc_luna16
import main_lts_msd
import utils
from dino3d import command_line
from dino3d.features.encoder import load_encoder
from dino3d.finetune.fold_folders import load_fold
from dino3d.training import checkpoint
from vision_transformer import vit_tiny

UNPICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
RUNS = {"eval", "exec", "compile", "__import__"}
LOADS = {
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "pd.read_pickle",
    "os.system",
    "os.popen",
}


def unsafe_calls(source):
    """(line, what) of all in a module by which something that is read may be executed."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names if name.name.split(".")[0] in UNPICKLES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            found += [
                (node.lineno, f"{module}.{name.name}")
                for name in node.names
                if module in UNPICKLES or module in ("torch", "numpy") and name.name == "load"
            ]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: word.value for word in node.keywords}

            def is_given(flag, value):
                return isinstance(given.get(flag), ast.Constant) and given[flag].value is value

            wrong = (
                name in RUNS
                or name in LOADS
                or name == "torch.load"
                and not is_given("weights_only", True)
                or name in ("np.load", "numpy.load")
                and "allow_pickle" in given
                and not is_given("allow_pickle", False)
                or None in given
                and name in ("torch.load", "np.load", "numpy.load")
                or is_given("shell", True)
            )
            found += [(node.lineno, name)] * wrong
    return found


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), *ROOT.glob("dino3d/**/*.py")]), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_module_can_execute_what_it_reads(path):
    assert unsafe_calls(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "torch.load(p, **more)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "np.load(p, **more)",
        "import pickle",
        "import yaml",
        "from marshal import loads",
        "from torch import load",
        "import os, dill",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "torch.jit.load(p)",
    ],
)
def test_the_search_finds(source):
    assert unsafe_calls(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p, weights_only=True)",
        "np.load(p)",
        "np.load(p, allow_pickle=False)",
        "model.eval()",
        "json.loads(text)",
        "re.compile(text)",
        "subprocess.run(words)",
    ],
)
def test_the_search_leaves_alone(source):
    assert unsafe_calls(source) == []


# ------------------------------------------------------------------------------------------------- hostile checkpoints


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, trace, function):
        self.trace, self.function = str(trace), function

    def __reduce__(self):
        return {
            "exec": (exec, (f"open({self.trace!r}, 'w')",)),
            "open": (open, (self.trace, "w")),
            "system": (os.system, (f"touch '{self.trace}'",)),
        }[self.function]


def write_hostile(path, trace, form):
    """A checkpoint of main_dino.py or of the downstream scripts but for one thing in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "arch": "vit_tiny",
        "patch_size": [8, 8, 8],
        "input_size": [16, 16, 16],
        "clip_range": [-1000.0, 1000.0],
        "spacing": None,
        "protocol": "linear",
        "decoder": "linear",
    }
    state = {
        "teacher": vit_tiny(img_size=(16, 16, 16), patch_size=(8, 8, 8)).state_dict(),
        "epoch": 1,
        "config": config,
    }
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(state | {"x": Hostile(trace, "system")}))
    elif form == "legacy":
        torch.save(state | {"x": Hostile(trace, "open")}, path, _use_new_zipfile_serialization=False)
    elif form == "in an array":
        torch.save(state | {"x": np.array([Hostile(trace, "exec")], dtype=object)}, path)
    elif form == "in the config":
        torch.save(state | {"config": config | {"arch": Hostile(trace, "exec")}}, path)
    elif form == "TorchScript":  # which torch.load hands on to torch.jit
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
        whole = io.BytesIO()
        with zipfile.ZipFile(path) as before, zipfile.ZipFile(whole, "w") as after:
            for name in before.namelist():
                inside = pickle.dumps(Hostile(trace, "exec")) if name.endswith("data.pkl") else before.read(name)
                after.writestr(name, inside)
        path.write_bytes(whole.getvalue())
    return path


FORMS = ["plain pickle", "legacy", "in an array", "in the config", "TorchScript"]


@pytest.fixture
def trace(tmp_path):
    """A file that must not be made."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def test_hostile_files_would_make_the_trace(tmp_path):
    """Read as older code does: what the tests below look for is there to be seen."""
    for form in FORMS[:-1]:
        trace = tmp_path / form
        with contextlib.suppress(RuntimeError):  # a plain pickle is executed before it is found to be none of torch's
            torch.load(write_hostile(tmp_path / "x.pth", trace, form), weights_only=False)
        assert trace.exists(), form


@pytest.mark.parametrize("form", FORMS)
def test_hostile_checkpoints_are_refused(form, tmp_path, trace, recwarn):
    path = write_hostile(tmp_path / "out" / "0" / "best.pth", trace, form)
    for read, kind in (
        (utils.load_file, ValueError),
        (lambda path: utils.load_pretrained_weights(vit_tiny(), path), ValueError),
        (checkpoint.load_checkpoint, command_line.UserError),
        (load_encoder, command_line.UserError),
        (lambda path: load_fold(path, None, "protocol"), command_line.UserError),
    ):
        with pytest.raises(kind, match="best.pth: can't be read as a checkpoint"):
            read(path)
    assert not [
        one for one in recwarn if one.category is UserWarning
    ]  # torch's own words would stand beside the one line


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """(classification data, segmentation data) of a few small cases."""
    folder = tmp_path_factory.mktemp("labelled")
    write_cases(folder / "lnc")
    for i in range(9):
        for kind, dtype, low, high in (("images", np.int16, -1000, 500), ("labels", np.uint8, 0, 2)):
            path = folder / "lts" / kind / f"case{i}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            voxels = np.random.default_rng(i).integers(low, high, (16, 16, 16)).astype(dtype)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return folder / "lnc", folder / "lts"


@pytest.mark.parametrize("form", ["plain pickle", "in the config"])
@pytest.mark.parametrize(
    "script, flags",
    [
        ("main_dino", "--data_dir VOLUMES --pretrained_weights FILE"),
        ("main_dino", "--data_dir VOLUMES --output_dir RUN"),
        ("main_lnc_luna16", "--data_dir LNC --pretrained_weights FILE"),
        ("main_lnc_luna16", "--data_dir LNC --output_dir RUN"),
        ("main_lnc_luna16", "--predict LNC --weights RUN"),
        ("main_lts_msd", "--data_dir LTS --pretrained_weights FILE"),
        ("main_lts_msd", "--data_dir LTS --output_dir RUN"),
        ("main_lts_msd", "--predict LTS/images --weights RUN"),
    ],
)
def test_scripts_refuse_hostile_checkpoints(script, flags, form, volumes, labelled, tmp_path, trace, capsys):
    names = ["checkpoint.pth"] if script == "main_dino" else ["0/checkpoint.pth", "0/best.pth"]
    files = [write_hostile(tmp_path / "run" / name, trace, form) for name in names]
    places = {"VOLUMES": volumes, "FILE": files[0], "RUN": tmp_path / "run", "LNC": labelled[0], "LTS": labelled[1]}
    words = flags.split()
    if "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "out")]
    for name, place in places.items():
        words = [word.replace(name, str(place)) if word.split("/")[0] == name else word for word in words]
    words += "--input_size 16 16 16 --patch_size 8 8 8 --num_workers 0 --batch_size_per_gpu 2".split()
    if script == "main_dino":
        words += "--arch vit_tiny --out_dim 64 --local_crops_number 0".split()
    main = {"main_dino": main_dino, "main_lnc_luna16": main_lnc_luna16, "main_lts_msd": main_lts_msd}[script].main
    with pytest.raises(SystemExit) as stop:
        utils.run_script(lambda: main(words))
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(errors) == 1 and errors[0].startswith("error: "), errors
    assert ".pth: can't be read as a checkpoint" in errors[0], errors
