"""MATH: what is extracted, what both graders hold for the same, and that no answer can hold them up."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest

from common.cli import UserError
from eval import hendrycks_math, math_grader

TABLE = (Path(__file__).parent / "math_pairs.tsv").read_text().splitlines()
PAIRS = list(csv.DictReader(TABLE, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def grader():
    with math_grader.Grader(seconds=30) as grader:
        yield grader


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{5", None),
        (r"\boxed{1} \boxed{", None),
        (r"\boxedness{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box(text, expected):
    assert hendrycks_math.last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is: 5", "5"),
        ("The answer is: 5.", "5"),
        ("The answer is: 0.5", "0.5"),
        ("The answer is: 5.\nNext problem: 6.", "5"),
        ("The answer is: 3. No:\nThe answer is: 4", "4"),
        (r"So \boxed{3}. The answer is: 4", "4"),
        (r"So \boxed{3}.", "3"),
        ("The answer is: ", None),
        ("It is 5", None),
        ("The answer is: 12. So the larger one is 7.", "12"),
        ("The answer is: 12\n\nLet me know!", "12"),
        ("The answer is: 12\n\n### Instruction:\nThe answer is: 7", "12"),
        ("The answer is: 12, because 5 + 7 = 12", "12"),
        (r"The answer is: $\frac{3}{4}$, since $3/4 = 0.75$", r"$\frac{3}{4}$"),
        ("The answer is:\n\\[\n\\frac{3}{4}\n\\]", "\\[\n\\frac{3}{4}\n\\]"),
        ("The answer is: $12$ or $13$", "$12$ or $13$"),
        ("**The answer is: 12**", "12"),
        (r"So \boxed{12}. I have marked it with \boxed as asked.", "12"),
        (r"\boxed{12}, \boxed{12", "12"),
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "1, 2"),
        (r"First \boxed{8}. So again \boxed{9}.", "9"),
        ("the answer is: 12", "12"),
        ("So the answer is 12.", "12"),
        ("The answer is not 12.", None),
        ("**Final Answer**\n\n$12$", "$12$"),
        (r"The answer is 7, I thought; no: \boxed{8}", "8"),
        (r"<think>The answer is: 17? No.</think> It is $\boxed{18}$.", "18"),
        ("<thinking>The answer is: 17</thinking>The answer is: 18", "18"),
        (r"<think>It is $\boxed{18}$.</think> ", "18"),
    ],
)
def test_extracted_answers(text, expected):
    assert hendrycks_math.extract_answer(text) == expected


def test_maths_own_solutions_are_all_right(shared_data):
    """500 gold answers by both rules, in their solutions and after the marker; and none with a digit before it."""
    rows = [json.loads(line) for line in (shared_data / "math500.jsonl").read_text().splitlines()]
    golds = [hendrycks_math.gold_answer(row["solution"], index, "math500") for index, row in enumerate(rows)]
    assert golds == [row["answer"] for row in rows]
    assert len(golds) == 500
    boxed, marked = [row["solution"] for row in rows], [f"So.\nThe answer is: {gold}." for gold in golds]
    for completions, strict in ((boxed, 0), (marked, 500)):  # the published rule knows no box
        verdicts = hendrycks_math.grade(completions, golds, seconds=30)
        assert sum(verdict["correct"] for verdict in verdicts) == 500
        assert sum(verdict["correct_strict"] for verdict in verdicts) == strict
    wrong = hendrycks_math.grade([f"So.\nThe answer is: 9{gold}." for gold in golds[::10]], golds[::10], seconds=30)
    assert not any(verdict["correct"] or verdict["correct_strict"] for verdict in wrong)


def test_the_table_of_pairs(grader):
    """Every pair's two verdicts; where one is not the truth, the table says why."""
    verdicts = grader.compare([(pair["answer"], pair["gold"]) for pair in PAIRS])
    columns = ("math-verify", "published rule")
    actual = [
        (pair["answer"], pair["gold"], *("yes" if verdict[name] else "no" for name in ("value", "spelling")))
        for pair, verdict in zip(PAIRS, verdicts, strict=True)
    ]
    assert actual == [tuple(pair[name] for name in ("answer", "gold", *columns)) for pair in PAIRS]
    for pair in PAIRS:
        wrong = any(pair[name] != pair["equivalent"] for name in columns)
        assert wrong == bool(pair["why a verdict is not the truth"]), pair
    unseen = [("1\n000", "1000"), ("1\u200b8", "18"), ("no\u00a0solution", r"\emptyset")]  # characters for no table
    assert all(verdict["value"] for verdict in grader.compare(unseen))
    assert math_grader.same_spelling(*unseen[0])


