"""Which sequences run in the next step.

Continuous batching: every step runs one token of each sequence that decodes and fills up with prefill, so that no
request waits for a batch to finish. A request starts as one *trunk*, its prompt; when the prompt is computed, the trunk
forks into its n samples, which share the prompt's pages. After that each sample is scheduled separately.

There is one kind of work: a sequence has tokens, the first `computed` of them are cached, the rest must be computed.
One missing token is a decode, more are a prefill, done in chunks under the step's token budget. A sequence that lost
its pages has all its tokens missing and is simply prefilled again.

When pages run out, the youngest holder is preempted and recomputed later, rather than every sequence reserving its
worst case on admission. Reasoning traces end far below their limit (32,768 allowed, a few thousand used), so
reservations would leave most of the cache empty; and since draws are keyed by position, a recomputed sequence
continues with the same text. Work is strictly in order of age (request, then sample): a holder is preempted for older
ones only, so the oldest always advances, and `add` refuses what could never fit alone. A new sequence is admitted
only if its pages leave one page for each running one, which keeps preemption rare.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from distill.engine.alternatives import Alternatives
from distill.engine.cache import PageAllocator
from distill.engine.options import SamplingParams
from distill.engine.sampler import Drawn, stream_key


@dataclass(frozen=True)
class Request:
    """A prompt and the samples wanted of it.

    prompt_key: any unsigned 64-bit number that identifies the prompt for the random draws, so that the text of a sample
    does not depend on the request's id or on the batch. samples: the sample numbers to draw; a resume names those that
    are missing. streamed: whether its tokens are reported as they are drawn (`Engine.progress`).
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    prompt_key: int
    samples: tuple[int, ...]
    streamed: bool = False


