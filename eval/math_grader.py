"""Whether two answers to a MATH problem are the same: by value (math-verify), and by spelling (the published rule).

`same_spelling` is the rule of the published numbers: Hendrycks et al. (arXiv 2103.03874) compare the answers as text
after some normalisation, and MetaMath, PiSSA and BA-LoRA adopted the rule. It knows no mathematics: 0.25 and \\frac14
differ. `same_value` asks math-verify, which parses both with sympy.

A model's answer may be 10^{10^{10}}, and sympy may compute forever, or use all memory. So each pair is compared in a
process of its own, which is killed at its limit of CPU time. `Grader` keeps servers and forks these processes from
them, so that none has to import sympy again; a server is this file, run as a script.
"""

import contextlib
import json
import logging
import operator
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

SECONDS = 5.0  # of CPU time, per pair
PATIENCE = 10  # the wall-clock time that a pair gets, in times of its CPU time: others may need the machine too
MEMORY = 2 * 2**30  # bytes of address space that a comparison may add

# ------------------------------------------------------------------------------------------------------------------
# Spelling
# ------------------------------------------------------------------------------------------------------------------

# Spellings that do not change the meaning, in the order in which they are removed.
SPELLINGS = (
    ("\n", ""),
    (r"\!", ""),
    (r"\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
)
UNIT = r"\text{ "  # a text that begins with a space names a unit
RATIO = re.compile(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)")


def same_spelling(answer: str, gold: str) -> bool:
    """Whether two answers are the same text after `normalized`; a text that it cannot read is compared as it is."""
    try:
        return normalized(answer) == normalized(gold)
    except ValueError:
        return answer == gold


def normalized(text: str) -> str:
    """The text in the one spelling that the published rule compares.

    Raises:
        ValueError: two units, or \\frac at the end.
    """
    for old, new in SPELLINGS:
        text = text.replace(old, new)
    if UNIT in text:
        text, _, rest = text.partition(UNIT)
        if UNIT in rest:
            raise ValueError("two units")
    text = text.replace(r"\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:  # "x = 5"
        text = value
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    if text == "0.5":
        return r"\frac{1}{2}"
    ratio = RATIO.fullmatch(text)
    return r"\frac{{{}}}{{{}}}".format(*ratio.groups()) if ratio else text


def _braced_roots(text: str) -> str:
    """\\sqrt3 as \\sqrt{3}."""
    return re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", text, flags=re.DOTALL)


def _braced_fractions(text: str) -> str:
    """\\frac12 and \\frac1{2} as \\frac{1}{2}."""
    head, *parts = text.split(r"\frac")
    for part in parts:
        if not part:
            raise ValueError("a fraction without arguments")
        if part[0] != "{" and len(part) == 1:
            return text
        if part[0] == "{":
            head += r"\frac" + part
        elif part[1] == "{":
            head += r"\frac{" + part[0] + "}" + part[1:]
        else:
            head += r"\frac{" + part[0] + "}{" + part[1] + "}" + part[2:]
    return head


# ------------------------------------------------------------------------------------------------------------------
# Value
# ------------------------------------------------------------------------------------------------------------------

WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
WORDS += "thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()  # noqa: SIM905
NOTHING = r"(?:there (?:is|are) )?(?:no (?:real |such )?(?:solutions?|values?)|none|(?:the )?empty set|\\varnothing|∅)"
NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
COUNTS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NO_UNITS = r"(?!(?:and|base|infinity|minus|mod|or|over|percent|pi|plus|sqrt|times|to)\b)"
# Characters that math-verify does not read everywhere; it reads π, ×, ∪ and others by itself.
SIGNS = {"−": "-", "∞": r"\infty ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in "}
SIGNS |= {"±": r"\pm ", "°": r"^\circ ", "\u200b": "", "\u00a0": " "}
# An argument as TeX reads it: braces, one letter or digit, or a symbol such as \pi that has no argument of its own.
ARGUMENT = r"\s*(\\(?!sqrt|[dt]?frac|left|text|mbox)[A-Za-z]+(?![A-Za-z])|[0-9A-Za-z]|\{[^{}]*\})"
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
# Forms that math-verify does not read, or misreads, and their replacements, in order.
READINGS: tuple[tuple[str, Any], ...] = (
    (r"\A\s*\*\*(?!\*)([^*]+)\*\*\s*\Z", r"\1"),  # Markdown's bold
    (r"\A\$([^$]*)\$\Z|\A\\\((.*)\\\)\Z|\A\\\[(.*)\\\]\Z", lambda m: m[1] or m[2] or m[3] or ""),
    (r"\A\\(?:text|mbox)\{\s*([-+]?[\d.][^{}]*)\}\Z", r"\1"),  # a number among the words
    ("|".join(SIGNS), lambda sign: SIGNS[sign[0]]),
    (r"[⁰¹²³⁴-⁹⁻]+", lambda digits: f"^{{{digits[0].translate(SUPERSCRIPTS)}}}"),
    (r"[¼-¾⅐-⅞]", lambda sign: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign[0]).split("⁄"))),
    (rf"\\([dt]?frac){ARGUMENT}{ARGUMENT}", lambda m: rf"\{m[1]}{{{m[2].strip('{}')}}}{{{m[3].strip('{}')}}}"),
    (r"√\s*(\d+|[a-z]|\{[^{}]*\}|\([^()]*\))", lambda root: rf"\sqrt{{{root[1].strip('{}()')}}}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<=[\w)}])\s*\*\*\s*(-?\w+|\([^()]*\))", r"^{\1}"),  # Python's power
    (r"(?<![\d.}])(\d+)\s+(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
    (
        r"\A([-+]?\\?\$?\d{1,3})((?:(?:\\[,!;: ]|\{,\}|~|\s)\s*\d{3})+)(?=\.\d|\Z)",
        lambda m: m[1] + re.sub(r"\D", "", m[2]),
    ),
    (rf"\A({NUMBER})[eE]([-+]?\d+)\Z", r"\1 \\times 10^{\2}"),
    (r"\A(-?\d*)\.(\d*)\\overline\{(\d+)\}\Z", lambda m: _repeating(*m.groups())),
    (r"\s*(?:\\text\{)?\s*\(?\s*\(?(?:in )?base[ -](\w+)\)?\}?\Z", r"_{\1}"),
    (r"_\{?(?:\\text\{)?(two|three|four|five|six|seven|eight|nine)\}?\}?\Z", lambda m: f"_{{{WORDS.index(m[1])}}}"),
    (r"\A\\text\{[^{}]*\b(?:is|are|equals)\s*:?\s*\}\s*(?=\S)", ""),  # a sentence in the box
    (
        rf"(?<![\w.,])({NUMBER})[\s~]*(\\text\{{\s*)?({'|'.join(COUNTS)})\b(?(2)\s*([^{{}}]*)\}})",
        lambda m: _counted(m[1], m[3], m[4]),
    ),
    (r"(?<=\d)(?:\s*\\(?:text|mbox)\{\s*|\s+)([AaPp])\.?\s?[Mm]\.?\s*\}?\Z", r"\\text{ \1m}"),
    (
        rf"\A({NUMBER}|\\[dt]?frac\{{\d+\}}\{{\d+\}})\s*{NO_UNITS}[A-Za-z]{{2,}}\.?(?: [a-z]+)*(?:\^\{{?\d\}}?)?\Z",
        r"\1",
    ),
    (rf"(?i)\A(?:\\text\{{)?({'|'.join(WORDS)})\}}?\Z", lambda m: str(WORDS.index(m[1].lower()))),
    (rf"(?i)\A(?:\\text\{{)?{NOTHING}\.?\}}?\Z", r"\\emptyset"),
)
COMPILED = [(re.compile(pattern), reading) for pattern, reading in READINGS]


def _repeating(whole: str, digits: str, period: str) -> str:
    """A repeating decimal as a fraction."""
    nines = 10 ** len(period) - 1
    value = Fraction(int(digits or 0) * nines + int(period), nines * 10 ** len(digits)) + abs(
        int(whole.strip("-") or 0)
    )
    return r"{}\frac{{{}}}{{{}}}".format("-" if whole.startswith("-") else "", *value.as_integer_ratio())


def _counted(number: str, word: str, unit: str | None) -> str:
    """A number of dozens, thousands or millions in digits, with its unit."""
    value = Fraction(number) * COUNTS[word]
    digits = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return digits + (rf"\text{{ {unit}}}" if unit else "")


def _both_signs(text: str) -> str:
    """The text with each a \\pm b of a list written out: a+b, a-b."""
    is_set = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    parts, depth = [""], 0
    for character in is_set[1] if is_set else text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    found = []
    for part in parts:
        before, *after = re.split(r"\\pm(?![A-Za-z])", part)
        if len(after) != 1:
            found.append(part)
            continue
        before = re.sub(r"\A\s*[A-Za-z]\s*(?:=|\\in\b)", "", before)
        found += [before + "+" * bool(re.search(r"[\w)}]\s*\Z", before)) + after[0], f"{before}-{after[0]}"]
    return rf"\{{{','.join(found)}\}}" if is_set else ",".join(found)


def _read(text: str) -> str:
    """The text in a form that math-verify reads correctly."""
    text = text.strip().removesuffix(".").strip()
    for pattern, reading in COMPILED:
        text = pattern.sub(reading, text).strip()
    text = text.removesuffix(".")
    return _both_signs(text) if r"\pm" in text else text


BASED = re.compile(r"(\d[0-9A-Z]*)_\{?(\d+)\}?")
PERCENT = re.compile(rf"([-+]?\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|{NUMBER})\s*\\?%")
DECIMAL = re.compile(r"[-+]?\d*\.\d+")
CHOICE = re.compile(r"(?:\\text\{)?\(?([A-J])(?:\)|\Z)\}?")
MARKED_CHOICE = re.compile(r"(?:\\text\{)?(?:\(([A-J])\)|([A-J])[.:)])\}?(?!\s*[-+=*/^])")
FURTHER_CHOICE = re.compile(
    r"\s*(?:,|(?:\\text\{)?\s*(?:and|or|&)(?![A-Za-z]))\s*\}?\s*(?:\\text\{)?(?:\([A-J]\)|[A-H]\b)"
)
HALF_DAY = re.compile(r"\\text\{ ([AaPp])m\}\Z")
UNIT_POWER = re.compile(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}\s*\^\{?(\d)")
LESS = r"\s*(<|\\l[et](?:q|qslant)?\b)\s*"
BETWEEN = re.compile(rf"(.+?){LESS}[A-Za-z]{LESS}(.+)")
ONE_SIDE = re.compile(r"[A-Za-z]\s*(<|>|\\[lg][et](?:q|qslant)?\b)\s*(.+)")


# An answer with one of these says more than its number: 5 feet 6 inches; 12 or less; \\le 5.
UNIT_WORDS = rf"(?:\\(?:text|mbox|mathrm)\{{\s*{NO_UNITS}[A-Za-z][A-Za-z .]*\}}\s*|{NO_UNITS}[A-Za-z]{{2,}}[A-Za-z .]*)"
SECOND_NUMBER = re.compile(rf"\d\s*{UNIT_WORDS}[-+]?\.?\d")
BOUND = re.compile(
    r"\b(?:or|at|no|not)(?:[\s}]|\\text\{)+(?:above|below|fewer|greater|higher|larger|least|less|lower|more|most|smaller)\b"
)
RELATION = r"(?:<|>|\\(?:[lg](?:e|t|eq|eqslant|qslant)|neq?|not|equiv)(?![A-Za-z]))"


def _says_more(answer: str, gold: str) -> bool:
    """Whether an answer has a second number after a unit, a bound or a relation, and the gold answer has none."""
    is_related = re.match(rf"(?:[A-Za-z]\s*)?{RELATION}", answer) and not re.search(RELATION, gold)
    return bool(is_related) or any(p.search(answer) and not p.search(gold) for p in (SECOND_NUMBER, BOUND))


OR = re.compile(r"\s*(?:\\(?:text|mbox)\{\s*or\s*\}|(?<!\\)\bor\b|\\lor\b|\\vee\b)\s*")


def _as_interval(text: str) -> str:
    """0<x<5 as (0,5), x \\ge 2 as [2,\\infty), several of these with "or" between them as their union; else the text
    as it is."""
    if len(parts := OR.split(text)) > 1:
        intervals = [_as_interval(part) for part in parts]
        return text if any(map(operator.eq, parts, intervals)) else r" \cup ".join(intervals)
    is_open = ("<", ">", r"\lt", r"\gt")
    if between := BETWEEN.fullmatch(text):
        low, left, right, high = between.groups()
        return f"{'(' if left in is_open else '['}{low},{high}{')' if right in is_open else ']'}"
    if one := ONE_SIDE.fullmatch(text):
        sign, end = one.groups()
        if sign[0] == ">" or sign[:2] == r"\g":
            return f"{'(' if sign in is_open else '['}{end},\\infty)"
        return f"(-\\infty,{end}{')' if sign in is_open else ']'}"
    return text


def _words(text: str) -> str:
    """The text without its \\text marks, and without blanks and case that mean nothing."""
    text = re.sub(r"\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}", r"\1", text)
    return " ".join(re.sub(r"\s*([^\w\s])\s*", r"\1", text).split()).lower()


def _decided(answer: str, gold: str) -> bool | None:
    """The verdict on answers that math-verify is not asked about: words, bases, percentages, choices, unit powers."""
    if _words(answer) == _words(gold) and answer:
        return True
    numbers = [BASED.fullmatch(text) for text in (answer, gold)]
    if any(numbers):
        values = []
        for number, text in zip(numbers, (answer, gold), strict=True):
            try:
                values.append(int(number[1], int(number[2])) if number else int(text))
            except ValueError:
                return None
        return values[0] == values[1] and bool(numbers[0] or not numbers[1])
    percents = [PERCENT.fullmatch(text) for text in (answer, gold)]
    if any(percents):
        value = _fraction(percents[0][1]) / 100 if percents[0] else _fraction(answer)
        if value is None or not (percents[1] or _fraction(gold) is not None):
            return None
        right = _fraction(percents[1][1]) / 100 if percents[1] else _fraction(gold)
        return value == right or (not percents[0] and value == 100 * right)
    choice, chosen = CHOICE.fullmatch(gold), MARKED_CHOICE.match(answer)
    if choice and chosen:
        return choice[1] == (chosen[1] or chosen[2]) and not FURTHER_CHOICE.match(answer, chosen.end())
    halves = [HALF_DAY.search(text) for text in (answer, gold)]
    if all(halves) and halves[0][1].lower() != halves[1][1].lower():
        return False
    units = [UNIT_POWER.search(text) for text in (answer, gold)]
    if all(units) and units[0][2] != units[1][2]:
        return False
    return None


def _fraction(text: str) -> Fraction | None:
    """A number that is written out in digits, or a fraction of two such numbers."""
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def same_value(answer: str, gold: str) -> bool:
    """Whether two answers have the same value, by math-verify where it can tell. Some answers take unlimited time and
    memory."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    answer, gold = _read(answer), _read(gold)
    decided = _decided(answer, gold)
    if decided is not None:
        return decided
    if re.match(r"(?:\\left)?\s*[\[(].*,", gold) and not re.search(r"[<>]|\\[lg][et]", gold):
        answer = _as_interval(answer)
    if _says_more(answer, gold):
        return False

    def value(text: str) -> list:
        return parse(_delimited(text), parsing_timeout=None)

    def are_equal(one: list, other: list) -> bool:
        return verify(one, other, timeout_seconds=None)

    golden, found = value(gold), value(answer)
    if not are_equal(golden, found):
        return False
    sides = answer.split("=")
    if len(sides) > 1 and "=" not in gold:  # "97 = 84" is no 84
        constants = [side for side in map(value, sides) if side and getattr(side[0], "is_number", False)]
        if not all(are_equal(constants[-1], side) for side in constants[:-1]):
            return False
    # math-verify compares six decimals: two decimals that differ later, or two small numbers, would be the same.
    needs_all_digits = any(map(DECIMAL.fullmatch, (answer, gold))) or _is_small(golden[0])
    return not needs_all_digits or _is_exact(found[0], golden[0], answer, gold)


def _is_small(value: Any) -> bool:
    """Whether a number has few of its digits among its first six decimals."""
    return bool(getattr(value, "is_number", False) and getattr(value, "is_real", False) and abs(value) < 0.01)


def _is_exact(found: Any, golden: Any, answer: str, gold: str) -> bool:
    """Whether two numbers that agree to six decimals are equal."""
    from sympy import Rational

    exact = [Rational(text) if DECIMAL.fullmatch(text) else value for text, value in ((answer, found), (gold, golden))]
    try:
        return bool((exact[0] - exact[1]).equals(0))
    except (TypeError, AttributeError):  # a set, an interval
        return True


def _delimited(text: str) -> str:
    """The text as a formula that math-verify finds: in \\boxed{}, or between dollar signs."""
    return text if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", text) else f"${text}$"


# ------------------------------------------------------------------------------------------------------------------
# One process per pair
# ------------------------------------------------------------------------------------------------------------------


class Grader:
    """Compares pairs of answers, several at a time, each within its time limit. A context manager: `with` closes it.

    Raises:
        UserError: math-verify does not work here.
    """

    def __init__(self, seconds: float = SECONDS, servers: int | None = None):
        self.seconds = seconds
        from eval.cores import available_cores  # here: a server is not run from the project's folder

        self.idle = [self._start() for _ in range(servers or min(8, available_cores()))]
        try:
            for server in self.idle:
                _await(server)
        except BaseException:
            self.close()
            raise

    def _start(self) -> subprocess.Popen:
        command, pipe = [sys.executable, __file__, str(self.seconds)], subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)

    def compare(self, pairs: list[tuple[str, str]], progress: Callable[[], Any] = lambda: None) -> list[dict[str, Any]]:
        """For each pair of answer and gold answer the verdicts `value` and `spelling`, and `problem`: None, "time" or
        "crash"; with a problem `value` is False."""

        def one(pair: tuple[str, str]) -> dict[str, Any]:
            server = self.idle.pop()
            try:
                server.stdin.write(json.dumps(pair).encode() + b"\n")
                server.stdin.flush()
                return json.loads(server.stdout.readline())
            except (BrokenPipeError, ValueError):  # the server itself was killed
                _stop(server)
                server = self._start()
                _await(server)
                return {"value": False, "spelling": False, "problem": "crash"}
            finally:
                self.idle.append(server)
                progress()

        with ThreadPoolExecutor(len(self.idle)) as pool:
            return list(pool.map(one, pairs))

    def close(self) -> None:
        for server in self.idle:
            _stop(server)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


READY = b"ready\n"  # a server's first line


def _await(server: subprocess.Popen) -> None:
    """Waits until a server can compare.

    Raises:
        UserError: it ended, or finds two equal numbers different.
    """
    from common.cli import UserError  # here: a server is not run from the project's folder

    if server.stdout.readline() != READY:
        lines = server.stderr.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1].strip() if lines else f"exit code {server.wait()}"
        raise UserError(f"math-verify does not work here ({reason}): install requirements.txt again")


def _stop(server: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):
        server.stdin.close()
    server.stdout.close()
    server.stderr.close()
    server.wait()


def serve(seconds: float) -> None:
    """Writes that it is ready, reads pairs from standard input, a line each, and answers them, until it is closed."""
    # The first use imports and compiles everything that later uses need too, here and in the forked processes.
    with contextlib.redirect_stderr(None), contextlib.redirect_stdout(None):
        works = same_value(r"\frac{1}{2}", "0.5") and not same_value(r"\frac{1}{3}", "0.5")
    if not works:
        sys.exit("it does not tell whether 1/2 and 1/3 are 0.5")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(1, READY)
    for line in sys.stdin:
        print(json.dumps(_compare_apart(*json.loads(line), seconds)), flush=True)


def _compare_apart(answer: str, gold: str, seconds: float) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _compare_here(answer, gold, writing)
    os.close(writing)
    deadline, received, late = time.monotonic() + PATIENCE * seconds, b"", False
    while not (late or received.endswith(b".")):
        if select.select([reading], [], [], seconds / 50)[0]:
            more = os.read(reading, 16)
            received += more
            if not more:
                break
        used = time.clock_gettime(~child << 3 | 2)  # the child's CPU time, by the kernel's id of this clock
        late = not received.endswith(b".") and (used >= seconds or time.monotonic() >= deadline)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    done = received.endswith(b".")
    return {
        "value": done and received[1:2] == b"1",
        "spelling": received[:1] == b"1",
        "problem": None if done else "time" if late else "crash",
    }


def _compare_here(answer: str, gold: str, writing: int) -> None:
    """In the forked process: writes the two verdicts as they are known, then a full stop; never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(2, 1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        os.write(writing, b"%d" % same_spelling(answer, gold))
        os.write(writing, b"%d." % same_value(answer, gold))
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