HOSTILE = {
    "tower": "10^{10^{10}}",
    "taller_tower": "2^{2^{2^{2^{2^{2}}}}}",
    "python_power": "10**10**10",
    "factorial": "100000000!",
    "binomial": r"\binom{10^9}{10^8}",
    "sum": r"\sum_{k=1}^{10^9} k^{k}",
    "integral": r"\int_0^1 x^{1000000} dx",
    "expansion": "(x+1)^{100000}",
    "round_brackets": "(" * 5000 + ")" * 5000,
    "fractions": r"\frac{" * 3000,
    "open_braces": "{" * 100_000,
    "roots": r"\sqrt{" * 2000 + "1" + "}" * 2000,
    "null_bytes": "\x00" * 10,
    "surrogate": "\ud800",
    "digits": "1" * 10**6,
    "letters": "x" * 10**6,
    "boxes": r"\boxed{" * 10**5,
    "dollars": "$" * 10**6,
    "terms": "+".join(f"x_{{{i}}}" for i in range(20_000)),
    "matrix": r"\begin{pmatrix}" + "1&" * 10_000 + r"1\end{pmatrix}",
    "nothing": "",
}


def test_no_answer_takes_longer_than_its_limit_or_ends_the_run():
    limit = 1.0
    with math_grader.Grader(limit, servers=2) as grader:
        grader.compare([("5", "5")] * 4)  # both servers have started
        for name, answer in HOSTILE.items():
            started = time.monotonic()
            (verdict,) = grader.compare([(answer, "5")])
            # CPU time is limited; others may keep a comparison waiting.
            assert time.monotonic() - started < math_grader.PATIENCE * limit + 2, name
            assert (verdict["value"], verdict["spelling"]) == (False, False), name
        assert grader.compare([("10^{10^{10}}", "5")])[0]["problem"] == "time"
        assert grader.compare([("5", "5"), ("6", "5")]) == [
            {"value": True, "spelling": True, "problem": None},
            {"value": False, "spelling": False, "problem": None},
        ]


def test_extraction_is_quick_on_long_completions():
    for text in (
        r"\boxed{" * 10**5,
        "{" * 10**6,
        "The answer is:" * 10**5,
        r"\boxed" * 10**5,
        r"\boxed{" + "{}" * 10**6,
    ):
        started = time.process_time()
        hendrycks_math.extract_answer(text)
        assert time.process_time() - started < 2


def test_a_killed_server_is_replaced():
    with math_grader.Grader(5, servers=1) as grader:
        os.kill(grader.idle[0].pid, signal.SIGKILL)
        assert grader.compare([("5", "5")])[0]["problem"] == "crash"
        assert grader.compare([("5", "5")])[0]["value"]


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("raise ImportError('another antlr')", "ImportError: another antlr"),
        ("def parse(*_, **__): return []\ndef verify(*_, **__): return False", "does not tell whether"),
        ("def parse(*_, **__): return [1]\ndef verify(*_, **__): return True", "does not tell whether"),
        ("import os\nos._exit(3)", "exit code 3"),
    ],
)
def test_a_comparer_that_does_not_work_is_no_verdict(package, reason, tmp_path, monkeypatch):
    """Neither at the start nor in the place of a killed server: one line with the server's own last words."""
    (tmp_path / "math_verify.py").write_text(package)
    with math_grader.Grader(5, servers=1) as grader:
        os.kill(grader.idle[0].pid, signal.SIGKILL)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        with pytest.raises(UserError, match=reason):
            grader.compare([("5", "5")])
    with pytest.raises(UserError, match=reason):
        math_grader.Grader(5, servers=2)


def test_no_process_is_left():
    with math_grader.Grader(1, servers=2) as grader:
        grader.compare([("10^{10^{10}}", "5")])
        servers = list(grader.idle)
    assert all(server.returncode == 0 for server in servers)


def test_the_spelling_of_answers_that_cannot_be_read():
    """As the published rule has it: what breaks the normalisation is compared as it is."""
    assert math_grader.same_spelling(r"\frac", r"\frac")
    assert not math_grader.same_spelling(r"\frac", "5")
    assert math_grader.same_spelling(r"5\text{ a}\text{ b}", r"5\text{ a}\text{ b}")
    assert not math_grader.same_spelling(r"5\text{ a}\text{ b}", "5")
