"""Landlock (Linux 5.13 and newer): restricts the files that this process and its children can open. Needs no
privileges."""

from __future__ import annotations

import ctypes
import os
import stat

from lowrank_tune.rewards.sandbox.syscalls import syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# numbers of the system calls, equal on every architecture
CREATE = 444
ADD = 445
RESTRICT = 446
VERSION = 1
PATH_BENEATH = 1
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
TRUNCATE = 1 << 14
FILE_RIGHTS = ((1, 13), (2, 14), (3, 15), (5, 16))  # (version, number of file rights from this version on)
# all rights, known to the kernel from version 4 and from version 6 on
CONNECT_AND_BIND = 3
SIGNALS_AND_ABSTRACT_SOCKETS = 3


class RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = [
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class PathBeneathAttr(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def version() -> int:
    """Returns the version of Landlock in the kernel; 0 if it has none."""
    try:
        return syscall(
            CREATE,
            "landlock",
            None,
            0,
            VERSION,
        )
    except OSError:
        return 0


def open_paths(paths: Iterable[str]) -> list[int]:
    """Returns open descriptors of the paths, for `restrict`; paths that do not exist are left out."""
    return [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths if os.path.exists(path)]


def restrict(readable: Iterable[int], writable: Iterable[int]) -> int:
    """Allows only reading beneath `readable`, and reading and writing of the files `writable`. Returns the version
    used. Raises OSError if the kernel has none.

    PR_SET_NO_NEW_PRIVS must be set.
    """
    abi_version = syscall(
        CREATE,
        "landlock",
        None,
        0,
        VERSION,
    )
    num_rights = max(count for since, count in FILE_RIGHTS if abi_version >= since)
    files = (1 << num_rights) - 1
    attributes = RulesetAttr(files, CONNECT_AND_BIND, SIGNALS_AND_ABSTRACT_SOCKETS)
    if abi_version < 4:
        size = 8
    elif abi_version < 6:
        size = 16
    else:
        size = 24
    ruleset = syscall(
        CREATE,
        "landlock_create_ruleset",
        ctypes.addressof(attributes),
        size,
        0,
    )
    for descriptor in readable:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        _allow(ruleset, descriptor, READ_FILE | READ_DIR if is_folder else READ_FILE)
    for descriptor in writable:
        _allow(ruleset, descriptor, (READ_FILE | WRITE_FILE | TRUNCATE) & files)
    syscall(
        RESTRICT,
        "landlock_restrict_self",
        ruleset,
        0,
    )
    os.close(ruleset)
    return abi_version


def _allow(
    ruleset: int,
    descriptor: int,
    rights: int,
) -> None:
    rule = PathBeneathAttr(rights, descriptor)
    syscall(
        ADD,
        "landlock_add_rule",
        ruleset,
        PATH_BENEATH,
        ctypes.addressof(rule),
        0,
    )
