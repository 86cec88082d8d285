from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droprd.core.backoff import Backoff

# The largest number a generator of [0, 1) gives, in effect.
NEARLY_ONE = 1 - 2**-53


def after(failures: int, backoff: Backoff | None = None) -> Backoff:
    backoff = backoff or Backoff()
    for _ in range(failures):
        backoff = backoff.failed()
    return backoff


def test_without_a_failure_there_is_no_wait() -> None:
    assert Backoff().wait_s(lambda: NEARLY_ONE) == 0


@pytest.mark.parametrize(
    ("failures", "longest_s"), [(1, 1), (2, 2), (3, 4), (4, 8), (9, 256), (10, 300), (11, 300)]
)
def test_the_longest_wait_doubles_from_one_second_to_five_minutes(
    failures: int, longest_s: float
) -> None:
    assert after(failures).ceiling_s() == longest_s


def test_the_wait_is_drawn_from_zero_to_the_longest_so_that_nodes_do_not_return_together() -> None:
    backoff = after(4)
    assert backoff.wait_s(lambda: 0.0) == 0
    assert backoff.wait_s(lambda: 0.5) == 4
    assert backoff.wait_s(lambda: NEARLY_ONE) == pytest.approx(8)


@given(st.integers(min_value=1, max_value=100_000), st.floats(0, NEARLY_ONE))
def test_it_is_never_given_up_and_never_waits_longer_than_the_maximum(
    failures: int, drawn: float
) -> None:
    backoff = Backoff(failures=failures)
    assert 0 <= backoff.wait_s(lambda: drawn) <= 300


def test_a_success_sets_it_to_its_start() -> None:
    assert after(7).succeeded() == Backoff()


def test_bounds_of_ones_own_are_kept() -> None:
    backoff = after(20, Backoff(wait_first_s=0.1, wait_max_s=5))
    assert backoff.ceiling_s() == 5
    assert backoff.succeeded().failed().ceiling_s() == pytest.approx(0.1)
