"""The cards of teachers, students and benchmarks."""

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

from distill import model_families
from distill.engine.families import FAMILIES
from distill.recipe.price import Price
from distill.recipe.sampling import SamplingSettings
from distill.recipe.server import AnyServer
from distill.recipe.sources import PromptSource
from distill.section import Section
from distill.thinking import Thinking


def _known(known: list[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in known and not model_families.in_transformers(name):
            raise ValueError(
                f"unknown family {name!r}; expected one of {', '.join(known)}, or another causal language model of "
                f"transformers"
            )
        return name

    return check


TeacherFamily = Annotated[str, AfterValidator(_known(list(FAMILIES))), WithJsonSchema({"type": "string"})]
StudentFamily = Annotated[str, AfterValidator(_known(model_families.STUDENTS)), WithJsonSchema({"type": "string"})]


class TeacherCard(Section):
    """A teacher model: its weights or its server, and published figures."""

    name: str
    description: str = ""
    family: TeacherFamily = Field(description="model architecture: `model_type` in its config.json")
    weights: str | None = Field(
        None,
        description="id on the Hugging Face Hub, or a directory or .gguf file relative to the card; null: it has a "
        "server only",
    )
    revision: str | None = Field(None, description="commit, tag or branch on the hub; null: the newest commit")
    server: AnyServer | None = Field(None, description="server that has the teacher; null: the local engine")
    price: Price | None = Field(None, description="price of the teacher at a provider; null: unknown")
    parameters: float = Field(description="total parameters, in billions")
    active_parameters: float = Field(description="parameters active for one token, in billions")
    context: int = Field(description="maximum sequence length, in tokens")
    license: str = Field(description="license identifier of the hub, such as mit, apache-2.0 or llama3.1")
    source: str = Field("", description="origin of the figures")
    thinking: Thinking | None = Field(
        None,
        description="thinking mode of a chat template that has several: true, false, or a level (`high`, `max`); "
        "null: the template's default",
    )
    sampling: SamplingSettings = Field(SamplingSettings(), description="sampling that the publisher recommends")

    @model_validator(mode="after")
    def answers_somewhere(self) -> "TeacherCard":
        """Errors: ValueError for a card with neither weights nor a server."""
        if self.weights is None and self.server is None:
            raise ValueError("one of `weights` and `server` is needed")
        return self


class Architecture(Section):
    """Shape of a dense decoder, with the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = Field(None, description="head size, if not hidden_size / num_attention_heads")
    tie_word_embeddings: bool = False
    global_head_dim: int | None = Field(None, description="head size of layers without a sliding window")
    num_global_key_value_heads: int | None = Field(None, description="key-value heads of layers without one")
    attention_k_eq_v: bool | None = Field(None, description="whether the values of these layers are their keys")
    num_kv_shared_layers: int | None = Field(None, description="last layers that attend to keys of earlier ones")
    use_double_wide_mlp: bool | None = Field(None, description="whether MLPs of these layers are twice as wide")
    hidden_size_per_layer_input: int | None = Field(None, description="width of the embeddings of each layer")
    linear_num_key_heads: int | None = Field(None, description="key heads of layers with a recurrent state")
    linear_num_value_heads: int | None = Field(None, description="value heads of layers with a recurrent state")


class StudentCard(Section):
    """A dense model that is trained."""

    name: str
    description: str = ""
    family: StudentFamily = Field(description="model architecture: `model_type` in its config.json")
    weights: str = Field(description="id on the Hugging Face Hub, or a directory or .gguf file relative to the card")
    revision: str | None = Field(None, description="commit, tag or branch on the hub; null: the newest commit")
    parameters: float = Field(description="total parameters, in billions")
    context: int = Field(description="maximum sequence length, in tokens")
    license: str = Field(description="license identifier of the hub, such as mit, apache-2.0 or llama3.1")
    source: str = Field("", description="origin of the figures")
    architecture: Architecture | None = Field(None, description="shape, for plans before anything is downloaded")
    chat_template: str | None = Field(
        None, description="training template: `chatml`, `llama3`, `gemma` or a .jinja file; null: the checkpoint's own"
    )


def _one_or_several(value: object) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


class BenchmarkCard(Section):
    """A benchmark: problems with known answers."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="name, also of its folder in a run")
    description: str = ""
    prompts: Annotated[
        Annotated[PromptSource, Tag("one")] | Annotated[tuple[PromptSource, ...], Tag("several"), Field(min_length=1)],
        Discriminator(_one_or_several),
    ] = Field(description="where the problems come from: a source, or a list of sources that are read in order")
    subsets: tuple[str, ...] = Field(
        (),
        description="configurations of the dataset in `prompts`, one of which each source reads, in place of `subset`",
    )
    problems: int | None = Field(None, ge=1, description="number of problems; a source with another number is refused")
    prompt_suffix: str = Field("", description="text appended to every question that does not end with it")
    samples: int = Field(1, ge=1, description="answers sampled per problem")
    sampling: SamplingSettings = SamplingSettings()
    published: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="published scores: model → score (pass@1, cons@64) → percent"
    )
    license: str = ""
    source: str = ""

    @property
    def sources(self) -> "tuple[PromptSource, ...]":
        """The sources of the problems, in order: `prompts`, or one for each of `subsets`."""
        if not isinstance(self.prompts, tuple):
            return tuple(self.prompts.model_copy(update={"subset": name}) for name in self.subsets) or (self.prompts,)
        return self.prompts

    @property
    def task(self) -> str:
        """Kind of problem, the same in all sources."""
        return self.sources[0].task

    @model_validator(mode="after")
    def sources_belong_together(self) -> "BenchmarkCard":
        """Errors: ValueError for subsets without a dataset, sources of several tasks, and weights, which would leave
        problems out."""
        if self.subsets and (isinstance(self.prompts, tuple) or self.prompts.kind != "hub" or self.prompts.subset):
            raise ValueError("subsets needs `prompts` to be one source of kind hub without a `subset`")
        if len(tasks := {source.task for source in self.sources}) > 1:
            raise ValueError(f"prompts has sources of several tasks ({', '.join(sorted(tasks))}); make a card of each")
        if any(source.weight is not None for source in self.sources):
            raise ValueError("prompts has a `weight`, which would leave problems out; remove it")
        return self
