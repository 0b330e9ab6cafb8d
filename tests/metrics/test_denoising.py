"""The denoising cross-entropy: against its definition, the exact value of an exact denoiser, gradient and strata."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import index, sequences
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.denoising import denoising_cross_entropy, mean_denoising_cross_entropy
from di4c_ext.ops import Logistic
from di4c_ext.process import GaussianProcess, Process, UniformProcess

S, D = 3, 2


@pytest.mark.parametrize("logistic", [True, False])
def test_is_the_cross_entropy_at_its_own_noise(logistic: bool) -> None:
    process = GaussianProcess(8, rate_sigma=2, q_sigma=20, time_base=0.3)
    keys = random.keys(3, 50)
    x_0 = (random.uniform(random.keys(4, 50), 5) * 8).long()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    scale = torch.zeros((), requires_grad=True)

    def denoiser(x_t: Tensor, t: Tensor) -> Logistic | Tensor:
        said = Logistic((x_t / 4 - 1) * t[:, None], scale + t[:, None].expand_as(x_t), 8)
        seen.append((x_t, t, said.logits().detach()))
        return said if logistic else said.logits()

    found = denoising_cross_entropy(denoiser, process, x_0, keys, time_min=0.2)
    found.sum().backward()
    assert scale.grad is not None and torch.isfinite(scale.grad) and scale.grad != 0
    x_t, t, logits = seen[0]
    assert t.min() > 0.2 and t.max() <= 1 and t.std() > 0.1
    assert (x_t != x_0).any() and x_t.min() >= 0 and x_t.max() < 8
    wanted = -logits.double().log_softmax(-1).gather(-1, x_0[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=1e-5)

    # A sample's value is its own: not the batch's.
    alone = torch.cat(
        [denoising_cross_entropy(denoiser, process, x_0[i : i + 1], keys[i : i + 1], time_min=0.2) for i in range(3)]
    )
    torch.testing.assert_close(alone, found[:3], rtol=1e-6, atol=1e-6)
    again = denoising_cross_entropy(denoiser, process, x_0, random.fold_in(keys, 1), time_min=0.2)
    assert not torch.equal(again, found)


def _law() -> Tensor:
    law = torch.rand(S**D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    return law / law.sum()


def test_uniform_noise_adds_what_a_position_tells_of_itself() -> None:
    """A denoiser that knows p(x_0^d | other positions) scores -sum_d log p(x_0^d | x_t), the posterior given all."""
    process, law, states = UniformProcess(S), _law(), sequences(S, D)
    keys = random.keys(0, 300)
    x_0 = states[torch.multinomial(law, 300, replacement=True, generator=torch.Generator().manual_seed(1))]
    seen: list[tuple[Tensor, Tensor]] = []

    def likelihood(x_t: Tensor, t: Tensor) -> Tensor:
        """q(x_t^d | x_0^d), (B, S^D, D)."""
        lost = t.double()[:, None, None]
        return (1 - lost) * (x_t[:, None] == states) + lost / S

    def marginals(weights: Tensor) -> Tensor:
        """(B, S^D) -> (B, D, S), normalised."""
        p = torch.einsum("bn,nds->bds", weights, torch.nn.functional.one_hot(states, S).double())
        return p / p.sum(-1, keepdim=True)

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        q = likelihood(x_t, t)
        others = q.prod(-1, keepdim=True) / q  # (B, S^D, D): without position d
        rows = [marginals(law * others[:, :, d])[:, d] for d in range(D)]
        return torch.stack(rows, 1).log()

    found = denoising_cross_entropy(denoiser, process, x_0, keys, time_min=0.05)
    x_t, t = seen[0]
    exact = marginals(law * likelihood(x_t, t).prod(-1)).gather(-1, x_0[..., None])[..., 0]
    torch.testing.assert_close(found, -exact.log().sum(-1), rtol=1e-5, atol=1e-6)  # t reaches the denoiser in float32
    assert len(index(x_t, S).unique()) == S**D


@pytest.mark.parametrize("process", [GaussianProcess(S), UniformProcess(S)])
def test_the_mean_is_stratified_over_times(process: Process) -> None:
    times: list[Tensor] = []

    def ignorant(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return torch.zeros(*x_t.shape, S)

    x_0 = torch.zeros(40, D, dtype=torch.int64)
    found = mean_denoising_cross_entropy(ignorant, process, x_0, random.keys(0, 40), time_min=0.2, batch_size=16)
    assert [len(t) for t in times] == [16, 16, 8]
    strata = ((1 - torch.cat(times)) / 0.8 * 40).floor().sort().values
    assert torch.equal(strata, torch.arange(40.0))
    if isinstance(process, GaussianProcess):
        assert found == pytest.approx(D * math.log(S))
    else:
        assert 0 < found < D * math.log(S)  # what x_t^d tells of itself is less than nothing known
    with pytest.raises(ValueError, match="no samples"):
        mean_denoising_cross_entropy(ignorant, process, x_0[:0], random.keys(0, 0), time_min=0.2)
