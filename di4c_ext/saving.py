"""A Trainer whose checkpoints are whole or absent, on one process or many, and are checked by what they hold."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from di4c_ext import checkpoints, engine, manifest, processes
from di4c_ext.callbacks import EmaCallback
from di4c_ext.running import Running

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


class SavingTrainer(Trainer):
    """Saves and loads; parameters that are cut over processes go into the files of a model that is not.

    A subclass sets what is saved besides: the moving average and what a run counts.
    """

    ema: EmaCallback | None = None
    running: Running
    _staging: Path | None = None

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(str(self.args.output_dir))

    @property
    def is_cut(self) -> bool:
        """Whether the parameters are cut over processes (FSDP)."""
        return bool(self.args.shard) and processes.count() > 1  # type: ignore[attr-defined]

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes the checkpoint elsewhere, then renames it: a full disk leaves the previous one whole."""
        target = self.folder / f"checkpoint-{self.state.global_step}"
        self._staging = target.parent / f".saving-{target.name}"
        written = self._staging / target.name
        try:
            super()._save_checkpoint(model, trial)
            self.running.save(written, write=self.args.should_save)
            processes.wait()
            if self.args.should_save:
                manifest.seal(written)
                checkpoints.sync_folder(written)
                checkpoints.replace_folder(written, target)
        except OSError as error:
            raise _saving_failed(error, target) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self.args.should_save:
            checkpoints.keep_newest(target.parent, self.args.save_total_limit or None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.is_cut:
            state_dict = engine.whole(self.model.state_dict())  # type: ignore[union-attr]
        super()._save(output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_cut:
            optimizer: Any = self.optimizer
            state = engine.whole(optimizer.state_dict())
            if self.args.should_save:
                torch.save(state, Path(output_dir) / OPTIMIZER)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)  # type: ignore[union-attr]
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.ema is not None:
            self.ema.save(Path(output_dir), write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_cut:
            state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
            optimizer: Any = self.optimizer
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, values in state["state"].items():
                like = parameters[number]
                for name, value in values.items():
                    if value.shape == like.shape:  # a moment; else a number of steps
                        values[name] = engine.cut_like(value, like)
            optimizer.load_state_dict(state)
            scheduler = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
            self.lr_scheduler.load_state_dict(scheduler)  # type: ignore[union-attr]
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if self.ema is not None:
            self.ema.load(Path(checkpoint))


def _saving_failed(error: OSError, target: Path) -> OSError:
    why = "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    previous = checkpoints.latest(target.parent)
    kept = f"{previous} is whole" if previous else "no earlier checkpoint is there"
    remedy = "free some space" if error.errno == errno.ENOSPC else "mend that"
    message = f"could not save {target}: {why}; {kept}; {remedy} and go on with --resume"
    return OSError(error.errno or errno.EIO, message)
