"""The scale of a parameter, and parameter groups of a model by scale."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

__all__ = ["amos_parameter_groups", "parameter_scale", "relative_scale_groups"]

ScaleRules: TypeAlias = Mapping[str, float | Callable[[Tensor], float]]

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.modules.batchnorm._BatchNorm,
)
_NORM_TRAVEL = 0.5
"""How far the weights of norms move from the 1 they start at."""


def parameter_scale(parameter: Tensor, *, owner: nn.Module | None = None, name: str = "") -> float:
    r"""Return the scale that the entries of a trained parameter are expected to have.

    :math:`\sqrt{2/\text{dim}}` for embeddings, :math:`\sqrt{1/\text{fan in}}` for other matrices
    and kernels (fan in counts a convolution's window), 1 for the weight of a normalisation layer,
    ½ for everything else, biases above all. Behind a rectifier the paper takes
    :math:`\sqrt{2/\text{fan in}}`; the parameter does not know, so say it by ``scale_rules``.

    Parameters
    ----------
    parameter : Tensor
        In torch's layout: ``(out, in, ...)`` for kernels, ``(vocabulary, dim)`` for embeddings.
    owner : nn.Module, optional
        The layer that holds it. Without it a parameter is judged by its shape alone.
    name : str
        Its name, of which the last part counts: ``"weight"``. Without it, identity decides whether
        it is the weight of its owner.

    Returns
    -------
    float
        The scale, above 0.

    Raises
    ------
    TypeError
        Where the parameter is no tensor.

    Examples
    --------
    >>> layer = nn.Linear(64, 10)
    >>> parameter_scale(layer.weight), parameter_scale(layer.bias)
    (0.125, 0.5)
    >>> words = nn.Embedding(1000, 32)
    >>> parameter_scale(words.weight, owner=words)
    0.25
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"parameter must be a tensor, got {type(parameter).__name__}")
    if _is_weight(parameter, owner, name):
        if isinstance(owner, _NORMS):
            return 1.0
        if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
            return math.sqrt(2 / parameter.shape[-1])
    if parameter.ndim >= 2:
        return math.sqrt(1 / max(math.prod(parameter.shape[1:]), 1))
    return 0.5


def amos_parameter_groups(
    model: nn.Module, *, scale_rules: ScaleRules | None = None
) -> list[dict[str, Any]]:
    """Return a model's parameters in groups of equal scale, for :class:`Amos`.

    Parameters
    ----------
    model : nn.Module
        Its trainable parameters are taken, each once; a shared one belongs to the layer that is
        registered first.
    scale_rules : mapping from str to float or callable, optional
        Regular expression, searched in the full name, -> scale, or function from the parameter to
        its scale. The first match wins; :func:`parameter_scale` decides where none does.

    Returns
    -------
    list of dict
        Groups with ``params``, ``scale`` and ``names``.

    Raises
    ------
    ValueError
        For a scale that is not positive, or no regular expression.
    TypeError
        Where the model is no module.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    >>> behind_rectifier = {r"^3.weight": lambda weight: (2 / weight.shape[1]) ** 0.5}
    >>> for group in amos_parameter_groups(model, scale_rules=behind_rectifier):
    ...     print(round(group["scale"], 4), group["names"])
    0.125 ['0.weight']
    0.5 ['0.bias', '2.bias', '3.bias']
    1.0 ['2.weight']
    0.3536 ['3.weight']
    """
    settings = [(owned, {"scale": owned.scale}) for owned in _walk(model, scale_rules)]
    return _grouped(settings)


