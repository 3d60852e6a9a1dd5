"""Tables of numbers: scikit-learn's classical sets, a user's CSV file, a user's matrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kexue.lab.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float64

__all__ = ["TABLES", "Tabular", "matrix", "tabular"]

TABLES = ("breast_cancer", "diabetes", "digits", "iris", "wine")


@dataclass(frozen=True, eq=False)
class Tabular:
    """Samples with named features, and for each a class (an integer) or a number to predict."""

    name: str
    features: Float64[np.ndarray, "n features"]
    target: np.ndarray
    feature_names: list[str]
    target_names: list[str]


def tabular(name_or_path: str | Path = "iris") -> Tabular:
    """Return one of scikit-learn's embedded sets by name, or a user's file."""
    if str(name_or_path) in TABLES:
        return _embedded(str(name_or_path))
    raise DataError(f"{name_or_path}: expected one of {', '.join(TABLES)}")


def matrix(path: str | Path) -> np.ndarray:
    """Return the matrix in a file."""
    raise DataError(f"{path}: expected a matrix")


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
