"""mathfit.js in a real browser, on what MathJax 3, MathJax 4 and KaTeX really leave in a page."""

from __future__ import annotations

import gzip
import io
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from kexue.lab import NotRun
from kexue.lab.report import asset_path
from kexue.studies import responsive_math as study

pytestmark = pytest.mark.browser
pytest.importorskip("playwright.sync_api")

ENGINES = {
    "mathjax3-chtml": study.mathjax(3, "chtml"),
    "mathjax3-svg": study.mathjax(3, "svg"),
    "mathjax4-chtml": study.mathjax(4, "chtml"),
    "mathjax4-svg": study.mathjax(4, "svg"),
    "katex16": study.katex(16),
    "katex19": study.katex(19),
}
KATEX = ENGINES["katex19"]
# Otherwise the browser asks for the fonts only when the first formula is shown.
FONTS = (
    '<p style="position: absolute; top: -99px"><i style="font-family: KaTeX_Math">x</i>'
    '<span style="font-family: KaTeX_Main">1</span></p>'
)
WIDTHS = (1600, 700, 500, 400, 320)
ENDS = (1600, 320)
# Unnumbered and numbered, short and long, and one whose width in em is known.
FORMULAS = [
    study.polynomial(4),
    study.polynomial(4) + r" \tag{1}",
    study.polynomial(12),
    study.polynomial(12) + r" \tag{2}",
    study.polynomial(20),
    study.polynomial(20) + r" \tag{3}",
    r"\rule{40em}{1em}",
]
LONG = study.polynomial(12)
SAFETY = 0.998
FLOOR = 10.0
MARGINS = 16
ERRORS = """window.errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("mathfit:fit", (event) => (window.fits = window.fits || []).push(
  [event.target.id || event.target.className || event.target.localName, event.detail]), true);"""
CASES = """() => {
  const blocks = [...document.querySelectorAll('mjx-container[display="true"], .katex-display')];
  return blocks.map((block) => {
    const formula = block.querySelector(":scope > mjx-math, :scope > svg, .katex-html");
    const style = getComputedStyle(block);
    const boxes = [formula, ...formula.querySelectorAll("*")]
      .map((element) => element.getBoundingClientRect()).filter((box) => box.width > 0);
    const frame = block.getBoundingClientRect();
    const inner = frame.width - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const scrollLeft = block.scrollLeft;
    block.scrollLeft = 1e6;
    const last = Math.max(...[formula, ...formula.querySelectorAll("*")]
      .map((element) => element.getBoundingClientRect())
      .filter((box) => box.width > 0).map((box) => box.right));
    block.scrollLeft = scrollLeft;
    return {
      state: block.dataset.mathfit || null,
      scale: Number(block.dataset.mathfitScale),
      size: parseFloat(getComputedStyle(formula).fontSize),
      left: Math.min(...boxes.map((box) => box.left)),
      right: Math.max(...boxes.map((box) => box.right)),
      first: frame.left, room: inner, last: last - frame.right,
      tabindex: block.getAttribute("tabindex"), role: block.getAttribute("role"),
      label: block.getAttribute("aria-label"), overflow: style.overflowX,
      print: block.hasAttribute("data-mathfit-print"),
    };
  });
}"""


@pytest.fixture(scope="module")
def packages() -> Any:
    try:
        return study.node_modules()
    except NotRun as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def chrome(chromium: str) -> Iterator[Any]:
    with study.browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages() -> dict[str, str | bytes]:
    return {}


@pytest.fixture(scope="module")
def address(pages: dict[str, str | bytes], packages: Any) -> Iterator[str]:
    with study.served(pages, packages) as url:
        yield url


@pytest.fixture(scope="module")
def show(
    chrome: Any, pages: dict[str, str | bytes], address: str
) -> Callable[[str, study.Engine, int], Any]:
    """Serve a page and open it; every error of the page is kept in `window.errors`."""
    number = itertools.count()

    def build(html: str, engine: study.Engine = KATEX, width: int = 700) -> Any:
        path = f"/{next(number)}.html"
        pages[path] = html.replace("<title>", f"<script>{ERRORS}</script><title>", 1)
        return study.open_page(chrome, address + path, engine, width)

    return build


