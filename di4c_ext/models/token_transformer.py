"""The published denoiser of image tokens (the teacher of MaskGIT in PyTorch, the student of Di4C): a transformer.

Names, shapes and order of the weights are the published ones, under `net.`, so their checkpoints load as they are
(`python -m di4c_ext.convert`). One embedding serves codes, mask and classes, and is the head's weight too; of the head
only the columns of codes and mask are computed. The class is the last token of the sequence. Time is no input.

A student takes its latent in one of two forms. As published it is one token more, after the class: that changes
attention, so a new student is not its teacher. Or it is added inside every MLP by projections that start at zero: a
new student then equals its teacher bit for bit, and of the L latents of a sample that share x_t all is shared that
lies before the first of these. What the latent adds is scaled by the share of masked positions, as in the compact
denoiser: where nothing is masked there is no correlation left to be told.
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
from di4c_ext.models.token_blocks import AttentionHalf, MLPHalf, PackedAttention
from di4c_ext.models.token_config import LatentForm, TokenConfig, integers
from di4c_ext.models.unet_blocks import ZeroLinear, sinusoid, spread, wide

_OUTER_EPS = 1e-12  # of the layer norms outside the blocks


class TokenTransformer(nn.Module):
    """forward(x (R, D), classes (R,), latents (N, C) | None) -> logits (R, D, S), (N, D, S) with latents.

    x and classes are rows of the embedding; R is B or N, N = B L, the rows of a sample lie together. Modules stand in
    the order of the published state.
    """

    def __init__(self, config: TokenConfig) -> None:
        super().__init__()
        self.config = config
        width, dropout = config.hidden_size, config.dropout
        self.pos_emb = nn.Parameter(torch.empty(1, config.length + 1, width))
        self.bias = nn.Parameter(torch.empty(config.length + 1, config.num_embeddings))
        self.tok_emb = nn.Embedding(config.num_embeddings, width)
        self.first_layer = nn.Sequential(
            nn.LayerNorm(width, _OUTER_EPS),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width, _OUTER_EPS),
            nn.Dropout(dropout),
            nn.Linear(width, width),
        )
        blocks = [
            nn.ModuleList(
                [
                    AttentionHalf(width, config.num_heads, config.attention_dropout),
                    MLPHalf(width, config.mlp_size, dropout),
                ]
            )
            for _ in range(config.num_layers)
        ]
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.last_layer = nn.Sequential(
            nn.LayerNorm(width, _OUTER_EPS),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width, _OUTER_EPS),
        )
        if config.is_student:
            shown, inner = config.latent_dim * config.latent_embed_dim, config.latent_hidden_size
            self.latent_projection = nn.Sequential(nn.Linear(shown, inner), nn.GELU(), nn.Linear(inner, width))
            if config.latent_form == "added":
                self.latent_in = nn.ModuleList(ZeroLinear(width, width) for _ in blocks)

    def reset_parameters(self) -> None:
        """Of what is no layer's: small positions, no bias."""
        nn.init.trunc_normal_(self.pos_emb, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, classes: Tensor, latents: Tensor | None) -> Tensor:
        config = self.config
        e = self.tok_emb(torch.cat([x, classes[:, None]], 1)) + self.pos_emb
        e = self.first_layer(e)
        added: list[Tensor | None] = [None] * config.num_layers
        if latents is not None:
            shown = sinusoid(latents.to(wide(e.dtype)) * config.latent_scale, config.latent_embed_dim)
            latent = self.latent_projection(shown.flatten(1).to(self.tok_emb.weight.dtype))
            if config.latent_form == "token":
                # The first layer works on each token alone: only here must a sample's tokens be there L times.
                e = torch.cat([spread(e, len(latent)), self.first_layer(latent[:, None])], 1)
            else:
                told = functional.gelu(latent)
                masked = (x == config.mask_id).to(told.dtype).mean(-1) ** config.latent_gate
                gate = spread(masked, len(told))[:, None]
                added = [(gate * layer(told))[:, None] for layer in self.latent_in]
        blocks: Any = self.transformer["layers"]
        for (attention, mlp), more in zip(blocks, added, strict=True):
            e = mlp(attention(e), more)
        return self._head(self.last_layer(e[:, : config.length]))

    def _head(self, e: Tensor) -> Tensor:
        """The columns of codes and mask alone. Under autocast the bias makes float32 of them, as published."""
        length, states = self.config.length, self.config.num_states
        logits = functional.linear(e, self.tok_emb.weight[:states])
        bias = self.bias[:length, :states]
        return logits.add_(bias) if logits.dtype == bias.dtype else logits + bias


