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
from functools import partial
from typing import Any

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.latent_group import LatentGroup, shared_terms
from di4c_ext.loss_settings import LossSettings
from di4c_ext.loss_terms import LossParts, Rows, constant, mixture_terms, of_states, row_divergence, steps
from di4c_ext.micro_batch import in_pieces
from di4c_ext.ops import Logits
from di4c_ext.process import Process

# One sub-key per use of randomness, so that no two draws of a sample share their bits.
_USES = 10
_TIMES, _CORRUPT, _STEP, _LATENTS, _TARGET_LATENTS, _TARGET_TOKENS, _ROW_TIMES, _ROW_NOISE, _ROW_LATENTS = range(9)
_TEACHER_LATENTS = 9


class Di4CObjective(LossSettings):
    """The loss of a student when called, by the settings explained in `LossSettings`; all of them can be given here."""

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
        unconditional: Denoiser | None = None,
        teacher_latents: Latents | None = None,
        group: LatentGroup | None = None,
    ) -> LossParts:
        """The loss of x_0 (B, D) int64, every draw hanging on keys (B,) int64: fold the training step into them.

        latents: keys (B,), n -> (B, n, C). target: the denoiser at u, the student itself unless given (its moving
        average, say). times: t and u, (B,) each, in place of `draw_times`. conditions: (B, ...) each, what all
        denoisers are told of the samples, by the names of their arguments; distillation_rows repeat them for the rows
        of a sample, which they could not do to what is bound by a partial. unconditional: the teacher told of no class,
        called with x_t and t alone; the teacher's step is then taken from logits that `process.guide` makes of both,
        while the divergences to the teacher stay those to its own. teacher_latents: for a teacher that is a mixture
        itself, as in a second round: each of the K targets is a step of a component of its own, and the divergences are
        those to the mean of the K. group: of processes with the same samples, each of which asks the student for its
        share of the L latents, K targets and R rows; the loss is that of all of them (`latent_group`).

        Denoisers may give a class more than the process has states, its mask; they lose it. With a graph the student
        is called at x_t, and at the distillation rows if there are any; the teacher is called once with a row a sample,
        and at those rows. A denoiser that gives NaN makes the parts that hang on it NaN, by name, and leaves other
        samples as they are. The loss is a mean over samples whose draws hang on their keys alone: the gradients of
        micro-batches, each times its share of the samples, add up to the gradient of the batch.
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
        mixture: dict[str, Tensor] = {}
        if teacher_latents is not None:
            if unconditional is not None or self.distillation_rows:
                raise ValueError(
                    "Di4CObjective: a teacher with latents goes neither with unconditional nor with distillation_rows"
                )
            mixture = {"latents": teacher_latents(key[_TEACHER_LATENTS], self.num_targets or self.num_latents)}
        with inference(teacher, x_0.device):
            knows = partial(teacher, x_t, t.float(), **told)
            found = in_pieces(knows, self.latent_micro_batch, 1, **mixture) if mixture else knows()
            teacher_logits = of_states(constant(found), process)
        stepped = teacher_logits if unconditional is None else _guided(unconditional, process, teacher_logits, x_t, t)
        goal, samples, broken = self._consistency_target(
            student if target is None else target, process, x_t, stepped, t, u, key, latents, told, group
        )
        at_x_t = partial(student, x_t, t.float(), **told)
        own = _own(group, latents(key[_LATENTS], self.num_latents), "--num_latents")
        logits = of_states(in_pieces(at_x_t, self.latent_micro_batch, 1, latents=own), process)
        expected = (*x_0.shape[:1], own.shape[1], *x_0.shape[1:], process.num_states)
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
            weight=self._weight(process, x_t),
            broken=broken,
            rows=self._rows(student, teacher, process, x_0, key, latents, told, group)
            if self.distillation_rows
            else None,
            group=group,
        )

    def _weight(self, process: Process, x: Tensor) -> Tensor | None:
        """(B, D), of the positions that count; None for all."""
        return None if self.clean_positions else process.weight(x)

    def _consistency_target(
        self,
        target: Denoiser,
        process: Process,
        x_t: Tensor,
        stepped: Logits,
        t: Tensor,
        u: Tensor,
        key: Tensor,
        latents: Latents,
        told: dict[str, Tensor],
        group: LatentGroup | None,
    ) -> tuple[Logits, Tensor, Tensor]:
        """g (B, K, D, S) as logits, xhat ~ g (B, K, D), and the samples whose draws failed, (B,) bool.

        Of a group's processes each has its own of the K in g, and all of them in the others.
        """
        num_targets = self.num_latents if self.num_targets is None else self.num_targets
        x_u = steps(process, x_t, stepped, t, u, key[_STEP], num_targets)
        failed = x_u < 0
        # A failed draw stays open, so that the network sees a state it knows; the sample's parts become NaN below.
        x_u = _own(group, torch.where(failed, x_t[:, None], x_u), "--num_targets")
        with inference(target, x_t.device, dropout=self.target_dropout):
            g = in_pieces(
                lambda x, latents: target(x, u.float(), latents=latents, **told),
                self.latent_micro_batch,
                1,
                x_u,
                latents=_own(group, latents(key[_TARGET_LATENTS], num_targets), "--num_targets"),
            )
            g = of_states(constant(g), process)
            g = g if self.clean_positions else process.carry_over(g, x_u)
        # A target draws at its place among all K, whichever process it is in.
        first = 0 if group is None else group.rank * x_u[0].numel()
        samples: Any = ops.sample_categorical(g, key[_TARGET_TOKENS], first_position=first)
        samples = samples if group is None else group.gather(samples, 1)
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
        group: LatentGroup | None,
    ) -> Rows:
        """The distillation rows: times, noises and latents of their own, R to a sample, or a group's share of them."""
        number = self.distillation_rows
        # Denoisers take one time a sample, so here each row is a sample to them.
        noise = random.fold_in(key[_ROW_NOISE][:, None], torch.arange(number, device=key.device))
        noise, tau, own = (
            _own(group, rows, "--distillation_rows").flatten(0, 1)
            for rows in (noise, self.draw_row_times(key[_ROW_TIMES]), latents(key[_ROW_LATENTS], number))
        )
        number = len(tau) // len(x_0)
        x_tau = process.corrupt(x_0.repeat_interleave(number, 0), tau, noise)
        told = {name: value.repeat_interleave(number, 0) for name, value in told.items()}
        size = None if self.latent_micro_batch is None else self.latent_micro_batch * len(x_0)
        with inference(teacher, x_0.device):
            teacher_logits = of_states(constant(in_pieces(teacher, size, 0, x_tau, tau.float(), **told)), process)
        student_logits = of_states(in_pieces(student, size, 0, x_tau, tau.float(), latents=own, **told), process)
        return Rows(student_logits, teacher_logits, self._weight(process, x_tau))

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
        group: LatentGroup | None = None,
    ) -> LossParts:
        """The loss of what the denoisers said, wherever it was drawn.

        Args:
            logits: (B, L, D, S), the student at x_t with L latents.
            teacher: (B, D, S) at x_t, or a mixture (B, T, D, S), which enters by its mean over T.
            data: x_0 (B, D). target, samples: g (B, K, D, S) at u as logits and xhat ~ g (B, K, D); constants.
            t: (B,). weight: (B, D), 0 where x_t tells x_0; None for 1 everywhere.
            broken: (B,) bool, samples whose draws failed: their consistency becomes NaN.
            rows: what L_distil is taken of where it has rows of its own.
            group: of processes of which each has its own latents in logits, its own targets in target, its own rows in
                rows, and all samples.
        """
        if (rows is None) == bool(self.distillation_rows):
            raise ValueError(
                f"Di4CObjective: rows go with distillation_rows, got {'none' if rows is None else 'some'} "
                f"and distillation_rows {self.distillation_rows}"
            )
        inside = t <= self.window if rows is None else torch.zeros_like(t, dtype=torch.bool)
        terms = (partial(mixture_terms, fused=self.fused) if group is None else partial(shared_terms, group))(
            logits,
            teacher=teacher,
            data=data,
            samples=samples,
            target=target if self.control_variate else None,
            weight=weight,
            inside=inside,
            information=self.diagnostics,
        )
        a = self.data_weight(t).to(terms.joint_data.dtype)

        def consistency(value: Tensor) -> Tensor:
            # Inside the window nothing hangs on the targets.
            value = value if broken is None else torch.where(broken, torch.nan, value)
            return self.consistency * torch.where(inside, 0.0, value)

        distillation = terms.distillation
        if rows is not None:
            each = row_divergence(rows).unflatten(0, (len(data), -1))
            distillation = (each if group is None else group.gather(each, 1)).mean(1)
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


def _own(group: LatentGroup | None, rows: Tensor, name: str) -> Tensor:
    """What is this process's of rows (B, L, ...): all of them, or its share in a group."""
    return rows if group is None else rows[:, group.own(rows.shape[1], name)]


def _guided(unconditional: Denoiser, process: Process, teacher: Logits, x_t: Tensor, t: Tensor) -> Logits:
    """The logits that a guided teacher steps from."""
    guide = getattr(process, "guide", None)
    if guide is None:
        raise ValueError(
            f"Di4CObjective: unconditional is for a process that guides its steps, ConfidenceProcess, got {process!r}"
        )
    with inference(unconditional, x_t.device):
        guided: Logits = guide(teacher, of_states(constant(unconditional(x_t, t.float())), process), t)
    return guided
