"""A run in stages: teacher -> SDTT -> Di4C -> Di4C^2, each student the next teacher, gone on with where it was cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from di4c_ext import arguments, checkpoints, data, distill, stages
from di4c_ext.arguments import RunArguments
from di4c_ext.callbacks import read_metrics
from di4c_ext.config import DistillConfig
from di4c_ext.models import CompactConfig, CompactDenoiser
from di4c_ext.pretrain import Interrupted
from di4c_ext.process import AbsorbingProcess, ConfidenceProcess, UniformProcess
from di4c_ext.sdtt import SDTTObjective
from di4c_ext.stages import StageArguments
from di4c_ext.systems import load_model, process_of
from di4c_ext.trainer import DistillTrainer

ALL = ["sdtt", "di4c", "di4c2"]


def settings(folder: Path, **more: Any) -> DistillConfig:
    told = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2, "num_latents": 3}
    return DistillConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, ema_decay=0.5, **told | more)


def teacher() -> CompactDenoiser:
    set_seed(0)
    return CompactDenoiser(CompactConfig(hidden_size=16, num_blocks=1, dropout=0.1)).eval()


def new_student(model: Any) -> CompactDenoiser:
    set_seed(1)
    return CompactDenoiser.from_teacher(model, latent_dim=4, latent_hidden_size=8)


STAGED = {"stages": ALL, "sdtt_rounds": 2, "sdtt_step": 0.1, "stage_config": {"di4c2": {"max_steps": 3}}}


def train(
    folder: Path, options: RunArguments | None = None, told: dict[str, Any] = STAGED, **more: Any
) -> CompactDenoiser:
    made: Any = stages.train(
        stages.plan(StageArguments(**told), settings(folder, **more)),
        teacher(),
        new_student=new_student,
        process_of=process_of,
        train_dataset=data.load("digits").subset(torch.arange(24)),
        metrics_file=folder / "metrics.jsonl",
        options=options or RunArguments(),
        again="again",
        save_beside=lambda folder: (folder / "beside.txt").write_text("here"),
    )
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("stages") / "run"
    return folder, {name: value.clone() for name, value in train(folder).state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_every_stage_leaves_its_student(whole: tuple[Path, dict[str, Tensor]]) -> None:
    folder, last = whole
    names = ["sdtt-1", "sdtt-2", "di4c"]
    assert sorted(path.name for path in (folder / "stages").iterdir()) == sorted(names)
    models = {name: load_model(folder / "stages" / name) for name in names}
    assert [model.config.is_student for model in models.values()] == [False, False, True]
    assert same(load_model(folder, is_student=True).state_dict(), last)
    for at in (folder, *(folder / "stages" / name for name in names)):
        assert (at / "beside.txt").is_file()
    assert not list((folder / "stages").glob("*/checkpoint-*"))  # a finished stage's are gone
    # Each began as the one before: a few steps away, not anew.
    weights = [teacher().state_dict(), *(model.state_dict() for model in models.values()), last]
    for before, after in itertools.pairwise(weights):
        moved = [(after[name] - before[name]).abs().max().item() for name in before]
        assert 0 < max(moved) < 0.05
    kept = {name for name in last if "latent" in name}
    assert kept and kept <= set(models["di4c"].state_dict())  # the second round's latents are the first one's
    phases = [line["phase"] for line in read_metrics(folder / "metrics.jsonl")]
    assert phases == ["sdtt-1"] * 4 + ["sdtt-2"] * 4 + ["di4c"] * 4 + ["student"] * 3
    lines = read_metrics(folder / "metrics.jsonl")
    assert "divergence" in lines[0] and "marginal_consistency" not in lines[0] and "marginal_consistency" in lines[-1]


@pytest.mark.parametrize("phase", ["sdtt-2", "student"])
def test_a_run_that_was_cut_goes_on_at_its_stage(
    phase: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third step of a stage, its second one saved; and at the next start killed before its first."""
    original, trained = DistillTrainer.loss_parts, []

    def cut_at(step: int) -> Any:
        def loss_parts(self: Any, *args: Any, **kwargs: Any) -> Any:
            trained.append(self.progress.title)
            if self.progress.title == phase and self.state.global_step >= step:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        return loss_parts

    folder = tmp_path / "run"
    for options, step in ((RunArguments(), 2), (RunArguments(resume=True), 0)):
        monkeypatch.setattr(DistillTrainer, "loss_parts", cut_at(step))
        with pytest.raises(KeyboardInterrupt):
            train(folder, options)
    assert not (folder / checkpoints.WEIGHTS).exists()
    trained.clear()
    monkeypatch.setattr(DistillTrainer, "loss_parts", cut_at(100))
    assert same(train(folder, RunArguments(resume=True)).state_dict(), whole[1])
    order = ["sdtt-1", "sdtt-2", "di4c", "student"]
    assert list(dict.fromkeys(trained)) == order[order.index(phase) :]
    assert trained.count(phase) == (3 if phase == "student" else 4) - 2


