"""What README.md and docs/ tell people to type is right: every command is parsed by the real parser, every snippet
runs."""

import importlib
import inspect
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
SCRIPTS = (
    "main_dino",
    "main_lnc_luna16",
    "main_lts_msd",
    "prepare_data",
    "benchmark",
    "extract_features",
    "evaluate_features",
    "export",
    "describe",
    "study",
    "results.make_data",
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
INLINE = re.compile(r"`([^`\n]+)`")
LAUNCHERS = ("python", "torchrun", "srun")
OTHERS = ("git", "cd", "source", "tensorboard")  # programs whose arguments nobody here can check
# Flags of other programs: torchrun, srun, Docker, tests/survive.py
OTHERS_FLAGS = {
    "--nproc_per_node",
    "--max-restarts",
    "--signals-to-handle",
    "--shutdown-timeout",
    "--shm-size",
    "--kills",
    "--help",
    "--version",
}

BLOCKS = [(page, *block) for page, text in PAGES.items() for block in BLOCK.findall(text)]
PROSE = {page: BLOCK.sub("", text) for page, text in PAGES.items()}


def command_lines():
    """(page, command): the lines of blocks without a language, those of shell scripts that start one of our scripts,
    and what stands between backticks and begins with a program."""
    for page, language, block in BLOCKS:
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        if language == "bash":
            lines = [line.removesuffix("&") for line in lines if re.match(rf"({'|'.join(LAUNCHERS)}) ", line)]
        if language in ("", "bash"):
            yield from ((page, line) for line in lines)
    for page, text in PROSE.items():
        yield from (
            (page, code)
            for code in INLINE.findall(text)
            if re.match(rf"([A-Z_]+=\S+ )*({'|'.join(LAUNCHERS)}|make|pip|source) \S+", code)
        )


@pytest.mark.parametrize("page, line", sorted(set(command_lines())))
def test_command_is_understood(page, line):
    words = shlex.split(line.replace("...", ""), comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "pip":
        assert words[1:3] == ["install", "-r"] and (ROOT / words[3]).is_file()
    elif words[:2] == ["python3", "-m"] or words[:2] == ["python", "-m"]:
        assert words[2] in ("venv", "pytest")
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests"))
    elif words[0] in LAUNCHERS:
        script = next((word for word in words if word.endswith(".py")), None)
        assert script and (ROOT / script).is_file(), f"no script in: {line}"
        name = ".".join(Path(script).with_suffix("").parts) if script.startswith("results/") else Path(script).stem
        understand(name, words[words.index(script) + 1 :], whole="..." not in line)
    elif words[0].startswith("results/"):  # what it runs: tests/test_results.py
        assert os.access(ROOT / words[0], os.X_OK)
    else:
        assert words[0] in OTHERS


def understand(script, flags, whole):
    """Let a script's own parser read its flags and, if the command is whole, refuse what is wrong by itself."""
    module = importlib.import_module(script)  # tests/ is on the path too
    parser = module.get_args_parser()
    if {"--help", "--version"} & set(flags):
        with pytest.raises(SystemExit) as ending:
            parser.parse_args(flags)
        assert not ending.value.code
        return
    args = parser.parse_args(flags)
    if whole:
        check = getattr(module, "check_pretraining_flags", None) or getattr(module, "check_flags", None)
        if check:
            check(parser, args)


def test_there_are_commands():
    found = list(command_lines())
    for page in (
        "README.md",
        "docs/data.md",
        "docs/pretraining.md",
        "docs/classification.md",
        "docs/segmentation.md",
        "docs/features.md",
        "docs/resuming.md",
        "docs/performance.md",
        "docs/evaluation.md",
    ):
        assert sum(at == page and ".py" in line for at, line in found) > 2, page
    assert {language for _, language, _ in BLOCKS} == {"", "bash", "python", "text", "bibtex"}


def test_every_flag_exists():
    known = set(OTHERS_FLAGS)
    for script in SCRIPTS:
        parsers = [importlib.import_module(script).get_args_parser()]
        for parser in parsers:
            known.update(parser._option_string_actions)
            parsers += [
                sub for action in parser._actions if isinstance(action.choices, dict) for sub in action.choices.values()
            ]
    for page, text in PROSE.items():
        for code in INLINE.findall(text):
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known
            assert not unknown or code.startswith((*LAUNCHERS, *OTHERS)), f"{page}: {unknown}"


def test_files_that_are_named_exist():
    for page, text in PROSE.items():
        for code in INLINE.findall(text):
            for path in re.findall(r"^(?:tests|docs|dino3d)/[\w/.]*", code):
                assert (ROOT / path).exists(), f"{page}: {path}"


def test_modules_are_all_named():
    modules = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "results/*.py", "dino3d/**/*.py")
        for path in ROOT.glob(pattern)
    }
    modules = {module for module in modules if not module.endswith("__init__.py")}
    named = re.findall(r"^\| `([\w/]+\.py)` \|", PAGES["docs/development.md"], re.M)
    assert sorted(named) == sorted(modules)


