"""A judge: a model that says whether an answer is right, or good, where no program can.

Its answers are requests like the teacher's: through any backend, many at a time, seeded, counted against a budget. Each
judgement is on the disk before its verdict is used, in a ledger of the run, under a hash of everything that decided it
(model, sampling, seed, and the prompt with question, gold answer and response): a killed run repeats nothing, `--fresh
filter` costs nothing, an identical answer is judged once, and another judge or another prompt never meets the old
judgements. The ledger has the judge's whole text, so that a verdict can be looked up.

Each user of a judge (the filters of a run, an evaluation) has a ledger of its own to write and reads those of the
others. Filters that work at the same time share one `JudgeModel`, and ask it in turn (`InRounds`): so one budget holds
for all of them, and the model is loaded once.

A judgement without a verdict is unverifiable, and so is a response that the judge's server refuses to judge, as its
filter of contents may: the refusal is in the evidence. Where it refuses all of the first `FIRST`, the settings are
wrong, and the work ends. A request that fails otherwise is not a verdict of any kind: the work ends with the failure
when all others are done, and the next run asks again for what is missing.

The ledger also has the tokens of each judgement, which a budget counts in later sessions, and a row without an id for a
request that failed after its answer had begun. Of a stored judgement only its place is in memory, some 200 bytes.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from distill import backends, catalog
from distill.artefacts import Settings
from distill.backends import Backend, Job, SamplingParams
from distill.backends.budget import Allowance, Spent, bound_of
from distill.backends.collect import sampled
from distill.backends.failures import Refused
from distill.console import say
from distill.errors import UserError, WorkError
from distill.fingerprint import digest
from distill.grading.grade import NO_GOLD, Grade
from distill.grading.verdicts import Words, read_verdict, scale_of
from distill.models import Server
from distill.models import judge_is_directory as is_directory
from distill.prompts.prompt import Prompt
from distill.recipe import TeacherServer
from distill.recipe.rubric import GOLD, QUESTION, RESPONSE, Rubric
from distill.recipe.template import filled
from distill.traces.ledger import Ledger, Row

if TYPE_CHECKING:
    from distill.models import Model
    from distill.recipe import Judge as JudgeSettings
    from distill.recipe import LocalEngine, Price
    from distill.traces.trace import Trace

K = TypeVar("K")

SHOWN = 300  # characters of a response and of a judgement in the evidence
FIRST = 8  # questions that are asked before all others: are they all refused, the others would be too
ROUND = 256  # answers that are judged together, where several filters ask
SETTLED = 1024  # answers that wait while requests are under way


@dataclass(frozen=True)
class Judgement:
    """What a judge wrote. finished: whether it ended by itself."""

    text: str
    finished: bool


class JudgeModel:
    """The judge of a recipe. A context manager: the model is loaded, or its server asked, at the first question. Blocks
    may be nested: the outermost one opens and closes it.

    model: of `distill.models.judge_of`. directory: of the ledgers, created at the first judgement; None stores none.
    user: name of the ledger that is written. Errors, on the first question: UserError when the model cannot be used.
    """

    def __init__(
        self,
        settings: "JudgeSettings",
        model: "Model",
        engine: "LocalEngine",
        directory: Path | None = None,
        user: str = "judge",
    ) -> None:
        self.settings, self.model, self.engine = settings, model, engine
        self.identity = judge_identity(settings, model)
        self.used = Spent()
        self._fingerprint = digest(self.identity)
        self._directory, self._user = directory, user
        self._known: dict[str, tuple[Ledger, int]] = {}  # id of a question → where its judgement is
        self._stack = ExitStack()
        self._backend: Backend | None = None
        self._ledger: Ledger | None = None
        self._asked = 0
        self._blocks = 0  # nested ones that it is in

    def __enter__(self) -> "JudgeModel":
        self._blocks += 1
        if self._blocks > 1:
            return self
        self.used = Spent()
        for path in sorted(self._directory.glob("*.jsonl")) if self._directory else ():
            ledger = Ledger(path)
            for offset, row in ledger.located_rows():
                self.used += Spent(row["prompt_tokens"], row["completion_tokens"])
                if row["judge"] == self._fingerprint and row["id"] is not None:
                    self._known[row["id"]] = ledger, offset
        return self

    def __exit__(self, *exc: object) -> None:
        self._blocks -= 1
        if self._blocks:
            return
        self._stack.close()
        self._backend = self._ledger = None
        self._known.clear()
        if self._asked:
            say(f"judge: {self.report()}")

    def report(self) -> str:
        """What the judgements took, such as `120 judgements, 60,000 + 12,000 tokens, 0.09 USD in all`."""
        price = judge_price(self.settings)
        cost = "" if price is None else f", {price.cost(self.used.prompt, self.used.completion):,.2f} {price.currency}"
        return (
            f"{self._asked:,} new judgements; with earlier ones {self.used.prompt:,} prompt and "
            f"{self.used.completion:,} completion tokens{cost}"
        )

    def grade(self, items: Iterable[tuple[K, Prompt, str]], rubric: Rubric | None = None) -> Iterator[tuple[K, Grade]]:
        """Yield (key, grade) for every (key, prompt, response), in order of completion. Lazy in `items`.

        rubric: in place of the recipe's. Errors: UserError for what the user can correct; WorkError when requests fail
        or the budget ends. What was judged before that is stored.
        """
        rubric = self.settings if rubric is None else rubric
        source = iter(items)
        waiting: dict[str, list[tuple[K, Prompt, str]]] = {}
        settled: list[tuple[K, Grade]] = []

        def questions() -> Iterator[Prompt]:
            """Prompts that are to be asked; what needs no request is settled. Ends when much is settled."""
            for item in source:
                key, prompt, response = item
                if (grade := _without_judge(rubric, prompt, response)) is not None:
                    settled.append((key, grade))
                elif (known := self._stored((question := _question(rubric, prompt, response)).id)) is not None:
                    settled.append((key, _grade(rubric, prompt, response, known)))
                elif question.id in waiting:
                    waiting[question.id].append(item)
                elif not self._fits(question):
                    settled.append((key, Grade("unverifiable", "too long to judge", _evidence(prompt, response))))
                else:
                    waiting[question.id] = [item]
                    yield question
                if len(settled) >= SETTLED or (not self._asked and len(waiting) >= FIRST):
                    return

        while True:
            asking = questions()
            first = next(asking, None)
            yield from settled
            settled.clear()
            if first is None:
                if not waiting and (item := next(source, None)) is not None:
                    source = chain([item], source)
                    continue
                return
            refusals: dict[str, str] = {}
            with closing(self._judged_or_refused(chain([first], asking), refusals)) as judged:
                for identity, judgement in judged:
                    for key, prompt, response in waiting.pop(identity):
                        yield key, _grade(rubric, prompt, response, judgement)
                    yield from settled
                    settled.clear()
            for identity, refusal in refusals.items():
                for key, prompt, response in waiting.pop(identity):
                    evidence = _evidence(prompt, response) | {"refusal": _cut(refusal)}
                    yield key, Grade("unverifiable", "refused by the judge", evidence)
            if waiting:
                raise WorkError(
                    f"the judge's budget is used up ({self.report()}): at least {len(waiting):,} responses are not "
                    f"judged, the other judgements are stored; raise judge.budget"
                )

    def _stored(self, question: str) -> Judgement | None:
        """The judgement of an earlier session."""
        if (place := self._known.get(question)) is None:
            return None
        ledger, offset = place
        row = ledger.row_at(offset)
        return Judgement(row["text"], row["finished"])

    def _judged_or_refused(
        self, questions: Iterable[Prompt], refusals: dict[str, str]
    ) -> Generator[tuple[str, Judgement], None, None]:
        """As `_judged`, and collect id of the question → reason of those that the server refuses. Errors: UserError
        where it refuses all, and has judged none before."""
        asked: dict[str, Prompt] = {}

        def remembered() -> Iterator[Prompt]:
            for question in questions:
                asked[question.id] = question
                yield question

        def judged(questions: Iterable[Prompt]) -> Iterator[tuple[str, Judgement]]:
            for identity, judgement in self._judged(questions):
                del asked[identity]
                yield identity, judgement

        try:
            yield from judged(remembered())
        except Refused as refused:
            if not self._asked and len(asked) > 1:
                raise UserError(f"the judge refuses every request: {refused}") from refused
            for question in list(asked.values()):  # alone, so that each has its own reason
                try:
                    yield from judged([question])
                except Refused as reason:
                    refusals[question.id] = str(reason)

    def _judged(self, questions: Iterable[Prompt]) -> Generator[tuple[str, Judgement], None, None]:
        """Ask; yield (id of the question, judgement), each after it is stored."""
        backend, sampling = self._opened()
        jobs = (Job(question, (0,)) for question in questions)
        allowance = self._allowance(sampling.max_new_tokens)
        traces = sampled(backend, jobs, sampling, self.settings.seed, self._fingerprint, allowance=allowance)
        with closing(traces):
            for trace in traces:
                judgement = Judgement(trace.text, trace.finish_reason in ("stop", None))
                self._asked += 1
                self._store(trace.prompt.id, judgement, _spent(trace, sampling.max_new_tokens))
                yield trace.prompt.id, judgement

    def _store(self, question: str | None, judgement: Judgement | None, spent: Spent) -> None:
        """Count and store a judgement; None: of a request that failed after its answer had begun."""
        self.used += spent
        if self._directory is None:
            return
        if self._ledger is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._ledger = self._stack.enter_context(Ledger(self._directory / f"{self._user}.jsonl"))
        row: Row = {"id": question, "judge": self._fingerprint}
        if question is not None and judgement is not None:
            self._known[question] = self._ledger, self._ledger.end
            row |= vars(judgement)
        self._ledger.append([row | {"prompt_tokens": spent.prompt, "completion_tokens": spent.completion}])

    def _opened(self) -> tuple[Backend, SamplingParams]:
        """The judge, loaded or asked for the first time, and how its tokens are drawn: at most half of its context."""
        if self._backend is None:
            self._backend = self._stack.enter_context(backends.open(self.model, self.engine, self.settings.max_batch))
        sampling = SamplingParams(**self.settings.sampling.model_dump())
        if (context := self._backend.max_context) is not None:
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context // 2))
        return self._backend, sampling

    def _fits(self, question: Prompt) -> bool:
        """Whether a question and its judgement fit the judge's context; True where a server does not say how long that
        is, or which tokenizer it has."""
        backend, sampling = self._opened()
        if backend.max_context is None or isinstance(self.model.place, Server):
            return True
        (ids,) = self.model.chat.prompts_ids([question.messages])
        return len(ids) + sampling.max_new_tokens <= backend.max_context

    def _allowance(self, limit: int) -> Allowance | None:
        if self.settings.budget is None:
            return None
        price = judge_price(self.settings)
        return Allowance(self.settings.budget, limit, self.used, 0.0, price, on_loss=self._store_loss)

    def _store_loss(self, spent: Spent) -> None:
        self._store(None, None, spent)


class InRounds:
    """A judge whose questions are asked in rounds: a grade is handed out when its whole round is judged. A context
    manager, as the judge is.

    For several filters in a row, each of which reads what the one before has judged: so no requests of two are under
    way together, which neither a budget nor a local engine could serve.
    """

    def __init__(self, judge: JudgeModel) -> None:
        self.judge = judge

    def __enter__(self) -> "InRounds":
        self.judge.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.judge.__exit__(*exc)

    def grade(self, items: Iterable[tuple[K, Prompt, str]], rubric: Rubric | None = None) -> Iterator[tuple[K, Grade]]:
        """As `JudgeModel.grade`, reading a round ahead."""
        source = iter(items)
        while together := list(islice(source, ROUND)):
            yield from list(self.judge.grade(together, rubric))


def judge_identity(settings: "JudgeSettings", model: "Model") -> Settings:
    """What decides judgements besides their prompts: the model, its sampling and the seed."""
    sampling = {f"sampling.{key}": value for key, value in settings.sampling.settings().items()}
    return {f"model.{key}": value for key, value in model.identity.items()} | sampling | {"seed": settings.seed}


def judge_price(settings: "JudgeSettings") -> "Price | None":
    """The price of the judge's tokens: at its server, else of its card; None for a judge on this machine."""
    server, card = settings.server, None
    if settings.teacher is not None and not is_directory(settings):
        card = catalog.load_teacher(settings.teacher)
        server = server or card.server
    if not isinstance(server, TeacherServer):
        return None
    return server.price or (card.price if card else None)


