#!/bin/sh
# Runs an experiment by its name. Finished parts are not run again.
#
#     sh scripts/experiment.sh                            lists the experiments
#     sh scripts/experiment.sh nlg -n                     commands and price; runs nothing, needs no network (also DRY_RUN=1)
#     sh scripts/experiment.sh nlg-demo                   on this machine
#     sh scripts/experiment.sh nlg --executor slurm --jobs 20         options go to Snakemake (docs/experiments.md)
#     sh scripts/experiment.sh nlg -- --save-steps 50     what follows -- goes to every training
#
# OUTPUT=output/NAME               a folder per run, records/, logs/, summary.md, and report/ beside published tables
# AXES="seed=42 method=lora,pissa" these of the experiment's runs
# GPUS_PER_RUN=4                   GPUs that a training takes, where the experiment needs GPUs; the batch stays what it is
# PATHS=paths.yaml                 local copies, a line each: meta-llama/Llama-2-7b-hf: /models/llama-2-7b
# PRICE=no                         leaves the price out
#
# Started again after an interruption it goes on where it was. After a kill -9 of Snakemake itself, which leaves its folder
# locked, see first that none of its jobs runs any more: sh scripts/experiment.sh NAME --unlock
set -eu
. "$(dirname "$0")/setup.sh"

name=${1:-}
unread="METHOD SUBSET TASK SEED" # ba-lora.sh's; nlg.sh and glue.sh hand their own on in an experiment of the name -
if [ "$name" != - ]; then unread="$unread METHODS SUBSETS TASKS SEEDS MODEL DATA NUM_GPUS"; fi
for variable in $unread; do
    if [ -n "$(eval "echo \"\${$variable:-}\"")" ]; then
        say "$variable is not read here: METHODS, SUBSETS, TASKS and SEEDS choose in nlg.sh and glue.sh, AXES, GPUS_PER_RUN and PATHS in experiment.sh" >&2
        exit 2
    fi
done
if [ $# -gt 0 ]; then shift; fi
dry=${DRY_RUN:-} cluster='' engine='' resources='' last=''
quoted() { printf " '%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"; }
while [ $# -gt 0 ]; do
    word=$1
    shift
    case "$word" in -*) last=$word ;; esac
    case "$word" in
    --) break ;;
    -n | --dry-run | --dryrun) dry=1 ;;
    --executor | --executor=* | -e) cluster=1 ;;
    --resources | --res) continue ;; # joined with ours below: of two --resources Snakemake takes the last
    --resources=* | --res=*) last=--resources word=${word#*=} ;;
    esac
    case "$last" in
    --resources | --res) resources="$resources $word" ;;
    *) engine="$engine$(quoted "$word")" ;;
    esac
done

if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
if [ -z "$dry" ] && [ -n "$name" ]; then
    setup
    setup_experiments
fi
if ! python -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' common yaml tyro torch 2>/dev/null; then
    say "the project is not installed here: python3 -m venv .venv && .venv/bin/pip install -r requirements.txt" >&2
    exit 2
fi
if [ -z "$name" ]; then exec python experiments/grid.py; fi

output=${OUTPUT:-output/$(basename "$name" .yaml)}
# The GPUs that may be used; those of a cluster are its own to give.
devices=
if [ -z "$cluster" ]; then devices=$(cards | paste -s -d , -); fi
axes=$(for axis in ${AXES:-}; do echo "--axis $axis"; done)
# shellcheck disable=SC2086  # words
set -- $axes ${GPUS_PER_RUN:+--processes $GPUS_PER_RUN} -- "$@"
if [ -n "${PATHS:-}" ]; then set -- --paths "$PATHS" "$@"; fi
if [ "${PRICE:-}" = no ]; then set -- --no-price "$@"; fi
if [ -n "$dry" ]; then exec python experiments/grid.py "$name" --output-dir "$output" "$@"; fi

# The workflow's steps read the plan: a second start would give the first one another.
mkdir -p "$output"
exec 9>"$output/.start"
if command -v flock >/dev/null && ! flock -n 9; then
    say "another start is running in $output: wait for its end, or name another OUTPUT" >&2
    exit 2
fi
python experiments/grid.py "$name" --output-dir "$output" --plan "$output/plan.json" --devices "$devices" \
    ${cluster:+--cluster} "$@"
# For a cluster, this machine's cores would be the most that a job there may ask for.
cores=$([ -n "$cluster" ] || echo "--cores all")
resources="$resources $(echo "$devices" | tr , '\n' | sed '/^$/d' | awk '{ print "gpu_" NR - 1 "=1" }')"
eval "set --$engine"
# shellcheck disable=SC2086  # words
exec "${SNAKEMAKE:-.venv-experiments/bin/snakemake}" --snakefile experiments/Snakefile --directory . --rerun-incomplete \
    --keep-going $cores "$@" $([ -z "${resources# }" ] || echo "--resources $resources") \
    --config plan="$output/plan.json" ${cluster:+cluster=1}
