#!/bin/sh
# results/weights: the encoders of recipes/nodules.txt, seed 0, pre-trained without each half of the patients, which repeat the
# main table, and on all of the pool, for others to use and to test. After classification.sh; resumes.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} WORK=${WORK:-evidence}
[ $# = 0 ] || { echo "error: $0: takes no arguments, found $*" >&2; exit 2; }
for HALF in 0 1; do
    CHECKPOINT=$WORK/classification/half$HALF/arms/nodules/seed0/pretrain/checkpoint.pth
    [ -f "$CHECKPOINT" ] || { echo "error: $CHECKPOINT: is missing; run results/classification.sh first" >&2; exit 1; }
done

"$PYTHON" main_dino.py @recipes/nodules.txt --epochs 54 --num_workers 0 --saveckp_freq 0 --seed 0 \
    --data_list "$WORK/data/pool_all.csv" --output_dir "$WORK/nodules_all"
"$PYTHON" export.py --weights "$WORK/nodules_all" --output results/weights/nodules.safetensors
for HALF in 0 1; do
    "$PYTHON" export.py --weights "$WORK/classification/half$HALF/arms/nodules/seed0/pretrain" \
        --output "results/weights/nodules_without_half$HALF.safetensors"
done
