from __future__ import annotations

import math

import pytest
import torch

from di4c_ext.metrics import position_entropy, unigram_entropy


def test_known_values() -> None:
    """Position 0 is constant, position 1 uniform over 4 states."""
    tokens = torch.stack([torch.zeros(400, dtype=torch.int64), torch.arange(400) % 4], 1)
    assert position_entropy(tokens, 4) == pytest.approx(math.log(4) / 2)
    pooled = [5 / 8, 1 / 8, 1 / 8, 1 / 8]
    assert unigram_entropy(tokens, 4) == pytest.approx(-sum(p * math.log(p) for p in pooled))


def test_one_sample_has_no_entropy_per_position() -> None:
    assert position_entropy(torch.tensor([[0, 1, 2]]), 3) == 0
    assert unigram_entropy(torch.tensor([[0, 1, 2]]), 3) == pytest.approx(math.log(3))


def test_refuses_states_outside() -> None:
    with pytest.raises(ValueError, match=r"span 0\.\.4, outside 0\.\.3"):
        position_entropy(torch.tensor([[0, 4]]), 4)
    with pytest.raises(ValueError, match="N and D at least 1"):
        unigram_entropy(torch.zeros(0, 3), 4)
