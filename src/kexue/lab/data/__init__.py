"""The data doors: embedded sets that need no network, and a user's own files.

Embedded are scikit-learn's digits, photographs and tables, the prose of ``pydoc_data.topics`` and
the source text of the standard library. A user's own come through ``--data PATH``; a file that is
not what its door expects is refused with a ``DataError`` of one sentence, and none is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.data.files import as_path, digest, is_text
from kexue.lab.data.idx import labels_beside
from kexue.lab.data.pictures import Images, Split, digits, images, photographs, pictures
from kexue.lab.data.tables import TABLES, Tabular, matrix, tabular
from kexue.lab.data.writing import (
    SOURCE_MODULES,
    Characters,
    Pair,
    pairs,
    prose,
    python_source,
    sentences,
    text,
)

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32
    from torch import Tensor

__all__ = [
    "SOURCE_MODULES",
    "TABLES",
    "Characters",
    "Data",
    "Images",
    "Pair",
    "Split",
    "Tabular",
    "digits",
    "images",
    "matrix",
    "pairs",
    "photographs",
    "pictures",
    "prose",
    "python_source",
    "sentences",
    "tabular",
    "text",
]


class Data:
    """What a study may read: the embedded sets, and the user's file or folder where one was given.

    Parameters
    ----------
    path : str or Path, optional
        The user's own data; a DataError where there is nothing of this name.
    seed : int
        Decides the split of images that come without one.
    """

    Characters = Characters

    def __init__(self, path: str | Path | None = None, seed: int = 0) -> None:
        self.path = None if path is None else as_path(path)
        self.seed = seed
        self._fingerprint: str | None = None

    def fingerprint(self) -> str | None:
        """Return a digest of what the user handed in; None where nothing was.

        It covers a file's contents, with the labels beside a file of images, or the names and
        contents of all files in a folder. It is computed once.
        """
        if self.path is not None and self._fingerprint is None:
            labels = labels_beside(self.path)
            self._fingerprint = digest(self.path, *([labels] if labels else []))
        return self._fingerprint

    @property
    def holds_text(self) -> bool:
        """Whether the user handed in a text file: for studies that take images or text."""
        return self.path is not None and is_text(self.path)

    def digits(self, *, held_out: int = 200) -> Images:
        """Return the embedded digits, with the same split for every seed."""
        return digits(held_out=held_out)

    def images(self) -> Images:
        """Return the user's images, or the digits where none were given."""
        return digits() if self.path is None else images(self.path, seed=self.seed)

    def photographs(self) -> list[Float32[Tensor, "3 height width"]]:
        """Return the two embedded photographs."""
        return photographs()

    def tabular(self, name: str | None = None, path: str | Path | None = None) -> Tabular:
        """Return the embedded table ``name``, or that in ``path``; else the user's, else iris."""
        return tabular(name or path or self.path or "iris")

    def prose(self) -> str:
        """Return the embedded English prose."""
        return prose()

    def python_source(self, modules: Sequence[str] | None = None) -> dict[str, str]:
        """Return the source text of modules of the standard library by name."""
        return python_source(modules)

    def text(self) -> str:
        """Return the user's text, or the embedded prose where none was given."""
        return prose() if self.path is None else text(self.path)

    def sentences(self, text: str) -> list[str]:
        """Split English or Chinese text into sentences."""
        return sentences(text)

    def pairs(self) -> list[Pair] | None:
        """Return the user's sentence pairs, or None where none were given."""
        return None if self.path is None else pairs(self.path)

    def matrix(self) -> np.ndarray | None:
        """Return the user's matrix, or None where none was given."""
        return None if self.path is None else matrix(self.path)
