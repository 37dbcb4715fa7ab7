"""The threshold rule at its edge."""

import pytest
import torch

from mod_export.model.router import is_active, threshold_logit


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shift", [0.0, -0.75, 1.5])
def test_a_token_at_the_threshold_is_active(p, shift):
    """The rule is >=, as in the runtime: the next smaller float32 is not active."""
    cut = torch.tensor(threshold_logit(p) + shift, dtype=torch.float32)
    below = torch.nextafter(cut, torch.tensor(-torch.inf))
    assert is_active(torch.stack([below, cut]), p, shift).tolist() == [False, True]
