"""A Gaussian process of few states, and numbers to try it on."""

import torch
from torch import Tensor

from di4c_ext.process import GaussianProcess

SMALL = {"rate_sigma": 1.5, "q_sigma": 3.0, "time_base": 0.05}


def small(num_states: int = 3, **options: float) -> GaussianProcess:
    return GaussianProcess(num_states, **(SMALL | options))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
