r"""Geodesic distance of sentences.

Two sentences become two vectors, and the angle between the vectors says how alike they are. That is
how text is searched, and there it works: what is closest is wanted, and what is farther may be far
in any order. But other questions compare large distances. Which of a hundred remarks stand nearest
to the theme of them all? Which document lies between two others? Is a distance of 11 more than one
of 10, where both are large?

## Why large distances mean nothing

Sentence encoders are trained with pairs. Positive pairs are to come close, all other pairs apart,
and *every* negative pair gets the same label: a sentence about cats is as wrong for one about dogs
as for one about tax law. Such a loss orders what is close. About the order of what is far it says
nothing, and the encoder need not either. The distance $d$ is right locally and uninformative
globally.

There is an old remedy for distances of this kind, known from Isomap. Keep only the short ones, and
let the long ones be sums of them. Join every point to its $k$ nearest neighbours, weight each edge
with its length, and measure along the graph:

$$G(i, j) = \min_{i = a_0, a_1, \dots, a_m = j}\ \sum_{l=0}^{m-1} d(a_l, a_{l+1}).$$

On a circle of 100 points, with $k = 2$, opposite points are 50 steps apart, which makes
$100 \sin(\pi/100) = 3.1411$: half of the circumference, not the diameter. If points fill a surface
more and more densely, $G$ tends to the length of the shortest way within it. Then the score of a
text $t_i$ for a theme $c$ is

$$s(t_i, c) = \frac{1}{G(v_i, v_c)}.$$

## Which short distance

A sum of steps is worth something only if a way around is not shorter than the straight one. The
Euclidean distance and the angle obey the triangle inequality, so $G \ge d$. The favourite of
practice does not. With unit vectors $1 - \cos\theta = |u - v|^2 / 2$, and a step of angle $\theta$,
cut in $m$, costs

$$m\left(1 - \cos\frac{\theta}{m}\right) \approx \frac{\theta^2}{2m} \to 0.$$

The denser the points, the closer everything is to everything. On the circle of 12, 41 and 100
points opposite ones are $0.80$, $0.23$ and $0.10$ apart by $1 - \cos$, instead of $2$.

## Queries

A theme is a vector that is none of the points. It enters through its own neighbours,

$$G(q, j) = \min_{i \in \mathrm{kNN}(q)}\ [d(q, i) + G(i, j)],$$

and no way may lead *through* it: otherwise the answer to one query would depend on the others. The
$k$ points nearest to it are what Dijkstra's search meets first; it can stop there.

## What must go wrong

A single edge that leaps from one sheet of the surface to another, a short circuit, makes all far
distances small. So $k$ must stay below the number of points that are close in truth; more is not
safer. And where the large distances of $d$ do carry information, a graph that forgets them can only
lose.

## What is measured, and why it decides

Two sets of points in which the true distance is known, and one in which the premise is false.

1. *A photograph, rotated.* A disc of it, in steps of 3 degrees, as a vector of pixels. The true
   distance of two pictures is the angle between them. Of the half of all pairs that are farthest
   apart, how well does an estimate keep the order? The number is Spearman's rank correlation, 1 for
   perfect order, 0 for none.
2. *Windows of text.* 120 words at a time of a long document, every 30 words, so that a window
   overlaps with six others. The true distance is the offset of the two windows; counted are
   pairs beyond the 30 % quantile of it. The vectors are those of TF-IDF and its first singular
   vectors.
3. *Topics.* All sentences of Python's reference manual from the topics with at least 40 of them.
   The mean vector of each topic is to rank its own sentences before the others. These vectors were
   never trained with pairs: their large distances mean something. In the full budget, a small
   network is then trained with InfoNCE on windows of text, overlapping ones positive, and the
   second and third part are repeated with it: now the premise is true.

The claim holds if, in the first, geodesics with $k = 6$ reach a correlation of 0.95 and exceed
straight distances by 0.5; and if, in the second, the best $k$ of 3, 5 and 6 exceeds the angle by
0.3. Beside it stands the limit of the claim: the third part, where geodesics should lose, and a
strip of a photograph, whose repeated textures are short circuits.

The reader should see a straight line where Euclid's distance is flat, a curve that falls before $k$
has passed the six true neighbours, and a table in which the new method does not win.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.ndimage import rotate
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import average_precision_score
from torch import nn

from kexue.lab import Lab, seeded
from kexue.losses.contrastive import info_nce
from kexue.retrieval.geodesic import GeodesicIndex

WINDOW, STEP, LONGEST = 120, 30, 6000
"""Words of a window, words from one window to the next, words that are read of a document."""
PHOTOGRAPH_KS = (2, 4, 6, 10, 20)
WINDOW_KS = (3, 4, 5, 6, 7, 8, 10, 15, 20)
CLAIMED_KS = (3, 5, 6)
TOPIC_KS = (5, 10, 20, 40)
NEAR = 100
"""Sentences nearest to a topic's mean, beyond which the far range begins."""

