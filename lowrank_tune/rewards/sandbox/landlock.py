"""Landlock (Linux 5.13 and newer): this process, and all it starts, opens only the files that it is given. It needs no
privilege."""

from __future__ import annotations

import ctypes
import os
import stat

from lowrank_tune.rewards.sandbox.syscalls import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# one number on every architecture
CREATE = 444
ADD = 445
RESTRICT = 446
VERSION = 1
PATH_BENEATH = 1
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
TRUNCATE = 1 << 14
FILE_RIGHTS = ((1, 13), (2, 14), (3, 15), (5, 16))  # from this version on so many
# from version 4, from version 6
CONNECT_AND_BIND = 3
SIGNALS_AND_ABSTRACT_SOCKETS = 3


class RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class PathBeneathAttr(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def version() -> int:
    """What the kernel knows; 0 where there is none."""
    try:
        return syscall(CREATE, "landlock", None, 0, VERSION)
    except OSError:
        return 0


def open_paths(paths: Iterable[str]) -> list[int]:
    """The paths as open descriptors for `restrict`; what is missing is left out."""
    return [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths if os.path.exists(path)]


def restrict(readable: Iterable[int], writable: Iterable[int]) -> int:
    """Leaves reading beneath `readable`, and reading and writing of the files `writable`; the version used. Raises
    OSError where there is none.

    PR_SET_NO_NEW_PRIVS must be set.
    """
    abi_version = syscall(CREATE, "landlock", None, 0, VERSION)
    files = (1 << max(count for since, count in FILE_RIGHTS if abi_version >= since)) - 1
    attributes = RulesetAttr(files, CONNECT_AND_BIND, SIGNALS_AND_ABSTRACT_SOCKETS)
    if abi_version < 4:
        size = 8
    elif abi_version < 6:
        size = 16
    else:
        size = 24
    ruleset = syscall(CREATE, "landlock_create_ruleset", ctypes.addressof(attributes), size, 0)
    for descriptor in readable:
        _allow(ruleset, descriptor, READ_FILE | READ_DIR if stat.S_ISDIR(os.fstat(descriptor).st_mode) else READ_FILE)
    for descriptor in writable:
        _allow(ruleset, descriptor, (READ_FILE | WRITE_FILE | TRUNCATE) & files)
    syscall(RESTRICT, "landlock_restrict_self", ruleset, 0)
    os.close(ruleset)
    return abi_version


def _allow(ruleset: int, descriptor: int, rights: int) -> None:
    rule = PathBeneathAttr(rights, descriptor)
    syscall(ADD, "landlock_add_rule", ruleset, PATH_BENEATH, ctypes.addressof(rule), 0)
