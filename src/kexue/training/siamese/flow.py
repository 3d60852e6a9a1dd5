"""The gradient flow of a linear siamese network, in matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from kexue.training.siamese.dynamics import (
    Gradient,
    check_setting,
    checked_times,
    integrated,
    real_array,
    terms,
)

__all__ = ["LinearTrajectory", "linear_siamese_flow"]


@dataclass(frozen=True)
class LinearTrajectory:
    """Encoder, predictor and target of a linear network over time.

    Attributes
    ----------
    time : array (times,)
        As asked for.
    encoder, target : array (times, k, d)
        The target is the encoder, unless it follows it as an exponential average.
    predictor : array (times, k, k)
        The predictor.

    Examples
    --------
    >>> trajectory = linear_siamese_flow(
    ...     [[0.1]], [[0.6]], covariance=[[1.0]], augmentation_covariance=[[0.0]], times=[0, 20]
    ... )
    >>> trajectory.encoder[-1].round(6)
    array([[0.806037]])
    """

    time: Float[np.ndarray, " times"]
    encoder: Float[np.ndarray, "times k d"]
    predictor: Float[np.ndarray, "times k k"]
    target: Float[np.ndarray, "times k d"]


def linear_siamese_flow(
    encoder: ArrayLike,
    predictor: ArrayLike,
    *,
    covariance: ArrayLike,
    augmentation_covariance: ArrayLike,
    times: ArrayLike,
    gradient: Gradient = "stop_gradient",
    weight_decay: float = 0.0,
    predictor_rate: float = 1.0,
    ema_rate: float | None = None,
) -> LinearTrajectory:
    r"""Integrate the gradient flow of a linear encoder W and predictor P.

    The loss is :math:`\frac12 E|P W x_1 - T x_2|^2` of two views with covariance
    :math:`X = E x_1 x_2^T` in common and :math:`X + V` each:

    .. math::
        P' = a E W^T - w P, \qquad W' = P^T E - w W, \qquad E = T X - P W (X + V).

    T is W without its gradient ("stop_gradient") or follows it, :math:`T' = b (W - T)`. With
    "full", W' has :math:`P W X - W (X + V)` besides, the gradient of the target; with "target_only"
    in place of :math:`P^T E`. With stop-gradient :math:`W W^T - P^T P / a` is conserved for w = 0,
    and fades as exp(-2wt).

    Parameters
    ----------
    encoder : array (k, d)
        W at the start, and T.
    predictor : array (k, k)
        P at the start.
    covariance, augmentation_covariance : array (d, d)
        X and V, symmetric and positive semidefinite.
    times : array (times,)
        Increasing and non-negative; the start is at time 0.
    gradient : {"stop_gradient", "full", "target_only"}
        What the encoder follows.
    weight_decay : float
        w, of predictor and encoder.
    predictor_rate : float
        a, the predictor's learning rate over the encoder's.
    ema_rate : float, optional
        b, for BYOL.

    Returns
    -------
    LinearTrajectory
        Matrices at the times, to about 1e-9.

    Raises
    ------
    ValueError
        For shapes that do not fit, covariances that are not symmetric or have a negative variance,
        times that do not increase or are negative, a negative decay or rate, numbers that are not
        finite, an unknown gradient, or an ``ema_rate`` with another gradient than "stop_gradient".
    TypeError
        For what is no array of real numbers.
    ArithmeticError
        If the network grows without bound, as with a predictor that does not learn.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> weight, predictor = rng.normal(size=(3, 5)), rng.normal(size=(3, 3))
    >>> trajectory = linear_siamese_flow(
    ...     weight, predictor, covariance=np.eye(5), augmentation_covariance=0.2 * np.eye(5),
    ...     times=[0, 30],
    ... )
    >>> first, last = (w @ w.T - p.T @ p for w, p in zip(trajectory.encoder, trajectory.predictor))
    >>> bool(np.allclose(first, last, atol=1e-8))
    True
    """
    start, head, shared, noise = (
        real_array(name, matrix)
        for name, matrix in (
            ("encoder", encoder),
            ("predictor", predictor),
            ("covariance", covariance),
            ("augmentation_covariance", augmentation_covariance),
        )
    )
    _check_shapes(start, head, shared, noise)
    times = checked_times(times)
    check_setting(gradient, weight_decay, predictor_rate, ema_rate)
    by_prediction, by_target = terms(gradient)
    a, w = predictor_rate, weight_decay
    view = shared + noise
    k, d = start.shape
    ends = [k * k, k * k + k * d]

    def matrices(state: Any) -> tuple[Any, Any, Any]:
        pieces = np.split(state, ends, axis=-1)
        predictor = pieces[0].reshape(*state.shape[:-1], k, k)
        encoder, target = (piece.reshape(*state.shape[:-1], -1, d) for piece in pieces[1:])
        return predictor, encoder, encoder if ema_rate is None else target

    def velocity(_: float, state: Any) -> Any:
        P, W, T = matrices(state)
        E = T @ shared - P @ W @ view
        own = by_prediction * P.T @ E + by_target * (P @ W @ shared - W @ view)
        moved = [a * E @ W.T - w * P, own - w * W]
        moved += [] if ema_rate is None else [ema_rate * (W - T)]
        return np.concatenate([matrix.ravel() for matrix in moved])

    parts = [head, start] if ema_rate is None else [head, start, start]
    states = integrated(velocity, np.concatenate([part.ravel() for part in parts]), times)
    P, W, T = matrices(states)
    return LinearTrajectory(time=times, encoder=W, predictor=P, target=T)


def _check_shapes(encoder: Any, predictor: Any, covariance: Any, augmentation: Any) -> None:
    shapes = [matrix.shape for matrix in (encoder, predictor, covariance, augmentation)]
    if encoder.ndim != 2 or 0 in encoder.shape:
        raise ValueError(f"shapes must begin with an encoder (k, d), got {shapes[0]}")
    k, d = encoder.shape
    if shapes[1:] != [(k, k), (d, d), (d, d)]:
        raise ValueError(
            f"shapes must fit an encoder (k, d) = {k, d}: predictor (k, k), covariances (d, d); "
            f"got {', '.join(map(str, shapes[1:]))}"
        )
    for name, matrix in (("covariance", covariance), ("augmentation_covariance", augmentation)):
        scale = np.abs(matrix).max()
        if not np.allclose(matrix, matrix.T, rtol=0, atol=1e-6 * scale):
            raise ValueError(f"{name} must be symmetric, got one that is not")
        smallest = np.linalg.eigvalsh(matrix)[0]
        # Rounding of a float32 covariance may leave a null direction slightly negative.
        if smallest < -1e-6 * scale:
            raise ValueError(f"{name} must have no negative variance, got {smallest:g}")
