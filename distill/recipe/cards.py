"""The cards of teachers, students and benchmarks."""

from collections.abc import Callable, Iterable
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from distill.engine.families import FAMILIES
from distill.recipe.sampling import SamplingSettings
from distill.recipe.sources import PromptSource
from distill.section import Section


def _among(names: Iterable[str]) -> Callable[[str], str]:
    known = list(names)

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown family {name!r}; expected one of {', '.join(known)}")
        return name

    return check


STUDENT_FAMILIES = [name for name, family in FAMILIES.items() if family.trains]
TeacherFamily = Annotated[
    str, AfterValidator(_among(FAMILIES)), WithJsonSchema({"type": "string", "enum": list(FAMILIES)})
]
StudentFamily = Annotated[
    str, AfterValidator(_among(STUDENT_FAMILIES)), WithJsonSchema({"type": "string", "enum": STUDENT_FAMILIES})
]


class TeacherCard(Section):
    """A teacher: where its weights are and what is known of it."""

    name: str
    description: str = ""
    family: TeacherFamily = Field(description="architecture: `model_type` in its config.json")
    weights: str = Field(description="hub id, or a directory relative to the card")
    revision: str | None = Field(None, description="commit on the hub")
    parameters: float = Field(description="total parameters, billions")
    active_parameters: float = Field(description="parameters a token passes through, billions")
    context: int = Field(description="longest sequence, tokens")
    license: str = Field(description="the hub's identifier, such as mit, apache-2.0 or llama3.1")
    source: str = Field("", description="where the card's figures come from")
    thinking: bool | None = Field(
        None, description="mode of the checkpoint's own chat template, where that has both; null is its default"
    )
    sampling: SamplingSettings = Field(SamplingSettings(), description="the publisher's recommendation")


class Architecture(Section):
    """The shape of a dense decoder, by the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = Field(None, description="where it is not hidden_size / num_attention_heads")
    tie_word_embeddings: bool = False


class StudentCard(Section):
    """A dense base model that is trained."""

    name: str
    description: str = ""
    family: StudentFamily = Field(description="architecture: `model_type` in its config.json")
    weights: str = Field(description="hub id, or a directory relative to the card")
    revision: str | None = Field(None, description="commit on the hub")
    parameters: float = Field(description="billions")
    context: int = Field(description="longest sequence, tokens")
    license: str = Field(description="the hub's identifier, such as mit, apache-2.0 or llama3.1")
    source: str = Field("", description="where the card's figures come from")
    architecture: Architecture | None = Field(None, description="its shape, to plan before anything is downloaded")
    chat_template: str | None = Field(
        None, description="built-in training template (`chatml`, `llama3`); null keeps the checkpoint's own"
    )


class BenchmarkCard(Section):
    """A set of problems with known answers."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="names its folder in a run")
    description: str = ""
    prompts: PromptSource
    problems: int | None = Field(
        None, ge=1, description="how many there are: a source that has another number is refused"
    )
    prompt_suffix: str = Field("", description="text added to every question that does not end with it")
    samples: int = Field(1, ge=1, description="answers per problem")
    sampling: SamplingSettings = SamplingSettings()
    published: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="model → score (pass@1, cons@64) → percent, as published"
    )
    license: str = ""
    source: str = ""
