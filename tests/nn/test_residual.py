"""kexue.nn.residual: the block with its shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kexue.nn.residual import Residual


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block(**parts) -> Residual:
    torch.manual_seed(0)
    return Residual(nn.Linear(4, 4), 4, alpha=1.7, branch_scale=0.3, **parts).double()


def test_bare_style_is_a_weighted_sum(x: torch.Tensor) -> None:
    residual = block(style="none")
    torch.testing.assert_close(residual(x), 1.7 * x + 0.3 * residual.sublayer(x))
    assert isinstance(residual.norm, nn.Identity)


def test_pre_style_normalises_what_the_sublayer_sees(x: torch.Tensor) -> None:
    residual = block()
    normalised = nn.functional.layer_norm(x, (4,))
    torch.testing.assert_close(residual(x), 1.7 * x + 0.3 * residual.sublayer(normalised))


def test_post_style_normalises_the_sum(x: torch.Tensor) -> None:
    residual = block(style="post")
    stream = 1.7 * x + 0.3 * residual.sublayer(x)
    torch.testing.assert_close(residual(x), nn.functional.layer_norm(stream, (4,)))


def test_post_style_sees_the_ratio_of_the_weights_alone(x: torch.Tensor) -> None:
    def norm(dim: int) -> nn.Module:
        return nn.LayerNorm(dim, eps=0.0)

    sublayer = nn.Linear(4, 4).double()
    one, two = (
        Residual(sublayer, 4, style="post", alpha=2 * c, branch_scale=0.5 * c, norm=norm).double()
        for c in (1.0, 7.0)
    )
    torch.testing.assert_close(one(x), two(x), rtol=1e-12, atol=1e-12)


def test_first_item_of_a_tuple_is_the_branch(x: torch.Tensor) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    residual = Residual(attention, 4, style="none").double()
    torch.testing.assert_close(residual(x, x, x), x + attention(x, x, x)[0])


def test_further_arguments_go_to_the_sublayer(x: torch.Tensor) -> None:
    class Shifted(nn.Module):
        def forward(self, x, by, *, times):
            return (x + by) * times

    residual = Residual(Shifted(), 4, style="none")
    torch.testing.assert_close(residual(x, 2.0, times=3.0), x + (x + 2) * 3)


def test_dropout_falls_on_the_branch_alone(x: torch.Tensor) -> None:
    residual = Residual(nn.Identity(), 4, style="none", dropout=1.0)
    torch.testing.assert_close(residual(x), x)
    torch.testing.assert_close(residual.eval()(x), 2 * x)


def test_weights_are_no_parameters() -> None:
    assert set(block().state_dict()) == {
        "sublayer.weight", "sublayer.bias", "norm.weight", "norm.bias",
    }  # fmt: skip


@pytest.mark.bad_input
def test_wrong_blocks_are_refused(x: torch.Tensor) -> None:
    linear = nn.Linear(4, 4)
    for wrong in ({"alpha": 0.0}, {"alpha": float("inf")}, {"branch_scale": float("nan")},
                  {"style": "sandwich"}, {"dropout": 1.5}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Residual(linear, 4, **wrong)
    with pytest.raises(ValueError, match="dim"):
        Residual(linear, 0)
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        Residual(lambda x: x, 4)
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\), got \(2, 3\)"):
        Residual(linear, 4)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 4\), got \(2, 5\)"):
        Residual(nn.Linear(4, 5), 4)(torch.zeros(2, 4))
