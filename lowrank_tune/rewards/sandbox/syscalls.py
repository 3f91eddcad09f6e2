"""The few calls of Linux that Python has no function for."""

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
    """The result of a call of the C library, or the OSError that it stands for."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{label}: {os.strerror(number)}")
    return result


def syscall(number: int, label: str, *arguments: int | bytes | None) -> int:
    """A system call by its number; integers, texts and None (NULL)."""
    converted = [
        ctypes.c_char_p(argument) if argument is None or isinstance(argument, bytes) else ctypes.c_long(argument)
        for argument in arguments
    ]
    return check_errno(int(LIBC.syscall(ctypes.c_long(number), *converted)), label)


def prctl(option: int, value: int = 1, third: int = 0) -> None:
    """prctl(2)."""
    converted = [ctypes.c_ulong(argument) for argument in (value, third, 0, 0)]
    check_errno(LIBC.prctl(ctypes.c_int(option), *converted), f"prctl {option}")


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when its parent ends, and it ends now where that has happened already."""
    prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def drop_capabilities() -> None:
    """Gives up every right of a superuser, for good."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    check_errno(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")