@pytest.fixture
def katex(show: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Open a page whose body has `.tex` elements for KaTeX."""
    opened = []

    def build(
        body: str, *, script: str = study.MATHFIT, width: int = 700, style: str = "", html: str = ""
    ) -> Any:
        page = study.article(KATEX, [], script=script).replace("<p>The end.</p>", FONTS + body)
        page = page.replace("</style>", f"{style}</style>").replace("<html ", f"<html {html} ")
        opened.append(show(page, width=width))
        return opened[-1]

    yield build
    for page in opened:
        page.close()


ASIDE = "</main><i style='flex: 0 0 90px'>a</i>"


def tex(source: str, attributes: str = "") -> str:
    return f'<div class="tex" {attributes}>{source}</div>'


def cases(page: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.evaluate(CASES)
    return found


def resize(page: Any, width: int) -> list[dict[str, Any]]:
    page.bring_to_front()  # a page in the background gets one frame a second
    study.resize(page, width)
    return cases(page)


def settle(page: Any) -> None:
    page.evaluate(study.TWO_FRAMES)


@dataclass
class Journey:
    """A page of FORMULAS through all windows, and the same without the script through two."""

    page: Any
    bare_page: Any
    fitted: dict[int, list[dict[str, Any]]]
    bare: dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def journey(show: Callable[..., Any]) -> Callable[[str], Journey]:
    @cache
    def travel(name: str) -> Journey:
        engine = ENGINES[name]
        both = [
            show(study.article(engine, FORMULAS, script=script, numbered=False), engine)
            for script in (study.MATHFIT, "")
        ]
        fitted = {width: resize(both[0], width) for width in WIDTHS}
        bare = {width: resize(both[1], width) for width in ENDS}
        return Journey(*both, fitted, bare)

    return travel


every_engine = pytest.mark.parametrize("name", ENGINES)


@every_engine
def test_nothing_sticks_out_of_any_window_without_being_scrollable_to_both_ends(
    name: str, journey: Callable[[str], Journey]
) -> None:
    """Half a pixel is the script's tolerance, another half what a box may round to."""
    for width, found in journey(name).fitted.items():
        for case in found:
            assert case["left"] >= case["first"] - 1, (width, case)
            if case["state"] == "scroll":
                assert case["last"] <= 1, (width, case)
            else:
                assert case["right"] <= width - 7, (width, case)


@every_engine
def test_page_without_the_script_has_formulas_that_stick_out(
    name: str, journey: Callable[[str], Journey]
) -> None:
    assert sum(case["right"] > 320 for case in journey(name).bare[320]) >= 5


@every_engine
def test_no_formula_is_set_below_the_smallest_size(
    name: str, journey: Callable[[str], Journey]
) -> None:
    sizes = [case["size"] for found in journey(name).fitted.values() for case in found]
    assert min(sizes) >= 9.99


@every_engine
def test_scale_reaches_exactly_the_floor_and_then_the_block_scrolls(
    name: str, journey: Callable[[str], Journey]
) -> None:
    """The smallest scale is 10 px over the engine's own size: 0.4910, 0.5165 or 0.6250."""
    own = {"chtml": 20.368, "svg": 16.0}.get(name.partition("-")[2], 19.36)
    longest = journey(name).fitted[320][4]
    assert longest["state"] == "scroll"
    # 127.3 % is itself rounded to a tenth of a percent.
    assert journey(name).bare[320][4]["size"] == pytest.approx(own, abs=1e-3)
    assert longest["scale"] == pytest.approx(FLOOR / own, abs=5e-5)
    assert longest["overflow"] == "auto"


@every_engine
def test_wide_window_shows_formulas_exactly_as_without_the_script(
    name: str, journey: Callable[[str], Journey]
) -> None:
    fitted, bare = journey(name).fitted[1600], journey(name).bare[1600]
    natural = [pair for pair in zip(fitted, bare, strict=True) if pair[0]["state"] == "natural"]
    assert len(natural) >= 5
    for one, other in natural:
        assert one["scale"] == 1
        for key in ("size", "left", "right"):
            assert one[key] == pytest.approx(other[key], abs=1e-3)


@every_engine
def test_formula_shrinks_no_more_than_needed(name: str, journey: Callable[[str], Journey]) -> None:
    """0.2 % are given away for safety; in SVG up to a pixel in ten more, where `ex` snaps."""
    least = 0.90 if "svg" in name else 0.985
    for width in (700, 500):
        for case, bare in zip(journey(name).fitted[width], journey(name).bare[1600], strict=True):
            if case["state"] == "scaled" and bare["state"] is None:
                assert case["right"] - case["left"] <= case["room"] + 0.5
    rule = journey(name).fitted[500][6]
    if rule["state"] == "scaled":
        assert rule["right"] - rule["left"] >= least * rule["room"]


@pytest.mark.parametrize(
    ("name", "size"), [("mathjax3-chtml", 20.368), ("mathjax4-chtml", 20.368), ("katex19", 19.36)]
)
def test_scale_of_a_rule_40_em_wide_is_the_ratio_of_the_widths(
    name: str, size: float, journey: Callable[[str], Journey]
) -> None:
    """0.8396 at 20.368 px in 684 px. MathJax 4 pads its block by 2 px on either side."""
    room = 700 - MARGINS - (4 if name == "mathjax4-chtml" else 0)
    rule = journey(name).fitted[700][6]
    assert rule["room"] == pytest.approx(room)
    assert rule["scale"] == pytest.approx(SAFETY * room / (40 * size), rel=1e-3)


@every_engine
def test_sizes_after_resizing_are_those_of_a_fresh_load(
    name: str, journey: Callable[[str], Journey]
) -> None:
    trip = journey(name)
    before = [case["size"] for case in trip.fitted[1600]]
    resize(trip.page, 320)
    after = [case["size"] for case in resize(trip.page, 1600)]
    assert after == pytest.approx(before, rel=1e-4)


@every_engine
def test_no_resize_loop_and_no_other_error_is_reported(
    name: str, journey: Callable[[str], Journey]
) -> None:
    assert journey(name).page.evaluate("errors") == []


@pytest.mark.parametrize("name", ["mathjax3-chtml", "mathjax3-svg", "katex16", "katex19"])
def test_stop_leaves_the_page_byte_for_byte_as_without_the_script(
    name: str, journey: Callable[[str], Journey]
) -> None:
    trip = journey(name)
    resize(trip.page, 400)
    trip.page.evaluate("mathfit.stop()")
    body = "document.body.outerHTML"
    assert trip.page.evaluate(body) == trip.bare_page.evaluate(body)
    assert trip.page.evaluate("document.querySelectorAll('style').length") == (
        trip.bare_page.evaluate("document.querySelectorAll('style').length")
    )
    assert resize(trip.page, 700)[4]["state"] is None
    trip.page.evaluate("mathfit.start()")
    assert cases(trip.page)[4]["state"] in ("scaled", "scroll")


@pytest.mark.parametrize("name", ["mathjax4-chtml", "mathjax4-svg"])
def test_stop_takes_back_every_attribute_that_start_has_set_in_mathjax_4(
    name: str, journey: Callable[[str], Journey]
) -> None:
    """MathJax 4 goes on adding speech to the page, so that two loads differ; one does not."""
    page = journey(name).page
    page.wait_for_function("document.querySelectorAll('mjx-speech').length === 7")
    page.evaluate("mathfit.stop()")
    resize(page, 400)
    html = page.evaluate("document.body.outerHTML")
    assert "mathfit" not in html
    page.evaluate("mathfit.start()")
    assert "data-mathfit" in page.evaluate("document.body.outerHTML")
    resize(page, 320)
    page.evaluate("mathfit.stop()")
    assert page.evaluate("document.body.outerHTML") == html
    page.evaluate("mathfit.start()")


def test_mathjax_keeps_its_font_matching_its_menu_and_its_assistive_tree(
    journey: Callable[[str], Journey],
) -> None:
    trip = journey("mathjax3-chtml")
    resize(trip.page, 400)
    facts = """[...document.querySelectorAll('mjx-container')].map((one) => [
        one.style.fontSize, one.getAttribute("tabindex"), one.className,
        one.querySelector("mjx-assistive-mml").outerHTML])"""
    assert trip.page.evaluate(facts) == trip.bare_page.evaluate(facts)
    assert trip.page.evaluate("document.querySelector('mjx-container').style.fontSize") == "127.3%"


@pytest.mark.parametrize("variant", ["", ".leqno", ".fleqn"])
@pytest.mark.parametrize("width", [700, 500, 320])
def test_number_never_covers_the_formula_in_katex(
    variant: str, width: int, katex: Callable[..., Any]
) -> None:
    page = katex(tex(LONG + r"\tag{17}"), width=1600)
    page.evaluate(
        "(name) => document.querySelector('.katex-display').classList.add(name)",
        variant.removeprefix(".") or "plain",
    )
    resize(page, width)
    gap = page.evaluate("""() => {
      const box = (one) => one.getBoundingClientRect();
      const bases = [...document.querySelectorAll(".katex-base")].map(box);
      const number = box(document.querySelector(".katex-tag"));
      const left = Math.min(...bases.map((one) => one.left));
      const right = Math.max(...bases.map((one) => one.right));
      return Math.max(number.left - right, left - number.right);
    }""")
    assert gap >= 0


def test_keyboard_reaches_a_scroller_and_moves_it(katex: Callable[..., Any]) -> None:
    page = katex(tex(LONG), width=320)
    case = cases(page)[0]
    assert (case["tabindex"], case["role"], case["label"]) == ("0", "region", "Scrollable formula")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.katex-display').scrollLeft > 0")
    case = resize(page, 1600)[0]
    assert (case["tabindex"], case["role"], case["label"]) == (None, None, None)
    assert case["overflow"] == "visible"


def test_attributes_of_the_author_win_and_stay(katex: Callable[..., Any]) -> None:
    page = katex(tex(LONG), width=1600)
    page.evaluate("""() => {
      mathfit.stop();
      const block = document.querySelector(".katex-display");
      block.setAttribute("role", "math");
      block.setAttribute("aria-label", "a polynomial");
      block.setAttribute("style", "color:red;min-width:0");
      mathfit.start();
    }""")
    case = resize(page, 320)[0]
    assert (case["state"], case["role"], case["label"]) == ("scroll", "math", "a polynomial")
    page.evaluate("mathfit.stop()")
    facts = """() => ["role", "aria-label", "style", "tabindex"]
      .map((name) => document.querySelector(".katex-display").getAttribute(name))"""
    assert page.evaluate(facts) == ["math", "a polynomial", "color:red;min-width:0", None]


def test_formula_that_is_small_by_its_own_choice_keeps_its_size(katex: Callable[..., Any]) -> None:
    page = katex(f'<div style="font-size: 6px">{tex(study.polynomial(26))}</div>', width=320)
    case = cases(page)[0]
    assert (case["state"], case["scale"]) == ("scroll", 1)
    assert case["size"] == pytest.approx(6 * 1.21)


@pytest.mark.parametrize(
    ("options", "state", "scale"),
    [
        ({"minFontSize": 14}, "scroll", 14 / 19.36),
        ({"minFontSize": 0, "minScale": 0}, "scaled", None),
        ({"minFontSize": 0, "minScale": 0.9}, "scroll", 0.9),
        ({"minFontSize": 19.36 * 0.7, "minScale": 0.5}, "scroll", 0.7),
        ({"tolerance": 2000}, "natural", 1.0),
    ],
)  # fmt: skip
def test_start_takes_options(
    options: dict[str, float], state: str, scale: float | None, katex: Callable[..., Any]
) -> None:
    page = katex(tex(study.polynomial(16)), width=400)
    page.evaluate("(options) => mathfit.start(options)", options)
    case = cases(page)[0]
    assert case["state"] == state
    if scale is None:
        assert case["right"] - case["left"] == pytest.approx(SAFETY * 384, rel=0.01)
    else:
        assert case["scale"] == pytest.approx(scale, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("minFontSize", "NaN"), ("minFontSize", "-1"), ("minFontSize", "Infinity"),
        ("minFontSize", "'10'"), ("minScale", "1.5"), ("minScale", "-0.1"), ("tolerance", "null"),
        ("print", "1"), ("auto", "'yes'"), ("inline", "[]"), ("selector", "'..'"), ("label", "3"),
        ("minfontsize", "12"),
    ],
)  # fmt: skip
def test_bad_option_is_a_range_error_that_names_it_and_changes_nothing(
    name: str, value: str, journey: Callable[[str], Journey]
) -> None:
    page = journey("katex19").page
    before = page.evaluate("mathfit.options")
    error = page.evaluate(
        f"() => {{ try {{ mathfit.start({{minScale: 0.5, {name}: {value}}}) }} "
        "catch (error) { return [error.name, error.message] } }"
    )
    assert error[0] == "RangeError"
    assert name in error[1]
    assert value.strip("'[]") in error[1]
    assert page.evaluate("mathfit.options") == before


