"""Under autocast, statistics and matrices keep the precision of the numbers given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kexue._precision import without_autocast
from kexue.linalg.cur import cur_decomposition
from kexue.linalg.rotation import align
from kexue.stats.angles import cosine_summary
from kexue.stats.hsic import centered_kernel_alignment, hsic, kernel_matrix
from kexue.stats.projection import GaussianRandomProjection, hadamard_transform

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
A, B = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))


def projected(x: Tensor) -> Tensor:
    return GaussianRandomProjection(4, random_state=0).fit(x).transform(x)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: align(x, A, B),
        lambda x: align(x, x.flip(0), B),
        hadamard_transform,
        projected,
        lambda x: torch.as_tensor(cosine_summary(x).mean_square),
        lambda x: hsic(x, x.square(), kernel_x="linear", kernel_y="linear"),
        lambda x: hsic(x, x.square()),
        lambda x: centered_kernel_alignment(x, x.square()),
        lambda x: kernel_matrix(x, kernel="linear"),
        lambda x: cur_decomposition(x, n_columns=3, n_rows=3).reconstruct(),
    ],
)
def test_autocast_rounds_nothing(compute: Callable[[Tensor], Tensor]) -> None:
    expected = compute(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = compute(X)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_autocast_goes_on_after_the_call_and_after_an_error() -> None:
    @without_autocast
    def product(x: Tensor, fail: bool = False) -> Tensor:
        if fail:
            raise ValueError("on purpose")
        return x @ x.T

    with torch.autocast("cpu", torch.bfloat16):
        assert product(X).dtype == torch.float32
        assert (X @ X.T).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="on purpose"):
            product(X, fail=True)
        assert (X @ X.T).dtype == torch.bfloat16
    assert product.__name__ == "product"