Matrix = np.ndarray
Encoder = Callable[[Sequence[str]], Matrix]


class Sentences(NamedTuple):
    """Sentences, the number of each one's topic, and the names of the topics."""

    texts: list[str]
    topics: np.ndarray
    names: list[str]

    def among(self, chosen: np.ndarray) -> Sentences:
        return Sentences([self.texts[i] for i in chosen], self.topics[chosen], self.names)


def run(lab: Lab) -> None:
    """Pictures, windows of text, topics; in full, the last two with a trained encoder."""
    _pictures(lab)
    documents = _documents(lab.pick(smoke=2, quick=4, full=8))
    sentences = _sentences(lab)
    angle, geodesic = _windows(lab, "Windows of text", documents, _latent(documents, 128))
    best = max(geodesic[k] for k in CLAIMED_KS)
    lab.claim(
        "windows of text, far pairs: correlation of geodesics, best of $k = 3, 5, 6$, over that of "
        "the angle",
        best - angle,
        ">=",
        0.3,
    )
    lab.observe(
        "windows of text: correlation lost to short circuits at $k = 20$",
        best - geodesic[20],
        ">=",
        0.3,
    )
    vectors = _latent([sentences.texts], 100)(sentences.texts)
    # A sentence of signs alone has no words, and no direction.
    known = np.flatnonzero(vectors.any(axis=1))
    sentences, vectors = sentences.among(known), vectors[known]
    _path(lab, sentences, vectors)
    _topics(lab, "Limits of the claim: topics", sentences, vectors, trained=False)
    if lab.budget == "full":
        encoder = _contrastive(lab, documents, sentences)
        _windows(lab, "Windows of text, trained encoder", documents, encoder)
        _topics(lab, "Topics, trained encoder", sentences, encoder(sentences.texts), trained=True)


def _far_correlation(estimate: Matrix, truth: Matrix, share: float) -> float:
    """Rank correlation over pairs whose true distance is beyond a quantile."""
    pairs = np.triu_indices(len(truth), 1)
    estimate, truth = estimate[pairs], truth[pairs]
    far = truth > np.quantile(truth, share)
    return float(spearmanr(estimate[far], truth[far]).statistic)


def _along_graph(x: Matrix, k: int, metric: str) -> Matrix:
    return GeodesicIndex(k, metric=metric).fit(x).distances(indices=np.arange(len(x)))


def _pictures(lab: Lab) -> None:
    """A disc of a photograph that turns, and a window that slides along one."""
    photograph = lab.data.photographs()[0].double().numpy()
    angles = np.arange(0, 360, 3)
    turned = _rotations(photograph[:, 100:180, 200:280], 38, angles)
    apart = np.abs(angles[:, None] - angles)
    truth = np.minimum(apart, 360 - apart).astype(float)
    starts = np.arange(0, photograph.shape[2] - 40, 2)
    crops = np.stack([photograph[:, 200:240, s : s + 40][:, ::4, ::4].ravel() for s in starts])
    shifts = np.abs(starts[:, None] - starts).astype(float)

    correlations: dict[str, tuple[float, float]] = {}
    straight, along = cdist(turned, turned), {}
    correlations["straight"] = (
        _far_correlation(straight, truth, 0.5),
        _far_correlation(cdist(crops, crops), shifts, 0.5),
    )
    for k in PHOTOGRAPH_KS:
        along[k] = _along_graph(turned, k, "euclidean")
        correlations[f"geodesic, k = {k}"] = (
            _far_correlation(along[k], truth, 0.5),
            _far_correlation(_along_graph(crops, k, "euclidean"), shifts, 0.5),
        )
    lab.table(
        "Pictures",
        [
            {"distance": name, "rotated disc": turning, "sliding window": sliding}
            for name, (turning, sliding) in correlations.items()
        ],
        f"Rank correlation with the true distance over the far half of the pairs: {len(angles)} "
        f"rotations of a disc, and {len(starts)} windows of 40 pixels, each 2 pixels further along "
        "a strip. The strip decides nothing: its texture repeats, and no $k$ helps.",
    )
    reached, without = correlations["geodesic, k = 6"][0], correlations["straight"][0]
    lab.claim(
        "rotated photograph, far pairs: correlation of geodesics with $k = 6$", reached, ">=", 0.95
    )
    lab.claim(
        "rotated photograph, far pairs: geodesics over straight distances",
        reached - without,
        ">=",
        0.5,
    )
    lab.observe(
        "sliding window, far pairs: correlation of geodesics with $k = 6$",
        correlations["geodesic, k = 6"][1],
        "<",
        0.5,
    )
    _show_pictures(lab, truth, straight, along)


