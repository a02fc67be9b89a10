"""The house: which way imports go, and that converting loads no torch."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from raw_inputs import scan

WITHOUT_TORCH = ("dino3d.command_line", "dino3d.files", "dino3d.data", "dino3d.prepare", "dino3d.finetune.splits")
BUT = ("dino3d.data.pretraining",)  # reads patches for torch's DataLoader


def modules():
    """{name: path} of all that is imported by name in the root and in the package."""
    paths = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("dino3d/**/*.py") if path.name != "__init__.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(paths)}


def is_free(name):
    return name.startswith(WITHOUT_TORCH) and name not in BUT


@pytest.mark.parametrize("name", [name for name in modules() if is_free(name)])
def test_loads_neither_torch_nor_utils(name):
    code = f"import sys, {name}; print(sorted({{'torch', 'utils'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_conversion_loads_no_torch(tmp_path):
    """Neither in prepare_data.py itself nor in its workers, as Python's own list of imports says."""
    import SimpleITK as sitk
    (tmp_path / "in").mkdir()
    for i in range(4):
        sitk.WriteImage(scan(i), str(tmp_path / "in" / f"scan{i}.nrrd"))
    done = subprocess.run(
        [sys.executable, "prepare_data.py", "nlst", "--input", tmp_path / "in", "--output", tmp_path / "out", "--workers", "2"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and len(list(tmp_path.glob("out/*/t0/*.hdf5"))) == 4, done.stderr
    imported = [line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert imported.count("dino3d.data.images") >= 2  # the script's and at least one worker's
    assert "torch" not in imported and "utils" not in imported
