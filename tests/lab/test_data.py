"""The data doors: what they bring in, and what they say of a file that is not what it should be."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.datasets import load_digits, load_iris

from kexue.lab import data
from kexue.lab.data.idx import read_idx
from kexue.lab.errors import DataError, NotRun

RNG = np.random.default_rng(0)
IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
CIFAR_NAMES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def idx_bytes(array: np.ndarray) -> bytes:
    """The format, from its published description."""
    code = IDX_CODES[array.dtype.str[1:]]
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def classes(count: int) -> np.ndarray:
    return RNG.integers(0, 10, count, dtype=np.uint8)


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray | None) -> Path:
    path = folder / f"{prefix}-images-idx3-ubyte"
    path.write_bytes(idx_bytes(images))
    if labels is not None:
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return path


def write_png(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def as_bytes(images: torch.Tensor) -> np.ndarray:
    """Undo the scaling to [-1, 1] of 8-bit images."""
    return torch.round((images.double() + 1) * 127.5).to(torch.uint8).numpy()


def all_images(found: data.Images) -> np.ndarray:
    return np.concatenate([as_bytes(found.train.images), as_bytes(found.test.images)])


def sorted_rows(images: np.ndarray) -> list[bytes]:
    return sorted(image.tobytes() for image in images)


def refusal(read: Callable[..., Any], path: Path, *words: str) -> str:
    """The one sentence of a DataError, which names the file and says what was expected and came."""
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message or str(path.parent) in message
    assert "\n" not in message
    for word in ("expected", *words):
        assert word in message
    return message


# Embedded sets


def test_import_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, kexue.lab.data as data; data.Data; "
        "sys.exit(len({'torch', 'numpy', 'sklearn', 'PIL'} & set(sys.modules)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "KEXUE_CHECK_SHAPES"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_digits_are_scikit_learns_in_the_unit_range() -> None:
    digits = data.digits()
    expected, labels = load_digits(return_X_y=True)
    found = torch.cat([digits.train.images, digits.test.images])
    assert found.dtype == torch.float32
    assert found.shape == (1797, 1, 8, 8)
    # 2k/16 - 1 is exact in float32, so the 17 levels come back without rounding.
    values = ((found + 1) * 8).reshape(-1, 64).numpy()
    known = torch.cat([digits.train.labels, digits.test.labels]).numpy()
    pairs = sorted((row.tobytes(), int(label)) for row, label in zip(values, known, strict=True))
    truth = zip(expected.astype(np.float32), labels, strict=True)
    assert pairs == sorted((row.tobytes(), int(label)) for row, label in truth)


def test_digits_hold_out_two_hundred_with_seventeen_levels() -> None:
    digits = data.digits()
    assert (len(digits.train), len(digits.test)) == (1597, 200)
    assert (digits.levels, digits.bin_width) == (17, 0.125)
    assert digits.train.labels.dtype == torch.int64


def test_digits_have_the_same_split_for_every_seed() -> None:
    first, second = data.Data(seed=0).digits(), data.Data(seed=7).digits()
    assert torch.equal(first.test.images, second.test.images)
    assert torch.equal(first.train.images, second.train.images)


def test_digits_that_are_held_out_remain_so_where_more_are() -> None:
    few, many = data.digits(held_out=200), data.digits(held_out=500)
    assert torch.equal(few.test.images, many.test.images[:200])
    assert len(many.train) == 1297


@pytest.mark.parametrize("held_out", [0, 1797, -1])
def test_digits_refuse_an_empty_part(held_out: int) -> None:
    with pytest.raises(ValueError, match="held_out must be between 1 and 1796"):
        data.digits(held_out=held_out)


def test_photographs_are_two_colour_images_in_the_unit_range() -> None:
    photographs = data.photographs()
    assert [photograph.shape for photograph in photographs] == [(3, 427, 640)] * 2
    for photograph in photographs:
        assert photograph.dtype == torch.float32
        assert -1 <= photograph.min() < photograph.max() <= 1
        assert photograph.is_contiguous()


def test_photographs_are_scikit_learns() -> None:
    from sklearn.datasets import load_sample_image

    assert np.array_equal(
        as_bytes(data.photographs()[0]), load_sample_image("china.jpg").transpose(2, 0, 1)
    )


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("iris", (150, 4), 3),
        ("wine", (178, 13), 3),
        ("breast_cancer", (569, 30), 2),
        ("digits", (1797, 64), 10),
        ("diabetes", (442, 10), 0),
    ],
)
def test_embedded_tables_have_their_published_sizes(
    name: str, shape: tuple[int, int], classes: int
) -> None:
    table = data.tabular(name)
    assert table.features.shape == shape
    assert table.features.dtype == np.float64
    assert table.target.shape == shape[:1]
    assert len(table.feature_names) == shape[1]
    assert len(table.target_names) == classes
    assert all(isinstance(text, str) for text in table.feature_names + table.target_names)


def test_prose_is_the_language_reference_with_blank_lines_between_topics() -> None:
    from pydoc_data.topics import topics

    prose = data.prose()
    assert len(prose) > 400_000
    first, second = sorted(topics)[:2]
    assert prose.startswith(topics[first].strip("\n") + "\n\n" + topics[second].strip("\n"))
    assert prose.endswith("\n")
    assert not prose.endswith("\n\n")


def test_python_source_of_a_module_is_its_file() -> None:
    import this as module  # a module that is one file; its import prints, which pytest catches

    source = data.python_source(["this"])
    assert source == {"this": Path(module.__file__).read_text(encoding="utf-8")}


def test_python_source_of_a_package_has_all_its_files_in_order() -> None:
    import json

    folder = Path(json.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    expected = "\n\n".join(text.strip("\n") for text in texts if text.strip()) + "\n"
    assert data.python_source(["json"]) == {"json": expected}


def test_python_source_leaves_out_what_is_absent_or_has_no_source() -> None:
    assert data.python_source(["no_such_module", "sys", "no.such", "json.decoder"]).keys() == {
        "json.decoder"
    }


def test_python_source_takes_twelve_packages_by_default() -> None:
    source = data.python_source()
    assert set(source) <= set(data.SOURCE_MODULES)
    assert len(source) >= 10
    assert all(len(text) > 10_000 for text in source.values())


# IDX


@pytest.mark.parametrize("dtype", sorted(IDX_CODES))
def test_idx_arrays_come_back_in_every_type(tmp_path: Path, dtype: str) -> None:
    array = RNG.integers(-100, 100, (3, 2, 5)).astype(dtype)
    path = tmp_path / "array.idx"
    path.write_bytes(idx_bytes(array))
    found = read_idx(path)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_images_find_their_labels_beside_them(tmp_path: Path, packed: bool) -> None:
    values, labels = pixels(40, 5, 7), np.arange(40, dtype=np.uint8)
    path = write_idx(tmp_path, "train", values, labels)
    if packed:
        for file in list(tmp_path.iterdir()):
            (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
        path = path.with_name(f"{path.name}.gz")
    found = data.images(path)
    assert (found.levels, found.bin_width) == (256, 2 / 255)
    assert (len(found.train), len(found.test)) == (36, 4)
    for split in (found.train, found.test):
        assert np.array_equal(as_bytes(split.images), values[split.labels.numpy(), None])


def test_idx_images_without_labels_have_none(tmp_path: Path) -> None:
    found = data.images(write_idx(tmp_path, "train", pixels(10, 3, 3), None))
    assert found.train.labels is None
    assert found.test.labels is None


def test_idx_folder_keeps_its_own_split_and_order(tmp_path: Path) -> None:
    train, test = pixels(6, 4, 4), pixels(3, 4, 4)
    write_idx(tmp_path, "train", train, classes(6))
    write_idx(tmp_path, "t10k", test, classes(3))
    found = data.images(tmp_path)
    assert np.array_equal(as_bytes(found.train.images)[:, 0], train)
    assert np.array_equal(as_bytes(found.test.images)[:, 0], test)


def test_idx_file_that_also_lies_there_gzipped_counts_once(tmp_path: Path) -> None:
    path = write_idx(tmp_path, "train", pixels(10, 3, 3), None)
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert len(data.images(tmp_path).train) == 9


def test_scaled_images_are_multiples_of_the_bin_width(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)
    found = data.images(write_idx(tmp_path, "train", values, None))
    scaled = torch.cat([found.train.images, found.test.images]).double().reshape(-1).sort().values
    # Two roundings of numbers below 2 in float32: at most 2 * 2**-23 in all.
    exact = torch.arange(256, dtype=torch.float64) * (2 / 255) - 1
    assert (scaled - exact).abs().max() <= 2**-22
    assert scaled[0] == -1
    assert scaled[-1] == 1


def test_seed_decides_the_split_and_the_order(tmp_path: Path) -> None:
    path = write_idx(tmp_path, "train", pixels(60, 3, 3), None)
    same, again, other = (data.images(path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(same.train.images, again.train.images)
    assert torch.equal(same.test.images, again.test.images)
    assert not torch.equal(same.train.images, other.train.images)
    assert sorted_rows(all_images(same)) == sorted_rows(all_images(other))


def test_mnist_test_set_is_read_with_its_known_mean_and_class_counts(real_data: Path) -> None:
    found = data.images(real_data / "mnist" / "t10k-images-idx3-ubyte.gz")
    images = torch.cat([found.train.images, found.test.images])
    labels = torch.cat([found.train.labels, found.test.labels])
    assert images.shape == (10_000, 1, 28, 28)
    # Published: the test set's mean is 0.1325 and its standard deviation 0.3105 of full white.
    white = (images.double() + 1) / 2
    assert float(white.mean()) == pytest.approx(0.1325, abs=5e-5)
    assert float(white.std()) == pytest.approx(0.3105, abs=5e-5)
    known = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert labels.bincount().tolist() == known


def test_mnist_folder_is_read_as_its_file(real_data: Path) -> None:
    folder = data.images(real_data / "mnist", seed=3)
    file = data.images(real_data / "mnist" / "t10k-images-idx3-ubyte.gz", seed=3)
    assert torch.equal(folder.test.images, file.test.images)
    assert torch.equal(folder.test.labels, file.test.labels)


def test_wrong_magic_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    refusal(data.images, path, "IDX", "89 50 4e 47")


def test_file_of_no_known_kind_hears_which_kinds_there_are(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    refusal(data.images, path, "IDX, CIFAR-10 .bin, .npy or .npz", "68 65 6c 6c")


def test_every_truncated_idx_file_is_refused(tmp_path: Path) -> None:
    whole = idx_bytes(pixels(3, 2, 2))
    path = tmp_path / "train-images-idx3-ubyte"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(data.images, path)


def test_idx_file_with_trailing_bytes_is_refused(tmp_path: Path) -> None:
    path = write_idx(tmp_path, "train", pixels(3, 2, 2), None)
    path.write_bytes(path.read_bytes() + b"\0")
    refusal(data.images, path, "expected 28 bytes, for 3 x 2 x 2 values of type uint8, got 29")


def test_idx_header_of_absurd_size_is_refused_without_an_allocation(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *[2**32 - 1] * 3))
    refusal(data.images, path, "got 16")


def test_every_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(idx_bytes(pixels(3, 2, 2)))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(data.images, path)


def test_images_of_another_type_than_uint8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(np.zeros((3, 2, 2), np.float32)))
    refusal(data.images, path, "uint8", "float32")


def test_labels_that_do_not_fit_their_images_name_the_labels_file(tmp_path: Path) -> None:
    path = write_idx(tmp_path, "train", pixels(5, 2, 2), classes(4))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: expected 5 labels.*\(4,\)"):
        data.images(path)


def test_labels_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    path = write_idx(tmp_path, "train", pixels(5, 2, 2), np.zeros(5, np.float32))
    refusal(data.images, path, "integers", "float32")


def test_file_of_labels_is_no_file_of_images(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", pixels(5, 2, 2), classes(5))
    refusal(data.images, tmp_path / "train-labels-idx1-ubyte", "(5,)")


def test_several_training_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    for prefix in ("a-train", "b-train"):
        write_idx(tmp_path, prefix, pixels(5, 2, 2), None)
    refusal(data.images, tmp_path, "a-train-images-idx3-ubyte, b-train-images-idx3-ubyte")


def test_test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", pixels(5, 2, 2), None)
    write_idx(tmp_path, "t10k", pixels(5, 3, 3), None)
    refusal(data.images, tmp_path, "(1, 2, 2)", "(1, 3, 3)")


def test_single_image_cannot_be_split(tmp_path: Path) -> None:
    refusal(data.images, write_idx(tmp_path, "train", pixels(1, 2, 2), None), "two images", "got 1")


# CIFAR-10


def cifar_bytes(values: np.ndarray, labels: np.ndarray) -> bytes:
    rows = (bytes([label]) + image.tobytes() for image, label in zip(values, labels, strict=True))
    return b"".join(rows)


def test_cifar_file_holds_red_green_and_blue_planes(tmp_path: Path) -> None:
    values, labels = pixels(10, 3, 32, 32), np.arange(10, dtype=np.uint8)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(cifar_bytes(values, labels))
    found = data.images(path)
    assert found.class_names is None
    for split in (found.train, found.test):
        assert np.array_equal(as_bytes(split.images), values[split.labels.numpy()])


def test_cifar_folder_has_its_split_and_the_names_of_its_classes(tmp_path: Path) -> None:
    values, labels = pixels(6, 3, 32, 32), classes(6)
    for name, part in [
        ("data_batch_2", slice(2, 4)),
        ("data_batch_1", slice(0, 2)),
        ("test_batch", slice(4, 6)),
    ]:
        (tmp_path / f"{name}.bin").write_bytes(cifar_bytes(values[part], labels[part]))
    (tmp_path / "batches.meta.txt").write_text("\n".join(CIFAR_NAMES) + "\n\n")
    found = data.images(tmp_path)
    assert np.array_equal(as_bytes(found.train.images), values[:4])
    assert np.array_equal(as_bytes(found.test.images), values[4:])
    assert found.train.labels.tolist() == labels[:4].tolist()
    assert found.class_names == CIFAR_NAMES


@pytest.mark.parametrize("length", [0, 3072, 3074])
def test_cifar_file_of_broken_records_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(bytes(length))
    refusal(data.images, path, "3073", f"got {length} bytes")


def test_cifar_label_out_of_range_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(cifar_bytes(pixels(2, 3, 32, 32), np.array([3, 12])))
    refusal(data.images, path, "0 to 9", "got 12 in record 1")


def test_cifar_names_of_another_number_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(cifar_bytes(pixels(2, 3, 32, 32), classes(2)))
    (tmp_path / "batches.meta.txt").write_text("cat dog")
    refusal(data.images, tmp_path, "batches.meta.txt", "10 names", "got 2")


# NumPy


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((6, 4, 5), 1), ((6, 4, 5, 1), 1), ((6, 4, 5, 3), 3), ((6, 1, 4, 5), 1), ((6, 3, 4, 5), 3)],
)
def test_npy_images_are_read_in_each_layout(
    tmp_path: Path, shape: tuple[int, ...], channels: int
) -> None:
    values = pixels(*shape)
    np.save(tmp_path / "x.npy", values)
    found = all_images(data.images(tmp_path / "x.npy"))
    assert found.shape == (6, channels, 4, 5)
    last = len(shape) == 4 and shape[-1] == channels
    first = np.moveaxis(values, -1, 1) if last else values
    assert sorted_rows(found) == sorted_rows(np.ascontiguousarray(first).reshape(found.shape))


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")])
def test_npz_images_bring_their_labels(tmp_path: Path, names: tuple[str, str]) -> None:
    values = pixels(20, 4, 4)
    np.savez(tmp_path / "x.npz", **{names[0]: values, names[1]: np.arange(20)[:, None]})
    found = data.images(tmp_path / "x.npz")
    assert np.array_equal(as_bytes(found.test.images)[:, 0], values[found.test.labels.numpy()])


def test_npz_images_keep_their_own_split(tmp_path: Path) -> None:
    train, test = pixels(5, 4, 4), pixels(2, 4, 4)
    np.savez_compressed(
        tmp_path / "x.npz", x_train=train, y_train=classes(5), x_test=test, y_test=classes(2)
    )
    found = data.images(tmp_path / "x.npz")
    assert np.array_equal(as_bytes(found.train.images)[:, 0], train)
    assert np.array_equal(as_bytes(found.test.images)[:, 0], test)
    assert len(found.test.labels) == 2


def test_npz_without_images_lists_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weights=np.zeros(3), bias=np.zeros(3))
    refusal(data.images, tmp_path / "x.npz", "images or x", "weights, bias")


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_npy_images_of_another_type_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2, 2), dtype))
    refusal(data.images, tmp_path / "x.npy", "uint8", dtype)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 5, 5, 2), (0, 4, 4), (4, 0, 4)])
def test_npy_images_of_no_image_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    refusal(data.images, tmp_path / "x.npy", str(shape) if len(shape) != 3 else "(")


# A folder of images


def test_folder_of_grey_images_has_one_channel_and_no_labels(tmp_path: Path) -> None:
    values = pixels(12, 5, 6)
    for number, image in enumerate(values):
        write_png(tmp_path / f"{number:02}.png", image)
    (tmp_path / "README.txt").write_text("not an image, and none of the door's business")
    found = data.images(tmp_path)
    assert found.train.images.shape == (11, 1, 5, 6)
    assert found.train.labels is None
    assert sorted_rows(all_images(found)) == sorted_rows(values[:, None])


def test_folder_with_one_coloured_image_has_three_channels(tmp_path: Path) -> None:
    grey, colour = pixels(4, 4), pixels(4, 4, 3)
    write_png(tmp_path / "a.png", grey)
    write_png(tmp_path / "b.png", colour)
    expected = [np.stack([grey] * 3), colour.transpose(2, 0, 1)]
    found = all_images(data.images(tmp_path))
    assert sorted_rows(found) == sorted_rows(np.ascontiguousarray(expected))


def test_jpeg_files_are_read(tmp_path: Path) -> None:
    for number in range(3):
        write_png(tmp_path / f"{number}.JPG", np.full((8, 8, 3), 40 * number, np.uint8))
    found = all_images(data.images(tmp_path))
    # An even area is a DC coefficient; colour conversion may cost a grey level.
    means = sorted(image.mean() for image in found)
    assert np.allclose(means, [0, 40, 80], atol=1)


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA"])
def test_images_of_every_eight_bit_mode_are_read(tmp_path: Path, mode: str) -> None:
    values = np.zeros((2, 4, 4, 3), np.uint8)
    values[1] = 255
    for number, image in enumerate(values):
        write_png(tmp_path / f"{number}.png", image, mode)
    found = all_images(data.images(tmp_path))
    assert sorted(image.mean() for image in found) == [0, 255]


def test_subfolders_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    for name, level in [("dog", 200), ("cat", 100)]:
        for number in range(3):
            write_png(tmp_path / name / f"{number}.png", np.full((3, 3), level, np.uint8))
    found = data.images(tmp_path)
    assert found.class_names == ("cat", "dog")
    for split in (found.train, found.test):
        levels = as_bytes(split.images)[:, 0, 0, 0]
        assert np.array_equal(levels, 100 + 100 * split.labels.numpy())


def test_folders_called_train_and_test_are_a_split(tmp_path: Path) -> None:
    for split, count in [("train", 4), ("test", 2)]:
        for name in ("cat", "dog"):
            for number in range(count):
                write_png(tmp_path / split / name / f"{number}.png", pixels(3, 3))
    found = data.images(tmp_path)
    assert (len(found.train), len(found.test)) == (8, 4)
    assert found.class_names == ("cat", "dog")


def test_split_with_other_classes_for_testing_is_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "train" / "cat" / "0.png", pixels(3, 3))
    write_png(tmp_path / "test" / "dog" / "0.png", pixels(3, 3))
    refusal(data.images, tmp_path, "same classes", "cat", "dog")


def test_images_of_two_sizes_name_the_odd_one(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", pixels(4, 6))
    odd = write_png(tmp_path / "b.png", pixels(5, 6))
    with pytest.raises(DataError, match=r"b\.png: expected 6 x 4 pixels as in a\.png, got 6 x 5"):
        data.images(tmp_path)
    assert odd.exists()


def test_images_of_sixteen_bits_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    write_png(tmp_path / "b.png", np.zeros((4, 4), np.uint16))
    refusal(data.images, tmp_path, "b.png", "8 bits", "I;16")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    refusal(data.images, tmp_path, "IDX files, CIFAR-10 .bin files or PNG or JPEG images", "none")


def test_empty_class_is_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "cat" / "0.png", pixels(3, 3))
    (tmp_path / "dog").mkdir()
    refusal(data.images, tmp_path, "dog", "none")


def test_images_beside_subfolders_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "cat" / "0.png", pixels(3, 3))
    write_png(tmp_path / "1.png", pixels(3, 3))
    refusal(data.images, tmp_path, "1 images beside 1 subfolders")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_truncated_image_is_read_alike_or_refused(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels(4, 4)).save(stream, kind)
    whole = stream.getvalue()
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(whole)
    expected = sorted_rows(all_images(data.images(tmp_path)))

    def is_refused(length: int) -> bool:
        (tmp_path / "b.png").write_bytes(whole[:length])
        try:
            found = data.images(tmp_path)
        except DataError as error:
            return "b.png" in str(error)
        # What is lost is only checksums and the mark at the very end.
        assert sorted_rows(all_images(found)) == expected
        return False

    refused = [is_refused(length) for length in range(len(whole))]
    assert refused == sorted(refused, reverse=True)
    # PNG: checksums of 8 bytes, an end chunk of 12, and the last byte's unused bits.
    assert sum(refused) >= len(whole) - 21


def test_single_image_file_is_refused(tmp_path: Path) -> None:
    refusal(data.images, write_png(tmp_path / "a.png", pixels(3, 3)), "a folder of images")


def test_absent_pillow_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png(tmp_path / "a.png", pixels(3, 3))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(NotRun, match=r"a\.png: images need Pillow: pip install 'kexue\[images\]'"):
        data.images(tmp_path)


def test_photographs_without_pillow_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(NotRun, match=r"photographs need Pillow: pip install"):
        data.photographs()


# Tables


def test_csv_with_named_classes_comes_back_as_iris(tmp_path: Path) -> None:
    iris = load_iris()
    lines = [",".join([*iris.feature_names, "species"])]
    for row, target in zip(iris.data, iris.target, strict=True):
        lines.append(",".join([*map(repr, row.tolist()), str(iris.target_names[target])]))
    path = tmp_path / "flowers.csv"
    path.write_text("\n".join(lines) + "\n")
    table = data.tabular(path)
    assert np.array_equal(table.features, iris.data)
    assert np.array_equal(table.target, iris.target)
    assert table.feature_names == iris.feature_names
    assert table.target_names == ["setosa", "versicolor", "virginica"]
    assert table.name == "flowers"


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
def test_table_without_names_is_read_with_each_separator(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "table.txt"
    rows = [["1", "2.5", "7"], ["-3e2", "0", "8"]]
    path.write_text("\n\n".join(separator.join(row) for row in rows))
    table = data.tabular(path)
    assert table.features.tolist() == [[1, 2.5], [-300, 0]]
    assert table.feature_names == ["x0", "x1"]
    assert table.target.tolist() == [7, 8]
    assert table.target.dtype == np.int64


def test_table_with_real_targets_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("1,0.5\n2,1.5\n")
    assert data.tabular(path).target.tolist() == [0.5, 1.5]


def test_quoted_cells_may_hold_the_separator(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('a,b,kind\n1,2,"one, two"\n3,4,three\n')
    assert data.tabular(path).target_names == ["one, two", "three"]


def test_npz_table_is_read(tmp_path: Path) -> None:
    features, target = RNG.normal(size=(5, 3)).astype(np.float32), np.arange(5)
    np.savez(tmp_path / "t.npz", X=features, y=target)
    table = data.tabular(tmp_path / "t.npz")
    assert table.features.dtype == np.float64
    assert np.array_equal(table.features, features)
    assert np.array_equal(table.target, target)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,c\n1,2,x\n1,,y\n", ["line 3", "column b", "''"]),
        ("a,b,c\n\n1,2,x\n1,nan,y\n", ["line 4", "column b", "'nan'"]),
        ("1,2,x\n1,2,3,y\n", ["line 2", "3 columns", "got 4"]),
        ("1\n2\n", ["one feature and the target"]),
        ("a,b\n", ["rows of numbers"]),
        ("", ["empty"]),
    ],
)
def test_broken_table_names_line_and_column(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    refusal(data.tabular, path, *words)


def test_npz_table_without_target_lists_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", X=np.zeros((2, 2)), z=np.zeros(2))
    refusal(data.tabular, tmp_path / "t.npz", "array y", "X, z")


def test_npz_table_with_a_target_of_another_length_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", X=np.zeros((2, 2)), y=np.zeros(3))
    refusal(data.tabular, tmp_path / "t.npz", "expected 2 numbers", "(3,)")


def test_unknown_table_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"boston: expected .* diabetes, digits, iris, wine"):
        data.tabular("boston")


# Matrices


def save_torch(path: Path, value: Any) -> None:
    torch.save(torch.as_tensor(value), path)


MATRIX_WRITERS: dict[str, Callable[[Path, np.ndarray], object]] = {
    ".npy": np.save,
    ".npz": lambda path, array: np.savez(path, weight=array),
    ".pt": save_torch,
    ".pth": lambda path, array: torch.save({"weight": torch.from_numpy(array)}, path),
    ".safetensors": lambda path, array: save_file({"weight": torch.from_numpy(array)}, path),
    ".csv": lambda path, array: np.savetxt(path, array, delimiter=",", fmt="%.17g"),
    ".txt": lambda path, array: np.savetxt(path, array, fmt="%.17g"),
}


@pytest.mark.parametrize("suffix", MATRIX_WRITERS)
def test_matrix_comes_back_from_each_kind_of_file(tmp_path: Path, suffix: str) -> None:
    array = RNG.normal(size=(4, 3))
    path = tmp_path / f"matrix{suffix}"
    MATRIX_WRITERS[suffix](path, array)
    found = data.matrix(path)
    assert found.dtype == np.float64
    assert np.array_equal(found, array)


def test_svmlight_matrix_is_dense_and_without_its_target(tmp_path: Path) -> None:
    path = tmp_path / "m.svmlight"
    path.write_text("1 1:0.5 3:2\n-1 2:4\n")
    assert data.matrix(path).tolist() == [[0.5, 0, 2], [0, 4, 0]]


def test_matrix_keeps_single_precision_and_widens_the_rest(tmp_path: Path) -> None:
    for dtype, expected in [
        ("float32", "float32"),
        (">f4", "float32"),
        ("float16", "float32"),
        ("int16", "float64"),
        ("bool", "float64"),
    ]:
        np.save(tmp_path / "m.npy", np.ones((2, 2), dtype))
        assert data.matrix(tmp_path / "m.npy").dtype == expected


def test_matrix_of_brain_floats_comes_back_as_single_precision(tmp_path: Path) -> None:
    array = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    save_file({"weight": array}, tmp_path / "m.safetensors")
    found = data.matrix(tmp_path / "m.safetensors")
    assert found.dtype == np.float32
    assert found.tolist() == [[1.5, -2.0]]


def test_single_vector_becomes_a_column(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.arange(3.0))
    assert data.matrix(tmp_path / "m.npy").tolist() == [[0], [1], [2]]


def test_only_matrix_among_other_arrays_is_taken(tmp_path: Path) -> None:
    torch.save({"weight": torch.eye(2), "bias": torch.zeros(2)}, tmp_path / "m.pt")
    assert np.array_equal(data.matrix(tmp_path / "m.pt"), np.eye(2))


def test_several_matrices_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"query": torch.eye(2), "key": torch.ones(3, 3)}, tmp_path / "m.safetensors")
    refusal(data.matrix, tmp_path / "m.safetensors", "query (2, 2)", "key (3, 3)")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 2, 2)), "(2, 2, 2)"),
        (np.zeros((0, 2)), "(0, 2)"),
        (np.zeros(()), "()"),
        (np.zeros((2, 2), complex), "complex128"),
        (np.array([["a"]]), "str"),
    ],
)
def test_array_that_is_no_matrix_is_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "m.npy", array)
    refusal(data.matrix, tmp_path / "m.npy", words)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_truncated_matrix_is_refused_or_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    array = RNG.normal(size=(2, 2))
    MATRIX_WRITERS[suffix](path, array)
    whole = path.read_bytes()
    for length in sorted({*range(0, len(whole), 7), len(whole) - 1}):
        path.write_bytes(whole[:length])
        refusal(data.matrix, path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors", ".svm", ".jpg"])
def test_file_of_another_kind_is_no_matrix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"\xff\xd8\xff\xe0 this is a photograph")
    refusal(data.matrix, path)


class Trespasser:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def write_object_npy(path: Path, thing: object) -> None:
    array = np.empty((1, 1), object)
    array[0, 0] = thing
    np.save(path, array, allow_pickle=True)


def write_object_npz(path: Path, thing: object) -> None:
    array = np.empty((1, 1), object)
    array[0, 0] = thing
    np.savez(path, x=array)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".npy", write_object_npy),
        (".npz", write_object_npz),
        (".pt", lambda path, thing: torch.save(thing, path)),
        (".npy", lambda path, thing: path.write_bytes(pickle.dumps(thing))),
        (".pt", lambda path, thing: path.write_bytes(pickle.dumps(thing))),
    ],
    ids=["npy", "npz", "pt", "pickle-as-npy", "pickle-as-pt"],
)
@pytest.mark.parametrize("read", [data.matrix, data.images], ids=["matrix", "images"])
def test_nothing_is_ever_unpickled(
    tmp_path: Path,
    suffix: str,
    write: Callable[[Path, object], object],
    read: Callable[[Path], object],
) -> None:
    left_behind = tmp_path / "left-behind"
    path = tmp_path / f"trap{suffix}"
    write(path, Trespasser(left_behind))
    refusal(read, path)
    assert not left_behind.exists()


# Text


def test_text_is_read_without_mark_and_with_plain_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xe7\xa7\x91")
    assert data.text(path) == "one\ntwo\nthree\n科"


def test_gzipped_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress("科学空间".encode()))
    assert data.text(path) == "科学空间"


def test_text_in_another_encoding_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("abc 科学".encode("gb18030"))
    refusal(data.text, path, "UTF-8", "0xbf", "position 4")


def test_empty_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" \n")
    refusal(data.text, path, "empty")


@pytest.mark.parametrize("read", [data.text, data.images, data.matrix], ids=lambda f: f.__name__)
def test_file_that_the_system_does_not_give_is_named(
    tmp_path: Path, read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret.npy"
    np.save(path, pixels(3, 2, 2))

    def refuse(self: Path, *arguments: Any, **settings: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    refusal(read, path, "Permission denied")


def test_folder_is_no_text(tmp_path: Path) -> None:
    refusal(data.text, tmp_path, "a file", "a folder")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Pi is 3.14, e.g. a number. Yes.", ["Pi is 3.14, e.g. a number.", "Yes."]),
        ("J. S. Bach met Mr. Smith. Then left.", ["J. S. Bach met Mr. Smith.", "Then left."]),
        ('He said "Go." She went.', ['He said "Go."', "She went."]),
        ("Wait... and see. Now.", ["Wait... and see.", "Now."]),
        (
            "A heading\n\nThe  first\nline. 1. A list.",
            ["A heading", "The first line.", "1. A list."],
        ),
        ("今天下雨。明天呢？好！", ["今天下雨。", "明天呢？", "好！"]),
        ("“走吧。”他说。", ["“走吧。”", "他说。"]),
        ("我……我不知道。（真的！）是吗？！", ["我……我不知道。", "（真的！）", "是吗？！"]),
        ("他叫“好！”，就走了。", ["他叫“好！”，就走了。"]),
        ("这一行\n接着下一行。", ["这一行接着下一行。"]),
        ("", []),
        (" \n\n ", []),
    ],
)
def test_sentences_of_english_and_chinese(text: str, expected: list[str]) -> None:
    assert data.sentences(text) == expected


@given(st.text(alphabet='aB 。！.?\n”"12科', max_size=60))
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    assert "".join("".join(data.sentences(text)).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in data.sentences(text))


def test_prose_has_thousands_of_sentences() -> None:
    assert 2000 < len({s for s in data.sentences(data.prose()) if 40 <= len(s) <= 300}) < 4000


@pytest.mark.parametrize(
    ("name", "count", "labels"),
    [("lcqmc-dev.txt", 8802, {0, 1}), ("sts-b-train.txt", 5231, set(range(6)))],
)
def test_chinese_pairs_are_read(real_data: Path, name: str, count: int, labels: set[int]) -> None:
    pairs = data.pairs(real_data / "chinese" / name)
    assert len(pairs) == count
    assert {pair.label for pair in pairs} == labels
    assert all(isinstance(pair.label, int) for pair in pairs)


def test_pairs_may_have_real_labels_or_none(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\t4.25\n\nc\td\t-1\n")
    assert data.pairs(path) == [data.Pair("a", "b", 4.25), data.Pair("c", "d", -1)]
    path.write_text("a\tb\nc\td\n")
    assert data.pairs(path) == [data.Pair("a", "b", None), data.Pair("c", "d", None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a b c\n", ["line 1", "2 or 3 columns", "got 1"]),
        ("a\tb\t1\nc\td\n", ["line 2", "3 columns as above", "got 2"]),
        ("a\tb\t1\td\n", ["line 1", "got 4"]),
        ("a\tb\tyes\n", ["line 1", "a number", "'yes'"]),
        ("a\tb\tnan\n", ["line 1", "'nan'"]),
        ("a\tb\t1\nc\t \t1\n", ["line 2", "two sentences"]),
    ],
)
def test_broken_pairs_name_their_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(text)
    refusal(data.pairs, path, *words)


# Characters


@given(st.text(min_size=1, max_size=80))
def test_characters_decode_what_they_encode(text: str) -> None:
    characters = data.Characters(text)
    assert len(characters) == len(set(text))
    assert characters.decode(characters.encode(text)) == text
    assert torch.equal(characters.tokens, characters.encode(text))


def test_characters_stand_in_the_order_of_their_code_points() -> None:
    assert data.Characters("cabbage").symbols == ("a", "b", "c", "e", "g")


def test_sized_vocabulary_keeps_the_most_frequent_and_one_symbol_for_all_others() -> None:
    characters = data.Characters("aaabbcd", size=3)
    assert characters.symbols == ("a", "b", data.Characters.OTHER)
    assert characters.encode("abcdé").tolist() == [0, 1, 2, 2, 2]


def test_sized_vocabulary_of_few_characters_still_knows_others() -> None:
    characters = data.Characters("ab", size=10)
    assert len(characters) == 3
    assert characters.decode(characters.encode("abz")) == "ab\N{REPLACEMENT CHARACTER}"


def test_replacement_character_in_a_sized_text_is_one_of_the_others() -> None:
    text = "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}ab"
    characters = data.Characters(text, size=3)
    assert characters.encode(text).tolist() == [2, 2, 0, 1]


def test_prose_has_sixty_four_symbols_where_asked() -> None:
    characters = data.Characters(data.prose().lower(), size=64)
    assert len(characters) == 64
    assert int(characters.tokens.max()) == 63


def test_unknown_character_is_named() -> None:
    with pytest.raises(ValueError, match=r"every character .* among the 2 .* got 'c'"):
        data.Characters("ab").encode("abc")


@pytest.mark.parametrize("tokens", [[2], [-1]])
def test_unknown_symbol_is_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got"):
        data.Characters("ab").decode(tokens)


@pytest.mark.parametrize(("text", "size"), [("", None), ("ab", 1), ("ab", 0)])
def test_vocabulary_without_characters_is_refused(text: str, size: int | None) -> None:
    with pytest.raises(ValueError, match="got"):
        data.Characters(text, size)


def test_batches_are_windows_of_the_text() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    characters = data.Characters(text)
    batches = characters.batches(7, 5, torch.Generator().manual_seed(0))
    for batch in islice(batches, 20):
        assert batch.shape == (5, 7)
        assert batch.dtype == torch.int64
        assert all(characters.decode(window) in text for window in batch)


def test_batches_reach_the_first_and_the_last_window() -> None:
    characters = data.Characters("abcd")
    batches = characters.batches(3, 64, torch.Generator().manual_seed(0))
    assert {characters.decode(window) for window in next(batches)} == {"abc", "bcd"}


def test_batches_depend_on_their_generator_alone() -> None:
    characters = data.Characters(data.prose())

    def drawn(seed: int) -> torch.Tensor:
        batches = characters.batches(16, 8, torch.Generator().manual_seed(seed))
        return torch.stack(list(islice(batches, 3)))

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_batches_may_come_from_a_part_of_the_text() -> None:
    characters = data.Characters("ab" * 50 + "cd" * 50)
    batches = characters.batches(
        4, 32, torch.Generator().manual_seed(0), tokens=characters.tokens[100:]
    )
    assert set(characters.decode(next(batches).flatten())) == {"c", "d"}


@pytest.mark.parametrize(("length", "batch"), [(0, 1), (1, 0), (5, 1)])
def test_batches_refuse_impossible_windows_at_once(length: int, batch: int) -> None:
    with pytest.raises(ValueError, match="got"):
        data.Characters("abcd").batches(length, batch, torch.Generator())


# What a study sees


def test_data_without_a_path_are_the_embedded_ones() -> None:
    embedded = data.Data()
    assert embedded.path is None
    assert embedded.fingerprint() is None
    assert not embedded.holds_text
    assert embedded.images().name == "digits"
    assert embedded.text() == data.prose()
    assert embedded.tabular().name == "iris"
    assert embedded.tabular("wine").name == "wine"
    assert embedded.matrix() is None
    assert embedded.pairs() is None


def test_data_with_a_path_are_the_users(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("1,2\n3,4\n")
    users = data.Data(path)
    assert users.holds_text
    assert users.text() == "1,2\n3,4\n"
    assert users.tabular().name == "table"
    assert users.tabular("wine").name == "wine"
    assert users.matrix().tolist() == [[1, 2], [3, 4]]
    path.write_text("a\tb\n")
    assert users.pairs() == [data.Pair("a", "b")]


def test_users_images_are_split_by_the_runs_seed(tmp_path: Path) -> None:
    path = write_idx(tmp_path, "train", pixels(30, 3, 3), None)
    found = data.Data(path, seed=5).images()
    assert torch.equal(found.test.images, data.images(path, seed=5).test.images)
    assert not data.Data(path).holds_text


def test_path_to_nothing_is_refused_at_once(tmp_path: Path) -> None:
    refusal(data.Data, tmp_path / "absent", "nothing of this name")


def test_fingerprint_follows_the_contents_and_not_the_name(tmp_path: Path) -> None:
    for name, contents in [("a", "one"), ("b", "one"), ("c", "two")]:
        (tmp_path / name).write_text(contents)
    a, b, c = (data.Data(tmp_path / name).fingerprint() for name in "abc")
    assert a == b != c


def test_fingerprint_of_images_covers_the_labels_beside_them(tmp_path: Path) -> None:
    path = write_idx(tmp_path, "train", pixels(3, 2, 2), np.zeros(3, np.uint8))
    before = data.Data(path).fingerprint()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.ones(3, np.uint8)))
    assert data.Data(path).fingerprint() != before


def test_fingerprint_of_a_folder_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    before = data.Data(tmp_path).fingerprint()
    assert data.Data(tmp_path).fingerprint() == before
    (tmp_path / "b").rename(tmp_path / "c")
    renamed = data.Data(tmp_path).fingerprint()
    (tmp_path / "sub" / "a").write_text("three")
    assert len({before, renamed, data.Data(tmp_path).fingerprint()}) == 3
