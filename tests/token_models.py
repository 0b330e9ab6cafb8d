"""Small token transformers and VQ autoencoders, with weights by formula, and codes for them."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from di4c_ext.models import TokenConfig, TokenDenoiser, VQConfig, VQModel

# The published plan on a grid of 3 x 4; no two sizes are equal, so that no shape fits by chance.
SMALL = {
    **{"num_codes": 12, "num_classes": 3, "grid": [3, 4], "hidden_size": 16, "num_layers": 2, "num_heads": 2},
    **{"mlp_size": 32, "latent_embed_dim": 8, "latent_hidden_size": 10},
}
# Images of 8 x 12 in two colours, codes of 2 x 3; attention at the smallest of three scales, as published.
SMALL_VQ = {
    **{"num_codes": 20, "embed_dim": 6, "image_size": [8, 12], "num_channels": 2, "base_channels": 8},
    **{"ch_mult": [1, 1, 2], "attention_scales": [2], "z_channels": 10},
}
Model = TypeVar("Model", bound=nn.Module)


def filled(model: Model) -> Model:
    """Every weight a function of its place alone, none of them zero; in evaluation mode."""
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            k = torch.arange(weight.numel(), dtype=torch.float64)
            wave = torch.sin(1.7 * i + 0.61 * k + 0.0137 * k**2).view(weight.shape)
            if weight.ndim == 1:
                holder = model.get_submodule(name.rpartition(".")[0])
                is_scale = isinstance(holder, (nn.LayerNorm, nn.GroupNorm)) and name.endswith("weight")
                wave = 0.3 * wave + is_scale
            else:
                wave = wave * math.sqrt(6 / weight[0].numel())
            weight.copy_(wave)
    return model.eval()


def tokens_by_formula(**settings) -> TokenDenoiser:
    return filled(TokenDenoiser(TokenConfig(**SMALL | settings)))


def vq_by_formula(**settings) -> VQModel:
    return filled(VQModel(VQConfig(**SMALL_VQ | settings)))


def codes(rows: int, config: TokenConfig) -> Tensor:
    """x_t (rows, D) by formula: codes and, about a third of them, masks."""
    k = torch.arange(rows * config.length).view(rows, -1)
    return torch.where(k.pow(2).mul(5) % 7 < 3, config.mask_id, k.pow(2).mul(7).add(3) % config.num_codes)


def pictures(rows: int, config: VQConfig) -> Tensor:
    """Images (rows, C, H, W) in [-1, 1] by formula, double precision."""
    k = torch.arange(rows * math.prod(config.image_shape), dtype=torch.float64).view(rows, *config.image_shape)
    return torch.sin(0.37 * k + 0.0021 * k**2)
