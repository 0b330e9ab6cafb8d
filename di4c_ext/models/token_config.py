"""Settings of the image-token transformer; the defaults are those of the published ImageNet 256 system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from di4c_ext.models import config_checks
from di4c_ext.models.latent import LatentLaw
from di4c_ext.process.schedules import SCHEDULES

LatentForm = Literal["token", "added"]

_COUNTS = (
    *("num_codes", "hidden_size", "num_layers", "num_heads", "mlp_size"),
    *("latent_dim", "latent_embed_dim", "latent_hidden_size"),
)


class TokenConfig(PreTrainedConfig):
    """Settings of a `TokenDenoiser`.

    num_codes           codes of the VQ model, 0..num_codes - 1; the mask is the id after them
    num_classes         classes of images, 0: the network takes no labels
    grid                height and width in tokens, or one number for both; D = height * width, row by row
    hidden_size         H, width of the residual stream
    num_layers          blocks of attention and MLP
    num_heads           heads of the attention, which divide hidden_size
    mlp_size            width inside an MLP
    dropout             before and after the first layer, in each MLP and before the head, in training
    attention_dropout   of attention probabilities, in training; on a CPU, 0 is what keeps them from being made
    embedding_std       spread of new embeddings, which are the head's weights too; 1 as published, about
                        hidden_size ** -0.5 for a network trained from scratch
    mask_logit          True, as published: the mask has a logit like a code, S = num_codes + 1; False: S = num_codes
    schedule            masking schedule it was trained for; the network itself does not depend on it
    codebook            `VQModel.fingerprint` of the code-book whose codes it was trained on, None where not known
    is_student          True: a mixture student, which wants latents
    latent_form         how the latent enters: 'token', one more token in the sequence, as published; 'added', inside
                        each block through projections that start at zero, so that a new student equals its teacher
    latent_dim          C, numbers in a latent; 1 for 'token'
    latent_law          law of each of them, 'uniform' on [0, 1] or 'normal'; for `draw_latents(..., law=)`
    latent_scale        what a latent is multiplied by before it is shown as sines and cosines
    latent_embed_dim    sines and cosines by which each number of a latent is shown, even
    latent_hidden_size  width inside the latent's own MLP
    latent_gate         'added': power of the share of masked positions that scales what the latent adds; 0: in full
    """

    model_type = "di4c_tokens"

    def __init__(
        self,
        num_codes: int = 1024,
        num_classes: int = 1000,
        grid: int | Sequence[int] = 16,
        hidden_size: int = 768,
        num_layers: int = 24,
        num_heads: int = 16,
        mlp_size: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        embedding_std: float = 1.0,
        mask_logit: bool = True,
        schedule: str = "arccos",
        codebook: str | None = None,
        is_student: bool = False,
        latent_form: LatentForm = "token",
        latent_dim: int = 1,
        latent_law: LatentLaw = "uniform",
        latent_scale: float = 1000.0,
        latent_embed_dim: int = 128,
        latent_hidden_size: int = 512,
        latent_gate: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.num_codes = num_codes
        self.num_classes = num_classes
        self.grid = [grid, grid] if isinstance(grid, int) else list(grid)
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.mlp_size = mlp_size
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.embedding_std = embedding_std
        self.mask_logit = mask_logit
        self.schedule = schedule
        self.codebook = codebook
        self.is_student = is_student
        self.latent_form = latent_form
        self.latent_dim = latent_dim
        self.latent_law = latent_law
        self.latent_scale = latent_scale
        self.latent_embed_dim = latent_embed_dim
        self.latent_hidden_size = latent_hidden_size
        self.latent_gate = latent_gate
        super().__init__(**kwargs)
        self._check()

    @property
    def length(self) -> int:
        """D, positions of an image."""
        height, width = self.grid
        return height * width

    @property
    def mask_id(self) -> int:
        """The id that a masked position has."""
        return self.num_codes

    @property
    def num_states(self) -> int:
        """S, columns of the logits."""
        return self.num_codes + bool(self.mask_logit)

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding: codes, mask, classes, and the class of an image that is to have none."""
        return self.num_codes + self.num_classes + 2

    def check_codes(self, codes: Tensor, name: str = "x_t") -> None:
        """Raises ValueError naming the first id that is neither a code nor the mask. Waits for a GPU's answer."""
        _check_ids(codes, self.mask_id, name, f"codes 0..{self.num_codes - 1} or the mask {self.mask_id}")

    def check_labels(self, labels: Tensor) -> None:
        """Raises ValueError naming the first label that is no class. Waits for a GPU's answer."""
        _check_ids(labels, self.num_classes - 1, "labels", f"classes 0..{self.num_classes - 1}")

    def _check(self) -> None:
        if len(self.grid) != 2:
            raise ValueError(f"TokenConfig: grid must be one number, or height and width, got {self.grid}")
        config_checks.integers(self, _COUNTS)
        for size in self.grid:
            config_checks.integer(self, "grid", size)
        config_checks.integers(self, ["num_classes"], 0)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"TokenConfig: num_heads must divide hidden_size {self.hidden_size}, got {self.num_heads!r}"
            )
        config_checks.even_embedding(self, "latent_embed_dim")
        config_checks.shares(self, "dropout", "attention_dropout")
        config_checks.positive(self, "embedding_std", "latent_scale")
        config_checks.not_negative(self, "latent_gate")
        config_checks.one_of(self, "schedule", SCHEDULES)
        config_checks.one_of(self, "latent_form", get_args(LatentForm))
        config_checks.one_of(self, "latent_law", get_args(LatentLaw))
        config_checks.token_latent(self)


def _check_ids(ids: Tensor, highest: int, name: str, wanted: str) -> None:
    outside = ids[(ids < 0) | (ids > highest)]
    if outside.numel():
        raise ValueError(f"TokenDenoiser: {name} must be {wanted}, got {outside[0].item()}")


def integers(name: str, ids: object) -> Tensor:
    """`ids` where it is a tensor of integers; raises TypeError in the network's name where it is not."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"TokenDenoiser: {name} must be a tensor of integers, got {ids!r}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"TokenDenoiser: {name} must be integers, got {ids.dtype}")
    return ids
