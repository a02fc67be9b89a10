"""How long a study will take and what disk it needs: from a few steps and one epoch with its own flags, or from what
is done."""

import heapq
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.files import TEXT, read_json, read_json_lines, walk_files, write_json
from dino3d.study.arms import PRETRAINED
from dino3d.study.definition import PRETRAIN, Study
from dino3d.study.folds import segmentation_patients
from dino3d.study.jobs import RESULTS, UNTRAINED, StudyJob, pretraining_paths, script_of, task_flags
from dino3d.study.pool import TIMES, Pool, format_seconds

STEPS = 5  # of pre-training that are measured
MEASURING = "measured"
INITIAL = "untrained"  # kind of a job: pre-training that ends before its first step
KINDS = (PRETRAIN, INITIAL, "classification", "segmentation", "probe")
PER_EPOCH = re.compile(r"(\d+) steps of \d+ samples per epoch")  # as main_dino.py says it
# Parses each command by the script's own parser, and prints what came of it
PARSE = """
import importlib, json, os, sys
for number, (script, words) in enumerate(json.load(sys.stdin)):
    folder, name = os.path.split(script.removesuffix(".py"))
    sys.path[:1] = [folder]
    module = importlib.import_module(name)
    parser = module.get_args_parser()
    try:
        args = parser.parse_args(words)
        getattr(module, "check_flags", lambda *_: None)(parser, args)
    except SystemExit:
        print(json.dumps({"failed": number}))
        break
    print(json.dumps(vars(args), default=str))
"""


class Cost(NamedTuple):
    """Seconds and bytes of a job of some kind."""

    seconds: float
    size: float


def job_kind(job: StudyJob) -> str:
    return INITIAL if job.stage == PRETRAIN and job.flags[-len(UNTRAINED) :] == UNTRAINED else job.stage


def parse_flags(jobs: Sequence[StudyJob], work_dir: str) -> list[dict[str, Any]]:
    """{flag: value} of each job as its script understands it. Raises ValueError, one line, for what it refuses."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps([(str(script_of(job.stage)), job.flags) for job in jobs]),
        capture_output=True,
        cwd=work_dir,
        **TEXT,
    )
    parsed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if parsed and set(parsed[-1]) == {"failed"}:
        job = jobs[parsed[-1]["failed"]]
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise ValueError(
            f"{job.name}: {script_of(job.stage).name} refuses its flags: {(said or ['no run is asked for'])[-1]}"
        )
    if len(parsed) != len(jobs):
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"the flags of the study's jobs could not be checked: {said}")
    return parsed


def finished_costs(jobs: Sequence[StudyJob]) -> dict[str, Cost]:
    """{kind: mean Cost} of the jobs that were done at one go."""
    found = {}
    for job in jobs:
        if job.is_done():
            attempts = [one for one in read_json_lines(job.unit / TIMES) if one.get("stage") == job.stage]
            if len(attempts) == 1 and attempts[0].get("exit_code") == 0:
                found.setdefault(job_kind(job), []).append((float(attempts[0]["seconds"]), folder_size(job.folder)))
    return {kind: Cost(*np.mean(costs, 0)) for kind, costs in found.items()}


def measured_costs(folder: Path) -> dict[str, Cost]:
    """{kind: Cost} as they were measured before; none where they were not."""
    try:
        return {kind: Cost(*map(float, one)) for kind, one in read_json(folder / "measured.json").items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def measure_jobs(study: Study, pool: Pool, parsed: dict[str, dict[str, Any]]) -> dict[str, Cost]:
    """{kind: Cost} by running a few steps and one epoch of each stage. parsed: {kind: flags as the script takes them}.
    Raises UserError where one fails, as the study's own would."""
    unit, seed = study.folder / MEASURING, study.seeds[0]
    shutil.rmtree(unit, ignore_errors=True)
    trained = [arm for arm in study.arms if not arm.weights]
    jobs, needs = [], None
    if trained:
        arm = max(trained, key=lambda one: one.flags.count("true"))  # the one with most augmentations
        flags = (*study.flags.get(PRETRAIN, ()), *arm.flags, *pretraining_paths(study, unit / PRETRAIN, seed))
        jobs.append(StudyJob(MEASURING, seed, PRETRAIN, (*flags, "--max_steps", str(STEPS)), unit, None))
        weights, needs = str(unit / PRETRAIN / RESULTS[PRETRAIN]), PRETRAIN
    else:
        weights = study.arms[0].weights_of(seed)
    for task in study.tasks:
        flags = task_flags(study, task, PRETRAINED, weights, unit / task, seed)
        flags += () if task == "probe" else ("--epochs", "1")
        folds = study.training_cases if task == "segmentation" else 0
        jobs.append(StudyJob(MEASURING, seed, task, flags, unit, needs, folds, 1 if folds else None))
    if failures := pool.run(jobs, len(jobs)):
        first = failures[0]
        raise UserError(f"the study would fail: {first.job.stage}: {first.reason} (all it said: {first.job.log})")
    walls = {one["stage"]: one["seconds"] for one in read_json_lines(unit / TIMES)}
    costs = {}
    for job in jobs:
        if job.stage == PRETRAIN:
            costs |= pretraining_costs(job, walls[job.stage], parsed.get(PRETRAIN) or parsed[INITIAL])
        else:
            epoch = sum(one.get("seconds", 0) for log in job.folder.glob("*/log.txt") for one in read_json_lines(log))
            more = (int(parsed[job.stage]["epochs"]) - 1) * epoch if epoch else 0
            runs = (
                len(set(segmentation_patients(study.data[job.stage])[0])) if job.training_cases else 1
            )  # one fold was measured
            costs[job.stage] = Cost(runs * (walls[job.stage] + more), runs * folder_size(job.folder))
    write_json(study.folder / "measured.json", {kind: list(cost) for kind, cost in costs.items()})
    shutil.rmtree(unit, ignore_errors=True)
    return costs


