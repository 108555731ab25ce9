"""Judging each trace by itself: the same code in this process and in the processes of a cluster."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from pydantic import JsonValue

from distill.filters.base import Candidate, ChoosingFilter, Judging, Resources, StreamFilter, TraceFilter
from distill.filters.judged import Judged
from distill.traces.trace import Trace, Verdict


@dataclass
class _Draft:
    """A trace on its way through the stream filters. candidate: None from the last one on, so that no text waits."""

    position: int
    candidate: Candidate | None
    judged: Judged
    verdicts: dict[str, Verdict]


class Judge:
    """Judges traces by all filters that judge each trace by itself, and takes the notes of those that choose later.

    A context manager: stream filters work inside the block.
    """

    def __init__(
        self, filters: Sequence[TraceFilter | StreamFilter], choosing: Sequence[ChoosingFilter], resources: Resources
    ) -> None:
        self.filters, self.choosing, self.resources = filters, choosing, resources
        self._streams: list[tuple[StreamFilter, Judging]] = []

    def __enter__(self) -> "Judge":
        with ExitStack() as stack:
            for each in self.filters:
                if isinstance(each, StreamFilter):
                    self._streams.append((each, stack.enter_context(each.opened(self.resources))))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._streams.clear()
        self._stack.__exit__(kind, error, trace)

    def judge(self, traces: Iterable[tuple[int, Trace]]) -> Iterator[tuple[int, Judged]]:
        """Yield (position, judged trace) for every (position, trace), in order of completion. Lazy in `traces`."""
        drafts: Iterator[_Draft] = (self._draft(position, trace) for position, trace in traces)
        for number, (stream, judging) in enumerate(self._streams, 1):
            drafts = _through(stream, judging, drafts, release=number == len(self._streams))
        for draft in drafts:
            verdicts = [draft.verdicts[each.name] for each in self.filters]
            draft.judged.verdicts.extend(verdicts)
            yield draft.position, draft.judged

    def _draft(self, position: int, trace: Trace) -> _Draft:
        candidate = Candidate(trace, self.resources)
        verdicts = {each.name: each.judge(candidate) for each in self.filters if isinstance(each, TraceFilter)}
        notes: dict[str, JsonValue] = {
            each.name: note for each in self.choosing if (note := each.note(candidate)) is not None
        }
        return _Draft(position, candidate, Judged.of(trace, [], notes), verdicts)


def _through(stream: StreamFilter, judging: Judging, drafts: Iterator[_Draft], release: bool) -> Iterator[_Draft]:
    """The drafts with the verdicts of a stream filter."""

    def candidates() -> Iterator[tuple[_Draft, Candidate]]:
        for draft in drafts:
            candidate = draft.candidate
            assert candidate is not None
            if release:
                draft.candidate = None
            yield draft, candidate

    for draft, outcome in judging(candidates()):
        draft.verdicts[stream.name] = stream.verdict_on(outcome)
        yield draft
