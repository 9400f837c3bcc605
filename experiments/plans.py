"""The runs of an experiment: every combination of its axes, and the runs that choose a rate. Each run is checked."""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.cli import UserError, as_words, options_in, parse_arguments
from experiments.entries import OF_A_LABEL, ROOT, TUNE_ENTRIES, load, merged, nearest, read_yaml

SCRIPTS = ("train.py", "finetune_bert_l_sst2.py")
BENCHMARKS = ("gsm8k", "hendrycks_math", "humaneval", "mbpp", "mt_bench")
ALONE = ("crows_pairs", "curve")  # what eval/suite.py does not run
# Labels of these axes are clear by themselves. Labels of other axes begin with the axis' name: rank8.
PLAIN_AXES = {"method", "seed", "task", "model", "data", "arm"}
# Options that names, folders or later steps of a plan depend on: no option after -- changes them.
OF_THE_PLAN = {"output-dir", "seed", "method", "model", "config", "overwrite", "dry-run", "export-from"}
OF_A_STEP = {"batch-size", "gradient-accumulation"}  # where sequences-per-step fits one to the other


# ------------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class PlannedRun:
    """One training and its measurements.

    Attributes:
        name: its folder's name, the labels joined.
        labels: its place on each axis.
        arm: the labels without the seed.
        phase: "study", or "tuning" for a run that only chooses a rate.
        settings: options of `script`.
        benchmarks: the benchmarks that eval/suite.py runs, with the options `evaluation`.
        alone: the benchmarks that have a script of their own, with its options.
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
    runs: list[PlannedRun]
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
    known = BENCHMARKS + (ALONE if isinstance(result.get("benchmarks"), dict) else ())
    for name in result.get("benchmarks") or []:
        if name not in known:
            raise UserError(f"{where}: unknown benchmark {name!r}{nearest(name, known)}")
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
) -> PlannedRun:
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
    run = PlannedRun(
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


def batch_size(run: PlannedRun) -> int:
    """Sequences per micro-batch, from the run's settings, its configuration, or the script's default."""
    if "batch-size" in run.settings or not run.settings.get("config"):
        return run.settings.get("batch-size", arguments_of(run.script).batch_size)
    return read_config(run.settings["config"]).get("batch_size", arguments_of(run.script).batch_size)


@functools.cache
def read_config(path: str) -> dict[str, Any]:
    """The entries of a configuration of the scripts, by the names that are typed with underscores."""
    found = read_yaml(ROOT / path, "the configuration ") or {}
    if not isinstance(found, dict):
        raise UserError(f"the configuration {path} holds no entries")
    return {key.replace("-", "_"): value for key, value in found.items()}


def need(plan: Plan, run: PlannedRun, path: str, places: dict[str, str], where: str) -> None:
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
    require_free(plan, values)
    check(plan)
    check_report(plan, values)
    return plan


def require_free(plan: Plan, values: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Raises a UserError where an option that follows -- would contradict the runs' names or the plan.

    Args:
        values: by axis and label, the settings of the label.
    """
    owners = dict.fromkeys(OF_THE_PLAN, "the plan")
    for axis, labels in values.items():
        for entry in labels.values():
            owners |= {key.replace("_", "-"): f"the axis {axis!r}" for key in entry}
            if "sequences-per-step" in entry:
                owners |= dict.fromkeys(OF_A_STEP, "'sequences-per-step'")
    if "sequences-per-step" in plan.entries:
        owners |= dict.fromkeys(OF_A_STEP, "'sequences-per-step'")
    owners |= {choice["option"]: "'tune'" for choice in plan.choices.values()}
    for word in options_in(plan.extra):
        name = word.removeprefix("--").removeprefix("no-")
        if name in owners:
            raise UserError(
                f"{plan.experiment}: -- {word} would change every run, and {owners[name]} sets it: change it in a file "
                "of your own (docs/experiments.md)"
            )


