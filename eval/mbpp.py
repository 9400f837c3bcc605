#!/usr/bin/env python3
"""MBPP: short Python functions from a sentence and three tests (arXiv 2108.07732); pass@k against all the tests.

One item, as data in MBPP's format has it, a completion, and its verdict:

    {"task_id": 17, "prompt": "Write a function that returns the perimeter of a square given its side length as input.",
     "code": "def square_perimeter(a):\\n  perimeter=4*a\\n  return perimeter",
     "test_list": ["assert square_perimeter(10)==40", "assert square_perimeter(5)==20"]}
    "```python\\ndef square_perimeter(a):\\n    return 4 * a\\n```"      passed
    "```python\\ndef square_perimeter(a):\\n    return 40\\n```"         failed: AssertionError at: assert square_...

Programs run in the sandbox (eval/sandbox.py), the tests apart from them; what is isolated on this machine is printed
first. Tests see only the functions and classes that the reference solution defines, and the modules that it imports.

How to run
    python eval/mbpp.py --ckpt output/ba-lora/merged                        500 test items from the hub, greedy, pass@1
    python eval/mbpp.py --ckpt FOLDER_OR_HUB_NAME --data sanitized_mbpp.json
    python eval/mbpp.py --ckpt FOLDER_OR_HUB_NAME --data evalplus/mbppplus  MBPP+: the prompt has MBPP's tests
    python eval/mbpp.py --ckpt BASE_MODEL --prompt raw --shots 3            the paper's few-shot form, with its examples

What comes out, in --output-dir
    mbpp.jsonl     every prompt, completion, program and verdict, with what the program printed
    mbpp.json      pass@k with its 95 % interval, the settings and the versions
"""

import contextlib
import re
import symtable
from dataclasses import dataclass
from typing import Any

from common.cli import UserError, option, parse_arguments, run_script
from eval import code_tasks
from eval.benchmark import Run
from eval.code_tasks import check_code_arguments, extract_code, finish, run_items
from eval.generation import LoadBackend
from eval.sandbox import Program

HUB_DATA = "google-research-datasets/mbpp"
FIELDS, LISTS = ["code"], ["test_list"]
FORMAT = "MBPP's format has task_id, text (sanitized: prompt), code and test_list"
# The wording of the paper's prompt (arXiv 2108.07732, section 3).
INSTRUCTION = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}"
)
BEGIN, END = "\n[BEGIN]\n", "[DONE]"
PAPERS_EXAMPLES = ("2", "3", "4")  # task ids of the paper's three examples


@dataclass
class Arguments(code_tasks.Arguments):
    data: str = option(HUB_DATA, "file in the format of MBPP (full, or sanitized: scored whole) or MBPP+, or hub name")
    max_new_tokens: int = option(512, "longest completion, in tokens")


def instruction_of(record: dict[str, Any]) -> str:
    """The paper's prompt of one item.

    Raises:
        UserError: neither `text` nor `prompt`.
    """
    text = record.get("text") or record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"MBPP item {record.get('task_id')} has neither text nor prompt: {FORMAT}")
    return INSTRUCTION.format(text=text.strip(), tests="\n".join(record["test_list"]))


def tests_of(record: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """An item's tests, `test` where it has one (MBPP+), else test_list; and the names in them that are the program's.

    Raises:
        UserError: `test` is no text; or there are no such names, so that no program could pass.
    """
    whole, item = record.get("test") or "\n".join(record["test_list"]), f"MBPP item {record.get('task_id')}"
    if not isinstance(whole, str):
        raise UserError(f"{item}: test is {type(whole).__name__}, and a text in MBPP+")
    tests = "\n".join([record.get("test_setup_code") or "", whole])
    defined, helping = (set(re.findall(r"^(?:def|class)\s+(\w+)", code, re.M)) for code in (record["code"], tests))
    used = set(re.findall(r"\w+", tests)) - helping
    names = used & defined or used & _assigned(record["code"])
    if not names:
        raise UserError(f"{item}: its tests name no function that its code defines, so that no program could pass")
    return tests, tuple(sorted(names))


def _assigned(code: str) -> set[str]:
    """The names that code sets at its top level, at any depth, imports aside: `add = lambda x, y: x + y`."""
    with contextlib.suppress(SyntaxError, ValueError):
        symbols = symtable.symtable(code, "", "exec").get_symbols()
        return {symbol.get_name() for symbol in symbols if symbol.is_assigned()}
    return set()


def program_of(record: dict[str, Any], completion: str) -> Program:
    """The completion's code, and the item's tests."""
    tests, names = tests_of(record)
    used = set(re.findall(r"\w+", tests))
    # One item's test uses `sys` because its reference solution imports it.
    imports = re.findall(r"^(?:import|from)\s.*", record["code"], re.MULTILINE)
    imports = [line for line in imports if used & set(re.findall(r"\w+", line)) - {"import", "from", "as"}]
    setup = "\n".join([*(record.get("test_imports") or []), *imports])
    solution = re.split(r"^[ \t]*\[DONE\]|\[DONE\][ \t]*$", completion, maxsplit=1, flags=re.MULTILINE)[0]
    return Program(extract_code(solution.replace(BEGIN.strip(), ""), names), tests, names, setup)


def main(argv: list[str], load: LoadBackend | None = None) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    run = Run("mbpp", args, load)
    papers = {"split": "prompt", "prefer": lambda record: str(record.get("task_id")) in PAPERS_EXAMPLES}
    examples = run.examples(FIELDS, FORMAT, lists=LISTS, **papers)
    shown = {instruction_of(record) for record in examples}
    records = [record for record in run.records(FIELDS, FORMAT, lists=LISTS) if instruction_of(record) not in shown]
    if not records:
        raise UserError(f"--shots {args.shots}: every item of {args.data} is among the examples")
    instructions = [instruction_of(record) for record in records]
    for record in records:
        tests_of(record)
    check_code_arguments(args)
    raw = args.prompt == "raw"
    begin, end = (BEGIN, f"\n{END}") if raw else ("", "")
    shots = [
        (instruction_of(record) + begin, record["code"].strip() + end if raw else f"```python\n{record['code']}\n```")
        for record in examples
    ]
    items = run.complete([text + begin for text in instructions], shots, stop=(END,) if raw else None)
    for item in items:
        item["task_id"] = records[item["index"]].get("task_id")
    programs = [program_of(records[item["index"]], item["completion"]) for item in items]
    run_items(run, items, programs, args)
    finish(run, items, args)


if __name__ == "__main__":
    run_script(main)
