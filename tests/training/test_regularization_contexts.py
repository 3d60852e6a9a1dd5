"""Context managers, randomness, precision, modes of autograd, and the words of refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from kexue.training.regularization import (
    VirtualAdversarialLoss,
    adversarial_perturbation,
    consistency_loss,
    freeze_running_statistics,
    gradient_penalty,
    laplacian,
    noisy_loss,
    parameter_adversarial_perturbation,
    parameter_noise,
    perturb_output,
    perturb_parameters,
    virtual_adversarial_perturbation,
)

F64 = torch.float64


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def points(n: int = 6, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, 3, dtype=dtype, generator=source())


# Every function that draws, or follows a gradient, in its usual form.
CALLS: dict[str, Callable[..., Tensor]] = {
    "noisy_loss": lambda net, x, g: noisy_loss(
        lambda v: net(v).square().sum(1), x, standard_deviation=0.1, generator=g
    ),
    "laplacian": lambda net, x, g: laplacian(
        lambda v: net(v).square().sum(1), x, estimator="hutchinson", generator=g
    ),
    "gradient_penalty": lambda net, x, g: gradient_penalty(
        net, x, estimator="rademacher", generator=g
    ),
    "consistency_loss": lambda net, x, g: consistency_loss(
        net, x, torch.randn(x.shape, generator=g, dtype=x.dtype)
    ),
    "adversarial_perturbation": lambda net, x, g: adversarial_perturbation(
        lambda v: net(v).square().sum(1), x, epsilon=0.3, random_start=True, steps=2, generator=g
    ),
    "linf": lambda net, x, g: adversarial_perturbation(
        lambda v: net(v).square().sum(1), x, epsilon=0.3, norm="linf", random_start=True,
        step_size=0.1, generator=g,
    ),
    "virtual_adversarial_perturbation": lambda net, x, g: virtual_adversarial_perturbation(
        net, x, epsilon=0.3, choose_sign=True, generator=g
    ),
    "VirtualAdversarialLoss": lambda net, x, g: VirtualAdversarialLoss(epsilon=0.3)(
        net, x, generator=g
    ),
    "finite difference": lambda net, x, g: VirtualAdversarialLoss(
        epsilon=0.3, hessian="finite_difference"
    )(net, x, generator=g),
}  # fmt: skip
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_a_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(
    call: Callable[..., Tensor],
) -> None:
    net, x = network(), points()
    state = torch.get_rng_state()
    one, again, other = (call(net, x, source(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    if call is not CALLS["consistency_loss"]:
        single = call(network(torch.float32), x.float(), source(1))
        # The same draws in every dtype: what differs is rounding.
        torch.testing.assert_close(single.double(), one, rtol=1e-3, atol=1e-5)


@every_call
def test_gradients_of_parameters_are_not_touched(call: Callable[..., Tensor]) -> None:
    net = network()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    call(net, points(), source())
    assert all((parameter.grad == 1).all() for parameter in net.parameters())


@every_call
def test_value_is_the_same_under_no_grad_and_carries_no_graph(call: Callable[..., Tensor]) -> None:
    net, x = network(), points()
    expected = call(net, x, source())
    with torch.no_grad():
        value = call(net, x.requires_grad_(), source())
    assert not value.requires_grad
    # A kernel may take another way without a graph.
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-14)


@every_call
def test_module_and_inputs_keep_their_state(call: Callable[..., Tensor]) -> None:
    net = nn.Sequential(*network(), nn.Dropout(0.0))
    net[1].eval()
    modes = [layer.training for layer in net.modules()]
    x = points()
    before, state = x.clone(), copy.deepcopy(net.state_dict())
    call(net, x, source())
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert [layer.training for layer in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@every_call
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_to_double(
    call: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    if call in (CALLS["consistency_loss"], CALLS["finite difference"]):
        pytest.skip("its own draws differ, or it is documented to need float32")
    net, x = network(dtype), points(dtype=dtype)
    value = call(net, x, source())
    expected = call(network().double(), x.double(), source())
    # Eight (eleven) bits in every one of some ten operations, on values of order 1.
    digits = 32 * torch.finfo(dtype).eps
    if call is CALLS["linf"]:  # a sign may flip where a gradient is zero
        assert ((value.double() - expected).abs() < digits).float().mean() > 0.9
    else:
        torch.testing.assert_close(
            value.double(), expected, rtol=digits, atol=digits * expected.abs().max().item()
        )
        assert torch.isfinite(value).all()


def test_under_autocast_the_divergence_is_in_float32() -> None:
    net, x = network(torch.float32), points(dtype=torch.float32)
    plain = VirtualAdversarialLoss(epsilon=0.5)(net, x, generator=source())
    with torch.autocast("cpu", torch.bfloat16):
        loss = VirtualAdversarialLoss(epsilon=0.5)(net, x, generator=source())
        penalty = gradient_penalty(net, x, metric="categorical")
    assert loss.dtype == penalty.dtype == torch.float32
    # Logits of eight bits: differences of order 0.1 are known to some percent.
    torch.testing.assert_close(loss, plain, rtol=0.15, atol=1e-3)
    (loss + penalty).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_gradient_reaches_inputs_and_so_an_embedding() -> None:
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 2)
    tokens = torch.tensor([[3, 1, 4], [1, 5, 0]])
    mask = (tokens != 0)[..., None]
    loss = VirtualAdversarialLoss(epsilon=0.5)(
        lambda e: head((e.tanh() * mask).sum(1)), embedding(tokens), mask=mask
    )
    penalty = gradient_penalty(lambda e: head(e.tanh().sum(1)), embedding(tokens))
    for value in (loss, penalty):
        embedding.zero_grad()
        value.backward(retain_graph=True)
        assert (embedding.weight.grad[tokens.unique()[1:]] != 0).any(1).all()


def test_attention_is_differentiated_twice_with_the_math_kernel_or_by_a_difference() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, dtype=F64)
    head = nn.Linear(8, 3, dtype=F64)

    def function(e: Tensor) -> Tensor:
        heads = e.unflatten(2, (2, 4)).transpose(1, 2)
        return head(scaled_dot_product_attention(heads, heads, heads).mean(2).flatten(1))

    def loss(**options: Any) -> Tensor:
        module = VirtualAdversarialLoss(epsilon=0.1, **options)
        return module(function, x, generator=source())

    with sdpa_kernel(SDPBackend.MATH):
        exact = loss()
        assert gradient_penalty(function, x).requires_grad
    difference = loss(hessian="finite_difference", xi=1e-4)
    torch.testing.assert_close(difference, exact, rtol=1e-3, atol=0)


def test_penalty_without_a_graph_is_for_looking() -> None:
    net, x = network(), points()
    value = gradient_penalty(net, x, create_graph=False)
    assert not value.requires_grad
    assert value.item() == gradient_penalty(net, x).item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_agree(reduction: Any) -> None:
    net, x = network(), points()
    loss = VirtualAdversarialLoss(epsilon=0.5, reduction="none")(net, x, generator=source())
    assert loss.shape == (6,)
    assert (loss > 0).all()
    expected = {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]
    found = VirtualAdversarialLoss(epsilon=0.5, reduction=reduction)(net, x, generator=source())
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_loss_shows_its_settings() -> None:
    shown = repr(VirtualAdversarialLoss(epsilon=0.25, metric="bernoulli"))
    assert "epsilon=0.25, iterations=1, metric='bernoulli', hessian='exact', xi=0.01" in shown


# Running statistics.

NORMS = {
    "batch 1d": (nn.BatchNorm1d, (8, 3)),
    "batch 2d": (nn.BatchNorm2d, (8, 3, 4, 4)),
    "instance": (lambda n: nn.InstanceNorm1d(n, track_running_stats=True), (8, 3, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_frozen_and_outputs_unchanged(
    layer: Callable[[int], nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(layer(3))
    x = 3 * torch.randn(shape) + 1
    module(x)
    module.train(training)
    before = copy.deepcopy(module.state_dict())
    expected = copy.deepcopy(module)(x)

    def interrupted() -> None:
        with freeze_running_statistics(module):
            assert torch.equal(module(x), expected)
            with freeze_running_statistics(module[0]):
                module(x)
            module(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module(x)
    changed = any(
        not torch.equal(value, before[name]) for name, value in module.state_dict().items()
    )
    assert changed == training


def test_virtual_loss_of_a_module_leaves_its_statistics_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()
    before = copy.deepcopy(module.state_dict())
    for hessian in ("exact", "finite_difference"):
        VirtualAdversarialLoss(epsilon=0.5, hessian=hessian)(module, points()).backward()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    VirtualAdversarialLoss(epsilon=0.5)(lambda x: module(x), points())
    assert module[1].num_batches_tracked > 0


# Parameters and outputs.


def test_parameters_come_back_bit_for_bit_even_after_an_exception() -> None:
    parameters = [nn.Parameter(torch.rand(50)), nn.Parameter(torch.rand(3, 4).half())]
    before = [p.detach().clone() for p in parameters]
    huge = [torch.full_like(p, 1e4) for p in parameters]
    # Adding and subtracting 1e4 would lose the digits.
    assert not torch.equal((before[0] + 1e4) - 1e4, before[0])

    def interrupted() -> None:
        with perturb_parameters(iter(parameters), iter(huge)):
            assert all(torch.equal(p, b + 1e4) for p, b in zip(parameters, before, strict=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    tied = parameters[0]
    with perturb_parameters([tied, tied], [huge[0], huge[0]]):
        torch.testing.assert_close(tied.detach(), before[0] + 2e4)
    assert torch.equal(tied, before[0])


def test_gradient_is_that_of_the_perturbed_parameters_inside_and_refused_outside() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    with perturb_parameters([weight], [torch.tensor([1.0])]):
        (weight**3).sum().backward()
        late = (weight**3).sum()
    assert weight.grad.item() == 27.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_parameter_noise_moves_trainable_parameters_only() -> None:
    torch.manual_seed(0)
    module = nn.Linear(100, 100)
    module.bias.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    moved = []
    for _ in range(2):
        with parameter_noise(module, standard_deviation=0.3, generator=source(5)):
            moved.append(module.weight.detach() - before["weight"])
            assert torch.equal(module.bias, before["bias"])
    assert torch.equal(*moved)
    # The standard error of a standard deviation from 10 000 draws is 1/√20 000 of it.
    assert moved[0].std().item() == pytest.approx(0.3, rel=5 / math.sqrt(20_000))
    assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())


def test_weights_are_perturbed_along_their_gradients() -> None:
    net, x, y = network(), points(), torch.tensor([0, 1, 2, 3, 0, 1])

    def loss() -> Tensor:
        return cross_entropy(net(x), y)

    clean = loss()
    clean.backward()
    parameters = list(net.parameters())
    r = parameter_adversarial_perturbation(parameters, epsilon=1e-6)
    for perturbation, p in zip(r, parameters, strict=True):
        assert perturbation.norm().item() == pytest.approx(1e-6, rel=1e-12)
        cosine = torch.cosine_similarity(perturbation.flatten(), p.grad.flatten(), dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-12)
    with perturb_parameters(parameters, r):
        gain = (loss() - clean).item() / 1e-6
    assert gain == pytest.approx(sum(p.grad.norm().item() for p in parameters), rel=1e-4)
    parameters[0].grad.zero_()
    assert (parameter_adversarial_perturbation(parameters[:1], epsilon=1.0)[0] == 0).all()


def test_sparse_gradients_of_an_embedding_are_taken() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    (r,) = parameter_adversarial_perturbation(embedding.parameters(), epsilon=1.0)
    expected = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])[:, None].expand(-1, 2) / math.sqrt(10)
    torch.testing.assert_close(r, expected)


def test_output_of_a_layer_is_perturbed_as_its_own_output_would_be() -> None:
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 2)
    tokens = torch.tensor([[3, 1, 4], [1, 5, 0]])
    model = nn.Sequential(embedding, nn.Tanh(), nn.Flatten(0, 1), head)
    r = adversarial_perturbation(
        lambda e: model[1:](e).unflatten(0, (2, 3)).square().sum((1, 2)),
        embedding(tokens),
        epsilon=0.3,
    )
    expected, clean = model[1:](embedding(tokens) + r), model(tokens)
    with perturb_output(embedding, r):
        perturbed = model(tokens)

    def interrupted() -> None:
        with perturb_output(embedding, r):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert torch.equal(perturbed, expected)
    assert torch.equal(model(tokens), clean)
    perturbed.sum().backward()
    assert embedding.weight.grad is not None


# Refusals.


def losses(x: Tensor) -> Tensor:
    return x.square().sum(1)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "metric": (
        lambda: gradient_penalty(network(), points(), metric="kl"),
        ValueError,
        "metric must be one of euclidean, categorical, bernoulli, got 'kl'",
    ),
    "estimator": (
        lambda: gradient_penalty(network(), points(), estimator="gaussian"),
        ValueError,
        "estimator must be one of exact, rademacher, got 'gaussian'",
    ),
    "estimator of the Laplacian": (
        lambda: laplacian(losses, points(), estimator="rademacher"),
        ValueError,
        "estimator must be one of exact, hutchinson, got 'rademacher'",
    ),
    "norm": (
        lambda: adversarial_perturbation(losses, points(), epsilon=1.0, norm="l1"),
        ValueError,
        "norm must be one of l2, linf, got 'l1'",
    ),
    "hessian": (
        lambda: VirtualAdversarialLoss(epsilon=1.0, hessian="fd"),
        ValueError,
        "hessian must be one of exact, finite_difference, got 'fd'",
    ),
    "reduction": (
        lambda: consistency_loss(network(), points(), points(), reduction="batchmean"),
        ValueError,
        "reduction must be one of mean, sum, none, got 'batchmean'",
    ),
    "negative epsilon": (
        lambda: adversarial_perturbation(losses, points(), epsilon=-1.0),
        ValueError,
        "epsilon must be a finite number of at least 0, got -1.0",
    ),
    "infinite epsilon": (
        lambda: virtual_adversarial_perturbation(network(), points(), epsilon=math.inf),
        ValueError,
        "epsilon .* got inf",
    ),
    "NaN for weights": (
        lambda: parameter_adversarial_perturbation([], epsilon=math.nan),
        ValueError,
        "epsilon .* got nan",
    ),
    "noise": (
        lambda: noisy_loss(losses, points(), standard_deviation=-0.1),
        ValueError,
        "standard_deviation",
    ),
    "noise of parameters": (
        lambda: parameter_noise(network(), standard_deviation=math.nan),
        ValueError,
        "standard_deviation",
    ),
    "xi": (
        lambda: VirtualAdversarialLoss(epsilon=1.0, xi=0.0),
        ValueError,
        "xi must be a finite number above 0",
    ),
    "steps": (
        lambda: adversarial_perturbation(losses, points(), epsilon=1.0, steps=0),
        ValueError,
        "steps must be an integer of at least 1, got 0",
    ),
    "iterations": (
        lambda: virtual_adversarial_perturbation(network(), points(), epsilon=1.0, iterations=-1),
        ValueError,
        "iterations must be an integer of at least 0, got -1",
    ),
    "odd samples": (
        lambda: noisy_loss(losses, points(), standard_deviation=1.0, samples=3, antithetic=True),
        ValueError,
        "samples must be even with antithetic=True, got 3",
    ),
    "reduced loss": (
        lambda: adversarial_perturbation(lambda x: losses(x).mean(), points(), epsilon=1.0),
        ValueError,
        r"per-sample losses of shape \(6,\), got shape \(\)",
    ),
    "loss a column": (
        lambda: laplacian(lambda x: losses(x)[:, None], points()),
        ValueError,
        r"per-sample losses of shape \(6,\), got shape \(6, 1\)",
    ),
    "batch of the function": (
        lambda: gradient_penalty(lambda x: network()(x).mean(0), points()),
        ValueError,
        r"batch of 6 .*got shape \(4,\)",
    ),
    "categorical with a length": (
        lambda: consistency_loss(lambda x: x[:, :, None], points(), points()),
        ValueError,
        r"categorical metric, got shape \(6, 3, 1\)",
    ),
    "perturbation": (
        lambda: consistency_loss(network(), points(), points()[:1]),
        ValueError,
        r"perturbation must have the shape of the inputs, \(6, 3\), got \(1, 3\)",
    ),
    "initial": (
        lambda: virtual_adversarial_perturbation(
            network(), points(), epsilon=1.0, initial=points()[:, :2]
        ),
        ValueError,
        r"initial must have the shape of the inputs, \(6, 3\), got \(6, 2\)",
    ),
    "mask": (
        lambda: virtual_adversarial_perturbation(
            network(), points(), epsilon=1.0, mask=torch.ones(6, dtype=torch.bool)
        ),
        ValueError,
        r"mask must be broadcastable to the inputs' shape \(6, 3\), got shape \(6,\)",
    ),
    "mask of numbers": (
        lambda: adversarial_perturbation(losses, points(), epsilon=1.0, mask=torch.ones(6, 3)),
        TypeError,
        "mask must be a bool tensor",
    ),
    "tokens": (
        lambda: VirtualAdversarialLoss(epsilon=1.0)(network(), torch.ones(2, 3, dtype=torch.long)),
        TypeError,
        "perturb the embedding output",
    ),
    "array": (
        lambda: gradient_penalty(network(), points().numpy()),
        TypeError,
        "inputs must be a torch tensor, got ndarray",
    ),
    "detached function": (
        lambda: gradient_penalty(lambda x: network()(x).detach(), points()),
        ValueError,
        "must depend on its argument",
    ),
    "function of other inputs": (
        lambda: adversarial_perturbation(
            lambda x: losses(network()(points())), points(), epsilon=1
        ),
        ValueError,
        "must depend on its argument",
    ),
    "model output": (
        lambda: consistency_loss(lambda x: {"logits": x}, points(), points()),
        TypeError,
        "function must return a tensor of real outputs, got dict",
    ),
    "empty mean": (
        lambda: consistency_loss(network(), points(0), points(0)),
        ValueError,
        "at least one sample, got an empty batch",
    ),
    "generator": (
        lambda: gradient_penalty(
            network(), points().to("meta"), estimator="rademacher", generator=source()
        ),
        ValueError,
        "generator must be on the device of the inputs",
    ),
    "no gradient": (
        lambda: parameter_adversarial_perturbation(network().parameters(), epsilon=1.0),
        ValueError,
        r"gradient, got None for number 0 of shape \(8, 3\)",
    ),
    "one tensor as parameters": (
        lambda: parameter_adversarial_perturbation(network()[0].weight, epsilon=1.0),
        TypeError,
        "parameters must be an iterable of tensors",
    ),
    "too few perturbations": (
        lambda: perturb_parameters(network().parameters(), [points()]),
        ValueError,
        "one perturbation for each of the 4 parameters, got 1",
    ),
    "shape of a perturbation": (
        lambda: perturb_parameters([points()], [points()[:1]]),
        ValueError,
        r"perturbation 0 must have its parameter's shape \(6, 3\), got \(1, 3\)",
    ),
    "no module": (
        lambda: freeze_running_statistics(lambda x: x),
        TypeError,
        "module must be an nn.Module, got function",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(("call", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_was_expected_and_what_came(
    call: Callable[[], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.bad_input
def test_output_of_another_shape_or_kind_is_refused() -> None:
    layer = nn.Linear(3, 4).double()
    with (
        perturb_output(layer, torch.zeros(4, dtype=F64)),
        pytest.raises(ValueError, match=r"\(6, 4\), got \(4,\)"),
    ):
        layer(points())
    recurrent = nn.GRU(3, 4).double()
    with (
        perturb_output(recurrent, torch.zeros(6, 4, dtype=F64)),
        pytest.raises(TypeError, match="one tensor, got tuple"),
    ):
        recurrent(points())


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host() -> None:
    net, x = network(torch.float32).cuda(), points(dtype=torch.float32).cuda()
    mask = torch.ones(6, 1, dtype=torch.bool, device="cuda")
    g = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for metric in ("euclidean", "categorical", "bernoulli"):
            VirtualAdversarialLoss(epsilon=0.5, metric=metric)(net, x, mask=mask, generator=g)
            gradient_penalty(net, x, metric=metric, estimator="rademacher", generator=g)
            virtual_adversarial_perturbation(net, x, epsilon=0.5, metric=metric, choose_sign=True)
        for norm in ("l2", "linf"):
            adversarial_perturbation(
                lambda v: net(v).square().sum(1), x, epsilon=0.5, norm=norm, random_start=True,
                steps=3, mask=mask, generator=g,
            )  # fmt: skip
        noisy_loss(lambda v: net(v).sum(1), x, standard_deviation=0.1, generator=g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = laplacian(lambda v: net(v).square().sum(1), x)
    host = laplacian(lambda v: net.cpu()(v).square().sum(1), x.cpu())
    torch.testing.assert_close(exact.cpu(), host, rtol=1e-4, atol=1e-5)


def test_noise_is_seen_under_autocast_and_gone_after_it() -> None:
    layer, x = nn.Linear(3, 1, bias=False), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        clean = layer(x)
        with perturb_parameters([layer.weight], [torch.full((1, 3), 100.0)]):
            assert (layer(x) - clean).item() == pytest.approx(300, rel=0.02)
        assert torch.equal(layer(x), clean)
