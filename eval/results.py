"""Results as they lie on disk, read and held: of the eval scripts, of finetune_bert_l_sst2.py, and records of runs."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.cli import UserError
from common.runs import NOT_IDENTITY, conditions, holds_records, records_in
from eval.benchmark import NOT_DECIDING, full_name, read_failures, state_of


@dataclass(frozen=True)
class Column:
    """A benchmark of the published table."""

    label: str
    score: str = "accuracy"  # the score's name in the summary
    items: int = 0  # how many items the whole benchmark has
    scale: float = 100.0
    form: str = "{:.2f}"


NLG = {
    "gsm8k": Column("GSM8K", "accuracy_strict", items=1319),
    "hendrycks_math": Column("MATH", "accuracy_strict", items=5000),
    "humaneval": Column("HumanEval", "pass@1", items=164),
    "mbpp": Column("MBPP", "pass@1", items=500),
    "mt_bench": Column("MT-Bench", "first_turn", items=80, scale=1.0),
}
NLU = {  # on the development sets; MNLI's is the matched one
    "mnli": Column("MNLI", items=9815),
    "sst2": Column("SST-2", items=872),
    "mrpc": Column("MRPC", items=408),
    "cola": Column("CoLA", "matthews", items=1043),
    "qnli": Column("QNLI", items=5463),
    "qqp": Column("QQP", items=40430),
    "rte": Column("RTE", items=277),
    "stsb": Column("STS-B", "pearson", items=1500),
}
# Forgetting is measured beside the benchmarks. It has no published numbers, and averages leave it out.
BESIDE = {"forgetting": Column("forgetting, nats", "forgetting", scale=1.0, form="{:+.3f}")}
# Of every term its loss and its weight.
TERMS = {"consistency": ("L_CR", "λ₁"), "diversity": ("L_DR", "λ₂"), "spectral": ("L_SVDR", "λ₃")}
METHODS = {"full": "Full FT", "lora": "LoRA", "pissa": "PiSSA", "ba-lora": "BA-LoRA"}


@dataclass
class ReportedRun:
    """The results in one folder: one method with one seed.

    Attributes:
        folder, name: as given; the name is its row's, or None.
        model, method: the model that was started from, and the row's name if none was given.
        params: trained parameters, as text.
        settings: the arguments that decide its result, the seed among them; empty if they are not known.
        columns: the benchmarks of its table.
        summaries: the measurements, by benchmark; each has an entry named `Column.score`.
        failures: the errors of benchmarks that failed, by benchmark.
        metrics: the training's metrics.jsonl, if it exists.
        conditions: see common/runs.py.
    """

    folder: str
    name: str | None
    model: str
    method: str
    params: str
    settings: dict[str, Any]
    columns: dict[str, Column]
    summaries: dict[str, dict]
    metrics: Path | None
    failures: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)


def load_runs(folder: str, name: str | None) -> list[ReportedRun]:
    """The run of a results folder of either kind, or all runs of a folder of records except those that chose a rate.

    Raises:
        UserError: there are no results in it, or they cannot be read.
    """
    if not holds_records(Path(folder)):
        return [load_run(folder, name)]
    records = {run: record for run, record in records_in(Path(folder)).items() if record["phase"] == "study"}
    without = [f"{run} ({record['status']})" for run, record in records.items() if not record["scores"]]
    if len(without) == len(records):
        raise UserError(f"no run has a score in the records of {folder}")
    if without:
        print(f"note: {len(without)} of {len(records)} runs in {folder} have no score: {', '.join(without)}\n")
    return [_recorded_run(record, f"{folder}/{run}", name) for run, record in records.items() if record["scores"]]


def load_run(folder: str, name: str | None) -> ReportedRun:
    """The run of a results folder of either kind; raises as `load_runs`."""
    if (Path(folder) / "results.json").is_file():
        return _classification_run(folder, name)
    summaries = load_summaries(folder)
    made, model, method, params, settings = training_folder(folder, summaries), None, Path(folder).name, "", {}
    written = {}
    if made is not None:
        settings = yaml.safe_load((made / "config.yaml").read_text())
        model, method = settings["model"], METHODS.get(settings["method"], settings["method"])
        if (made / "run.json").is_file():
            written = json.loads((made / "run.json").read_text())
            params = _millions(written["trainable_parameters"])
    if model is None:
        model = str(next(iter(summaries.values())).get("ckpt"))
    metrics = made / "metrics.jsonl" if made else None
    failures = {name: failure["error"] for name, failure in read_failures(folder).items() if name not in summaries}
    known = (deciding(settings), NLG, summaries, metrics, failures, conditions(written, settings))
    return ReportedRun(folder, name, model, method, params, *known)


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run that decide its result."""
    return {name: value for name, value in settings.items() if name not in NOT_IDENTITY}


# Axes of an experiment with labels that name a table, not one of its rows.
NO_ROWS = {"seed", "model", "data", "task"}


