"""Samples a teacher and its student at several numbers of steps and measures both.

    python -m di4c_ext.evaluate --model runs/digits --eval_num_steps 1 2 4

Every figure is measured per seed on the same number of samples, and stands beside what real images score against
real images ("floor"). References are all real images, and the held-out ones alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from di4c_ext import checkpoints, data, random
from di4c_ext.arguments import DataArguments, UsageError, parse, run
from di4c_ext.metrics import Moments, frechet_distance, position_entropy, unigram_entropy
from di4c_ext.metrics.features import Classifier, classifier
from di4c_ext.metrics.mixture import correlation_gain
from di4c_ext.models import CompactDenoiser, draw_latents
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import sample_ancestral, times

MAX_PIXEL_DIMENSION = 1024  # beyond it the eigenvalues of the pixels' covariance take longer than the sampling
LATENT_IMAGES = 100  # held-out images on which the student's latents are measured


@dataclass
class EvaluationArguments:
    """How samples are measured after training."""

    eval_num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 64], metadata={"help": "sampling steps to measure"}
    )
    eval_num_samples: int = field(default=1000, metadata={"help": "samples per figure"})
    eval_seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "sampling seeds, all reported"})
    eval_batch_size: int = field(default=500, metadata={"help": "samples at a time; changes no figure"})

    def __post_init__(self) -> None:
        for steps in self.eval_num_steps:
            if steps < 1:
                raise ValueError(f"--eval_num_steps {steps}: must be at least 1")
        if self.eval_num_samples < 2:
            raise ValueError(f"--eval_num_samples {self.eval_num_samples}: must be at least 2, better 1000")
        if self.eval_batch_size < 1:
            raise ValueError(f"--eval_batch_size {self.eval_batch_size}: must be at least 1")
        for name in ("eval_num_steps", "eval_seeds"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"--{name} {getattr(self, name)}: names one value twice")


class Judge:
    """The references every sample is held against, and the floors of the figures."""

    def __init__(self, train: data.ImageTokens, heldout: data.ImageTokens, cache: Path | None) -> None:
        self.num_states = train.num_states
        self.classifier: Classifier | None = None if train.labels is None else classifier(train, cache)
        self.accuracy = None if self.classifier is None else self.classifier.accuracy(heldout)
        self.has_pixels = train.length <= MAX_PIXEL_DIMENSION
        real = torch.cat([train.tokens, heldout.tokens])
        self.sizes = {"all": len(real), "train": len(train), "heldout": len(heldout)}
        self._references = {"all": self._spaces(real), "heldout": self._spaces(heldout.tokens)}
        self.floors = self._floors(real, train.tokens)

    def _spaces(self, tokens: Tensor) -> dict[str, Moments]:
        spaces = {}
        if self.classifier is not None:
            spaces["features"] = Moments(self.classifier.features(tokens))
        if self.has_pixels:
            spaces["pixels"] = Moments(tokens.double() / max(self.num_states - 1, 1))
        return spaces

    def measure(self, tokens: Tensor) -> dict[str, float]:
        """The figures of samples (N, D): distances to all real images and to the held-out ones, entropies in nats."""
        spaces = self._spaces(tokens)
        figures = {
            f"frechet_{space}" + ("_heldout" if name == "heldout" else ""): frechet_distance(moments, reference[space])
            for name, reference in self._references.items()
            for space, moments in spaces.items()
        }
        return figures | self._entropies(tokens)

    def _entropies(self, tokens: Tensor) -> dict[str, float]:
        return {
            "position_entropy": position_entropy(tokens, self.num_states),
            "unigram_entropy": unigram_entropy(tokens, self.num_states),
        }

    def _floors(self, real: Tensor, train: Tensor, splits: int = 10) -> dict[str, float]:
        """Real against real: halves of all images (mean of `splits` cuts), and training against held-out images."""
        found: dict[str, float] = {}
        for cut in range(splits):
            order = random.keys(cut, len(real)).argsort()
            half = len(real) // 2
            one, other = self._spaces(real[order[:half]]), self._spaces(real[order[half:]])
            for space in one:
                name = f"frechet_{space}"
                found[name] = found.get(name, 0.0) + frechet_distance(one[space], other[space]) / splits
        for space, moments in self._spaces(train).items():
            found[f"frechet_{space}_heldout"] = frechet_distance(moments, self._references["heldout"][space])
        return found | self._entropies(real)


def generate(
    model: CompactDenoiser,
    num_steps: int,
    num_samples: int,
    *,
    seed: int,
    batch_size: int = 500,
    temperature: float = 1.0,
) -> Tensor:
    """(N, D) int64 samples on the CPU; sample i is a function of (model, num_steps, seed, i), not of the batch size."""
    if num_steps < 1 or num_samples < 1 or batch_size < 1:
        raise ValueError(
            f"num_steps {num_steps}, num_samples {num_samples}, batch_size {batch_size}: each must be at least 1"
        )
    config = model.config
    process = AbsorbingProcess(config.num_states, config.schedule, config.mask_id)
    keys = random.keys(seed, num_samples, device=model.device)
    latents = one_latent(model)
    done = [
        sample_ancestral(
            model,
            process,
            process.prior((len(some), config.length), some),
            times(num_steps),
            some,
            latents=latents,
            temperature=temperature,
        ).cpu()
        for some in keys.split(batch_size)
    ]
    return torch.cat(done)


def one_latent(model: CompactDenoiser) -> Callable[[Tensor], Tensor] | None:
    """keys (B,) -> a latent each (B, C) for a student, None for a teacher."""
    if not model.config.is_student:
        return None
    dim = model.config.latent_dim
    return lambda keys: draw_latents(keys, 1, dim)[:, 0]


def compare(
    models: dict[str, CompactDenoiser], judge: Judge, args: EvaluationArguments, keep: int = 0
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """One row of figures for each (model, number of steps, seed), and the first `keep` samples it stands on."""
    todo = [(name, n, seed) for n in args.eval_num_steps for name in models for seed in args.eval_seeds]
    bar = tqdm(todo, desc="evaluation", unit="run", dynamic_ncols=True)
    for name, num_steps, seed in bar:
        bar.set_postfix(model=name, steps=num_steps, seed=seed, refresh=False)
        start = time.perf_counter()
        samples = generate(models[name], num_steps, args.eval_num_samples, seed=seed, batch_size=args.eval_batch_size)
        seconds = time.perf_counter() - start
        row = {"model": name, "num_steps": num_steps, "seed": seed, "num_samples": len(samples)}
        yield {**row, **judge.measure(samples), "seconds": round(seconds, 3)}, samples[:keep]


def latent_use(student: CompactDenoiser, heldout: data.ImageTokens, num_latents: int) -> list[dict[str, float]]:
    """`correlation_gain` on held-out images at some times; 1 is the first step of sampling, all still masked."""
    config = student.config
    process = AbsorbingProcess(config.num_states, config.schedule, config.mask_id)
    x_0 = heldout.tokens[:LATENT_IMAGES].long().to(student.device)
    keys = random.keys(0, len(x_0), device=student.device)
    latents = partial(draw_latents, latent_dim=config.latent_dim)
    return [
        {
            "t": t,
            "num_latents": num_latents,
            "num_images": len(x_0),
            **correlation_gain(student, process, x_0, keys, latents, num_latents=num_latents, t=t),
        }
        for t in (1.0, 0.75, 0.5, 0.25)
    ]


def open_model(folder: str | Path) -> CompactDenoiser:
    """A saved teacher or student, on the GPU where there is one; raises ValueError naming the bad file."""
    checkpoints.check_model(Path(folder))
    model: CompactDenoiser = CompactDenoiser.from_pretrained(folder)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class ModelArguments:
    """Which model is measured."""

    model: str = field(default="runs/digits", metadata={"help": "folder of a teacher or student"})
    output_file: str | None = field(default=None, metadata={"help": "write the rows here as JSON lines too"})


def main(argv: Sequence[str]) -> int:
    (model_args, images, args), _ = parse(
        "evaluate",
        [ModelArguments, DataArguments, EvaluationArguments],
        argv,
        description="Measure a teacher or a student against real images.",
    )
    model = open_model(model_args.model)
    train, heldout = data.split(images.load(), images.heldout_fraction)
    if (model.config.num_states, model.config.length) != (train.num_states, train.length):
        raise UsageError(
            f"--model {model_args.model}: has S = {model.config.num_states}, D = {model.config.length}; the images of "
            f"{train.name!r} have S = {train.num_states}, D = {train.length}; name the data it was trained on"
        )
    judge = Judge(train, heldout, checkpoints.cache_folder())
    rows = [row for row, _ in compare({"model": model}, judge, args)]
    text = "".join(json.dumps(row) + "\n" for row in [{"floors": judge.floors, "sizes": judge.sizes}, *rows])
    print(text, end="")
    if model_args.output_file is not None:
        checkpoints.write_text(Path(model_args.output_file), text)
    return 0


if __name__ == "__main__":
    run(main)
