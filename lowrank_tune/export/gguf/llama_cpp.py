"""llama.cpp's own converter and quantizer: where they are, and how they are fetched. They are run as they are, in
processes of their own.

A folder that the user names is taken as it is (`--llama-cpp`, or `LLAMA_CPP_DIR`). Else the converter is taken out of
the source package of llama-cpp-python, which carries it, at one version whose hash is known; it is kept in the cache.
Nothing of it is copied into this program.
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

ENV_VARIABLE = "LLAMA_CPP_DIR"
CONVERTER = "convert_hf_to_gguf.py"
LORA_CONVERTER = "convert_lora_to_gguf.py"
PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
VENDOR_PATH = "vendor/llama.cpp"
CONVERTER_FILES = (CONVERTER, LORA_CONVERTER, "conversion", "gguf-py", "LICENSE")
"""What is taken out of the package: a hundredth of it."""
MANUAL_INSTRUCTIONS = (
    f"download {ARCHIVE} from the package index and give it, or a folder of llama.cpp, with --llama-cpp (or in "
    f"{ENV_VARIABLE})"
)


@dataclass(frozen=True)
class Quantizer:
    """A program `llama-quantize`, or None for the module llama_cpp of this Python."""

    program: Path | None

    def command(self, source: Path, target: Path, kind: str, number: int) -> list[str]:
        if self.program is not None:
            return [str(self.program), str(source), str(target), kind.upper()]
        return [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("quantize_child.py")),
            str(source),
            str(target),
            str(number),
        ]


def named_folder(given: Path | None) -> Path | None:
    """What the user named on the command line or in the environment; None for neither."""
    named = os.environ.get(ENV_VARIABLE)
    if given is not None:
        return given.expanduser()
    if named:
        return Path(named).expanduser()
    return None


def converter_folder(given: Path | None, emit: Emit, fetch: bool = True) -> Path:
    """The folder with llama.cpp's converter. Raises UserError where what was named holds none, TrainingError where it
    cannot be fetched."""
    named = named_folder(given)
    if named is not None and named.is_file():
        return _extract_to_cache(named)
    if named is not None:
        converter_dir = next(
            (folder for folder in (named, named / VENDOR_PATH) if (folder / CONVERTER).is_file()), None
        )
        if converter_dir is None:
            raise UserError(
                f"--llama-cpp or {ENV_VARIABLE}: {named} holds no {CONVERTER}"
                if named.is_dir()
                else f"there is no folder {named}"
            )
        return converter_dir
    cached = cache_folder() / f"llama.cpp-{VERSION}"
    if (cached / CONVERTER).is_file():
        return cached
    if not fetch:
        raise UserError(f"llama.cpp's converter is not here: {MANUAL_INSTRUCTIONS}")
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"this Python has no pip to fetch llama.cpp's converter with: {MANUAL_INSTRUCTIONS}")
    emit(
        LogMessage(
            message=f"llama.cpp's converter is fetched once from the package index (the source package {PACKAGE} "
            f"{VERSION}, 77 MB)"
        )
    )
    with tempfile.TemporaryDirectory(prefix="lowrank-tune-") as folder:
        return _extract_to_cache(_download(Path(folder)))


def _download(folder: Path) -> Path:
    """pip compares the hash before it looks into the package."""
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
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or not (folder / ARCHIVE).is_file():
        errors = result.stderr.strip().splitlines() or ["no reason given"]
        errors = [line for line in errors if line.startswith("ERROR")] or errors
        raise TrainingError(
            f"llama.cpp's converter could not be fetched ({errors[-1].removeprefix('ERROR: ').strip()}): "
            f"{MANUAL_INSTRUCTIONS}"
        )
    return folder / ARCHIVE


def _extract_to_cache(archive: Path) -> Path:
    """The converter out of the source package, in the cache. Raises UserError where the file is another one."""
    target = cache_folder() / f"llama.cpp-{VERSION}"
    if (target / CONVERTER).is_file():
        return target
    with as_user_error(archive), archive.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != SHA256:
            raise UserError(f"{archive} is not the {ARCHIVE} that is known here (its sha256 is another one)")
    with atomic_folder(target, overwrite=False) as folder:
        _unpack(archive, folder)
    return target


def _unpack(archive: Path, folder: Path) -> None:
    """Plain files of `CONVERTER_FILES` alone, whatever else and whatever links the archive holds."""
    with tarfile.open(archive) as opened:
        for member in opened:
            parts = PurePosixPath(member.name).parts[1:]  # without the folder of the package
            relative = parts[len(PurePosixPath(VENDOR_PATH).parts) :]
            if (
                not member.isfile()
                or "/".join(parts[: -len(relative) or None]) != VENDOR_PATH
                or relative[0] not in CONVERTER_FILES
                or ".." in relative
            ):
                continue
            (folder.joinpath(*relative)).parent.mkdir(parents=True, exist_ok=True)
            content = opened.extractfile(member)
            assert content is not None
            with content, folder.joinpath(*relative).open("wb") as out:
                shutil.copyfileobj(content, out)


def find_quantizer(given: Path | None) -> Quantizer | None:
    """llama.cpp's quantizer: in the folder that the user named, on the path, or in the module llama_cpp; None where
    there is none."""
    named = named_folder(given)
    if named is None:
        candidates = []
    else:
        candidates = [named / part / "llama-quantize" for part in ("", "bin", "build/bin")]
    on_path = shutil.which("llama-quantize")
    executable = next(
        (
            candidate
            for candidate in (*candidates, *([Path(on_path)] if on_path else []))
            if os.access(candidate, os.X_OK) and candidate.is_file()
        ),
        None,
    )
    if executable is not None:
        return Quantizer(executable)
    if importlib.util.find_spec("llama_cpp") is not None:
        return Quantizer(None)
    return None


def supports_architecture(folder: Path, architectures: Sequence[str]) -> bool:
    """Whether this converter has any of these architectures: each stands in quotes where it is registered."""
    files = [folder / CONVERTER, *sorted((folder / "conversion").glob("*.py"))]
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return any(f'"{name}"' in text for name in architectures)
