"""From YAML text and `--set` overrides to a validated model, or to one line that says what is wrong and what to write.

Pydantic's own report of a mistake runs over several lines and names union branches the user never wrote. Here every
problem becomes `key: what is wrong`, with the nearest valid key where a key is unknown, and all of them share one line.
A key that an earlier version knew is answered with the new one (`RENAMED`).

Validation is strict and goes through JSON: `samples: "4"` is refused rather than guessed at, while YAML lists still
become tuples. `yaml_text` reads and writes the text, `report` words the problems.

OmegaConf and Hydra were rejected: their interpolation and composition are a second language, and one file with
overrides is all that a recipe needs.
"""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from distill.config.report import RENAMED, report, shown, unknown_key, walk
from distill.config.yaml_text import Value, dump_yaml, load_yaml, one_line, read_yaml
from distill.errors import UserError

__all__ = ["RENAMED", "Value", "did_you_mean", "dump_yaml", "parse", "read_yaml"]

M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], data: object, where: str, overrides: Sequence[str] = (), section: str = "") -> M:
    """Validate `data` as `model` after applying `KEY=VALUE` overrides; `where` names the file in errors.

    section: key above the model's own in what the user wrote, such as `judge`; the overrides' keys are without it.
    Errors: UserError with every problem, on one line.
    """
    if not isinstance(data, Mapping):
        what = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise UserError(f"{where}: {what}; it should be a mapping of keys ({', '.join(model.model_fields)})")
    parsed = [_parse_override(text, section) for text in overrides]
    for override in parsed:
        data = _applied(model, data, override)
    try:
        made = model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        authors = [(override.keys, override.where) for override in parsed]
        raise UserError(report(model, error, where, authors, section)) from None
    if (key := _not_finite(data)) is not None:  # where a key takes any JSON value, which pydantic lets through
        dotted = ".".join(filter(None, (section, *key)))
        raise UserError(f"{where}: {dotted}: should be a finite number; JSON has no NaN and no infinity")
    return made


def _not_finite(data: object) -> tuple[str, ...] | None:
    """The keys of the first number that is NaN or infinite; None without any."""
    if isinstance(data, Mapping | list):
        for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
            if (keys := _not_finite(value)) is not None:
                return (str(key), *keys)
    return () if isinstance(data, float) and not math.isfinite(data) else None


class _Override(NamedTuple):
    keys: tuple[str, ...]
    value: Value
    section: str = ""

    @property
    def where(self) -> str:
        return f"--set {'.'.join(filter(None, (self.section, *self.keys)))}"


def _parse_override(text: str, section: str = "") -> _Override:
    """`a.b=c` with c read as YAML; nothing after the = is the empty string."""
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"--set {one_line(text)}: write it as KEY=VALUE, for example --set train.learning_rate=2e-5")
    if not value.strip():
        return _Override(keys, value, section)
    try:
        return _Override(keys, load_yaml(value, ""), section)
    except UserError as error:
        reason = str(error).partition("not valid YAML: ")[2] or str(error).removeprefix(": ")
        name = f"{section}.{key}" if section else key
        raise UserError(f"--set {one_line(name)}: the value is not valid YAML ({reason}); quote it") from None


def _applied(model: type[BaseModel], data: object, override: _Override) -> object:
    """A copy of `data` with the override in place. `UserError` for a key or a list index that does not exist."""
    path = walk(model, override.keys)
    if path.unknown:
        name = ".".join(filter(None, (override.section, *path.keys)))
        raise UserError(f"--set {name}: {unknown_key(model, path, override.section)}")
    return _replaced(data, override.keys, override)


def _replaced(data: object, keys: Sequence[str], override: _Override) -> object:
    if not keys:
        return override.value
    key, *rest = keys
    if isinstance(data, list):
        if not (key.isascii() and key.isdecimal()) or len(key) > 9 or int(key) >= len(data):
            raise UserError(f"{override.where}: {key!r} should be an index from 0 to {len(data) - 1} of that list")
        return [_replaced(item, rest, override) if i == int(key) else item for i, item in enumerate(data)]
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{override.where}: there is nothing below {shown(data)}, which is a single value")
    return data | {key: _replaced(data.get(key), rest, override)}


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The text `; did you mean X?` for the nearest name, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
