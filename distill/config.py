"""From YAML text and `--set` overrides to a validated model, or to one line that says what to mend.

Pydantic's own report of a mistake runs over several lines and names union branches the user never wrote. Here every
problem becomes `key: what is wrong`, with the nearest valid key where a key is unknown, and all of them share one line.

Validation is strict and goes through JSON: `samples: "4"` is refused rather than guessed at, while YAML lists still
become tuples. Two of PyYAML's habits are mended on the way in: `1e-5` is a number (YAML 1.1 makes it a string), and a
key written twice is an error (PyYAML keeps the last in silence).

OmegaConf and Hydra were rejected: their interpolation and composition are a second language, and one file with
overrides is all that a recipe needs.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distill.errors import UserError

M = TypeVar("M", bound=BaseModel)
Model = type[BaseModel]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with YAML 1.2's floats and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that `_Loader` would take for a number, or that holds Unicode's own line ends."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    bare = not re.search("[\x85\u2028\u2029]", text)  # PyYAML would read these back as a newline
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if bare else '"')


_Dumper.add_representer(str, _text_node)

for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. `UserError` with file and line when it is not YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file (byte {error.start}): is this a YAML file?") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {_one_line(error.problem or error.context)}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None


def dump_yaml(data: Any) -> str:
    """YAML that `read_yaml` reads back as it was, keys in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse(model: type[M], data: Any, where: str, overrides: Sequence[str] = ()) -> M:
    """Validate `data` as `model` after applying `KEY=VALUE` overrides; `where` names the file in errors."""
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise UserError(f"{where}: {found}; it should be a mapping of keys ({', '.join(model.model_fields)})")
    parsed = [_parse_override(text) for text in overrides]
    for override in parsed:
        data = _applied(model, data, override)
    try:
        text = json.dumps(data, default=str)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: an alias (*name) contains itself; write the value out") from None
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(_report(model, error, where, parsed)) from None


# ---- overrides


class _Override(NamedTuple):
    keys: tuple[str, ...]
    value: Any

    @property
    def where(self) -> str:
        return f"--set {'.'.join(self.keys)}"


def _parse_override(text: str) -> _Override:
    """`a.b=c` with c read as YAML; nothing after the = is the empty string."""
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"--set {_one_line(text)}: write it as KEY=VALUE, for example --set train.learning_rate=2e-5")
    try:
        return _Override(keys, yaml.load(value, _Loader) if value.strip() else value)
    except yaml.YAMLError as error:
        reason = _one_line(getattr(error, "problem", None) or error)
        raise UserError(f"--set {key}: the value is not valid YAML ({reason}); quote it") from None


def _applied(model: Model, data: Any, override: _Override) -> Any:
    """A copy of `data` with the override in place. `UserError` for a key or a list index that does not exist."""
    path = _walk(model, override.keys)
    if path.unknown:
        raise UserError(f"--set {'.'.join(path.keys)}: {_unknown_key(model, path)}")
    return _replaced(data, override.keys, override)


def _replaced(data: Any, keys: Sequence[str], override: _Override) -> Any:
    if not keys:
        return override.value
    key, *rest = keys
    if isinstance(data, list):
        if not key.isdecimal() or int(key) >= len(data):
            raise UserError(f"{override.where}: {key!r} should be an index from 0 to {len(data) - 1} of that list")
        return [_replaced(item, rest, override) if i == int(key) else item for i, item in enumerate(data)]
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{override.where}: there is nothing below {_shown(data)}, which is a single value")
    return data | {key: _replaced(data.get(key), rest, override)}


# ---- errors


class _Path(NamedTuple):
    """Where a problem is."""

    keys: tuple[str, ...]  # as the user writes them; ends at the first key that no model knows
    unknown: bool  # whether it ends at such a key
    siblings: list[str]  # the keys that would have been known there


