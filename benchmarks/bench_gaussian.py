"""Draws of the Gaussian process: states by the product of two rows, steps back, noise, beside tensors of all states.

Pixels of 256 levels in two settings: sampling, one time for all and one draw of each position, and a training step's,
a time to every sample and L = 16 draws. The published way gathers both rows, (N, D, S) each, multiplies, normalises
and calls torch.multinomial; the race divides by exponentials in its place. A step also makes the teacher's
probabilities of the head's two numbers, repeats them for every draw, and has transition matrices for every row; in
sampling ours are those kept from the step before, as they are in a sampler.
Floor: indices, tables and the head's numbers read once, states written once. Nothing here is a matter of memory: 24
bytes a state drawn, of 256 products. Promised on a CPU: 10 times torch.multinomial's speed and 6 times the race's, and
for steps and noise 10 times the published way's, without a tensor of S numbers a position (`growth`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import published_pixels as published
import pytest
import torch
from measuring import nbytes, shape_name
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import Logistic
from di4c_ext.process import GaussianProcess

LENGTH, STATES = 3072, 256
SETTINGS = {"sampling": (16, 1), "training": (2, 16)}  # B, draws
FASTER, FASTER_THAN_RACE = 10, 6


class Inputs(NamedTuple):
    """Of B samples and n draws of each: rows of a sample together in what the published way takes, (B n, D)."""

    process: GaussianProcess
    transitions: published.Transitions
    x_t: Tensor  # (B, D)
    x_0: Tensor  # (B, n, D)
    teacher: Logistic  # (B, D)
    t: float | Tensor  # one for all in sampling, (B,) in training
    s: float | Tensor
    keys: Tensor

    def times(self, draws: int) -> tuple[Tensor, Tensor]:
        """t and s of the published way's rows, (B n,) each."""
        both = torch.stack(
            [torch.as_tensor(time, dtype=torch.float64, device=self.x_t.device) for time in (self.t, self.s)]
        )
        return both.view(2, -1, 1).expand(-1, len(self.x_t), draws).flatten(1).unbind()


@lru_cache(maxsize=1)
def _inputs(setting: str, device: torch.device) -> Inputs:
    B, n = SETTINGS[setting]
    g = torch.Generator().manual_seed(0)

    def states(*sizes: int) -> Tensor:
        return torch.randint(0, STATES, (*sizes, LENGTH), generator=g).to(device)

    process = GaussianProcess(STATES)
    mean, log_scale = (torch.rand(B, LENGTH, generator=g).to(device) for _ in range(2))
    t = 0.5 if setting == "sampling" else torch.linspace(0.3, 0.9, B, dtype=torch.float64, device=device)
    teacher = Logistic(mean * 2 - 1, log_scale * 3 - 2.5, STATES)
    transitions = published.Transitions(process.rate, process.interval, device)
    return Inputs(process, transitions, states(B), states(B, n), teacher, t, t - 0.05, random.keys(0, B, device))


def _name(setting: str, what: str) -> str:
    B, n = SETTINGS[setting]
    return f"{what}, {setting}, {shape_name(B, n, LENGTH, STATES)}"


def _race(weights: Tensor) -> Tensor:
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


@pytest.mark.parametrize("by", ["di4c", "multinomial", "race"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_sample_product(meter, device, setting, by):
    """The posterior's draw given x_t and x_0, its tables made."""
    i = _inputs(setting, device)
    n = SETTINGS[setting][1]
    left, right = i.process.transition(i.t, i.s, device).mT.contiguous(), i.process.transition(i.s, device=device)
    narrow_left, narrow_right = (table.float().view(-1, STATES, STATES) for table in (left, right))
    table = torch.arange(len(narrow_left), device=device)[:, None, None]

    def gathered() -> Tensor:
        return narrow_left[table, i.x_t[:, None].expand(-1, n, -1)] * narrow_right[table, i.x_0]

    calls = {
        "di4c": lambda: ops.sample_product(left, right, i.x_t, i.x_0, i.keys),
        "multinomial": lambda: published.draw(gathered()),
        "race": lambda: _race(gathered()),
    }
    floor = nbytes(left, right, i.x_t, i.x_0, i.x_0)
    at_least = {"multinomial": FASTER, "race": FASTER_THAN_RACE} if by == "di4c" else None
    meter(_name(setting, "sample product"), by, calls[by], floor, at_least=at_least)


@pytest.mark.parametrize("by", ["di4c", "di4c, marginal", "torch, published"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_step(meter, device, setting, by):
    """x_s of x_t and the head's two numbers: a draw of x_0, then of the posterior; or one of the posterior's mean."""
    i = _inputs(setting, device)
    n = SETTINGS[setting][1]
    x_t, later, earlier = i.x_t.repeat_interleave(n, 0), *i.times(n)

    def published_step() -> Tensor:
        p = torch.softmax(published.head(i.teacher), -1).repeat_interleave(n, 0)
        return i.transitions.step(x_t, p, later, earlier)

    calls = {
        "di4c": lambda: i.process.step(i.x_t, i.teacher, i.t, i.s, i.keys, draws=n),
        "di4c, marginal": lambda: i.process.step_marginal(i.x_t, i.teacher, i.t, i.s, i.keys, draws=n),
        "torch, published": published_step,
    }
    floor = nbytes(i.teacher.mean, i.teacher.log_scale, i.x_t, i.x_0)
    at_least = {"torch, published": FASTER} if by == "di4c" else None
    meter(_name(setting, "Gaussian step"), by, calls[by], floor, at_least=at_least, graph=False)


@pytest.mark.parametrize("by", ["di4c", "torch, published"])
def test_corrupt(meter, device, by):
    """Noise of the distillation rows: 16 rows of a sample, half of them at one time, the others each at their own."""
    i = _inputs("training", device)
    x_0 = i.x_0.flatten(0, 1)
    rows = len(x_0)
    tau = 0.01 + 0.01 * torch.linspace(-1, 1, rows, dtype=torch.float64, device=device).clamp(min=0)
    keys = random.keys(1, rows, device)
    calls = {
        "di4c": lambda: i.process.corrupt(x_0, tau, keys),
        "torch, published": lambda: published.draw(i.transitions.corrupted(x_0, tau)),
    }
    at_least = {"torch, published": FASTER} if by == "di4c" else None
    meter(_name("training", "Gaussian noise"), by, calls[by], 2 * nbytes(x_0), at_least=at_least, graph=False)
