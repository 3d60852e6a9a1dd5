"""With KEXUE_CHECK_SHAPES set, as `make test` does, shape annotations are checked at run time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import config, install_import_hook

if os.environ.get("KEXUE_CHECK_SHAPES"):
    install_import_hook("kexue", "shape_checks.typechecker")

CHROMIUM = next(
    (p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if os.path.exists(p)), None
)
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_shape_checks_for_bad_input(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that passes wrong shapes on purpose must meet the function's own words."""
    if request.node.get_closest_marker("bad_input") is None:
        yield
        return
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium; skips where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install Debian's package chromium")
    return CHROMIUM


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with larger real data sets beside the checkout; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data beside this checkout")
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
