"""Pages and scheduling without a model: the cache is simulated as lists of tokens, so that a page copied too late,
shared too long or given to two writers shows up as a wrong token rather than as a slightly wrong number."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.engine import Request, SamplingParams
from distill.engine.cache import PageAllocator
from distill.engine.sampler import Drawn
from distill.engine.scheduler import Scheduler, SequenceState

PAGE = 4


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9)), max_size=60))
def test_reference_counts(operations: list[tuple[str, int]]) -> None:
    """Against a model that just keeps every holder's list of pages."""
    allocator, holders = PageAllocator(8, PAGE), []
    for operation, number in operations:
        if operation == "allocate" and number <= allocator.free_pages:
            holders.append(allocator.allocate(number))
        elif operation == "share" and holders:
            holders.append(allocator.share(holders[number % len(holders)]))
        elif operation == "release" and holders:
            allocator.release(holders.pop(number % len(holders)))
        held = [page for pages in holders for page in pages]
        assert allocator.refs == [held.count(page) for page in range(8)]
        assert allocator.free_pages == 8 - len(set(held))
    for pages in holders:
        allocator.release(pages)
    assert allocator.free_pages == 8 and not any(allocator.refs)


class FakeEngine:
    """Runs the scheduler's plans on pages that hold tokens, and on slots that hold all tokens that were computed into
    them, in order: one that is computed twice, or into a slot that another reads, is seen. Sample s of a request that
    may generate m stops early, at 1 + 7·(s + 1) % m tokens; token i of it is (request, sample, i)."""

    def __init__(self, num_pages: int, max_batch: int, max_step_tokens: int, slots: int = 0) -> None:
        self.allocator = PageAllocator(num_pages, PAGE)
        self.slots = PageAllocator(slots, 1) if slots else None
        self.scheduler = Scheduler(self.allocator, max_batch, max_step_tokens, states=self.slots)
        self.memory: list[list[object]] = [[None] * PAGE for _ in range(num_pages)]
        self.states: list[list[object]] = [["junk"] for _ in range(slots)]
        self.finished: list[tuple[str, int]] = []
        self.preemptions = 0
        preempt = self.scheduler._preempt

        def counted(sequence: SequenceState) -> None:
            self.preemptions += 1
            preempt(sequence)

        self.scheduler._preempt = counted  # type: ignore[method-assign]

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert len(self.scheduler.running) <= self.scheduler.max_batch
        assert sum(count for _, count in plan.prefill) <= self.scheduler.max_step_tokens
        sizes = [len(s.tokens) for s in plan.decode]
        assert sizes == sorted(sizes, reverse=True)
        before = [list(page) for page in self.memory]
        for to, source in plan.copies.items():
            self.memory[to] = list(before[source])
        before = [list(state) for state in self.states]
        for to, source in plan.slot_copies.items():
            self.states[to] = list(before[source])
        for sequence, count in [*((s, 1) for s in plan.decode), *plan.prefill]:
            for position in range(sequence.computed, sequence.computed + count):
                page = sequence.pages[position // PAGE]
                assert self.allocator.refs[page] == 1, "written while shared"
                self.memory[page][position % PAGE] = sequence.tokens[position]
                self._recur(sequence, position)
            sequence.computed += count
        for sequence, _ in [*((s, 1) for s in plan.decode), *plan.prefill]:
            self._check_contents(sequence)
            if sequence.missing == 0:
                self._advance(sequence)
        held = [p for s in [*self.scheduler.running, *self.scheduler.waiting] for p in s.pages]
        assert self.allocator.refs == [held.count(page) for page in range(len(self.memory))]
        if self.slots:
            held = [slot for s in [*self.scheduler.running, *self.scheduler.waiting] for slot in s.slots]
            assert self.slots.refs == [held.count(slot) for slot in range(len(self.states))]

    def _recur(self, sequence: SequenceState, position: int) -> None:
        if self.slots is None:
            return
        assert self.slots.refs[sequence.slot] == 1, "written while shared"
        if position == 0:
            self.states[sequence.slot] = []
        self.states[sequence.slot].append(sequence.tokens[position])

    def _check_contents(self, sequence: SequenceState) -> None:
        cached = [self.memory[p][i] for p in sequence.pages for i in range(PAGE)][: sequence.computed]
        assert cached == sequence.tokens[: sequence.computed]
        if self.slots:
            assert self.states[sequence.slot] == cached

    def _advance(self, sequence: SequenceState) -> None:
        if sequence.sample is None:
            firsts = [Drawn(self._token(sequence, n, 0), 0.0) for n in sequence.request.samples]
            states = self.scheduler.fork(sequence, firsts)
        else:
            generated = len(sequence.tokens) - len(sequence.request.prompt_ids)
            sequence.append(Drawn(self._token(sequence, sequence.sample, generated), 0.0))
            states = [sequence]
        for state in states:
            assert state.sample is not None
            limit = state.request.sampling.max_new_tokens
            if len(state.logprobs) == 1 + 7 * (state.sample + 1) % limit:
                self.finished.append((state.request.id, state.sample))
                self.scheduler.remove(state)

    @staticmethod
    def _token(sequence: SequenceState, sample: int, index: int) -> int:
        return int(sequence.request.id) * 10_000 + sample * 100 + index


requests = st.lists(
    st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 5)), min_size=1, max_size=8
)  # prompt length, new tokens, samples


