"""Contract rows of kexue.nn.init: samplers, NTK parametrisation, ramps, schemes, the audit."""

from __future__ import annotations

from typing import Any

import numpy as np

from contract.row import Row

_NOT_FINITE = (
    "a network is run in loops on accelerators, where looking at values costs a synchronisation; "
    "NaN stays in its own place"
)


def _fill(**options: Any) -> Any:
    import torch

    from kexue.nn.init import truncated_normal_

    return truncated_normal_(torch.empty(4, 5), **options)


def _scale(**options: Any) -> Any:
    import torch

    from kexue.nn.init import variance_scaling_

    return variance_scaling_(torch.empty(4, 5), **options)


def _network() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())


def _initialize(**options: Any) -> Any:
    from kexue.nn.init import transformer_init_

    network = _network()
    transformer_init_(network, **options)
    return network[0].weight


def _parametrize(**options: Any) -> Any:
    from kexue.nn.init import ntk_parametrize

    return ntk_parametrize(_network()[0], **options).weight


def _advance(n: int) -> Any:
    import torch

    from kexue.nn.init import advance_ramps

    ramp = _ramp()
    return advance_ramps(torch.nn.Sequential(ramp), n), ramp.alpha


def _ramp() -> Any:
    import torch

    from kexue.nn.init import GradualResidual

    block = GradualResidual(torch.nn.Linear(4, 4), steps=4)
    block.advance(3)
    return block


def _ntk() -> Any:
    from kexue.nn.init import NTKParametrization

    return NTKParametrization(0.5)


def _moments() -> Any:
    from kexue.nn.init import truncated_normal_moments

    return truncated_normal_moments()


def _saturation() -> Any:
    from kexue.nn.init import SoftmaxSaturation

    return SoftmaxSaturation(1.0, 0.9, 0.1, 0.2)


def _record() -> Any:
    from kexue.nn.init import SignalRecord

    return SignalRecord("fc1", "Linear", 1, 1.0, 1.0, 0.0, 0.0, None, ("dead",))


def _report() -> Any:
    from kexue.nn.init import SignalReport

    return SignalReport((_record(),), 1.0)


def _audit(x: Any, **options: Any) -> Any:
    from kexue.nn.init import audit_signal

    return audit_signal(_network().to(x.dtype), x, **options)


def _logits(rng: np.random.Generator) -> dict[str, Any]:
    return {"logits": rng.normal(size=(3, 5))}


def _standardized() -> Any:
    from kexue.nn.init import StandardizedActivation

    return StandardizedActivation("tanh", center=True)


