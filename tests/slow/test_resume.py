"""Training that is stopped, by a signal or a full disk, and goes on."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from mod_export.training import checkpoints
from mod_export.training import run as train_module
from mod_export.training.log import read
from tests.support.training_runs import (
    LENGTH,
    assert_resumed_is_the_same,
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


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"method": "topk"}, 3),
        ({"parameters": "lora", "lora_rank": 2, "accumulate": 2, "recompute": True}, 4),
        ({"per_layer": True, "hidden_weight": 0.5, "lm_weight": 0.1, "recall": 0.5}, 5),
    ],
    ids=["topk", "lora", "terms"],
)
def test_a_resumed_run_gives_the_losses_of_one_that_never_stopped(
    files, tmp_path, options, kept, monkeypatch
):
    """With a checkpoint before, at and after half of the steps, where routers lose their drift."""
    assert_resumed_is_the_same(files, tmp_path, kept, monkeypatch, **options)


def test_sigterm_saves_and_exits(files, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mod_export",
        "train",
        files / "mod",
        "-o",
        tmp_path / "out",
        "-d",
        files / "text.txt",
        "--tokens",
        10**6,
        "--length",
        LENGTH,
        "--save-every",
        10**6,
        "--batch",
        2,
    ]
    process = subprocess.Popen([str(x) for x in command], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out.run" / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.is_file() and metrics.read_text().count("\n") > 2
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "go on with --resume" in errors
    assert checkpoints.load(tmp_path / "out.run")["step"] == read(metrics)[-1]["step"]
    assert not (tmp_path / "out").exists()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
from mod_export.cli import main
main(sys.argv[1:])
"""


def test_a_full_disk_costs_nothing(files, tmp_path):
    run = config(files, parameters="lora", lora_rank=4)
    train(files / "mod", tmp_path / "fits", replace(run, tokens=2 * 2 * LENGTH))
    assert (tmp_path / "fits.run" / checkpoints.NAME).stat().st_size > 300_000
    command = [
        sys.executable,
        "-c",
        LIMITED,
        "train",
        files / "mod",
        "-o",
        tmp_path / "out",
        "-d",
        files / "text.txt",
        "--train",
        "lora",
        "--lora-rank",
        4,
        "--length",
        LENGTH,
        "--tokens",
        500,
        "--held-out",
        2,
    ]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write")
    assert not list(tmp_path.glob("out.run/*.pt")) and not list(tmp_path.glob("out.run/.*tmp"))


def test_a_disk_too_full_for_the_model_costs_nothing(files, tmp_path):
    """The checkpoint of routers fits, what is written at the end does not; with room, --resume
    writes it.
    """
    limit = LIMITED.replace("300_000", "600_000")
    options = list(
        map(
            str,
            [
                "train",
                files / "mod",
                "--save",
                "full",
                "-o",
                tmp_path / "out",
                "-d",
                files / "text.txt",
                "--length",
                LENGTH,
                "--tokens",
                500,
                "--held-out",
                2,
            ],
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", limit, *options], capture_output=True, text=True, timeout=120
    )
    last = done.stderr.splitlines()[-1]
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and last.startswith("error: cannot write")
    ), last
    assert "too large" in last and "--resume" in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.run"]
    steps = losses(tmp_path / "out.run")
    again = [sys.executable, "-m", "mod_export", *options, "--resume"]
    assert subprocess.run(again, capture_output=True, timeout=120).returncode == 0
    assert (tmp_path / "out").is_dir() and losses(tmp_path / "out.run") == steps
