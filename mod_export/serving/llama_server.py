"""The patched llama-server on one file: what is checked before, its options, and its start.

    start = ServerStart("mod.gguf", name="mod", port=8000)
    check(start)                                    # UserError in one line
    execute(start, tools_folder(), ("-np", "4"))    # this process becomes llama-server

Nothing here speaks HTTP. Signals reach llama-server, and its exit code is the command's.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mod_export.common.system import usable_cpus
from mod_export.errors import UserError
from mod_export.formats import gguf_adapter
from mod_export.formats.gguf import GET_AGAIN, GGUFFile
from mod_export.formats.kv_types import KVTypes
from mod_export.formats.model_checks import check_model
from mod_export.llamacpp import build as llama_build
from mod_export.runtime import devices, rpc
from mod_export.runtime.log import check_context
from mod_export.runtime.opening import check_opens

SERVER = "llama-server"
PAGE = Path(__file__).resolve().parent.parent / "assets" / "page"
CHECKPOINT_STEP = 256  # tokens between two messages whose ends are kept; they are small
NO_VOCABULARY = (None, "no_vocab")


@dataclass(frozen=True)
class ServerStart:
    """What the server is started with.

    name: of the model in answers. allowed_hosts: names in the header Host that a server on a
    loopback address answers to, besides localhost and such addresses. ctx: tokens, 0 for what the
    model was trained for. threads: None for all that this process may use, and fewer while others
    need them. gpu_layers, rpc: as devices.chosen_layers takes them. mod: routers that are put
    beside the file, as gguf_adapter.locate takes them.
    """

    file: str
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    ctx: int = 4096
    threads: int | None = None
    gpu_layers: int | None = None
    rpc: str | None = None
    types: KVTypes | None = None
    threshold_shift: float = 0.0
    mod: str | None = None


def check(start: ServerStart) -> None:
    """Raise UserError for what would make llama-server end with many lines, or abort."""
    _check_address(start.host, start.port)
    file = GGUFFile.open(start.file)
    check_model(file)
    if file.get("tokenizer.ggml.model") in NO_VOCABULARY:
        raise UserError(f"{start.file} has no tokenizer", "serve a file that has one")
    check_opens(Path(start.file), GET_AGAIN, start.mod)
    elsewhere = devices.chosen_layers(start.gpu_layers, start.rpc)
    sizes = None if elsewhere else (start.types or KVTypes()).sizes
    check_context(start.file, start.ctx, start.mod is not None, sizes)
    if start.rpc:
        rpc.check(rpc.parse(start.rpc))


def _check_address(host: str, port: int) -> None:
    if host.endswith(".sock"):  # llama-server takes the path of a Unix socket
        return
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as exc:
        raise UserError(
            f"cannot listen on {host}, port {port}: {getattr(exc, 'strerror', None) or exc}",
            "choose another --port or --host",
        ) from exc


def tools_folder() -> Path:
    """The folder of llama-server; it is built where it is missing, which takes minutes.

    $LLAMA_CPP_LIB_PATH comes first where it has a llama-server. The tools are built for a GPU where
    the installed library is.
    """
    given = os.environ.get("LLAMA_CPP_LIB_PATH")
    if given and (Path(given) / SERVER).is_file():
        return Path(given)
    cuda = llama_build.installed_for_cuda()
    return llama_build.tools_dir(cuda) or llama_build.build(cuda=cuda, tools=True)


def command_line(start: ServerStart, tools: Path, more: tuple[str, ...]) -> list[str]:
    """The command. What the user adds comes last, so that it holds."""
    options = {
        "--model": start.file,
        "--alias": start.name,
        "--host": start.host,
        "--port": start.port,
        "--ctx-size": start.ctx,
        "--threads": start.threads or usable_cpus(),
        "--checkpoint-min-step": CHECKPOINT_STEP,
        # pages of other origins do not get to read answers
        "--cors-origins": "localhost",
    }
    if start.rpc:  # before the layers, which need devices
        options["--rpc"] = start.rpc
    if start.rpc or devices.gpus():  # without a device llama-server warns of the option
        layers = devices.chosen_layers(start.gpu_layers, start.rpc)
        options["--n-gpu-layers"] = "all" if layers < 0 else layers
    if start.types:
        options |= {"--cache-type-k": start.types.k, "--cache-type-v": start.types.v}
    if PAGE.is_dir():
        options["--path"] = PAGE
    words = [str(word) for pair in options.items() for word in pair]
    # the memory of a MoD model is one for all slots
    return [str(tools / SERVER), *words, "--kv-unified", *more]


def environment(start: ServerStart, tools: Path) -> dict[str, str]:
    """The variables that llama-server starts with; other users of the machine cannot see them."""
    env = os.environ | {"LLAMA_MOD_SHIFT": repr(start.threshold_shift)}
    folders = [str(tools), os.environ.get("LD_LIBRARY_PATH", "")]
    env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    if start.mod is not None:
        env["LLAMA_MOD_ADAPTER"] = str(gguf_adapter.locate(start.mod).absolute())
    if start.api_key:
        env["LLAMA_API_KEY"] = start.api_key
    if start.allowed_hosts:
        env["LLAMA_MOD_ALLOWED_HOSTS"] = ",".join(start.allowed_hosts)
    if start.threads is None:
        env["LLAMA_MOD_ADAPTIVE_THREADS"] = "1"
    return env


def execute(start: ServerStart, tools: Path, more: tuple[str, ...] = ()) -> NoReturn:
    """Let this process become llama-server."""
    words = command_line(start, tools, more)
    os.execve(words[0], words, environment(start, tools))
