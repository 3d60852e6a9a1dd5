r"""Formulas that fit the window.

An image on a web page has `max-width: 100%`: on a narrow screen it becomes smaller. A display
formula has nothing like it. It is typeset at one size, and where the window is narrower it sticks
out, widens the page, or is cut off. Line breaking answers this by rewriting the formula, which
spoils what its author has arranged with care. The article's answer keeps the arrangement and
scales the formula: hard on the eyes, it says, but it works in need. Its script runs once, after
typesetting. It does not follow the window, it prints well only from a window as wide as the paper,
and it has no lower limit. Can a small script do without these three limits, for any engine?

## The factor

Let $A$ be the width that the formula's block offers and $N$ the width that the formula has at its
own font size $f$. Font metrics are proportional to the font size, so that the formula fits exactly
at the size $sf$ with

$$s = \min\Big(1, \frac{A}{N}\Big).$$

A formula that nobody can read does not fit either. With a smallest size of $m$ pixels

$$s \ge \min\Big(1, \frac{m}{f}\Big),$$

and where this bound is the larger one, the block becomes a scroller of its own: the reader moves
the formula and not the page. With the usual sizes $f = 1.21 \cdot 16$ of KaTeX and
$f = 1.273 \cdot 16$ of MathJax (whose factor brings its x-height to that of the text, here
DejaVu Sans), and $m = 10$, the smallest scales are $0.5165$ and $0.4910$.

Not everything is proportional to the font. Rules, padding and the gaps around numbers are in
pixels, and the unit `ex` may snap to whole pixels: an image 80 ex wide has been measured at 721
pixels for a font of 16 pixels, and at 640 for one of 15.2, where 685 were expected. So the factor
is taken 0.2 percent smaller, and what was written is measured again and corrected.

## Where $N$ hides

The width of a formula is not the width of its element. A numbered MathJax formula is a container
with a minimum width; compare it with itself and it never overflows. What has to be set is the size
of its child, for the size of the container holds the factor 1.273. In KaTeX the number is taken out
of the flow, and would be printed over a centred formula unless

$$N = \sum_i b_i + 2\,(t + 1\,\mathrm{em})$$

for the boxes $b_i$ of the formula and the width $t$ of its number.

## Paper

A script cannot measure the printed page. But $N/f$, the width in em, can be left in the document,
and then a style sheet can divide: inside a block that is a size container the size
`min(f, 100cqi / N_em)` is right on any paper, with no script at work.

## What is measured

Polynomials of 4 to 32 terms, each with a number, are loaded in a window 700 pixels wide, which is
then resized. At each width the formulas are counted that stick out of the window and cannot be
scrolled by themselves to both of their ends. The claim holds if with the script none does; if no
formula is ever set below 9.99 pixels; if after all that resizing the sizes at 1400 pixels are those
of a page freshly loaded at 1400 pixels, within half a percent; and if at least 20 of the 42 cases
do stick out without the script, for otherwise there was no problem to solve. Each is taken over all
engines, the worst of which counts. A smaller budget has fewer windows and only KaTeX, and the 20 of
42 stand for their share of its cases, rounded up.

MathJax 4 can scale on its own, with `displayOverflow: "scale"`. It does so once, when it typesets.

## What the reader should see

In the curves the size is flat while there is room, then falls along $A/N$ and stops at 10 pixels;
the points are measured in a browser, the lines are the formula above. Without the script, most
cases are cut off. MathJax's own scaling helps where the window stays as it was, and
remembers a narrow window for ever.
"""

from __future__ import annotations

import functools
import http.server
import io
import json
import math
import mimetypes
import os
import shutil
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kexue.lab import Lab, NotRun
from kexue.lab.report import asset_path

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Playwright turns hinting off, readers have it on; ex snaps to whole pixels only with it.
NOT_FLAGS = ("--font-render-hinting=none",)
TERMS = (4, 8, 12, 16, 20, 26, 32)
WINDOWS = (1400, 1000, 700, 500, 400, 320)
LOADED_AT, WIDE, HEIGHT = 700, 1400, 900
SMALLEST, BARE_SHARE = 9.99, 20 / 42

