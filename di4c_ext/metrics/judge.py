"""The references samples are held against: real images, in the spaces that suit them, and what real images score.

The distance of finite samples from a reference falls with their number, and so does a sample's entropy. So every
figure has a floor: the same figure of as many real images, held against the other real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from di4c_ext import random
from di4c_ext.data import ImageTokens
from di4c_ext.lazy_rows import Rows, joined, taken
from di4c_ext.metrics.entropy import position_entropy, unigram_entropy
from di4c_ext.metrics.extractor import Extractor
from di4c_ext.metrics.features import Classifier, Seen, classifier
from di4c_ext.metrics.frechet import Moments, frechet_distance
from di4c_ext.metrics.label_score import label_score

MAX_PIXEL_DIMENSION = 1024  # beyond it the eigenvalues of the pixels' covariance take longer than the sampling
CUTS = 10  # choices of real images a floor is the mean of
_AT_ONCE = 5000  # vectors made float64 at a time


class Judge:
    """Measures samples (N, D) of images like `train` and `heldout`, together the real ones.

    num_samples: how many samples a figure will stand on, which the floors are taken at; None: half of the real images,
    and never more. cache: where the classifier of the labels is kept. extractor: the feature space in its place.

    floors: by figure. Of the distances, so many real images against all the others, and so many training images
    against the held-out ones; of the rest, what so many real images score. Each the mean of 10 choices.
    """

    def __init__(
        self,
        train: ImageTokens,
        heldout: ImageTokens,
        cache: Path | None,
        num_samples: int | None = None,
        extractor: str | None = None,
    ) -> None:
        self.num_states = train.num_states
        self.space: Classifier | Extractor | None = None
        self.accuracy: float | None = None
        self.score = "label_score" if extractor is None else "extractor_score"
        if extractor is not None:
            self.space = Extractor(extractor, train)
        elif train.labels is not None:
            own = self.space = classifier(train, cache)
            self.accuracy = own.accuracy(heldout)
        self.has_pixels = train.length <= MAX_PIXEL_DIMENSION
        real = joined(train.tokens, heldout.tokens)
        self.sizes = {"all": len(real), "train": len(train), "heldout": len(heldout)}
        self.floor_size = min(len(real) // 2, num_samples or len(real))
        seen = None if self.space is None else self.space.seen(real)
        all_of_them = slice(0, len(real))
        self._references = {
            "": self._spaces(real, seen, all_of_them),
            "_heldout": self._spaces(real, seen, slice(len(train), len(real))),
        }
        self.floors = self._floors(real, seen)

    def measure(self, tokens: Tensor) -> dict[str, float]:
        """The figures of samples (N, D): distances to all real images and to the held-out ones, entropies in nats."""
        seen = None if self.space is None else self.space.seen(tokens)
        spaces = self._spaces(tokens, seen, slice(0, len(tokens)))
        distances = {
            f"frechet_{space}{name}": frechet_distance(reference[space], moments)
            for name, reference in self._references.items()
            for space, moments in spaces.items()
        }
        return distances | self._plain(tokens, seen)

    def _spaces(self, tokens: Rows, seen: Seen | None, rows: Tensor | slice) -> dict[str, Moments]:
        """The moments of some rows in each space."""
        spaces = {}
        if seen is not None:
            spaces["features"] = _moments(seen.features[rows], lambda x: x)
        if self.has_pixels:
            spaces["pixels"] = _moments(taken(tokens, rows), lambda x: x.double() / max(self.num_states - 1, 1))
        return spaces

    def _plain(self, tokens: Tensor, seen: Seen | None) -> dict[str, float]:
        """What is said of samples without a reference."""
        score = {} if seen is None else {self.score: label_score(seen.probabilities)}
        return score | {
            "position_entropy": position_entropy(tokens, self.num_states),
            "unigram_entropy": unigram_entropy(tokens, self.num_states),
        }

    def _floors(self, real: Rows, seen: Seen | None) -> dict[str, float]:
        num_train = self.sizes["train"]
        everything, heldout = self._references.values()
        found = []
        for cut in range(CUTS):
            chosen = random.keys(cut, len(real)).argsort()[: self.floor_size]
            some = None if seen is None else Seen(*(values[chosen] for values in seen))
            parts = self._spaces(real, seen, chosen)
            of_train = random.keys(cut, num_train).argsort()[: self.floor_size]
            found.append(
                {
                    f"frechet_{space}": frechet_distance(everything[space].without(parts[space]), parts[space])
                    for space in parts
                }
                | {
                    f"frechet_{space}_heldout": frechet_distance(heldout[space], moments)
                    for space, moments in self._spaces(real, seen, of_train).items()
                }
                | self._plain(real[chosen], some)
            )
        return _mean(found)


def _moments(vectors: Rows, made: Callable[[Tensor], Tensor]) -> Moments:
    """The moments of made(vectors), some at a time."""
    moments = Moments()
    for some in vectors.split(_AT_ONCE):
        moments.update(made(some))
    return moments


def _mean(figures: Iterable[dict[str, float]]) -> dict[str, float]:
    rows = list(figures)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
