"""Random features of the exponential kernel, and the projections that they are made of."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from scipy.special import gammaincinv
from torch import Tensor, nn

__all__ = ["RandomFeatures", "random_projection"]

Norm = Literal["chi", "stratified", "quantile", "sqrt_dim"]
Kind = Literal["positive", "hyperbolic", "trigonometric"]


def random_projection(
    num_features: int,
    dim: int,
    *,
    orthogonal: bool = True,
    norm: Norm = "chi",
    generator: torch.Generator | None = None,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "num_features dim"]:
    r"""Draw rows with uniform directions, to stand for draws from :math:`N(0, I)`.

    Orthogonal rows come in independent blocks of ``dim``; each row alone is still uniform on the
    sphere. The norms decide the bias: an expectation :math:`E\,e^{w \cdot z}` is
    :math:`e^{|z|^2/2}` exactly for the first two kinds below, and too small for the others.

    Parameters
    ----------
    num_features : int
        Number of rows.
    dim : int
        Length of a row.
    orthogonal : bool
        Whether the directions of a block are orthogonal; otherwise all are independent.
    norm : {"chi", "stratified", "quantile", "sqrt_dim"}
        Norms of the rows: independent draws of the norm of a normal vector; one draw from each of
        ``num_features`` equally probable ranges; the quantiles i/(num_features + 1), spread evenly;
        the constant √dim. The middle two are assigned to the rows by a random permutation.
    generator : torch.Generator, optional
        Source of the draws, torch's global one by default. The draws are made in float64 on its
        device.
    device, dtype : optional
        Of the result.

    Returns
    -------
    Tensor (num_features, dim)

    Raises
    ------
    ValueError
        For ``num_features`` or ``dim`` below 1, or an unknown ``norm``.

    Examples
    --------
    >>> rows = random_projection(4, 4, norm="sqrt_dim", dtype=torch.float64)
    >>> torch.allclose(rows @ rows.T, 4 * torch.eye(4, dtype=torch.float64))
    True
    """
    for name, size in (("num_features", num_features), ("dim", dim)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    _one_of("norm", norm, get_args(Norm))
    if orthogonal:
        blocks = _normal(-(-num_features // dim), dim, dim, generator=generator)
        directions = _haar(blocks).flatten(0, 1)[:num_features]
    else:
        directions = nn.functional.normalize(_normal(num_features, dim, generator=generator), dim=1)
    rows = _norms(norm, num_features, dim, generator)[:, None] * directions
    return rows.to(device=device, dtype=dtype)


class RandomFeatures(nn.Module):
    r"""Features whose inner products have the expectation :math:`e^{s\,q \cdot k}`.

    With rows :math:`w_1, \dots, w_m` of a random projection and :math:`u = \sqrt s\,x`,

    .. math::
        \phi_f(x) = \tfrac{1}{\sqrt m} e^{w_f \cdot u - |u|^2/2}

    are the positive features. The hyperbolic ones take every row with both signs, 2m of them, over
    :math:`\sqrt{2m}`; the trigonometric ones are
    :math:`\tfrac{1}{\sqrt m} e^{|u|^2/2} (\cos w_f \cdot u, \sin w_f \cdot u)`, 2m that change
    sign. Use the same object for both arguments of the kernel.

    Parameters
    ----------
    dim : int
        Length of the vectors.
    num_features : int, optional
        Rows m of the projection, ``ceil(dim * ln(dim))`` by default.
    kind : {"positive", "hyperbolic", "trigonometric"}
        Which features.
    orthogonal, norm, generator
        As in :func:`random_projection`.
    device, dtype : optional
        Of the projection. Arithmetic is in the dtype of the vectors, in float32 at least.

    Attributes
    ----------
    projection : Tensor (num_features, dim)
        The rows; a buffer, kept in the ``state_dict``.

    Raises
    ------
    ValueError
        For sizes below 1, an unknown kind or norm, and in a call for vectors of another length, a
        scale that is not positive, or logarithms of trigonometric features.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> features = RandomFeatures(8, 4096, generator=generator)
    >>> q, k = torch.full((8,), 0.25), torch.linspace(-0.5, 0.5, 8)
    >>> estimate, exact = features(q) @ features(k), torch.exp(q @ k)
    >>> bool((estimate / exact - 1).abs() < 0.1)
    True
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        num_features: int | None = None,
        *,
        kind: Kind = "positive",
        orthogonal: bool = True,
        norm: Norm = "chi",
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _one_of("kind", kind, get_args(Kind))
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        if num_features is None:
            num_features = max(math.ceil(dim * math.log(dim)), 1)
        self.num_features = num_features
        self.kind = kind
        self.orthogonal = orthogonal
        self.norm = norm
        projection = random_projection(
            num_features, dim, orthogonal=orthogonal, norm=norm, generator=generator,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.register_buffer("projection", projection)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, {self.num_features}, kind={self.kind!r}, orthogonal={self.orthogonal}, "
            f"norm={self.norm!r}"
        )

    def forward(
        self, x: Float[Tensor, "*batch dim"], *, scale: float = 1.0
    ) -> Float[Tensor, "*batch features"]:
        """Return the features of vectors; those of ``scale`` s estimate exp(s q·k).

        Parameters
        ----------
        x : Tensor (..., dim)
            Vectors.
        scale : float
            Positive factor of the inner product.

        Returns
        -------
        Tensor (..., num_features), or twice as many for the kinds with pairs
        """
        if self.kind != "trigonometric":
            x = self._checked(x, scale)
            return self._logarithms(x, scale, norm_term=True).exp().to(x.dtype)
        x = self._checked(x, scale)
        with torch.autocast(x.device.type, enabled=False):
            u = _working(x) * math.sqrt(scale)
            angles = self._projected(u)
            amplitude = torch.exp(u.square().sum(-1, keepdim=True) / 2)
            features = torch.cat([angles.cos(), angles.sin()], -1) * amplitude
            return (features / math.sqrt(self.num_features)).to(x.dtype)

    def log_features(
        self, x: Float[Tensor, "*batch dim"], *, scale: float = 1.0
    ) -> Float[Tensor, "*batch features"]:
        """Return the logarithms of positive or hyperbolic features, which cannot overflow.

        Parameters
        ----------
        x : Tensor (..., dim)
            Vectors.
        scale : float
            Positive factor of the inner product.

        Returns
        -------
        Tensor (..., num_features), or twice as many for the hyperbolic kind
        """
        if self.kind == "trigonometric":
            raise ValueError(
                "log_features needs positive or hyperbolic features: trigonometric ones change sign"
            )
        x = self._checked(x, scale)
        return self._logarithms(x, scale, norm_term=True).to(x.dtype)

    def redraw_(self, generator: torch.Generator | None = None) -> RandomFeatures:
        """Replace the projection by a new draw, from torch's global generator by default."""
        # A new tensor: graphs that are still to be differentiated hold the old one.
        self.projection = random_projection(
            self.num_features, self.dim, orthogonal=self.orthogonal, norm=self.norm,
            generator=generator, device=self.projection.device, dtype=self.projection.dtype,
        )  # fmt: skip
        return self

    def _logarithms(self, x: Tensor, scale: float, *, norm_term: bool) -> Tensor:
        """Return logarithms in the working dtype.

        Without ``norm_term`` they lack -|u|²/2 and the constant, which attention divides out of
        its queries.
        """
        with torch.autocast(x.device.type, enabled=False):
            u = _working(x) * math.sqrt(scale)
            logarithms = self._projected(u)
            if self.kind == "hyperbolic":
                logarithms = torch.cat([logarithms, -logarithms], -1)
            if not norm_term:
                return logarithms
            constant = math.log(logarithms.shape[-1])
            return logarithms - (u.square().sum(-1, keepdim=True) + constant) / 2

    def _projected(self, u: Tensor) -> Tensor:
        return u @ self.projection.to(u.dtype).mT

    def _checked(self, x: Tensor, scale: float) -> Tensor:
        _real_floats("x", x)
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"the last dimension of x must be dim = {self.dim}, got shape {tuple(x.shape)}"
            )
        _positive_scale(scale)
        return x