class TokenDenoiser(MixtureDenoiser):
    """denoiser(x_t, t=None, latents=None, labels=None, drop_label=None) -> logits of the S clean states.

    x_t (B, D) or (B, L, D) int64, codes 0..num_codes - 1 or mask_id; t is not used; labels (B,) int64 in
    0..num_classes - 1; drop_label None: every label is kept, (B,) bool: the images that are to have no class, True:
    none has one, and labels may be left out.
    Teacher: logits (..., D, S) of the shape of x_t; latents given to it are ignored.
    Student: latents (B, C) -> (B, D, S); latents (B, L, C) with x_t (B, D) or (B, L, D) -> (B, L, D, S).

    Ids and labels outside their range are refused where the tensors lie on a CPU; for a GPU, which would have to be
    waited for, ask `config.check_codes` and `config.check_labels` once where they come from.
    """

    config_class = TokenConfig
    config: TokenConfig
    latent_names = ("latent_projection.", "latent_in.")
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttentionHalf", "MLPHalf"]  # noqa: RUF012  (as transformers has it)

    def __init__(self, config: TokenConfig) -> None:
        super().__init__(config)
        self.net = TokenTransformer(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Each layer's own start, zero where an added latent enters, and embeddings of the spread asked for."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.embedding_std)
        elif isinstance(module, (nn.Linear, nn.LayerNorm, PackedAttention, TokenTransformer)):
            module.reset_parameters()  # what a module holds has come before it

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        latents: Tensor | None = None,
        labels: Tensor | None = None,
        drop_label: Tensor | bool | None = None,
    ) -> Tensor:
        config = self.config
        self._check(x_t)
        classes = self._classes(x_t, labels, drop_label)
        if config.is_student:
            latents = self.checked_latents(latents, x_t)
            lead = latents.shape[:-1]
            latents = latents.flatten(0, -2)
        else:
            latents, lead = None, x_t.shape[:-1]
        rows = math.prod(x_t.shape[:-1])
        logits: Tensor = self.net(x_t.reshape(rows, config.length).long(), spread(classes, rows), latents)
        return logits.view(*lead, config.length, config.num_states)

    def _check(self, x_t: Tensor) -> None:
        config = self.config
        if integers("x_t", x_t).ndim not in (2, 3) or x_t.shape[-1] != config.length:
            raise ValueError(
                f"TokenDenoiser: x_t must be (B, D) or (B, L, D) with D = {config.length}, a grid of "
                f"{' x '.join(map(str, config.grid))} tokens, got {tuple(x_t.shape)}"
            )
        if _may_look(x_t):
            config.check_codes(x_t)

    def _classes(self, x_t: Tensor, labels: Tensor | None, drop_label: Tensor | bool | None) -> Tensor:
        """(B,) rows of the embedding, those of the classes or that of no class."""
        config, size = self.config, x_t.shape[0]
        no_class = x_t.new_full((size,), config.num_embeddings - 1, dtype=torch.int64)
        if labels is None and (drop_label is True or not config.num_classes):
            return no_class
        if labels is None:
            raise ValueError(
                f"TokenDenoiser: labels (B,) are wanted, one of {config.num_classes} classes for each image; "
                "for images of no class say drop_label=True"
            )
        if not config.num_classes:
            raise ValueError("TokenDenoiser: labels given, but config.num_classes is 0; leave them out")
        if integers("labels", labels).shape != (size,):
            raise ValueError(f"TokenDenoiser: labels must be (B,) with B = {size}, got {tuple(labels.shape)}")
        if _may_look(labels):
            config.check_labels(labels)
        classes = labels.long() + (config.mask_id + 1)
        if drop_label is None or isinstance(drop_label, bool):
            return no_class if drop_label else classes
        if not isinstance(drop_label, Tensor) or drop_label.dtype != torch.bool or drop_label.shape != (size,):
            got = f"{drop_label.dtype} {tuple(drop_label.shape)}" if isinstance(drop_label, Tensor) else drop_label
            raise ValueError(f"TokenDenoiser: drop_label must be None, a bool or bools (B,) with B = {size}, got {got}")
        return torch.where(drop_label, no_class, classes)

    @classmethod
    def from_teacher(
        cls,
        teacher: str | os.PathLike[str] | TokenDenoiser,
        *,
        latent_form: LatentForm = "token",
        latent_dim: int = 1,
        latent_law: LatentLaw = "uniform",
        latent_scale: float = 1000.0,
        latent_gate: float = 1.0,
        dropout: float | None = None,
    ) -> TokenDenoiser:
        """A student with the teacher's weights, which are copied. The latent's settings are explained in `TokenConfig`.

        latent_form 'added' equals the teacher bit for bit whatever the latents; 'token', the published form, does not.
        dropout: None keeps the teacher's, a number is for its attention too.
        """
        settings: dict[str, Any] = {
            "latent_form": latent_form,
            "latent_dim": latent_dim,
            "latent_law": latent_law,
            "latent_scale": latent_scale,
            "latent_gate": latent_gate,
        }
        less = {} if dropout is None else {"dropout": dropout, "attention_dropout": dropout}
        return cls.student_of(teacher, settings | less)


def _may_look(ids: Tensor) -> bool:
    """Whether the values of `ids` can be looked at without making anyone wait."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()
