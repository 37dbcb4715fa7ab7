"""Export through llama.cpp's own converter and quantiser, read back with gguf-py.

The converter's unpatched run on the same model without routers is what every tensor and key has to
equal, byte for byte. What needs no llama.cpp is in tests/unit: test_export.py, formats/.
"""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mod_export.export import export
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.llamacpp import converter
from tests.support import tiny_torch as tiny
from tests.support.gguf_models import changed
from tests.support.mod_files import (
    assert_same_base,
    edited,
    export_refused,
    reader_of,
    tensors_of,
)

UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


def add_vocabulary(folder) -> None:
    """Make a small SentencePiece vocabulary; the converter asks no more of a larger one."""
    import sentencepiece

    words = ["one", "two", "three", "red", "blue", "sky", "sea"]
    options = {
        "vocab_size": 295,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "byte_fallback": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{a} {b} is no {c}" for a in words for b in words for c in words),
        model_prefix=str(folder / "tokenizer"),
        **options,
    )
    (folder / "tokenizer.vocab").unlink()


@pytest.fixture(scope="module")
def mod_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mod"
    tiny.mod_model(UNITS).save(path)
    add_vocabulary(path)
    return path


@pytest.fixture(scope="module")
def base_f32(tmp_path_factory, mod_dir):
    """The converter's own file for the model without routers."""
    folder = tmp_path_factory.mktemp("base")
    plain = folder / "plain"
    tiny.base().save_pretrained(plain)
    shutil.copy(mod_dir / "tokenizer.model", plain)
    never = re.compile("(?!)")
    converter.convert_hf(plain, folder / "base.gguf", "f32", skip=never)
    return folder / "base.gguf"


@pytest.fixture(scope="module")
def mod_f32(tmp_path_factory, mod_dir):
    path = tmp_path_factory.mktemp("out") / "mod.gguf"
    export(mod_dir, path, "f32")
    return path


def test_base_is_what_the_converter_writes(mod_f32, base_f32):
    assert_same_base(
        mod_f32, base_f32, ignore=["general.name", "general.size_label", "general.finetune"]
    )


def test_data_is_aligned(mod_f32):
    reader = reader_of(mod_f32)
    assert all(tensor.data_offset % reader.alignment == 0 for tensor in reader.tensors)


def test_quantised_by_llama_cpp_and_f32_routers(mod_dir, base_f32, tmp_path):
    mod, dense = tmp_path / "mod.gguf", tmp_path / "dense.gguf"
    export(mod_dir, dense, "q8_0", base=base_f32, dense=True)
    export(mod_dir, mod, "q8_0", base=base_f32)
    assert_same_base(mod, dense)
    for path in (mod, dense):
        assert GGUFFile.open(path).get("general.quantized_by") == "mod-export"
    types = {name: tensor[0].name for name, tensor in tensors_of(mod).items()}
    assert types["blk.3.mod_kv.weight"] == types["blk.3.mod_kv.bias"] == "F32"
    assert types["blk.3.attn_q.weight"] == "Q8_0"


def test_types_that_came_out_otherwise_are_counted(mod_dir, base_f32, tmp_path, caplog):
    """Rows of 64 and 96 values hold no block of 256, so every matrix gets another type.

    The kernels of a convolution, which hybrids have, are quantised in no type.
    """
    kernels = np.ones((64, 4), np.float32)
    base = changed(
        base_f32, tmp_path / "base.gguf", added_tensors={"blk.0.ssm_conv1d.weight": kernels}
    )
    export(mod_dir, tmp_path / "mod.gguf", "q4_k_m", base=base)
    (line,) = caplog.messages
    assert line.startswith(
        "q4_k_m: 44 of 44 matrices have rows of 64 or 96 values, no multiple of 256, and got larger"
    )
    types = [tensor[0].name for tensor in tensors_of(tmp_path / "mod.gguf").values()]
    for name in {"Q5_0", "Q8_0"}:
        assert f"{types.count(name)} {name}" in line
    caplog.clear()
    export(mod_dir, tmp_path / "mod8.gguf", "q8_0", base=base_f32)
    assert caplog.messages == []


def test_what_the_converter_warns_of_is_passed_on(tmp_path, caplog):
    tiny.mod_model(UNITS, n_vocab=280).save(tmp_path / "mod")
    add_vocabulary(tmp_path / "mod")
    export(tmp_path / "mod", tmp_path / "mod.gguf", "f32")
    (line,) = caplog.messages
    assert line.startswith("llama.cpp's converter: ignore tokens from 280: id is out of range")


def test_routers_on_an_existing_file(mod_dir, base_f32, tmp_path):
    export(mod_dir, tmp_path / "mod.gguf", base=base_f32)
    assert_same_base(tmp_path / "mod.gguf", base_f32)


def test_what_counts_beyond_a_length_ends_the_context_there(mod_dir, tmp_path, caplog):
    """A sliding window shortens the context; dynamic scaling begins where the context ends."""
    for name, fields, context in (
        ("window", {"model_type": "mistral", "sliding_window": 100}, 100),
        (
            "dynamic",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
            2048,
        ),
    ):
        folder = edited(
            mod_dir, tmp_path / name, config=lambda data, fields=fields: data.update(fields)
        )
        caplog.clear()
        export(folder, tmp_path / f"{name}.gguf", "f32")
        (line,) = caplog.messages
        assert f"{context} tokens" in line
        assert GGUFFile.open(tmp_path / f"{name}.gguf").get("llama.context_length") == context


def test_memory_does_not_grow_with_the_file(mod_dir, base_f32, tmp_path):
    """A base of 400 MB is rewritten within 100 MB more than the interpreter itself takes."""
    big = tmp_path / "big.gguf"
    with open(big, "wb") as out:
        rewrite(
            GGUFFile.open(base_f32),
            out,
            added_tensors={"padding.weight": np.zeros((100, 1_000_000), np.float32)},
        )
    code = "import sys; from pathlib import Path; from mod_export.export import export\n"
    code += "export(Path(sys.argv[1]), Path(sys.argv[3]), base=Path(sys.argv[2]))\n"
    # not ru_maxrss, which a new process inherits from the one that starts it
    code += "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    arguments = [mod_dir, big, tmp_path / "mod.gguf"]
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "mod.gguf").stat().st_size > 400e6
    assert int(result.stdout) < 200_000, (
        result.stdout
    )  # kB; the interpreter with numpy takes about 60 000


def test_unsupported_architecture(run_cli, mod_dir, tmp_path):
    copy = edited(
        mod_dir,
        tmp_path / "copy",
        config=lambda data: data.update(architectures=["NoSuchForCausalLM"]),
    )
    assert "NoSuchForCausalLM" in export_refused(run_cli, tmp_path, copy, "-o", "out.gguf")
