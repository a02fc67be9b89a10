"""Encoders and the radial profile together: does pre-training know what the best figure made by hand does not?

    python results/together.py --results results

Each case has the mean of two probabilities: what the radial profile gives it in classification.sh, and what an encoder
does, by the records of classification.sh (fine-tuned) or label_fractions.sh (frozen, over 48 orientations). Nothing is
fitted to join them. Writes results.csv and results.md to the folder `together` below that folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from dino3d.command_line import ArgumentParser, UserError, exit_status, help_flags  # noqa: E402
from dino3d.evaluation.statistics import format_metric, holm, with_interval  # noqa: E402
from dino3d.files import TEXT, atomic_write, write_table  # noqa: E402
from dino3d.study.contrasts import IS_SHOWN, Effect, effect_of  # noqa: E402
from dino3d.study.ensembles import add_ensembles  # noqa: E402
from dino3d.study.outcome import cell, cells, shown, signed  # noqa: E402
from dino3d.study.records import cases_of, read_records  # noqa: E402
from dino3d.study.scores import CaseScores, score_cases  # noqa: E402

PROFILE = "trivial-radial"
DRAWS = 10000  # of the patients, as study.py makes


class Voice(NamedTuple):
    """Who speaks beside the profile. title: in words; folder, task: of its records; arms: pre-trained, and not"""

    title: str
    folder: str
    task: str
    arms: tuple[str, str]


VOICES = (
    Voice("fine-tuned", "classification", "classification", ("nodules", "scratch")),
    Voice("frozen, mean over 48 orientations", "frozen_turned", "probe", ("trained", "random")),
)


class Beside(NamedTuple):
    """A table's row: AUC of the profile with a voice, what that adds to the profile, the same without pre-training, and
    what pre-training adds."""

    title: str
    together: Effect
    more: Effect
    without: Effect
    without_more: Effect
    difference: Effect


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="together.py",
        usage="together.py --results DIR",
        description="Encoders and the radial profile together, from records.",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--results", type=Path, required=True, metavar="DIR", help="holds runs/NAME, records of study.py"
    )
    help_flags(group)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    folder = get_args_parser().parse_args(argv).results
    profile = mean_of_repeats(folder, "classification", "probe", PROFILE)
    if not profile:
        raise UserError(f"{folder}/runs/classification: holds no whole run of {PROFILE}: run results/classification.sh")
    rows = adjusted([row for voice in VOICES for row in rows_of(folder, voice, profile[None])])
    output = folder / "together"
    output.mkdir(exist_ok=True)
    header = ["beside", "auc", "low", "high", "minus", "difference", "difference_low", "difference_high"]
    header += ["p", "p_holm", "verdict"]
    told = [
        [row.title, *cells(one), *(minus, *cells(effect), cell(effect.p), cell(effect.p_holm), shown(effect))]
        for row in rows
        for one, minus, effect in (
            (row.together, "profile", row.more),
            (row.without, "profile", row.without_more),
            (row.together, "without", row.difference),
        )
    ]
    write_table(output / "results.csv", header, told)
    with atomic_write(output / "results.md") as part:
        part.write_text("\n".join(markdown_of(rows, profile[None])) + "\n", **TEXT)
    print(f"{output / 'results.md'}: {len(rows)} rows")


def mean_of_repeats(folder: Path, name: str, task: str, arm: str) -> dict[int | None, CaseScores]:
    """{seed: each case with the mean of what all repeats say of it, whichever models have judged it}. Raises
    UserError."""
    records = read_records(folder / "runs" / name, "--results")
    found = [one for one in records if (one["task"], one["arm"]) == (task, arm)]
    parts = {one["part"] for one in found}
    whole = {}
    for seed in {one["seed"] for one in found}:
        mine = {one["part"]: cases_of(one) for one in found if one["seed"] == seed}
        if set(mine) != parts:
            continue
        patients, labels, values = [], [], []
        for repeats in (mine[part] for part in sorted(parts)):
            patients += repeats[0].patients
            labels.append(repeats[0].labels)
            values.append(np.mean([one.values for one in repeats], 0))
        whole[seed] = in_order(CaseScores(patients, np.concatenate(labels), np.concatenate(values), np.empty(0)))
        if len({*zip(whole[seed].patients, whole[seed].labels.tolist())}) < len(patients):
            raise UserError(f"{folder}/runs/{name}: two cases of a patient have one label, so that none can be told")
    return whole


def in_order(cases: CaseScores) -> CaseScores:
    """The same, by patient and label, as one model's."""
    order = sorted(range(len(cases.patients)), key=lambda n: (cases.patients[n], cases.labels[n]))
    patients = [cases.patients[n] for n in order]
    return CaseScores(patients, cases.labels[order], cases.values[order], np.zeros(len(order), int))


