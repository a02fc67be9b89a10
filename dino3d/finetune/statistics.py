"""What is told of several cases and folds: intervals by bootstrap, means and deviations."""
import numpy as np

BOOTSTRAP_ROUNDS = 1000


def bootstrap_interval(metric, patients, seed=0):
    """[low, high], the 95 % percentile interval of a metric when patients are drawn with replacement.

    metric: gives a number, or None where it is undefined, of (N,) weights of the cases: how often each was drawn
    patients: of each case. Draws in which the metric is undefined are left out; None where all are.
    """
    names, index = np.unique(patients, return_inverse=True)
    rng, values = np.random.default_rng(seed), []
    for _ in range(BOOTSTRAP_ROUNDS):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        value = metric(times[index])
        if value is not None:
            values.append(value)
    return np.percentile(values, [2.5, 97.5]).tolist() if values else None


def mean_and_deviation(records, names):
    """{name: mean}, {name: standard deviation (n - 1)} over the records that have a value; None where too few have."""
    means, deviations = {}, {}
    for name in names:
        values = [record[name] for record in records if record[name] is not None]
        means[name] = float(np.mean(values)) if values else None
        deviations[name] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return means, deviations


def format_metric(value, digits=3):
    return "undefined" if value is None else f"{value:.{digits}f}"
