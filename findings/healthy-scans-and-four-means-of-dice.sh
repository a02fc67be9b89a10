#!/usr/bin/env bash
# MONAI 1.6.1 and torchmetrics 1.9.0: the mean Dice of one list of three cases is 1, 0.67, 0.5 or 0.33, by what each takes
# an empty label for. The cases: a lesion outlined exactly, a healthy scan without a mark, a healthy scan with a false
# alarm.
# Expected: one figure of one name; at the least, that a false alarm on a healthy scan is punished.
# Seen, of the class alone, without the background: MONAI's DiceMetric has 1, since it leaves out both healthy scans (its
# ignore_empty is on): a model that finds a lesion in every healthy scan loses nothing. With ignore_empty=False 0.67.
# torchmetrics' DiceScore leaves out the scan that is rightly empty, 0.5, and its GeneralizedDiceScore counts that as 0:
# 0.33. Its MeanIoU has -1 for a class that is in neither mask, and leaves it out of its own means.
# MONAI's documentation says what ignore_empty does, torchmetrics' that of MeanIoU; of the two scores it says nothing.
# Near in the trackers: MONAI 4052 (closed: false positives on an empty label are left out), torchmetrics 2846 (what the
# generalised score has for absent classes).
# Means: count scans without the class beside a mean Dice, and false alarms on them. Fails if two of them agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 torchmetrics==1.9.0 \
    numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import monai, torch, torchmetrics
from monai.metrics import DiceMetric
from torchmetrics.segmentation import DiceScore, GeneralizedDiceScore, MeanIoU

print("monai", monai.__version__, "torchmetrics", torchmetrics.__version__)
empty = torch.zeros(1, 8, 8, 8, dtype=torch.long)
lesion = empty.clone()
lesion[:, 2:5, 2:5, 2:5] = 1
cases = {"lesion outlined": (lesion, lesion), "healthy, no mark": (empty, empty), "healthy, false alarm": (lesion, empty)}


def classes_first(mask):
    """(1, 2, X, Y, Z) of (1, X, Y, Z) classes."""
    return torch.nn.functional.one_hot(mask, 2).movedim(-1, 1)


def by_monai(**flags):
    metric = DiceMetric(include_background=False, **flags)
    for prediction, label in cases.values():
        metric(classes_first(prediction), classes_first(label))
    return metric.get_buffer().flatten().tolist(), metric.aggregate().item()


def by_torchmetrics(kind, **flags):
    make = lambda: kind(num_classes=2, include_background=False, input_format="index", **flags)
    metric, each = make(), []
    for prediction, label in cases.values():
        each.append(float(make()(prediction, label)))
        metric.update(prediction, label)
    return each, float(metric.compute())


found = {
    "MONAI DiceMetric": by_monai(),
    "MONAI DiceMetric, ignore_empty=False": by_monai(ignore_empty=False),
    "torchmetrics DiceScore": by_torchmetrics(DiceScore),
    "torchmetrics GeneralizedDiceScore": by_torchmetrics(GeneralizedDiceScore),
    "torchmetrics MeanIoU": by_torchmetrics(MeanIoU, per_class=True),
}
print("cases:", *cases, sep="; ")
for name, (each, mean) in found.items():
    print(f"{name}: {each}, mean {mean:.3f}")
means = [round(mean, 2) for _, mean in found.values()]
assert means[:4] == [1.0, 0.67, 0.5, 0.33]
assert found["torchmetrics MeanIoU"][0][1] == -1
PY
cd "$folder" && OMP_NUM_THREADS=1 venv/bin/python probe.py
