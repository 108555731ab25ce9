"""Write the reference pages of the documentation from the code: recipe keys, card keys, filters, commands.

    python tools/write_reference.py

The pages of `PAGES` come from the pydantic models, the filters and the command line itself, so a key, a default, a
reason or an option is described in one place. `tests/unit/test_docs.py` compares the
committed pages with what this writes.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distill.cli import app
from distill.filters.base import AnyFilter, Example
from distill.recipe import BenchmarkCard, Recipe, StudentCard, TeacherCard
from distill.recipe.filter import FILTERS
from distill.section import Free, Section

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
LONGEST = 90  # characters of an example
GENERATED = "<!-- Written by tools/write_reference.py from the code; edit the descriptions there. -->"

RECIPE_INTRODUCTION = """
# Recipe reference

Every key of a recipe. [Recipes](recipes.md) explains how a recipe is written, copied and overridden; `distill recipes
show NAME --resolved` prints one with every default, and `distill recipes check FILE` validates one. Editors that speak
the YAML language server complete and check recipes with `recipes/recipe.schema.json`.

**May change** says whether a run directory accepts another value once the stage has been run. A key that says *yes* is
a count, a resource or a place: raising `generate.samples` extends the traces that are there. Any other key decides what
the stage produces; with another value the run is refused, the differing key is named, and `--fresh STAGE` or another
`--run-dir` is the way on.
"""
CARDS_INTRODUCTION = """
# Card reference

Every key of a teacher, student or benchmark card. A card is a YAML file: `distill teachers copy NAME FILE` writes one
to edit, `distill teachers check FILE` validates it; `students` and `benchmarks` have the same commands. See
[Teachers](teachers.md) and [Benchmarks](benchmarks.md).
"""
FILTERS_INTRODUCTION = """
# Filter reference

The filters in the order in which they are applied, and every reason that they give. A verdict reads `FILTER: REASON`,
such as `format: not_closed`; some reasons are followed by details, such as `correct: unverifiable: timeout`.
`distill traces RUN --verdict "correct: unverifiable"` shows the traces whose verdict begins so.

An example is a completion (⏎ is a line break) with the settings that decide it, beside the defaults; of filters that
compare prompts it is a prompt. The tests run every one of them.

[Filtering](filtering.md)
explains the stage, and the [recipe reference](recipe-reference.md#filter) lists the settings.
"""
COMMANDS_INTRODUCTION = """
# Commands

`RECIPE` is a name from `distill recipes list`, or the path of a YAML file. Exit codes: 0 done; 1 the work failed; 2 the
input is wrong (one line names the mistake and the remedy; no output is half-written); 130 interrupted after saving.
"""


# ---- keys


@dataclass(frozen=True)
class Row:
    """One key of a section. key: dotted. default: as YAML. free: whether it may change in a finished run."""

    key: str
    type: str
    default: str
    description: str
    free: bool

    @property
    def name(self) -> str:
        """The key, as of a variant."""
        return self.key


@dataclass(frozen=True)
class Variant:
    """A section that has its own table: one value of a discriminator, or the items of a list."""

    title: str
    section: type[Section]

    @property
    def name(self) -> str:
        """The key that it is a value of."""
        return self.title.split("`")[1]


def unwrapped(annotation: Any) -> tuple[Any, list[Any]]:
    """An annotation without `Annotated`, and its metadata."""
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    return annotation, metadata


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, nested ones included; the annotation alone where it is none."""
    annotation, _ = unwrapped(annotation)
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    return tuple(inner for member in get_args(annotation) for inner in members(member))


def sections(annotation: Any) -> list[type[Section]]:
    """The sections that an annotation admits, through unions and lists."""
    found: list[type[Section]] = []
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, Section):
            found.append(member)
        elif get_origin(member) is tuple:
            found += sections(get_args(member)[0])
    return list(dict.fromkeys(found))  # a union with a list of itself names each once


def tag(section: type[Section]) -> str:
    """`kind: hub` of a variant, or its name where no field tells the variants apart."""
    for name, info in section.model_fields.items():
        values = get_args(info.annotation)
        if get_origin(info.annotation) is Literal and len(values) == 1:
            return f"`{name}: {values[0]}`"
    return f"`{section.__name__}`"


