"""`pytest benchmarks`: our kernels beside their peers, on the GPU where there is one, else on the CPU.

`--benchmark-json=FILE` keeps the numbers; `python benchmarks/report.py FILE` renders them as committed under results/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
from measuring import Meter


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where everything is measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def meter(benchmark, device: torch.device) -> Meter:
    """Times one implementation of one group; see measuring.Meter."""
    return Meter(benchmark, device)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the table says of the machine goes into the JSON with it."""
    machine_info["di4c"] = report.machine()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of ratios, under pytest-benchmark's own."""
    if Meter.rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.render(Meter.rows, report.machine()))
