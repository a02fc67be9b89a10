#!/bin/sh
# The main table as it was first made: fine-tuned by the class token, frozen by it and the mean of all patch tokens. What
# reading the middle of the crop changes. SEEDS="0" for some of its seeds.
exec "$(dirname "$0")/study_of_halves.sh" class_token "nodules random scratch" "${SEEDS:-0 1 2 3 4}" \
    "random scratch trivial-radial" ENSEMBLES="nodules scratch" FROZEN="--pool cls+mean" FINE_TUNING="--epochs 40" "$@"
