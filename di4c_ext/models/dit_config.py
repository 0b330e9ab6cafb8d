"""Settings of the diffusion transformer of language; the defaults are those of the published small model."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedConfig

from di4c_ext.models import config_checks
from di4c_ext.models.latent import LatentLaw
from di4c_ext.process.schedules import SCHEDULES

LatentForm = Literal["token", "added", "chain"]

_COUNTS = (
    *("hidden_size", "num_layers", "num_heads", "cond_dim", "mlp_ratio", "length"),
    *("latent_dim", "latent_embed_dim", "latent_hidden_size", "latent_states"),
)

# The published sizes; what is not named is alike in all three.
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "medium": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "large": {"hidden_size": 1536, "num_layers": 24, "num_heads": 16},
}


class DiTConfig(PreTrainedConfig):
    """Settings of a `DiTDenoiser`.

    vocab_size          tokens and the mask, rows of the embedding and of the head
    mask_id             the id that a masked position has, None for the last one, vocab_size - 1, as published
    length              D, the longest sequence; shorter ones are taken too
    hidden_size         H, width of the residual stream
    num_layers          blocks of attention and MLP
    num_heads           heads of the attention; H / num_heads must be even
    cond_dim            width of the vector from which every layer's shifts, scales and gates are made
    mlp_ratio           width inside an MLP, in multiples of H
    dropout             after attention and MLP, inside their gates, in training
    time_conditioning   False, as published: the noise level shown to the network is always 0
    schedule            masking schedule it was trained for; by it t becomes a noise level, where that is shown
    is_student          True: a mixture student, which wants latents
    latent_form         how the latent enters: 'token', one more token in the sequence, as published; 'added', before
                        each block through projections that start at zero, so that a new student equals its teacher;
                        'chain', by hidden states that follow one another from position to position (`models.chain`)
    latent_dim          C, numbers in a latent; 1 for 'token', one a position for 'chain', None for either
    latent_law          law of each of them, 'uniform' on [0, 1] or 'normal'; for `draw_latents(..., law=)`
    latent_scale        what a latent is multiplied by before it is shown as sines and cosines
    latent_embed_dim    sines and cosines by which each number of a latent is shown, even
    latent_hidden_size  width inside the latent's own MLP
    latent_gate         'added': power of the share of masked positions that scales what the latent adds; 0: in full
    latent_rotary       'added': what the latent adds is turned by each position's angles, as queries and keys are.
                        Positions are told to this network by nothing else, so where all are masked they are all alike,
                        and a latent that adds the same to each can only make them alike in another way
    latent_states       'chain': R, hidden states of a position
    hidden_logits       give `ops.Hidden`, hidden states and head, in place of logits: the losses and the samplers then
                        make logits of masked positions alone, a few at a time
    """

    model_type = "di4c_dit"

    def __init__(
        self,
        vocab_size: int = 50258,
        mask_id: int | None = None,
        length: int = 1024,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        cond_dim: int = 128,
        mlp_ratio: int = 4,
        dropout: float = 0.1,
        time_conditioning: bool = False,
        schedule: str = "log_linear",
        is_student: bool = False,
        latent_form: LatentForm = "token",
        latent_dim: int | None = None,
        latent_law: LatentLaw = "uniform",
        latent_scale: float = 1000.0,
        latent_embed_dim: int = 128,
        latent_hidden_size: int = 512,
        latent_gate: float = 1.0,
        latent_rotary: bool = False,
        latent_states: int = 32,
        hidden_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.mask_id = vocab_size - 1 if mask_id is None else mask_id
        self.length = length
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.cond_dim = cond_dim
        self.mlp_ratio = mlp_ratio
        self.dropout = dropout
        self.time_conditioning = time_conditioning
        self.schedule = schedule
        self.is_student = is_student
        self.latent_form = latent_form
        self.latent_dim = (length if latent_form == "chain" else 1) if latent_dim is None else latent_dim
        self.latent_law = latent_law
        self.latent_scale = latent_scale
        self.latent_embed_dim = latent_embed_dim
        self.latent_hidden_size = latent_hidden_size
        self.latent_gate = latent_gate
        self.latent_rotary = latent_rotary
        self.latent_states = latent_states
        self.hidden_logits = hidden_logits
        super().__init__(**kwargs)
        self._check()

    @property
    def num_states(self) -> int:
        """S, columns of the logits: the tokens. A mask that is not the last id keeps a column, which says never."""
        return self.vocab_size - (self.mask_id == self.vocab_size - 1)

    @property
    def has_chain(self) -> bool:
        """Whether this is of a student whose latent is a chain: `DiTDenoiser.log_prob` knows its likelihoods."""
        return self.is_student and self.latent_form == "chain"

    def check_ids(self, ids: Tensor, name: str = "x_t") -> None:
        """Raises ValueError naming the first id that is neither a token nor the mask. Waits for a GPU's answer."""
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.numel():
            raise ValueError(
                f"DiTDenoiser: {name} must hold tokens 0..{self.num_states - 1} and the mask {self.mask_id}, "
                f"got {outside[0].item()}; use the tokenizer that the network was trained with"
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises ValueError where a tokenizer's ids, or the mask's among them, are not those of the network."""
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is not None and mask != self.mask_id:
            raise ValueError(f"tokenizer: its mask is id {mask}, that of the network is {self.mask_id}")
        if len(tokenizer) != self.num_states and (mask is None or len(tokenizer) != self.vocab_size):
            raise ValueError(
                f"tokenizer: it has {len(tokenizer)} ids, the network has {self.num_states} tokens and the mask "
                f"{self.mask_id}; use the tokenizer that the network was trained with"
            )

    def _check(self) -> None:
        config_checks.integers(self, _COUNTS)
        config_checks.integers(self, ["vocab_size"], 2)
        if not isinstance(self.mask_id, int) or not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(
                f"DiTConfig: mask_id must lie in 0..{self.vocab_size - 1}, the ids of vocab_size, got {self.mask_id!r}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                "DiTConfig: hidden_size must be a multiple of 2 * num_heads (rotations turn pairs), "
                f"got {self.hidden_size} and {self.num_heads}"
            )
        config_checks.even_embedding(self, "latent_embed_dim")
        config_checks.shares(self, "dropout")
        config_checks.positive(self, "latent_scale")
        config_checks.not_negative(self, "latent_gate")
        config_checks.one_of(self, "schedule", SCHEDULES)
        config_checks.one_of(self, "latent_form", get_args(LatentForm))
        config_checks.one_of(self, "latent_law", get_args(LatentLaw))
        if self.time_conditioning and self.schedule != "log_linear":
            raise ValueError(
                "DiTConfig: time_conditioning shows the noise level -log alpha(t), which of the schedules only "
                f"log_linear keeps finite, got {self.schedule!r}"
            )
        config_checks.token_latent(self)
        if self.latent_rotary and self.latent_form != "added":
            raise ValueError(
                "DiTConfig: latent_rotary turns what a latent adds to positions, got latent_form "
                f"{self.latent_form!r}; set latent_form 'added', or leave it out"
            )
        if self.latent_form == "chain" and (self.latent_dim != self.length or self.latent_law != "uniform"):
            raise ValueError(
                "DiTConfig: a chain's latent is one uniform number to each position, got latent_dim "
                f"{self.latent_dim} for length {self.length} and latent_law {self.latent_law!r}; leave both out"
            )
