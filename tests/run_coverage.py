"""How often do the 95 % bootstrap intervals hold the truth? Simulated studies, in which it is known.

    python tests/run_coverage.py                     2,000 studies of 60 patients for each AUC
    python tests/run_coverage.py --studies 200

Half of the patients have label 1; scores are normal with deviation 1, their means apart by sqrt(2) quantile(AUC). Two
cases of one patient have a correlation of 0.5. The seed was fixed before the first look. Beside `bootstrap_interval`
the plain percentiles of the same draws, which it took before.
"""

import argparse
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from dino3d.evaluation import statistics  # noqa: E402
from dino3d.evaluation.weighted_metrics import weighted_auc  # noqa: E402

SEED = 20261128


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies for each line")
    parser.add_argument("--patients", type=int, default=60, help="patients of a study, half of them with label 1")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    rng = np.random.default_rng(SEED)
    for auc in (0.6, 0.8, 0.9):
        for cases in (1, 2):
            held, width = {"BCa": np.zeros(2), "percentile": np.zeros(2)}, {"BCa": 0.0, "percentile": 0.0}
            for study in range(args.studies):
                labels = np.repeat(np.arange(args.patients) % 2, cases)
                patients = np.repeat(np.arange(args.patients), cases)
                shared, own = rng.normal(size=args.patients)[patients], rng.normal(size=len(labels))
                scores = shared if cases == 1 else (shared + own) / math.sqrt(2)
                scores = scores + labels * math.sqrt(2) * statistics.NORMAL.inv_cdf(auc)
                p = np.stack([-scores, scores], 1)
                weights = statistics.bootstrap_weights(patients, 1000, study)
                found = [weighted_auc(labels, p, w.astype(float)) for w in weights]
                intervals = {
                    "BCa": statistics.Bootstrap(found[0][0], *found[1:]).interval(),
                    "percentile": np.nanpercentile(found[1], [2.5, 97.5]),
                }
                for name, (low, high) in intervals.items():
                    held[name] += low > auc, high < auc
                    width[name] += (high - low) / args.studies
            for name, counts in held.items():
                below, above = 100 * counts / args.studies
                print(
                    f"AUC {auc}, {args.patients} patients, {cases} case{'s' * (cases > 1)} each, {name}: "
                    f"{100 - below - above:.1f} % hold it ({below:.1f} % lie above it, {above:.1f} % below), "
                    f"mean width {width[name]:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
