"""Export read back with gguf-py, the schema's rules as inspect enforces them, and bad input to
both.

The base weights come from llama.cpp's own converter, so its unpatched run on the same model without
routers is what every tensor and key has to equal, byte for byte.
"""

import functools
import json
import math
import random
import re
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.export import export, read_directory
from mod_export.formats import schema
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.hf_directory import stored_type
from mod_export.formats.kv_size import ROLLBACK_TOKENS
from mod_export.inspection import inspect, render
from mod_export.llamacpp import converter
from tests.support import tiny_torch as tiny
from tests.support.tiny_gguf import Tiny

UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


def add_vocabulary(folder) -> None:
    """A SentencePiece vocabulary made on the spot: small, and the converter asks no more of it than
    of any other.
    """
    import sentencepiece

    words = ["one", "two", "three", "red", "blue", "sky", "sea"]
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
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


@functools.cache  # gguf-py takes seconds for a vocabulary
def reader_of(path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def keys_of(path) -> dict:
    """Name -> types and value, or the bytes of a long array."""
    fields = [
        field for name, field in reader_of(path).fields.items() if not name.startswith("GGUF.")
    ]
    return {
        f.name: (f.types, f.contents() if len(f.data) < 100 else b"".join(map(bytes, f.parts)))
        for f in fields
    }


def tensors_of(path) -> dict:
    return {
        t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in reader_of(path).tensors
    }


def assert_same_base(mod, base, *, ignore=()) -> None:
    """`mod` is `base` and nothing but the schema's keys and tensors more."""
    ours, theirs = keys_of(mod), keys_of(base)
    assert {name: ours.get(name) for name in theirs if name not in ignore} == {
        name: value for name, value in theirs.items() if name not in ignore
    }
    assert all(name.startswith("llama.mod.") for name in ours.keys() - theirs.keys())
    ours, theirs = tensors_of(mod), tensors_of(base)
    assert {name: ours.get(name) for name in theirs} == theirs
    assert all(schema.ROUTER_TENSOR.fullmatch(name) for name in ours.keys() - theirs.keys())


def test_base_is_what_the_converter_writes(mod_f32, base_f32):
    assert_same_base(
        mod_f32, base_f32, ignore=["general.name", "general.size_label", "general.finetune"]
    )


def test_keys_and_types(mod_f32, mod_dir):
    config, _ = read_directory(mod_dir)
    V = gguf.GGUFValueType
    keys = {
        name: value for name, value in keys_of(mod_f32).items() if name.startswith("llama.mod.")
    }
    expected = {
        "llama.mod.version": ([V.UINT32], 1),
        "llama.mod.gating_func": ([V.STRING], "sigmoid"),
        "llama.mod.scale_output": ([V.BOOL], False),
        "llama.mod.sink_tokens": ([V.UINT32], config.sink_tokens),
        "llama.mod.kv_window": ([V.UINT32], config.kv_window),
    }
    for kind in UNITS:
        for name in ("threshold", "activation"):
            values = np.float32(getattr(config.units[kind], name)).tolist()
            expected[f"llama.mod.{kind}.{name}"] = ([V.ARRAY, V.FLOAT32], values)
    assert keys == expected


def test_router_tensors(mod_f32, mod_dir):
    config, routers = read_directory(mod_dir)
    assert config.routed() == [(2, "kv"), (3, "kv"), (3, "attn"), (4, "ffn")]
    tensors = tensors_of(mod_f32)
    for unit in config.routed():
        weight, bias = routers[unit]
        names = schema.tensor_names(*unit)
        assert tensors[names[0]] == (
            gguf.GGMLQuantizationType.F32,
            (len(weight),),
            weight.tobytes(),
        )
        assert tensors[names[1]] == (gguf.GGMLQuantizationType.F32, (1,), bias.tobytes())


def test_data_is_aligned(mod_f32):
    reader = reader_of(mod_f32)
    assert all(tensor.data_offset % reader.alignment == 0 for tensor in reader.tensors)


def test_quantised_by_llama_cpp_and_f32_routers(mod_dir, base_f32, tmp_path):
    mod, dense = tmp_path / "mod.gguf", tmp_path / "dense.gguf"
    export(mod_dir, dense, "q8_0", base=base_f32, dense=True)
    export(mod_dir, mod, "q8_0", base=base_f32)
    assert_same_base(mod, dense)
    types = {name: tensor[0].name for name, tensor in tensors_of(mod).items()}
    assert types["blk.3.mod_kv.weight"] == types["blk.3.mod_kv.bias"] == "F32"
    assert types["blk.3.attn_q.weight"] == "Q8_0"


def test_routers_on_an_existing_file(mod_dir, base_f32, tmp_path):
    export(mod_dir, tmp_path / "mod.gguf", base=base_f32)
    assert_same_base(tmp_path / "mod.gguf", base_f32)


def test_other_alignment_and_trailing_bytes(mod_dir, base_f32, tmp_path):
    """Alignment is a key of the file; what follows the last tensor is not copied."""
    odd = tmp_path / "odd.gguf"
    reader = reader_of(base_f32)
    writer = gguf.GGUFWriter(odd, "llama")
    writer.add_custom_alignment(256)
    for name in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", reader.fields[f"llama.{name}"].contents())
    writer.add_array("some.strings", ["a", "", "ä"])
    writer.add_int8("some.int8", -3)
    writer.add_float64("some.float64", 0.1)
    for tensor in reader.tensors[:5]:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    odd.write_bytes(odd.read_bytes() + b"trailing")
    export(mod_dir, tmp_path / "mod.gguf", base=odd)
    assert_same_base(tmp_path / "mod.gguf", odd)
    assert all(tensor.data_offset % 256 == 0 for tensor in reader_of(tmp_path / "mod.gguf").tensors)


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


def test_stored_type(mod_dir, tmp_path):
    assert stored_type(mod_dir) == "f32"
    tiny.base().bfloat16().save_pretrained(tmp_path / "half")
    assert stored_type(tmp_path / "half") == "bf16"


# --- inspect


def test_inspect_tells_what_export_wrote(mod_f32, mod_dir):
    config, _ = read_directory(mod_dir)
    report = inspect(mod_f32)
    assert [(unit["layer"], unit["kind"]) for unit in report["mod"]["units"]] == config.routed()
    assert report["mod"]["activation"] == {"kv": 0.5, "attn": 0.5, "ffn": 0.5, "all": 0.5}
    assert json.loads(json.dumps(report)) == report
    assert "4 routed units" in render(report)


def test_expected_kv(mod_f32):
    kv = inspect(mod_f32)["mod"]["kv"]
    per_layer = 2 * 2 * 16 * 2  # K and V, 2 heads of 16 values, f16
    assert kv["bytes_per_token_dense"] == 6 * per_layer
    [first, *_] = kv["expected"]
    window = 8 + ROLLBACK_TOKENS
    kept = window + 0.5 * (1000 - window)
    # layer 2: kv; layer 3: kv and attn; the other four are complete
    assert first["bytes_mod"] == round(per_layer * (4 * 1000 + kept + 0.5 * kept))
    assert math.isclose(first["share"], first["bytes_mod"] / (6000 * per_layer))


def test_inspect_a_dense_file(base_f32):
    report = inspect(base_f32)
    assert report["mod"] is None and "dense" in render(report)


def test_inspect_json(run_cli, mod_f32):
    result = run_cli("inspect", mod_f32, "--json")
    assert json.loads(result.stdout) == inspect(mod_f32)


def test_truncated_at_random_places(mod_f32, tmp_path):
    data = mod_f32.read_bytes()
    short = tmp_path / "short.gguf"
    rng = random.Random(0)
    header = GGUFFile.open(mod_f32).data_start
    ends = [rng.randrange(4, header) for _ in range(10)] + [
        rng.randrange(header, len(data) - 64) for _ in range(10)
    ]
    for end in ends:
        short.write_bytes(data[:end])
        with pytest.raises(UserError, match="truncated|damaged"):
            inspect(short)


def test_damaged_at_random_places(tmp_path):
    """Any byte of the header may be wrong: a report or a UserError, never another exception."""
    bad_file(tmp_path / "good.gguf")
    data, rng, refused = (tmp_path / "good.gguf").read_bytes(), random.Random(1), 0
    header = GGUFFile.open(tmp_path / "good.gguf").data_start
    for _ in range(400):
        damaged = bytearray(data)
        for place in rng.sample(range(4, header), 2):
            damaged[place] = rng.randrange(256)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        try:
            render(inspect(tmp_path / "bad.gguf"))
        except UserError:
            refused += 1
    assert refused > 100


# what is wrong -> a part of the message; the file is made by gguf-py from tests/tiny_gguf.py
NAN, WIDTH = float("nan"), 32
BAD = {
    "threshold 1": (dict(p=1.0), "threshold"),
    "threshold negative": (dict(p=-0.5), "threshold"),
    "threshold nan": (dict(p=NAN), "threshold"),
    "weight nan": (dict(weight=np.full(WIDTH, NAN, np.float32)), "blk.2.mod_kv.weight"),
    "bias infinite": (dict(bias=np.array([np.inf], np.float32)), "blk.2.mod_kv.bias"),
    "weight short": (dict(weight=np.zeros(WIDTH // 2, np.float32)), "blk.2.mod_kv.weight"),
    "weight f16": (dict(weight=np.zeros(WIDTH, np.float16)), "blk.2.mod_kv.weight"),
    "bias missing": (dict(bias=None), "blk.2.mod_kv.bias is missing"),
    "window 0": (dict(kv_window=0), "kv_window"),
    "version 2": (dict(version=2), "version"),
    "gating": (dict(gating_func="softmax"), "gating_func"),
    "no version": (dict(version=None), "version is missing"),
    "block beside attn": (dict(kinds=["block", "attn"]), "block"),
    "no complete layer": (dict(layers=[0, 1, 2]), "complete"),
    "router without threshold": (dict(layers=[2], thresholds=[1]), "mod_kv"),
    "short array": (dict(n_values=2), "values"),
}


def bad_file(
    path,
    p=0.5,
    weight=...,
    bias=...,
    kinds=("kv",),
    layers=(2,),
    thresholds=None,
    n_values=3,
    **keys,
):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 3,
        "embedding_length": WIDTH,
        "attention.head_count": 2,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    keys = {"version": 1, "gating_func": "sigmoid", "sink_tokens": 4, "kv_window": 64} | keys
    for name, value in keys.items():
        if value is not None:
            getattr(writer, "add_string" if isinstance(value, str) else "add_uint32")(
                f"llama.mod.{name}", value
            )
    writer.add_bool("llama.mod.scale_output", False)
    writer.add_tensor("token_embd.weight", np.zeros((4, WIDTH), np.float32))
    for kind in kinds:
        routed = thresholds or layers
        writer.add_array(
            f"llama.mod.{kind}.threshold", [p if i in routed else 0.0 for i in range(n_values)]
        )
        writer.add_array(
            f"llama.mod.{kind}.activation", [0.5 if i in routed else 1.0 for i in range(n_values)]
        )
        for layer in layers:
            for name, value, good in zip(
                schema.tensor_names(layer, kind),
                (weight, bias),
                (np.ones(WIDTH), np.zeros(1)),
                strict=True,
            ):
                if value is not None:
                    writer.add_tensor(name, good.astype(np.float32) if value is ... else value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def test_good_file_of_the_same_make(tmp_path):
    bad_file(tmp_path / "good.gguf")
    assert inspect(tmp_path / "good.gguf")["mod"]["units"] == [
        {"layer": 2, "kind": "kv", "threshold": 0.5, "activation": 0.5}
    ]


@pytest.mark.parametrize("what", BAD)
def test_schema_rules(tmp_path, what):
    options, words = BAD[what]
    bad_file(tmp_path / "bad.gguf", **options)
    with pytest.raises(UserError, match=words):
        inspect(tmp_path / "bad.gguf")


# --- bad input to export


def refused(run_cli, folder, *args) -> str:
    """Run export in `folder`; demand one line and nothing left behind. Returns the line."""
    before = sorted(folder.rglob("*"))
    result = run_cli("export", *args, cwd=folder)
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert sorted(folder.rglob("*")) == before
    return result.stderr


def test_existing_output(run_cli, mod_dir, base_f32, tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    assert "--force" in refused(run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", base_f32)
    assert (tmp_path / "out.gguf").read_text() == "mine"
    assert (
        run_cli(
            "export", mod_dir, "-o", "out.gguf", "--base", base_f32, "--force", cwd=tmp_path
        ).returncode
        == 0
    )
    assert inspect(tmp_path / "out.gguf")["mod"]


def test_bases_that_do_not_fit(run_cli, mod_dir, base_f32, mod_f32, tmp_path):
    assert "no such file" in refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "none.gguf"
    )
    assert "routers already" in refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", mod_f32
    )
    (tmp_path / "text.gguf").write_text("not a GGUF")
    assert "not a GGUF" in refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "text.gguf"
    )
    (tmp_path / "short.gguf").write_bytes(base_f32.read_bytes()[:-500])
    assert "truncated" in refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "short.gguf"
    )
    Tiny(n_layer=6, n_embd=32).write(tmp_path / "narrow.gguf")
    assert "n_embd" in refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "narrow.gguf"
    )
    Tiny(n_layer=3, n_embd=64).write(tmp_path / "flat.gguf")
    assert "3 layers" in refused(
        run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--base", "flat.gguf"
    )


def test_outputs_that_cannot_be(run_cli, mod_dir, tmp_path):
    assert "no directory" in refused(run_cli, tmp_path, mod_dir, "-o", "none/out.gguf")
    (tmp_path / "folder").mkdir()
    assert "not a regular file" in refused(run_cli, tmp_path, mod_dir, "-o", "folder", "--force")
    assert "quant" in refused(run_cli, tmp_path, mod_dir, "-o", "out.gguf", "--quant", "q3_14")


def edited(mod_dir, folder, config=None, tensors=None):
    """A copy of the MoD directory with its mod config or its tensors changed."""
    from safetensors.numpy import load_file, save_file

    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(mod_dir, copy)
    if config:
        data = json.loads((copy / "config.json").read_text())
        config(data)
        (copy / "config.json").write_text(json.dumps(data))
    if tensors:
        weights = load_file(copy / "model.safetensors")
        tensors(weights)
        save_file(weights, copy / "model.safetensors")
    return copy


def test_directories_that_are_no_mod_model(run_cli, mod_dir, tmp_path):
    assert "config.json" in refused(run_cli, tmp_path, "none", "-o", "out.gguf")
    copy = edited(mod_dir, tmp_path, config=lambda data: data.pop("mod"))
    assert "no MoD model" in refused(run_cli, tmp_path, copy, "-o", "out.gguf")
    copy = edited(mod_dir, tmp_path, config=lambda data: data["mod"].update(kv_window=0))
    assert "kv_window" in refused(run_cli, tmp_path, copy, "-o", "out.gguf")
    (copy / "config.json").write_text("{")
    assert "no JSON" in refused(run_cli, tmp_path, copy, "-o", "out.gguf")


def test_directories_with_bad_tensors(mod_dir, tmp_path):
    name = schema.hf_tensor_names(3, "kv")[0]
    edits = {
        "is missing": lambda weights: weights.pop(name),
        "not of shape": lambda weights: weights.update({name: weights[name][:-1]}),
        "not finite": lambda weights: weights.update({name: weights[name] * np.nan}),
        "not f32": lambda weights: weights.update({name: weights[name].astype(np.float16)}),
        "no routed unit": lambda weights: weights.update(
            {name.replace(".3.", ".5."): weights[name]}
        ),
    }
    for words, edit in edits.items():
        with pytest.raises(UserError, match=words):
            read_directory(edited(mod_dir, tmp_path, tensors=edit))
    copy = edited(mod_dir, tmp_path)
    weights = (copy / "model.safetensors").read_bytes()
    for end in (3, 200, len(weights) // 2):
        (copy / "model.safetensors").write_bytes(weights[:end])
        with pytest.raises(UserError, match="truncated"):
            read_directory(copy)


def test_unsupported_architecture(run_cli, mod_dir, tmp_path):
    copy = edited(
        mod_dir, tmp_path, config=lambda data: data.update(architectures=["NoSuchForCausalLM"])
    )
    assert "NoSuchForCausalLM" in refused(run_cli, tmp_path, copy, "-o", "out.gguf")