def check_budget(settings: "JudgeSettings") -> None:
    """Errors: UserError for a budget of money where the judge has no price."""
    if settings.budget is not None and settings.budget.cost is not None and judge_price(settings) is None:
        raise UserError("judge.budget.cost needs a price: set judge.server.price, or use judge.budget.tokens")


def _spent(trace: "Trace", limit: int) -> Spent:
    """The tokens of a judgement; a count that the server does not give is taken as its bound."""
    bound = bound_of(trace.prompt, limit)
    prompt = bound.prompt if trace.prompt_tokens is None else trace.prompt_tokens
    return Spent(prompt, bound.completion if trace.completion_tokens is None else trace.completion_tokens)


def _question(rubric: Rubric, prompt: Prompt, response: str) -> Prompt:
    texts = {QUESTION: _asked(prompt), GOLD: prompt.answer or "", RESPONSE: response.strip()}
    return Prompt.from_question(filled(rubric.prompt, texts.__getitem__), None, "chat", "judge")


def _asked(prompt: Prompt) -> str:
    """The conversation that was asked; a single message as it is."""
    if len(prompt.messages) == 1:
        return prompt.messages[0]["content"].strip()
    return "\n\n".join(f"{message['role']}: {message['content'].strip()}" for message in prompt.messages)


