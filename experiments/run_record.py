#!/usr/bin/env python3
"""One JSON per run: its settings and versions, its time and memory, and its scores.

    python experiments/run_record.py output/NAME/plan.json [RUN...]     writes output/NAME/records/RUN.json; all runs

common/runs.py describes the format, and reads it.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from common.cli import UserError, run_script
from common.runs import VERSION, read_json, write_whole

# Keys of a summary that are no scores.
NOT_A_SCORE = {"arguments", "versions", "command", "ckpt", "adapter", "made_with", "checkpoint", "benchmark", "seconds"}
NOT_A_SCORE |= {"by_subject", "by_level", "backend", "rescored", "judge"}
GROUPS = {"before", "by_type", "flips"}  # of scores: by_type.age.change is one

INTERRUPTED = (129, 130, 137, 138, 143)  # exit codes of SIGHUP, SIGINT, SIGKILL, SIGUSR1 and SIGTERM


def load_plan(path: Path) -> dict[str, Any]:
    """The plan that experiments/grid.py wrote."""
    plan = read_json(path)
    if not isinstance(plan, dict) or "runs" not in plan:
        raise UserError(f"{path} is no plan: python experiments/grid.py NAME --plan {path} writes it")
    if plan.get("version") != 1:
        raise UserError(f"{path} has version {plan.get('version')} of the format, not 1: start the experiment again")
    return plan


# ------------------------------------------------------------------------------------------------------------------
# Making
# ------------------------------------------------------------------------------------------------------------------


def scores_of(summary: dict[str, Any], in_group: bool = False) -> dict[str, Any]:
    """The scores in a benchmark's file, without its settings."""
    found = {}
    for name, value in summary.items():
        is_share = isinstance(value, dict) and "value" in value
        if isinstance(value, dict) and not is_share and (in_group or name in GROUPS):
            found |= {f"{name}.{part}": score for part, score in scores_of(value, in_group=True).items()}
        elif name not in NOT_A_SCORE and (is_share or isinstance(value, (int, float))):
            found[name] = {key: value.get(key) for key in ("value", "of", "interval_95")} if is_share else value
    return found


def classification_scores(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of every evaluation set: the trained model's metrics, each class' accuracy and the calibration error."""
    method = summary["arguments"]["method"]
    found = {}
    for name, results in summary["results"].items():
        scores = scores_of(results[method])
        for label, share in (results[method].get("class_accuracy") or {}).items():
            scores[f"class_accuracy.{label}"] = {key: share.get(key) for key in ("value", "of", "interval_95")}
        found[name] = scores
    return found


def failure(plan: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The step that failed, with its exit code and the last line of its log; None where none did."""
    run = plan["runs"][name]
    for step in ("train", "merge", *run["measure"]):
        path = Path(plan["folder"], "logs", f"{name}.{step}.log")
        if not path.is_file() or Path(run["folder"], f".{step}.done").exists():
            continue
        lines = [line.strip() for line in path.read_text(errors="replace").replace("\r", "\n").splitlines()]
        *before, last = [line for line in lines if line] or [""]
        code = last.removeprefix("exit code ")
        if code.isdigit() and int(code) not in INTERRUPTED:
            return {"step": step, "code": int(code), "message": before[-1][-500:] if before else ""}
    return None


def record_of(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """The record of a run, whatever state it is in.

    Raises:
        UserError: one of its files is damaged.
    """
    run = plan["runs"][name]
    folder = Path(run["folder"])
    made, results = read_json(folder / "run.json") or {}, read_json(folder / "results.json") or {}
    settings = run["settings"]
    if (folder / "config.yaml").is_file():
        settings = yaml.safe_load((folder / "config.yaml").read_text())
    scores, missing, seconds = {}, [], {}
    if results:
        scores = classification_scores(results)
    for benchmark in run["expected"]:
        summary = read_json(Path(run["results"], f"{benchmark}.json"))
        if summary is None:
            missing.append(benchmark)
        else:
            scores[benchmark] = scores_of(summary)
            seconds[benchmark] = summary.get("seconds")
    error = failure(plan, name)
    is_done = bool(made or results) and not missing and error is None
    processes = made.get("processes") or (1 if results else None)
    chooses = next((choice for choice in plan["choices"].values() if name in choice["runs"]), {})
    return {
        "version": VERSION,
        "experiment": plan["experiment"],
        "run": name,
        "arm": run["arm"],
        "phase": run["phase"],
        "labels": run["labels"],
        "chooses": {key: chooses[key] for key in ("option", "score", "mode", "within")} if chooses else None,
        "status": "done" if is_done else "failed" if error else "unfinished",
        "error": error,
        "script": run["script"],
        "settings": settings,
        "seed": made.get("seed", settings.get("seed")),
        "versions": made.get("versions") or results.get("versions"),
        "commit": made.get("commit") or results.get("commit"),
        "hardware": {"device": made.get("device") or results.get("device"), "processes": processes},
        "time": {"train_seconds": made.get("train_seconds"), "seconds": results.get("seconds"), **seconds},
        "memory": {"peak_gib": made.get("peak_memory_gib") or results.get("peak_memory_gib")},
        "parameters": {
            "trainable": made.get("trainable_parameters") or results.get("adapter_parameters"),
            "total": made.get("total_parameters"),
        },
        "steps": made.get("steps") or results.get("steps"),
        "scores": scores,
        "validation": results.get("validation"),
    }


def write_record(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """Writes the record of a run and returns it."""
    path = Path(plan["folder"], "records", f"{name}.json")
    record = record_of(plan, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2, sort_keys=True) + "\n")
    return record


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UserError("expected a plan.json, and names of runs or none for all of them")
    plan = load_plan(Path(argv[0]))
    for name in argv[1:] or plan["runs"]:
        if name not in plan["runs"]:
            raise UserError(f"{argv[0]} has no run {name!r}")
        record = write_record(plan, name)
        if record["status"] != "done":
            why = f" at {record['error']['step']}: {record['error']['message']}" if record["error"] else ""
            print(f"{name}: {record['status']}{why}")


if __name__ == "__main__":
    run_script(main)
