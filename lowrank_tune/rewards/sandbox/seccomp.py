"""A seccomp filter with a list of allowed system calls. All others return EPERM: no new process or program, no socket,
no signal to other processes, no mount.

A process that cannot start another one leaves nothing behind when it is killed, at every level of the sandbox.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lowrank_tune.rewards.sandbox.syscalls import LIBC, PR_SET_SECCOMP, check_errno

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# instructions of classic BPF: load a word at an offset, jump by comparison with a constant, return
LOAD = 0x20
EQUAL = 0x15
AT_LEAST = 0x35
RETURN = 0x06
# offsets in struct seccomp_data
NUMBER = 0
ARCHITECTURE = 4
ARGUMENTS = 16
ALLOW = 0x7FFF0000
REFUSE = 0x00050000
KILL = 0x80000000
FILTER_MODE = 2
X32_SYSCALL_BIT = 0x40000000  # x86-64 numbers from here on belong to another calling convention
AF_UNIX = 1
THREAD_FLAGS = (0x3D0F00, 0x7D0F00)  # flags that pthread_create of glibc and of musl passes to clone(2)
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # duplicates, flags and locks; not F_SETOWN, which sends signals
IOCTL = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # is a terminal, bytes waiting, blocking, close on exec

X86_64_SYSCALLS = {
    "read": 0,
    "write": 1,
    "readv": 19,
    "writev": 20,
    "pread64": 17,
    "pwrite64": 18,
    "close": 3,
    "close_range": 436,
    "openat": 257,
    "open": 2,
    "stat": 4,
    "fstat": 5,
    "lstat": 6,
    "newfstatat": 262,
    "statx": 332,
    "access": 21,
    "faccessat": 269,
    "faccessat2": 439,
    "lseek": 8,
    "getcwd": 79,
    "chdir": 80,
    "fchdir": 81,
    "readlink": 89,
    "readlinkat": 267,
    "getdents64": 217,
    "fcntl": 72,
    "flock": 73,
    "dup": 32,
    "dup2": 33,
    "dup3": 292,
    "pipe": 22,
    "pipe2": 293,
    "poll": 7,
    "ppoll": 271,
    "select": 23,
    "pselect6": 270,
    "epoll_create": 213,
    "epoll_create1": 291,
    "epoll_ctl": 233,
    "epoll_wait": 232,
    "epoll_pwait": 281,
    "eventfd2": 290,
    "fadvise64": 221,
    "statfs": 137,
    "fstatfs": 138,
    "mmap": 9,
    "munmap": 11,
    "mprotect": 10,
    "mremap": 25,
    "madvise": 28,
    "brk": 12,
    "mincore": 27,
    "membarrier": 324,
    "futex": 202,
    "set_robust_list": 273,
    "get_robust_list": 274,
    "set_tid_address": 218,
    "rseq": 334,
    "arch_prctl": 158,
    "exit": 60,
    "exit_group": 231,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "rt_sigpending": 127,
    "rt_sigsuspend": 130,
    "rt_sigtimedwait": 128,
    "sigaltstack": 131,
    "restart_syscall": 219,
    "pause": 34,
    "alarm": 37,
    "getitimer": 36,
    "setitimer": 38,
    "nanosleep": 35,
    "clock_nanosleep": 230,
    "clock_gettime": 228,
    "clock_getres": 229,
    "gettimeofday": 96,
    "time": 201,
    "times": 100,
    "getrusage": 98,
    "getpid": 39,
    "gettid": 186,
    "getppid": 110,
    "getuid": 102,
    "geteuid": 107,
    "getgid": 104,
    "getegid": 108,
    "getgroups": 115,
    "getresuid": 118,
    "getresgid": 120,
    "getpgrp": 111,
    "getpgid": 121,
    "getsid": 124,
    "uname": 63,
    "sysinfo": 99,
    "getrandom": 318,
    "getrlimit": 97,
    "getpriority": 140,
    "sched_yield": 24,
    "sched_getaffinity": 204,
    "getcpu": 309,
    "umask": 95,
    "wait4": 61,
    "waitid": 247,
    "clone": 56,
    "kill": 62,
    "tkill": 200,
    "tgkill": 234,
    "prlimit64": 302,
    "ioctl": 16,
    "socketpair": 53,
    "clone3": 435,
}
AARCH64_SYSCALLS = {
    "read": 63,
    "write": 64,
    "readv": 65,
    "writev": 66,
    "pread64": 67,
    "pwrite64": 68,
    "close": 57,
    "close_range": 436,
    "openat": 56,
    "fstat": 80,
    "newfstatat": 79,
    "statx": 291,
    "faccessat": 48,
    "faccessat2": 439,
    "lseek": 62,
    "getcwd": 17,
    "chdir": 49,
    "fchdir": 50,
    "readlinkat": 78,
    "getdents64": 61,
    "fcntl": 25,
    "flock": 32,
    "dup": 23,
    "dup3": 24,
    "pipe2": 59,
    "ppoll": 73,
    "pselect6": 72,
    "epoll_create1": 20,
    "epoll_ctl": 21,
    "epoll_pwait": 22,
    "eventfd2": 19,
    "fadvise64": 223,
    "statfs": 43,
    "fstatfs": 44,
    "mmap": 222,
    "munmap": 215,
    "mprotect": 226,
    "mremap": 216,
    "madvise": 233,
    "brk": 214,
    "mincore": 232,
    "membarrier": 283,
    "futex": 98,
    "set_robust_list": 99,
    "get_robust_list": 100,
    "set_tid_address": 96,
    "rseq": 293,
    "exit": 93,
    "exit_group": 94,
    "rt_sigaction": 134,
    "rt_sigprocmask": 135,
    "rt_sigreturn": 139,
    "rt_sigpending": 136,
    "rt_sigsuspend": 133,
    "rt_sigtimedwait": 137,
    "sigaltstack": 132,
    "restart_syscall": 128,
    "getitimer": 102,
    "setitimer": 103,
    "nanosleep": 101,
    "clock_nanosleep": 115,
    "clock_gettime": 113,
    "clock_getres": 114,
    "gettimeofday": 169,
    "times": 153,
    "getrusage": 165,
    "getpid": 172,
    "gettid": 178,
    "getppid": 173,
    "getuid": 174,
    "geteuid": 175,
    "getgid": 176,
    "getegid": 177,
    "getgroups": 158,
    "getresuid": 148,
    "getresgid": 150,
    "getpgid": 155,
    "getsid": 156,
    "uname": 160,
    "sysinfo": 179,
    "getrandom": 278,
    "getrlimit": 163,
    "getpriority": 141,
    "sched_yield": 124,
    "sched_getaffinity": 123,
    "getcpu": 168,
    "umask": 166,
    "wait4": 260,
    "waitid": 95,
    "clone": 220,
    "kill": 129,
    "tkill": 130,
    "tgkill": 131,
    "prlimit64": 261,
    "ioctl": 29,
    "socketpair": 199,
    "clone3": 435,
}
MACHINES = {"x86_64": (0xC000003E, X86_64_SYSCALLS), "aarch64": (0xC00000B7, AARCH64_SYSCALLS)}
"""By the machine of uname(2): the architecture in a filter, and the numbers of the allowed system calls."""


class SockFprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def is_supported() -> bool:
    """Returns whether there is a list for this machine."""
    return os.uname().machine in MACHINES


def argument_rules() -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns (index of an argument, values) by system call: the call is allowed only if the lower 32 bits of the
    argument are one of the values."""
    own = (os.getpid(),)
    return {
        "clone": (0, THREAD_FLAGS),
        "kill": (0, own),
        "tkill": (0, own),
        "tgkill": (0, own),
        "prlimit64": (0, (0,)),
        "fcntl": (1, FCNTL),
        "ioctl": (1, IOCTL),
        "socketpair": (0, (AF_UNIX,)),
    }


