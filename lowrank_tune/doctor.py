"""Checks of the machine. Each result is one line: ok, warning or fault, with what to do.

Nothing is downloaded, the hub gets one request without content, and no secret is printed. Heavy libraries are imported
inside the checks, so that a broken one is a result and not a crash.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_tune import unsloth_import
from lowrank_tune.errors import UserError
from lowrank_tune.model.compiler_check import missing_for_compile
from lowrank_tune.offline import hub_address, offline_variable, unreachable_reason
from lowrank_tune.paths import cache_folder, hub_folder, nearest_existing
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.formatting import plural

if TYPE_CHECKING:
    from lowrank_tune.config import BaseConfig

GIB = 1 << 30
# GiB: too little to save anything; too little for a 7B base and its cache
MIN_DISK_GIB = 1.0
RECOMMENDED_DISK_GIB = 20.0
# limit of the only request
HUB_SECONDS = 3.0
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
# kernels of bases with linear attention, as in `model/architecture_notes.py`
LINEAR_ATTENTION_PACKAGE = "flash-linear-attention"
# relative error of a bf16 product with a 4-bit weight, against the product with the dequantized weight
NF4_TOLERANCE = 1e-2
TERMINAL_VARIABLES = {
    "tmux": "TMUX",
    "screen": "STY",
    "ssh": "SSH_CONNECTION",
}
STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}
Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the report. `fix` is what to do, empty for a result that is ok."""

    level: Level
    name: str
    detail: str
    fix: str = ""


def _result(
    name: str,
    detail: str,
    fix: str,
    level: Level = "fault",
) -> CheckResult:
    """Returns the line of a check: ok if there is nothing to fix, else of this level."""
    return CheckResult(
        level if fix else "ok",
        name,
        detail,
        fix,
    )


def run_checks(
    environ: Mapping[str, str] = os.environ,
    base: BaseConfig | None = None,
) -> list[CheckResult]:
    """Runs all checks, in order, with a base those of its architecture too. A check that raises an error is a fault."""
    results: list[CheckResult] = []
    checks: dict[str, Callable[[], Iterator[CheckResult]]] = {
        "Python": python,
        "versions": versions,
        "CUDA": gpu,
        "GPU vendor": gpu_vendor,
        "4 bits": bitsandbytes_4bit,
        "compiler": partial(compiler, environ),
        "linear attention": linear_attention,
        "disk": partial(disk, environ),
        "hub": partial(hub, environ),
        "terminal": partial(terminal, environ),
        "system": system,
        "sandbox": sandbox,
        "unsloth": unsloth,
    }
    if base is not None:
        checks["base"] = partial(base_on_gpu, base)
    for name, check in checks.items():
        try:
            results += check()
        except UserError as error:
            results.append(CheckResult("fault", name, str(error), "correct the recipe"))
        except Exception as error:
            fix = "install the packages again, within the bounds above"
            results.append(
                CheckResult(
                    "fault",
                    name,
                    f"the check failed: {type(error).__name__}: {error}",
                    fix,
                )
            )
    return results


def print_results(results: list[CheckResult], console: Console) -> None:
    """Prints one line for each result, and a verdict at the end."""
    table = Table.grid(padding=(0, 2))
    for result in results:
        detail = Text(escape_control_chars(result.detail))
        if result.fix:
            detail.append(f"\n-> {escape_control_chars(result.fix)}", STYLES[result.level])
        table.add_row(Text(result.level, STYLES[result.level]), Text(result.name), detail)
    console.print(table)
    levels = [result.level for result in results]
    faults = levels.count("fault")
    warnings = levels.count("warning")
    verdict = "this machine is ready"
    level: Level = "ok"
    if faults:
        verdict = "this machine is not ready yet"
        level = "fault"
    elif warnings:
        level = "warning"
    counts = f"{plural(faults, 'fault')}, {plural(warnings, 'warning')}"
    console.print(Text(f"{verdict}: {counts}", STYLES[level]))


