#!/bin/sh
# Is from scratch given the rate that suits it? The encoders that classification.sh has left in $WORK, and from scratch,
# fine-tuned by half, twice and four times its learning rate. SEEDS="0" for some of its seeds.
set -eu
cd "$(dirname "$0")/.."
export SEEDS="${SEEDS:-0 1 2}"
results/encoders.sh "$@"
for RATE in 0.00025 0.001 0.002; do
    results/study_of_halves.sh "rate_$RATE" "trained scratch" "$SEEDS" scratch FROZEN=no FINE_TUNING_RATE="$RATE" "$@"
done
case " $* " in *" --plan "*) exit ;; esac
"${PYTHON:-python}" results/curves.py --results "${OUT:-results}"
