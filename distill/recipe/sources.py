"""Sources in a recipe: of problems, and of traces that others have published.

How they are read is `distill.prompts` and `distill.traces.published`.
"""

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from distill.recipe.sampling import SamplingSettings
from distill.recipe.template import placeholders
from distill.section import Free, Later, Section


def _is_date(day: str) -> str:
    try:
        if date.fromisoformat(day).isoformat() == day:
            return day
    except ValueError:
        pass
    raise ValueError(f"{day!r} is not a date; write it as 2024-08-01")


Day = Annotated[str, AfterValidator(_is_date)]
Task = Literal["math", "code", "choice", "instructions", "judge", "chat"]
PublishedTask = Literal["math", "code", "choice", "instructions", "judge", "chat", "gym"]  # gym: of our own exports
QUESTION, OPTIONS = "question", "options"  # the names in a template that are not those of columns
EXTRACT_TASK = {"tests": "code", "instructions": "instructions"}  # `extract` that only one task uses


class _Weighted(Section):
    """A source's part in a mixture."""

    weight: Annotated[float | None, Later] = Field(
        None,
        gt=0,
        description="share of this source among the prompts: with a weight anywhere the sources are interleaved in "
        "proportion (1 where it is null) until the first has no more; null everywhere: read one after the other",
    )


class ProceduralPrompts(_Weighted):
    """Problems made by a generator of this package."""

    kind: Literal["procedural"]
    name: Literal["arithmetic"] = Field(description="name of the generator")
    split: Literal["train", "heldout", "longer"] = Field(
        "train", description="split; no problem is in two; longer: 6 to 8 steps instead of 2 to 5"
    )
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="seed that selects the problems of the split")
    limit: Annotated[int, Free] = Field(1000, ge=1, lt=2**63, description="number of problems")

    @property
    def task(self) -> Literal["math"]:
        """Kind of problem, which selects the grader."""
        return "math"


class GymPrompts(_Weighted):
    """Problems made by a generator of reasoning-gym, scored by its own verifier (extra `gym`)."""

    kind: Literal["reasoning_gym"]
    name: str = Field(description="name of a reasoning-gym dataset, such as chain_sum")
    config: dict[str, JsonValue] = Field({}, description="keys of the dataset's own configuration, such as max_terms")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the first problem; problem i has seed + i")
    limit: Annotated[int, Free] = Field(1000, ge=1, lt=2**63, description="number of problems")

    @property
    def task(self) -> Literal["gym"]:
        """Kind of problem, which selects the grader."""
        return "gym"

    @model_validator(mode="after")
    def config_has_keys_of_its_own(self) -> "GymPrompts":
        """Refuse in `config` what the source itself sets."""
        for key, ours in (("seed", "seed"), ("size", "limit")):
            if key in self.config:
                raise ValueError(f"config.{key} is set by `{ours}` of the source; remove it from `config`")
        return self


class _InFile(Section):
    kind: Literal["file"]
    path: str = Field(
        description="a .jsonl, .json, .csv, .tsv (also .gz or .zst) or .parquet file, or a directory of save_to_disk; "
        "relative to the current directory"
    )
    split: Annotated[str | None, Later] = Field(
        None, description="name of the split, of a directory of save_to_disk that holds several"
    )


class _OnHub(Section):
    kind: Literal["hub"]
    dataset: str = Field(description="dataset id on the Hugging Face Hub, or a local dataset directory")
    revision: str | None = Field(None, description="commit, tag or branch; null: the newest commit")
    subset: str | None = Field(None, description="name of the dataset's configuration")
    split: str = Field("train", description="name of the split")

    @property
    def local(self) -> bool:
        """Whether the dataset is a directory of this machine."""
        return Path(self.dataset).is_dir()


