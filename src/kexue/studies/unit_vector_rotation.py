r"""From one unit vector to another.

"Without loss of generality, let the vector point along the first axis": behind this sentence stands
an orthogonal matrix $T$ with $T a = b$, and sooner or later somebody has to write it down. Graphics
has a formula for three dimensions. Here is one for all of them, without a basis that has to be
completed, in two inner products a vector; and, because the formula everybody writes first loses all
of its digits where $b$ comes close to $-a$, one that does not.

## Only a plane is turned

Let $a$ and $b$ be unit vectors at an angle $\theta$ with $0 < \theta < \pi$, and write
$c = a \cdot b = \cos\theta$, $s = \sin\theta$. The unit vector $e = (b - c a)/s$ is orthogonal to
$a$ and spans with it the plane of $a$ and $b$, where $b = c a + s e$. So $T$ need do nothing
outside of this plane. With $Q = (a \;\; e)$, any orthonormal basis $E$ of all that is orthogonal to
the plane, and an orthogonal $2 \times 2$ matrix $R$ whose first column is $(c, s)^\top$,

$$T = Q R Q^\top + E E^\top = Q R Q^\top + I - Q Q^\top .$$

The second form is the point of the article: $E$ was arbitrary, and it has disappeared. There are
two such $R$, and one more map comes from a sign.

The **rotation**, with $R = \begin{pmatrix} c & -s \\ s & c \end{pmatrix}$. Put $e$ in, and the
sines cancel:

$$T = I + 2 b a^\top - \frac{(a+b)(a+b)^\top}{1 + c} .$$

The **reflection**, with $R = \begin{pmatrix} c & s \\ s & -c \end{pmatrix}$, is Householder's:

$$T = I - \frac{(a-b)(a-b)^\top}{1 - c} .$$

The **half turn** is the reflection from $a$ to $-b$, negated. It keeps the bisector of $a$ and $b$
and negates all that is orthogonal to it:

$$T = \frac{(a+b)(a+b)^\top}{1 + c} - I .$$

The last two are symmetric, so that they also send $b$ to $a$; the rotation sends $b$ on to the
double angle. The rotation is the one that moves as little as a rotation can,
$\lVert T - I \rVert_F^2 = 4(1-c)$, and the one that has parts: turning by $t\theta$ instead of
$\theta$,

$$T_t = I + (\cos t\theta - 1)(a a^\top + e e^\top) + \sin t\theta \, (e a^\top - a e^\top),$$

walks along the great circle from $a$ to $b$. None of them needs $d^2$ numbers: each is $\pm I$ and
a matrix of rank one or two, so $T x$ costs a few passes over $x$.

## Where the formula fails

Let $b$ lie at an angle $\delta$ from $-a$. The denominator $1 + c \approx \delta^2/2$ is the
difference of two numbers near 1, which are known up to a rounding error $\varepsilon$ each; its
relative error is about $2\varepsilon/\delta^2$. So is that of the last term, whose norm is 2, and
nothing compensates it: $T T^\top$ misses $I$ by some $\varepsilon/\delta^2$, which on doubly
logarithmic paper is a line of slope $-2$. In single precision the matrix is wrong in the second
decimal at a twentieth of a degree; when $\delta$ falls below $\sqrt\varepsilon$, the denominator is
a rounding error or 0. To add a small number to it makes the failure silent.

The cure is to use the formula only while $1 + c \ge 1$. For the rest, take the residue $b - c a$,
which near $-a$ is mostly a rounding error along $a$; remove from it its part along $a$ once more;
normalise; and write $T$ in the orthonormal pair $(a, e)$ with the cosine $a \cdot b$ and the sine
$e \cdot b$. An orthonormal pair gives an orthogonal $T$ whatever small error it carries, and $e$ is
as well known as $b$ allows. Only when nothing is left of the residue do $a$ and $b$ no longer say
in which plane to turn; then $e$ comes from the coordinate axis that is most orthogonal to $a$, and
the answer is still a rotation, and always the same. The reflection, where $b$ is close to $a$, is
served in the same way.

## What is measured

First, all three kinds in 64 dimensions, at angles $\delta$ from $10^{-1}$ down to $10^{-6}$ from
the place where they fail, and at $\delta = 0$ itself. The direct formula must lose its digits with
a slope near $-2$; ours must stay within $100\,\varepsilon$ everywhere, in orthogonality and in
$T a = b$. At one radian, the symmetric kinds must send $b$ to $a$ and the rotation must not.

Then the sentence from the beginning, on real vectors: turn the mean image of the handwritten digits
onto the first axis, and all images with it. The first coordinate must then be the projection on the
mean, the other 63 must have mean 0, and nothing metric may have changed: predictions by the three
nearest neighbours must be the same, image by image, for all three kinds. Where a fourth image is
exactly as near as the third, as happens with pixels that are whole numbers, distances alone do not
say which to ask; so all of them are asked.

Last, to look at: parts of the rotation from one digit's mean to another's, and what it costs to
apply a rotation with and without its matrix.

The reader should see one line that climbs two decades for each decade of the angle, and one that
lies on the ground.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from sklearn.neighbors import KNeighborsClassifier

from kexue.lab import Lab
from kexue.linalg.rotation import Kind, align, alignment_matrix

DIMENSION = 64
EPS = float(np.finfo(np.float64).eps)
KINDS: tuple[Kind, ...] = ("rotation", "reflection", "half_turn")
TITLES = {"rotation": "rotation", "reflection": "reflection", "half_turn": "half turn"}
Errors: TypeAlias = tuple[np.ndarray, np.ndarray]
DELTAS = np.logspace(-1, -6, 11)


def run(lab: Lab) -> None:
    """Every angle, then digits with their mean on the first axis, then parts and times."""
    rng = np.random.default_rng(lab.seed)
    _near_the_singularity(lab, rng)
    _exchange(lab, rng)
    _completions(lab, rng)
    _digits(lab, rng)
    _morph(lab)
    _times(lab, rng)


def _pairs(
    angle: float, n_pairs: int, rng: np.random.Generator, dimension: int = DIMENSION
) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of unit vectors at an angle, relatively accurate however small it is."""
    a = _unit(rng.standard_normal((n_pairs, dimension)))
    across = rng.standard_normal((n_pairs, dimension))
    for _ in range(2):
        across = _unit(across - np.sum(across * a, axis=-1, keepdims=True) * a)
    return a, np.cos(angle) * a + np.sin(angle) * across


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _direct(a: np.ndarray, b: np.ndarray, kind: Kind) -> np.ndarray:
    """The closed formulas as they stand, for a batch of unit vectors."""
    identity = np.eye(a.shape[-1], dtype=a.dtype)
    c = np.sum(a * b, axis=-1)[..., None, None]
    total, difference = (_outer(v, v) for v in (a + b, a - b))
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "rotation":
            return identity + 2 * _outer(b, a) - total / (1 + c)
        if kind == "reflection":
            return identity - difference / (1 - c)
        return total / (1 + c) - identity


