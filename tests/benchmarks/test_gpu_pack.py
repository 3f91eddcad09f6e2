"""What is packed for a GPU machine without network: tags, versions, size, and requirements; and the check of it can
fail."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from gpu_proof_helpers import CARRIED, FOLDER, ROOT, module, modules
from packaging.utils import canonicalize_name

MACHINE = {"numpy": "2.5.2", "torch": "2.11.0", "rich": None}


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    yield from modules()


def wheel(folder: Path, file: str, *requires: str, size: int = 0) -> None:
    name, version = file.split("-")[:2]
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / file, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{name}/data", b"\0" * size)


@pytest.fixture
def pack(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small pack in which nothing is wrong, for a project that requires two of its packages."""
    checker = module("pack")
    requires = tuple(map(checker.Requirement, ("alpha>=1", "rich")))
    monkeypatch.setattr(checker, "project", lambda: checker.Package("kit", "0", requires))
    wheel(tmp_path / "wheels", "alpha-1.0-py3-none-any.whl", "beta==2.0", "numpy>=2", "gone; python_version<'3.12'")
    wheel(tmp_path / "wheels", "beta-2.0-cp312-cp312-manylinux_2_28_x86_64.whl", "x; extra == 'test'")
    library = tmp_path / "site" / "bitsandbytes" / "libbitsandbytes_cuda130.so"
    library.parent.mkdir(parents=True)
    library.touch()
    return tmp_path


def faults(pack: Path) -> list[str]:
    return list(module("pack").pack_errors(pack / "wheels", pack / "site", MACHINE))


def test_a_complete_pack(pack: Path) -> None:
    assert faults(pack) == []


@pytest.mark.parametrize(
    "tag", ["cp311-cp311-manylinux_2_28_x86_64", "cp312-cp312-manylinux_2_28_aarch64", "py2-none-any"]
)
def test_a_wheel_for_another_python_or_machine_is_found(pack: Path, tag: str) -> None:
    wheel(pack / "wheels", f"gamma-1.0-{tag}.whl")
    assert faults(pack) == [f"gamma-1.0-{tag}.whl: Python 3.12 on x86-64 Linux cannot install it"]


@pytest.mark.parametrize(
    "tag", ["cp312-abi3-manylinux2014_x86_64", "cp39-abi3-manylinux_2_17_x86_64", "py312-none-any"]
)
def test_a_wheel_that_fits_is_accepted(pack: Path, tag: str) -> None:
    wheel(pack / "wheels", f"gamma-1.0-{tag}.whl")
    assert faults(pack) == []


def test_missing_and_wrong_requirements_are_found(pack: Path) -> None:
    wheel(pack / "wheels", "gamma-1.0-py3-none-any.whl", "delta>=3", "beta>=2.1", "torch>=2.12", "rich>=99")
    assert faults(pack) == [
        "gamma requires delta>=3, which is neither carried nor on the machine",
        "gamma requires beta>=2.1, and beta is 2.0",
        "gamma requires torch>=2.12, and torch is 2.11.0",
    ]


def test_what_the_project_requires_is_checked(pack: Path) -> None:
    next((pack / "wheels").glob("alpha*")).unlink()
    assert faults(pack) == ["kit requires alpha>=1, which is neither carried nor on the machine"]


def test_two_versions_too_much_and_other_libraries_are_found(pack: Path) -> None:
    wheel(pack / "wheels", "beta-2.1-py3-none-any.whl", size=41_000_000)
    (pack / "site" / "bitsandbytes" / "libbitsandbytes_cuda121.so").touch()
    found = faults(pack)
    assert found[0] == "beta is carried 2 times" and any("41.0 MB are more than 40" in fault for fault in found)
    assert found[-1].startswith(
        "bitsandbytes' libraries are ['libbitsandbytes_cuda121.so', 'libbitsandbytes_cuda130.so']"
    )


def test_package_and_trl_have_their_requirements(gpu: ModuleType) -> None:
    """By name: each dependency of the project is carried or on the machine."""
    checker = module("pack")
    known = {*checker.read_machine(), *map(canonicalize_name, CARRIED.split())}
    assert {canonicalize_name(requirement.name) for requirement in checker.project().requires} <= known


@pytest.mark.network
def test_the_real_pack(gpu: ModuleType) -> None:
    """Downloads about 60 MB. Nothing is wrong with what the script packs for the real machine."""
    done = subprocess.run(["bash", str(FOLDER / "gpu_pack.sh")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert module("pack").pack_errors(ROOT / ".whl", ROOT / ".gpu" / "site") == []
    assert (ROOT / ".gpu" / "plans.json").exists() == (ROOT / ".venv" / "bin" / "python").exists()
    words = [sys.executable, str(FOLDER / "gpu_proof" / "pack.py"), ".whl", ".gpu/site"]
    checked = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0 and "transformers 5.23.0" in checked.stdout
