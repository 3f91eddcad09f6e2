"""The few calls of Linux that Python has no function for."""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SIGKILL = 9
CAPABILITY_VERSION = 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """The result of a call of the C library, or the OSError that it stands for."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def call(number: int, what: str, *arguments: int | bytes | None) -> int:
    """A system call by its number; integers, texts and None (NULL)."""
    made = [
        ctypes.c_char_p(each) if each is None or isinstance(each, bytes) else ctypes.c_long(each) for each in arguments
    ]
    return checked(int(LIBC.syscall(ctypes.c_long(number), *made)), what)


def control(option: int, value: int = 1, third: int = 0) -> None:
    """prctl(2)."""
    made = [ctypes.c_ulong(each) for each in (value, third, 0, 0)]
    checked(LIBC.prctl(ctypes.c_int(option), *made), f"prctl {option}")


def die_with(parent: int) -> None:
    """The kernel kills this process when its parent ends, and it ends now where that has happened already."""
    control(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def drop_capabilities() -> None:
    """Gives up every right of a superuser, for good."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    checked(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")
