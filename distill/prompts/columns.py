"""A row's columns: the value at a dotted name, and what one row may hold.

`a.b` is the key b of column a. A column may keep an object as JSON text, as verl and pandas write nested values; a
dotted name reads through it. A column whose own name has a dot comes first.
"""

import json
import math
from collections.abc import Iterable, Mapping

from distill.errors import UserError
from distill.limits import JSON_DEPTH, ROW_BYTES

Row = tuple[str, dict[str, object]]  # the place, for messages, and the columns

MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns of rows that are not text alone


def value_at(row: Mapping[str, object], column: str) -> object:
    """The value of a column, None where it is missing. `a.b` is the key b of the column a, if no column is named so."""
    if column in row or "." not in column:
        return row.get(column)
    value: object = row
    for key in column.split("."):
        value = parsed(value)
        value = value.get(key) if isinstance(value, dict) else None
    return value


def first_of(values: Mapping[str, object], key: str, other: str) -> object:
    """The value of a key, or of the other one where it is missing or null: Arrow gives every turn of a column all keys
    that one has."""
    return values.get(other) if values.get(key) is None else values[key]


def has_column(row: Mapping[str, object], column: str) -> bool:
    """Whether a row has a column, or the first part of a dotted one."""
    return column in row or column.partition(".")[0] in row


def listed(names: Iterable[str]) -> str:
    """Column names for a message: on one line, whatever a file calls its columns."""
    short = [name if len(name) <= 40 else f"{name[:39]}…" for name in (" ".join(name.split()) for name in names)]
    more = f" and {len(short) - 30} more" if len(short) > 30 else ""
    return (", ".join(short[:30]) or "(none)") + more


def parsed(value: object) -> object:
    """A list or an object that is kept as JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(value)
        except ValueError:  # text that only begins like JSON
            return value
    return value


# ---- JSON


def parse_json(text: str) -> object:
    """A JSON value; NaN is None. Errors: ValueError, for infinities, duplicate keys and deep nesting too."""
    try:
        value: object = _DECODER.decode(text)
    except RecursionError:
        value = None
    check_depth(text)
    return value


def parse_json_at(text: str, start: int) -> tuple[object, int]:
    """The JSON value that begins at `start`, and the index just past it. Errors: as `parse_json`."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError(f"brackets are nested more than {JSON_DEPTH} deep") from error
    check_depth(text[start:end])
    return value, end


def check_depth(text: str) -> None:
    """Raise ValueError for valid JSON whose brackets are nested too deep."""
    if text.count("[") + text.count("{") > JSON_DEPTH and _depth(text) > JSON_DEPTH:
        raise ValueError(f"brackets are nested more than {JSON_DEPTH} deep")


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not a JSON value")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return row


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float, object_pairs_hook=_unique)


def _depth(text: str) -> int:
    """How deep the brackets outside strings are nested in valid JSON."""
    deepest = depth = 0
    inside = escaped = False
    for character in text:
        if inside:
            inside = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            inside = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


# ---- what one row may hold


def checked(row: dict[str, object], where: str) -> dict[str, object]:
    """A row with None for NaN. Errors: UserError when it holds too much text."""
    if text_size(row) > ROW_BYTES:
        raise UserError(f"{where}: more than {ROW_BYTES >> 20} MiB of text in one row; remove the row")
    return {key: without_nan(value) for key, value in row.items()}


def text_size(value: object) -> int:
    """Characters and bytes of the texts in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(text_size, value.values()))
    return sum(map(text_size, value)) if isinstance(value, list) else 0


def without_nan(value: object) -> object:
    """The value with None for NaN, at every level."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return [without_nan(inner) for inner in value] if isinstance(value, list) else value
