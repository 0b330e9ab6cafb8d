"""The published pixel denoiser (the teacher of tauLDR, the student of Di4C): a U-Net that gives each pixel a logistic.

Names, shapes and order of the weights are the published ones, so their checkpoints load as they are (`python -m
di4c_ext.convert`). A student knows its latent twice: on the way down mixed with the time, in the middle and on the
way up with the time and the mean of the smallest map. Both are added in every residual block through layers that
start at zero, so a new student equals its teacher bit for bit.

Of the L latents of a sample the time's features are shared, and where they share x_t too, all of the network that
lies before the first place where the latent enters.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.models.latent import LatentLaw
from di4c_ext.models.unet_blocks import (
    Attention,
    Downsample,
    GroupNorm,
    NiN,
    ResBlock,
    Upsample,
    sinusoid,
    spread,
    wide,
)
from di4c_ext.models.unet_config import UNetConfig
from di4c_ext.ops import Logistic


class UNet(nn.Module):
    """forward(x (R, C, H, W), t (B,), latents (N, C') | None) -> (N, 2C, H, W) float32 at least, x in [-1, 1].

    R is B or N, N = B L; the rows of a sample lie together. Modules stand in the order of the published state.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        inner, outer = config.time_embed_dim, 4 * config.time_embed_dim
        widths = [config.base_channels * n for n in config.ch_mult]

        def embedding() -> nn.ModuleList:
            return nn.ModuleList([nn.Linear(inner, outer), nn.Linear(outer, outer)])

        def block(inputs: int, outputs: int) -> ResBlock:
            return ResBlock(inputs, outputs, outer, config.dropout, config.is_student)

        told = (1 + config.latent_dim) * inner
        self.temb_modules = embedding()
        if config.is_student:
            self.lemb_modules = embedding()
            self.hlemb_modules = embedding()
            self.tlam_mix = nn.Linear(told, inner)
        self.input_conv = nn.Conv2d(config.num_channels, config.base_channels, 3, padding=1)

        kept = [config.base_channels]  # channels of the maps that the way up takes back, newest last
        self.downsampling_modules = nn.ModuleList()
        for scale, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.downsampling_modules.append(block(kept[-1], width))
                if scale in config.attention_scales:
                    self.downsampling_modules.append(Attention(width))
                kept.append(width)
            if scale + 1 < len(widths):
                self.downsampling_modules.append(Downsample(width))
                kept.append(width)
        if config.is_student:
            self.h_t_lam_mix = nn.Linear(told + widths[-1], inner)
        self.middle_modules = nn.ModuleList(
            [block(widths[-1], widths[-1]), Attention(widths[-1]), block(widths[-1], widths[-1])]
        )
        now = widths[-1]
        self.upsampling_modules = nn.ModuleList()
        for scale, width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.upsampling_modules.append(block(now + kept.pop(), width))
                if scale in config.attention_scales:
                    self.upsampling_modules.append(Attention(width))
                now = width
            if scale:
                self.upsampling_modules.append(Upsample(width))
        self.output_modules = nn.ModuleList([GroupNorm(now), nn.Conv2d(now, 2 * config.num_channels, 3, padding=1)])

    def forward(self, x: Tensor, t: Tensor, latents: Tensor | None) -> Tensor:
        config, dtype = self.config, self.input_conv.weight.dtype
        told = sinusoid(t.to(wide(dtype)) * config.time_scale, config.time_embed_dim).to(dtype)
        time = functional.silu(_embedded(self.temb_modules, told))
        latent = None
        if latents is not None:
            shown = sinusoid(latents.to(wide(dtype)) * config.latent_scale, config.time_embed_dim).flatten(1)
            told = torch.cat([shown.to(dtype), spread(told, len(latents))], 1)
            latent = self._latent(self.lemb_modules, self.tlam_mix, told)
        maps = [self.input_conv(x.to(dtype))]
        for module in self.downsampling_modules:
            if isinstance(module, ResBlock):
                maps.append(module(maps[-1], time, latent))
            elif isinstance(module, Downsample):
                maps.append(module(maps[-1]))
            else:  # attention: what is kept for the way up is what comes out of it
                maps[-1] = module(maps[-1])
        h = maps[-1]
        if latents is not None:
            told = torch.cat([told, h.mean((2, 3)).to(dtype)], 1)
            latent = self._latent(self.hlemb_modules, self.h_t_lam_mix, told)
        for module in self.middle_modules:
            h = module(h) if isinstance(module, Attention) else module(h, time, latent)
        for module in self.upsampling_modules:
            if isinstance(module, ResBlock):
                h = module(torch.cat([h, spread(maps.pop(), len(h))], 1), time, latent)
            elif isinstance(module, Upsample):
                h = module(h, maps[-1].shape[2:])
            else:
                h = module(h)
        return self._head(h)

    def _latent(self, embedding: nn.ModuleList, mix: nn.Module, told: Tensor) -> Tensor:
        return functional.silu(_embedded(embedding, functional.silu(mix(told))))

    def _head(self, h: Tensor) -> Tensor:
        """In float32 at least: at little noise a mean must be known to a fraction of a level's width."""
        norm, conv = self.output_modules
        h = h.to(wide(h.dtype))
        with torch.autocast(h.device.type, enabled=False):
            weight, bias = (parameter.to(h.dtype) for parameter in conv.parameters())
            return functional.conv2d(functional.silu(norm(h)), weight, bias, padding=1)


class UNetDenoiser(MixtureDenoiser):
    """denoiser(x_t, t, latents=None) -> ops.Logistic, the S clean levels of every pixel and channel.

    x_t (B, D) or (B, L, D) int64 in 0..S-1, D = channels * height * width in that order; t (B,), 1 noise to 0 data.
    Teacher: the Logistic has the shape of x_t; latents given to it are ignored.
    Student: latents (B, C) -> (B, D); latents (B, L, C) with x_t (B, D) or (B, L, D) -> (B, L, D).

    Moved `.to(memory_format=torch.channels_last)` it computes in that format. Under autocast, or with bfloat16 weights,
    group norms, attention and the last layer stay in float32, and the Logistic always is.
    `activation_checkpointing_enable()` (gradient_checkpointing_enable in older transformers) keeps the inputs of the
    blocks alone for the backward pass and computes the blocks again.
    """

    config_class = UNetConfig
    config: UNetConfig
    latent_names = ("lemb_modules.", "tlam_mix.", "h_t_lam_mix.", "dense1.")  # lemb_modules and hlemb_modules
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock", "Attention"]  # noqa: RUF012  (as transformers has it)

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.net = UNet(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Each layer's own start, zero where the latent enters, and no biases in the linear ones."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, NiN)):
            module.reset_parameters()
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, x_t: Tensor, t: Tensor, latents: Tensor | None = None) -> Logistic:
        config = self.config
        self._check(x_t, t)
        if config.is_student:
            latents = self.checked_latents(latents, x_t)
            lead = latents.shape[:-1]
            latents = latents.flatten(0, -2)
        else:
            latents, lead = None, x_t.shape[:-1]
        levels = x_t.to(wide(self.net.input_conv.weight.dtype))
        x = (levels / (config.num_states - 1) * 2 - 1).view(math.prod(x_t.shape[:-1]), *config.shape)
        out = self.net(x, t, latents)
        mean = torch.tanh(spread(x, len(out)) + out[:, : config.num_channels])
        mean, log_scale = (part.flatten(1).view(*lead, config.length) for part in (mean, out[:, config.num_channels :]))
        return Logistic(mean, log_scale, config.num_states)

    def _check(self, x_t: Tensor, t: Tensor) -> None:
        config = self.config
        if x_t.ndim not in (2, 3) or x_t.shape[-1] != config.length:
            raise ValueError(
                f"UNetDenoiser: x_t must be (B, D) or (B, L, D) with D = {config.length}, images of "
                f"{' x '.join(map(str, config.shape))}, got {tuple(x_t.shape)}"
            )
        if x_t.is_floating_point() or x_t.dtype == torch.bool:
            raise TypeError(f"UNetDenoiser: x_t must be integers, levels 0..{config.num_states - 1}, got {x_t.dtype}")
        if not isinstance(t, Tensor) or t.shape != x_t.shape[:1]:
            got = tuple(t.shape) if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"UNetDenoiser: t must be a tensor (B,) with B = {x_t.shape[0]}, got {got}")

    @classmethod
    def from_teacher(
        cls,
        teacher: str | os.PathLike[str] | UNetDenoiser,
        *,
        latent_dim: int = 1,
        latent_law: LatentLaw = "uniform",
        latent_scale: float = 1000.0,
        dropout: float | None = None,
    ) -> UNetDenoiser:
        """A student with the teacher's weights, equal to it bit for bit whatever the latents; the teacher is copied.

        dropout: None keeps the teacher's. The latent's other settings are explained in `UNetConfig`.
        """
        settings: dict[str, Any] = {"latent_dim": latent_dim, "latent_law": latent_law, "latent_scale": latent_scale}
        return cls.student_of(teacher, settings | ({} if dropout is None else {"dropout": dropout}))


def _embedded(layers: nn.ModuleList, x: Tensor) -> Tensor:
    return layers[1](functional.silu(layers[0](x)))
