#!/usr/bin/env python3
"""Chooses the setting of an arm that scores best on validation, the mean over the tuning seeds; of equals the smaller.

A curve over rates is flat near its best, so `within` says what counts as equal: the smallest value that is at most so
far from the best is taken.

    python experiments/choose.py output/NAME/plan.json output/NAME/chosen/ARM.yaml

The result is a configuration for --config: the setting, beside the arm's own configuration.
"""

import math
import statistics
from pathlib import Path
from typing import Any

import yaml

from common import runs
from common.cli import UserError, run_script
from common.runs import write_whole
from experiments import run_record
from experiments.entries import ROOT


def score_of(record: dict[str, Any], name: str) -> float:
    """A score by its name: BENCHMARK.SCORE, or `validation` of a run that selects itself.

    Raises:
        UserError: the run has no such score.
    """
    if name == "validation":
        found = next((value for key, value in (record["validation"] or {}).items() if key != "step"), None)
    else:
        benchmark, _, score = name.partition(".")
        found = runs.score_of(record, benchmark, score)
    if found is None:
        raise UserError(f"{record['run']} has no score {name!r} to choose by (it is {record['status']})")
    return float(found)


def curve(records: list[dict[str, Any]], option: str, score: str) -> dict[str, list[float]]:
    """The scores by value of the option, the smallest first."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["labels"][option], []).append(score_of(record, score))
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def best(scores: dict[str, list[float]], mode: str, within: float = 0.0) -> str:
    """The smallest value of those with a mean that is at most `within` from the best."""
    sign = -1 if mode == "min" else 1
    means = {value: sign * statistics.mean(found) for value, found in scores.items()}
    means = {value: mean if math.isfinite(mean) else -math.inf for value, mean in means.items()}  # it diverged
    return min((value for value, mean in means.items() if mean >= max(means.values()) - within), key=float)


def is_at_edge(value: str, scores: dict[str, list[float]]) -> bool:
    """Whether the value is the grid's smallest or largest: a wider grid may then have a better one."""
    return len(scores) > 2 and value in (min(scores, key=float), max(scores, key=float))


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("expected a plan.json and the file to write")
    plan, target = run_record.load_plan(Path(argv[0])), Path(argv[1])
    if argv[1] not in plan["choices"]:
        raise UserError(f"{argv[0]} chooses nothing for {argv[1]}")
    choice = plan["choices"][argv[1]]
    records = [run_record.write_record(plan, name) for name in choice["runs"]]
    scores = curve(records, choice["option"], choice["score"])
    value = best(scores, choice["mode"], choice["within"])
    entries = yaml.safe_load((ROOT / choice["config"]).read_text()) or {} if choice["config"] else {}
    entries[choice["option"].replace("-", "_")] = yaml.safe_load(value)
    lines = [f"# Chosen by {choice['score']}, the mean of {len(next(iter(scores.values())))} runs on validation:"]
    lines += [f"#   {option:>10}  {statistics.mean(found):.4f}" for option, found in scores.items()]
    if is_at_edge(value, scores):
        lines.append("# The best one is at the grid's edge: a wider grid may have a better one.")
        print(f"note: {target.stem}: {choice['option']} {value} is at the grid's edge")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, "\n".join(lines) + "\n" + yaml.safe_dump(entries, sort_keys=False))


if __name__ == "__main__":
    run_script(main)
