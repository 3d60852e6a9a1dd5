r"""From n trained position vectors, codes for n² positions.

    q_{in + j} = p_j + α/(1-α) (p_i - p_0),    i, j = 0, …, n - 1

Block i of n positions is the trained table moved by one vector, and block 0 is the table itself,
bit for bit: on inputs that it could read before, a model computes what it computed before. Inside a
block differences of neighbours are those that were trained.

That the vectors may be split so is an invention: it can be interpreted, but nothing says that it is
the best choice or must work. Experiment decides, and longer inputs need some further training.

Source: https://kexue.fm/archives/7947, which states the code as α u_i + (1-α) u_j with q = p on the
first n positions; solved for u, that is the formula above.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

__all__ = ["HierarchicalPositionEmbedding", "hierarchical_position_embedding"]

_BERT_STD = 0.02


def hierarchical_position_embedding(
    weight: Float[Tensor, "rows dim"],
    length: int,
    *,
    alpha: float = 0.4,
    num_reserved: int = 0,
) -> Float[Tensor, "more_rows dim"]:
    """Return a table of ``length`` positions made from a trained one.

    It is linear in ``weight``. The first rows, as many as ``weight`` has, are those of ``weight``
    bit for bit; a vector that is added to all trained positions is added to all new ones. For the
    patches of an image, whose rows are no blocks of n, interpolation in both directions usually
    serves better.

    Parameters
    ----------
    weight : Tensor, shape (num_reserved + n, dim)
        The trained table.
    length : int
        Number of positions, 1 to n².
    alpha : float
        Weight of the block against the place in it, in [0, 1) and not 0.5. With 0 the table is
        repeated, and equal places of different blocks cannot be told apart; towards 1 the blocks
        drift away: independent rows of variance σ² give codes of variance σ² (1 + 2c²) with
        c = α/(1-α), which is 1.9 σ² at 0.4 and 33 σ² at 0.8.
    num_reserved : int
        Rows before position 0 that are no positions and stay as they are: 2 in RoBERTa and BART, 1
        for a class token.

    Returns
    -------
    Tensor, shape (num_reserved + length, dim)
        On the device and in the dtype of ``weight``, differentiable.

    Raises
    ------
    ValueError
        For ``alpha`` outside its range, a length below 1 or beyond n², ``num_reserved`` outside
        [0, rows), a ``weight`` that is no matrix or not finite.
    TypeError
        For a ``weight`` that is not floating.

    Examples
    --------
    Three positions, then the same moved by (2/3) (p_1 - p_0):

    >>> trained = torch.tensor([[0.0, 1.0], [3.0, 1.0], [3.0, 4.0]])
    >>> hierarchical_position_embedding(trained, 6)
    tensor([[0., 1.],
            [3., 1.],
            [3., 4.],
            [2., 1.],
            [5., 1.],
            [5., 4.]])
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating tensor, got {kind}")
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (rows, dim), got {tuple(weight.shape)}")
    ratio = _ratio(alpha)
    n = _num_places(len(weight), num_reserved)
    _check_length(length, n)
    # Looking at values would break a compiled graph and synchronise an accelerator.
    if _may_look_at(weight) and not weight.isfinite().all():
        raise ValueError("weight must be finite, got NaN or infinity")
    codes = _codes(weight[num_reserved:], 0, length, ratio)
    return torch.cat([weight[:num_reserved], codes]) if num_reserved else codes


