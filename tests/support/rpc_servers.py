"""RPC servers on loopback, and a client, each in a process of its own.

    with running(2) as addresses:                       # ["127.0.0.1:40001", ...]
        found = client(addresses, {"kv": file}, tmp_path)

A client's process is its own because llama.cpp puts layers of all later models on its servers.
"""

from __future__ import annotations

import copy
import ctypes
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60


def start(*words) -> subprocess.Popen:
    """Run this module with arguments."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tests.support.rpc_servers", *map(str, words)]
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL
    )


@contextmanager
def running(count: int, program: Path | None = None) -> Iterator[list[str]]:
    """Serve the CPU of this machine, `count` times; the addresses.

    program: ggml-rpc-server; else this module does what it does
    """
    with ExitStack() as stack:
        addresses = []
        for _ in range(count):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            process = stack.enter_context(
                subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL)
                if program
                else start("serve", f"127.0.0.1:{port}")
            )
            stack.callback(process.kill)
            _wait_for(port, process)
            addresses.append(f"127.0.0.1:{port}")
        yield addresses


def _wait_for(port: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as link:
            if link.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not listen")


def client(addresses: list[str], files: dict[str, Path], folder: Path) -> dict[str, np.ndarray]:
    """What `decode` finds of each file, "kv True logits" and so on, and the devices of K/V.

    True is with flash attention. "kv logits": of MoDLlama and of its copy, [2, T, n_vocab].
    "devices": of the layers of all contexts, in turn.
    """
    words = [f"{name}={path}" for name, path in files.items()]
    with start("decode", ",".join(addresses), folder / "found.npz", *words) as process:
        assert process.wait(SECONDS) == 0
    return dict(np.load(folder / "found.npz"))


def decode(file, flash_attn: bool) -> dict[str, np.ndarray]:
    """Logits, decisions and cells of a prompt, of single tokens, and of a batch of three."""
    from tests.support.c_api import F16, F32, Raw
    from tests.support.oracle import TOKENS, cells

    tokens = TOKENS[0]
    with Raw(file, fa=flash_attn, kv=F16 if flash_attn else F32) as r:
        parts = [r.decode_cut(tokens[:60], 60), r.decode_cut(tokens[60:100], 1)]
        assert r.seq_rm(0, 90)
        parts.append(r.decode_cut(tokens[90:120], 3))
        logits, active = (np.concatenate(part) for part in zip(*parts, strict=True))
        return {
            "logits": logits,
            "active": active,
            "cells": np.array(cells(r)),
            "bytes": np.array([r.kv().bytes_used, r.kv().bytes_committed, r.kv().bytes_reserved]),
        }


def logits_of(llm) -> np.ndarray:
    """Logits of a MoDLlama for a prompt and single tokens."""
    from tests.support.oracle import TOKENS

    llm.eval(TOKENS[0][:60].tolist())
    for token in TOKENS[0][60:80].tolist():
        llm.eval([token])
    return llm.scores[:80].copy()


def _decode_all(addresses: str, output: str, *files: str) -> None:
    import llama_cpp

    from mod_export.runtime import MoDLlama, rpc
    from tests.support import c_api

    devices = []

    @llama_cpp.llama_log_callback
    def keep(_level, text, _data):
        devices.extend(re.findall(rb"llama_kv_cache: layer +\d+: dev = (\w+)", text))

    c_api._silent = keep
    rpc.connect(addresses)
    found = {}
    for word in files:
        name, _, path = word.partition("=")
        for flash_attn in (False, True):
            for key, value in decode(path, flash_attn).items():
                found[f"{name} {flash_attn} {key}"] = value
        llm = MoDLlama(path, n_ctx=128, logits_all=True, rpc=addresses)
        with closing(llm), closing(copy.copy(llm)) as other:
            found[f"{name} logits"] = np.stack([logits_of(llm), logits_of(other)])
    np.savez(output, devices=np.array(devices), **found)


def _serve(address: str) -> None:
    """Do what ggml-rpc-server does, with the library that the tests have."""
    from mod_export.runtime import devices, rpc

    _lib = rpc._lib
    backend = _lib.ggml_backend_reg_by_name(b"RPC")
    entry = _lib.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_start_server")
    size, text = ctypes.c_size_t, ctypes.c_char_p
    start_server = ctypes.CFUNCTYPE(None, text, text, size, size, ctypes.POINTER(ctypes.c_void_p))
    cpu = (ctypes.c_void_p * 1)(devices._lib.ggml_backend_dev_get(0))
    start_server(entry)(address.encode(), None, 1, 1, cpu)


if __name__ == "__main__":
    {"serve": _serve, "decode": _decode_all}[sys.argv[1]](*sys.argv[2:])
