"""The Python API for notebooks and scripts: read a run, grade an answer, sample a model.

    from distill import Run, grade, load_recipe, open_model

Reading never writes to the run directory and never takes its lock, so a run can be read while it is being made: what is
finished is there, the rest is a `UserError` that names the command to run. Traces become a memory-mapped
`datasets.Dataset`, because those of a large run do not fit into memory; scores and the training log become pandas
data frames. Every file is compared with the hash that was recorded when it was written, and a damaged file is refused.

Making a run from Python was rejected: a stage takes hours, must survive a closed notebook, and starts processes of its
own; `!distill run RECIPE` does all of that.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, overload

from pydantic import JsonValue

from distill import catalog, model_files
from distill.artefacts import Artefact, EvalSummary, FilterSummary, GenerateSummary, RunPaths, Scores, TrainSummary
from distill.catalog import load_recipe
from distill.config import did_you_mean, parse, read_yaml
from distill.errors import UserError
from distill.models import Model, Server, teacher_of
from distill.prompts.prompt import Message, Prompt, Task, split_reasoning
from distill.recipe import LocalEngine, Recipe, SamplingSettings
from distill.record import StageRecord, read_recipe
from distill.thinking import Thinking
from distill.traces.ledger import Ledger
from distill.traces.trace import FinishReason

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from distill.backends import Backend
    from distill.backends.backend import Completed
    from distill.grading import Grade

__all__ = ["Answer", "OpenModel", "Run", "grade", "load_recipe", "open_model"]

T = TypeVar("T")

MAX_NEW_TOKENS = 32768  # at most, where the caller names no limit and the context has room
SERVER_MAX_NEW_TOKENS = 8192  # the same for a server, whose context is not known
NOT_FILTERED = "not filtered"
ROLES = ("system", "user", "assistant")  # of messages
SUMMARIES: Mapping[str, type[Artefact]] = {
    "generate": GenerateSummary,
    "filter": FilterSummary,
    "train": TrainSummary,
    "eval": EvalSummary,
}


class Run:
    """A run directory, read-only.

    path: the directory, such as `runs/tiny`. recipe: the run's recipe, every default filled in. Errors: UserError when
    it is not a run directory, or its recipe is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._paths = RunPaths(self.path)
        self._checked: set[str] = set()  # files whose content was hashed and is as recorded
        read_recipe(self.path)  # compares recipe.yaml with its checksum
        self.recipe: Recipe = parse(Recipe, read_yaml(self._paths.recipe), str(self._paths.recipe))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @overload
    def summary(self, stage: Literal["generate"]) -> GenerateSummary: ...
    @overload
    def summary(self, stage: Literal["filter"]) -> FilterSummary: ...
    @overload
    def summary(self, stage: Literal["train"]) -> TrainSummary: ...
    @overload
    def summary(self, stage: Literal["eval"]) -> EvalSummary: ...
    def summary(self, stage: str) -> Artefact:
        """Return what a finished stage reported of itself: counts, rates, losses, scores.

        stage: `generate`, `filter`, `train` or `eval`. Errors: UserError when the stage is not finished.
        """
        if stage not in SUMMARIES:
            raise UserError(f"unknown stage {stage!r}; expected one of {', '.join(SUMMARIES)}")
        record = self._finished(stage)
        try:
            return SUMMARIES[stage].model_validate_json(json.dumps(record.summary))
        except ValueError:
            path = self._paths.record(stage)
            raise UserError(f"{path} is damaged; `distill {stage} --fresh {stage}` starts the stage over") from None

    def traces(self, kept: bool | None = None) -> "Dataset":
        """Return the teacher's traces, one row a trace, memory-mapped.

        kept: True for those that training reads, False for the dropped ones, None for both (kept ones first), or for
        all unfiltered traces while the filter stage is not finished.

        Beside the stored columns (`id`, `sample`, `messages`, `reasoning`, `response`, `answer`, `finish_reason`,
        `verdicts`, …) two are derived: `tokens`, the length of the completion, None where it is not known, and
        `verdict`, which is `kept` or the first reason for dropping, such as `correct: wrong`. Errors: UserError
        when the stage that writes them is not finished, or a file is missing or damaged.
        """
        from datasets import concatenate_datasets

        folders = {True: "filtered/kept/", False: "filtered/dropped/"}
        if kept is None and self._record("filter", finished=True) is None:
            return self._dataset("generate", "traces/")
        if kept is not None:
            return self._dataset("filter", folders[kept])
        return concatenate_datasets([self._dataset("filter", folder) for folder in folders.values()])

    def scores(self) -> "pd.DataFrame":
        """Return the scores, one row for each benchmark and model.

        Columns: the fields of `distill.artefacts.Scores`; an estimate such as `pass@1` has its 95 % interval beside it
        in `pass@1_low` and `pass@1_high`. A benchmark of several sources also has `pass@1/SOURCE`, one of instructions
        `prompt_strict`, `prompt_loose`, `instruction_strict` and `instruction_loose`. Shares lie between 0 and 1,
        lengths are in tokens. Errors: UserError when the eval stage is not finished.
        """
        import pandas as pd

        return pd.DataFrame([_row(scores) for scores in self.summary("eval").scores])

    def log(self) -> "pd.DataFrame":
        """Return the training log, one row for each logged optimizer step; also of a training under way.

        Columns: `step`, `loss` (nats per supervised token), `learning_rate` and whatever else was logged. Errors:
        UserError when training has not begun, or the log is damaged.
        """
        import pandas as pd

        path = self._paths.log
        if phases := self.recipe.train.phases:
            first = self._paths.phase(0, phases[0].name)
            raise UserError(
                f"{self.path}: trained in phases, each with a log of its own, such as Run({str(first)!r}).log()"
            )
        if not path.is_file():
            raise UserError(f"{path} is missing; `distill train` with this run's recipe writes it")
        try:
            return pd.DataFrame(list(Ledger(path).rows()))  # without a last line that is being written
        except UserError:
            raise UserError(f"{path} is damaged; `distill train --verify` with this run's recipe replaces it") from None

    def _record(self, stage: str, finished: bool = False) -> StageRecord | None:
        """The record of a stage; None when it was never begun, or with `finished` when it is not finished."""
        remedy = f"`distill {stage} --fresh {stage}` with this run's recipe starts the stage over"
        record = StageRecord.read_if_there(self._paths.record(stage), remedy)
        return None if record is None or (finished and record.finished is None) else record

    def _finished(self, stage: str) -> StageRecord:
        record = self._record(stage, finished=True)
        if record is None:
            raise UserError(f"{self.path}: stage {stage} is not finished; run `distill {stage}` with this run's recipe")
        return record

    def _dataset(self, stage: str, folder: str) -> "Dataset":
        """The Parquet files that a stage wrote in a folder, each compared with its recorded hash first."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
        from datasets import Dataset, Value

        files = {name: file for name, file in self._finished(stage).files.items() if name.startswith(folder)}
        assert files, f"stage {stage} wrote no {folder}"
        for name, file in files.items():
            if name in self._checked and file.looks_unchanged(self.path / name):
                continue
            if (damage := file.damage(self.path / name)) is not None:
                raise UserError(
                    f"{self.path / name} {damage}; `distill {stage} --verify` with this run's recipe recreates it"
                )
            self._checked.add(name)
        paths = [self.path / name for name in files]
        if any(pq.read_metadata(path).num_rows for path in paths):
            dataset = Dataset.from_parquet(list(map(str, paths))).remove_columns("exact")
        else:  # a data set without rows cannot be built from files
            dataset = Dataset(pq.read_table(paths[0])).remove_columns("exact")
        counts = pc.list_value_length(dataset.data.column("completion_token_ids")).to_pylist()
        tokens = [count or counted for count, counted in zip(counts, dataset["completion_tokens"], strict=True)]
        if "verdicts" not in dataset.column_names:
            verdicts = [NOT_FILTERED] * len(dataset)
        else:
            verdicts = [_verdict(rows) for rows in dataset["verdicts"]]
        dataset = dataset.remove_columns("completion_tokens")
        dataset = dataset.add_column("tokens", tokens, feature=Value("int32"))
        return dataset.add_column("verdict", verdicts, feature=Value("string"))


def _verdict(rows: Sequence[Mapping[str, object]]) -> str:
    return next((f"{row['filter']}: {row['reason']}" for row in rows if not row["keep"]), "kept")


def _row(scores: Scores) -> dict[str, JsonValue]:
    row: dict[str, JsonValue] = {}
    for name, value in scores.to_json().items():
        if name == "instructions":  # of IFEval alone
            for level, estimate in value.items() if isinstance(value, dict) else ():
                assert isinstance(estimate, dict)
                row |= _estimate(level, estimate)
        elif not isinstance(value, dict):
            row[name] = value
        elif name == "parts":  # pass@1 by source
            for source, part in value.items():
                assert isinstance(part, dict) and isinstance(part["pass@1"], dict)
                row |= _estimate(f"pass@1/{source}", part["pass@1"])
        elif "value" in value:
            row |= _estimate(name, value)
        elif name.endswith("@k"):  # pass@k and cons@k by their k
            for k, estimate in value.items():
                assert isinstance(estimate, dict)
                row |= _estimate(f"{name[:-1]}{k}", estimate)
    return row


def _estimate(name: str, value: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}


# ---- grading


def grade(answer: str, gold: str, task: Task = "math") -> "Grade":
    """Grade an answer: correct, wrong, or unverifiable where neither can be said.

    answer: a whole completion, or the bare answer; reasoning inside `<think>` is not searched. gold: the reference
    answer, bare, boxed or after `####`. The comparison runs in a process that is killed when it takes more than five
    seconds of processor time; the verdict is then unverifiable. Errors: UserError for a task without a grader, and
    for an answer or a gold that is no text.
    """
    for name, value in (("answer", answer), ("gold", gold)):
        if not isinstance(value, str):
            raise UserError(f"grade: {name} is a {type(value).__name__}; give it as text, such as '7'")
    from distill.grading import Grader, require_grader
    from distill.grading.sandbox.levels import require_level

    require_grader(task, "grade", "choose another task")
    if task == "code":
        require_level("full", "grade")
    with Grader(workers=1) as grader:
        ((_, result),) = grader.grade([(0, Prompt.from_question("", gold, task), split_reasoning(answer)[1])])
    return result


# ---- sampling


class Call(Protocol):
    """Calls a function, perhaps in another thread, and returns its result."""

    def __call__(self, function: Callable[[], T]) -> T: ...


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    text: as sampled, with the opening `<think>` that the template prefilled. reasoning: what stands inside
    `<think>…</think>`, None without a closed block. response: what follows it. finish_reason: `stop`, or `length` when
    the token limit cut it off. tokens: length of the completion, None where the server does not say.
    """

    text: str
    reasoning: str | None
    response: str
    finish_reason: FinishReason
    tokens: int | None


