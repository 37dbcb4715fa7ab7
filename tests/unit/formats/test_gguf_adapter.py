"""Routers in a GGUF file of their own: what is written, and which adapters cannot be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.export import export
from mod_export.formats import adapter_files, architectures, gguf_adapter
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.model_checks import check_model

ADAPTER = adapter_files.packaged("smollm2-kv-quarter")


def test_what_is_written_is_read_again(tmp_path):
    path = export(ADAPTER, tmp_path / "routers.gguf")
    assert path.stat().st_size < 250_000
    found, expected = gguf_adapter.read(path), adapter_files.read(ADAPTER)
    ours, theirs = (config.units["kv"] for config in (found.config, expected.config))
    assert (ours.heads, ours.window) == (theirs.heads, theirs.window) and ours.heads == 3
    np.testing.assert_allclose(ours.threshold, theirs.threshold, rtol=1e-6)
    assert found.config.sink_tokens == expected.config.sink_tokens
    for name in ("embedding", "ffn"):
        samples = (base["weights"].pop(name) for base in (found.base, expected.base))
        np.testing.assert_allclose(*samples, rtol=1e-6)
    assert found.base == expected.base
    assert found.routers.keys() == expected.routers.keys()
    for unit, pair in expected.routers.items():
        assert all(map(np.array_equal, found.routers[unit], pair))
    file = GGUFFile.open(path)
    assert (file.get("general.type"), file.get("adapter.type")) == ("adapter", "mod")
    assert file.get("general.license") == "apache-2.0"


def test_a_folder_gives_the_file_its_name(tmp_path):
    path = export(ADAPTER, f"{tmp_path}/")
    assert path.name == "SmolLM2-135M-Instruct-MoD-kv-routers.gguf" and path.is_file()


def test_an_adapter_is_made_a_file_in_the_cache_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MOD_EXPORT_CACHE", str(tmp_path))
    path = gguf_adapter.locate("smollm2-kv-quarter")
    assert path == gguf_adapter.locate(ADAPTER) == gguf_adapter.locate(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert gguf_adapter.locate("smollm2-kv") != path


def test_refusals(tmp_path):
    def with_type(model_type: str) -> Path:
        copy = Path(shutil.copytree(ADAPTER, tmp_path / model_type))
        data = json.loads((copy / "mod.json").read_text())
        data["base"]["model_type"] = model_type
        (copy / "mod.json").write_text(json.dumps(data))
        return copy

    for adapter, options, words in (
        (Path("smollm2-kv-eighth"), {}, "holds LoRA weights.*; make one file .*--base"),
        (ADAPTER, {"quant": "q8_0"}, "without weights for --quant; give a GGUF"),
        (ADAPTER, {"dense": True}, "without weights for --dense; give a GGUF"),
        (with_type("made_up"), {}, "knows no architecture for made_up"),
        (with_type("mamba"), {}, "architecture 'mamba' cannot have routers"),
    ):
        with pytest.raises(UserError, match=words):
            export(adapter, tmp_path / "routers.gguf", **options)
    assert not (tmp_path / "routers.gguf").exists()


def test_a_file_of_routers_is_no_model(tmp_path):
    """llama.cpp named a key that was missing, and others said that the adapter is of another."""
    routers = export(ADAPTER, tmp_path / "routers.gguf")
    for use in (
        lambda: check_model(GGUFFile.open(routers)),
        lambda: gguf_adapter.with_routers(routers, None),
        lambda: export(ADAPTER, tmp_path / "mod.gguf", base=routers),
    ):
        with pytest.raises(UserError, match="routers.gguf is an adapter, and no model; give the"):
            use()


def test_model_types_lead_to_the_architectures_of_their_classes():
    """As the names of transformers' classes are regular; two kinds of models have other names."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    others = {"gpt-sw3", "hunyuan_v1_dense", "hunyuan_v1_moe"}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        expected = architectures.of_class(name if isinstance(name, str) else name[0])
        if expected and model_type not in others:
            assert architectures.of_model_type(model_type) == expected, model_type
    assert architectures.of_model_type("gemma3_text") == "gemma3"
