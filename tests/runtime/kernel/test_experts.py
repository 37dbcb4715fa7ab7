"""`ffn` units of mixtures of experts: what they skip, and how many graphs a prompt takes."""

import ctypes

import numpy as np
import pytest

from mod_export.formats.gguf import GGUFFile
from mod_export.runtime import bindings
from mod_export.units import FFN, Unit
from tests.support.architectures import models, routers
from tests.support.c_api import Raw
from tests.support.oracle import needs_patched

pytestmark = needs_patched

# with shared experts but for qwen3moe; qwen35moe is a hybrid
NAMES = ("qwen3moe", "qwen2moe", "qwen35moe", "deepseek2")
LAYERS = (2, 3, 5)
TOKENS = np.random.default_rng(4).integers(0, 128, 96)


@pytest.fixture(scope="module", params=NAMES)
def mixture(request, tmp_path_factory):
    """(the dense model, its file with ffn units on LAYERS, which have no sinks)"""
    folder = tmp_path_factory.mktemp("experts")
    (model,) = models.write(folder, [request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routers, "SINKS", 0)
        units = [Unit(layer, FFN) for layer in LAYERS]
        return model, routers.route(model, folder / "mod.gguf", units)


def without_experts(model, path):
    """Write the model with experts and shared experts on LAYERS that add nothing."""
    data = bytearray(model.path.read_bytes())
    tensors = GGUFFile.open(model.path).tensors
    silenced = [
        tensor
        for layer in LAYERS
        for tensor in tensors.values()
        if tensor.name.startswith(f"blk.{layer}.ffn_down")
    ]
    assert len(silenced) >= len(LAYERS)
    for tensor in silenced:
        data[tensor.start : tensor.start + tensor.nbytes] = bytes(tensor.nbytes)
    path.write_bytes(data)
    return path


def test_router_experts_and_shared_experts_are_skipped(mixture, tmp_path):
    model, path = mixture
    with Raw(without_experts(model, tmp_path / "silent.gguf")) as r:
        expected = r.decode(TOKENS)
    with Raw(path) as r:
        r.set(force="inactive")
        whole = r.decode(TOKENS)
        r.clear()
        single = np.concatenate([r.decode([token]) for token in TOKENS])
    for logits in (whole, single):
        assert np.abs(logits - expected).max() < 1e-4 * expected.std()


def n_graphs(r, tokens) -> int:
    perf = bindings.llama_mod_perf()
    bindings.llama_mod_reset_stats(r.ctx)
    r.clear()
    r.decode(tokens)
    assert bindings.llama_mod_get_perf(r.ctx, ctypes.byref(perf))
    return perf.n_graphs


def test_the_tokens_of_a_segment_are_one_batch(mixture):
    """A prompt takes as many graphs as it has segments, however many tokens go through experts."""
    _, path = mixture
    with Raw(path) as r:
        of_many = n_graphs(r, TOKENS)
        active = r.trace()[0].sum(0)
        assert (active > 10).all() and (active < len(TOKENS) - 10).all()
        assert n_graphs(r, TOKENS[:48]) == of_many <= 2 * len(LAYERS) + 1
