"""Encoder and decoder of the published VQ autoencoder, under the names its checkpoints use.

Feature maps are (N, channels, height, width) in any memory format. Group norms and attention compute in float32 at
least and hand back the precision they got.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from di4c_ext.models.unet_blocks import Downsample, GroupNorm, Upsample, wide
from di4c_ext.models.vqgan_config import VQConfig


class ResBlock(nn.Module):
    """Two convolutions, and the input beside them."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """x + what every pixel learns from every pixel, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        # (N, 1, h w, channels)
        q, k, v = (conv(y).flatten(2).mT[:, None].to(wide(x.dtype)) for conv in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:]).to(y.dtype)
        return x + self.proj_out(y)


class Middle(nn.Module):
    """Attention between two residual blocks, at the smallest size."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, dropout)
        self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Scale(nn.Module):
    """The residual blocks of one size, each with attention after it where that is wanted; then the way to the next."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        number: int,
        *,
        has_attention: bool,
        dropout: float,
        next_size: Downsample | Upsample | None,
    ) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * number
        self.block = nn.ModuleList(ResBlock(widths[i], outputs, dropout) for i in range(number))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(number if has_attention else 0))
        self.downsample = next_size if isinstance(next_size, Downsample) else None
        self.upsample = next_size if isinstance(next_size, Upsample) else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            height, width = x.shape[2:]
            x = self.upsample(x, torch.Size((2 * height, 2 * width)))
        return x


class Encoder(nn.Module):
    """forward(images (N, channels, height, width)) -> (N, z_channels, h, w) of the grid's size."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * n for n in config.ch_mult]
        self.conv_in = nn.Conv2d(config.num_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        now = config.base_channels
        for i, width in enumerate(widths):
            scale = Scale(
                now,
                width,
                config.num_res_blocks,
                has_attention=i in config.attention_scales,
                dropout=config.dropout,
                next_size=Downsample(width) if i + 1 < len(widths) else None,
            )
            self.down.append(scale)
            now = width
        self.mid = Middle(now, config.dropout)
        self.norm_out = GroupNorm(now)
        self.conv_out = nn.Conv2d(now, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for scale in self.down:
            h = scale(h)
        return self.conv_out(functional.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """forward(z (N, z_channels, h, w)) -> images (N, channels, height, width)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * n for n in config.ch_mult]
        now = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, now, 3, padding=1)
        self.mid = Middle(now, config.dropout)
        scales = []
        for i, width in reversed(list(enumerate(widths))):
            scale = Scale(
                now,
                width,
                config.num_res_blocks + 1,
                has_attention=i in config.attention_scales,
                dropout=config.dropout,
                next_size=Upsample(width) if i else None,
            )
            scales.append(scale)
            now = width
        self.up = nn.ModuleList(reversed(scales))  # numbered by size, run from the smallest
        self.norm_out = GroupNorm(now)
        self.conv_out = nn.Conv2d(now, config.num_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            h = self.up[i](h)
        return self.conv_out(functional.silu(self.norm_out(h)))
