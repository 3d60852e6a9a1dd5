"""MkDocs plugin: display formulas fit the reader's window.

.. code-block:: yaml

   plugins:
     - search
     - mathfit:
         options: {minFontSize: 11}

``mathfit.js`` lands in ``assets`` and becomes the first of ``extra_javascript``; ``options`` are
those of the script.
"""

from __future__ import annotations

import json

from mkdocs.config import base
from mkdocs.config import config_options as c
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import BasePlugin
from mkdocs.structure.files import File, Files

from kexue.lab.report import asset_path

__all__ = ["MathfitPlugin"]

SCRIPT = "assets/mathfit.js"
CONFIG = "assets/mathfit-config.js"


class _Config(base.Config):
    options = c.Type(dict, default={})


class MathfitPlugin(BasePlugin[_Config]):
    """Add ``mathfit.js``, and its options if there are any, to every page.

    Examples
    --------
    >>> plugin = MathfitPlugin()
    >>> plugin.load_config({"options": {"minFontSize": 11}})
    ([], [])
    """

    def on_config(self, config: MkDocsConfig) -> MkDocsConfig:
        """Put the scripts before all others, so that formulas are fitted before they are shown.

        Parameters
        ----------
        config : mkdocs.config.defaults.MkDocsConfig
            The site's configuration.

        Returns
        -------
        mkdocs.config.defaults.MkDocsConfig
            The same configuration, with the scripts in ``extra_javascript``.

        Raises
        ------
        mkdocs.exceptions.PluginError
            If an option is no JSON value.
        """
        scripts = [CONFIG, SCRIPT] if self.config.options else [SCRIPT]
        self._config_text()
        config.extra_javascript = [*scripts, *config.extra_javascript]
        return config

    def on_files(self, files: Files, *, config: MkDocsConfig) -> Files:
        """Add the script, and one that sets its options, to the files of the site.

        Parameters
        ----------
        files : mkdocs.structure.files.Files
            The files that MkDocs has found.
        config : mkdocs.config.defaults.MkDocsConfig
            The site's configuration.

        Returns
        -------
        mkdocs.structure.files.Files
            The same collection with one or two files more.
        """
        text = asset_path("mathfit.js").read_text(encoding="utf-8")
        files.append(File.generated(config, SCRIPT, content=text))
        if self.config.options:
            files.append(File.generated(config, CONFIG, content=self._config_text()))
        return files

    def _config_text(self) -> str:
        try:
            options = json.dumps(self.config.options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PluginError(
                f"mathfit: options must hold JSON values, got {self.config.options!r}"
            ) from error
        return f"window.mathfitConfig = {options};\n"
