"""Adapters: what is loaded is what was saved, damage is named, another model is refused.

The last part tests `convert --adapter`.
"""

import json
import random
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from mod_export.adapter import apply, load, save
from mod_export.convert import convert_adapter
from mod_export.errors import UserError
from mod_export.model.layers import is_wrapped
from mod_export.model.lora import lora_of
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.tiny_adapter import IDS, TOKENIZER, saved, trained


@pytest.fixture(scope="module")
def with_lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "lora"
    saved(path)
    return path


@pytest.fixture(scope="module")
def routers_only(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "routers"
    saved(path, lora=False)
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "base"
    tiny.base().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


# --- files


def test_a_full_disk_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        for lora in (False, True):
            with pytest.raises(UserError, match="cannot write .*adapter: File too large"):
                saved(tmp_path / "adapter", lora=lora)
            assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@torch.inference_mode()
def test_routers_only(tmp_path):
    model = saved(tmp_path / "adapter", lora=False, figures={"perplexity, MoD / dense": 1.01234})
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "mod.json",
        "routers.safetensors",
    ]
    again = apply(load(tmp_path / "adapter"), tiny.base(), TOKENIZER)
    assert torch.equal(again(IDS), model(IDS))
    text = (tmp_path / "adapter/README.md").read_text()
    assert "1.012" in text and "export adapter --base MODEL -o mod.gguf" in text
    assert "4 kv" not in text and "2 kv, 2 attn, 1 ffn units" in text
    saved(tmp_path / "lora")
    text = (tmp_path / "lora/README.md").read_text()
    assert "LoRA of rank 4" in text and "any GGUF" not in text


def test_existing_directories(tmp_path):
    saved(tmp_path / "adapter", lora=False)
    with pytest.raises(UserError, match="exists already; use --force"):
        saved(tmp_path / "adapter")
    saved(tmp_path / "adapter", force=True)
    assert load(tmp_path / "adapter").lora is not None
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no config.json or mod.json, so it is not replaced"):
        saved(tmp_path / "letters", force=True)


def test_routers_that_cannot_be_saved(tmp_path):
    model, identity = trained(lora=False)
    routers = model.router_tensors() | {(2, "kv"): (torch.full((64,), torch.nan), torch.zeros(1))}
    with pytest.raises(UserError, match="model.layers.2.mod_kv.weight is not finite"):
        save(tmp_path / "adapter", model.config, routers, model.base, identity)
    assert list(tmp_path.iterdir()) == []


LORA_NAME = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def tensors(file, change):
    def damage(path):
        held = load_file(path / file)
        change(held)
        save_file(held, path / file)

    return damage


def values(file, change):
    def damage(path):
        data = json.loads((path / file).read_text())
        change(data)
        (path / file).write_text(json.dumps(data))

    return damage


def remove(file):
    return lambda path: (path / file).unlink()


