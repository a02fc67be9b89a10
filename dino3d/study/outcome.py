"""What a study is told by: lines on the console, CSV, JSON, a figure and a page. Without times, so that the same jobs
give the same files to the last bit; those stand in times.csv."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino3d.command_line import UserError
from dino3d.evaluation.comparison import LEVEL
from dino3d.evaluation.report import Report
from dino3d.evaluation.statistics import FEWEST_PATIENTS, format_metric, with_interval
from dino3d.files import TEXT, atomic_write, read_json, read_json_lines, write_json, write_table
from dino3d.study.arms import COMPARED_WITH, SCRATCH
from dino3d.study.contrasts import IS_SHOWN, NOT_SHOWN, Comparison, Effect, Judged, difference_between, reason
from dino3d.study.definition import Study
from dino3d.study.jobs import StudyJob
from dino3d.study.pool import TIMES
from dino3d.study.scores import (
    FEW_LABELS,
    FEW_LABELS_REPEATS,
    LABEL_SHARES,
    LOGISTIC_FOLDS,
    LOGISTIC_REPEATS,
    METRIC,
    TaskScores,
)


class Told(NamedTuple):
    """What an outcome says of how it was made. arms, data, flags: {name: text}, of arms and of stages; against: arms
    that each is compared with; runs: (header, rows) of a table of the runs, if any; features: arms that are tables of
    features, which the probe alone judges"""

    folder: Path
    arms: dict[str, str]
    seeds: list[int]
    data: dict[str, str]
    flags: dict[str, str]
    made_with: list[dict[str, Any]]
    notices: list[str]
    against: Sequence[str] = COMPARED_WITH
    runs: tuple[list[str], list[list[Any]]] | None = None
    features: frozenset[str] = frozenset()


@contextlib.contextmanager
def writing_to(flag: str, folder: Path) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, becomes a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise UserError(f"{flag} {folder}: can't be written to ({error.strerror}); make room for it") from error


def signed(effect: Effect | None) -> str:
    """A difference with its interval as text."""
    if effect is None or not effect.seeds:
        return ""
    if effect.value is None:
        return "undefined"
    interval = effect.interval
    return f"{effect.value:+.3f}" + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")


def write_outcome(told: Told, scores: Sequence[TaskScores], found: Comparison) -> None:
    """results.csv, seeds.csv, differences.csv, claims.csv, results.json, results.md, study.png and report.html in the
    folder; of records runs.csv too. Raises OSError."""
    folder = told.folder
    write_table(
        folder / "results.csv",
        ["task", "arm", "metric", "value", "low", "high", "seeds", "patients"],
        [
            [one.task, name_of(one), METRIC[one.task], *cells(one), len(one.seeds), patients_of(scores, one)]
            for one in found.means
        ],
    )
    write_table(
        folder / "seeds.csv",
        ["task", "arm", "seed", "metric", "value"],
        [
            [one.task, arm, seed, METRIC[one.task], cell(values[0])]
            for one in scores
            for arm, of_seeds in one.values.items()
            for seed, values in sorted(of_seeds.items())
        ],
    )
    write_table(
        folder / "differences.csv",
        ["task", "metric", "arm", "minus", "difference", "low", "high", "p", "p_holm", "seeds", "verdict", "why"],
        [
            [
                *(one.task, METRIC[one.task], *one.weights, *cells(one), cell(one.p), cell(one.p_holm)),
                *(len(one.seeds), shown(one), reason(one)),
            ]
            for one in found.pairs
        ],
    )
    write_table(
        folder / "claims.csv",
        ["claim", "verdict", "why", "difference", "low", "high", "p_holm"],
        [
            [one.claim.text, one.verdict, one.why, *(cells(one.effect) if one.effect else ("", "", ""))]
            + [cell(one.effect.p_holm) if one.effect else ""]
            for one in found.claims
        ],
    )
    write_json(
        folder / "results.json",
        {
            "study": {"arms": told.arms, "seeds": told.seeds, "data": told.data, "flags": told.flags},
            "made_with": told.made_with,
            "notes": told.notices,
            "tasks": {
                one.task: {
                    "metric": METRIC[one.task],
                    "cases": one.cases,
                    "patients": one.patients,
                    "seeds": {
                        arm: {str(seed): finite(values[0]) for seed, values in sorted(of_seeds.items())}
                        for arm, of_seeds in one.values.items()
                    },
                }
                for one in scores
            },
            "means": [record(one) for one in found.means],
            "differences": [record(one) | {"verdict": shown(one), "why": reason(one)} for one in found.pairs],
            "claims": [
                {
                    "claim": one.claim.text,
                    "verdict": one.verdict,
                    "why": one.why,
                    "effect": record(one.effect) if one.effect else None,
                }
                for one in found.claims
            ],
        },
    )
    figure = draw(told, scores, found)
    with atomic_write(folder / "study.png") as part:
        figure.savefig(part, dpi=130, format="png")
    with atomic_write(folder / "results.md") as part:
        part.write_text("\n".join(markdown_lines(told, scores, found)) + "\n", **TEXT)
    write_study_page(told, scores, found)
    if told.runs:
        write_table(folder / "runs.csv", *told.runs)


def shown(pair: Effect) -> str:
    """Whether a difference is shown, in either direction."""
    return NOT_SHOWN if pair.verdict == NOT_SHOWN else IS_SHOWN


def name_of(effect: Effect) -> str:
    return next(iter(effect.weights))


def patients_of(scores: Sequence[TaskScores], effect: Effect) -> int:
    return next(one.patients for one in scores if one.task == effect.task)


def finite(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def cell(value: float | None) -> float | str:
    return "" if value is None or np.isnan(value) else float(value)


def cells(effect: Effect) -> list[Any]:
    """Value, low and high of a table."""
    return [cell(effect.value), *(effect.interval or ("", ""))]


def record(effect: Effect) -> dict[str, Any]:
    """An effect for JSON."""
    return {
        "task": effect.task,
        "weights": effect.weights,
        "value": effect.value,
        "interval": effect.interval,
        "p": effect.p,
        "p_holm": effect.p_holm,
        "null": effect.null,
        "seeds": effect.seeds,
    }


def made_with(jobs: Sequence[StudyJob]) -> list[dict[str, Any]]:
    """What code and packages the jobs that are done were made with, each once."""
    found = []
    for job in jobs:
        if job.is_done():
            one = {name: value for name, value in read_json(job.marker).items() if name in ("git_revision", "versions")}
            found += [] if one in found else [one]
    return found


def write_times(study: Study) -> None:
    """times.csv: every attempt at a job. Raises OSError."""
    rows = []
    for path in sorted(study.folder.glob(f"arms/*/seed*/{TIMES}")):
        arm, seed = path.parent.parent.name, path.parent.name.removeprefix("seed")
        rows += [
            [arm, seed, *(one.get(name, "") for name in ("stage", "seconds", "exit_code", "ended"))]
            for one in read_json_lines(path)
        ]
    write_table(study.folder / "times.csv", ["arm", "seed", "stage", "seconds", "exit_code", "ended"], rows)


# ---------------------------------------------------------------------------------------------------- console and page


def rivals_of(scores: TaskScores, against: Sequence[str]) -> list[str]:
    """The arms that every arm is compared with, of those that a task has."""
    return [arm for arm in against if arm in scores.values and len(scores.values) > 1]


def result_table(told: Told, one: TaskScores, found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a task: an arm's mean, its interval and seeds, and how it differs from others; or "not run"."""
    rivals = rivals_of(one, told.against)
    rows = []
    for effect in (effect for effect in found.means if effect.task == one.task):
        arm = name_of(effect)
        of_seeds = " ".join(format_metric(finite(one.values[arm][seed][0])) for seed in effect.seeds)
        row = [arm, with_interval(effect.value, effect.interval), of_seeds]
        for rival in rivals:
            pair = difference_between(found.pairs, one.task, arm, rival) if rival != arm else None
            row.append(signed(pair) + (" *" if pair and shown(pair) == IS_SHOWN else ""))
        rows.append(row)
    for arm in told.arms:
        belongs = arm != SCRATCH if one.task in LABEL_SHARES else arm not in told.features
        if belongs and arm not in one.values:
            rows.append([arm, "not run", "", *("" for _ in rivals)])
    return ["arm", f"{METRIC[one.task]} (95 % interval)", "seeds", *(f"minus {rival}" for rival in rivals)], rows


