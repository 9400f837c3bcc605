"""Programs that attack the sandbox: name, why it is here, source. Not one of them may pass its tests.

The task is `f(x) = x * x`. A program made by `attack` computes it only if its attack worked; the others never do, so
that only a forged verdict lets them pass. HOST is what attackers know of the machine (`Host` in test_sandbox.py).
"""

import textwrap

TESTS = """
assert f(3) == 9
assert f(4) == 16
assert [f(i) for i in range(5)] == [0, 1, 4, 9, 16]
assert abs(f(2) - 4) < 1e-6
assert not f(0)
"""

PROGRAMS: dict[str, tuple[str, str]] = {}  # name: why, source


def program(name: str, why: str, source: str) -> None:
    assert name not in PROGRAMS
    PROGRAMS[name] = (why, textwrap.dedent(source))


def attack(name: str, why: str, body: str) -> None:
    """`body` runs inside f and raises where the attack fails."""
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    program(name, why, f"import os, sys, ctypes\nlibc = ctypes.CDLL(None)\ndef f(x):\n{body}\n    return x * x\n")


# Files ---------------------------------------------------------------------------------------------

attack("write_outside", "a file beside the host's own", 'open(HOST["canary"] + ".new", "w").write("x")')
attack("append_outside", "change a file that everyone may write", 'open(HOST["canary"], "a").write("x")')
attack("truncate_outside", "empty it by path", 'os.truncate(HOST["canary"], 0)')
attack("delete_outside", "delete it", 'os.remove(HOST["canary"])')
attack("chmod_outside", "change its mode", 'os.chmod(HOST["canary"], 0o777); os.stat(HOST["canary"])')
attack("touch_outside", "change its time", 'os.utime(HOST["canary"], (0, 0))')
attack("own_outside", "give it away", 'os.chown(HOST["canary"], 1, 1)')
attack("label_outside", "attach data to it", 'os.setxattr(HOST["canary"], "user.x", b"x")')
attack("rename_outside", "move a file into the host's folder", 'open("a", "w"); os.rename("a", HOST["canary"])')
attack("mkdir_outside", "make a folder in the host's", 'os.mkdir(HOST["canary"] + ".folder")')
attack("read_secret", "a secret in a file that everyone may read", 'assert "hunter2" in open(HOST["secret"]).read()')
attack("read_secret_relative", "the same by ..", 'assert open("../../../../.." + HOST["secret"]).read()')
attack("list_home", "what lies in the home folder, beside Python itself", 'assert len(os.listdir(HOST["home"])) > 1')
attack("read_passwd", "the machine's users", 'assert open("/etc/passwd").read()')
attack("symlink_out_read", "a link in /tmp to the secret", 'os.symlink(HOST["secret"], f"l{x}{os.getpid()}")\n'
       'assert open(f"l{x}{os.getpid()}").read()')  # fmt: skip
attack(
    "symlink_out_write",
    "a link to the host's file, written through",
    """
    if not os.path.lexists("w"):
        os.symlink(HOST["canary"] + ".link", "w")
    open("w", "w").write("x")
    assert os.path.realpath("w") != HOST["canary"] + ".link"
""",
)
attack("hardlink_out", "a second name for the secret", 'os.link(HOST["secret"], "h"); assert open("h").read()')
attack(
    "chroot_escape",
    "the classic way out of a chroot",
    """
    os.mkdir("c"); os.chroot("c")
    for _ in range(64):
        os.chdir("..")
    os.chroot("."); assert open(HOST["secret"]).read()
""",
)
attack("mount", "mount something", 'assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0')
attack(
    "remount_writable",
    "make the system folders writable again",
    """
    assert libc.mount(b"none", b"/", None, 32 | 4096, None) == 0 or libc.umount2(b"/lib", 2) == 0
""",
)
attack("new_user_namespace", "become root of a namespace of one's own", "assert libc.unshare(0x10000000) == 0")
attack("device_node", "make the disk's device", 'os.mknod("disk", 0o60666, os.makedev(254, 0)); os.open("disk", 0)')
attack(
    "file_handle",
    "open a file by its number, past all paths",
    """
    handle = ctypes.create_string_buffer(b"\\x08\\0\\0\\0\\x01\\0\\0\\0\\x02\\0\\0\\0\\0\\0\\0\\0")
    root = os.open("/lib", 0)
    assert libc.open_by_handle_at(root, handle, 0) >= 0
""",
)
attack(
    "change_library",
    "leave code where the next program imports it",
    """
    open(os.path.join(os.path.dirname(os.__file__), "this_was_here.py"), "w").write("x")
""",
)
attack(
    "change_json",
    "replace the judge's own modules",
    """
    import json
    open(json.__file__, "a").write("\\nprint('hello')")
""",
)
attack(
    "installed_packages",
    "read a benchmark's solutions from an installed package",
    """
    folder = os.path.join(os.path.dirname(os.__file__), "site-packages")
    names = [name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))]
    assert any(open(os.path.join(folder, name, "__init__.py")).read() for name in names)
""",
)
attack("proc_root", "the root folder of the process that asked", """assert os.listdir(f"/proc/{HOST['pid']}/root")""")
attack("proc_any", "any process", 'assert os.listdir("/proc")')
attack("sys", "the machine's devices", 'assert os.listdir("/sys")')
attack(
    "inherited_descriptor",
    "files that the asking process has open, beyond the two pipes to the judge",
    """
    import contextlib
    found = []
    for descriptor in range(3, 65536):
        with contextlib.suppress(OSError):
            found.append(os.fstat(descriptor))
    assert len(found) > 2
""",
)

