"""What a training run does beside stepping: moving average, metrics file, progress bar, ctrl-C."""

from __future__ import annotations

import copy
import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from di4c_ext import checkpoints, engine, processes

EMA_FOLDER = "ema"  # inside a checkpoint; from_pretrained(checkpoint, subfolder="ema") reads it
_TWICE = 2.0  # seconds within which two signals are one
SHARES = ("time_data", "time_teacher", "time_student", "time_loss")
# What a line of metrics says of the machine and the hour. A resumed run writes all else as the uninterrupted one does.
TIMING = ("seconds", "samples_per_second", "tokens_per_second", *SHARES, "peak_memory_gib")
LATENCY = ("latency", "latency_1")  # of rows of an evaluation


class EmaCallback(TrainerCallback):
    """Exponential moving average of the weights; the first steps average over fewer of them.

    `model` is the averaged copy, cut over processes as the model is. The trainer writes it into every checkpoint and
    fills it again on resume.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"--ema_decay {decay}: must be at least 0 and below 1; 0 averages nothing")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        n = state.global_step
        decay = min(self.decay, (1 + n) / (10 + n))
        source: nn.Module = kwargs["model"]
        engine.together(self.model)
        averages, weights = ([engine.local(p) for p in model.parameters()] for model in (self.model, source))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for averaged, current in zip(self.model.buffers(), source.buffers(), strict=True):
            averaged.copy_(current)

    def save(self, checkpoint: Path, *, write: bool = True) -> None:
        """Writes the averaged model into the checkpoint's `ema` folder; a process that does not write only helps."""
        engine.together(self.model)
        state = engine.whole(self.model.state_dict())
        if write:
            self.model.save_pretrained(checkpoint / EMA_FOLDER, state_dict=state)

    def load(self, checkpoint: Path) -> None:
        """Takes the average up where the checkpoint left it."""
        checkpoints.check_model(checkpoint / EMA_FOLDER)
        engine.together(self.model)
        checkpoints.load_state(self.model, checkpoint / EMA_FOLDER / checkpoints.WEIGHTS)


class MetricsCallback(TrainerCallback):
    """Appends every logged step to a JSON-lines file, each line whole; a resumed run drops what it will write again."""

    def __init__(self, file: Path, phase: str) -> None:
        self.file = file
        self.phase = phase
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.monotonic()
        if state.is_world_process_zero:
            lines = [line for line in read_metrics(self.file) if self._keeps(line, state.global_step)]
            checkpoints.write_text(self.file, "".join(json.dumps(line) + "\n" for line in lines))

    def _keeps(self, line: dict[str, Any], step: int) -> bool:
        return line.get("phase") != self.phase or line.get("step", 0) <= step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if state.is_world_process_zero and "loss" in logs:
            seconds = round(time.monotonic() - self._start, 3)
            append_metrics(self.file, {"phase": self.phase, "step": state.global_step, "seconds": seconds, **logs})


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without `TIMING` and `LATENCY`: what a run that was resumed has in common with one that never
    stopped."""
    return {name: value for name, value in line.items() if name not in (*TIMING, *LATENCY)}


def append_metrics(file: Path, line: dict[str, Any]) -> None:
    """One write of one whole line."""
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line that was cut off is left out."""
    found = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


class ProgressCallback(TrainerCallback):
    """A bar with the loss parts and the time left; where output goes to a file, a line now and then."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            quick = sys.stderr.isatty()
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="step",
                dynamic_ncols=quick,
                mininterval=0.2 if quick else 15,
                maxinterval=10 if quick else 60,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self._bar is not None and "loss" in logs:
            hidden = {"grad_norm", "learning_rate", "epoch", *TIMING}
            shown = {name: f"{value:.3g}" for name, value in logs.items() if name not in hidden}
            self._bar.set_postfix(shown | speed(logs), refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar; called as well when training stops with an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def speed(logs: dict[str, Any]) -> dict[str, str]:
    """The timing fields of a line in words, for a bar."""
    if "samples_per_second" not in logs:
        return {}
    shares = [f"{name.removeprefix('time_')} {logs[name]:.0%}" for name in SHARES if name in logs]
    return {
        "speed": f"{logs['samples_per_second']:.3g} samples/s, {logs['tokens_per_second']:.3g} tokens/s",
        "time": " ".join(shares),
        "peak": f"{logs['peak_memory_gib']:.2f} GiB",
    }


class InterruptCallback(TrainerCallback):
    """The first ctrl-C (or SIGTERM) ends training after the step at hand, with a checkpoint; a second one at once.

    Of several processes one that was told is enough: all end after the same step.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Takes the signals over; only a main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)

    def release(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes on what the terminal has sent already: several processes are told twice at once.
        if self.interrupted and (processes.count() == 1 or time.monotonic() - self._since > _TWICE):
            raise KeyboardInterrupt
        self.interrupted, self._since = True, time.monotonic()
        if processes.is_first():
            print("\nstopping after this step; once more stops at once, without saving", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.interrupted = processes.any_of(self.interrupted)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
