"""The convert command: what it reads, what it writes, and that it leaves nothing behind where it
refuses.
"""

import logging
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PhiConfig, PhiForCausalLM

from mod_export.adapter import open_model
from mod_export.convert import convert, convert_adapter, default_window, note_for_export
from mod_export.data.text import pack
from mod_export.errors import UserError
from mod_export.formats import model_card
from mod_export.model import architectures, lora, opening
from mod_export.model.role_check import check_roles
from mod_export.units import Unit
from tests.support import tiny_adapter
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer
from tests.support.hub_server import HubServer
from tests.support.tiny_gguf import Tiny

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "base"
    tiny.base().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_what_the_runtime_does_not_run_is_told(caplog):
    for name in (
        "Qwen3ForCausalLM",
        "DeepseekV2ForCausalLM",
        "HeliumForCausalLM",
    ):  # all kinds; not known to llama.cpp
        note_for_export(name, ["kv"])
    assert not caplog.messages
    note_for_export("MambaForCausalLM", ["kv"])
    note_for_export("PhiForCausalLM", ["kv", "ffn"])
    recurrent, parallel = caplog.messages
    assert "'mamba' cannot have routers: " in recurrent and "no attention" in recurrent
    assert "'phi2' cannot have units of kind ffn: " in parallel


@pytest.mark.parametrize(
    ("context", "kinds", "window"),
    [
        (4096, ["attn", "kv"], None),  # each kv unit chooses
        (4095, ["kv"], 256),
        (4096, ["attn"], 256),
        (800, ["kv"], 100),
    ],
)
def test_the_default_window_follows_the_context(context, kinds, window):
    base = tiny.base()
    base.config.max_position_embeddings = context
    assert default_window(base, kinds) == window


def test_convert_writes_a_model_that_says_how_it_was_made(model_dir, text, tmp_path, caplog):
    caplog.set_level(logging.INFO, "mod_export")
    out = tmp_path / "mod"
    convert(
        model_dir,
        out,
        "kv+ffn",
        0.4,
        12,
        layers="2-4",
        calibration_text=[text],
        sink_tokens=3,
    )
    assert sum(path.stat().st_size for path in out.iterdir()) < 40_000
    model = open_model(out)
    assert model.config.routed() == [
        unit for layer in (2, 3, 4) for unit in ((layer, "kv", 0), (layer, "kv", 1), (layer, "ffn"))
    ]
    assert (model.config.kv_window, model.config.sink_tokens) == (12, 3)
    record = model.config.calibration
    assert (
        record["target_activation"] == 0.4
        and record["text"] == "given"
        and record["model"] == "base"
    )
    recorded = [Unit(unit["layer"], unit["kind"], unit.get("head")) for unit in record["units"]]
    assert recorded == model.config.routed()
    assert all(
        0 <= unit[key] <= 1 for unit in record["units"] for key in ("activation", "held_out")
    )
    assert record["held_out"]["tokens"] > 0 and any(
        "tokens in layers 0 to 4" in line for line in caplog.messages
    )

    # the record is what the saved model does: activation on the calibration text, measured anew
    ids = pack(byte_tokenizer(), TEXT, 1024)
    with torch.inference_mode():
        _, trace = model(ids, trace=True)
    assert trace.active.float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert list(tmp_path.glob(".*")) == []


def test_a_model_of_the_hub_is_named_by_its_repository(model_dir, text, tmp_path, monkeypatch):
    with HubServer({"org/base": model_dir}) as hub:
        hub.use(monkeypatch, tmp_path / "home")
        convert("org/base", tmp_path / "mod", kv_window=8, calibration_text=[text])
        with pytest.raises(UserError, match="org/base has no revision v2"):
            convert("org/base", tmp_path / "other", revision="v2")
        model = open_model(tmp_path / "mod")
    assert model.config.calibration["model"] == "org/base"
    assert model_card.read(tmp_path / "mod")["base_model"] == "org/base"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "mod", "text.txt"]


