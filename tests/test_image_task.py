"""What a run about images is measured by: the feature space that is named, its consent, and how many are looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unets import by_formula

from di4c_ext import data, evaluate, image_task, lazy_rows
from di4c_ext.arguments import DataArguments
from di4c_ext.evaluate import EvaluationArguments
from di4c_ext.task import open_task
from di4c_ext.text_arguments import TextArguments

OWN = """
from torch import nn

class Means(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network of the user's; the cache is a new one."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    return f"{name}:Means"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 16, (60, 8, 8)))
    return tmp_path / "images.npz"


def test_consent_reaches_the_judge_of_a_run(own: str, images: Path) -> None:
    about = DataArguments(dataset_name=str(images), num_states=16, process="gaussian")
    args = EvaluationArguments(eval_feature_extractor=own, eval_num_samples=20)
    judge = open_task(about, TextArguments(trust_remote_code=True)).open_judge(args)
    assert {"frechet_features", "kid", "coverage"} <= set(judge.floors)
    with pytest.raises(ValueError, match="code of its own"):
        open_task(about, TextArguments()).open_judge(args)


def test_by_the_command(
    own: str,
    images: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With consent rows have the network's figures and their intervals; what real images score is kept."""
    monkeypatch.setattr("di4c_ext.report.evaluation_page.page", lambda facts: "")  # whose charts take the longest
    by_formula(num_channels=1).save_pretrained(tmp_path / "teacher")
    words = ["--model", tmp_path / "teacher", "--dataset_name", images, "--eval_feature_extractor", own]
    words += ["--eval_num_steps", 1, "--eval_num_samples", 20, "--eval_seeds", 0, "--eval_num_bootstraps", 5]
    assert "read that code, and if you trust it" in refused(evaluate.main, *words)
    words += ["--eval_num_turns", 0, "--trust_remote_code", "true", "--output_dir", tmp_path / "evaluation"]
    assert evaluate.main([str(word) for word in words]) == 0
    floors, row = (json.loads(line) for line in capsys.readouterr().out.splitlines()[:2])
    for figure in ("frechet_features", "kid", "precision_k", "recall_k", "density", "coverage"):
        assert row[f"{figure}_low"] <= row[figure] <= row[f"{figure}_high"] and figure in floors["floors"], figure
    assert len(list((tmp_path / "cache").glob("reference-*.safetensors"))) == 1


def test_some_of_the_images_that_memory_does_not_hold(own: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_task, "JUDGED", 12)
    args = EvaluationArguments(eval_feature_extractor=own, eval_num_samples=5)
    train, heldout = data.split(data.load(str(images), num_states=16), 1 / 6)
    assert image_task.open_judge(train, heldout, args, True).sizes == {"all": 60, "train": 50, "heldout": 10}
    source = lazy_rows.Joined(train.tokens, heldout.tokens)
    every = data.from_arrays(np.zeros((60, 8, 8), np.int64), num_states=16)
    lazy = data.split(replace(every, tokens=lazy_rows.LazyRows(source)), 1 / 6)
    assert image_task.open_judge(*lazy, args, True).sizes == {"all": 22, "train": 12, "heldout": 10}
