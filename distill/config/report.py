"""How a mistake in a recipe or a card is worded: one line, with the keys that the user wrote."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distill.config.yaml_text import one_line

Model = type[BaseModel]

# A key of an earlier version, without list indices → what to write now, as the end of a sentence. It answers an unknown
# key, and a key whose value became a mapping of keys.
RENAMED: dict[str, str] = {
    "filter.min_tokens": "filter.length: {min_tokens: …}",
    "filter.max_tokens": "filter.length: {max_tokens: …}",
    "filter.per_prompt": "filter.select: {per_prompt: …}",
    "filter.select": "filter.select: {per_prompt: …, order: …}",
    "filter.grade_timeout": "filter.correct: {timeout: …}",
    "filter.workers": "filter.correct: {workers: …}",
    "train.method": "train.adapter: {kind: lora}, or {kind: qlora}; leave it out for full fine-tuning",
    "train.lora_r": "train.adapter: {kind: lora, r: …}",
    "train.lora_alpha": "train.adapter: {kind: lora, alpha: …}",
    "train.lora_dropout": "train.adapter: {kind: lora, dropout: …}",
    "train.lora_target_modules": "train.adapter: {kind: lora, target_modules: …}",
    "train.objective": "train.objective: {kind: …}, with kind sft, logits, on_policy or grpo",
    "train.divergence": "train.objective: {kind: logits, divergence: …}",
    "train.logits_weight": "train.objective: {kind: logits, weight: …}",
    "train.logits_temperature": "train.objective: {kind: logits, temperature: …}",
    "train.logits_top_k": "train.objective: {kind: logits, top_k: …}",
}

SHOWN = 60  # characters of a wrong value or key in a message
PROBLEMS = 10  # named in one message
SHAPES = ("one", "several")  # branches of a value that may be one section or a list of them


class Location(NamedTuple):
    """The keys at which a problem is."""

    keys: tuple[str, ...]  # as the user writes them; ends at the first key that no model knows
    unknown: bool  # whether it ends at such a key
    siblings: list[str]  # the keys that would have been known there


def walk(root: Model, location: Sequence[str | int]) -> Location:
    """Follow a location through the models, dropping the names that pydantic gives to union branches.

    location: keys and list indices, as pydantic or the user names them.
    """
    models: list[Model] = [root]
    values: list[object] = []  # annotations of the values of a mapping, whose keys are the user's
    keys: list[str] = []
    for step in map(str, location):
        annotations: list[object] = [m.model_fields[step].annotation for m in models if step in m.model_fields]
        branches = [m for m in models if step in _tags(m)]
        if annotations or values:
            annotations = annotations or values
            models = [model for annotation in annotations for model in _models(annotation)]
            values = [value for annotation in annotations for value in _values(annotation)]
        elif step in SHAPES:
            continue
        elif branches and len(models) > 1:
            models = branches
            continue
        elif not step.isdecimal():
            return Location((*keys, step), True, _field_names(models))
        keys.append(step)
    return Location(tuple(keys), False, _field_names(models))


def _field_names(models: Sequence[Model]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models(annotation: object) -> list[Model]:
    """Every model class inside an annotation: through unions, tuples and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _values(annotation: object) -> list[object]:
    """The annotations of the values of every mapping inside an annotation."""
    inner = get_args(annotation)
    if get_origin(annotation) in (dict, Mapping):
        return [inner[1]]
    return [value for each in inner for value in _values(each)]


def _tags(model: Model) -> set[str]:
    """What a discriminated union calls this branch: its name, or the values of its one-valued Literal fields."""
    literals = [f.annotation for f in model.model_fields.values() if get_origin(f.annotation) is Literal]
    return {model.__name__} | {str(get_args(a)[0]) for a in literals if len(get_args(a)) == 1}


