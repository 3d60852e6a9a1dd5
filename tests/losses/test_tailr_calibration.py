"""Reliability diagrams and the expected calibration error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.losses import expected_calibration_error, reliability_diagram

EPS = torch.finfo(torch.float64).eps


def two(confidences: list[float]) -> torch.Tensor:
    """Two-class probabilities with these confidences in class 0."""
    c = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([c, 1 - c], 1)


def test_bins_of_five_samples_by_hand() -> None:
    # Bins of width 1/4: 0.5 starts the third; 0.75 and 1.0 are in the last.
    diagram = reliability_diagram(
        two([0.5, 0.7, 0.75, 0.95, 1.0]), torch.tensor([0, 1, 0, 0, 1]), n_bins=4
    )
    assert diagram.count.tolist() == [0, 0, 2, 3]
    assert diagram.count.dtype == torch.int64
    assert diagram.confidence[:2].isnan().all()
    assert diagram.accuracy[:2].isnan().all()
    assert diagram.confidence[2:].tolist() == pytest.approx([0.6, 0.9], rel=4 * EPS)
    assert diagram.accuracy[2:].tolist() == pytest.approx([1 / 2, 2 / 3], rel=4 * EPS)
    expected = (2 * 0.1 + 3 * (0.9 - 2 / 3)) / 5
    assert diagram.expected_calibration_error == pytest.approx(expected, rel=16 * EPS)
    assert diagram.maximum_calibration_error == pytest.approx(0.9 - 2 / 3, rel=16 * EPS)


def test_only_the_largest_probability_counts() -> None:
    # Right half of the time at confidence 1/2: calibrated, whatever the other classes hold.
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]])
    assert expected_calibration_error(probabilities, torch.tensor([0, 1])) == 0.0


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), n_bins=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_error_is_the_sum_over_bins_written_as_a_loop(n: int, n_bins: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(n, 4, generator=generator).double().mul(3).softmax(1)
    labels = torch.randint(4, (n,), generator=generator)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        k = min(math.floor(confidence * n_bins), n_bins - 1)
        bins.setdefault(k, []).append((confidence, row.index(confidence) == label))
    gaps = {
        k: abs(sum(c for c, _ in found) - sum(right for _, right in found)) / len(found)
        for k, found in bins.items()
    }
    diagram = reliability_diagram(probabilities, labels, n_bins=n_bins)
    assert {k: c for k, c in enumerate(diagram.count.tolist()) if c} == {
        k: len(found) for k, found in bins.items()
    }
    expected = sum(len(bins[k]) / n * gap for k, gap in gaps.items())
    assert diagram.expected_calibration_error == pytest.approx(expected, abs=64 * EPS)
    assert diagram.maximum_calibration_error == pytest.approx(max(gaps.values()), abs=64 * EPS)


def test_agrees_with_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 10, generator=generator).mul(2).softmax(1)
    labels = torch.where(
        torch.rand(500, generator=generator) < 0.6,
        probabilities.argmax(1),
        torch.randint(10, (500,), generator=generator),
    )
    for norm, ours in (
        ("l1", expected_calibration_error(probabilities, labels)),
        ("max", reliability_diagram(probabilities, labels).maximum_calibration_error),
    ):
        theirs = classification.MulticlassCalibrationError(10, n_bins=15, norm=norm)
        # Theirs sums 500 numbers in float32.
        assert ours == pytest.approx(theirs(probabilities, labels).item(), abs=1e-5)


@pytest.mark.bad_input
def test_predictions_are_checked() -> None:
    probabilities, labels = two([0.6, 0.9]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="n_bins must be at least 1, got 0"):
        expected_calibration_error(probabilities, labels, n_bins=0)
    with pytest.raises(ValueError, match=r"at least one sample.*\(0, 2\)"):
        expected_calibration_error(probabilities[:0], labels[:0])
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1,\)"):
        expected_calibration_error(probabilities, labels[:1])
    with pytest.raises(ValueError, match=r"between 0 and 1, got values from -3\.0 to 4\.0"):
        expected_calibration_error(two([4.0, 0.5]), labels)
    with pytest.raises(TypeError, match="probabilities must be a tensor of floating dtype"):
        expected_calibration_error(labels[:, None], labels)
