"""How fast a server is asked: how many requests are under way, and how long a failed one waits.

A server that is busy says so with a status (429, 503), perhaps with `Retry-After`. The number of requests under way
is then reduced by a fifth, once for all requests that were under way, and grows by a tenth of a request with every
answer: additive increase and multiplicative decrease, as TCP does it (RFC 5681), with a smaller step down and a larger
one up, because an answer may take minutes, and half of the requests would be missing for hours. Pauses double, with
jitter, so that the requests that failed together do not come back together.
"""

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_PAUSE = 1.0  # seconds; doubled for every further attempt
LONGEST_PAUSE = 60.0  # seconds, where the server names no time
REDUCTION, GROWTH = 0.8, 0.1
LONGEST_WAIT = 3600.0  # seconds, where it names one: a quota may open again within the hour


class Pace:
    """The number of requests that may be under way. most: its upper bound, with which it begins."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._limit = float(most)
        self._reduced = float("-inf")

    @property
    def limit(self) -> int:
        """Requests that may be under way now, at least one."""
        return int(self._limit)

    def answered(self) -> None:
        """Count an answer."""
        self._limit = min(self.most, self._limit + GROWTH)

    def busy(self, sent: float, now: float) -> None:
        """Count a request that the server was too busy for. sent, now: times in seconds, of one clock."""
        if sent >= self._reduced:
            self._limit, self._reduced = max(1.0, self._limit * REDUCTION), now


def pause(attempt: int, wait: float | None, draw: random.Random) -> float:
    """Seconds until the next attempt. attempt: 0 after the first failure. wait: what the server asked for."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
    own = draw.uniform(longest / 2, longest)
    return own if wait is None else min(LONGEST_WAIT, wait) + own / 2


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The seconds that a reply asks to wait (RFC 9110, 10.2.3, and `retry-after-ms`); None where it asks for none."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        day = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    day = day if day.tzinfo else day.replace(tzinfo=UTC)
    return max(0.0, (day - (now or datetime.now(UTC))).total_seconds())
