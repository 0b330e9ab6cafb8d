"""Samplers: one plain function per algorithm.

    sample_ancestral     masked and other processes, down to 0 by the process's own steps
    sample_analytic      the pixel systems (and masked ones): posterior steps, then one denoising at the last time
    sample_hybrid        the same, a student first and its teacher for the last evaluations
    sample_first_hitting the exact baseline of masked teachers: one token an evaluation
    sample_confidence    masked image tokens: the positions it is surest of first, so many a step as a schedule says
    sample_tau_leaping   a continuous-time baseline for teachers

`GuidedDenoiser` makes of a student and its teacher a third denoiser, for any of the first three.
"""

from di4c_ext.sampler.analytic import analytic_times, sample_analytic, sample_hybrid
from di4c_ext.sampler.ancestral import sample_ancestral, times
from di4c_ext.sampler.confidence import reveal_counts, sample_confidence
from di4c_ext.sampler.first_hitting import sample_first_hitting
from di4c_ext.sampler.guidance import GuidedDenoiser, GuidedLogits
from di4c_ext.sampler.tau_leaping import sample_tau_leaping

__all__ = [
    "GuidedDenoiser",
    "GuidedLogits",
    "analytic_times",
    "reveal_counts",
    "sample_analytic",
    "sample_ancestral",
    "sample_confidence",
    "sample_first_hitting",
    "sample_hybrid",
    "sample_tau_leaping",
    "times",
]