def test_options_come_from_the_tag_before_the_configuration(katex: Callable[..., Any]) -> None:
    script = (
        "<script>mathfitConfig = {minFontSize: 12, label: 'config', minScale: 0.1}</script>"
        '<script src="/mathfit.js" data-min-font-size="14" data-min-scale=".2" data-auto="true" '
        'data-print="false" data-label="formula" data-selector=".katex-display" data-inline>'
        "</script>"
    )
    page = katex(tex(study.polynomial(16)), script=script, width=320)
    assert page.evaluate("mathfit.options") == {
        "selector": ".katex-display", "minFontSize": 14, "minScale": 0.2, "tolerance": 0.5,
        "print": False, "auto": True, "inline": True, "label": "formula",
    }  # fmt: skip
    case = cases(page)[0]
    assert case["size"] == pytest.approx(14, abs=0.01)
    assert case["label"] == "formula"
    assert not case["print"]
    page.evaluate("mathfit.options.minFontSize = 3")
    assert page.evaluate("mathfit.options.minFontSize") == 14


def test_without_auto_nothing_happens_until_start(katex: Callable[..., Any]) -> None:
    page = katex(tex(LONG), script='<script src="/mathfit.js" data-auto="false"></script>')
    assert cases(page)[0]["state"] is None
    assert page.evaluate("typeof mathfit.version") == "string"
    page.evaluate("mathfit.start()")
    assert cases(page)[0]["state"] == "scaled"


