"""Baseline and ours take turns; what comes of it: the ratio, a row for each that took part, the report."""

import statistics
import time
from collections.abc import Callable, Sequence
from inspect import getsource
from typing import Any

import torch

from dino3d.data.conventions import format_size
from dino3d.study.devices import cpu_name


def take_turns(
    tasks: dict[str, tuple[Callable[[int], Any], float]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """{name: [seconds per item, of each repeat]}: every task once to warm up, then all of them in turn, `repeats`
    times.

    tasks: {name: (function of the turn's number, items that it handles per call)}; clock: in seconds
    """
    times = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, (run, items) in tasks.items():
            start = clock()
            run(turn)
            times[name].append((clock() - start) / items)
    return {name: seconds[1:] for name, seconds in times.items()}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def until_done(call: Callable[[], Any], device: str) -> Callable[[int], None]:
    """A function for `take_turns` that ends when the device has done what is called."""

    def run(turn: int) -> None:
        call()
        synchronise(device)

    return run


def seconds_until_done(call: Callable[[], Any], repeats: int, device: str) -> list[float]:
    """Of so many calls, on a device that is idle when they begin."""
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def report_row(seconds: Sequence[float], note: str = "") -> dict[str, Any]:
    return {"seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)], "note": note}


def ratio_within_turns(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    """[median, lowest, highest] of the ratios of two that took turns."""
    ratios = [one / other for one, other in zip(seconds, others)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def comparison(
    goal: float,
    unit: str,
    times: dict[str, list[float]],
    notes: dict[str, str],
    baseline_code: str,
    parameters: dict[str, Any],
) -> dict[str, Any]:
    """What a benchmark found, as it goes into the report and the JSON.

    goal: least ratio wanted; unit: of the times; times: {"baseline": [seconds, ...], "ours": [...], further rows ...}
    notes: {row: what was timed}; baseline_code: source text; parameters: a dict
    """
    rows = {name: report_row(seconds, notes.get(name, "")) for name, seconds in times.items()}
    return {
        "ratio": rows["baseline"]["seconds"] / rows["ours"]["seconds"],
        "goal": goal,
        "unit": unit,
        "baseline": rows["baseline"]["seconds"],
        "ours": rows["ours"]["seconds"],
        "spread": {
            "baseline": rows["baseline"]["spread"],
            "ours": rows["ours"]["spread"],
            "ratio": ratio_within_turns(times["baseline"], times["ours"])[1:],
        },
        "rows": rows,
        "parameters": parameters,
        "baseline_code": baseline_code,
    }


def sources(*objects: Callable) -> str:
    return "\n\n".join(map(getsource, objects))


def print_report(result: dict[str, Any]) -> None:
    rows = result["rows"]
    width = max(map(len, rows))
    print(
        f"{result['what']}: {result['unit']}; median (lowest to highest) of {result['parameters']['repeats']} repeats"
    )
    for name, row in rows.items():
        if row["seconds"] is None:
            print(f"  {name:{width}}  {row['note']}")
            continue
        low, high = row["spread"]
        print(f"  {name:{width}}  {row['seconds']:8.4f} ({low:.4f} to {high:.4f})  {row['note']}".rstrip())
    if "ratio" in result:
        low, high = result["spread"]["ratio"]
        print(
            f"baseline / ours: {result['ratio']:.1f} ({low:.1f} to {high:.1f} within a repeat), goal {result['goal']}"
        )
    if "nifti_ratio" in result:
        print(f"nii.gz / ours: {result['nifti_ratio']:.1f}")
    if "volumes_per_second_and_core" in result:
        print(f"ours: {result['volumes_per_second_and_core']:.2f} volumes per second and core")
    if "teraflops" in result:
        rate = result.get("matrix_product_teraflops")
        print(
            f"ours: {result['teraflops']:.3g} TFLOP/s" + (f" of {rate:.3g} in a large matrix product" if rate else "")
        )
    for part, counts in result.get("operators", {}).items():
        name = "operators of a step" if part == "all" else f"  {part}"
        print(f"{name}: {counts['operators']}, of which casts {counts['casts']}")
    for flags, cost in result.get("objectives", {}).items():
        low, high = cost["spread"]
        print(f"a step with {flags} takes {cost['ratio']:.2f} times as long ({low:.2f} to {high:.2f} within a repeat)")
    if "samples_per_second" in result:
        print(
            f"ours: {result['samples_per_second']:.4g} samples per second, {result['waiting_for_data']:.1%} of "
            "the time waiting "
            f"for data, {result['peak_memory_gib']:.1f} GiB"
        )
    for name, sides in result.get("measured", {}).items():
        print(f"{name}: baseline {sides['baseline']:.4g}, ours {sides['ours']:.4g}")
    print(f"device {result['device']}: {result['device_name']}; CPU threads: {result['threads']}")
    print("versions: " + ", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    print("parameters:")
    for name, value in result["parameters"].items():
        print(f"  {name}: {format_size(value) if isinstance(value, (tuple, list)) else value}")
    if "baseline_code" in result:
        print("the baseline's code:\n")
        print("\n".join("    " + line if line else "" for line in result["baseline_code"].rstrip().splitlines()))


def device_label(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; baseline: {device_label('cpu')}"
    return cpu_name()
