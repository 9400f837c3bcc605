#!/bin/sh
# GLUE by every method: a run of finetune_bert_l_sst2.py for each task, method and seed, then the published table and ours.
# The rates are those of experiments/glue.yaml, one per method.
# All four models: sh scripts/experiment.sh glue
#
#     sh scripts/glue.sh [CONFIG [OPTION...]]    CONFIG: by default configs/glue_deberta_v3_base.yaml; options go to each run
#
# TASKS="rte mrpc" METHODS="lora ba-lora" SEEDS="42"           by default all eight, all four, and 42 43 44
# OUTPUT=output/glue                                           a folder per run; the report in output/glue/report
# DRY_RUN=1                                                    prints the commands and runs nothing
#
# Started again after an interruption, it leaves out the runs that are done, and refuses those of other settings.
set -eu
. "$(dirname "$0")/setup.sh"

config=${1:-configs/glue_deberta_v3_base.yaml}
if [ $# -gt 0 ]; then shift; fi
if [ -n "${GPUS_PER_RUN:-}" ]; then
    say "GPUS_PER_RUN=$GPUS_PER_RUN: a run is one process here; docs/classification.md has the command for several GPUs" >&2
    exit 2
fi

for variable in AXES MODEL DATA; do
    if [ -n "$(eval "echo \"\${$variable:-}\"")" ]; then
        say "$variable is not read here: CONFIG names the model; TASKS, METHODS and SEEDS choose the runs" >&2
        exit 2
    fi
done

experiment() {
    cat <<EOF
like: glue
settings: {config: '$config'}
needs-gpu: false
axes:
  model: {'$(basename "$config" .yaml)': {}}
  task: [$(echo "${TASKS:-mnli sst2 mrpc cola qnli qqp rte stsb}" | tr ' ' ,)]
  seed: [$(echo "${SEEDS:-42 43 44}" | tr ' ' ,)]
EOF
}

AXES="method=$(echo "${METHODS:-full lora pissa ba-lora}" | tr ' ' ,)" OUTPUT=${OUTPUT:-output/glue}
export AXES OUTPUT
experiment | sh scripts/experiment.sh - -- "$@"
