"""Small pixel U-Nets with weights by formula, and where the published system's numbers are kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from di4c_ext.models import UNetConfig, UNetDenoiser

SHARED = Path(__file__).resolve().parents[2] / "shared"
# The published plan, four scales with attention at the second, on images of 3 x 8 x 8 with 16 levels.
SMALL = {"num_states": 16, "image_size": 8, "base_channels": 8, "time_embed_dim": 8}


def shared(name: str) -> Path:
    """A file of the published system; the test is skipped where it is not at hand."""
    file = SHARED / name
    if not file.is_file():
        pytest.skip(f"no {name}: the published system's numbers are kept outside the repository")
    return file


def by_formula(**settings) -> UNetDenoiser:
    """A small denoiser whose every weight is a function of its place alone, none of them zero."""
    model = UNetDenoiser(UNetConfig(**SMALL | settings)).eval()
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            k = torch.arange(weight.numel(), dtype=torch.float64)
            wave = torch.sin(1.7 * i + 0.61 * k + 0.0137 * k**2).view(weight.shape)
            if weight.ndim == 1:
                wave = 0.3 * wave + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
            else:
                inputs = weight.shape[0] if name.endswith(".W") else weight[0].numel()
                wave = wave * math.sqrt(12 / inputs)
            weight.copy_(wave)
    return model


def noised(rows: int, config: UNetConfig) -> Tensor:
    """x_t (rows, D) by formula."""
    return torch.arange(rows * config.length).view(rows, -1).pow(2).mul(7).add(3) % config.num_states
