"""Sources in a recipe: of problems, and of traces that others have published.

How they are read is `distill.prompts` and `distill.traces.published`.
"""

from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from distill.section import Free, Section


def _is_date(day: str) -> str:
    try:
        if date.fromisoformat(day).isoformat() == day:
            return day
    except ValueError:
        pass
    raise ValueError(f"{day!r} is not a date; write it as 2024-08-01")


Day = Annotated[str, AfterValidator(_is_date)]
Task = Literal["math", "code", "choice", "chat"]


class ProceduralPrompts(Section):
    """Problems made by a generator of this package."""

    kind: Literal["procedural"]
    name: Literal["arithmetic"] = Field(description="name of the generator")
    split: Literal["train", "heldout"] = Field("train", description="split; no problem is in both")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="seed that selects the problems of the split")
    limit: Annotated[int, Free] = Field(1000, ge=1, description="number of problems")


class _InFile(Section):
    kind: Literal["file"]
    path: str = Field(description="a .jsonl or .parquet file, relative to the current directory")


class _OnHub(Section):
    kind: Literal["hub"]
    dataset: str = Field(description="dataset id on the Hugging Face Hub, or a local dataset directory")
    revision: str | None = Field(None, description="commit, tag or branch; null: the newest commit")
    subset: str | None = Field(None, description="name of the dataset's configuration")
    split: str = Field("train", description="name of the split")


class _Problems(Section):
    """Columns of a row. `a.b` is the key b of column a."""

    question: str = Field("question", description="column with the question: text, or a list of messages")
    answer: str | None = Field("answer", description="column with the gold answer; null: the problems have none")
    choices: tuple[str, ...] = Field(
        (), description="columns with wrong choices; the question then lists them and the answer in a fixed order"
    )
    date: str | None = Field(None, description="column with the date of a problem, for `since` and `until`")
    since: Day | None = Field(None, description="first day of the window, such as 2024-08-01")
    until: Day | None = Field(None, description="last day of the window")
    system: str | None = Field(
        "system", description="column with a system message, sent before the question in the rows that have one"
    )
    task: Task = Field("math", description="kind of problem, which selects the grader")
    limit: Annotated[int | None, Free] = Field(None, ge=1, description="maximum number of rows to read")


class FilePrompts(_Problems, _InFile):
    """Problems in a JSONL or Parquet file."""


class HubPrompts(_Problems, _OnHub):
    """Problems in a Hugging Face dataset."""

    question: str = Field("problem", description="column with the question: text, or a list of messages")


PromptSource = Annotated[ProceduralPrompts | FilePrompts | HubPrompts, Field(discriminator="kind")]


class _Published(Section):
    """Columns of published traces. The layout is recognised by its columns; `question`, `reasoning` and `response` name
    the columns of a dataset in no known layout."""

    question: str | None = Field(None, description="column with the question, for rows in no known layout")
    reasoning: str | None = Field(None, description="column with the reasoning, without tags")
    response: str | None = Field(None, description="column with the answer that follows the reasoning")
    answer: str | None = Field(None, description="column with the gold answer; null: `answer` and the like, if present")
    task: Task = Field("math", description="kind of problem, which selects the grader")
    limit: Annotated[int | None, Free] = Field(None, ge=1, description="maximum number of rows to read")


class HubTraces(_Published, _OnHub):
    """Traces published as a Hugging Face dataset."""


class FileTraces(_Published, _InFile):
    """Traces in a JSONL or Parquet file."""


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


class MixedHub(HubTraces, _Mixed):
    """Published traces of a Hugging Face dataset, as part of the training data."""


class MixedFile(FileTraces, _Mixed):
    """Traces of a file, as part of the training data."""


class MixedRun(RunTraces, _Mixed):
    """Traces that another run kept, as part of the training data."""


class MixedKept(_Mixed):
    """The traces that this run kept."""

    kind: Literal["kept"]


MixedSource = Annotated[MixedKept | MixedHub | MixedFile | MixedRun, Field(discriminator="kind")]
