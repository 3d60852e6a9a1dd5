r"""Rotary positions in one, two and N dimensions.

Attention does not see where a token stands. Rotary embedding tells it by turning queries and keys,
each by an angle that grows with its position: their inner product then depends on the *difference*
of two positions. Text has one coordinate. An image has two, a video three. What is the rotation for
these, and what is lost by numbering the pixels from one to the last?

## What is asked of a rotation

A query $q$ at position $a \in \mathbb R^N$ becomes $R_a q$, a key at $b$ becomes $R_b k$. Two
things are asked of the matrices. *Relativity*: $R_a^\top R_b = R_{b-a}$, so that
$\langle R_a q, R_b k\rangle = \langle q, R_{b-a} k\rangle$. *Invertibility*: $p$ can be told from
$R_p$. In one dimension $R_n = O^n$ does it with any orthogonal $O$ of which no power is the
identity; in the plane, that is the rotation by $n\theta$.

For two coordinates the first idea is the rotation by $(x + y)\theta$. It is relative. It is also
blind to half of what it was told: $(1, 4)$ and $(2, 3)$ are one position. The second idea is to go
from complex numbers to quaternions, $R_{x,y} = e^{xi + yj}$. That is no better: $e^{p+q} = e^p e^q$
needs exponents that commute, and $ij = -ji$.

## Matrices that commute

So take a matrix for each coordinate, and

$$R_p = \exp\Big(\sum_a p_a B_a\Big), \qquad B_a^\top = -B_a, \qquad B_a B_b = B_b B_a.$$

Skew symmetry makes $R_p^\top = R_{-p}$, commutation makes products into sums of exponents, and both
together are relativity. Both are also necessary where $R$ is smooth: differentiate
$R_{a+b} = R_a R_b$ at 0.

How large must the matrices be? Skew-symmetric matrices of size 2 have one parameter, so two axes
cannot be told apart. At size 3, a rotation in the plane of the first two coordinates commutes only
with its own multiples. At size 4 there is room, and the simplest solution is two planes side by
side: one turns by $x\theta$, the other by $y\theta$,

$$R_{x,y} = \begin{pmatrix}
\cos x\theta & -\sin x\theta & & \\
\sin x\theta & \cos x\theta & & \\
& & \cos y\theta & -\sin y\theta \\
& & \sin y\theta & \cos y\theta
\end{pmatrix}.$$

Half of the features are turned by $x$, half by $y$, and $N$ coordinates get an $N$-th each.

## There is nothing else

Commuting skew-symmetric matrices have their planes in common. There is one orthogonal $Q$ for all
of them with

$$B_a = Q \Big(\bigoplus_k F_{ka} J\Big) Q^\top, \qquad
J = \begin{pmatrix} 0 & -1 \\ 1 & 0 \end{pmatrix},$$

and a row and column of zeros where the size is odd. The same $Q^\top$ acts on queries and on keys;
it can be absorbed into the projections that make them. So *every* encoding of this family is a
table of frequencies $F$: plane $k$ turns by the angle $F_k \cdot p$. One entry in each row is the
axial encoding above. A full table, perhaps a learnt one, is called mixed. Equal columns are
$x + y$. The other solutions of size 4, with $B_1$ having the entries $1, b, c$, are axial in a
turned basis with frequencies $\sqrt{1 + b^2 + c^2}$ and $f$ times that.

The table also tells what is lost. Positions near each other differ in $R$ exactly if
$F$ has rank $N$; the cells of a grid differ if $F(p - p')$ is never a multiple of $2\pi$ in all
planes.

## What is measured

*Algebra.* For quaternions, for $x + y$ and for the axial table: the largest entry of
$R_a^\top R_b - R_{b-a}$, and the number of different matrices on a grid of $16 \times 16$ cells.

*A grid that changes.* The photographs of scikit-learn, grey, averaged over $3 \times 3$ pixels,
standardised. A small encoder sees crops with one pixel in eight hidden, one token a pixel, and must
say what the hidden ones are. It is trained on crops of $8 \times 8$ from the left 70 % of each
photograph and tested on crops from the right 30 %, also of $8 \times 12$, $12 \times 8$ and
$6 \times 16$ pixels (rows × columns). Its positions are axial, or the running number
$8x + y$ of the pixel under the one-dimensional rotation, or none. All else is equal: sizes, seeds,
crops, steps.

A running number is no nonsense. At the width of the training crops it knows every position, and
with more rows of the same width a step down is still $+8$. But it has made $+8$ mean *down*. With
another width, $+8$ is somewhere else. So the claim is that the axial model is at least 5 % better
at home and at least twice as good on both wider grids; and, as a control, that the flattened model
stays within 1.5 times its own error where only the number of rows changes. This is about grids that
change and tasks that are geometry; a task on one grid for ever need not gain anything. The full
budget adds the mixed table, $x + y$, and learnt absolute positions that are resized to the grid.

*Precision.* Angles are products of a position and a frequency. In single precision an angle of
$10^6$ is known to within a few hundredths. Here the error of the cosine is compared with
40 decimal digits, for angles in single precision and for angles in double precision whose cosine is
rounded to single.

The reader should see a pair of bars that are much the same in two groups, and one that leaps in the
other two.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import DataError, Lab, seeded
from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.rotary import (
    RotaryEmbedding,
    grid_positions,
    rotary_frequencies,
    rotary_generators,
    rotary_matrix,
)

AXIAL, FLATTENED, NONE = "axial", "flattened", "none"
MIXED, SUM, ABSOLUTE = "mixed, learnt", "x + y", "learnt table, resized"
GRIDS = ((8, 8), (8, 12), (12, 8), (6, 16))
TRAINING_GRID = GRIDS[0]
DIM, HEADS, LAYERS, BASE = 32, 2, 2, 100.0
HEAD_DIM = DIM // HEADS
BATCH, LEARNING_RATE = 32, 4e-3

QUATERNION = "quaternion"
# Left multiplication by the quaternions i and j, on (1, i, j, k).
_I = ((0, -1, 0, 0), (1, 0, 0, 0), (0, 0, 0, -1), (0, 0, 1, 0))
_J = ((0, 0, -1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, -1, 0, 0))


def run(lab: Lab) -> None:
    """Check the algebra, train on one grid and test on others, look at cosines far out."""
    _algebra(lab)
    _grids(lab)
    _precision(lab)


def _algebra(lab: Lab) -> None:
    candidates = {
        QUATERNION: torch.tensor([_I, _J], dtype=torch.float64),
        SUM: rotary_generators(torch.tensor([[1.0, 1.0], [0.1, 0.1]], dtype=torch.float64)),
        AXIAL: RotaryEmbedding(4, axes=2).generators(),
    }
    corner, grid = grid_positions(4, 4), grid_positions(16, 16)
    violation, distinct = {}, {}
    for name, generators in candidates.items():
        violation[name] = _violation(generators, corner[:, None], corner[None, :])
        matrices = rotary_matrix(grid, generators, check=False).flatten(1)
        distinct[name] = len(torch.unique(matrices.round(decimals=6), dim=0))
    lab.table(
        "Three candidates",
        [
            {
                "candidate": name,
                r"$\max |R_a^\top R_b - R_{b-a}|$": violation[name],
                "different matrices": distinct[name],
            }
            for name in candidates
        ],
        r"Largest violation of relativity over all pairs of cells of a $4 \times 4$ grid, and "
        r"number of different rotations on the 256 cells of a $16 \times 16$ grid.",
    )
    lab.observe("violation of relativity by quaternions", violation[QUATERNION], ">", 1.0)
    lab.observe("violation of relativity by the axial table", violation[AXIAL], "<", 1e-12)
    lab.observe("different matrices of $x + y$ on 256 cells", distinct[SUM], "==", 31)
    lab.observe("different matrices of the axial table", distinct[AXIAL], "==", 256)

    steps = torch.linspace(0.05, 8, 160, dtype=torch.float64)
    along_x = torch.stack([steps, torch.zeros_like(steps)], -1)
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, generators in candidates.items():
        difference = _differences(generators, along_x, along_x.flip(-1)).amax((-2, -1))
        axes.semilogy(steps, difference.clamp(min=1e-17), label=name)
    axes.set(xlabel="$t$", ylabel=r"$\max |R_a^\top R_b - R_{b-a}|$", ylim=(1e-18, 1e2))
    axes.legend(loc="center right")
    lab.figure(
        "relativity",
        figure,
        "Violation of relativity between $a = (t, 0)$ and $b = (0, t)$. Generators that commute "
        "leave rounding errors, or nothing at all (drawn at $10^{-17}$).",
    )


def _differences(generators: Tensor, a: Tensor, b: Tensor) -> Tensor:
    here, there, between = (
        rotary_matrix(p, generators, check=False) for p in torch.broadcast_tensors(a, b, b - a)
    )
    return (here.mT @ there - between).abs()


def _violation(generators: Tensor, a: Tensor, b: Tensor) -> float:
    return float(_differences(generators, a, b).max())


class Pictures(NamedTuple):
    """Grey images of mean 0 and variance 1, of shape (count, height, width)."""

    train: Tensor
    test: Tensor


def _pictures(lab: Lab) -> Pictures:
    if lab.data.path is None:
        images = _standardised(torch.stack(lab.data.photographs()), averaged=3)
        split = round(0.7 * images.shape[-1])
        return Pictures(images[..., :split], images[..., split:])
    given = lab.data.images()
    rows, columns = (max(sides) for sides in zip(*GRIDS, strict=True))
    height, width = given.train.images.shape[-2:]
    averaged = 3 if height >= 3 * rows and width >= 3 * columns else 1
    if height < rows or width < columns:
        raise DataError(
            f"{lab.data.path}: expected images of at least {rows} x {columns} pixels, got "
            f"{height} x {width}"
        )
    pictures = Pictures(
        _standardised(given.train.images, averaged), _standardised(given.test.images, averaged)
    )
    if min(map(len, pictures)) == 0:
        raise DataError(f"{lab.data.path}: expected images that are not of one shade of grey")
    return pictures


def _standardised(images: Tensor, averaged: int) -> Tensor:
    """Grey images, averaged over squares, each of mean 0 and variance 1."""
    grey = nn.functional.avg_pool2d(images.mean(1), averaged)
    spread = grey.std((-2, -1), keepdim=True, correction=0)
    varied = spread.flatten() > 0
    return ((grey - grey.mean((-2, -1), keepdim=True)) / spread)[varied]


class Task(NamedTuple):
    """Crops of shape (count, height, width) and the pixels that are hidden in them."""

    crops: Tensor
    hidden: Tensor


def _draw(images: Tensor, count: int, grid: tuple[int, int], generator: torch.Generator) -> Task:
    """Crops at random places, one pixel in eight hidden."""
    height, width = grid

    def anywhere(end: int) -> Tensor:
        return torch.randint(end, (count, 1, 1), generator=generator)

    image = anywhere(len(images))
    top, left = (anywhere(n - m + 1) for n, m in zip(images.shape[1:], grid, strict=True))
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    crops = images[image, top + rows, left + columns]
    order = torch.rand(count, height * width, generator=generator).argsort(1)
    hidden = torch.zeros(order.shape, dtype=torch.bool)
    hidden.scatter_(1, order[:, : height * width // 8], True)
    return Task(crops, hidden.unflatten(1, grid))


class Predictor(nn.Module):
    """Pixels of a crop, one token each, to guesses of all of them.

    What it knows of positions is ``encoding``, and nearly everything else about it is the same for
    all of them: where nothing turns, the frequencies are 0.
    """

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self.encoding = encoding
        self.embedding = nn.Linear(2, DIM)
        config = TransformerConfig(
            vocab_size=1,
            dim=DIM,
            num_layers=LAYERS,
            num_heads=HEADS,
            max_length=None,
            causal=False,
            activation="relu",
        )
        self.encoder = Transformer(config, position=_rotary(encoding))
        self.guess = nn.Linear(DIM, 1)
        self.table = None
        if encoding == ABSOLUTE:
            self.table = nn.Parameter(0.02 * torch.randn(1, DIM, *TRAINING_GRID))

    def forward(self, task: Task) -> Tensor:
        """Return a guess of each pixel, of the shape of the crops."""
        grid = task.crops.shape[1:]
        visible = task.crops.masked_fill(task.hidden, 0.0)
        tokens = self.embedding(torch.stack([visible, task.hidden.to(visible)], -1).flatten(1, 2))
        if self.table is not None:
            resized = nn.functional.interpolate(self.table, grid, mode="bilinear")
            tokens = tokens + resized.flatten(2).mT
        if self.encoding == FLATTENED:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            positions = grid_positions(*grid, device=tokens.device)
        states = self.encoder(inputs_embeds=tokens, positions=positions, return_hidden=True)
        return self.guess(states).reshape(task.crops.shape)


def _rotary(encoding: str) -> RotaryEmbedding:
    schedule = rotary_frequencies(HEAD_DIM, base=BASE).unsqueeze(-1)
    if encoding == FLATTENED:
        return RotaryEmbedding(HEAD_DIM, base=BASE)
    if encoding == AXIAL:
        return RotaryEmbedding(HEAD_DIM, axes=2, base=BASE)
    if encoding == SUM:
        return RotaryEmbedding(HEAD_DIM, axes=2, frequencies=schedule.expand(-1, 2))
    if encoding == MIXED:
        # Each plane starts with its usual speed along a direction of its own.
        direction = 2 * math.pi * torch.rand(len(schedule))
        table = schedule * torch.stack([direction.cos(), direction.sin()], -1)
        return RotaryEmbedding(HEAD_DIM, axes=2, frequencies=table, learnable=True)
    return RotaryEmbedding(HEAD_DIM, axes=2, frequencies=0 * schedule.expand(-1, 2))


def _squared_error(model: Predictor, task: Task) -> Tensor:
    """Mean squared error on hidden pixels, in units of the image's variance."""
    return (model(task) - task.crops)[task.hidden].square().mean()


