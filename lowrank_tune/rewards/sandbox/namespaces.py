"""Namespaces of one's own: no network, no other process, and a root folder that holds what `view` names and nothing
else.

With a superuser's rights it takes them directly; without, in a user namespace, where the system allows these.
"""

from __future__ import annotations

import os
import struct

from lowrank_tune.rewards.sandbox import view
from lowrank_tune.rewards.sandbox.kernel import LIBC, call, checked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# mounts, cgroups, host name, IPC, processes, network
NEW = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
NEW_USER = 0x10000000
BIND, RECURSIVE, PRIVATE, REMOUNT, READ_ONLY, NO_SUID, NO_DEV = 1 << 12, 1 << 14, 1 << 18, 1 << 5, 1, 2, 4
DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
ROOTS = ("/tmp", "/mnt", "/run", "/var")  # where the new root may be mounted; nothing there changes
NOBODY = 65534


def take(readable: Sequence[str]) -> None:
    """Moves this process into namespaces of its own; the next child is alone in them. Raises OSError where that is not
    allowed."""
    user, group = os.geteuid(), os.getegid()
    checked(LIBC.unshare(NEW | (NEW_USER if user else 0)), "unshare")
    if user:
        _map(user, group)
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    # before the new root may hide them
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in readable]
    root = next(path for path in ROOTS if os.path.isdir(path))
    _mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEV, "size=256k,mode=755")
    os.chdir(root)
    for path, source in sources:
        _bind(path, source)
        os.close(source)
    for name, target in view.links():
        if not os.path.lexists("." + name):
            os.symlink(target, "." + name)
    checked(LIBC.pivot_root(b".", b"."), "pivot_root")
    checked(LIBC.umount2(b".", DETACH), "umount")
    os.chdir("/")
    _mount(None, "/", None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV)


def _map(user: int, group: int) -> None:
    """Nobody inside is the user outside; there is no one else."""
    for file, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{file}", "w") as handle:
            handle.write(text)


def _bind(path: str, source: int) -> None:
    """Shows what `source` is an open descriptor of beneath the new root, the working directory, as `path`, for reading
    only."""
    inside = "." + path
    if os.path.isdir(f"/proc/self/fd/{source}"):
        os.makedirs(inside, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        with open(inside, "x"):
            pass
    _mount(f"/proc/self/fd/{source}", inside, None, BIND | RECURSIVE)
    flags = NO_SUID if path in view.DEVICES else READ_ONLY | NO_SUID | NO_DEV
    call(MOUNT_SETATTR, "mount_setattr", -100, inside.encode(), AT_RECURSIVE, struct.pack("<QQQQ", flags, 0, 0, 0), 32)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    made = [None if each is None else each.encode() for each in (source, target, kind, data)]
    checked(LIBC.mount(made[0], made[1], made[2], flags, made[3]), f"mount {target}")
