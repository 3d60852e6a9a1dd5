"""kexue.nn.init: samplers, NTK parametrisation, ramps, model initialisation, the audit."""

from __future__ import annotations

import copy
import json
import math

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kexue.nn.init import (
    GradualResidual,
    StandardizedActivation,
    advance_ramps,
    audit_signal,
    ntk_parametrize,
    softmax_saturation,
    transformer_init_,
    truncated_normal_,
    truncated_normal_moments,
    variance_scaling_,
)
from kexue.nn.residual import Residual

COUNT = 400_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("low", "high", "mean", "variance"),
    [
        (-2, 2, 0.0, 0.773741303549923247),
        (-1, 3, 0.28278611072715, 0.61614173535783),
        (-3, 3, 0.0, 0.97333692466254),
        (8, 9, 8.12118899297975, None),
        (-math.inf, math.inf, 0.0, 1.0),
        (0, math.inf, math.sqrt(2 / math.pi), 1 - 2 / math.pi),
    ],
)
def test_moments_on_an_interval(
    low: float, high: float, mean: float, variance: float | None
) -> None:
    found = truncated_normal_moments(low, high)
    assert found.mean == pytest.approx(mean, rel=1e-13, abs=1e-15)
    if variance is not None:
        assert found.variance == pytest.approx(variance, rel=1e-13)
    mirrored = truncated_normal_moments(-high, -low)
    assert mirrored.mean == pytest.approx(-found.mean, abs=1e-15)
    assert mirrored.variance == pytest.approx(found.variance, rel=1e-13)


def test_moments_far_out_keep_their_digits() -> None:
    """Mills' ratio at a: the excess over a is 1/a - 2/a^3 + 10/a^5 - 74/a^7 + ..."""
    a = 1000.0
    found = truncated_normal_moments(a, math.inf)
    assert found.mean - a == pytest.approx(1 / a - 2 / a**3, rel=1e-9)
    assert found.variance == pytest.approx(1 / a**2 - 6 / a**4, rel=1e-9)


def test_factor_of_two_standard_deviations() -> None:
    variance = truncated_normal_moments().variance
    assert math.sqrt(variance) == pytest.approx(0.879625661034239750, rel=1e-14)
    assert 1 / math.sqrt(variance) == pytest.approx(1.136847234338556472, rel=1e-14)


INTERVALS = [
    (-2, 2),
    (-1, 3),
    (-100, 100),
    (0.5, math.inf),
    (3, math.inf),
    (8, 9),
    (-7, -2),
    (-6, 0),
]


@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_draws_follow_the_law(low: float, high: float) -> None:
    """Kolmogorov-Smirnov; 1e-4 for each of eight intervals."""
    draw = truncated_normal_(
        torch.empty(20_000, dtype=torch.float64), low=low, high=high, rescale=False,
        generator=seeded(),
    )  # fmt: skip
    assert low <= draw.min() <= draw.max() <= high
    assert scipy.stats.kstest(draw.numpy(), scipy.stats.truncnorm(low, high).cdf).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "high"), [(-2, 2), (-1, 3), (3, math.inf)])
