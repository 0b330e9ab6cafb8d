"""What the benchmarks of the language step compare is one loss, and what they count is what there is."""

from __future__ import annotations

import pytest
import torch
from programs import benchmark

from di4c_ext.loss import Di4CObjective

D, L, TOKENS, WIDTH = 24, 3, 61, 8
bench = benchmark("bench_language")


@pytest.mark.parametrize("time", [0.5, 1 / 64])
def test_both_ways_are_one_loss(time: float) -> None:
    """With the draws of the published way, term by term."""
    s = bench.setting(L, D, torch.device("cpu"), TOKENS, WIDTH)
    g = torch.Generator().manual_seed(1)
    x_t = torch.where(torch.rand(1, D, generator=g) < 0.6, TOKENS, s.x_0)
    latents = torch.rand(2, L, 1, generator=g)
    drawn: list[torch.Tensor] = []

    def draw(weights: torch.Tensor) -> torch.Tensor:
        # Every second position stays open, so that targets have something to draw.
        tokens = weights[..., :TOKENS].argmax(-1)
        drawn.append(tokens if drawn else torch.where(torch.arange(D) % 2 == 0, TOKENS, tokens))
        return drawn[-1]

    networks = s.student.published, s.teacher.published
    terms = bench.published.terms(*networks, s.x_0[0], x_t[0], time, latents, draw=draw)
    masked = x_t == TOKENS
    x_s = torch.where(masked[:, None], drawn[0][None], x_t[:, None])
    is_inside = time < 0.02
    objective = Di4CObjective.preset("language", num_latents=L)
    with torch.no_grad():
        teacher = s.teacher(x_t)
        target = s.process.carry_over(s.student(x_s, None, latents[0][None]), x_s)
    parts = objective.parts(
        s.student(x_t, None, latents[1][None]),
        teacher=teacher,
        data=s.x_0,
        target=target,
        samples=s.x_0[:, None].expand(1, L, D) if is_inside else drawn[1][None],
        t=torch.tensor([time], dtype=torch.float64),
        weight=s.process.weight(x_t),
    )
    value = {name: number.item() for name, number in parts.items()}
    assert value["distillation"] == pytest.approx(terms.distillation.item(), rel=1e-4)
    assert value["correlation_data"] + value["marginal_data"] == pytest.approx(terms.data.item(), rel=1e-4)
    consistency = value["correlation_consistency"] + value["marginal_consistency"]
    assert consistency == pytest.approx(terms.consistency.item(), rel=1e-3, abs=1e-6)
    assert (value["distillation"] > 0) == is_inside and (abs(consistency) > 0.01) == (not is_inside)
    again, mine = torch.autograd.grad(sum(terms), s.student.head), torch.autograd.grad(parts["loss"], s.student.head)
    torch.testing.assert_close(mine[0], again[0], rtol=1e-3, atol=1e-4 * again[0].abs().max().item())


def test_both_ways_run() -> None:
    s = bench.setting(L, D, torch.device("cpu"), TOKENS, WIDTH)
    for way in (bench.ours, bench.published_way):
        for time in (1.0, 0.5, 0.01):
            assert way(s, time).isfinite()


def test_the_count() -> None:
    """At full size under 2 GB, most of it the constants of the ops and the head's gradient."""
    language_step = benchmark("language_step")
    full = language_step.counted(1024, 16)
    assert sum(full.values()) < language_step.LIMIT
    assert full["gradient of the head"] == 4 * 50257 * 768
    # The published way's least, of 1,024 positions and 16 latents: the 24 GiB of the reference.
    logits = 4 * 16 * 1024 * 50258
    assert 23 < language_step.STATE_SIZED["least"] * logits / 2**30 < 25


def test_a_row_is_put_in_its_place() -> None:
    language_step = benchmark("language_step")
    table = [
        language_step.HEAD,
        "|---|",
        "| CPU | di4c | 16 | 1024 | 0.125 | 3.0 | a |",
        "| CPU | di4c | 4 | 64 | 0.5 |",
    ]
    page = "\n".join(["# Title", "", *table, "", "text"]) + "\n"
    new = "| CPU | di4c | 16 | 1024 | 0.125 | 2.0 | b |"
    assert language_step.saved(page, new) == page.replace(table[2], new)
    other = "| CPU | di4c | 16 | 1024 | 1 | 9.0 | c |"
    assert language_step.saved(page, other) == page.replace(table[3], f"{table[3]}\n{other}")
    assert language_step.saved(language_step.saved(page, other), other) == language_step.saved(page, other)
    with pytest.raises(ValueError, match="the page has no table"):
        language_step.saved("# Title\n", new)
