#!/bin/sh
# GLUE by every method: a run of finetune_bert_l_sst2.py for each task, method and seed, then the published table and ours.
#
#     sh scripts/glue.sh [CONFIG [OPTION...]]    CONFIG: by default configs/glue_deberta_v3_base.yaml; options go to each run
#
# TASKS="rte mrpc" METHODS="lora ba-lora" SEEDS="0 1 2 3 4"    by default all eight, all four, and 42
# OUTPUT=output/glue                                           a folder per run, and the report
# DRY_RUN=1                                                    prints the commands and runs nothing
#
# Started again after an interruption, it leaves out the runs that are done.
set -eu
. "$(dirname "$0")/setup.sh"

config=${1:-configs/glue_deberta_v3_base.yaml}
if [ $# -gt 0 ]; then shift; fi
output=${OUTPUT:-output/glue}
seeds=${SEEDS:-42}

if [ -z "${DRY_RUN:-}" ]; then setup; fi
results=
for task in ${TASKS:-mnli sst2 mrpc cola qnli qqp rte stsb}; do
    for method in ${METHODS:-full lora pissa ba-lora}; do
        for seed in $seeds; do
            folder=$output/$(basename "$config" .yaml)-$task-$method-$seed
            results="$results $folder"
            if [ -f "$folder/results.json" ]; then
                say "done: $folder"
                continue
            fi
            say "$task, $method, seed $seed"
            run python finetune_bert_l_sst2.py --config "$config" --task "$task" --method "$method" --seed "$seed" \
                --output-dir "$folder" --overwrite "$@"
        done
    done
done
# shellcheck disable=SC2086  # one word per folder
run python eval/report.py $results --output-dir "$output/report" --overwrite
