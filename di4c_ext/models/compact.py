"""A compact denoiser for small images: a residual network over all positions at once.

Every position is shown as the one-hot code of its state and, where states are levels, as a thermometer beside it; all
of them enter one wide layer. That suits some tens of positions on a CPU, where an attention network of the same time
learns little beyond the marginals. Time is no input: under absorbing noise x_t tells all there is to know of t
(arXiv 2406.03736).

The latent of a student is added inside each block and before the head, through projections that start at zero, so a
new student equals its teacher bit for bit. Whatever lies before the first of them is computed once per x_t. What the
latent adds is scaled by the share of masked positions: the fewer are open, the less correlation is left between them,
and where one is open there is none. That keeps samplers of many steps on the teacher's marginals.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.models.compact_config import CompactConfig
from di4c_ext.models.latent import LatentEmbedding


class Block(nn.Module):
    """h + W_2 gelu(W_1 norm(h) + what the latent adds)."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.expand = nn.Linear(hidden_size, hidden_size)
        self.contract = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, added: Tensor | None) -> Tensor:
        inner = self.expand(self.norm(h))
        if added is not None:
            inner = inner + added
        return h + self.dropout(self.contract(nn.functional.gelu(inner)))


class CompactDenoiser(MixtureDenoiser):
    """denoiser(x_t, t, latents=None, augmentation=None) -> logits of the S clean states.

    x_t (B, D) int64, t (B,) or anything (not used), augmentation (B, A) or None for an image left as it is.
    Teacher: x_t (..., D) -> (..., D, S); latents given to it are ignored.
    Student: latents (B, C) -> (B, D, S); latents (B, L, C) with x_t (B, D) or (B, L, D) -> (B, L, D, S).
    """

    config_class = CompactConfig
    latent_names = ("latent_embedding.", "latent_in.")
    config: CompactConfig
    features: Tensor

    def __init__(self, config: CompactConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.register_buffer("features", _features(config))
        self.embed = nn.Linear(config.length * self.features.shape[1], width)
        told = config.augmentation_dim
        self.augmentation_in = nn.Linear(told, width, bias=False) if told else None
        self.blocks = nn.ModuleList(Block(width, config.dropout) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.length * config.num_states)
        if config.is_student:
            self.latent_embedding = LatentEmbedding(config.latent_dim, config.latent_hidden_size)
            self.latent_in = nn.ModuleList(
                nn.Linear(config.latent_hidden_size, width) for _ in range(config.num_blocks + 1)
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own start for each layer, zeros where a new part must not change what the network says."""
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
        if module is self:
            zero = [*self.latent_in] if self.config.is_student else []
            for layer in [*zero, *([] if self.augmentation_in is None else [self.augmentation_in])]:
                for parameter in layer.parameters():
                    parameter.zero_()

    def forward(
        self, x_t: Tensor, t: Tensor | None = None, latents: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        config = self.config
        if x_t.shape[-1:] != (config.length,):
            raise ValueError(f"CompactDenoiser: x_t must be (..., D = {config.length}), got {tuple(x_t.shape)}")
        h = self.embed(self.features[x_t].flatten(-2))
        if augmentation is not None:
            h = h + self._augmentation(augmentation, x_t)
        added: list[Tensor | None] = [None] * (config.num_blocks + 1)
        if config.is_student:
            latents = self.checked_latents(latents, x_t)
            embedded = self.latent_embedding(latents.to(h.dtype))
            gate = (x_t == config.mask_id).to(h.dtype).mean(-1, keepdim=True) ** config.latent_gate
            if latents.ndim > h.ndim:
                h, gate = h[:, None], gate[:, None]  # broadcast over L inside the first block, where lambda enters
            added = [gate * layer(embedded) for layer in self.latent_in]
        for block, latent in zip(self.blocks, added, strict=False):
            h = block(h, latent)
        h = self.norm(h)
        if added[-1] is not None:
            h = h + added[-1]
        return self.head(nn.functional.gelu(h)).unflatten(-1, (config.length, config.num_states))

    def _augmentation(self, augmentation: Tensor, x_t: Tensor) -> Tensor:
        if self.augmentation_in is None:
            raise ValueError("CompactDenoiser: augmentation given, but config.augmentation_dim is 0; leave it out")
        wanted = (x_t.shape[0], self.config.augmentation_dim)
        if augmentation.shape != wanted:
            raise ValueError(
                f"CompactDenoiser: augmentation must be (B, A) = {wanted}, got {tuple(augmentation.shape)}"
            )
        added = self.augmentation_in(augmentation)
        return added if x_t.ndim == 2 else added[:, None]

    @classmethod
    def from_teacher(
        cls,
        teacher: str | os.PathLike[str] | CompactDenoiser,
        *,
        latent_dim: int = 16,
        latent_hidden_size: int = 256,
        latent_gate: float = 1.0,
        dropout: float | None = None,
    ) -> CompactDenoiser:
        """A student with the teacher's weights, equal to it bit for bit whatever the latents; the teacher is copied.

        dropout: None keeps the teacher's.
        """
        settings = {"latent_dim": latent_dim, "latent_hidden_size": latent_hidden_size, "latent_gate": latent_gate}
        return cls.student_of(teacher, settings | ({} if dropout is None else {"dropout": dropout}))


def _features(config: CompactConfig) -> Tensor:
    """(inputs, F): how each state is shown; a mask has a code of its own and the middle of every level."""
    codes = torch.eye(config.num_inputs)
    if not config.ordinal or config.num_states < 2:
        return codes
    level = torch.arange(config.num_inputs, dtype=torch.float32)
    thermometer = torch.where(level[:, None] > torch.arange(config.num_states - 1), 0.5, -0.5)
    value = (2 * level / (config.num_states - 1) - 1)[:, None]
    ordered = torch.cat([thermometer, value], 1)
    ordered[config.mask_id] = 0
    return torch.cat([codes, ordered], 1)
