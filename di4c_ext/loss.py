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
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.process import Process

DataLaw = Literal["sigmoid", "linear", "constant"]
StepLaw = Literal["uniform", "log_uniform"]

# One sub-key per use of randomness, so that no two draws of a sample share their bits.
_USES = 6
_TIMES, _CORRUPT, _STEP, _LATENTS, _TARGET_LATENTS, _TARGET_TOKENS = range(_USES)


class LossParts(dict[str, Tensor]):
    """'loss' with its graph, and by name every part of it (detached, weighted, adding up to it) and every diagnostic.

    All are scalars in nats per sample, means over the batch; `per_sample` holds the same values as (B,) tensors.
    Diagnostics: gain_data and gain_consistency, A(x_0) and mean_j A(xhat_j), unweighted and at every t;
    latent_information, sum_d KL(p_l^d || pbar^d), how far one latent tells the positions apart from their marginals.
    """

    def __init__(self, parts: Mapping[str, Tensor], diagnostics: Mapping[str, Tensor]) -> None:
        super().__init__(loss=torch.stack(list(parts.values())).sum(0).mean())
        self.parts = tuple(parts)
        self.per_sample = {name: value.detach() for name, value in (*parts.items(), *diagnostics.items())}
        self.update({name: value.mean() for name, value in self.per_sample.items()})

    def non_finite(self) -> list[str]:
        """Names of the parts that are NaN or infinite for some sample. Waits for the device."""
        bad = torch.stack([~self.per_sample[name].isfinite().all() for name in self.parts]).tolist()
        return [name for name, is_bad in zip(self.parts, bad, strict=True) if is_bad]


