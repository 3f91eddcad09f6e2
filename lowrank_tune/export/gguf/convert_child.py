"""A program (`python convert_child.py CONVERTER PRE BOS ...`) that runs llama.cpp's converter with two facts that it
cannot derive from every tokenizer.

The converter recognizes tokenizers by a hash of their output for one text, so it does not recognize a newly trained
one, even if that splits words by known rules. PRE is llama.cpp's name of these rules (empty for none), and is used only
for tokenizers that are not recognized. BOS (0 or 1) decides whether software puts the BOS before every text: programs
differ without it, and a chat template can omit it although the tokenizer's own call adds it.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def main(
    converter: str,
    pre: str,
    bos: str,
    *arguments: str,
) -> None:
    folder = Path(converter).parent
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    _patch_bos(importlib.import_module("gguf").SpecialVocab, bos == "1")
    # the converter of an older llama.cpp is one file, and is not patched
    if pre and (folder / "conversion").is_dir():
        _patch_pretokenizer(importlib.import_module("conversion.base").TextModel, pre)
    sys.argv = [converter, *arguments]
    runpy.run_path(converter, run_name="__main__")


def _patch_pretokenizer(text_model: Any, pre: str) -> None:
    original = text_model.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(original(self, tokenizer))
        except NotImplementedError:
            return pre

    text_model.get_vocab_base_pre = get_vocab_base_pre


def _patch_bos(vocabulary: Any, adds: bool) -> None:
    original = vocabulary.add_to_gguf

    def add_to_gguf(
        self: Any,
        *arguments: Any,
        **more: Any,
    ) -> None:
        self.add_special_token["bos"] = adds
        original(self, *arguments, **more)

    vocabulary.add_to_gguf = add_to_gguf


if __name__ == "__main__":
    main(*sys.argv[1:])