def test_stages_may_differ_in_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = DistillTrainer.loss_parts, {}

    def loss_parts(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[self.progress.title] = str(self.accelerator.mixed_precision)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "loss_parts", loss_parts)
    told = {"stages": ALL, "sdtt_step": 0.1, "stage_config": {"di4c": {"bf16": True}}}
    train(tmp_path / "run", told=told, max_steps=1)
    assert seen == {"sdtt": "no", "di4c": "bf16", "student": "no"}


def test_ctrl_c_in_a_stage_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DistillTrainer.loss_parts

    def loss_parts(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.interrupt.interrupted = self.state.global_step == 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "loss_parts", loss_parts)
    with pytest.raises(Interrupted, match=r"stopped after step 2 of 4 \(sdtt-1\), all saved; go on with:\n  again"):
        train(tmp_path / "run")
    assert (tmp_path / "run" / "stages" / "sdtt-1" / "checkpoint-2").is_dir()


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan(tmp_path: Path) -> None:
    config = settings(tmp_path, base_learning_rate=1e-4, consistency_target="ema", time_grid=64, seed=5)
    told = StageArguments(
        stages=ALL,
        stage_config='{"sdtt": {"learning_rate": "3e-4", "lr_scheduler_type": "cosine"}, "di4c": {"num_latents": 7}}',
        sdtt_rounds=3,
        sdtt_divergence="tv",
    )
    plan = stages.plan(told, config)
    assert [stage.name for stage in plan] == ["sdtt-1", "sdtt-2", "sdtt-3", "di4c", "di4c2"]
    assert [str(stage.folder.relative_to(tmp_path)) for stage in plan] == [
        *(f"stages/{name}" for name in ("sdtt-1", "sdtt-2", "sdtt-3", "di4c")),
        ".",
    ]
    objectives = [stage.objective for stage in plan]
    assert objectives[:3] == [SDTTObjective(step=2**r / 1024, divergence="tv", time_grid=64) for r in range(3)]
    assert objectives[3:] == [None, None]
    first, mixture, last = plan[0].args, plan[3].args, plan[4].args
    assert first.learning_rate == 3e-4 and first.lr_scheduler_type == "cosine" and first.base_learning_rate is None
    assert first.consistency_target == "student" and last.consistency_target == "ema"
    assert (mixture.num_latents, last.num_latents) == (7, 3) and mixture.learning_rate == config.learning_rate
    assert [stage.args.seed for stage in plan] == [5, 6, 7, 8, 9]
    assert config.output_dir == str(tmp_path) and config.learning_rate == 1e-3  # as it was


