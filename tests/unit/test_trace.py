"""The picture of decisions, drawn from decisions that no model made."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mod_export import trace
from mod_export.errors import UserError
from mod_export.units import Unit

UNITS = [Unit(layer, kind) for layer in (2, 3) for kind in ("kv", "block", "attn", "ffn")]


def decisions(n_tokens: int, n_generated: int) -> trace.Decisions:
    active = np.random.default_rng(0).random((n_tokens, len(UNITS))) < 0.4
    texts = [("the", "\n", " a", "a-very-long-token")[i % 4] for i in range(n_tokens)]
    return trace.Decisions(active, UNITS, texts, n_tokens - n_generated, "mod.gguf")


def test_a_long_text_is_wrapped(tmp_path):
    trace.draw(decisions(20, 0), tmp_path / "short.png")
    trace.draw(decisions(230, 30), tmp_path / "long.png")
    short, long = (plt.imread(tmp_path / name) for name in ("short.png", "long.png"))
    assert long.shape[0] > 2 * short.shape[0]  # three rows
    assert long.shape[1] < 230 * trace.TOKEN_WIDTH_INCHES * 150  # narrower than all tokens in one


def test_units_stand_by_kind():
    ordered = trace._by_kind(decisions(20, 0))
    assert [unit.kind for unit in ordered.units] == [
        kind for kind in ("kv", "block", "attn", "ffn") for _ in range(2)
    ]
    by_unit = dict(zip(UNITS, decisions(20, 0).active.T, strict=True))
    for unit, column in zip(ordered.units, ordered.active.T, strict=True):
        np.testing.assert_array_equal(column, by_unit[unit])


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "there.png").touch()
    for name, words in (
        ("x.jpg", "let its name end in .png, .pdf or .svg"),
        ("there.png", "exists already"),
        ("none/x.png", "there is no directory"),
    ):
        with pytest.raises(UserError, match=words):
            trace.draw(decisions(4, 0), tmp_path / name)


def test_rows_of_heads_share_the_label_of_their_layer(tmp_path):
    units = [Unit(layer, "kv", head) for layer in range(1, 30) for head in range(3)]
    active = np.random.default_rng(0).random((60, len(units))) < 0.4
    made = trace.Decisions(active, units, ["a"] * 60, 60, "mod.gguf")
    assert trace._by_kind(made).units == units
    ticks, labels = trace._unit_labels(units, points=3)
    assert labels == list(range(1, 30)) and ticks == [3 * i + 1 for i in range(29)]
    ticks, labels = trace._unit_labels(units, points=1)
    assert labels == list(range(1, 30, 3))
    trace.draw(made, tmp_path / "heads.png")
    assert plt.imread(tmp_path / "heads.png").shape[0] < 900


def test_nothing_is_cut_or_lies_on_something_else():
    """A long name was cut above a short text, and names of kinds with one row overlapped."""
    made = replace(decisions(5, 2), title="Qwen3.5-35B-A3B-Instruct-MoD-kv-attn-ffn-Q4_K_M.gguf")
    ordered = trace._by_kind(made)
    one_row = replace(ordered, active=ordered.active[:, ::2], units=ordered.units[::2])
    fig = trace._figure(one_row, 5)
    fig.canvas.draw()
    for head in (*fig.texts, fig.legends[0]):
        extent = head.get_window_extent()
        assert fig.bbox.x0 <= extent.x0 and extent.x1 <= fig.bbox.x1
    kinds = [text for text in fig.axes[0].texts if text.get_text() in ("kv", "block", "attn")]
    extents = [text.get_window_extent() for text in kinds]
    assert len(extents) == 3
    assert not any(a.overlaps(b) for a, b in zip(extents, extents[1:], strict=False))
    plt.close(fig)


def test_characters_that_no_font_has_are_told_in_one_line(tmp_path, caplog, recwarn, monkeypatch):
    """matplotlib warned of each character, with a line of source."""
    monkeypatch.setattr(trace, "FONTS", trace.FONTS[:1])
    made = replace(decisions(4, 0), texts=["\u4f7f", "\u4f7f\u7528", "a", "b"])
    trace.draw(made, tmp_path / "boxes.png")
    (line,) = caplog.messages
    assert line.startswith("note: no installed font has all characters") and not recwarn.list
    caplog.clear()
    trace.draw(decisions(4, 0), tmp_path / "plain.png")
    assert not caplog.messages
