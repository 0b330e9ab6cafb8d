"""The references samples are held against: real images, in the spaces that suit them, and what real images score.

The distance of finite samples from a reference falls with their number, and so does a sample's entropy. So every
figure has a floor: the same figure of as many real images, held against the other real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.data import ImageTokens
from di4c_ext.lazy_rows import Rows, joined, taken
from di4c_ext.metrics import reference
from di4c_ext.metrics.bootstrap import bootstrap_figures
from di4c_ext.metrics.entropy import entropies_of, position_entropy, unigram_entropy
from di4c_ext.metrics.extractor import Extractor
from di4c_ext.metrics.features import Classifier, Seen, classifier
from di4c_ext.metrics.frechet import Moments, frechet_distance, frechet_of
from di4c_ext.metrics.kid import KernelDistance
from di4c_ext.metrics.label_score import label_score, label_score_of
from di4c_ext.metrics.manifold import DENSITY_K, PRECISION_K, Manifold

MAX_PIXEL_DIMENSION = 1024  # beyond it the eigenvalues of the pixels' covariance take longer than the sampling
PAIRED = 5000  # images on either side, at most, of figures that look at every pair: so many squared are held
CUTS = 10  # choices of real images a floor is the mean of
_AT_ONCE = 5000  # vectors made float64 at a time
_BELOW_0 = "kid"  # the one figure that may be
_SHARES = ("precision_k", "recall_k", "coverage")

Counted = Callable[[Tensor], dict[str, float]]  # counts (N,), how often each sample is there -> figures


class Judge:
    """Measures samples (N, D) of images like `train` and `heldout`, together the real ones.

    num_samples: how many samples a figure will stand on, which the floors are taken at; None: half of the real images,
    and never more. cache: where the classifier of the labels is kept, and the statistics of the real images. extractor:
    the feature space in its place, a name of `networks.open_network`; trust_remote_code: consent to run its code.

    floors: by figure. Of what is held against real images, so many of these against all the others, and so many
    training images against the held-out ones; of the rest, what so many real images score. Each the mean of 10 choices.
    """

    def __init__(
        self,
        train: ImageTokens,
        heldout: ImageTokens,
        cache: Path | None,
        num_samples: int | None = None,
        extractor: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.num_states = train.num_states
        self.space: Classifier | Extractor | None = None
        self.accuracy: float | None = None
        self.score = "label_score" if extractor is None else "extractor_score"
        if extractor is not None:
            self.space = Extractor(extractor, train, trust_remote_code)
        elif train.labels is not None:
            own = self.space = classifier(train, cache)
            self.accuracy = own.accuracy(heldout)
        self.has_pixels = train.length <= MAX_PIXEL_DIMENSION
        self.sizes = {"all": len(train) + len(heldout), "train": len(train), "heldout": len(heldout)}
        self.floor_size = min(self.sizes["all"] // 2, num_samples or self.sizes["all"])
        self._reference = self._known(train, heldout, cache)
        self.floors = self._reference.floors
        self.settings = self._settings(extractor)

    def measure(self, samples: Tensor, num_bootstraps: int = 0, seed: int = 0) -> dict[str, float]:
        """The figures of samples (N, D), N at least 2; with num_bootstraps their intervals, <figure>_low and _high:

        frechet_features, _pixels   squared Fréchet distance to all real images, and with _heldout to the held-out ones
        label_score                 inception-style, by the labels' classifier; extractor_score: by a named network
        kid                         unbiased kernel distance of features
        precision_k, recall_k, density, coverage    of the regions that features fill, see `manifold`
        position_entropy, unigram_entropy           in nats

        kid and the line below it look at 5,000 images of each side at most, the samples' first. A Fréchet distance of
        fewer than 2 samples a dimension has no interval.
        """
        seen = None if self.space is None else self.space.seen(samples)
        moments = self._moments(samples, seen, slice(0, len(samples)))
        of_pairs = None if seen is None or self._pairs is None else self._pairs.of(seen.features[:PAIRED])
        figures = {
            f"frechet_{name}": frechet_distance(known, moments[name.removesuffix("_heldout")])
            for name, known in self._reference.moments.items()
        }
        figures |= self._plain(samples, seen, of_pairs)
        return figures | (self._intervals(samples, seen, of_pairs, num_bootstraps, seed) if num_bootstraps else {})

    @cached_property
    def _pairs(self) -> _Pairs | None:
        return None if self._reference.rows is None else _Pairs(self._reference.rows)

    def _moments(self, tokens: Rows, seen: Seen | None, rows: Tensor | slice) -> dict[str, Moments]:
        """The moments of some rows in each space."""
        spaces = {}
        if seen is not None:
            spaces["features"] = _moments(seen.features[rows], lambda x: x)
        if self.has_pixels:
            spaces["pixels"] = _moments(taken(tokens, rows), self._scaled)
        return spaces

    def _scaled(self, tokens: Tensor) -> Tensor:
        return tokens.double() / max(self.num_states - 1, 1)

    def _plain(self, tokens: Tensor, seen: Seen | None, of_pairs: Counted | None) -> dict[str, float]:
        """What is said of samples beside their moments."""
        figures = {}
        if seen is not None and seen.probabilities is not None:
            figures[self.score] = label_score(seen.probabilities)
        if of_pairs is not None:
            figures |= of_pairs(torch.ones(min(len(tokens), PAIRED)))
        return figures | {
            "position_entropy": position_entropy(tokens, self.num_states),
            "unigram_entropy": unigram_entropy(tokens, self.num_states),
        }

    def _intervals(
        self, tokens: Tensor, seen: Seen | None, of_pairs: Counted | None, num_bootstraps: int, seed: int
    ) -> dict[str, float]:
        """<figure>_low and <figure>_high. No network is asked again, and no distance fitted again (`frechet_of`)."""
        n = len(tokens)
        vectors = {} if seen is None else {"features": seen.features}
        if self.has_pixels:
            vectors["pixels"] = self._scaled(tokens)
        parts: list[Counted] = [entropies_of(tokens, self.num_states)]
        for name, known in self._reference.moments.items():
            x = vectors[name.removesuffix("_heldout")]
            if n >= 2 * x.shape[1]:
                parts.append(_named(f"frechet_{name}", frechet_of(known, x)))
        if seen is not None and seen.probabilities is not None:
            parts.append(_named(self.score, label_score_of(seen.probabilities)))

        def figures(places: Tensor) -> dict[str, float]:
            counts = torch.bincount(places, minlength=n)
            found = {} if of_pairs is None else of_pairs(counts[:PAIRED])
            for part in parts:
                found |= part(counts)
            return found

        return {name: _within(name, end) for name, end in bootstrap_figures(figures, n, num_bootstraps, seed).items()}

    def _known(self, train: ImageTokens, heldout: ImageTokens, cache: Path | None) -> reference.Reference:
        """What is to be known of the real images, from the cache where it was kept, else computed."""
        file = reference.reference_file(
            cache,
            *(train.fingerprint(), heldout.fingerprint(), "" if self.space is None else self.space.identity),
            *(self.score, self.floor_size, CUTS, PAIRED, PRECISION_K, DENSITY_K, MAX_PIXEL_DIMENSION),
        )
        known = None if file is None else reference.kept(file)
        if known is None:
            known = self._look(joined(train.tokens, heldout.tokens))
            if file is not None:
                reference.keep(known, file)
        return known

    def _look(self, real: Rows) -> reference.Reference:
        seen = None if self.space is None else self.space.seen(real)
        num_train, num_all = self.sizes["train"], self.sizes["all"]
        everything = self._moments(real, seen, slice(0, num_all))
        heldout = self._moments(real, seen, slice(num_train, num_all))
        found = []
        for cut in range(CUTS):
            order = random.keys(cut, num_all).argsort()
            chosen, others = order[: self.floor_size], order[self.floor_size :]
            parts = self._moments(real, seen, chosen)
            of_train = self._moments(real, seen, random.keys(cut, num_train).argsort()[: self.floor_size])
            some, of_pairs = None, None
            if seen is not None:
                laws = seen.probabilities
                some = Seen(seen.features[chosen], None if laws is None else laws[chosen])
                of_pairs = _Pairs(seen.features[others[:PAIRED]]).of(some.features[:PAIRED])
            found.append(
                {
                    f"frechet_{space}": frechet_distance(everything[space].without(part), part)
                    for space, part in parts.items()
                }
                | {f"frechet_{space}_heldout": frechet_distance(heldout[space], of_train[space]) for space in parts}
                | self._plain(real[chosen], some, of_pairs)
            )
        return reference.Reference(
            everything | {f"{space}_heldout": moments for space, moments in heldout.items()},
            None if seen is None else seen.features[random.keys(0, num_all).argsort()[:PAIRED]],
            _mean(found),
        )

    def _settings(self, extractor: str | None) -> dict[str, Any]:
        """How figures are taken, for a report."""
        rows = self._reference.rows
        if rows is None:
            return {"feature_extractor": None}
        return {
            "feature_extractor": extractor or "classifier of the images' own labels",
            "accuracy": self.accuracy,
            "num_features": rows.shape[1],
            "paired_images": len(rows),
            "precision_neighbours": PRECISION_K,
            "density_neighbours": DENSITY_K,
        }


class _Pairs:
    """Real features (M, F), to which samples are held pair by pair: kernel distance and the regions they fill."""

    def __init__(self, real: Tensor) -> None:
        self._kernel, self._manifold = KernelDistance(real), Manifold(real)

    def of(self, samples: Tensor) -> Counted:
        distance, figures = self._kernel.of(samples), self._manifold.of(samples)
        return lambda counts: {"kid": distance(counts), **figures(counts)}


def _named(name: str, figure: Callable[[Tensor], float]) -> Counted:
    return lambda counts: {name: figure(counts)}


def _within(name: str, end: float) -> float:
    """The end of an interval, no further than the figure can lie."""
    end = end if name.startswith(_BELOW_0) else max(end, 0.0)
    return min(end, 1.0) if name.startswith(_SHARES) else end


def _moments(vectors: Rows, made: Callable[[Tensor], Tensor]) -> Moments:
    """The moments of made(vectors), some at a time."""
    moments = Moments()
    for some in vectors.split(_AT_ONCE):
        moments.update(made(some))
    return moments


def _mean(figures: Iterable[dict[str, float]]) -> dict[str, float]:
    rows = list(figures)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
