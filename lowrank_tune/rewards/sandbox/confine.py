"""Confines this process, step by step in a fixed order, before it receives any untrusted code."""

from __future__ import annotations

import os
import resource
import sys

from lowrank_tune.rewards.sandbox import landlock, mounts, namespaces, seccomp
from lowrank_tune.rewards.sandbox.syscalls import (
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    drop_capabilities,
    exit_with_parent,
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
    """Confines this process at a level; `descriptor` stays open. Returns the level, the user and the version of
    Landlock. Raises OSError if a step fails.

    `memory`: bytes of address space. `seconds`: CPU time. `tasks`: processes and threads that its user may have in all
    (0: no limit).
    """
    paths = mounts.library_paths()
    readable = mounts.readable(paths)
    # bubblewrap ends with its parent by itself, and all processes in its namespace with it
    if level != "bubblewrap":
        exit_with_parent(parent)
    if level == "namespaces":
        namespaces.enter(readable)
        _continue_in_child(descriptor)
    # opened while this process still may
    readable_descriptors = landlock.open_paths(readable)
    writable_descriptors = landlock.open_paths(mounts.WRITABLE)
    _keep_imports_working(paths)
    _become_nobody()
    # again, because a new process and a new user lose the setting
    if level != "bubblewrap":
        # the first process of a namespace sees its parent as process 0
        exit_with_parent(0 if level == "namespaces" else parent)
    drop_capabilities()
    prctl(PR_SET_NO_NEW_PRIVS)
    _limit(memory, seconds, tasks)
    os.environ.clear()
    landlock_version = restrict(level, readable_descriptors, writable_descriptors)
    return {
        "level": level,
        "uid": os.getuid(),
        "landlock": landlock_version,
    }


def restrict(
    level: str,
    readable: list[int],
    writable: list[int],
) -> int:
    """Installs Landlock if the level needs it or the kernel has it, then the filter of system calls. Returns the
    version of Landlock, or 0."""
    landlock_version = 0
    if level == "landlock" or (level != "none" and landlock.version()):
        landlock_version = landlock.restrict(readable, writable)
    for descriptor in (*readable, *writable):
        os.close(descriptor)
    if level != "none":
        seccomp.restrict()
    return landlock_version


def _continue_in_child(descriptor: int) -> None:
    """Returns in a child, the first process of the new namespace; this process waits for it and exits as it does."""
    if child := os.fork():
        os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)


def _keep_imports_working(paths: list[str]) -> None:
    """Maps the import paths to open folders if the user nobody may not enter the folders above them, as /root."""
    mapping = {path: path for path in paths}
    if os.geteuid() == 0 and not all(_is_traversable(path) for path in paths):
        for path in paths:
            if os.path.isdir(path):
                mapping[path] = f"/proc/self/fd/{os.open(path, os.O_PATH)}"
    # packages that are imported may still import modules of theirs
    for module in list(sys.modules.values()):
        package_path = getattr(module, "__path__", None)
        if isinstance(package_path, list):
            package_path[:] = [_mapped(os.path.realpath(entry), mapping) for entry in package_path]
    sys.path[:] = mapping.values()
    sys.path_importer_cache.clear()


def _mapped(entry: str, mapping: dict[str, str]) -> str:
    for path, mapped in mapping.items():
        if entry.startswith(path + "/"):
            entry = mapped + entry[len(path) :]
    return entry


def _is_traversable(path: str) -> bool:
    """Returns whether all users may enter the folders of a path."""
    while path != "/":
        if not os.stat(path).st_mode & 0o001 and os.path.isdir(path):
            return False
        path = os.path.dirname(path)
    return True


def _become_nobody() -> None:
    """Changes root to the user nobody. If other users may not read the standard library, or the system has no user
    nobody (as in some user namespaces), the user stays root, without capabilities and with all other restrictions; the
    returned status has the user."""
    if os.geteuid() != 0 or not os.stat(os.__file__).st_mode & OTHERS_READ_BIT:
        return
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return
    # else /proc/self would belong to root, and the open folders could not be used
    prctl(PR_SET_DUMPABLE, 1)


def _limit(
    memory: int,
    seconds: int,
    tasks: int,
) -> None:
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
        if hard != resource.RLIM_INFINITY:
            size = min(size, hard)
        resource.setrlimit(limit, (size, size))
