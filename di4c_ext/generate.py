"""Samples of a saved or trained model, by the sampler of its process.

    model = open_model("runs/pixels")
    tokens = generate(model, 10, 64, seed=0)                                                       # (64, D)
    tokens = generate(model, 10, 64, seed=0, teacher=teacher, options=SamplingArguments(hybrid=2))

Masked models are sampled by ancestral steps, the pixel systems by analytic ones and a last denoising, image tokens by
confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.denoiser import Denoiser
from di4c_ext.models.base import MixtureDenoiser, role
from di4c_ext.process import AbsorbingProcess, ConfidenceProcess, GaussianProcess
from di4c_ext.sampler import (
    GuidedDenoiser,
    analytic_times,
    sample_analytic,
    sample_ancestral,
    sample_confidence,
    sample_hybrid,
    sample_tau_leaping,
    times,
)
from di4c_ext.sampler.analytic import Final
from di4c_ext.sampler.confidence import Randomize
from di4c_ext.systems import latents_of, load_model, num_classes_of, process_of

SAMPLERS = ("auto", "ancestral", "analytic", "tau_leaping", "confidence")
SILENT = 5.0  # seconds of sampling before a bar is shown


@dataclass
class SamplingArguments:
    """How a model is sampled; the defaults are those of the published systems."""

    sampler: str = field(
        default="auto",
        metadata={
            "help": "auto: ancestral of masked models, analytic of pixel models, confidence of image tokens; "
            "tau_leaping: pixel teachers"
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "below 1: likelier states, 0: the likeliest"})
    final: str = field(default="argmax", metadata={"help": "last denoising of the analytic sampler: argmax or draw"})
    last_latents: int = field(default=1, metadata={"help": "latents a student tries at its last evaluation"})
    hybrid: int = field(default=0, metadata={"help": "evaluations that the teacher takes over at the end"})
    guidance: float | None = field(
        default=None, metadata={"help": "c of teacher + c (student - teacher) on logits; 1 is the student"}
    )

    class_guidance: float = field(
        default=0.0,
        metadata={"help": "image tokens: w, logits (1 + w) of the class - w of no class, w growing by step"},
    )
    teacher_guides: bool = field(
        default=False, metadata={"help": "the logits of no class are the teacher's, not the student's own"}
    )
    gumbel: float = field(default=4.5, metadata={"help": "image tokens: noise of the order at the first step"})
    randomize: str = field(
        default="linear", metadata={"help": "image tokens, how the order is drawn: linear, warm_up, random or none"}
    )

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"--sampler {self.sampler!r}: must be one of {', '.join(SAMPLERS)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature}: must be finite and >= 0; 1 leaves the model alone")
        if self.final not in get_args(Final):
            raise ValueError(f"--final {self.final!r}: must be one of {', '.join(get_args(Final))}")
        if self.last_latents < 1:
            raise ValueError(f"--last_latents {self.last_latents}: must be at least 1")
        if self.hybrid < 0:
            raise ValueError(f"--hybrid {self.hybrid}: must be at least 0, evaluations of the teacher")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"--guidance {self.guidance}: must be finite; 1 is the student unguided")

        for name in ("class_guidance", "gumbel"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: must be finite and >= 0")
        if self.randomize not in get_args(Randomize):
            raise ValueError(f"--randomize {self.randomize!r}: must be one of {', '.join(get_args(Randomize))}")
        if self.teacher_guides and not self.class_guidance:
            raise ValueError("--teacher_guides: there is nothing to guide by; give --class_guidance, e.g. 3")

    @property
    def wants_teacher(self) -> bool:
        return self.hybrid > 0 or self.guidance is not None or self.teacher_guides

    @property
    def wanted(self) -> str:
        """The flag that wants a teacher."""
        if self.teacher_guides:
            return "--teacher_guides"
        return f"--hybrid {self.hybrid}" if self.hybrid else f"--guidance {self.guidance:g}"


_PLAIN = SamplingArguments()


def open_model(folder: str | Path, is_student: bool | None = None) -> MixtureDenoiser:
    """A saved teacher or student, on the GPU where there is one; raises ValueError naming what is bad or not wanted."""
    model: Any = load_model(folder, is_student)
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
    options: SamplingArguments = _PLAIN,
    labels: Tensor | None = None,
) -> Tensor:
    """(N, D) int64 samples on the CPU, each by `num_steps` evaluations of the network.

    Sample i is a function of (model, teacher, options, num_steps, seed, i): not of the batch size, nor of how many are
    asked for, up to a draw that falls within the rounding of a network on another batch. teacher: for options.hybrid
    and options.guidance, which evaluates both networks each time; options.last_latents = K adds K - 1 evaluations.

    labels (N,): the classes of the images, for a network that takes some; left out, all of them in turn.

    A U-Net on a CPU is left in channels_last, in which it samples faster (that of the preset pixels_small 1.1 to 1.2
    times). Sampling that takes more than a few seconds shows a bar. Raises ValueError as `check_sampling` does.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples {num_samples}, batch_size {batch_size}: each must be at least 1")
    check_sampling(model, num_steps, teacher=teacher, options=options)
    told = _labels(model.config, num_samples, labels)
    networks: tuple[Any, ...] = (model, teacher)
    for network in networks:
        if network is not None and network.device.type == "cpu" and any(p.ndim == 4 for p in network.parameters()):
            network.to(memory_format=torch.channels_last)
    from tqdm.auto import tqdm

    batches = random.keys(seed, num_samples, device=model.device).split(batch_size)
    with tqdm(
        total=len(batches) * num_steps, desc="sampling", unit="evaluation", delay=SILENT, leave=False, mininterval=1
    ) as bar:
        draw = _sampler(model, teacher, num_steps, options, lambda seen: bar.update())
        if told is None:
            return torch.cat([draw(keys, None).cpu() for keys in batches])
        classes = told.to(model.device).split(batch_size)
        return torch.cat([draw(*both).cpu() for both in zip(batches, classes, strict=True)])


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


