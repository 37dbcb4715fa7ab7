"""`mod-export serve` as clients see it: chats whole and streamed, refusals, a key, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from mod_export import bindings
from mod_export.runtime import MoDLlama

CHAT = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8, "temperature": 0,
        "repeat_penalty": 1.0}
LONG = [{"role": "user", "content": "word " * 600}]


class Client:
    """A server in a process of its own, with a context of 512 tokens, and requests to it."""

    def __init__(self, model, *options, **env):
        command = [sys.executable, "-m", "mod_export", "serve", str(model), "--port", "0", "--ctx", "512"]
        self.process = subprocess.Popen([*command, "--threads", "1", *options], env=os.environ | env,
                                        stderr=subprocess.PIPE, text=True)
        self.first = self.process.stderr.readline()
        self.base = re.search(r"http://[\d.]+:\d+", self.first)[0]

    def request(self, path: str, body=None, raw: bytes | None = None, key: str = ""):
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        data = json.dumps(body).encode() if body is not None else raw
        return urllib.request.urlopen(urllib.request.Request(self.base + path, data, headers), timeout=120)

    def __call__(self, path: str, body=None, **options) -> tuple[int, dict]:
        try:
            with self.request(path, body, **options) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as exc:
            return exc.code, json.load(exc)

    def stream(self, path: str, body: dict) -> list[dict]:
        with self.request(path, body | {"stream": True}) as answer:
            lines = [line.decode().strip() for line in answer if line.startswith(b"data: ")]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

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


def test_a_chat_is_what_the_runtime_says(client, model):
    own = MoDLlama(model, n_ctx=512, threads=1, n_batch=256).create_chat_completion(**CHAT)["choices"][0]["message"]
    status, answer = client("/v1/chat/completions", CHAT)
    assert status == 200 and answer["choices"][0]["message"] == own and own["content"]
    assert (answer["model"], answer["usage"]["completion_tokens"]) == ("small", 8)
    assert content(client.stream("/v1/chat/completions", CHAT)) == own["content"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}]
    assert client("/v1/chat/completions", CHAT | {"messages": parts})[1]["choices"][0]["message"] == own


def test_requests_at_once_wait_for_one_another(client):
    """Also when a stream is among them: it is not cut off."""
    body = CHAT | {"max_tokens": 24}
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(client.stream, "/v1/chat/completions", body) for _ in range(2)]
        whole = [pool.submit(client, "/v1/chat/completions", body) for _ in range(2)]
    texts = [content(s.result()) for s in streams] + [w.result()[1]["choices"][0]["message"]["content"] for w in whole]
    assert len(set(texts)) == 1 and texts[0]


def test_other_routes(client):
    assert [m["id"] for m in client("/v1/models")[1]["data"]] == ["small"]
    assert client("/v1/completions", {"prompt": "Once upon", "max_tokens": 4})[1]["choices"][0]["text"]
    tokens = client("/extras/tokenize", {"input": "hello world"})[1]["tokens"]
    assert client("/extras/detokenize", {"tokens": tokens})[1]["text"].strip() == "hello world"
    assert "/v1/chat/completions" in client("/openapi.json")[1]["paths"]


@pytest.mark.skipif(not bindings.patched(), reason="a stock library has no routers")
def test_what_the_routers_did(client):
    client("/v1/completions", {"prompt": "word " * 300, "max_tokens": 1})  # beyond the window
    status, mod = client("/extras/mod")
    assert status == 200 and set(mod["activation_of"]) == {"kv", "ffn"} and 0 < mod["activation"] < 1
    assert 0 < mod["kv"]["used"] < mod["kv"]["dense"] and mod["tokens"] >= 300 and mod["threshold_shift"] == 0


def test_refusals_are_one_line(client):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for path, body, word in (
        ("/v1/chat/completions", CHAT | {"messages": LONG}, "exceed"),
        ("/v1/chat/completions", CHAT | {"messages": image}, "text only"),
        ("/v1/completions", {"prompt": ["one", "two"]}, "one prompt"),
        ("/v1/completions", {"prompt": "a", "logprobs": 1}, "logprobs"),
        ("/v1/embeddings", {"input": "a"}, "embedding"),
    ):
        status, answer = client(path, body)
        assert status == 400 and word in answer["error"]["message"], answer
    assert client("/v1/chat/completions", {"messages": "x"})[0] == 422
    assert client("/v1/chat/completions", raw=b"nonsense")[0] == 422
    assert client("/nothing")[0] == 404
    last = client.stream("/v1/chat/completions", CHAT | {"messages": LONG})[-1]
    assert last["error"]["code"] == "context_length_exceeded"
    assert client("/v1/chat/completions", CHAT)[0] == 200  # and it goes on


def test_a_key(model):
    with served(model, MOD_EXPORT_API_KEY="secret", API_KEY="other", CONFIG_FILE="/nowhere") as client:
        for path, body in (("/v1/models", None), ("/v1/chat/completions", CHAT), ("/extras/mod", None)):
            assert client(path, body)[0] == client(path, body, key="other")[0] == 401
            assert client(path, body, key="secret")[0] == 200
        code, log = client.end()
        assert code == 0 and "Traceback" not in log


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_the_middle_of_an_answer(model, how):
    with served(model, "--ctx", "4096") as client:
        story = {"messages": [{"role": "user", "content": "Write a long story."}], "max_tokens": 3000, "stream": True}
        answer = client.request("/v1/chat/completions", story | {"logit_bias": {"2": -100}})
        for _ in range(6):
            answer.readline()
        code, log = client.end(how)
        assert code == (0 if how == signal.SIGINT else 128 + how) and "Traceback" not in log, log
        assert b"being stopped" in answer.read()


def test_what_cannot_be_served(model, run_cli, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = [(model, "--port", port), (model, "--host", "no.such.host.invalid"), (tmp_path / "none.gguf",),
                   (model, "--gpu-layers", -1), (model, "--port", 99999)]
        for args, word in zip(options, ("in use", "no.such.host", "does not exist", "no GPU", "--port"), strict=True):
            done = run_cli("serve", *args)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and word in done.stderr
