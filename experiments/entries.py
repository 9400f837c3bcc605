"""An experiment's file, read and merged with the one that it is like.

An experiment is a file experiments/NAME.yaml that holds only the differences from the scripts' defaults:

    about: one sentence
    like: nlg                        starts from that experiment; what follows replaces or adds to it (null takes away)
    script: train.py                 or finetune_bert_l_sst2.py
    settings: {rank: 128}            options of that script, for every run
    axes:                            every combination of these is a run, named after its labels
      seed: [42, 43]                 values of an option
      method:                        or labels, with what each of them sets
        pissa-k1: {method: pissa, spectral-k: 1}
    sequences-per-step: 128          the gradient accumulation follows from it
    processes: 8                     devices that one run takes; more than one start through torchrun
    needs-gpu: true                  refuses to start where there is none
    benchmarks: [gsm8k, mbpp]        eval/suite.py on the merged model, with one engine for all of them
    evaluation: {backend: vllm}      options of eval/suite.py
    benchmarks: {gsm8k: {limit: 9}}  instead of the two: eval/NAME.py each, with options of its own
    forgetting: {}                   eval/forgetting.py on it, with these options
    tune: {...}                      a rate per arm, chosen on validation: see `tuning_runs`
    files: {NAME: COMMAND}           made before the runs that name {files}/NAME; {file} is where it goes
    keep-merged: false               merged models are removed after they are scored; --export-from makes them again
    report: {...}                    what experiments/report.py compares

A label may also set sequences-per-step, processes, benchmarks, evaluation, tune, and `row`, its name in the report.
Text may name an axis' label: "{files}/noise-{seed}.jsonl".
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from common import cli
from common.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
ENTRIES = {"about", "like", "script", "settings", "axes", "files", "report", "needs-gpu", "keep-merged"}
OF_A_LABEL = {"sequences-per-step", "processes", "benchmarks", "evaluation", "forgetting", "tune", "row"}
REPORT_ENTRIES = {"published", "baseline", "curve", "effects", "scores"}
TUNE_ENTRIES = {"seed", "score", "mode", "within", "per", "at", "evaluation", "benchmarks"}


def names() -> list[str]:
    """All experiments."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' where one of `known` is near."""
    near = cli.nearest(str(word), known)
    return f"; did you mean {near!r}?" if near else ""


def read_yaml(path: Path | str, what: str = "") -> Any:
    """A YAML file's content; `what` says in a message which file it is. Raises a UserError where it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {what}{path}: {' '.join(str(error).split())}") from error


def load(name: str) -> dict[str, Any]:
    """The experiment's entries, those of the one that it is `like` among them.

    Raises:
        UserError: no such experiment, not YAML, or an entry that is not known.
    """
    path = Path(name) if name.endswith(".yaml") else EXPERIMENTS / f"{name}.yaml"
    if name != "-" and not path.is_file():
        known = nearest(name, names()) or f": one of {', '.join(names())}"
        raise UserError(f"no experiment {name!r}{known}")
    entries = read_yaml("/dev/stdin" if name == "-" else path)
    if not isinstance(entries, dict):
        raise UserError(f"{path} is no experiment: expected entries such as 'about:' and 'axes:'")
    for key in entries:
        if key not in ENTRIES | OF_A_LABEL - {"row"}:
            raise UserError(f"{path}: unknown entry {key!r}{nearest(key, ENTRIES | OF_A_LABEL)}")
    for key in ("settings", "axes", "evaluation", "forgetting", "tune", "files", "report"):
        if not isinstance(entries.get(key) or {}, dict):
            raise UserError(f"{path}: {key!r} takes entries of its own, not {entries[key]!r}")
    for key, known in (("report", REPORT_ENTRIES), ("tune", TUNE_ENTRIES)):
        for entry in entries.get(key) or {}:
            if entry not in known and not (key == "tune" and isinstance(entries[key][entry], list)):
                raise UserError(f"{path}: unknown entry {entry!r} in {key!r}{nearest(entry, known)}")
    like = entries.pop("like", [])
    base: dict[str, Any] = {}
    for other in [like] if isinstance(like, str) else like:
        base = merged(base, load(other))
    return merged(base, entries) if base else entries


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` on top, entry by entry; axes are replaced whole, null takes an entry away."""
    result = dict(base)
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        elif key == "axes":
            result[key] = {axis: found for axis, found in {**base.get(key, {}), **value}.items() if found is not None}
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            result[key] = merged(base[key], value)
        else:
            result[key] = value
    return result
