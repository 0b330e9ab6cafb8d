"""How good the samples are, in figures that say how many samples they stand on.

`frechet` (distance of two Gaussians, streaming moments), `features` (a small classifier's feature space), `entropy`
(per position and pooled), `likelihood` (bound of a masked-diffusion denoiser), `mixture` (what the latents carry).
"""

from di4c_ext.metrics.entropy import position_entropy, unigram_entropy
from di4c_ext.metrics.frechet import Moments, frechet_distance

__all__ = ["Moments", "frechet_distance", "position_entropy", "unigram_entropy"]
