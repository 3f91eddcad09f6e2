"""Loads a module from text, without a file."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader

TYPE_CHECKING = False  # the imports below would take longer than the whole start
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any


class SourceTextLoader(SourceFileLoader):
    """Loads a module from `source`."""

    def __init__(self, name: str, source: bytes) -> None:
        super().__init__(name, f"<{name}>")
        self.source = source

    def get_data(self, path: str) -> bytes:
        return self.source

    def path_stats(self, path: str) -> dict[str, Any]:
        raise OSError  # nothing is cached


def load_module(
    name: str,
    source: str,
    namespace: dict[str, Any],
    loader: type[SourceTextLoader] = SourceTextLoader,
) -> ModuleType:
    """Returns the module of a text, which can use the names of `namespace`. Raises what the text raises."""
    module = type(sys)(name)
    module.__dict__.update(namespace)
    # dataclasses look up their module while it is executed
    sys.modules[name] = module
    loader(name, source.encode("utf-8", "surrogatepass")).exec_module(module)
    return module
