"""The programs of the checkout as modules: its recipes and its benchmarks; tests are skipped where they are not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def program(name: str) -> Any:
    """python/NAME.py."""
    return _loaded(ROOT / "python", name)


def benchmark(name: str) -> Any:
    """benchmarks/NAME.py."""
    return _loaded(ROOT / "benchmarks", name)


def _loaded(folder: Path, name: str) -> Any:
    """FOLDER/NAME.py once, whatever helper of tests has the same name; it finds the modules that lie beside it."""
    if not (folder / f"{name}.py").is_file():
        pytest.skip("the programs of the checkout are not here", allow_module_level=True)
    known = f"programs.{folder.name}.{name}"
    if known not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(known, folder / f"{name}.py")
        sys.modules[known] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(folder))
        try:
            spec.loader.exec_module(sys.modules[known])
        finally:
            sys.path.remove(str(folder))
    return sys.modules[known]