# The asking process's environment and memory -------------------------------------------------------

attack("environment", "a key in the environment", 'assert "hunter2" in str(os.environ)')
attack(
    "environment_of_parent",
    "the same by /proc",
    """assert b"hunter2" in open(f"/proc/{HOST['pid']}/environ", "rb").read()""",
)
attack("environment_of_self", "what the process was started with", 'assert open("/proc/self/environ").read()')
attack(
    "environment_in_memory",
    "search one's own memory for the key",
    """
    libc.getenv.restype = ctypes.c_char_p
    assert b"hunter2" in libc.getenv(b"SANDBOX_TEST_KEY")
""",
)
attack(
    "memory_of_parent",
    "read the asking process's memory",
    """
    buffer = ctypes.create_string_buffer(8)
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    here = Vector(ctypes.addressof(buffer), 8)
    there = Vector(HOST["address"], 8)
    assert libc.process_vm_readv(HOST["pid"], ctypes.byref(here), 1, ctypes.byref(there), 1, 0) == 8
""",
)
attack("ptrace_parent", "attach to the asking process", 'assert libc.ptrace(16, HOST["pid"], 0, 0) == 0')
attack("ptrace_judge", "attach to the judge", "assert libc.ptrace(16, os.getppid() or 1, 0, 0) == 0")
attack(
    "memory_of_judge",
    "read the judge's memory",
    """
    open(f"/proc/{os.getppid() or 1}/mem", "rb").read(1)
""",
)

# The network ---------------------------------------------------------------------------------------

attack(
    "connect_loopback",
    "a server on this machine",
    """
    import socket
    socket.create_connection(("127.0.0.1", HOST["tcp"]), 1).sendall(b"x")
""",
)
attack(
    "udp_loopback",
    "a datagram",
    """
    import socket
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", HOST["udp"]))
""",
)
attack(
    "unix_socket",
    "a server's socket file",
    """
    import socket
    socket.socket(socket.AF_UNIX).connect(HOST["unix"])
""",
)
attack(
    "abstract_socket",
    "a server's name without a file",
    """
    import socket
    socket.socket(socket.AF_UNIX).connect("\\0" + HOST["abstract"])
""",
)
attack(
    "listen",
    "open a port",
    """
    import socket
    socket.create_server(("127.0.0.1", 0))
""",
)
attack(
    "netlink",
    "ask the kernel about network interfaces",
    """
    import socket
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
""",
)
attack("raw_system_call", "a socket without Python's module", "assert libc.syscall(41, 2, 1, 0) >= 0")
attack(
    "download",
    "fetch a page",
    """
    import urllib.request
    urllib.request.urlopen(f"http://127.0.0.1:{HOST['tcp']}/", timeout=1)
""",
)
attack("io_uring", "system calls past the filter", "assert libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0")

# Other processes -----------------------------------------------------------------------------------

