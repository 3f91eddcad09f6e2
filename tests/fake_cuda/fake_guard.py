"""Compiles `guard.cpp`, and runs programs of this folder with it: their torch has a CUDA device without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SOURCE = FOLDER / "guard.cpp"
COMPILER = "g++"
TORCH = Path(torch.__file__).parent
TORCH_LIBRARIES = TORCH / "lib"
TORCH_INCLUDES = (TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include")


def unavailable() -> str | None:
    """Returns why the fake device cannot be used here, or None."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "torch is a GPU build, which has a device guard of its own"
    if sys.platform != "linux":
        return "the fake CUDA device is preloaded, which needs Linux"
    if shutil.which(COMPILER) is None:
        return f"there is no {COMPILER}"
    return None


def compile_guard(folder: Path) -> Path:
    """Returns the compiled library in `folder`. It is compiled once for each text of `guard.cpp` and each torch."""
    content = f"{SOURCE.read_text()} {torch.__version__} {TORCH_LIBRARIES}"
    name = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    library = folder / f"fake_cuda_{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may compile at the same time, so the file gets its name when it is complete.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            compiled = Path(temporary) / library.name
            subprocess.run(_command(compiled), check=True)
            compiled.replace(library)
    return library


def _command(output: Path) -> list[str]:
    includes = [f"-I{path}" for path in TORCH_INCLUDES]
    return [
        COMPILER,
        "-O1",
        "-std=c++20",
        "-fPIC",
        "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *includes,
        str(SOURCE),
        "-o",
        str(output),
        f"-L{TORCH_LIBRARIES}",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{TORCH_LIBRARIES}",
    ]


def environment(library: Path) -> dict[str, str]:
    """Returns the environment of a process with the fake device."""
    python_path = os.pathsep.join([str(ROOT), str(FOLDER), str(ROOT / "benchmarks")])
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONPATH": python_path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run_on_fake_gpu(folder: Path, program: Path, *words: str) -> Any:
    """Runs a program that writes JSON into the file named by its last argument. Returns what it wrote; raises
    AssertionError with its output if it fails."""
    library = compile_guard(folder)
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.json"
        done = subprocess.run(
            [sys.executable, str(program), *words, str(result)],
            env=environment(library),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(result.read_bytes())


def exit_with_result(file: Path, result: Any) -> NoReturn:
    """Writes what `run_on_fake_gpu` returns, and ends the process. torch's thread of the fake device may still run when
    the interpreter ends it, which aborts the process: it ends without that."""
    file.write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
