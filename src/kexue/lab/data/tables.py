"""Tables of numbers: scikit-learn's classical sets, a user's own table, a user's matrix."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.data.arrays import ARRAY_SUFFIXES, first_of, read_arrays
from kexue.lab.data.files import as_path, file_text
from kexue.lab.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float64

__all__ = ["TABLES", "Tabular", "matrix", "tabular"]

TABLES = ("breast_cancer", "diabetes", "digits", "iris", "wine")

_TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
_SPARSE_SUFFIXES = (".svm", ".svmlight", ".libsvm")
# A sparse file of a few megabytes may stand for a dense matrix that no memory holds.
_MAX_DENSE = 2**28


@dataclass(frozen=True, eq=False)
class Tabular:
    """Samples with named features, and for each a class (an integer) or a number to predict.

    Where classes have names, class ``k`` is called ``target_names[k]``.
    """

    name: str
    features: Float64[np.ndarray, "n features"]
    target: np.ndarray
    feature_names: list[str]
    target_names: list[str]


@dataclass(frozen=True)
class _TextTable:
    path: Path
    names: list[str]
    line_numbers: list[int]
    rows: list[list[str]]


def tabular(name_or_path: str | Path = "iris") -> Tabular:
    """Return a table of features with a target.

    Parameters
    ----------
    name_or_path : str or Path
        One of scikit-learn's embedded sets, ``"iris"``, ``"wine"``, ``"breast_cancer"``,
        ``"digits"`` or ``"diabetes"``; or a file:

        - ``.csv``, ``.tsv`` or ``.txt`` with a comma, semicolon, tab or spaces between the columns,
          with or without a line of names; the last column is the target, where text means classes
          in alphabetical order;
        - ``.npz`` with an array ``X``, ``x``, ``features`` or ``data``, and an array ``y``,
          ``target`` or ``labels``.

    Raises
    ------
    DataError
        For an unknown name, and where a file is not what it should be.
    """
    if name_or_path in TABLES:
        return _embedded(str(name_or_path))
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise DataError(
            f"{name_or_path}: expected a file or one of {', '.join(TABLES)}, there is no such file"
        )
    suffix = path.suffix.lower()
    if suffix in _TEXT_SUFFIXES:
        return _tabular_from_text(path)
    if suffix == ".npz":
        return _tabular_from_arrays(path)
    raise DataError(
        f"{path}: expected a table as {', '.join(_TEXT_SUFFIXES)} or .npz, got "
        f"{'a folder' if path.is_dir() else f'a file that ends in {suffix!r}'}"
    )


def matrix(path: str | Path) -> np.ndarray:
    """Return the matrix in a file: one row a sample.

    Parameters
    ----------
    path : str or Path
        A ``.npy``, ``.npz``, ``.pt``, ``.pth`` or ``.safetensors`` file with one matrix in it (or
        one array at all: a vector becomes a column); a ``.csv``, ``.tsv`` or ``.txt`` table of
        numbers; or a ``.svm``, ``.svmlight`` or ``.libsvm`` file, without its targets.

    Returns
    -------
    ndarray (n, d)
        float32 where the file has floats of at most 32 bits, else float64.

    Raises
    ------
    DataError
        Where the file is not what it should be, or holds several matrices.
    """
    path = as_path(path)
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        return _as_matrix(path, _only_matrix(path, read_arrays(path)))
    if suffix in _TEXT_SUFFIXES:
        return _numbers(_text_table(path))
    if suffix in _SPARSE_SUFFIXES:
        return _matrix_from_svmlight(path)
    raise DataError(
        f"{path}: expected a matrix as "
        f"{', '.join((*ARRAY_SUFFIXES, *_TEXT_SUFFIXES, *_SPARSE_SUFFIXES))}, got "
        f"{'a folder' if path.is_dir() else f'a file that ends in {suffix!r}'}"
    )


def _embedded(name: str) -> Tabular:
    import numpy as np
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name}")()
    return Tabular(
        name,
        np.asarray(bunch.data, dtype=np.float64),
        np.asarray(bunch.target),
        [str(feature) for feature in bunch.feature_names],
        [str(target) for target in bunch.get("target_names", ())],
    )


def _tabular_from_text(path: Path) -> Tabular:
    import numpy as np

    table = _text_table(path)
    if len(table.names) < 2:
        raise DataError(f"{path}: expected at least one feature and the target, got one column")
    features = _numbers(table, columns=len(table.names) - 1)
    names = table.names[:-1]
    cells = [row[-1] for row in table.rows]
    if all(_is_number(cell) for cell in cells):
        values = np.array(cells, dtype=np.float64)
        whole = bool((values == np.round(values)).all())
        return Tabular(path.stem, features, values.astype(np.int64) if whole else values, names, [])
    classes, target = np.unique(cells, return_inverse=True)
    return Tabular(path.stem, features, target.astype(np.int64), names, classes.tolist())


def _tabular_from_arrays(path: Path) -> Tabular:
    import numpy as np

    arrays = read_arrays(path)
    features = first_of(arrays, "X", "x", "features", "data")
    target = first_of(arrays, "y", "target", "labels")
    if features is None or target is None:
        raise DataError(
            f"{path}: expected an array X and an array y, got {', '.join(arrays) or 'no array'}"
        )
    features = _as_matrix(path, features).astype(np.float64)
    if (
        target.shape not in ((len(features),), (len(features), 1))
        or target.dtype.kind not in "biuf"
    ):
        raise DataError(
            f"{path}: expected {len(features)} numbers as target, one a row of features, got "
            f"{target.dtype.name} of shape {target.shape}"
        )
    names = [f"x{column}" for column in range(features.shape[1])]
    return Tabular(path.stem, features, target.reshape(-1), names, [])


def _text_table(path: Path) -> _TextTable:
    """Read columns between commas, semicolons, tabs or spaces; a line without numbers is names."""
    lines = file_text(path).split("\n")
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    mark = max(",;\t", key=filled[0][1].count)
    separator = mark if mark in filled[0][1] else None
    line_numbers = [number for number, _ in filled]
    rows = [_cells(line, separator) for _, line in filled]
    width = len(rows[0])
    for number, row in zip(line_numbers, rows, strict=True):
        if len(row) != width:
            raise DataError(
                f"{path}, line {number}: expected {width} columns as above, got {len(row)}"
            )
    if any(_is_number(cell) for cell in rows[0]):
        return _TextTable(path, [f"x{column}" for column in range(width)], line_numbers, rows)
    if len(rows) == 1:
        raise DataError(f"{path}: expected rows of numbers, got one line without any")
    return _TextTable(path, rows[0], line_numbers[1:], rows[1:])


def _cells(line: str, separator: str | None) -> list[str]:
    if separator is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator))]


def _numbers(table: _TextTable, columns: int | None = None) -> np.ndarray:
    import numpy as np

    for line, row in zip(table.line_numbers, table.rows, strict=True):
        for name, cell in zip(table.names, row[:columns], strict=False):
            if not _is_number(cell):
                raise DataError(
                    f"{table.path}, line {line}: expected a number in the column {name}, "
                    f"got {cell!r}"
                )
    return np.array([row[:columns] for row in table.rows], dtype=np.float64)


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _only_matrix(path: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    if len(matrices) == 1:
        return arrays[matrices[0]]
    shown = ", ".join(f"{name} {arrays[name].shape}" for name in matrices[:5])
    more = f" and {len(matrices) - 5} more" if len(matrices) > 5 else ""
    raise DataError(
        f"{path}: expected a single matrix, got {shown + more if matrices else 'none'} among "
        f"{len(arrays)} arrays; save the one that you mean in a file of its own"
    )


def _as_matrix(path: Path, array: np.ndarray) -> np.ndarray:
    import numpy as np

    if array.dtype.kind not in "biuf":
        raise DataError(f"{path}: expected real numbers, got the type {array.dtype.name}")
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise DataError(
            f"{path}: expected a matrix with at least one row and column, got the shape "
            f"{array.shape}"
        )
    columns = array.reshape(len(array), -1)
    return columns if columns.dtype == np.float32 else columns.astype(np.float64)


def _matrix_from_svmlight(path: Path) -> np.ndarray:
    from sklearn.datasets import load_svmlight_file

    try:
        sparse, _ = load_svmlight_file(str(path))
    except (ValueError, OSError, IndexError, OverflowError) as error:
        raise DataError(
            f"{path}: expected an svmlight file, got something else ({error})"
        ) from error
    if 0 in sparse.shape or math.prod(sparse.shape) > _MAX_DENSE:
        raise DataError(
            f"{path}: expected a matrix with 1 to {_MAX_DENSE} entries, got "
            f"{' x '.join(map(str, sparse.shape))}"
        )
    return sparse.toarray()
