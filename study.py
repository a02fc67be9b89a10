"""The paper's study as one command: which augmentations matter, and does pre-training help? Arms x seeds x tasks.

    python study.py --output_dir STUDY --data_dir PRETRAIN --classification LNC --segmentation LTS --probe LNC
    python study.py --output_dir STUDY --arms none paper random scratch --seeds 0 1 2
    python study.py --output_dir STUDY --job $SLURM_ARRAY_TASK_ID

Each arm is a set of flags of main_dino.py; it is pre-trained, then fine-tuned and probed, for each seed, by the scripts
as they stand. Start the same command again to resume; with more --arms, --seeds or tasks to add those. The folder holds
report.html, study.png, results.csv, seeds.csv, differences.csv, claims.csv, results.json, times.csv, study.json (what
the study is) and arms/ARM/seedK/ (what each run wrote). Loads no torch.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

from dino3d.command_line import ArgumentParser, UserError, available_cores, exit_status, help_flags, number
from dino3d.evaluation.comparison import LEVEL
from dino3d.evaluation.statistics import FEWEST_PATIENTS
from dino3d.run_lock import own_folder
from dino3d.study import estimate
from dino3d.study.arms import BUILT_IN, choose_arms, read_arms
from dino3d.study.contrasts import compare_arms, smallest_p
from dino3d.study.definition import PRETRAIN, STAGES, TASKS, Given, Study, define, save_study
from dino3d.study.devices import make_slots, memory_for, require_one_process, visible_gpus
from dino3d.study.jobs import StudyJob, all_units, require_same_flags
from dino3d.study.outcome import made_with, outcome_lines, tested, write_outcome
from dino3d.study.pool import FailedJob, Pool
from dino3d.study.scores import score_task


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="study.py",
        usage="study.py --output_dir DIR --data_dir DIR --classification DIR [flags]\n"
        "       study.py --output_dir DIR [--list | --plan | --table | --job K]",
        description="Arms x seeds x tasks: pre-train, fine-tune, probe, and compare all arms. Start the same command "
        "again to resume, or with more arms, seeds or tasks to add them.",
    )
    group = parser.add_argument_group("data and output")
    group.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="folder of the study; one that is there resumes"
    )
    group.add_argument("--data_dir", metavar="DIR", help="CTs to pre-train on, as main_dino.py takes them")
    group.add_argument(
        "--classification",
        metavar="DIR",
        help="labelled crops, or a table of them, as main_lnc_luna16.py takes them: every arm is fine-tuned on them",
    )
    group.add_argument(
        "--segmentation",
        metavar="DIR",
        help="CTs with masks, or a table of them, as main_lts_msd.py takes them: every arm is fine-tuned on them",
    )
    group.add_argument(
        "--probe",
        metavar="DIR",
        help="labelled crops as --classification has them, or a table with the columns name, path, label and maybe "
        "patient: logistic regression on each arm's frozen features",
    )
    group = parser.add_argument_group("arms and seeds")
    group.add_argument(
        "--arms",
        nargs="+",
        metavar="NAME",
        help=f"arms to run: {', '.join(BUILT_IN)}, or those of --arms_file. rotation to histogram: that augmentation "
        "alone; paper: rotation, scale and flip; scratch: fine-tuning without pre-training; random: the encoder before "
        "training, frozen. Default: all of these; with an --arms_file none, scratch, random and all that it names",
    )
    group.add_argument(
        "--arms_file",
        metavar="FILE",
        help="text with an arm in each line, `name: flags of main_dino.py`, which stand after --pretrain_flags, or "
        "`name: checkpoint`, which is not pre-trained; see docs/study.md",
    )
    group.add_argument(
        "--seeds", nargs="+", type=number(int, 0), metavar="N", help="seeds of every arm; default: 0 1 2"
    )
    group = parser.add_argument_group("flags of the scripts, in quotes")
    for stage, script in zip(STAGES, ("main_dino.py", "main_lnc_luna16.py", "main_lts_msd.py", "extract_features.py")):
        group.add_argument(
            f"--{stage}_flags",
            metavar="FLAGS",
            help=f"flags of {script} for all arms, as --{stage}_flags='--FLAG VALUE ...'; @FILE in them is a file of "
            "flags",
        )
    group = parser.add_argument_group("statistics")
    group.add_argument(
        "--draws",
        default=10000,
        type=number(int, 200),
        help="bootstrap draws of patients and seeds; the smallest p-value is 1 / draws, so more arms need more of them",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--parallel",
        type=number(int, 1),
        help="jobs at once; default: one for each GPU, or for each CPU core as far as memory allows",
    )
    group.add_argument(
        "--processes_per_job",
        type=number(int, 1),
        help="processes of each job, started by torchrun, one for each GPU; they share out batches, so it belongs to "
        "the study; default: 1",
    )
    group.add_argument(
        "--threads",
        type=number(int, 1),
        help="threads of each process on CPUs; the last digits depend on them, so they belong to the study; default: 1",
    )
    group.add_argument(
        "--job",
        type=number(int, 0),
        metavar="K",
        help="run unit K of --list alone, for a task of a Slurm array; the last one to end writes the tables",
    )
    group.add_argument("--list", action="store_true", help="show the units, an arm and a seed each, and run nothing")
    group.add_argument("--plan", action="store_true", help="measure and say how long the study will take, and end")
    group.add_argument("--table", action="store_true", help="write tables and report of what is done, and run nothing")
    help_flags(group)
    return parser


def check_flags(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the folder holds (exit code 2)."""
    modes = [f"--{name}" for name in ("list", "plan", "table") if getattr(args, name)]
    modes += ["--job"] if args.job is not None else []
    if len(modes) > 1:
        parser.error(f"{' and '.join(modes)} exclude each other: give one of them")


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    require_one_process(os.environ)

    # ------------------------------------------------------------------------------------------------------- the study
    folder = Path(os.path.abspath(args.output_dir))  # jobs run where the study began, maybe elsewhere
    study, lines = define(folder, given_by(args), choose_arms(None, {}))
    units = all_units(study)
    jobs = [job for unit in units for job in unit]
    print(*lines, sep="\n", end="\n" if lines else "")
    print(
        f"{len(study.arms)} arms x {len(study.seeds)} seeds, {', '.join(study.tasks)}: {len(units)} units of together "
        f"{len(jobs)} jobs"
    )
    if args.list:
        list_units(units, folder)
        return
    require_same_flags(jobs)
    if args.job is not None and args.job >= len(units):
        parser.error(f"--job {args.job}: the study has units 0 to {len(units) - 1}, see --list")
    if args.table:
        finish(study, jobs, args.draws, [])
        return
    try:
        parsed = estimate.parse_flags(jobs, study.work_dir)
    except ValueError as error:
        parser.error(str(error))

    # ------------------------------------------------------------------------------------------------------------ jobs
    lock = study.folder if args.job is None else units[args.job][0].unit
    study.folder.mkdir(parents=True, exist_ok=True)
    with own_folder(lock):
        save_study(study)
        if args.job is not None:
            failures = pool_for(study, args.parallel, None).run(units[args.job], len(units[args.job]))
            if not failures and not all(job.is_done() for job in jobs):
                print(f"unit {args.job} is done; others are not, the last one writes the tables (or --table)")
                return
        else:
            costs = estimate.measured_costs(study.folder) | estimate.finished_costs(jobs)
            kinds = {estimate.job_kind(job) for job in jobs if not job.is_done()}
            if kinds - costs.keys():
                print(f"measuring {estimate.STEPS} steps of pre-training and one epoch of each task")
                by_stage = {estimate.job_kind(job): args_of for job, args_of in zip(jobs, parsed)}
                costs = estimate.measure_jobs(study, pool_for(study, args.parallel, None), by_stage) | costs
            slots = pool_for(study, args.parallel, memory_for(estimate.peak_memory_of_jobs()))
            print(*estimate.forecast(study, jobs, costs, len(slots.slots)), sep="\n")
            if args.plan:
                return
            failures = slots.run(jobs, len(jobs))
    finish(study, jobs, args.draws, failures)


