"""The step in two passes, and the checkpoint of each chunk that gives the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from kexue.training.gradient_cache.batches import (
    apply,
    check_chunk_size,
    flat_output,
    open_mappings,
    split_batch,
    with_leaves,
)
from kexue.training.gradient_cache.passes import (
    RandomState,
    accelerators,
    named_modules,
    no_sync,
    refuse_batch_norm,
    without_autocast,
)

__all__ = ["GradientCache", "GradientCacheOutput", "chunked_encode"]

_Encoder = Callable[..., Any]


@dataclass(frozen=True)
class GradientCacheOutput:
    """What a step leaves besides gradients.

    Attributes
    ----------
    loss : Tensor
        Of the whole batch, unscaled and detached.
    representations : tuple
        Of the whole batch, one for each encoder, detached.

    Examples
    --------
    >>> from kexue.losses import info_nce
    >>> tower = torch.nn.Linear(5, 3)
    >>> cache = GradientCache([tower, tower], info_nce, chunk_size=4)
    >>> output = cache.step(torch.randn(6, 5), torch.randn(6, 5))
    >>> output.loss.requires_grad, [tuple(h.shape) for h in output.representations]
    (False, [(6, 3), (6, 3)])
    """

    loss: Tensor
    representations: tuple[Any, ...]


class GradientCache:
    """A training step on a large batch that keeps the activations of one chunk at a time.

    A step adds to ``.grad`` what ``loss_fn(encoder(input), ...).backward()`` on the whole batch
    would, to rounding. It takes no optimiser step and resets nothing. Gradients reach the
    parameters of the encoders, inputs that require them, and all that ``loss_fn`` uses.

    An encoder is called twice for each chunk but the last: its hooks run twice, and running
    statistics or the power iteration of a spectral norm advance twice. The random state of each
    chunk's first pass is replayed in the second, so dropout is exact: the gradient belongs to the
    loss that was computed. After a step the global generators stand where the first passes and the
    loss left them. Encoders with nothing to differentiate are called once for each chunk.

    Run a step inside your own ``torch.autocast`` region. With DistributedDataParallel, wrapped
    around an encoder or inside it, gradients are reduced once in each step, in the last backward
    pass; the other processes' representations enter through the loss (``info_nce(gather=True)``).
    Parameters of the loss are then averaged by wrapping the loss too. An encoder compiled with
    ``torch.compile`` is compiled once more for a last chunk of another size.

    Parameters
    ----------
    encoders : callable or sequence of callables
        One for each input of a step; the same object may stand there twice (a shared tower). Each
        returns a tensor or a dict or tuple of tensors whose first dimension is the batch.
    loss_fn : callable
        Takes the representations of the whole batch, in the order of the encoders, and the keyword
        arguments of the step; returns a scalar.
    chunk_size : int or sequence of int
        Samples in a chunk, for all encoders or for each.
    preserve_rng_state : bool
        Replay the random state. Without dropout, False saves copying it.
    allow_batch_norm : bool
        Accept batch normalisation in training mode, although each chunk is then normalised by its
        own statistics and the gradient is not that of the whole batch.
    scaler : torch.amp.GradScaler, optional
        Scales the loss before it is differentiated; unscale and step as usual.

    Raises
    ------
    ValueError
        For a chunk size that is no positive integer or a wrong number of them; in a step for
        another number of inputs than encoders, an input without or with different batch sizes, a
        loss that is no scalar tensor, and batch normalisation in training mode.

    Examples
    --------
    >>> from kexue.losses import info_nce
    >>> _ = torch.manual_seed(0)
    >>> tower = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> queries, keys = torch.randn(6, 5), torch.randn(6, 5)
    >>> cache = GradientCache([tower, tower], info_nce, chunk_size=2)
    >>> loss = cache.step(queries, keys, temperature=0.1).loss
    >>> in_parts = [p.grad for p in tower.parameters()]
    >>> tower.zero_grad()
    >>> info_nce(tower(queries), tower(keys), temperature=0.1).backward()
    >>> all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(in_parts, tower.parameters()))
    True
    """

    def __init__(
        self,
        encoders: _Encoder | Sequence[_Encoder],
        loss_fn: Callable[..., Tensor],
        *,
        chunk_size: int | Sequence[int],
        preserve_rng_state: bool = True,
        allow_batch_norm: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        # A ModuleList has the __call__ of every module, but no forward.
        several = isinstance(encoders, Sequence | nn.ModuleList)
        self.encoders: tuple[_Encoder, ...] = tuple(encoders) if several else (encoders,)  # type: ignore[arg-type, assignment]
        if not self.encoders or not all(callable(encoder) for encoder in self.encoders):
            raise ValueError(f"encoders must be one or more callables, got {encoders!r}")
        sizes = (
            tuple(chunk_size)
            if isinstance(chunk_size, Sequence)
            else (chunk_size,) * len(self.encoders)
        )
        if len(sizes) != len(self.encoders):
            raise ValueError(
                f"expected one chunk_size or one for each of {len(self.encoders)} encoders, "
                f"got {len(sizes)}"
            )
        for size in sizes:
            check_chunk_size(size)
        self.chunk_sizes = sizes
        self.loss_fn = loss_fn
        self.preserve_rng_state = preserve_rng_state
        self.allow_batch_norm = allow_batch_norm
        self.scaler = scaler

    def __call__(self, *inputs: Any, **loss_kwargs: Any) -> GradientCacheOutput:
        """Do what `step` does."""
        return self.step(*inputs, **loss_kwargs)

    @torch.enable_grad()
    def step(self, *inputs: Any, **loss_kwargs: Any) -> GradientCacheOutput:
        """Add the gradient of the whole batch's loss to ``.grad``.

        Parameters
        ----------
        *inputs
            One for each encoder: a tensor, a dict of keyword arguments, or a tuple or list of
            positional ones, nested or not. Tensors with a dimension are split along the first;
            everything else goes to every chunk as it is.
        **loss_kwargs
            Handed to ``loss_fn``.

        Returns
        -------
        GradientCacheOutput
            The loss and the representations, detached.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"expected one input for each of {len(self.encoders)} encoders, got {len(inputs)}"
            )
        if not self.allow_batch_norm:
            for encoder in self.encoders:
                refuse_batch_norm(encoder, ", or accept it with allow_batch_norm=True")
        inputs, awaiting = with_leaves(tuple(open_mappings(given) for given in inputs))
        towers = [
            _Tower(encoder, given, size, self.preserve_rng_state)
            for encoder, given, size in zip(self.encoders, inputs, self.chunk_sizes, strict=True)
        ]
        for tower in towers:
            # One graph may stay: that of the very last chunk need not be built again.
            tower.encode(keep_last=tower is towers[-1])

        loss = self.loss_fn(*(tower.representations for tower in towers), **loss_kwargs)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
        with without_autocast():
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        # Frees what is left of the loss's graph before the second pass needs the memory.
        loss = loss.detach()

        _send_back(towers)
        _backward([tensor for tensor, _ in awaiting], [leaf.grad for _, leaf in awaiting])
        detached = tuple(tree_map(torch.detach, tower.representations) for tower in towers)
        return GradientCacheOutput(loss, detached)


