"""What a study shows: scores of jobs, means over seeds, intervals over patients and seeds, Holm over all pairs, claims;
against scikit-learn, loops written out, and the normal distribution."""

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from dino3d.evaluation.statistics import Bootstrap, bootstrap_weights, holm
from dino3d.study import contrasts, scores
from dino3d.study.contrasts import (
    Claim,
    compare_arms,
    difference_between,
    effect_of,
    error_by_seeds,
    judge_claim,
    reason,
    share_of,
)
from dino3d.study.ensembles import add_ensembles
from dino3d.study.scores import CaseScores, TaskScores, under_weights

DRAWS = 2000


def scores_of(values, task="segmentation", draws=DRAWS):
    """TaskScores of {arm: {seed: (P,) Dice of a case of each patient}}."""
    count = len(next(iter(next(iter(values.values())).values())))
    names = [f"p{i:02}" for i in range(count)]
    weights = np.concatenate(bootstrap_weights(names, draws, 0))
    zeros = np.zeros(count, int)
    found = {
        arm: {
            seed: under_weights([CaseScores(names, None, np.array(dice, float), zeros)], names, weights, draws)
            for seed, dice in seeds.items()
        }
        for arm, seeds in values.items()
    }
    return TaskScores(task, found, count, count, draws, [])


def spread(rng, level, patients=30, seeds=3, between_seeds=0.0, noise=0.02):
    """{seed: (P,) values} around a level."""
    return {s: level + rng.normal(0, between_seeds) + rng.normal(0, noise, patients) for s in range(seeds)}


# --------------------------------------------------------------------------------------------------------- bootstrap


def test_an_interval_by_seeds_alone_is_students():
    """Of figures that no patient changes: scipy's t-test of the paired seeds, where two arms are all there is."""
    of_arms = {"a": [0.60, 0.66, 0.63, 0.65], "b": [0.55, 0.64, 0.57, 0.60]}
    found = scores_of({arm: {i: [x] * 20 for i, x in enumerate(of)} for arm, of in of_arms.items()})
    test = stats.ttest_rel(*of_arms.values())
    effect = effect_of(found, {"a": 1.0, "b": -1.0})
    assert effect.interval == pytest.approx(list(test.confidence_interval()))
    assert effect.p == pytest.approx(test.pvalue, rel=1e-6)


def test_arms_share_the_spread_of_seeds():
    """That of the least squares of arms and seeds, and its degrees of freedom; an arm that spreads more has its own."""
    rng = np.random.default_rng(0)
    arms, seeds = 5, 3
    figures = 0.5 + rng.normal(0, 0.01, (arms, seeds)) + rng.normal(0, 0.02, seeds)
    figures[4] += 20 * (figures[4] - figures[4].mean())
    found = scores_of({f"a{i}": {s: [x] * 6 for s, x in enumerate(row)} for i, row in enumerate(figures)}, draws=10)
    arm, seed = np.indices(figures.shape).reshape(2, -1)
    design = np.column_stack([*(arm == i for i in range(arms)), *(seed == i for i in range(1, seeds))]).astype(float)
    (squares,) = np.linalg.lstsq(design, figures.ravel(), rcond=None)[1]
    shared, freedom = squares / (figures.size - np.linalg.matrix_rank(design)), figures.size - arms - seeds + 1
    assert error_by_seeds(found, {"a0": 1.0, "a1": -1.0}, range(seeds)) == pytest.approx(
        (math.sqrt(2 * shared / seeds), freedom)
    )
    own = stats.sem(figures[4] - figures[0])
    assert error_by_seeds(found, {"a4": 1.0, "a0": -1.0}, range(seeds))[0] == pytest.approx(own)
    assert own > math.sqrt(2 * shared / seeds)


