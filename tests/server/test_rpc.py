"""llama-server with its layers on two processes of ggml-rpc-server."""

import pytest

from mod_export.serving.llama_server import tools_folder
from tests.support import rpc_servers
from tests.support.llama_server import started

QUESTION = {"prompt": "The lighthouse stands where " * 20, "n_predict": 4, "n_probs": 1}


def test_layers_on_two_servers(mod):
    def answer(*options) -> dict:
        with started(mod, "--ctx", "512", *options) as server:
            return server.post("/completion", QUESTION | {"temperature": 0})

    here = answer()
    with rpc_servers.running(2, tools_folder() / "ggml-rpc-server") as addresses:
        there = answer("--rpc", ",".join(addresses))
    assert there["content"] == here["content"]
    tokens = (found["completion_probabilities"] for found in (there, here))
    for a, b in zip(*tokens, strict=True):
        assert a["logprob"] == pytest.approx(b["logprob"], abs=0.05)
    shares = (found["timings"]["mod"]["activation"]["kv"] for found in (there, here))
    assert next(shares) == pytest.approx(next(shares), abs=0.02)
