"""The common parts of the benchmarks that compare a step: options, the allocator's settings, the table of ratios.

Nothing heavy is imported here: a contender's process has its own peak memory, and begins with this file.
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path


def step_parser(description: str, steps: int, contenders: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """The options of a benchmark on batches of real text."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="causal language model (default: the embedded SmolLM2-135M)")
    parser.add_argument("--data", default="demo", help="real text of uneven lengths")
    parser.add_argument("--fields", nargs=2, default=["question", "response"])
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--steps", type=int, default=steps, help="timed steps; one more warms up where steps take turns"
    )
    if contenders is not None:
        parser.add_argument("--only", nargs="+", choices=contenders, default=list(contenders))
    return parser


def allocator_settings() -> str:
    """The GLIBC_TUNABLES that scripts/setup.sh gives to training on a CPU."""
    text = (Path(__file__).resolve().parent.parent / "scripts" / "setup.sh").read_text()
    return next(line.partition("=")[2] for line in text.splitlines() if line.startswith("cpu_allocator="))


def ratios(numerators: Sequence[float], denominators: Sequence[float], digits: int = 2) -> str:
    """The median of the ratios turn by turn, with the smallest and the largest."""
    found = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return f"{statistics.median(found):.{digits}f} [{min(found):.{digits}f}, {max(found):.{digits}f}]"


def print_table(title: str, labels: dict[str, str], seconds: dict[str, list[float]], memory: dict[str, float]) -> None:
    """Every contender's median seconds and peak memory in GiB, each with its ratio to the first contender's."""
    reference = next(iter(seconds))
    print(f"| {title} | ratio to {reference} [min, max] | peak GiB | ratio |")
    print("|---|---|---|---|---|")
    for name, own in seconds.items():
        share = memory[name] / memory[reference]
        cells = [labels[name], f"{statistics.median(own):.2f}", ratios(own, seconds[reference])]
        print(f"| {' | '.join(cells)} | {memory[name]:.2f} | {share:.2f} |")


def machine() -> str:
    """Processor, threads and versions, for the line under a table."""
    import torch

    from common.runs import package_versions

    versions = package_versions() | {"peft": version("peft")}
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = next((value.strip() for name, _, value in lines if name.startswith("model name")), "unknown processor")
    names = ("python", "torch", "transformers", "peft")
    return f"{cpu}, {torch.get_num_threads()} threads; " + ", ".join(f"{name} {versions[name]}" for name in names)
