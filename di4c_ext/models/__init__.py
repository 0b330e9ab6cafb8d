"""Denoisers, and the latent that makes a mixture of one."""

from di4c_ext.models.compact import CompactDenoiser
from di4c_ext.models.compact_config import CompactConfig
from di4c_ext.models.dit import DiTDenoiser
from di4c_ext.models.dit_config import DiTConfig
from di4c_ext.models.latent import LatentEmbedding, LatentLaw, draw_latents
from di4c_ext.models.masked_lm import Di4CForMaskedLM
from di4c_ext.models.masked_lm_config import Di4CMaskedLMConfig
from di4c_ext.models.teacher import TeacherDescription
from di4c_ext.models.token_config import TokenConfig
from di4c_ext.models.token_transformer import TokenDenoiser
from di4c_ext.models.unet import UNetDenoiser
from di4c_ext.models.unet_config import UNetConfig
from di4c_ext.models.vqgan import VQModel
from di4c_ext.models.vqgan_config import VQConfig

__all__ = [
    "CompactConfig",
    "CompactDenoiser",
    "Di4CForMaskedLM",
    "Di4CMaskedLMConfig",
    "DiTConfig",
    "DiTDenoiser",
    "LatentEmbedding",
    "LatentLaw",
    "TeacherDescription",
    "TokenConfig",
    "TokenDenoiser",
    "UNetConfig",
    "UNetDenoiser",
    "VQConfig",
    "VQModel",
    "draw_latents",
]
