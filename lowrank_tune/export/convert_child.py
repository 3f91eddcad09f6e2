"""Run as a program of its own (`python convert_child.py CONVERTER PRE ...`): llama.cpp's converter, told how a tokenizer that it does not know
cuts a text into words. It knows tokenizers by a hash of what they make of one text, so one that was trained at home is strange to it even
where its rules are those of a known one; PRE is the name of these rules, and is used for strange ones only."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def main(converter: str, pre: str, *arguments: str) -> None:
    folder = Path(converter).parent
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    try:
        text_model: Any = importlib.import_module("conversion.base").TextModel
    except ModuleNotFoundError:  # an older llama.cpp, where the converter is one file: it is run as it is
        text_model = None
    if text_model is not None:
        known = text_model.get_vocab_base_pre

        def told(self: Any, tokenizer: Any) -> str:
            try:
                return str(known(self, tokenizer))
            except NotImplementedError:
                return pre

        text_model.get_vocab_base_pre = told
    sys.argv = [converter, *arguments]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