def _without_judge(rubric: Rubric, prompt: Prompt, response: str) -> Grade | None:
    """The grade of a response that needs no request; None where the judge is asked."""
    if not response.strip():
        return Grade("unverifiable", "no answer found", _evidence(prompt, None))
    if rubric.needs_gold and not (prompt.answer or "").strip():
        return Grade("unverifiable", NO_GOLD, _evidence(prompt, response))
    if len(response) > rubric.max_characters:
        return Grade("unverifiable", "too long to judge", _evidence(prompt, response))
    return None


def _evidence(prompt: Prompt, response: str | None) -> dict[str, object]:
    shown = None if response is None else _cut(response.strip())
    return {"extracted": shown, "gold": prompt.answer, "method": None if shown is None else "response"}


def _grade(rubric: Rubric, prompt: Prompt, response: str, judgement: Judgement) -> Grade:
    scale = scale_of(rubric.prompt, rubric.min_score)
    words = Words(rubric.accepted, rubric.rejected, rubric.min_score, scale)
    reading = read_verdict(judgement.text, words, judgement.finished)
    evidence = _evidence(prompt, response) | {"said": reading.said, "judgement": _cut(judgement.text[-SHOWN:])}
    if reading.accepted is None:
        return Grade("unverifiable", reading.problem or "no verdict", evidence)
    return Grade("correct" if reading.accepted else "wrong", "judged", evidence)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
