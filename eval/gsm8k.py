#!/usr/bin/env python3
"""GSM8K: grade-school word problems; greedy, one completion each; exact match of the final number.

One item, as data in GSM8K's format has it, a completion, and its verdict:

    {"question": "Natalia sold 48 clips in April and half as many in May. How many altogether?",
     "answer": "In May she sold 48/2 = <<48/2=24>>24 clips. Altogether 48+24 = <<48+24=72>>72.\\n#### 72"}
    "In May: 48 / 2 = 24. Altogether 48 + 24 = 72.\\nThe answer is: 72"      extracted 72, correct

Each completion gets three verdicts. `correct`: the answer equals the gold number. The answer is the number after the
last "The answer is:", or else after GSM8K's own "####", or else in the last \\boxed{}, or else after "The answer is".
`correct_strict`: the verdict by the published rule (BA-LoRA, PiSSA, MetaMath). This rule reads only "The answer is:",
reads "1,000,000" as 1,000, and rounds: 17.6 counts as 18. `correct_lenient`: the last number equals the gold number.

How to run
    python eval/gsm8k.py --ckpt output/ba-lora/merged                       the 1,319 test problems from the hub
    python eval/gsm8k.py --ckpt FOLDER_OR_HUB_NAME --data FILE.jsonl
    python eval/gsm8k.py --ckpt demo --data demo --loss-field response      no hub needed

What comes out, in --output-dir
    gsm8k.jsonl     every prompt, completion, extracted answer and verdict
    gsm8k.json      accuracy by the three rules with 95 % Wilson intervals, the settings and the versions
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from common.cli import UserError, option, parse_arguments, run_script
from common.intervals import score_line, share
from common.templates import encode_response
from eval import benchmark
from eval.benchmark import PUBLISHED_MARKER, Run, after_thoughts
from eval.generation import LoadBackend, response_loss
from eval.math_grader import WORDS

HUB_DATA = "openai/gsm8k"
FORMAT = "GSM8K's format has question and answer"


@dataclass
class LossArguments:
    """A further measurement."""

    loss_field: str | None = option(None, "also measure the loss on this field's responses, per token")


@dataclass
class Arguments(LossArguments, benchmark.Arguments):
    data: str = option(HUB_DATA, "file in GSM8K's format (question, answer), hub name, or 'demo'")


NUMBER = re.compile(r"(-?)\s?(?:\\?[$€£¥₹])?\s?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d+))?")
LAST_DIGIT = re.compile(
    r"\d[-\s\\$€£¥₹\d.,/]*"
)  # in the reversed text: with everything before it that NUMBER may match
# Characters that may stand between "####" and its number.
DECORATION = re.compile(
    r"(?:[\s*:+=`$€£]|\\[$(\[]|\\(?:boxed|text)\{|[A-Z]_?\{?\d*\}?\s*=|(?:the )?(?:final )?answer(?: is)?\b)*", re.I
)
BULLET = re.compile(r"(?<=\n)[ \t]*-[ \t]+")  # no minus sign
MOST_DIGITS = 100  # a longer sequence of digits is an endless repetition, not a number


# The last mark does not count if the sentence goes on to say how the answer is found.
MARKERS = (
    r"the (?:final )?answer is:",
    r"\\boxed\s*\{",
    r"the (?:final )?answer is\b(?!:|\s+(?:a|an|as|found|given|in|not|obtained|that|the)\b)",
)
# "18 + 24 = 42": the value comes after the last equals sign of the sentence. A unit may stand before the operator.
OPERATOR = r"\s[-+*/]\s|[×÷·⋅]|\\(?:times|cdot|div)(?![A-Za-z])|(?<![A-Za-z])[xX](?=\s*\\?\$?\d)"
OPERATOR += r"|% of\b|\b(?:plus|minus|times|(?:multiplied|divided) by)\b"
EQUATION = re.compile(
    rf"\A(?:(?!\.\s).)*\d(?:\s*[-+*/]|(?:(?!\.\s)[^\d=\n]){{0,30}}?(?:{OPERATOR}))"
    r"(?:(?!\.\s).)*=(?=(?:(?!\.\s)[^=\n])*\d)"
)
NAME = re.compile(r"\b[A-Za-z]_?\{?\d+\}?(?=\s*=)")  # "x2 = 18"
MONEY = r"(?:\$\s?\d|\d[\d,.]* (?:dollars|cents|euros|pounds))"
EACH = re.compile(
    rf"\A\s*\d+ [a-z](?:(?!\.\s)[^\n\d$])*(?={MONEY}[^\n]* (?:each|apiece)\b)"
)  # "4 friends pay $80 each"
NO_END = re.compile(r"[:–-]\d|[²³^]|,\d")  # a time, a range, a power, a list: no number ends before it
MIXED = re.compile(r"(?<![\d.,/])(\d{1,9})\s+(\d{1,9})/(\d{1,9})(?!\d)")
GROUPS = re.compile(r"(?<![\d.,/])(\d{1,3})((?:[ \u00a0\u2009\u202f'’]\d{3})+)(?![\d/])")
DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d{1,2})(?![\d,])")
POWER_OF_TEN = re.compile(
    r"(?<![\d.])(\d+(?:\.\d+)?)(?:[eE]|\s*(?:\\times|\\cdot|[×x*])\s*10\s*(?:\^|\*\*)\s*\{?)([-+]?\d{1,2})\}?"
)
PARTS = r"half|halves|quarters?|thirds?|(?:four|fif|six|seven|eigh|nin|ten|twelf)ths?"
MORE = rf"hundred|thousand|million|and|{'|'.join(WORDS)}|{PARTS}"  # after these words the number is another one
WORD = re.compile(rf"\A[\s*:$]*({'|'.join(WORDS)})\b(?!(?:-|\s+)(?:{MORE})\b)", re.IGNORECASE)


def extract_answer(text: str) -> Fraction | None:
    """The number after the last "The answer is:"; else the number right after the last "####", which is a heading in
    Markdown too; else the number in the last \\boxed{}; else the number after "The answer is". None without any. A
    reasoning model's thoughts do not count."""
    text = after_thoughts(re.split("|".join(benchmark.BEGINNINGS), text)[0])
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{ZERO WIDTH SPACE}", " ")
    for marker in MARKERS:
        _, *answers = re.split(marker, text, flags=re.IGNORECASE)
        if answers:
            return next((value for found, value in map(_answer, reversed(answers)) if found), None)
        headings = map(_heading, reversed(text.split("####")[1:]))
        if found := next(filter(None, headings), None):
            return _ended(found)
    return None


