"""llama-cpp-python's own server on a MoD file: it uses llama_cpp.Llama, and knows of no routers."""

import json

import llama_cpp
import pytest

from tests.support.completions import TOKENS

pytest.importorskip("fastapi", reason="needs `pip install 'llama-cpp-python[server]'`")
from fastapi.testclient import TestClient
from llama_cpp.server.app import create_app
from llama_cpp.server.settings import ModelSettings, ServerSettings

OPTIONS = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def client(mod):
    models = [ModelSettings(model=str(mod), verbose=False, **OPTIONS)]
    with TestClient(create_app(server_settings=ServerSettings(), model_settings=models)) as client:
        yield client


def test_prompts_that_part_anywhere(client, mod):
    """Each is answered as llama_cpp.Llama answers it anew, and the same in a stream.

    Counting has no close decisions, which rounding could turn.
    """
    for numbers in (range(1, 70), [*range(1, 20), *range(40, 80)], range(1, 30), range(1, 70)):
        prompt = ", ".join(map(str, numbers)) + ","
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        fresh = llama_cpp.Llama(str(mod), verbose=False, **OPTIONS)
        right = fresh(prompt, max_tokens=TOKENS, temperature=0)["choices"][0]["text"]
        fresh.close()
        assert f" {numbers[-1] + 1}, {numbers[-1] + 2}," in right
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == right
        stream = client.post("/v1/completions", json=body | {"stream": True}).text.splitlines()
        pieces = [json.loads(line[6:]) for line in stream if line.startswith("data: {")]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == right


def test_a_chat(client):
    asked = [{"role": "user", "content": "Name a colour."}]
    answer = client.post("/v1/chat/completions", json={"messages": asked, "max_tokens": 8})
    assert answer.json()["choices"][0]["message"]["content"]
