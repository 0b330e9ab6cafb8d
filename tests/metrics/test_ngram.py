"""The n-gram judge: probabilities that sum to one, Witten and Bell's numbers, and text above noise."""

from __future__ import annotations

import pytest
import torch

from di4c_ext.metrics.ngram import NGram


def test_probabilities_sum_to_one_after_any_context() -> None:
    model = NGram(torch.tensor([[0, 1, 2, 0, 1, 1, 4, 0]]), num_states=5, order=3)
    for context in ([0, 1], [1, 1], [3, 3], [4, 2]):  # the last two were never seen
        rows = torch.tensor([[*context, following] for following in range(5)])
        assert float(model.log_prob(rows)[:, 2].exp().sum()) == pytest.approx(1.0)


def test_numbers_by_hand() -> None:
    """0 1 0 2: p(0) = (2 + 3 / 4) / (4 + 3); after 0 came 1 and 2, so p(1 | 0) = (1 + 2 p(1)) / (2 + 2)."""
    model = NGram(torch.tensor([[0, 1, 0, 2]]), num_states=4, order=2)
    found = model.log_prob(torch.tensor([[0, 1], [3, 3]])).exp()
    zero, one = (2 + 3 / 4) / 7, (1 + 3 / 4) / 7
    assert found[0].tolist() == pytest.approx([zero, (1 + 2 * one) / 4])
    never = (3 / 4) / 7
    assert found[1].tolist() == pytest.approx([never, never])


def test_rows_do_not_run_into_each_other() -> None:
    """3 never follows 1 within a row."""
    model = NGram(torch.tensor([[0, 1], [3, 2]]), num_states=4, order=2)
    assert model.log_prob(torch.tensor([[1, 3]]))[0, 1] == pytest.approx(float(model.log_prob(torch.tensor([[3]]))))


def test_ranks_text_above_noise_and_counts_long_words_it_can_pack() -> None:
    text = (torch.arange(4000) % 37 % 11).view(40, 100)
    model = NGram(text[:30], num_states=11, order=30)
    assert model.order == 15  # 4 bits a token
    noise = text[30:][:, torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert 1 < model.perplexity(text[30:]) < 2 < model.perplexity(noise)


def test_tokens_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens \(N, D\) in 0..4 are wanted"):
        NGram(torch.tensor([[0, 5]]), num_states=5)
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        NGram(torch.tensor([[0, 1]]), num_states=5, order=0)
