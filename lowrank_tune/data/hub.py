"""Rows of a data set of the Hugging Face hub. Whatever goes wrong there becomes one sentence with its cure."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from lowrank_tune.config import SourceConfig
from lowrank_tune.data.files import RowMask
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.errors import UserError

LIST = re.compile(r"\[([^\]]*)\]")
INFO_SECONDS = 5.0
UNREACHABLE = frozenset({"ConnectionError", "ConnectError", "TimeoutException", "Timeout", "TransportError"})
"""Names of the errors of the libraries that mean that the hub does not answer."""


class HubUnreachable(Exception):
    """The hub does not answer. The data set may be in the cache nevertheless."""


class HubRows:
    """One split of one data set; `datasets` keeps it on disk."""

    def __init__(self, source: SourceConfig) -> None:
        self.name, _, revision = source.dataset.partition("@")
        datasets = _import_datasets(self.name)
        with hub_errors_in_words(source):
            self._data: Any = datasets.load_dataset(
                self.name,
                source.config_name,
                split=source.split,
                revision=revision or None,
            )

    def lines(self) -> Iterator[int]:
        """The number of every row, from 1."""
        return iter(range(1, len(self._data) + 1))

    def rows(self, mask: RowMask) -> Iterator[tuple[int, Mapping[str, Any] | InvalidRow]]:
        """Rows with their numbers; a draw reads only what is drawn."""
        if mask is None:
            return zip(self.lines(), self._data, strict=True)
        numbers = np.flatnonzero(mask)
        return zip((numbers + 1).tolist(), self._data.select(numbers), strict=True)

    def content_key(self) -> str:
        """Changes with revision, configuration and split."""
        return str(self._data._fingerprint)


def _import_datasets(name: str) -> Any:
    try:
        import datasets  # only here: local files and the built-in problems need no such package
    except ImportError as error:
        raise UserError(
            f"{name}: data sets of the hub need the package datasets (`pip install datasets`); "
            "there is no local file or folder of this name"
        ) from error
    return datasets


@contextmanager
def hub_errors_in_words(source: SourceConfig) -> Iterator[None]:
    """What the libraries raise inside becomes a `UserError` of one sentence."""
    name, _, revision = source.dataset.partition("@")
    try:
        yield
    except (KeyboardInterrupt, MemoryError, HubUnreachable):
        raise
    except Exception as error:  # the library raises its own errors, the hub client's, and bare ValueError
        sentence = describe_hub_error(error, name, source.config_name, source.split, revision)
        raise UserError(f"{name}: {sentence}") from error


def hub_columns(source: SourceConfig) -> list[str] | None:
    """The columns of a data set by its description, without any of its rows; None where the description does not name
    them.

    Raises `UserError` where `HubRows` would: no such data set, configuration or split, no access to it, or offline and
    not in the cache. Raises `HubUnreachable` where the hub does not answer within a few seconds.
    """
    name, _, revision = source.dataset.partition("@")
    datasets = _import_datasets(name)
    with hub_errors_in_words(source):
        if not datasets.config.HF_HUB_OFFLINE:
            _request_info(name, revision)
        builder = datasets.load_dataset_builder(name, source.config_name, revision=revision or None)
    splits = builder.info.splits
    features = builder.info.features
    if splits and re.fullmatch(r"\w+", source.split) and source.split not in splits:
        raise UserError(f"{name}: it has no split `{source.split}`; it has {', '.join(map(str, splits))}")
    if not features:
        return None
    return [str(column) for column in features]


def _request_info(name: str, revision: str) -> None:
    """One request, as `datasets` itself repeats its own for half a minute where there is no network."""
    from huggingface_hub import HfApi  # a part of `datasets`, and imported where that is

    try:
        HfApi().dataset_info(name, revision=revision or None, timeout=INFO_SECONDS)
    except Exception as error:
        status_code = getattr(getattr(error, "response", None), "status_code", 0)
        if UNREACHABLE & {kind.__name__ for kind in type(error).__mro__} or status_code >= 500:
            raise HubUnreachable(str(error)) from error
        raise


def describe_hub_error(
    error: Exception,
    name: str,
    config: str | None,
    split: str,
    revision: str,
) -> str:
    """What an error of the hub means and what to do."""
    text = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if match := LIST.search(text):
        choices = match.group(1).replace("'", "")
    else:
        choices = ""
    if "gated" in text or "GatedRepoError" in kinds:
        return (
            f"it is gated; accept its terms at https://huggingface.co/datasets/{name} and log in with `hf auth login`"
        )
    if "Config name is missing" in text:
        return f"it has several configurations; choose one with `config_name:` ({choices})"
    if "BuilderConfig" in text and "not found" in text:
        return f"it has no configuration `{config}`; it has {choices}"
    if "Unknown split" in text or "Bad split" in text:
        if choices:
            return f"it has no split `{split}`; it has {choices}"
        return f"it has no split `{split}`"
    if "RevisionNotFoundError" in kinds or ("Revision" in text and "doesn't exist" in text):
        return f"it has no revision `{revision}`"
    if "OfflineModeIsEnabled" in kinds or (
        os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and "ConnectionError" in kinds
    ):
        return (
            "it is not in the cache of this machine, and HF_HUB_OFFLINE forbids to fetch it; unset "
            "HF_HUB_OFFLINE, or name a local file"
        )
    if "DatasetNotFoundError" in kinds or "RepositoryNotFoundError" in kinds:
        return (
            "there is no such data set on the hub and no such local file; check the spelling, or `hf auth login` "
            "if it is private"
        )
    if kinds & {*UNREACHABLE, "HfHubHTTPError"}:
        return "the hub cannot be reached, and no local file has this name; check the network, or name a local file"
    if "scripts are no longer supported" in text:
        return "it is made by a script, which `datasets` no longer runs; use a copy of it in Parquet, or a local file"
    return f"it cannot be loaded ({text[:200] or type(error).__name__})"
