"""Uploads a folder to a repository of the Hugging Face hub: only to a repository that the user names, private unless
the user sets another visibility."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from lowrank_tune import __version__
from lowrank_tune.errors import TrainingError, UserError

EXCLUDED_FILES = ("manifest.json", "export.json")
"""Files that only this program reads."""
NETWORK_PACKAGES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")


@dataclass(frozen=True)
class Upload:
    """A planned upload: names with their sizes in bytes, and whether everybody can read the repository. `new` is None
    if the hub was not asked whether the repository exists."""

    repo: str
    files: Sequence[tuple[str, int]]
    public: bool
    new: bool | None

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


def push(
    folder: Path,
    repo: str,
    public: bool,
    show: Callable[[Upload], None],
    dry_run: bool = False,
) -> str:
    """Uploads a folder in one commit, and returns its address (with `dry_run`, without uploading). `show` is called
    with the planned upload first.

    Raises UserError if the upload is not allowed or not possible, TrainingError if the hub or the network fails. A
    public repository that exists is never written without `public`. With HF_HUB_OFFLINE, `dry_run` does not use the
    network.
    """
    _check_name(repo)
    token = ""
    if not constants.HF_HUB_OFFLINE:
        token = _token()
    elif not dry_run:
        raise UserError("nothing can be pushed while HF_HUB_OFFLINE is set")
    api = HfApi(
        token=token or False,
        library_name="lowrank_tune",
        library_version=__version__,
    )
    existing: Any = None
    if token:
        with _as_user_error(repo, token), suppress(RepositoryNotFoundError):
            existing = api.repo_info(repo)
        _check_visibility(repo, existing, public)
    is_new = existing is None if token else None
    show(
        Upload(
            repo,
            _uploaded_files(folder),
            public,
            is_new,
        )
    )
    address = f"{api.endpoint}/{repo}"
    if dry_run:
        return address
    with _as_user_error(repo, token):
        if existing is None:
            api.create_repo(repo, private=not public)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=list(EXCLUDED_FILES),
            commit_message="Upload from lowrank_tune",
        )
    return address


def _uploaded_files(folder: Path) -> list[tuple[str, int]]:
    files = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in EXCLUDED_FILES:
            files.append((name, path.stat().st_size))
    return files


def _check_name(repo: str) -> None:
    """Raises UserError unless `repo` is a name of the form user/name."""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"--repo: {repo!r} is not a name of a repository: write user/name") from error
    if "/" not in repo:
        raise UserError(f"--repo: {repo!r} has no owner: write user/name")


def _check_visibility(
    repo: str,
    existing: Any,
    public: bool,
) -> None:
    """Raises UserError if a repository exists and is public or private in contrast to `public`."""
    if existing is None:
        return
    is_private = existing.private is True
    if not is_private and not public:
        raise UserError(
            f"{repo} is on the hub already and everybody can read it: --public pushes to it all the same, or name "
            "another one"
        )
    if is_private and public:
        raise UserError(
            f"{repo} is on the hub already and is private, which a push does not change: leave --public out, and "
            "change it there"
        )


def _token() -> str:
    """Returns the user's token. Raises UserError if there is none."""
    token = get_token()
    if not token:
        raise UserError(
            "there is no token for the hub: `hf auth login` first, or set HF_TOKEN, with a token that may write"
        )
    return str(token)


@contextmanager
def _as_user_error(repo: str, token: str) -> Iterator[None]:
    """Raises errors of the hub and the network as one sentence that never contains the token."""
    try:
        yield
    except RepositoryNotFoundError:
        raise
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in NETWORK_PACKAGES:
            raise
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) in (401, 403):
            raise UserError(
                f"the hub does not let you write {repo}: use a token that may, with `hf auth login` or HF_TOKEN"
            ) from None
        lines = [line.strip() for line in str(error).replace(token, "...").splitlines()]
        reasons = [line for line in lines if line] or [type(error).__name__]
        raise TrainingError(f"nothing was pushed to {repo}: {reasons[0]}") from None
