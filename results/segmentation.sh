#!/bin/sh
# The README's segmentation table: lungs, and lesions, of patients whom no encoder has seen, by 1, 2 and 4 training cases.
# Encoders are pre-trained on cubes of other patients alone; every case is tested once, by models that others trained.
# As results/study_of_halves.sh has them: DATA (the collection alone), WORK, OUT, PYTHON, and SEEDS="0" for some of its
# seeds; relative paths are relative to the repository. Start it again to resume; flags go to every study, such as
# --parallel 1.
set -eu
case ${1:-} in "" | -*) ;; *) echo "error: $1: flags of study.py begin with --, SEEDS=0 stands before the script" >&2; exit 2 ;; esac
case " $* " in *" --plan "*) echo "error: --plan: needs the encoders; docs/evidence.md says how long it takes" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA=${DATA:-../shared/data} WORK=${WORK:-evidence} OUT=${OUT:-results} SEEDS=${SEEDS:-0 1 2}
RUNS=$WORK/segmentation RECIPE="@recipes/nodules.txt --epochs 54 --num_workers 0 --saveckp_freq 0"
FINETUNE="--epochs 15 --warmup_epochs 1 --batch_size_per_gpu 8 --layer_decay 1 --drop_path_rate 0"
FINETUNE="$FINETUNE --val_freq 1000 --overlap 0 --precision bf16"
FROZEN="--decoder linear --freeze_encoder true --lr 0.01" TUNED="--lr 0.003"

"$PYTHON" results/make_data.py --data "$DATA" --output "$WORK/data"
"$PYTHON" results/make_masks.py --data "$DATA" --pool "$WORK/data/pool_cubes.csv" --output "$WORK/lungs"
"$PYTHON" prepare_data.py msd --input "$DATA/msd/Task06_Lung" --output "$WORK/lesions" --crop label --margin 24 --spacing 1 1 1

# One pre-training of each seed, for all tables
mkdir -p "$RUNS/weights"
# shellcheck disable=SC2086 # seeds and flags are words
for SEED in $SEEDS; do
    OMP_NUM_THREADS=1 "$PYTHON" main_dino.py $RECIPE --data_list "$WORK/data/pool_cubes.csv" --seed "$SEED" --output_dir "$RUNS/weights/seed$SEED"
done
echo 'nodules: seed{seed}/checkpoint.pth' > "$RUNS/weights/arms.txt"

# study_of TASK CASES frozen|tuned ARM_BESIDE FLAGS [flags of study.py]: of so many training cases
study_of() {
    TASK=$1 CASES=$2 NAME=$1_$3_$2 BESIDE=$4 FLAGS=$5
    shift 5
    # shellcheck disable=SC2086
    "$PYTHON" study.py --output_dir "$RUNS/$NAME" --arms_file "$RUNS/weights/arms.txt" --arms nodules "$BESIDE" --seeds $SEEDS \
        --segmentation "$WORK/$TASK" --training_cases "$CASES" \
        --segmentation_flags="$FINETUNE --patches_per_case $((64 / CASES)) --cache_dir '$RUNS/cache_$TASK' $FLAGS" \
        --pretrain_flags="$RECIPE --data_list '$WORK/data/pool_cubes.csv'" \
        --records "$OUT/runs/$NAME" --note "encoders of 102 nodules of other patients" "$@"
    "$PYTHON" study.py --output_dir "$OUT/$NAME" --from_records "$OUT/runs/$NAME" --arms nodules "$BESIDE" --against "$BESIDE"
}

for TABLE in "lungs 4" "lungs 2" "lungs 1" "lesions 2" "lesions 1"; do
    # shellcheck disable=SC2086
    study_of $TABLE frozen random "$FROZEN" "$@"
    # shellcheck disable=SC2086
    study_of $TABLE tuned scratch "$TUNED" "$@"
done
"$PYTHON" results/join_tables.py "$OUT"/lungs_* "$OUT"/lesions_* --output "$OUT/segmentation"