def _answer(text: str) -> tuple[bool, Fraction | None]:
    """Whether an answer has a number, and the number, if it can be read."""
    text = _plain(text)
    if word := WORD.match(text):
        return True, Fraction(WORDS.index(word[1].lower()))
    found = NUMBER.search(EACH.sub("", NAME.sub("", EQUATION.sub("", text))))
    return found is not None, _ended(found)


def _heading(text: str) -> re.Match | None:
    """The number right after "####", or the value of an equation that begins there."""
    text = _plain(text)
    text = text[DECORATION.match(text).end() :]
    return NUMBER.search(EQUATION.sub("", text)) if NUMBER.match(text) else None


def _ended(found: re.Match | None) -> Fraction | None:
    return None if found is None or NO_END.match(found.string, found.end()) else _number(found)


def _plain(text: str) -> str:
    """Rewrites thousands, fractions, mixed numbers and powers of ten in the form that NUMBER reads."""
    text = BULLET.sub("", text)
    text = re.sub(r"(?<![\d ])( ?)–(?=\$?\d)", r"\1-", text)  # a dash for a minus sign
    text = re.sub("[¼-¾⅐-⅞]", lambda sign: " " + unicodedata.normalize("NFKC", sign[0]).replace("⁄", "/"), text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!;: ]|~)\s?(?=\d{3})", ",", text)
    text = GROUPS.sub(lambda groups: groups[1] + re.sub(r"\D", "", groups[2]), text)
    text = re.sub(r"\\[dt]?frac\s*(\d|\{-?\d+\})\s*(\d|\{\d+\})", lambda m: re.sub("[{}]", "", f" {m[1]}/{m[2]}"), text)
    text = DECIMAL_COMMA.sub(r"\1.\2", text)
    text = POWER_OF_TEN.sub(lambda found: str(Fraction(found[1]) * Fraction(10) ** int(found[2])), text)
    return MIXED.sub(lambda mixed: f"{int(mixed[1]) * int(mixed[3]) + int(mixed[2])}/{mixed[3]}", text)


PUBLISHED_NUMBER = re.compile(r"([-+]?\d*)([.,/]?)(\d+)")


def published_answer(text: str) -> int | None:
    """The answer as the published scripts read it: a whole number, whatever the completion says."""
    _, marker, answer = text.rpartition(PUBLISHED_MARKER)
    match = PUBLISHED_NUMBER.search(answer) if marker else None
    if match is None or len(match.group()) > MOST_DIGITS:
        return None
    left, mark, right = match.groups()
    if mark != "/":
        return round(float(left + mark.replace(",", "") + right))
    if left in ("", "-", "+"):
        return None
    return round(int(left) / int(right)) if int(right) else int(left)


