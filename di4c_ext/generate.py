"""Samples of a saved or trained model, by the sampler of its process.

    model = open_model("runs/pixels")
    tokens = generate(model, 10, 64, seed=0)                                                       # (64, D)
    tokens = generate(model, 10, 64, seed=0, teacher=teacher, options=SamplingArguments(hybrid=2))

    tokens = generate(model, 8, 4, seed=0, start=start)                        # text where `start` (4, D) has the mask

Masked models are sampled by ancestral steps, the pixel systems by analytic ones and a last denoising, image tokens by
confidence; the flags are in `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.denoiser import Denoiser
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import (
    GuidedDenoiser,
    analytic_times,
    sample_analytic,
    sample_ancestral,
    sample_confidence,
    sample_first_hitting,
    sample_hybrid,
    sample_tau_leaping,
    times,
)
from di4c_ext.sampling import PLAIN, SamplingArguments, check_fit, check_sampling, sampler_of
from di4c_ext.systems import latents_of, load_model, num_classes_of, process_of

__all__ = ["SamplingArguments", "check_fit", "check_sampling", "generate", "open_model", "sampler_of"]

SILENT = 5.0  # seconds of sampling before a bar is shown
LAST_MASKED = 1e-5  # where the analytic sampler of masked models ends, as published


def open_model(folder: str | Path, is_student: bool | None = None, trust_remote_code: bool = False) -> MixtureDenoiser:
    """A saved teacher or student, on the GPU where there is one; raises ValueError naming what is bad or not wanted."""
    model: Any = load_model(folder, is_student, trust_remote_code)
    opened: MixtureDenoiser = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return opened


def generate(
    model: MixtureDenoiser,
    num_steps: int,
    num_samples: int,
    *,
    seed: int,
    batch_size: int = 500,
    teacher: MixtureDenoiser | None = None,
    options: SamplingArguments = PLAIN,
    labels: Tensor | None = None,
    start: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """(N, D) int64 samples on the CPU, each by `num_steps` evaluations of the network.

    Sample i is a function of (model, teacher, options, num_steps, seed, i): not of the batch size, nor of how many are
    asked for, up to a draw that falls within the rounding of a network on another batch. teacher: for options.hybrid
    and options.guidance, which evaluates both networks each time; options.last_latents = K adds K - 1 evaluations.

    start (N, D): for masked models, what to begin from: the mask where something is to be sampled, and states that stay
    as they are, a prefix or any others (infilling). D may be less than the model's length. Left out, all is masked.
    attention_mask (N, D): for masked language models, 0 where a sequence of `start` is filled up; such positions hold
    a state, any but the mask. first_hitting makes as many evaluations as there are masks, whatever num_steps.

    labels (N,): the classes of the images, for a network that takes some; left out, all of them in turn.

    A U-Net on a CPU is left in channels_last, in which it samples faster (that of the preset pixels_small 1.1 to 1.2
    times). Sampling that takes more than a few seconds shows a bar. Raises ValueError as `check_sampling` does.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples {num_samples}, batch_size {batch_size}: each must be at least 1")
    check_sampling(model, num_steps, teacher=teacher, options=options)
    told = _labels(model.config, num_samples, labels)
    begin = _start(model, num_samples, start, attention_mask)
    networks: tuple[Any, ...] = (model, teacher)
    for network in networks:
        if network is not None and network.device.type == "cpu" and any(p.ndim == 4 for p in network.parameters()):
            network.to(memory_format=torch.channels_last)
    from tqdm.auto import tqdm

    keys = random.keys(seed, num_samples, device=model.device)
    batches = []
    for rows in torch.arange(num_samples).split(batch_size):
        rest = (None if x is None else x[rows].to(model.device) for x in (told, begin, attention_mask))
        batches.append(_Batch(keys[rows.to(keys.device)], *rest))
    total = sum(_evaluations(model, num_steps, options, batch) for batch in batches)
    with tqdm(total=total, desc="sampling", unit="evaluation", delay=SILENT, leave=False, mininterval=1) as bar:
        draw = _sampler(model, teacher, num_steps, options, lambda seen: bar.update())
        return torch.cat([draw(batch).cpu() for batch in batches])


class _Batch(NamedTuple):
    """Some of the samples, on the model's device."""

    keys: Tensor  # (B,)
    labels: Tensor | None  # (B,)
    start: Tensor | None  # (B, D)
    attention_mask: Tensor | None  # (B, D)


def _evaluations(model: MixtureDenoiser, num_steps: int, options: SamplingArguments, batch: _Batch) -> int:
    """How many evaluations of the network a batch takes."""
    if sampler_of(model, options) != "first_hitting":
        return num_steps
    if batch.start is None:
        return int(model.config.length)
    return int((batch.start == model.config.mask_id).sum(1).max())


