#!/usr/bin/env python3
"""Puts the results of several checkpoints into one table.

python eval/report.py results/base results/ba-lora        folders that an eval script wrote its summary into
"""

import argparse
import json
from pathlib import Path

from generation import UserError  # first: it makes train.py importable

from train import run_script

COLUMNS = ("model", "problems", "accuracy, 95 % interval", "last number", "answer extracted", "response loss")


def load_summary(folder: str) -> dict:
    """The gsm8k.json in `folder`."""
    path = Path(folder) / "gsm8k.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"no results in {folder}: {path} cannot be read; run eval/gsm8k.py first") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: run eval/gsm8k.py again with --overwrite") from error


def table(summaries: dict[str, dict]) -> str:
    """A Markdown table with one row per checkpoint."""
    rows = [COLUMNS]
    for name, summary in summaries.items():
        accuracy, loss = summary["accuracy"], summary["response_loss"]
        low, high = accuracy["interval_95"]
        rows.append(
            (
                name,
                str(accuracy["of"]),
                f"{accuracy['value']:.1%} [{low:.1%}, {high:.1%}]",
                f"{summary['accuracy_lenient']['value']:.1%}",
                f"{summary['answer_extracted']['value']:.1%}",
                "not measured" if loss is None else f"{loss:.3f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def verdict(base: dict, tuned: dict) -> str:
    """One line: whether the two accuracies' intervals are apart."""
    (base_low, base_high), (low, high) = base["accuracy"]["interval_95"], tuned["accuracy"]["interval_95"]
    if low > base_high:
        return "The accuracy intervals do not overlap: fine-tuning helped."
    if high < base_low:
        return "The accuracy intervals do not overlap: fine-tuning hurt."
    return "The accuracy intervals overlap: no difference is shown."


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="FOLDER", help="folders with a gsm8k.json, the base model first")
    folders = parser.parse_args(argv).results
    summaries = {Path(folder).name: load_summary(folder) for folder in folders}
    print(table(summaries))
    if len(summaries) == 2:
        print("\n" + verdict(*summaries.values()))


if __name__ == "__main__":
    run_script(main)