def request(number: int, prompt: int, new: int, samples: int) -> Request:
    ids = tuple(-number * 100 - i for i in range(prompt))
    return Request(str(number), ids, SamplingParams(max_new_tokens=new), 0, number, tuple(range(samples)))


@settings(max_examples=300)
@given(
    requests,
    st.integers(8, 20),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(0, 40),
    st.sampled_from([0, 2, 3, 7]),
)
def test_every_sample_finishes_and_every_page_returns(
    asked: list[tuple[int, int, int]], num_pages: int, max_batch: int, max_step_tokens: int, abort_at: int, slots: int
) -> None:
    """28 tokens are 7 pages, and one more may be held by a sibling: 8 pages always suffice for one sequence; so do two
    slots."""
    engine = FakeEngine(num_pages, max_batch, max_step_tokens, slots)
    wanted = {(str(n), s) for n, (_, _, samples) in enumerate(asked) for s in range(samples)}
    for number, shape in enumerate(asked):
        engine.scheduler.add(request(number, *shape))
    for step in range(5000):
        if not engine.scheduler.has_work:
            break
        if step == abort_at:
            for sequence in list(engine.scheduler.of_request("0")):
                wanted.discard(("0", sequence.sample))  # type: ignore[arg-type]
                engine.scheduler.remove(sequence)
                if sequence.sample is None:
                    wanted = {key for key in wanted if key[0] != "0"}
        engine.step()
    assert not engine.scheduler.has_work, "no end in sight"
    assert sorted(engine.finished) == sorted(wanted)
    assert engine.allocator.free_pages == num_pages and not any(engine.allocator.refs)
    assert engine.slots is None or (engine.slots.free_pages == slots and not any(engine.slots.refs))


def test_a_fork_copies_only_what_it_writes() -> None:
    """Six prompt tokens are one full page and a half: four samples share the first and copy the second three times."""
    engine = FakeEngine(32, 8, 64)
    engine.scheduler.add(request(1, 6, 8, 4))
    engine.step()
    assert engine.allocator.free_pages == 30
    plan = engine.scheduler.schedule()
    assert len(plan.copies) == 3
    assert engine.allocator.free_pages == 27
    assert engine.preemptions == 0


def test_the_youngest_gives_way() -> None:
    engine = FakeEngine(8, 4, 64)
    for number in (1, 2, 3):
        engine.scheduler.add(request(number, 4, 14, 1))
    order = []
    while engine.scheduler.has_work:
        engine.step()
        order += engine.finished[len(order) :]
    assert engine.preemptions > 0
    assert [request_id for request_id, _ in order] == ["1", "2", "3"]
