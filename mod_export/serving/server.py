"""An HTTP server with OpenAI's API for one model: completions.py behind the standard library's.

    serve(MoDLlama("mod.gguf"), "mod", listen("127.0.0.1", 8000))

Not llama-cpp-python's server: there a token that does not exist, or a grammar that is none, ends
the process, an abandoned answer is written to its end, and errors of a stream are lost. One answer
is written at a time, requests wait in turn. What a request has in common with the beginning of the
one before is not read again.
"""

import hmac
import json
import logging
import math
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from mod_export import __version__
from mod_export.errors import UserError
from mod_export.runtime.llama import MoDLlama, StoppedError
from mod_export.serving import completions

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 8 << 20
READ_TIMEOUT_SECONDS = 30  # A client may leave the answer unread this long, while others wait.
CLIENT_GONE_EVENTS = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
STOPPED_MESSAGE = "the server is being stopped"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises UserError where the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as exc:
        raise UserError(
            f"cannot listen on {host}, port {port}: {getattr(exc, 'strerror', None) or exc}",
            "choose another --port or --host",
        ) from exc


def serve(
    llm: MoDLlama,
    name: str,
    sock: socket.socket,
    api_key: str | None = None,
) -> None:
    """Serve until Ctrl-C or SystemExit.

    Either ends an answer that is being written after the token in work.

    name: what answers call the model; api_key: what clients have to send, if any. Each
    request is logged.
    """
    server = Server(llm, name, sock, api_key)
    try:
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    finally:
        server.closing = True
        llm.stop = True
        if server.turn.acquire(timeout=30):  # the answer in work has told its client
            server.turn.release()
        server.server_close()


def figures(llm: MoDLlama) -> dict:
    """What `GET /mod` answers.

    activation: share of (token, unit) pairs that ran since the start, of each kind too, null before
    any token; shift of the thresholds in logit space; tokens in the context, and bytes of KV: that
    they use, that memory stands behind, and that they would use unrouted; and the number of tokens
    up to which nothing is saved.
    """
    kinds = {
        kind: active / seen if seen else None
        for kind, (seen, active) in llm.stats_by_kind().items()
    }
    share, kv = llm.activation(), llm.kv()
    return {
        "activation": None if math.isnan(share) else share,
        "activation_of": kinds,
        "threshold_shift": llm.shift,
        "tokens": llm.n_tokens,
        "kv": {
            "used": kv.used,
            "committed": kv.committed,
            "dense": kv.dense,
            "saving_begins_after": llm.kv_kept,
        },
    }