# What a formula's own boxes cover, whatever the engine; the trees for screen readers are left out.
MEASURE = """() => {
  const blocks = [...document.querySelectorAll('mjx-container[display="true"], .katex-display')];
  return blocks.map((block) => {
    const formula = block.querySelector(":scope > mjx-math, :scope > svg, .katex-html");
    const boxes = [formula, ...formula.querySelectorAll("*")]
      .map((element) => element.getBoundingClientRect()).filter((box) => box.width > 0);
    const frame = block.getBoundingClientRect();
    const left = Math.min(...boxes.map((box) => box.left));
    const right = Math.max(...boxes.map((box) => box.right));
    const scrolls = /auto|scroll/.test(getComputedStyle(block).overflowX) &&
      left >= frame.left - 1 && right <= frame.left + block.scrollWidth + 1 &&
      frame.left >= -1 && frame.right <= innerWidth + 1;
    return {
      out: !scrolls && (right > innerWidth + 1 || left < -1),
      size: parseFloat(getComputedStyle(formula).fontSize),
      state: block.dataset.mathfit || "",
      scale: Number(block.dataset.mathfitScale || 1),
    };
  });
}"""
TWO_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
SHIFT = """() => new Promise((done) => {
  let sum = 0;
  new PerformanceObserver((list) => list.getEntries().forEach((one) => { sum += one.value; }))
    .observe({type: "layout-shift", buffered: true});
  setTimeout(() => done(sum), 100);
})"""


@dataclass(frozen=True)
class Engine:
    """A way to typeset a page: what goes into its head, and what tells that it is done."""

    name: str
    head: str
    ready: str
    mathjax: bool


def mathjax(version: int, output: str = "chtml", **settings: Any) -> Engine:
    """Return MathJax 3 or 4 with CHTML or SVG output; `settings` go to its output jax."""
    config: dict[str, Any] = {"tex": {"tags": "ams"}, "output": settings}
    folder = f"/packages/mathjax{version}/" + ("es5/" if version == 3 else "")
    if version == 4:
        config["output"]["fontPath"] = "/packages/@mathjax/%%FONT%%-font"
    else:
        config = {"tex": {"tags": "ams"}, output: settings}
    head = (
        f"<script>MathJax = {json.dumps(config)}</script>"
        f'<script defer src="{folder}tex-{output}.js"></script>'
    )
    name = f"MathJax {'3.2.2' if version == 3 else '4.1.3'}"
    return Engine(name, head, "() => window.MathJax?.startup?.promise?.then(() => true)", True)


def katex(version: int) -> Engine:
    """Return KaTeX 0.16 or 0.19; it typesets every `.tex` once the page is parsed."""
    folder = f"/packages/katex{version}/dist/"
    head = (
        f'<link rel="stylesheet" href="{folder}katex.min.css">'
        f'<script defer src="{folder}katex.min.js"></script>'
        "<script>document.addEventListener('DOMContentLoaded', () => {"
        "for (const one of document.querySelectorAll('.tex')) "
        "katex.render(one.textContent, one, {displayMode: true, throwOnError: false});"
        "window.typeset = true})</script>"
    )
    return Engine(f"KaTeX 0.{version}", head, "() => window.typeset === true", False)


def polynomial(terms: int) -> str:
    """Return a polynomial of so many terms in TeX.

    Examples
    --------
    >>> polynomial(3)
    'p(x) = a_{0} + a_{1} x + a_{2} x^{2}'
    """
    powers = ["", " x", *(f" x^{{{k}}}" for k in range(2, terms))]
    return "p(x) = " + " + ".join(f"a_{{{k}}}{powers[k]}" for k in range(terms))


