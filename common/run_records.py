"""Reads run records: one JSON file per run, with its settings, costs and results.

Format, version 1. A value that is not known is null.

    version         1; a file of another version is refused
    experiment, run, arm, phase         names; phase is "study", or "tuning" for a run that only chooses a rate
    labels          the run's place on each axis of its experiment
    chooses         of a tuning run: {"option", "score", "mode", "within"}: the option that it chooses, and the score
                    that decides; mode is "max" or "min", and scores `within` this of the best count as equal
    status          "done"; "failed": a step ended with an error; "unfinished": a step has not run, or was interrupted
    error           of a failed run: {"step": ..., "code": its exit code, "message": the last line that it wrote}
    script, settings                    train.py or finetune_bert_l_sst2.py, with every argument as it was used
    seed            of the training
    versions, commit                    of the packages, and of this repository when the training started, with + if
                                        files were changed; before November 2026: the commit of the recording
    hardware        {"device", "processes"}
    time            {"train_seconds", "seconds"}: in training alone, and of a classification's whole run; by benchmark
    memory          {"peak_gib"} of the fullest process
    parameters      {"trainable", "total"}
    steps           of the optimizer
    scores          by benchmark, by name of the score: {"value", "of": how many items, "interval_95"}, or a number
    validation      the score that the run selected its state by, if it did
"""

import json
from pathlib import Path
from typing import Any

from common.cli import UserError

VERSION = 1


def read_json(path: Path) -> Any:
    """A JSON file's content, or None where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def score_of(record: dict[str, Any], benchmark: str, name: str) -> float | None:
    """A score's value, None where the run has none."""
    found = (record["scores"].get(benchmark) or {}).get(name)
    return found.get("value") if isinstance(found, dict) else found


def is_record(content: Any) -> bool:
    return isinstance(content, dict) and {"version", "run", "scores"} <= set(content)


def holds_records(folder: Path) -> bool:
    """Whether the folder's first JSON file is a record of any version."""
    try:
        return is_record(read_json(min(folder.glob("*.json"))))
    except (UserError, ValueError):
        return False


def load_record(path: Path) -> dict[str, Any]:
    """A record of this version.

    Raises:
        UserError: no such file, or a file of another kind or version.
    """
    found = read_json(path)
    if not is_record(found):
        raise UserError(f"{path} is no record of a run: experiments/run_record.py writes such files")
    if found["version"] != VERSION:
        raise UserError(
            f"{path} has version {found['version']} of the format and this script reads {VERSION}: take the script of "
            "its commit, or write the record again with experiments/run_record.py"
        )
    return found


def records_in(folder: Path) -> dict[str, dict[str, Any]]:
    """All records in a folder, by run."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UserError(f"no records of runs in {folder}: experiments/run_record.py writes them")
    return {path.stem: load_record(path) for path in paths}
