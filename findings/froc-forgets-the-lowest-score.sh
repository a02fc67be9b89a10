#!/usr/bin/env bash
# MONAI 1.6.1: compute_froc_curve_data leaves out the operating point at the lowest score. Once a detector finds the last
# lesion, too, its FROC score falls.
# Expected: a curve from no detection to all of them, as "score >= threshold" for each score that occurs gives it, and a
# score that cannot fall when a lesion more is found and nothing else changes.
# Seen, for scans with ten nodules, through compute_fp_tp_probs_nd: where no detection is false and all scores are 1, as
# those of a segmenter's masks, nine nodules found have a FROC score of 0.9, all ten 0.0. With ten scores from 1.0 down
# to 0.55 nine found have 0.9, ten 0.9, where 1.0 is right. With ratings of 1 to 5, two nodules of each, seven false
# alarms of 1 and one of 2, in five scans, 0.80 where 0.93 is right: all findings of the lowest rating are left out. A
# lesion that is missed has a score of 0 in these arrays, which then is the lowest, so that such detectors have what is
# right; those that find all lesions lose their last ones. No warning.
# The documentation names the evaluation code of CAMELYON16 as its source, and nothing on the lowest score. Near in the
# trackers: MONAI 8951 (merged: the number of targets). Nothing on the lowest score was found.
# Means: where scores are above 0 append a 0 to fp_probs: that is left out instead, and all five scores are right. Fails
# if ten nodules found have the right score.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import monai, numpy as np
from monai.metrics import compute_fp_tp_probs_nd, compute_froc_curve_data, compute_froc_score

print("monai", monai.__version__)
SCANS, NODULES = 5, 10
RATES = (0.25, 0.5, 1, 2, 4, 8)  # compute_froc_score's
truth = np.zeros((12, 12, 60), np.int32)  # the scans one behind the other
for number in range(NODULES):
    truth[4:7, 4:7, 6 * number + 2 : 6 * number + 5] = number + 1


def froc(name, scores, false=()):
    """(MONAI's FROC score, that with the lowest score counted) of detections at the first nodules and beside them"""
    found = [(5, 5, 6 * number + 3) for number in range(len(scores))] + [(1, 1, 2 * n) for n in range(len(false))]
    fp, tp, targets = compute_fp_tp_probs_nd(np.array([*scores, *false], np.float32), np.array(found), truth)
    assert targets == NODULES and len(fp) == len(false)
    curve = compute_froc_curve_data(fp, tp, targets, SCANS)
    hits = tp[tp > 0]
    thresholds = np.unique([np.inf, *hits, *fp])[::-1]
    rates = [(fp >= one).sum() / SCANS for one in thresholds]
    right = np.interp(RATES, rates, [(hits >= one).sum() / NODULES for one in thresholds]).mean()
    monais = compute_froc_score(*curve)
    with_zero = np.append(fp, np.float32(0))
    assert np.isclose(compute_froc_score(*compute_froc_curve_data(with_zero, tp, targets, SCANS)), right)
    points = [(round(float(rate), 2), round(float(hit), 2)) for rate, hit in zip(*curve)]
    print(f"{name}: FROC score {monais:.3f}, with the lowest score {right:.3f}; MONAI's points {points}")
    return monais, right


masks = [froc(f"scores of 1, {n} of {NODULES} found, no false alarm", [1] * n) for n in (9, 10)]
graded = [froc(f"scores of 1 to 0.55, {n} found, no false alarm", np.linspace(1, 0.55, 10)[:n]) for n in (9, 10)]
ratings = froc("ratings of 1 to 5, all found, 8 false alarms", np.repeat([5, 4, 3, 2, 1], 2), [2] + [1] * 7)
assert np.allclose(masks, [(0.9, 0.9), (0, 1)])
assert np.allclose(graded, [(0.9, 0.9), (0.9, 1)])
assert ratings[0] < ratings[1] - 0.1
PY
cd "$folder" && OMP_NUM_THREADS=1 venv/bin/python -W ignore probe.py
