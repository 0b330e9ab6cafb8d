"""The programs of the checkout as modules; a module of tests is skipped where they are not at hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "python"


def program(name: str) -> Any:
    """python/NAME.py, whatever module of tests has the same name."""
    if not (FOLDER / f"{name}.py").is_file():
        pytest.skip("the programs of the checkout are not here", allow_module_level=True)
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    known = f"programs.{name}"
    if known not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]
