"""Layers on two RPC servers, which are processes on loopback: the same as in one process."""

import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.runtime import MoDLlama, rpc
from tests.support import rpc_servers
from tests.support.oracle import make

FILES = ("all", "heads with windows", "sliding+block")
needs_rpc = pytest.mark.skipif(
    not rpc._lib.ggml_backend_reg_by_name(b"RPC"),
    reason="needs a llama.cpp with the RPC backend: run `mod-export build`",
)


@needs_rpc
def test_two_servers_give_the_same_as_one_process(tmp_path):
    """To the bit: both are CPUs of this machine. Each side has the K/V of its layers, as used."""
    files = {name: make(name).write(tmp_path / f"{name}.gguf") for name in FILES}
    with rpc_servers.running(2) as addresses:
        found = rpc_servers.client(addresses, files, tmp_path)
        refused = pytest.raises(UserError, match="or has another client")
        with socket.create_connection(addresses[0].split(":")), refused:
            rpc.check(rpc.parse(addresses))
    assert set(found["devices"]) == {b"RPC0", b"RPC1"}
    for name, path in files.items():
        for flash_attn in (False, True):
            here = rpc_servers.decode(path, flash_attn)
            for key in ("logits", "active", "cells"):
                there = found[f"{name} {flash_attn} {key}"]
                np.testing.assert_array_equal(there, here[key], f"{name} {flash_attn} {key}")
            assert 0.1 < here["active"].mean() < 0.9
            used, committed, _ = found[f"{name} {flash_attn} bytes"]
            assert used == here["bytes"][0]
            steps = 2 if flash_attn else 1  # one process reserves all 512 cells with it
            assert steps * committed == here["bytes"][2]
        here = rpc_servers.logits_of(MoDLlama(path, n_ctx=128, logits_all=True))
        np.testing.assert_array_equal(found[f"{name} logits"], [here, here])


@pytest.mark.parametrize("text", ["", "host", "host:", "host:0", "host:70000", "::1:50052", "a:1,"])
def test_addresses(text):
    with pytest.raises(UserError, match="is no address of an RPC server"):
        rpc.parse(text)
    assert [str(server) for server in rpc.parse("a:1, b:2,a:1")] == ["a:1", "b:2"]
    with pytest.raises(UserError, match="17 RPC servers are too many"):
        rpc.parse([f"a:{port}" for port in range(1, 18)])


@contextmanager
def answering(answer: bytes | None):
    """Listen, and answer whoever connects; None keeps silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            link, _ = server.accept()
            with link:
                if answer is None:
                    link.recv(1 << 10, socket.MSG_WAITALL)
                else:
                    link.recv(1 << 10)
                    link.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        host, port = server.getsockname()
        yield f"{host}:{port}"
        thread.join(10)


@pytest.mark.parametrize(
    "answer, told",
    [
        (None, "or has another client"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(20), "is no RPC server of llama.cpp"),
        (b"", "is no RPC server of llama.cpp"),
        ((28).to_bytes(8, "little") + b"\x06\0\0\0" + bytes(24), "has version 6.0 of the protocol"),
    ],
)
def test_what_is_no_server_is_refused(answer, told, monkeypatch):
    """llama.cpp would end the process, or wait for ever for a server that is busy."""
    monkeypatch.setattr(rpc, "WAIT_SECONDS", 0.3)
    with answering(answer) as address, pytest.raises(UserError, match=told):
        rpc.connect(address)
    with pytest.raises(UserError, match=f"no RPC server answers at {address}: Connection refused"):
        rpc.connect(address)
