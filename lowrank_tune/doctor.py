"""Is this machine fit? Every check ends as a line: ok, a warning, or a fault, with the cure. Nothing is downloaded, no
secret is shown.

Heavy libraries are imported inside the checks: a doctor must be able to say that one of them is broken.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune import unsloth_import
from lowrank_tune.paths import nearest_existing
from lowrank_tune.ui import escape_control_chars

GIB = 1 << 30
# GiB: too little to save anything; too little for a 7B base and its cache
MIN_DISK_GIB = 1.0
RECOMMENDED_DISK_GIB = 20.0
REQUIRED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "PyYAML",
    "rich",
    "typer",
)
NF4_TOLERANCE = 1e-2  # of a bf16 product against the dequantized weight's, relative
STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}
Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class CheckResult:
    """One line. `fix` is what to do; empty where all is well."""

    level: Level
    name: str
    detail: str
    fix: str = ""


def run_checks(environ: Mapping[str, str] = os.environ) -> list[CheckResult]:
    """All checks, in order. A check that breaks is itself a fault."""
    results: list[CheckResult] = []
    checks: dict[str, Callable[[], Iterator[CheckResult]]] = {
        "Python": python,
        "versions": versions,
        "CUDA": gpu,
        "4 bits": bitsandbytes_4bit,
        "disk": lambda: disk(environ),
        "hub": lambda: hub(environ),
        "terminal": lambda: terminal(environ),
        "system": system,
        "sandbox": sandbox,
        "unsloth": unsloth,
    }
    for name, check in checks.items():
        try:
            results += check()
        except Exception as error:
            fix = "install the packages again, within the bounds above"
            results.append(CheckResult("fault", name, f"the check broke: {type(error).__name__}: {error}", fix))
    return results


def print_results(results: list[CheckResult], console: Console) -> None:
    """A line each, and a word at the end."""
    table = Table.grid(padding=(0, 2))
    for result in results:
        detail = Text(escape_control_chars(result.detail))
        if result.fix:
            detail.append(f"\n-> {escape_control_chars(result.fix)}", STYLES[result.level])
        table.add_row(Text(result.level, STYLES[result.level]), Text(result.name), detail)
    console.print(table)
    faults, warnings = (sum(result.level == level for result in results) for level in ("fault", "warning"))
    if not faults:
        verdict = "this machine is fit"
    else:
        verdict = "this machine is not fit yet"
    console.print(
        Text(
            f"{verdict}: {faults} faults, {warnings} warnings",
            STYLES["fault" if faults else "warning" if warnings else "ok"],
        )
    )


def python() -> Iterator[CheckResult]:
    """3.11 or newer, 64 bits."""
    detail = f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})"
    if sys.version_info < (3, 11) or sys.maxsize < 1 << 40:
        yield CheckResult("fault", "Python", detail, "use a 64-bit Python 3.11 or newer")
    else:
        yield CheckResult("ok", "Python", detail)


def versions() -> Iterator[CheckResult]:
    """Every library that is needed against the bounds of pyproject.toml."""
    bounds = requirements()
    for name in REQUIRED_PACKAGES:
        bound = bounds.get(name.lower(), "")
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield CheckResult("fault", name, "not installed", f"pip install '{name}{bound}'")
            continue
        is_compatible = in_range(installed, bound)
        yield CheckResult(
            "ok" if is_compatible else "fault",
            name,
            f"{installed} ({bound or 'any'})",
            "" if is_compatible else f"pip install '{name}{bound}'",
        )


def requirements() -> dict[str, str]:
    """Name to bounds, from the installed package or from the checkout's pyproject.toml."""
    try:
        requirement_lines = metadata.requires("lowrank-tune") or []
    except metadata.PackageNotFoundError:
        file = Path(__file__).resolve().parent.parent / "pyproject.toml"
        if file.is_file():
            requirement_lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
        else:
            requirement_lines = []
    split = (re.match(r"([A-Za-z0-9._-]+)\s*([^;]*)", line) for line in requirement_lines if "extra ==" not in line)
    return {match[1].lower(): match[2].strip() for match in split if match}


