"""A training that is killed, several times and while it saves, is in the end the training that never was."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import parallel
import parallel_jobs
import torch

from di4c_ext import checkpoints
from di4c_ext.callbacks import read_metrics

STEPS = 30


def _step(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder / "metrics.jsonl")), default=0)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_killed_at_random_and_resumed_is_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = parallel.alone(parallel_jobs.train, whole, STEPS)
    draw = random.Random(time.time_ns())
    kills = sorted(draw.sample(range(3, STEPS - 5), 3))
    for step in kills:
        process = parallel.alone(parallel_jobs.train, broken, STEPS)
        while _step(broken) < step:
            assert process.is_alive(), (kills, step)
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (kills, step)
    newest = checkpoints.latest_whole(broken)
    following = 5 + (0 if newest is None else int(newest.name[11:]))
    process = parallel.alone(parallel_jobs.train, broken, STEPS, following)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = [path for path in broken.iterdir() if path.name.startswith(".saving")]
    assert len(left) == 1 and checkpoints.latest_whole(broken) == newest  # what was half written is no checkpoint
    for run in (parallel.alone(parallel_jobs.train, broken, STEPS), uninterrupted):
        run.join()
        assert run.exitcode == 0, kills

    ends = [folder / f"checkpoint-{STEPS}" for folder in (whole, broken)]
    for name in ("model.safetensors", "ema/model.safetensors", "running.json"):
        one, other = ((end / name).read_bytes() for end in ends)
        assert one == other, (name, kills)
    for name in ("optimizer.pt", "scheduler.pt"):
        assert _equal(*(torch.load(end / name, weights_only=True) for end in ends)), (name, kills)
    lines = parallel.free_of_timing(whole)
    assert [line["step"] for line in lines] == list(range(3, STEPS + 1, 3))
    assert lines == parallel.free_of_timing(broken), kills
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())
