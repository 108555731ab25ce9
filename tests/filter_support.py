"""What the tests of filters share: traces, recipes, and filters asked as the pipeline asks them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distill.artefacts import FilterSummary
from distill.chat import split_reasoning
from distill.filters.base import (
    Candidate,
    ChoosingFilter,
    CorpusFilter,
    GroupFilter,
    PromptGroup,
    Resources,
)
from distill.filters.judged import Judged
from distill.filters.overlap import Item
from distill.filters.pipeline import STAGE
from distill.filters.table import JudgedTable, Survivors
from distill.prompts.prompt import Prompt
from distill.recipe import Recipe
from distill.recipe.filter import Filter
from distill.run import Run
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace, Verdict

GOOD = "<think>\n20 + 22 = 42\n</think>\nThe answer is \\boxed{42}."


def make_trace(text: str = GOOD, question: str = "20 + 22?", sample: int = 0, tokens: int = 0, **more: Any) -> Trace:
    reasoning, response = split_reasoning(text)
    prompt = more.pop("prompt", Prompt.from_question(question, "42"))
    trace = Trace(prompt, sample, 0, text, reasoning, response, "stop", "t", completion_token_ids=tuple(range(tokens)))
    return replace(trace, **more)


def make_recipe(table: Filter | None = None, **settings: Any) -> Recipe:
    names = {"name": "r", "teacher": "t", "student": "s", "eval": {"benchmarks": ["tiny-arithmetic"]}}
    prompts = settings.pop("prompts", [{"kind": "procedural", "name": "arithmetic"}])
    recipe = Recipe.model_validate(names | {"prompts": prompts, "filter": settings})
    return recipe if table is None else recipe.model_copy(update={"filter": table})


def add(directory: Path, traces: Iterable[Trace]) -> None:
    (directory / "traces").mkdir(parents=True, exist_ok=True)
    with TraceStore(directory / "traces") as store:
        store.append(traces)


def run_filter(
    directory: Path, traces: Iterable[Trace] = (), fresh: bool = False, table: Filter | None = None, **settings: Any
) -> FilterSummary:
    with Run(directory, make_recipe(table, **settings)) as run:
        add(directory, traces)
        if fresh:
            run.fresh([STAGE])
        return STAGE.perform(run)


def samples(directory: Path, which: str = "kept") -> dict[int, dict[str, str]]:
    """Sample number → filter → reason."""
    return {t.sample: {v.filter: v.reason for v in found} for t, found in read_traces(directory / "filtered" / which)}


class ExampleResources(Resources):
    """What the examples need: a student whose tokens are characters, benchmarks that are their only problem."""

    def student_tokens(self, text: str) -> int:
        return len(text)

    def benchmark_items(self, benchmarks: Sequence[str]) -> list[Item]:
        return [Item(f"benchmark/{number}", question) for number, question in enumerate(benchmarks)]


def choose(choosing: ChoosingFilter, traces: list[Trace], earlier: Any = (), seed: int = 0) -> dict[Any, Verdict]:
    """The verdicts of a filter on traces, each with the verdicts that it got before, as the pipeline asks for them."""
    resources = Resources(seed)
    said = {trace.key: list(earlier[i]) if earlier else [] for i, trace in enumerate(traces)}
    judged = [
        Judged.of(trace, said[trace.key], {choosing.name: choosing.note(Candidate(trace, resources))})
        for trace in sorted(traces, key=lambda trace: trace.key)
    ]
    if isinstance(choosing, GroupFilter):
        verdicts = {}
        for _, group in groupby(judged, lambda trace: trace.key[0]):
            members = PromptGroup(list(group))
            chosen = choosing.judge_group(members, resources)
            verdicts |= dict(zip([trace.key for trace in members.survivors], chosen, strict=True))
        return verdicts
    assert isinstance(choosing, CorpusFilter)
    with TemporaryDirectory() as scratch, JudgedTable(Path(scratch) / "table") as table:
        for position, trace in enumerate(judged):
            table.add(position, trace)
        table.arrange()
        (Path(scratch) / "files").mkdir()
        return dict(choosing.judge_corpus(Survivors(table, Path(scratch) / "files"), resources))