def extract_last_number(text: str) -> Fraction | None:
    """The last number in the text: the lenient reading."""
    tail = LAST_DIGIT.search(BULLET.sub("", f"\n{text}")[::-1])
    numbers = list(NUMBER.finditer(tail[0][::-1])) if tail else []
    return _number(numbers[-1]) if numbers else None


def _number(match: re.Match | None) -> Fraction | None:
    if match is None or len(match.group()) > MOST_DIGITS:
        return None
    sign, digits, denominator = match.groups()
    value = Fraction(digits.replace(",", ""))
    if denominator is not None and int(denominator) != 0:
        value /= int(denominator)
    return -value if sign else value


def grade(completion: str, gold: Fraction) -> dict[str, Any]:
    """The extracted answer of a completion, and the three verdicts."""
    extracted, last = extract_answer(completion), extract_last_number(completion)
    return {
        "extracted": None if extracted is None else str(extracted),
        "correct": extracted == gold,
        "correct_strict": published_answer(completion) == gold,
        "last_number": None if last is None else str(last),
        "correct_lenient": last == gold,
    }


def gold_answer(answer: str, index: int, source: str) -> Fraction:
    """The number after "####", or the number that the answer is.

    Raises:
        UserError: there is none.
    """
    alone = NUMBER.fullmatch(answer.strip())
    gold = _number(alone) if alone else extract_answer(answer)
    if gold is None:
        raise UserError(f"item {index} of {source} has no '#### number' at the end of its answer")
    return gold


def solved(record: dict[str, str]) -> tuple[str, str]:
    """A solved example for the prompt: without GSM8K's calculator marks, ending as the graded answers do."""
    answer = re.sub(r"<<.*?>>", "", record["answer"]).strip()
    marked = f"####{answer}" if NUMBER.fullmatch(answer) else answer
    return record["question"], re.sub(r"\s*####\s*", "\nThe answer is: ", marked, count=1).strip()


def main(argv: list[str], load: LoadBackend | None = None) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    if args.loss_field and args.rescore:
        raise UserError("--loss-field needs a model, and --rescore loads none: leave one out")
    run = Run("gsm8k", args, load)
    fields, names = ["question", "answer"], {HUB_DATA: "main"}
    records = run.records(fields + ([args.loss_field] if args.loss_field else []), FORMAT, names=names)
    golds = [gold_answer(record["answer"], index, args.data) for index, record in enumerate(records)]
    examples = run.examples(fields, FORMAT, names=names)
    for index, record in enumerate(examples):
        gold_answer(record["answer"], index, "the examples")
    shots = [solved(record) for record in examples]
    # Without a template around it, a question needs words that say so, and that a model's next question begins with.
    form, stop = ("Question: {}\nAnswer:", ("Question:",)) if args.prompt == "raw" else ("{}", None)
    questions = [form.format(record["question"]) for record in records]
    shots = [(form.format(question), answer) for question, answer in shots]

    loss = None
    if args.loss_field:
        prompts = [run.encode(question, shots) for question in questions]
        responses = [encode_response(run.tokenizer, record[args.loss_field]) for record in records]
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        run.max_length = max(lengths) + 1  # vLLM makes a token after a response
    items = run.complete(questions, shots, stop=stop)
    if args.loss_field:
        loss = response_loss(run.backend(), prompts, responses)

    for item in items:
        gold = golds[item["index"]]
        item |= {"gold": str(gold), **grade(item["completion"], gold)}
        item["answered"] = item["extracted"] is not None
    scores = {
        "accuracy": share(items, "correct"),
        "accuracy_strict": share(items, "correct_strict"),
        "accuracy_lenient": share(items, "correct_lenient"),
        "answer_extracted": share(items, "answered"),
        "finished": share(items, "finished"),
        "response_loss": loss,
    }
    lines = [
        score_line("accuracy", scores["accuracy"]),
        score_line("accuracy, published rule", scores["accuracy_strict"]),
        score_line("accuracy, last number", scores["accuracy_lenient"]),
        score_line("answer extracted", scores["answer_extracted"]),
        score_line("finished in time", scores["finished"]),
    ]
    if loss is not None:
        lines.append(f"  {'response loss':24}{loss:6.3f}  nats per token")
    run.finish(items, scores, lines)


if __name__ == "__main__":
    run_script(main)