def test_result_has_the_moments_asked_for(low: float, high: float, dtype: torch.dtype) -> None:
    """Five standard errors; those of the deviation grow with the kurtosis, below 9 of the tail."""
    weight = torch.empty(COUNT // 1000, 1000, dtype=dtype)
    assert truncated_normal_(
        weight, 0.5, 0.1, low=low, high=high, generator=seeded()
    ) is weight  # fmt: skip
    rounding = 0.0 if dtype.itemsize >= 4 else 0.002
    assert weight.double().mean().item() == pytest.approx(0.5, abs=5 * 0.1 / COUNT**0.5 + rounding)
    assert weight.double().std().item() == pytest.approx(
        0.1, rel=5 * math.sqrt(8 / 4 / COUNT) + 3 * rounding
    )


def test_kurtosis_of_the_truncated_and_the_uniform_law() -> None:
    """Kurtosis 2.3653 and 1.8; standard error of a mean of fourth powers, below 6/sqrt(n)."""
    for distribution, expected in (("truncated_normal", 2.3653), ("uniform", 1.8), ("normal", 3)):
        weight = variance_scaling_(
            torch.empty(1000, COUNT // 1000, dtype=torch.float64), distribution=distribution,
            generator=seeded(),
        )  # fmt: skip
        standard = weight / weight.std()
        assert standard.pow(4).mean().item() == pytest.approx(expected, abs=5 * 10 / COUNT**0.5)


def test_nothing_saturates_at_far_bounds() -> None:
    weight = truncated_normal_(
        torch.empty(1000, 1000), std=1e-3, low=-100, high=100, generator=seeded()
    )
    assert weight.abs().max().item() < 8e-3


def test_truncation_is_in_standard_deviations() -> None:
    weight = truncated_normal_(torch.empty(1000, 1000), std=0.02, generator=seeded())
    assert 0.0454 < weight.abs().max().item() < 2 * 1.13685 * 0.02


def test_bounds_of_torch_are_absolute_and_cut_nothing_there() -> None:
    theirs = nn.init.trunc_normal_(torch.empty(1000, 1000), std=0.02, generator=seeded())
    assert theirs.abs().max().item() > 4 * 0.02


def test_post_norm_damps_the_shortcut_of_early_layers() -> None:
    """Eight sums of equal variance, each divided by the root of 2: x_0 keeps 2^-4 of itself."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2**0.5

    silent = nn.Linear(3, 3)
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    blocks = [Residual(silent, 3, style="post", norm=lambda dim: Half()) for _ in range(8)]
    x = torch.randn(2, 3, generator=seeded())
    torch.testing.assert_close(nn.Sequential(*blocks)(x), 0.0625 * x)


def test_same_generator_same_numbers_and_flags_stay() -> None:
    one, two = (nn.Parameter(torch.empty(3, 4)) for _ in range(2))
    truncated_normal_(one, generator=seeded(5))
    truncated_normal_(two, generator=seeded(5))
    assert torch.equal(one, two)
    assert one.requires_grad
    assert one.is_leaf
    strided = torch.empty(4, 3).T
    truncated_normal_(strided, generator=seeded(5))
    torch.testing.assert_close(strided, one.detach())
    assert truncated_normal_(torch.empty(0, 3)).shape == (0, 3)
    assert not truncated_normal_(torch.empty(3), std=0.0).any()


@pytest.mark.parametrize(
    ("mode", "fan"), [("fan_in", 3 * 25), ("fan_out", 400 * 25), ("fan_avg", 403 * 25 / 2)]
)
@pytest.mark.parametrize("distribution", ["truncated_normal", "normal", "uniform"])
def test_variance_is_scale_over_fan(mode: str, fan: float, distribution: str) -> None:
    weight = variance_scaling_(
        torch.empty(400, 3, 5, 5), scale=2.0, mode=mode, distribution=distribution,
        generator=seeded(),
    )  # fmt: skip
    relative = math.sqrt(2 / weight.numel())
    assert weight.var().item() == pytest.approx(2 / fan, rel=5 * relative)


def test_ntk_keeps_the_function_and_scales_the_gradient() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(50, 4).double(), torch.randn(3, 50, dtype=torch.float64)
    before = layer(x).detach()
    gradient = torch.autograd.grad(layer(x).sin().sum(), layer.weight)[0]
    assert ntk_parametrize(layer, gain=2**0.5) is layer
    torch.testing.assert_close(layer(x), before, rtol=1e-14, atol=1e-14)
    raw = layer.parametrizations.weight.original
    found = torch.autograd.grad(layer(x).sin().sum(), raw)[0]
    torch.testing.assert_close(found, gradient * math.sqrt(2 / 50), rtol=1e-12, atol=1e-14)
    other = ntk_parametrize(nn.Linear(50, 4).double(), gain=2**0.5)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), before, rtol=1e-14, atol=1e-14)


def test_ntk_draws_raw_parameters_of_size_one() -> None:
    layer = ntk_parametrize(nn.Linear(400, 300), reinitialize=True, generator=seeded())
    raw = layer.parametrizations.weight.original
    assert raw.std().item() == pytest.approx(1, rel=5 / math.sqrt(2 * raw.numel()))
    torch.testing.assert_close(layer.weight, raw / 20)


def test_ramp_rises_by_whole_steps_and_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        GradualResidual(nn.Linear(4, 4), steps=3),
        GradualResidual(nn.Linear(4, 4), mode="learned"),
        GradualResidual(nn.Linear(4, 4), steps=3000),
    )
    x = torch.randn(2, 4)
    assert torch.equal(model(x), x)
    assert advance_ramps(model) == 2
    assert model[0].alpha.item() == pytest.approx(1 / 3)
    other = copy.deepcopy(model)
    advance_ramps(model, 5)
    assert model[0].alpha.item() == 1.0
    other.load_state_dict(model.state_dict())
    other[0].advance(0)
    assert (other[0].alpha.item(), other[2].step_count.item()) == (1.0, 6)
    assert [name for name, _ in model.named_parameters() if "alpha" in name] == ["1.alpha"]
    half = model.half()
    half[2].advance(994)
    assert half[2].step_count.item() == 1000
    assert half[2].alpha.item() == pytest.approx(1 / 3, rel=1e-3)
    with pytest.raises(RuntimeError, match="learned"):
        model[1].advance()


def deviation(weight: Tensor, std: float) -> float:
    """Distance of the standard deviation in units of its standard error 1/sqrt(2n)."""
    return abs(weight.std().item() / std - 1) * math.sqrt(2 * weight.numel())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64, padding_idx=3)
        self.q_proj, self.k_proj = nn.Linear(64, 128), nn.Linear(64, 128)
        self.out_proj = nn.Linear(128, 64)
        self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)
        self.norm = nn.RMSNorm(64)


@pytest.mark.parametrize(
    ("scheme", "options", "expected", "embedding"),
    [
        ("lecun", {}, {"q_proj": 64**-0.5, "out_proj": 128**-0.5, "fc2": 1 / 16}, 1.0),
        ("t5", {"head_dim": 16}, {"q_proj": 1 / 32, "k_proj": 1 / 8, "out_proj": 128**-0.5}, 1.0),
        ("gpt2", {"num_layers": 8}, {"q_proj": 0.02, "fc1": 0.02, "fc2": 0.005}, 0.02),
        ("bert", {}, {"q_proj": 0.02, "out_proj": 0.02, "fc2": 0.02}, 0.02),
    ],
)
def test_schemes(scheme: str, options: dict, expected: dict, embedding: float) -> None:
    block = Block()
    nn.init.constant_(block.norm.weight, 3.0)
    roles = transformer_init_(block, scheme=scheme, generator=seeded(), **options)
    assert roles == {
        "embed.weight": "embedding", "q_proj.weight": "query", "k_proj.weight": "input",
        "out_proj.weight": "output", "fc1.weight": "input", "fc2.weight": "output",
    }  # fmt: skip
    for name, std in expected.items():
        assert deviation(getattr(block, name).weight, std) < 5, name
    kept = torch.arange(100) != 3
    assert deviation(block.embed.weight[kept], embedding) < 5
    assert not block.embed.weight[3].any()
    assert not any(getattr(block, name).bias.any() for name in ("q_proj", "out_proj", "fc2"))
    assert torch.equal(block.norm.weight, torch.ones(64))
    largest = block.k_proj.weight.abs().max() / block.k_proj.weight.std()
    assert (largest < 2.3) == (scheme in ("lecun", "bert"))


def test_attention_of_torch_is_three_blocks() -> None:
    attention = nn.MultiheadAttention(64, 4)
    nn.init.ones_(attention.in_proj_bias)
    roles = transformer_init_(attention, scheme="t5", head_dim=16, generator=seeded())
    assert roles == {"in_proj_weight": "query+input+input", "out_proj.weight": "output"}
    query, key, value = attention.in_proj_weight.chunk(3)
    for block, std in ((query, 1 / 32), (key, 1 / 8), (value, 1 / 8)):
        assert deviation(block, std) < 5
    assert not attention.in_proj_bias.any()
    unpacked = nn.MultiheadAttention(64, 4, kdim=32, vdim=48)
    roles = transformer_init_(unpacked, generator=seeded())
    assert roles["q_proj_weight"] == "query"
    assert deviation(unpacked.v_proj_weight, 48**-0.5) < 5


def test_gpt2_keeps_its_inputs_first() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=50, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    roles = transformer_init_(model, scheme="lecun", generator=seeded())
    assert roles["transformer.h.0.mlp.c_proj.weight"] == "output"
    assert deviation(model.transformer.h[0].mlp.c_proj.weight, 256**-0.5) < 5


def test_roles_can_be_given_and_skipped() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = model[1].weight.clone()
    roles = transformer_init_(model, role=lambda name, m: "input" if name == "0" else "skip")
    assert roles == {"0.weight": "input"}
    assert torch.equal(model[1].weight, before)


def test_saturation_of_known_rows() -> None:
    uniform = softmax_saturation(torch.zeros(5, 64))
    assert uniform.jacobian_norm == pytest.approx(math.sqrt(63) / 64)
    assert uniform.normalized_entropy == pytest.approx(1)
    assert uniform.largest_probability == pytest.approx(1 / 64)
    certain = softmax_saturation(torch.tensor([[0.0, 1e4, 0.0]]))
    assert (certain.jacobian_norm, certain.normalized_entropy) == (0.0, 0.0)
    masked = softmax_saturation(torch.tensor([[1.0, -math.inf, 3.0]]))
    assert masked.logit_second_moment == pytest.approx(5)
    logits = torch.randn(4, 6, 3, generator=seeded(), dtype=torch.float64)
    p = logits.softmax(1).movedim(1, -1)
    jacobian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    found = softmax_saturation(logits, dim=1)
    norms = torch.linalg.matrix_norm(jacobian)
    assert found.jacobian_norm == pytest.approx(norms.mean().item(), rel=1e-12)
    entropy = scipy.stats.entropy(p.numpy(), axis=-1).mean() / math.log(6)
    assert found.normalized_entropy == pytest.approx(entropy)


def test_scale_of_the_logits_decides_the_entropy() -> None:
    """q·k has second moment d; standard error of 64x64 products, five of them."""
    q, k = (torch.randn(64, 256, generator=seeded(s), dtype=torch.float64) for s in (0, 1))
    raw, scaled = softmax_saturation(q @ k.T), softmax_saturation(q @ k.T / 16)
    assert raw.logit_second_moment == pytest.approx(256, rel=5 * math.sqrt(2) / 64)
    assert raw.normalized_entropy < 0.2
    assert scaled.normalized_entropy > 0.8


@pytest.mark.parametrize(
    ("name", "second_moment"),
    [
        ("sigmoid", 0.293379035858092963),
        ("tanh", 0.394294490397841174),
        ("gelu", 0.425221482570298675),
        ("silu", 0.355775519817352156),
    ],
)
def test_standardized_activations_keep_the_second_moment(name: str, second_moment: float) -> None:
    """Standard error of a mean of 4e5 squares, each of deviation below 4."""
    plain = StandardizedActivation(name)
    assert plain.scale == pytest.approx(second_moment**-0.5, rel=1e-12)
    z = torch.randn(COUNT, generator=seeded(), dtype=torch.float64)
    assert plain(z).square().mean().item() == pytest.approx(1, abs=5 * 4 / COUNT**0.5)
    centred = StandardizedActivation(name, center=True)
    assert centred(z).mean().item() == pytest.approx(0, abs=5 / COUNT**0.5)
    assert centred(z).var().item() == pytest.approx(1, abs=5 * 4 / COUNT**0.5)


def test_selu_is_standardized_already() -> None:
    for center in (True, False):
        selu = StandardizedActivation("selu", center=center)
        assert selu.shift == pytest.approx(0, abs=1e-12)
        assert selu.scale == pytest.approx(1, abs=1e-12)


def test_standardized_module_is_a_part() -> None:
    activation = StandardizedActivation(nn.PReLU(init=0.5), center=True)
    assert [name for name, _ in activation.named_parameters()] == ["activation.weight"]
    with pytest.raises(ValueError, match="constant"):
        StandardizedActivation(lambda x: 0 * x)


def test_audit_measures_what_passes_and_what_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)).double()
    x = torch.randn(10, 6, dtype=torch.float64)
    report = audit_signal(model, x, compute_loss=lambda y: y.square().mean())
    first = model[0](x)
    hidden = first.detach().clone().requires_grad_()
    active = hidden.relu()
    out = model[2](active)
    loss = out.square().mean()
    to_hidden, to_active, to_out = torch.autograd.grad(loss, (hidden, active, out))
    expected = {
        "0": (x, hidden, to_hidden), "1": (hidden, active, to_active), "2": (active, out, to_out),
    }  # fmt: skip
    assert report.loss == pytest.approx(loss.item())
    for name, (given, output, gradient) in expected.items():
        record = report[name]
        assert record.calls == 1
        assert record.output_second_moment == pytest.approx(output.square().mean().item())
        assert record.output_mean == pytest.approx(output.mean().item())
        assert record.gradient_second_moment == pytest.approx(gradient.square().mean().item())
        if name != "1":
            assert record.input_second_moment == pytest.approx(given.square().mean().item())
    zeros = (active == 0).double().mean().item()
    assert report["1"].zero_fraction == pytest.approx(zeros)
    with pytest.raises(KeyError, match="'3'"):
        report["3"]


def test_audit_in_inference_mode_measures_the_same() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        torch.randn(5, 4),
    )
    with torch.inference_mode():
        inside = audit_signal(model, x)
    assert inside == audit_signal(model, x)


def test_audit_averages_calls_and_skips_what_is_not_called() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
            self.embed = nn.Embedding(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.shared(self.shared(self.embed(tokens)))

    model, tokens = Twice(), torch.arange(5)
    report = audit_signal(model, tokens)
    once = model.shared(model.embed(tokens))
    both = [once, model.shared(once)]
    assert report["shared"].calls == 2
    assert report["shared"].output_second_moment == pytest.approx(
        sum(y.square().mean().item() for y in both) / 2
    )
    assert math.isnan(report["embed"].input_second_moment)
    assert report["embed"].gradient_second_moment is None
    assert [record.name for record in report.records] == ["shared", "embed"]


def test_audit_names_the_first_bad_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(12)])
    with torch.no_grad():
        for layer in model[:4]:
            nn.init.orthogonal_(layer.weight)
        for layer in model[4:]:
            layer.weight.mul_(0.01)
            layer.bias.zero_()
        model[2].weight.mul_(1e4)
        model[3].weight.mul_(1e-4)
    report = audit_signal(model, torch.randn(16, 32), compute_loss=lambda y: y.square().mean())
    by_message = {finding.message.split()[1]: finding for finding in report.findings()}
    assert by_message["exploding"].where == "2"
    assert by_message["vanishing"].where == "4"
    assert report["2"].flags == ("exploding",)
    assert json.loads(json.dumps(report.to_dict()))["records"][4]["flags"] == ["vanishing"]
    assert str(report).splitlines()[0].split()[:3] == ["module", "kind", "calls"]
    ax = report.plot()
    assert len(ax.lines) >= 2
    dead = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    nn.init.constant_(dead[0].bias, -1e3)
    assert audit_signal(dead, torch.randn(3, 4))["1"].flags == ("vanishing", "dead")
    broken = audit_signal(dead, torch.full((3, 4), math.nan))
    assert broken.findings()[0].severity == "error"
    assert broken["0"].flags == ("non-finite",)


def test_audit_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    x, wrong = torch.randn(8, 3, requires_grad=True), torch.randn(8, 7)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    audit_signal(model, x, compute_loss=lambda y: y.sum())
    with pytest.raises(RuntimeError):
        audit_signal(model, wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.bad_input
def test_wrong_calls_are_refused() -> None:
    weight = torch.empty(3, 4)
    for wrong in ({"std": -1.0}, {"std": math.inf}, {"mean": math.nan}, {"low": 1.0, "high": 1.0},
                  {"low": 0.0, "high": 1e-7}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            truncated_normal_(weight, **wrong)
    with pytest.raises(TypeError, match="int64"):
        truncated_normal_(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least two dimensions"):
        variance_scaling_(torch.empty(3))
    for wrong in ({"scale": 0.0}, {"mode": "fan"}, {"distribution": "cauchy"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            variance_scaling_(weight, **wrong)
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="at least two dimensions"):
        ntk_parametrize(layer, name="bias")
    with pytest.raises(ValueError, match="no parameter named 'gain'"):
        ntk_parametrize(layer, name="gain")
    ntk_parametrize(layer)
    with pytest.raises(ValueError, match="already"):
        ntk_parametrize(layer)
    with pytest.raises(ValueError, match="steps"):
        GradualResidual(layer, steps=0)
    with pytest.raises(ValueError, match="mode"):
        GradualResidual(layer, mode="sudden")
    for wrong, message in (
        ({"scheme": "xavier"}, "scheme"), ({"scheme": "t5"}, "needs head_dim"),
        ({"scheme": "gpt2"}, "needs num_layers"), ({"embedding_std": -1.0}, "embedding_std"),
        ({"role": lambda name, module: "value"}, "got 'value'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            transformer_init_(nn.Sequential(nn.Linear(3, 3)), **wrong)
    with pytest.raises(ValueError, match="no linear layer and no embedding"):
        transformer_init_(nn.ReLU())
    with pytest.raises(ValueError, match="two entries"):
        softmax_saturation(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="no module"):
        audit_signal(nn.Linear(3, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"one element, got \(1, 3\)"):
        audit_signal(nn.Sequential(nn.Linear(3, 3)), torch.zeros(1, 3), compute_loss=lambda y: y)
    with pytest.raises(ValueError, match="low must be below"):
        audit_signal(nn.Sequential(nn.Linear(3, 3)), torch.zeros(1, 3), low=2.0, high=1.0)
