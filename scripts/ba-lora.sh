#!/bin/sh
# Fine-tunes a language model with BA-LoRA, merges it, scores it beside the untouched model, and prints the table.
#
#     sh scripts/ba-lora.sh                  with CUDA GPUs: the paper's LLaMA-2-7B experiment; without: the demo
#     METHOD=pissa sh scripts/ba-lora.sh     also lora, full (scripts/pissa.sh and its siblings do just this)
#
# EXPERIMENT=demo      SmolLM2-135M on generated word problems: ten minutes on two CPU cores, no model hub
# EXPERIMENT=paper     LLaMA-2-7B on 100,000 examples, DeepSpeed ZeRO-2 on all visible GPUs, scored by vLLM (eval.sh);
#                      needs the hub, or local copies: MODEL=/path/llama DATA=/path/pissa-dataset
# SUBSET=metamath      of the paper's three trainings the one for GSM8K and MATH; python: for HumanEval and MBPP;
#                      conversation: for MT-Bench
# NUM_GPUS=4           this many GPUs, the first of CUDA_VISIBLE_DEVICES (numbers, UUIDs, a MIG name); by default all of them
# BASE=no              leaves out the untouched model's scores
# SEED=42  OUTPUT=output/NAME               the run's seed and folder
# DRY_RUN=1                                 prints the commands and runs nothing
# Arguments go to train.py: sh scripts/ba-lora.sh --learning-rate 1e-4
#
# OUTPUT=output/NAME sh scripts/ba-lora.sh --resume goes on with a run that was interrupted, in training or in scoring;
# a run with other settings is refused.
set -eu
. "$(dirname "$0")/setup.sh"

method=${METHOD:-ba-lora}
seed=${SEED:-42}
case "$method" in full | lora | pissa | ba-lora) ;; *)
    say "METHOD=$method: one of full, lora, pissa, ba-lora" >&2
    exit 2
    ;;
esac

case " $* " in *" --resume "*)
    if [ -z "${OUTPUT:-}" ]; then # a folder that is named after the time is a new one
        say "--resume goes on in a folder: OUTPUT=output/NAME, which the first start printed" >&2
        exit 2
    fi
    ;;
esac

found=$(gpus)
num_gpus=${NUM_GPUS:-$found}
if [ "$num_gpus" -gt "$found" ] && [ "$found" -gt 0 ]; then
    say "NUM_GPUS=$num_gpus, and a run can take $found here${CUDA_VISIBLE_DEVICES:+: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES}" >&2
    exit 2
fi
if [ -n "${EXPERIMENT:-}" ]; then
    experiment=$EXPERIMENT reason="as EXPERIMENT says"
elif [ "$num_gpus" -gt 0 ]; then
    experiment=paper reason="$num_gpus CUDA GPUs; EXPERIMENT=demo for the small one"
else
    experiment=demo reason="no CUDA GPU; EXPERIMENT=paper for LLaMA-2-7B"
fi
output=${OUTPUT:-output/$method-$experiment${SEED:+-seed$SEED}-$(date +%Y%m%d-%H%M%S)}

# What is trained anew is scored anew.
again=--skip-done
case " $* " in *" --overwrite "*) again=--overwrite ;; esac

# score NAME CKPT   GSM8K's rule on a checkpoint; the demo's problems
score() {
    say "scoring $1"
    # A small engine for small problems: transformers starts at once, and two cores have no use for vLLM's batching.
    run python eval/gsm8k.py --ckpt "$2" --output-dir "$output/results/$1" --data demo --backend transformers \
        --max-new-tokens 96 --batch-size 50 --loss-field response "$again"
}

say "$method, $experiment experiment ($reason); everything goes to $output"
if [ -z "${DRY_RUN:-}" ]; then setup; fi

case "$experiment" in
demo)
    for name in MODEL DATA SUBSET; do
        if [ -n "$(eval "echo \"\${$name:-}\"")" ]; then
            say "$name is the paper experiment's, and the demo has its own: leave it out, or EXPERIMENT=paper" >&2
            exit 2
        fi
    done
    case "$method" in # the configuration has PiSSA's rate; docs/own-model.md has the table
    full) set -- --learning-rate 5e-5 "$@" ;;
    lora) set -- --learning-rate 1e-3 "$@" ;;
    esac
    run python train.py --config configs/demo.yaml --method "$method" --seed "$seed" --output-dir "$output" "$@"
    if [ "${BASE:-}" != no ]; then score base demo; fi
    score "$method" "$output/merged"
    ;;
paper)
    if [ "$num_gpus" -eq 0 ]; then
        say "EXPERIMENT=paper needs CUDA GPUs (NUM_GPUS=8 DRY_RUN=1 shows the commands)" >&2
        exit 2
    fi
    subset=${SUBSET:-metamath}
    case "$subset" in
    metamath) benchmarks="gsm8k hendrycks_math" ;;
    python) benchmarks="humaneval mbpp" ;;
    conversation) benchmarks=mt_bench ;;
    *)
        say "SUBSET=$subset: metamath, python or conversation" >&2
        exit 2
        ;;
    esac
    model=${MODEL:-meta-llama/Llama-2-7b-hf}
    accumulation=$((128 / (4 * num_gpus)))
    if [ $((accumulation * 4 * num_gpus)) -ne 128 ]; then
        say "note: $num_gpus GPUs x 4 sequences do not divide the paper's batch of 128: $((accumulation * 4 * num_gpus))"
    fi
    launcher="deepspeed --no_local_rank --num_gpus $num_gpus"
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [ "$(gpus)" -gt 0 ]; then
        # Given a number of GPUs, deepspeed takes the machine's first ones; of names it knows numbers alone.
        patient="--shutdown-timeout 600 --signals-to-handle SIGTERM,SIGINT,SIGUSR1" # experiments/grid.py says why
        visible=$(cards | head -n "$num_gpus" | paste -s -d , -)
        case "$visible" in
        *[!0-9,]*) launcher="env CUDA_VISIBLE_DEVICES=$visible torchrun --standalone --nproc_per_node $num_gpus $patient" ;;
        *) launcher="deepspeed --no_local_rank --include localhost:$visible" ;;
        esac
    fi
    # shellcheck disable=SC2086  # several words
    run $launcher train.py --config configs/llama2_7b_metamath.yaml --method "$method" \
        --seed "$seed" --model "$model" ${DATA:+--data "$DATA"} --data-subset "$subset" --batch-size 4 \
        --gradient-accumulation "$accumulation" --deepspeed configs/ds_zero2.json --output-dir "$output" "$@"
    export BENCHMARKS="$benchmarks"
    if [ "${BASE:-}" != no ]; then sh scripts/eval.sh "$model" "$output/results/base" --backend vllm "$again"; fi
    sh scripts/eval.sh "$output/merged" "$output/results/$method" --backend vllm "$again"
    ;;
*)
    say "EXPERIMENT=$experiment: demo or paper" >&2
    exit 2
    ;;
esac

set -- "$output/results/$method"
if [ "${BASE:-}" != no ]; then set -- "$output/results/base" "$@"; fi
run python eval/report.py "$@"
if [ -z "${DRY_RUN:-}" ]; then say "done; everything is in $output"; fi
