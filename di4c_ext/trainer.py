"""Training on `transformers.Trainer`: the teacher by its likelihood bound or, over levels, by the cross-entropy of the
clean image; the student by the Di4C objective.

    trainer = DistillTrainer(student, teacher=teacher, process=process, args=DistillConfig(...), train_dataset=images)
    trainer.train()

Distribution, precision, accumulation, schedules and trackers are the Trainer's. Added here: noise that is a function
of (seed, example, step) alone, so that a resumed run is the run that never stopped; a moving average that lives in
the checkpoints; checkpoints that are whole or absent; the loss by parts; a stop with the last good state when the
loss is no longer finite.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from di4c_ext import callbacks, checkpoints, data, random
from di4c_ext.config import TIME_MIN, DistillConfig, KeyedConfig
from di4c_ext.denoiser import Denoiser, Latents
from di4c_ext.loss import Di4CObjective, LossParts
from di4c_ext.metrics.denoising import denoising_cross_entropy
from di4c_ext.metrics.likelihood import likelihood_bound
from di4c_ext.process import AbsorbingProcess, Process

Parts = dict[str, Tensor]
_LABELS = 16  # sub-key of a step's key for the classes that are not told; the loss and the alterations have those below
Augment = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]  # (x_0, keys) -> (x_0, conditions)


class NonFiniteLossError(ValueError):
    """The loss or its gradient is NaN or infinite; the weights before that step have been saved."""


class KeyedTrainer(Trainer):
    """What teacher and student training share. A subclass gives `loss_parts`."""

    model: PreTrainedModel  # never None here
    _staging: Path | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        process: Process | None,
        args: KeyedConfig,
        train_dataset: data.ImageTokens,
        phase: str,
        metrics_file: Path | None = None,
        callbacks_: list[TrainerCallback] | None = None,
    ) -> None:
        if len(train_dataset) < args.train_batch_size * args.world_size:
            raise ValueError(
                f"--per_device_train_batch_size {args.per_device_train_batch_size}: there are only "
                f"{len(train_dataset)} training images; give a smaller batch"
            )
        if args.channels_last:
            as_channels_last(model)
        self.process: Any = process
        self.label_dropout = args.label_dropout
        self._sums: Parts = {}
        self._num_summed = 0
        self._unchecked: list[Parts] = []
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data.collate,
            callbacks=callbacks_,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.ema = callbacks.EmaCallback(self.model, args.ema_decay) if args.ema_decay else None
        self.interrupt = callbacks.InterruptCallback()
        self.progress = callbacks.ProgressCallback(phase)
        metrics = callbacks.MetricsCallback(metrics_file or self.folder / "metrics.jsonl", phase)
        for callback in (self.ema, metrics, self.progress, self.interrupt, _CheckFinite(self)):
            if callback is not None:
                self.add_callback(callback)

    def loss_parts(self, model: nn.Module, x_0: Tensor, keys: Tensor, labels: Tensor | None = None) -> Parts:
        """'loss' with its graph and whatever else is worth logging, scalars; keys are this step's.

        labels (B,): the classes of images of codes, which the network is to be told.
        """
        raise NotImplementedError

    def conditions(self, labels: Tensor | None, keys: Tensor) -> dict[str, Tensor]:
        """What the denoisers are told of the samples: their classes, of a share of them none."""
        if labels is None:
            return {}
        drop = random.uniform(random.fold_in(keys, _LABELS), 1)[:, 0] < self.label_dropout
        return {"labels": labels, "drop_label": drop}

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As Trainer.train, with a checkpoint's folder to go on from; one of the last step is loaded as it is."""
        if resume_from_checkpoint is not None and self._is_finished(Path(resume_from_checkpoint)):
            return None
        self.interrupt.watch()
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        except NonFiniteLossError as error:
            self._save_checkpoint(self.model, None)
            step = self.state.global_step
            raise NonFiniteLossError(
                f"{error}; the last good state is in {self.folder / f'checkpoint-{step}'}. Start again "
                f"with a smaller --learning_rate (now {self.args.learning_rate:g}), or --resume with a smaller "
                f"--max_grad_norm (now {self.args.max_grad_norm:g})"
            ) from error
        finally:
            self.progress.close()
            self.interrupt.release()

    def _is_finished(self, checkpoint: Path) -> bool:
        """Loads a checkpoint of the last step; the Trainer itself would take one step more."""
        state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
        if not 0 < self.args.max_steps <= state.global_step:
            return False
        self.state = state
        checkpoints.load_state(self.model, checkpoint / checkpoints.WEIGHTS)
        if self.ema is not None:
            self.ema.load(checkpoint)
        return True

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(str(self.args.output_dir))

    def best_model(self) -> PreTrainedModel:
        """The moving average where there is one, else the model."""
        return self.model if self.ema is None else self.ema.model

    # One step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # The example's own key, random.keys(seed, ...)[example], whatever the number of examples.
        keys = random.fold_in(random.fold_in(self.args.seed, inputs["example"]), self.state.global_step)
        told = {"labels": inputs["label"]} if "label" in inputs else {}
        parts = self.loss_parts(model, inputs["x_0"], keys, **told)
        self._unchecked.append(parts)
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._num_summed += 1
        return (parts["loss"], parts) if return_outputs else parts["loss"]

    def require_finite(self) -> None:
        """Raises NonFiniteLossError before the optimizer sees a bad gradient; one wait for the device a step."""
        losses = torch.stack([parts["loss"].detach() for parts in self._unchecked])
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else losses
        if bool(torch.isfinite(losses.sum()) & torch.isfinite(norms.sum())):
            self._unchecked.clear()
            return
        step = self.state.global_step + 1
        bad = sorted({name for parts in self._unchecked for name in _non_finite(parts)})
        what = f"loss part {', '.join(bad)} is" if bad else "the loss is finite, but its gradient is"
        raise NonFiniteLossError(f"{what} not finite at step {step} of {self.state.max_steps}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._num_summed:
            names = [name for name in self._sums if name != "loss"]
            if names:
                means = torch.stack([self._sums[name].float() for name in names]) / self._num_summed
                logs.update(zip(names, means.tolist(), strict=True))
            self._sums, self._num_summed = {}, 0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counting walks all modules at every step, for a number nothing here uses

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint elsewhere, then renames it: a full disk leaves the previous one whole."""
        target = self.folder / f"checkpoint-{self.state.global_step}"
        self._staging = target.parent / f".saving-{target.name}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.sync_folder(self._staging / target.name)
                checkpoints.replace_folder(self._staging / target.name, target)
        except OSError as error:
            raise _saving_failed(error, target) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self.args.should_save:
            checkpoints.keep_newest(target.parent, self.args.save_total_limit or None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.ema is not None and self.args.should_save:
            self.ema.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ema is not None and checkpoint is not None:
            self.ema.load(Path(checkpoint))


class PretrainTrainer(KeyedTrainer):
    """Trains a product denoiser: by the likelihood bound of masked diffusion (`metrics.likelihood`), or under another
    process by the cross-entropy of x_0 given x_t (`metrics.denoising`), t uniform in [time_min, 1].
    """

    def __init__(
        self, model: PreTrainedModel, *, augment: Augment | None = None, time_min: float = TIME_MIN, **kwargs: Any
    ) -> None:
        super().__init__(model, phase=kwargs.pop("phase", "teacher"), **kwargs)
        self.augment = augment
        self.time_min = time_min

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
        mean = nats.mean()
        return {"loss": mean / x_0.shape[1], "nats_per_image": mean}


class DistillTrainer(KeyedTrainer):
    """Trains a mixture student by `Di4CObjective`. The teacher is held here, not by the module: it is never saved."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        teacher: Denoiser,
        latents: Latents,
        args: DistillConfig,
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
        self.augment = augment
        # A guided teacher steps from logits of its own for no class.
        guided = getattr(self.process, "guidance", 0.0)
        self.unconditional = partial(teacher, drop_label=True) if guided else None
        self.objective: Di4CObjective = args.objective()
        self.target = self.ema.model if self.ema is not None and args.consistency_target == "ema" else None
        self.base_learning_rate = args.base_learning_rate

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
        return self.objective(
            model,
            self.teacher,
            self.process,
            x_0,
            keys,
            latents=self.latents,
            target=self.target,
            conditions=conditions,
            unconditional=self.unconditional,
        )


def as_channels_last(model: nn.Module) -> None:
    """Lays the weights of convolutions out so that the maps come channel by channel at each pixel; others stay."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which torch's stubs leave out


class _CheckFinite(TrainerCallback):
    def __init__(self, trainer: KeyedTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.require_finite()


def _non_finite(parts: Parts) -> list[str]:
    if isinstance(parts, LossParts):
        return parts.non_finite()
    return [name for name, value in parts.items() if not bool(torch.isfinite(value).all())]


def _saving_failed(error: OSError, target: Path) -> OSError:
    why = "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    previous = checkpoints.latest(target.parent)
    kept = f"{previous} is whole" if previous else "no earlier checkpoint is there"
    remedy = "free some space" if error.errno == errno.ENOSPC else "mend that"
    message = f"could not save {target}: {why}; {kept}; {remedy} and go on with --resume"
    return OSError(error.errno or errno.EIO, message)
