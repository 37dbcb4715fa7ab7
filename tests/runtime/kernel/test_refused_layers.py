"""Layers that can have no router, and layers that the memory cannot hold: refused at load.

The files are made without the checks of the export.
"""

import llama_cpp
import pytest

from mod_export.errors import UserError
from mod_export.formats import architectures, schema
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime.log import kept_log, reason
from mod_export.units import ATTN, BLOCK, FFN, KV, UNIT_KINDS, Unit
from tests.support.architectures import memory, models, routers
from tests.support.bad_gguf import key, set_key
from tests.support.mutated_gguf import ARRAY, U32, join, split

# Each third of the 15 layers is a full one. Layers 12 and 13 read the K/V of layer 10, 14 of 11.
SLIDES = "it attends to a sliding window, where only ffn units can be"
LAYERS = {
    0: SLIDES,
    10: SLIDES,
    11: "layer 14 reads its K/V",
    12: SLIDES,
    14: "it reads the K/V of layer 11",
}


def load(path) -> str:
    """What the library says where it does not load a file; nothing where it does."""
    with kept_log() as log:
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
    if not model:
        return reason(log)
    llama_cpp.llama_model_free(model)
    return ""


@pytest.mark.parametrize("kind", [KV, ATTN, BLOCK])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_layer_remembers_for_others_cannot_be_routed(layer, kind, tmp_path):
    model = memory.file("gemma4-e")
    path = routers.route(model, tmp_path / "mod.gguf", [Unit(2, KV), Unit(layer, kind)])
    assert load(path) == (
        f"mod: layer {layer} of architecture 'gemma4' cannot have a router for '{kind}': "
        f"{LAYERS[layer]}"
    )


@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_a_layer_with_a_window_can_have_ffn_units_only(name, tmp_path):
    model = memory.file(name)
    for kind in (KV, ATTN, BLOCK, FFN):
        path = routers.route(model, tmp_path / "mod.gguf", [Unit(model.sliding[1], kind)])
        assert (SLIDES in load(path)) is (kind != FFN)


def can_have(model, layer: int, kind: str) -> bool:
    if kind == FFN:
        return not model.ffn_only or layer in model.ffn_only
    if layer in model.recurrent:
        return model.both and kind == KV
    return layer not in model.ffn_only and not (model.ffn_only and kind == ATTN)


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    files = models.write(tmp_path_factory.mktemp("hybrids"), list(models.HYBRIDS))
    return {model.name: model for model in files}


@pytest.mark.parametrize("name", models.HYBRIDS)
def test_units_of_hybrids_stand_where_they_can_at_load_and_at_export(hybrids, name, tmp_path):
    """On the first layers with a state, with full attention, and with an FFN alone."""
    model = hybrids[name]
    for layer in {*model.recurrent[:1], *model.full[:1], *model.ffn_only[:1]}:
        for kind in UNIT_KINDS:
            path = routers.route(model, tmp_path / "mod.gguf", [Unit(layer, kind)])
            said, file = load(path), GGUFFile.open(path)
            config, _ = schema.read_routers(file)
            if can_have(model, layer, kind):
                architectures.check_units(file, config)
                assert said == ""
                continue
            assert said.startswith(
                f"mod: layer {layer} of architecture '{name}' cannot have a router for '{kind}': it"
            )
            with pytest.raises(UserError, match=f"layer {layer} .*: it ha|'{name}' cannot have"):
                architectures.check_units(file, config)


def fewer_heads(parts) -> None:
    """The last layer, which needs no K and V, has one head of them."""
    entry = key(parts, "attention.head_count_kv")
    entry.type, entry.item, entry.value = ARRAY, U32, [2] * 14 + [1]
    for info in parts.tensors:
        if info.name in (b"blk.14.attn_k.weight", b"blk.14.attn_v.weight"):
            info.name = info.name.replace(b"attn", b"none")


OF_ANOTHER_KIND = "reads the K/V of layer 11, whose attention is of another kind"
FAULTS = {
    "no layer has K/V": (
        set_key("shared_kv_layers", 15),
        "layer 0 has no K/V, and no layer before it has any",
    ),
    "one layer has K/V": (
        set_key("shared_kv_layers", 14),
        "layer 1 has no K/V, and no layer before it has any",
    ),
    "layer 11 slides": (
        set_key("attention.sliding_window_pattern", [i % 3 != 2 or i == 11 for i in range(15)]),
        f"layer 14 {OF_ANOTHER_KIND}",
    ),
    "other heads": (fewer_heads, f"layer 14 {OF_ANOTHER_KIND}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_layers_that_read_the_keys_of_none(fault, tmp_path):
    edit, why = FAULTS[fault]
    parts = split(routed_bytes(tmp_path))
    edit(parts)
    (tmp_path / "bad.gguf").write_bytes(join(parts))
    assert load(tmp_path / "bad.gguf") == f"mod: architecture 'gemma4' cannot have routers: {why}"


@pytest.mark.parametrize("size", [0, 1 << 31])
def test_windows_of_no_size(size, tmp_path):
    parts = split(routed_bytes(tmp_path))
    set_key("attention.sliding_window", size)(parts)
    (tmp_path / "bad.gguf").write_bytes(join(parts))
    assert f"layer 0 has a sliding window of {size} tokens" in load(tmp_path / "bad.gguf")


def routed_bytes(folder) -> bytes:
    path = routers.route(memory.file("gemma4-e"), folder / "mod.gguf", [Unit(2, KV)])
    assert load(path) == ""
    return path.read_bytes()
