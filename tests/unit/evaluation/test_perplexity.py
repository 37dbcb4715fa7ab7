"""Perplexity and KL of a model in torch."""

import math

import pytest
import torch

from mod_export.data.text import default_texts, pack
from mod_export.evaluation import perplexity
from mod_export.evaluation import run as eval_run
from mod_export.evaluation.readers import ROWS, Pair, TorchReader
from mod_export.metrics import visible_share
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer

UNITS = {"kv": [2, 3], "attn": [2, 4], "ffn": [2, 4], "block": [5]}
LENGTH = 300
TEXT = default_texts()[1]


@pytest.mark.parametrize("skip", [0, 100, 550])
def test_loss_by_hand(skip):
    """From whole forwards; 600 tokens take several blocks of logits."""
    model = tiny.mod_model(UNITS, n_vocab=300)
    ids = pack(byte_tokenizer(), TEXT, 2 * LENGTH, count=2)
    assert ids.shape[1] > 2 * ROWS
    sums, active, n = torch.zeros(4, dtype=torch.float64), [], 2 * (2 * LENGTH - skip - 1)
    with torch.inference_mode():
        for row in ids:
            logits, trace = model(row[None], trace=True)
            p, q = (
                x[0, skip:].double().log_softmax(-1)
                for x in (tiny.dense_logits(model, row[None]), logits)
            )
            p, q, after = p[:-1], q[:-1], row[skip + 1 :, None]
            sums += torch.stack(
                [
                    (p.exp() * (p - q)).sum(),
                    -p.gather(1, after).sum(),
                    -q.gather(1, after).sum(),
                    (p.argmax(-1) == q.argmax(-1)).sum(),
                ]
            )
            active.append(trace.active[0])
    windows = dict.fromkeys(range(model.n_layer), 0)
    shares = [visible_share(model.config, a, windows) for a in active]
    share = sum(shares) / 2
    expected = [*(sums / n).tolist(), torch.cat(active).float().mean().item(), share]
    whole = TorchReader(model, whole=True)
    for found in (
        eval_run.loss(model, ids, skip),
        perplexity.loss(Pair(whole.dense(), whole), ids, skip),
    ):
        assert found.tokens == n
        figures = [
            found.kl,
            math.log(found.perplexity_dense),
            math.log(found.perplexity),
            found.top1_agreement,
            found.activation,
            found.kv_share,
        ]
        assert figures == pytest.approx(expected, rel=1e-4)
