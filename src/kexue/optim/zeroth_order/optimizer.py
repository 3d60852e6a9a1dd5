"""Stochastic gradient descent along seeded directions."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch import distributed as dist

from kexue.optim.zeroth_order.directions import hashed
from kexue.optim.zeroth_order.estimate import (
    check_baseline_has_others,
    check_choice,
    check_epsilon,
)
from kexue.optim.zeroth_order.trajectory import StepRecord, Walk, points

__all__ = ["ZerothOrderSGD"]

BASELINES = ("none", "current", "leave_one_out")
DISTRIBUTIONS = ("normal", "rademacher")
_SETTINGS = (
    "epsilon",
    "directions",
    "antithetic",
    "baseline",
    "distribution",
    "fitness_shaping",
    "exact_restore",
    "maximize",
)
_PROGRESS = ("seed", "step_count", "trajectory")


class ZerothOrderSGD(torch.optim.Optimizer):
    r"""Minimise what can only be evaluated, in the memory of evaluating it.

    .. math::
        c_j = \frac{1}{N} \cdot \frac{L(\theta + \varepsilon u_j) - L(\theta - \varepsilon u_j)}
        {2 \varepsilon}, \qquad
        \theta \leftarrow (1 - \eta \lambda)\, \theta - \eta \sum_{j=1}^{N} c_j u_j .

    No gradient is computed, none is read and none written. A direction is regenerated from its seed
    whenever it is needed, and parameters are changed in place, in chunks of 2^20 elements: that is
    all the memory it takes. The global random generators are not used. One seed means the same
    directions on every CPU, and others on a GPU.

    Parameters
    ----------
    params : iterable
        Parameters, or groups with an ``lr`` and a ``weight_decay`` of their own. Those with
        ``requires_grad=False`` are left alone.
    lr : float, optional
        Rate :math:`\eta`. The cost of dimension: it has to be about N/d times that of gradient
        descent for d parameters.
    epsilon : float, optional
        Size :math:`\varepsilon` of the perturbation of each parameter. For staircase objectives it
        is the width of the smoothing, and has to reach the steps.
    directions : int, optional
        Number N of directions a step.
    antithetic : bool, optional
        Evaluate both ends of each direction; otherwise one end and the baseline.
    baseline : {"current", "leave_one_out", "none"}, optional
        Without antithetic pairs, what is subtracted from L: its value in the middle, at the cost of
        one more evaluation a step; the mean of the other directions' values; nothing.
    distribution : {"normal", "rademacher"}, optional
        Of the directions. Random signs are ten times as fast to draw.
    weight_decay : float, optional
        :math:`\lambda`.
    fitness_shaping : {None, "centered_rank"}, optional
        Replace the N or 2N values of a step by their ranks, from -1/2 to 1/2; then no baseline is
        used, and no increasing transformation of L changes anything.
    exact_restore : bool, optional
        Keep a copy of the parameters during the step and restore from it, bit for bit. Faster, as a
        copy costs less than a draw. Otherwise a direction is added and subtracted, and rounding
        moves the parameters by some units in the last place a step.
    maximize : bool, optional
        Ascend.
    seed : int, optional
        All directions are made of it, of the step's number and of their own.
    process_group : ProcessGroup, optional
        Of torch.distributed; the default group where ``parallel`` is given.
    parallel : {None, "directions", "data"}, optional
        Share a step among the ranks of the group. With "directions" the j-th is evaluated by rank
        ``j % world``, all on the same data. With "data" every rank evaluates all of them on data of
        its own, and values are averaged. All that travels is a table of at most
        ``16 * directions + 8`` bytes; the ranks stay identical, bit for bit, if they start from the
        same parameters. Under ``TORCH_DISTRIBUTED_DEBUG=INFO`` or ``DETAIL`` the first step checks
        that they do.

    Attributes
    ----------
    trajectory : list of StepRecord
        The run so far, for :func:`replay`; part of ``state_dict()``.
    step_count : int
        Number of completed steps.

    Raises
    ------
    ValueError
        For an epsilon that is not positive and finite, less than one direction, a negative rate or
        weight decay, another baseline, distribution, fitness_shaping or parallel, or a baseline or
        ranks of other values where there is one value only.
    TypeError
        For parameters that are no real floating-point numbers.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = ZerothOrderSGD([weight], lr=0.1, directions=4)
    >>> losses = [optimizer.step(lambda: weight.square().sum()) for _ in range(50)]
    >>> losses[-1] < 0.01 * losses[0]
    True
    >>> len(optimizer.trajectory), weight.grad
    (50, None)
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        epsilon: float = 1e-3,
        directions: int = 1,
        antithetic: bool = True,
        baseline: Literal["none", "current", "leave_one_out"] = "current",
        distribution: Literal["normal", "rademacher"] = "normal",
        weight_decay: float = 0.0,
        fitness_shaping: Literal[None, "centered_rank"] = None,
        exact_restore: bool = False,
        maximize: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        parallel: Literal[None, "directions", "data"] = None,
    ) -> None:
        check_epsilon(epsilon)
        if directions < 1:
            raise ValueError(
                f"directions, the samples of a step, must be at least 1, got {directions}"
            )
        check_choice("baseline", baseline, BASELINES)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_choice("fitness_shaping", fitness_shaping, (None, "centered_rank"))
        check_choice("parallel", parallel, (None, "directions", "data"))
        if fitness_shaping is None and not antithetic:
            check_baseline_has_others(baseline, directions, "samples (directions)")
        if fitness_shaping is not None and not antithetic and directions < 2:
            raise ValueError(
                "fitness_shaping ranks the values of a step: without antithetic pairs it needs at "
                f"least two samples (directions), got {directions}"
            )
        self.epsilon = epsilon
        self.directions = directions
        self.antithetic = antithetic
        self.baseline = baseline
        self.distribution = distribution
        self.fitness_shaping = fitness_shaping
        self.exact_restore = exact_restore
        self.maximize = maximize
        self.seed = seed
        self.process_group = process_group
        self.parallel = parallel
        self.trajectory: list[StepRecord] = []
        self.step_count = 0
        self._inspected = False
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with a rate and a weight decay of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {group[name]}")
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                raise TypeError(
                    f"params must be real floating-point tensors, got one of {parameter.dtype}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None) -> float:  # type: ignore[override]
        """Evaluate the loss around the parameters, and move them.

        Parameters
        ----------
        closure : callable
            Returns the loss at the parameters as they are, a number or a tensor of one element; it
            is called without gradients. Its randomness (a batch, dropout) should be the same for
            all evaluations of one step.

        Returns
        -------
        float
            Mean of the step's evaluations around the parameters: an unbiased estimate of the
            smoothed loss.

        Raises
        ------
        ValueError
            Without a closure, or for a loss that is not one finite number. Parameters are restored
            then, as they are where the closure itself raises.
        """
        if closure is None:
            raise ValueError(
                "step needs a closure that returns the loss: step(lambda: loss(model)); it "
                "evaluates the loss itself, there is nothing to call backward on"
            )
        rank, world = self._place()
        parameters = [p for group in self.param_groups for p in group["params"]]
        if not self._inspected:
            self._inspect(parameters)
        plan = self._plan()
        walk = Walk(parameters, plan)

        # A failed evaluation must not keep this rank from the walk and the exchange that the others
        # go through: it is remembered, and raised afterwards.
        failure: BaseException | None = None
        losses: dict[int, float | Tensor] = {}

        def evaluate(place: int) -> None:
            nonlocal failure
            if failure is None:
                try:
                    losses[place] = _number(closure())
                except BaseException as error:
                    failure = error

        def mine(j: int) -> bool:
            return self.parallel != "directions" or j % world == rank

        n = self.directions
        if self._takes_current() and mine(n):
            evaluate(n)
        for j, end in points(walk, plan, mine):
            evaluate(j + end * n)
        table = self._exchange(losses, failed=failure is not None, world=world)

        if failure is not None or not np.isfinite(table).all():
            self._give_up(walk, plan)
            raise failure or ValueError(
                "closure must return a finite loss on every rank, got a non-finite one; the "
                "parameters are restored"
            )
        ends = table[: 2 * n if self.antithetic else n]
        coefficients = self._coefficients(ends, table[-1])
        record = plan._replace(coefficients=tuple(coefficients.tolist()))
        walk.update_(record)
        self.trajectory.append(record)
        self.step_count += 1
        return float(ends.mean())

    def _plan(self) -> StepRecord:
        """The step's record, as far as it is known before anything is evaluated."""
        groups = [(group, p) for group in self.param_groups for p in group["params"]]
        rates = tuple(float(group["lr"]) if p.requires_grad else None for group, p in groups)
        decays = tuple(float(group["weight_decay"]) for group, _ in groups)
        if self.trajectory:
            # Equal settings are kept once for all steps, in memory and in a pickled checkpoint.
            last = self.trajectory[-1]
            rates = last.learning_rates if last.learning_rates == rates else rates
            decays = last.weight_decays if last.weight_decays == decays else decays
        return StepRecord(
            seeds=tuple(hashed(self.seed, self.step_count, j) for j in range(self.directions)),
            coefficients=(0.0,) * self.directions,
            learning_rates=rates,
            weight_decays=decays,
            epsilon=self.epsilon,
            antithetic=self.antithetic,
            exact_restore=self.exact_restore,
            distribution=self.distribution,
        )

    def _takes_current(self) -> bool:
        return not self.antithetic and self.baseline == "current" and self.fitness_shaping is None

    def _coefficients(self, ends: np.ndarray, current: float) -> np.ndarray:
        """What each direction is multiplied with, from the values at its ends."""
        n = self.directions
        if self.fitness_shaping == "centered_rank":
            ends = (rankdata(ends) - 1) / (len(ends) - 1) - 0.5
        if self.antithetic:
            quotients = (ends[:n] - ends[n:]) / (2 * self.epsilon)
        else:
            quotients = self._above_baseline(ends, current) / self.epsilon
        return quotients / (-n if self.maximize else n)

    def _above_baseline(self, ends: np.ndarray, current: float) -> np.ndarray:
        if self._takes_current():
            return ends - current
        if self.baseline == "leave_one_out" and self.fitness_shaping is None:
            # The mean without oneself: the mean of all would shrink the gradient by 1 - 1/n.
            return (ends - ends.mean()) * (len(ends) / (len(ends) - 1))
        return ends

    def _give_up(self, walk: Walk, plan: StepRecord) -> None:
        """Restore; without a copy, record what rounding did, so that a replay does the same."""
        nothing = plan._replace(weight_decays=(0.0,) * len(plan.weight_decays))
        walk.update_(nothing)
        if not self.exact_restore:
            self.trajectory.append(nothing)

    def _place(self) -> tuple[int, int]:
        if self.parallel is None:
            return 0, 1
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"parallel={self.parallel!r} needs torch.distributed.init_process_group first, or "
                "parallel=None for one process"
            )
        return dist.get_rank(self.process_group), dist.get_world_size(self.process_group)

    def _exchange(
        self, losses: dict[int, float | Tensor], *, failed: bool, world: int
    ) -> np.ndarray:
        """All values of the step, those of other ranks included, in float64."""
        n = self.directions
        table = np.zeros(n * (1 + self.antithetic) + self._takes_current())
        if failed:
            table[:] = np.nan
        else:
            table[list(losses)] = _read(list(losses.values()))
        if self.parallel is None:
            return table
        shared = torch.from_numpy(table).to(self._exchange_device())
        dist.all_reduce(shared, group=self.process_group)
        if self.parallel == "data":
            shared /= world
        return shared.cpu().numpy()

    def _exchange_device(self) -> torch.device:
        if "nccl" in dist.get_backend(self.process_group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _inspect(self, parameters: list[Tensor]) -> None:
        """Look once, at the first step, for what would make the run useless in silence."""
        self._inspected = True
        for parameter in parameters:
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                spacing = _spacing(parameter)
                if self.epsilon < 2 * spacing:
                    warnings.warn(
                        f"epsilon = {self.epsilon:g} is below twice the spacing of "
                        f"{parameter.dtype} at a parameter's root mean square ({spacing:.2g}): "
                        "most of the perturbation is rounded away; use a larger epsilon or float32",
                        stacklevel=4,
                    )
                    break
        if self.parallel is not None and dist.get_debug_level() != dist.DebugLevel.OFF:
            low = torch.tensor(_digest(parameters), device=self._exchange_device())
            high = low.clone()
            dist.all_reduce(low, dist.ReduceOp.MIN, group=self.process_group)
            dist.all_reduce(high, dist.ReduceOp.MAX, group=self.process_group)
            if not torch.equal(low, high):
                raise ValueError(
                    "all ranks must start from equal parameters, got different ones: broadcast "
                    "those of rank 0, or build the model from one seed"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return groups, settings, seed, number of steps and trajectory: lists and numbers only."""
        state = super().state_dict()
        state["settings"] = {name: getattr(self, name) for name in _SETTINGS}
        state["seed"], state["step_count"] = self.seed, self.step_count
        state["trajectory"] = [tuple(record) for record in self.trajectory]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a run: with the parameters of that moment it goes on bit for bit.

        Parameters
        ----------
        state_dict : dict
            What :meth:`state_dict` returned. Process group and ``parallel`` stay as they are.
        """
        super().load_state_dict(state_dict)
        for name in _SETTINGS:
            setattr(self, name, state_dict["settings"][name])
        self.seed, self.step_count = state_dict["seed"], state_dict["step_count"]
        self.trajectory = [StepRecord(*fields) for fields in state_dict["trajectory"]]

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: all but the process group, which belongs to a process."""
        own = {name: getattr(self, name) for name in (*_SETTINGS, *_PROGRESS, "parallel")}
        return {
            **super().__getstate__(), **own, "process_group": None, "_inspected": self._inspected,
        }  # fmt: skip


def _number(loss: float | Tensor) -> float | Tensor:
    """A loss as float; on an accelerator it stays there, so that nobody waits for it yet."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"closure must return a number or one element, got shape {tuple(loss.shape)}"
            )
        if loss.device.type != "cpu":
            return loss.detach().reshape(()).to(torch.float64, copy=True)
        return float(loss.detach())
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise TypeError(f"closure must return a number, got {type(loss).__name__}") from None


def _read(losses: list[float | Tensor]) -> list[float]:
    """All losses as floats, those on an accelerator in one synchronisation."""
    waiting = [loss for loss in losses if isinstance(loss, Tensor)]
    read = iter(torch.stack(waiting).tolist() if waiting else ())
    return [next(read) if isinstance(loss, Tensor) else loss for loss in losses]


def _spacing(parameter: Tensor) -> float:
    """Distance of neighbouring numbers at the root mean square."""
    rms = float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
    if not 0 < rms < math.inf:
        return 0.0
    return torch.finfo(parameter.dtype).eps * 2.0 ** math.floor(math.log2(rms))


def _digest(parameters: list[Tensor]) -> int:
    digest = hashlib.sha256()
    for parameter in parameters:
        octets = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(octets.numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
