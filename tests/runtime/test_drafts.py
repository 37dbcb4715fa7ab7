"""Layers for drafts go along into directories and into the files that are made of them."""

import copy
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mod_export.evaluation.parity import report, verify
from mod_export.export import export
from mod_export.formats import hf_directory
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.hf_directory import DRAFTS
from mod_export.formats.sliding_windows import draft_layers
from mod_export.model import loading
from mod_export.model.lora import merge_lora
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny
from tests.support.draft_heads import (
    LAYER,
    NAMES,
    add_head,
    tensors_of_head,
    write_models_with_heads,
)
from tests.support.gguf_models import random_model
from tests.support.model_types import MODEL_TYPES
from tests.support.tiny_adapter import save_for

UNITS = {"kv": [1, 3]}
OF_GLM = ["[gMASK]", "<|user|>", "<|observation|>"]  # tokens that llama.cpp's converter looks up
TEXT = "Some words, and then more of them: 1, 2, 3. " * 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> a GGUF file with a layer for drafts"""
    return write_models_with_heads(tmp_path_factory.mktemp("files"))


def with_drafts(folder, name) -> dict[str, np.ndarray]:
    """Write a directory with a layer for drafts, and return its tensors."""
    kind, fields = MODEL_TYPES[name]
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(OF_GLM, special_tokens=True)
    random_model(kind, fields | {"vocab_size": len(tokenizer)}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return add_head(folder, LAYER)


def check_runtime(path, reference, base=None):
    result = verify(path, reference, TEXT, base=base, n_tokens=100, length=100, threads=1)
    assert result["decision_agreement"] == 1 and result["mean_kl"] <= 1e-5, report(result)


@pytest.mark.parametrize("name", NAMES)
def test_those_of_a_gguf_file_come_along(files, tmp_path, name):
    """Where LoRA was trained, and with --save full, they were dropped."""
    source, lora = files[name], tmp_path / "lora"
    model = save_for(source, UNITS, lora, lora_for=TEXT)
    whole = export(lora, tmp_path / "lora.gguf", "f32", base=source)
    assert tensors_of_head(whole) == tensors_of_head(source)
    check_runtime(whole, lora, base=source)
    merge_lora(model.base)
    model.save(tmp_path / "mod")
    again = MoDModel.load(tmp_path / "mod")  # as a training that goes on from the directory
    again.save(tmp_path / "again")
    full = export(tmp_path / "again", tmp_path / "full.gguf", "f32")
    assert tensors_of_head(full) == tensors_of_head(source)
    small = tensors_of_head(export(tmp_path / "again", tmp_path / "small.gguf", "q8_0"))
    assert small.keys() == tensors_of_head(source).keys() and small != tensors_of_head(source)


def check_values(file, head):
    """All matrices but those of experts, which a file has in one, are there as they were."""
    found = {data for _, data in tensors_of_head(file).values()}
    matrices = {name for name, value in head.items() if value.ndim == 2 and "experts" not in name}
    assert len(matrices) > 5 and all(head[name].tobytes() in found for name in matrices)


def test_those_of_a_directory_come_along_with_lora(tmp_path):
    """transformers ignores them, so that they were in no directory of ours and in no file."""
    source, lora = tmp_path / "source", tmp_path / "lora"
    head = with_drafts(source, "qwen3_5")
    save_for(source, UNITS, lora, lora_for=TEXT)
    whole = export(lora, tmp_path / "lora.gguf", "f32", base=source)
    check_values(whole, head)
    check_runtime(whole, lora, base=source)


def saved_again(source, mod, name) -> dict[str, np.ndarray]:
    """Write a directory, and what is made of it with --save full; return the tensors for drafts."""
    head = with_drafts(source, name)
    base, tokenizer = loading.load(source)
    config = tiny.config(UNITS, base.config.num_hidden_layers)
    tiny.wrap(base, config, tokenizer=tokenizer).save(mod)
    return head


def test_those_of_a_directory_come_along_into_another(tmp_path, caplog):
    mod = tmp_path / "mod"
    head = saved_again(tmp_path / "source", mod, "glm4_moe")
    index = json.loads((mod / hf_directory.WEIGHTS_INDEX).read_text())["weight_map"]
    for key, values in head.items():
        np.testing.assert_array_equal(load_file(mod / index[key])[key], values)
    assert not (mod / DRAFTS).exists()
    check_values(export(mod, tmp_path / "mod.gguf", "f32"), head)
    assert not [line for line in caplog.messages if "ignores" in line or "drafts" in line]


def test_a_line_tells_where_the_converter_leaves_them_out(tmp_path, caplog):
    saved_again(tmp_path / "source", tmp_path / "mod", "deepseek_v3")
    file = export(tmp_path / "mod", tmp_path / "mod.gguf", "f32")
    assert draft_layers(GGUFFile.open(file)) == 0
    assert [line for line in caplog.messages if "leaves out the layers for drafts of" in line]
