#!/usr/bin/env python3
"""One evaluation of the objective with its gradient: the materialised public formulation, and ours without logits.

    python bench/objective.py                   all shapes; the largest runs ours alone
    python bench/objective.py --shapes 511,49152,576

Each contender has a process of its own. Memory is the peak resident size beyond that of the process with the head and
the hidden states in it; the head's factor, computed once per model, is not timed.
"""

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

import contenders
import torch
from side_by_side import machine, ratios

import train

SHAPES = ["511,49152,576", "1022,49152,576", "512,32000,4096", "2048,256000,3072"]
PUBLIC_LIMIT = 2**27  # logits beyond which the public form does not fit beside its copies


def resident(kind: str) -> float:
    """This process's resident size in MiB: VmRSS now, VmHWM its peak since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 2**10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def worker(name: str, shape: tuple[int, int, int], repeats: int, connection) -> None:
    """Times one contender on one shape; sends the seconds of each repeat and the extra memory."""
    hidden, teacher, head, targets = contenders.objective_inputs(shape)
    num_tokens, width = hidden.shape
    # L itself needs V·d² operations once; any (d, d) matrix costs the same per evaluation.
    factor = torch.randn(width, width)
    hidden.requires_grad_()
    reset_peak()
    before = resident("VmRSS")

    def evaluate() -> None:
        hidden.grad = None
        if name == "ours":
            rest = (teacher, head, factor, targets, contenders.REGULARIZERS, num_tokens, 1)
            train.objective_from_hidden(hidden, *rest)[0].backward()
            return
        logits = (hidden @ head.T)[None]
        with torch.no_grad():
            teacher_logits = (teacher @ head.T)[None]
        mask = torch.ones(1, num_tokens)
        task = torch.nn.functional.cross_entropy(logits[0].float(), targets)
        (task + contenders.public_regularizers(logits, teacher_logits, mask)).backward()

    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        evaluate()
        seconds.append(time.perf_counter() - started)
    connection.send((seconds[1:] or seconds, resident("VmHWM") - before))


def measure(name: str, shape: tuple[int, int, int], repeats: int) -> tuple[list[float], float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(name, shape, repeats, theirs))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="M,V,D")
    parser.add_argument("--repeats", type=int, default=3, help="after one to warm up; 0: that one counts")
    args = parser.parse_args()
    print("| M | V | d | public s | ours s | times faster [min, max] | public MiB | ours MiB | share |")
    print("|---|---|---|---|---|---|---|---|---|")
    for text in args.shapes:
        shape = tuple(map(int, text.split(",")))
        ours, our_memory = measure("ours", shape, args.repeats)
        row = [*map(str, shape)]
        if shape[0] * shape[1] > PUBLIC_LIMIT:
            row += ["not run", f"{statistics.median(ours):.2f}", "", "not run", f"{our_memory:.0f}", ""]
        else:
            public, memory = measure("public", shape, args.repeats)
            row += [
                f"{statistics.median(public):.2f}",
                f"{statistics.median(ours):.2f}",
                ratios(public, ours, 1),
                f"{memory:.0f}",
                f"{our_memory:.0f}",
                f"{our_memory / memory:.2f}",
            ]
        print("| " + " | ".join(row) + " |", flush=True)
    print(f"\nMiB beyond weights and inputs; repeats after one to warm up: {args.repeats}. {machine()}")


if __name__ == "__main__":
    main()
