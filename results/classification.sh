#!/bin/sh
# The README's main table: nodule or vessel of the same density, frozen and fine-tuned, by class token and the patch tokens
# in the middle of the crop. SEEDS="0", ARMS="nodules random" for some of its seeds and arms.
[ -n "${ARMS:-}" ] || export ENSEMBLES="nodules scratch"
exec "$(dirname "$0")/study_of_halves.sh" classification "${ARMS:-nodules few_scans random scratch}" "${SEEDS:-0 1 2 3 4}" \
    "random scratch trivial-radial" "$@"
