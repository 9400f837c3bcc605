"""What HumanEval and MBPP share: the code in a completion, its verdict from the sandbox, pass@k."""

import math
import re
import sys
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from common.cli import UserError, option, require_positive
from common.intervals import mean, score_line, share
from eval import benchmark
from eval.benchmark import Run, digest
from eval.sandbox import Limits, Program, Verdict, require_isolation, run_programs


@dataclass
class ProgramArguments:
    """How programs are run and counted."""

    k: list[int] = option([1], "the k of pass@k; none may be above --samples")
    timeout: float = option(Limits.timeout, "seconds of CPU time, and of waiting, for one program with its tests")
    memory_mib: int = option(Limits.memory_mib, "memory for one program")
    workers: int | None = option(None, "programs that run at the same time; None: one per core of this process")
    unsafe: bool = option(False, "run the model's programs even where nothing isolates them from this machine")


@dataclass
class Arguments(ProgramArguments, benchmark.Arguments):
    """What HumanEval and MBPP take."""


def check_code_arguments(args: Arguments) -> None:
    """Says what the sandbox isolates here.

    Raises:
        UserError: a value out of range; nothing isolates programs here and `--unsafe` is not given.
    """
    require_positive(args, "timeout", "memory_mib", "workers")
    if min(args.k, default=0) <= 0:
        raise UserError(f"--k is {' '.join(map(str, args.k)) or 'empty'}: every k must be above 0")
    if args.rescore is None and max(args.k) > args.samples:
        raise UserError(f"--k {max(args.k)} needs as many --samples; there are {args.samples}")
    print(require_isolation(args.unsafe).describe())


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of pass@k from c passes among n samples: 1 − C(n−c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    In whole numbers up to the last division, so that nothing cancels.
    """
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


# ----------------------------------------------------------------------------------------------------------------------
# The code in a completion. By lines, not by Python's parser: a model can write what takes the parser down.
# ----------------------------------------------------------------------------------------------------------------------

FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)[ \t]*")  # a line of its own; with a language, it opens
# How a line of code outside every block begins, as opposed to prose.
CODE_LINE = re.compile(
    r"(?:import|from|def|async def|class|if|elif|for|while|with|return|assert|del|raise|global)\b.*"
    r"|(?:try|else|finally|except\b.*):.*|@.*|#.*|[)\]}].*|'''.*|\"\"\".*"
    r"|[A-Za-z_][\w.,\[\] '\"]*(?::[^=]+)?[-+*/]?=[^=].*"  # an assignment
    r"|[A-Za-z_][\w.]*\(.*"  # a call
)


def extract_code(completion: str, names: tuple[str, ...]) -> str:
    """The code in a completion: the first fenced block that defines one of `names`, with the definitions in blocks
    before it; else what stands outside and defines one; else the first block. Without blocks, the lines of code.

    The first line keeps its indentation: a completion may be the body of a function.
    """
    blocks, text = fenced_blocks(re.sub(r"^ (?=\S)", "", completion))  # the space that parts it from its prompt
    defining = [number for number, block in enumerate(blocks) if defines(block, names)]
    if defining:
        helpers = [block for block in blocks[: defining[0]] if is_definitions(block, names)]
        return without_trials("\n".join([*helpers, blocks[defining[0]]]), names)
    if blocks and not defines(text, names):
        return blocks[0]
    return without_trials(leading_code(text, names), names)


def fenced_blocks(completion: str) -> tuple[list[str], str]:
    """The fenced blocks, without what all their lines are indented by, and the text outside of them.

    A completion may begin inside of a block that its prompt has opened: code before a first fence without a language.
    It may end inside of one, cut short: that one comes last.
    """
    blocks, outside, block = [], [], None
    for line in completion.split("\n"):
        before, mark, after = line.partition("```")
        fence = FENCE.fullmatch(line)
        ends = bool(mark) and (not before.strip() or not after.strip())  # a model may write on where a block ends
        if block is None and ends and not after.strip() and not blocks and is_code([*outside, before]):
            block, outside = outside, []
        if block is not None and ends:
            blocks.append([*block, before])
            block = [] if fence and fence[1] else None
        elif block is not None:
            block.append(line)
        elif fence:
            block = []
        else:
            outside.append(line)
    if block and any(line.strip() for line in block):
        blocks.append(block)
    return [textwrap.dedent("\n".join(lines)).rstrip() + "\n" for lines in blocks], "\n".join(outside)


def is_code(lines: list[str]) -> bool:
    """Whether every line that is not empty is one of code, indented or not, and one of them no comment."""
    lines = [line for line in lines if line.strip()]
    return all(line.startswith(("  ", "\t")) or CODE_LINE.fullmatch(line) for line in lines) and any(
        line.lstrip()[0] != "#" for line in lines
    )


def is_definitions(block: str, names: tuple[str, ...]) -> bool:
    """Whether the block imports, defines and sets constants, and does nothing with `names`."""
    lines = [line for line in block.split("\n") if line.strip() and line[0] not in " \t#"]
    pattern = r"(?:import|from|def|async def|class)\b.*|@.*|[)\]}].*|\w+ *=[^=(]*"
    uses = any(re.search(rf"\b{re.escape(name)}\b", block) for name in names)
    return not uses and all(re.fullmatch(pattern, line) for line in lines)


def without_trials(code: str, names: tuple[str, ...]) -> str:
    """The code without the calls and asserts by which a model tries its function, after the function's definition."""
    if not defines(code, names):
        return code
    lines, kept, defined, dropping = code.split("\n"), [], False, False
    for line in lines:
        goes_on = dropping and re.match(r"(?:else|elif|except|finally)\b", line) is not None
        if line.strip() and line[0] not in " \t)]}" and not goes_on:
            dropping = defined and re.match(r"assert\b|print\(|if __name__\b", line) is not None
            defined = defined or defines(line, names)
        if not dropping:
            kept.append(line)
    return "\n".join(kept).rstrip() + "\n"


def leading_code(text: str, names: tuple[str, ...]) -> str:
    """The lines of code that a text begins with, or those from its first definition on if it defines one of `names`."""
    lines = text.split("\n")
    while lines and not lines[0].strip():
        del lines[0]
    start = 0
    if defines(text, names):  # prose before the code
        start = next(i for i, line in enumerate(lines) if re.match(r"(import|from|def|async def|class|@)\b", line))
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0] in " \t" or CODE_LINE.fullmatch(lines[end])):
        end += 1
    return "\n".join(lines[start:end]).rstrip() + "\n"


