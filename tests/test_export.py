"""export.py: what it writes gives elsewhere what it gives here, and a file that would not is never there."""

import functools
import hashlib
import json
import math

import nibabel
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export
import main_lnc_luna16
import main_lts_msd
from dino3d.command_line import UserError, format_values
from dino3d.data.conventions import AIR
from dino3d.features import sliding_window
from dino3d.features.encoder import PretrainedEncoder, load_encoder
from dino3d.files import read_json, read_table
from dino3d.finetune import heads
from dino3d.finetune.mask_inference import segment_volume
from dino3d.weights import load_file
from vision_transformer import ARCHITECTURES, VisionTransformer

SIZE, PATCH, CLIP = [12, 12, 6], [6, 6, 3], [-1350.0, 150.0]
SETTINGS = {"arch": "vit_tiny", "patch_size": PATCH, "input_size": SIZE, "clip_range": CLIP, "spacing": None}
CLASSIFIER = {
    "protocol": "finetune",
    "knn_k": None,
    "classes": 2,
    "label_names": ["benign", "malignant"],
    "crop_size": SIZE,
    "crop_spacing": [0.7, 0.7, 1.4],
}
SEGMENTER = {
    "spacing": [1.0, 1.0, 2.0],
    "decoder": "unetr",
    "classes": 3,
    "freeze_encoder": False,
    "overlap": 0.4,
    "largest_component": False,
    "min_volume": 0.0,
}
TEMPERATURES, OFFSETS = (1.7, 0.6), ([0.4, -1.1], [])


@pytest.fixture(scope="module", autouse=True)
def smaller_models():
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(VisionTransformer, embed_dim=24, depth=2, num_heads=3)
        patch.setitem(ARCHITECTURES, "vit_tiny", small)
        patch.setitem(heads.DECODERS, "unetr", functools.partial(heads.UnetrDecoder, feature_size=2))
        yield


def randomised(model, seed):
    """The model with weights that make outputs differ from case to case as a trained one's do."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_fold(folder, build, config, seed, best):
    """A fold's best.pth with a model that was never trained; returns the model."""
    config = SETTINGS | config
    encoder = PretrainedEncoder(**{name: config[name] for name in SETTINGS})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = randomised(build(encoder, config, {}), seed)
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "config": config, "best": best}, folder / "best.pth")
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pre-training run, a classifier and a segmenter of two folds each, and their models."""
    folder = tmp_path_factory.mktemp("runs")
    encoder = randomised(ARCHITECTURES["vit_tiny"](SIZE, PATCH), 0)
    (folder / "pretrain").mkdir()
    state = {"backbone." + name: tensor for name, tensor in encoder.state_dict().items()}
    torch.save({"teacher": state, "config": SETTINGS}, folder / "pretrain" / "checkpoint.pth")
    classifiers = [
        save_fold(
            folder / "lnc" / str(fold),
            heads.classifier_of,
            CLASSIFIER,
            fold,
            {"threshold": 0.3 + 0.1 * fold, "temperature": TEMPERATURES[fold], "logit_offset": OFFSETS[fold]},
        )
        for fold in range(2)
    ]
    segmenters = [
        save_fold(folder / "lts" / str(fold), heads.segmenter_of, SEGMENTER, 5 + fold, {"dice": 0.5})
        for fold in range(2)
    ]
    return folder, {"encoder": encoder, "classifier": classifiers, "segmenter": segmenters}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Folder with what export.py makes of them."""
    folder = tmp_path_factory.mktemp("exported")
    every = ["--format", "onnx", "torch", "safetensors"]
    export.main(["--weights", str(runs[0] / "pretrain"), "--output", str(folder), *every])
    export.main(["--weights", str(runs[0] / "lnc"), "--output", str(folder), *every[:3]])
    export.main(["--weights", str(runs[0] / "lts"), "--output", str(folder / "segmenter.onnx")])
    return folder


def hounsfield(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).uniform(-2000, 1500, (count, 1, *size)).astype(np.float32)


def scaled(hu, about):
    """What the JSON says of the grey values, by hand."""
    low, high = about["input"]["clip_range_hu"]
    volumes = (np.clip(np.maximum(hu, -1024), low, high) - low) / (high - low)
    by_formula = eval(about["input"]["formula"], {"clip": np.clip, "maximum": np.maximum, "hu": hu})
    assert np.array_equal(volumes, by_formula)
    return torch.from_numpy(volumes)