def _haar(normal: Float[Tensor, "blocks dim dim"]) -> Float[Tensor, "blocks dim dim"]:
    """Orthogonal matrices without a preferred direction, from matrices of normal entries."""
    q, r = torch.linalg.qr(normal)
    # Householder's QR fixes signs of its own: the first column of q always points the same way.
    # With the diagonal of r positive the decomposition is unique, and q is Haar distributed.
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :]


def _norms(
    norm: Norm, count: int, dim: int, generator: torch.Generator | None
) -> Float[Tensor, " count"]:
    if norm == "chi":
        return _normal(count, dim, generator=generator).norm(dim=1)
    if norm == "sqrt_dim":
        return torch.full((count,), math.sqrt(dim), dtype=torch.float64, device=_home(generator))
    rank = torch.arange(1, count + 1, dtype=torch.float64)
    if norm == "quantile":
        share = rank / (count + 1)
    else:
        within = torch.rand(
            count, generator=generator, dtype=torch.float64, device=_home(generator)
        )
        # Rounding may reach 1, whose quantile is infinite.
        share = ((rank - 1 + within.cpu()) / count).clamp(max=1 - 2.0**-53)
    # |w|²/2 of a normal vector has the Gamma(dim/2) law.
    norms = torch.from_numpy(2 * gammaincinv(dim / 2, share.numpy())).sqrt().to(_home(generator))
    order = torch.randperm(count, generator=generator, device=_home(generator))
    return norms[order]


def _normal(*shape: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device=_home(generator))


def _home(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _working(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _positive_scale(scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")


def _real_floats(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of real floating point numbers, got {kind}")
