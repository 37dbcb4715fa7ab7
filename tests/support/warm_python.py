"""A process that has imported what is slow to import, and forks for each script that it runs.

llama.cpp's converter takes seconds to import torch and transformers, and less than one to convert a
tiny model.

    python = WarmPython()
    python.run(code, ["model/", "--outfile", "model.gguf"], cwd=source)  # as python -c code ...
    python.close()
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Reads requests, and answers each with an exit code.
SERVER = """
import json, os, sys, traceback
import sentencepiece, torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

def run(request):
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for target, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), target)
    sys.argv = ["-c", *request["arguments"]]
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    child = os.fork()
    if not child:
        code = run(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class WarmPython:
    """The process; it starts with the first script."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def run(
        self, code: str, arguments: list[str], cwd: Path | None = None
    ) -> subprocess.CompletedProcess:
        """Run a script, and return what it says and its exit code."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {"code": code, "arguments": arguments, "cwd": str(cwd or os.getcwd())}
            request |= {"env": dict(os.environ), "out": str(out), "err": str(err)}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code_of_exit = int(self._process.stdout.readline())
            said = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
            return subprocess.CompletedProcess(arguments, code_of_exit, *said)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
