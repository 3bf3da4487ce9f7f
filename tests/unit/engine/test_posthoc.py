"""The mathematics of power-function averages, against numerical integrals and the recursion that training runs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fmscale.engine.posthoc import WIDEST, Response, combine, exponent, inner_products, power_decay, relative_width

WIDTHS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.279)
POINTS = 200_000


def response(updates: float, sigma_rel: float, over: NDArray[np.float64]) -> NDArray[np.float64]:
    """p(τ) by its definition."""
    gamma = exponent(sigma_rel)
    return np.where(over <= updates, (gamma + 1) / updates * (np.minimum(over, updates) / updates) ** gamma, 0.0)


def grid(end: float) -> tuple[NDArray[np.float64], float]:
    """Midpoints of small intervals up to `end`, and their length."""
    return (np.arange(POINTS) + 0.5) * end / POINTS, end / POINTS


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_exponent_has_the_width_that_was_asked_for(sigma_rel: float) -> None:
    assert relative_width(exponent(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-13)
    times, length = grid(1.0)
    weight = response(1.0, sigma_rel, times) * length
    assert weight.sum() == pytest.approx(1, rel=1e-4)
    mean = (weight * times).sum()
    assert (weight * (times - mean) ** 2).sum() ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_the_decays_of_a_training_make_the_response(sigma_rel: float) -> None:
    """Weight i of n has, after all decays, the integral of p over i − 1 … i; the initial weights have none."""
    updates = 50
    shares = np.zeros(updates + 1)
    shares[0] = 1
    for update in range(1, updates + 1):
        decay = power_decay(sigma_rel, update)
        shares *= decay
        shares[update] += 1 - decay
    edges = (np.arange(updates + 1) / updates) ** (exponent(sigma_rel) + 1)
    assert shares[0] == 0
    np.testing.assert_allclose(shares[1:], np.diff(edges), rtol=1e-10)


def test_inner_products_are_the_integrals() -> None:
    responses = [(10.0, 0.05), (40.0, 0.1), (40.0, 0.2), (100.0, 0.27)]
    table = np.array([(updates, exponent(width)) for updates, width in responses])
    times, length = grid(100.0)
    curves = np.stack([response(*one, times) for one in responses])
    np.testing.assert_allclose(inner_products(table, table), curves @ curves.T * length, rtol=2e-3)


def test_narrow_widths_late_in_a_long_training_do_not_overflow() -> None:
    table = np.array([(1.0, exponent(0.001)), (1e7, exponent(0.001))])
    assert np.isfinite(inner_products(table, table)).all()


def test_an_average_that_is_known_is_itself() -> None:
    known = [Response(updates, width) for updates in (10, 20, 30) for width in (0.05, 0.1)]
    for index, wanted in enumerate(known):
        found = combine(known, wanted)
        np.testing.assert_allclose(found.coefficients, np.eye(len(known))[index], atol=1e-8)
        assert found.error < 1e-6


def test_the_error_is_the_distance_of_the_responses_and_the_least_there_is() -> None:
    known = [Response(updates, width) for updates in range(10, 101, 10) for width in (0.05, 0.1)]
    wanted = Response(100, 0.15)
    found = combine(known, wanted)
    times, _ = grid(100.0)
    curves = np.stack([response(*one, times) for one in known])
    target = response(*wanted, times)

    def distance(coefficients: NDArray[np.float64]) -> float:
        lacking = coefficients @ curves - target
        return float(((lacking**2).sum() / (target**2).sum()) ** 0.5)

    assert found.error == pytest.approx(distance(found.coefficients), rel=0.02)
    for index in range(len(known)):
        for nudge in (-1e-2, 1e-2):
            assert distance(found.coefficients + nudge * np.eye(len(known))[index]) > found.error


def test_more_snapshots_lead_nearer() -> None:
    errors = [
        combine([Response(n, w) for n in range(every, 1001, every) for w in (0.05, 0.1)], Response(1000, 0.15)).error
        for every in (200, 100, 50, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_a_snapshot_that_stands_twice_changes_nothing() -> None:
    """As where every step between two snapshots was skipped."""
    known = [Response(updates, width) for updates in range(10, 101, 10) for width in (0.05, 0.1)]
    once, twice = combine(known, Response(100, 0.07)), combine([*known, *known[4:6]], Response(100, 0.07))
    assert twice.error == pytest.approx(once.error, rel=1e-3)
    joined = twice.coefficients[: len(known)].copy()
    joined[4:6] += twice.coefficients[len(known) :]
    np.testing.assert_allclose(joined, once.coefficients, atol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, WIDEST, 1.0])
def test_a_width_that_no_power_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(AssertionError):
        exponent(sigma_rel)
