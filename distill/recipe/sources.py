"""What a recipe may say about where problems come from, and where traces come from that others have made.

How they are read is `distill.prompts` and `distill.traces.published`.
"""

from typing import Annotated, Literal

from pydantic import Field

from distill.section import Free, Section


class ProceduralPrompts(Section):
    """Problems made by a generator of this package."""

    kind: Literal["procedural"]
    name: Literal["arithmetic"] = Field(description="which generator")
    split: Literal["train", "heldout"] = Field("train", description="the two splits share no problem")
    seed: int = Field(0, description="which problems of the split")
    limit: Annotated[int, Free] = Field(1000, ge=1, description="how many problems")


class _InFile(Section):
    kind: Literal["file"]
    path: str = Field(description="a .jsonl or .parquet file; relative to where the command runs")


class _OnHub(Section):
    kind: Literal["hub"]
    dataset: str = Field(description="id on the hub, or a local dataset directory")
    revision: str | None = Field(None, description="commit or tag; null takes the newest")
    subset: str | None = Field(None, description="the dataset's configuration name")
    split: str = Field("train", description="split to read")


class _Problems(Section):
    """What the columns of a row mean."""

    question: str = Field("question", description="column with the question")
    answer: str | None = Field("answer", description="column with the gold answer; null when there is none")
    choices: tuple[str, ...] = Field(
        (),
        description="columns with wrong choices: the question then lists them and the answer, in an order of its own",
    )
    date: str | None = Field(None, description="column with a date, for `since` and `until`")
    since: str | None = Field(None, description="the first day of the window, as 2024-08-01")
    until: str | None = Field(None, description="the last day of the window")
    system: str | None = Field(
        "system", description="column with a system message to send before the question, where a row has it"
    )
    task: Literal["math", "code", "choice", "chat"] = Field("math", description="decides the grader")
    limit: Annotated[int | None, Free] = Field(None, ge=1, description="read at most so many rows")


class FilePrompts(_Problems, _InFile):
    """Problems read from a JSONL or Parquet file."""


class HubPrompts(_Problems, _OnHub):
    """Problems read from a Hugging Face dataset."""

    question: str = Field("problem", description="column with the question")


PromptSource = Annotated[ProceduralPrompts | FilePrompts | HubPrompts, Field(discriminator="kind")]


class _Published(Section):
    """What the rows of somebody else's traces mean. Their layout is recognised by the columns; where there are none of
    the known ones, `question`, `reasoning` and `response` name them."""

    question: str | None = Field(None, description="column with the question, where the layout is none of the known")
    reasoning: str | None = Field(None, description="column with the reasoning, without tags")
    response: str | None = Field(None, description="column with the answer that follows it")
    answer: str | None = Field(None, description="column with the gold answer; null: `answer` where there is one")
    task: Literal["math", "code", "choice", "chat"] = Field("math", description="decides the grader")
    limit: Annotated[int | None, Free] = Field(None, ge=1, description="read at most so many rows")


class HubTraces(_Published, _OnHub):
    """Traces published as a Hugging Face dataset."""


class FileTraces(_Published, _InFile):
    """Traces in a JSONL or Parquet file."""


class RunTraces(Section):
    """Traces that another run has kept."""

    kind: Literal["run"]
    path: str = Field(description="its run directory")


TraceSource = Annotated[HubTraces | FileTraces | RunTraces, Field(discriminator="kind")]


class _Mixed(Section):
    """A trace set's part in the training data."""

    weight: float = Field(1.0, gt=0, description="an epoch sees its rows so many times; 0.5: half of them, in turns")
    plain: bool = Field(False, description="rows without a think block are meant to be there")


class MixedHub(HubTraces, _Mixed):
    pass


class MixedFile(FileTraces, _Mixed):
    pass


class MixedRun(RunTraces, _Mixed):
    pass


class MixedKept(_Mixed):
    """The traces that this run has kept."""

    kind: Literal["kept"]


MixedSource = Annotated[MixedKept | MixedHub | MixedFile | MixedRun, Field(discriminator="kind")]
