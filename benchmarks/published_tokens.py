"""The image-token system the published way, in plain torch: `torch, published` in the tables.

Written from a description of the published program, with its costs: attention makes its probabilities, and their mean
over heads; the head has a column for every class, though those of codes and mask are all that is kept; the teacher's
probabilities are there once for every latent, and are drawn from by a Categorical that checks them; Gumbel numbers are
NumPy's, in double precision; positions are revealed image by image; the targets' forward makes a graph that nothing
uses; softmax and log-softmax of every forward are kept; the targets are scored one by one in a loop.
Shapes: x (N, D) int64, rows of a sample together, N = B L; r (B,) progress, 0 all masked and 1 clean; latents (N, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from plain import log_mean_exp
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import multi_head_attention_forward

from di4c_ext.models import TokenDenoiser
from di4c_ext.models.unet_blocks import sinusoid

STEP, ALPHA, GUMBEL, RAMP = 0.05, 0.1, 4.5, 8

Denoise = Callable[..., Tensor]  # (x (N, D), labels (N,), latents (N, 1) | None) -> logits (N, D, S)


class Network:
    """denoiser(x (N, D), labels (N,), latents (N, 1) | None) -> logits (N, D, S), by the weights of one of ours.

    A label of num_classes means no class. training: the mode that each call puts the model in.
    """

    def __init__(self, model: TokenDenoiser, training: bool) -> None:
        self.model, self.training = model, training

    def __call__(self, x: Tensor, labels: Tensor, latents: Tensor | None = None) -> Tensor:
        config, net = self.model.config, self.model.train(self.training).net
        classes = labels + (config.mask_id + 1)
        e = net.tok_emb(torch.cat([x, classes[:, None]], 1)) + net.pos_emb
        if latents is not None:
            shown = sinusoid(latents * config.latent_scale, config.latent_embed_dim)
            e = torch.cat([e, net.latent_projection(shown.flatten(1))[:, None]], 1)
        e = net.first_layer(e)
        blocks: Any = net.transformer["layers"]
        maps = []
        for attention, mlp in blocks:
            y, weights = _attention(attention.fn["mha"], attention.norm(e), self.training)
            maps.append(weights)  # for whoever may ask for them
            e = e + y
            e = e + mlp.fn["net"](mlp.norm(e))
        e = net.last_layer(e)[:, : config.length + 1]
        logits = e @ net.tok_emb.weight.T + net.bias
        return logits[:, : config.length, : config.num_states]


def _attention(mha: Any, x: Tensor, training: bool) -> tuple[Tensor, Tensor | None]:
    """torch's own, by the path that returns the probabilities too, a mean over heads."""
    rows = x.transpose(0, 1)
    y, weights = multi_head_attention_forward(
        rows,
        rows,
        rows,
        x.shape[-1],
        mha.num_heads,
        mha.in_proj_weight,
        mha.in_proj_bias,
        None,
        None,
        False,
        mha.dropout,
        mha.out_proj.weight,
        mha.out_proj.bias,
        training=training,
        need_weights=True,
    )
    return y.transpose(0, 1), weights


def masked_share(r: Tensor) -> Tensor:
    """The arccos schedule."""
    return 2 / math.pi * torch.arccos(r)


def corrupted(x_0: Tensor, r: Tensor, mask_id: int) -> Tensor:
    """x_t (B, D)."""
    return torch.where(torch.rand(x_0.shape, device=x_0.device) < masked_share(r)[:, None], mask_id, x_0)


def surest(tokens: Tensor, p: Tensor, noise: Tensor) -> Tensor:
    """The confidence of tokens (N, D) drawn from p (N, D, S), float64; noise (N, 1)."""
    g = torch.from_numpy(np.random.gumbel(size=tuple(tokens.shape))).to(p.device)
    return p.gather(-1, tokens[..., None]).squeeze(-1).log() + noise.double() * g


def stepped(x_t: Tensor, logits: Tensor, r: Tensor, number: int, mask_id: int) -> Tensor:
    """x_u (B number, D): steps from r to r + STEP, independent ones, from logits (B, D, S)."""
    p = torch.softmax(logits, -1).repeat_interleave(number, 0)
    tokens = Categorical(probs=p).sample()
    ramp = r * RAMP / (RAMP - 1)
    confidence = surest(tokens, p, (GUMBEL * (1 - ramp)).repeat_interleave(number)[:, None])
    x_u = x_t.repeat_interleave(number, 0)
    for b in range(len(x_t)):
        rows, masked = slice(b * number, (b + 1) * number), x_t[b] == mask_id
        left = float(masked_share((r[b] + STEP).clamp(max=1))) * x_t.shape[1]
        count = max(0, min(int(int(masked.sum()) - left), int(masked.sum())))
        if count > 0:
            sure = confidence[rows].masked_fill(~masked, -math.inf)
            least = sure.topk(count).values[:, -1:]
            x_u[rows] = torch.where((sure >= least) & masked, tokens[rows], x_u[rows])
    return x_u


