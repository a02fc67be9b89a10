#!/bin/sh
# The encoders that classification.sh leaves in $WORK: pre-trained where there are none, as a clone with records alone lacks
# them. For scripts that use them; SEEDS: of which seeds.
set -eu
cd "$(dirname "$0")/.."
WORK=${WORK:-evidence} SEEDS=${SEEDS:-0 1 2 3 4}
LOST=
for HALF in 0 1; do
    for SEED in $SEEDS; do
        CHECKPOINT=$WORK/classification/half$HALF/arms/nodules/seed$SEED/pretrain/checkpoint.pth
        [ -f "$CHECKPOINT" ] || LOST=${LOST:-$CHECKPOINT}
    done
done
if [ -n "$LOST" ]; then
    case " $* " in *" --plan "*) echo "error: $LOST: is missing; run results/classification.sh first" >&2; exit 1 ;; esac
    # What is recorded is not run again, so that a fresh clone may lack them
    echo "$LOST: is missing: the encoders are pre-trained first, records of that in $WORK/encoders"
    OUT=$WORK/encoders SEEDS=$SEEDS results/classification.sh ARMS=nodules "$@"
fi
