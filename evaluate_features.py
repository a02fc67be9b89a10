"""Which encoder's features are better, and is it shown? Tables of frozen features under the same protocols and folds.

    python evaluate_features.py --features mine.csv 'mine.random*.csv' --labels labels.csv --output_dir evaluation

k-NN and logistic regression (values: ridge regression) in nested folds by patient, few-shot and label-fraction curves,
every figure with a 95 % bootstrap interval over patients, every pair of tables with that of their paired difference.
Loads no torch.
"""

import argparse
import collections
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dino3d.command_line import ArgumentParser, UserError, exit_status, git_revision, help_flags, number
from dino3d.evaluation import comparison
from dino3d.evaluation.feature_report import (
    METRIC_NAMES,
    RESULT_FILES,
    difference_of,
    figure_of,
    write_page,
    write_results,
)
from dino3d.evaluation.feature_tables import LoadedTable, expand_patterns, group_names, read_features, table_names
from dino3d.evaluation.labelled_cases import Target, encode_labels, join, read_labels
from dino3d.evaluation.protocols import NEIGHBOURS, PENALTIES, STRENGTHS
from dino3d.evaluation.statistics import FEWEST_PATIENTS
from dino3d.files import versions


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="evaluate_features.py",
        usage="evaluate_features.py --features TABLE [TABLE ...] --labels TABLE --output_dir DIR [flags]",
        description="Compare encoders by their frozen features: k-NN and logistic regression in nested folds by "
        "patient, with intervals, and with paired differences of every two tables.",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--features",
        nargs="+",
        required=True,
        metavar="TABLE",
        help="tables of features, one per encoder, as extract_features.py writes them (.csv, .npz, .h5, a folder) or "
        "from elsewhere (see docs/evaluation.md); shell patterns in quotes are expanded",
    )
    group.add_argument(
        "--labels",
        required=True,
        metavar="TABLE",
        help="CSV with columns name and label and, where patients have several cases, patient (with coordX, coordY, "
        "coordZ for points, whose name may stand as seriesuid), or a folder of crops as "
        "subset*/label<k>/<patient>/<name>.nii.gz",
    )
    group.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for report.html, results.json and the tables; those of an earlier evaluation in it are replaced",
    )
    group.add_argument(
        "--group",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="shell patterns in quotes, such as 'mine.random*.csv': the tables of each are compared as one, by the "
        "mean of their figures; they need not stand in --features too",
    )
    group.add_argument(
        "--label_column", default="label", metavar="NAME", help="column of --labels that is to be predicted"
    )
    group.add_argument(
        "--name_column", default="name", metavar="NAME", help="column of the CSVs of --features that names the cases"
    )
    group.add_argument(
        "--feature_columns",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="columns of the CSVs of --features that are features, by name or shell pattern in quotes; needed where "
        "others might be taken for features; default: feature_0, feature_1, ..., else all but name, patient, reason "
        "and coordinates",
    )
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--task",
        choices=("auto", "classification", "regression"),
        default="auto",
        help="what labels are: auto takes two different labels or text for classes, fractions for values, and refuses "
        "more than two different whole numbers, which may be either; or classification, regression",
    )
    group.add_argument(
        "--positive",
        metavar="LABEL",
        help="label whose probability is judged, of two; default: the higher one, or the later one in the alphabet",
    )
    group.add_argument(
        "--folds", type=number(int, 2), default=5, help="outer folds by patient; each class needs as many patients"
    )
    group.add_argument(
        "--repeats",
        type=number(int, 1),
        default=10,
        help="times that all is repeated with other folds; more make means steadier, not intervals narrower",
    )
    group.add_argument(
        "--draws",
        type=number(int, 200),
        default=5000,
        help="bootstrap draws of patients; the smallest p-value is 1 / draws, so more tables need more of them",
    )
    group.add_argument(
        "--curves",
        choices=("on", "off"),
        default="on",
        help="on: few-shot and label-fraction curves too, which take half of the time; or off",
    )
    group.add_argument("--seed", type=number(int, 0), default=0, help="seed of folds, drawn cases and drawn patients")
    help_flags(parser.add_argument_group("help"))
    return parser