def run_file(path, hu):
    """Outputs of an .onnx or .pt2 file, by other programs' own means."""
    if path.suffix == ".onnx":
        return onnxruntime.InferenceSession(path).run(None, {"hu": hu})
    out = torch.export.load(path).module()(torch.from_numpy(hu))
    return [one.detach().numpy() for one in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("count", [1, 3])
def test_encoder(runs, exported, suffix, count):
    hu, encoder = hounsfield(count, seed=count), runs[1]["encoder"]
    embedding, tokens = run_file(exported / f"encoder{suffix}", hu)
    with torch.no_grad():
        volumes = scaled(hu, read_json(exported / "encoder.json"))
        expected, (maps,) = encoder(volumes), encoder.get_intermediate_layers(volumes)
    assert embedding.shape == (count, 24) and tokens.shape == (count, 24, 2, 2, 2)
    np.testing.assert_allclose(embedding, expected, atol=2e-5)
    np.testing.assert_allclose(tokens, maps, atol=2e-5)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("count", [1, 3])
def test_classifier(runs, exported, suffix, count):
    hu = hounsfield(count, seed=10 + count)
    (probabilities,) = run_file(exported / f"classifier{suffix}", hu)
    with torch.no_grad():
        volumes = scaled(hu, read_json(exported / "classifier.json"))
        logits = [model(volumes).double().numpy() for model in runs[1]["classifier"]]
    odds = [np.exp(one / t + np.array(offset or 0.0)) for one, t, offset in zip(logits, TEMPERATURES, OFFSETS)]
    folds = [one / one.sum(1, keepdims=True) for one in odds]
    np.testing.assert_allclose(probabilities, np.mean(folds, axis=0), atol=1e-6)
    assert np.ptp(np.concatenate(folds)[:, 1]) > 1e-3  # the folds do not agree anyway


def test_classifier_gives_what_predict_gives(runs, exported, tmp_path):
    about = read_json(exported / "classifier.json")
    shape = [n + 4 for n in SIZE]
    voxels = np.random.default_rng(1).integers(-1200, 600, (5, *shape)).astype(np.int16)
    (tmp_path / "new").mkdir()
    for i, one in enumerate(voxels):
        nibabel.save(nibabel.Nifti1Image(one, np.diag([0.7, 0.7, 1.4, 1])), tmp_path / "new" / f"c{i}.nii.gz")
    main_lnc_luna16.main(
        [
            "--predict",
            str(tmp_path / "new"),
            "--weights",
            str(runs[0] / "lnc"),
            "--output_dir",
            str(tmp_path / "out"),
            "--precision",
            "fp32",
            "--num_workers",
            "0",
        ]
    )
    rows = read_table(tmp_path / "out" / "predictions.csv")
    middle = voxels[(slice(None), *(slice(2, 2 + n) for n in about["input"]["shape"][2:]))].astype(np.float32)
    (probabilities,) = run_file(exported / "classifier.onnx", middle[:, None])
    np.testing.assert_allclose(probabilities[:, 1], [float(row["probability"]) for row in rows], atol=1e-6)
    decided = (probabilities[:, 1] >= about["threshold"]).astype(int)
    assert decided.tolist() == [int(row["predicted"]) for row in rows] and about["threshold"] == pytest.approx(0.35)
    assert about["input"]["spacing_mm"] == [0.7, 0.7, 1.4]


def stitched(session, volume, about):
    """Probabilities (classes, X, Y, Z) of a volume in HU as the JSON describes it, with NumPy alone."""
    windows, starts = about["windows"], []
    for n, size, step in zip(volume.shape, windows["size"], windows["step"]):
        count = math.ceil(max(n - size, 0) / step) + 1
        starts.append([min(i * step, n - size) for i in range(count)])
    axes = [np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (0.125 * n) ** 2)) for n in windows["size"]]
    weight = np.maximum(np.einsum("i,j,k->ijk", *axes), 1e-3)
    total, weights = 0, np.zeros(volume.shape)
    for x in starts[0]:
        for y in starts[1]:
            for z in starts[2]:
                here = tuple(slice(a, a + n) for a, n in zip((x, y, z), windows["size"]))
                (logits,) = session.run(None, {"hu": volume[here][None, None]})
                total = np.zeros((*logits.shape[1:3], *volume.shape)) if x == y == z == 0 else total
                total[(..., *here)] += logits[0] * weight
                weights[here] += weight
    folds = np.exp(total / weights)
    return (folds / folds.sum(1, keepdims=True)).mean(0)


