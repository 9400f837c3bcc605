#!/bin/sh
# Scores a checkpoint on all five benchmarks, greedy, by the published protocol, on one engine, and puts the results into
# a report. One benchmark that fails stops no other; the report names it, and the exit code is then not 0.
#
#     sh scripts/eval.sh CKPT [OUT [OPTION...]]        OUT: by default results/CKPT; RUN/results for RUN/merged
#     sh scripts/eval.sh demo results/demo --limit 4 --max-new-tokens 64        options go to every benchmark
#
# GSM8K=FILE MATH=FILE HUMANEVAL=FILE MBPP=FILE    local copies; without: the hub, and HumanEval from its package
# MT_BENCH=FILE                                    FastChat's question.jsonl; without: the hub
# JUDGE=gpt-4 JUDGE_PROMPTS=FILE REFERENCES=FILE   MT-Bench's judge, the key in OPENAI_API_KEY; JUDGE_URL=http://...
# BENCHMARKS="humaneval mbpp"                      these alone
# DRY_RUN=1                                        prints the commands and runs nothing
#
# Started again after an interruption, it leaves out what is done and goes on with the rest; it refuses what was done with
# another checkpoint or other settings (--overwrite replaces it). Answers to MT-Bench without a judgment are judged
# when there is a judge.
set -eu
. "$(dirname "$0")/setup.sh"

if [ $# -eq 0 ]; then
    say "no checkpoint: sh scripts/eval.sh CKPT [OUT [OPTION...]]" >&2
    exit 2
fi
ckpt=$1
case "$ckpt" in
*/merged | */merged/) out=${2:-$(dirname "$ckpt")/results} ;; # a run of train.py
*) out=${2:-results/$(basename "$ckpt")} ;;
esac
shift
if [ $# -gt 0 ]; then shift; fi

if [ -z "${DRY_RUN:-}" ]; then setup; fi
set -- ${GSM8K:+--gsm8k "$GSM8K"} ${MATH:+--hendrycks-math "$MATH"} ${HUMANEVAL:+--humaneval "$HUMANEVAL"} \
    ${MBPP:+--mbpp "$MBPP"} ${MT_BENCH:+--mt-bench "$MT_BENCH"} ${JUDGE:+--judge-model "$JUDGE"} \
    ${JUDGE_URL:+--judge-url "$JUDGE_URL"} ${JUDGE_PROMPTS:+--judge-prompts "$JUDGE_PROMPTS"} \
    ${REFERENCES:+--references "$REFERENCES"} "$@"
status=0
# shellcheck disable=SC2086  # one word per benchmark
run python eval/suite.py ${BENCHMARKS:+--benchmarks $BENCHMARKS} --ckpt "$ckpt" --output-dir "$out" --skip-done "$@" ||
    status=$?
# Interrupted, or nothing was begun: no benchmark to report on.
if [ "$status" -gt 2 ] || { [ "$status" -ne 0 ] && [ ! -f "$out/failures.json" ]; }; then exit "$status"; fi
run python eval/report.py "$out" --output-dir "$out/report" --overwrite
exit "$status"
