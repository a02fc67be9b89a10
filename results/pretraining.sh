#!/bin/sh
# How long to pre-train: a third and three times the main table's 54 epochs, frozen. SEEDS="0" for some of its seeds.
set -eu
cd "$(dirname "$0")/.."
results/study_of_halves.sh pretraining_epochs "nodules_18_epochs nodules_162_epochs random" "${SEEDS:-0 1 2}" \
    "random trivial-radial" FINE_TUNING=no BY_HAND=trivial-radial "$@"
case " $* " in *" --plan "*) exit ;; esac
"${PYTHON:-python}" results/curves.py --results "${OUT:-results}"