class Server(ThreadingHTTPServer):
    """The HTTP server of one model; one request at a time has the model."""

    daemon_threads = True

    def __init__(self, llm: MoDLlama, name: str, sock: socket.socket, api_key: str | None):
        super().__init__(sock.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.llm, self.name, self.api_key = sock, llm, name, api_key
        self.turn, self.closing = threading.Lock(), False
        self.local = sock.getsockname()[0] in LOCAL_HOSTS

    def handle_error(self, request, address):
        """Clients that go away in the middle are no error."""


class RefusedError(Exception):
    """An answer other than 200: status and message."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = f"mod-export/{__version__}"
    timeout = 600  # seconds without a byte

    def do_GET(self):
        self._answer(
            {
                "/v1/models": self._models,
                "/mod": self._mod,
                "/health": lambda: self._send({"status": "ok"}),
            }
        )

    def do_POST(self):
        self._answer(
            {
                "/v1/chat/completions": lambda: self._complete(chat=True),
                "/v1/completions": lambda: self._complete(chat=False),
            }
        )

    def log_message(self, form, *args):
        line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in form % args)
        with suppress(OSError):  # nobody reads it any more
            logger.info(f"{self.client_address[0]} {line}")

    def _answer(self, routes: dict[str, Callable]) -> None:
        try:
            self._route(routes)()
        except RefusedError as exc:
            self._send(error(*exc.args), exc.args[0])
        except OSError:  # the client is gone, or does not read
            self.close_connection = True
        except StoppedError:  # while it waited for its turn
            self._send(error(503, STOPPED_MESSAGE), 503)
        except UserError as exc:
            self._send(error(400, exc), 400)
        except Exception as exc:  # a mistake of ours: the next request may be fine
            self.log_message("failed: %s: %s", type(exc).__name__, exc)
            self.close_connection = True
            if not self.streaming:
                self._send(error(500, "the server failed, and its log says why"), 500)

    def _route(self, routes: dict[str, Callable]) -> Callable:
        """What answers the request, whose body has been read."""
        self.streaming = False
        try:
            self._admit()
            self.body = self._read()
            path = urlsplit(self.path).path
        except ValueError as exc:  # urlsplit raises this error.
            self.close_connection = True
            raise RefusedError(400, f"the request cannot be read: {exc}") from exc
        if path not in routes:
            raise RefusedError(404, f"{self.command} {path} is not served")
        return routes[path]

    def _admit(self) -> None:
        """Refuse clients without the key, and web pages.

        A browser lets web pages send requests to anyone. The body of a refused request is not read.
        """
        host = self.headers.get("Host", "")
        keep, self.close_connection = self.close_connection, True
        if self.server.local and urlsplit(f"//{host}").hostname not in LOCAL_HOSTS:
            raise RefusedError(
                403, f"the server answers to {', '.join(LOCAL_HOSTS)}, not to {host!r}"
            )
        if (origin := self.headers.get("Origin")) and urlsplit(origin).netloc != host:
            raise RefusedError(403, f"pages of {origin} may not send requests")
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.api_key and not hmac.compare_digest(
            key.encode(), self.server.api_key.encode()
        ):
            raise RefusedError(401, "the API key is missing or wrong")
        self.close_connection = keep

    def _read(self) -> bytes:
        size = self.headers.get("Content-Length", "0")
        if (
            not size.isdecimal()
            or len(size) > 9
            or int(size) > MAX_REQUEST_BYTES
            or self.headers.get("Transfer-Encoding")
        ):
            self.close_connection = True  # what follows is not read
            raise RefusedError(
                413, f"a request has a Content-Length of at most {MAX_REQUEST_BYTES} bytes"
            )
        return self.rfile.read(int(size))

    def _send(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _models(self) -> None:
        self._send(
            {
                "object": "list",
                "data": [
                    {
                        "id": self.server.name,
                        "object": "model",
                        "created": 0,
                        "owned_by": "mod-export",
                    }
                ],
            }
        )

    def _mod(self) -> None:
        with self._turn():
            self._send(figures(self.server.llm))

    def _complete(self, chat: bool) -> None:
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError) as exc:
            raise RefusedError(400, f"the body is no JSON: {exc}") from exc
        if not isinstance(body, dict):
            raise RefusedError(400, "the body is no JSON object")
        with self._turn():
            ask = completions.parse(body, self.server.llm, chat)
            answer, bodies = (
                completions.Answer(self.server.llm, ask),
                completions.Bodies(self.server.name, chat),
            )
            if ask.stream:
                self._stream(ask, answer, bodies)
                return
            try:
                self._send(bodies.whole("".join(answer), answer))
            except StoppedError:
                if self.server.closing:  # else the client is gone
                    self._send(error(503, STOPPED_MESSAGE), 503)

    def _stream(self, ask, answer, bodies) -> None:
        """Server-sent events; an error comes as one too, as the status has been sent."""
        self.streaming = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self._event(bodies.chunk())
            for text in answer:
                self._event(bodies.chunk(text))
            self._event(bodies.chunk(reason=answer.reason))
            if ask.usage:
                self._event(bodies.counts(answer))
        except (UserError, StoppedError) as exc:
            self._event(
                error(503, STOPPED_MESSAGE) if isinstance(exc, StoppedError) else error(400, exc)
            )
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, body: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside, the model is this request's; it stops where the client goes away."""
        llm, (done, end) = self.server.llm, os.pipe()

        def watch():
            poll = select.poll()
            poll.register(done, select.POLLIN)
            poll.register(self.connection, CLIENT_GONE_EVENTS)
            if not any(fd == done for fd, _ in poll.poll()):
                llm.stop = True

        try:
            with self.server.turn:
                llm.stop = False  # The look at closing follows, which sets it again.
                if self.server.closing:
                    raise StoppedError
                watcher = threading.Thread(target=watch, daemon=True)
                watcher.start()
                self.connection.settimeout(READ_TIMEOUT_SECONDS)
                try:
                    yield
                finally:
                    os.write(end, b"x")
                    watcher.join()
                    self.connection.settimeout(self.timeout)
        finally:
            os.close(done)
            os.close(end)


def error(status: int, what: Exception | str) -> dict:
    """The body of an answer that says what is wrong."""
    code = "context_length_exceeded" if isinstance(what, completions.TooLongError) else None
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": str(what), "type": kind, "param": None, "code": code}}
