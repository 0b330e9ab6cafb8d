"""What the latents carry, on mixtures whose figures are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.mixture import correlation_gain
from di4c_ext.process import AbsorbingProcess

D = 4


def _latents(keys: Tensor, count: int) -> Tensor:
    return torch.arange(count).float()[None, :, None].expand(len(keys), count, 1)


def test_product_model_carries_nothing() -> None:
    def product(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        return torch.tensor([0.3, -1.0]).expand(len(x_t), latents.shape[1], D, 2)

    found = correlation_gain(
        product, AbsorbingProcess(2), torch.zeros(5, D).long(), random.keys(0, 5), _latents, num_latents=3
    )
    assert found["correlation"] == pytest.approx(0, abs=1e-6)
    assert found["information"] == pytest.approx(0, abs=1e-6)


def test_two_certain_components() -> None:
    """Latent 0 says all zeros, latent 1 all ones: the joint is ln 2, the marginals would pay D ln 2."""

    def copies(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        sign = (2 * latents - 1)[..., None] * torch.tensor([-40.0, 40.0])  # (B, L, 1, 2)
        return sign.expand(-1, -1, D, 2)

    x_0 = torch.tensor([[0] * D, [1] * D])
    found = correlation_gain(copies, AbsorbingProcess(2), x_0, random.keys(0, 2), _latents, num_latents=2)
    assert found["joint"] == pytest.approx(-math.log(2), rel=1e-5)
    assert found["correlation"] == pytest.approx((D - 1) * math.log(2), rel=1e-5)
    assert found["information"] == pytest.approx(D * math.log(2), rel=1e-5)
