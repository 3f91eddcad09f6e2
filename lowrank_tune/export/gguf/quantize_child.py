"""A program (`python quantize_child.py SOURCE TARGET NUMBER`) that runs llama.cpp's quantizer in the module llama_cpp,
whose library can end its process. NUMBER is llama.cpp's number of the type."""

from __future__ import annotations

import ctypes
import sys


def main(
    source: str,
    target: str,
    number: str,
) -> int:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = int(number)
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