def python() -> Iterator[CheckResult]:
    """Checks Python: 3.11 or newer, 64 bits."""
    detail = f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})"
    fix = ""
    if sys.version_info < (3, 11) or sys.maxsize < 1 << 40:
        fix = "use a 64-bit Python 3.11 or newer"
    yield _result("Python", detail, fix)


def versions() -> Iterator[CheckResult]:
    """Checks the version of each required library against pyproject.toml."""
    all_bounds = requirements()
    for name in REQUIRED_PACKAGES:
        bounds = all_bounds.get(name.lower(), SpecifierSet())
        fix = f"pip install '{name}{bounds}'"
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield CheckResult(
                "fault",
                name,
                "not installed",
                fix,
            )
            continue
        detail = f"{installed} ({str(bounds) or 'any'})"
        if in_range(installed, bounds):
            fix = ""
        yield _result(name, detail, fix)


def requirements() -> dict[str, SpecifierSet]:
    """Returns the version bounds of each dependency, from the installed package or from pyproject.toml."""
    lines: list[str] = []
    try:
        lines = metadata.requires("lowrank-tune") or []
    except metadata.PackageNotFoundError:
        file = Path(__file__).resolve().parent.parent / "pyproject.toml"
        if file.is_file():
            lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds: dict[str, SpecifierSet] = {}
    for line in lines:
        requirement = Requirement(line)
        # an optional extra has a marker
        if requirement.marker is None:
            bounds[requirement.name.lower()] = requirement.specifier
    return bounds


def in_range(version: str, bounds: SpecifierSet) -> bool:
    """Checks a version against bounds such as `>=2.9,<3`. Only the release counts: 2.9.0+cu128 is 2.9."""
    return bounds.contains(Version(version).base_version)


def gpu() -> Iterator[CheckResult]:
    """Checks the GPUs: memory and bf16."""
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        if torch.xpu.is_available():
            # `gpu_vendor` reports it.
            return
        if torch.version.hip:
            detail = f"none seen (torch is built for ROCm {torch.version.hip})"
            fix = "install the driver, and check that `rocminfo` works"
        elif torch.version.cuda:
            detail = f"none seen (torch is built for CUDA {torch.version.cuda})"
            fix = "install the driver, and check that `nvidia-smi` works"
        else:
            detail = "none seen (torch is built without CUDA)"
            fix = "install torch's CUDA build"
        yield CheckResult(
            "warning",
            "CUDA",
            detail,
            f"a CPU trains only small bases; for a GPU, {fix}",
        )
        return
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            free, total = torch.cuda.mem_get_info()
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = f"GPU {number}"
        memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        detail = f"{torch.cuda.get_device_name(number)}, {memory}, bf16 {'yes' if has_bf16 else 'no'}"
        fix = ""
        level: Level = "warning"
        if not has_bf16:
            detail = f"{detail}: float16 is used, with loss scaling"
        if free < total / 2:
            fix = "another process uses more than half of its memory: see `nvidia-smi`"
        yield _result(name, detail, fix, level)


def gpu_vendor() -> Iterator[CheckResult]:
    """Reports GPUs of AMD, which torch calls CUDA devices, and of Intel, which runs do not use."""
    torch: Any = importlib.import_module("torch")
    if torch.version.hip and torch.cuda.is_available():
        yield CheckResult(
            "ok",
            "GPU vendor",
            f"AMD, ROCm {torch.version.hip}: reported to work, not tested",
        )
    elif torch.xpu.is_available() and not torch.cuda.is_available():
        yield CheckResult(
            "warning",
            "GPU vendor",
            f"{torch.xpu.get_device_name()} (Intel): bitsandbytes is reported to work on it, not tested",
            "runs use the CPU here: of GPUs they use those of NVIDIA and AMD",
        )


