from __future__ import annotations

from itertools import pairwise

from droprd.core.pace import ONE_FRAME, REQUEST_BYTES_MAX, Pace
from droprd.model import KIB, MIB


def sent(pace: Pace, size: int, start_s: float, end_s: float) -> None:
    pace.accepted(pace.started(size, start_s), end_s)


def fill(pace: Pace, rate: float, requests: int, now_s: float = 0.0) -> float:
    """Send one full window after another over a line of `rate` bytes a second."""
    for _ in range(requests):
        size = max(32 * KIB, pace.window)
        sent(pace, size, now_s, now_s + size / rate)
        now_s += size / rate
    return now_s


def test_the_first_request_is_one_frame_until_a_rate_was_measured() -> None:
    pace = Pace(4)
    assert pace.window == ONE_FRAME
    pace.started(32 * KIB, 0)
    assert pace.left <= 0


def test_the_window_is_two_seconds_worth_at_the_measured_rate() -> None:
    pace = Pace(4)
    fill(pace, 500_000, 20)
    assert 900_000 <= pace.window <= 1_100_000


def test_a_line_of_64_kbit_gets_one_frame_at_a_time() -> None:
    pace = Pace(4)
    fill(pace, 8_000, 20)
    assert pace.window <= 16 * KIB


def test_a_fast_line_is_opened_step_by_step_until_it_is_filled() -> None:
    pace = Pace(4)
    windows = []
    now_s = 0.0
    for _ in range(16):
        now_s = fill(pace, 50e6, 1, now_s)
        windows.append(pace.window)
    assert windows[0] <= 64 * KIB
    assert all(later <= 2 * earlier for earlier, later in pairwise(windows))
    assert windows[-1] == 4 * REQUEST_BYTES_MAX


def test_a_broken_transfer_halves_the_window() -> None:
    pace = Pace(4)
    fill(pace, 500_000, 20)
    before = pace.window
    pace.ended(pace.started(before, 100))
    pace.broken()
    assert pace.window == before // 2


def test_after_an_outage_nothing_is_known_of_the_rate() -> None:
    pace = Pace(4)
    fill(pace, 50e6, 20)
    pace.shut()
    assert (pace.window, pace.rate) == (ONE_FRAME, None)
    fill(pace, 50e6, 1, 1000)
    assert pace.window <= 64 * KIB


def test_a_small_request_over_a_long_way_does_not_lower_the_rate() -> None:
    pace = Pace(4)
    now_s = fill(pace, 5e6, 20)
    before = pace.rate
    sent(pace, 200, now_s, now_s + 0.5)
    assert pace.rate == before


def test_a_line_that_becomes_slow_is_noticed_by_the_next_full_request() -> None:
    pace = Pace(4)
    now_s = fill(pace, 1e6, 20)
    fill(pace, 8_000, 1, now_s)
    assert pace.window <= 16 * KIB + 1


def test_requests_that_overlap_are_not_counted_twice() -> None:
    pace = Pace(4)
    fill(pace, 100_000, 20)
    # Two requests share a line of 100 kB/s; the second one's bytes follow the first one's.
    first = pace.started(100_000, 1000.0)
    second = pace.started(100_000, 1000.9)
    pace.accepted(first, 1001.0)
    pace.accepted(second, 1002.0)
    assert pace.rate is not None
    assert 90_000 <= pace.rate <= 120_000


def test_an_idle_hour_is_no_slow_hour() -> None:
    pace = Pace(4)
    now_s = fill(pace, 1e6, 20)
    sent(pace, 2 * MIB, now_s + 3600, now_s + 3602)
    assert pace.rate is not None
    assert pace.rate > 900_000


def test_one_request_slot_bounds_the_window_to_one_request() -> None:
    pace = Pace(1)
    fill(pace, 50e6, 30)
    assert pace.window == REQUEST_BYTES_MAX
