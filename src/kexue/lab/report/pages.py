"""From the result of a run to HTML."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kexue.lab.report.markdown import article, inline, title_and_body

__all__ = ["environment", "number", "run_page"]

ASSETS_OF_RUNS = "_assets"
_SIGNS = {"<": "<", "<=": "≤", ">": ">", ">=": "≥", "==": "="}
_FIELDS = {
    "arithmetic": "Arithmetic",
    "linalg": "Linear algebra",
    "stats": "High-dimensional statistics",
    "nn": "Networks",
    "losses": "Losses",
    "optim": "Optimisation",
    "models": "Models",
    "training": "Training",
    "generative": "Generative models",
    "retrieval": "Retrieval",
    "web": "Formulas on the web",
}
_MARKS = {
    "holds": "✓",
    "does not hold": "✗",
    "failed": "!",
    "not run": "–",
    "not judged": "–",
}


def run_page(
    result: dict[str, Any], *, assets: str = f"../../{ASSETS_OF_RUNS}", **more: Any
) -> str:
    """Return the page of a run; ``assets`` is the address of the assets, seen from the page.

    ``more`` goes to the template: ``home`` (address of the index), ``previous`` and ``next``
    (neighbours with ``href`` and ``title``), ``figures`` (address of the figures).
    """
    _, body = title_and_body(result.get("text", ""))
    setting = {"home": None, "previous": None, "next": None, "figures": "figures", **more}
    template = environment().get_template("run.html.j2")
    return template.render(run=result, body=article(body), assets=assets, **setting)


@cache
def environment() -> Environment:
    """The templates; everything is escaped unless a filter of ours made it."""
    env = Environment(
        loader=PackageLoader("kexue.lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        number=number, phrase=inline, sign=lambda relation: _SIGNS[relation], cell=_cell,
        field=lambda name: _FIELDS.get(name, name.capitalize()), mark=lambda v: _MARKS.get(v, "–"),
        slugged=lambda verdict: verdict.replace(" ", "-"), plain=_plain,
    )  # fmt: skip
    env.tests["numeric"] = _is_number
    return env


def number(value: Any) -> Markup:
    """Return a number with four significant digits, as print sets it: 0.0321, 2.51 × 10⁻⁷."""
    x = float(value)
    if math.isnan(x):
        return Markup("not a number")
    if math.isinf(x):
        return Markup("∞" if x > 0 else "−∞")
    if x == int(x) and abs(x) < 1e6:
        return Markup(f"{int(x)}".replace("-", "−"))
    if not 1e-3 <= abs(x) < 1e6:
        mantissa, exponent = f"{x:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return Markup(f"{mantissa} × 10<sup>{int(exponent)}</sup>".replace("-", "−"))
    shown = f"{x:.0f}" if abs(x) >= 1e4 else f"{x:.4g}"
    return Markup(shown.replace("-", "−"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> Markup:
    if value is None:
        return Markup('<span aria-label="none">–</span>')
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    if value in ("nan", "inf", "-inf") or _is_number(value):
        return number(value)
    return escape(str(value))


def _plain(text: str) -> str:
    """A phrase without the marks of Markdown and TeX, for places that hold text only."""
    for mark in ("$", "`", "*"):
        text = text.replace(mark, "")
    return text