program(
    "fork_bomb",
    "as many processes as there can be",
    """
    import os
    while True:
        try:
            os.fork()
        except OSError:
            pass
""",
)
attack("fork", "one process", "assert os.fork() >= 0")
attack("vfork", "by the C library", "pid = libc.vfork()\nif pid == 0: os._exit(0)\nassert pid > 0")
attack(
    "clone", "by the system call", "pid = libc.syscall(56, 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nassert pid > 0"
)
attack(
    "clone3",
    "by the newer system call",
    """
    arguments = ctypes.create_string_buffer(88)
    pid = libc.syscall(435, arguments, 88)
    if pid == 0:
        os._exit(0)
    assert pid > 0
""",
)
attack("subprocess", "a shell", 'import subprocess\nsubprocess.run(["/bin/sh", "-c", "sleep 30 &"], check=True)')
attack(
    "spawn_python", "another Python", 'import subprocess\nsubprocess.run([sys.executable, "-c", "pass"], check=True)'
)
attack("exec", "become another program", 'os.execv("/lib64/ld-linux-x86-64.so.2", ["ld", "--version"])')
attack("multiprocessing", "a pool", "import multiprocessing\nmultiprocessing.Pool(2)")
program(
    "detached_grandchild",
    "a process that nobody waits for writes after the end",
    """
    import os, time
    for _ in range(2):
        try:
            if os.fork():
                os._exit(0)
            os.setsid()
        except OSError:
            pass
    time.sleep(3)
    open(HOST["canary"] + ".late", "w").write("x")
""",
)
attack("new_session", "leave the group that is killed", "os.setsid()")
attack("signal_parent", "end the asking process", 'os.kill(HOST["pid"], 9)')
attack("signal_parent_by_0", "see whether it is there", 'os.kill(HOST["pid"], 0)')
attack("signal_all", "end everything", "os.kill(-1, 9)")
attack("signal_judge", "end the judge", "os.kill(os.getppid() or 1, 9)")
attack("signal_group", "end the own group", "os.killpg(0, 9)")
attack(
    "signal_by_descriptor",
    "let a pipe send the signal",
    """
    import fcntl
    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_SETOWN, HOST["pid"])
""",
)
attack("signal_by_pidfd", "the newer way", 'assert libc.syscall(434, HOST["pid"], 0) >= 0')
attack(
    "limit_parent",
    "lower the asking process's limits",
    """
    import resource
    resource.prlimit(HOST["pid"], resource.RLIMIT_NOFILE, (3, 3))
""",
)
attack("processors_of_parent", "keep it on one core", 'os.sched_setaffinity(HOST["pid"], {0})')
attack(
    "signal_by_socket",
    "let a socket send the signal",
    """
    import fcntl, socket
    a, b = socket.socketpair()
    fcntl.ioctl(a, 0x8901, HOST["pid"].to_bytes(4, "little"))
""",
)
attack("outlive_parent", "live on when the asking process is killed", "assert libc.prctl(1, 0, 0, 0, 0) == 0")
attack(
    "watch_files",
    "see what others open",
    'd = libc.inotify_init1(0); assert libc.inotify_add_watch(d, b"/tmp", 4095) > 0',
)
attack("kernel_log", "read the kernel's messages", "assert libc.klogctl(3, ctypes.create_string_buffer(100), 100) >= 0")
attack("priority_of_parent", "slow it down", 'os.setpriority(os.PRIO_PROCESS, HOST["pid"], 19)')
attack(
    "raise_limits",
    "lift the own limits",
    """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
""",
)
attack(
    "thread_bomb",
    "ten thousand threads",
    """
    import threading, time
    for _ in range(10_000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
""",
)

# Resources -----------------------------------------------------------------------------------------

