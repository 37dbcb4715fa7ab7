"""The pictures of a training run."""

import pytest

from mod_export.training import log
from mod_export.units import Unit


def test_legends_hide_no_point():
    """A legend within the axes lay on the KL of held-out text, and the target had no name."""
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    each = {"units": [0.5, 0.6], "activation": [0.5, 0.6], "target": [0.5, 0.5]}
    steps = [{"step": step, "loss": 0.01 * step} | each for step in range(1, 9)]
    held = [{"step": 4, "held_out": {"kl": 0.01}}, {"step": 8, "held_out": {"kl": 0.009}}]
    fig = log._loss_figure(steps, held, [Unit(1, "kv"), Unit(1, "ffn")])
    fig.canvas.draw()
    for axis in fig.axes:
        legend, inside = axis.get_legend().get_window_extent(), axis.get_window_extent()
        assert legend.y0 >= inside.y1 and legend.x1 < fig.bbox.x1 and legend.y1 <= fig.bbox.y1
    names = [text.get_text() for text in fig.axes[1].get_legend().get_texts()]
    assert names == ["kv (running mean)", "ffn (running mean)", "target"]
    plt.close(fig)
