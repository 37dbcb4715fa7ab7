"""Which types K and V can have, and what they take."""

import pytest

from mod_export.errors import UserError
from mod_export.formats import kv_types
from mod_export.formats.kv_size import kv_layers
from mod_export.formats.kv_types import KVTypes
from tests.unit.formats.test_kv_size import write

Q8_0, Q4_0, F16 = 8, 2, 1


def test_names_and_numbers():
    assert KVTypes.parse("q8_0/q4_0").numbers == (Q8_0, Q4_0)
    assert KVTypes.parse("q8_0") == KVTypes("q8_0", "q8_0")
    assert str(KVTypes("q8_0", "f16")) == "q8_0/f16" and str(KVTypes()) == "f16"
    assert KVTypes.given(None, "q4_0") == KVTypes("f16", "q4_0")
    assert KVTypes.given(None, None) is None
    assert KVTypes("q8_0", "q4_0").sizes == (34 / 32, 18 / 32)
    assert kv_types.type_number("Q8_0") == kv_types.type_number(Q8_0) == Q8_0
    for value in ("q9", "q6_k", 14, "", None, 1.5):
        with pytest.raises(UserError, match="cannot hold K in .*; use one of f32, f16, bf16, q8_0"):
            kv_types.type_number(value, "K")
    with pytest.raises(UserError, match="'q8_0/f16/f16' is unknown"):
        KVTypes.parse("q8_0/f16/f16")


def test_bytes_of_a_token(tmp_path):
    file = write(tmp_path / "keys.gguf", "llama", 2, embedding_length=512, attention__head_count=8)
    (layer, _) = kv_layers(file, *KVTypes("q8_0", "q4_0").sizes)
    assert layer.bytes_per_token == 8 * (64 // 32 * 34 + 64 // 32 * 18)


def test_heads_without_whole_blocks(tmp_path):
    keys = {"attention__key_length": 80, "attention__value_length": 64}
    file = write(tmp_path / "keys.gguf", "llama", 3, **keys)
    KVTypes("f16", "q8_0").check(file)
    with pytest.raises(
        UserError, match="K in q8_0 has blocks of 32 .* head of layer 0 has 80; use"
    ):
        KVTypes("q8_0", "q8_0").check(file)
    # the heads of sliding layers have another size
    keys = {"attention__key_length_swa": 48, "attention__sliding_window": 9}
    file = write(tmp_path / "swa.gguf", "gemma3", 7, attention__key_length=64, **keys)
    with pytest.raises(UserError, match="head of layer 0 has 48"):
        KVTypes("q4_0", "f16").check(file)


def test_other_refusals(tmp_path):
    file = write(tmp_path / "keys.gguf", "llama", 2, embedding_length=256)
    with pytest.raises(UserError, match="V in q8_0 needs flash attention; switch"):
        KVTypes("f16", "q8_0").check(file, flash_attn=False)
    KVTypes("q8_0", "f16").check(file, flash_attn=False)
    file = write(tmp_path / "mla.gguf", "deepseek2", 2, attention__key_length_mla=64)
    with pytest.raises(UserError, match="computes V from K; use one type for both"):
        KVTypes("f16", "bf16").check(file)
