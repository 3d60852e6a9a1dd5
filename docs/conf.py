"""Sphinx configuration; `make docs` writes the method pages first."""

import re
from importlib import metadata

project = "kexue"
author = "The kexue authors"
copyright = "The kexue authors, Apache-2.0"
version = release = metadata.version("kexue")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "kexue.lab.sphinx_mathfit",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_dmath_allow_space = False
myst_heading_anchors = 3
autosummary_generate = True
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
exclude_patterns = ["_build"]
# A shape such as (height, width) in the type of an argument refers to nothing that has a width.
suppress_warnings = ["ref.python"]
html_theme = "furo"
html_title = "kexue"
# The formulas are rendered by the packaged MathJax, so the pages work without a network.
mathjax_path = "mathjax/tex-svg-full.js"
templates_path = ["_templates"]


def _static() -> list[str]:
    from kexue.lab.report import asset_path

    return [str(asset_path("mathjax/tex-svg-full.js").parent.parent)]


html_static_path = _static()


def _escape_shapes(app, what, name, obj, options, lines) -> None:
    """A shape such as (batch, *event) is no emphasis."""
    lines[:] = [re.sub(r"(?<![\\\\*\w`:])\*(\w+)(?![\w*])", r"\\*\1", line) for line in lines]


def _skip(app, what, name, obj, skip, options) -> bool | None:
    """Leave out what scikit-learn adds to every estimator, and a class inside a class."""
    inherited = re.fullmatch(r"set_\w+_request", name) is not None
    return True if inherited or (what == "class" and isinstance(obj, type)) else None


def setup(app) -> None:
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _escape_shapes, priority=1)
