"""The system calls that a program in the sandbox may use, as a filter that the kernel applies (seccomp)."""

import functools
import platform
import struct

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the numbers below, AUDIT_ARCH

# Everything that Python and its standard library need within one process: name, number on x86_64, number on aarch64
# (-: that machine has no such call).
FAMILIES = {
    "open descriptors": """
        read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69,
        pwritev 296 70, preadv2 327 286, pwritev2 328 287, lseek 8 62, close 3 57, dup 32 23, dup2 33 -,
        dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
        epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
        epoll_pwait2 441 441, eventfd2 290 19, sendfile 40 71, copy_file_range 326 285, fstat 5 80,
        fstatfs 138 44, ftruncate 77 46, fallocate 285 47, fadvise64 221 223, fsync 74 82, fdatasync 75 83,
        getdents 78 -, getdents64 217 61
    """,
    "files, as far as namespaces or Landlock let it see them": """
        open 2 -, openat 257 56, creat 85 -, stat 4 -, lstat 6 -, newfstatat 262 -, fstatat - 79, statx 332 291,
        access 21 -, faccessat 269 48, faccessat2 439 439, statfs 137 43, getcwd 79 17, chdir 80 49,
        fchdir 81 50, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
        unlink 87 -, unlinkat 263 35, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, umask 95 166
    """,
    "a socket pair": """
        recvfrom 45 207, getsockname 51 204, getpeername 52 205, getsockopt 55 209, setsockopt 54 208,
        shutdown 48 210
    """,
    "memory": """
        mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, brk 12 214, madvise 28 233, msync 26 227
    """,
    "threads, and signals within the process": """
        set_robust_list 273 99, rseq 334 293, futex 202 98, futex_waitv 449 449, set_tid_address 218 96,
        gettid 186 178, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, membarrier 324 283,
        exit 60 93, exit_group 231 94, restart_syscall 219 128, rt_sigaction 13 134, rt_sigprocmask 14 135,
        rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133,
        sigaltstack 131 132, pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103
    """,
    "time, numbers, limits": """
        clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101,
        gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165, getrandom 318 278, getrlimit 97 163,
        setrlimit 160 164, getpid 39 172, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176,
        getegid 108 177, getgroups 115 158, uname 63 160
    """,
    "for some arguments only, see ARGUMENTS": """
        prlimit64 302 261, socketpair 53 199, sendto 44 206, fcntl 72 25, ioctl 16 29, prctl 157 167
    """,
    "not allowed as they are, see filter_program": "clone 56 220, clone3 435 435",
}
NUMBERS: dict[str, list[int | None]] = {
    name: [None if number == "-" else int(number) for number in numbers]
    for family in FAMILIES.values()
    for name, *numbers in map(str.split, family.split(","))
}
# By name, the number of each argument that decides (4.5: the upper half of argument 4), and its allowed values.
ARGUMENTS: dict[str, dict[float, list[int]]] = {
    "prlimit64": {0: [0]},  # one's own limits
    # A pair of connected streams, as asyncio has: with datagrams a program reaches any socket that has a name.
    "socketpair": {0: [1], 1: [1, 0x80001, 0x801, 0x80801]},
    "sendto": {4: [0], 4.5: [0]},  # no address
    # Duplicates, flags and a pipe's size; not locks, leases, watches, nor who gets a descriptor's signals.
    "fcntl": {1: [0, 1, 2, 3, 4, 1030, 1032]},
    "ioctl": {1: [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]},  # is it a terminal, FIO*
    "prctl": {0: [15, 16]},  # a thread's name
}


@functools.cache
def filter_program() -> bytes:
    """The filter in the kernel's form: calls without a place in the list fail with EPERM; `clone` makes threads only.

    Raises:
        OSError: no list for this machine.
    """
    if platform.machine() not in ARCHITECTURES:
        raise OSError(f"no system-call filter for {platform.machine()}")
    column, architecture = ARCHITECTURES[platform.machine()]
    load, jump_equal, jump_least, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = (
        [(give, 0, 0, 0x7FFF0000)],
        [(give, 0, 0, 0x50001)],
        [(give, 0, 0, 0x50026)],
    )  # EPERM, ENOSYS
    number, arch, argument = 0, 4, lambda i: int(16 + 8 * i)  # offsets in struct seccomp_data
    decisions: dict[str, list[tuple]] = {
        # clone3 hides its flags in memory, where a filter cannot look; told that it is missing, the C library takes
        # clone. 0x10000: a thread.
        "clone3": unknown,
        "clone": [(load, 0, 0, argument(0)), (jump_set, 1, 0, 0x10000), *refuse, *allow],
    }
    for name, arguments in ARGUMENTS.items():
        decisions[name] = []
        for index, values in arguments.items():
            decisions[name].append((load, 0, 0, argument(index)))
            decisions[name] += [(jump_equal, len(values) - i, 0, value) for i, value in enumerate(values)]
            decisions[name] += refuse
        decisions[name] += allow
    of_number = {numbers[column]: decisions.get(name, allow) for name, numbers in NUMBERS.items()}
    ranges: list[tuple[int, list[tuple]]] = [(0, refuse)]  # the first number of each range, its decision
    for call in range(2 + max(filter(None, of_number))):
        if of_number.get(call, refuse) is not ranges[-1][1]:
            ranges.append((call, of_number.get(call, refuse)))

    def search(ranges: list[tuple[int, list[tuple]]]) -> list[tuple]:
        """By halves: the kernel runs the whole filter once for each number when a program starts."""
        if len(ranges) == 1:
            return ranges[0][1]
        half = len(ranges) // 2
        below = search(ranges[:half])
        return [(jump_least, len(below), 0, ranges[half][0]), *below, *search(ranges[half:])]

    kill = (give, 0, 0, 0x80000000)
    program = [(load, 0, 0, arch), (jump_equal, 1, 0, architecture), kill, (load, 0, 0, number), *search(ranges)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