def format_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in columns of equal width."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in (header, *rows)]


def markdown_lines(told: Told, scores: Sequence[TaskScores], found: Comparison) -> list[str]:
    """The tables as a README shows them."""
    lines = []
    for one in scores:
        header, rows = result_table(told, one, found)
        table = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
        lines += [f"{heading_of(one)}.", "", *(f"| {' | '.join(row)} |" for row in table), ""]
    lines += [f"\\* shown: the interval leaves out 0, after Holm's adjustment for {tested(found)} comparisons too."]
    return lines + [f"\n{line}." for line in told.notices]


def outcome_lines(told: Told, scores: Sequence[TaskScores], found: Comparison) -> list[str]:
    """The tables and claims as the console shows them."""
    lines = []
    for one in scores:
        lines += ["", heading_of(one), *(f"  {line}" for line in format_rows(*result_table(told, one, found)))]
    lines += ["", f"* shown: the interval leaves out 0, after Holm's adjustment for {tested(found)} comparisons too"]
    if found.claims:
        lines += ["", "The paper's claims", *(f"  {claim_line(one)}" for one in found.claims)]
    lines.append("")
    lines += [f"note: {line}" for line in told.notices]
    return [*lines, f"report       {told.folder / 'report.html'}", f"tables       {told.folder / 'results.csv'}"]


