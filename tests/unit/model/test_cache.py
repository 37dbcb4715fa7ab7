"""The K/V cache: its cells are what later queries can see."""

import pytest
import torch

from mod_export.errors import UserError
from tests.support import tiny_torch as tiny
from tests.support.tiny_torch import BATCH, IDS, UNITS, in_pieces


@torch.inference_mode()
def test_cells_are_what_later_queries_can_see():
    model = tiny.mod_model(UNITS["all"], IDS, kv_window=6)
    _, trace = model(IDS, trace=True)
    units = model.config.routed()
    for size in (48, 5, 1):
        cache = in_pieces(model, IDS, size)[2]
        for layer, (cells,) in enumerate(cache.cells):
            visible = torch.ones(48, dtype=torch.bool)
            for kind in ("block", "attn"):
                if (layer, kind) in units:
                    visible &= trace.active[0, :, units.index((layer, kind))]
            if (layer, "kv") in units:
                visible &= trace.active[0, :, units.index((layer, "kv"))] | (
                    48 - torch.arange(48) < 6
                )
            assert cells.position.tolist() == visible.nonzero()[:, 0].tolist()


def test_the_form_with_a_cache_takes_one_sequence():
    model = tiny.mod_model(UNITS["kv"])
    with pytest.raises(UserError, match="3 sequences"):
        model.step(BATCH, model.new_cache())