def chunked_encode(
    encoder: Callable[..., Tensor],
    inputs: Any,
    *,
    chunk_size: int,
    preserve_rng_state: bool = True,
) -> Tensor:
    """Return ``encoder(inputs)``, differentiable, with the activations of one chunk in memory.

    Each chunk is a checkpoint: it is encoded again when its gradient arrives. The result is that of
    :class:`GradientCache`, for losses written by hand. DistributedDataParallel encoders would
    reduce once for each chunk: use their ``no_sync``, or :class:`GradientCache`.

    Parameters
    ----------
    encoder : callable
        Returns a tensor whose first dimension is the batch.
    inputs : tensor, dict, tuple or list
        As for :meth:`GradientCache.step`.
    chunk_size : int
        Samples in a chunk.
    preserve_rng_state : bool
        Replay the random state, so that dropout is exact.

    Returns
    -------
    Tensor of shape (batch, ...)

    Raises
    ------
    ValueError
        As :func:`split_batch`, and for batch normalisation in training mode.
    TypeError
        Where the encoder returns no tensor.

    Examples
    --------
    >>> from kexue.losses import nt_xent
    >>> tower = torch.nn.Linear(5, 3)
    >>> views = torch.randn(6, 5), torch.randn(6, 5)
    >>> first, second = (chunked_encode(tower, view, chunk_size=4) for view in views)
    >>> nt_xent(first, second).backward()
    >>> tower.weight.grad.shape
    torch.Size([3, 5])
    """
    refuse_batch_norm(encoder, "")
    chunks = [
        checkpoint(
            functools.partial(apply, encoder),
            chunk,
            use_reentrant=False,
            preserve_rng_state=preserve_rng_state,
        )
        for chunk in split_batch(inputs, chunk_size)
    ]
    if not isinstance(chunks[0], Tensor):
        raise TypeError(f"encoder must return a tensor, got {type(chunks[0]).__name__}")
    return torch.cat(chunks)