@dataclass(eq=False)
class SequenceState:
    """A trunk (`sample` None: a prompt that has not forked yet) or one sample of a request."""

    request: Request
    age: tuple[int, int]
    tokens: list[int]
    sample: int | None = None
    key: int = 0
    computed: int = 0
    room: int = 0  # tokens up to which its pages are known to suffice, none of those to be written being shared
    pages: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # of its recurrent state: one while it has pages; none without any
    hidden: Tensor | None = None  # states of the last computed positions, which the draft layer has not seen yet
    logprobs: list[float] = field(default_factory=list)
    tops: list[Alternatives] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are not cached."""
        return len(self.tokens) - self.computed

    @property
    def slot(self) -> int:
        """Where its recurrent state is; −1 in models without one."""
        return self.slots[0] if self.slots else -1

    @property
    def decodes(self) -> bool:
        """Whether the next step is one token of a sample."""
        return self.missing == 1 and self.sample is not None

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.sampling.max_new_tokens - (len(self.tokens) - len(self.request.prompt_ids))

    def alternatives(self, places: slice = slice(None)) -> Alternatives | None:
        """Those of the generated tokens at these places; None where the request wants none."""
        return None if self.request.sampling.logprobs is None else Alternatives.joined(self.tops[places])

    def forced(self, drafts: list[int]) -> int | None:
        """The token that must follow the sequence and these drafts; None where any may."""
        sampling, prompt = self.request.sampling, len(self.request.prompt_ids)
        if sampling.thinking_budget is None or len(self.tokens) + len(drafts) - prompt < sampling.thinking_budget:
            return None
        return sampling.forced([*self.tokens[prompt:], *drafts])

    def append(self, drawn: Drawn) -> None:
        """Add a drawn token."""
        self.tokens.append(drawn.token)
        self._note(drawn)

    def fill(self, at: int, drawn: Drawn) -> None:
        """Set token `at`, which was appended before it was known."""
        self.tokens[at] = drawn.token
        self._note(drawn)

    def _note(self, drawn: Drawn) -> None:
        self.logprobs.append(drawn.logprob)
        if drawn.top is not None:
            self.tops.append(drawn.top)


@dataclass
class Step:
    """Work for one step: sequences that decode, longest first; sequences that prefill, with the tokens each may do; and
    pages and slots to copy before either, destination → source."""

    decode: list[SequenceState]
    prefill: list[tuple[SequenceState, int]]
    copies: dict[int, int]
    slot_copies: dict[int, int] = field(default_factory=dict)


class Scheduler:
    """Queues, slots and pages. It never looks into a tensor. drafts: tokens proposed for a sequence at once. states:
    slots for recurrent states, at least two; None for a model without."""

    def __init__(
        self,
        pages: PageAllocator,
        max_batch: int,
        max_step_tokens: int,
        drafts: int = 0,
        states: PageAllocator | None = None,
    ) -> None:
        self._states = states
        self.pages, self.max_batch, self.max_step_tokens, self._drafts = pages, max_batch, max_step_tokens, drafts
        self.waiting: list[SequenceState] = []  # by age; forked samples here still hold their shared pages
        self.running: list[SequenceState] = []  # by age; at most max_batch
        self._next_age = 0
        self._copies: dict[int, int] = {}
        self._slot_copies: dict[int, int] = {}

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def steady(self) -> bool:
        """Whether the next step is one token of every running sequence, whatever the last step draws: no sequence can
        be admitted, preempted, or at its limit."""
        full = len(self.running) >= self.max_batch or not self.waiting
        return full and self.pages.free_pages >= len(self.running) and all(s.decodes and s.left for s in self.running)

    def add(self, request: Request) -> None:
        """Queue a request as a trunk."""
        self.waiting.append(SequenceState(request, (self._next_age, -1), list(request.prompt_ids)))
        self._next_age += 1

    def schedule(self) -> Step:
        """Admit, find a page for every next token (preempting the youngest if need be), and share out the budget."""
        self._copies, self._slot_copies = {}, {}
        for sequence in list(self.running):
            if len(sequence.tokens) > sequence.room and self._lacks_pages(sequence):
                self._make_room(sequence)
        self._admit()
        decode, prefill, budget = [], [], self.max_step_tokens
        for sequence in self.running:
            missing = len(sequence.tokens) - sequence.computed
            if missing == 1 and sequence.sample is not None:
                decode.append(sequence)
            elif budget and (missing > 1 or sequence.sample is None):
                count = min(missing, budget)
                prefill.append((sequence, count))
                budget -= count
        decode.sort(key=lambda s: -len(s.tokens))
        assert decode or prefill or not self.has_work, "work is waiting and none can run"
        return Step(decode, prefill, self._copies, self._slot_copies)

    def drafts_for(self, sequence: SequenceState) -> int:
        """How many tokens to propose for a sequence that decodes; the token after them is drawn as well."""
        return min(self._drafts, sequence.left - 1) if self._drafts and sequence.decodes else 0

    def fork(self, trunk: SequenceState, drawn: list[Drawn]) -> list[SequenceState]:
        """Replace a computed trunk by its samples, each with its first token; they share pages and wait for slots."""
        request = trunk.request
        samples = []
        for number, first in zip(request.samples, drawn, strict=True):
            state = SequenceState(
                request,
                (trunk.age[0], number),
                [*trunk.tokens],
                sample=number,
                key=stream_key(request.seed, request.prompt_key, number),
                computed=trunk.computed,
                pages=self.pages.share(trunk.pages),
                slots=self._states.share(trunk.slots) if self._states else [],
                hidden=trunk.hidden,
            )
            state.append(first)
            insort(self.waiting, state, key=_age)
            samples.append(state)
        self.remove(trunk)
        return samples

    def remove(self, sequence: SequenceState) -> None:
        """A sequence that is finished, forked or given up: its place and its pages are free again."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._drop_pages(sequence)

    def of_request(self, request_id: str) -> Iterator[SequenceState]:
        """The sequences of a request."""
        return (s for s in [*self.running, *self.waiting] if s.request.id == request_id)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            if sequence.sample is None and self._promised_slots() >= self.max_batch:
                return
            need = self._pages_needed(sequence)
            if self.running and self.pages.free_pages < need + len(self.running):
                return
            # Alone it always fits: whatever younger samples still hold is theirs to lose.
            if not self._free_up(need, sequence):
                return
            del self.waiting[0]
            insort(self.running, sequence, key=_age)
            self._take_pages(sequence)
            self._take_slot(sequence)

    def _promised_slots(self) -> int:
        """Slots taken once every running trunk has forked. More trunks would only make samples wait, holding pages."""
        return sum(1 if s.sample is not None else len(s.request.samples) for s in self.running)

    def _make_room(self, sequence: SequenceState) -> None:
        """A writable place for the sequence's last token, or its own preemption if everyone else is older."""
        if self._free_up(self._pages_needed(sequence), sequence):
            self._take_pages(sequence)
        else:
            self._preempt(sequence)

    def _next_page(self, sequence: SequenceState) -> int:
        """The page of its first write. The layer that drafts is one position behind: it needs the next token."""
        return max(sequence.computed - (self._drafts > 0), 0) // self.pages.page_size

    def _writes_shared_page(self, sequence: SequenceState) -> bool:
        page = self._next_page(sequence)
        return page < len(sequence.pages) and self.pages.is_shared(sequence.pages[page])

    def _lacks_pages(self, sequence: SequenceState) -> bool:
        """Whether a sequence with one token missing needs a page for it. If not, `room` spares it the question until
        its pages are full: a page that it alone holds is never shared again."""
        if not sequence.pages or sequence.missing != 1:
            return False
        if self._pages_needed(sequence):
            return True
        if not self._drafts:
            sequence.room = len(sequence.pages) * self.pages.page_size
        return False

    def _pages_needed(self, sequence: SequenceState) -> int:
        return self._pages_more(sequence) + self._writes_shared_page(sequence)

    def _pages_more(self, sequence: SequenceState) -> int:
        return self.pages.pages_for(len(sequence.tokens) + self.drafts_for(sequence)) - len(sequence.pages)

    def _take_pages(self, sequence: SequenceState) -> None:
        if self._writes_shared_page(sequence):
            index = self._next_page(sequence)
            (private,) = self.pages.allocate(1)
            self._copies[private] = sequence.pages[index]
            self.pages.release([sequence.pages[index]])
            sequence.pages[index] = private
        sequence.pages += self.pages.allocate(self._pages_more(sequence))

    def _lacks_slot(self, sequence: SequenceState) -> bool:
        """Whether it needs a slot and none is free. One that runs has its own, which is never shared again."""
        return self._states is not None and not self._owns_slot(sequence) and not self._states.free_pages

    def _owns_slot(self, sequence: SequenceState) -> bool:
        assert self._states is not None
        return bool(sequence.slots) and not self._states.is_shared(sequence.slot)

    def _take_slot(self, sequence: SequenceState) -> None:
        """A slot of its own, with a copy of the state that it shares with samples of the same prompt."""
        if self._states is None or self._owns_slot(sequence):
            return
        own = self._states.allocate(1)
        if sequence.slots:
            self._slot_copies[own[0]] = sequence.slot
            self._states.release(sequence.slots)
        sequence.slots = own

    def _free_up(self, count: int, sequence: SequenceState) -> bool:
        """Preempt the youngest holders, all of them younger than `sequence`, until `count` pages and a slot that it
        may need are free."""
        while self.pages.free_pages < count or self._lacks_slot(sequence):
            holders = (s for s in [*self.running, *self.waiting] if s.pages)
            youngest = max(holders, key=_age, default=sequence)
            if youngest.age <= sequence.age:
                return False
            self._preempt(youngest)
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self._drop_pages(sequence)
        sequence.computed = 0
        if sequence in self.running:
            self.running.remove(sequence)
            insort(self.waiting, sequence, key=_age)

    def _drop_pages(self, sequence: SequenceState) -> None:
        for page in sequence.pages:
            self._copies.pop(page, None)  # a copy into a released page; its next holder fills it
        self.pages.release(sequence.pages)
        if self._states is not None:
            for slot in sequence.slots:
                self._slot_copies.pop(slot, None)
            self._states.release(sequence.slots)
        sequence.pages, sequence.slots, sequence.hidden, sequence.room = [], [], None, 0


def _age(sequence: SequenceState) -> tuple[int, int]:
    return sequence.age
