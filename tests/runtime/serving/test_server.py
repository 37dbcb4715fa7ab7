"""`mod-export serve` as clients see it: chats whole and streamed, refusals, a key, clients that
leave, and its end.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from mod_export.runtime import bindings
from mod_export.runtime.llama import MoDLlama
from mod_export.runtime.sampling import Sampling
from mod_export.serving.chat import Chat
from mod_export.serving.completions import cut

ASK = "Name a colour."
CHAT = {"messages": [{"role": "user", "content": ASK}], "max_tokens": 8, "temperature": 0}
LONG = [{"role": "user", "content": "word " * 600}]
ENDLESS = CHAT | {
    "max_tokens": 3000,
    "logit_bias": {"2": -100, "0": -100},
}  # no token that ends an answer


class Client:
    """A server in a process of its own, and requests to it."""

    def __init__(self, model, *options, **env):
        command = [
            sys.executable,
            "-m",
            "mod_export",
            "serve",
            str(model),
            "--port",
            "0",
            "--ctx",
            "512",
        ]
        self.process = subprocess.Popen(
            [*command, "--threads", "1", *options],
            env=os.environ | env,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.address = re.search(r"http://([\d.]+):(\d+)", self.process.stderr.readline()).groups()

    def open(self, path: str, body=None, key: str = "", **headers) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, headers)
        return connection

    def __call__(self, path: str, body=None, **options) -> tuple[int, dict]:
        answer = self.open(path, body, **options).getresponse()
        return answer.status, json.loads(answer.read())

    def chat(self, **changes) -> str:
        status, answer = self("/v1/chat/completions", CHAT | changes)
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]

    def stream(self, path: str, body: dict) -> list[dict]:
        answer = self.open(path, body | {"stream": True}).getresponse()
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
        events = answer.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def end(self, how=signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(how)
        log = self.process.communicate(timeout=60)[1]
        return self.process.returncode, log


@contextmanager
def served(model, *options, **env):
    client = Client(model, *options, **env)
    try:
        yield client
    finally:
        client.process.kill()
        client.process.wait()


@pytest.fixture(scope="module")
def client(model):
    with served(model, "--name", "small") as client:
        yield client


def content(chunks: list[dict]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_a_chat_is_what_the_terminal_says(client, model):
    llm = MoDLlama(model, n_ctx=512, threads=1, n_batch=256)
    chat = Chat(llm, "", Sampling(temperature=0), max_tokens=8, notice=lambda line: None)
    own = "".join(chat.ask(ASK))
    status, answer = client("/v1/chat/completions", CHAT)
    assert (
        status == 200
        and answer["choices"][0]["message"] == {"role": "assistant", "content": own}
        and own
    )
    assert answer["choices"][0]["finish_reason"] == "length" and answer["model"] == "small"
    assert answer["usage"] == {
        "prompt_tokens": chat.turn.prompt_tokens,
        "completion_tokens": 8,
        "total_tokens": chat.turn.prompt_tokens + 8,
    }
    assert (
        client.chat(messages=[{"role": "user", "content": [{"type": "text", "text": ASK}]}]) == own
    )
    assert client.chat(max_tokens=None, max_completion_tokens=8) == own


def test_a_stream_is_the_same_in_pieces(client):
    chunks = client.stream(
        "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}}
    )
    assert content(chunks[:-1]) == client.chat() and len(chunks) > 5
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 2
    ) + ["length"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8
    whole = client("/v1/completions", {"prompt": "Once upon", "max_tokens": 5, "temperature": 0})[
        1
    ]["choices"][0]
    parts = client.stream(
        "/v1/completions", {"prompt": ["Once upon"], "max_tokens": 5, "temperature": 0}
    )
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["text"]


def test_options_do_what_they_say(client):
    whole = client.chat(max_tokens=20)
    word = whole.split()[2]
    status, cut_short = client(
        "/v1/chat/completions", CHAT | {"max_tokens": 20, "stop": ["nowhere", word]}
    )
    assert cut_short["choices"][0]["message"]["content"] == whole.partition(word)[0]
    assert cut_short["choices"][0]["finish_reason"] == "stop"
    hot = {"temperature": 1.5, "max_tokens": 16}
    assert client.chat(**hot, seed=1) == client.chat(**hot, seed=1) != client.chat(**hot, seed=2)
    assert client.chat(**hot, seed=0xFFFFFFFF) == client.chat(**hot, seed=0) and client.chat(
        **hot, seed=-5
    )
    assert (
        json.loads(client.chat(response_format={"type": "json_object"}, max_tokens=200, seed=3))
        is not None
    )
    assert client("/v1/chat/completions", CHAT)[1]["choices"][0]["message"]["content"].startswith(
        whole[:4]
    )
    role = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": None},
        *CHAT["messages"],
    ]
    assert client.chat(messages=role)


def test_requests_at_once_wait_for_one_another(client):
    """Also when streams are among them: none is cut off."""
    body = CHAT | {"max_tokens": 24}
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(client.stream, "/v1/chat/completions", body) for _ in range(2)]
        whole = [pool.submit(client.chat, max_tokens=24) for _ in range(2)]
    assert len({content(s.result()) for s in streams} | {w.result() for w in whole}) == 1


def test_models_health_and_what_the_routers_did(client):
    assert [m["id"] for m in client("/v1/models")[1]["data"]] == ["small"]
    assert client("/health") == (200, {"status": "ok"})
    client("/v1/completions", {"prompt": "word " * 300, "max_tokens": 1})  # beyond the window
    status, mod = client("/mod")
    assert status == 200 and mod["tokens"] >= 300 and mod["threshold_shift"] == 0
    if bindings.patched():
        assert set(mod["activation_of"]) == {"kv", "ffn"} and 0 < mod["activation"] < 1
        assert 0 < mod["kv"]["used"] < mod["kv"]["dense"]


def test_refusals_are_one_line(client):
    def chat(**changes):
        return "/v1/chat/completions", CHAT | changes

    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for (path, body), word in (
        (chat(messages=LONG), "exceeds the context of 512"),
        (chat(messages=image), "text only"),
        (chat(messages=[]), "messages"),
        (chat(messages="x"), "messages"),
        (chat(messages=["x"]), "messages"),
        (chat(messages=[{"role": "god", "content": "x"}]), "god"),
        (chat(messages=[{"role": "user", "content": 1}]), "string"),
        (chat(messages=[{"role": "user", "content": "\ud800"}]), "Unicode"),
        (chat(n=2), "n is not"),
        (chat(tools=[{}]), "tools"),
        (chat(logprobs=True), "logprobs"),
        (chat(temperature=-1), "temperature"),
        (chat(temperature=float("nan")), "temperature"),
        (chat(top_p="x"), "top_p"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=1.5), "whole"),
        (chat(seed=True), "seed"),
        (chat(stop=[""]), "stop"),
        (chat(stop=5), "stop"),
        (chat(stream="yes"), "stream"),
        (chat(response_format={"type": "json_schema"}), "json_schema"),
        (chat(response_format="json"), "response_format"),
        (chat(logit_bias={"999999": 1}), "logit_bias"),
        (chat(logit_bias={"1": "x"}), "logit_bias"),
        (("/v1/completions", {"prompt": ["one", "two"]}), "prompt"),
        (("/v1/completions", {"prompt": ""}), "prompt"),
        (("/v1/completions", {}), "prompt"),
        (("/v1/completions", b"nonsense"), "no JSON"),
        (("/v1/completions", b"[1]"), "no JSON object"),
    ):
        for stream in (
            ({}, {"stream": True}) if isinstance(body, dict) and "stream" not in body else ({},)
        ):
            status, answer = client(path, body | stream if stream else body)
            assert status == 400 and word in answer["error"]["message"], (body, answer)
            assert "\n" not in answer["error"]["message"]
    assert client(*chat(messages=LONG))[1]["error"]["code"] == "context_length_exceeded"
    assert (
        client("/v1/embeddings", {})[0]
        == client("/nothing")[0]
        == client("/v1/completions")[0]
        == 404
    )
    assert (
        client("/v1/models", Host="evil.example")[0]
        == client("/v1/models", Origin="http://evil.example")[0]
        == 403
    )
    assert client("/v1/completions", b"", **{"Content-Length": str(1 << 40)})[0] == 413
    for host, path in (("[::1", "/health"), ("localhost", "http://[")):
        assert client(path, Host=host)[0] == 400
    assert client("/v1/completions", b"[" * 100_000)[0] == 400
    assert client("/v1/completions", b"{}", **{"Content-Length": "9" * 5000})[0] == 413
    assert client(*chat(logit_bias={"9" * 5000: 1}))[0] == 400
    assert "bytes" in client("/v1/completions", {"prompt": "a" * 1_000_000})[1]["error"]["message"]
    tiny = {"temperature": 1e-38, "top_p": 1, "min_p": 0}
    assert client.chat(
        **tiny, response_format={"type": "json_object"}
    )  # llama.cpp ends the process at such logits
    assert client.chat(**tiny) == client.chat()  # and it goes on


def test_the_last_place_of_the_context_is_used_and_the_log_is_text(model):
    """llama.cpp rounds a context up to 256 tokens."""
    with served(model, "--ctx", "300") as client:
        for n in range(280, 300, 4):
            assert client("/v1/completions", {"prompt": "word " * n, "max_tokens": 400})[0] == 200
        assert client("/v1/completions", {"prompt": "word " * 700})[0] == 400
        with socket.create_connection(client.address) as raw:
            raw.sendall(b"GET /\x1b]0;x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 404")
        log = client.end()[1]
        assert "\x1b" not in log and "]0;x" in log


def test_a_client_that_leaves_does_not_hold_up_the_others(model):
    """Neither while its answer is written nor while its prompt is read, streamed or not."""
    with served(model, "--ctx", "8192") as client:
        reads = ENDLESS | {"messages": [{"role": "user", "content": "word " * 7000}]}
        for body in (ENDLESS, ENDLESS | {"stream": True}, reads):
            connection = client.open("/v1/chat/completions", body)
            time.sleep(1)
            connection.sock.send(b"\r\n")  # Some clients end a request so.
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            assert client.chat(max_tokens=2)
            assert client("/mod")[1]["tokens"] < 200  # the context is the second request's
        code, log = client.end()
        assert code == 0 and "Traceback" not in log


def test_a_key(model):
    with served(model, MOD_EXPORT_API_KEY="secret", PORT="tcp://nowhere") as client:
        for path, body in (("/v1/models", None), ("/v1/chat/completions", CHAT), ("/mod", None)):
            assert (
                client(path, body)[0]
                == client(path, body, key="other")[0]
                == client(path, body, key="ü")[0]
                == 401
            )
            assert client(path, body, key="secret")[0] == 200
        code, log = client.end()
        assert (
            code == 0
            and "Traceback" not in log
            and '"GET /mod HTTP/1.1" 200' in log
            and "secret" not in log
        )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_the_middle_of_an_answer(model, how, stream):
    with served(model, "--ctx", "4096") as client:
        connection = client.open("/v1/chat/completions", ENDLESS | {"stream": stream})
        time.sleep(1)
        code, log = client.end(how)
        assert code == (0 if how == signal.SIGINT else 128 + how) and "Traceback" not in log, log
        answer = connection.getresponse()
        assert answer.status == (200 if stream else 503) and b"being stopped" in answer.read()


def test_what_cannot_be_served(model, run_cli, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = [
            (model, "--port", port),
            (model, "--host", "no.such.host.invalid"),
            (model, "--host", "a..b"),
            (tmp_path / "none.gguf",),
            (model, "--gpu-layers", -1),
            (model, "--port", 99999),
        ]
        words = ("in use", "no.such.host", "a..b", "does not exist", "no GPU", "--port")
        for args, word in zip(options, words, strict=True):
            done = run_cli("serve", *args)
            assert (done.returncode, done.stdout) == (2, "")
            assert (
                done.stderr.startswith("error: ")
                and done.stderr.count("\n") == 1
                and word in done.stderr
            )


def test_stop_strings_are_held_back():
    assert cut("one END two", ("END",)) == ("one ", "", True)
    assert cut("one EN", ("END",)) == ("one ", "EN", False)
    assert cut("one E", ("END", "one")) == ("", "", True)
    assert cut("aab", ("ab c", "abx")) == ("a", "ab", False)
    assert cut("one", ()) == ("one", "", False)
