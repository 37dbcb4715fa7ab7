"""The rewriter: what does not change is copied byte for byte, whatever the layout of the file."""

import gguf
import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.export import export
from mod_export.formats.ggml_types import F32_TYPE
from mod_export.formats.gguf import GGUFFile, rewrite
from tests.support.mod_files import (
    assert_same_base,
    keys_of,
    reader_of,
    tensors_of,
    write_directory,
)
from tests.support.tiny_gguf import Tiny

UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A dense file."""
    return Tiny(n_layer=6, n_embd=64, n_head=2, n_ff=64).write(
        tmp_path_factory.mktemp("gguf") / "plain.gguf"
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory, plain):
    """A file of another alignment, with keys of many types and bytes after its last tensor."""
    path = tmp_path_factory.mktemp("gguf") / "odd.gguf"
    reader = reader_of(plain)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", reader.fields[f"llama.{name}"].contents())
    writer.add_array("some.strings", ["a", "", "ä"])
    writer.add_int8("some.int8", -3)
    writer.add_float64("some.float64", 0.1)
    for tensor in reader.tensors[:5]:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes() + b"trailing")
    return path


def rewritten(source, target, **changes):
    with target.open("wb") as out:
        rewrite(GGUFFile.open(source), out, **changes)
    return target


def test_without_changes_it_is_the_same_file(plain, odd, tmp_path):
    assert rewritten(plain, tmp_path / "plain").read_bytes() == plain.read_bytes()
    same = rewritten(odd, tmp_path / "odd").read_bytes()
    assert same + b"trailing" == odd.read_bytes()
    every = {name: name for name in GGUFFile.open(odd).tensors}
    assert rewritten(odd, tmp_path / "odd", kept_tensors=every).read_bytes() == same


def test_a_source_that_is_used_up(plain, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(plain.read_bytes())
    before = source.stat().st_blocks
    assert rewritten(source, tmp_path / "new", consume=True).read_bytes() == plain.read_bytes()
    assert source.stat().st_blocks < before // 4


def test_other_alignment_and_trailing_bytes(odd, tmp_path):
    """Alignment is a key of the file; what follows the last tensor is not copied."""
    mod = write_directory(tmp_path / "mod", UNITS)
    export(mod, tmp_path / "mod.gguf", base=odd)
    assert_same_base(tmp_path / "mod.gguf", odd)
    assert all(tensor.data_offset % 256 == 0 for tensor in reader_of(tmp_path / "mod.gguf").tensors)


def test_keys_added_changed_and_dropped(odd, tmp_path):
    path = rewritten(
        odd,
        tmp_path / "x.gguf",
        added_keys=[("new.text", "string", "ö"), ("new.list", "f32[]", (0.5, 1.0))],
        changed_keys={"some.int8": 5, "llama.block_count": 7},
        dropped_keys=["some.strings"],
    )
    before, after = keys_of(odd), keys_of(path)
    types = gguf.GGUFValueType
    assert after == {name: value for name, value in before.items() if name != "some.strings"} | {
        "some.int8": ([types.INT8], 5),
        "llama.block_count": ([types.UINT32], 7),
        "new.text": ([types.STRING], "ö"),
        "new.list": ([types.ARRAY, types.FLOAT32], [0.5, 1.0]),
    }
    assert tensors_of(path) == tensors_of(odd)


def test_tensors_added_dropped_and_renamed(odd, tmp_path):
    first, second, third, *_ = GGUFFile.open(odd).tensors
    values = np.arange(10, dtype=np.float32).reshape(2, 5)
    path = rewritten(
        odd,
        tmp_path / "x.gguf",
        kept_tensors={third: "renamed", first: first},
        added_tensors={"added": values},
    )
    before, after = tensors_of(odd), tensors_of(path)
    f32 = gguf.GGMLQuantizationType.F32
    assert after == {
        first: before[first],
        "renamed": before[third],
        "added": (f32, (5, 2), values.tobytes()),
    }
    file = GGUFFile.open(path)
    assert list(file.tensors) == [first, "renamed", "added"] and second not in file.tensors
    assert (
        file.tensors["added"].type == F32_TYPE and (file.tensors["added"].array() == values).all()
    )
    assert all((tensor.start - file.data_start) % 256 == 0 for tensor in file.tensors.values())
    assert path.stat().st_size % 256 == 0


def test_numbers_of_a_model(plain, tmp_path):
    file = GGUFFile.open(plain)
    assert file.model_number("block_count") == 6
    for value in (0, 1 << 25):
        path = rewritten(plain, tmp_path / "x.gguf", changed_keys={"llama.block_count": value})
        with pytest.raises(UserError, match="key llama.block_count is missing or no sensible num"):
            GGUFFile.open(path).model_number("block_count")
    with pytest.raises(UserError, match="key llama.none is missing"):
        file.model_number("none")


def test_one_of_several_pieces_is_refused(plain, tmp_path):
    path = rewritten(plain, tmp_path / "x.gguf", added_keys=[("split.count", "u16", 2)])
    with pytest.raises(UserError, match="is one of several pieces of a model; merge them"):
        GGUFFile.open(path).refuse_split()
    GGUFFile.open(plain).refuse_split()


def test_a_piece_that_is_missing_is_named(plain, tmp_path):
    path = tmp_path / "m-00001-of-00002.gguf"
    rewritten(plain, path, added_keys=[("split.count", "u16", 2)])
    with pytest.raises(UserError, match="one of 2 files of a model, and m-00002-of-00002.gguf is"):
        GGUFFile.open(path).check_parts()
    (tmp_path / "m-00002-of-00002.gguf").touch()
    GGUFFile.open(path).check_parts()
    GGUFFile.open(plain).check_parts()
