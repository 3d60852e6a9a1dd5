r"""Policy gradient and zeroth-order optimisation: two roads to one gradient.

Accuracy, F1 and BLEU are staircases: their gradient is zero wherever it exists. There are two
cures. Sample *outputs*, and raise the probability of those that were rewarded: the policy gradient.
Sample *parameters*, and move towards those that did better: zeroth-order optimisation. Are they two
ideas, or one?

## The policy gradient

The objective is $\mathbb{E}\, r(y_t, \operatorname{argmax}_y p_\theta(y|x_t))$ with
$p_\theta = \operatorname{softmax}(f_\theta(x)/\tau)$. Replace the argmax by a draw:

$$\sum_y p_\theta(y|x)\, r(y), \qquad
\nabla \sum_y p_\theta(y|x)\, r(y)
= \mathbb{E}_{y \sim p}\bigl[(r(y) - b)\, \nabla \log p(y|x)\bigr].$$

By the rearrangement inequality the best $p$ orders the outputs as $r$ does, so the original
objective is satisfied too. The baseline $b$ may be anything that does not depend on $y$, because
$\sum_y \nabla p = 0$. The variance is least for
$b^* = \mathbb{E}[r |\nabla \log p|^2] / \mathbb{E}[|\nabla \log p|^2]$; for the logits of one
softmax $|\nabla_o \log p(y)|^2 = 1 - 2 p_y + |p|^2$, so $b^*$ has a closed form
(`optimal_baseline`). For sequences there are two that cost little and leave the mean as it is: the
mean reward of the *other* samples, and the reward of the greedy output. A mean that includes the
sample itself would shrink the gradient by $1 - 1/S$.

## The zeroth-order gradient

With directions $u$ of mean 0 and covariance $I$,

$$\tilde g = \mathbb{E}_u \Bigl[ \frac{f(\theta + \varepsilon u) - f(\theta - \varepsilon u)}
{2 \varepsilon}\, u \Bigr].$$

For normal $u$ this is *exactly* the gradient of $f_\varepsilon(\theta) = \mathbb{E} f(\theta +
\varepsilon u)$, for any $\varepsilon$ and for discontinuous $f$ as well (Stein). The difference of
both ends removes all even terms, so no baseline is needed. Its price is dimension: for a linear $f$
with gradient $a \in \mathbb{R}^d$ the covariance of one sample has the trace $(d + 1)|a|^2$.

## Why they are one

Let the noise define a policy, the probability that an output wins, $\pi_\varepsilon(y|x) =
P_u\bigl(\operatorname{argmax} f_{\theta + \varepsilon u}(x) = y\bigr)$. Then

$$\mathbb{E}_u R(\theta + \varepsilon u) = \sum_y \pi_\varepsilon(y|x)\, r(y),$$

and the zeroth-order gradient *is* the policy gradient of $\pi_\varepsilon$. With Gumbel noise on
the logits $\pi_\varepsilon$ is the softmax at temperature $\varepsilon$, exactly. Normal noise on
the weights of a linear classifier puts a standard deviation of $\varepsilon |x|$ on each logit, and
Gumbel noise of that size belongs to

$$\tau(x) = \frac{\sqrt 6}{\pi}\, \varepsilon |x| \approx 0.78\, \varepsilon |x| .$$

Perturbing parameters by $\varepsilon$ is sampling outputs at this temperature. At any other one the
two gradients differ, and they may even point in opposite directions.

## What decides it

A linear classifier of digits, half-way trained; the objective is the training accuracy itself, not
a smooth relative of it.

1. *Equivalence.* Zeroth-order gradient of the accuracy against the exact policy gradient at
   $\tau = c\, \varepsilon |x|$. The first is a noisy mean, whose cosine with anything is too small;
   with the cosine $\rho$ of two independent halves it is corrected by
   $\sqrt{2\rho/(1 + \rho)}$. At $c = \sqrt6/\pi$ the corrected cosine has to be at least 0.95 and
   the lengths have to agree to a tenth. Control: the customary $\tau = 1$, where the cosine must
   stay below 0.3.
2. *Dimension.* Variance of the accuracy's zeroth-order gradient in random subspaces, relative to
   the square of the gradient in them: a power of $d$ with exponent 1.
3. *Training.* From zero, the same number of steps: the zeroth-order classifier must be worse than
   that of the policy gradient, by 0.05 at least. Each method has the learning rate, of three, that
   trains best.

A sequence task (write the input backwards and stop) shows both baselines at work on F1 and BLEU.
The practical advice is that of the original article: policy gradient where there are many
parameters, after a start with cross-entropy; zeroth order for few parameters, for what has no
gradient at all, or where there is no memory for one.

## A direction is a seed

`ZerothOrderSGD` never stores a direction: it draws it again from its seed. So a run is a list of
seeds and coefficients, from which `replay` repeats it bit for bit, and machines that train together
exchange nothing but losses: at most $16N + 8$ bytes a step for $N$ directions, whatever the size of
the model. With `parallel="directions"` they share the directions, with `parallel="data"` the batch.

```python
torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
model = build(seed=0)  # the same parameters on every rank
optimizer = ZerothOrderSGD(
    model.parameters(), lr=1e-6, directions=8, parallel="directions"
)
for batch in batches:
    optimizer.step(lambda: loss(model, batch))
```

Two processes on one machine, and two machines with eight each (the same line on both; the address
is that of either of them, the port any free one):

```text
torchrun --standalone --nproc-per-node 2 train.py

torchrun --nnodes 2 --nproc-per-node 8 \
         --rdzv-id run1 --rdzv-backend c10d \
         --rdzv-endpoint first.example:29400 train.py
```

On CPUs gloo has to be told the network card where there are several: `GLOO_SOCKET_IFNAME=eth0`.
All ranks must be of one kind: a CPU and a GPU draw different directions from one seed. With
`TORCH_DISTRIBUTED_DEBUG=INFO` the first step checks that all start from equal parameters.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.lab import DataError, Lab, seeded
from kexue.losses import (
    PolicyGradientLoss,
    expected_reward,
    policy_gradient_loss,
    sample_actions,
    sentence_bleu,
    sequence_log_probability,
    token_f1,
)
from kexue.optim import ZerothOrderSGD, zeroth_order_gradient

MATCHED = math.sqrt(6) / math.pi
FACTORS = (0.3, 0.5, 0.65, MATCHED, 0.9, 1.0, 1.25, 1.6)
EPSILONS = (0.02, 0.05, 0.1, 0.2)
BLOCK = 50
"""Directions evaluated at once."""
DIRECTIONS = 20
"""Of one step in training."""
WIDTH = 0.05
"""Perturbation in training."""
PATIENCE = 5
"""Steps between two looks at the accuracy."""

CROSS_ENTROPY = "cross-entropy"
EXACT, SAMPLED = "policy gradient, exact", "policy gradient, 4 samples"
ZEROTH = f"zeroth order, {DIRECTIONS} directions"
RATES = {
    CROSS_ENTROPY: (0.02, 0.05, 0.1),
    EXACT: (0.02, 0.05, 0.1),
    SAMPLED: (0.02, 0.05, 0.1),
    ZEROTH: (0.03, 0.1, 0.3),
}
FORWARDS = {CROSS_ENTROPY: 1, EXACT: 1, SAMPLED: 1, ZEROTH: 2 * DIRECTIONS}
"""Passes through the training set a step."""


@dataclass(frozen=True)
class Problem:
    """Features with a constant, labels, and the same held out."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def accuracy(self, weights: Tensor) -> Tensor:
        """Training accuracy of many classifiers (samples, features, classes) at once."""
        count = len(weights)
        side_by_side = weights.permute(1, 0, 2).reshape(weights.shape[1], -1)
        logits = (self.x @ side_by_side).view(len(self.x), count, self.classes)
        return (logits.argmax(-1) == self.y[:, None]).double().mean(0)


