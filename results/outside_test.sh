#!/bin/sh
# How results/weights/nodules.safetensors is to be judged on cases that it has nothing to do with: frozen features against
# random encoders, and against figures that need no network, in nested folds by patient.
#
#   results/outside_test.sh CASES OUTPUT
#
# CASES: crops of 24 mm or more at 1 mm in the classification layout, CASES/subset*/label0|label1/PATIENT/NAME.nii.gz
set -eu
ROOT=$(dirname "$0")/.. PYTHON=${PYTHON:-python}
[ $# = 2 ] || { echo "error: $0: expected two folders, CASES and OUTPUT, found $# arguments" >&2; exit 2; }
CASES=$1 OUTPUT=$2

"$PYTHON" "$ROOT/extract_features.py" --weights "$ROOT/results/weights/nodules.safetensors" --input "$CASES" \
    --output "$OUTPUT/features.csv" --pool cls+centre --random 5 --trivial
"$PYTHON" "$ROOT/evaluate_features.py" --features "$OUTPUT/features.csv" "$OUTPUT/features.trivial-*.csv" \
    --group "$OUTPUT/features.random*.csv" --labels "$CASES" --output_dir "$OUTPUT/evaluation"
