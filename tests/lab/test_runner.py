"""Studies run, fail, are killed, run twice at once, on one process and on many."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kexue.lab.errors import UsageError
from kexue.lab.runner import Order, Outcome, run_studies, run_study, verdict_of
from kexue.lab.store import read_run
from kexue.lab.study import Claim, Findings

Build = Callable[..., Order]


def claims(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.folder is not None
    return read_run(outcome.folder).result["claims"]


def test_a_run_holds_result_page_and_figures(order: Build) -> None:
    outcome = run_study(order("pendulum"))
    assert (outcome.verdict, outcome.as_recorded) == ("holds", True)
    assert outcome.folder is not None
    names = {str(p.relative_to(outcome.folder)) for p in outcome.folder.rglob("*") if p.is_file()}
    assert names == {"result.json", "page.html", "figures/period.svg", "figures/period.png"}
    result = read_run(outcome.folder).result
    assert result["budget"] == "quick"
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cores"] == os.cpu_count()
    assert [claim["judged"] for claim in result["claims"]] == [True, True, False]


def test_the_page_finds_its_assets(order: Build) -> None:
    folder = run_study(order("pendulum")).folder
    assert folder is not None
    for asset in ("style.css", "mathjax/tex-svg-full.js", "fonts/source-serif-4.woff2"):
        assert (folder / "../../_assets" / asset).is_file()
    assert "../../_assets/style.css" in (folder / "page.html").read_text()


def test_a_smoke_run_is_not_judged(order: Build) -> None:
    outcome = run_study(order("false_claim", budget="smoke"))
    assert (outcome.verdict, outcome.as_recorded) == ("not judged", True)
    assert len(claims(outcome)) == 2


def test_a_claim_may_be_known_not_to_hold_in_one_budget_alone(order: Build) -> None:
    quick, full = (run_study(order("false_later", budget=b)) for b in ("quick", "full"))
    assert (quick.verdict, quick.as_recorded) == ("holds", True)
    assert (full.verdict, full.as_recorded) == ("does not hold", True)


def test_a_claim_known_not_to_hold_is_as_recorded(order: Build) -> None:
    outcome = run_study(order("false_claim"))
    assert (outcome.verdict, outcome.as_recorded) == ("does not hold", True)
    assert outcome.folder is not None
    assert "two is less than three" in (outcome.folder / "page.html").read_text()


def test_what_is_known_not_to_hold_may_hold_on_other_data(order: Build, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("a user's own")
    outcome = run_study(order("false_later", budget="full", data=tmp_path / "own.txt"))
    assert (outcome.verdict, outcome.as_recorded) == ("holds", True)


def test_a_study_that_raises_keeps_its_traceback_and_the_others_go_on(order: Build) -> None:
    raising, fine = run_studies([order("raises"), order("pendulum", budget="smoke")])
    assert (raising.verdict, raising.as_recorded) == ("failed", False)
    assert raising.reason == "ZeroDivisionError: division by zero"
    assert raising.folder is not None
    assert "1 / (lab.seed - lab.seed)" in (raising.folder / "traceback.txt").read_text()
    assert len(claims(raising)) == 1
    assert fine.verdict == "not judged"


def test_a_study_that_lacks_something_says_what(order: Build) -> None:
    outcome = run_study(order("absent"))
    assert (outcome.verdict, outcome.as_recorded) == ("not run", True)
    assert "perpetual motion" in outcome.line()


def test_no_judged_claim_is_no_verdict() -> None:
    findings = Findings(claims=[Claim("observed", 1.0, "<", 2.0, judged=False)])
    assert verdict_of(findings, "quick") == "failed"


def test_a_study_may_judge_nothing_on_a_users_own_data() -> None:
    reported = Findings(claims=[Claim("seen", 1.0, ">", 2.0, judged=False)])
    assert verdict_of(reported, "quick", own_data=True) == "not judged"
    assert verdict_of(reported, "quick") == "failed"
    assert verdict_of(Findings(), "quick", own_data=True) == "failed"
    judged = Findings(claims=[Claim("seen", 1.0, ">", 2.0)])
    assert verdict_of(judged, "quick", own_data=True) == "does not hold"


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(order: Build) -> None:
    def measured(seed: int, where: str) -> list[float]:
        path = order("training").out / where
        return [c["measured"] for c in claims(run_study(order("training", seed=seed, out=path)))]

    assert measured(1, "a") == measured(1, "b") != measured(2, "a")


def test_two_jobs_give_what_one_gives(order: Build) -> None:
    orders = [order("pendulum"), order("training"), order("raises")]
    alone = run_studies(orders)
    seen: list[str] = []
    together = run_studies(orders, jobs=2, done=lambda outcome: seen.append(outcome.slug))
    assert sorted(seen) == ["pendulum", "raises", "training"]
    for one, two in zip(alone, together, strict=True):
        assert (one.slug, one.verdict) == (two.slug, two.verdict)
        assert claims(one) == claims(two)


@pytest.mark.slow
def test_dask_runs_the_studies_on_a_cluster_of_two_workers(
    order: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", here)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        outcomes = run_studies([order("pendulum"), order("training")], jobs=2, backend="dask")
    assert [outcome.verdict for outcome in outcomes] == ["holds", "holds"]
    assert all(outcome.folder and outcome.folder.is_dir() for outcome in outcomes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"jobs": 0}, "--jobs must be at least 1"), ({"backend": "slurm"}, "loky, dask, ray")],
)
def test_bad_settings_are_usage_errors(order: Build, settings: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run_studies([order("pendulum")], **settings)


def test_ray_without_ray_says_what_to_install(order: Build) -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"pip install 'kexue\[ray\]'"):
            run_studies([order("pendulum")], jobs=2, backend="ray")
    else:
        pytest.skip("ray is here")


def test_under_torchrun_only_the_first_process_keeps_a_run(
    order: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_study(order("pendulum", budget="smoke")).verdict == "not judged"
    assert not (order("pendulum").out / "pendulum").exists()


def _in_child(order: Order) -> None:
    run_study(order)


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "matplotlib.pyplot", "kexue.lab.runner"])
    return context


def _finished(order: Order) -> list[Path]:
    home = order.out / order.slug
    return [p for p in home.glob("*") if not p.name.startswith(".")] if home.is_dir() else []


@pytest.mark.slow
def test_killed_at_ten_random_moments_leaves_no_half_run_and_the_cache_is_taken_up(
    order: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_STEP", "0.004")  # two fits of 0.4 s
    monkeypatch.setenv("DEMO_PAUSE", "0.1")
    reference = order("training", out=order("training").out / "undisturbed")
    wanted = order("training", out=order("training").out / "disturbed")
    context, moments = _forkserver(), random.Random(0)

    def started(what: Order) -> Any:
        child = context.Process(target=_in_child, args=(what,))
        child.start()
        return child

    started(reference).join()  # the first child also starts the server
    clock = time.perf_counter()
    started(reference).join()  # takes up its cache: starting, pausing and storing
    duration = time.perf_counter() - clock + 0.8
    undisturbed = read_run(_finished(reference)[0]).result["claims"]

    def kill(child: Any) -> None:
        child.kill()
        child.join()
        for folder in _finished(wanted):
            read_run(folder)  # whole

    for _ in range(10):
        child = started(wanted)
        time.sleep(moments.uniform(0.0, duration))
        kill(child)
    # However slow the machine, one is killed between the two caches.
    child = started(wanted)
    while not (cached := sorted((wanted.out / ".cache").rglob("first-*.safetensors"))):
        assert child.is_alive()
        time.sleep(0.01)
    kill(child)
    written = cached[0].stat().st_mtime_ns
    again = run_study(wanted)
    assert claims(again) == undisturbed
    assert cached[0].stat().st_mtime_ns == written, "the cache was not taken up"
    assert not list(wanted.out.rglob(".partial-*"))


def test_two_processes_run_the_same_study_at_once(
    order: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_STEP", "0.002")
    context, wanted = _forkserver(), order("training")
    children = [context.Process(target=_in_child, args=(wanted,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    one, two = (read_run(folder).result["claims"] for folder in _finished(wanted))
    assert one == two
    assert not list(wanted.out.rglob(".partial-*"))


def test_a_cache_does_not_outlive_its_inputs(order: Build, tmp_path: Path) -> None:
    cache = order("training").out / ".cache" / "training"
    run_study(order("training"))
    first = set(cache.iterdir())
    run_study(order("training"))
    assert set(cache.iterdir()) == first
    run_study(order("training", seed=5))
    assert len(set(cache.iterdir())) == 2 * len(first)


def test_the_result_is_plain_json_with_a_schema(order: Build) -> None:
    folder = run_study(order("pendulum", budget="smoke")).folder
    assert folder is not None
    result = json.loads((folder / "result.json").read_text())
    assert result["schema"] == 1
    assert result["text"].startswith("The period of a pendulum.")