def test_a_whole_directory_gives_what_the_adapter_gives(model_dir, text, tmp_path):
    """Its weights are the model's own, byte for byte, in the type that they have there."""
    half, ids = tmp_path / "half", pack(byte_tokenizer(), TEXT, 64)[:1]
    tiny.base().bfloat16().save_pretrained(half)
    byte_tokenizer().save_pretrained(half)
    for save in ("adapter", "full"):
        convert(half, tmp_path / save, "kv", 0.4, 12, calibration_text=[text], save=save)
    logits = [open_model(tmp_path / save)(ids) for save in ("adapter", "full")]
    assert torch.equal(*logits)
    before, after = load_file(half / NAME), load_file(tmp_path / "full" / NAME)
    assert before.keys() < after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {value.dtype for value in before.values()} == {torch.bfloat16}


def test_a_model_that_has_moved_is_named(model_dir, text, tmp_path):
    shutil.copytree(model_dir, tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "made", kv_window=8, calibration_text=[text])
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="of .*made is no longer at .*base; give it as --base"):
        open_model(tmp_path / "made")
    assert open_model(tmp_path / "made", tmp_path / "moved").config.routed()
    with pytest.raises(UserError, match="no such model: "):
        open_model(tmp_path / "made", tmp_path / "none")


def test_each_kind_has_its_own_target(model_dir, text, tmp_path):
    out, target = tmp_path / "mod", {"kv": 0.3, "ffn": 0.8}
    convert(model_dir, out, "kv+ffn", target, 12, calibration_text=[text])
    record = open_model(out).config.calibration
    assert record["target_activation"] == target
    assert record["activation"] == pytest.approx(target, abs=0.02)


def test_existing_output_is_refused_and_kept(model_dir, text, tmp_path):
    out = tmp_path / "mod"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="exists already; use --force"):
        convert(model_dir, out, calibration_text=[text])
    assert (out / "config.json").read_text() == "{}"
    convert(model_dir, out, layers="3", kv_window=8, calibration_text=[text], force=True)
    assert open_model(out).config.routed() == [(3, "kv", 0), (3, "kv", 1)]


def test_refusals_leave_nothing_behind(model_dir, text, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "routed").mkdir()
    (tmp_path / "routed" / "config.json").write_text('{"mod": {}}')
    Tiny(n_layer=3, n_embd=64).route([1], "kv").write(tmp_path / "routed.gguf")
    for wrong, message in (
        ({"model": tmp_path / "routed"}, "routed is a MoD model already; convert the original"),
        ({"model": tmp_path / "routed.gguf"}, "routed.gguf is a MoD model already"),
        ({"model": tmp_path / "nowhere"}, "no such model"),
        ({"calibration_text": [tmp_path / "short.txt"]}, "calibration text too short"),
        ({"calibration_text": [tmp_path / "none.txt"]}, "none.txt"),
        ({"layers": "4-9"}, "there is no layer 9"),
        ({"layers": "0-5"}, "no layer keeps complete K/V"),
        ({"units": "depth"}, "unknown kind of unit 'depth'"),
        (
            {"target": {"kv": 0.5, "ffn": 0.5}},
            "target activation for ffn, which is not routed; name kv",
        ),
        (
            {"units": "kv+ffn", "target": {"kv": 0.5}},
            "no target activation for ffn; write ffn=0.5 too",
        ),
        ({"target": {"kv": 1.5}}, "--target-activation 1.5 is not between 0 and 1"),
        ({"out": tmp_path / "no" / "such" / "mod"}, "there is no directory"),
    ):
        given = {
            "model": model_dir,
            "out": work / "mod",
            "calibration_text": [text],
            "kv_window": 8,
        } | wrong
        with pytest.raises(UserError, match=message):
            convert(**given)
        assert list(work.iterdir()) == []


def test_models_that_have_to_be_whole_say_what_they_take(
    model_dir, text, tmp_path, caplog, monkeypatch
):
    """Scores with a backward pass, and LoRA that changes more than the matrices of layers."""
    caplog.set_level(logging.INFO)
    convert(model_dir, tmp_path / "ffn", "ffn", 0.8, calibration_text=[text])
    kept = next(line for line in caplog.messages if "all weights at once" in line)
    assert re.search(r"base takes \d+ MB of memory, .*: the scores of its units take a back", kept)
    tiny_adapter.saved(tmp_path / "lora")
    convert_adapter(model_dir, tmp_path / "mod", tmp_path / "lora")
    monkeypatch.setattr(lora, "_below_layers", lambda _: ())
    convert_adapter(model_dir, tmp_path / "same", tmp_path / "lora")
    made, same = (load_file(tmp_path / name / NAME) for name in ("mod", "same"))
    assert made.keys() == same.keys() and all(torch.equal(made[k], same[k]) for k in made)
    monkeypatch.setattr(opening, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="MB of memory, .* and 0 MB are left.*backward.*units kv"):
        convert(model_dir, tmp_path / "none", "attn", calibration_text=[text])
    with pytest.raises(UserError, match="0 MB are left: the adapter's LoRA .* a larger machine"):
        convert_adapter(model_dir, tmp_path / "none", tmp_path / "lora")
    assert not (tmp_path / "none").exists()


