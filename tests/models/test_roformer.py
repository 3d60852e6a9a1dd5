"""Tests of kexue.models.roformer: configuration, encoder, heads, initialisation."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from kexue.models.roformer import (
    RoFormerV2Config,
    RoFormerV2ForMaskedLM,
    RoFormerV2ForSequenceClassification,
    RoFormerV2Model,
    convert_tensorflow_variables,
    initialize_weights,
)

TINY = RoFormerV2Config(9, 4, 2, 1, 6)
SMALL = RoFormerV2Config(
    30, 16, 2, 4, 24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
DIGITS = 1e-9
"""The oracles are printed with ten decimals; a forward in float64 keeps more."""


def formula_variables(config: RoFormerV2Config = TINY) -> dict[str, np.ndarray]:
    """Tensor n of the sorted names has the flat entries 0.5 sin(0.7 n + 0.3 j)."""
    d, f = config.hidden_size, config.intermediate_size
    shapes = {
        "bert/embeddings/word_embeddings": (config.vocab_size, d),
        "bert/embeddings/token_type_embeddings": (config.type_vocab_size, d),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"bert/encoder/layer_{layer}/"
        for name in ("self/query", "self/key", "self/value", "output/dense"):
            shapes[f"{prefix}attention/{name}/kernel"] = (d, d)
        shapes[f"{prefix}intermediate/dense/kernel"] = (d, f)
        shapes[f"{prefix}output/dense/kernel"] = (f, d)
    return {
        name: (0.5 * np.sin(0.7 * n + 0.3 * np.arange(math.prod(shapes[name])))).reshape(
            shapes[name]
        )
        for n, name in enumerate(sorted(shapes))
    }


@pytest.fixture
def oracle() -> RoFormerV2ForMaskedLM:
    model = RoFormerV2ForMaskedLM(TINY).double().eval()
    model.load_checkpoint_state(convert_tensorflow_variables(formula_variables()))
    return model


IDS = torch.tensor([[2, 5, 8, 3], [2, 7, 3, 0]])
TYPES = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])


def seeded(config: RoFormerV2Config = SMALL, seed: int = 0) -> RoFormerV2Model:
    return RoFormerV2Model(config, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("row", "position", "expected"),
    [
        (0, 0, [1.7346955382, 1.3283790372, -0.7719986482, -1.8878584304, -0.5961616350,
                1.4558108477, 1.6512103345, -0.2591531098, -1.8390226123]),
        (0, 2, [0.9666475632, 1.2442952671, -0.0648874855, -1.2913202341, -0.8709523152,
                0.6601275837, 1.3493570130, 0.3177723707, -1.1190624476]),
        (1, 1, [1.7222763505, 1.3520572185, -0.7424195153, -1.8901001553, -0.6273653808,
                1.4354387341, 1.6676500935, -0.2268668478, -1.8320640166]),
    ],
)  # fmt: skip
def test_logits_of_weights_from_a_formula(oracle, row, position, expected):
    logits = oracle(IDS, token_type_ids=TYPES).logits[row, position]
    assert logits.tolist() == pytest.approx(expected, abs=DIGITS)


def test_last_state_of_weights_from_a_formula(oracle):
    state = oracle(IDS, token_type_ids=TYPES).last_hidden_state[0, 3]
    expected = [1.6291074010, 0.9004916835, 0.0914377258, -0.7257840916]
    assert state.tolist() == pytest.approx(expected, abs=DIGITS)


def test_loss_of_weights_from_a_formula(oracle):
    labels = torch.full_like(IDS, -100)
    labels[0, 1], labels[1, 1] = 4, 6
    loss = oracle(IDS, token_type_ids=TYPES, labels=labels).loss
    # Sixteen digits are given; a hundred operations lose two of them.
    assert loss.item() == pytest.approx(2.222423605603667, abs=1e-13)


def test_without_branches_the_state_is_the_embedding(oracle):
    oracle.roformer.residual_scale = 0.0
    states = oracle.roformer(IDS, token_type_ids=TYPES, output_hidden_states=True).hidden_states
    expected = [1.1485772483, 1.1043376249, 0.9614508104, 0.7326804584]
    assert states[-1][0, 0].tolist() == pytest.approx(expected, abs=DIGITS)
    # An embedding of mean square m leaves the norm with m/(m + ε), and later norms mend that; each
    # of the four adds an ε of its own.
    embeddings = oracle.roformer.embeddings
    summed = embeddings.word_embeddings(IDS) + embeddings.token_type_embeddings(TYPES)
    m = summed.square().mean(-1, keepdim=True)
    allowed = TINY.layer_norm_eps * (1 / (2 * m) + 4)
    assert ((states[-1] / states[0] - 1).abs() <= allowed).all()


def test_forward_equals_numpy_written_from_the_definition(oracle):
    """A second derivation: heads, pairs and sums one by one."""
    config = RoFormerV2Config(9, 8, 2, 2, 6)
    variables = formula_variables(config)
    model = RoFormerV2ForMaskedLM(config).double().eval()
    model.load_checkpoint_state(convert_tensorflow_variables(variables))
    ids, size, eps = [2, 5, 8, 3, 1], 4, config.layer_norm_eps

    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)

    def rotated(head):
        turned = head.copy()
        for n in range(len(head)):
            for i in range(size // 2):
                angle = n * 10000 ** (-2 * i / size)
                a, b = head[n, 2 * i], head[n, 2 * i + 1]
                turned[n, 2 * i] = a * np.cos(angle) - b * np.sin(angle)
                turned[n, 2 * i + 1] = b * np.cos(angle) + a * np.sin(angle)
        return turned

    words = variables["bert/embeddings/word_embeddings"]
    x = norm(words[ids] + variables["bert/embeddings/token_type_embeddings"][0])
    for layer in range(2):
        kernel = {
            name.removeprefix(f"bert/encoder/layer_{layer}/"): array
            for name, array in variables.items()
        }
        mixed = np.zeros_like(x)
        for head in range(2):
            part = slice(head * size, (head + 1) * size)
            query, key, value = (
                (x @ kernel[f"attention/self/{name}/kernel"])[:, part]
                for name in ("query", "key", "value")
            )
            scores = rotated(query) @ rotated(key).T / np.sqrt(size)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            mixed[:, part] = weights @ value
        x = norm(x + mixed @ kernel["attention/output/dense/kernel"])
        inner = np.maximum(x @ kernel["intermediate/dense/kernel"], 0)
        x = norm(x + inner @ kernel["output/dense/kernel"])
    logits = model(torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(logits.detach().numpy(), x @ words.T, atol=1e-12)


def test_rotary_turns_interleaved_pairs():
    rotary = seeded(TINY).encoder.rotary
    turned = rotary.rotate(torch.tensor([[1.0, 2, 3, 4]] * 3, dtype=torch.float64))[2]
    # (cos 2 - 2 sin 2, 2 cos 2 + sin 2, 3 cos 0.02 - 4 sin 0.02, 4 cos 0.02 + 3 sin 0.02)
    expected = [-2.23474169, 0.07700375, 2.91940535, 4.05919603]
    assert turned.tolist() == pytest.approx(expected, abs=5e-9)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (RoFormerV2Config.small(), 15_225_600),
        (RoFormerV2Config.base(), 94_152_192),
        (RoFormerV2Config.large(), 314_279_936),
    ],
)
def test_published_sizes_have_their_number_of_parameters(config, count):
    with torch.device("meta"):
        model = RoFormerV2ForMaskedLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_parameters_have_the_published_names_and_no_others():
    layer = {
        f"roformer.encoder.layer.{i}.{matrix}.weight"
        for i in range(2)
        for matrix in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    }
    embeddings = {
        "roformer.embeddings.word_embeddings.weight",
        "roformer.embeddings.token_type_embeddings.weight",
    }
    assert set(RoFormerV2ForMaskedLM(TINY).state_dict()) == layer | embeddings
    classifier = set(RoFormerV2ForSequenceClassification(TINY).state_dict())
    assert classifier == layer | embeddings | {"classifier.weight", "classifier.bias"}


@settings(max_examples=15, deadline=None)
@given(data=st.data(), length=st.integers(1, 12), padding=st.integers(1, 5))
def test_padding_never_changes_real_positions(data, length, padding):
    model = seeded().double().eval()
    ids = torch.tensor([data.draw(st.lists(st.integers(1, 29), min_size=length, max_size=length))])
    padded = functional.pad(ids, (0, padding))
    alone = model(ids).last_hidden_state
    for mask in (None, padded != 0, (padded != 0).long()):
        together = model(padded, attention_mask=mask).last_hidden_state[:, :length]
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_rows_of_padding_are_finite_in_states_and_gradients():
    model = seeded()
    state = model(torch.zeros(2, 5, dtype=torch.int64)).last_hidden_state
    state.square().sum().backward()
    assert state.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_first_position_is_always_attended():
    model = seeded().eval()
    ids = torch.tensor([[0, 5, 7]])
    expected = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.equal(model(ids).last_hidden_state, expected)
    none = model(ids, attention_mask=torch.zeros_like(ids)).last_hidden_state
    first = model(ids, attention_mask=torch.tensor([[1, 0, 0]])).last_hidden_state
    assert torch.equal(none, first)


def test_masked_tokens_do_not_matter():
    model = seeded().eval()
    mask = torch.tensor([[1, 1, 0, 1]])
    one = model(torch.tensor([[2, 5, 9, 3]]), attention_mask=mask).last_hidden_state
    two = model(torch.tensor([[2, 5, 4, 3]]), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(one[:, [0, 1, 3]], two[:, [0, 1, 3]])
    assert not torch.allclose(one[:, 2], two[:, 2])


def test_token_types_are_zeros_by_default():
    model = seeded().eval()
    ids = torch.tensor([[2, 5, 3]])
    expected = model(ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=0, atol=0)
    other = model(ids, token_type_ids=torch.ones_like(ids)).last_hidden_state
    assert not torch.allclose(other, expected)


def test_there_is_a_hidden_state_per_layer_and_one_of_the_embedding():
    model = seeded().eval()
    output = model(torch.tensor([[2, 5, 3]]), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert model(torch.tensor([[2, 5, 3]])).hidden_states is None


def test_positions_go_beyond_the_limit_of_the_file():
    config = RoFormerV2Config(9, 4, 1, 1, 6, max_position_embeddings=8)
    state = seeded(config).eval()(torch.randint(1, 9, (1, 700))).last_hidden_state
    assert state.isfinite().all()


def test_states_have_root_mean_square_one():
    states = seeded().double()(torch.tensor([[2, 5, 3]]), output_hidden_states=True).hidden_states
    for state in states:
        torch.testing.assert_close(
            state.square().mean(-1), torch.ones(1, 3, dtype=torch.float64), rtol=0, atol=1e-4
        )


def test_classifier_reads_the_first_state_only():
    config = RoFormerV2Config(30, 16, 2, 4, 24, num_labels=3)
    model = RoFormerV2ForSequenceClassification(config).eval()
    labels = torch.tensor([2, 0])
    ids = torch.tensor([[2, 5, 3], [2, 8, 3]])
    output = model(ids, labels=labels)
    first = output.last_hidden_state[:, 0]
    torch.testing.assert_close(output.logits, model.classifier(first))
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, labels))
    assert model(ids).loss is None


def test_masked_loss_is_the_sum_over_labels_over_their_number():
    model = RoFormerV2ForMaskedLM(SMALL).eval()
    ids = torch.randint(1, 30, (3, 6))
    labels = torch.full_like(ids, -100)
    labels[0, 1], labels[2, 4], labels[2, 5] = 4, 9, 11
    output = model(ids, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    chosen = [log_probabilities[0, 1, 4], log_probabilities[2, 4, 9], log_probabilities[2, 5, 11]]
    torch.testing.assert_close(output.loss, -torch.stack(chosen).mean())
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_dropout_acts_in_training_only_and_follows_torchs_seed():
    config = RoFormerV2Config(30, 16, 2, 4, 24, hidden_dropout_prob=0.5)
    model = RoFormerV2ForMaskedLM(config, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[2, 5, 7, 3]])
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(ids).logits)
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_embedding_drops_before_the_norm():
    config = RoFormerV2Config(30, 64, 1, 1, 8, hidden_dropout_prob=0.5)
    torch.manual_seed(0)
    embedded = seeded(config).train()(torch.tensor([[2, 5, 7]]), output_hidden_states=True)
    state = embedded.hidden_states[0]
    assert (state == 0).any()
    torch.testing.assert_close(state.square().mean(-1), torch.ones(1, 3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_single_precision_and_keeps_the_loss_in_it(dtype):
    model = RoFormerV2ForMaskedLM(SMALL, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", dtype):
        output = model(ids, labels=ids)
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32
    # Eight bits of bfloat16 in each of some twenty matrices, of a logit of order one.
    assert (output.logits.float() - exact.logits).abs().max() < 0.05
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_norms_do_not_lose_epsilon_or_overflow(dtype):
    model = seeded().to(dtype).eval()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(3e3)
    state = model(torch.tensor([[2, 5, 3]])).last_hidden_state
    assert state.dtype == dtype
    assert (state.float().square().mean(-1) - 1).abs().max() < 0.02


def test_gradients_flow_through_checkpointed_layers():
    plain, wrapped = seeded().double(), seeded().double()
    for i, layer in enumerate(wrapped.encoder.layer):
        wrapped.encoder.layer[i] = _Checkpointed(layer)
    ids = torch.tensor([[2, 5, 7, 3]])
    for model in (plain, wrapped):
        model(ids).last_hidden_state.pow(3).sum().backward()
    for one, two in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)


class _Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return torch.utils.checkpoint.checkpoint(self.layer, *inputs, use_reentrant=False)


ONE_GRAPH = """
import torch
from torch._dynamo.backends.debugging import aot_eager
from kexue.models.roformer import RoFormerV2Config, RoFormerV2ForMaskedLM

