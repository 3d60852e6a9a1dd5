"""Tests of kexue.models.roformer: files of both kinds, and what must not be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kexue.models.roformer import (
    RoFormerV2Config,
    RoFormerV2ForMaskedLM,
    RoFormerV2ForSequenceClassification,
    convert_tensorflow_variables,
    read_tensorflow_checkpoint,
)

CONFIG = RoFormerV2Config(9, 4, 2, 1, 6, num_labels=3)
IDS = torch.tensor([[2, 5, 8, 3], [2, 7, 3, 0]])
NUMBERS = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}


def varint(value: int) -> bytes:
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(8 * number) + varint(value)
    return varint(8 * number + 2) + varint(len(value)) + value


def block(entries: list[tuple[bytes, bytes]], restart_interval: int = 4) -> bytes:
    content, restarts, previous = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart_interval == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value))
        content += key[shared:] + value
        previous = key
    restarts = restarts or [0]
    return content + b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])


def table(entries: list[tuple[bytes, bytes]], per_block: int = 5, compression: int = 0) -> bytes:
    content = b""

    def append(part: bytes) -> bytes:
        nonlocal content
        handle = varint(len(content)) + varint(len(part))
        content += part + bytes([compression]) + b"\0\0\0\0"
        return handle

    index = []
    for start in range(0, len(entries), per_block):
        part = entries[start : start + per_block]
        index.append((part[-1][0], append(block(part))))
    footer = append(block([])) + append(block(index, 1))
    return content + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def write_bundle(
    prefix: Path,
    variables: dict[str, np.ndarray],
    *,
    shards: int = 1,
    compression: int = 0,
    extra: dict[str, bytes] | None = None,
) -> None:
    """Write what TensorFlow would: sorted names, data raw, spread over shards."""
    data = [b""] * shards
    entries = {"": field(1, shards) + field(3, field(1, 1)), **(extra or {})}
    for i, name in enumerate(sorted(variables)):
        array, shard = variables[name], i % shards
        shape = b"".join(field(2, field(1, size)) for size in array.shape)
        entries[name] = (
            field(1, NUMBERS[array.dtype.name])
            + field(2, shape)
            + (field(3, shard) if shard else b"")
            + (field(4, len(data[shard])) if data[shard] else b"")
            + field(5, array.nbytes)
            + varint(8 * 6 + 5)
            + b"\0\0\0\0"
        )
        data[shard] += array.tobytes()
    pairs = [(name.encode(), entries[name]) for name in sorted(entries)]
    Path(f"{prefix}.index").write_bytes(table(pairs, compression=compression))
    for shard, content in enumerate(data):
        Path(f"{prefix}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)


def variables_of(model: RoFormerV2ForMaskedLM) -> dict[str, np.ndarray]:
    """The weights as the authors' code names and lays them out."""
    variables = {}
    for name, tensor in model.state_dict().items():
        parts = name.removeprefix("roformer.").removesuffix(".weight").split(".")
        if parts[0] == "embeddings":
            variables[f"bert/embeddings/{parts[1]}"] = tensor.numpy()
        else:
            matrix = "/".join(parts[3:])
            kernel = f"bert/encoder/layer_{parts[2]}/{matrix}/kernel"
            variables[kernel] = np.ascontiguousarray(tensor.numpy().T)
    return variables


