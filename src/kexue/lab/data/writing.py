"""Text: the embedded prose and Python source, a user's text file, sentences, pairs, characters."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import decode_source, find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.data.files import file_text
from kexue.lab.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from jaxtyping import Int64
    from torch import Tensor

__all__ = [
    "SOURCE_MODULES",
    "Characters",
    "Pair",
    "pairs",
    "prose",
    "python_source",
    "sentences",
    "text",
]

SOURCE_MODULES = (
    "asyncio",
    "ctypes",
    "email",
    "http",
    "idlelib",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_CHINESE = "\u3000-\u303f\u3400-\u9fff\uff00-\uffef"
_LINE_BREAK_IN_CHINESE = re.compile(rf"(?<=[{_CHINESE}])\s*\n\s*(?=[{_CHINESE}])")
# A Western mark ends a sentence only before a space; a Chinese one needs none.
_SENTENCE_END = re.compile(
    r"""(?P<western>[.!?…]+["'”’»)\]]*)\s+ | [。！？][。！？…]*[”’」』）]*\s*""", re.VERBOSE
)
_ABBREVIATION = re.compile(
    r"^\d{1,3}\.$|(?<!\w)(?:e\.g|i\.e|cf|vs|Mr|Mrs|Ms|Dr|Prof|St|Fig|Eq|[A-Z])\.$"
)
_SENTENCE_GOES_ON = re.compile(r"[a-z，、；：,;:]")


@dataclass(frozen=True)
class Pair:
    """Two sentences, and where it is known the number that says how they belong together."""

    first: str
    second: str
    label: int | float | None = None


def prose() -> str:
    """Return English prose: Python's own language reference, 460 000 characters.

    The topics of ``pydoc_data.topics`` in the order of their names, with a blank line between them.
    The text differs a little from one version of Python to the next.
    """
    from pydoc_data.topics import topics

    return _joined(topics[name] for name in sorted(topics))


def python_source(modules: Sequence[str] | None = None) -> dict[str, str]:
    """Return the source text of packages or modules, by name, without importing them.

    Parameters
    ----------
    modules : sequence of str, optional
        Names of packages (all files below count) or modules; the default is twelve packages of the
        standard library. Those that are absent here, or have no source, are left out.

    Returns
    -------
    dict of str to str
        Each one's files in the order of their paths, with a blank line between them.
    """
    source = {}
    for name in SOURCE_MODULES if modules is None else modules:
        texts = [_source_text(file) for file in _source_files(name)]
        joined = _joined(text for text in texts if text.strip())
        if joined.strip():
            source[name] = joined
    return source


def text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, plain or gzipped."""
    return file_text(path)


def sentences(text: str) -> list[str]:
    """Split English or Chinese text into sentences.

    A blank line always ends one. So do 。！？ with the quotes and brackets that close behind them,
    and . ! ? … before a space, unless what follows goes on in lower case or the full stop belongs
    to an initial, a common abbreviation or the number of a list. Runs of white space become one
    space.
    """
    return [
        sentence
        for paragraph in _BLANK_LINE.split(text)
        for sentence in _sentences_of_paragraph(paragraph)
    ]


def pairs(path: str | Path) -> list[Pair]:
    """Return the sentence pairs of a file: two or three columns, separated by tabs.

    Parameters
    ----------
    path : str or Path
        A UTF-8 file, plain or gzipped. Each line holds two sentences and, in all lines or in none,
        a number: a class or a similarity. Empty lines are skipped.

    Returns
    -------
    list of Pair
        In the order of the file. A label without a decimal point is an int.

    Raises
    ------
    DataError
        For a line with another number of columns, an empty sentence, or a label that is no number.
    """
    found: list[Pair] = []
    columns = 0
    for number, line in enumerate(file_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        columns = columns or len(cells)
        where = f"{path}, line {number}"
        if len(cells) != columns or columns not in (2, 3):
            expected = f"{columns} columns as above" if found else "2 or 3 columns"
            raise DataError(f"{where}: expected {expected}, separated by tabs, got {len(cells)}")
        if not (cells[0] and cells[1]):
            raise DataError(f"{where}: expected two sentences, got an empty one")
        label = _number(cells[2], where) if columns == 3 else None
        found.append(Pair(cells[0], cells[1], label))
    return found


class Characters:
    """A vocabulary of characters, and the text it was made from as symbols.

    Parameters
    ----------
    text : str
        Where the characters are counted, and where ``batches`` come from.
    size : int, optional
        Number of symbols: the ``size - 1`` most frequent characters, and one symbol, the last, for
        every other character. Without it each character of the text has a symbol, and no other has.

    Attributes
    ----------
    symbols : tuple of str
        The characters in the order of their code points; the one for all others is U+FFFD.
    tokens : Tensor (length,)
        The whole text, encoded.

    Examples
    --------
    >>> characters = Characters("abracadabra")
    >>> characters.encode("cab").tolist()
    [2, 0, 1]
    >>> Characters("abracadabra", size=3).decode([0, 1, 2])
    'ab\N{REPLACEMENT CHARACTER}'
    """

    OTHER = "\N{REPLACEMENT CHARACTER}"

    def __init__(self, text: str, size: int | None = None) -> None:
        if not text:
            raise ValueError("a vocabulary needs some text, got an empty string")
        if size is not None and size < 2:
            raise ValueError(f"size must be at least 2, got {size}")
        counts = Counter(text)
        kept = sorted(counts, key=lambda character: (-counts[character], character))
        if size is not None:
            counts.pop(self.OTHER, None)
            kept = [character for character in kept if character != self.OTHER][: size - 1]
        self.symbols = (*sorted(kept), *([] if size is None else [self.OTHER]))
        self._has_other = size is not None
        self.tokens = self.encode(text)

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> Int64[Tensor, " length"]:
        """Return the symbols of ``text``; a ValueError names a character that has none."""
        import numpy as np
        import torch

        points = _code_points(text)
        known = _code_points("".join(self.symbols[:-1] if self._has_other else self.symbols))
        place = np.searchsorted(known, points).clip(max=len(known) - 1)
        unknown = known[place] != points
        if self._has_other:
            place[unknown] = len(self.symbols) - 1
        elif unknown.any():
            stranger = chr(points[unknown][0])
            raise ValueError(
                f"every character must be among the {len(self)} of the vocabulary, got "
                f"{stranger!r}; a vocabulary with a size has a symbol for all others"
            )
        return torch.from_numpy(place.astype(np.int64))

    def decode(self, tokens: Int64[Tensor, " length"] | Iterable[int]) -> str:
        """Return the text that symbols stand for."""
        numbers = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
        for number in numbers:
            if not 0 <= number < len(self):
                raise ValueError(f"symbols must be between 0 and {len(self) - 1}, got {number}")
        return "".join(self.symbols[number] for number in numbers)

    def batches(
        self,
        length: int,
        batch: int,
        generator: torch.Generator,
        *,
        tokens: Int64[Tensor, " tokens"] | None = None,
    ) -> Iterator[Int64[Tensor, "batch length"]]:
        """Return random windows of the text, without end.

        To predict each next symbol, ask for windows that are longer by one.

        Parameters
        ----------
        length : int
            Symbols in a window.
        batch : int
            Windows at a time.
        generator : torch.Generator
            Draws where they begin, on the CPU.
        tokens : Tensor (tokens,), optional
            What the windows are taken from, for instance the training part of ``self.tokens``.
        """
        tokens = self.tokens if tokens is None else tokens
        if length < 1 or batch < 1:
            raise ValueError(f"length and batch must be positive, got {length} and {batch}")
        if length > len(tokens):
            raise ValueError(
                f"a window must not be longer than the text's {len(tokens)} symbols, got {length}"
            )
        return _windows(tokens, length, batch, generator)


def _windows(
    tokens: Int64[Tensor, " tokens"], length: int, batch: int, generator: torch.Generator
) -> Iterator[Int64[Tensor, "batch length"]]:
    import torch

    windows = tokens.unfold(0, length, 1)
    while True:
        begin = torch.randint(len(windows), (batch,), generator=generator)
        yield windows[begin.to(tokens.device)]


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(text.strip("\n") for text in texts) + "\n"


def _source_files(name: str) -> list[Path]:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        return [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _source_text(file: Path) -> str:
    try:
        return decode_source(file.read_bytes())
    except (SyntaxError, UnicodeDecodeError):
        # Python's own tests hold files that are wrongly encoded on purpose.
        return ""


def _sentences_of_paragraph(paragraph: str) -> Iterator[str]:
    line = " ".join(_LINE_BREAK_IN_CHINESE.sub("", paragraph).split())
    begin = 0
    for end in _SENTENCE_END.finditer(line):
        if _SENTENCE_GOES_ON.match(line, end.end()):
            continue
        if end["western"] and _ABBREVIATION.search(line[begin : end.end()].rstrip()):
            continue
        yield line[begin : end.end()].strip()
        begin = end.end()
    if line[begin:]:
        yield line[begin:]


def _number(cell: str, where: str) -> int | float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: expected a number in the third column, got {cell!r}")
    return int(cell) if re.fullmatch(r"[+-]?\d+", cell) else value


def _code_points(text: str) -> np.ndarray:
    import numpy as np

    # Lone surrogates may stand in a str; they are characters like any other here.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