def joined(one: CaseScores, other: CaseScores) -> CaseScores:
    return one._replace(values=(one.values + other.values) / 2)


def rows_of(folder: Path, voice: Voice, profile: CaseScores) -> list[Beside]:
    """The rows of a voice: each of its seeds beside the profile, and all of them together. Raises UserError."""
    spoken = [mean_of_repeats(folder, voice.folder, voice.task, arm) for arm in voice.arms]
    seeds = sorted(set.intersection(*map(set, spoken)))
    if len(seeds) < 2:
        arms = " and ".join(voice.arms)
        raise UserError(
            f"{folder}/runs/{voice.folder}: {arms} have {len(seeds)} whole seeds in common, expected two: run "
            "results/classification.sh and results/label_fractions.sh"
        )
    tested, without = {(PROFILE, None): [profile]}, {}
    for arm, runs in zip(voice.arms, spoken):
        if any(
            (one.patients, one.labels.tolist()) != (profile.patients, profile.labels.tolist()) for one in runs.values()
        ):
            raise UserError(f"{folder}/runs/{voice.folder}: {arm} was tested on other cases than {PROFILE}")
        whole = {(arm, seed): [joined(profile, runs[seed])] for seed in seeds}
        without |= add_ensembles(whole, [arm], voice.task, [])
        tested |= whole
    scores = score_cases(voice.task, tested, DRAWS, [], without)
    rows = []
    for title, suffix in (("one of {}", ""), ("the mean of {}", "-ensemble")):
        with_it, without = (f"{arm}{suffix}" for arm in voice.arms)
        rows.append(
            Beside(
                f"{voice.title}, {title.format(len(seeds))}",
                effect_of(scores, {with_it: 1.0}),
                effect_of(scores, {with_it: 1.0, PROFILE: -1.0}),
                effect_of(scores, {without: 1.0}),
                effect_of(scores, {without: 1.0, PROFILE: -1.0}),
                effect_of(scores, {with_it: 1.0, without: -1.0}),
            )
        )
    return rows


def adjusted(rows: Sequence[Beside]) -> list[Beside]:
    """The same with Holm's adjustment over all differences of the table."""
    names = ("more", "without_more", "difference")
    p_values = iter(holm([getattr(row, name).p for row in rows for name in names]))
    return [
        row._replace(**{name: getattr(row, name)._replace(p_holm=next(p_values)) for name in names}) for row in rows
    ]


def markdown_of(rows: Sequence[Beside], profile: CaseScores) -> list[str]:
    alone = score_cases("probe", {(PROFILE, 0): [profile]}, DRAWS, [])
    effect = effect_of(alone, {PROFILE: 1.0})

    def marked(one: Effect) -> str:
        return signed(one) + " *" * (shown(one) == IS_SHOWN)

    header = ["beside the radial profile", "AUC (95 % interval)", "minus the profile alone"]
    header += ["not pre-trained", "minus it"]
    lines = [
        f"The radial profile alone: AUC {with_interval(effect.value, effect.interval)} of {alone.cases} cases, "
        f"{alone.patients} patients, all of them compared with one another.",
        "",
        f"| {' | '.join(header)} |",
        f"| {' | '.join(['---'] * len(header))} |",
    ]
    for row in rows:
        without = f"{format_metric(row.without.value)}: {marked(row.without_more)}"
        told = [row.title, with_interval(row.together.value, row.together.interval), marked(row.more), without]
        lines.append(f"| {' | '.join([*told, marked(row.difference)])} |")
    return [
        *lines,
        "",
        f"\\* shown: the interval leaves out 0, after Holm's adjustment for {3 * len(rows)} comparisons too.",
    ]


if __name__ == "__main__":
    sys.exit(exit_status(main)[0])
