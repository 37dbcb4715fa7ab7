"""Count what a model on RPC servers sends for each token: round trips, commands, bytes.

    python -m scripts.studies.rpc_traffic dense.gguf mod.gguf --prompt 512 --tokens 64

The servers are processes of this machine, and between the model and each of them counts a relay. A
round trip is a command that the server answers: a network adds its latency to each of them. Times
are on loopback; --direct gives those without the relay. Tokens are random, so the activation is not
that of a text.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import numpy as np

from mod_export.cli.output import run_script
from mod_export.common.tables import format_table
from mod_export.errors import UserError
from mod_export.llamacpp import build as llama_build
from mod_export.runtime.llama import MoDLlama

SERVER = "ggml-rpc-server"
PIECE_BYTES = 1 << 16
# enum rpc_cmd of ggml-rpc.cpp
COMMANDS = {6: "set", 8: "get", 10: "graph", 16: "graph again"}


class Relay:
    """Passes on what a client and a server say, and counts it.

    counts: "up" and "down" in bytes, "round trips", and each command by name
    """

    def __init__(self, port: int):
        self.counts: Counter = Counter()
        self.server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self.server_port))
            for link in (client, server):
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for pair in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._run, args=pair, daemon=True).start()

    def _run(self, *pair) -> None:
        with contextlib.suppress(OSError):  # one of both has ended
            self._pass_on(*pair)

    def _pass_on(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        header = "<BQ" if up else "<Q"  # a command and its size, or the size of an answer
        waiting, left = b"", 0
        while piece := source.recv(PIECE_BYTES):
            target.sendall(piece)
            self.counts["up" if up else "down"] += len(piece)
            while piece:
                if left:
                    taken = min(left, len(piece))
                    left, piece = left - taken, piece[taken:]
                    continue
                need = struct.calcsize(header) - len(waiting)
                waiting, piece = waiting + piece[:need], piece[need:]
                if len(waiting) == struct.calcsize(header):
                    *command, left = struct.unpack(header, waiting)
                    name = COMMANDS.get(command[0], "others") if up else "round trips"
                    self.counts[name] += 1
                    waiting = b""
        target.shutdown(socket.SHUT_WR)


@contextmanager
def servers(count: int) -> Iterator[list[Relay]]:
    """Run RPC servers, each behind a relay."""
    given = os.environ.get("LLAMA_CPP_LIB_PATH")
    folder = Path(given) if given else llama_build.tools_dir()
    if folder is None or not (folder / SERVER).is_file():
        raise UserError(f"there is no {SERVER}", "run `mod-export build --tools`")
    with ExitStack() as stack:
        relays = []
        for _ in range(count):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            command = [str(folder / SERVER), "-p", str(port), "-t", "1"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = stack.enter_context(subprocess.Popen(command, **quiet))
            stack.callback(process.kill)
            while socket.socket().connect_ex(("127.0.0.1", port)) and process.poll() is None:
                time.sleep(0.05)
            relays.append(Relay(port))
        yield relays


def address(relay: Relay, direct: bool) -> str:
    """Return where a model finds a server: behind its relay, or without one."""
    return f"127.0.0.1:{relay.server_port}" if direct else relay.address


def measure(file: str, relays: list[Relay], prompt: int, tokens: int, direct: bool) -> list[dict]:
    """Return a row for prefill and one for decode: counts for each token, and milliseconds."""
    addresses = [address(relay, direct) for relay in relays]
    llm = MoDLlama(file, n_ctx=prompt + tokens, n_batch=512, threads=1, rpc=addresses)
    drawn = np.random.default_rng(0).integers(100, llm.n_vocab(), prompt + tokens).tolist()
    warm = 8  # tokens that are not counted: the first ones build graphs
    phases = {
        "prefill": [drawn[: prompt - warm]],
        "warm-up": [[token] for token in drawn[prompt - warm : prompt]],
        "decode": [[token] for token in drawn[prompt:]],
    }
    rows = []
    for phase, parts in phases.items():
        before, start = sum((relay.counts for relay in relays), Counter()), time.perf_counter()
        for part in parts:
            llm.eval(part)
        ms = 1e3 * (time.perf_counter() - start)
        counts = sum((relay.counts for relay in relays), Counter())
        counts.subtract(before)
        n = sum(map(len, parts))
        each = {name: counts[name] / n for name in ("round trips", *COMMANDS.values(), "others")}
        sizes = {f"KB {way}": counts[way] / n / 1e3 for way in ("up", "down")}
        about = {"file": Path(file).name, "phase": phase, "tokens": n}
        rows.append(about | each | sizes | {"ms": ms / n, "activation": llm.activation()})
    llm.close()
    return [row for row in rows if row["phase"] != "warm-up"]


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--servers", "count", default=2, show_default=True)
@click.option("--prompt", default=512, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--direct", is_flag=True, help="Leave the relays out, and count nothing.")
@click.option("--json", "output", type=click.Path(path_type=Path))
def main(files, count, prompt, tokens, direct, output):
    """Count what models on RPC servers send for each token."""
    with servers(count) as relays:
        rows = [row for file in files for row in measure(file, relays, prompt, tokens, direct)]
    if output:
        output.write_text(json.dumps(rows, indent=1))
    keys = [key for key in rows[0] if key not in ("tokens", "others")]
    cells = [[f"{r[k]:.3g}" if isinstance(r[k], float) else r[k] for k in keys] for r in rows]
    click.echo(format_table(keys, cells))


if __name__ == "__main__":
    run_script(lambda: main(standalone_mode=False))
