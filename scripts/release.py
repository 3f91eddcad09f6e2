"""Check everything that a release needs, then set its annotated tag: `make release`. Nothing is published.

The version is that of `lowrank_tune/__init__.py`. All faults are reported at once, one a line, with exit code 2, and no
tag is set then. The script needs `build`, `twine` and `hatchling` (the extra `release`), and a package index.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION_FILE = "lowrank_tune/__init__.py"
CHANGELOG = "CHANGELOG.md"
CONSTRAINTS = "constraints/newest.txt"
UNRELEASED = "Unreleased"
VERSION_LINE = re.compile(r'^__version__ = "([^"]*)"$', re.MULTILINE)
RELEASE_VERSION = re.compile(r"\d+\.\d+\.\d+")
HEADING = re.compile(r"^## \[([^\]]+)\](?: - (.*))?$", re.MULTILINE)
FAULT_EXIT_CODE = 2


class ReleaseError(Exception):
    """A fault that makes the remaining checks impossible: one sentence."""


@dataclass(frozen=True)
class Section:
    """A `## [name] - date` section of the changelog, with its line and its text without the heading."""

    name: str
    date: str
    line: int
    body: str


def run_command(command: Sequence[str | Path], cwd: Path) -> str:
    """Return the standard output of a command; raise ReleaseError with the last line of its messages if it fails.

    PYTHONPATH is removed, so that an installed package is not hidden by a checkout.
    """
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run([str(word) for word in command], cwd=cwd, env=environ, capture_output=True, text=True)
    except OSError as error:
        raise ReleaseError(f"`{command[0]}` cannot be run: {error.strerror}") from error
    if done.returncode:
        messages = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise ReleaseError(
            f"`{Path(command[0]).name} {' '.join(map(str, command[1:]))}` failed: {messages[-1].strip()}"
        )
    return done.stdout


def read_version(root: Path) -> str:
    """The version of the package, which has to be MAJOR.MINOR.PATCH."""
    found = VERSION_LINE.search((root / VERSION_FILE).read_text(encoding="utf-8"))
    if found is None or not RELEASE_VERSION.fullmatch(found[1]):
        what = repr(found[1]) if found else "no `__version__`"
        raise ReleaseError(f"{VERSION_FILE}: contains {what}; a release has a version such as 0.1.0")
    return found[1]


def read_sections(text: str) -> list[Section]:
    """The sections of a changelog, in their order."""
    headings = list(HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return [
        Section(
            heading[1], heading[2] or "", text.count("\n", 0, heading.start()) + 1, text[heading.end() : end].strip()
        )
        for heading, end in zip(headings, ends, strict=True)
    ]


def date_faults(section: Section, today: date) -> list[str]:
    """What is wrong with the date of a section."""
    place = f"{CHANGELOG}:{section.line}: [{section.name}]"
    try:
        released = date.fromisoformat(section.date)
        if released.isoformat() != section.date:  # 20260101 is accepted too
            raise ValueError(section.date)
    except ValueError:
        return [f"{place} has the date {section.date!r}; write the day of the release as YYYY-MM-DD"]
    return [f"{place} has the date {released}, and today is {today}"] if released > today else []


def changelog_faults(root: Path, version: str, today: date) -> list[str]:
    """What is wrong with the changelog: the section of this version has to be the newest, dated, and complete."""
    sections = read_sections((root / CHANGELOG).read_text(encoding="utf-8"))
    releases = [section for section in sections if section.name != UNRELEASED]
    faults = [
        f"{CHANGELOG}:{section.line}: [{UNRELEASED}] has entries; move them to [{version}]"
        for section in sections
        if section.name == UNRELEASED and section.body
    ]
    own = next((section for section in releases if section.name == version), None)
    if own is None:
        return [*faults, f"{CHANGELOG}: has no section [{version}], which is the version in {VERSION_FILE}"]
    if own is not releases[0]:
        faults.append(
            f"{CHANGELOG}:{own.line}: [{version}] is not the newest section, [{releases[0].name}] is above it"
        )
    if not own.body:
        faults.append(f"{CHANGELOG}:{own.line}: [{version}] has no entries")
    return [*faults, *date_faults(own, today)]


def tag_of(version: str) -> str:
    """The tag of a version."""
    return f"v{version}"


def git_faults(root: Path, version: str) -> list[str]:
    """What is wrong with the repository: changes that are not committed, a tag that exists."""
    changes = run_command(["git", "status", "--porcelain"], root).splitlines()
    faults = []
    if changes:
        names = ", ".join(change[3:] for change in changes[:5]) + (", ..." if len(changes) > 5 else "")
        faults.append(f"changes that are not committed: {names}")
    if run_command(["git", "tag", "--list", tag_of(version)], root).strip():
        faults.append(f"the tag {tag_of(version)} exists; raise the version in {VERSION_FILE}")
    return faults


def build_distributions(root: Path) -> list[Path]:
    """Build the sdist and, from it, the wheel into an empty `dist/`."""
    out = root / "dist"
    shutil.rmtree(out, ignore_errors=True)
    run_command([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, root], root)
    return sorted(out.iterdir())


def metadata_faults(distributions: Sequence[Path]) -> list[str]:
    """What `twine check --strict` refuses."""
    try:
        run_command([sys.executable, "-m", "twine", "check", "--strict", *distributions], distributions[0].parent)
    except ReleaseError as error:
        return [str(error)]
    return []


def install_wheel(wheel: Path, environment: Path, constraints: Path, torch_index: str | None) -> None:
    """Install a wheel into a new environment, as a user does. With `torch_index` torch alone comes from there."""
    venv.create(environment, with_pip=True)
    install: list[str | Path] = [
        environment / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        constraints,
    ]
    if torch_index:
        run_command([*install, "--no-deps", "--index-url", torch_index, "torch"], environment)
    run_command([*install, wheel], environment)


def installed_faults(environment: Path, root: Path, version: str) -> list[str]:
    """What the installed command line lacks, run in an empty folder."""
    faults = []
    with tempfile.TemporaryDirectory() as folder:

        def words_of(*arguments: str) -> set[str]:
            try:
                return set(run_command([environment / "bin" / "lowrank-tune", *arguments], Path(folder)).split())
            except ReleaseError as error:
                faults.append(str(error))
                return set()

        expected = {
            ("--version",): {version},
            ("presets",): {file.stem for file in (root / "presets").glob("*.yaml")},
            ("examples",): {file.stem for file in (root / "examples").glob("*.py")},
        }
        for arguments, words in expected.items():
            printed = words_of(*arguments)
            if printed and (missing := sorted(words - printed)):
                faults.append(f"`lowrank-tune {arguments[0]}` of the wheel does not print {', '.join(missing)}")
    return faults


def distribution_faults(root: Path, version: str, torch_index: str | None) -> list[str]:
    """What is wrong with the sdist and the wheel, which are built here."""
    print("Building the sdist and the wheel", flush=True)
    try:
        distributions = build_distributions(root)
    except ReleaseError as error:
        return [str(error)]
    faults = metadata_faults(distributions)
    wheels = [file for file in distributions if file.name.startswith(f"lowrank_tune-{version}-")]
    if len(wheels) != 1:
        names = ", ".join(file.name for file in distributions)
        return [*faults, f"dist/ contains {names}, and not one wheel of version {version}"]
    print("Installing the wheel into an empty environment (minutes)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        try:
            install_wheel(wheels[0], environment, root / CONSTRAINTS, torch_index)
        except ReleaseError as error:
            return [*faults, str(error)]
        return [*faults, *installed_faults(environment, root, version)]


def set_tag(root: Path, version: str, commit: str) -> None:
    """Set the annotated tag of a version on a commit."""
    run_command(["git", "tag", "--annotate", tag_of(version), "--message", f"lowrank_tune {version}", commit], root)


def release(root: Path, today: date, torch_index: str | None, check_only: bool) -> list[str]:
    """Check everything and, where nothing is wrong, set the tag. Returns the faults."""
    version = read_version(root)
    commit = run_command(["git", "rev-parse", "HEAD"], root).strip()
    faults = [*git_faults(root, version), *changelog_faults(root, version, today)]
    faults += distribution_faults(root, version, torch_index)
    if not faults and not check_only:
        set_tag(root, version, commit)
        print(f"The tag {tag_of(version)} is set on {commit[:12]}. To publish it, by hand:")
        print(f"  git push REMOTE {tag_of(version)}")
        print(f"  {sys.executable} -m twine upload dist/*")
    return faults


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Check everything that a release needs, and set its tag.")
    parser.add_argument("--torch-index", metavar="URL", help="Take torch alone from this package index.")
    parser.add_argument("--check", action="store_true", help="Only check; set no tag.")
    options = parser.parse_args(arguments)
    try:
        faults = release(root, date.today(), options.torch_index, options.check)
    except ReleaseError as error:
        faults = [str(error)]
    if faults:
        print("\n".join(faults), file=sys.stderr)
        return FAULT_EXIT_CODE
    if options.check:
        print("Nothing is wrong; no tag is set")
    return 0


if __name__ == "__main__":
    sys.exit(main())