def heading_of(one: TaskScores) -> str:
    what = {"probe": "frozen probe", "surface": "segmentation"}.get(one.task, one.task)
    if one.task in FEW_LABELS:
        what = f"frozen probe, {100 * LABEL_SHARES[one.task]:.0f} % of the labels"
    return f"{what}: {METRIC[one.task]} of {one.cases} cases each, {one.patients} patients in all"


def tested(found: Comparison) -> int:
    """How many comparisons Holm's adjustment is for."""
    effects = [*found.pairs, *(one.effect for one in found.claims if one.effect)]
    return len({(one.task, tuple(sorted(one.weights.items())), one.null) for one in map(one_way, effects) if one.p})


def one_way(effect: Effect) -> Effect:
    """An effect from one of its two sides, the same for both."""
    flipped = {arm: -weight for arm, weight in effect.weights.items()}
    return effect._replace(weights=max(effect.weights, flipped, key=lambda one: sorted(one.items())))


def write_study_page(told: Told, scores: Sequence[TaskScores], found: Comparison) -> None:
    """report.html. Raises OSError."""
    report = Report("Study of pre-training")
    report.text(
        f"{len(told.arms)} arms, seeds {', '.join(map(str, told.seeds))}: {', '.join(one.task for one in scores)}. "
        "Each figure is a mean over the seeds.",
        *told.notices,
    )
    if found.claims:
        report.heading("The paper's claims")
        report.text(*map(claim_line, found.claims))
    report.heading("Results")
    for one in scores:
        report.text(heading_of(one))
        report.table(*result_table(told, one, found))
    report.text(f"* shown, after Holm's adjustment for {tested(found)} comparisons.")
    report.image(
        told.folder / "study.png",
        "Left: each arm's mean with its 95 % interval, and its seeds as small dots. "
        "Right: its difference from others with the interval; filled where shown",
    )
    report.heading("All differences")
    report.table(
        ["", "task", "arm", "minus", "difference (95 % interval)", "p", "p after Holm", "why"],
        [
            [*(shown(one), one.task, *one.weights, signed(one)), *(short_p(one.p), short_p(one.p_holm), reason(one))]
            for one in found.pairs
        ],
    )
    report.heading("How it was done")
    report.text(
        "Intervals: 95 %, BCa bootstrap in which patients are drawn with replacement, the same in every draw for all "
        "arms and seeds, so that differences are paired. Where there are several seeds, that of Student's t over seeds "
        "is added in squares, with the spread that all arms share (that of the arms at hand where it is larger). "
        f"None is given for fewer than {FEWEST_PATIENTS} patients.",
        f"A difference counts as shown only if its interval leaves out 0 and its p-value stays below {LEVEL:g} after "
        "Holm's adjustment for all pairs of all tasks and the claims; with one seed none does.",
        "Classification: AUC of the test cases' mean probabilities, by pairs of cases that the same models judged. "
        "Segmentation: mean Dice, and surface Dice, of the test cases. Probe: AUC of logistic regression on frozen "
        f"features, in {LOGISTIC_FOLDS} nested folds by patient, repeated {LOGISTIC_REPEATS} times"
        + (f", with few labels {FEW_LABELS_REPEATS} times." if any(one.task in FEW_LABELS for one in scores) else "."),
        "From scratch is fine-tuned from the random weights that pre-training of the same seed begins with, all layers "
        "with one learning rate; random is those weights frozen, of which the head alone is trained.",
    )
    report.table(["arm", "flags of main_dino.py, or weights"], list(told.arms.items()))
    report.table(
        ["stage", "data", "flags"],
        [
            [stage, told.data.get(stage, ""), told.flags.get(stage, "")]
            for stage in dict.fromkeys([*told.data, *told.flags])
        ],
    )
    if told.runs:
        report.heading("Every run")
        report.table(told.runs[0], [[str(value) for value in row] for row in told.runs[1]])
    report.save(told.folder / "report.html")


