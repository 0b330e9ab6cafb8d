"""Any masked language model as a denoiser, and as a mixture student.

    teacher = Di4CForMaskedLM.as_teacher("answerdotai/ModernBERT-base")
    student = Di4CForMaskedLM.from_teacher("answerdotai/ModernBERT-base")
    student(x_t, t, latents=latents)                        logits (B, L, D, S), a denoiser as the losses want it
    student(input_ids=..., latents=..., labels=...).loss    as transformers calls it

The latent goes through a small network and a projection that starts at zero, and what comes out is added to the
embedding of every token: a new student equals its teacher bit for bit, whatever the latents. It is added where the
model embeds its tokens, by a hook, so that the model itself is called with the ids: what it makes of them beside the
embeddings (RoBERTa's positions) stays as it was. Time is no input (arXiv 2406.03736).
"""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from di4c_ext.denoiser import Denoiser
from di4c_ext.models import adapters, backbone, remote_code
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.models.latent import LatentEmbedding
from di4c_ext.models.masked_lm_config import Di4CMaskedLMConfig
from di4c_ext.models.teacher import describe, weight_of
from di4c_ext.ops import Hidden, Logits


class LatentProjection(nn.Linear):
    """A linear map that starts at zero."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Di4CForMaskedLM(MixtureDenoiser):
    """denoiser(x_t, t, latents=None, attention_mask=None) -> logits of the S tokens.

    x_t (B, D) int64, t anything (not used), attention_mask (B, D), 0 where a sequence is filled up, or None.
    Teacher: x_t (..., D) -> (..., D, S); latents given to it are ignored.
    Student: latents (B, C) -> (B, D, S); latents (B, L, C) with x_t (B, D) or (B, L, D) -> (B, L, D, S).
    Classes that are never drawn (the mask, padding) have so low a logit that their probability is exactly 0. With
    config.hidden_logits the logits are an `ops.Hidden`, not computed. as_teacher=True asks a student with adapters for
    what its teacher says.

    Called with input_ids it gives a MaskedLMOutput; labels (B, D) as there, -100 where nothing is asked.
    """

    config_class = Di4CMaskedLMConfig
    config: Di4CMaskedLMConfig
    main_input_name = "input_ids"
    latent_names = ("latent_embedding.", "latent_in.")
    supports_gradient_checkpointing = True
    # The backbone decides; without these, building the wrapper would turn its attention to the eager kind.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Di4CMaskedLMConfig, model: nn.Module | None = None) -> None:
        """`model`: the masked language model itself, which is then not built from the config."""
        inner = copy.deepcopy(config.backbone_config)  # before the line below writes into it
        super().__init__(config)
        self.teacher = config.teacher
        if model is None:
            made = getattr(transformers, self.teacher.auto_class)
            model = made.from_config(inner, dtype=torch.get_default_dtype(), trust_remote_code=False)
        else:
            backbone.mark_as_filled(model)
        self.backbone: Any = model
        if config.is_student:
            weight = weight_of(self.backbone, self.teacher.embeddings)
            self.latent_embedding = LatentEmbedding(config.latent_dim, config.latent_hidden_size).to(weight)
            self.latent_in = LatentProjection(config.latent_hidden_size, weight.shape[1]).to(weight)
        self.post_init()
        if config.lora is not None:
            adapters.inject(self.backbone, config.lora)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Each layer's own start on the latent's path; a backbone starts its parts itself."""
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_submodule(self.teacher.embeddings)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.teacher.head is None else self.backbone.get_submodule(self.teacher.head)

    def forward(
        self,
        x_t: Tensor | None = None,
        t: Tensor | None = None,
        latents: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        as_teacher: bool = False,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        tokens = x_t if input_ids is None else input_ids
        if tokens is None or (x_t is not None and input_ids is not None):
            raise ValueError("Di4CForMaskedLM: give x_t for logits or input_ids for a MaskedLMOutput, one of the two")
        if labels is not None and input_ids is None:
            raise ValueError("Di4CForMaskedLM: labels go with input_ids; x_t is for the losses of di4c_ext.loss")
        self._check(tokens, attention_mask)
        if as_teacher and self.config.lora is None:
            raise ValueError(
                "Di4CForMaskedLM: as_teacher needs adapters (lora=); without them training moves the teacher's own "
                "weights, so keep a teacher beside the student: Di4CForMaskedLM.as_teacher"
            )
        if as_teacher:
            with adapters.adapters_off(self.backbone):
                logits = self._logits(tokens, attention_mask, None)
        else:
            latents = self.checked_latents(latents, tokens) if self.config.is_student else None
            logits = self._logits(tokens, attention_mask, latents)
        if input_ids is None:
            return logits
        whole: Any = logits.logits() if isinstance(logits, Hidden) else logits
        return MaskedLMOutput(loss=None if labels is None else _cross_entropy(whole, labels), logits=whole)

    def teacher_denoiser(self) -> Denoiser:
        """The teacher of a student with adapters: the same weights, adapters off, no latent. Nothing is copied."""
        return partial(self, as_teacher=True)

    def _check(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        name = type(self).__name__
        if tokens.ndim not in (2, 3) or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name}: tokens must be integers (B, D) or (B, L, D), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        self.teacher.check_length(name, tokens.shape[-1])
        wanted = (tokens.shape[0], tokens.shape[-1])
        if attention_mask is not None and attention_mask.shape != wanted:
            raise ValueError(
                f"{name}: attention_mask must be (B, D) = {wanted}, one for all latents of a sample, "
                f"got {tuple(attention_mask.shape)}"
            )

    def _logits(self, tokens: Tensor, attention_mask: Tensor | None, latents: Tensor | None) -> Logits:
        """Logits of tokens (B, [L,] D), each row a sequence of its own to the backbone."""
        lead = tokens.shape[:-1] if latents is None else latents.shape[:-1]
        length = tokens.shape[-1]
        added = None
        if latents is not None:
            dtype = self.latent_in.weight.dtype
            added = self.latent_in(self.latent_embedding(latents.to(dtype))).flatten(0, -2)[:, None]
        many = len(lead) - (tokens.ndim - 1)  # 1 where the latents of a sample share its tokens
        rows = (tokens[:, None] if many else tokens).expand(*lead, length).reshape(-1, length)
        if attention_mask is not None:
            per_row = attention_mask[:, None] if len(lead) == 2 else attention_mask
            attention_mask = per_row.expand(*lead, length).reshape(-1, length)
        out = backbone.call(self.backbone, self.teacher, rows, attention_mask, added, hidden=self.config.hidden_logits)
        if isinstance(out, Hidden):
            return out._replace(states=out.states.unflatten(0, lead))
        return out.unflatten(0, lead)

    @classmethod
    def as_teacher(
        cls,
        teacher: str | os.PathLike[str] | nn.Module,
        *,
        tokenizer: Any = None,
        schedule: str = "linear",
        hidden_logits: bool | None = None,
        new_head: bool = False,
        trust_remote_code: bool = False,
        load: dict[str, Any] | None = None,
        **description: Any,
    ) -> Di4CForMaskedLM:
        """A masked language model as a teacher; a model that is given is used as it is, not copied.

        Args:
            teacher: a model, or the folder or hub name of one. A folder may also be a saved Di4CForMaskedLM.
            tokenizer: the model's, or its folder; default: the one in the model's folder, where there is one.
            schedule: masking schedule it is used with.
            hidden_logits: give `ops.Hidden` in place of logits; None: as a saved teacher does, else logits.
            new_head: allow a head that starts at random, of an encoder saved without one, to be trained first.
            trust_remote_code: consent to run the model's own code.
            load: what transformers' from_pretrained is to be told: dtype, revision and so on.
            description: fields of TeacherDescription known better than the model tells: mask_id, shift, special_ids.

        Raises:
            ValueError: for a student, missing weights, code that nobody agreed to, and contradictions between model
                and tokenizer.
        """
        if isinstance(teacher, cls) or (not isinstance(teacher, nn.Module) and _is_ours(teacher)):
            if description or tokenizer is not None:
                raise ValueError("as_teacher: this teacher has its description; give none, and no tokenizer")
            told = {"is_student": False, "trust_remote_code": trust_remote_code}
            found: Any = teacher if isinstance(teacher, cls) else cls.from_pretrained(teacher, **told, **(load or {}))
            if found.config.is_student:
                raise ValueError("as_teacher: got a student; give the teacher it was made from")
            if hidden_logits in (None, found.config.hidden_logits):
                return found
            model: Any = found.backbone
            config = copy.deepcopy(found.config)
            config.hidden_logits = hidden_logits
            return cls._around(model, config)
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = backbone.tokenizer_of(tokenizer, trust_remote_code)
        if isinstance(teacher, nn.Module):
            model = teacher
            if not isinstance(getattr(model, "config", None), PreTrainedConfig):
                raise TypeError(f"as_teacher: teacher must be a model of transformers, got {type(teacher).__name__}")
            description = backbone.kind_of("as_teacher", model.config) | description
        else:
            model, opened = backbone.open_model(teacher, new_head, trust_remote_code, load or {})
            description = opened | description
            tokenizer = backbone.tokenizer_of(teacher, trust_remote_code) if tokenizer is None else tokenizer
        told_of = describe(model, tokenizer, **description)
        config = cls.config_class(
            backbone_config=model.config, description=told_of, schedule=schedule, hidden_logits=bool(hidden_logits)
        )
        remote_code.without_origin(config.backbone_config)
        return cls._around(model, config)

    @classmethod
    def _around(cls, model: nn.Module, config: Di4CMaskedLMConfig) -> Di4CForMaskedLM:
        """The teacher of this model, in the mode the model is in."""
        made = cls(config, model)
        made.training = model.training
        if config.hidden_logits:
            backbone.check_hidden(model, made.teacher)
        return made

    @classmethod
    def from_teacher(
        cls,
        teacher: str | os.PathLike[str] | nn.Module,
        *,
        latent_dim: int = 16,
        latent_hidden_size: int = 256,
        latent_law: str = "normal",
        lora: bool | dict[str, Any] | Any = False,
        hidden_logits: bool | None = None,
        **teacher_options: Any,
    ) -> Di4CForMaskedLM:
        """A student with the teacher's weights, equal to it bit for bit whatever the latents; the teacher is copied.

        Args:
            teacher, hidden_logits: as in `as_teacher`, or what that gave.
            latent_dim, latent_hidden_size, latent_law: see Di4CMaskedLMConfig.
            lora: True, a mapping or a peft.LoraConfig: train adapters and the latent's path alone. `teacher_denoiser`
                is then the teacher, in the same memory.
            teacher_options: what else `as_teacher` takes.
        """
        source = cls.as_teacher(teacher, hidden_logits=hidden_logits, **teacher_options)
        model = copy.deepcopy(source.backbone) if isinstance(teacher, nn.Module) else source.backbone
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(parameter.is_floating_point())
        config = cls.config_class(
            backbone_config=source.config.backbone_config,
            description=source.config.description,
            schedule=source.config.schedule,
            is_student=True,
            latent_dim=latent_dim,
            latent_hidden_size=latent_hidden_size,
            latent_law=latent_law,
            lora=adapters.settings(lora),
            hidden_logits=source.config.hidden_logits,
        )
        return cls(config, model).train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `MixtureDenoiser.from_pretrained`; trust_remote_code=True is the consent to run the model's own code."""
        consent = bool(kwargs.pop("trust_remote_code", False))
        told, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path)
        description = told.get("description") or {}
        if description.get("remote_code"):
            if not consent:
                raise remote_code.refuse(str(pretrained_model_name_or_path), "model")
            remote_code.admit(pretrained_model_name_or_path, told["backbone_config"], description["auto_class"])
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.lora is not None:
            adapters.train_only_adapters(model.backbone)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; a backbone's own code is copied beside the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.teacher.remote_code:
            remote_code.save_code(self.backbone, save_directory)


def _is_ours(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder or hub name holds a Di4CForMaskedLM; one that cannot be read is not."""
    try:
        told, _ = PreTrainedConfig.get_config_dict(folder)
    except OSError:
        return False
    return told.get("model_type") == Di4CMaskedLMConfig.model_type


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100, and over the latents where there are several."""
    if logits.ndim == 4:
        labels = labels[:, None].expand(logits.shape[:-1]) if labels.ndim == 2 else labels
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


AutoConfig.register(Di4CMaskedLMConfig.model_type, Di4CMaskedLMConfig, exist_ok=True)
AutoModelForMaskedLM.register(Di4CMaskedLMConfig, Di4CForMaskedLM, exist_ok=True)
