"""llama-server in a process of its own, started by `mod-export serve`, and asked by studies."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
from pathlib import Path


class ServerProcess:
    """A server on one file.

    context: tokens of all slots together. more: options of llama-server. LLAMA_CPP_LIB_PATH names
    the folder of another llama-server, such as one with a sanitizer.
    """

    def __init__(self, file: Path, context: int, *more: str):
        command = [sys.executable, "-m", "mod_export", "serve", str(file), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--ctx", str(context), "--", *more],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for line in self.process.stderr:
            if found := re.search(r"listening on http://([\d.]+):(\d+)", line):
                self.address = found[1], int(found[2])
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def request(self, path: str, body: dict | None) -> http.client.HTTPResponse:
        """Send a request; its answer is not read."""
        connection = http.client.HTTPConnection(*self.address, timeout=600)
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data)
        return connection.getresponse()

    def ask(self, path: str, body: dict | None = None) -> tuple[int, dict]:
        """Status and JSON of an answer."""
        answer = self.request(path, body)
        return answer.status, json.loads(answer.read())

    def resident(self) -> int:
        """Bytes of memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10

    def end(self) -> int:
        """End it; return its exit code."""
        self.process.terminate()
        return self.process.wait(120)