def claim_line(one: Judged) -> str:
    """A claim, whether it is shown, and by which figures."""
    figures = f"{signed(one.effect)}, p after Holm {short_p(one.effect.p_holm)}; " if one.effect else ""
    return f"{one.verdict}: {one.claim.text} ({figures}{one.why})"


def short_p(p: float | None) -> str:
    return "none" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def draw(told: Told, scores: Sequence[TaskScores], found: Comparison) -> Any:
    """A matplotlib Figure: a row for each task, with the arms' means and their differences from others."""
    from matplotlib.figure import Figure

    heights = [1.6 + 0.34 * len(one.values) for one in scores]
    figure = Figure(figsize=(11, max(3.0, sum(heights))), layout="constrained")
    axes = figure.subplots(len(scores), 2, squeeze=False, height_ratios=heights)
    for (left, right), one in zip(axes, scores):
        means = [effect for effect in found.means if effect.task == one.task]
        arms = [name_of(effect) for effect in means]
        for at, effect in enumerate(means):
            seeds = [one.values[arms[at]][seed][0] for seed in effect.seeds]
            left.plot(seeds, [at + 0.22] * len(seeds), ".", color="0.5", markersize=4)
            bar(left, at, effect, "C0", True)
        left.set_yticks(range(len(arms)), [arm.replace("$", r"\$") for arm in arms])
        left.set(title=heading_of(one).replace(": ", ":\n"), xlabel=METRIC[one.task], ylim=(len(arms) - 0.4, -0.6))
        for number, rival in enumerate(rivals_of(one, told.against)):
            right.plot([], [], "o", color=f"C{number + 1}", label=f"minus {rival}")
            for at, arm in enumerate(arms):
                pair = difference_between(found.pairs, one.task, arm, rival) if arm != rival else None
                if pair:
                    bar(right, at + 0.2 * (number - 1), pair, f"C{number + 1}", shown(pair) == IS_SHOWN)
        right.axvline(0, color="0.6", linewidth=1, linestyle=":")
        right.set_yticks(range(len(arms)), [])
        right.set(title="difference", xlabel=f"difference of {METRIC[one.task]}", ylim=(len(arms) - 0.4, -0.6))
        if rivals_of(one, told.against):
            right.legend(fontsize=8)
    return figure


def bar(ax: Any, at: float, effect: Effect, colour: str, filled: bool) -> None:
    """A value with its interval at a height."""
    if effect.value is None:
        return
    if effect.interval:
        ax.plot(effect.interval, [at, at], color=colour, linewidth=2, alpha=0.6)
    ax.plot(effect.value, at, "o", color=colour, fillstyle="full" if filled else "none", markersize=6)