def type_name(annotation: Any) -> str:
    """How a YAML author reads a type."""
    names = []
    for member in members(annotation):
        origin, inner = get_origin(member), get_args(member)
        if member is NoneType:
            names.append("null")
        elif origin is Literal:
            names += [f"`{value}`" for value in inner]
        elif origin is tuple and names and sections(inner[0]) and sections(inner[0]) == sections(annotation):
            names.append("a list of them")
        elif origin is tuple:
            names.append(f"list of {type_name(inner[0])}")
        elif origin is dict or origin is Mapping:
            names.append(f"mapping of {type_name(inner[0])} to {type_name(inner[1])}")
        elif isinstance(member, type) and issubclass(member, Section):
            names.append(tag(member) if len(sections(annotation)) > 1 else "section")
        else:
            names.append(NAMES.get(member, getattr(member, "__name__", str(member))))
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]


def bounds(info: FieldInfo) -> str:
    """`, ≥ 1` and the like."""
    found = [
        f"{sign} {value:g}"
        for item in info.metadata
        for name, sign in BOUNDS.items()
        if (value := getattr(item, name, None)) is not None and abs(value) < 2**31  # not what 64 bits hold
    ]
    return "".join(f", {bound}" for bound in found)


def as_yaml(value: Any) -> str:
    """A default as a YAML author would write it."""
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_unset=True) or value.model_dump(mode="json")
    if isinstance(value, tuple):
        return f"`[{', '.join(as_yaml(item).strip('`') for item in value)}]`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {as_yaml(item).strip(chr(96))}' for key, item in value.items())}}}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def rows(section: type[Section], prefix: str = "", default: Section | None = None) -> Iterator[Row | Variant]:
    """The keys of a section, those of plain nested sections dotted; variants are given to have tables of their own."""
    for name, info in section.model_fields.items():
        key, annotation = f"{prefix}{name}", info.annotation
        nested = sections(annotation)
        free = Free in info.metadata
        value = getattr(default, name) if default is not None else info.get_default(call_default_factory=True)
        plain = isinstance(annotation, type) and issubclass(annotation, Section)
        if plain:
            assert isinstance(annotation, type)
            yield from rows(annotation, f"{key}.", value if isinstance(value, Section) else None)
            continue
        if nested and nested[0] in FILTERS.values():  # a switch, with settings of its own
            text = one_line(nested[0].__doc__ or "")
            yield Row(key, "true, false or settings", as_yaml(value is not None), text, free)
            yield from rows(nested[0], f"{key}.", value if isinstance(value, Section) else None)
            continue
        yield Row(key, type_name(annotation) + bounds(info), as_yaml(value), one_line(info.description or ""), free)
        for variant in nested:
            title = f"`{key}`, {tag(variant)}" if len(nested) > 1 else f"`{key}`"
            yield Variant(title, variant)


