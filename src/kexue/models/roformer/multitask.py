r"""Training on several tasks at once, with gradients of equal length.

Each of k micro-steps draws a task with probability proportional to its weight, and the update is

.. math::
    u = \frac1k \sum_{i=1}^k \frac{g_i}{\|g_i\|},

the norm being that of the gradient of what the tasks share, the encoder. No task dominates by the
scale of its loss; and for two tasks u never points against either.

Source: RoFormerV2 (ZhuiyiAI, 2022); https://arxiv.org/abs/1901.11504 (MT-DNN).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kexue.models.roformer.schedules import ResidualWarmup

__all__ = ["MultiTaskTrainer", "Task", "TrainingHistory"]


@dataclass(frozen=True)
class Task:
    """Data and a loss under a name.

    Parameters
    ----------
    name : str
        Unique among the tasks.
    batches : iterable
        Batches of any kind; begun again when it is exhausted.
    loss : callable
        Batch -> scalar loss.
    weight : float
        How often it is drawn, relative to the others.

    Raises
    ------
    ValueError
        For a weight that is not positive and finite.

    Examples
    --------
    >>> Task("masked words", [torch.zeros(2)], lambda batch: batch.sum(), weight=60.0).name
    'masked words'
    """

    name: str
    batches: Iterable[Any]
    loss: Callable[[Any], Tensor]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(
                f"the weight of task {self.name!r} must be positive and finite, got {self.weight}"
            )


@dataclass(frozen=True)
class TrainingHistory:
    """What happened in each micro-step.

    Attributes
    ----------
    task : tuple of str
        Name of the task that was drawn.
    loss : tuple of float
        Its loss.
    gradient_norm : tuple of float
        Norm of its gradient over the encoder, before it was normalised.

    Examples
    --------
    >>> TrainingHistory(("masked words",), (5.2,), (0.7,)).loss
    (5.2,)
    """

    task: tuple[str, ...]
    loss: tuple[float, ...]
    gradient_norm: tuple[float, ...]


class MultiTaskTrainer:
    """Trains an encoder, and the heads of its tasks, on tasks drawn at random.

    The modules stay in the mode in which they are: call ``train()`` for dropout.

    Parameters
    ----------
    encoder : nn.Module
        What all tasks share; gradients are measured on its parameters.
    tasks : sequence of Task
        At least one.
    optimizer : Optimizer
        Holds the parameters of the encoder and of the heads.
    gradient_accumulation_steps : int
        Micro-steps k of an update.
    normalize_gradients : bool
        Whether each gradient is divided by its norm over the encoder; otherwise by k only. So is
        one that leaves the encoder alone, as that of a head of zeros does.
    scheduler : LRScheduler, optional
        Steps once after each update.
    residual_warmup : ResidualWarmup, optional
        Steps once after each update.
    generator : torch.Generator, optional
        Draws the tasks on the CPU; torch's own by default.

    Raises
    ------
    ValueError
        For no tasks, a name twice, less than one micro-step or step, a loss that is no scalar, a
        task without batches.
    FloatingPointError
        For a loss or a gradient that is not finite.

    Examples
    --------
    >>> encoder = nn.Linear(3, 1)
    >>> data = [torch.eye(3)]
    >>> tasks = [Task("small", data, lambda x: encoder(x).square().mean()),
    ...          Task("large", data, lambda x: 1000 * (encoder(x) - 1).square().mean())]
    >>> optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01)
    >>> history = MultiTaskTrainer(encoder, tasks, optimizer).train(5)
    >>> len(history.loss)
    5
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: Sequence[Task],
        optimizer: Optimizer,
        *,
        gradient_accumulation_steps: int = 1,
        normalize_gradients: bool = True,
        scheduler: LRScheduler | None = None,
        residual_warmup: ResidualWarmup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("tasks must hold at least one task, got none")
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the names of tasks must differ, got {twice!r} twice")
        if gradient_accumulation_steps < 1:
            raise ValueError(
                f"gradient_accumulation_steps must be at least 1, got {gradient_accumulation_steps}"
            )
        self.tasks = tuple(tasks)
        self.optimizer = optimizer
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.normalize_gradients = normalize_gradients
        self.scheduler = scheduler
        self.residual_warmup = residual_warmup
        self.generator = generator
        self._encoder = encoder
        self._weights = torch.tensor([task.weight for task in tasks], dtype=torch.float64)
        self._batches: dict[str, Iterator[Any]] = {}

    def train(self, steps: int) -> TrainingHistory:
        """Make ``steps`` updates; a further call goes on where the data stood."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        records = []
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            records += [self._add_gradient() for _ in range(self.gradient_accumulation_steps)]
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            if self.residual_warmup is not None:
                self.residual_warmup.step()
        self.optimizer.zero_grad(set_to_none=True)
        names, losses, norms = zip(*records, strict=True)
        return TrainingHistory(names, losses, norms)

    def _add_gradient(self) -> tuple[str, float, float]:
        """Add one task's share to the gradients; return its name, loss and gradient norm."""
        drawn = torch.multinomial(self._weights, 1, generator=self.generator).item()
        task = self.tasks[int(drawn)]
        loss = task.loss(self._next_batch(task))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss of task {task.name!r} must be a scalar tensor, got {kind}")
        encoder = dict.fromkeys(p for p in self._encoder.parameters() if p.requires_grad)
        groups = self.optimizer.param_groups
        trained = [p for group in groups for p in group["params"] if p.requires_grad]
        parameters = list(dict.fromkeys([*trained, *encoder]))
        gradients = torch.autograd.grad(loss.squeeze(), parameters, allow_unused=True)
        present = {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        shared = [g for p, g in present.items() if p in encoder]
        norm = float(torch.nn.utils.get_total_norm(shared)) if shared else 0.0
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise FloatingPointError(
                f"task {task.name!r}: loss {value} and gradient norm {norm} must be finite"
            )
        self._accumulate({p: present[p] for p in trained if p in present}, norm)
        return task.name, value, norm

    def _accumulate(self, gradients: dict[Tensor, Tensor], norm: float) -> None:
        scale = 1 / self.gradient_accumulation_steps
        if self.normalize_gradients and norm > 0:
            scale /= norm
        for parameter, gradient in gradients.items():
            if parameter.grad is None:
                parameter.grad = gradient * scale
            else:
                parameter.grad.add_(gradient, alpha=scale)

    def _next_batch(self, task: Task) -> Any:
        missing = object()
        batch = next(self._batches[task.name], missing) if task.name in self._batches else missing
        if batch is missing:
            self._batches[task.name] = iter(task.batches)
            batch = next(self._batches[task.name], missing)
        if batch is missing:
            raise ValueError(
                f"task {task.name!r} must have batches each time they are asked for; a generator "
                "gives them once only"
            )
        return batch
