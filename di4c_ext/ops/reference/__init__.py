"""Every op's definition in plain torch: what the kernels must compute, in any dtype, on any device.

The functions named like an op are its definition, differentiable by autograd. The `_forward` and `_backward`
pairs are the same values with the small tensors a kernel keeps for its gradient, and the gradient written out
from them; they serve float64 inputs, devices without kernels and `DI4C_NATIVE=off`.
"""

from di4c_ext.ops.reference.masked import row_loss, row_loss_backward, row_loss_forward
from di4c_ext.ops.reference.mixture import (
    mixture_kl,
    mixture_kl_backward,
    mixture_kl_forward,
    mixture_log_prob,
    mixture_log_prob_backward,
    mixture_log_prob_forward,
)
from di4c_ext.ops.reference.philox import philox, random_bits, unit_double
from di4c_ext.ops.reference.sampling import exp_nonpos, sample

__all__ = [
    "exp_nonpos",
    "mixture_kl",
    "mixture_kl_backward",
    "mixture_kl_forward",
    "mixture_log_prob",
    "mixture_log_prob_backward",
    "mixture_log_prob_forward",
    "philox",
    "random_bits",
    "row_loss",
    "row_loss_backward",
    "row_loss_forward",
    "sample",
    "unit_double",
]
