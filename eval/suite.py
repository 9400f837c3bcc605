#!/usr/bin/env python3
"""All benchmarks of a checkpoint on one engine: loaded once, at the first need, and long enough for every benchmark.

Each result is what the benchmark's own script leaves: the same files, completions and summary, with that script's
command. An engine of vLLM takes minutes to start for a large model; five scripts start five.

How to run
    python eval/suite.py --ckpt output/mine/merged --output-dir output/mine/results
    python eval/suite.py --ckpt FOLDER_OR_HUB_NAME --benchmarks humaneval mbpp --mbpp sanitized_mbpp.json
    python eval/suite.py --ckpt demo --limit 4 --max-new-tokens 64      options go to every benchmark

Benchmarks that need no engine come first: their results or all their completions are there already. One that fails is
told and does not stop the others. The exit code is then 2, or 1 where it was no mistake of the user's.

What comes out, in --output-dir
    NAME.jsonl, NAME.json     of every benchmark: see the help of its own script
    failures.json             what failed and why, for eval/report.py; gone when nothing did
"""

import contextlib
import gc
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from common.cli import UserError, as_words, first_line, option, parse_arguments, run_script
from common.runs import write_whole
from eval import benchmark, gsm8k, hendrycks_math, humaneval, mbpp, mt_bench
from eval.benchmark import FAILURES, load_backend, read_failures
from eval.generation import Backend, LoadBackend

SCRIPTS: dict[str, ModuleType] = {
    script.__name__.rpartition(".")[2]: script for script in (gsm8k, hendrycks_math, humaneval, mbpp, mt_bench)
}


@dataclass
class SuiteArguments:
    """The benchmarks and their items; without a source, a benchmark takes its own items."""

    benchmarks: list[Literal["gsm8k", "hendrycks_math", "humaneval", "mbpp", "mt_bench"]] = option(
        list(SCRIPTS), "these alone"
    )
    gsm8k: str | None = option(None, "GSM8K's problems: a file, a folder or a hub name")
    hendrycks_math: str | None = option(None, "MATH's problems")
    humaneval: str | None = option(None, "HumanEval's file")
    mbpp: str | None = option(None, "MBPP's problems")
    mt_bench: str | None = option(None, "MT-Bench's questions")


@dataclass
class CheckpointArguments:
    """The checkpoint, and the results' folder."""

    ckpt: str | None = option(None, "checkpoint: a folder, a hub name, or 'demo' for the embedded SmolLM2-135M")
    adapter: str | None = option(None, "folder of a LoRA adapter in PEFT's format, trained on --ckpt")
    limit: int | None = option(None, "the first N items of each benchmark only")
    output_dir: str = option("results", "folder for the results, and for the completions of an interrupted run")
    overwrite: bool = option(False, "replace results that are there already; completions made the same way are kept")
    skip_done: bool = option(False, "leave results that --output-dir has already; refuse where it has others")


@dataclass
class SamplingArguments(benchmark.SamplingArguments):
    """How completions are made."""

    max_new_tokens: int | None = option(None, "longest completion, in tokens; None: each benchmark's own")


@dataclass
class Arguments(
    benchmark.MachineArguments,
    SamplingArguments,
    benchmark.PromptArguments,
    mt_bench.JudgeArguments,
    CheckpointArguments,
    SuiteArguments,
):
    """The suite's arguments."""


def commands(args: Arguments) -> dict[str, list[str]]:
    """For each benchmark the arguments that its script is run with."""
    own = {item.name for item in fields(SuiteArguments)}
    judging = {item.name for item in fields(mt_bench.JudgeArguments)}
    found = {}
    for name in dict.fromkeys(args.benchmarks):
        given = {"data": getattr(args, name)} if getattr(args, name) is not None else {}
        for item in fields(args):
            value = getattr(args, item.name)
            is_taken = item.name not in own and (name == "mt_bench" or item.name not in judging)
            if is_taken and value != (item.default if item.default is not MISSING else item.default_factory()):
                given[item.name] = value
        found[name] = as_words(given)
    return found


# ------------------------------------------------------------------------------------------------------------------
# One engine
# ------------------------------------------------------------------------------------------------------------------


class EngineNeeded(Exception):
    """Raised when a benchmark needs an engine; holds the number of tokens that the engine must hold."""

    def __init__(self, max_length: int):
        super().__init__(max_length)
        self.max_length = max_length


def no_engine(*checkpoint: Any, max_length: int, **options: Any) -> Backend:
    """Takes the place of `load_backend` while the benchmarks' needs are collected."""
    raise EngineNeeded(max_length)


