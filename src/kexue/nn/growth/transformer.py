r"""Known Transformers, made wider and deeper in one call, with a statement of what is exact.

Source: Su Jianlin, "我们可以无损放大一个Transformer模型吗（一）";
https://arxiv.org/abs/2401.02415 (LLaMA Pro: new blocks that start as the identity).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kexue.nn.growth.expansion import Expansion, check_noise
from kexue.nn.growth.families import Architecture
from kexue.nn.growth.rules import expand_state_dict, matching_rule

__all__ = ["GrowthReport", "GrowthResult", "grow_transformer"]

_CHOICES = {
    "attention": ("heads", "head_dim"),
    "scaling": ("copy", "orthogonal"),
    "fill": ("repeat", "zero"),
}


@dataclass(frozen=True)
class GrowthReport:
    """What can be said of a grown model.

    Attributes
    ----------
    exact : bool
        Whether the large model computes the same function in real arithmetic (in eval mode).
    symmetric : bool
        Whether it was widened without noise: copies then receive equal gradients for ever.
    reasons : tuple of str
        Why it is not exact; empty where it is.
    old_parameters, new_parameters : int
        Numbers of parameters, tied ones counted once, buffers not at all.

    Examples
    --------
    >>> GrowthReport(True, True, (), 10, 40).exact
    True
    """

    exact: bool
    symmetric: bool
    reasons: tuple[str, ...]
    old_parameters: int
    new_parameters: int


@dataclass(frozen=True, eq=False)
class GrowthResult:
    """A grown model: what to build, what to load into it, and what to expect of it.

    Attributes
    ----------
    state_dict : dict of str to Tensor
        For ``load_state_dict(strict=True)`` of the larger model. Tied names share one tensor, which
        safetensors refuses to write twice: save through the model.
    config : dict
        The old configuration with the new sizes.
    report : GrowthReport
        Whether the growth is exact.

    Examples
    --------
    >>> report = GrowthReport(True, False, (), 1, 1)
    >>> GrowthResult({"wte.weight": torch.zeros(1, 1)}, {"n_embd": 1}, report).config["n_embd"]
    1
    """

    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    report: GrowthReport


def grow_transformer(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | Any,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    attention: Literal["heads", "head_dim"] = "heads",
    num_layers: int | None = None,
    scaling: Literal["copy", "orthogonal"] = "copy",
    fill: Literal["repeat", "zero"] = "repeat",
    noise: float = 0.0,
    require_exact: bool = True,
    generator: torch.Generator | None = None,
) -> GrowthResult:
    r"""Make a trained Transformer larger without changing the function that it computes.

    Knows the Hugging Face models of type ``bert``, ``gpt2``, ``llama``, ``mistral`` and ``qwen2``,
    and as ``kexue`` :class:`~kexue.models.transformer.Transformer`. The optimiser's state does not
    grow with the weights: start it, and the warm-up of its learning rate, anew.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        The small model; not changed.
    config : mapping or object with to_dict
        Its configuration, with ``model_type``. For ``kexue``, the fields of ``TransformerConfig``
        and, where they are not the defaults, ``norm`` ("LayerNorm" or "RMSNorm"), ``norm_eps``
        (1e-5), ``norm_style`` ("pre" or "post") and ``rotary`` (None, "half" or "interleaved").
    hidden_size : int, optional
        New width. A multiple of the old one; any larger number with RMSNorm and ``fill="zero"``.
    intermediate_size : int, optional
        New width of the feed-forward, any number from the old one on. By default it grows by the
        factor of the width, or stays where the width is filled with zeros.
    attention : {"heads", "head_dim"}
        What a wider attention has more of: heads, or units in each head. With ``fill="zero"``
        attention stays as it is.
    num_layers : int, optional
        New depth, for pre-norm models. The new layers are copies of their neighbours whose two
        branches end in zeros.
    scaling : {"copy", "orthogonal"}
        Whether copies in the stream keep their size, or the stream its length, as in the article;
        then the epsilon of the norms is divided by the factor.
    fill : {"repeat", "zero"}
        Whether new units of the stream are copies or empty.
    noise : float
        Size of the noise in every matrix that reads grown units, relative to the matrix's root mean
        square; it reads zero from them until training breaks the symmetry. Exact up to the rounding
        of the weights' dtype.
    require_exact : bool
        Whether to refuse what cannot be exact.
    generator : torch.Generator, optional
        Source of the noise, torch's global one by default; not touched when ``noise`` is 0.

    Returns
    -------
    GrowthResult
        New state dict and configuration, and a report.

    Raises
    ------
    ValueError
        For an unknown model type or choice, a missing key, parameters of unknown names or of other
        sizes than the configuration says, sizes below the old ones, a width that LayerNorm does not
        allow, a larger ``head_dim`` where the frequencies of the rotation do not allow it, a
        negative noise; "not lossless: …" where ``require_exact`` forbids the rest.
    TypeError
        For a configuration that is no mapping, values that are no tensors.

    Examples
    --------
    >>> from dataclasses import asdict
    >>> from kexue.models.transformer import Transformer, TransformerConfig
    >>> sizes = TransformerConfig(vocab_size=50, dim=32, num_layers=2)
    >>> small = Transformer(sizes).eval()
    >>> grown = grow_transformer(
    ...     small.state_dict(), {"model_type": "kexue", **asdict(sizes)}, hidden_size=64, noise=0.1
    ... )
    >>> names = TransformerConfig.__dataclass_fields__
    >>> large = Transformer(TransformerConfig(**{k: grown.config[k] for k in names})).eval()
    >>> large.load_state_dict(grown.state_dict)
    <All keys matched successfully>
    >>> tokens = torch.randint(50, (2, 10))
    >>> torch.allclose(large(tokens), small(tokens), atol=1e-5)
    True
    """
    given = {"attention": attention, "scaling": scaling, "fill": fill}
    for name, choice in given.items():
        if choice not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {choice!r}")
    check_noise(noise)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    old = Architecture.read(config)
    plan = _Plan.of(old, hidden_size, intermediate_size, attention, num_layers, scaling, fill)
    reasons = plan.obstacles(state_dict)
    if reasons and require_exact:
        raise ValueError(f"not lossless: {'; '.join(reasons)}; require_exact=False waives this")

    tied = _tied_names(state_dict, old)
    free = {name: tensor for name, tensor in state_dict.items() if name not in tied}
    if plan.head_factor > 1:
        # Modules compute the frequencies of a larger head anew.
        free = {name: tensor for name, tensor in free.items() if not name.endswith("inv_freq")}
    rules = old.rules(state_dict.keys(), plan.normalised)
    deep = _deepen(free, old, plan.layers, silence=not old.post_norm)
    grown = expand_state_dict(deep, rules, plan.expansions(), noise=noise, generator=generator)
    _fill_norms(grown, plan.stream)

    def parameters(tensors: Mapping[str, Tensor]) -> int:
        kept = {name: matching_rule(name, rules) for name in tensors}
        return sum(tensors[n].numel() for n, rule in kept.items() if rule and rule.axes != "copy")

    report = GrowthReport(
        exact=not reasons,
        symmetric=plan.widens and noise == 0,
        reasons=tuple(reasons),
        old_parameters=parameters(free),
        new_parameters=parameters(grown),
    )
    ordered = {name: grown[tied.get(name, name)] for name in _deep_order(state_dict, deep, tied)}
    return GrowthResult(ordered, plan.config(), report)


@dataclass(frozen=True)
class _Plan:
    """How each part grows."""

    old: Architecture
    stream: Expansion
    intermediate: int
    heads_factor: int
    head_factor: int
    layers: int
    scaling: str

    @staticmethod
    def of(
        old: Architecture,
        hidden_size: int | None,
        intermediate_size: int | None,
        attention: str,
        num_layers: int | None,
        scaling: str,
        fill: str,
    ) -> _Plan:
        width = _at_least("hidden_size", hidden_size, old.width)
        factor = width // old.width
        if old.norm == "LayerNorm" and width > old.width and (fill == "zero" or width % old.width):
            raise ValueError(
                "LayerNorm subtracts the mean, which empty or unequally repeated units change: "
                "hidden_size must be an integer multiple of the old one with fill='repeat', "
                f"got {old.width} -> {width} with fill={fill!r}"
            )
        if (
            old.model_type == "kexue"
            and width > old.width
            and (fill == "zero" or width % old.width)
        ):
            raise ValueError(
                "the values of this model have dim // num_heads units each and must grow with it: "
                "hidden_size must be an integer multiple of the old one with fill='repeat', "
                f"got {old.width} -> {width} with fill={fill!r}"
            )
        # Attention and feed-forward follow the stream only where it is repeated as a whole.
        whole = factor if fill == "repeat" and width % old.width == 0 else 1
        by_head = whole if attention == "head_dim" else 1
        if by_head > 1 and old.rotary and (why := old.rope_needs_old_head_dim):
            raise ValueError(f"attention='head_dim' needs other frequencies: {why}; use 'heads'")
        if fill == "zero":
            # The mean square, or with "orthogonal" the length, stays what it was.
            scale = math.sqrt(width / old.width) if scaling == "copy" else 1.0
            stream = Expansion.zero_pad(old.width, width, scale=scale)
        else:
            scale = 1.0 if scaling == "copy" else math.sqrt(old.width / width)
            stream = _copies(old.width, width, scale)
        intermediate = _at_least(
            "intermediate_size", intermediate_size, old.intermediate, old.intermediate * whole
        )
        layers = _at_least("num_layers", num_layers, old.layers)
        if layers > old.layers == 0:
            raise ValueError("num_layers cannot grow: there is no layer to copy")
        return _Plan(old, stream, intermediate, whole // by_head, by_head, layers, scaling)

    @property
    def widens(self) -> bool:
        return self.stream.new_size > self.old.width or self.intermediate > self.old.intermediate

    @property
    def mean_copies(self) -> float:
        """Copies of a unit of the stream; their number, where it is the same for all."""
        empty = bool((self.stream.source < 0).any())
        return 1.0 if empty else self.stream.new_size / self.old.width

    @property
    def power(self) -> float:
        """Factor of the stream's mean square (and of its variance, where LayerNorm takes it)."""
        share = self.mean_copies * self.old.width / self.stream.new_size
        return self.stream.scale**2 * share

    @property
    def normalised(self) -> float:
        """Scale of a copy that was divided by its root mean square."""
        return self.stream.scale / math.sqrt(self.power)

    def expansions(self) -> dict[str, Expansion]:
        old, stream = self.old, self.stream
        plain = Expansion(stream.source, stream.old_size)
        # E_tied h = E h: the tied output layer cannot be divided by the copies, so the norm is.
        final = 1 / (self.mean_copies * stream.scale) if old.tied else stream.scale
        # The article scales all that is linear in the stream; a head's own products it cannot.
        value = stream.scale if self.scaling == "orthogonal" else 1.0

        def heads(number: int, scale: float) -> Expansion:
            size = number * old.head_dim
            if self.head_factor > 1:
                return Expansion.repeat(size, self.head_factor, scale=scale)
            return Expansion.repeat(size, self.heads_factor, block=old.head_dim, scale=scale)

        def products(number: int) -> Expansion:
            if self.head_factor > 1 and old.rotary:
                return Expansion.rotary(number, old.head_dim, self.head_factor, layout=old.rotary)
            # k copies add up to k products, of which dividing by the root of k times the size
            # takes away the root of k.
            divides = old.config.get("scale_attn_weights", True)
            return heads(number, self.head_factor ** (-0.25 if divides else -0.5))

        return {
            "stream": stream,
            "final": Expansion(stream.source, stream.old_size, final),
            "pooled": plain,
            "transform": plain,
            "query": products(old.heads),
            "key": products(old.key_value_heads),
            "value": heads(old.key_value_heads, value),
            "context": heads(old.heads, value),
            "intermediate": _copies(old.intermediate, self.intermediate, 1.0),
        }

    def obstacles(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Why the growth cannot be exact; an empty list where it is."""
        old, reasons = self.old, []
        width = self.stream.new_size
        if old.norm == "RMSNorm" and width % old.width and self.mean_copies > 1:
            reasons.append(
                f"the mean square changes when some of {old.width} units have more copies than "
                f"others among {width}; fill='zero' keeps it"
            )
        if old.post_norm and self.layers > old.layers:
            reasons.append("a post-norm layer is no identity, whatever its branch: LN(x + 0) != x")
        bare = old.model_type == "kexue" and old.post_norm and old.tied
        if bare and not math.isclose(self.mean_copies * self.stream.scale**2, 1):
            reasons.append(
                "the tied output layer reads a post-norm stream, and no norm stands between them "
                "to divide by the copies; scaling='orthogonal' needs none"
            )
        if old.config.get("scale_attn_by_inverse_layer_idx") and self.layers > old.layers:
            reasons.append("attention is divided by the number of the layer, which changes")
        has_head = any(name.startswith("cls.predictions.transform") for name in state_dict)
        if has_head and self.power != 1 and old.epsilon:
            reasons.append(
                "BERT's prediction head normalises units of full size, all other norms smaller "
                "ones, and the configuration has one epsilon for both; scaling='copy' needs no "
                "other epsilon"
            )
        return reasons

    def config(self) -> dict[str, Any]:
        old, family = self.old, self.old.family
        new = dict(old.config)
        new[family.width] = self.stream.new_size
        new[family.heads] = old.heads * self.heads_factor
        new[family.layers] = self.layers
        new[family.intermediate] = self.intermediate
        new[family.epsilon] = old.epsilon * self.power
        if family.key_value_heads:
            new[family.key_value_heads] = old.key_value_heads * self.heads_factor
        if family.head_dim:
            new[family.head_dim] = old.head_dim * self.head_factor
        origin = _layer_origin(old.layers, self.layers)
        if new.get("layer_types"):
            new["layer_types"] = [new["layer_types"][i] for i in origin]
        if new.get("max_window_layers") is not None and self.layers > old.layers:
            full = sum(i < new["max_window_layers"] for i in origin)
            new["max_window_layers"] = full if full < self.layers else new["max_window_layers"]
        return new


def _copies(old_size: int, new_size: int, scale: float) -> Expansion:
    if new_size % old_size == 0:
        return Expansion.repeat(old_size, new_size // old_size, scale=scale)
    return Expansion.cycle(old_size, new_size, scale=scale)


def _at_least(name: str, value: int | None, old: int, default: int | None = None) -> int:
    if value is None:
        return old if default is None else default
    if operator.index(value) < old:
        raise ValueError(f"{name} must be at least the old one, {old}, got {value}")
    return value


def _layer_origin(old_layers: int, new_layers: int) -> list[int]:
    return [j * old_layers // new_layers for j in range(new_layers)]


def _deepen(
    state_dict: Mapping[str, Tensor], old: Architecture, layers: int, *, silence: bool
) -> dict[str, Tensor]:
    """Repeat layers; all but the first of each end their branches in zeros, if ``silence``."""
    pattern, ends = re.compile(old.family.layer_pattern), re.compile(old.family.branch_ends)
    of_layer: dict[int, dict[tuple[str, str], Tensor]] = {i: {} for i in range(old.layers)}
    deep = {}
    for name, tensor in state_dict.items():
        match = pattern.fullmatch(name)
        if match is None:
            deep[name] = tensor
            continue
        before, number, after = match.groups()
        if int(number) not in of_layer:
            raise ValueError(
                f"the configuration has {old.layers} layers, the state dict has {name}"
            )
        of_layer[int(number)][before, after] = tensor
    empty = [i for i, tensors in of_layer.items() if not tensors]
    if empty:
        raise ValueError(
            f"the configuration has {old.layers} layers, the state dict has none of number "
            f"{empty[0]}"
        )
    origin = _layer_origin(old.layers, layers)
    for j, i in enumerate(origin):
        is_new = origin.index(i) != j
        for (before, after), tensor in of_layer[i].items():
            silent = silence and is_new and ends.fullmatch(after)
            deep[f"{before}{j}{after}"] = torch.zeros_like(tensor) if silent else tensor
    return deep


def _tied_names(state_dict: Mapping[str, Tensor], old: Architecture) -> dict[str, str]:
    """Names of the output layer that stand for another parameter -> that parameter's name."""
    if not old.tied:
        return {}
    embedding = next((n for n in state_dict if re.fullmatch(old.family.embedding, n)), None)
    tied = {}
    if embedding is not None:
        tied = {n: embedding for n in state_dict if re.fullmatch(old.family.output, n)}
    bias, same = "cls.predictions.bias", "cls.predictions.decoder.bias"
    if bias in state_dict and same in state_dict:
        tied[same] = bias
    return tied


def _deep_order(
    state_dict: Mapping[str, Tensor], deep: Mapping[str, Tensor], tied: Mapping[str, str]
) -> list[str]:
    return [*deep, *(name for name in state_dict if name in tied)]


def _fill_norms(grown: dict[str, Tensor], stream: Expansion) -> None:
    """Give the norms of empty units the mean weight: a weight of 0 would keep them empty."""
    empty = stream.source < 0
    if not empty.any():
        return
    for name, tensor in grown.items():
        if "norm" in name and name.endswith("weight") and tensor.ndim == 1:
            tensor[empty.to(tensor.device)] = tensor[~empty.to(tensor.device)].mean()
