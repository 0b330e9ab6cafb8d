"""Random logistic rows."""

from __future__ import annotations

import torch

from di4c_ext.ops import Logistic

STATES = (1, 2, 31, 255, 256, 1025, 4096)


def some_rows(states: int, *shape: int, low: float = -4.0, high: float = 1.5, seed: int = 0) -> Logistic:
    """Means in [-1.2, 1.2], a quarter of them on an edge, log-scales in [low, high]."""
    g = torch.Generator().manual_seed(seed)
    mean = torch.rand(shape, generator=g) * 2.4 - 1.2
    edge = (torch.randint(0, states + 1, shape, generator=g) * 2 - states) / states
    mean = torch.where(torch.rand(shape, generator=g) < 0.25, edge, mean)
    return Logistic(mean, torch.rand(shape, generator=g) * (high - low) + low, states)


def to(x: Logistic, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Logistic:
    return Logistic(x.mean.to(device, dtype), x.log_scale.to(device, dtype), x.num_states)
