"""The engine's smaller parts: the order of data, precision, compiled and checkpointed networks, where the time goes."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import parallel_jobs
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from transformers import TrainerCallback

from di4c_ext import batches, callbacks, checkpoints, data, manifest, non_finite
from di4c_ext.batches import GlobalBatches, Share, StreamedBatches
from di4c_ext.callbacks import read_metrics
from di4c_ext.config import DistillConfig
from di4c_ext.stopwatch import Stopwatch
from di4c_ext.trainer import NonFiniteLossError


def _global(length: int, size: int, accumulation: int, groups: int, epoch: int) -> list[list[int]]:
    """The global batches of a pass, put together from what every group takes."""
    parts = []
    for number in range(groups):
        order = GlobalBatches(length, Share(size, accumulation, groups, number), seed=7)
        order.set_epoch(epoch)
        parts.append(list(order))
        assert len(parts[-1]) == len(order)
    steps = len(parts[0]) // accumulation
    rows = [[part[step * accumulation + a] for a in range(accumulation) for part in parts] for step in range(steps)]
    return [[i for micro_batch in each for i in micro_batch] for each in rows]


@pytest.mark.parametrize(("size", "accumulation", "groups"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)])
def test_global_batches_are_the_same_however_they_are_split(size: int, accumulation: int, groups: int) -> None:
    for epoch in (0, 3):
        expected = [*SeedableRandomSampler(range(45), data_seed=7)] if epoch == 0 else None
        found = _global(45, size, accumulation, groups, epoch)
        assert found == _global(45, 8, 1, 1, epoch) and len(found) == 5  # the last 5 are left out
        if expected is not None:
            assert [i for batch in found for i in batch] == expected[:40]
    assert _global(45, 8, 1, 1, 0) != _global(45, 8, 1, 1, 3)


def test_a_smaller_last_batch_is_kept_only_where_it_can_be() -> None:
    assert [len(batch) for batch in GlobalBatches(20, Share(8), 0, drop_last=False)] == [8, 8, 4]
    with pytest.raises(ValueError, match="--dataloader_drop_last false: a last batch"):
        GlobalBatches(20, Share(8, 2), 0, drop_last=False)


class _Stream:
    """Numbers 0 to 9, again and again, with a place."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Any:
        for number in range(self.place, 10):
            self.place = number + 1
            yield {"x_0": torch.tensor([number])}
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def _read(stream: StreamedBatches, number: int) -> list[tuple[list[int], Any]]:
    reader = iter(stream)
    found = [next(reader) for _ in range(number)]
    return [(batch["x_0"].flatten().tolist(), batch[batches.PLACE]) for batch in found]


def test_streams_are_shared_out_and_gone_on_with() -> None:
    shares = [Share(2, 1, 2, number) for number in range(2)]
    first, second = (_read(StreamedBatches(_Stream(), share, data.collate), 4) for share in shares)
    assert [a + b for (a, _), (b, _) in zip(first, second, strict=True)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],  # over the end of a pass
        [2, 3, 4, 5],
    ]
    again = _Stream()
    again.load_state_dict(first[1][1])
    assert _read(StreamedBatches(again, shares[0], data.collate), 2) == first[2:]


@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"activation_checkpointing": True},
        {"latent_micro_batch": 1},
    ],
    ids=["compiled", "checkpointed", "latents one by one"],
)
def test_same_training_by_other_means(settings: dict[str, Any], tmp_path: Path) -> None:
    told = {"max_steps": 2, "per_device_train_batch_size": 4}
    plain = parallel_jobs.measured(tmp_path / "plain", **told)
    other = parallel_jobs.measured(tmp_path / "other", **told, **settings)
    for name, value in plain["gradient"].items():
        torch.testing.assert_close(other["gradient"][name], value, rtol=1e-4, atol=1e-6)
    assert other["weights"].keys() == plain["weights"].keys()  # no wrapper leaves its mark on the names


