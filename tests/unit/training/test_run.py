"""Training runs on a tiny model: what is trained, targets, precision, arguments that do not fit."""

import json
import logging
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mod_export import adapter
from mod_export.common import progress
from mod_export.data.packing import open_data, split
from mod_export.data.text import default_texts
from mod_export.errors import UserError
from mod_export.evaluation.run import EvaluationPlan, evaluate
from mod_export.export import export
from mod_export.formats.schema import hf_tensor_names
from mod_export.model.mod_model import MoDModel
from mod_export.training import callbacks
from mod_export.training import run as train_module
from mod_export.training.config import TrainConfig
from mod_export.training.log import Log, read
from tests.support import tiny_torch as tiny
from tests.support.training_runs import LENGTH, config, train, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("train"))


@pytest.fixture
def plots():
    """Pictures are drawn."""


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Pictures take longer than training does here; tests that look at them ask for `plots`."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(train_module, "plot", lambda *_: None)


def test_routers_alone_are_trained_and_the_target_is_met(files, tmp_path, plots):
    (tmp_path / "text.txt").write_text(default_texts()[0][:9000])
    run = config(
        files,
        data=(str(tmp_path / "text.txt"),),
        tokens=12 * 2 * 2 * LENGTH,
        length=2 * LENGTH,
        held_out=12,
    )
    figures = train(files / "mod", tmp_path / "out", run)
    before, after = (
        load_file(path / "model.safetensors") for path in (files / "mod", tmp_path / "out")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for unit in [(2, "kv"), (3, "kv"), (4, "attn")] for name in hf_tensor_names(*unit)
    }
    model = MoDModel.load(tmp_path / "out")
    training = model.config.calibration["training"]
    assert training["tokens"] == 12 * 2 * 2 * LENGTH and training["data"] == ["text.txt"]
    assert model.config.units["attn"].activation[4] == pytest.approx(
        0.7, abs=0.01
    )  # The activation is that on training text.
    assert sum(model.config.units["kv"].activation[2:4]) / 2 == pytest.approx(0.5, abs=0.01)
    assert figures["activation"]["attn"] == pytest.approx(0.7, abs=0.1)
    assert figures["kl"] > 0 and figures["perplexity_dense"] > 1
    for name in ("loss.png", "units.png"):
        assert (tmp_path / "out.run" / name).read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in read(tmp_path / "out.run" / "metrics.jsonl")] == [
        *range(1, 13),
        12,
    ]


def test_the_target_is_met_where_the_text_does_not_repeat_itself(files, tmp_path):
    parts = default_texts()[0][:6000].split(". ")
    header = "-" * 60 + "\n"
    (tmp_path / "text.txt").write_text("\n\n".join(header + part for part in parts))
    run = config(
        files,
        data=(str(tmp_path / "text.txt"),),
        target={"kv": 0.5, "attn": 0.5},
        length=2 * LENGTH,
    )
    train(files / "mod", tmp_path / "out", run)
    model = MoDModel.load(tmp_path / "out")
    text, _ = split(open_data(model.tokenizer, run.data, run.length), run.held_out)
    chosen, novel = callbacks.long_sequences(model, text, callbacks.THRESHOLD_TOKENS)
    assert 0.1 < (~novel).float().mean() < 0.4
    with torch.inference_mode():
        active = torch.cat([model(ids[None], trace=True)[1].active for ids in chosen]).float()
    for units in (slice(0, 2), slice(2, 3)):  # kv, attn
        assert active[novel][:, units].mean() == pytest.approx(0.5, abs=0.01)
    assert abs(active[..., 2].mean() - 0.5) > 0.02
    recorded = model.config.units["attn"].activation[4]
    assert recorded == pytest.approx(active[novel][:, 2].mean().item(), abs=1e-4)


