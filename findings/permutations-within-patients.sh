#!/usr/bin/env bash
# scikit-learn 1.9.1: permutation_test_score has p = 1 for any signal where groups are patients with one label each.
# Expected: groups keep a patient's cases together in cross-validation, as everywhere in scikit-learn, and labels are
# permuted among patients: then a perfect classifier has the smallest p there is.
# Seen, for 30 patients of four cases each and features that tell the label without error: AUC 1.0, and each of 200
# permutations has 1.0, too: p = 1.0. Labels are permuted within a group, so all of a patient's cases keep the label
# that they have in common: nothing is permuted at all. Without groups (cases of one patient on both sides of a fold)
# p is 1 / 201, and so it is of patients permuted by hand with the same folds. With one patient of both labels among the
# 30 p is 0.50; where features tell nothing it is 1.0, too. No warning.
# The documentation says that y is permuted among samples of the same group, and that groups go to the splitter; not
# that a test may so be without a permutation. Near in the trackers: scikit-learn 21543 (open: the same), 17372 (closed:
# what groups are for).
# Means: where a label is the patient's, permute patients yourself, or give one row (a mean) for each patient. Fails if
# the p of a perfect classifier is below 0.05, or something is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import warnings

import numpy as np, sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_score, permutation_test_score

warnings.simplefilter("error")
print("scikit-learn", sklearn.__version__)
PATIENTS, CASES, PERMUTATIONS = 30, 4, 200
rng = np.random.default_rng(0)
patients = np.repeat(np.arange(PATIENTS), CASES)
label_of = np.arange(PATIENTS) % 2
y = label_of[patients]
noise = rng.normal(size=(len(y), 5))
told = noise + 4 * y[:, None]
folds = GroupKFold(3)
options = {"scoring": "roc_auc", "n_permutations": PERMUTATIONS, "random_state": 0}


def test(name, x, y, groups, cv):
    score, permuted, p = permutation_test_score(LogisticRegression(), x, y, groups=groups, cv=cv, **options)
    print(f"{name}: AUC {score:.3f}, permuted {permuted.min():.3f} to {permuted.max():.3f}, p {p:.4f}")
    return p


mixed = y.copy()
mixed[0] = 1 - mixed[0]
grouped = test("groups are patients", told, y, patients, folds)
nothing = test("groups are patients, features of noise", noise, y, patients, folds)
one_mixed = test("groups are patients, one of them of both labels", told, mixed, patients, folds)
alone = test("no groups", told, y, None, StratifiedKFold(3))


def auc(y):
    return cross_val_score(LogisticRegression(), told, y, groups=patients, cv=folds, scoring="roc_auc").mean()


by_hand = [auc(rng.permutation(label_of)[patients]) for _ in range(PERMUTATIONS)]
p = (1 + sum(one >= auc(y) for one in by_hand)) / (1 + PERMUTATIONS)
print(f"patients permuted by hand, the same folds: permuted {min(by_hand):.3f} to {max(by_hand):.3f}, p {p:.4f}")
assert grouped == nothing == 1 and one_mixed > 0.4 and alone < 0.01 and p < 0.01
PY
cd "$folder" && OMP_NUM_THREADS=1 venv/bin/python probe.py
