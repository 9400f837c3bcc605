#!/usr/bin/env python3
"""MATH: competition problems (Hendrycks et al., arXiv 2103.03874); greedy, one completion each; equivalent answers.

One item, as data in MATH's format has it, a completion, and its verdicts:

    {"problem": "What is the probability that a fair coin lands heads twice?", "level": "Level 1",
     "type": "Counting & Probability", "solution": "Each toss has $\\\\frac12,$ so $\\\\boxed{\\\\frac{1}{4}}.$"}
    "Half times half.\\nThe answer is: 0.25"      extracted 0.25, equivalent to \\frac{1}{4}, not spelled the same

The gold answer is in the solution's last \\boxed{}. The model's is what follows the last "The answer is:", or else its
own last \\boxed{}. Two verdicts: `correct`, by math-verify, whether both have one value; `correct_strict`, by the text
normalisation that the published numbers of BA-LoRA, PiSSA and MetaMath come from (eval/math_grader.py has both), which
take no answer but the one after "The answer is: ".

How to run
    python eval/hendrycks_math.py --ckpt output/ba-lora/merged                      the 5,000 test problems from the hub
    python eval/hendrycks_math.py --ckpt FOLDER_OR_HUB_NAME --data math500.jsonl
    python eval/hendrycks_math.py --rescore results/hendrycks_math.jsonl --output-dir results/again

What comes out, in --output-dir
    hendrycks_math.jsonl     every prompt, completion, extracted answer and verdict
    hendrycks_math.json      accuracy by both rules with 95 % Wilson intervals, by subject and by level
"""

import itertools
import re
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from common.cli import UserError, option, parse_arguments, require_positive, run_script
from common.intervals import score_line, share
from eval import benchmark
from eval.benchmark import BEGINNINGS, PUBLISHED_MARKER, Run, after_thoughts
from eval.generation import LoadBackend
from eval.math_grader import SECONDS, Grader, same_spelling

HUB_DATA = "DigitalLearningGmbH/MATH-lighteval"
FORMAT = "MATH's format has problem and solution"
ANSWER_MARKER = "The answer is:"


@dataclass
class GradingArguments:
    """How answers are compared."""

    seconds: float = option(SECONDS, "time for comparing one answer")


@dataclass
class Arguments(GradingArguments, benchmark.Arguments):
    data: str = option(HUB_DATA, "file in MATH's format (problem, solution; subject or type, level), or hub name")
    max_new_tokens: int = option(2048, "longest completion, in tokens")


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{} (or \\fbox{}); None if there is no box, or no closed one."""
    starts = list(re.finditer(r"\\(?:boxed|fbox)\b\s*", text))
    if not starts:
        return None
    start = starts[-1].end()
    if text[start : start + 1] != "{":  # \boxed 5
        return re.match(r"[^\s$.]*", text[start:]).group() or None
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start + 1 : start + brace.start()]
    return None


MARKERS = (
    r"the (?:final )?answer is\s*:\s*\**",  # the words that the models are trained on
    r"the (?:final )?answer is\b(?!\s*:|\s+(?:not|in|on|a|an|as|given|that)\b)\**",
    r"(?m:^)[#*\s]*(?:final )?answer\s*:?\s*\**:?\s+",  # a heading
)
BOX = re.compile(r"\\(?:boxed|fbox)\b\s*(\{|(?=[-\d\\]|[A-Za-z]\b)[^\s$.{}]+)|\\.|[{}]")
# The text between two boxes of one answer.
BETWEEN_BOXES = re.compile(r"[\s$\\()]*(?:,|;|and|or)?[\s$\\()]*(?:(?:and|or)[\s$\\()]*)?(?:\w\s*=[\s$\\()]*)?")
# The ends of an answer outside of formulas and braces: the end of a sentence or a line, or the beginning of a reason.
END = re.compile(r"\.(?=\s|\Z)|\n|,?\s(?:because|since|so|which|as|where|that is|i\.e\.)\s")
MOST_ENDS = 100
MOST_CHARACTERS = 200_000  # a box is sought in so many characters before a text's end


def boxes(text: str) -> list[tuple[int, int, str]]:
    """The place and content of each outermost closed \\boxed{} (or \\fbox{})."""
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int] | None] = []  # for each open brace the box that it belongs to
    for token in BOX.finditer(text, max(0, len(text) - MOST_CHARACTERS)):
        if token[1] not in (None, "{"):
            found.append((token.start(), token.end(), token[1]))
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.start(), token.end()) if token[1] else None)
        elif token[0] == "}" and opened and (box := opened.pop()):
            while found and found[-1][0] > box[0]:  # boxes inside of this one
                found.pop()
            found.append((box[0], token.end(), text[box[1] : token.start()]))
    return found


def _joined(text: str) -> str | None:
    """The content of the last box, after the contents of earlier boxes that are parts of the same answer."""
    found = boxes(text)
    if not found:
        return None
    parts = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : parts[0][0]]
        if "\n" in between or not BETWEEN_BOXES.fullmatch(between):
            break
        parts.insert(0, box)
    return ", ".join(dict.fromkeys(holds.strip() for _, _, holds in parts)) or None


def _to_its_end(text: str) -> str | None:
    """An answer without the text after it."""
    text = text.strip()
    for end in itertools.islice(END.finditer(text), MOST_ENDS):
        before = text[: end.start()]
        is_whole = before.strip() and all(
            before.count(a) == before.count(b) for a, b in ("{}", (r"\[", r"\]"), ("\\begin", "\\end"))
        )
        if is_whole and len(re.findall(r"(?<!\\)\$", before)) % 2 == 0:
            text = before
            break
    text = text.strip().removesuffix(".").strip()
    return (text.removesuffix("**") if text.count("**") == 1 else text).strip() or None


def extract_answer(text: str) -> str | None:
    """The answer in a completion, to its own end: after the last "The answer is:", else in the last box, else after the
    same words without a colon or below a heading "Answer". A reasoning model's thoughts do not count."""
    text = after_thoughts(re.split("|".join(BEGINNINGS), text)[0])
    for marker in MARKERS:
        _, *answers = re.split(marker, text, flags=re.IGNORECASE)
        if answer := next(filter(None, map(_to_its_end, reversed(answers))), None):
            return _joined(answer) or answer
        if boxed := _joined(text):
            return boxed
    return None


