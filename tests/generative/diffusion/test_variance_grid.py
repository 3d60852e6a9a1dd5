"""Optimal grids against exhaustive search and path independence."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generative.diffusion.mixtures import double, mixture
from kexue.generative.diffusion import (
    DiscreteSchedule,
    HeatSchedule,
    OptimalTimes,
    TabulatedVariance,
    VariancePreservingSchedule,
    estimate_clean_variance,
    optimal_times,
    transition_weights,
    variational_bound,
)

FOUR = DiscreteSchedule.from_betas(double([0.1, 0.3, 0.5, 0.7]))
LINEAR = DiscreteSchedule.linear()


def gaussian_table(schedule, times, variance=0.3):
    values = 1 / (1 / variance + 1 / schedule.sigma(times) ** 2)
    return TabulatedVariance(times, values, schedule=schedule)


def path_cost(table, times, eta=1.0):
    """The cost of a decreasing list of positive times, by its formula."""
    total = 0.0
    for now, before in itertools.pairwise(times):
        weights = transition_weights(table.schedule, now, before, eta=eta)
        ratio = (weights.clean / weights.noise) ** 2 * table.at(now)
        total += torch.log1p(ratio).mean().item() / 2
    return total


@pytest.mark.parametrize(
    ("now", "before", "cost"),
    [
        (2, 1, 0.447843176066675),
        (3, 1, 0.589549484707286),
        (3, 2, 0.141706308640612),
        (4, 1, 0.638752135607015),
        (4, 2, 0.190908959540341),
        (4, 3, 0.049202650899729),
    ],
)
def test_transition_costs_match_thirty_digit_arithmetic(now, before, cost):
    table = gaussian_table(FOUR, double([1, 2, 3, 4]))
    result = optimal_times(table, 2, grid=double([before, now]))
    assert result.times.tolist() == [now, before, 0]
    assert result.cost.item() == pytest.approx(cost, rel=1e-12)


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_every_grid_costs_the_same_for_gaussian_data(num_steps):
    table = gaussian_table(FOUR, double([1, 2, 3, 4]))
    result = optimal_times(table, num_steps)
    assert result.cost.item() == pytest.approx(0.638752135607015, rel=1e-12)
    assert len(result.times) == num_steps + 1
    assert result.times[0] == 4
    assert result.times[-2:].tolist() == [1, 0]
    assert result.cost.item() == pytest.approx(
        path_cost(table, result.times[:-1].tolist()), rel=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(
    shares=st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7),
    num_steps=st.integers(2, 7),
    eta=st.floats(0.2, 1.0),
)
def test_no_grid_of_the_same_length_is_cheaper(shares, num_steps, eta):
    times = double([1, 40, 150, 300, 520, 800, 1000])
    table = TabulatedVariance(times, double(shares) * LINEAR.sigma(times) ** 2, schedule=LINEAR)
    result = optimal_times(table, num_steps, grid=times, eta=eta)
    inner = itertools.combinations(times[1:-1].tolist()[::-1], num_steps - 2)
    costs = [path_cost(table, [1000, *middle, 1], eta) for middle in inner]
    assert result.cost.item() == pytest.approx(min(costs), rel=1e-9, abs=1e-12)
    chosen = path_cost(table, result.times[:-1].tolist(), eta)
    assert chosen == pytest.approx(result.cost.item(), rel=1e-9, abs=1e-12)
    assert bool((result.times.diff() < 0).all())


def test_costs_of_a_table_per_entry_are_means_over_entries():
    times = double([1, 200, 600, 1000])
    values = double([[0.5, 0.1], [0.4, 0.9], [0.2, 0.3], [1e-4, 1e-5]]) * (
        LINEAR.sigma(times)[:, None] ** 2
    )
    both = TabulatedVariance(times, values, schedule=LINEAR)
    result = optimal_times(both, 3, grid=times)
    separate = [
        path_cost(TabulatedVariance(times, values[:, i], schedule=LINEAR), result.times[:-1])
        for i in range(2)
    ]
    assert result.cost.item() == pytest.approx(sum(separate) / 2, rel=1e-12)


def test_one_step_goes_from_the_largest_time_to_zero():
    table = gaussian_table(LINEAR, torch.arange(1, 1001, dtype=torch.float64))
    result = optimal_times(table, 1)
    assert isinstance(result, OptimalTimes)
    assert result.times.tolist() == [1000, 0]
    assert result.cost.item() == 0


def test_all_candidates_are_taken_where_there_are_no_more():
    times = double([7, 3, 900, 250])
    table = gaussian_table(LINEAR, times.sort().values)
    assert optimal_times(table, 4, grid=times).times.tolist() == [900, 250, 7, 3, 0]


def test_continuous_schedules_take_a_grid():
    for schedule, times in (
        (HeatSchedule(), double([0.1, 1, 5, 20])),
        (VariancePreservingSchedule(), double([0.01, 0.2, 0.5, 1.0])),
    ):
        result = optimal_times(gaussian_table(schedule, times), 3, grid=times)
        assert result.times[[0, 2, 3]].tolist() == [times[-1], times[0], 0]


def test_optimal_times_improve_the_bound_of_the_mixture():
    """They go straight into the bound, and beat the equally spaced grid by the study's margin."""
    denoiser = mixture(LINEAR)
    generator = torch.Generator().manual_seed(0)
    data = denoiser.sample(1000, generator=generator)
    candidates = double([1, 5, 20, *range(50, 1001, 50)])
    table = estimate_clean_variance(denoiser, data, times=candidates, generator=generator)

    def bound(times):
        return variational_bound(
            denoiser, data, times=times, clean_variance=table,
            generator=torch.Generator().manual_seed(1),
        ).total.mean().item()  # fmt: skip

    equal = bound(LINEAR.times(5))
    assert bound(optimal_times(table, 5, grid=candidates).times) < equal - 0.1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps.*1…1000.*0"),
        ({"num_steps": 1001}, "num_steps.*1001"),
        ({"num_steps": 3, "grid": double([1, 2])}, "num_steps.*1…2.*3"),
        ({"num_steps": 2, "eta": 0.0}, "eta.*0"),
        ({"num_steps": 2, "eta": math.nan}, "eta.*nan"),
        ({"num_steps": 2, "grid": double([1, 1, 2])}, "grid.*differ"),
        ({"num_steps": 2, "grid": double([0, 1])}, "positive"),
        ({"num_steps": 2, "grid": double([[1, 2]])}, "grid"),
        ({"num_steps": 2, "grid": double([])}, "grid"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(options, words):
    table = gaussian_table(LINEAR, torch.arange(1, 1001, dtype=torch.float64))
    with pytest.raises(ValueError, match=words):
        optimal_times(table, **options)


@pytest.mark.bad_input
def test_candidates_outside_the_table_and_missing_grids_are_refused():
    with pytest.raises(ValueError, match="range"):
        optimal_times(gaussian_table(LINEAR, double([10, 500])), 2)
    with pytest.raises(ValueError, match=r"grid.*HeatSchedule"):
        optimal_times(gaussian_table(HeatSchedule(), double([1, 2])), 2)