def defines(code: str, names: tuple[str, ...]) -> bool:
    """Whether a function or class of one of these names is defined outside every block."""
    return any(re.search(rf"^(?:async def|def|class)\s+{re.escape(name)}\b", code, re.MULTILINE) for name in names)


def as_body(code: str) -> str:
    """The code, indented as the body of a function, whether or not the model or its tokenizer left that out."""
    code = re.sub(r"^ {3}(?=\S)", "    ", code)  # a tokenizer may drop one space
    lines = code.split("\n")
    if lines[0][:1] in (" ", "\t"):
        return code
    rest = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    inner = 8 if lines[0].rstrip().endswith(":") else 4  # where the lines after an indented first one stand
    if rest and rest[0] >= inner and min(rest) >= 4:
        return "    " + code  # only the first line lost it
    return "\n".join("    " + line if line.strip() else line for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts and scores
# ----------------------------------------------------------------------------------------------------------------------


def run_items(run: Run, items: list[dict[str, Any]], programs: list[Program], args: Arguments) -> None:
    """Adds program, verdict, detail, output and `correct` to the items, program by program in the sandbox.

    Verdicts are kept on disk by program, tests and limits: a run that was killed while grading goes on.
    """
    limits = Limits(timeout=args.timeout, memory_mib=args.memory_mib)
    store = run.store("verdicts")
    how = [vars(limits), require_isolation(args.unsafe).level, sys.version]
    keys = [digest([vars(program), how]) for program in programs]
    missing = {key: program for key, program in zip(keys, programs, strict=True) if key not in store.values}
    verdicts = run_programs(list(missing.values()), limits, unsafe=args.unsafe, workers=args.workers)
    for key, verdict in zip(missing, tqdm(verdicts, "running programs", len(missing), unit="program"), strict=True):
        store.add(key, asdict(verdict))
    for item, key, program in zip(items, keys, programs, strict=True):
        verdict = Verdict(**store.values[key])
        item |= {"program": program.candidate, **asdict(verdict), "correct": verdict.passed}


def finish(run: Run, items: list[dict[str, Any]], args: Arguments) -> None:
    """pass@k of graded items, written and printed.

    Raises:
        UserError: `--rescore`'s file has fewer samples of an item than the largest k.
    """
    passes: dict[int, list[bool]] = {}
    for item in items:
        passes.setdefault(item["index"], []).append(item["correct"])
    fewest = min(map(len, passes.values()))
    if fewest < max(args.k):
        raise UserError(f"--k {max(args.k)}: there are items with {fewest} samples")
    of_k = {
        f"pass@{k}": share(items, "correct")
        if k == 1
        else mean([pass_at_k(len(verdicts), sum(verdicts), k) for verdicts in passes.values()])
        for k in sorted(set(args.k) | {1})
    }
    verdicts = {kind: sum(item["verdict"] == kind for item in items) for kind in ("passed", "failed", "timed out")}
    scores = {"accuracy": of_k["pass@1"], **of_k, "finished": share(items, "finished"), "verdicts": verdicts}
    scores["sandbox"] = require_isolation(args.unsafe).level
    lines = [score_line(name, score) for name, score in of_k.items()]
    lines.append(score_line("finished in time", scores["finished"]))
    lines.append(f"  {'programs':24}{', '.join(f'{count} {kind}' for kind, count in verdicts.items())}")
    run.finish(items, scores, lines)