def test_what_has_no_seed_changes_no_error_by_seeds():
    """Tables of features stand beside every seed with one figure: they tell nothing of how much seeds matter."""
    rng = np.random.default_rng(1)
    arms = {arm: spread(rng, 0.5, 6, 3, 0.02) for arm in "ab"}
    tables = {f"t{i}": dict.fromkeys(range(3), rng.uniform(size=6)) for i in range(6)}
    alone, beside = scores_of(arms, draws=10), scores_of(arms | tables, draws=10)
    beside = beside._replace(seedless=dict.fromkeys(tables, {}))
    for weights in ({"a": 1.0, "b": -1.0}, {"a": 1.0}):
        assert error_by_seeds(beside, weights, range(3)) == pytest.approx(error_by_seeds(alone, weights, range(3)))
    assert error_by_seeds(beside, {"a": 1.0, "t0": -1.0}, range(3)) == pytest.approx(
        error_by_seeds(alone, {"a": 1.0}, range(3))
    )
    assert error_by_seeds(beside, {"t0": 1.0, "t1": -1.0}, range(3))[0] == 0
    # nor does an arm whose seeds all have the same weights make the others' spread better known
    fixed = scores_of(arms | {"t0": tables["t0"]}, draws=10)
    assert error_by_seeds(fixed, {"a": 1.0, "b": -1.0}, range(3)) == pytest.approx(
        error_by_seeds(alone, {"a": 1.0, "b": -1.0}, range(3))
    )


def test_an_ensemble_s_error_by_seeds_is_the_jackknife_s():
    """Each seed left out in turn, AUC by scikit-learn; beside another ensemble their difference, seed by seed."""
    rng = np.random.default_rng(2)
    names, labels = [f"p{i:02}" for i in range(30)] * 2, np.repeat([0, 1], 30)
    said = {arm: rng.normal(labels, 1.5, (4, 60)) for arm in "ab"}
    said = {arm: 1 / (1 + np.exp(-one)) for arm, one in said.items()}
    runs = {
        (arm, seed): [CaseScores(names, labels, np.stack([1 - p, p], 1), np.zeros(60, int))]
        for arm, of_arm in said.items()
        for seed, p in enumerate(of_arm)
    }
    without = add_ensembles(runs, ["a", "b"], "classification", [])
    found = scores.score_cases("classification", runs | {("table", None): runs["a", 0]}, 50, [], without)

    def jackknife(of_seeds):
        left_out = [of_seeds([one for one in range(4) if one != seed]) for seed in range(4)]
        return math.sqrt(3 / 4 * np.sum((left_out - np.mean(left_out)) ** 2))

    def auc(arm, seeds):
        return roc_auc_score(labels, said[arm][seeds].mean(0))

    assert found.values["a-ensemble"][2][0] == pytest.approx(auc("a", [0, 1, 2, 3]))
    alone, both = jackknife(lambda seeds: auc("a", seeds)), jackknife(lambda seeds: auc("a", seeds) - auc("b", seeds))
    for weights, expected in (
        ({"a-ensemble": 1.0}, alone),
        ({"a-ensemble": 1.0, "table": -1.0}, alone),
        ({"a-ensemble": 1.0, "b-ensemble": -1.0}, both),
    ):
        assert error_by_seeds(found, weights, range(4)) == pytest.approx((expected, 3))
    run = error_by_seeds(found, {"b": 1.0}, range(4))[0]
    with_run = error_by_seeds(found, {"a-ensemble": 1.0, "b": -1.0}, range(4))[0]
    assert with_run >= math.hypot(alone, run) * (1 - 1e-9)


@pytest.mark.parametrize("patients, seeds, between_seeds", [(60, 2, 0.02), (60, 3, 0.02), (6, 1, 0.0)])
def test_of_arms_that_are_all_the_same_none_is_shown(patients, seeds, between_seeds):
    """In 95 % of studies, of few seeds or patients too; of several seeds intervals hold 0 as often as they say."""
    false, held, arms = 0, [], [f"a{i}" for i in range(6)]
    for number in range(40):
        rng = np.random.default_rng([7, number])
        same = {arm: spread(rng, 0.5, patients, seeds, between_seeds, noise=0.05) for arm in arms}
        pairs = compare_arms([scores_of(same, draws=1000)], arms).pairs
        false += any(pair.verdict != "not shown" for pair in pairs)
        held += [pair.interval[0] <= 0 <= pair.interval[1] for pair in pairs]
    assert false <= 5 and (np.mean(held) > 0.92 or seeds == 1)


