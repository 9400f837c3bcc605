"""Hostile programs do not pass, do not touch the host and do not stay; honest ones get the verdict of a plain run."""

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from hostile_programs import PROGRAMS, TESTS

from common.cli import UserError
from eval import cores, sandbox, sandbox_inside, system_calls
from eval.sandbox import Isolation, Limits, Program, Verdict, run_programs
from eval.sandbox_inside import PATIENCE

FIND_ISOLATION = sandbox.isolation.__wrapped__  # past its cache, and past the fixture `level` that replaces it
LIMITS = Limits(timeout=2.0, memory_mib=512)
LEVELS = {"namespaces": Isolation("namespaces", True, ()), "landlock": Isolation("landlock", True, ())}
# Landlock has no limit on the disk as a whole, nor on the time that clearing it takes: `sandbox.py` says so.
NOT_STOPPED = {("landlock", "disk_bomb_many"), ("landlock", "inode_bomb"), ("landlock", "deep_folders")}
SECRET = "hunter2"
HONEST = Program("def f(x): return sorted(x)", "assert f([3, 1, 2]) == [1, 2, 3]", ("f",))


@pytest.fixture(params=list(LEVELS), scope="module")
def level(request):
    """Each kind of isolation that this machine has."""
    found = LEVELS[request.param]
    try:
        sandbox._run(Program("", "", ()), LIMITS, found)
    except sandbox.SandboxError as error:
        pytest.skip(f"no {request.param} here: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "isolation", lambda: found)
        yield request.param


def run(candidate: str, tests: str, names: tuple[str, ...] = ("f",), setup: str = "", **limits) -> Verdict:
    (verdict,) = run_programs([Program(candidate, tests, names, setup)], Limits(**{"timeout": 5.0} | limits))
    return verdict


class Host:
    """What the programs are after, and what remains of their visit."""

    def __init__(self, folder: Path):
        folder.chmod(0o777)
        self.canary, self.secret = folder / "canary", folder / "secret"
        for path in (self.canary, self.secret):
            path.write_text(SECRET)
            path.chmod(0o666)
        self.servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
        self.servers[1].bind(("127.0.0.1", 0))
        unix, abstract = f"{folder}/socket", f"sandbox-test-{folder.name}-{os.getpid()}"
        for name in (unix, "\0" + abstract):
            self.servers.append(socket.socket(socket.AF_UNIX))
            self.servers[-1].bind(name)
            self.servers[-1].listen()
        self.before = self.state()
        self.told = {
            "canary": str(self.canary),
            "secret": str(self.secret),
            "home": str(Path.home()),
            "pid": os.getpid(),
            "address": id(self),
            "tcp": self.servers[0].getsockname()[1],
            "udp": self.servers[1].getsockname()[1],
            "unix": unix,
            "abstract": abstract,
        }

    def state(self) -> tuple:
        folder = self.canary.parent
        files = {path.name: (path.lstat().st_mode, path.is_file() and path.read_bytes()) for path in folder.iterdir()}
        return files, os.getpriority(os.PRIO_PROCESS, 0), resource.getrlimit(resource.RLIMIT_NOFILE)

    def visitors(self) -> list[int]:
        """The servers that something has arrived at."""
        arrived = []
        for index, server in enumerate(self.servers):
            server.setblocking(False)
            try:
                server.accept() if index != 1 else server.recv(1)
                arrived.append(index)
            except BlockingIOError:
                pass
        return arrived


def sandboxes_below(*starters: int) -> list[str]:
    """Processes of sandboxes that these processes started: by their command line; as root by their user too, which no
    program can change."""
    parents, inside = {}, set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[entry.name] = re.search(r"PPid:\s*(\d+)", (entry / "status").read_text())[1]
                if b"sandbox_inside.py" in (entry / "cmdline").read_bytes() or 61184 <= entry.stat().st_uid < 65520:
                    inside.add(entry.name)
    below = []
    for process in inside:
        started_by = process
        while started_by in inside:
            started_by = parents[started_by]
        if int(started_by) in starters:
            below.append(process)
    return below


@pytest.fixture(scope="module")
def visit(level, tmp_path_factory):
    """Runs every hostile program once, an honest one after it; name: both verdicts and the seconds they took."""
    host = Host(tmp_path_factory.mktemp("host"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANDBOX_TEST_KEY", SECRET)

        def timed(name: str) -> tuple[Verdict, Verdict, float]:
            started = time.monotonic()
            source = f"HOST = {host.told!r}\n{PROGRAMS[name][1]}"
            verdict, next_one = run_programs([Program(source, TESTS, ("f",)), HONEST], LIMITS, workers=1)
            return verdict, next_one, time.monotonic() - started

        with ThreadPoolExecutor(2) as pool:
            results = dict(zip(PROGRAMS, pool.map(timed, PROGRAMS), strict=True))
    remaining = sandboxes_below(os.getpid(), 1)  # 1: what nobody waits for any more
    time.sleep(3.5)  # detached_grandchild writes after 3 s
    return results, host, remaining


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - {"not_python", "compiler_bomb"}))
def test_an_attack_is_python(name):
    compile(PROGRAMS[name][1], name, "exec")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_does_not_pass(name, visit, level):
    if (level, name) in NOT_STOPPED:
        pytest.skip("stated as not limited")
    verdict, next_one, seconds = visit[0][name]
    assert not verdict.passed, PROGRAMS[name][0]
    assert next_one.passed
    assert f"{verdict.detail}{verdict.output}".encode()  # can be written to a file
    assert seconds < LIMITS.timeout * PATIENCE + 2  # CPU time is limited; others may keep a program waiting


def test_the_host_is_as_it_was(visit):
    _, host, _ = visit
    assert host.state() == host.before
    assert host.visitors() == []


def test_no_process_is_left(visit):
    assert visit[2] == []


def test_nothing_outlives_a_killed_run(level, tmp_path, monkeypatch):
    """The asking process ends without a chance to clean up; the program would sleep for a minute."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the folder stays that nobody removes
    child = os.fork()
    if child == 0:
        list(run_programs([Program("import time\ntime.sleep(60)", "", ())], Limits(timeout=60), workers=1))
        os._exit(0)
    deadline = time.monotonic() + 30
    while len(found := sandboxes_below(child)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    found = sandboxes_below(child)
    assert len(found) >= 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 2
    while any(Path("/proc", pid).exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in found if Path("/proc", pid).exists()] == []


def test_the_attacks_work_without_a_sandbox(tmp_path):
    """So that a typing error in an attack is not taken for a wall: those that can run in a plain process do harm."""
    host = Host(tmp_path)
    for name in ("write_outside", "append_outside", "read_secret", "list_home", "symlink_out_read", "connect_loopback"):
        namespace = {"HOST": host.told}
        exec(PROGRAMS[name][1], namespace)
        here = os.getcwd()
        os.chdir(tmp_path)
        try:
            assert namespace["f"](3) == 9
        finally:
            os.chdir(here)
    assert host.state() != host.before
    assert host.visitors() == [0]


# What honest programs get ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "True",
        "-3",
        "10**4000",
        "-(2**63)",
        "0.1 + 0.2",
        "float('inf')",
        "1e-320",
        "2 - 3j",
        "'\\ud800 \\0 ü \\U0001F600'",
        "b'\\0\\xff'",
        "bytearray(b'x')",
        "[1, [2.5, ('a', None)]]",
        "()",
        "{1, 'a', (2, 3)}",
        "frozenset([frozenset([1])])",
        "{(1, 2): {'a': [1]}, None: False}",
        "range(2, 20, 3)",
        "collections.Counter('banana')",
        "collections.OrderedDict(b=1, a=2)",
        "collections.deque([1, 2])",
        "decimal.Decimal('0.1')",
        "fractions.Fraction(1, 3)",
        "array.array('d', [1, 2.5])",
        "datetime.date(2024, 2, 29)",
        "datetime.datetime(2024, 2, 29, 23, 59, 1, 7, zoneinfo.ZoneInfo('Europe/Berlin'), fold=1)",
        "datetime.time(1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3)))",
        "datetime.timedelta(-1, 2, 3)",
        "numpy.int64(-3)",
        "numpy.bool_(True)",
        "numpy.float64(0.1)",
        "numpy.float16(0.1)",
        "numpy.longdouble(1) / 3",
        "numpy.complex64(1j)",
        "numpy.datetime64('2024-02-29', 'D')",
        "numpy.str_('ü')",
    ],
)
def test_plain_data_comes_back_as_it_was(value, level):
    """Both ways: as argument and as result; equal, of the same type, and written the same."""
    setup = f"import array, collections, datetime, decimal, fractions, numpy, zoneinfo\nvalue = {value}"
    tests = "assert f(value) == value\nassert type(f(value)) is type(value)\nassert repr(f(value)) == repr(value)"
    assert run("def f(x): return x", tests, setup=setup).passed


@pytest.mark.parametrize(
    ("candidate", "tests"),
    [
        ("import collections\ndef f(): return collections.namedtuple('P', 'x y')(1, 2)", "assert f() == (1, 2)"),
        ("import collections\ndef f(): return collections.defaultdict(int, a=1)", "assert f() == {'a': 1}"),
        ("import enum\nclass E(enum.IntEnum):\n    A = 3\ndef f(): return E.A", "assert f() == 3"),
        ("def f(): return (i * i for i in range(3))", "assert list(f()) == [0, 1, 4]"),
        ("def f(): return map(str, [1, 2])", "assert ','.join(f()) == '1,2'"),
        ("def f(): return {1: 2}.keys()", "assert sorted(f()) == [1] and len(f()) == 1"),
        ("import re\ndef f(): return re.match('a', 'abc')", "assert f() and f().group(0) == 'a'"),
        ("def f(): raise ValueError('no')", "try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'no'"),
        ("class E(KeyError): pass\ndef f(): raise E('no')", "try:\n    f()\nexcept LookupError:\n    pass"),
        ("def f(): b'\\xff'.decode()", "try:\n    f()\nexcept ValueError:\n    pass"),
        ("class F:\n    def __bool__(self): return False\ndef f(): return F()", "assert not f()"),
        ("class f:\n    def __init__(self, x=1): self.x = x", "n = f()\nn.y = f(5)\nassert n.y.x + n.x == 6"),
        ("f = 3", "assert f == 3"),
        ("def f(a, *b, c=0): return a + sum(b) + c", "assert f(1, 2, 3, c=4) == 10"),
        ("import sys, math, json, re, itertools, heapq, datetime, bisect, hashlib, zlib\ndef f(): return 1", "f()"),
        (
            "import numpy as np\nimport numpy.linalg\ndef f(x): return int(np.linalg.det(np.eye(2) * x))",
            "assert f(3) == 9",
        ),
        (
            "import os, contextlib\ndef f(x):\n    with open(os.devnull, 'w') as d, contextlib.redirect_stdout(d):\n"
            "        print(x)\n    return open(os.devnull).read()",
            "assert f(1) == ''",
        ),
        ("import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\ndef f(): return P(4)", "assert f().x == 4"),
        (
            "import tempfile\ndef f():\n    with tempfile.TemporaryFile() as t: return t.write(b'abc')",
            "assert f() == 3",
        ),
        ("def f(n): return n if n < 1 else f(n - 1)", "assert f(900) == 0"),
        ("if __name__ == '__main__':\n    raise SystemExit\ndef f(): return 1", "assert f() == 1"),
    ],
)
def test_an_honest_program_passes(candidate, tests, level):
    verdict = run(candidate, tests)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("result", "tests"),
    [
        ("(np.sum([1, 2]), np.prod([1, 2]))", "assert f() == (3, 2)"),
        ("np.all(np.arange(3) >= 0)", "assert f() == True"),
        ("np.all(np.arange(3) >= 0)", "assert f() is True"),
        ("list(np.sort([3, 1]))", "assert f() == [1, 3]"),
        ("np.float32(1.5)", "assert abs(f() - 1.5) < 1e-6"),
        ("np.float32(0.1)", "assert f() == 0.1"),
        ("{np.int8(3): np.uint64(2**64 - 1)}", "assert f() == {3: 2**64 - 1}"),
        ("np.int32(7)", "assert '%d %s' % (f(), f()) == '7 7' and f() in {7} and [0] * 8 == [0] * (f() + 1)"),
        ("np.array([3, 1])", "assert list(f()) == [3, 1]"),
        ("np.array([3, 1])", "assert f() == [3, 1]"),  # no truth value
        ("np.array([3])", "assert f() == [3]"),
        ("np.eye(2)", "assert f().shape == (2, 2) and f().T.tolist() == [[1, 0], [0, 1]] and f()[1, 1] == 1"),
        ("np.zeros((0, 3))", "assert f().shape == (0, 3)"),
        ("np.array(['b', 'ab'])", "assert sorted(f()) == ['ab', 'b']"),
        ("np.array([None, 1])", "assert f()[1] == 1 and len(f()) == 2"),
        ("{'a': 1}.keys()", "assert f() == {'a'} and f() | {'b'} == {'a', 'b'}"),
        ("{'a': 1}.keys()", "assert f() == ['a']"),
        ("{'a': [1]}.items()", "assert list(f()) == [('a', [1])] and ('a', [1]) in f()"),
        ("{'a': 1}.values()", "assert sum(f()) == 1"),
        ("{'a': 1}.values()", "assert f() == [1]"),
        ("collections.OrderedDict(a=1, b=2).keys()", "assert f() == {'a', 'b'}"),
        ("collections.OrderedDict(a=1, b=2)", "assert f() == {'b': 2, 'a': 1}"),
        ("collections.Counter('aab')", "assert f() == {'a': 2, 'b': 1} and f()['c'] == 0"),
        ("collections.defaultdict(list, a=[1])", "assert f() == {'a': [1]}"),
        ("collections.deque([1, 2])", "assert f() == [1, 2]"),
        ("collections.namedtuple('P', 'x y')(1, np.int64(2))", "assert f() == (1, 2) and f().y - f().x == 1"),
        ("collections.namedtuple('P', 'x class', rename=True)(1, 2)", "assert f() == (1, 2) and f()._1 == 2"),
        ("datetime.datetime(2024, 2, 29)", "import datetime\nassert f() == datetime.datetime(2024, 2, 29)"),
        ("datetime.datetime(2024, 2, 29)", "import datetime\nassert f() == datetime.date(2024, 2, 29)"),
        ("datetime.date(2024, 3, 1) - datetime.date(2024, 2, 28)", "assert f().days == 2"),
        ("array.array('i', [1, 2])", "import array\nassert f() == array.array('d', [1, 2])"),
        ("array.array('i', [1, 2])", "assert f() == [1, 2]"),
        ("range(3)", "assert f() == [0, 1, 2]"),
        ("b'a'", "assert f() == 'a'"),
        ("fractions.Fraction(1, 2)", "assert f() == 0.5"),
        ("1 + 0j", "assert f() == 1"),
    ],
)
def test_a_result_compares_as_in_a_plain_run(result, tests, level):
    """Plain Python's own verdict, whichever it is."""
    source = f"import array, collections, datetime, fractions\nimport numpy as np\ndef f(): return {result}"
    namespace = {}
    exec(source, namespace)
    try:
        exec(tests, namespace)
        passes = True
    except (AssertionError, ValueError):
        passes = False
    verdict = run(source, tests)
    assert verdict.passed == passes, verdict


def test_no_reply_makes_pointers_of_bytes():
    with pytest.raises(ValueError, match="an array of object"):
        sandbox_inside._as_numpy(["|O", [1], bytes(8)])


def test_an_array_of_numpy_may_be_an_argument(level):
    tests = "import numpy as np\nassert f(np.arange(6).reshape(2, 3), np.int64(2)) == 30"
    assert run("def f(x, n): return int(x.sum()) * n", tests).passed
    p = "import collections\nP = collections.namedtuple('P', 'x y')\ndef f(p): return p.y"
    assert run(p, "assert f(P(1, 2)) == 2", ("f", "P")).passed


@pytest.mark.parametrize(
    ("candidate", "tests", "detail"),
    [
        ("def f(): return 1", "assert f() == 2", "AssertionError at: assert f() == 2"),
        ("def f(): return 1 / 0", "f()", "ZeroDivisionError: division by zero at: f()"),
        ("def g(): pass", "f()", "NameError: name 'f' is not defined"),
        ("def f(:", "f()", "SyntaxError: invalid syntax (<candidate>, line 1)"),
        ("import numpy_is_not_here", "f()", "ModuleNotFoundError: No module named 'numpy_is_not_here'"),
        ("import pytest", "f()", "ModuleNotFoundError: No module named 'pytest'"),  # beside numpy
        ("def f(): exit_code", "f()", "NameError: name 'exit_code' is not defined at: f()"),
        ("def f(): raise SystemExit", "f()", "the program raised SystemExit at: f()"),
        ("import os\ndef f(): os._exit(0)", "f()", "the program ended before its tests did at: f()"),
        (
            "import os\ndef f(): os._exit(0)",
            "try:\n    f()\nexcept:\n    pass",
            "the program ended before its tests did",
        ),
    ],
)
def test_a_failure_says_why(candidate, tests, detail, level):
    verdict = run(candidate, tests)
    assert verdict.verdict == "failed"
    assert verdict.detail.startswith(detail)


@pytest.mark.parametrize(
    ("setup", "tests", "reason"),
    [
        ("", "import pytest\nassert f() == 1", "No module named 'pytest' at: import pytest"),
        (
            "",
            "def check(f):\n    assert f() == 1\n    from numpy import nothing\ncheck(f)",
            "cannot import name 'nothing'",
        ),
        ("from pytest import approx", "assert f() == approx(1)", "No module named 'pytest'"),
        ("import numpy as np\nnp.nothing", "assert f() == 1", "AttributeError"),
        ("", "assert f() = 1", "SyntaxError"),
        ("", "f(print)", "a test passes builtin_function_or_method, which cannot be sent"),
        ("", "f([lambda v: v])", "a test passes function"),
        ("import re", "assert f(re.compile('a'))", "a test passes Pattern"),
    ],
)
def test_tests_that_cannot_run_are_no_verdict(setup, tests, reason, level):
    with pytest.raises(UserError, match=f"the tests of f cannot run .*{reason}"):
        run("def f(): return 1", tests, setup=setup)


def test_a_test_that_expects_a_type_error_takes_what_cannot_be_sent_for_one(level):
    tests = "try:\n    f(print)\nexcept TypeError:\n    pass\nassert f() == 1"
    assert run("def f(): return 1", tests).passed
    assert run("def f(): return 2", tests).verdict == "failed"


@pytest.mark.parametrize("source", ["import pytest", "def f(): import pytest", "def f(): raise ImportError('no')"])
def test_an_import_that_fails_in_the_program_is_its_own(source, level):
    tests = "try:\n    import pytest\nexcept ImportError:\n    import numpy\nassert f() == 1"
    assert run(f"def f(): return 1\n{source}", tests).verdict == "failed"


def test_output_is_kept_and_cut(level):
    verdict = run("print('hello' * 1000)\ndef f(): return 1", "assert f() == 1", output_bytes=50)
    assert verdict == Verdict("passed", "", "hello" * 10)


def test_the_deadline_is_named(level):
    verdict = run("while True: pass", "", timeout=0.5)
    assert (verdict.verdict, verdict.detail) == ("timed out", "after 0.5 s")


@pytest.mark.parametrize("needs", ["CPU time", "patience"])
def test_a_busy_machine_changes_no_verdict(needs, level):
    """Four at a time on one core: each takes longer than its limit by the clock on the wall."""
    work = "end = time.process_time() + 0.6\n    while time.process_time() < end: pass"
    source = f"import time\ndef f():\n    {work if needs == 'CPU time' else 'time.sleep(0.6)'}\n    return 1"
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        programs = [Program(source, "assert f() == 1", ("f",))] * 4
        within = list(run_programs(programs, Limits(timeout=1.2), workers=4))
        over = list(run_programs(programs, Limits(timeout=0.4), workers=4))
    finally:
        os.sched_setaffinity(0, before)
    assert [verdict.verdict for verdict in within] == ["passed"] * 4
    assert [verdict.verdict for verdict in over] == ["timed out"] * 4


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 6),
        ("0::/\n", {"cpu.max": "max 100000"}, 6),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 2),
        (
            "1:cpuset:/\n2:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
        ("0::/\n", {"cpu.max": "900000 100000"}, 6),
    ],
)
def test_workers_are_the_cores_that_a_container_leaves(groups, files, expected, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(cores, "OWN_GROUPS", own)
    monkeypatch.setattr(cores, "GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert cores.available_cores() == expected


def test_verdicts_come_in_order_and_repeat(level):
    """The order of a set of strings decides this verdict; from run to run it is the same one."""
    source = "def f(): return list({'a', 'b', 'c', 'd'})"
    programs = [Program(source, f"assert f()[0] == {letter!r}", ("f",)) for letter in "abcd"] * 2
    verdicts = list(run_programs(programs, workers=3))
    assert sum(verdict.passed for verdict in verdicts) == 2
    assert verdicts[:4] == verdicts[4:]


def test_programs_do_not_share_the_limit_on_processes(level):
    """As on a machine with many cores: 10 programs at once, 100 processes and threads together."""
    source = "import threading, time\nfor _ in range(8): threading.Thread(target=time.sleep, args=(2,)).start()\n"
    source += "def f(x): return time.sleep(1) or len(x)"
    programs = [Program(source, "assert f([0]) == 1", ("f",))] * 10
    assert all(verdict.passed for verdict in run_programs(programs, Limits(timeout=60), workers=10))


def test_a_program_leaves_nothing_to_the_next(level):
    """They are forked from one process: files, built-ins, modules, the environment, and what is still to be read."""
    leaves = """
import builtins, json, os, tempfile
open(tempfile.gettempdir() + "/left", "w").write("here")
builtins.left = json.left = True
os.environ["LEFT"] = "here"
def f(): return 1
"""
    finds = """
import builtins, json, os, tempfile
def f():
    return os.listdir(tempfile.gettempdir()), os.environ.get("LEFT"), hasattr(builtins, "left"), hasattr(json, "left")
"""
    first = Program(leaves, "import sys\nassert f() == 1 and sys.stdin.read() == ''", ("f",))
    second = Program(finds, "assert f() == ([], None, False, False)", ("f",))
    verdicts = list(run_programs([first, second] * 3, workers=1))
    assert all(verdict.passed for verdict in verdicts), verdicts


def test_random_inputs_are_the_same_in_every_run(level):
    outputs = {run("f = print", "import random\nf(random.random())").output for _ in range(3)}
    assert len(outputs) == 1
    assert re.fullmatch(r"0\.\d+\n", outputs.pop())


HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
REFUSED = {  # family: the names of its calls, after the kernel's header
    "System V and POSIX memory, queues and semaphores": r"shm\w+|sem\w+|msg(get|snd|rcv|ctl)|mq_\w+|memfd_\w+",
    "keys": r"add_key|request_key|keyctl",
    "asynchronous I/O": r"io_\w+",
    "sockets with a name": r"socket|connect|bind|listen|accept4?|sendm?msg|recvm?msg",
    "locks and watches": r"flock|inotify_\w+|fanotify_\w+",
    "what a file has beside its content": r"\w*xattr|f?chmod(at)?|[fl]?chown(at)?|\w*utimes?(at)?|utimensat|mknod(at)?",
    "where a link leads": r"readlink(at)?",
    "processes": r"v?fork|execve(at)?|t?g?kill|\w+sigqueueinfo|pidfd_\w+|ptrace|process_\w+|kcmp|set[ps]\w*id",
    "namespaces and mounts": r"unshare|setns|mount\w*|umount2|\w+_root|chroot|open_tree|move_mount|fs(open|mount|pick)",
    "the kernel's corners": r"bpf|perf_event_open|userfaultfd|seccomp|landlock_\w+|timer(fd)?_\w+|signalfd4?|openat2",
}
# The system call with arguments of which only these matter; all others are -1.
ARGUMENTS = {
    "locks, leases, watches and owners of descriptors": [
        (72, -1, c) for c in (5, 6, 7, 8, 10, 15, 36, 37, 38, 1024, 1026)
    ],
    "seals and sizes": [(72, -1, 1031), (72, -1, 1033)],
    "datagrams": [(53, 1, kind) for kind in (2, 3, 5, 2 | 0x80000)] + [(53, 2, 1), (44, -1, -1, -1, -1, -1)],
    "devices, and flags of files": [(16, -1, code) for code in (0x40086602, 0x8901, 0x8902, 0x5412)],
    "other processes' limits": [(302, 1)],
    "who ends with whom": [(157, 1), (157, 4), (157, 22)],
}


@pytest.mark.skipif(not HEADER.is_file(), reason="no kernel headers of x86_64")
@pytest.mark.parametrize("family", [*REFUSED, *ARGUMENTS])
def test_families_of_system_calls_are_refused(family, level):
    """By EPERM, where one that got through would fail with EBADF, EFAULT or EINVAL: no argument means anything."""
    if family in REFUSED:
        found = re.findall(r"^#define __NR_(\w+)\s+(\d+)$", HEADER.read_text(), re.MULTILINE)
        calls = [(int(number),) for name, number in found if re.fullmatch(REFUSED[family], name)]
    else:
        calls = ARGUMENTS[family]
    assert calls
    source = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(call):
    arguments = [ctypes.c_long(value) for value in (*call, *[-1] * (7 - len(call)))]
    return libc.syscall(*arguments), ctypes.get_errno()
"""
    verdict = run(source, f"for call in {calls}:\n    assert f(call) == (-1, 1), call")
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("source", "seen_by"),
    [
        ("os.path.getsize({canary!r}) == 7", {"landlock"}),
        ("os.stat({canary!r}).st_mode & 0o777 == 0o666", {"landlock"}),
        ("os.uname().nodename == {host!r}", {"landlock"}),
        ("open({canary!r}).read() == 'hunter2'", set()),
        ("os.readlink({link!r}) == {canary!r}", set()),
        ("os.listdir(os.path.dirname({canary!r}))", set()),
        ("os.getppid() == {pid}", set()),
        (
            "os.listdir(os.path.dirname(os.path.dirname(__import__('numpy').__file__)))[2:]",
            set(),
        ),  # numpy.libs beside it
        ("os.statvfs('.').f_blocks * os.statvfs('.').f_frsize > 2**27", {"landlock"}),
    ],
)
def test_each_level_keeps_out_what_it_says(source, seen_by, level, tmp_path):
    """The header of sandbox.py, the page and `describe`: Landlock's exceptions, and no others."""
    (tmp_path / "canary").write_text(SECRET)
    (tmp_path / "canary").chmod(0o666)
    (tmp_path / "link").symlink_to(tmp_path / "canary")
    told = {"canary": str(tmp_path / "canary"), "link": str(tmp_path / "link")}
    told |= {"host": os.uname().nodename, "pid": os.getpid()}
    verdict = run(f"import os\ndef f(): return bool({source.format(**told)})", "assert f()")
    assert verdict.passed == (level in seen_by), verdict


# What the header of sandbox.py, the page and `describe` claim, in their words, and what would fail if it were not so:
# attacks of hostile_programs.py, families of system calls, or tests of this file.
HELD_BY = {
    "Python's standard library, system libraries and numpy": "change_library installed_packages read_passwd sys",
    "Python's library, numpy and an empty": "change_library installed_packages read_secret list_home",
    "it can lock or watch none of them": "locks and watches|locks, leases, watches and owners of descriptors",
    "network": "connect_loopback udp_loopback listen netlink raw_system_call download",
    "other processes": "proc_any signal_parent ptrace_parent memory_of_parent priority_of_parent limit_parent",
    "environment": "environment environment_of_parent environment_of_self environment_in_memory",
    "no process can be started": "fork vfork clone clone3 subprocess exec fork_bomb|processes",
    "start no processes": "fork vfork clone clone3 subprocess exec",
    "other objects of the kernel": "memory_system_v unix_socket abstract_socket|keys|asynchronous I/O",
    "shared memory, queues, keys, locks": "System V and POSIX memory, queues and semaphores|keys|sockets with a name",
    "system calls": "io_uring raw_system_call|the kernel's corners|namespaces and mounts",
    "disk and output are limited": "memory_bomb endless_loop sleep disk_bomb sparse_file endless_output",
    "Memory, disk and time are limited": "memory_bomb endless_loop sleep disk_bomb sparse_file",
    "ends with all its threads": "threads_remain|test_no_process_is_left",
    "the load of the machine changes no verdict": "test_a_busy_machine_changes_no_verdict",
    "As many programs run at the same time": "test_workers_are_the_cores_that_a_container_leaves",
    "by plain data only": "equal_to_all class_lies garbage own_memory|test_plain_data_comes_back_as_it_was",
    "may import Python's standard library and numpy too": "test_a_result_compares_as_in_a_plain_run",
    "because they are no verdict on the model": "test_tests_that_cannot_run_are_no_verdict",
    "compare as in a plain run": "numpy_lies named_tuple_lies|test_a_result_compares_as_in_a_plain_run",
    "shares no memory with the model's code": "frames garbage own_memory memory_of_judge",
    "does not pass by an early exit": "exit_hard_at_import patched_builtins equal_to_all",
    "cleared afterwards whatever rights": "test_a_folder_is_cleared_whatever_rights_are_left",
    "whether a file exists": "test_each_level_keeps_out_what_it_says|where a link leads",
    "host's name": "test_each_level_keeps_out_what_it_says",
    "threads as its memory holds": "thread_bomb",
    "fill the disk": "test_each_level_keeps_out_what_it_says",
    "refuse to run code": "test_nothing_runs_without_isolation_unless_asked",
    "those that Python needs": "test_families_of_system_calls_are_refused|test_an_honest_program_passes",
    "hostile programs do not pass": "test_a_hostile_program_does_not_pass",
}
NO_CLAIM = "|".join(
    [
        "code that a model wrote|is on by default|needs Linux|as root, or as a user|where the kernel has namespaces",
        "counts seconds|same with these exceptions|runs it all the same|prints what is isolated|first lines of",
        "It is made for|adversary|own solutions pass|164 of 164",  # solutions: tests/test_code_benchmarks.py
    ]
)


def test_every_sentence_about_the_sandbox_is_held_by_an_attack():
    header = sandbox.__doc__.partition("Protects")[2].partition("Does not protect")[0]
    page = (ROOT / "docs" / "evaluation.md").read_text().partition("## The sandbox")[2].partition("\n## ")[0]
    described = [found.describe() for found in LEVELS.values()]
    sentences = re.split(r"(?<=[.;:])\s", " ".join(f"{header} {page} {' '.join(described)}".split()))
    claims = [sentence for sentence in sentences if len(sentence.split()) > 4 and not re.search(NO_CLAIM, sentence)]
    assert len(claims) >= 25
    assert [claim for claim in claims if not any(words in claim for words in HELD_BY)] == []
    assert [words for words in HELD_BY if not any(words in claim for claim in claims)] == []
    for holders in HELD_BY.values():
        for holder in holders.split("|"):
            known = {*REFUSED, *ARGUMENTS, *globals()}
            assert holder in known or all(name in PROGRAMS for name in holder.split()), holder


@pytest.mark.skipif(os.getuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="root ignores permissions")
def test_a_folder_is_cleared_whatever_rights_are_left(level):
    """As an ordinary user, to whom rights mean something."""
    folder = tempfile.mkdtemp(dir="/tmp")  # pytest's own are closed to others
    os.chmod(folder, 0o777)
    script = f"""
import tempfile
tempfile.tempdir = {folder!r}
from eval import sandbox
found = sandbox.Isolation({level!r}, True, ())
source = "import os\\nos.makedirs('a/b')\\nos.mkdir('a/b/d', 0)\\nos.umask(0o777)\\nos.mkdir('a/e')\\ndef f(): return 1"
print(sandbox._run(sandbox.Program(source, "assert f() == 1", ("f",)), sandbox.Limits(), found).verdict)
"""
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    done = subprocess.run([*user, sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    left = os.listdir(folder)
    shutil.rmtree(folder)
    if "Permission denied" in done.stderr or "SandboxError" in done.stderr:
        pytest.skip("an ordinary user cannot run this here")
    assert (done.stdout, left) == ("passed\n", []), done.stderr


def test_nothing_runs_without_isolation_unless_asked(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation("none", True, ("namespaces: not allowed",)))
    with pytest.raises(UserError, match=r"--unsafe \(namespaces: not allowed\)"):
        next(run_programs([Program("", "", ())]))
    (verdict,) = run_programs([Program("def f(): return 1", "assert f() == 1", ("f",))], unsafe=True)
    assert verdict.passed
    assert "NONE" in sandbox.require_isolation(unsafe=True).describe()


@pytest.mark.parametrize(
    ("works", "expected"),
    [
        ({("namespaces", True), ("landlock", True)}, ("namespaces", True)),
        ({("namespaces", False), ("landlock", True)}, ("namespaces", False)),
        ({("landlock", True), ("none", True)}, ("landlock", True)),
        ({("none", True), ("none", False)}, ("none", True)),
        ({("none", False)}, ("none", False)),
    ],
)
def test_the_strongest_isolation_that_works_is_taken(works, expected, monkeypatch):
    def run_where_it_works(program, limits, found):
        if (found.level, found.filter) not in works:
            raise sandbox.SandboxError("not allowed")
        return Verdict("passed", "", "")

    monkeypatch.setattr(sandbox, "_run", run_where_it_works)
    found = FIND_ISOLATION()
    assert (found.level, found.filter) == expected
    described = found.describe().splitlines()
    assert ("NONE" in described[0]) == (expected[0] == "none")
    assert len(described) == 1 + len(found.problems)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("INSIDE", sandbox.INSIDE.with_name("not_there.py"), r"not_there\.py"),
        ("filter_program", lambda: bytes(8), "prctl: Invalid argument"),
        ("packages", lambda: ["/no/such/folder"], "mount: No such file or directory"),
    ],
)
def test_what_cannot_be_isolated_is_no_verdict(name, value, reason, monkeypatch):
    """A program that was not run is an error of the run, with its own reason, not a failure of the program's."""
    monkeypatch.setattr(sandbox, "isolation", lambda: LEVELS["namespaces"])
    monkeypatch.setattr(sandbox, name, value)
    with pytest.raises(sandbox.SandboxError, match=reason):
        list(run_programs([Program("", "", ())]))


@pytest.mark.skipif(not Path("/usr/include").is_dir(), reason="no kernel headers")
def test_system_call_numbers_are_the_kernels():
    headers = [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h")]
    known = system_calls.NUMBERS | {"pivot_root": list(sandbox_inside.PIVOT_ROOT.values())}
    compared = 0
    for column, header in enumerate(headers):
        if header.is_file():
            found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE)
            numbers = {name: int(number) for name, number in found}
            for name, columns in known.items():
                if name in numbers or columns[column] is None:  # an older header may lack the newest
                    assert columns[column] == numbers.get(name), name
                    compared += 1
    if compared == 0:
        pytest.skip("no kernel headers")
