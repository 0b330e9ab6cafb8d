"""Where the commands of the documentation run: the files they name, and how each is made small."""

from __future__ import annotations

import importlib
import json
import runpy
import shlex
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
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
}
QUIET = ["--use_cpu", "--disable_tqdm"]
TRAINED = [*QUIET, "--max_steps", "2", "--warmup_steps", "0"]
EVALUATED = ["--eval_num_samples", "12", "--eval_num_steps", "1", "2", "--eval_seeds", "0", "--eval_batch_size", "12"]
TEACHER = ["--teacher_max_steps", "2", "--teacher_per_device_train_batch_size", "8", "--teacher_warmup_steps", "0"]
STUDENT = ["--per_device_train_batch_size", "4", "--num_latents", "2", "--num_targets", "2"]
PIXELS = ["--dataset_name", "grey.npz", "--num_states", "16"]
UNET = {"base_channels": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "attention_scales": [1], "time_embed_dim": 4}
VQ = {
    **{"num_codes": 12, "embed_dim": 4, "base_channels": 4, "ch_mult": [1, 1], "num_res_blocks": 1},
    **{"attention_scales": [], "z_channels": 4},
}
TOKENS = {
    **{"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_size": 8, "embedding_std": 0.3, "mask_logit": False},
    **{"latent_embed_dim": 4, "latent_hidden_size": 8},
}
COMPACT = {"hidden_size": 16, "num_blocks": 1}


def _config(prefix: str, settings: dict[str, Any]) -> list[str]:
    return [f"--{prefix}model_config", json.dumps(settings)]


def _distilled(settings: dict[str, Any], *more: str) -> list[str]:
    return [*TRAINED, *TEACHER, *STUDENT, *EVALUATED, *_config("teacher_", settings), *more]


# By command and preset: what is added behind a command's own words.
SMALLER: dict[tuple[str, str | None], list[str]] = {
    ("distill", None): _distilled(COMPACT),
    ("distill", "pixels_small"): _distilled(UNET, *PIXELS, "--hybrid", "1"),
    ("distill", "tokens_small"): _distilled(TOKENS, "--dataset_name", "grey.npz"),
    ("pretrain", None): [*TRAINED, *_config("", COMPACT)],
    ("pretrain", "pixels_small"): [*TRAINED, *_config("", UNET)],
    ("pretrain vq", "tokens_small"): [*TRAINED, *_config("", VQ), "--dataset_name", "grey.npz"],
    ("pretrain codes", "tokens_small"): [*QUIET, "--dataset_name", "grey.npz"],
    ("evaluate", None): EVALUATED,
    ("sample", None): ["--num_samples", "4"],
    ("env", None): [],
}


class Shelf:
    """A folder in which commands run one after another, each once, as a reader would run them."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.done: set[str] = set()
        rng = np.random.default_rng(0)
        labels = np.arange(60) % 3
        images = rng.integers(0, 100, (60, 8, 8)) + 100 * (labels[:, None, None] == np.arange(8)[:, None] // 3)
        np.savez(folder / "grey.npz", images=images, labels=labels)
        np.savez(folder / "images.npz", images=images // 13)
        self._pictures(images)
        torch.save(laid_out(by_formula(ch_mult=[1, 2]), ddp=True), folder / "ckpt_0001999999.pt")
        torch.save(maskgit(tokens_by_formula()), folder / "MaskGIT_ImageNet_256.pth")
        torch.save({"state_dict": vq_by_formula().state_dict()}, folder / "last.ckpt")

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
        elif words[0] == "python":
            with mock.patch("sys.argv", words[1:]):
                runpy.run_path(str(self.root / words[1]), run_name="__main__")
        else:
            raise AssertionError(f"no test runs {line!r}")

    def _module(self, name: str, argv: list[str]) -> None:
        preset = argv[argv.index("--preset") + 1] if "--preset" in argv else None
        kind = f"{name} {argv[argv.index('--kind') + 1]}" if "--kind" in argv else name
        main = importlib.import_module(f"di4c_ext.{name}").main
        if name == "convert":
            size = {"ckpt": SIZE, "Mask": SMALL, "last": SMALL_VQ}[argv[argv.index("--checkpoint") + 1][:4]]
            more = ["--model_config", json.dumps(size)]
        else:
            more = SMALLER[kind, preset] if (kind, preset) in SMALLER else SMALLER[kind, None]
        with mock.patch("di4c_ext.metrics.judge.classifier", partial(classifier, steps=20)):
            assert main([*argv, *more]) in (0, None), shlex.join(argv)
