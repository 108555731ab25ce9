"""What a run adds to the resources of its filters. The recipe imports the filters, so only this room knows it."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

from distill import catalog
from distill.artefacts import Settings
from distill.chat import Chat
from distill.errors import UserError
from distill.filters.base import Resources
from distill.filters.overlap import Item
from distill.fingerprint import digest, file_hash
from distill.grading.grade import AnswerJudge
from distill.grading.identity import graders_identity, versioned
from distill.grading.judge import InRounds, JudgeModel
from distill.grading.judged import JUDGE
from distill.models import Models, judge_of
from distill.prompts import load_prompts
from distill.prompts.columns import listed
from distill.prompts.rows import rows_of_file
from distill.recipe import Recipe
from distill.recipe.sources import FilePrompts, HubPrompts, PromptSource

QUESTIONS = ("question", "problem", "prompt", "text")  # columns in which files of problems keep their questions


class RunResources(Resources):
    """The resources of the filters of a recipe. Made anew in every process that judges, from the recipe alone.

    judgements: the directory in which a judge's answers are kept; None keeps none. tasks: those of the traces; None:
    those that the recipe names.
    """

    def __init__(self, recipe: Recipe, judgements: Path | None = None, tasks: Iterable[str] | None = None) -> None:
        super().__init__(recipe.seed, recipe.tasks if tasks is None else tasks)
        self.recipe = recipe
        self._judgements = judgements

    def judge(self) -> AbstractContextManager[AnswerJudge | None]:
        """The judge of the recipe; see the base. Errors: UserError when its card or directory cannot be used."""
        if not self.recipe.filters_ask_the_judge(self.tasks):
            return nullcontext()
        several = self.recipe.filter.judge is not None and self.recipe.judge_grades(self.tasks)
        return InRounds(self._judge) if several else self._judge

    @cached_property
    def _judge(self) -> JudgeModel:
        settings = self.recipe.judge
        assert settings is not None, "a recipe whose filters ask a judge has one"
        return JudgeModel(settings, judge_of(settings), self.recipe.engine, self._judgements, "filter")

    @cached_property
    def _chat(self) -> Chat:
        template = Models(self.recipe, Path()).training_template
        return Chat.load(catalog.resolve_tokenizer(self.recipe.student, "student"), template)

    def student_tokens(self, text: str) -> int:
        """The number of tokens of a text by the student's tokenizer. Errors: UserError when it cannot be loaded."""
        encodable = text.encode(errors="replace").decode()  # a lone surrogate is a character that no tokenizer knows
        return len(self._chat.text_ids(encodable))

    def benchmark_items(self, benchmarks: Sequence[str]) -> list[Item]:
        """The problems of benchmarks, of which each is a card or a file; of none, those of the recipe's evaluation.

        Errors: UserError when one cannot be read.
        """
        return [item for name in self._names(benchmarks) for item in self._items(name)]

    def benchmarks_identity(self) -> Settings:
        """What the benchmarks of `decontaminate` hold, by name. A file is known by its content, a dataset of the
        Hugging Face Hub by its name and revision. Reads no problem. Errors: UserError when a file is missing."""
        decontaminate = self.recipe.filter.decontaminate
        names = self._names(decontaminate.benchmarks) if decontaminate is not None else ()
        return {f"decontaminate.content.{name}": self._content(name) for name in names}

    def benchmarks_digest(self) -> str:
        """16 hex digits over the problems that `decontaminate` compares with. Errors: UserError when one cannot be
        read."""
        decontaminate = self.recipe.filter.decontaminate
        return digest(self.benchmark_items(decontaminate.benchmarks) if decontaminate is not None else [])

    def _names(self, benchmarks: Sequence[str]) -> Sequence[str]:
        names = benchmarks or self.recipe.eval.benchmarks
        if not names:
            raise UserError(
                "filter.decontaminate: there is no benchmark to compare with; name some in "
                "filter.decontaminate.benchmarks, or set filter.decontaminate to false"
            )
        return names

    def _items(self, name: str) -> Iterator[Item]:
        with _reading(name):
            sources = [_file_of(Path(name))] if catalog.is_problem_file(name) else self._sources(name)
            for number, prompt in enumerate(load_prompts(sources)):
                yield Item(f"{Path(name).stem}/{number}", prompt.messages[-1]["content"])

    def _content(self, name: str) -> str:
        with _reading(name):
            if catalog.is_problem_file(name):
                return _hash_of(Path(name))
            sources = [source.settings() | _content_of(source) for source in self._sources(name)]
        return digest([{key: value for key, value in source.items() if key != "path"} for source in sources])

    def _sources(self, name: str) -> Sequence[PromptSource]:
        card = catalog.load_benchmark(name)
        paths = self.recipe.eval.sources.get(card.name, ())
        columns = tuple(source.question for source in card.sources if isinstance(source, FilePrompts | HubPrompts))
        files = [_file_of(Path(path), columns) for path in ((paths,) if isinstance(paths, str) else paths)]
        return files or [_question_alone(source) for source in card.sources]


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Names the filter in front of an error, and what to do about a card that cannot be read."""
    try:
        yield
    except UserError as error:
        hint = (
            ""
            if catalog.is_problem_file(name)
            else "; or name a file with its problems in filter.decontaminate.benchmarks"
        )
        raise UserError(f"filter.decontaminate: {error}{hint}") from error


def _content_of(source: PromptSource) -> Settings:
    return {"content": _hash_of(Path(source.path))} if isinstance(source, FilePrompts) else {}


def _hash_of(path: Path) -> str:
    """16 hex digits over a file, or over all files of a saved dataset."""
    if not path.is_dir():
        return file_hash(path)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return digest({each.relative_to(path).as_posix(): file_hash(each) for each in files})


def _question_alone(source: PromptSource) -> PromptSource:
    """The source without options, templates and answers, which a copy of a question need not have."""
    if not isinstance(source, FilePrompts | HubPrompts):
        return source
    bare = {"template": None, "options": None, "labels": None, "choices": (), "answer": None, "extract": "none"}
    return source.model_copy(update={**bare, "task": "chat"})


def _file_of(path: Path, columns: Sequence[str | None] = ()) -> FilePrompts:
    """A file of problems. columns: with questions, of the benchmark that it is a copy of; before those that such files
    usually have. Errors: UserError when it cannot be read or has no column with questions."""
    where, row = next(rows_of_file(path), (str(path), None))
    if row is None:
        raise UserError(f"{path}: no rows; give a file with at least one problem")
    searched = [*dict.fromkeys((*filter(None, columns), *QUESTIONS))]
    question = next((column for column in searched if column in row), None)
    if question is None:
        raise UserError(f"{where}: no column with questions ({', '.join(searched)}); the columns are {listed(row)}")
    return FilePrompts(kind="file", path=str(path), question=question, answer=None, task="chat")


def judges_identity(recipe: Recipe, tasks: Collection[str]) -> Settings:
    """The versions of what decides stored verdicts and notes: the filters, the graders of the tasks, their packages.

    tasks: those of the traces.
    """
    filters = recipe.filter
    identity: Settings = {}
    for each in (*filters.judging_filters(), *filters.choosing_filters()):
        identity |= versioned(f"filter.{each.name}", each.version, each.packages)
    graded = set(tasks) if filters.correct is not None or filters.majority is not None else set()
    return identity | graders_identity(graded | ({JUDGE} if filters.judge is not None else set()))
