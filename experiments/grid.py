#!/usr/bin/env python3
"""Expands an experiment into its runs, checks them, and prints every command and the price. It runs nothing.

An experiment is a file experiments/NAME.yaml that holds only what differs from the scripts' defaults:

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

How to run
    python experiments/grid.py                        lists the experiments
    python experiments/grid.py nlg                    commands and price
    python experiments/grid.py nlg --axis seed=1,2 --axis method=lora --output-dir output/two-seeds
    sh scripts/experiment.sh nlg                      runs it
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import itertools
import json
import re
import shlex
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.cli import UserError, parse_arguments, run_script

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
SCRIPTS = ("train.py", "finetune_bert_l_sst2.py")
BENCHMARKS = ("gsm8k", "hendrycks_math", "humaneval", "mbpp", "mt_bench")
ENTRIES = {"about", "like", "script", "settings", "axes", "files", "report", "needs-gpu", "keep-merged"}
OF_A_LABEL = {"sequences-per-step", "processes", "benchmarks", "evaluation", "forgetting", "tune", "row"}
REPORT_ENTRIES = {"published", "baseline", "curve", "effects", "scores"}
TUNE_ENTRIES = {"seed", "score", "mode", "per", "at", "evaluation", "benchmarks"}
# Axes whose labels say all by themselves; of others the axis' name stands before a value: rank8.
PLAIN_AXES = {"method", "seed", "task", "model", "data", "arm"}
PLAN_VERSION = 1


# ------------------------------------------------------------------------------------------------------------------
# Reading an experiment
# ------------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """All experiments."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """'; did you mean ...?' where one of `known` is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def load(name: str) -> dict[str, Any]:
    """The experiment's entries, those of the one that it is `like` among them.

    Raises:
        UserError: no such experiment, not YAML, or an entry that is not known.
    """
    path = Path(name) if name.endswith(".yaml") else EXPERIMENTS / f"{name}.yaml"
    if name != "-" and not path.is_file():
        known = nearest(name, names()) or f": one of {', '.join(names())}"
        raise UserError(f"no experiment {name!r}{known}")
    try:
        entries = yaml.safe_load(sys.stdin.read() if name == "-" else path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
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


# ------------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training with what is measured on it.

    Attributes:
        name: its folder's name, the labels joined.
        labels: its place on each axis.
        arm: the labels without the seed.
        phase: "study", or "tuning" for a run that only chooses a rate.
        settings: options of `script`.
        benchmarks: what is scored, all by eval/suite.py with the options `evaluation`.
        alone: what is scored by a script of its own, with its options.
        chosen: the file with its arm's rate, where a tuning decides it.
    """

    name: str
    labels: dict[str, str]
    arm: str
    phase: str
    script: str
    settings: dict[str, Any]
    folder: str
    benchmarks: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, dict[str, Any]] = field(default_factory=dict)
    forgetting: dict[str, Any] | None = None
    processes: int = 1
    row: str | None = None
    needs: list[str] = field(default_factory=list)
    chosen: str | None = None


@dataclass
class Plan:
    """Everything that the workflow needs; see `as_json`."""

    experiment: str
    folder: str
    entries: dict[str, Any]
    runs: list[Run]
    files: dict[str, str]
    choices: dict[str, dict[str, Any]]  # by the file of a chosen rate: the runs that it is chosen from, and how
    extra: list[str] = field(default_factory=list)


def axis_values(axis: str, values: Any, only: list[str] | None, where: str) -> dict[str, dict[str, Any]]:
    """The axis' labels with what each of them sets. `only`: take these, of labels; or these values, of an option."""
    if isinstance(values, list):
        if only is not None:
            values = [yaml.safe_load(text) for text in only]
        labels = [str(value) if axis in PLAIN_AXES else f"{axis}{value}" for value in values]
        found = {label: {axis: value} for label, value in zip(labels, values, strict=True)}
        if len(found) < len(values):
            raise UserError(f"{where}: axis {axis!r} has a value twice, so two runs would have one name: {values}")
        return found
    if not isinstance(values, dict) or not all(isinstance(entry or {}, dict) for entry in values.values()):
        raise UserError(f"{where}: axis {axis!r} takes a list of values, or labels with what each of them sets")
    values = {str(label): entry or {} for label, entry in values.items()}
    if only is None:
        return values
    for label in only:
        if label not in values:
            raise UserError(f"{where}: axis {axis!r} has no {label!r}{nearest(label, values)}")
    return {label: values[label] for label in only}


def combine(entries: dict[str, Any], labels: dict[str, dict[str, Any]], where: str) -> dict[str, Any]:
    """The experiment's entries for one combination: what its labels set goes into settings, or replaces an entry."""
    result = {key: entries[key] for key in (*OF_A_LABEL, "settings", "script") if key in entries}
    result["settings"] = dict(result.get("settings") or {})
    for changes in labels.values():
        for key, value in changes.items():
            if key not in OF_A_LABEL:
                result["settings"][key] = value
            elif isinstance(value, dict) and isinstance(result.get(key), dict):
                result[key] = merged(result[key], value)
            else:
                result[key] = value
    for key in [key for key, value in result["settings"].items() if value is None]:
        del result["settings"][key]
    for name in result.get("benchmarks") or []:
        if name not in BENCHMARKS:
            raise UserError(f"{where}: unknown benchmark {name!r}{nearest(name, BENCHMARKS)}")
    return result


def filled(value: Any, places: dict[str, str], where: str) -> Any:
    """`value` with {label} and {files} filled in."""
    if isinstance(value, list):
        return [filled(item, places, where) for item in value]
    if not isinstance(value, str) or "{" not in value:
        return value
    try:
        return value.format_map(places)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where}: {value!r} names {error}, which is no axis: {', '.join(places)}") from error