def bitsandbytes_4bit() -> Iterator[CheckResult]:
    """Compares an NF4 product, and the gradient of its input, with the product of the dequantized weight."""
    # bitsandbytes logs kernels that it could download and that are not needed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch = importlib.import_module("torch")
    bitsandbytes = importlib.import_module("bitsandbytes")
    device = "cpu"
    dtype = torch.float32
    if torch.cuda.is_available():
        device = "cuda"
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bf16 else torch.float16
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
    # that path repacks the weight and has no gradient
    layer.support_avx512bf16_for_cpu = False
    layer = layer.to(device)
    rows = (
        torch.randn(
            32,
            256,
            generator=generator,
        )
        .to(device, dtype)
        .requires_grad_()
    )
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
    out = layer(rows)
    out.sum().backward()
    product_error = _relative_error(out, rows.float() @ weight.T)
    gradient_error = _relative_error(rows.grad, weight.sum(dim=0).expand(32, -1))
    detail = f"NF4 product on {device}: off by {product_error:.1e}, its gradient by {gradient_error:.1e}"
    fix = ""
    if not max(product_error, gradient_error) < NF4_TOLERANCE:
        fix = "bitsandbytes is wrong here: install another version within the bounds, or use base.bits=16"
    yield _result("4 bits", detail, fix)


def _relative_error(actual: Any, expected: Any) -> float:
    return float(((actual.detach().float() - expected).norm() / expected.norm()).item())


