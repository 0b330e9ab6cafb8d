"""Settings of the compact denoiser."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from di4c_ext.models import config_checks


class CompactConfig(PreTrainedConfig):
    """Settings of a `CompactDenoiser`.

    num_states         S, the clean states of a position
    length             D, positions per sample
    mask_id            the state of a masked position; None: S, one above the clean states
    ordinal            True where states are levels in order (grey, for one), False where they are names
    hidden_size        width of the residual stream
    num_blocks         residual blocks
    dropout            on each block's output, in training
    augmentation_dim   numbers that say how an image was altered (`di4c_ext.augment`); 0: the network takes none
    schedule           masking schedule it was trained for; the network itself does not depend on it
    is_student         True: a mixture student, which wants latents
    latent_dim         C, numbers in a latent (students)
    latent_hidden_size width of the latent's own features (students)
    latent_gate        power of the share of masked positions that scales what the latent adds; 0: always in full
    """

    model_type = "di4c_compact"

    def __init__(
        self,
        num_states: int = 17,
        length: int = 64,
        mask_id: int | None = None,
        ordinal: bool = True,
        hidden_size: int = 512,
        num_blocks: int = 3,
        dropout: float = 0.0,
        augmentation_dim: int = 0,
        schedule: str = "linear",
        is_student: bool = False,
        latent_dim: int = 16,
        latent_hidden_size: int = 256,
        latent_gate: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.num_states = num_states
        self.length = length
        self.mask_id = num_states if mask_id is None else mask_id
        self.ordinal = ordinal
        self.hidden_size = hidden_size
        self.num_blocks = num_blocks
        self.dropout = dropout
        self.augmentation_dim = augmentation_dim
        self.schedule = schedule
        self.is_student = is_student
        self.latent_dim = latent_dim
        self.latent_hidden_size = latent_hidden_size
        self.latent_gate = latent_gate
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        counts = ("num_states", "length", "hidden_size", "num_blocks", "latent_dim", "latent_hidden_size")
        config_checks.integers(self, counts)
        if not isinstance(self.augmentation_dim, int) or self.augmentation_dim < 0:
            raise ValueError(f"CompactConfig: augmentation_dim must be an integer >= 0, got {self.augmentation_dim!r}")
        if not isinstance(self.mask_id, int) or not 0 <= self.mask_id <= self.num_states:
            raise ValueError(
                f"CompactConfig: mask_id must lie in 0..num_states = {self.num_states} "
                f"(num_states itself: a state of its own), got {self.mask_id!r}"
            )
        config_checks.not_negative(self, "latent_gate")
        config_checks.shares(self, "dropout")

    @property
    def num_inputs(self) -> int:
        """States the network may be shown: the clean ones, and the mask where it is not among them."""
        return max(self.num_states, self.mask_id + 1)
