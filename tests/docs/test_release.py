"""The package as it is released: version and changelog, what sdist and wheel contain, the make targets that install,
the checks before a tag, and the wheel in an environment of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import lowrank_tune
from lowrank_tune.cli import app

ROOT = Path(__file__).parents[2]
EXAMPLE_FILES = [file for file in (ROOT / "examples").rglob("*") if file.suffix in (".py", ".ipynb")]
EXAMPLES = sorted(file.stem for file in EXAMPLE_FILES)
TODAY = date(2027, 3, 4)
CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.3] - 2027-03-04

### Added
- A thing.

## [1.2.2] - 2027-01-01
- B.
"""
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_script", ROOT / "scripts" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


release = load_script()
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def tracked_files(*folders: str) -> list[str]:
    """What git tracks; the test is skipped outside a clone, as in an unpacked sdist."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a clone of the repository")
    return git(ROOT, "ls-files", "-z", "--", *folders).rstrip("\0").split("\0")


# Version, changelog and pyproject.toml


def test_the_newest_release_in_the_changelog_is_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    name, rest = headings[1]
    assert name == lowrank_tune.__version__ and re.fullmatch(r" - \d{4}-\d\d-\d\d", rest)


def test_the_wheel_includes_the_package_and_the_folders_beside_it() -> None:
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["lowrank_tune"] and not {"exclude", "only-include"} & wheel.keys()
    folders = wheel["force-include"]
    assert folders == {"presets": "lowrank_tune/presets", "examples": "lowrank_tune/examples"}
    assert all(any((ROOT / folder).iterdir()) and not (ROOT / target).exists() for folder, target in folders.items())


def test_no_tracked_file_is_ignored() -> None:
    """The build leaves out what .gitignore names, though git tracks it."""
    tracked_files()
    assert git(ROOT, "ls-files", "--cached", "--ignored", "--exclude-standard") == ""


def test_the_sdist_includes_everything_that_is_tracked() -> None:
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    always = {"/pyproject.toml", "/.gitignore"}
    assert {f"/{file.partition('/')[0]}" for file in tracked_files()} <= {*included, *always}


def test_the_extras_of_the_slow_tests_are_pinned() -> None:
    lines = (ROOT / "constraints" / "newest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    assert list(pins) == sorted(pins, key=str.lower)
    extras = PYPROJECT["project"]["optional-dependencies"]
    for line in (*PYPROJECT["project"]["dependencies"], *extras["docs"], *extras["release"], *extras["trl"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line


# The make targets


def make(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    # what `make test CPU=1` hands to the tests
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "CPU"))}
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=outer | (environ or {}), capture_output=True, text=True)


def installations(target: str, *arguments: str) -> list[str]:
    """The `pip install` commands that a target runs."""
    printed = make("-n", target, *arguments)
    assert printed.returncode == 0, printed.stderr
    commands = [command.strip() for line in printed.stdout.splitlines() for command in re.split(r"; | \|\| ", line)]
    return [command for command in commands if " pip install " in command and not command.startswith("echo ")]


@pytest.mark.parametrize("target", ["demo", "test-slow", "docs", "dist"])
def test_cpu_takes_torch_alone_from_the_index_of_pytorch(tmp_path: Path, target: str) -> None:
    torch, *others = installations(target, "CPU=1", f"VENV={tmp_path}/.venv")
    assert torch.endswith(f"-m pip install --no-deps torch -c constraints/newest.txt --index-url {PYTORCH_INDEX}")
    assert len(others) == 1 and "index" not in others[0] and "--no-deps" not in others[0]
    assert " -e '." in others[0] and others[0].endswith(" -c constraints/newest.txt")


def test_without_cpu_everything_comes_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPU", "1")
    monkeypatch.setenv("EXTRAS", "[other]")
    (command,) = installations("demo", f"VENV={tmp_path}/.venv")
    assert command == f"{tmp_path}/.venv/bin/python -m pip install -e '.' -c constraints/newest.txt"


def test_the_slow_tests_have_what_builds_the_package_and_the_site(tmp_path: Path) -> None:
    (command,) = installations("test-slow", f"VENV={tmp_path}/.venv")
    assert "'.[dev,trl,docs,release]'" in command


def test_two_targets_do_not_install_at_the_same_time(tmp_path: Path) -> None:
    """`make -j`: both install into one environment."""
    python, log = tmp_path / "bin" / "python", tmp_path / "log"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho begins >> {log}\nsleep 0.1\necho ends >> {log}\n")
    python.chmod(0o755)
    done = make("-j4", f"{tmp_path}/.installed-docs", f"{tmp_path}/.installed-release", f"VENV={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert log.read_text().split() == ["begins", "ends"] * 2


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    printed = make("help").stdout
    assert len(phony) > 10 and [name for name in phony if not re.search(rf"^  {name} +\S", printed, re.MULTILINE)] == []


@pytest.mark.slow
def test_an_index_that_cannot_be_reached_leaves_no_environment(tmp_path: Path) -> None:
    environment, index = tmp_path / ".venv", "http://127.0.0.1:9/simple"
    environ = {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    arguments = (f"VENV={environment}", "CPU=1", f"CPU_INDEX={index}")
    failed = make(f"{environment}/.installed", *arguments, environ=environ)
    assert failed.returncode and f"CPU=1 takes torch from {index}, and it could not be installed" in failed.stderr
    assert "make CPU_INDEX=URL CPU=1" in failed.stderr and not environment.exists()
    # What an interrupted make leaves: an environment without interpreter. The next make replaces it.
    environment.mkdir()
    (environment / "pyvenv.cfg").touch()
    assert make(f"{environment}/bin/python", *arguments, environ=environ).returncode == 0
    assert (
        subprocess.run([environment / "bin" / "python", "-m", "pip", "--version"], capture_output=True).returncode == 0
    )


# `lowrank-tune examples`


def test_the_examples_are_listed_with_one_line_each() -> None:
    printed = CliRunner().invoke(app, ["examples"])
    lines = printed.output.splitlines()
    assert printed.exit_code == 0 and [line.split()[0] for line in lines[:-1]] == EXAMPLES
    assert all(len(line.split()) > 3 and "`" not in line for line in lines[:-1])


def test_examples_are_copied_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    assert run(app, ["examples", "copy", "sft", "mine/deep"]).exit_code == 0
    assert [file.name for file in Path("mine/deep").iterdir()] == ["sft.py"]
    Path("mine/deep/sft.py").write_text("mine")
    refused = run(app, ["examples", "copy", "all", "mine/deep"])
    assert refused.exit_code == 2 and "mine/deep/sft.py: is there already; name another folder" in refused.output
    assert [file.name for file in Path("mine/deep").iterdir()] == ["sft.py"], "nothing is copied beside it"
    assert Path("mine/deep/sft.py").read_text() == "mine"
    assert run(app, ["examples", "copy"]).exit_code == 0
    assert sorted(file.stem for file in Path("examples").iterdir()) == EXAMPLES
    assert Path("examples/sft.py").read_bytes() == (ROOT / "examples" / "sft.py").read_bytes()


def test_an_example_that_does_not_exist_and_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    run = CliRunner().invoke
    unknown = run(app, ["examples", "copy", "stf", str(tmp_path)])
    assert unknown.exit_code == 2 and "no example is called 'stf'; did you mean `sft`?" in unknown.output
    (tmp_path / "file").touch()
    refused = run(app, ["examples", "copy", "sft", str(tmp_path / "file")])
    assert refused.exit_code == 2 and "file: cannot be made: " in refused.output and "\n" not in refused.output.strip()


# The checks before a tag


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which nothing is wrong with version 1.2.3."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "repository"
    (root / "lowrank_tune").mkdir(parents=True)
    (root / "lowrank_tune" / "__init__.py").write_text('"""A package."""\n\n__version__ = "1.2.3"\n')
    (root / "CHANGELOG.md").write_text(CHANGELOG)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    return root


def check_repository(root: Path) -> list[str]:
    return [*release.git_faults(root, "1.2.3"), *release.changelog_faults(root, "1.2.3", TODAY)]


def test_a_repository_without_faults_passes(repository: Path) -> None:
    assert check_repository(repository) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("[1.2.3]", "[1.2.4]", "CHANGELOG.md: has no section [1.2.3]"),
        ("2027-03-04", "unreleased", "CHANGELOG.md:5: [1.2.3] has the date 'unreleased'"),
        (" - 2027-03-04", "", "CHANGELOG.md:5: [1.2.3] has the date ''"),
        ("2027-03-04", "2027-03-05", "CHANGELOG.md:5: [1.2.3] has the date 2027-03-05, and today is 2027-03-04"),
        ("2027-03-04", "2027-02-30", "CHANGELOG.md:5: [1.2.3] has the date '2027-02-30'"),
        ("2027-03-04", "20270304", "CHANGELOG.md:5: [1.2.3] has the date '20270304'"),
        ("\n### Added\n- A thing.\n", "", "CHANGELOG.md:5: [1.2.3] has no entries"),
        ("[Unreleased]\n", "[Unreleased]\n- New.\n", "CHANGELOG.md:3: [Unreleased] has entries; move them to [1.2.3]"),
        ("[Unreleased]\n", "[Unreleased]\n## [2.0.0] - 2027-01-01\n- C.\n", "[1.2.3] is not the newest section"),
    ],
)
def test_a_planted_fault_of_the_changelog_is_found(repository: Path, old: str, new: str, fault: str) -> None:
    assert old in CHANGELOG
    (repository / "CHANGELOG.md").write_text(CHANGELOG.replace(old, new, 1))
    git(repository, "commit", "--quiet", "--all", "--message", "second")
    (found,) = check_repository(repository)
    assert fault in found and "\n" not in found


def test_changes_that_are_not_committed_are_found(repository: Path) -> None:
    (repository / "new.py").touch()
    (repository / "CHANGELOG.md").write_text(CHANGELOG + "- C.\n")
    assert check_repository(repository) == ["changes that are not committed: CHANGELOG.md, new.py"]


def test_a_tag_that_exists_is_found(repository: Path) -> None:
    git(repository, "tag", "v1.2.30")
    assert check_repository(repository) == []
    git(repository, "tag", "v1.2.3")
    (fault,) = check_repository(repository)
    assert fault.startswith("the tag v1.2.3 exists")


@pytest.mark.parametrize("line", ['__version__ = "1.2.3.dev0"', '__version__ = ""', "version = 1"])
def test_a_version_that_is_no_release_is_refused(
    repository: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "lowrank_tune" / "__init__.py").write_text(f"{line}\n")
    assert release.main([], repository) == 2
    assert capsys.readouterr().err.startswith("lowrank_tune/__init__.py: contains ")


def test_all_faults_are_reported_at_once_and_no_tag_is_set(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "distribution_faults", lambda *_: ["a fault of the wheel"])
    (repository / "CHANGELOG.md").write_text(CHANGELOG.replace("2027-03-04", "unreleased"))
    assert release.main([], repository) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "changes that are not committed",
        "CHANGELOG.md",
        "a fault of the wheel",
    ]
    assert git(repository, "tag") == ""


def test_without_faults_the_tag_is_set_and_nothing_is_published(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "distribution_faults", lambda *_: [])
    (repository / "CHANGELOG.md").write_text(CHANGELOG.replace("2027-03-04", "2020-01-01"))
    git(repository, "commit", "--quiet", "--all", "--message", "second")
    assert release.main(["--check"], repository) == 0 and git(repository, "tag") == ""
    assert release.main([], repository) == 0
    assert git(repository, "cat-file", "-t", "v1.2.3").strip() == "tag", "an annotated one"
    assert git(repository, "rev-parse", "v1.2.3^{commit}") == git(repository, "rev-parse", "HEAD")
    printed = capsys.readouterr().out
    assert "git push REMOTE v1.2.3" in printed and "twine upload" in printed


def test_a_folder_that_is_no_repository_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lowrank_tune").mkdir()
    (tmp_path / "lowrank_tune" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    assert release.main([], tmp_path) == 2
    assert "not a git repository" in capsys.readouterr().err


def test_a_program_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(release.ReleaseError, match="lowrank-tune` cannot be run: No such file"):
        release.run_command([tmp_path / "bin" / "lowrank-tune", "--version"], tmp_path)


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("echo 1.2.4 tiny-sft sft", "`lowrank-tune --version` of the wheel does not print 1.2.3"),
        ("echo 1.2.3 tiny-sft", "`lowrank-tune examples` of the wheel does not print sft"),
        ("echo 1.2.3 sft", "`lowrank-tune presets` of the wheel does not print tiny-sft"),
        ("test $1 != presets || { echo broken >&2; exit 1; }; echo 1.2.3 sft", "`lowrank-tune presets` failed: broken"),
    ],
)
def test_an_installed_command_line_that_lacks_something_is_found(tmp_path: Path, script: str, fault: str) -> None:
    for file in ("presets/tiny-sft.yaml", "examples/sft.py", "bin/lowrank-tune"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "lowrank-tune").chmod(0o755)
    assert release.installed_faults(tmp_path, tmp_path, "1.2.3") == [fault]


# The sdist and the wheel


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of this tree, and the wheel that is built from it."""
    if missing := [name for name in ("build", "twine", "hatchling") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}, which the extra `release` installs")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    stem = f"lowrank_tune-{lowrank_tune.__version__}"
    sdist, wheel = out / f"{stem}.tar.gz", out / f"{stem}-py3-none-any.whl"
    assert sorted(out.iterdir()) == sorted((sdist, wheel))
    return sdist, wheel