def test_a_difference_is_that_of_loops_written_out():
    """Patients drawn one by one, the same for both arms, whose seeds were tested on other patients; Student's t."""
    rng = np.random.default_rng(0)
    names = [f"p{i}" for i in range(8)]
    tested_on = {0: names[:6], 1: names[2:], 2: names[1:7]}  # test sets of three seeds
    runs = {
        arm: {
            seed: CaseScores(who, None, rng.uniform(size=len(who)), np.zeros(len(who), int))
            for seed, who in tested_on.items()
        }
        for arm in ("a", "b")
    }
    weights = np.concatenate(bootstrap_weights(names, 300, 0))
    found = TaskScores(
        "segmentation",
        {a: {s: under_weights([t], names, weights, 300) for s, t in of.items()} for a, of in runs.items()},
        6,
        8,
        300,
        [],
    )

    def mean(arm, seed, counts):
        run = runs[arm][seed]
        drawn = [value for who, value in zip(run.patients, run.values) for _ in range(counts[names.index(who)])]
        return sum(drawn) / len(drawn) if drawn else math.nan

    def difference(seeds, counts):
        return np.mean([mean("a", seed, counts) - mean("b", seed, counts) for seed in seeds])

    error = stats.sem([difference([seed], weights[0]) for seed in range(3)])
    draws = np.array([difference(range(3), weights[1 + b]) for b in range(300)])
    left_out = np.array([difference(range(3), weights[301 + i]) for i in range(8)])
    direct = Bootstrap(difference(range(3), weights[0]), draws, left_out)
    effect = effect_of(found, {"a": 1.0, "b": -1.0})
    assert effect.value == pytest.approx(direct.estimate, abs=1e-12)

    def interval(level):
        ends, t = np.array(direct.interval(level)), stats.t.ppf((1 + level) / 2, 2)
        return direct.estimate + np.array([-1, 1]) * np.hypot(ends - direct.estimate, error * t)

    assert effect.interval == pytest.approx(np.clip(interval(0.95), -1, 1), abs=1e-9) and effect.seeds == [0, 1, 2]
    assert np.abs(interval(1 - effect.p)).min() < 1e-6  # an interval of that level ends at 0


def test_interval_is_as_wide_as_the_normal_distribution_says():
    """Of means of many patients and seeds: 1.96 sqrt(patients' variance / P + seeds' variance / n) on either side."""
    rng = np.random.default_rng(1)
    of_patient, of_seed = rng.normal(0.5, 0.1, 60), rng.normal(0, 0.03, 12)
    found = scores_of({"a": {s: of_patient + of_seed[s] for s in range(12)}}, draws=8000)
    low, high = effect_of(found, {"a": 1.0}).interval
    expected = 2 * 1.96 * math.sqrt(of_patient.var(ddof=1) / 60 + of_seed.var(ddof=1) / 12)
    assert high - low == pytest.approx(expected, rel=0.06)


def test_paired_seeds_and_patients_cancel():
    """Two arms that differ by a constant in every patient and seed differ by it alone."""
    rng = np.random.default_rng(2)
    of_patient, of_seed = rng.normal(0.5, 0.1, 20), rng.normal(0, 0.1, 3)
    arms = {name: {s: of_patient + of_seed[s] + add for s in range(3)} for name, add in (("a", 0.05), ("b", 0.0))}
    effect = effect_of(scores_of(arms), {"a": 1.0, "b": -1.0})
    assert effect.interval == pytest.approx([0.05, 0.05], abs=1e-9)


def test_fewer_than_five_patients_have_no_interval():
    rng = np.random.default_rng(0)
    found = scores_of({"a": spread(rng, 0.9, patients=4), "b": spread(rng, 0.1, patients=4)})
    comparison = compare_arms([found], ["a", "b"])
    assert comparison.means[0].interval is None and comparison.pairs[0].p_holm is None
    assert comparison.pairs[0].verdict == "not shown"
    assert contrasts.reason(comparison.pairs[0]) == "no interval: too few patients"


@pytest.mark.parametrize("patients", [5, 8])
def test_few_patients_who_all_agree_are_no_surer_than_a_sign_test(patients):
    """Against scipy's, however far apart two arms are."""
    rng = np.random.default_rng(0)
    found = scores_of({"a": spread(rng, 0.9, patients), "b": spread(rng, 0.1, patients)})
    effect = effect_of(found, {"a": 1.0, "b": -1.0})
    assert effect.interval[0] > 0.7 and effect.p == pytest.approx(stats.binomtest(0, patients).pvalue)


def test_only_seeds_of_both_arms_are_compared():
    rng = np.random.default_rng(0)
    arms = {
        "a": spread(rng, 0.6),
        "b": {s: v for s, v in spread(rng, 0.5).items() if s != 1},
        "c": {7: rng.normal(size=30)},
    }
    found = scores_of(arms)
    effect = effect_of(found, {"a": 1.0, "b": -1.0})
    expected = np.mean([arms["a"][s].mean() - arms["b"][s].mean() for s in (0, 2)])
    assert effect.seeds == [0, 2] and effect.value == pytest.approx(expected)
    assert effect_of(found, {"a": 1.0, "c": -1.0}).value is None


