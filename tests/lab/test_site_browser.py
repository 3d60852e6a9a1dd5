"""The pages in a real browser: what was seen once stays true."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kexue.lab.report import build_site
from kexue.lab.runner import Order, run_studies

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDTHS = (360, 768, 1440)
TYPESET = "() => window.MathJax?.startup?.promise?.then(() => true)"
# The colour of each text and the first opaque background behind it.
COLOURS = """() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const seen = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || !element.getClientRects().length) continue;
    if (element.closest("script, style, svg, mjx-assistive-mml, .skip")) continue;
    let behind = element, back = [0, 0, 0, 0];
    while (behind && (back = rgb(getComputedStyle(behind).backgroundColor))[3] === 0)
      behind = behind.parentElement;
    const colour = rgb(getComputedStyle(element).color);
    seen.set(colour + "|" + back, [colour, back, node.textContent.trim().slice(0, 30)]);
  }
  return [...seen.values()];
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    root = tmp_path_factory.mktemp("site")
    slugs = ("pendulum", "false_claim", "raises", "absent", "hostile")
    run_studies([Order(slug, root / "runs", studies="demo_studies") for slug in slugs])
    return build_site(root / "runs", root / "site", studies="demo_studies")[0].parent


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def _open(browser: Any, address: str, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else 0)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(address)
    page.wait_for_function(TYPESET)
    return page, complaints


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("slug", ["", "pendulum/", "hostile/", "raises/"])
def test_pages_fit_their_window_without_complaint(
    browser: Any, site: Path, slug: str, width: int
) -> None:
    page, complaints = _open(browser, (site / f"{slug}index.html").as_uri(), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    formulas = page.locator(".math").count()
    assert page.locator(".math > mjx-container").count() == formulas
    assert page.locator("[data-mml-node='merror'], mjx-merror").count() == 0
    loaded = "[...document.images].every(i => i.loading === 'lazy' || i.naturalWidth > 0)"
    assert page.evaluate(loaded)
    assert complaints == []
    page.close()


def test_the_long_formula_shrinks_or_scrolls_and_grows_back(browser: Any, site: Path) -> None:
    page, _ = _open(browser, (site / "pendulum/index.html").as_uri(), 360)
    block = page.locator("mjx-container[display=true]").first
    assert block.get_attribute("data-mathfit") in ("scaled", "scroll")
    page.set_viewport_size({"width": 2000, "height": 900})
    page.wait_for_timeout(100)
    wide = float(block.get_attribute("data-mathfit-scale"))
    page.set_viewport_size({"width": 500, "height": 900})
    page.wait_for_timeout(100)
    assert float(block.get_attribute("data-mathfit-scale")) < wide
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "pendulum/index.html", "false_claim/index.html"])
def test_text_has_contrast_aa(browser: Any, site: Path, name: str, scheme: str) -> None:
    def luminance(channels: list[float]) -> float:
        c = [x / 255 for x in channels[:3]]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in c]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    page, _ = _open(browser, (site / name).as_uri(), 1440, scheme)
    for colour, back, text in page.evaluate(COLOURS):
        high, low = sorted((luminance(colour), luminance(back)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text!r}: {colour} on {back}"
    page.close()


def test_the_page_is_usable_by_keyboard_and_screen_reader(browser: Any, site: Path) -> None:
    page, _ = _open(browser, (site / "pendulum/index.html").as_uri(), 768)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.locator("main").count() == 1
    assert page.locator("h1").count() == 1
    assert page.evaluate("[...document.images].every(image => image.alt.length > 10)")
    assert page.locator("mjx-assistive-mml").count() == page.locator(".math").count()
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    chinese = page.locator(".zh").first
    assert chinese.get_attribute("lang") == "zh-Hans"
    page.close()


def test_the_page_prints(browser: Any, site: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    import io

    page, _ = _open(browser, (site / "pendulum/index.html").as_uri(), 1440)
    printed = pypdf.PdfReader(io.BytesIO(page.pdf(format="A4", print_background=False)))
    text = "\n".join(sheet.extract_text() for sheet in printed.pages)
    assert 1 <= len(printed.pages) <= 4
    assert "The period of a pendulum" in text
    assert "Skip to the content" not in text
    page.close()


@pytest.mark.skipif(not os.environ.get("KEXUE_SCREENSHOTS"), reason="set it to a folder to look")
def test_screenshots(browser: Any, site: Path) -> None:
    folder = Path(os.environ["KEXUE_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("index.html", "pendulum/index.html"):
        for width in WIDTHS:
            for scheme in ("light", "dark"):
                page, _ = _open(browser, (site / name).as_uri(), width, scheme)
                target = folder / f"{name.replace('/', '-')}-{width}-{scheme}.png"
                page.screenshot(path=target, full_page=True)
                assert target.stat().st_size > 0
                page.close()
