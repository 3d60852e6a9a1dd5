"""One mode of a linear siamese network: its trajectory, and where it ends in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp

__all__ = [
    "ModeLimit",
    "ModeTrajectory",
    "mode_limit",
    "mode_trajectory",
    "weight_decay_threshold",
]

Gradient: TypeAlias = Literal["stop_gradient", "full", "target_only"]
"""Which terms of the encoder's gradient are kept: that of the prediction, both, the target's."""


@dataclass(frozen=True)
class ModeTrajectory:
    """Predictor, encoder and target of one mode over time.

    Attributes
    ----------
    time, predictor, encoder, target : array (times,)
        The target is the encoder, unless it follows it as an exponential average.

    Examples
    --------
    >>> trajectory = mode_trajectory([0.0, 20.0])
    >>> trajectory.encoder.round(6)
    array([0.1     , 0.806037])
    """

    time: Float[np.ndarray, " times"]
    predictor: Float[np.ndarray, " times"]
    encoder: Float[np.ndarray, " times"]
    target: Float[np.ndarray, " times"]


@dataclass(frozen=True)
class ModeLimit:
    """Where one mode ends.

    Attributes
    ----------
    predictor, encoder : float
        Their limits.
    collapsed : bool
        Whether the encoder ends at zero.

    Examples
    --------
    >>> mode_limit(predictor=1.3, encoder=0.2).collapsed
    True
    """

    predictor: float
    encoder: float
    collapsed: bool


def mode_trajectory(
    times: ArrayLike,
    *,
    predictor: float = 0.6,
    encoder: float = 0.1,
    gradient: Gradient = "stop_gradient",
    augmentation_variance: float = 0.0,
    weight_decay: float = 0.0,
    predictor_rate: float = 1.0,
    ema_rate: float | None = None,
    target: float | None = None,
) -> ModeTrajectory:
    r"""Integrate the gradient flow of one mode of a linear siamese network.

    With predictor p, encoder s, target t, views of covariance 1 in common and v of their own, the
    loss is :math:`\frac12 E(p s x_1 - t x_2)^2` and

    .. math::
        p' = a\,e\,s - w p, \qquad s' = e\,p - w s, \qquad e = t - (1+v)\,p s.

    The target is the encoder without its gradient ("stop_gradient"), or an average of it,
    :math:`t' = b (s - t)`. With "full", s' has :math:`p s - (1+v) s` besides, the gradient
    of the target; with "target_only" in place of e p. Times are those of the loss with its ½: a
    step of rate η on a loss without it takes the time 2η.

    Parameters
    ----------
    times : array (times,)
        Increasing and non-negative; the start is at time 0.
    predictor, encoder : float
        p and s at the start.
    gradient : {"stop_gradient", "full", "target_only"}
        What the encoder follows.
    augmentation_variance : float
        v.
    weight_decay : float
        w, of predictor and encoder.
    predictor_rate : float
        a, the predictor's learning rate over the encoder's.
    ema_rate : float, optional
        b, for BYOL; 0 keeps the target as it is.
    target : float, optional
        t at the start where there is an ``ema_rate``; the encoder by default.

    Returns
    -------
    ModeTrajectory
        Values at the times, to about 1e-9.

    Raises
    ------
    ValueError
        For times that do not increase or are negative, a negative variance, decay or rate, numbers
        that are not finite, an unknown gradient, an ``ema_rate`` with another gradient than
        "stop_gradient", or a ``target`` without one.
    ArithmeticError
        If the mode grows without bound, as with a predictor that does not learn.

    Examples
    --------
    The start of the article, with and without stop-gradient:

    >>> mode_trajectory([0, 10, 100]).encoder.round(4)
    array([0.1   , 0.7077, 0.8062])
    >>> mode_trajectory([0, 10, 100], gradient="full").encoder.round(4)
    array([0.1   , 0.0216, 0.    ])
    """
    times = checked_times(times)
    check_setting(gradient, weight_decay, predictor_rate, ema_rate)
    by_prediction, by_target = terms(gradient)
    a, w = predictor_rate, weight_decay
    along = 1 + _non_negative("augmentation_variance", augmentation_variance)
    start = [_finite("predictor", predictor), _finite("encoder", encoder)]
    if ema_rate is not None:
        start.append(start[1] if target is None else _finite("target", target))
    elif target is not None:
        raise ValueError("target must come with an ema_rate (0 to keep it), got none")

    def velocity(_: float, state: Any) -> list[float]:
        p, s = state[:2]
        t = s if ema_rate is None else state[2]
        error = t - along * p * s
        own = by_prediction * error * p + by_target * (p - along) * s
        moved = [a * error * s - w * p, own - w * s]
        return moved if ema_rate is None else [*moved, ema_rate * (s - t)]

    states = integrated(velocity, np.array(start), times)
    p, s, t = states[:, 0], states[:, 1], states[:, -1]
    return ModeTrajectory(time=times, predictor=p, encoder=s, target=t)


def mode_limit(
    *,
    predictor: float = 0.6,
    encoder: float = 0.1,
    gradient: Gradient = "stop_gradient",
    augmentation_variance: float = 0.0,
    predictor_rate: float = 1.0,
) -> ModeLimit:
    r"""Return where :func:`mode_trajectory` ends without weight decay, in closed form.

    Each flow conserves a number. With stop-gradient that is :math:`c = p^2 - a s^2`: at
    :math:`p^* = 1/(1+v)` the encoder has :math:`s^2 = (p^{*2} - c)/a`; it collapses where that is
    not positive, or where p must pass zero and :math:`c \ge 0`. BYOL whose target starts at the
    encoder ends there too. With the full gradient :math:`c = s^2 - (1-p)^2`, with the target's
    alone :math:`c = p + s^2/2`; the mode lives where c > 0 and c > 1.

    Parameters
    ----------
    predictor, encoder : float
        p and s at the start.
    gradient : {"stop_gradient", "full", "target_only"}
        What the encoder follows.
    augmentation_variance : float
        v.
    predictor_rate : float
        a. A predictor that does not learn (0) lets the encoder grow without bound or vanish.

    Returns
    -------
    ModeLimit
        The limits; an encoder at 0 is collapsed from the start.

    Raises
    ------
    ValueError
        For an unknown gradient, a negative variance or rate, numbers that are not finite, and for
        "full" and "target_only" with a variance or another rate than 1: no closed form.

    Examples
    --------
    >>> mode_limit(predictor=0.6, encoder=0.1)
    ModeLimit(predictor=1.0, encoder=0.806225774829855, collapsed=False)
    >>> round(mode_limit(predictor=0.6, encoder=0.1, gradient="full").predictor, 6)
    0.612702
    """
    check_setting(gradient, 0.0, predictor_rate, None)
    v = _non_negative("augmentation_variance", augmentation_variance)
    p, s = _finite("predictor", predictor), _finite("encoder", encoder)
    if gradient != "stop_gradient" and (v != 0 or predictor_rate != 1):
        raise ValueError(
            f"mode_limit with gradient {gradient!r} has a closed form for augmentation_variance 0 "
            f"and predictor_rate 1 only, got {augmentation_variance} and {predictor_rate}"
        )
    if s == 0:
        return ModeLimit(p, 0.0, True)
    if gradient == "stop_gradient":
        return _detached_limit(p, s, 1 / (1 + v), predictor_rate)
    c = s**2 - (1 - p) ** 2 if gradient == "full" else p + s**2 / 2
    if gradient == "full":
        if c > 0:
            return ModeLimit(1.0, math.copysign(math.sqrt(c), s), False)
        return ModeLimit(1 - math.copysign(math.sqrt(-c), 1 - p), 0.0, True)
    if c > 1:
        return ModeLimit(1.0, math.copysign(math.sqrt(2 * (c - 1)), s), False)
    return ModeLimit(c, 0.0, True)


def _detached_limit(p: float, s: float, best: float, a: float) -> ModeLimit:
    if a == 0:
        # s grows like exp(g t).
        growth = p - p**2 / best
        if growth == 0:
            return ModeLimit(p, s, False)
        return (
            ModeLimit(p, math.copysign(math.inf, s), False)
            if growth > 0
            else ModeLimit(p, 0.0, True)
        )
    c = p**2 - a * s**2
    # The predictor moves towards its best value; at ±√c the encoder has vanished.
    if c < (best**2 if p > 0 else 0.0):
        return ModeLimit(best, math.copysign(math.sqrt((best**2 - c) / a), s), False)
    return ModeLimit(math.copysign(math.sqrt(c), p), 0.0, True)


def weight_decay_threshold(*, augmentation_variance: float = 0.0) -> float:
    r"""Return the weight decay above which only collapse remains, 1/(4(1+v)).

    With stop-gradient and a = 1 the fixed points of a mode besides zero are
    :math:`p = s = (1 \pm \sqrt{1 - 4 w (1+v)}) / (2(1+v))`, for the loss with its ½.

    Parameters
    ----------
    augmentation_variance : float
        v.

    Returns
    -------
    float
        The largest w for which they are real.

    Raises
    ------
    ValueError
        For a negative variance.

    Examples
    --------
    >>> weight_decay_threshold(augmentation_variance=0.25)
    0.2
    """
    return 1 / (4 * (1 + _non_negative("augmentation_variance", augmentation_variance)))


def terms(gradient: Gradient) -> tuple[bool, bool]:
    """Whether the encoder follows the gradient of the prediction, and that of the target."""
    return gradient != "target_only", gradient != "stop_gradient"


def integrated(
    velocity: Callable[[float, Any], Any], start: Float[np.ndarray, " state"], times: Any
) -> Float[np.ndarray, "times state"]:
    """The states at the times of the flow that is at ``start`` at time 0."""
    if times[-1] == 0:
        return start[None].copy()
    with np.errstate(over="ignore", invalid="ignore"):
        solution = solve_ivp(
            velocity, (0.0, times[-1]), start, "DOP853", t_eval=times, rtol=1e-12, atol=1e-14
        )
    if not solution.success:
        raise ArithmeticError(f"the flow has no finite state at time {times[-1]:g}")
    return solution.y.T


def checked_times(times: ArrayLike) -> Float[np.ndarray, " times"]:
    """Times as float64, increasing from zero or later."""
    array = real_array("times", times)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"times must be one row of numbers, got shape {array.shape}")
    if array[0] < 0 or (np.diff(array) <= 0).any():
        raise ValueError(f"times must be non-negative and increasing, got {array}")
    return array


def check_setting(
    gradient: Any, weight_decay: float, predictor_rate: float, ema_rate: float | None
) -> None:
    """Refuse an unknown gradient, negative rates, and an average where none is followed."""
    if gradient not in get_args(Gradient):
        raise ValueError(
            f"gradient must be one of {', '.join(get_args(Gradient))}, got {gradient!r}"
        )
    _non_negative("weight_decay", weight_decay)
    _non_negative("predictor_rate", predictor_rate)
    if ema_rate is not None:
        _non_negative("ema_rate", ema_rate)
        if gradient != "stop_gradient":
            raise ValueError(
                f"ema_rate must come with gradient 'stop_gradient', got {gradient!r}: an averaged "
                "target has no gradient"
            )


def real_array(name: str, values: Any) -> Float[np.ndarray, "..."]:
    """Finite real numbers as float64."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return array.astype(np.float64)


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _non_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return float(value)
