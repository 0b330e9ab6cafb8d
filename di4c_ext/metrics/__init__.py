"""How good the samples are, in figures that say how many samples they stand on.

`frechet` (distance of two Gaussians, streaming moments), `kid` (kernel distance), `manifold` (precision, recall,
density, coverage), `label_score` (an inception-style score), `entropy` (per position and pooled), `features` (a small
classifier's feature space), `extractor` and `networks` (one the user names), `reference` (what is kept of real images),
`judge` (all of these, with their floors and, by `bootstrap`, intervals), `likelihood` (bound of a masked-diffusion
denoiser), `denoising` (the same for levels), `mixture` (what the latents carry), `exact` (laws by enumeration, on
spaces small enough). Of text: `text` (entropy, distinct n-grams, self-BLEU), `perplexity` (generative, by a causal
model), `mauve` (agreement with real text, by that model's states, put into `clusters`), `ngram` (by the training text's
own n-grams), `text_judge` (all of these, with their floors), `frontier` (two models at equal entropy), `mixture_bound`
(the likelihood of what a few steps make).
"""

from di4c_ext.metrics.entropy import position_entropy, unigram_entropy
from di4c_ext.metrics.frechet import Moments, frechet_distance
from di4c_ext.metrics.kid import kernel_distance, kid
from di4c_ext.metrics.label_score import label_score
from di4c_ext.metrics.manifold import manifold_figures

__all__ = [
    "Moments",
    "frechet_distance",
    "kernel_distance",
    "kid",
    "label_score",
    "manifold_figures",
    "position_entropy",
    "unigram_entropy",
]
