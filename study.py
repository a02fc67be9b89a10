"""The paper's study as one command: which augmentations matter, and does pre-training help? Arms x seeds x tasks.

    python study.py --output_dir STUDY --data_dir PRETRAIN --classification LNC --segmentation LTS --probe LNC
    python study.py --output_dir STUDY --arms none paper random scratch --seeds 0 1 2
    python study.py --output_dir STUDY --job $SLURM_ARRAY_TASK_ID
    python study.py --output_dir TABLES --from_records RECORDS

Each arm is a set of flags of main_dino.py; it is pre-trained, then fine-tuned and probed, for each seed, by the scripts
as they stand. Start the same command again to resume; with more --arms, --seeds or tasks to add those. The folder holds
report.html, study.png, results.csv, results.md, seeds.csv, differences.csv, claims.csv, results.json, times.csv,
study.json (what the study is) and arms/ARM/seedK/ (what each run wrote).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

from dino3d.command_line import (
    ArgumentParser,
    UserError,
    available_cores,
    did_you_mean,
    exit_status,
    help_flags,
    number,
)
from dino3d.evaluation.comparison import LEVEL
from dino3d.evaluation.statistics import FEWEST_PATIENTS
from dino3d.run_lock import own_folder
from dino3d.study import estimate
from dino3d.study.arms import ARM_NAME, BUILT_IN, COMPARED_WITH, choose_arms, read_arms
from dino3d.study.contrasts import Comparison, compare_arms, smallest_p
from dino3d.study.definition import PRETRAIN, STAGES, TASKS, Given, Study, define, save_study, study_in_words
from dino3d.study.devices import make_slots, memory_for, require_one_process, visible_gpus
from dino3d.study.ensembles import ensemble_name
from dino3d.study.jobs import StudyJob, all_units, require_same_flags
from dino3d.study.outcome import Told, made_with, outcome_lines, tested, write_outcome, write_times, writing_to
from dino3d.study.pool import FailedJob, Pool
from dino3d.study.records import (
    RecordFolder,
    read_records,
    score_records,
    tested_patients,
    told_of_records,
    unlike_shares,
)
from dino3d.study.scores import FEW_LABELS, FIGURES, METRIC, TaskScores, few_labels_of, score_task


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="study.py",
        usage="study.py --output_dir DIR --data_dir DIR --classification DIR [flags]\n"
        "       study.py --output_dir DIR [--list | --plan | --table | --job K]\n"
        "       study.py --output_dir DIR --from_records DIR",
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
    group.add_argument(
        "--training_cases",
        type=number(int, 1),
        metavar="N",
        help="for few cases: each patient of --segmentation is tested once, by a model that the next N patients by "
        "name train and one more validates; default: main_lts_msd.py draws a test set and folds",
    )
    group.add_argument(
        "--few_labels",
        action="store_true",
        help="the probe is also trained with 50, 25 and 10 %% of the training patients' labels; of finished runs too, "
        "as nothing is run again",
    )
    group = parser.add_argument_group("statistics")
    group.add_argument(
        "--draws",
        default=10000,
        type=number(int, 200),
        help="bootstrap draws of patients and seeds; the smallest p-value is 1 / draws, so more arms need more of them",
    )
    group.add_argument(
        "--against",
        nargs="+",
        metavar="ARM",
        help="arms that the tables and the figure compare every arm with; all pairs stand in differences.csv; default: "
        f"{' '.join(COMPARED_WITH)}, those of them that there are",
    )
    group = parser.add_argument_group("records")
    group.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="write a small file there for each finished run, with its flags, code, device, seconds and the score of "
        "every case; an arm and seed that is recorded with the same flags and code is not run",
    )
    group.add_argument(
        "--part",
        default="",
        metavar="NAME",
        help="what the records are a part of the results of, such as half0, where other studies give the other parts",
    )
    group.add_argument(
        "--patients",
        metavar="FILE",
        help="text with a patient in each line: the records hold their cases alone, as of those who are not in "
        "--data_dir; default: of all",
    )
    group.add_argument(
        "--note", default="", metavar="TEXT", help="what a reader of the records must know, such as of the data"
    )
    group.add_argument(
        "--features",
        nargs="+",
        metavar="FILE",
        help="tables of features, or shell patterns of them, that get records too, judged by the probe, as "
        "those of extract_features.py --trivial; each is called what stands last in its name, as trivial-radial",
    )
    group.add_argument(
        "--from_records",
        type=Path,
        metavar="DIR",
        help="write the tables of all records of a folder into --output_dir, parts of a run together, and run nothing; "
        "--arms names those that are told, in their order",
    )
    group.add_argument(
        "--ensembles",
        nargs="+",
        metavar="ARM",
        help="--from_records also judges the seeds of each of these arms together, by the mean of their predictions "
        "for each case, as ARM-ensemble; not of masks",
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
    modes += ["--from_records"] if args.from_records else []
    if len(modes) > 1:
        parser.error(f"{' and '.join(modes)} exclude each other: give one of them")
    for flag in ("part", "patients", "note", "features"):
        if getattr(args, flag) and not args.records:
            parser.error(f"--{flag}: is for --records DIR, which is missing")
    if args.ensembles and not args.from_records:
        parser.error("--ensembles: is for --from_records DIR, which is missing")
    if args.part and not ARM_NAME.fullmatch(args.part):
        parser.error(f"--part {args.part}: expected letters, digits and _ . + -")
    if args.from_records:
        given = ("data_dir", *TASKS, *(f"{stage}_flags" for stage in STAGES), "training_cases", "few_labels")
        given += ("arms_file", "seeds", "records", "parallel", "processes_per_job", "threads")
        for flag in given:
            if getattr(args, flag):
                parser.error(f"--{flag}: --from_records makes tables of what was run; leave it out")


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    require_one_process(os.environ)

    if args.from_records:
        tables_from_records(
            args.from_records, args.output_dir, args.arms, args.against, args.ensembles or (), args.draws
        )
        return

    # ------------------------------------------------------------------------------------------------------- the study
    folder = Path(os.path.abspath(args.output_dir))  # jobs run where the study began, maybe elsewhere
    study, lines = define(folder, given_by(args), choose_arms(None, {}))
    if args.few_labels and "probe" not in study.data:
        parser.error("--few_labels: is for --probe DIR, which is missing")
    few, more = few_labels_of(study.data["probe"]) if args.few_labels else ((), [])  # before hours of runs
    lines += more
    require_known("--against", args.against, [arm.name for arm in study.arms])
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
    records = records_of(args, few)
    if args.job is not None and args.job >= len(units):
        parser.error(f"--job {args.job}: the study has units 0 to {len(units) - 1}, see --list")
    if args.table:
        finish(study, units, args, records, few, [])
        return
    try:
        parsed = estimate.parse_flags(jobs, study.work_dir)
    except ValueError as error:
        parser.error(str(error))
    left = [unit for unit in units if not (records and records.holds(unit))]
    if len(left) < len(units):
        print(f"{len(units) - len(left)} of {len(units)} units are in the records of {records.folder}: not run")

    # ------------------------------------------------------------------------------------------------------------ jobs
    def record(job: StudyJob) -> None:
        """At once, so that what is done stays when the rest is not."""
        if records and job.stage != PRETRAIN:
            with threadpool_limits(1):
                records.write(study, job, next(unit for unit in units if job in unit))

    lock = study.folder if args.job is None else units[args.job][0].unit
    study.folder.mkdir(parents=True, exist_ok=True)
    with own_folder(lock):
        save_study(study)
        if args.job is not None:
            mine = units[args.job] if units[args.job] in left else []
            failures = pool_for(study, args.parallel, None).run(mine, len(mine), record)
            if not failures and not all(job.is_done() for unit in left for job in unit):
                print(f"unit {args.job} is done; others are not, the last one writes the tables (or --table)")
                return
        else:
            todo = [job for unit in left for job in unit]
            costs = estimate.measured_costs(study.folder) | estimate.finished_costs(jobs)
            kinds = {estimate.job_kind(job) for job in todo if not job.is_done()}
            if kinds - costs.keys():
                print(f"measuring {estimate.STEPS} steps of pre-training and one epoch of each task")
                by_stage = {estimate.job_kind(job): args_of for job, args_of in zip(jobs, parsed)}
                costs = estimate.measure_jobs(study, pool_for(study, args.parallel, None), by_stage) | costs
            slots = pool_for(study, args.parallel, memory_for(estimate.peak_memory_of_jobs()))
            print(*estimate.forecast(study, todo, costs, len(slots.slots)), sep="\n")
            if args.plan:
                return
            failures = slots.run(todo, len(todo), record)
    finish(study, units, args, records, few, failures)


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
        args.training_cases,
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


def records_of(args: argparse.Namespace, few: tuple[str, ...]) -> RecordFolder | None:
    """Where this study's records go; None: nowhere. few: of FEW_LABELS, that are recorded. Raises UserError."""
    if args.records is None:
        return None
    patients = tested_patients(args.patients) if args.patients else None
    try:  # before hours of runs
        args.records.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.records):
            pass
    except OSError as error:
        raise UserError(f"--records {args.records}: can't be written to ({error.strerror})") from error
    return RecordFolder(args.records, args.part, patients, args.note, tuple(args.features or ()), few)