class Engine:
    """Takes the place of `load_backend`: one back end for all benchmarks, since all have the same options.

    Attributes:
        max_length: tokens that the longest prompt of any benchmark has with its completion.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self._backend: Backend | None = None

    def __call__(self, *checkpoint: Any, max_length: int, **options: Any) -> Backend:
        if self._backend is None:
            self._backend = load_backend(*checkpoint, max_length=max(max_length, self.max_length), **options)
        return self._backend

    def drop(self) -> None:
        """The next benchmark gets an engine of its own, since this one may be broken."""
        self._backend = None
        gc.collect()


# ------------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_its_own_script(name: str, argv: list[str]) -> Iterator[None]:
    """Inside, the command line is that of the benchmark's script, which its summary records."""
    before = sys.argv
    sys.argv = [os.path.relpath(SCRIPTS[name].__file__), *argv]
    try:
        yield
    finally:
        sys.argv = before


@dataclass(frozen=True)
class Failure:
    message: str
    code: int  # the exit code of its script


def run_one(name: str, argv: list[str], load: LoadBackend) -> Failure | None:
    """Runs a benchmark; returns its failure, if any.

    Raises:
        EngineNeeded: `load` is `no_engine`, and the benchmark cannot end without an engine.
    """
    with as_its_own_script(name, argv):
        try:
            SCRIPTS[name].main(argv, load)
        except UserError as error:
            return Failure(str(error), 2)
        except SystemExit as ended:  # --skip-done
            return Failure(f"ended with exit code {ended.code}", 1) if ended.code else None
        except EngineNeeded:
            raise
        except Exception as error:
            traceback.print_exc()
            return Failure(f"{type(error).__name__}: {first_line(error)}", 1)
    return None


def run_without_engine(todo: dict[str, list[str]]) -> tuple[dict[str, Failure | None], dict[str, int]]:
    """Runs the benchmarks that need no engine; returns how many tokens the engine must hold for the others."""
    ended, waiting = {}, {}
    for name, words in todo.items():
        printed = io.StringIO()  # shown if this was the whole run
        try:
            with contextlib.redirect_stdout(printed):
                ended[name] = run_one(name, words, no_engine)
        except EngineNeeded as needed:
            waiting[name] = needed.max_length
        else:
            print(printed.getvalue(), end="", flush=True)
    return ended, waiting


def keep(args: Arguments, todo: dict[str, list[str]], ended: dict[str, Failure | None]) -> None:
    """Writes the failures beside the results of the other benchmarks; keeps earlier entries for benchmarks not run."""
    path = Path(args.output_dir) / FAILURES
    known = {name: failure for name, failure in read_failures(args.output_dir).items() if name not in ended}
    for name, failure in ended.items():
        if failure is not None:
            command = shlex.join(["python", f"eval/{name}.py", *todo[name]])
            about = {"ckpt": args.ckpt, "adapter": args.adapter, "command": command}
            known[name] = {"error": failure.message, **about}
    if known:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    else:
        path.unlink(missing_ok=True)


def tell(name: str, failure: Failure | None) -> None:
    if failure is not None:
        print(f"{name}.py: error: {failure.message}", file=sys.stderr, flush=True)


def check_arguments(args: Arguments) -> None:
    """Raises a UserError where an option that goes to every benchmark is out of range."""
    names = {item.name for item in fields(args)} & {item.name for item in fields(benchmark.Arguments)}
    benchmark.check_arguments(benchmark.Arguments(**{name: getattr(args, name) for name in names}))
    if not args.benchmarks:
        raise UserError(f"--benchmarks names none: choose from {', '.join(SCRIPTS)}")


def main(argv: list[str]) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    check_arguments(args)
    todo = commands(args)
    ended, waiting = run_without_engine(todo)
    reasons = {failure and failure.message for failure in ended.values()}
    if not waiting and len(reasons) == 1 and None not in reasons:  # one mistake for all benchmarks
        raise UserError(reasons.pop())
    for name, failure in ended.items():
        tell(name, failure)
    keep(args, todo, ended)
    engine = Engine(max(waiting.values(), default=0))
    for number, name in enumerate(waiting, 1):
        print(f"\n{name}, {number} of {len(waiting)}", flush=True)
        ended[name] = run_one(name, todo[name], engine)
        if ended[name] is not None and ended[name].code == 1:
            engine.drop()
        tell(name, ended[name])
        keep(args, todo, ended)
    failed = {name: failure.code for name, failure in ended.items() if failure is not None}
    if failed:
        print(f"\n{len(failed)} of {len(todo)} benchmarks failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(min(failed.values()))


if __name__ == "__main__":
    run_script(main)
