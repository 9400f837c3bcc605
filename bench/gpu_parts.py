"""How bench/gpu.py's worker runs a part: by name, without letting what goes wrong out."""

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
import traceback
from typing import Any

import gpu_cases as cases
import gpu_counts
import gpu_fast
import gpu_right
import torch
from gpu_cases import Options

MEASURED = {"init": gpu_fast.init, "profile": gpu_fast.profile, "counts": gpu_counts.counts}


def run(name: str, budget: float, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of a part, and its problem: None, what it raised, or how many checks are outside their limits.

    `is_over` False says that this process can go on: nothing was raised.
    """
    options = Options(args.device, args.small)
    cases.free_memory(options)
    group, _, rest = name.partition(".")
    rows: list[dict] = []
    try:
        if group == "right":
            rows = getattr(gpu_right, rest)(options)
        else:
            for row in (MEASURED.get(name) or getattr(gpu_fast, rest))(options, time.monotonic() + 0.9 * budget):
                rows.append(row)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"problem": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", "rows": rows}
    wrong = sum(not row.get("ok", True) for row in rows)
    problem = f"{wrong} of {len(rows)} checks outside their limits" if wrong else None
    return {"problem": problem, "rows": rows, "is_over": False}


def version(name: str, packages: dict[str, list[str]]) -> str:
    """A module's, of the package that brings it; `packages` names them by module."""
    if not cases.installed(name):
        return "not installed"
    return importlib.metadata.version(packages.get(name, [name])[0])


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Device, versions, what is not installed, and the commit."""
    names = ("torch", "transformers", "safetensors", *cases.OPTIONAL)
    packages = importlib.metadata.packages_distributions()  # reads every package there is
    found = {"python": platform.python_version()} | {name: version(name, packages) for name in names}
    device = platform.processor() or platform.machine()
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    words = ["git", "-C", str(cases.ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return {"device": device, "versions": found, "commit": commit, "text": f"{device}; {versions}; commit {commit}"}
