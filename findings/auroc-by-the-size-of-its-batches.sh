#!/usr/bin/env bash
# torchmetrics 1.9.0: the AUROC of one list of logits depends on how many are given at a time; case by case, as 3D
# networks are evaluated, it is too low.
# Expected: one figure, as a metric that is updated and then computed is the metric of all cases. The documentation says
# that preds outside of [0, 1] are taken for logits and go through a sigmoid.
# Seen, for 400 cases whose AUC is 0.875 by scikit-learn 1.9.1: in batches of 4 or more 0.875, of 2 0.846, of 1 0.787;
# the average precision falls from 0.890 to 0.806. Each call looks at its own batch: a logit of 0.9 alone is taken for a
# probability and stays, one of 2 becomes 0.88 and so ranks below it; one of 0.3, a probability of 0.57, is taken for
# negative, and the accuracy falls from 0.772 to 0.680. BinaryCalibrationError moves, too. No warning.
# Near in the trackers: torchmetrics 2195 (open: converted batch by batch), 1604, 2329; anomalib 2003 (whose users met
# it).
# Means: give it probabilities (sigmoid first). Fails if batches of one and of all give the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 \
    scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import numpy as np, torch, torchmetrics
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryAveragePrecision, BinaryCalibrationError

print("torchmetrics", torchmetrics.__version__)
draw = np.random.default_rng(0)
labels = torch.tensor(draw.integers(0, 2, 400))
logits = torch.tensor(draw.normal(labels.numpy() * 1.5 - 1, 1), dtype=torch.float32)
exact = roc_auc_score(labels, logits), average_precision_score(labels, logits)
print(f"scikit-learn: AUC {exact[0]:.3f}, average precision {exact[1]:.3f}")


def score(kind, size, predictions=logits):
    metric = kind()
    for k in range(0, len(labels), size):
        metric.update(predictions[k : k + size], labels[k : k + size])
    return metric.compute().item()


kinds = (BinaryAUROC, BinaryAveragePrecision, BinaryAccuracy, BinaryCalibrationError)
found = {size: [score(kind, size) for kind in kinds] for size in (400, 16, 4, 2, 1)}
for size, values in found.items():
    print(f"batches of {size}: " + ", ".join(f"{kind.__name__} {value:.3f}" for kind, value in zip(kinds, values)))
assert abs(found[400][0] - exact[0]) < 1e-4 and abs(found[400][1] - exact[1]) < 1e-4
assert found[1][0] < exact[0] - 0.04 and found[1][1] < exact[1] - 0.04
assert all(abs(score(kind, 1, logits.sigmoid()) - score(kind, 400)) < 1e-4 for kind in kinds)  # probabilities are right
PY
cd "$folder" && venv/bin/python -W error::UserWarning probe.py
