r"""Performer: attention in linear time by positive random features.

Softmax attention compares every query with every key: its cost grows with the square of the length.
If the weight $e^{q\cdot k}$ were an inner product $\phi(q)\cdot\phi(k)$ of finitely many features,
the sum over the keys could be taken once for all queries,

$$o_i = \frac{\sum_j e^{q_i\cdot k_j} v_j}{\sum_j e^{q_i\cdot k_j}}
= \frac{\phi(q_i)^\top \sum_j \phi(k_j)\, v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)},$$

and the cost would be linear. Performer draws such features at random. In the ideal case a trained
model could be converted without any training. Can it?

## The kernel as an expectation

Put $q \leftarrow \sqrt s\,q$ and $k \leftarrow \sqrt s\,k$ for the usual scale $s = 1/\sqrt d$. Up
to factors, $e^{q\cdot k}$ is a Gaussian of the difference,

$$e^{q\cdot k} = e^{|q|^2/2 + |k|^2/2}\, e^{-|q-k|^2/2},$$

whose Fourier transform is a Gaussian again. That gives cosines and sines, which may be negative, so
that a denominator may vanish. The article's step is to substitute $q \to -iq$, $k \to ik$: the left
side stays what it is, and the right side becomes real and positive,

$$e^{q\cdot k}
= \mathbb E_{w\sim N(0,I)}\Big[e^{w\cdot q - |q|^2/2}\; e^{w\cdot k - |k|^2/2}\Big],$$

as completing the square confirms. With $m$ draws,
$\phi_f(x) = m^{-1/2} e^{w_f\cdot x - |x|^2/2}$.

## How far it strays

With $z = q + k$, the relative error of one kernel value is

$$\frac{\sqrt{\operatorname{Var}}}{e^{q\cdot k}} = \sqrt{\frac{e^{|z|^2} - 1}{m}},$$

exponential in $|q+k|^2$. This decides about conversion: $|z|^2 = 4$ takes $54/\varepsilon^2$
features for an error of $\varepsilon$, and $|z|^2 = 8$ takes $3000/\varepsilon^2$. Positive
features are exact where the kernel is small ($z = 0$), trigonometric ones where $q = k$.

Directions that are orthogonal in blocks of $d$ are better than independent ones. For two rows of a
block $\mathbb E\,e^{w\cdot z + w'\cdot z} = {}_1F_1(d; \tfrac d2; \tfrac{|z|^2}2) < e^{|z|^2}$, so
with $B$ ordered pairs of rows inside blocks

$$\operatorname{Var} = e^{2 q\cdot k}\,\frac{e^{|z|^2} - 1}m - \frac B{m^2}\, e^{-|q|^2-|k|^2}
\Big(e^{|z|^2} - {}_1F_1(d; \tfrac d2; \tfrac{|z|^2}2)\Big).$$

The gain is sure and modest. The article also spreads the lengths of the rows evenly; that lowers
the variance much more, at the price of a bias.

## Where to put the origin

A constant subtracted from all keys changes each row of logits by a constant, which softmax does not
see. The estimate does, since $|q + k - c|^2$ is not $|q+k|^2$. On average that is least at

$$c = \operatorname{mean}(q) + \operatorname{mean}(k),$$

an exact change of the origin that costs nothing. How much it gains depends on the model. The one
below starts from small weights, as GPT-2 does. From the larger ones that torch draws by default,
$|z|^2$ stayed near 4 even with centred keys, and centring added only 0.13 to 0.26 to the accuracy.

## What is measured

A small encoder with softmax attention learns to read digits, one pixel a token. Then its attention
is replaced, with keys centred and not, and the accuracy is taken at once and after 40 more steps of
training. Three questions are decided by numbers fixed before: *no loss without retraining*, if at
once at least 0.98 of the accuracy remains at $m = 64$; *recovers quickly*, if 40 steps with
centred keys reach 0.97 of what the softmax model has after the same steps; *centring decides*, if
it adds 0.3 to the accuracy at once. The variance of orthogonal rows must stay below that of
independent ones and within 15 percent of the closed form. We expect the first to fail, as the
article and the paper report.

The rest are the article's reservations. $m$ has to exceed $d$ several times, so short sequences get
slower. Additive position biases, and masks that depend on the query, are impossible without an
attention matrix. And whoever trains from scratch may ask why softmax should be imitated at all,
when features without any randomness, $\operatorname{elu}(x) + 1$, are simpler.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from kexue.lab import Lab, seeded
from kexue.lab.data import Characters, Images
from kexue.models.transformer import Transformer, TransformerConfig
from kexue.nn.attention import MultiHeadAttention
from kexue.nn.linear_attention import (
    LinearAttention,
    PerformerAttention,
    RandomFeatures,
    replace_attention,
    softmax_kernel_variance,
)

DIM = 16
"""Of the vectors in the first panel."""
FEATURES: dict[str, dict[str, Any]] = {
    "independent": {"orthogonal": False},
    "orthogonal": {},
    "stratified": {"norm": "stratified"},
    "quantile": {"norm": "quantile"},
    "constant norm": {"norm": "sqrt_dim"},
    "hyperbolic": {"kind": "hyperbolic", "orthogonal": False},
    "trigonometric": {"kind": "trigonometric", "orthogonal": False},
}
CLOSED_FORMS: dict[str, dict[str, Any]] = {
    "independent": {}, "orthogonal": {"orthogonal": True},
    "hyperbolic": {"kind": "hyperbolic"}, "trigonometric": {"kind": "trigonometric"},
}  # fmt: skip
MakeCore = Callable[[MultiHeadAttention], nn.Module]
FINE_TUNING_STEPS = 40
JUDGED_FEATURES = 64


def run(lab: Lab) -> None:
    kernel_errors(lab)
    orthogonal_variance(lab)
    task = _task(lab)
    conversion(lab, task)
    speed(lab)
    from_scratch(lab, task)


def kernel_errors(lab: Lab) -> None:
    """Panel (a): relative errors of one kernel value."""
    draws = lab.pick(smoke=10, quick=200, full=200)
    norms, counts = (0.5, 1.0, 2.0, 4.0, 8.0), (16, 32, 64, 128, 256)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, name in enumerate(lab.progress(FEATURES, "kernel errors")):
        style = {"marker": "os^vD<>"[index], "linestyle": "", "color": f"C{index}"}
        error = partial(_kernel_error, name, draws=draws, seed=lab.seed)
        left.plot(norms, [error(norm, 64) for norm in norms], label=name, **style)
        right.plot(counts, [error(2.0, count) for count in counts], **style)
        if name in CLOSED_FORMS:
            dense = torch.logspace(math.log10(norms[0]), math.log10(norms[-1]), 60).tolist()
            left.plot(dense, [_exact_error(name, x, 64) for x in dense], color=f"C{index}")
            right.plot(counts, [_exact_error(name, 2.0, m) for m in counts], color=f"C{index}")
    left.set(yscale="log", xlabel="$|q+k|^2$", ylabel="relative error", title="$m = 64$")
    right.set(xlabel="rows $m$ of the projection", title="$|q+k|^2 = 2$")
    _logarithmic(left, norms)
    _logarithmic(right, counts)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    lab.figure(
        "kernel-errors",
        figure,
        f"Root mean square relative error of a kernel value in {DIM} dimensions, for orthogonal "
        f"$q$ and $k$ of equal length. Points: {draws} projections; lines: closed forms. On the "
        "right of the first panel the points fall below their lines, because a few rare rows carry "
        "the variance. Norms that are fixed in advance buy a low variance with a bias.",
    )


def orthogonal_variance(lab: Lab) -> None:
    """Enough projections to see the gain of orthogonal rows."""
    draws = lab.pick(smoke=500, quick=10_000, full=100_000)
    q, k = _pair(1.0)
    rows = []
    for m in (DIM, 2 * DIM):
        row: dict[str, float] = {"$m$": m}
        for name in ("independent", "orthogonal"):
            # Rows in whole blocks: one long projection is as many independent short ones.
            features = RandomFeatures(DIM, m * draws, generator=lab.generator(),
                                      dtype=torch.float64, **FEATURES[name])  # fmt: skip
            products = draws * features(q) * features(k)
            row[name] = float(products.unflatten(-1, (draws, m)).sum(-1).var())
            row[f"{name}, exact"] = _exact_error(name, 1.0, m) ** 2
        row["ratio"] = row["orthogonal"] / row["independent"]
        row["ratio, exact"] = row["orthogonal, exact"] / row["independent, exact"]
        rows.append(row)
    caption = f"Of {draws} projections in {DIM} dimensions, at $|q+k|^2 = 1$."
    lab.table("Variance of orthogonal rows", rows, caption)
    ratio = max(row["ratio"] for row in rows)
    lab.claim("variance of orthogonal rows over that of independent ones, largest", ratio, "<", 1.0)
    distance = max(abs(row["ratio"] / row["ratio, exact"] - 1) for row in rows)
    lab.claim("relative distance of that ratio from the closed form", distance, "<=", 0.15)


@dataclass(frozen=True)
class _Task:
    """What the small model learns, whatever the data are."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    causal: bool
    what: str

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        model.eval()
        inputs, targets = self.held_out
        predicted = [model(part).argmax(-1) for part in inputs.split(100)]
        return float((torch.cat(predicted) == targets).double().mean())