def compiler(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Reports whether layers are compiled for the GPU, and without a GPU whether they can be compiled."""
    torch: Any = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = missing_for_compile(device, environ)
    fix = ""
    if device == "cpu":
        possible = f"not possible: {missing}" if missing else "possible"
        detail = f"layers are compiled only on a GPU; on the CPU, with train.torch_compile=true, {possible}"
    elif missing:
        detail = "layers are not compiled on the GPU, so that training is slower"
        fix = missing
    else:
        detail = "layers are compiled on the GPU (train.torch_compile=auto)"
    yield _result("compiler", detail, fix, "warning")


def linear_attention() -> Iterator[CheckResult]:
    """Reports whether the kernels of bases with linear attention are installed, which are optional."""
    try:
        detail = f"{LINEAR_ATTENTION_PACKAGE} {metadata.version(LINEAR_ATTENTION_PACKAGE)}"
    except metadata.PackageNotFoundError:
        detail = (
            "no kernels installed; Qwen3.5 and other bases with linear attention are slow on a GPU without them: pip "
            f"install {LINEAR_ATTENTION_PACKAGE}"
        )
    yield CheckResult("ok", "linear attention", detail)


def base_on_gpu(base: BaseConfig) -> Iterator[CheckResult]:
    """Reports what a run on a GPU would log about the architecture of a base: experts that are not quantized, layers
    that keep a state, missing kernels."""
    torch = importlib.import_module("torch")
    planner = importlib.import_module("lowrank_tune.memory_planner.base_notes")
    notes, warnings = planner.notes_and_warnings(base, torch.device("cuda"))
    for note in notes or [f"{base.model}: nothing to report"]:
        yield CheckResult("ok", "base", note)
    for warning in warnings:
        yield CheckResult("warning", "base", base.model, warning)


def disk(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Checks free space and write permission of the folders that are written to."""
    for name, folder, variable in (
        ("cache", cache_folder(environ), "LOWRANK_TUNE_CACHE"),
        ("hub cache", hub_folder(environ), "HF_HOME"),
        ("here", Path.cwd(), "--out"),
    ):
        free = shutil.disk_usage(nearest_existing(folder)).free / GIB
        detail = f"{folder}, {free:,.1f} GiB free"
        fix = ""
        level: Level = "fault"
        if not _writable(folder):
            detail = f"{folder} cannot be written"
            fix = f"name another folder with {variable}"
            # the cache of the Hub may be filled by somebody else
            if name == "hub cache":
                level = "warning"
        elif free < MIN_DISK_GIB:
            fix = f"free some space, or name another folder with {variable}"
        elif free < RECOMMENDED_DISK_GIB:
            fix = f"enough for small bases only; a larger disk: {variable}"
            level = "warning"
        yield _result(name, detail, fix, level)


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            return True
    except OSError:
        return False


def hub(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Checks whether the Hugging Face hub answers, unless a variable forbids to use it. A token is never printed."""
    has_token = bool(environ.get("HF_TOKEN")) or (hub_folder(environ) / "token").is_file()
    token = "found" if has_token else "none: gated bases cannot be fetched (`hf auth login`)"
    yield CheckResult("ok", "hub token", token)
    variable = offline_variable(environ)
    if variable:
        fix = f"only what is in the cache can be loaded; unset {variable} to fetch more"
        yield CheckResult(
            "warning",
            "hub",
            f"not tried: {variable} is set",
            fix,
        )
        return
    address = hub_address(environ)
    reason = unreachable_reason(address, HUB_SECONDS)
    if reason:
        yield CheckResult(
            "warning",
            "hub",
            f"{address} cannot be reached: {reason}",
            "check the network and HTTPS_PROXY; without a network only what is in the cache can be loaded",
        )
    else:
        yield CheckResult("ok", "hub", f"{address} answers")


def terminal(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Checks that the terminal can show the dashboard."""
    columns, lines = shutil.get_terminal_size()
    if environ.get("NO_COLOR"):
        colors = "no colors (NO_COLOR)"
    else:
        colors = f"colors: {Console().color_system or 'none'}"
    detail = f"{columns}x{lines}, TERM {environ.get('TERM') or 'not set'}, {colors}, {sys.stdout.encoding}"
    inside = [name for name, variable in TERMINAL_VARIABLES.items() if environ.get(variable)]
    if inside:
        detail += f", inside {' in '.join(inside)}"
    fix = ""
    if not sys.stdout.isatty():
        detail = "none: output goes to a file or a pipe, as plain lines"
    elif environ.get("TERM", "dumb") == "dumb":
        fix = "set TERM (xterm-256color) to see the dashboard; plain lines work"
    elif columns < 80 or lines < 24:
        fix = "80x24 or more shows the whole dashboard"
    elif not (sys.stdout.encoding or "").lower().startswith("utf"):
        fix = "a UTF-8 locale (LANG=C.UTF-8) draws finer charts"
    yield _result("terminal", detail, fix, "warning")


def system() -> Iterator[CheckResult]:
    """Reports the operating system: Linux, or Linux in Windows (WSL)."""
    release = platform.release()
    if "microsoft" in release.lower():
        yield CheckResult("ok", "system", f"WSL ({release}); keep runs and data inside Linux, /mnt/c is slow")
    elif platform.system() == "Linux":
        yield CheckResult("ok", "system", f"Linux {release}, {os.cpu_count()} cores")
    else:
        yield CheckResult(
            "warning",
            "system",
            platform.system(),
            "tested on Linux and WSL2 only",
        )


def sandbox() -> Iterator[CheckResult]:
    """Starts the sandbox for model-written code, and reports its level of isolation."""
    # the package of this module imports torch
    isolation: Any = importlib.import_module("lowrank_tune.rewards.sandbox.isolation")
    level = isolation.best_available()
    if level is not None:
        yield CheckResult("ok", "sandbox", f"for code that a model wrote: {level}")
    else:
        detail = f"none for code that a model wrote ({isolation.unavailable_reason()})"
        fix = "`python_tests` needs Linux 5.13 or newer with Landlock, or bubblewrap, or user namespaces"
        yield CheckResult(
            "warning",
            "sandbox",
            detail,
            fix,
        )


def unsloth() -> Iterator[CheckResult]:
    """Checks unsloth, which is optional: a problem is only a warning.

    It is not imported here, because it has to be imported before torch.
    """
    version = unsloth_import.installed()
    if version is None:
        yield CheckResult("ok", "unsloth", "not installed; it is optional (base.backend: unsloth)")
        return
    incompatible = unsloth_import.incompatible_versions()
    if incompatible:
        detail = f"{version}, which needs {', '.join(incompatible)}"
        fix = f"`base.backend: unsloth` is refused here: {unsloth_import.INSTALL}"
        yield CheckResult(
            "warning",
            "unsloth",
            detail,
            fix,
        )
        return
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        yield CheckResult("ok", "unsloth", f"{version}, with packages that fit")
    else:
        fix = "`base.backend: unsloth` works without a GPU, but is not faster than transformers there"
        yield CheckResult(
            "warning",
            "unsloth",
            f"{version}, and no GPU",
            fix,
        )
