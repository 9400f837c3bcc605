"""Hostile programs do not pass, do not touch the host and do not stay; honest ones get the verdict of a plain run."""

import os
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sandbox
from hostile_programs import PROGRAMS, TESTS
from sandbox import Isolation, Limits, Program, Verdict, run_programs

LIMITS = Limits(timeout=2.0, memory_mib=512)
LEVELS = {"namespaces": Isolation("namespaces", True, ()), "landlock": Isolation("landlock", True, ())}
# Landlock has no limit on the disk as a whole: `sandbox.py` says so.
NOT_STOPPED = {("landlock", "disk_bomb_many"), ("landlock", "inode_bomb")}
SECRET = "hunter2"


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
        unix, abstract = f"{folder}/socket", f"sandbox-test-{os.getpid()}"
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


def processes_of_sandboxes() -> list[str]:
    """By their command line, and as root by their user too, which a program cannot change."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (
                b"sandbox_inside.py" in (entry / "cmdline").read_bytes() or 61184 <= entry.stat().st_uid < 65520
            ):
                found.append(entry.name)
        except OSError:
            pass
    return found


@pytest.fixture(scope="module")
def visit(level, tmp_path_factory):
    """Runs every hostile program once; name: its verdict and the seconds it took."""
    host = Host(tmp_path_factory.mktemp("host"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANDBOX_TEST_KEY", SECRET)

        def timed(name: str) -> tuple[Verdict, float]:
            started = time.monotonic()
            source = f"HOST = {host.told!r}\n{PROGRAMS[name][1]}"
            (verdict,) = run_programs([Program(source, TESTS, ("f",))], LIMITS, workers=1)
            return verdict, time.monotonic() - started

        with ThreadPoolExecutor(2) as pool:
            results = dict(zip(PROGRAMS, pool.map(timed, PROGRAMS), strict=True))
    remaining = processes_of_sandboxes()
    time.sleep(3.5)  # detached_grandchild writes after 3 s
    return results, host, remaining


def test_there_are_enough_hostile_programs():
    assert len(PROGRAMS) >= 60


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_does_not_pass(name, visit, level):
    if (level, name) in NOT_STOPPED:
        pytest.skip("stated as not limited")
    verdict, seconds = visit[0][name]
    assert not verdict.passed, PROGRAMS[name][0]
    assert seconds < LIMITS.timeout + 2


def test_the_host_is_as_it_was(visit):
    _, host, _ = visit
    assert host.state() == host.before
    assert host.visitors() == []


def test_no_process_is_left(visit):
    assert visit[2] == []


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