def _rotations(patch: Matrix, radius: float, angles: np.ndarray) -> Matrix:
    """Every fourth pixel of the disc within a square patch, for every angle in degrees."""
    centred = np.arange(patch.shape[1]) - (patch.shape[1] - 1) / 2
    disc = (centred[:, None] ** 2 + centred**2 <= radius**2)[::4, ::4]
    return np.stack(
        [
            np.stack([rotate(channel, angle, reshape=False, order=1) for channel in patch])[
                :, ::4, ::4
            ][:, disc].ravel()
            for angle in angles
        ]
    )


def _show_pictures(lab: Lab, truth: Matrix, straight: Matrix, along: dict[int, Matrix]) -> None:
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    shown = {"straight": straight, "geodesic, k = 6": along[6], "geodesic, k = 20": along[20]}
    pairs = np.triu_indices(len(truth), 1)
    for axes, (name, estimate) in zip(panels, shown.items(), strict=True):
        axes.plot(truth[pairs], estimate[pairs], ".", markersize=1.5, alpha=0.3, rasterized=True)
        axes.set(title=name, ylim=(0, None), xticks=[0, 90, 180])
    panels[0].set(ylabel="estimated distance")
    panels[1].set(xlabel="true angle in degrees")
    lab.figure(
        "rotations",
        figure,
        "All pairs of rotated pictures. The straight distance saturates after a few degrees; sums "
        "of short steps grow with the angle, until with $k = 20$ edges leap across.",
    )


def _documents(count: int) -> list[list[str]]:
    """Windows of the longest topics of Python's manual, each in the order of the text."""
    from pydoc_data.topics import topics

    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))[:count]
    return [_cut(topics[name].split()[:LONGEST], STEP) for name in longest]


def _cut(words: list[str], step: int) -> list[str]:
    return [" ".join(words[s : s + WINDOW]) for s in range(0, len(words) - WINDOW + 1, step)]


def _sentences(lab: Lab) -> Sentences:
    """Sentences of 40 to 300 signs, most of them letters, of the topics with at least 40 such."""
    from pydoc_data.topics import topics

    topic_of: dict[str, str] = {}
    for name in sorted(topics):
        for sentence in lab.data.sentences(topics[name]):
            letters = sum(sign.isalpha() or sign == " " for sign in sentence)
            if 40 <= len(sentence) <= 300 and letters > 0.8 * len(sentence):
                topic_of.setdefault(sentence, name)
    names, counts = np.unique(list(topic_of.values()), return_counts=True)
    large = [str(name) for name in names[counts >= 40]]
    chosen = {sentence: name for sentence, name in topic_of.items() if name in large}
    return Sentences(list(chosen), np.array([large.index(name) for name in chosen.values()]), large)