@pytest.fixture
def model() -> RoFormerV2ForMaskedLM:
    return RoFormerV2ForMaskedLM(CONFIG, generator=torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("shards", [1, 3])
def test_reader_returns_what_a_bundle_holds(tmp_path, shards):
    rng = np.random.default_rng(0)
    variables = {
        "a/float": rng.normal(size=(3, 5)).astype(np.float32),
        "a/floating": rng.normal(size=(2, 1, 4)),
        "counters/step": np.array(7, dtype=np.int64),
        "counters/small": np.arange(300, dtype=np.int32),
        "half": rng.normal(size=3).astype(np.float16),
        "nothing": np.zeros((0, 4), np.float32),
        **{f"many/of/them/{i}": np.full(i + 1, i, np.float32) for i in range(40)},
    }
    write_bundle(tmp_path / "model.ckpt", variables, shards=shards)
    found = read_tensorflow_checkpoint(tmp_path / "model.ckpt")
    assert sorted(found) == sorted(variables)
    for name, array in variables.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_reader_leaves_strings_out_and_the_file_as_it_is(tmp_path):
    prefix = tmp_path / "model.ckpt"
    text = field(1, 7) + field(2, b"") + field(5, 12)
    write_bundle(
        prefix, {"x": np.ones(4, np.float32)}, extra={"_CHECKPOINTABLE_OBJECT_GRAPH": text}
    )
    found = read_tensorflow_checkpoint(prefix)
    assert list(found) == ["x"]
    found["x"][:] = 5
    np.testing.assert_array_equal(read_tensorflow_checkpoint(prefix)["x"], np.ones(4))


@pytest.mark.parametrize(
    ("files", "config_name"),
    [("tensorflow", "bert_config.json"), ("torch", "config.json"), ("safetensors", "config.json")],
)
def test_every_published_format_gives_the_same_model(tmp_path, model, files, config_name):
    (tmp_path / config_name).write_text(json.dumps(CONFIG.to_dict()))
    state = model.state_dict()
    if files == "tensorflow":
        slots = {
            "bert/embeddings/word_embeddings/lamb_m": np.ones((9, 4), np.float32),
            "global_step": np.array(5, np.int64),
            "beta1_power": np.array(0.9, np.float32),
        }
        write_bundle(tmp_path / "bert_model.ckpt", {**variables_of(model), **slots}, shards=2)
    elif files == "torch":
        published = {
            **state,
            "cls.predictions.decoder.weight": state["roformer.embeddings.word_embeddings.weight"],
            "roformer.encoder.embed_positions.weight": torch.zeros(512, 4),
        }
        torch.save(published, tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path)
    loaded = RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == CONFIG
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


def test_loaded_models_train_and_cast_like_built_ones(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = RoFormerV2ForMaskedLM.from_pretrained(tmp_path).train()
    loaded(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())
    expected = model.double()(IDS).logits
    torch.testing.assert_close(loaded.eval().double()(IDS).logits, expected, rtol=0, atol=0)


def test_half_precision_files_are_loaded_in_single_precision(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(half, tmp_path / "pytorch_model.bin")
    loaded = RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_saved_folder_holds_the_tied_matrix_once_and_says_what_it_is(tmp_path, model):
    model.save_pretrained(tmp_path / "new" / "folder")
    tensors = load_file(tmp_path / "new" / "folder" / "model.safetensors")
    assert sorted(tensors) == sorted(model.state_dict())
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    expected = {
        **CONFIG.to_dict(),
        "model_type": "roformer",
        "norm_type": "rms_norm",
        "use_bias": False,
        "rotary_value": False,
        "embedding_size": 4,
        "architectures": ["RoFormerV2ForMaskedLM"],
    }
    assert config == expected


def test_saving_over_the_folder_that_was_loaded_keeps_the_weights(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits
    )


def test_masked_lm_weights_serve_the_classifier_and_back(tmp_path, model):
    model.save_pretrained(tmp_path / "words")
    torch.manual_seed(0)
    classifier = RoFormerV2ForSequenceClassification.from_pretrained(tmp_path / "words")
    assert torch.equal(classifier(IDS).last_hidden_state, model(IDS).last_hidden_state)
    # The head is drawn: 1/sqrt(d L), within what twelve cut entries can be.
    assert 0 < classifier.classifier.weight.abs().max() <= 2 * 1.14 / 8**0.5
    assert not classifier.classifier.bias.any()
    classifier.save_pretrained(tmp_path / "classes")
    again = RoFormerV2ForSequenceClassification.from_pretrained(tmp_path / "classes")
    assert torch.equal(again(IDS).logits, classifier(IDS).logits)
    words = RoFormerV2ForMaskedLM.from_pretrained(tmp_path / "classes")
    assert torch.equal(words(IDS).logits, model(IDS).logits)


def test_fields_of_the_configuration_can_be_replaced(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = RoFormerV2ForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, hidden_dropout_prob=0.3
    )
    assert loaded.classifier.out_features == 7
    assert loaded.config.hidden_dropout_prob == 0.3


def test_kernels_are_transposed():
    kernel = np.arange(24.0).reshape(4, 6)
    converted = convert_tensorflow_variables(
        {"bert/encoder/layer_3/intermediate/dense/kernel": kernel}
    )
    weight = converted["roformer.encoder.layer.3.intermediate.dense.weight"]
    assert weight.is_contiguous()
    np.testing.assert_array_equal(weight.numpy(), kernel.T)


@pytest.mark.parametrize(
    "name",
    [
        "bert/encoder/layer_0/attention/self/query/bias",
        "bert/encoder/layer_0/output/LayerNorm/gamma",
        "bert/embeddings/LayerNorm/beta",
        "cls/predictions/output_bias",
        "bert/embeddings/position_embeddings",
        "bert/encoder/layer_0/extra/dense/kernel",
    ],
)
def test_variables_of_other_models_are_refused(name):
    with pytest.raises(ValueError, match=f"not a RoFormerV2.*unexpected: {name}"):
        convert_tensorflow_variables({name: np.zeros(4)})


def broken(model, change):
    state = dict(model.state_dict())
    change(state)
    return state


QUERY = "roformer.encoder.layer.1.attention.self.query"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update({f"{QUERY}.bias": torch.zeros(4)}), f"no biases.*{QUERY}.bias"),
        (
            lambda s: s.update({"roformer.embeddings.LayerNorm.weight": torch.ones(4)}),
            "unexpected: roformer.embeddings.LayerNorm.weight",
        ),
        (
            lambda s: s.update({"cls.predictions.transform.dense.weight": torch.ones(4, 4)}),
            "unexpected: cls.predictions.transform.dense.weight",
        ),
        (lambda s: s.pop(f"{QUERY}.weight"), f"lacks {QUERY}.weight"),
        (
            lambda s: s.update({f"{QUERY}.weight": torch.zeros(4, 5)}),
            r"query.weight \(4, 5\) instead of \(4, 4\)",
        ),
        (
            lambda s: s.update({"cls.predictions.decoder.weight": torch.zeros(9, 4)}),
            "decoder.weight.*must be the word embedding",
        ),
        (lambda s: s.clear(), "lacks .* and 6 more"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(model, change, words):
    target = RoFormerV2ForMaskedLM(CONFIG)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        target.load_checkpoint_state(broken(model, change))
    assert all(torch.equal(target.state_dict()[name], before[name]) for name in before)


@pytest.mark.bad_input
def test_half_a_head_and_a_head_of_another_size_are_refused(model):
    classifier = RoFormerV2ForSequenceClassification(CONFIG)
    half = {**model.state_dict(), "classifier.weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"lacks classifier\.bias"):
        classifier.load_checkpoint_state(half)
    other = {**half, "classifier.weight": torch.zeros(2, 4), "classifier.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"classifier\.weight \(2, 4\) instead of \(3, 4\)"):
        classifier.load_checkpoint_state(other)
    deep = {**model.state_dict(), "classifier.dense.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"unexpected: classifier\.dense\.weight"):
        classifier.load_checkpoint_state(deep)


@pytest.mark.bad_input
def test_files_that_are_missing_are_named(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="no folder"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json, bert_config\.json"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors, pytorch_model\.bin"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.ckpt\.index"):
        read_tensorflow_checkpoint(tmp_path / "model.ckpt")
    write_bundle(tmp_path / "model.ckpt", {"x": np.ones(2, np.float32)})
    (tmp_path / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(FileNotFoundError, match="data-00000-of-00001"):
        read_tensorflow_checkpoint(tmp_path / "model.ckpt")


@pytest.mark.bad_input
def test_files_of_another_kind_are_refused(tmp_path, model):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be a JSON file"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match="must hold tensors only"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    torch.save({"a": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold tensors only"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="dict of tensors, got a list"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"neither this")
    with pytest.raises(ValueError, match="no safetensors file"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fields of RoFormerV2Config, got colour"):
        RoFormerV2ForMaskedLM.from_pretrained(tmp_path, colour="red")


@pytest.mark.bad_input
def test_bundles_that_cannot_be_read_are_refused(tmp_path):
    prefix = tmp_path / "model.ckpt"
    index = Path(f"{prefix}.index")
    for content in (b"", b"x" * 100):
        index.write_bytes(content)
        with pytest.raises(ValueError, match="magic number"):
            read_tensorflow_checkpoint(prefix)
    variables = {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.float32)}
    write_bundle(prefix, variables, compression=1)
    with pytest.raises(ValueError, match="must not be compressed, got compression type 1"):
        read_tensorflow_checkpoint(prefix)
    write_bundle(prefix, variables)
    data = Path(f"{prefix}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"'y'.*byte 32.*truncated to 31"):
        read_tensorflow_checkpoint(prefix)
    write_bundle(prefix, {}, extra={"z": field(1, 14) + field(2, b"")})
    with pytest.raises(ValueError, match=r"'z'.*TensorFlow's type 14"):
        read_tensorflow_checkpoint(prefix)
    write_bundle(prefix, {}, extra={"z": field(1, 1) + field(2, b"") + field(7, b"")})
    with pytest.raises(ValueError, match=r"'z'.*in slices"):
        read_tensorflow_checkpoint(prefix)
    write_bundle(
        prefix, {}, extra={"z": field(1, 1) + field(2, field(2, field(1, 3))) + field(5, 8)}
    )
    with pytest.raises(ValueError, match=r"'z' .*\(3,\) of float32, but 8 bytes"):
        read_tensorflow_checkpoint(prefix)


@pytest.mark.bad_input
def test_a_damaged_index_never_ends_in_another_error(tmp_path):
    prefix = tmp_path / "model.ckpt"
    write_bundle(prefix, {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.float32)})
    index = Path(f"{prefix}.index")
    whole = index.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole) - 8)] = rng.integers(256)
        index.write_bytes(bytes(damaged))
        try:
            read_tensorflow_checkpoint(prefix)
        except (ValueError, FileNotFoundError):
            refused += 1
    assert refused > 50