# ------------------------------------------------------------------------------------------------- all pairs, claims


def test_one_seed_shows_nothing():
    """However far apart two arms are; with two seeds the same is shown."""
    rng = np.random.default_rng(5)
    for seeds, verdict in ((1, "not shown"), (2, "shown")):
        found = compare_arms(
            [scores_of({arm: spread(rng, x, seeds=seeds) for arm, x in (("a", 0.9), ("b", 0.1))})], "ab"
        )
        (pair,) = found.pairs
        assert pair.interval[0] > 0.7 and pair.p_holm < 0.01 and pair.verdict == verdict
        assert ("one seed" in reason(pair)) == (seeds == 1)


def test_holm_is_over_all_pairs_of_all_tasks():
    rng = np.random.default_rng(4)
    arms = ["a", "b", "c"]
    tasks = [
        scores_of({arm: spread(rng, level, noise=0.2) for arm, level in zip(arms, levels)}, task)
        for task, levels in (("classification", (0.5, 0.55, 0.7)), ("segmentation", (0.5, 0.5, 0.9)))
    ]
    found = compare_arms(tasks, arms)
    assert len(found.pairs) == 6 and len(found.means) == 6
    assert [pair.p_holm for pair in found.pairs] == holm([pair.p for pair in found.pairs])
    pair = difference_between(found.pairs, "segmentation", "c", "a")
    assert pair.value > 0 and pair.verdict == "shown" and list(pair.weights) == ["c", "a"]
    other = difference_between(found.pairs, "segmentation", "a", "c")
    assert other.verdict == "opposite" and other.interval == pytest.approx([-pair.interval[1], -pair.interval[0]])
    assert difference_between(found.pairs, "segmentation", "a", "d") is None


def levels_of(**levels):
    rng = np.random.default_rng(5)
    names = ("none", "rotation", "scale", "flip", "elastic", "gaussian", "histogram", "paper", "scratch")
    return {name: spread(rng, levels.get(name, 0.7), noise=0.01) for name in names}


@pytest.mark.parametrize(
    "classification, segmentation, verdicts",
    [
        (
            {"rotation": 0.8, "scale": 0.8, "paper": 0.85, "scratch": 0.6},
            {"histogram": 0.8, "paper": 0.8},
            ["shown", "shown", "shown", "shown", "shown"],
        ),
        (
            {"rotation": 0.6, "scale": 0.6, "gaussian": 0.8, "histogram": 0.8, "scratch": 0.8},
            {"histogram": 0.6, "scratch": 0.8},
            ["opposite"] * 5,
        ),
        ({"gaussian": 0.71, "histogram": 0.71}, {}, ["not shown"] * 5),
    ],
)
def test_the_papers_claims(classification, segmentation, verdicts):
    tasks = [
        scores_of(levels_of(**classification), "classification"),
        scores_of(levels_of(**segmentation), "segmentation"),
    ]
    found = compare_arms(tasks, list(levels_of()))
    assert [one.verdict for one in found.claims] == verdicts, [one.why for one in found.claims]
    pair = difference_between(found.pairs, "classification", "paper", "scratch")
    assert found.claims[3].effect == pair  # a claim that is a pair has that pair's figures
    tested = [*found.pairs, *(one.effect for one in found.claims[:3])]
    assert [one.p_holm for one in tested] == holm([one.p for one in tested])


def test_a_claim_is_against_its_own_margin():
    rng = np.random.default_rng(0)
    found = scores_of({"a": spread(rng, 0.505, noise=0.005), "b": spread(rng, 0.5, noise=0.005)}, "classification")
    claim = Claim("little", "classification", {"a": 1.0, "b": -1.0}, above=False, null=0.01)
    effect = effect_of(found, claim.arms, claim.null)
    assert effect.interval[0] > 0 and effect.interval[1] < 0.01
    assert judge_claim(claim, effect._replace(p_holm=effect.p)).verdict == "shown"
    assert judge_claim(claim, effect._replace(p_holm=0.2)).verdict == "not shown"
    above = effect_of(found, claim.arms)
    assert judge_claim(claim._replace(above=True, null=0.0), above._replace(p_holm=above.p)).verdict == "shown"