def test_half_precision_reaches_every_network_and_nothing_else(tmp_path: Path) -> None:
    trainer = parallel_jobs.distillation(tmp_path, max_steps=2, per_device_train_batch_size=4, bf16=True)
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    for name, network in (("student", trainer.model), ("teacher", trainer.teacher)):
        network.head.register_forward_hook(lambda module, args, out, name=name: seen[name].add(out.dtype))
    trainer.train()
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    plain = parallel_jobs.distillation(tmp_path / "plain", max_steps=2, per_device_train_batch_size=4)
    plain.train()
    for line, other in zip(lines, read_metrics(tmp_path / "plain" / "metrics.jsonl"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05, abs=0.02) and line["loss"] != other["loss"]


def test_gradients_are_clipped_and_the_schedule_is_followed(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watch(parallel_jobs.Gradient):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            squares = [p.grad.norm() ** 2 for p in kwargs["model"].parameters() if p.grad is not None]
            norms.append(float(torch.stack(squares).sum().sqrt()))

    schedule = {"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup", "learning_rate": 1e-3}
    trainer = parallel_jobs.distillation(tmp_path, max_grad_norm=0.01, **schedule)
    trainer.add_callback(Watch())
    trainer.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert all(norm <= 0.0101 for norm in norms) and all(line["grad_norm"] > 0.0101 for line in lines)
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_trackers_are_told_all_that_the_file_is(tmp_path: Path) -> None:
    """What --report_to names listens as this does."""
    told: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told.append(dict(kwargs["logs"]))

    trainer = parallel_jobs.distillation(tmp_path, max_steps=2)
    trainer.add_callback(Tracker())
    trainer.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [{k: v for k, v in line.items() if k not in ("phase", "step", "seconds")} for line in lines] == told[:2]
    with pytest.raises(ValueError, match="nowhere is not supported"):
        parallel_jobs.distillation(tmp_path, report_to="nowhere")


def test_time_is_told(tmp_path: Path) -> None:
    trainer = parallel_jobs.distillation(tmp_path, max_steps=3, per_device_train_batch_size=4)
    shown = io.StringIO()
    trainer.train()
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert set(callbacks.TIMING) <= line.keys()
        shares = [line[name] for name in callbacks.SHARES]
        assert all(share >= 0 for share in shares) and 0.2 < sum(shares) <= 1.001
        assert line["time_teacher"] < line["time_student"]  # one forward against several with a way back
        assert line["tokens_per_second"] == pytest.approx(64 * line["samples_per_second"], rel=1e-3)
        assert 0 < line["peak_memory_gib"] < 100
        print(callbacks.speed(line), file=shown)
    assert "samples/s" in shown.getvalue() and "teacher" in shown.getvalue() and "GiB" in shown.getvalue()


def test_a_span_within_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0, *(float(x) for x in (1, 2, 5, 9)), 10.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch(torch.device("cpu"))
    with watch.span("loss"), watch.span("teacher"):
        pass
    assert watch.take() == ({"loss": 1.0 + 4.0, "teacher": 3.0}, 10.0)


def _spoil(trainer: Any, steps: set[int]) -> None:
    original = trainer.loss_parts

    def parts(model: nn.Module, x_0: Tensor, keys: Tensor) -> Any:
        found = original(model, x_0, keys)
        if trainer.state.global_step in steps:
            found["loss"] = found["loss"] * torch.nan
            found.per_sample["marginal_data"][1] = torch.inf
        return found

    trainer.loss_parts = parts


def test_a_bad_step_is_skipped_as_if_it_had_never_been(tmp_path: Path) -> None:
    trainer = parallel_jobs.distillation(tmp_path, max_steps=6, logging_steps=2, non_finite="skip", weight_decay=0.1)
    _spoil(trainer, {3})
    kept: dict[int, dict[str, Tensor]] = {}

    class Keep(parallel_jobs.Gradient):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept[state.global_step] = {name: value.clone() for name, value in kwargs["model"].state_dict().items()}

    trainer.add_callback(Keep())
    with pytest.warns(UserWarning, match="skipped: loss part marginal_data is not finite at step 4 of 6, example"):
        trainer.train()
    assert all(torch.equal(value, kept[4][name]) for name, value in kept[3].items())
    assert not torch.equal(kept[5]["head.weight"], kept[4]["head.weight"])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(
        math.isfinite(value) for line in lines for value in callbacks.untimed(line).values() if value != "student"
    )


def test_skipping_is_given_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(non_finite, "LIMIT", 2)
    trainer = parallel_jobs.distillation(tmp_path, max_steps=8, non_finite="skip")
    _spoil(trainer, set(range(1, 8)))
    with pytest.warns(UserWarning, match="step skipped"), pytest.raises(NonFiniteLossError, match="2 steps before it"):
        trainer.train()
    assert len(list((tmp_path / "non_finite").iterdir())) == 3


def test_replay_computes_exactly_that_batch(tmp_path: Path) -> None:
    """Dropout, the average as target and an overflow that is the weights' own: the same figures from the file alone."""
    settings = {"dropout": 0.2, "max_steps": 4, "consistency_target": "ema", "per_device_train_batch_size": 4}
    trainer = parallel_jobs.distillation(tmp_path, **settings)
    told: dict[str, Tensor] = {}
    original = trainer.loss_parts

    def parts(model: nn.Module, x_0: Tensor, keys: Tensor) -> Any:
        if trainer.state.global_step == 2:
            with torch.no_grad():
                trainer.model.head.weight[3].fill_(torch.inf)
        found = original(model, x_0, keys)
        if trainer.state.global_step == 2:
            told.update(found.per_sample)
        return found

    trainer.loss_parts = parts  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError, match=r"is not finite at step 3 of 4.*kept for --replay in ") as error:
        trainer.train()
    (file,) = (tmp_path / "non_finite").iterdir()
    assert str(file) in str(error.value)
    again = parallel_jobs.distillation(tmp_path / "again", **settings)
    seen: list[Any] = []
    listen = again.loss_parts
    again.loss_parts = lambda *args: seen.append(listen(*args)) or seen[-1]  # type: ignore[method-assign]
    report = again.replay(file)
    assert told.keys() == seen[0].per_sample.keys()
    for name, value in told.items():
        assert torch.equal(value.nan_to_num(7e7), seen[0].per_sample[name].nan_to_num(7e7)), name
    assert "step 3 of the student, 4 samples" in report and "marginal_data" in report and "nan" in report
    assert not list((tmp_path / "again").iterdir())
    for bad, message in ((tmp_path / "metrics.jsonl", "is no file of a loss"), (tmp_path / "nowhere", "is no file of")):
        with pytest.raises(ValueError, match=message):
            again.replay(bad)
    again.phase = "sdtt"
    with pytest.raises(ValueError, match="is of the 'student', this trains the 'sdtt'"):
        again.replay(file)


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path: Path) -> None:
    trainer = parallel_jobs.distillation(tmp_path, save_steps=1, max_steps=3, save_total_limit=3)
    trainer.train()
    assert checkpoints.latest_whole(tmp_path) == tmp_path / "checkpoint-3"
    optimizer = tmp_path / "checkpoint-3" / "optimizer.pt"
    whole = optimizer.read_bytes()
    optimizer.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"checkpoint-3 is passed over: .*optimizer\.pt: truncated or damaged"):
        assert checkpoints.latest_whole(tmp_path) == tmp_path / "checkpoint-2"
    average = tmp_path / "checkpoint-2" / "ema" / "model.safetensors"
    flipped = bytearray(average.read_bytes())
    flipped[-3] ^= 1  # one bit of one weight
    average.write_bytes(flipped)
    with pytest.warns(UserWarning) as told:
        assert checkpoints.latest_whole(tmp_path) == tmp_path / "checkpoint-1"
    assert "ema/model.safetensors: damaged, its SHA-256" in str(told[1].message)
    (tmp_path / "checkpoint-1" / "running.json").unlink()
    missing = pytest.warns(UserWarning, match=r"running\.json: is missing")
    with missing, pytest.raises(ValueError, match="none of the 3"):
        checkpoints.latest_whole(tmp_path)
    assert checkpoints.latest_whole(tmp_path / "checkpoint-1") is None
    (tmp_path / "checkpoint-1" / manifest.NAME).write_text('{"../../thesis.txt": [1, "0"]}')
    with pytest.raises(ValueError, match="outside the checkpoint"):
        manifest.verify(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": "offload"}, "offload is unknown here"),
        ({"fsdp": "full_shard", "fsdp_config": {"version": 1}}, "version is unknown here"),
        ({"deepspeed": "zero.json"}, "--deepspeed zero.json: is not for this trainer"),
        ({"fp16": True}, "--fp16: a CPU would compute in float32"),
        ({"non_finite": "ignore"}, "--non_finite 'ignore': must be stop or skip"),
        ({"latent_processes": 0}, "--latent_processes 0: must be at least 1"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_latents_need_their_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--latent_processes 2: there are 1 processes"):
        parallel_jobs.distillation(tmp_path, latent_processes=2)
