"""Denoisers, and the latent that makes a mixture of one."""

from di4c_ext.models.compact import CompactDenoiser
from di4c_ext.models.compact_config import CompactConfig
from di4c_ext.models.latent import LatentEmbedding, LatentLaw, draw_latents
from di4c_ext.models.unet import UNetDenoiser
from di4c_ext.models.unet_config import UNetConfig

__all__ = [
    "CompactConfig",
    "CompactDenoiser",
    "LatentEmbedding",
    "LatentLaw",
    "UNetConfig",
    "UNetDenoiser",
    "draw_latents",
]
