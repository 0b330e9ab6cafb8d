"""Small language networks with weights by formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from di4c_ext.models import DiTConfig, DiTDenoiser

# 20 tokens and the mask, two blocks, heads of width 8.
SMALL = {
    "vocab_size": 21,
    "length": 12,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "cond_dim": 8,
    "latent_embed_dim": 8,
    "latent_hidden_size": 12,
}


def by_formula(**settings) -> DiTDenoiser:
    """A small denoiser whose every weight is a function of its place alone, none of them zero."""
    model = DiTDenoiser(DiTConfig(**SMALL | settings)).eval()
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            k = torch.arange(weight.numel(), dtype=torch.float64)
            wave = torch.sin(1.7 * i + 0.61 * k + 0.0137 * k**2).view(weight.shape)
            if weight.ndim == 1:
                wave = 0.3 * wave + (1.0 if "norm" in name else 0.0)
            else:
                wave = wave * math.sqrt(4 / weight.shape[1])
            weight.copy_(wave)
    return model


def noised(rows: int, config: DiTConfig) -> Tensor:
    """x_t (rows, D) by formula, every third position or so masked."""
    place = torch.arange(rows * config.length).view(rows, -1)
    clean = place.pow(2).mul(7).add(3) % config.num_states
    clean = torch.where(clean == config.mask_id, 0, clean)
    return torch.where(place * 5 % 7 < 3, config.mask_id, clean)


def drawn(rows: int, latents: int, dim: int = 1) -> Tensor:
    """Latents (rows, latents, dim) by formula, in (0, 1)."""
    return torch.arange(1, rows * latents * dim + 1).view(rows, latents, dim) * 0.377 % 1
