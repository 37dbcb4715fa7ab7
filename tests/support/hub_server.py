"""A server that speaks as much of the Hugging Face hub's API as huggingface_hub asks for.

    with HubServer({"org/name": folder}) as hub:
        command_line.spawn("convert", "org/name", "-o", "mod", **hub.environment(tmp_path / "home"))
        hub.use(monkeypatch, tmp_path / "home")     # for this process

A repository is a folder. It has one revision, `main`, and the commit that it stands for. Answers to
what is private, gated or absent are those of huggingface.co: the status and X-Error-Code.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_of_the_test"
INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/(.+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def commit(repo: str) -> str:
    """Return the commit that `main` of a repository stands for."""
    return hashlib.sha1(repo.encode()).hexdigest()


class HubServer(http.server.ThreadingHTTPServer):
    """The server; `requests` lists (method, path) of what it was asked.

    private: repositories that only TOKEN may see. gated: all may list these, and none may read
    them.
    """

    daemon_threads = True

    def __init__(
        self,
        repositories: Mapping[str, Path],
        private: Collection[str] = (),
        gated: Collection[str] = (),
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.private, self.gated = dict(repositories), private, gated
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """The variables with which huggingface_hub uses this server, and a cache of its own."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
        }

    def use(
        self,
        monkeypatch,
        home: Path,
        token: str = "",
        offline: bool = False,
        port: int | None = None,
    ) -> None:
        """Let huggingface_hub in this process use this server, until `monkeypatch` is undone.

        The library reads its variables when it is imported, which may be long ago. port: another
        one than that of this server.
        """
        from huggingface_hub import constants

        for name, value in self.environment(home, token).items():
            monkeypatch.setenv(name, value)
        address = f"http://127.0.0.1:{port or self.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append((self.command, path))
        for pattern, answer in ((TREE, self._tree), (FILE, self._file), (INFO, self._info)):
            if found := pattern.fullmatch(path):
                repo, revision, *rest = found.groups()
                if self._allowed(repo, revision or "main"):
                    answer(repo, *rest)
                return
        self._refuse(404, "", "Not Found")

    def do_HEAD(self):
        self.do_GET()

    def _allowed(self, repo: str, revision: str) -> bool:
        known = repo in self.server.repositories
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not known or (repo in self.server.private and not signed_in):
            # huggingface.co does not tell what is absent from what is private
            self._refuse(404 if signed_in else 401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", commit(repo)):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _info(self, repo: str) -> None:
        names = [{"rfilename": entry["path"]} for entry in self._entries(repo)]
        self._json({"id": repo, "sha": commit(repo), "siblings": names})

    def _tree(self, repo: str) -> None:
        self._json(self._entries(repo))

    def _entries(self, repo: str) -> list[dict]:
        folder = self.server.repositories[repo]
        return [
            {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]

    def _file(self, repo: str, name: str) -> None:
        path = self.server.repositories[repo] / name
        if repo in self.server.gated:
            self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted")
        elif not path.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            data = path.read_bytes()
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self._reply(200, data, {"ETag": etag, "X-Repo-Commit": commit(repo)})

    def _json(self, value: object) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._reply(status, b"", headers)

    def _reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        """Stay silent."""
