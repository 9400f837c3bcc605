#!/bin/sh
# Scores a checkpoint on all five benchmarks, greedy, by the published protocol, and puts the results into a report.
#
#     sh scripts/eval.sh CKPT [OUT [OPTION...]]        OUT: by default results/CKPT; RUN/results for RUN/merged
#     sh scripts/eval.sh demo results/demo --limit 4 --max-new-tokens 64        options go to every benchmark
#
# GSM8K=FILE MATH=FILE HUMANEVAL=FILE MBPP=FILE    local copies; without: the hub, and HumanEval from its package
# MT_BENCH=FILE                                    FastChat's question.jsonl; without it MT-Bench is left out
# JUDGE=gpt-4 JUDGE_PROMPTS=FILE REFERENCES=FILE   MT-Bench's judge, the key in OPENAI_API_KEY; JUDGE_URL=http://...
# BENCHMARKS="humaneval mbpp"                      these alone
# DRY_RUN=1                                        prints the commands and runs nothing
#
# Started again after an interruption, it leaves out what is done and goes on with the rest; it refuses what was done with
# another checkpoint or other settings (--overwrite replaces it).
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

# score NAME [OPTION...]   one benchmark
score() {
    name=$1
    shift
    say "$name"
    run python "eval/$name.py" --ckpt "$ckpt" --output-dir "$out" --skip-done "$@"
}

# mt_bench [OPTION...]   where there are questions; answers that were not judged yet are judged when there is a judge
mt_bench() {
    if [ -z "${MT_BENCH:-}" ]; then
        say "mt_bench is left out: MT_BENCH=question.jsonl names FastChat's questions (python eval/mt_bench.py --help)"
        return
    fi
    set -- --data "$MT_BENCH" ${JUDGE:+--judge-model "$JUDGE"} ${JUDGE_URL:+--judge-url "$JUDGE_URL"} \
        ${JUDGE_PROMPTS:+--judge-prompts "$JUDGE_PROMPTS"} ${REFERENCES:+--references "$REFERENCES"} "$@"
    # The answers, which are on disk, are not made again.
    if [ -n "${JUDGE:-}" ] && grep -qs '"judge": null' "$out/mt_bench.json"; then set -- "$@" --overwrite; fi
    score mt_bench "$@"
}

if [ -z "${DRY_RUN:-}" ]; then setup; fi
for name in ${BENCHMARKS:-gsm8k hendrycks_math humaneval mbpp mt_bench}; do
    case "$name" in
    gsm8k) score gsm8k ${GSM8K:+--data "$GSM8K"} "$@" ;;
    hendrycks_math) score hendrycks_math ${MATH:+--data "$MATH"} "$@" ;;
    humaneval) score humaneval ${HUMANEVAL:+--data "$HUMANEVAL"} "$@" ;;
    mbpp) score mbpp ${MBPP:+--data "$MBPP"} "$@" ;;
    mt_bench) mt_bench "$@" ;;
    *)
        say "BENCHMARKS: $name is none of gsm8k hendrycks_math humaneval mbpp mt_bench" >&2
        exit 2
        ;;
    esac
done
run python eval/report.py "$out" --output-dir "$out/report" --overwrite