def _trained(lab: Lab, pictures: Pictures, encoding: str, seed: int) -> Predictor:
    steps = lab.pick(smoke=4, quick=250, full=250)
    with seeded(seed):
        model = Predictor(encoding).to(lab.device)

    def train() -> None:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        progress = lab.progress(range(steps), f"{encoding}, seed {seed}")
        for _ in progress:
            task = _on(lab, _draw(pictures.train, BATCH, TRAINING_GRID, generator))
            loss = _squared_error(model, task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.metric(loss=loss.detach())

    name = "".join(letter for letter in encoding.lower() if letter.isalnum())
    return lab.trained(name, model, train, inputs={"seed of the model": seed})


def _on(lab: Lab, task: Task) -> Task:
    return Task(*(tensor.to(lab.device) for tensor in task))


def _grids(lab: Lab) -> None:
    pictures = _pictures(lab)
    encodings = [AXIAL, FLATTENED, NONE]
    encodings += lab.pick(smoke=[], quick=[], full=[MIXED, SUM, ABSOLUTE])
    seeds = [lab.seed + i for i in range(lab.pick(smoke=1, quick=1, full=5))]
    count = lab.pick(smoke=64, quick=600, full=1000)
    generator = lab.generator()
    tests = {grid: _on(lab, _draw(pictures.test, count, grid, generator)) for grid in GRIDS}

    errors: dict[tuple[str, tuple[int, int]], list[float]] = {
        (encoding, grid): [] for encoding in encodings for grid in GRIDS
    }
    for seed in seeds:
        for encoding in encodings:
            model = _trained(lab, pictures, encoding, seed)
            with torch.no_grad():
                for grid, task in tests.items():
                    errors[encoding, grid].append(float(_squared_error(model, task)))
    mean = {key: float(np.mean(values)) for key, values in errors.items()}
    lab.table(
        "Error on hidden pixels",
        [
            {
                "positions": encoding,
                **{_title(grid): f"{mean[encoding, grid]:.4f}" for grid in GRIDS},
            }
            for encoding in encodings
        ],
        "Mean squared error in units of the image's variance, on crops of each size (rows × "
        f"columns). Trained on {_title(TRAINING_GRID)} only; {count} crops of each size, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}.",
    )
    lab.figure(
        "grids",
        _bars(encodings, mean),
        "Error on hidden pixels, by size of the test crops. All models were trained on "
        f"{_title(TRAINING_GRID)}. The flattened code survives more rows, not another width.",
    )
    home, wide, tall, wider = GRIDS

    def ratio(one: str, one_grid: tuple[int, int], other: str, grid: tuple[int, int]) -> float:
        return mean[one, one_grid] / mean[other, grid]

    lab.claim(
        f"error of axial over error of flattened on {_title(home)}",
        ratio(AXIAL, home, FLATTENED, home),
        "<=",
        0.95,
    )
    for grid in (wide, wider):
        lab.claim(
            f"error of axial over error of flattened on {_title(grid)}",
            ratio(AXIAL, grid, FLATTENED, grid),
            "<=",
            0.5,
        )
    lab.claim(
        f"control: error of flattened on {_title(tall)} over that on {_title(home)}",
        ratio(FLATTENED, tall, FLATTENED, home),
        "<=",
        1.5,
    )
    for grid in (wide, wider):
        lab.observe(
            f"error of flattened over error without positions on {_title(grid)}",
            ratio(FLATTENED, grid, NONE, grid),
            ">",
            0.5,
        )


def _title(grid: tuple[int, int]) -> str:
    return f"{grid[0]}\u00a0×\u00a0{grid[1]}"


def _bars(encodings: list[str], mean: dict[tuple[str, tuple[int, int]], float]) -> Figure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(encodings)
    for i, encoding in enumerate(encodings):
        places = np.arange(len(GRIDS)) + (i - (len(encodings) - 1) / 2) * width
        axes.bar(places, [mean[encoding, grid] for grid in GRIDS], 0.9 * width, label=encoding)
    axes.set_xticks(range(len(GRIDS)), [_title(grid) for grid in GRIDS])
    axes.set(xlabel="rows × columns of the test crops", ylabel="mean squared error")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.legend(loc="upper center", ncols=3, fontsize="small")
    return figure


def _precision(lab: Lab) -> None:
    dim = 64
    exponents = np.linspace(0, 7, lab.pick(smoke=8, quick=57, full=113))
    positions = torch.tensor(np.unique(np.round(10.0**exponents)), dtype=torch.int64)
    exact = torch.tensor([_exact_cosines(int(n), dim) for n in positions], dtype=torch.float64)

    frequencies = rotary_frequencies(dim)
    single = (positions.float()[:, None] * frequencies.float()).cos()
    # What the vectors (1, 0) of all planes become has the cosines for its first coordinates.
    unit = torch.tensor([1.0, 0.0]).repeat(len(positions), dim // 2)
    ours = RotaryEmbedding(dim).rotate(unit, positions=positions)[:, ::2]

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes: Axes = figure.add_subplot()
    last = {}
    for name, cosines in (("angles in float32", single), ("angles in float64 (ours)", ours)):
        error = (cosines.double() - exact).abs().amax(1)
        axes.loglog(positions, error.clamp(min=1e-9), label=name)
        last[name] = error
    axes.set(xlabel="position", ylabel="largest error of a cosine", ylim=(1e-9, 1e1))
    axes.legend()
    lab.figure(
        "precision",
        figure,
        f"Largest error over the {dim // 2} planes of a head of {dim} features. Both tables end up "
        "in float32; what differs is where position and frequency were multiplied.",
    )
    lab.observe(
        r"largest error of our cosines up to position $10^7$",
        last["angles in float64 (ours)"].max(),
        "<=",
        3.1e-8,
    )
    lab.observe(
        r"largest error of cosines of float32 angles up to position $10^7$",
        last["angles in float32"].max(),
        ">",
        1e-2,
    )


_PI = Decimal("3.14159265358979323846264338327950288419716939937511")


def _exact_cosines(position: int, dim: int) -> list[float]:
    """Cosines of position · 10000^(-2i/dim), the angle reduced in 40 digits."""
    with localcontext() as context:
        context.prec = 40
        angles = [position * Decimal(10_000) ** (Decimal(-2 * i) / dim) for i in range(dim // 2)]
        return [math.cos(angle % (2 * _PI)) for angle in angles]
