"""The doors to mathfit.js: `kexue.lab.report`, Sphinx, MkDocs. They take no arrays."""

import numpy as np

from contract.row import Arguments, Row


def asset_arguments(rng: np.random.Generator) -> Arguments:
    return {"name": "mathfit.js"}


def no_arguments(rng: np.random.Generator) -> Arguments:
    return {}


ROWS = [
    Row(name="kexue.lab.report.asset_path", make=asset_arguments),
    Row(name="kexue.lab.sphinx_mathfit.setup", make=no_arguments),
    Row(name="kexue.lab.mkdocs_mathfit.MathfitPlugin", make=no_arguments),
]
