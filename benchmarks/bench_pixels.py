"""The training step of the published pixel system, beside the same step written the published way.

3 x 32 x 32 pixels of 256 levels, L latents, as many targets and distillation rows. The network is a stand-in that
costs nothing, so that noise, posterior steps, draws, losses and their gradient are all there is: time and memory
beyond the networks' own. Promised at B = 8, L = 16: 1 GiB of memory at most. There the published way holds 36 tensors
of B L D S numbers at a time, 13.5 GiB, on a GPU (more on a CPU, whose log-sigmoid keeps one more), so it is measured
where they fit; its memory grows with B L, hence the smaller sizes beside the full one. `pixels_step.py` has the real
networks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import published_pixels as published
import pytest
import torch
from measuring import free_memory, shape_name
from torch import Tensor, nn

from di4c_ext import random
from di4c_ext.loss import Di4CObjective
from di4c_ext.models.latent import draw_latents
from di4c_ext.ops import Logistic
from di4c_ext.process import GaussianProcess

LENGTH, STATES = 3072, 256
FULL = (8, 16)  # B, L
SIZES = ((2, 8), (2, 16), FULL)
GROWTH_LIMIT = 2**30
STATE_SIZED = 60  # tensors of B L D S floats that must be free for the published way
FASTER = 10


class StandIn(nn.Module):
    """A denoiser with nothing inside: a logistic about the level it sees, moved by time and latent."""

    def __init__(self, length: int, num_states: int, is_student: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(int(is_student))
        self.num_states = num_states
        self.shift = nn.Parameter(0.3 * torch.randn(length, generator=generator))
        self.pull = nn.Parameter(0.3 * torch.randn(length, generator=generator))
        self.log_scale = nn.Parameter(0.1 * torch.randn(length, generator=generator) - 1)

    def forward(self, x_t: Tensor, t: Tensor, latents: Tensor | None = None) -> Logistic:
        """x_t (B, D) or (B, L, D), t (B,), latents (B, C) or (B, L, C) -> (B, D) or (B, L, D)."""
        x = x_t * (2 / (self.num_states - 1)) - 1
        if latents is not None and latents.dim() > x.dim():
            x = x[:, None]
        moved = x + self.shift * t.view(-1, *[1] * (x.dim() - 1))
        if latents is not None:
            moved = moved + self.pull * (latents - 0.5)
        mean = torch.tanh(moved)
        return Logistic(mean, self.log_scale.expand_as(mean), self.num_states)


class Setting(NamedTuple):
    """Networks, process and data, ours and the published way's."""

    student: StandIn
    teacher: StandIn
    process: GaussianProcess
    transitions: published.Transitions
    x_0: Tensor
    num_latents: int


@lru_cache(maxsize=1)
def setting(
    batch: int, num_latents: int, device: torch.device, length: int = LENGTH, process: GaussianProcess | None = None
) -> Setting:
    """For so many samples of so many latents, the same every time."""
    process = GaussianProcess(STATES) if process is None else process
    student, teacher = (StandIn(length, process.num_states, is_student).to(device) for is_student in (True, False))
    x_0 = torch.randint(0, process.num_states, (batch, length), generator=torch.Generator().manual_seed(2)).to(device)
    transitions = published.Transitions(process.rate, process.interval, device)
    return Setting(student, teacher, process, transitions, x_0, num_latents)


def latents(keys: Tensor, n: int) -> Tensor:
    return draw_latents(keys, n, 1, law="uniform", independent=True)


def ours(s: Setting) -> Tensor:
    """The loss by the preset, of fresh draws of the samples' keys."""
    objective = Di4CObjective.preset("pixels", num_latents=s.num_latents, distillation_rows=s.num_latents)
    keys = random.keys(0, len(s.x_0), s.x_0.device)
    return objective(s.student, s.teacher, s.process, s.x_0, keys, latents=latents)["loss"]


def published_way(s: Setting) -> Tensor:
    """The same loss of fresh draws of torch's own generator."""
    chances = published.Chances.drawn(len(s.x_0), s.num_latents, s.x_0.device)
    return sum(published.terms(s.student, s.teacher, s.transitions, s.x_0, chances)).mean()


@pytest.mark.parametrize("by", ["di4c", "torch, published"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: shape_name(*size))
def test_pixels_step(meter, device, size, by):
    group = f"pixel step {shape_name(*size, LENGTH, STATES)} float32"
    wanted = STATE_SIZED * size[0] * size[1] * LENGTH * STATES * 4
    if by != "di4c" and free_memory(device) < wanted:
        meter.absent(group, by, f"wants {wanted / 1e9:.0f} GB free")
    s = setting(*size, device)
    parameters = list(s.student.parameters())
    ways: dict[str, Callable[[Setting], Tensor]] = {"di4c": ours, "torch, published": published_way}
    meter(
        group,
        by,
        lambda: torch.autograd.grad(ways[by](s), parameters),
        at_least={"torch, published": FASTER} if by == "di4c" and size != FULL else None,
        growth_limit=GROWTH_LIMIT if by == "di4c" and size == FULL else None,
        may_fail=by != "di4c",
        graph=False,
    )
