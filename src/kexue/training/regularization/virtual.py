"""Virtual adversarial training: the direction in which the outputs themselves move most."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kexue.training.regularization.arguments import (
    REDUCTIONS,
    Reduction,
    choice,
    count,
    mask_of,
    number,
    random_source,
    real_inputs,
    reduced,
    same_shape,
)
from kexue.training.regularization.contexts import freeze_running_statistics
from kexue.training.regularization.divergence import (
    METRICS,
    Metric,
    divergence,
    outputs_of,
    times_curvature,
)
from kexue.training.regularization.samplewise import (
    beside,
    gradients,
    masked,
    normal,
    pulled_back,
    rows,
    unit,
)

__all__ = ["VirtualAdversarialLoss", "virtual_adversarial_perturbation"]

Function: TypeAlias = Callable[[Tensor], Tensor]


def virtual_adversarial_perturbation(
    function: Function,
    inputs: Float[Tensor, " batch *features"],
    *,
    epsilon: float,
    iterations: int = 1,
    metric: Metric = "categorical",
    hessian: Literal["exact", "finite_difference"] = "exact",
    xi: float = 1e-2,
    choose_sign: bool = False,
    initial: Float[Tensor, " batch *features"] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch *features"]:
    r"""Return the perturbation of norm ε that moves the outputs most; no label is needed.

    The divergence of :func:`consistency_loss` is :math:`\frac12 r^T H r` with
    :math:`H = J^T \Lambda J`; power iteration :math:`u \leftarrow Hu / |Hu|` leads to the principal
    eigenvector. A random direction costs :math:`\epsilon^2 G / d`, this one up to
    :math:`\epsilon^2 \lambda_{max} / 2`.

    Parameters
    ----------
    function : callable
        From inputs to outputs (batch, outputs), deterministic; logits for "categorical" and
        "bernoulli".
    inputs : Tensor, shape (batch, *features)
        Images, tables or embedding outputs.
    epsilon : float
        Norm of each sample's perturbation, over all of its features.
    iterations : int
        Power iterations; one is normally enough. With none the direction is the start's.
    metric : {"categorical", "euclidean", "bernoulli"}
        What makes outputs far apart.
    hessian : {"exact", "finite_difference"}
        Products with H by automatic differentiation, in any dtype; or from the gradient at
        :math:`x + \xi u`, which needs no second derivative of the function (attention kernels,
        fused recurrent layers and compiled models have none).
    xi : float
        Step of the finite difference. In float32 the direction is right to six digits at 1e-2, and
        noise at 1e-6. It belongs to inputs of about unit norm: scale it with theirs.
    choose_sign : bool
        Whether to evaluate both signs and keep the one that moves the outputs more. They differ
        from the third order on.
    initial : Tensor, shape (batch, *features), optional
        Start of the iteration in any scale, instead of a normal random one.
    mask : bool Tensor, broadcastable to inputs, optional
        True where a component may be perturbed. The rest neither moves nor counts in the norm.
    generator : torch.Generator, optional
        Source of randomness, on the device of the inputs.

    Returns
    -------
    Tensor, shape (batch, *features)
        The perturbation, detached. Where H maps the direction to zero, it is kept. No parameter's
        ``.grad`` changes.

    Raises
    ------
    ValueError
        For an unknown name, a number out of range, and where a shape does not fit.
    TypeError
        For inputs that are no real floating-point numbers, and a mask that is not bool.

    Examples
    --------
    >>> stretch = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> start = torch.ones(1, 2)
    >>> virtual_adversarial_perturbation(lambda x: x @ stretch, torch.zeros(1, 2), epsilon=1.0,
    ...                                  iterations=2, metric="euclidean", initial=start)
    tensor([[0.0123, 0.9999]])
    """
    inputs = real_inputs(inputs)
    epsilon = number("epsilon", epsilon)
    iterations = count("iterations", iterations, least=0)
    choice("metric", metric, METRICS)
    choice("hessian", hessian, _HESSIANS)
    xi = number("xi", xi, positive=True)
    mask = mask_of(mask, inputs)
    random_source(generator, inputs)
    if initial is None:
        start = normal(inputs, generator)
    else:
        # Its length, which another precision may not hold, is of no account.
        start = same_shape("initial", initial, inputs).detach()
        start = unit(masked(start, mask)).to(inputs.dtype)

    x = inputs.detach()
    direction, clean = _principal_direction(
        function, x, start, mask, iterations=iterations, metric=metric, hessian=hessian, xi=xi
    )
    perturbation = epsilon * direction
    if not choose_sign:
        return perturbation
    if clean is None:
        clean = outputs_of(function, x, metric, graph=False)
    ahead, behind = (
        divergence(outputs_of(function, moved, metric, graph=False), clean, metric)
        for moved in (x + perturbation, x - perturbation)
    )
    return torch.where(beside(ahead >= behind, x), perturbation, -perturbation)


_HESSIANS = ("exact", "finite_difference")


def _principal_direction(
    function: Function,
    x: Tensor,
    start: Tensor,
    mask: Tensor | None,
    *,
    iterations: int,
    metric: Metric,
    hessian: str,
    xi: float,
) -> tuple[Tensor, Tensor | None]:
    """Return unit directions, and the clean outputs if they were needed on the way."""
    direction = unit(masked(start, mask))
    if iterations == 0:
        return direction, None
    if hessian == "exact":
        clean, times_h = _gauss_newton(function, x, metric)
    else:
        clean = outputs_of(function, x, metric, graph=False)
        times_h = partial(_difference_of_gradients, function, x, clean, metric, xi)
    for _ in range(iterations):
        turned = unit(masked(times_h(direction), mask))
        nowhere = (rows(turned) == 0).all(1)
        direction = torch.where(beside(nowhere, x), direction, turned)
    return direction, clean


def _gauss_newton(
    function: Function, x: Tensor, metric: Metric
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the outputs, detached, and the product with JᵀΛJ."""
    with torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        outputs = outputs_of(function, x, metric)
        # Jᵀw is linear in w, so that its derivative in w along u is Ju: reverse mode twice needs
        # less of the function's operations, and was found cheaper, than forward mode.
        w = torch.zeros_like(outputs, requires_grad=True)
        jacobian_transposed_w = pulled_back(outputs, x, w, create_graph=True)
    clean = outputs.detach()

    def times_h(u: Tensor) -> Tensor:
        (jacobian_u,) = torch.autograd.grad(jacobian_transposed_w, w, u, retain_graph=True)
        # Of unit length: for confident samples the product underflows in half precision.
        return pulled_back(outputs, x, unit(times_curvature(jacobian_u, clean, metric)))

    return clean, times_h


