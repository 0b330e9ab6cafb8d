"""Sphinx: `make docs` writes build/docs/index.html and treats every warning as an error."""

from dataclasses import fields, is_dataclass
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
smartquotes = False  # two dashes begin a flag
suppress_warnings = ["ref.python"]  # a name in a signature that two modules show is told of in both
autodoc_inherit_docstrings = False  # a method that overrides transformers' is told of there
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
# Docstrings of this package are plain text with shapes and equations set by hand, not reStructuredText.
PLAIN = ("module", "class", "function", "method", "attribute", "exception", "property", "data")


def as_written(app, what, name, obj, options, lines):
    """Keeps a docstring's own lines: as line blocks, with what reStructuredText would take for markup escaped."""
    if what not in PLAIN or not lines:
        return
    if what == "class":
        lines += _flags(obj)
    text = [line.replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|").replace("_", "\\_") for line in lines]
    # What begins in one line and ends in another is no markup either.
    text = [line.replace("`", "\\`") if line.count("`") % 2 else line for line in text]
    lines[:] = ["| " + _indented(line) if line.strip() else "|" for line in text] + [""]


def _indented(line: str) -> str:
    """Leading blanks as such: line blocks would nest on them."""
    stripped = line.lstrip(" ")
    return "\N{NO-BREAK SPACE}" * (len(line) - len(stripped)) + stripped


def _flags(settings) -> list[str]:
    """The flags that a dataclass of settings adds to those of its parents, as the commands' --help has them."""
    own = vars(settings).get("__annotations__", {})
    if not is_dataclass(settings):
        return []
    told = [(field.name, field.metadata["help"]) for field in fields(settings) if "help" in field.metadata]
    return ["", *(f"--{name}: {text}" for name, text in told if name in own)] if told else []


def without_flags(app, what, name, obj, options, signature, returns):
    """Leaves out a signature that only repeats the flags, transformers' hundred with them."""
    return ("", None) if what == "class" and _flags(obj) else None


def is_left_out(app, what, name, obj, skip, options):
    """A named tuple's fields, which its docstring tells of."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-process-docstring", as_written)
    app.connect("autodoc-process-signature", without_flags)
    app.connect("autodoc-skip-member", is_left_out)
