"""The Di4C objective (arXiv 2410.08709): what turns a product teacher into a mixture student.

With L latents lambda_l per sample, p_l^d = p(x_0^d | x_t; lambda_l), pbar^d = mean_l p_l^d and LME = log-mean-exp over
the latents, the correlation a mixture gives to a sequence x is

    A(x) = LME_l sum_d log p_l^d(x^d) - sum_d log pbar^d(x^d)                        (0 for a product model)

and per sample, in nats, sums running over the positions that x_t leaves open,

    L_distil = mean_l sum_d KL(teacher^d || p_l^d)                                                t <= window
    L_data   = -a(t) A(x_0) + sum_d KL(teacher^d || pbar^d)                                       every t
    L_consis = -mean_j A(xhat_j) + sum_d KL(gbar^d || pbar^d)                                     t > window

L_distil bounds the KL to the mixture (convexity). In L_consis the teacher steps t -> u K times from one row of
logits, the student denoises each x_u with a fresh latent, g_j, and xhat_j ~ g_j; gbar = mean_j g_j. The sums of
marginal log-likelihoods that A subtracts at xhat_j are the control variate; their expectation, taken over all states,
is the KL. So L_consis has, with less variance, the gradient of -mean_j LME_l sum_d log p_l^d(xhat_j^d), while L_data
exchanges the data's marginals for the teacher's. x_t is noised data, where the theorem asks for the teacher's own
trajectory.

With `distillation_rows` the first term has noised data of its own, near time_min where sampling ends, a time, a noise
and a latent to each row, and the other two act at every t.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.loss_terms import LossParts, Rows, constant, mixture_terms, row_divergence
from di4c_ext.micro_batch import in_pieces
from di4c_ext.ops import Logits
from di4c_ext.process import Process

DataLaw = Literal["sigmoid", "linear", "constant"]
StepLaw = Literal["uniform", "log_uniform"]

# One sub-key per use of randomness, so that no two draws of a sample share their bits.
_USES = 9
_TIMES, _CORRUPT, _STEP, _LATENTS, _TARGET_LATENTS, _TARGET_TOKENS, _ROW_TIMES, _ROW_NOISE, _ROW_LATENTS = range(_USES)

# The published settings, by the name of the system.
PRESETS: dict[str, dict[str, Any]] = {
    # Discretised Gaussian diffusion of CIFAR-10's pixels. There the L latents of a sample are drawn apart, uniformly.
    "pixels": {
        "num_latents": 16,
        "data": 1.0,
        "distillation_rows": 16,
        "time_min": 0.01,
        "window": 0.02,
        "step_min": 0.001,
        "step_max": 0.01,
        "step_law": "log_uniform",
        "target_dropout": True,
    },
}


@dataclass(frozen=True)
class Di4CObjective:
    """Settings of the loss, and the loss itself when called. Defaults suit absorbing diffusion.

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
    time_min            no t, u or tau lies below: where sampling ends, and a teacher may know nothing beyond
    window              L_distil acts at t <= window, L_consis above
    window_share        how often t falls into the window; t is uniform in (time_min, window] or in (window, 1]
    full_noise_share    how often t is 1 exactly, the first state of every sampler; counts towards t > window
    step_min, step_max  bounds of the teacher's step t - u, which in the window is also held to (t - time_min) / 2
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
    time_min: float = 0.0
    window: float = 0.05
    window_share: float = 0.3
    full_noise_share: float = 0.0
    step_min: float = 0.01
    step_max: float = 0.05
    step_law: StepLaw = "uniform"
    latent_micro_batch: int | None = None
    diagnostics: bool = True
    fused: bool = True

    def __post_init__(self) -> None:
        for name in ("num_latents", "num_targets", "latent_micro_batch"):
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
        if not 0 < self.step_min <= self.step_max <= 1:
            raise ValueError(
                f"Di4CObjective: 0 < step_min <= step_max <= 1 wanted, got {self.step_min} and {self.step_max}"
            )

    @classmethod
    def preset(cls, name: str, **settings: Any) -> "Di4CObjective":
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
        return t, t - (step if self.distillation_rows else torch.minimum(step, (t - self.time_min) / 2))

    def draw_row_times(self, keys: Tensor) -> Tensor:
        """tau, float64 (B, R): functions of a sample's key alone."""
        coin, place = random.uniform(keys, 2 * self.distillation_rows).chunk(2, 1)
        return self.time_min + torch.where(coin < 0.5, 0.0, (self.window - self.time_min) * place)

    def data_weight(self, t: Tensor) -> Tensor:
        """a(t), of the shape of t."""
        if self.data_law == "sigmoid":
            return self.data * torch.sigmoid(20 * (t - 0.5))
        return self.data * (t if self.data_law == "linear" else torch.ones_like(t))

    def __call__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        process: Process,
        x_0: Tensor,
        keys: Tensor,
        *,
        latents: Latents,
        target: Denoiser | None = None,
        times: tuple[Tensor, Tensor] | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> LossParts:
        """The loss of x_0 (B, D) int64, every draw hanging on keys (B,) int64: fold the training step into them.

        latents: keys (B,), n -> (B, n, C). target: the denoiser at u, the student itself unless given (its moving
        average, say). times: t and u, (B,) each, in place of `draw_times`. conditions: (B, ...) each, what all
        denoisers are told of the samples, by the names of their arguments; distillation_rows repeat them for the rows
        of a sample, which they could not do to what is bound by a partial. With a graph the student is called at x_t,
        and at the distillation rows if there are any; the teacher is called once with a row a sample, and at those
        rows. A denoiser that gives NaN makes the parts that hang on it NaN, by name, and leaves other samples as they
        are.
        """
        if x_0.ndim != 2 or keys.shape != x_0.shape[:1]:
            raise ValueError(
                "Di4CObjective: x_0 must be (B, D) and keys (B,), one a sample, "
                f"got {tuple(x_0.shape)} and {tuple(keys.shape)}"
            )
        told = dict(conditions or {})
        key = random.fold_in(keys, torch.arange(_USES, device=keys.device)[:, None])  # (uses, B)
        t, u = self.draw_times(key[_TIMES]) if times is None else times
        x_t = process.corrupt(x_0, t, key[_CORRUPT])
        with inference(teacher, x_0.device):
            teacher_logits = constant(teacher(x_t, t.float(), **told))
        goal, samples, broken = self._consistency_target(
            student if target is None else target, process, x_t, teacher_logits, t, u, key, latents, told
        )
        at_x_t = partial(student, x_t, t.float(), **told)
        logits = in_pieces(at_x_t, self.latent_micro_batch, 1, latents=latents(key[_LATENTS], self.num_latents))
        expected = (*x_0.shape[:1], self.num_latents, *x_0.shape[1:], process.num_states)
        if logits.shape != expected:
            raise ValueError(
                f"Di4CObjective: the student must give logits (B, L, D, S) = {expected} for its L latents, "
                f"got {tuple(logits.shape)}"
            )
        return self.parts(
            logits,
            teacher=teacher_logits,
            data=x_0,
            target=goal,
            samples=samples,
            t=t,
            weight=process.weight(x_t),
            broken=broken,
            rows=self._rows(student, teacher, process, x_0, key, latents, told) if self.distillation_rows else None,
        )

    def _consistency_target(
        self,
        target: Denoiser,
        process: Process,
        x_t: Tensor,
        teacher_logits: Logits,
        t: Tensor,
        u: Tensor,
        key: Tensor,
        latents: Latents,
        told: dict[str, Tensor],
    ) -> tuple[Logits, Tensor, Tensor]:
        """g (B, K, D, S) as logits, xhat ~ g (B, K, D), and the samples whose draws failed, (B,) bool."""
        num_targets = self.num_latents if self.num_targets is None else self.num_targets
        x_u = process.step(x_t, teacher_logits, t, u, key[_STEP], draws=num_targets)
        failed = x_u < 0
        # A failed draw stays open, so that the network sees a state it knows; the sample's parts become NaN below.
        x_u = torch.where(failed, x_t[:, None], x_u)
        with inference(target, x_t.device, dropout=self.target_dropout):
            g = in_pieces(
                lambda x, latents: target(x, u.float(), latents=latents, **told),
                self.latent_micro_batch,
                1,
                x_u,
                latents=latents(key[_TARGET_LATENTS], num_targets),
            )
            g = process.carry_over(constant(g), x_u)
        samples: Any = ops.sample_categorical(g, key[_TARGET_TOKENS])
        broken = (failed | (samples < 0)).flatten(1).any(1)
        return g, samples.clamp(min=0), broken

    def _rows(
        self,
        student: Denoiser,
        teacher: Denoiser,
        process: Process,
        x_0: Tensor,
        key: Tensor,
        latents: Latents,
        told: dict[str, Tensor],
    ) -> Rows:
        """The distillation rows: times, noises and latents of their own, R to a sample."""
        number = self.distillation_rows
        # Denoisers take one time a sample, so here each row is a sample to them.
        noise = random.fold_in(key[_ROW_NOISE][:, None], torch.arange(number, device=key.device)).flatten()
        tau = self.draw_row_times(key[_ROW_TIMES]).flatten()
        x_tau = process.corrupt(x_0.repeat_interleave(number, 0), tau, noise)
        told = {name: value.repeat_interleave(number, 0) for name, value in told.items()}
        size = None if self.latent_micro_batch is None else self.latent_micro_batch * len(x_0)
        with inference(teacher, x_0.device):
            teacher_logits = constant(in_pieces(teacher, size, 0, x_tau, tau.float(), **told))
        own = latents(key[_ROW_LATENTS], number).flatten(0, 1)
        student_logits = in_pieces(student, size, 0, x_tau, tau.float(), latents=own, **told)
        return Rows(student_logits, teacher_logits, process.weight(x_tau))

    def parts(
        self,
        logits: Logits,
        *,
        teacher: Logits,
        data: Tensor,
        target: Logits,
        samples: Tensor,
        t: Tensor,
        weight: Tensor | None = None,
        broken: Tensor | None = None,
        rows: Rows | None = None,
    ) -> LossParts:
        """The loss of what the denoisers said, wherever it was drawn.

        Args:
            logits: (B, L, D, S), the student at x_t with L latents.
            teacher: (B, D, S), at x_t.
            data: x_0 (B, D). target, samples: g (B, K, D, S) at u as logits and xhat ~ g (B, K, D); constants.
            t: (B,). weight: (B, D), 0 where x_t tells x_0; None for 1 everywhere.
            broken: (B,) bool, samples whose draws failed: their consistency becomes NaN.
            rows: what L_distil is taken of where it has rows of its own.
        """
        if (rows is None) == bool(self.distillation_rows):
            raise ValueError(
                f"Di4CObjective: rows go with distillation_rows, got {'none' if rows is None else 'some'} "
                f"and distillation_rows {self.distillation_rows}"
            )
        inside = t <= self.window if rows is None else torch.zeros_like(t, dtype=torch.bool)
        terms = mixture_terms(
            logits,
            teacher=teacher,
            data=data,
            samples=samples,
            target=target if self.control_variate else None,
            weight=weight,
            inside=inside,
            information=self.diagnostics,
            fused=self.fused,
        )
        a = self.data_weight(t).to(terms.joint_data.dtype)

        def consistency(value: Tensor) -> Tensor:
            # Inside the window nothing hangs on the targets.
            value = value if broken is None else torch.where(broken, torch.nan, value)
            return self.consistency * torch.where(inside, 0.0, value)

        distillation = terms.distillation
        if rows is not None:
            distillation = row_divergence(rows).unflatten(0, (len(data), -1)).mean(1)
        gain = terms.correlation_samples.mean(1)
        parts = {"distillation": self.distillation * distillation}
        if self.control_variate:
            parts["correlation_data"] = -a * terms.correlation_data
            parts["marginal_data"] = self.data_marginal * terms.marginal_teacher
            parts["correlation_consistency"] = -consistency(gain)
            parts["marginal_consistency"] = consistency(terms.marginal_target)
        else:
            parts["joint_data"] = -a * terms.joint_data
            parts["joint_consistency"] = -consistency(terms.joint_samples.mean(1))
        diagnostics = {"gain_data": terms.correlation_data, "gain_consistency": gain}
        if self.diagnostics:
            diagnostics["latent_information"] = terms.information
        return LossParts(parts, diagnostics)