DAMAGE = {
    "no config": (remove("adapter_config.json"), "has no adapter_config.json"),
    "no weights": (remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "config broken": (
        lambda path: (path / "adapter_config.json").write_text("{"),
        "adapter_config.json is no JSON",
    ),
    "other method": (
        values("adapter_config.json", lambda d: d.update(peft_type="IA3")),
        "peft_type is 'IA3'",
    ),
    "config key": (
        values("adapter_config.json", lambda d: d.update(rank=3)),
        "adapter_config.json cannot be read",
    ),
    "rank": (values("adapter_config.json", lambda d: d.update(r=3)), "of shape"),
    "rank text": (
        values("adapter_config.json", lambda d: d.update(r="four")),
        "adapter_config.json does not fit",
    ),
    "rank 0": (
        values("adapter_config.json", lambda d: d.update(r=0)),
        "adapter_config.json does not fit",
    ),
    "alpha nan": (
        values("adapter_config.json", lambda d: d.update(lora_alpha=float("nan"))),
        "cannot be merged",
    ),
    "no constant": (
        values("adapter_config.json", lambda d: d.update(alora_invocation_tokens=[1])),
        "cannot be merged",
    ),
    "targets": (
        values("adapter_config.json", lambda d: d.update(target_modules=["c_proj"])),
        "adapter_config.json does not fit",
    ),
    "lora missing": (
        tensors("adapter_model.safetensors", lambda t: t.pop(LORA_NAME)),
        f"{LORA_NAME} is missing",
    ),
    "lora shape": (
        tensors("adapter_model.safetensors", lambda t: t.update({LORA_NAME: torch.zeros(4, 65)})),
        f"{LORA_NAME} of shape [4, 65]",
    ),
    "lora more": (
        tensors(
            "adapter_model.safetensors",
            lambda t: t.update({LORA_NAME.replace("1", "9"): torch.zeros(4, 64)}),
        ),
        "layers.9.mlp.up_proj.lora_A.weight of shape",
    ),
    "lora nan": (
        tensors("adapter_model.safetensors", lambda t: t[LORA_NAME].fill_(torch.inf)),
        f"{LORA_NAME} holds a",
    ),
    "lora truncated": (
        lambda p: cut(p / "adapter_model.safetensors"),
        "adapter_model.safetensors is damaged or trunc",
    ),
}


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def copied(path, target):
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(with_lora, tmp_path, what):
    damage, words = DAMAGE[what]
    copy = copied(with_lora, tmp_path / "copy")
    damage(copy)
    with pytest.raises(UserError) as error:
        apply(load(copy), tiny.base(), TOKENIZER)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert error.value.cure


def test_damaged_at_random_places(with_lora, tmp_path):
    """Any byte of a header or a JSON file may be wrong; there is no exception but UserError."""
    copy, rng, refused = copied(with_lora, tmp_path / "copy"), random.Random(1), 0
    for file in (
        "mod.json",
        "adapter_config.json",
        "routers.safetensors",
        "adapter_model.safetensors",
    ):
        good = (copy / file).read_bytes()
        header = (
            8 + int.from_bytes(good[:8], "little") if file.endswith("safetensors") else len(good)
        )
        for _ in range(60):
            damaged = bytearray(good)
            for place in rng.sample(range(header), 2):
                damaged[place] = rng.randrange(256)
            (copy / file).write_bytes(damaged)
            try:
                load(copy)
            except UserError:
                refused += 1
        (copy / file).write_bytes(good)
    assert refused > 100
    load(copy)


# --- which model it is for


def other_vocabulary():
    made = byte_tokenizer()
    made.add_tokens(["<more>"])
    return made


@pytest.mark.parametrize(
    "change, tokenizer, words",
    [
        ({"n_layer": 5}, TOKENIZER, "with n_layer 6, the model given has 5"),
        ({"n_embd": 32}, TOKENIZER, "with n_embd 64, the model given has 32"),
        ({"n_vocab": 301}, TOKENIZER, "with n_vocab 300, the model given has 301"),
        ({}, other_vocabulary(), "another tokenizer"),
        ({"seed": 1}, TOKENIZER, "of the same shape has other weights"),
    ],
    ids=["n_layer", "n_embd", "n_vocab", "tokenizer", "weights"],
)
def test_another_model_is_refused_by_what_differs(routers_only, change, tokenizer, words):
    base = tiny.base(**change)
    with pytest.raises(UserError, match=words):
        apply(load(routers_only), base, tokenizer)
    assert not is_wrapped(base)


@pytest.mark.parametrize(
    "noise, accepted", [(0.001, "silently"), (0.1, "with a line"), (1.0, "not")]
)
def test_other_weights_of_the_same_model(routers_only, with_lora, noise, accepted, caplog):
    """A rounded copy passes, a coarse quantisation gives a warning, large noise is refused."""
    for path in (routers_only, with_lora):
        base = tiny.base()
        caplog.clear()
        torch.manual_seed(11)
        for parameter in base.parameters():
            parameter.data += noise * parameter.std().nan_to_num() * torch.randn_like(parameter)
        if accepted == "not":
            with pytest.raises(UserError, match="other weights"):
                apply(load(path), base, TOKENIZER)
        else:
            apply(load(path), base, TOKENIZER)
        assert len(caplog.messages) == (accepted == "with a line")
        for line in caplog.messages:
            assert ("LoRA" in line) == (path == with_lora) and "weights differ by" in line
        assert lora_of(base) is None


def test_rounding_to_bf16_is_no_difference(with_lora, caplog):
    model = apply(load(with_lora), tiny.base().bfloat16(), TOKENIZER)
    assert caplog.messages == [] and model.base.dtype == torch.bfloat16


# --- names and commands


@torch.inference_mode()
def test_convert(model_dir, with_lora, tmp_path, run_cli):
    result = run_cli("convert", model_dir, "--adapter", with_lora, "-o", tmp_path / "mod")
    assert result.returncode == 0 and result.stdout == f"{tmp_path / 'mod'}\n", result.stderr
    model, made = trained()[0], MoDModel.load(tmp_path / "mod")
    logits, trace = model(IDS, trace=True)
    logits_made, trace_made = made(IDS, trace=True)
    assert (logits - logits_made).abs().max() < 1e-5 * logits.abs().max()
    assert torch.equal(trace.active, trace_made.active) and made.config == model.config
    with pytest.raises(UserError, match="is an adapter, without the weights of the model"):
        MoDModel.load(with_lora)


def one_line(result, folder) -> str:
    assert result.returncode == 2 and result.stdout == "", result
    error = [
        line for line in result.stderr.splitlines() if not line.startswith("[")
    ]  # progress is told there too
    assert len(error) == 1 and error[0].startswith("error: ")
    assert list(folder.iterdir()) == []
    return error[0]


OPTIONS = {
    "--units": "kv",
    "--target-activation": 0.5,
    "--kv-window": 64,
    "--layers-routed": "auto",
    "--calibration-text": "text.txt",
    "--sink-tokens": 4,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_calibration_contradict(routers_only, tmp_path, run_cli, option):
    """Also where the value given is the default."""
    result = run_cli(
        "convert",
        "smollm2",
        "--adapter",
        routers_only,
        "-o",
        tmp_path / "mod",
        option,
        OPTIONS[option],
    )
    assert f"{option} does not go with --adapter" in one_line(result, tmp_path)


def test_refusals_of_convert(model_dir, routers_only, tmp_path, run_cli):
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    tiny.base(n_layer=5).save_pretrained(other)
    TOKENIZER.save_pretrained(other)
    for model, given, words in (
        (model_dir, "none", "no such adapter: none"),
        (model_dir, model_dir, "is no adapter"),
        (tmp_path / "none", routers_only, "no such model"),
        (other, routers_only, "with n_layer 6, the model given has 5"),
    ):
        with pytest.raises(UserError, match=words):
            convert_adapter(model, work / "mod", given)
        assert list(work.iterdir()) == []
    result = run_cli("convert", other, "--adapter", routers_only, "-o", work / "mod")
    assert "the model given has 5; give the model that it was made for" in one_line(result, work)