def make_run(
    plan: Plan, part: dict[str, Any], labels: dict[str, str], name: str, phase: str, processes: int | None
) -> Run:
    """One run from its combined entries `part`.

    Raises:
        UserError: the sequences of a step cannot be divided among the processes.
    """
    where = f"{plan.experiment}: {name}"
    places = {**labels, "files": f"{plan.folder}/files"}
    settings = {key.replace("_", "-"): filled(value, places, where) for key, value in part["settings"].items()}
    count = part.get("processes", 1)
    if processes is not None and plan.entries.get("needs-gpu"):
        count = processes
    if count == 1:
        settings.pop("deepspeed", None)  # ZeRO splits nothing there
    run = Run(
        name=name,
        labels=labels,
        arm="-".join(label for axis, label in labels.items() if axis != "seed") or plan.experiment,
        phase=phase,
        script=part.get("script", SCRIPTS[0]),
        settings=settings,
        folder=f"{plan.folder}/{name}",
        processes=count,
        row=part.get("row"),
    )

    def options(given: dict[str, Any] | None) -> dict[str, Any]:
        return {key.replace("_", "-"): filled(value, places, where) for key, value in (given or {}).items()}

    benchmarks = part.get("benchmarks") or []
    if isinstance(benchmarks, dict):
        run.alone = {benchmark: options(given) for benchmark, given in benchmarks.items()}
    elif benchmarks:
        run.benchmarks, run.evaluation = list(benchmarks), options(part.get("evaluation"))
    if part.get("forgetting") is not None and phase == "study":
        run.forgetting = options(part["forgetting"])
    if "sequences-per-step" in part:
        batch = batch_size(run)
        accumulation, rest = divmod(part["sequences-per-step"], batch * count)
        if rest or not accumulation:
            raise UserError(
                f"{where}: {part['sequences-per-step']} sequences per step are no multiple of {batch} per micro-batch "
                f"x {count} processes: take another number of processes, or another batch-size"
            )
        run.settings["gradient-accumulation"] = accumulation
    values = [value for _, options in [("", settings), *measured(run)] for value in options.values()]
    for text in itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in values):
        if isinstance(text, str) and text.startswith(f"{plan.folder}/files/"):
            need(plan, run, text, places, where)
    return run


def batch_size(run: Run) -> int:
    """Sequences per micro-batch, from the run's settings, its configuration, or the script's default."""
    if "batch-size" in run.settings or not run.settings.get("config"):
        return run.settings.get("batch-size", arguments_of(run.script).batch_size)
    return read_config(run.settings["config"]).get("batch_size", arguments_of(run.script).batch_size)


