#!/bin/sh
# The published table of one model: every method, on each of the paper's three trainings, with every seed; each model is
# scored on its training's benchmarks. Then the published rows and ours. All three models: sh scripts/experiment.sh nlg
#
#     sh scripts/nlg.sh [OPTION...]      options go to train.py; the published numbers are --formulation arxiv2024's
#
# METHODS="lora ba-lora" SUBSETS="metamath" SEEDS="42"     by default all four, all three, and 42 43 44
# OUTPUT=output/nlg                                        a folder per run; the report in output/nlg/report
# MODEL=meta-llama/Llama-2-7b-hf DATA=fxmeng/pissa-dataset hub names or local copies
# NUM_GPUS=8                                               GPUs of one training; by default all
# GSM8K=FILE MATH=FILE HUMANEVAL=FILE MBPP=FILE            local copies of the benchmarks
# MT_BENCH=FILE JUDGE=gpt-4 JUDGE_URL=... JUDGE_PROMPTS=FILE REFERENCES=FILE        MT-Bench's questions and judge
# DRY_RUN=1                                                prints the commands and runs nothing
#
# Started again after an interruption, it goes on where it was. With other options it needs another OUTPUT.
set -eu
. "$(dirname "$0")/setup.sh"

if [ -n "${AXES:-}" ]; then
    say "AXES=$AXES: METHODS, SUBSETS and SEEDS choose the runs here" >&2
    exit 2
fi

# option NAME VALUE   an entry of YAML where there is a value
option() { if [ -n "$2" ]; then printf "%s: '%s', " "$1" "$2"; fi; }

experiment() {
    cat <<EOF
like: nlg
settings: {$(option model "${MODEL:-}")$(option data "${DATA:-}")}
axes: {model: null, seed: [$(echo "${SEEDS:-42 43 44}" | tr ' ' ,)]}
evaluation: {$(option gsm8k "${GSM8K:-}")$(option hendrycks-math "${MATH:-}")$(option humaneval "${HUMANEVAL:-}")
  $(option mbpp "${MBPP:-}")$(option mt-bench "${MT_BENCH:-}")$(option judge-model "${JUDGE:-}")
  $(option judge-url "${JUDGE_URL:-}")$(option judge-prompts "${JUDGE_PROMPTS:-}")$(option references "${REFERENCES:-}")}
EOF
}

AXES="data=$(echo "${SUBSETS:-metamath python conversation}" | tr ' ' ,) method=$(echo "${METHODS:-full lora pissa ba-lora}" | tr ' ' ,)"
OUTPUT=${OUTPUT:-output/nlg} GPUS_PER_RUN=${NUM_GPUS:-$(gpus)}
if [ "$GPUS_PER_RUN" -eq 0 ]; then GPUS_PER_RUN=; fi
export AXES OUTPUT GPUS_PER_RUN
experiment | sh scripts/experiment.sh - -- "$@"
