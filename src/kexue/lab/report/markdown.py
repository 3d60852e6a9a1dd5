"""Markdown with TeX to HTML; raw HTML in the text is shown, never interpreted."""

from __future__ import annotations

from functools import cache

from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from mdit_py_plugins.dollarmath import dollarmath_plugin

__all__ = ["article", "inline", "title_and_body"]


_SCROLLER = '<div class="scroll" role="region" aria-label="Table" tabindex="0">'


def article(text: str) -> Markup:
    """Return the HTML of an article; its headings start at level two."""
    return Markup(_full().render(text))


def inline(text: str) -> Markup:
    """Return the HTML of a phrase: emphasis, code and formulas, no links and no blocks."""
    return Markup(_phrases().renderInline(text))


def title_and_body(text: str) -> tuple[str, str]:
    """Split a docstring into its first line and the rest."""
    first, _, rest = text.strip().partition("\n")
    return first.rstrip("."), rest.strip()


@cache
def _full() -> MarkdownIt:
    return _with_formulas(
        MarkdownIt("commonmark", {"html": False, "typographer": True}).enable(
            ["table", "smartquotes", "replacements"]
        )
    )


@cache
def _phrases() -> MarkdownIt:
    phrases = MarkdownIt("commonmark", {"html": False})
    return _with_formulas(phrases.disable(["link", "image", "autolink", "html_inline"]))


def _with_formulas(markdown: MarkdownIt) -> MarkdownIt:
    # Numbers such as "$5 and $6" are no formula; a formula starts and ends without a space.
    markdown.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    markdown.add_render_rule("math_inline", _inline_formula)
    markdown.add_render_rule("math_inline_double", _display_formula)
    markdown.add_render_rule("math_block", _display_formula)
    markdown.add_render_rule(
        "table_open",
        lambda *_: '<div class="scroll" role="region" aria-label="Table" tabindex="0"><table>',
    )
    markdown.add_render_rule("table_close", lambda *_: "</table></div>")
    return markdown


def _inline_formula(self, tokens, index, options, env) -> str:  # type: ignore[no-untyped-def]
    return f'<span class="math">\\({escape(tokens[index].content)}\\)</span>'


def _display_formula(self, tokens, index, options, env) -> str:  # type: ignore[no-untyped-def]
    return f'<div class="math">\\[{escape(tokens[index].content.strip())}\\]</div>\n'
