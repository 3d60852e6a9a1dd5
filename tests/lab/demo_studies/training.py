"""A study that trains for a while.

It fits a line by gradient descent, slowly, and keeps the result.
"""

import os
import time

import torch

from kexue.lab import Lab


def run(lab: Lab) -> None:
    first = lab.cache("first", lambda: _fit(lab, slope=2.0))
    time.sleep(float(os.environ.get("DEMO_PAUSE", "0")))
    second = lab.cache("second", lambda: _fit(lab, slope=-1.0))
    lab.table("slopes", [{"first": first["slope"], "second": second["slope"]}])
    # Drawn after the cache: the number must not depend on whether the training ran.
    lab.observe("a random number", torch.rand((), generator=lab.generator()), ">=", 0.0)
    lab.claim("the first slope is found", abs(first["slope"] - 2.0), "<=", 0.1)
    lab.claim("the second slope is found", abs(second["slope"] + 1.0), "<=", 0.1)


def _fit(lab: Lab, *, slope: float) -> dict[str, torch.Tensor]:
    x = torch.randn(64, generator=lab.generator())
    noise = 0.01 * torch.randn(64, generator=lab.generator())
    fitted = torch.zeros(())
    for _ in (bar := lab.progress(range(100), "fitting")):
        residual = fitted * x - (slope * x + noise)
        fitted = fitted - 0.1 * (residual * x).mean()
        bar.metric(loss=float(residual.square().mean()))
        time.sleep(float(os.environ.get("DEMO_STEP", "0")))
    return {"slope": fitted}