def test_text_that_does_nothing_but_repeat_itself_counts_whole(files, tmp_path):
    (tmp_path / "text.txt").write_text("The same line again and again, and no other one.\n" * 100)
    run = config(files, data=(str(tmp_path / "text.txt"),), tokens=2 * 2 * LENGTH)
    figures = train(files / "mod", tmp_path / "out", run)
    model = MoDModel.load(tmp_path / "out")
    _, held_out = split(open_data(model.tokenizer, run.data, run.length), run.held_out)
    assert not any(held_out[i]["novel"].any() for i in range(run.held_out))
    with torch.inference_mode():
        active = torch.cat(
            [
                model(held_out[i]["input_ids"][None], trace=True)[1].active
                for i in range(run.held_out)
            ]
        )
    assert figures["activation"]["attn"] == pytest.approx(active[..., 2].float().mean().item())


def test_routers_lose_their_drift_halfway(files, tmp_path):
    """Nothing is learnt here; the attn router, which the start leaves as it is, still changes."""
    run = config(files, tokens=2 * 2 * LENGTH, router_lr=1e-12)
    for name, penalty in (("off", 0.0), ("on", 10.0)):
        train(files / "mod", tmp_path / name, replace(run, drift_penalty=penalty))
    start, off, on = (
        MoDModel.load(path).router((4, "attn")).weight
        for path in (files / "mod", tmp_path / "off", tmp_path / "on")
    )
    assert torch.allclose(off, start, atol=1e-6) and (on - start).norm() > 0.1 * start.norm()
    assert MoDModel.load(tmp_path / "on").config.units["attn"].activation[4] == pytest.approx(
        0.7, abs=0.01
    )


def test_what_is_no_step_does_not_count_in_the_speed(tmp_path):
    log = Log(tmp_path, 2, 0, ["kv"])
    with log.aside():
        time.sleep(1)
    log.step({"step": 1, "loss": 0.1, "kl": 0.1, "activation": [0.5], "target": [0.5]}, 10)
    log.close()
    (row,) = read(tmp_path / "metrics.jsonl")
    assert row["seconds"] < 1


def test_learning_rates_fall_with_the_width():
    lora, full = TrainConfig((), parameters="lora"), TrainConfig((), parameters="full")
    assert lora.rate_of(576) == pytest.approx(1e-3) and lora.rate_of(4 * 576) == pytest.approx(5e-4)
    assert full.rate_of(576) == pytest.approx(1e-4)
    assert (
        replace(lora, lora_lr=7e-4).rate_of(4096) == 7e-4
        and replace(full, full_lr=2e-5).rate_of(4096) == 2e-5
    )


def test_heads_are_trained_apart_and_share_one_target(files, tmp_path):
    """With LoRA into an adapter; windows and a head that is not routed stay as they are."""
    windows = {(2, "kv", 0): 8, (2, "kv", 1): 4, (3, "kv", 1): 6}
    some = {"heads": 2, "left_out": [(3, "kv", 0)], "windows": windows}
    model = tiny.save_small(tmp_path / "mod", {"kv": [2, 3]}, **some)
    run = config(files, target=0.5, parameters="lora", lora_rank=2)
    train(tmp_path / "mod", tmp_path / "adapter", run, save_as="adapter")
    before, units = model.router_tensors(), list(windows)
    trained = adapter.apply(adapter.load(tmp_path / "adapter"), model.base, model.tokenizer)
    assert trained.config.routed() == units
    assert {unit: trained.config.window(unit) for unit in units} == windows
    for unit, tensors in trained.router_tensors().items():
        assert not any(map(torch.equal, tensors, before[unit]))
    shares = [trained.config.activation(unit) for unit in units]
    assert sum(shares) / 3 == pytest.approx(0.5, abs=0.01) and len(set(shares)) == 3


def test_lora_is_saved_as_an_adapter_that_gives_the_merged_model(files, tmp_path):
    run = config(files, parameters="lora", lora_rank=2, lora_lr=0.01)
    model = MoDModel.load(files / "mod")
    model.config = replace(model.config, calibration={"model": "its original"})
    model.save(tmp_path / "mod")
    train(tmp_path / "mod", tmp_path / "adapter", run, save_as="adapter")
    train(tmp_path / "mod", tmp_path / "merged", run)
    assert adapter.load(tmp_path / "adapter").base["name"] == "its original"
    assert (
        "model" not in MoDModel.load(tmp_path / "merged").config.calibration
    )  # its weights are no more
    applied = adapter.apply(adapter.load(tmp_path / "adapter"), model.base, model.tokenizer)
    merged, ids = MoDModel.load(tmp_path / "merged"), torch.arange(100, 160)[None]
    with torch.inference_mode():
        expected, original = merged(ids), MoDModel.load(files / "mod")
        torch.testing.assert_close(applied(ids), expected, atol=1e-4, rtol=1e-4)
        original.force = merged.force = "active"
        assert (merged(ids) - original(ids)).abs().max() > 1e-3


