"""The pictures of an evaluation: nothing is cut, and no legend lies on what is drawn."""

import pytest

from mod_export.evaluation import plots

NAME = "a-model-with-a-rather-long-name-Q4_K_M.gguf"


@pytest.fixture(autouse=True)
def without_windows():
    pytest.importorskip("matplotlib").use("Agg")


def check_title(fig):
    fig.canvas.draw()
    title = fig._suptitle.get_window_extent()
    assert NAME in fig._suptitle.get_text()
    assert fig.bbox.x0 <= title.x0 and title.x1 <= fig.bbox.x1


def test_accuracies():
    """The legend lay on high bars, and a single task cut the title."""
    row = {"acc": 0.9, "acc_stderr": 0.03, "acc_norm": None, "acc_norm_stderr": None}
    fig = plots.tasks([{"task": "questions", "dense": row, "mod": row}], NAME)
    check_title(fig)
    assert fig.legends[0].get_window_extent().y1 <= fig.axes[0].get_window_extent().y0


def test_passkeys():
    by_depth = {"0.05": 1.0, "0.95": 0.5}
    row = {"trials": 4, "length": 1024, "kv_share": 0.5, "dense": None, "mod": 0.75}
    row |= {"dense_by_depth": by_depth, "mod_by_depth": by_depth}
    check_title(plots.passkey([row], NAME))
