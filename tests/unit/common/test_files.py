"""Outputs that appear whole or not at all, and locks between processes."""

import os
import subprocess
import sys
import threading
import time

import pytest

from mod_export.common.files import atomic_dir, atomic_file, check_room, give_back, locked
from mod_export.errors import UserError


def test_atomic_file(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_file(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_file(target) as tmp:
        tmp.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    with pytest.raises(UserError, match="--force"), atomic_file(target):
        pass
    with pytest.raises(RuntimeError), atomic_file(target, force=True) as tmp:
        raise RuntimeError
    assert target.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_atomic_dir(tmp_path):
    target = tmp_path / "out"
    for text in ("first", "second"):
        with atomic_dir(target, force=True) as tmp:
            (tmp / "config.json").write_text(text)
            (tmp / "config.json").chmod(0o600)
            (tmp / "program").write_text("#!/bin/sh\nexit 7\n")
            (tmp / "program").chmod(0o700)
    assert (target / "config.json").read_text() == "second"
    assert target.stat().st_mode & 0o666 == (target / "config.json").stat().st_mode & 0o777
    assert subprocess.run([target / "program"]).returncode == 7  # llama-server could not be run
    with pytest.raises(RuntimeError), atomic_dir(target, force=True) as tmp:
        raise RuntimeError
    assert (target / "config.json").read_text() == "second" and list(tmp_path.iterdir()) == [target]


def test_force_spares_other_directories_and_devices(tmp_path):
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(UserError, match="not replaced"), atomic_dir(tmp_path, force=True):
        pass
    with pytest.raises(UserError, match="regular file"), atomic_file(os.devnull, force=True):
        pass
    assert (tmp_path / "letters").read_text() == "dear"


def test_outputs_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="no directory"), atomic_file(tmp_path / "none" / "out"):
        pass
    with pytest.raises(UserError, match="cannot write"), atomic_file("/proc/self/out"):
        pass


def test_a_lock_is_for_one_at_a_time(tmp_path):
    """The second one is told, and waits; then no lock file is left."""
    order = []

    def second():
        with locked(tmp_path, busy=lambda: order.append("busy")):
            order.append("second")

    with locked(tmp_path, busy=lambda: order.append("never")):
        thread = threading.Thread(target=second)
        thread.start()
        while not order:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["busy", "first", "second"] and list(tmp_path.iterdir()) == []


def test_a_busy_lock_may_be_refused(tmp_path):
    def busy():
        raise UserError("another process is at work")

    name = tmp_path / "name"
    with locked(name, busy):
        assert [path.name for path in tmp_path.iterdir()] == ["name.lock"]
        with pytest.raises(UserError, match="at work"), locked(name, busy):
            pass
    with locked(name, busy):
        pass


def test_a_place_that_takes_no_lock_is_told_at_once():
    """FileLock alone takes the error for a lock that another process holds, and waits for ever."""
    with (
        pytest.raises(UserError, match="cannot write /proc/self/.lock"),
        locked("/proc/self", busy=lambda: pytest.fail("nobody is inside")),
    ):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = f"""
from mod_export.common.files import locked
with locked({str(tmp_path)!r}, busy=lambda: None):
    print("locked", flush=True)
    input()
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"locked\n"
        process.kill()
    calls = []
    with locked(tmp_path, busy=lambda: calls.append("busy")):
        pass
    assert calls == []


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot write .*file/name.lock"),
        locked(tmp_path / "file" / "name", busy=lambda: None),
    ):
        pass


def test_room_on_the_disk_is_told_and_checked(tmp_path, caplog):
    caplog.set_level("INFO", "mod_export")
    for n_bytes in (3.4e6, 3.4e8):
        check_room(tmp_path / "out", n_bytes, "it")
    (line,) = caplog.messages
    assert line.startswith("it takes up to 340 MB of disk, of which ")
    with pytest.raises(UserError, match="it takes up to 1000000000.0 GB .* free; free some, or"):
        check_room(tmp_path / "out", 1e18, "it")


def test_a_part_of_a_file_gives_its_room_back(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    with path.open("r+b") as file:
        give_back(file, 1 << 16, 1 << 19)
    if path.stat().st_blocks * 512 >= 1 << 20:
        pytest.skip("this file system cannot do it")
    held = path.read_bytes()
    assert len(held) == 1 << 20 and path.stat().st_blocks * 512 < 0.6 * (1 << 20)
    assert held.count(b"x") == (1 << 20) - (1 << 19) and held[1 << 16] == 0