class _Problems(_Weighted):
    """Columns of a row. `a.b` is the key b of column a."""

    question: str = Field("question", description="column with the question: text, or a list of messages or turns")
    answer: str | None = Field("answer", description="column with the gold answer; null: the problems have none")
    extract: Annotated[Literal["none", "hash", "boxed", "tests", "instructions"], Later] = Field(
        "none",
        description="what is taken out of the answer column: hash: what follows the last ####; boxed: the last "
        "\\boxed{}; tests: the test cases of a program; instructions: ids of IFEval's instructions, with their "
        "arguments in column kwargs; none: the answer as it is",
    )
    choices: tuple[str, ...] = Field(
        (),
        max_length=9,
        description="columns with wrong choices; the question then lists them and the answer in a fixed order",
    )
    options: Annotated[str | tuple[str, ...] | None, Later] = Field(
        None,
        description="column with a list of all options, or the columns with one each; the question then lists them, "
        "and the answer column has the letter, the index from 0 or the text of the right one",
    )
    labels: Annotated[str | None, Later] = Field(
        None, description="column with the labels of `options`, one of which the answer column has"
    )
    answer_is: Annotated[Literal["letter", "index", "text"] | None, Later] = Field(
        None,
        description="what the answer column has of the right one of `options`: its letter, its index from 0, or its "
        "text; null: recognised, and refused where it may be several",
    )
    template: Annotated[str | None, Later] = Field(
        None,
        description="text that is asked: {{question}} is the question, {{options}} the lettered options, and any other "
        "{{name}} the text of that column, a list of texts a line each; null: the question, and the options below it",
    )
    date: str | None = Field(None, description="column with the date of a problem, for `since` and `until`")
    since: Day | None = Field(None, description="first day of the window, such as 2024-08-01")
    until: Day | None = Field(None, description="last day of the window")
    system: str | None = Field(
        "system", description="column with a system message, sent before the question in the rows that have one"
    )
    task: Task = Field("math", description="kind of problem, which selects the grader")
    shuffle_seed: Annotated[int | None, Later] = Field(
        None, description="seed of the order in which rows are taken, and so of a subsample by `limit`; null: in order"
    )
    limit: Annotated[int | None, Free] = Field(None, ge=1, lt=2**63, description="maximum number of rows to read")

    @model_validator(mode="after")
    def extract_fits_the_task(self) -> "_Problems":
        """Refuse an `extract` that the task has no use for."""
        if self.extract != "none" and self.answer is None:
            raise ValueError(f"extract: {self.extract} needs a column to read; set `answer`")
        only = EXTRACT_TASK.get(self.extract)
        if self.extract != "none" and (self.task != only if only else self.task in EXTRACT_TASK.values()):
            needed = only or "math, choice, judge or chat"
            raise ValueError(f"extract: {self.extract} is for task {needed}, and the task is {self.task}")
        if self.task == "instructions" and self.extract != "instructions":
            raise ValueError("task instructions needs extract: instructions")
        return self

    @model_validator(mode="after")
    def window_has_a_date(self) -> "_Problems":
        """Refuse a window without the column that it is about, and an empty one."""
        if self.date is None and (self.since or self.until):
            raise ValueError(
                f"{'since' if self.since else 'until'} needs `date`, the column with the date of a problem"
            )
        if self.since and self.until and self.since > self.until:
            raise ValueError(f"since is {self.since}, after until, {self.until}: no problem is in this window")
        return self

    @model_validator(mode="after")
    def options_can_be_asked(self) -> "_Problems":
        """Refuse options without an answer, and a template that leaves out the question or the options."""
        if self.options is not None and (self.choices or self.answer is None or self.task != "choice"):
            raise ValueError("options needs task: choice and a column `answer`, and excludes `choices`")
        if self.labels is not None and self.options is None:
            raise ValueError("labels needs `options`, whose labels they are")
        if self.answer_is is not None and (self.options is None or self.labels is not None):
            raise ValueError("answer_is needs `options`, and excludes `labels`, one of which the answer column has")
        if self.template is not None:
            names = placeholders(self.template)
            if QUESTION not in names:
                raise ValueError("template has no {{question}}: all problems would be the same")
            if (OPTIONS in names) != (self.options is not None):
                raise ValueError("template needs {{options}} where `options` is set, and only there")
        return self


class FilePrompts(_Problems, _InFile):
    """Problems in a file."""


class HubPrompts(_Problems, _OnHub):
    """Problems in a Hugging Face dataset."""

    question: str = Field("problem", description="column with the question: text, or a list of messages or turns")
    files: Annotated[tuple[str, ...], Later] = Field(
        (),
        description="files of the dataset's repository that are read, in order, as those of kind `file`: for a dataset "
        "that a Python script would load; they have no split",
    )

    @model_validator(mode="after")
    def files_have_no_parts(self) -> "HubPrompts":
        """Refuse what selects among the parts of a dataset where files are named."""
        if self.files and (self.subset is not None or self.split != "train"):
            raise ValueError("files excludes `subset` and `split`: the rows of all named files are read; remove them")
        return self


