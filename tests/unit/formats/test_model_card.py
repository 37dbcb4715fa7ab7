"""The model card of a MoD directory, and the keys general.* that an exported file gets from it."""

import json

import pytest
from huggingface_hub import ModelCard

from mod_export import adapter
from mod_export.formats import hub, metadata, model_card
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.hub_server import commit
from tests.support.tiny_gguf import Tiny

REPOSITORY = "org/Tiny-Llama-220K-Instruct"  # the name tells of basename, size and fine-tuning
CARD = "---\nlicense: other\nlicense_name: tiny\nlanguage:\n- en\ntags:\n- x\n---\n# Tiny\n"
UNITS = {"kv": [2, 3], "ffn": [4]}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A plain model as the cache of the hub has it."""
    cache = tmp_path_factory.mktemp("home") / "hub"
    path = cache / "models--org--Tiny-Llama-220K-Instruct/snapshots" / commit(REPOSITORY)
    tiny.base().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / "README.md").write_text(CARD)
    return path


@pytest.fixture(scope="module")
def mod_dir(tmp_path_factory, snapshot):
    from mod_export.model import loading

    base, tokenizer = loading.load(snapshot)
    assert loading.name_of(snapshot) == hub.repository(snapshot) == REPOSITORY
    model = tiny.wrap(base, tiny.config(UNITS), tokenizer=tokenizer)
    path = tmp_path_factory.mktemp("out") / "mod"
    model.save(path)
    adapter.save(
        path.parent / "adapter",
        model.config,
        model.router_tensors(),
        base,
        adapter.base_identity(base, tokenizer, REPOSITORY),
    )
    return path


@pytest.mark.parametrize("name", ["mod", "adapter"])
def test_a_card_names_the_original_and_its_license(mod_dir, name):
    card = ModelCard.load(mod_dir.parent / name / "README.md")
    data = card.data.to_dict()
    assert data.get("base_model_relation") == ("adapter" if name == "adapter" else None)
    assert data["base_model"] == REPOSITORY and data["tags"] == ["mixture-of-depths", "mod-export"]
    assert (data["license"], data["license_name"], data["language"]) == ("other", "tiny", ["en"])
    assert f"https://huggingface.co/{REPOSITORY}" in card.text and "mod-export export" in card.text
    assert "| kv " in card.text or "2 kv, 1 ffn units of 6 layers" in card.text


def test_what_a_card_says_outlives_saving_again(mod_dir, tmp_path):
    MoDModel.load(mod_dir).save(tmp_path / "copy")
    assert model_card.read(tmp_path / "copy") == model_card.read(mod_dir)


@pytest.mark.parametrize("text", ["", "# no header\n", "---\n: [\n---\n", "---\n- a list\n---\n"])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert model_card.read(tmp_path) == {}
    assert model_card.origin(tmp_path).to_dict() == {"model_name": tmp_path.name}


def test_a_directory_that_no_repository_is_known_of_has_its_own_name(tmp_path):
    (tmp_path / "Tiny-7B").mkdir()
    (tmp_path / "Tiny-7B/README.md").write_text(CARD)
    data = model_card.origin(tmp_path / "Tiny-7B")
    assert (data.base_model, data.model_name, data.license) == (None, "Tiny-7B", "other")
    assert "# Tiny-7B with Mixture-of-Depths" in model_card.model_text(data, tiny.config(UNITS))
    assert model_card.origin("org/name").base_model == "org/name"
    assert model_card.origin("").to_dict() == {}


@pytest.mark.parametrize("name", ["mod", "adapter"])
def test_an_existing_file_gets_the_keys_of_the_ecosystem(mod_dir, tmp_path, name):
    base = Tiny(n_layer=6, n_embd=64, n_head=4, n_ff=96).write(tmp_path / "base.gguf")
    file = GGUFFile.open(base)
    # What a file says of its own parent, and of itself
    keys = [
        ("general.base_model.count", "u32", 1),
        ("general.base_model.0.name", "string", "Grandparent"),
        ("general.size_label", "string", "9B"),
    ]
    with (tmp_path / "named.gguf").open("wb") as out:
        kept = [key for key in file.keys if key.startswith("general.base_model")]
        rewrite(file, out, added_keys=keys, dropped_keys=[*kept, "general.size_label"])
    about = metadata.describe(mod_dir.parent / name, tiny.config(UNITS), file)
    added, dropped = metadata.keys(about, GGUFFile.open(tmp_path / "named.gguf"))
    found = {key: value for key, _, value in added}
    assert set(dropped) == {"general.base_model.count", "general.base_model.0.name"}
    assert found["general.base_model.0.name"] == "Tiny Llama 220K Instruct"
    assert found["general.base_model.0.repo_url"] == f"https://huggingface.co/{REPOSITORY}"
    assert found["general.basename"] == "Tiny-Llama" and "general.size_label" not in found
    assert found["general.finetune"].endswith("MoD-kv-ffn")
    assert (found["general.license"], found["general.license.name"]) == ("other", "tiny")
    assert "general.quantized_by" not in found


def test_the_converter_gets_what_it_does_not_find(mod_dir):
    about = metadata.describe(mod_dir, tiny.config({"kv": [2]}))
    about.quantized_by = metadata.QUANTIZED_BY
    given = json.loads(json.dumps(metadata.override(about)))
    assert given["general.name"] == "Tiny-Llama-220K-Instruct"
    assert given["general.finetune"] == "Instruct-MoD-kv"
    assert given["general.base_models"][0]["organization"] == "Org"
    assert given["general.quantized_by"] == "mod-export"
    assert metadata.file_name(about, "q8_0") == "Tiny-Llama-220K-Instruct-MoD-kv-Q8_0.gguf"
    dense = metadata.describe(mod_dir, None)
    assert metadata.file_name(dense, "f16") == "Tiny-Llama-220K-Instruct-F16.gguf"
    assert "mixture-of-depths" not in metadata.override(dense)["general.tags"]
