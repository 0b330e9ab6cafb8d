"""What the processes of test_parallel.py and test_killed.py do: trainings of a few steps of very small networks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, set_seed

from di4c_ext import checkpoints, data, engine, manifest, processes
from di4c_ext.config import DistillConfig
from di4c_ext.models import CompactConfig, CompactDenoiser, draw_latents
from di4c_ext.process import AbsorbingProcess
from di4c_ext.trainer import DistillTrainer, NonFiniteLossError


def latents(keys: Tensor, count: int) -> Tensor:
    return draw_latents(keys, count, 4)


def distillation(folder: Path, *, dropout: float = 0.0, **settings: Any) -> DistillTrainer:
    """A trainer of 40 digits, the same wherever it is made."""
    set_seed(0)
    teacher = CompactDenoiser(CompactConfig(hidden_size=16, num_blocks=2, dropout=dropout))
    student = CompactDenoiser.from_teacher(teacher, latent_dim=4, latent_hidden_size=8)
    told = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "num_latents": 4,
        "optim": "sgd",  # Adam would make of a rounding error in what is nearly 0 a step as long as any
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 100,
        "max_grad_norm": 0.0,
        "ema_decay": 0.9,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillTrainer(
        student,
        teacher=teacher,
        latents=latents,
        process=AbsorbingProcess(17),
        args=DistillConfig(**told | settings),
        train_dataset=data.load("digits").subset(torch.arange(40)),
    )


class Gradient(TrainerCallback):
    """Keeps the gradient of the first step, whole, by the names of the parameters."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.found:
            for name, parameter in kwargs["model"].named_parameters():
                if parameter.grad is not None:
                    self.found[name] = engine.whole(parameter.grad).detach().clone()


def measured(folder: Path, **settings: Any) -> dict[str, Any]:
    """A short training: its first gradient, its weights and their average at the end."""
    gradient = Gradient()
    trainer = distillation(folder, **settings)
    trainer.add_callback(gradient)
    trainer.train()
    found = {
        "gradient": gradient.found,
        "weights": engine.whole(trainer.model.state_dict()),
        "average": trainer.best_model().state_dict(),
    }
    return found


def agree(folder: Path) -> None:
    """Two processes: DDP, FSDP, latents shared, interruption, a loss that is not finite on one of them."""
    cases: dict[str, dict[str, Any]] = {
        "ddp": {"per_device_train_batch_size": 4},
        "ddp_accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "fsdp": {"per_device_train_batch_size": 4, "fsdp": "full_shard", "latent_micro_batch": 2},
        "latents": {"latent_processes": 2},
        "latents_apart": {"latent_processes": 2, "distillation_rows": 4, "time_min": 0.01, "step_max": 0.05},
    }
    for name, settings in cases.items():
        found = measured(folder / name, **settings)
        if processes.is_first():
            torch.save(found, folder / f"{name}.pt")
    cut = {"per_device_train_batch_size": 4, "fsdp": "full_shard", "save_steps": 2, "optim": "adamw_torch"}
    found = measured(folder / "cut", **cut)
    if processes.is_first():
        torch.save(found, folder / "cut.pt")
    resumed = distillation(folder / "cut", **cut)
    resumed.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-2"))
    found = {"weights": engine.whole(resumed.model.state_dict()), "average": resumed.best_model().state_dict()}
    if processes.is_first():
        torch.save(found, folder / "cut_resumed.pt")
    _words(folder)
    _stop_together(folder / "stopped")
    _not_finite(folder)


def _words(folder: Path) -> None:
    rank = processes.rank()
    assert processes.tell_all({"rank": rank, "text": "é" * rank}) == [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}]
    assert processes.any_of(rank == 1) and not processes.any_of(False)
    assert processes.on_first(lambda: [processes.rank()]) == [0]
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "thesis.txt").write_text("x")
    expected = ValueError if rank == 0 else processes.FailedElsewhereError
    with pytest.raises(expected, match="holds other files"):
        processes.on_first(lambda: checkpoints.claim(folder / "taken", "x.yaml", resume=False, overwrite=False))


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def _stop_together(folder: Path) -> None:
    """One process is told to stop; both do, after the same step."""
    trainer = distillation(folder, per_device_train_batch_size=4, max_steps=20)
    if processes.rank() == 1:
        trainer.add_callback(At(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    trainer.train()
    assert trainer.interrupt.interrupted and trainer.state.global_step == 3
    assert len(set(processes.tell_all(trainer.state.global_step))) == 1


def _not_finite(folder: Path) -> None:
    """The loss of one process is NaN: both skip the step, or both stop, and say which sample it was."""

    def spoil(trainer: DistillTrainer) -> None:
        original = trainer.loss_parts

        def parts(model: Any, x_0: Tensor, keys: Tensor) -> Any:
            found = original(model, x_0, keys)
            if processes.rank() == 1 and trainer.state.global_step == 1:
                found["loss"] = found["loss"] * torch.nan
                found.per_sample["marginal_data"][2] = torch.nan
            return found

        trainer.loss_parts = parts  # type: ignore[method-assign]

    skipping = distillation(folder / "skipped", per_device_train_batch_size=4, non_finite="skip")
    spoil(skipping)
    skipping.train()
    assert skipping.state.global_step == 4 and skipping.running.skipped == 1
    stopping = distillation(folder / "stopped_nan", per_device_train_batch_size=4)
    spoil(stopping)
    with pytest.raises(
        NonFiniteLossError, match=r"marginal_data is not finite at step 2 of 4, example \d+ \(key"
    ) as told:
        stopping.train()
    assert len(set(processes.tell_all(str(told.value)))) == 1 and "process1" in str(told.value)


def train(folder: Path, steps: int, die_while_saving: int | None = None) -> None:
    """A training to be killed and gone on with; it may also kill itself in the middle of writing a checkpoint."""
    trainer = distillation(
        folder,
        dropout=0.1,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_latents=3,
        optim="adamw_torch",
        logging_steps=3,
        save_steps=5,
        max_grad_norm=1.0,
        warmup_steps=4,
    )
    if die_while_saving is not None:
        seal = manifest.seal

        def dying(checkpoint: Path) -> None:
            if checkpoint.name == f"checkpoint-{die_while_saving}":
                os.kill(os.getpid(), signal.SIGKILL)
            seal(checkpoint)

        manifest.seal = dying
    found = checkpoints.latest_whole(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