def test_bad_configuration_is_reported_and_leaves_page_and_interface_alone(
    katex: Callable[..., Any],
) -> None:
    page = katex(tex(LONG), script='<script src="/mathfit.js" data-min-font-size="big"></script>')
    assert cases(page)[0]["state"] is None
    (error,) = page.evaluate("errors")
    assert re.search("RangeError.*minFontSize.*big", error)
    page.evaluate("mathfit.start({minFontSize: 10})")
    assert cases(page)[0]["state"] == "scaled"


def test_second_load_only_refreshes(katex: Callable[..., Any]) -> None:
    page = katex(tex(LONG), script="<script src='/mathfit.js' data-min-font-size='12'></script>")
    page.evaluate("() => { window.first = mathfit; fits.length = 0; }")
    page.add_script_tag(url="/mathfit.js")
    assert page.evaluate("mathfit === first")
    assert page.evaluate("mathfit.options.minFontSize") == 12
    assert page.evaluate("fits.length") == 0
    assert page.evaluate("document.querySelectorAll('style').length") == 2


def test_formula_inserted_late_is_fitted_before_it_can_be_painted(
    katex: Callable[..., Any],
) -> None:
    """Mutations are delivered as microtasks: one turn of the promise queue later, all is set."""
    page = katex("<div id='late'></div>")
    state = page.evaluate(
        """async (source) => {
          katex.render(source, document.getElementById("late"), {displayMode: true});
          await Promise.resolve();
          return document.querySelector(".katex-display").dataset.mathfit;
        }""",
        LONG,
    )
    assert state == "scaled"