def finish(
    study: Study,
    units: Sequence[Sequence[StudyJob]],
    args: argparse.Namespace,
    records: RecordFolder | None,
    few: Sequence[str],
    failures: Sequence[FailedJob],
) -> None:
    """Write tables and records of what is done, and tell them. few: of FEW_LABELS, that are made. Raises UserError
    where a job failed."""
    jobs = [job for unit in units for job in unit]
    with threadpool_limits(1):  # small matrices: more threads are slower, and change the last digits
        if records:
            for unit in units:
                for job in unit:
                    if job.stage != PRETRAIN and job.is_done():
                        records.write(study, job, unit)
            if any(job.is_done() for job in jobs):  # where all is recorded, so are these, and their files not there
                records.write_features(study)
            print(f"records      {records.folder}")
            print(*(f"note: {line}\n" for line in records.told_of_patients(units)), sep="", end="")
        figures = [one for task in study.tasks for one in FIGURES[task] if one in few or one not in FEW_LABELS]
        scores = [one for figure in figures if (one := score_task(study, figure, jobs, args.draws)) is not None]
        found = compare_arms(scores, [arm.name for arm in study.arms])
    if scores:
        notices = [notice for one in scores for notice in one.notices]
        missing = [job.name for job in jobs if not job.is_done()]
        if missing:
            notices.append(f"{len(missing)} of {len(jobs)} jobs are not done, such as {missing[0]}: tables lack them")
        if len(made_with(jobs)) > 1:
            notices.append(f"the jobs were run by {len(made_with(jobs))} versions of the code or of its packages")
        words = study_in_words(study)
        told = Told(
            study.folder,
            words["arms"],
            study.seeds,
            study.data,
            words["flags"],
            made_with(jobs),
            notices + limits(scores, found, args.draws),
            args.against or COMPARED_WITH,
        )
        with writing_to("--output_dir", study.folder):
            write_outcome(told, scores, found)
            write_times(study)
        print(*outcome_lines(told, scores, found), sep="\n")
    elif not failures and not records:
        raise UserError(f"--output_dir {study.folder}: no task of it is done yet")
    if failures:
        first = failures[0]
        raise UserError(
            f"{len(failures)} of {len(jobs)} jobs failed, such as {first.job.name}: {first.reason} (all it said: "
            f"{first.job.log}); start again to retry"
        )