def unknown_key(root: Model, path: Location, section: str = "") -> str:
    """Word an unknown key: its new name, else the nearest valid key beside it, else the nearest in the whole tree.

    section: as in `report`.
    """
    above = f"{section}." if section else ""
    if new := _renamed(path):
        return f"unknown key; write {new}"
    *parents, key = path.keys
    prefix = "".join(f"{p}." for p in parents)
    if not path.siblings:
        return f"unknown key: there are no keys below {'.'.join(parents)}"
    if near := _nearest(key, path.siblings):
        return f"unknown key; did you mean {above}{prefix}{near}?"
    # Nothing of a list: another branch of a union may have it, and which item of another list would be meant?
    others = [dotted for dotted in _all_keys(root) if dotted != prefix + key and ".0" not in dotted]
    elsewhere = {dotted.rpartition(".")[2]: dotted for dotted in reversed(others)}
    if near := _nearest(key, list(elsewhere), cutoff=0.85):  # most often the very same key of another section
        return f"unknown key; did you mean {above}{elsewhere[near]}?"
    return f"unknown key; valid here: {', '.join(path.siblings)}"


def _renamed(path: Location) -> str | None:
    key = ".".join(key for key in path.keys if not key.isdecimal())
    return RENAMED.get(key.replace("train.phases.", "train."))


def _nearest(key: str, names: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The closest name by spelling, or by initials: `lr` stands for learning_rate in this field."""
    for name in names:
        if len(key) > 1 and key == "".join(word[0] for word in name.split("_")):
            return name
    return next(iter(difflib.get_close_matches(key, names, n=1, cutoff=cutoff)), None)


def _all_keys(model: Model, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in _models(field.annotation):
            index = "0." if get_origin(field.annotation) is tuple else ""
            keys += _all_keys(inner, f"{prefix}{name}.{index}")
    return keys


def report(
    model: Model,
    error: ValidationError,
    where: str,
    authors: Sequence[tuple[tuple[str, ...], str]],
    section: str = "",
) -> str:
    """Every problem on one line, grouped by its author.

    where: the file. authors: keys that an override set, and what that override is called in a message. section: key
    above the model's own in what the user wrote.
    """
    groups: dict[str, list[str]] = {}
    details = error.errors(include_url=False)
    inside = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    # A list whose items are reported themselves is "too short" only because they do not count.
    details = [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in inside]
    for detail in details[:PROBLEMS]:
        path = walk(model, detail["loc"])
        author = next((name for keys, name in reversed(authors) if path.keys[: len(keys)] == keys), where)
        dotted = ".".join(filter(None, (section if path.keys else "", *path.keys)))
        prefix = f"{_cut(dotted)}: " if dotted and author != f"--set {dotted}" else ""
        groups.setdefault(author, []).append(prefix + _problem(model, path, detail, section))
    more = f"; and {len(details) - PROBLEMS:,} more problems" if len(details) > PROBLEMS else ""
    return "; ".join(f"{author}: {'; '.join(problems)}" for author, problems in groups.items()) + more


def _problem(model: Model, path: Location, detail: ErrorDetails, section: str) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(model, path, section)
    if not isinstance(detail["input"], Mapping) and (new := _renamed(path)):
        return f"write {new}"
    if kind == "missing":
        return "is missing, and has no default"
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator']} is missing"
    if kind == "union_tag_invalid":
        return (
            f"{context['discriminator']} should be one of {context['expected_tags']}, not '{_cut(str(context['tag']))}'"
        )
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return f"needs at least {context['min_length']} item"
    message = detail["msg"].replace("Input should be", "should be")
    message = message.replace("an object", "a mapping of keys").replace("array", "list")
    message = message.replace("String should", "should")
    return f"{message}, not {shown(detail['input'])}{_quoting(kind, detail['input'])}"


def _quoting(kind: str, value: object) -> str:
    """The hint to quote a scalar that YAML reads as another type than text; empty for other mistakes."""
    if kind != "string_type" or not isinstance(value, bool | int | float):
        return ""
    if isinstance(value, bool):
        return f"; YAML reads {'yes and on' if value else 'no and off'} as {shown(value)}: quote the word"
    return f'; quote it: "{value}"'


def shown(value: object) -> str:
    """A value as JSON, cut to fit into a message."""
    return _cut(json.dumps(value, default=str, ensure_ascii=False))


def _cut(text: str) -> str:
    printable = "".join(c if c.isprintable() else " " for c in text[: SHOWN + 1])
    return one_line(printable if len(text) <= SHOWN else printable[: SHOWN - 3] + "…")