def test_unwritable_output(model_dir, text, run_cli):
    """/proc takes no directories, whoever asks: root's rights do not help there."""
    result = run_cli("convert", model_dir, "-o", "/proc/mod", "--calibration-text", text)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.startswith("error: cannot write /proc/mod") and result.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--target-activation", "1"], "--target-activation"),
        (["--target-activation", "nan"], "--target-activation"),
        (
            ["--target-activation", "kv=half"],
            "'kv=half' is neither a number nor kinds such as kv=0.5,attn=0.8",
        ),
        (["--target-activation", "kv=0.5,kv=0.4"], "'kv=0.5,kv=0.4' names a kind twice"),
        (["--target-activation", "attn=0.5"], "target activation for attn, which is not routed"),
        (["--kv-window", "0"], "--kv-window"),
        (["--sink-tokens", "-1"], "--sink-tokens"),
        (["--layers", "5-3"], "run backwards"),
        (["--units", "kv+block+attn"], "a block holds attention"),
        (["--units", "kv+attn", "--resume"], "for kv+attn cannot be resumed: the scores of its"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options, told, tmp_path, run_cli):
    result = run_cli("convert", "smollm2", "-o", tmp_path / "mod", *options)
    assert result.returncode == 2 and told in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_eval_of_a_saved_model(model_dir, text, tmp_path, run_cli):
    """Dense perplexity is that of the base, KL is positive, a missing text is told in one line."""
    import json

    out = tmp_path / "mod"
    convert(model_dir, out, layers="2-5", kv_window=8, calibration_text=[text])
    result = run_cli(
        "eval",
        out,
        "--text",
        text,
        "--length",
        256,
        "--count",
        2,
        "--json",
        "-",
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["texts"]
    base = tiny.base()
    ids = pack(byte_tokenizer(), TEXT, 256, count=2)
    with torch.inference_mode():
        nll = [
            torch.nn.functional.cross_entropy(base(row[None]).logits[0, :-1], row[1:]).item()
            for row in ids
        ]
    assert row["perplexity_dense"] == pytest.approx(torch.tensor(nll).mean().exp().item(), rel=1e-3)
    assert row["kl"] > 0 and row["tokens"] == 2 * 255 and 0 < row["kv_share"] < 1
    missing = run_cli("eval", out, "--text", tmp_path / "none.txt")
    assert (
        missing.returncode == 2 and "none.txt" in missing.stderr and missing.stderr.count("\n") == 1
    )


def test_units_go_to_layers_that_can_have_them():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 6,
        "vocab_size": 50,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
    }
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**shape, sliding_window_pattern=3)).eval()
    assert gemma.config.layer_types[2] == gemma.config.layer_types[5] == "full_attention"
    assert [architectures.unit_layers(gemma, kind, None) for kind in ("kv", "attn", "block")] == [
        [2, 5]
    ] * 3
    assert architectures.unit_layers(gemma, "ffn", None) == [2, 3, 4, 5]
    assert architectures.unit_layers(gemma, "kv", [2]) == [2]
    with pytest.raises(UserError, match="layer 1 of gemma3_text takes no kv unit: it has sliding"):
        architectures.unit_layers(gemma, "kv", [1, 2])
    phi = PhiForCausalLM(PhiConfig(**shape)).eval()
    assert architectures.unit_layers(phi, "block", None) == [2, 3, 4, 5]
    with pytest.raises(UserError, match="takes no ffn unit: .* side by side; use kv or block"):
        architectures.unit_layers(phi, "ffn", None)


def test_layers_that_do_not_add_up_are_refused(monkeypatch):
    plain = tiny.base()
    check_roles(plain)
    names = architectures.Names(ffn_entry="input_layernorm")
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", names)
    with pytest.raises(UserError, match="attention and FFN of layer 0 add is not what"):
        check_roles(plain)
    assert all("forward" not in vars(module) for module in plain.modules())
