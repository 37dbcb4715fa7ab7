"""Windows and sizes of K and V, from the keys of a file."""

import re

import gguf
import pytest

from mod_export.config import MoDConfig, UnitConfig
from mod_export.errors import UserError
from mod_export.formats import architectures
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import (
    LayerKV,
    expected_cells,
    kv_heads,
    kv_layers,
    lists_of_cells,
    mean_activation,
)
from mod_export.formats.sliding_windows import SLIDING, layer_windows
from mod_export.llamacpp import source

ARCHITECTURES = {"openai-moe": "gpt-oss", "granite-swa": "granite_swa", "spark2-5": "spark2_5"}


def write(path, arch: str, n_layer: int = 7, **keys) -> GGUFFile:
    """A file of keys alone; `__` in a name stands for a dot."""
    writer = gguf.GGUFWriter(path, arch)
    given = {"embedding_length": 64, "attention__head_count": 4, "block_count": n_layer} | keys
    for name, value in given.items():
        name = f"{arch}.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile.open(path)


@pytest.mark.parametrize(
    "arch, keys, windows",
    [
        ("gemma3", {"window": 9}, (9, 9, 9, 9, 9, 0, 9)),
        ("gemma3", {"window": 9, "pattern": 3}, (9, 9, 0, 9, 9, 0, 9)),
        ("gemma3", {"window": 9, "pattern": [0, 1, 0, 0, 1, 0, 1]}, (0, 9, 0, 0, 9, 0, 9)),
        ("gemma3", {"window": 0}, (0,) * 7),
        ("gemma3", {}, (0,) * 7),
        ("gemma2", {}, (4096, 0, 4096, 0, 4096, 0, 4096)),
        ("gpt-oss", {"window": 128}, (128, 0, 128, 0, 128, 0, 128)),
        ("cohere2moe", {"window": 9}, (0, 9, 9, 9, 0, 9, 9)),
        ("gemma4", {"window": 9, "pattern": [True, False] * 3 + [True]}, (9, 0) * 3 + (9,)),
        ("step35", {"window": 9, "pattern": [True, False]}, (9, 0, 0, 0, 0, 0, 0)),
        ("llama4", {}, (8192, 8192, 8192, 0, 8192, 8192, 8192)),
        ("llama4", {"window": 9}, (8192, 8192, 8192, 0, 8192, 8192, 8192)),
        ("llama4", {"window": 0}, (0,) * 7),
        ("smallthinker", {"window": 9}, (0, 4096, 4096, 4096, 0, 4096, 4096)),
        ("lfm2", {"window": 9}, (9,) * 7),
        ("exaone4", {"window": 9}, (0,) * 7),  # its 1.2B
        ("phi3", {"window": 9}, (0,) * 7),  # llama.cpp has it off
        ("llama", {"window": 9}, (0,) * 7),  # Mistral 7B v0.1
    ],
)
def test_windows(tmp_path, arch, keys, windows):
    names = {"window": "attention__sliding_window", "pattern": "attention__sliding_window_pattern"}
    file = write(tmp_path / "keys.gguf", arch, **{names[key]: keys[key] for key in keys})
    assert layer_windows(file) == windows


def test_the_large_exaone4_and_layers_that_predict_further(tmp_path):
    windows = layer_windows(write(tmp_path / "a.gguf", "exaone4", 64))
    assert windows == (4096, 4096, 4096, 0) * 16
    file = write(
        tmp_path / "b.gguf", "afmoe", 5, attention__sliding_window=9, nextn_predict_layers=1
    )
    assert layer_windows(file) == (9, 9, 9, 0, 0)
    assert [layer.bytes_per_token for layer in kv_layers(file)] == [256] * 4


