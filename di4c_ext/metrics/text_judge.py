"""What samples of text are held against: real text of as many blocks, measured by the same judges.

    judge = TextJudge(train, heldout, 1000, open_causal_lm("smollm2"))
    judge.measure(samples)["perplexity"], judge.floors["perplexity"]

Every figure hangs on how many samples it is taken of and how long they are, so the floors are those of as many real
blocks, which the models never saw, and only figures of one length and number compare.
"""

from __future__ import annotations

from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.entropy import unigram_entropy as pooled_entropy
from di4c_ext.metrics.ngram import NGram
from di4c_ext.metrics.perplexity import CausalLM, generative_perplexity
from di4c_ext.metrics.text import distinct_n, self_bleu, unigram_entropy
from di4c_ext.text import TextTokens

BLEU_SAMPLES = 500  # of which the BLEU of each against the others is taken, at most


class TextJudge:
    """Measures samples (N, D) of text like `train` and `heldout`.

    num_samples: how many samples a figure will stand on, which the floors are taken at; None, or more than there are
    held-out blocks: all of those. causal_lm: what gives "perplexity"; it reads the first num_judged samples alone, as
    it takes longest by far.

    floors: by figure, what real held-out blocks score. sizes: blocks of training and held-out text.
    """

    def __init__(
        self,
        train: TextTokens,
        heldout: TextTokens,
        num_samples: int | None = None,
        causal_lm: CausalLM | None = None,
        num_judged: int = 128,
    ) -> None:
        if num_judged < 1:
            raise ValueError(f"--eval_num_judged {num_judged}: must be at least 1, samples that the judge reads")
        if len(heldout) < 2:
            raise ValueError(f"TextJudge: {len(heldout)} held-out blocks; raise --heldout_fraction for 2 or more")
        self.num_states, self._text = train.num_states, train.text
        self.causal_lm, self.num_judged = causal_lm, num_judged
        self._ngram = NGram(train.tokens, train.num_states)
        self.sizes = {"train": len(train), "heldout": len(heldout)}
        self.floor_size = min(len(heldout), num_samples or len(heldout))
        chosen = random.keys(0, len(heldout)).argsort()[: self.floor_size]
        self.floors = self.measure(heldout.tokens[chosen])

    def measure(self, tokens: Tensor) -> dict[str, float]:
        """The figures of samples (N, D), N at least 2:

        perplexity         generative, by the causal LM, where there is one ("retokenized"); perplexity_low and _high
                           bound the middle 95% of a bootstrap over the samples it read
        ngram_perplexity   by an n-gram model of the training tokens
        entropy            mean over the samples of the entropy of a sample's own tokens, in nats
        pooled_entropy     entropy of the tokens of all samples, in nats
        distinct_2         share of the pairs of neighbouring tokens that are different ones
        self_bleu          mean BLEU-4 of a sample against the others, of 500 at most
        """
        x = tokens.long()
        figures = {} if self.causal_lm is None else self._generative(self._text(x[: self.num_judged]), self.causal_lm)
        return figures | {
            "ngram_perplexity": self._ngram.perplexity(x),
            "entropy": unigram_entropy(x),
            "pooled_entropy": pooled_entropy(x, self.num_states),
            "distinct_2": distinct_n(x, 2),
            "self_bleu": self_bleu(x[:BLEU_SAMPLES]),
        }

    @staticmethod
    def _generative(texts: list[str], judge: CausalLM) -> dict[str, float]:
        found = generative_perplexity(texts, judge)
        low, high = found.interval()
        return {"perplexity": found.value, "perplexity_low": low, "perplexity_high": high}