@functools.cache
def read_config(path: str) -> dict[str, Any]:
    """The entries of a configuration of the scripts, by the names that are typed with underscores."""
    try:
        found = yaml.safe_load((ROOT / path).read_text()) or {}
        return {key.replace("-", "_"): value for key, value in found.items()}
    except (OSError, UnicodeDecodeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error


def need(plan: Plan, run: Run, path: str, places: dict[str, str], where: str) -> None:
    """Enters the file `path`, with the command that makes it, among what the run and the plan need."""
    name = path.removeprefix(f"{plan.folder}/files/").partition("/")[0]
    target = f"{plan.folder}/files/{name}"
    for pattern, command in (plan.entries.get("files") or {}).items():
        if filled(pattern, places, where) == name:
            plan.files[target] = filled(command, {**places, "file": target}, where)
            if target not in run.needs:
                run.needs.append(target)
            return
    known = ", ".join(plan.entries.get("files") or {}) or "none"
    raise UserError(f"{where}: nothing in 'files' makes {name!r} (there: {known})")


def expand(
    name: str,
    folder: str | None = None,
    only: dict[str, list[str]] | None = None,
    processes: int | None = None,
    extra: list[str] | None = None,
) -> Plan:
    """All runs of an experiment.

    Args:
        only: labels or values by axis, instead of the experiment's own.
        processes: devices that one run takes, where the experiment needs GPUs.
        extra: further options for every training, as they are typed.

    Raises:
        UserError: anything in the experiment that is not known or does not fit, or two runs with one name.
    """
    entries = load(name)
    if folder and re.search(r"[^\w./+@:-]", folder):
        raise UserError(f"{folder!r} cannot hold an experiment: give a path of letters, digits and . / + - _ @ :")
    stem = Path(folder or "experiment").name if name == "-" else Path(name).stem
    plan = Plan(stem, folder or f"output/{stem}", entries, [], {}, {}, extra or [])
    axes = entries.get("axes") or {}
    for axis in only or {}:
        if axis not in axes:
            raise UserError(f"{stem} has no axis {axis!r}{nearest(axis, axes)} (it has {', '.join(axes)})")
    values = {axis: axis_values(axis, found, (only or {}).get(axis), stem) for axis, found in axes.items()}
    for labels in itertools.product(*values.values()):
        chosen = {axis: values[axis][label] for axis, label in zip(values, labels, strict=True)}
        place = dict(zip(values, labels, strict=True))
        part = combine(entries, chosen, stem)
        run = make_run(plan, part, place, "-".join(labels) or stem, "study", processes)
        if part.get("tune"):
            run.chosen = tuning_runs(plan, part, run, values, processes)
        plan.runs.append(run)
    check(plan)
    return plan


def tuning_runs(plan: Plan, part: dict[str, Any], run: Run, values: dict[str, dict], processes: int | None) -> str:
    """Adds the runs that choose the setting of `run`'s arm, once per arm, and returns the file with the choice.

    tune:
      learning-rate: [1e-4, 3e-4]    the option that is chosen, and its grid
      seed: [100, 101]               seeds of their own
      score: gsm8k.accuracy          what is compared, the mean over those seeds; `mode: min` for a loss
      per: [method]                  axes that have a choice of their own (all but the seed); others stand at their
      at: {noise: clean}             place here, or at their first label
      evaluation: ...                as above: the validation items
    """
    tune = part["tune"]
    grids = [key for key in tune if key not in TUNE_ENTRIES]
    if len(grids) != 1 or not isinstance(tune[grids[0]], list) or "score" not in tune:
        raise UserError(f"{plan.experiment}: 'tune' takes one option with its values, a 'score' and a 'seed'")
    (option,) = grids
    per = tune.get("per", [axis for axis in run.labels if axis != "seed"])
    labels = {}
    for axis, label in run.labels.items():
        at = (tune.get("at") or {}).get(axis, next(iter(values[axis])))
        labels[axis] = label if axis in per else at
    arm = "-".join(labels[axis] for axis in labels if axis in per)
    path = f"{plan.folder}/chosen/{arm or 'all'}.yaml"
    if path in plan.choices:
        return path
    plan.choices[path] = {
        "option": option,
        "score": tune["score"],
        "mode": tune.get("mode", "max"),
        "config": run.settings.get("config"),
        "runs": [],
    }
    for value, seed in itertools.product(tune[option], tune.get("seed", [100])):
        place = {axis: values[axis][label] for axis, label in labels.items() if axis != "seed"}
        changed = combine(plan.entries, place, plan.experiment)
        changed["settings"] |= {option: value, "seed": seed}
        changed["evaluation"] = merged(changed.get("evaluation") or {}, tune.get("evaluation") or {})
        if "benchmarks" in tune:
            both = isinstance(tune["benchmarks"], dict) and isinstance(changed.get("benchmarks"), dict)
            changed["benchmarks"] = merged(changed["benchmarks"], tune["benchmarks"]) if both else tune["benchmarks"]
        name = "-".join(filter(None, ("tune", arm, f"{option}{value}", str(seed))))
        tuning = make_run(plan, changed, {**labels, "seed": str(seed)}, name, "tuning", processes)
        tuning.labels |= {option: str(value)}
        tuning.arm = arm or "all"
        plan.choices[path]["runs"].append(tuning.name)
        plan.runs.append(tuning)
    return path


# ------------------------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------------------------


def arguments_of(script: str) -> type:
    """The dataclass with a script's options."""
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).Arguments


