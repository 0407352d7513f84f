"""A Hugging Face Hub on this machine: repositories in memory, behind the part of its HTTP interface
that uploading and downloading a few files takes, archives through git-lfs as on the Hub itself."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import huggingface_hub.constants as constants
import pytest

# Repositories of datasets are those of models behind this.
_ID = r"((?:datasets/)?[^/]+/[^/]+)"


class FakeHub:
    """Repositories by id, each with the files of its branches.

    Attributes:
        branches: Files by repository and branch; a dataset's repository is "datasets/USER/NAME".
        private: Repositories created as private.
        members: Authorization headers that may read private repositories and write; None for all.
        tokens: Authorization headers of all requests.
        downloads: Names of the files that were sent.
        large: Files uploaded by git-lfs, by digest.
        cuts: Of the next files that are sent, after how many bytes the connection is closed.
        on_cut: Called before it is.
    """

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.members: set[str] | None = None
        self.tokens: set[str] = set()
        self.downloads: list[str] = []
        self.large: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.on_cut: Callable[[], None] = lambda: None

    def answer(
        self, method: str, path: str, body: bytes, token: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        is_member = self.members is None or token in self.members
        if path == "/api/repos/create":
            return self._create(json.loads(body)) if is_member else (403, {}, b"{}")
        if path == "/api/validate-yaml":
            return 200, {}, json.dumps({"errors": [], "warnings": []}).encode()
        if path.startswith("/lfs/"):
            self.large[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        if re.fullmatch(rf"/{_ID}.git/info/lfs/objects/batch", path):
            return 200, {}, json.dumps({"objects": _uploads(json.loads(body))}).encode()
        if match := re.fullmatch(rf"/{_ID}/resolve/([^/]+)/(.+)", path):
            return self._file(method, match[1], unquote(match[2]), match[3])
        path = path.replace("/api/models/", "/api/")
        if match := re.fullmatch(rf"/api/{_ID}(?:/(\w+)/([^/]+)(?:/.*)?)?", path):
            if not is_member and match[1] in self.private:
                return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
            return self._api(match[1], match[2] or "", unquote(match[3] or "main"), body)
        return 404, {}, b"{}"

    def _create(self, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        repo_id = f"{request['organization']}/{request['name']}"
        if request.get("type") == "dataset":
            repo_id = f"datasets/{repo_id}"
        status = 409 if repo_id in self.branches else 200
        self.branches.setdefault(repo_id, {"main": {}})
        if status == 200 and (request.get("private") or request.get("visibility") == "private"):
            self.private.add(repo_id)
        return status, {}, json.dumps({"url": f"{constants.ENDPOINT}/{repo_id}"}).encode()

    def _api(
        self, repo_id: str, verb: str, revision: str, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        branches = self.branches.get(repo_id)
        if branches is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if verb == "branch":
            branches.setdefault(revision, dict(branches["main"]))
            return 200, {}, b"{}"
        files = self._files(branches, revision)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if verb == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": _mode(n), "shouldIgnore": False} for n in names]
            return 200, {}, json.dumps({"files": modes}).encode()
        if verb == "commit":
            self._commit(files, body)
            url = f"{constants.ENDPOINT}/{repo_id}/commit/{commit_of(files)}"
            return 200, {}, json.dumps({"commitUrl": url, "commitOid": commit_of(files)}).encode()
        if verb == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        about = {
            "id": repo_id.removeprefix("datasets/"),
            "private": repo_id in self.private,
            "sha": commit_of(files),
            "siblings": [{"rfilename": name} for name in files],
        }
        return 200, {}, json.dumps(about).encode()

    def _file(
        self, method: str, repo_id: str, revision: str, name: str
    ) -> tuple[int, dict[str, str], bytes]:
        files = self._files(self.branches.get(repo_id, {}), revision)
        if files is None or name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"ETag": f'"{digest(files[name])}"', "X-Repo-Commit": commit_of(files)}
        if method == "GET":
            self.downloads.append(name)
        return 200, headers, files[name]

    @staticmethod
    def _files(branches: dict[str, dict[str, bytes]], revision: str) -> dict[str, bytes] | None:
        commits = {commit_of(files): files for files in branches.values()}
        return branches.get(revision, commits.get(revision))

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            change = json.loads(line)
            if change["key"] == "file":
                files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
            elif change["key"] == "lfsFile":
                files[change["value"]["path"]] = self.large[change["value"]["oid"]]
            elif change["key"] == "deletedFile":
                del files[change["value"]["path"]]


def _mode(name: str) -> str:
    """How the Hub wants a file to be uploaded."""
    return "lfs" if name.endswith(".sacrag") else "regular"


def _uploads(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Where git-lfs uploads each object."""
    return [
        {**entry, "actions": {"upload": {"href": f"{constants.ENDPOINT}/lfs/{entry['oid']}"}}}
        for entry in batch["objects"]
    ]


def digest(data: bytes) -> str:
    """Of one file."""
    return hashlib.sha1(data).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    """Of all files."""
    return digest("".join(f"{name} {digest(data)}" for name, data in files.items()).encode())


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Directs huggingface_hub to a Hub on this machine."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if token := self.headers.get("Authorization"):
                hub.tokens.add(token)
            path = self.path.partition("?")[0]
            sent = self.rfile.read(length)
            status, headers, body = hub.answer(self.command, path, sent, token)
            if begin := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                status, body = 206, body[int(begin[1]) :]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET" and "/resolve/" in path and hub.cuts:
                body = body[: hub.cuts.pop(0)]
                hub.on_cut()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
