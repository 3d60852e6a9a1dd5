"""SimSiam, and BYOL, which is SimSiam with a teacher."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kexue.training.siamese.loss import (
    LossName,
    check_matrix,
    negative_cosine_similarity,
    squared_distance,
)

__all__ = ["BYOL", "SiameseOutput", "SimSiam", "cosine_momentum"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SiameseOutput:
    """What a siamese network found in two views; every pair has one entry a view.

    Attributes
    ----------
    loss : Tensor
        Half the sum over both directions, a scalar.
    projections : tuple of Tensor (batch, dim)
        Of the network that learns.
    predictions : tuple of Tensor (batch, dim)
        The predictor's output for these projections.
    targets : tuple of Tensor (batch, dim)
        What the other view's prediction is compared with.

    Examples
    --------
    >>> output = SimSiam(nn.Identity())(torch.eye(2), torch.eye(2))
    >>> output.loss, len(output.targets)
    (tensor(-1.), 2)
    """

    loss: Tensor
    projections: tuple[Tensor, Tensor]
    predictions: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]


class SimSiam(nn.Module):
    """Two views of a batch, each predicted from the other, by one network.

    The views go through the encoder one after the other, so that batch norms see each by itself.
    Inside DistributedDataParallel nothing is gathered: losses are local, gradients averaged.

    Parameters
    ----------
    encoder : nn.Module
        Any network; with the projector it must end in shape (batch, dim).
    projector, predictor : nn.Module, optional
        Heads, for instance :func:`projection_head` and :func:`prediction_head`; the identity by
        default.
    stop_gradient : bool
        Whether targets are detached. Without it, and without a predictor, the encoder collapses.
    loss : {"cosine", "mse"}
        Negative cosine similarity, or squared distance summed over dim; mean over the batch.

    Raises
    ------
    ValueError
        For an unknown loss, views of different shapes, or projections or predictions that are not
        of one shape (batch, dim).
    TypeError
        For an encoder or head that is no module, and views that are no tensors.

    Examples
    --------
    >>> from kexue.training.siamese import prediction_head
    >>> _ = torch.manual_seed(0)
    >>> model = SimSiam(nn.Linear(8, 4), predictor=prediction_head(4, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    >>> x = torch.randn(32, 8)
    >>> model(x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)).loss.backward()
    >>> optimizer.step()
    >>> model.embed(x).shape
    torch.Size([32, 4])
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
        stop_gradient: bool = True,
        loss: LossName = "cosine",
    ) -> None:
        super().__init__()
        if loss not in get_args(LossName):
            raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}, got {loss!r}")
        self.encoder = _module("encoder", encoder)
        self.projector = nn.Identity() if projector is None else _module("projector", projector)
        self.predictor = nn.Identity() if predictor is None else _module("predictor", predictor)
        self.stop_gradient = stop_gradient
        self.loss = loss

    def forward(self, view_1: Tensor, view_2: Tensor) -> SiameseOutput:
        """Return loss, projections, predictions and targets of two views of the same shape."""
        _check_views(view_1, view_2)
        z_1, z_2 = self._project(view_1), self._project(view_2)
        check_matrix("projections", z_1)
        if len(z_1) == 0:
            raise ValueError("views must hold at least one sample, got an empty batch")
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        t_1, t_2 = self._targets((view_1, view_2), (z_1, z_2))
        _check_predictions(p_1, t_1)
        distance = negative_cosine_similarity if self.loss == "cosine" else squared_distance
        loss = (distance(p_1, t_2) + distance(p_2, t_1)) / 2
        return SiameseOutput(loss, (z_1, z_2), (p_1, p_2), (t_1, t_2))

    def embed(self, x: Tensor) -> Tensor:
        """Return the encoder's output, for use downstream."""
        return self.encoder(x)

    def _project(self, view: Tensor) -> Tensor:
        return self.projector(self.encoder(view))

    def _targets(
        self, views: tuple[Tensor, Tensor], projections: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        z_1, z_2 = projections
        return (z_1.detach(), z_2.detach()) if self.stop_gradient else (z_1, z_2)


class BYOL(SimSiam):
    r"""SimSiam with targets from a teacher, the exponential average of encoder and projector.

    .. math:: \xi \leftarrow \tau \xi + (1 - \tau) \theta

    with momentum :math:`\tau`, by :meth:`update_teacher` after each step of the optimiser; buffers
    (running statistics) are copied. The teacher starts as a copy, stands in the state dict, follows
    ``train()`` and ``eval()``, and asks for no gradient, so that an optimiser may be given all
    ``parameters()``.

    A step of 1 - τ = 0.001 is lost to rounding in half precision. A student that is float16 or
    bfloat16 when BYOL is built gets a float32 teacher; after converting the whole module, put it
    back with ``model.teacher_encoder.float()`` and ``model.teacher_projector.float()``. Views are
    cast to the teacher's precision outside autocast.

    Parameters
    ----------
    encoder : nn.Module
        Any network with initialised parameters; with the projector it must end in shape
        (batch, dim). Its submodules are not to be exchanged later.
    projector, predictor : nn.Module, optional
        Heads, for instance :func:`projection_head` and :func:`prediction_head`; the identity by
        default.
    momentum : float
        τ in [0, 1]: 0 is SimSiam, 1 freezes the teacher.
    loss : {"cosine", "mse"}
        Negative cosine similarity, or squared distance summed over dim; mean over the batch.

    Attributes
    ----------
    teacher_encoder, teacher_projector : nn.Module
        The teacher.

    Raises
    ------
    ValueError
        For a momentum outside [0, 1], parameters without values, and what SimSiam refuses.
    TypeError
        For an encoder or head that is no module, and views that are no tensors.

    Examples
    --------
    >>> from kexue.training.siamese import prediction_head
    >>> model = BYOL(nn.Linear(8, 4), predictor=prediction_head(4, 2), momentum=0.9)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    >>> x = torch.randn(32, 8)
    >>> model(x, 1.1 * x).loss.backward()
    >>> optimizer.step()
    >>> model.update_teacher()
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
        momentum: float = 0.996,
        loss: LossName = "cosine",
    ) -> None:
        super().__init__(encoder, projector=projector, predictor=predictor, loss=loss)
        self.momentum = _share("momentum", momentum)
        # One copy of both, so that what they share stays shared.
        teacher = copy.deepcopy(nn.ModuleList([self.encoder, self.projector]))
        self.teacher_encoder, self.teacher_projector = (_teacher(part) for part in teacher)

    @torch.no_grad()
    def update_teacher(self, momentum: float | None = None) -> None:
        """Move the teacher towards the student; call it after ``optimizer.step()``.

        Parameters
        ----------
        momentum : float, optional
            For this step, for instance from :func:`cosine_momentum`; that of the module by default.
        """
        tau = self.momentum if momentum is None else _share("momentum", momentum)
        teachers, students = self._paired("_parameters")
        if teachers:
            torch._foreach_lerp_(teachers, students, 1 - tau)
        teachers, students = self._paired("_buffers")
        if teachers:
            torch._foreach_copy_(teachers, students)

    def _paired(self, kind: str) -> tuple[list[Tensor], list[Tensor]]:
        teachers = _tensors([self.teacher_encoder, self.teacher_projector], kind)
        students = _tensors([self.encoder, self.projector], kind)
        if len(teachers) != len(students):
            raise ValueError(
                f"encoder and projector must have the structure of the teacher, {len(teachers)} "
                f"{kind[1:]}, got {len(students)}: build BYOL anew after exchanging parts"
            )
        # A shared tensor moves once.
        pairs = {
            id(t): (t, s.to(t.dtype))
            for t, s in zip(teachers, students, strict=True)
            if t is not None and s is not None
        }
        return [t for t, _ in pairs.values()], [s for _, s in pairs.values()]

    @torch.no_grad()
    def _targets(
        self, views: tuple[Tensor, Tensor], projections: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        t_1, t_2 = (
            self.teacher_projector(self.teacher_encoder(self._as_teacher(view))) for view in views
        )
        return t_1, t_2

    def _as_teacher(self, view: Tensor) -> Tensor:
        if view.dtype not in _HALF or torch.is_autocast_enabled(view.device.type):
            return view
        first = next(
            chain(self.teacher_encoder.parameters(), self.teacher_projector.parameters()), None
        )
        return view if first is None else view.to(first.dtype)


def cosine_momentum(
    step: float, total_steps: float, *, base: float = 0.996, final: float = 1.0
) -> float:
    r"""Return the teacher's momentum at a step, rising from ``base`` to ``final``.

    .. math:: \tau = \tau_{final} - (\tau_{final} - \tau_{base}) (\cos(\pi k / K) + 1) / 2

    Parameters
    ----------
    step : float
        Steps taken so far, k in [0, K].
    total_steps : float
        Steps of the whole training, K.
    base, final : float
        Momentum at the start and at the end, in [0, 1].

    Returns
    -------
    float
        The momentum.

    Raises
    ------
    ValueError
        For a step outside [0, total_steps], no steps at all, or a momentum outside [0, 1].

    Examples
    --------
    >>> [round(cosine_momentum(k, 100, base=0.99), 4) for k in (0, 50, 100)]
    [0.99, 0.995, 1.0]
    """
    base, final = _share("momentum base", base), _share("momentum final", final)
    if not (math.isfinite(total_steps) and total_steps > 0 and 0 <= step <= total_steps):
        raise ValueError(
            f"step must be in [0, total_steps] with total_steps above 0, got {step} of "
            f"{total_steps}"
        )
    return final - (final - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


def _tensors(parts: list[nn.Module], kind: str) -> list[Tensor | None]:
    """All parameters or buffers, in an order that only the structure decides.

    Walked anew in each update, since converting, loading or SyncBatchNorm may put other tensors in
    their place; that costs less than the update, unlike ``parameters()``.
    """
    found: list[Tensor | None] = []
    rest: list[nn.Module | None] = [*parts]
    while rest:
        part = rest.pop()
        if part is not None:
            found.extend(getattr(part, kind).values())
            rest.extend(part._modules.values())
    return found


def _teacher(part: nn.Module) -> nn.Module:
    tensors = list(part.parameters())
    if any(is_lazy(tensor) for tensor in [*tensors, *part.buffers()]):
        raise ValueError(
            "encoder and projector must have initialised parameters, got lazy ones: run them on a "
            "batch first, or teacher and student would start apart"
        )
    if any(tensor.dtype in _HALF for tensor in tensors):
        part.float()
    return part.requires_grad_(False)


def _module(name: str, module: Any) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(module).__name__}")
    return module


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def _check_views(view_1: Any, view_2: Any) -> None:
    if not (isinstance(view_1, Tensor) and isinstance(view_2, Tensor)):
        kinds = f"{type(view_1).__name__} and {type(view_2).__name__}"
        raise TypeError(f"views must be tensors, got {kinds}")
    if view_1.shape != view_2.shape or view_1.ndim == 0:
        raise ValueError(
            "views must have the same shape, with a batch dimension, "
            f"got {tuple(view_1.shape)} and {tuple(view_2.shape)}"
        )


def _check_predictions(prediction: Any, target: Any) -> None:
    check_matrix("predictions", prediction)
    if prediction.shape != target.shape:
        raise ValueError(
            "predictions must have the shape (batch, dim) of the projections, "
            f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
