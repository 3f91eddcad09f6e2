"""New namespaces for this process: no network, no other process, and a root folder with only the paths of `mounts`.

Root enters them directly; other users in a user namespace, if the system allows these.
"""

from __future__ import annotations

import os
import struct

from lowrank_tune.rewards.sandbox import mounts
from lowrank_tune.rewards.sandbox.syscalls import LIBC, check_errno, syscall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# mounts, cgroups, host name, IPC, processes, network
CLONE_NEW_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
CLONE_NEWUSER = 0x10000000
BIND = 1 << 12
RECURSIVE = 1 << 14
PRIVATE = 1 << 18
REMOUNT = 1 << 5
READ_ONLY = 1
NO_SUID = 2
NO_DEV = 4
DETACH = 2
MOUNT_SETATTR = 442
AT_RECURSIVE = 0x8000
ROOTS = ("/tmp", "/mnt", "/run", "/var")  # where the new root may be mounted; nothing there changes
NOBODY = 65534


def enter(readable: Sequence[str]) -> None:
    """Moves this process into new namespaces, in which its next child is the only process. Raises OSError if that is
    not allowed."""
    user = os.geteuid()
    group = os.getegid()
    check_errno(LIBC.unshare(CLONE_NEW_FLAGS | (CLONE_NEWUSER if user else 0)), "unshare")
    if user:
        _write_id_maps(user, group)
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    # opened before the new root hides them
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in readable]
    root = next(path for path in ROOTS if os.path.isdir(path))
    _mount(
        "tmpfs",
        root,
        "tmpfs",
        NO_SUID | NO_DEV,
        "size=256k,mode=755",
    )
    os.chdir(root)
    for path, source in sources:
        _bind_mount(path, source)
        os.close(source)
    for name, target in mounts.root_symlinks():
        if not os.path.lexists("." + name):
            os.symlink(target, "." + name)
    check_errno(LIBC.pivot_root(b".", b"."), "pivot_root")
    check_errno(LIBC.umount2(b".", DETACH), "umount")
    os.chdir("/")
    _mount(
        None,
        "/",
        None,
        REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEV,
    )


def _write_id_maps(uid: int, gid: int) -> None:
    """Maps nobody inside to the user outside; there are no other users."""
    for file, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as handle:
            handle.write(text)


def _bind_mount(path: str, source: int) -> None:
    """Mounts the path of an open descriptor as `path` below the new root, which is the working directory, read-only."""
    inside = "." + path
    if os.path.isdir(f"/proc/self/fd/{source}"):
        os.makedirs(inside, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        with open(inside, "x"):
            pass
    _mount(
        f"/proc/self/fd/{source}",
        inside,
        None,
        BIND | RECURSIVE,
    )
    flags = NO_SUID if path in mounts.DEVICES else READ_ONLY | NO_SUID | NO_DEV
    syscall(
        MOUNT_SETATTR,
        "mount_setattr",
        -100,
        inside.encode(),
        AT_RECURSIVE,
        struct.pack("<QQQQ", flags, 0, 0, 0),
        32,
    )


def _mount(
    source: str | None,
    target: str,
    kind: str | None,
    flags: int,
    mount_options: str | None = None,
) -> None:
    encoded = [None if argument is None else argument.encode() for argument in (source, target, kind, mount_options)]
    check_errno(
        LIBC.mount(
            encoded[0],
            encoded[1],
            encoded[2],
            flags,
            encoded[3],
        ),
        f"mount {target}",
    )
