"""benchmark.py by its command line, with few repeats: the JSON's shape and sense. How fast anything is, is not tested."""
import ast
import json
import math
import subprocess
import sys

import pytest

from conftest import ROOT

COMMANDS = {
    "augment": ["--repeats", "1", "--samples", "1"],
    "read": ["--repeats", "2", "--reads", "1", "--size", "160", "140", "125"],
    "convert": ["--repeats", "1", "--size", "120", "100", "20"],
}


def benchmark(*arguments):
    return subprocess.run([sys.executable, ROOT / "benchmark.py", *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module", params=COMMANDS)
def run(request):
    """(what, the finished process) of each sub-command."""
    return request.param, benchmark(request.param, "--json", *COMMANDS[request.param])


def test_last_line_is_the_result_as_json(run):
    what, process = run
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert {"what", "ratio", "goal", "baseline", "ours", "spread", "threads", "device", "versions", "parameters",
            "baseline_code"} <= result.keys()
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


def test_baseline_stands_in_the_report_as_it_ran(run):
    what, process = run
    result = json.loads(process.stdout.splitlines()[-1])
    functions = [node.name for node in ast.parse(result["baseline_code"]).body if isinstance(node, ast.FunctionDef)]
    assert functions == {"augment": ["monai_transforms", "monai_views"], "read": ["write_itk", "read_itk"], "convert": ["convert_itk"]}[what]
    source = (ROOT / "benchmark.py").read_text()
    assert all(part.strip() in source for part in result["baseline_code"].split("\n\n\n"))
    report = process.stdout[:process.stdout.rindex("{\"what\"")]
    assert all(line.strip() in report for line in result["baseline_code"].splitlines())
    assert "CPU threads: 1" in report and all(name in report for name in result["parameters"])


def test_without_json_only_the_report():
    process = benchmark("read", "--repeats", "1", "--reads", "1", "--size", "130", "125", "121")
    assert process.returncode == 0, process.stderr
    assert "baseline / ours" in process.stdout and not process.stdout.splitlines()[-1].startswith("{")


@pytest.mark.parametrize("arguments, named", [
    ([], "what"), (["write"], "write"), (["read", "--repeats", "0"], "--repeats"), (["read", "--device", "cuda"], "cuda"),
    (["read", "--size", "100", "200", "200"], "--size")])
def test_wrong_arguments_end_in_one_line(arguments, named):
    process = benchmark(*arguments)
    lines = process.stderr.splitlines()
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
    assert not process.stdout
