"""Masks: which tokens a query sees, with decisions and with padding."""

import pytest
import torch
from torch.nn.functional import pad

from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny
from tests.support.tiny_torch import BATCH, IDS, UNITS, assert_close


@torch.inference_mode()
def test_kv_visibility_is_the_stated_rule():
    """The same tokens forgotten in all layers is one mask for all layers, which a plain model takes
    too.
    """
    keep, window = torch.rand(1, 48, generator=torch.Generator().manual_seed(3)) < 0.4, 6
    mask = torch.zeros(1, 1, 48, 48, dtype=torch.bool)
    for query in range(48):
        for key in range(query + 1):
            mask[0, 0, query, key] = keep[0, key] or query - key < window
    plain = tiny.base()
    expected = plain(IDS, attention_mask=mask).logits
    model = MoDModel.from_base(plain, None)
    assert_close(
        model(IDS, decisions={(i, "kv"): keep for i in range(tiny.N_LAYER)}, kv_window=window),
        expected,
    )
    assert (model(IDS) - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["block", "attn"])
@torch.inference_mode()
def test_a_token_that_stores_nothing_is_seen_by_nobody(kind):
    active = torch.ones(1, 48, dtype=torch.bool)
    active[0, 20] = False
    other = IDS.clone()
    other[0, 20] = 5
    model = MoDModel.from_base(tiny.base(), None)
    decisions = {(i, kind): active for i in range(tiny.N_LAYER)}
    difference = (
        (model(IDS, decisions=decisions) - model(other, decisions=decisions)).abs().amax(-1)[0]
    )
    assert difference[20] > 0.1
    assert difference[torch.arange(48) != 20].max() == 0
    assert (model(IDS) - model(other))[0, 21:].abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padding_changes_nothing(side):
    model = tiny.mod_model(UNITS["all"], BATCH)
    lengths = (24, 17, 5)
    rows = [((24 - n, 0) if side == "left" else (0, 24 - n)) for n in lengths]
    ids = torch.stack([pad(BATCH[i, :n], rows[i]) for i, n in enumerate(lengths)])
    mask = torch.stack(
        [pad(torch.ones(n, dtype=torch.long), rows[i]) for i, n in enumerate(lengths)]
    )
    logits, trace = model(ids, attention_mask=mask, trace=True)
    for i, n in enumerate(lengths):
        alone, trace_alone = model(BATCH[i : i + 1, :n], trace=True)
        assert_close(logits[i][mask[i] > 0], alone[0])
        assert torch.equal(trace.active[i][mask[i] > 0], trace_alone.active[0])
