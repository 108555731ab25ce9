"""What a recipe may say: pydantic models, unknown keys refused, defaults written out.

Every field carries one line of description (the JSON schema that editors use is made from it). A field marked `Free` is
a count or a means: it may change between two runs of the same run directory. Everything else is part of its stage's
fingerprint (`distill.run`), and changing it on a finished stage is refused.

How YAML and `--set` overrides become these models, and how mistakes are reported, is `distill.config`.
"""

import json
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import Field, model_validator

from distill.recipe.adapters import Adapter, Lora, Qlora
from distill.recipe.cards import Architecture, BenchmarkCard, StudentCard, TeacherCard
from distill.recipe.evaluate import Eval
from distill.recipe.filter import Filter
from distill.recipe.generate import Budget, Generate, LocalEngine
from distill.recipe.judge import Judge
from distill.recipe.price import Price
from distill.recipe.sampling import SamplingSettings
from distill.recipe.server import AnyServer, LaunchedServer, TeacherServer
from distill.recipe.sources import PromptSource, RunTraces, TraceSource
from distill.recipe.train import Phase, Train, Training
from distill.section import Free, Section

__all__ = [
    "Adapter",
    "Architecture",
    "BenchmarkCard",
    "Budget",
    "Eval",
    "Filter",
    "Generate",
    "Judge",
    "LaunchedServer",
    "LocalEngine",
    "Lora",
    "Phase",
    "Price",
    "Qlora",
    "Recipe",
    "SamplingSettings",
    "StudentCard",
    "TeacherCard",
    "TeacherServer",
    "Train",
    "Training",
    "recipe_schema",
]


class Recipe(Section):
    """One teacher–student pair and the four stages between them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="names the run directory")
    description: Annotated[str, Free] = Field("", description="one line for `distill recipes list`")
    teacher: str = Field(description="name of a teacher card, or the path of a card, a model or a run (its student)")
    teacher_template: Annotated[str | None, Free] = Field(  # its text is a setting, as of train.chat_template
        None, description="chat template that replaces the one of a teacher on this machine: a built-in name or a file"
    )
    student: str = Field(description="name of a student card, or the path of a card, a model or a run (its student)")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="seed of the teacher's sampling")
    price_per_hour: Annotated[float | None, Free] = Field(
        None, ge=0, description="price of an hour of the machine; the report then has the cost of each stage"
    )
    prompts: tuple[PromptSource, ...] = Field((), description="where the problems come from")
    traces: tuple[TraceSource, ...] = Field((), description="published traces, instead of asking the teacher")
    engine: LocalEngine = LocalEngine()
    server: AnyServer | None = Field(
        None, description="server that has the teacher, in place of the card's; null: the card's, else the local engine"
    )
    generate: Generate = Generate()
    judge: Judge | None = Field(None, description="model that grades prompts of task judge, and serves filter.judge")
    filter: Filter = Filter()
    train: Train = Train()
    eval: Eval

    @model_validator(mode="after")
    def traces_come_from_somewhere(self) -> "Recipe":
        """Errors: ValueError for a recipe with both prompts and traces, or neither."""
        if bool(self.prompts) == bool(self.traces):
            raise ValueError(
                "one of `prompts` (which the teacher answers) and `traces` (which others have published) is needed, "
                "and not both"
            )
        return self

    @model_validator(mode="after")
    def judge_filter_has_a_judge(self) -> "Recipe":
        """Errors: ValueError for a filter that asks a judge where the recipe has none."""
        if self.filter.judge is not None and self.judge is None:
            raise ValueError("filter.judge needs `judge:`, the model that is asked")
        return self

    @model_validator(mode="after")
    def own_answers_have_prompts(self) -> "Recipe":
        """Errors: ValueError for a training that samples answers of the student where the recipe has no prompts."""
        if self.traces and (samplers := [each for each in self.train.trainings if each.samples_prompts]):
            what = "data of kind own" if samplers[0].own else f"objective {samplers[0].objective.kind}"
            raise ValueError(
                f"train: {what} samples answers to `prompts`, which a recipe with `traces` does not have; name the "
                f"prompts, and put the published traces into the `data` of a phase"
            )
        return self

    @property
    def reads_traces(self) -> bool:
        """Whether anything is trained on the traces that the run kept; if not, nothing needs to generate or filter."""
        return any(training.reads_kept for training in self.train.trainings)

    def generate_settings(self) -> dict[str, Any]:
        """What decides the traces, beside the teacher and how it computes."""
        if self.traces:
            return {key: value for i, source in enumerate(self.traces) for key, value in _keyed(f"traces.{i}", source)}
        settings = self.generate.settings() | {"seed": self.seed}
        for i, source in enumerate(self.prompts):
            settings |= {f"prompts.{i}.{key}": value for key, value in source.settings().items()}
        return settings

    def engine_settings(self) -> dict[str, Any]:
        """What decides the numbers that the local engine computes."""
        return {f"engine.{key}": value for key, value in self.engine.settings().items()}

    def filter_settings(self, tasks: Collection[str] | None = None) -> dict[str, Any]:
        """What decides the verdicts, beside the traces. `judge.…` is the filter, `judge_model.…` the recipe's judge.

        tasks: those of the traces; None: those that the recipe names.
        """
        settings = self.filter.settings() | ({"seed": self.seed} if self.filter.draws else {})
        if self.filter.measures_student:
            settings["student"] = self.student
        if self.filter.decontaminate and not self.filter.decontaminate.benchmarks:
            settings["decontaminate.benchmarks"] = list(self.eval.benchmarks)
        if self.judge is not None and self.filters_ask_the_judge(self.tasks if tasks is None else tasks):
            settings |= {f"judge_model.{key}": value for key, value in self.judge.settings().items()}
        return settings

    @property
    def tasks(self) -> set[str]:
        """The tasks that the sources name. Traces of another run, and those that `distill export` wrote, bring their
        own."""
        return {source.task or "math" for source in (*self.prompts, *self.traces) if not isinstance(source, RunTraces)}

    def filters_ask_the_judge(self, tasks: Collection[str]) -> bool:
        """Whether a filter that is on needs the judge. tasks: those of the traces."""
        return self.filter.judge is not None or self.judge_grades(tasks)

    def judge_grades(self, tasks: Collection[str]) -> bool:
        """Whether `filter.correct` needs the judge. tasks: those of the traces."""
        return self.filter.correct is not None and "judge" in tasks


def _keyed(prefix: str, section: Section) -> list[tuple[str, Any]]:
    return [(f"{prefix}.{key}", value) for key, value in section.settings().items()]


def recipe_schema() -> str:
    """The JSON schema that editors check and complete a recipe with: `recipes/recipe.schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
