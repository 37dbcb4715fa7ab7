"""The embedded SmolLM2 in torch: it speaks, and its tokens are those of llama.cpp."""

import random

import pytest
import torch
from llama_cpp import Llama

from mod_export.model import architectures, loading
from mod_export.model.mod_model import MoDModel


@pytest.fixture(scope="module")
def smollm2():
    return loading.load("smollm2")


@torch.inference_mode()
def test_the_embedded_model_speaks(smollm2):
    base, tokenizer = smollm2
    assert (base.dtype, architectures.n_embd(base), len(architectures.decoder_layers(base))) == (
        torch.float32,
        576,
        30,
    )
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = MoDModel.from_base(base, tokenizer).generate(ids["input_ids"], 12)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


def test_token_ids_are_those_of_llama_cpp(smollm2):
    """transformers alone cut spaces before digits in another way: " 3" after a space became one
    piece.
    """
    tokenizer = smollm2[1]
    llama = Llama(str(loading.embedded_gguf()), vocab_only=True, verbose=False)
    rng = random.Random(1)
    pieces = [*" \n\t1½é?", "  ", "\r\n", "23", "4.5", "Hello", "n't", "日本", "😀", "<|im_start|>"]
    for _ in range(1000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 15)))
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text) == ids, repr(text)
