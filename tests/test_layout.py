"""The layout: which way imports go, how long modules are, that names stand once, and that converting loads no torch."""

import ast
import collections
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from raw_inputs import scan

WITHOUT_TORCH = (
    "dino3d.command_line",
    "dino3d.flag_files",
    "dino3d.files",
    "dino3d.run_lock",
    "dino3d.data",
    "dino3d.prepare",
    "dino3d.evaluation",
    "dino3d.finetune.same_data",
    "dino3d.finetune.splits",
    "dino3d.study",
)
BUT = ("dino3d.data.pretraining", "dino3d.data.patch_ring")  # read patches for torch's DataLoader


def modules():
    """{name: path} of all that is imported by name in the root and in the package, and of the scripts in results/."""
    paths = [
        *ROOT.glob("*.py"),
        *ROOT.glob("results/*.py"),
        *(path for path in ROOT.glob("dino3d/**/*.py") if path.name != "__init__.py"),
    ]
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
        [
            sys.executable,
            "prepare_data.py",
            "nlst",
            "--input",
            tmp_path / "in",
            "--output",
            tmp_path / "out",
            "--workers",
            "2",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert done.returncode == 0 and len(list(tmp_path.glob("out/*/t0/*.hdf5"))) == 4, done.stderr
    imported = [line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert imported.count("dino3d.data.images") >= 2  # the script's and at least one worker's
    assert "torch" not in imported and "utils" not in imported


# ------------------------------------------------------------------------------------------------------- imports


LEVELS = {  # a module imports from lower levels, and from its own room; see `level` for those of the root
    "dino3d.command_line": 0,
    "dino3d.flag_files": 0,
    "dino3d.files": 0,
    "dino3d.launch": 0,
    "dino3d.openmp": 0,
    "dino3d.malloc": 0,
    "dino3d.run_lock": 0,
    "dino3d.bspline": 0,
    "dino3d.block_masks": 0,
    "dino3d.intensity": 0,
    "dino3d.trilinear": 0,
    "dino3d.view_kernel": 0,
    "dino3d.mixed_precision": 0,
    "dino3d.transformer_block": 0,
    "dino3d.policy": 0,
    "dino3d.weights": 0,
    "dino3d.data": 1,
    "dino3d.training": 1,
    "dino3d.monai_transforms": 1,
    "dino3d.evaluation": 2,
    "dino3d.pretraining_flags": 2,
    "dino3d.features": 3,
    "dino3d.finetune": 4,
    "dino3d.prepare": 4,
    "dino3d.study": 4,
    "results": 5,  # scripts
    "dino3d.benchmarks": 6,  # which time them
    "benchmark": 7,
}


SCRIPTS = (
    "prepare_data",
    "benchmark",
    "extract_features",
    "evaluate_features",
    "export",
    "describe",
    "study",
    "hubconf",
)


def is_script(name):
    return name.startswith(("main_", "results.")) or name in SCRIPTS


def level(name):
    """Of a module in the root: what is no script is on the ground."""
    room = name.rpartition(".")[0]
    if not room and name not in LEVELS:
        return 5 if is_script(name) else 0
    return LEVELS[name] if name in LEVELS else LEVELS[room]


def imports():
    """{module: modules of ours that it imports, anywhere in it}."""
    known, found = modules(), {}
    for name, path in known.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
            elif isinstance(node, ast.Import):
                targets |= {one.name for one in node.names}
        found[name] = sorted(targets & known.keys())
    return found


def test_imports_go_down():
    up = [(name, other) for name, others in imports().items() for other in others if level(other) > level(name)]
    rooms = [
        (name, other)
        for name, others in imports().items()
        for other in others
        if level(other) == level(name) > 0 and name.rpartition(".")[0] != other.rpartition(".")[0]
    ]
    assert not up and not rooms


def test_no_circle():
    import graphlib

    order = list(graphlib.TopologicalSorter(imports()).static_order())  # raises CycleError
    assert len(order) == len(modules())


def test_rooms_are_small():
    """The scripts may be longer: they show a whole task in one file."""
    long = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert not {name: lines for name, lines in long.items() if lines >= 500 and not is_script(name)}


def test_text_files_have_one_encoding():
    """Whatever the locale: no text file is opened without one."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            how = getattr(called, "attr", getattr(called, "id", ""))
            if how not in ("open", "read_text", "write_text") or ast.unparse(called) in ("os.open", "tarfile.open"):
                continue
            binary = any(isinstance(one, ast.Constant) and "b" in str(one.value) for one in node.args[1:2])
            given = binary or any(one.arg in (None, "encoding") for one in node.keywords)  # None: **TEXT
            assert given, f"{name}, line {node.lineno}: {ast.unparse(node)}"


def test_names_stand_once():
    """But for what each script has under the same name, because it plays the same part there."""
    homes = collections.defaultdict(set)
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                homes[node.name].add(name)
            elif isinstance(node, ast.Assign):
                homes |= {
                    one.id: homes[one.id] | {name}
                    for target in node.targets  # and not the variables of a comprehension on the right
                    for one in ast.walk(target)
                    if isinstance(one, ast.Name)
                }
    assert not {name: where for name, where in homes.items() if len(where) > 1 and not all(map(is_script, where))}
