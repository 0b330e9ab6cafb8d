"""The published denoiser of masked diffusion language models (MDLM and SDTT teachers, the student of Di4C).

A transformer over all positions at once, rotary positions, shifts, scales and gates from the noise level (adaLN), the
head not tied to the embedding. Names, shapes and order of the weights are the published ones, so their files load as
they are (`dit_checkpoint.py`, `python -m di4c_ext.convert`). Attention is torch's own; flash-attn is not needed.

The published parameterisation gives the mask probability 0 and copies what is clean. Here the mask has no logit at all,
and what is clean is the process's and the losses' business (`AbsorbingProcess.carry_over`, positions of weight 0): a
logit of a clean position says nothing, and with `positions` or `return_hidden` is not even computed.

A student takes its latent as one more token, as published, which from the start is something to attend to: a new
student differs from its teacher. Or added before each block through layers that start at zero, which makes it equal to
its teacher bit for bit. Or as the path of a hidden Markov chain over the positions (`models.chain`), which is read from
the last layer's states: then the network runs once for any number of latents, and the likelihood of a step is exact.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from di4c_ext.models.base import MixtureDenoiser, role
from di4c_ext.models.chain import Chain
from di4c_ext.models.dit_blocks import Block, Head, LayerNorm, NoiseEmbedding, Rotary, TokenEmbedding, turned
from di4c_ext.models.dit_config import DiTConfig, LatentForm
from di4c_ext.models.latent import LatentLaw
from di4c_ext.models.unet_blocks import ZeroLinear, sinusoid, spread, wide
from di4c_ext.ops import Hidden
from di4c_ext.process.schedules import schedule

_NEVER = -1e6  # logit of a mask that keeps its column, as published: its probability is exactly 0, without an infinity


class DiT(nn.Module):
    """forward(ids (R, D), sigma (R',), latents (N, C) | None, positions (N, P) | None) -> states (N, D or P, H).

    R and R' are N, a divisor of it whose rows are each repeated, or R' = 1. Modules stand in the order of the
    published state.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.hidden_size, config.latent_hidden_size
        self.vocab_embed = TokenEmbedding(config.vocab_size, width)
        self.sigma_map = NoiseEmbedding(config.cond_dim)
        self.rotary_emb = Rotary(width // config.num_heads)
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, config.cond_dim, config.mlp_ratio, config.dropout)
            for _ in range(config.num_layers)
        )
        self.output_layer = Head(width, config.vocab_size, config.cond_dim)
        if config.is_student and config.latent_form == "chain":
            self.latent_chain = Chain(width, config.latent_states, inner)
        elif config.is_student:
            layers: list[nn.Module] = [nn.Linear(config.latent_dim * config.latent_embed_dim, inner), nn.GELU()]
            if config.latent_form == "token":
                layers.append(nn.Linear(inner, width))
            else:
                self.latent_in = nn.ModuleList(ZeroLinear(inner, width) for _ in range(config.num_layers))
            self.latent_projection = nn.Sequential(*layers)

    def forward(self, ids: Tensor, sigma: Tensor, latents: Tensor | None, positions: Tensor | None) -> Tensor:
        config, length = self.config, ids.shape[1]
        if latents is not None and config.latent_form == "chain":
            h = self(ids, sigma, None, None)
            z = self.latent_chain.path(h, latents[:, :length].unflatten(0, (len(ids), -1)))
            if positions is not None:
                at = positions.unflatten(0, (len(ids), -1))
                z = z.gather(2, at)
                h = h.gather(1, at[:, 0, :, None].expand(-1, -1, h.shape[-1]))
            chosen: Tensor = self.latent_chain.chosen(h, z)
            return chosen.flatten(0, 1)
        rows = len(ids) if latents is None else len(latents)
        # One row where time is no input: the adaLN layers then say the same to every row, and say it once.
        condition = self.sigma_map(sigma)
        if len(condition) > 1:
            condition = spread(condition, rows)
        x = self.vocab_embed(ids)
        x = spread(x.to(wide(x.dtype)), rows)
        added: list[Tensor] = []
        is_token = False
        if latents is not None:
            told = self._told(latents)
            is_token = config.latent_form == "token"
            if is_token:
                x = torch.cat([x, told[:, None].to(x.dtype)], 1)
            else:
                gate = (ids == config.mask_id).to(x.dtype).mean(1) ** config.latent_gate
                gate = spread(gate[:, None, None], rows)
                added = [gate * layer(told)[:, None] for layer in self.latent_in]
        cos, sin = self.rotary_emb(length, is_token, x.device)
        if added and config.latent_rotary:
            places = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
            added = [turned(value.unflatten(-1, (config.num_heads, -1)), *places).flatten(2) for value in added]
        for i, block in enumerate(self.blocks):
            x = block(x + added[i] if added else x, condition, cos, sin)
        x = x[:, :length] if positions is None else x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
        states: Tensor = self.output_layer(x, condition)
        return states

    def _told(self, latents: Tensor) -> Tensor:
        config, dtype = self.config, next(self.latent_projection.parameters()).dtype
        shown = sinusoid(latents.to(wide(dtype)) * config.latent_scale, config.latent_embed_dim)
        told: Tensor = self.latent_projection(shown.flatten(1).to(dtype))
        return told


class DiTDenoiser(MixtureDenoiser):
    """denoiser(x_t, t, latents=None) -> logits of the S clean tokens.

    x_t (B, D) or (B, L, D) int64, D up to config.length; t (B,), 1 noise to 0 data, which the published models do not
    look at (config.time_conditioning). positions (B, P) int64: places at which alone logits are wanted. return_hidden:
    an `ops.Hidden`, states and head, in place of the logits; None: as config.hidden_logits says. Bind either with
    functools.partial.

    Teacher: x_t (..., D) -> (..., D, S), or P in place of D; latents given to it are ignored.
    Student: latents (B, C) -> (B, D, S); latents (B, L, C) with x_t (B, D) or (B, L, D) -> (B, L, D, S). Student whose
    latent is a chain, given x_s in place of latents: see `log_prob`.

    S leaves out the mask where it is the last id, as published; elsewhere its logit is -1e6. Under autocast logits and
    hidden states come in its precision, as published. `activation_checkpointing_enable()` keeps the inputs of the
    blocks alone for the backward pass and computes the blocks again.
    """

    config_class = DiTConfig
    config: DiTConfig
    latent_names = ("latent_projection.", "latent_in.", "latent_chain.")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (as transformers has it)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.backbone = DiT(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Each layer's own start, which is zero in adaLN, in the head, and where an added latent enters."""
        if isinstance(module, (nn.Linear, LayerNorm, TokenEmbedding)):
            module.reset_parameters()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | None = None,
        latents: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        return_hidden: bool | None = None,
        x_s: Tensor | None = None,
    ) -> Tensor | Hidden:
        config = self.config
        self._check(x_t, positions)
        if x_s is not None:
            return self.log_prob(x_t, t, x_s)
        if config.is_student:
            latents = self.checked_latents(latents, x_t)
            lead = latents.shape[:-1]
            latents = latents.flatten(0, -2)
        else:
            latents, lead = None, x_t.shape[:-1]
        if positions is not None:
            positions = spread(positions, lead.numel())
        states = self.backbone(x_t.flatten(0, -2), self._sigma(x_t, t), latents, positions)
        hidden = self._hidden(states.unflatten(0, lead))
        return hidden if (config.hidden_logits if return_hidden is None else return_hidden) else hidden.logits()

    def log_prob(self, x_t: Tensor, t: Tensor | None, x_s: Tensor) -> Tensor:
        """log p of the tokens that x_s (B, D) knows and x_t (B, D) does not, exactly: (B,) nats, of a chain's student.

        The mean over latents is taken by the chain's forward recursion. To know how many tokens these are, the host
        waits for the device. Raises ValueError for a student of another form, whose mixture has no such sum.
        """
        config = self.config
        if not config.has_chain or x_s.shape != x_t.shape or x_t.ndim != 2:
            raise ValueError(
                "DiTDenoiser: x_s is for a student with latent_form 'chain', beside x_t of its shape (B, D); got "
                f"{config.latent_form!r} of a {role(config.is_student)}, x_t {tuple(x_t.shape)}, x_s {tuple(x_s.shape)}"
            )
        h = self.backbone(x_t, self._sigma(x_t, t), None, None)
        place: Any = ((x_t == config.mask_id) & (x_s != config.mask_id)).nonzero(as_tuple=True)
        found: Tensor = self.backbone.latent_chain.log_prob(h, x_s[place], place, self._hidden(h))
        return found

    def log_marginals(self, x_t: Tensor, t: Tensor | None = None) -> Tensor:
        """log p^d(. | x_t) of each position apart, exactly: (B, D, S) of x_t (B, D), of a chain's student.

        What a product teacher says in its place: held against `log_prob` it tells what the chain knows of the positions
        together. Raises ValueError for a student of another form.
        """
        self._check(x_t, None)
        if not self.config.has_chain or x_t.ndim != 2:
            raise ValueError(
                f"DiTDenoiser: log_marginals is of a student with latent_form 'chain' and x_t (B, D), got "
                f"{self.config.latent_form!r} of a {role(self.config.is_student)} and x_t {tuple(x_t.shape)}"
            )
        h = self.backbone(x_t, self._sigma(x_t, t), None, None)
        found: Tensor = self.backbone.latent_chain.log_marginals(h, self._hidden(h))
        return found

    def _sigma(self, x_t: Tensor, t: Tensor | None) -> Tensor:
        """The noise level -log alpha(t) shown to the network, (B,) float64, or 0, (1,), where it is to see none."""
        if not self.config.time_conditioning:
            return torch.zeros(1, device=x_t.device)
        if not isinstance(t, Tensor) or t.shape != x_t.shape[:1]:
            got = tuple(t.shape) if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"DiTDenoiser: t must be a tensor (B,) with B = {x_t.shape[0]}, got {got}")
        lost, _ = schedule("DiTConfig", self.config.schedule)
        return -torch.log1p(-lost(t.double()))

    def _hidden(self, states: Tensor) -> Hidden:
        """States and the rows of the head that are tokens', alike in dtype."""
        config, head, kind = self.config, self.backbone.output_layer.linear, states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        weight, bias = (x[: config.num_states].to(dtype) for x in (head.weight, head.bias))
        if config.mask_id < config.num_states:
            is_mask = torch.arange(config.num_states, device=bias.device) == config.mask_id
            bias = torch.where(is_mask, max(_NEVER, torch.finfo(dtype).min / 2), bias)
        return Hidden(states.to(dtype), weight, bias)

    def _check(self, x_t: Tensor, positions: Tensor | None) -> None:
        if x_t.ndim not in (2, 3) or not 1 <= x_t.shape[-1] <= self.config.length:
            raise ValueError(
                f"DiTDenoiser: x_t must be (B, D) or (B, L, D) with D from 1 to {self.config.length}, the model's "
                f"length, got {tuple(x_t.shape)}"
            )
        if x_t.dtype != torch.int64:
            raise TypeError(f"DiTDenoiser: x_t must be int64, got {x_t.dtype}; convert with .long()")
        if positions is not None and (positions.ndim != 2 or len(positions) != len(x_t)):
            raise ValueError(
                f"DiTDenoiser: positions must be (B, P) int64 with B = {len(x_t)}, got {tuple(positions.shape)}"
            )
        if x_t.device.type == "cpu" and not torch.compiler.is_compiling():
            self.config.check_ids(x_t)  # elsewhere the device would be waited for

    @classmethod
    def from_teacher(
        cls,
        teacher: str | os.PathLike[str] | DiTDenoiser,
        *,
        latent_form: LatentForm = "token",
        latent_dim: int | None = None,
        latent_law: LatentLaw = "uniform",
        latent_scale: float = 1000.0,
        latent_hidden_size: int = 512,
        latent_gate: float = 1.0,
        latent_rotary: bool = False,
        latent_states: int = 32,
        dropout: float | None = None,
    ) -> DiTDenoiser:
        """A student with the teacher's weights; the teacher is copied.

        latent_form 'added' makes it equal to the teacher bit for bit, whatever the latents; 'token', as published, and
        'chain' do not. dropout: None keeps the teacher's. The latent's other settings are explained in `DiTConfig`.
        """
        told: dict[str, Any] = {
            "latent_form": latent_form,
            "latent_dim": latent_dim,
            "latent_law": latent_law,
            "latent_scale": latent_scale,
            "latent_hidden_size": latent_hidden_size,
            "latent_gate": latent_gate,
            "latent_rotary": latent_rotary,
            "latent_states": latent_states,
        }
        return cls.student_of(teacher, told | ({} if dropout is None else {"dropout": dropout}))