def test_changed_formula_is_measured_again(katex: Callable[..., Any]) -> None:
    page = katex(tex(study.polynomial(4)))
    assert cases(page)[0]["state"] == "natural"
    page.evaluate(
        """(source) => {
          const other = document.createElement("div");
          katex.render(source, other, {displayMode: true});
          document.querySelector(".katex-display").replaceChildren(...other.firstChild.children);
        }""",
        LONG,
    )
    settle(page)
    assert cases(page)[0]["state"] == "scaled"


def test_formula_taken_out_is_forgotten_and_can_be_collected(katex: Callable[..., Any]) -> None:
    page = katex(tex(LONG))
    page.evaluate("""() => {
      const block = document.querySelector(".katex-display");
      window.gone = new WeakRef(block);
      window.fits = [];
      block.parentElement.remove();
    }""")
    settle(page)
    devtools = page.context.new_cdp_session(page)
    devtools.send("HeapProfiler.collectGarbage")
    assert page.evaluate("gone.deref() === undefined")


def test_block_that_is_moved_or_copied_is_measured_afresh(katex: Callable[..., Any]) -> None:
    page = katex(tex(LONG) + "<div id='other'></div>", width=320)
    page.evaluate("""async () => {
      const block = document.querySelector(".katex-display");
      const copy = block.cloneNode(true);
      block.remove();
      await Promise.resolve();
      document.getElementById("other").append(block, copy);
    }""")
    found = resize(page, 1600)
    assert [case["state"] for case in found] == ["natural", "natural"]
    assert [case["size"] for case in found] == pytest.approx([19.36, 19.36])
    assert [case["state"] for case in resize(page, 400)] == ["scroll", "scroll"]


@pytest.mark.parametrize(
    ("hidden", "reveal"),
    [
        (f"<div id='it' style='display: none'>{tex(LONG)}</div>", "it.style.display = 'block'"),
        (f"<details id='it'><summary>more</summary>{tex(LONG)}</details>", "it.open = true"),
        (f"<div id='it' hidden>{tex(LONG)}</div>", "it.hidden = false"),
        (f"<div id='it' style='width: 0'>{tex(LONG)}</div>", "it.style.width = ''"),
    ],
    ids=["display", "details", "attribute", "collapsed"],
)
def test_hidden_formula_is_fitted_when_it_is_shown(
    hidden: str, reveal: str, katex: Callable[..., Any]
) -> None:
    page = katex(hidden)
    page.evaluate(reveal)
    settle(page)
    case = cases(page)[0]
    assert case["state"] == "scaled"
    assert case["right"] - case["left"] == pytest.approx(SAFETY * 684, rel=0.01)


def test_narrower_column_in_the_same_window_is_followed(katex: Callable[..., Any]) -> None:
    page = katex(f"<div id='column'>{tex(LONG)}</div>", width=1600)
    for width in (600, 450, 600, 1200):
        page.evaluate("(width) => { column.style.width = `${width}px`; }", width)
        settle(page)
        case = cases(page)[0]
        assert case["state"] == ("natural" if width == 1200 else "scaled")
        if width < 1200:
            assert case["right"] - case["left"] == pytest.approx(SAFETY * width, rel=0.01)


def test_larger_text_is_followed(katex: Callable[..., Any]) -> None:
    page = katex(tex(study.polynomial(6)), style="body { font-size: 1rem }")
    assert cases(page)[0]["state"] == "natural"
    page.evaluate("document.documentElement.style.fontSize = '40px'")
    settle(page)
    case = cases(page)[0]
    assert case["state"] == "scaled"
    assert case["right"] <= 692.5
    page.evaluate("document.documentElement.style.fontSize = '16px'")
    settle(page)
    assert cases(page)[0]["state"] == "natural"


def test_event_comes_only_with_a_change(katex: Callable[..., Any]) -> None:
    page = katex(tex(LONG, "id='a'") + tex(study.polynomial(4)), width=700)
    fits = page.evaluate("fits")
    assert {detail["state"] for _, detail in fits} == {"scaled", "natural"}
    scale = next(detail["scale"] for _, detail in reversed(fits) if detail["state"] == "scaled")
    assert scale == pytest.approx(cases(page)[0]["scale"], abs=5e-5)
    page.evaluate("() => { fits.length = 0; mathfit.refresh(); mathfit.refresh(); }")
    assert page.evaluate("fits.length") == 0
    resize(page, 320)
    assert [detail["state"] for _, detail in page.evaluate("fits")] == ["scroll"]
    page.evaluate("""() => {
      window.caught = 0;
      document.querySelector("#a").addEventListener("mathfit:fit", () => { caught += 1; });
    }""")
    resize(page, 1600)
    assert page.evaluate("caught") == 1


