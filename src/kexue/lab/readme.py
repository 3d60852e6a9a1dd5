"""The parts of the documentation that come from the catalogue and the studies.

``python -m kexue.lab.readme`` in a checkout rewrites the tables of both READMEs and the method
pages under ``docs/methods``; with ``--check`` it only says whether they are up to date.
"""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

from kexue.lab.catalogue import Catalogue, Entry
from kexue.lab.report.markdown import title_and_body

__all__ = ["main", "method_index", "method_page", "method_table", "reference"]

_BEGIN = "<!-- methods: written by `make readme` from the catalogue -->"
_END = "<!-- end of methods -->"
_HEADS = {
    "README.md": ("| method | module | state |", "built", "coming"),
    "README.zh-CN.md": ("| 方法 | 模块 | 状态 |", "已完成", "即将推出"),
}


def method_table(entries: list[Entry], readme: str) -> str:
    """Return the table of all methods for one of the READMEs."""
    head, built, coming = _HEADS[readme]
    lines = [head, "|---|---|---|"]
    for entry in entries:
        title = entry.title_zh if readme != "README.md" and entry.title_zh else entry.title
        modules = ", ".join(f"`{module}`" for module in entry.modules)
        state = built if entry.built else coming
        lines.append(f"| [{title}](docs/methods/{entry.slug}.md) | {modules} | {state} |")
    return "\n".join(lines)


def method_page(entry: Entry) -> str:
    """Return the page of a method: titles, claim, the study's article, how to run it."""
    parts = [f"# {entry.title}"]
    if entry.title_zh:
        parts.append(entry.title_zh)
    if entry.claim:
        parts.append(f"*{entry.claim}*")
    if not entry.built:
        parts.append("This method is coming.")
        return "\n\n".join(parts) + "\n"
    if entry.known:
        parts.append(f"Known not to hold: {entry.known}")
    _, body = title_and_body(entry.text)
    parts.append(body)
    modules = ", ".join(f"`{module}`" for module in entry.modules)
    parts.append(f"## Use it\n\nModule: {modules}. The study: `kexue run {entry.slug}`.")
    return "\n\n".join(parts) + "\n"


def method_index(entries: list[Entry]) -> str:
    """Return the page that lists the method pages."""
    pages = "\n".join(entry.slug for entry in entries)
    return f"# The methods\n\n```{{toctree}}\n:maxdepth: 1\n\n{pages}\n```\n"


def reference() -> str:
    """Return the page that lists the modules: the lab's, and those of the methods."""
    names = ["kexue.lab.study", "kexue.lab.data"]
    root = Path(__file__).resolve().parents[1]
    for package in sorted(p for p in root.iterdir() if (p / "__init__.py").is_file()):
        if package.name not in ("lab", "studies", "commands"):
            modules = pkgutil.iter_modules([str(package)])
            names += [f"kexue.{package.name}.{module.name}" for module in modules]
    listed = "\n".join(f"   {name}" for name in names)
    summary = f".. autosummary::\n   :toctree: generated\n\n{listed}"
    return f"# Reference\n\n```{{eval-rst}}\n{summary}\n```\n"


def main(arguments: list[str]) -> int:
    """Rewrite what is out of date below the current folder; 1 with --check if anything was."""
    root = Path.cwd()
    entries = list(Catalogue("kexue.studies").entries.values())
    wanted: dict[Path, str] = {}
    for name in _HEADS:
        path = root / name
        text = path.read_text(encoding="utf-8")
        block = f"{_BEGIN}\n\n{method_table(entries, name)}\n\n{_END}"
        before, begin, rest = text.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        if not begin or not end:
            print(f"{name} must have one block from {_BEGIN!r} to {_END!r}", file=sys.stderr)
            return 2
        wanted[path] = before + block + after
    folder = root / "docs" / "methods"
    wanted |= {folder / f"{entry.slug}.md": method_page(entry) for entry in entries}
    wanted[folder / "index.md"] = method_index(entries)
    wanted[root / "docs" / "api.md"] = reference()
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text("utf-8") != text]
    left_over = [p for p in folder.glob("*.md") if p not in wanted]
    if "--check" in arguments:
        for path in stale + left_over:
            print(f"{path.relative_to(root)} is out of date: run `make readme`", file=sys.stderr)
        return int(bool(stale or left_over))
    folder.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    for path in left_over:
        path.unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
