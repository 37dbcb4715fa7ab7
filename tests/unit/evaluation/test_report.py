"""Tables of an evaluation."""

import pytest

from mod_export.common.text import NO_KV_SAVED
from mod_export.evaluation.report import table


@pytest.mark.parametrize(
    ("activation", "kv_share", "said"),
    [(0.5, 1.0, True), (0.5, 0.9, False), (1.0, 1.0, False), (None, None, False)],
)
def test_a_table_says_why_nothing_is_saved(activation, kv_share, said):
    row = {"text": "a.txt", "tokens": 63, "perplexity": 2.0, "perplexity_dense": 2.0, "kl": 0.1}
    row |= {"top1_agreement": 0.9, "activation": activation, "kv_share": kv_share}
    assert table("texts", [row]).endswith(NO_KV_SAVED) == said
