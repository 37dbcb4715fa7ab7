"""Synthetic models: the file as gguf-py and llama.cpp see it, and the activation that the runtime
measures.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from mod_export.common.system import resident
from mod_export.data.text import default_texts
from mod_export.formats import hub
from mod_export.formats.ggml_types import TYPE_NAMES, file_type, type_named
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.schema import read_routers
from mod_export.inspection import inspect
from mod_export.llamacpp import converter
from mod_export.runtime.llama import MoDLlama
from mod_export.synthetic.keys import header
from mod_export.synthetic.onto_base import onto
from mod_export.synthetic.routers import SynthesisOptions, routing, routing_of
from mod_export.synthetic.shape import PRESETS, Shape
from mod_export.synthetic.write import synth
from mod_export.units import UNIT_KINDS
from tests.support.c_api import Raw, stock_lib
from tests.support.short_smollm2 import short_smollm2

VOCAB = 1024
SHAPE = Shape(layers=5, embd=512, heads=8, heads_kv=2, ff=768, vocab=VOCAB, ctx=4096, tied=True)
UNTIED = replace(SHAPE, tied=False)
EXPERTS = replace(SHAPE, heads=4, head_size=96, ff=256, experts=6, used=2)
SMALL = replace(SHAPE, embd=192, heads=3, heads_kv=1, ff=256)
# Shapes of other architectures, narrower, with the type that is tested of each.
_NARROW = {"layers": 4, "embd": 512, "heads": 4, "heads_kv": 2, "ff": 512, "vocab": VOCAB}
_FEW = {"experts": 6, "used": 2}
OTHERS = {
    "qwen3.5-4b": ("q8_0", _NARROW),
    "qwen3.5-35b-a3b": ("q4_0", _NARROW | _FEW),
    "gpt-oss-20b": ("mxfp4", _NARROW | _FEW),
}
STOCK = """
import sys, numpy as np
from tests.support.c_api import Raw
with Raw(sys.argv[1], n_ctx=256) as raw:
    np.save(sys.argv[2], raw.decode(list(map(int, sys.argv[3:]))))
