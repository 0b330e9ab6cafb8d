"""A few latents' activations at a time: the loss and the gradient are those of all at once, the memory is not."""

import math
from collections.abc import Callable

import pytest
import torch
import unets
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from di4c_ext import micro_batch, ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.micro_batch import in_pieces
from di4c_ext.process import AbsorbingProcess, GaussianProcess

B, L, D, S, C, WIDTH = 3, 7, 6, 5, 2, 16
KINDS = ("tensor", "logistic", "hidden")
HERE = {"num_latents": L, "num_targets": 3, "window": 0.4, "step_max": 0.05}
APART = {"distillation_rows": 4, "time_min": 0.2, **HERE}


class Student(nn.Module):
    """A small mixture whose head comes in any of the three forms, and which watches what it keeps alive."""

    def __init__(self, kind="tensor", dropout=0.0, dtype=torch.float64, states=S):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.states = kind, states
        self.first, self.drop = nn.Linear(D * (states + 1) + C, WIDTH), nn.Dropout(dropout)
        self.last = nn.Linear(WIDTH, {"tensor": D * states, "logistic": 2 * D, "hidden": D * 4}[kind])
        self.head = nn.Linear(4, states) if kind == "hidden" else None
        self.to(dtype)
        self.calls: list[tuple[int, ...]] = []
        self.alive: list[StorageWeakRef] = []
        self.most_alive = 0

    def forward(self, x_t, t, latents, label=None):
        self.calls.append(tuple(latents.shape[:-1]))
        x = nn.functional.one_hot(x_t, self.states + 1).flatten(-2).to(self.first.weight.dtype)
        if latents.ndim > x.ndim:
            x = x[:, None].expand(*latents.shape[:2], -1)
        h = torch.tanh(self.first(torch.cat([x, latents.to(x.dtype)], -1)))
        if label is not None:
            h = h * label.to(h.dtype)[:, None, None] if h.ndim == 3 else h * label.to(h.dtype)[:, None]
        if torch.is_grad_enabled():
            self.watch(h)
        out = self.last(self.drop(h))
        if self.kind == "logistic":
            mean, log_scale = out.chunk(2, -1)
            return ops.Logistic(torch.tanh(mean), log_scale, self.states)
        out = out.unflatten(-1, (D, -1))
        return out if self.head is None else ops.Hidden(out, self.head.weight, self.head.bias)

    def watch(self, h: Tensor) -> None:
        """Counts the activations that live now: when one is made, and when one is about to be used for a gradient."""

        def count(_: Tensor | None = None) -> None:
            self.alive = [ref for ref in self.alive if not ref.expired()]
            self.most_alive = max(self.most_alive, len(self.alive))

        self.alive.append(StorageWeakRef(h.untyped_storage()))
        h.register_hook(count)
        count()


def teacher(x_t, t, label=None):
    return 3.0 * nn.functional.one_hot(x_t.flip(-1), S + 1)[..., :S].double()


def latents(keys: Tensor, n: int) -> Tensor:
    return random.normal(keys, n * C).view(len(keys), n, C)