def published_answer(text: str) -> str | None:
    """The answer by the published rule: the text after the last "The answer is:", up to a full stop at a line's end."""
    _, marker, answer = text.rpartition(ANSWER_MARKER)
    answer = answer.partition(".\n")[0].strip().removesuffix(".").strip()
    return answer if marker and PUBLISHED_MARKER in text and answer else None


def gold_answer(solution: str, index: int, source: str) -> str:
    """The content of the solution's last \\boxed{}.

    Raises:
        UserError: there is no box.
    """
    gold = last_boxed(solution)
    if gold is None:
        raise UserError(f"item {index} of {source} has no \\boxed{{}} in its solution")
    return gold


def grade(completions: list[str], golds: list[str], seconds: float = SECONDS) -> list[dict[str, Any]]:
    """For each completion the extracted answer, both verdicts, and the reason if math-verify gave no verdict."""
    answers = [extract_answer(completion) for completion in completions]
    pairs = [(answer, gold) for answer, gold in zip(answers, golds, strict=True) if answer is not None]
    with Grader(seconds) as grader, tqdm(total=len(pairs), desc="grading", unit="item", disable=not pairs) as bar:
        verdicts = iter(grader.compare(pairs, bar.update))
    of_answers = [next(verdicts) if answer is not None else {} for answer in answers]
    return [
        {
            "extracted": answer,
            "correct": verdict.get("value", False),
            "correct_strict": published is not None and same_spelling(published, gold),
            "problem": verdict.get("problem"),
        }
        for published, gold, answer, verdict in zip(
            map(published_answer, completions), golds, answers, of_answers, strict=True
        )
    ]


def main(argv: list[str], load: LoadBackend | None = None) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    require_positive(args, "seconds")
    run = Run("hendrycks_math", args, load)
    fields = ["problem", "solution"]
    records = run.records(fields, FORMAT)
    golds = [gold_answer(record["solution"], index, args.data) for index, record in enumerate(records)]
    shots = [
        (
            record["problem"],
            f"{record['solution']}\n{ANSWER_MARKER} {gold_answer(record['solution'], i, 'the examples')}",
        )
        for i, record in enumerate(run.examples(fields, FORMAT))
    ]
    Grader(args.seconds, servers=1).close()  # refuses here, before anything is generated
    # Without a template around it, a problem needs words that say so, and that a model's next problem begins with.
    form, stop = ("Problem:\n{}\n\nSolution:", ("Problem:",)) if args.prompt == "raw" else ("{}", None)
    items = run.complete(
        [form.format(record["problem"]) for record in records],
        [(form.format(problem), solution) for problem, solution in shots],
        stop=stop,
    )
    verdicts = grade([item["completion"] for item in items], [golds[item["index"]] for item in items], args.seconds)
    for item, verdict in zip(items, verdicts, strict=True):
        record = records[item["index"]]
        item |= {
            "subject": record.get("subject") or record.get("type") or "unknown",
            "level": str(record.get("level", "unknown")).removeprefix("Level "),
            "gold": golds[item["index"]],
            **verdict,
            "answered": verdict["extracted"] is not None,
            "undecided": verdict["problem"] is not None,
        }
    scores = {
        "accuracy": share(items, "correct"),
        "accuracy_strict": share(items, "correct_strict"),
        "answer_extracted": share(items, "answered"),
        "undecided": share(items, "undecided"),
        "finished": share(items, "finished"),
        "by_subject": by(items, "subject"),
        "by_level": by(items, "level"),
    }
    lines = [
        score_line("accuracy, math-verify", scores["accuracy"]),
        score_line("accuracy, published rule", scores["accuracy_strict"]),
        score_line("answer extracted", scores["answer_extracted"]),
        score_line("too hard to compare", scores["undecided"]),
        score_line("finished in time", scores["finished"]),
        *(
            f"  {line}"
            for line in ["", *table(scores, "by_subject", "subject"), "", *table(scores, "by_level", "level"), ""]
        ),
    ]
    run.finish(items, scores, lines)


def by(items: list[dict], group: str) -> dict[str, dict[str, Any]]:
    """Both accuracies of every group of items."""
    return {
        name: {
            rule: share([item for item in items if item[group] == name], verdict)
            for rule, verdict in (("accuracy", "correct"), ("accuracy_strict", "correct_strict"))
        }
        for name in sorted({item[group] for item in items})
    }


def table(scores: dict[str, Any], name: str, title: str) -> list[str]:
    """The lines of a table with a row per group."""
    rows = [f"{title:26}{'math-verify':>12}{'published':>12}{'of':>7}"]
    for group, shares in scores[name].items():
        accuracy, strict = shares["accuracy"], shares["accuracy_strict"]
        rows.append(f"{group:26}{accuracy['value']:>12.1%}{strict['value']:>12.1%}{accuracy['of']:>7}")
    return rows


if __name__ == "__main__":
    run_script(main)