def relative_scale_groups(
    model: nn.Module,
    *,
    relative_lr: float = 1e-3,
    q: float = 1.0,
    update_rms: float = 1.0,
    scale_rules: ScaleRules | None = None,
    decay_norms: bool = False,
) -> list[dict[str, Any]]:
    r"""Return a model's parameters in groups of one *relative* rate, for AdamW and its kin.

    A parameter of scale σ gets :math:`\text{lr} = \alpha_0\sigma/\text{rms}` and
    :math:`\text{weight decay} = \alpha_0^2/(2q\,\text{lr}) = \alpha_0\,\text{rms}/(2q\sigma)`. With
    :math:`\alpha_0 = 10^{-3}` and σ = 0.05 that is the weight decay of 0.01 that everybody takes.

    Parameters
    ----------
    model : nn.Module
        Its trainable parameters are taken, each once; a shared one belongs to the layer that is
        registered first.
    relative_lr : float
        α₀, the share of its own travel that a parameter moves in the first step: 1e-3 is typical,
        1e-2 fits easy tasks.
    q : float
        θ·ε over ε·ε, where ε = θ - θ* is the error: 1 as long as the parameter's end is
        independent of where it is now.
    update_rms : float
        Root mean square of the optimiser's update before the rate: 1 for signs and early Adam,
        0.2 to 0.4 for Adam late in the training of large models.
    scale_rules : mapping from str to float or callable, optional
        As in :func:`amos_parameter_groups`. The scale of a normalisation weight is its travel here,
        0.5, and not the value that it ends up at.
    decay_norms : bool
        Whether the weights of normalisation layers decay.

    Returns
    -------
    list of dict
        Groups with ``params``, ``lr``, ``weight_decay``, ``scale`` and ``names``.

    Raises
    ------
    ValueError
        Where ``relative_lr``, ``q``, ``update_rms`` or a scale is not positive, or a rule is no
        regular expression.
    TypeError
        Where the model is no module.

    Examples
    --------
    >>> import torch
    >>> groups = relative_scale_groups(nn.Linear(768, 768))
    >>> [(round(group["lr"], 8), round(group["weight_decay"], 5)) for group in groups]
    [(3.608e-05, 0.01386), (0.0005, 0.001)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    for option, value in {"relative_lr": relative_lr, "q": q, "update_rms": update_rms}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{option} must be a positive number, got {value}")
    settings = []
    for owned in _walk(model, scale_rules, norm_weight=_NORM_TRAVEL):
        lr = relative_lr * owned.scale / update_rms
        decays = decay_norms or not owned.is_norm_weight
        weight_decay = relative_lr**2 / (2 * q * lr) if decays else 0.0
        settings.append((owned, {"lr": lr, "weight_decay": weight_decay, "scale": owned.scale}))
    return _grouped(settings)


class _Owned(NamedTuple):
    name: str
    parameter: nn.Parameter
    scale: float
    is_norm_weight: bool


def _walk(
    model: nn.Module, scale_rules: ScaleRules | None, norm_weight: float | None = None
) -> Iterator[_Owned]:
    """Every trainable parameter once, with its scale."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    rules = [(_expression(rule), scale) for rule, scale in (scale_rules or {}).items()]
    seen = set()
    for prefix, owner in model.named_modules():
        for own_name, parameter in owner.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            name = f"{prefix}.{own_name}" if prefix else own_name
            is_norm_weight = isinstance(owner, _NORMS) and own_name == "weight"
            rule = next((scale for pattern, scale in rules if pattern.search(name)), None)
            if rule is not None:
                scale = float(rule(parameter) if callable(rule) else rule)
            elif is_norm_weight and norm_weight is not None:
                scale = norm_weight
            else:
                scale = parameter_scale(parameter, owner=owner, name=own_name)
            if not 0 < scale < math.inf:
                raise ValueError(f"scale of {name} must be a positive number, got {scale}")
            yield _Owned(name, parameter, scale, is_norm_weight)


def _grouped(settings: list[tuple[_Owned, dict[str, float]]]) -> list[dict[str, Any]]:
    """Join parameters of equal settings, in the order of their first appearance."""
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    for owned, options in settings:
        group = groups.setdefault(tuple(options.values()), {"params": [], **options, "names": []})
        group["params"].append(owned.parameter)
        group["names"].append(owned.name)
    return list(groups.values())


def _is_weight(parameter: Tensor, owner: nn.Module | None, name: str) -> bool:
    if name:
        return name.rpartition(".")[2] == "weight"
    return owner is not None and parameter is getattr(owner, "weight", None)


def _expression(rule: str) -> re.Pattern[str]:
    try:
        return re.compile(rule)
    except re.error as error:
        raise ValueError(
            f"scale_rules must be keyed by regular expressions, got {rule!r}: {error}"
        ) from None