def build_filter() -> bytes:
    """Returns the filter for this process, as an array of struct sock_filter."""
    architecture, numbers = MACHINES[os.uname().machine]
    lines = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32_SYSCALL_BIT),
        (RETURN, 0, 0, KILL),
    ]
    rules = argument_rules()
    for name, number in numbers.items():
        # the flags of clone3 are in memory, where a filter cannot read them: the C library then uses clone
        action = REFUSE | errno.ENOSYS if name == "clone3" else ALLOW
        lines += _rule_lines(number, action, rules.get(name))
    lines.append((RETURN, 0, 0, REFUSE | errno.EPERM))
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def _rule_lines(
    number: int,
    action: int,
    rule: tuple[int, tuple[int, ...]] | None,
) -> Iterator[tuple[int, int, int, int]]:
    """Yields the instructions for one system call: they return `action` if the number is its own (and the argument of
    the rule is allowed), else they jump past it."""
    if rule is None:
        yield EQUAL, 0, 1, number
        yield RETURN, 0, 0, action
        return
    argument_index, values = rule
    yield EQUAL, 0, len(values) + 3, number
    yield LOAD, 0, 0, ARGUMENTS + 8 * argument_index
    for left, value in zip(range(len(values), 0, -1), values, strict=True):
        yield EQUAL, left, 0, value
    yield RETURN, 0, 0, REFUSE | errno.EPERM
    yield RETURN, 0, 0, action


def restrict() -> None:
    """Installs the filter. PR_SET_NO_NEW_PRIVS must be set, and the process must have no other thread."""
    code = build_filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = SockFprog(len(code) // 8, ctypes.addressof(buffer))
    check_errno(
        LIBC.prctl(
            PR_SET_SECCOMP,
            FILTER_MODE,
            ctypes.byref(fprog),
            0,
            0,
        ),
        "seccomp",
    )