class OpenModel:
    """A model that is loaded, or a server that is connected. Made by `open_model`."""

    def __init__(self, model: Model, backend: "Backend", sampling: SamplingSettings, call: Call) -> None:
        self.model, self.sampling = model, sampling
        self._backend, self._call = backend, call

    def sample(
        self,
        question: str | Sequence[Message],
        n: int = 1,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> list[Answer]:
        """Sample n answers to a question, or to a conversation of `{"role": …, "content": …}` messages.

        temperature, top_p, top_k: the card's recommendation by default, else 0.6, 0.95 and 0 (off). max_new_tokens:
        what the context has room for by default, at most 32,768; 8,192 for a server. The local engine repeats itself
        for the same seed. Errors: UserError for a question that is none, and when question and max_new_tokens exceed
        the context; WorkError when a server fails.
        """
        from distill.backends import Job, SamplingParams

        if not isinstance(n, int) or n < 1:
            raise UserError(f"sample: n is {n!r}; it is a number of answers, at least 1")
        messages = _messages(question)
        prompt = Prompt(tuple(messages), "chat")
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        given["max_new_tokens"] = self._room(messages) if max_new_tokens is None else max_new_tokens
        changes = {key: value for key, value in given.items() if value is not None}
        settings = parse(SamplingSettings, self.sampling.model_dump() | changes, "sample")
        sampling = SamplingParams(**settings.model_dump())
        jobs = [Job(prompt, tuple(range(n)))]

        def complete() -> "list[Completed]":
            self._backend.check([prompt], sampling)  # a server that Distill starts reserves the context
            return list(self._backend.complete(jobs, sampling, seed))

        completions = self._call(complete)
        answers: list[Answer] = []
        for done in sorted(completions, key=lambda done: done.sample):
            reasoning, response = done.split
            tokens = len(done.completion_token_ids) or done.completion_tokens
            answers.append(Answer(done.text, reasoning, response, done.finish_reason, tokens))
        return answers

    def _room(self, messages: Sequence[Message]) -> int:
        context = self._backend.max_context
        if context is None or isinstance(self.model.place, Server):
            return SERVER_MAX_NEW_TOKENS
        return max(1, min(MAX_NEW_TOKENS, context - len(self.model.chat.prompt_ids(messages))))


def _messages(question: object) -> list[Message]:
    """A question, or a conversation, as messages. Errors: UserError."""
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    if not isinstance(question, Sequence) or not question:
        raise UserError(
            f"sample: the question is {question!r}; give a text, or messages such as "
            '[{"role": "user", "content": "1 + 1?"}]'
        )
    messages = list[Message]()
    for number, message in enumerate(question, 1):
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        if role not in ROLES or not isinstance(content, str):
            raise UserError(
                f"sample: message {number} is {message!r:.80}; give its role ({', '.join(ROLES)}) and its content, a "
                f"text"
            )
        messages.append({"role": role, "content": content})
    return messages


@contextmanager
def open_model(
    model: str | Path,
    *,
    engine: LocalEngine | None = None,
    max_batch: int = 128,
    thinking: Thinking | None = None,
    server_model: str | None = None,
    key: str | None = None,
) -> Iterator[OpenModel]:
    """Load a model, or connect to a server, while the `with` block lasts.

    model: a teacher or student of the catalog (`tiny-r1`), the path of a teacher's card, a model directory such as
    `runs/tiny/student`, a hub id, or an OpenAI-compatible address. engine: how the local engine computes
    (`load_recipe("tiny").engine`). max_batch: answers that are sampled at once. thinking: the mode of a chat template
    that has two; the card's by default. server_model, key: for an address: the model's name there, and the API key
    (by default that of OPENAI_API_KEY). Errors: UserError when the model is unknown, incomplete or unsupported, or the
    server does not answer.
    """
    from distill import backends

    resolved, sampling = _resolved(str(model), thinking, server_model, key)
    opened = backends.open(resolved, engine or LocalEngine(), max_batch)
    with _away_from_a_running_loop() as call:
        backend = call(opened.__enter__)
        try:
            yield OpenModel(resolved, backend, sampling, call)
        finally:
            call(lambda: opened.__exit__(None, None, None))


def _resolved(
    name: str, thinking: Thinking | None, server_model: str | None, key: str | None
) -> tuple[Model, SamplingSettings]:
    if "://" in name:
        server = Server(name, server_model, key or os.environ.get("OPENAI_API_KEY"))
        return Model(server_model or "model", server), SamplingSettings()
    if name in catalog.entries("teacher") or Path(name).suffix in (".yaml", ".yml"):
        card = catalog.load_teacher(name)
        return teacher_of(card.name, name, thinking=thinking), card.sampling
    if name in catalog.entries("student"):
        student = catalog.load_student(name)
        place = catalog.resolve_weights("student", name)
        return Model(student.name, place, student.chat_template, thinking), SamplingSettings()
    if "/" not in name and not Path(name).is_dir():
        hint = did_you_mean(name, [*catalog.entries("teacher"), *catalog.entries("student")])
        raise UserError(
            f"{name}: no teacher or student has that name, and there is no such model directory{hint}; see "
            f"`distill teachers list`"
        )
    place = model_files.model_directory(name)
    return Model(place.name, place, thinking=thinking), SamplingSettings()


@contextmanager
def _away_from_a_running_loop() -> Iterator[Call]:
    """Give a function that calls another: directly, or in a thread of its own where this one runs an event loop.

    A notebook's cells run inside an event loop, and the client of a server needs one of its own.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        yield lambda function: function()
    else:
        with ThreadPoolExecutor(1) as thread:
            yield lambda function: thread.submit(function).result()
