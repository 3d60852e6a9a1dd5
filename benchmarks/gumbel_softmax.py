"""Gumbel-softmax against torch's own, and what each estimator costs.

Forward and backward of 512 x 4096 logits in float32, in the same run, on one thread and on as many
as the machine has cores. No package is needed beside torch.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import RelaxedOneHotCategorical
from torch.nn import functional

from benchmarks.timing import compare
from kexue.generative.reparameterization import (
    categorical_expectation,
    gumbel_max,
    gumbel_noise,
    gumbel_softmax,
)

SHAPE = (512, 4096)
TEMPERATURE = 0.7


def main() -> None:
    torch.manual_seed(0)
    agreement()
    for count in sorted({1, torch.get_num_threads()}):
        with threads(count):
            samples(count)
            draws(count)
            estimators(count)
    memory()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def agreement() -> None:
    """With one noise, ours and torch's formula are one sample with one gradient."""
    logits, noise = torch.randn(SHAPE), gumbel_noise(SHAPE)
    weight = torch.randn(SHAPE)

    def run(sample: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        value = sample(leaf)
        return value.detach(), torch.autograd.grad((value * weight).sum(), leaf)[0]

    ours = run(lambda o: gumbel_softmax(o, temperature=TEMPERATURE, noise=noise))
    theirs = run(lambda o: ((o + noise) / TEMPERATURE).softmax(-1))
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    if not difference < 1e-5:
        raise AssertionError(f"samples of one noise differ by {difference:.1e}")
    print(f"one noise, ours against torch's formula: difference {difference:.1e}")


def samples(count: int) -> None:
    logits = torch.randn(SHAPE, requires_grad=True)
    weight = torch.randn(SHAPE)

    def step(sample: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(sample(logits), logits, weight)

    for hard in (False, True):
        theirs = step(lambda o: functional.gumbel_softmax(o, TEMPERATURE, hard=hard))  # noqa: B023
        for validate, target in ((False, 1.0), (True, 1 / 1.3)):
            ours = step(
                lambda o: gumbel_softmax(
                    o,
                    temperature=TEMPERATURE,
                    hard=hard,  # noqa: B023
                    validate_args=validate,  # noqa: B023
                )
            )
            what = f"{'hard' if hard else 'soft'}, {'' if validate else 'not '}validated"
            compare(
                f"{what}, against functional.gumbel_softmax, {on(count)}",
                ours,
                theirs,
                agree=None,
                target=target,
            )
    temperature = torch.tensor(TEMPERATURE)
    compare(
        f"soft, against RelaxedOneHotCategorical.rsample, {on(count)}",
        step(lambda o: gumbel_softmax(o, temperature=TEMPERATURE, validate_args=False)),
        step(
            lambda o: RelaxedOneHotCategorical(temperature, logits=o, validate_args=False).rsample()
        ),
        agree=None,
    )


def draws(count: int) -> None:
    logits = torch.randn(SHAPE)
    compare(
        f"gumbel_noise against -log of exponential draws, {on(count)}",
        lambda: gumbel_noise(SHAPE),
        lambda: -torch.empty(SHAPE).exponential_().log(),
        agree=None,
    )
    compare(
        f"gumbel_max against torch.multinomial, {on(count)}",
        lambda: gumbel_max(logits, validate_args=False),
        lambda: torch.multinomial(logits.softmax(-1), 1),
        agree=None,
    )


def estimators(count: int) -> None:
    """Enumeration in one call against a loop over states; Gumbel-Rao against one sample."""
    logits = torch.randn(64, 3, 4)
    network = torch.nn.Sequential(
        torch.nn.Linear(12, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1)
    ).requires_grad_(False)

    def cost(states: Tensor) -> Tensor:
        return network(states.flatten(-2)).squeeze(-1)

    def loop() -> Tensor:
        log_p = logits.log_softmax(-1)
        total = torch.zeros(len(logits))
        for state in itertools.product(range(4), repeat=3):
            one_hot = functional.one_hot(torch.tensor(state), 4).float().expand_as(logits)
            total += (log_p * one_hot).sum((-2, -1)).exp() * cost(one_hot)
        return total

    compare(
        f"64 states, batch of 64: enumeration against a loop over states, {on(count)}",
        lambda: categorical_expectation(cost, logits, estimator="exact"),
        loop,
        agree=1e-5,
    )

    wide = torch.randn(256, 8, 32, requires_grad=True)
    matrix = torch.randn(32, 32)

    def step(estimator: str, draws: int) -> Callable[[], object]:
        def run() -> object:
            value = categorical_expectation(
                lambda z: ((z @ matrix) * z).sum((-2, -1)).sin(),
                wide,
                estimator=estimator,
                conditional_samples=draws,
            )
            return torch.autograd.grad(value.sum(), wide)

        return run

    for given in (4, 16):
        compare(
            f"Gumbel-Rao of {given} noises against straight-through Gumbel, {on(count)}",
            step("gumbel_rao", given),
            step("straight_through_gumbel", 1),
            agree=None,
            target=1 / (1 + given / 2),
        )


PEAK = """
from pathlib import Path
import torch
from kexue.generative.reparameterization import gumbel_softmax

def peak():
    # Linux only; getrusage would count the parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

gumbel_softmax(torch.zeros(4, 4), hard={hard}, validate_args=False)
torch.nn.functional.gumbel_softmax(torch.zeros(4, 4), hard={hard})
logits = torch.zeros(4096, 8192, requires_grad=True)
before = peak()
sample = {call}
print((peak() - before) / logits.nbytes)
"""


def memory() -> None:
    """Peak memory of a forward pass, with what it keeps for the backward pass."""
    calls = {
        "ours": "gumbel_softmax(logits, hard={hard}, validate_args=False)",
        "torch": "torch.nn.functional.gumbel_softmax(logits, hard={hard})",
    }
    for hard in (False, True):
        arrays = {}
        for name, call in calls.items():
            program = PEAK.format(hard=hard, call=call.format(hard=hard))
            finished = subprocess.run(
                [sys.executable, "-c", program],
                check=True,
                capture_output=True,
                text=True,
                cwd=Path(__file__).resolve().parents[1],
            )
            arrays[name] = float(finished.stdout)
        verdict = "met" if arrays["ours"] <= 3.05 else "MISSED"
        print(
            f"memory, {'hard' if hard else 'soft'}: ours {arrays['ours']:.2f} arrays of the "
            f"logits' size, torch {arrays['torch']:.2f}  target 3 {verdict}",
            flush=True,
        )


if __name__ == "__main__":
    main()
