"""Errors of a full disk: what is missing, where, and what to do."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from lowrank_tune.paths import nearest_existing

REASONS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
TEXTS = {"no space left on device": errno.ENOSPC, "disk quota exceeded": errno.EDQUOT}
"""Parts of the messages of libraries that hide the number of the error."""
RUN_CURE = (
    "free some space or lower train.save_total_limit, and the same command continues; or name a folder on another disk "
    "with --out"
)
EXPORT_CURE = "free some space, or name a folder on another disk with --out, and give the same command again"
HUB_CURE = "free some space, or name a folder on another disk in HF_HOME, and the same command continues"
CACHE_CURE = "free some space, or name a folder on another disk in LOWRANK_TUNE_CACHE, and the same command continues"


def full_disk_reason(error: BaseException) -> str:
    """Returns in words that the disk or the quota is full; empty for any other error."""
    if isinstance(error, OSError) and error.errno in REASONS:
        return REASONS[error.errno]
    words = _words_in(str(error))
    return REASONS[TEXTS[words]] if words else ""


def raise_if_full(text: str) -> None:
    """Raises the OSError of a full disk if a library or another program states one, so that it is handled as any other
    of them."""
    words = _words_in(text)
    if words:
        raise OSError(TEXTS[words], words)


def _words_in(text: str) -> str:
    """Returns which of `TEXTS` a message contains, empty for none."""
    return next((words for words in TEXTS if words in text.lower()), "")


def describe_full_disk(
    path: Path,
    reason: str,
    cure: str,
    needed: int = 0,
) -> str:
    """Returns the reason, how many bytes are needed (unless unknown) and free on the disk of `path`, and what to do."""
    sizes = []
    if needed:
        sizes.append(f"{format_size(needed)} are needed")
    folder = nearest_existing(path.parent)
    sizes.append(f"{_free(folder)} free on the disk of {folder}")
    return f"{reason}: {', '.join(sizes)}; {cure}"


def _free(folder: Path) -> str:
    try:
        return f"{format_size(shutil.disk_usage(folder).free)} are"
    except OSError:
        return "an unknown amount is"


def format_size(size: int) -> str:
    """Returns a number of bytes with its unit: `1.2 MiB`."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,} B"