def test_an_adapter_is_where_training_begins_and_ends(files, tmp_path):
    """It names its model; where that has LoRA merged, no second adapter can hold what comes out."""
    run = config(files, tokens=2 * LENGTH, teacher=str(files / "mod"))
    start = MoDModel.load(files / "mod")
    identity = adapter.base_identity(start.base, start.tokenizer, "tiny")
    parts = start.config, start.router_tensors(), start.base, identity
    adapter.save(tmp_path / "start", *parts, model=str(files / "mod"))
    train(tmp_path / "start", tmp_path / "made", replace(run, teacher=""), save_as=None)
    made = adapter.load(tmp_path / "made")
    assert made.base == identity and made.lora is None
    one, other = (adapter.open_model(tmp_path / name) for name in ("start", "made"))
    assert torch.equal(one.base.lm_head.weight, other.base.lm_head.weight)
    assert not torch.equal(one.router((2, "kv")).weight, other.router((2, "kv")).weight)

    lora = replace(run, parameters="lora", lora_rank=2)
    (tmp_path / "made").rename(tmp_path / "moved")
    train(tmp_path / "moved", tmp_path / "lora", lora, save_as=None, base=files / "mod")
    assert adapter.load(tmp_path / "lora").lora is not None
    with pytest.raises(UserError, match="lora has LoRA of its own, which a second adapter"):
        train(tmp_path / "lora", tmp_path / "no", run, save_as="adapter")
    train(tmp_path / "lora", tmp_path / "whole", run, save_as=None)
    assert not MoDModel.load(tmp_path / "whole").config.base_is_original


def test_baselines_run_from_the_same_code(files, tmp_path):
    topk = train(files / "mod", tmp_path / "topk", config(files, method="topk"))
    loss = evaluate(
        tmp_path / "topk", EvaluationPlan(texts=(files / "text.txt",), length=LENGTH, count=2)
    )["texts"][0]
    assert loss["activation"] == pytest.approx((0.5 + 0.5 + 0.7) / 3, abs=0.06)
    with pytest.raises(
        UserError, match="chooses by top-k, which looks at later tokens: it cannot generate"
    ):
        evaluate(tmp_path / "topk", EvaluationPlan(haystack=str(files / "text.txt")))
    assert topk["activation"]["attn"] == pytest.approx(
        0.7, abs=0.06
    )  # two sinks of 32 tokens beside the top 70 %
    assert MoDModel.load(tmp_path / "topk").strategy.shares == {"kv": 0.5, "attn": 0.7}
    with pytest.raises(UserError, match="chooses by top-k, which looks at later tokens"):
        export(tmp_path / "topk", tmp_path / "topk.gguf")
    static = train(
        files / "mod",
        tmp_path / "static",
        config(files, method="static", parameters="lora", lora_rank=2),
    )
    model = MoDModel.load(tmp_path / "static")
    kept, dropped = sorted(model.config.units["kv"].activation[2:4], reverse=True)
    assert kept == 1.0 and 0 < dropped < 0.1  # sinks
    with torch.inference_mode():
        _, trace = model(torch.arange(100, 150)[None], trace=True)
    always = trace.active[0, 2:].float().mean(0).tolist()
    assert sorted(always[:2]) == [0.0, 1.0] and always[2] == 1.0
    tuned = train(files / "mod", tmp_path / "tuned", config(files, kl_weight=0.0, lm_weight=1.0))
    assert static["kl"] > 0 and tuned["kl"] > 0


