"""What every denoiser that is a teacher or a mixture student shares: opening it, making the student, its latents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self


class MixtureDenoiser(PreTrainedModel):
    """A `PreTrainedModel` whose config says whether it is a student (is_student, latent_dim)."""

    base_model_prefix = ""
    main_input_name = "x_t"
    config: Any
    config_class: Any
    latent_names: ClassVar[tuple[str, ...]] = ()  # parts of the names of what a student has and its teacher has not

    @classmethod
    def is_latent_name(cls, name: str) -> bool:
        """Whether a parameter of this name is on the latent's path, which only a student has."""
        return any(part in name for part in cls.latent_names)

    def latent_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the latent's path."""
        return ((name, value) for name, value in self.named_parameters() if self.is_latent_name(name))

    def checked_latents(self, latents: Tensor | None, x_t: Tensor) -> Tensor:
        """The latents (B, C) or (B, L, C) of a student; raises ValueError where they are none, or do not fit x_t."""
        name = type(self).__name__
        if latents is None:
            law = ", law=config.latent_law" if hasattr(self.config, "latent_law") else ""
            raise ValueError(
                f"{name}: a student needs latents (B, C) or (B, L, C); "
                f"draw them with models.latent.draw_latents(keys, num_latents, config.latent_dim{law})"
            )
        size, dim = x_t.shape[0], self.config.latent_dim
        fits = latents.ndim in (2, 3) and latents.shape[0] == size and latents.shape[-1] == dim
        if not fits or latents.ndim < x_t.ndim or (x_t.ndim == 3 and latents.shape[1] != x_t.shape[1]):
            raise ValueError(
                f"{name}: latents must be (B, C) or (B, L, C) with B = {size} and C = {dim} "
                f"for x_t {tuple(x_t.shape)}, got {tuple(latents.shape)}"
            )
        return latents

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint whose tensors are not exactly the model's is a ValueError naming them.

        is_student=True or False says what is expected: a teacher opened as a student, or the other way about, is
        refused.
        """
        expected = kwargs.pop("is_student", None)
        want_info = kwargs.pop("output_loading_info", False)
        if "config" not in kwargs:
            kwargs["config"] = cls.config_class.from_pretrained(pretrained_model_name_or_path)
        kind = kwargs["config"].is_student
        if expected is not None and bool(expected) != kind:
            raise ValueError(
                f"{pretrained_model_name_or_path}: holds a {role(kind)}, a {role(bool(expected))} is wanted"
                + (f"; make one with {cls.__name__}.from_teacher" if expected else "; name the teacher's folder")
            )
        loaded: Any
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # shapes that differ are refused here
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        refuse_shapes(str(pretrained_model_name_or_path), info["mismatched_keys"])
        cls.refuse_keys(str(pretrained_model_name_or_path), kind, info["missing_keys"], info["unexpected_keys"])
        return (model, info) if want_info else model

    @classmethod
    def student_of(cls, teacher: str | os.PathLike[str] | Self, settings: dict[str, Any]) -> Self:
        """A student of the teacher's config with `settings` on top, holding a copy of its weights on its device."""
        source: Any = teacher if isinstance(teacher, cls) else cls.from_pretrained(teacher, is_student=False)
        if source.config.is_student:
            raise ValueError("from_teacher: got a student; give the teacher it was made from, or train it on as it is")
        student: Any = cls(cls.config_class.from_dict(source.config.to_dict() | {"is_student": True} | settings))
        weights = list(source.parameters())
        student.to(weights[0])  # device and dtype
        maps = [weight for weight in weights if weight.ndim == 4 and not weight.is_contiguous()]
        if maps and maps[0].is_contiguous(memory_format=torch.channels_last):
            student.to(memory_format=torch.channels_last)
        result = student.load_state_dict(source.state_dict(), strict=False)
        missing = [key for key in result.missing_keys if not cls.is_latent_name(key)]
        cls.refuse_keys("from_teacher", True, missing, result.unexpected_keys)
        return cast(Self, student)

    @classmethod
    def refuse_keys(cls, where: str, is_student: bool, missing: Any, unexpected: Any) -> None:
        """Raises ValueError naming the weights that are missing or unexpected, and which kind of model has them."""
        missing, unexpected = sorted(missing), sorted(unexpected)
        if not missing and not unexpected:
            return
        hint = ""
        if any(cls.is_latent_name(key) for key in missing):
            hint = f"; these are the weights of a teacher, make a student with {cls.__name__}.from_teacher"
        elif any(cls.is_latent_name(key) for key in unexpected):
            hint = "; these are the weights of a student, config.is_student must be true"
        raise ValueError(
            f"{where}: the weights are not those of this {role(is_student)}: "
            f"missing {missing or 'none'}, unexpected {unexpected or 'none'}{hint}"
        )


def refuse_shapes(where: str, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raises ValueError naming the first weights of another shape, (name, its own, the model's), than config says."""
    faults = [f"{name} is {tuple(own)}, {tuple(wanted)} is wanted" for name, own, wanted in sorted(mismatched)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{where}: does not fit its config: {'; '.join(faults[:3])}{more}")


def role(is_student: bool) -> str:
    return "student" if is_student else "teacher"
