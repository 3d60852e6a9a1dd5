"""Sphinx extension: display formulas of the HTML pages fit the reader's window.

.. code-block:: python

   extensions = ["sphinx.ext.mathjax", "kexue.lab.sphinx_mathfit"]
   mathfit_options = {"minFontSize": 11}

``mathfit.js`` lands in ``_static``; ``mathfit_options`` becomes ``window.mathfitConfig``, so its
names are those of the script. Builders that write no HTML are left alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kexue.lab.report import asset_path

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config

__all__ = ["setup"]

ASSET = "mathfit.js"
# Before MathJax and everything else: formulas are then fitted before they are first shown.
FIRST = 100


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx.

    Parameters
    ----------
    app : sphinx.application.Sphinx
        The application that loads the extension.

    Returns
    -------
    dict
        Version and promises: the extension keeps nothing in the environment, so pages may be read
        and written in parallel.

    Raises
    ------
    sphinx.errors.ConfigError
        Later, when the configuration is complete: if ``mathfit_options`` is no dictionary that
        JSON can hold.

    Examples
    --------
    In ``conf.py``:

    >>> extensions = ["sphinx.ext.mathjax", "kexue.lab.sphinx_mathfit"]
    >>> mathfit_options = {"minFontSize": 11, "label": "Wide formula"}
    """
    app.add_config_value("mathfit_options", {}, "html", types=frozenset({dict}))
    app.connect("config-inited", _check_options)
    app.connect("builder-inited", _add_script)
    return {"version": "1.0.0", "parallel_read_safe": True, "parallel_write_safe": True}


def _check_options(app: Sphinx, config: Config) -> None:
    from sphinx.errors import ConfigError

    options = config.mathfit_options
    if not isinstance(options, dict):
        raise ConfigError(f"mathfit_options must be a dict, got {type(options).__name__}")
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"mathfit_options must hold JSON values, got {options!r}") from error


def _add_script(app: Sphinx) -> None:
    if app.builder.format != "html":
        return
    # Now and not at the end: Sphinx adds a file's checksum to its address when it writes a page.
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(asset_path(ASSET), static / ASSET)
    if app.config.mathfit_options:
        # A "</script>" in an option would end the element.
        options = json.dumps(app.config.mathfit_options).replace("<", "\\u003c")
        app.add_js_file(None, body=f"window.mathfitConfig = {options};", priority=FIRST)
    app.add_js_file(ASSET, priority=FIRST + 1)
