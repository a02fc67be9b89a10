#!/bin/sh
# Fewer labels: the encoders that classification.sh has left in $WORK, on 50, 25 and 10 % of the training patients. Frozen,
# beside random ones: as they are, and with each crop turned and mirrored in all ways that a cube can be; fine-tuned at
# equal steps, beside scratch. And scratch given time: on all of them, three times as long, the epoch chosen by
# validation, for both. SEEDS="0" for some of the seeds.
set -eu
cd "$(dirname "$0")/.."
FROZEN_SEEDS=${SEEDS:-0 1 2 3 4} SEEDS=${SEEDS:-0 1 2}
SEEDS=$FROZEN_SEEDS results/encoders.sh "$@"
frozen() {
    NAME=$1 FLAGS=$2
    shift 2
    results/study_of_halves.sh "$NAME" "trained random" "$FROZEN_SEEDS" "random trivial-radial" \
        FINE_TUNING=no FROZEN="$FLAGS" BY_HAND=trivial-radial --few_labels "$@"
}
study() {
    NAME=$1 FLAGS=$2
    shift 2
    results/study_of_halves.sh "$NAME" "trained scratch" "$SEEDS" scratch FROZEN=no FINE_TUNING="$FLAGS" "$@"
}
frozen frozen "--pool cls+centre" "$@"
frozen frozen_turned "--pool cls+centre --tta 48" "$@"
study labels_50 "--pool cls+centre --label_fraction 0.5 --epochs 80 --val_freq 2" "$@"
study labels_25 "--pool cls+centre --label_fraction 0.25 --epochs 160 --val_freq 4" "$@"
study labels_10 "--pool cls+centre --label_fraction 0.1 --epochs 400 --val_freq 10" "$@"
study long "--pool cls+centre --epochs 120" "$@"
case " $* " in *" --plan "*) exit ;; esac
"${PYTHON:-python}" results/curves.py --results "${OUT:-results}"
