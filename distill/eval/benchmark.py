"""A benchmark as a recipe asks for it: which problems, how many samples of each, drawn how."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from distill import catalog
from distill.artefacts import PublishedScores, Settings
from distill.backends import SamplingParams
from distill.console import counted, say
from distill.errors import UserError
from distill.fingerprint import file_hash
from distill.grading import require_grader, unreadable_golds
from distill.grading.sandbox.levels import require_level
from distill.prompts import Prompt, PromptCounts, load_prompts
from distill.prompts.rows import rows_of_file
from distill.prompts.selection import in_turns
from distill.recipe.sources import FilePrompts, GymPrompts, ProceduralPrompts

if TYPE_CHECKING:
    from distill.recipe import BenchmarkCard, Eval
    from distill.recipe.sampling import SamplingSettings
    from distill.recipe.sources import PromptSource

WORKERS, TIMEOUT = 2, 5.0  # of the processes that try to read gold answers; seconds of processor time for each
COLUMNS = {  # fields of a source that a file in its place takes over
    *("answer", "extract", "choices", "options", "labels", "answer_is", "template", "date", "since", "until", "task"),
}
ANSWERS = ("temperature", "top_p", "max_new_tokens")  # keys of `eval:` that replace the card's sampling
QUESTIONS = ("problem", "question", "prompt")  # columns in which copies of a benchmark keep their questions


@dataclass(frozen=True)
class Benchmark:
    """A card with a recipe's choices: at most `limit` problems, `samples` answers to each.

    Several sources give the problems of a limit in turns, the first of each, then the second of each: the first source
    alone would be another benchmark, such as one subject of 57. A higher limit extends a lower one, because the turns
    go on; the order is that of the sources whatever the limit.
    """

    card: "BenchmarkCard"
    samples: int
    limit: int | None
    seed: int
    sources: tuple["PromptSource", ...]
    drawn: "SamplingSettings"

    @classmethod
    def of(cls, card: "BenchmarkCard", recipe: "Eval") -> "Benchmark":
        """Apply a recipe's `eval:` to a card. Errors: UserError when no grader knows its task, or the file that the
        recipe names for it has other columns."""
        require_grader(card.task, f"benchmark {card.name}", f"leave {card.name} out")
        if card.task == "code":
            require_level(recipe.sandbox, "eval.sandbox")
        paths = recipe.sources.get(card.name)
        if paths is not None and not paths:
            raise UserError(f"eval.sources: {card.name} names no file; name one, or leave {card.name} out")
        paths = paths or ()
        files = local_sources(card, [Path(path) for path in ((paths,) if isinstance(paths, str) else paths)])
        given = {key: value for key in ANSWERS if (value := getattr(recipe, key)) is not None}
        drawn = card.sampling.model_copy(update=given)
        samples = recipe.samples or card.samples
        if samples > 1 and not drawn.temperature:
            raise UserError(
                f"benchmark {card.name}: at temperature 0 all {samples} answers to a problem are the same; set "
                "eval.samples (--samples) to 1, or a higher temperature"
            )
        return cls(card, samples, recipe.limit, recipe.seed, files or card.sources, drawn)

    @property
    def name(self) -> str:
        """The card's name, which is also the directory's."""
        return self.card.name

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are drawn, before `max_new_tokens` is reduced to what a model's context has room for."""
        return SamplingParams(**self.drawn.model_dump())

    @property
    def max_new_tokens(self) -> int:
        """Tokens of an answer at most, before they are reduced to what a model's context has room for."""
        return self.drawn.max_new_tokens

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The problems. Errors: UserError when there are none, when their number is not the card's, when a problem has
        no answer or no grader, or the source cannot be read."""
        return [prompt for _, prompt in self._labelled]

    @property
    def parts(self) -> dict[str, list[str]]:
        """Source → the ids of its problems, for a benchmark of several sources."""
        parts: dict[str, list[str]] = {}
        if len(self.sources) > 1:
            for label, prompt in self._labelled:
                parts.setdefault(label, []).append(prompt.id)
        return parts

    @cached_property
    def _counts(self) -> PromptCounts:
        """Filled by `_labelled`."""
        return PromptCounts()

    @cached_property
    def _labelled(self) -> list[tuple[str, Prompt]]:
        """The problems, each with the name of its source. One that several sources have belongs to the one that is read
        first."""
        counts = self._counts
        names = source_names(self.sources)
        labelled = [
            zip(repeat(name), load_prompts([source], counts)) for name, source in zip(names, self.sources, strict=True)
        ]
        try:
            first = islice(chain(*labelled) if self.limit is None else in_turns(labelled), self.limit)
            problems = sorted(first, key=lambda problem: names.index(problem[0]))
        except UserError as error:
            hint = f"; or read {self.name} from a file: --source {self.name}=FILE, in a recipe eval.sources"
            raise UserError(f"{error}{hint if any(source.kind == 'hub' for source in self.sources) else ''}") from error
        self._check([prompt for _, prompt in problems], counts.seen.total())
        return problems

    def _check(self, prompts: list[Prompt], total: int) -> None:
        """Raise UserError for problems that cannot be used. total: rows that were read."""
        if not prompts:
            raise UserError(f"benchmark {self.name} has no problems: check `prompts` in its card")
        for prompt in prompts:
            require_grader(prompt.task, f"a problem of benchmark {self.name}", f"leave {self.name} out")
        if unanswered := [prompt for prompt in prompts if not prompt.answer]:
            start = unanswered[0].messages[-1]["content"][:40]
            raise UserError(
                f"benchmark {self.name}: {len(unanswered):,} problems have no answer to compare with, the first is "
                f"{start!r}…; remove them from its file"
            )
        expected = self.card.problems
        if expected is not None and (self.limit is None or self.limit >= expected) and total != expected:
            raise UserError(
                f"benchmark {self.name} has {total:,} problems but its card says {expected:,}: this is another "
                f"version of the data set; name the right revision or file, or set a limit (--limit, in a recipe "
                f"eval.limit) to take some of its problems"
            )

    @property
    def notes(self) -> list[str]:
        """Lines on what is legal and may not be meant: unreadable gold answers, repetitions, unnamed functions."""
        notes = [self.unreadable_golds] if self.unreadable_golds else []
        if repeated := self._counts.repeated:
            total = self._counts.seen.total()
            notes.append(f"{self.name}: {repeated:,} of {total:,} problems repeat another; each is asked once")
        return notes + [f"{self.name}: {note}" for note in self._counts.notes_on_functions()]

    @cached_property
    def unreadable_golds(self) -> str | None:
        """A line on the gold answers that no grader can read, None where there are none."""
        golds, tried = unreadable_golds(self.prompts, WORKERS, TIMEOUT)
        if not golds:
            return None
        consequence = "an answer counts as correct only in the same spelling, else as unverifiable"
        if self.card.task == "instructions":
            consequence = "the responses to them are unverifiable"
        return (
            f"{self.name}: {len(golds):,} of {tried:,} gold answers cannot be read by a grader, such as "
            f"{golds[0][:60]!r}: {consequence}"
        )

    @property
    def sizes(self) -> list[JsonValue]:
        """How much is asked: more of it extends an evaluation."""
        turns: list[JsonValue] = ["in turns"] if self.limit is not None and len(self.sources) > 1 else []
        return [self.samples, self.limit, *(source.limit for source in self.card.sources), *turns]

    def source_identity(self) -> Settings:
        """Where the problems come from: a file that has grown or changed is another source. Errors: UserError when a
        file is missing."""
        return self._keyed(
            source.settings() | ({"content": file_hash(Path(source.path))} if isinstance(source, FilePrompts) else {})
            for source in self.sources
        )

    def described(self) -> Settings:
        """The sources with all their fields, for scores.json."""
        return self._keyed(source.model_dump(mode="json") for source in self.sources)

    @staticmethod
    def _keyed(sources: "Iterable[Mapping[str, JsonValue]]") -> Settings:
        """The fields of a single source unchanged; the fields of several sources with their index: `0.dataset`."""
        each = list(sources)
        if len(each) == 1:
            return dict(each[0])
        return {f"{place}.{key}": value for place, fields in enumerate(each) for key, value in fields.items()}

    def settings(self) -> Settings:
        """What decides the samples besides the model: dotted keys → JSON values.

        The path of a file is not part of it: samples belong to the text of a problem, and the file may move, or grow.
        """
        fields = [{key: value for key, value in source.settings().items() if key != "path"} for source in self.sources]
        if all(each == fields[0] for each in fields):  # files of one form: as many as there are, and one more later
            fields = fields[:1]
        settings = {f"prompts.{key}": value for key, value in self._keyed(fields).items()}
        settings |= {f"sampling.{key}": value for key, value in self.drawn.settings().items()}
        return settings | {"prompt_suffix": self.card.prompt_suffix, "seed": self.seed}


def source_names(sources: "Sequence[PromptSource]") -> list[str]:
    """A short name for each source, no two alike: its subset, its dataset or its file, whatever tells them apart."""
    forms = [[_names(source)[form] for source in sources] for form in range(3)]
    names = next((names for names in forms if len(set(names)) == len(names) and all(names)), None)
    return names or [f"source {number}" for number in range(len(sources))]


def _names(source: "PromptSource") -> tuple[str, str, str]:
    match source.kind:
        case "hub":
            last = source.dataset.rpartition("/")[2]
            return source.subset or "", last, f"{last}/{source.subset or ''}/{source.split}"
        case "file":
            return Path(source.path).stem, Path(source.path).name, source.path
    return source.name, source.name, f"{source.name} {source.seed}"


def benchmarks_of(recipe: "Eval") -> list[Benchmark]:
    """The benchmarks that `eval:` names, in order. Errors: UserError for an unknown or unusable benchmark, two of one
    name, and `sources` of a benchmark that is not evaluated."""
    benchmarks = [Benchmark.of(catalog.load_benchmark(name), recipe) for name in dict.fromkeys(recipe.benchmarks)]
    names = [benchmark.name for benchmark in benchmarks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"eval.benchmarks: two cards have the name {twice[0]}; rename one, because their samples would share a "
            f"directory"
        )
    if unknown := sorted(recipe.sources.keys() - set(names)):
        raise UserError(
            f"eval.sources names {', '.join(unknown)}, which is not evaluated; eval.benchmarks has {', '.join(names)}"
        )
    return benchmarks


def local_sources(card: "BenchmarkCard", paths: Sequence[Path]) -> tuple[FilePrompts, ...]:
    """Files in place of the card's sources: their columns are the card's, or the names that copies usually have.

    paths: where the card has several sources, as many, in the same order, or one with the problems of all of them;
    where it has one, any number. Errors: UserError for another number, and as `_local_source`.
    """
    sources = card.sources
    if len(paths) == 1 and len(sources) > 1:
        columns = [source.model_dump(include=COLUMNS) for source in sources]
        if any(each != columns[0] for each in columns):
            raise UserError(
                f"eval.sources: the {len(sources)} sources of {card.name} have different columns; give a file for each"
            )
        sources = sources[:1]
    if len(sources) == 1:
        sources = sources * len(paths)
    if paths and len(paths) != len(sources):
        raise UserError(
            f"eval.sources: {len(paths)} files for {card.name}, which has {counted(len(sources), 'source')}; give a "
            f"file for each, in the same order, or one with all problems"
        )
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1} if len(card.sources) == 1 else ()):
        raise UserError(f"eval.sources: {card.name} has {twice[0]} twice; name each file once")
    files = [_local_source(card.name, source, path) for source, path in zip(sources, paths, strict=bool(paths))]
    count = sum(rows for _, rows in files)
    windowed = any(source.date and (source.since or source.until) for source, _ in files)
    if files and not windowed and card.problems not in (None, count):
        where = ", ".join(map(str, paths))
        say(f"note: {where} has {count:,} rows, {card.name} has {card.problems:,} problems: is it the right file?")
    return tuple(source for source, _ in files)


def _local_source(name: str, source: "PromptSource", path: Path) -> tuple[FilePrompts, int]:
    """The file in place of a source, and its number of rows.

    Errors: UserError when the file cannot be read, is empty, or has no column with the questions.
    """
    if isinstance(source, ProceduralPrompts | GymPrompts):
        raise UserError(f"eval.sources: the problems of {name} are generated, not read from a file; remove its entry")
    rows = rows_of_file(path)
    where, row = next(rows, (str(path), None))
    if row is None:
        raise UserError(f"{path}: no rows; give a file with at least one problem")
    count = 1 + sum(1 for _ in rows)
    question = next((column for column in (source.question, *QUESTIONS) if column in row), None)
    if question is None:
        raise UserError(f"{where}: no column {source.question} with the question; the columns are {', '.join(row)}")
    columns = source.model_dump(include=COLUMNS)
    return FilePrompts(kind="file", path=str(path), question=question, **columns), count


def published_scores(benchmarks: list[Benchmark], model: str | None) -> list[PublishedScores]:
    """The scores that the cards give for `model`, as shares. Errors: UserError when no card knows it."""
    if model is None:
        return []
    published = [
        PublishedScores(
            benchmark=benchmark.name,
            model=model,
            scores={name: value / 100 for name, value in benchmark.card.published[model].items()},
            problems=benchmark.card.problems,
        )
        for benchmark in benchmarks
        if model in benchmark.card.published
    ]
    if not published:
        known = sorted({name for benchmark in benchmarks for name in benchmark.card.published})
        raise UserError(
            f"eval.published: no benchmark card has scores of {model}; the cards have {', '.join(known) or 'none'}"
        )
    return published