def evaluate(student: nn.Module, objective: Di4CObjective, process=None, **more) -> tuple[Tensor, list[Tensor]]:
    x_0 = torch.arange(B * D).view(B, D).pow(2) % S
    student.zero_grad()
    process = AbsorbingProcess(S) if process is None else process
    parts = objective(student, teacher, process, x_0, random.keys(0, B), latents=latents, **more)
    parts["loss"].backward()
    return parts["loss"].detach(), [p.grad.clone() for p in student.parameters()]


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]], rtol: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=0)
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).norm() <= rtol * b.norm() and b.norm() > 0


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("settings", [HERE, APART], ids=["rows at x_t", "rows apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_all_at_once(kind, settings, size):
    student = Student(kind)
    # A Logistic is not what the absorbing process takes; the Gaussian one takes all three.
    process = GaussianProcess(S, rate_sigma=1.0, q_sigma=10.0, time_base=0.5)
    whole = evaluate(student, Di4CObjective(**settings), process)
    student.calls.clear()
    assert_same(evaluate(student, Di4CObjective(**settings, latent_micro_batch=size), process), whole, 1e-10)
    rows = B * size
    assert all(shape[1] <= size if len(shape) == 2 else shape[0] <= rows for shape in student.calls)


def test_the_pixel_network():
    """The published preset on the published U-Net, whose latents share what lies before the first of them enters."""
    teacher, student = unets.by_formula().double(), unets.by_formula(is_student=True).double()
    process = GaussianProcess(teacher.config.num_states, rate_sigma=1.0, q_sigma=32.0, time_base=1.0)
    x_0, results = unets.noised(2, teacher.config), []
    for size in (None, 2):
        objective = Di4CObjective.preset("pixels", num_latents=3, distillation_rows=3, latent_micro_batch=size)
        student.zero_grad()
        draw = lambda keys, n: random.uniform(keys, n)[..., None]  # noqa: E731
        loss = objective(student, teacher, process, x_0, random.keys(0, 2), latents=draw)["loss"]
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in student.parameters()]))
    (loss, grads), (again, others) = results
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=0)
    largest = max(grad.norm() for grad in grads)
    assert all((a - b).norm() <= 1e-8 * b.norm() + 1e-12 * largest for a, b in zip(others, grads, strict=True))


def test_float32_too():
    student = Student(dtype=torch.float32)
    whole = evaluate(student, Di4CObjective(**APART))
    assert_same(evaluate(student, Di4CObjective(**APART, latent_micro_batch=2)), whole, 1e-6)


@pytest.mark.parametrize("settings", [HERE, APART], ids=["rows at x_t", "rows apart"])
def test_activations_of_one_piece_live_at_a_time(settings):
    student = Student()
    evaluate(student, Di4CObjective(**settings, latent_micro_batch=1))
    assert student.most_alive == 1  # forward nothing is kept, backward one piece after the other
    assert len(student.calls) == 3 + 2 * (L + settings.get("distillation_rows", 0))  # targets, then all the rest twice
    # The measure itself: without pieces, or with pieces that are not forgotten, more lives.
    student = Student()
    evaluate(student, Di4CObjective(**APART))
    assert student.most_alive == 2


def test_pieces_kept_would_be_counted(monkeypatch):
    monkeypatch.setattr(micro_batch, "checkpoint", lambda call, *piece, **_: call(*piece))
    student = Student()
    evaluate(student, Di4CObjective(**HERE, latent_micro_batch=1))
    assert student.most_alive == L


@pytest.mark.parametrize("settings", [HERE, APART], ids=["rows at x_t", "rows apart"])
def test_dropout_is_the_same_both_times(settings, monkeypatch):
    """The gradient is that of the pieces' own masks, kept from the forward pass."""
    student = Student(dropout=0.5)
    objective = Di4CObjective(**settings, latent_micro_batch=2)
    torch.manual_seed(1)
    found = evaluate(student, objective)
    after = torch.rand(3)
    monkeypatch.setattr(micro_batch, "checkpoint", lambda call, *piece, **_: call(*piece))
    torch.manual_seed(1)
    assert_same(found, evaluate(student, objective), 1e-12)
    assert torch.equal(after, torch.rand(3))  # what others draw afterwards does not hang on the second pass
    torch.manual_seed(2)
    assert evaluate(student, objective)[0] != found[0]


def test_conditions_stay_with_their_rows():
    student = Student()
    label = torch.tensor([0.5, 1.0, 2.0])
    whole = evaluate(student, Di4CObjective(**APART), conditions={"label": label})
    pieces = evaluate(student, Di4CObjective(**APART, latent_micro_batch=3), conditions={"label": label})
    assert_same(pieces, whole, 1e-10)
    assert whole[0] != evaluate(student, Di4CObjective(**APART), conditions={"label": label.flip(0)})[0]


