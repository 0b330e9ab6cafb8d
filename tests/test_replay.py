"""--replay FILE: a batch whose loss was not finite is computed again by the command that met it, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import COMPACT, VQ, as_words

from di4c_ext import distill, pretrain
from di4c_ext.non_finite import read

TOO_FAR = {"learning_rate": 1e38, "warmup_steps": 0}  # one such step, and the weights are no more numbers one can use
TRAINED = {"preset": "digits_smoke", "use_cpu": True, "disable_tqdm": True, "max_steps": 3}


@pytest.fixture(autouse=True)
def _cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def replayed(refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command into a loss that is not finite, and again with --replay and --output_dir alone; the report."""

    def replay(main: Callable[[list[str]], int], output: Path, phase: str, **told: Any) -> str:
        error = refused(main, *as_words(TRAINED | told | {"output_dir": output}))
        found = re.search(r"not finite at step 2 of 3, .*kept for --replay in (\S+\.safetensors)", error)
        assert found, error
        before = _contents(output)
        reports = []
        for _ in range(2):
            assert main(["--replay", found[1], "--output_dir", str(output)]) == 0
            reports.append(capsys.readouterr().out)
        assert reports[0] == reports[1] and _contents(output) == before
        batch = len(read(Path(found[1]))[0]["keys"]["keys"])
        assert f"{found[1]}: step 2 of the {phase}, {batch} samples\n" in reports[0]
        shown = dict(re.findall(r"^  (\w+) +(\S+)$", reports[0], re.M))
        named = re.search(r"loss part (.*?) is not finite", error)
        assert named and all(shown[part] in ("nan", "inf", "-inf") for part in named[1].split(", ")), (error, shown)
        return reports[0]

    return replay


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _examples(report: str) -> list[int]:
    """The numbers of the examples in the report's table."""
    return [int(line.split()[0]) for line in report.splitlines() if re.match(r" +\d+ ", line)]


def test_a_teachers_batch(replayed: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "teacher"
    report = replayed(pretrain.main, output, "teacher", model_config=COMPACT, **TOO_FAR)
    assert "nats_per_image" in report and "gradient norm" in report
    (file,) = (output / "non_finite").iterdir()
    assert _examples(report) == read(file)[0]["inputs"]["example"].tolist()


def test_a_vq_models_batch(replayed: Callable[..., str], tmp_path: Path) -> None:
    """Codes that were restarted in that very step are not restarted once more."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "grey.npz", images=rng.integers(0, 256, (40, 8, 8)))
    told = {"preset": "tokens_small", "kind": "vq", "dataset_name": tmp_path / "grey.npz", "num_states": 256}
    told |= {"restart_steps": 1, "per_device_train_batch_size": 4, "model_config": VQ}
    report = replayed(pretrain.main, tmp_path / "vq", "vq", **told, **TOO_FAR)
    assert "reconstruction" in report and "codes_used" in report


@pytest.mark.parametrize("phase", ["teacher", "sdtt", "student"])
def test_a_batch_of_a_distillation(
    phase: str, replayed: Callable[..., str], refused: Callable[..., str], tmp_path: Path
) -> None:
    """Of whatever the run was training: its teacher, a stage on the way, or the student itself."""
    output = tmp_path / "run"
    told: dict[str, Any] = {"stages": ["sdtt", "di4c"], "sdtt_step": 0.1, "teacher_max_steps": 3}
    told |= {"teacher_model_config": COMPACT, "num_latents": 2}
    if phase == "teacher":
        told |= {f"teacher_{name}": value for name, value in TOO_FAR.items()}
    else:
        told["stage_config"] = {"di4c" if phase == "student" else phase: TOO_FAR}
    report = replayed(distill.main, output, phase, **told)
    assert {"teacher": "nats_per_image", "sdtt": "divergence", "student": "marginal_consistency"}[phase] in report
    folders = {"teacher": output / "teacher", "sdtt": output / "stages" / "sdtt", "student": output}
    (file,) = (folders[phase] / "non_finite").iterdir()
    assert "no file of a loss that was not finite" in refused(
        distill.main, "--replay", output / "metrics.jsonl", "--output_dir", output
    )
    if phase == "sdtt":
        assert "holds no distill_config.yaml" in refused(distill.main, "--replay", file, "--output_dir", tmp_path)
        assert "is of the 'sdtt'" in refused(pretrain.main, *_as_teacher(output, tmp_path), "--replay", file)


def _as_teacher(run: Path, folder: Path) -> list[str]:
    """A training of a teacher that could be resumed, in `folder`."""
    (folder / "other").mkdir()
    settings = {**{k: v for k, v in TRAINED.items()}, "model_config": COMPACT}
    (folder / "other" / "pretrain_config.yaml").write_text(json.dumps(settings))
    return ["--output_dir", str(folder / "other")]