def test_sizes_of_layers(tmp_path):
    """Heads for each layer, other sizes in sliding layers, and layers that take K/V of others."""
    file = write(
        tmp_path / "keys.gguf",
        "gemma4",
        5,
        attention__sliding_window=9,
        attention__sliding_window_pattern=[True, False, True, False, True],
        attention__head_count_kv=[2, 1, 2, 1, 2],
        attention__key_length=32,
        attention__value_length=32,
        attention__key_length_swa=8,
        attention__value_length_swa=16,
        attention__shared_kv_layers=2,
    )
    assert kv_layers(file) == [
        LayerKV(2 * (8 + 16) * 2, 9),
        LayerKV(64 * 2, 0),
        LayerKV(2 * (8 + 16) * 2, 9),
        LayerKV(0, 0),
        LayerKV(0, 9),
    ]
    assert kv_layers(file, 1, 4)[1].bytes_per_token == 32 * 5


def test_cells_that_llama_cpp_keeps():
    """The figures of a context's log: `creating SWA KV cache, size = 1024 cells`."""
    sliding, full = LayerKV(2, 512), LayerKV(2)
    assert [full.dense_cells(n) for n in (10, 5000)] == [10, 5000]
    assert [sliding.dense_cells(n) for n in (10, 1024, 5000)] == [10, 1024, 1024]
    assert sliding.dense_cells(5000, ubatch=128) == 768
    assert sliding.dense_cells(5000, ubatch=128, sequences=3) == 1792
    assert sliding.dense_bytes(5000) == 2048


@pytest.mark.parametrize(
    "key, value",
    [
        ("attention__sliding_window", "wide"),
        ("attention__sliding_window_pattern", "every other"),
        ("nextn_predict_layers", "one"),
        ("attention__shared_kv_layers", "all"),
    ],
)
def test_keys_that_are_no_numbers(tmp_path, key, value):
    keys = {"attention__sliding_window": 9} | {key: value}
    with pytest.raises(UserError, match=key.replace("__", ".")):
        kv_layers(write(tmp_path / "keys.gguf", "gemma3", **keys))


@pytest.mark.skipif(not source.is_unpacked(stock=True), reason="needs the source of llama.cpp")
def test_the_table_is_that_of_the_source():
    """A new architecture, or another pattern, must not go unnoticed."""
    folder = source.source_dir(stock=True) / source.LLAMA_CPP / "src/models"
    found = {}
    for path in sorted(folder.glob("*.cpp")):
        code = path.read_text(encoding="utf-8")
        name = ARCHITECTURES.get(path.stem, path.stem)
        if match := re.search(r"load_swa_pattern\(ml, (\d+)(, .*true)?\)", code):
            found[name] = int(match[1]), bool(match[2])
        elif "SLIDING_WINDOW_PATTERN, hparams.is_swa_impl" in code:
            found[name] = None, False
        elif re.search(r"swa_type += LLAMA_SWA_TYPE_(STANDARD|CHUNKED)", code):
            found[name] = 0, False
    assert found == {name: (rule.period, rule.full_first) for name, rule in SLIDING.items()}


def test_which_layers_can_be_routed(tmp_path):
    """Units that decide what is remembered need full attention, and K and V of their own."""
    keys = {
        "attention__sliding_window": 64,
        "attention__sliding_window_pattern": [True, False] * 3,
        "attention__shared_kv_layers": 2,
    }
    file = write(tmp_path / "gemma4.gguf", "gemma4", 6, **keys)
    assert architectures.routable_layers(file, "kv") == [1]
    assert architectures.routable_layers(file, "ffn") == list(range(6))
    reasons = {0: "a sliding window of 64 tokens", 3: "later layers read", 5: "of an earlier layer"}
    for layer, reason in reasons.items():
        thresholds = tuple(0.5 if i == layer else 0.0 for i in range(6))
        unit = UnitConfig(threshold=thresholds, activation=(1.0,) * 6)
        with pytest.raises(UserError, match=f"layer {layer} .* kv unit: .*{reason}.*") as exc:
            architectures.check_units(file, MoDConfig(units={"kv": unit}))
        assert "(1)" in exc.value.cure