def in_range(version: str, bounds: str) -> bool:
    """Whether a version is inside bounds such as `>=2.9,<3`. Only the release counts: 2.9.0+cu128 is 2.9."""
    tests: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
    }
    clauses = re.findall(r"(>=|<=|==|!=|<|>)\s*([0-9][0-9.]*)", bounds)
    return all(tests[how](_release(version), _release(bound)) for how, bound in clauses)


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    return tuple((numbers + [0] * 4)[:4])


def gpu() -> Iterator[CheckResult]:
    """GPUs, their memory, and bf16."""
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built:
            fix = "install the driver, and check that `nvidia-smi` works"
        else:
            fix = "install torch's CUDA build"
        yield CheckResult(
            "warning",
            "CUDA",
            f"none seen (torch is built {f'for CUDA {built}' if built else 'without CUDA'})",
            f"a CPU trains only small bases; for a GPU, {fix}",
        )
        return
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            free, total = torch.cuda.mem_get_info()
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        detail = (
            f"{torch.cuda.get_device_name(number)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, bf16 "
            f"{'yes' if has_bf16 else 'no'}"
        )
        if not has_bf16:
            yield CheckResult(
                "fault",
                f"GPU {number}",
                detail,
                "bfloat16 is needed: RTX 30 series or newer; or CUDA_VISIBLE_DEVICES= for the CPU",
            )
        elif free < total / 2:
            yield CheckResult(
                "warning",
                f"GPU {number}",
                detail,
                "another process holds more than half of its memory: see `nvidia-smi`",
            )
        else:
            yield CheckResult("ok", f"GPU {number}", detail)


def bitsandbytes_4bit() -> Iterator[CheckResult]:
    """A real NF4 product against that of the same weight, dequantized, and the gradient of its input."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it could use and does not need
    torch = importlib.import_module("torch")
    bitsandbytes = importlib.import_module("bitsandbytes")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device, dtype = ("cuda", torch.bfloat16)
    else:
        device, dtype = ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        256,
        128,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=True,
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(128, 256, generator=generator),
        requires_grad=False,
        quant_type="nf4",
    )
    layer.support_avx512bf16_for_cpu = False  # that path repacks the weight and has no gradient
    layer = layer.to(device)
    rows = torch.randn(32, 256, generator=generator).to(device, dtype).requires_grad_()
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
    out = layer(rows)
    out.sum().backward()
    errors = [
        _relative_error(out, rows.float() @ weight.T),
        _relative_error(rows.grad, weight.sum(dim=0).expand(32, -1)),
    ]
    detail = f"NF4 product on {device}: off by {errors[0]:.1e}, its gradient by {errors[1]:.1e}"
    if max(errors) < NF4_TOLERANCE:
        yield CheckResult("ok", "4 bits", detail)
    else:
        yield CheckResult(
            "fault",
            "4 bits",
            detail,
            "bitsandbytes is wrong here: install another version within the bounds, or use base.bits=16",
        )


def _relative_error(actual: Any, expected: Any) -> float:
    return float(((actual.detach().float() - expected).norm() / expected.norm()).item())


def disk(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Room where things are written, and whether they can be."""
    cache = Path(environ.get("LOWRANK_TUNE_CACHE") or Path.home() / ".cache" / "lowrank_tune").expanduser()
    hub_cache = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    for name, folder, variable in (
        ("cache", cache, "LOWRANK_TUNE_CACHE"),
        ("hub cache", hub_cache, "HF_HOME"),
        ("here", Path.cwd(), "--out"),
    ):
        free = shutil.disk_usage(nearest_existing(folder)).free / GIB
        detail = f"{folder}, {free:,.1f} GiB free"
        if not _writable(folder):
            level: Level = "warning" if name == "hub cache" else "fault"
            yield CheckResult(level, name, f"{folder} cannot be written", f"name another folder with {variable}")
        elif free < MIN_DISK_GIB:
            yield CheckResult("fault", name, detail, f"free some space, or name another folder with {variable}")
        elif free < RECOMMENDED_DISK_GIB:
            yield CheckResult("warning", name, detail, f"enough for small bases only; a larger disk: {variable}")
        else:
            yield CheckResult("ok", name, detail)


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            return True
    except OSError:
        return False


