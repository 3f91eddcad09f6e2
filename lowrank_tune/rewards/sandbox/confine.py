"""What a process does to itself, in this order, before it takes in any code that it must not trust."""

from __future__ import annotations

import os
import resource
import sys

from lowrank_tune.rewards.sandbox import landlock, mounts, namespaces, seccomp
from lowrank_tune.rewards.sandbox.syscalls import (
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    die_with_parent,
    drop_capabilities,
    prctl,
)

NOBODY = 65534
OTHERS_READ_BIT = 0o004
MAX_OPEN_FILES = 64
STACK_BYTES = 8 << 20


def confine(
    level: str,
    descriptor: int,
    parent: int,
    memory: int,
    seconds: int,
    tasks: int,
) -> dict[str, object]:
    """Confines this process at the level; `descriptor` stays open. Returns what was reached. Raises OSError where a
    step is refused.

    `memory` in bytes; `seconds` of CPU; `tasks`: how many its user may have in all, threads count too (0: no limit).
    """
    paths = mounts.library_paths()
    readable = mounts.readable(paths)
    # whose first process is bound to this one's parent, and takes all in its namespace with it
    if level != "bubblewrap":
        die_with_parent(parent)
    if level == "namespaces":
        namespaces.enter(readable)
        _continue_in_child(descriptor)
    descriptors = landlock.open_paths(readable), landlock.open_paths(mounts.WRITABLE)  # while they can be
    _keep_imports_working(paths)
    _become_nobody()
    if level != "bubblewrap":  # again: a new process, and a new user, has forgotten it
        # the parent of the first process of a namespace cannot be seen: it is 0
        die_with_parent(0 if level == "namespaces" else parent)
    drop_capabilities()
    prctl(PR_SET_NO_NEW_PRIVS)
    _limit(memory, seconds, tasks)
    os.environ.clear()
    return {"level": level, "uid": os.getuid(), "landlock": restrict(level, *descriptors)}


def restrict(level: str, readable: list[int], writable: list[int]) -> int:
    """Landlock where the level needs it or the kernel has it, then the filter of system calls. The version of Landlock,
    or 0."""
    landlock_version = 0
    if level == "landlock" or (level != "none" and landlock.version()):
        landlock_version = landlock.restrict(readable, writable)
    for descriptor in (*readable, *writable):
        os.close(descriptor)
    if level != "none":
        seccomp.restrict()
    return landlock_version


def _continue_in_child(descriptor: int) -> None:
    """Returns in a child, the first process of its namespace; this one waits for it and ends as it does."""
    if child := os.fork():
        os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)


def _keep_imports_working(paths: list[str]) -> None:
    """Imports go on where nobody may not pass the folders that lead to the standard library, as /root: through open
    folders."""
    mapping = {path: path for path in paths}
    if os.geteuid() == 0 and not all(_is_traversable(path) for path in paths):
        mapping = {path: f"/proc/self/fd/{os.open(path, os.O_PATH)}" if os.path.isdir(path) else path for path in paths}
    packages = [module for module in sys.modules.values() if isinstance(getattr(module, "__path__", None), list)]
    for package in packages:  # what of them is not imported yet comes from the same place
        package.__path__[:] = map(os.path.realpath, package.__path__)
        for path, mapped in mapping.items():
            package.__path__[:] = [
                mapped + entry[len(path) :] if entry.startswith(path + "/") else entry for entry in package.__path__
            ]
    sys.path[:] = mapping.values()
    sys.path_importer_cache.clear()


def _is_traversable(path: str) -> bool:
    while path != "/":
        if not os.stat(path).st_mode & 0o001 and os.path.isdir(path):
            return False
        path = os.path.dirname(path)
    return True


def _become_nobody() -> None:
    """A superuser becomes nobody, unless the standard library is closed to others, or this system knows no nobody, as
    some user namespaces. Then it stays what it is, without its rights, bound by the rest."""
    if os.geteuid() == 0 and os.stat(os.__file__).st_mode & OTHERS_READ_BIT:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:
            return  # what it told of itself says so
        prctl(PR_SET_DUMPABLE, 1)  # or /proc/self would belong to root and the open folders could not be used


def _limit(memory: int, seconds: int, tasks: int) -> None:
    sizes = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_STACK: STACK_BYTES,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if tasks:
        sizes[resource.RLIMIT_NPROC] = tasks
    for limit, size in sizes.items():
        hard = resource.getrlimit(limit)[1]
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(limit, (size, size))
