#!/bin/sh
# The six augmentations on the same question: each alone, none, all, the paper's three. SEEDS="0" for some of its seeds.
exec "$(dirname "$0")/study_of_halves.sh" augmentations \
    "none rotation scale flip elastic gaussian histogram paper all random scratch" "${SEEDS:-0 1 2}" "none random scratch" "$@"
