"""JSON files of a model directory, read with types, ranges and a bound on their size.

A config.json comes from a stranger: any key may be absent, of another type, or out of range. `Config` is the only way
to its values, and every look-up states the type and the range that it accepts, so that a wrong value is refused with
file and key rather than met later as a division by zero or a list of 10^9 layers.

Standard library only: planning and cards read configs too, and must start fast.
"""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
D = TypeVar("D", int, None)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MOST_BYTES = 64 << 20  # of a JSON file; the index of DeepSeek-V3's 91,991 tensors has 9 MB

# Upper limits of sizes, well above every published model: past them a value is damage, and would cost memory or hours.
MOST = 1 << 31  # of any integer
WIDEST = 1 << 24  # rows or columns of a matrix
MOST_LAYERS = 4096
MOST_EXPERTS = 1 << 16
WIDEST_HEAD = 1 << 16

_LFS_POINTER = b"version https://git-lfs"
_SHOWN = 60  # characters of a wrong value that a message repeats


def index_of(model_dir: Path) -> Path | None:
    """The index of the shards that a model's weights are read from; None where they are in one file.

    That file counts where both are there, as in transformers (5.23, `modeling_utils`): a model that was saved anew over
    its shards is the one in the file.
    """
    index = model_dir / INDEX
    return index if index.is_file() and not (model_dir / SINGLE).is_file() else None


def read_json(path: Path) -> dict[str, Json]:
    """The object in a JSON file. Errors: ValueError, with file and remedy, when it is missing, too large or not one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a model directory needs the {path.name} it was published with")
    refuse_lfs_pointer(path)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path}: {size:,} bytes; at most {MOST_BYTES:,} are read, download it again")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; download it again") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__}, not an object; download it again")
    return cast(dict[str, Json], raw)


def refuse_lfs_pointer(path: Path) -> None:
    """Errors: ValueError when a clone left a Git LFS pointer in the file's place."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in {path.parent}")


class Config:
    """A JSON object with typed look-ups. A key that is null counts as absent. where: names the object in errors.

    Errors, of every look-up: ValueError, one line with object, key and value, for another type or a value out of range.
    """

    def __init__(self, raw: dict[str, Json], where: str) -> None:
        self.raw, self.where = raw, where

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.raw.get(key) is not None

    def int(self, key: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """An integer from `least` to `most`. Without a default the key is required."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        return self._integer(key, value, least, most)

    def int_or(self, key: str, default: D, least: builtins.int = 1, most: builtins.int = MOST) -> builtins.int | D:
        """An integer from `least` to `most`, or the default, which may be None."""
        value = self.raw.get(key)
        return default if value is None else self._integer(key, value, least, most)

    def float(
        self,
        key: str,
        default: builtins.float | None = None,
        above: builtins.float = -math.inf,
        least: builtins.float = -math.inf,
        most: builtins.float = math.inf,
    ) -> builtins.float:
        """A finite number greater than `above`, from `least` to `most`. Without a default the key is required."""
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise self._missing(key)
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, "must be of type float")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and above < number and least <= number <= most):
            limits = [
                *([f"above {above:g}"] if above > -math.inf else []),
                *([f"at least {least:g}"] if least > -math.inf else []),
                *([f"at most {most:g}"] if most < math.inf else []),
            ]
            raise self._wrong(key, f"must be {' and '.join(limits) or 'finite'}")
        return number

    def bool(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "must be of type bool")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "must be of type str")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; an absent one is empty."""
        value = self.raw.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "must be a list of strings")
        return cast(list[str], value)

    def ints(self, key: str, most: builtins.int) -> list[builtins.int]:
        """A list of integers from 0 to `most`; an absent one is empty."""
        value = self.raw.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= most for item in value):
            raise self._wrong(key, f"must be a list of integers from 0 to {most}")
        return cast(list[builtins.int], value)

    def section(self, key: str) -> Config | None:
        """The object under a key, None where it is absent or empty."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "must be an object")
        return Config(value, f"{self.where}: {key}") if value else None

    def token_ids(self, key: str) -> list[builtins.int]:
        """A token id or a list of them; an absent one is empty."""
        value = self.raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and abs(item) < MOST for item in ids):
            raise self._wrong(key, "must be a token id or a list of token ids")
        return cast(list[int], ids)

    def only(self, key: str, allowed: Collection[Json]) -> None:
        """Refuse a value that is not among `allowed`; an absent key is fine."""
        value = self.raw.get(key)
        if value is not None and not any(value == item and type(value) is type(item) for item in allowed):
            names = " or ".join(repr(item) for item in allowed)
            raise ValueError(f"{self.where}: '{key}' is {shown(value)}; only {names} is supported")

    def _integer(self, key: str, value: Json, least: builtins.int, most: builtins.int) -> builtins.int:
        if value is None:
            raise self._missing(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "must be of type int")
        if not least <= value <= most:
            raise self._wrong(key, f"must be from {least} to {most}")
        return value

    def _missing(self, key: str) -> ValueError:
        return ValueError(f"{self.where}: '{key}' is missing; is this the config.json of the whole model?")

    def _wrong(self, key: str, rule: str) -> ValueError:
        return ValueError(f"{self.where}: '{key}' is {shown(self.raw.get(key))}; it {rule}")


def shown(value: Json) -> str:
    """A value as a message repeats it, cut off where it is long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"an integer of more than {_SHOWN} digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
