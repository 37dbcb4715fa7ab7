"""An HTTP server with OpenAI's API: `serve_app.make_app` on uvicorn.

    run(MoDLlama("mod.gguf"), "mod", port=8000)

Requests are answered one after another: there is one context. What a request has in common with the beginning of the
one before is not read again.
"""

import socket
from collections.abc import Callable
from contextlib import suppress

from mod_export.errors import UserError
from mod_export.runtime import MoDLlama


def run(llm: MoDLlama, name: str, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None,
        say: Callable[[str], None] = print) -> None:
    """Serves until Ctrl-C or SIGTERM, which end an answer that is being written after the token in work.

    Raises UserError where the packages of a server are not installed, or the address cannot be had.
    """
    try:
        import uvicorn

        from mod_export.serve_app import make_app
    except ModuleNotFoundError as exc:
        old = exc.name.startswith("llama_cpp")  # a library that an earlier version built, without the server
        cure = "mod-export build --force" if old else "pip install 'mod_export[serve]'"
        raise UserError(f"a server needs the Python module {exc.name}", f"run `{cure}`") from exc

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            llm.stop = True
            super().handle_exit(sig, frame)

    with listen(host, port) as sock:
        app = make_app(llm, name, api_key)
        where = f"[{host}]" if ":" in host else host
        say(f"{name} at http://{where}:{sock.getsockname()[1]}/v1 (OpenAI's API; /docs lists it); Ctrl-C ends it")
        if "tokenizer.chat_template" not in llm.metadata:
            say("the model has no chat template: use /v1/completions; chats would be written as Llama 2 writes them")
        server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
        with suppress(KeyboardInterrupt):  # uvicorn raises it again when all is closed
            server.run(sockets=[sock])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as exc:
        raise UserError(f"cannot listen on {host}, port {port}: {exc.strerror or exc}",
                        "choose another --port or --host") from exc
