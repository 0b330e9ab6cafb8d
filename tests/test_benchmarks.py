"""What the benchmarks compare computes the same, and a report tells what was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from programs import benchmark

SHAPE = (2, 3, 5, 40)  # B, L, D, S


cases, measuring, report = benchmark("cases"), benchmark("measuring"), benchmark("report")


@pytest.mark.parametrize("form", ["plain", "published"])
@pytest.mark.parametrize("op", list(cases.MIXTURE))
def test_forms_in_torch_compute_what_ours_do(op: str, form: str) -> None:
    """The same loss and the same gradient, so that times may be compared."""
    theirs = getattr(cases.MIXTURE[op], form)
    if theirs is None:
        pytest.skip("has no published form of its own")
    i = cases.inputs(SHAPE, torch.float32, torch.device("cpu"), op == "mixture_objective")
    found = []
    for loss in (cases.MIXTURE[op].ours, theirs):
        x = i.logits.clone().requires_grad_()
        value = loss(x, i).sum()
        found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


class _Benchmark:
    """As much of pytest-benchmark's fixture as the meter uses."""

    def __init__(self) -> None:
        self.group, self.extra_info = "", {}
        self.stats: Any = None

    def pedantic(self, run: Any, setup: Any = None, rounds: int = 1) -> None:
        seconds = []
        for _ in range(rounds):
            if setup is not None:
                setup()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(min=min(seconds)))


def test_calls_that_are_compared_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "copy_speed", lambda device: 1e9)
    monkeypatch.setattr(measuring.Meter, "rows", [])
    order: list[str] = []

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    meter = measuring.Meter(_Benchmark(), torch.device("cpu"), "")
    meter("g", "di4c", call("ours", 0.002), 1000, at_least={"peer": 2}, turns={"peer": (call("theirs", 0.01), 3000)})
    timed = order[order.index("theirs") + 1 :]
    assert len(timed) >= 10 and timed == ["theirs", "ours"] * (len(timed) // 2)
    (row,) = measuring.Meter.rows
    assert row["turns"]["peer"]["ms"] >= 10 and 2 <= row["ms"] < row["turns"]["peer"]["ms"]
    assert row["turns"]["peer"]["of_copy"] == pytest.approx(3000 / row["turns"]["peer"]["ms"] * 1e3 / 1e9)


def test_memory_with_a_bound_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    test = tmp_path / "test_growth.py"
    test.write_text(
        "import os\nfrom pathlib import Path\n\n"
        f"def test_it():\n    Path(os.environ[{measuring.ALONE!r}]).write_text(str(os.getppid()))\n"
    )
    assert measuring.growth_alone(f"{test}::test_it") == os.getpid()
    test.write_text("def test_it():\n    raise ValueError('no such op')\n")
    with pytest.raises(RuntimeError, match="no such op"):
        measuring.growth_alone(f"{test}::test_it")


def _row(name: str, ms: float, **more: Any) -> dict[str, Any]:
    return {"group": "op fwd+bwd 1x2", "name": name, "ms": ms, "gb_per_s": 60 / ms, "of_copy": 1 / ms, **more}


def test_a_report_judges_by_the_turns() -> None:
    """The peer's own row was measured while the machine was twice as fast, which is not seen."""
    turn = {"ms": 40.0, "gb_per_s": 1.5, "of_copy": 0.025}
    ours = _row("di4c", 4.0, at_least={"torch": 8, "other": None}, turns={"torch": turn})
    ours |= {"growth_mb": 5, "growth_limit_mb": 6}
    rows = [_row("torch", 20.0), ours, _row("other", 12.0)]
    text = report.render(rows, {"kind": "cpu"})
    assert "## Promises: 2 of 2 kept" in text
    assert "| op fwd+bwd 1x2: speed over torch's | >= 8 | 10.0 | kept |" in text
    assert "## Told, not promised" in text and "| op fwd+bwd 1x2: speed over other's | 3.0 |" in text
    assert "|  | torch | 40.00 |" in text and "| 10 |" in text
    slow = [row | ({"turns": {}} if row["name"] == "di4c" else {}) for row in rows]
    assert "## Promises: 1 of 2 kept" in report.render(slow, {"kind": "cpu"})
