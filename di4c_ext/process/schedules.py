"""How much of the data is lost by time t, for processes that keep a position or lose it whole.

m(t) is the probability that a position has been lost (masked, or made a random state), alpha(t) = 1 - m(t) that it is
still the data's. Two literatures name the schedules. Image tokens give the mask ratio m(r) in terms of progress
r = 1 - t; language models give the total noise sigma(t) = -log alpha(t).

    name         m(t)                     the literature's form
    linear       t                        m(r) = 1 - r
    cosine       sin(pi t / 2)            m(r) = cos(pi r / 2)
    arccos       (2 / pi) arccos(1 - t)   m(r) = (2 / pi) arccos(r)
    square       t (2 - t)                m(r) = 1 - r^2
    log_linear   (1 - eps) t              sigma(t) = -log(1 - (1 - eps) t), eps = 1e-3

log_linear keeps sigma(1) finite by leaving a fraction eps of the data at t = 1. The absorbing process's reverse step,
started from masks alone, is that of linear to the last digit, for the factor cancels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_EPS = 1e-3  # of the log-linear schedule

# name: (m(t), m'(t)), both of float64 tensors. m rather than alpha: near the data it is m that keeps its digits, and
# m(0) = 0 exactly is what makes the last step leave nothing noised.
LOST: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "log_linear": (lambda t: (1 - _EPS) * t, lambda t: torch.full_like(t, 1 - _EPS)),
    "linear": (lambda t: t, torch.ones_like),
    "cosine": (lambda t: torch.sin(t * (math.pi / 2)), lambda t: torch.cos(t * (math.pi / 2)) * (math.pi / 2)),
    "arccos": (lambda t: torch.arccos(1 - t) / (math.pi / 2), lambda t: (2 / math.pi) / torch.sqrt(t * (2 - t))),
    "square": (lambda t: t * (2 - t), lambda t: 2 * (1 - t)),
}
SCHEDULES = tuple(LOST)

# name: the t at which m(t) = m, of float64 tensors.
TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_linear": lambda m: m / (1 - _EPS),
    "linear": lambda m: m,
    "cosine": lambda m: torch.arcsin(m) / (math.pi / 2),
    "arccos": lambda m: 2 * torch.sin(m * (math.pi / 4)) ** 2,  # 1 - cos(pi m / 2), which loses digits near 0
    "square": lambda m: m / (1 + torch.sqrt(1 - m)),  # 1 - sqrt(1 - m), likewise
}


def schedule(process: str, name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """m and m' by name. Raises ValueError, in the name of the process, for one that is not known."""
    if name not in LOST:
        raise ValueError(f"{process}: unknown schedule {name!r}; known are {', '.join(SCHEDULES)}")
    return LOST[name]
