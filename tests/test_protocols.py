"""Frozen protocols against scikit-learn, folds that share no patient, and the metrics of the bootstrap."""

import numpy as np
import pytest
from sklearn import metrics
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from dino3d.evaluation import classification_metrics, comparison, protocols, weighted_metrics
from dino3d.evaluation.labelled_cases import encode_labels


def cases(count=90, features=40, classes=2, signal=0.6, seed=0):
    """(features, labels, patients): two cases of some patients, an unused feature that does not vary."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    x = rng.normal(size=(count, features)) * rng.uniform(0.1, 100, features) + rng.normal(size=features) * 50
    x[:, 0] += signal * labels * x[:, 0].std()
    x[:, 1] = 3
    return x, labels, np.array([f"p{i // 2 % 37}" for i in range(count)])


# ------------------------------------------------------------------------------------------------ against scikit-learn


@pytest.mark.parametrize("features", [5, 40, 200])
@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression(features, classes):
    x, labels, _ = cases(features=features, classes=classes, signal=3)
    train, test = np.arange(60), np.arange(60, 90)
    found = protocols.logistic_path(x[train], protocols.one_hot(labels[train], classes), x[test])
    scaler = StandardScaler().fit(x[train])
    for strength, p in zip(protocols.STRENGTHS, found):
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=20000)
        model = model if classes == 2 else OneVsRestClassifier(model)
        model.fit(scaler.transform(x[train]), labels[train])
        assert np.abs(model.predict_proba(scaler.transform(x[test])) - p).max() < 1e-4, strength


def test_logistic_regression_of_classes_that_are_far_apart():
    x = np.concatenate([np.full((20, 3), -1e6), np.full((20, 3), 1e6)]) + np.random.default_rng(0).normal(size=(40, 3))
    labels = np.repeat([0, 1], 20)
    p = protocols.logistic_path(x, protocols.one_hot(labels, 2), x)
    assert ((p[:, :, 1] > 0.5) == (labels == 1)).all() and np.abs(p[-1, :, 1] - labels).max() < 0.1


@pytest.mark.parametrize("classes", [2, 3])
def test_knn(classes):
    x, labels, _ = cases(features=8, classes=classes)
    train, test = np.arange(60), np.arange(60, 90)
    found = protocols.knn_path(x[train], protocols.one_hot(labels[train], classes), x[test])
    scaler = StandardScaler().fit(x[train])
    for k, p in zip(protocols.NEIGHBOURS, found):
        votes = {"metric": "cosine", "weights": lambda d: np.exp((1 - d) / 0.07), "n_neighbors": k}
        model = KNeighborsClassifier(**votes).fit(scaler.transform(x[train]), labels[train])
        assert np.allclose(model.predict_proba(scaler.transform(x[test])), p, atol=1e-9)
        model = KNeighborsRegressor(**votes).fit(scaler.transform(x[train]), x[train, 0])
        values = protocols.knn_path(x[train], x[train, :1], x[test])[protocols.NEIGHBOURS.index(k)][:, 0]
        assert np.allclose(model.predict(scaler.transform(x[test])), values)


@pytest.mark.parametrize("features", [5, 200])
def test_ridge(features):
    x, _, _ = cases(features=features)
    y = x[:, :1] + 10 * x[:, 2:3] + 7
    found = protocols.ridge_path(x[:60], y[:60], x[60:])
    scaler = StandardScaler().fit(x[:60])
    for penalty, values in zip(protocols.PENALTIES, found):
        expected = Ridge(alpha=penalty).fit(scaler.transform(x[:60]), y[:60, 0]).predict(scaler.transform(x[60:]))
        assert np.allclose(values[:, 0], expected)


# --------------------------------------------------------------------------------------------------------------- folds


@pytest.mark.parametrize("kind", ["whole", "shots", "share"])
def test_folds_share_no_patient(kind):
    _, labels, patients = cases(classes=3)
    how = (patients, labels, 5, 3, 0)
    repeats = {
        "whole": protocols.nested_splits(*how),
        "shots": protocols.few_shot_splits(*how, 5),
        "share": protocols.fraction_splits(*how, 0.5),
    }[kind]
    assert len(repeats) == 3 and len({tuple(repeat[0].test) for repeat in repeats}) == 3
    for repeat in repeats:
        assert sorted(np.concatenate([split.test for split in repeat])) == list(range(len(labels)))
        for train, inner, test in repeat:
            assert not set(patients[train]) & set(patients[test])
            for fold in range(inner.max() + 1):
                assert not set(patients[train[inner == fold]]) & set(patients[train[inner != fold]])
            counts = np.bincount(labels[train])
            assert {"whole": counts.min() > 20, "shots": (counts == 5).all(), "share": 8 <= counts.min() <= 16}[kind]
            assert np.ptp(np.bincount(labels[test])) <= 3


def test_few_shots_grow_and_come_from_different_patients():
    _, labels, patients = cases()
    few, more = (protocols.few_shot_splits(patients, labels, 5, 1, 0, shots)[0] for shots in (5, 10))
    for one, other in zip(few, more):
        assert set(one.train) <= set(other.train)
        assert all(len(set(patients[one.train[labels[one.train] == k]])) == 5 for k in (0, 1))
    assert protocols.few_shot_splits(patients, labels, 5, 1, 0, 1)[0][0].inner is None
    assert protocols.few_shot_splits(patients, labels, 5, 1, 0, 50) is None


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_of_the_patients_has_its_share_of_each_class(share):
    """Also where most patients have cases of both classes, and one is rare."""
    labels = (np.random.default_rng(0).uniform(size=800) < 0.2).astype(int)
    patients = [f"p{i // 2}" for i in range(800)]
    for split in protocols.fraction_splits(patients, labels, 5, 1, 0, share)[0]:
        assert len({patients[i] for i in split.train}) == pytest.approx(320 * share, abs=3)
        assert labels[split.train].mean() == pytest.approx(labels.mean(), abs=0.04)


def test_what_is_tested_does_not_leak():
    """Its own labels and other tested cases change nothing about a case's prediction, nor about its threshold."""
    x, labels, patients = cases()
    splits = protocols.nested_splits(patients, labels, 5, 1, 0)[0]
    for path in protocols.PATHS["classification"].values():
        found = protocols.out_of_fold(path, x, protocols.one_hot(labels, 2), splits)
        test = splits[0].test
        other_x, other_labels = x.copy(), labels.copy()
        other_labels[test], other_x[test[1:]] = 1 - labels[test], 1e4
        other = protocols.out_of_fold(path, other_x, protocols.one_hot(other_labels, 2), splits)
        assert (found.values[test[0]] == other.values[test[0]]).all()
        assert (found.thresholds[test] == other.thresholds[test]).all()
        assert (found.folds[test] == 0).all() and not np.isnan(found.values).any()