class _Tower:
    """One encoder and its input, on the way forth and back."""

    def __init__(self, encoder: _Encoder, inputs: Any, chunk_size: int, replay: bool) -> None:
        self.encoder = encoder
        self.chunks = split_batch(inputs, chunk_size)
        modules = list(named_modules(encoder).values())
        self.reducers = [m for m in modules if isinstance(m, DistributedDataParallel)]
        parameters = modules[0].parameters() if modules else ()
        self.devices = accelerators([*tree_leaves(inputs), *parameters]) if replay else None
        self.random_states: list[RandomState] = []
        self.kept: list[Tensor] | None = None

    def encode(self, *, keep_last: bool) -> None:
        """First pass: the representations of all chunks, as leaves of the loss's graph."""
        last = len(self.chunks) - 1
        # Whether a pass reduces is decided when it goes forward, and only the last one may.
        keep_last = keep_last and not self.reducers
        parts: list[list[Tensor]] = []
        differentiable: list[bool] = []
        for number, chunk in enumerate(self.chunks):
            if self.devices is not None:
                self.random_states.append(RandomState(self.devices))
            keep = keep_last and number == last
            with torch.set_grad_enabled(number == 0 or keep), no_sync(self.reducers):
                outputs, structure = flat_output(apply(self.encoder, chunk))
            # The graph of the first chunk shows what there is to differentiate.
            differentiable = differentiable or [output.requires_grad for output in outputs]
            if keep and any(differentiable):
                self.kept = outputs
            parts.append([output.detach() for output in outputs])
            del outputs  # with its graph, before the next one is built
        columns = list(zip(*parts, strict=True))
        self.sizes = [[len(part) for part in column] for column in columns]
        self.leaves = [
            torch.cat(column).requires_grad_(wanted)
            for column, wanted in zip(columns, differentiable, strict=True)
        ]
        self.representations = tree_unflatten(self.leaves, structure)

    def split_gradients(self) -> list[list[Tensor | None]]:
        """Return the gradients of each chunk's outputs; nothing where the loss used none."""
        if all(leaf.grad is None for leaf in self.leaves):
            self.kept = None
            return []
        columns = [
            [None] * len(sizes) if leaf.grad is None else leaf.grad.split(sizes)
            for leaf, sizes in zip(self.leaves, self.sizes, strict=True)
        ]
        return [list(chunk) for chunk in zip(*columns, strict=True)]

    def outputs_with_graph(self, number: int) -> list[Tensor]:
        """Second pass: what the first gave for a chunk, now with its graph."""
        if self.kept is not None and number == len(self.chunks) - 1:
            outputs, self.kept = self.kept, None
            return outputs
        if self.devices is not None:
            self.random_states[number].restore()
        return flat_output(apply(self.encoder, self.chunks[number]))[0]


def _send_back(towers: Sequence[_Tower]) -> None:
    """Encode each chunk once more and send its part of the gradient through."""
    work = [
        (tower, number, gradients)
        for tower in towers
        for number, gradients in enumerate(tower.split_gradients())
    ]
    # The chunk whose graph was kept comes first, to free it.
    work = work[-1:] + work[:-1]
    final = {reducer: item for item in work for reducer in item[0].reducers}
    before = [RandomState(tower.devices) for tower in towers if tower.devices is not None]
    try:
        for item in work:
            tower, number, gradients = item
            # Whether a pass will reduce is decided when it goes forward.
            with no_sync(reducer for reducer in tower.reducers if final[reducer] is not item):
                outputs = tower.outputs_with_graph(number)
                _backward(outputs, gradients)
                del outputs
    finally:
        for state in before:
            state.restore()


def _backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    reached = [
        (tensor, gradient.to(tensor.dtype))
        for tensor, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None
    ]
    if reached:
        with without_autocast():
            torch.autograd.backward([t for t, _ in reached], [g for _, g in reached])
