"""What samples of text are held against: real text of as many blocks, measured by the same judges.

    judge = TextJudge(train, heldout, 1000, open_causal_lm("smollm2"))
    judge.measure(samples)["perplexity"], judge.floors["perplexity"]
    judge.measure(samples, num_bootstraps=200)["perplexity_low"]
    judge.of_model(student, num_steps=4)["nelbo"]

Every figure hangs on how many samples it is taken of and how long they are, so the floors are those of as many real
blocks, which the models never saw, and only figures of one length and number compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.bootstrap import bootstrap_figures
from di4c_ext.metrics.entropy import unigram_entropy as pooled_entropy
from di4c_ext.metrics.entropy import unigram_entropy_without as pooled_entropy_without
from di4c_ext.metrics.mauve import Mauve, mauve
from di4c_ext.metrics.mixture_bound import FewSteps, few_step_bounds
from di4c_ext.metrics.ngram import NGram
from di4c_ext.metrics.perplexity import CausalLM, Perplexity, Protocol, check_protocol, generative_perplexity
from di4c_ext.metrics.text import (
    distinct_n,
    distinct_n_without,
    self_bleu,
    self_bleu_without,
    unigram_entropies,
    unigram_entropy,
)
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.systems import process_of
from di4c_ext.text import TextTokens

BLEU_SAMPLES = 500  # of which the BLEU of each against the others is taken, at most
_TERMS = 8  # of the steps of a bound those that are evaluated for a block, at most
_DRAWS = 8  # of coins for a block, of a model without latents to spend evaluations on
_MOST_LOGITS = 2**26  # numbers that a forward of bounding makes at once
_SHARES = ("distinct_2", "self_bleu", "mauve")  # which lie between 0 and 1

Statistics = Callable[[Tensor], dict[str, float]]  # places of samples, repeated ones too -> figures


class TextJudge:
    """Measures samples (N, D) of text like `train` and `heldout`.

    num_samples: how many samples a figure will stand on, which the floors are taken at; None, or more than there are
    held-out blocks: all of those. causal_lm: what gives "perplexity", by the protocol, and "mauve"; it reads the first
    num_judged samples alone, as it takes longest by far. num_bounded: held-out blocks on which `of_model` stands, 0:
    it gives nothing; num_latents: L, from which it estimates a student's mean over its latents.

    floors: by figure, what real held-out blocks score. sizes: blocks of training and held-out text.
    """

    def __init__(
        self,
        train: TextTokens,
        heldout: TextTokens,
        num_samples: int | None = None,
        causal_lm: CausalLM | None = None,
        num_judged: int = 128,
        protocol: Protocol = "retokenized",
        num_bounded: int = 0,
        num_latents: int = 64,
    ) -> None:
        check_protocol("--eval_protocol", protocol)
        if num_judged < 1:
            raise ValueError(f"--eval_num_judged {num_judged}: must be at least 1, samples that the judge reads")
        if len(heldout) < 2:
            raise ValueError(f"TextJudge: {len(heldout)} held-out blocks; raise --heldout_fraction for 2 or more")
        self.num_states, self._text = train.num_states, train.text
        self.causal_lm, self.num_judged, self.protocol = causal_lm, num_judged, protocol
        self._ngram = NGram(train.tokens, train.num_states)
        self.sizes = {"train": len(train), "heldout": len(heldout)}
        self.floor_size = min(len(heldout), num_samples or len(heldout))
        order = random.keys(0, len(heldout)).argsort()
        chosen, others = order[: self.floor_size], order[self.floor_size :]
        # What "mauve" is held against is not what its floor is of; where held-out text ends training text goes on.
        self._real = torch.cat([heldout.tokens[others[:num_judged]], train.tokens])[:num_judged]
        self._real_states: Tensor | None = None
        some = torch.arange(min(num_bounded, len(heldout))) * len(heldout) // max(min(num_bounded, len(heldout)), 1)
        self._bounded, self.num_latents = heldout.tokens[some].long(), num_latents
        self.floors = self.measure(heldout.tokens[chosen])

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures hang on, for whoever reports them."""
        told: dict[str, Any] = {"causal_lm": None}
        if self.causal_lm is not None:
            kind = str(getattr(self.causal_lm.model, "dtype", "")).removeprefix("torch.")
            told = {"causal_lm": self.causal_lm.name, "dtype": kind, "protocol": self.protocol}
            told |= {"num_judged": self.num_judged}
        told |= {"ngram_order": self._ngram.order, "self_bleu_samples": BLEU_SAMPLES}
        return told | {"nelbo_blocks": len(self._bounded), "nelbo_latents": self.num_latents}

    def measure(self, samples: Tensor, num_bootstraps: int = 0, seed: int = 0) -> dict[str, float]:
        """The figures of samples (N, D), N at least 2; with num_bootstraps also <figure>_low and <figure>_high:

        perplexity         generative, by the causal LM, where there is one
        mauve              how near the causal LM's states of the texts lie to those of real text, in [0, 1]
        ngram_perplexity   by an n-gram model of the training tokens
        entropy            mean over the samples of the entropy of a sample's own tokens, in nats
        pooled_entropy     entropy of the tokens of all samples, in nats
        distinct_2         share of the pairs of neighbouring tokens that are different ones
        self_bleu          mean BLEU-4 of a sample against the others, of 500 at most

        The ends bound the middle 95% of a bootstrap over the samples that a figure stands on. Figures that samples
        score together are made linear in them first, by the jackknife, for repeats would count as what they look for.
        """
        x = samples.long().cpu()
        figures: dict[str, float] = {}
        statistics: list[tuple[Statistics, int]] = []
        if self.causal_lm is not None:
            read = self._read(x[: self.num_judged], self.causal_lm)
            figures["perplexity"] = read.value
            statistics.append((lambda chosen: {"perplexity": read.of(chosen)}, len(read.nats)))
            agreement = self._agreement(read.states, self.causal_lm)
            if agreement is not None:
                figures["mauve"] = agreement.value
                if num_bootstraps:
                    linear = _linear(agreement.value, agreement.without())
                    statistics.append((_mean(mauve=linear), len(linear)))
        figures |= {
            "ngram_perplexity": self._ngram.perplexity(x),
            "entropy": unigram_entropy(x),
            "pooled_entropy": pooled_entropy(x, self.num_states),
            "distinct_2": distinct_n(x, 2),
            "self_bleu": self_bleu(x[:BLEU_SAMPLES]),
        }
        if not num_bootstraps:
            return figures
        statistics += self._of_tokens(x, figures)
        for statistic, size in statistics:
            figures |= bootstrap_figures(statistic, size, num_bootstraps, seed)
        return {name: _within(name, value) for name, value in figures.items()}

    def of_model(
        self, model: MixtureDenoiser, num_steps: int, num_bootstraps: int = 0, seed: int = 0
    ) -> dict[str, float]:
        """nelbo: an upper bound of -log p_k of held-out text, in nats a token, and the ends of its interval over them.

        p_k is the law of what num_steps ancestral steps at temperature 1 make of masks; see `metrics.mixture_bound`.
        seed: of masks and latents. Nothing where no blocks are to be bounded.
        """
        if not len(self._bounded):
            return {}
        x_0, length, process = self._bounded.to(model.device), self._bounded.shape[1], process_of(model.config)
        steps = FewSteps.of(model, num_steps, self.num_latents, _TERMS)
        rows = length * model.config.num_states * (1 if steps.latents is None else self.num_latents)
        each = few_step_bounds(
            model,
            process,  # type: ignore[arg-type]  # of text, and so absorbing
            x_0,
            random.keys(seed, len(x_0), device=model.device),
            steps,
            draws=_DRAWS if steps.latents is None else 1,
            batch_size=max(1, min(256, _MOST_LOGITS // rows)),
        )
        found = each.cpu() / length
        figures = {"nelbo": float(found.mean())}
        if num_bootstraps:
            figures |= bootstrap_figures(_mean(nelbo=found), len(found), num_bootstraps, seed)
        return figures

    def _read(self, tokens: Tensor, judge: CausalLM) -> Perplexity:
        samples = tokens if self.protocol == "ids" else self._text(tokens)
        return generative_perplexity(samples, judge, self.protocol, states=True)

    def _agreement(self, states: Tensor | None, judge: CausalLM) -> Mauve | None:
        """Of samples with real text, by the judge's states; nothing of one sample, or where there are no states."""
        if states is None or len(states) < 2:
            return None
        if self._real_states is None:
            self._real_states = self._read(self._real.long(), judge).states
        return None if self._real_states is None else mauve(self._real_states, states)

    def _of_tokens(self, x: Tensor, figures: dict[str, float]) -> list[tuple[Statistics, int]]:
        """What the bootstrap of the figures that need no causal LM draws from, and of how many samples."""
        nats = -self._ngram.log_prob(x).mean(1)
        linear = _mean(
            entropy=torch.tensor(unigram_entropies(x), dtype=torch.float64),
            pooled_entropy=_linear(figures["pooled_entropy"], pooled_entropy_without(x, self.num_states)),
            distinct_2=_linear(figures["distinct_2"], distinct_n_without(x, 2)),
        )
        found: list[tuple[Statistics, int]] = [
            (lambda chosen: {"ngram_perplexity": float(nats[chosen].mean().exp())} | linear(chosen), len(x))
        ]
        held = x[:BLEU_SAMPLES]
        if len(held) > 2:  # of two none can be left out
            found.append((_mean(self_bleu=_linear(figures["self_bleu"], self_bleu_without(held))), len(held)))
        return found


def _mean(**values: Tensor) -> Statistics:
    """Figures that are means of one value (N,) a sample."""
    return lambda chosen: {name: float(each[chosen].mean()) for name, each in values.items()}


def _linear(value: float, without: Tensor) -> Tensor:
    """Values (N,) of the samples whose mean is the figure, and moves as it does: without the figure of all but one."""
    return value + (len(without) - 1) * (without.mean() - without)


def _within(name: str, value: float) -> float:
    """The end of an interval, where the figure has ends itself."""
    figure = name.removesuffix("_low").removesuffix("_high")
    return min(max(value, 0.0), 1.0) if figure in _SHARES else max(value, 0.0)