def test_refresh_is_synchronous_and_takes_a_part_of_the_page(katex: Callable[..., Any]) -> None:
    page = katex(
        tex(LONG, "id='a'") + tex(LONG, "id='b'"),
        script="<script src='/mathfit.js' data-auto='false'></script>",
    )
    assert page.evaluate("""() => {
      mathfit.refresh(document.getElementById("b"));
      const blocks = [...document.querySelectorAll(".katex-display")];
      return blocks.map((one) => one.dataset.mathfit || "");
    }""") == ["", "scaled"]


def test_scroll_bar_that_comes_and_goes_does_not_make_the_formula_flicker(
    katex: Callable[..., Any],
) -> None:
    """At full width the box overflows and gets a scroll bar; without room for it, it does not."""
    page = katex(
        f"<div id='box' style='width: 500px; overflow-y: auto'>{tex(LONG)}{tex(LONG)}</div>",
        style=".katex-display { margin: 0; } ::-webkit-scrollbar { width: 120px; }",
    )
    heights = page.evaluate("""() => {
      const wide = box.scrollHeight;
      box.style.width = "380px";
      mathfit.refresh();
      const narrow = box.scrollHeight;
      box.style.width = "500px";
      box.style.height = `${(wide + narrow) / 2}px`;
      return [wide, narrow];
    }""")
    assert heights[1] < heights[0]
    settle(page)
    settle(page)
    page.evaluate("() => { fits.length = 0; }")
    for _ in range(10):
        settle(page)
    assert page.evaluate("fits.length") == 0
    assert page.evaluate("errors") == []
    assert all(case["right"] <= 508.5 or case["state"] == "scroll" for case in cases(page))


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        (f"<table><tr><td>word</td><td>{tex(LONG)}</td></tr></table>", False),
        (f"<div style='float: left'>{tex(LONG)}</div>", False),
        (f"<div style='display: inline-block'>{tex(LONG)}</div>", False),
        (f"<div style='position: absolute'>{tex(LONG)}</div>", False),
        (f"<div style='display: flex'>{tex(LONG)}</div>", False),
        (f"<div style='display: grid; grid: auto / 9em 1fr'><i></i>{tex(LONG)}</div>", True),
        (f"<div style='display: flex'><main style='flex: 1'>{tex(LONG)}{ASIDE}</div>", True),
        (f"<div style='width: 400px'>{tex(LONG)}</div>", True),
    ],
    ids=["table", "float", "inline-block", "absolute", "flex", "grid", "flex-grow", "block"],
)  # fmt: skip
def test_box_that_wraps_its_formula_fits_the_window_too(
    body: str, printed: bool, katex: Callable[..., Any]
) -> None:
    page = katex(body, width=1600)
    assert cases(page)[0]["state"] == ("scaled" if "400px" in body else "natural")
    for width in (700, 560, 700):
        case = resize(page, width)[0]
        assert case["state"] == "scaled"
        assert case["right"] <= width - 7
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert case["print"] is printed
        if ASIDE in body:
            assert case["right"] <= width - 97
    assert resize(page, 1600)[0]["size"] == pytest.approx(
        19.36 if "400px" not in body else case["size"]
    )
    assert page.evaluate("errors") == []


def test_transformed_page_is_measured_in_its_own_units(katex: Callable[..., Any]) -> None:
    plain, scaled = (
        cases(katex(f"<div style='{style}'>{tex(LONG)}{tex(LONG + chr(92) + 'tag{1}')}</div>"))
        for style in ("", "transform: scale(0.5)")
    )
    assert [one["scale"] for one in plain] == pytest.approx(
        [one["scale"] for one in scaled], rel=0.005
    )


def test_right_to_left_page_has_the_same_scales_and_scrollers_with_two_ends(
    katex: Callable[..., Any],
) -> None:
    body = tex(LONG) + tex(LONG + r"\tag{1}")
    style = ".katex { direction: ltr }"
    ltr, rtl = (katex(body, style=style, html=html) for html in ("", ' dir="rtl"'))
    for width in (700, 320):
        one, other = resize(ltr, width), resize(rtl, width)
        assert [case["scale"] for case in one] == [case["scale"] for case in other]
    ends = rtl.evaluate("""() => [...document.querySelectorAll(".katex-display")].map((block) => {
      const edge = (at) => {
        block.scrollLeft = at;
        const parts = [...block.querySelectorAll(".katex-base, .katex-tag")]
          .map((one) => one.getBoundingClientRect());
        const frame = block.getBoundingClientRect();
        return [Math.min(...parts.map((one) => one.left)) - frame.left,
                frame.right - Math.max(...parts.map((one) => one.right))];
      };
      const start = block.scrollLeft;
      return [start, edge(-1e6)[0], edge(0)[1]];
    })""")
    for start, left, right in ends:
        assert start == 0
        assert left >= -1
        assert right >= -1


