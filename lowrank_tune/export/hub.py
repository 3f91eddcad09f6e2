"""A folder to a repository of the Hugging Face hub: only where the user names one, and private unless the user says
otherwise."""

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
"""What only this program reads."""
NETWORK_PACKAGES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")


@dataclass(frozen=True)
class Upload:
    """What will go where: names with their sizes in bytes, and whether everybody can read it then. `new` is None where
    the hub was not asked whether there is such a repository."""

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
    """Uploads a folder in one commit, and returns its address (or where it would go, with `dry_run`). `show` hears what
    will go before it does.

    Raises UserError where it must not or cannot be, TrainingError where the hub or the network fails. A repository that
    is there and public is never written without `public`. Where HF_HUB_OFFLINE is set, `dry_run` asks the hub nothing.
    """
    _check_name(repo)
    if constants.HF_HUB_OFFLINE and not dry_run:
        raise UserError("nothing can be pushed while HF_HUB_OFFLINE is set")
    token = "" if constants.HF_HUB_OFFLINE else _token()
    api = HfApi(token=token or False, library_name="lowrank_tune", library_version=__version__)
    existing: Any = None
    if token:
        with _as_user_error(repo, token), suppress(RepositoryNotFoundError):
            existing = api.repo_info(repo)
    if existing is not None and existing.private is not True and not public:
        raise UserError(
            f"{repo} is on the hub already and everybody can read it: --public pushes to it all the same, or name "
            f"another one"
        )
    if existing is not None and existing.private is True and public:
        raise UserError(
            f"{repo} is on the hub already and is private, which a push does not change: leave --public out, and "
            f"change it there"
        )
    files = [
        (str(path.relative_to(folder)), path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    upload = Upload(
        repo,
        [(name, size) for name, size in files if name not in EXCLUDED_FILES],
        public,
        existing is None if token else None,
    )
    show(upload)
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


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"--repo: {repo!r} is no name of a repository: write user/name") from error
    if "/" not in repo:
        raise UserError(f"--repo: {repo!r} is without its owner: write user/name")


def _token() -> str:
    token = get_token()
    if not token:
        raise UserError(
            "there is no token for the hub: `hf auth login` first, or set HF_TOKEN, with a token that may write"
        )
    return str(token)


@contextmanager
def _as_user_error(repo: str, token: str) -> Iterator[None]:
    """What the hub and the network raise becomes one sentence, in which the token never stands."""
    try:
        yield
    except RepositoryNotFoundError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in NETWORK_PACKAGES:
            raise
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code in (401, 403):
            raise UserError(
                f"the hub does not let you write {repo}: take a token that may, with `hf auth login` or HF_TOKEN"
            ) from None
        message = next(
            (line.strip() for line in str(error).replace(token, "...").splitlines() if line.strip()),
            type(error).__name__,
        )
        raise TrainingError(f"nothing was pushed to {repo}: {message}") from None
