"""Contract rows of the diffusion ODE: kexue.generative.diffusion.ode."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from contract.row import Row

_NOT_FINITE = (
    "states of a solver are not inspected: it would synchronise the device at every step; "
    "NaN stays in its own row"
)


def _mixture() -> Any:
    from kexue.generative.diffusion import DiscreteSchedule, GaussianMixtureDenoiser

    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
    return GaussianMixtureDenoiser(
        means, torch.tensor([0.05, 0.1]), schedule=DiscreteSchedule.linear()
    )


def _heat_velocity(scaled: Any, sigma: Any) -> Any:
    from kexue.generative.diffusion import heat_velocity

    return heat_velocity(_mixture(), scaled, sigma)


def _angle_velocity(rotated: Any, angle: Any) -> Any:
    from kexue.generative.diffusion import angle_velocity

    return angle_velocity(_mixture(), rotated, angle)


def _cubes(x: Any) -> Any:
    return x**3 + x.sum(-1, keepdim=True)


def _divergence(x: Any, method: str = "exact") -> Any:
    from kexue.generative.diffusion import divergence

    return divergence(_cubes, x, method=method)


def _residual(x: Any, time: Any) -> Any:
    from kexue.generative.diffusion import continuity_residual

    def log_density(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return -(x**2).sum(-1) / (1 + time**2)

    return continuity_residual(log_density, lambda x, time: torch.sin(x), x, time)


def _solve(x: Any, start: float = 800.0, **options: Any) -> Any:
    from kexue.generative.diffusion import solve_ode

    return solve_ode(_mixture(), x, start=start, end=50.0, num_steps=5, **options)


def _encode(x: Any, start: float = 50.0) -> Any:
    from kexue.generative.diffusion import encode

    return encode(_mixture(), x, start=start, num_steps=5, coordinate="angle")


def _decode(latent: Any, end: float = 0.0) -> Any:
    from kexue.generative.diffusion import decode

    return decode(_mixture(), latent, end=end, num_steps=5, coordinate="angle")


def _likelihood(x: Any, generator: Any = None, num_probes: int = 2) -> Any:
    from kexue.generative.diffusion import log_likelihood

    return log_likelihood(
        _mixture(),
        x,
        start=100.0,
        method="heun",
        num_steps=4,
        divergence_method="exact" if generator is None else "hutchinson",
        num_probes=num_probes,
        generator=generator,
    )


def _adaptive_likelihood(x: Any) -> Any:
    from kexue.generative.diffusion import log_likelihood

    return log_likelihood(_mixture(), x, start=100.0, rtol=1e-3, atol=1e-3).bits_per_dimension(2)


def _states(rng: np.random.Generator) -> dict[str, Any]:
    return {"x": rng.normal(size=(3, 2))}


def _walk(integrator: str) -> Any:
    def call(state: Any, **options: Any) -> Any:
        from kexue.generative.diffusion.ode import integrate

        _refuse_other_than_rows(state)
        walk = getattr(integrate, integrator)
        return walk(lambda state, position: torch.sin(position + state), state, **options)

    return call


def _refuse_other_than_rows(state: torch.Tensor) -> None:
    """What callers of the integrators do at their own doors."""
    if state.ndim != 2 or state.is_complex():
        raise ValueError(f"state must be real with rows, got {state.dtype} {tuple(state.shape)}")


_GRID = {"grid": [0.0, 0.5, 1.0]}

ROWS = [
    Row(
        name="kexue.generative.diffusion.ode.integrate.euler",
        make=lambda rng: {"state": rng.normal(size=(3, 2)), **_GRID},
        call=_walk("euler"),
        arrays=("state",),
        backends=("torch",),
        batched=("state",),
        differentiable=("state",),
        wrong={"no positions": lambda given: {**given, "grid": []}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.integrate.heun",
        make=lambda rng: {"state": rng.normal(size=(3, 2)), **_GRID},
        call=_walk("heun"),
        arrays=("state",),
        backends=("torch",),
        batched=("state",),
        differentiable=("state",),
        wrong={"no positions": lambda given: {**given, "grid": []}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.integrate.dopri5",
        make=lambda rng: {
            "state": rng.normal(size=(3, 2)),
            "start": 0.0,
            "end": 1.0,
            "rtol": 1e-5,
            "atol": 1e-5,
        },
        call=_walk("dopri5"),
        arrays=("state",),
        backends=("torch",),
        wrong={"no tolerance": lambda given: {**given, "rtol": 0.0}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.flow.heat_velocity",
        make=lambda rng: {"scaled": rng.normal(size=(3, 2)), "sigma": np.array([0.05, 1.0, 9.0])},
        call=_heat_velocity,
        arrays=("scaled", "sigma"),
        backends=("torch",),
        batched=("scaled", "sigma"),
        differentiable=("scaled",),
        wrong={"no noise": lambda given: {**given, "sigma": 0 * given["sigma"]}},
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "one sigma for the whole batch is right",
        },
    ),
    Row(
        name="kexue.generative.diffusion.ode.flow.angle_velocity",
        make=lambda rng: {"rotated": rng.normal(size=(3, 2)), "angle": np.array([0.05, 0.8, 1.5])},
        call=_angle_velocity,
        arrays=("rotated", "angle"),
        backends=("torch",),
        batched=("rotated", "angle"),
        differentiable=("rotated",),
        wrong={"more than a right angle": lambda given: {**given, "angle": 1.6 + given["angle"]}},
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "one angle for the whole batch is right",
        },
    ),
    Row(
        name="kexue.generative.diffusion.ode.flow.divergence",
        make=_states,
        call=_divergence,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        wrong={"no probes": lambda given: {**given, "method": "hutchinson"}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.flow.continuity_residual",
        make=lambda rng: {**_states(rng), "time": np.array([0.1, 1.0, 2.0])},
        call=_residual,
        arrays=("x",),
        backends=("torch",),
        batched=("x", "time"),
        wrong={"times of another length": lambda given: {**given, "time": given["time"][:2]}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.solve.solve_ode",
        make=_states,
        call=_solve,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        wrong={
            "a start without noise": lambda given: {**given, "start": 0.0},
            "an unknown method": lambda given: {**given, "method": "rk4"},
        },
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.solve.encode",
        make=_states,
        call=_encode,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        wrong={"a start without noise": lambda given: {**given, "start": 0.0}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.solve.decode",
        make=lambda rng: {"latent": rng.normal(size=(3, 2))},
        call=_decode,
        arrays=("latent",),
        backends=("torch",),
        batched=("latent",),
        wrong={"an end before the data": lambda given: {**given, "end": -1.0}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.likelihood.log_likelihood",
        make=lambda rng: {**_states(rng), "generator": None},
        call=_likelihood,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        seeded="generator",
        wrong={"no probes": lambda given: {**given, "num_probes": 0}},
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.likelihood.LogLikelihood",
        make=_states,
        call=_adaptive_likelihood,
        arrays=("x",),
        backends=("torch",),
        instance=lambda: _likelihood(torch.zeros(2, 2, dtype=torch.float64)),
        without={"not_finite_is_refused": _NOT_FINITE},
    ),
    Row(
        name="kexue.generative.diffusion.ode.latents.interpolate_latents",
        make=lambda rng: {
            "first": rng.normal(size=(3, 2)),
            "second": rng.normal(size=(3, 2)),
            "weights": np.array([0.0, 0.3, 0.7, 1.0]),
        },
        arrays=("first", "second", "weights"),
        backends=("torch",),
        batched=("first", "second"),
        differentiable=("first", "second"),
        wrong={
            "codes of another shape": lambda given: {**given, "second": given["second"][:2]},
            "weights that are no list": lambda given: {**given, "weights": given["weights"][0]},
        },
        without={"not_finite_is_refused": "codes of a solver are not inspected; weights are"},
    ),
]