def require_known(flag: str, names: Sequence[str] | None, arms: Sequence[str]) -> None:
    """Raise UserError for an arm of a flag that there is not."""
    for name in names or ():
        if name not in arms:
            raise UserError(f"{flag} {name}: is none of {', '.join(arms)}" + did_you_mean(name, arms))


def limits(scores: Sequence[TaskScores], found: Comparison, draws: int) -> list[str]:
    """What the draws, patients and seeds at hand can't show."""
    notices = []
    if tested(found) >= LEVEL * draws:
        notices.append(
            f"{tested(found)} comparisons: with --draws {draws} none can be shown; give more than "
            f"{int(tested(found) / LEVEL)}"
        )
    for one in scores:
        if FEWEST_PATIENTS <= one.patients and tested(found) * smallest_p(one.patients) >= LEVEL:
            notices.append(f"{one.task}: {one.patients} patients are too few to show any of as many comparisons")
    if len({seed for one in scores for of_arm in one.values.values() for seed in of_arm}) == 1:
        notices.append(
            "one seed: intervals are over patients alone and say nothing of other seeds, so nothing is shown"
        )
    return notices


def tables_from_records(
    folder: Path,
    output: Path,
    names: Sequence[str] | None,
    against: Sequence[str] | None,
    ensembles: Sequence[str],
    draws: int,
) -> None:
    """The tables of the records of a folder. names: arms to tell, None: all; ensembles: arms whose seeds are judged
    together too. Raises UserError."""
    if output.resolve() == folder.resolve():
        raise UserError(f"--output_dir {output}: is the folder of --from_records, where tables would pass for records")
    found = read_records(folder)
    arms, ensembles = list(dict.fromkeys(names or [one["arm"] for one in found])), list(dict.fromkeys(ensembles))
    require_known("--against", against, arms)
    require_known("--ensembles", ensembles, arms)
    if taken := [arm for arm in ensembles if ensemble_name(arm) in arms]:
        raise UserError(f"--ensembles {taken[0]}: {ensemble_name(taken[0])} is an arm of the records; rename that one")
    kept = [one for one in found if one["arm"] in arms]
    with threadpool_limits(1):
        scores = [one for figure in METRIC if (one := score_records(kept, figure, draws, ensembles)) is not None]
        if not scores:
            raise UserError(f"--from_records {folder}: holds no run of {', '.join(arms)} with all of its parts")
        compared = compare_arms(scores, [*arms, *map(ensemble_name, ensembles)])
    compared = compared._replace(claims=[one for one in compared.claims if one.effect])
    notices = [*unlike_shares(kept), *(notice for one in scores for notice in one.notices)]
    notices += limits(scores, compared, draws)
    run = {one["arm"] for one in kept}
    for flag, chosen in (("--against", against or ()), ("--ensembles", ensembles)):
        notices += [f"{flag} {name}: no run of it is recorded" for name in chosen if name not in run]
    told = told_of_records(kept, arms, output, notices, against or COMPARED_WITH)
    output.mkdir(parents=True, exist_ok=True)
    with writing_to("--output_dir", output):
        write_outcome(told, scores, compared)
    print(*outcome_lines(told, scores, compared), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
