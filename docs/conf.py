"""Sphinx: `make docs` writes build/docs/index.html and treats every warning as an error."""

from importlib.metadata import version as installed

project = "di4c_ext"
author = "the di4c_ext authors"
version = release = installed("di4c_ext")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "di4c_ext"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
# Docstrings of this package are plain text with shapes and equations set by hand, not reStructuredText.
PLAIN = ("module", "class", "function", "method", "attribute", "exception", "property", "data")


def as_written(app, what, name, obj, options, lines):
    """Keeps a docstring's own lines: as line blocks, with what reStructuredText would take for markup escaped."""
    if what not in PLAIN or not lines:
        return
    text = [line.replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|").replace("_", "\\_") for line in lines]
    lines[:] = ["| " + _indented(line) if line.strip() else "|" for line in text] + [""]


def _indented(line: str) -> str:
    """Leading blanks as such: line blocks would nest on them."""
    stripped = line.lstrip(" ")
    return "\N{NO-BREAK SPACE}" * (len(line) - len(stripped)) + stripped


def setup(app):
    app.connect("autodoc-process-docstring", as_written)
