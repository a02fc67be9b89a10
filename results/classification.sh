#!/bin/sh
# The README's main table: nodule or vessel of the same density, frozen and fine-tuned, by class token and the patch tokens
# in the middle of the crop. SEEDS="0" for some of its seeds; ARMS="nodules random" as its first argument for some of its
# arms, without ensembles.
case ${1:-} in
ARMS=*) ARMS=${1#ARMS=} ENSEMBLES= && shift ;;
*) ARMS="nodules few_scans random scratch" ENSEMBLES="nodules scratch" ;;
esac
exec "$(dirname "$0")/study_of_halves.sh" classification "$ARMS" "${SEEDS:-0 1 2 3 4}" "random scratch trivial-radial" \
    ENSEMBLES="$ENSEMBLES" "$@"
