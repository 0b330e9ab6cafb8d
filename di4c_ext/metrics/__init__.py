"""How good the samples are, in figures that say how many samples they stand on.

`frechet` (distance of two Gaussians, streaming moments), `features` (a small classifier's feature space), `extractor`
(one the user names), `label_score` (an inception-style score), `entropy` (per position and pooled), `judge` (all of
these, with their floors), `likelihood` (bound of a masked-diffusion denoiser), `denoising` (the same for levels),
`mixture` (what the latents carry), `exact` (laws by enumeration, on spaces small enough). Of text:
`text` (entropy, distinct n-grams, self-BLEU), `perplexity` (generative, by a causal model), `ngram` (by the training
text's own n-grams), `text_judge` (all of these, with their floors), `frontier` (two models at equal entropy),
`mixture_bound` (the likelihood of what a few steps make).
"""

from di4c_ext.metrics.entropy import position_entropy, unigram_entropy
from di4c_ext.metrics.frechet import Moments, frechet_distance
from di4c_ext.metrics.label_score import label_score

__all__ = ["Moments", "frechet_distance", "label_score", "position_entropy", "unigram_entropy"]
