"""Settings of the Di4C objective: their checks, and the times and the weight in time that hang on nothing else."""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.loss_presets import PRESETS

DataLaw = Literal["sigmoid", "linear", "constant"]
StepLaw = Literal["uniform", "log_uniform"]
Settings = TypeVar("Settings", bound="LossSettings")


@dataclass(frozen=True)
class LossSettings:
    """What `Di4CObjective` is told. Defaults suit absorbing diffusion.

    num_latents         L, latents of the student at x_t per sample
    num_targets         K, targets of consistency per sample, None for L. A target costs a whole forward of its own at
                        x_u, a latent only scores them, so K < L saves much of a step
    distillation        weight of L_distil
    distillation_rows   0: L_distil is taken at x_t, where t falls into the window. R: over R rows of its own to each
                        sample, at tau = time_min for half of them and uniform in [time_min, window] for the others;
                        t is then uniform in [time_min + step, 1], and window_share has no say
    data                scale of a(t); a(t) = data * law(t)
    data_law            'sigmoid': sigmoid(20 (t - 1/2)), 'linear': t, 'constant': 1
    data_marginal       weight of L_data's KL to the teacher's marginals
    consistency         weight of L_consis
    control_variate     False: -a(t) LME_l sum_d log p_l^d(x_0^d) and the same at xhat_j, no KL of marginals
    target_dropout      True: dropout also acts on the targets, as published. By default it does not: one mask is
                        shared by all positions, and the student would learn its noise as if it were correlation
    clean_positions     True: positions that x_t already tells count in every term as all others, and the targets' laws
                        and samples there are the network's own, as published for image tokens, whose teacher gives
                        a visible code less than all probability. By default they are left out: a step keeps
                        them, so that what a student says there is never used, and in the correlations it is noise
    time_min            no t, u or tau lies below: where sampling ends, and a teacher may know nothing beyond
    window              L_distil acts at t <= window, L_consis above
    window_share        how often t falls into the window; t is uniform in (time_min, window] or in (window, 1]
    full_noise_share    how often t is 1 exactly, the first state of every sampler; counts towards t > window
    time_grid           None, or T: t is rounded up to the next of 1/T, 2/T, ..., 1
    step_min, step_max  bounds of the teacher's step t - u, which near time_min is also held to step_share
    step_share          the largest share of t - time_min that a step takes; 1 lets it end at time_min
    step_law            how the step is spread between them, 'uniform' or 'log_uniform'
    latent_micro_batch  None, or of how many latents a sample the student's activations may live at once: the same
                        loss and gradient for one more forward of the student (`micro_batch`)
    diagnostics         measure how the student uses its latents
    fused               False: the same values, to rounding, by one op for each term in place of one for all of them
    """

    num_latents: int = 16
    num_targets: int | None = None
    distillation: float = 1.0
    distillation_rows: int = 0
    data: float = 0.1
    data_law: DataLaw = "sigmoid"
    data_marginal: float = 1.0
    consistency: float = 1.0
    control_variate: bool = True
    target_dropout: bool = False
    clean_positions: bool = False
    time_min: float = 0.0
    window: float = 0.05
    window_share: float = 0.3
    full_noise_share: float = 0.0
    time_grid: int | None = None
    step_min: float = 0.01
    step_max: float = 0.05
    step_share: float = 0.5
    step_law: StepLaw = "uniform"
    latent_micro_batch: int | None = None
    diagnostics: bool = True
    fused: bool = True

    def __post_init__(self) -> None:
        for name in ("num_latents", "num_targets", "time_grid", "latent_micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Di4CObjective: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("distillation", "data", "data_marginal", "consistency"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Di4CObjective: {name} is a weight, finite and >= 0, got {getattr(self, name)}")
        for name, law in (("data_law", DataLaw), ("step_law", StepLaw)):
            if getattr(self, name) not in get_args(law):
                raise ValueError(f"Di4CObjective: {name} must be one of {get_args(law)}, got {getattr(self, name)!r}")
        if not 0 < self.window < 1:
            raise ValueError(f"Di4CObjective: window must lie in (0, 1), got {self.window}")
        if not 0 <= self.time_min < self.window:
            raise ValueError(f"Di4CObjective: time_min must lie in [0, window = {self.window}), got {self.time_min}")
        if self.distillation_rows < 0:
            raise ValueError(f"Di4CObjective: distillation_rows must be at least 0, got {self.distillation_rows}")
        if self.distillation_rows and not 0 < self.time_min < 1 - self.step_max:
            raise ValueError(
                "Di4CObjective: distillation_rows want 0 < time_min < 1 - step_max, half of them lie at time_min, "
                f"got time_min {self.time_min} and step_max {self.step_max}"
            )
        if min(self.window_share, self.full_noise_share) < 0 or not self.window_share + self.full_noise_share <= 1:
            raise ValueError(
                "Di4CObjective: window_share and full_noise_share are shares of the samples, >= 0 and together at most "
                f"1, got {self.window_share} and {self.full_noise_share}"
            )
        if not 0 < self.step_share <= 1:
            raise ValueError(f"Di4CObjective: step_share must lie in (0, 1], got {self.step_share}")
        if not 0 < self.step_min <= self.step_max <= 1:
            raise ValueError(
                f"Di4CObjective: 0 < step_min <= step_max <= 1 wanted, got {self.step_min} and {self.step_max}"
            )

    @classmethod
    def preset(cls: type[Settings], name: str, **settings: Any) -> Settings:
        """The published settings of a system, those given here on top. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"Di4CObjective: unknown preset {name!r}; known are {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | settings)

    def draw_times(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """t and u, time_min < u < t <= 1, float64 (B,) each: functions of a sample's key alone."""
        v, w = (1 - random.uniform(keys, 2)).unbind(1)  # in (0, 1], so that t > time_min
        if self.step_law == "uniform":
            step = self.step_min + (self.step_max - self.step_min) * w
        else:
            step = self.step_min * (self.step_max / self.step_min) ** w
        # One draw decides where t falls and, rescaled within its share, the place there; a share of 0 is never hit.
        low, share = (self.time_min + step, 0.0) if self.distillation_rows else (self.window, self.window_share)
        rest = 1 - share - self.full_noise_share
        inside = self.time_min + (self.window - self.time_min) * v / max(share, 1e-300)
        outside = low + (1 - low) * (v - share) / max(rest, 1e-300)
        t = torch.where(v <= share, inside, outside.clamp(max=1))
        if self.time_grid is not None:
            t = torch.ceil(t * self.time_grid) / self.time_grid
        return t, t - (step if self.distillation_rows else torch.minimum(step, self.step_share * (t - self.time_min)))

    def draw_row_times(self, keys: Tensor) -> Tensor:
        """tau, float64 (B, R): functions of a sample's key alone."""
        coin, place = random.uniform(keys, 2 * self.distillation_rows).chunk(2, 1)
        return self.time_min + torch.where(coin < 0.5, 0.0, (self.window - self.time_min) * place)

    def data_weight(self, t: Tensor) -> Tensor:
        """a(t), of the shape of t."""
        if self.data_law == "sigmoid":
            return self.data * torch.sigmoid(20 * (t - 0.5))
        return self.data * (t if self.data_law == "linear" else torch.ones_like(t))
