"""Closed-form Jacobians against autograd's; flow and contributions; the article's cell."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import compare, measure
from kexue.nn.recurrent import (
    OutputGatedGRU,
    gradient_contributions,
    gradient_flow,
    recurrent_jacobians,
)

HIDDEN, LENGTH, BATCH = 64, 100, 4


def main() -> None:
    module, x = example()
    jacobians(module, x)
    seconds = measure(lambda: gradient_flow(module, x), repeats=3)
    verdict = "met" if seconds <= 2 else "MISSED"
    what = f"gradient_flow, LSTM, H {HIDDEN}, T {LENGTH}, B {BATCH}"
    print(f"{what}: {seconds:.2f} s  target 2 s {verdict}")
    contributions(module, x)
    cell()


def example() -> tuple[nn.LSTM, Tensor]:
    torch.manual_seed(0)
    return nn.LSTM(8, HIDDEN), torch.randn(LENGTH, BATCH, 8)


def lstm_step(module: nn.LSTM) -> Callable[[Tensor, Tensor], Tensor]:
    """One step of one sequence, on the state (h, c) in one vector."""
    weight_ih, weight_hh, bias_ih, bias_hh = (p.detach() for p in module.parameters())

    def step(state: Tensor, x: Tensor) -> Tensor:
        h, c = state.chunk(2)
        i, f, g, o = (weight_ih @ x + weight_hh @ h + bias_ih + bias_hh).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return torch.cat([o.sigmoid() * c.tanh(), c])

    return step


def trajectory(step: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """States before every step; the peers need them, too."""
    along = torch.func.vmap(step)
    states = [x.new_zeros(x.shape[1], 2 * HIDDEN)]
    for now in x[:-1]:
        states.append(along(states[-1], now))
    return torch.stack(states)


def jacobians(module: nn.LSTM, x: Tensor) -> None:
    step = lstm_step(module)
    each = torch.func.vmap(torch.func.vmap(torch.func.jacrev(step)))

    def by_transforms() -> Tensor:
        with torch.no_grad():
            return each(trajectory(step, x), x)

    def one_by_one() -> Tensor:
        with torch.no_grad():
            states = trajectory(step, x)
        rows = [
            torch.autograd.functional.jacobian(lambda s, now=now: step(s, now), state)
            for state, now in zip(states.flatten(0, 1), x.flatten(0, 1), strict=True)
        ]
        return torch.stack(rows).unflatten(0, (LENGTH, BATCH))

    what = f"recurrent_jacobians, LSTM, H {HIDDEN}, T {LENGTH}, B {BATCH}"
    for peer, theirs, target, repeats in (
        ("vmap(jacrev)", by_transforms, 1.5, 7),
        ("a loop of autograd.functional.jacobian", one_by_one, 50, 1),
    ):
        compare(
            f"{what}, against {peer}",
            lambda: recurrent_jacobians(module, x).jacobians,
            theirs,
            agree=1e-5,
            target=target,
            value=lambda found: found.numpy(),
            repeats=repeats,
        )


def contributions(module: nn.LSTM, x: Tensor) -> None:
    one = nn.LSTMCell(8, HIDDEN)
    one.load_state_dict({n.removesuffix("_l0"): p for n, p in module.state_dict().items()})

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    def unfused() -> Tensor:
        h = c = x.new_zeros(BATCH, HIDDEN)
        outputs = []
        for now in x:
            h, c = one(now, (h, c))
            outputs.append(h)
        return torch.autograd.grad(loss(torch.stack(outputs)), one.weight_hh)[0]

    compare(
        "gradient_contributions, against forward and backward of a loop of nn.LSTMCell",
        lambda: gradient_contributions(module, x, loss).recurrent_weight.sum(0),
        unfused,
        agree=1e-4,
        target=1 / 3,
        value=lambda found: found.detach().numpy(),
    )


def cell() -> None:
    torch.manual_seed(0)
    ours, theirs = OutputGatedGRU(8, HIDDEN), nn.GRUCell(8, HIDDEN)
    x = torch.randn(LENGTH, 32, 8)

    def loop() -> Tensor:
        h = x.new_zeros(32, HIDDEN)
        outputs = []
        for now in x:
            h = theirs(now, h)
            outputs.append(h)
        return torch.stack(outputs)

    for what, run_ours, run_theirs in (
        ("forward", lambda: ours(x)[0], loop),
        (
            "forward and backward",
            lambda: torch.autograd.grad(ours(x)[0].sum(), list(ours.parameters())),
            lambda: torch.autograd.grad(loop().sum(), list(theirs.parameters())),
        ),
    ):
        compare(
            f"OutputGatedGRU, {what}, H {HIDDEN}, T {LENGTH}, B 32, against a loop of nn.GRUCell",
            run_ours,
            run_theirs,
            agree=None,
            target=1 / 1.2,
        )


if __name__ == "__main__":
    main()