def option_types(script: str) -> dict[str, Any]:
    """A script's options with their types, by the names that are typed."""
    return {name.replace("_", "-"): kind for name, kind in typing.get_type_hints(arguments_of(script)).items()}


def check_options(script: str, options: dict[str, Any], where: str) -> None:
    """Raises a UserError where an option is not one of the script's, or takes no such value."""
    known = option_types(script)
    for key, value in list(options.items()):
        name = key.replace("_", "-")
        if name not in known:
            raise UserError(f"{where}: {script} has no option {name!r}{nearest(name, known)}")
        is_union = typing.get_origin(known[name]) in (typing.Union, types.UnionType)
        kinds = typing.get_args(known[name]) if is_union else (known[name],)
        kinds = [kind for kind in kinds if kind is not type(None)]
        choices = [
            item for kind in kinds for item in typing.get_args(kind) if typing.get_origin(kind) is typing.Literal
        ]
        if choices and value not in choices:
            raise UserError(
                f"{where}: --{name} {value}: one of {', '.join(map(str, choices))}{nearest(value, choices)}"
            )
        plain = {bool: bool, int: int, float: (int, float), str: (str, int, float), list[str]: list}
        expected = next((plain[kind] for kind in kinds if kind in plain), None)
        is_bool = isinstance(value, bool)
        if float in kinds and isinstance(value, str):  # YAML takes 1e-4, without a point, for text
            with contextlib.suppress(ValueError):
                value = options[key] = float(value)
        if expected and not choices and (not isinstance(value, expected) or (is_bool and expected is not bool)):
            raise UserError(f"{where}: --{name} {value!r} is no {expected_name(kinds[0])}")


def expected_name(kind: Any) -> str:
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(kind, "list")


def check(plan: Plan) -> None:
    """Raises a UserError where two runs have one name, or a command is none that its script takes."""
    if not plan.runs:
        raise UserError(f"{plan.experiment} has no runs: an axis is empty")
    seen: set[str] = set()
    known: set[str] = set()
    for run in plan.runs:
        if run.name in seen:
            raise UserError(f"{plan.experiment}: two runs have the name {run.name!r}: give their labels other names")
        seen.add(run.name)
        if not re.fullmatch(r"[\w.+-]+", run.name):
            raise UserError(
                f"{plan.experiment}: {run.name!r} names a folder: give its labels letters, digits, . + - and _"
            )
        if run.script not in SCRIPTS:
            raise UserError(f"{plan.experiment}: unknown script {run.script!r}{nearest(run.script, SCRIPTS)}")
        for script, options in [(run.script, run.settings), *measured(run)]:
            if isinstance(options.get("seed"), int):
                alike = json.dumps(
                    [script, {key: value for key, value in options.items() if key != "seed"}], default=str
                )
                if alike in known:
                    continue
                known.add(alike)
            check_options(script, options, f"{plan.experiment}: {run.name}")
            if script == run.script:
                if options.get("config"):
                    check_options(script, read_config(options["config"]), options["config"])
                parse_training(plan, run)


@functools.cache
def parse(script: str, words: tuple[str, ...]) -> Any:
    """A script's arguments from what is typed."""
    return parse_arguments(arguments_of(script), "", list(words))


