"""Training runs on a tiny model: checkpoints, resume, teachers, and outputs that are in the way."""

import contextlib
import json
import signal
from dataclasses import replace

import pytest
import torch

from mod_export.errors import UserError
from mod_export.model.mod_model import MoDModel
from mod_export.training import checkpoints
from mod_export.training import loop as train_loop
from mod_export.training import run as train_module
from mod_export.training.callbacks import RouterCallback
from mod_export.training.student import Student
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer, with_bos
from tests.support.training_runs import (
    LENGTH,
    UNITS,
    assert_resumed_is_the_same,
    assert_same_weights,
    config,
    losses,
    train,
    write_files,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("train"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Pictures take longer than training does here."""
    monkeypatch.setattr(train_module, "plot", lambda *_: None)


def test_a_resumed_run_gives_the_losses_of_one_that_never_stopped(files, tmp_path, monkeypatch):
    """tests/slow/test_resume.py has other ways to train."""
    assert_resumed_is_the_same(files, tmp_path, 3, monkeypatch)


def test_a_signal_does_not_wait_for_the_rest_of_a_step(files, tmp_path, monkeypatch):
    forward, stop, forwards = Student.forward, [], []

    def counted(self, *args, **kwargs):
        forwards.extend([1] if kwargs.get("teach", True) else [])
        if len(forwards) == 10:  # the second of the second step
            stop.append(signal.SIGTERM)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Student, "forward", counted)
    monkeypatch.setattr(train_loop, "stopping", lambda: contextlib.nullcontext(stop))
    run = config(files, accumulate=8, batch=1, tokens=4 * 8 * LENGTH)
    with pytest.raises(SystemExit) as ended:
        train(files / "mod", tmp_path / "out", run)
    assert ended.value.code == 128 + signal.SIGTERM and len(forwards) == 10
    assert checkpoints.load(tmp_path / "out.run")["step"] == 1


def test_a_run_stopped_in_its_first_step_gives_the_losses_of_one_that_never_stopped(
    files, tmp_path, monkeypatch
):
    run = config(files, tokens=3 * 2 * LENGTH)
    train(files / "mod", tmp_path / "whole", run)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_loop, "stopping", lambda: contextlib.nullcontext([signal.SIGTERM]))
        train(files / "mod", tmp_path / "cut", run)
    assert checkpoints.load(tmp_path / "cut.run")["step"] == 0
    train(files / "mod", tmp_path / "cut", run, resume=True)
    assert losses(tmp_path / "cut.run") == losses(tmp_path / "whole.run")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_top_k_resumed_after_its_last_step_and_trained_on_with_thresholds(
    files, tmp_path, monkeypatch
):
    run = config(files, method="topk", tokens=4 * 2 * LENGTH)
    whole = train(files / "mod", tmp_path / "whole", run)
    with monkeypatch.context() as patch:
        patch.setattr(RouterCallback, "on_end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(files / "mod", tmp_path / "cut", run)
    assert train(files / "mod", tmp_path / "cut", run, resume=True) == whole
    train(tmp_path / "whole", tmp_path / "after", config(files, tokens=2 * LENGTH))
    after = MoDModel.load(tmp_path / "after")
    assert after.strategy.is_causal
    assert after.config.units["attn"].activation[4] == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("anneal, first", [(0.0, 0.7), (0.5, 0.95)])
def test_thresholds_begin_where_annealing_does(files, tmp_path, monkeypatch, anneal, first):
    set_thresholds, told = RouterCallback._set_thresholds, []
    monkeypatch.setattr(
        RouterCallback,
        "_set_thresholds",
        lambda *args: (told.append(args[2]), set_thresholds(*args)),
    )
    train(files / "mod", tmp_path / "out", config(files, anneal=anneal, tokens=4 * 2 * LENGTH))
    assert told[0] == pytest.approx([0.5, first]) and told[-1] == [0.5, 0.7]


def test_a_loss_that_is_no_number_stops_the_run(files, tmp_path):
    run = config(files, parameters="full", full_lr=1e18, save_every=1)
    with pytest.raises(
        UserError,
        match="not a number at step 2; there is no checkpoint yet; start again with lower",
    ):
        train(files / "mod", tmp_path / "out", run)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_replaced_by_spoilt_weights(files, tmp_path, monkeypatch):
    run = config(files, parameters="full", full_lr=1e-4, save_every=1)
    update = train_loop.Loop._update

    def spoiling(loop, number, seen):
        row = update(loop, number, seen)
        if number == 4:
            with torch.no_grad():
                loop.trainable()[-1].fill_(1e30)
        return row

    monkeypatch.setattr(train_loop.Loop, "_update", spoiling)
    with pytest.raises(
        UserError, match="not a number at step 6; the last good checkpoint is in .*lower"
    ):
        train(files / "mod", tmp_path / "out", run)
    assert checkpoints.load(tmp_path / "out.run")["step"] == 4
    monkeypatch.undo()
    assert train(files / "mod", tmp_path / "out", replace(run, full_lr=1e-5), resume=True)["kl"] > 0
    assert [row[0] for row in losses(tmp_path / "out.run")] == [*range(1, 13)]


def test_teachers(files, tmp_path):
    short, other = tmp_path / "short", tmp_path / "other"
    tiny.base(n_layer=3).save_pretrained(short)
    byte_tokenizer().save_pretrained(short)
    tiny.base().save_pretrained(other)
    with_bos(byte_tokenizer()).save_pretrained(other)
    run = config(files, tokens=2 * 2 * LENGTH)
    with pytest.raises(
        UserError,
        match="the teacher has 3 layers of 64, the model 6 layers of 64; leave out --hidden",
    ):
        train(files / "mod", tmp_path / "out", replace(run, teacher=str(short), hidden_weight=1.0))
    with pytest.raises(UserError, match="other has another tokenizer"):
        train(files / "mod", tmp_path / "out", replace(run, teacher=str(other)))
    train(files / "mod", tmp_path / "own", run)
    train(files / "mod", tmp_path / "out", replace(run, teacher=str(short)))
    own, others = (losses(tmp_path / f"{name}.run")[0][1] for name in ("own", "out"))
    assert others > 1.2 * own  # it is farther from a teacher of other weights


def test_outputs_and_checkpoints_in_the_way(files, tmp_path):
    run = config(files, tokens=2 * 2 * LENGTH)
    (tmp_path / "out.run").mkdir()
    with (
        train_module.alone(tmp_path / "out.run"),
        pytest.raises(UserError, match="another process trains into .*out"),
    ):
        train(files / "mod", tmp_path / "out", run)
    left = (
        tmp_path / "out.run" / f".{checkpoints.NAME}.0123.tmp"
    )  # A run that was stopped while it wrote left this file.
    left.touch()
    with pytest.raises(UserError, match="no checkpoint .*start without --resume"):
        train(files / "mod", tmp_path / "out", run, resume=True)
    train(files / "mod", tmp_path / "out", run)
    assert not left.exists()
    with pytest.raises(UserError, match="exists already"):
        train(files / "mod", tmp_path / "out", run)
    with pytest.raises(UserError, match="holds the checkpoint of a run"):
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        train(files / "mod", tmp_path / "out", run)
    with pytest.raises(UserError, match="another temperature: 0.3, now 0.5"):
        train(files / "mod", tmp_path / "out", replace(run, temperature=0.5), resume=True)
    with pytest.raises(UserError, match="no-such-file.txt"):
        train(files / "mod", tmp_path / "out", replace(run, data=("no-such-file.txt",)), force=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds no config.json or mod.json, so it is not replaced"):
        train(files / "mod", tmp_path / "theirs", run, force=True)
    tiny.save_small(tmp_path / "other", UNITS, seed=1)
    with pytest.raises(UserError, match="another base .*"):
        train(tmp_path / "other", tmp_path / "out", run, resume=True)
    checkpoint = tmp_path / "out.run" / checkpoints.NAME
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(UserError, match="is damaged"):
        train(files / "mod", tmp_path / "out", run, resume=True)
    torch.save({"a": 1}, checkpoint)
    with pytest.raises(UserError, match="is no checkpoint"):
        train(files / "mod", tmp_path / "out", run, resume=True)
    with pytest.raises(UserError, match="which no adapter holds"):
        train(files / "mod", tmp_path / "out", replace(run, parameters="full"), save_as="adapter")


def test_metrics_are_json_lines_with_everything_people_plot(files, tmp_path):
    train(files / "mod", tmp_path / "out", config(files, tokens=2 * 2 * LENGTH))
    rows = [
        json.loads(line)
        for line in (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert {
        "step",
        "loss",
        "kl",
        "nll",
        "activation",
        "units",
        "target",
        "price",
        "rate",
        "norm",
        "tokens_per_second",
        "seconds",
    } <= set(rows[0])
    assert set(rows[-1]["held_out"]) == {
        "kl",
        "perplexity_dense",
        "perplexity",
        "top1_agreement",
        "activation",
        "kv_share",
    }
