#!/bin/sh
# Fine-tunes a language model with BA-LoRA, merges it, scores it beside the untouched model, and prints the table.
#
#     sh scripts/ba-lora.sh                  with CUDA GPUs: the paper's LLaMA-2-7B experiment; without: the demo
#     METHOD=pissa sh scripts/ba-lora.sh     also lora, full (scripts/pissa.sh and its siblings do just this)
#
# EXPERIMENT=demo      SmolLM2-135M on generated word problems: ten minutes on two CPU cores, no model hub
# EXPERIMENT=paper     LLaMA-2-7B on MetaMathQA-100K, DeepSpeed ZeRO-2 on all visible GPUs, then GSM8K by vLLM;
#                      needs the hub, or local copies: MODEL=/path/llama DATA=/path/metamath
# SEED=42  OUTPUT=output/NAME               the run's seed and folder
# DRY_RUN=1                                 prints the commands and runs nothing
# Arguments go to train.py: sh scripts/ba-lora.sh --learning-rate 1e-4
set -eu
. "$(dirname "$0")/setup.sh"

method=${METHOD:-ba-lora}
seed=${SEED:-42}
case "$method" in full | lora | pissa | ba-lora) ;; *)
    say "METHOD=$method: one of full, lora, pissa, ba-lora" >&2
    exit 2
    ;;
esac

num_gpus=${NUM_GPUS:-$(gpus)}
if [ -n "${EXPERIMENT:-}" ]; then
    experiment=$EXPERIMENT reason="as EXPERIMENT says"
elif [ "$num_gpus" -gt 0 ]; then
    experiment=paper reason="$num_gpus CUDA GPUs; EXPERIMENT=demo for the small one"
else
    experiment=demo reason="no CUDA GPU; EXPERIMENT=paper for LLaMA-2-7B"
fi
output=${OUTPUT:-output/$method-$experiment-$(date +%Y%m%d-%H%M%S)}

# score NAME CKPT [OPTION...]   GSM8K's rule on a checkpoint
score() {
    name=$1 ckpt=$2
    shift 2
    say "scoring $name"
    run python eval/gsm8k.py --ckpt "$ckpt" --output-dir "$output/results/$name" "$@"
}

say "$method, $experiment experiment ($reason); everything goes to $output"
if [ -z "${DRY_RUN:-}" ]; then setup; fi

case "$experiment" in
demo)
    if [ "$method" = full ]; then set -- --learning-rate 5e-5 "$@"; fi # every weight moves: the adapters' rate is too high
    run python train.py --config configs/demo.yaml --method "$method" --seed "$seed" --output-dir "$output" "$@"
    # A small engine for small problems: transformers starts at once, and two cores have no use for vLLM's batching.
    set -- --data demo --backend transformers --max-new-tokens 96 --batch-size 50 --loss-field response
    score base demo "$@"
    score "$method" "$output/merged" "$@"
    ;;
paper)
    if [ "$num_gpus" -eq 0 ]; then
        say "EXPERIMENT=paper needs CUDA GPUs (NUM_GPUS=8 DRY_RUN=1 shows the commands)" >&2
        exit 2
    fi
    model=${MODEL:-meta-llama/Llama-2-7b-hf}
    accumulation=$((128 / (4 * num_gpus)))
    if [ $((accumulation * 4 * num_gpus)) -ne 128 ]; then
        say "note: $num_gpus GPUs x 4 sequences do not divide the paper's batch of 128: $((accumulation * 4 * num_gpus))"
    fi
    run deepspeed --no_local_rank --num_gpus "$num_gpus" train.py --config configs/llama2_7b_metamath.yaml --method "$method" --seed "$seed" \
        --model "$model" ${DATA:+--data "$DATA"} --batch-size 4 --gradient-accumulation "$accumulation" \
        --deepspeed configs/ds_zero2.json --output-dir "$output" "$@"
    score base "$model" --backend vllm
    score "$method" "$output/merged" --backend vllm
    ;;
*)
    say "EXPERIMENT=$experiment: demo or paper" >&2
    exit 2
    ;;
esac

run python eval/report.py "$output/results/base" "$output/results/$method"
if [ -z "${DRY_RUN:-}" ]; then say "done; everything is in $output"; fi