def pretraining_costs(job: StudyJob, wall: float, args: dict[str, Any]) -> dict[str, Cost]:
    """Of a whole pre-training and of one that ends at once. wall: seconds of a few steps, with the start; args: of the
    whole one"""
    records = read_json_lines(job.folder / "log.txt")
    seconds, steps = sum(one["seconds"] for one in records), max(one["step"] for one in records)
    per_epoch = PER_EPOCH.findall(job.log.read_text(**TEXT))
    total = int(per_epoch[-1]) * int(args["epochs"]) if per_epoch else steps
    total = min(total, int(args.get("max_steps") or total))
    one, kept = (job.folder / RESULTS[PRETRAIN]).stat().st_size, int(args.get("keep_last") or 1)
    every = int(args.get("saveckp_freq") or 0)
    size = one * (kept + (int(args["epochs"]) // every if every else 0))
    return {
        PRETRAIN: Cost(wall + seconds / steps * (total - steps), size),
        INITIAL: Cost(wall - seconds / steps * (steps - 1), one),
    }


def makespan(jobs: Sequence[StudyJob], costs: dict[str, Cost], slots: int) -> float:
    """Seconds until all jobs are done, each when what it needs is, in the order in which the pool takes them."""
    waiting, ended, running, now = list(jobs), set(), [], 0.0
    needed = {(job.unit, job.stage) for job in jobs}
    while waiting or running:
        ready = [job for job in waiting if job.needs is None or (job.unit, job.needs) in ended | _absent(job, needed)]
        while ready and len(running) < slots:
            job = ready.pop(0)
            waiting.remove(job)
            heapq.heappush(running, (now + costs[job_kind(job)].seconds, len(waiting), job))
        now, _, job = heapq.heappop(running)
        ended.add((job.unit, job.stage))
    return now


def _absent(job: StudyJob, known: set) -> set:
    """What a job needs, where it was done before."""
    return {(job.unit, job.needs)} - known


def forecast(study: Study, jobs: Sequence[StudyJob], costs: dict[str, Cost], slots: int) -> list[str]:
    """Lines on how long the jobs that are left will take, and the disk for them."""
    left = [job for job in jobs if not job.is_done()]
    if not left:
        return [f"all {len(jobs)} jobs are done"]
    if missing := {job_kind(job) for job in left} - costs.keys():
        return [f"{len(left)} of {len(jobs)} jobs are left; how long they take is not known ({', '.join(missing)})"]
    parts = []
    for kind in KINDS:
        if count := sum(job_kind(job) == kind for job in left):
            parts.append(f"{count} x {kind} of {format_seconds(costs[kind].seconds)}")
    size = sum(costs[job_kind(job)].size for job in left)
    free = shutil.disk_usage(study.folder).free
    lines = [
        f"{len(left)} of {len(jobs)} jobs are left: {', '.join(parts)}",
        f"they will take about {format_seconds(makespan(left, costs, slots))}, {slots} at a time, and "
        f"{format_bytes(size)} of disk ({format_bytes(free)} are free)",
    ]
    if size > free:
        lines.append(f"warning: the disk of {study.folder} is too small: free some of it, or choose another folder")
    return lines


def folder_size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(
        (Path(here) / name).stat().st_size for here, names in walk_files(folder, lambda error: None) for name in names
    )


def format_bytes(size: float) -> str:
    """A size on disk as one says it."""
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def peak_memory_of_jobs() -> int:
    """Bytes that the largest process took that this one has started and waited for; 0 where that is unknown."""
    try:
        import resource
    except ImportError:  # another system
        return 0
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
