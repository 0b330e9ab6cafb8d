"""The commands under torchrun and accelerate launch: two processes, one folder, one report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import di4c_ext
from di4c_ext import checkpoints
from di4c_ext.callbacks import read_metrics
from di4c_ext.models import CompactDenoiser

QUICK = ("--preset", "digits_smoke", "--use_cpu", "--logging_steps", "1")


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
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1)
    precision = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0)
    words = ("-m", "di4c_ext.pretrain", *QUICK, "--max_steps", 2, "--ema_decay", 0.5, "--output_dir", output)
    done = _launch(tmp_path, *launcher, *precision, *words)
    assert done.stdout.count("teacher in ") == 1
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == [1, 2]
    assert (output / "checkpoint-2" / "rng_state_1.pth").is_file()
