"""Sheets of images: every pixel in its place."""

from __future__ import annotations

import pytest
import torch

from kexue.lab.sheets import sheet, sheet_figure


def test_a_sheet_keeps_every_pixel() -> None:
    images = torch.linspace(-1, 1, 3 * 2 * 2).reshape(3, 1, 2, 2)
    laid = sheet(images)
    assert laid.shape == (8, 8, 1)
    torch.testing.assert_close(laid[1:3, 1:3, 0], (images[0, 0] + 1) / 2)
    torch.testing.assert_close(laid[1:3, 5:7, 0], (images[1, 0] + 1) / 2)
    torch.testing.assert_close(laid[5:7, 1:3, 0], (images[2, 0] + 1) / 2)
    assert bool((laid[4:, 4:] == 1).all())


def test_colours_stay_colours() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    laid = sheet(images, columns=2)
    assert laid.shape == (6, 14, 3)
    assert laid[2, 3].tolist() == laid[2, 10].tolist() == [0.0, 0.5, 1.0]


def test_values_out_of_range_are_clamped() -> None:
    laid = sheet(torch.tensor([-3.0, 5.0]).reshape(2, 1, 1, 1), columns=2)
    assert (laid[1, 1].item(), laid[1, 4].item()) == (0.0, 1.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_figure_has_one_sheet_for_every_name(channels: int) -> None:
    sheets = {"few": torch.zeros(5, channels, 4, 4), "many": torch.zeros(24, channels, 4, 4)}
    figure = sheet_figure(sheets)
    assert [axis.get_ylabel() for axis in figure.axes] == ["few", "many"]
    shapes = [axis.images[0].get_array().shape[:2] for axis in figure.axes]
    assert shapes == [(6, 72), (12, 72)]
