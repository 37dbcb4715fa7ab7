"""A llama-server in a process of its own, and requests to it. `mod-export serve` starts it.

with started(file, "--ctx", "1024", more=("-np", "4")) as server:
    answer = server.post("/completion", {"prompt": "Once", "n_predict": 8})
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # until a request is given up


class Refused(Exception):
    """An answer of 400 or more; `status`, and the server's words as text."""

    def __init__(self, status: int, body):
        super().__init__(f"{status}: {body}")
        self.status, self.body = status, body


class LlamaServer:
    """The process, its address and its log.

    more: options of llama-server itself. tools: the folder of another llama-server, which is
    started as it is; then `options` have the names that both know.
    """

    def __init__(
        self, file, *options, more=(), key: str | None = None, tools: Path | None = None, **env
    ):
        self.key, self.log = key, []
        more = list(map(str, more))
        if tools:
            command, env["LD_LIBRARY_PATH"] = [str(tools / "llama-server"), "-m"], str(tools)
        else:
            command, more = [sys.executable, "-m", "mod_export", "serve"], ["--", *more]
        command += [str(file), "--port", "0", "--threads", "1", *map(str, options), *more]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": path} | env | ({"MOD_EXPORT_API_KEY": key} if key else {})
        self.process = subprocess.Popen(
            command, env=env, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.address = self._address()
        threading.Thread(target=self._read, daemon=True).start()

    def _address(self) -> tuple[str, int]:
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listening on http://([\d.]+):(\d+)", line):
                return found[1], int(found[2])
        raise AssertionError("".join(self.log))

    def _read(self) -> None:
        self.log.extend(self.process.stderr)

    @property
    def text(self) -> str:
        """What the process has said so far."""
        return "".join(self.log)

    def open(
        self, path: str, body=None, key: str | None = None, host: str | None = None
    ) -> http.client.HTTPConnection:
        """Send a request, with another header Host where one is given; its answer is not read."""
        connection = http.client.HTTPConnection(*self.address, timeout=SECONDS)
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= {"Host": host} if host else {}
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, headers)
        return connection

    def get(self, path: str, body=None, key: str | None = None):
        """The answer's JSON, or its text. Raises Refused."""
        answer = self.open(path, body, key).getresponse()
        text = answer.read().decode()
        parsed = json.loads(text) if "json" in answer.headers["Content-Type"] else text
        if answer.status >= 400:
            raise Refused(answer.status, parsed)
        return parsed

    post = get

    def stream(self, path: str, body: dict) -> Iterator[dict]:
        """The events of a streamed answer."""
        answer = self.open(path, body | {"stream": True}).getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                yield json.loads(line.removeprefix(b"data: "))

    def client(self) -> openai.OpenAI:
        """OpenAI's client of this server."""
        host, port = self.address
        return openai.OpenAI(
            base_url=f"http://{host}:{port}/v1",
            api_key=self.key or "none",
            timeout=SECONDS,
            max_retries=0,
        )

    def end(self, how: int = signal.SIGINT) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def started(file, *options, **more) -> Iterator[LlamaServer]:
    """A server for the time of a block. It must not have ended by itself before."""
    server = LlamaServer(file, *options, **more)
    try:
        yield server
        assert server.process.returncode is not None or server.process.poll() is None, server.text
    finally:
        server.process.kill()
        server.process.wait()
