"""The script of a worker process; the other side is `worker_process.py` in the main process.

It is started by its path and imports at first only the standard library, so that it starts in milliseconds and without
torch. It reads one line of JSON after the other from a socket and answers each with one line. The last argument names
the module whose `start()` returns the function that answers the messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "lowrank_tune"
PR_SET_PDEATHSIG = 1
Handler = Callable[[Any], Any]
"""Returns the reply to a message."""


def exit_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends, also within C code that nothing interrupts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # the parent may have ended before the call above
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def import_without_init(name: str, folder: str) -> Iterator[None]:
    """Makes the modules of a package importable without its `__init__`, which would import torch: seconds and 300 MB
    per worker."""
    if name in sys.modules:
        yield
        return
    package = ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package
    try:
        yield
    finally:
        # a user's file may import the real package
        del sys.modules[name]


def import_own_package() -> None:
    """Imports the package that this file belongs to, whatever the import path has: without its own files on the path,
    where a user's file would find them."""
    folder = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def load_handler(module: str) -> Handler:
    """Returns the function that answers the messages: `start()` of a module of this package."""
    import_own_package()
    layer = module.split(".")[1]
    folder = Path(__file__).resolve().parents[1] / layer
    with import_without_init(f"{PACKAGE}.{layer}", str(folder)):
        handler: Handler = importlib.import_module(module).start()
    return handler


def main(
    descriptor: int,
    parent: int,
    module: str,
) -> None:
    """Answers messages until the other end is closed."""
    exit_with_parent(parent)
    os.set_inheritable(descriptor, False)
    handle: Handler | None = None
    fault = ""
    try:
        handle = load_handler(module)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rwb") as lines:
        while line := lines.readline():
            request = json.loads(line.decode("utf-8", "surrogatepass"))
            reply: dict[str, Any] = {"token": request["token"]}
            if handle is None:
                reply["fault"] = fault
            else:
                reply["reply"] = handle(request["message"])
            encoded = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
            lines.write(encoded + b"\n")
            lines.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