def test_claims_whose_arms_were_not_run():
    rng = np.random.default_rng(0)
    found = compare_arms([scores_of({"none": spread(rng, 0.5)}, "classification")], ["none"])
    assert {one.verdict for one in found.claims} == {"not shown"} and all("not run" in one.why for one in found.claims)
    assert sum(share_of("a", "b", sign=-1).values()) == -1


# ------------------------------------------------------------------------------------------------------ scores of jobs


def test_classification_is_by_pairs_that_the_same_models_judged(tmp_path):
    """Each subset by its own fold: pairs within folds. All by both folds: the AUC of the mean probabilities."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=40)
    p = np.clip(labels * 0.2 + rng.uniform(size=(2, 40)) * 0.8, 0, 1)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"classes": 2}))

    def write(rows):
        with open(folder / "predictions.csv", "w", newline="") as file:
            csv.writer(file).writerows([("case", "patient", "fold", "label", "probability", "uncalibrated"), *rows])

    write([(f"c{i:02}", f"p{i}", k, labels[i], p[k, i], 0.5) for k in range(2) for i in range(40)])
    both = scores.classified_cases(folder)
    assert float(both.score(np.ones(40))) == pytest.approx(roc_auc_score(labels, p.mean(0)))
    write([(f"c{i:02}", f"p{i}", i % 2, labels[i], p[0, i], 0.5) for i in range(40)])
    apart, pairs = scores.classified_cases(folder), []
    for k in range(2):
        mine = np.arange(40) % 2 == k
        positive, negative = labels[mine].sum(), (1 - labels[mine]).sum()
        pairs.append((positive * negative, roc_auc_score(labels[mine], p[0, mine])))
    expected = sum(n * auc for n, auc in pairs) / sum(n for n, _ in pairs)
    assert float(apart.score(np.ones(40))) == pytest.approx(expected)


def test_segmentation_is_the_mean_of_cases_of_their_folds_and_classes(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "cases.csv").write_text(
        "case,fold,class,dice\na,0,1,0.2\na,1,1,0.4\na,0,2,\nb,0,1,0.9\nb,0,2,0.7\nc,0,1,\n"
    )
    found = scores.segmented_cases(tmp_path, {"a": "x", "b": "x"}, "dice")
    assert found.patients == ["x", "x", "c"] and found.values == pytest.approx([0.3, 0.8, np.nan], nan_ok=True)
    assert float(found.score(np.array([1.0, 3.0, 5.0]))) == pytest.approx((0.3 + 2.4) / 4)
    assert np.isnan(found.score(np.array([0.0, 0.0, 1.0])))


def test_probe_is_as_evaluate_features_has_it(tmp_path):
    """Logistic regression in the same folds: its AUC is that of dino3d.evaluation.comparison with as many repeats."""
    from dino3d.evaluation.comparison import make_plan, measure
    from dino3d.evaluation.feature_tables import read_features
    from dino3d.evaluation.labelled_cases import encode_labels
    from dino3d.study.jobs import StudyJob

    rng = np.random.default_rng(0)
    labels = np.arange(30) % 2
    features = rng.normal(size=(30, 3)) + labels[:, None] * 0.5
    job = StudyJob("a", 0, "probe", (), tmp_path, None)
    job.folder.mkdir()
    with open(job.folder / "features.csv", "w", newline="") as file:
        rows = [(f"c{i:02}", f"p{i:02}", *map(float, row)) for i, row in enumerate(features)]
        csv.writer(file).writerows([("name", "patient", "feature_0", "feature_1", "feature_2"), *rows])
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("name", "label", "patient"), *((f"c{i:02}", labels[i], f"p{i:02}") for i in range(30))]
        )
    table = read_features(str(job.folder / "features.csv"), job.name)
    (runs,) = scores.probe_tables(str(tmp_path / "labels.csv"), [table], [])
    target = encode_labels([str(one) for one in labels], "classification", None)
    patients = [f"p{i:02}" for i in range(30)]
    plan = make_plan(target, patients, 5, scores.LOGISTIC_REPEATS, 200, 0, curves=False)
    expected = measure("a", features, plan).metrics["logistic"]["auc"]
    weights = np.concatenate(bootstrap_weights(patients, 200, 0))
    assert under_weights(runs, patients, weights, 200) == pytest.approx(expected, abs=1e-12)
