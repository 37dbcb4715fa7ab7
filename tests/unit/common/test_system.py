"""Figures of this machine and of this process."""

import os
import subprocess
import sys

from mod_export.common import system
from mod_export.common.paths import cache_dir


def test_memory():
    assert 0 < system.free_memory() <= system.total_memory()
    assert 0 < system.available_memory() < system.total_memory()
    assert 0 < system.resident("VmRSS") <= system.resident("VmHWM") < system.total_memory()
    system.forget_peak()
    assert system.resident("VmHWM") > 0


def test_processors():
    assert system.usable_cpus() >= 1
    assert system.cpu_name()
    assert system.cpu_features() == system.cpu_features() != ""


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOD_EXPORT_CACHE", raising=False)
    assert cache_dir() == tmp_path / "mod-export" and cache_dir().is_dir()
    monkeypatch.setenv("MOD_EXPORT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_busy_processors_are_seen():
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert 0.5 < system.busy_cpus() <= os.cpu_count()
    finally:
        loop.kill()
        loop.wait()
