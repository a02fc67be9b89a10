"""benchmark.py by its command line, with few repeats: the JSON's shape and sense. How fast anything is, is not
tested."""

import ast
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from dino3d.command_line import UserError

COMMANDS = {
    "augment": ["--repeats", "1", "--samples", "1"],
    "read": ["--repeats", "2", "--reads", "1", "--size", "160", "140", "125"],
    "convert": ["--repeats", "1", "--size", "120", "100", "20"],
    "data": ["--repeats", "1"],
    "step": ["--repeats", "1", "--arch", "vit_micro", "--out_dim", "256", "--batch_size", "2"],
    "infer": ["--repeats", "1", "--arch", "vit_tiny", "--size", "24", "24", "12"],
    "train": [
        "--repeats",
        "1",
        "--arch",
        "vit_tiny",
        "--out_dim",
        "256",
        "--batch_size",
        "1",
        "--steps",
        "2",
        "--workers",
        "1",
    ],
}
BASELINES = {
    "augment": ["monai_transforms", "monai_views"],
    "read": ["write_itk", "read_itk"],
    "convert": ["convert_itk"],
    "data": ["Patches", "read_itk", "monai_transforms", "monai_views"],
    "step": ["plain_step", "Model", "monai_encoder", "ViT"],
    "infer": ["ViT"],
    "train": [
        "plain_training",
        "Patches",
        "monai_transforms",
        "monai_views",
        "plain_step",
        "Model",
        "monai_encoder",
        "ViT",
    ],
}


def benchmark(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmark.py", *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module", params=COMMANDS)
def run(request):
    """(what, the finished process) of each sub-command."""
    return request.param, benchmark(request.param, "--json", *COMMANDS[request.param])


def test_last_line_is_the_result_as_json(run):
    what, process = run
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert {
        "what",
        "ratio",
        "goal",
        "baseline",
        "ours",
        "spread",
        "threads",
        "device",
        "versions",
        "parameters",
        "baseline_code",
    } <= result.keys()
    assert (result["what"], result["threads"], result["device"]) == (what, 1, "cpu")
    assert result["ratio"] == pytest.approx(result["baseline"] / result["ours"])
    figures = [result["ratio"], result["goal"], result["baseline"], result["ours"]]
    figures += [row["seconds"] for row in result["rows"].values()]
    figures += [figure for pair in result["spread"].values() for figure in pair]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    for name in ("baseline", "ours"):
        low, high = result["spread"][name]
        assert low <= result[name] <= high
    assert result["versions"]["torch"] and result["parameters"]["data"]
    if what == "read":
        assert result["nifti_ratio"] == pytest.approx(result["rows"]["nii.gz"]["seconds"] / result["ours"])
    if what == "convert":
        assert result["volumes_per_second_and_core"] == pytest.approx(1 / result["ours"])
        assert set(result["parameters"]["megabytes"]) == set(result["rows"])
    if what == "step":
        assert all(memory > 0.01 for memory in result["parameters"]["peak_memory_gib"].values())
        parts = [counts for part, counts in result["operators"].items() if part != "all"]
        for kind in ("operators", "casts"):
            assert result["operators"]["all"][kind] == sum(counts[kind] for counts in parts) > 0
        assert f"operators of a step: {result['operators']['all']['operators']}, of which" in process.stdout
        assert set(result["objectives"]) == {"--centering sinkhorn", "--koleo 0.1", "--ibot 1"}
        for flags, cost in result["objectives"].items():
            assert cost["spread"][0] <= cost["ratio"] <= cost["spread"][1]
            assert f"a step with {flags} takes" in process.stdout
    if what == "train":
        assert result["samples_per_second"] == pytest.approx(1 / result["ours"])
        assert 0 <= result["waiting_for_data"] <= 1 and result["peak_memory_gib"] > 0.1
        assert 0 < result["teraflops"] < result["matrix_product_teraflops"]


