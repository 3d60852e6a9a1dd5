"""Grown Transformers compute what the small ones did: logits, never accuracies.

All models have random biases, random gains of their norms and, where the dtype allows it, an
epsilon of 1e-2: with fresh ones of 0, 1 and 1e-12 most mistakes would leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kexue.nn.growth import Expansion, GrowthResult, grow_transformer

# Logits of order one to ten out of sums of at most 200 products: a few hundred roundings of 1e-16
# pass through two layers; the specified bound leaves two orders of magnitude.
EXACT = 1e-11
WIDTH, HEADS, KEY_HEADS, LAYERS, INSIDE, VOCABULARY = 24, 6, 2, 2, 20, 17
FAMILIES = ("gpt2", "bert", "llama", "mistral", "qwen2")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def configuration(family: str, **changes: Any) -> dict[str, Any]:
    if family == "gpt2":
        sizes = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_inner": INSIDE}
        more = {"n_positions": 16, "layer_norm_epsilon": 1e-2, "bos_token_id": 0, "eos_token_id": 0}
    else:
        sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
        more = {"intermediate_size": INSIDE, "max_position_embeddings": 16}
        if family == "bert":
            more |= {"layer_norm_eps": 1e-2}
        else:
            more |= {"num_key_value_heads": KEY_HEADS, "head_dim": 4, "rms_norm_eps": 1e-2}
    if family == "llama":
        more |= {"attention_bias": True, "mlp_bias": True}
    return {"model_type": family, "vocab_size": VOCABULARY, **sizes, **more, **changes}


def build(config: dict[str, Any], kind: str | None = None) -> nn.Module:
    """A model of the real class in float64, with nothing at its initial value."""
    transformers = pytest.importorskip("transformers")
    stem, usual = {
        "gpt2": ("GPT2", "LMHeadModel"),
        "bert": ("Bert", "ForPreTraining"),
        "llama": ("Llama", "ForCausalLM"),
        "mistral": ("Mistral", "ForCausalLM"),
        "qwen2": ("Qwen2", "ForCausalLM"),
    }[config["model_type"]]
    settings = getattr(transformers, f"{stem}Config")(**config)
    model = getattr(transformers, stem + (kind or usual))(settings)
    generator = seeded()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    # The norm of these models computes in float32 whatever it is given, which would hide
    # everything below 1e-7; torch's own has the same weight under the same name.
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double().eval()


def outputs(model: nn.Module) -> Tensor:
    tokens = torch.randint(VOCABULARY, (3, 9), generator=seeded(1))
    with torch.no_grad():
        output = model(tokens)
    logits = [output[name].flatten() for name in output if name.endswith("logits")]
    return torch.cat(logits)


def grow(model: nn.Module, **options: Any) -> tuple[GrowthResult, nn.Module]:
    config = {**model.config.to_dict(), "model_type": model.config.model_type}
    result = grow_transformer(model.state_dict(), config, generator=seeded(2), **options)
    large = build(result.config, type(model).__name__.removeprefix(_stem(model)))
    large.load_state_dict(result.state_dict, strict=True)
    return result, large


def _stem(model: nn.Module) -> str:
    return next(
        s for s in ("GPT2", "Bert", "Llama", "Mistral", "Qwen2") if s in type(model).__name__
    )


def difference(model: nn.Module, **options: Any) -> float:
    result, large = grow(model, **options)
    assert result.report.exact is (not result.report.reasons)
    return (outputs(large) - outputs(model)).abs().max().item()


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("attention", ["heads", "head_dim"])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_wider_models_give_the_same_logits(
    family: str, factor: int, attention: str, noise: float
) -> None:
    model = build(configuration(family))
    options = {"hidden_size": factor * WIDTH, "attention": attention, "noise": noise}
    assert difference(model, **options) < EXACT


@pytest.mark.parametrize("attention", ["heads", "head_dim"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_orthogonal_growth_gives_the_same_logits(family: str, attention: str) -> None:
    model = build(configuration(family))
    options = {"hidden_size": 3 * WIDTH, "attention": attention, "noise": 0.5}
    assert difference(model, scaling="orthogonal", **options) < EXACT


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", ["copy", "orthogonal"])
@pytest.mark.parametrize("width", [25, 40, 62])
def test_any_width_behind_rms_norm(width: int, scaling: str, tied: bool) -> None:
    model = build(configuration("mistral", tie_word_embeddings=tied))
    options = {"fill": "zero", "noise": 0.7, "scaling": scaling}
    assert difference(model, hidden_size=width, **options) < EXACT


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("size", [21, 33, 60])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_any_width_of_the_feedforward(family: str, size: int, noise: float) -> None:
    model = build(configuration(family))
    assert difference(model, intermediate_size=size, noise=noise) < EXACT


@pytest.mark.parametrize("layers", [3, 4, 7])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_deeper_models_change_nothing_at_all(family: str, layers: int) -> None:
    """The new branches add zeros, and x + 0 is x without a rounding."""
    assert difference(build(configuration(family)), num_layers=layers) == 0


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_width_and_depth_and_feedforward_in_one_call(family: str) -> None:
    model = build(configuration(family))
    options = {"hidden_size": 48, "num_layers": 5, "intermediate_size": 57, "noise": 0.3}
    assert difference(model, **options) < EXACT


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_layers_tied_or_not(family: str, tied: bool) -> None:
    model = build(configuration(family, tie_word_embeddings=tied))
    result, large = grow(model, hidden_size=2 * WIDTH, noise=0.3)
    assert (outputs(large) - outputs(model)).abs().max() < EXACT
    output = next(n for n in result.state_dict if n in ("lm_head.weight", _DECODER))
    embedding = next(n for n in result.state_dict if n.endswith(_EMBEDDINGS))
    assert (result.state_dict[output] is result.state_dict[embedding]) is tied


_DECODER = "cls.predictions.decoder.weight"
_EMBEDDINGS = ("wte.weight", "word_embeddings.weight", "embed_tokens.weight")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "ForMaskedLM"),
        ("bert", "ForSequenceClassification"),
        ("bert", "ForTokenClassification"),
        ("bert", "ForQuestionAnswering"),
        ("gpt2", "ForTokenClassification"),
    ],
)
def test_other_heads(family: str, kind: str) -> None:
    model = build(configuration(family), kind)
    if family == "gpt2":
        with pytest.raises(ValueError, match=r"classifier\.weight, classifier\.bias"):
            grow(model, hidden_size=2 * WIDTH)
        return
    assert difference(model, hidden_size=2 * WIDTH, noise=0.5) < EXACT


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_orthogonal_bert_without_a_prediction_head_is_exact(kind: str) -> None:
    model = build(configuration("bert"), kind)
    assert difference(model, hidden_size=3 * WIDTH, scaling="orthogonal", noise=0.5) < EXACT


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_names_without_the_prefix_of_the_whole_model(family: str) -> None:
    model = build(configuration(family), "Model")
    result, large = grow(model, hidden_size=2 * WIDTH)
    tokens = torch.randint(VOCABULARY, (2, 5), generator=seeded())
    with torch.no_grad():
        small, grown = model(tokens)[0], large(tokens)[0]
    # In front of a tied output layer the norm is divided by the copies.
    share = 0.5 if family == "gpt2" else 1.0
    expected = share * small.repeat_interleave(2, -1)
    torch.testing.assert_close(grown, expected, rtol=0, atol=EXACT)
    assert result.report.exact


def test_orthogonal_growth_keeps_lengths_and_divides_epsilon() -> None:
    model = build(configuration("gpt2"))
    result, _ = grow(model, hidden_size=2 * WIDTH, scaling="orthogonal")
    old, new = model.transformer.wte.weight, result.state_dict["transformer.wte.weight"]
    torch.testing.assert_close(new.norm(dim=1), old.norm(dim=1), rtol=1e-14, atol=0)
    assert result.config["layer_norm_epsilon"] == pytest.approx(0.5e-2, rel=1e-14)


def test_orthogonal_growth_with_the_old_epsilon_is_not_exact() -> None:
    """The mistake that the article leaves open, and that a small epsilon would hide."""
    model = build(configuration("gpt2"))
    result, _ = grow(model, hidden_size=2 * WIDTH, scaling="orthogonal")
    wrong = build({**result.config, "layer_norm_epsilon": 1e-2})
    wrong.load_state_dict(result.state_dict)
    assert (outputs(wrong) - outputs(model)).abs().max() > 1e-3


def test_copying_growth_keeps_epsilon() -> None:
    model = build(configuration("gpt2"))
    assert grow(model, hidden_size=72)[0].config["layer_norm_epsilon"] == 1e-2


@pytest.mark.parametrize(("epsilon", "low", "high"), [(1e-12, 0.0, 1e-9), (1e-2, 1e-4, 1.0)])
def test_orthogonal_bert_errs_as_its_one_epsilon_says(
    epsilon: float, low: float, high: float
) -> None:
    model = build(configuration("bert", layer_norm_eps=epsilon), "ForMaskedLM")
    options = {"hidden_size": 2 * WIDTH, "scaling": "orthogonal"}
    with pytest.raises(ValueError, match=r"^not lossless: .*epsilon"):
        grow(model, **options)
    result, large = grow(model, **options, require_exact=False)
    assert low <= (outputs(large) - outputs(model)).abs().max() < high
    assert not result.report.exact
    assert "epsilon" in result.report.reasons[0]


def test_heads_of_grouped_queries_stay_with_their_keys() -> None:
    model = build(configuration("llama"))
    result, _ = grow(model, hidden_size=3 * WIDTH)
    config, size = result.config, 4
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (18, 6)
    assert config["head_dim"] == 4
    prefix = "model.layers.0.self_attn."
    for name, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
        old = model.state_dict()[f"{prefix}{name}.bias"].reshape(heads, size)
        new = result.state_dict[f"{prefix}{name}.bias"].reshape(-1, size)
        assert torch.equal(new, old[torch.arange(3 * heads) // 3])
    # Query head j reads key head j // 3, a copy of the one that the copied query head read.
    j = torch.arange(18)
    assert torch.equal((j // 3) // 3, (j // 3) // (HEADS // KEY_HEADS))


def test_larger_heads_of_a_rotation_leave_keys_empty_and_queries_random() -> None:
    model = build(configuration("llama"))
    result, _ = grow(model, hidden_size=2 * WIDTH, attention="head_dim", noise=0.5)
    empty = Expansion.rotary(KEY_HEADS, 4, 2).source < 0
    prefix = "model.layers.1.self_attn."
    queries = result.state_dict[f"{prefix}q_proj.weight"]
    assert (queries.abs().sum(1) > 0).all()
    assert torch.count_nonzero(result.state_dict[f"{prefix}k_proj.bias"][empty]) == 0
    assert result.config["head_dim"] == 8


@pytest.mark.parametrize(
    "scaled",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ],
)
def test_rescaled_frequencies_that_allow_larger_heads(scaled: dict[str, Any]) -> None:
    rope = {"rope_theta": 100.0, **scaled}
    model = build(configuration("llama", rope_parameters=rope))
    options = {"hidden_size": 2 * WIDTH, "attention": "head_dim", "noise": 0.5}
    assert difference(model, **options) < EXACT


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.bad_input
def test_rescaled_frequencies_that_do_not(kind: str, key: str) -> None:
    config = configuration("llama", **{key: {"rope_type": kind}})
    state = build(configuration("llama")).state_dict()
    with pytest.raises(ValueError, match=f"{kind}.*'heads'"):
        grow_transformer(state, config, hidden_size=48, attention="head_dim")
    assert grow_transformer(state, config, hidden_size=48).report.exact


def test_repeating_units_inside_a_rotated_head_changes_the_function() -> None:
    """The article's own transformation, which it calls impossible for rotations: so it is."""
    model = build(configuration("llama"))
    result, large = grow(model, hidden_size=2 * WIDTH, attention="head_dim")
    state = dict(result.state_dict)
    for i in range(LAYERS):
        for name, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
            prefix = f"model.layers.{i}.self_attn.{name}"
            inside = Expansion.repeat(heads * 4, 2, scale=2**-0.25)
            read = Expansion.repeat(WIDTH, 2).read(model.state_dict()[f"{prefix}.weight"])
            state[f"{prefix}.weight"] = inside.write(read, 0)
            state[f"{prefix}.bias"] = inside.write(model.state_dict()[f"{prefix}.bias"])
    large.load_state_dict(state)
    assert (outputs(large) - outputs(model)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_weights_in_bfloat16_are_exact_for_powers_of_two(family: str) -> None:
    """Halves and quarters of bfloat16 numbers are bfloat16 numbers."""
    model, config = build(configuration(family)), configuration(family)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(half)
    result = grow_transformer(half, config, hidden_size=4 * WIDTH)
    assert all(t.dtype == torch.bfloat16 for t in result.state_dict.values())
    large = build(result.config)
    large.load_state_dict(result.state_dict)
    assert (outputs(large) - outputs(model)).abs().max() < 1e-10


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_float32_errs_by_its_rounding(family: str) -> None:
    model = build(configuration(family)).float()
    result, large = grow(model, hidden_size=3 * WIDTH, noise=0.3)
    small, grown = outputs(model), outputs(large.float())
    # Eps is 1.2e-7; the logits are of order ten and pass through tens of roundings.
    assert (grown - small).abs().max() < 1e-5 * small.abs().max().clamp(min=1)
    assert result.state_dict[next(iter(result.state_dict))].dtype == torch.float32


def test_layers_are_taken_in_order_and_only_copies_are_silent() -> None:
    model = build(configuration("gpt2"))
    result, _ = grow(model, num_layers=5)
    old, new = model.state_dict(), result.state_dict
    for j in range(5):
        i = j * LAYERS // 5
        name = "ln_1.weight"
        assert torch.equal(new[f"transformer.h.{j}.{name}"], old[f"transformer.h.{i}.{name}"])
        silent = torch.count_nonzero(new[f"transformer.h.{j}.attn.c_proj.weight"]) == 0
        assert silent == (j not in (0, 3))
        assert (torch.count_nonzero(new[f"transformer.h.{j}.mlp.c_proj.bias"]) == 0) == silent


def test_kinds_of_layers_follow_their_layers() -> None:
    config = configuration("qwen2", layer_types=["full_attention", "sliding_attention"])
    state = build(configuration("qwen2")).state_dict()
    grown = grow_transformer(state, config, num_layers=4).config["layer_types"]
    assert grown == ["full_attention"] * 2 + ["sliding_attention"] * 2


def test_post_norm_layers_are_stacked_only_when_exactness_is_waived() -> None:
    model = build(configuration("bert"))
    with pytest.raises(ValueError, match=r"^not lossless: a post-norm layer"):
        grow(model, num_layers=4)
    result, large = grow(model, num_layers=4, require_exact=False)
    assert not result.report.exact
    old = model.state_dict()["bert.encoder.layer.1.output.dense.weight"]
    assert torch.equal(large.state_dict()["bert.encoder.layer.3.output.dense.weight"], old)


def test_unequal_copies_behind_rms_norm_are_not_exact() -> None:
    model = build(configuration("mistral"))
    with pytest.raises(ValueError, match=r"^not lossless: the mean square.*fill='zero'"):
        grow(model, hidden_size=36)
    result, large = grow(model, hidden_size=36, require_exact=False)
    assert (outputs(large) - outputs(model)).abs().max() > 1e-3
    assert len(result.report.reasons) == 1


def test_the_report_counts_tied_parameters_once() -> None:
    model = build(configuration("gpt2"))
    result, large = grow(model, hidden_size=2 * WIDTH)
    assert result.report.old_parameters == sum(p.numel() for p in model.parameters())
    assert result.report.new_parameters == sum(p.numel() for p in large.parameters())
    assert result.report.symmetric


def test_noise_and_mere_depth_leave_no_symmetry() -> None:
    model = build(configuration("gpt2"))
    assert not grow(model, hidden_size=48, noise=0.1)[0].report.symmetric
    assert not grow(model, num_layers=3)[0].report.symmetric


def gradient_rank(noise: float) -> int:
    """Rank of the gradient of the first feed-forward matrix, which copies bound."""
    model = build(configuration("gpt2"))
    _, large = grow(model, hidden_size=2 * WIDTH, noise=noise)
    tokens = torch.randint(VOCABULARY, (8, 12), generator=seeded(5))
    large(tokens, labels=tokens).loss.backward()
    return int(torch.linalg.matrix_rank(large.transformer.h[0].mlp.c_fc.weight.grad, rtol=1e-10))


def test_without_noise_training_stays_in_the_small_space() -> None:
    assert gradient_rank(0.0) <= INSIDE < gradient_rank(0.3)


def test_zero_filled_models_receive_gradients_in_the_new_units() -> None:
    model = build(configuration("mistral"))
    _, large = grow(model, hidden_size=32, fill="zero", noise=0.3)
    tokens = torch.randint(VOCABULARY, (4, 9), generator=seeded(3))
    large(tokens, labels=tokens).loss.backward()
    assert (large.model.embed_tokens.weight.grad[tokens.unique(), WIDTH:] != 0).all()


def test_the_small_model_is_left_alone_and_results_are_new() -> None:
    model = build(configuration("bert"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = {**model.config.to_dict(), "model_type": "bert"}
    given = dict(config)
    result = grow_transformer(model.state_dict(), config, hidden_size=48, noise=0.3)
    assert config == given
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    old = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(tensor.data_ptr() not in old for tensor in result.state_dict.values())
    assert all(tensor.is_contiguous() for tensor in result.state_dict.values())


def test_a_configuration_object_will_do() -> None:
    model = build(configuration("llama"))
    result = grow_transformer(model.state_dict(), model.config, hidden_size=48)
    assert result.config["hidden_size"] == 48


def test_growing_nothing_gives_the_same_model() -> None:
    model = build(configuration("gpt2"))
    result, _ = grow(model, noise=0.5)
    assert all(torch.equal(result.state_dict[n], t) for n, t in model.state_dict().items())
    assert not result.report.symmetric


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gpt2", {"hidden_size": 25}, "multiple"),
        ("bert", {"hidden_size": 25, "require_exact": False}, "multiple"),
        ("gpt2", {"hidden_size": 48, "fill": "zero"}, "LayerNorm.*multiple"),
        ("gpt2", {"hidden_size": 12}, "hidden_size must be at least the old one, 24, got 12"),
        ("llama", {"intermediate_size": 19}, "intermediate_size .* 20, got 19"),
        ("llama", {"num_layers": 1}, "num_layers .* 2, got 1"),
        ("llama", {"attention": "both"}, "attention must be one of heads, head_dim"),
        ("llama", {"scaling": "none"}, "scaling must be one of copy, orthogonal"),
        ("llama", {"fill": "ones"}, "fill must be one of repeat, zero"),
        ("llama", {"noise": -1.0}, "noise"),
    ],
)
def test_what_cannot_be_is_refused(family: str, options: dict[str, Any], words: str) -> None:
    model = build(configuration(family))
    with pytest.raises(ValueError, match=words):
        grow(model, **options)


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {name: value for name, value in config.items() if name != key}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: {**config, "model_type": "t5"}, "model_type must be one of .*'t5'"),
        (without("n_embd"), "n_embd"),
        (lambda config: {**config, "n_layer": 1}, "1 layers.*h.1"),
        (lambda config: {**config, "n_layer": 3}, "3 layers.*number 2"),
        (lambda config: {**config, "n_inner": 30}, "length 20, .* expects 30"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change: Any, words: str) -> None:
    state = build(configuration("gpt2")).state_dict()
    with pytest.raises(ValueError, match=words):
        grow_transformer(state, change(configuration("gpt2")), hidden_size=48)


@pytest.mark.bad_input
def test_unknown_parameters_are_named() -> None:
    state = {**build(configuration("gpt2")).state_dict(), "transformer.h.0.gate": torch.ones(1)}
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.gate"):
        grow_transformer(state, configuration("gpt2"), hidden_size=48)