def article(
    engine: Engine, formulas: Sequence[str], *, script: str = "", numbered: bool = True
) -> str:
    """Return a page with a line of text before each formula; `script` comes first in its head."""
    blocks = []
    for number, tex in enumerate(formulas, start=1):
        blocks.append(f"<p>Formula {number} stands between two lines of text.</p>")
        if engine.mathjax:
            kind = "equation" if numbered else "equation*"
            blocks.append(rf"<div>\begin{{{kind}}}{tex}\end{{{kind}}}</div>")
        else:
            tag = rf"\tag{{{number}}}" if numbered else ""
            blocks.append(f'<div class="tex">{tex} {tag}</div>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Formulas</title>{script}"
        '<style>body { font: 16px "DejaVu Sans", sans-serif; margin: 8px }</style>'
        f"{engine.head}</head><body>{''.join(blocks)}<p>The end.</p></body></html>"
    )


MATHFIT = '<script src="/mathfit.js"></script>'


def node_modules() -> Path:
    """Return the folder of the npm packages: ``KEXUE_NODE_MODULES``, here, or in the checkout."""
    places = [Path("node_modules"), Path(__file__).resolve().parents[3] / "node_modules"]
    if os.environ.get("KEXUE_NODE_MODULES"):
        places.insert(0, Path(os.environ["KEXUE_NODE_MODULES"]))
    for place in places:
        if all((place / name).is_dir() for name in ("mathjax3", "mathjax4", "katex16", "katex19")):
            return place.resolve()
    raise NotRun(
        "MathJax and KaTeX are needed, and are not in "
        f"{', '.join(str(place) for place in places)}: run `npm install` in a checkout of kexue, "
        "or let KEXUE_NODE_MODULES name its node_modules"
    )


def chromium() -> str:
    """Return the path of a Chromium."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise NotRun("a Chromium is needed, and none is on the path: install the package chromium")


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, pages: dict[str, str | bytes], folder: Path) -> None:
        self.pages = pages
        super().__init__(*arguments, directory=str(folder))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        page = self.pages.get(path)
        if path == "/mathfit.js":
            page = asset_path("mathfit.js").read_bytes()
        if path.startswith("/packages/"):
            self.path = path.removeprefix("/packages")
            super().do_GET()
        elif page is None:
            self.send_error(404)
        else:
            body = page.encode() if isinstance(page, str) else page
            kind = mimetypes.guess_type(path)[0] or "text/html"
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep the terminal clean."""


