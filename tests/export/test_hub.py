"""Pushing to the hub: to a local server with its protocol, and with wrong options. Nothing uses the network."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from export_fixtures import FinishedRun, make_run

from lowrank_tune import UserError
from lowrank_tune.errors import TrainingError
from lowrank_tune.export import hub
from lowrank_tune.export.hub import Upload, push

TOKEN = "hf_" + "s3cret" * 5


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs. `there`: repositories by name, private or not; `commits`:
    what was uploaded."""

    there: dict[str, bool] = {}
    commits: list[dict[str, bytes]] = []
    tokens: set[str | None] = set()
    refuses = False

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, code: int, content: Any, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/").split("/revision")[0]
        if name in self.there:
            self.answer(200, {"id": name, "private": self.there[name], "sha": "0" * 40, "siblings": [], "tags": []})
        else:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "validate" not in self.path:
            self.tokens.add(self.headers.get("Authorization"))
        if self.refuses:
            self.answer(403, {"error": f"you may not, {TOKEN}"})
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            assert name not in self.there
            self.there[name] = wanted.get("private", wanted.get("visibility") == "private")
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.commits.append(
                {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
            )
            self.answer(
                200,
                {
                    "commitUrl": f"http://{self.headers['Host']}/x/y/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "success": True,
                },
            )
        else:
            self.answer(500, {"error": f"unknown: {self.path}"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, fresh in (("there", {}), ("commits", []), ("tokens", set()), ("refuses", False)):
        monkeypatch.setattr(Hub, name, fresh)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def pushed(made: FinishedRun, server: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user types it."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_tune", "export", str(made.run), "--to", "hub", "--repo", "me/mine", *more],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert TOKEN not in done.stdout + done.stderr, "the token is nobody's business"
    return done


@pytest.mark.slow
def test_a_push_through_the_real_client(server: str, tmp_path: Path) -> None:
    made = make_run(tmp_path, lower=("sft",))
    dry = pushed(made, server, "--dry-run")
    assert (
        dry.returncode == 0
        and "me/mine (a new repository, private)" in dry.stdout
        and not Hub.there
        and not Hub.commits
    ), dry.stderr
    first = pushed(made, server)
    assert first.returncode == 0 and first.stdout.splitlines()[-1] == f"pushed: {server}/me/mine", first.stderr
    assert Hub.there == {"me/mine": True} and Hub.tokens == {f"Bearer {TOKEN}"}
    final = made.run / "final"
    wanted = {
        str(path.relative_to(final)): path.read_bytes()
        for path in final.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert Hub.commits == [wanted] and "adapter_model.safetensors" in wanted and "policy/adapter_config.json" in wanted
    for name, content in wanted.items():
        assert name in first.stdout and f"{len(content):,}" in first.stdout, "what goes is shown"
    Hub.there["me/mine"] = False
    refused = pushed(made, server)
    assert (
        refused.returncode == 2
        and "everybody can read it: --public pushes to it all the same" in refused.stderr
        and len(Hub.commits) == 1
    )
    again = pushed(made, server, "--public")
    assert again.returncode == 0 and "(which exists, everybody can read)" in again.stdout and len(Hub.commits) == 2
    Hub.refuses = True
    refused = pushed(made, server, "--public")
    assert (
        refused.returncode == 2
        and "does not let you write me/mine" in refused.stderr.splitlines()[-1]
        and "Traceback" not in refused.stderr
    )
    gone = pushed(made, "http://127.0.0.1:9")
    assert (
        gone.returncode == 1
        and "nothing was pushed to me/mine: " in gone.stderr.splitlines()[-1]
        and "Traceback" not in gone.stderr
    )


class Api:
    """The methods of the client that `push` calls."""

    endpoint = "https://hub"
    private: bool | None = None
    calls: list[tuple[str, Any]] = []
    error: Exception | None = None

    def __init__(self, **more: Any) -> None:
        assert more["token"] in (TOKEN, False)

    def repo_info(self, repo: str) -> Any:
        if self.private is None:
            raise hub.RepositoryNotFoundError(
                "404", response=SimpleNamespace(headers={}, request=None, status_code=404)
            )  # type: ignore[arg-type]
        return SimpleNamespace(private=self.private)

    def create_repo(self, repo: str, private: bool) -> None:
        self.calls.append(("create", private))

    def upload_folder(self, **more: Any) -> None:
        if self.error:
            raise self.error
        self.calls.append(("upload", more["ignore_patterns"]))


def test_private_by_default_and_never_into_a_public_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "manifest.json").write_text("{}")
    shown = list[Upload]()
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for private, public, sentence in (
        (None, False, ""),
        (None, True, ""),
        (True, False, ""),
        (False, True, ""),
        (False, False, "everybody can read it"),
        (True, True, "which a push does not change"),
    ):
        monkeypatch.setattr(Api, "private", private)
        monkeypatch.setattr(Api, "calls", [])
        if sentence:
            with pytest.raises(UserError, match=sentence):
                push(tmp_path, "me/mine", public, shown.append)
            assert not Api.calls
            continue
        assert push(tmp_path, "me/mine", public, shown.append) == "https://hub/me/mine"
        assert Api.calls == [
            *([("create", not public)] if private is None else []),
            ("upload", ["manifest.json", "export.json"]),
        ]
        assert shown[-1] == Upload("me/mine", [("README.md", 5)], public, private is None) and shown[-1].size == 5
    monkeypatch.setattr(Api, "private", True)
    monkeypatch.setattr(Api, "error", OSError(f"no route with {TOKEN}\nand more"))
    with pytest.raises(TrainingError, match=r"nothing was pushed to me/mine: no route with \.\.\.$") as caught:
        push(tmp_path, "me/mine", False, shown.append)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    monkeypatch.setattr(Api, "error", ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        push(tmp_path, "me/mine", False, shown.append)
    for repo, sentence in (("mine", "has no owner"), ("me/../x", "is not a name"), ("a/b/c", "is not a name")):
        with pytest.raises(UserError, match=sentence):
            push(tmp_path, repo, False, shown.append)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token for the hub"):
        push(tmp_path, "me/mine", False, shown.append)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="while HF_HUB_OFFLINE is set"):
        push(tmp_path, "me/mine", False, shown.append)
    assert push(tmp_path, "me/mine", False, shown.append, dry_run=True).endswith("/me/mine")
    assert shown[-1] == Upload("me/mine", [("README.md", 5)], False, None)
    with pytest.raises(UserError, match="write user/name"):
        push(tmp_path, "mine", False, shown.append, dry_run=True)