def test_segmenter(runs, exported):
    about = read_json(exported / "segmenter.json")
    assert (about["windows"]["step"], about["input"]["spacing_mm"]) == ([7, 7, 3], [1, 1, 2])
    volume = hounsfield(1, (21, 12, 11))[0, 0].round()
    session = onnxruntime.InferenceSession(exported / "segmenter.onnx")
    probabilities = stitched(session, volume, about)
    image = sliding_window.grid_of(sliding_window.images.make_image(np.zeros((2, 2, 2), np.int16), np.eye(4)))
    image = image._replace(size=volume.shape).image(np.maximum(volume, AIR))
    windows = sliding_window.Windows(tuple(SIZE), SEGMENTER["overlap"])
    expected = sliding_window.segment(runs[1]["segmenter"], image, windows, CLIP, "cpu").exp()
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    hu = hounsfield(3)
    with torch.no_grad():
        logits = [model(scaled(hu, about)) for model in runs[1]["segmenter"]]
    np.testing.assert_allclose(session.run(None, {"hu": hu})[0], torch.stack(logits, 1), atol=1e-4)


def test_safetensors_round_trip(runs, exported):
    one = load_encoder(str(exported / "encoder.safetensors"))
    other = load_encoder(str(runs[0] / "pretrain" / "checkpoint.pth"))
    assert one.settings() == other.settings() == SETTINGS and one.crc32 == other.crc32
    assert all(torch.equal(one.state[name], tensor) for name, tensor in other.state.items())


def test_an_export_tells_whose_weights_it_has(runs, tmp_path):
    """The student's, which look like any other's; what of a fine-tuned encoder was trained; through a second export."""
    teacher, student = runs[1]["encoder"], randomised(ARCHITECTURES["vit_tiny"](SIZE, PATCH), 7)
    state = {name: network.state_dict() for name, network in (("teacher", teacher), ("student", student))}
    torch.save({**state, "config": SETTINGS, "epoch": 3, "step": 40, "samples": 160}, tmp_path / "run.pth")
    flags = ["--checkpoint_key", "student", "--output"]
    export.main(["--weights", str(tmp_path / "run.pth"), *flags, str(tmp_path / "one.safetensors")])
    export.main(["--weights", str(tmp_path / "one.safetensors"), "--output", str(tmp_path / "two.safetensors")])
    wanted = [{"file": "run.pth", "network": "key 'student'", "epoch": 3, "step": 40, "samples": 160}]
    for name in ("one", "two"):
        assert read_json(tmp_path / f"{name}.json")["weights_from"] == wanted
        assert load_file(tmp_path / f"{name}.safetensors")["config"]["weights_from"] == wanted
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["pos_embed"], student.pos_embed)

    fold = tmp_path / "lnc" / "0"
    save_fold(fold, heads.classifier_of, CLASSIFIER | {"pool": "cls+centre"}, 0, {"threshold": 0.5, "epoch": 2})
    export.main(["--weights", str(fold), "--output", str(tmp_path / "model.safetensors")])
    export.main(["--weights", str(fold), "--model", "encoder", "--output", str(tmp_path / "part.safetensors")])
    assert read_json(tmp_path / "model.json")["weights_from"] == [{"file": "0/best.pth", "epoch": 2}]
    assert read_json(tmp_path / "part.json")["weights_from"][0]["pool"] == "cls+centre"
    assert "fine-tuned with --pool cls+centre" in load_encoder(str(tmp_path / "part.safetensors")).notices[-1]


def test_safetensors_of_folds(runs, tmp_path):
    """One model's names are its own, several folds have their numbers before them."""
    export.main(["--weights", str(runs[0] / "lnc"), "--output", str(tmp_path / "all.safetensors")])
    export.main(["--weights", str(runs[0] / "lnc" / "1"), "--output", str(tmp_path / "one.safetensors")])
    state = runs[1]["classifier"][1].state_dict()
    assert all(torch.equal(load_file(tmp_path / "one.safetensors")[name], state[name]) for name in state)
    assert all(torch.equal(load_file(tmp_path / "all.safetensors")[f"1.{name}"], state[name]) for name in state)
    encoder = load_encoder(str(tmp_path / "all.safetensors"), "1.encoder")
    assert torch.equal(encoder.state["cls_token"], state["encoder.cls_token"])
    assert encoder.crop_spacing == [0.7, 0.7, 1.4]
    with pytest.raises(UserError, match="name one, such as --checkpoint_key 0.encoder"):
        load_encoder(str(tmp_path / "all.safetensors"))


