"""The kernels as PyTorch operators: autograd, FakeTensor and torch.compile, on CPU, CUDA or the reference.

Index order is always (B, L, D, S): samples, mixture components, positions, states. `ops.reference` holds every
definition in plain torch, `ops.native` says which implementation serves.
"""

from di4c_ext.ops import native, reference
from di4c_ext.ops.bits import random_bits
from di4c_ext.ops.categorical import absorbing_step, sample_categorical
from di4c_ext.ops.hidden import (
    mixture_kl_from_hidden,
    mixture_log_prob_from_hidden,
    mixture_objective_from_hidden,
    sample_categorical_from_hidden,
)
from di4c_ext.ops.logits import Hidden, Logistic, Logits
from di4c_ext.ops.masked import masked_cross_entropy, masked_js, masked_kl, masked_reverse_kl, masked_tv
from di4c_ext.ops.mixture import mixture_kl, mixture_log_prob, mixture_objective
from di4c_ext.ops.product import sample_product
from di4c_ext.ops.reference import MixtureObjective
from di4c_ext.ops.reveal import reveal

__all__ = [
    "Hidden",
    "Logistic",
    "Logits",
    "MixtureObjective",
    "absorbing_step",
    "masked_cross_entropy",
    "masked_js",
    "masked_kl",
    "masked_reverse_kl",
    "masked_tv",
    "mixture_kl",
    "mixture_kl_from_hidden",
    "mixture_log_prob",
    "mixture_log_prob_from_hidden",
    "mixture_objective",
    "mixture_objective_from_hidden",
    "native",
    "random_bits",
    "reference",
    "reveal",
    "sample_categorical",
    "sample_categorical_from_hidden",
    "sample_product",
]