@pytest.mark.parametrize("inline", ["false", "true"])
def test_inline_formula_is_fitted_only_on_request(inline: str, katex: Callable[..., Any]) -> None:
    script = f"<script src='/mathfit.js' data-inline='{inline}'></script>"
    page = katex("<p id='p'>Text and </p>", script=script)
    page.evaluate(r"""async () => {
      const span = document.createElement("span");
      p.append(span, " and text.");
      katex.render("\\rule{50em}{1em}", span);
      await Promise.resolve();
    }""")
    settle(page)
    facts = """() => {
      const one = document.querySelector(".katex");
      const box = document.querySelector(".katex-html").getBoundingClientRect();
      return [one.dataset.mathfit || null, box.width, getComputedStyle(one).display];
    }"""
    state, width, display = page.evaluate(facts)
    if inline == "false":
        assert (state, display) == (None, "inline")
        assert width == pytest.approx(50 * 19.36)
        return
    assert (state, display) == ("scaled", "inline-block")
    assert width == pytest.approx(SAFETY * 684, rel=2e-3)
    resize(page, 320)
    state, width, _ = page.evaluate(facts)
    assert state == "scroll"
    assert width == pytest.approx(500, abs=1)
    resize(page, 1600)
    assert page.evaluate(facts) == ["natural", pytest.approx(50 * 19.36), "inline"]


def test_printed_formula_fits_the_paper_whatever_the_window(katex: Callable[..., Any]) -> None:
    """364 px for 90 em are 4.04 px or 3.03 pt; the text stays at 16 px or 12 pt."""
    page = katex(
        tex(r"x\rule{88.93em}{0.1em}y") + "<p>body</p>", width=1600, style="body { margin: 28px }"
    )
    before = page.evaluate("document.body.outerHTML"), cases(page)
    width = page.evaluate(
        "parseFloat(document.querySelector('.katex').style.getPropertyValue('--mathfit-width'))"
    )
    assert width == pytest.approx(90, abs=0.5)
    words = text_of(page.pdf(width="420px", height="600px", print_background=True))
    settle(page)
    assert (page.evaluate("document.body.outerHTML"), cases(page)) == before
    sizes = {word: size for word, size, _ in words}
    assert sizes["body"] == pytest.approx(12, abs=0.01)
    assert sizes["y"] == pytest.approx(0.75 * SAFETY * 364 / width, abs=0.02)
    assert sizes["y"] == pytest.approx(3.03, abs=0.03)
    (last,) = (x for word, _, x in words if word == "y")
    assert last <= (420 - 28) * 0.75


def test_scroller_prints_whole(katex: Callable[..., Any]) -> None:
    page = katex(tex(study.polynomial(20) + r"\tag{7}"), width=320)
    assert cases(page)[0]["state"] == "scroll"
    words = text_of(page.pdf(width="420px", height="600px"))
    assert "7" in "".join(word for word, _, _ in words)
    assert max(x for _, _, x in words) <= 412 * 0.75


def test_print_rule_can_be_left_out(katex: Callable[..., Any]) -> None:
    """Chromium then shrinks the whole page: the text with the formula."""
    script = '<script src="/mathfit.js" data-print="false"></script>'
    page = katex(tex(LONG) + "<p>body</p>", width=1600, script=script)
    assert not cases(page)[0]["print"]
    sizes = {word: size for word, size, _ in text_of(page.pdf(width="420px", height="600px"))}
    assert sizes["x"] == pytest.approx(1.21 * sizes["body"], rel=1e-3)
    assert sizes["body"] < 11


def text_of(pdf: bytes) -> list[tuple[str, float, float]]:
    """Words with their size and the left edge, in points."""
    from pypdf import PdfReader

    words = []

    def visit(text: str, state: Any, matrix: Any, _: Any, size: float) -> None:
        if text.strip():
            scale = (matrix[0] ** 2 + matrix[1] ** 2) ** 0.5 * abs(state[0])
            words.append((text.strip(), size * scale, state[0] * matrix[4] + state[4]))

    PdfReader(io.BytesIO(pdf)).pages[0].extract_text(visitor_text=visit)
    return words


