"""Settings of the VQ autoencoder; the defaults are those of the published ImageNet 256 system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from di4c_ext.models import config_checks

_COUNTS = ("num_codes", "embed_dim", "num_channels", "base_channels", "num_res_blocks", "z_channels")


class VQConfig(PreTrainedConfig):
    """Settings of a `VQModel`.

    num_codes         codes in the code-book
    embed_dim         numbers in a code
    image_size        height and width, or one number for both; each must halve len(ch_mult) - 1 times
    num_channels      channels of an image
    base_channels     feature maps at full size
    ch_mult           feature maps of each scale, in multiples of base_channels; every scale halves the size
    num_res_blocks    residual blocks of each scale of the encoder; the decoder has one more
    attention_scales  scales with attention after every residual block, 0 the full size; the middle always has it
    z_channels        feature maps between encoder and code-book
    dropout           inside each residual block, in training

    Images of 28 x 28 give 7 x 7 codes with three scales, 14 x 14 with two.
    """

    model_type = "di4c_vq"

    def __init__(
        self,
        num_codes: int = 1024,
        embed_dim: int = 256,
        image_size: int | Sequence[int] = 256,
        num_channels: int = 3,
        base_channels: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_scales: Sequence[int] = (4,),
        z_channels: int = 256,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.num_codes = num_codes
        self.embed_dim = embed_dim
        self.image_size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        self.num_channels = num_channels
        self.base_channels = base_channels
        self.ch_mult = list(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.attention_scales = list(attention_scales)
        self.z_channels = z_channels
        self.dropout = dropout
        super().__init__(**kwargs)
        self._check()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        height, width = self.image_size
        return self.num_channels, height, width

    @property
    def grid(self) -> list[int]:
        """Height and width in codes."""
        return [size >> (len(self.ch_mult) - 1) for size in self.image_size]

    @property
    def length(self) -> int:
        """D, codes per image, row by row."""
        height, width = self.grid
        return height * width

    def _check(self) -> None:
        if len(self.image_size) != 2:
            raise ValueError(f"VQConfig: image_size must be one number, or height and width, got {self.image_size}")
        if not self.ch_mult:
            raise ValueError("VQConfig: ch_mult must name at least one scale, got none")
        config_checks.integers(self, _COUNTS)
        for name in ("image_size", "ch_mult"):
            for number in getattr(self, name):
                config_checks.integer(self, name, number)
        halvings = len(self.ch_mult) - 1
        for size in self.image_size:
            if size % (1 << halvings):
                raise ValueError(
                    f"VQConfig: image_size {self.image_size} cannot be halved {halvings} times without a rest; "
                    f"give ch_mult {self.ch_mult} fewer scales, or images of a multiple of {1 << halvings}"
                )
        for scale in self.attention_scales:
            if scale not in range(len(self.ch_mult)):
                raise ValueError(
                    f"VQConfig: attention_scales must lie in 0..{halvings}, the scales of ch_mult, got {scale!r}"
                )
        for channels in {self.base_channels * n for n in self.ch_mult}:
            groups = min(channels // 4, 32)
            if groups < 1 or channels % groups:
                raise ValueError(
                    f"VQConfig: {channels} feature maps do not fall into {max(groups, 1)} equal groups; choose "
                    "base_channels a multiple of 4, from 128 on of 32"
                )
        config_checks.shares(self, "dropout")
