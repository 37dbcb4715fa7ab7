"""Training runs that take long: what they reach, precision, and weights that are no teacher."""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mod_export.errors import UserError
from mod_export.evaluation.run import EvaluationPlan, evaluate
from mod_export.export import export
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.schema import hf_tensor_names
from mod_export.training import run as train_module
from mod_export.training.log import read
from tests.support.draft_heads import tensors_of_head, with_head
from tests.support.gguf_models import write_models
from tests.support.model_types import HYBRIDS
from tests.support.tiny_adapter import save_for
from tests.support.training_runs import LENGTH, config, train, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("train"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Pictures take longer than training does here."""
    monkeypatch.setattr(train_module, "plot", lambda *_: None)


def test_distillation_lowers_the_divergence(files, tmp_path):
    run = config(
        files,
        target=0.5,
        tokens=200 * 2 * LENGTH,
        eval_every=200,
        parameters="full",
        full_lr=1e-4,
        start=0.5,
        router_lr=3e-4,
        drift_penalty=0,
    )
    figures = train(files / "mod", tmp_path / "out", run)
    untrained = train(
        files / "mod", tmp_path / "none", replace(run, tokens=1, full_lr=1e-12, router_lr=1e-12)
    )
    assert figures["kl"] < 0.9 * untrained["kl"]
    assert figures["perplexity_dense"] == pytest.approx(
        untrained["perplexity_dense"]
    )  # the teacher is the original
    seen = [
        row["activation"]
        for row in read(tmp_path / "out.run" / "metrics.jsonl")
        if row["step"] > 60 and "loss" in row
    ]
    assert torch.tensor(seen).mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.1)


def test_half_precision_and_tensorboard(files, tmp_path, monkeypatch, caplog):
    """bf16, as all models of docs/log.md were trained, stays near float32; and where
    TensorBoard is, it is told.
    """
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, step, value))

        def close(self):
            told.append("closed")

    run = config(files, parameters="lora", lora_rank=2)
    plain = train(files / "mod", tmp_path / "plain", run)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    AcceleratorState._reset_state(True)  # a process has one precision
    half = train(files / "mod", tmp_path / "half", replace(run, precision="bf16"))
    AcceleratorState._reset_state(True)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # converts every number
        assert re.search(
            r"note: bf16 takes \d+\.\d times as long as float32 on this CPU", caplog.messages[0]
        )
    assert half["kl"] == pytest.approx(plain["kl"], rel=0.1) and half["kl"] != plain["kl"]
    assert half["activation"]["attn"] == pytest.approx(plain["activation"]["attn"], abs=0.05)
    assert told[0] == (tmp_path / "half.run" / "tensorboard", None) and told[-1] == "closed"
    steps = [row for row in read(tmp_path / "half.run" / "metrics.jsonl") if "loss" in row]
    assert [entry[1:] for entry in told if entry[0] == "loss"] == [
        (row["step"], row["loss"]) for row in steps
    ]


def test_weights_that_are_not_trained_may_be_bfloat16(files, tmp_path):
    run = config(files, parameters="lora", lora_rank=2)
    plain = train(files / "mod", tmp_path / "plain", run)
    half = train(files / "mod", tmp_path / "half", replace(run, dtype="bfloat16"))
    assert half["kl"] == pytest.approx(plain["kl"], rel=0.1)
    routers = {
        name for unit in [(2, "kv"), (3, "kv"), (4, "attn")] for name in hf_tensor_names(*unit)
    }
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name in routers else torch.bfloat16)
    assert (
        evaluate(
            tmp_path / "half", EvaluationPlan(texts=(files / "text.txt",), length=LENGTH, count=2)
        )["texts"][0]["kl"]
        > 0
    )
    with pytest.raises(UserError, match="too coarse"):
        train(files / "mod", tmp_path / "full", replace(run, parameters="full", dtype="bfloat16"))


def test_trained_weights_are_no_teacher(files, tmp_path):
    run = config(files, parameters="lora", lora_rank=2, tokens=2 * 2 * LENGTH)
    train(files / "mod", tmp_path / "first", run)
    with pytest.raises(
        UserError, match="are trained, so .* not the original's; name the original with --teacher"
    ):
        train(tmp_path / "first", tmp_path / "second", run)
    assert not (tmp_path / "second.run").exists()
    first = train(files / "mod", tmp_path / "first", run, force=True)
    second = train(
        tmp_path / "first", tmp_path / "second", replace(run, teacher=str(files / "mod"))
    )
    assert second["perplexity_dense"] == pytest.approx(first["perplexity_dense"])


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_a_trained_hybrid_keeps_its_layers_for_drafts(files, tmp_path, parameters):
    """They were in no directory, and in no file that was made of trained weights."""
    plain = write_models(tmp_path, {"plain": HYBRIDS["qwen3_5"]})["plain"]
    source = with_head(plain, tmp_path / "source.gguf", layer=3)
    save_for(source, {"kv": [1, 3]}, tmp_path / "start")
    run = config(files, target=0.5, parameters=parameters, tokens=4 * LENGTH)
    trained = tmp_path / "trained"
    train_module.train(tmp_path / "start", trained, run, base=source)
    base = source if parameters == "lora" else None
    file = export(trained, tmp_path / "mod.gguf", "f32", base=base)
    assert tensors_of_head(file) == tensors_of_head(source)
    weights = [
        GGUFFile.open(path).tensors["blk.3.attn_q.weight"].array() for path in (file, source)
    ]
    assert 0 < abs(weights[0] - weights[1]).max() < 0.1
