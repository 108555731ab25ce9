"""What an engine in a process of its own and its parent say to each other: JSON lines.

    parent → worker    {"model_dir": …, "options": {…}}, then {"request": {…}} and {"abort": id, "sample": number}
    worker → parent    {"loaded": {…}} or {"refused": why}, then {"completions": [{…}, …], "usage": {…}},
                       {"progress": [{…}, …]} of streamed requests, {"rejected": id, "error": why} of a request that
                       can never be served, or {"not_finite": position}

The dataclasses of the engine travel whole, as `asdict` and `to_json` give them; `from_json` is the way back. JSON and
not pickle, because a line can be read by eye and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from distill.engine.alternatives import Alternatives
from distill.engine.numerics import Numerics
from distill.engine.options import SamplingParams, ThinkTokens
from distill.engine.results import Completion, Progress
from distill.engine.scheduler import Request

T = TypeVar("T")
R = TypeVar("R", Completion, Progress)


@dataclass(frozen=True)
class Loaded:
    """A model that a worker has loaded."""

    numerics: Numerics
    max_context: int


def from_json(make: Callable[..., T], row: object) -> T:
    """The dataclass `make` that `asdict` described; lists become tuples."""
    assert isinstance(row, Mapping)
    return make(**{name: _tuples(value) for name, value in row.items()})


def loaded(row: object) -> Loaded:
    """A `Loaded` from JSON."""
    assert isinstance(row, Mapping)
    return Loaded(from_json(Numerics, row["numerics"]), row["max_context"])


def request(row: object) -> Request:
    """A `Request` from JSON."""
    assert isinstance(row, Mapping)
    sampling = dict(row["sampling"])
    if sampling["think_tokens"] is not None:
        sampling["think_tokens"] = from_json(ThinkTokens, sampling["think_tokens"])
    return from_json(Request, {**row, "sampling": from_json(SamplingParams, sampling)})


def to_json(made: Completion | Progress) -> dict[str, object]:
    """What an engine made as JSON values, the alternatives as pairs."""
    return {**vars(made), "top": made.top_logprobs}


def progress(row: object) -> Progress:
    """A `Progress` from JSON."""
    return _with_top(from_json(Progress, row))


def sample(value: object) -> int | None:
    """The number of a sample, or None for all of a request."""
    assert isinstance(value, int | None)
    return value


def rows(value: object) -> list[object]:
    """A list of JSON values."""
    assert isinstance(value, list)
    return value


def completion(row: object) -> Completion:
    """A `Completion` from JSON."""
    return _with_top(from_json(Completion, row))


def _with_top(made: R) -> R:
    """What an engine made, its alternatives as arrays again."""
    return made if made.top is None else replace(made, top=Alternatives.of(made.top))  # type: ignore[arg-type]  # pairs


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