def test_readme_is_short():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 230 and len(text.encode()) <= 14 * 1024


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", PROSE[page], re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]) if not link.startswith("https://")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target.relative_to(ROOT).as_posix()), f"{page}: {link}"


def test_every_page_is_in_the_index():
    assert all(
        f"]({Path(page).name})" in PAGES["docs/README.md"]
        for page in PAGES
        if page.startswith("docs/")
        if page != "docs/README.md"
    )


# ----------------------------------------------------------------------------------------------------------- snippets

SNIPPETS = (
    "get_last_selfattention",
    "LogisticRegression",
    "write_volume",
    "RandElastic",
    "RandSpatiald",
    "onnxruntime",
    "embed_volume",
    "scan_maps",
    "segment_volume",
    "load_file",
)  # a word of each, see below


def snippet(word):
    return next(block for _, language, block in BLOCKS if language == "python" and word in block)


def test_every_snippet_is_run():
    code = [block for _, language, block in BLOCKS if language == "python"]
    assert sorted(code) == sorted(map(snippet, SNIPPETS))
    tests = "".join(inspect.getsource(test) for name, test in globals().items() if name.endswith("_snippet"))
    assert all(f'snippet("{word}")' in tests for word in SNIPPETS)


def test_old_imports_have_a_new_home():
    lines = re.findall(
        r"^\| `from \w+ import ([^`]+)` \| `(from dino3d[^`]+ import ([^`]+))` \|$", PAGES["docs/development.md"], re.M
    )
    assert len(lines) > 8
    for old, new, names in lines:
        exec(new, {})
        assert len(old.split(", ")) == len(names.split(", "))


def test_config_snippet(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from dino3d.features.encoder import load_encoder
    from vision_transformer import vit_tiny

    state = vit_tiny((96, 96, 48), (12, 12, 6)).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(snippet("load_file"), {})
    encoder = load_encoder("with_config.pth")
    assert encoder.arch == "vit_tiny" and encoder.spacing == [1, 1, 2]
    assert all((encoder.state[name] == tensor).all() for name, tensor in state.items())


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


def test_embedding_snippet(tmp_path):
    import nibabel
    from test_extract_features import SPACING, chest, write_checkpoint

    write_checkpoint(tmp_path / "checkpoint.pth")
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = 24.5 - 60, -81 - 60, -130.2 - 50
    nibabel.save(nibabel.Nifti1Image(chest(), affine), tmp_path / "scan.nii.gz")
    code = snippet("embed_volume").replace('"scan.nii.gz"', repr(str(tmp_path / "scan.nii.gz")))
    names = {}
    exec(code.replace("/path/to/output", str(tmp_path)), names)
    assert names["vector"].shape == (128,) and names["nodule"].shape == (256,)
    assert (names["vector"] != names["nodule"][:128]).any()


def test_conversion_snippet(tmp_path):
    import nibabel

    from dino3d.data.volume import Volume

    voxels = np.random.default_rng(0).integers(-1000, 1000, (20, 18, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1, 2, 1])), tmp_path / "scan.nii.gz")
    code = (
        snippet("write_volume").replace("scan.nii.gz", str(tmp_path / "scan.nii.gz")).replace('"data/', f'"{tmp_path}/')
    )
    exec(code, {})
    with Volume(tmp_path / "patient1" / "t0" / "scan.hdf5") as volume:
        assert (volume.read() == voxels[::-1, ::-1]).all()


def test_monai_snippet():
    names = {}
    exec(snippet("RandElastic"), names)
    assert names["augment"](torch.rand(1, 12, 12, 6)).shape == (1, 12, 12, 6)