def check_flags(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """End the process where flags contradict each other."""
    if args.task == "regression" and args.positive is not None:
        parser.error(f"--positive {args.positive}: is for two classes, not for --task regression")


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    start = time.monotonic()

    # ------------------------------------------------------------------------------------------------------------ data

    tables, groups = read_tables(args)
    labels = read_labels(args.labels, args.label_column)
    cases = join(tables, labels)
    target = encode_labels([labels.values[i] for i in cases.numbers], args.task, args.positive)
    require_patients(target, cases.patients, args.folds)
    for table, rows in zip(tables, cases.rows):
        refuse_labels_among_features(table, table.features[rows], target, bool(args.feature_columns))
    make_folder(args.output_dir, [*(table.path for table in tables), args.labels])

    # -------------------------------------------------------------------------------------------------------- protocol

    plan = comparison.make_plan(
        target, cases.patients, args.folds, args.repeats, args.draws, args.seed, args.curves == "on"
    )
    compared = len(tables) - sum(len(members) - 1 for _, members in groups)
    said = [
        *(notice for table in tables for notice in table.notices),
        *cases.notices,
        f"{len(cases.names)} cases of {len(set(cases.patients))} patients, in {len(tables)} tables; {target.said}",
        *plan.notices,
        *comparison.too_few_draws(compared, plan),
        comparison.expected_width(target, cases.patients),
    ]
    print(*said, sep="\n")
    measured = []
    for table, rows in zip(tables, cases.rows):
        begun = time.monotonic()
        measured.append(comparison.measure(table.name, table.features[rows], plan))
        print(
            f"table {len(measured)} of {len(tables)}: {table.name}, {table.features.shape[1]} features, "
            f"{time.monotonic() - begun:.1f} s"
        )

    # --------------------------------------------------------------------------------------------------------- results

    by_name = {one.name: one for one in measured}
    grouped = {name for _, members in groups for name in members}
    entries = [one for one in measured if one.name not in grouped]
    entries += [comparison.mean_of_group(name, [by_name[one] for one in members]) for name, members in groups]
    found = comparison.differences(entries, plan)
    print_results(measured, entries, found, plan)
    how = protocol_in_words(args, plan)
    facts = {
        "command": shlex.join(["evaluate_features.py", *parser.words]),
        "said": said,
        "protocol": how,
        "task": target.task,
        "classes": target.classes,
        "cases": len(cases.names),
        "patients": len(set(cases.patients)),
        "files": {table.name: table.path for table in tables},
        "git_revision": git_revision(),
        "versions": versions(),
    }
    write_results(args.output_dir, measured, entries, found, plan, cases.names, facts)
    write_page(args.output_dir / "report.html", measured, entries, found, plan, said, how)
    print(
        f"{args.output_dir / 'report.html'}: written, with results.json and the tables "
        f"({time.monotonic() - start:.0f} s)"
    )


def read_tables(args: argparse.Namespace) -> tuple[list[LoadedTable], list[tuple[str, list[str]]]]:
    """(tables, groups): a group is its pattern and the names of its tables. Raises UserError."""
    paths = expand_patterns(args.features, "--features")
    if os.path.isdir(args.labels) and args.label_column != "label":
        raise UserError(f"--label_column {args.label_column}: is for a CSV, and --labels {args.labels} is a folder")
    members = [expand_patterns([pattern], "--group") for pattern in args.group]
    for pattern, found in zip(args.group, members):
        if len(found) < 2:
            raise UserError(f"--group {pattern}: means one table, and a group takes two: is the pattern in quotes?")
    paths += dict.fromkeys(path for found in members for path in found if path not in paths)
    names = dict(zip(paths, table_names(paths)))
    if not any(path.lower().endswith((".csv", ".tsv")) for path in paths):
        for flag, given in (("--feature_columns", args.feature_columns), ("--name_column", args.name_column != "name")):
            if given:
                raise UserError(f"{flag}: is for CSVs, and --features names none")
    twice = [path for path in paths if sum(path in found for found in members) > 1]
    if twice:
        raise UserError(f"--group: {twice[0]} belongs to two groups, expected one")
    named = group_names(args.group, list(map(len, members)))
    alike = [name for name, count in collections.Counter([*names.values(), *named]).items() if count > 1]
    if alike:
        raise UserError(f"--features, --group: two would be called {alike[0]} in the results: rename a file of them")
    tables = [read_features(path, names[path], args.name_column, args.feature_columns) for path in paths]
    return tables, [(name, [names[path] for path in found]) for name, found in zip(named, members)]


def require_patients(target: Target, patients: Sequence[str], folds: int) -> None:
    """Raise UserError where there are too few patients, of a class or in all, for the folds or for an interval."""
    count, needed = len(set(patients)), max(FEWEST_PATIENTS, folds if target.classes else 2 * folds)
    if count < needed:
        raise UserError(f"--labels: {count} patients are too few, --folds {folds} takes at least {needed}")
    for k, name in enumerate(target.classes):
        owners = {patient for patient, y in zip(patients, target.y) if y == k}
        if len(owners) < folds:
            raise UserError(
                f"--labels: label {name} has cases of {len(owners)} patient{'s' * (len(owners) != 1)}, and --folds "
                f"{folds} takes as many: lower --folds (2 or more), or leave out that label's cases; are labels "
                "values, not classes: --task regression"
            )


def refuse_labels_among_features(table: LoadedTable, features: np.ndarray, target: Target, chosen: bool) -> None:
    """Raise UserError where a column of a table from elsewhere is the label itself, whatever it is called."""
    if chosen or table.columns[0] == "feature_0":
        return
    count, y = len(target.y), target.y
    orders = math.lgamma(count + 1) - sum(math.lgamma(size + 1) for size in np.unique(y, return_counts=True)[1])
    by_chance = math.log(2 * len(table.columns)) - orders  # logarithm: that one of the columns has the labels' order
    for column, values in zip(table.columns, features.T):
        if target.classes:
            pairs = len(set(zip(values, y)))
            same = pairs == len(set(values)) == len(target.classes)
        else:
            same = bool((values == y).all())
        if same or by_chance < math.log(1e-6) and tells_order(values, y):
            raise UserError(
                f"{table.path}: column {column} tells the label of every case: is it the label itself? Name the "
                "columns of features with --feature_columns"
            )


def tells_order(values: np.ndarray, y: np.ndarray) -> bool:
    """Whether values rise, or fall, with y, and are apart where y is. values, y: (N,)"""
    lowest, highest = (np.array([extreme(values[y == one]) for one in np.unique(y)]) for extreme in (np.min, np.max))
    return bool((highest[:-1] < lowest[1:]).all() or (lowest[:-1] > highest[1:]).all())


def make_folder(folder: Path, inputs: Sequence[str]) -> None:
    """The folder for results, before anything takes time. inputs: what is read, which no result may replace. Raises
    UserError."""
    for path in (folder / name for name in RESULT_FILES):
        if path.is_dir():
            raise UserError(f"--output_dir {folder}: {path} is a folder, expected room for a file of results")
        given = next((one for one in inputs if path.exists() and path.samefile(one)), None)
        if given is not None:
            raise UserError(
                f"--output_dir {folder}: {given} is read here and would be replaced by results of that name: give "
                "another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output_dir {folder}: can't be written to ({error.strerror})") from error


def print_results(
    measured: Sequence[comparison.Measured],
    entries: Sequence[comparison.Measured],
    found: Sequence[comparison.Difference],
    plan: comparison.Plan,
) -> None:
    """The main metric of each table, and how the first one differs from each other, with what may be said of it."""
    main = comparison.MAIN_METRIC[plan.target.task]
    for protocol in measured[0].metrics:
        print(f"\n{METRIC_NAMES[main]}, {protocol}, with 95 % intervals")
        for one in [*measured, *(one for one in entries if one.members)]:
            print(f"  {figure_of(one.metrics[protocol][main], plan.draws)}  {one.name}")
    pairs = [pair for pair in found if pair.metric == main]
    told = [pair for pair in pairs if pair.one == entries[0].name]
    for protocol in measured[0].metrics if pairs else ():
        print(f"\nDifference of {METRIC_NAMES[main]}, {protocol}")
        for pair in told:
            if pair.protocol == protocol:
                said = comparison.verdict(pair, len(pairs))
                print(f"  {difference_of(pair)}  {pair.one} minus {pair.other}: {said}")
    if len(told) < len(pairs):
        print(f"\nThe other {len(pairs) - len(told)} comparisons are in report.html and differences.csv")
    print()


def protocol_in_words(args: argparse.Namespace, plan: comparison.Plan) -> list[str]:
    grids = {
        "classification": f"k-NN by cosine (k of {', '.join(map(str, NEIGHBOURS))}) and logistic regression (C of "
        f"{', '.join(f'{value:g}' for value in STRENGTHS)})",
        "regression": f"k-NN by cosine (k of {', '.join(map(str, NEIGHBOURS))}) and ridge regression (alpha of "
        f"{', '.join(f'{value:g}' for value in PENALTIES)})",
    }
    within = (
        "AUC counts pairs of cases of one test fold" if plan.target.classes else "Correlations are within test folds"
    )
    threshold = (
        "The threshold of accuracy, F1, sensitivity and specificity is Youden's on the inner folds. "
        if len(plan.target.classes) == 2
        else ""
    )
    return [
        f"{grids[plan.target.task]} on features standardised by the training cases, {args.folds} outer folds by "
        f"patient, {args.repeats} times with other folds (seed {args.seed}); k, C and alpha are chosen in inner "
        "folds by patient, by the squared error. The folds are the same for every table.",
        f"{within}, as models of different folds are on no common scale. {threshold}",
        f"Intervals: BCa bootstrap of {args.draws} draws of patients, the same for every table, each draw with one "
        "of the repeats, so that with many repeats they are too wide rather than too narrow. They hold the chance of "
        "which patients and folds these are; not that of other training sets or of other runs of pre-training.",
    ]


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
