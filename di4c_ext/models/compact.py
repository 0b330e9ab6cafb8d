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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from di4c_ext.models.compact_config import CompactConfig
from di4c_ext.models.latent import LatentEmbedding

_LATENT_KEYS = ("latent_embedding.", "latent_in.")


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


class CompactDenoiser(PreTrainedModel):
    """denoiser(x_t, t, latents=None, augmentation=None) -> logits of the S clean states.

    x_t (B, D) int64, t (B,) or anything (not used), augmentation (B, A) or None for an image left as it is.
    Teacher: x_t (..., D) -> (..., D, S); latents given to it are ignored.
    Student: latents (B, C) -> (B, D, S); latents (B, L, C) with x_t (B, D) or (B, L, D) -> (B, L, D, S).
    """

    config_class = CompactConfig
    base_model_prefix = ""
    main_input_name = "x_t"
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
        zero: list[nn.Module] = []
        if isinstance(module, Block):
            zero = [module.contract]
        elif isinstance(module, CompactDenoiser):
            zero = [*module.latent_in] if module.config.is_student else []
            zero += [] if module.augmentation_in is None else [module.augmentation_in]
        for layer in zero:
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
            latents = self._checked(latents, x_t)
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

    def latent_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the latent's path, which a student's teacher does not have."""
        return ((name, value) for name, value in self.named_parameters() if name.startswith(_LATENT_KEYS))

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

    def _checked(self, latents: Tensor | None, x_t: Tensor) -> Tensor:
        if latents is None:
            raise ValueError(
                "CompactDenoiser: a student needs latents (B, C) or (B, L, C); "
                "draw them with models.latent.draw_latents(keys, num_latents, config.latent_dim)"
            )
        size, dim = x_t.shape[0], self.config.latent_dim
        fits = latents.ndim in (2, 3) and latents.shape[0] == size and latents.shape[-1] == dim
        if not fits or latents.ndim < x_t.ndim or (x_t.ndim == 3 and latents.shape[1] != x_t.shape[1]):
            raise ValueError(
                f"CompactDenoiser: latents must be (B, C) or (B, L, C) with B = {size} and C = {dim} "
                f"for x_t {tuple(x_t.shape)}, got {tuple(latents.shape)}"
            )
        return latents

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint whose tensors are not exactly the model's is a ValueError naming them.

        is_student=True or False says what is expected: a teacher opened as a student, or the other way about, is
        refused.
        """
        expected = kwargs.pop("is_student", None)
        want_info = kwargs.pop("output_loading_info", False)
        if "config" not in kwargs:
            kwargs["config"] = CompactConfig.from_pretrained(pretrained_model_name_or_path)
        kind = kwargs["config"].is_student
        if expected is not None and bool(expected) != kind:
            raise ValueError(
                f"{pretrained_model_name_or_path}: holds a {_kind(kind)}, a {_kind(bool(expected))} is wanted"
                + ("; make one with CompactDenoiser.from_teacher" if expected else "; name the teacher's folder")
            )
        loaded: Any
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        except RuntimeError as error:  # shapes that differ, as transformers reports them
            raise ValueError(f"{pretrained_model_name_or_path}: does not fit its config: {error}") from error
        model, info = loaded
        _refuse_keys(str(pretrained_model_name_or_path), kind, info["missing_keys"], info["unexpected_keys"])
        return (model, info) if want_info else model

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
        source = teacher if isinstance(teacher, CompactDenoiser) else cls.from_pretrained(teacher, is_student=False)
        if source.config.is_student:
            raise ValueError("from_teacher: got a student; give the teacher it was made from, or train it on as it is")
        settings = source.config.to_dict()
        settings |= {"is_student": True, "latent_dim": latent_dim}
        settings |= {"latent_hidden_size": latent_hidden_size, "latent_gate": latent_gate}
        if dropout is not None:
            settings["dropout"] = dropout
        student = cls(CompactConfig.from_dict(settings))
        nn.Module.to(student, source.head.weight)  # device and dtype
        result = student.load_state_dict(source.state_dict(), strict=False)
        missing = [key for key in result.missing_keys if not key.startswith(_LATENT_KEYS)]
        _refuse_keys("from_teacher", True, missing, result.unexpected_keys)
        return student


def _kind(is_student: bool) -> str:
    return "student" if is_student else "teacher"


def _refuse_keys(where: str, is_student: bool, missing: Any, unexpected: Any) -> None:
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not missing and not unexpected:
        return
    hint = ""
    if any(key.startswith(_LATENT_KEYS) for key in missing):
        hint = "; these are the weights of a teacher, make a student with CompactDenoiser.from_teacher"
    elif any(key.startswith(_LATENT_KEYS) for key in unexpected):
        hint = "; these are the weights of a student, config.is_student must be true"
    raise ValueError(
        f"{where}: the weights are not those of this {_kind(is_student)}: "
        f"missing {missing or 'none'}, unexpected {unexpected or 'none'}{hint}"
    )


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
