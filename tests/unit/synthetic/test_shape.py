"""Shapes, routing and outputs of synthetic models, without ggml's quantiser."""

from dataclasses import replace
from pathlib import Path

import pytest

from mod_export.errors import UserError
from mod_export.formats.ggml_types import type_named
from mod_export.synthetic.keys import header
from mod_export.synthetic.routers import SynthesisOptions, parse_activation, routing, routing_of
from mod_export.synthetic.shape import PRESETS, Shape
from mod_export.synthetic.tensors import weights
from mod_export.synthetic.write import synth

SHAPE = Shape(layers=5, embd=512, heads=8, heads_kv=2, ff=768, vocab=1024, ctx=4096, tied=True)
EXPERTS = {"experts": 8, "used": 2}


def make(
    path: Path,
    shape=SHAPE,
    quant="f32",
    units="kv",
    activation="0.5",
    dense=None,
    seed=0,
    **options,
) -> Path:
    options = {"layers": "2-", "kv_window": 64} | options
    synth(
        path,
        shape,
        quant,
        routing(shape.layers, SynthesisOptions(units, activation, **options), shape.heads_kv),
        dense,
        seed,
    )
    return path


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("135m", 134_515_008),
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("8b", 8_030_261_248),
        ("30b-a3b", 30_532_122_624 - 48 * 2 * 128),  # without the norms of Q and K
        ("qwen3.5-4b", 4_205_751_296),
        ("qwen3.5-9b", 8_953_803_264),
        ("qwen3.5-35b-a3b", 34_660_610_688),
        ("gpt-oss-20b", 20_914_757_184),
    ],
)
def test_presets_have_the_size_of_their_models(name, parameters):
    plan = weights(PRESETS[name].checked(), type_named("f16"))
    assert sum(weight.all_rows * weight.cols for weight in plan) == parameters


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 5}, "5 heads do not divide an embedding of 512; choose heads"),
        ({"heads": 512, "heads_kv": 2}, "heads have 1 values; .* RoPE turns pairs"),
        ({"experts": 8}, "0 of 8 experts are used; give --experts-used"),
        ({"experts": 8, "used": 9}, "9 of 8 experts are used"),
        ({"heads_kv": 3}, "3 K/V heads do not divide 8 heads"),
        ({"layers": 0}, "layers is 0; use a whole number from 1"),
        ({"vocab": 1 << 40}, "vocab is 1099511627776"),
        ({"layers": 513}, "513 layers are more than llama.cpp's 512"),
        ({"arch": "qwen35"} | EXPERTS, "qwen35 models do not have experts; leave --experts out"),
        ({"arch": "qwen35", "experts": 8}, "qwen35 models do not have experts"),
        ({"arch": "gpt-oss"}, "gpt-oss models have experts"),
        ({"arch": "gpt-oss"} | EXPERTS, "gpt-oss models need an output matrix; leave --tied out"),
        ({"arch": "qwen35", "head_size": 36}, "heads have 36 values; choose a multiple of 8"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(UserError, match=message):
        replace(SHAPE, **change).checked()


@pytest.mark.parametrize(
    "shape, quant, message",
    [
        (SHAPE, "q9_9", "unknown quantisation 'q9_9'; use f32, f16"),
        (SHAPE, "IQ2_XS", "IQ2_XS needs importance data"),
        (replace(SHAPE, embd=144), "q4_0", "embd 144 is no multiple of 32, the block of Q4_0"),
        (replace(SHAPE, ff=640), "q4_K", "ff 640 is no multiple of 256, the block of Q4_K; .*q4_0"),
        (PRESETS["135m"], "q6_k", "embd 576 is no multiple of 256"),
        (PRESETS["gpt-oss-20b"], "q4_K", "embd 2880 is no multiple of 256"),
        (replace(SHAPE, heads=3, heads_kv=1, head_size=48), "q4_0", "heads x head size 144 is no"),
        (SHAPE, "mxfp4", "MXFP4 is a type of experts, and the shape has none; use q4_0"),
        (
            replace(SHAPE, embd=64),
            "f32",
            "embd 64 is too small, .* F32 model reserve 64 of it; use 128 or more",
        ),
        (
            replace(SHAPE, embd=256),
            "q4_0",
            "embd 256 is too small, .* Q4_0 model reserve 256 of it; use 512 or more",
        ),
    ],
)
def test_quantisations_that_do_not_fit(tmp_path, shape, quant, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "m.gguf", shape, quant)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "0"}, r"activation '0' is not in \(0, 1\]; give a number"),
        ({"activation": "1.1"}, "is not in"),
        ({"activation": "nan"}, "is not in"),
        ({"activation": "half"}, "activation 'half' is neither a number nor kinds"),
        (
            {"activation": "attn=0.5"},
            r"activation 'attn=0.5' does not fit the units kv; .*: kv=0.5",
        ),
        ({"activation": "kv=0.5,kv=0.4"}, "activation 'kv=0.5,kv=0.4' names a kind twice"),
        ({"units": "mlp"}, "unknown kind of unit 'mlp'"),
        ({"units": "block+attn"}, "a block holds attention"),
        ({"layers": "0-"}, "every layer has a block, attn or kv router"),
        ({"layers": "3-9"}, "there is no layer 9 to route; the model has layers 0 to 4"),
        ({"layers": "7-"}, "there is no layer 7 to route"),
        ({"layers": "some"}, "cannot read layers 'some'"),
        ({"kv_window": 0}, "kv_window"),
    ],
)
def test_routing_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        routing(SHAPE.layers, SynthesisOptions(**options))


