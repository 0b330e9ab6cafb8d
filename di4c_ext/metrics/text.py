"""How varied sampled text is: entropy, distinct n-grams, self-BLEU. Beside every perplexity, which a dull text wins.

A sample is a sequence of tokens of any kind that can be counted: ids, words, characters. A tensor (N, D) is N samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal, get_args

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
    found = [_entropy(Counter(sample)) for sample in _sequences("unigram_entropy", samples)]
    return sum(found) / len(found) / (math.log(2) if unit == "bits" else 1.0)


def distinct_n(samples: Samples, n: int) -> float:
    """How many different n-grams the samples hold together, as a share of all their n-grams (Li et al., 2016).

    It falls with the number of samples, so it compares at one number only.
    """
    _check_order("distinct_n", "n", n)
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for sample in _sequences("distinct_n", samples):
        counts.update(_ngrams(sample, n))
    if not counts:
        raise ValueError(f"distinct_n: no sample has {n} tokens; give longer samples, or a smaller n")
    return len(counts) / counts.total()


def self_bleu(samples: Samples, max_n: int = 4) -> float:
    """Mean over the samples of the BLEU of each against all others as its references, in [0, 1] (Zhu et al., 2018).

    BLEU of a sentence with n-grams up to max_n, alike in weight: matches clipped by the reference that has most, the
    brevity penalty from the reference nearest in length, a precision of no match smoothed by method 1 of Chen and
    Cherry; 0 where not even a token matches. High where samples repeat each other; it grows with their number.
    """
    _check_order("self_bleu", "max_n", max_n)
    sequences = _sequences("self_bleu", samples)
    if len(sequences) < 2:
        raise ValueError("self_bleu: one sample has no others to be held against; give 2 or more")
    counts = [[Counter(_ngrams(sample, n)) for sample in sequences] for n in range(1, max_n + 1)]
    best = [_two_largest(order) for order in counts]
    lengths = Counter(len(sample) for sample in sequences)
    total = 0.0
    for i, sample in enumerate(sequences):
        precisions = [_precision(i, order[i], most) for order, most in zip(counts, best, strict=True)]
        total += _brevity(len(sample), lengths) * _mean_precision(precisions)
    return total / len(sequences)


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


def _ngrams(sample: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    return zip(*(sample[i:] for i in range(n)), strict=False)


def _entropy(counts: Counter[Hashable]) -> float:
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


_Most = dict[tuple[Hashable, ...], tuple[int, int, int]]  # n-gram -> most in a sample, which one, most in any other


def _two_largest(order: Sequence[Counter[tuple[Hashable, ...]]]) -> _Most:
    most: _Most = {}
    for i, counts in enumerate(order):
        for gram, count in counts.items():
            first, owner, second = most.get(gram, (0, -1, 0))
            most[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
    return most


def _precision(i: int, counts: Counter[tuple[Hashable, ...]], most: _Most) -> tuple[int, int]:
    """Of sample i's n-grams: those matched, each as often as some other has it at most, and their number."""
    matched = 0
    for gram, count in counts.items():
        first, owner, second = most[gram]
        matched += min(count, second if owner == i else first)
    return matched, max(counts.total(), 1)


def _mean_precision(precisions: Sequence[tuple[int, int]]) -> float:
    """Their geometric mean."""
    if precisions[0][0] == 0:
        return 0.0
    logs = [math.log((matched or _EPSILON) / total) for matched, total in precisions]
    return math.exp(sum(logs) / len(logs))


def _brevity(length: int, lengths: Counter[int]) -> float:
    """1 for a sample longer than the nearest other length, the shorter of two as near; exp(1 - r / c) else."""
    others = [other for other, count in lengths.items() if count > (other == length)]
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length > nearest else math.exp(1 - nearest / length)
