"""Run studies, here or on several processes or machines, and keep what they found."""

from __future__ import annotations

import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from kexue.lab.catalogue import Catalogue, Entry
from kexue.lab.errors import LabError, NotRun, StoreError, UsageError
from kexue.lab.store import SCHEMA, result_json, sweep, writing_run
from kexue.lab.study import Budget, Findings, Lab

__all__ = ["BACKENDS", "Order", "Outcome", "run_studies", "run_study", "verdict_of"]

BACKENDS = ("loky", "dask", "ray")
CACHE_FOLDER = ".cache"
_PACKAGES = ("kexue", "torch", "numpy", "scipy", "scikit-learn", "matplotlib")


@dataclass(frozen=True)
class Order:
    """What is to be run, complete enough to be sent to another machine."""

    slug: str
    out: Path
    budget: Budget = "quick"
    seed: int = 0
    device: str = "cpu"
    data: Path | None = None
    studies: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a study ended.

    ``verdict`` is "holds", "does not hold", "not judged" (the smoke budget), "not run" (something
    that it needs is absent) or "failed" (it raised, or could not be stored). ``as_recorded`` says
    whether that is what the catalogue expects.
    """

    slug: str
    verdict: str
    as_recorded: bool
    seconds: float
    claims: int = 0
    claims_held: int = 0
    folder: Path | None = None
    reason: str = ""

    def line(self) -> str:
        """Return the one line that the terminal shows."""
        parts = [f"{self.verdict:13s} {self.slug}"]
        if self.claims:
            parts.append(f"{self.claims_held} of {self.claims} claims hold")
        parts.append(f"{self.seconds:.1f} s")
        if self.reason:
            parts.append(self.reason)
        if not self.as_recorded and self.verdict == "holds":
            parts.append("but the catalogue knows it not to hold")
        if self.as_recorded and self.verdict == "does not hold":
            parts.append("as the catalogue knows")
        if self.folder is not None:
            parts.append(_from_here(self.folder / "page.html"))
        return " · ".join(parts)


def run_studies(
    orders: Sequence[Order],
    *,
    jobs: int = 1,
    backend: str = "loky",
    bars: Any = None,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run studies, ``jobs`` at a time, and call ``done`` with each outcome as it comes.

    Parameters
    ----------
    orders : sequence of Order
        What to run.
    jobs : int
        How many studies at once; with one they run in this process.
    backend : {"loky", "dask", "ray"}
        Where joblib runs them: processes here, or an existing cluster (dask takes the address from
        ``DASK_SCHEDULER_ADDRESS``, ray from ``RAY_ADDRESS``; without one a local cluster is
        started). A cluster's workers need the package and the folder ``out``.
    bars : rich.progress.Progress, optional
        Where progress is shown.
    done : callable, optional
        Called with each outcome.

    Returns
    -------
    list of Outcome
        In the order of ``orders``.

    Raises
    ------
    UsageError
        For an unknown backend, a missing package of it, or fewer than one job.
    """
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    if backend not in BACKENDS:
        raise UsageError(f"--backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    outcomes: dict[str, Outcome] = {}

    def collect(found: Iterator[Outcome] | list[Outcome]) -> None:
        for outcome in found:
            outcomes[outcome.slug] = outcome
            if overall is not None:
                bars.advance(overall)
            done(outcome)

    overall = bars.add_task("studies", total=len(orders), metric="") if bars is not None else None
    if jobs == 1 and backend == "loky":
        collect(run_study(order, bars=bars) for order in orders)
    else:
        import joblib

        # An unordered generator shows each verdict as it comes; ray's backend has none.
        kind = "list" if backend == "ray" else "generator_unordered"
        with _backend(backend, jobs):
            collect(
                joblib.Parallel(n_jobs=jobs, return_as=kind)(
                    joblib.delayed(run_study)(order) for order in orders
                )
            )
    return [outcomes[order.slug] for order in orders]


def run_study(order: Order, *, bars: Any = None) -> Outcome:
    """Run one study and store the run; never raises for what the study does."""
    entry = Catalogue(order.studies)[order.slug]
    if int(os.environ.get("RANK", "0")) > 0:
        # Under torchrun every process takes part in the study, and the first one keeps the run.
        with tempfile.TemporaryDirectory() as nowhere:
            return _run_and_store(entry, replace(order, out=Path(nowhere)), bars=None)
    try:
        return _run_and_store(entry, order, bars=bars)
    except StoreError as error:
        return Outcome(order.slug, "failed", False, 0.0, reason=str(error))


def verdict_of(findings: Findings, budget: str, *, own_data: bool = False) -> str:
    """Return the verdict of a study that ran to its end.

    On a user's own data a study may report everything and judge nothing: its claims are about the
    data that it brings along.
    """
    judged = [claim for claim in findings.claims if claim.judged]
    if budget == "smoke" or (own_data and findings.claims and not judged):
        return "not judged"
    if not judged:
        return "failed"
    return "holds" if all(claim.holds for claim in judged) else "does not hold"


def _run_and_store(entry: Entry, order: Order, *, bars: Any) -> Outcome:
    from kexue.lab.report import ensure_assets, run_page

    cache = order.out / CACHE_FOLDER
    for folder in (cache / entry.slug, cache):
        if folder.is_dir():
            sweep(folder)
    started, clock = datetime.now(UTC), time.perf_counter()
    with writing_run(order.out, order.slug) as (folder, final):
        ensure_assets(order.out)
        lab = Lab(
            order.slug,
            folder,
            budget=order.budget,
            seed=order.seed,
            device=order.device,
            data_path=order.data,
            cache_folder=cache,
            bars=bars,
        )
        verdict, reason, trace = _carry_out(entry, lab)
        seconds = time.perf_counter() - clock
        as_recorded = verdict in (entry.expected(order.budget), "not judged", "not run")
        # What is known not to hold is known of the embedded data.
        as_recorded = as_recorded or (verdict == "holds" and order.data is not None)
        result = {
            "schema": SCHEMA,
            "slug": entry.slug,
            "title": entry.title,
            "title_zh": entry.title_zh,
            "field": entry.field,
            "modules": list(entry.modules),
            "claim": entry.claim,
            "text": entry.text,
            "verdict": verdict,
            "reason": reason,
            "known": entry.known,
            "as_recorded": as_recorded,
            "budget": order.budget,
            "seed": order.seed,
            "device": order.device,
            "data": None if order.data is None else str(order.data),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            **lab.findings.as_dict(),
            "versions": _versions(),
            "machine": _machine(),
            "traceback": trace,
        }
        (folder / "page.html").write_text(run_page(result), encoding="utf-8")
        if trace:
            (folder / "traceback.txt").write_text(trace, encoding="utf-8")
        (folder / "result.json").write_text(result_json(result), encoding="utf-8")
    judged = [claim for claim in lab.findings.claims if claim.judged]
    return Outcome(
        order.slug,
        verdict,
        as_recorded,
        seconds,
        claims=len(judged) if order.budget != "smoke" else 0,
        claims_held=sum(claim.holds for claim in judged),
        folder=final,
        reason=reason,
    )


def _carry_out(entry: Entry, lab: Lab) -> tuple[str, str, str]:
    """Run the study; return verdict, a sentence if there is something to say, and a traceback."""
    from kexue.lab.report.figures import style

    try:
        _seed_everything(lab.seed)
        with style():
            entry.load().run(lab)
    except NotRun as error:
        return "not run", str(error), ""
    except StoreError:
        raise
    except OSError as error:
        import errno

        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # nothing can be recorded on a full disk
        return "failed", f"{type(error).__name__}: {error}", traceback.format_exc()
    except LabError as error:
        return "failed", str(error), traceback.format_exc()
    except Exception as error:
        sentence = " ".join(str(error).split())
        return "failed", f"{type(error).__name__}: {sentence}", traceback.format_exc()
    verdict = verdict_of(lab.findings, lab.budget, own_data=lab.data.path is not None)
    return verdict, "the study made no claim" if verdict == "failed" else "", ""


def _seed_everything(seed: int) -> None:
    """Seed the global generators too: a layer's default initialisation draws from torch's."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "from source"
    return found


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@contextmanager
def _backend(name: str, jobs: int) -> Iterator[None]:
    import joblib

    if name == "loky":
        yield
        return
    if name == "ray":
        try:
            from ray.util.joblib import register_ray
        except ImportError:
            raise UsageError(_missing(name)) from None
        register_ray()
        with joblib.parallel_config(backend="ray", n_jobs=jobs):
            yield
        return
    try:
        from distributed import Client
    except ImportError:
        raise UsageError(_missing(name)) from None
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    cluster: dict[str, Any] = {} if address else {"n_workers": jobs, "threads_per_worker": 1}
    with Client(address, **cluster), joblib.parallel_config(backend="dask", n_jobs=jobs):
        yield


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _missing(backend: str) -> str:
    return f"--backend {backend} needs the package {backend}: pip install 'kexue[{backend}]'"
