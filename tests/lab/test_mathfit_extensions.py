"""mathfit.js through its Python doors: the asset, Sphinx and MkDocs, built and opened for real."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kexue.lab import NotRun
from kexue.lab.report import asset_path
from kexue.studies import responsive_math as study

sphinx_application = pytest.importorskip("sphinx.application")
mkdocs_build = pytest.importorskip("mkdocs.commands.build")

SCRIPT = asset_path("mathfit.js").read_bytes()
MATHJAX = "/packages/mathjax3/es5/tex-chtml.js"
KATEX = "/packages/katex19/dist/"
SOURCES = re.compile(r'<script[^>]*src="([^"?]*)')


def test_asset_is_found_by_name() -> None:
    assert asset_path("mathfit.js").is_file()


@pytest.mark.parametrize("name", ["mathfit.css", "../site.py", ""])
def test_unknown_asset_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(repr(name))):
        asset_path(name)


@pytest.fixture
def sphinx(tmp_path: Path) -> Callable[..., Any]:
    """Build a project of two pages, and return the application."""

    def build(configuration: str = "", *, builder: str = "html", parallel: int = 0) -> Any:
        source = tmp_path / "source"
        source.mkdir()
        (source / "conf.py").write_text(
            "extensions = ['sphinx.ext.mathjax', 'kexue.lab.sphinx_mathfit']\n"
            f"mathjax_path = {MATHJAX!r}\n{configuration}\n"
        )
        formula = f".. math:: {study.polynomial(16)}\n"
        toc = ".. toctree::\n\n   other\n"
        (source / "index.rst").write_text(f"Title\n=====\n\n{formula}\n{toc}")
        (source / "other.rst").write_text(f"Other\n=====\n\n{formula}")
        app = sphinx_application.Sphinx(
            source, source, tmp_path / "built", tmp_path / "trees", builder,
            status=None, warning=io.StringIO(), parallel=parallel,
        )  # fmt: skip
        app.build(force_all=True)
        assert app.statuscode == 0
        return app

    return build


def test_sphinx_pages_load_the_script_before_mathjax(sphinx: Callable[..., Any]) -> None:
    built = Path(sphinx().outdir)
    assert (built / "_static" / "mathfit.js").read_bytes() == SCRIPT
    for name in ("index.html", "other.html"):
        sources = SOURCES.findall((built / name).read_text())
        assert sources[0] == "_static/mathfit.js"
        assert MATHJAX in sources
        assert "mathfitConfig" not in (built / name).read_text()


def test_sphinx_hands_options_to_the_script(sphinx: Callable[..., Any]) -> None:
    built = Path(sphinx('mathfit_options = {"minFontSize": 12, "label": "</script>"}').outdir)
    html = (built / "index.html").read_text()
    options = re.search(r"window\.mathfitConfig = (.*?);</script>", html)
    assert options is not None
    assert json.loads(options[1]) == {"minFontSize": 12, "label": "</script>"}
    assert html.index("mathfitConfig") < html.index("mathfit.js") < html.index(MATHJAX)


def test_sphinx_writes_the_same_pages_in_parallel(sphinx: Callable[..., Any]) -> None:
    app = sphinx(parallel=2)
    extension = app.extensions["kexue.lab.sphinx_mathfit"]
    assert extension.parallel_read_safe
    assert extension.parallel_write_safe
    assert not any("parallel" in line for line in app._warning.getvalue().splitlines())
    assert "_static/mathfit.js" in (Path(app.outdir) / "other.html").read_text()


@pytest.mark.parametrize("builder", ["text", "latex"])
def test_sphinx_builders_without_html_are_left_alone(
    builder: str, sphinx: Callable[..., Any]
) -> None:
    built = Path(sphinx(builder=builder).outdir)
    files = [path for path in built.rglob("*") if path.is_file()]
    assert files
    assert not any("mathfit" in path.name for path in files)
    assert not any(b"mathfit" in path.read_bytes() for path in files)


@pytest.mark.parametrize("options", ["{'minFontSize': float('nan')}", "{'print': print}", "[1]"])
def test_sphinx_refuses_options_that_no_page_can_hold(
    options: str, sphinx: Callable[..., Any]
) -> None:
    from sphinx.errors import ConfigError

    with pytest.raises(ConfigError, match="mathfit_options must"):
        sphinx(f"mathfit_options = {options}")


@pytest.fixture
def mkdocs(tmp_path: Path) -> Callable[..., Path]:
    """Build a site of one page, and return its folder."""

    def build(plugin: Any = "mathfit") -> Path:
        from mkdocs.config import load_config

        docs = tmp_path / "docs"
        docs.mkdir()
        (docs / "index.md").write_text(
            f'# Title\n\n<div class="tex">{study.polynomial(26)}</div>\n'
        )
        (docs / "render.js").write_text(
            "for (const one of document.querySelectorAll('.tex'))"
            " katex.render(one.textContent, one, {displayMode: true}); window.typeset = true;"
        )
        settings = {
            "site_name": "site",
            "docs_dir": "docs",
            "site_dir": "built",
            "plugins": [plugin],
            "extra_css": [f"{KATEX}katex.min.css"],
            "extra_javascript": [f"{KATEX}katex.min.js", "render.js"],
        }
        configuration = tmp_path / "mkdocs.yml"
        configuration.write_text(json.dumps(settings))
        mkdocs_build.build(load_config(str(configuration)))
        return tmp_path / "built"

    return build


def test_mkdocs_pages_load_the_script_before_the_others(mkdocs: Callable[..., Path]) -> None:
    site = mkdocs()
    assert (site / "assets" / "mathfit.js").read_bytes() == SCRIPT
    sources = SOURCES.findall((site / "index.html").read_text())
    own = [source for source in sources if source.endswith(("mathfit.js", "katex.min.js"))]
    assert own == ["assets/mathfit.js", f"{KATEX}katex.min.js"]
    assert not (site / "assets" / "mathfit-config.js").exists()


def test_mkdocs_hands_options_to_the_script(mkdocs: Callable[..., Path]) -> None:
    site = mkdocs({"mathfit": {"options": {"minFontSize": 12}}})
    text = (site / "assets" / "mathfit-config.js").read_text()
    assert text == 'window.mathfitConfig = {"minFontSize": 12};\n'
    sources = SOURCES.findall((site / "index.html").read_text())
    assert sources.index("assets/mathfit-config.js") < sources.index("assets/mathfit.js")


@pytest.mark.parametrize("options", [3, {"minFontSize": float("nan")}])
def test_mkdocs_refuses_options_that_no_page_can_hold(options: Any) -> None:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.exceptions import PluginError

    from kexue.lab.mkdocs_mathfit import MathfitPlugin

    plugin = MathfitPlugin()
    errors, _ = plugin.load_config({"options": options})
    if errors:
        assert "options" in errors[0]
        return
    with pytest.raises(PluginError, match="options must hold JSON values"):
        plugin.on_config(MkDocsConfig())


@pytest.fixture(scope="module")
def chrome(chromium: str) -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api")
    try:
        study.node_modules()
    except NotRun as missing:
        pytest.skip(str(missing))
    with study.browser() as running:
        yield running


def files_of(folder: Path) -> dict[str, str | bytes]:
    return {
        f"/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def state_of(chrome: Any, folder: Path, engine: study.Engine) -> list[Any]:
    """State, width and room of the first formula, size of the font, in a narrow window."""
    with study.served(files_of(folder), study.node_modules()) as address:
        page = study.open_page(chrome, f"{address}/index.html", engine, 600)
        page.wait_for_selector("[data-mathfit]")
        page.evaluate(study.TWO_FRAMES)
        found: list[Any] = page.evaluate("""() => {
          const block = document.querySelector("[data-mathfit]");
          const formula = block.querySelector("mjx-math, .katex");
          return [block.dataset.mathfit, block.clientWidth,
            document.documentElement.scrollWidth, parseFloat(getComputedStyle(formula).fontSize)];
        }""")
        page.close()
        return found


@pytest.mark.browser
def test_formula_of_a_sphinx_page_fits_its_column(chrome: Any, sphinx: Callable[..., Any]) -> None:
    built = Path(sphinx("mathfit_options = {'minFontSize': 4}").outdir)
    state, room, width, size = state_of(chrome, built, study.mathjax(3))
    assert state == "scaled"
    assert room <= width == 600
    assert 4 <= size < 16


@pytest.mark.browser
def test_formula_of_a_mkdocs_page_fits_its_column(chrome: Any, mkdocs: Callable[..., Path]) -> None:
    site = mkdocs({"mathfit": {"options": {"minFontSize": 12}}})
    state, room, width, size = state_of(chrome, site, study.katex(19))
    assert state == "scroll"
    assert room <= width == 600
    assert size == pytest.approx(12, abs=0.01)
