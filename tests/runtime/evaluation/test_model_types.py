"""Torch against the runtime at f32, on a tiny random model of each type that people run.

One process of llama.cpp's converter writes all files, with the vocabulary of the tests.
"""

import numpy as np
import pytest
import torch

from mod_export.formats.gguf import GGUFFile
from mod_export.metrics import compare_rows
from mod_export.model.gguf_account import account
from mod_export.model.gguf_architectures import ARCHITECTURES
from mod_export.model.gguf_reading import read_model
from mod_export.runtime.batch_logits import BatchLogitsLlama
from tests.support.gguf_models import random_model, write_models
from tests.support.model_types import MODEL_TYPES

IDS = np.random.default_rng(0).integers(3, 96, 200).tolist()
MAX_KL = 1e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("types"), MODEL_TYPES)


def runtime_logits(path) -> np.ndarray:
    llm = BatchLogitsLlama(
        path, n_ctx=len(IDS), n_batch=len(IDS), flash_attn=False, type_k=0, type_v=0
    )
    llm.eval(IDS)
    logits = llm.logits.copy()
    llm.close()
    return logits


def torch_logits(model) -> np.ndarray:
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    assert logits.std() > 0.3  # a flat distribution would hide differences
    return logits


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_both_directions_give_the_same_logits(files, name):
    """The file that llama.cpp's converter writes, and the model that is read from this file."""
    file = GGUFFile.open(files[name])
    assert not account(files[name].with_suffix(""), file)
    expected = runtime_logits(files[name])
    written = torch_logits(random_model(*MODEL_TYPES[name]))
    assert compare_rows(expected, written)[:, 0].mean() <= MAX_KL
    if file.architecture in ARCHITECTURES:
        read = torch_logits(read_model(file, torch.float32))
        assert compare_rows(written, read)[:, 0].mean() <= 1e-9