def test_baseline_stands_in_the_report_as_it_ran(run):
    what, process = run
    result = json.loads(process.stdout.splitlines()[-1])
    assert [node.name for node in ast.parse(result["baseline_code"]).body] == BASELINES[what]
    source = "".join(path.read_text() for path in ROOT.glob("dino3d/benchmarks/*.py"))
    assert all(part.strip() in source for part in result["baseline_code"].split("\n\n\n"))
    report = process.stdout[: process.stdout.rindex('{"what"')]
    assert all(line.strip() in report for line in result["baseline_code"].splitlines())
    assert "CPU threads: 1" in report and all(name in report for name in result["parameters"])


def test_tasks_take_turns_of_which_the_first_does_not_count():
    from dino3d.benchmarks.turns import comparison, take_turns

    now, begun = [0.0], []

    def task(name, *seconds):
        def run(turn):
            begun.append((turn, name))
            now[0] += seconds[turn]

        return run

    tasks = {"baseline": (task("baseline", 900, 2, 18, 4), 2), "ours": (task("ours", 9, 1, 3, 1), 1)}
    times = take_turns(tasks, 3, lambda: now[0])
    assert begun == [(turn, name) for turn in range(4) for name in tasks]
    assert times == {"baseline": [1, 9, 2], "ours": [1, 3, 1]}  # seconds of one item
    result = comparison(3, "seconds", times, {}, "", {})
    assert (result["ratio"], result["spread"]["ratio"], result["spread"]["ours"]) == (2, [1, 3], [1, 3])


def test_a_patch_of_other_voxels_is_not_timed():
    from dino3d.benchmarks.reading import require_voxels

    volume = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    require_voxels(volume[1:3, :2, :2], volume, np.array([1, 0, 0]), (2, 2, 2), "file")
    with pytest.raises(UserError, match=r"file: the patch at \[1, 0, 0\] has other voxels than the scan"):
        require_voxels(volume[:2, :2, :2], volume, np.array([1, 0, 0]), (2, 2, 2), "file")


def test_views_of_27_tokens_against_8():
    small = "--arch vit_micro --out_dim 64 --batch_size 1 --input_size 24 24 24 --patch_size 6 6 6"
    process = benchmark("views", "--json", "--repeats", "1", *small.split())
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    kinds = ("8 tokens", "27 tokens", "27 tokens, resized global views")
    assert [*result["costs"]] == [*(f"ten views, {kind}" for kind in kinds), "step, 8 tokens", "step, 27 tokens"]
    for name, (median, low, high) in result["costs"].items():
        assert 0 < low <= median <= high and (median == 1 or not name.endswith(", 8 tokens"))
    assert "local views 18 x 18 x 18" in process.stdout and result["parameters"]["local_crops_scale"] == [0.5, 1]


def test_a_step_of_vit_small_takes_226_gigaflop():
    """The count of earlier work, every block's matrix products for every token, and ours without what nothing reads:
    in the last block the class token alone goes on. Within 2 %: torch counts the attention's backward pass as 2.5
    times its forward."""
    from dino3d.benchmarks.step import flops_per_sample

    tokens, width, hidden, out_dim = 513, 384, 2048, 65536
    per_view = 12 * tokens * (24 * width**2 + 4 * tokens * width) + 2 * 512 * width * 12 * 12 * 6
    local = 12 * 5 * (24 * width**2 + 4 * 5 * width) + 2 * 4 * width * 12 * 12 * 6
    head = 2 * (width * hidden + hidden**2 + hidden * 256 + 256 * out_dim)
    whole = (
        2 * per_view + 3 * (2 * per_view + 8 * local) + 32 * head
    )  # teacher; student, forward and twice that backward
    assert whole == pytest.approx(226e9, rel=0.02)
    spared = 512 * (18 * width**2 + 4 * 513 * width) * 2 * 4 + 4 * (18 * width**2 + 4 * 5 * width) * 8 * 3
    assert flops_per_sample("vit_small", out_dim) == pytest.approx(whole - spared, rel=0.02)


