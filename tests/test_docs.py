"""Every command in README.md and docs/ runs: as it is written, but for smaller networks, data and numbers of steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from documented import ELSEWHERE, Shelf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the page's bash blocks, comments left out."""
    lines = [line for block in _FENCE.findall(page.read_text(encoding="utf-8")) for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """A folder with the files that the pages name, and what commands have been run there."""
    return Shelf(tmp_path_factory.mktemp("shelf"), ROOT)


def test_commands_are_found() -> None:
    assert ["make", "test"] in commands(ROOT / "README.md")
    assert sum(len(commands(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_page_run(page: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DI4C_CACHE", str(shelf.folder / "cache"))
    monkeypatch.chdir(shelf.folder)
    for words in commands(page):
        line = shlex.join(words)
        if line in ELSEWHERE:
            file, piece = ELSEWHERE[line]
            assert piece in (ROOT / file).read_text(encoding="utf-8"), f"{file} no longer runs {line!r}"
        else:
            shelf.run(words)
