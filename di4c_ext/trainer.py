"""Training: the teacher by its likelihood bound or, over levels, by the cross-entropy of the clean image; the student
by the Di4C objective.

    trainer = DistillTrainer(student, teacher=teacher, process=process, args=DistillConfig(...), train_dataset=images)
    trainer.train()

What both share is in `keyed_trainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from di4c_ext.config import TIME_MIN, DistillConfig
from di4c_ext.denoiser import Denoiser, Latents
from di4c_ext.keyed_trainer import KeyedTrainer, NonFiniteLossError, Parts, as_channels_last
from di4c_ext.latent_group import latent_group_of
from di4c_ext.loss import LossParts
from di4c_ext.metrics.denoising import denoising_cross_entropy
from di4c_ext.metrics.likelihood import likelihood_bound
from di4c_ext.non_finite import Measured
from di4c_ext.process import AbsorbingProcess

__all__ = ["Augment", "DistillTrainer", "KeyedTrainer", "NonFiniteLossError", "Parts", "PretrainTrainer"]

Augment = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]  # (x_0, keys) -> (x_0, conditions)


class PretrainTrainer(KeyedTrainer):
    """Trains a product denoiser: by the likelihood bound of masked diffusion (`metrics.likelihood`), or under another
    process by the cross-entropy of x_0 given x_t (`metrics.denoising`), t uniform in [time_min, 1].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        augment: Augment | None = None,
        time_min: float = TIME_MIN,
        unit: str = "image",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, phase=kwargs.pop("phase", "teacher"), **kwargs)
        self.augment = augment
        self.time_min = time_min
        self.unit = unit  # what an example is called

    def loss_parts(self, model: nn.Module, x_0: Tensor, keys: Tensor, labels: Tensor | None = None) -> Parts:
        conditions = self.conditions(labels, keys)
        if self.augment is not None:
            x_0, conditions = self.augment(x_0, keys)
        if isinstance(self.process, AbsorbingProcess):
            nats = likelihood_bound(model, self.process, x_0, keys, conditions=conditions)
        else:
            nats = denoising_cross_entropy(
                model, self.process, x_0, keys, time_min=self.time_min, conditions=conditions
            )
        mean, name = nats.mean(), f"nats_per_{self.unit}"
        return Measured({"loss": mean / x_0.shape[1], name: mean}, {name: nats})


class DistillTrainer(KeyedTrainer):
    """Trains a student by `Di4CObjective`, or the objective given. The teacher is held here, not by the module: it is
    never saved. latents: None for a student that takes none; teacher_latents: of a teacher that is a mixture itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        teacher: Denoiser,
        latents: Latents | None,
        args: DistillConfig,
        teacher_latents: Latents | None = None,
        objective: Callable[..., LossParts] | None = None,
        augment: Augment | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, phase=kwargs.pop("phase", "student"), args=args, **kwargs)
        if isinstance(teacher, nn.Module):
            teacher.to(args.device).eval().requires_grad_(False)
            if args.channels_last:
                as_channels_last(teacher)
        self.teacher = teacher
        self.latents = latents
        self.teacher_latents = teacher_latents
        self.augment = augment
        # A guided teacher steps from logits of its own for no class.
        guided = getattr(self.process, "guidance", 0.0)
        self.unconditional = partial(self.called(teacher, "teacher"), drop_label=True) if guided else None
        self.objective: Callable[..., LossParts] = objective or args.objective()
        self.target = self.ema.model if self.ema is not None and args.consistency_target == "ema" else None
        self.base_learning_rate = args.base_learning_rate
        self.group = latent_group_of(args.latent_processes)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as the Trainer makes it; with base_learning_rate the latent's path and the copied weights part ways."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.base_learning_rate is not None:
            latent = {id(parameter) for _, parameter in self.model.latent_parameters()}  # type: ignore[operator]
            for group in list(optimizer.param_groups):
                copied = [parameter for parameter in group["params"] if id(parameter) not in latent]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in latent]
                optimizer.add_param_group({**group, "params": copied, "lr": self.base_learning_rate})
        return optimizer

    def loss_parts(self, model: nn.Module, x_0: Tensor, keys: Tensor, labels: Tensor | None = None) -> Parts:
        conditions = self.conditions(labels, keys)
        if self.augment is not None:
            x_0, conditions = self.augment(x_0, keys)
        shared = {} if self.group is None else {"group": self.group}
        return self.objective(
            model,
            self.called(self.teacher, "teacher"),
            self.process,
            x_0,
            keys,
            latents=self.latents,
            target=None if self.target is None else self.called(self.target, "student"),
            conditions=conditions,
            unconditional=self.unconditional,
            teacher_latents=self.teacher_latents,
            **shared,
        )
