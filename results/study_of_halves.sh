#!/bin/sh
# A study on patients whom no encoder has seen: once for each half of the patients, which is tested by encoders that were
# pre-trained without it. Records of all runs go to $OUT/runs/NAME, tables made from them to $OUT/NAME.
#
#   results/study_of_halves.sh NAME "ARMS" "SEEDS" "ARMS TO COMPARE WITH" [SETTING=VALUE ...] [flags of study.py]
#
# Of the environment it takes OUT: results, unless what is there is to be repeated elsewhere; DATA: ../shared/data or a
# LUNA16 download; WORK: where data and runs go; PYTHON: the interpreter; relative paths are relative to the repository.
# What a table is of are arguments, lest a variable of the user's shell change it. PRETRAINING_EPOCHS: of arms that have no
# other; FINE_TUNING: flags of main_lnc_luna16.py beside those that all have, or no: frozen features alone;
# FINE_TUNING_RATE: its learning rate; FROZEN: flags of extract_features.py, or no: without the probe on frozen features;
# BY_HAND: the trivial figure that stands beside it, in place of all; ENSEMBLES: arms whose seeds are judged together
# too. Start it again to resume; with --plan it says how long each half will take.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA=${DATA:-../shared/data} WORK=${WORK:-evidence} OUT=${OUT:-results}
NAME=$1 ARMS=$2 SEEDS=$3 AGAINST=$4
shift 4

PRETRAINING_EPOCHS=54 FINE_TUNING="--pool cls+centre --epochs 40" FINE_TUNING_RATE=0.0005 FROZEN="--pool cls+centre"
BY_HAND= ENSEMBLES=
while [ $# -gt 0 ]; do
    VALUE=${1#*=}
    case $1 in
    PRETRAINING_EPOCHS=*) PRETRAINING_EPOCHS=$VALUE ;;
    FINE_TUNING=*) FINE_TUNING=$VALUE ;;
    FINE_TUNING_RATE=*) FINE_TUNING_RATE=$VALUE ;;
    FROZEN=*) FROZEN=$VALUE ;;
    BY_HAND=*) BY_HAND=$VALUE ;;
    ENSEMBLES=*) ENSEMBLES=$VALUE ;;
    -*) break ;;
    *) echo "error: $1: is no setting of this table; flags of study.py begin with --, SEEDS=0 stands before the script" >&2; exit 2 ;;
    esac
    shift
done

mkdir -p "$WORK"
"$PYTHON" results/make_data.py --data "$DATA" --output "$WORK/data"
KIND=$("$PYTHON" -c "import json, sys; print(json.load(open(sys.argv[1]))['data'])" "$WORK/data/DATA.json")
case "$KIND: $ARMS " in
collection:*) ;;
*" published "*)
    echo "arm published: left out, as its pool holds patients of LIDC-IDRI, who are LUNA16's too"
    ARMS=$(echo " $ARMS " | sed 's/ published / /')
    ;;
esac

TRIVIAL=
[ "$FROZEN" = no ] || TRIVIAL=${BY_HAND:-trivial-radial trivial-all trivial-mean trivial-histogram trivial-centre}
RIVALS=
for ARM in $AGAINST; do
    case " $ARMS $TRIVIAL " in *" $ARM "*) RIVALS="$RIVALS $ARM" ;; esac
done
# Whose probe leaves the trivial figures, which are the same for all; from scratch is not probed
PROBED=
for ARM in $ARMS; do
    case $ARM in random) PROBED=random ;; scratch) ;; *) PROBED=${PROBED:-$ARM} ;; esac
done

study_half() {
    HALF=$1
    shift
    if [ "$FINE_TUNING" != no ]; then
        set -- --classification "$WORK/data/pairs" \
            --classification_flags="--folds subsets $FINE_TUNING --batch_size_per_gpu 16 --layer_decay 1 --lr $FINE_TUNING_RATE --drop_path_rate 0 --precision bf16" "$@"
    fi
    if [ "$FROZEN" != no ]; then
        set -- --probe "$WORK/data/pairs" --probe_flags="$FROZEN --trivial" \
            ${PROBED:+--features "$WORK/$NAME/half$HALF/arms/$PROBED/seed${SEEDS%% *}/probe/features.${BY_HAND:-trivial-*}.csv"} "$@"
    fi
    # Two arms that are not pre-trained here: by classification.sh, and by whoever published the weights
    {
        cat results/arms.txt
        printf "%s: '%s'\n" trained "$(cd "$WORK" && pwd)/classification/half$HALF/arms/nodules/seed{seed}/pretrain/checkpoint.pth" \
            published "$PWD/results/weights/nodules_without_half$HALF.safetensors"
    } > "$WORK/arms_of_half$HALF.txt"
    # shellcheck disable=SC2086 # arms and seeds are words
    "$PYTHON" study.py --output_dir "$WORK/$NAME/half$HALF" --arms_file "$WORK/arms_of_half$HALF.txt" --arms $ARMS --seeds $SEEDS \
        --pretrain_flags="@recipes/nodules.txt --epochs $PRETRAINING_EPOCHS --num_workers 0 --saveckp_freq 0 --data_list '$WORK/data/pool_without_half$HALF.csv'" \
        --records "$OUT/runs/$NAME" --part "half$HALF" --patients "$WORK/data/half$HALF.txt" --note "$KIND" "$@"
}
# What has seen no pool is the same for both halves, and is judged on both
share_units() {
    for UNIT in "$WORK/$NAME"/half0/arms/scratch/seed* "$WORK/$NAME"/half0/arms/random/seed*; do
        SAME=$WORK/$NAME/half1/${UNIT#"$WORK/$NAME/half0/"}
        [ -d "$UNIT" ] && [ ! -d "$SAME" ] || continue
        mkdir -p "$(dirname "$SAME")"
        rm -rf "$WORK/$NAME/half1/part"
        cp -R "$UNIT" "$WORK/$NAME/half1/part"
        mv "$WORK/$NAME/half1/part" "$SAME"
    done
}
study_half 0 "$@"
case " $* " in *" --plan "*) ;; *) share_units ;; esac
study_half 1 "$@"
case " $* " in *" --plan "*) exit ;; esac
# shellcheck disable=SC2086
"$PYTHON" study.py --output_dir "$OUT/$NAME" --from_records "$OUT/runs/$NAME" ${RIVALS:+--against $RIVALS} \
    ${ENSEMBLES:+--ensembles $ENSEMBLES} --arms $ARMS $TRIVIAL
