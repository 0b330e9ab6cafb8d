from __future__ import annotations

import math

import pytest
import torch

from di4c_ext.metrics import position_entropy, unigram_entropy
from di4c_ext.metrics.entropy import entropies_of, unigram_entropy_without


def test_known_values() -> None:
    """Position 0 is constant, position 1 uniform over 4 states."""
    tokens = torch.stack([torch.zeros(400, dtype=torch.int64), torch.arange(400) % 4], 1)
    assert position_entropy(tokens, 4) == pytest.approx(math.log(4) / 2)
    pooled = [5 / 8, 1 / 8, 1 / 8, 1 / 8]
    assert unigram_entropy(tokens, 4) == pytest.approx(-sum(p * math.log(p) for p in pooled))


def test_one_sample_has_no_entropy_per_position() -> None:
    assert position_entropy(torch.tensor([[0, 1, 2]]), 3) == 0
    assert unigram_entropy(torch.tensor([[0, 1, 2]]), 3) == pytest.approx(math.log(3))


def test_without_a_sample_it_is_that_of_the_others() -> None:
    tokens = torch.randint(0, 6, (7, 5), generator=torch.Generator().manual_seed(0))
    wanted = [unigram_entropy(torch.cat([tokens[:i], tokens[i + 1 :]]), 9) for i in range(7)]
    assert unigram_entropy_without(tokens, 9).tolist() == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ValueError, match="of one sample nothing is left"):
        unigram_entropy_without(tokens[:1], 9)


def test_counts_are_how_often_samples_are_there() -> None:
    """Exact for all ones, and to first order in what is added."""
    tokens = torch.randint(0, 5, (3000, 7), generator=torch.Generator().manual_seed(0)).square() // 4
    entropies = entropies_of(tokens, 5)
    whole = {"position_entropy": position_entropy(tokens, 5), "unigram_entropy": unigram_entropy(tokens, 5)}
    assert entropies(torch.ones(3000)) == pytest.approx(whole, rel=1e-12)
    counts = torch.where(torch.arange(3000) < 60, 2, 1)  # 60 samples once more
    again = torch.cat([tokens, tokens[:60]])
    found = entropies(counts)
    for name, entropy in (("position_entropy", position_entropy), ("unigram_entropy", unigram_entropy)):
        moved = entropy(again, 5) - whole[name]
        assert found[name] - whole[name] == pytest.approx(moved, rel=0.1) and abs(moved) > 1e-5


def test_refuses_states_outside() -> None:
    with pytest.raises(ValueError, match=r"span 0\.\.4, outside 0\.\.3"):
        position_entropy(torch.tensor([[0, 4]]), 4)
    with pytest.raises(ValueError, match="N and D at least 1"):
        unigram_entropy(torch.zeros(0, 3), 4)
