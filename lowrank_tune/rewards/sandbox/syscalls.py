"""Linux system calls without a function in Python."""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SIGKILL = 9
CAPABILITY_VERSION = 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)


def check_errno(result: int, label: str) -> int:
    """Returns the result of a call of the C library. Raises OSError if it is an error."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{label}: {os.strerror(number)}")
    return result


def syscall(
    number: int,
    label: str,
    *arguments: int | bytes | None,
) -> int:
    """Calls a system call by its number, with integers, bytes and None (NULL). Raises OSError."""
    converted = [
        ctypes.c_char_p(argument) if argument is None or isinstance(argument, bytes) else ctypes.c_long(argument)
        for argument in arguments
    ]
    return check_errno(int(LIBC.syscall(ctypes.c_long(number), *converted)), label)


def prctl(option: int, value: int = 1) -> None:
    """Calls prctl(2). Raises OSError."""
    converted = [ctypes.c_ulong(argument) for argument in (value, 0, 0, 0)]
    check_errno(LIBC.prctl(ctypes.c_int(option), *converted), f"prctl {option}")


def exit_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends; ends it at once if the parent has already ended."""
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def drop_capabilities() -> None:
    """Removes all capabilities of this process for good."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    check_errno(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")
