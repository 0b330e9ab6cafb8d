"""How a model is to be sampled: the flags, what they mean for a model, and what is refused in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from di4c_ext.models.base import MixtureDenoiser, role
from di4c_ext.process import AbsorbingProcess, ConfidenceProcess, GaussianProcess
from di4c_ext.sampler.analytic import Final
from di4c_ext.sampler.confidence import SCHEDULES, Randomize
from di4c_ext.systems import num_classes_of, process_of

SAMPLERS = ("auto", "ancestral", "analytic", "tau_leaping", "confidence", "first_hitting")


@dataclass
class SamplingArguments:
    """How a model is sampled; the defaults are those of the published systems."""

    sampler: str = field(
        default="auto",
        metadata={
            "help": "auto: ancestral of masked models, analytic of pixel models, confidence of image tokens; "
            "tau_leaping: pixel teachers; first_hitting: masked teachers exactly, one token an evaluation"
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "divides the logits; below 1: likelier states, 0: the likeliest"}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "below 1: draw from the likeliest states that make up so much probability"}
    )
    skip_idle: bool = field(
        default=False,
        metadata={
            "help": "masked models: the network sees only samples of which a step unmasks something; same samples"
        },
    )
    final: str = field(default="argmax", metadata={"help": "last denoising of the analytic sampler: argmax or draw"})
    last_latents: int = field(default=1, metadata={"help": "latents a student tries at its last evaluation"})
    hybrid: int = field(default=0, metadata={"help": "evaluations that the teacher takes over at the end"})
    guidance: float | None = field(
        default=None,
        metadata={
            "help": "c of teacher + c (student - teacher) on logits; 1 is the student. Not for image tokens, whose "
            "classes are guided by --class_guidance"
        },
    )
    class_guidance: float = field(
        default=0.0,
        metadata={
            "help": "image tokens: w of logits (1 + w) of the class - w of no class, from 0 at the first step to this "
            "at the last; a published teacher is shown at 3, measured at 6 (that of a student's training: "
            "--step_guidance)"
        },
    )
    teacher_guides: bool = field(
        default=False,
        metadata={"help": "image tokens: the logits of no class are the teacher's, not the student's own"},
    )
    reveal_schedule: str | None = field(
        default=None,
        metadata={
            "help": "image tokens, how many codes a step reveals: arccos, cosine, linear, square, root; "
            "default: the schedule that the network was trained for"
        },
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
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p}: must lie in (0, 1]; 1 leaves every state in the draw")
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
        if self.reveal_schedule is not None and self.reveal_schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ValueError(f"--reveal_schedule {self.reveal_schedule!r}: must be one of {known}")
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


PLAIN = SamplingArguments()


def sampler_of(model: MixtureDenoiser, options: SamplingArguments = PLAIN) -> str:
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
    options: SamplingArguments = PLAIN,
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
    _check_masked(model, sampler, options)
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
    for name in ("class_guidance", "gumbel", "randomize", "reveal_schedule"):
        value = getattr(options, name)
        if not is_tokens and value != getattr(PLAIN, name):
            raise ValueError(f"--{name} {value}: is for image tokens, this is another model; leave it out")
    if options.class_guidance and not num_classes_of(model.config):
        raise ValueError(f"--class_guidance {options.class_guidance:g}: this network was trained without classes")


def _check_masked(model: MixtureDenoiser, sampler: str, options: SamplingArguments) -> None:
    """ValueError for samplers and options that are not for masked models, or for these alone."""
    if sampler == "tau_leaping" and options.top_p < 1:
        raise ValueError(f"--top_p {options.top_p:g}: tau_leaping has none; leave it at 1")
    if sampler == "confidence" and options.top_p < 1:
        raise ValueError(f"--top_p {options.top_p:g}: confidence has none; leave it at 1")
    is_masked = isinstance(process_of(model.config), AbsorbingProcess)
    if not is_masked and sampler == "first_hitting":
        raise ValueError("--sampler first_hitting: is for masked models, this one has no masks; leave the flag out")
    if options.skip_idle and (not is_masked or sampler != "ancestral"):
        what = f"{sampler}" if is_masked else f"{sampler} and a model without masks"
        raise ValueError(f"--skip_idle: is for the ancestral sampler of masked models, not for {what}; leave it out")
    if not is_masked or sampler == "confidence":
        return
    if sampler == "tau_leaping":
        raise ValueError(
            "--sampler tau_leaping: this model is masked, it takes ancestral, analytic or first_hitting; leave the "
            "flag out for ancestral"
        )
    if options.hybrid:
        raise ValueError(f"--hybrid {options.hybrid}: is for the analytic sampler of pixel models, this one is masked")
    if options.last_latents > 1:
        raise ValueError(f"--last_latents {options.last_latents}: is for pixel models, this one is masked")


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
