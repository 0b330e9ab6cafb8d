"""Where the commands of the documentation run: the files they name, and how each is made small."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import dits
import language
import numpy as np
import torch
from commands import COMPACT, DIT, TOKENS, UNET, VQ, as_words
from safetensors.torch import save_file
from test_convert import SIZE, laid_out
from test_convert_tokens import maskgit
from token_models import SMALL, SMALL_VQ, tokens_by_formula, vq_by_formula
from unets import by_formula

from di4c_ext.metrics.features import classifier

# What is run elsewhere anyway: the file that does so, and a piece of its text.
ELSEWHERE = {
    "make distill": (".ci/run", "make distill WHEEL="),
    "make test": (".ci/run", "make test WHEEL="),
    "make docs": (".ci/run", "make docs WHEEL="),
    "bash .ci/run": (".ci/run", "DI4C_CUDA=on"),
    "pip install .": (".ci/run", 'pip" wheel -q .'),
    "pip install '.[all]'": ("Makefile", '"$(WHEEL)[$(1)]"'),
    "python python/plain_loop.py": ("tests/test_method.py", '"plain_loop.py"'),
    "python -m di4c_ext.distill --output_dir runs/mine --replay FILE": ("tests/test_replay.py", '"--replay", found[1]'),
}
QUIET = ["--use_cpu", "--disable_tqdm", "true"]
TRAINED = [*QUIET, "--max_steps", "2", "--warmup_steps", "0", "--per_device_train_batch_size", "4"]
EVALUATED = ["--eval_num_samples", "12", "--eval_num_steps", "1", "2", "--eval_seeds", "0", "--eval_batch_size", "12"]
MEASURED = [*EVALUATED, "--eval_num_bootstraps", "2", "--eval_num_turns", "1", "--eval_num_bounded", "2"]
TEACHER = ["--teacher_max_steps", "2", "--teacher_per_device_train_batch_size", "8", "--teacher_warmup_steps", "0"]
STUDENT = ["--num_latents", "2", "--num_targets", "2"]
PIXELS = ["--dataset_name", "images.npz", "--num_states", "16"]
GREY = ["--dataset_name", "grey.npz", "--num_states", "256"]


def _taught(settings: dict[str, Any], *more: str) -> list[str]:
    return [*TRAINED, *as_words({"model_config": settings}), *more]


def _distilled(settings: dict[str, Any], *more: str) -> list[str]:
    return [*TRAINED, *TEACHER, *STUDENT, *EVALUATED, *as_words({"teacher_model_config": settings}), *more]


# By command and preset or model: what is added behind a command's own words.
SMALLER: dict[tuple[str, str | None], list[str]] = {
    ("distill", None): _distilled(COMPACT),
    ("distill", "pixels_small"): _distilled(UNET, *PIXELS, "--hybrid", "1"),
    ("distill", "tokens_small"): _distilled(TOKENS, *GREY),
    ("pretrain", None): _taught(COMPACT),
    ("pretrain", "pixels_small"): _taught(UNET),
    ("pretrain vq", "tokens_small"): _taught(VQ, *GREY),
    ("pretrain codes", "tokens_small"): [*QUIET, *GREY],
    ("pretrain", "language_small"): _taught(DIT),
    ("pretrain masked-lm", None): [*TRAINED, "--block_size", "12"],
    ("distill", "language_small"): [*TRAINED, *STUDENT, *EVALUATED],
    ("distill", "masked_lm"): [*TRAINED, *STUDENT, *EVALUATED],
    ("evaluate", "runs/pixels"): [*MEASURED, *PIXELS],
    ("evaluate", "runs/tokens"): [*MEASURED, *GREY],
    ("evaluate", None): MEASURED,
    ("sample", None): ["--num_samples", "4"],
    ("env", None): [],
}

# Runs that a page takes for made.
RUNS = {
    "runs/digits": "python -m di4c_ext.distill --output_dir runs/digits",
    "runs/pixels": "python -m di4c_ext.distill --preset pixels_small --output_dir runs/pixels",
}
# The published files, and the settings of networks smaller than theirs.
SIZES = {
    "ckpt_0001999999.pt": SIZE,
    "MaskGIT_ImageNet_256.pth": SMALL,
    "last.ckpt": SMALL_VQ,
    "mdlm.safetensors": {"length": dits.SMALL["length"]},
}


class Shelf:
    """A folder in which commands run one after another, each once, as a reader would run them."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.done: set[str] = set()
        rng = np.random.default_rng(0)
        labels = np.arange(60) % 10
        images = rng.integers(0, 100, (60, 8, 8)) + 10 * labels[:, None, None]
        np.savez(folder / "grey.npz", images=images, labels=labels)
        np.savez(folder / "images.npz", images=images // 13)
        (folder / "mine.yaml").write_text("num_latents: 2\n")
        self._pictures(images)
        torch.save(laid_out(by_formula(ch_mult=[1, 2]), ddp=True), folder / "ckpt_0001999999.pt")
        torch.save(maskgit(tokens_by_formula()), folder / "MaskGIT_ImageNet_256.pth")
        torch.save({"state_dict": vq_by_formula().state_dict()}, folder / "last.ckpt")
        weights = dits.by_formula().backbone.state_dict()
        save_file({f"backbone.{name}": weight.clone() for name, weight in weights.items()}, folder / "mdlm.safetensors")
        language.save("bert", folder / "bert")
        (folder / "story.txt").write_text("\n\n".join([" ".join(language.WORDS) * 5] * 60))

    def _pictures(self, images: np.ndarray) -> None:
        from PIL import Image

        (self.folder / "my_pictures").mkdir()
        for i, image in enumerate(images.astype(np.uint8)):
            Image.fromarray(image).save(self.folder / "my_pictures" / f"{i:02d}.png")

    def run(self, words: list[str]) -> None:
        """Runs one command, unless it was run before; it must end well."""
        line = shlex.join(words)
        if line in self.done:
            return
        self.done.add(line)
        if words[:2] == ["python", "-m"]:
            self._module(words[2].removeprefix("di4c_ext."), words[3:])
        elif words[0] == "pytest":
            self._process("-m", "pytest", str(self.root / words[1]), *words[2:], "-k", "test_random_bits")
        elif words[0] == "python":
            self._process(str(self.root / words[1]), *words[2:])
        else:
            raise AssertionError(f"no test runs {line!r}")

    def _process(self, *words: str) -> None:
        # As in a reader's shell: a program finds the modules beside it, which the Makefile's own setting forbids.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _module(self, name: str, argv: list[str]) -> None:
        told = next((argv[argv.index(flag) + 1] for flag in ("--preset", "--model") if flag in argv), None)
        if told in RUNS and not (self.folder / told).exists():
            self.run(shlex.split(RUNS[told]))
        kind = f"{name} {argv[argv.index('--kind') + 1]}" if "--kind" in argv else name
        main = importlib.import_module(f"di4c_ext.{name}").main
        if name == "convert":
            more = ["--model_config", json.dumps(SIZES[argv[argv.index("--checkpoint") + 1]])]
        else:
            more = SMALLER.get((kind, told)) or SMALLER[kind, None]
        with mock.patch("di4c_ext.metrics.judge.classifier", partial(classifier, steps=20)):
            assert main([*argv, *more]) in (0, None), shlex.join(argv)
