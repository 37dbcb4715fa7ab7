"""Which variants of a benchmark run side by side, and what their processes load."""

from mod_export.benchmark import grouping, processes
from mod_export.benchmark import run as bench_run


def test_groups_keep_what_is_compared_together(caplog):
    variants = [v for v in bench_run.VARIANTS if v != "ceiling_split"]
    need = dict.fromkeys(variants, 10)
    assert (
        grouping.groups(variants, need, 60)
        == [["ceiling", "floor", "dense_patched", "mod", "all_active", "none_active"]]
        and not caplog.messages
    )
    assert grouping.groups(variants, need, 45) == [
        ["ceiling", "floor", "mod", "none_active"],
        ["ceiling", "dense_patched", "all_active"],
    ]
    assert len(grouping.groups(variants, need, 30)) == 3
    assert len(caplog.messages) == 2 and "in groups" in caplog.messages[0]
    assert grouping.groups(["ceiling", "mod"], need, 30) == [["ceiling", "mod"]]
    grouping.groups(variants, need, 10)
    assert "may end or swap" in caplog.messages[-1]


def test_library_path_keeps_the_users_behind_ours(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/driver")
    assert processes.library_path("/lib") == "/lib:/driver"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    assert processes.library_path("/lib") == "/lib"