"""


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
    options = {"layers": "2-", "kv_window": 64, "kv_granularity": "layer"} | options
    synth(
        path,
        shape,
        quant,
        routing(shape.layers, SynthesisOptions(units, activation, **options), shape.heads_kv),
        dense,
        seed,
    )
    return path


def decisions(path: Path, tokens, **params) -> tuple[np.ndarray, np.ndarray]:
    """Decisions and logits of one sequence, [n, n_units] each."""
    with Raw(path, n_ctx=2048, n_batch=2048, **params) as raw:
        raw.decode(tokens, logits=[0] * (len(tokens) - 1) + [1])
        return raw.trace()


# --- the file


def test_keys_and_tensors(tmp_path):
    options = {
        "activation": "attn=0.25,kv=0.75",
        "layers": "1,3-",
        "sink_tokens": 3,
        "kv_window": 9,
    }
    path = make(tmp_path / "m.gguf", UNTIED, "q4_0", "attn+kv", **options)
    file = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in file.fields.items()}
    assert keys["general.architecture"] == "llama" and keys["tokenizer.ggml.model"] == "no_vocab"
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert keys["llama.vocab_size"] == VOCAB and keys["llama.context_length"] == 4096
    assert (keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"]) == (8, 2)
    assert keys["llama.mod.attn.activation"] == [1.0, 0.25, 1.0, 0.25, 0.25]
    assert keys["llama.mod.kv.activation"] == [1.0, 0.75, 1.0, 0.75, 0.75]
    assert keys["llama.mod.kv.threshold"] == [0.0, 0.5, 0.0, 0.5, 0.5]
    assert (keys["llama.mod.sink_tokens"], keys["llama.mod.kv_window"]) == (3, 9)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert list(tensors["blk.4.attn_k.weight"].shape) == [512, 128]
    assert list(tensors["blk.4.ffn_down.weight"].shape) == [768, 512]
    assert list(tensors["output.weight"].shape) == [512, VOCAB]
    assert (
        list(tensors["blk.3.mod_kv.weight"].shape) == [512] and "blk.2.mod_kv.weight" not in tensors
    )
    assert path.stat().st_size == file.tensors[-1].data_offset + 32  # the last bias, padded
    report = inspect(path)
    assert report["mod"]["activation"] == {"attn": 0.25, "kv": 0.75, "all": 0.5}


@pytest.mark.parametrize(
    "quant, shape",
    [
        *[
            (quant, shape)
            for quant in ("q8_0", "q4_0", "q5_1", "q6_K")
            for shape in (SHAPE, UNTIED)
        ],
        ("q4_0", SMALL),
        ("q4_0", EXPERTS),
        ("q5_0", replace(SMALL, tied=False)),  # no multiple of 256
        *[(quant, replace(PRESETS[name], **more)) for name, (quant, more) in OTHERS.items()],
    ],
)
def test_types_are_those_of_llama_cpps_quantiser(tmp_path, quant, shape):
    theirs = tmp_path / "theirs.gguf"
    make(tmp_path / "ours.gguf", shape, quant, dense=tmp_path / "dense.gguf")
    make(tmp_path / "f32.gguf", shape, "f32", dense=tmp_path / "plain.gguf")
    number = str(file_type(type_named(quant)))
    done = converter._quantizer([str(tmp_path / "plain.gguf"), str(theirs), number, "1"], None)
    assert done.returncode == 0, done.stderr
    types = [
        {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("dense.gguf", "theirs.gguf")
    ]
    assert types[0] == types[1]


def test_weights_do_not_depend_on_the_routers(tmp_path):
    make(
        tmp_path / "a.gguf",
        quant="q4_0",
        units="attn+ffn",
        activation="0.3",
        dense=tmp_path / "dense-a.gguf",
    )
    make(tmp_path / "b.gguf", quant="q4_0", units="block", dense=tmp_path / "dense-b.gguf")
    make(tmp_path / "c.gguf", quant="q4_0", seed=1, dense=tmp_path / "dense-c.gguf")
    dense = (tmp_path / "dense-a.gguf").read_bytes()
    assert dense == (tmp_path / "dense-b.gguf").read_bytes()
    assert dense != (tmp_path / "dense-c.gguf").read_bytes()
    routed = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "dense-a.gguf").tensors:
        np.testing.assert_array_equal(tensor.data, routed[tensor.name])


# --- the activation


@pytest.mark.parametrize(
    "quant, shape",
    [
        # The embedding has the same type, but for that of experts alone.
        *[(quant, EXPERTS if quant == "mxfp4" else UNTIED) for quant in TYPE_NAMES],
        ("f32", SHAPE),
        ("q4_0", SHAPE),
        ("q4_0", SMALL),  # tied: f32, q6_K, q8_0
        ("q4_0", EXPERTS),
    ],
)
def test_each_unit_is_active_for_the_exact_share_of_the_vocabulary(tmp_path, quant, shape):
    """Every token once: no sampling noise, so the share has to be A to the last token, whatever the
    type.
    """
    path = make(
        tmp_path / "m.gguf", shape, quant, "attn+ffn+kv", "attn=0.25,ffn=0.5,kv=0.75", sink_tokens=0
    )
    active, score = decisions(path, np.random.default_rng(0).permutation(VOCAB))
    np.testing.assert_array_equal(
        active.sum(0), VOCAB * np.tile([0.75, 0.25, 0.5], 3)
    )  # kv, attn, ffn of a layer
    # the logits' spread, which is what a shift of the thresholds acts on, hardly depends on the
    # depth
    assert ((score.std(0) > 1.6) & (score.std(0) < 2.2)).all()


def test_each_head_is_active_for_the_exact_share_of_the_vocabulary(tmp_path):
    path = make(
        tmp_path / "m.gguf",
        quant="q8_0",
        units="attn+kv",
        activation="attn=0.25,kv=0.75",
        kv_granularity="head",
        sink_tokens=0,
    )
    config, routers = read_routers(GGUFFile.open(path))
    assert [unit.head for unit in config.routed()] == [0, 1, None] * 3
    assert len({w.tobytes() for w, _ in routers.values()}) == 9
    active, _ = decisions(path, np.random.default_rng(0).permutation(VOCAB))
    np.testing.assert_array_equal(active.sum(0), VOCAB * np.tile([0.75, 0.75, 0.25], 3))


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("kind", UNIT_KINDS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_random_tokens_give_the_activation_at_every_layer(tmp_path, quant, kind, share):
    path = make(tmp_path / "m.gguf", SMALL, quant, kind, str(share))
    llm = MoDLlama(path, n_ctx=2048)
    llm.eval(np.random.default_rng(1).integers(VOCAB, size=2000).tolist())
    stats = llm.stats()
    assert [s.unit.layer for s in stats] == [2, 3, 4] and all(s.seen == 2000 for s in stats)
    assert all(abs(s.active / s.seen - share) < 0.03 for s in stats)
    llm.close()


def test_depth_of_a_preset_does_not_matter(tmp_path):
    """30 layers of the narrowest preset, with its three kinds of units: 84 of them, more than there
    are directions.
    """
    path = make(
        tmp_path / "m.gguf",
        replace(PRESETS["135m"], vocab=VOCAB),
        "q4_0",
        "attn+ffn+kv",
        "0.4",
        sink_tokens=0,
    )
    active, score = decisions(path, np.random.default_rng(2).permutation(VOCAB), fa=True)
    np.testing.assert_array_equal(active.sum(0), np.full(84, round(VOCAB * 0.4)))
    assert ((score.std(0) > 1.6) & (score.std(0) < 2.2)).all()
    together = np.corrcoef(active[:, :63].T)[np.triu_indices(63, 1)]
    assert (
        abs(together).mean() < 0.05
    )  # nearly independent: what 1024 tokens show by chance is 0.025
    assert (
        abs(active.mean(1).std() - np.sqrt(0.4 * 0.6 / 84)) < 0.03
    )  # One token has as many units as another.


def test_a_shift_moves_the_activation_smoothly(tmp_path):
    path = make(tmp_path / "m.gguf", quant="q8_0", units="ffn", sink_tokens=0)
    tokens = np.random.default_rng(3).permutation(VOCAB)
    shares = []
    with Raw(path, n_ctx=2048) as raw:
        for shift in (-2, -1, 0, 1, 2):
            raw.set(shift=shift)
            raw.clear()
            raw.decode(tokens)
            shares.append(raw.trace()[0].mean(0))
    # logits of standard deviation 2: the normal distribution at -1, -0.5, 0, ...
    np.testing.assert_allclose(
        shares, np.tile([[0.84], [0.69], [0.5], [0.31], [0.16]], 3), atol=0.04
    )


def test_all_and_hardly_any(tmp_path):
    tokens = np.random.default_rng(4).permutation(VOCAB)
    assert decisions(make(tmp_path / "all.gguf", activation="1", sink_tokens=0), tokens)[0].all()
    assert not decisions(make(tmp_path / "few.gguf", activation="1e-9", sink_tokens=0), tokens)[
        0
    ].any()


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("units", ["block", "attn+ffn", "kv"])
def test_dense_twin_is_the_model_with_everything_active(tmp_path, quant, units):
    path = make(tmp_path / "m.gguf", UNTIED, quant, units, dense=tmp_path / "dense.gguf")
    tokens, results = np.random.default_rng(5).integers(VOCAB, size=150), []
    for file in (path, tmp_path / "dense.gguf"):
        with Raw(file, n_ctx=256) as raw:
            if file == path:
                raw.set(force="active")
            results.append(
                np.concatenate([raw.decode(tokens[:128]), *[raw.decode([t]) for t in tokens[128:]]])
            )
    assert np.isfinite(results[0]).all() and 0.3 < results[0].std() < 3
    np.testing.assert_array_equal(*results)
    # and the routers do change it
    with Raw(path, n_ctx=256) as raw:
        assert not np.array_equal(raw.decode(tokens[:128]), results[1][:128])


# --- other architectures


@pytest.mark.parametrize("preset", OTHERS)
def test_a_shape_of_another_architecture(preset, tmp_path):
    """The stock library runs the dense file, and gives what the routed one with all units active
    gives, to the bit. Each unit is active for the exact share of the vocabulary.
    """
    quant, changes = OTHERS[preset]
    shape = replace(PRESETS[preset], **changes)
    options = SynthesisOptions("kv+ffn", "kv=0.25,ffn=0.5", sink_tokens=0, kv_window=64)
    config = routing_of(header(shape), options)
    path, dense = tmp_path / "mod.gguf", tmp_path / "dense.gguf"
    synth(path, shape, quant, config, dense)
    active, score = decisions(path, np.random.default_rng(0).permutation(VOCAB))
    shares = [config.activation(unit) for unit in config.routed()]
    assert {0.25, 0.5} == set(shares)
    np.testing.assert_array_equal(active.mean(0), shares)
    assert ((score.std(0) > 1.6) & (score.std(0) < 2.2)).all()
    tokens = np.random.default_rng(5).integers(VOCAB, size=100)
    command = [sys.executable, "-c", STOCK, dense, tmp_path / "stock.npy", *map(str, tokens)]
    env = os.environ | {"LLAMA_CPP_LIB_PATH": str(stock_lib()), "LD_LIBRARY_PATH": ""}
    subprocess.run(command, env=env, check=True, timeout=100)
    with Raw(path, n_ctx=256) as raw:
        raw.set(force="active")
        logits = raw.decode(tokens)
        np.testing.assert_array_equal(logits, np.load(tmp_path / "stock.npy"))
        assert np.isfinite(logits).all() and 0.3 < logits.std() < 3
        raw.clear()
        raw.set(force="none")
        assert not np.array_equal(raw.decode(tokens), logits)


def test_batches_of_a_hybrid_hold_no_copies_of_its_states(tmp_path):
    """Graphs of small batches were kept, each with room for a copy of the states of all its rows:
    400 MB for batches of 2, 3 and 4 sequences in 8 layers.
    """
    shape = replace(PRESETS["qwen3.5-4b"], **(_NARROW | {"layers": 8}))
    path = tmp_path / "mod.gguf"
    synth(path, shape, "q8_0", routing_of(header(shape), SynthesisOptions("kv+ffn")))
    tokens = np.random.default_rng(6).integers(VOCAB, size=(4, 20)).tolist()
    llm = MoDLlama(path, n_ctx=256, threads=1)
    llm.new_context(n_ctx=512, n_batch=128, n_ubatch=128, n_seq_max=4, kv_unified=True)
    for seq, text in enumerate(tokens):
        llm.decode_rows([(token, i, seq, i == 9) for i, token in enumerate(text[:10])])
    before = resident("VmRSS")
    for position, n in ((10, 4), (11, 4), (12, 3), (13, 3), (14, 2), (15, 2)):
        llm.decode_rows([(tokens[seq][position], position, seq, True) for seq in range(n)])
    assert resident("VmRSS") - before < 100e6
    llm.close()


# --- the command


def test_command(tmp_path, run_cli):
    options = [
        "--quant",
        "Q8_0",
        "--units",
        "attn+kv",
        "--target-activation",
        "attn=0.3,kv=0.6",
        "--layers-routed",
        "1-",
    ]
    shape = [
        "--layers",
        3,
        "--embd",
        128,
        "--heads",
        4,
        "--heads-kv",
        1,
        "--ff",
        96,
        "--vocab",
        500,
        "--ctx",
        99,
    ]
    done = run_cli(
        "synth", "8b", "-o", "m.gguf", "--dense", "d.gguf", *options, *shape, "--tied", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "m.gguf\n"), done.stderr
    assert "drawing tokens and routers" in done.stderr and "wrote 0 of 0 MB" in done.stderr
    report = inspect(tmp_path / "m.gguf")
    assert (report["n_layer"], report["n_embd"]) == (3, 128)
    assert [(u["layer"], u["kind"], round(u["activation"], 3)) for u in report["mod"]["units"]] == [
        (1, "kv", 0.6),
        (1, "attn", 0.3),
        (2, "kv", 0.6),
        (2, "attn", 0.3),
    ]
    assert inspect(tmp_path / "d.gguf")["mod"] is None
    again = run_cli("synth", "8b", "-o", "m.gguf", *options, *shape, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (
        2,
        "error: m.gguf exists already; use --force to replace it\n",
    )
    forced = run_cli(
        "synth", "135m", "-o", "m.gguf", "--layers", 3, "--vocab", 64, "--force", cwd=tmp_path
    )
    assert forced.returncode == 0 and inspect(tmp_path / "m.gguf")["n_embd"] == 576


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """A real limit on the size of files: the write fails half way, as on a disk that fills up
    meanwhile.
    """
    synth_command = f"{sys.executable} -m mod_export synth 135m -o m.gguf --dense d.gguf --layers 3"
    command = f"ulimit -f 1000; exec {synth_command}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "error: cannot write" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("units", ["block", "attn+ffn", "kv"])
def test_routers_onto_a_real_model(units, tmp_path):
    """Real weights and text: each unit runs for about the share asked for, and the weights are
    those of the base.
    """
    base, out = short_smollm2(tmp_path / "base.gguf", n_layer=8), tmp_path / "mod.gguf"
    onto(base, out, SynthesisOptions(units, activation="0.4", layers="2-7"))
    llm = MoDLlama(out, n_ctx=2048, n_batch=2048)
    llm.eval(llm.tokenize("\n\n".join(default_texts()).encode())[:1500])
    shares = [s.share for s in llm.stats()]
    heads = 3 if units == "kv" else 1
    assert len(shares) == 6 * len(units.split("+")) * heads
    assert max(abs(share - 0.4) for share in shares) < 0.06
    ours = GGUFFile.open(out).tensors
    assert all(
        ours[name].data == tensor.data for name, tensor in GGUFFile.open(base).tensors.items()
    )


def test_a_base_that_is_none(tmp_path, run_cli):
    synthetic = make(tmp_path / "syn.gguf", SMALL, "q8_0")
    for args, words in (
        ([synthetic], "has no vocabulary"),
        ([hub.embedded_gguf(), "--layers", 3], "has its shape"),
        ([hub.embedded_gguf(), "--layers-routed", "99"], "there is no layer 99"),
    ):
        done = run_cli("synth", *args, "-o", tmp_path / "out.gguf")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out.gguf").exists()