def measured(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """The scripts that measure the run's model, with their options."""
    found = [(f"eval/{name}.py", options) for name, options in run.alone.items()]
    if run.benchmarks:
        found.append(("eval/suite.py", run.evaluation))
    if run.forgetting is not None:
        found.append(("eval/forgetting.py", run.forgetting))
    return found


def parse_training(plan: Plan, run: Run) -> Any:
    """The run's arguments as its script reads them.

    Raises:
        UserError: a value that the script refuses.
    """
    settings = {name.replace("-", "_"): value for name, value in run.settings.items()}
    try:
        if plan.extra:
            if "config" in settings:
                settings["config"] = ROOT / settings["config"]
            args = parse_arguments(arguments_of(run.script), "", [*as_words(settings), *plan.extra])
        else:  # checked already, and parsing hundreds of command lines takes a minute
            known = read_config(settings["config"]) if "config" in settings else {}
            args = arguments_of(run.script)(**known | settings)
        return resolved(run.script, args)
    except UserError as error:
        raise UserError(f"{plan.experiment}: {run.name}: {error}") from error


def resolved(script: str, args: Any) -> Any:
    """A training's arguments with every value filled in and checked. The files that they name are looked for when it
    starts."""
    module = importlib.import_module(script.removesuffix(".py"))
    if script == SCRIPTS[0]:
        deepspeed = args.deepspeed
        args = module.resolve_arguments(dataclasses.replace(args, dry_run=True, deepspeed=None))
        args.deepspeed = None if deepspeed is None else str(ROOT / deepspeed)
    else:
        importlib.import_module("common.training").resolve_shared_arguments(args, module.FORMULATIONS)
    return args


# ------------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------------


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as they are typed."""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words


def training_command(plan: Plan, run: Run) -> list[str]:
    """What trains the run; started again, it goes on or leaves alone what is done."""
    launcher = ["python"]
    if run.processes > 1:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(run.processes)]
    settings = dict(run.settings)
    if run.chosen is not None:
        settings = {"config": run.chosen} | {name: value for name, value in settings.items() if name != "config"}
    again = "--resume" if run.script == "train.py" else "--skip-done"
    return [*launcher, run.script, *as_words(settings), "--output-dir", run.folder, again, *plan.extra]


def results_folder(run: Run) -> str:
    return f"{run.folder}/results/{run.settings.get('method', 'ba-lora')}"


def measuring_commands(run: Run) -> dict[str, list[str]]:
    """By step what measures the merged model: `score` for all benchmarks together, or one by name; `forgetting`."""
    merged_model = ["--ckpt", f"{run.folder}/merged"]
    where = ["--output-dir", results_folder(run), "--skip-done"]
    found = {}
    if run.benchmarks:
        words = ["--benchmarks", *run.benchmarks, *merged_model, *where, *as_words(run.evaluation)]
        found["score"] = ["python", "eval/suite.py", *words]
    for name, options in run.alone.items():
        found[name] = ["python", f"eval/{name}.py", *merged_model, *where, *as_words(options)]
    if run.forgetting is not None:
        base = run.settings.get("model") or read_config(run.settings["config"])["model"]
        words = [*merged_model, "--base", base, *where, *as_words(run.forgetting)]
        found["forgetting"] = ["python", "eval/forgetting.py", *words]
    return found


def renamed(words: list[str], paths: dict[str, str]) -> str:
    """The command as text, with the local copies that `paths` names in the place of hub names."""
    return shlex.join(paths.get(word, word) for word in words)


def report_commands(plan: Plan, plan_file: str) -> list[list[str]]:
    """What makes the tables once all runs are there: ours, and beside the published ones where there are such."""
    commands = [["python", "experiments/report.py", plan_file]]
    if (plan.entries.get("report") or {}).get("published"):
        folders = []
        for run in plan.runs:
            if run.phase == "study":
                folder = results_folder(run) if run.script == "train.py" else run.folder
                folders.append(f"{run.row}={folder}" if run.row else folder)
        commands.append(["python", "eval/report.py", *folders, "--output-dir", f"{plan.folder}/report", "--overwrite"])
    return commands


def as_json(plan: Plan, plan_file: str, paths: dict[str, str], devices: list[str]) -> dict[str, Any]:
    """The plan as experiments/Snakefile reads it: for every run its commands, in their order."""
    runs = {}
    for run in plan.runs:
        runs[run.name] = {
            "train": renamed(training_command(plan, run), paths),
            "measure": {step: renamed(words, paths) for step, words in measuring_commands(run).items()},
            "expected": [*run.benchmarks, *run.alone, *(["forgetting"] if run.forgetting is not None else [])],
            "needs": run.needs + ([run.chosen] if run.chosen else []),
            "processes": run.processes,
            "phase": run.phase,
            "arm": run.arm,
            "labels": run.labels,
            "settings": run.settings,
            "script": run.script,
            "folder": run.folder,
            "results": results_folder(run),
            "keep_merged": plan.entries.get("keep-merged", True),
        }
    return {
        "version": PLAN_VERSION,
        "experiment": plan.experiment,
        "about": plan.entries.get("about", ""),
        "folder": plan.folder,
        "devices": devices,
        "needs_gpu": bool(plan.entries.get("needs-gpu")),
        "files": plan.files,
        "choices": plan.choices,
        "report_options": plan.entries.get("report") or {},
        "runs": runs,
        "report": [renamed(words, paths) for words in report_commands(plan, plan_file)],
    }


def all_commands(content: dict[str, Any]) -> list[str]:
    """Every command of the plan, in an order that could be typed, without those that only put results together."""
    lines = list(content["files"].values())
    for phase in ("tuning", "study"):
        for run in content["runs"].values():
            if run["phase"] == phase:
                lines += [run["train"], *run["measure"].values()]
    return lines + content["report"][1:]


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def read_paths(path: str | None) -> dict[str, str]:
    """Local copies by hub name, from a YAML file."""
    if path is None:
        return {}
    try:
        found = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --paths {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(place, str) for place in found.values()):
        raise UserError(f"--paths {path}: expected lines of the form 'hub name: folder'")
    return {str(name): place for name, place in found.items()}


def require_devices(plan: Plan, count: int) -> None:
    """Raises a UserError where this machine has too few GPUs for a run of the experiment."""
    most = max(run.processes for run in plan.runs)
    if count and most > count and not plan.entries.get("needs-gpu"):
        raise UserError(
            f"{plan.experiment} takes {most} processes per run, and there are {count} GPUs here: "
            "CUDA_VISIBLE_DEVICES= hides them, and it runs on the CPU"
        )
    if plan.entries.get("needs-gpu") and count < most:
        twin = f", or its twin {plan.experiment}-demo" if f"{plan.experiment}-demo" in names() else ""
        raise UserError(
            f"{plan.experiment} takes {most} GPUs per run, and there are {count} here: GPUS_PER_RUN=1 makes it another "
            f"number, --executor slurm sends it to a cluster{twin}"
        )


def listing() -> str:
    """The experiments with their first sentence."""
    width = max(map(len, names()))
    return "\n".join(f"{name:{width}}  {load(name).get('about', '')}" for name in names())


def main(argv: list[str]) -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("experiment", nargs="?", help="its name, or a file; none: a list of all")
    parser.add_argument("--output-dir", help="folder of its runs; by default output/NAME")
    parser.add_argument("--axis", action="append", default=[], metavar="AXIS=A,B", help="take these of an axis")
    parser.add_argument("--processes", type=int, metavar="N", help="GPUs that one run takes, where it needs GPUs")
    parser.add_argument("--devices", default="", metavar="0,1", help="GPUs that there are, by their numbers")
    parser.add_argument("--paths", metavar="FILE", help="YAML file with local copies by hub name")
    parser.add_argument("--plan", metavar="FILE", help="write the workflow's plan, and print no commands")
    parser.add_argument("--cluster", action="store_true", help="jobs run elsewhere: this machine needs no GPU")
    parser.add_argument("--no-price", action="store_true", help="print the commands alone")
    parser.epilog = "What follows -- are further options for every training."
    place = argv.index("--") if "--" in argv else len(argv)
    args, options = parser.parse_args(argv[:place]), argv[place + 1 :]
    if args.experiment is None:
        print(listing())
        return
    only: dict[str, list[str]] = {}
    for text in args.axis:
        axis, mark, labels = text.partition("=")
        if not mark or not labels:
            raise UserError(f"--axis {text}: expected AXIS=LABEL,LABEL")
        only[axis] = labels.split(",")
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes is {args.processes}: it must be above 0")
    plan = expand(args.experiment, args.output_dir, only, args.processes, options)
    devices = [name for name in args.devices.split(",") if name]
    if args.plan and not args.cluster:
        require_devices(plan, len(devices))
    plan_file = args.plan or f"{plan.folder}/plan.json"
    content = as_json(plan, plan_file, read_paths(args.paths), devices)
    if not args.no_price:
        from experiments import price  # which imports torch

        print(price.text(plan))
    if not args.plan:
        print("\n".join(["commands:", *all_commands(content)]))
    if args.plan:
        Path(args.plan).parent.mkdir(parents=True, exist_ok=True)
        part = Path(f"{args.plan}.part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(args.plan)


if __name__ == "__main__":
    run_script(main)