def one_line(text: str) -> str:
    """A text as one table cell, in which tags such as `<think>` stay text."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def anchored(title: str) -> str:
    """A title with an anchor that does not depend on how a site makes them."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return f"{title} {{ #{name} }}"


def table(found: list[Row], free: bool) -> str:
    """Rows as a table in Markdown. free: with the column on what may change."""
    head = ["key", "type", "default", "description"] + (["may change"] if free else [])
    lines = [head, ["---"] * len(head)]
    for row in found:
        cells = [f"`{row.key}`", row.type, row.default, row.description]
        lines.append(cells + (["yes" if row.free else "no"] if free else []))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def shared(section: type[Section], other: type[Section]) -> set[str]:
    """The fields that two sections have from a common base: those of a phase and of `train`."""
    bases = [base for base in section.__mro__ if base in other.__mro__ and issubclass(base, Section)]
    return set(bases[0].model_fields)


def part(
    title: str, section: type[Section], free: bool, prefix: str = "", level: str = "##", without: Collection[str] = ()
) -> list[str]:
    """A heading, the section's note, its table, and the tables of its variants. without: fields described above."""
    found = [row for row in rows(section, prefix) if row.name.partition(".")[0] not in without]
    texts = [
        f"{level} {anchored(title)}",
        one_line(section.__doc__ or ""),
        table([row for row in found if isinstance(row, Row)], free),
    ]
    for variant in found:
        if isinstance(variant, Variant):
            known = shared(variant.section, section)
            texts += part(variant.title, variant.section, free, level=level + "#", without=known)
    return [text for text in texts if text]


def recipe_page() -> str:
    """`docs/recipe-reference.md`."""
    top = [row for row in rows(Recipe) if isinstance(row, Row) and "." not in row.key]
    texts = [GENERATED, RECIPE_INTRODUCTION.strip(), "## Top level { #top-level }", table(top, True)]
    for variant in rows(Recipe):
        if isinstance(variant, Variant) and not variant.title.startswith(plain_prefixes()):
            texts += part(variant.title, variant.section, True, level="###")
    for name, info in Recipe.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            texts += part(f"`{name}`", info.annotation, True, f"{name}.")
    return "\n\n".join(texts) + "\n"


def plain_prefixes() -> tuple[str, ...]:
    """Beginnings of the titles of variants that belong to a section with a heading of its own."""
    fields = Recipe.model_fields.items()
    return tuple(f"`{n}." for n, i in fields if isinstance(i.annotation, type) and issubclass(i.annotation, Section))


def cards_page() -> str:
    """`docs/card-reference.md`."""
    texts = [GENERATED, CARDS_INTRODUCTION.strip()]
    for title, card in (("Teacher", TeacherCard), ("Student", StudentCard), ("Benchmark", BenchmarkCard)):
        texts += part(title, card, False)
    return "\n\n".join(texts) + "\n"


def filters_page() -> str:
    """`docs/filter-reference.md`. Each example is one that the filter's tests run."""
    texts = [GENERATED, FILTERS_INTRODUCTION.strip()]
    for name, kind in FILTERS.items():
        lines = [
            f"| `{reason}` | {one_line(meaning)} | {example_of(kind, reason)} |"
            for reason, meaning in kind.reasons.items()
        ]
        texts += [f"## {anchored(f'`{name}`')}", one_line(kind.__doc__ or "")]
        texts.append("\n".join(["| reason | meaning | example |", "| --- | --- | --- |", *lines]))
    return "\n\n".join(texts) + "\n"


def example_of(kind: type[AnyFilter], reason: str) -> str:
    """The first example of a filter with this reason, shortened: the completion, with what else decides."""
    for example in getattr(kind, "examples", ()):
        more = dict(example.settings)
        if isinstance(example, Example):
            if example.reason.partition(": ")[0] == reason:
                more |= {"finish_reason": example.finish_reason} if example.finish_reason != "stop" else {}
                more |= {"tokens": example.tokens} if example.tokens is not None else {}
                return shown(example.text, more)
        elif reason in (reasons := [each.partition(": ")[0] for each in example.reasons]):
            place = reasons.index(reason)
            text = example.questions[place] if example.questions else example.texts[place]
            others = len(example.texts) - 1
            return f"{shown(text, more)}, beside {others} other{'s' * (others > 1)}"
    raise AssertionError(f"{kind.name}: no example of {reason}")


def shown(text: str, more: Mapping[str, object]) -> str:
    """A text and settings as code in a cell of a table."""
    cells = [text.replace("\n", "⏎"), *(f"{key}: {value}" for key, value in more.items())]
    cut = (cell if len(cell) <= LONGEST else f"{cell[: LONGEST - 20]} … {cell[-17:]}" for cell in cells)
    return ", ".join(f"`` {cell} ``".replace("|", "\\|") for cell in cut if cell)


# ---- commands


def commands_page() -> str:
    """`docs/commands.md`."""
    texts = [GENERATED, COMMANDS_INTRODUCTION.strip()]
    for name, command in commands(typer.main.get_command(app)):
        texts.append(f"## {anchored(f'`distill {name}`')}")
        texts.append((command.help or "").replace("<", "&lt;").strip())
        options = [
            [f"`{' '.join([*p.opts, p.metavar or '']).strip()}`" if p.param_type_name == "option" else f"`{p.metavar}`",
             one_line(getattr(p, "help", None) or "")]
            for p in command.params
            if "--help" not in p.opts
        ]  # fmt: skip
        if options:
            lines = [["argument or option", "what it is"], ["---", "---"], *options]
            texts.append("\n".join("| " + " | ".join(cells) + " |" for cells in lines))
    return "\n\n".join(texts) + "\n"


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its whole name, in the order of `distill --help`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


PAGES = {
    "recipe-reference.md": recipe_page,
    "card-reference.md": cards_page,
    "filter-reference.md": filters_page,
    "commands.md": commands_page,
}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
