"""`convert --resume` of a process that is killed: it ends with what one process finds in one go."""

import random
import shutil
import signal
import subprocess
import sys
import time

from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer

KILLS = 5


def start(folder, out):
    """Start a conversion, and return it when it begins to work."""
    command = [sys.executable, "-m", "mod_export", "convert", "base", "-o", out, "--resume"]
    command += ["--calibration-text", "text.txt", "--kv-window", "32"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "measuring" in line or "going on" in line:
            break
    return process


def test_killed_at_random_moments(tmp_path):
    tiny.base(n_layer=24).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    process = start(tmp_path, "whole")
    begin = time.monotonic()
    process.communicate()
    seconds = time.monotonic() - begin
    assert process.returncode == 0 and not (tmp_path / "whole.run").exists()
    killed = 0
    while killed < KILLS:
        process = start(tmp_path, "cut")
        time.sleep(random.uniform(0, seconds / 3))
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
        else:  # it was done before
            shutil.rmtree(tmp_path / "cut")
    process = start(tmp_path, "cut")
    _, told = process.communicate()
    assert process.returncode == 0, told
    for name in ("mod.json", "routers.safetensors"):
        whole, cut = (tmp_path / out / name for out in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()
    left = ["base", "cut", "text.txt", "whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
