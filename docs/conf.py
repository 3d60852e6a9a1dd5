"""Sphinx configuration; `make docs` writes the method pages first."""

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
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "kexue"
# The formulas are rendered by the packaged MathJax, so the pages work without a network.
mathjax_path = "mathjax/tex-svg-full.js"
templates_path = ["_templates"]


def _static() -> list[str]:
    from kexue.lab.report import asset_path

    return [str(asset_path("mathjax/tex-svg-full.js").parent.parent)]


html_static_path = _static()
