"""The logistic head's definition: known values, the published formula and its outputs, gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from logistics import STATES, some_rows, to
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import logsigmoid

from di4c_ext.ops import Logistic, reference

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "pixels.pt"


@pytest.mark.parametrize(
    "mean, log_scale, logits",
    [
        (0.125, -1.0, [-12.553506609879, -2.5888207930883, -0.078660545390761, -7.5307890346029]),
        (-0.75, 0.5, [-0.8768891771065, -1.348460269487, -2.7427027109298, -4.456068429127, -6.2346554734956]),
        (0.5, -4.0, [-403.42879249274, -201.71439574637, -0.69314618056045, -0.69314518056195]),
    ],
)
def test_known_logits(mean, log_scale, logits):
    """log((1 + 1e-6) sigma(r) - sigma(l)) in 60 digits."""
    row = Logistic(torch.tensor([mean]).double(), torch.tensor([log_scale]).double(), len(logits))
    torch.testing.assert_close(row.logits()[0], torch.tensor(logits, dtype=torch.float64), rtol=1e-12, atol=0)


def test_published_formula():
    """log sigma(r) + log1p(eps - exp(log sigma(l) - log sigma(r))), as the published network has it."""
    x = to(some_rows(32, 400, low=-2.0), torch.float64)
    kappa = torch.exp(-(x.log_scale - 2))[:, None]
    centres = torch.linspace(-1 + 1 / 32, 1 - 1 / 32, 32, dtype=torch.float64)
    left, right = (centres - 1 / 32 - x.mean[:, None]) * kappa, (centres + 1 / 32 - x.mean[:, None]) * kappa
    published = logsigmoid(right) + torch.log1p(1e-6 - torch.exp(logsigmoid(left) - logsigmoid(right)))
    torch.testing.assert_close(x.logits(), published, rtol=1e-8, atol=1e-8)


def test_gradcheck_of_the_definition():
    x = to(some_rows(7, 3, 5, low=-2.0), torch.float64)
    x = Logistic(x.mean + 0.01, x.log_scale, 7)  # off the edges: torch's logsigmoid has a kink's care at 0
    inputs = (x.mean.requires_grad_(), x.log_scale.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, s: Logistic(m, s, 7).logits(), inputs)
    assert torch.autograd.gradgradcheck(lambda m, s: Logistic(m, s, 7).logits(), inputs)


@pytest.mark.parametrize("states", STATES)
def test_pull_is_the_definitions_gradient(states):
    x = to(some_rows(states, 3, 8, low=-8.0, high=4.0), torch.float64)
    mean, log_scale = x.mean.requires_grad_(), x.log_scale.requires_grad_()
    logits = Logistic(mean, log_scale, states).logits()
    grad = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = torch.stack(torch.autograd.grad(logits, (mean, log_scale), grad), -1)
    pull = reference.logistic_pull(mean.detach(), log_scale.detach(), grad)
    assert ((pull - exact).abs() <= 1e-11 * (1 + exact.abs())).all()


def test_form():
    x = some_rows(9, 2, 3, 4)
    assert x.shape == (2, 3, 4, 9) == x.logits().shape and x.dtype == torch.float32 and x.device.type == "cpu"
    assert to(x, torch.bfloat16).logits().dtype == torch.float32
    assert to(x, torch.float64).logits().dtype == torch.float64


def _fitted(p: Tensor) -> Logistic:
    """The rows of a Logistic that come closest to probabilities p (N, S), by damped least squares of their roots."""
    states = p.shape[-1]
    centres = (2 * torch.arange(states, dtype=p.dtype) + 1 - states) / states
    mean = (p * centres).sum(-1)
    spread = ((p * centres**2).sum(-1) - mean**2).sqrt()
    log_scale = 2 + torch.log(spread * math.sqrt(3) / math.pi)
    one, zero, damping = torch.ones_like(mean), torch.zeros_like(mean), torch.full_like(mean, 1e-3)

    def roots(mean: Tensor, log_scale: Tensor) -> Tensor:
        return torch.softmax(reference.logistic_logits(mean, log_scale, states), -1).sqrt()

    def error(mean: Tensor, log_scale: Tensor) -> Tensor:
        return (roots(mean, log_scale) - p.sqrt()).square().sum(-1)

    for _ in range(40):
        value, by_mean = jvp(roots, (mean, log_scale), (one, zero))
        by_scale = jvp(roots, (mean, log_scale), (zero, one))[1]
        slopes = torch.stack([by_mean, by_scale], -1)
        curvature = slopes.mT @ slopes
        curvature = curvature + torch.diag_embed(damping[:, None] * curvature.diagonal(dim1=-2, dim2=-1))
        step = torch.linalg.solve(curvature, slopes.mT @ (value - p.sqrt())[..., None])[..., 0]
        better = error(mean - step[:, 0], log_scale - step[:, 1]) < error(mean, log_scale)
        mean = torch.where(better, mean - step[:, 0], mean)
        log_scale = torch.where(better, log_scale - step[:, 1], log_scale)
        damping = torch.where(better, damping / 4, damping * 4).clamp(1e-12, 1e3)
    return Logistic(mean, log_scale, states)


@pytest.mark.skipif(not FIXTURE.is_file(), reason=f"no golden numbers of the published system at {FIXTURE}")
@pytest.mark.parametrize("name", ["p0t_teacher", "p0u_student_lam"])
def test_published_head(name):
    """Its outputs alone were kept: 32 probabilities, which two numbers must explain to what float32 lost there."""
    p = torch.load(FIXTURE, weights_only=True)["draws_and_terms"][name].double().flatten(0, -2)[::7]
    p = p / p.sum(-1, keepdim=True)
    q = torch.softmax(_fitted(p).logits(), -1)
    assert ((q - p).abs().sum(-1) / 2).max() < 4e-6
    assert (q.log() - p.log())[p > 1e-3].abs().max() < 1e-4
    assert (q.log() - p.log()).abs().max() < 0.1  # the floor of 1e-6 as well, of which float32 kept one digit