def tuning_runs(
    plan: Plan, part: dict[str, Any], run: PlannedRun, values: dict[str, dict], processes: int | None
) -> str:
    """Adds the runs that choose the setting of `run`'s arm, once per arm, and returns the file with the choice.

    tune:
      learning-rate: [1e-4, 3e-4]    the option that is chosen, and its grid
      seed: [100, 101]               seeds of their own
      score: gsm8k.accuracy          the score that is compared, as the mean over those seeds
      mode: max                      or min, which a loss, a divergence and forgetting need
      within: 0.01                   the smallest value that is no further from the best is taken
      per: [method]                  axes that have a choice of their own (all but the seed); others stand at their
      at: {noise: clean}             place here, or at their first label
      evaluation: ...                as above: the validation items
    """
    tune = part["tune"]
    option = tuned_option(plan.experiment, part, values)
    per = tune.get("per", [axis for axis in run.labels if axis != "seed"])
    labels = {}
    for axis, label in run.labels.items():
        at = str((tune.get("at") or {}).get(axis, next(iter(values[axis]))))
        labels[axis] = label if axis in per else at
    arm = "-".join(labels[axis] for axis in labels if axis in per)
    path = f"{plan.folder}/chosen/{arm or 'all'}.yaml"
    if path in plan.choices:
        return path
    plan.choices[path] = {
        "option": option,
        "score": tune["score"],
        "mode": tune.get("mode", "max"),
        "within": tune.get("within", 0.0),
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
        benchmark = tune["score"].partition(".")[0]
        known = [*tuning.benchmarks, *tuning.alone, "validation"]
        if tuning.script == SCRIPTS[0] and benchmark not in known:
            raise UserError(f"{name}: no benchmark of its measures {tune['score']!r}{nearest(benchmark, known)}")
        plan.choices[path]["runs"].append(tuning.name)
        plan.runs.append(tuning)
    return path


# ------------------------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------------------------


def tuned_option(where: str, part: dict[str, Any], values: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The option that `part`'s tuning chooses.

    Args:
        values: by axis and label, the settings of the label.

    Raises:
        UserError: an entry of 'tune' that has no effect, or the opposite of what it says.
    """
    tune = part["tune"]
    grids = [key for key in tune if key not in TUNE_ENTRIES]
    if len(grids) != 1 or not isinstance(tune[grids[0]], list) or not isinstance(tune.get("score"), str):
        raise UserError(f"{where}: 'tune' takes one option with its values, a 'score' and a 'seed'")
    (option,) = grids
    if option.replace("_", "-") in (key.replace("_", "-") for key in part["settings"]):
        raise UserError(f"{where}: 'tune' chooses {option}, and 'settings' or a label sets it: leave one of them out")
    mode, score = tune.get("mode"), tune["score"]
    is_lower_better = re.search(r"loss|kl_|forgetting|error|pct_stereotype", score) is not None
    if mode not in ("max", "min", *([] if is_lower_better else [None])):
        given = "" if mode is None else f", not {mode!r}"
        raise UserError(f"{where}: 'tune' by {score} takes 'mode: max' or 'mode: min'{given}")
    if not isinstance(tune.get("within", 0.0), (int, float)) or tune.get("within", 0.0) < 0:
        raise UserError(f"{where}: 'within' of 'tune' is {tune['within']!r}: a number from 0")
    for axis in [*tune.get("per", []), *(tune.get("at") or {})]:
        if axis not in values:
            raise UserError(f"{where}: 'tune' names {axis!r}, which is no axis{nearest(axis, values)}")
    for axis, label in (tune.get("at") or {}).items():
        if str(label) not in values[axis]:
            raise UserError(
                f"{where}: 'tune' is at {axis}: {label}, which has no such label{nearest(label, values[axis])}"
            )
    return option


def arguments_of(script: str) -> type:
    """The dataclass with a script's options."""
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).Arguments


def check_options(script: str, options: dict[str, Any], where: str) -> None:
    """Raises a UserError where an option is not one of the script's, or takes no such value."""
    hints = typing.get_type_hints(arguments_of(script))
    known = {name.replace("_", "-"): kind for name, kind in hints.items()}
    for key, value in list(options.items()):
        name = key.replace("_", "-")
        if name not in known:
            raise UserError(f"{where}: {script} has no option {name!r}{nearest(name, known)}")
        is_union = typing.get_origin(known[name]) in (typing.Union, types.UnionType)
        kinds = typing.get_args(known[name]) if is_union else (known[name],)
        kinds = [kind for kind in kinds if kind is not type(None)]
        choices = [
            item for kind in kinds if typing.get_origin(kind) is typing.Literal for item in typing.get_args(kind)
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
            what = {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(kinds[0], "list")
            raise UserError(f"{where}: --{name} {value!r} is no {what}")


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
            seed = type(options.get("seed")).__name__  # runs that differ in nothing else are checked once
            alike = json.dumps([script, options | {"seed": seed}], default=str)
            if alike in known:
                continue
            known.add(alike)
            check_options(script, options, f"{plan.experiment}: {run.name}")
            if script == run.script:
                if options.get("config"):
                    check_options(script, read_config(options["config"]), options["config"])
                parse_training(plan, run)


def check_report(plan: Plan, values: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Raises a UserError where 'report' names an axis, a label or an option that is not there.

    Args:
        values: by axis and label, the settings of the label, of the runs that were asked for.
    """
    options, where = plan.entries.get("report") or {}, f"{plan.experiment}: 'report'"
    baseline, pair, curve = options.get("baseline") or {}, options.get("effects"), options.get("curve")
    if not isinstance(baseline, dict):
        raise UserError(f"{where}: 'baseline' takes an axis with its label, not {baseline!r}")
    if pair and not (isinstance(pair, list) and len(pair) == 2):
        raise UserError(f"{where}: 'effects' takes two axes, not {pair!r}")
    for axis in [*baseline, *(pair or [])]:
        if axis not in values:
            raise UserError(f"{where} names {axis!r}, which is no axis{nearest(axis, values)}")
    for axis, label in baseline.items():
        known = {**axis_values(axis, plan.entries["axes"][axis], None, plan.experiment), **values[axis]}
        if str(label) not in known:
            raise UserError(f"{where}: axis {axis!r} has no {label!r}{nearest(label, known)}")
    names = {name.replace("_", "-") for run in plan.runs for name in typing.get_type_hints(arguments_of(run.script))}
    if curve and curve.replace("_", "-") not in names:
        raise UserError(f"{where}: 'curve' over {curve!r}, which is no option{nearest(curve, names)}")


def measure_script(name: str) -> str:
    """The script that measures a merged model, by the name of its results."""
    return "experiments/curve.py" if name == "curve" else f"eval/{name}.py"


def measured(run: PlannedRun) -> list[tuple[str, dict[str, Any]]]:
    """The scripts that measure the run's model, with their options."""
    found = [(measure_script(name), options) for name, options in run.alone.items()]
    if run.benchmarks:
        found.append(("eval/suite.py", run.evaluation))
    if run.forgetting is not None:
        found.append(("eval/forgetting.py", run.forgetting))
    return found


def parse_training(plan: Plan, run: PlannedRun) -> Any:
    """The run's arguments as its script reads them.

    Raises:
        UserError: a value that the script refuses.
    """
    settings = {name.replace("-", "_"): value for name, value in run.settings.items()}
    try:
        if plan.extra:
            if "config" in settings:
                settings["config"] = ROOT / settings["config"]
            args = parse_arguments(arguments_of(run.script), "", as_words(settings, plan.extra))
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
