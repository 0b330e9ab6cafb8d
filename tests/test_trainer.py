"""Training: resumed equals uninterrupted, nothing half-written, the right words when it goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_jobs import At
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from di4c_ext import checkpoints, data, random
from di4c_ext.callbacks import append_metrics, read_metrics, untimed
from di4c_ext.config import DistillConfig, KeyedConfig
from di4c_ext.models import CompactConfig, CompactDenoiser, draw_latents
from di4c_ext.process import AbsorbingProcess
from di4c_ext.trainer import DistillTrainer, NonFiniteLossError, PretrainTrainer

STEPS = 12


@pytest.fixture(scope="module")
def images() -> data.ImageTokens:
    return data.load("digits").subset(torch.arange(40))


def _latents(keys: Tensor, count: int) -> Tensor:
    return draw_latents(keys, count, 4)


def _model(**settings: Any) -> CompactDenoiser:
    set_seed(0)
    return CompactDenoiser(CompactConfig(hidden_size=16, num_blocks=1, dropout=0.1, **settings))


def _settings(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_steps": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        "ema_decay": 0.9,
        **settings,
    }


def _distill(images: data.ImageTokens, folder: Path, **settings: Any) -> DistillTrainer:
    args = DistillConfig(**_settings(folder, num_latents=3, **settings))
    teacher = _model()
    student = CompactDenoiser.from_teacher(teacher, latent_dim=4, latent_hidden_size=8)
    process = AbsorbingProcess(17)
    return DistillTrainer(student, teacher=teacher, latents=_latents, process=process, args=args, train_dataset=images)


def _pretrain(images: data.ImageTokens, folder: Path, **settings: Any) -> PretrainTrainer:
    args = KeyedConfig(**_settings(folder, **settings))
    return PretrainTrainer(_model(), process=AbsorbingProcess(17), args=args, train_dataset=images)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [untimed(line) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("make", [_distill, _pretrain])
@pytest.mark.parametrize("stop", [7, 10])  # in the middle of the second epoch of 5 batches, and between two
def test_interrupted_and_resumed_is_the_uninterrupted_run(
    make: Any, stop: int, images: data.ImageTokens, tmp_path: Path
) -> None:
    whole = make(images, tmp_path / "whole")
    whole.train()
    broken = make(images, tmp_path / "broken")
    broken.add_callback(At(stop - 1, lambda: os.kill(os.getpid(), signal.SIGINT)))  # seen one step later
    broken.train()
    assert broken.interrupt.interrupted and broken.state.global_step == stop
    assert checkpoints.latest(tmp_path / "broken") == tmp_path / "broken" / f"checkpoint-{stop}"
    metrics = tmp_path / "broken" / "metrics.jsonl"
    append_metrics(metrics, {"phase": broken.progress.title, "step": 11, "loss": 0.0})  # logged, but not saved
    with open(metrics, "a") as handle:
        handle.write('{"phase": "student", "st')  # and then the process died in the middle of a line

    resumed = make(images, tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == STEPS
    for one, other in ((whole.model, resumed.model), (whole.best_model(), resumed.best_model())):
        assert one.state_dict().keys() == other.state_dict().keys()
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert _lines(tmp_path / "whole") == _lines(tmp_path / "broken")
    assert [line["step"] for line in _lines(tmp_path / "whole")] == list(range(1, STEPS + 1))


def test_resuming_a_finished_run_changes_nothing(images: data.ImageTokens, tmp_path: Path) -> None:
    first = _distill(images, tmp_path)
    first.train()
    again = _distill(images, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert again.state.global_step == STEPS and not again.interrupt.interrupted
    for name, value in first.best_model().state_dict().items():
        assert torch.equal(value, again.best_model().state_dict()[name]), name
    assert not torch.equal(again.model.head.weight, again.best_model().head.weight)  # raw and averaged differ


def test_checkpoint_holds_the_student_and_its_average_and_no_teacher(images: data.ImageTokens, tmp_path: Path) -> None:
    trainer = _distill(images, tmp_path)
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    trainer.train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    assert set(load_file(folder / "model.safetensors")) == set(trainer.model.state_dict())
    averaged = load_file(folder / "ema" / "model.safetensors")
    assert all(torch.equal(averaged[name], value) for name, value in trainer.best_model().state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in trainer.teacher.state_dict().items())
    assert not trainer.teacher.training
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["checkpoint-10", f"checkpoint-{STEPS}", "metrics.jsonl"]  # save_total_limit 2, no leftovers


def test_average_follows_its_definition(images: data.ImageTokens, tmp_path: Path) -> None:
    trainer = _pretrain(images, tmp_path, ema_decay=0.5)
    expected = trainer.model.head.weight.detach().clone()

    def follow() -> None:
        n = trainer.state.global_step
        expected.lerp_(trainer.model.head.weight.detach(), 1 - min(0.5, (1 + n) / (10 + n)))

    for step in range(1, STEPS + 1):
        trainer.add_callback(At(step, follow))
    trainer.train()
    torch.testing.assert_close(trainer.best_model().head.weight.detach(), expected)


def test_noise_is_a_function_of_seed_example_and_step(images: data.ImageTokens, tmp_path: Path) -> None:
    """The keys of a step do not depend on which other images are in the batch, nor on the data set's order."""
    trainer = _pretrain(images, tmp_path)
    seen: list[tuple[list[int], Tensor]] = []

    def spy(model: Any, x_0: Tensor, keys: Tensor) -> dict[str, Tensor]:
        seen.append((x_0.tolist(), keys))
        return {"loss": torch.zeros((), requires_grad=True)}

    trainer.loss_parts = spy  # type: ignore[method-assign]
    for rows in ([3, 5, 9], [9, 3]):
        trainer.compute_loss(trainer.model, images.__getitems__(rows))
    assert seen[0][1][[2, 0]].tolist() == seen[1][1].tolist()
    trainer.state.global_step = 4
    trainer.compute_loss(trainer.model, images.__getitems__([9]))
    expected = random.fold_in(random.keys(trainer.args.seed, 10)[9:], 4)
    assert seen[2][1].tolist() == expected.tolist() != seen[0][1][2:].tolist()


