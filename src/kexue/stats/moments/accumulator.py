"""Moments of data that arrive in pieces, in any order, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor

from kexue.stats.moments.estimators import _deviation_of
from kexue.stats.moments.samples import (
    _FLOATS,
    CORRECTIONS,
    Array,
    Numbers,
    _as_tensor,
    _check_count,
    _check_divisor,
    _choice,
    _correction,
    _float_like,
    _is_torch,
    _order,
)
from kexue.stats.moments.sums import (
    _central_sums,
    _comoments,
    _cumulant_of,
    _moment_of,
    _reference,
    _Sums,
)

__all__ = ["MomentAccumulator"]

_MAX_DIMENSIONS = 16
_STATE = ("count", "max_order", "covariance")


class MomentAccumulator:
    r"""Mean, central sums to a given order and covariance of a stream, mergeable and exact.

    What is kept, in double precision whatever the data: the count, the mean, and
    :math:`M_p = \sum_i (x_i - \bar x)^p`. Chunks, single samples, accumulators merged in any order
    and processes give the moments of the whole up to rounding. The mean counts from the first
    sample seen, so that an offset of the data takes no digits. Not differentiable.

    Results are arrays of the kind and precision of the data (float64 for integers), on its device.

    Parameters
    ----------
    max_order : int
        Highest moment that is kept, 2 to 6.
    covariance : bool
        Whether to keep the covariance of the last axis too; samples then have the shape (..., d).

    Raises
    ------
    ValueError
        Where ``max_order`` is out of range; where data are of another shape than those before, or
        not finite; where accumulators of different kinds are merged; where samples are too few for
        what is asked.
    TypeError
        Where data are complex or no numbers, or numpy and torch are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([2.0, 3, 5, 7, 11, 13, 17, 19])
    >>> one, two = MomentAccumulator(max_order=4), MomentAccumulator(max_order=4)
    >>> total = one.update(x[:3]).merge(two.update(x[3:]))
    >>> total.count, total.variance().round(12), total.cumulant(4).round(10)
    (8, np.float64(40.839285714286), np.float64(-2471.3607142857))
    """

    def __init__(self, *, max_order: int = 2, covariance: bool = False) -> None:
        self.max_order = _order(max_order, least=2, name="max_order")
        self._keeps_covariance = bool(covariance)
        self.reset()

    def __repr__(self) -> str:
        return (
            f"MomentAccumulator(max_order={self.max_order}, covariance={self._keeps_covariance}, "
            f"count={self._count})"
        )

    def reset(self) -> MomentAccumulator:
        """Forget all data, their shape and their kind; return self."""
        self._count = 0
        self._is_torch: bool | None = None
        self._dtype: torch.dtype | None = None
        self._reference: Tensor | None = None
        self._mean: Tensor | None = None
        self._powers: tuple[Tensor, ...] = ()
        self._comoment: Tensor | None = None
        return self

    @torch.no_grad()
    def update(self, x: Real[Array, "..."] | Numbers) -> MomentAccumulator:
        """Take in samples x (n, \\*shape), n = 0 included; return self."""
        values = _as_tensor(x)
        if values.ndim < 1 + self._keeps_covariance:
            needed = "(n, ..., d)" if self._keeps_covariance else "(n, ...)"
            raise ValueError(f"x must have the shape {needed}, got {tuple(values.shape)}")
        chunk = MomentAccumulator(max_order=self.max_order, covariance=self._keeps_covariance)
        chunk._is_torch, chunk._dtype = _is_torch(x), _float_like(values.dtype)
        self._check_alike(chunk, tuple(values.shape[1:]))
        if len(values) == 0:
            chunk._set_empty(values.shape[1:], values.device)
        else:
            chunk._measure(values)
        return self._absorb(chunk)

    @torch.no_grad()
    def merge(self, other: MomentAccumulator) -> MomentAccumulator:
        """Take in what another accumulator has seen, which stays as it is; return self."""
        if not isinstance(other, MomentAccumulator):
            raise TypeError(f"other must be a MomentAccumulator, got {type(other).__name__}")
        if (other.max_order, other._keeps_covariance) != (self.max_order, self._keeps_covariance):
            raise ValueError(
                f"accumulators must be of one kind, got max_order={self.max_order}, "
                f"covariance={self._keeps_covariance} and max_order={other.max_order}, "
                f"covariance={other._keeps_covariance}"
            )
        self._check_alike(other, other._shape)
        return self._absorb(other)

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> MomentAccumulator:
        """Merge the accumulators of all processes, in the order of their ranks; return self.

        Every rank ends with the total, in the same bits; ranks may be empty. Called twice, it
        counts everything as often as there are processes: the second time all hold the total.
        Works with gloo, and with nccl where the data are on the GPU. ``group`` is a process group
        of torch.distributed, by default that of all processes. RuntimeError where
        torch.distributed is not initialised.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "all_reduce needs an initialised torch.distributed: call init_process_group first"
            )
        on_gpu = "nccl" in str(dist.get_backend(group))
        wire = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

        def gather(mine: Tensor) -> list[Tensor]:
            mine = mine.to(wire)
            everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            dist.all_gather(everyone, mine, group=group)
            return everyone

        headers = [_Header(*header.tolist()) for header in gather(torch.tensor(self._header()))]
        told = _agreed(headers)
        if told is None:
            return self
        home = wire if self._reference is None else self._reference.device
        if self._reference is None:
            self._is_torch, self._dtype = bool(told.is_torch), _FLOATS[told.dtype]
            self._set_empty(told.shape, home)
        payloads = gather(self._packed())
        total = MomentAccumulator(max_order=self.max_order, covariance=self._keeps_covariance)
        for header, payload in zip(headers, payloads, strict=True):
            if header.ndim < 0:
                continue
            part = MomentAccumulator(max_order=self.max_order, covariance=self._keeps_covariance)
            part._is_torch, part._dtype = self._is_torch, _FLOATS[header.dtype]
            part._set_empty(told.shape, home)
            part._count = header.count
            part._unpack(payload.to(home))
            total._absorb(part)
        self.__dict__.update(total.__dict__)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain numbers.

        The mean counts from ``"reference"``, and ``"like"`` is an empty tensor of the results'
        precision.
        """
        state: dict[str, Any] = {
            "count": self._count,
            "max_order": self.max_order,
            "covariance": int(self._keeps_covariance),
        }
        if self._reference is not None:
            state |= {
                "is_torch": int(bool(self._is_torch)),
                "like": torch.empty(0, dtype=self._dtype),
                "reference": self._reference.clone(),
                "mean": self._known(self._mean).clone(),
                "powers": torch.stack(self._powers),
            }
            if self._comoment is not None:
                state["comoment"] = self._comoment.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> MomentAccumulator:
        """Take over a state from :meth:`state_dict` of an accumulator of the same kind."""
        needed = list(_STATE)
        if "reference" in state:
            needed += ["is_torch", "like", "mean", "powers"]
            needed += ["comoment"] * self._keeps_covariance
        missing = [name for name in needed if name not in state]
        if missing:
            raise ValueError(f"the state must hold {', '.join(needed)}, got none for {missing}")
        kind = int(state["max_order"]), bool(state["covariance"])
        if kind != (self.max_order, self._keeps_covariance):
            raise ValueError(
                f"the state must have max_order {self.max_order} and covariance "
                f"{self._keeps_covariance}, got {kind[0]} and {kind[1]}"
            )
        self.reset()
        self._count = int(state["count"])
        if "reference" in state:
            self._is_torch, self._dtype = bool(state["is_torch"]), state["like"].dtype
            self._reference = state["reference"].clone()
            self._mean = state["mean"].clone()
            self._powers = tuple(state["powers"].clone().unbind(0))
            if self._keeps_covariance:
                self._comoment = state["comoment"].clone()
        return self

    @property
    def count(self) -> int:
        """Number of samples, exact up to 2^53."""
        return self._count

    @property
    def mean(self) -> Float[Array, "*shape"]:
        """Mean of all samples."""
        self._check("the mean", 1)
        return self._given(self._known(self._reference) + self._known(self._mean))

    def variance(self, *, correction: float = 1) -> Float[Array, "*shape"]:
        """Return the variance, see :func:`kexue.stats.moments.variance`."""
        correction = _correction(correction)
        self._check("a variance", 1)
        _check_divisor(self._count, correction)
        return self._given(self._powers[0] / (self._count - correction))

    def standard_deviation(self, *, correction: str = "c4") -> Float[Array, "*shape"]:
        """Return the deviation, see :func:`kexue.stats.moments.standard_deviation`."""
        correction = _choice(correction, CORRECTIONS, "correction")
        self._check(f"correction {correction!r}", 1 if correction == "none" else 2)
        return self._given(_deviation_of(self._sums(), self._count, correction))

    def covariance(self, *, correction: float = 1) -> Float[Array, "*batch d d"]:
        """Return the covariance, see :func:`kexue.stats.moments.covariance`."""
        correction = _correction(correction)
        if not self._keeps_covariance:
            raise ValueError("covariance needs MomentAccumulator(covariance=True), got False")
        self._check("a covariance", 1)
        _check_divisor(self._count, correction)
        return self._given(self._known(self._comoment) / (self._count - correction))

    def central_moment(self, order: int, *, unbiased: bool = True) -> Float[Array, "*shape"]:
        """Return a central moment, see :func:`kexue.stats.moments.central_moment`."""
        order = _order(order, self.max_order)
        self._check(f"a moment of order {order}", order if unbiased else 1)
        if order == 1:
            return self._given(torch.zeros_like(self._known(self._mean)))
        return self._given(_moment_of(self._sums(), self._count, order, unbiased))

    def cumulant(self, order: int, *, unbiased: bool = True) -> Float[Array, "*shape"]:
        """Return a cumulant, see :func:`kexue.stats.moments.cumulant`."""
        order = _order(order, self.max_order)
        self._check(f"a cumulant of order {order}", order if unbiased else 1)
        if order == 1:
            return self.mean
        return self._given(_cumulant_of(self._sums(), self._count, order, unbiased))

    @property
    def _shape(self) -> tuple[int, ...] | None:
        return None if self._reference is None else tuple(self._reference.shape)

    def _known(self, part: Tensor | None) -> Tensor:
        if part is None:
            raise RuntimeError("an accumulator without data has no moments")
        return part

    def _check(self, what: str, least: int) -> None:
        _check_count(self._count, least, what)

    def _check_alike(self, other: MomentAccumulator, shape: tuple[int, ...] | None) -> None:
        """Refuse data of another kind or shape than those before."""
        if None not in (self._is_torch, other._is_torch) and self._is_torch != other._is_torch:
            names = {True: "torch tensors", False: "numpy arrays"}
            raise TypeError(
                f"data must be of one library, got {names[bool(other._is_torch)]} after "
                f"{names[bool(self._is_torch)]}"
            )
        if None not in (self._shape, shape) and self._shape != shape:
            raise ValueError(
                f"samples must have the shape {self._shape} of those before, got {shape}"
            )

    def _given(self, value: Tensor) -> Any:
        value = value.to(self._dtype)
        return value.clone() if self._is_torch else value.numpy(force=True).copy()[()]

    def _sums(self) -> _Sums:
        mean = self._known(self._mean)
        count = mean.new_full((1,) * mean.ndim, float(self._count))
        return _Sums(count, mean, self._powers)

    def _measure(self, x: Tensor) -> None:
        """Set the state to that of the samples x."""
        reference = _reference(x, (0,))
        sums = _central_sums(x, (0,), self.max_order, reference=reference)
        finite = torch.isfinite(sums.mean).all() & torch.isfinite(sums.powers[-1]).all()
        if not bool(finite) and not bool(torch.isfinite(x).all()):
            broken = int((~torch.isfinite(x)).sum())
            raise ValueError(f"x must be finite, got NaN or infinity in {broken} of {x.numel()}")
        self._count = len(x)
        self._reference, self._mean = reference[0].clone(), sums.mean[0]
        self._powers = tuple(power[0] for power in sums.powers)
        if self._keeps_covariance:
            rows = x.movedim(0, -2)
            self._comoment = _comoments(
                rows, self._mean[..., None, :], self._reference[..., None, :]
            )

    def _set_empty(self, shape: Any, device: torch.device) -> None:
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device=device)

        self._reference, self._mean = zeros(*shape), zeros(*shape)
        self._powers = tuple(zeros(*shape) for _ in range(2, self.max_order + 1))
        self._comoment = zeros(*shape, shape[-1]) if self._keeps_covariance else None

    def _absorb(self, other: MomentAccumulator) -> MomentAccumulator:
        """Merge what was found to be alike."""
        if other._reference is None:
            return self
        dtypes = [dtype for dtype in (self._dtype, other._dtype) if dtype is not None]
        dtype = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)
        if self._count == 0:
            # No tensor is ever written into, so that two accumulators may share it.
            self.__dict__.update(other.__dict__)
        elif other._count:
            self._pool_with(other)
        self._dtype = dtype
        return self

    def _pool_with(self, other: MomentAccumulator) -> None:
        # Pébay's formula for two; counts are numbers here, which makes it cheap.
        mean, reference = self._known(self._mean), self._known(self._reference)
        n = self._count + other._count
        here, there = self._count / n, other._count / n
        away = self._known(other._reference).to(reference.device) - reference
        delta = away + self._known(other._mean).to(reference.device) - mean
        theirs = [power.to(reference.device) for power in other._powers]
        delta_to = [torch.ones_like(delta), delta]
        pooled = []
        for p in range(2, self.max_order + 1):
            delta_to.append(delta_to[-1] * delta)
            of_means = self._count * (-there) ** p + other._count * here**p
            total = torch.add(self._powers[p - 2] + theirs[p - 2], delta_to[p], alpha=of_means)
            for k in range(1, p - 1):
                mixed = (-there) ** k * self._powers[p - k - 2] + here**k * theirs[p - k - 2]
                total = total + math.comb(p, k) * delta_to[k] * mixed
            pooled.append(total)
        if self._comoment is not None:
            product = delta[..., :, None] * delta[..., None, :]
            comoment = self._comoment + self._known(other._comoment).to(reference.device)
            self._comoment = comoment + (self._count * there) * product
        self._mean, self._powers, self._count = mean + there * delta, tuple(pooled), n

    def _header(self) -> list[int]:
        shape = self._shape
        if shape is not None and len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"all_reduce takes at most {_MAX_DIMENSIONS} axes, got {len(shape)}")
        dims = list(shape or ())
        return [
            self._count,
            self.max_order,
            int(self._keeps_covariance),
            -1 if shape is None else len(dims),
            int(bool(self._is_torch)),
            0 if self._dtype is None else _FLOATS.index(self._dtype),
            *dims,
            *[0] * (_MAX_DIMENSIONS - len(dims)),
        ]

    def _packed(self) -> Tensor:
        """All sums in one vector."""
        parts = [self._known(self._reference), self._known(self._mean), *self._powers]
        if self._comoment is not None:
            parts.append(self._comoment)
        return torch.cat([part.reshape(-1) for part in parts])

    def _unpack(self, vector: Tensor) -> None:
        """Set the sums, whose shapes are known, from :meth:`_packed`."""
        reference = self._known(self._reference)
        size, n_parts = reference.numel(), 1 + self.max_order
        parts = vector[: n_parts * size].reshape(n_parts, *reference.shape).unbind(0)
        self._reference, self._mean, self._powers = parts[0], parts[1], tuple(parts[2:])
        if self._comoment is not None:
            self._comoment = vector[n_parts * size :].reshape(self._comoment.shape)


class _Header:
    """What one rank holds, as every rank hears it."""

    def __init__(
        self,
        count: int,
        max_order: int,
        covariance: int,
        ndim: int,
        is_torch: int,
        dtype: int,
        *dims: int,
    ) -> None:
        self.count = count
        self.kind = (max_order, bool(covariance))
        self.ndim = ndim
        """-1 where the rank has seen no data, and so knows no shape."""
        self.is_torch = is_torch
        self.dtype = dtype
        self.shape = tuple(dims[: max(ndim, 0)])


def _agreed(headers: list[_Header]) -> _Header | None:
    """What all ranks with data agree on; None where none has any."""
    kinds = sorted({header.kind for header in headers})
    if len(kinds) > 1:
        raise ValueError(f"all ranks must have one (max_order, covariance), got {kinds}")
    told = [header for header in headers if header.ndim >= 0]
    shapes = sorted({header.shape for header in told}, key=str)
    if len(shapes) > 1:
        raise ValueError(f"samples of all ranks must have one shape, got {shapes}")
    if len({header.is_torch for header in told}) > 1:
        raise TypeError("data of all ranks must be of one library, got numpy and torch")
    return told[0] if told else None
