"""`filter:` in a recipe, which is also the table of filters: every filter is a line of `Filter`, and only there.

A filter is on with its settings (`length: {min_tokens: 30}`), on with its defaults (`true`), or off (`null`, `false`),
so that each can be ablated. The order of the lines is the order of the funnel.

A profile is a set of defaults for a task. What it turns on is written out as if it stood in the recipe, and a key
beside it counts more: `filter: {profile: math, language: false}`. Rejected: defaults that follow from the task of each
prompt, under which one line of the funnel would mean different filters for different traces.
"""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, field_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from distill.filters.base import AnyFilter, ChoosingFilter, StreamFilter, TraceFilter
from distill.filters.correct import Correct
from distill.filters.decontaminate import Decontaminate
from distill.filters.dedup import Dedup
from distill.filters.finish import Finish
from distill.filters.format import Format
from distill.filters.language import Language
from distill.filters.length import Length
from distill.filters.majority import Majority
from distill.filters.model_judge import ModelJudge
from distill.filters.near_answers import NearAnswers
from distill.filters.near_prompts import NearPrompts
from distill.filters.pass_rate import PassRate
from distill.filters.repetition import Repetition
from distill.filters.select import Select
from distill.section import Free, Later, Section, with_tuples

F = TypeVar("F", bound=AnyFilter)

DESCRIPTION = "distill_description"  # in the metadata of a pydantic schema


class _OnOff:
    """Lets `true` stand for a filter with its defaults, and `false` for none."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        (kind,) = (one for one in get_args(source) if one is not type(None))
        return core_schema.no_info_before_validator_function(
            _switched, handler(source), metadata={DESCRIPTION: inspect.getdoc(kind)}
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(schema)
        forms = [*described["anyOf"], {"type": "boolean"}]
        return described | {"anyOf": forms, "description": schema.get("metadata", {})[DESCRIPTION]}


def _switched(value: object) -> object:
    if isinstance(value, bool):
        return {} if value else None
    return with_tuples(value)


Switch = Annotated[F | None, _OnOff()]
Optional = Annotated[F | None, _OnOff(), Later]  # off by default; runs that began before the filter existed go on


PROFILES: Mapping[str, Mapping[str, bool]] = {  # beside the defaults; language: a chat may be about a language
    "math": {"repetition": True, "language": True},
    "code": {"repetition": True, "language": True},
    "chat": {"repetition": True, "correct": False},
}


class Filter(Section):
    """Stage 2: which traces are kept. Each filter is on with its settings or defaults (`true`), or off (`null`)."""

    profile: Annotated[Literal["math", "code", "chat"] | None, Free] = Field(
        None, description="defaults for a task: filters that it turns on or off where the recipe does not say"
    )

    format: Switch[Format] = Format()
    finish: Switch[Finish] = Finish()
    repetition: Optional[Repetition] = None
    language: Optional[Language] = None
    decontaminate: Optional[Decontaminate] = None
    correct: Switch[Correct] = Correct()
    length: Switch[Length] = None
    judge: Optional[ModelJudge] = None
    majority: Optional[Majority] = None
    pass_rate: Optional[PassRate] = None
    near_prompts: Optional[NearPrompts] = None
    dedup: Switch[Dedup] = Dedup()
    near_answers: Optional[NearAnswers] = None
    select: Switch[Select] = None

    @model_validator(mode="before")
    @classmethod
    def _of_profile(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(profile := values.get("profile"), str):
            return {**PROFILES.get(profile, {}), **values}
        return values

    @model_validator(mode="after")
    def _rates_have_grades(self) -> "Filter":
        if self.pass_rate and not self.correct:
            raise ValueError("pass_rate needs the verdicts of correct; turn that on, or pass_rate off")
        return self

    def judging_filters(self) -> list[TraceFilter | StreamFilter]:
        """The filters that are on and judge each trace by itself, in order."""
        return [each for each in self._all() if isinstance(each, (TraceFilter, StreamFilter))]

    def choosing_filters(self) -> list[ChoosingFilter]:
        """The filters that are on and compare traces, in order."""
        return [each for each in self._all() if isinstance(each, ChoosingFilter)]

    @property
    def draws(self) -> bool:
        """Whether a filter that is on depends on the recipe's seed."""
        return any(each.draws for each in self._all())

    @property
    def measures_student(self) -> bool:
        """Whether a filter that is on depends on the student's tokenizer."""
        return any(each.measures_student for each in self._all())

    def settings(self) -> dict[str, Any]:
        """As `Section.settings`, with every filter's name: on or off."""
        switches = {
            name: getattr(self, name) is not None
            for name, info in type(self).model_fields.items()
            if name in FILTERS and (Later not in info.metadata or getattr(self, name) is not None)
        }
        return switches | {key: value for key, value in super().settings().items() if key not in switches}

    @field_serializer("*")
    def _as_written(self, value: object) -> object:
        return (value.model_dump(mode="json") or True) if isinstance(value, BaseModel) else value

    def _all(self) -> list[AnyFilter]:
        values = (getattr(self, name) for name in type(self).model_fields)
        return [value for value in values if isinstance(value, AnyFilter)]


FILTERS: Mapping[str, type[AnyFilter]] = {  # of the table above: name → filter, in order
    name: next(kind for kind in get_args(field.annotation) if issubclass(kind, AnyFilter))
    for name, field in Filter.model_fields.items()
    if name != "profile"
}
