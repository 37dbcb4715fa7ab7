"""The table of types agrees with gguf-py, whose numbers are those of llama.cpp."""

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from mod_export.errors import UserError
from mod_export.formats import ggml_types
from mod_export.formats.ggml_types import EXPORT_FORMATS, FILE_FORMATS, KV_TYPES, TYPE_NAMES


@pytest.mark.parametrize("format", FILE_FORMATS, ids=lambda format: format.name)
def test_numbers_are_those_of_gguf_py(format):
    assert GGMLQuantizationType[format.type_name.upper()] == format.type
    prefix = "ALL_" if format.name == "f32" else "MOSTLY_"
    assert LlamaFileType[prefix + format.name.upper()] == format.file_type
    assert ggml_types.block_layout(format.type) == GGML_QUANT_SIZES[format.type]


def test_plain_types():
    assert ggml_types.F32_TYPE == GGMLQuantizationType.F32
    for number, dtype in ggml_types.PLAIN_DTYPES.items():
        assert GGMLQuantizationType(number).name == f"{dtype[1].upper()}{8 * int(dtype[2])}"


def test_names_of_the_table():
    assert list(EXPORT_FORMATS)[:4] == ["f32", "f16", "bf16", "q8_0"]
    assert "q4_k_m" in EXPORT_FORMATS and "iq3_s" not in EXPORT_FORMATS
    assert "q4_K" in TYPE_NAMES and "iq3_s" in TYPE_NAMES and "q4_k_m" not in TYPE_NAMES
    assert set(KV_TYPES) == set("f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl".split())


def test_a_type_by_its_name():
    assert ggml_types.type_named("q4_K") == ggml_types.type_named("Q4_k") == 12
    assert ggml_types.file_type(12) == LlamaFileType.MOSTLY_Q4_K_S
    assert ggml_types.file_type(11) == LlamaFileType.MOSTLY_Q3_K_S
    with pytest.raises(UserError, match="iq2_xs needs importance data"):
        ggml_types.type_named("iq2_xs")
    with pytest.raises(UserError, match="unknown quantisation 'q4_k_m'; use f32, f16, bf16"):
        ggml_types.type_named("q4_k_m")


def test_sizes():
    assert ggml_types.row_bytes(4096, 12) == 4096 // 256 * 144
    assert ggml_types.block_size(8) == 32
    assert (ggml_types.bytes_per_value(1), ggml_types.bytes_per_value(8)) == (2, 1.0625)


def test_precision_of_a_file():
    found = {name: ggml_types.precision(number) for name, number in (("f32", 0), ("bf16", "32"))}
    assert found == {"f32": "f32", "bf16": "f16"}
    assert ggml_types.precision("1") == "f16" and ggml_types.precision(7) == "q8_0"
    assert ggml_types.precision(15) == ggml_types.precision("") == "lower"