@pytest.mark.parametrize(
    ("architecture", "kind", "layers", "reason"),
    [
        ("qwen35", "kv", [3, 7], "a recurrent state"),
        ("qwen35", "ffn", list(range(8)), None),
        ("falcon-h1", "kv", list(range(8)), None),
        ("falcon-h1", "block", [], None),
        ("jamba", "attn", [4], "a recurrent state"),
        ("nemotron_h", "ffn", [1, 3, 5, 7], "no FFN"),
        ("nemotron_h", "kv", [4], "a recurrent state"),
        ("nemotron_h", "block", [4], "a recurrent state"),
        ("nemotron_h", "attn", [], None),
    ],
)
def test_hybrids_route_attention_where_they_attend(tmp_path, architecture, kind, layers, reason):
    keys = {"attention__head_count": 2, "attention__head_count_kv": 2}
    if architecture in ("jamba", "nemotron_h"):
        keys["attention__head_count_kv"] = [0, 0, 0, 0, 2, 0, 0, 0]
    if architecture == "nemotron_h":
        keys["feed_forward_length"] = [0, 16] * 4
    file = write(tmp_path / "hybrid.gguf", architecture, 8, **keys)
    assert architectures.routable_layers(file, kind) == layers
    if reason:
        thresholds = (0.5, *[0.0] * 7)
        unit = UnitConfig(threshold=thresholds, activation=(1.0,) * 8)
        with pytest.raises(UserError, match=f"layer 0 .* {kind} unit: it has {reason};") as exc:
            architectures.check_units(file, MoDConfig(units={kind: unit}))
        assert f"({', '.join(map(str, layers))})" in exc.value.cure


def test_layers_that_predict_further_tokens_read_no_kv_of_others(tmp_path):
    """They were taken for layers that share K and V, so that the last layer was refused."""
    keys = {"attention__sliding_window": 0, "nextn_predict_layers": 1}
    file = write(tmp_path / "glm4moe.gguf", "glm4moe", 4, **keys)
    assert architectures.routable_layers(file, "kv") == [0, 1, 2]
    assert architectures.routable_layers(file, "ffn") == [0, 1, 2]
    unit = UnitConfig(threshold=(0.0, 0.0, 0.0, 0.5), activation=(1.0,) * 4)
    with pytest.raises(UserError, match=f"layer 3 of {file.path} .* predicts tokens further on"):
        architectures.check_units(file, MoDConfig(units={"kv": unit}))
    with pytest.raises(UserError, match="layer 3 of mod cannot"):
        architectures.check_units(file, MoDConfig(units={"kv": unit}), "mod")


def test_cells_of_heads():
    """Each head has its own share and window; a head without a unit keeps every token."""
    kv = UnitConfig(
        threshold=(0.0, 0.0, 0.5, 0.5, 0.0, 0.5),
        activation=(1.0, 1.0, 0.25, 0.5, 1.0, 0.1),
        heads=2,
        window=(100, 100, 100, 36, 100, 100),
    )
    attn = UnitConfig((0.0, 0.5, 0.0), (1.0, 0.5, 1.0))
    config = MoDConfig(kv_window=100, units={"kv": kv, "attn": attn}).validate(3)
    assert expected_cells(config, 0, 1000) == 1000
    assert expected_cells(config, 1, 1000) == 0.5 * (164 + 0.25 * 836 + 100 + 0.5 * 900) / 2
    assert expected_cells(config, 1, 90) == 0.5 * 90
    assert expected_cells(config, 2, 1000) == (1000 + 164 + 0.1 * 836) / 2
    with_margin = 0.5 * (164 + 0.5 * 836 + 100 + 900) / 2
    assert expected_cells(config, 1, 1000, margin=1.0) == with_margin * 2
    assert [lists_of_cells(config, layer) for layer in range(3)] == [1, 2, 2]
    assert mean_activation(config) == {
        "kv": pytest.approx((0.25 + 0.5 + 0.1) / 3),
        "attn": 0.5,
        "all": pytest.approx(1.35 / 4),
    }


@pytest.mark.parametrize(
    ("keys", "heads"),
    [
        ({}, 4),
        ({"attention__head_count_kv": 2}, 2),
        ({"attention__head_count_kv": [2, 2, 2]}, 2),
        ({"attention__head_count_kv": [2, 1, 2]}, 1),
        ({"attention__head_count_kv": 4, "attention__key_length_mla": 8}, 1),
    ],
)
def test_heads_that_can_decide_apart(tmp_path, keys, heads):
    assert kv_heads(write(tmp_path / "keys.gguf", "llama", 3, **keys)) == heads
