"""Training runs on a tiny model, for tests: their files, their settings, and what they logged."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mod_export import adapter
from mod_export.data.text import default_texts
from mod_export.training import checkpoints
from mod_export.training import loop as train_loop
from mod_export.training import run as train_run
from mod_export.training.config import TrainConfig
from mod_export.training.log import read
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer

UNITS = {"kv": [2, 3], "attn": [4]}
LENGTH = 32
train = partial(train_run.train, save_as="full")  # directories, which tests load


def write_files(path: Path) -> Path:
    """Write a model, mod/, and text.txt."""
    tiny.save_small(path / "mod", UNITS)
    (path / "text.txt").write_text(default_texts()[0][:5000])
    return path


def write_start(path: Path) -> Path:
    """Write a base model, text.txt and an adapter, start/, whose K/V heads decide apart."""
    (path / "text.txt").write_text(default_texts()[0][:5000])
    model = tiny.mod_model({"kv": [1, 2, 3]}, n_ctx=512, heads=2)
    tokenizer = byte_tokenizer()
    for part in (model.base, tokenizer):
        part.save_pretrained(path / "base")
    identity = adapter.base_identity(model.base, tokenizer, "tiny")
    parts = model.config, model.router_tensors(), model.base, identity
    adapter.save(path / "start", *parts, model=str(path / "base"))
    return path


def config(files, **kwargs):
    base = TrainConfig(
        data=(str(files / "text.txt"),),
        target={"kv": 0.5, "attn": 0.7},
        tokens=12 * 2 * LENGTH,
        length=LENGTH,
        batch=2,
        held_out=3,
        eval_every=100,
        save_every=100,
    )
    return replace(base, **kwargs)


def losses(run):
    return [
        (row["step"], row["loss"], row["activation"])
        for row in read(run / "metrics.jsonl")
        if "loss" in row
    ]


def assert_resumed_is_the_same(files, folder: Path, kept: int, monkeypatch, **options) -> None:
    """Assert that a resumed run has the losses and the weights of a run that never stopped.

    The resumed run was stopped after its step kept + 1.
    """
    run = config(
        files, tokens=8 * 2 * LENGTH * options.get("accumulate", 1), save_every=kept, **options
    )
    train(files / "mod", folder / "whole", run)
    gradients = train_loop.Loop._gradients

    def stopped(self, number, stop):
        if number == kept + 1:
            raise KeyboardInterrupt
        return gradients(self, number, stop)

    monkeypatch.setattr(train_loop.Loop, "_gradients", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(files / "mod", folder / "cut", run)
    monkeypatch.undo()
    assert len(losses(folder / "cut.run")) == kept + 1
    assert checkpoints.load(folder / "cut.run")["step"] == kept
    train(files / "mod", folder / "cut", run, resume=True)
    assert losses(folder / "cut.run") == losses(folder / "whole.run")
    assert_same_weights(folder / "whole", folder / "cut")


def assert_same_weights(a: Path, b: Path) -> None:
    """Assert that the weights are the same to the bit."""
    first, second = (load_file(path / "model.safetensors") for path in (a, b))
    assert all(torch.equal(first[name], second[name]) for name in first)
