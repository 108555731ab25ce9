"""How many requests are under way, and how long a failed one waits."""

import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.backends.pacing import LONGEST_WAIT, Pace, pause, retry_after

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)


@given(st.integers(1, 200), st.lists(st.booleans(), max_size=300))
def test_the_limit_stays_within_its_bounds(most: int, busy: list[bool]) -> None:
    pace = Pace(most)
    for now, is_busy in enumerate(busy):
        before = pace.limit
        if is_busy:
            pace.busy(sent=now, now=now)
            assert pace.limit <= before
        else:
            pace.answered()
            assert pace.limit >= before
        assert 1 <= pace.limit <= most


def test_requests_that_were_under_way_together_reduce_it_once() -> None:
    pace = Pace(64)
    for _ in range(64):
        pace.busy(sent=1.0, now=2.0)
    assert pace.limit == 51
    pace.busy(sent=2.5, now=3.0)
    assert pace.limit == 40
    for _ in range(240):
        pace.answered()
    assert pace.limit == 64


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Thu, 26 Nov 2026 12:00:30 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "Thu, 26 Nov 2026 12:00:30 -0000"}, 30),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": ""}, None),
    ],
)
def test_what_a_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, NOON) == seconds


@given(st.text(max_size=40))
def test_any_header_is_read(text: str) -> None:
    seconds = retry_after({"retry-after": text}, NOON)
    assert seconds is None or seconds >= 0


@given(st.integers(0, 30), st.none() | st.floats(0, 1e9), st.integers())
def test_a_pause_is_bounded_and_never_shorter_than_asked(attempt: int, wait: float | None, seed: int) -> None:
    seconds = pause(attempt, wait, random.Random(seed))
    longest = min(60.0, 2.0**attempt)
    if wait is None:
        assert longest / 2 <= seconds <= longest
    else:
        assert min(LONGEST_WAIT, wait) <= seconds <= min(LONGEST_WAIT, wait) + longest