def test_monai_dictionary_snippet():
    names = {}
    exec(snippet("RandSpatiald"), names)
    label = torch.arange(12 * 12 * 6).reshape(1, 12, 12, 6) % 3
    seen = names["augment"]({"image": torch.rand(1, 12, 12, 6), "label": label})
    assert seen["label"].dtype == torch.int64 and set(seen["label"].unique().tolist()) == {0, 1, 2}


def test_onnx_snippet(tmp_path, monkeypatch):
    """By ONNX Runtime and NumPy alone."""
    import functools

    import test_export

    import export
    from dino3d.finetune.heads import classifier_of
    from vision_transformer import ARCHITECTURES, VisionTransformer

    monkeypatch.setitem(
        ARCHITECTURES, "vit_tiny", functools.partial(VisionTransformer, embed_dim=24, depth=1, num_heads=3)
    )
    model = test_export.save_fold(tmp_path / "lnc" / "0", classifier_of, test_export.CLASSIFIER, 0, {"threshold": 0.5})
    export.main(["--weights", str(tmp_path / "lnc"), "--output", str(tmp_path / "exported")])
    crops = np.random.default_rng(0).integers(-1500, 500, (3, 15, 12, 7)).astype(np.int16)
    np.save(tmp_path / "crops.npy", crops)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet("onnxruntime"), names)
    low, high = test_export.CLIP
    volumes = ((torch.from_numpy(crops[:, None, 1:13, :, :6]).float().clamp_min(-1024) - low) / (high - low)).clamp(
        0, 1
    )
    with torch.no_grad():
        expected = model(volumes).softmax(1)
    np.testing.assert_allclose(names["probabilities"], expected, atol=1e-6)
    assert names["malignant"].tolist() == (expected[:, 1] >= 0.5).tolist()
    assert "torch" not in snippet("onnxruntime") and "dino3d" not in snippet("onnxruntime")


def test_maps_snippet(tmp_path, monkeypatch):
    import nibabel

    from vision_transformer import vit_micro

    config = {"arch": "vit_micro", "patch_size": [6, 6, 6], "input_size": [12, 12, 12], "spacing": [2.0, 2.0, 2.0]}
    torch.save({"teacher": vit_micro((12, 12, 12), (6, 6, 6)).state_dict(), "config": config}, tmp_path / "w.pth")
    voxels = np.random.default_rng(0).integers(-900, 1000, (20, 18, 16)).astype(np.int16)
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = 15, -30, -180
    for name in "ab":
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / f"{name}.nii.gz")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet("scan_maps").replace("/path/to/output/checkpoint.pth", "w.pth"), names)
    assert [one.shape for one in names["colours"]] == [(3, 4, 3, 3)] * 2 and names["like"].shape == (4, 3, 3)
    assert names["on_voxels"].shape == (20, 18, 16) and names["like"].max() == pytest.approx(1)


def test_segmentation_snippet(tmp_path):
    import nibabel

    from dino3d.features.encoder import PretrainedEncoder
    from dino3d.finetune.heads import build_segmenter

    sizes = {"arch": "vit_micro", "patch_size": [8, 8, 4], "input_size": [16, 16, 8], "clip_range": [-1000.0, 400.0]}
    config = sizes | {"spacing": [2.0, 2.0, 3.0], "decoder": "linear", "classes": 2, "freeze_encoder": True}
    config |= {"overlap": 0.25, "largest_component": False, "min_volume": 0.0, "tolerance": 2.0}
    model = build_segmenter(PretrainedEncoder(**sizes, spacing=None), 0.0, "linear", 2, True)
    (tmp_path / "OUT" / "0").mkdir(parents=True)
    torch.save({"model": model.state_dict(), "config": config, "best": {}}, tmp_path / "OUT" / "0" / "best.pth")
    voxels = np.random.default_rng(0).integers(-1000, 400, (20, 18, 9)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-2.0, -2, 3, 1])), tmp_path / "scan.nii.gz")
    names = {}
    code = snippet("segment_volume").replace("scan.nii.gz", str(tmp_path / "scan.nii.gz"))
    exec(code.replace('"OUT"', repr(str(tmp_path / "OUT"))), names)
    assert names["mask"].shape == (20, 18, 9) and set(np.unique(names["mask"])) <= {0, 1}