model = RoFormerV2ForMaskedLM(RoFormerV2Config(30, 8, 1, 2, 8, "relu", 0.0, 0.0)).double()
ids = torch.randint(1, 30, (2, 6))
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return aot_eager(graph, inputs) if len(graphs) == 1 else graph

compiled = torch.compile(model, backend=backend, fullgraph=True)
for scale in (1.0, 0.25, 0.5, 0.75):
    model.roformer.residual_scale = scale
    losses = [each(ids, labels=ids).loss for each in (compiled, model)]
    torch.testing.assert_close(losses[0], losses[1])
    one, two = (torch.autograd.grad(loss, model.roformer.encoder.parameters()) for loss in losses)
    for compiled_gradient, gradient in zip(one, two, strict=True):
        torch.testing.assert_close(compiled_gradient, gradient)
assert len(graphs) == 2, len(graphs)
"""


@pytest.mark.slow
def test_training_step_is_one_graph_and_a_growing_scale_compiles_once_more():
    # In a process of its own, where no shape checks wrap the functions: dynamo cannot trace those.
    done = subprocess.run(
        [sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_standard_deviation_of_the_truncated_normal():
    from kexue.models.roformer import initialization

    assert pytest.approx(0.8796256610342397504, rel=1e-14) == initialization._TRUNCATED_DEVIATION
    assert pytest.approx(1.13684723433855647, rel=1e-14) == 1 / initialization._TRUNCATED_DEVIATION


@pytest.mark.parametrize(
    "layer", [nn.Linear(300, 1000), nn.Linear(1000, 300), nn.Embedding(999, 300)]
)
def test_initial_deviation_is_one_over_the_root_of_fan_in_and_layers(layer):
    initialize_weights(layer, 6, generator=torch.Generator().manual_seed(0))
    fan_in = layer.weight.shape[1]
    deviation = 1 / math.sqrt(6 * fan_in)
    # Five standard errors of a standard deviation over 3·10^5 entries; the tails are cut.
    assert layer.weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * 3e5))
    assert layer.weight.mean().item() == pytest.approx(0, abs=5 * deviation / math.sqrt(3e5))
    cut = 2 * 1.13684723433855647 * deviation
    assert 0.99 * cut < layer.weight.abs().max().item() <= cut * (1 + 1e-6)
    if isinstance(layer, nn.Linear):
        assert not layer.bias.any()


def test_initialisation_follows_its_generator():
    one, two, other = (seeded(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_configuration_takes_the_names_of_both_file_kinds():
    config = RoFormerV2Config.from_dict(
        {
            "hidden_size": 8,
            "num_attention_heads": 2,
            "epsilon": 1e-6,
            "segment_vocab_size": 3,
            "id2label": {"0": "bad", "1": "fair", "2": "good"},
            "directionality": "bidi",
            "norm_type": "rms_norm",
            "use_bias": False,
            "embedding_size": 8,
        }
    )
    assert (config.layer_norm_eps, config.type_vocab_size, config.num_labels) == (1e-6, 3, 3)
    assert RoFormerV2Config.from_dict({}) == RoFormerV2Config.base()
    assert RoFormerV2Config.from_dict({}).layer_norm_eps == 1e-7


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers.*1.5"),
        ({"hidden_size": 10, "num_attention_heads": 4}, r"hidden_size \(10\).*\(4\)"),
        ({"hidden_size": 9, "num_attention_heads": 3}, "even.*got 3"),
        ({"hidden_act": "sine"}, "relu, gelu.*'sine'"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob.*-0.1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps must be positive"),
        ({"pad_token_id": 12000}, "pad_token_id.*12000"),
        ({"norm_type": "layer_norm"}, "not a RoFormerV2.*norm_type.*'layer_norm'"),
        ({"use_bias": True}, "use_bias must be false"),
        ({"rotary_value": True}, "rotary_value must be false"),
        ({"embedding_size": 128}, r"embedding_size must equal hidden_size \(768\), got 128"),
    ],
)
def test_configurations_are_checked(values, words):
    with pytest.raises(ValueError, match=words):
        RoFormerV2Config.from_dict(values)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("ids", "keywords", "words"),
    [
        (IDS.float(), {}, "input_ids must be an int64.*float32"),
        (IDS[0], {}, r"input_ids.*\(batch, length\).*\(4,\)"),
        (IDS[:, :0], {}, "at least one position"),
        (IDS, {"attention_mask": torch.ones(2, 3).long()}, r"attention_mask.*\(2, 4\).*\(2, 3\)"),
        (IDS, {"attention_mask": torch.ones(2, 4)}, "attention_mask.*bool or int64.*float32"),
        (IDS, {"token_type_ids": TYPES[:1]}, r"token_type_ids.*\(2, 4\).*\(1, 4\)"),
        (IDS, {"labels": torch.zeros(2).long()}, r"labels.*\(2, 4\).*\(2,\)"),
        (IDS, {"labels": torch.zeros(2, 4)}, "labels must be a tensor of int64.*float32"),
    ],
)
def test_inputs_are_checked(oracle, ids, keywords, words):
    with pytest.raises(ValueError, match=words):
        oracle(ids, **keywords)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "labels", [torch.zeros(2), torch.zeros(3).long(), torch.zeros(2, 1).long()]
)
def test_classes_are_checked(labels):
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\)"):
        RoFormerV2ForSequenceClassification(TINY)(IDS, labels=labels)


def test_unknown_tokens_are_torchs_index_error(oracle):
    with pytest.raises(IndexError):
        oracle(torch.tensor([[2, 9]]))


@pytest.mark.bad_input
def test_layers_for_initialisation_are_checked():
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 1, got 0"):
        initialize_weights(nn.Linear(2, 2), 0)


@pytest.mark.gpu
def test_gpu_agrees_with_the_host():
    model = seeded().eval()
    ids = torch.randint(0, 30, (3, 17))
    expected = model(ids).last_hidden_state
    on_gpu = model.cuda()(ids.cuda()).last_hidden_state.cpu()
    torch.testing.assert_close(on_gpu, expected, atol=1e-4, rtol=1e-4)
