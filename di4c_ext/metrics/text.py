"""How varied sampled text is: entropy, distinct n-grams, self-BLEU. Beside every perplexity, which a dull text wins.

A sample is a sequence of tokens of any kind that can be counted: ids, words, characters. A tensor (N, D) is N samples.

Figures that samples score together have no value of one sample's own, and drawing samples anew with replacement would
count the repeats as what they look for. So `..._without` gives such a figure of all samples but one, for each of them:
the jackknife, by which an interval is made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Samples = Tensor | Sequence[Sequence[Hashable]]
Unit = Literal["nats", "bits"]
_EPSILON = 0.1  # what smoothing method 1 of Chen and Cherry (2014) puts in the place of no match


def unigram_entropy(samples: Samples, unit: Unit = "nats") -> float:
    """Mean over the samples of the entropy of a sample's own tokens, as language papers print it beside perplexity.

    At most log D for samples of D tokens, so it compares at one length only. The entropy of the tokens of all samples
    pooled, which repetition within a sample hardly moves, is `metrics.unigram_entropy`.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unigram_entropy: unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")
    found = unigram_entropies(samples)
    return sum(found) / len(found) / (math.log(2) if unit == "bits" else 1.0)


def unigram_entropies(samples: Samples) -> list[float]:
    """That of each sample, in nats."""
    return [_entropy(Counter(sample)) for sample in _sequences("unigram_entropy", samples)]


def distinct_n(samples: Samples, n: int) -> float:
    """How many different n-grams the samples hold together, as a share of all their n-grams (Li et al., 2016).

    It falls with the number of samples, so it compares at one number only.
    """
    every = _counted("distinct_n", samples, n)
    counts = _together(every)
    if not counts:
        raise ValueError(f"distinct_n: no sample has {n} tokens; give longer samples, or a smaller n")
    return len(counts) / counts.total()


def distinct_n_without(samples: Samples, n: int) -> Tensor:
    """(N,) float64: `distinct_n` without each of the samples; that of all where no other has n tokens."""
    every = _counted("distinct_n", samples, n)
    counts = _together(every)
    left = [
        (len(counts) - sum(counts[gram] == count for gram, count in own.items()), counts.total() - own.total())
        for own in every
    ]
    whole = distinct_n(samples, n)
    return torch.tensor([kinds / total if total else whole for kinds, total in left], dtype=torch.float64)


def self_bleu(samples: Samples, max_n: int = 4) -> float:
    """Mean over the samples of the BLEU of each against all others as its references, in [0, 1] (Zhu et al., 2018).

    BLEU of a sentence with n-grams up to max_n, alike in weight: matches clipped by the reference that has most, the
    brevity penalty from the reference nearest in length, a precision of no match smoothed by method 1 of Chen and
    Cherry; 0 where not even a token matches. High where samples repeat each other; it grows with their number.
    """
    counted = _bleu_counts("self_bleu", samples, max_n)
    kinds = Counter(counted.lengths)
    brevity = torch.tensor([_brevity(own, kinds) for own in counted.lengths], dtype=torch.float64)
    return float(_bleu(counted.matched, counted.totals, brevity).mean())


def self_bleu_without(samples: Samples, max_n: int = 4) -> Tensor:
    """(N,) float64: `self_bleu` without each of the samples, neither as a sample nor as a reference; N at least 3.

    Holds max_n N^2 numbers.
    """
    counted = _bleu_counts("self_bleu_without", samples, max_n)
    n, kinds = len(counted.lengths), Counter(counted.lengths)
    if n < 3:
        raise ValueError(f"self_bleu_without: of {n} samples no two are left; give 3 or more")
    # (.., i, j): of sample i without sample j
    matched = counted.matched[..., None].repeat(1, 1, n)
    for order, (first, other, lost) in enumerate(counted.owed):
        matched[order].index_put_((first, other), -lost.double(), accumulate=True)
        matched[order].index_put_((other, first), -lost.double(), accumulate=True)
    brevity = {(own, absent): _brevity(own, kinds, absent) for own in kinds for absent in kinds}
    rows = [[brevity[own, absent] for absent in counted.lengths] for own in counted.lengths]
    found = _bleu(matched, counted.totals[..., None], torch.tensor(rows, dtype=torch.float64))
    return found.fill_diagonal_(0).sum(0) / (n - 1)


