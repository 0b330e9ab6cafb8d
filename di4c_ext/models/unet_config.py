"""Settings of the pixel U-Net; the defaults are those of the published CIFAR-10 system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from transformers import PreTrainedConfig

from di4c_ext.models import config_checks
from di4c_ext.models.latent import LatentLaw
from di4c_ext.names import nearest
from di4c_ext.process import LEVEL_PROCESSES, process_from

_COUNTS = ("num_states", "num_channels", "base_channels", "num_res_blocks", "time_embed_dim", "latent_dim")


class UNetConfig(PreTrainedConfig):
    """Settings of a `UNetDenoiser`.

    num_states        S, levels of a channel, at least 2
    num_channels      channels of an image
    image_size        height and width, or one number for both; D = num_channels * height * width, in that order
    base_channels     feature maps at full size
    ch_mult           feature maps of each scale, in multiples of base_channels; every scale halves the size
    num_res_blocks    residual blocks of each scale on the way down, one more on the way up
    attention_scales  scales with attention after every residual block, 0 the full size; the middle always has it
    dropout           inside each residual block, in training
    time_embed_dim    sines and cosines by which a number is shown, even
    time_scale        what t is multiplied by before
    process           the diffusion it was trained for: "name", gaussian or uniform, and constants of that process where
                      they are not the default ones, those of the published system; the network does not depend on it
    is_student        True: a mixture student, which wants latents
    latent_dim        C, numbers in a latent (students)
    latent_law        law of each of them, 'uniform' on [0, 1] or 'normal'; for `draw_latents(..., law=)`
    latent_scale      what a latent is multiplied by before it is shown as sines and cosines
    """

    model_type = "di4c_unet"

    def __init__(
        self,
        num_states: int = 256,
        num_channels: int = 3,
        image_size: int | Sequence[int] = 32,
        base_channels: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_scales: Sequence[int] = (1,),
        dropout: float = 0.1,
        time_embed_dim: int = 128,
        time_scale: float = 1000.0,
        process: Mapping[str, Any] | None = None,
        is_student: bool = False,
        latent_dim: int = 1,
        latent_law: LatentLaw = "uniform",
        latent_scale: float = 1000.0,
        **kwargs: Any,
    ) -> None:
        self.num_states = num_states
        self.num_channels = num_channels
        self.image_size = image_size if isinstance(image_size, int) else list(image_size)
        self.base_channels = base_channels
        self.ch_mult = list(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.attention_scales = list(attention_scales)
        self.dropout = dropout
        self.time_embed_dim = time_embed_dim
        self.time_scale = time_scale
        self.process = {"name": "gaussian"} if process is None else dict(process)
        self.is_student = is_student
        self.latent_dim = latent_dim
        self.latent_law = latent_law
        self.latent_scale = latent_scale
        super().__init__(**kwargs)
        self._check()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width): the order in which the D positions lie."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.num_channels, height, width

    @property
    def length(self) -> int:
        """D, positions per image."""
        channels, height, width = self.shape
        return channels * height * width

    def _check(self) -> None:
        size = self.image_size if isinstance(self.image_size, list) else [self.image_size] * 2
        if len(size) != 2:
            raise ValueError(f"UNetConfig: image_size must be one number, or height and width, got {size}")
        if not self.ch_mult:
            raise ValueError("UNetConfig: ch_mult must name at least one scale, got none")
        config_checks.integers(self, _COUNTS)
        for name, numbers in (("image_size", size), ("ch_mult", self.ch_mult)):
            for number in numbers:
                config_checks.integer(self, name, number)
        if self.num_states < 2:
            raise ValueError("UNetConfig: num_states must be at least 2, got 1")
        config_checks.even_embedding(self, "time_embed_dim")
        if min(size) >> (len(self.ch_mult) - 1) < 1:
            raise ValueError(
                f"UNetConfig: image_size {self.image_size} cannot be halved {len(self.ch_mult) - 1} times; "
                f"give ch_mult {self.ch_mult} fewer scales"
            )
        for scale in self.attention_scales:
            if scale not in range(len(self.ch_mult)):
                raise ValueError(
                    f"UNetConfig: attention_scales must lie in 0..{len(self.ch_mult) - 1}, the scales of ch_mult, "
                    f"got {scale!r}"
                )
        config_checks.shares(self, "dropout")
        config_checks.positive(self, "time_scale", "latent_scale")
        kind = self.process.get("name")
        if kind not in LEVEL_PROCESSES:
            raise ValueError(
                f'UNetConfig: process must be one of {", ".join(LEVEL_PROCESSES)} by its "name", got {kind!r}'
                f"{nearest(str(kind), LEVEL_PROCESSES)}"
            )
        process_from(self.process, self.num_states, "UNetConfig: process")
        if self.latent_law not in get_args(LatentLaw):
            raise ValueError(f"UNetConfig: latent_law must be one of {get_args(LatentLaw)}, got {self.latent_law!r}")
