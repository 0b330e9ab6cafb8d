"""The latent of a mixture student: its law, and how its value becomes features.

Two laws. N(0, I_C), a vector of a few Gaussian numbers: neighbours stay neighbours in every direction, so few latents
cover the law. And, as in the published systems, numbers uniform on [0, 1], which their networks spread over sines.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from di4c_ext import random

LatentLaw = Literal["normal", "uniform"]

# Keeps the quantile function away from its infinities.
_EDGE = 2.0**-53


def draw_latents(
    keys: Tensor,
    num_latents: int,
    latent_dim: int,
    *,
    stream: int = 0,
    law: LatentLaw = "normal",
    independent: bool = False,
) -> Tensor:
    """keys (B,) int64 -> (B, L, C) float32; each latent is N(0, I_C), or uniform on [0, 1]^C under law="uniform".

    In every one of the C directions the L latents of a key fall into the L quantile classes of the law, one each and
    in an order of their own (a Latin hypercube): any one latent has exactly the law of lambda, but together they
    leave smaller gaps than independent draws, which brings the log-mean-exp over L latents closer to the mixture it
    estimates. independent=True draws the L latents apart, as published. A key draws the same latents in any batch.
    """
    if num_latents < 1:
        raise ValueError(f"draw_latents: num_latents must be at least 1, got {num_latents}")
    if latent_dim < 1:
        raise ValueError(f"draw_latents: latent_dim must be at least 1, got {latent_dim}")
    if law not in get_args(LatentLaw):
        raise ValueError(f"draw_latents: law must be one of {get_args(LatentLaw)}, got {law!r}")
    # Twice the numbers either way, so that one latent of a key is the same number drawn apart or spread out.
    draws = random.uniform(keys, 2 * num_latents * latent_dim, stream=stream).unflatten(1, (2, num_latents, latent_dim))
    order, within = draws.unbind(1)
    quantile = within if independent else (order.argsort(1) + within) / num_latents
    if law == "uniform":
        return quantile.float()
    return torch.special.ndtri(quantile.clamp(_EDGE, 1 - _EDGE)).float()


class LatentEmbedding(nn.Module):
    """lambda (..., C) -> features (..., E), for the projections by which it enters each block."""

    def __init__(self, latent_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.expand = nn.Linear(latent_dim, hidden_size)
        self.mix = nn.Linear(hidden_size, hidden_size)

    def forward(self, latents: Tensor) -> Tensor:
        return nn.functional.gelu(self.mix(nn.functional.gelu(self.expand(latents))))