attack("memory_bomb", "8 GiB", "held = bytearray(8 * 2**30)")
program("memory_bomb_slow", "more and more", "held = []\nwhile True:\n    held.append('x' * 2**20)\n")
attack(
    "memory_in_files",
    "memory that belongs to no process",
    """
    descriptors = [os.memfd_create("a") for _ in range(4)]
    for descriptor in descriptors:
        os.write(descriptor, b"x" * 2**20)
""",
)
attack("memory_system_v", "the same by System V", "assert libc.shmget(0, 2**20, 0o1666) >= 0")
attack(
    "disk_bomb",
    "one file of 1 GiB",
    'with open("big", "wb") as file:\n    file.write(bytes(2**28)); file.write(bytes(2**28))',
)
attack(
    "disk_bomb_many",
    "many files",
    """
    for i in range(50):
        with open(f"big{i}", "wb") as file:
            file.write(bytes(8 * 2**20))
""",
)
attack("inode_bomb", "empty files", "for i in range(100_000):\n    open(f'n{i}', 'w').close()")
attack("sparse_file", "a file with a hole", 'with open("big", "wb") as file:\n    file.seek(2**40); file.write(b"x")')
program(
    "deep_folders",
    "folders nested until removing them overflows a stack",
    """
    import os
    while True:
        try:
            os.mkdir("d", 0o700)
            os.chdir("d")
        except OSError:
            break
    raise SystemExit
""",
)
program("endless_loop", "never ends", "while True: pass")
program("endless_loop_in_call", "never answers", "def f(x):\n    while True: pass")
program("endless_loop_in_c", "a loop that no Python signal handler interrupts", "def f(x): return sum(range(10**14))")
program("sleep", "uses no CPU time", "import time\ntime.sleep(10**6)")
program("deadlock", "waits for itself", "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()")
program(
    "signals_ignored",
    "does not want to be ended",
    """
    import signal
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True: pass
""",
)
program(
    "exceptions_ignored",
    "catches everything, for ever",
    """
    def f(x):
        while True:
            try:
                f(x)
            except BaseException:
                pass
""",
)
program("endless_output", "prints for ever", "while True: print('x' * 10**6)")
program(
    "endless_output_raw",
    "the same past Python's buffers",
    "import os\nwhile True:\n    try: os.write(2, b'x' * 10**6)\n    except OSError: pass",
)
program("huge_power", "a number that fits no memory", "def f(x): return 10**10**9 and x")
program(
    "huge_text",
    "a number that takes hours to print",
    "import sys\nsys.set_int_max_str_digits(0)\ndef f(x): return str(7**10**8)",
)
program("huge_repeat", "a list that fits no memory", "def f(x): return [x] * 10**12")
program(
    "regular_expression", "exponential backtracking", "import re\ndef f(x): return re.match('(a+)+$', 'a' * 64 + 'b')"
)
program("deep_recursion", "overflows the stack", "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)")
program("read_stdin", "waits for input", "def f(x): return int(input())")
program("read_stdin_raw", "the same", "import os\ndef f(x): return os.read(0, 1)[0]")
attack("descriptors", "ten thousand open files", 'held = [os.open(".", 0) for _ in range(10_000)]')
program("compiler_bomb", "source that takes the compiler down", "def f(x): return x\n" + "(" * 5000 + ")" * 5000)
program("constant_bomb", "a constant folded at compile time", "def f(x): return (1 << 4000) ** 4000 and 'x' * 10**9")
program("not_python", "no program at all", "\0\udcff this is not Python")
program(
    "unicode_flood",
    "text of all kinds, surrogates too",
    """
    def f(x):
        print("".join(map(chr, range(0xD800))) * 20)
        return "\\ud800\\udfff\\u202e\\0" * 10**6
""",
)

# What comes back to the judge ----------------------------------------------------------------------

program("big_result", "a result of 1 GiB", "def f(x): return 'x' * 2**29")
program("many_results", "millions of them", "def f(x): return [[]] * 10**8")
program("endless_result", "an iterator without an end", "import itertools\ndef f(x): return itertools.count()")
program(
    "endless_result_in_list",
    "the tests would wait for ever",
    """
    class Endless:
        def __iter__(self): return self
        def __next__(self): return 1
        def __len__(self): return 10**18
        def __index__(self): return 9
    def f(x): return Endless()
""",
)
program(
    "nested_result",
    "deeper than any recursion",
    """
    def f(x):
        result = []
        for _ in range(100_000):
            result = [result]
        return result
""",
)
program(
    "circular_result", "contains itself", "def f(x):\n    result = []\n    result.append(result)\n    return result"
)
program(
    "hash_collisions",
    "a dictionary of keys that all collide",
    "def f(x): return {i * (2**61 - 1): i for i in range(10**5)}",
)

# The verdict: leaving early ------------------------------------------------------------------------

