"""How varied text is: hand-made numbers, and NLTK where it is installed."""

from __future__ import annotations

import math

import pytest
import torch

from di4c_ext.metrics.text import (
    distinct_n,
    distinct_n_without,
    self_bleu,
    self_bleu_without,
    unigram_entropies,
    unigram_entropy,
)


def test_entropy_is_that_of_each_sample() -> None:
    """One sample of one word and one of four: 0 and log 4, whatever the other holds."""
    samples = [["a"] * 4, ["a", "b", "c", "d"]]
    assert unigram_entropy(samples) == pytest.approx(math.log(4) / 2)
    assert unigram_entropy(samples, "bits") == pytest.approx(1.0)
    ids = torch.tensor([[3, 3, 3, 7]])
    assert unigram_entropy(ids) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    with pytest.raises(ValueError, match="unit must be one of nats, bits, got 'bit'"):
        unigram_entropy(ids, "bit")  # type: ignore[arg-type]


def test_distinct_pairs_are_counted_over_all_samples() -> None:
    samples = ["abab", "abc"]  # ab ba ab, ab bc: 3 of 5
    assert distinct_n(samples, 2) == pytest.approx(3 / 5)
    assert distinct_n(samples, 1) == pytest.approx(3 / 7)
    assert distinct_n(torch.tensor([[1, 2, 3], [4, 5, 6]]), 2) == 1.0
    with pytest.raises(ValueError, match="no sample has 5 tokens"):
        distinct_n(samples, 5)
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        distinct_n(samples, 0)


def test_self_bleu_of_hand_made_samples() -> None:
    same = [list("abcde")] * 3
    assert self_bleu(same) == pytest.approx(1.0)
    apart = [list("abc"), list("def"), list("ghi")]
    assert self_bleu(apart) == 0.0
    # a b c against c d: c matches, no pair does (0.1 of 2). c d against a b c: c, no pair (0.1 of 1), and it is short.
    first = math.sqrt(1 / 3 * 0.1 / 2)
    second = math.sqrt(1 / 2 * 0.1 / 1) * math.exp(1 - 3 / 2)
    assert self_bleu([list("abc"), list("cd")], 2) == pytest.approx((first + second) / 2)


def test_matches_are_clipped_by_the_best_other_sample() -> None:
    """a a a a: two of its a are matched by a a b b, its own four are no reference; a a b b: two a, no b."""
    assert self_bleu(["aaaa", "aabb"], 1) == pytest.approx((2 / 4 + 2 / 4) / 2)
    # Of two samples that have most, each is the other's reference.
    assert self_bleu(["aaa", "aaa", "bbb"], 1) == pytest.approx(2 / 3)


def test_self_bleu_is_nltks() -> None:
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    g = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 9, (int(n),), generator=g).tolist() for n in torch.randint(2, 14, (25,), generator=g)]
    smooth = bleu.SmoothingFunction().method1
    for max_n in (1, 2, 4):
        wanted = [
            bleu.sentence_bleu(
                samples[:i] + samples[i + 1 :], sample, weights=[1 / max_n] * max_n, smoothing_function=smooth
            )
            for i, sample in enumerate(samples)
        ]
        assert self_bleu(samples, max_n) == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)


def test_figures_without_a_sample_are_those_of_the_others() -> None:
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 3, 4, 7, 7, 7, 9, 12, 1])
    samples = [torch.randint(0, 5, (int(n),), generator=g).tolist() for n in lengths]
    others = [samples[:i] + samples[i + 1 :] for i in range(len(samples))]
    for n in (1, 2, 4):
        assert self_bleu_without(samples, n).tolist() == pytest.approx([self_bleu(rest, n) for rest in others])
        assert distinct_n_without(samples, n).tolist() == pytest.approx([distinct_n(rest, n) for rest in others])
    assert distinct_n_without(["abc", "d"], 3).tolist() == [1.0, 1.0], "nothing is left without the first"
    assert sum(unigram_entropies(samples)) / 9 == pytest.approx(unigram_entropy(samples))
    with pytest.raises(ValueError, match="of 2 samples no two are left"):
        self_bleu_without(samples[:2])


def test_nothing_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unigram_entropy: samples have shape \(3,\); give \(N, D\)"):
        unigram_entropy(torch.zeros(3))
    with pytest.raises(ValueError, match="some of them empty"):
        distinct_n([[], [1, 2]], 1)
    with pytest.raises(ValueError, match="one sample has no others"):
        self_bleu(["abc"])
