"""Checks what `gpu_pack.sh` has packed: tags, versions, size, and that every requirement is met on the GPU machine.

    python3 benchmarks/gpu_proof/pack.py .whl .gpu/site

It needs `packaging`, which pip contains. Exit code 1 where something is wrong.
"""

from __future__ import annotations

import email
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.tags import Tag, compatible_tags, cpython_tags
    from packaging.utils import canonicalize_name, parse_wheel_filename
except ImportError:
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    from pip._vendor.packaging.tags import Tag, compatible_tags, cpython_tags  # type: ignore[assignment]
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename  # type: ignore[assignment]

ROOT = Path(__file__).parents[2]
MACHINE = ROOT / "benchmarks" / "gpu_machine.txt"
MAX_BYTES = 40_000_000
PYTHON = (3, 12)
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)), "manylinux2014_x86_64", "linux_x86_64"]
ENVIRONMENT = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.12.3",
    "python_version": "3.12",
    "sys_platform": "linux",
    "extra": "",
}
CUDA_LIBRARY = "libbitsandbytes_cuda130.so"


@dataclass(frozen=True)
class Package:
    """A carried distribution and its requirements."""

    name: str
    version: str
    requires: tuple[Requirement, ...]


def read_machine(path: Path = MACHINE) -> dict[str, str | None]:
    """Return the packages of the GPU machine: name -> version, or None where it is not known."""
    packages: dict[str, str | None] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            packages[canonicalize_name(name)] = version or None
    return packages


def package_of(metadata: str) -> Package:
    """Return the package that a METADATA file describes, without requirements of extras and other platforms."""
    message = email.message_from_string(metadata)
    requires = [Requirement(line) for line in message.get_all("Requires-Dist", [])]
    applicable = [item for item in requires if item.marker is None or item.marker.evaluate(ENVIRONMENT)]
    return Package(canonicalize_name(message["Name"]), message["Version"], tuple(applicable))


def packages_in_wheels(folder: Path) -> Iterator[Package]:
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            yield package_of(wheel.read(name).decode())


def packages_in_site(folder: Path) -> Iterator[Package]:
    for path in sorted(folder.glob("*.dist-info/METADATA")):
        yield package_of(path.read_text(encoding="utf-8"))


def tag_errors(folder: Path) -> Iterator[str]:
    """Wheels that Python 3.12 on x86-64 Linux cannot install."""
    supported: set[Tag] = set(cpython_tags(PYTHON, platforms=PLATFORMS))
    supported |= set(compatible_tags(PYTHON, interpreter="cp312", platforms=PLATFORMS))
    for path in sorted(folder.glob("*.whl")):
        tags = parse_wheel_filename(path.name)[3]
        if not tags & supported:
            yield f"{path.name}: Python 3.12 on x86-64 Linux cannot install it"


def requirement_errors(packages: Sequence[Package], machine: Mapping[str, str | None]) -> Iterator[str]:
    """Requirements that neither a carried package nor the machine meets."""
    carried = {package.name: package.version for package in packages}
    for package in packages:
        for requirement in package.requires:
            name = canonicalize_name(requirement.name)
            if name not in carried and name not in machine:
                yield f"{package.name} requires {requirement}, which is neither carried nor on the machine"
                continue
            version = carried.get(name) or machine.get(name)
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                yield f"{package.name} requires {requirement}, and {name} is {version}"


def project() -> Package:
    """The kit itself, with its own dependencies and TRL."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*settings["dependencies"], *settings["optional-dependencies"]["trl"]]
    return Package("lowrank-tune", "0", tuple(Requirement(line) for line in lines))


def total_bytes(folders: Sequence[Path]) -> int:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def pack_errors(wheels: Path, site: Path, machine: Mapping[str, str | None] | None = None) -> list[str]:
    """Return everything that is wrong with a pack; empty where it is complete."""
    packages = [*packages_in_wheels(wheels), *packages_in_site(site)]
    errors = list(tag_errors(wheels))
    names = [package.name for package in packages]
    errors += [f"{name} is carried {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1]
    errors += requirement_errors([*packages, project()], read_machine() if machine is None else machine)
    size = total_bytes([wheels, site])
    if size > MAX_BYTES:
        errors.append(f"{size / 1e6:.1f} MB are more than {MAX_BYTES / 1e6:.0f}")
    libraries = sorted(path.name for path in site.glob("bitsandbytes/libbitsandbytes_cuda*.so"))
    if libraries != [CUDA_LIBRARY]:
        errors.append(f"bitsandbytes' libraries are {libraries}, not {CUDA_LIBRARY} alone")
    return errors


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print(__doc__)
        return 2
    wheels, site = map(Path, arguments)
    errors = pack_errors(wheels, site)
    for error in errors:
        print(error)
    packages = [*packages_in_wheels(wheels), *packages_in_site(site)]
    carried = ", ".join(f"{package.name} {package.version}" for package in packages)
    print(f"{total_bytes([wheels, site]) / 1e6:.1f} MB: {carried}")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