def _outer(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u[..., :, None] * v[..., None, :]


def _orthogonality_error(matrix: np.ndarray) -> np.ndarray:
    """Largest entry of T Tᵀ - I, for each matrix."""
    wide = matrix.astype(np.float64)
    return np.abs(wide @ np.swapaxes(wide, -1, -2) - np.eye(wide.shape[-1])).max(axis=(-2, -1))


def _transport_error(matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Length of T a - b, for each matrix."""
    moved = (matrix.astype(np.float64) @ a.astype(np.float64)[..., None])[..., 0]
    return np.linalg.norm(moved - b, axis=-1)


def _near_the_singularity(lab: Lab, rng: np.random.Generator) -> None:
    n_pairs = lab.pick(smoke=4, quick=20, full=400)
    worst_of_ours, rows = 0.0, []
    curves: dict[str, list[tuple[float, float]]] = {}
    for kind in KINDS:
        sign = 1 if kind == "reflection" else -1
        direct: list[Errors] = []
        ours: list[Errors] = []
        for delta in lab.progress(DELTAS, TITLES[kind]):
            a, across = _pairs(delta, n_pairs, rng)
            b = sign * across
            for errors, matrix in (
                (direct, _direct(a, b, kind)),
                (ours, alignment_matrix(a, b, kind=kind)),
            ):
                errors.append((_orthogonality_error(matrix), _transport_error(matrix, a, b)))
        a, _ = _pairs(1.0, n_pairs, rng)
        matrix = alignment_matrix(a, sign * a, kind=kind)
        at_zero = max(
            _orthogonality_error(matrix).max(), _transport_error(matrix, a, sign * a).max()
        )
        worst = max(at_zero, max(np.max(pair) for pair in ours))
        worst_of_ours = max(worst_of_ours, worst)
        # The mean of logarithms: a single lucky pair must not bend the line.
        slopes = [
            np.polyfit(np.log(DELTAS), [np.log(pair[i]).mean() for pair in direct], 1)[0]
            for i in (0, 1)
        ]
        rows.append({
            "kind": f"{TITLES[kind]}, b near {'a' if sign > 0 else '−a'}",
            r"slope of $TT^\top - I$": slopes[0],
            "of $Ta - b$": slopes[1],
            r"at $10^{-6}$": np.max(direct[-1][0]),
            r"ours, in $\varepsilon$": worst / EPS,
            r"ours at $0$": at_zero / EPS,
        })  # fmt: skip
        if kind == "rotation":
            slope = float(slopes[0])
            curves = {
                "direct": [(np.max(p[0]), np.max(p[1])) for p in direct],
                "ours": [(np.max(p[0]), np.max(p[1])) for p in ours],
            }
    lab.table(
        "Errors near the place where the direct formula fails",
        rows,
        f"Pairs in {DIMENSION} dimensions, {n_pairs} at each of {len(DELTAS)} angles from "
        r"$10^{-1}$ to $10^{-6}$, and at 0. For the direct formula the slopes of both errors and "
        r"the largest entry of $TT^\top - I$ at $10^{-6}$; for ours the larger of both errors, at "
        r"any angle and at 0, in units of $\varepsilon = 2.2\cdot10^{-16}$.",
    )
    lab.figure(
        "breakdown",
        _breakdown_figure(curves),
        r"The rotation near opposite vectors: largest error among the pairs. The direct formula "
        r"loses orthogonality like $\varepsilon/\delta^2$ and misses $b$ like "
        r"$\varepsilon/\delta$; the two lines on the ground are ours.",
    )
    lab.claim(
        r"largest error of our maps at any angle, in units of $\varepsilon$",
        worst_of_ours / EPS,
        "<=",
        100,
    )
    statement = r"slope of $\log \max|TT^\top - I|$ against $\log\delta$, direct rotation"
    lab.claim(statement, slope, ">=", -2.3)
    lab.claim(statement, slope, "<=", -1.7)
    _single_precision(lab, rng, n_pairs)


def _single_precision(lab: Lab, rng: np.random.Generator, n_pairs: int) -> None:
    a, b = (v.astype(np.float32) for v in _pairs(1e-3, n_pairs, rng))
    lab.observe(
        r"single precision at $\delta = 10^{-3}$: $\max|TT^\top - I|$ of the direct rotation",
        _orthogonality_error(_direct(a, -b, "rotation")).max(),
        ">",
        1e-3,
    )
    lab.observe(
        r"the same, ours",
        _orthogonality_error(alignment_matrix(a, -b)).max(),
        "<=",
        100 * float(np.finfo(np.float32).eps),
    )


def _breakdown_figure(curves: dict[str, list[tuple[float, float]]]) -> Figure:
    figure = Figure()
    axes = figure.add_subplot()
    styles = {"direct": ("o", "direct formula"), "ours": ("s", "ours")}
    for name, (marker, title) in styles.items():
        orthogonality, transport = np.array(curves[name]).T
        axes.loglog(DELTAS, orthogonality, marker=marker, label=rf"{title}: $\max|TT^\top - I|$")
        axes.loglog(
            DELTAS, transport, marker=marker, mfc="none", ls="--", label=rf"{title}: $|Ta - b|$"
        )
    axes.set_xlabel(r"angle $\delta$ between $b$ and $-a$")
    axes.set_ylabel("error")
    axes.legend()
    return figure


def _exchange(lab: Lab, rng: np.random.Generator) -> None:
    """Whether T sends b back to a, at one radian."""
    a, b = _pairs(1.0, lab.pick(smoke=4, quick=20, full=400), rng)
    for kind in KINDS:
        errors = _transport_error(alignment_matrix(a, b, kind=kind), b, a)
        if kind == "rotation":
            lab.claim(
                r"$|Tb - a|$ of the rotation at $\theta = 1$, smallest", errors.min(), ">", 0.1
            )
        else:
            lab.claim(
                rf"$|Tb - a|$ of the {TITLES[kind]} at $\theta = 1$, largest",
                errors.max(),
                "<=",
                1e-13,
            )


def _completions(lab: Lab, rng: np.random.Generator) -> None:
    """The closed formula against explicit bases E, in several dimensions."""
    rows, largest = [], 0.0
    for d in (2, 3, 64, lab.pick(smoke=100, quick=200, full=1000)):
        a, b = (v[0] for v in _pairs(2.0, 1, rng, d))
        c, s = a @ b, np.linalg.norm(b - (a @ b) * a)
        matrices = {kind: alignment_matrix(a, b, kind=kind) for kind in KINDS}
        reached = 0.0
        for _ in range(5):
            basis = np.linalg.qr(np.column_stack([a, b, rng.standard_normal((d, d - 2))]))[0]
            basis[:, 0], basis[:, 1] = a, (b - c * a) / s
            q, e = basis[:, :2], basis[:, 2:]
            turn, mirror = np.array([[c, -s], [s, c]]), np.array([[c, s], [s, -c]])
            outside = e @ e.T
            explicit = {
                "rotation": q @ turn @ q.T + outside,
                "reflection": q @ mirror @ q.T + outside,
                "half_turn": q @ mirror @ q.T - outside,
            }
            reached = max(reached, *(np.abs(explicit[k] - matrices[k]).max() for k in KINDS))
        largest = max(largest, reached)
        rows.append({
            "$d$": d,
            "largest difference": reached,
            **{
                f"trace, {TITLES[kind]}": round(float(np.trace(matrices[kind])), 4) + 0.0
                for kind in KINDS
            },
        })  # fmt: skip
    lab.table(
        "Any completion gives the closed formula",
        rows,
        r"Two vectors at 2 radians; five random bases $E$ each. The traces are $d - 2 + 2\cos 2$ "
        r"with $\cos 2 = -0.4161$, $d - 2$ and $2 - d$.",
    )
    lab.observe(
        r"largest difference between the closed formulas and $QRQ^\top \pm EE^\top$",
        largest,
        "<",
        1e-12,
    )


def _digits(lab: Lab, rng: np.random.Generator) -> None:
    digits = lab.data.tabular("digits")
    images, labels = digits.features, digits.target
    known, asked = np.array_split(rng.permutation(len(images)), 2)
    mean, first_axis = images.mean(axis=0), np.eye(images.shape[1])[0]
    projection = images @ _unit(mean)
    before, tied = _neighbour_votes(images[asked], images[known], labels[known])
    sorted_before = _sorted_votes(images[asked], images[known], labels[known])
    rows = []
    for kind in KINDS:
        turned = align(images, mean, first_axis, kind=kind)
        after, _ = _neighbour_votes(turned[asked], turned[known], labels[known])
        sorted_after = _sorted_votes(turned[asked], turned[known], labels[known])
        agreement = float(np.mean(after == before))
        rows.append({
            "kind": TITLES[kind],
            "error of the projection": np.abs(turned[:, 0] - projection).max(),
            "mean of the others": np.abs(turned[:, 1:].mean(axis=0)).max(),
            "accuracy": f"{np.mean(after == labels[asked]):.5f}",
            "same predictions": f"{100 * agreement:g} %",
            "same, cut at three": f"{100 * np.mean(sorted_after == sorted_before):.5g} %",
        })  # fmt: skip
        lab.claim(
            f"share of test images with the same 3-neighbour prediction after the {TITLES[kind]}",
            agreement,
            "==",
            1.0,
        )
    lab.table(
        "Digits with their mean on the first axis",
        rows,
        "By how much the first coordinate misses the projection on the mean, and the largest mean "
        f"of another coordinate. {len(images)} images of 64 pixels between 0 and 16; half of them "
        f"are looked up among the other half. Accuracy before: "
        f"{np.mean(before == labels[asked]):.5f}. For {tied} of them the fourth neighbour is "
        "exactly as near as the third: there all that are as near vote. In the last column only "
        "three do, and a rounding error says which.",
    )


def _neighbour_votes(
    asked: np.ndarray, known: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, int]:
    """Label with most votes of all neighbours as near as the third, and how many have ties there.

    Three of four neighbours at the same distance are no matter of distance, but of rounding.
    """
    square = cdist(asked, known, "sqeuclidean")
    # Distinct distances of integer vectors differ by far more than this, roundings by far less.
    third = np.partition(square, 2, axis=1)[:, 2:3] * (1 + 1e-9)
    near = square <= third
    votes = near @ (labels[:, None] == np.unique(labels)).astype(np.int64)
    return np.unique(labels)[votes.argmax(axis=1)], int(np.sum(near.sum(axis=1) > 3))


def _sorted_votes(asked: np.ndarray, known: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return KNeighborsClassifier(3).fit(known, labels).predict(asked)


def _morph(lab: Lab) -> None:
    digits = lab.data.tabular("digits")
    zeros, threes = (digits.features[digits.target == digit] for digit in (0, 3))
    fractions = np.linspace(0, 1, 7)
    a, b = zeros.mean(axis=0), threes.mean(axis=0)
    rows = {
        "mean of 0": align(a, a, b, fraction=fractions),
        "one 0": align(zeros[0], a, b, fraction=fractions),
    }
    figure = Figure(figsize=(5.6, 2.1))
    panels = figure.subplots(len(rows), len(fractions))
    for line, (title, path) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(line, path, strict=True):
            axes.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
        line[0].set_ylabel(title)
    for axes, t in zip(panels[-1], fractions, strict=True):
        axes.set_xlabel(f"$t = {t:.2g}$")
    lab.figure(
        "morph",
        figure,
        "Parts of the rotation from the mean 0 to the mean 3. Above, the mean itself walks along "
        "the great circle and arrives; below, one image of a 0 is carried along by the same "
        "rotation and keeps what distinguishes it from the mean.",
    )


def _times(lab: Lab, rng: np.random.Generator) -> None:
    n_vectors = 1000
    dimensions = lab.pick(smoke=(64, 256), quick=(64, 256, 1024, 2048), full=(64, 256, 1024, 4096))
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that no thread waits for one that another process holds up
    try:
        for d in lab.progress(dimensions, "times"):
            x, a, b = (
                torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
                for shape in ((n_vectors, d), d, d)
            )
            matrix = alignment_matrix(a, b)
            rows.append({
                "align": _seconds(align, x, a, b),
                "matrix": _seconds(alignment_matrix, a, b),
                "product": _seconds(torch.matmul, x, matrix.T),
            })  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    figure = Figure()
    axes = figure.add_subplot()
    times = {name: np.array([1e3 * row[name] for row in rows]) for name in rows[0]}
    axes.loglog(dimensions, times["align"], "o-", label="align")
    axes.loglog(dimensions, times["matrix"], "^:", label="form the matrix")
    axes.loglog(dimensions, times["matrix"] + times["product"], "s--", label="form it and multiply")
    axes.set_xlabel("dimension $d$")
    axes.set_ylabel("milliseconds")
    axes.legend()
    lab.figure(
        "times",
        figure,
        f"One rotation of {n_vectors} vectors in single precision on one core. Without the matrix "
        "the time grows like $d$, with it like $d^2$.",
    )
    last = rows[-1]
    lab.observe(
        rf"times that align is faster than matrix and product at $d = {dimensions[-1]}$",
        (last["matrix"] + last["product"]) / last["align"],
        ">",
        lab.pick(smoke=1, quick=5, full=15),
    )


def _seconds(function: Callable[..., Any], *arguments: torch.Tensor) -> float:
    function(*arguments)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    # The shortest, since what else the machine does can only add.
    return min(times)