def test_strict_content_security_policy_is_enough(
    show: Callable[..., Any], pages: dict[str, str | bytes]
) -> None:
    """Without 'unsafe-inline' for styles only the print rule is lost."""
    pages["/watch.js"] = (
        "window.refused = []; document.addEventListener('securitypolicyviolation', "
        "(event) => refused.push(event.effectiveDirective));"
    )
    pages["/render.js"] = (
        "addEventListener('DOMContentLoaded', () => {"
        f"katex.render({LONG!r}, document.body.firstElementChild, {{displayMode: true}});"
        "window.typeset = true; });"
    )
    for styles, refused in (("'self'", ["style-src-elem"]), ("'self' 'unsafe-inline'", [])):
        page = show(
            "<!doctype html><html><head><meta http-equiv='Content-Security-Policy' "
            f"content=\"default-src 'self'; style-src {styles}\">"
            "<script src='/watch.js'></script><script src='/mathfit.js'></script>"
            "<link rel='stylesheet' href='/packages/katex19/dist/katex.min.css'>"
            "<script src='/packages/katex19/dist/katex.min.js'></script>"
            "<script src='/render.js'></script></head><body><div></div></body></html>"
        )
        case = cases(page)[0]
        assert case["state"] == "scaled"
        assert case["right"] <= 692.5
        assert resize(page, 320)[0]["state"] == "scroll"
        page.evaluate("mathfit.stop()")
        assert cases(page)[0]["size"] == pytest.approx(19.36)
        assert page.evaluate("refused") == refused


def test_formulas_typeset_beforehand_do_not_shift_the_page(show: Callable[..., Any]) -> None:
    """Fitted while the page is parsed, they are never shown at another size.

    SVG needs no fonts: their arrival moves a page with the script or without.
    """
    svg = ENGINES["mathjax3-svg"]
    page = show(study.article(svg, [study.polynomial(n) for n in (8, 12, 14)]), svg, 700)
    page.evaluate("document.querySelectorAll('script').forEach((one) => one.remove())")
    html = page.evaluate("document.documentElement.outerHTML")
    page.close()
    shifts = []
    for script in ("", study.MATHFIT):
        page = show(
            f"<!doctype html>{html}".replace("<head>", f"<head>{script}"),
            study.Engine("none", "", "() => true", True),
            700,
        )
        states = ["natural", "scaled", "scroll"] if script else [None] * 3
        assert [case["state"] for case in cases(page)] == states
        shifts.append(page.evaluate(study.SHIFT))
        page.close()
    assert shifts[1] < 0.01
    assert shifts[1] <= shifts[0] + 0.005


def test_failure_on_one_block_is_reported_once_and_the_others_go_on(
    katex: Callable[..., Any],
) -> None:
    page = katex(
        tex(LONG) + tex(LONG), script="<script src='/mathfit.js' data-auto='false'></script>"
    )
    warnings: list[str] = []
    page.on("console", lambda message: warnings.append(message.type))
    page.evaluate("""() => {
      const block = document.querySelector(".katex-display");
      block.getClientRects = () => { throw new Error("broken"); };
      mathfit.start();
      mathfit.refresh();
    }""")
    settle(page)
    assert warnings == ["warning"]
    assert [case["state"] for case in cases(page)] == [None, "scaled"]
    assert page.evaluate("errors") == []


def test_formula_without_a_width_is_left_alone(katex: Callable[..., Any]) -> None:
    page = katex('<span class="katex-display"></span><span class="katex-display"><b></b></span>')
    states = (
        "[...document.querySelectorAll('.katex-display')].map((one) => one.dataset.mathfit || '')"
    )
    assert page.evaluate(states) == ["", ""]
    assert page.evaluate("errors") == []


def test_other_content_can_be_fitted_by_its_selector(katex: Callable[..., Any]) -> None:
    page = katex(
        '<div class="own"><b style="display: inline-block; width: 50em">wide</b></div>',
        script="""<script src="/mathfit.js" data-selector=".own"></script>""",
    )
    facts = """() => {
      const one = document.querySelector(".own");
      return [one.dataset.mathfit, one.firstChild.getBoundingClientRect().width];
    }"""
    state, width = page.evaluate(facts)
    assert state == "scaled"
    assert width == pytest.approx(SAFETY * 684, rel=1e-3)


def test_fitting_400_formulas_forces_few_layouts(katex: Callable[..., Any]) -> None:
    """Write all, read all, write all; and a refresh that finds nothing new writes nothing."""
    page = katex(tex(r"\rule{40em}{1em}") * 400)
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")

    def layouts(script: str) -> float:
        counts = []
        for expression in ("0", script):
            page.evaluate(expression)
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            counts += [one["value"] for one in metrics if one["name"] == "LayoutCount"]
        return float(counts[1] - counts[0])

    assert len(cases(page)) == 400
    assert layouts("mathfit.start({minFontSize: 9})") <= 3
    assert layouts("document.body.style.width = '500px', mathfit.refresh()") <= 3
    assert layouts("mathfit.refresh()") == 0


def test_script_is_small_plain_and_free_of_eval() -> None:
    source = asset_path("mathfit.js").read_bytes()
    assert len(source) <= 12_000
    assert len(gzip.compress(source, 9)) <= 4_096
    text = source.decode()
    assert not re.search(r"\beval\b|new Function|setTimeout|setInterval|import\b", text)
    # Newer than ES2019: optional chaining, nullish coalescing, logical assignment.
    assert not re.search(r"\?\.[a-zA-Z\[(]|\?\?|\|\|=|&&=", text)