def _difference_of_gradients(
    function: Function, x: Tensor, clean: Tensor, metric: Metric, xi: float, u: Tensor
) -> Tensor:
    """Return ξHu: the gradient of the divergence at x + ξu, which is zero at x."""
    with torch.enable_grad():
        moved = (x + xi * u).requires_grad_()
        losses = divergence(outputs_of(function, moved, metric), clean, metric)
        return gradients(losses, moved)


class VirtualAdversarialLoss(nn.Module):
    r"""Loss of virtual adversarial training, :math:`\max_{|r| = \epsilon} l(f(x + r), f(x))`.

    Add it to the supervised loss; its samples need no labels. In units of other regularisers: at
    most :math:`d \lambda_{max} / 2G` times the loss of noise of the same norm.

    Parameters
    ----------
    epsilon : float
        Norm of each sample's perturbation.
    iterations : int
        Power iterations; one is normally enough, none is noise of norm ``epsilon``.
    metric : {"categorical", "euclidean", "bernoulli"}
        What makes outputs far apart.
    hessian : {"exact", "finite_difference"}
        How products with the Hessian are found; see :func:`virtual_adversarial_perturbation`.
    xi : float
        Step of the finite difference.
    detach_target : bool
        Whether the clean outputs are constants; see :func:`consistency_loss`.
    reduction : {"mean", "sum", "none"}
        Over the batch.

    Raises
    ------
    ValueError
        For an unknown name and a number out of range; in a call, where a shape does not fit.
    TypeError
        In a call, for inputs that are no real floating-point numbers.

    Notes
    -----
    The passes should see the same function: dropout with other masks would be what the divergence
    measures. The loss leaves train and eval mode as they are. Where ``function`` is a module, the
    running statistics of its normalisation layers are not updated; put a closure over such a module
    under :func:`freeze_running_statistics`.

    Examples
    --------
    A classifier of texts is perturbed at its embeddings, without the padding:

    >>> _ = torch.manual_seed(0)
    >>> embedding, head = nn.Embedding(9, 4), nn.Linear(4, 2)
    >>> tokens = torch.tensor([[3, 1, 4], [1, 5, 0]])
    >>> classify = lambda embedded: head(embedded.tanh().sum(1))
    >>> loss = VirtualAdversarialLoss(epsilon=0.5)
    >>> value = loss(classify, embedding(tokens), mask=(tokens != 0)[..., None])
    >>> value.backward()
    >>> bool(value > 0)
    True
    """

    def __init__(
        self,
        *,
        epsilon: float,
        iterations: int = 1,
        metric: Metric = "categorical",
        hessian: Literal["exact", "finite_difference"] = "exact",
        xi: float = 1e-2,
        detach_target: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        choice("metric", metric, METRICS)
        choice("hessian", hessian, _HESSIANS)
        choice("reduction", reduction, REDUCTIONS)
        self.epsilon = number("epsilon", epsilon)
        self.iterations = count("iterations", iterations, least=0)
        self.metric: Metric = metric
        self.hessian = hessian
        self.xi = number("xi", xi, positive=True)
        self.detach_target = detach_target
        self.reduction: Reduction = reduction

    def extra_repr(self) -> str:
        return (
            f"epsilon={self.epsilon:g}, iterations={self.iterations}, metric={self.metric!r}, "
            f"hessian={self.hessian!r}, xi={self.xi:g}, detach_target={self.detach_target}, "
            f"reduction={self.reduction!r}"
        )

    def forward(
        self,
        function: Function,
        inputs: Float[Tensor, " batch *features"],
        *,
        mask: Bool[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """Return the loss at ``inputs``, differentiable in them and in what ``function`` holds.

        Parameters
        ----------
        function : callable
            From inputs to outputs (batch, outputs), deterministic.
        inputs : Tensor, shape (batch, *features)
            Images, tables or embedding outputs.
        mask : bool Tensor, broadcastable to inputs, optional
            True where a component may be perturbed.
        generator : torch.Generator, optional
            Source of randomness, on the device of the inputs.

        Returns
        -------
        Tensor
            The loss, at least in float32; one a sample with ``reduction="none"``.
        """
        inputs = real_inputs(inputs)
        mask = mask_of(mask, inputs)
        random_source(generator, inputs)
        module = function if isinstance(function, nn.Module) else None
        with freeze_running_statistics(module) if module is not None else nullcontext():
            direction, clean = _principal_direction(
                function,
                inputs.detach(),
                normal(inputs, generator),
                mask,
                iterations=self.iterations,
                metric=self.metric,
                hessian=self.hessian,
                xi=self.xi,
            )
            if clean is None or not self.detach_target:
                clean = outputs_of(function, inputs, self.metric, graph=not self.detach_target)
            moved = outputs_of(function, inputs + self.epsilon * direction, self.metric)
            return reduced(divergence(moved, clean, self.metric), self.reduction)