@contextmanager
def served(pages: dict[str, str | bytes], packages: Path) -> Iterator[str]:
    """Serve pages by path, the script and the npm packages from 127.0.0.1; yield the address.

    Pages may be added while the server runs.
    """
    handler = functools.partial(_Handler, pages=pages, folder=packages)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    serve = functools.partial(server.serve_forever, poll_interval=0.02)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def browser() -> Iterator[BrowserContext]:
    """Run a Chromium without a screen; its pages share one cache."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NotRun("playwright is needed: pip install 'kexue[browser]'") from error
    path = chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=path, args=list(FLAGS), ignore_default_args=list(NOT_FLAGS)
        )
        try:
            yield running.new_context()
        finally:
            running.close()


def open_page(chrome: BrowserContext, url: str, engine: Engine, width: int) -> Page:
    """Load a page in a window of this width; wait until it is typeset and its fonts are there."""
    page = chrome.new_page()
    page.set_viewport_size({"width": width, "height": HEIGHT})
    page.goto(url)
    page.wait_for_function(engine.ready)
    page.evaluate("() => document.fonts.ready.then(() => true)")
    page.evaluate(TWO_FRAMES)
    return page


def resize(page: Page, width: int) -> list[dict[str, Any]]:
    """Give the window another width, and measure all formulas after the next paint."""
    page.set_viewport_size({"width": width, "height": HEIGHT})
    page.evaluate(TWO_FRAMES)
    measured: list[dict[str, Any]] = page.evaluate(MEASURE)
    return measured


@dataclass(frozen=True)
class Finding:
    """What one kind of page did in all windows."""

    out: int
    cases: int
    smallest: float
    after: list[float]
    fresh: list[float]
    shift: float

    @property
    def difference(self) -> float:
        """Largest relative difference between resized and freshly loaded at the widest window."""
        pairs = zip(self.after, self.fresh, strict=True)
        return max(abs(after - fresh) / fresh for after, fresh in pairs)


def examine(chrome: BrowserContext, url: str, engine: Engine, windows: Sequence[int]) -> Finding:
    """Load at 700 pixels, resize through all windows and back to 1400; load afresh at 1400."""
    page = open_page(chrome, url, engine, LOADED_AT)
    shift = page.evaluate(SHIFT)
    cases = [case for width in windows for case in resize(page, width)]
    after = [case["size"] for case in resize(page, WIDE)]
    page.close()
    page = open_page(chrome, url, engine, WIDE)
    fresh = [case["size"] for case in page.evaluate(MEASURE)]
    page.close()
    smallest = min(case["size"] for case in cases)
    out = sum(case["out"] for case in cases)
    return Finding(out, len(cases), smallest, after, fresh, shift)


def run(lab: Lab) -> None:
    """Count what sticks out, with the script and without."""
    packages = node_modules()
    windows = lab.pick(smoke=(700, 320), quick=(1400, 700, 320), full=WINDOWS)
    terms = lab.pick(smoke=TERMS[::3], quick=TERMS, full=TERMS)
    engines = [katex(19)]
    if lab.budget == "full":
        engines = [mathjax(3), mathjax(4), *engines]
    formulas = [polynomial(count) for count in terms]
    kinds = []
    for engine in engines:
        kinds.append((engine, "alone", ""))
        if engine.name.startswith("MathJax 4"):
            scaling = mathjax(4, displayOverflow="scale")
            kinds.append((scaling, 'displayOverflow: "scale"', ""))
        kinds.append((engine, "with mathfit.js", MATHFIT))
    pages: dict[str, str | bytes] = {
        f"/{i}.html": article(engine, formulas, script=script)
        for i, (engine, _, script) in enumerate(kinds)
    }
    with browser() as chrome, served(pages, packages) as address:
        found: dict[tuple[str, str], Finding] = {}
        for path, (engine, kind, _) in zip(lab.progress(list(pages), "pages"), kinds, strict=True):
            found[engine.name, kind] = examine(chrome, address + path, engine, windows)
        bare_url, fitted_url = [address + path for path in pages][-2:]
        _screenshots(lab, chrome, (bare_url, fitted_url), engines[-1])
        _curves(lab, chrome, fitted_url, engines[-1], terms)
        _shift(lab, chrome, pages, bare_url, engines[-1])
    _report(lab, found)


def _report(lab: Lab, found: dict[tuple[str, str], Finding]) -> None:
    lab.table(
        "What sticks out",
        [
            {
                "page": f"{engine}, {kind}",
                "sticking out": finding.out,
                "of": finding.cases,
                "smallest size [px]": round(finding.smallest, 2),
                "sizes at 1400 px, after resizing [px]": _sizes(finding.after),
                "loaded at 1400 px [px]": _sizes(finding.fresh),
                "layout shift": round(finding.shift, 4),
            }
            for (engine, kind), finding in found.items()
        ],
        "A formula sticks out if part of it lies outside the window and its block cannot be "
        "scrolled to it. Sizes are those of the four longest formulas.",
    )
    fitted = [finding for (_, kind), finding in found.items() if "mathfit" in kind]
    bare = [finding for (_, kind), finding in found.items() if kind == "alone"]
    cases = fitted[0].cases
    out = max(finding.out for finding in fitted)
    lab.claim(f"with mathfit.js, formulas that stick out, of {cases}", out, "==", 0)
    smallest = min(finding.smallest for finding in fitted)
    lab.claim("with mathfit.js, smallest computed size of a formula [px]", smallest, ">=", SMALLEST)
    difference = max(finding.difference for finding in fitted)
    statement = "with mathfit.js, sizes at 1400 px: resized against freshly loaded, relative"
    lab.claim(statement, difference, "<=", 0.005)
    needed = math.ceil(BARE_SHARE * cases - 1e-9)
    out = min(finding.out for finding in bare)
    lab.claim(f"without it, formulas that stick out, of {cases}", out, ">=", needed)
    size = asset_path("mathfit.js").stat().st_size
    lab.observe("size of mathfit.js [bytes]", size, "<=", 12_000)


def _sizes(sizes: list[float]) -> str:
    return " ".join(f"{size:.1f}" for size in sizes[-4:])


def _screenshots(lab: Lab, chrome: BrowserContext, urls: tuple[str, str], engine: Engine) -> None:
    from matplotlib import pyplot
    from matplotlib.image import imread

    widths, height = (900, 560, 320), 360
    figure, axes = pyplot.subplots(
        2, 3, figsize=(7.2, 3.3), gridspec_kw={"width_ratios": [width + 40 for width in widths]}
    )
    for row, (url, word) in enumerate(zip(urls, ("alone", "with mathfit.js"), strict=True)):
        page = open_page(chrome, url, engine, LOADED_AT)
        for axis, width in zip(axes[row], widths, strict=True):
            resize(page, width)
            page.set_viewport_size({"width": width, "height": height})
            axis.imshow(imread(io.BytesIO(page.screenshot())))
            axis.set(xticks=[], yticks=[], xlabel=f"{width} px" if row else "")
            axis.spines[["top", "right"]].set_visible(True)
            axis.grid(visible=False)
        axes[row, 0].set_ylabel(word)
        page.close()
    caption = (
        f"The same page, typeset by {engine.name}, in three windows. Above, long formulas are cut "
        "off at the window's edge; below they fit, or scroll by themselves."
    )
    lab.figure("windows", figure, caption)


def _curves(
    lab: Lab, chrome: BrowserContext, url: str, engine: Engine, terms: Sequence[int]
) -> None:
    from matplotlib import pyplot

    widths = np.linspace(300, 1600, lab.pick(smoke=4, quick=14, full=27)).round().astype(int)
    page = open_page(chrome, url, engine, int(widths[0]))
    cases = [resize(page, int(width)) for width in widths]
    # N in em, as left for the printer, so that the line is not drawn through its own points.
    properties = "one => parseFloat(one.style.getPropertyValue('--mathfit-width'))"
    natural = page.evaluate(
        f"() => [...document.querySelectorAll('[data-mathfit-print=formula]')].map({properties})"
    )
    page.close()
    size = max(case["size"] for case in cases[-1])
    figure, axis = pyplot.subplots()
    fine = np.linspace(widths[0], widths[-1], 400)
    for i in sorted({0, len(terms) // 2, len(terms) - 1}):
        room = fine - 16
        law = np.clip(room / (natural[i] * size), 10 / size, 1) * size
        (line,) = axis.plot(fine, law, label=f"{terms[i]} terms")
        axis.plot(widths, [case[i]["size"] for case in cases], "o", color=line.get_color())
    axis.set(xlabel="width of the window [px]", ylabel="size of the formula [px]")
    axis.legend()
    caption = (
        rf"Size against width, {engine.name}: points measured, lines $f \min(1, A/N)$ and at least "
        "10 px, with $A$ the window less its margins of 16 px."
    )
    lab.figure("sizes", figure, caption)


def _shift(
    lab: Lab, chrome: BrowserContext, pages: dict[str, str | bytes], url: str, engine: Engine
) -> None:
    """Load what is typeset already: then nothing but the script may move the page."""
    page = open_page(chrome, url, engine, LOADED_AT)
    body = page.evaluate("() => document.body.innerHTML").replace('class="tex"', "")
    page.close()
    shifts = []
    for script in ("", MATHFIT):
        pages["/typeset.html"] = article(engine, [], script=script).replace("<p>The end.</p>", body)
        loads = []
        for _ in range(lab.pick(smoke=1, quick=3, full=3)):
            page = open_page(chrome, url.rpartition("/")[0] + "/typeset.html", engine, LOADED_AT)
            loads.append(page.evaluate(SHIFT))
            page.close()
        shifts.append(statistics.median(loads))
    lab.observe("layout shift at load, typeset beforehand, with mathfit.js", shifts[1], "<", 0.01)
    lab.observe("of this, caused by mathfit.js", shifts[1] - shifts[0], "<=", 0.005)
