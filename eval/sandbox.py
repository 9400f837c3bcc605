"""Runs programs that a model wrote, against tests, without letting them hurt this machine or forge their verdict.

Protects, where the kernel has namespaces (Linux 5.12 or newer; as root, or as a user where unprivileged user namespaces
are allowed):
- files: a program sees Python's standard library, system libraries and numpy, read-only, /dev/null, and an empty /tmp
  of its own; it can lock or watch none of them;
- the network, other processes, this process's environment, number and memory: none is reachable; no process can be
  started;
- other objects of the kernel (System V memory, queues and semaphores, keys, asynchronous I/O, sockets with a name, the
  host's name): none is reachable. Only the system calls on a list are allowed;
- memory, CPU time, waiting, disk and output are limited; at the limit the program ends with all its threads;
- the verdict: tests run in a process of their own, which talks to the program by plain data only (`sandbox_inside.py`).
Inside a container without namespaces, Landlock and the same list give the same with these exceptions: a program can
fill the disk that holds the temporary folder, which is cleared afterwards whatever rights the program took from it; can
see whether a file exists, with its size, owner, rights and times (not what it holds, nor where a link leads); sees the
host's name and its judge's process number; and as root can start as many threads as its memory holds.

Does not protect against: a hole in the kernel; reading what the CPU's caches leak; slowing this machine down within the
limits. The tests themselves are trusted not to forge their own verdict. It is made for code by models that err, and for
code that tries to look as if it passed; keep no secret on a machine that runs code by an adversary.

There are two differences from running program and tests in one plain process. Arguments are copies: a test cannot see
changes that the program makes to a list (HumanEval and MBPP have no such test), and a program cannot change a test's
data. And a program that imports anything but Python's standard library and numpy fails. Tests that do so are no verdict
on the program: they stop the run.
"""

import contextlib
import functools
import importlib.util
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.cli import RunStopped, UserError
from eval.cores import available_cores
from eval.sandbox_inside import PATIENCE, receive, send
from eval.system_calls import filter_program

INSIDE = Path(__file__).with_name("sandbox_inside.py")
GRACE = 1.0  # so many seconds after its deadline a program is killed from outside, if the judge has not ended it


@dataclass(frozen=True)
class Program:
    """The model's code and the tests that judge it."""

    candidate: str  # source that is not trusted
    tests: str  # source that passes by running to its end
    names: tuple[str, ...]  # the candidate's names that tests use; other names are the tests', setup's or built-in
    setup: str = ""  # source that runs before the names are bound: the tests' imports, the prompt's helpers


@dataclass(frozen=True)
class Limits:
    timeout: float = 10.0  # seconds of CPU time; and of waiting (see `Clock` in sandbox_inside.py)
    memory_mib: int = 1024  # address space
    disk_mib: int = 64  # /tmp, all files together (with Landlock: not limited)
    file_mib: int = 16  # one file, and the output
    output_bytes: int = 2000  # how much of the output a verdict keeps


@dataclass(frozen=True)
class Verdict:
    verdict: Literal["passed", "failed", "timed out"]
    detail: str  # one line that says why it did not pass
    output: str  # the beginning of what the program printed

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


@dataclass(frozen=True)
class Isolation:
    """The separation of programs from this machine, which is found out by running one."""

    level: Literal["namespaces", "landlock", "none"]
    filter: bool  # whether system calls are filtered
    problems: tuple[str, ...]  # why the isolation is not stronger

    def describe(self) -> str:
        """For the user, at the start of a run."""
        if self.level == "namespaces":
            text = "namespaces" + (" and a list of allowed system calls" if self.filter else ", no system-call filter")
            text += (
                ": programs see Python's library, numpy and an empty /tmp, have no network, no other processes and none"
                " of this environment; not isolated: the kernel itself"
            )
        elif self.level == "landlock":
            text = (
                "Landlock and a list of allowed system calls: programs see Python's library, numpy and an empty folder,"
                " have no network and start no processes; not isolated: the kernel itself, free disk space, whether a"
                " file exists, with its size, owner, rights and times, the host's name"
            )
        else:
            text = "NONE: programs can read and change whatever this user can" + (
                "; a system-call filter keeps them from the network and from other processes"
                if self.filter
                else ", use the network and leave processes behind"
            )
        return "\n".join([f"sandbox: {text}", *(f"  (why not more: {problem})" for problem in self.problems)])


@functools.cache
def isolation() -> Isolation:
    """The strongest isolation that works here."""
    problems: list[str] = []
    attempts = [("namespaces", True), ("namespaces", False), ("landlock", True), ("none", True), ("none", False)]
    for level, with_filter in attempts:
        found = Isolation(level, with_filter, tuple(problems))
        try:
            # With an import: a library that lies below /tmp, for example, is not visible in namespaces.
            verdict = _run(Program("import dataclasses\ndef f(): return 1", "assert f() == 1", ("f",)), Limits(), found)
            if verdict.passed:
                return found
            problem = f"{level}: {verdict.detail}"
        except (SandboxError, OSError) as error:
            problem = f"{level}: {error}"
        if problem not in problems:
            problems.append(problem)
    raise SandboxError(f"the sandbox does not work here at all: {problems[-1]}")


def require_isolation(unsafe: bool = False) -> Isolation:
    """The result of `isolation`. Without isolation nothing is run, unless the user allows it.

    Raises:
        UserError: this machine offers none and `unsafe` is not set.
    """
    found = isolation()
    if found.level == "none" and not unsafe:
        reasons = "; ".join(found.problems)
        raise UserError(
            "this machine offers no way to isolate the programs that the model wrote: run where user namespaces or "
            f"Landlock are allowed, or accept the risk with --unsafe ({reasons})"
        )
    return found