def given_by(args: argparse.Namespace) -> Given:
    """What a command line says of a study. Raises UserError."""
    of_file = read_arms(args.arms_file) if args.arms_file else {}
    data = {PRETRAIN: args.data_dir, **{task: getattr(args, task) for task in TASKS}}
    for stage, path in data.items():
        if path is not None and not os.path.exists(path):
            raise UserError(f"{'--data_dir' if stage == PRETRAIN else '--' + stage} {path}: no such file or folder")
    flags = {stage: getattr(args, f"{stage}_flags") for stage in STAGES}
    return Given(
        {stage: path for stage, path in data.items() if path is not None},
        {stage: text for stage, text in flags.items() if text is not None},
        choose_arms(args.arms, of_file) if args.arms or of_file else None,
        args.seeds,
        args.processes_per_job,
        args.threads,
    )


def pool_for(study: Study, parallel: int | None, memory: int | None) -> Pool:
    """The Pool of this machine's slots. memory: see `devices.make_slots`"""
    slots = make_slots(visible_gpus(os.environ), available_cores(), study.processes, study.threads, parallel, memory)
    return Pool(slots, study.processes, study.work_dir, lambda line: print(f"{time.strftime('%H:%M:%S')} {line}"))


def list_units(units: Sequence[Sequence[StudyJob]], folder: Path) -> None:
    """The units, and how a Slurm array runs them."""
    for number_of_unit, unit in enumerate(units):
        done = sum(job.is_done() for job in unit)
        stages = ", ".join(job.stage for job in unit)
        print(f"{number_of_unit:4}  {unit[0].arm}, seed {unit[0].seed}: {stages} ({done} of {len(unit)} done)")
    print(
        f"Slurm: sbatch --array=0-{len(units) - 1} --wrap 'python study.py --output_dir {folder} --job "
        "$SLURM_ARRAY_TASK_ID' (with the study's other flags, where it has not begun yet)"
    )


