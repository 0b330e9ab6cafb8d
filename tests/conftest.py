"""What every test may use: the backends an op can be served by, and the modules of helpers beside the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from di4c_ext.ops import native

torch.set_num_threads(min(2, torch.get_num_threads()))

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "neon")


@dataclass(frozen=True)
class Backend:
    """Who serves the ops in a test: the reference or compiled kernels, and where its tensors lie."""

    name: str
    device: torch.device
    is_native: bool


def _use(name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if name == "reference":
        monkeypatch.setenv("DI4C_NATIVE", "off")
        return Backend(name, torch.device("cpu"), False)
    if os.environ.get("DI4C_NATIVE", "").lower() == "off":
        pytest.skip("DI4C_NATIVE=off")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if name == "cuda" and not native.info().get("cuda", False):
        pytest.skip(f"built without CUDA kernels: {native.info().get('cuda_reason')}")
    kind = "cpu" if name in INSTRUCTION_SETS else name
    # An installation without its extension fails here: skipping would call it tested.
    assert native.available(kind), native.info()
    if name in INSTRUCTION_SETS:
        if name not in native.info()["isa_built"]:
            pytest.skip(f"{name} is not built")
        monkeypatch.setenv("DI4C_ISA", name)
        try:
            assert native.info()["isa_active"] == name
        except ValueError:
            pytest.skip(f"this processor has no {name}")
    return Backend(name, torch.device(kind), True)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each way an op can be served, in turn."""
    return _use(request.param, monkeypatch)


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each set of compiled kernels, in turn."""
    return _use(request.param, monkeypatch)


@pytest.fixture(params=["reference", *INSTRUCTION_SETS, "cuda"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each way an op can be served, the CPU's instruction sets apart, in turn."""
    return _use(request.param, monkeypatch)


@pytest.fixture
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve every op by the reference."""
    monkeypatch.setenv("DI4C_NATIVE", "off")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(main, *argv) runs a command that must refuse: exit code 2 and, at the end, one line, which it returns."""
    from di4c_ext import arguments  # with transformers, which most tests do without

    def refuse(main: Callable[[list[str]], int], *argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            arguments.run(main, [str(word) for word in argv])
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and shown.err.endswith(lines[0] + "\n"), shown
        return lines[0]

    return refuse


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