def test_a_block_takes_half_the_operators_that_it_took():
    """Of vit_micro, by its depth, in bf16 and with stochastic depth; before views of both sizes were packed and weights
    cast together, each block took 128, of which casts 38, and a step of vit_small 1,915 in all."""
    import functools

    from dino3d.benchmarks.step import step_operators
    from vision_transformer import ARCHITECTURES

    counts = {}
    for depth in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            build = functools.partial(ARCHITECTURES["vit_micro"], depth=depth)
            patch.setitem(ARCHITECTURES, "vit_micro", build)
            counts[depth] = step_operators("vit_micro", 64, "bf16")["all"]
    block = {kind: (counts[4][kind] - counts[2][kind]) / 2 for kind in counts[4]}
    assert 18 < block["operators"] <= 128 / 2 and block["casts"] <= 38 / 2, block


def test_growth_draws_a_picture(tmp_path, monkeypatch):
    """With the timing left out."""
    from dino3d.benchmarks.training import draw_growth

    panels = {"samples per batch": [(1, None), (2, None)], "processes": [(1, None)]}
    rows = {
        f"{panel}: {at}": {"seconds": 1.0, "spread": [0.9, 1.2]} for panel, cases in panels.items() for at, _ in cases
    }
    draw_growth(tmp_path / "growth.png", panels, rows, "title")
    from PIL import Image

    assert Image.open(tmp_path / "growth.png").size[0] > 500


def test_many_volumes_and_ranks_are_simulated():
    """In one process and two ranks; what each of the ranks does is reckoned for all of them."""
    flags = ("--volumes", "200", "--ranks", "16", "--arch", "vit_micro", "--out_dim", "64", "--repeats", "1")
    process = benchmark("scale", *flags, "--json")
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    rows, megabytes = result["rows"], result["parameters"]["checkpoint_megabytes"]
    assert len(rows) == 10 and "rank 0 alone" in rows["list, first start"]["note"]
    received = rows["resume, received"]
    assert received["seconds_of_all"] == pytest.approx(15 * received["seconds"])
    assert megabytes > 10 and received["megabytes"] < 1.5 * megabytes  # one copy: no rank holds a second


def test_what_a_gpu_has_to_show_is_measured_on_a_cpu_too():
    """The parts of `benchmark.py gpu`, on a CPU and small."""
    from dino3d.benchmarks import gpu

    step = gpu.gpu_step("vit_micro", 64, 1, False, True, 1, "cpu")
    assert step["milliseconds"] > 0 and step["launches"] == 0 and not step["kernels"]
    assert not gpu.grouped.IN_GROUPS
    attention = gpu.gpu_attention(2, 2, (9, 8), 1, "cpu")["milliseconds"]
    assert attention["9 tokens math"] > 0 and attention["8 tokens flash"] > 0 and attention["9 tokens cudnn"] is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "SCAN_SIZE", (150, 150, 110))
        views = gpu.gpu_views(1, 1, "cpu")
    assert views["milliseconds"].keys() == {"3 augmentations, plain", "6 augmentations, plain"}  # no kernel on a CPU
    assert views["difference"] == 0


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(monkeypatch, capsys):
    """`benchmark.py gpu` with its parts replaced: what goes wrong is a row, and the rest is measured."""
    from dino3d.benchmarks import gpu
    from dino3d.benchmarks.turns import print_report

    def training(folder, arch, *_):
        if arch == "vit_base":
            raise subprocess.TimeoutExpired("main_dino.py", 1)
        return {"note": f"{arch} trained"}

    def child(task, *arguments):
        if task is gpu.gpu_views:
            raise RuntimeError("CUDA error: an illegal\nmemory access")
        monkeypatch.setattr(gpu.time, "monotonic", lambda: 1e9 if task is gpu.gpu_attention else 0.0)
        return {"note": task.__name__}

    monkeypatch.setattr(gpu, "scan", lambda size: (None, None, "nothing"))
    monkeypatch.setattr(gpu, "write_copies", lambda *_: None)
    monkeypatch.setattr(gpu, "gpu_tests", lambda seconds: {"note": "41 passed"})
    monkeypatch.setattr(gpu, "gpu_training", training)
    monkeypatch.setattr(gpu, "in_child", child)
    result = gpu.gpu("cuda", 1, 10)
    notes = {name: row["note"] for name, row in result["rows"].items()}
    assert notes["tests marked gpu"] == "41 passed" and notes["vit_large from the disk"] == "vit_large trained"
    assert notes["vit_base from the disk"].startswith("not done after")
    assert notes["ten views"] == "failed: RuntimeError: CUDA error: an illegal memory access"
    assert notes["attention"] == "gpu_attention"
    print_report({"what": "gpu", "device": "cuda", "device_name": "", "threads": 1, "versions": {}, **result})
    assert capsys.readouterr().out.count("41 passed") == 2  # at once, and in the table
    assert gpu.gpu("cuda", 1, 0.01)["rows"]["attention"]["note"].startswith("left out")


