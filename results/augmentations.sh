#!/bin/sh
# The six augmentations on the same question: each alone, none, all, the paper's three; frozen, after a third of the main
# table's pre-training. SEEDS="0" for some of its seeds.
exec "$(dirname "$0")/study_of_halves.sh" augmentations \
    "none rotation scale flip elastic gaussian histogram paper all random" "${SEEDS:-0 1 2}" "none random" \
    FINE_TUNING=no PRETRAINING_EPOCHS=18 BY_HAND=trivial-radial "$@"
