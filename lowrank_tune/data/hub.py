"""Rows of a data set of the Hugging Face hub. An error of the hub becomes one sentence with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lowrank_tune.config import SourceConfig
from lowrank_tune.data.files import NumberedRows, RowMask
from lowrank_tune.errors import UserError
from lowrank_tune.full_disk import HUB_CURE, describe_full_disk, full_disk_reason
from lowrank_tune.offline import fetch_advice, offline_variable
from lowrank_tune.paths import hub_folder

LIST = re.compile(r"\[([^\]]*)\]")
"""A list of names in a message of `datasets`."""
INFO_SECONDS = 5.0
UNREACHABLE = frozenset(
    {
        "ConnectionError",
        "ConnectError",
        "TimeoutException",
        "Timeout",
        "TransportError",
    }
)
"""Names of the errors of the libraries if the hub does not answer."""


class HubUnreachable(Exception):
    """The hub does not answer. The data set may still be in the cache."""


class HubRows:
    """One split of one data set; `datasets` stores it on disk."""

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

    def count_rows(self) -> int:
        """Returns the number of rows."""
        return len(self._data)

    def rows(self, mask: RowMask) -> NumberedRows:
        """Yields the drawn rows with their numbers, and reads only these."""
        if mask is None:
            return enumerate(self._data, start=1)
        indices = np.flatnonzero(mask)
        return zip(
            (indices + 1).tolist(),
            self._data.select(indices),
            strict=True,
        )

    def content_key(self) -> str:
        """Returns a key that changes with revision, configuration and split."""
        return str(self._data._fingerprint)


def _import_datasets(name: str) -> Any:
    try:
        # Imported only here: local files and the built-in problems do not need the package.
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: data sets of the hub need the package datasets (`pip install datasets`); "
            "there is no local file or folder of this name"
        ) from error
    return datasets


@contextmanager
def hub_errors_in_words(source: SourceConfig) -> Iterator[None]:
    """Raises UserError with one sentence for what the libraries raise inside."""
    name, _, revision = source.dataset.partition("@")
    try:
        yield
    except (KeyboardInterrupt, MemoryError, HubUnreachable):
        raise
    except Exception as error:
        # The library raises its own errors, those of the client of the hub, and ValueError.
        sentence = describe_hub_error(
            error,
            name,
            source.config_name,
            source.split,
            revision,
        )
        raise UserError(f"{name}: {sentence}") from error


def hub_columns(source: SourceConfig) -> list[str] | None:
    """Returns the columns of a data set by its description, without its rows; None if the description has no columns.

    Raises UserError as `HubRows`: no such data set, configuration or split, no access to it, or offline and not in the
    cache. Raises HubUnreachable if the hub does not answer within a few seconds.
    """
    name, _, revision = source.dataset.partition("@")
    datasets = _import_datasets(name)
    with hub_errors_in_words(source):
        if not datasets.config.HF_HUB_OFFLINE:
            _request_info(name, revision)
        builder = datasets.load_dataset_builder(
            name,
            source.config_name,
            revision=revision or None,
        )
    splits = builder.info.splits
    features = builder.info.features
    if splits and re.fullmatch(r"\w+", source.split) and source.split not in splits:
        raise UserError(f"{name}: it has no split `{source.split}`; it has {', '.join(map(str, splits))}")
    if not features:
        return None
    return [str(column) for column in features]


def _request_info(name: str, revision: str) -> None:
    """Sends one request. `datasets` repeats its own for half a minute if there is no network."""
    # A part of `datasets`, and imported where that is.
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(
            name,
            revision=revision or None,
            timeout=INFO_SECONDS,
        )
    except Exception as error:
        response = getattr(error, "response", None)
        status_code = getattr(response, "status_code", 0)
        if UNREACHABLE & _kinds_of(error) or status_code >= 500:
            raise HubUnreachable(str(error)) from error
        raise


def _kinds_of(error: Exception) -> set[str]:
    """Returns the names of the classes of an error."""
    return {kind.__name__ for kind in type(error).__mro__}


def describe_hub_error(
    error: Exception,
    name: str,
    config: str | None,
    split: str,
    revision: str,
) -> str:
    """Returns what an error of the hub means and what to do."""
    text = " ".join(str(error).split())
    kinds = _kinds_of(error)
    listed = LIST.search(text)
    choices = listed[1].replace("'", "") if listed else ""
    full = full_disk_reason(error)
    if full:
        return f"it cannot be stored: {describe_full_disk(hub_folder() / 'datasets', full, HUB_CURE)}"
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
    if "OfflineModeIsEnabled" in kinds or (offline_variable() and "ConnectionError" in kinds):
        advice = fetch_advice(name, revision, "dataset")
        return f"it is not in the cache of this machine; {advice}, and name that folder as `dataset`"
    if "DatasetNotFoundError" in kinds or "RepositoryNotFoundError" in kinds:
        return (
            "there is no such data set on the hub and no such local file; check the spelling, or `hf auth login` "
            "if it is private"
        )
    if "HfHubHTTPError" in kinds or kinds & UNREACHABLE:
        advice = fetch_advice(name, revision, "dataset")
        return (
            f"the hub cannot be reached, and no local file has this name; {advice}, and name that folder as `dataset`"
        )
    if "scripts are no longer supported" in text:
        return "it is made by a script, which `datasets` no longer runs; use a copy of it in Parquet, or a local file"
    return f"it cannot be loaded ({text[:200] or type(error).__name__})"
