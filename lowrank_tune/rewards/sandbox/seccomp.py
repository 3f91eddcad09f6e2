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

SYSCALLS = """
read                0   63
write               1   64
readv              19   65
writev             20   66
pread64            17   67
pwrite64           18   68
close               3   57
close_range       436  436
openat            257   56
open                2    -
stat                4    -
fstat               5   80
lstat               6    -
newfstatat        262   79
statx             332  291
access             21    -
faccessat         269   48
faccessat2        439  439
lseek               8   62
getcwd             79   17
chdir              80   49
fchdir             81   50
readlink           89    -
readlinkat        267   78
getdents64        217   61
fcntl              72   25
flock              73   32
dup                32   23
dup2               33    -
dup3              292   24
pipe               22    -
pipe2             293   59
poll                7    -
ppoll             271   73
select             23    -
pselect6          270   72
epoll_create      213    -
epoll_create1     291   20
epoll_ctl         233   21
epoll_wait        232    -
epoll_pwait       281   22
eventfd2          290   19
fadvise64         221  223
statfs            137   43
fstatfs           138   44
mmap                9  222
munmap             11  215
mprotect           10  226
mremap             25  216
madvise            28  233
brk                12  214
mincore            27  232
membarrier        324  283
futex             202   98
set_robust_list   273   99
get_robust_list   274  100
set_tid_address   218   96
rseq              334  293
arch_prctl        158    -
exit               60   93
exit_group        231   94
rt_sigaction       13  134
rt_sigprocmask     14  135
rt_sigreturn       15  139
rt_sigpending     127  136
rt_sigsuspend     130  133
rt_sigtimedwait   128  137
sigaltstack       131  132
restart_syscall   219  128
pause              34    -
alarm              37    -
getitimer          36  102
setitimer          38  103
nanosleep          35  101
clock_nanosleep   230  115
clock_gettime     228  113
clock_getres      229  114
gettimeofday       96  169
time              201    -
times             100  153
getrusage          98  165
getpid             39  172
gettid            186  178
getppid           110  173
getuid            102  174
geteuid           107  175
getgid            104  176
getegid           108  177
getgroups         115  158
getresuid         118  148
getresgid         120  150
getpgrp           111    -
getpgid           121  155
getsid            124  156
uname              63  160
sysinfo            99  179
getrandom         318  278
getrlimit          97  163
getpriority       140  141
sched_yield        24  124
sched_getaffinity 204  123
getcpu            309  168
umask              95  166
wait4              61  260
waitid            247   95
clone              56  220
kill               62  129
tkill             200  130
tgkill            234  131
prlimit64         302  261
ioctl              16   29
socketpair         53  199
clone3            435  435
"""
"""The allowed system calls: name, number on x86-64, and number on aarch64 (-: not there)."""


def _numbers(column: int) -> dict[str, int]:
    """Returns the numbers in a column of `SYSCALLS` by name."""
    numbers = {}
    for line in SYSCALLS.strip().splitlines():
        name, *columns = line.split()
        if columns[column] != "-":
            numbers[name] = int(columns[column])
    return numbers


MACHINES = {"x86_64": (0xC000003E, _numbers(0)), "aarch64": (0xC00000B7, _numbers(1))}
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
