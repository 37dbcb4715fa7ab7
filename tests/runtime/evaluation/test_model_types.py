"""Torch against the runtime at f32, on a tiny random model of each type that people run: all tokens
through all layers, and with routers of every kind that the type can have.

One process of llama.cpp's converter writes all files, with the vocabulary of the tests.
"""

import numpy as np
import pytest
import torch

from mod_export.adapter import base_identity
from mod_export.convert import CHECK_TIMES, compare_logits
from mod_export.evaluation.parity import report, verify
from mod_export.export import export
from mod_export.formats.base_identity import ROUNDING_DISTANCE, compare, gguf_identity
from mod_export.formats.gguf import GGUFFile
from mod_export.llamacpp.converter import quantize
from mod_export.metrics import compare_rows
from mod_export.model.architectures import decoder_layers
from mod_export.model.gguf_account import account, check_base
from mod_export.model.gguf_architectures import ARCHITECTURES
from mod_export.model.gguf_reading import read_model
from mod_export.runtime.batch_logits import BatchLogitsLlama
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.draft_heads import with_head
from tests.support.gguf_models import changed, random_model, write_models
from tests.support.model_types import HYBRIDS, MODEL_TYPES, ROUTINGS, units

IDS = np.random.default_rng(0).integers(3, 96, 200).tolist()
TEXT = "".join(map(chr, np.random.default_rng(0).integers(32, 126, 200)))
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
    decoder_layers(model)  # of which some get other forwards
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    assert logits.std() > 0.3  # a flat distribution would hide differences
    return logits


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_both_directions_give_the_same_logits(files, tmp_path, name):
    """The file that llama.cpp's converter writes, and the model that is read from this file."""
    file = GGUFFile.open(files[name])
    assert not account(files[name].with_suffix(""), file)
    expected = runtime_logits(files[name])
    original = random_model(*MODEL_TYPES[name])
    written = torch_logits(original)
    assert compare_rows(expected, written)[:, 0].mean() <= MAX_KL
    if name in HYBRIDS:
        identity = base_identity(original, None, name)
        assert compare(identity, gguf_identity(file)) < ROUNDING_DISTANCE
    if name in HYBRIDS or file.architecture in ARCHITECTURES:
        model = read_model(file, torch.float32)
        assert compare_rows(written, torch_logits(model))[:, 0].mean() <= 1e-9
        if name in HYBRIDS and name != "falcon_h1":  # whose file has multipliers in the weights
            for key, value in original.state_dict().items():
                torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
        model.config.save_pretrained(tmp_path)
        check_base(tmp_path, file)


def test_few_tokens_with_other_experts_do_not_count(files, tmp_path):
    """Rounding decides between two experts now and then; a small file was refused for it."""
    path = tmp_path / "small.gguf"
    quantize(files["nemotron_h_moe"], path, "q8_0")
    model = read_model(GGUFFile.open(path), torch.float32)
    kl, rounding = compare_logits(GGUFFile.open(path), model, byte_tokenizer())
    assert 0 < kl < CHECK_TIMES * rounding
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1.2
    kl, rounding = compare_logits(GGUFFile.open(path), model, byte_tokenizer())
    assert kl > 10 * CHECK_TIMES * rounding


@pytest.mark.parametrize("name", ["qwen3_5", "glm4_moe"])
def test_layers_for_drafts_change_nothing(files, tmp_path, name):
    """Released files of Qwen3.5 and GLM-4.5 have them: they were refused, as no such model."""
    plain, file = files[name], with_head(files[name], tmp_path / "drafts.gguf", layer=1)
    dense = torch_logits(read_model(GGUFFile.open(plain), torch.float32))
    base = read_model(GGUFFile.open(file), torch.float32)
    assert (torch_logits(base) == dense).all()
    identity = base_identity(base, None, name)
    assert compare(identity, gguf_identity(GGUFFile.open(file))) < ROUNDING_DISTANCE
    config = tiny.config(units(base, "kv"), n_layer=base.config.num_hidden_layers)
    tokenizer = byte_tokenizer()
    model = tiny.wrap(base, config, tokenizer(TEXT, return_tensors="pt").input_ids, tokenizer)
    model.save(tmp_path / "mod")
    check_base(tmp_path / "mod", GGUFFile.open(file))
    out = export(tmp_path / "mod", tmp_path / "mod.gguf", base=file)
    result = verify(out, tmp_path / "mod", TEXT, n_tokens=200, length=200, threads=1)
    assert result["decision_agreement"] == 1 and result["mean_kl"] <= MAX_KL, report(result)


def test_numbers_of_layers_for_drafts_are_left_out(files, tmp_path):
    """Nemotron-H's layer for drafts attends and has an FFN, so that its arrays have both."""
    file, arch = GGUFFile.open(files["nemotron_h_moe"]), "nemotron_h_moe"
    path = changed(
        file.path,
        tmp_path / "drafts.gguf",
        changed_keys={f"{arch}.block_count": 9},
        dropped_keys=[f"{arch}.feed_forward_length", f"{arch}.attention.head_count_kv"],
        added_keys=[
            (f"{arch}.nextn_predict_layers", "u32", 1),
            (f"{arch}.feed_forward_length", "u32[]", [0, 0, 0, 32, 0, 0, 0, 32, 32]),
            (f"{arch}.attention.head_count_kv", "u32[]", [0, 2, 0, 0, 2, 2, 0, 0, 2]),
        ],
    )
    models = [read_model(GGUFFile.open(p), torch.float32) for p in (file.path, path)]
    assert models[0].config.to_dict() == models[1].config.to_dict()
    assert (torch_logits(models[0]) == torch_logits(models[1])).all()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_routers_decide_the_same(files, tmp_path, name, routing):
    """Thresholds lie in gaps between the scores, so that float noise decides nothing."""
    base = random_model(*MODEL_TYPES[name])
    config = tiny.config(units(base, routing), n_layer=base.config.num_hidden_layers)
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    model = tiny.wrap(base, config, ids, tokenizer)
    with torch.inference_mode():
        dense, routed = tiny.dense_logits(model, ids), model(ids)
    assert compare_rows(dense[0].numpy(), routed[0].numpy())[:, 0].mean() > 1e-3
    model.save(tmp_path / "mod")
    file = export(tmp_path / "mod", tmp_path / "mod.gguf", base=files[name])
    result = verify(file, tmp_path / "mod", TEXT, n_tokens=200, length=200, threads=1)
    assert result["tokens"] == 200 and 0.2 < result["activation"] < 0.8
    n_experts = GGUFFile.open(files[name]).get(
        f"{GGUFFile.open(file).architecture}.expert_count", 0
    )
    assert (result["bounds"]["margin"] is None) == (n_experts > 0)
    assert result["decision_agreement"] == 1 and result["mean_kl"] <= MAX_KL, report(result)