PromptSource = Annotated[ProceduralPrompts | GymPrompts | FilePrompts | HubPrompts, Field(discriminator="kind")]


class _Published(Section):
    """Columns of published traces. The layout is recognised by its columns; `question`, `reasoning` and `response` name
    the columns of a dataset in no known layout."""

    question: str | None = Field(None, description="column with the question, for rows in no known layout")
    reasoning: str | None = Field(None, description="column with the reasoning, without tags")
    response: str | None = Field(None, description="column with the answer that follows the reasoning")
    answer: str | None = Field(
        None,
        description="column with the gold answer; null: `answer` and the like, if present; for task code the tests, "
        "for task instructions the ids of IFEval's instructions",
    )
    extract: Annotated[Literal["none", "hash", "boxed"], Later] = Field(
        "none",
        description="what is taken out of the answer column: hash: what follows the last ####; boxed: the last "
        "\\boxed{}; none: the answer as it is",
    )
    task: PublishedTask | None = Field(
        None,
        description="kind of problem, which selects the grader; null: math, and in rows that `distill export` wrote "
        "their own, but for code and gym, whose graders run what the file contains",
    )
    limit: Annotated[int | None, Free] = Field(None, ge=1, lt=2**63, description="maximum number of rows to read")

    @model_validator(mode="after")
    def extract_has_a_column(self) -> "_Published":
        """Refuse an `extract` without a column, or of a task whose gold is no answer in text."""
        if self.extract != "none" and (self.answer is None or self.task in EXTRACT_TASK.values()):
            raise ValueError(f"extract: {self.extract} needs `answer`, and task math, choice, judge or chat")
        return self

    def settings(self) -> dict[str, JsonValue]:
        """As the base; without a task `math`, as runs recorded it that began when that was the default."""
        return super().settings() | {"task": self.task or "math"}


class HubTraces(_Published, _OnHub):
    """Traces published as a Hugging Face dataset."""


class FileTraces(_Published, _InFile):
    """Traces in a file."""


class RunTraces(Section):
    """Traces that another run kept."""

    kind: Literal["run"]
    path: str = Field(description="run directory")


TraceSource = Annotated[HubTraces | FileTraces | RunTraces, Field(discriminator="kind")]


class _Mixed(Section):
    """A trace set's part in the training data."""

    weight: float = Field(
        1.0, gt=0, description="how often an epoch repeats each row; 0.5: half of the rows, alternating between epochs"
    )
    plain: bool = Field(False, description="whether rows without a think block are intended")
    wrap: Annotated[bool, Later] = Field(
        False,
        description="whether rows without a think block get one: the text before the paragraph of the last \\boxed{} "
        "(in the first paragraph: before its line) is their reasoning; rows without such a text are dropped",
    )

    @model_validator(mode="after")
    def plain_or_wrapped(self) -> "_Mixed":
        """Refuse both ways of training on traces without a think block."""
        if self.plain and self.wrap:
            raise ValueError("plain and wrap exclude each other: keep plain to train without a think block")
        return self


class MixedHub(HubTraces, _Mixed):
    """Published traces of a Hugging Face dataset, as part of the training data."""


class MixedFile(FileTraces, _Mixed):
    """Traces of a file, as part of the training data."""


class MixedRun(RunTraces, _Mixed):
    """Traces that another run kept, as part of the training data."""


class MixedKept(_Mixed):
    """The traces that this run kept."""

    kind: Literal["kept"]


class MixedOwn(_Mixed):
    """Rejection sampling: the base of the phase answers the recipe's prompts, and the recipe's filters keep the answers
    that are trained on."""

    kind: Literal["own"]
    samples: int = Field(4, ge=1, description="answers per prompt")
    sampling: SamplingSettings | None = Field(
        None, description="how they are sampled; null: as `generate.sampling` says"
    )


MixedSource = Annotated[MixedKept | MixedOwn | MixedHub | MixedFile | MixedRun, Field(discriminator="kind")]
