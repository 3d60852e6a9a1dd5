"""kexue.nn.recurrent: initialisation, tasks, the article's cell, reports and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.nn.recurrent import (
    GradientFlow,
    OutputGatedGRU,
    adding_problem,
    copy_memory,
    gate_terms,
    gradient_contributions,
    gradient_flow,
    plot_gradient_flow,
    recurrent_init_,
    recurrent_jacobians,
)


def effective_bias(module: Any, suffix: str = "_l0") -> Tensor:
    return (getattr(module, f"bias_ih{suffix}") + getattr(module, f"bias_hh{suffix}")).detach()


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gates", [(nn.RNN, 1), (nn.LSTM, 4), (nn.GRU, 3), (OutputGatedGRU, 3)])
def test_every_gate_has_an_orthogonal_block_of_its_own(gates: Any) -> None:
    module = recurrent_init_(gates[0](3, 6).double(), gain=0.5, generator=source())
    for block in module.weight_hh_l0.detach().chunk(gates[1]):
        expected = 0.25 * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(block @ block.T, expected, rtol=0, atol=1e-14)


def test_every_layer_and_direction_is_initialised() -> None:
    module = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    recurrent_init_(module, recurrent="identity", gain=2.0, forget_bias=1.0)
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        for block in getattr(module, f"weight_hh{suffix}").chunk(4):
            assert torch.equal(block, 2 * torch.eye(4))
        expected = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(4)
        assert torch.equal(effective_bias(module, suffix), expected)
        assert not getattr(module, f"bias_hh{suffix}").any()


@pytest.mark.parametrize(("recurrent", "blocks"), [("orthogonal", "ih"), ("xavier", "hh")])
def test_xavier_bounds_are_those_of_one_gate(recurrent: Any, blocks: str) -> None:
    """Uniform on sqrt(6 / (fan in + fan out)): the largest of 1600 numbers comes close."""
    module = recurrent_init_(nn.GRU(40, 40), recurrent=recurrent, generator=source())
    bound = math.sqrt(6 / 80)
    for block in getattr(module, f"weight_{blocks}_l0").chunk(3):
        assert 0.98 * bound < block.abs().max().item() <= bound


@pytest.mark.parametrize(("build", "sign"), [(nn.LSTM, 1), (nn.GRU, 1), (OutputGatedGRU, -1)])
def test_forget_bias_is_the_sum_of_both_biases(build: Any, sign: int) -> None:
    module = recurrent_init_(build(3, 4), forget_bias=1.5)
    bias = effective_bias(module)
    assert torch.equal(bias[4:8], torch.full((4,), 1.5 * sign))
    assert not bias[:4].any()
    assert not bias[8:].any()


@pytest.mark.parametrize(("build", "sign"), [(nn.LSTM, 1), (nn.GRU, 1), (OutputGatedGRU, -1)])
def test_chrono_spreads_forgetting_times_uniformly(build: Any, sign: int) -> None:
    """1 / (1 - sigma(b)) is uniform on [2, 200]; the mean of 4000 has standard error 0.9."""
    from scipy import stats

    module = build(1, 4000)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(len(module.weight_ih_l0), 2))
    recurrent_init_(module.double(), recurrent="identity", max_timescale=200, generator=source())
    bias = effective_bias(module)
    times = 1 / torch.sigmoid(-sign * bias[4000:8000])
    assert times.mean().item() == pytest.approx(101, abs=4)
    assert stats.kstest(times.numpy(), stats.uniform(2, 198).cdf).pvalue > 1e-3
    if build is nn.LSTM:
        assert torch.equal(bias[:4000], -bias[4000:8000])


def test_same_seed_gives_the_same_start_whatever_the_global_state() -> None:
    one, two, three = (nn.LSTM(3, 4) for _ in range(3))
    for module, seed in ((one, 1), (two, 1), (three, 2)):
        torch.rand(1)
        recurrent_init_(module, max_timescale=20, generator=source(seed))
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.weight_hh_l0, three.weight_hh_l0)


def test_half_precision_modules_are_initialised() -> None:
    module = recurrent_init_(nn.GRU(3, 8).to(torch.bfloat16), max_timescale=10)
    block = module.weight_hh_l0.detach()[:8].float()
    torch.testing.assert_close(block @ block.T, torch.eye(8), rtol=0, atol=0.02)


def test_cell_follows_the_formulas_step_by_step() -> None:
    torch.manual_seed(0)
    cell, x = OutputGatedGRU(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    output, (last_h, last_c) = cell(x)
    h = c = torch.zeros(2, 4, dtype=torch.float64)
    for t in range(5):
        drive = x[t] @ cell.weight_ih_l0.T + cell.bias_ih_l0
        r, z, candidate = (drive + h @ cell.weight_hh_l0.T + cell.bias_hh_l0).chunk(3, dim=-1)
        r, z = r.sigmoid(), z.sigmoid()
        c = (1 - z) * c + z * candidate.tanh()
        h = r * c
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-14)
    torch.testing.assert_close(last_h[0], h, rtol=0, atol=1e-14)
    torch.testing.assert_close(last_c[0], c, rtol=0, atol=1e-14)


def test_cell_continues_from_its_state_and_takes_every_layout() -> None:
    torch.manual_seed(0)
    cell, x = OutputGatedGRU(3, 4), torch.randn(5, 2, 3)
    output, state = cell(x)
    first, between = cell(x[:2])
    second, last = cell(x[2:], between)
    torch.testing.assert_close(torch.cat([first, second]), output)
    torch.testing.assert_close(last, state)
    single, (h, _) = cell(x[:, 0])
    torch.testing.assert_close(single, output[:, 0])
    assert h.shape == (1, 4)
    cell.batch_first = True
    torch.testing.assert_close(cell(x.transpose(0, 1))[0], output.transpose(0, 1))


def test_cell_has_the_names_and_the_start_of_a_torch_module() -> None:
    cell, peer = OutputGatedGRU(3, 400), nn.GRU(3, 400)
    shapes = {name: value.shape for name, value in peer.state_dict().items()}
    assert {name: value.shape for name, value in cell.state_dict().items()} == shapes
    assert all(0.048 < p.abs().max().item() <= 0.05 for p in cell.parameters())
    assert [*OutputGatedGRU(3, 4, bias=False).state_dict()] == ["weight_ih_l0", "weight_hh_l0"]


def test_cell_runs_under_autocast() -> None:
    cell, x = OutputGatedGRU(3, 4), torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = cell(x)
        flow = gradient_flow(cell, x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(flow.log_norm, gradient_flow(cell, x).log_norm)


def test_adding_problem_marks_one_place_of_either_half() -> None:
    task = adding_problem(3000, 7, generator=source(), dtype=torch.float64)
    values, markers = task.inputs.unbind(-1)
    assert markers[:, :3].sum(1).eq(1).all()
    assert markers[:, 3:].sum(1).eq(1).all()
    assert (markers.sum(0) > 0).all()
    torch.testing.assert_close((values * markers).sum(1, keepdim=True), task.targets)


def test_adding_problem_is_guessed_with_an_error_of_one_sixth() -> None:
    """(S - 1)^2 has mean 1/6 and variance E(S - 1)^4 - 1/36 = 1/15 - 1/36."""
    task = adding_problem(20_000, 10, generator=source(), dtype=torch.float64)
    error = math.sqrt((1 / 15 - 1 / 36) / 20_000)
    assert (task.targets - 1).square().mean().item() == pytest.approx(1 / 6, abs=4 * error)


def test_copy_memory_is_laid_out_as_stated() -> None:
    task = copy_memory(50, 6, symbols=5, copy_length=3, generator=source())
    inputs, targets = task.inputs, task.targets
    assert inputs.shape == targets.shape == (50, 12)
    assert set(inputs[:, :3].unique().tolist()) == {1, 2, 3, 4, 5}
    assert not inputs[:, 3:8].any()
    assert inputs[:, 8].eq(6).all()
    assert not inputs[:, 9:].any()
    assert not targets[:, :9].any()
    assert torch.equal(targets[:, 9:], inputs[:, :3])


def test_copy_memory_without_memory_costs_what_is_stated() -> None:
    """Blanks are certain, each symbol costs log s: l log s / (d + 2 l) a step."""
    task = copy_memory(2, 20)
    certain = torch.full((40, 10), -math.inf)
    certain[:30, 0] = 0
    certain[30:, 1:9] = math.log(1 / 8)
    losses = nn.functional.cross_entropy(certain.repeat(2, 1), task.targets.flatten())
    assert losses.item() == pytest.approx(10 * math.log(8) / 40, rel=1e-6)


def zero_lstm() -> nn.LSTM:
    module = nn.LSTM(2, 3)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def test_flow_says_what_is_wrong_and_what_repairs_it() -> None:
    flow = gradient_flow(zero_lstm(), torch.zeros(100, 1, 2))
    (finding,) = flow.findings()
    assert finding.severity == "error"
    assert "falls to 1e-30 over 100 steps" in str(finding)
    assert "recurrent_init_(module, max_timescale=100)" in finding.advice
    calm = recurrent_init_(nn.RNN(2, 8))
    assert gradient_flow(calm, torch.zeros(100, 1, 2)).findings() == ()
    recurrent_init_(calm, gain=1.3)
    (finding,) = gradient_flow(calm, torch.zeros(50, 1, 2)).findings()
    assert "grows to 1e+6 over 50 steps" in str(finding)
    assert finding.severity == "warning"


def test_contributions_say_when_the_earlier_half_is_lost() -> None:
    x = torch.randn(64, 4, 2, generator=source())
    torch.manual_seed(0)
    parts = gradient_contributions(nn.LSTM(2, 16), x, lambda output: output[-1].sum())
    (finding,) = parts.findings()
    assert "first 32 of 64 steps" in finding.message
    kept = recurrent_init_(nn.LSTM(2, 16), max_timescale=100, generator=source())
    assert gradient_contributions(kept, x, lambda output: output[-1].sum()).findings() == ()


@pytest.mark.parametrize(
    "diagnose",
    [gradient_flow, gate_terms, lambda m, x: gradient_contributions(m, x, lambda o: o.sum())],
    ids=["flow", "terms", "contributions"],
)
def test_results_print_draw_and_become_json(diagnose: Callable[..., Any]) -> None:
    from matplotlib import pyplot as plt

    found = diagnose(nn.GRU(2, 3), torch.randn(5, 2, 2))
    assert len(found.table().splitlines()) == len(found.rows()) + 1 > 2
    json.dumps(found.to_dict())
    ax = found.plot()
    assert ax.get_xlabel()
    assert found.plot(ax) is ax
    plt.close("all")


def test_plot_draws_the_mean_power_of_ten_for_each_label() -> None:
    from matplotlib import pyplot as plt

    flow = GradientFlow(
        "gru",
        torch.arange(1, 4),
        math.log(10) * torch.tensor([[1.0, 3.0], [-2.0, 0.0], [-math.inf, 0.0]]).double(),
        torch.zeros(2, 1, dtype=torch.float64),
    )
    ax = plot_gradient_flow({"one": flow, "two": flow})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    x, y = ax.get_lines()[0].get_data()
    assert x.tolist() == [1, 2, 3]
    assert y[:2].tolist() == pytest.approx([2, -1])
    assert math.isnan(y[2])
    assert plot_gradient_flow({"again": flow}, ax=ax) is ax
    plt.close("all")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: recurrent_jacobians(nn.Linear(3, 5), x), TypeError, "nn.RNN, nn.LSTM, nn.GRU"),
        (lambda x: gradient_flow(nn.LSTMCell(3, 5), x), TypeError, "LSTMCell"),
        (lambda x: recurrent_init_(nn.Linear(3, 5)), TypeError, "Linear"),
        (lambda x: gradient_contributions(nn.Linear(3, 5), x, sum), TypeError, "Linear"),
        (lambda x: gate_terms(nn.LSTM(3, 5, proj_size=2), x), ValueError, "proj_size"),
        (lambda x: recurrent_init_(nn.LSTM(3, 5, proj_size=2)), ValueError, "proj_size"),
        (lambda x: gradient_flow(nn.GRU(3, 5, 2), x, layer=2), ValueError, "between 0 and 1"),
        (lambda x: gradient_flow(nn.GRU(3, 5, 2), x, layer=-1), ValueError, "between 0 and 1"),
        (lambda x: gate_terms(nn.GRU(3, 5), x, direction=1), ValueError, "direction must be 0"),
        (lambda x: recurrent_jacobians(nn.GRU(4, 5), x), ValueError, "4 features, got 3"),
        (lambda x: recurrent_jacobians(nn.GRU(3, 5), x[0, 0]), ValueError, "2 or 3 dimensions"),
        (lambda x: recurrent_jacobians(nn.GRU(3, 5), x[:0]), ValueError, "at least one step"),
        (lambda x: recurrent_jacobians(nn.GRU(3, 5), x / 0), ValueError, "finite"),
        (lambda x: recurrent_jacobians(nn.GRU(3, 5), x.long()), TypeError, "int64"),
        (lambda x: recurrent_jacobians(nn.GRU(3, 5), x, x), ValueError, r"\(1, 2, 5\)"),
        (lambda x: recurrent_jacobians(nn.LSTM(3, 5), x, x), ValueError, "h and c"),
        (lambda x: gate_terms(nn.LSTM(3, 5), x[:1]), ValueError, "at least 2 steps"),
        (lambda x: gate_terms(OutputGatedGRU(3, 5), x[:1]), ValueError, "at least 2 steps"),
        (
            lambda x: gradient_contributions(nn.GRU(3, 5, 2), x, torch.sum),
            ValueError,
            "one layer and one direction",
        ),
        (
            lambda x: gradient_contributions(nn.GRU(3, 5, bidirectional=True), x, torch.sum),
            ValueError,
            "one layer and one direction",
        ),
        (
            lambda x: gradient_contributions(nn.GRU(3, 5), x, lambda o: o[0]),
            ValueError,
            "one element",
        ),
        (
            lambda x: gradient_contributions(nn.GRU(3, 5), x, lambda o: torch.ones(())),
            ValueError,
            "depend on the output",
        ),
        (lambda x: recurrent_init_(nn.GRU(3, 5), recurrent="normal"), ValueError, "orthogonal"),
        (lambda x: recurrent_init_(nn.GRU(3, 5), gain=math.nan), ValueError, "gain"),
        (lambda x: recurrent_init_(nn.GRU(3, 5), max_timescale=2), ValueError, "above 2"),
        (lambda x: recurrent_init_(nn.RNN(3, 5), forget_bias=1), ValueError, "plain RNN"),
        (lambda x: recurrent_init_(nn.RNN(3, 5), max_timescale=9), ValueError, "plain RNN"),
        (
            lambda x: recurrent_init_(nn.GRU(3, 5), forget_bias=1, max_timescale=9),
            ValueError,
            "not both",
        ),
        (
            lambda x: recurrent_init_(nn.GRU(3, 5, bias=False), forget_bias=1),
            ValueError,
            "bias=False",
        ),
        (lambda x: adding_problem(1, 1), ValueError, "length must be at least 2"),
        (lambda x: adding_problem(0, 5), ValueError, "batch_size must be at least 1"),
        (lambda x: copy_memory(1, 0), ValueError, "delay must be at least 1"),
        (lambda x: copy_memory(0, 1), ValueError, "batch_size must be at least 1"),
        (lambda x: OutputGatedGRU(0, 5), ValueError, "input_size"),
        (lambda x: OutputGatedGRU(4, 5)(x), ValueError, "4 features, got 3"),
        (lambda x: OutputGatedGRU(3, 5)(x[None]), ValueError, "2 or 3 dimensions"),
        (lambda x: OutputGatedGRU(3, 5)(x[:0]), ValueError, "at least one step"),
        (lambda x: OutputGatedGRU(3, 5)(x, (x, x)), ValueError, "initial h"),
        (lambda x: plot_gradient_flow({}), ValueError, "at least one"),
    ],
)
def test_refusals(call: Callable[[Tensor], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(torch.randn(4, 2, 3))


def test_states_that_overflow_are_refused_with_the_step() -> None:
    module = nn.RNN(1, 2, nonlinearity="relu")
    nn.init.constant_(module.weight_hh_l0, 1e10)
    nn.init.ones_(module.bias_ih_l0)
    with pytest.raises(ValueError, match=r"overflow torch\.float32 at step"):
        recurrent_jacobians(module, torch.ones(20, 1, 1))