def test_autocast():
    """Both passes in the precision asked for, and every weight has its gradient."""
    results = []
    for size in (None, 2):
        student = Student(dtype=torch.float32)
        x_0 = torch.arange(B * D).view(B, D).pow(2) % S
        objective = Di4CObjective(**APART, latent_micro_batch=size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(student, teacher, AbsorbingProcess(S), x_0, random.keys(0, B), latents=latents)["loss"]
        loss.backward()
        results.append((loss.detach(), [p.grad for p in student.parameters()]))
    (loss, grads), (again, others) = results
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)  # forward, row by row the same bits
    for a, b in zip(others, grads, strict=True):
        assert b.norm() > 0 and (a - b).norm() < 0.02 * b.norm()  # sums of bfloat16 in another order


def test_nothing_is_done_twice_without_need():
    student = Student()
    with torch.no_grad():
        objective = Di4CObjective(**APART, latent_micro_batch=2)
        x_0 = torch.zeros(B, D, dtype=torch.int64)
        objective(student, teacher, AbsorbingProcess(S), x_0, random.keys(0, B), latents=latents)
    assert student.calls == [(B, 2), (B, 1), *[(B, 2)] * 3, (B, 1), *[(2 * B,)] * 2]
    student.calls.clear()
    evaluate(student, Di4CObjective(**HERE, latent_micro_batch=L))
    assert student.calls == [(B, 3), (B, L)]


def test_in_pieces():
    """Any callable, along any dimension, by position and by name; pieces need not be equal."""
    seen: list[tuple[int, int]] = []

    def call(a: Tensor, *, b: Tensor) -> Tensor:
        seen.append((a.shape[1], b.shape[1]))
        return (a * b)[..., None]

    a, b = torch.rand(2, 5, 3, requires_grad=True), torch.rand(2, 5, 3)
    out = in_pieces(call, 2, 1, a, b=b)
    assert torch.equal(out, (a * b)[..., None]) and seen == [(2, 2), (2, 2), (1, 1)]
    out.sum().backward()
    assert torch.equal(a.grad, b)


@pytest.mark.parametrize("value", [0, -1])
def test_bad_sizes(value):
    with pytest.raises(ValueError, match=f"latent_micro_batch must be at least 1, got {value}"):
        Di4CObjective(latent_micro_batch=value)


def test_shape_errors_are_the_same():
    flat: Callable[..., Tensor] = lambda x, t, latents: torch.zeros(B, D, S)  # noqa: E731
    with pytest.raises(ValueError, match=r"the student must give logits \(B, L, D, S\)"):
        Di4CObjective(num_latents=L, num_targets=2, latent_micro_batch=2)(
            flat,
            teacher,
            _NoStep(S),
            torch.zeros(B, D, dtype=torch.int64),
            random.keys(0, B),
            latents=latents,
            target=lambda x, t, latents: torch.zeros(*x.shape, S),
        )


class _NoStep(AbsorbingProcess):
    def carry_over(self, logits, x):
        return logits


def test_resumed_training_is_the_uninterrupted_run(tmp_path):
    """Through DistillTrainer, with dropout: a flag like any other."""
    pytest.importorskip("transformers")
    from transformers import set_seed

    from di4c_ext import data
    from di4c_ext.config import DistillConfig
    from di4c_ext.models import CompactConfig, CompactDenoiser, draw_latents
    from di4c_ext.trainer import DistillTrainer

    images = data.load("digits").subset(torch.arange(16))

    def run(folder, resume=None, **settings):
        args = DistillConfig(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            num_latents=5,
            distillation_rows=3,
            time_min=0.01,
            latent_micro_batch=2,
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        set_seed(0)
        base = CompactDenoiser(CompactConfig(hidden_size=16, num_blocks=1, dropout=0.2))
        student = CompactDenoiser.from_teacher(base, latent_dim=4, latent_hidden_size=8)
        trainer = DistillTrainer(
            student,
            teacher=base,
            latents=lambda keys, n: draw_latents(keys, n, 4),
            process=AbsorbingProcess(17),
            args=args,
            train_dataset=images,
        )
        assert trainer.objective.latent_micro_batch == 2
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = run("whole")
    resumed = run("whole", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert all(math.isfinite(value.double().sum().item()) for value in whole.values())
