#!/usr/bin/env python3
"""Checks and measures everything that a CUDA GPU changes, on random weights: no network, no hub, no data.

How to run
    python bench/gpu.py                          the whole, at most ten minutes on an H100 or A100 (estimated, not run)
    python bench/gpu.py right                    the checks alone; right.objective: one of them
    python bench/gpu.py --device cpu --small     the same code on tiny shapes, on any machine; half a minute

It needs torch, transformers and safetensors. It uses further packages if they are installed, and names the others.

What comes out: a table for each part, a summary, and all of it as JSON with --output. A part that fails, dies or
outlives its time is named, and the others go on; the exit code is then 1.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import select
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Each part with the seconds that it may take on a GPU; the parts that measure stop by themselves before.
PARTS = {
    "right.objective": 40,
    "right.spectral": 20,
    "right.adapter": 10,
    "right.factors": 20,
    "right.step": 20,
    "right.packing": 20,
    "right.bf16": 40,
    "right.quantized": 40,
    "right.resume": 60,
    "fast.step": 170,
    "fast.objective": 40,
    "init": 40,
    "profile": 40,
    "counts": 20,
}


class Worker:
    """A process that runs parts, one after the other. It imports once. If it dies, one part is lost."""

    def __init__(self, args: argparse.Namespace):
        words = [sys.executable, __file__, "--serve", "--device", args.device, *(["--small"] if args.small else [])]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(words, env=environment, text=True, **pipes)

    def ask(self, request: str, budget: float) -> dict[str, Any]:
        """The answer, or why there is none: `budget` seconds are over, or the process ended. It is then unusable."""
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], budget)[0]:
            return {"problem": f"took longer than its {budget} s", "rows": []}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"problem": f"its process ended ({self.process.wait()})", "rows": []}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(args: argparse.Namespace) -> None:
    """The worker's side: it reads a line, the name of a part, and writes a line, its result. Prints go to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():  # before what takes longer to import
        problem = "no CUDA GPU here; --device cpu --small runs the same code on tiny shapes"
        answers.write(json.dumps({"problem": problem}) + "\n")
        answers.flush()
        return
    for name in map(str.strip, sys.stdin):
        answer = machine(args) if name == "machine" else run(name, PARTS[name], args)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run(name: str, budget: float, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of a part, and its problem: None, an exception, or the number of checks outside their limits.

    `is_over` False says that this process can go on: nothing was raised.
    """
    import gpu_cases
    import gpu_fast
    import gpu_right

    options = gpu_cases.Options(args.device, args.small)
    gpu_cases.free_memory(options)
    group, _, rest = name.partition(".")
    rows: list[dict] = []
    try:
        if group == "right":
            measured = getattr(gpu_right, rest)(options)
        else:
            measured = getattr(gpu_fast, rest or name)(options, time.monotonic() + 0.9 * budget)
        for row in measured:
            rows.append(row)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"problem": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", "rows": rows}
    wrong = sum(not row.get("ok", True) for row in rows)
    problem = f"{wrong} of {len(rows)} checks outside their limits" if wrong else None
    return {"problem": problem, "rows": rows, "is_over": False}


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Device, versions, missing packages, and the commit."""
    import gpu_cases
    import torch

    packages = importlib.metadata.packages_distributions()  # reads every package there is; by module its package
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", *gpu_cases.OPTIONAL):
        is_there = gpu_cases.installed(name)
        found[name] = importlib.metadata.version(packages.get(name, [name])[0]) if is_there else "not installed"
    device = platform.processor() or platform.machine()
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return {"device": device, "versions": found, "commit": commit, "text": f"{device}; {versions}; commit {commit}"}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of all columns that any row has; an empty cell for a missing value."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "ok"))
    cells = [columns, *([("" if row.get(c) is None else str(row[c])) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def run_parts(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Every part's rows, seconds and problem; a worker that failed is replaced, as CUDA may be dead in it."""
    result: dict[str, Any] = {"machine": None, "parts": {}}
    worker = None
    for name in names:
        if worker is None:
            worker = Worker(args)
            result["machine"] = worker.ask("machine", 300)
            if "problem" in result["machine"]:
                worker.stop()
                print(f"gpu.py: error: {result['machine']['problem']}", file=sys.stderr)
                sys.exit(2)
        started = time.monotonic()
        answer = worker.ask(name, PARTS[name] if args.device == "cuda" else 600)
        answer["seconds"] = round(time.monotonic() - started, 1)
        result["parts"][name] = answer
        print(f"\n{name}: {answer['problem'] or 'ok'} ({answer['seconds']} s)", flush=True)
        if answer["rows"]:
            print(table(answer["rows"]), flush=True)
        if answer.pop("is_over", True):
            worker.stop()
            worker = None
    if worker is not None:
        worker.stop()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}, or what some begin with; none: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--output", type=Path, help="a JSON file for everything that is printed")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return 0
    for part in args.parts:
        if not any(name == part or name.startswith(f"{part}.") for name in PARTS):
            parser.error(f"no part {part!r}: choose from {', '.join(PARTS)}")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        parser.error(f"no folder {args.output.absolute().parent} for --output")
    names = [
        name
        for name in PARTS
        if not args.parts or any(name == part or name.startswith(f"{part}.") for part in args.parts)
    ]
    started = time.monotonic()
    result = run_parts(names, args)
    result["seconds"] = round(time.monotonic() - started, 1)
    summary = [
        {"part": name, "s": part["seconds"], "": part["problem"] or "ok"} for name, part in result["parts"].items()
    ]
    print(f"\n{table(summary)}\n\n{result['machine']['text']}; {result['seconds']} s")
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"written: {args.output}")
    return int(any(part["problem"] for part in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