program("exit_at_import", "an exit code of 0", "import sys\nsys.exit(0)")
program("exit_hard_at_import", "the same without cleaning up", "import os\nos._exit(0)")
program("exit_in_call", "in the middle of the tests", "import sys\ndef f(x): sys.exit(0)")
program("exit_hard_in_call", "the same without cleaning up", "import os\ndef f(x): os._exit(0)")
program("exit_after_first", "after a right answer", "import os\ndef f(x): return 9 if x == 3 else os._exit(0)")
program("exit_builtin", "quit and exit", "quit = exit = None\ndef f(x): raise SystemExit(0)")
program(
    "exit_by_thread",
    "from another thread",
    """
    import os, threading
    threading.Timer(0.1, os._exit, (0,)).start()
    def f(x):
        while True: pass
""",
)
program(
    "exit_by_exception", "an exception that no test catches", "class Done(BaseException): pass\ndef f(x): raise Done"
)
program(
    "exit_by_name",
    "an exception that calls itself SystemExit",
    """
    def f(x): raise type("SystemExit", (Exception,), {})(0)
""",
)
program("keyboard_interrupt", "as if the user had stopped it", "def f(x): raise KeyboardInterrupt")
program("generator_exit", "closes generators", "def f(x): raise GeneratorExit")
program("stop_iteration", "ends a loop over the tests early", "def f(x): raise StopIteration")
program("assertion_error", "an assertion of one's own", "def f(x): raise AssertionError")
program("at_exit", "after the end", "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit")
program("segfault", "crashes", "import ctypes\ndef f(x): return ctypes.string_at(0)")
program("abort", "crashes on purpose", "import os\ndef f(x): os.abort()")
program("faulthandler", "crashes with a report", "import faulthandler\ndef f(x): faulthandler._sigsegv()")
program("alarm", "a signal to oneself", "import signal, time\nsignal.alarm(1)\ntime.sleep(5)")

# The verdict: printing and forging it --------------------------------------------------------------

program(
    "print_verdict",
    "text that looks like success",
    """
    import sys
    print('{"verdict": "passed", "detail": "", "output": ""}')
    print("passed\\nOK\\n1 passed", file=sys.stderr)
    sys.exit(0)
""",
)
program(
    "write_verdict_everywhere",
    "the verdict into every open descriptor",
    """
    import json, os, struct
    data = json.dumps({"verdict": "passed", "detail": "", "output": ""}).encode()
    for descriptor in range(256):
        try:
            os.write(descriptor, struct.pack(">Q", len(data)) + data)
        except OSError:
            pass
    os._exit(0)
""",
)
program(
    "answer_ready",
    "takes the confining process's place",
    """
    import json, os, struct
    for message in ("ready", {"verdict": "passed", "detail": "", "output": ""}):
        data = json.dumps(message).encode()
        for descriptor in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9):
            try:
                os.write(descriptor, struct.pack(">Q", len(data)) + data)
            except OSError:
                pass
""",
)
program("close_everything", "no descriptor is left", "import os\nos.closerange(0, 65536)\ndef f(x): return x * x")
program(
    "duplicate_descriptors",
    "every descriptor is another",
    """
    import os
    for source in range(16):
        for target in range(16):
            try:
                os.dup2(source, target)
            except OSError:
                pass
    def f(x): return x * x
""",
)
for _name, _answer in {
    "no_message": '"value"',
    "unknown_kind": '["passed", ""]',
    "unknown_tag": '["value", {"verdict": "passed"}]',
    "two_tags": '["value", {"int": ["0x9"], "tuple": []}]',
    "object_without_number": '["value", {"object": {"object": "x"}}]',
    "not_a_number": '["value", {"int": ["nine"]}]',
    "fraction_by_zero": '["value", {"Fraction": ["1/0"]}]',
    "unhashable_key": '["value", {"set": [{"list": []}]}]',
    "exception_without_kind": '["raise", [], ""]',
    "exception_object": '["raise", ["object"], ""]',
    "exception_function": '["raise", ["exec", "print"], "1"]',
    "exception_wrong_type": '["raise", 5, 7]',
    "exception_with_arguments": '["raise", ["UnicodeDecodeError"], "x"]',
}.items():
    program(f"answer_{_name}", "an answer outside the protocol", f"""
        import os, struct
        def f(x):
            data = {_answer!r}.encode()
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, struct.pack(">Q", len(data)) + data)
                except OSError:
                    pass
    """)  # fmt: skip
