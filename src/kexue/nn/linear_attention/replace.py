"""Put another attention into a model that is trained already."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kexue.nn.attention import MultiHeadAttention

__all__ = ["replace_attention"]


def replace_attention(
    model: nn.Module, make_core: Callable[[MultiHeadAttention], nn.Module]
) -> int:
    """Replace the core of every ``MultiHeadAttention`` in a model, in place.

    Projections keep their weights. A new core moves to the device of its layer and takes over
    whether that is training. Nothing is changed if any layer refuses.

    Parameters
    ----------
    model : nn.Module
        What contains the layers, or a layer itself.
    make_core : callable
        Takes a layer and returns its new core.

    Returns
    -------
    int
        Number of layers.

    Raises
    ------
    ValueError
        Where the model has no such layer, or a core is for another number of heads.
    TypeError
        Where ``make_core`` returns something else than a module.

    Examples
    --------
    >>> from torch import nn
    >>> from kexue.nn.linear_attention import PerformerAttention
    >>> model = nn.ModuleList([MultiHeadAttention(32, 4), MultiHeadAttention(32, 2)])
    >>> replace_attention(model, lambda layer: PerformerAttention(layer.key_dim, 256))
    2
    """
    layers = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    if not layers:
        raise ValueError(
            f"the model has no kexue.nn.attention.MultiHeadAttention: got {type(model).__name__}"
        )
    cores = [make_core(layer) for layer in layers]
    for layer, core in zip(layers, cores, strict=True):
        if not isinstance(core, nn.Module):
            raise TypeError(f"make_core must return an nn.Module, got {type(core).__name__}")
        heads = getattr(core, "num_heads", layer.num_heads)
        wanted = (
            heads,
            getattr(core, "num_key_heads", heads),
            getattr(core, "num_value_heads", heads),
        )
        given = (layer.num_heads, layer.num_key_heads, layer.num_value_heads)
        if wanted != given:
            raise ValueError(
                "the core must be for (num_heads, num_key_heads, num_value_heads) = "
                f"{given} of the layer, got {wanted}"
            )
    for layer, core in zip(layers, cores, strict=True):
        layer.core = core.to(layer.query_projection.weight.device).train(layer.training)
    return len(layers)
