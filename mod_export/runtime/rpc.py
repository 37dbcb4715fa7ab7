"""Servers of llama.cpp's RPC backend: processes, mostly on other machines, that hold layers.

    connect("192.168.1.2:50052,192.168.1.3:50052")
    llm = MoDLlama("mod.gguf", n_gpu_layers=-1)        # layers lie on both servers

llama.cpp ends the process where a server does not answer as it should, and waits for ever for one
that serves another client. So each server is greeted first.
"""

from __future__ import annotations

import ctypes
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mod_export.errors import UserError
from mod_export.runtime import bindings  # first: it says what to do where llama_cpp is missing

MAX_SERVERS = 16  # GGML_RPC_MAX_SERVERS of ggml-rpc.h, as are the numbers of the protocol
PROTOCOL = (7, 0)
# RPC_CMD_HELLO of ggml-rpc.cpp, and RPC_CONN_CAPS_SIZE of transport.h: no capabilities is plain TCP
HELLO, CAPABILITIES = 14, 24
WAIT_SECONDS = 3.0
REFUSAL_SECONDS = 0.3  # in which a machine says that a server has ended
START = "start `ggml-rpc-server -H ADDRESS -p PORT` there, of the folder `mod-export tools` prints"


@dataclass(frozen=True)
class Server:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse(text: str | Sequence[str]) -> list[Server]:
    """Read HOST:PORT, several with commas or as a list. Raises UserError for anything else."""
    words = text.split(",") if isinstance(text, str) else list(text)
    servers = []
    for word in words:
        found = re.fullmatch(r"\s*([^:\s]+):(\d{1,5})\s*", str(word))
        if not found or not 0 < int(found[2]) < 1 << 16:
            raise UserError(
                f"{word!r} is no address of an RPC server", "write HOST:PORT, several with commas"
            )
        servers.append(Server(found[1], int(found[2])))
    servers = list(dict.fromkeys(servers))
    if len(servers) > MAX_SERVERS:
        raise UserError(
            f"{len(servers)} RPC servers are too many", f"give at most {MAX_SERVERS} of them"
        )
    return servers


def check(servers: Sequence[Server]) -> None:
    """Greet each server. Raises UserError for one that is missing, busy or of another version."""
    for server in servers:
        version = _greet(server)
        if version is None:
            continue
        if version[0] != PROTOCOL[0] or version[1] > PROTOCOL[1]:
            raise UserError(
                f"the RPC server at {server} has version {version[0]}.{version[1]} of the "
                f"protocol, and this llama.cpp has {PROTOCOL[0]}.{PROTOCOL[1]}",
                "build both from the same version with `mod-export build --tools`",
            )


def connect(text: str | Sequence[str]) -> None:
    """Let llama.cpp put layers on the servers: on all of them, for each model opened from now on.

    text: as `parse` takes it. Raises UserError as `parse` and `check` do, and for a llama.cpp that
    was built without the RPC backend.
    """
    servers = parse(text)
    check(servers)
    backend = _lib.ggml_backend_reg_by_name(b"RPC")
    if not backend:
        raise UserError("this llama.cpp has no RPC backend", bindings.patched_cure())
    add = _ADD_SERVER(
        _lib.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    )
    for server in servers:
        if server in _connected:
            continue
        registered = add(str(server).encode())
        if not registered:
            raise UserError(f"the RPC server at {server} has no devices", START)
        _lib.ggml_backend_register(registered)
        _connected.add(server)


def _greet(server: Server) -> tuple[int, int] | None:
    """Return the version of the protocol that a server speaks.

    None for one that this process may use already: it answers nobody else meanwhile.
    """
    size = 0
    wait = REFUSAL_SECONDS if server in _connected else WAIT_SECONDS
    try:
        with socket.create_connection((server.host, server.port), wait) as link:
            if server in _connected:
                return None
            link.sendall(struct.pack(f"<BQ{CAPABILITIES}x", HELLO, CAPABILITIES))
            size, major, minor = struct.unpack("<QBB", _receive(link, 8 + 4 + CAPABILITIES)[:10])
    except TimeoutError:
        if server in _connected:
            return None
        raise UserError(
            f"no RPC server answers at {server}: it is out of reach, or has another client",
            "a server has one client at a time: end the other one, or start another server",
        ) from None
    except (ConnectionResetError, BrokenPipeError, EOFError):
        pass
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or str(exc)
        raise UserError(f"no RPC server answers at {server}: {why}", START) from exc
    if size != 4 + CAPABILITIES:
        raise UserError(f"what answers at {server} is no RPC server of llama.cpp", START)
    return major, minor


def _receive(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise EOFError("it closes the connection")
        data += part
    return data


# libggml comes with libllama, so its symbols are found through it
_lib = bindings._llama._lib
_ADD_SERVER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)
_connected: set[Server] = set()
for _name, _argtypes, _restype in (
    ("reg_by_name", [ctypes.c_char_p], ctypes.c_void_p),
    ("reg_get_proc_address", [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p),
    ("register", [ctypes.c_void_p], None),
):
    _function = getattr(_lib, f"ggml_backend_{_name}")
    _function.argtypes, _function.restype = _argtypes, _restype