def sampler_of(model: MixtureDenoiser, options: SamplingArguments = _PLAIN) -> str:
    """The sampler that `auto` means for this model, or the one named."""
    if options.sampler != "auto":
        return options.sampler
    process = process_of(model.config)
    if isinstance(process, ConfidenceProcess):
        return "confidence"
    return "ancestral" if isinstance(process, AbsorbingProcess) else "analytic"


def check_sampling(
    model: MixtureDenoiser,
    num_steps: int,
    *,
    teacher: MixtureDenoiser | None = None,
    options: SamplingArguments = _PLAIN,
) -> None:
    """Raises ValueError, in the words of the flags, for options that do not fit the model, its teacher or num_steps."""
    config, process, sampler = model.config, process_of(model.config), sampler_of(model, options)
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps}: must be at least 1, evaluations of the network")
    if teacher is not None:
        check_fit(model, teacher)
    if options.wants_teacher:
        wanted = options.wanted
        if not config.is_student:
            raise ValueError(f"{wanted}: wants a student beside its teacher, the model is a teacher")
        if teacher is None:
            raise ValueError(f"{wanted}: needs the teacher; name its folder by --teacher")
        if options.hybrid and options.guidance is not None:
            raise ValueError(f"--hybrid {options.hybrid} --guidance {options.guidance:g}: give one of them")
    if options.hybrid > num_steps:
        raise ValueError(f"--hybrid {options.hybrid}: more evaluations of the teacher than the {num_steps} there are")
    if options.hybrid and sampler != "analytic":
        raise ValueError(f"--hybrid {options.hybrid}: is for the analytic sampler of pixel models, not for {sampler}")
    if options.guidance is not None and sampler == "confidence":
        raise ValueError(
            f"--guidance {options.guidance:g}: is between student and teacher, for the samplers of pixels; "
            "image tokens have --class_guidance"
        )
    _check_confidence(model, sampler, options)
    if isinstance(process, AbsorbingProcess) and sampler not in ("ancestral", "confidence"):
        raise ValueError(f"--sampler {sampler}: this model is masked, it takes ancestral; leave the flag out")
    if sampler != "analytic" and options.final != "argmax":
        raise ValueError(f"--final {options.final}: is for the analytic sampler, not for {sampler}; leave it out")
    if options.last_latents > 1:
        if not config.is_student:
            raise ValueError(f"--last_latents {options.last_latents}: a teacher has no latents; leave the flag out")
        if sampler != "analytic" or options.hybrid:
            by = "a hybrid, whose last evaluation is the teacher's" if options.hybrid else sampler
            raise ValueError(f"--last_latents {options.last_latents}: is for the analytic sampler, not for {by}")
    if sampler == "tau_leaping":
        if config.is_student or not isinstance(process, GaussianProcess):
            kind = f"a {role(config.is_student)} of {type(process).__name__}"
            raise ValueError(f"--sampler tau_leaping: is for teachers of GaussianProcess, this is {kind}")
        if options.temperature != 1:
            raise ValueError(f"--temperature {options.temperature:g}: tau_leaping has none; leave it at 1")


