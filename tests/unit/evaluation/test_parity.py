"""What `verify` makes of the figures of both sides."""

from dataclasses import replace

import numpy as np
import pytest

from mod_export.evaluation.parity import BOUNDS, Sums, judge
from mod_export.units import Unit


@pytest.mark.parametrize("experts", [False, True])
def test_another_expert_is_no_fault(experts):
    """Two tokens of a text went through other experts on the runtime, and one decision differs far
    from its threshold: `verify` refused a right file of DeepSeek in f16.
    """
    logits = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
    on_runtime = logits.copy()
    on_runtime[[60, 90]] = logits[[61, 91]]
    active, scores = np.ones((300, 1), bool), np.full((300, 1), 2.0)
    differing = active.copy()
    differing[200] = False
    sums = Sums([Unit(1, "kv")], [0.5], experts)
    sums.add(logits, active, scores, on_runtime, differing)
    bounds = replace(BOUNDS["f16"], margin=None) if experts else BOUNDS["f16"]
    failures = judge(sums.result(), bounds)
    assert [line.split()[0] for line in failures] == ([] if experts else ["mean_kl", "the"])