def test_units_stand_where_the_architecture_can_have_them():
    """kv units on layers with full attention, ffn units on any."""
    for name, full in (("qwen3.5-4b", (3, 7)), ("gpt-oss-20b", (1, 3, 5, 7))):
        file = header(replace(PRESETS[name], layers=8))
        routed = routing_of(file, SynthesisOptions("kv+ffn")).by_kind()
        assert tuple(sorted({unit.layer for unit in routed["kv"]})) == full
        assert [unit.layer for unit in routed["ffn"]] == list(range(2, 8))
        with pytest.raises(UserError, match=r"layer 2 of the shape cannot have a kv unit: it"):
            routing_of(file, SynthesisOptions("kv", layers="2-"))


def test_activation_of_each_kind():
    assert parse_activation("0.5", ["kv", "attn"]) == {"kv": 0.5, "attn": 0.5}
    assert parse_activation("attn=1, kv=0.25", ["kv", "attn"]) == {"kv": 0.25, "attn": 1.0}
    with pytest.raises(UserError, match="does not fit the units kv[+]attn"):
        parse_activation("kv=0.25", ["kv", "attn"])


def test_a_model_larger_than_any_disk_is_refused_before_work_starts(tmp_path):
    huge = replace(SHAPE, layers=512, embd=1 << 16, ff=1 << 18)
    with pytest.raises(
        UserError, match=r"takes up to [\d.]+ GB of disk, of which [\d.]+ GB are free; free some"
    ):
        make(tmp_path / "m.gguf", huge, dense=tmp_path / "dense.gguf")
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_in_the_way(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(UserError, match="m.gguf exists already; use --force"):
        make(path, dense=tmp_path / "dense.gguf")
    with pytest.raises(UserError, match="m.gguf exists already"):
        make(tmp_path / "new.gguf", dense=path)
    with pytest.raises(UserError, match="is both outputs"):
        make(tmp_path / "new.gguf", dense=tmp_path / "." / "new.gguf")
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_command_refuses_unknown_presets(tmp_path, run_cli):
    done = run_cli("synth", "7b", "-o", "m.gguf", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: unknown shape '7b'; use 135m, 1b, 3b, 8b"
    )


def test_kv_units_of_heads():
    options = SynthesisOptions("kv+ffn", "kv=0.25,ffn=0.5", "2-", kv_granularity="head")
    config = routing(SHAPE.layers, options, SHAPE.heads_kv)
    assert config.version == 2 and config.heads("kv") == 2
    units = [unit for unit in config.routed() if unit.kind == "kv"]
    assert units == [(layer, "kv", head) for layer in (2, 3, 4) for head in (0, 1)]
    assert {config.activation(unit) for unit in units} == {0.25}
    assert routing(SHAPE.layers, options, kv_heads=1).version == 1
    layers = SynthesisOptions("kv", layers="2-", kv_granularity="layer")
    assert routing(SHAPE.layers, layers, SHAPE.heads_kv).version == 1


def test_layers_that_attend_may_be_missing():
    """The message named a key of the configuration."""
    shape = replace(PRESETS["qwen3.5-4b"], layers=3).checked()
    with pytest.raises(UserError, match="none of the 3 layers gets a kv unit; .*able: none"):
        routing_of(header(shape), SynthesisOptions("kv", "0.5"))
