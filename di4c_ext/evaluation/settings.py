"""The flags of measuring: those a training run has for its end, and the more of the command that only measures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class EvaluationArguments:
    """How samples are measured after training."""

    eval_num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 64], metadata={"help": "sampling steps to measure"}
    )
    eval_num_samples: int = field(default=1000, metadata={"help": "samples per figure"})
    eval_seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "sampling seeds, all reported"})
    eval_batch_size: int = field(default=500, metadata={"help": "samples at a time; changes no figure"})
    eval_num_bootstraps: int = field(
        default=0, metadata={"help": "times that samples are drawn anew for the interval of a figure; 0: no intervals"}
    )
    eval_num_turns: int = field(
        default=0, metadata={"help": "times that the latency of one sample is taken; 0: that of batches alone"}
    )
    eval_feature_extractor: str | None = field(
        default=None,
        metadata={
            "help": "feature space: inception-v3-compat, efficientnet-lite0, an image classifier of transformers, a "
            "TorchScript file or package.module:attribute (both with --trust_remote_code); default: a classifier of "
            "the images' own labels"
        },
    )
    eval_causal_lm: str | None = field(
        default=None,
        metadata={"help": "text: the causal model whose perplexity is measured: smollm2, a folder, file or hub name"},
    )
    eval_num_judged: int = field(default=128, metadata={"help": "text: samples that this model reads"})
    eval_dtype: str = field(default="float32", metadata={"help": "text: what it computes in, float32 or bfloat16"})
    eval_protocol: str = field(
        default="retokenized",
        metadata={"help": "text: how perplexity is taken: retokenized, first_chunk (MDLM) or ids (SDTT)"},
    )
    eval_num_bounded: int = field(
        default=0,
        metadata={"help": "text: held-out blocks on which the likelihood of what few steps make is bounded; 0: none"},
    )

    def __post_init__(self) -> None:
        for steps in self.eval_num_steps:
            if steps < 1:
                raise ValueError(f"--eval_num_steps {steps}: must be at least 1")
        if self.eval_num_samples < 2:
            raise ValueError(f"--eval_num_samples {self.eval_num_samples}: must be at least 2, better 1000")
        for name in ("eval_batch_size", "eval_num_judged"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("eval_num_bootstraps", "eval_num_turns", "eval_num_bounded"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 0, which turns it off")
        for name in ("eval_num_steps", "eval_seeds"):
            _refuse_twice(name, getattr(self, name))


@dataclass
class MeasuringArguments(EvaluationArguments):
    """How samples are measured, thoroughly, where nothing else is done."""

    eval_num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 64],
        metadata={"help": "sampling steps to measure", "aliases": ["--num_steps"]},
    )
    eval_num_bootstraps: int = field(
        default=200,
        metadata={"help": "times that samples are drawn anew for the interval of a figure; 0: no intervals"},
    )
    eval_num_turns: int = field(
        default=20,
        metadata={"help": "times that latencies are taken, of one sample and, in turns, of both models; 0: not"},
    )
    eval_num_bounded: int = field(
        default=64,
        metadata={"help": "text: held-out blocks on which the likelihood of what few steps make is bounded; 0: none"},
    )
    eval_temperatures: list[float] = field(
        default_factory=list,
        metadata={"help": "temperatures beside --temperature, for the comparison at equal entropy: e.g. 0.8 0.9 1.1"},
    )
    eval_num_latents: int = field(
        default=64, metadata={"help": "latents of the mixture whose correlation and use are measured"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for temperature in self.eval_temperatures:
            if not 0 < temperature < math.inf:
                raise ValueError(f"--eval_temperatures {temperature:g}: each must be finite and above 0")
        _refuse_twice("eval_temperatures", self.eval_temperatures)
        if self.eval_num_latents < 2:
            raise ValueError(f"--eval_num_latents {self.eval_num_latents}: must be at least 2, better 64")


def _refuse_twice(name: str, values: list[int] | list[float]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"--{name} {' '.join(map(str, values))}: names one value twice")