def test_non_finite_loss_stops_with_the_last_good_state(images: data.ImageTokens, tmp_path: Path) -> None:
    trainer = _distill(images, tmp_path, save_strategy="no")
    good: dict[str, Tensor] = {}
    original = trainer.loss_parts

    def break_at_seven(model: Any, x_0: Tensor, keys: Tensor) -> Any:
        parts = original(model, x_0, keys)
        if trainer.state.global_step == 6:
            good.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
            parts["loss"] = parts["loss"] * torch.nan
            parts.per_sample["correlation_data"] = parts.per_sample["correlation_data"] * torch.nan
        return parts

    trainer.loss_parts = break_at_seven  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError, match=r"correlation_data is not finite at step 7 of 12, .*checkpoint-6"):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in good.items())
    checkpoints.check_resumable(tmp_path / "checkpoint-6")


def test_non_finite_gradient_stops_too(images: data.ImageTokens, tmp_path: Path) -> None:
    trainer = _pretrain(images, tmp_path)
    trainer.model.head.bias.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(NonFiniteLossError, match="its gradient is not finite at step 1 of 12"):
        trainer.train()
    assert all(
        bool(value.isfinite().all()) for value in load_file(tmp_path / "checkpoint-0/model.safetensors").values()
    )


@pytest.mark.parametrize("what", ["model", "optimizer", "sync"])
def test_full_disk_leaves_the_previous_checkpoint_whole(
    what: str, images: data.ImageTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _pretrain(images, tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_the_disk() -> None:
        if what == "model":
            monkeypatch.setattr(trainer.model, "save_pretrained", full)
        elif what == "optimizer":
            monkeypatch.setattr(trainer.ema, "save", full)
        else:
            monkeypatch.setattr(os, "fsync", full)

    trainer.add_callback(At(6, fill_the_disk))
    with pytest.raises(OSError, match=r"checkpoint-10: no space left on the disk; .*checkpoint-5 is whole; free some"):
        trainer.train()
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "metrics.jsonl"]
    checkpoints.check_resumable(tmp_path / "checkpoint-5")
    resumed = _pretrain(images, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.state.global_step == STEPS


def test_checkpoints_that_cannot_be_trusted(images: data.ImageTokens, tmp_path: Path) -> None:
    _pretrain(images, tmp_path, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    checkpoints.check_resumable(folder)
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
            checkpoints.check_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer_state\.json: not readable JSON"):
        checkpoints.check_resumable(folder)
    (folder / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        checkpoints.check_resumable(folder)
    with pytest.raises(ValueError, match=r"config\.json is missing.*inside it are checkpoint-1"):
        checkpoints.check_model(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        checkpoints.check_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_latents": 0}, "--num_latents 0: must be at least 1"),
        ({"num_targets": 0}, "num_targets must be at least 1"),
        ({"base_learning_rate": -1.0}, "--base_learning_rate -1.0: must be finite"),
        ({"consistency_target": "teacher"}, "must be student or ema"),
        ({"consistency_target": "ema", "ema_decay": 0.0}, "needs a moving average"),
        ({"window": 2.0}, "window must lie in"),
        ({"augment_share": -0.1}, r"must lie in \[0, 1\]"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**_settings(tmp_path, **{"ema_decay": 0.9, **settings}))


def test_refuses_a_batch_larger_than_the_data(images: data.ImageTokens, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 40 training examples; give a smaller batch"):
        _pretrain(images, tmp_path, per_device_train_batch_size=64)


def test_accumulation_and_average_as_target(images: data.ImageTokens, tmp_path: Path) -> None:
    trainer = _distill(
        images,
        tmp_path,
        max_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        consistency_target="ema",
    )
    assert trainer.target is trainer.ema.model
    trainer.train()
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    parts = ("distillation", "correlation_data", "marginal_data", "correlation_consistency", "marginal_consistency")
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[part] for part in parts), rel=1e-4, abs=1e-6)


def test_copied_weights_have_their_own_rate(images: data.ImageTokens, tmp_path: Path) -> None:
    trainer = _distill(images, tmp_path, max_steps=2, base_learning_rate=0.0, weight_decay=0.1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    latent = {name for name, _ in trainer.model.latent_parameters()}
    assert latent
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved <= latent
    resumed = _distill(images, tmp_path, max_steps=4, base_learning_rate=0.0, weight_decay=0.1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.model.head.weight, before["head.weight"])


def test_metrics_file_is_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in range(3):
        append_metrics(file, {"step": step})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]


def test_student_on_altered_images(images: data.ImageTokens, tmp_path: Path) -> None:
    """Student, teacher and target are told what was done to the images; without conditions they are called bare."""
    trainer = _distill(images, tmp_path, max_steps=1)
    told: list[Any] = []
    teacher = trainer.teacher

    def listen(*args: Any, augmentation: Tensor | None = None, **kwargs: Any) -> Tensor:
        told.append(augmentation)
        return teacher(*args, **kwargs)

    trainer.teacher = listen
    batch = images.__getitems__([0, 1])
    keys = random.keys(0, 2)
    trainer.loss_parts(trainer.model, batch["x_0"], keys)
    trainer.augment = lambda x_0, keys: (x_0.flip(1), {"augmentation": torch.ones(2, 7)})
    with pytest.raises(ValueError, match=r"augmentation given, but config.augmentation_dim is 0"):
        trainer.loss_parts(trainer.model, batch["x_0"], keys)
    assert told[0] is None and torch.equal(told[1], torch.ones(2, 7))