def test_by_default_there_is_one_stage_with_the_runs_own_settings(tmp_path: Path) -> None:
    config = settings(tmp_path, seed=3)
    (stage,) = stages.plan(StageArguments(), config)
    assert (stage.name, stage.objective, stage.args.seed) == ("di4c", None, 3)
    assert stage.args.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"stages": ["sdt", "di4c"]}, "'sdt' must be one of sdtt, di4c, di4c2; did you mean 'sdtt'"),
        ({"stages": ["di4c", "sdtt"]}, "--stages di4c sdtt: each at most once, and in the order sdtt di4c di4c2"),
        ({"stages": ["di4c", "di4c"]}, "each at most once"),
        ({"stages": ["sdtt"]}, "di4c must be among them"),
        ({"stages": ["di4c2"]}, "di4c must be among them"),
        ({"sdtt_rounds": 0}, "--sdtt_rounds 0: must be at least 1"),
        ({"stage_config": {"sdtt": {}}}, "'sdtt' is none of --stages di4c"),
        ({"stage_config": {"di4c": 3}}, "'di4c' must be a mapping of settings, got 3"),
        ({"stage_config": {"di4c": {"max_step": 3}}}, "stage di4c has no setting 'max_step' of its own.*'max_steps'"),
        ({"stage_config": {"di4c": {"output_dir": "/"}}}, "has no setting 'output_dir' of its own"),
        ({"stage_config": {"di4c": {"max_steps": "many"}}}, "invalid int value: 'many'"),
        ({"stage_config": {"di4c": {"num_latents": 0}}}, "stage di4c: --num_latents 0: must be at least 1"),
        ({"stages": ALL, "sdtt_rounds": 12}, "stage sdtt: SDTTObjective: 2 steps of 1 must together"),
        ({"stages": ALL, "sdtt_divergence": "js"}, "stage sdtt: SDTTObjective: divergence must be one of"),
    ],
)
def test_refuses_plans(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        stages.plan(StageArguments(**told), settings(tmp_path))


def test_refuses_what_the_process_leaves_without_a_meaning(tmp_path: Path) -> None:
    plan = stages.plan(StageArguments(stages=ALL), settings(tmp_path))
    stages.check(plan, AbsorbingProcess(4))
    stages.check(stages.plan(StageArguments(), settings(tmp_path)), UniformProcess(4))
    with pytest.raises(ValueError, match=r"UniformProcess\(num_states=4, schedule='linear'\) has no masks"):
        stages.check(plan, UniformProcess(4))
    with pytest.raises(ValueError, match=r"--stages sdtt: .* the teacher is a mixture"):
        stages.check(plan, AbsorbingProcess(4), from_mixture=True)
    with pytest.raises(ValueError, match="stage di4c2: its teacher cannot be guided"):
        stages.check(plan[1:], ConfidenceProcess(4, guidance=1.0))
    rows = stages.plan(StageArguments(stages=ALL[1:]), settings(tmp_path, distillation_rows=4, time_min=0.01))
    with pytest.raises(ValueError, match=r"stage di4c2: distillation_rows .*'\{\"di4c2\": \{\"distillation_rows\": 0"):
        stages.check(rows, UniformProcess(4))


# --- the command -----------------------------------------------------------------------------------------------------


def test_one_config_runs_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A YAML file with `stages`: teacher and all three, stopped before the last one, gone on with, and measured."""
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    config, output = tmp_path / "mine.yaml", tmp_path / "run"
    config.write_text(
        "preset: digits_smoke\nstages: [sdtt, di4c, di4c2]\nsdtt_step: 0.05\nteacher_max_steps: 2\nmax_steps: 3\n"
        "stage_config: {sdtt: {max_steps: 2, learning_rate: 3e-4}, di4c2: {max_steps: 2}}\n"
        "eval_num_steps: [1]\neval_num_samples: 20\neval_seeds: [0]\nuse_cpu: true\ndisable_tqdm: true\n"
        "logging_steps: 1\n"
    )
    original = DistillTrainer.loss_parts

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.progress.title == "student":
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "loss_parts", cut)
    assert distill.main(["--config", str(config), "--output_dir", str(output)]) == 130
    assert not load_model(output / "stages" / "sdtt").config.is_student
    assert load_model(output / "stages" / "di4c").config.is_student and not (output / checkpoints.WEIGHTS).exists()

    monkeypatch.setattr(DistillTrainer, "loss_parts", original)
    capsys.readouterr()
    assert distill.main(["--resume", "--output_dir", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "stage sdtt: done" in shown and "stage di4c: done" in shown
    assert load_model(output).config.is_student
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"teacher", "student"}
    page = (output / "report.html").read_text()
    assert "SDTT, 1 round: how far" in page and "The parts of the first round" in page
    stored = arguments.read_yaml(output / "distill_config.yaml")
    assert stored["stages"] == ALL and stored["stage_config"]["di4c2"] == {"max_steps": 2}
    with pytest.raises(SystemExit):
        arguments.run(distill.main, ["--stages", "sdtt", "--output_dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
