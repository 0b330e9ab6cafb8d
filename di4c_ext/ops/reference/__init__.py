"""Every op's definition in plain torch: what the kernels must compute, in any dtype, on any device.

The functions named like an op are its definition, differentiable by autograd. The `_forward` and `_backward`
pairs are the same values with the small tensors a kernel keeps for its gradient, and the gradient written out
from them; they serve float64 inputs, devices without kernels and `DI4C_NATIVE=off`.
"""

from di4c_ext.ops.reference.logistic import logistic_logits, logistic_pull
from di4c_ext.ops.reference.masked import row_loss, row_loss_backward, row_loss_forward
from di4c_ext.ops.reference.mixture import mixture_kl, mixture_log_prob
from di4c_ext.ops.reference.objective import MixtureObjective, mixture_backward, mixture_forward, mixture_objective
from di4c_ext.ops.reference.philox import philox, random_bits, unit_double
from di4c_ext.ops.reference.product import fixed_masses, prefix_masses, sample_product, sample_rows
from di4c_ext.ops.reference.reveal import gumbel, reveal
from di4c_ext.ops.reference.sampling import exp_nonpos, sample

__all__ = [
    "MixtureObjective",
    "exp_nonpos",
    "fixed_masses",
    "gumbel",
    "logistic_logits",
    "logistic_pull",
    "mixture_backward",
    "mixture_forward",
    "mixture_kl",
    "mixture_log_prob",
    "mixture_objective",
    "philox",
    "prefix_masses",
    "random_bits",
    "reveal",
    "row_loss",
    "row_loss_backward",
    "row_loss_forward",
    "sample",
    "sample_product",
    "sample_rows",
    "unit_double",
]
