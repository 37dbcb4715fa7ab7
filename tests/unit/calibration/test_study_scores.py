"""The scores and fits that calibration does not use: the study compares them with those in use."""

import pytest
import torch

from mod_export.calibration.costs import SCORES as SCORES_IN_USE
from mod_export.calibration.costs import CostMeter
from mod_export.data.text import pack
from mod_export.errors import UserError
from scripts.studies.scores import SCORES, StudyMeter, logistic
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_every_score_of_every_kind_is_finite_and_costs_differ(tokenizer):
    base = tiny.base()
    ids = pack(tokenizer, TEXT, 64)[0]
    for kind, names in SCORES.items():
        plain = [name for name in names if not name.startswith("repeat_")]
        repeated = [name for name in names if name not in plain]
        for wanted, text, context in ((plain, ids, 0), (repeated, torch.cat((ids, ids)), 64)):
            if wanted:
                for _, (h, costs) in StudyMeter(base, windows=(8,)).measure(
                    text, {(3, kind): wanted}, context
                ):
                    assert h.shape == (64, 64) and list(costs) == sorted(
                        costs, key=list(costs).index
                    )
                    for name, cost in costs.items():
                        assert cost.shape == ((1, 64) if kind == "kv" else (64,))
                        assert (
                            torch.isfinite(cost).all() and (cost >= 0).all() and cost.std() > 0
                        ), (kind, name)


def test_the_scores_in_use_are_those_of_calibration():
    base = tiny.base()
    ids = torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(4))
    wanted = {(3, kind): list(names) for kind, names in SCORES_IN_USE.items()}
    found = [
        dict(meter(base, windows=(8,)).measure(ids, wanted)) for meter in (CostMeter, StudyMeter)
    ]
    for unit, (h, costs) in found[0].items():
        assert torch.equal(h, found[1][unit][0])
        for name, cost in costs.items():
            assert torch.equal(cost, found[1][unit][1][name])
    with pytest.raises(UserError, match="unknown score 'cosine' for kv"):
        list(StudyMeter(base, windows=(8,)).measure(ids, {(1, "kv"): ["cosine"]}))


def test_logistic_stands_at_its_optimum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) * torch.linspace(
        0.1, 30, 12
    )  # dimensions of very different size
    z = x @ torch.randn(12, generator=generator)
    label = (z + 20 * torch.randn(400, generator=generator) > z.median()).float()
    weight, bias = logistic([(x[:150], label[:150]), (x[150:], label[150:])], penalty=0)
    residual = torch.sigmoid(x @ weight + bias) - label
    assert residual.mean().abs() < 1e-5 and (x.T @ residual / 400 / x.std(0)).abs().max() < 1e-4
