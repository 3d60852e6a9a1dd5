r"""The period of a pendulum.

A pendulum of length $\ell$ released at the angle $\theta_0$ obeys
$\ddot\theta = -\frac{g}{\ell}\sin\theta$. For small angles its period is $2\pi\sqrt{\ell/g}$,
whatever the amplitude. Is that so for large ones?

## Energy gives the exact period

Multiply by $\dot\theta$ and integrate once; a quarter of the period is the time from $0$ to
$\theta_0$:

$$
T = 4\sqrt{\frac{\ell}{2g}} \int_0^{\theta_0} \frac{d\theta}{\sqrt{\cos\theta - \cos\theta_0}}
  = 4\sqrt{\frac{\ell}{g}}\, K\!\left(\sin\frac{\theta_0}{2}\right)
  = 2\pi\sqrt{\frac{\ell}{g}}
    \left(1 + \frac{1}{16}\theta_0^2 + \frac{11}{3072}\theta_0^4
    + \frac{173}{737280}\theta_0^6 + \cdots\right) .
$$

The arithmetic–geometric mean evaluates $K$ to full precision in four steps:
$K(k) = \pi / 2\,\mathrm{agm}(1, \sqrt{1-k^2})$.

## What is measured

We integrate the equation of motion with small steps and compare the time between two passages
with the formula. *If the two agree to six digits, the derivation is right*; if the small-angle
formula is off by more than a tenth at $\theta_0 = 2$, amplitude matters.

1. Steps of leapfrog, which keep the energy.
2. The exact period from `agm`.
"""

import math

import numpy as np

from kexue.lab import Lab


def run(lab: Lab) -> None:
    import matplotlib.pyplot as plt

    angles = np.linspace(0.1, 3.0, lab.pick(smoke=5, quick=40, full=200))
    exact = [_period(angle) for angle in lab.progress(angles, "angles")]
    simulated = _simulated_period(2.0, lab.pick(smoke=1e-3, quick=1e-4, full=1e-5))
    lab.table(
        "Periods",
        [
            {"$\\theta_0$": float(a), "exact": t, "over small-angle": t / (2 * math.pi)}
            for a, t in list(zip(angles, exact, strict=True))[:: max(1, len(angles) // 5)]
        ],
        caption="In units of $\\sqrt{\\ell/g}$.",
    )
    figure, axes = plt.subplots()
    axes.plot(angles, exact, label="exact")
    axes.axhline(2 * math.pi, color="C1", linestyle="--", label="small angles")
    axes.set_xlabel("amplitude / rad")
    axes.set_ylabel("period")
    axes.legend()
    lab.figure(
        "period",
        figure,
        "The period against the amplitude $\\theta_0$; the dashed line is $2\\pi$.",
    )
    lab.claim(
        "the simulated period agrees with the formula at $\\theta_0 = 2$",
        abs(simulated - _period(2.0)),
        "<=",
        1e-6,
    )
    lab.claim(
        "the small-angle formula is off by a tenth at $\\theta_0 = 2$",
        _period(2.0) / (2 * math.pi) - 1,
        ">=",
        0.1,
    )
    lab.observe("the period at 3 rad", _period(3.0), ">=", 16.0)


def _period(angle: float) -> float:
    a, b = 1.0, math.cos(angle / 2)
    for _ in range(8):
        a, b = (a + b) / 2, math.sqrt(a * b)
    return 2 * math.pi / a


def _simulated_period(angle: float, step: float) -> float:
    # released at rest, it is at rest again on the other side after half a period
    theta, velocity, time = angle, 0.0, 0.0
    while True:
        half = velocity - 0.5 * step * math.sin(theta)
        moved = theta + step * half
        after = half - 0.5 * step * math.sin(moved)
        if velocity < 0 <= after:
            return 2 * (time + step * velocity / (velocity - after))
        theta, velocity, time = moved, after, time + step
