"""`pytest benchmarks`: our kernels beside their peers, on the GPU where there is one, else on the CPU.

`--benchmark-json=FILE` keeps the numbers; `python benchmarks/report.py FILE --output NAME` renders them as committed
under results/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
from measuring import Meter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What must be compiled first comes last: a run that is cut off has everything else."""
    items.sort(key=lambda item: "compile" in item.name)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where everything is measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def meter(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Meter:
    """Times one implementation of one group; see measuring.Meter."""
    return Meter(benchmark, device, f"{request.path}::{request.node.name}")


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """No measurement inherits another's memory, threads or compiled graphs; each is kept should the run be cut off."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    asked = _json(request.config)
    if asked is not None:
        rows = {"di4c": {"machine": report.machine(), "rows": Meter.rows}}
        Path(f"{asked}.partial").write_text(json.dumps(rows))


def _json(config: pytest.Config) -> Path | None:
    """Where the JSON goes that was asked for; pytest-benchmark writes it at the very end."""
    asked = config.getoption("benchmark_json", None)
    if not asked:
        return None
    return Path(asked.name if hasattr(asked, "write") else asked)  # an open file, a path: it depends on the version


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """The rows of the table, the peers that are missing among them, go into the JSON."""
    output_json["di4c"] = {"machine": report.machine(), "rows": Meter.rows}


def pytest_unconfigure(config: pytest.Config) -> None:
    """What was kept against a cut goes once the JSON itself is there."""
    asked = _json(config)
    if asked is not None and asked.is_file() and asked.stat().st_size:
        Path(f"{asked}.partial").unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tables, under pytest-benchmark's own."""
    if Meter.rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.render(Meter.rows, report.machine()))