ROWS = [
    Row(
        name="kexue.nn.init.activation.StandardizedActivation",
        make=lambda rng: {"x": rng.normal(size=(3, 4))},
        module=_standardized,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        compiles=True,
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "an activation takes any shape",
        },
    ),
    Row(
        name="kexue.nn.init.model.transformer_init_",
        make=lambda rng: {"scheme": "gpt2", "num_layers": 2},
        call=_initialize,
        backends=("torch",),
        seeded="generator",
        wrong={
            "an unknown scheme": lambda given: {"scheme": "xavier"},
            "a scheme without its size": lambda given: {"scheme": "t5"},
            "a negative deviation": lambda given: {**given, "embedding_std": -1.0},
        },
    ),
    Row(
        name="kexue.nn.init.ntk.NTKParametrization",
        make=lambda rng: {"raw": rng.normal(size=(3, 4))},
        module=_ntk,
        arrays=("raw",),
        backends=("torch",),
        batched=("raw",),
        differentiable=("raw",),
        compiles=True,
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "a parameter of any rank is scaled",
        },
    ),
    Row(
        name="kexue.nn.init.ntk.ntk_parametrize",
        make=lambda rng: {"gain": 2.0, "reinitialize": True},
        call=_parametrize,
        backends=("torch",),
        seeded="generator",
        wrong={
            "no gain": lambda given: {**given, "gain": 0.0},
            "another fan": lambda given: {**given, "mode": "fan"},
            "a vector": lambda given: {**given, "name": "bias"},
        },
    ),
    Row(
        name="kexue.nn.init.ramp.GradualResidual",
        make=lambda rng: {"x": rng.normal(size=(3, 4))},
        module=_ramp,
        arrays=("x",),
        backends=("torch",),
        batched=("x",),
        differentiable=("x",),
        compiles=True,
        without={
            "not_finite_is_refused": _NOT_FINITE,
            "wrong_rank_is_refused": "the rank is the sublayer's business",
        },
    ),
    Row(
        name="kexue.nn.init.ramp.advance_ramps",
        make=lambda rng: {"n": 1},
        call=_advance,
        backends=("torch",),
        wrong={"steps back": lambda given: {"n": -1}},
    ),
    Row(
        name="kexue.nn.init.sampling.TruncatedNormalMoments",
        make=lambda rng: {"mean": 0.0, "variance": 0.77},
        backends=("torch",),
        instance=_moments,
    ),
    Row(
        name="kexue.nn.init.sampling.truncated_normal_",
        make=lambda rng: {"mean": 0.5, "std": 2.0, "low": -1.0, "high": 3.0},
        call=_fill,
        backends=("torch",),
        seeded="generator",
        wrong={
            "a negative deviation": lambda given: {**given, "std": -1.0},
            "bounds the wrong way round": lambda given: {**given, "low": 4.0},
            "a mean that is no number": lambda given: {**given, "mean": float("nan")},
        },
    ),
    Row(
        name="kexue.nn.init.sampling.truncated_normal_moments",
        make=lambda rng: {"low": -1.0, "high": 3.0},
        backends=("torch",),
        wrong={"bounds the wrong way round": lambda given: {"low": 1.0, "high": 0.0}},
    ),
    Row(
        name="kexue.nn.init.sampling.variance_scaling_",
        make=lambda rng: {"scale": 2.0, "mode": "fan_avg", "distribution": "uniform"},
        call=_scale,
        backends=("torch",),
        seeded="generator",
        wrong={
            "no variance": lambda given: {**given, "scale": 0.0},
            "another fan": lambda given: {**given, "mode": "fan"},
            "another law": lambda given: {**given, "distribution": "cauchy"},
        },
    ),
    Row(
        name="kexue.nn.init.signal.SignalRecord",
        make=lambda rng: {
            "name": "fc1", "kind": "Linear", "calls": 1, "input_second_moment": 1.0,
            "output_second_moment": 1.0, "output_mean": 0.0, "zero_fraction": 0.0,
            "gradient_second_moment": None, "flags": (),
        },
        backends=("torch",),
        instance=_record,
    ),
    Row(
        name="kexue.nn.init.signal.SignalReport",
        make=lambda rng: {"records": (_record(),), "loss": 1.0},
        backends=("torch",),
        instance=_report,
    ),
    Row(
        name="kexue.nn.init.signal.SoftmaxSaturation",
        make=lambda rng: {
            "logit_second_moment": 1.0, "normalized_entropy": 0.9, "largest_probability": 0.1,
            "jacobian_norm": 0.2,
        },
        backends=("torch",),
        instance=_saturation,
    ),
    Row(
        name="kexue.nn.init.signal.audit_signal",
        make=lambda rng: {"x": rng.normal(size=(5, 4))},
        call=_audit,
        arrays=("x",),
        backends=("torch",),
        wrong={
            "bounds the wrong way round": lambda given: {**given, "low": 2.0, "high": 1.0},
            "nothing selected": lambda given: {**given, "include": lambda name, module: False},
        },
        without={
            "not_finite_is_refused": "to find where NaN begins is what the audit is for",
            "wrong_dtype_is_refused": "the model decides what it takes",
            "wrong_rank_is_refused": "the model decides what it takes",
        },
    ),
    Row(
        name="kexue.nn.init.signal.softmax_saturation",
        make=_logits,
        arrays=("logits",),
        backends=("torch",),
        wrong={
            "one entry": lambda given: {"logits": given["logits"][:, :1]},
            "a row without an entry": lambda given: {"logits": given["logits"] - float("inf")},
        },
        without={
            "not_finite_is_refused": "-inf is a mask; NaN and inf are tested",
            "wrong_rank_is_refused": "any number of rows is averaged",
        },
    ),
]  # fmt: skip
