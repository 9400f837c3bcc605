#!/usr/bin/env python3
"""Prints every command of an experiment and its price, or writes the plan that the workflow runs. It runs nothing.

What an experiment's file holds is described in experiments/entries.py.

How to run
    python experiments/grid.py                        lists the experiments
    python experiments/grid.py nlg                    commands and price
    python experiments/grid.py nlg --axis seed=1,2 --axis method=lora --output-dir output/two-seeds
    sh scripts/experiment.sh nlg                      runs it
"""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.cli import Parser, UserError, as_words, run_script
from common.runs import write_whole
from experiments.entries import load, names, read_yaml
from experiments.plans import Plan, PlannedRun, expand, measure_script, read_config

PLAN_VERSION = 1
# torchrun kills a rank 30 seconds after a signal, within a long step. It hands on the signals that it is told to;
# without SIGHUP among them, `nohup` keeps its effect.
PATIENT = ("--shutdown-timeout", "600", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")


# ------------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------------


def training_command(plan: Plan, run: PlannedRun, paths: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """The command that trains the run. Started again, it goes on, or changes nothing if the run is finished.

    Args:
        paths: local copies by hub name. A name that stands in the run's configuration becomes an option here.
    """
    launcher = ["python"]
    if run.processes > 1:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(run.processes), *PATIENT]
    settings = dict(run.settings)
    if settings.get("config"):
        known = read_config(settings["config"])
        settings |= {
            name: known[name] for name in ("model", "data") if known.get(name) in paths and name not in settings
        }
    if run.chosen is not None:
        settings = {"config": run.chosen} | {name: value for name, value in settings.items() if name != "config"}
    again = "--resume" if run.script == "train.py" else "--skip-done"
    return [*launcher, run.script, *as_words(settings, ["--output-dir", run.folder, again, *plan.extra])]


def results_folder(run: PlannedRun) -> str:
    return f"{run.folder}/results/{run.settings.get('method', 'ba-lora')}"


def measuring_commands(run: PlannedRun) -> dict[str, list[str]]:
    """By step what measures the merged model: `score` for all benchmarks together, or one by name; `forgetting`."""
    merged_model = ["--ckpt", f"{run.folder}/merged"]
    where = ["--output-dir", results_folder(run), "--skip-done"]
    found = {}
    if run.benchmarks:
        words = ["--benchmarks", *run.benchmarks, *merged_model, *where, *as_words(run.evaluation)]
        found["score"] = ["python", "eval/suite.py", *words]
    for name, options in run.alone.items():
        found[name] = ["python", measure_script(name), *merged_model, *where, *as_words(options)]
    if run.forgetting is not None:
        base = run.settings.get("model") or read_config(run.settings["config"])["model"]
        words = [*merged_model, "--base", base, *where, *as_words(run.forgetting)]
        found["forgetting"] = ["python", "eval/forgetting.py", *words]
    return found


def renamed(words: list[str], paths: dict[str, str]) -> str:
    """The command as text, with the local copies that `paths` names in the place of hub names."""
    return shlex.join(paths.get(word, word) for word in words)


def report_commands(plan: Plan, plan_file: str) -> list[list[str]]:
    """The commands for the tables of a finished experiment: ours, and a second beside published numbers, if any."""
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
            "train": renamed(training_command(plan, run, paths), paths),
            "measure": {step: renamed(words, paths) for step, words in measuring_commands(run).items()},
            "expected": [*run.benchmarks, *run.alone, *(["forgetting"] if run.forgetting is not None else [])],
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
        "files": {path: renamed(shlex.split(command), paths) for path, command in plan.files.items()},
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


def note_on_unused(paths: dict[str, str], content: dict[str, Any]) -> None:
    """Names the local copies that no command of the plan reads."""
    words = {word for command in all_commands(content) for word in shlex.split(command)}
    unused = [name for name, place in paths.items() if place not in words]
    if unused:
        print(f"note: --paths: no command here reads {', '.join(unused)}", file=sys.stderr)


def read_paths(path: str | None) -> dict[str, str]:
    """Local copies by hub name, from a YAML file."""
    if path is None:
        return {}
    found = read_yaml(path, "--paths ") or {}
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
    parser = Parser(__doc__)
    parser.add_argument("experiment", nargs="?", help="its name, or a file; none: a list of all")
    parser.add_argument("--output-dir", help="folder of its runs; by default output/NAME")
    parser.add_argument("--axis", action="append", default=[], metavar="AXIS=A,B", help="take these of an axis")
    parser.add_argument("--processes", type=int, metavar="N", help="GPUs that one run takes, where it needs GPUs")
    parser.add_argument("--devices", default="", metavar="0,1", help="GPUs that there are, by number, UUID or MIG name")
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
    paths = read_paths(args.paths)
    content = as_json(plan, plan_file, paths, devices)
    note_on_unused(paths, content)
    if not args.no_price:
        from experiments import price  # which imports torch

        print(price.text(plan))
    if not args.plan:
        print("\n".join(["commands:", *all_commands(content)]))
    else:
        Path(args.plan).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(args.plan), json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
