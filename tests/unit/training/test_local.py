"""Layer-local training on a tiny model: what is learnt, several processes, a run that goes on."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mod_export import adapter
from mod_export.calibration import memory
from mod_export.data.repeats import counted
from mod_export.data.text import default_texts
from mod_export.errors import UserError
from mod_export.model.layer_walk import LayerWalk
from mod_export.model.model_shape import ModelShape
from mod_export.model.walk_state import WalkState
from mod_export.training import local, local_memory
from mod_export.training.config import TrainConfig
from mod_export.training.local_layer import LocalLayer
from mod_export.training.local_memory import TOLERANCE
from mod_export.training.relaxation import relaxed_attention
from tests.support import tiny_torch as tiny
from tests.support.allocations import Allocations
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.training_runs import LENGTH, config, write_start


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("local"))


def options(files, **more):
    some = {"target": 0.4, "tokens": 10 * 2 * LENGTH, "length": 2 * LENGTH, "batch": 1}
    return config(files, **some | more)


def lesson(files, rank: int, processes: int) -> local.Lesson:
    model = adapter.open_model(files / "start")
    process = SimpleNamespace(process_index=rank, num_processes=processes)
    run = options(files)
    return local.Lesson(model.requires_grad_(False), run, *local.data_of(model, run), process)


def test_layers_learn_and_the_target_is_met(files, tmp_path, caplog):
    caplog.set_level("INFO", "mod_export")
    run = options(files, router_lr=3e-3)
    local.train_local(files / "start", tmp_path / "out", run)
    made = adapter.load(tmp_path / "out")
    units = made.config.routed()
    shares = [made.config.activation(unit) for unit in units]
    assert sum(shares) / len(units) == pytest.approx(0.4, abs=0.01)
    assert len({made.config.threshold(unit) for unit in units}) == 1
    assert made.config.calibration["training"]["local"]
    assert adapter.open_model(tmp_path / "out").config.routed() == units
    told = [r.message for r in caplog.records if "its attention loses" in r.message]
    assert len(told) == 3


def layer_of(lesson: local.Lesson, number: int, walk: LayerWalk) -> LocalLayer:
    novel = [counted(item["novel"]) for item in lesson.items]
    return LocalLayer(lesson.model, walk, lesson.layers[number], novel, lesson.learnt)


def test_the_loss_is_that_of_the_model_as_it_decides(files):
    """What an attention adds, in a whole forward in which its units alone decide."""
    some = lesson(files, 0, 1)
    model, ids = some.model, [item["input_ids"] for item in some.items]
    walk, losses = LayerWalk(model.base, ids), []
    with relaxed_attention(model.base):
        for number in walk.layers(3):
            if number == 2:
                found = layer_of(some, number, walk).loss()
            for i in range(len(ids)):
                walk.pass_layer(i)
    others = {unit: torch.ones(1, dtype=torch.bool) for unit in model.config.routed()}
    for one in some.layers[2]:
        del others[one]
    for sequence in ids[some.learnt :]:
        added, h = [], []
        part = walk.parts[2]
        hooks = [
            part.attn_out.register_forward_hook(lambda _m, _a, out, to=added: to.append(out[0][0])),
            part.layer.register_forward_pre_hook(lambda _m, args, to=h: to.append(args[0][0])),
        ]
        with torch.no_grad():
            model(sequence[None], decisions=others)
            with model.forced("active"):
                model(sequence[None])
        for hook in hooks:
            hook.remove()
        lost = (added[0] - added[1]).pow(2).sum(-1) / h[1].pow(2).sum(-1)
        losses.append(lost.mean().item())
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4) and found > 0


def test_steps_lower_the_loss_at_the_same_activation(files):
    some = lesson(files, 0, 1)
    run = replace(some.config, router_lr=3e-3)
    walk = LayerWalk(some.model.base, [item["input_ids"] for item in some.items])
    with relaxed_attention(some.model.base):
        for number in walk.layers(3):
            if number == 2:
                layer = layer_of(some, number, walk)
                layer._meet(0.4)
                before = layer.loss()
                layer.learn(run, 0.4)
                assert layer.loss() < 0.9 * before
            for i in range(len(some.items)):
                with torch.no_grad():
                    walk.pass_layer(i)


def test_processes_share_the_layers(files, tmp_path):
    """Each gives what one process alone gives of its layers."""
    state = [WalkState(tmp_path, f"{i}") for i in range(3)]
    whole = lesson(files, 0, 1).teach(state[0])
    first, second = (lesson(files, rank, 2).teach(state[1 + rank]) for rank in (0, 1))
    assert {unit[0] for unit in first} == {1, 3} and {unit[0] for unit in second} == {2}
    for unit, pair in (first | second).items():
        assert all(map(torch.equal, pair, whole[unit]))
    assert len(whole) == len(first) + len(second)


def test_a_run_goes_on_behind_the_layer_it_has_reached(files, tmp_path, monkeypatch):
    run, taught = options(files), LocalLayer.taught

    def stopped(self, *args):
        if self.layer == 3:
            raise KeyboardInterrupt
        return taught(self, *args)

    local.train_local(files / "start", tmp_path / "whole", run)
    monkeypatch.setattr(LocalLayer, "taught", stopped)
    with pytest.raises(KeyboardInterrupt):
        local.train_local(files / "start", tmp_path / "cut", run)
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    with pytest.raises(UserError, match="cut.run holds the layers of a run"):
        local.train_local(files / "start", tmp_path / "cut", run)
    with pytest.raises(UserError, match="another model, other data or other options"):
        other = replace(run, router_lr=0.1)
        local.train_local(files / "start", tmp_path / "cut", other, resume=True)
    local.train_local(files / "start", tmp_path / "cut", run, resume=True)
    one, other = (adapter.load(tmp_path / name) for name in ("whole", "cut"))
    assert one.config.units == other.config.units
    for unit, pair in one.routers.items():
        assert all(map(torch.equal, pair, other.routers[unit]))


@pytest.mark.parametrize(
    ("length", "sequences", "heads_kv", "ff", "dtype"),
    [(512, 3, 2, 768, "float32"), (1024, 2, 8, 768, "bfloat16"), (256, 6, 2, 4096, "float32")],
)
def test_memory_is_what_torch_holds(tmp_path, length, sequences, heads_kv, ff, dtype):
    fields = {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 300}
    fields |= {"num_hidden_layers": 3, "num_key_value_heads": heads_kv, "intermediate_size": ff}
    base = LlamaForCausalLM(LlamaConfig(**fields)).to(getattr(torch, dtype))
    units = tiny.config({"kv": [1, 2]}, 3, heads=heads_kv, kv_window=16)
    model = tiny.wrap(base, units, tokenizer=byte_tokenizer()).requires_grad_(False)
    (text := tmp_path / "text.txt").write_text(default_texts()[0][: 10 * length])
    tokens = sequences * length
    run = TrainConfig((str(text),), {"kv": 0.5}, tokens=tokens, length=length, held_out=2)
    process = SimpleNamespace(process_index=0, num_processes=1)
    some = local.Lesson(model, run, *local.data_of(model, run), process)
    with Allocations() as held:
        some.put(some.teach(WalkState(tmp_path, "state")))
        some.meet_target()
    need = local_memory.needed(ModelShape.of(base), some.plan())
    assert held.peak == pytest.approx(need.of(("streams", "layer", "routers")), rel=TOLERANCE)


def test_memory_is_told_and_refused_where_it_is_too_much(files, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "mod_export")
    monkeypatch.setattr(LocalLayer, "taught", lambda *_: {})
    local.train_local(files / "start", tmp_path / "out", options(files))
    (said,) = [text for text in caplog.messages if text.startswith("teaching layers takes about")]
    assert "(a layer's weights 0 MB, hidden states" in said and said.endswith("are left")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="teaching layers takes about .* 0 MB are left") as refused:
        local.train_local(files / "start", tmp_path / "none", options(files))
    assert refused.value.cure.startswith("--dtype bfloat16 would take")
    assert not (tmp_path / "none.run").exists()


def test_what_does_not_fit_is_refused(files, tmp_path):
    def refused(text: str, start="start", save_as=None, **more):
        with pytest.raises(UserError, match=text):
            local.train_local(files / start, tmp_path / "out", options(files, **more), save_as)

    refused("--per-layer means nothing with --local", per_layer=True)
    refused("--local writes an adapter", save_as="full")
    refused("tokens are more than the data have", tokens=10**7)
    shutil.copytree(files / "base", tmp_path / "bin")
    weights = tmp_path / "bin" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "bin" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="layer by layer, which cannot be: it has no safetensors"):
        run = options(files)
        local.train_local(files / "start", tmp_path / "out", run, base=tmp_path / "bin")
    assert not (tmp_path / "out").exists()
