"""Two processes are one: the same global batch gives the same loss, gradient and average, however it is split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel
import parallel_jobs
import pytest
import torch
from safetensors.torch import load_file

from di4c_ext import checkpoints

PARTS = ("loss", "distillation", "correlation_data", "marginal_data", "correlation_consistency", "marginal_consistency")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left behind."""
    folder = tmp_path_factory.mktemp("pair")
    parallel.together(2, parallel_jobs.agree, folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], Path]]:
    """What one process gives under some settings, and the folder of its run; each but once."""
    known: dict[str, tuple[dict[str, Any], Path]] = {}

    def measure(**settings: Any) -> tuple[dict[str, Any], Path]:
        if str(settings) not in known:
            folder = tmp_path_factory.mktemp("one")
            known[str(settings)] = parallel_jobs.measured(folder, **settings), folder
        return known[str(settings)]

    return measure


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal but for the order of sums: by the largest of all, since some are sums of what nearly cancels."""
    assert one.keys() == other.keys()
    largest = max(float(value.norm()) for value in other.values())
    for name, value in other.items():
        assert float((one[name] - value).norm()) <= tolerance * (float(value.norm()) + 1e-3 * largest), name


SPLITS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_accumulated": {},
    "fsdp": {},
    "latents": {},
    "latents_apart": {"distillation_rows": 4, "time_min": 0.01, "step_max": 0.05},
    "accumulated": {},  # one process, in two micro-batches
}


@pytest.mark.parametrize("name", SPLITS)
def test_same_global_batch_same_loss_gradient_and_average(name: str, pair: Path, one: Any) -> None:
    alone, its_folder = one(**SPLITS[name])
    if name == "accumulated":
        found, folder = one(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    else:
        found, folder = torch.load(pair / f"{name}.pt", weights_only=True), pair / name
    _same(found["gradient"], alone["gradient"], 1e-5)
    _same(found["weights"], alone["weights"], 1e-5)
    _same(found["average"], alone["average"], 1e-5)
    lines, other = parallel.free_of_timing(folder), parallel.free_of_timing(its_folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for part in PARTS:
        assert lines[0][part] == pytest.approx(other[0][part], rel=1e-5, abs=1e-6), part
        assert lines[3][part] == pytest.approx(other[3][part], rel=1e-3, abs=1e-5), part


def test_cut_parameters_are_saved_whole_and_resumed_exactly(pair: Path) -> None:
    checkpoint = pair / "cut" / "checkpoint-2"
    checkpoints.check_resumable(checkpoint)
    first = torch.load(pair / "cut.pt", weights_only=True)
    resumed = torch.load(pair / "cut_resumed.pt", weights_only=True)
    for kind in ("weights", "average"):
        assert first[kind].keys() == resumed[kind].keys()
        assert all(torch.equal(value, resumed[kind][name]) for name, value in first[kind].items())
    for file in ("model.safetensors", "ema/model.safetensors"):
        assert {k: v.shape for k, v in load_file(checkpoint / file).items()} == {
            k: v.shape for k, v in first["weights"].items()
        }


def test_cut_checkpoint_goes_on_in_one_process(pair: Path, tmp_path: Path) -> None:
    """The files are those of a model that is not cut."""
    trainer = parallel_jobs.distillation(tmp_path, optim="adamw_torch")
    trainer.train(resume_from_checkpoint=str(pair / "cut" / "checkpoint-2"))
    lines, other = parallel.free_of_timing(tmp_path), parallel.free_of_timing(pair / "cut")[2:]
    assert [line["step"] for line in lines] == [line["step"] for line in other] == [3, 4]
    for part in PARTS:
        assert lines[0][part] == pytest.approx(other[0][part], rel=1e-4, abs=1e-5), part


def test_what_was_not_finite_is_kept_by_the_process_that_had_it(pair: Path) -> None:
    for folder in ("skipped", "stopped_nan"):
        kept = [path.name for path in (pair / folder / "non_finite").iterdir()]
        assert kept == ["student-step000002-process1-batch0.safetensors"]
    lines = parallel.free_of_timing(pair / "skipped")
    assert [line["step"] for line in lines] == [1, 3, 4]  # nothing is known of the step that was skipped
    assert all("skipped_steps" in line for line in lines[1:]) and "skipped_steps" not in lines[0]
    checkpoints.check_resumable(pair / "stopped_nan" / "checkpoint-1")
