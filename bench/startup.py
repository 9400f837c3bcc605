#!/usr/bin/env python3
"""How long a user waits for a script that has nothing to compute: --help, a mistyped option, the published tables.

How to run
    python bench/startup.py                 two minutes on two idle cores, most of it for the two training scripts

What comes out: a table on the terminal, in seconds of wall-clock time from a command to its end.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPETITIONS = 5
EVALUATIONS = ("gsm8k", "hendrycks_math", "humaneval", "mbpp", "mt_bench", "suite", "forgetting", "crows_pairs")
# Each with the exit code that it must have.
COMMANDS = [
    *((f"eval/{name}.py --help", 0) for name in (*EVALUATIONS, "report")),
    ("eval/report.py", 0),
    ("eval/gsm8k.py --ckptt demo", 2),
    ("eval/report.py --output-dri report", 2),
    ("train.py --help", 0),
    ("finetune_bert_l_sst2.py --help", 0),
]


def seconds(command: str, code: int) -> float:
    """The time of one run. Its output is discarded.

    Raises:
        RuntimeError: it ends with another exit code.
    """
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    taken = time.perf_counter() - started
    if finished.returncode != code:
        raise RuntimeError(f"{command} ended with {finished.returncode}, not {code}: {finished.stderr[-500:]}")
    return taken


def main() -> None:
    print(f"{'python ...':40}{'median':>8}{'min':>8}{'max':>8}   seconds, of {REPETITIONS} runs")
    for command, code in COMMANDS:
        seconds(command, code)  # After this its files are in memory.
        times = [seconds(command, code) for _ in range(REPETITIONS)]
        print(f"{command:40}{statistics.median(times):8.2f}{min(times):8.2f}{max(times):8.2f}", flush=True)


if __name__ == "__main__":
    main()