def _check_confidence(model: MixtureDenoiser, sampler: str, options: SamplingArguments) -> None:
    """ValueError for options of image tokens that this model does not take, and for the others where it takes these."""
    is_tokens = isinstance(process_of(model.config), ConfidenceProcess)
    if is_tokens != (sampler == "confidence"):
        what = (
            "is of image tokens, it takes confidence" if is_tokens else "is of pixels, confidence is for image tokens"
        )
        raise ValueError(f"--sampler {sampler}: this model {what}; leave the flag out")
    for name in ("class_guidance", "gumbel", "randomize"):
        value = getattr(options, name)
        if not is_tokens and value != getattr(_PLAIN, name):
            raise ValueError(f"--{name} {value}: is for image tokens, this is another model; leave it out")
    if options.class_guidance and not num_classes_of(model.config):
        raise ValueError(f"--class_guidance {options.class_guidance:g}: this network was trained without classes")


def check_fit(model: MixtureDenoiser, teacher: MixtureDenoiser) -> None:
    """Raises ValueError naming the mismatch unless `teacher` is a teacher of the student's states, size and process."""
    mine, theirs = model.config, teacher.config
    if not mine.is_student or theirs.is_student:
        raise ValueError(
            f"--teacher: a student and its teacher are wanted, got a {role(mine.is_student)} as the model and a "
            f"{role(theirs.is_student)} as its teacher"
        )
    if (mine.num_states, mine.length) != (theirs.num_states, theirs.length):
        raise ValueError(
            f"--teacher: has S = {theirs.num_states}, D = {theirs.length}, the student S = {mine.num_states}, "
            f"D = {mine.length}; give the teacher it was made from"
        )
    told, wanted = repr(process_of(theirs)), repr(process_of(mine))
    if told != wanted:
        raise ValueError(f"--teacher: was trained for {told}, the student for {wanted}; give the one it was made from")


def _sampler(
    model: MixtureDenoiser,
    teacher: MixtureDenoiser | None,
    num_steps: int,
    options: SamplingArguments,
    callback: Callable[[dict[str, Any]], None],
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """keys (B,), labels (B,) or None -> samples (B, D)."""
    process: Any = process_of(model.config)
    sampler, source = sampler_of(model, options), latents_of(model.config)
    latents = None if source is None else lambda keys: source(keys, 1)[:, 0]
    denoiser: Denoiser = model
    if options.guidance is not None and teacher is not None:
        denoiser = GuidedDenoiser(model, teacher, options.guidance)

    def draw(keys: Tensor, labels: Tensor | None) -> Tensor:
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
                gumbel=options.gumbel,
                randomize=options.randomize,  # type: ignore[arg-type]  # checked where it was given
                **shared,
            )
        if sampler == "ancestral":
            return sample_ancestral(denoiser, process, x, times(num_steps), keys, **shared)
        grid = analytic_times(num_steps)
        if sampler == "tau_leaping":
            return sample_tau_leaping(denoiser, process, x, grid, keys, callback=callback)
        shared["final"] = options.final
        if options.hybrid and teacher is not None:
            return sample_hybrid(
                denoiser, teacher, process, x, grid, keys, teacher_evaluations=options.hybrid, **shared
            )
        return sample_analytic(denoiser, process, x, grid, keys, last_latents=options.last_latents, **shared)

    return draw