def finish(study: Study, jobs: Sequence[StudyJob], draws: int, failures: Sequence[FailedJob]) -> None:
    """Write the tables from what is done, and tell them. Raises UserError where a job failed."""
    with threadpool_limits(1):  # small matrices: more threads are slower, and change the last digits
        scores = [one for task in study.tasks if (one := score_task(study, task, jobs, draws)) is not None]
    if scores:
        found = compare_arms(scores, [arm.name for arm in study.arms])
        notices = [notice for one in scores for notice in one.notices]
        missing = [job.name for job in jobs if not job.is_done()]
        if missing:
            notices.append(f"{len(missing)} of {len(jobs)} jobs are not done, such as {missing[0]}: tables lack them")
        if tested(found) >= LEVEL * draws:
            notices.append(
                f"{tested(found)} comparisons: with --draws {draws} none can be shown; give more than "
                f"{int(tested(found) / LEVEL)}"
            )
        for one in scores:
            if FEWEST_PATIENTS <= one.patients and tested(found) * smallest_p(one.patients) >= LEVEL:
                notices.append(f"{one.task}: {one.patients} patients are too few to show any of as many comparisons")
        if len(study.seeds) == 1:
            notices.append(
                "one seed: intervals are over patients alone and say nothing of other seeds, so nothing is shown"
            )
        if len(made_with(jobs)) > 1:
            notices.append(f"the jobs were run by {len(made_with(jobs))} versions of the code or of its packages")
        write_outcome(study, scores, found, jobs, notices)
        print(*outcome_lines(study, scores, found, notices), sep="\n")
    elif not failures:
        raise UserError(f"--output_dir {study.folder}: no task of it is done yet")
    if failures:
        first = failures[0]
        raise UserError(
            f"{len(failures)} of {len(jobs)} jobs failed, such as {first.job.name}: {first.reason} (all it said: "
            f"{first.job.log}); start again to retry"
        )


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