class HierarchicalPositionEmbedding(nn.Module):
    """A table of n positions that is looked up at n², in the place of an ``nn.Embedding``.

    The parameter is the trained table and nothing else, so checkpoints from before the extension
    load, and gradients of all blocks reach the same rows. They are dense. A row at ``padding_idx``
    receives none.

    Parameters
    ----------
    num_embeddings : int
        Rows of the table, ``num_reserved + n``.
    embedding_dim : int
        Width.
    alpha, num_reserved : float, int
        As in :func:`hierarchical_position_embedding`.
    padding_idx : int, optional
        A row that starts at zero and is not trained; counted from the end where negative.
    device : torch.device, optional
        Of the table.
    dtype : torch.dtype, optional
        Of the table.

    Raises
    ------
    ValueError
        For sizes below 1, or numbers outside their range.
    IndexError
        In forward, for a position below 0 or not below ``num_reserved + n²``. On a GPU and in a
        compiled graph it is the lookup itself that complains.
    TypeError
        In forward, for positions that are not integers.

    Examples
    --------
    >>> table = HierarchicalPositionEmbedding(16, 8)
    >>> table.num_positions
    256
    >>> table(torch.tensor([[0, 15, 255]])).shape
    torch.Size([1, 3, 8])
    >>> table.materialize(48)
    Embedding(48, 8)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        alpha: float = 0.4,
        num_reserved: int = 0,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx must be one of the {num_embeddings} rows, got {padding_idx}"
            )
        self._ratio = _ratio(alpha)
        self._num_places = _num_places(num_embeddings, num_reserved)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.alpha = alpha
        self.num_reserved = num_reserved
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        weight = torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight.normal_(std=_BERT_STD))
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, *, alpha: float = 0.4, num_reserved: int = 0
    ) -> HierarchicalPositionEmbedding:
        """Return a table that shares the parameter of a trained ``nn.Embedding``.

        Its ``padding_idx`` and ``requires_grad`` stay. ValueError for a sub-class, which may look
        its rows up in another way, and for an embedding with ``max_norm``, which changes them.
        """
        _check_plain(embedding)
        rows, dim = embedding.weight.shape
        table = cls(
            rows,
            dim,
            alpha=alpha,
            num_reserved=num_reserved,
            padding_idx=embedding.padding_idx,
            device="meta",
        )
        # On the meta device nothing is drawn or stored: the trained parameter takes the place.
        table.weight = cast(nn.Parameter, embedding.weight)
        return table.train(embedding.training)

    @property
    def num_positions(self) -> int:
        """Positions that have a code, n² of them; ids of positions start at ``num_reserved``."""
        return self._num_places**2

    def forward(self, position_ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Return the codes (..., dim) of integer ids (...)."""
        if (
            not isinstance(position_ids, Tensor)
            or position_ids.is_floating_point()
            or position_ids.is_complex()
            or position_ids.dtype == torch.bool
        ):
            given = getattr(position_ids, "dtype", type(position_ids).__name__)
            raise TypeError(f"position_ids must be an integer tensor, got {given}")
        # Narrow integers would overflow in the arithmetic of blocks.
        ids = position_ids.long()
        num_blocks = self._num_places
        if _may_look_at(ids) and ids.numel():
            lowest, highest = (int(bound) for bound in ids.aminmax())
            self._check_bounds(lowest, highest)
            if self._is_long_range(ids, lowest, highest):
                places = self.weight[self.num_reserved :]
                start, length = lowest - self.num_reserved, ids.shape[-1]
                codes = _codes(places, start, length, self._ratio)
                return codes.repeat(*ids.shape[:-1], 1, 1) if ids.ndim > 1 else codes
            num_blocks = max(highest - self.num_reserved, 0) // self._num_places + 1
        return self._gather(ids, num_blocks)

    def materialize(self, length: int) -> nn.Embedding:
        """Return an ordinary table of ``num_reserved + length`` rows, which train independently.

        ValueError for a length below 1 or beyond n². Extended again, its base is the longer table:
        that gives another code than one extension to the greater length.
        """
        r, n = self.num_reserved, self._num_places
        _check_length(length, n)
        with torch.no_grad():
            rows = self.weight.new_empty(r + length, self.embedding_dim)
            rows[:r] = self.weight[:r]
            # Block by block, so that the new table is all the memory that is needed.
            for start in range(0, length, n):
                size = min(n, length - start)
                codes = _codes(self.weight[r:], start, size, self._ratio)
                rows[r + start : r + start + size] = codes
        table = nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=self.padding_idx)
        return table.train(self.training)

    def extra_repr(self) -> str:
        """Return what the printed module says of its numbers."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}, alpha={self.alpha:g}"]
        if self.num_reserved:
            parts.append(f"num_reserved={self.num_reserved}")
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        return ", ".join(parts)

    def _gather(self, ids: Tensor, num_blocks: int) -> Tensor:
        """Look up p_j, and the shift of its block; reserved rows count as block 0."""
        r, n = self.num_reserved, self._num_places
        position = (ids - r).clamp(min=0)
        row = torch.where(ids < r, ids, r + position % n)
        first_places = torch.arange(r, r + num_blocks, device=self.weight.device)
        heads = nn.functional.embedding(first_places, self.weight, self.padding_idx)
        shifts = _shifts(heads[0], heads, self._ratio)
        codes = nn.functional.embedding(row, self.weight, self.padding_idx)
        # In place: the lookup is new memory, and another piece of its size is what costs time.
        return codes.sub_(nn.functional.embedding(position // n, shifts))

    def _is_long_range(self, ids: Tensor, lowest: int, highest: int) -> bool:
        """Whether every sequence asks for lowest, lowest + 1, …, and at least for one block."""
        length = ids.shape[-1] if ids.ndim else 1
        if length < self._num_places or highest - lowest != length - 1:
            return False
        # Whole blocks are computed from all places, and a padding row among them has no gradient.
        trains = self.padding_idx is None or self.padding_idx < self.num_reserved
        first = torch.arange(lowest, highest + 1)
        return trains and lowest >= self.num_reserved and bool((ids == first).all())

    def _check_bounds(self, lowest: int, highest: int) -> None:
        limit = self.num_reserved + self.num_positions
        if lowest < 0 or highest >= limit:
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"position_ids must lie in [0, {limit}), got {wrong}")


def _codes(
    places: Float[Tensor, "n dim"], start: int, length: int, ratio: float
) -> Float[Tensor, "length dim"]:
    """Return the codes of the positions start, start + 1, …, from whole blocks."""
    n = len(places)
    first, last = start // n, (start + length - 1) // n
    shifts = _shifts(places[0], places[first : last + 1], ratio)
    codes = (places - shifts.unsqueeze(1)).flatten(0, 1)
    skipped = start - first * n
    # A slice of everything is not free: its gradient is copied.
    return codes if len(codes) == length else codes[skipped : skipped + length]


def _shifts(
    origin: Float[Tensor, " dim"], heads: Float[Tensor, "blocks dim"], ratio: float
) -> Float[Tensor, "blocks dim"]:
    """Return c (p_0 - p_i), to be subtracted.

    In this sense, because x - 0 is x in all bits, also where x is -0; and x + 0 is not.
    """
    dtype = heads.dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    return (ratio * (origin.to(wide) - heads.to(wide))).to(dtype)


def _ratio(alpha: float) -> float:
    """Return c = α/(1-α)."""
    if not 0 <= alpha < 1 or alpha == 0.5:
        raise ValueError(
            "alpha must lie in [0, 1) and not be 0.5, where place j of block i and place i of "
            f"block j have the same code, got {alpha}"
        )
    return alpha / (1 - alpha)


def _num_places(rows: int, num_reserved: int) -> int:
    if not 0 <= num_reserved < rows:
        raise ValueError(
            f"num_reserved must lie in [0, rows), got {num_reserved} of a table of {rows} rows"
        )
    return rows - num_reserved


def _check_length(length: int, n: int) -> None:
    if not 1 <= length <= n * n:
        raise ValueError(
            f"length must lie in 1 … n² = {n * n} for a table of n = {n} positions, got {length}"
        )


def _may_look_at(tensor: Tensor) -> bool:
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tensor.device.type == "cpu" and not tracing


def _check_plain(embedding: nn.Module) -> None:
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
    if type(embedding) is not nn.Embedding:
        raise ValueError(
            f"the table is a {type(embedding).__name__}, which may look its rows up in its own "
            "way: apply hierarchical_position_embedding to its weight, with num_reserved rows for "
            "its offset"
        )
    if embedding.max_norm is not None:
        raise ValueError(
            "the table must not have max_norm, which rescales rows when they are looked up, "
            f"got max_norm={embedding.max_norm}"
        )
