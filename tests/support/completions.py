"""Greedy answers of a llama-server, for tests that compare them.

answer = ask(server, TEXT * 3)                  # with what the server has read before
assert same_answer(answer, anew(server, TEXT * 3))
"""

from scripts.studies.serve_soak import same_answer
from tests.support.llama_server import LlamaServer

TOKENS = 12
TEXT = (
    "The lighthouse keeper wrote down the weather every morning, the ships that passed, and the "
    "price of oil. In winter the boat from the harbour came once a month, with letters, flour and "
    "coal. He read the letters twice and answered them at night, when the lamp was burning. "
)
__all__ = ["TEXT", "TOKENS", "anew", "ask", "same_answer", "tokens"]


def ask(server: LlamaServer, prompt, **changes) -> dict:
    body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 4}
    return server.post("/completion", body | changes)


def anew(server: LlamaServer, prompt, **changes) -> dict:
    """The answer where nothing that was read before is used."""
    return ask(server, prompt, cache_prompt=False, **changes)


def tokens(server: LlamaServer, text: str) -> list[int]:
    return server.post("/tokenize", {"content": text})["tokens"]
