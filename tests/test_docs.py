"""Every command in README.md and docs/ runs: as it is written, but for smaller networks, data and numbers of steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from documented import ELSEWHERE, Shelf

import di4c_ext

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Packages whose modules are where things lie: one imports from the package, which a page names.
WHOLE = ("models", "ops", "process", "sampler")
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


def test_every_module_has_its_place_in_the_reference() -> None:
    package = Path(di4c_ext.__file__).parent
    found = {
        ".".join(("di4c_ext", *file.relative_to(package).parts)).removesuffix(".py").removesuffix(".__init__")
        for file in package.rglob("*.py")
    }
    inner = tuple(f"di4c_ext.{name}." for name in WHOLE)
    public = {name for name in found if not name.startswith(inner)} - {"di4c_ext"}
    pages = (ROOT / "docs" / "api").glob("*.md")
    named = [name for page in pages for name in re.findall(r"automodule:: (\S+)", page.read_text(encoding="utf-8"))]
    assert len(named) == len(set(named)) and public <= set(named) <= found
    index = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert all(index.count(f"api/{page.stem}\n") == 1 for page in (ROOT / "docs" / "api").glob("*.md"))


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