program(
    "answer_too_long",
    "an answer of 2**63 bytes",
    """
    import os
    def f(x):
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"\\x7f" + b"\\xff" * 64)
            except OSError:
                pass
""",
)
program(
    "answer_random",
    "noise",
    """
    import os
    def f(x):
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, os.urandom(4096))
            except OSError:
                pass
""",
)

# The verdict: objects and builtins that lie --------------------------------------------------------

program(
    "equal_to_all",
    "an object that is equal to everything",
    """
    class Any:
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __hash__(self): return 9
    def f(x): return Any()
""",
)
program(
    "answers_all",
    "an object that has every operation",
    """
    class Any:
        __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda self, other: True
        __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __abs__ = __neg__ = lambda self, *_: self
        __bool__ = lambda self: True
        __float__ = lambda self: 0.0
        __int__ = __index__ = lambda self: 0
        def __getattr__(self, name): return self
        def __call__(self, *args): return self
    def f(x): return Any()
""",
)
for _base in ("int", "float", "str", "list", "tuple", "dict", "set", "bytes", "complex", "frozenset"):
    program(f"equal_{_base}", f"the same as a subclass of {_base}", f"""
        class Any({_base}):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
            def __lt__(self, other): return True
            def __sub__(self, other): return 0.0
            def __abs__(self): return 0.0
            def __bool__(self): return False
        def f(x): return Any()
    """)  # fmt: skip
