"""Settings of a masked language model used as a denoiser."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar, get_args

from transformers import AutoConfig, PreTrainedConfig

from di4c_ext.models import config_checks
from di4c_ext.models.latent import LatentLaw
from di4c_ext.models.teacher import TeacherDescription


class Di4CMaskedLMConfig(PreTrainedConfig):
    """Settings of a `Di4CForMaskedLM`.

    backbone_config     config of the masked language model itself
    description         fields of its `TeacherDescription`
    schedule            masking schedule it is trained for; the network itself does not depend on it
    is_student          True: a mixture student, which wants latents
    latent_dim          C, numbers in a latent (students)
    latent_hidden_size  width of the latent's own features (students)
    latent_law          law of each number of a latent: "normal" or "uniform" (students)
    lora                settings of peft's LoraConfig: only adapters and the latent's path are trained (students)
    hidden_logits       True: `ops.Hidden`, states and head, in place of logits, which are then never whole
    """

    model_type = "di4c_masked_lm"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        description: TeacherDescription | dict[str, Any] | None = None,
        schedule: str = "linear",
        is_student: bool = False,
        latent_dim: int = 16,
        latent_hidden_size: int = 256,
        latent_law: str = "normal",
        lora: dict[str, Any] | None = None,
        hidden_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        if backbone_config is None or description is None:
            raise ValueError(
                "Di4CMaskedLMConfig: backbone_config and description are missing; "
                "Di4CForMaskedLM.from_teacher makes them of a model"
            )
        if not isinstance(description, TeacherDescription):
            description = TeacherDescription(**description)
        self.backbone_config = _as_config(backbone_config)
        self.description = dataclasses.asdict(description) | {"special_ids": list(description.special_ids)}
        self.schedule = schedule
        self.is_student = is_student
        self.latent_dim = latent_dim
        self.latent_hidden_size = latent_hidden_size
        self.latent_law = latent_law
        self.lora = lora
        self.hidden_logits = hidden_logits
        super().__init__(**kwargs)
        config_checks.integers(self, ("latent_dim", "latent_hidden_size"))
        if latent_law not in get_args(LatentLaw):
            raise ValueError(f"Di4CMaskedLMConfig: latent_law must be one of {get_args(LatentLaw)}, got {latent_law!r}")
        if lora is not None and not is_student:
            raise ValueError("Di4CMaskedLMConfig: lora is of a student; a teacher is used as it is")
        if hidden_logits and description.head is None:
            raise ValueError(
                "Di4CMaskedLMConfig: hidden_logits needs the name of the linear map that ends the teacher's head; "
                "give it by head=, or leave hidden_logits out"
            )

    @property
    def teacher(self) -> TeacherDescription:
        """What is known of the masked language model."""
        return TeacherDescription(**self.description)

    @property
    def num_states(self) -> int:
        """S, classes of the logits."""
        return int(self.description["num_states"])

    @property
    def mask_id(self) -> int:
        """The state of a masked position."""
        return int(self.description["mask_id"])

    @property
    def length(self) -> int | None:
        """Longest sequence, None where there is no limit."""
        value: int | None = self.description["max_positions"]
        return value


def _as_config(value: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """A config of its own: building a model writes into the one it is given."""
    if isinstance(value, PreTrainedConfig):
        return copy.deepcopy(value)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**value)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"backbone_config: transformers knows no model_type {value.get('model_type')!r}; if the model is made of "
            "code of its own, read that code and open it with "
            "Di4CForMaskedLM.from_pretrained(folder, trust_remote_code=True)"
        ) from error
    return config