def _start(
    model: MixtureDenoiser, num_samples: int, start: Tensor | None, attention_mask: Tensor | None
) -> Tensor | None:
    """Where the samples begin, checked; ValueError for what this model cannot begin from."""
    config, process = model.config, process_of(model.config)
    if attention_mask is not None:
        if config.model_type != "di4c_masked_lm":
            raise ValueError(
                f"attention_mask: a {config.model_type} attends to every position; give sequences of one length"
            )
        if start is None or attention_mask.shape != start.shape:
            got = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask: goes with start and has its shape (N, D), got {got}")
    if start is None:
        if config.length is None:
            raise ValueError("start: this model has no length of its own; give (N, D) tokens, masks to be sampled")
        return None
    if not isinstance(process, AbsorbingProcess):
        raise ValueError(f"start: is for masked models, this one was trained for {process!r}; leave it out")
    longest = start.shape[1] if config.length is None or start.ndim != 2 else config.length
    if start.ndim != 2 or start.dtype != torch.int64 or len(start) != num_samples or not 0 < start.shape[1] <= longest:
        raise ValueError(
            f"start: must be int64 (N, D) with N = {num_samples} samples and D from 1 to {longest}, "
            f"got {start.dtype} {tuple(start.shape)}"
        )
    known = (start == process.mask_id) | ((start >= 0) & (start < process.num_states))
    if not bool(known.all()):
        raise ValueError(
            f"start: must hold states 0..{process.num_states - 1} and the mask {process.mask_id}, "
            f"got {int(start[~known][0])}"
        )
    if attention_mask is not None and bool(((attention_mask == 0) & (start == process.mask_id)).any()):
        raise ValueError("start: holds masks where attention_mask is 0; fill sequences up with any other state")
    return start


def _labels(config: Any, num_samples: int, labels: Tensor | None) -> Tensor | None:
    """The classes of the samples, checked; None for a network that takes none."""
    number = num_classes_of(config)
    if not number:
        if labels is not None:
            raise ValueError("labels: this network was trained without classes; leave them out")
        return None
    if labels is None:
        return torch.arange(num_samples) % number
    if labels.shape != (num_samples,):
        raise ValueError(f"labels: one for each of the {num_samples} samples is wanted, got {tuple(labels.shape)}")
    config.check_labels(labels)
    return labels


def _sampler(
    model: MixtureDenoiser,
    teacher: MixtureDenoiser | None,
    num_steps: int,
    options: SamplingArguments,
    callback: Callable[[dict[str, Any]], None],
) -> Callable[[_Batch], Tensor]:
    """A batch -> its samples (B, D)."""
    process: Any = process_of(model.config)
    sampler, source = sampler_of(model, options), latents_of(model.config)
    latents = None if source is None else lambda keys: source(keys, 1)[:, 0]
    denoiser: Denoiser = model
    if options.guidance is not None and teacher is not None:
        denoiser = GuidedDenoiser(model, teacher, options.guidance)

    def draw(batch: _Batch) -> Tensor:
        keys, labels, x, attention_mask = batch
        if x is None:
            x = process.prior((len(keys), model.config.length), keys)
        shared: dict[str, Any] = {"latents": latents, "temperature": options.temperature, "callback": callback}
        if sampler == "confidence":
            guide = teacher if options.teacher_guides and teacher is not None else model
            return sample_confidence(
                denoiser if labels is None else partial(denoiser, labels=labels),
                process,
                x,
                num_steps,
                keys,
                unconditional=partial(guide, drop_label=True) if options.class_guidance else None,
                guidance=options.class_guidance,
                hybrid=options.teacher_guides,
                schedule=options.reveal_schedule,
                gumbel=options.gumbel,
                randomize=options.randomize,  # type: ignore[arg-type]  # checked where it was given
                **shared,
            )
        grid = analytic_times(num_steps)
        if sampler == "tau_leaping":
            return sample_tau_leaping(denoiser, process, x, grid, keys, callback=callback)
        shared["top_p"] = options.top_p
        told = {} if attention_mask is None else {"attention_mask": attention_mask}
        if sampler == "ancestral":
            shared["skip_idle"] = options.skip_idle
            return sample_ancestral(denoiser, process, x, times(num_steps), keys, conditions=told, **shared)
        if sampler == "first_hitting":
            return sample_first_hitting(denoiser, process, x, keys, conditions=told, **shared)
        shared["final"] = options.final
        if isinstance(process, AbsorbingProcess):
            grid = analytic_times(num_steps + 1, LAST_MASKED)
            return sample_analytic(denoiser, process, x, grid, keys, conditions=told, **shared)
        if options.hybrid and teacher is not None:
            return sample_hybrid(
                denoiser, teacher, process, x, grid, keys, teacher_evaluations=options.hybrid, **shared
            )
        return sample_analytic(denoiser, process, x, grid, keys, last_latents=options.last_latents, **shared)

    return draw