def test_answers_weigh_the_same_in_one_forward_and_in_two(files, tmp_path):
    chats = [
        {
            "messages": [
                {"role": "user", "content": "Say " + "word " * (i % 7)},
                {"role": "assistant", "content": " ".join(["Yes."] * (1 + 9 * (i % 3)))},
            ]
        }
        for i in range(120)
    ]
    model = MoDModel.load(files / "mod")
    model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model.save(tmp_path / "mod")
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    run = config(
        files,
        data=(str(tmp_path / "chat.jsonl"),),
        loss_on="answers",
        tokens=2 * LENGTH,
        lm_weight=1.0,
        kl_weight=0.0,
    )
    found = []
    for options in ({}, {"batch": 1, "accumulate": 2}):
        train(tmp_path / "mod", tmp_path / "out", replace(run, **options), force=True)
        found.append(
            next(row["nll"] for row in read(tmp_path / "out.run" / "metrics.jsonl") if "nll" in row)
        )
    assert found[1] == pytest.approx(found[0], rel=0.01)  # the noise is another one


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": 0.0}, "target activation 0.0 is not in"),
        ({"target": 1.5}, "target activation 1.5 is not in"),
        ({"target": float("nan")}, "target activation nan is not in"),
        ({"target": {"kv": 0.5}}, "no target activation for attn"),
        (
            {"target": {"kv": 0.5, "attn": 0.5, "ffn": 0.5}},
            "target activation for ffn, which is not routed",
        ),
        ({"length": 1024}, "the model's context of 512; use --length 512 or less"),
        ({"length": 8}, "8 tokens fit in the window of 8"),
        ({"length": 500, "held_out": 30}, "10 sequences .* 36 are needed; .* --length 139 or less"),
        ({"length": 500, "limit": 900}, "data too short: .*, or a larger --limit, or use --length"),
        ({"data": ("no-such-file.txt",)}, "no-such-file.txt"),
        ({"method": "static"}, "static dropping has no routers"),
        ({"kl_weight": 0.0}, "all weights of the loss are 0"),
    ],
)
def test_arguments_that_do_not_fit(files, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(files / "mod", tmp_path / "out", config(files, **options))
    assert not (tmp_path / "out").exists()


def test_every_stage_tells_its_time(files, tmp_path, monkeypatch, caplog, capsys):
    """A run that takes minutes before its first step says what it does."""
    monkeypatch.setattr(progress, "FIRST_SECONDS", -1.0)
    caplog.set_level(logging.INFO, "mod_export")
    train(
        files / "mod",
        tmp_path / "out",
        config(files, tokens=2 * LENGTH, teacher=str(files / "mod")),
    )
    told = [message.split(":")[0] for message in caplog.messages if message.endswith("so far")]
    assert told == [
        f"loading {files / 'mod'}",
        "identifying the base model",
        "reading the texts",
        "loading the teacher",
        "the first step",
    ]
    shown = {line.split(":")[0] for line in capsys.readouterr().err.splitlines()}
    assert shown >= {"measuring what drifts", "measuring activation", "reading held-out text"}


def test_without_matplotlib_there_are_no_plots_but_a_model(
    files, tmp_path, monkeypatch, caplog, plots
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train(files / "mod", tmp_path / "out", config(files, tokens=2 * LENGTH))
    assert MoDModel.load(tmp_path / "out").config.units["kv"]
    assert caplog.messages[-1] == "no plots: matplotlib is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_fp16_is_for_gpus(files, tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train(files / "mod", tmp_path / "out", config(files, precision="fp16"))


def test_only_the_main_process_logs(caplog):
    """The messages of the others repeat its messages; afterwards all log as before."""
    caplog.set_level(logging.INFO, "mod_export")
    logger = logging.getLogger("mod_export.training.run")
    for is_main in (True, False):
        with train_module.one_voice(is_main):
            logger.info(f"main: {is_main}")
    logger.info("afterwards")
    assert caplog.messages == ["main: True", "afterwards"]


def test_a_sequence_is_longer_than_the_windows_by_default(files):
    """Windows of `convert` go up to 512 tokens: its adapter could not be trained with defaults."""
    lengths = [TrainConfig(()).for_window(window).length for window in (0, 256, 257, 512)]
    assert lengths == [512, 512, 1028, 2048]
    given = TrainConfig((), length=64)
    assert given.for_window(512) is given
    assert train_module.with_length(str(files / "mod"), TrainConfig(())).length == 512
