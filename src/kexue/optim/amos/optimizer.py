"""The optimiser: options, state, and the order in which parameters take their step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from kexue.optim.amos.scale import parameter_scale
from kexue.optim.amos.update import (
    Entry,
    bias_correction,
    is_joined,
    layout,
    portions,
    slot_dtype,
    slot_shape,
    step_alone,
    step_joined,
)

__all__ = ["Amos"]

_SLOTS = ("auto", "per_row", "per_column", "per_tensor", "per_element")


class Amos(Optimizer):
    r"""Adam-style steps that decay, with weights, towards the scale of each parameter.

    With the global rate ξ (``lr``), the scale η, the second moment v and the decay b, both shared
    along the axes over which M averages, a step is

    .. math::
        v &\leftarrow \beta v + (1-\beta) M(g^2), \qquad w = (1-\beta^t) / \max(v, \text{eps}) \\
        c &= (1 + \zeta\sqrt{\xi}\, b)^{-1/2}, \qquad d = (1 + \zeta\sqrt{\xi\eta}\, b)^{-1} \\
        \gamma &= \sqrt r\, c\, \xi^2\, w\, M(g^2) \\
        \Delta &= -r\, d\, (\xi\eta\sqrt w\, g + \tfrac12\gamma\theta), \qquad
        b \leftarrow b + \gamma (r + b)

    and θ moves by Δ, or by Δ's running average. Steps and weight decay both fade as b grows, so no
    schedule and no number of steps is needed. The state is a few numbers a row.

    As a rule, ξ is :math:`1/\sqrt N` for N independent batches of data, and 1 - β of the order of
    ξ. Gradients must be those of real batches: where they are accumulated, step once a sum.

    Parameters
    ----------
    params : iterable of Tensor or of dict
        Parameters, or groups as of :func:`amos_parameter_groups`. Each further option may also be
        given per group.
    lr : float or Tensor
        ξ; a tensor of one entry keeps a captured or compiled step from depending on its value.
    scale : float, optional
        η, the scale that entries end up at; :func:`parameter_scale` of each parameter by default.
    beta : float
        β in [0, 1), the memory of the second moment.
    decay_coefficient : float
        ζ, how fast the step fades; with 0 it never does.
    momentum : float
        μ in [0, 1). Above 0 the update is a running average, without bias correction.
    slots : {"auto", "per_row", "per_column", "per_tensor", "per_element"}
        Which entries share v and b: those of one index of axis 0, which is an output in a kernel
        and a word in an embedding, those of one index of the last axis, all, or none. "auto" is
        "per_row" for matrices and more, "per_tensor" for vectors.
    finetune_rate : float
        r, a factor on the step that is known to come from less than the whole error.
    initial_decay : float
        b at the start. Large for a trained model: its decay is already advanced.
    eps : float
        Least second moment. The default keeps √w finite in float32.
    maximize : bool
        Whether to go up the gradient.
    foreach : bool, optional
        Whether small parameters of equal layout are joined; by default on CUDA only. Joined
        parameters are copied for the time of the step.
    capturable : bool
        Whether the step can be captured in a CUDA graph or compiled: step counts then lie beside
        the parameters, and nothing is read back.
    differentiable : bool
        Whether gradients flow through the step.

    Raises
    ------
    ValueError
        For an option out of its range, here or in a group.
    TypeError
        For complex parameters.
    RuntimeError
        For sparse gradients, by ``step``.

    Examples
    --------
    The first step moves entries by ξη, whatever the size of the gradient:

    >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
    >>> optimizer = Amos([weight], lr=0.1, scale=0.5)
    >>> (1e6 * weight.sum()).backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([[-0.0500, -0.0500, -0.0500],
            [-0.0500, -0.0500, -0.0500]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        scale: float | None = None,
        beta: float = 0.999,
        decay_coefficient: float = 0.25,
        momentum: float = 0.0,
        slots: Literal["auto", "per_row", "per_column", "per_tensor", "per_element"] = "auto",
        finetune_rate: float = 1.0,
        initial_decay: float = 0.0,
        eps: float = 2.0**-125,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "scale": scale,
            "beta": beta,
            "decay_coefficient": decay_coefficient,
            "momentum": momentum,
            "slots": slots,
            "finetune_rate": finetune_rate,
            "initial_decay": initial_decay,
            "eps": eps,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose options are held to the same ranges as those of the optimiser."""
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.is_complex():
                del self.param_groups[-1]
                raise TypeError(f"parameters must be real, got one of {parameter.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; nothing is shared with ``state_dict`` afterwards."""
        state_dict = copy.deepcopy(state_dict)
        super().load_state_dict(state_dict)
        # torch has cast the slots to the type of the parameters, which may be too coarse for them.
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved["params"], group["params"], strict=True):
                kept = state_dict["state"].get(index, {})
                for name in {"second_moment", "decay"} & kept.keys():
                    slot = kept[name].to(parameter.device, slot_dtype(parameter))
                    self.state[parameter][name] = slot

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients anew, and returns it.

        Returns
        -------
        float or None
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with torch.set_grad_enabled(group["differentiable"]):
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        moments: list[Tensor] = []
        decays: list[Tensor] = []
        averages: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, parameters, gradients, moments, decays, averages, steps)
        one_by_one: list[Entry] = []
        to_join: dict[tuple[Any, ...], list[Entry]] = {}
        for i, parameter in enumerate(parameters):
            steps[i] += 1
            entry = Entry(
                parameter,
                gradients[i],
                moments[i],
                decays[i],
                averages[i] if averages else None,
                bias_correction(steps[i], group, decays[i].dtype),
                group["scale"] or parameter_scale(parameter),
            )
            if is_joined(parameter, group):
                to_join.setdefault(layout(entry), []).append(entry)
            else:
                one_by_one.append(entry)
        for entry in one_by_one:
            step_alone(entry, group)
        for alike in to_join.values():
            for portion in portions(alike):
                step_joined(portion, group)

    # torch.compile runs a method of this name, with these empty lists, outside of what it traces.
    def _init_group(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        moments: list[Tensor],
        decays: list[Tensor],
        averages: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """Collect what has a gradient, and give new parameters their state."""
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or parameter.numel() == 0:
                continue
            if gradient.is_sparse:
                raise RuntimeError("Amos needs dense gradients, got a sparse one")
            state = self.state[parameter]
            if "step" not in state:
                device = parameter.device if group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                slot = parameter.detach().new_zeros(
                    slot_shape(parameter, group), dtype=slot_dtype(parameter)
                )
                state["second_moment"] = slot
                state["decay"] = torch.full_like(slot, group["initial_decay"])
            if group["momentum"] > 0:
                # Schedules that cycle the momentum may switch it on at any step.
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.detach())
                averages.append(state["momentum_buffer"])
            parameters.append(parameter)
            gradients.append(gradient)
            moments.append(state["second_moment"])
            decays.append(state["decay"])
            steps.append(state["step"])


def _check_options(options: dict[str, Any]) -> None:
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be one number, got a tensor of shape {tuple(lr.shape)}")
    at_least_zero = {name: options[name] for name in ("lr", "decay_coefficient", "initial_decay")}
    for name, value in at_least_zero.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    for name in ("beta", "momentum"):
        if not 0 <= options[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {options[name]}")
    for name in ("scale", "finetune_rate", "eps"):
        value = options[name]
        if not (name == "scale" and value is None) and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")
    if options["slots"] not in _SLOTS:
        raise ValueError(f"slots must be one of {', '.join(_SLOTS)}, got {options['slots']!r}")
    if options["foreach"] and options["differentiable"]:
        raise ValueError(
            "foreach=True joins parameters in place and cannot be differentiable=True as well, "
            f"got foreach={options['foreach']} and differentiable={options['differentiable']}"
        )