def run(lab: Lab) -> None:
    problem = read_problem(lab)
    # The thresholds are those of the digits; on a user's images the numbers are reported.
    judge = lab.claim if lab.data.path is None else lab.observe
    weights = half_way(problem)

    rows = compare_gradients(lab, problem, weights)
    at = {row["ε"]: row for row in rows if row["c"] == MATCHED}
    judge(
        r"$\varepsilon = 0.1$, $\tau = \sqrt6/\pi \; \varepsilon |x|$: corrected cosine",
        at[0.1]["cosine"], ">=", 0.95,
    )  # fmt: skip
    judge("the same: ratio of the lengths", at[0.1]["ratio"], ">=", 0.9)
    judge("the same: ratio of the lengths", at[0.1]["ratio"], "<=", 1.1)
    control = max(abs(row["cosine"]) for row in rows if row["c"] is None and row["ε"] <= 0.1)
    judge(
        r"$\tau = 1$: largest size of the corrected cosine, $\varepsilon \leq 0.1$",
        control, "<=", 0.3,
    )  # fmt: skip

    exponent = grow_dimension(lab, problem, weights)
    judge("exponent of the dimension in the variance", exponent, ">=", 0.9)
    judge("exponent of the dimension in the variance", exponent, "<=", 1.1)

    scores = train_all(lab, problem)
    judge(
        "test accuracy of the policy gradient above zeroth order, equal steps",
        scores[SAMPLED] - scores[ZEROTH], ">=", 0.05,
    )  # fmt: skip

    write_backwards(lab)


