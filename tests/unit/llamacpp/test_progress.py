"""What a build tells while it runs."""

import logging
import sys

import pytest

from mod_export.errors import UserError
from mod_export.llamacpp import build


def test_a_build_logs_each_fifth_of_the_way(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mod_export")
    code = "for i in range(1, 11): print(f'[{i}/10] compiling')"
    with (tmp_path / "log").open("w") as log:
        build._run([sys.executable, "-c", code], log)
    assert caplog.messages == [f"[{i}/10] {10 * i} %" for i in (2, 4, 6, 8, 10)]
    assert (tmp_path / "log").read_text().count("compiling") == 10


def test_a_failed_build_names_its_error(tmp_path):
    code = "print('[1/2] compiling'); print('x.cpp:1: error: no'); raise SystemExit(1)"
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(UserError, match="building llama.cpp failed: x.cpp:1: error: no"),
    ):
        build._run([sys.executable, "-c", code], log)