@dataclass(frozen=True)
class Di4CObjective:
    """Settings of the loss, and the loss itself when called. Defaults suit absorbing diffusion.

    num_latents         L, latents of the student at x_t per sample
    num_targets         K, targets of consistency per sample, None for L. A target costs a whole forward of its own at
                        x_u, a latent only scores them, so K < L saves much of a step
    distillation        weight of L_distil
    data                scale of a(t); a(t) = data * law(t)
    data_law            'sigmoid': sigmoid(20 (t - 1/2)), 'linear': t, 'constant': 1
    data_marginal       weight of L_data's KL to the teacher's marginals
    consistency         weight of L_consis
    control_variate     False: -a(t) LME_l sum_d log p_l^d(x_0^d) and the same at xhat_j, no KL of marginals
    window              L_distil acts at t <= window, L_consis above
    window_share        how often t falls into the window; t is uniform in (0, window] or in (window, 1]
    full_noise_share    how often t is 1 exactly, the first state of every sampler; counts towards t > window
    step_min, step_max  bounds of the teacher's step t - u, which is also held to t / 2 so that u > 0
    step_law            how the step is spread between them, 'uniform' or 'log_uniform'
    diagnostics         measure how the student uses its latents (one more read of the logits)
    """

    num_latents: int = 16
    num_targets: int | None = None
    distillation: float = 1.0
    data: float = 0.1
    data_law: DataLaw = "sigmoid"
    data_marginal: float = 1.0
    consistency: float = 1.0
    control_variate: bool = True
    window: float = 0.05
    window_share: float = 0.3
    full_noise_share: float = 0.0
    step_min: float = 0.01
    step_max: float = 0.05
    step_law: StepLaw = "uniform"
    diagnostics: bool = True

    def __post_init__(self) -> None:
        for name in ("num_latents", "num_targets"):
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
        if min(self.window_share, self.full_noise_share) < 0 or not self.window_share + self.full_noise_share <= 1:
            raise ValueError(
                "Di4CObjective: window_share and full_noise_share are shares of the samples, >= 0 and together at most "
                f"1, got {self.window_share} and {self.full_noise_share}"
            )
        if not 0 < self.step_min <= self.step_max <= 1:
            raise ValueError(
                f"Di4CObjective: 0 < step_min <= step_max <= 1 wanted, got {self.step_min} and {self.step_max}"
            )

    def draw_times(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """t and u, 0 < u < t <= 1, float64 (B,) each: functions of a sample's key alone."""
        v, w = (1 - random.uniform(keys, 2)).unbind(1)  # in (0, 1], so that t > 0
        # One draw decides where t falls and, rescaled within its share, the place there; a share of 0 is never hit.
        share, rest = self.window_share, 1 - self.window_share - self.full_noise_share
        inside = self.window * v / max(share, 1e-300)
        outside = self.window + (1 - self.window) * (v - share) / max(rest, 1e-300)
        t = torch.where(v <= share, inside, outside.clamp(max=1))
        if self.step_law == "uniform":
            step = self.step_min + (self.step_max - self.step_min) * w
        else:
            step = self.step_min * (self.step_max / self.step_min) ** w
        return t, t - torch.minimum(step, t / 2)

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
    ) -> LossParts:
        """The loss of x_0 (B, D) int64, every draw hanging on keys (B,) int64: fold the training step into them.

        latents: keys (B,), n -> (B, n, C). target: the denoiser at u, the student itself unless given (its moving
        average, say). times: t and u, (B,) each, in place of `draw_times`. One forward has a graph, the student's at
        x_t; the teacher is called once, with a row a sample. A denoiser that gives NaN makes the parts that hang on it
        NaN, by name, and leaves other samples as they are.
        """
        if x_0.ndim != 2 or keys.shape != x_0.shape[:1]:
            raise ValueError(
                "Di4CObjective: x_0 must be (B, D) and keys (B,), one a sample, "
                f"got {tuple(x_0.shape)} and {tuple(keys.shape)}"
            )
        key = random.fold_in(keys, torch.arange(_USES, device=keys.device)[:, None])  # (uses, B)
        t, u = self.draw_times(key[_TIMES]) if times is None else times
        x_t = process.corrupt(x_0, t, key[_CORRUPT])
        with inference(teacher, x_0.device):
            teacher_logits = teacher(x_t, t.float())
        goal, samples, broken = self._consistency_target(
            student if target is None else target, process, x_t, teacher_logits, t, u, key, latents
        )
        logits = student(x_t, t.float(), latents=latents(key[_LATENTS], self.num_latents))
        expected = (*x_0.shape[:1], self.num_latents, *x_0.shape[1:], process.num_states)
        if logits.shape != expected:
            raise ValueError(
                f"Di4CObjective: the student must give logits (B, L, D, S) = {expected} for its L latents, "
                f"got {tuple(logits.shape)}"
            )
        return self._parts(logits, teacher_logits, x_0, goal, samples, broken, t, process.weight(x_t))

    def _consistency_target(
        self,
        target: Denoiser,
        process: Process,
        x_t: Tensor,
        teacher_logits: Tensor,
        t: Tensor,
        u: Tensor,
        key: Tensor,
        latents: Latents,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g (B, K, D, S) as logits, xhat ~ g (B, K, D), and the samples whose draws failed, (B,) bool."""
        num_targets = self.num_latents if self.num_targets is None else self.num_targets
        x_u = process.step(x_t, teacher_logits, t, u, key[_STEP], draws=num_targets)
        failed = x_u < 0
        # A failed draw stays open, so that the network sees a state it knows; the sample's parts become NaN below.
        x_u = torch.where(failed, x_t[:, None], x_u)
        with inference(target, x_t.device):
            g = target(x_u, u.float(), latents=latents(key[_TARGET_LATENTS], num_targets))
        g = process.carry_over(g.detach(), x_u)
        samples: Any = ops.sample_categorical(g, key[_TARGET_TOKENS])
        broken = (failed | (samples < 0)).flatten(1).any(1)
        return g, samples.clamp(min=0), broken

    def _parts(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        x_0: Tensor,
        goal: Tensor,
        samples: Tensor,
        broken: Tensor,
        t: Tensor,
        weight: Tensor,
    ) -> LossParts:
        inside = t <= self.window
        weight_outside = weight * ~inside[:, None]
        broken = broken & ~inside  # inside the window nothing hangs on the targets
        joint, correlation = ops.mixture_log_prob(logits, torch.cat([x_0[:, None], samples], 1), weight)
        a = self.data_weight(t).to(joint.dtype)

        def consistency(value: Tensor) -> Tensor:
            return self.consistency * torch.where(broken, torch.nan, torch.where(inside, 0.0, value))

        per_latent = ops.masked_kl(teacher_logits, logits, weight * inside[:, None])
        parts = {"distillation": self.distillation * per_latent.mean(1)}
        if self.control_variate:
            parts["correlation_data"] = -a * correlation[:, 0]
            parts["marginal_data"] = self.data_marginal * ops.mixture_kl(teacher_logits, logits, weight)
            parts["correlation_consistency"] = -consistency(correlation[:, 1:].mean(1))
            parts["marginal_consistency"] = consistency(ops.mixture_kl(goal, logits, weight_outside))
        else:
            parts["joint_data"] = -a * joint[:, 0]
            parts["joint_consistency"] = -consistency(joint[:, 1:].mean(1))
        diagnostics = {"gain_data": correlation[:, 0], "gain_consistency": correlation[:, 1:].mean(1)}
        if self.diagnostics:
            with torch.no_grad():
                # Latents are exchangeable: the first stands for all.
                diagnostics["latent_information"] = ops.mixture_kl(logits[:, :1].detach(), logits.detach(), weight)
        return LossParts(parts, diagnostics)
