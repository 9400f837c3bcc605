#!/usr/bin/env python3
"""Whether two commits train the same: merged/ byte for byte, and the losses of metrics.jsonl to the last digit.

    git worktree add ../before COMMIT && python bench/same_numbers.py ../before

Runs this checkout's train.py and the other's with the same options on a tiny random model, in one process: the four
methods, both formulations, accumulation, validation with the best state, the teacher's cache, gradient checkpointing.
Prints one line per case. Exits with 1 if any case differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments import tiny_models

HERE = Path(__file__).resolve().parent.parent
SHARED = ["--max-steps", "6", "--batch-size", "2", "--rank", "4", "--logging-steps", "1", "--report-to", "none"]
SHARED += ["--learning-rate", "1e-3", "--save-steps", "2"]
CASES = {
    "ba-lora": [],
    "ba-lora, arxiv2024": ["--formulation", "arxiv2024"],
    "ba-lora, adaptive": ["--consistency-schedule", "adaptive", "--regularizer-schedule", "quadratic_warmup"],
    "lora": ["--method", "lora"],
    "lora with the terms": ["--method", "lora", "--regularize", "--gradient-accumulation", "1"],
    "pissa": ["--method", "pissa", "--max-grad-norm", "0"],
    "full": ["--method", "full", "--weight-decay", "0.1"],
    "padded": ["--no-packing"],
    "validation, best state": ["--eval-share", "0.2", "--eval-steps", "1", "--keep-best", "--learning-rate", "0.1"],
    "teacher cache": ["--teacher-cache", "CACHE", "--epochs", "2", "--max-steps", "-1"],
    "gradient checkpointing": ["--gradient-checkpointing", "--gradient-accumulation", "3"],
}
NUMBERS = ("loss", "grad_norm", "learning_rate", "task", "consistency", "diversity", "spectral", "eval_loss", "step")


def make_inputs(folder: Path) -> list[str]:
    """A tiny Llama that reads bytes, and 30 examples."""
    tiny_models.make("tiny-llama", folder / "base")
    rows = ({"instruction": f"Add {i} and 1", "output": f"The sum is {i + 1}{'!' * (i % 7)}"} for i in range(30))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", str(folder / "base"), "--data", str(folder / "data.jsonl"), *SHARED]


def trained(checkout: Path, options: list[str], folder: Path) -> tuple[bytes, list[dict[str, float]]]:
    """merged/'s weights and the numbers of the log."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = [str(folder / "cache") if word == "CACHE" else word for word in options]
    command = [sys.executable, str(checkout / "train.py"), *options, "--output-dir", str(folder / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = [
        {name: line[name] for name in NUMBERS if name in line} for line in lines if {"loss", "eval_loss"} & line.keys()
    ]
    return (folder / "run" / "merged" / "model.safetensors").read_bytes(), numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the other commit")
    parser.add_argument("cases", nargs="*", help="which ones; none: all")
    args = parser.parse_args()
    differing = 0
    with tempfile.TemporaryDirectory() as name:
        shared = make_inputs(Path(name))
        for number, (title, options) in enumerate(CASES.items()):
            if args.cases and title not in args.cases:
                continue
            runs = []
            for side, checkout in (("theirs", args.other.resolve()), ("ours", HERE)):
                folder = Path(name) / f"{number}-{side}"
                folder.mkdir()
                runs.append(trained(checkout, [*shared, *options], folder))
            (weights, numbers), (our_weights, our_numbers) = runs
            same = weights == our_weights, numbers == our_numbers
            differing += not all(same)
            print(
                f"{title:24} merged {'same bytes' if same[0] else 'DIFFERS'}, log {'same' if same[1] else 'DIFFERS'}",
                flush=True,
            )
            if not same[1]:
                print(
                    next(pair for pair in zip(numbers, our_numbers, strict=False) if pair[0] != pair[1]),
                    len(numbers),
                    len(our_numbers),
                )
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
