"""The demo studies, reachable from this process and from the ones it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kexue.lab.runner import Order

HERE = Path(__file__).resolve().parent
STUDIES = "demo_studies"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


@pytest.fixture
def order(tmp_path: Path) -> Callable[..., Order]:
    """Build orders for demo studies below the test's own folder."""

    def build(slug: str, **changes: object) -> Order:
        settings = {"out": tmp_path / "runs", "budget": "quick", "studies": STUDIES, **changes}
        return Order(slug, **settings)  # type: ignore[arg-type]

    return build


@pytest.fixture
def kexue(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call the command line in the test's own folder, on the demo studies."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-m", "kexue", *arguments],
            cwd=tmp_path,
            env={**os.environ, "KEXUE_STUDIES": STUDIES, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call