def _recorded_run(record: dict[str, Any], path: str, name: str | None) -> ReportedRun:
    """A run from its record. Its row is named after its place on the experiment's axes, most often the method."""
    settings, scores = record["settings"], record["scores"]
    label = "-".join(label for axis, label in record["labels"].items() if axis not in NO_ROWS) or settings["method"]
    columns, model = NLG, settings["model"]
    if record["script"] != "train.py":
        columns, model, scores = _classified(settings, scores)
    known = {benchmark: found for benchmark, found in scores.items() if benchmark in columns | BESIDE}
    params = record["parameters"]["trainable"]
    error = record["error"] or {}
    failures = {error["step"]: error["message"]} if error else {}
    params = _millions(params) if params else ""
    rest = (deciding(settings), columns, known, None, failures, conditions(record, settings))
    return ReportedRun(path, name, model, METHODS.get(label, label), params, *rest)


def _classified(args: dict[str, Any], scores: dict[str, dict]) -> tuple[dict[str, Column], str, dict[str, dict]]:
    """Columns, model and scores of a classification: a task of GLUE, or one's own test sets, a column each.

    Args:
        scores: by test set.
    """
    if args["task"] is not None and (args["data"] is None or len(scores) == 1):
        return NLU, args["model"], {args["task"]: next(iter(scores.values()))}
    score = NLU[args["task"]].score if args["task"] else "accuracy"
    return {test: Column(test, score) for test in scores}, f"{args['model']} on {args['data']}", scores


def _classification_run(folder: str, name: str | None) -> ReportedRun:
    """A run of finetune_bert_l_sst2.py."""
    path = Path(folder) / "results.json"
    try:
        content = json.loads(path.read_text())
        args = content["arguments"]
        method = args["method"]
        columns, model, scores = _classified(
            args, {test: result[method] for test, result in content["results"].items()}
        )
        for benchmark, found in scores.items():
            found[columns[benchmark].score]["value"]
        params = _millions(content["adapter_parameters"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{path} is damaged: run finetune_bert_l_sst2.py again with --overwrite") from error
    metrics = path.parent / "metrics.jsonl"
    method = METHODS.get(method, method)
    metrics = metrics if metrics.is_file() else None
    rest = (deciding(args), columns, scores, metrics, {}, conditions(content, args))
    return ReportedRun(folder, name, model, method, params, *rest)


def load_summaries(folder: str) -> dict[str, dict]:
    """The eval scripts' summaries in `folder` by benchmark.

    Raises:
        UserError: there is no summary, or one cannot be read.
    """
    summaries = {}
    for name, column in (NLG | BESIDE).items():
        path = Path(folder) / f"{name}.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text())
                is_older = "accuracy" in found and column.score not in found
                found[column.score if not is_older else "accuracy"]["value"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged: run eval/{name}.py again with --overwrite") from error
            if is_older:
                raise UserError(
                    f"{path} is older than this script and lacks {column.score}: python eval/{name}.py "
                    f"--rescore {path.with_suffix('.jsonl')} --output-dir {folder} --overwrite"
                )
            summaries[name] = found
    if not summaries:
        for name, failure in read_failures(folder).items():
            raise UserError(f"no results in {folder}: {name} failed: {failure['error']}")
        names = ", ".join(f"{name}.json" for name in NLG | BESIDE)
        raise UserError(
            f"no results in {folder}: it has none of {names}, nor results.json; run eval/gsm8k.py or a sibling first"
        )
    for what in ("ckpt", "adapter", "checkpoint"):
        found = {name: full_name(summary.get(what)) for name, summary in summaries.items()}
        if what == "checkpoint":  # unknown on the hub and in older results; forgetting's is of the base too
            found = {name: value for name, value in found.items() if value is not None and name not in BESIDE}
        if len(set(found.values())) > 1:
            values = ", ".join(f"{value} ({name})" for name, value in found.items())
            raise UserError(f"{folder} mixes results of several checkpoints: {what} is {values}")
    return summaries


def scoring(summary: dict[str, Any]) -> dict[str, Any]:
    """The settings of a summary's scoring that decide its result, without those of the checkpoint."""
    arguments = summary.get("arguments") or {}
    return {name: value for name, value in arguments.items() if name not in {"ckpt", "adapter", *NOT_DECIDING}}


def training_folder(folder: str, summaries: dict[str, dict]) -> Path | None:
    """The output folder of train.py that holds the scored checkpoint or adapter, if there is one. Prints a note, and
    returns None, if the weights there are no longer those that were scored."""
    found = None
    for summary in summaries.values():
        scored = Path(summary.get("adapter") or summary.get("ckpt") or ".")
        if not all((scored.parent / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            continue
        arguments = summary.get("arguments") or {}
        now = state_of(*(arguments.get(name) for name in ("base", "ckpt", "adapter")))
        if None not in (now, summary.get("checkpoint")) and now != summary["checkpoint"]:
            print(f"note: {folder} was scored on other weights than {scored} has now: its row is the folder's name\n")
            return None
        found = found or scored.parent
    return found


def _millions(count: int) -> str:
    return f"{count / 1e6:.{1 if count >= 10e6 else 2}f}M"
