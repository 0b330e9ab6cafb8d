"""The parts of the published diffusion transformer of language, under the names its checkpoints use.

Residual stream, norms, shifts and scales are float32 at least; the linear layers and the attention run in whatever
precision the weights and autocast give them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from di4c_ext.models.unet_blocks import ZeroLinear, wide

NOISE_EMBED_DIM = 256  # cosines and sines by which a noise level is shown


class TokenEmbedding(nn.Module):
    """ids (...) -> (..., H)."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.embedding.shape[1] ** -0.5
        nn.init.uniform_(self.embedding, -bound, bound)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.embedding)


class NoiseEmbedding(nn.Module):
    """sigma (R,) -> the condition (R, cond_dim): what the adaLN layers read."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NOISE_EMBED_DIM, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        half = NOISE_EMBED_DIM // 2
        dtype = next(self.mlp.parameters()).dtype
        steps = torch.arange(half, dtype=wide(dtype), device=sigma.device)
        angles = sigma.to(wide(dtype))[:, None] * torch.exp(steps * -(math.log(10000) / half))
        return functional.silu(self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(dtype)))


class Rotary(nn.Module):
    """The angles pos * 10000^(-2j / head_dim) by which queries and keys are turned.

    inv_freq is there because the published files hold it. Angles are made from the formula: a model in half floats
    has its buffers in half floats too, and an angle of position 1,000 would be off by radians.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", self.frequencies(torch.device("cpu")).float())

    def frequencies(self, device: torch.device) -> Tensor:
        """(head_dim / 2,) float64."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        return 10000 ** -(steps / self.head_dim)

    def forward(self, length: int, latent_token: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (length, head_dim / 2) float64; with a latent's token, one more row, which turns nothing."""
        places = torch.arange(length + latent_token, dtype=torch.float64, device=device)
        if latent_token:
            places = torch.where(places < length, places, 0.0)
        angles = places[:, None] * self.frequencies(device)
        return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., D, head_dim), its first half turned with its second; cos, sin (D, head_dim / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class LayerNorm(nn.Module):
    """weight * (x - mean) / sqrt(var + 1e-5), no bias, in float32 at least."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """norm(x) (1 + scale) + shift; shift and scale (R, 1, H), one row for all or one a row."""
        dtype = wide(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            normed = functional.layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), eps=1e-5)
            return normed * (1 + scale.to(dtype)) + shift.to(dtype)


def modulation(layer: nn.Module, condition: Tensor, number: int) -> tuple[Tensor, ...]:
    """condition (R, cond_dim) -> `number` of (R, 1, H)."""
    return layer(condition)[:, None].chunk(number, -1)


class Block(GradientCheckpointingLayer):
    """x (N, D, H) -> (N, D, H): attention of all to all, then an MLP, each shifted, scaled and gated (adaLN)."""

    def __init__(self, hidden_size: int, num_heads: int, cond_dim: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = mlp_ratio * hidden_size
        self.norm1 = LayerNorm(hidden_size)
        self.attn_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attn_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm2 = LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, hidden_size)
        )
        self.adaLN_modulation = ZeroLinear(cond_dim, 6 * hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(self.adaLN_modulation, condition, 6)
        dtype = self.attn_qkv.weight.dtype
        told = self._attention(self.norm1(x, shift, scale).to(dtype), cos, sin)
        x = x + gate * self.dropout(told)
        told = self.mlp(self.norm2(x, mlp_shift, mlp_scale).to(dtype))
        return x + mlp_gate * self.dropout(told)

    def _attention(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.attn_qkv(h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, D, .)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        mixed = functional.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v)
        out: Tensor = self.attn_out(mixed.transpose(1, 2).flatten(2))
        return out


class Head(nn.Module):
    """The last norm, and the linear layer that makes logits of it."""

    def __init__(self, hidden_size: int, rows: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(hidden_size)
        self.linear = ZeroLinear(hidden_size, rows)
        self.adaLN_modulation = ZeroLinear(cond_dim, 2 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The states (N, D, H) that `linear` is to be applied to."""
        shift, scale = modulation(self.adaLN_modulation, condition, 2)
        states: Tensor = self.norm_final(x, shift, scale)
        return states
