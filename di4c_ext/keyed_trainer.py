"""Training on `transformers.Trainer`: what teacher and student have in common, whatever their loss.

Schedules, optimizers and trackers are the Trainer's. Here are noise that is a function of (seed, example, step) alone,
so that a resumed run is the run that never stopped, and 8 processes are 1; the loss within DDP or FSDP (`engine`); a
moving average that lives in the checkpoints; checkpoints that are whole or absent; the loss by parts, and where the
time goes; and what happens when the loss is not finite (`non_finite`).

Dropout alone draws from torch's generators: it is the same after a resume, and another one on each process.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from di4c_ext import batches, callbacks, checkpoints, data, engine, non_finite, processes, random
from di4c_ext.augment import MIRROR, one_of_two
from di4c_ext.config import KeyedConfig
from di4c_ext.running import Running
from di4c_ext.saving import SavingTrainer
from di4c_ext.stopwatch import SPANS, Called, Stopwatch, peak_memory

Parts = dict[str, Tensor]
_LABELS = 16  # sub-key of a step's key for the classes that are not told; the loss and the alterations have those below


class NonFiniteLossError(ValueError):
    """The loss or its gradient is NaN or infinite; the weights before that step have been saved."""


class KeyedTrainer(SavingTrainer):
    """What teacher and student training share. A subclass gives `loss_parts`."""

    model: PreTrainedModel  # never None here

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        process: Any,
        args: KeyedConfig,
        train_dataset: Any,
        phase: str,
        metrics_file: Path | None = None,
        callbacks_: list[TrainerCallback] | None = None,
    ) -> None:
        self.share = args.share()
        if not batches.is_stream(train_dataset) and len(train_dataset) < self.share.total:
            raise ValueError(
                f"--per_device_train_batch_size {args.per_device_train_batch_size}: there are only "
                f"{len(train_dataset)} training examples; give a smaller batch (a step takes {self.share.total})"
            )
        if batches.is_stream(train_dataset):
            args.ignore_data_skip = True  # a stream goes on from its place, see `begin`: nothing is to be read twice
        if args.channels_last:
            as_channels_last(model)
        self.process = process
        self.label_dropout = args.label_dropout
        self.phase = phase
        self.running = Running()
        self._kind = type(model)
        self._engine: nn.Module | None = None
        self._compiled: dict[int, Any] = {}
        self._batches: list[non_finite.MicroBatch] = []
        self._resumed: Path | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data.collate,
            callbacks=callbacks_,
        )
        self.watch = Stopwatch(args.device)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.ema = callbacks.EmaCallback(self.model, args.ema_decay) if args.ema_decay else None
        self.interrupt = callbacks.InterruptCallback()
        self.progress = callbacks.ProgressCallback(phase)
        metrics = callbacks.MetricsCallback(metrics_file or self.folder / "metrics.jsonl", phase)
        for callback in (self.ema, metrics, self.progress, self.interrupt, _Steps(self)):
            if callback is not None:
                self.add_callback(callback)

    def loss_parts(self, model: nn.Module, x_0: Tensor, keys: Tensor, labels: Tensor | None = None) -> Parts:
        """'loss' with its graph and whatever else is worth logging, scalars; keys are this step's.

        model: to be called only; where there are several processes it is what lies within the wrapper. labels (B,):
        the classes of images of codes, which the network is to be told.
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
        self._resumed = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if self._resumed is not None and self._is_finished(self._resumed):
            return None
        self.interrupt.watch()
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        except NonFiniteLossError as error:
            non_finite.set_generators(self._batches[0].generators, self.args.device)
            self._save_checkpoint(self.model, None)
            step = self.state.global_step
            raise NonFiniteLossError(
                f"{error}; the last good state is in {self.folder / f'checkpoint-{step}'}. Start again "
                f"with a smaller --learning_rate (now {self.args.learning_rate:g}), or --resume with a smaller "
                f"--max_grad_norm (now {self.args.max_grad_norm:g}) or with --non_finite skip"
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

    def best_model(self) -> PreTrainedModel:
        """The moving average where there is one, else the model; made whole where it is cut over processes."""
        best = self.model if self.ema is None else self.ema.model
        if not self.is_cut:
            return best
        engine.together(best)
        state = engine.whole(best.state_dict())
        model: PreTrainedModel = self._kind(copy.deepcopy(best.config))
        model.load_state_dict(state)
        return model.to(self.args.device)  # type: ignore[arg-type]  # as its stub has it

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does; trainings one after the other in a process may each have a precision of their own."""
        AcceleratorState._reset_state()
        super().create_accelerator_and_postprocess()

    # One step

    def get_train_dataloader(self) -> Any:
        return batches.loader(self.train_dataset, self.share, self.data_collator, self.args)  # type: ignore[arg-type]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer makes it; the model is cut before, where it is to be, so that the optimizer has the shards."""
        if self._engine is None:
            self._engine = self._wrapped()
        return super().create_optimizer(model)

    def _wrapped(self) -> nn.Module:
        """The loss as a module, within DDP or FSDP where there are several processes."""
        args: Any = self.args
        if args.checkpoint_blocks:
            engine.checkpoint_blocks(self.model)
        module = engine.LossModule(self.model, self._loss, self.called(self.model, "student"))
        if not self.is_cut:
            return module if processes.count() == 1 else engine.distributed(module, args)
        engine.shard(self.model, reshard=args.reshard)
        engine.shard_rest(module)
        if self.ema is not None:
            engine.shard(self.ema.model, reshard=args.reshard)
            engine.shard_rest(self.ema.model)
        return module

    def called(self, network: Any, name: str) -> Called:
        """A network in the precision of training, compiled where that is asked for, its time counted to `name`."""
        args: Any = self.args
        if args.torch_compile and isinstance(network, nn.Module):
            if id(network) not in self._compiled:
                made = torch.compile(network, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
                self._compiled[id(network)] = made
            network = self._compiled[id(network)]
        return Called(network, self.watch, name, self._precision)

    def _precision(self) -> AbstractContextManager[Any]:
        precision: AbstractContextManager[Any] = self.accelerator.autocast()
        return precision

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        return self._engine if training and self._engine is not None else model

    def _loss(self, network: nn.Module, x_0: Tensor, keys: Tensor, **told: Tensor) -> Tensor:
        self._parts = self.loss_parts(network, x_0, keys, **told)
        return self._parts["loss"]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.span("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        inputs = dict(inputs)
        self.running.next_place = inputs.pop(batches.PLACE, None)
        with self.watch.span("student"):  # backward and what is no other's
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

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
        if "mirrored" in inputs:  # of codes, those of the mirror image are drawn as often
            coin = random.fold_in(random.fold_in(keys, 1), MIRROR)
            inputs["x_0"] = one_of_two(inputs["x_0"], inputs.pop("mirrored"), coin)
        self.running.length = inputs["x_0"].shape[1]
        before = non_finite.generators(keys.device)
        run = engine.LossModule(model, self._loss) if model is self.model else model
        with self.watch.span("loss"):
            loss = run(inputs["x_0"], keys, **told)
        self._batches.append(non_finite.MicroBatch(inputs, keys, self._parts, before))
        return (loss, self._parts) if return_outputs else loss

    def require_finite(self) -> None:
        """Before the optimizer sees the gradient: counts a good step's parts; a bad step is skipped, or raises
        NonFiniteLossError. One wait for the device a step."""
        losses = torch.stack([batch.parts["loss"].detach() for batch in self._batches])
        gradients = [engine.local(p.grad) for p in self.model.parameters() if p.grad is not None]
        # Half precision overflows at times: its scaler sees to the gradient.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients and not scaled else losses
        bad = ~(torch.isfinite(losses.sum()) & torch.isfinite(norms.sum()))
        if processes.any_of(bad):
            self._not_finite()
        else:
            self.running.add([batch.parts for batch in self._batches])
        self.running.place = self.running.next_place
        self._batches.clear()

    def _not_finite(self) -> None:
        told = processes.tell_all(self._keep_bad_batches())
        message = non_finite.in_words(told)
        self.running.skipped_in_a_row += 1
        if self.args.non_finite == "stop":  # type: ignore[attr-defined]
            raise NonFiniteLossError(message)
        if self.running.skipped_in_a_row > non_finite.LIMIT:
            raise NonFiniteLossError(f"{message}; and {non_finite.LIMIT} steps before it were skipped")
        if processes.is_first():
            warnings.warn(f"step skipped: {message}", stacklevel=2)
        self.running.skipped += 1
        for parameter in self.model.parameters():
            parameter.grad = None  # the optimizer passes over it: no step, no decay, no new moments
        if self.running.loss_before is not None:
            self._tr_loss.copy_(self.running.loss_before)

    def _keep_bad_batches(self) -> dict[str, Any]:
        """Writes what is needed to compute this process's bad micro-batches again; tells what there is to say."""
        bad = [batch for batch in self._batches if batch.bad_parts()]
        facts = {"step": self.state.global_step + 1, "steps": self.state.max_steps, "phase": self.phase}
        weights = {"model": engine.whole(self.model.state_dict())}
        if self.ema is not None:
            engine.together(self.ema.model)
            weights["average"] = engine.whole(self.ema.model.state_dict())
        gradient_only = not processes.any_of(bool(bad))
        files = []
        for batch in self._batches if gradient_only else bad:
            number = self._batches.index(batch)
            name = f"{self.phase}-step{facts['step']:06d}-process{processes.rank()}-batch{number}.safetensors"
            file = self.folder / non_finite.FOLDER / name
            try:
                non_finite.save(batch, file, weights, facts)
                files.append(str(file))
            except OSError as error:
                warnings.warn(f"{file}: not kept for --replay ({error})", stacklevel=2)
        parts = sorted({part for batch in bad for part in batch.bad_parts()})
        named = [sample for batch in (self._batches if gradient_only else bad) for sample in batch.bad_samples()]
        return facts | {"parts": parts, "samples": named, "files": files}

    def replay(self, file: Path) -> str:
        """Computes a micro-batch again that was kept because its loss was not finite; what it found, in lines."""
        if processes.count() > 1:
            raise ValueError(f"--replay {file}: is for one process, these are {processes.count()}; start one")
        groups, facts = non_finite.read(file)
        if facts.get("phase") != self.phase:
            raise ValueError(f"--replay {file}: is of the {facts.get('phase')!r}, this trains the {self.phase!r}")
        try:
            if self.ema is not None and "average" in groups:
                engine.fill(self.ema.model, groups["average"])
            engine.fill(self.model, groups["model"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"--replay {file}: its weights are not this run's model's ({error})") from error
        self.state.global_step = int(facts["step"]) - 1
        inputs = {name: value.to(self.args.device) for name, value in groups["inputs"].items()}
        self.model.train()
        self.model.zero_grad()
        non_finite.set_generators(groups["generators"], self.args.device)
        self.compute_loss(self._wrapped(), inputs).backward()
        batch = self._batches.pop()
        norms = torch._foreach_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return non_finite.report(file, facts, batch, float(torch.stack(norms).norm()))

    # What is told

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            del logs["loss"]  # summed before it was known to be finite, and of this process alone
            logs.update(self.running.take())
            if not torch.isfinite(torch.tensor(logs.get("grad_norm", 0.0))):
                del logs["grad_norm"]  # of a step that was skipped
            logs.update(self._speed())
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        seconds, wall = self.watch.take()
        steps, self.running.timed_step = self.state.global_step - self.running.timed_step, self.state.global_step
        rate = steps * self.share.total / wall
        return {
            "samples_per_second": round(rate, 3),
            "tokens_per_second": round(rate * self.running.length, 1),
            **{f"time_{name}": round(seconds.get(name, 0.0) / wall, 4) for name in SPANS},
            "peak_memory_gib": round(peak_memory(self.args.device), 3),
        }

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return engine.whole(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return engine.whole(super()._get_grad_norm(model, grad_norm))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counting walks all modules at every step, for a number nothing here uses

    # Beginning

    def begin(self) -> None:
        """Before the first step of a run that is new or resumed."""
        if processes.rank():
            torch.manual_seed(self.args.seed + processes.rank())  # dropout; a resumed run has its state put back
        if self._resumed is not None:
            self.running.load(self._resumed, self.args.device)
            if self.running.place is not None and batches.is_stream(self.train_dataset):
                self.train_dataset.load_state_dict(self.running.place)  # type: ignore[union-attr]
        self.running.timed_step = self.state.global_step
        self.watch.take()


def as_channels_last(model: nn.Module) -> None:
    """Lays the weights of convolutions out so that the maps come channel by channel at each pixel; others stay."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which torch's stubs leave out


class _Steps(TrainerCallback):
    """Calls the trainer where the Trainer has no method of its own to override."""

    def __init__(self, trainer: KeyedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.running.loss_before = self._trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.require_finite()
