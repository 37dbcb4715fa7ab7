"""Directories and adapters that version 0.1 wrote open and give the results of version 0.1.

tests/fixtures/v0.1/README.md lists the files.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mod_export import adapter
from mod_export.errors import UserError
from mod_export.export import export, read_directory
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.schema import read_routers
from mod_export.inspection import inspect
from mod_export.model import MoDModel, loading
from mod_export.training import run
from mod_export.training.config import TrainConfig
from tests.support.byte_tokenizer import TEXT

FOLDER = Path(__file__).parent.parent / "fixtures" / "v0.1"
EXPECTED = np.load(FOLDER / "expected.npz")
ROWS = slice(7, None, 8)  # make.py kept these rows of the logits.


def check(model: MoDModel, name: str) -> None:
    ids = torch.from_numpy(EXPECTED["ids"])[None]
    with torch.inference_mode():
        logits, trace = model(ids, trace=True)
    assert np.array_equal(trace.active[0].numpy(), EXPECTED[f"{name}.active"])
    assert np.allclose(trace.logit[0].float().numpy(), EXPECTED[f"{name}.score"], atol=5e-5)
    assert np.allclose(logits[0, ROWS].numpy(), EXPECTED[f"{name}.logits"], atol=1e-4)


@pytest.mark.parametrize("name", ["mod", "topk", "trained"])
def test_directory(name):
    model = MoDModel.load(FOLDER / name)
    assert model.config.top_k == ({"kv": 0.5, "attn": 0.5, "ffn": 0.5} if name == "topk" else {})
    check(model, name)


@pytest.mark.parametrize("name", ["mod", "topk", "trained"])
def test_directory_saved_again_is_the_same_model(name, tmp_path):
    MoDModel.load(FOLDER / name).save(tmp_path / "again")
    model = MoDModel.load(tmp_path / "again")
    before = json.loads((FOLDER / name / "config.json").read_text())["mod"]
    after = json.loads((tmp_path / "again" / "config.json").read_text())["mod"]
    assert before.items() <= after.items()  # newer keys may stand beside the old ones
    check(model, name)


def test_adapter_with_lora():
    base, tokenizer = loading.load(FOLDER / "mod")
    check(adapter.apply(adapter.load(FOLDER / "adapter"), base, tokenizer), "adapter")


def test_topk_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="chooses by top-k"):
        export(FOLDER / "topk", tmp_path / "out.gguf", quant="f32")


def test_trained_weights_need_a_teacher(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    config = TrainConfig(data=(str(tmp_path / "text.txt"),), tokens=64, length=32, held_out=2)
    with pytest.raises(UserError, match="are trained, so they are not the original's"):
        run.train(FOLDER / "trained", tmp_path / "out", config)
    figures = run.train(
        FOLDER / "trained", tmp_path / "out", replace(config, teacher=str(FOLDER / "mod"))
    )
    assert figures["kl"] > 0


@pytest.mark.parametrize("name", ["mod", "topk"])
def test_original_weights_need_no_teacher(name):
    assert read_directory(FOLDER / name)[0].base_is_original


@pytest.mark.parametrize("name", ["mod-f32", "mod-q8_0"])
def test_inspection_of_gguf(name):
    expected = json.loads((FOLDER / "expected.json").read_text())[name]
    found = {**inspect(FOLDER / f"{name}.gguf"), "file": f"{name}.gguf"}
    kv = found["mod"]["kv"]  # It tells some things more since the files were made.
    assert (kv.pop("windows"), kv.pop("note")) == ([0, 0, 0], None)
    assert (kv.pop("state_bytes"), kv.pop("state_layers")) == (0, [])
    assert found.pop("n_draft_layers") == 0
    assert found == expected


def test_gguf_holds_the_routers_of_its_directory():
    config, routers = read_directory(FOLDER / "mod")
    for file in (GGUFFile.open(FOLDER / f"{name}.gguf") for name in ("mod-f32", "mod-q8_0")):
        found, tensors = read_routers(file)
        assert found.routed() == config.routed()
        for unit, pair in tensors.items():
            for ours, theirs in zip(pair, routers[unit], strict=True):
                assert np.array_equal(ours, theirs)