def hub(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """How the Hugging Face hub would be reached. A token is said to be there or not, and never shown."""
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    has_token = bool(environ.get("HF_TOKEN")) or (home / "token").is_file()
    yield CheckResult(
        "ok",
        "hub token",
        "there is one" if has_token else "none: gated bases cannot be fetched (`hf auth login`)",
    )
    offline = environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    yield CheckResult(
        "warning" if offline else "ok",
        "hub",
        "offline (HF_HUB_OFFLINE)" if offline else "may be asked",
        "only what is in the cache can be loaded; unset HF_HUB_OFFLINE to fetch more" if offline else "",
    )


def terminal(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Whether the screens can be drawn."""
    columns, lines = shutil.get_terminal_size()
    inside = [
        name
        for name, variable in (("tmux", "TMUX"), ("screen", "STY"), ("ssh", "SSH_CONNECTION"))
        if environ.get(variable)
    ]
    if environ.get("NO_COLOR"):
        colors = "no colors (NO_COLOR)"
    else:
        colors = f"colors: {Console().color_system or 'none'}"
    detail = f"{columns}x{lines}, TERM {environ.get('TERM') or 'not set'}, {colors}, {sys.stdout.encoding}"
    detail += f", inside {' in '.join(inside)}" if inside else ""
    if not sys.stdout.isatty():
        yield CheckResult("ok", "terminal", "none: output goes to a file or a pipe, as plain lines")
    elif environ.get("TERM", "dumb") == "dumb":
        yield CheckResult(
            "warning",
            "terminal",
            detail,
            "set TERM (xterm-256color) to see the dashboard; plain lines work",
        )
    elif columns < 80 or lines < 24:
        yield CheckResult("warning", "terminal", detail, "80x24 or more shows the dashboard whole")
    elif not (sys.stdout.encoding or "").lower().startswith("utf"):
        yield CheckResult("warning", "terminal", detail, "a UTF-8 locale (LANG=C.UTF-8) draws finer charts")
    else:
        yield CheckResult("ok", "terminal", detail)


def system() -> Iterator[CheckResult]:
    """Linux, or Linux in Windows."""
    release = platform.release()
    if "microsoft" in release.lower():
        yield CheckResult("ok", "system", f"WSL ({release}); keep runs and data inside Linux, /mnt/c is slow")
    elif platform.system() == "Linux":
        yield CheckResult("ok", "system", f"Linux {release}, {os.cpu_count()} cores")
    else:
        yield CheckResult("warning", "system", platform.system(), "tested on Linux and WSL2 only")


def sandbox() -> Iterator[CheckResult]:
    """What code of a model would run in: tried, not read off."""
    isolation: Any = importlib.import_module("lowrank_tune.rewards.sandbox.isolation")  # its package brings torch in
    offer = isolation.best_available()
    if offer is not None:
        yield CheckResult("ok", "sandbox", f"for code that a model wrote: {offer}")
    else:
        yield CheckResult(
            "warning",
            "sandbox",
            f"none for code that a model wrote ({isolation.unavailable_reason()})",
            "`python_tests` needs Linux 5.13 or newer with Landlock, or bubblewrap, or user namespaces",
        )


def unsloth() -> Iterator[CheckResult]:
    """The other backend of the base. It is optional, so what is wrong with it is no fault; and it is not imported here,
    as it would have to come before torch."""
    version = unsloth_import.installed()
    if version is None:
        yield CheckResult("ok", "unsloth", "not installed; it is optional (base.backend: unsloth)")
        return
    if incompatible := unsloth_import.incompatible_versions():
        yield CheckResult(
            "warning",
            "unsloth",
            f"{version}, which needs {', '.join(incompatible)}",
            f"`base.backend: unsloth` is refused here: {unsloth_import.INSTALL}",
        )
        return
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        yield CheckResult("ok", "unsloth", f"{version}, with packages that fit")
    else:
        yield CheckResult(
            "warning",
            "unsloth",
            f"{version}, and there is no GPU",
            "`base.backend: unsloth` works without one, and is no faster than plain there",
        )
