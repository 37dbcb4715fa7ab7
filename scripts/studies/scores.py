"""All scores of what skipping costs, and all fits, of which calibration uses the best.

Beside those of mod_export/calibration/costs.py, with Δ what the unit adds to the residual stream h:

* cosine, of block, attn and ffn: 1 - cos(h, h + Δ)
* max, sum, of kv: largest, mean attention received from queries beyond the window
* max_value, sum_value, of kv: the same, weighted by the norm of what the key's value adds, |W_o v|
* repeat_*, of kv: as max, sum, max_value, sum_value and max_relative, with the queries of a
  repetition of the whole text after itself (the reconstruction target of KVzip, arXiv 2505.23416)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from mod_export.calibration.costs import KEY_SCORES, CostMeter, KeyScore, received
from mod_export.calibration.layer_hooks import LayerRecord
from mod_export.units import ATTN, BLOCK, FFN, KV, Unit

ATTENTION_SCORES = {
    "max": KeyScore(lambda block: block.attention.amax(1), takes_max=True),
    "sum": KeyScore(lambda block: block.attention.sum(1), takes_max=False),
    "max_value": KeyScore(lambda block: block.weighted.amax(1), takes_max=True, needs_values=True),
    "sum_value": KeyScore(lambda block: block.weighted.sum(1), takes_max=False, needs_values=True),
    "max_relative": KEY_SCORES["max_relative"],
}
# Score on the queries of a repetition -> the score that it is taken with.
REPEATED = {f"repeat_{name}": name for name in ATTENTION_SCORES}
UNIT_SCORES = ("size", "cosine", "gradient")
SCORES = {
    KV: (*ATTENTION_SCORES, "gradient", *REPEATED),
    BLOCK: (*UNIT_SCORES, "gradient_keys"),
    ATTN: (*UNIT_SCORES, "gradient_keys"),
    FFN: UNIT_SCORES,
}
REPEAT_PROMPT = "\n\nRepeat the previous context exactly.\n\n"


class StudyMeter(CostMeter):
    """Measures every score."""

    scores = SCORES
    key_scores = ATTENTION_SCORES | KEY_SCORES

    def __init__(self, base: nn.Module, windows: Sequence[int], seed: int = 0):
        super().__init__(base, windows, seed)
        self._context = 0

    def measure(
        self, ids: torch.Tensor, wanted: dict[Unit, list[str]], context: int = 0
    ) -> Iterator:
        """Yield as CostMeter does.

        context: where > 0, the repeat_* scores are taken on the first `context` tokens from the
        queries after them, and h and costs of kv units have that length.
        """
        self._context = context
        for unit, (h, costs) in super().measure(ids, wanted):
            yield unit, (h[: context or None] if unit.kind == KV else h, costs)

    def unit_cost(
        self, kind: str, name: str, record: LayerRecord, grads: list | None
    ) -> torch.Tensor:
        if name != "cosine":
            return super().unit_cost(kind, name, record, grads)
        h = record.mid if kind == FFN else record.h
        delta = {ATTN: record.attn, FFN: record.ffn, BLOCK: record.out}[kind]
        return 1 - torch.cosine_similarity(h.double(), (h + delta).double(), dim=-1).float()

    def key_costs(
        self,
        units: dict[Unit, list[str]],
        record: LayerRecord,
        grads: list | None,
        attn: nn.Module,
    ) -> dict[Unit, dict[str, torch.Tensor]]:
        plain = {unit: [name for name in units[unit] if name not in REPEATED] for unit in units}
        costs = super().key_costs(plain, record, grads, attn)
        scores = {
            name: self.key_scores[REPEATED[name]]
            for names in units.values()
            for name in names
            if name in REPEATED
        }
        if scores:
            n_unit, weight = self.n_unit(units, record), self.values_weight(scores, attn)
            found = received(record, scores, (1,), n_unit, weight, first_query=self._context)
            for unit, names in units.items():
                repeated = [name for name in names if name in REPEATED]
                costs[unit] |= {name: found[name][:, unit.head or 0] for name in repeated}
        return {
            unit: {name: cost[:, : self._context or None] for name, cost in of_unit.items()}
            for unit, of_unit in costs.items()
        }


def with_repetition(tokenizer, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return ids, a request and ids again, and the length of the first part."""
    request = torch.tensor(tokenizer(REPEAT_PROMPT, add_special_tokens=False)["input_ids"])
    return torch.cat((ids, request, ids)), len(ids)


def logistic(
    data: Iterable[tuple[torch.Tensor, torch.Tensor]], penalty: float, steps: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a logistic regression by Newton's method; return weight [n_embd] and bias [1], float32.

    data: pieces (x [N, n_embd], y [N] in {0, 1}); each step goes through all of them.
    """
    pieces = list(data)
    n = sum(len(x) for x, _ in pieces)
    mean = sum(x.double().sum(0) for x, _ in pieces) / n
    scale = (sum((x.double() - mean).pow(2).sum(0) for x, _ in pieces) / n).clamp(min=1e-12).sqrt()
    share = (sum(y.double().sum() for _, y in pieces) / n).clamp(1e-3, 1 - 1e-3)
    ridge = torch.full((len(mean) + 1,), penalty, dtype=torch.float64)
    ridge[-1] = 1e-9  # the bias is free
    solution = torch.zeros_like(ridge)
    solution[-1] = torch.logit(share)
    for _ in range(steps):
        slope, curve = ridge * solution, torch.diag(ridge)
        for x, y in pieces:
            z = torch.cat(
                ((x.double() - mean) / scale, torch.ones(len(x), 1, dtype=torch.float64)), dim=1
            )
            p = torch.sigmoid(z @ solution)
            slope = slope + z.T @ (p - y.double()) / n
            curve = curve + (z * (p * (1 - p)).clamp(min=1e-4)[:, None]).T @ z / n
        solution = solution - torch.linalg.solve(curve, slope)
    weight = solution[:-1] / scale
    return weight.float(), (solution[-1] - mean @ weight).reshape(1).float()