class SandboxError(RunStopped):
    """A program was not run, for a reason that is not its own."""


def run_programs(
    programs: Iterable[Program], limits: Limits | None = None, *, unsafe: bool = False, workers: int | None = None
) -> Iterator[Verdict]:
    """Yields one verdict per program, in order, as they come.

    Args:
        workers: programs at a time; None: as many as this process has cores.

    Raises:
        UserError: see `require_isolation`; or tests that cannot run, whatever the program is: their setup raises an
            exception, they are no Python, or they import what the sandbox does not have.
        SandboxError: the isolation worked at first and does not any more.
    """
    limits, found = limits or Limits(), require_isolation(unsafe)
    waiting: list[_Starter] = []
    try:
        with ThreadPoolExecutor(workers or available_cores()) as pool:
            futures = [pool.submit(_run, program, limits, found, waiting) for program in programs]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()
    finally:
        for starter in waiting:
            starter.end()


class _Starter:
    """A process of `sandbox_inside.py` that has done its imports: a program costs a fork, not an interpreter."""

    def __init__(self):
        # -s -S -P: no site packages, nothing imported from the working folder. Not -I: it would ignore PYTHONHASHSEED,
        # without which the order of a set, and with it a verdict, may change from run to run.
        self.process = subprocess.Popen(
            [_interpreter(), "-s", "-S", "-P", "-B", "-u", str(INSIDE)],
            env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, settings: dict[str, Any], program: Program, seconds: float) -> list[Any]:
        """The messages that come back: "ready", the verdict and "ended"; fewer if this process or the program's ended.

        Raises:
            TimeoutError: the program takes longer; this process is then ended.
        """
        stdin, stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        messages: list[Any] = []
        poll, deadline = select.poll(), time.monotonic() + seconds
        poll.register(stdout, select.POLLIN)
        try:
            send(stdin, settings)
            send(stdin, vars(program))
            while "ended" not in messages:
                if not poll.poll(1000 * max(0, deadline - time.monotonic())):
                    raise TimeoutError
                messages.append(receive(stdout))
        except (EOFError, BrokenPipeError):
            pass
        except BaseException:
            self.end()
            raise
        return messages

    def end(self) -> str:
        """Ends this process and all that it started (in namespaces by their process 1, elsewhere by its group); returns
        its last output."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        _, err = self.process.communicate()
        return (err.decode(errors="replace").strip().splitlines() or [f"exit code {self.process.returncode}"])[-1]


def _run(program: Program, limits: Limits, found: Isolation, waiting: list[_Starter] | None = None) -> Verdict:
    """The program's verdict, by a process of `waiting`; the process returns there if nothing of the program is left."""
    starter = waiting.pop() if waiting else _Starter()
    with _folder(found) as folder:
        settings = vars(limits) | {"level": found.level, "folder": folder}
        settings["filter"] = filter_program().hex() if found.filter else ""
        settings |= {"visible": _visible_folders(), "hidden": _package_folders(), "packages": packages()}
        try:
            messages = starter.run(settings, program, PATIENCE * limits.timeout + GRACE)
        except TimeoutError:
            return Verdict("timed out", f"after {limits.timeout:g} s", "")
        is_whole = len(messages) == 3
        if is_whole and found.level == "namespaces" and waiting is not None:
            waiting.append(starter)
        else:
            last_words = starter.end()
    if is_whole and messages[1]["verdict"] == "not judged":
        tested, why = ", ".join(program.names) or "a program", messages[1]["detail"]
        raise UserError(f"the tests of {tested} cannot run in the sandbox (Python's library, numpy, plain data): {why}")
    if is_whole:
        return Verdict(**messages[1])
    if "ready" in messages:
        return Verdict("failed", "the judge was ended", "")
    raise SandboxError(last_words)


@contextlib.contextmanager
def _folder(found: Isolation) -> Iterator[str]:
    """The folder that the program writes to: in namespaces a /tmp of its own."""
    if found.level == "namespaces":
        yield "/tmp"
        return
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        yield folder
    finally:  # not shutil.rmtree, which fails on deeply nested folders
        # The second time with what a program took from its folders: the right to list and change them.
        for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            if os.path.exists(folder):
                subprocess.run([*command, folder], stderr=subprocess.DEVNULL, check=False)


def _interpreter() -> str:
    return getattr(sys, "_base_executable", None) or sys.executable  # not the virtual environment's: it has packages


@functools.cache
def _visible_folders() -> dict[str, str]:
    """The folders of Python's standard library, and of the shared libraries that its modules load, with their places
    after all links."""
    library = sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix})
    folders = [library, sysconfig.get_path("platstdlib", vars={"base": sys.base_prefix, "platbase": sys.base_prefix})]
    folders += [os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    found = sorted({folder for folder in folders if folder and os.path.isdir(folder)})  # parents before children
    return {folder: os.path.realpath(folder) for folder in found}


@functools.cache
def packages() -> list[str]:
    """The packages that a program may import beside the standard library: numpy, if installed, with its libraries."""
    found = importlib.util.find_spec("numpy")
    folder = os.path.realpath(os.path.dirname(found.origin)) if found else ""
    return [path for path in (folder, f"{folder}.libs") if folder and os.path.isdir(path)]


@functools.cache
def _package_folders() -> list[str]:
    """Installed packages: one of them may hold a benchmark's solutions."""
    names = ("site-packages", "dist-packages", "python3*/site-packages", "python3*/dist-packages")
    found = {path for folder in _visible_folders() for name in names for path in Path(folder).glob(name)}
    return sorted(str(path) for path in found | {path.resolve() for path in found})
