#!/bin/sh
# Whether the pinned requirements resolve together on the package index, for each Python that they are for. Installs
# nothing but uv, which resolves for interpreters and platforms that are not here, into a folder that is deleted again.
#
#     sh scripts/check-pins.sh                 Python 3.11 to 3.13, on Linux; needs the index, a minute for each
#     PYTHONS=3.12 sh scripts/check-pins.sh
#
# It asks the index itself, without this machine's pip settings: those may name a mirror, or builds for CPUs alone.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT INT TERM
"${PYTHON:-python3}" -m venv "$folder/uv"
"$folder/uv/bin/pip" install --quiet uv==0.13.8
grep -v '^-e ' requirements.txt >"$folder/requirements.txt" # this project itself

# check NAME FILE...   the files as one set
check() {
    name=$1
    shift
    for python in ${PYTHONS:-3.11 3.12 3.13}; do
        if PIP_CONFIG_FILE=/dev/null "$folder/uv/bin/uv" pip compile --quiet --no-config --python-version "$python" \
            --python-platform linux --output-file "$folder/set.txt" "$@" 2>"$folder/problem"; then
            echo "ok: $name, Python $python: $(grep -c '==' "$folder/set.txt") packages, $(grep '^torch==' "$folder/set.txt" || true)"
        else
            echo "does not resolve: $name, Python $python" >&2
            cat "$folder/problem" >&2
            failed=1
        fi
    done
}

failed=0
check "CPU" "$folder/requirements.txt"
check "GPU" "$folder/requirements.txt" requirements-gpu.txt
check "vLLM on a CPU" "$folder/requirements.txt" requirements-vllm-cpu.txt
check "experiments" requirements-experiments.txt
exit "$failed"
