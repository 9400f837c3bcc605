#!/bin/sh
# GLUE by every method: a run of finetune_bert_l_sst2.py for each task, method and seed, then the published table and ours.
#
#     sh scripts/glue.sh [CONFIG [OPTION...]]    CONFIG: by default configs/glue_deberta_v3_base.yaml; options go to each run
#
# TASKS="rte mrpc" METHODS="lora ba-lora" SEEDS="42"           by default all eight, all four, and 42 43 44
# FULL_LEARNING_RATE=2e-5                                      of --method full, which the adapters' rate would ruin
# OUTPUT=output/glue                                           a folder per run; the report in output/glue-report
# DRY_RUN=1                                                    prints the commands and runs nothing
#
# Started again after an interruption, it leaves out the runs that are done, and refuses those of other settings.
set -eu
. "$(dirname "$0")/setup.sh"

config=${1:-configs/glue_deberta_v3_base.yaml}
if [ $# -gt 0 ]; then shift; fi
output=${OUTPUT:-output/glue}
seeds=${SEEDS:-42 43 44}

if [ -z "${DRY_RUN:-}" ]; then setup; fi
results=
for task in ${TASKS:-mnli sst2 mrpc cola qnli qqp rte stsb}; do
    for method in ${METHODS:-full lora pissa ba-lora}; do
        for seed in $seeds; do
            folder=$output/$(basename "$config" .yaml)-$task-$method-$seed
            results="$results $folder"
            say "$task, $method, seed $seed"
            rate=
            if [ "$method" = full ]; then rate="--learning-rate=${FULL_LEARNING_RATE:-2e-5}"; fi
            run python finetune_bert_l_sst2.py --config "$config" --task "$task" --method "$method" --seed "$seed" \
                --output-dir "$folder" --skip-done ${rate:+"$rate"} "$@"
        done
    done
done
# shellcheck disable=SC2086  # one word per folder
run python eval/report.py $results --output-dir "$output-report" --overwrite
