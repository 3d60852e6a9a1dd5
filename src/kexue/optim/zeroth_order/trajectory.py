"""What a step was, as a few numbers, and the walk through the parameters that it stands for.

Floating-point additions do not cancel: x + e - 2e + e is not always x. So that a replay, and a rank
that leaves an evaluation to others, end at the same bits, they go through the same additions in the
same order: there is one walk, :func:`points`, for everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kexue.optim.zeroth_order.directions import Directions

__all__ = ["StepRecord", "replay"]


class StepRecord(NamedTuple):
    """One step of :class:`ZerothOrderSGD`: all that is needed to repeat it.

    Parameters
    ----------
    seeds : tuple of int
        One for each direction.
    coefficients : tuple of float
        What each direction is multiplied with, the step's sign and the division by the number of
        directions included.
    learning_rates : tuple of float or None
        One for each parameter; None where it was frozen.
    weight_decays : tuple of float
        One for each parameter.
    epsilon : float
        Size of the perturbation.
    antithetic, exact_restore : bool
        Which additions the evaluations went through.
    distribution : str
        Of the directions.

    Examples
    --------
    >>> record = StepRecord((7,), (0.5,), (0.1,), (0.0,), 1e-3, True, False, "normal")
    >>> weight = torch.zeros(2)
    >>> replay([weight], [record])
    >>> bool((weight != 0).all())
    True
    """

    seeds: tuple[int, ...]
    coefficients: tuple[float, ...]
    learning_rates: tuple[float | None, ...]
    weight_decays: tuple[float, ...]
    epsilon: float
    antithetic: bool
    exact_restore: bool
    distribution: str


@torch.no_grad()
def replay(params: Iterable[Tensor], trajectory: Iterable[Sequence[Any]]) -> None:
    """Repeat a run on freshly initialised parameters, bit for bit and without evaluating anything.

    Parameters
    ----------
    params : iterable of Tensor
        Changed in place; in the order in which the optimizer had them, with the values from which
        it started, on the same kind of device: a seed means other numbers on another one.
    trajectory : iterable of StepRecord
        :attr:`ZerothOrderSGD.trajectory`; plain tuples or lists of its fields, as read from JSON,
        will do.

    Raises
    ------
    ValueError
        Where a record is about another number of parameters.

    Examples
    --------
    >>> from kexue.optim import ZerothOrderSGD
    >>> weight = torch.nn.Parameter(torch.ones(5))
    >>> optimizer = ZerothOrderSGD([weight], lr=0.05)
    >>> for _ in range(3):
    ...     loss = optimizer.step(lambda: weight.square().sum())
    >>> again = torch.ones(5)
    >>> replay([again], optimizer.trajectory)
    >>> torch.equal(again, weight)
    True
    """
    parameters = list(params)
    for fields in trajectory:
        record = StepRecord(*fields)
        if len(record.learning_rates) != len(parameters):
            raise ValueError(
                f"params must be the {len(record.learning_rates)} tensors of the recorded run, got "
                f"{len(parameters)}"
            )
        walk = Walk(parameters, record)
        for _ in points(walk, record, mine=lambda j: False):
            pass
        walk.update_(record)


class Walk:
    """Moves parameters between where they are and the points at which a step evaluates."""

    def __init__(self, parameters: Sequence[Tensor], record: StepRecord) -> None:
        self._all: list[Tensor | None] = [
            None if rate is None else parameter.detach()
            for parameter, rate in zip(parameters, record.learning_rates, strict=True)
        ]
        self._directions = Directions(self._all, record.distribution)
        self._trained = [parameter for parameter in self._all if parameter is not None]
        self._exact = record.exact_restore
        self._origin: list[Tensor] = []
        self._seed = 0
        self._offset = 0.0

    def go(self, seed: int, offset: float) -> None:
        """Go to ``offset`` times the seed's direction, from its other end or from the origin."""
        if self._exact and self._offset:
            # The other end is a reflection, 2 origin - x: it costs no draw, and is exact in x.
            for parameter, origin in zip(self._trained, self._origin, strict=True):
                parameter.lerp_(origin, 2.0)
        else:
            if self._exact and not self._origin:
                self._origin = [parameter.clone() for parameter in self._trained]
            self._directions.add_(seed, [offset - self._offset] * len(self._all))
        self._seed, self._offset = seed, offset

    def home(self) -> None:
        """Go back to the origin: bit for bit with a copy of it, otherwise up to rounding."""
        if self._exact and self._offset:
            for parameter, origin in zip(self._trained, self._origin, strict=True):
                parameter.copy_(origin)
        elif self._offset:
            self._directions.add_(self._seed, [-self._offset] * len(self._all))
        self._offset = 0.0

    def update_(self, record: StepRecord) -> None:
        r"""Do :math:`p \leftarrow p (1 - \eta \lambda) - \eta \sum_j c_j u_j`.

        The walk ends at the last direction, whose way back is part of its update: one draw less.
        """
        if self._exact:
            self.home()
        rates = [rate or 0.0 for rate in record.learning_rates]
        kept = [1 - rate * decay for rate, decay in zip(rates, record.weight_decays, strict=True)]
        for parameter, share in zip(self._all, kept, strict=True):
            if parameter is not None and share != 1:
                parameter.mul_(share)
        # From the last direction to the first.
        for seed, coefficient in zip(record.seeds[::-1], record.coefficients[::-1], strict=True):
            scales = [
                -rate * coefficient - share * self._offset
                for rate, share in zip(rates, kept, strict=True)
            ]
            self._directions.add_(seed, scales)
            self._offset = 0.0


def points(
    walk: Walk, record: StepRecord, mine: Callable[[int], bool]
) -> Iterator[tuple[int, int]]:
    """Go to the points of a step; yield direction and end (0 ahead, 1 behind) where it is mine.

    The walk stays at its last point. Where an exact copy brings it back, the points of others may
    be left out; otherwise everyone has to take the whole way, because it is where rounding happens.
    """
    for j, seed in enumerate(record.seeds):
        evaluated = mine(j)
        if record.exact_restore and not evaluated:
            continue
        walk.home()
        walk.go(seed, record.epsilon)
        if evaluated:
            yield j, 0
        if record.antithetic:
            walk.go(seed, -record.epsilon)
            if evaluated:
                yield j, 1
