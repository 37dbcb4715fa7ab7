"""Tables and pictures of rows that no benchmark has to make."""

import pytest

from mod_export.benchmark import plots as bench_plots
from mod_export.benchmark import report as bench_report


def test_memory_on_a_gpu_in_tables():
    row = {
        "context": 64,
        "batch": 1,
        "ubatch": 512,
        "kv_type": "f16",
        "flash_attn": True,
        "shift": 0.0,
        "beyond_training": False,
        "phase": "decode",
        "kv_bytes": {},
        "ms": {"mod": 1.0, "ceiling": 2.0},
        "rss_peak_bytes": {"mod": 3e6},
        "vram_bytes": {"mod": 7e6},
    }
    assert "GPU MoD" in (table := bench_report._memory([row], False)) and " 7" in table
    assert "GPU" not in bench_report._memory([row | {"vram_bytes": {}}], False)


@pytest.mark.parametrize(("used", "words"), [(64, 1), (63, 0)])
def test_a_note_says_why_nothing_is_saved(used, words):
    row = {
        "beyond_training": False,
        "floor": None,
        "kv_bytes": {"mod": {"used": used, "dense": 64}},
    }
    notes = bench_report._notes({"rows": [row], "about": {}})
    assert len(notes) == words and all("sink tokens, window and rollback" in n for n in notes)


def row(phase: str, shift: float, ms: dict[str, float]) -> dict:
    """A row with what a picture of latency over activation shows."""
    spread = {"median": 0.5, "q1": 0.4, "q3": 0.6}
    return {
        "phase": phase,
        "context": 64,
        "shift": shift,
        "work": 0.5,
        "ms": ms,
        "ratios": {"mod/ceiling": spread},
    }


def test_the_floor_of_an_even_number_of_rows_is_their_median():
    """It was the larger one of the middle two."""
    floors = (1.0, 2.0, 4.0, 8.0)
    rows = [
        row(phase, float(i), {"ceiling": 10.0, "mod": 5.0, "floor": ms})
        for phase in bench_plots.PHASES
        for i, ms in enumerate(floors)
    ]
    figure = bench_plots.latency_activation(rows, "title")
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert lines[bench_report.NAMES["floor"]].get_ydata()[0] == pytest.approx(0.3)


def test_the_dense_time_of_an_even_number_of_rows_is_their_median():
    rows = [
        {
            "context": 64,
            "kl": 0.1 * (i + 1),
            "activation_held_out": 0.5,
            "ms_decode_mod": 1.0,
            "ms_decode_ceiling": ms,
        }
        for i, ms in enumerate((1.0, 2.0, 4.0, 8.0))
    ]
    figure = bench_plots.speed_quality(rows, "mod.gguf")
    dense = [line for line in figure.axes[1].get_lines() if line.get_label().startswith("dense")]
    assert dense[0].get_xdata()[0] == pytest.approx(3.0)