def half_way(problem: Problem) -> Tensor:
    """A classifier after fifteen steps of cross-entropy."""
    weights = torch.zeros(problem.x.shape[1], problem.classes, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(problem.x @ weights, problem.y).backward()
        optimizer.step()
    return weights.detach()


def compare_gradients(lab: Lab, problem: Problem, weights: Tensor) -> list[dict]:
    """Both gradients of the accuracy, for perturbations and temperatures."""
    directions = lab.pick(smoke=200, quick=2000, full=8000)
    lengths = problem.x.norm(dim=1, keepdim=True)
    rows = []
    for epsilon in lab.progress(EPSILONS, "zeroth-order gradients"):
        generator = lab.generator()
        halves = []
        for _ in range(2):
            blocks = [
                zeroth_order_gradient(
                    problem.accuracy, weights, epsilon=epsilon, samples=BLOCK, generator=generator
                ).gradient
                for _ in range(directions // 2 // BLOCK)
            ]
            halves.append(torch.stack(blocks).mean(0))
        square = (halves[0] * halves[1]).sum().item()
        rho = cosine(*halves)
        attenuation = math.sqrt(2 * rho / (1 + rho)) if rho > 0 else math.nan
        zeroth = (halves[0] + halves[1]) / 2
        for c in (*FACTORS, None):
            temperature = 1.0 if c is None else c * epsilon * lengths
            exact = policy_gradient(problem, weights, temperature)
            rows.append(
                {
                    "ε": epsilon,
                    "c": c,
                    "cosine": cosine(zeroth, exact) / attenuation,
                    "ratio": math.sqrt(max(square, 0.0)) / exact.norm().item(),
                    "ρ": rho,
                }
            )
    shown = (0.5, MATCHED, 1.0, None)
    names = {0.5: "0.5 ε|x|", MATCHED: "√6/π ε|x|", 1.0: "ε|x|", None: "1"}
    lab.table(
        "Zeroth-order against policy gradient of the accuracy",
        [
            {
                "ε": row["ε"],
                "temperature τ": names[row["c"]],
                "corrected cosine": row["cosine"],
                "ratio of lengths": row["ratio"],
                "cosine of two halves": row["ρ"],
            }
            for row in rows
            if row["c"] in shown
        ],
        f"{directions} antithetic directions for each ε; the length of the zeroth-order gradient "
        "is that of the inner product of its halves, which noise does not raise.",
    )
    lab.figure(
        "temperature",
        temperature_figure(rows),
        r"Left: the two gradients agree around $c = \sqrt6/\pi$ (dotted), for every size of the "
        r"perturbation. Right: their lengths agree there too.",
    )
    return rows


def policy_gradient(problem: Problem, weights: Tensor, temperature: float | Tensor) -> Tensor:
    """Exact gradient of the expected accuracy: all outputs are listed."""
    leaf = weights.clone().requires_grad_()
    rewards = nn.functional.one_hot(problem.y, problem.classes)
    value = expected_reward(problem.x @ leaf, rewards, temperature=temperature).mean()
    return torch.autograd.grad(value, leaf)[0]


def grow_dimension(lab: Lab, problem: Problem, weights: Tensor) -> float:
    """Variance relative to the squared gradient in random subspaces; returns its exponent."""
    sizes = lab.pick(
        smoke={10: 2, 100: 1},
        quick={10: 10, 40: 8, 160: 4, weights.numel(): 2},
        full={10: 20, 40: 16, 160: 8, weights.numel(): 4},
    )
    samples = lab.pick(smoke=100, quick=500, full=1000)
    generator = lab.generator()
    means = {}
    for d, subspaces in lab.progress(sizes.items(), "subspaces"):
        variance = square = 0.0
        for _ in range(subspaces):
            basis = torch.linalg.qr(torch.randn(weights.numel(), d, generator=generator))[0]

            def accuracy(z: Tensor, basis: Tensor = basis) -> Tensor:
                return problem.accuracy(weights + (z @ basis.T).view(-1, *weights.shape))

            halves = []
            for _ in range(2):
                blocks = [
                    zeroth_order_gradient(
                        accuracy, torch.zeros(d), epsilon=0.1, samples=BLOCK, generator=generator
                    )
                    for _ in range(samples // BLOCK)
                ]
                halves.append(torch.stack([block.gradient for block in blocks]).mean(0))
                traces = [block.standard_error.square().sum().item() * BLOCK for block in blocks]
                variance += float(np.mean(traces)) / (2 * subspaces)
            square += (halves[0] * halves[1]).sum().item() / subspaces
        means[d] = variance / square
    # Where there is no signal to divide by there is no exponent: only a smoke test is so small.
    logarithms = np.log([max(value, 1e-12) for value in means.values()])
    exponent = float(np.polyfit(np.log(list(means)), logarithms, 1)[0])
    lab.table(
        "Variance of one direction over the squared gradient",
        [
            {"$d$": d, "measured": value, "linear function": d + 1, "subspaces": sizes[d]}
            for d, value in means.items()
        ],
        "Trace of the covariance of the zeroth-order gradient of the accuracy, antithetic, "
        f"ε = 0.1, over the square of that gradient; {2 * samples} directions a subspace, sums "
        "over the subspaces.",
    )
    lab.figure(
        "dimension",
        dimension_figure(means),
        "Each parameter more is more noise for all of them: the variance is parallel to the line "
        "$d + 1$ of a linear function. What lies above it is the staircase's own share.",
    )
    return exponent


def train_all(lab: Lab, problem: Problem) -> dict[str, float]:
    """Train with each method at its best rate; returns mean test accuracies."""
    steps = lab.pick(smoke=2, quick=50, full=150)
    seeds = lab.pick(smoke=1, quick=3, full=6)
    best: dict[str, tuple[float, float, np.ndarray]] = {}
    jobs = [(method, rate) for method, rates in RATES.items() for rate in rates]
    for method, rate in lab.progress(jobs, "training"):
        runs = np.array(
            [train(problem, method, rate, steps, 1000 * lab.seed + seed) for seed in range(seeds)]
        )
        reached = runs[:, -1, 0].mean()
        if method not in best or reached > best[method][1]:
            best[method] = rate, reached, runs
    lab.table(
        f"Accuracy after {steps} steps from zero",
        [
            {
                "method": method,
                "rate": rate,
                "training": reached,
                "test": runs[:, -1, 1].mean(),
                "worst": runs[:, -1, 1].min(),
                "best": runs[:, -1, 1].max(),
                "evaluations": steps * FORWARDS[method],
            }
            for method, (rate, reached, runs) in best.items()
        ],
        f"Means of {seeds} seeds; worst and best of the test accuracies. Adam for the methods with "
        "gradients. Of three rates the one with the highest training accuracy. A policy gradient "
        "from zero often gives up a class; that is what the start with cross-entropy is for.",
    )
    lab.figure(
        "training",
        training_figure({method: runs for method, (_, _, runs) in best.items()}),
        "Training accuracy per pass through the training set; bands reach from the worst to the "
        f"best seed. A zeroth-order step takes {FORWARDS[ZEROTH]} passes, and no gradient.",
    )
    return {method: float(runs[:, -1, 1].mean()) for method, (_, _, runs) in best.items()}


def train(
    problem: Problem, method: str, rate: float, steps: int, seed: int
) -> list[tuple[float, float]]:
    """Accuracy on training and test data, every few steps."""
    weights = torch.zeros(problem.x.shape[1], problem.classes, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    take = (
        zeroth_order_step(problem, weights, rate, seed)
        if method == ZEROTH
        else gradient_step(problem, weights, method, rate, generator)
    )
    curve = [look(problem, weights)]
    for step in range(1, steps + 1):
        take()
        if step % PATIENCE == 0 or step == steps:
            curve.append(look(problem, weights))
    return curve


def zeroth_order_step(
    problem: Problem, weights: Tensor, rate: float, seed: int
) -> Callable[[], object]:
    optimizer = ZerothOrderSGD(
        [weights], lr=rate, epsilon=WIDTH, directions=DIRECTIONS, maximize=True,
        exact_restore=True, seed=seed,
    )  # fmt: skip
    return lambda: optimizer.step(
        lambda: ((problem.x @ weights).argmax(-1) == problem.y).float().mean()
    )


def gradient_step(
    problem: Problem, weights: Tensor, method: str, rate: float, generator: torch.Generator
) -> Callable[[], object]:
    optimizer = torch.optim.Adam([weights], lr=rate)
    rewards = nn.functional.one_hot(problem.y, problem.classes)

    def loss() -> Tensor:
        logits = problem.x @ weights
        if method == CROSS_ENTROPY:
            return nn.functional.cross_entropy(logits, problem.y)
        if method == EXACT:
            return -expected_reward(logits, rewards).mean()
        actions = sample_actions(logits, samples=4, generator=generator)
        # One token each: sequences of length one.
        log_probability = sequence_log_probability(logits.unsqueeze(1), actions.unsqueeze(-1))
        return policy_gradient_loss(log_probability, actions == problem.y)

    def take() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return take


@torch.no_grad()
def look(problem: Problem, weights: Tensor) -> tuple[float, float]:
    sides = ((problem.x, problem.y), (problem.test_x, problem.test_y))
    training, test = (((x @ weights).argmax(-1) == y).float().mean().item() for x, y in sides)
    return training, test


def write_backwards(lab: Lab) -> None:
    """A network that writes its input backwards and stops, on F1 and on BLEU."""
    steps = lab.pick(smoke=2, quick=150, full=600)
    warm = lab.pick(smoke=2, quick=80, full=80)
    end, vocabulary, longest = 0, 7, 6
    generator = lab.generator()
    inputs, targets = backwards(4500, vocabulary, longest, end, generator)
    held_out, batch = slice(4000, None), 250
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "token F1": partial(token_f1, end_token=end),
        "BLEU": partial(sentence_bleu, end_token=end),
    }
    # Two decodes a target each: two samples, or one sample and the greedy output.
    baselines = {"leave-one-out": ("leave_one_out", 2), "self-critical": ("self_critical", 1)}

    def network() -> nn.Module:
        with seeded(lab.seed):
            model = nn.Sequential(
                nn.Flatten(),
                nn.Linear((longest + 1) * vocabulary, 128),
                nn.ReLU(),
                nn.Linear(128, (longest + 1) * vocabulary),
                nn.Unflatten(1, (longest + 1, vocabulary)),
            )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(warm):
            part = slice(step * batch % 4000, step * batch % 4000 + batch)
            logits = model(inputs[part]).flatten(0, 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, targets[part].flatten()).backward()
            optimizer.step()
        return model

    rows = []
    for name, metric in lab.progress(metrics.items(), "writing backwards"):
        for label, (baseline, samples) in baselines.items():
            model = network()
            start = reward_of(model, metric, inputs[held_out], targets[held_out])
            loss = PolicyGradientLoss(metric, samples=samples, baseline=baseline, end_token=end)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            draws = lab.generator()
            for step in range(steps):
                part = slice(step * batch % 4000, step * batch % 4000 + batch)
                optimizer.zero_grad()
                loss(model(inputs[part]), targets[part], generator=draws).backward()
                optimizer.step()
            last = reward_of(model, metric, inputs[held_out], targets[held_out])
            rows.append(
                {"reward": name, "baseline": label, "after cross-entropy": start,
                 f"{steps} steps later": last, "gain": last - start}
            )  # fmt: skip
    lab.table(
        "Writing backwards: reward of the greedy output, held out",
        rows,
        f"{warm} steps of cross-entropy, then {steps} of policy gradient on the reward itself, "
        "with two decodes of each target a step.",
    )
    for row in rows:
        lab.observe(
            f"{row['reward']}, {row['baseline']}: gain on held-out sequences", row["gain"], ">", 0.0
        )


def backwards(
    count: int, vocabulary: int, longest: int, end: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One-hot sequences of three to `longest` tokens, and the same backwards; both end."""
    tokens = torch.randint(1, vocabulary, (count, longest + 1), generator=generator)
    length = torch.randint(3, longest + 1, (count, 1), generator=generator)
    place = torch.arange(longest + 1)
    tokens = torch.where(place < length, tokens, end)
    mirrored = torch.where(place < length, tokens.gather(1, (length - 1 - place).clamp(min=0)), end)
    return nn.functional.one_hot(tokens, vocabulary).float(), mirrored


@torch.no_grad()
def reward_of(
    model: nn.Module, metric: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
) -> float:
    return metric(model(inputs).argmax(-1), targets).mean().item()


def cosine(one: Tensor, two: Tensor) -> float:
    return ((one * two).sum() / (one.norm() * two.norm())).item()


def read_problem(lab: Lab) -> Problem:
    images = lab.data.images()
    if images.train.labels is None or images.test.labels is None:
        raise DataError(f"{lab.data.path}: these images have no labels to learn")

    def features(split: Tensor) -> Tensor:
        flat = (split.flatten(1) + 1) / 2
        return torch.cat([flat, torch.ones(len(flat), 1)], 1)

    return Problem(
        x=features(images.train.images[:2000]),
        y=images.train.labels[:2000],
        test_x=features(images.test.images),
        test_y=images.test.labels,
        classes=int(images.train.labels.max()) + 1,
    )


def temperature_figure(rows: Sequence[Mapping]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for epsilon in EPSILONS:
        mine = [row for row in rows if row["ε"] == epsilon and row["c"] is not None]
        for ax, key in zip(axes, ("cosine", "ratio"), strict=True):
            ax.plot(
                [row["c"] for row in mine], [row[key] for row in mine], "o-", label=f"ε = {epsilon}"
            )
    for ax, what in zip(axes, ("corrected cosine", "ratio of lengths"), strict=True):
        ax.axvline(MATCHED, color="black", linestyle=":")
        ax.set_xlabel(r"$c$ in $\tau = c\,\varepsilon |x|$")
        ax.set_ylabel(what)
    axes[1].axhline(1.0, color="black", linestyle=":")
    axes[0].legend()
    return figure


def dimension_figure(means: Mapping[int, float]) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    sizes = np.array(list(means))
    ax.loglog(sizes, list(means.values()), "o", label="accuracy")
    ax.loglog(sizes, sizes + 1, label="$d + 1$")
    ax.set_xlabel("dimension $d$")
    ax.set_ylabel("variance / squared gradient")
    ax.legend()
    return figure


def training_figure(runs: Mapping[str, np.ndarray]) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for method, curves in runs.items():
        passes = PATIENCE * FORWARDS[method] * np.arange(1, curves.shape[1])
        accuracy = curves[:, 1:, 0]
        (line,) = ax.semilogx(passes, accuracy.mean(0), label=method)
        ax.fill_between(passes, accuracy.min(0), accuracy.max(0), alpha=0.2, color=line.get_color())
    ax.set_xlabel("passes through the training set")
    ax.set_ylabel("training accuracy")
    ax.legend()
    return figure
