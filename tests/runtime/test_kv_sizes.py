"""Sizes of K and V that our table gives, against those of llama.cpp itself."""

import llama_cpp
import pytest

from mod_export.benchmark.memory_worker import ContextProbe
from mod_export.formats import schema
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import expected_cells, kv_layers
from mod_export.formats.recurrent_layers import (
    BOTH,
    BY_HEADS,
    BY_INTERVAL,
    OR_FFN,
    attention_layers,
    ffn_layers,
    recurrent_layers,
    state_bytes,
)
from mod_export.formats.sliding_windows import SLIDING
from mod_export.llamacpp import source
from mod_export.runtime.llama import MoDLlama
from mod_export.units import KV, Unit
from tests.support.architectures import models, routers
from tests.support.c_api import PARTIAL, Raw

NAMES = [*SLIDING, "deepseek2", "gemma4-e", "llama", "phi3"]
HYBRIDS = [*BY_INTERVAL, *BY_HEADS, *OR_FFN, *BOTH]
N_CTX, UBATCH = 2048, 64
# of a saved state, and of the two parts of each layer's (llama-memory-recurrent.cpp)
STATE_HEAD_BYTES, LAYER_HEAD_BYTES = 28, 2 * (4 + 8)
ROUNDED = 2 * 0.005 * 2**20  # the log has two numbers of MiB, each with two digits


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    if not source.is_unpacked(stock=True):
        pytest.skip("needs the source of llama.cpp")
    written = models.write(tmp_path_factory.mktemp("architectures"), NAMES)
    return {model.name: model for model in written}


def test_windows_and_shared_layers_are_those_of_llama_cpp(files):
    assert len(files) > 25
    for model in files.values():
        layers = kv_layers(GGUFFile.open(model.path))[: model.n_layer]
        without = {i for i, layer in enumerate(layers) if not layer.bytes_per_token}
        assert without == {*model.without_kv, *model.recurrent}, model.name  # none has both
        windows = {i: layer.window for i, layer in enumerate(layers) if layer.window}
        windows = {i: window for i, window in windows.items() if i not in model.recurrent}
        assert windows == dict.fromkeys(model.sliding, model.n_swa), model.name


def states_of(path) -> int:
    """Bytes of the recurrent states that llama.cpp makes."""
    probe = ContextProbe(str(path))
    probe.context(N_CTX, UBATCH, (1, 1))
    return probe.states


def test_recurrent_layers_are_those_of_llama_cpp(tmp_path):
    written = models.write(tmp_path, HYBRIDS)
    assert {model.name for model in written} == set(HYBRIDS)
    for model in written:
        file, layers = GGUFFile.open(model.path), range(model.n_layer)
        assert tuple(i for i in layers if recurrent_layers(file)[i]) == model.recurrent, model.name
        attends = {i for i in layers if attention_layers(file)[i]}
        assert attends == {*model.full, *model.sliding}, model.name
        ffn = [i for i in layers if ffn_layers(file)[i]]
        assert ffn == list(model.ffn_only or layers), model.name
        stores = {i for i, layer in enumerate(kv_layers(file)) if layer.bytes_per_token}
        assert stores == attends, model.name
        told = states_of(model.path)
        assert told == pytest.approx(state_bytes(file), abs=ROUNDED), model.name
        # to the byte: a saved state has nothing else but heads of known sizes
        with Raw(model.path, n_ctx=64) as raw:
            raw.decode([1, 2, 3])
            saved = llama_cpp.llama_state_seq_get_size_ext(raw.ctx, 0, PARTIAL)
        heads = STATE_HEAD_BYTES + LAYER_HEAD_BYTES * len(model.recurrent)
        assert saved == heads + state_bytes(file) > heads, model.name


def test_a_routed_hybrid_has_the_states_twice(tmp_path):
    (model,) = models.write(tmp_path, ["qwen35"])
    path = routers.route(model, tmp_path / "mod.gguf", [Unit(model.full[1], KV)])
    told = states_of(path)
    assert told == pytest.approx(2 * state_bytes(GGUFFile.open(path)), abs=ROUNDED)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma3n", "gemma4", "gpt-oss", "step35"])
def test_a_dense_context_is_as_large(files, name):
    path = files[name].path
    layers = kv_layers(GGUFFile.open(path))
    expected = sum(layer.dense_bytes(N_CTX, UBATCH) for layer in layers)
    assert expected < 0.7 * N_CTX * sum(layer.bytes_per_token for layer in layers)
    told = ContextProbe(str(path)).context(N_CTX, UBATCH, (1, 1))["kv"]
    assert told == pytest.approx(expected, abs=ROUNDED)


def test_a_dense_model_tells_what_it_holds(files):
    """Of two layers in each three a window; llama_cpp's own default keeps everything."""
    n_swa, path = files["gemma4"].n_swa, files["gemma4"].path
    with_all = MoDLlama(path, n_ctx=N_CTX, n_ubatch=UBATCH)
    per_token = [layer.bytes_per_token for layer in kv_layers(GGUFFile.open(path))]
    assert with_all.kv().committed == N_CTX * sum(per_token)
    llm = MoDLlama(path, n_ctx=N_CTX, n_ubatch=UBATCH, swa_full=False)
    llm.eval([1 + i % 100 for i in range(600)])
    kept = -(-(n_swa + UBATCH) // 256) * 256
    assert (llm.kv(0).used, llm.kv(2).used) == (kept * per_token[0], 600 * per_token[2])
    assert llm.kv(0).used == llm.kv(0).dense < llm.kv(2).used
    assert llm.kv().used == sum(llm.kv(layer).used for layer in range(files["gemma4"].n_layer))
    llm.new_context(n_ctx=N_CTX, type_k=0, type_v=0, swa_full=False)
    assert llm.kv(2).committed == 2 * N_CTX * per_token[2]


@pytest.mark.parametrize("name", ["deepseek2", "gemma3", "gemma4-e", "gpt-oss", "llama4"])
def test_a_routed_model_holds_what_inspect_says(files, name, tmp_path):
    """Full layers without routers and sliding layers; a chunk is longer than the text."""
    model, n = files[name], 600
    path = routers.route(model, tmp_path / "mod.gguf", [Unit(model.full[0], KV)])
    layers = kv_layers(GGUFFile.open(path))
    llm = MoDLlama(path, n_ctx=N_CTX, n_ubatch=UBATCH)
    config = schema.from_keys(GGUFFile.open(path))
    llm.eval([1 + i % 100 for i in range(n)])
    for i, layer in enumerate(layers):
        kv, expected = llm.kv(i), expected_cells(config, i, n, window=layer.window)
        assert kv.dense == layer.dense_bytes(n, UBATCH)
        if not layer.bytes_per_token:
            assert kv.cells_used == kv.used == 0
        elif i != model.full[0]:
            # the window of the next token holds that token as well
            assert kv.cells_used == (expected - 1 if expected < n else n)
            assert kv.used == kv.cells_used * layer.bytes_per_token
