#!/bin/sh
# How soon: the encoders that classification.sh has left in $WORK, and from scratch, fine-tuned for 5, 10 and 20 epochs in
# place of its 40, an eighth of them to warm up as there. SEEDS="0" for some of its seeds.
set -eu
cd "$(dirname "$0")/.."
export SEEDS="${SEEDS:-0 1 2 3 4}"
results/encoders.sh "$@"
for EPOCHS in "5 --warmup_epochs 0.625" "10 --warmup_epochs 1.25" "20 --warmup_epochs 2.5"; do
    results/study_of_halves.sh "epochs_${EPOCHS%% *}" "trained scratch" "$SEEDS" scratch \
        FROZEN=no FINE_TUNING="--pool cls+centre --epochs $EPOCHS" "$@"
done
case " $* " in *" --plan "*) exit ;; esac
"${PYTHON:-python}" results/curves.py --results "${OUT:-results}"
