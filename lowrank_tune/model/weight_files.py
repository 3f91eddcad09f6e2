"""The published files of a base's weights, and what their headers contain, read without the weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import cached_files

from lowrank_tune.json_files import read_json

PACKED_DTYPE = "U8"
"""The dtype of two 4-bit weights in one byte."""


class StoredTensor(NamedTuple):
    """A tensor's file, and its name there."""

    file: Path
    name: str


def published_files(path_or_id: str, revision: str | None) -> dict[str, Path]:
    """Returns the file of each tensor of a repository or folder, empty if it has no safetensors. Raises OSError, and
    ValueError for an index that is broken or names a file outside the folder."""

    def published(file: str) -> Any:
        return cached_file(
            path_or_id,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )

    index = published(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        single = published(SAFE_WEIGHTS_NAME)
        if single is None:
            return {}
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), Path(single))
    weight_map = _weight_map(read_json(Path(index)))
    names = sorted(set(weight_map.values()))
    # All at once, as transformers does, so that files that are not in the cache are downloaded side by side.
    paths = cached_files(path_or_id, names, revision=revision) or []
    path_of = {name: Path(path) for name, path in zip(names, paths, strict=True)}
    return {tensor: path_of[file] for tensor, file in weight_map.items()}


def _weight_map(index: Any) -> Mapping[str, str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} is broken: `weight_map` must give the file of each tensor")
    for tensor, file in weight_map.items():
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME}: {tensor} is in {file!r:.80}, outside of the model's folder")
    return weight_map


def num_stored_weights(files: Collection[Path]) -> int:
    """Returns the number of weights in files, from their headers. Raises SafetensorError for a broken one."""
    return sum(map(_num_weights, files))


def _num_weights(file: Path) -> int:
    total = 0
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            tensor = opened.get_slice(name)
            weights = 1
            for size in tensor.get_shape():
                weights *= size
            total += 2 * weights if tensor.get_dtype() == PACKED_DTYPE else weights
    return total
