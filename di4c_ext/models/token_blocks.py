"""The parts of the published image-token transformer, under the names its checkpoints use.

Sequences are (N, P, H): N rows, P tokens of width H. Both halves of a block are pre-norm and residual.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from di4c_ext.models.unet_blocks import spread


class PackedAttention(nn.Module):
    """Every token attends to every token; (N, P, H) -> (N, P, H). Queries, keys and values lie in one weight.

    The probabilities (N, heads, P, P) are never made where torch has a fused kernel: on a GPU with or without dropout,
    on a CPU without.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's own multi-head attention starts."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        packed = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # torch's fused backward takes five times as long in bfloat16 there, which is half of a training step.
            with torch.autocast("cpu", enabled=False):
                q, k, v = q.float(), k.float(), v.float()
                y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout).to(packed.dtype)
        else:
            y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class AttentionHalf(GradientCheckpointingLayer):
    """e + attention(norm(e))."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.fn = nn.ModuleDict({"mha": PackedAttention(hidden_size, num_heads, dropout)})

    def forward(self, e: Tensor) -> Tensor:
        return e + self.fn["mha"](self.norm(e))


class MLPHalf(GradientCheckpointingLayer):
    """e + MLP(norm(e) + what the latent adds).

    forward(e (R, P, H), added (N, 1, H) | None) -> (N, P, H), or (R, P, H) where nothing is added. R rows fewer than
    N are shared by the latents of a sample, and are widened here, where the latent enters.
    """

    def __init__(self, hidden_size: int, mlp_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        layers = (nn.Linear(hidden_size, mlp_size), nn.GELU(), nn.Dropout(dropout))
        net = nn.Sequential(*layers, nn.Linear(mlp_size, hidden_size), nn.Dropout(dropout))
        self.fn = nn.ModuleDict({"net": net})

    def forward(self, e: Tensor, added: Tensor | None = None) -> Tensor:
        inner = self.norm(e)
        if added is not None:
            inner, e = spread(inner, len(added)) + added, spread(e, len(added))
        return e + self.fn["net"](inner)
