"""Denoisers, and the latent that makes a mixture of one."""

from di4c_ext.models.compact import CompactDenoiser
from di4c_ext.models.compact_config import CompactConfig
from di4c_ext.models.latent import LatentEmbedding, draw_latents

__all__ = ["CompactConfig", "CompactDenoiser", "LatentEmbedding", "draw_latents"]
