#!/bin/sh
# Checks and measures everything that a CUDA GPU changes, and writes output/gpu-check.json. Ten minutes, no network.
#
#     sh scripts/gpu-check.sh                on the GPU; with the environment of .venv where there is one
#     sh scripts/gpu-check.sh right          the checks alone (python bench/gpu.py --help names the parts)
#     sh scripts/gpu-check.sh --device cpu --small
#
# It needs torch, transformers and safetensors; what else is installed is used, and what is not is named.
set -eu
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
mkdir -p output
exec "${PYTHON:-python3}" bench/gpu.py --output output/gpu-check.json "$@"
