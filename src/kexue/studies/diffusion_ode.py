r"""The diffusion ODE: sampling, encoding and likelihood along one flow.

Random sampling from a diffusion model takes many steps, has no way back from an image to its
noise, and gives no likelihood. There is a deterministic flow with the same densities at every
time, and it gives all three. How accurate are they at a given number of network evaluations?

## Straight to the ODE

Let every point move by $\dot x = f_t(x)$. In a short time $\Delta$ a volume changes by the factor
$1 + \nabla \cdot f_t\, \Delta$, so along a path

$$\frac{d}{dt} \log p_t(x_t) = -\nabla \cdot f_t(x_t).$$

The left side is $\partial_t \log p_t + f_t \cdot \nabla \log p_t$, and what results,

$$\partial_t p_t = -\nabla \cdot (f_t\, p_t),$$

is the continuity equation: whatever $f$ satisfies it carries $p_0$ to $p_T$. Let points move
away from crowds, $f_t = -D_t \nabla \log p_t$, and it becomes the heat equation
$\partial_t p_t = D_t \nabla^2 p_t$. That one is solved by adding noise:
$p_t = p_0 * \mathcal N(0, \sigma_t^2 I)$ with $\sigma_t^2 = 2 \int D$. No stochastic equation was
needed. The drift of the reverse *random* process is twice as large; put into the ODE it would be
wrong, and the residual of the continuity equation shows that.

## One flow for every schedule

With $y = x/\bar\alpha$ and $\sigma = \bar\beta/\bar\alpha$ every Gaussian schedule is the heat
flow,

$$\frac{dy}{d\sigma} = -\sigma \nabla \log p_\sigma(y) = \hat\varepsilon
= \frac{y - \hat x_0}{\sigma},$$

and Euler's method for it is DDIM. But $\sigma$ is unbounded, 20291 at the end of the cosine
schedule. With the angle $\varphi = \arctan \sigma$ and $r = y \cos \varphi$

$$\frac{dr}{d\varphi} = \cos\varphi\, \hat\varepsilon - \sin\varphi\, \hat x_0,$$

which is the $v$-prediction: bounded for bounded data, over an interval shorter than
$\pi/2$.

## The density

Adding up the change of volume from the start to the end of the schedule,

$$\log p(x_{\text{start}}) = \log \mathcal N(x_T; 0, s^2 I)
+ d \log \frac{\bar\alpha_T}{\bar\alpha_{\text{start}}}
+ \int \nabla_y \cdot \hat\varepsilon \, d\sigma,$$

where $s$ is the scale of the prior. The divergence is $d$ vector–Jacobian products, or the mean of
$v^\top J v$ over random signs $v$. This is the density of data *noised to the start*. Two errors
are left: that of the solver, and that of taking the prior for the law of $x_T$, which is of first
order in the mean of the data.

## What decides it

For a mixture of Gaussians the denoiser, its density and its quantiles are known: all there is to
see are errors of the solver, in both coordinates, for three schedules. On the line the flow cannot
change the order of points, so it must match quantiles. For digits the denoiser is a network;
errors are distances to the flow solved in 200 steps, at equal evaluations of the network: a step
of Heun costs two. A likelihood of too few steps shows no sign of it, so they are doubled.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kexue.generative.diffusion import (
    DiscreteSchedule,
    GaussianMixtureDenoiser,
    HeatSchedule,
    ImageDenoiser,
    LogLikelihood,
    NoiseSchedule,
    continuity_residual,
    encode,
    heat_velocity,
    interpolate_latents,
    log_likelihood,
    solve_ode,
)
from kexue.generative.vae import uniform_dequantize
from kexue.lab import Lab
from kexue.lab.data import Images
from kexue.lab.sheets import sheet_figure
from kexue.studies._diffusion import three_gaussians, trained_denoiser

LIKELIHOOD_STEPS = (8, 16, 32, 64)
EVALUATIONS = (8, 16, 32)
SHOWN = {"sigma": "σ", "angle": "angle"}
SOLVERS = (
    *("DDIM, angle-spaced", "DDIM, σ-spaced"),
    *("DPM-Solver++(2M), angle-spaced", "DPM-Solver++(2M), σ-spaced"),
    *("Heun, angle", "Heun, σ"),
)


def run(lab: Lab) -> None:
    errors = mixture_likelihoods(lab)
    largest = max(error for (_, coordinate), error in errors.items() if coordinate == "angle")
    lab.claim("largest error along the angle at 32 steps, in nats", largest, "<=", 0.02)
    gain = min(errors[name, "sigma"] / errors[name, "angle"] for name, _ in errors)
    lab.claim("smallest ratio of the errors in $\\sigma$ and along the angle", gain, ">=", 10.0)
    lab.claim("largest error of matched quantiles, tolerance 1e-8", quantile_error(lab), "<=", 1e-4)
    trajectories(lab)
    residual_maps(lab)
    image_flow(lab)


def mixture_likelihoods(lab: Lab) -> dict[tuple[str, str], float]:
    """Measure errors of the log-density; return those at 32 steps."""
    schedules: dict[str, NoiseSchedule] = {"heat": HeatSchedule(80.0)}
    schedules |= {"linear": DiscreteSchedule.linear(), "cosine": DiscreteSchedule.cosine()}
    points = lab.pick(smoke=16, quick=64, full=512)
    rows, curves = [], {}
    numbers = lab.pick(smoke=(32, 64), quick=LIKELIHOOD_STEPS, full=LIKELIHOOD_STEPS)
    for name, schedule in lab.progress(list(schedules.items()), "mixture"):
        denoiser = three_gaussians(schedule)
        start = schedule.time_from_sigma(0.01).item()
        generator = lab.generator()
        clean = denoiser.sample(points, generator=generator)
        noise = torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
        x = schedule.add_noise(clean, noise, start)
        exact = denoiser.log_prob(x, start)
        for coordinate in SHOWN:
            options: dict[str, Any] = {"start": start, "method": "heun", "coordinate": coordinate}
            results = {
                steps: log_likelihood(denoiser, x, num_steps=steps, **options) for steps in numbers
            }
            curves[name, coordinate] = {
                steps: rms(result.log_prob - exact) for steps, result in results.items()
            }
            row = {f"{steps} steps": error for steps, error in curves[name, coordinate].items()}
            true_prior = denoiser.log_prob(results[64].latent, schedule.maximum_time)
            row["of this, the prior"] = rms(results[64].prior_log_prob - true_prior)
            rows.append({"schedule": name, "coordinate": SHOWN[coordinate], **row})
    lab.table(
        "Error of the log-density, in nats",
        rows,
        f"Root mean square over {points} points at σ = 0.01, Heun, exact denoiser and exact "
        "divergence. The last column is the difference of $\\log N(x_T; 0, s^2 I)$ and the true "
        "$\\log p(x_T)$, which no number of steps removes.",
    )
    lab.figure(
        "likelihood-error",
        likelihood_figure(curves),
        "The same method on the same flow: the bounded coordinate needs a fraction of the steps. "
        "Heun's error falls as the square of the number of steps, down to the prior's mismatch.",
    )
    return {key: curve[32] for key, curve in curves.items()}


def quantile_error(lab: Lab) -> float:
    """Compare the flow on the line with the matching of quantiles."""
    centres, variances, weights = [[-1.2], [0.514285714285714]], [0.04, 0.25], [0.3, 0.7]
    denoiser = GaussianMixtureDenoiser(
        *(torch.tensor(v, dtype=torch.float64) for v in (centres, variances, weights)),
        schedule=HeatSchedule(80.0),
    )
    probability = torch.linspace(0.01, 0.99, lab.pick(smoke=9, quick=99, full=99)).double()
    before, after = (quantiles(denoiser, probability, sigma) for sigma in (0.01, 1.0))
    options: dict[str, Any] = {"start": 0.01, "end": 1.0, "method": "dopri5", "coordinate": "angle"}
    usual = solve_ode(denoiser, before[:, None], **options).squeeze(1)
    reached = solve_ode(denoiser, before[:, None], rtol=1e-8, atol=1e-8, **options).squeeze(1)
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(before, after, label="quantiles of both densities")
    chosen = slice(0, None, max(1, len(before) // 24))
    axis.plot(before[chosen], reached[chosen], "o", markersize=4, label="flow")
    axis.set(xlabel="x at σ = 0.01", ylabel="x at σ = 1")
    axis.legend()
    lab.figure(
        "quantiles",
        figure,
        "On the line a flow cannot change the order of points: from the narrow mixture to the "
        "blurred one it moves each quantile to the same quantile. Adaptive steps with tolerance "
        f"1e-8; with 1e-5, the default, the largest error is {(usual - after).abs().max():.1e}.",
    )
    return (reached - after).abs().max().item()


def quantiles(denoiser: GaussianMixtureDenoiser, probability: Tensor, sigma: float) -> Tensor:
    """Return quantiles of the mixture on the line at noise sigma, by bisection."""
    weights = denoiser.log_weights.exp()
    deviation = (denoiser.eigenvalues.squeeze(1) + sigma**2).sqrt()
    low, high = torch.full_like(probability, -10.0), torch.full_like(probability, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        standard = (middle[:, None] - denoiser.means.squeeze(1)) / deviation
        below = torch.special.ndtr(standard) @ weights < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def trajectories(lab: Lab) -> None:
    """Draw the way of 200 points from noise to the mixture."""
    denoiser = three_gaussians(HeatSchedule(80.0))
    count, steps = lab.pick(smoke=(40, 12), quick=(200, 60), full=(200, 60))
    roots = torch.linspace(math.atan(80.0) ** 0.5, math.atan(0.01) ** 0.5, steps + 1)
    times = torch.tan(roots.double() ** 2).clamp(0.01, 80.0)
    x = 80.0 * torch.randn(count, 2, dtype=torch.float64, generator=lab.generator())
    path = [x]
    for here, there in pairwise(times):
        step = torch.stack([here, there])
        path.append(solve_ode(denoiser, path[-1], times=step, coordinate="angle"))
    rotated = torch.stack(path) / (1 + times**2).sqrt()[:, None, None]
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axis = figure.subplots()
    for line in rotated.unbind(1):
        axis.plot(*line.T, color="C0", linewidth=0.6, alpha=0.45)
    axis.plot(*rotated[0].T, ".", color="C1", markersize=4, label="start: noise")
    axis.plot(*rotated[-1].T, ".", color="black", markersize=4, label="end: data")
    axis.set(aspect="equal", xlabel="first coordinate of r", ylabel="second coordinate of r")
    axis.legend()
    lab.figure(
        "trajectories",
        figure,
        f"{count} points on the heat flow from σ = 80 to 0.01, shown as $r = y \\cos\\varphi$.",
    )


def residual_maps(lab: Lab) -> None:
    """Map the residual of the continuity equation for the right and for twice the velocity."""
    denoiser = three_gaussians(HeatSchedule(80.0))
    side, sigma = lab.pick(smoke=20, quick=80, full=80), 0.3
    values = torch.linspace(-2, 2, side, dtype=torch.float64)
    grid = torch.cartesian_prod(values, values)

    def residual(factor: float) -> Tensor:
        return continuity_residual(
            denoiser.log_prob, lambda x, t: factor * heat_velocity(denoiser, x, t), grid, sigma
        )

    maps = [residual(1.0), residual(2.0)]
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    largest = [values.abs().max().item() for values in maps]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, values, name in zip(axes, maps, ("−σ∇log p", "−2σ∇log p"), strict=True):
        style = {"cmap": "RdBu", "vmin": -largest[1], "vmax": largest[1]}
        plane = values.reshape(side, side).T
        shown = axis.imshow(plane, origin="lower", extent=(-2, 2, -2, 2), **style)
        axis.set(title=name, xlabel="x₁")
        axis.grid(False)
    axes[0].set_ylabel("x₂")
    figure.colorbar(shown, ax=axes, label="residual")
    lab.figure(
        "residual",
        figure,
        f"Residual of the continuity equation at σ = {sigma}. Right velocity: at most "
        f"{largest[0]:.1e}, rounding. Twice of it, the drift of the reverse random process: up to "
        f"{largest[1]:.1f}.",
    )


def image_flow(lab: Lab) -> None:
    images = lab.data.images()
    denoiser = trained_denoiser(lab, images)
    schedule = denoiser.schedule
    # Where the noise is a little above half a bin, t = 40 for the digits: an imperfect network
    # has nothing to say about finer detail.
    end = max(1.0, schedule.time_from_sigma(0.59 * images.bin_width).round().item())
    judge = lab.claim if lab.budget == "full" and lab.data.path is None else lab.observe

    errors = sampling_errors(lab, denoiser, end)
    ddim = min(errors[name][16] for name in errors if name.startswith("DDIM"))
    heun, dpm = errors["Heun, angle"], errors["DPM-Solver++(2M), angle-spaced"]
    statement = "error of DDIM on its better grid over that of Heun, angle, at 16 evaluations"
    judge(statement, ddim / heun[16], ">=", 3.0)

    states = dequantised(lab, images, denoiser, end)
    bits = image_likelihoods(lab, denoiser, images, states, end)
    change = abs(bits[64] - bits[32])
    judge("change of the likelihood from 32 to 64 steps, in bits per pixel", change, "<=", 0.01)
    options: dict[str, Any] = {"method": "heun", "coordinate": "sigma", "num_steps": 64}
    latent = encode(denoiser, states, start=end, **options)
    again = solve_ode(denoiser, latent, start=schedule.maximum_time, end=end, **options)
    judge("error of encoding and decoding, 64 steps of Heun each", rms(again - states), "<=", 0.01)
    apart = max(max(heun[n] / dpm[n], dpm[n] / heun[n]) for n in EVALUATIONS)
    lab.observe("largest factor between Heun, angle, and DPM-Solver++(2M)", apart, "<=", 1.5)
    sheets(lab, denoiser, end)
    interpolations(lab, denoiser, states, end)


def noises(lab: Lab, denoiser: ImageDenoiser, count: int) -> Tensor:
    shape, generator = (count, *denoiser.event_shape), lab.generator(lab.device)
    return torch.randn(shape, generator=generator, device=lab.device)


def angle_spaced(schedule: NoiseSchedule, end: float, num_steps: int) -> Tensor:
    """Return times from the largest to ``end`` at equal steps of the root of the angle."""
    ends = torch.tensor([schedule.maximum_time, end], dtype=torch.float64)
    first, last = torch.atan(schedule.sigma(ends)).sqrt().tolist()
    roots = torch.linspace(first, last, num_steps + 1, dtype=torch.float64)
    sigmas = torch.tan(roots**2).clamp(*schedule.sigma(ends).flip(0))
    times = schedule.time_from_sigma(sigmas)
    times[0], times[-1] = ends
    return times


def sampling_errors(lab: Lab, denoiser: ImageDenoiser, end: float) -> dict[str, dict[int, float]]:
    """Measure distances to the flow solved in 200 steps, by evaluations of the network."""
    schedule = denoiser.schedule
    count = lab.pick(smoke=8, quick=64, full=100) // (8 if denoiser.convolutional else 1)
    noise = noises(lab, denoiser, count)
    span = {"start": schedule.maximum_time, "end": end}
    heun: dict[str, Any] = {"method": "heun", **span}
    exact = solve_ode(denoiser, noise, coordinate="angle", num_steps=200, **heun)

    def solve(name: str, evaluations: int) -> Tensor:
        solver, grid = name.split(", ")
        if solver == "Heun":
            options: Any = {"coordinate": grid if grid == "angle" else "sigma", **heun}
            return solve_ode(denoiser, noise, num_steps=evaluations // 2, **options)
        method: Any = "euler" if solver == "DDIM" else "dpm_solver_2m"
        times = angle_spaced(schedule, end, evaluations) if grid == "angle-spaced" else None
        options = {"times": times, "num_steps": evaluations, **span}
        return solve_ode(denoiser, noise, method=method, **options)

    errors = {
        name: {n: rms(solve(name, n) - exact) for n in EVALUATIONS}
        for name in lab.progress(SOLVERS, "sampling")
    }
    lab.table(
        "Sampling error by evaluations of the network",
        [
            {"solver, grid": k, **{f"{n} evaluations": e for n, e in errors[k].items()}}
            for k in errors
        ],
        f"Root mean square over pixels in [−1, 1], {count} samples from $t = T$ to {end:g}, "
        "against 200 steps of Heun along the angle. σ-spaced is the grid of EDM, equal steps of "
        "$\\sigma^{1/7}$; angle-spaced has equal steps of $\\sqrt{\\varphi}$.",
    )
    return errors


def dequantised(lab: Lab, images: Images, denoiser: ImageDenoiser, end: float) -> Tensor:
    """Return held-out images with uniform noise of a bin, scaled to the state at ``end``."""
    count = lab.pick(smoke=4, quick=10, full=30) // (2 if denoiser.convolutional else 1)
    clean, generator = images.test.images[:count].to(lab.device), lab.generator(lab.device)
    filled = uniform_dequantize(clean, bin_width=images.bin_width, generator=generator)
    return filled * denoiser.schedule.signal_scale(end).to(filled)


def image_likelihoods(
    lab: Lab, denoiser: ImageDenoiser, images: Images, states: Tensor, end: float
) -> dict[int, float]:
    """Measure bits per pixel against steps, probes and tolerances; return those by steps."""
    dimensions = states[0].numel()
    exact = dimensions <= 256

    def likelihood(**options: Any) -> LogLikelihood:
        given = {"divergence_method": "exact" if exact else "hutchinson", **options}
        given["generator"] = lab.generator(lab.device)
        return log_likelihood(denoiser, states, start=end, **given)

    # The model of clean data is y = x/ᾱ: its density is that of x times ᾱ^d.
    stretch = math.log2(denoiser.schedule.signal_scale(end).item())

    def bits(result: LogLikelihood) -> float:
        code = result.bits_per_dimension(dimensions, bin_width=images.bin_width)
        return code.mean().item() - stretch

    rows = []

    def report(solver: str, coordinate: str, probes: str, result: LogLikelihood) -> None:
        row: dict[str, Any] = {"solver": solver, "coordinate": SHOWN[coordinate]}
        row |= {"divergence": probes, "evaluations": result.num_evaluations}
        row |= {"bits per pixel": bits(result)}
        rows.append({**row, "nats from row 4, rms": rms(result.log_prob - best.log_prob)})

    usual = "exact" if exact else "1 probe"
    best = likelihood(method="heun", num_steps=64)
    by_steps = {}
    for num_steps in lab.progress(LIKELIHOOD_STEPS, "likelihood"):
        result = best if num_steps == 64 else likelihood(method="heun", num_steps=num_steps)
        by_steps[num_steps] = bits(result)
        report(f"Heun, {num_steps} steps", "angle", usual, result)
    for num_steps in LIKELIHOOD_STEPS[1:]:
        result = likelihood(method="heun", num_steps=num_steps, coordinate="sigma")
        report(f"Heun, {num_steps} steps", "sigma", usual, result)
    random: dict[str, Any] = {"method": "heun", "divergence_method": "hutchinson"}
    for num_probes, words in ((1, "1 probe"), (8, "8 probes")):
        report("Heun, 64 steps", "angle", words, likelihood(num_probes=num_probes, **random))
    for coordinate in ("angle", "sigma"):
        result = likelihood(coordinate=coordinate, rtol=1e-3, atol=1e-3)
        report("adaptive, 1e-3", coordinate, usual, result)
    lab.table(
        f"Likelihood, {images.name}",
        rows,
        f"{len(states)} dequantised held-out images, density of the model at $t = {end:g}$, bins "
        f"of width {images.bin_width:.4g}. Rows in σ with few steps look like good models; "
        "doubling the steps shows what they are.",
    )
    return by_steps


def sheets(lab: Lab, denoiser: ImageDenoiser, end: float) -> None:
    """Show samples from the same noise for a growing number of evaluations."""
    noise, counts = noises(lab, denoiser, 24), (8, 16, 64)
    drawn = {}
    for evaluations in counts:
        times = nn.functional.pad(angle_spaced(denoiser.schedule, end, evaluations // 2), (0, 1))
        drawn[str(evaluations)] = solve_ode(denoiser, noise, times=times, coordinate="angle")
    lab.figure(
        "samples",
        sheet_figure(drawn),
        "From the same noise: 8, 16 and 64 evaluations in Heun steps along the angle, and one more "
        "for the clean image. More evaluations sharpen the same images.",
    )


def interpolations(lab: Lab, denoiser: ImageDenoiser, states: Tensor, end: float) -> None:
    """Show images decoded from between the codes of two held-out images."""
    weights = torch.linspace(0, 1, 9)
    latent = encode(denoiser, states[:4], start=end, coordinate="angle", num_steps=32)
    times = nn.functional.pad(angle_spaced(denoiser.schedule, end, 16), (0, 1))
    pairs = ((latent[:1], latent[1:2]), (latent[-2:-1], latent[-1:]))
    codes = [interpolate_latents(*pair, weights, method="slerp")[:, 0] for pair in pairs]
    drawn = solve_ode(denoiser, torch.cat(codes), times=times, coordinate="angle")
    lab.figure(
        "interpolation",
        sheet_figure({"": drawn}, len(weights)),
        "Left and right: held-out images, encoded and decoded. Between them: decoded from codes "
        "along the arc between the two, on which codes keep the norm that noise has.",
    )


def likelihood_figure(curves: dict[tuple[str, str], dict[int, float]]) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    markers = {"heat": "o", "linear": "s", "cosine": "^"}
    for (name, coordinate), curve in curves.items():
        style, label = "-" if coordinate == "angle" else "--", f"{name}, {SHOWN[coordinate]}"
        axis.plot(list(curve), list(curve.values()), style, marker=markers[name], label=label)
    axis.set(xscale="log", yscale="log", xlabel="steps of Heun", ylabel="error of log p, nats")
    axis.set_xticks(LIKELIHOOD_STEPS, labels=list(map(str, LIKELIHOOD_STEPS)), minor=False)
    axis.minorticks_off()
    axis.legend(fontsize="small", ncols=3)
    return figure


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
