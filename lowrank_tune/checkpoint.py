"""The run folder and its checkpoints. Whatever is written here is either whole or absent, whenever the process or the machine dies.

A checkpoint is a folder of safetensors and JSON files, with `manifest.json`, which holds size and hash of each, written last.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import Any, Literal, Self

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lowrank_tune.errors import RunFailed, UserError
from lowrank_tune.events import Emit, Note

VERSION = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(0|[1-9]\d*)")
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "it is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}
_MENDABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # file systems that cannot fsync a folder, Windows drives under WSL2 among them


class Broken(UserError):
    """A checkpoint that is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"the checkpoint {path} is broken: {reason}")


@dataclass
class Snapshot:
    """What a checkpoint holds, by file name relative to its folder: `*.safetensors` files of named tensors, and `*.json` documents."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)


# Writing files


def cannot_write(path: Path, error: OSError) -> UserError:
    """The sentence for an `OSError` of writing: a `UserError` where another path helps, else `RunFailed`."""
    kind = UserError if error.errno in _MENDABLE else RunFailed
    return kind(f"cannot write {path}: {_REASONS.get(error.errno or 0, error.strerror or str(error))}")


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside into the sentence about `path`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def finite(value: Any) -> Any:
    """The JSON value with null for every number that is not finite: JSON has no word for those."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write_all(descriptor: int, data: bytes) -> None:
    """Writes every byte, however few the system takes at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file in one instant. Raises `UserError` or `RunFailed` with path and reason; the old file is then still there."""
    fresh = path.with_name(f".tmp-{path.name}-{token_hex(4)}")
    with telling(path):
        try:
            _write(fresh, data)
            os.replace(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_atomically(target: Path, snapshot: Snapshot) -> Path:
    """Writes the snapshot as the folder `target`, replacing an older one in whole.

    Raises `UserError` or `RunFailed` with path and reason; then nothing has changed, and no temporary folder is left.
    """
    fresh = target.with_name(f".tmp-{target.name}-{token_hex(4)}")
    with telling(target):
        if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
            raise UserError(f"cannot write {target}: it holds files that this program did not write")
        try:
            fresh.mkdir(parents=True)
            files = {}
            for name, data in _files(snapshot):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                _write(fresh / name, data)
                files[name] = {"size": len(data), "blake2b": _hash(data)}
            _write(fresh / MANIFEST, _manifest({"version": VERSION, "name": target.name, "files": files}))
            for folder in {parent for name in files for parent in (fresh / name).parents if parent.is_relative_to(fresh)} | {fresh}:
                _sync(folder)
            _put(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        _sync(target.parent)
    return target


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Makes the folder's names durable: fsync of a file does not keep its name."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _put(fresh: Path, target: Path) -> None:
    """Renames onto the target. A folder cannot be renamed onto a full one, so that steps aside; `tidy` brings it back after a crash."""
    if not target.is_dir():
        os.replace(fresh, target)
        return
    aside = target.with_name(f".aside-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(target, aside)
    try:
        os.replace(fresh, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file. Bytes first, then our own write: safetensors' own writing hides the reason of a failure."""
    for name, tensors in snapshot.tensors.items():
        assert name.endswith(".safetensors") and _inside(name), name
        alone = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}  # no shared storage
        yield name, safetensors.torch.save(alone, metadata={"format": "pt"})
    for name, document in snapshot.documents.items():
        assert name.endswith(".json") and _inside(name) and name != MANIFEST, name
        yield name, json.dumps(document, indent=1).encode()  # Python's NaN and Infinity: a state comes back exactly


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _manifest(facts: Mapping[str, Any]) -> bytes:
    """The manifest's bytes; `total` guards the manifest itself."""
    facts = {key: value for key, value in facts.items() if key != "total"}
    total = _hash(json.dumps(facts, sort_keys=True).encode())
    return json.dumps({**facts, "total": total}, sort_keys=True, indent=1).encode()


# Reading them


def load(path: Path, name: str | None = None) -> Snapshot:
    """The checkpoint, with every byte verified; with `name`, it must also have been written under that name.

    Raises `Broken`; or `UserError` for one that cannot be opened or is of a newer version. Files outside the manifest are not read.
    """
    raw = _read(path, MANIFEST)
    try:
        manifest = json.loads(raw)
        if _manifest(manifest) != raw:
            raise Broken(path, f"{MANIFEST} has changed")
        if manifest["version"] != VERSION:
            raise UserError(f"{path} was written by another version of this program (format {manifest['version']}, not {VERSION})")
        if name is not None and manifest["name"] != name:
            raise Broken(path, f"it was written as {manifest['name']}")
        snapshot = Snapshot()
        for file, facts in manifest["files"].items():
            if not _inside(file):
                raise Broken(path, f"{MANIFEST} names {file!r}, which lies outside")
            data = _read(path, file)
            if len(data) != facts["size"]:
                raise Broken(path, f"{file} has {len(data)} bytes, not {facts['size']}")
            if _hash(data) != facts["blake2b"]:
                raise Broken(path, f"the content of {file} has changed")
            if file.endswith(".safetensors"):
                snapshot.tensors[file] = safetensors.torch.load(data)
            else:
                snapshot.documents[file] = json.loads(data)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise Broken(path, f"it cannot be understood ({error})") from error
    return snapshot


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise Broken(path, f"{name} is missing") from error
    except OSError as error:
        if error.errno == errno.EIO:
            raise Broken(path, f"{name} cannot be read from the disk") from error
        raise UserError(f"cannot read {path / name}: {error.strerror}") from error  # permissions: no reason to set it aside


def newest(checkpoints: Path, emit: Emit) -> tuple[int, Snapshot] | None:
    """The newest valid `step-N`. A broken one is renamed to `broken-step-N` with a warning; what a crash left behind is removed."""
    tidy(checkpoints)
    for step, path in reversed(_steps(checkpoints)):
        try:
            return step, load(path, path.name)
        except Broken as broken:
            names = (f"broken-{path.name}" + (f"-{k}" if k > 1 else "") for k in count(1))
            aside = next(place for place in map(path.with_name, names) if not place.exists())
            with telling(aside):
                os.replace(path, aside)
            message = f"the checkpoint {path.name} is broken ({broken.reason}): it was set aside as {aside.name}"
            emit(Note(message=message, level="warning"))
    return None


def rotate(checkpoints: Path, keep: int, best: int | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints and the best step. Folders without our manifest are not touched."""
    ours = [(step, path) for step, path in _steps(checkpoints) if (path / MANIFEST).is_file()]
    for step, path in ours[: max(0, len(ours) - keep)]:
        if step == best:
            continue
        doomed = path.with_name(f".tmp-{path.name}-{token_hex(4)}")  # half deleted, it must not look like a checkpoint
        with suppress(OSError):  # what cannot be deleted costs space, not the run
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def tidy(folder: Path) -> None:
    """Removes what a crash left half written, and brings back a folder that was stepping aside."""
    for leftover in folder.glob(".tmp-*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()
    for aside in folder.glob(".aside-*"):
        target = aside.with_name(aside.name.removeprefix(".aside-"))
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with telling(target):
                os.replace(aside, target)


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    matches = ((_STEP.fullmatch(path.name), path) for path in checkpoints.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


# States as tensors and JSON


def flatten_optimizer(state: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's `state_dict()` as tensors and a JSON document; `names[i]` is the name of its parameter i.

    Any nesting of tensors, numbers, strings, None, lists, tuples and dicts comes back as it was. Raises TypeError for other things.
    """
    tensors: dict[str, Tensor] = {}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    by_name = {names[index]: entry for index, entry in state["state"].items()}
    rest = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    return tensors, {"state": _pack(by_name, "", tensors), "groups": _pack(groups, "group", tensors), "rest": _pack(rest, "rest", tensors)}


def restore_optimizer(tensors: Mapping[str, Tensor], document: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The `state_dict` for an optimizer whose parameter i is `names[i]`, whatever order they had when it was saved.

    Raises `UserError` where the parameters are other ones, or stand in other groups.
    """
    index = {name: i for i, name in enumerate(names)}
    groups = _unpack(document["groups"], tensors)
    saved = {name for group in groups for name in group["params"]}
    if other := saved ^ set(names):
        raise UserError(f"the saved optimizer belongs to other parameters: {len(other)} differ, `{min(other)}` among them")
    for group in groups:
        group["params"] = sorted(index[name] for name in group["params"])
    if [i for group in groups for i in group["params"]] != list(range(len(names))):
        raise UserError("the saved optimizer has its parameters in other groups")
    state = {index[name]: entry for name, entry in _unpack(document["state"], tensors).items()}
    return {**_unpack(document["rest"], tensors), "state": state, "param_groups": groups}


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value.detach()
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(entry, f"{place}/{key}".lstrip("/"), tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(entry, f"{place}/{i}", tensors) for i, entry in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place}: cannot save a {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(entry, tensors) for key, entry in content}
    entries = [_unpack(entry, tensors) for entry in content]
    return tuple(entries) if kind == "tuple" else entries


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All global random states (python, numpy, torch, every CUDA device) as tensors and a JSON document."""
    state: Any = numpy.random.get_state(legacy=False)
    keys = torch.from_numpy(state["state"]["key"].astype(numpy.int64))
    tensors = {"torch": torch.get_rng_state(), "numpy": keys}
    if torch.cuda.is_available():
        tensors |= {f"cuda/{i}": device for i, device in enumerate(torch.cuda.get_rng_state_all())}
    numpy_rest = [state["bit_generator"], int(state["state"]["pos"]), int(state["has_gauss"]), float(state["gauss"])]
    return tensors, {"python": random.getstate(), "numpy": numpy_rest}


def restore_rng(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Sets what `rng_state` gave. States of CUDA devices that are not here are left out."""
    version, words, gauss = document["python"]
    random.setstate((version, tuple(words), gauss))
    name, position, has_gauss, cached = document["numpy"]
    numpy.random.set_state((name, tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda/{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda/{i}"], i)


# The run folder

_locks: set[int] = set()


def _let_go_in_child() -> None:
    """A forked worker would share the lock, and keep it when its parent is killed: the run could then not be continued."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


class RunFolder:
    """A run's folder, locked against other processes until `close`. `continued` tells an unfinished run from a new one."""

    def __init__(self, path: Path) -> None:
        """Takes the folder as it is. Use `RunFolder.open`."""
        self.path, self.continued = path, False
        self.checkpoints, self.final = path / "checkpoints", path / "final"
        self.events, self.samples = path / "events.jsonl", path / "samples.jsonl"
        self.summary, self.console_log = path / "summary.json", path / "console.log"
        self._lock: int | None = None

    @classmethod
    def open(cls, path: Path, recipe: dict[str, Any], text: str, differences: Callable[[dict[str, Any], dict[str, Any]], list[str]],
             exact: bool, emit: Emit) -> Self:  # fmt: skip
        """The folder for this recipe: new, or that of its unfinished run; beside a finished run the next free NAME-2, NAME-3.

        `text` becomes `recipe.yaml`; `differences(old, new)` says in lines what forbids to continue; `exact`: the person named the folder.
        Raises `UserError` for a run of another recipe, for a folder that is no run, for one in use or one that cannot be written.
        """
        if path.name in ("", ".."):
            path = path.resolve()
        for number in count(1):
            folder = cls(path if number == 1 else path.with_name(f"{path.name}-{number}"))
            if (state := folder._state()) == "foreign" and number == 1:
                raise UserError(f"{path} exists and is no run: give another folder with --out")
            if state in ("foreign", "finished"):
                continue
            try:
                folder._take(emit)
                if folder._state() == "finished":  # by another process, a moment ago
                    folder.close()
                    continue
                folder._begin(recipe, text, differences)
            except BaseException:
                folder.close()
                raise
            if number > 1:
                message = f"{path} holds a finished run and is left alone: this one goes to {folder.path}"
                emit(Note(message=message, level="warning" if exact else "info"))
            return folder
        raise AssertionError("count never ends")

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def write_text(self, name: str, text: str) -> None:
        """Replaces the file in one instant. Raises `UserError` or `RunFailed`."""
        write_file(self.path / name, text.encode("utf-8", "backslashreplace"))

    def write_json(self, name: str, value: Any) -> None:
        """The same for a JSON value; numbers that are not finite become null."""
        self.write_text(name, json.dumps(finite(value), indent=2) + "\n")

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self._lock in _locks:
            _locks.remove(self._lock)
            os.close(self._lock)  # its children have closed theirs
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _state(self) -> Literal["new", "unfinished", "finished", "foreign"]:
        with telling(self.path):
            if not os.path.lexists(self.path):
                return "new"
            names = {name for name in os.listdir(self.path) if name != ".lock" and not name.startswith(".tmp-")}
        if not names:
            return "new"  # or a process died right after it had made it
        if "run.json" not in names:
            return "foreign"
        with suppress(OSError, ValueError, AttributeError):
            if json.loads(self.summary.read_bytes()).get("status") == "done":
                return "finished"
        return "unfinished"

    def _take(self, emit: Emit) -> None:
        with telling(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            _locks.add(self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                process = os.read(self._lock, 20).decode(errors="replace").strip()
                raise UserError(f"{self.path} is being written by {f'process {process}' if process else 'another process'}") from error
            except OSError as error:
                emit(Note(message=f"{self.path} cannot be locked ({error.strerror}): start no second run in it", level="warning"))
            os.ftruncate(self._lock, 0)
            write_all(self._lock, f"{os.getpid()}\n".encode())

    def _begin(self, recipe: dict[str, Any], text: str, differences: Callable[[dict[str, Any], dict[str, Any]], list[str]]) -> None:
        """Checks that an unfinished run may be continued, and writes what the folder is. `run.json` comes first: it makes it a run."""
        cures = f"Give another folder with --out, or delete {self.path}."
        if self._state() == "unfinished":
            try:
                old = json.loads((self.path / "run.json").read_bytes())["recipe"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path / 'run.json'} cannot be understood. {cures}") from error
            if lines := differences(old, recipe):
                told = "".join(f"\n  {line}" for line in lines)
                raise UserError(f"{self.path} holds an unfinished run of another recipe:{told}\n{cures}")
            self.continued = True
        tidy(self.path)
        self.write_json("run.json", {"version": VERSION, "recipe": recipe})
        self.write_text("recipe.yaml", text)
