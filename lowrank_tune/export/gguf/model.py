"""Converts a merged model to one GGUF file with llama.cpp's own converter, and its quantizer for the small types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Emit, Progress
from lowrank_tune.export.gguf.llama_cpp import CONVERTER, Quantizer
from lowrank_tune.full_disk import raise_if_full
from lowrank_tune.json_files import read_json

BITS_PER_WEIGHT = {
    "f32": (32.0, 0),
    "f16": (16.0, 1),
    "bf16": (16.0, 32),
    "q8_0": (8.5, 7),
    "q6_k": (6.6, 18),
    "q5_k_m": (5.7, 17),
    "q5_k_s": (5.6, 16),
    "q5_1": (6.0, 9),
    "q5_0": (5.6, 8),
    "q4_k_m": (4.9, 15),
    "q4_k_s": (4.7, 14),
    "q4_1": (5.1, 3),
    "q4_0": (4.7, 2),
    "iq4_nl": (4.7, 25),
    "iq4_xs": (4.5, 30),
    "q3_k_l": (4.3, 13),
    "q3_k_m": (4.0, 12),
    "q3_k_s": (3.7, 11),
    "q2_k": (3.4, 10),
}
"""Approximate bits per weight, and llama.cpp's number of each type."""
NATIVE_OUTTYPES = ("f32", "f16", "bf16", "q8_0")
"""Types that the converter writes without the quantizer."""
MAX_OUTPUT_LINES = 200
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "use_regex": True,
}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRETOKENIZERS: dict[str, tuple[Any, Any]] = {
    "gpt-2": (None, BYTE_LEVEL),
    "smollm": (
        None,
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    ),
    "qwen2": (
        {"type": "NFC"},
        {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN2},
                    "behavior": "Isolated",
                    "invert": False,
                },
                BYTE_LEVEL | {"use_regex": False},
            ],
        },
    ),
}
"""Normalizer and pre-tokenizer rules of a tokenizer.json, by llama.cpp's name of the same rules. (llama.cpp does not
apply the normalizer of Qwen2, for Qwen's own models either.)"""


def estimate_gguf_size(weights: int, kind: str) -> int:
    """Returns an upper estimate of the bytes of a GGUF file, with those of the 16-bit file that it is quantized
    from."""
    size = int(weights * BITS_PER_WEIGHT[kind][0] / 8 * 1.05)
    if kind in NATIVE_OUTTYPES:
        return size
    return size + int(weights * 2.1)


def pretokenizer_name(merged: Path) -> str | None:
    """Returns llama.cpp's name of the rules by which a tokenizer splits words, None if they are not in `PRETOKENIZERS`,
    or it is not BPE."""
    try:
        raw = read_json(merged / "tokenizer.json")
        if raw["model"]["type"] != "BPE" or raw["model"].get("byte_fallback"):
            return None
        stated = (raw.get("normalizer"), _without_offsets(raw["pre_tokenizer"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name, rules in PRETOKENIZERS.items():
        if rules == stated:
            return name
    return None


def _without_offsets(pretokenizer: Any) -> Any:
    if isinstance(pretokenizer, dict):
        return {key: _without_offsets(value) for key, value in pretokenizer.items() if key != "trim_offsets"}
    if isinstance(pretokenizer, list):
        return [_without_offsets(rule) for rule in pretokenizer]
    return pretokenizer


def convert(
    folder: Path,
    merged: Path,
    file: Path,
    kind: str,
    name: str,
    adds_bos: bool,
    emit: Emit,
) -> None:
    """Runs the converter in `folder` on a merged model. `adds_bos`: software must put the BOS before every text.

    Raises TrainingError with the converter's error, UserError for a model that it does not support.
    """
    child = Path(__file__).with_name("convert_child.py")
    command = [
        sys.executable,
        "-P",
        str(child),
        str(folder / CONVERTER),
        pretokenizer_name(merged) or "",
        str(int(adds_bos)),
        str(merged),
        "--outfile",
        str(file),
        "--outtype",
        kind,
        "--model-name",
        name,
    ]
    code, output = run_tool(
        command,
        f"llama.cpp writes {kind}",
        r"Writing:\s+(\d+)%()",
        emit,
    )
    text = "\n".join(output)
    if code == 0 and file.is_file():
        return
    raise_if_full(text)
    if "pre-tokenizer was not recognized" in text:
        raise UserError(
            "llama.cpp's converter does not support this base's tokenizer, so no GGUF of the whole model can be made; "
            "`--to gguf-lora` and `--to peft` need no tokenizer"
        )
    missing = re.search(r"No module named '([\w.]+)'", text)
    if missing:
        package = missing.group(1)
        raise UserError(f"llama.cpp's converter needs the package {package}: pip install 'lowrank-tune[export]'")
    raise TrainingError(f"llama.cpp's converter failed (exit code {code}): {_error_line(output)}")


def quantize(
    tool: Quantizer,
    source: Path,
    file: Path,
    kind: str,
    emit: Emit,
) -> None:
    """Runs the quantizer. Raises TrainingError with the quantizer's error."""
    _, number = BITS_PER_WEIGHT[kind]
    command = tool.command(source, file, kind, number)
    code, output = run_tool(
        command,
        f"llama.cpp quantizes to {kind}",
        r"\[\s*(\d+)/\s*(\d+)\]",
        emit,
    )
    if code or not file.is_file():
        raise_if_full("\n".join(output))
        raise TrainingError(f"llama.cpp's quantizer failed (exit code {code}): {_error_line(output)}")


def run_tool(
    command: Sequence[str],
    label: str,
    pattern: str,
    emit: Emit,
) -> tuple[int, list[str]]:
    """Runs a program and returns its exit code and its last lines of output. `pattern` matches the finished units and
    their total (100 without one) in a line. The program is killed if this process is interrupted."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("NO_LOCAL_GGUF", None)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines = list[str]()
    progress = re.compile(pattern)
    emit(Progress(description=label, done=0, total=100))
    try:
        assert process.stdout is not None
        # the carriage returns of a progress bar end lines too
        for line in process.stdout:
            lines = [*lines[-MAX_OUTPUT_LINES:], line.rstrip()]
            match = progress.search(line)
            if match:
                done, total = match.groups()
                emit(
                    Progress(
                        description=label,
                        done=int(done),
                        total=int(total or 100),
                    )
                )
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return code, [line for line in lines if line]


def _error_line(output: Sequence[str]) -> str:
    """Returns the line of the output that states the error."""
    errors = [line for line in output if re.search(r"error|exception|failed", line, re.IGNORECASE)]
    lines = errors or list(output) or ["no output"]
    last = lines[-1].strip()
    if last == "AssertionError":
        asserted = [line.strip() for line in output if line.strip().startswith("assert ")]
        if asserted:
            return f"{last}: {asserted[-1]}"
    return last