class _PixelReader(nn.Module):
    """Each pixel is a token; the class is read from the mean of the stream."""

    def __init__(self, channels: int, pixels: int, classes: int) -> None:
        super().__init__()
        config = TransformerConfig(
            vocab_size=1, dim=32, num_layers=2, num_heads=2, max_length=pixels, causal=False
        )
        self.embedding = nn.Linear(channels, 32)
        self.body = Transformer(config, position=nn.Embedding(pixels, 32))
        self.output = nn.Linear(32, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedding(images.flatten(2).mT)
        return self.output(self.body(inputs_embeds=tokens, return_hidden=True).mean(1))


def conversion(lab: Lab, task: _Task) -> None:
    """Panel (b): replace the attention of a trained model."""
    steps = lab.pick(smoke=3, quick=300, full=300)
    more = lab.pick(smoke=1, quick=FINE_TUNING_STEPS, full=FINE_TUNING_STEPS)
    draws = lab.pick(smoke=1, quick=3, full=4)
    tuned_draws = lab.pick(smoke=1, quick=1, full=2)
    base = _new(lab, task)
    build = partial(_trained, lab, task, None, steps)
    base.load_state_dict(lab.cache("softmax", lambda: build().state_dict()))
    before = task.accuracy(base)
    longer = copy.deepcopy(base)
    _train(lab, task, longer, more, 1e-3, "softmax, longer")
    after = task.accuracy(longer)
    origins(lab, task, base)

    now, later = "at once", f"after {more} steps"
    rows: list[dict[str, Any]] = [{"attention": "softmax", "keys": "", now: before, later: after}]
    counts = lab.pick(smoke=(8,), quick=(JUDGED_FEATURES,), full=(16, JUDGED_FEATURES, 256))
    results: dict[tuple[int, bool], dict[str, Any]] = {}
    for m, center in [(m, center) for m in counts for center in (True, False)]:
        models = [_converted(lab, task, base, m, center, draw) for draw in range(draws)]
        row = {"attention": f"Performer, m = {m}", "keys": "centred" if center else "as they are"}
        row[now] = sum(map(task.accuracy, models)) / draws
        for model in models[:tuned_draws]:
            _train(lab, task, model, more, 1e-3, f"performer, {m} rows")
        row[later] = sum(map(task.accuracy, models[:tuned_draws])) / tuned_draws
        rows.append(row)
        results[m, center] = row
    lab.table(
        "Conversion of a trained model",
        rows,
        f"Accuracy on {task.what}; softmax model trained for {steps} steps. Means of {draws} "
        f"projections at once, of {tuned_draws} after training.",
    )
    m = JUDGED_FEATURES if JUDGED_FEATURES in counts else counts[0]
    centred, plain = results[m, True], results[m, False]
    # A model of the user's own data is reported; the claims are about digits.
    judge = lab.claim if lab.data.path is None else lab.observe
    judge(f"accuracy at once over that of softmax, $m = {m}$", centred[now] / before, ">=", 0.98)
    judge(f"{later}, over softmax with the same, $m = {m}$", centred[later] / after, ">=", 0.97)
    judge(f"accuracy at once that centring adds, $m = {m}$", centred[now] - plain[now], ">=", 0.3)
    lab.observe(f"{later}, over softmax without them", centred[later] / before, ">=", 0.97)


def origins(lab: Lab, task: _Task, model: nn.Module) -> None:
    """What |q + k - c|² is in the trained model, for three origins c."""
    rows: list[dict[str, Any]] = []
    for layer, (query, key) in enumerate(_queries_and_keys(model, task.held_out[0][:16])):
        mean_q, mean_k = query.mean(2, keepdim=True), key.mean(2, keepdim=True)
        centers = {
            "none": torch.zeros_like(mean_k),
            "mean of the keys": mean_k,
            "mean of queries + mean of keys": mean_q + mean_k,
        }
        for name, center in centers.items():
            shifted = key - center
            z = (query[..., :, None, :] + shifted[..., None, :, :]).square().sum(-1)
            scale = query.shape[-1] ** -0.5
            row: dict[str, Any] = {"layer": layer + 1, "subtracted from the keys": name}
            row["median $|z|^2$"] = scale * z.median()
            error = torch.expm1(row["median $|z|^2$"]) / JUDGED_FEATURES
            row[f"error there, $m = {JUDGED_FEATURES}$"] = error.sqrt()
            rows.append(row)
    lab.table(
        "Where the origin is",
        rows,
        "Queries and keys of the trained softmax model, scaled. The relative error of a kernel "
        "value follows from $|z|^2$; it tells before any conversion how that will go.",
    )


def speed(lab: Lab) -> None:
    """Panel (c): time against length."""
    top = lab.pick(smoke=8, quick=11, full=13)
    lengths = [2**power for power in range(8, top + 1)]
    generator = lab.generator(lab.device)
    core = PerformerAttention(64, 256, generator=lab.generator()).to(lab.device).eval()
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, causal in zip(panels, (False, True), strict=True):
        times: dict[str, list[float]] = {"softmax": [], "Performer": []}
        for n in lab.progress(lengths, "speed"):
            q, k, v = torch.randn(3, 1, 4, n, 64, generator=generator, device=lab.device)
            softmax = partial(scaled_dot_product_attention, q, k, v, is_causal=causal)
            times["softmax"].append(_milliseconds(softmax, lab.device))
            performer = partial(core, q, k, v, is_causal=causal)
            times["Performer"].append(_milliseconds(performer, lab.device))
        kind = "causal" if causal else "both directions"
        for name, values in times.items():
            axes.plot(lengths, values, marker="o", markersize=4, label=name)
        axes.set(xlabel="length $n$", title=kind, yscale="log")
        _logarithmic(axes, lengths)
        pairs = zip(lengths, times["softmax"], times["Performer"], strict=True)
        faster = [n for n, softmax_time, performer_time in pairs if performer_time < softmax_time]
        if faster:
            lab.observe(f"shortest length with a gain, {kind}", faster[0], "<=", 8192)
    panels[0].set_ylabel("ms")
    panels[0].legend()
    lab.figure(
        "speed",
        figure,
        "Time of one call on this machine, four heads of size 64, $m = 256$, without gradients. "
        "Softmax is PyTorch's fused kernel.",
    )


def from_scratch(lab: Lab, task: _Task) -> None:
    """Panel (d): if it has to be trained anyway."""
    steps = lab.pick(smoke=2, quick=60, full=300)
    makers: dict[str, MakeCore | None] = {
        "softmax": None,
        "Performer": _performer(JUDGED_FEATURES, True, lab.seed),
        "elu + 1": lambda layer: LinearAttention(),
    }
    rows: list[dict[str, Any]] = [
        {"attention": name, "accuracy": task.accuracy(_trained(lab, task, make, steps))}
        for name, make in makers.items()
    ]
    lab.table(
        "Trained from scratch",
        rows,
        f"Accuracy on {task.what} after {steps} steps with the same batches; Performer with "
        f"$m = {JUDGED_FEATURES}$ and centred keys.",
    )
    gain = rows[1]["accuracy"] - rows[2]["accuracy"]
    lab.observe("accuracy of Performer minus that of elu + 1, from scratch", gain, ">", 0.0)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks([], minor=True)
    axes.set_xticks(values, [f"{value:g}" for value in values], fontsize="small")


def _task(lab: Lab) -> _Task:
    if lab.data.holds_text:
        return _text_task(lab)
    # More held out than by default: an accuracy of 0.85 has a standard error of 0.016.
    data = lab.data.digits(held_out=500) if lab.data.path is None else lab.data.images()
    return _image_task(lab, data)


def _image_task(lab: Lab, data: Images) -> _Task:
    if data.train.labels is None or data.test.labels is None:
        raise ValueError("this study needs images with labels, or a text; these have no labels")
    images, labels = data.train.images.to(lab.device), data.train.labels.to(lab.device)
    channels, pixels = images.shape[1], images.shape[2] * images.shape[3]
    size = max(8, min(64, 64 * 64 // pixels))
    classes = int(max(labels.max(), data.test.labels.max())) + 1

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(labels), (size,), generator=generator)
        return images[chosen], labels[chosen]

    held_out = data.test.images[:500].to(lab.device), data.test.labels[:500].to(lab.device)
    build = partial(_PixelReader, channels, pixels, classes)
    what = f"{len(held_out[1])} held out images of {data.name}"
    return _Task(build, batch, held_out, False, what)


def _text_task(lab: Lab) -> _Task:
    text = lab.data.text()
    characters = Characters(text, size=min(96, len(set(text)) + 1))
    length, tokens = 64, characters.tokens.to(lab.device)
    end = len(tokens) * 9 // 10
    if len(tokens) < 20 * length:
        raise ValueError(f"this study needs {20 * length} characters or more, got {len(tokens)}")
    config = TransformerConfig(
        vocab_size=len(characters), dim=32, num_layers=2, num_heads=2, max_length=length
    )

    def windows(starts: Tensor) -> tuple[Tensor, Tensor]:
        window = tokens[starts[:, None] + torch.arange(length + 1)]
        return window[:, :-1], window[:, 1:]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return windows(torch.randint(end - length, (32,), generator=generator))

    held_out = windows(torch.arange(end, len(tokens) - length - 1, length)[:200])
    build = partial(Transformer, config)
    what = "the next character of the held out part of your text"
    return _Task(build, batch, held_out, True, what)


def _new(lab: Lab, task: _Task) -> nn.Module:
    with seeded(lab.seed):
        return task.build().to(lab.device)


def _trained(lab: Lab, task: _Task, make_core: MakeCore | None, steps: int) -> nn.Module:
    model = _new(lab, task)
    if make_core is not None:
        replace_attention(model, make_core)
    _train(lab, task, model, steps, 3e-3, "training")
    return model


def _train(lab: Lab, task: _Task, model: nn.Module, steps: int, rate: float, label: str) -> None:
    generator = lab.generator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    bar = lab.progress(range(steps), label)
    for _ in bar:
        inputs, targets = task.batch(generator)
        loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.metric(loss=loss)


def _converted(
    lab: Lab, task: _Task, base: nn.Module, m: int, center: bool, draw: int
) -> nn.Module:
    model = copy.deepcopy(base).eval()
    seen = _queries_and_keys(model, task.batch(lab.generator())[0])
    replace_attention(model, _performer(m, center, 1000 * lab.seed + draw))
    if task.causal:
        for core, (query, key) in zip(_cores(model), seen, strict=True):
            core.calibrate_(query, key)
    return model


def _performer(m: int, center: bool, seed: int) -> MakeCore:
    options: dict[str, Any] = {"center": center, "generator": torch.Generator().manual_seed(seed)}
    return lambda layer: PerformerAttention(layer.key_dim, m, num_heads=layer.num_heads, **options)


def _cores(model: nn.Module) -> list[Any]:
    return [module.core for module in model.modules() if isinstance(module, MultiHeadAttention)]


@torch.no_grad()
def _queries_and_keys(model: nn.Module, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every layer, not scaled."""
    seen: list[tuple[Tensor, Tensor]] = []
    cores = _cores(model)
    hooks = [core.register_forward_pre_hook(lambda _, qkv: seen.append(qkv[:2])) for core in cores]
    model(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def _pair(norm: float) -> tuple[Tensor, Tensor]:
    """Orthogonal q and k of equal length: kernel value 1, |q + k|² = |q - k|² = norm."""
    q, k = torch.zeros(2, DIM, dtype=torch.float64)
    q[0] = k[1] = math.sqrt(norm / 2)
    return q, k


def _kernel_error(name: str, norm: float, m: int, *, draws: int, seed: int) -> float:
    q, k = _pair(norm)
    generator = torch.Generator().manual_seed(seed)
    features = RandomFeatures(DIM, m, generator=generator, dtype=torch.float64, **FEATURES[name])
    products = [features.redraw_(generator)(q) @ features(k) for _ in range(draws)]
    return float((torch.stack(products) - 1).square().mean().sqrt())


def _exact_error(name: str, norm: float, m: int) -> float:
    q, k = _pair(norm)
    return float(softmax_kernel_variance(q, k, m, **CLOSED_FORMS[name]).sqrt())


@torch.no_grad()
def _milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Shortest of some calls: what disturbs a clock only ever adds to it."""
    function()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)
