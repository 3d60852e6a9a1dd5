"""What stands on the pages, and what must not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kexue.lab.errors import StoreError
from kexue.lab.report import asset_path, build_site
from kexue.lab.report.figures import _INK, _PAPER, SERIES
from kexue.lab.report.markdown import article, inline
from kexue.lab.report.pages import number
from kexue.lab.runner import Order, run_studies, run_study

Build = Callable[..., Order]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0321, "0.0321"), (-1.5, "−1.5"), (3, "3"), (12345.678, "12346"),
        (2.51e-7, "2.51 × 10<sup>−7</sup>"), (0.0, "0"), (math.nan, "not a number"),
        (-math.inf, "−∞"), (123456, "123456"), (41.4096, "41.41"), (1e300, "1 × 10<sup>300</sup>"),
    ],
)  # fmt: skip
def test_numbers_are_set_as_in_print(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_formula_is_kept_from_markdown() -> None:
    assert inline("$a_1 * b_2 * c$") == '<span class="math">\\(a_1 * b_2 * c\\)</span>'
    assert '<div class="math">\\[x &lt; y\\]</div>' in article("$$\nx < y\n$$")


def test_dollars_in_prose_are_no_formula() -> None:
    assert "math" not in inline("it costs $5 or 6 $ at most")


def test_headings_and_tables_of_an_article() -> None:
    html = article("## A heading\n\n| a | b |\n|---|---|\n| $x$ | 2 |\n")
    assert "<h2>A heading</h2>" in html
    assert 'role="region"' in html


def test_text_from_data_is_escaped(order: Build) -> None:
    folder = run_study(order("hostile")).folder
    assert folder is not None
    page = (folder / "page.html").read_text()
    scripts = re.findall(r"<script[^>]*>", page)
    assert len(scripts) == 3  # mathfit, the configuration of MathJax, MathJax
    assert "<img src=x" not in page
    assert 'href="javascript' not in page
    assert page.count("&lt;script&gt;") >= 4


def test_the_site_escapes_too_and_links_every_page(order: Build, tmp_path: Path) -> None:
    run_studies([order("hostile"), order("pendulum"), order("raises"), order("absent")])
    index, skipped = build_site(order("x").out, tmp_path / "site", studies="demo_studies")
    html = index.read_text()
    assert skipped == []
    assert "Text from &lt;data&gt;" in html
    for href in re.findall(r'(?:href|src)="([^"#:]+)"', html):
        assert (index.parent / href).is_file(), href
    page = (index.parent / "pendulum" / "index.html").read_text()
    for href in re.findall(r'(?:href|src)="([^"#:]+)"', page):
        assert (index.parent / "pendulum" / href).is_file(), href
    assert "尚未完成" in html


def test_the_site_names_and_skips_what_it_cannot_read(order: Build, tmp_path: Path) -> None:
    run_study(order("pendulum", budget="smoke"))
    damaged = order("x").out / "training" / "20990101T000000-ffffff"
    damaged.mkdir(parents=True)
    (damaged / "result.json").write_text('{"schema": 99}')
    index, skipped = build_site(order("x").out, tmp_path / "site", studies="demo_studies")
    assert index.is_file()
    assert [str(damaged) in sentence for sentence in skipped] == [True]
    assert not (index.parent / "training").exists()


def test_a_site_replaces_a_site_and_nothing_else(order: Build, tmp_path: Path) -> None:
    run_study(order("pendulum", budget="smoke"))
    site, other = tmp_path / "site", tmp_path / "documents"
    build_site(order("x").out, site, studies="demo_studies")
    (site / "stale.html").touch()
    build_site(order("x").out, site, studies="demo_studies")
    assert not (site / "stale.html").exists()
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(StoreError, match="no site"):
        build_site(order("x").out, other, studies="demo_studies")
    assert (other / "thesis.tex").exists()


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="kexue run all"):
        build_site(tmp_path, tmp_path / "site")


def test_an_asset_that_is_not_there_is_named() -> None:
    assert asset_path("mathfit.js").is_file()
    for name in ("nothing.js", "../pages.py", "fonts"):
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            asset_path(name)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    high, low = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_series_of_a_figure_stands_out_in_both_schemes() -> None:
    for light, dark in SERIES:
        assert contrast(light, _PAPER[0]) >= 3.0
        assert contrast(dark, _PAPER[1]) >= 3.0
    assert contrast(_INK[0], _PAPER[0]) >= 7.0
    assert contrast(_INK[1], _PAPER[1]) >= 7.0


def test_a_figure_follows_the_readers_scheme(order: Build) -> None:
    folder = run_study(order("pendulum", budget="smoke")).folder
    assert folder is not None
    svg = (folder / "figures" / "period.svg").read_text()
    assert "prefers-color-scheme:dark" in svg
    drawn = svg[svg.index("</style>", svg.index("prefers-color-scheme")) :]
    assert "var(--ink)" in drawn
    assert "var(--c0)" in drawn
    assert not set(re.findall(r"#[0-9a-f]{6}", drawn)) & {light for light, _ in SERIES}