def _sequences(op: str, samples: Samples) -> list[Sequence[Hashable]]:
    rows: list[Sequence[Hashable]] = samples.tolist() if isinstance(samples, Tensor) else list(samples)
    if isinstance(samples, Tensor) and samples.ndim != 2:
        raise ValueError(f"{op}: samples have shape {tuple(samples.shape)}; give (N, D)")
    if not rows or not all(len(row) for row in rows):
        raise ValueError(f"{op}: {len(rows)} samples, some of them empty perhaps; give 1 or more of 1 token or more")
    return rows


def _check_order(op: str, name: str, n: int) -> None:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{op}: {name} must be an integer of at least 1, got {n!r}")


def _counted(op: str, samples: Samples, n: int) -> list[Counter[tuple[Hashable, ...]]]:
    """The n-grams of each sample."""
    _check_order(op, "n", n)
    return [Counter(_ngrams(sample, n)) for sample in _sequences(op, samples)]


def _together(every: Sequence[Counter[tuple[Hashable, ...]]]) -> Counter[tuple[Hashable, ...]]:
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for own in every:
        counts.update(own)
    return counts


def _ngrams(sample: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    return zip(*(sample[i:] for i in range(n)), strict=False)


def _entropy(counts: Counter[Hashable]) -> float:
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


# n-gram -> how often the sample has it that has it most, which one it is; the second such; the third's number
_Most = dict[tuple[Hashable, ...], tuple[int, int, int, int, int]]


def _three_largest(every: Sequence[Counter[tuple[Hashable, ...]]]) -> _Most:
    most: _Most = {}
    for i, counts in enumerate(every):
        for gram, count in counts.items():
            first, owner, second, runner_up, third = most.get(gram, (0, -1, 0, -1, 0))
            if count > first:
                most[gram] = (count, i, first, owner, second)
            elif count > second:
                most[gram] = (first, owner, count, i, second)
            else:
                most[gram] = (first, owner, second, runner_up, max(third, count))
    return most


def _matched(i: int, counts: Counter[tuple[Hashable, ...]], most: _Most) -> int:
    """Of sample i's n-grams those matched, each as often as some other sample has it at most."""
    total = 0
    for gram, count in counts.items():
        first, owner, second, _, _ = most[gram]
        total += min(count, second if owner == i else first)
    return total


class _BleuCounts(NamedTuple):
    """What the BLEU of N samples is made of, by the order of the n-grams.

    matched (max_n, N) float64: n-grams of a sample that others have, each as often as some other has it at most. owed:
    by order, samples i and j and how many fewer matches each of them has without the other, int64, (P,) each. totals
    (max_n, N) float64: n-grams of a sample, at least 1.
    """

    matched: Tensor
    owed: list[tuple[Tensor, Tensor, Tensor]]
    totals: Tensor
    lengths: list[int]


def _bleu_counts(op: str, samples: Samples, max_n: int) -> _BleuCounts:
    _check_order(op, "max_n", max_n)
    sequences = _sequences(op, samples)
    if len(sequences) < 2:
        raise ValueError(f"{op}: one sample has no others to be held against; give 2 or more")
    matched, owed, lengths = [], [], [len(sample) for sample in sequences]
    for n in range(1, max_n + 1):
        every = [Counter(_ngrams(sample, n)) for sample in sequences]
        most = _three_largest(every)
        matched.append([_matched(i, counts, most) for i, counts in enumerate(every)])
        # By one sample's absence only another one can lose: of the two that have an n-gram most the other.
        pairs = [(i, j, second - third) for _, i, second, j, third in most.values() if second > third]
        some = torch.tensor(pairs, dtype=torch.int64).view(-1, 3)
        owed.append((some[:, 0], some[:, 1], some[:, 2]))
    totals = [[max(length - n, 1) for length in lengths] for n in range(max_n)]
    return _BleuCounts(torch.tensor(matched).double(), owed, torch.tensor(totals).double(), lengths)


def _bleu(matched: Tensor, totals: Tensor, brevity: Tensor) -> Tensor:
    """matched and totals (max_n, ...), brevity (...) -> (...): no match counts as a tenth, 0 where no token matches."""
    precisions = torch.where(matched > 0, matched, _EPSILON) / totals
    return precisions.log().mean(0).exp() * (matched[0] > 0) * brevity


def _brevity(own: int, lengths: Counter[int], absent: int | None = None) -> float:
    """1 for a sample longer than the nearest other length, the shorter of two as near; exp(1 - r / c) else.

    absent: the length of a sample that is left out beside it; 1 where nothing is left.
    """
    others = [other for other, count in lengths.items() if count > (other == own) + (other == absent)]
    nearest = min(others, key=lambda other: (abs(other - own), other), default=own)
    return 1.0 if own > nearest else math.exp(1 - nearest / own)