@pytest.mark.slow
def test_the_metadata_is_well_formed(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    assert release.metadata_faults(distributions) == []
    damaged = tmp_path / distributions[1].name
    damaged.write_bytes(distributions[1].read_bytes()[:1000])
    assert len(release.metadata_faults([damaged])) == 1


@pytest.mark.slow
def test_the_wheel_contains_what_git_tracks(distributions: tuple[Path, Path]) -> None:
    expected = {
        file if file.startswith("lowrank_tune/") else f"lowrank_tune/{file}"
        for file in tracked_files("lowrank_tune", "presets", "examples")
    }
    with zipfile.ZipFile(distributions[1]) as wheel:
        files = {
            file
            for file in wheel.namelist()
            if not file.startswith(f"lowrank_tune-{lowrank_tune.__version__}.dist-info/")
        }
    assert files == expected
    assert {"lowrank_tune/py.typed", "lowrank_tune/toy/base/model.safetensors", "lowrank_tune/examples/sft.py"} <= files


@pytest.mark.slow
def test_the_sdist_contains_what_git_tracks(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert files == {*tracked_files(), "PKG-INFO"}


@pytest.fixture(scope="session")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and the packages of this environment: their folder is added to the path, where .pth
    files in it, as of an editable installation, have no effect."""
    environment = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        distributions[1],
    ]
    done = subprocess.run(install, cwd=environment, env=environ_without_checkout(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [python, "-c", "import lowrank_tune; print(lowrank_tune.__file__)"],
        cwd=environment,
        env=environ_without_checkout(),
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(packages), where.stdout + where.stderr
    return environment


def environ_without_checkout() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture
def command_line(installed: Path, tmp_path: Path) -> Iterator[Any]:
    """Runs `lowrank-tune` of the wheel in an empty folder, and returns what it prints."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [installed / "bin" / "lowrank-tune", *arguments],
            cwd=folder,
            env=environ_without_checkout() | {"LOWRANK_TUNE_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run


@pytest.mark.slow
def test_the_installed_wheel_lists_and_copies(command_line: Any, installed: Path, tmp_path: Path) -> None:
    assert command_line("--version").strip() == lowrank_tune.__version__
    printed = command_line("presets").split()
    assert {file.stem for file in (ROOT / "presets").glob("*.yaml")} <= set(printed)
    assert {line.split()[0] for line in command_line("examples").splitlines()[:-1]} == set(EXAMPLES)
    command_line("examples", "copy")
    for file in EXAMPLE_FILES:
        copy = tmp_path / "empty" / "examples" / file.name
        assert copy.read_bytes() == file.read_bytes()
    assert release.installed_faults(installed, ROOT, lowrank_tune.__version__) == []


@pytest.mark.slow
def test_the_installed_wheel_checks_the_machine(command_line: Any) -> None:
    assert "this machine is ready" in command_line("doctor")


@pytest.mark.slow
def test_the_installed_wheel_trains(command_line: Any, tmp_path: Path) -> None:
    short = ("train.max_steps=2", "evaluate.num_prompts=8", "evaluate.num_samples=1")
    assert "runs/tiny-sft" in command_line("run", "tiny-sft", *short)
    run = tmp_path / "empty" / "runs" / "tiny-sft"
    assert (run / "final" / "adapter_model.safetensors").is_file() and (run / "report.html").is_file()
