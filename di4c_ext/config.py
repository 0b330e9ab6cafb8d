"""Settings of training: transformers' TrainingArguments, and what this package adds to them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import TrainingArguments
from typing_extensions import Self

from di4c_ext.arguments import as_dict
from di4c_ext.batches import Share
from di4c_ext.few_step import FewStepObjective
from di4c_ext.loss import Di4CObjective
from di4c_ext.non_finite import POLICIES

TIME_MIN = 0.01  # where the published samplers of levels end


@functools.cache
def _launched_to_cut() -> bool:
    """Whether `accelerate launch --use_fsdp` started this; its own wrapper is not to see that."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if launched:
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    return launched


@dataclass
class KeyedConfig(TrainingArguments):
    """TrainingArguments with this package's defaults; every flag of transformers works."""

    output_dir: str = field(default="runs/digits", metadata={"help": "folder of the results and checkpoints"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    logging_steps: float = field(default=25, metadata={"help": "steps between two lines of metrics.jsonl"})
    save_steps: float = field(default=500, metadata={"help": "steps between two checkpoints"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept, the newest"})
    report_to: str = field(default="none", metadata={"help": "trackers, e.g. tensorboard, wandb"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave false: columns are used by name"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "leave false: NaN stops the run"})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "drop the last batch of an epoch if smaller"})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "pin host memory for the copy to a GPU"})
    ema_decay: float = field(default=0.0, metadata={"help": "moving average of the weights; 0: none"})
    label_dropout: float = field(
        default=0.1, metadata={"help": "share of the images of codes whose class is not told, for guidance"}
    )
    augment_share: float = field(default=0.0, metadata={"help": "share of the images altered; the network is told"})
    channels_last: bool = field(
        default=True, metadata={"help": "keep the U-Net's maps channel by channel at each pixel: faster"}
    )
    non_finite: str = field(
        default="stop", metadata={"help": "a loss that is not finite: stop the run, or skip the step"}
    )

    def __post_init__(self) -> None:
        if self.non_finite not in POLICIES:
            raise ValueError(f"--non_finite {self.non_finite!r}: must be {' or '.join(POLICIES)}")
        if not 0 <= self.augment_share <= 1:
            raise ValueError(f"--augment_share {self.augment_share}: must lie in [0, 1]")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"--label_dropout {self.label_dropout}: must lie in [0, 1], e.g. 0.1")
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.deepspeed:
            raise ValueError(
                f"--deepspeed {self.deepspeed}: is not for this trainer; give --fsdp to cut the parameters"
            )
        self.shard, self.reshard = self._sharding()
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("--fp16: a CPU would compute in float32 all the same; give --bf16, or leave it out")
        # The Trainer's own way asks the network for it; ours works on the blocks of any.
        names = ("activation_checkpointing", "gradient_checkpointing")
        self.checkpoint_blocks = any(getattr(self, name, False) for name in names)
        for name in names:
            if hasattr(self, name):
                setattr(self, name, False)
        self._n_gpu = min(self.n_gpu, 1)  # several GPUs are several processes here

    def changed(self, **settings: Any) -> Self:
        """These settings with some of them changed, and checked anew; what our own wrapper was told stays."""
        made = replace(self, **settings)
        made.shard, made.reshard, made.checkpoint_blocks = self.shard, self.reshard, self.checkpoint_blocks
        return made

    def _sharding(self) -> tuple[bool, bool]:
        """Whether --fsdp, or the launcher, wants parameters cut, and whether they are let go after each forward pass.

        The Trainer is not told: the wrapper is ours (`engine`), on CPU and GPU alike.
        """
        words = str(self.fsdp or "").replace(",", " ").lower().split()
        config = as_dict("fsdp_config", self.fsdp_config)
        wrong = set(words) - {"true", "full_shard", "shard_grad_op", "auto_wrap", "false"} or (
            set(config) - {"version", "reshard_after_forward"}
        )
        if wrong or config.get("version", 2) != 2:
            raise ValueError(
                f"--fsdp {self.fsdp} --fsdp_config {config}: {', '.join(sorted(wrong)) or 'version'} is unknown here; "
                "known are full_shard, shard_grad_op and, in the config, reshard_after_forward"
            )
        self.fsdp = self.fsdp_config = None
        wanted = _launched_to_cut() or bool(set(words) - {"false"})
        return wanted, bool(config.get("reshard_after_forward", "shard_grad_op" not in words))

    def share(self) -> Share:
        """This process's part of every global batch; neighbours that share latents have the same."""
        together: int = getattr(self, "latent_processes", 1)
        return Share(
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
            max(1, self.world_size // together),
            self.process_index // together,
        )


@dataclass
class PretrainConfig(KeyedConfig):
    """Settings of the teacher's training."""

    output_dir: str = field(default="runs/teacher", metadata={"help": "folder of the teacher and its checkpoints"})
    max_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "examples per step and device"})
    ema_decay: float = field(default=0.999, metadata={"help": "moving average of the weights; 0: none"})
    time_min: float = field(default=TIME_MIN, metadata={"help": "gaussian and uniform: no time lies below"})
    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "JSON: settings of the network's config, models.CompactConfig for example, e.g. '{\"dropout\": 0}'"
        },
    )

    def __post_init__(self) -> None:
        self.model_config = as_dict("model_config", self.model_config)
        if self.max_steps < 1:
            raise ValueError(f"--max_steps {self.max_steps}: must be at least 1")
        if not 0 <= self.time_min < 1:
            raise ValueError(f"--time_min {self.time_min}: must lie in [0, 1), e.g. {TIME_MIN}")
        super().__post_init__()


@dataclass
class DistillConfig(KeyedConfig):
    """Settings of the student's training; the objective's are explained in `di4c_ext.loss.Di4CObjective`."""

    base_learning_rate: float | None = field(
        default=None, metadata={"help": "rate of the weights copied from the teacher; default: learning_rate"}
    )
    num_latents: int = field(default=16, metadata={"help": "L, latents per sample"})
    num_targets: int | None = field(default=None, metadata={"help": "K, consistency targets per sample; default: L"})
    distillation_weight: float = field(default=1.0, metadata={"help": "weight of the distillation term"})
    distillation_rows: int = field(
        default=0, metadata={"help": "rows of the distillation term apart from x_t, per sample; 0: taken at x_t"}
    )
    data_weight: float = field(default=0.1, metadata={"help": "scale of the correlation at the data"})
    data_law: str = field(default="sigmoid", metadata={"help": "its course in t: sigmoid, linear or constant"})
    data_marginal_weight: float = field(default=1.0, metadata={"help": "weight of the KL to the teacher's marginals"})
    consistency_weight: float = field(default=1.0, metadata={"help": "weight of the consistency term"})
    consistency_target: str = field(default="student", metadata={"help": "denoiser at u: student, or its ema"})
    control_variate: bool = field(default=True, metadata={"help": "false: plain mixture likelihoods"})
    target_dropout: bool = field(default=False, metadata={"help": "dropout acts on the targets too, as published"})
    clean_positions: bool = field(
        default=False, metadata={"help": "positions that x_t tells count too, as published for codes"}
    )
    time_min: float = field(default=0.0, metadata={"help": "no time lies below"})
    window: float = field(default=0.05, metadata={"help": "distillation acts at t up to this, consistency above"})
    window_share: float = field(default=0.3, metadata={"help": "how often t falls into the window"})
    full_noise_share: float = field(default=0.0, metadata={"help": "how often t is exactly 1"})
    time_grid: int | None = field(
        default=None, metadata={"help": "T: times are 1/T, 2/T, ..., 1, as published for language; default: all times"}
    )
    step_min: float = field(default=0.01, metadata={"help": "shortest teacher step t - u"})
    step_max: float = field(default=0.05, metadata={"help": "longest teacher step t - u"})
    step_share: float = field(default=0.5, metadata={"help": "the largest share of t - time_min that a step takes"})
    step_law: str = field(default="uniform", metadata={"help": "spread between them: uniform or log_uniform"})
    latent_micro_batch: int | None = field(
        default=None, metadata={"help": "latents whose activations live at once; default: all. Less memory, more time"}
    )
    few_step_counts: list[int] = field(
        default_factory=lambda: [0],
        metadata={
            "help": "latent_form chain: numbers of sampling steps by whose likelihood the student is trained, e.g. 4 8 "
            "16, in place of the objective that draws latents; window and its share act as there; 0: none"
        },
    )
    consistency_share: float = field(
        default=0.0, metadata={"help": "few_step_counts: share of the samples made by the teacher and the student"}
    )
    latent_processes: int = field(
        default=1,
        metadata={"help": "processes that share the latents of their samples, so that L can grow; 1: none do"},
    )

    def __post_init__(self) -> None:
        if self.latent_processes < 1:
            raise ValueError(f"--latent_processes {self.latent_processes}: must be at least 1")
        if self.latent_processes > 1 and self.by_few_steps:
            raise ValueError(
                f"--latent_processes {self.latent_processes}: with --few_step_counts no latents are drawn that "
                "processes could share; give 1"
            )
        if self.num_latents < 1:
            raise ValueError(f"--num_latents {self.num_latents}: must be at least 1, e.g. 16")
        if self.base_learning_rate is not None and not 0 <= self.base_learning_rate < float("inf"):
            raise ValueError(f"--base_learning_rate {self.base_learning_rate}: must be finite and >= 0")
        if self.consistency_target not in ("student", "ema"):
            raise ValueError(f"--consistency_target {self.consistency_target!r}: must be student or ema")
        if self.consistency_target == "ema" and not self.ema_decay:
            raise ValueError("--consistency_target ema: needs a moving average, e.g. --ema_decay 0.99")
        self.objective()
        super().__post_init__()

    @property
    def by_few_steps(self) -> bool:
        """Whether the student is trained by the likelihood of few steps."""
        return self.few_step_counts != [0]

    def objective(self) -> Di4CObjective | FewStepObjective:
        """The loss with these settings; raises ValueError for those it cannot have."""
        if self.by_few_steps:
            return FewStepObjective(
                num_steps=tuple(self.few_step_counts),
                consistency_share=self.consistency_share,
                window=self.window,
                window_share=self.window_share,
                distillation=self.distillation_weight,
            )
        return Di4CObjective(
            num_latents=self.num_latents,
            num_targets=self.num_targets,
            distillation=self.distillation_weight,
            distillation_rows=self.distillation_rows,
            data=self.data_weight,
            data_law=self.data_law,  # type: ignore[arg-type]  # checked there
            data_marginal=self.data_marginal_weight,
            consistency=self.consistency_weight,
            control_variate=self.control_variate,
            target_dropout=self.target_dropout,
            clean_positions=self.clean_positions,
            time_min=self.time_min,
            window=self.window,
            window_share=self.window_share,
            full_noise_share=self.full_noise_share,
            time_grid=self.time_grid,
            step_min=self.step_min,
            step_max=self.step_max,
            step_share=self.step_share,
            step_law=self.step_law,  # type: ignore[arg-type]  # checked there
            latent_micro_batch=self.latent_micro_batch,
        )