def test_the_setting_is_that_of_the_smallest_error_inside():
    """With a feature that tells everything, weak penalties; with noise alone, the strongest."""
    rng = np.random.default_rng(0)
    x, patients = rng.normal(size=(100, 3)), [str(i) for i in range(100)]
    noise = rng.normal(size=(100, 1))
    strata = protocols.strata_of_values(noise[:, 0])
    splits = protocols.nested_splits(patients, strata, 5, 1, 0)[0]
    exact = protocols.out_of_fold(protocols.ridge_path, x, x[:, :1], splits)
    assert np.abs(exact.values - x[:, :1]).max() < 0.02
    nothing = protocols.out_of_fold(protocols.ridge_path, x, noise, splits)
    assert np.abs(nothing.values).max() < 0.5


def test_folds_of_values_hold_low_and_high_ones():
    values = np.random.default_rng(0).exponential(size=80)
    strata = protocols.strata_of_values(values)
    assert np.bincount(strata).tolist() == [20, 20, 20, 20]
    splits = protocols.nested_splits([str(i) for i in range(80)], strata, 5, 1, 0)[0]
    assert all(np.bincount(strata[split.test]).tolist() == [4, 4, 4, 4] for split in splits)


@pytest.mark.parametrize("classes", [2, 3])
def test_auc_of_what_tells_everything_and_of_noise(classes):
    """1, and 0.5 on the mean of 20 tables: pooled folds would fall below."""
    rng = np.random.default_rng(0)
    labels, patients = np.arange(60) % classes, [str(i // 2) for i in range(60)]
    perfect = protocols.one_hot(labels, classes) + 0.01 * rng.normal(size=(60, classes))
    target = encode_labels([str(label) for label in labels], "classification", None)
    plan = comparison.make_plan(target, patients, folds=5, repeats=1, draws=1, seed=0, curves=False)
    tables = [perfect, *(rng.normal(size=(60, 5)) for _ in range(20))]
    measured = [comparison.measure("", features, plan).metrics for features in tables]
    for name in ("knn", "logistic"):
        at_once, *values = (metrics[name]["auc"][0] for metrics in measured)
        assert at_once == 1
        assert abs(np.mean(values) - 0.5) < 3 * np.std(values) / 20**0.5


# ------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("classes", [2, 3])
def test_weighted_metrics_against_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=60)
    p = rng.dirichlet(np.ones(classes), 60).round(1) + (labels[:, None] == np.arange(classes)) * 0.2
    p /= p.sum(1, keepdims=True)
    weights = np.concatenate([np.ones((1, 60)), rng.integers(0, 4, (5, 60))])
    decided = classification_metrics.decide(p, 0.4)
    found = {
        "auc": weighted_metrics.weighted_auc(labels, p, weights),
        "average_precision": weighted_metrics.weighted_average_precision(labels, p, weights),
        "accuracy": weighted_metrics.weighted_accuracy(labels, decided, weights),
        "balanced_accuracy": weighted_metrics.weighted_balanced_accuracy(labels, decided, weights, classes),
        "f1": weighted_metrics.weighted_f1(labels, decided, weights, classes),
        "sensitivity": weighted_metrics.weighted_sensitivity(labels, decided, weights, classes),
        "specificity": weighted_metrics.weighted_specificity(labels, decided, weights, classes),
        "brier": weighted_metrics.weighted_brier(labels, p, weights),
        "calibration": weighted_metrics.weighted_calibration_error(labels, p, weights),
    }
    for i, w in enumerate(weights):
        each = [1] if classes == 2 else range(classes)
        how = {"sample_weight": w}
        expected = {
            "auc": np.mean([metrics.roc_auc_score(labels == k, p[:, k], **how) for k in each]),
            "average_precision": np.mean([metrics.average_precision_score(labels == k, p[:, k], **how) for k in each]),
            "accuracy": metrics.accuracy_score(labels, decided, **how),
            "balanced_accuracy": metrics.balanced_accuracy_score(labels, decided, **how),
            "f1": np.mean([metrics.f1_score(labels == k, decided == k, **how) for k in each]),
            "sensitivity": np.mean([metrics.recall_score(labels == k, decided == k, **how) for k in each]),
            "specificity": np.mean([metrics.recall_score(labels != k, decided != k, **how) for k in each]),
            "brier": metrics.brier_score_loss(
                labels, p[:, 1] if classes == 2 else p, labels=list(range(classes)), **how
            ),
            "calibration": classification_metrics.calibration_error(labels, p, weights=w),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, abs=1e-12), name


def test_a_share_never_leaves_a_class_without_a_case():
    """Each fold trains on one of two patients with label 1, of whom a tenth may be none; of one a fold has none."""
    patients = [f"p{i}" for i in range(20)]
    for rare, share, is_made in ((2, 0.25, True), (2, 0.1, False), (1, 0.5, False)):
        labels = (np.arange(20) < rare).astype(int)
        found = protocols.fraction_splits(patients, labels, 2, 10, 0, share)
        assert (found is not None) == is_made
        assert all(set(labels[split.train]) == {0, 1} for repeat in found or () for split in repeat)


def test_weighted_regression_metrics_against_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    values = rng.normal(size=50).round(1)
    predicted = (values + rng.normal(size=50)).round(1)
    weights = np.concatenate([np.ones((1, 50), int), rng.integers(0, 4, (5, 50))])
    for i, w in enumerate(weights):
        y, x = values.repeat(w), predicted.repeat(w)
        assert weighted_metrics.weighted_r2(values, predicted, weights)[i] == pytest.approx(metrics.r2_score(y, x))
        assert weighted_metrics.weighted_mae(values, predicted, weights)[i] == pytest.approx(np.abs(y - x).mean())
        assert weighted_metrics.weighted_spearman(values, predicted, weights)[i] == pytest.approx(spearmanr(y, x)[0])
    folds = np.arange(50) % 5 // 4  # 40 cases and 10
    expected = np.average([spearmanr(values[folds == k], predicted[folds == k])[0] for k in (0, 1)], weights=[40, 10])
    assert weighted_metrics.weighted_spearman(values, predicted, weights[0], folds) == pytest.approx(expected)


def test_auc_of_pairs_within_folds_written_out():
    rng = np.random.default_rng(0)
    labels, scores, folds = rng.integers(0, 2, 40), rng.normal(size=40).round(1), rng.integers(0, 3, 40)
    pairs = [
        (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
        for i in range(40)
        for j in range(40)
        if labels[i] > labels[j] and folds[i] == folds[j]
    ]
    p = np.stack([1 - scores, scores], 1)
    found = weighted_metrics.weighted_auc(labels, p, np.ones(40), folds)
    assert found == pytest.approx(np.mean(pairs))
    shifted = p + folds[:, None]  # what another scale in each fold does: nothing
    assert weighted_metrics.weighted_auc(labels, shifted, np.ones(40), folds) == pytest.approx(np.mean(pairs))


def test_undefined_metrics_are_nan():
    labels, p = np.array([0, 0, 1]), np.array([[0.5, 0.5]] * 3)
    weights = np.array([[1.0, 1, 1], [1, 1, 0], [0, 0, 0]])
    for values in (
        weighted_metrics.weighted_auc(labels, p, weights),
        weighted_metrics.weighted_average_precision(labels, p, weights),
        weighted_metrics.weighted_balanced_accuracy(labels, p.argmax(1), weights, 2),
        weighted_metrics.weighted_f1(labels, p.argmax(1), weights, 2),
        weighted_metrics.weighted_r2(labels, p[:, 1], weights),
    ):
        assert np.isnan(values).tolist() == [False, True, True]
    assert np.isnan(weighted_metrics.weighted_brier(labels, p, weights)).tolist() == [False, False, True]
