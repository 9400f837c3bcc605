"""What the benchmarks share: where results go, and how sure a number is."""

import json
import math
from pathlib import Path
from typing import Any

from train import UserError

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (E. B. Wilson, JASA 22, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    denominator = 1 + Z_95**2 / trials
    centre = (p + Z_95**2 / (2 * trials)) / denominator
    half = Z_95 / denominator * math.sqrt(p * (1 - p) / trials + Z_95**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(successes: int, trials: int) -> dict[str, Any]:
    """A share with its count and its interval, as every summary states it."""
    return {
        "value": successes / trials if trials else None,
        "count": successes,
        "of": trials,
        "interval_95": wilson_interval(successes, trials),
    }


def claim_outputs(output_dir: str, benchmark: str, overwrite: bool) -> tuple[Path, Path]:
    """The item file (JSONL) and the summary (JSON) of a benchmark.

    Raises:
        UserError: one of them is there already and `overwrite` is not set.
    """
    folder = Path(output_dir)
    items, summary = folder / f"{benchmark}.jsonl", folder / f"{benchmark}.json"
    for path in (items, summary):
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already: name another --output-dir, or replace it with --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output-dir {folder}: {error.strerror}") from error
    return items, summary


def write_results(items_path: Path, items: list[dict], summary_path: Path, summary: dict) -> None:
    """Writes one line per item, then the summary: a summary that is there belongs to a whole item file."""
    with open(items_path, "w") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    summary_path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
