"""The scores of tasks."""

import pytest

from mod_export.evaluation import scoring


def test_mean_of_tasks():
    scores = {"acc": 0.5, "acc_stderr": 0.3, "acc_norm": 0.7, "acc_norm_stderr": 0.1}
    greedy = {"acc": 0.1, "acc_stderr": 0.4, "acc_norm": None, "acc_norm_stderr": None}
    rows = [
        {
            "task": t,
            "items": n,
            "dense": s,
            "mod": None,
            "agreement": None,
            "activation": None,
            "kv_share": None,
        }
        for t, n, s in (("a", 10, scores), ("b", 90, greedy))
    ]
    mean = scoring._mean(rows)
    assert mean["dense"] == pytest.approx(
        {"acc": 0.3, "acc_stderr": 0.25, "acc_norm": 0.7, "acc_norm_stderr": 0.1}
    )
    assert mean["items"] == 100 and mean["mod"] is None
