"""Fit 400 formulas again: mathfit.js against typesetting them again with MathJax 4 or KaTeX.

MathJax 4 scales a wide formula when it typesets it (`displayOverflow: "scale"`), so a page that is
to follow its window has to typeset anew after each resize. KaTeX does not scale at all. Both are
timed inside the browser, from the call to a layout that is done.
"""

import gzip
import statistics
from typing import Any

from kexue.lab.report import asset_path
from kexue.studies import responsive_math as study

FORMULAS, RESIZED = 400, 50
TERMS = (4, 8, 14)  # in a window of 600 pixels, two of three are too wide
REFRESH_TARGET, RESIZE_TARGET = 60.0, 8.0  # ms, on an idle desktop core
SIZE_TARGET, GZIP_TARGET = 12_000, 4_096  # bytes
REPEATS = 7

# Nothing has changed; the window has; everything is measured as if for the first time.
REFRESH = "() => mathfit.refresh()"
RESIZE = "(width) => { document.body.style.width = `${width}px`; mathfit.refresh(); }"
ANEW = "() => mathfit.start()"
SCALE_AGAIN = "() => MathJax.startup.document.rerenderPromise()"
# What the browser itself needs to lay out the same formulas at another size, once.
FLOOR = "(width) => { document.body.style.fontSize = `${width / 40}px`; }"
KATEX = """() => sources.forEach(([element, source]) =>
  katex.render(source, element, {displayMode: true, throwOnError: false}))"""
KEEP = """() => { window.sources = [...document.querySelectorAll(".tex")].map((one) =>
  [one, one.querySelector("annotation").textContent]); }"""


def main() -> None:
    """Print the times of both, the ratios and what of the targets is met."""
    formulas = [study.polynomial(TERMS[i % len(TERMS)]) for i in range(FORMULAS)]
    katex = study.katex(19)
    scaling = study.mathjax(4, displayOverflow="scale")
    pages: dict[str, str | bytes] = {
        "/many.html": study.article(katex, formulas, script=study.MATHFIT, numbered=False),
        "/some.html": study.article(katex, formulas[:RESIZED], script=study.MATHFIT),
        "/scale.html": study.article(scaling, formulas[:RESIZED], numbered=False),
        "/fit.html": study.article(
            study.mathjax(4), formulas[:RESIZED], script=study.MATHFIT, numbered=False
        ),
    }
    with study.browser() as chrome, study.served(pages, study.node_modules()) as address:
        many = study.open_page(chrome, f"{address}/many.html", katex, 700)
        many.evaluate(KEEP)
        _agree(many)
        refresh = _time(many, REFRESH)
        _report(f"refresh of {FORMULAS} formulas, nothing new", refresh, REFRESH_TARGET)
        anew = _time(many, ANEW)
        print(f"{FORMULAS} formulas, all measured and set anew: {anew:.1f} ms", flush=True)
        _compare(f"typesetting {FORMULAS} formulas again with KaTeX", anew, _time(many, KATEX))
        many.close()

        some = study.open_page(chrome, f"{address}/some.html", katex, 700)
        resize = _time(some, RESIZE, True)
        _report(f"resize with {RESIZED} formulas", resize, RESIZE_TARGET)
        some.evaluate("mathfit.stop()")
        floor = _time(some, FLOOR, True)
        print(f"  the browser alone, {RESIZED} formulas at another size: {floor:.1f} ms")
        some.close()

        fit = study.open_page(chrome, f"{address}/fit.html", study.mathjax(4), 700)
        ours = _time(fit, RESIZE, True)
        fit.close()
        scale = study.open_page(chrome, f"{address}/scale.html", scaling, 700)
        theirs = _time(scale, SCALE_AGAIN)
        _compare(f"typesetting {RESIZED} formulas again with MathJax 4, scaled", ours, theirs)
        scale.close()
    source = asset_path("mathfit.js").read_bytes()
    packed = len(gzip.compress(source, 9))
    for what, size, target in (
        ("mathfit.js", len(source), SIZE_TARGET),
        ("mathfit.js, gzip", packed, GZIP_TARGET),
    ):
        print(f"{what}: {size} bytes  target {target} {'met' if size <= target else 'MISSED'}")


def _agree(page: Any) -> None:
    """After either way no formula may stick out of the window by more than a pixel."""
    page.evaluate(REFRESH)
    out = sum(case["out"] for case in page.evaluate(study.MEASURE))
    if out:
        raise AssertionError(f"{out} formulas stick out although they were fitted")


def _time(page: Any, script: str, resizes: bool = False) -> float:
    """Return the median time in ms of the call and of the layout that follows from it."""
    measure = f"""async (width) => {{
      const start = performance.now();
      await ({script})(width);
      document.body.getBoundingClientRect();
      return performance.now() - start;
    }}"""
    times = []
    for repeat in range(REPEATS + 1):
        times.append(page.evaluate(measure, (600, 500)[repeat % 2] if resizes else 0))
        page.evaluate(study.TWO_FRAMES)
    return statistics.median(times[1:])


def _report(what: str, ours: float, target: float) -> None:
    verdict = "met" if ours <= target else "MISSED"
    print(f"{what}: {ours:.1f} ms  target {target:g} ms {verdict}", flush=True)


def _compare(what: str, ours: float, theirs: float) -> None:
    print(f"{what}: {theirs:.1f} ms, fitting {ours:.1f} ms, ratio {theirs / ours:.1f}x", flush=True)


if __name__ == "__main__":
    main()