def _walk(root: Model, location: Sequence[str | int]) -> _Path:
    """Follow a location through the models, dropping the names that pydantic gives to union branches."""
    models: list[Model] = [root]
    keys: list[str] = []
    for step in map(str, location):
        annotations = [m.model_fields[step].annotation for m in models if step in m.model_fields]
        branches = [m for m in models if step in _tags(m)]
        if annotations:
            models = [found for annotation in annotations for found in _models(annotation)]
        elif branches and len(models) > 1:
            models = branches
            continue
        elif not step.isdecimal():
            return _Path((*keys, step), True, _field_names(models))
        keys.append(step)
    return _Path(tuple(keys), False, _field_names(models))


def _field_names(models: Sequence[Model]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models(annotation: Any) -> list[Model]:
    """Every model class inside an annotation: through unions, tuples and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _tags(model: Model) -> set[str]:
    """The values of its one-valued Literal fields: what a discriminated union calls this branch."""
    literals = [f.annotation for f in model.model_fields.values() if get_origin(f.annotation) is Literal]
    return {str(get_args(a)[0]) for a in literals if len(get_args(a)) == 1}


def _unknown_key(root: Model, path: _Path) -> str:
    """`unknown key; did you mean …?`: looked for beside it first, then in the whole tree."""
    *parents, key = path.keys
    prefix = "".join(f"{p}." for p in parents)
    if not path.siblings:
        return f"unknown key: there are no keys below {'.'.join(parents)}"
    if near := _nearest(key, path.siblings):
        return f"unknown key; did you mean {prefix}{near}?"
    # Nothing of a list: another branch of a union may have it, and which item of another list would be meant?
    others = [dotted for dotted in _all_keys(root) if dotted != prefix + key and ".0" not in dotted]
    elsewhere = {dotted.rpartition(".")[2]: dotted for dotted in reversed(others)}
    if near := _nearest(key, list(elsewhere)):
        return f"unknown key; did you mean {elsewhere[near]}?"
    return f"unknown key; valid here: {', '.join(path.siblings)}"


def _nearest(key: str, names: Sequence[str]) -> str | None:
    """The closest name by spelling, or by initials: `lr` is learning_rate to everybody in this field."""
    for name in names:
        if len(key) > 1 and key == "".join(word[0] for word in name.split("_")):
            return name
    return next(iter(difflib.get_close_matches(key, names, n=1, cutoff=0.6)), None)


def _all_keys(model: Model, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in _models(field.annotation):
            index = "0." if get_origin(field.annotation) is tuple else ""
            keys += _all_keys(inner, f"{prefix}{name}.{index}")
    return keys


def _report(model: Model, error: ValidationError, where: str, overrides: Sequence[_Override]) -> str:
    """All problems on one line, grouped by who wrote them: the file, or an override."""
    groups: dict[str, list[str]] = {}
    details = error.errors(include_url=False)
    inside = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    for detail in details:
        if detail["type"] == "too_short" and detail["loc"] in inside:
            continue  # only because the items, reported themselves, do not count
        path = _walk(model, detail["loc"])
        author = next((o.where for o in reversed(overrides) if path.keys[: len(o.keys)] == o.keys), where)
        dotted = ".".join(path.keys)
        prefix = f"{dotted}: " if dotted and author != f"--set {dotted}" else ""
        groups.setdefault(author, []).append(prefix + _problem(model, path, detail))
    return "; ".join(f"{author}: {'; '.join(problems)}" for author, problems in groups.items())


def _problem(model: Model, path: _Path, detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(model, path)
    if kind == "missing":
        return "is missing, and has no default"
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator']} is missing"
    if kind == "union_tag_invalid":
        return f"{context['discriminator']} should be one of {context['expected_tags']}, not '{context['tag']}'"
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return f"needs at least {context['min_length']} item"
    message = detail["msg"].replace("Input should be", "should be")
    message = message.replace("an object", "a mapping of keys").replace("array", "list")
    message = message.replace("String should", "should")
    return f"{message}, not {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    text = _one_line(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "…"


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


# ---- spelling of names, shared with the catalog


def did_you_mean(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""
