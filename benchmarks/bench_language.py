"""The training step of the published language system beside the same step written the published way, and what a latent
costs a network.

S = 50,257 tokens and the mask, hidden states 768 wide. In the steps the network is a stand-in that costs nothing but
its hidden states, so that the teacher's step, the draws, the head, the loss and their gradient are all there is: time
and memory beyond the network's own activations. Half the positions are masked. The published way holds 8 to 9 tensors
of L D S floats, so it is measured where they fit; `language_step.py` has the full size, 1,024 positions and 16 latents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import published_language as published
import pytest
import torch
from measuring import free_memory, shape_name
from torch import Tensor, nn

from di4c_ext import random
from di4c_ext.loss import Di4CObjective
from di4c_ext.models import DiTConfig, DiTDenoiser
from di4c_ext.models.latent import draw_latents
from di4c_ext.ops import Hidden
from di4c_ext.process import AbsorbingProcess

TOKENS, WIDTH = 50257, 768
SIZES = ((4, 64), (8, 64))  # L, D
TIME = 0.5
STATE_SIZED = 12  # tensors of L D S floats that must be free for the published way
FASTER = 2
ADDED = 1.02  # what an added latent may cost, of the teacher's time


class StandIn(nn.Module):
    """denoiser(x_t, t, latents) -> Hidden: what a token, its place and the latent say, and a head of full size."""

    def __init__(self, length: int, tokens: int = TOKENS, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.place = nn.Parameter(torch.randn(length, width, generator=g))
        self.seen = nn.Parameter(torch.randn(64, width, generator=g))
        self.moved = nn.Parameter(torch.randn(width, generator=g))
        self.head = nn.Parameter(torch.randn(tokens, width, generator=g).mul_((2 / width) ** 0.5))

    def forward(self, x_t: Tensor, t: Tensor | None = None, latents: Tensor | None = None) -> Hidden:
        """x_t (B, D) or (B, L, D), latents (B, C) or (B, L, C) -> of (B, D) or (B, L, D)."""
        states = self.place + self.seen[x_t % 64]
        if latents is not None:
            told = latents[..., None, :1] * self.moved
            states = (states[:, None] if told.ndim > states.ndim else states) + told
        return Hidden(states, self.head)

    def published(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Logits (N, D, S) with a column for the mask."""
        return nn.functional.pad(self(x, None, latents).logits(), (0, 1))


class Setting(NamedTuple):
    """One sequence, its networks and process."""

    student: StandIn
    teacher: StandIn
    process: AbsorbingProcess
    x_0: Tensor  # (1, D)
    num_latents: int


@lru_cache(maxsize=1)
def setting(num_latents: int, length: int, device: torch.device, tokens: int = TOKENS, width: int = WIDTH) -> Setting:
    """The same every time."""
    student, teacher = (StandIn(length, tokens, width, seed).to(device) for seed in (0, 1))
    x_0 = torch.randint(0, tokens, (1, length), generator=torch.Generator().manual_seed(2)).to(device)
    return Setting(student, teacher, AbsorbingProcess(tokens, "log_linear", tokens), x_0, num_latents)


def ours(s: Setting, time: float = TIME) -> Tensor:
    """The loss by the preset, at one time, of fresh draws of the sequence's key."""
    objective = Di4CObjective.preset("language", num_latents=s.num_latents, diagnostics=False)
    t = torch.tensor([time], dtype=torch.float64, device=s.x_0.device)
    keys = random.keys(0, 1, s.x_0.device)

    def latents(keys: Tensor, n: int) -> Tensor:
        return draw_latents(keys, n, 1, law="uniform", independent=True)

    times = t, t - torch.minimum(torch.full_like(t, 1 / 1024), t / 2)
    return objective(s.student, s.teacher, s.process, s.x_0, keys, latents=latents, times=times)["loss"]


def published_way(s: Setting, time: float = TIME) -> Tensor:
    """The same loss of fresh draws of torch's own generator."""
    x_t = s.process.corrupt(s.x_0, time, random.keys(0, 1, s.x_0.device))[0]
    networks = s.student.published, s.teacher.published
    latents = torch.rand(2, s.num_latents, 1, device=s.x_0.device)
    return sum(published.terms(*networks, s.x_0[0], x_t, time, latents))


@pytest.mark.parametrize("by", ["di4c", "torch, published"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: shape_name(*size))
def test_language_step(meter, device, size, by):
    group = f"language step, hidden {shape_name(1, *size, TOKENS + 1)} float32"
    wanted = STATE_SIZED * size[0] * size[1] * TOKENS * 4
    if by != "di4c" and free_memory(device) < wanted:
        meter.absent(group, by, f"wants {wanted / 1e9:.0f} GB free")
    s = setting(*size, device)
    ways: dict[str, Callable[[Setting], Tensor]] = {"di4c": ours, "torch, published": published_way}
    meter(
        group,
        by,
        lambda: torch.autograd.grad(ways[by](s), list(s.student.parameters())),
        at_least={"torch, published": FASTER} if by == "di4c" else None,
        may_fail=by != "di4c",
        graph=False,
    )


@lru_cache(maxsize=1)
def _networks(device: torch.device) -> dict[str, DiTDenoiser]:
    """The published small network, its head aside, as a teacher and with a latent in either form."""
    torch.manual_seed(0)
    teacher = DiTDenoiser(DiTConfig(hidden_logits=True)).to(device).eval()
    made = {form: DiTDenoiser.from_teacher(teacher, latent_form=form).eval() for form in ("added", "token")}
    return {"teacher": teacher, "di4c": made["added"], "student, latent as a token": made["token"]}


@pytest.mark.parametrize("by", ["teacher", "di4c", "student, latent as a token"])
def test_latency_of_a_latent(meter, device, by):
    """One evaluation of one sequence of 256, hidden states out; a student takes turns with its teacher."""
    ids = torch.arange(256, device=device)[None]
    time, latents = torch.ones(1, device=device), torch.full((1, 1), 0.5, device=device)

    def call(by: str) -> Callable[[], Hidden]:
        network = _networks(device)[by]

        def run() -> Hidden:
            with torch.no_grad():
                return network(ids, time, latents=None if by == "teacher" else latents)

        return run

    meter(
        "evaluation of the small network, hidden states 1x256",
        by,
        call(by),
        at_least=None if by == "teacher" else {"teacher": 1 / ADDED if by == "di4c" else None},
        turns=None if by == "teacher" else {"teacher": (call("teacher"), None)},
        graph=False,
    )


def test_what_an_added_latent_does(meter, device):
    """All that it does beside the teacher's work, by itself: its own layers, and the sums before the blocks."""
    network = _networks(device)["di4c"].backbone
    x, latents = torch.randn(1, 256, WIDTH, device=device), torch.full((1, 1), 0.5, device=device)
    gate = torch.ones(1, 1, 1, device=device)

    def run() -> Tensor:
        with torch.no_grad():
            told = network._told(latents)
            out = x
            for added in [gate * layer(told)[:, None] for layer in network.latent_in]:
                out = out + added
        return out

    meter("an added latent by itself, hidden states 1x256", "di4c", run, graph=False)