@dataclass(frozen=True)
class Chances:
    """What a step draws beside states: r (B,), and the latents (B L, 1) of the two forwards."""

    r: Tensor
    latents: Tensor
    target_latents: Tensor

    @classmethod
    def drawn(cls, batch: int, num_latents: int, device: torch.device) -> Chances:
        return cls(torch.rand(batch, device=device), *torch.rand(2, batch * num_latents, 1, device=device))


class Draws(NamedTuple):
    """Who draws states: x_t of (x_0, r, mask_id), x_u of (x_t, logits, r, L, mask_id), and targets (N, D) of p."""

    corrupted: Callable[[Tensor, Tensor, int], Tensor] = corrupted
    stepped: Callable[[Tensor, Tensor, Tensor, int, int], Tensor] = stepped
    targets: Callable[[Tensor], Tensor] = lambda p: Categorical(probs=p).sample()


class Terms(NamedTuple):
    """(B,) each: distillation, data and consistency."""

    distillation: Tensor
    data: Tensor
    consistency: Tensor


def terms(
    student: Denoise,
    target: Denoise,
    teacher: Denoise,
    x_0: Tensor,
    labels: Tensor,
    chances: Chances,
    mask_id: int,
    draws: Draws = Draws(),  # noqa: B008  (nothing of it changes)
) -> Terms:
    """One step's loss on x_0 (B, D) of the classes labels (B,); target is the student without dropout."""
    r, B, N = chances.r, len(x_0), len(chances.latents)
    L = N // B
    told = labels.repeat_interleave(L)
    x_t = draws.corrupted(x_0, r, mask_id)
    with torch.no_grad():
        logits_teacher = teacher(x_t, labels)
        x_u = draws.stepped(x_t, logits_teacher, r, L, mask_id)
    p_teacher, log_p_teacher = torch.softmax(logits_teacher, -1), torch.log_softmax(logits_teacher, -1)

    def by_sample(x: Tensor) -> Tensor:
        return x.unflatten(0, (B, L))

    target_logits = target(x_u, told, chances.target_latents)
    g, log_g = torch.softmax(target_logits, -1).detach(), by_sample(torch.log_softmax(target_logits, -1)).detach()
    del target_logits  # and the graph with them
    targets = by_sample(draws.targets(g))
    log_p = by_sample(torch.log_softmax(student(x_t.repeat_interleave(L, 0), told, chances.latents), -1))
    log_mean = log_mean_exp(log_p)

    def gain(x: Tensor) -> Tensor:
        """A(x), x (B, D)."""
        index = x[:, None, :, None].expand(-1, L, -1, 1)
        joint = log_p.gather(-1, index).squeeze(-1).sum(-1)
        return log_mean_exp(joint) - log_mean.gather(-1, x[..., None]).squeeze(-1).sum(-1)

    many, log_many = (by_sample(x.repeat_interleave(L, 0)) for x in (p_teacher, log_p_teacher))
    near = (r >= 1 - STEP).float()
    distillation = near / STEP * (many * (log_many - log_p)).sum((2, 3)).mean(1)
    data = (p_teacher * (log_p_teacher - log_mean)).sum((1, 2)) - ALPHA * torch.sigmoid(20 * (0.5 - r)) * gain(x_0)
    log_g_mean = log_mean_exp(log_g)
    consistency = (log_g_mean.exp() * (log_g_mean - log_mean)).sum((1, 2))
    for x in targets.unbind(1):
        consistency = consistency - gain(x) / L
    return Terms(distillation, data, (1 - near) * consistency)


def counts_of(length: int, num_steps: int) -> list[int]:
    """How many positions each step reveals."""
    r = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    left = [round(length * float(share)) for share in masked_share(r)]
    revealed = [max(1, before - after) for before, after in pairwise(left)]
    return [*revealed[:-1], length - sum(revealed[:-1])]


@torch.no_grad()
def sample(
    student: Denoise,
    labels: Tensor,
    length: int,
    num_steps: int,
    *,
    mask_id: int,
    no_class: int,
    guidance: float,
    gumbel: float = GUMBEL,
) -> Tensor:
    """Codes (B, D) of the classes labels (B,), two rows of the network to an image at every step; T is at least 2."""
    batch, device = len(labels), labels.device
    x = torch.full((batch, length), mask_id, device=device)
    masked = torch.ones_like(x, dtype=torch.bool)
    told = torch.cat([labels, torch.full_like(labels, no_class)])
    for i, count in enumerate(counts_of(length, num_steps)):
        ramp = i / (num_steps - 1)
        z = torch.rand(batch, 1, device=device)
        conditional, without = student(torch.cat([x, x]), told, torch.cat([z, z])).chunk(2)
        p = torch.softmax((1 + guidance * ramp) * conditional - guidance * ramp * without, -1)
        tokens = Categorical(probs=p).sample()
        sure = surest(tokens, p, torch.full((batch, 1), gumbel * (1 - ramp), device=device))
        found = sure.masked_fill(~masked, -math.inf).topk(count)
        x = torch.where(masked & (sure >= found.values[:, -1:]), tokens, x)
        for b in range(batch):
            masked[b, found.indices[b]] = False
        if not masked.any():
            break
    return x.clamp(max=mask_id - 1)
