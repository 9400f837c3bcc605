"""Whether two answers to a MATH problem are the same: by value (math-verify), and by spelling (the published rule).

`same_spelling` is how the published numbers were graded: Hendrycks et al. (arXiv 2103.03874) compare the answers as
text after some normalisation, and MetaMath, PiSSA and BA-LoRA took that over. It knows no mathematics: 0.25 is not
\\frac14 to it. `same_value` asks math-verify, which parses both with sympy.

A model's answer may be 10^{10^{10}}: what sympy makes of it can take forever, or all memory. So each pair is compared
in a process of its own, which is killed at its limit of CPU time. `Grader` keeps servers from which these processes are
forked, so that none of them has to import sympy again; a server is this file, run as a script.
"""

import contextlib
import json
import logging
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS = 5.0  # of CPU time, per pair
PATIENCE = 10  # the wall-clock time that a pair gets, in times of its CPU time: others may need the machine too
MEMORY = 2 * 2**30  # bytes of address space that a comparison may add

# ------------------------------------------------------------------------------------------------------------------
# Spelling
# ------------------------------------------------------------------------------------------------------------------

# What is written in several ways without meaning anything else, in the order in which it is taken out.
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
    """Whether two answers are one text after `normalized`; texts that it cannot read are compared as they are."""
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


def same_value(answer: str, gold: str) -> bool:
    """Whether math-verify holds two answers for equal. Takes as long, and as much memory, as they make it take."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return verify(
        parse(_delimited(gold), parsing_timeout=None),
        parse(_delimited(answer), parsing_timeout=None),
        timeout_seconds=None,
    )


def _delimited(text: str) -> str:
    """As math-verify looks for formulas: in \\boxed{}, or between dollar signs; without Markdown's bold around it."""
    text = re.sub(r"\A\s*\*\*(?!\*)([^*]+)\*\*\s*\Z", r"\1", text)
    return text if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", text) else f"${text}$"


# ------------------------------------------------------------------------------------------------------------------
# One process per pair
# ------------------------------------------------------------------------------------------------------------------


class Grader:
    """Compares pairs of answers, several at a time, each within its time limit. To be closed: a context manager."""

    def __init__(self, seconds: float = SECONDS, servers: int | None = None):
        self.seconds = seconds
        from common.cores import available_cores  # here: a server is not run from the project's folder

        self.idle = [self._start() for _ in range(servers or min(8, available_cores()))]

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, __file__, str(self.seconds)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def compare(self, pairs: list[tuple[str, str]], progress: Callable[[], Any] = lambda: None) -> list[dict[str, Any]]:
        """For each pair of answer and gold answer the two verdicts, `value` and `spelling`, and `problem`: None, "time"
        or "crash", and then the value counts as another one."""

        def one(pair: tuple[str, str]) -> dict[str, Any]:
            server = self.idle.pop()
            try:
                server.stdin.write(json.dumps(pair).encode() + b"\n")
                server.stdin.flush()
                return json.loads(server.stdout.readline())
            except (BrokenPipeError, ValueError):  # the server itself was killed
                _stop(server)
                server = self._start()
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


def _stop(server: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):
        server.stdin.close()
    server.stdout.close()
    server.wait()


def serve(seconds: float) -> None:
    """Answers pairs on standard input, a line each, until it is closed."""
    import math_verify  # noqa: F401  # here, so that the forked processes have it

    # The first use imports and compiles what every later one needs too.
    with contextlib.redirect_stderr(None):
        same_value(r"\frac{1}{2}", "0.5")
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
        used = time.clock_gettime(~child << 3 | 2)  # of the child's CPU time, by the kernel's name for it
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
