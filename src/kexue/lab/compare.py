"""Two runs side by side: what was measured in each, and what changed between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kexue.lab.errors import UsageError
from kexue.lab.store import read_run

__all__ = ["comparison"]

_SETTINGS = ("budget", "seed", "device", "data")


def comparison(one: Path, two: Path) -> Iterator[str]:
    """Yield the lines that compare two runs of one study.

    Claims are matched by their statements; a claim that only one run has is shown as such.

    Parameters
    ----------
    one, two : Path
        Folders of finished runs.

    Raises
    ------
    StoreError
        When a folder holds no readable run.
    UsageError
        When the runs are of different studies.
    """
    a, b = read_run(one), read_run(two)
    if a.slug != b.slug:
        raise UsageError(f"expected two runs of one study, got {a.slug!r} and {b.slug!r}")
    yield f"{a.slug}: {a.result['verdict']} | {b.result['verdict']}"
    for setting in _SETTINGS:
        left, right = a.result.get(setting), b.result.get(setting)
        if left != right:
            yield f"  {setting}: {left} | {right}"
    for name in sorted({*a.result["versions"], *b.result["versions"]}):
        left, right = a.result["versions"].get(name), b.result["versions"].get(name)
        if left != right:
            yield f"  {name}: {left} | {right}"
    yield f"  seconds: {a.result['seconds']:.1f} | {b.result['seconds']:.1f}"
    left_claims, right_claims = _by_statement(a.result), _by_statement(b.result)
    for statement in dict.fromkeys([*left_claims, *right_claims]):
        left, right = left_claims.get(statement), right_claims.get(statement)
        yield f"  {_change(left, right):9s} {_said(left)} | {_said(right)}  {statement}"


def _by_statement(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {claim["statement"]: claim for claim in result["claims"]}


def _change(left: dict[str, Any] | None, right: dict[str, Any] | None) -> str:
    if left is None or right is None:
        return "only one"
    if left["holds"] != right["holds"]:
        return "TURNED"
    same = left["measured"] == right["measured"] or (
        left["measured"] != left["measured"] and right["measured"] != right["measured"]
    )
    return "same" if same else "differs"


def _said(claim: dict[str, Any] | None) -> str:
    if claim is None:
        return "-"
    mark = "holds" if claim["holds"] else "does not hold"
    return f"{claim['measured']:.6g} {claim['relation']} {claim['expected']:.6g} {mark}"
