#!/bin/sh
# The published table of LLaMA-2-7B: every method, on each of the paper's three trainings, with every seed; each model is
# scored on its training's benchmarks (scripts/ba-lora.sh: SUBSET). Then the published rows and ours.
#
#     sh scripts/nlg.sh [OPTION...]      options go to train.py; the published numbers are --formulation arxiv2024's
#
# METHODS="lora ba-lora" SUBSETS="metamath" SEEDS="42"     by default all four, all three, and 42 43 44
# OUTPUT=output/nlg                                        a folder per run; the report in output/nlg-report
# JUDGE=gpt-4 ...                                          and the other settings of scripts/ba-lora.sh and eval.sh
# DRY_RUN=1                                                prints the commands and runs nothing
#
# Started again after an interruption, it goes on where it was. With other options it needs another OUTPUT.
set -eu
. "$(dirname "$0")/setup.sh"

output=${OUTPUT:-output/nlg}
results=
for subset in ${SUBSETS:-metamath python conversation}; do
    for method in ${METHODS:-full lora pissa ba-lora}; do
        for seed in ${SEEDS:-42 43 44}; do
            folder=$output/$subset-$method-$seed
            results="$results $folder/results/$method"
            EXPERIMENT=paper BASE=no SUBSET=$subset METHOD=$method SEED=$seed OUTPUT=$folder \
                sh scripts/ba-lora.sh --resume "$@"
        done
    done
done
if [ -z "${DRY_RUN:-}" ]; then setup; fi
# shellcheck disable=SC2086  # one word per folder
run python eval/report.py $results --output-dir "$output-report" --overwrite