def test_the_json_names_what_is_there(exported):
    for name in export.MODELS:
        about = read_json(exported / f"{name}.json")
        for file, entry in about["files"].items():
            content = (exported / file).read_bytes()
            assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        model = onnx.load(exported / f"{name}.onnx")
        graph = model.graph
        assert [one.key for one in model.metadata_props] == ["preprocessing"]
        assert json.loads(model.metadata_props[0].value)["input"] == about["input"]
        shapes = [
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        ]
        assert shapes == [about["input"]["shape"], *(out["shape"] for out in about["outputs"])]
        assert [value.name for value in graph.output] == [out["name"] for out in about["outputs"]]
        if name == "classifier":
            assert about["label_names"] == CLASSIFIER["label_names"] and len(about["label_names"]) == about["classes"]
        assert about["input"]["outside_of_the_scan_hu"] == AIR and shapes[0] == ["batch", 1, *SIZE]
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        ["encoder.json", "encoder.onnx", "encoder.pt2", "encoder.safetensors", "classifier.json", "classifier.onnx"]
        + ["classifier.pt2", "segmenter.json", "segmenter.onnx"]
    )


def test_large_weights_lie_beside_the_graph(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_PROTOBUF", 1000)
    flags = ["--weights", str(runs[0] / "lts" / "0"), "--model", "encoder", "--opset", "18"]
    export.main([*flags, "--output", str(tmp_path / "new" / "e.onnx")])
    files = read_json(tmp_path / "new" / "e.json")["files"]
    assert sorted(files) == ["e.onnx", "e.onnx.data"] and files["e.onnx.data"]["bytes"] > files["e.onnx"]["bytes"] / 4
    hu = hounsfield(2)
    with torch.no_grad():
        expected = runs[1]["segmenter"][0].encoder(scaled(hu, read_json(tmp_path / "new" / "e.json")))
    np.testing.assert_allclose(run_file(tmp_path / "new" / "e.onnx", hu)[0], expected, atol=2e-5)
    assert onnx.load(tmp_path / "new" / "e.onnx").opset_import[0].version == 18


def test_measured_on_crops_of_ones_own(runs, tmp_path, capsys):
    (tmp_path / "crops").mkdir()
    for i in range(2):
        voxels = hounsfield(1, seed=i)[0, 0].astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "crops" / f"{i}.nii.gz")
    flags = ["--weights", str(runs[0] / "pretrain"), "--output", str(tmp_path / "e.pt2")]
    export.main([*flags, "--crops", str(tmp_path / "crops")])
    assert "on 2 of 2 volumes below --crops: embedding" in capsys.readouterr().out
    assert read_json(tmp_path / "e.json")["measured_on"] == "2 of 2 volumes below --crops"


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(*flags):
    with pytest.raises(UserError) as error:
        export.main(list(map(str, flags)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_difference_that_is_too_large_leaves_nothing(runs, tmp_path, monkeypatch):
    """As a graph with other weights gives it."""
    traced = export.traced

    def wrong(source, crops):
        source.networks[0].norm.weight.data *= 1.01
        return traced(source, crops)

    monkeypatch.setattr(export, "traced", wrong)
    flags = "--weights", runs[0] / "pretrain", "--output", tmp_path / "a" / "b", "--format", "safetensors", "torch"
    assert "encoder.pt2: is not written: its embedding differs from torch by" in refused(*flags)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(runs, tmp_path):
    for there in ("e.pt2", "e.json"):
        (tmp_path / there).write_text("mine")
        assert f"{there} is there already" in refused("--weights", runs[0] / "pretrain", "--output", tmp_path / "e.pt2")
        assert (tmp_path / there).read_text() == "mine"
        (tmp_path / there).unlink()


@pytest.mark.parametrize(
    "weights, more, says",
    [
        ("pretrain", ["--model", "classifier"], "holds an encoder, and no classifier"),
        ("lts", ["--model", "classifier"], "holds a segmenter, and no classifier"),
        ("lnc", ["--model", "segmenter"], "holds a classifier, and no segmenter"),
        ("nowhere", [], "nowhere: no such file"),
        ("pretrain", ["--checkpoint_key", "student"], "has no 'student'"),
        ("pretrain", ["--crops", "nowhere"], "--crops nowhere: no such folder"),
    ],
)
def test_refused(runs, tmp_path, weights, more, says):
    assert says in refused("--weights", runs[0] / weights, "--output", tmp_path / "x", *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "build, config, name, values",
    [
        (heads.classifier_of, CLASSIFIER, "input_size", ([12, 12, 6], [12, 12, 12])),
        (heads.classifier_of, CLASSIFIER, "label_names", (["benign", "malignant"], ["malignant", "benign"])),
        (heads.segmenter_of, SEGMENTER, "spacing", ([1.0, 1.0, 2.0], [1.5, 1.5, 2.0])),
        (heads.segmenter_of, SEGMENTER, "min_volume", (0.0, 0.1)),
    ],
)
def test_folds_of_other_runs_are_refused(tmp_path, build, config, name, values):
    """By all that take the mean of folds."""
    run, says = (
        tmp_path / "run",
        f"its folds differ in {name}, so they are not of one run ({format_values(values[0])} in 0, ",
    )
    for fold, value in enumerate(values):
        save_fold(run / str(fold), build, config | {name: value}, 0, {"threshold": 0.5, "dice": 0.5})
    scan = tmp_path / "new" / "scan.nii.gz"
    scan.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(hounsfield(1, [16, 16, 12])[0, 0].astype(np.int16), np.eye(4)), scan)
    script = main_lnc_luna16 if build is heads.classifier_of else main_lts_msd
    takers = [
        lambda: export.main(["--weights", str(run), "--output", str(tmp_path / "x")]),
        lambda: script.main(["--predict", str(scan), "--weights", str(run), "--output_dir", str(tmp_path / "out")]),
        lambda: segment_volume(run, hounsfield(1)[0, 0], np.eye(4)),
    ]
    for take in takers if script is main_lts_msd else takers[:2]:
        with pytest.raises(UserError) as error:
            take()
        told = str(error.value)
        assert says in told and told.endswith(f"give one of them, such as {run / '0'}") and "\n" not in told


def test_broken_models_are_refused(runs, tmp_path):
    state = torch.load(runs[0] / "lnc" / "0" / "best.pth")
    torch.save({**state, "config": {"protocol": "finetune"}}, tmp_path / "less.pth")
    says = refused("--weights", tmp_path / "less.pth", "--output", tmp_path / "x")
    assert "less.pth: is no whole checkpoint of main_lnc_luna16.py (KeyError: 'arch')" in says
    state["model"]["head.linear.bias"][0] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    assert "not finite (NaN)" in refused("--weights", tmp_path / "nan.pth", "--output", tmp_path / "x")
    (tmp_path / "text.pth").write_text("<html>")
    assert "web page" in refused("--weights", tmp_path / "text.pth", "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_where_nothing_can_be_written(runs, tmp_path):
    (tmp_path / "file").write_text("")
    says = refused("--weights", runs[0] / "pretrain", "--output", tmp_path / "file" / "e.safetensors")
    assert (
        says
        == f"--output {tmp_path / 'file' / 'e.safetensors'}: can't be written (a file stands where its folder should)"
    )


def test_what_is_not_installed_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name.startswith("onnx") else name)
    says = refused("--weights", runs[0] / "pretrain", "--output", tmp_path / "x.onnx")
    assert "--format onnx: onnx, onnxscript, onnxruntime not installed: pip install onnx onnxscript onnxruntime" in says


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--output", "x.pth"], "--output x.pth: a file must end in .onnx, .pt2, .safetensors"),
        (["--output", "x.onnx", "--format", "torch"], "--output x.onnx is one file of --format onnx"),
        (["--output", "x.onnx", "--format", "onnx", "torch"], "give a folder for several formats"),
        (["--output", "x", "--opset", "7"], "7 is out of range"),
        (["--output", "x", "--format", "onx"], "did you mean onnx?"),
    ],
)
def test_flags_that_are_wrong_by_themselves(flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(["--weights", "w", *flags])
    assert stop.value.code == 2 and says in capsys.readouterr().err