def test_tests_that_take_too_long_are_told_as_far_as_they_came(monkeypatch):
    from dino3d.benchmarks import gpu

    output = b"tests/a.py::test_x[1 2] PASSED [ 10%]\ntests/a.py::test_y FAILED [ 20%]\ntests/a.py::test_z "

    def run(words, timeout, **_):
        if timeout < 1:
            raise subprocess.TimeoutExpired(words, timeout, output)
        return subprocess.CompletedProcess(words, 1, b"", b"No module named pytest")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    found = gpu.gpu_tests(0.4)
    assert found["failed"] == ["tests/a.py::test_y"] and len(found["passed"]) == 1
    assert found["note"] == "1 passed, 1 failed, not done after 0 s; tests/a.py::test_y"
    assert gpu.gpu_tests(2)["note"] == "No module named pytest, exit code 1"


def test_a_picture_that_has_no_folder_is_refused_before_anything_is_timed(tmp_path):
    process = benchmark("growth", "--arch", "vit_tiny", "--output", tmp_path / "none" / "growth.png")
    (line,) = process.stderr.splitlines()
    assert (
        process.returncode == 1
        and line.startswith("error: --output")
        and "does not exist" in line
        and not process.stdout
    )


def test_peers_that_are_missing_are_said_to_be(monkeypatch, capsys):
    """Rows of others have a ratio to ours; here one of them can't be imported, whatever is installed."""
    from dino3d.benchmarks import peer_comparison
    from dino3d.benchmarks.turns import print_report

    monkeypatch.setattr(peer_comparison.others, "missing", lambda name: "" if name == "monai" else f"missing: {name}")
    monkeypatch.setattr(peer_comparison, "GLOBAL", (24, 24, 12))
    monkeypatch.setattr(peer_comparison, "LOCAL", (12, 12, 6))
    monkeypatch.setattr(peer_comparison, "SCAN_SIZE", (130, 125, 121))
    result = peer_comparison.peers("cpu", 1, None)
    rows = result["rows"]
    for number in ("three", "six"):
        assert rows[f"ten views, {number}: ours"]["ratio"] == 1
        assert rows[f"ten views, {number}: MONAI, one resampling to the view"]["ratio"] > 0
        assert rows[f"ten views, {number}: batchgeneratorsv2"]["seconds"] is None
    assert rows["a patch: zarr 3"]["note"] == "missing: zarr" and rows["a patch: npy, uncompressed"]["ratio"] > 0
    print_report({"what": "peers", **result, "threads": 1, "device": "cpu", "device_name": "", "versions": {}})
    assert "missing: torchio" in capsys.readouterr().out


def test_without_json_only_the_report():
    process = benchmark("read", "--repeats", "1", "--reads", "1", "--size", "130", "125", "121")
    assert process.returncode == 0, process.stderr
    assert "baseline / ours" in process.stdout and not process.stdout.splitlines()[-1].startswith("{")


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "what"),
        (["write"], "write"),
        (["read", "--repeats", "0"], "--repeats"),
        (["read", "--device", "cuda"], "cuda"),
        (["peers", "--device", "cuda"], "cuda"),
        (["read", "--size", "100", "200", "200"], "--size"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, named):
    process = benchmark(*arguments)
    lines = process.stderr.splitlines()
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
    assert not process.stdout


def test_loader_against_what_is_no_checkout():
    process = benchmark("loader", "--against", "missing")
    assert process.returncode == 1 and process.stderr.startswith("error: --against missing: holds no main_dino.py")
