"""The parts of the published pixel U-Net (of the DDPM family), under the names its checkpoints use.

Convolutions and linear layers run in whatever precision the weights and autocast give them; group norms and attention
compute in float32 at least and hand back the precision they got. Feature maps are (N, channels, height, width) in any
memory format: a model moved to torch.channels_last keeps its maps so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

_NIN_SCALE, _LAST_NIN_SCALE = 0.1, 1e-10  # variances of a new 1x1 layer; the attention's last one starts near zero


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """values (...) -> (..., dim): the sines, then the cosines, of values at dim / 2 rates from 1 down to 1 / 10,000."""
    half = dim // 2
    steps = torch.arange(half, dtype=values.dtype, device=values.device)
    angles = values[..., None] * torch.exp(steps * -(math.log(10000) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], -1)


def spread(x: Tensor, rows: int) -> Tensor:
    """x (B, ...) -> (rows, ...), each row rows / B times in a row; x itself where it has them already."""
    if len(x) == rows:
        return x
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    x = x.permute(0, 2, 3, 1) if last else x  # copied in the order it lies in
    x = x[:, None].expand(-1, rows // len(x), *x.shape[1:]).flatten(0, 1)
    return x.permute(0, 3, 1, 2) if last else x


class GroupNorm(nn.GroupNorm):
    """32 groups, or a quarter of the channels where that is less; computed in float32 at least."""

    def __init__(self, channels: int) -> None:
        groups = min(channels // 4, 32)
        if groups < 1 or channels % groups:
            raise ValueError(
                f"UNetDenoiser: {channels} feature maps do not fall into {max(groups, 1)} equal groups; "
                "choose base_channels a multiple of 4, from 128 on of 32, and so every sum of two scales"
            )
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        dtype = wide(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return functional.group_norm(input.to(dtype), self.num_groups, weight, bias, self.eps).to(input.dtype)


class NiN(nn.Module):
    """A linear map of the channels, the same at every pixel: y = x W + b."""

    def __init__(self, inputs: int, outputs: int, scale: float = _NIN_SCALE) -> None:
        super().__init__()
        self.scale = scale
        self.W = nn.Parameter(torch.empty(inputs, outputs))
        self.b = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = math.sqrt(3 * self.scale / (sum(self.W.shape) / 2))
        nn.init.uniform_(self.W, -bound, bound)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.W.t()[:, :, None, None], self.b)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: what it adds is nothing until it has learnt."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ResBlock(GradientCheckpointingLayer):
    """Two convolutions with what time and latent say added between them, and the input beside them, over sqrt(2).

    forward(x (R, inputs, h, w), time (B, E), latent (N, E) | None) -> (N, outputs, h, w). Rows that B or R have fewer
    of than N are shared by the latents of a sample; the map is widened only where the latent enters.
    """

    def __init__(self, inputs: int, outputs: int, embed_dim: int, dropout: float, is_student: bool) -> None:
        super().__init__()
        self.groupnorm0 = GroupNorm(inputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.dense0 = nn.Linear(embed_dim, outputs)
        if is_student:
            self.dense1 = ZeroLinear(embed_dim, outputs)
        self.groupnorm1 = GroupNorm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin = NiN(inputs, outputs) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor, latent: Tensor | None) -> Tensor:
        rows = len(x) if latent is None else len(latent)
        h = spread(self.conv0(functional.silu(self.groupnorm0(x))), rows)
        added = spread(self.dense0(time), rows)
        if latent is not None:
            added = added + self.dense1(latent)
        h = self.dropout(functional.silu(self.groupnorm1(h + added[:, :, None, None])))
        skip = x if self.nin is None else self.nin(x)
        return (self.conv1(h) + spread(skip, rows)) / math.sqrt(2)


class Attention(GradientCheckpointingLayer):
    """Every pixel attends to every pixel with one head, in float32 at least; the input is added, over sqrt(2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = GroupNorm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2 = (NiN(channels, channels) for _ in range(3))  # query, key, value
        self.NIN_3 = NiN(channels, channels, _LAST_NIN_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        y = self.GroupNorm_0(x)
        dtype = wide(y.dtype)
        # (N, 1, h w, channels); under channels_last the transpose is how the map lies
        q, k, v = (nin(y).flatten(2).mT[:, None].to(dtype) for nin in (self.NIN_0, self.NIN_1, self.NIN_2))
        with torch.autocast(x.device.type, enabled=False):
            y = functional.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:]).to(y.dtype)
        return (x + self.NIN_3(y)) / math.sqrt(2)


class Downsample(nn.Module):
    """Half the size, by a convolution of stride 2 over the map padded on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """To the size of the scale above, twice this one or a row more, by nearest neighbours and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(functional.interpolate(x, size=size, mode="nearest"))