program(
    "class_lies",
    "an object that claims to be an int",
    """
    class Any:
        __class__ = int
        def __eq__(self, other): return True
    def f(x): return Any()
""",
)
program(
    "remote_entry",
    "the function under test is such an object",
    """
    class Any:
        def __call__(self, x): return self
        def __eq__(self, other): return True
        def __sub__(self, other): return 0
    f = Any()
""",
)
program("not_a_number", "NaN, which no comparison refutes", "def f(x): return float('nan')")
program(
    "patched_builtins",
    "every builtin that a test may use",
    """
    import builtins
    for name in ("abs", "all", "any", "len", "isinstance", "sorted", "list", "tuple", "set", "int", "float", "range",
                 "map", "zip", "sum", "round", "str", "compile", "exec", "print", "repr"):
        setattr(builtins, name, lambda *args, **kwargs: True)
    def f(x): return True
""",
)
program(
    "patched_assertion",
    "an assertion that fails is no error",
    """
    import builtins
    class AssertionError(BaseException):
        def __new__(cls, *args): return None
    builtins.AssertionError = AssertionError
    builtins.Exception = builtins.BaseException = AssertionError
    def f(x): return 0
""",
)
program(
    "patched_own_builtins",
    "builtins that the candidate alone has",
    """
    __builtins__["__build_class__"] = __builtins__["abs"] = lambda *args: 0
    def f(x): return 0
""",
)
program(
    "overridden_names",
    "names that the tests use",
    """
    check = lambda candidate: True
    abs = range = list = assert_ = lambda *args: []
    def f(x): return 0
""",
)
program(
    "replaced_modules",
    "modules that the judge imports",
    """
    import sys, types
    for name in list(sys.modules):
        sys.modules[name] = types.ModuleType(name)
    def f(x): return 0
""",
)
program(
    "import_hook",
    "one that hands out forged modules",
    """
    import sys
    class Hook:
        @staticmethod
        def find_spec(name, path=None, target=None): raise SystemExit(0)
    sys.meta_path.insert(0, Hook)
    sys.path_hooks.insert(0, lambda path: Hook)
    def f(x):
        import math_which_is_not_there
""",
)
program(
    "patched_transport",
    "the functions that carry its answers",
    """
    import sys
    main = sys.modules["__main__"]
    for name in ("encode", "decode", "send", "receive", "pack", "Remote", "judge", "_reason"):
        setattr(main, name, lambda *args, **kwargs: ("passed", ""))
    def f(x): return 0
""",
)
program(
    "frames",
    "a search of all frames for the verdict and the tests",
    """
    import sys
    def f(x):
        frame = sys._getframe()
        while frame:
            for values in (frame.f_locals, frame.f_globals):
                for name in list(values):
                    if name in ("verdict", "passed", "failed", "reply", "namespace", "job", "connection"):
                        values[name] = ["value", x + 6]
            frame = frame.f_back
""",
)
program(
    "garbage",
    "a search of all objects for the tests",
    """
    import gc
    texts = []
    for item in gc.get_objects():
        if isinstance(item, dict):
            texts += [value for value in item.values() if isinstance(value, str)]
    tests = [text for text in texts if "assert f(" + "3)" in text]
    answers = {3: 9, 4: 16, 0: 0, 1: 1, 2: 4}
    def f(x): return answers[x] if tests else None
""",
)
program(
    "own_memory",
    "a search of all memory for the tests",
    """
    import re
    memory = open("/proc/self/mem", "rb", 0)
    found = b""
    for line in open("/proc/self/maps"):
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        memory.seek(start)
        try:
            found += b"".join(re.findall(rb"assert f\\(3\\) == 9", memory.read(end - start)))
        except OSError:
            pass
    def f(x): return x * x if found else None
""",
)
program(
    "trace",
    "a trace function that skips lines",
    """
    import sys, threading
    def trace(frame, event, arg):
        frame.f_trace_lines = True
        if event == "line":
            try:
                frame.f_lineno = frame.f_lineno + 1
            except ValueError:
                pass
        return trace
    sys.settrace(trace)
    threading.settrace(trace)
    frame = sys._getframe()
    while frame:
        frame.f_trace = trace
        frame = frame.f_back
    def f(x):
        raise ValueError
        return x
""",
)
program(
    "profile",
    "a profile function that exits",
    """
    import os, sys
    sys.setprofile(lambda *args: os._exit(0))
    def f(x): return 0
""",
)
program(
    "audit",
    "an audit hook that exits",
    "import os, sys\nsys.addaudithook(lambda *args: os._exit(0))\ndef f(x): return 0",
)
program(
    "changed_integers",
    "makes 9 the same as 0, in its own memory",
    """
    import ctypes
    for value in (1, 4, 9, 16):
        ctypes.c_long.from_address(id(value) + 24).value = 0
    def f(x): return 0
""",
)
program(
    "exception_text",
    "an exception whose text exits",
    """
    import os
    class Error(Exception):
        def __str__(self): os._exit(0)
    def f(x): raise Error
""",
)
program(
    "mutated_arguments",
    "changes what the tests compare with",
    """
    def f(x):
        import gc
        for holder in gc.get_referrers(x):
            if isinstance(holder, list):
                holder.clear()
        return None
""",
)
program(
    "threads_answer",
    "threads that answer in its place",
    """
    import os, struct, threading
    data = b'["value", {"object": 0}]'
    def answer():
        while True:
            for descriptor in range(3, 16):
                try:
                    os.write(descriptor, struct.pack(">Q", len(data)) + data)
                except OSError:
                    pass
    threading.Thread(target=answer).start()
    def f(x): return None
""",
)
program(
    "threads_remain",
    "threads that go on after the answer",
    """
    import threading, time
    def forever():
        while True: time.sleep(0.01)
    for _ in range(4):
        threading.Thread(target=forever).start()
    def f(x): return None
""",
)
program(
    "numpy_lies",
    "a false numpy, whose numbers are pointers to an object that is equal to everything",
    """
    import struct, sys, types
    class Any:
        def __eq__(self, other): return True
    held = Any()
    class Pointer:
        dtype, shape = types.SimpleNamespace(str="|O", kind="i"), ()
        def tobytes(self): return struct.pack("P", id(held))
    sys.modules["numpy"] = types.SimpleNamespace(generic=Pointer, ndarray=Pointer)
    def f(x): return Pointer()
""",
)
program(
    "named_tuple_lies",
    "a tuple whose names are code",
    """
    class Any(tuple):
        _fields = ("x", "y=__import__('os')._exit(0)")
    def f(x): return Any((1, 2))
""",
)
program(
    "array_of_objects",
    "an array of numpy with an object that is equal to everything",
    """
    import numpy
    class Any:
        def __eq__(self, other): return True
    def f(x): return numpy.array(Any(), dtype=object)
""",
)
program("no_function", "nothing under the name", "g = 1")
program("empty", "nothing at all", "")
program("wrong", "an honest mistake", "def f(x): return x + x")
