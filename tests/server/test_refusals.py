"""What llama-server refuses on a MoD file, in one line or with a status, and stays up."""

import json
import signal
import socket

import pytest

from tests.support.llama_server import started

CHAT = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 4}


@pytest.fixture(scope="module")
def server(mod):
    with started(mod, "--ctx", "512", key="secret") as server:
        yield server


def status(server, path, body=None, key=None) -> int:
    answer = server.open(path, body, key).getresponse()
    said = json.loads(answer.read())
    assert answer.status == 200 or said["error"]["message"], said
    return answer.status


def test_wrong_requests_get_an_answer(server):
    chat, text = "/v1/chat/completions", "/v1/completions"
    long = [{"role": "user", "content": "word " * 600}]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for path, body in (
        (text, b"nonsense"),
        (text, b"[1]"),
        (text, b"[" * 100_000),
        (text, {}),
        (text, {"prompt": [999_999]}),
        (text, {"prompt": ["one", 5.5]}),
        (text, {"prompt": "x", "n_predict": "many"}),
        (text, {"prompt": "x", "grammar": "root ::= ("}),
        (text, {"prompt": "x", "threshold_shift": "high"}),
        (chat, CHAT | {"messages": "x"}),
        (chat, CHAT | {"messages": [{"role": "user"}]}),
        (chat, CHAT | {"messages": long}),
        (chat, CHAT | {"messages": image}),
        (chat, CHAT | {"n": 99}),
        (chat, CHAT | {"tools": [{}]}),
        (chat, CHAT | {"response_format": {"type": "poem"}}),
        (chat, CHAT | {"logit_bias": {"x": {}}, "temperature": []}),
        ("/v1/embeddings", {"input": "x"}),
        ("/nothing", {}),
    ):
        for stream in (False, True):
            sent = body | {"stream": True} if stream and isinstance(body, dict) else body
            got = status(server, path, sent)
            assert 400 <= got < 500 or (path, got) == ("/v1/embeddings", 501), (path, sent)
    assert status(server, chat, CHAT | {"unknown_field": 1}) == 200


def test_a_body_that_is_too_large(server):
    """llama-server takes 100 MiB."""
    assert server.open("/v1/completions", b" " * (101 << 20)).getresponse().status == 413
    assert status(server, "/v1/chat/completions", CHAT) == 200


def test_keys(server):
    for path in ("/v1/models", "/props", "/slots", "/mod/trace"):
        assert status(server, path, key="other") == status(server, path, key="") == 401
    for path in ("/", "/page.js", "/page.css", "/health"):  # the page asks for the key
        assert server.open(path, key="").getresponse().status == 200
    assert server.open("/../page/page.js", key="").getresponse().status >= 400
    assert status(server, "/v1/chat/completions", CHAT) == 200
    assert "secret" not in server.text


def test_names_of_other_machines(mod, dense):
    """A page whose name resolves to this machine would be of the server's own origin."""
    own = ("localhost", "LOCALHOST:80", "127.0.0.1:1", "127.9.9.9", "[::1]:5", "a.localhost.")
    others = ("evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "10.0.0.1")

    def answered(server, host, path="/props") -> bool:
        answer = server.open(path, host=host).getresponse()
        said = answer.read()
        assert answer.status == 200 or (answer.status, json.loads(said)["error"]["code"]) == (
            (403, 403)
        )
        return answer.status == 200

    with started(mod, "--ctx", "256", "--allow-host", "Chat.example") as server:
        assert all(answered(server, host) for host in (*own, "chat.example:443"))
        assert not any(answered(server, host, path) for host in others for path in ("/props", "/"))
    for more, host in ((("--host", "0.0.0.0"), "my.example"), (("--allow-host", "*"), "any.thing")):
        with started(dense, "--ctx", "256", *more) as server:
            assert answered(server, host)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_the_middle_of_an_answer(mod, how):
    with started(mod, "--ctx", "2048") as server:
        body = CHAT | {"max_tokens": 1900, "stream": True, "ignore_eos": True}
        connection = server.open("/v1/chat/completions", body)
        connection.getresponse().read(10)
        assert server.end(how) == 0, server.text


def test_what_cannot_be_served(mod, run_cli, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(mod.read_bytes()[:100_000])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for args, word in (
            ((mod, "--port", taken.getsockname()[1]), "in use"),
            ((mod, "--host", "no.such.host.invalid"), "no.such.host"),
            ((mod, "--host", "a..b"), "a..b"),
            ((tmp_path / "none.gguf",), "none.gguf"),
            ((damaged,), "damaged.gguf"),
            ((mod, "--gpu-layers", -1), "no GPU"),
            ((mod, "--port", 99999), "--port"),
            ((mod, "other.gguf"), "other.gguf"),
        ):
            done = run_cli("serve", *args)
            assert (done.returncode, done.stdout) == (2, ""), done
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
            assert word in done.stderr


def test_the_command_becomes_the_server(mod):
    """What follows -- reaches llama-server, whose exit code is that of the command."""
    with started(mod, "--name", "small", more=("-np", "2", "--no-ui")) as server:
        assert len(server.get("/slots")) == 2
        assert server.get("/v1/models")["data"][0]["id"] == "small"
        assert server.open("/").getresponse().status == 404
        assert server.end() == 0
