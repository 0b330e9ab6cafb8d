"""The commands under torchrun and accelerate launch: two processes, one folder, one report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import di4c_ext
from di4c_ext import checkpoints, pretrain
from di4c_ext.callbacks import read_metrics
from di4c_ext.models import CompactDenoiser

QUICK = ("--preset", "digits_smoke", "--use_cpu", "--logging_steps", "1")
ACCELERATE = ("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0)

# The command itself, which tells of everything whose parameters are cut how much of the first one lies here.
TELLING = """
from di4c_ext import arguments, engine, pretrain

cut = engine.shard_rest


def telling(module):
    cut(module)
    first = next(module.parameters())
    print(f"cut: {list(engine.local(first).shape)} of {list(first.shape)}", flush=True)


engine.shard_rest = telling
arguments.run(pretrain.main)
"""


def _launch(cache: Path, *words: object) -> subprocess.CompletedProcess[str]:
    root = str(Path(di4c_ext.__file__).parents[1])
    environment = {**os.environ, "DI4C_CACHE": str(cache), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(argv, env=environment, cwd=cache, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done


def test_torchrun_makes_one_run(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = _launch(
        tmp_path,
        *("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "di4c_ext.distill", *QUICK),
        *("--teacher_max_steps", 4, "--max_steps", 4, "--save_steps", 2, "--latent_processes", 2),
        *("--eval_num_steps", 1, "--eval_num_samples", 20, "--eval_seeds", 0, "--output_dir", output),
    )
    assert done.stdout.count("report: ") == 1
    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines if line["phase"] == "student"] == [1, 2, 3, 4]
    assert not CompactDenoiser.from_pretrained(output / "teacher").config.is_student
    assert CompactDenoiser.from_pretrained(output).config.is_student
    checkpoints.check_resumable(output / "checkpoint-4")
    assert sorted(path.name for path in (output / "checkpoint-4").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    assert len(list(tmp_path.glob("teacher-*"))) == 1  # in the cache, once


def test_accelerate_launch_makes_one_teacher(tmp_path: Path) -> None:
    output = tmp_path / "teacher"
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, *ACCELERATE)
    words = ("-m", "di4c_ext.pretrain", *QUICK, "--max_steps", 2, "--ema_decay", 0.5, "--output_dir", output)
    done = _launch(tmp_path, *launcher, *words)
    assert done.stdout.count("teacher in ") == 1
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == [1, 2]
    assert (output / "checkpoint-2" / "rng_state_1.pth").is_file()


def test_accelerate_launch_cuts_the_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--use_fsdp: each of two processes holds half of every weight, and together they train what one process does."""
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache of one"))
    shared = [*QUICK, "--disable_tqdm", "true", "--max_steps", "2", "--save_steps", "1", "--optim", "sgd"]
    shared += ["--ema_decay", "0.5", "--model_config", '{"hidden_size": 16, "num_blocks": 2, "dropout": 0.0}']
    both, one = tmp_path / "both", tmp_path / "one"
    (tmp_path / "telling.py").write_text(TELLING)
    launcher = ("accelerate.commands.launch", "--use_fsdp", "--num_processes", 2, *ACCELERATE)
    words = ("telling.py", *shared, "--per_device_train_batch_size", 4, "--output_dir", both)
    done = _launch(tmp_path, *launcher, *words)
    # The network and its average, in each of the processes.
    assert done.stdout.count("cut: [8, 2240] of [16, 2240]") == 2 * 2 and done.stdout.count("teacher in ") == 1

    assert pretrain.main([*shared, "--per_device_train_batch_size", "8", "--output_dir", str(one)]) == 0
    losses = [[line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (both, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name in ("model.safetensors", "checkpoint-2/model.safetensors", "checkpoint-2/ema/model.safetensors"):
        theirs, alone = load_file(both / name), load_file(one / name)
        assert theirs.keys() == alone.keys()
        for weight, value in alone.items():
            torch.testing.assert_close(theirs[weight], value, rtol=1e-5, atol=1e-6, msg=lambda m, w=weight: f"{w}: {m}")
    assert not torch.equal(alone["head.weight"], load_file(one / "checkpoint-1/ema/model.safetensors")["head.weight"])
    # What the two have saved is a checkpoint like any other: one process goes on from it.
    assert pretrain.main(["--resume", "--output_dir", str(both), "--max_steps", "3"]) == 0
    assert [line["step"] for line in read_metrics(both / "metrics.jsonl")] == [1, 2, 3]
