"""kexue.nn.recurrent: derivatives of every kind, against autograd of torch's own modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.nn.recurrent import (
    OutputGatedGRU,
    gate_terms,
    gradient_contributions,
    gradient_flow,
    recurrent_init_,
    recurrent_jacobians,
)

Build = Callable[..., nn.Module]
KINDS: dict[str, Build] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "output_gated_gru": OutputGatedGRU,
}
STOCK = [kind for kind in KINDS if kind != "output_gated_gru"]
TWO_PARTS = ("lstm", "output_gated_gru")


def example(kind: str, *, seed: int = 0, scale: float = 1.5, **options: Any) -> Any:
    """A module of 5 units, an input of 6 steps and 2 sequences, and a random initial state."""
    torch.manual_seed(seed)
    module = KINDS[kind](3, 5, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    parts = tuple(0.5 * torch.randn(count, 2, 5, dtype=torch.float64) for _ in range(2))
    return module, x, parts if kind in TWO_PARTS else parts[0]


def joined(state: Any) -> Tensor:
    return state if isinstance(state, Tensor) else torch.cat(state, dim=-1)


def parted(kind: str, flat: Tensor) -> Any:
    """A flat state of one sequence, (S,), as a module takes it."""
    if kind not in TWO_PARTS:
        return flat[None, None]
    return tuple(part.contiguous()[None, None] for part in flat.chunk(2))


def by_autograd(
    kind: str, module: nn.Module, x: Tensor, state: Tensor, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """The state after some steps of the module itself, and its derivative by the first state."""

    def advance(flat: Tensor) -> Tensor:
        return joined(module(x[:steps, None], parted(kind, flat))[1])[0, 0]

    return advance(state).detach(), torch.autograd.functional.jacobian(advance, state)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_jacobians_equal_autograd_of_the_module(kind: str, bias: bool) -> None:
    """Five numbers of order one are added for an entry: 1e-11 is 5e4 roundings of float64."""
    module, x, state = example(kind, bias=bias)
    found = recurrent_jacobians(module, x, state)
    assert found.kind == kind
    assert found.state_names == (("h", "c") if kind in TWO_PARTS else ("h",))
    for b in range(2):
        at = joined(state)[0, b]
        for t in range(6):
            torch.testing.assert_close(found.states[t, b], at, rtol=0, atol=1e-13)
            at, expected = by_autograd(kind, module, x[t:, b], at)
            torch.testing.assert_close(found.jacobians[t, b], expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.states[6, b], at, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_agrees_to_1e_6(kind: str) -> None:
    module, x, state = example(kind)
    double = recurrent_jacobians(module, x, state).jacobians
    single = [part.float() for part in state] if kind in TWO_PARTS else state.float()
    single = tuple(single) if kind in TWO_PARTS else single
    found = recurrent_jacobians(copy.deepcopy(module).float(), x.float(), single).jacobians
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), double, rtol=0, atol=2e-6)


def test_half_precision_is_computed_in_single() -> None:
    module, x, _ = example("lstm")
    half = copy.deepcopy(module).to(torch.bfloat16)
    found = recurrent_jacobians(half, x.to(torch.bfloat16))
    same = recurrent_jacobians(half.float(), x.to(torch.bfloat16).float())
    assert found.jacobians.dtype == torch.float32
    assert torch.equal(found.jacobians, same.jacobians)


@pytest.mark.parametrize("kind", STOCK)
def test_higher_layers_and_both_directions_run_as_the_module_does(kind: str) -> None:
    """Outputs of the top layer are the module's; the Jacobian of each recurrence is autograd's."""
    module, x, state = example(kind, num_layers=2, bidirectional=True)
    output, last = module(x, state)
    for layer in range(2):
        for direction in range(2):
            found = recurrent_jacobians(module, x, state, layer=layer, direction=direction)
            index = 2 * layer + direction
            torch.testing.assert_close(found.states[-1], joined(last)[index], rtol=0, atol=1e-12)
    forward, backward = (
        recurrent_jacobians(module, x, state, layer=1, direction=d).states[1:, :, :5]
        for d in (0, 1)
    )
    torch.testing.assert_close(
        torch.cat([forward, backward.flip(0)], -1), output, rtol=0, atol=1e-12
    )

    alone = KINDS[kind](10, 5).double()
    suffix = "_l1_reverse"
    weights = {
        n.removesuffix(suffix) + "_l0": p for n, p in module.named_parameters() if suffix in n
    }
    alone.load_state_dict(weights)
    below = [recurrent_jacobians(module, x, state, direction=d).states[1:, :, :5] for d in (0, 1)]
    inputs = torch.cat([below[0], below[1].flip(0)], -1).flip(0)
    at = joined(state)[3, 0]
    _, expected = by_autograd(kind, alone, inputs[:, 0], at)
    found = recurrent_jacobians(module, x, state, layer=1, direction=1)
    torch.testing.assert_close(found.jacobians[0, 0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_the_input_agree(kind: str) -> None:
    module, x, state = example(kind)
    expected = recurrent_jacobians(module, x, state)
    first = KINDS[kind](3, 5, batch_first=True).double()
    first.load_state_dict(module.state_dict())
    found = recurrent_jacobians(first, x.transpose(0, 1), state)
    assert torch.equal(found.jacobians, expected.jacobians)
    single = tuple(s[:, 0] for s in state) if kind in TWO_PARTS else state[:, 0]
    found = recurrent_jacobians(module, x[:, 0], single)
    torch.testing.assert_close(found.jacobians, expected.jacobians[:, :1], rtol=0, atol=1e-14)


def test_relu_is_flat_at_zero_as_in_torch() -> None:
    module = nn.RNN(1, 3, nonlinearity="relu", bias=False).double()
    found = recurrent_jacobians(module, torch.zeros(2, 1, 1, dtype=torch.float64))
    assert torch.equal(found.jacobians, torch.zeros(2, 1, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", TWO_PARTS)
def test_gate_terms_are_the_derivative_with_the_output_gate_held(kind: str) -> None:
    """Both by autograd of the step in c alone, and as the c rows of J [D; I]."""
    module, x, state = example(kind)
    full = recurrent_jacobians(module, x, state)
    total = gate_terms(module, x, state).total
    assert total.shape == (5, 2, 5, 5)
    for b in range(2):
        for t in range(1, 6):
            h, c = full.states[t, b].chunk(2)
            gate = h / (c.tanh() if kind == "lstm" else c)

            def show(c: Tensor, gate: Tensor = gate) -> Tensor:
                return gate * (c.tanh() if kind == "lstm" else c)

            def carry(c: Tensor, t: int = t, b: int = b, show: Any = show) -> Tensor:
                start = (show(c)[None, None], c[None, None])
                return module(x[t : t + 1, b : b + 1], start)[1][1][0, 0]

            expected = torch.autograd.functional.jacobian(carry, c)
            torch.testing.assert_close(total[t - 1, b], expected, rtol=0, atol=1e-11)
            slope = torch.autograd.functional.jacobian(show, c)
            start = torch.cat([slope, torch.eye(5, dtype=torch.float64)])
            rows = (full.jacobians[t, b] @ start)[5:]
            torch.testing.assert_close(total[t - 1, b], rows, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "gru"])
def test_gate_terms_without_an_output_gate_sum_to_the_jacobian(kind: str) -> None:
    module, x, state = example(kind)
    terms = gate_terms(module, x, state)
    names = ["carry", "update_gate", "candidate", "reset_gate"] if kind == "gru" else ["recurrent"]
    assert list(terms.terms) == names
    expected = recurrent_jacobians(module, x, state).jacobians
    torch.testing.assert_close(terms.total, expected, rtol=0, atol=1e-14)


def test_terms_of_an_lstm_are_the_four_of_the_article() -> None:
    """Scalar cell: each term of the formula written out by hand."""
    torch.manual_seed(0)
    module, x = nn.LSTM(1, 1).double(), torch.randn(4, 1, 1, dtype=torch.float64)
    terms = gate_terms(module, x).terms
    states = recurrent_jacobians(module, x).states[:, 0]
    w, u = module.weight_ih_l0[:, 0].detach(), module.weight_hh_l0[:, 0].detach()
    bias = (module.bias_ih_l0 + module.bias_hh_l0).detach()
    for t in range(1, 4):
        (h, c), before = states[t], states[t - 1, 0]
        a = w * x[t, 0, 0] + u * h + bias
        i, f, g = a[0].sigmoid(), a[1].sigmoid(), a[2].tanh()
        o = (w * x[t - 1, 0, 0] + u * before + bias)[3].sigmoid()
        shown = o * (1 - c.tanh() ** 2)
        expected = {
            "forget": f,
            "forget_gate": f * (1 - f) * shown * c * u[1],
            "input_gate": i * (1 - i) * shown * g * u[0],
            "candidate": (1 - g**2) * shown * i * u[2],
        }
        assert list(terms) == list(expected)
        for name, value in expected.items():
            assert terms[name][t - 1].item() == pytest.approx(value.item(), abs=1e-14)


def test_product_of_gate_terms_is_close_to_the_derivative_of_two_steps_but_not_equal() -> None:
    """The way through the output gate is missing; the plain cc block is no judge at all."""
    module, x, _ = example("lstm", scale=2.0)
    full, total = recurrent_jacobians(module, x), gate_terms(module, x).total
    h, c = full.states[2].chunk(2, dim=-1)
    tanh = c.tanh()
    slope = torch.diag_embed(h / tanh * (1 - tanh**2))
    start = torch.cat([slope, torch.eye(5, dtype=torch.float64).expand(2, 5, 5)], dim=-2)
    exact = (full.jacobians[3] @ full.jacobians[2] @ start)[:, 5:]
    gap = (total[2] @ total[1] - exact).norm() / exact.norm()
    assert 1e-3 < gap < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_sum_to_the_gradient_of_autograd(kind: str) -> None:
    module, x, state = example(kind)
    readout = torch.randn(6, 2, 5, dtype=torch.float64)

    def loss(output: Tensor) -> Tensor:
        return (output * readout).sin().sum()

    parts = gradient_contributions(module, x, loss, state)
    assert all(parameter.grad is None for parameter in module.parameters())
    (expected,) = torch.autograd.grad(loss(module(x, state)[0]), module.weight_hh_l0)
    total = parts.recurrent_weight.sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_contribution_of_each_step_equals_that_of_an_unrolled_copy(kind: str) -> None:
    """One copy of the weight at each step: the gradient of copy t is the part of step t."""
    module, x, state = example(kind)
    copies = [copy.deepcopy(module) for _ in range(6)]
    outputs, states = [], state
    for one, step in zip(copies, x, strict=True):
        output, states = one(step[None], states)
        output.retain_grad()
        h = states if isinstance(states, Tensor) else states[0]
        # The next step has to use the tensor whose gradient is kept.
        states = output if states is h else (output, states[1])
        outputs.append(output)
    loss = torch.cat(outputs).pow(3).sum()
    loss.backward()
    parts = gradient_contributions(module, x, lambda output: output.pow(3).sum(), state)
    for t in range(6):
        expected = copies[t].weight_hh_l0.grad
        torch.testing.assert_close(parts.recurrent_weight[t], expected, rtol=0, atol=1e-11)
        gradient = outputs[t].grad[0].norm(dim=-1)
        torch.testing.assert_close(parts.state_gradient_norm[t], gradient, rtol=0, atol=1e-11)
    assert parts.norms[2].item() == pytest.approx(copies[2].weight_hh_l0.grad.norm().item())


def test_parts_far_below_the_square_root_of_the_smallest_float_are_seen() -> None:
    """Zero weights but one block: the gradient halves at each step; 1e-30 squared is no float32."""
    module = zeroed(nn.GRU(1, 2))
    module.bias_ih_l0.data[4:] = 1
    parts = gradient_contributions(module, torch.zeros(120, 1, 1), lambda output: output[-1].sum())
    expected = torch.full((117,), math.log(0.5))
    ratios = parts.state_gradient_norm.log().diff(dim=0)[:117, 0]
    torch.testing.assert_close(-ratios, expected, rtol=1e-5, atol=1e-5)
    assert 0 < parts.norms[20] < 1e-29


def test_first_step_brings_nothing_from_a_zero_state() -> None:
    module, x, _ = example("lstm")
    parts = gradient_contributions(module, x, lambda output: output[-1].sum())
    assert parts.norms[0] == 0
    assert (parts.norms[1:] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_log_norms_are_those_of_the_end_to_end_derivative(kind: str) -> None:
    module, x, state = example(kind)
    flow = gradient_flow(module, x, state)
    states = recurrent_jacobians(module, x, state).states
    assert flow.lags.tolist() == [1, 2, 3, 4, 5, 6]
    for lag in range(1, 7):
        for b in range(2):
            _, whole = by_autograd(kind, module, x[6 - lag :, b], states[6 - lag, b], lag)
            expected = torch.linalg.matrix_norm(whole, 2).log().item()
            assert flow.log_norm[lag - 1, b].item() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert flow.rate[0].item() == pytest.approx(flow.log_norm[-1, 0].item() / 6)


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru", "output_gated_gru"])
def test_lyapunov_exponents_sum_to_the_mean_log_determinant(kind: str) -> None:
    module, x, state = example(kind)
    flow = gradient_flow(module, x, state)
    jacobians = recurrent_jacobians(module, x, state).jacobians
    expected = torch.linalg.slogdet(jacobians).logabsdet.mean(0)
    torch.testing.assert_close(flow.lyapunov_exponents.sum(-1), expected, rtol=1e-10, atol=1e-10)
    assert (flow.lyapunov_exponents.diff(dim=-1) <= 0).all()


def test_lyapunov_exponents_of_one_step_by_hand() -> None:
    module, x, state = example("gru")
    jacobian = recurrent_jacobians(module, x[:1], state).jacobians[0, 0]
    expected = torch.linalg.qr(jacobian).R.diagonal().abs().log().sort(descending=True).values
    found = gradient_flow(module, x[:1], state).lyapunov_exponents[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def zeroed(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize(
    ("bias", "forget", "log"),
    [
        (0.0, 0.5, -math.log(2)),
        (1.0, 0.7310585786300049, -0.3132616875182228),
        (2.0, 0.8807970779778823, None),
        (3.0, 0.9525741268224334, None),
    ],
)
def test_forget_bias_alone_decides_how_long_a_cell_keeps(
    bias: float, forget: float, log: float | None
) -> None:
    """Zero weights: c keeps sigma(b) at each step, half of it after log 2 / -log sigma(b)."""
    half_life = {0.0: 1.0, 1.0: 2.2126777968008744, 2.0: 5.4609473107, 3.0: 14.2660004735}[bias]
    time = {0.0: 2.0, 1.0: 3.7182818284590455, 2.0: 1 + math.exp(2), 3.0: 21.0855369232}[bias]
    module = zeroed(nn.LSTM(2, 3).double())
    module.bias_ih_l0.data[3:6] = bias
    x = torch.zeros(50, 1, 2, dtype=torch.float64)
    cc = recurrent_jacobians(module, x).jacobians[:, 0, 3:, 3:]
    torch.testing.assert_close(cc, (forget * torch.eye(3, dtype=torch.float64)).expand(50, 3, 3))
    rate = gradient_flow(module, x).log_norm.diff(dim=0)[-1, 0].item()
    assert rate == pytest.approx(math.log(forget) if log is None else log, rel=1e-10)
    assert -math.log(2) / rate == pytest.approx(half_life, rel=1e-9)
    assert 1 / (1 - forget) == pytest.approx(time, rel=1e-9)


def test_gru_of_zeros_halves_the_state() -> None:
    module = zeroed(nn.GRU(2, 3).double())
    found = recurrent_jacobians(module, torch.zeros(4, 1, 2, dtype=torch.float64)).jacobians
    assert torch.equal(found[2, 0], 0.5 * torch.eye(3, dtype=torch.float64))


def test_three_thousand_steps_do_not_underflow() -> None:
    module = zeroed(nn.GRU(1, 4).double())
    module.bias_hh_l0.data[4:8] = -3
    flow = gradient_flow(module, torch.zeros(3000, 1, 1, dtype=torch.float64))
    assert flow.log_norm[-1, 0].item() == pytest.approx(-9145.7620547212, abs=1e-8)
    expected = torch.full((1, 4), -3.0485873516, dtype=torch.float64)
    torch.testing.assert_close(flow.lyapunov_exponents, expected, rtol=0, atol=1e-10)


def test_four_hundred_growing_steps_do_not_overflow() -> None:
    module = zeroed(nn.RNN(1, 3, nonlinearity="relu").double())
    module.weight_hh_l0.data = 4 * torch.eye(3, dtype=torch.float64)
    module.bias_ih_l0.data.fill_(1e-9)
    flow = gradient_flow(module, torch.zeros(400, 1, 1, dtype=torch.float64))
    assert flow.log_norm[-1, 0].item() == pytest.approx(400 * math.log(4), rel=1e-13)


def test_orthogonal_tanh_network_at_rest_keeps_every_norm() -> None:
    module = recurrent_init_(nn.RNN(2, 16).double())
    flow = gradient_flow(module, torch.zeros(64, 1, 2, dtype=torch.float64))
    assert flow.log_norm.abs().max() < 1e-10
    assert flow.lyapunov_exponents.abs().max() < 1e-10


def test_exactly_zero_jacobian_gives_minus_infinity_and_never_nan() -> None:
    module = zeroed(nn.RNN(2, 3).double())
    flow = gradient_flow(module, torch.zeros(5, 2, 2, dtype=torch.float64))
    assert (flow.log_norm == -math.inf).all()
    assert (flow.lyapunov_exponents == -math.inf).all()
    assert (flow.rate == -math.inf).all()


def test_pieces_of_a_long_sequence_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import kexue.nn.recurrent.flow as flow_module
    import kexue.nn.recurrent.jacobians as jacobians_module

    module, x, state = example("lstm")
    whole = gradient_flow(module, x, state)
    monkeypatch.setattr(flow_module, "_PIECE", 500)
    monkeypatch.setattr(jacobians_module, "_CACHED", 60)
    pieces = gradient_flow(module, x, state)
    assert torch.equal(whole.log_norm, pieces.log_norm)
    assert torch.equal(whole.lyapunov_exponents, pieces.lyapunov_exponents)


def test_simple_network_has_a_bounded_jacobian_as_a_function_of_its_weight() -> None:
    """sup over U of |U| sech^2(U h) = 0.44774320469430285 / |h|, at U h = 0.7717023192091041."""
    at, largest = 0.77170231920910422398, 0.44774320469430284917832424
    assert 2 * at * math.tanh(at) == pytest.approx(1, rel=1e-14)
    for h, expected in ((0.3, 1.492477), (0.9, 0.497492)):
        found = []
        for u in [at / h, *torch.linspace(0.01, 30, 80).tolist()]:
            module = zeroed(nn.RNN(1, 1).double())
            module.weight_hh_l0.data.fill_(u)
            start = torch.full((1, 1, 1), h, dtype=torch.float64)
            x = torch.zeros(1, 1, 1, dtype=torch.float64)
            found.append(recurrent_jacobians(module, x, start).jacobians.item())
        assert found[0] == max(found)
        assert found[0] == pytest.approx(largest / h, rel=1e-14)
        assert found[0] == pytest.approx(expected, abs=1e-6)


def test_products_have_the_newest_factor_on_the_left() -> None:
    module, x, state = example("gru")
    jacobians = recurrent_jacobians(module, x, state).jacobians[:, 0]
    product = reduce(lambda product, j: product @ j, jacobians.flip(0))
    found = gradient_flow(module, x, state).log_norm[-1, 0].exp().item()
    assert found == pytest.approx(torch.linalg.matrix_norm(product, 2).item(), rel=1e-12)