def _latent(documents: list[list[str]], dimension: int) -> Encoder:
    """Latent semantic analysis: the first singular vectors of TF-IDF over all the texts."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    texts = [text for document in documents for text in document]
    svd = TruncatedSVD(dimension, random_state=0).fit(vectorizer.fit_transform(texts))
    return lambda some: svd.transform(vectorizer.transform(some))


def _windows(
    lab: Lab, name: str, documents: list[list[str]], encoder: Encoder
) -> tuple[float, dict[int, float]]:
    """Correlation of far pairs by the angle, and by geodesics of every k: means over documents."""
    by_angle: list[float] = []
    by_geodesic: dict[int, list[float]] = {k: [] for k in WINDOW_KS}
    for document in lab.progress(documents, name.lower()):
        x = encoder(document)
        place = np.arange(len(x))
        offset = np.abs(place[:, None] - place).astype(float)
        # 1 - cos orders pairs as the angle does.
        by_angle.append(_far_correlation(cdist(x, x, "cosine"), offset, 0.3))
        for k in WINDOW_KS:
            estimate = _along_graph(x, k, "angular")
            by_geodesic[k].append(_far_correlation(estimate, offset, 0.3))
    angle = float(np.mean(by_angle))
    geodesic = {k: float(np.mean(values)) for k, values in by_geodesic.items()}
    rows: list[dict[str, Any]] = [{"distance": "angle", "far correlation": angle}]
    rows += [
        {"distance": f"geodesic, k = {k}", "far correlation": value}
        for k, value in geodesic.items()
    ]
    lab.table(
        name,
        rows,
        f"Rank correlation of distance and offset beyond the 30 % quantile, mean of "
        f"{len(documents)} documents of {min(map(len, documents))} to {max(map(len, documents))} "
        "windows.",
    )
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.plot(WINDOW_KS, list(geodesic.values()), "o-", label="geodesic")
    axes.axhline(angle, linestyle="--", color="C1", label="angle")
    axes.axvline(2 * (WINDOW // STEP - 1), linestyle=":", color="0.5", label="windows that overlap")
    axes.set(xlabel="neighbours $k$", ylabel="far correlation", ylim=(min(0, angle), 1.02))
    axes.set_xticks(WINDOW_KS)
    axes.legend(frameon=False, fontsize="small")
    lab.figure(
        name.lower().replace(",", "").replace(" ", "-"),
        figure,
        f"{name}: how well far offsets are ordered. A window shares words with six others; any "
        "further neighbour is a short circuit, and so are some of the six at the ends of a "
        "document.",
    )
    return angle, geodesic


def _topics(lab: Lab, name: str, sentences: Sentences, vectors: Matrix, *, trained: bool) -> None:
    """Mean average precision of a topic's mean vector for its own sentences.

    Geodesics are expected to win where vectors were trained with pairs, and to lose elsewhere.
    """
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    own = sentences.topics == np.arange(len(sentences.names))[:, None]
    centres = np.stack([unit[mine].mean(axis=0) for mine in own])
    straight = cdist(centres, unit, "cosine")
    far = np.argsort(straight, axis=1, kind="stable")[:, NEAR:]

    def precision(distances: Matrix) -> tuple[float, float]:
        # Out of reach is farther than anything, but no number that can be ranked with others.
        score = -np.nan_to_num(distances, posinf=1e6)
        everywhere = [average_precision_score(m, s) for m, s in zip(own, score, strict=True)]
        beyond = [
            average_precision_score(m[rest], s[rest])
            for m, s, rest in zip(own, score, far, strict=True)
            if m[rest].any()
        ]
        return float(np.mean(everywhere)), float(np.mean(beyond))

    precisions = {"cosine": precision(straight)}
    for k in TOPIC_KS:
        index = GeodesicIndex(k).fit(unit)
        precisions[f"geodesic, k = {k}"] = precision(index.distances(centres))
    lab.table(
        name,
        [
            {"distance": way, "all sentences": everywhere, "far range": beyond}
            for way, (everywhere, beyond) in precisions.items()
        ],
        f"Mean average precision of {len(sentences.names)} topics among {len(unit)} sentences. The "
        f"far range leaves out the {NEAR} sentences nearest to a topic's mean.",
    )
    cosine, *geodesics = precisions.values()
    for part, what in enumerate(("", ", far range")):
        lab.observe(
            f"{name.lower()}{what}: precision of the best geodesic over that of cosine",
            max(both[part] for both in geodesics) - cosine[part],
            ">" if trained else "<",
            0.0,
        )


def _path(lab: Lab, sentences: Sentences, vectors: Matrix) -> None:
    """The way between the two sentences that are farthest apart, of those that are connected."""
    index = GeodesicIndex(5, disconnected="bridge").fit(vectors)
    first = index.distances(indices=[0])[0]
    source = int(np.argmax(first))
    reached = index.distances(indices=[source])[0]
    way = index.path(source, int(np.argmax(reached))).nodes
    rows = [
        {
            "way": round(float(reached[node]), 2),
            "topic": sentences.names[sentences.topics[node]],
            "sentence": sentences.texts[node],
        }
        for node in way
    ]
    shown = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, 8).round().astype(int))]
    lab.table(
        "A path of sentences",
        shown,
        f"Stations of the shortest way between two sentences at opposite ends of the graph, "
        f"{len(rows) - 1} steps with $k = 5$; the first column adds up the angles.",
    )


def _contrastive(lab: Lab, documents: list[list[str]], sentences: Sentences) -> Encoder:
    """An encoder trained with InfoNCE: windows that overlap are positive, all others negative."""
    from pydoc_data.topics import topics

    texts: list[str] = []
    follower: list[int] = []
    for name in sorted(topics):
        cut = _cut(topics[name].split()[:LONGEST], STEP)
        follower += [len(texts) + min(i + 1, len(cut) - 1) for i in range(len(cut))]
        texts += cut
    latent = _latent([texts, sentences.texts], 256)
    inputs = torch.from_numpy(latent(texts)).float()
    scale = float(inputs.std())
    positive = torch.tensor(follower)
    with seeded(lab.seed):
        network = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
    generator = lab.generator()

    def train() -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        progress = lab.progress(range(1500), "encoder")
        for _ in progress:
            chosen = torch.randperm(len(inputs), generator=generator)[:256]
            loss = info_nce(
                network(inputs[chosen] / scale), network(inputs[positive[chosen]] / scale)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.metric(loss=loss.detach())

    lab.trained("encoder", network, train)

    def encode(some: Sequence[str]) -> Matrix:
        with torch.no_grad():
            return network(torch.from_numpy(latent(some)).float() / scale).double().numpy()

    return encode
